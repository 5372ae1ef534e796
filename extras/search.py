"""The images of a folder, ranked for a query in words or for another image, with a contact sheet.

    python -m extras.search CKPT --images DIR "a red star"
    python -m extras.search CKPT --images DIR --like a.jpg

Features are kept in DIR.features.pt beside the folder, and refreshed when files change.
"""
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps
from torchvision.transforms.functional import to_tensor
from torchvision.utils import save_image

from data import Parser, cli, read_image, replacing
from eval import add_options, embed_images, embed_texts, execute, images_in, need, read_checkpoint

TILE = 176              # side of an image in the sheet, in pixels

# --- 1. Features of a folder -----------------------------------------------------------------------------------------

def file_stamp(path, folder):
    """What changes when the file does: its name in the folder, size and time."""
    stat = path.stat()
    return f'{path.relative_to(folder)}|{stat.st_size}|{stat.st_mtime_ns}'


def read_cache(path, weights):
    """{stamp: feature} of an earlier call with the same weights. What is no such file is made anew."""
    try:
        saved = read_checkpoint(path)
        return saved['features'] if torch.equal(saved['weights'], weights) else {}
    except (ValueError, KeyError, TypeError):
        return {}


def write_cache(path, weights, features):
    try:
        with replacing(path) as partial:
            torch.save({'weights': weights, 'features': features}, partial)
    except (OSError, RuntimeError) as error:    # torch's own, beside a folder that one may only read
        print(f'not kept   {path}: {error}')


def is_readable(path):
    try:
        read_image(path)
        return True
    except ValueError as error:
        print(f'left out   {error}')
        return False


def folder_features(model, preprocess, folder, workers=0):
    """All images under a folder -> (paths, features (n, D)). What cannot be read is named and left out.

    Only what is new or changed since the last call is embedded. Other weights start over.
    """
    paths = images_in(folder)
    need(paths, f'{folder} holds no jpg, jpeg, png or webp image')
    cache = Path(f'{Path(folder).resolve()}.features.pt')
    weights = model.visual.proj.detach().cpu()              # enough to tell one model from another
    features = read_cache(cache, weights)
    stamps = {path: file_stamp(path, folder) for path in paths}
    new = [path for path in paths if stamps[path] not in features]
    with ThreadPoolExecutor() as pool:
        readable = [path for path, good in zip(new, pool.map(is_readable, new)) if good]
    if readable:
        embedded = embed_images(model, readable, preprocess, workers=workers)
        for path, feature in zip(readable, embedded):
            features[stamps[path]] = feature.clone()        # NB: a view would be saved with its whole matrix
    paths = [path for path in paths if stamps[path] in features]
    need(paths, f'no image of {folder} can be read')
    present = {stamps[path]: features[stamps[path]] for path in paths}
    if readable:
        write_cache(cache, weights, present)
    return paths, torch.stack(list(present.values()))


# --- 2. Contact sheet ------------------------------------------------------------------------------------------------

def draw_tile(path, score):
    """An image with its score and name below, (3, h, w) in [0, 1]."""
    tile = Image.new('RGB', (TILE, TILE + 20), 'white')
    image = read_image(path).convert('RGB')
    tile.paste(ImageOps.pad(image, (TILE, TILE), Image.BICUBIC, 'white'))
    ImageDraw.Draw(tile).text((0, TILE + 2), f'{score:.3f} {path.name}'[:25], 'black', font_size=12)
    return to_tensor(tile)


def contact_sheet(paths, scores, out):
    """PNG of images in rows of six, best first."""
    tiles = [draw_tile(path, score) for path, score in zip(paths, scores)]
    save_image(tiles, out, nrow=6, pad_value=1)


# --- 3. Command ------------------------------------------------------------------------------------------------------

def run_search(args, model, tokenizer, preprocess):
    paths, features = folder_features(model, preprocess, args.images, args.workers)
    if args.like:
        query = embed_images(model, [args.like], preprocess)[0]
    else:
        query = embed_texts(model, tokenizer, [args.query])[0]
    scores, best = (features @ query).topk(min(args.top, len(paths)))
    found = [paths[i] for i in best]
    contact_sheet(found, scores.tolist(), args.out)
    for path, score in zip(found, scores.tolist()):
        print(f'{score:.4f}  {path}')
    return {'images': len(paths), 'picture': args.out}


def main():
    parser = Parser(description=__doc__.split('\n')[0])
    add_options(parser)
    parser.set_defaults(command='search', run=run_search)
    parser.add_argument('query', nargs='?', help='what to look for')
    parser.add_argument('--like', help='an image to look for instead of words')
    parser.add_argument('--images', required=True, help='folder of images')
    parser.add_argument('--top', type=int, default=12, help='how many to show')
    parser.add_argument('--out', default='search.png', help='the contact sheet')
    # Not parse_args: before Python 3.13 it does not find an optional word behind flags.
    args = parser.parse_intermixed_args()
    need(bool(args.query) != bool(args.like), 'search takes a query in words, or --like IMAGE')
    need(args.top > 0, f'--top {args.top} shows nothing; give 1 or more')
    execute(args)


if __name__ == '__main__':
    cli(main)
