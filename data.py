"""From a pair to a batch: its text crops, its image crops, the order of the pairs, the batch.

A pair is an image and all that is said of it: the `pool` of its sentences. It gives image crops and text crops (Sec.
3.1 of the paper). An image crop whose colours have been changed is an image view. A text crop is one sentence of the
pool, or up to five of them; from then on it is called a caption. The student sees all of them, the teacher the globals:
large image crops, and captions of up to five sentences.

Random choices for a pair come from (seed, epoch, index of the pair). The order of the pairs comes from (seed, epoch).
The order of the colour jitters comes from (seed, step). So with the same settings a run sees the same batches for any
number of workers and GPUs, and can be resumed at any step.

The order of things: `Order` yields the places (epoch, index) of the pairs of a batch. In a worker of the loader `Crops`
makes views of each, and `collate` a `Batch` of them all. Where the model runs `Batch.views` changes the colours.

The helpers are in plumbing/, and need not be read: `Shards` gives the bytes of an image and the pool of its sentences,
`decode` the pixels, `Tokenizer` the ids, `recolour` changes the colours of a batch.
"""
import random
import sys
from dataclasses import dataclass
from functools import lru_cache, partial
from math import ceil
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from cosmos import GLOBALS, Config
from plumbing.colours import JITTERS, NEUTRAL, Changes, changes_of, constant, recolour
from plumbing.errors import Refused, Unreadable
from plumbing.images import decode, read_header
from plumbing.processes import loading
from plumbing.shards import Shards
from plumbing.tokenizer import Tokenizer

# --- 1. Text crops -------------------------------------------------------------------------------------- Sec. 3.1 ---

def text_crops(pool, rng, global_texts, local_texts):
    """The sentences of a pair -> global_texts captions of 1-5 sentences joined by '. ', then local_texts single
    sentences, as a list of strings.

    Each global is a draw of its own without replacement, in random order; the locals are one more draw.
    paper silent: the order, ". ", and a pool that is smaller than the count. Such a pool is repeated whole, in its own
    order, and a random rest follows.
    """
    captions = []
    for _ in range(global_texts):
        count = rng.randint(1, 5)
        captions.append('. '.join(draw_sentences(pool, count, rng)))
    return captions + draw_sentences(pool, local_texts, rng)


def draw_sentences(pool, count, rng):
    if count <= len(pool):
        return rng.sample(pool, count)
    repeats, rest = divmod(count, len(pool))
    return pool * repeats + rng.sample(pool, rest)


# --- 2. The kinds of image views ------------------------------------------------------------------------ Sec. 3.1 ---

class Kind(NamedTuple):
    """How a view is made. All but size and scale are probabilities; how strongly is drawn by draw_strengths."""
    size: int                   # side of the view, in pixels
    scale: tuple                # least and most share of the image's area
    flip: float                 # left becomes right
    jitter: float               # of brightness, contrast, saturation and hue, see Batch.views for their order
    grey: float
    blur: float
    solarize: float             # bright pixels are inverted


def kinds_of_views(config, crop_min=0.4):
    """The first global, the other globals, the locals, as released. crop_min: the smallest share of the image in a
    global. More rows below are more kinds of local views, which share the local ones in equal parts."""
    large = config.image_size
    small = config.local_image_size
    #    size   scale          flip  jitter  grey  blur  solarize
    return [
        Kind(large, (crop_min, 1), 0.5, 0.8, 0.2, 1.0, 0.0),
        Kind(large, (crop_min, 1), 0.5, 0.8, 0.2, 0.1, 0.2),
        Kind(small, (0.05, 0.4), 0.5, 0.8, 0.2, 0.5, 0.0)]


# --augment crops
CROPS_ONLY = {'flip': 0.0, 'jitter': 0.0, 'grey': 0.0, 'blur': 0.0, 'solarize': 0.0}


