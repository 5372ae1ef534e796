"""Bytes -> pixels: turned as EXIF says, JPEGs decoded at a smaller size, and what is broken is named.

The bytes come from strangers, and Pillow raises almost any kind of error for them. So all of Pillow's errors become
Unreadable, and our own code stays outside the blocks that do this: its bugs keep their traceback.
"""
import glob
import io
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from plumbing.errors import Unreadable, need

Turn = Image.Transpose
ORIENTATION = 0x112                             # the EXIF tag
TURNS = {2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM,
         5: Turn.TRANSPOSE, 6: Turn.ROTATE_270, 7: Turn.TRANSVERSE, 8: Turn.ROTATE_90}
SIDEWAYS = Turn.TRANSPOSE, Turn.ROTATE_270, Turn.TRANSVERSE, Turn.ROTATE_90     # width and height change places


@contextmanager
def pillow_errors(name):
    """Inside this block, whatever Pillow raises becomes Unreadable, with this name."""
    try:
        yield
    except Exception as error:                  # also TypeError and the like, for bytes that Pillow did not expect
        raise Unreadable(f'{name} is no image that can be read ({error})') from None


def open_image(source):
    """A path, an open file, encoded bytes or a Pillow image -> Pillow image; of a file only the header is read yet."""
    if isinstance(source, Image.Image):
        return source
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    if image.format == 'EPS':
        raise ValueError('it is PostScript, a program that Pillow would run')
    return image


def find_turn(image):
    """How EXIF turns an image, one of TURNS; None for not at all, and for EXIF that cannot be read."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:                           # in Pillow, as above
        return None


def read_image(source, as_stored=False):
    """A path, an open file, encoded bytes or a Pillow image -> RGB image, turned as EXIF says. Else Unreadable, with
    the path.

    as_stored: its values stay what they are, as those of a mask: numbers of a palette, or 16 bits of grey.
    """
    name = source if isinstance(source, (str, Path)) else 'its image'
    with pillow_errors(name):
        image = open_image(source)
        image.load()
    return turned(image, find_turn(image), name, as_stored)


class Unread(NamedTuple):
    """What `read_header` hands to `decode`."""
    image: Image.Image
    turn: int               # see find_turn: a second look at broken EXIF may find something else


def read_header(data):
    """Encoded bytes -> Unread, and its (height, width), turned as EXIF says. Of a JPEG no pixel is decoded yet. Others
    are decoded here: they cannot be decoded smaller, and for some of them Pillow needs the pixels to find EXIF."""
    with pillow_errors('its image'):
        image = open_image(data)
        if image.format not in ('JPEG', 'MPO'):         # MPO: a JPEG that several others follow
            image.load()
        width, height = image.size
    turn = find_turn(image)
    if turn in SIDEWAYS:
        width, height = height, width
    return Unread(image, turn), (height, width)


def decode(unread, at_most=1):
    """An image of read_header -> (3, h, w) uint8, turned as EXIF says, perhaps smaller than stored, but `at_most` so
    many times.

    Pillow decodes a JPEG at 1/2, 1/4 or 1/8 of its size in much less time. Say it has 1000 x 800 pixels, and at most is
    2.08: 481 x 385 pixels are enough, and `draft` takes the next size above, 500 x 400.
    """
    image, turn = unread
    enough = [ceil(side / at_most) for side in image.size]               # as stored: draft comes before the EXIF turn
    with pillow_errors('its image'):
        image.draft('RGB', enough)
        image.load()
    return TF.pil_to_tensor(turned(image, turn, 'its image'))


def turned(image, turn, name, as_stored=False):
    """A decoded image -> RGB image that is turned, and has no EXIF any more that would turn it again."""
    if image.mode[0] in 'IF' and not as_stored:
        image = eight_bits(image, name)
    with pillow_errors(name):
        upright = image if as_stored else image.convert('RGB')           # a copy
        if turn:
            upright = upright.transpose(turn)
    if not as_stored:
        upright.info = {}
    return upright


def eight_bits(image, name):
    """An image of 16 bits of grey -> their upper 8, which is what Pillow takes of 16 bits of colour. Its own conversion
    of grey makes all values above 255 white."""
    values = np.asarray(image)
    if values.dtype.kind == 'f' or values.min() < 0 or values.max() > 65535:
        raise Unreadable(f'{name} has 32 bits a channel; save it with 8')
    return Image.fromarray((values >> 8).astype(np.uint8))


LONGEST = 8         # times the short side: so long an image may be


def shorten(image):
    """An image that is longer loses its ends, which a square in its middle does not show: if it is enlarged whole, an
    image of 1 x 6,000 pixels takes gigabytes."""
    width, height = image.size
    longest = LONGEST * min(width, height)
    # What is left of a side has the parity of the side, so that the middle stays where it is.
    size = [min(side, longest + side % 2) for side in (height, width)]
    return image if size == [height, width] else TF.center_crop(image, size)


def images_in(folder):
    """Paths of the images in a folder and its subfolders, sorted; hidden files are left out."""
    need(Path(folder).is_dir(), f'{folder} is no folder; give a folder of images')
    names = sorted(glob.glob('**/*', root_dir=folder, recursive=True))
    kinds = '.jpg', '.jpeg', '.png', '.webp'
    return [Path(folder, name) for name in names if name.lower().endswith(kinds)]
