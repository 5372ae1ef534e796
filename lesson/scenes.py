"""Draws a set of scenes: coloured shapes on a plain ground, and sentences that each name one of them.

    python -m lesson.scenes DIR             the built-in set

A scene has a dominant object and two small ones. Objects are red or blue. So most scenes share their colours with many
others, and captions can only be told apart by shapes. No sentence mentions the size, the place or the role of its
object. Only its outline gives away the shape of an object: all dominant objects cover the same number of pixels, and so
do all small ones, each object has one colour, and places are drawn in the same way for all shapes. Objects never touch.

DIR/train and DIR/val hold tars of KEY.webp and KEY.json. The json has `captions`, which are ten sentences in train, and
in val one caption that names every object once. And it has `objects`, each with `name`, `role` (dominant or small),
`area` in pixels, `centre` (x, y), from which mask_of can redraw the pixels that the object covers, and `absent`: its
colour with five shapes that no object of the scene has.
"""
import io
import json
import math
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageColor, ImageDraw
from tqdm import tqdm

from plumbing.errors import command, need
from plumbing.files import read_json, write_json
from plumbing.options import Parser, count
from plumbing.shards import write_shard

# --- 1. What there is to draw ----------------------------------------------------------------------------------------

COLORS = {'red': '#de1e26', 'blue': '#1c5aeb'}
GROUNDS = ['#848688', '#cdbea2', '#745c4a', '#7a7c56', '#5c6878', '#9e8694']

# Outlines around 0, as complex numbers x + iy of any scale, with y down as in images. The first one is filled, and a
# second one is a hole.
ROUND = np.exp(1j * np.linspace(0, 2 * np.pi, 60, endpoint=False))
CORNERS = ROUND[::15]                           # at 0, 90, 180 and 270 degrees
ARM = [0.34 + 1j, -0.34 + 1j, -0.34 + 0.34j]    # of the cross
HEART = 13 * ROUND - 5 * ROUND ** 2 - 2 * ROUND ** 3 - ROUND ** 4
OUTER_ARC = np.exp(1j * np.linspace(0.9, 5.38))
INNER_ARC = np.exp(1j * np.linspace(4.5, 1.78))
SHAPES = {
    'circle': [ROUND],
    'ring': [ROUND, 0.5 * ROUND],
    'square': [CORNERS * (1 + 1j)],
    'triangle': [-1j * ROUND[::20]],
    'star': [-1j * ROUND[::6] * np.tile([1, 0.45], 5)],
    'heart': [16 * ROUND.imag ** 3 - 1j * HEART.real],                  # the real part of HEART is its height
    'cross': [np.outer(CORNERS, ARM).ravel()],
    'moon': [np.append(OUTER_ARC, 0.45 + 0.8 * INNER_ARC)],
}
NAMES = [f'{color} {shape}' for color in COLORS for shape in SHAPES]
FORMS = ['there is a {}', 'we see a {}', 'here is a {}', 'it shows a {}']   # the same for every object
SENTENCES = 10                                  # per training scene
ABSENT = 5                                      # wrong names per object


def polygon_area(outline):
    """By the shoelace formula."""
    return abs((outline.conj() * np.roll(outline, -1)).imag.sum()) / 2


AREAS = {}                                      # what the outlines above enclose
REACH = 0.0                                     # how far a shape of area 1 extends from its centre, at most
for shape, (outline, *holes) in SHAPES.items():
    AREAS[shape] = polygon_area(outline) - sum(map(polygon_area, holes))
    REACH = max(REACH, abs(outline).max() / math.sqrt(AREAS[shape]))

SIZE = 96                                       # side of an image in pixels
SS = 4                                          # supersampling per axis
GAP = 2                                         # fewest pixels between objects, and to the border

ROLES = 'dominant', 'small', 'small'            # of the objects of a scene; their shapes differ
AREA = {'dominant': 829, 'small': 369}          # in pixels: 9 % of an image, and 4 %


