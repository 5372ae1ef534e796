"""data.py: every claim with its oracle. Each docstring says what the result is compared with."""
import contextlib
import io
import json
import math
import os
import pickle
import random
import resource
import shutil
import sys
import tarfile
import threading
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch.testing import assert_close
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as V

import data
from cosmos import Config
from data import Colours, Order, Shards, Tokenizer, Views

HERE = Path(__file__).parent
SHARED = Path(os.environ.get('COSMOS_SHARED') or HERE.parent / 'shared')
FORMATS = tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT
MICRO = Config(embed_dim=16, image_size=32, local_image_size=16, patch_size=8, vision_width=24,
               vision_layers=2, vision_heads=2, text_width=16, text_layers=2, text_heads=2,
               context_length=12, vocab_size=50, cross_heads=2)
LOW = Tokenizer(['l o', 'lo w</w>', 'lo w', 'e r</w>', 'e s', 'es t</w>', 'low est</w>'], 8)


def shared(*parts):
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f'{path} is absent; set COSMOS_SHARED to the folder with the recorded numbers')
    return path


def close(a, b, tolerance=1e-5):
    """Relative distance of the whole tensors."""
    distance = ((a - b).norm() / b.norm().clamp_min(1e-12)).item()
    assert distance <= tolerance, f'relative distance {distance:.2e}, allowed {tolerance}'


def refused(sentence, call, *args, **kwargs):
    """The call raises ValueError with a text that matches `sentence`."""
    with pytest.raises(ValueError, match=sentence):
        call(*args, **kwargs)


def put(path, value=''):
    """A file, and the folders it lies in -> path. Text and bytes as they are, all else as JSON."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(as_bytes(value))
    return path


def as_bytes(value):
    if isinstance(value, bytes):
        return value
    return (value if isinstance(value, str) else json.dumps(value)).encode()


def encoded(image, kind='PNG', **options):
    """A Pillow image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    """A tar of (name, value) -> path. Times are fractions, as webdataset has them: one more header in PAX."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w', format=format) as tar:
        for i, (name, value) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.mtime = 1 + i / 7
            info.size = len(as_bytes(value))
            tar.addfile(info, io.BytesIO(as_bytes(value)))
    return path


def dog_tar(path, n, no_image=(), no_text=()):
    """n pairs, i.png of a colour of its own and the i.json of 'dog i', some of them broken -> path."""
    members = []
    for i in range(n):
        image = encoded(Image.new('RGB', (40, 30), (20 * i, 255 - 20 * i, 7 * i)))
        members.append((f'{i}.png', b'no image' if i in no_image else image))
        members.append((f'{i}.json', '{broken' if i in no_text else {'caption': f'dog {i}'}))
    return write_tar(path, members)


def readable(shards):
    """{first sentence: pixels} of the pairs that can be read."""
    found = {}
    for i in range(len(shards)):
        with contextlib.suppress(Exception):
            found[shards.pool(i)[0]] = data.decode(shards.image(i))
    return found


def noise(width, height):
    """A picture of random colours, smooth enough for a JPEG."""
    small = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.BICUBIC)


# --- Tokenizer -------------------------------------------------------------------------------------------------------

def test_tokenizer_equals_clip(tmp_path, monkeypatch):
    """oracle: ids of CLIP's own tokenizer on 35 hard texts, recorded in golden/tokenizer.json."""
    tokenizer = Tokenizer.clip(shared('vocab', 'bpe_simple_vocab_16e6.txt.gz'))
    tokenizer = pickle.loads(pickle.dumps(tokenizer))                   # as workers get it
    assert (tokenizer.vocab_size, tokenizer.sot, tokenizer.eot) == (49408, 49406, 49407)
    for text, ids, padded in json.loads(shared('golden', 'tokenizer.json').read_text(encoding='utf-8')):
        assert [tokenizer.sot, *tokenizer.encode(text), tokenizer.eot] == ids, text
        assert sum(count for _, count in tokenizer.words(text)) == len(ids) - 2
        assert tokenizer([text]).tolist() == [padded]
    assert tokenizer.decode(tokenizer('A naïve café,\n 3 cats 😀')[0]) == 'a naïve café , 3 cats 😀'
    refused("stub.gz is .*git-lfs pointer.*--vocab PATH or COSMOS_VOCAB",
            Tokenizer.clip, put(tmp_path / 'stub.gz', 'version https://git'))

    def no_network(*args, **kwargs):
        raise OSError('no network')

    monkeypatch.delenv('COSMOS_VOCAB', raising=False)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', no_network)
    refused(f'{tmp_path}.* is absent.*--vocab PATH', Tokenizer.clip)


