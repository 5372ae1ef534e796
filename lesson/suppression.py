"""Feature suppression, measured on scenes that list their objects: what does a checkpoint know of the small ones?

    python -m lesson.suppression CKPT --shards runs/scenes [--json figures.json]

CKPT is any checkpoint that eval.load reads. Printed for the dominant and for the small objects:

    top1        named: is its name above the names of its own colour with five shapes that the scene lacks? A tie is a
                miss; chance 16.7 %
    probe_top1  the same by a linear probe of the image features, fitted on training scenes: is the shape in there,
                whether or not a text finds it? What a probe misses may be there all the same

then, for the whole set or by role:

    bound       are two objects' right names together above the two with their shapes exchanged? A model that adds up
                words has exactly 50 %, however it weights them
    twins       of two scenes that differ in the shape of one object, which one has it? Chance 50 %
    retrieval   among the held-out scenes, both ways
    oracles     R@1 of who knows only colours, colours and which is dominant, or all names
    pointing    where C^I looks when it is asked for an object; `absent_`: for one that is not there, the control

DIR holds train/, val/ and twins/; without train/ there is no probe, without twins/ no `twins`.
"""
import io
import shutil
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import torch
from PIL import Image, ImageDraw
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import save_image

from data import Parser, Shards, cli, half_of
from eval import (add_options, attention_picture, class_vectors, embed_images, evaluate, execute,
                  need, progress, shard_image)
from lesson.scenes import COLORS, FORMS, NAMES, SHAPES, with_article

# --- 1. Scenes and their objects -------------------------------------------------------------------------------------

def objects_of(shards, i):
    """What the json of pair i lists as `objects` with a role and absent names; [] where there is nothing of that kind."""
    listed = shards.record(i).get('objects') or []
    return [thing for thing in listed if {'role', 'absent'} <= thing.keys()]


def read_scenes(shards, most=None):
    """The first `most` scenes -> [[object, ...], ...].

    An object has as attributes what its json lists, its color and shape, and pair and number (in the mask, from 1).
    """
    scenes = []
    for pair in range(len(shards))[:most]:
        scene = []
        for number, listed in enumerate(objects_of(shards, pair), 1):
            color, shape = listed['name'].split()
            scene.append(SimpleNamespace(
                **listed, color=color, shape=shape, pair=pair, number=number))
        scenes.append(scene)
    return scenes


def read_mask(shards, i):
    """The number of the object at each pixel of pair i, 0 for the ground -> PIL image."""
    return Image.open(io.BytesIO(shards.member(i, 'mask')))


# --- 2. Named, bound, twins ------------------------------------------------------------------------------------------

COLUMN = {name: k for k, name in enumerate(NAMES)}      # of a table of scores (n images, K names)


def name_scores(model, tokenizer, image_features):
    """Cosines of image features (n, D) with all names, in the words of the captions, (n, K)."""
    names = [with_article(name) for name in NAMES]
    return image_features @ class_vectors(model, tokenizer, names, FORMS).T


def is_named(scores, thing):
    """Is the object's name above its absent names? A tie is a miss."""
    row = scores[thing.pair]
    wrong = [COLUMN[name] for name in thing.absent]
    return bool(row[COLUMN[thing.name]] > row[wrong].max())


def wins(difference):
    """1 where the difference is above zero, 0 where it is below, and 0.5 for a tie: zero but for rounding."""
    if abs(difference) < 1e-6:
        return 0.5
    return float(difference > 0)


def is_bound(scores, a, b):
    """Two objects of a scene: 1 where their right names together are above the exchanged ones, 0 below, 0.5 for a
    tie. A score that is the sum of one for the colour and one for the shape gives a tie."""
    row = dict(zip(NAMES, scores[a.pair].tolist()))
    right = row[a.name] + row[b.name]
    exchanged = row[f'{a.color} {b.shape}'] + row[f'{b.color} {a.shape}']
    return wins(right - exchanged)


def named(scores, scenes):
    """-> {role: {top1, chance, objects (how many)}}"""
    hits = defaultdict(list)
    chances = defaultdict(list)
    for scene in scenes:
        for thing in scene:
            hits[thing.role].append(is_named(scores, thing))
            chances[thing.role].append(1 / (1 + len(thing.absent)))
    figures = {}
    for role, found in hits.items():
        figures[role] = {
            'top1': fmean(found),
            'chance': fmean(chances[role]),
            'objects': len(found)}
    return figures


