"""The claims of data.py. Each docstring names its oracle: what a result must equal."""
import gzip
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms.v2 import functional as V

import data
from data import Colours, Counts, Crops, Order, Shards, Tokenizer
from tests.helpers import (MICRO, ROOT, dog_tar, encoded, pairs_tar, put, refused, seeded, shared, write_tar)

LOW = Tokenizer(['l o', 'lo w</w>', 'lo w', 'e r</w>', 'e s', 'es t</w>', 'low est</w>'], 8)
BOAT = ['a boat', 'A 3.5 m boat', 'Two men', 'A lake']


def mandelbrot(width, height):
    return Image.effect_mandelbrot((width, height), (-2, -1.2, 1, 1.2), 60)         # gray


def pixels(source):
    return V.pil_to_tensor(data.read_image(source).convert('RGB'))


# --- Imports ---------------------------------------------------------------------------------------------------------

def test_imports_change_nothing():
    """oracle: limits, warning filters and signals of a program that has imported torch and the like before."""
    code = '''
import resource, signal, warnings
import torch.distributed, torch.utils.checkpoint, torchvision.transforms.v2, tqdm.contrib.concurrent
def state():
    limits = [resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith('RLIMIT')]
    return limits, warnings.filters[:], [signal.getsignal(number) for number in signal.valid_signals()]
before = state()
import cosmos, data, eval, train
assert state() == before
'''
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


# --- Shards ----------------------------------------------------------------------------------------------------------

def test_paths_and_their_lines(tmp_path, capsys):
    """oracle: the files that were written, and which of them a path names."""
    for name in '08', '09', '11', 'a[1]', 'halves/train/t', 'halves/val/v':
        put(tmp_path / f'{name}.tar')

    def found(*paths, split=None):
        tars = data.find_shards([f'{tmp_path}/{path}' for path in paths], split)
        lines = capsys.readouterr()
        return ' '.join(Path(tar).stem for tar in tars), lines.out + lines.err

    assert found('') == ('08 09 11 a[1]', '')
    assert found('0*.tar', 'a[1].tar') == ('08 09 a[1]', '')
    names, lines = found('09.tar', '', '18.tar', '19.tar')
    assert names == '08 09 11 a[1]'
    assert f'2 of 7 shards are missing, the first is {tmp_path}/18.tar' in lines
    assert '1 shards are named twice' in lines
    assert found('halves', split='val') == ('v', f'data       the half {tmp_path}/halves/val\n')


def test_tars_of_every_format(tmp_path):
    """oracle: the pairs and names as written, in any order of members, by the index that was saved. A
    folder that was moved has the same fingerprint."""
    jpg = encoded(mandelbrot(40, 32), 'JPEG')
    long = 'folder' * 15 + '/' + 'name' * 15        # over 100 characters: GNU and PAX add a header
    members = [
        ('x/b.json', {'caption': 'json', 'file': 'my cat.jpg'}), ('x/a.txt', b'text'), ('x/b.JPG', jpg),
        ('x/b.png', b'2nd'), ('x/a.jpg', jpg), ('x/a.mask.png', b'mask'), (f'{long}.png', jpg),
        (f'{long}.txt', b'long'), ('x/alone.jpg', jpg)]
    for form in tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT:       # 0, 1, 2
        write_tar(tmp_path / f'{form}.tar', members, form)
    shards = Shards(tmp_path)
    shards.save(tmp_path / 'index.npy')
    found = Shards(tmp_path, index=tmp_path / 'index.npy')
    assert isinstance(found.index, np.memmap) and len(found) == 9
    for i in range(9):
        assert found.pool(i) == [['json', 'text', 'long'][i % 3]]
        assert found.image(i) == jpg
        assert found.member(i, 'mask.png') == [b'', b'mask', b''][i % 3]
    assert found.name(0).endswith('0.tar:x/b.JPG (my cat.jpg)')
    assert found.name(1).endswith('0.tar:x/a.jpg')
    shutil.copytree(tmp_path, tmp_path / 'moved')
    assert Shards(tmp_path / 'moved').fingerprint == shards.fingerprint


def test_many_shards_are_read_by_processes(tmp_path):
    """oracle: the pairs that were written."""
    for n in range(20):
        dog_tar(tmp_path / f'{n:02d}.tar', 2)
    numbers = Shards(tmp_path).index[:, 0]
    assert numbers.tolist() == sorted([*range(20)] * 2)


def test_half_an_image_is_refused():
    """oracle: the rule for errors."""
    half = encoded(mandelbrot(99, 99), 'JPEG')[:-200]
    kinds = data.view_kinds(MICRO, 1, 0)
    refused('its image is no image', data.image_crops, half, kinds, random.Random(0))


