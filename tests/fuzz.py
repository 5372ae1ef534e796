"""Bytes from strangers: send mutated images, records and tars through all that training and evaluation do with them.

    python -m tests.fuzz --count 100000

Only Refused may be raised (or Unreadable, which is one), and no mutation may take more than LIMIT_SECONDS. Anything
else is printed with the number of its mutation; --first NUMBER --count 1 repeats it.
"""
import argparse
import io
import json
import random
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from contextlib import redirect_stderr, suppress
from pathlib import Path

import numpy as np
from PIL import Image

from data import Crops, Shards, Tokenizer
from eval import preprocessing
from plumbing.errors import Refused
from plumbing.images import read_image
from tests.helpers import MICRO, encoded, pairs_tar

LIMIT_SECONDS = 15      # an image of 179 million pixels, the most that Pillow accepts, took 6
RECORD = json.dumps({'caption': 'A boat. Two men', 'captions': ['a dog', 'a cat'], 'raw_caption': None, 'file': 'ä.jpg',
                     'shortIB_captions': ['A lake.', 'e.g. a hut'], 'width': 40, 'similarity': 0.3}).encode()


def originals():
    """{kind: bytes}: images of every kind that a crawl finds, a record, and tars of three pairs."""
    image = Image.effect_mandelbrot((60, 40), (-2, -1, 1, 1), 40).convert('RGB')
    exif = Image.Exif()
    exif.update({0x10f: 'maker', 0x112: 6, 0x11a: 72.0})        # 0x112: Orientation
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


def mutate(data, rng):
    """Make one to eight changes, most of them in the first bytes, where the headers are."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 8])):
        reach = rng.choice([64, 512, len(data) + 1])
        start = rng.randrange(min(reach, len(data) + 1))
        size = rng.choice([1, 1, 2, 4, rng.randint(1, 100)])
        piece = data[start:start + size]
        elsewhere = rng.randrange(len(data) + 1)
        data[start:start + size] = rng.choice([
            rng.randbytes(size),
            rng.choice([b'\xff', b'\x00', b'\x7f', b'\x80']) * size,    # much too large or too small
            bytes([rng.randrange(16)]) + piece[1:],             # perhaps a type
            bytes(byte ^ 1 << rng.randrange(8) for byte in piece),
            b'',
            piece * rng.choice([2, 4, 1000]),
            data[elsewhere:elsewhere + size]])
        if rng.random() < 0.04:
            del data[start:]
    return bytes(data)


def mend_png(data):
    """A mutated PNG with its checksums made right, because else its chunks would not be read."""
    found = data[:8]
    data = data[8:]
    while len(data) >= 12:
        length = min(int.from_bytes(data[:4], 'big'), len(data) - 12)
        chunk = data[4:8 + length]                          # its kind, and its bytes
        found += length.to_bytes(4, 'big') + chunk + zlib.crc32(chunk).to_bytes(4, 'big')
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


def use(path):
    """Use the pairs of a tar as training does, then as evaluation does. Either may refuse a pair without the other."""
    tokenizer = Tokenizer([], MICRO.context_length)
    with suppress(Refused):
        shards = Shards(path)
        crops = Crops(shards, tokenizer, MICRO, seed=0)
        for i in range(min(len(shards), 4)):
            shards.name(i)
            with suppress(Refused):
                tokenizer(crops.sample(0, i).captions)
            with suppress(Refused):
                shards.record(i)
                preprocessing(MICRO.image_size)(read_image(shards.image(i)))


def try_one(number, kinds, path):
    """Mutation `number`, written to a tar at `path` -> what went wrong, if anything did."""
    rng = random.Random(number)
    kind = list(kinds)[number % len(kinds)]
    data = mutated(kind, kinds[kind], rng)
    if kind.startswith('tar'):
        path.write_bytes(data)
    else:                               # behind a pair that can be used, because Shards refuses a set without one
        image, record = (kinds['png'], data) if kind == 'json' else (data, RECORD)
        pairs_tar(path, [RECORD, record], [kinds['png'], image])
    begun = time.process_time()
    try:
        use(path)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f'{number}  {kind}  {error!r:.100}, {place.filename}:{place.lineno}'
    if time.process_time() - begun > LIMIT_SECONDS:
        return f'{number}  {kind}  it took more than {LIMIT_SECONDS} seconds'


def fuzz(count, first=0):
    """Try `count` mutations -> what went wrong, a line for each that did."""
    kinds = originals()
    with (tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(),
          redirect_stderr(io.StringIO())):
        warnings.simplefilter('ignore')                 # such files give many
        path = Path(folder, 'a.tar')
        found = [try_one(number, kinds, path) for number in range(first, first + count)]
    return [wrong for wrong in found if wrong]


def main():
    parser = argparse.ArgumentParser(prog='python -m tests.fuzz')
    parser.add_argument('--count', type=int, default=1000, help='how many mutations (default: %(default)s)')
    parser.add_argument('--first', type=int, default=0, help='the number of the first one')
    args = parser.parse_args()
    found = fuzz(args.count, args.first)
    print(*found, f'{args.count} mutations, {len(found)} findings', sep='\n')
    sys.exit(bool(found))


if __name__ == '__main__':
    main()
