"""Bytes from strangers: send mutated images, records and tars through all that training and evaluation do with them.

    python -m tests.fuzz --seconds 5
    python -m tests.fuzz --count 100000

Only Refused may be raised (or Unreadable, which is one), and no mutation may take more than LIMIT_SECONDS or LIMIT_GB.
Anything else is printed with the number of its mutation; --first NUMBER --count 1 repeats it, with the same --only and
--seed.
"""
import argparse
import json
import os
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from contextlib import redirect_stderr, suppress
from pathlib import Path

import numpy as np
from PIL import Image

from data import Crops, Shards, Tokenizer
from eval import preprocessing
from plumbing.errors import Refused
from plumbing.images import read_image
from plumbing.shards import WIDTH
from tests.helpers import MICRO, encoded, pairs_tar

# What this process may take for one mutation. Pillow accepts images of up to 179 million pixels, which are 0.7 GB. The
# image, its copies in RGB and turned, and the tensor took 2.1 GB (3.4 GB after 70,000 other mutations) and 6 seconds.
LIMIT_SECONDS = 15
LIMIT_GB = 4
RECORD = json.dumps({'caption': 'A boat. Two men', 'captions': ['a dog', 'a cat'], 'raw_caption': None, 'file': 'ä.jpg',
                     'shortIB_captions': ['A lake.', 'e.g. a hut'], 'width': 40, 'similarity': 0.3}).encode()

# --- 1. What is mutated ----------------------------------------------------------------------------------------------

def png_chunk(kind, data):
    return struct.pack('>L', len(data)) + kind + data + struct.pack('>L', zlib.crc32(kind + data))