def test_damaged_shards_give_what_tarfile_reads(tmp_path, capsys):
    """oracle: which of five pairs each damage of the third leaves, and that tarfile stops there. It steps over a header
    in USTAR; in PAX that is the second of two, and an error. Joined tars give the pairs of both."""
    image = encoded(Image.new('RGB', (9, 9)))
    joined = write_tar(tmp_path / 'b.tar', [('5.png', image), ('5.json', ['dog 5'])]).read_bytes()
    noise = random.Random(0).randbytes(512)

    def check(value, left):
        path.write_bytes(value)
        shards = Shards(path)
        found = [shards.pool(i)[0] for i in range(len(shards))]
        assert found == [f'dog {i}' for i in left]
        stopped = 'a.tar is damaged behind byte' in capsys.readouterr().err
        assert stopped == (left == '01')

    for form, stepped_over in (tarfile.USTAR_FORMAT, '0134'), (tarfile.PAX_FORMAT, '01'):
        path = dog_tar(tmp_path / 'a.tar', 5, form)
        raw = path.read_bytes()
        with tarfile.open(path) as tar:
            info, text = tar.getmembers()[4:6]
        start = info.offset_data - 512
        check(raw[:start + 100], '01')
        check(raw[:text.offset_data + 5], '01')
        check(raw + joined, '012345')
        check(raw[:start] + noise + raw[start + 512:], stepped_over)
    info.size = -1000                                   # would send tarfile back for ever
    header = info.tobuf(tarfile.GNU_FORMAT)[-512:]
    check(raw[:start] + header + raw[start + 512:], '01')


# --- Captions and tokenizer ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('text, expected', [
    ('a dog, e.g. a puppy', ['a dog, e.g. a puppy']),
    ('A 3.5 m boat. Two men.', ['A 3.5 m boat', 'Two men']),
    ('at 3 p.m. we left', ['at 3 p.m. we left']),
    ('We met the U.S. Army. J. Smith\nleft</s> ', ['We met the U.S. Army', 'J. Smith', 'left']),
    ('a.jpg is. 1. B', ['a.jpg is', '1', 'B']),
    ("the dog's. It’s. 'J. Smith'. É. Zola. .", ["the dog's", 'It’s', "'J. Smith'", 'É. Zola'])])
def test_sentences_by_hand(text, expected):
    """oracle: pencil: a sentence ends at a full stop before white space, unless that stands behind a single letter."""
    assert data.sentences(text) == expected


@pytest.mark.parametrize('record, pool', [
    ({'raw_caption': 'a boat', 'longSV_captions': 'A 3.5 m boat. Two men\nA lake</s>'}, BOAT),
    ({'raw_caption': 'a boat', 'longSV_captions': [*BOAT[1:], 'One. Two.\n'], 'caption': 'x'},
     [*BOAT, 'One. Two.']),
    ({'original_caption': "St. Mary's Church", 'caption': 'One. Two.'}, ["St. Mary's Church", 'One', 'Two']),
    ({'captions': ['one dog.', 'two. three'], 'caption': 'no'}, ['one dog', 'two', 'three']),
    ({'caption': 'one dog', 'txt': 'no'}, ['one dog']),
    ({'caption': None, 'txt': 'one dog'}, ['one dog']),
    ({'caption': [None, 7, ''], 'alt': 'one dog'}, [])])
def test_captions_of_every_format(record, pool):
    """oracle: pools written by hand. PixelProse's original caption and items of DreamLIP's lists pass whole, as
    released; the same where their keys are named."""
    assert data.caption_pool(record) == pool
    assert data.caption_pool(record, list(record)[:2])[:len(pool)] == pool


def test_text_crops_are_drawn_in_random_order():
    """oracle: the rule itself: 1 to 5 distinct sentences a global, distinct locals; a small pool is repeated whole."""
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
    crops = data.text_crops(['a', 'b'], rng, 0, 5)
    assert crops[:4] == ['a', 'b', 'a', 'b']            # whole repeats, then a random rest


def test_tokenizer_equals_clip():
    """oracle: ids of CLIP's own tokenizer on 35 hard texts, recorded in golden/tokenizer.json."""
    tokenizer = Tokenizer.clip(shared('vocab', 'bpe_simple_vocab_16e6.txt.gz'))
    for text, ids, padded in json.loads(shared('golden', 'tokenizer.json').read_text()):
        assert [49406, *tokenizer.encode(text), 49407] == ids, text
        assert tokenizer([text]).tolist() == [padded]


