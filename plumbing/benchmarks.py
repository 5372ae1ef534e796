"""Published sets: torchvision's, with their class names, and the masks of segmentation sets as they lie on disk.
Prompts, the released settings of eight segmentation sets, and the released steps from scores to classes are here, too.
The measures are in eval.py."""
import inspect
import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision

from plumbing.errors import Refused, need, note
from plumbing.files import read_lines, reading
from plumbing.images import images_in, open_image, pillow_errors, load_image

# --- 1. Classification: sets of labelled images, names of classes, prompts -------------------------------------------

# Sets of torchvision.datasets with one label per image, grouped by whether their class names are words.
IN_WORDS = ('CIFAR10 CIFAR100 Caltech101 DTD FGVCAircraft FashionMNIST Flowers102 Food101 ImageNet '
            'Imagenette OxfordIIITPet RenderedSST2 STL10 StanfordCars SUN397').split()
NOT_IN_WORDS = ('CLEVRClassification Caltech256 Country211 EuroSAT FER2013 GTSRB KMNIST MNIST PCAM '
                'Places365 SVHN USPS').split()
TORCHVISION_SETS = sorted(IN_WORDS + NOT_IN_WORDS)


def torchvision_set(name, root, split, download, preprocess):
    """A name of TORCHVISION_SETS -> the set, and which split of it was opened. split: None means 'test'. Some sets have
    a switch `train` instead of named splits, others are not split at all."""
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
        need(not split, f'{name} has no splits in torchvision; leave out --split')
        chosen = 'none, all images'
    if download:
        options['download'] = True
    try:
        return kind(root, **options), chosen
    except (OSError, RuntimeError, ValueError, AssertionError, ImportError) as error:
        raise Refused(f'torchvision cannot open {name} in {root} ({error}); '
                      'see --root, --split and --download') from None


def folder_set(folder, preprocess):
    """A set with a folder of images for each class."""
    with reading(folder):
        source = torchvision.datasets.ImageFolder(folder, preprocess, loader=load_image)
    classes = source.classes
    halves = [name for name in classes if name.lower() in ('train', 'val', 'valid', 'validation', 'test')]
    need(len(halves) < min(2, len(classes)),
         f"{folder} holds the halves {', '.join(halves)}, which are no classes; give one of them as --folder")
    need(not classes[0].startswith('.'), f'{folder} holds the hidden folder {classes[0]}, which is no class; remove it')
    is_numbered = all(name.isdecimal() for name in classes)
    need(not is_numbered or classes == sorted(classes, key=int),
         f'the folders of {folder} are numbered, but 10 comes before 2; add leading zeros')
    return source


def class_names(source, path=None):
    """The class names of a torchvision set, in words. path: a file to take them from, one per line in class order, or
    'open_clip' for its names of ImageNet's classes. Both may repeat a name, but torchvision's own names may not."""
    kind = type(source).__name__
    classes = getattr(source, 'classes', None) or getattr(source, 'categories', None)
    if path:
        if path == 'open_clip':
            names = open_clip_prompts()[1]
        else:
            names = [line.replace('_', ' ').strip() for line in read_lines(path, numbered=True)]
        need(not classes or len(names) == len(classes),
             f'{path} has {len(names)} names for {len(classes or [])} classes; give one line per class')
        return names
    need(classes and kind not in NOT_IN_WORDS,
         f'torchvision does not name the classes of {kind} in words; give a file of names with --classes')
    names = []
    for name in classes:
        if isinstance(name, tuple):
            name = name[0]              # ImageNet's: the first of several synonyms
        names.append(name.replace('_', ' ').strip())
    is_numbered = all(re.fullmatch(r'n?\d+', name) for name in names)     # n01440764: ImageNet
    need(not is_numbered, f'classes are called {names[0]} and the like; give words with --classes')
    check_names(names)
    return names


