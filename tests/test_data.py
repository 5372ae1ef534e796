"""The claims of data.py. Each docstring names its oracle: what a result must equal."""
import json
import pickle
import random
import re
import tarfile
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms.v2 import functional as V

import data
from data import Colours, Counts, Crops, Order, Shards, Tokenizer, Unreadable
from tests.helpers import (MICRO, dog_tar, encoded, pairs_tar, put, refused, seeded, shared, write_tar)

LOW = Tokenizer(['l o', 'lo w</w>', 'lo w', 'e r</w>', 'e s', 'es t</w>', 'low est</w>'], 8)
BOAT = ['a boat', 'A 3.5 m boat', 'Two men', 'A lake']


def mandelbrot(width, height):
    image = Image.effect_mandelbrot((width, height), (-2, -1.2, 1, 1.2), 60)
    return image.convert('RGB')


def pixels(source):
    return V.pil_to_tensor(data.read_image(source, 'it').convert('RGB'))


# --- Shards ----------------------------------------------------------------------------------------------------------

def test_paths_and_their_lines(tmp_path, capsys):
    """oracle: the files that were written, and which of them a path names."""
    for name in '08', '09', 'a[1]', 'halves/train/t', 'halves/val/v':
        put(tmp_path / f'{name}.tar')
    for paths, split, names, line in (
            ('', None, '08 09 a[1]', ''),
            ('a[1].tar 09.tar 08.tar 18.tar', None, '08 09 a[1]', '1 of 4 shards are missing, the first is .*18.tar'),
            ('08.tar 0?.tar', None, '08 09', '1 shards are named twice'),
            ('halves', 'val', 'v', 'the half .*halves/val'),
            ('halves/val', 'train', 'v', '')):
        found = data.find_shards([f'{tmp_path}/{path}' for path in paths.split(' ')], split)
        assert ' '.join(Path(tar).stem for tar in found) == names
        printed = ''.join(capsys.readouterr())
        assert re.search(line or '^$', printed)
    for path in 'absent', 'x*.tar', 'halves':
        refused(f"{path}' does not exist or holds no .tar file", data.find_shards, tmp_path / path)


def test_tars_of_every_format(tmp_path):
    """oracle: the pairs and names as written, in any order of members, by a mapped index."""
    jpg = encoded(mandelbrot(40, 32), 'JPEG')
    long = 'folder' * 15 + '/' + 'name' * 15        # over 100 characters: GNU and PAX add a header
    members = [
        ('x/b.json', {'caption': 'json', 'file': 'my cat.jpg'}),
        ('x/a.txt', b'text'),
        ('x/b.JPG', jpg),
        ('x/b.png', b'2nd'),
        ('x/a.jpg', jpg),
        ('x/a.mask.png', b'mask'),
        (f'{long}.png', jpg),
        (f'{long}.txt', b'long'),
        ('x/alone.jpg', jpg)]
    for form in tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT:       # 0, 1, 2
        write_tar(tmp_path / f'{form}.tar', members, form)
    Shards(tmp_path).save(tmp_path / 'index.npy')
    mapped = Shards(tmp_path, index=tmp_path / 'index.npy')
    assert isinstance(mapped.index, np.memmap)
    assert len(mapped) == 9
    for i in range(9):
        assert mapped.pool(i) == [['json', 'text', 'long'][i % 3]]
        assert mapped.image(i) == jpg
        assert mapped.member(i, 'mask.png') == [b'', b'mask', b''][i % 3]
    assert mapped.name(0).endswith('0.tar:x/b.JPG (my cat.jpg)')


def readable(shards):
    """{first sentence: pixels} of the pairs that can be read."""
    found = {}
    for i in range(len(shards)):
        with suppress(Unreadable):
            caption = shards.pool(i)[0]
            found[caption] = pixels(shards.image(i))
    return found


def test_sixteen_bits_of_gray_and_half_an_image():
    """oracle: one colour by construction; a sentence for what Pillow cannot decode."""
    gray = Image.fromarray(np.full((20, 40), 128 * 257, np.uint16))
    assert (pixels(encoded(gray)) == 128).all()
    refused('it is no image that can be read', pixels, encoded(mandelbrot(64, 64))[:400])


