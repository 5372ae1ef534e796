"""Show a run on one page: one step value by value, and curves.

    python -m extras.report runs/tiny-cosmos                    writes runs/tiny-cosmos/report.html
    python -m extras.report runs/tiny-cosmos runs/tiny-clip     both on one page, in the folder of the first

The page is a single file, which a browser can open from disk. Its template is report.html, next to this module.
`Report` writes the page at the end of a run of train.py. The page shows config.json, log.jsonl and eval.json, and what
`Report` leaves in maps.jsonl before the first step, at each evaluation and at the end. So it can be written without the
weights or the data.

The page computes matrices and losses itself, from the vectors of one batch. A button shows Python's value next to each.
"""
import base64
import inspect
import io
import json
import platform
import shlex
import sys
import textwrap
from contextlib import suppress
from math import ceil
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import default_collate
from torchvision.transforms.v2.functional import to_pil_image

import cosmos
from cosmos import COSMOS, GLOBALS, CrossAttention, Gathered, Teacher, match, nce, unit
from data import normalize, text_crops
from plumbing.colours import AFTER_JITTERS, JITTERS, changes_of, recolour
from plumbing.errors import Refused, Unreadable, command, need
from plumbing.files import drop_lost_lines, read_json, read_lines, replacing
from plumbing.images import load_image
from plumbing.options import Parser
from plumbing.runs import Watcher

PAIRS = 16              # how many pairs the step shows, from all over the training set
MOST_STEPS = 6          # a page has the vectors and weights of at most this many evaluations
MAPS = 'maps.jsonl'
SIDE = 224              # side of an image on the page, in pixels
SMALL = 128             # side of a view
# The page shows the source of these.
CODE = (text_crops, Teacher.forward, Teacher.update, cosmos.clip_loss, match, nce, CrossAttention.weights,
        COSMOS.read, cosmos.total_loss, cosmos.term_weights)

# --- 1. During training: what a run leaves in maps.jsonl -------------------------------------------------------------

def short(tensor):
    """A tensor as a number or lists of numbers, rounded, for JSON."""
    return np.round(tensor.tolist(), 5).tolist()


def keep(folder, part, content):
    """Append a part of the page to folder/maps.jsonl: 'start', or a 'batch', of which there is one for each step that is
    kept. A resumed run writes some parts again, and the last one counts."""
    text = json.dumps({'part': part} | content, default=short)
    with open(Path(folder, MAPS), 'a', encoding='utf-8') as file:
        file.write(f'{text}\n')


def picture(image, side=SIDE):
    """Pillow image -> a WebP whose sides are at most this long, as a data URI."""
    image = image.convert('RGB')
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, 'WEBP', quality=85)
    return 'data:image/webp;base64,' + base64.b64encode(file.getvalue()).decode()


def packed(tensor):
    """Numbers in [-1, 1], as in unit vectors and weights -> 16 bits each, in base64. The page divides by 32767."""
    integers = np.rint(32767 * tensor.cpu().numpy())
    return base64.b64encode(np.int16(integers).tobytes()).decode()


# The step

def sample_views(train_set, count=4):
    """Yields up to `count` pairs, spread evenly over the set, as the student gets them in epoch 0, but not normalised,
    and with the jitters in one fixed order: (index, pictures (3, s, s) in [0, 1], captions, boxes)."""
    for index in np.unique(np.linspace(0, len(train_set.shards) - 1, count, dtype=int)):
        try:
            drawn = train_set.sample(0, index)
        except Unreadable:
            continue
        changes = changes_of([drawn.changes])
        order = [*JITTERS, *AFTER_JITTERS]
        views = [recolour(crop[None], changes, k, order)[0] for k, crop in enumerate(drawn.crops)]
        yield index, views, drawn.captions, drawn.boxes