def test_the_vocabulary_is_fetched_once(tmp_path, monkeypatch):
    """oracle: the merges in a file: of another digest they are not kept; of the right one they are there without the
    file, too. Where there are none a sentence names the remedies."""
    file = put(tmp_path / 'vocab.gz', gzip.compress(b'header\nl o\nlo w</w>'))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.delenv('COSMOS_VOCAB', raising=False)
    monkeypatch.setattr(data, 'VOCAB_URL', file.as_uri())
    refused('cannot be fetched .*--vocab PATH or COSMOS_VOCAB.*--vocab learn', Tokenizer.clip)
    monkeypatch.setattr(data, 'VOCAB_SHA256', hashlib.sha256(file.read_bytes()).hexdigest())
    for _ in range(2):
        assert Tokenizer.clip().merges == ['l o', 'lo w</w>']
        file.unlink(missing_ok=True)


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

@pytest.mark.parametrize('width, kind, tolerance', [
    (192, 'PNG', 0.5),
    (2000, 'JPEG', 6),
    (1, 'PNG', 0.5),
    (3, 'JPEG', 6)])
def test_image_crops_are_the_pixels_of_their_boxes(width, kind, tolerance):
    """oracle: torchvision's crop of each box, flipped or not, of the upright image; the camera was turned. Of a large
    JPEG, which is decoded smaller, that of the whole."""
    rng = random.Random(0)
    kinds = data.view_kinds(MICRO, 2, 6)
    exif = Image.Exif()
    exif[0x112] = 6                                     # a quarter turn
    image = mandelbrot(width, max(width * 7 // 10, 1))
    file = encoded(image, kind, exif=exif)
    whole = pixels(file)
    assert whole.shape[1:] == image.size
    for _ in range(30):
        crops, boxes = data.image_crops(file, kinds, rng)
        for crop, box, view in zip(crops, boxes, kinds, strict=True):
            want = V.resized_crop(whole, *box, [view.size] * 2, data.BICUBIC).float()
            distance = (crop - want).abs().mean()
            mirrored = (crop.flip(-1) - want).abs().mean()
            assert min(distance, mirrored) < tolerance                  # of 255


def mandelbrot_shards(path):
    image = encoded(mandelbrot(200, 200))
    return pixels(image), Shards(pairs_tar(path, [['dog', 'cat']], [image]))


def test_crops_of_the_released_sizes_and_sides(tmp_path):
    """oracle: torchvision's crop of each box; half of 'full' are its mirror images, none of 'crops', which have no
    colours either. Shares of the image 0.9 to 1 for globals, 0.05 to 0.4 for locals; aspects."""
    whole, shards = mandelbrot_shards(tmp_path / 'a.tar')
    mirrored = 0
    drawn = []
    train_set = Crops(shards, LOW, MICRO, 3, augment='crops', crop_min=0.9)
    augmented = replace(train_set, augment='full')
    for epoch in range(40):
        plain, colours, _, boxes = train_set.sample(epoch, 0)
        full, *_ = augmented.sample(epoch, 0)
        assert set(colours) == {Colours()}
        assert [crop.shape[1] for crop in plain] == 2 * [32] + 6 * [16]
        for crop, other, box in zip(plain, full, boxes, strict=True):
            assert crop.equal(V.resized_crop(whole, *box, crop.shape[1:], data.BICUBIC))
            if not other.equal(crop):
                assert other.equal(crop.flip(-1))
                mirrored += 1
        drawn.append(boxes)
    assert 120 < mirrored < 200                                         # of 320
    _, _, height, width = np.array(drawn, float).T                      # each (views, epochs)
    share = height * width / 200 ** 2
    for found, low, high in (
            (share[:2], 0.9, 1),
            (share[2:], 0.05, 0.4),
            (height / width, 3 / 4, 4 / 3)):
        assert low - 0.04 < found.min() < low + 0.1
        assert high - 0.1 < found.max() < high + 0.04


def test_captions_leave_the_pictures_as_they_are(tmp_path):
    """oracle: the same pair with other numbers of captions; another epoch has other crops, colours and captions."""
    _, shards = mandelbrot_shards(tmp_path / 'a.tar')
    many = Crops(shards, LOW, MICRO, 3)
    few = replace(many, counts=Counts(global_texts=1, local_texts=1))
    crops, colours, captions, boxes = many.sample(0, 0)
    fewer = few.sample(0, 0)
    assert_close(fewer[0], crops, rtol=0, atol=0)
    assert (fewer[1], fewer[3]) == (colours, boxes)
    assert len(captions) == 8
    _, *next_epoch = many.sample(1, 0)
    for before, after in zip([colours, captions, boxes], next_epoch):
        assert before != after


def blurred(image, sigma):
    return V.gaussian_blur(image, 13, sigma)


def grayed(image, strength):
    return V.rgb_to_grayscale(image, 3)


OPERATIONS = [  # torchvision's function; the released probability for each kind of view, and range
    ('brightness', V.adjust_brightness, [0.8] * 3, 0.6, 1.4),
    ('contrast', V.adjust_contrast, [0.8] * 3, 0.6, 1.4),
    ('saturation', V.adjust_saturation, [0.8] * 3, 0.8, 1.2),
    ('hue', V.adjust_hue, [0.8] * 3, -0.1, 0.1),
    ('gray', grayed, [0.2] * 3, 0, 0),
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
    batch = data.Batch([images], colours[:, None], [], [], 0)
    [found] = batch.views(0)
    strengths = colours[:, column].tolist()
    for image, strength, x in zip(images / 255, strengths, found):
        if strength == neutral:
            assert x.equal(image)
        else:
            assert_close(x, function(image, strength), rtol=0, atol=2e-5)
    rng = random.Random(1)
    for kind, share in zip(data.view_kinds(MICRO, 2, 1), shares, strict=True):
        values = np.array([data.draw_colours(kind, rng)[column] for _ in range(5000)])
        changed = values[values != neutral]
        assert len(changed) / 5000 == pytest.approx(share, abs=0.03)
        if share:
            assert changed.mean() == pytest.approx((low + high) / 2, abs=0.05 * (high - low))


def test_jitters_come_in_the_order_of_the_step():
    """oracle: torchvision's two functions: in 20 steps each view has both orders."""
    image = torch.randint(0, 256, (1, 3, 9, 9), dtype=torch.uint8)
    colours = torch.tensor([Colours(brightness=1.4, contrast=0.6)])
    brighter = V.adjust_contrast(V.adjust_brightness(image / 255, 1.4), 0.6)
    first = data.normalize(brighter)
    found = set()
    for step in range(20):
        batch = data.Batch([image, image], colours.expand(1, 2, 7), [], [], 0)
        one, other = batch.views(step)
        found.add((one.allclose(first, atol=1e-4), other.allclose(first, atol=1e-4)))
    assert len(found) == 4


# --- Order and batches -----------------------------------------------------------------------------------------------

def test_order_is_a_pure_function():
    """oracle: numpy's permutation of (seed, epoch), which a restart only cuts."""
    steps = list(Order(23, 4, 0, 12, seed=5))
    for step, rows in enumerate(steps):
        epoch, k = divmod(step, 5)                      # 23 // 4 whole batches an epoch
        expected = np.random.default_rng((5, epoch)).permutation(23)
        assert rows == [(epoch, pair) for pair in expected[4 * k:4 * k + 4]]
    assert list(Order(23, 4, 7, 12, seed=5)) == steps[7:]


def test_captions_are_cut():
    """oracle: by hand: at most 7 ids in the globals, 4 in the locals; caption 0 keeps all 8 for the student."""
    captions = []
    for counts in [4, 1, 0, 2], [3, 5, 0, 1]:
        captions.append(LOW(['low ' * count for count in counts]))
    samples = [([], torch.zeros(0, 7), ids, 1) for ids in captions]

    def lengths(*options):
        batch = data.collate(samples, *options)
        assert batch.bad == 2
        for texts in batch.texts, batch.teacher_texts:
            for text, ids in zip(texts, torch.stack(captions, dim=1)):
                assert text.equal(ids[:, :text.shape[1]])
        return [[text.shape[1] for text in texts] for texts in (batch.texts, batch.teacher_texts)]

    assert lengths() == [[8, 7, 4, 4], [7, 7]]
    assert lengths(1, False) == [[7, 7, 4, 4], [7, 7]]
    assert lengths(1, True, 1) == [[8, 7, 7, 7], [6]]
    assert lengths(1, True, 3) == [[8, 7, 7, 4], [7, 7, 7]]
    assert lengths(3) == [[8, 8, 6, 6], [8, 8]]         # 9 and 6, of which there are 8


def test_bad_pairs_are_replaced_and_counted(tmp_path, capsys):
    """oracle: the pairs broken on purpose: none is served, each is counted and named. The limit, where none can be read
    any more."""
    shards = Shards(dog_tar(tmp_path / 'a.tar', 12, broken=[5, 7]))
    crops = Crops(shards, list, MICRO, 3, Counts(1, 0, 0, 1))   # captions as they are
    served = set()
    bad = 0
    for index in range(12):
        _, _, [caption], more = crops[0, index]
        served.add(caption)
        bad += more
    assert served == {f'dog {i}' for i in range(12)} - {'dog 5', 'dog 7'}
    lines = capsys.readouterr().err
    assert lines.count('a.tar:5.png') + lines.count('a.tar:7.png') == bad >= 2
    shards.index[:, 2] = 0                              # bytes of each image
    refused('1000 pairs in a row cannot be read', crops.__getitem__, (0, 0))