@dataclass
class Thing:
    """One object of a scene."""
    shape: str
    color: str
    role: str                       # 'dominant' or 'small'
    area: int                       # in pixels
    centre: tuple = ()              # x, y
    absent: tuple = ()              # names: its own colour with shapes that no object of the scene has

    @property
    def name(self):
        return f'{self.color} {self.shape}'


# --- 2. Layout and drawing -------------------------------------------------------------------------------------------

def draw_things(rng):
    """-> the objects of a scene, the dominant one first, still without places."""
    shapes = rng.sample(list(SHAPES), len(ROLES))
    colors = rng.choices(list(COLORS), k=len(ROLES))
    return [Thing(shape, color, role, AREA[role]) for shape, color, role in zip(shapes, colors, ROLES)]


def place(rng, things):
    """Give each object its centre. Each gets a disc that holds any shape of its area, and discs keep apart, so a
    place does not give a shape away."""
    numbers = np.random.default_rng(rng.getrandbits(32))
    radius = np.array([REACH * math.sqrt(thing.area) for thing in things])       # (n,)
    room = SIZE / 2 - GAP - radius                                      # around the middle
    least = radius[:, None] + radius + GAP                              # (n, n)
    np.fill_diagonal(least, 0)
    while True:                         # draw a thousand layouts, until one fits
        x, y = SIZE / 2 + numbers.uniform(-room, room, (2, 1000, len(things)))
        centres = x + 1j * y                                            # (1000, n)
        apart = abs(centres[:, :, None] - centres[:, None])             # (1000, n, n)
        fitting = (apart >= least).all(axis=(1, 2))
        if fitting.any():
            for thing, centre in zip(things, centres[fitting.argmax()]):
                thing.centre = centre.real, centre.imag
            return


def pixels_of(thing):
    """The pixels that an object covers, (SIZE, SIZE) bool: exactly as many as its area, those that lie most inside its
    outline."""
    centre = complex(*thing.centre)
    zoom = math.sqrt(thing.area / AREAS[thing.shape])
    fill = Image.new('L', (SIZE * SS, SIZE * SS))
    inside = 255
    for line in SHAPES[thing.shape]:
        points = SS * (centre + zoom * line)
        ImageDraw.Draw(fill).polygon(list(zip(points.real, points.imag)), inside)
        inside = 0                              # a second outline is a hole
    shares = np.asarray(fill.reduce(SS))
    order = shares.argsort(axis=None, kind='stable')                    # stable: the same on every machine
    covered = np.zeros(SIZE * SIZE, bool)
    covered[order[-thing.area:]] = True
    return covered.reshape(SIZE, SIZE)


def mask_of(things):
    """Which object covers which pixel, (SIZE, SIZE) uint8: 0 is the ground, k the k-th object. Things give the same
    mask whether they are drawn or read from their json."""
    mask = np.zeros((SIZE, SIZE), np.uint8)
    for number, thing in enumerate(things, 1):
        mask[pixels_of(thing)] = number
    return mask


LISTED = {'name', 'role', 'area', 'centre', 'absent'}   # what the json says of each object


def read_things(record):
    """What the json of a scene lists -> its Things; [] if it does not list objects as draw_scene does: other sets may
    have anything under this key."""
    objects = record.get('objects')
    if not (isinstance(objects, list) and objects and isinstance(objects[0], dict) and LISTED <= set(objects[0])):
        return []
    things = []
    for listed in objects:
        color, shape = listed['name'].split()
        things.append(Thing(shape, color, listed['role'], listed['area'], listed['centre'], listed['absent']))
    return things


# --- 3. Captions -----------------------------------------------------------------------------------------------------

def training_captions(rng, things):
    """Ten sentences, each about one object. Half of them are about the small ones in turn, the rest about the dominant
    one."""
    main, *small = things
    rng.shuffle(small)
    rng.random()                    # unused: without it the numbers drawn later would be others
    captions = []
    for number in range(SENTENCES):
        thing = main
        if number < SENTENCES // 2:
            thing = small[number % len(small)]
        captions.append(rng.choice(FORMS).format(thing.name))
    return captions


def held_out_caption(rng, things):
    """A sentence about every object, in random order, so the first need not be about the dominant one."""
    in_any_order = rng.sample(things, len(things))
    return '. '.join(rng.choice(FORMS).format(thing.name) for thing in in_any_order)