def test_ids_and_words_by_hand():
    """oracle: pencil: rank 1 'lo w</w>' ends low, rank 2 'lo w' starts the others; cut rows keep their end."""
    assert LOW.encode('low lower lowest') == [513, 514, 515, 518]       # 512 + the line of each merge
    assert LOW.words('Low  LOWER lowest') == [('low', 1), ('lower', 2), ('lowest', 1)]
    assert LOW.encode('!l')[0] == 256                   # '!' is byte symbol 0, and 256 + 0 where it closes a word
    assert LOW.decode(LOW('low lower lowest')[0]) == 'low lower lowest'
    ids = LOW(['low ' * 20, 'low', ''])
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[519, *[513] * 6, 520], [519, 513, 520, *[0] * 5], [519, 520, *[0] * 6]]
    text = 'x²+Ⅷ①_é\'S “ﬁn” ＡＢ&amp;lt;\x07\ud800'
    assert Tokenizer.split(text) == "x ² + ⅷ ① _ é 's \" fin \" ab < \ufffd".split()


def test_words_of_all_characters():
    """oracle: unicodedata's categories: between a and #, L joins the a, N stays alone, others join #."""
    for code in range(sys.maxunicode + 1):
        sign = chr(code)
        plain = data.plain(sign)
        if plain.strip() != sign or data.clean(f'a{sign}#').replace(' ', '') != f'a{sign}#':
            continue                                                    # it is rewritten, or composed with the a
        category = unicodedata.category(sign)[0]
        expected = {'L': [f'a{sign}', '#'], 'N': ['a', sign, '#']}.get(category, ['a', f'{sign}#'.strip()])
        assert data.WORD.findall(f'a{plain}#') == expected, hex(code)


def test_learn_equals_naive_recounting():
    """oracle: the same rule on strings: symbols between blanks, pairs found by looking, of equals the first one met."""
    assert data.fuse(list('aaabab'), 'a', 'a') == ['aa', 'a', 'b', 'a', 'b']
    assert data.fuse(list('aaabab'), 'a', 'b') == ['a', 'a', 'ab', 'ab']
    texts = ['low low lower', 'newest newest low', 'aaaa aaa']
    # low 3, newest 2, lower, aaaa, aaa: 'l o' 4 times, then 'lo w</w>' 3, then 'aa' of aaaa and aaa 3, and so on.
    assert Tokenizer.learn(texts, 517).merges == ['l o', 'lo w</w>', 'a a']
    rng = random.Random(0)
    for letters in 'ab', 'abcé', 'etaoinshr':
        words = [''.join(rng.choices(letters, k=rng.randint(1, 6))) for _ in range(300)]
        learned = Tokenizer.learn([' '.join(words)], 560)
        lines = [' '.join(data.symbols_of(word)) for word, _ in Counter(words).most_common()]
        times = [count for _, count in Counter(words).most_common()]
        for merge in learned.merges:
            seen = Counter()
            for line, count in zip(lines, times):
                symbols = line.split()
                for k in range(len(symbols) - 1):
                    seen[f'{symbols[k]} {symbols[k + 1]}'] += count
            assert seen.most_common(1)[0][0] == merge
            for k, line in enumerate(lines):
                lines[k] = f' {line} '.replace(f' {merge} ', f" {merge.replace(' ', '')} ").strip()
                lines[k] = f' {lines[k]} '.replace(f' {merge} ', f" {merge.replace(' ', '')} ").strip()
        assert learned.decode(learned.encode(' '.join(words))) == ' '.join(words)


# --- Captions --------------------------------------------------------------------------------------------------------

def test_captions_of_every_format():
    """oracle: pools written by hand, strings and lists alike; the keys of each --caption-pool."""
    text = 'A 3.5 m boat. Two men\nA lake</s>'
    listed = ['A 3.5 m boat', 'Two men.', 'A lake']
    split = ['A 3.5 m boat', 'Two men', 'A lake']
    pool = data.caption_pool
    for value in text, listed:
        assert data.sentences(value) == split
        assert pool({'raw_caption': 'boat', 'longSV_captions': value, 'caption': 'x'}) == ['boat', *split]
    assert pool({'original_caption': "St. Mary's Church. ", 'caption': 'One. Two.'}) == [
        "St. Mary's Church.", 'One', 'Two']                             # PixelProse: the first is kept whole
    assert pool({'captions': ['one dog', 'two'], 'caption': 'no'}) == ['one dog', 'two']
    assert pool({'caption': 'one dog', 'txt': 'no'}) == ['one dog']
    assert pool({'caption': None, 'txt': 'one dog'}) == ['one dog']
    assert pool({'alt': 'one dog'}) == []
    assert pool({'alt': 'one dog'}, ['alt']) == ['one dog']
    assert pool({'caption': list('one dog')}) == []                     # letters are no sentences
    assert pool({'captions': [None, 7, '']}) == []
    record = {'raw_caption': 'rr', 'shortIB_captions': ['ab'], 'longIB_captions': ['cd', 'ef'], 'longSV_captions': 'gh'}
    expected = {'raw': ['rr'], 'short': ['ab'], 'long': ['cd', 'ef', 'gh'], 'all': ['rr', 'ab', 'cd', 'ef', 'gh']}
    for name, keys in data.POOLS.items():
        assert pool(record, keys and keys.split(',')) == expected[name]


