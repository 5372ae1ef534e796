"""A run as one page: curves, what the student sees, where the heads look, what retrieval confuses.

    python -m extras.report runs/tiny-cosmos                    writes runs/tiny-cosmos/report.html
    python -m extras.report runs/tiny-cosmos runs/tiny-clip     both on one page, in the folder of the first

The page is one file that opens from disk; report.html beside this module is its template. `train.py` writes it at the
end of a run. Before, it calls `begin` once and `store` at each evaluation: they leave in maps.npz what the page shows
beside config.json, log.jsonl and eval.json. So the page needs neither weights nor data.
"""
import base64
import io
import json
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from torchvision.transforms.v2.functional import to_pil_image

from cosmos import unit
from data import Parser, cli, read_image, replacing, sample_views
from eval import (need, ranks, read_json, read_lines, shard_captions, shard_image, stretch,
                  word_weights)

SHOWN = 24              # images of the explorer, the first held-out ones
RIVALS = 5              # captions of other images that an image is asked about, too
EXAMPLES = 10           # of hits, and of misses
MOST_STEPS = 6          # with maps on a page
MOST_LINES = 400        # of the log
SIDE = 224              # of an image on the page, in pixels
SMALL = 128

# --- 1. During training: what a run leaves in maps.npz ---------------------------------------------------------------

def keep(folder, name, part):
    """Adds a part of the page, as bytes of JSON, to folder/maps.npz. Tensors of one number become that."""
    path = Path(folder, 'maps.npz')
    arrays = {}
    with suppress(Exception), np.load(path) as stored:      # none yet, or a damaged one, which is replaced
        arrays = dict(stored)
    arrays[name] = json.dumps(part, default=float).encode()
    with replacing(path) as partial, open(partial, 'wb') as file:
        np.savez_compressed(file, **arrays)


def picture(image, side):
    """Pillow image -> a JPEG of at most this side, as a data URI."""
    image = image.convert('RGB')
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, 'JPEG', quality=90)
    return 'data:image/jpeg;base64,' + base64.b64encode(file.getvalue()).decode()


def begin(views, folder):
    """What is known before the first step: four pairs as the student sees them, and how the run was started."""
    pairs = []
    for index, crops, captions, boxes in sample_views(views):
        image = read_image(views.shards.image(index))
        pairs.append({
            'image': picture(image, SIDE),
            'size': image.size,                             # in which the boxes are given
            'crops': [picture(to_pil_image(crop), SMALL) for crop in crops],
            'boxes': boxes,                                 # (y, x, h, w)
            'captions': captions})
    machine = platform.platform()
    if torch.cuda.is_available():
        machine += f', {torch.cuda.get_device_name()}'
    here = shlex.quote(str(Path(__file__).parent))
    keep(folder, 'start', {
        'pairs': pairs,
        'counts': views.counts,
        'command': shlex.join(['python', *sys.argv]),
        'commit': subprocess.getoutput(f'git -C {here} describe --always --dirty 2> /dev/null'),
        'machine': machine,
        'versions': f'Python {platform.python_version()}, torch {torch.__version__}'})


def texts_about(i, pools, record):
    """What the explorer asks about image i: yields (kind, text, of). pools: the captions of each image.

    kind: caption, other (a caption of another image), name (of an object in the image), absent (a name of nothing in
    it). of: the number of the object with whose name an absent one is compared.
    """
    for caption in pools[i]:
        yield 'caption', caption, None
    others = pools[i + 1:] + pools[:i]
    for pool in others[:RIVALS]:
        yield 'other', pool[0], None
    for number, thing in enumerate(record.get('objects') or []):
        if 'absent' in thing:                               # else objects of another kind
            yield 'name', f"a {thing['name']}", number
            for name in thing['absent']:
                yield 'absent', f'a {name}', number


def ask(model, tokenizer, pixels, entries):
    """What the model makes of images (B, 3, S, S) and n texts about them, into their entries.

    cosine: of image and text. map: a byte a patch; 0 is the least of all patches, 255 the most. ends: that least and
    most. words: how much C^T reads each. Maps are the weights of C^I. A model without heads has none, and no words:
    there they are cosines of the patches.
    """
    owner = [entry['image'] for entry in entries]
    texts = [entry['text'] for entry in entries]
    distinct, rows = np.unique(texts, return_inverse=True)              # many images share a name
    ids = tokenizer(distinct.tolist()).to(pixels.device)
    eot, tokens = model.encode_text(ids)
    cls, patches = model.encode_image(pixels)
    eot = eot[rows]                                                     # (n, D)
    cls = cls[owner]                                                    # (n, D)
    if model.has_cross_attention:
        maps = model.image_cross.weights(eot, patches[owner])           # (n, P)
        weights = model.text_cross.weights(cls, tokens[rows])           # (n, T)
        for entry, row in zip(entries, weights):
            entry['words'] = word_weights(tokenizer, entry['text'], row)
    else:
        dense = model.encode_dense(pixels).flatten(1, 2)                # (B, P, D)
        maps = torch.einsum('npd,nd->np', dense[owner], unit(eot))
    cosines = torch.cosine_similarity(cls, eot)
    for entry, cosine, grid in zip(entries, cosines, maps.cpu()):
        levels = np.uint8(255 * stretch(grid.numpy()))
        entry['cosine'] = cosine
        entry['map'] = base64.b64encode(levels).decode()
        entry['ends'] = grid.aminmax()