def open_clip_prompts():
    """The installed open_clip's 80 prompts and 1,000 ImageNet names, with which published figures were computed."""
    try:
        import open_clip
    except ImportError:
        raise Refused('open_clip is not installed; pip install open_clip_torch, or give a file') from None
    templates = [template('{}') for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    return templates, list(open_clip.IMAGENET_CLASSNAMES)


def read_synonyms(path):
    """A file whose line i has the names of class i, separated by commas -> a list of names for each class."""
    synonyms = []
    for line in read_lines(path, numbered=True):
        parts = line.replace('_', ' ').split(',')
        synonyms.append([name.strip() for name in parts if name.strip()])
    need(all(synonyms), f'{path} must have a line for each class, with one name or more')
    check_names([first for first, *_ in synonyms])
    count = Counter(name.lower() for names in synonyms for name in names)
    shared = [name for name in count if count[name] > 1]
    if shared:                          # as 'bed' in the released file of coco-object
        note(f"in {path} several lines have the name {', '.join(shared)}; pixels of that name get the first class")
    return synonyms


def check_names(names):
    """Classes of the same name would tie, which counts against the model. The tokenizer lowers case."""
    lowered = [name.lower() for name in names]
    twice = {name for name in lowered if lowered.count(name) > 1}
    need(not twice, f"several classes have the same name, and would tie: {', '.join(sorted(twice))}; "
         'give each its own name in the file of --classes (for ImageNet: --classes open_clip)')


def read_templates(path, default):
    """Prompts with {} for the class, one per line. The path 'open_clip' means open_clip's prompts, None the default."""
    if path is None:
        return default
    if path == 'open_clip':
        return open_clip_prompts()[0]
    templates = read_lines(path)
    for template in templates:
        need('{}' in template, f"'{template}' in {path} needs {{}} where the class goes")
    return templates


# --- 2. Segmentation: settings of eight sets, masks ------------------------------------------------------------------

class Settings(NamedTuple):
    """How to segment a set."""
    size: int                           # short side of the image, in pixels
    classes: int = 0                    # lines of the class file; 0: any number
    scale: float = 40.0                 # factor of the cosines, before the softmax
    probability: float = 0.0            # pixels that are less certain become class 0
    area: float = 0.0                   # classes with at most this share of the foreground are dropped
    reduce_zero_label: bool = False     # label 0 of the masks is ignored, label 1 is class 0
    csa: bool = False                   # correlative self-attention in the last block


# The released code's settings, which follow SCLIP. Add a row for a set of your own.
BENCHMARKS = {
    'voc21': Settings(336, 21, scale=65, probability=0.1, area=0.1),
    'context60': Settings(336, 60, scale=50, probability=0.1),
    'coco-object': Settings(336, 81, scale=50, probability=0.1),
    'voc20': Settings(336, 20, reduce_zero_label=True),
    'cityscapes': Settings(560, 19),
    'context59': Settings(336, 59, reduce_zero_label=True),
    'ade20k': Settings(336, 150, reduce_zero_label=True),
    'coco-stuff': Settings(448, 171),
}
IGNORE = 255                            # pixels of a mask that have this value are not scored


def read_mask(path, classes, reduce_zero_label):
    """A PNG of class numbers, grey or palette -> (h, w) int64; unscored pixels are IGNORE."""
    with pillow_errors(path):
        mask = open_image(path)
        depth = Path(path).read_bytes()[24]                 # bits of a value, by the header of a PNG
        need(mask.mode != 'L' or mask.format != 'PNG' or depth == 8,
             f'it is grey of {depth} bits, which Pillow would scale; save it with 8')
        values = np.array(mask, np.int64)                   # of a palette image the numbers, not the colours
    need(values.ndim == 2, f'mask {path} is in colour; save class numbers, grey or with a palette')
    label = values[values != IGNORE].max(initial=0)
    most = classes if reduce_zero_label else classes - 1
    need(label <= most,
         f'mask {path} has label {label}; with {classes} lines in the class file it may be at most {most}')
    if reduce_zero_label:
        values = np.where(np.isin(values, (0, IGNORE)), IGNORE, values - 1)
    return torch.from_numpy(values)


def by_stem(paths, suffix):
    """{stem without the suffix: path}, for the paths whose stem ends in the suffix."""
    stems = {}
    for path in paths:
        if path.stem.endswith(suffix):
            stem = path.stem.removesuffix(suffix)
            need(stem not in stems, f'{stems.get(stem)} and {path} have one name; rename one')
            stems[stem] = path
    return stems


def mask_pairs(images, masks, image_suffix, mask_suffix, listing=None):
    """[(image path, mask path)] of the same stem, which is a file's name without suffix and ending. listing: a file of
    the stems to take, one per line; None: those of all masks."""
    image_paths = by_stem(images_in(images), image_suffix)
    png_paths = [path for path in images_in(masks) if path.suffix.lower() == '.png']
    mask_paths = by_stem(png_paths, mask_suffix)
    stems = read_lines(listing) if listing else list(mask_paths)
    twice = {stem for stem in stems if stems.count(stem) > 1}
    need(not twice, f"{listing} names more than once {', '.join(sorted(twice))}; leave one line of each")
    need(stems, f"{masks} has no mask '*{mask_suffix}.png'; see --mask-suffix")
    for stem in stems:
        need(stem in image_paths, f'{images} has no image {stem}{image_suffix}; see --image-suffix')
        need(stem in mask_paths, f'{masks} has no mask {stem}{mask_suffix}; see --mask-suffix')
    return [(image_paths[stem], mask_paths[stem]) for stem in stems]


# --- 3. Segmentation: from scores to classes -------------------------------------------------------------------------

def classes_of_pixels(scores, shape, class_of_name, settings):
    """Cosines (M, h', w') of an image's pixels with M names -> (h, w) = shape, int64: the class of each pixel.

    class_of_name: M numbers. The steps are those of clip_segmentor.py:113-276 of the released code:
        1. Each pixel takes its most probable class.
        2. If settings.area is above 0 (VOC21, which has a background), foreground classes that cover no more than this
           share of the foreground are dropped, and each pixel chooses again.
        3. A pixel whose class is less probable than settings.probability becomes class 0, the background. (For sets
           without a background settings.probability is 0, so nothing changes.)
    """
    logits = settings.scale * scores
    probability, class_map = best_class(logits, shape, class_of_name, candidates=set(class_of_name))
    if settings.area:
        pixels_of_class = torch.bincount(class_map.flatten())
        foreground = pixels_of_class[1:].sum()
        is_candidate = pixels_of_class > settings.area * foreground     # one for each class up to the highest
        is_candidate[0] = True                                          # the background
        candidates = is_candidate.nonzero().flatten().tolist()
        probability, class_map = best_class(logits, shape, class_of_name, candidates)
    return class_map.masked_fill(probability < settings.probability, 0)


def best_class(logits, shape, class_of_name, candidates):
    """logits (M, h', w') of M names -> two maps of `shape` (h, w): for each pixel the probability of the best candidate
    class, and that class. A class is as probable as its most probable name.

    Example, for one pixel: logits 2, 3 and 1 of the names ape, monkey and ox, where ape and monkey are class 1, and ox
    is class 2. The best class is 1, by its name monkey, with probability e^3 / (e^2 + e^3 + e^1). With the candidates
    {2} it is 2, with e^1 over the same sum, that of all names. We go through the names one by one, because 100 maps of
    12 megapixels would need 5 GB at once. We add up logarithms: probability = e^(highest - log_sum).
    """
    highest = logits.new_full(shape, -math.inf)              # of the candidates' logits so far
    log_sum = logits.new_full(shape, -math.inf)              # ln of the sum of e^logit so far
    class_map = torch.zeros(shape, dtype=torch.int64, device=logits.device)
    for logit_map, number in zip(logits, class_of_name):
        resized = F.interpolate(logit_map[None, None], shape, mode='bilinear')[0, 0]     # (h, w)
        log_sum = log_sum.logaddexp(resized)
        if number in candidates:
            class_map[resized > highest] = number
            highest = highest.maximum(resized)
    return (highest - log_sum).exp(), class_map