def read_pairs(crops):
    """Training pairs -> what the page shows of each, V images (B, 3, s, s) in [0, 1], and the ids (U, B, T)."""
    symbol_of = {number: symbol for symbol, number in crops.tokenizer.ids.items()}
    pairs = []
    samples = []
    for index, views, captions, boxes in sample_views(crops, PAIRS):
        ids = crops.tokenizer(captions)
        image = load_image(crops.shards.image(index))
        samples.append((views, ids))
        pairs.append({
            'image': picture(image),
            'size': image.size,                             # the boxes are in its pixels
            'views': [picture(to_pil_image(view), SMALL) for view in views],
            'boxes': boxes,                                 # (y, x, h, w)
            'pool': crops.shards.pool(index),
            'captions': captions,
            'tokens': [symbol_of[number] for number in ids[0].tolist()]})
    views, ids = default_collate(samples)
    return pairs, views, ids.transpose(0, 1)


def read_batch(student, images, texts):
    """images: V of (B, 3, s, s), texts (U, B, T) -> vectors of the student {name: (V, B, D) or (U, B, D)}, not of
    unit length, and weights {C_I: (U, B, P), C_T: (V, B, T)}, {} for a model without cross-attention.

    Also h_I_other and h_T_other, for which pair b reads from pair b - 1 instead (pair 0 from the last one).
    """
    cls, eot, patches, words = student.encode(images, texts)
    vectors = {'cls': cls, 'eot': eot}
    if not student.has_cross_attention:
        return vectors, {}
    vectors['h_I'], vectors['h_T'] = student.read(cls, eot, patches, words)
    others = patches.roll(1, 0), words.roll(1, 0)
    vectors['h_I_other'], vectors['h_T_other'] = student.read(cls, eot, *others)
    weights = {
        'C_I': torch.stack([student.read_image.weights(query, patches) for query in eot]),
        'C_T': torch.stack([student.read_text.weights(query, words) for query in cls])}
    return vectors, weights


def figures_of(a, b, scale):
    """Unit vectors a (V, B, D) and b (U, B, D) -> their loss, the mean cosine of all vectors of a with all of b, and
    that of vectors of the same pair. Only rank 0 comes here, so nothing is gathered."""
    cosines = torch.einsum('vad,ubd->vuab', a, b)                       # (V, U, B, B)
    return {
        'loss': match(Gathered(a, a), Gathered(b, b), scale),
        'mean': cosines.mean(),
        'own': cosines.diagonal(dim1=2, dim2=3).mean()}


class Report(Watcher):
    """A watcher for train.main: it leaves in the run's folder what the page shows, and writes the page at the end.
    It draws no random numbers and leaves no gradients, so the run is the same without it."""

    def begin(self, run):
        """Keep what is known before the first step: the pairs of the step, and how the run was started."""
        if run.step == 0:                   # an earlier start may have ended before its first checkpoint
            Path(run.folder, MAPS).unlink(missing_ok=True)
        drop_lost_lines(Path(run.folder, MAPS), run.step)
        device = run.processes.device
        pairs, images, ids = read_pairs(run.train_set)
        self.images = [normalize(view).to(device) for view in images]       # V of (B, 3, s, s)
        self.texts = ids.to(device)                                         # (U, B, T)
        machine = f'{platform.platform()}, Python {platform.python_version()}, torch {torch.__version__}'
        if torch.cuda.is_available():
            machine += f', {torch.cuda.get_device_name()}'
        code = {'cosmos': cosmos.__doc__}
        terms = getattr(run.method.terms, 'func', run.method.terms)         # of a functools.partial its function
        for function in (*CODE, terms):
            code[function.__qualname__] = textwrap.dedent(inspect.getsource(function))
        keep(run.folder, 'start', {
            'pairs': pairs,
            'counts': run.train_set.counts,
            'code': code,
            'terms': terms.__qualname__,
            'command': shlex.join(['python', *sys.argv]),
            'machine': machine})
        self.keep_step(run)

    @torch.no_grad()
    def keep_step(self, run):
        """Keep the pairs as student and teacher see them after run.step steps, in float32."""
        raw, weights = read_batch(run.student, self.images, self.texts)
        vectors = {name: unit(raw[name]) for name in raw}
        scales = [scale.exp() for scale in run.student.log_scales()]
        figures = {'clip': figures_of(vectors['cls'][:GLOBALS], vectors['eot'], scales[0])}
        if run.teacher:
            seen = self.images if run.method.teacher_sees_locals else self.images[:GLOBALS]
            vectors['cls_t'], vectors['eot_t'] = run.teacher(seen, self.texts[:GLOBALS])
            for name in raw:
                for target in 'cls_t', 'eot_t':
                    figures[f'{name}_{target}'] = figures_of(vectors[name], vectors[target], scales[-1])
        keep(run.folder, 'batch', {
            'step': run.step,
            'scales': scales,
            'figures': figures,
            'lengths': {name: raw[name].norm(dim=2) for name in raw},
            'vectors': {name: packed(vectors[name]) for name in vectors},
            'weights': {name: packed(weights[name]) for name in weights}})

    def evaluated(self, run, val, image_features):
        """Keep the step once more. Returns {}, because it adds no figures to eval.json."""
        self.keep_step(run)
        return {}

    def finish(self, run):
        self.keep_step(run)             # without --val there was no evaluation
        print(f'report     {write([run.folder])}')