def draw_strengths(kind, rng):
    """How strongly each operation acts on a view, {operation: strength}, in the ranges as released.

    NEUTRAL changes nothing: factors are 1, the hue turns by 0, all colour stays (grey 1), the blur is 0 wide, and no
    value is above the threshold of solarize.
    """
    strengths = dict(NEUTRAL)
    if rng.random() < kind.jitter:
        strengths['brightness'] = rng.uniform(0.6, 1.4)
        strengths['contrast'] = rng.uniform(0.6, 1.4)
        strengths['saturation'] = rng.uniform(0.8, 1.2)
        strengths['hue'] = rng.uniform(-0.1, 0.1)   # 1 is once around the circle of colours
    if rng.random() < kind.grey:
        strengths['grey'] = 0.0                         # no colour stays
    if rng.random() < kind.blur:
        strengths['blur'] = rng.uniform(0.1, 2.0)       # standard deviation in pixels
    if rng.random() < kind.solarize:
        strengths['solarize'] = 127.5 / 255         # brighter values are inverted
    return strengths


# --- 3. Image crops: boxes, pixels and flips, in the loader's workers ------------------------------------ Sec. 3.1 ---

MEAN = (0.48145466, 0.4578275, 0.40821073)      # OpenAI's, as released
STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = v2.InterpolationMode.BICUBIC
ASPECTS = (3 / 4, 4 / 3)                        # of crops, least and most


def draw_boxes(height, width, kinds, rng):
    """A random box (y, x, h, w) in an image of this size for each view, as torchvision draws them.

    get_params reads torch's global generator. It is seeded from rng here, and restored afterwards.
    """
    image = torch.empty(1, 1, 1).expand(1, height, width)               # only its size counts
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(rng.getrandbits(32))
        return [v2.RandomResizedCrop.get_params(image, kind.scale, ASPECTS) for kind in kinds]


def image_crops(data, kinds, rng):
    """Encoded bytes, the kind of each view -> a random crop for each, (3, s, s) uint8, and their boxes (y, x, h, w) in
    pixels of the whole image."""
    unread, (height, width) = read_header(data)         # of a JPEG no pixel is decoded yet
    boxes = draw_boxes(height, width, kinds, rng)
    # A large JPEG decodes faster at 1/2, 1/4 or 1/8 of its sides. But each crop must keep as many pixels as its view: a
    # box of 200 x 200 for a view of 96 may become 200 / 96 = 2.08 times smaller, so 1/2 is allowed.
    reductions = []
    for (_, _, h, w), kind in zip(boxes, kinds):
        reductions.append(min(h, w) / kind.size)
    pixels = decode(unread, at_most=min(reductions))
    _, decoded_height, decoded_width = pixels.shape
    ratio = min(decoded_height / height, decoded_width / width)     # 1, or about 1/2, 1/4, 1/8
    crops = []
    for box, kind in zip(boxes, kinds):
        y, x, h, w = [int(number * ratio) for number in box]        # rounded down: never over an edge
        crop = TF.resized_crop(pixels, y, x, h, w, [kind.size, kind.size], BICUBIC)
        if rng.random() < kind.flip:
            crop = crop.flip(-1)
        # Decoded pixels lie as RGBRGB, and a crop keeps that. `recolour` is faster on a plane for each colour.
        crops.append(crop.contiguous())
    return crops, boxes


def normalize(images):
    """uint8, or float in [0, 1], (..., 3, h, w) -> float32, with the released mean and deviation."""
    x = TF.to_dtype(images, scale=True)
    return (x - constant(MEAN, x.device)) / constant(STD, x.device)


# --- 4. A pair: its views and captions -------------------------------------------------------------------------------

class Counts(NamedTuple):
    """How many views and captions a pair gives: V = global_images + local_images, U = global_texts + local_texts.

    GLOBALS of either are global. The first rows of Table 5 have one, and then no local images: L_CLIP takes the first
    GLOBALS images. See METHODS in train.py.
    """
    global_images: int = GLOBALS
    local_images: int = 6
    global_texts: int = GLOBALS
    local_texts: int = 6