def test_damaged_shards_give_what_tarfile_reads(tmp_path, capsys):
    """oracle: which of five pairs each damage of the third leaves, and that tarfile stops there. It steps over a header
    in USTAR; in PAX that is the second of two, and an error. Joined tars give the pairs of both."""
    image = encoded(Image.new('RGB', (9, 9)))
    joined = write_tar(tmp_path / 'b.tar', [('5.png', image), ('5.json', ['dog 5'])]).read_bytes()
    noise = random.Random(0).randbytes(512)

    def check(value, left):
        path.write_bytes(value)
        shards = Shards(path)
        assert len(shards) == len(left)
        assert readable(shards).keys() == {f'dog {i}' for i in left}
        stopped = 'a.tar is damaged behind byte' in capsys.readouterr().err
        assert stopped == (left == '01')

    for form, stepped_over in (tarfile.USTAR_FORMAT, '0134'), (tarfile.PAX_FORMAT, '01'):
        path = dog_tar(tmp_path / 'a.tar', 5, form)
        raw = path.read_bytes()
        with tarfile.open(path) as tar:
            info, text = tar.getmembers()[4:6]
        start = info.offset_data - 512
        check(raw, '01234')
        check(raw[:start + 100], '01')
        check(raw[:text.offset_data + 5], '01')
        check(raw + joined, '012345')
        check(raw[:start] + noise + raw[start + 512:], stepped_over)
    info.size = -1000                                   # would send tarfile back for ever
    check(raw[:start] + info.tobuf(tarfile.GNU_FORMAT)[-512:] + raw[start + 512:], '01')


# --- Captions and tokenizer ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('text, expected', [
    ('a dog, e.g. a puppy', ['a dog, e.g. a puppy']),
    ('at 3 p.m. we left', ['at 3 p.m. we left']),
    ('A 3.5 m boat. Two men.', ['A 3.5 m boat', 'Two men']),
    ('We met the U.S. Army. J. Smith\nleft</s> ', ['We met the U.S. Army', 'J. Smith', 'left']),
    ('a.jpg is. 1. B', ['a.jpg is', '1', 'B']),
    ('É. Zola. .', ['É. Zola'])])
def test_sentences_by_hand(text, expected):
    """oracle: pencil: a sentence ends at a full stop before white space, unless that stands behind a single letter."""
    assert data.sentences(text) == expected


@pytest.mark.parametrize('record, pool', [
    ({'raw_caption': 'a boat', 'longSV_captions': 'A 3.5 m boat. Two men\nA lake</s>'}, BOAT),
    ({'raw_caption': 'a boat', 'longSV_captions': [*BOAT[1:], 'One. Two.\n'], 'caption': 'x'},
     [*BOAT, 'One. Two.']),
    ({'original_caption': "St. Mary's Church", 'caption': 'One. Two.'}, ["St. Mary's Church", 'One', 'Two']),
    ({'captions': ['one dog.', 'two. three'], 'caption': 'no'}, ['one dog', 'two', 'three']),
    ({'caption': None, 'txt': 'ox'}, ['ox']),
    ({'captions': ['o', 'n', 'e'], 'caption': [None, 7, ''], 'alt': 'one dog'}, [])])
def test_captions_of_every_format(record, pool):
    """oracle: pools written by hand. PixelProse's original caption and items of DreamLIP's lists pass whole, as
    released; the same where their keys are named."""
    assert data.caption_pool(record) == pool
    assert data.caption_pool(record, list(record)[:2])[:len(pool)] == pool


def test_text_crops_come_in_every_order():
    """oracle: the rule itself: 1 to 5 distinct sentences a global, distinct locals; every order of a small pool."""
    lengths = Counter()
    orders = set()
    for seed in range(300):
        rng = random.Random(seed)
        crop, *local = data.text_crops(list('abcdefghi'), rng, 1, 6)
        parts = crop.split('. ')
        lengths[len(parts)] += 1
        assert len(set(parts)) == len(parts)
        assert len(set(local)) == 6
        orders.add(tuple(data.text_crops(list('abc'), rng, 0, 3)))
    assert len(orders) == 6
    assert len(lengths) == 5
    assert min(lengths.values()) > 40             # uniform: 60 each
    crops = data.text_crops(['a', 'b'], rng, 0, 5)
    assert len(crops) == 5
    assert crops[:4] == ['a', 'b', 'a', 'b']        # whole repeats, then a random rest


def test_tokenizer_equals_clip():
    """oracle: ids of CLIP's own tokenizer on 35 hard texts, recorded in golden/tokenizer.json."""
    tokenizer = Tokenizer.clip(shared('vocab', 'bpe_simple_vocab_16e6.txt.gz'))
    tokenizer = pickle.loads(pickle.dumps(tokenizer))                   # as workers get it
    for text, ids, padded in json.loads(shared('golden', 'tokenizer.json').read_text()):
        assert [49406, *tokenizer.encode(text), 49407] == ids, text
        assert tokenizer([text]).tolist() == [padded]


