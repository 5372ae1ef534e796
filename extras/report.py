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

import eval as evaluation
from cosmos import unit
from data import JITTERS, Parser, cli, read_image, recolour, replacing

SHOWN = 24              # images of the explorer, the first held-out ones
RIVALS = 5              # captions of other images that an image is asked about, too
EXAMPLES = 10           # of hits, and of misses
MOST_STEPS = 6          # with maps on a page
MOST_LINES = 400        # of the log
SIDE = 224              # of an image on the page, in pixels
SMALL = 128

# --- 1. During training: what a run leaves in maps.npz ---------------------------------------------------------------

def keep(folder, **arrays):
    """Adds arrays and the bytes of JSON to folder/maps.npz."""
    path = Path(folder, 'maps.npz')
    with suppress(Exception), np.load(path) as stored:      # none yet, or a damaged one, which is replaced
        arrays = {**stored, **arrays}
    with replacing(path) as partial, open(partial, 'wb') as file:
        np.savez_compressed(file, **arrays)


def to_json(value):
    """-> bytes; tensors of one number become that."""
    return json.dumps(value, default=float).encode()


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
    for index in np.linspace(0, len(views.shards) - 1, 4, dtype=int):
        with suppress(Exception):                           # a broken pair: do without it
            image = read_image(views.shards.image(index))
            crops, colours, captions, boxes = views.views(0, index)
            tiles = []
            for crop, numbers in zip(crops, colours):
                view = recolour(crop[None], torch.tensor([numbers]), JITTERS)
                tiles.append(picture(to_pil_image(view[0]), SMALL))
            pairs.append({
                'image': picture(image, SIDE),
                'size': image.size,                         # in which the boxes are given
                'crops': tiles,
                'boxes': boxes,                             # (y, x, h, w)
                'captions': captions})
    machine = platform.platform()
    if torch.cuda.is_available():
        machine += f', {torch.cuda.get_device_name()}'
    here = shlex.quote(str(Path(__file__).parent))
    start = {
        'pairs': pairs,
        'counts': views.counts,
        'command': shlex.join(['python', *sys.argv]),
        'commit': subprocess.getoutput(f'git -C {here} describe --always --dirty 2> /dev/null'),
        'machine': machine,
        'versions': f'Python {platform.python_version()}, torch {torch.__version__}'}
    keep(folder, start=to_json(start))


def texts_about(i, pools, record):
    """What the explorer asks about image i -> [{text, kind, of}]. pools: the captions of each image.

    kind: caption, other (a caption of another image), name (of an object in the image), absent (a name of nothing in
    it). of: the number of the object with whose name an absent one is compared.
    """
    texts = []

    def add(kind, text, of=None):
        texts.append({'kind': kind, 'text': text, 'of': of})

    for caption in pools[i]:
        add('caption', caption)
    others = pools[i + 1:] + pools[:i]
    for pool in others[:RIVALS]:
        add('other', pool[0])
    for number, thing in enumerate(record.get('objects') or []):
        if 'absent' in thing:                               # else objects of another kind
            add('name', f"a {thing['name']}", number)
            for name in thing['absent']:
                add('absent', f'a {name}', number)
    return texts


def ask(model, tokenizer, pixels, texts, eot, tokens):
    """pixels (1, 3, S, S), n texts and what the model makes of them, (n, D) and (n, T, D) -> maps (n, P) in [0, 1].

    Into each text go its cosine with the image, the least and the most of its map, and what C^T reads of its words.
    Maps are the weights of C^I. A model without heads has none, and no words: there they are cosines of the patches.
    """
    n = len(texts)
    cls, patches = model.encode_image(pixels)
    queries = unit(eot)
    if model.has_cross_attention:
        maps = model.image_cross.weights(eot, patches.expand(n, -1, -1))
        for entry, weights in zip(texts, model.text_cross.weights(cls.expand(n, -1), tokens)):
            words = evaluation.word_weights(tokenizer, entry['text'], weights)
            entry['words'] = [(word, round(weight, 3)) for word, weight in words]
    else:
        maps = queries @ model.encode_dense(pixels).flatten(0, 2).T
    for entry, cosine, grid in zip(texts, queries @ unit(cls)[0], maps):
        entry['cosine'] = cosine
        entry['ends'] = grid.aminmax()
    return [evaluation.stretch(grid) for grid in maps.cpu().numpy()]


