"""Draws a set of scenes: coloured shapes on a plain ground, and sentences that each name one of them.

    python -m lesson.scenes DIR                                 the built-in set: a dominant and two small objects
    python -m lesson.scenes DIR --colors 16 --named 0.2         more colours; two of ten sentences on small objects
    python -m lesson.scenes DIR --objects 2 --dominant-size 0.6                         a big and a small object
    python -m lesson.scenes DIR --objects 2 --dominant-size 0.6 --company equal         the small one beside an equal
    python -m lesson.scenes DIR --objects 2 --dominant-size 0.6 --company none          the small one alone

With few colours most scenes share theirs with many others, so that captions can only be told apart by shapes. No
sentence tells the size, the place or the role of its object.

DIR/train, DIR/val and DIR/twins hold tars of KEY.webp, KEY.json and, outside train, KEY.mask.png: 0 is the ground, k
the k-th object. The json has `captions`: of train ten sentences, of the others one caption that names every object
once. And `objects`, each with `name`, `role` (dominant or small), `bbox` (x, y, w, h in pixels), `area` in pixels,
and `absent`: its colour with five shapes that no object of the scene has. Twins are two neighbours, 2 k and 2 k + 1,
alike but for the shape of one object.
"""
import io
import json
import random
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, combinations
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw
from tqdm import tqdm

from data import Parser, cli, write_shard
from eval import need, read_json, write_json

# --- 1. What there is to draw ----------------------------------------------------------------------------------------

COLORS = {                                      # the first ones differ most
    'red': '#de1e26', 'blue': '#1c5aeb', 'yellow': '#ffe01e', 'green': '#148732',
    'white': '#fafafa', 'black': '#191919', 'orange': '#ff8400', 'purple': '#8228b4',
    'cyan': '#28d7eb', 'pink': '#ff82c3', 'lime': '#a0eb28', 'navy': '#14196e',
    'teal': '#0f8787', 'magenta': '#d70f8c', 'maroon': '#6e0f1e', 'peach': '#ffc396',
}
GROUNDS = ['#848688', '#cdbea2', '#745c4a', '#7a7c56', '#5c6878', '#9e8694']

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
    'heart': [16 * ROUND.imag ** 3 - 1j * HEART.real],
    'cross': [np.outer(CORNERS, ARM).ravel()],
    'moon': [np.append(OUTER_ARC, 0.45 + 0.8 * INNER_ARC)],
    # hard to tell from others on few pixels, hence last
    'flower': [ROUND * (0.55 + 0.45 * abs((ROUND ** 3).imag)), 0.2 * ROUND],
    'fish': [np.append(0.25 - 0.75 * BODY.real - 0.55j * BODY.imag, TAIL)],
}
NAMES = [f'{color} {shape}' for color in COLORS for shape in SHAPES]
FORMS = ['there is {}', 'we see {}', 'here is {}', 'it shows {}']       # the same for every object
SENTENCES = 10                                  # a training scene
ABSENT = 5                                      # wrong names of an object

SIZE = 96                                       # side of an image in pixels
SS = 2                                          # supersampling per axis
CANVAS = SIZE * SS
SPREAD = 0.03                                   # a side may be as much longer or shorter
TRIES = 20_000                                  # layouts to draw before objects are said not to fit
VERSION = 3                                     # of the built-in set; raise it when a scene changes


@dataclass(frozen=True)
class World:
    """What the scenes of a set have in common. Those that differ in `company` alone have the same small objects, in the
    same places, and the same sentences on them."""
    colors: int = 2                 # the first ones of COLORS; they may repeat in a scene
    shapes: int = 8                 # the first ones of SHAPES; they do not repeat
    objects: int = 3                # in a scene: the dominant one, and small ones
    dominant_size: float = 0.46     # the longer side of an object, as a share of the image's
    small_size: float = 0.31
    company: str = 'big'            # of the small ones; 'equal': one of their size, 'none': nothing
    named: float = 0.5              # share of the sentences that name a small object
    seed: int = 0

    def __post_init__(self):
        need(0 <= self.named <= 1, f'--named {self.named} is no share of sentences; give 0 to 1')
        for flag, size in (
                ('--small-size', self.small_size),
                ('--dominant-size', self.dominant_size)):
            need(0.1 <= size <= 0.9, f'{flag} {size} is no side to draw; give 0.1 to 0.9')
        least = self.objects + ABSENT
        need(self.shapes >= least,
             f'--shapes {self.shapes} is too few for {self.objects} objects and {ABSENT} shapes that '
             f'are absent; give --shapes {least}')
        need(self.company == 'big' or self.objects > 1,
             f'--company {self.company} needs a small object; give --objects 2 or more')


