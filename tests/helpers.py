"""What several tests use: a model that runs in milliseconds, small shards, and commands run in this process."""
import io
import itertools
import json
import os
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import cosmos
import train
from cosmos import COSMOS
from plumbing.errors import Refused, command

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get('COSMOS_SHARED') or ROOT.parent / 'shared')
MICRO = replace(
    train.PRESETS['tiny'].sizes, embed_dim=16, image_size=32, local_image_size=16, vision_width=24,
    text_width=20, context_length=12, vocab_size=50)
train.PRESETS['micro'] = train.Preset(MICRO, train.LAPTOP | {'steps': 1000})
# Small models gain nothing from more threads, and lose much on a busy machine. train.py follows the variable.
torch.set_num_threads(1)
os.environ.setdefault('OMP_NUM_THREADS', '1')


@pytest.fixture(autouse=True)
def seeded():
    """Lets every test of a file that imports this draw the same numbers, whichever tests ran before it."""
    torch.manual_seed(0)


def shared(*parts):
    """The path of recorded numbers or data. If it is absent, the test is skipped."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f'{path} is absent; set COSMOS_SHARED to the folder with the recorded numbers')
    return path


def close(a, b, tolerance=1e-5):
    """Asserts that `a` is equal to `b` up to `tolerance`, the relative distance of the whole tensors."""
    assert a.shape == b.shape
    distance = ((a - b).norm() / b.norm().clamp_min(1e-12)).item()
    assert distance <= tolerance, f'relative distance {distance:.2e}, allowed {tolerance}'


def refused(sentence, call, *args, kind=Refused, **kwargs):
    """Asserts that the call raises Refused, or `kind`, and that its text matches `sentence`."""
    with pytest.raises(kind, match=sentence):
        call(*args, **kwargs)


def captions(B, length):
    """(B, 12) ids: captions that end, with the highest id, after at most `length` ids. Random words follow."""
    ids = torch.randint(1, 49, (B, 12))
    pairs = torch.arange(B)
    ids[pairs, length - 1 - pairs % 3] = 49
    return ids


def micro(method='cosmos', B=3):
    """A micro model and a batch: (model, 2 + 2 images, 2 + 3 captions). Without cross-attention it is a plain CLIP."""
    torch.manual_seed(0)
    row = train.METHODS[method]
    cross_heads = 2 if row.has_cross_attention else 0
    model = COSMOS(replace(MICRO, cross_heads=cross_heads, two_scales=row.two_scales))
    images = [torch.randn(B, 3, side, side) for side in [32] * cosmos.GLOBALS + [16] * 2]
    texts = [captions(B, length) for length in (9, 12, 5, 5, 5)]
    return model, images, texts


def put(path, value=''):
    """Writes text or bytes, or anything else as JSON, into a file, and makes its folders -> path."""
    if not isinstance(value, (str, bytes)):
        value = json.dumps(value)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value.encode() if isinstance(value, str) else value)
    return path


def encoded(image, kind='PNG', **options):
    """A Pillow image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    """Writes a tar of members (name, value) -> path. Their times are fractions, for which PAX has one more header."""
    with tarfile.open(path, 'w', format=format) as tar:
        for i, (name, value) in enumerate(members):
            if not isinstance(value, bytes):
                value = json.dumps(value).encode()
            info = tarfile.TarInfo(name)
            info.mtime = 1 + i / 7
            info.size = len(value)
            tar.addfile(info, io.BytesIO(value))
    return path


def pairs_tar(path, records, images=itertools.repeat(b'image'), format=tarfile.PAX_FORMAT):
    """Writes a tar with i.png, the bytes of image i, and i.json, its record -> path."""
    members = []
    for i, (record, image) in enumerate(zip(records, images)):
        members += [(f'{i}.png', image), (f'{i}.json', record)]
    return write_tar(path, members, format)


def dog_tar(path, n, format=tarfile.PAX_FORMAT, broken=()):
    """Writes a tar of n pairs -> path: an image of its own colour, and 'dog i'. Those in `broken` cannot be read."""
    records = [{'caption': f'dog {i}'} for i in range(n)]
    images = [encoded(Image.new('RGB', (40, 30), (4 * i % 256, 37 * i % 256, 9))) for i in range(n)]
    for i in broken:
        images[i] = b'no image'
    return pairs_tar(path, records, images, format)


def run(module, *argv):
    """Runs a command in this process -> what its SystemExit carries, or None."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['prog', *map(str, argv)])
        try:
            command(module.main)
        except SystemExit as stop:
            return stop.code