def test_text_crops_come_in_every_order():
    """oracle: the rule itself: 1 to 5 distinct sentences a global, distinct locals; every order of a small pool."""
    pool = [f's{i}' for i in range(9)]
    lengths = Counter()
    for seed in range(300):
        *globals_, a, b, c, d, e, f = data.text_crops(pool, random.Random(seed), 2, 6)
        for crop in globals_:
            parts = crop.split('. ')
            lengths[len(parts)] += 1
            assert len(set(parts)) == len(parts) and set(parts) <= set(pool)
        assert len({a, b, c, d, e, f}) == 6
    assert sorted(lengths) == [1, 2, 3, 4, 5] and min(lengths.values()) > 80            # uniform: 120 each
    orders = {tuple(data.text_crops(['a', 'b', 'c'], random.Random(seed), 0, 3)) for seed in range(200)}
    assert len(orders) == 6
    *whole, rest = data.text_crops(['a', 'b'], random.Random(0), 0, 5)
    assert whole == ['a', 'b', 'a', 'b'] and rest in 'ab'               # whole repeats, then a random rest


# --- Shards ----------------------------------------------------------------------------------------------------------

def test_patterns_and_their_lines(tmp_path, capsys):
    """oracle: the files that were written, and which of them a pattern names."""
    for name in '00008', '00009', '00011', 'a[1]':
        put(tmp_path / f'{name}.tar')

    def found(pattern):
        paths = data.find_shards(pattern.replace('DIR', str(tmp_path)), quiet=False)
        return ' '.join(Path(path).stem for path in paths), capsys.readouterr().err

    assert found('DIR') == ('00008 00009 00011 a[1]', '')
    assert found('DIR/0*.tar') == ('00008 00009 00011', '')
    assert found('DIR/a[1].tar') == ('a[1]', '')
    assert found('DIR/0000{8..9}.tar::DIR/00011.tar') == ('00008 00009 00011', '')
    names, line = found('DIR/{00008..00012}.tar')
    assert names == '00008 00009 00011' and '2 of 5 shards of the pattern are missing' in line
    names, line = found('DIR/{00008..00009}.tar::DIR')
    assert names == '00008 00009 00011 a[1]' and '2 shards are named twice' in line
    (tmp_path / 'empty').mkdir()
    for pattern in 'absent', 'empty', '{5..4}.tar', 'x{7..8}.tar':
        refused('does not exist or holds no .tar file', data.find_shards, tmp_path / pattern)


def test_tars_of_every_format(tmp_path):
    """oracle: the pairs that were written, in any order of members; tarfile's own bytes. Then the same by an index."""
    jpg = encoded(Image.new('RGB', (40, 30)), 'JPEG')
    long = 'folder' * 15 + '/' + 'name' * 15                            # over 100 characters: GNU and PAX add a header
    for n, form in enumerate(FORMATS):
        path = write_tar(tmp_path / f'{n}.tar', [
            ('x/b.json', {'caption': f'json {n}'}), ('x/a.txt', f'text {n}'), ('x/b.JPG', jpg), ('x/b.png', jpg),
            ('x/a.jpg', jpg), (f'{long}.png', jpg), (f'{long}.txt', f'long {n}'), ('x/alone.jpg', jpg)], form)
    shards = Shards(tmp_path)
    expected = [[f'{kind} {n}'] for n in range(3) for kind in ('json', 'text', 'long')]
    assert [shards.pool(i) for i in range(9)] == expected
    assert all(shards.image(i) == jpg for i in range(9))
    assert shards.name(1).endswith('0.tar:x/a.jpg') and shards.mask(0) is None
    table = shards.pairs.copy()
    index = shards.save(tmp_path)
    for other in Shards(tmp_path, index=index), Shards(tmp_path, cache=tmp_path), pickle.loads(pickle.dumps(shards)):
        assert isinstance(other.pairs, np.memmap)                       # goes to a worker by name, not by value
        assert np.array_equal(other.pairs, table) and other.pool(4) == ['text 1']
        assert other.fingerprint == shards.fingerprint
    shutil.copytree(tmp_path, tmp_path / 'moved')
    assert Shards(tmp_path / 'moved').fingerprint == shards.fingerprint
    dog_tar(path, 5)
    changed = Shards(tmp_path, cache=tmp_path)                          # not from the index that is out of date
    assert len(changed) == 11 and changed.pool(6) == ['dog 0'] and changed.fingerprint != shards.fingerprint