# --- 2. The page -----------------------------------------------------------------------------------------------------

def lines_of(path):
    """The objects in a file of JSON lines, without a last one that a crash has cut short."""
    for line in read_lines(path):
        with suppress(json.JSONDecodeError):
            yield json.loads(line)


def read_log(path):
    """Entries of log.jsonl, one per step. Of several entries of a step the last one counts."""
    entries = {}
    for entry in lines_of(path):
        entries[entry['step']] = entries.get(entry['step'], {}) | entry
    return [entries[step] for step in sorted(entries)]


def read_maps(path):
    """maps.jsonl -> {start, batch: [{step, ...}, ...]}, with at most MOST_STEPS steps."""
    start = {}
    batch_of = {}                       # {step: batch}
    for line in lines_of(path):
        if line['part'] == 'start':
            start = line
        else:
            batch_of[line['step']] = line
    steps = sorted(batch_of)
    every = max(1, ceil((len(steps) - 1) / (MOST_STEPS - 1)))
    shown = steps[:-1:every] + steps[-1:]                   # the last one in any case
    return {'start': start, 'batch': [batch_of[step] for step in shown]}


def read_run(folder):
    """All that can be read in a run's folder. A part that cannot be read is {'missing': why}."""
    need((folder / 'config.json').exists(), f'{folder} holds no run; give the --out of train.py')
    found = {'name': str(folder)}
    parts = {
        'config.json': read_json,
        'log.jsonl': read_log,
        'eval.json': read_json,
        MAPS: read_maps}
    for file, read in parts.items():
        path = folder / file
        try:
            found[path.stem] = read(path)
        except Refused as error:        # the page shows the other parts
            found[path.stem] = {'missing': str(error)}
    return found


def write(folders):
    """Write the page of one or several runs -> its path, in the folder of the first."""
    runs = [read_run(Path(folder)) for folder in folders]
    # A caption may hold </script>, which would end the script around it.
    data = json.dumps(runs).replace('<', '\\u003c')
    template = Path(__file__).with_suffix('.html').read_text(encoding='utf-8')
    path = Path(folders[0], 'report.html')
    with replacing(path) as partial:
        partial.write_text(template.replace('[/* RUNS */]', data), encoding='utf-8')
    return path


def main():
    parser = Parser(prog='python -m extras.report', usage='%(prog)s RUN ...', epilog=__doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN', help="a run's folder, the --out of train.py")
    print(f'report     {write(parser.parse_args().runs)}')


if __name__ == '__main__':
    command(main)
