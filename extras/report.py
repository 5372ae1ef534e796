"""A run as one page: what the student sees, curves, where cross-attention looks.

    python -m extras.report runs/tiny-cosmos                    writes runs/tiny-cosmos/report.html
    python -m extras.report runs/tiny-cosmos runs/tiny-clip     both on one page, in the folder of the first

The page is one file that opens from disk; report.html beside this module is its template. `Report` writes it at the end
of a run of train.py. Before the first step and at each evaluation it leaves in maps.npz what the page shows beside
config.json, log.jsonl and eval.json. So the page needs neither weights nor data.
"""
import base64
import io
import json
import platform
import shlex
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from torchvision.transforms.v2.functional import to_pil_image

from cosmos import unit
from eval import encode_dense, shard_captions, shard_image
from extras.attend import stretch, word_weights
from plumbing.colours import OPERATIONS, recolour
from plumbing.errors import (Parser, Refused, Unreadable, command, need, read_json, read_lines,
                             replacing)
from plumbing.images import read_image

SHOWN = 24              # images of the explorer, the first held-out ones
RIVALS = 5              # captions of other images that an image is asked about, too
MOST_STEPS = 6          # with maps on a page
SIDE = 224              # of an image on the page, in pixels
SMALL = 128

# --- 1. During training: what a run leaves in maps.npz ---------------------------------------------------------------

def keep(folder, name, part):
    """Adds a part of the page, as bytes of JSON, to folder/maps.npz. Tensors of one number become that."""
    path = Path(folder, 'maps.npz')
    arrays = {}
    if path.exists():
        with np.load(path) as stored:
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


def sample_views(crops):
    """What the student is shown: yields (index, views (3, s, s) in [0, 1], captions, boxes) of pairs from all over the
    set."""
    for index in np.unique(np.linspace(0, len(crops.shards) - 1, 4, dtype=int)):
        try:
            images, strengths, captions, boxes = crops.sample(0, index)
        except Unreadable:
            continue
        views = []
        for image, of_image in zip(images, strengths):
            batch = {name: torch.tensor([strength]) for name, strength in of_image.items()}
            views.append(recolour(image[None], batch, OPERATIONS)[0])
        yield index, views, captions, boxes


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
    most. words: how much C^T reads each. Maps are the weights of C^I. A model without cross-attention has none, and no
    words: there they are cosines of the patches.
    """
    owner = [entry['image'] for entry in entries]
    texts = [entry['text'] for entry in entries]
    eot, words = model.encode_text(tokenizer(texts).to(pixels.device))  # (n, D), (n, T, D)
    cls, patches = model.encode_image(pixels)
    cls = cls[owner]                                                    # (n, D)
    if model.has_cross_attention:
        maps = model.image_cross.weights(eot, patches[owner])           # (n, P)
        weights = model.text_cross.weights(cls, words)                  # (n, T)
        for entry, row in zip(entries, weights):
            entry['words'] = word_weights(tokenizer, entry['text'], row)
    else:
        dense = encode_dense(model, pixels).flatten(1, 2)               # (B, P, D)
        maps = torch.einsum('npd,nd->np', dense[owner], unit(eot))
    cosines = torch.cosine_similarity(cls, eot)
    for entry, cosine, grid in zip(entries, cosines, maps.cpu()):
        levels = np.uint8(255 * stretch(grid.numpy()))
        entry['cosine'] = cosine
        entry['map'] = base64.b64encode(levels).decode()
        entry['ends'] = grid.aminmax()


class Report:
    """A watcher for train.main: it leaves what the page shows in the folder of the run, and writes the page at the
    end."""

    def begin(self, run):
        """What is known before the first step: four pairs as the student sees them, and how the run was started."""
        pairs = []
        for index, views, captions, boxes in sample_views(run.train_set):
            image = read_image(run.train_set.shards.image(index))
            pairs.append({
                'image': picture(image, SIDE),
                'size': image.size,                         # in which the boxes are given
                'views': [picture(to_pil_image(view), SMALL) for view in views],
                'boxes': boxes,                             # (y, x, h, w)
                'captions': captions})
        machine = platform.platform()
        if torch.cuda.is_available():
            machine += f', {torch.cuda.get_device_name()}'
        keep(run.folder, 'start', {
            'pairs': pairs,
            'counts': run.train_set.counts,
            'command': shlex.join(['python', *sys.argv]),
            'machine': machine,
            'versions': f'Python {platform.python_version()}, torch {torch.__version__}'})

    @torch.no_grad()
    def evaluated(self, run, seen):
        """What the page shows of an evaluation: the first held-out images, and texts about them -> no figures."""
        captions, owner = shard_captions(seen.val)
        pools = [[] for _ in range(min(SHOWN, len(seen.val)))]
        for caption, i in zip(captions, owner):
            if i < SHOWN:
                pools[i].append(caption)
        pixels = []
        images = []
        entries = []
        for i in range(len(pools)):
            image = shard_image(seen.val, i)
            pixels.append(seen.preprocess(image))
            images.append(picture(ImageOps.fit(image, (SIDE, SIDE)), SIDE))     # as the model sees it
            for kind, text, of in texts_about(i, pools, seen.val.record(i)):
                entries.append({'image': i, 'kind': kind, 'text': text, 'of': of})
        ask(seen.model, seen.tokenizer, torch.stack(pixels).to(seen.model.logit_scale.device), entries)
        keep(run.folder, f'step {run.step:09d}', {'step': run.step, 'texts': entries})
        keep(run.folder, 'images', images)
        return {}

    def finish(self, run):
        print(f'report     {write([run.folder])}')


# --- 2. The page -----------------------------------------------------------------------------------------------------

def read_log(path):
    """Entries of log.jsonl, one a step. What is logged last counts: a resumed run logs steps again."""
    entries = {}
    for line in read_lines(path):
        with suppress(json.JSONDecodeError):                # a line that was cut short
            entry = json.loads(line)
            entries[entry['step']] = entries.get(entry['step'], {}) | entry
    return [entries[step] for step in sorted(entries)]


def read_maps(path):
    """maps.npz -> {start, images, steps: [{step, texts}]}; of many steps some MOST_STEPS."""
    with np.load(path) as stored:
        maps = {name: json.loads(stored[name].item()) for name in sorted(stored)}
    steps = [maps.pop(name) for name in list(maps) if name.startswith('step')]
    every = len(steps) // MOST_STEPS + 1
    maps['steps'] = steps[:-1:every] + steps[-1:]           # the last one in any case
    return maps


def read_run(folder):
    """All that can be read of a run's folder; a part that cannot is {'missing': why}."""
    need((folder / 'config.json').exists(), f'{folder} holds no run; give the --out of train.py')
    found = {'name': str(folder)}
    parts = {
        'config.json': read_json,
        'log.jsonl': read_log,
        'eval.json': read_json,
        'maps.npz': read_maps}
    for file, read in parts.items():
        path = folder / file
        try:
            found[path.stem] = read(path)
        except (OSError, Refused) as error:                 # the page shows what is there
            found[path.stem] = {'missing': str(error)}
    return found


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
    parser = Parser(prog='python -m extras.report', usage='%(prog)s RUN ...', epilog=__doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN', help="a run's folder, the --out of train.py")
    print(f'report     {write(parser.parse_args().runs)}')


if __name__ == '__main__':
    command(main)
