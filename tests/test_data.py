"""The claims of data.py. Each docstring names its oracle: what a result must equal."""
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms.v2 import functional as V

import data
from cosmos import GLOBALS
from data import Counts, TrainingSet, Order, Shards, Tokenizer
from plumbing.colours import OPERATIONS, changes_of
from plumbing.images import decode, read_header, load_image
from tests.helpers import MICRO, dog_tar, encoded, pairs_tar, refused, seeded  # noqa: F401

WORDS = Tokenizer([], 8)                                # without merges, 'x' is one id


def mandelbrot(width, height):
    return Image.effect_mandelbrot((width, height), (-2, -1.2, 1, 1.2), 60)         # grey


def pixels(source):
    return V.pil_to_tensor(load_image(source).convert('RGB'))


# --- Text crops ------------------------------------------------------------------------------------------------------

def test_text_crops_are_drawn_in_random_order():
    """oracle: the rule: a global has 1 to 5 distinct sentences, locals are distinct, and a small pool is repeated."""
    pool = list('abcdefghi')
    lengths = set()
    in_order = 0
    rng = random.Random(0)
    for _ in range(300):
        crop, *local = data.text_crops(pool, rng, 1, 6)
        parts = crop.split('. ')
        lengths.add(len(parts))
        assert len(set(parts)) == len(parts) and len(set(local)) == 6
        in_order += local == sorted(local)
    assert lengths == {1, 2, 3, 4, 5} and in_order < 5
    crops = {''.join(data.text_crops(['a', 'b'], rng, 0, 5)) for _ in range(20)}
    assert crops == {'ababa', 'ababb'}                  # whole repeats, then a random rest
    assert '. '.join(5 * ['red kettle']) in data.text_crops(['red kettle'], rng, 50, 0)     # as released


@pytest.mark.parametrize('counts', [Counts(1, 2), Counts(GLOBALS + 1, 0)])
def test_globals_are_what_the_losses_take_for_globals(counts):
    """oracle: the refusal: L_CLIP would take the first local for a global, or leave a global out."""
    refused(f'{counts[0]} global and {counts[1]} local images are refused, because', TrainingSet, None, WORDS, MICRO, 0, counts)


# --- Image crops, and how colours are drawn --------------------------------------------------------------------------

@pytest.mark.parametrize('width, kind, tolerance', [
    (192, 'PNG', 0.5),
    (400, 'JPEG', 10),
    (1, 'PNG', 0.5)])