def test_ids_and_words_by_hand():
    """oracle: pencil: rank 1 'lo w</w>' ends low, rank 2 'lo w' starts the others; cut rows keep their end."""
    assert LOW.encode('low lower lowest') == [513, 514, 515, 518]       # 512 + the line of each merge
    assert LOW.encode('!l')[0] == 256                   # '!' is byte symbol 0, and 256 + 0 where it closes a word
    assert LOW('low ' * 20).tolist() == [[519] + 6 * [513] + [520]]
    assert LOW('low').tolist() == [[519, 513, 520, 0, 0, 0, 0, 0]]
    text = 'x²+Ⅷ①_é\'S “ﬁn” ＡＢ&amp;lt;\x07 \ud800'
    assert Tokenizer.split(text) == "x ² + ⅷ ① _ é 's \" fin \" ab < \ufffd".split()


def test_learn_by_hand():
    """oracle: pencil: 'l o' and 'w e' come three times, and of equal pairs the first one met is merged first."""
    learned = Tokenizer.learn(['low low lower', 'newest newest'], 600)
    assert learned.merges == ['l o', 'w e', 'lo w</w>', 'n e', 'ne we', 'newe s', 'newes t</w>']
    assert learned.encode('lowest') == [512, 513, 82, 256 + 83]        # lo, we, s, t at the end: '!' is 0
    assert len(Tokenizer.learn(['low low'], 515).merges) == 1           # 512 bytes, start and end


# --- Image crops and colours -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind, width, tolerance, least', [
    ('PNG', 200, 0, 0.4),
    ('PNG', 200, 0, 0.9),
    ('JPEG', 2000, 9, 0.4)])
