"""From pairs to batches: text crops, image crops, the order of the pairs, and the batch itself.

A pair is an image and a `pool`, all the sentences that describe the image. Both are cropped (Sec. 3.1 of the paper).
Image crops are flipped, recoloured or blurred at random, and normalised; the result is called a view.
A text crop is one sentence of the pool, or up to five of them joined; here and in cosmos.py it is also called a
caption. The student sees all views and captions. The teacher sees only the global ones: large crops, and captions of up
to five sentences. Images and texts are cropped independently. This needs no boxes of objects, but a local caption
may describe what no local view shows.

How a batch is made (TrainingSet and collate in the loader's workers, if any, Batch.views on the model's device):

                                                                        what seeds its random choices
    Order           a step -> its places (epoch, index of a pair)       (seed, epoch)
    TrainingSet     a place -> Sample: crops, drawn changes, ids        (seed, epoch, index)
    collate         B Samples -> Batch
    Batch.views     crops -> views: coloured, blurred, normalised       (seed, step, view): the order of jitters

So with the same settings a run sees the same batches for any number of workers, and of GPUs that divides the batch, and
can be resumed at any step. `ours`, `paper silent` and "as released" mean the same as in cosmos.py. You can skip the
helpers in plumbing/: `Shards` gives the bytes of an image and the pool of its sentences, `decode` the pixels,
`Tokenizer` the ids; `Changes` are the drawn changes (of colour, blur, solarizing) as tensors, and `recolour` applies
them. Refused is an error that a user can mend; Unreadable is one that concerns a single pair.
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

from cosmos import GLOBALS, Config, end_of
from plumbing.colours import AFTER_JITTERS, JITTERS, Changes, changes_of, constant, recolour
from plumbing.errors import Refused, Unreadable, need
from plumbing.images import decode, read_header
from plumbing.processes import loading
from plumbing.shards import Shards
from plumbing.tokenizer import Tokenizer

# --- 1. Text crops -------------------------------------------------------------------------------------- Sec. 3.1 ---

def text_crops(pool, rng, global_texts, local_texts):
    """The sentences of a pair -> global_texts captions of 1-5 sentences joined by '. ', then local_texts single
    sentences, as a list of strings.

    Each global caption is a random sample of the pool; one further sample gives all local captions.
    As released; paper silent about the random order, the '. ' and small pools (see draw_sentences).
    """
    captions = []
    for _ in range(global_texts):
        count = rng.randint(1, 5)
        captions.append('. '.join(draw_sentences(pool, count, rng)))
    return captions + draw_sentences(pool, local_texts, rng)


def draw_sentences(pool, count, rng):
    """A random sample without replacement, if the pool has `count` sentences. If not, the whole pool is repeated
    count // len(pool) times, and a random sample fills the rest. So a pool of one sentence only repeats itself, as
    released: 'red kettle. red kettle'. Text crops add nothing then."""
    if count <= len(pool):
        return rng.sample(pool, count)
    repeats, rest = divmod(count, len(pool))
    return pool * repeats + rng.sample(pool, rest)


# --- 2. The kinds of image views ------------------------------------------------------------------------ Sec. 3.1 ---

class Kind(NamedTuple):
    """How a view is made. From flip on, each field is the probability of an operation."""
    size: int                   # side of the view, in pixels
    area: tuple                 # smallest and largest share of the image's area
    flip: float                 # left and right are swapped
    jitter: float               # brightness, contrast, saturation and hue change, in an order that Batch.views draws
    grey: float
    blur: float
    solarize: float             # bright pixels are inverted


def kinds_of_views(config, crop_min):
    """One Kind for the first global view, one for the other globals, and one for the locals, as released. As in DINO,
    the globals differ in blur and solarizing. crop_min: the smallest share of the image in a global view."""
    large = config.image_size
    small = config.local_image_size
    return [
        #    size   area           flip jitter grey blur solarize
        Kind(large, (crop_min, 1), 0.5, 0.8,   0.2, 1.0, 0.0),
        Kind(large, (crop_min, 1), 0.5, 0.8,   0.2, 0.1, 0.2),
        Kind(small, (0.05, 0.4),   0.5, 0.8,   0.2, 0.5, 0.0)]


CROPS_ONLY = dict(flip=0.0, jitter=0.0, grey=0.0, blur=0.0, solarize=0.0)      # for `--augment crops`


def draw_changes(kind, rng):
    """The operations that change a view, {operation: strength}, in the released ranges. If you add an operation, give
    it a generator of its own, seeded in TrainingSet.sample: another draw from `rng` would shift all later draws, and so
    change every run."""
    changes = {}
    if rng.random() < kind.jitter:
        changes['brightness'] = rng.uniform(0.6, 1.4)     # a factor; 1 changes nothing
        changes['contrast'] = rng.uniform(0.6, 1.4)
        changes['saturation'] = rng.uniform(0.8, 1.2)
        changes['hue'] = rng.uniform(-0.1, 0.1)           # 1 would be a full turn of the colour wheel
    if rng.random() < kind.grey:
        changes['grey'] = 0.0                             # the share of colour that is kept: none
    if rng.random() < kind.blur:
        changes['blur'] = rng.uniform(0.1, 2.0)           # standard deviation in pixels
    if rng.random() < kind.solarize:
        changes['solarize'] = 127.5 / 255                 # brighter values are inverted
    return changes


# --- 3. Image crops: boxes, pixels and flips, in the loader's workers ------------------------------------ Sec. 3.1 ---

MEAN = (0.48145466, 0.4578275, 0.40821073)      # OpenAI's, as released
STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = v2.InterpolationMode.BICUBIC
ASPECTS = (3 / 4, 4 / 3)                        # smallest and largest aspect ratio of a crop


def draw_boxes(height, width, kinds, rng):
    """For each view draw a random box (y, x, h, w) in an image of height x width pixels, as torchvision does. Its
    RandomResizedCrop draws from torch's global generator on the CPU, but the boxes must depend only on rng. So we seed
    this generator from rng, and restore it afterwards. (torch.manual_seed would seed the GPUs', too.)"""
    stand_in = torch.empty(1).expand(height, width)     # get_params only looks at its size
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(rng.getrandbits(32))
        return [v2.RandomResizedCrop.get_params(stand_in, kind.area, ASPECTS) for kind in kinds]


def image_crops(encoded, kinds, rng):
    """An encoded image and the kinds of its V views -> V random crops (3, s, s), uint8, some of them flipped, and their
    boxes (y, x, h, w) in pixels of the image at full size."""
    # For a JPEG this reads only the header. height and width are those after the turn that EXIF asks for.
    image, turn, (height, width) = read_header(encoded)
    boxes = draw_boxes(height, width, kinds, rng)
    # ours: a large JPEG decodes faster at 1/2, 1/4 or 1/8 of its sides, and one decoding serves all views. But it must
    # not take from a crop pixels that its view could show. With a box of 200 x 200 pixels for a view of 96 x 96 the
    # sides may be divided by up to 200 / 96 = 2.08, so 1/2 is allowed. The strictest view decides.
    allowed = []                    # by what factor the image may shrink, for each view
    for (_, _, h, w), kind in zip(boxes, kinds):
        allowed.append(min(h, w) / kind.size)
    pixels = decode(image, turn, shrink_at_most=min(allowed))
    _, decoded_height, decoded_width = pixels.shape
    ratio = min(decoded_height / height, decoded_width / width)     # 1, or about 1/2, 1/4, 1/8
    crops = []
    for box, kind in zip(boxes, kinds):
        y, x, h, w = [int(number * ratio) for number in box]        # rounded down, so never over an edge
        crop = TF.resized_crop(pixels, y, x, h, w, [kind.size, kind.size], BICUBIC)
        if rng.random() < kind.flip:
            crop = crop.flip(-1)
        # Decoded pixels are interleaved in memory (RGBRGB). A crop may keep this layout if it is the whole image. We
        # separate the colours, because `recolour` is faster on whole planes.
        crops.append(crop.contiguous())
    return crops, boxes


def normalize(images):
    """uint8, or float in [0, 1], (..., 3, h, w) -> float32, normalised by the released mean and standard deviation."""
    x = TF.to_dtype(images, scale=True)
    return (x - constant(MEAN, x.device)) / constant(STD, x.device)


# --- 4. A pair: its views and captions -------------------------------------------------------------------------------

class Counts(NamedTuple):
    """How many views and captions a pair gives: V = global_images + local_images, U = global_texts + local_texts. The
    globals come first, here and below. View k and caption k are drawn independently."""
    global_images: int = GLOBALS
    local_images: int = 6
    global_texts: int = GLOBALS
    local_texts: int = 6


class Sample(NamedTuple):
    """What a pair gives to one step. TrainingSet.sample leaves ids and bad_pairs to __getitem__, so it needs no
    tokenizer."""
    crops: list             # V image crops (3, s, s), uint8
    boxes: list             # V: where each crop lies in the image, (y, x, h, w) in pixels; pictures show them
    changes: list           # V: the operations that change each crop, {operation: strength}
    captions: list          # U strings
    ids: torch.Tensor = None            # (U, T), the token numbers of the captions
    bad_pairs: int = None               # how many unreadable pairs this one replaces


MOST_UNREADABLE = 1000      # the run stops after so many failures in a row: a pair, and those drawn to replace it


@dataclass
class TrainingSet(Dataset):
    """The training set: (epoch, index of the pair) -> Sample, for `collate`.

    augment: 'full' is the released recipe; 'crops' only crops, without flips, blur and changes of colour, because
    captions may mention colours, or left and right. crop_min: the smallest share of the image in a global crop.

    An Unreadable pair is reported by name and counted, and a random pair replaces it. If that pair is already in the
    batch, its two copies are false negatives of each other; this is rare in a set much larger than a batch.
    """
    shards: Shards
    tokenizer: Tokenizer
    config: Config
    seed: int
    counts: Counts = Counts()
    augment: str = 'full'
    crop_min: float = 0.4

    def __post_init__(self):
        global_images = self.counts.global_images
        local_images = self.counts.local_images
        local_among_globals = global_images < GLOBALS and local_images > 0
        need(0 < global_images <= GLOBALS and not local_among_globals,
             f'{global_images} global and {local_images} local images are refused, because L_CLIP takes the first '
             f'{GLOBALS} for global ones; take {GLOBALS} global images, or fewer and no local ones')
        first, other, local = kinds_of_views(self.config, self.crop_min)
        self.kinds = [first] + (global_images - 1) * [other] + local_images * [local]       # V
        if self.augment == 'crops':
            self.kinds = [kind._replace(**CROPS_ONLY) for kind in self.kinds]

    def __getitem__(self, place):
        """-> the Sample of this pair or of its replacement."""
        epoch, index = place
        replacements = random.Random(f'{self.seed} {epoch} {index} replacement')
        for failed in range(MOST_UNREADABLE):           # so many pairs have failed so far
            try:
                sample = self.sample(epoch, index)
                return sample._replace(ids=self.tokenizer(sample.captions), bad_pairs=failed)
            except Unreadable as error:
                print(f'skipped {self.shards.name(index)}: {error}', file=sys.stderr)
                index = replacements.randrange(len(self.shards))
        raise Refused(f'{MOST_UNREADABLE} pairs in a row cannot be read; look at the shards with '
                      'python -m extras.look')

    def sample(self, epoch, index):
        """-> the Sample of this pair. Raises Unreadable if its image or its record is broken."""
        # Texts and images each have their own generator, so that the number of captions does not change the image
        # crops. A generator that is seeded with a string draws the same numbers in every process.
        text_rng = random.Random(f'{self.seed} {epoch} {index} texts')
        image_rng = random.Random(f'{self.seed} {epoch} {index} images')
        pool, encoded = self.shards.pair(index)
        captions = self.captions(pool, text_rng)
        crops, boxes = image_crops(encoded, self.kinds, image_rng)
        changes = [draw_changes(kind, image_rng) for kind in self.kinds]
        return Sample(crops=crops, boxes=boxes, changes=changes, captions=captions)

    def captions(self, pool, rng):
        """The captions of a pair, as strings; a subclass may draw them in another way."""
        return text_crops(pool, rng, self.counts.global_texts, self.counts.local_texts)


# --- 5. Which pairs make a batch -------------------------------------------------------------------------------------

@lru_cache(1)
def shuffled(seed, epoch, pairs):
    """The order of all pairs in an epoch, (pairs,): a pure function, so resuming needs no saved state."""
    return np.random.default_rng((seed, epoch)).permutation(pairs).astype(np.uint32)


@dataclass
class Order:
    """Yields, for every step in [start, stop), this rank's equal slice of the batch, a list of places (epoch, index of
    the pair). ours: the incomplete last batch of an epoch is dropped."""
    pairs: int                  # how many the set has
    batch: int                  # pairs per step, over all ranks
    start: int
    stop: int
    seed: int
    rank: int = 0
    world: int = 1

    def __iter__(self):
        per_rank = self.batch // self.world
        steps_per_epoch = self.pairs // self.batch
        for step in range(self.start, self.stop):
            epoch, step_of_epoch = divmod(step, steps_per_epoch)
            begin = step_of_epoch * self.batch + self.rank * per_rank
            indices = shuffled(self.seed, epoch, self.pairs)[begin:begin + per_rank].tolist()
            yield [(epoch, index) for index in indices]


# --- 6. The batch ----------------------------------------------------------------------------------------------------

class Batch(NamedTuple):
    """What a training step needs from its B pairs."""
    crops: list             # V image crops (B, 3, s, s) uint8
    change_tables: Changes  # the changes of all Samples, for each operation and view
    texts: list             # U captions (B, T') int64 for the student, T' <= T: cut, except caption 0 if C^T reads it
    teacher_texts: list     # the global captions (B, T') for the teacher
    bad_pairs: int          # how many unreadable pairs were replaced

    def to(self, device):
        """Move the batch to a device, without waiting for the copies."""
        return self._replace(
            change_tables=self.change_tables.to(device),
            crops=[x.to(device, non_blocking=True) for x in self.crops],
            texts=[x.to(device, non_blocking=True) for x in self.texts],
            teacher_texts=[x.to(device, non_blocking=True) for x in self.teacher_texts])

    def views(self, seed, step):
        """V images (B, 3, s, s), float32, normalised. ours: colours and blur are applied here, on the GPU if there is
        one, and the jitters of view k come in one order for all pairs, also on other ranks. The released code draws an
        order for every image."""
        views = []
        for k, crops in enumerate(self.crops):
            jitters = random.Random(f'{seed} {step} {k}').sample(JITTERS, len(JITTERS))
            images = recolour(crops, self.change_tables, k, [*jitters, *AFTER_JITTERS])
            views.append(normalize(images))
        return views


def cut_to_longest(captions, multiple):
    """Captions (B, T) -> a list of them, all cut to the length of the longest text, rounded up to a multiple."""
    if not captions:
        return []
    ends = [end_of(ids).max().item() for ids in captions]
    longest = max(ends) + 1
    rounded = ceil(longest / multiple) * multiple       # may exceed T: slicing then keeps all T
    # The slices are made contiguous here, in the worker, because otherwise pinning would make an extra copy.
    return [ids[:, :rounded].contiguous() for ids in captions]


def collate(samples, multiple, whole_first, global_texts=GLOBALS):
    """Samples -> Batch. Globals are cut to the longest global of these samples, locals to the longest local. Both
    lengths are rounded up to a multiple of `multiple`: 8 in half precision, where that is faster. whole_first: the
    student's caption 0 keeps its padding, because C^T reads it."""
    crops = default_collate([sample.crops for sample in samples])       # B lists of V -> V (B, 3, s, s)
    change_tables = changes_of([sample.changes for sample in samples])
    ids = torch.stack([sample.ids for sample in samples], dim=1)        # (U, B, T)
    captions = ids.unbind()                                             # U (B, T)
    global_ids = cut_to_longest(captions[:global_texts], multiple)
    local_ids = cut_to_longest(captions[global_texts:], multiple)
    texts = global_ids + local_ids          # a new list, so the teacher's caption 0 stays cut
    if whole_first:
        texts[0] = captions[0]
    bad_pairs = sum(sample.bad_pairs for sample in samples)
    return Batch(crops=crops, change_tables=change_tables, texts=texts, teacher_texts=global_ids,
                 bad_pairs=bad_pairs)


def loader(train_set, order, workers, device, multiple, whole_first):
    """An ordinary DataLoader that serves the batches of an Order, one after another. It pins memory only if the
    model is on a GPU, because pinning creates a CUDA context."""
    make_batch = partial(collate, multiple=multiple, whole_first=whole_first,
                         global_texts=train_set.counts.global_texts)
    return DataLoader(train_set, batch_sampler=order, collate_fn=make_batch,
                      pin_memory=device.type == 'cuda', **loading(workers))