def bound(scores, scenes):
    """Over all pairs of objects that differ in colour and in shape -> {dominant_small, small_small (where there are
    such pairs), pairs (how many)}"""
    found = defaultdict(list)
    for scene in scenes:
        for a, b in combinations(scene, 2):
            if a.color != b.color and a.shape != b.shape:
                found[f'{a.role}_{b.role}'].append(is_bound(scores, a, b))
    figures = {roles: fmean(each) for roles, each in found.items()}
    return figures | {'pairs': sum(map(len, found.values()))}


def twins(scores, scenes):
    """Scenes 2 k and 2 k + 1 differ in one object. How often does its name score higher in the scene that has it, for
    both of its names? A tie counts half -> {role: share}"""
    found = defaultdict(list)
    for first, second in zip(scenes[::2], scenes[1::2]):
        for a, b in zip(first, second):
            if a.name == b.name:
                continue
            for thing, other in (a, b), (b, a):
                column = scores[:, COLUMN[thing.name]]
                gap = column[thing.pair] - column[other.pair]
                found[thing.role].append(wins(gap))
    return {role: fmean(each) for role, each in found.items()}


# --- 3. What features hold, and what oracles reach -------------------------------------------------------------------

WORDS = [*COLORS, *SHAPES]


def probe_scores(known_features, known_scenes, features, penalty=0.01):
    """Scores of all names by a linear probe: the sum of those of their two words, (n, K).

    Ridge regression from the features of known scenes (m, D) to which words their objects have; then it is asked about
    other features (n, D). So it tells what is there, not whose colour is whose.
    """
    spread, middle = torch.std_mean(known_features, dim=0)
    known = (known_features - middle) / (spread + 1e-6)                 # (m, D)
    new = (features - middle) / (spread + 1e-6)                       # (n, D)
    target = torch.zeros(len(known), len(WORDS))
    for scene in known_scenes:
        for thing in scene:
            target[thing.pair, WORDS.index(thing.color)] = 1
            target[thing.pair, WORDS.index(thing.shape)] = 1
    mean = target.mean(dim=0)
    ridge = penalty * len(known) * torch.eye(known.shape[1])
    gram = known.T @ known + ridge                                      # (D, D)
    product = known.T @ (target - mean)                                 # (D, W)
    scores = mean + new @ torch.linalg.solve(gram, product)             # (n, W)
    colors, shapes = scores.split([len(COLORS), len(SHAPES)], dim=1)
    return (colors[:, :, None] + shapes[:, None]).flatten(1)            # in the order of NAMES


def probe(model, preprocess, shards, image_features, scenes, workers=0):
    """How often does a probe that is fitted on these training shards name an object? -> {role: share}"""
    known_features = embed_images(model, shards, preprocess, workers)
    scores = probe_scores(known_features, read_scenes(shards), image_features)
    return {role: found['top1'] for role, found in named(scores, scenes).items()}


def oracles(scenes):
    """R@1 among these scenes of who knows of each, and of its caption, only the colours; the colours and which is the
    dominant one's; all names. Scenes that look the same to it tie, and a tie of k is won once in k times."""
    known = defaultdict(list)
    for scene in scenes:
        facts = {
            'colors': [thing.color for thing in scene],
            'colors_and_role': [f'{thing.role} {thing.color}' for thing in scene],
            'names': [thing.name for thing in scene]}
        for oracle, each in facts.items():
            known[oracle].append(', '.join(sorted(each)))
    figures = {}
    for oracle, each in known.items():
        size = Counter(each)
        figures[oracle] = fmean(1 / size[what] for what in each)
    return figures


# --- 4. Where C^I looks ----------------------------------------------------------------------------------------------

def question(name):
    return FORMS[0].format(with_article(name))          # 'there is a red star'