def test_many_shards_are_read_by_processes(tmp_path, capfd):
    """oracle: the pairs that were written. Threads of torch are at work meanwhile: forks must not wait for their locks."""
    for n in range(20):
        dog_tar(tmp_path / f'{n:02d}.tar', 2)
    put(tmp_path / '20.tar', 'no tar')
    stop = threading.Event()

    def multiply():
        while not stop.is_set():
            torch.ones(64, 64) @ torch.ones(64, 64)

    thread = threading.Thread(target=multiply)
    thread.start()
    shards = Shards(tmp_path)
    stop.set()
    thread.join()
    assert shards.pairs['shard'].tolist() == [i // 2 for i in range(40)]
    assert 'WARNING    ' in capfd.readouterr().err and len(readable(shards)) == 2
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def test_odd_members_are_read_or_refused(tmp_path):
    """oracle: what each is by construction: names, images of one colour, bad captions, cut and huge files."""
    red = Image.new('RGB', (40, 20), 'red')
    gray = Image.new('L', (40, 20), 128)
    turned = Image.Exif()
    turned[0x112] = 6                                                   # the camera was held upright
    cmyk = encoded(Image.new('CMYK', (40, 20), (0, 200, 100, 30)), 'JPEG')
    deep = encoded(Image.fromarray(np.full((20, 40), 128 * 257, np.uint16)))
    good = {'cmyk.jpg': cmyk, 'gray.png': encoded(gray), 'gray2.jpg': encoded(gray, 'JPEG'), 'gray16.png': deep,
            'palette.png': encoded(red.convert('P')), 'turned.jpeg': encoded(red, 'JPEG', exif=turned),
            'alpha.png': encoded(Image.new('RGBA', (40, 20), (0, 200, 100, 30))), 'w.webp': encoded(red, 'WEBP'),
            'turned a.webp': encoded(red, 'WEBP', exif=turned), 'turned b.png': encoded(red, exif=turned)}
    for name in 'UPPER.JPG', 'ünï/cödé.jpg', f"{'long' * 40}/{'name' * 30}.jpg", 'deep/er/dot.jpg':
        good[name] = encoded(red, 'JPEG')
    huge = bytearray(encoded(red))
    huge[16:24] = (60000).to_bytes(4, 'big') * 2                        # says it is 60,000 x 60,000
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, 'big')
    bad = {'bomb.png': bytes(huge), 'text.jpg': b'GIF8'}
    for kind in 'jpeg', 'png', 'webp':
        bad[f'cut {kind}.{kind}'] = encoded(noise(64, 64), kind)[:400]
    records = {'null': {'caption': None}, 'digit': {'caption': 5}, 'broken': '{"caption": "a d', 'string': '"dog"',
               'list': [None, 3, ' ']}
    members = [('alone.jpg', good['w.webp']), ('alone.json', ''), ('empty.jpg', b''), ('empty.txt', 'no')]
    for name, value in (good | bad).items():
        stem = name.rpartition('.')[0]
        members += [(name, value), (f'{stem}.json', {'caption': f'the {stem}'})]
    for name, value in records.items():
        members += [(f'{name}.json', value), (f'{name}.jpg', good['UPPER.JPG'])]
    colours = {'cmyk': (225, 49, 137), 'gray': (128, 128, 128), 'alpha': (0, 200, 100)}         # of all others: red
    for form in FORMATS[1:]:                                            # USTAR has no place for the long name
        shards = Shards(write_tar(tmp_path / 'a.tar', members, form))
        assert len(shards) == len(good) + len(bad) + len(records)
        served = readable(shards)
        assert set(served) >= {f"the {name.rpartition('.')[0]}" for name in good}
        assert not [name for name in served if 'cut' in name or 'bomb' in name or 'text' in name]
        for name, pixels in served.items():
            if name.startswith('the '):
                kind = name.removeprefix('the ')[:5].rstrip('126')
                assert pixels.shape == ((3, 40, 20) if kind == 'turne' else (3, 20, 40))
                expected = torch.tensor(colours.get(kind, (255, 0, 0)))
                assert (pixels[:, 10, 10] - expected).abs().max() <= 6, name
    for name, value in good.items():
        image = data.read_image(put(tmp_path / name, value)).convert('RGB')
        assert V.pil_to_tensor(image).equal(data.decode(value)), name
    for value in bad.values():
        refused('a.tar:x is no image that can be read', data.read_image, value, 'a.tar:x')
    refused('absent.png', data.read_image, 'absent.png')


