"""Zero-shot evaluation of a checkpoint: retrieval, classification, segmentation.

    python eval.py retrieval CKPT --shards runs/scenes            or --coco DIR, or --flickr flickr30k_val.json
    python eval.py retrieval CKPT --karpathy dataset_coco.json --split test --images DIR
    python eval.py classify CKPT --dataset DTD --root DIR         a set of torchvision.datasets by its name there
    python eval.py classify CKPT --folder DIR                     one folder of images per class
    python eval.py segment CKPT --images DIR --masks DIR --classes voc.txt --benchmark voc21 --csa

CKPT is ours (runs/NAME/last.pt, or its folder), a released cosmos_vitb*.pt, or a state dict of an open_clip ViT with
GELU; others are converted by python -m extras.weights. Scores come from the teacher, the averaged weights, unless
--weights student. Features are float32 of unit length, scores their products.
"""
import glob
import inspect
import json
import math
import re
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from cosmos import COSMOS, Config, from_openclip, unit
# Refused: an error that a user can mend, which `run` shows as one sentence. Unreadable(Refused): one image or record is
# bad. replacing: a file is written whole or not at all.
from data import (BICUBIC, Parser, Refused, Shards, Tokenizer, Unreadable, normalize, read_image, replacing,
                  run)

# --- 1. Files --------------------------------------------------------------------------------------------------------

progress = partial(tqdm, leave=False, disable=None)  # quiet where the output is no terminal


def need(condition, message):
    if not condition:
        raise Refused(message)


@contextmanager
def reading(path):
    """Inside this block, errors of reading the file at `path` become Refused, with its name. Refused passes through."""
    try:
        yield
    except (OSError, UnicodeError, json.JSONDecodeError, LookupError, TypeError) as error:
        raise Refused(f'{path} cannot be read as this command expects ({type(error).__name__}: {error}); '
                      'see --help') from None


def read_json(path):
    with reading(path):
        # -sig: a byte order mark or none
        return json.loads(Path(path).read_text(encoding='utf-8-sig'))


def read_lines(path):
    """The lines of a text file that are not blank."""
    with reading(path):
        lines = Path(path).read_text(encoding='utf-8-sig').splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    need(lines, f'{path} holds no lines of text')
    return lines


def write_json(path, value):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))


def images_in(folder):
    """Paths of the images in a folder and its subfolders, sorted; hidden files are left out."""
    need(Path(folder).is_dir(), f'{folder} is no folder; give a folder of images')
    names = sorted(glob.glob('**/*', root_dir=folder, recursive=True))
    kinds = '.jpg', '.jpeg', '.png', '.webp'
    return [Path(folder, name) for name in names if name.lower().endswith(kinds)]


# --- 2. Checkpoints: ours, the released ones, open_clip's ------------------------------------------------------------

def read_checkpoint(path):
    """Tensors and plain values from a file. Nothing in it is executed: what would need that is Refused."""
    need(Path(path).exists(), f'checkpoint {path} does not exist')
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:          # of many kinds, for torn files and for others
        reason = 'it is torn, or of another kind'
        # torch names what it refused: "TorchScript", or "GLOBAL package.name"
        refused = re.search(r'TorchScript|(?<=GLOBAL )[\w.]+', str(error))
        if refused:
            reason = f'it holds {refused[0]}, which may run code'
        raise Refused(f'{path} is no checkpoint that can be read ({reason}); fetch it again if it was fetched, or see '
                      'python -m extras.weights import --help') from None
    need(isinstance(saved, dict), f'{path} holds no weights by name; save model.state_dict()')
    return saved