def point(model, images, ids, pixels):
    """An image (1, 3, S, S) and a question (1, T). pixels (S, S): where an object is -> peak and area."""
    p = model.config.patch_size
    # does the middle of a patch lie on it?
    middles = pixels[p // 2::p, p // 2::p].flatten()                    # (P,)
    weights, _ = model.attention(images, ids)                           # (1, P)
    return {
        'peak': middles[weights.argmax()].item(),
        'area': middles.float().mean().item()}


@torch.no_grad()
def pointing(model, tokenizer, preprocess, shards, most=75):
    """Where does C^I look? -> {role: means over the objects of the first `most` scenes}; {} for a plain CLIP.

    peak: the highest weight, asked by "there is a NAME", lies on the object. area: the share of patches that do, what a
    blind guess hits. absent_: the same, asked by an absent name, the control.
    """
    figures = {}
    if not model.config.cross_heads:
        return figures
    size = model.config.image_size
    device = model.logit_scale.device
    found = defaultdict(lambda: defaultdict(list))
    for scene in progress(read_scenes(shards, most), 'maps'):
        for thing in scene:
            image = preprocess(shard_image(shards, thing.pair))
            mask = read_mask(shards, thing.pair)
            mask = mask.resize((size, size), Image.NEAREST)
            pixels = pil_to_tensor(mask)[0] == thing.number                             # (S, S)
            for prefix, name in ('', thing.name), ('absent_', thing.absent[0]):
                ids = tokenizer([question(name)])
                answer = point(model, image[None].to(device), ids.to(device), pixels.to(device))
                for figure, value in answer.items():
                    found[thing.role][prefix + figure].append(value)
    for role, group in found.items():
        figures[role] = {figure: fmean(each) for figure, each in group.items()}
    return figures


def track_attention(folder, model, tokenizer, preprocess, shards, step):
    """folder/attention.png: C^I and C^T, asked for the objects of the first scene by their names. folder/strip.png: the
    maps of C^I of all steps so far, side by side. A plain CLIP has no such maps: nothing happens."""
    if not model.config.cross_heads:
        return
    captions = [question(listed['name']) for listed in objects_of(shards, 0)]
    path = Path(folder, 'attention', f'{step:09d}.png')
    path.parent.mkdir(exist_ok=True)
    attention_picture(model, tokenizer, preprocess, shard_image(shards, 0), captions, path)
    shutil.copy(path, Path(folder, 'attention.png'))
    columns = []
    for each in sorted(path.parent.glob('*.png')):
        whole = Image.open(each)
        maps = whole.crop((232, 0, 464, whole.height - 22))     # the second column of attention_picture
        ImageDraw.Draw(maps).text((12, 12), f'step {int(each.stem)}', 'white')
        columns.append(pil_to_tensor(maps) / 255)
    save_image(columns, Path(folder, 'strip.png'), nrow=len(columns), padding=0)


# --- 5. During training, and the command -----------------------------------------------------------------------------

def during_training(model, tokenizer, preprocess, image_features, shards, folder, step):
    """For an evaluation of train.py -> the figures of eval.json; attention.png and strip.png in `folder` are brought
    up to date."""
    scenes = read_scenes(shards)
    if not any(scenes):                             # objects of another kind
        return {}
    track_attention(folder, model, tokenizer, preprocess, shards, step)
    scores = name_scores(model, tokenizer, image_features)
    return named(scores, scenes) | {'bound': bound(scores, scenes)}


def run(args, model, tokenizer, preprocess):
    """All figures."""
    path = Path(half_of(args.shards, 'val'))
    shards = Shards(path)
    scenes = read_scenes(shards)
    need(any(scenes),
         f'{path} lists no objects with absent names; draw a set by python -m lesson.scenes')
    ranking, image_features, _ = evaluate(model, tokenizer, preprocess, shards)
    scores = name_scores(model, tokenizer, image_features)
    figures = named(scores, scenes)
    if (path.parent / 'train').is_dir():
        # 4,000 scenes are enough for some 100 features
        known = Shards(path.parent / 'train/0000[0-3].tar')
        shares = probe(model, preprocess, known, image_features, scenes, args.workers)
        for role, share in shares.items():
            figures[role]['probe_top1'] = share
    figures['bound'] = bound(scores, scenes)
    if (path.parent / 'twins').is_dir():
        pairs = Shards(path.parent / 'twins')
        features = embed_images(model, pairs, preprocess, args.workers)
        figures['twins'] = twins(name_scores(model, tokenizer, features), read_scenes(pairs))
    figures |= ranking
    figures['oracles'] = oracles(scenes)
    figures['pointing'] = pointing(model, tokenizer, preprocess, shards)
    return figures


def main():
    parser = Parser(
        prog='python -m lesson.suppression',
        description='What a checkpoint knows of objects in scenes.')
    add_options(parser)
    parser.set_defaults(command='suppression', run=run)
    parser.add_argument('--shards', required=True, help='a set of scenes, as runs/scenes, or its val/')
    execute(parser.parse_args())


if __name__ == '__main__':
    cli(main)