def examples(shards, image_features, text_features, captions, owner):
    """The first images that find their caption, and the first that do not -> [{rank, sides}].

    sides: {text, cosine, image} of the best of its own captions, and of the best of all others.
    owner (captions,): the image of each caption.
    """
    images = torch.arange(len(image_features))
    rank = ranks(image_features, text_features, images, owner)
    found = []
    for wanted in rank == 1, rank > 1:
        for i in images[wanted][:EXAMPLES].tolist():
            scores = text_features @ image_features[i]      # (captions,)
            best = scores.where(owner == i, -2).argmax()
            rival = scores.where(owner != i, -2).argmax()
            sides = []
            for k in best, rival:
                image = shard_image(shards, owner[k].item())
                sides.append({'text': captions[k], 'cosine': scores[k], 'image': picture(image, SMALL)})
            found.append({'rank': rank[i], 'sides': sides})
    return found


@torch.no_grad()
def store(model, tokenizer, preprocess, shards, image_features, text_features, folder, step):
    """What the page shows of an evaluation. Features are those of all held-out images and captions."""
    captions, owner = shard_captions(shards)
    pools = [[] for _ in range(min(SHOWN, len(shards)))]
    for caption, i in zip(captions, owner):
        if i < SHOWN:
            pools[i].append(caption)
    pixels = []
    images = []
    entries = []
    for i in range(len(pools)):
        image = shard_image(shards, i)
        pixels.append(preprocess(image))
        images.append(picture(ImageOps.fit(image, (SIDE, SIDE)), SIDE))         # as the model sees it
        for kind, text, of in texts_about(i, pools, shards.record(i)):
            entries.append({'image': i, 'kind': kind, 'text': text, 'of': of})
    ask(model, tokenizer, torch.stack(pixels).to(model.logit_scale.device), entries)
    keep(folder, f'step {step:09d}', {'step': step, 'texts': entries})
    keep(folder, 'held_out', {
        'images': images,
        'examples': examples(shards, image_features, text_features, captions, owner)})


# --- 2. The page -----------------------------------------------------------------------------------------------------

def read_log(path):
    """Entries of log.jsonl, of a long one some MOST_LINES and all evaluations. A line cut short is left out."""
    lines = read_lines(path)
    every = len(lines) // MOST_LINES + 1
    entries = []
    for k, line in enumerate(lines):
        if k % every == 0 or '"eval"' in line:
            with suppress(ValueError):
                entries.append(json.loads(line))
    return entries


def read_maps(path):
    """maps.npz -> {start, held_out, steps: [{step, texts}]}; of many steps some MOST_STEPS."""
    maps = {}
    steps = []
    with np.load(path) as stored:
        for name in sorted(stored):
            part = json.loads(stored[name].item())
            if name.startswith('step'):
                steps.append(part)
            else:
                maps[name] = part
    every = len(steps) // MOST_STEPS + 1
    maps['steps'] = steps[:-1:every] + steps[-1:]           # the last one in any case
    return maps


def read_run(folder):
    """All that can be read of a run's folder; a part that cannot is {'missing': why}."""
    need((folder / 'config.json').exists(),
         f'{folder} holds no config.json; give a folder that was the --out of train.py')
    run = {'name': str(folder)}
    parts = {
        'config.json': read_json,
        'log.jsonl': read_log,
        'eval.json': read_json,
        'maps.npz': read_maps}
    for file, read in parts.items():
        path = folder / file
        try:
            run[path.stem] = read(path)
        except Exception as error:                          # the page shows what is there
            run[path.stem] = {'missing': str(error)}
    return run


def write(folders):
    """The page of one or several runs -> its path, in the folder of the first."""
    runs = [read_run(Path(folder)) for folder in folders]
    # A caption may hold </script>, which would end the script that it lies in.
    data = json.dumps(runs).replace('<', '\\u003c')
    template = Path(__file__).with_suffix('.html').read_text()
    path = Path(folders[0], 'report.html')
    with replacing(path) as partial:
        partial.write_text(template.replace('[/* RUNS */]', data))
    return path


def main():
    parser = Parser(prog='python -m extras.report', epilog=__doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN', help="a run's folder, the --out of train.py")
    print(f'report     {write(parser.parse_args().runs)}')


if __name__ == '__main__':
    cli(main)
