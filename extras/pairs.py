"""Hard negatives: can the model match k images with k captions (mostly two of each) that differ in only one thing?

    python -m extras.pairs CKPT --items FILE --images DIR     SugarCrepe, SVO-Probes, Winoground, MMVP-VLM, or your own
    python -m extras.pairs CKPT --suppression DIR             are small objects found as well as big (dominant) ones?

Your own items are JSON lines, {"images": ["a.jpg", "b.jpg"], "captions": ["a dog on a cat", "a cat on a dog"],
"type": "relation"}. An item has k images and k captions, and those at equal positions belong together. An item may
also have one image and k captions, or k images and one caption; then the first of the k is the right one. The probes of
--suppression are listed in DIR/probes.json; docs/data.md shows one.
"""
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from eval import embed_images, embed_texts, execute
from plumbing.errors import Refused, command, need
from plumbing.files import field, read_json
from plumbing.lists import read_rows
from plumbing.options import Parser, add_checkpoint

# --- 1. Items, and the layouts they are published in -----------------------------------------------------------------

class Item(NamedTuple):
    """Image i and caption i belong together. A single image belongs to the first caption, and a single caption to the
    first image."""
    images: list            # names
    captions: list
    kind: str = None        # what kind of thing differs; scores are given per kind


# A published layout is recognised by the columns of its images and of its captions.
COLUMNS = [
    (['filename'], ['caption', 'negative_caption']),                    # SugarCrepe
    (['pos_image_id', 'neg_image_id'], ['sentence']),                   # SVO-Probes
    (['image_0', 'image_1'], ['caption_0', 'caption_1'])]               # Winoground


def read_item(row, place):
    """A row in one of the layouts -> Item. A row of MMVP-VLM is half an item: the next one has the other image and
    statement."""
    kind = row.get('type') or row.get('tag')
    for name in 'subj_neg', 'verb_neg', 'obj_neg':                      # SVO-Probes
        if str(row.get(name)).lower() == 'true':
            kind = name
    if 'images' in row and 'captions' in row:
        return Item(row['images'], row['captions'], kind)
    if row.keys() >= {'Question ID', 'Type', 'Statement'}:              # MMVP-VLM
        return Item([f"{row['Type']}/{row['Question ID']}"], [f"a photo of {row['Statement']}"], row['Type'])
    for images, captions in COLUMNS:
        if row.keys() >= {*images, *captions}:
            return Item([row[name] for name in images], [row[name] for name in captions], kind)
    raise Refused(f"{place} has the keys {', '.join(row)}; it needs images and captions, "
                  'or the keys of SugarCrepe, SVO-Probes, Winoground or MMVP-VLM')


def join_halves(halves):
    """MMVP-VLM: rows 1 and 2 are an item of two images and two statements, rows 3 and 4 the next."""
    items = []
    for first, second in zip(halves[::2], halves[1::2]):
        items.append(Item(first.images + second.images, first.captions + second.captions, first.kind))
    return items


def check_item(item, place):
    """Refused unless the item asks a question that has one right answer."""
    need(isinstance(item.images, list) and isinstance(item.captions, list),
         f'{place} needs a list of image names and a list of captions')
    k = len(item.images)
    m = len(item.captions)
    few, many = sorted((k, m))
    need(many > 1 and few in (1, many),
         f'{place} has {k} images and {m} captions; give k and k, k and 1, or 1 and k')


def read_items(path):
    """The items of a hard-negative test, from JSONL, JSON or CSV in one of the layouts above."""
    rows = read_rows(path)
    items = []
    for number, row in enumerate(rows, 1):
        items.append(read_item(row, f'item {number} of {path}'))
    if 'Question ID' in rows[0]:
        need(len(items) % 2 == 0,
             f'{path} has {len(items)} rows, but in MMVP-VLM two rows make an item; is the file complete?')
        items = join_halves(items)
    for number, item in enumerate(items, 1):
        check_item(item, f'item {number} of {path}')
    return items


# --- 2. Scores -------------------------------------------------------------------------------------------------------

def choices_right(scores):
    """scores (k images, m captions) -> min(k, m) bools, one for each caption j that has a right image, which is image
    j: does this image score above all others? A tie is a miss. scores.T gives the same for images and their captions.

    A single image is always right, because there are no others.
    """
    right = scores.diagonal()
    behind = scores[:, :len(right)] < right                 # False for the right one itself
    return (behind.sum(dim=0) == len(scores) - 1).tolist()


def pair_scores(matrices):
    """Score matrices (k images, m captions), one per item -> shares of items.

    image_score: each caption finds its image. text_score: each image finds its caption. group_score: both. These are
    Winoground's definitions. Guessing is right about one of k images with probability 1/k.
    """
    k, m = matrices[0].shape
    questions = min(k, m)
    image_right = [all(choices_right(scores)) for scores in matrices]
    text_right = [all(choices_right(scores.T)) for scores in matrices]
    figures = {'items': len(matrices)}
    if k > 1:
        figures['image_score'] = fmean(image_right)
        figures['image_chance'] = k ** -questions
    if m > 1:
        figures['text_score'] = fmean(text_right)
        figures['text_chance'] = m ** -questions
    if questions > 1:
        both_right = [all(sides) for sides in zip(image_right, text_right)]
        figures['group_score'] = fmean(both_right)
    return figures


