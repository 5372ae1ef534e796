"""Zero-shot evaluation of a checkpoint: retrieval, classification, segmentation.

    python eval.py retrieval CKPT --shards runs/scenes            held-out shards
    python eval.py retrieval CKPT --list FILE --images DIR        COCO's captions, or Karpathy's list
    python eval.py classify CKPT --dataset DTD --root DIR         a set of torchvision.datasets, by its name
    python eval.py classify CKPT --folder DIR                     one folder of images per class
    python eval.py segment CKPT --images DIR --masks DIR --classes voc.txt --benchmark voc21
    python eval.py segment ... --csa                              with SCLIP's attention, as in some rows of the paper

CKPT is one of these:
    a checkpoint of this repository, or the folder of a run, whose best.pt is taken, or else its last.pt
    a released cosmos_vitb*.pt
    a state dict of an open_clip ViT, with --quick-gelu if it has the activation of OpenAI's CLIP
We evaluate the teacher, which has the averaged weights, or the student if there is none or with --weights student.
Features are float32 vectors of unit length, and a score is the dot product of two of them.

To compare with published figures, see docs/questions.md and docs/data.md. In this file parts 3 to 5 are the protocols,
and you can skip part 6, the command line. The marks (`ours`, ...) are those of cosmos.py.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from cosmos import COSMOS, attention_weights, end_of, unit
from data import BICUBIC, normalize
from plumbing.benchmarks import (BENCHMARKS, IGNORE, Settings, class_names, classes_of_pixels, folder_set,
                                 mask_pairs, read_mask, read_synonyms, read_templates, torchvision_set)
# Refused: an error that a user can mend. Unreadable: a Refused about one image or record.
# need(condition, text) raises Refused(text) unless the condition holds.
from plumbing.errors import Refused, Unreadable, command, need
from plumbing.files import write_json
from plumbing.images import load_image, shorten
from plumbing.options import evaluation_options
from plumbing.processes import choose_device, loading
from plumbing.shards import Shards
from plumbing.tables import published_captions, with_owners
from plumbing.weights import file_of, load_weights, read_network

progress_bar = partial(tqdm, leave=False, disable=None)     # silent if the output is not a terminal

# --- 1. A checkpoint -> a model --------------------------------------------------------------------------------------

def load(path, weights='teacher', vocab=None, quick_gelu=False):
    """-> (model in eval mode, tokenizer, preprocess: PIL image -> (3, S, S)).

    path and weights: as CKPT and --weights at the head of this file. model.origin says what was loaded. vocab and
    quick_gelu: see plumbing.weights.read_network.
    """
    path = file_of(path)
    origin, config, tokenizer, state = read_network(path, weights, vocab, quick_gelu)
    model = COSMOS(config)
    load_weights(model, state, path)
    model.origin = origin
    return model.eval(), tokenizer, preprocessing(config.image_size)


def preprocessing(size):
    """The evaluation transform: PIL image -> (3, size, size) float. The short side is resized to `size` (bicubic), and
    the square in the centre is taken. `shorten` first cuts the ends off very long images."""
    return v2.Compose(
        [shorten, v2.RGB(), v2.Resize(size, BICUBIC), v2.CenterCrop(size), v2.PILToTensor(), normalize])


# --- 2. Features: (n, D), unit vectors on the CPU --------------------------------------------------------------------

# Images and texts per batch, few enough for a small GPU. The numbers affect only the last bits of the results.
IMAGE_BATCH = 64
TEXT_BATCH = 256


def shard_image(shards, i):
    """Pillow image of pair i. Raises Unreadable, with the name of the pair, if it cannot be decoded."""
    try:
        return load_image(shards.image(i))
    except Unreadable as error:         # the name is read only here, because reading it takes time
        raise Unreadable(f'{shards.name(i)}: {error}') from None


@dataclass
class Images(Dataset):
    """Shards, or a list of paths or of Pillow images. Item i is preprocess(image i), usually pixels (3, S, S)."""
    source: Shards | list
    preprocess: Callable

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        if isinstance(self.source, Shards):
            return self.preprocess(shard_image(self.source, i))
        return self.preprocess(load_image(self.source[i]))


def batches(dataset, workers, title):
    """The items of a set in batches, with a progress bar that has this title."""
    return progress_bar(DataLoader(dataset, IMAGE_BATCH, **loading(workers)), title)


@torch.no_grad()
def embed_batch(model, pixels):
    """(B, 3, S, S) -> (B, D). A tower takes a list of views, and returns a list; here there is one view."""
    [cls] = model.visual([pixels.to(model.logit_scale.device)])         # (B, D)
    return unit(cls).cpu()


def embed_images(model, source, preprocess, workers=0):
    """Paths or Pillow images (or a single one), or Shards -> (n, D). A file that is not an image raises Unreadable,
    with its name."""
    if isinstance(source, (str, Path, Image.Image)):
        source = [source]
    need(len(source), 'there is no image to embed; give one or more')
    images = Images(source, preprocess)
    return torch.cat([embed_batch(model, pixels) for pixels in batches(images, workers, 'images')])


def embed_labelled(model, dataset, workers):
    """A set of (pixels (3, S, S), label) -> (n, D), and (n,) labels."""
    features = []
    labels = []
    for pixels, batch_labels in batches(dataset, workers, 'images'):
        features.append(embed_batch(model, pixels))
        labels.append(batch_labels)
    return torch.cat(features), torch.cat(labels)


@torch.no_grad()
def embed_texts(model, tokenizer, texts):
    """n texts (or a single one) -> (n, D). Equal texts get one vector, so that they tie."""
    if isinstance(texts, str):
        texts = [texts]
    need(len(texts), 'there is no text to embed; give one or more')
    different = list(dict.fromkeys(texts))
    features = []
    for ids in progress_bar(tokenizer(different).split(TEXT_BATCH), 'texts'):   # (B, T)
        longest = end_of(ids).max() + 1
        [eot] = model.text([ids[:, :longest].to(model.logit_scale.device)])     # (B, D)
        features.append(unit(eot).cpu())
    row_of = {text: row for row, text in enumerate(different)}
    rows = [row_of[text] for text in texts]
    return torch.cat(features)[rows]


# --- 3. Retrieval ----------------------------------------------------------------------------------------------------

# Cosines that differ by less count as equal. Computed in another batch, the same cosine differs by less than 1e-7.
TIE = 1e-6


def target_ranks(queries, targets, query_ids, target_ids, chunk=1024):
    """-> (n,): for each of n queries the rank, counted from 1, of its best right target among m targets. Target j is
    right for query i if they have the same id: the number of an image in retrieval, of a class in classification.

    A tie counts against the model: a wrong target that is less than TIE behind the right one is ranked before it.
    Otherwise a model whose features are all the same would look perfect. Arguments and result are on one device.
    """
    targets = targets.double()      # products in float64; their float32 scores take half the memory
    found = []
    for rows in torch.arange(len(queries)).split(chunk):            # never the whole n x m matrix
        scores = (queries[rows].double() @ targets.T).float()       # (chunk, m)
        is_wrong = query_ids[rows][:, None] != target_ids           # (chunk, m)
        best = scores.masked_fill(is_wrong, -math.inf).amax(dim=1, keepdim=True)
        is_behind = scores < best - TIE     # False for ties and NaN, so these rank before the right target
        found.append(1 + (is_wrong & ~is_behind).sum(dim=1))
    return torch.cat(found)


def retrieval(image_features, text_features, owner):
    """Zero-shot retrieval figures, computed on the device that holds the three arguments.

    owner (captions,): the image of each caption. An image's rank is that of its best-ranked caption. R@K are fractions.
    chance: the R@1 of a random guess, 1 / n both ways. (An image with k of m captions has k / m; the mean is 1 / n.)
    """
    n = len(image_features)
    image_ids = torch.arange(n, device=owner.device)
    figures = {'images': n, 'captions': len(owner), 'chance': 1 / n}
    ranks_of = {'image_to_text': target_ranks(image_features, text_features, image_ids, owner).cpu(),
                'text_to_image': target_ranks(text_features, image_features, owner, image_ids).cpu()}
    for direction, found in ranks_of.items():
        for k in (1, 5, 10):
            figures[f'{direction}_R@{k}'] = (found <= k).float().mean().item()
        figures[f'{direction}_mean_rank'] = found.float().mean().item()
        figures[f'{direction}_median_rank'] = found.double().quantile(0.5).item()
    return figures


# The first key that has a caption counts; captions are not split into sentences. --caption-keys names others.
HELD_OUT_KEYS = ['captions', 'raw_caption', 'caption', 'txt']


def captions_of(shards, i):
    """The captions of held-out pair i, a list. Refused, with its name, if it has none, or one that is not text."""
    keys = shards.caption_keys or HELD_OUT_KEYS
    try:
        record = shards.record(i)
    except Unreadable as error:
        raise Refused(f'{shards.name(i)}: {error}; see python -m extras.look') from None
    for key in keys:
        value = record.get(key)
        found = value if isinstance(value, list) else [value or '']
        if not all(isinstance(caption, str) for caption in found):
            raise Refused(f'{shards.name(i)} has a caption that is not text: {found}; mend it, or take it out')
        captions = [caption for caption in found if caption.strip()]
        if captions:
            return captions
    raise Refused(f"{shards.name(i)} has no caption under {', '.join(keys)}; name others with --caption-keys")


def shard_captions(shards):
    """Held-out shards -> all captions, not split into sentences, and owner (captions,): the pair that each belongs
    to."""
    return with_owners([captions_of(shards, i) for i in range(len(shards))])


def zero_shot_retrieval(model, tokenizer, preprocess, source, captions=None, owner=None, workers=0):
    """-> the figures, and the image features (n, D), which some callers need, too. source: held-out shards, or
    image paths with their captions and `owner`."""
    if captions is None:
        captions, owner = shard_captions(source)
    image_features = embed_images(model, source, preprocess, workers)
    text_features = embed_texts(model, tokenizer, captions)
    # The products of `target_ranks` are large, so they are made on the model's device; but mps has no float64.
    device = model.logit_scale.device
    if device.type == 'mps':
        device = 'cpu'
    on_device = [x.to(device) for x in (image_features, text_features, owner)]
    return retrieval(*on_device), image_features


# --- 4. Classification -----------------------------------------------------------------------------------------------

# ours: six prompts for every set. The released evaluation has other prompts for each set; pass them with --templates.
TEMPLATES = ('a photo of a {}', 'a picture of a {}', 'an image of a {}', 'there is a {} in the picture',
             'a small {}', 'a large {}')


def class_vectors(model, tokenizer, names, templates=TEMPLATES):
    """Prompt ensemble: embed every template, normalise, average, normalise again. -> (len(names), D)"""
    prompts = [template.replace('{}', name) for name in names for template in templates]
    features = embed_texts(model, tokenizer, prompts)
    return unit(features.unflatten(0, (len(names), -1)).mean(dim=1))


def classify(image_features, vectors, labels):
    """image_features (n, D), vectors (K, D), labels (n,) -> figures."""
    K = len(vectors)
    found = target_ranks(image_features, vectors, labels, torch.arange(K))     # an image must find its class
    hit = (found == 1).double()
    images_of_class = torch.bincount(labels, minlength=K)
    share = torch.bincount(labels, weights=hit, minlength=K) / images_of_class      # (K,), NaN for an empty class
    return {'images': len(labels),
            'classes': K,
            'chance': 1 / K,
            'top1': hit.mean().item(),
            'top5': (found <= 5).double().mean().item(),
            'mean_per_class_top1': share.nanmean().item()}


# --- 5. Segmentation -------------------------------------------------------------------------------------------------

LONGEST_SIDE = 2048         # of a scaled image, in pixels, as released, unless a window needs more


def encode_dense(model, images, csa=False):
    """images (B, 3, h, w) -> (B, h/p, w/p, D): a unit vector for each patch, which can be compared with text vectors.
    `proj` is trained on [cls] alone, but here it is applied to patches. csa: the last block is a correlative_block."""
    tower = model.visual
    x, _ = tower.embed(images)                  # (B, 1 + P, W), [cls] first
    *blocks, last = tower.transformer.resblocks
    for block in blocks:
        x = block(x)
    if csa:
        x = correlative_block(last, x)
    else:
        x = last(x)
    sequence = tower.norm(x)
    patches = unit(sequence[:, 1:] @ tower.proj)                    # (B, P, D)
    patch_rows = images.shape[2] // model.config.patch_size
    return patches.unflatten(1, (patch_rows, -1))


def correlative_block(block, x):
    """x (B, R, W) -> (B, R, W): a block with SCLIP's correlative self-attention (transformer.py:687-764 of the released
    code). Queries attend to queries and keys to keys, so a patch attends mostly to itself and to similar patches."""
    normed = block.ln_1(x)
    q, k, v = block.attn.project(normed, normed)                        # each (B, H, R, d)
    weights = attention_weights(q, q) + attention_weights(k, k)     # (B, H, R, R); rows sum to 2, as in SCLIP
    read = (weights @ v).transpose(1, 2).flatten(2)         # (B, R, W), the heads side by side
    x = x + block.attn.out_proj(read)
    return x + block.mlp(block.ln_2(x))


def window_starts(length, side):
    """Where windows start along `length` pixels: one every half window; the last one ends at the border. For a side of
    224: 224 -> [0], 336 -> [0, 112], 340 -> [0, 112, 116]."""
    return [*range(0, length - side, side // 2), length - side]


@torch.no_grad()
def window_scores(model, pixels, vectors, csa):
    """pixels (3, h', w'), vectors (M, D) of M names -> (M, h', w'): cosines of patches and names, averaged over
    sliding windows. A window has the size of the model's images, as released, and its patch scores are interpolated to
    pixels."""
    side = model.config.image_size
    _, height, width = pixels.shape
    total = pixels.new_zeros(len(vectors), height, width)
    covered = pixels.new_zeros(height, width)                           # how many windows cover each pixel
    for top in window_starts(height, side):
        for left in window_starts(width, side):
            rows = slice(top, top + side)
            columns = slice(left, left + side)
            patches = encode_dense(model, pixels[None, :, rows, columns], csa)      # (1, grid, grid, D)
            cosines = (patches @ vectors.T).permute(0, 3, 1, 2)         # (1, M, grid, grid)
            scores = F.interpolate(cosines, (side, side), mode='bilinear')
            total[:, rows, columns] += scores[0]
            covered[rows, columns] += 1
    return total / covered


def segment_image(model, image, vectors, class_of_name, settings):
    """An image of h x w pixels -> (h, w) int64, the class of each pixel. The image is scaled to h' x w' pixels and
    scored there. `classes_of_pixels` resizes the scores to h x w, multiplies them by settings.scale, takes a softmax
    over the M names, and gives each pixel the class of its most probable name. With settings.area or
    settings.probability uncertain pixels become class 0.

    vectors (M, D): one for each name. class_of_name: M numbers; a class may have several names.
    """
    width, height = image.size
    short = min(width, height)
    zoom = settings.size / short                            # the short side becomes settings.size,
    zoom = min(zoom, LONGEST_SIDE / max(width, height))     # less if the long one would be too long,
    zoom = max(zoom, model.config.image_size / short)       # but never less than a window (ours)
    pixels = pil_to_tensor(ImageOps.scale(image.convert('RGB'), zoom, Image.BILINEAR))
    scores = window_scores(model, normalize(pixels.to(vectors.device)), vectors, settings.csa)      # (M, h', w')
    return classes_of_pixels(scores, (height, width), class_of_name, settings).cpu()


def confusion(truth, predicted, K):
    """truth and predicted: class numbers, int64, of one shape -> counts (K, K) for K classes; rows are the truth.
    Pixels whose truth is IGNORE are not counted."""
    seen = truth != IGNORE
    cells = truth[seen] * K + predicted[seen]
    return torch.bincount(cells, minlength=K ** 2).view(K, K)


def segmentation_figures(matrix, names):
    """Pixel accuracy; the IoU of each class that occurs in the truth or in the prediction; and mIoU, the mean of these
    IoUs. 'classes' counts only the classes in the truth, so it may be smaller than the number of IoUs."""
    need(matrix.sum() > 0, 'every pixel of the masks is ignored (255, with some --benchmark also 0); give other masks')
    hit = matrix.diag()
    truth = matrix.sum(dim=1)
    predicted = matrix.sum(dim=0)
    iou = hit / (truth + predicted - hit)       # NaN for a class that occurs in neither
    iou_of = {}
    for name, value in zip(names, iou.tolist()):
        if not math.isnan(value):
            iou_of[name] = value
    return {'classes': int((truth > 0).sum()),
            'mIoU': iou.nanmean().item(),
            'pixel_accuracy': hit.sum().item() / truth.sum().item(),
            'IoU': iou_of}


# --- 6. Commands -----------------------------------------------------------------------------------------------------

def show(figures, indent=''):
    """Print nested figures, one per line, floats in percent (but not ranks). Lists are for --json only."""
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
        need(not (args.images or args.split), '--images and --split are for --list only; omit them')
        source = Shards(args.shards, args.caption_keys, split='val')    # with captions of its own
        captions = owner = None
    else:
        need(not args.caption_keys, '--caption-keys is for --shards only; omit it')
        source, captions, owner = published_captions(args.list, args.images, args.split)
    figures, _ = zero_shot_retrieval(model, tokenizer, preprocess, source, captions, owner, args.workers)
    return figures


def run_classify(args, model, tokenizer, preprocess):
    if args.folder:
        need(not args.download, '--download is for --dataset only; omit it')
        need(not args.split, '--split is for --dataset only; omit it, or give the folder of a split')
        split = 'none, all images'
        dataset = folder_set(args.folder, preprocess)
    else:
        dataset, split = torchvision_set(args.dataset, args.root, args.split, args.download, preprocess)
    templates = read_templates(args.templates, TEMPLATES)
    names = class_names(dataset, args.classes)
    vectors = class_vectors(model, tokenizer, names, templates)
    features, labels = embed_labelled(model, dataset, args.workers)
    need(labels.max() < len(names),
         f'the labels go up to {labels.max()}, counted from 0, but there are {len(names)} names; '
         'give a longer list with --classes')
    facts = {'split': split, 'prompts': ' | '.join(templates), 'names': names}
    return classify(features, vectors, labels) | facts


def run_segment(args, model, tokenizer, preprocess):
    # Without --benchmark there is no background, and the short side is 1.5 times the model's image size (224: 336).
    default = Settings(size=3 * model.config.image_size // 2)
    settings = BENCHMARKS.get(args.benchmark, default)._replace(csa=args.csa)
    names_of_classes = read_synonyms(args.classes)      # a list of names for each class
    K = len(names_of_classes)
    need(settings.classes in (0, K),        # 0, the default: any number
         f'{args.classes} has {K} lines, but {args.benchmark} has {settings.classes} classes; '
         'give one line per class')
    all_names = []
    class_of_name = []
    for number, names in enumerate(names_of_classes):
        all_names += names
        class_of_name += [number] * len(names)
    templates = read_templates(args.templates, TEMPLATES)
    vectors = class_vectors(model, tokenizer, all_names, templates).to(model.logit_scale.device)
    pairs = mask_pairs(args.images, args.masks, args.image_suffix, args.mask_suffix, args.list)
    matrix = torch.zeros(K, K, dtype=torch.int64)
    for image_path, mask_path in progress_bar(pairs, 'images'):
        image = load_image(image_path)
        truth = read_mask(mask_path, K, settings.reduce_zero_label)
        need(truth.shape == (image.height, image.width),
             f'mask {mask_path} and image {image_path} differ in size; make them equal')
        predicted = segment_image(model, image, vectors, class_of_name, settings)
        matrix += confusion(truth, predicted, K)
    facts = {'images': len(pairs), 'settings': str(settings), 'prompts': ' | '.join(templates)}
    return facts | segmentation_figures(matrix, [names[0] for names in names_of_classes])


def execute(args):
    """Load the checkpoint, run the command, show its figures. Commands in extras/ and lesson/ use it, too."""
    args.device = choose_device(args.device)
    model, tokenizer, preprocess = load(args.checkpoint, args.weights, args.vocab, args.quick_gelu)
    print(f'{args.command} of {model.origin}')
    model.to(args.device)
    figures = args.function(args, model, tokenizer, preprocess)
    try:
        if args.json:       # before they are printed, because with `| head` printing may fail
            write_json(args.json, model.origin._asdict() | figures)
    finally:                # writing the file may fail as well
        show(figures)


def main():
    args = evaluation_options(__doc__)      # the head of this file is part of --help
    functions = {'retrieval': run_retrieval, 'classify': run_classify, 'segment': run_segment}
    args.function = functions[args.command]
    execute(args)


if __name__ == '__main__':
    command(main)