def examples(shards, image_features, text_features, captions, owner):
    """The first images that find their caption, and the first that do not -> [{rank, texts, cosines, images}].

    texts: the best of its own captions and the best of all others. images: it, and that of the other caption.
    owner (captions,): the image of each caption.
    """
    images = torch.arange(len(image_features))
    ranks = evaluation.ranks(image_features, text_features, images, owner)
    found = []
    for wanted in ranks == 1, ranks > 1:
        for i in images[wanted][:EXAMPLES].tolist():
            scores = text_features @ image_features[i]      # (captions,)
            best = scores.where(owner == i, -2).argmax()
            rival = scores.where(owner != i, -2).argmax()
            pictures = []
            for k in i, owner[rival].item():
                pictures.append(picture(evaluation.shard_image(shards, k), SMALL))
            found.append({
                'rank': ranks[i],
                'texts': [captions[best], captions[rival]],
                'cosines': [scores[best], scores[rival]],
                'images': pictures})
    return found


@torch.no_grad()
def store(model, tokenizer, preprocess, shards, image_features, text_features, folder, step):
    """What the page shows of an evaluation. Features are those of all held-out images and captions."""
    captions, owner = evaluation.shard_captions(shards)
    pools = [[] for _ in range(min(SHOWN, len(shards)))]
    for caption, i in zip(captions, owner):
        if i < SHOWN:
            pools[i].append(caption)
    asked = []                                              # the texts of each image
    rows = {}                                               # of each text; many images share a name
    for i in range(len(pools)):
        texts = texts_about(i, pools, shards.record(i))
        for entry in texts:
            rows.setdefault(entry['text'], len(rows))
        asked.append(texts)
    device = model.logit_scale.device
    eot, tokens = model.encode_text(tokenizer(list(rows)).to(device))
    images = []
    maps = []
    for i, texts in enumerate(asked):
        image = evaluation.shard_image(shards, i)
        images.append(picture(ImageOps.fit(image, [min(image.size)] * 2), SIDE))    # as the model sees it
        places = [rows[entry['text']] for entry in texts]
        words = None if tokens is None else tokens[places]
        maps += ask(model, tokenizer, preprocess(image)[None].to(device), texts, eot[places], words)
    found = examples(shards, image_features, text_features, captions, owner)
    held_out = {'heads': model.has_cross_attention, 'images': images, 'examples': found}
    levels = np.uint8(np.rint(255 * np.stack(maps)))        # (texts of all images, P)
    at = {f'texts {step:09d}': to_json(asked), f'maps {step:09d}': levels}
    keep(folder, held_out=to_json(held_out), **at)


# --- 2. The page -----------------------------------------------------------------------------------------------------

def read_log(path):
    """Entries of log.jsonl, of a long one some MOST_LINES and all evaluations. A line cut short is left out."""
    entries = []
    for line in path.read_text(errors='replace').splitlines():
        with suppress(ValueError):
            entries.append(json.loads(line))
    every = len(entries) // MOST_LINES + 1
    return [entry for k, entry in enumerate(entries) if k % every == 0 or 'eval' in entry]


def read_maps(path):
    """maps.npz -> {start, held_out, steps: [{step, texts, maps}]}; of many steps MOST_STEPS."""
    with np.load(path) as stored:
        arrays = dict(stored)
    maps = {name: json.loads(arrays[name].item()) for name in ('start', 'held_out') if name in arrays}
    maps['steps'] = []
    steps = sorted(name.split()[1] for name in arrays if name.startswith('maps'))
    for k in np.linspace(0, len(steps) - 1, min(len(steps), MOST_STEPS), dtype=int):
        maps['steps'].append({
            'step': int(steps[k]),
            'texts': json.loads(arrays[f'texts {steps[k]}'].item()),
            'maps': base64.b64encode(arrays[f'maps {steps[k]}']).decode()})
    return maps


def read_run(folder):
    """All that can be read of a run's folder; a part that cannot is {'missing': why}."""
    run = {'name': str(folder)}
    parts = {'config.json': evaluation.read_json, 'log.jsonl': read_log, 'eval.json': evaluation.read_json,
             'maps.npz': read_maps}
    for file, read in parts.items():
        name, _ = file.split('.')
        try:
            run[name] = read(folder / file)
        except Exception as error:                          # the page shows what is there
            run[name] = {'missing': f'{type(error).__name__}: {error}'}
    evaluation.need('missing' not in run['config'] or 'missing' not in run['log'],
                    f'{folder} holds no config.json and no log.jsonl; give the --out folder of a run')
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
