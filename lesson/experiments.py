"""The experiments of the course: what is run, each run a row of lesson/results.csv.

    python -m lesson.experiments named                          the runs of `named` that have no row, two side by side
    python -m lesson.experiments named --run q0.2-cosmos 0      one run: its figures; the next start adds its row

A run that has a row is not made again, and one that was interrupted goes on where it stopped: start the command again.
Each run is a process of one thread, whose checkpoint and log lie in runs/lesson.
"""
import csv
import json
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import eval as evaluation
import train
from cosmos import COSMOS, Output, unit
from data import Parser, cli, replacing
from extras import pairs
from lesson import suppression

# --- 1. Other forwards -----------------------------------------------------------------------------------------------

class WithoutResidual(COSMOS):
    """h_I and h_T are what the heads return, and nothing else."""

    def forward(self, images, texts):
        cls, patches = self.visual(images, keep=True)
        eot, words = self.text(texts, keep=True)
        h_I = self.text_cross(cls, self.text_tokens(words))         # (V, B, D)  Eq. 1 without + cls
        h_T = self.image_cross(eot, self.image_tokens(patches))     # (U, B, D)  Eq. 2 without + eot
        return Output(unit(cls), unit(eot), unit(h_I), unit(h_T))


class WithoutHeads(COSMOS):
    """Eq. 6 with the embeddings in place of h_I and h_T, and its own scale. No heads: they would get no gradient."""

    def __init__(self, config):
        super().__init__(replace(config, cross_heads=0))
        self.distill_logit_scale = deepcopy(self.logit_scale)

    def forward(self, images, texts):
        out = super().forward(images, texts)
        return Output(out.image, out.text, out.image, out.text)

    def scales(self):
        return [self.logit_scale, self.distill_logit_scale]


# --- 2. The experiments ----------------------------------------------------------------------------------------------

class Variant(NamedTuple):
    """How a run is made. Variants that differ only in `seeds` and `against` share their runs."""
    flags: str = '--method cosmos'          # of train.py; {scenes} is the folder of the set, {seed} the seed
    scenes: str = ''                        # options of lesson.scenes (none: the built-in set), or a set's name
    model: type = COSMOS
    weights: str = 'teacher'                # whose figures; a method without a teacher has the student's
    seeds: int = 3                          # 0, 1, 2
    against: str = 'cosmos'                 # the variant it is compared with


# Steps in the time that COSMOS takes for 320. Measured at 71da512, alone on the two cores of an Intel Xeon with AMX, by
# the log of OMP_NUM_THREADS=1 python train.py --method M --workers 1: 237, 137, 70, 61, 64 and 53 pairs/s, the medians
# of four rounds, in the order below. Rounds differ by up to 30 %.
STEPS = {
    'clip': 1430, 'clip-aug': 830, 'image-distill': 420,
    'text-crop': 370, 'text-distill': 390, 'cosmos': 320}
# These get five seeds in table5; and what `named` compares each with.
MAIN_ROWS = {'clip': 'clip', 'text-crop': 'cosmos', 'cosmos': 'clip'}


def in_equal_time(method):
    return f'--method {method} --steps {STEPS[method]}'


def named():
    """How often is the small object named? Three methods in equal time."""
    variants = {}
    for share in (0, 0.1, 0.2, 0.3, 0.5):
        scenes = f'--objects 2 --named {share}'
        for method, other in MAIN_ROWS.items():
            variants[f'q{share}-{method}'] = Variant(
                in_equal_time(method), scenes, against=f'q{share}-{other}')
    return variants


def size():
    """R: side of the small object, q: share of sentences on it. At R 0.43 both objects are equally large, at q 0.5 they
    are named equally often."""
    scenes = {
        'R0.12-q0.3': '--objects 2 --named 0.3 --small-size 0.12',
        'R0.2-q0.3': '--objects 2 --named 0.3 --small-size 0.2',
        'R0.28-q0.3': '--objects 2 --named 0.3 --small-size 0.28',
        'R0.4-q0.3': '--objects 2 --named 0.3 --small-size 0.4',
        'R0.43-q0.3': '--objects 2 --named 0.3 --small-size 0.43',
        'R0.43-q0.5': '--objects 2 --named 0.5 --small-size 0.43'}
    flags = '--method cosmos --eval-every 40'
    return {name: Variant(flags, options, against='R0.28-q0.3') for name, options in scenes.items()}


