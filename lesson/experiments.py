"""The experiments of the course: what is run, each run a row of lesson/results.csv.

    python -m lesson.experiments main                       the runs of `main` that have no row, two side by side
    python -m lesson.experiments main --run cosmos 0        one run: its figures; the next start adds its row
    python -m lesson.experiments speed                      pairs a second, for the table SPEED

A run that has a row is not made again, and one that was interrupted goes on where it stopped: start the command again.
Each run is a process of one thread on the CPU, whose checkpoint and log lie in runs/lesson.

Methods race on two tracks. `pairs`: all see as many pairs, the paper's comparison. `minutes`: all take as long. Every
run ends its own schedule, and is measured twice: its own weights (`raw.`) and their moving average (`averaged.`).
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
from statistics import median
from types import SimpleNamespace
from typing import NamedTuple

import torch

import eval as evaluation
import train
from cosmos import COSMOS, Output, Teacher, unit
from data import Parser, cli, replacing
from lesson import suppression
from lesson.scenes import VERSION

# --- 1. Other forwards -----------------------------------------------------------------------------------------------

class WithoutResidual(COSMOS):
    """h_I and h_T are what the heads return, and nothing else."""

    def forward(self, images, texts):
        cls, image_sequence = self.visual.with_sequence(images)
        eot, text_sequence = self.text.with_sequence(texts)
        patches = self.image_map(image_sequence[:, 1:])
        words = self.text_map(text_sequence)
        h_I = self.text_cross(cls, words)                           # (V, B, D)  Eq. 1 without + cls
        h_T = self.image_cross(eot, patches)                        # (U, B, D)  Eq. 2 without + eot
        return Output(unit(cls), unit(eot), unit(h_I), unit(h_T))


class WithoutHeads(COSMOS):
    """Eq. 6 with the embeddings in place of h_I and h_T, and its own scale. No heads: they would get no gradient."""

    def __init__(self, config):
        super().__init__(replace(config, cross_heads=0))
        self.distill_logit_scale = deepcopy(self.logit_scale)

    def forward(self, images, texts):
        out = super().forward(images, texts)
        return Output(out.cls, out.eot, out.cls, out.eot)

    def scales(self):
        return [self.logit_scale, self.distill_logit_scale]


class Average(Teacher):
    """The moving average of a method that has no teacher. It is measured, and teaches nothing."""

    def forward(self, images, texts):
        return torch.zeros(2, 1, 1), None       # the log shows a cosine of 0


class AveragedRun(train.Run):
    """A run that averages its weights in any case, by the same momentum and ramp, and stores the average as `teacher`
    in its checkpoint."""

    def start(self, processes):
        super().start(processes)
        if self.teacher:
            return
        self.teacher = Average(self.model)
        if self.checkpoint:
            saved = evaluation.read_checkpoint(self.checkpoint)
            evaluation.load_weights(self.teacher.model, saved['teacher'], self.checkpoint)


# --- 2. The experiments ----------------------------------------------------------------------------------------------

class Method(NamedTuple):
    """What competes."""
    label: str                      # in plots
    flags: str                      # of train.py
    rate: str                       # the method of RATES whose learning rate it takes
    batch: int = 32
    model: type = COSMOS


METHODS = {
    'clip': Method('CLIP', '--method clip', 'clip', 64),
    'clip-large-batch': Method('CLIP, 4 x the batch', '--method clip', 'clip', 256),
    'clip-aug': Method('two crops', '--method clip-aug', 'clip'),
    'image-distill': Method('teacher of images', '--method image-distill', 'text-crop'),
    'text-crop': Method('text crops', '--method text-crop', 'text-crop'),
    'text-distill': Method('teacher of texts', '--method text-distill', 'without-heads'),
    'without-heads': Method(
        'COSMOS without heads', '--method cosmos', 'without-heads', model=WithoutHeads),
    'without-residual': Method(
        'COSMOS without residual', '--method cosmos', 'cosmos', model=WithoutResidual),
    'cosmos': Method('COSMOS', '--method cosmos', 'cosmos')}

# Pairs a second of one thread beside a second run: means of two rounds of `speed`, on two cores of an AMD EPYC.
SPEED = {
    'clip': 467, 'clip-large-batch': 507, 'clip-aug': 316, 'image-distill': 177, 'text-crop': 151,
    'text-distill': 143, 'without-heads': 133, 'without-residual': 115, 'cosmos': 115}
PAIRS = 700 * 32                    # of COSMOS on both tracks: those of `python train.py`
LONG_PAIRS = 1800 * 32              # of a longer run, `train.py --steps 1800`
PRECISION = 'bf16'
EVALUATIONS = 5                     # of a run, the last one at its end

# Options of lesson.scenes. a: the built-in set, a dominant and two small objects. b: a big one and a small one.
WORLDS = {'a': '', 'b': '--objects 2 --dominant-size 0.6'}
# Peak learning rates on the track `minutes`, by world: of those that `tune-a` and `tune-b` tried the one that names most,
# as the mean of big and small objects, of averaged weights and all seeds.
RATES = {
    'a': {'clip': 2.5e-4, 'text-crop': 1e-3, 'without-heads': 1e-3, 'cosmos': 1e-3},
    'b': {'clip': 5e-4, 'cosmos': 2e-3}}
# CLIP takes a quarter of its steps on the track `pairs`, hence a rate for them, by `tune-pairs`.
CLIP_FROM_PAIRS = 5e-4


class Variant(NamedTuple):
    """How runs are made. Variants that only differ in seeds share their runs."""
    method: str
    world: str = 'a'
    scenes: str = ''                # more options of lesson.scenes
    track: str = 'minutes'          # or pairs, or speed: an eighth of the minutes
    rate: float = 0.0               # 0: that of RATES
    pairs: int = PAIRS              # of COSMOS
    seeds: range = range(3)


def tune(rates, world='a', seeds=2, track='minutes'):
    """Which learning rate is best? Of {method: those tried}, on seeds that are used for nothing else."""
    variants = {}
    for method, tried in rates.items():
        for rate in tried:
            variants[f'{method}-{rate:g}'] = Variant(
                method, world, track=track, rate=rate, seeds=range(100, 100 + seeds))
    return variants


def over(methods, worlds, world='a'):
    """METHOD-NAME for each of {name: options of lesson.scenes}."""
    variants = {}
    for method in methods:
        for name, options in worlds.items():
            variants[f'{method}-{name}'] = Variant(method, world, options)
    return variants


FIVE = range(5)
TWO = ['clip', 'cosmos']
COMPANY = {'none': '--company none', 'equal': '--company equal', 'big': ''}
COLORS = {'2': '', '8': '--colors 8', '16': '--colors 16'}
FEWEST_AND_MOST = {'2': '', '16': '--colors 16'}
SHARES = {'0.5': '', '0.67': '--named 0.67'}    # 0.67: all three objects are named equally often

# Tables give differences to the first variant of an experiment.
EXPERIMENTS = {
    'speed': {method: Variant(method, track='speed', seeds=range(2)) for method in METHODS},
    # rates a factor of two apart, until the best one is neither the highest nor the lowest
    'tune-a': tune({
        'clip': [2e-3, 1e-3, 5e-4, 2.5e-4, 1.25e-4],
        'text-crop': [2e-3, 1e-3, 5e-4],
        'without-heads': [2e-3, 1e-3, 5e-4],
        'cosmos': [2e-3, 1e-3, 5e-4]}),
    'tune-b': tune({
        'clip': [2e-3, 1e-3, 5e-4, 2.5e-4],
        'cosmos': [4e-3, 2e-3, 1e-3, 5e-4]}, 'b', seeds=1),
    'tune-pairs': tune({'clip': [2e-3, 1e-3, 5e-4, 2.5e-4]}, track='pairs'),
    'main': {
        'cosmos': Variant('cosmos', seeds=FIVE),
        'without-heads': Variant('without-heads', seeds=FIVE),
        'text-crop': Variant('text-crop', seeds=FIVE),
        'clip': Variant('clip', seeds=FIVE)},
    'other-rate': {                 # of CLIP: by the seeds of tune-a it is as good
        'cosmos': Variant('cosmos', seeds=FIVE),
        'without-heads': Variant('without-heads', seeds=FIVE),
        'clip': Variant('clip', rate=5e-4, seeds=FIVE)},
    'pairs': {
        'cosmos': Variant('cosmos', seeds=FIVE),
        'without-heads': Variant('without-heads', track='pairs', seeds=FIVE),
        'text-crop': Variant('text-crop', track='pairs', seeds=FIVE),
        'clip': Variant('clip', track='pairs', rate=CLIP_FROM_PAIRS, seeds=FIVE)},
    'long': {'cosmos': Variant('cosmos', pairs=LONG_PAIRS)},
    'parts': {method: Variant(method) for method in reversed(METHODS)},
    'colors': over(['clip'], COLORS) | over(['cosmos'], FEWEST_AND_MOST),
    'company': over(TWO, COMPANY, 'b'),
    'named': over(TWO, SHARES)}


# --- 3. One run ------------------------------------------------------------------------------------------------------

def count_steps(variant):
    pairs = variant.pairs
    if variant.track != 'pairs':
        pairs *= SPEED[variant.method] / SPEED['cosmos']
    if variant.track == 'speed':
        pairs /= 8
    return round(pairs / METHODS[variant.method].batch)


def flags_of(variant):
    """What tells runs apart but for the seed, as flags of train.py. All else is the recipe of `tiny`."""
    method = METHODS[variant.method]
    rate = variant.rate or RATES[variant.world][method.rate]
    steps = count_steps(variant)
    every = -(-steps // EVALUATIONS)                    # rounded up
    if variant.track == 'speed':
        every = 0                                       # at the end only
    return f'{method.flags} --batch {method.batch} --steps {steps} --lr {rate} --eval-every {every}'


def named_by(*parts):
    """-> runs/lesson/WORDS-JOINED-BY-DASHES"""
    return Path('runs/lesson', re.sub('[^a-zA-Z0-9.]+', '-', ' '.join(parts)).strip('-'))


def options_of(variant):
    return f'{WORLDS[variant.world]} {variant.scenes}'


def run_folder(variant, seed):
    """Named by all that makes the run, so that another one never goes on from its checkpoint."""
    words = named_by(origin()['commit'], variant.method, options_of(variant), flags_of(variant))
    return words / f'{seed}'


def scene_folder(variant):
    """The set of its world, drawn where it is absent."""
    options = options_of(variant)
    folder = named_by('scenes', f'{VERSION}', options)
    if not (folder / 'world.json').exists():            # written last
        subprocess.run([sys.executable, '-m', 'lesson.scenes', folder, *options.split()])
    return folder


def origin():
    """The machine, and the last commit that changed the code of a run. Edits that are not committed go unseen."""
    name = platform.processor()
    with suppress(OSError):                                             # Linux tells more
        # `|$`: there is a match, even where no model is named
        name = re.search('model name.*: (.*)|$', Path('/proc/cpuinfo').read_text())[1] or name
    # of lesson/ neither plots.py nor the tests
    command = 'git log -1 --format=%h -- cosmos.py data.py eval.py train.py lesson/[!pt]*.py'
    return {
        'commit': subprocess.getoutput(command),
        'machine': f'{name}, {os.cpu_count()} cores',
        'precision': PRECISION}


def flat(figures, prefix=''):
    """{'small': {'top1': x}} -> {'small.top1': x}, without lists"""
    row = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            row |= flat(value, f'{prefix}{name}.')
        elif not isinstance(value, list):
            row[prefix + name] = round(value, 4)
    return row


def read_log(out):
    """Of a run that has ended: steps, seconds, pairs a second, and what was named over training."""
    row = {}
    speeds = []
    for line in evaluation.read_lines(out / 'log.jsonl'):
        entry = json.loads(line)
        if 'pairs_per_s' in entry:
            speeds.append(entry['pairs_per_s'])
        for name, value in flat(entry.get('eval', {}), 'averaged.').items():
            if name.endswith('.top1'):
                row[f"{name}@{entry['step']}"] = value
    end = entry['eval']
    speed = round(median(speeds[1:]))                   # the first one has the start in it
    return {'steps': end['steps'], 'seconds': end['seconds'], 'pairs_per_s': speed} | row


def run(variant, seed):
    """Train and measure a variant, in this process; all figures go into row.json of its folder."""
    method = METHODS[variant.method]
    scenes = scene_folder(variant)
    out = run_folder(variant, seed)
    # What train.py and eval.py build are the classes of these names.
    train.COSMOS = method.model
    evaluation.COSMOS = method.model
    train.Run = AveragedRun
    command = (f'train.py --preset tiny --data {scenes} --workers 0 --seed {seed} --device cpu '
               f'--precision {PRECISION} --out {out} --resume auto --save-minutes 2 ')
    sys.argv = (command + flags_of(variant)).split()
    try:
        train.main()
    except SystemExit as stop:
        if stop.code:                                   # in mid-schedule, which is no result
            raise
    row = origin() | read_log(out)
    row['pairs'] = row['steps'] * method.batch
    if variant.track != 'speed':
        args = SimpleNamespace(shards=scenes, workers=0)
        for prefix, weights in ('raw', 'student'), ('averaged', 'teacher'):
            loaded = evaluation.load(out / 'last.pt', weights)
            row |= flat(suppression.run(args, *loaded), f'{prefix}.')
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
    """-> [(experiment, seed, variant)] that have no row, the first seed of all variants first."""
    done = [f"{row['experiment']} {row['seed']} {row['variant']}" for row in read_results()]
    missing = []
    for name, variant in EXPERIMENTS[experiment].items():
        first = variant.seeds.start
        last = first + (seeds or len(variant.seeds))
        for seed in range(first, last):
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
    parser = Parser(epilog=__doc__)
    parser.add_argument('experiment', choices=EXPERIMENTS)
    parser.add_argument('--seeds', type=int, help='how many, instead of those of the course')
    parser.add_argument('--run', nargs=2, default=[], metavar=('VARIANT', 'SEED'), help='make one run')
    args = parser.parse_args()
    variants = EXPERIMENTS[args.experiment]
    if args.run:
        name, seed = args.run
        evaluation.need(name in variants, f'no variant is called {name}; take one of {", ".join(variants)}')
        evaluation.show(run(variants[name], seed))
        return
    missing = missing_runs(args.experiment, args.seeds)
    for _, _, name in missing:
        scene_folder(variants[name])                    # before two runs need it
    print(f'{len(missing)} runs have no row in {RESULTS}; --run makes one of the others again')
    with ThreadPoolExecutor(2) as pool:
        for row in pool.map(launch, missing):
            add_result(row)


if __name__ == '__main__':
    cli(main)
