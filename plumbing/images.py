"""Bytes from strangers -> pixels: turned as EXIF says, and JPEGs at a smaller size if that is enough."""
import glob
import io
from contextlib import contextmanager
from math import ceil
from pathlib import Path

from PIL import Image
from torchvision.transforms.v2 import functional as TF

from plumbing.errors import Unreadable, need

Turn = Image.Transpose
TURNS = {2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM,
         5: Turn.TRANSPOSE, 6: Turn.ROTATE_270, 7: Turn.TRANSVERSE, 8: Turn.ROTATE_90}
SIDEWAYS = Turn.TRANSPOSE, Turn.ROTATE_270, Turn.TRANSVERSE, Turn.ROTATE_90     # these swap width and height


@contextmanager
def pillow_errors(name):
    """Inside this block any error becomes Unreadable, with this name, because Pillow raises almost any kind."""
    try:
        yield
    except Exception as error:
        raise Unreadable(f'{name} cannot be read as an image ({error})') from None


def open_image(source):
    """A path, an open file, encoded bytes or a Pillow image -> Pillow image. Only the header of a file is read here."""
    if isinstance(source, Image.Image):
        return source
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    if image.format == 'EPS':
        raise ValueError('it is PostScript, a program that Pillow would run')
    return image


def load_image(source):
    """What open_image takes -> RGB image, turned as EXIF says. Unreadable if it is broken."""
    name = source if isinstance(source, (str, Path)) else 'its image'
    image, turn, _ = read_header(source, name)
    return pixels(image, turn, name)


def read_header(source, name='its image'):
    """-> Pillow image, how EXIF turns it (a value of TURNS, or None), and the (height, width) that it then has. Only
    a JPEG's pixels are not decoded yet, because Pillow needs those of some other images to find EXIF."""
    with pillow_errors(name):
        image = open_image(source)
        if image.format not in ('JPEG', 'MPO'):         # MPO: a JPEG followed by other JPEGs
            image.load()
    try:
        turn = TURNS.get(image.getexif().get(0x112))    # its tag Orientation
    except Exception:                                   # broken EXIF turns nothing
        turn = None
    width, height = image.size
    if turn in SIDEWAYS:
        width, height = height, width
    return image, turn, (height, width)


def decode(image, turn, shrink_at_most=1):
    """Image and turn of read_header -> (3, h, w) uint8, turned, its sides shortened by shrink_at_most or less.

    Pillow decodes a JPEG at 1/2, 1/4 or 1/8 of its size in much less time. If it has 1000 x 800 pixels, and
    shrink_at_most is 2.08, then 481 x 385 pixels are enough, and `draft` takes the next larger size, 500 x 400.
    """
    enough = [ceil(side / shrink_at_most) for side in image.size]              # before the turn
    with pillow_errors('its image'):
        image.draft('RGB', enough)
    return TF.pil_to_tensor(pixels(image, turn, 'its image'))


def pixels(image, turn, name):
    """An image of read_header -> RGB image, turned, and without the EXIF that would turn it again."""
    with pillow_errors(name):
        image.load()
        # I and F: grey of 16 or 32 bits, nearly all of which Pillow would make white.
        need(image.mode[0] not in 'IF', 'it has over 8 bits a channel; save it with 8')
        image = image.convert('RGB')    # a copy: its info is cleared below
        if turn is not None:            # FLIP_LEFT_RIGHT is 0
            image = image.transpose(turn)
    image.info = {}
    return image


def shorten(image):
    """Cuts an image to 8 times its short side. Evaluation enlarges the short side, so an image of 1 x 6,000 pixels
    would take gigabytes, although only a square in the middle is wanted."""
    longest = 8 * min(image.size)
    # An odd side stays odd and an even one even, so that the middle stays where it is.
    size = [min(side, longest + side % 2) for side in (image.height, image.width)]
    return TF.center_crop(image, size)


def images_in(folder):
    """Paths of the images in a folder and its subfolders, sorted; hidden files are left out."""
    need(Path(folder).is_dir(), f'{folder} is not a folder; give a folder of images')
    names = sorted(glob.glob('**/*', root_dir=folder, recursive=True))
    kinds = '.jpg', '.jpeg', '.png', '.webp'
    return [Path(folder, name) for name in names if name.lower().endswith(kinds)]
