"""Bytes -> pixels. Images are turned as EXIF says, JPEGs can be decoded at a smaller size, and broken images are
reported.

The bytes come from strangers, and Pillow raises almost any kind of error for them. So all of Pillow's errors become
Unreadable (but those about EXIF are passed over). Our own code stays outside the blocks that do this, so that its bugs
keep their traceback.
"""
import glob
import io
from contextlib import contextmanager
from math import ceil
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from plumbing.errors import Unreadable, need

Turn = Image.Transpose
ORIENTATION = 0x112                             # the EXIF tag
TURNS = {2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM,
         5: Turn.TRANSPOSE, 6: Turn.ROTATE_270, 7: Turn.TRANSVERSE, 8: Turn.ROTATE_90}
SIDEWAYS = Turn.TRANSPOSE, Turn.ROTATE_270, Turn.TRANSVERSE, Turn.ROTATE_90     # these swap width and height


@contextmanager
def pillow_errors(name):
    """Inside this block, any error that Pillow raises becomes Unreadable, with this name."""
    try:
        yield
    except Exception as error:                  # also TypeError and the like, for bytes that Pillow did not expect
        raise Unreadable(f'{name} cannot be read as an image ({error})') from None


def open_image(source):
    """A path, an open file, encoded bytes or a Pillow image -> Pillow image. Only the header of a file is read here."""
    if isinstance(source, Image.Image):
        return source
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    if image.format == 'EPS':
        raise ValueError('it is PostScript, a program that Pillow would run')
    return image


def find_turn(image):
    """How EXIF turns an image, a value of TURNS; None if it asks for no turn, or cannot be read."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:                           # any error of Pillow's, see pillow_errors
        return None


def read_image(source, as_stored=False):
    """A path, an open file, encoded bytes or a Pillow image -> RGB image, turned as EXIF says. Raises Unreadable, with
    the path, if it cannot be read.

    as_stored: the values stay as they are, because those of a mask are class numbers (palette indices, or grey of 8 or
    16 bits).
    """
    name = source if isinstance(source, (str, Path)) else 'its image'
    with pillow_errors(name):
        image = open_image(source)
        image.load()
    return turned(image, find_turn(image), name, as_stored)


def read_header(data):
    """Encoded bytes -> Pillow image, its turn (see find_turn), and the (height, width) that it has once it is turned.
    `decode` takes image and turn. A JPEG's pixels are not decoded yet. Other images are decoded here, because they
    cannot be decoded at a smaller size, and because for some of them Pillow needs the pixels to find EXIF."""
    with pillow_errors('its image'):
        image = open_image(data)
        if image.format not in ('JPEG', 'MPO'):         # MPO: a JPEG followed by other JPEGs
            image.load()
        width, height = image.size
    # Broken EXIF may give something else when it is read again, so it is read only once.
    turn = find_turn(image)
    if turn in SIDEWAYS:
        width, height = height, width
    return image, turn, (height, width)


def decode(image, turn, at_most=1):
    """Image and turn of read_header -> (3, h, w) uint8, turned. Its sides may be shorter than the stored ones, by a
    factor of `at_most` or less.

    Pillow decodes a JPEG at 1/2, 1/4 or 1/8 of its size in much less time. If it has 1000 x 800 pixels and at_most is
    2.08, then 481 x 385 pixels are enough, and `draft` takes the next larger size, 500 x 400.
    """
    # These are sides before the turn, because `draft` comes first.
    enough = [ceil(side / at_most) for side in image.size]
    with pillow_errors('its image'):
        image.draft('RGB', enough)
        image.load()
    return TF.pil_to_tensor(turned(image, turn, 'its image'))


def turned(image, turn, name, as_stored=False):
    """A decoded image -> RGB image, turned, and without the EXIF that would turn it again. as_stored: only turned."""
    if image.mode[0] in 'IF' and not as_stored:         # more than 8 bits a channel
        image = eight_bits(image, name)
    with pillow_errors(name):
        upright = image if as_stored else image.convert('RGB')  # a copy: its info is cleared below
        if turn is not None:            # FLIP_LEFT_RIGHT is 0
            upright = upright.transpose(turn)
    if not as_stored:
        upright.info = {}
    return upright


def eight_bits(image, name):
    """A 16-bit grey image -> its upper 8 bits, which is also what Pillow keeps of 16-bit colour. Its own conversion
    of 16-bit grey makes all values above 255 white."""
    values = np.asarray(image)
    if values.dtype.kind == 'f' or values.min() < 0 or values.max() > 65535:
        raise Unreadable(f'{name} has 32 bits a channel; save it with 8')
    return Image.fromarray((values >> 8).astype(np.uint8))


LONGEST = 8         # the long side of an image may be at most this many times its short side


def shorten(image):
    """Cuts the ends off an image that is longer than LONGEST allows. Evaluation enlarges the short side, so an image of
    1 x 6,000 pixels would take gigabytes, although only a square in the middle is wanted."""
    width, height = image.size
    longest = LONGEST * min(width, height)
    # An odd side stays odd and an even one even, so that the middle stays where it is.
    size = [min(side, longest + side % 2) for side in (height, width)]
    return image if size == [height, width] else TF.center_crop(image, size)


def images_in(folder):
    """Paths of the images in a folder and its subfolders, sorted; hidden files are left out."""
    need(Path(folder).is_dir(), f'{folder} is not a folder; give a folder of images')
    names = sorted(glob.glob('**/*', root_dir=folder, recursive=True))
    kinds = '.jpg', '.jpeg', '.png', '.webp'
    return [Path(folder, name) for name in names if name.lower().endswith(kinds)]