ENDINGS = '.jpg', '.jpeg', '.png', '.webp'


def find_image(root, name):
    """The file of an image. Published tables name it with or without an ending."""
    for ending in ENDINGS:
        path = Path(root, f'{name}{ending}')
        if path.is_file():
            return path
    return Path(root, f'{name}')


def score_items(model, tokenizer, preprocess, items, root, workers):
    """Items -> their score matrices (k, m). Every image and every caption is embedded once."""
    names = {}              # name: row of its feature
    captions = {}
    for item in items:
        for name in item.images:
            names.setdefault(name, len(names))
        for caption in item.captions:
            captions.setdefault(caption, len(captions))
    paths = [find_image(root, name) for name in names]
    image = embed_images(model, paths, preprocess, workers=workers)
    text = embed_texts(model, tokenizer, list(captions))
    matrices = []
    for item in items:
        rows = image[[names[name] for name in item.images]]
        columns = text[[captions[caption] for caption in item.captions]]
        matrices.append(rows @ columns.T)
    return matrices


def score_pairs(model, tokenizer, preprocess, path, root, workers):
    """The scores of a file of items: for all items of one shape (number of images x number of captions), and within a
    shape for each kind."""
    items = read_items(path)
    groups = defaultdict(list)
    all_scores = score_items(model, tokenizer, preprocess, items, root, workers)
    for item, scores in zip(items, all_scores):
        shape = f'{len(item.images)} x {len(item.captions)}'
        groups[f'all {shape}'].append(scores)
        if item.kind:
            groups[f'{item.kind} {shape}'].append(scores)
    return {name: pair_scores(matrices) for name, matrices in groups.items()}


# --- 3. Feature suppression ------------------------------------------------------------------------------------------

def suppression(model, tokenizer, preprocess, root, workers=0):
    """Feature suppression (is the small object drowned out by the dominant one?), measured on root/probes.json for both
    objects of each probe.

    Scenes A and B differ only in the small object, A and C only in the dominant one. scene_top1: of two scenes, how
    often does an object's name find the one that has it? standard_error is that of scene_top1, over probes. name_top1:
    how often does scene A score higher with the name of its object than with any of the probe's negatives?
    """
    path = Path(root, 'probes.json')
    probes = read_json(path)
    need(probes, f'{path} lists no probe')
    figures = {}
    for role, other in (('dominant', 'C'), ('small', 'B')):
        scenes = []
        names = []
        for probe in probes:
            images = field(probe, 'images', path)
            query = field(probe, f'{role}_query', path)
            right = field(query, 'positive', path)
            scene = field(images, 'A', path)
            scenes.append(Item([scene, field(images, other, path)], [right, field(query, 'swap', path)]))
            negatives = field(query, 'negatives', path, list)
            need(negatives, f'a {role}_query of {path} has no negatives; give it one or more')
            names.append(Item([scene], [right, *negatives]))
        # together, so that each image is embedded once
        matrices = score_items(model, tokenizer, preprocess, scenes + names, root, workers)
        share = [fmean(choices_right(scores)) for scores in matrices[:len(probes)]]
        named = pair_scores(matrices[len(probes):])
        figures[role] = {'probes': len(probes),
                         'scene_top1': fmean(share), 'scene_chance': 0.5,
                         'name_top1': named['text_score'], 'name_chance': named['text_chance']}
        if len(probes) > 1:
            figures[role]['standard_error'] = stdev(share) / math.sqrt(len(probes))
    return figures


# --- 4. Command ------------------------------------------------------------------------------------------------------

def run_pairs(args, model, tokenizer, preprocess):
    if args.suppression:
        need(not args.images, '--images goes with --items; the images of probes.json lie in its own folder')
        return suppression(model, tokenizer, preprocess, args.suppression, args.workers)
    root = args.images or Path(args.items).parent
    return score_pairs(model, tokenizer, preprocess, args.items, root, args.workers)


def main():
    parser = Parser(prog='python -m extras.pairs', epilog=__doc__,
                    usage='%(prog)s CKPT --items FILE | --suppression DIR [options]')
    add_checkpoint(parser)
    parser.set_defaults(command='pairs', function=run_pairs)
    one = parser.add_mutually_exclusive_group(required=True).add_argument
    one('--items', help='JSONL of images and captions, or a file of one of the four published sets')
    one('--suppression', help='folder with probes.json')
    parser.add_argument('--images', help='folder of the images of --items (default: the folder of that file)')
    execute(parser.parse_args())


if __name__ == '__main__':
    command(main)