def test_crops_of_the_released_sizes_and_sides(tmp_path, kind, width, tolerance, least):
    """oracle: torchvision's crop of each box of the upright image; the camera was turned. Of a large JPEG, which is
    decoded smaller, that of the whole. Half of 'full' are mirror images, none of 'crops', which have no colours either.
    Shares of the image `least` to 1 for globals, 0.05 to 0.4 for locals; aspects."""
    exif = Image.Exif()
    exif[0x112] = 6                                     # a quarter turn
    file = encoded(mandelbrot(width, width * 3 // 4), kind, exif=exif)
    whole = pixels(file)
    shards = Shards(pairs_tar(tmp_path / 'a.tar', [['dog']], [file]))
    crops = Crops(shards, LOW, MICRO, 0, 1, augment='crops', crop_min=least)
    mirrored = 0
    drawn = []
    for epoch in range(40):
        plain, colours, _, boxes = crops.sample(epoch, 0)
        full, *_ = replace(crops, augment='full').sample(epoch, 0)
        assert set(colours) == {Colours()}
        assert [crop.shape[1] for crop in plain] == 2 * [32] + 6 * [16]
        for crop, other, box in zip(plain, full, boxes, strict=True):
            want = V.resized_crop(whole, *box, crop.shape[1:], data.BICUBIC)
            assert (crop.float() - want).abs().mean() <= tolerance      # of 255
            if not other.equal(crop):
                assert other.equal(crop.flip(-1))
                mirrored += 1
        drawn.append(boxes)
    assert 120 < mirrored < 200                                         # of 320
    _, _, height, width = np.array(drawn, float).T                      # each (views, epochs)
    share = height * width / whole[0].numel()
    for found, low, high in (share[:2], least, 1), (share[2:], 0.05, 0.4), (height / width, 3 / 4, 4 / 3):
        assert low - 0.04 < found.min() < low + 0.1
        assert high - 0.1 < found.max() < high + 0.04


def blurred(image, sigma):
    return V.gaussian_blur(image, 13, sigma)


def grayed(image, strength):
    return V.rgb_to_grayscale(image, 3)


OPERATIONS = [  # torchvision's function; the released probability for each kind of view, and range
    ('brightness', V.adjust_brightness, [0.8] * 3, 0.6, 1.4),
    ('contrast', V.adjust_contrast, [0.8] * 3, 0.6, 1.4),
    ('saturation', V.adjust_saturation, [0.8] * 3, 0.8, 1.2),
    ('hue', V.adjust_hue, [0.8] * 3, -0.1, 0.1),
    ('gray', grayed, [0.2] * 3, 1, 1),
    ('blur', blurred, [1.0, 0.1, 0.5], 0.1, 2.0),
    ('solarize', V.solarize, [0.0, 0.2, 0.0], 0.5, 0.5)]


@pytest.mark.parametrize('name, function, shares, low, high', OPERATIONS)
def test_each_colour_operation_is_the_released(monkeypatch, name, function, shares, low, high):
    """oracle: torchvision's own function, image by image; an image of neutral strength stays as it is, bit by bit. Of
    5,000 draws for each kind of view the released probabilities and ranges."""
    images = torch.randint(0, 256, (12, 3, 20, 24), dtype=torch.uint8)
    images[0] = 77                                                      # gray
    images[1, 1:] = 0                                                   # red
    colours = torch.tensor([Colours()] * 12)
    column = Colours._fields.index(name)
    neutral = Colours()[column]
    colours[:9, column] = torch.linspace(low, high, 9)
    monkeypatch.setattr(data, 'normalize', torch.clone)
    found, = data.Batch([images], colours[:, None], 'key', [], [], 0).views()
    for image, strength, x in zip(images / 255, colours[:, column].tolist(), found):
        if strength == neutral:
            assert x.equal(image)
        else:
            assert_close(x, function(image, strength), rtol=0, atol=2e-5)
    rng = random.Random(1)
    for kind, share in zip(data.view_kinds(MICRO, 2, 1), shares, strict=True):
        values = np.array([data.draw_colours(kind, rng)[column] for _ in range(5000)])
        changed = values[values != neutral]
        assert len(changed) / 5000 == pytest.approx(share, abs=0.03 if 0 < share < 1 else 0)
        if share:
            assert low <= changed.min() and changed.max() <= high
            assert changed.mean() == pytest.approx((low + high) / 2, abs=0.05 * (high - low))


# --- Order and batches -----------------------------------------------------------------------------------------------

def test_order_is_a_pure_function():
    """oracle: numpy's permutation of (seed, epoch), which a restart only cuts."""
    steps = list(Order(23, 4, 0, 12, seed=5))
    for step, rows in enumerate(steps):
        epoch, k = divmod(step, 5)                      # 23 // 4 whole batches an epoch
        expected = np.random.default_rng((5, epoch)).permutation(23)
        places = range(4 * k, 4 * k + 4)
        assert rows == [(epoch, place, expected[place]) for place in places]
    assert list(Order(23, 4, 7, 12, seed=5)) == steps[7:]


def test_batches_are_equal_by_workers_and_ranks(tmp_path):
    """oracle: one process without workers, whole batches."""
    crops = Crops(Shards(dog_tar(tmp_path / 'a.tar', 12)), LOW, MICRO, 3, 4, Counts(2, 2, 2, 3))

    def served(rank=0, world=1, workers=0):
        batches = data.loader(crops, Order(12, 4, 2, 5, 3, rank, world), workers, multiple=8)
        return [batch.views() + batch.texts for batch in batches]

    alone = served()
    assert_close(served(workers=2), alone, rtol=0, atol=0)
    for one, other, both in zip(served(0, 2), served(1, 2), alone, strict=True):
        for *parts, whole in zip(one, other, both, strict=True):
            assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)


def test_captions_are_cut():
    """oracle: by hand: at most 7 ids in the globals, 4 in the locals; caption 0 keeps all 8 for the student."""
    captions = [LOW(['low ' * count for count in counts]) for counts in ([4, 1, 0, 2], [3, 5, 0, 1])]
    samples = [([], torch.zeros(0, 7), ids, 'key', 1) for ids in captions]
    for options, *lengths in (
            ([], 8, 7, 4, 4, 7, 7),
            ([1, False], 7, 7, 4, 4, 7, 7),
            ([3], 8, 8, 6, 6, 8, 8)):                                   # 9 and 6, of which there are 8
        batch = data.collate(samples, *options)
        assert batch.bad == 2
        for text, caption, length in zip(batch.texts + batch.teacher_texts, [0, 1, 2, 3, 0, 1], lengths, strict=True):
            ids = torch.stack([row[caption] for row in captions])
            assert text.equal(ids[:, :length])


def dog_numbers(captions):
    """In place of a tokenizer: 'dog 7. dog 7' -> [[7]]."""
    number = captions[0].partition('.')[0].removeprefix('dog ')
    return torch.tensor([[int(number)]])


def test_bad_pairs_are_replaced_and_counted(tmp_path, capsys):
    """oracle: the pairs broken on purpose: none is served, each is counted and named, none is twice in a batch."""
    def batches_of(n, broken, steps):
        shards = Shards(dog_tar(tmp_path / 'a.tar', n, broken=broken))
        crops = Crops(shards, dog_numbers, MICRO, 3, 4, Counts(2, 0, 1, 0))
        return data.loader(crops, Order(n, 4, 0, steps, seed=3), workers=0)

    served = set()
    bad = 0
    for batch in batches_of(12, [5, 7], 6):
        dogs = set(batch.texts[0].flatten().tolist())
        assert len(dogs) == 4
        served |= dogs
        bad += batch.bad
    assert served == set(range(12)) - {5, 7}
    lines = capsys.readouterr().err
    assert lines.count('a.tar:5.png') + lines.count('a.tar:7.png') == bad >= 4
    [batch] = batches_of(4, range(3), 1)                                # one batch is the whole set
    assert batch.texts[0].tolist() == 4 * [[3]]
