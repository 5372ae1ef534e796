"""Hard negatives: can the model match k images with k captions (mostly two of each) that differ in only one thing?

    python -m extras.pairs CKPT --items FILE --images DIR     SugarCrepe, SVO-Probes, MMVP-VLM, or your own

Your own items are JSON lines, {"images": ["a.jpg", "b.jpg"], "captions": ["a dog on a cat", "a cat on a dog"],
"type": "relation"}. An item has k images and k captions, and those at equal positions belong together. An item may
also have one image and k captions, or k images and one caption; then the first of the k is the right one.
"""
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch

from eval import TIE, embed_images, embed_texts, execute
from plumbing.errors import Refused, command, need
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
    (['pos_image_id', 'neg_image_id'], ['sentence'])]                   # SVO-Probes


def read_item(row, place):
    """A row in one of the layouts -> Item. A row of MMVP-VLM is half an item: the next one has the other image and
    statement."""
    kind = row.get('type')
    for name in 'subj_neg', 'verb_neg', 'obj_neg':                      # SVO-Probes
        if str(row.get(name)).lower() == 'true':
            kind = name
    if 'images' in row and 'captions' in row:
        return Item(row['images'], row['captions'], kind)
    if row.keys() >= {'Question ID', 'Type', 'Statement'}:              # MMVP-VLM
        kind = row['Type']
        return Item([f"{kind}/{row['Question ID']}"], [f"a photo of {row['Statement']}"], kind)
    for images, captions in COLUMNS:
        if row.keys() >= {*images, *captions}:
            return Item([row[name] for name in images], [row[name] for name in captions], kind)
    raise Refused(f"{place} has the keys {', '.join(row)}; it needs images and captions, "
                  'or the keys of SugarCrepe, SVO-Probes or MMVP-VLM')


def read_items(path):
    """The items of a hard-negative test, from JSONL, JSON or CSV in one of the layouts above. Refused unless each item
    asks a question that has one right answer."""
    rows = read_rows(path)
    items = []
    for number, row in enumerate(rows, 1):
        items.append(read_item(row, f'item {number} of {path}'))
    if 'Question ID' in rows[0]:            # MMVP-VLM: rows 1 and 2 are an item, rows 3 and 4 the next
        halves = zip(items[::2], items[1::2], strict=True)
        items = [Item(a.images + b.images, a.captions + b.captions, a.kind) for a, b in halves]
    for number, (images, captions, _) in enumerate(items, 1):
        # A text in place of a list would be a list of letters.
        is_list = isinstance(images, list) and isinstance(captions, list)
        few, many = sorted((len(images), len(captions)))
        need(is_list and many > 1 and few in (1, many),
             f'item {number} of {path} needs a list of k images and one of k captions; one of the two may be of 1')
    return items


# --- 2. Scores -------------------------------------------------------------------------------------------------------

def choices_right(scores):
    """scores (k images, m captions) -> min(k, m) bools, one for each caption j that has a right image, which is image
    j: does this image score above all others? A tie is a miss. scores.T gives the same for images and their captions.
    """
    right = scores.diagonal()
    behind = scores[:, :len(right)] < right - TIE           # False for the right one itself
    return (behind.sum(dim=0) == len(scores) - 1).tolist()


def pair_scores(matrices):
    """Score matrices (k images, m captions), one per item -> shares of items.

    image_score: each caption finds its image. text_score: each image finds its caption. Guessing is right about one of
    k images with probability 1/k.
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
    return figures


def find_image(root, name):
    """The file of an image. Published tables name it with or without an ending."""
    for ending in '.jpg', '.jpeg', '.png', '.webp':
        path = Path(root, f'{name}{ending}')
        if path.is_file():
            return path
    return Path(root, f'{name}')


# --- 3. Command ------------------------------------------------------------------------------------------------------

def run_pairs(args, model, tokenizer, preprocess):
    """The scores of a file of items: for all items of one shape (number of images x number of captions), and within a
    shape for each kind."""
    items = read_items(args.items)
    root = args.images or Path(args.items).parent
    images = {}             # name: vector; each image and each caption is embedded once
    captions = {}
    for item in items:
        images.update(dict.fromkeys(item.images))
        captions.update(dict.fromkeys(item.captions))
    paths = [find_image(root, name) for name in images]
    images.update(zip(images, embed_images(model, paths, preprocess, workers=args.workers)))
    captions.update(zip(captions, embed_texts(model, tokenizer, list(captions))))
    groups = defaultdict(list)
    for item in items:
        rows = torch.stack([images[name] for name in item.images])
        columns = torch.stack([captions[caption] for caption in item.captions])
        scores = rows @ columns.T           # in double precision
        shape = f'{len(item.images)} x {len(item.captions)}'
        groups[f'all {shape}'].append(scores)
        if item.kind:
            groups[f'{item.kind} {shape}'].append(scores)
    return {name: pair_scores(matrices) for name, matrices in groups.items()}


def main():
    parser = Parser(prog='python -m extras.pairs', epilog=__doc__,
                    usage='%(prog)s CKPT --items FILE [options]')
    add_checkpoint(parser)
    parser.set_defaults(command='pairs', function=run_pairs)
    add = parser.add_argument
    add('--items', required=True, help='JSONL of images and captions, or a file of a published set')
    add('--images', help='folder of the images of --items (default: the folder of that file)')
    execute(parser.parse_args())


if __name__ == '__main__':
    command(main)
