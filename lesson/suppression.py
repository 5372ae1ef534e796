"""Feature suppression, measured on scenes that list their objects: what does a checkpoint know of the small ones?

    python -m lesson.suppression CKPT --shards runs/scenes/val [--pictures naming] [--json figures.json]

CKPT is any checkpoint that eval.load reads. Printed for the dominant and for the small objects:

    top1        presence: is its name above nine names that share no word with the scene? A tie is a miss; chance 10 %
    all_top1    the same against all such names of the set, 72 to 112
    shape_top1  is it above the names of its own colour with a shape that is not in the scene? Chance about 13 %
    bound       binding: which share of its mixed names (its colour with another object's shape, or the reverse) its
                name beats. A tie counts half; chance 50 %
    probe_top1  presence by a linear probe of the image features: is it in there, whatever texts find?

then the three tests of arXiv 2502.19842 (`three_tests`), where C^I looks when it is asked for an object, by the masks,
and the mIoU of segmentation by the colours.
"""
import io
import shutil
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import torch
from PIL import Image, ImageDraw, ImageOps
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import save_image

from cosmos import unit
from data import Parser, Shards, cli
from eval import (Settings, add_options, attention_picture, class_vectors, confusion, embed_images, embed_texts,
                  execute, need, progress, segment_image, segmentation_figures, shard_image)
from lesson.scenes import COLORS, NAMES, clean_names, draw_alone

# --- 1. Scenes and their objects -------------------------------------------------------------------------------------

def objects_of(shards, i):
    """What the json of pair i lists as `objects` with a name; [] where there is nothing of that kind."""
    listed = shards.record(i).get('objects') or []
    return [thing for thing in listed if 'name' in thing]


def listed_objects(shards, most=None):
    """Objects that list wrong names, in the first `most` pairs -> {role: [objects]}.

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
    return Image.open(io.BytesIO(shards.member(i, 'mask')))


# --- 2. Presence and binding -----------------------------------------------------------------------------------------

COLUMN = {name: k for k, name in enumerate(NAMES)}      # of a table of scores (n images, K names)


def name_scores(model, tokenizer, image_features):
    """Cosines of image features (n, D) with all names, (n, K). NB: prompts say "a orange", which no caption does."""
    return image_features @ class_vectors(model, tokenizer, NAMES).T


def lead(scores, thing, wrong):
    """By how much an object's name is above each of the wrong ones, (len(wrong),)."""
    row = scores[thing.pair]
    columns = [COLUMN[name] for name in wrong]
    return row[COLUMN[thing.name]] - row[columns]


def presence(scores, thing, wrong):
    """Is its name above all of them? A tie is a miss."""
    return lead(scores, thing, wrong).min() > 0


def binding(scores, group):
    """Over all objects of a group: the share of their mixed names that lose to their own name. A tie counts half."""
    margins = [lead(scores, thing, thing.mixed) for thing in group]
    margins = torch.cat(margins)
    return (0.5 + margins.sign() / 2).mean().item()


def presence_and_binding(scores, groups):
    """scores of all pairs, the groups of `listed_objects` -> {role: {top1 (presence), bound (binding), objects (how
    many)}}"""
    figures = {}
    for role, group in groups.items():
        hits = [presence(scores, thing, thing.absent) for thing in group]
        figures[role] = {
            'top1': fmean(hits),
            'bound': binding(scores, group),
            'objects': len(group),
        }
    return figures


def probe_scores(image_features, group, penalty=0.1):
    """Scores (n, K) by a linear probe: is an object in the image features (n, D), even where no text finds it?

    Ridge regression to how many words a name shares with the objects of one role, fitted on pairs of even number and
    asked about the odd ones, then the reverse. So it tells presence, not binding.
    """
    spread, middle = torch.std_mean(image_features, dim=0)
    x = (image_features - middle) / (spread + 1e-6)
    target = torch.zeros(len(x), len(NAMES))
    for thing in group:
        words = set(thing.name.split())
        for name, k in COLUMN.items():
            shared = words.intersection(name.split())
            target[thing.pair, k] += len(shared)
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

def h_T(model, images, tokens, keys):
    """h_T of each pair (B, D), where C^I may read only the patches `keys` (P,)."""
    def leave_out(linear, inputs, patches):
        return patches[:, keys]                     # what a hook returns replaces the keys of C^I
    with model.image_map.register_forward_hook(leave_out):
        return model([images], [tokens]).h_T[0]