def infer_config(state, quick_gelu=False):
    """Config of released or open_clip weights, from the shapes of their tensors.

    Shapes do not tell how wide an attention head is, nor which GELU it was. Here heads are 64 wide, as in open_clip's
    ViTs up to L, and cross-attention has the released 8.
    """
    vision_width, _, _, patch = state['visual.conv1.weight'].shape
    context_length, text_width = state['positional_embedding'].shape
    grid = math.isqrt(len(state['visual.positional_embedding']) - 1)  # one row is the class token's
    blocks = [name for name in state if name.endswith('.ln_1.weight')]  # of both towers
    vision_layers = sum(name.startswith('visual.') for name in blocks)
    return Config(embed_dim=state['text_projection'].shape[1],
                  image_size=grid * patch,
                  local_image_size=max(1, round(grid * 3 / 7)) * patch,  # the paper's 96 of 224
                  patch_size=patch,
                  vision_width=vision_width,
                  vision_layers=vision_layers,
                  vision_heads=max(1, vision_width // 64),
                  text_width=text_width,
                  text_layers=len(blocks) - vision_layers,
                  text_heads=max(1, text_width // 64),
                  context_length=context_length,
                  vocab_size=len(state['token_embedding.weight']),
                  cross_heads=8 if 'image_token_mapping.weight' in state else 0,
                  quick_gelu=quick_gelu)


def load_weights(model, state, path):
    """Strictly: every name and shape must fit. Else Refused, with the first that do not."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip()[:200] for line in str(error).splitlines()]
        raise Refused(f"{path} does not fit this model: {'; '.join(lines[1:6])}") from None  # line 0 is a heading


def clean_names(state):
    """Without the prefixes of DistributedDataParallel and torch.compile."""
    return {name.replace('_orig_mod.', '').removeprefix('module.'): value for name, value in state.items()}


def load(path, weights='teacher', vocab=None, quick_gelu=False, build=COSMOS):
    """-> (model in eval mode, tokenizer, preprocess: PIL image -> (3, S, S)).

    path is one of:
        ours        a checkpoint of train.py, or the folder of a run: {'student', 'teacher', 'config', 'merges', ...}
        released    {'student', 'teacher'}, under open_clip's names
        open_clip   the state dict of a ViT, perhaps under 'state_dict'
    Where there is no teacher the student is taken: model.origin says which it was.
    vocab: a file of CLIP's merges, None: see Tokenizer.clip. quick_gelu: the activation of released and open_clip
    weights, whose file does not tell it. The commands below never set it, train.py --init does. build: the class of the
    model, for lesson/.
    """
    path = Path(path)
    if path.is_dir():
        path = path / 'last.pt'
    saved = read_checkpoint(path)
    origin = 'state dict'
    state = saved
    for name in (weights, 'student', 'state_dict'):
        if name in saved:
            origin = name
            state = saved[name]
            break
    state = clean_names(state)
    if 'config' in saved and 'merges' in saved:         # ours
        config = Config(**saved['config'])
        tokenizer = Tokenizer(saved['merges'], config.context_length)
    else:
        # See infer_config for heads. Open_clip's ViTs that are wider than 1,024 have others.
        width = len(state.get('visual.class_embedding', ()))            # 0: there is none
        need(0 < width <= 1024 and width % 64 == 0 and 'text_projection' in state,
             f"{path} is neither ours, nor released, nor of an open_clip ViT with heads that are 64 wide (its keys: "
             f"{', '.join(list(state)[:5])}); python -m extras.weights import {path} OUT.pt converts others")
        config = infer_config(state, quick_gelu)
        tokenizer = Tokenizer.clip(vocab, config.context_length)
        need(tokenizer.vocab_size <= config.vocab_size,
             f"{path} knows {config.vocab_size:,} ids, CLIP's vocabulary has {tokenizer.vocab_size:,}: its merges were "
             'learned; take the checkpoint that train.py wrote')
        state = from_openclip(state)
    model = build(config)
    load_weights(model, state, path)
    model.origin = origin
    return model.eval(), tokenizer, preprocessing(config.image_size)


# --- 3. Features -----------------------------------------------------------------------------------------------------

# Enough to keep a GPU busy, few enough for the memory of a small one. Results do not depend on them.
IMAGE_BATCH = 64
TEXT_BATCH = 256


def preprocessing(size):
    """The evaluation transform: PIL image -> (3, size, size) float. Short side to `size`, bicubic, then the centre.
    `normalize` takes uint8 as well as floats."""
    return v2.Compose(
        [v2.RGB(), v2.Resize(size, BICUBIC), v2.CenterCrop(size), v2.PILToTensor(), normalize])


def shard_image(shards, i):
    try:
        return read_image(shards.image(i))
    except Unreadable as error:      # only now, because to look the name up costs a read
        raise Unreadable(f'{shards.name(i)}: {error}') from None


@dataclass
class Images(Dataset):
    """Shards, or a list of paths or of Pillow images. Item i is the pixels of image i (3, S, S), and the label 0, so
    that `embed_labelled` takes it."""
    source: object
    preprocess: object

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        if isinstance(self.source, Shards):
            image = shard_image(self.source, i)
        elif isinstance(self.source[i], Image.Image):
            image = self.source[i]
        else:
            image = read_image(self.source[i])
        return self.preprocess(image), 0


@torch.no_grad()
def embed_labelled(model, dataset, workers=0):
    """A set of (pixels (3, S, S), label) -> (n, D) unit vectors on the CPU, (n,) labels."""
    need(len(dataset), 'there is no image to embed; give one or more')
    loader = DataLoader(dataset, IMAGE_BATCH, num_workers=workers)
    features = []
    labels = []
    for pixels, some_labels in progress(loader, 'images'):
        cls = model.visual([pixels.to(model.logit_scale.device)])       # (1, B, D)
        features.append(unit(cls[0]).cpu())
        labels.append(some_labels)
    return torch.cat(features), torch.cat(labels)


def embed_images(model, source, preprocess, workers=0):
    """Paths, Pillow images or Shards -> (n, D) unit vectors on the CPU. A file that is no image raises Unreadable, with
    its name."""
    features, _ = embed_labelled(model, Images(source, preprocess), workers)
    return features


@torch.no_grad()
def embed_texts(model, tokenizer, texts):
    """n texts (or one) -> (n, D) unit vectors on the CPU."""
    need(len(texts), 'there is no text to embed; give one or more')
    features = []
    for ids in progress(tokenizer(texts).split(TEXT_BATCH), 'texts'):   # (B, T)
        longest = ids.argmax(dim=1).max() + 1                           # the end has the largest id
        eot = model.text([ids[:, :longest].to(model.logit_scale.device)])   # (1, B, D)
        features.append(unit(eot[0]).cpu())
    return torch.cat(features)


# --- 4. Retrieval ----------------------------------------------------------------------------------------------------

def ranks(queries, targets, query_ids, target_ids, chunk=1024):
    """Rank from 1 of each query's best right target, (n,). Targets with the query's id are right.

    A wrong target with an equal score counts as ahead: features that are all the same must not look perfect.
    """
    found = []
    for rows in torch.arange(len(queries)).split(chunk):            # never the whole n x m matrix
        scores = queries[rows] @ targets.T                          # (chunk, m)
        right = query_ids[rows, None] == target_ids[None]
        best = scores.masked_fill(~right, -math.inf).amax(dim=1, keepdim=True)
        ahead = ~(scores < best) & ~right    # "not below": a tie, and NaN, count against the model
        found.append(1 + ahead.sum(dim=1))
    return torch.cat(found)


def retrieval(image_features, text_features, owner):
    """Zero-shot retrieval figures.

    owner (captions,): the image of each caption. The rank of an image is that of the best of its captions. R@K are
    fractions, ranks count from 1. chance is R@1 of a blind guess, 1 / n in both directions: from image to text an image
    with c of M captions is hit with c / M, and the mean of that over n images is 1 / n.
    """
    n = len(image_features)
    image_ids = torch.arange(n)
    figures = {'images': n, 'captions': len(owner), 'chance': 1 / n}
    directions = {'image_to_text': ranks(image_features, text_features, image_ids, owner),
                  'text_to_image': ranks(text_features, image_features, owner, image_ids)}
    for name, rank in directions.items():
        for k in (1, 5, 10):
            figures[f'{name}_R@{k}'] = (rank <= k).float().mean().item()
        figures[f'{name}_mean_rank'] = rank.float().mean().item()
        figures[f'{name}_median_rank'] = rank.double().quantile(0.5).item()
    return figures


# The three published lists, each -> [(path of an image, its captions), ...]. Call them inside `with reading(path)`: it
# refuses a list of another form.

def read_coco(folder):
    """COCO's folder, with annotations/captions_val2017.json."""
    listing = read_json(Path(folder, 'annotations/captions_val2017.json'))
    captions = defaultdict(list)                                    # by the image's id
    for annotation in listing['annotations']:
        captions[annotation['image_id']].append(annotation['caption'])
    pairs = []
    for image in listing['images']:
        pairs.append((Path(folder, 'images/val2017', image['file_name']), captions[image['id']]))
    return pairs


def read_karpathy(path, images, split):
    """Karpathy's dataset_coco.json or dataset_flickr30k.json: one split of it. images: their folder."""
    pairs = []
    for image in read_json(path)['images']:
        if image['split'] == split:
            captions = [sentence['raw'] for sentence in image['sentences']]
            pairs.append((Path(images, image.get('filepath', ''), image['filename']), captions))
    return pairs


def read_flickr(path, images):
    """The released code's flickr30k_val.json: [{"image", "caption": [five]}, ...]. images: their folder."""
    return [(Path(images, item['image']), item['caption']) for item in read_json(path)]


def with_owners(path, pools):
    """The captions of each image, one or several -> all captions, and owner (captions,): the image of each.

    path: of the file that they come from, for the message.
    """
    captions = []
    owner = []
    for i, pool in enumerate(pools):
        pool = pool if isinstance(pool, list) else [pool]
        captions += pool
        owner += [i] * len(pool)
    need(captions and all(pools) and all(isinstance(caption, str) for caption in captions),
         f'{path} lists images without a caption, captions that are no words, or nothing of this split')
    return captions, torch.tensor(owner)


HELD_OUT_KEYS = ['captions', 'raw_caption', 'caption', 'txt']  # unless --caption-keys names others


def shard_captions(shards):
    """Held-out shards -> (captions, owner). Where a pair has captions under several keys, those under the first key of the
    list shards.caption_keys, or of HELD_OUT_KEYS, count. They are not cut into sentences."""
    keys = shards.caption_keys or HELD_OUT_KEYS
    pools = []
    for i in range(len(shards)):
        try:
            record = shards.record(i)
        except Unreadable as error:
            raise Refused(f'{shards.name(i)}: {error}; see python -m extras.prepare inspect') from None
        present = [key for key in keys if record.get(key)]
        need(present, f"{shards.name(i)} has no caption under {', '.join(keys)}; "
             'name others with --caption-keys')
        pools.append(record[present[0]])
    return with_owners(shards.paths[0], pools)


def zero_shot_retrieval(model, tokenizer, preprocess, source, captions=None, owner=None, workers=0):
    """-> figures, image features (n, D), which train.py uses again.

    source: image paths, with their captions and `owner`; or held-out shards, which have captions of their own.
    """
    if captions is None:
        captions, owner = shard_captions(source)
    image_features = embed_images(model, source, preprocess, workers)
    text_features = embed_texts(model, tokenizer, captions)
    return retrieval(image_features, text_features, owner), image_features


# --- 5. Zero-shot classification -------------------------------------------------------------------------------------

# ours. The released evaluation has prompts for each set (80 for ImageNet): give those by --templates.
TEMPLATES = ('a photo of a {}', 'a picture of a {}', 'an image of a {}', 'there is a {} in the picture',
             'a small {}', 'a large {}')


def read_templates(path):
    """Prompts with {} for the class, a line each."""
    if not path:
        return TEMPLATES
    templates = read_lines(path)
    for template in templates:
        need('{}' in template, f"'{template}' in {path} needs {{}} where the class goes")
    return templates


def class_vectors(model, tokenizer, names, templates=TEMPLATES):
    """Prompt ensemble: embed every template, normalise, average, normalise again. -> (len(names), D)"""
    prompts = [template.replace('{}', name) for name in names for template in templates]
    features = embed_texts(model, tokenizer, prompts)
    return unit(features.unflatten(0, (len(names), -1)).mean(dim=1))


def classify(image_features, vectors, labels):
    """image_features (n, D), vectors (K, D), labels (n,) -> figures. A tie counts against the model, as in `ranks`."""
    K = len(vectors)
    rank = ranks(image_features, vectors, labels, torch.arange(K))
    hit = (rank == 1).double()
    images_of_class = torch.bincount(labels, minlength=K)
    share = torch.bincount(labels, hit, minlength=K) / images_of_class    # (K,), NaN without images
    return {'images': len(labels),
            'classes': K,
            'chance': 1 / K,
            'top1': hit.mean().item(),
            'top5': (rank <= 5).double().mean().item(),
            'mean_per_class_top1': share.nanmean().item()}


def class_names(source, path=None):
    """Names in words of the classes of a torchvision set, or those in the file `path`, a line each in their order.

    Where two classes have one name they tie, and a tie counts against the model. So torchvision's own names of ImageNet,
    with two cranes, are refused. In a file they may repeat: it is the user's.
    """
    classes = getattr(source, 'classes', None) or getattr(source, 'categories', None)   # Caltech's
    listed = read_lines(path) if path else classes
    need(listed, 'this set of torchvision has no class names; give a file of them by --classes')
    if classes and len(listed) != len(classes):
        raise Refused(f'{path} has {len(listed)} names for {len(classes)} classes; give a line for each')
    names = []
    for name in listed:
        if isinstance(name, tuple):
            name = name[0]              # ImageNet's: the first of several synonyms
        names.append(name.replace('_', ' ').strip())
    if not path:
        check_names(names)
    return names


def check_names(names):
    twice = {name for name in names if names.count(name) > 1}
    need(not twice, f"several classes are called {', '.join(sorted(twice))}, and would tie; "
         'give a name to each in the file of --classes')


def torchvision_set(name, root, split, download, preprocess):
    """A classification set of torchvision.datasets by its name there. Some sets have no `split` but a switch `train`: it is
    on for the split 'train' and off for any other. Errors of torchvision, as for a set that is not at `root`, stay as
    they are."""
    kind = getattr(torchvision.datasets, name)
    known = inspect.signature(kind).parameters
    options = {'split': split, 'train': split == 'train', 'download': download}
    # A set that knows neither `split` nor `train` comes whole.
    options = {option: value for option, value in options.items() if option in known}
    return kind(root, transform=preprocess, **options)


# --- 6. Zero-shot segmentation ---------------------------------------------------------------------------------------

class Settings(NamedTuple):
    """How to segment a set."""
    size: int                           # short side of the image, in pixels
    scale: float = 40.0                 # of the cosines, before the softmax
    probability: float = 0.0            # pixels whose best class has less become class 0
    area: float = 0.0                   # classes with this share of the foreground or less lose their pixels
    reduce_zero_label: bool = False     # label 0 of the masks is ignored, 1 becomes class 0
    csa: bool = False                   # correlative self-attention in the last block


BENCHMARKS = {      # of the released code, after SCLIP; a set of your own is one more row
    'voc21': Settings(336, scale=65, probability=0.1, area=0.1),
    'context60': Settings(336, scale=50, probability=0.1),
    'coco-object': Settings(336, scale=50, probability=0.1),
    'voc20': Settings(336, reduce_zero_label=True),
    'cityscapes': Settings(560),
    'context59': Settings(336, reduce_zero_label=True),
    'ade20k': Settings(336, reduce_zero_label=True),
    'coco-stuff': Settings(448),
}
IGNORE = 255                            # a mask's pixels that count nowhere
LONGEST_SIDE = 2048                     # of a scaled image, as released


def window_starts(length, window):
    """Where windows start along a side of `length` pixels: every half window; the last one ends at the border."""
    return [*range(0, length - window, window // 2), length - window]


@torch.no_grad()
def window_scores(model, pixels, vectors, csa):
    """pixels (3, H, W), vectors (Q, D) -> (Q, H, W): cosines of patches and texts, averaged over sliding windows.

    A window has the size of the model's images, as released. Each is scored alone, and the scores of its grid of patches
    are enlarged to its pixels.
    """
    window = model.config.image_size
    _, H, W = pixels.shape
    total = pixels.new_zeros(len(vectors), H, W)
    count = pixels.new_zeros(H, W)
    for y in window_starts(H, window):
        for x in window_starts(W, window):
            place = (..., slice(y, y + window), slice(x, x + window))
            patches = model.encode_dense(pixels[place][None], csa)      # (1, grid, grid, D)
            cosines = (patches @ vectors.T).permute(0, 3, 1, 2)         # (1, Q, grid, grid)
            scores = F.interpolate(cosines, (window, window), mode='bilinear')
            total[place] += scores[0]
            count[place] += 1
    return total / count


def segment_image(model, image, vectors, names_per_class, settings):
    """One image -> (h, w) int64 class of each pixel.

    vectors (Q, D): one for each name, class after class; a class has one name or several. The first class is the
    background: pixels below settings.probability fall to it. A class with at most the share settings.area of the
    foreground loses its pixels to the best classes that stay. Sets without a background have both settings at zero. The
    steps are those of clip_segmentor.py:113-276 of the released code.
    """
    short = min(image.size)
    zoom = min(settings.size / short, LONGEST_SIDE / max(image.size))
    zoom = max(zoom, model.config.image_size / short)   # ours: the short side holds a window
    pixels = pil_to_tensor(ImageOps.scale(image.convert('RGB'), zoom, Image.BILINEAR))
    scores = window_scores(model, normalize(pixels.to(vectors.device)), vectors, settings.csa)
    scores = F.interpolate(scores[None], image.size[::-1], mode='bilinear')
    # Softmax over all names; of the names of a class the best one counts.
    shares = (settings.scale * scores[0]).softmax(dim=0)            # (Q, h, w)
    # (classes, h, w)
    best = torch.stack([of_class.amax(dim=0) for of_class in shares.split(names_per_class)])
    if settings.area:
        pixels_of_class = torch.bincount(best.argmax(dim=0).flatten(), minlength=len(best))
        foreground = pixels_of_class[1:].sum()
        few = pixels_of_class <= settings.area * foreground         # (classes,)
        few[0] = False                                              # the background stays
        best[few] = 0
    most, classes = best.max(dim=0)
    return classes.masked_fill(most < settings.probability, 0).cpu()


def confusion(truth, predicted, classes):
    """truth, predicted: class numbers of one shape -> (classes, classes) counts, rows are the truth. IGNORE is left
    out."""
    seen = truth != IGNORE
    cells = truth[seen] * classes + predicted[seen]
    return torch.bincount(cells, minlength=classes ** 2).view(classes, classes)


def segmentation_figures(matrix, names):
    """mIoU over classes that occur in truth or prediction, and pixel accuracy. 'classes' counts those of the truth."""
    hit = matrix.diag()
    truth = matrix.sum(dim=1)
    predicted = matrix.sum(dim=0)
    iou = hit / (truth + predicted - hit)       # NaN for a class that occurs in neither
    iou_of = {}
    for name, value in zip(names, iou.tolist()):
        if not math.isnan(value):
            iou_of[name] = value
    pixels = truth.sum().item()
    need(pixels, 'every pixel of every mask is ignored: there is nothing to score; '
         'see --masks and --benchmark')
    return {'classes': int((truth > 0).sum()),
            'mIoU': iou.nanmean().item(),
            'pixel_accuracy': hit.sum().item() / pixels,
            'IoU': iou_of}


def read_mask(path, size, classes, reduce_zero_label):
    """A PNG of class numbers, grey or palette, of `size` (w, h) -> (h, w) int64, IGNORE where it does not count."""
    mask = read_image(path)             # in its own mode: of a palette numpy then gives the numbers, not the colours
    values = np.array(mask, np.int64)
    need(values.shape == size[::-1],
         f'mask {path} is a {mask.mode} image of {mask.size} pixels; it must be grey or palette, and of {size}')
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
    mask_paths = by_stem([path for path in images_in(masks) if path.suffix.lower() == '.png'], mask_suffix)
    stems = read_lines(listing) if listing else mask_paths
    need(stems, f"{masks} has no mask '*{mask_suffix}.png'; see --mask-suffix")
    for stem in stems:
        need(stem in mask_paths, f'{masks} has no {stem}{mask_suffix}.png; see --mask-suffix')
        need(stem in image_paths,
             f'{images} has no image {stem}{image_suffix}, but a mask; see --image-suffix')
    return [(image_paths[stem], mask_paths[stem]) for stem in stems]


# --- 7. Commands -----------------------------------------------------------------------------------------------------

def show(figures, indent=''):
    """Print nested figures, one a line: fractions in percent, ranks as they are. Lists are for --json only."""
    for name, value in figures.items():
        if isinstance(value, dict):
            print(f'{indent}{name}')
            show(value, indent + '  ')
        elif isinstance(value, float):
            text = f'{value:.1f}' if name.endswith('_rank') else f'{value:.2%}'
            print(f'{indent}{name:28} {text:>8}')
        elif not isinstance(value, list):
            print(f'{indent}{name:28} {value:>8}')


def run_retrieval(args, model, tokenizer, preprocess):
    if args.shards:
        shards = Shards(args.shards, args.caption_keys, split='val')
        figures, _ = zero_shot_retrieval(model, tokenizer, preprocess, shards, workers=args.workers)
        return figures
    path = args.coco or args.karpathy or args.flickr
    images = args.images or Path(path).parent           # of the two lists below; COCO's folder has its own
    with reading(path):
        if args.coco:
            pairs = read_coco(path)
        elif args.karpathy:
            pairs = read_karpathy(path, images, args.split)
        else:
            pairs = read_flickr(path, images)
    captions, owner = with_owners(path, [pool for _, pool in pairs])
    paths = [image for image, _ in pairs]
    figures, _ = zero_shot_retrieval(model, tokenizer, preprocess, paths, captions, owner, args.workers)
    return figures


def run_classify(args, model, tokenizer, preprocess):
    if args.folder:
        with reading(args.folder):
            source = torchvision.datasets.ImageFolder(args.folder, preprocess, loader=read_image)
    else:
        source = torchvision_set(args.dataset, args.root, args.split, args.download, preprocess)
    names = class_names(source, args.classes)
    templates = read_templates(args.templates)
    vectors = class_vectors(model, tokenizer, names, templates)
    features, labels = embed_labelled(model, source, args.workers)
    need(labels.max() < len(names), f'there are {len(names)} names, but label {labels.max()}; give more by --classes')
    return classify(features, vectors, labels) | {'prompts': ' | '.join(templates), 'names': names}


def run_segment(args, model, tokenizer, preprocess):
    settings = Settings(3 * model.config.image_size // 2)   # in proportion as released, 336 of 224
    if args.benchmark:
        settings = BENCHMARKS[args.benchmark]
    settings = settings._replace(csa=args.csa)
    synonyms = []                                       # a list for each class
    for line in read_lines(args.classes):
        parts = line.replace('_', ' ').split(',')
        synonyms.append([name.strip() for name in parts if name.strip()])
    need(all(synonyms), f'{args.classes} has a line of commas alone; give a name a class')
    names = [first for first, *_ in synonyms]
    check_names(names)
    names_per_class = list(map(len, synonyms))
    templates = read_templates(args.templates)
    vectors = class_vectors(model, tokenizer, sum(synonyms, []), templates)
    vectors = vectors.to(model.logit_scale.device)
    pairs = mask_pairs(args.images, args.masks, args.image_suffix, args.mask_suffix, args.list)
    matrix = torch.zeros(len(names), len(names), dtype=torch.int64)
    for image_path, mask_path in progress(pairs, 'images'):
        image = read_image(image_path)
        truth = read_mask(mask_path, image.size, len(names), settings.reduce_zero_label)
        predicted = segment_image(model, image, vectors, names_per_class, settings)
        matrix += confusion(truth, predicted, len(names))
    return {'images': len(pairs),
            'settings': str(settings),
            'prompts': ' | '.join(templates)} | segmentation_figures(matrix, names)


def add_options(command):
    """What every command takes."""
    add = command.add_argument
    add('checkpoint', metavar='CKPT')
    add('--weights', choices=['teacher', 'student'], default='teacher',
        help='which network (default: %(default)s)')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu',
        help='cuda or cpu (default: %(default)s)')
    add('--workers', type=int, default=2,
        help='processes that read images; segment needs none (default: %(default)s)')
    add('--vocab', help="CLIP's merges, for checkpoints that carry none")
    add('--json', help='also write the figures to this file')


def add_retrieval(command):
    one = command.add_mutually_exclusive_group(required=True).add_argument
    one('--coco', help='folder with images/val2017 and annotations/captions_val2017.json')
    one('--karpathy', help="Karpathy's dataset_coco.json or dataset_flickr30k.json")
    one('--flickr', help="the released code's flickr30k_val.json: a list of image and captions")
    one('--shards', nargs='+', help='held-out shards; a folder with train/ and val/ means its val/')
    add = command.add_argument
    add('--split', default='test', help="Karpathy's split (default: %(default)s)")
    add('--images', help='folder of the images of --karpathy or --flickr (default: beside the JSON)')
    add('--caption-keys', help='json keys of the captions of --shards, joined by commas: of each pair only the '
        f"first of these that it has is used (default: {','.join(HELD_OUT_KEYS)})")


def add_classify(command):
    one = command.add_mutually_exclusive_group(required=True).add_argument
    # EMNIST's `split` chooses letters or digits, not train or test.
    known = sorted(set(torchvision.datasets.__all__) - {'EMNIST'})
    one('--dataset', choices=known, metavar='NAME',
        help='a classification set of torchvision.datasets: CIFAR10, DTD, ...')
    one('--folder', help='one folder of images per class')
    add = command.add_argument
    add('--root', default='data', help='where --dataset lies (default: %(default)s)')
    add('--split', default='test', help="torchvision's name of the split (default: %(default)s; ImageNet has val)")
    add('--download', action='store_true', help='let torchvision fetch it into --root')
    add('--classes', help='file of class names: a line each in the order of the sorted folders '
        "(default: torchvision's, or the folders' names)")
    add('--templates', help='file of prompts with {} for the class, a line each')


def add_segment(command):
    add = command.add_argument
    add('--images', required=True, help='folder of images')
    add('--masks', required=True, help='folder of PNG masks of class numbers; 255 is ignored')
    add('--classes', required=True, help='line i has the names of class i, with commas between them')
    add('--image-suffix', default='', help='end of image names that masks lack, as _leftImg8bit')
    add('--mask-suffix', default='', help='end of mask names that images lack, as _gtFine_labelTrainIds')
    add('--list', help='file of the stems to evaluate, as of a split')
    add('--templates', help='file of prompts with {} for the class')
    add('--benchmark', choices=BENCHMARKS, help='the released settings of this set (default: plain ones). The 80 '
        'released prompts are not among them: give those by --templates')
    add('--csa', action='store_true', help='correlative self-attention in the last block')


def execute(args):
    """Load the checkpoint, run the command, show its figures: also for commands of extras/ and lesson/."""
    model, tokenizer, preprocess = load(args.checkpoint, args.weights, args.vocab)
    print(f'{args.command} of {args.checkpoint} ({model.origin})')
    model.to(args.device)
    figures = args.function(args, model, tokenizer, preprocess)
    show(figures)
    if args.json:
        write_json(args.json, figures)


def main():
    parser = Parser(usage='%(prog)s COMMAND CKPT [options]', epilog=__doc__)
    commands = parser.add_subparsers(dest='command', required=True, prog=parser.prog)
    for name, function, add_flags, text in (
            ('retrieval', run_retrieval, add_retrieval, 'zero-shot R@1/5/10 and ranks, both ways'),
            ('classify', run_classify, add_classify, 'zero-shot top-1, top-5, mean per class'),
            ('segment', run_segment, add_segment, 'zero-shot mIoU, and IoU of each class')):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(function=function)
        add_options(command)
        add_flags(command)
    execute(parser.parse_args())


if __name__ == '__main__':
    run(main)
