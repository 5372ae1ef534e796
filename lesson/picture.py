"""One step of COSMOS as a picture: the views, vectors and arrows of one pair, with the names of cosmos.py.

`python -m lesson.plots` writes it twice: with red arrows where a copy is enough, for README.md and for page 3 of the
course, and without them for page 1, which asks first which arrows these are. The drawing is picture.svg; this module
puts a real pair into it, with the crops and sentences that `python train.py` draws for that pair of the built-in set.
"""
import base64
import io
import json
from pathlib import Path
from string import Template
from types import SimpleNamespace

from torchvision.transforms.v2.functional import to_pil_image

from cosmos import Config
from data import Counts, Crops
from lesson.scenes import World, draw_scene

EPOCH, PAIR = 3, 223            # with seed 0. The small views of this pair show the circle that a short caption names
SIZES = Config(image_size=48, local_image_size=24, patch_size=8)    # as in lesson/onepage.py
COUNTS = Counts(local_images=2, local_texts=2)
PICTURES = {                    # file: class of the drawing, see picture.svg
    'assets/lesson-step.svg': 'marked',
    'assets/lesson-step-1.svg': 'unmarked'}


def one_pair():
    """-> 4 views (3, s, s) uint8 and 4 captions, the two global ones first."""
    (_, image), (_, record) = draw_scene(World(), 'train', PAIR)
    shards = SimpleNamespace(pair=lambda index: (json.loads(record)['captions'], image))
    # We only call `sample`, which needs no tokenizer.
    crops = Crops(shards, None, SIZES, 0, COUNTS, 'crops')
    drawn = crops.sample(EPOCH, PAIR)
    return drawn.crops, drawn.captions


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
    return {path: template.substitute(values, marks=marks) for path, marks in PICTURES.items()}