@dataclass
class Thing:
    """One object of a scene."""
    shape: str
    color: str
    role: str                       # 'dominant' or 'small'
    side: float                     # the longer one, in pixels
    seed: float                     # of its turn, warp and brightness: the same in any company
    x: float = 0                    # its centre
    y: float = 0

    @property
    def name(self):
        return f'{self.color} {self.shape}'


# --- 2. Layout and drawing -------------------------------------------------------------------------------------------

def draw_things(rng, world):
    """-> the objects of a scene, the dominant one first, without places."""
    shapes = rng.sample(list(SHAPES)[:world.shapes], world.objects)
    colors = rng.choices(list(COLORS)[:world.colors], k=world.objects)
    things = []
    role = 'dominant'
    size = world.dominant_size
    for shape, color in zip(shapes, colors):
        side = SIZE * rng.uniform(size - SPREAD, size + SPREAD)
        things.append(Thing(shape, color, role, side, rng.random()))
        role = 'small'
        size = world.small_size
    return things


def overlap(a, b):
    """Are they too close? Small objects keep 2 pixels apart; one may reach 4 into the square of the dominant, `a`."""
    apart = max(abs(a.x - b.x), abs(a.y - b.y))
    gap = apart - (a.side + b.side) / 2
    return gap <= (-4 if a.role == 'dominant' else 2)


def place(rng, things):
    """Give each object its centre. ValueError where they do not fit."""
    for _ in range(TRIES):
        for thing in things:
            margin = 2 + thing.side / 2
            thing.x = rng.uniform(margin, SIZE - margin)
            thing.y = rng.uniform(margin, SIZE - margin)
        if not any(overlap(a, b) for a, b in combinations(things, 2)):
            return
    raise ValueError(f'{len(things)} objects do not fit into an image; give lower --dominant-size, '
                     '--small-size or --objects')


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


def paint(canvas, thing):
    """Paint an object -> the pixels of the image that it covers by half or more, (SIZE, SIZE) bool."""
    rng = random.Random(thing.seed)
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
    dark = tuple(int(0.3 * channel) for channel in pure)
    canvas.paste(color, mask=fill)
    canvas.paste(dark, mask=edge)
    return np.asarray(fill.reduce(SS)) >= 128


# --- 3. Captions -----------------------------------------------------------------------------------------------------

def with_article(name):
    return f'an {name}' if name[0] in 'aeiou' else f'a {name}'


def training_captions(rng, things, shown, named):
    """Ten sentences, each on one object: the share `named` on the small ones in turn, the rest on the dominant one. An
    object that is not shown is called "a picture"."""
    main, *small = things
    rng.shuffle(small)
    # rounded up or down at random, so that the mean is right
    count = int(SENTENCES * named + rng.random())
    if not small:
        count = 0
    captions = []
    for number in range(SENTENCES):
        thing = main
        if number < count:
            thing = small[number % len(small)]
        name = thing.name if thing in shown else 'picture'
        captions.append(rng.choice(FORMS).format(with_article(name)))
    return captions


def held_out_caption(rng, shown):
    """A sentence on every object, in random order: the first one need not be the dominant."""
    sentences = []
    for thing in rng.sample(shown, len(shown)):
        sentences.append(rng.choice(FORMS).format(with_article(thing.name)))
    return '. '.join(sentences)


# --- 4. Scenes and sets ----------------------------------------------------------------------------------------------

def layout(rng, world):
    """-> all objects of a scene in their places, those that are shown, and the shapes that none of them has."""
    things = draw_things(rng, world)
    place(rng, things)
    shown = things
    if world.company == 'none':
        shown = things[1:]
    if world.company == 'equal':
        things[0].side = things[1].side
    free = list(SHAPES)[:world.shapes]
    for thing in things:
        free.remove(thing.shape)
    return things, shown, rng.sample(free, ABSENT)


