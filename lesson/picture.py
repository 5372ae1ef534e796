"""One step of COSMOS as a picture: the views, vectors and arrows of one pair, with the names of cosmos.py.

`python -m lesson.plots` writes it: large for README.md and for page 1 of the course, which does not tell yet what a
copy can do, and small for the other pages, where everything that the page is not about is pale. The drawing is
picture.svg; this module puts a real pair into it, with the crops and sentences that `python train.py` draws for that
pair of the built-in set.
"""
import base64
import io
import json
import random
import re
from pathlib import Path
from string import Template

from torchvision.transforms.v2.functional import to_pil_image

from cosmos import GLOBALS, Config
from data import CROPS_ONLY, image_crops, kinds_of_views, text_crops
from lesson.scenes import World, draw_scene

EPOCH, PAIR = 3, 223            # with seed 0; its small views show the circle that a short caption names
SIZES = Config(image_size=48, local_image_size=24, patch_size=8)        # of views, as in lesson/onepage.py
PICTURES = {                    # file: classes of the drawing, see picture.svg
    'assets/lesson-step.svg': 'large',
    'assets/lesson-step-1.svg': 'large page1',
    'assets/lesson-step-2.svg': 'small page2',
    'assets/lesson-step-3.svg': 'small page3',
    'assets/lesson-step-4.svg': 'small page4',
    'assets/lesson-step-5.svg': 'small page5'}


def one_pair():
    """-> 4 views (3, s, s) uint8 and 4 captions, the two global ones first."""
    (_, image), (_, record) = draw_scene(World(), 'train', PAIR)
    pool = json.loads(record)['captions']
    captions = text_crops(pool, random.Random(f'0 {EPOCH} {PAIR} texts'), GLOBALS, 2)
    first, other, local = [kind._replace(**CROPS_ONLY) for kind in kinds_of_views(SIZES)]
    rng = random.Random(f'0 {EPOCH} {PAIR} images')
    views, _ = image_crops(image, [first, other, local, local], rng)
    return views, captions


def drawn_steps():
    """-> {file: its SVG}."""
    values = {}
    views, captions = one_pair()
    for k, (view, caption) in enumerate(zip(views, captions)):
        file = io.BytesIO()
        to_pil_image(view).save(file, 'PNG')
        values[f'view{k}'] = 'data:image/png;base64,' + base64.b64encode(file.getvalue()).decode()
        values[f'caption{k}'] = caption
    template = Template(Path(__file__).with_suffix('.svg').read_text())
    return {path: template.substitute(values, page=page) for path, page in PICTURES.items()}


def without_pixels(svg):
    """For comparison: another version of Pillow may compress the views otherwise."""
    return re.sub('base64,[^"]*', '', svg)
