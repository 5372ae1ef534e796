"""Feature suppression, measured on scenes that list their objects: what does a checkpoint know of the small ones?

    python -m lesson.suppression CKPT --shards runs/scenes/val [--picture naming.png] [--json figures.json]

CKPT is any checkpoint that eval.load reads. Printed for the dominant and for the small objects:

    top1        presence: is its name above nine names that share no word with the scene? A tie is a miss; chance 10 %
    all_top1    the same against all such names of the set, about 98
    bound       binding: the share of the names mixed of two objects of the scene that its name beats. A tie counts
                half; chance 50 %
    probe_top1  presence by a linear probe of the image features: is it in there, whatever texts find?

then where C^I looks when it is asked for an object, by the masks, and the mIoU of segmentation by the colours.
"""
import io
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import save_image

from data import Parser, Shards, cli
from eval import (Settings, add_options, attention, attention_picture, class_vectors, confusion, embed_images, execute,
                  need, progress, read_json, segment_image, segmentation_figures, shade, shard_image, write_json)
from lesson.scenes import COLORS, GROUNDS, NAMES, clean_names

# --- 1. Scenes and their objects -------------------------------------------------------------------------------------

def objects_of(shards, i):
    """What the json of pair i lists as `objects` with a name; [] where there is nothing of that kind."""
    listed = shards.record(i).get('objects')
    if not isinstance(listed, list):
        return []
    return [thing for thing in listed if isinstance(thing, dict) and 'name' in thing]


def listed_objects(shards, most=None):
    """The objects of the first `most` pairs that list wrong names -> {role: [objects]}.

    An object has as attributes what its json lists, and pair, number (in the mask, from 1) and scene (all its names).
    """
    groups = {}
    for pair in range(len(shards))[:most]:
        objects = objects_of(shards, pair)
        names = [listed['name'] for listed in objects]
        for number, listed in enumerate(objects, 1):
            if 'mixed' in listed:
                thing = SimpleNamespace(**listed, pair=pair, number=number, scene=names)
                groups.setdefault(thing.role, []).append(thing)
    return groups


def read_mask(shards, i):
    """The number of the object at each pixel of pair i, 0 for the ground -> PIL image."""
    data = shards.mask(i)
    need(data, f'{shards.name(i)} has no KEY.mask.png; give the held-out half of a drawn set')
    return Image.open(io.BytesIO(data))


# --- 2. Presence and binding -----------------------------------------------------------------------------------------

COLUMN = {name: k for k, name in enumerate(NAMES)}      # of a table of scores (n images, K names)


def name_scores(model, tokenizer, image_features):
    """Cosines of image features (n, D) with all names, (n, K)."""
    return image_features @ class_vectors(model, tokenizer, NAMES).T


def lead(scores, thing, wrong):
    """By how much an object's name is above each of the wrong ones, (len(wrong),)."""
    row = scores[thing.pair]
    columns = [COLUMN[name] for name in wrong]
    return row[COLUMN[thing.name]] - row[columns]


def presence(scores, thing, wrong):
    """Is its name above all of them? A tie is a miss."""
    return bool(lead(scores, thing, wrong).min() > 0)


def binding(scores, group):
    """The share of the mixed names of all objects of a group that their own names beat. A tie counts half."""
    margins = torch.cat([lead(scores, thing, thing.mixed) for thing in group])
    return (0.5 + margins.sign() / 2).mean().item()


def naming_figures(scores, groups):
    """-> {role: {'top1', 'chance', 'bound', 'objects'}}"""
    figures = {}
    for role, group in groups.items():
        figures[role] = {
            'top1': fmean(presence(scores, thing, thing.absent) for thing in group),
            'chance': 1 / (1 + len(group[0].absent)),
            'bound': binding(scores, group),
            'objects': len(group),
        }
    return figures


def presence_and_binding(model, tokenizer, image_features, shards):
    """The figures of eval.json, {role: {'top1': presence, 'chance', 'bound': binding, 'objects'}}; {} where the shards
    list no such objects. image_features: of all pairs, (n, D), of unit length."""
    groups = listed_objects(shards)
    if not groups:
        return {}
    scores = name_scores(model, tokenizer, image_features)
    return naming_figures(scores, groups)