def encoded(image, kind, **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def draw_scene(world, split, index):
    """-> [(member name, bytes), ...]. Its random numbers depend on seed, split and index alone."""
    number = index // 2 if split == 'twins' else index
    rng = random.Random(f'{world.seed}/{split}/{number}')
    things, shown, absent = layout(rng, world)
    if split == 'twins' and index % 2:
        changed = shown[number % len(shown)]
        shape = changed.shape
        changed.shape = absent[0]
        absent[0] = shape
    canvas = Image.new('RGB', (CANVAS, CANVAS), rng.choice(GROUNDS))
    mask = np.zeros((SIZE, SIZE), np.uint8)
    for k, thing in enumerate(shown, 1):
        mask[paint(canvas, thing)] = k
    pixels = rng.uniform(0.85, 1.1) * np.asarray(canvas.reduce(SS))
    image = Image.fromarray(np.uint8(pixels.clip(0, 255)))
    objects = []
    for k, thing in enumerate(shown, 1):
        covered = mask == k
        x, y, right, bottom = Image.fromarray(covered).getbbox()
        objects.append({
            'name': thing.name,
            'role': thing.role,
            'bbox': [x, y, right - x, bottom - y],
            'area': int(covered.sum()),
            'absent': [f'{thing.color} {shape}' for shape in absent]})
    if split == 'train':
        captions = training_captions(rng, things, shown, world.named)
    else:
        captions = [held_out_caption(rng, shown)]
    record = {'captions': captions, 'objects': objects}
    text = json.dumps(record, separators=(',', ':'))
    members = {'webp': encoded(image, 'WEBP', quality=50), 'json': text.encode()}
    if split != 'train':
        members['mask.png'] = encoded(Image.fromarray(mask), 'PNG', optimize=True)
    return [(f'{index:06d}.{kind}', value) for kind, value in members.items()]


def ignore_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_scenes(root, train=16_000, val=1000, workers=None, **options):
    """Draw a set into a folder, in tars of 1,000 scenes: `train` training scenes, `val` held-out ones and as many
    twins. Other options are those of World. Equal arguments give equal bytes for any number of `workers`.

    ValueError where objects do not fit, or where the folder holds a whole set.
    """
    world = World(**options)
    root = Path(root)
    need(not (root / 'world.json').exists(), f'{root} holds a set of scenes; give another folder')
    # Ctrl-C is for this process: a worker that died of it could leave the pool waiting for ever.
    with ProcessPoolExecutor(workers, initializer=ignore_ctrl_c) as pool:
        for split, count in ('train', train), ('twins', val // 2 * 2), ('val', val):
            draw = partial(draw_scene, world, split)
            for start in tqdm(range(0, count, 1000), f'drawing {split}', disable=None):
                scenes = pool.map(draw, range(start, min(start + 1000, count)), chunksize=50)
                path = root / split / f'{start // 1000:05d}.tar'
                write_shard(path, chain.from_iterable(scenes))
    # last: a folder that has it is whole
    write_json(root / 'world.json', {'version': VERSION} | asdict(world))


def built_in_set(root='runs/scenes'):
    """-> the folder of the built-in set: `root`, or where that holds one of another version, root-2, root-3, ... It is
    drawn where it is absent."""
    folder = Path(root)
    number = 1
    while (folder / 'val/00000.tar').exists():          # the last tar to be drawn
        recipe = folder / 'world.json'
        if recipe.exists() and read_json(recipe)['version'] == VERSION:
            return folder
        number += 1
        folder = Path(f'{root}-{number}')
    print(f'data       drawing the built-in set into {folder}, once')
    make_scenes(folder)
    return folder


# --- 5. Command ------------------------------------------------------------------------------------------------------

def main():
    parser = Parser(prog='python -m lesson.scenes', epilog=__doc__)
    add = parser.add_argument
    add('root', metavar='DIR')
    add('--train', type=int, default=16_000, help='training scenes')
    add('--val', type=int, default=1000, help='held-out scenes')
    add('--colors', type=int, choices=range(2, 17), default=2, metavar='2..16', help='how many')
    add('--shapes', type=int, choices=range(6, 11), default=8, metavar='6..10', help='how many')
    add('--objects', type=int, choices=range(1, 5), default=3, metavar='1..4', help='in a scene')
    add('--dominant-size', type=float, default=0.46, metavar='R',
        help='its side, as a share of the image')
    add('--small-size', type=float, default=0.31, metavar='R', help='the same of small objects')
    add('--company', choices=['big', 'equal', 'none'], default='big',
        help='beside small objects: the dominant one, it in their size, or nothing')
    add('--named', type=float, default=0.5, metavar='Q', help='share of sentences on small objects')
    add('--seed', type=int, default=0)
    args = parser.parse_args()
    make_scenes(**vars(args))
    print(f'{args.train} training and {args.val} held-out scenes in {args.root}')


if __name__ == '__main__':
    cli(main)
