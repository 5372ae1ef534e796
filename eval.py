"""Zero-shot evaluation of a checkpoint: retrieval, classification, segmentation.

    python eval.py retrieval CKPT --shards runs/scenes            or --coco DIR, or --flickr flickr30k_val.json
    python eval.py retrieval CKPT --karpathy dataset_coco.json --split test --images DIR
    python eval.py classify CKPT --dataset DTD --root DIR         a set of torchvision.datasets by its name there
    python eval.py classify CKPT --folder DIR                     one folder of images per class
    python eval.py segment CKPT --images DIR --masks DIR --classes voc.txt --benchmark voc21 --csa

CKPT is ours (runs/NAME/last.pt, or its folder), a released cosmos_vitb*.pt, or a state dict of an open_clip ViT; others
are converted by python -m extras.weights. Scores come from the teacher, the averaged weights, unless --weights student.
Features are float32 of unit length, scores their products.
"""
import glob
import inspect
import json
import math
import re
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
from data import (BICUBIC, Parser, Refused, Shards, Tokenizer, Unreadable, normalize, open_image, read_image,
                  replacing, run)

# --- 1. Files --------------------------------------------------------------------------------------------------------

progress = partial(tqdm, leave=False, disable=None)  # quiet where the output is no terminal


def need(condition, message):
    if not condition:
        raise Refused(message)


@contextmanager
def reading(path):
    """What a file lacks, or has in another form, becomes a sentence that names it."""
    try:
        yield
    except (OSError, UnicodeError, json.JSONDecodeError, KeyError) as error:
        raise Refused(f'{path} cannot be read as this command expects ({type(error).__name__}: {error}); '
                      'see --help') from None


def read_json(path):
    with reading(path):
        return json.loads(Path(path).read_text(encoding='utf-8-sig'))   # with or without a byte order mark


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
    names = sorted(glob.glob('**/*', root_dir=folder, recursive=True))
    return [Path(folder, name) for name in names if name.lower().endswith(('.jpg', '.jpeg', '.png', '.webp'))]


# --- 2. Checkpoints: ours, the released ones, open_clip's ------------------------------------------------------------

def read_checkpoint(path):
    """A file of tensors and plain values. Refused: anything else, above all what would have to run code to load."""
    need(Path(path).exists(), f'checkpoint {path} does not exist')
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:          # of many kinds, for torn files and for others
        held = re.search(r'GLOBAL ([\w.]+)', str(error))
        reason = 'it is torn, or of another kind'
        if held:
            reason = f'it holds {held[1]}, which may run code'
        if 'TorchScript' in str(error):
            reason = 'it is TorchScript, which may run code'
        raise Refused(f'{path} is no checkpoint that can be read ({reason}); fetch it again if it was fetched, or see '
                      'python -m extras.weights import --help') from None
    need(isinstance(saved, dict), f'{path} holds no weights by name; save model.state_dict()')
    return saved


