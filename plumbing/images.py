"""Bytes -> pixels: turned as EXIF says, JPEGs decoded at a smaller size, and what is broken is named."""
import glob
import io
import struct
from contextlib import contextmanager
from math import ceil
from pathlib import Path

from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as TF

from plumbing.errors import Unreadable, need

# What Pillow raises for bytes that are no image: SyntaxError for a broken PNG, LookupError and struct.error in EXIF.
BROKEN_IMAGE = OSError, ValueError, SyntaxError, EOFError, LookupError, struct.error, Image.DecompressionBombError
ORIENTATION = 0x112                             # the EXIF tag; 5 to 8 turn the image by 90 degrees


@contextmanager
def pillow_errors(name):
    """Inside this block, Pillow's errors for bytes that are no image become Unreadable, with this name."""
    try:
        yield
    except BROKEN_IMAGE as error:
        raise Unreadable(f'{name} is no image that can be read ({error})') from None


def open_image(source):
    """A path, an open file or encoded bytes -> Pillow image, of which only the header is read yet."""
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def read_image(source):
    """A path, an open file or encoded bytes -> Pillow image, turned as EXIF says. Else Unreadable, with the path."""
    with pillow_errors('its image' if isinstance(source, bytes) else source):
        return ImageOps.exif_transpose(open_image(source))


def read_header(data):
    """Encoded bytes -> Pillow image that is not decoded yet, and its (height, width), turned as EXIF says."""
    with pillow_errors('its image'):
        image = open_image(data)
        width, height = image.size
        if image.getexif().get(ORIENTATION) in (5, 6, 7, 8):
            return image, (width, height)
    return image, (height, width)


def decode(image, at_most=1):
    """An image of read_header -> (3, h, w) uint8, turned as EXIF says, perhaps smaller than stored, but `at_most` so
    many times.

    Pillow decodes a JPEG at 1/2, 1/4 or 1/8 of its size in much less time. Say it has 1000 x 800 pixels, and at most is
    2.08: 481 x 385 pixels are enough, and `draft` takes the next size above, 500 x 400.
    """
    with pillow_errors('its image'):
        enough = [ceil(side / at_most) for side in image.size]           # as stored: draft comes before the EXIF turn
        image.draft('RGB', enough)
        return TF.pil_to_tensor(ImageOps.exif_transpose(image).convert('RGB'))


def images_in(folder):
    """Paths of the images in a folder and its subfolders, sorted; hidden files are left out."""
    need(Path(folder).is_dir(), f'{folder} is no folder; give a folder of images')
    names = sorted(glob.glob('**/*', root_dir=folder, recursive=True))
    kinds = '.jpg', '.jpeg', '.png', '.webp'
    return [Path(folder, name) for name in names if name.lower().endswith(kinds)]