# --- 4. Scenes and sets ----------------------------------------------------------------------------------------------

def draw_scene(seed, split, index):
    """-> [(member name, bytes), ...]. The random numbers depend only on split, on index and, for train, on the seed."""
    drawn_from = seed if split == 'train' else 'any'
    rng = random.Random(f'{drawn_from}/{split}/{index}')
    things = draw_things(rng)
    place(rng, things)
    taken = [thing.shape for thing in things]
    free = [shape for shape in SHAPES if shape not in taken]
    absent = rng.sample(free, ABSENT)
    for thing in things:
        thing.absent = [f'{thing.color} {shape}' for shape in absent]
    pixels = np.full((SIZE, SIZE, 3), ImageColor.getrgb(rng.choice(GROUNDS)), float)
    mask = mask_of(things)
    objects = []
    for number, thing in enumerate(things, 1):
        pixels[mask == number] = ImageColor.getrgb(COLORS[thing.color])
        objects.append({'name': thing.name, 'role': thing.role, 'area': thing.area, 'centre': thing.centre,
                        'absent': thing.absent})
    # Make the whole image brighter or darker. Otherwise, in an image made smaller, counting the blended colours of
    # edges would give shapes away.
    pixels *= rng.uniform(0.85, 1.1)
    image = Image.fromarray(np.uint8(pixels.clip(0, 255)))
    if split == 'train':
        captions = training_captions(rng, things)
    else:
        captions = [held_out_caption(rng, things)]
    record = {'captions': captions, 'objects': objects}
    file = io.BytesIO()
    image.save(file, 'WEBP', lossless=True, quality=0, method=0)        # quality here is effort
    return [(f'{index:06d}.webp', file.getvalue()),
            (f'{index:06d}.json', json.dumps(record, separators=(',', ':')).encode())]


def make_scenes(root, train=4000, val=1000, seed=0, workers=None):
    """Draw a set into a new folder, in tars of 1,000 scenes: `train` training scenes and `val` held-out ones, which are
    the same for all seeds. Equal arguments give equal bytes, for any number of `workers`. The folder appears only when
    it is whole. Refused if there is one already."""
    root = Path(root)
    need(not root.exists(), f'{root} exists; give another folder, or remove it')
    root.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(suffix='.partial', dir=root.parent) as folder, ProcessPoolExecutor(workers) as pool:
        whole = Path(folder, root.name)
        for split, total in ('train', train), ('val', val):
            draw = partial(draw_scene, seed, split)
            for start in tqdm(range(0, total, 1000), f'drawing {split}', disable=None):
                scenes = pool.map(draw, range(start, min(start + 1000, total)), chunksize=50)
                write_shard(whole / split / f'{start // 1000:05d}.tar', chain.from_iterable(scenes))
        write_json(whole / 'world.json', {'train': train, 'val': val, 'seed': seed})
        whole.rename(root)


def built_in_set(root='runs/scenes'):
    """-> the folder of the built-in set, which is drawn if it is absent. Refused if the folder has anything else."""
    root = Path(root)
    if not root.exists():
        print(f'data       drawing the built-in set into {root}, once')
        make_scenes(root)
    recipe = root / 'world.json'
    need(recipe.exists() and read_json(recipe) == {'train': 4000, 'val': 1000, 'seed': 0},
         f'{root} is not the built-in set; rename that folder, or train on it with --data {root}')
    return root


# --- 5. Command ------------------------------------------------------------------------------------------------------

def main():
    parser = Parser(prog='python -m lesson.scenes', epilog=__doc__)
    add = parser.add_argument
    add('root', metavar='DIR')
    add('--train', type=count, default=4000, help='training scenes (%(default)s)')
    add('--val', type=count, default=1000, help='held-out scenes (%(default)s)')
    add('--seed', type=count, default=0, help='of the training scenes (%(default)s)')
    args = parser.parse_args()
    make_scenes(**vars(args))
    print(f'{args.train} training and {args.val} held-out scenes in {args.root}')


if __name__ == '__main__':
    command(main)
