"""What published sets look like on the disk: torchvision's classes, masks of a segmentation; and the released settings of
eight segmentation sets. eval.py has the measures."""
import inspect
import re
from typing import NamedTuple

import numpy as np
import torch
import torchvision

from plumbing.errors import Refused, need
from plumbing.files import read_lines, reading
from plumbing.images import images_in, read_image

# --- 1. Classification: sets of labelled images, names of classes, prompts -------------------------------------------

# Sets of torchvision.datasets with one label an image, by what they call their classes.
IN_WORDS = ('CIFAR10 CIFAR100 Caltech101 DTD FGVCAircraft FashionMNIST Flowers102 Food101 ImageNet Imagenette '
            'OxfordIIITPet RenderedSST2 STL10 StanfordCars SUN397').split()
MENDED = ['Caltech256', 'EuroSAT', 'MNIST']                 # by `mend_name`
NOT_IN_WORDS = 'CLEVRClassification Country211 FER2013 GTSRB KMNIST PCAM Places365 SVHN USPS'.split()
TORCHVISION_SETS = sorted(IN_WORDS + MENDED + NOT_IN_WORDS)


def mend_name(name):
    """'001.ak47' -> 'ak47', '0 - zero' -> 'zero', 'AnnualCrop' -> 'Annual Crop'"""
    name = re.sub(r'^\d+\W+', '', name)
    return re.sub('(?<=[a-z])(?=[A-Z])', ' ', name)


def torchvision_set(name, root, split, download, preprocess):
    """A set of TORCHVISION_SETS -> it, and which split of it that is.

    split: None means 'test'. Some sets have a switch `train` in its place. Others come whole: a split is refused. So is
    what torchvision cannot find, or read.
    """
    kind = getattr(torchvision.datasets, name)
    known = inspect.signature(kind).parameters
    options = {'transform': preprocess}
    chosen = split or 'test'
    if 'split' in known:
        options['split'] = chosen
    elif 'train' in known:
        need(chosen in ('train', 'test'), f'{name} has no split {chosen}; give train or test')
        options['train'] = chosen == 'train'
    else:
        need(not split, f'{name} has no splits in torchvision; '
             'leave --split away, and all its images are scored')
        chosen = 'none, all images'
    if download:
        need('download' in known, f'torchvision does not download {name}; fetch it yourself into --root')
        options['download'] = True
    try:
        return kind(root, **options), chosen
    except (OSError, RuntimeError, ValueError, AssertionError, ImportError) as error:
        raise Refused(f'torchvision cannot open {name} in {root} ({error}); '
                      'see --root, --split and --download') from None


def folder_set(folder, preprocess):
    """A set with one folder of images per class."""
    with reading(folder):
        source = torchvision.datasets.ImageFolder(folder, preprocess, loader=read_image)
    need(source.classes != ['train', 'val'], f'{folder} holds train/ and val/; give one of them')
    return source


def class_names(source, path=None):
    """Names in words of the classes of a torchvision set, or those in the file `path`, a line each in their order.

    Where two classes have one name they tie, and a tie counts against the model. So torchvision's own names of
    ImageNet, with two cranes, are refused. In a file they may repeat: it is the user's.
    """
    kind = type(source).__name__
    classes = getattr(source, 'classes', None) or getattr(source, 'categories', None)   # Caltech's
    listed = read_lines(path, numbered=True) if path else classes
    need(path or (classes and kind not in NOT_IN_WORDS),
         f'torchvision names the classes of {kind} by numbers or codes, or not at all; '
         'give a file of names in words by --classes')
    if classes and len(listed) != len(classes):
        raise Refused(f'{path} has {len(listed)} names for {len(classes)} classes; '
                      'give a line for each')
    names = []
    for name in listed:
        if isinstance(name, tuple):
            name = name[0]              # ImageNet's: the first of several synonyms
        if kind in MENDED and not path:
            name = mend_name(name)
        names.append(name.replace('_', ' ').strip())
    if not path:
        numbered = all(re.fullmatch(r'n?\d+', name) for name in names)        # n01440764 is ImageNet's
        need(not numbered,
             f'classes are called {names[0]} and the like; give names in words by --classes')
        check_names(names)
    return names


def open_clip_prompts():
    """The installed open_clip's 80 prompts and 1,000 names of ImageNet, those of the published figures."""
    try:
        from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
    except ImportError:
        raise Refused('--templates open_clip needs one package more: pip install open_clip_torch') from None
    return [template('{}') for template in OPENAI_IMAGENET_TEMPLATES], list(IMAGENET_CLASSNAMES)


IMAGENET_CLASSES = 1000