MOST_BAD = 1000         # pairs in a row that cannot be read; then the run stops


@dataclass
class Crops(Dataset):
    """The training set: (epoch, index of the pair) -> crops and captions of the pair, for `collate`.

    augment: 'full' is the released recipe; 'crops' neither changes colours nor flips, for captions that name colours
    and sides. crop_min: the smallest share of the image in a global crop.
    A pair that is Unreadable is named, counted, and replaced by another one, drawn at random; that may be in the batch
    already, which is rare in a set that is much larger than a batch.
    New random draws belong at the end of `sample`: one before others changes every run.
    """
    shards: Shards
    tokenizer: Tokenizer
    config: Config
    seed: int
    counts: Counts = Counts()
    augment: str = 'full'
    crop_min: float = 0.4

    def __post_init__(self):
        first, other, *kinds_of_locals = kinds_of_views(self.config, self.crop_min)
        self.kinds = [first] + [other] * (self.counts.global_images - 1)        # of the V views
        n = self.counts.local_images
        for k in range(n):
            self.kinds.append(kinds_of_locals[k * len(kinds_of_locals) // n])
        if self.augment == 'crops':
            self.kinds = [kind._replace(**CROPS_ONLY) for kind in self.kinds]

    def __getitem__(self, where):
        """-> V crops (3, s, s) uint8, strengths (V, operations), ids (U, T), how many pairs could not be read."""
        epoch, index = where
        replacements = random.Random(f'{self.seed} {epoch} {index} replacement')
        for bad in range(MOST_BAD):                     # how many could not be read so far
            try:
                crops, strengths, captions, _ = self.sample(epoch, index)
            except Unreadable as error:
                print(f'skipped {self.shards.name(index)}: {error}', file=sys.stderr)
                index = replacements.randrange(len(self.shards))
            else:
                rows = [list(of_view.values()) for of_view in strengths]    # in the order of NEUTRAL
                return crops, torch.tensor(rows), self.tokenizer(captions), bad
        raise Refused(f'{MOST_BAD} pairs in a row cannot be read; look at the shards with '
                      'python -m extras.prepare inspect')

    def sample(self, epoch, index):
        """-> V crops (3, s, s) uint8, the strengths of each, U captions as strings, and the V boxes; globals first."""
        # A generator for texts and one for images, so that options of captions do not change the image crops.
        text_rng = random.Random(f'{self.seed} {epoch} {index} texts')
        image_rng = random.Random(f'{self.seed} {epoch} {index} images')
        pool, image = self.shards.pair(index)
        captions = text_crops(pool, text_rng, self.counts.global_texts, self.counts.local_texts)
        crops, boxes = image_crops(image, self.kinds, image_rng)
        strengths = [draw_strengths(kind, image_rng) for kind in self.kinds]
        return crops, strengths, captions, boxes


# --- 5. Which pairs make a batch -------------------------------------------------------------------------------------

@lru_cache(1)
def shuffled(seed, epoch, pairs):
    """The order of all pairs in an epoch, (pairs,): a pure function, so no state has to be saved to go on with it."""
    return np.random.default_rng((seed, epoch)).permutation(pairs).astype(np.uint32)


@dataclass
class Order:
    """Which pairs make batch `step`: a pure function of (seed, step), cut into equal slices for the ranks.

    Yields, for every step in [start, stop), this rank's list of (epoch, index of the pair). An epoch holds
    pairs // batch whole batches; the rest of its order is left out.
    """
    pairs: int                  # of the set
    batch: int                  # pairs of a step, of all ranks
    start: int
    stop: int
    seed: int = 0
    rank: int = 0
    world: int = 1

    def permutation(self, epoch):       # a method, so that an experiment can override it; called for each step
        return shuffled(self.seed, epoch, self.pairs)

    def __iter__(self):
        part = self.batch // self.world
        for step in range(self.start, self.stop):
            epoch, batch_of_epoch = divmod(step, self.pairs // self.batch)
            begin = batch_of_epoch * self.batch + self.rank * part
            indices = self.permutation(epoch)[begin:begin + part].tolist()
            yield [(epoch, index) for index in indices]


def check_batch(batch, pairs, parts):
    """Raises Refused for a batch that the set cannot fill, or that cannot be cut into equal parts."""
    if batch > pairs:
        raise Refused(f'--batch {batch} is larger than the set of {pairs} pairs; lower --batch')
    if batch % parts:
        raise Refused(f'--batch {batch} cannot be cut into {parts} parts (processes x --accum); '
                      f'choose a multiple of {parts}')


# --- 6. The batch ----------------------------------------------------------------------------------------------------

class Batch(NamedTuple):
    """What a step needs of B pairs."""
    crops: list             # V image crops (B, 3, s, s) uint8
    changes: Changes        # which colours change in which image, and how strongly
    texts: list             # U captions (B, T) int64 for the student, see collate
    teacher_texts: list     # the global captions for the teacher, cut to one T
    bad: int                # how many pairs could not be read

    def to(self, device):
        """The batch on a device, without waiting for it."""
        return self._replace(
            changes=self.changes.to(device),
            crops=[x.to(device, non_blocking=True) for x in self.crops],
            texts=[x.to(device, non_blocking=True) for x in self.texts],
            teacher_texts=[x.to(device, non_blocking=True) for x in self.teacher_texts])

    def views(self, seed_and_step):
        """V images (B, 3, s, s), float32, normalised. Colours change here, after `to`, and so on the GPU.

        seed_and_step: a string that seeds the order of the jitters, the same on all ranks.
        """
        views = []
        for k, (crops, changes) in enumerate(zip(self.crops, self.changes.by_view())):
            # ours: view k of all pairs has one order of jitters. The released code draws one for every image.
            order = random.Random(f'{seed_and_step} {k}').sample(JITTERS, len(JITTERS))
            images = recolour(crops, changes, [*order, 'grey', 'blur', 'solarize'])
            views.append(normalize(images))
        return views


def cut(captions, multiple):
    """A list of (B, T) ids, all cut behind the end of the longest, rounded up to a multiple."""
    if not captions:
        return []
    ends = [ids.argmax(dim=1).max().item() for ids in captions]         # the largest id ends a text
    longest = max(ends) + 1
    length = ceil(longest / multiple) * multiple        # perhaps above T: then a slice keeps all T
    return [ids[:, :length].contiguous() for ids in captions]       # pinned memory would copy them again


def collate(samples, multiple=1, whole_first=True, global_texts=GLOBALS):
    """Samples -> Batch. Captions have three lengths: caption 0 of the student keeps all T; the other globals, and all
    of the teacher's, end with the longest of them; the locals end with the longest local.

    multiple: of the lengths; 8 is faster in half precision. whole_first: caption 0 keeps all T, because C^T reads its
    padding; without C^T it is cut, too.
    """
    crops, rows, ids, bad = default_collate(samples)    # rows (B, V, operations), ids (B, U, T)
    captions = ids.transpose(0, 1).contiguous().unbind()                # U tensors (B, T)
    globals_cut = cut(captions[:global_texts], multiple)
    locals_cut = cut(captions[global_texts:], multiple)
    first = captions[0] if whole_first else globals_cut[0]
    texts = [first, *globals_cut[1:], *locals_cut]
    return Batch(crops, changes_of(rows), texts, globals_cut, int(bad.sum()))


def loader(train_set, order, workers, multiple=1, whole_first=True):
    """The plain DataLoader that serves batch after batch of an Order."""
    make_batch = partial(collate, multiple=multiple, whole_first=whole_first,
                         global_texts=train_set.counts.global_texts)
    return DataLoader(train_set, batch_sampler=order, collate_fn=make_batch,
                      pin_memory=torch.cuda.is_available(), **loading(workers))
