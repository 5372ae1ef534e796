"""Draws the built-in set: scenes of one dominant object and one to three small ones, with captions.

    python -m lesson.scenes DIR                                 8,000 training and 1,000 held-out pairs of 96 pixels
    python -m lesson.scenes DIR --objects 2 --named 0.1         ten sentences a scene, one of them on the small object
    python -m lesson.scenes DIR --small-size 0.12               small objects with a side of 12 % of the image's

A training pair is KEY.webp and KEY.json: DreamLIP's seven caption keys (with --named only `captions`), and `objects`
with name and bbox (x, y, w, h in pixels). A held-out pair has KEY.mask.png as well: 0 is the ground, k the k-th object.
Its json lists five `captions` that name every object, and more of each object: `role` (dominant or small), `area` in
pixels, `absent` (nine names that share no word with any object of the scene) and `mixed` (its colour with the shape of
every other object, and their colours with its shape).
"""
import io
import json
import random
import re
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw
from tqdm import tqdm

from data import Parser, cli, write_shard

# --- 1. What there is to draw ----------------------------------------------------------------------------------------

COLORS = {
    'red': '#de1e26', 'orange': '#ff8400', 'yellow': '#ffe01e', 'lime': '#a0eb28',
    'green': '#148732', 'cyan': '#28d7eb', 'blue': '#1c5aeb', 'navy': '#14196e',
    'purple': '#8228b4', 'pink': '#ff82c3', 'white': '#fafafa', 'black': '#191919',
    'teal': '#0f8787', 'magenta': '#d70f8c', 'maroon': '#6e0f1e', 'peach': '#ffc396',
}
GROUNDS = {
    'grey': '#848688', 'beige': '#cdbea2', 'brown': '#745c4a',
    'olive': '#7a7c56', 'slate': '#5c6878', 'mauve': '#9e8694',
}
PATTERNS = ['plain', 'striped', 'dotted', 'checkered', 'shaded']
TEXTURES = PATTERNS[:3]                         # those of objects; a ground may have any pattern

# Outlines as complex numbers x + iy of any scale, y down as in images. The first is filled, a second one is a hole.
ROUND = np.exp(1j * np.linspace(0, 2 * np.pi, 60, endpoint=False))
CORNERS = ROUND[::15]                           # at 0, 90, 180 and 270 degrees
ARM = [0.34 + 1j, -0.34 + 1j, -0.34 + 0.34j]    # of the cross
HEART = 13 * ROUND - 5 * ROUND ** 2 - 2 * ROUND ** 3 - ROUND ** 4
OUTER_ARC = np.exp(1j * np.linspace(0.9, 5.38))
INNER_ARC = np.exp(1j * np.linspace(4.5, 1.78))
BODY = ROUND[4:-3]                              # of the fish, with a gap for the tail
TAIL = [-1 + 0.6j, -0.8, -1 - 0.6j]
SHAPES = {
    'circle': [ROUND],
    'ring': [ROUND, 0.5 * ROUND],
    'square': [CORNERS * (1 + 1j)],
    'triangle': [np.array([-0.95j, 1 + 0.8j, -1 + 0.8j])],
    'star': [-1j * ROUND[::6] * np.tile([1, 0.43], 5)],
    'flower': [ROUND * (0.55 + 0.45 * abs((ROUND ** 3).imag)), 0.2 * ROUND],
    'heart': [16 * ROUND.imag ** 3 - 1j * HEART.real],
    'cross': [np.outer(CORNERS, ARM).ravel()],
    'moon': [np.append(OUTER_ARC, 0.45 + 0.8 * INNER_ARC)],
    'fish': [np.append(0.25 - 0.75 * BODY.real - 0.55j * BODY.imag, TAIL)],
}
NAMES = [f'{color} {shape}' for color in COLORS for shape in SHAPES]


class Voice(NamedTuple):
    """How one of three describers speaks, after DreamLIP's three captioners."""
    large: str
    small: str
    place: str
    first: str          # of the main object: what it is, and where
    other: str          # of another one
    relation: str       # where object a is, seen from b
    ground: str


VOICES = {
    'IB': Voice('large', 'small', 'at the {}', 'there is {} {}', '{} is {}',
                'the {a} is {r} the {b}', 'the background is {}'),
    'SV': Voice('big', 'little', 'in the {} part', 'we see {} {}', '{} sits {}',
                '{r} the {b} is the {a}', 'the ground is {}'),
    'LLA': Voice('huge', 'tiny', 'near the {}', 'the image shows {} {}', '{} appears {}',
                 'the {a} lies {r} the {b}', 'everything lies on a {} surface'),
}
SIZE = 96                                       # side of an image in pixels
SS = 2                                          # supersampling per axis
CANVAS = SIZE * SS
DOMINANT_SIDE = (0.42, 0.56)                    # least and most of an object's longer side, as a share of SIZE
SMALL_SIDE = (0.24, 0.32)
TRIES = 20_000                                  # layouts to draw before objects are said not to fit