def probe_scores(image_features, group, penalty=0.1):
    """Scores (n, K) by a linear probe: is it in the image features (n, D), whatever texts find there?

    Ridge regression to how many words a name shares with the objects of one role, fitted on pairs of even number and
    asked about the odd ones, then the reverse. A sum over words leaves open whose colour is whose.
    """
    spread, middle = torch.std_mean(image_features, dim=0)
    x = (image_features - middle) / (spread + 1e-6)
    target = torch.zeros(len(x), len(NAMES))
    for thing in group:
        words = set(thing.name.split())
        for name, k in COLUMN.items():
            target[thing.pair, k] += len(words.intersection(name.split()))
    pairs = torch.tensor([thing.pair for thing in group]).unique()
    mean = target[pairs].mean(dim=0)
    scores = torch.zeros_like(target)
    for odd in (0, 1):
        fit = pairs[pairs % 2 == odd]
        rest = pairs[pairs % 2 != odd]
        ridge = penalty * len(fit) * torch.eye(x.shape[1])
        gram = x[fit].T @ x[fit] + ridge                                # (D, D)
        product = x[fit].T @ (target[fit] - mean)                       # (D, K)
        scores[rest] = mean + x[rest] @ torch.linalg.solve(gram, product)
    return scores


# --- 3. Where C^I looks, and segmentation ----------------------------------------------------------------------------

