"""Rank the images of a folder for a query in words or for another image, and draw the best on a contact sheet, in the
order in which they are printed, six in a row.

    python -m extras.search CKPT --images DIR "a red star" --out found.png
    python -m extras.search CKPT --images DIR --like a.jpg
    python -m extras.search CKPT --images DIR "a red star" --json ranking.json --features features.pt

--json FILE lists all images, with their scores, under 'ranking', best first. --features FILE keeps the features of the
images for the next query. They are computed anew if the model has changed, or if images were added, removed or changed.
Other programs can read them, too: torch.load(FILE, weights_only=True) gives {'paths': [n strings], 'features': (n, D),
...}, unit vectors in the same order.
"""
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Callable

import torch
from PIL import ImageOps
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_tensor
from torchvision.utils import save_image

from eval import embed_images, embed_labelled, embed_texts, execute
from plumbing.errors import Unreadable, command, need
from plumbing.files import replacing, save_tensors
from plumbing.images import images_in, read_image
from plumbing.options import Parser, add_checkpoint, positive
from plumbing.weights import read_checkpoint

TILE = 176              # side of an image in the sheet, in pixels

# --- 1. Features of a folder -----------------------------------------------------------------------------------------

@dataclass
class Photographs(Dataset):
    """Item i: pixels (3, S, S) of image i, and whether it can be read; if not, it is named, and its pixels are 0."""
    paths: list
    preprocess: Callable
    size: int

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            return self.preprocess(read_image(self.paths[i])), True
        except Unreadable as error:
            print(f'left out   {error}', flush=True)
            return torch.zeros(3, self.size, self.size), False


def folder_features(model, preprocess, folder, file=None, workers=0):
    """All readable images under a folder -> {'paths', 'features', 'source'}. `file` keeps this for the next call."""
    paths = images_in(folder)
    # What the features depend on: the model, for which some weights and the sizes are enough, and the images.
    source = [*model.visual.proj[0].tolist(), str(model.config)]
    for path in paths:
        stat = path.stat() if path.exists() else path.lstat()       # of what a link leads to, unless that is gone
        source += [str(path), stat.st_size, stat.st_mtime]
    if file and Path(file).exists():
        saved = read_checkpoint(file)
        need('source' in saved, f'{file} holds no features; give --features another file')
        if saved['source'] == source:
            return saved
    need(paths, f'{folder} has no images; give a folder of JPEG, PNG or WebP files')
    photographs = Photographs(paths, preprocess, model.config.image_size)
    features, is_readable = embed_labelled(model, photographs, workers)
    readable = [str(path) for path, can_be_read in zip(paths, is_readable) if can_be_read]
    need(readable, f'{folder} has no image that can be read')
    found = {'paths': readable, 'features': features[is_readable], 'source': source}
    if file:
        save_tensors(file, found)
    return found


# --- 2. Contact sheet and command ------------------------------------------------------------------------------------

def run_search(args, model, tokenizer, preprocess):
    if args.like:
        query = embed_images(model, [args.like], preprocess)[0]
    else:
        query = embed_texts(model, tokenizer, args.query)[0]
    found = folder_features(model, preprocess, args.images, args.features, args.workers)
    scores = (found['features'] @ query).tolist()
    ranking = [{'image': path, 'score': score} for path, score in zip(found['paths'], scores)]
    ranking.sort(key=itemgetter('score'), reverse=True)
    tiles = []
    for place in ranking[:args.top]:
        tiles.append(to_tensor(ImageOps.pad(read_image(place['image']), (TILE, TILE), color='white')))
    with replacing(args.out) as partial:
        save_image(tiles, partial, format='png', nrow=6, pad_value=1)
    for place in ranking[:args.top]:                # last, because with `| head` printing may fail
        print(f"{place['score']:.4f}  {place['image']}")
    return {'images': len(ranking), 'picture': args.out, 'ranking': ranking}


def main():
    parser = Parser(prog='python -m extras.search', epilog=__doc__,
                    usage='%(prog)s CKPT --images DIR QUERY [options]')
    add_checkpoint(parser)
    parser.set_defaults(command='search', function=run_search)
    add = parser.add_argument
    add('query', nargs='*', help='what to look for, in quotes')
    add('--like', help='an image to look for instead of words')
    add('--images', required=True, help='folder of images')
    add('--top', type=positive, default=12, help='how many to show (default: %(default)s)')
    add('--out', default='runs/search.png', help='the contact sheet (default: %(default)s)')
    add('--features', help='file that keeps the features of the images')
    # Before Python 3.13 parse_args misses a positional argument with nargs='*' that comes after flags.
    args = parser.parse_intermixed_args()
    need(len(args.query) + bool(args.like) == 1,
         f'give either one query, in quotes if it has several words, or --like IMAGE; the query was {args.query}')
    execute(args)


if __name__ == '__main__':
    command(main)