@dataclass
class Thing:
    """One object of a scene."""
    shape: str
    color: str
    side: float                                 # the longer one, in pixels
    texture: str
    role: str                                   # 'dominant' or 'small'
    x: float = 0                                # its centre
    y: float = 0
    place: str = ''                             # 'top left'

    @property
    def name(self):
        return f'{self.color} {self.shape}'


# --- 2. Layout and drawing -------------------------------------------------------------------------------------------

def overlap(a, b):
    """Are they too close? Small objects keep 2 pixels apart; one may reach 4 into the square of the dominant, `a`."""
    apart = max(abs(a.x - b.x), abs(a.y - b.y))
    gap = apart - (a.side + b.side) / 2
    return gap <= (-4 if a.role == 'dominant' else 2)


def draw_layout(rng, count, small_size):
    """-> the `count` objects of a scene, the dominant one first."""
    shapes = rng.sample(list(SHAPES), count)
    colors = rng.sample(list(COLORS), count)
    small = (small_size, small_size) if small_size else SMALL_SIDE
    sides = max(small, DOMINANT_SIDE)           # the pair with the larger first number: above 0.42 all are alike
    role = 'dominant'
    things = []
    for shape, color in zip(shapes, colors):
        side = SIZE * rng.uniform(*sides)
        things.append(Thing(shape, color, side, rng.choice(TEXTURES), role))
        sides = small
        role = 'small'
    for _ in range(TRIES):
        for thing in things:
            margin = 2 + thing.side / 2
            thing.x = rng.uniform(margin, SIZE - margin)
            thing.y = rng.uniform(margin, SIZE - margin)
            row = ('top', '', 'bottom')[int(3 * thing.y / SIZE)]
            column = ('left', '', 'right')[int(3 * thing.x / SIZE)]
            thing.place = f'{row} {column}'.strip() or 'centre'
        if not any(overlap(a, b) for a, b in combinations(things, 2)):
            return things
    raise ValueError(f'{count} objects do not fit with --small-size {small_size}; give less, or fewer --objects')