def infer_config(state, quick_gelu=False):
    """Config of released or open_clip weights, from the shapes of their tensors.

    Shapes do not tell how wide a head is, nor which GELU it was. Here heads are 64 wide, as in open_clip's ViTs up to
    L, and cross-attention has the released 8.
    """
    vision_width, _, _, patch = state['visual.conv1.weight'].shape
    context_length, text_width = state['positional_embedding'].shape
    grid = math.isqrt(len(state['visual.positional_embedding']))    # patches a side, and a row for the class token
    blocks = [name for name in state if name.endswith('.ln_1.weight')]
    vision_layers = sum(name.startswith('visual.') for name in blocks)
    return Config(embed_dim=state['text_projection'].shape[1],
                  image_size=grid * patch,
                  local_image_size=max(1, round(grid * 3 / 7)) * patch,     # the paper's 96 of 224
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
    """Strictly: every name and shape must fit, else Refused lists what is missing, unexpected and of another shape."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = str(error).splitlines()[1:6]            # line 0 is a heading; the first problems will do
        problems = [f'{line.strip():.200}' for line in lines]
        raise Refused(f"{path} does not fit this model: {'; '.join(problems)}") from None


def clean_names(state):
    """Without the prefixes of DistributedDataParallel and torch.compile."""
    return {name.replace('_orig_mod.', '').removeprefix('module.'): value for name, value in state.items()}


def load(path, weights='teacher', vocab=None, quick_gelu=False):
    """-> (model in eval mode, tokenizer, preprocess: PIL image -> (3, S, S)).

    path: a checkpoint of ours or the folder of a run; a released one (dict with 'student' and 'teacher'); or a state
    dict of an open_clip ViT. Where there is no teacher the student is taken: model.origin says which it was.
    vocab goes to Tokenizer.clip. quick_gelu: the activation of weights that do not say; our checkpoints do.
    """
    path = Path(path)
    if path.is_dir():
        path = path / 'last.pt'
    saved = read_checkpoint(path)
    origin = 'state dict'
    state = saved
    for name in ('state_dict', 'student', weights):     # the last of these that it has
        if name in saved:
            origin = name
            state = saved[name]
    state = clean_names(state)
    if 'merges' in saved:               # ours
        config = Config(**saved['config'])
        tokenizer = Tokenizer(saved['merges'], config.context_length)
    else:
        width = len(state.get('visual.class_embedding', ()))
        need(0 < width <= 1024 and width % 64 == 0,         # larger ViTs have wider heads
             f"{path} is neither ours, nor released, nor of an open_clip ViT with heads that are 64 wide (its keys: "
             f"{', '.join(list(state)[:5])}); python -m extras.weights import {path} OUT.pt converts others")
        config = infer_config(state, quick_gelu)
        tokenizer = Tokenizer.clip(vocab, config.context_length)
        need(tokenizer.vocab_size <= config.vocab_size,
             f"{path} knows {config.vocab_size:,} ids, CLIP's vocabulary has {tokenizer.vocab_size:,}: its merges were "
             'learned; take the checkpoint that train.py wrote')
        state = from_openclip(state)
    model = COSMOS(config)
    load_weights(model, state, path)
    for name, value in state.items():
        need(value.isfinite().all(), f'{path} holds NaN or infinity in {name}; take an earlier one')
    model.origin = origin
    return model.eval(), tokenizer, Preprocess(config.image_size)


# --- 3. Features -----------------------------------------------------------------------------------------------------

# Enough to keep a GPU busy, few enough for the memory of a small one. Figures do not depend on them.
IMAGE_BATCH = 64
TEXT_BATCH = 256
BROKEN = -1                 # the label of an image that cannot be read


def Preprocess(size):
    """The evaluation transform: PIL image -> (3, size, size) float. Short side to `size`, bicubic, then the centre."""
    return v2.Compose([v2.RGB(), v2.Resize(size, BICUBIC), v2.CenterCrop(size), v2.PILToTensor(), normalize])


def shard_image(shards, i):
    return read_image(shards.image(i), shards.name(i))


@dataclass
class Images(Dataset):
    """Of each image of `source` its pixels (3, S, S), label, and why it cannot be read, or ''.

    source: Shards, or a list of paths or Pillow images (labels 0), or a set of (image, label).
    """
    source: object
    preprocess: object

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        label = 0
        try:
            if isinstance(self.source, Shards):
                image = shard_image(self.source, i)
            else:
                image = self.source[i]
            if isinstance(image, tuple):
                image, label = image
            elif not isinstance(image, Image.Image):
                image = read_image(image)
        except (Unreadable, OSError) as error:              # OSError: of torchvision's sets
            blank = self.preprocess(Image.new('RGB', (8, 8)))
            return math.nan * blank, BROKEN, f'image {i}: {error}'
        return self.preprocess(image), int(label), ''


@torch.no_grad()
def embed_labelled(model, source, preprocess, workers=0):
    """A source of `Images` -> (n, D) unit vectors, (n,) labels, and why images could not be read.

    The label of such an image is BROKEN, its vector NaN. They are counted and named.
    """
    need(len(source), 'there is no image to embed; give one or more')
    features = []
    labels = []
    broken = []
    for pixels, numbers, problems in progress(
            DataLoader(Images(source, preprocess), IMAGE_BATCH, num_workers=workers), 'images'):
        broken += filter(None, problems)
        cls = model.visual([pixels.to(model.logit_scale.device)])       # (1, B, D)
        features.append(unit(cls[0]).cpu())
        labels.append(numbers)
    if broken:
        print(f'left out   {len(broken)} of {len(source)} images', *broken, sep='\n           ')
        need(len(broken) < len(source), f'not one image can be used; {broken[0]}')
    return torch.cat(features), torch.cat(labels)


def embed_images(model, source, preprocess, workers=0):
    """Paths, Pillow images or Shards -> (n, D) unit vectors on the CPU. Refused where an image cannot be read."""
    features, labels = embed_labelled(model, source, preprocess, workers)
    need((labels != BROKEN).all(), 'some images cannot be read, see above; give others')
    return features


@torch.no_grad()
def embed_texts(model, tokenizer, texts):
    """n texts (or one) -> (n, D) unit vectors on the CPU. Texts of similar length share a batch, cut to its longest."""
    if isinstance(texts, str):
        texts = [texts]
    need(len(texts), 'there is no text to embed; give one or more')
    ids = tokenizer(texts)                                          # (n, T)
    length = ids.argmax(dim=1) + 1                                  # the end has the largest id
    features = torch.empty(len(texts), model.config.embed_dim)
    for rows in progress(length.argsort().split(TEXT_BATCH), 'texts'):
        cut = ids[rows, :length[rows].max()]
        eot = model.text([cut.to(model.logit_scale.device)])        # (1, B, D)
        features[rows] = unit(eot[0]).cpu()
    return features


# --- 4. Retrieval ----------------------------------------------------------------------------------------------------

def ranks(queries, targets, query_ids, target_ids, chunk=1024):
    """Rank from 1 of each query's best right target, (n,).

    Targets with the query's id are right. Other right ones do not count as ahead.
    A wrong target with an equal score counts as ahead: features that are all the same must not look perfect.
    """
    found = []
    for rows in torch.arange(len(queries)).split(chunk):            # never the whole n x m matrix
        scores = queries[rows] @ targets.T                              # (chunk, m)
        right = query_ids[rows, None] == target_ids[None]
        best = scores.masked_fill(~right, -math.inf).amax(dim=1, keepdim=True)
        behind = scores < best                                          # False for NaN, too
        found.append(1 + (~behind & ~right).sum(dim=1))
    return torch.cat(found)


def retrieval(image_features, text_features, owner):
    """Zero-shot retrieval figures. owner (captions,): the image of each caption.

    An image has a hit if any of its captions does. R@K are fractions, ranks count from 1, chance is R@1 of guessing.
    """
    n = len(image_features)
    images = torch.arange(n)                                        # their ids
    figures = {'images': n, 'captions': len(owner), 'chance': 1 / n}
    directions = {'image_to_text': ranks(image_features, text_features, images, owner),
                  'text_to_image': ranks(text_features, image_features, owner, images)}
    for name, rank in directions.items():
        for k in (1, 5, 10):
            figures[f'{name}_R@{k}'] = (rank <= k).float().mean().item()
        figures[f'{name}_mean_rank'] = rank.float().mean().item()
        figures[f'{name}_median_rank'] = float(np.median(rank))
    return figures


def with_owners(path, pools):
    """pools: the captions of each image, one or several -> (all captions, owner (captions,): the image of each)."""
    captions = []
    owner = []
    for i, pool in enumerate(pools):
        if not isinstance(pool, list):
            pool = [pool]
        captions += pool
        owner += [i] * len(pool)
    need(captions and all(isinstance(caption, str) for caption in captions),
         f'{path} lists no captions in words, or none of this split')
    return captions, torch.tensor(owner)


def coco_pools(listing):
    """COCO's captions_val2017.json -> [(name of an image, its captions)]."""
    pools = {}                                                      # {id: (name, captions)}
    for image in listing['images']:
        pools[image['id']] = (Path('images/val2017', image['file_name']), [])
    for annotation in listing['annotations']:
        _, pool = pools[annotation['image_id']]
        pool.append(annotation['caption'])
    return pools.values()


def karpathy_pools(listing, split):
    """Karpathy's dataset_coco.json or dataset_flickr30k.json -> yields (name of an image, its captions) of a split."""
    for image in listing['images']:
        if image.get('split') == split:
            name = Path(image.get('filepath', ''), image['filename'])
            yield name, [sentence['raw'] for sentence in image['sentences']]


def listed_captions(path, root, split='test'):
    """A JSON file of COCO, of Karpathy or of the released code, [{"image", "caption": [five]}], and the folder of its
    images -> (image paths, captions, owner)."""
    listing = read_json(path)
    with reading(path):
        if isinstance(listing, list):
            listed = [(item['image'], item['caption']) for item in listing]
        elif 'annotations' in listing:
            listed = coco_pools(listing)
        else:
            listed = list(karpathy_pools(listing, split))
    paths = [Path(root, name) for name, _ in listed]
    return paths, *with_owners(path, [pool for _, pool in listed])


HELD_OUT_KEYS = ['captions', 'raw_caption', 'caption', 'txt']      # unless --caption-keys names others


def shard_captions(shards):
    """-> (captions, owner). A pair's captions are those under the first of the keys that it has, never split."""
    keys = shards.caption_keys or HELD_OUT_KEYS
    pools = []
    for i in range(len(shards)):
        try:
            record = shards.record(i)
        except Unreadable as error:
            raise Refused(f'{shards.name(i)}: {error}; see python -m extras.prepare inspect') from None
        present = [key for key in keys if record.get(key)]
        need(present, f"{shards.name(i)} has no caption under {', '.join(keys)}; name others with --caption-keys")
        pools.append(record[present[0]])
    return with_owners(shards.paths[0], pools)


def zero_shot_retrieval(model, tokenizer, preprocess, source, captions=None, owner=None, workers=0):
    """-> (figures, image features (n, D), caption features), for what else uses them.

    source: image paths with their captions and `owner`, or held-out shards, which have their own. An image that cannot
    be read is left out with its captions; its feature is NaN.
    """
    if captions is None:
        captions, owner = shard_captions(source)
    image_features, labels = embed_labelled(model, source, preprocess, workers)
    text_features = embed_texts(model, tokenizer, captions)
    readable = labels != BROKEN                                     # (n,)
    number = readable.cumsum(dim=0) - 1                             # of an image among the readable ones
    rows = readable[owner]                                          # of the captions that stay
    figures = retrieval(image_features[readable], text_features[rows], number[owner[rows]])
    return figures, image_features, text_features


# --- 5. Zero-shot classification -------------------------------------------------------------------------------------

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
    """image_features (n, D), vectors (K, D), labels (n,) -> figures, class found for each image (n,), confusion (K, K).

    A wrong class whose score equals the right one's is ahead of it, as in `ranks`: then the wrong one is found.
    """
    K = len(vectors)
    rank = ranks(image_features, vectors, labels, torch.arange(K))
    scores = image_features @ vectors.T                             # (n, K)
    # argmax of all scores might choose the right one in a tie
    wrong = scores.scatter(1, labels[:, None], -math.inf).argmax(dim=1)
    found = torch.where(rank == 1, labels, wrong)
    matrix = confusion(labels, found, K, ignore=-1)
    top1 = matrix.diag() / matrix.sum(dim=1)                        # (K,), NaN without images
    figures = {'images': len(labels),
               'classes': K,
               'chance': 1 / K,
               'top1': matrix.trace().item() / len(labels),
               'top5': (rank <= 5).float().mean().item(),
               'mean_per_class_top1': top1.nanmean().item()}
    return figures, found, matrix


def class_names(source, path=None):
    """Names in words of the classes of a torchvision set, or those in the file `path`, a line each in their order.

    A thousand folders of WordNet ids have torchvision's names of ImageNet. Of these 296 differ by more than capitals
    from those of the released evaluation (open_clip's), so the figures are comparable only with a file of those.
    """
    classes = getattr(source, 'classes', None) or getattr(source, 'categories', None)   # Caltech's
    need(classes, 'this set of torchvision has no class names; use --folder with one folder per class')
    if path:
        names = read_lines(path)
        need(len(names) == len(classes),
             f'{path} has {len(names)} names for {len(classes)} classes; give a line for each')
        return names
    if len(classes) == 1000 and re.fullmatch(r'n\d{8}', str(classes[0])):
        return torchvision.models.ResNet18_Weights.DEFAULT.meta['categories']   # in the order of the ids
    names = []
    for name in classes:
        if isinstance(name, tuple):
            name = name[0]                              # ImageNet: synonyms
        names.append(name.replace('_', ' ').strip())
    return names


def torchvision_set(name, root, split, download=False):
    """A classification set of torchvision.datasets by its name there, in any case. What it lacks it says itself."""
    kinds = {kind.lower(): getattr(torchvision.datasets, kind) for kind in torchvision.datasets.__all__}
    need(name.lower() in kinds, f"torchvision.datasets has no '{name}'; it has {', '.join(sorted(kinds))}")
    kind = kinds[name.lower()]
    options = {}
    names = inspect.signature(kind).parameters
    if 'split' in names:
        options['split'] = split
    elif 'train' in names:
        options['train'] = split == 'train'
    if download:
        options['download'] = True
    return kind(root, **options)


# --- 6. Zero-shot segmentation ---------------------------------------------------------------------------------------

class Settings(NamedTuple):
    """How to segment. `segment` has a flag for each field."""
    size: int = 336                     # short side of the image, in pixels
    scale: float = 40.0                 # of the cosines, before the softmax
    probability: float = 0.0            # pixels whose best class has less become class 0
    area: float = 0.0                   # classes with this share of the foreground or less vanish
    reduce_zero_label: bool = False     # label 0 of the masks is ignored, 1 becomes class 0
    window: int = 224                   # side of the window, in pixels
    stride: int = 112                   # step of the window, in pixels
    csa: bool = False                   # correlative self-attention in the last block


BENCHMARKS = {                          # of the released code, after SCLIP
    'voc21': Settings(scale=65, probability=0.1, area=0.1),
    'context60': Settings(scale=50, probability=0.1),
    'coco-object': Settings(scale=50, probability=0.1),
    'voc20': Settings(reduce_zero_label=True),
    'cityscapes': Settings(size=560),
    'context59': Settings(reduce_zero_label=True),
    'ade20k': Settings(reduce_zero_label=True),
    'coco-stuff': Settings(size=448),
}
IGNORE = 255                            # a mask's pixels that count nowhere
LONGEST_SIDE = 2048                     # of a scaled image, as released


def window_starts(length, window, stride):
    """Where windows start along a side of `length` pixels; the last one ends at the border."""
    return [*range(0, length - window, stride), length - window]


@torch.no_grad()
def window_scores(model, pixels, vectors, settings):
    """pixels (3, H, W), vectors (Q, D) -> (Q, H, W): cosines of patches and texts, averaged over sliding windows.

    Every window is scored alone, its grid of patches made bilinear to its pixels.
    """
    window = settings.window
    _, H, W = pixels.shape
    total = pixels.new_zeros(len(vectors), H, W)
    count = pixels.new_zeros(H, W)
    for y in window_starts(H, window, settings.stride):
        for x in window_starts(W, window, settings.stride):
            place = (..., slice(y, y + window), slice(x, x + window))
            patches = model.encode_dense(pixels[place][None], settings.csa)     # (1, h / p, w / p, D)
            grid = patches @ vectors.T
            scores = F.interpolate(grid.permute(0, 3, 1, 2), (window, window), mode='bilinear')
            total[place] += scores[0]
            count[place] += 1
    return total / count


def segment_image(model, image, vectors, counts, settings):
    """One image -> (h, w) int64 class of each pixel. vectors (Q, D) of all names, counts: how many each class has.

    Steps of clip_segmentor.py:113-276 of the released code: softmax over all names at settings.scale, of a class's
    names the best; classes under settings.area of the foreground vanish; pixels under settings.probability are class 0.
    """
    short = min(image.size)
    zoom = min(settings.size / short, LONGEST_SIDE / max(image.size))
    # ours: the short side of a very long image would be less than a window
    zoom = max(zoom, settings.window / short)
    pixels = pil_to_tensor(ImageOps.scale(image.convert('RGB'), zoom, Image.BILINEAR))
    scores = window_scores(model, normalize(pixels.to(vectors.device)), vectors, settings)
    scores = F.interpolate(scores[None], image.size[::-1], mode='bilinear')
    shares = (settings.scale * scores[0]).softmax(dim=0)            # (Q, h, w)
    best = torch.stack([names.amax(dim=0) for names in shares.split(counts)])
    if settings.area:
        count = torch.bincount(best.argmax(dim=0).flatten(), minlength=len(best))
        few = count <= settings.area * count[1:].sum()              # (classes,)
        few[0] = False
        best[few] = 0
    most, labels = best.max(dim=0)
    return labels.masked_fill(most < settings.probability, 0).cpu()


def confusion(truth, labels, classes, ignore=IGNORE):
    """truth, labels: integers of one shape -> (classes, classes) counts, rows are the truth; `ignore` is left out."""
    seen = truth != ignore
    cells = truth[seen] * classes + labels[seen]
    return torch.bincount(cells, minlength=classes ** 2).view(classes, classes)


def segmentation_figures(matrix, names):
    """mIoU over classes that occur in truth or prediction, and pixel accuracy."""
    hit = matrix.diag()
    truth = matrix.sum(dim=1)
    found = matrix.sum(dim=0)
    iou = hit / (truth + found - hit)           # NaN for a class that occurs in neither
    pixels = truth.sum().item()
    present = int((truth > 0).sum())
    need(present, 'every pixel of every mask is ignored: there is nothing to score; see --masks, --reduce-zero-label')
    return {'classes': present,
            'mIoU': iou.nanmean().item(),
            'pixel_accuracy': hit.sum().item() / pixels,
            'IoU': {name: value for name, value in zip(names, iou.tolist()) if not math.isnan(value)}}


def read_mask(path, size, classes, reduce_zero_label=False):
    """A PNG of class numbers, grey or palette, of `size` (w, h) -> (h, w) int64, IGNORE where it does not count."""
    with reading(path):
        mask = open_image(path)         # not by read_image, which scales 16 bits of grey
        values = np.array(mask, np.int64)
    need(values.shape == size[::-1],
         f'mask {path} is a {mask.mode} image of {mask.size} pixels; it must be grey or palette, and of {size}')
    if reduce_zero_label:
        values = np.where(np.isin(values, (0, IGNORE)), IGNORE, values - 1)
    most = values[values != IGNORE].max(initial=0)
    need(most < classes, f'mask {path} has label {most}, the class file names 0 to {classes - 1}')
    return torch.from_numpy(values)


def by_stem(paths, suffix):
    """{name without suffix and ending: path} of the paths that have the suffix."""
    found = {}
    for path in paths:
        stem = path.stem.removesuffix(suffix)
        if path.stem.endswith(suffix):
            need(stem not in found, f'{found.get(stem)} and {path} have one name; rename one, or give folders apart')
            found[stem] = path
    return found


def mask_pairs(images, masks, image_suffix, mask_suffix, listing=None):
    """[(image path, mask path)] of equal stems, suffixes cut off; of those in `listing`, a stem a line, if given."""
    pictures = by_stem(images_in(images), image_suffix)
    found = by_stem(sorted(Path(masks).rglob('*.png')), mask_suffix)
    stems = read_lines(listing) if listing else found
    need(stems, f"{masks} has no mask '*{mask_suffix}.png'; see --mask-suffix")
    for stem in stems:
        need(stem in found, f'{masks} has no {stem}{mask_suffix}.png; see --mask-suffix')
        need(stem in pictures, f'{images} has no image {stem}{image_suffix}, but a mask; see --image-suffix')
    return [(pictures[stem], found[stem]) for stem in stems]


# --- 7. Commands -----------------------------------------------------------------------------------------------------

def show(figures, indent=''):
    """Print nested figures, one a line: fractions in percent, ranks as they are. Lists are for --json only."""
    for name, value in figures.items():
        if isinstance(value, dict):
            print(f'{indent}{name}')
            show(value, indent + '  ')
        elif not isinstance(value, list):
            form = '>8'
            if isinstance(value, float):
                form = '8.1f' if name.endswith('_rank') else '8.2%'
            print(f'{indent}{name:28} {value:{form}}')


def run_retrieval(args, model, tokenizer, preprocess):
    if args.shards:
        listed = [Shards(args.shards, args.caption_keys, 'val')]
    else:
        path = args.karpathy or args.flickr or Path(args.coco, 'annotations/captions_val2017.json')
        root = args.coco or args.images or Path(path).parent
        listed = listed_captions(path, root, args.split)            # image paths, captions, owner
    figures, *_ = zero_shot_retrieval(model, tokenizer, preprocess, *listed, workers=args.workers)
    return figures


def run_classify(args, model, tokenizer, preprocess):
    if args.folder:
        with reading(args.folder):
            source = torchvision.datasets.ImageFolder(args.folder, loader=read_image)
    else:
        source = torchvision_set(args.dataset, args.root, args.split, args.download)
    names = class_names(source, args.classes)
    features, labels = embed_labelled(model, source, preprocess, workers=args.workers)
    templates = read_templates(args.templates)
    vectors = class_vectors(model, tokenizer, names, templates)
    readable = (labels != BROKEN).nonzero()[:, 0]
    features = features[readable]
    labels = labels[readable]
    figures, found, matrix = classify(features, vectors, labels)
    scores = (features * vectors[found]).sum(dim=1)
    predictions = []
    for i, truth, k, score in zip(readable.tolist(), labels, found, scores.tolist()):
        image = source.samples[i][0] if args.folder else i
        predictions.append({'image': image, 'truth': names[truth], 'prediction': names[k], 'score': score})
    return figures | {'prompts': ' | '.join(templates), 'names': names,
                      'confusion': matrix.tolist(), 'predictions': predictions}


def segment_settings(args, image_size):
    """The benchmark's settings, or those for `image_size`; flags that were given change single ones."""
    window = args.window or image_size
    settings = Settings(size=window * 3 // 2)
    if args.benchmark:
        settings = BENCHMARKS[args.benchmark]
    settings = settings._replace(window=window, stride=window // 2)
    for name in Settings._fields:
        value = getattr(args, name)
        if value is not None:
            settings = settings._replace(**{name: value})
    need(0 < settings.stride <= settings.window,
         f'--stride {settings.stride} must be above 0 and no more than --window {settings.window}')
    return settings


def run_segment(args, model, tokenizer, preprocess):
    settings = segment_settings(args, model.config.image_size)
    classes = [re.split(r'\s*,\s*', line) for line in read_lines(args.classes)]
    names = [synonyms[0] for synonyms in classes]
    counts = [len(synonyms) for synonyms in classes]
    templates = read_templates(args.templates)
    vectors = class_vectors(model, tokenizer, sum(classes, []), templates)
    vectors = vectors.to(model.logit_scale.device)
    pairs = mask_pairs(args.images, args.masks, args.image_suffix, args.mask_suffix, args.list)
    matrix = 0
    for picture, mask in progress(pairs, 'images'):
        image = read_image(picture)
        truth = read_mask(mask, image.size, len(names), settings.reduce_zero_label)
        labels = segment_image(model, image, vectors, counts, settings)
        matrix += confusion(truth, labels, len(names))
    described = str(settings)
    if args.benchmark and not args.templates:
        described += '; but six prompts of ours, not the 80 released ones'
    return {'images': len(pairs),
            'settings': described,
            'prompts': ' | '.join(templates)} | segmentation_figures(matrix, names)


def add_options(command):
    """What every command takes."""
    add = command.add_argument
    add('checkpoint', metavar='CKPT')
    add('--weights', choices=['teacher', 'student'], default='teacher', help='which network (default: %(default)s)')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='cuda or cpu (default: %(default)s)')
    add('--workers', type=int, default=2, help='processes that read images (default: %(default)s)')
    add('--vocab', help="CLIP's merges, for checkpoints that carry none")
    add('--json', help='also write the figures to this file')


def add_retrieval(command):
    one = command.add_mutually_exclusive_group(required=True).add_argument
    one('--coco', help='folder with images/val2017 and annotations/captions_val2017.json')
    one('--karpathy', help="Karpathy's dataset_coco.json or dataset_flickr30k.json")
    one('--flickr', help="the released code's flickr30k_val.json: a list of image and captions")
    one('--shards', nargs='+', help='held-out shards; of a folder with train/ and val/ the half val/')
    add = command.add_argument
    add('--split', default='test', help="Karpathy's split (default: %(default)s)")
    add('--images', help='folder of the images of --karpathy or --flickr (default: beside the JSON)')
    add('--caption-keys', help='json keys of the captions of --shards, joined by commas: of each pair the first that '
        f"it has counts (default: {','.join(HELD_OUT_KEYS)})")


def add_classify(command):
    one = command.add_mutually_exclusive_group(required=True).add_argument
    one('--dataset', help='a classification set of torchvision.datasets: CIFAR10, DTD, ...')
    one('--folder', help='one folder of images per class')
    add = command.add_argument
    add('--root', default='data', help='where --dataset lies (default: %(default)s)')
    add('--split', default='test', help="torchvision's name of the split (default: %(default)s; ImageNet has val)")
    add('--download', action='store_true', help='let torchvision fetch it into --root')
    add('--classes', help='file of class names: a line each in the order of the sorted folders '
        "(default: the folders' names; of ImageNet torchvision's, 296 of them unlike the released ones)")
    add('--templates', help='file of prompts with {} for the class, a line each')


def add_segment(command):
    add = command.add_argument
    add('--images', required=True, help='folder of images')
    add('--masks', required=True, help='folder of PNG masks of class numbers; 255 is ignored')
    add('--classes', required=True, help='a class a line, in the order of numbers, names by commas')
    add('--image-suffix', default='', help='end of image names that masks lack, as _leftImg8bit')
    add('--mask-suffix', default='', help='end of mask names that images lack, as _labelTrainIds')
    add('--list', help='file of the stems to evaluate, as of a split')
    add('--templates', help='file of prompts with {} for the class')
    add('--benchmark', choices=BENCHMARKS, help='the released settings of this set; the flags below change single '
        'ones. The 80 released prompts are not among them: give those by --templates')
    # None where they are not given: a benchmark's setting stays
    for name, default in Settings._field_defaults.items():
        how = {'type': type(default)}
        if isinstance(default, bool):
            how = {'action': 'store_true', 'default': None}
        add(f"--{name.replace('_', '-')}", help=f'see Settings in eval.py (as {default})', **how)


def execute(args):
    """Load the checkpoint, run the command, show its figures."""
    model, tokenizer, preprocess = load(args.checkpoint, args.weights, args.vocab)
    print(f'{args.command} of {args.checkpoint} ({model.origin})')
    model.to(args.device)
    figures = args.run(args, model, tokenizer, preprocess)
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
        command.set_defaults(run=function)
        add_options(command)
        add_flags(command)
    execute(parser.parse_args())


if __name__ == '__main__':
    run(main)