def test_damaged_shards_lose_only_what_is_damaged(tmp_path, capsys):
    """oracle: which bytes were damaged, 120 tars from a seed. Every pair of untouched bytes is there, image with
    caption; behind lost bytes, where no header is at a multiple of 512, none has to be."""
    rng = random.Random(0)
    for trial in range(120):
        path = dog_tar(tmp_path / 'a.tar', 10)
        if trial % 3 < 2:
            with tarfile.open(path) as tar:
                members = [(f"{'long/' * 25}{m.name}", tar.extractfile(m).read()) for m in tar]
            write_tar(path, members, FORMATS[1 + trial % 3])
        with tarfile.open(path) as tar:
            spans = {Path(m.name).name: (m.offset, m.offset_data + m.size) for m in tar}
        raw = bytearray(path.read_bytes())
        at = rng.randrange(spans['9.json'][1])
        block = at // 512 * 512
        first, last, value = [
            (at, at + 1, bytes([raw[at] ^ 1 << rng.randrange(8)])),     # one flipped bit
            (at, len(raw), b''),                                        # the rest cut off
            (block, block + 512, bytes(512)),                           # a block of zeros
            (at, at + rng.randrange(1, 3000), b'')][trial // 3 % 4]     # a part lost
        raw[first:last] = value
        regular = len(value) == last - first
        put(path, bytes(raw))
        found = {}
        with contextlib.suppress(ValueError):                           # nothing is left
            found = readable(Shards(path))
        for i in range(10):
            (a, b), (c, d) = spans[f'{i}.png'], spans[f'{i}.json']
            if d <= first or regular and a >= last:
                assert found[f'dog {i}'][:, 0, 0].tolist() == [20 * i, 255 - 20 * i, 7 * i], trial
    capsys.readouterr()
    raw = bytearray(dog_tar(path, 5).read_bytes())
    assert len(Shards(path)) == 5 and 'damaged' not in capsys.readouterr().err
    with tarfile.open(path) as tar:
        header = tar.getmembers()[4].offset_data - 512
    cut = raw[:header + 600]
    flipped = raw[:header] + b'?' + raw[header + 1:]
    negative = raw[:]
    negative[header + 124:header + 136] = b'-0000001000\0'              # a right checksum, a size below 0
    total = sum(raw[header:header + 512]) - sum(raw[header + 124:header + 136]) - sum(raw[header + 148:header + 156])
    total += sum(b'-0000001000\0') + 8 * 32
    negative[header + 148:header + 156] = b'%06o\0 ' % total
    for damaged, left in (cut, 2), (flipped, 4), (negative, 4):
        put(path, bytes(damaged))
        assert len(Shards(path)) == left
        assert capsys.readouterr().err.count('a.tar is damaged') == 1


def test_files_are_replaced_whole_or_not_at_all(tmp_path):
    """oracle: the file as it was, where writing fails; equal bytes of equal members."""
    path = put(tmp_path / 'a.tar', 'old')

    def members():
        yield 'a.txt', b'new'
        raise OSError('disk full')

    with pytest.raises(OSError, match='disk full'):
        data.write_shard(path, members())
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]
    data.write_shard(tmp_path / 'new/b.tar', [])
    assert not list(tmp_path.glob('new/*'))                             # a shard of nothing is none
    for name in 'a.tar', 'new/b.tar':
        data.write_shard(tmp_path / name, [('a.txt', b'new'), ('a.jpg', b'x')])
    assert path.read_bytes() == (tmp_path / 'new/b.tar').read_bytes() != b'old'


# --- Order and batches -----------------------------------------------------------------------------------------------