def point(model, images, tokens, pixels):
    """An image (1, 3, S, S) and a question (1, T). pixels (S, S): where an object is -> peak and used."""
    p = model.config.patch_size
    middles = pixels[p // 2::p, p // 2::p].flatten()                    # (P,) does the middle of a patch lie on it?
    weights, _ = model.attention(images, tokens)                        # (1, P)
    whole = h_T(model, images, tokens, torch.ones_like(middles))     # (1, D)
    masked = h_T(model, images, tokens, ~middles)
    return {'peak': middles[weights.argmax()], 'used': 1 - (whole * masked).sum()}


@torch.no_grad()
def pointing(model, tokenizer, preprocess, shards, most=150):
    """Where does C^I look? -> {role: means over the objects of the first `most` pairs}; {} for a plain CLIP.

    peak: the highest weight, asked by "a NAME", lies on the object. used: 1 - cosine of h_T (with its residual) with
    and without the object's patches among the keys. absent_: the same, asked by a name that is not in the scene, the
    control.
    """
    figures = {}
    if not model.config.cross_heads:
        return figures
    size = model.config.image_size
    device = model.logit_scale.device
    for role, group in listed_objects(shards, most).items():
        found = defaultdict(list)
        for thing in progress(group, f'maps of {role} objects'):
            image = preprocess(shard_image(shards, thing.pair))
            mask = read_mask(shards, thing.pair)
            mask = mask.resize((size, size), Image.NEAREST)
            pixels = pil_to_tensor(mask)[0] == thing.number                             # (S, S)
            for question, name in ('', thing.name), ('absent_', thing.absent[0]):
                tokens = tokenizer([f'a {name}'])
                answer = point(model, image[None].to(device), tokens.to(device), pixels.to(device))
                for figure, value in answer.items():
                    found[question + figure].append(value)
        figures[role] = {figure: fmean(each) for figure, each in found.items()}
    return figures


def segmentation(model, tokenizer, shards, most=500):
    """mIoU of the objects in the first `most` pairs by their colours; class 0 is the ground."""
    names = ['background', *COLORS]
    vectors = class_vectors(model, tokenizer, names)
    vectors = vectors.to(model.logit_scale.device)
    counts = [1] * len(names)
    window = model.config.image_size
    settings = Settings(size=window * 3 // 2, window=window, stride=window // 2)
    matrix = 0
    for i in progress(range(len(shards))[:most], 'segmentation'):
        classes = [0]                           # of each number in the mask
        for listed in objects_of(shards, i):
            color, _ = listed['name'].split()
            classes.append(names.index(color))
        numbers = pil_to_tensor(read_mask(shards, i))[0]
        truth = torch.tensor(classes)[numbers.long()]                                   # (h, w)
        image = shard_image(shards, i)
        labels = segment_image(model, image, vectors, counts, settings)
        matrix += confusion(truth, labels, len(names))
    return segmentation_figures(matrix, names)


# --- 4. Three tests of bias to one object (arXiv 2502.19842) ---------------------------------------------------------

def nearest(scores, scenes):
    """scores (n, K) of n scenes with all names; the names in each scene -> the share of scenes where the highest score
    is that of its first name, and of its last."""
    best = [NAMES[k] for k in scores.argmax(dim=1)]
    first = fmean(name == names[0] for name, names in zip(best, scenes))
    last = fmean(name == names[-1] for name, names in zip(best, scenes))
    return {'first': first, 'last': last}


@torch.no_grad()
def three_tests(model, tokenizer, preprocess, image_features, scores, shards):
    """The nearest of all names to a scene, the nearest drawing of one object to it, and the nearest name to a caption
    of all its objects: is it of the first object, or of the last? In a scene the dominant one is first; captions start
    with each in turn.

    Published shares of CLIP models, for orientation only (scenes of four objects, another set of names): image to
    image, the large object 65-86 %, the small one 5-17 %; caption to name, the first 50-71 %, the fourth 4-10 %; image
    to name on COCO, large 46-52 %, small 10-12 %.
    """
    scenes, turned = [], []
    for pair in range(len(shards)):
        names = [listed['name'] for listed in objects_of(shards, pair)]
        start = pair % len(names)
        scenes.append(names)
        turned.append(names[start:] + names[:start])
    drawings = [preprocess(draw_alone(name)) for name in NAMES]
    drawings = torch.stack(drawings).to(model.logit_scale.device)                       # (K, 3, S, S)
    alone, _ = model.encode_image(drawings)                                             # (K, D)
    captions = ['a ' + ' and a '.join(names) for names in turned]
    text_features = embed_texts(model, tokenizer, captions)
    return {
        'name': nearest(scores, scenes),
        'drawing': nearest(image_features @ unit(alone).cpu().T, scenes),
        'caption': nearest(name_scores(model, tokenizer, text_features), turned)}


# --- 5. Pictures -----------------------------------------------------------------------------------------------------

def naming_picture(scores, groups, shards, path, wrong):
    """PNG of the first twelve scenes. Above each a line per object: its name / the best of its wrong ones, `absent` or
    `mixed`; green where the name is above it, else red."""
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
        image = image.resize((256, 256))
        image = ImageOps.expand(image, (0, 68, 0, 0))
        draw = ImageDraw.Draw(image)
        for number, (line, colour) in enumerate(lines[pair]):
            draw.text((4, 16 * number), line, colour, font_size=13)
        tiles.append(pil_to_tensor(image) / 255)
    save_image(tiles, path, nrow=4)


def track_attention(folder, model, tokenizer, preprocess, shards, step):
    """folder/attention.png: C^I and C^T, asked for the objects of the first scene by their names. folder/strip.png: the
    maps of C^I of all steps so far, side by side. A plain CLIP has no such maps: nothing happens."""
    if not model.config.cross_heads:
        return
    captions = [f"a {listed['name']}" for listed in objects_of(shards, 0)]
    path = Path(folder, 'attention', f'{step:09d}.png')
    path.parent.mkdir(exist_ok=True)
    attention_picture(model, tokenizer, preprocess, shard_image(shards, 0), captions, path)
    shutil.copy(path, Path(folder, 'attention.png'))
    columns = []
    for each in sorted(path.parent.glob('*.png')):
        whole = Image.open(each)
        maps = whole.crop((232, 0, 464, whole.height - 22))             # the second column of attention_picture
        ImageDraw.Draw(maps).text((12, 12), f'step {int(each.stem)}', 'white')
        columns.append(pil_to_tensor(maps) / 255)
    save_image(columns, Path(folder, 'strip.png'), nrow=len(columns), padding=0)


def during_training(model, tokenizer, preprocess, image_features, shards, folder, step):
    """For an evaluation of train.py -> the figures of eval.json; attention.png and strip.png in `folder`
    are brought up to date."""
    groups = listed_objects(shards)
    if not groups:                                  # objects of another kind
        return {}
    track_attention(folder, model, tokenizer, preprocess, shards, step)
    scores = name_scores(model, tokenizer, image_features)
    return presence_and_binding(scores, groups)


# --- 6. Command ------------------------------------------------------------------------------------------------------

def run(args, model, tokenizer, preprocess):
    """All figures, and the naming picture."""
    shards = Shards(args.shards)
    groups = listed_objects(shards)
    need(groups, f'{args.shards} lists no objects with absent and mixed names; draw a set by python -m lesson.scenes')
    image_features = embed_images(model, shards, preprocess, workers=args.workers)
    scores = name_scores(model, tokenizer, image_features)
    figures = presence_and_binding(scores, groups)
    for role, group in groups.items():
        probe = probe_scores(image_features, group)
        hits = defaultdict(list)
        for thing in group:
            color, _ = thing.name.split()
            clean = clean_names(NAMES, thing.scene)
            other_shapes = [f'{color} {name.split()[1]}' for name in clean]     # repeats change nothing
            hits['all_top1'].append(presence(scores, thing, clean))
            hits['shape_top1'].append(presence(scores, thing, other_shapes))
            hits['probe_top1'].append(presence(probe, thing, thing.absent))
        for figure, found in hits.items():
            figures[role][figure] = fmean(found)
    if args.pictures:
        for wrong in ('absent', 'mixed'):
            naming_picture(scores, groups, shards, f'{args.pictures}-{wrong}.png', wrong)
    figures['nearest'] = three_tests(model, tokenizer, preprocess, image_features, scores, shards)
    figures['pointing'] = pointing(model, tokenizer, preprocess, shards)
    figures['segmentation'] = segmentation(model, tokenizer, shards)
    return figures


def main():
    parser = Parser(prog='python -m lesson.suppression', epilog=__doc__)
    add_options(parser)
    parser.set_defaults(command='suppression', run=run)
    parser.add_argument('--shards', required=True, help='held-out shards that list objects, as runs/scenes/val')
    parser.add_argument('--pictures', metavar='NAME', help='NAME-absent.png and NAME-mixed.png: which names win')
    execute(parser.parse_args())


if __name__ == '__main__':
    cli(main)