def pattern_share(pattern, u, v):
    """How much of the second colour shows, 0 to 1, at points whose coordinates u, v count periods."""
    if pattern == 'striped':
        return u % 1 < 0.42
    if pattern == 'dotted':
        return (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.075
    if pattern == 'checkered':
        return (u % 2 < 1) ^ (v % 2 < 1)
    if pattern == 'shaded':
        return (u - u.min()) / np.ptp(u)
    return 0 * u


def woven(pattern, period, first, second, rng):
    """A canvas, CANVAS pixels a side, of two colours in a pattern at a random angle; `period` in canvas pixels."""
    x = np.arange(CANVAS, dtype=np.float32) - CANVAS / 2
    turn = np.exp(1j * rng.uniform(0, np.pi)) / period
    points = (x + 1j * x[:, None]) * np.complex64(turn)                                 # (CANVAS, CANVAS)
    mask = np.uint8(255.0 * pattern_share(pattern, points.real, points.imag))
    image = Image.new('RGB', (CANVAS, CANVAS), first)
    image.paste(second, mask=Image.fromarray(mask))
    return image


def outlines(thing, rng):
    """The outlines of an object, warped and turned a little -> [[(x, y), ...], ...] on the canvas."""
    warp = rng.uniform(0.87, 1.15)
    turn = np.exp(1j * rng.uniform(-0.3, 0.3))
    lines = [turn * (warp * line.real + 1j * line.imag) for line in SHAPES[thing.shape]]
    x = lines[0].real
    y = lines[0].imag
    zoom = SS * thing.side / max(np.ptp(x), np.ptp(y))
    found = []
    for line in lines:
        xs = SS * thing.x + zoom * (line.real - (x.min() + x.max()) / 2)
        ys = SS * thing.y + zoom * (line.imag - (y.min() + y.max()) / 2)
        found.append(list(zip(xs, ys)))
    return found


def paint(canvas, thing, rng):
    """Paint an object -> the pixels of the image that it covers by half or more, (SIZE, SIZE) bool."""
    fill = Image.new('L', canvas.size)
    edge = fill.copy()
    width = round(SS * (0.9 + 0.015 * thing.side))
    inside = 255
    for points in outlines(thing, rng):
        ImageDraw.Draw(fill).polygon(points, inside)
        ImageDraw.Draw(edge).line(points + points[:2], 255, width, 'curve')
        inside = 0                              # a second outline is a hole
    fill.paste(255, mask=edge)
    pure = ImageColor.getrgb(COLORS[thing.color])
    bright = rng.uniform(0.95, 1)
    color = tuple(int(bright * channel) for channel in pure)
    lift = 90 if max(color) < 120 else 0        # dark colours get lighter stripes
    accent = tuple(int(0.6 * channel + lift) for channel in color)
    dark = tuple(int(0.3 * channel) for channel in pure)
    period = SS * (2.6 + 0.12 * thing.side)
    canvas.paste(woven(thing.texture, period, color, accent, rng), mask=fill)
    canvas.paste(dark, mask=edge)
    return np.asarray(fill.reduce(SS)) >= 128


def draw_alone(name):
    """A drawing of one object, half as long as the image, on a plain ground."""
    color, shape = name.split()
    thing = Thing(shape, color, SIZE / 2, 'plain', 'dominant', SIZE / 2, SIZE / 2)
    canvas = Image.new('RGB', (CANVAS, CANVAS), GROUNDS['grey'])
    paint(canvas, thing, random.Random(name))
    return canvas.reduce(SS)


# --- 3. Captions -----------------------------------------------------------------------------------------------------

def say(form, voice, thing):
    """Fill 'there is {} {}' with 'a large red star' and 'at the top left'; a form may leave out the place."""
    size = voice.large if thing.role == 'dominant' else voice.small
    return form.format(f'a {size} {thing.name}', voice.place.format(thing.place))


def relation(a, b):
    """Where `a` is, seen from `b`."""
    if abs(a.y - b.y) > abs(a.x - b.x):
        return 'above' if a.y < b.y else 'below'
    return 'left of' if a.x < b.x else 'right of'


def captions(rng, things, ground):
    """DreamLIP's keys. Raw: the dominant object. Short: it, at times with another. Long: all objects, and the ground or
    a relation."""
    main, *small = things
    name = main.name
    other = rng.choice(small).name
    grounded = rng.choice(list(VOICES))         # the one voice that tells of the ground
    raw = [f'{name} picture', f'photo of a {name}', f'cute {name}', f'my {main.texture} {name}']
    record = {'raw_caption': [rng.choice(raw)]}
    for key, voice in VOICES.items():
        a, b = rng.sample(things, 2)
        large = say('{}', voice, main)
        short = [large, f'a {main.texture} {name}', f'a {name} and a {other}', f'a picture of {large}']
        record[f'short{key}_captions'] = [rng.choice(short)]
        long = [say(voice.first, voice, main)]
        for thing in rng.sample(small, len(small)):
            long.append(say(voice.other, voice, thing))
        if key == grounded:
            long.append(voice.ground.format(ground))
        else:
            long.append(voice.relation.format(a=a.name, b=b.name, r=relation(a, b)))
        record[f'long{key}_captions'] = [sentence.capitalize() for sentence in long]
    return record


def captions_by_share(rng, things, named):
    """Ten sentences, each on one object: the share `named` of them on a small one, the rest on the dominant one."""
    count = int(10 * named + rng.random())      # rounded up or down at random, so that the mean is right
    sentences = []
    for number in range(10):
        thing = rng.choice(things[1:]) if number < count else things[0]
        voice = rng.choice(list(VOICES.values()))
        form = rng.choice([voice.first, voice.other, 'a picture of {}', 'a photo of {}'])
        sentences.append(say(form, voice, thing))
    return {'captions': sentences}


def held_out_captions(things, ground):
    """Five captions that name every object."""
    main, *small = things
    every = [' and '.join(say('{} {}', voice, thing) for thing in things) for voice in VOICES.values()]
    names = ' and '.join(f'a {thing.name}' for thing in things)
    around = ' and '.join(f'a {thing.name} {relation(thing, main)} it' for thing in small)
    return [every[0], f'a {main.name} with {around}', f'the image shows {names}',
            f'{every[1]} on a {ground} ground', f'on a {ground} background there is {every[2]}']


# --- 4. Scenes and sets ----------------------------------------------------------------------------------------------

def clean_names(names, others):
    """Those of `names` that share no word with any of `others`."""
    words = set(' '.join(others).split())
    return [name for name in names if not words & set(name.split())]


def mixed_names(thing, things):
    """Its colour with the shape of every other object, and their colours with its shape."""
    mixed = []
    for other in things:
        if other is not thing:
            mixed += [f'{thing.color} {other.shape}', f'{other.color} {thing.shape}']
    return mixed


def encoded(image, kind, **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def draw_scene(seed, split, named, small_size, objects, index):
    """-> [(member name, bytes), ...]. Its random numbers depend on seed, split and index alone."""
    rng = random.Random(f'{seed}/{split}/{index}')
    things = draw_layout(rng, objects or rng.randint(2, 4), small_size)
    pattern = rng.choice(PATTERNS)
    one, two = rng.sample(list(GROUNDS), 2)
    period = CANVAS * rng.uniform(0.12, 0.25)
    canvas = woven(pattern, period, GROUNDS[one], GROUNDS[two], rng)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    for number, thing in enumerate(things, 1):
        mask[paint(canvas, thing, rng)] = number
    pixels = rng.uniform(0.85, 1.1) * np.asarray(canvas.reduce(SS))
    image = Image.fromarray(np.uint8(pixels.clip(0, 255)))
    ground = f'plain {one}' if pattern == 'plain' else f'{pattern} {one} and {two}'
    if named is None:
        record = captions(rng, things, ground)
    else:
        record = captions_by_share(rng, things, named)
    record['objects'] = []
    clean = clean_names(NAMES, [thing.name for thing in things])
    for number, thing in enumerate(things, 1):
        covered = mask == number
        x, y, right, bottom = Image.fromarray(covered).getbbox()
        listed = {'name': thing.name, 'bbox': [x, y, right - x, bottom - y]}
        if split == 'val':
            listed['role'] = thing.role
            listed['area'] = int(covered.sum())
            listed['absent'] = rng.sample(clean, 9)
            listed['mixed'] = mixed_names(thing, things)
        record['objects'].append(listed)
    members = {'webp': encoded(image, 'WEBP', quality=50)}              # about 1.1 KB
    if split == 'val':
        record['captions'] = held_out_captions(things, ground)
        members['mask.png'] = encoded(Image.fromarray(mask), 'PNG', optimize=True)
    text = json.dumps(record, separators=(',', ':'))
    text = re.sub(r'\b([Aa]) (?=[aeiou])', r'\1n ', text)               # a orange -> an orange
    members['json'] = text.encode()
    return [(f'{index:06d}.{kind}', value) for kind, value in members.items()]


def make_scenes(root, train=8000, val=1000, seed=0, workers=None, named=None, small_size=None, objects=None):
    """Draw a set as tars root/{train,val}/00000.tar ... of 1,000 pairs each; the head of this file says what they hold.

    named: share of the sentences that name a small object, ten a scene. small_size: side of small objects as a share of
    the image's; above 0.42 the dominant one has it, too. objects: how many in a scene; two to four by default.
    Equal arguments give equal bytes for any number of `workers`. ValueError for objects that do not fit. Tars of a
    larger set in the folder are left there.
    """
    # Ctrl-C is for this process: a worker that died of it could leave the pool waiting for ever.
    with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        for split, count in ('train', train), ('val', val):
            draw = partial(draw_scene, seed, split, named, small_size, objects)
            for start in tqdm(range(0, count, 1000), f'drawing {split}', disable=None):
                scenes = pool.map(draw, range(start, min(start + 1000, count)))
                path = Path(root, split, f'{start // 1000:05d}.tar')
                write_shard(path, chain.from_iterable(scenes))


def built_in_set(root='runs/scenes'):
    """-> the folder of the built-in set, drawn where it is absent."""
    folder = Path(root)
    if not (folder / 'val/00000.tar').exists():                         # the last file to be drawn
        print(f'data       drawing the built-in set into {folder}, once')
        make_scenes(folder)
    return folder


# --- 5. Command ------------------------------------------------------------------------------------------------------

def main():
    parser = Parser(prog='python -m lesson.scenes', epilog=__doc__)
    parser.add_argument('root', metavar='DIR')
    parser.add_argument('--train', type=int, default=8000,
                        help='training pairs (default: %(default)s)')
    parser.add_argument('--val', type=int, default=1000,
                        help='held-out pairs (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of all that is drawn (default: %(default)s)')
    parser.add_argument('--named', type=float, help='share of the sentences on a small object, 0 to 1; ten a scene')
    parser.add_argument('--small-size', type=float, help="side of small objects as a share of the image's")
    parser.add_argument('--objects', type=int, choices=(2, 3, 4), help='in a scene (default: two to four)')
    args = parser.parse_args()
    make_scenes(**vars(args))
    print(f'{args.train} training and {args.val} held-out scenes in {args.root}')


if __name__ == '__main__':
    cli(main)