def test_order_is_a_pure_function():
    """oracle: numpy's permutation of (seed, epoch), which ranks and restarts only cut."""
    steps = list(Order(23, 4, 0, 12, seed=5))
    for step, rows in enumerate(steps):
        epoch, k = divmod(step, 5)                                      # 23 // 4 whole batches an epoch
        expected = np.random.default_rng((5, epoch)).permutation(23)[4 * k:4 * k + 4]
        assert rows == [(epoch, 4 * k + i, index) for i, index in enumerate(expected)]
    assert list(Order(23, 4, 7, 12, seed=5)) == steps[7:]
    halves = zip(Order(23, 4, 0, 12, 5, 0, 2), Order(23, 4, 0, 12, 5, 1, 2))
    assert [a + b for a, b in halves] == steps
    refused('--batch 24 is larger than the set of 23 pairs', Order, 23, 24, 0, 1)
    refused('--batch 4 cannot be split .* multiple of 3', Order, 23, 4, 0, 1, world=3)


def test_batches_are_equal_by_workers_ranks_and_parts(tmp_path):
    """oracle: one process without workers, whole batches; the lengths of its captions by hand."""
    views = Views(Shards(dog_tar(tmp_path / 'a.tar', 12)), LOW, MICRO, 3, 4, (2, 2, 2, 3))

    def served(rank=0, world=1, workers=0):
        return list(data.loader(views, Order(12, 4, 2, 5, 3, rank, world), workers))

    alone = served()
    pixels = [batch.views() for batch in alone]
    assert [tuple(x.shape) for x in pixels[0]] == [(4, 3, 32, 32)] * 2 + [(4, 3, 16, 16)] * 2
    assert len({batch.key for batch in alone}) == 3 and alone[0].colours.shape == (4, 4, 7)
    for batches in served(workers=2), [batch.split(2) for batch in alone], zip(served(0, 2), served(1, 2)):
        for batch, want, images in zip(batches, alone, pixels, strict=True):
            parts = [batch] if isinstance(batch, data.Batch) else batch
            for k, image in enumerate(images):
                assert_close(torch.cat([part.views()[k] for part in parts]), image, rtol=0, atol=1e-6)
            for k, text in enumerate(want.texts):
                length = max(part.texts[k].shape[1] for part in parts)      # ranks cut to their own longest
                rows = torch.cat([torch.nn.functional.pad(part.texts[k], (0, length - part.texts[k].shape[1]))
                                  for part in parts])
                assert rows.equal(text[:, :length]) and not text[:, length:].any()


@pytest.mark.parametrize('multiple, cuts', [(1, [12, 9, 4, 4]), (8, [12, 12, 8, 8])])
def test_captions_are_cut(multiple, cuts):
    """oracle: by hand: of 9 and 7 tokens in the globals, 4 and 2 in the locals; all ends stay where they were."""
    tokens = torch.zeros(2, 4, 12, dtype=torch.int64)
    for row, lengths in zip(tokens, [(9, 3, 2, 4), (5, 7, 2, 3)]):
        row[torch.arange(4), torch.tensor(lengths) - 1] = 49
    samples = [([torch.zeros(3, 4, 4)], torch.zeros(1, 7), row, 'key', bad) for bad, row in enumerate(tokens)]
    batch = data.collate(samples, multiple)
    assert [text.shape[1] for text in batch.texts] == cuts
    assert (batch.longest, batch.bad) == (cuts[1], 1)
    for k, text in enumerate(batch.texts):
        assert text.equal(tokens[:, k, :cuts[k]])
    alone = data.collate([([torch.zeros(3, 4, 4)], torch.zeros(1, 7), tokens[0][:1], 'key', 0)], multiple)
    assert [text.shape[1] for text in alone.texts] == [12] and alone.longest == cuts[1]


def test_bad_pairs_are_replaced_and_counted(tmp_path, capsys):
    """oracle: the pairs broken on purpose: none is served, each is counted and named once, none is twice in a batch."""
    shards = Shards(dog_tar(tmp_path / 'a.tar', 12, no_image=[5], no_text=[7]))
    views = Views(shards, LOW, MICRO, 3, 4, (2, 2, 2, 3))
    texts = []
    for epoch in range(2):
        batches = list(data.loader(views, Order(12, 4, 3 * epoch, 3 * epoch + 3, seed=3), 0))
        assert sum(batch.bad for batch in batches) >= 2
        for batch in batches:
            rows = [LOW.decode(row).partition(' .')[0].replace(' ', '') for row in batch.texts[0]]
            assert len(set(rows)) == 4
            texts += rows
    assert set(texts) == {f'dog{i}' for i in range(12) if i not in (5, 7)}
    lines = capsys.readouterr().err
    assert lines.count('a.tar:5.png') == lines.count('a.tar:7.png') == 1
    shards = Shards(dog_tar(tmp_path / 'a.tar', 4, no_image=range(3)))
    for size in 2, 4:                                                   # also where one batch is the whole set
        views = Views(shards, LOW, MICRO, 3, size, (2, 0, 1, 0))
        (batch,) = data.loader(views, Order(4, size, 0, 1, seed=3), 0)
        assert batch.bad and {LOW.decode(row)[-1] for row in batch.texts[0]} == {'3'}           # the only one
    data.sample_sheet(views, tmp_path / 'seen.png')
    assert Image.open(tmp_path / 'seen.png').height > 128