def test_image_crops_are_the_pixels_of_their_boxes(width, kind, tolerance):
    """oracle: torchvision's crop of each box from the upright image, flipped or not, at full size."""
    rng = random.Random(0)
    kinds = data.kinds_of_views(MICRO, 0.4)
    exif = Image.Exif()
    exif[0x112] = 6                                     # a quarter turn
    image = mandelbrot(width, max(width * 7 // 10, 1))
    file = encoded(image, kind, exif=exif)
    whole = pixels(file)
    assert whole.shape[1:] == image.size
    for _ in range(30):
        crops, boxes = data.image_crops(file, kinds, rng)
        for crop, box, view in zip(crops, boxes, kinds, strict=True):
            y, x, h, w = box
            assert y + h <= whole.shape[1] and x + w <= whole.shape[2]
            want = V.resized_crop(whole, *box, [view.size] * 2, data.BICUBIC).float()
            distance = (crop - want).abs().mean()
            mirrored = (crop.flip(-1) - want).abs().mean()
            assert min(distance, mirrored) < tolerance                  # out of 255


@pytest.mark.parametrize('size', [(257, 600), (600, 257)])
def test_crops_stay_within_a_smaller_decoding(monkeypatch, size):
    """oracle: white, because beyond an edge a crop is black. At an eighth 257 pixels become 33, which is a bit more."""
    width, height = size
    monkeypatch.setattr(data, 'draw_boxes', lambda *image: [(height - 200, width - 200, 200, 200)])
    file = encoded(Image.new('L', size, 'white'), 'JPEG')
    image, turn, _ = read_header(file)
    eighth = [3, math.ceil(height / 8), math.ceil(width / 8)]
    assert list(decode(image, turn, shrink_at_most=200 / 16).shape) == eighth
    [crop], _ = data.image_crops(file, data.kinds_of_views(MICRO, 0.4)[2:], random)
    assert crop.min() > 250


def mandelbrot_shards(path):
    image = encoded(mandelbrot(200, 200))
    return pixels(image), Shards(pairs_tar(path, [['dog', 'cat']], [image]))


def test_crops_of_the_released_sizes_and_sides(tmp_path):
    """oracle: torchvision's crop of each box. Only 'full' crops are mirrored, one half of them. Shares of the image and
    aspects are the released ones; for globals crop_min=0.9."""
    whole, shards = mandelbrot_shards(tmp_path / 'a.tar')
    mirrored = 0
    drawn = []
    train_set = TrainingSet(shards, WORDS, MICRO, 3, augment='crops', crop_min=0.9)
    augmented = replace(train_set, augment='full')
    for epoch in range(40):
        plain = train_set.sample(epoch, 0)
        full = augmented.sample(epoch, 0)
        assert not any(plain.changes) and any(full.changes)
        assert [crop.shape[1] for crop in plain.crops] == GLOBALS * [32] + 6 * [16]
        for crop, other, box in zip(plain.crops, full.crops, plain.boxes, strict=True):
            assert crop.equal(V.resized_crop(whole, *box, crop.shape[1:], data.BICUBIC))
            if not other.equal(crop):
                assert other.equal(crop.flip(-1))
                mirrored += 1
        drawn.append(plain.boxes)
    assert 120 < mirrored < 200                                         # out of 320
    _, _, height, width = np.array(drawn, float).T                      # each (views, epochs)
    share = height * width / 200 ** 2
    for found, low, high in (
            (share[:GLOBALS], 0.9, 1),
            (share[GLOBALS:], 0.05, 0.4),
            (height / width, 3 / 4, 4 / 3)):
        assert low - 0.04 < found.min() < low + 0.1
        assert high - 0.1 < found.max() < high + 0.04


def test_captions_leave_the_pictures_as_they_are(tmp_path):
    """oracle: the same pair with other numbers of captions; another epoch, where all differs; the batch of one."""
    _, shards = mandelbrot_shards(tmp_path / 'a.tar')
    many = TrainingSet(shards, WORDS, MICRO, 3)
    few = replace(many, counts=Counts(global_texts=1, local_texts=1))
    sample = many[0, 0]
    fewer = few.sample(0, 0)
    assert_close(fewer.crops, sample.crops, rtol=0, atol=0)
    assert (fewer.changes, fewer.boxes) == (sample.changes, sample.boxes)
    assert len(sample.captions) == GLOBALS + 6
    # Recorded. If they move, every run is another one.
    assert [round(x['blur'], 4) for x in sample.changes if 'blur' in x] == [1.9224, 0.365, 1.1825, 0.9082]
    next_epoch = many.sample(1, 0)
    for field in 'changes', 'captions', 'boxes':
        assert getattr(next_epoch, field) != getattr(sample, field)
    batch = data.collate([sample], 1, True)
    assert_close([x[0] for x in batch.crops], sample.crops, rtol=0, atol=0)
    for view, expected in enumerate(sample.changes):
        drawn = {}
        for name, count, found in zip(OPERATIONS, batch.change_tables.counts, batch.change_tables.strengths):
            if count[view]:
                drawn[name] = found[view, 0].item()
        assert drawn == pytest.approx(expected)
    assert batch.bad_pairs == 0
    assert torch.equal(batch.texts[0], WORDS(sample.captions[0]))


def blurred(image, sigma):
    return V.gaussian_blur(image, 13, sigma)


def greyed(image, strength):
    return V.rgb_to_grayscale(image, 3)


RELEASED = [  # torchvision's function; the released probability for each kind of view; the released range
    ('brightness', V.adjust_brightness, [0.8] * 3, 0.6, 1.4),
    ('contrast', V.adjust_contrast, [0.8] * 3, 0.6, 1.4),
    ('saturation', V.adjust_saturation, [0.8] * 3, 0.8, 1.2),
    ('hue', V.adjust_hue, [0.8] * 3, -0.1, 0.1),
    ('grey', greyed, [0.2] * 3, 0, 0),
    ('blur', blurred, [1.0, 0.1, 0.5], 0.1, 2.0),
    ('solarize', V.solarize, [0.0, 0.2, 0.0], 0.5, 0.5)]


@pytest.mark.parametrize('name, function, shares, low, high', RELEASED)
def test_each_colour_operation_is_the_released(monkeypatch, name, function, shares, low, high):
    """oracle: torchvision's own function, image by image; other images stay as they are, bit for bit. 5,000 draws have
    the released probabilities, and the mean and the spread of the released range."""
    images = torch.randint(0, 256, (12, 3, 20, 24), dtype=torch.uint8)
    images[0] = 77                                                      # grey
    images[1, 1:] = 0                                                   # red
    strengths = torch.linspace(low, high, 9).tolist()
    changes = changes_of([[{name: strength}] for strength in strengths] + [[{}]] * 3)       # one view each
    monkeypatch.setattr(data, 'normalize', torch.clone)
    [found] = data.Batch([images], changes, [], [], 0).views(0, 0)
    for image, strength, x in zip(images / 255, strengths, found):
        assert_close(x, function(image, strength), rtol=0, atol=2e-5)
    assert found[9:].equal(images[9:] / 255)
    rng = random.Random(1)
    kinds = TrainingSet(None, WORDS, MICRO, 0, Counts(2, 1)).kinds            # the first global, another one, a local
    scales = [kind.area for kind in kinds]
    assert scales == [(0.4, 1), (0.4, 1), (0.05, 0.4)]
    for kind, share in zip(kinds, shares, strict=True):
        assert kind.flip == 0.5
        drawn = [data.draw_changes(kind, rng) for _ in range(5000)]
        values = [strengths[name] for strengths in drawn if name in strengths]
        assert len(values) / 5000 == pytest.approx(share, abs=0.03)
        if share:
            assert np.mean(values) == pytest.approx((low + high) / 2, abs=0.05 * (high - low))
            assert np.std(values) == pytest.approx((high - low) / 12 ** 0.5, abs=0.05 * (high - low))     # of a uniform


def test_jitters_come_in_the_order_of_the_step():
    """oracle: torchvision's two functions, then solarize. In 20 steps two views show all four combinations of orders."""
    image = torch.randint(0, 256, (1, 3, 9, 9), dtype=torch.uint8)
    changes = changes_of([[{'brightness': 1.4, 'contrast': 0.6, 'solarize': 0.5}] * 2])     # two views of one image
    brighter = V.adjust_contrast(V.adjust_brightness(image / 255, 1.4), 0.6)
    first = data.normalize(V.solarize(brighter, 0.5))
    found = set()
    for step in range(20):
        one, other = data.Batch([image, image], changes, [], [], 0).views(0, step)
        found.add((one.allclose(first, atol=1e-4), other.allclose(first, atol=1e-4)))
    assert len(found) == 4


# --- Order and batches -----------------------------------------------------------------------------------------------

def test_order_is_a_pure_function():
    """oracle: numpy's permutation for (seed, epoch). A restart goes on in the same one."""
    steps = list(Order(23, 4, 0, 12, seed=5))
    for step, rows in enumerate(steps):
        epoch, k = divmod(step, 5)                      # 23 // 4 whole batches an epoch
        expected = np.random.default_rng((5, epoch)).permutation(23)
        assert rows == [(epoch, pair) for pair in expected[4 * k:4 * k + 4]]
    assert list(Order(23, 4, 7, 12, seed=5)) == steps[7:]


def test_captions_are_cut():
    """oracle: by hand: the longest global has 7 ids, the longest local 4. The student gets all 8 of caption 0."""
    captions = []
    for counts in [4, 1, 0, 2], [3, 5, 0, 1]:
        captions.append(WORDS(['x ' * count for count in counts]))
    samples = [data.Sample([], [], [], [], ids, bad_pairs=2) for ids in captions]

    def lengths(*options):
        batch = data.collate(samples, *options)
        assert batch.bad_pairs == 4
        found = []
        for texts in batch.texts, batch.teacher_texts:
            for text, ids in zip(texts, torch.stack(captions, dim=1)):
                assert text.equal(ids[:, :text.shape[1]])
            found.append([text.shape[1] for text in texts])
        return str(found)

    assert lengths(1, True, 2) == '[[8, 7, 4, 4], [7, 7]]'
    assert lengths(1, False, 2) == '[[7, 7, 4, 4], [7, 7]]'
    assert lengths(1, True, 1) == '[[8, 7, 7, 7], [6]]'
    assert lengths(1, True, 3) == '[[8, 7, 7, 4], [7, 7, 7]]'
    assert lengths(3, True, 2) == '[[8, 8, 6, 6], [8, 8]]'              # 7 becomes 9, but there are 8; 4 becomes 6


def test_batches_move_whole(tmp_path):
    """oracle: torch's device meta, which does not mix with the CPU. On the way to a GPU each tensor is contiguous,
    because otherwise pinning it would be one more copy."""
    crops = TrainingSet(Shards(dog_tar(tmp_path / 'a.tar', 3)), WORDS, MICRO, 3)
    batch = data.collate([crops[0, i] for i in range(3)], 1, True)
    for x in (*batch.crops, *batch.change_tables[:2], *batch.texts, *batch.teacher_texts):
        assert x.is_contiguous()
    half = changes_of([[dict.fromkeys(OPERATIONS, 0.5)] * len(batch.crops)] * 3)    # changes all images
    moved = batch._replace(change_tables=half).to('meta')
    for x in (*moved.texts, *moved.teacher_texts, *moved.views(0, 0)):
        assert x.device.type == 'meta'


def test_bad_pairs_are_replaced_and_counted(tmp_path, capsys):
    """oracle: the pairs that were broken on purpose: each is counted and named. If all are, the loader gives up."""
    shards = Shards(dog_tar(tmp_path / 'a.tar', 12, broken=[5, 7]))
    crops = TrainingSet(shards, list, MICRO, 3, Counts(1, 0, 0, 1))   # captions as they are
    served = set()
    bad = 0
    for index in range(12):
        sample = crops[0, index]
        served.update(sample.ids)
        bad += sample.bad_pairs
    assert served == {f'dog {i}' for i in range(12)} - {'dog 5', 'dog 7'}
    lines = capsys.readouterr().err
    assert lines.count('a.tar:5.png') + lines.count('a.tar:7.png') == bad >= 2
    assert len({crops[epoch, 5].ids[0] for epoch in range(9)}) > 2      # another replacement in each epoch
    shards.index[:, 2] = 0                              # the size of each image
    refused('1000 pairs in a row cannot be read', crops.__getitem__, (0, 0))