def point(maps, numbers, number, p):
    """maps (2, P), asked by the name of object `number` and by an absent one; numbers (S, S) -> row of `pointing`."""
    figures = {}
    on_it = numbers == number
    on_others = (numbers > 0) & ~on_it
    for target, pixels in ('', on_it), ('others_', on_others):
        middles = pixels[p // 2::p, p // 2::p].flatten()                # (P,) does the middle of a patch lie there?
        covered = F.avg_pool2d(pixels.float()[None], p).flatten()       # (P,) which share of a patch does?
        figures[f'{target}area'] = covered.mean()
        for question, weights in zip(('', 'absent_'), maps):
            figures[f'{question}{target}peak'] = middles[weights.argmax()]
            figures[f'{question}{target}weight'] = weights @ covered
    return figures


@torch.no_grad()
def pointing(model, tokenizer, preprocess, shards, most=300):
    """Where does C^I look? -> {role: means over the objects of the first `most` pairs}; {} for a plain CLIP.

    peak: the highest weight, asked by "a NAME", lies on the object; weight: the share of it that does; a blind guess
    gives the area. others_: the same of the other objects of the scene. absent_: asked by a name that is not in the
    scene, the control.
    """
    figures = {}
    if not model.config.cross_heads:
        return figures
    device = model.logit_scale.device
    size = model.config.image_size
    for role, group in listed_objects(shards, most).items():
        rows = []
        for thing in progress(group, f'maps of {role} objects'):
            image = preprocess(shard_image(shards, thing.pair)).to(device)
            tokens = tokenizer([f'a {thing.name}', f'a {thing.absent[0]}']).to(device)
            maps, _ = model.attention(torch.stack([image, image]), tokens)              # (2, P)
            mask = read_mask(shards, thing.pair).resize((size, size), Image.NEAREST)
            numbers = pil_to_tensor(mask)[0]                                            # (S, S)
            found = point(maps.cpu(), numbers, thing.number, model.config.patch_size)
            rows.append(found)
        figures[role] = {}
        for key in rows[0]:
            figures[role][key] = fmean(row[key].item() for row in rows)
    return figures


def segmentation(model, tokenizer, shards):
    """mIoU of the objects by their colours; all grounds are class 0."""
    ground = ['background', *GROUNDS]
    colors = list(COLORS)
    vectors = class_vectors(model, tokenizer, ground + colors).to(model.logit_scale.device)
    counts = [len(ground)] + [1] * len(colors)
    window = model.config.image_size
    settings = Settings(size=window * 3 // 2, window=window, stride=window // 2)
    matrix = 0
    for i in progress(range(len(shards)), 'segmentation'):
        classes = [0]                           # of each number in the mask
        for listed in objects_of(shards, i):
            color, _ = listed['name'].split()
            classes.append(1 + colors.index(color))
        numbers = pil_to_tensor(read_mask(shards, i))[0]
        truth = torch.tensor(classes)[numbers.long()]                                   # (h, w)
        image = shard_image(shards, i)
        labels = segment_image(model, image, vectors, counts, settings)
        matrix += confusion(truth, labels, len(counts))
    return segmentation_figures(matrix, ['ground', *colors])


# --- 4. Pictures -----------------------------------------------------------------------------------------------------

def tile(image, lines, side=112, rows=1, weights=None):
    """A picture, seen through a map of weights (h, w) where one is given, under `rows` lines of (text, colour)."""
    image = ImageOps.fit(image.convert('RGB'), (side, side))
    if weights is not None:
        grid = Image.fromarray(np.uint8(255 * np.array(weights)))
        heat = shade(grid.resize(image.size, Image.BILINEAR))
        image = Image.blend(image, heat, 0.6)
    image = ImageOps.expand(image, (0, 16 * rows + 4, 0, 0))
    draw = ImageDraw.Draw(image)
    for number, (text, colour) in enumerate(lines):
        draw.text((4, 16 * number), text, colour, font_size=13)
    return pil_to_tensor(image) / 255


def naming_picture(scores, groups, shards, path, wrong='absent'):
    """PNG of the first twelve scenes. Above each the names of its objects and behind them the best of their wrong ones,
    `absent` or `mixed`: green where the name is above it, else red."""
    lines = {}
    for group in groups.values():
        for thing in group:
            others = getattr(thing, wrong)
            margins = lead(scores, thing, others)
            colour = 'lime' if margins.min() > 0 else 'tomato'
            line = f'{thing.name} / {others[margins.argmin()]}'
            lines.setdefault(thing.pair, []).append((line, colour))
    tiles = []
    for pair in sorted(lines)[:12]:
        image = shard_image(shards, pair)
        tiles.append(tile(image, lines[pair], side=256, rows=4))
    save_image(tiles, path, nrow=4)


def strip(image, maps, path):
    """PNG of maps over training, {caption: {step: (h, w)}}: a row a caption, the image and then a column a step."""
    tiles = []
    for caption, by_step in maps.items():
        tiles.append(tile(image, [(caption, 'white')]))
        for step, weights in by_step.items():
            lines = [(f'step {step}', 'white')]
            tiles.append(tile(image, lines, weights=weights))
    save_image(tiles, path, nrow=len(tiles) // len(maps))


def track_attention(folder, model, tokenizer, preprocess, shards, step):
    """Ask C^I for the objects of the first scene by their names. The maps go into folder/maps.json and attention.png,
    and those of all steps so far into strip.png, once there are two. A plain CLIP has no such maps: nothing happens."""
    if not model.config.cross_heads:
        return
    image = shard_image(shards, 0)
    path = Path(folder, 'maps.json')
    maps = read_json(path) if path.exists() else {}
    for listed in objects_of(shards, 0):
        caption = f"a {listed['name']}"
        weights, _ = attention(model, tokenizer, preprocess, image, caption)
        by_step = maps.setdefault(caption, {})
        by_step[str(step)] = weights.round(3).tolist()
    write_json(path, maps)
    attention_picture(model, tokenizer, preprocess, image, maps, Path(folder, 'attention.png'))
    if any(len(by_step) > 1 for by_step in maps.values()):
        strip(image, maps, Path(folder, 'strip.png'))


def during_training(model, tokenizer, preprocess, image_features, shards, folder, step):
    """For an evaluation of train.py -> the figures of eval.json; maps.json and strip.png in `folder` are brought up
    to date."""
    track_attention(folder, model, tokenizer, preprocess, shards, step)
    return presence_and_binding(model, tokenizer, image_features, shards)


# --- 5. Command ------------------------------------------------------------------------------------------------------

def run(args, model, tokenizer, preprocess):
    """All figures, and the naming picture."""
    shards = Shards(args.shards)
    groups = listed_objects(shards)
    need(groups, f'{args.shards} lists no objects with absent and mixed names; draw a set by python -m lesson.scenes')
    image_features = embed_images(model, shards, preprocess, workers=args.workers)
    scores = name_scores(model, tokenizer, image_features)
    figures = naming_figures(scores, groups)
    for role, group in groups.items():
        probe = probe_scores(image_features, group)
        all_hits, probe_hits = [], []
        for thing in group:
            clean = clean_names(NAMES, thing.scene)
            all_hits.append(presence(scores, thing, clean))
            probe_hits.append(presence(probe, thing, thing.absent))
        figures[role]['all_top1'] = fmean(all_hits)
        figures[role]['probe_top1'] = fmean(probe_hits)
    if args.picture:
        naming_picture(scores, groups, shards, args.picture)
    figures['pointing'] = pointing(model, tokenizer, preprocess, shards)
    figures['segmentation'] = segmentation(model, tokenizer, shards)
    return figures


def main():
    parser = Parser(prog='python -m lesson.suppression', description='What a checkpoint knows of objects in scenes.')
    add_options(parser)
    parser.set_defaults(command='suppression', run=run)
    parser.add_argument('--shards', required=True, help='held-out shards that list objects, as runs/scenes/val')
    parser.add_argument('--picture', help='PNG of scenes with the names that win')
    execute(parser.parse_args())


if __name__ == '__main__':
    cli(main)