def drawings():
    """The rows of Table 5 on emoji, in the time of 800 steps of COSMOS. The set is not drawn here: its folder,
    runs/lesson/scenes-emoji, has train/, val/, and the scenes and names that extras.pairs asks about."""
    flags = '--method {} --steps {} --warmup 100 --lr-end 0.3 --momentum 0.995'
    return {
        method: Variant(flags.format(method, 5 * steps // 2), 'emoji', seeds=1)
        for method, steps in STEPS.items()}


def table5():
    """The rows of Table 5: at equal steps each against the method before it, in equal time against COSMOS."""
    variants = {}
    above = 'clip'
    for method in STEPS:
        seeds = 5 if method in MAIN_ROWS else 3
        variants[method] = Variant(f'--method {method}', seeds=seeds, against=above)
        above = method
        if method != 'cosmos':
            variants[f'{method}-equal-time'] = Variant(in_equal_time(method), seeds=seeds)
    return variants


# What `clip-equal-time` of table5 has learnt with this seed; make those runs first.
FROM_CLIP = '--init runs/lesson/COSMOS-method-clip-steps-1430-teacher/{seed}/last.pt'

EXPERIMENTS = {
    'named': named(),
    'size': size(),
    'table5': table5(),
    'cross': {
        'cosmos': Variant(seeds=5),
        'without-heads': Variant(model=WithoutHeads, seeds=5),
        'without-residual': Variant(model=WithoutResidual, seeds=5)},
    'captions': {
        'cosmos': Variant(),                    # all captions, 6 local crops
        'raw': Variant('--caption-pool raw'),
        'short': Variant('--caption-pool short'),
        'long': Variant('--caption-pool long'),
        'crops-0': Variant('--local-crops 0'),
        'crops-2': Variant('--local-crops 2')},
    'amount': {                                 # an eighth: the first of 8 tars
        'cosmos': Variant(),
        'eighth': Variant('--method cosmos --data {scenes}/train/00000.tar'),
        '1280': Variant('--method cosmos --steps 1280'),
        'eighth-1280': Variant('--method cosmos --data {scenes}/train/00000.tar --steps 1280', against='1280')},
    'exercises': {
        'cosmos': Variant(),
        'student': Variant(weights='student'),
        'clip': Variant('--method clip --steps 1430', against='student'),
        'image-distill-student': Variant('--method image-distill', weights='student'),
        'clip-aug': Variant('--method clip-aug', against='image-distill-student'),
        # as good as 0: the teacher is the student itself
        'no-average': Variant('--momentum 1e-9', against='clip'),
        'globals-only': Variant('--local-crops 0 --local-captions 0')},
    'repair': {
        # of learning rates 3e-4 and 1e-3 the better one of seed 0
        'cosmos': Variant(f'--method cosmos --steps 200 --lr 1e-3 {FROM_CLIP}'),
        'clip': Variant(f'--method clip --steps 200 --lr 3e-4 {FROM_CLIP}'),
        'clip-equal-time': Variant(f'--method clip --steps 890 --lr 3e-4 {FROM_CLIP}'),
        # the CLIP of table5 at a lower learning rate
        'clip-3e-4': Variant('--method clip --steps 1430 --lr 3e-4'),
        # the time of the CLIP and of 200 steps of COSMOS
        'from-nothing': Variant('--method cosmos --steps 520')},
    'drawings': drawings()}


# --- 3. One run ------------------------------------------------------------------------------------------------------

def run_folder(variant, seed):
    """Named by all that makes the run, so that another one never goes on from its checkpoint."""
    words = f'{variant.model.__name__} {variant.scenes} {variant.flags} {variant.weights}'
    return Path('runs/lesson', re.sub('[^a-zA-Z0-9.]+', '-', words), str(seed))


def scene_folder(options):
    """The set that options of lesson.scenes describe (none: a copy of the built-in one), drawn where it is absent.
    `emoji` is not drawn: it must lie there."""
    folder = Path('runs/lesson', f'scenes {options}'.replace(' ', '-'))
    if not (folder / 'val/00000.tar').exists():                      # the last file to be drawn
        subprocess.run([sys.executable, '-m', 'lesson.scenes', folder, *options.split()])
    return folder


def origin():
    """The machine, and the last commit that changed the code of a run. Edits that are not committed go unseen."""
    name = platform.processor()
    with suppress(OSError):                                             # Linux tells more
        # `|$`: there is a match, even where no model is named
        name = re.search('model name.*: (.*)|$', Path('/proc/cpuinfo').read_text())[1] or name
    # of lesson/ neither plots.py nor the tests
    command = 'git log -1 --format=%h -- cosmos.py data.py eval.py train.py extras/pairs.py lesson/[!pt]*.py'
    return {'commit': subprocess.getoutput(command), 'machine': f'{name}, {os.cpu_count()} cores'}


def flat(figures, prefix=''):
    """{'small': {'top1': x}} -> {'small.top1': x}, without lists"""
    row = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            row |= flat(value, f'{prefix}{name}.')
        elif not isinstance(value, list):
            row[prefix + name] = round(value, 4)
    return row


def run(variant, seed):
    """Train and measure a variant, in this process; all figures go into row.json of its folder."""
    row = origin()
    scenes = scene_folder(variant.scenes)
    out = run_folder(variant, seed)
    # What train.py and eval.py build is the class of this name.
    train.COSMOS = variant.model
    evaluation.COSMOS = variant.model
    flags = variant.flags.format(scenes=scenes, seed=seed)
    command = f'train.py --preset tiny --data {scenes}/train --val {scenes}/val --workers 1 --seed {seed} '
    command += f'--out {out} --resume auto {flags}'
    sys.argv = command.split()
    with suppress(SystemExit):
        train.main()
    for line in evaluation.read_lines(out / 'log.jsonl'):
        entry = json.loads(line)
        figures = flat(entry.get('eval', {}))
        row |= figures                  # steps and seconds of the last one; its other figures are replaced below
        for name, value in figures.items():
            if name.endswith('.top1'):                                  # presence over training
                row[f"{name}@{entry['step']}"] = value
    loaded = evaluation.load(out / 'last.pt', variant.weights)
    args = SimpleNamespace(shards=scenes / 'val', workers=0, pictures=out / 'naming')
    row |= flat(evaluation.run_retrieval(args, *loaded), 'retrieval.')
    if (scenes / 'probes.json').exists():
        row |= flat(pairs.suppression(*loaded, scenes))
    else:
        row |= flat(suppression.run(args, *loaded))
    evaluation.write_json(out / 'row.json', row)
    return row


# --- 4. Many runs ----------------------------------------------------------------------------------------------------

RESULTS = Path('lesson/results.csv')


def read_results():
    """-> the rows, {column: text} each."""
    return list(csv.DictReader(RESULTS.read_text().splitlines()))


def add_result(row):
    """A new row may have new columns, so the file is written anew, whole or not at all."""
    rows = [*read_results(), row]
    columns = {}
    for each in rows:
        columns |= each
    with replacing(RESULTS) as partial, open(partial, 'w') as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def missing_runs(experiment, seeds=None):
    """-> [(experiment, seed, variant)] that have no row, seed 0 of all variants first."""
    done = [f"{row['experiment']} {row['seed']} {row['variant']}" for row in read_results()]
    missing = []
    for name, variant in EXPERIMENTS[experiment].items():
        for seed in range(seeds or variant.seeds):
            if f'{experiment} {seed} {name}' not in done:
                missing.append((experiment, f'{seed}', name))
    return sorted(missing)


def launch(key):
    """Make a run in a process of one thread, unless its row.json is there -> its row."""
    experiment, seed, name = key
    figures = run_folder(EXPERIMENTS[experiment][name], seed) / 'row.json'
    if not figures.exists():
        command = [sys.executable, '-m', 'lesson.experiments', experiment, '--run', name, seed]
        one_thread = os.environ | {'OMP_NUM_THREADS': '1'}
        done = subprocess.run(command, stdout=subprocess.DEVNULL, env=one_thread)
        evaluation.need(not done.returncode, f'{name} {seed} failed; start again for the rows of the others')
    return {'experiment': experiment, 'variant': name, 'seed': seed} | evaluation.read_json(figures)


def main():
    parser = Parser()
    parser.add_argument('experiment', choices=EXPERIMENTS)
    parser.add_argument('--seeds', type=int, help='how many, instead of those of the course')
    parser.add_argument('--run', nargs=2, metavar=('VARIANT', 'SEED'), help='make one run and print it')
    args = parser.parse_args()
    variants = EXPERIMENTS[args.experiment]
    if args.run:
        name, seed = args.run
        evaluation.need(name in variants, f'no variant is called {name}; take one of {", ".join(variants)}')
        evaluation.show(run(variants[name], seed))
        return
    missing = missing_runs(args.experiment, args.seeds)
    for _, _, name in missing:
        scene_folder(variants[name].scenes)                             # before two runs need it
    print(f'{len(missing)} runs have no row in {RESULTS}; --run makes one of the others again')
    with ThreadPoolExecutor(2) as pool:
        for row in pool.map(launch, missing):
            add_result(row)


if __name__ == '__main__':
    cli(main)