def test_captions_may_follow_their_crops(tmp_path):
    """oracle: the boxes that were drawn: choose_sentences names its box, so caption k must name box k."""
    image = encoded(noise(160, 120))
    shards = Shards(write_tar(tmp_path / 'a.tar', [('a.png', image), ('a.json', {'caption': 'dog', 'objects': 7})]))

    def box_name(pool, record, box):
        assert pool == ['dog'] and record['objects'] == 7
        return [str(box)]

    for counts in (2, 3, 2, 3), (2, 3, 2, 1), (2, 0, 1, 0):
        views = Views(shards, LOW, MICRO, 0, 1, counts, 'crops', box_name)
        for epoch in range(5):
            crops, colours, captions = views.views(epoch, 0)
            assert len(captions) == sum(counts[2:]) and set(colours) == {Colours()}
            for crop, caption in zip(crops, captions):
                y, x, h, w = eval(caption.partition('. ')[0])
                want = V.resized_crop(data.decode(image), y, x, h, w, crop.shape[1:], data.BICUBIC)
                assert (crop.int() - want.int()).abs().max() <= 1       # nor is it flipped


# --- Image crops and colours -----------------------------------------------------------------------------------------

def test_image_crops_are_the_pixels_of_their_boxes():
    """oracle: torchvision's crop of each box, flipped or not. Of a large JPEG, decoded smaller, that of the whole one."""
    rng = random.Random(0)
    flips = 0
    for image, kind, tolerance in (noise(192, 144), 'PNG', 1), (noise(2000, 1400), 'JPEG', 12):
        file = encoded(image, kind)
        whole = data.decode(file)
        for _ in range(3 if kind == 'JPEG' else 60):
            kinds = data.view_kinds(MICRO)
            for view, box, k in zip(*data.image_crops(file, kinds, rng), kinds, strict=True):
                want = V.resized_crop(whole, *box, [k.size] * 2, data.BICUBIC).int()
                distance = (view - want).abs().max()
                mirrored = (view.flip(-1) - want).abs().max()
                assert min(distance, mirrored) <= tolerance
                flips += bool(mirrored < distance)
    assert abs(flips - 189 / 2) <= 4 * math.sqrt(189 / 4)


def test_boxes_have_the_statistics_of_torchvision():
    """oracle: 5,000 boxes of RandomResizedCrop: means and spreads of place, sides, area and aspect within 4 errors."""
    rng = random.Random(0)
    torch.manual_seed(0)
    for scale in (0.4, 1.0), (0.05, 0.4):
        crop = v2.RandomResizedCrop(32, scale)
        image = torch.empty(3, 144, 192)
        drawn = [data.random_box(144, 192, scale, rng) for _ in range(5000)]
        theirs = []
        for _ in range(5000):
            place = crop.make_params([image])
            theirs.append([place[name] for name in ('top', 'left', 'height', 'width')])
        figures = []
        for boxes in drawn, theirs:
            boxes = torch.tensor(boxes).float()
            h, w = boxes[:, 2], boxes[:, 3]
            figures.append(torch.stack([*boxes.T, h * w, (w / h).log()], dim=1))
        centre = torch.cat(figures).mean(dim=0)
        for power in 1, 2:
            a, b = [(part - centre) ** power for part in figures]
            error = ((a.var(dim=0) + b.var(dim=0)) / 5000).sqrt()
            assert ((a.mean(dim=0) - b.mean(dim=0)).abs() < 4 * error).all()
    assert data.random_box(10, 400, (1, 1), rng) == (0, 0, 10, 400)