def interlaced_png(side):
    """A grey square in the seven passes of Adam7, which Pillow can read but not write."""
    rows = b''
    for x, y, dx, dy in (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2):
        width = len(range(x, side, dx))
        for _ in range(y, side, dy):
            rows += bytes(1 + width)                    # no filter, black
    header = struct.pack('>LLBBBBB', side, side, 8, 0, 0, 0, 1)
    chunks = (b'IHDR', header), (b'IDAT', zlib.compress(rows)), (b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + b''.join(png_chunk(*chunk) for chunk in chunks)


def originals():
    """{kind: bytes}: images of every kind that a crawl finds, a record, and tars of three pairs."""
    image = Image.effect_mandelbrot((60, 40), (-2, -1, 1, 1), 40).convert('RGB')
    exif = Image.Exif()
    # Maker, Orientation, XResolution, Software, the time
    exif.update({0x10f: 'maker', 0x112: 6, 0x11a: 72.0, 0x131: 'software', 0x132: '2024:01:01 00:00:00'})
    palette = image.quantize(16)
    kinds = {
        'jpeg': encoded(image, 'JPEG'),
        'jpeg, progressive': encoded(image, 'JPEG', progressive=True),
        'jpeg, CMYK': encoded(image.convert('CMYK'), 'JPEG'),
        'jpeg, grey': encoded(image.convert('L'), 'JPEG'),
        'jpeg, EXIF': encoded(image, 'JPEG', exif=exif),
        'jpeg, large': encoded(image.resize((600, 400)), 'JPEG', exif=exif),
        'png': encoded(image, exif=exif),
        'png, palette': encoded(palette, transparency=bytes(range(16))),
        'png, 16 bits': encoded(Image.fromarray(np.arange(0, 60_000, 50, np.uint16).reshape(30, 40))),
        'png, interlaced': interlaced_png(20),
        'webp': encoded(image, 'WEBP', exif=exif),
        'webp, lossless': encoded(image, 'WEBP', lossless=True),
        'gif': encoded(palette, 'GIF', save_all=True, append_images=[palette]),
        'mpo': encoded(image, 'MPO', save_all=True, append_images=[image], exif=exif),
        'tiff': encoded(image, 'TIFF', exif=exif),
        'json': RECORD}
    with tempfile.TemporaryDirectory() as folder:
        for form, name in enumerate(['ustar', 'gnu', 'pax']):
            path = pairs_tar(Path(folder, 'a.tar'), [['dog']] * 3, [kinds['png']] * 3, form)
            kinds[f'tar, {name}'] = path.read_bytes()
    return kinds


# --- 2. How ----------------------------------------------------------------------------------------------------------

def mutate(data, rng):
    """Make one to eight changes, most of them in the first bytes, where the headers are."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 8])):
        reach = rng.choice([64, 512, len(data) + 1])
        start = rng.randrange(min(reach, len(data) + 1))
        stop = start + rng.choice([1, 1, 2, 4, rng.randint(1, 100)])
        change = rng.randrange(8)
        if change == 0:
            data[start:stop] = rng.randbytes(stop - start)
        elif change == 1:                               # numbers that are much too large or too small
            data[start:stop] = rng.choice([b'\xff', b'\x00', b'\x7f', b'\x80']) * (stop - start)
        elif change == 7:                               # a number that may stand for a type
            data[start:start + 1] = [rng.randrange(16)]
        elif change == 2:
            data[start:start + 1] = [data[start] ^ 1 << rng.randrange(8)] if start < len(data) else b''
        elif change == 3:
            del data[start:stop]
        elif change == 4:
            data[start:start] = data[start:stop] * rng.choice([1, 3, 1000])
        elif change == 5:
            data[start:stop] = data[rng.randrange(len(data) + 1):][:stop - start]
        elif rng.random() < 0.3:
            del data[start:]
    return bytes(data)


def mend_png(data):
    """A mutated PNG with its checksums made right, because else its chunks would not be read."""
    found = data[:8]
    data = data[8:]
    while len(data) >= 12:
        length = min(int.from_bytes(data[:4], 'big'), len(data) - 12)
        found += png_chunk(data[4:8], data[8:8 + length])
        data = data[12 + length:]
    return found + data


def mend_tar(data):
    """A mutated tar with its checksums made right, because else its headers would not be read."""
    found = b''
    for start in range(0, len(data), 512):
        block = data[start:start + 512]
        if block[257:262] == b'ustar':
            total = sum(block[:148] + b' ' * 8 + block[156:])
            block = block[:148] + b'%06o\0 ' % total + block[156:]
        found += block
    return found


def mutated(kind, data, rng):
    data = mutate(data, rng)
    if kind == 'json' and rng.random() < 0.1:           # what a parser may trip over
        return rng.choice([b'[', b'{"a":', b'9', b'"\\ud800', b' ']) * rng.choice([5000, 100_000])
    if kind.startswith('png') and rng.random() < 0.8:
        return mend_png(data)
    if kind.startswith('tar') and rng.random() < 0.8:
        return mend_tar(data)
    return data


# --- 3. Where it goes ------------------------------------------------------------------------------------------------

class OnePair(Shards):
    """A pair without a tar."""

    def __init__(self, image, record):
        self.content = {'jpg': image, 'json': record}
        self.caption_keys = None
        self.stored = np.ones(1 + WIDTH)                # every member has a size

    def members(self, i, *kinds):
        return [self.content.get(kind, b'') for kind in kinds]


def use(shards, i):
    """Use a pair as training does, then as evaluation does. Either may refuse it without the other."""
    tokenizer = Tokenizer([], MICRO.context_length)
    with suppress(Refused):
        tokenizer(Crops(shards, tokenizer, MICRO, seed=0).sample(0, i).captions)
    with suppress(Refused):
        shards.record(i)
        preprocessing(MICRO.image_size)(read_image(shards.image(i)))


def use_tar(path):
    with suppress(Refused):
        shards = Shards(path)
        for i in range(min(len(shards), 4)):
            use(shards, i)
            shards.name(i)


def gigabytes():
    """The most memory that this process has taken so far."""
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def try_one(number, kinds, seed, folder):
    """Mutation `number` -> its kind, and what went wrong, '' if nothing did."""
    rng = random.Random(f'{seed} {number}')
    kind = list(kinds)[number % len(kinds)]
    data = mutated(kind, kinds[kind], rng)
    memory = gigabytes()
    begun = time.process_time()
    try:
        if kind.startswith('tar'):
            path = Path(folder, 'a.tar')
            path.write_bytes(data)
            use_tar(path)
        elif kind == 'json':
            use(OnePair(kinds['png'], data), 0)
        else:
            use(OnePair(data, RECORD), 0)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return kind, f'{type(error).__name__}: {str(error)[:100]}, {place.filename}:{place.lineno}'
    if time.process_time() - begun > LIMIT_SECONDS:
        return kind, f'it took {time.process_time() - begun:.0f} seconds'
    if gigabytes() > max(memory, LIMIT_GB):
        return kind, f'it took {gigabytes():.1f} GB'
    return kind, ''


def fuzz(count=None, seconds=None, seed=0, first=0, only=''):
    """Try `count` mutations, or as many as `seconds` allow, of the kinds whose names begin with `only` -> [(number,
    kind, what went wrong)], and how many were tried."""
    kinds = {kind: data for kind, data in originals().items() if kind.startswith(only)}
    found = []
    number = first
    end = time.monotonic() + (seconds or float('inf'))
    with (tempfile.TemporaryDirectory() as folder, open(os.devnull, 'w') as nowhere,
          redirect_stderr(nowhere), warnings.catch_warnings()):     # such files give many warnings
        warnings.simplefilter('ignore')
        while number != first + (count or -1) and time.monotonic() < end:
            kind, wrong = try_one(number, kinds, seed, folder)
            if wrong:
                found.append((number, kind, wrong))
            number += 1
    return found, number - first


def main():
    parser = argparse.ArgumentParser(prog='python -m tests.fuzz', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--count', type=int)
    parser.add_argument('--seconds', type=float)
    parser.add_argument('--seed', default=0)
    parser.add_argument('--first', type=int, default=0, help='the number of the first mutation')
    parser.add_argument('--only', default='', help='only kinds whose names begin like this: jpeg, png, tar, ...')
    args = parser.parse_args()
    if not (args.count or args.seconds):
        args.seconds = 5
    found, tried = fuzz(args.count, args.seconds, args.seed, args.first, args.only)
    for number, kind, wrong in found:
        print(f'{number}  {kind}  {wrong}')
    for wrong, times in Counter(wrong for _, _, wrong in found).most_common():
        print(f'{times} x {wrong}')
    print(f'{tried} mutations, {len(found)} findings, at most {gigabytes():.1f} GB')
    sys.exit(bool(found))


if __name__ == '__main__':
    main()
