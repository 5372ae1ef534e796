"""The images of a folder, ranked for a query in words or for another image, with a contact sheet.

    python -m extras.search CKPT --images DIR "a red star" --out found.png
    python -m extras.search CKPT --images DIR --like a.jpg
    python -m extras.search CKPT --images DIR "a red star" --json ranking.json --save features.pt

--json FILE has all images in their order under 'ranking'. --save FILE takes {'paths': [n strings], 'features': (n, D)},
unit vectors in the same order, for torch.load(FILE, weights_only=True).
Features are kept in torch's cache, where CLIP's vocabulary is: a file for each folder of images, refreshed when images
change. Nothing is written into the folder or beside it.
"""
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps
from torchvision.transforms.functional import to_tensor
from torchvision.utils import save_image

from data import Parser, cli, digest, picture_font, read_image, replacing
from eval import (add_options, embed_images, embed_labelled, embed_texts, execute, images_in, need,
                  read_checkpoint)
from extras.prepare import LeftOut

TILE = 176              # side of an image in the sheet, in pixels
LABEL = 50              # three lines below it

# --- 1. Features of a folder -----------------------------------------------------------------------------------------

def read_index(path):
    """{stamp: feature} of an earlier call. A file that is none of ours counts as empty."""
    try:
        index = read_checkpoint(path)
    except ValueError:
        index = None
    return index if isinstance(index, dict) else {}


def write_index(path, index):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            torch.save(index, partial)
        print(f'features   {path}')
    except (OSError, ValueError) as error:      # a full disk, or a home that one may only read
        print(f'not kept   {error}')


@dataclass
class Files:
    """A source for embed_labelled: (image, 1); for one that cannot be read (blank image, 0)."""
    paths: list

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            return read_image(self.paths[i]), 1
        except ValueError:
            return Image.new('RGB', (8, 8)), 0


def folder_features(model, preprocess, folder, workers=0):
    """All images under a folder -> (paths, features (n, D), how many were left out because they cannot be read).

    Only what is new or changed since the last call is embedded. Other weights start over.
    """
    need(Path(folder).is_dir(), f'--images {folder} is missing or no folder; give a folder of images')
    paths = images_in(folder)
    need(paths, f'{folder} holds no jpg, jpeg, png or webp image')
    index = Path(torch.hub.get_dir(), f'features-{digest(Path(folder).resolve())}.pt')
    known = read_index(index)
    weights = digest(model.visual.proj[0].tolist())         # enough to tell one model from another
    stamps = {}                                             # path: what changes when the file does
    for path in paths:
        stat = path.stat(follow_symlinks=path.exists())             # a link may lead nowhere
        stamps[path] = digest(path.relative_to(folder), stat.st_size, stat.st_mtime_ns, weights)
    left_out = LeftOut()
    new = [path for path in paths if stamps[path] not in known]
    if new:
        embedded, readable = embed_labelled(model, Files(new), preprocess, workers=workers)
        for path, feature, good in zip(new, embedded, readable):
            if good:
                known[stamps[path]] = feature
                continue
            try:                                    # again: a loader's worker cannot say what is wrong
                read_image(path)
            except ValueError as error:
                left_out.add(error)
        left_out.end()
    paths = [path for path in paths if stamps[path] in known]
    need(paths, f'no image of {folder} can be read')
    features = torch.stack([known[stamps[path]] for path in paths])
    if new:
        write_index(index, dict(zip(map(stamps.get, paths), features)))
    return paths, features, left_out.count


# --- 2. Contact sheet ------------------------------------------------------------------------------------------------

def draw_tile(path, label):
    """An image with a label of up to three lines below, (3, h, w) in [0, 1]."""
    tile = Image.new('RGB', (TILE, TILE + LABEL), 'white')
    image = read_image(path).convert('RGB')
    tile.paste(ImageOps.pad(image, (TILE, TILE), color='white'))
    lines = textwrap.fill(label, 25)
    ImageDraw.Draw(tile).text((2, TILE + 2), lines, 'black', picture_font(12))
    return to_tensor(tile)


# --- 3. Command ------------------------------------------------------------------------------------------------------

def run_search(args, model, tokenizer, preprocess):
    if args.like:
        query = embed_images(model, [args.like], preprocess)[0]
    else:
        query = embed_texts(model, tokenizer, args.query)[0]
    paths, features, left_out = folder_features(model, preprocess, args.images, args.workers)
    scores, order = (features @ query).sort(descending=True)
    ranking = []
    for i, score in zip(order, scores.tolist()):
        ranking.append({'image': str(paths[i]), 'score': score})
    tiles = []
    for i, found in zip(order, ranking[:args.top]):
        print(f"{found['score']:.4f}  {found['image']}")
        name = paths[i].relative_to(args.images)
        tiles.append(draw_tile(paths[i], f"{found['score']:.3f} {name}"))
    save_image(tiles, args.out, nrow=6, pad_value=1)
    if args.save:
        with replacing(args.save) as partial:
            torch.save({'paths': list(map(str, paths)), 'features': features}, partial)
    return {'images': len(paths), 'left out': left_out, 'picture': args.out, 'ranking': ranking}


def main():
    parser = Parser(prog='python -m extras.search', epilog=__doc__)
    add_options(parser)
    parser.set_defaults(command='search', run=run_search)
    parser.add_argument('query', nargs='*', help='what to look for, in quotes')
    parser.add_argument('--like', help='an image to look for instead of words')
    parser.add_argument('--images', required=True, help='folder of images')
    parser.add_argument('--top', type=int, default=12, help='how many to show (default: %(default)s)')
    parser.add_argument('--out', default='search.png', help='the contact sheet (default: %(default)s)')
    parser.add_argument('--save', help='also write the features and their paths to this file')
    # Not parse_args: before Python 3.13 it does not find an optional word behind flags.
    args = parser.parse_intermixed_args()
    need(len(args.query) < 2, f'a query of several words needs quotes: "{" ".join(args.query)}"')
    need(bool(args.query) != bool(args.like), 'give a query in words or --like IMAGE, not both')
    need(args.top > 0, f'--top {args.top} shows nothing; give 1 or more')
    execute(args)


if __name__ == '__main__':
    cli(main)