def test_each_colour_operation_equals_torchvision():
    """oracle: torchvision's own function, image by image; an image of neutral strength stays as it is, bit by bit."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 20, 24), dtype=torch.uint8)
    images[0] = 77
    images[1, :, :10] = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)
    blurred = {'kernel_size': 13}
    theirs = {'brightness': V.adjust_brightness, 'contrast': V.adjust_contrast, 'saturation': V.adjust_saturation,
              'hue': V.adjust_hue, 'blur': lambda x, sigma: V.gaussian_blur(x, sigma=sigma, **blurred),
              'gray': lambda x, _: V.rgb_to_grayscale(x, 3), 'solarize': V.solarize}
    for k, (name, function) in enumerate(theirs.items()):
        strengths = torch.linspace(-0.1, 0.1, 12) if name == 'hue' else torch.linspace(0.1, 1.9, 12)
        if name == 'gray':
            strengths = torch.ones(12)
        if name == 'solarize':
            strengths = torch.full((12,), 127.5 / 255)
        neutral = Colours()._asdict()[name]
        strengths[3::3] = neutral
        colours = torch.tensor([list(Colours())] * 12)
        colours[:, Colours._fields.index(name)] = strengths
        found = data.recolour(images, colours, data.JITTERS)
        for image, strength, x in zip(images, strengths.tolist(), found):
            plain = image.float() / 255
            if strength == neutral:
                assert x.equal(plain)
            else:
                assert_close(x, function(plain, strength), rtol=0, atol=2e-5)
    x = torch.rand(1, 3, 48, 64)
    for sigma in 0.6, 1.0, 2.0:         # the released blur is Pillow's, three boxes, 11 % away; a wrong sigma is 20 %
        pillow = V.to_image(V.to_pil_image(x[0]).filter(ImageFilter.GaussianBlur(sigma))) / 255
        ours = data.blur(x, torch.full((1, 1, 1, 1), sigma))[0]
        close(ours[:, 6:-6, 6:-6] - 0.5, pillow[:, 6:-6, 6:-6] - 0.5, 0.13)


def test_colours_follow_one_another_in_the_order_drawn():
    """oracle: the operations one by one, of which each was compared above."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 20, 24), dtype=torch.uint8)
    rng = random.Random(0)
    kind = data.Kind(20, blur=0.5, solarize=0.5)
    colours = torch.tensor([data.draw_colours(kind, rng) for _ in images])
    for order in (data.hue, data.contrast, data.brightness, data.saturation), data.JITTERS:
        found = data.recolour(images, colours, order)
        for image, numbers, x in zip(images, colours, found):
            want = image[None].float() / 255
            for operation in [*order, data.gray, data.blur, data.solarize]:
                strength = Colours(*numbers)._asdict()[operation.__name__]
                if strength != Colours()._asdict()[operation.__name__]:
                    want = operation(want, strength.view(1, 1, 1, 1))
            assert_close(x, want[0], rtol=0, atol=1e-6)
    batch = data.Batch([images], colours[:, None], 'key', [], 1, 0)
    order = random.Random('key 0').sample(data.JITTERS, 4)
    want = (data.recolour(images, colours, order) - torch.tensor(data.MEAN).view(3, 1, 1))
    assert_close(batch.views()[0], want / torch.tensor(data.STD).view(3, 1, 1), rtol=0, atol=1e-5)
    orders = Counter(tuple(random.Random(f'{step} 0').sample('bcsh', 4)) for step in range(2400))
    assert len(orders) == 24 and max(orders.values()) < 150                                     # uniform: 100 each


def test_colours_come_as_often_and_as_strong_as_released():
    """oracle: the released probabilities and ranges, all uniform, over 5,000 draws for each kind of view."""
    rng = random.Random(1)
    kinds = data.view_kinds(MICRO)
    assert [tuple(kind) for kind in kinds] == [
        (32, 1.0, (0.4, 1.0), 0.0), (32, 0.1, (0.4, 1.0), 0.2), (16, 0.5, (0.05, 0.4), 0.0)]
    for kind in kinds:
        drawn = np.array([data.draw_colours(kind, rng) for _ in range(5000)]).T
        expected = {'brightness': (0.8, 0.6, 1.4), 'contrast': (0.8, 0.6, 1.4), 'saturation': (0.8, 0.8, 1.2),
                    'hue': (0.8, -0.1, 0.1), 'gray': (0.2, 1, 1), 'blur': (kind.blur, 0.1, 2.0),
                    'solarize': (kind.solarize, 0.5, 0.5)}
        for values, (name, (share, low, high)) in zip(drawn, expected.items(), strict=True):
            changed = values[values != Colours()._asdict()[name]]
            assert abs(len(changed) / 5000 - share) <= 4 * math.sqrt(share * (1 - share) / 5000)
            if len(changed):
                assert low <= changed.min() and changed.max() <= high
                assert abs(changed.mean() - (low + high) / 2) <= 0.05 * (high - low)
                assert abs(changed.std() - (high - low) / math.sqrt(12)) <= 0.05 * (high - low)