def is_imagenet(source):
    """torchvision's ImageNet, or its folders, which are called n01440764 and the like."""
    kind = type(source).__name__
    if kind == 'ImageFolder' and len(source.classes) == IMAGENET_CLASSES:
        return all(re.fullmatch(r'n\d{8}', name) for name in source.classes)
    return kind == 'ImageNet'


def read_synonyms(path):
    """A file in which line i has the names of class i, with commas between them -> a list of names for each class."""
    synonyms = []
    for line in read_lines(path, numbered=True):
        parts = line.replace('_', ' ').split(',')
        synonyms.append([name.strip() for name in parts if name.strip()])
    need(all(synonyms), f'{path} has a line of commas alone; give a name a class')
    check_names([first for first, *_ in synonyms])
    return synonyms


def check_names(names):
    twice = {name for name in names if names.count(name) > 1}
    need(not twice, f"several classes are called {', '.join(sorted(twice))}, and would tie; "
         'give a name to each in the file of --classes')


def read_templates(path):
    """Prompts with {} for the class, a line each. The path 'open_clip' means those of open_clip."""
    if path == 'open_clip':
        prompts, _ = open_clip_prompts()
        return prompts
    templates = read_lines(path)
    for template in templates:
        need('{}' in template, f"'{template}' in {path} needs {{}} where the class goes")
    return templates


# --- 2. Segmentation: settings of eight sets, masks ------------------------------------------------------------------

class Settings(NamedTuple):
    """How to segment a set."""
    size: int                           # short side of the image, in pixels
    classes: int = 0                    # lines of the class file; 0: any number
    scale: float = 40.0                 # of the cosines, before the softmax
    probability: float = 0.0            # pixels whose best class has less become class 0
    area: float = 0.0                   # classes with at most this share of the foreground lose their pixels
    reduce_zero_label: bool = False     # label 0 of the masks is ignored, 1 becomes class 0
    csa: bool = False                   # correlative self-attention in the last block


BENCHMARKS = {      # of the released code, after SCLIP; a set of your own is one more row
    'voc21': Settings(336, 21, scale=65, probability=0.1, area=0.1),
    'context60': Settings(336, 60, scale=50, probability=0.1),
    'coco-object': Settings(336, 81, scale=50, probability=0.1),
    'voc20': Settings(336, 20, reduce_zero_label=True),
    'cityscapes': Settings(560, 19),
    'context59': Settings(336, 59, reduce_zero_label=True),
    'ade20k': Settings(336, 150, reduce_zero_label=True),
    'coco-stuff': Settings(448, 171),
}
IGNORE = 255                            # a mask's pixels that count nowhere


def read_mask(path, size, classes, reduce_zero_label):
    """A PNG of class numbers, grey or palette, of `size` (w, h) -> (h, w) int64, IGNORE where it does not count."""
    mask = read_image(path, as_stored=True)
    values = np.array(mask, np.int64)   # of a palette image these are the numbers, not the colours
    need(values.shape == size[::-1],
         f'mask {path} is a {mask.mode} image of {mask.size} pixels; '
         f'it must be grey or palette, and of {size}')
    label = values[values != IGNORE].max(initial=0)
    most = classes if reduce_zero_label else classes - 1
    need(label <= most, f'mask {path} has label {label}, with {classes} lines in the class file '
         f'it may be {most} at most')
    if reduce_zero_label:
        values = np.where(np.isin(values, (0, IGNORE)), IGNORE, values - 1)
    return torch.from_numpy(values)


def by_stem(paths, suffix):
    """{name without suffix and ending: path} of the paths that have the suffix."""
    stems = {}
    for path in paths:
        if path.stem.endswith(suffix):
            stem = path.stem.removesuffix(suffix)
            need(stem not in stems,
                 f'{stems.get(stem)} and {path} have one name; rename one, or keep images and masks apart')
            stems[stem] = path
    return stems


def mask_pairs(images, masks, image_suffix, mask_suffix, listing=None):
    """[(image path, mask path)] of one stem: the file's name without suffix and ending. listing: a file of the stems to
    take, one a line; None: all."""
    image_paths = by_stem(images_in(images), image_suffix)
    png_paths = [path for path in images_in(masks) if path.suffix.lower() == '.png']
    mask_paths = by_stem(png_paths, mask_suffix)
    stems = read_lines(listing) if listing else mask_paths
    need(stems, f"{masks} has no mask '*{mask_suffix}.png'; see --mask-suffix")
    for stem in stems:
        need(stem in mask_paths, f'{masks} has no {stem}{mask_suffix}.png; see --mask-suffix')
        need(stem in image_paths,
             f'{images} has no image {stem}{image_suffix}, but a mask; see --image-suffix')
    return [(image_paths[stem], mask_paths[stem]) for stem in stems]
