"""Photographs: COSMOS against CLIP on Flickr8k, from scratch. Each run is a row of lesson/results.csv.

    python -m lesson.photos photo-minutes                    makes the runs that have no row, two at a time
    python -m lesson.photos photo-minutes --print            packs the photographs, and prints the commands of its runs
    python -m lesson.photos photo-minutes --run cosmos 0     makes one run: prints figures, adds a row if it has none

Unlike the runs on drawn scenes, these are commands that you could type yourself: `--print` prints one line for each
run, to copy. First train.py trains on 6,000 photographs, and keeps the network that is best on 1,000 validation
photographs (best.pt). Then eval.py scores it on 1,000 test photographs. Further calls score the last weights (`last`)
and, if the method has a teacher, the student in the teacher's place (`student`). If CIFAR-10 is at hand, it is
classified. What h_T and h_I copy is measured on the validation photographs (`conflict`, page 5 of the course). A run
takes one thread of a CPU. Flickr8k is for research and education only, so it is not part of this repository;
docs/own-data.md says where to get it. Shards and networks go to runs/photos.

Every method of `photo-minutes` and `photo-pairs` gets the learning rate that is best for it on the validation
photographs (`photo-tune`). No rate and no step is chosen on the test photographs.
"""
import json
import resource
import shlex
import shutil
import subprocess
import sys
from functools import partial
from math import ceil
from pathlib import Path
from typing import NamedTuple

from lesson.experiments import CODE, SHARED, add_options, flat, make_runs, origin, wanted_runs
from plumbing.errors import command, need
from plumbing.files import read_json, write_json
from plumbing.options import Parser
from plumbing.weights import Origin
from train import METHODS, PRESETS

FOLDER = Path('runs/photos')
BATCH = PRESETS['photo'].recipe['batch']
STEPS = PRESETS['photo'].recipe['steps']
ALL = 6000                              # training photographs

# --- 1. The experiments ----------------------------------------------------------------------------------------------

class Photos(NamedTuple):
    """How runs are made. Two experiments with the same variant share the runs of the seeds that both have."""
    method: str                         # a row of train.METHODS; `plain` is no-cross-attention's name in results.csv
    steps: int
    rate: float                         # peak learning rate
    seeds: range
    photographs: int = ALL              # to train on
    is_scored: bool = True              # on the test photographs; runs that choose a rate are not

    @property
    def row(self):
        return 'no-cross-attention' if self.method == 'plain' else self.method

    def label(self):
        return LABELS[self.method]

    def recipe(self):
        """Everything that makes a run, except its seed, in words."""
        return (f'{self.method}, {self.photographs} photographs of Flickr8k, batch {BATCH}, '
                f'steps {self.steps}, rate {self.rate}')


# For each method: its label in plots, and the steps that take as long as those of COSMOS.
LABELS = {'clip': 'CLIP', 'clip-aug': 'CLIP, two crops', 'plain': 'COSMOS without cross-attention',
          'across': 'COSMOS that reads across', 'cosmos': 'COSMOS'}
MINUTES = {'clip': 2740, 'cosmos': STEPS, 'plain': 870, 'clip-aug': 1840, 'across': STEPS}
# The rates with the best R@10 on the validation photographs, averaged over both directions. For CLIP they are the same
# with many steps and with few.
RATES = {'clip': 2.5e-4, 'clip-aug': 2.5e-4, 'plain': 2e-3, 'across': 1e-3, 'cosmos': 1e-3}
TUNED_ON = range(100, 101)              # a seed that is used for tuning only
THREE = range(3)                        # seeds
FIVE = range(5)
EIGHT = range(8)                        # if a difference was undecided or barely decided after five


def tune(tried, steps):
    """A variant for each method and each rate that is tried. tried: {method: rates}; steps: {method: steps}."""
    variants = {}
    for method, rates in tried.items():
        for rate in map(float, rates.split()):
            name = f'{method}-{rate:g}'
            variants[name] = Photos(method, steps[method], rate, TUNED_ON, is_scored=False)
    return variants


def race(methods, steps, rates, seeds, **how):
    variants = {}
    for method in methods.split():
        variants[method] = Photos(method, steps[method], rates[method], seeds, **how)
    return variants


SAME_PAIRS = dict.fromkeys(MINUTES, STEPS)
LONGER = {method: 3 * steps for method, steps in MINUTES.items()}


EXPERIMENTS = {
    'photo-tune': tune({
        'clip': '2e-3 1e-3 5e-4 2.5e-4 1.25e-4', 'clip-aug': '1e-3 5e-4 2.5e-4 1.25e-4',
        'plain': '4e-3 2e-3 1e-3 5e-4', 'cosmos': '2e-3 1e-3 5e-4'}, MINUTES),
    'photo-tune-pairs': tune({
        'clip': '1e-3 5e-4 2.5e-4 1.25e-4', 'clip-aug': '1e-3 5e-4 2.5e-4 1.25e-4'}, SAME_PAIRS),
    'photo-pairs': race('clip clip-aug', SAME_PAIRS, RATES, FIVE) | race('plain cosmos', SAME_PAIRS, RATES, EIGHT),
    'photo-minutes': race('clip-aug plain', MINUTES, RATES, FIVE) | race('clip cosmos', MINUTES, RATES, EIGHT),
    'photo-longer': race('clip plain cosmos', LONGER, RATES, THREE),
    # Fewer photographs, in the same minutes.
    'photo-half': race('clip plain cosmos', MINUTES, RATES, THREE, photographs=3000),
    'photo-quarter': race('clip plain cosmos', MINUTES, RATES, THREE, photographs=1500),
    'photo-tune-across': tune({'across': '2e-3 1e-3 5e-4'}, MINUTES),
    'photo-across': race('plain across cosmos', MINUTES, RATES, FIVE)}
# Experiments that lack runs, so plots.py leaves them out.
OPEN = ['photo-longer']

# R@10 was chosen before the first run, because 1,000 photographs measure it more precisely than R@1.
RECALL = 'retrieval.image_to_text_R@10 retrieval.text_to_image_R@10'
# The same of the last weights. We decided to compare these only after the runs.
LAST = 'last.image_to_text_R@10 last.text_to_image_R@10'
RIVALS = 'cosmos~clip cosmos~clip-aug cosmos~plain plain~clip'
COMPARISONS = {
    'photo-pairs': {RECALL: RIVALS, LAST: 'cosmos~plain'},
    'photo-minutes': {RECALL: RIVALS, LAST: 'cosmos~clip cosmos~clip-aug'},
    'photo-longer': {RECALL: 'cosmos~clip cosmos~plain plain~clip'},
    'photo-half': {RECALL: 'cosmos~clip cosmos~plain plain~clip'},
    'photo-quarter': {RECALL: 'cosmos~clip cosmos~plain plain~clip'},
    'photo-across': {RECALL: 'across~cosmos across~plain', LAST: 'across~cosmos'}}

# --- 2. One run ------------------------------------------------------------------------------------------------------

FEWER = Path('lesson/photos.json')      # imgid of half of the training photographs; the first 1,500 are a quarter
CIFAR10 = SHARED / 'data/cifar10'


def shard_folder(flickr8k, photographs):
    """Shards with this many of the training photographs, and with all validation photographs."""
    folder = FOLDER / f'shards-{photographs}'
    if not (folder / 'train').is_dir():
        listing = read_json(flickr8k / 'dataset_flickr8k.json')
        kept = range(len(listing['images']))
        if photographs < ALL:
            kept = read_json(FEWER)[:photographs]
        kept = set(kept)
        images = []
        for image in listing['images']:
            if image['split'] != 'train' or image['imgid'] in kept:
                images.append(image)
        shorter = FOLDER / f'{photographs}.json'
        write_json(shorter, {'images': images})
        call(['-m', 'extras.prepare', 'pack', shorter, flickr8k / 'Images', folder])
    return folder


def call(words):
    """Run python with these words, in a process of its own."""
    subprocess.run([sys.executable, *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def commands(variant, seed, flickr8k):
    """-> the folder of a run, {what: the words of a command}. 'train' comes first; each of the others writes
    WHAT.json."""
    out = FOLDER / '-'.join(variant.recipe().replace(',', '').split() + [str(seed)])
    best = out / 'best.pt'
    shards = FOLDER / f'shards-{variant.photographs}'
    found = {'train': [
        'train.py', '--data', shards, '--preset', 'photo', '--method', variant.row,
        '--steps', variant.steps, '--lr', variant.rate, '--seed', seed,
        '--eval-every', ceil(variant.steps / 8), '--precision', 'bf16', '--workers', 0, '--out', out]}
    if variant.is_scored:
        photographs = ['--karpathy', flickr8k / 'dataset_flickr8k.json', '--split', 'test', '--images',
                       flickr8k / 'Images']
        scored = {'retrieval': [best], 'last': [out / 'last.pt']}       # does a lead depend on when training stops?
        # Does a lead depend on the teacher, which averages weights?
        if METHODS[variant.row].has_teacher:
            scored['student'] = [best, '--weights', 'student']
        for what, checkpoint in scored.items():
            found[what] = ['eval.py', 'retrieval', *checkpoint, *photographs, '--json', out / f'{what}.json']
        if CIFAR10.is_dir():
            found['cifar10'] = [
                'eval.py', 'classify', best, '--folder', CIFAR10, '--json', out / 'cifar10.json']
        if METHODS[variant.row].has_cross_attention:
            found['conflict'] = ['-m', 'lesson.suppression', best, '--shards', shards / 'val',
                                 '--json', out / 'conflict.json']
    return out, {what: ['python', *map(str, words)] for what, words in found.items()}


def make_row(variants, flickr8k, key):
    """Train a run, and return all its figures. key: seed, name of a variant."""
    seed, name = key
    variant = variants[name]
    out, words = commands(variant, seed, flickr8k)
    shutil.rmtree(out, ignore_errors=True)              # a run that was interrupted starts anew
    figures = {'steps': variant.steps, 'pairs': variant.steps * BATCH}
    for what, (_, *arguments) in words.items():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        call(arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if what == 'train':             # processor time, because other programs may run, too
            user = after.ru_utime - before.ru_utime
            system = after.ru_stime - before.ru_stime
            figures['seconds'] = int(user + system)
            figures |= validation(out)
        else:
            figures |= test_figures(what, read_json(out / f'{what}.json'))
    row = {'run': variant.recipe(), 'seed': seed} | origin(f'{CODE} train.py') | flat(figures)
    write_json(out / 'row.json', row)
    return row


def validation(out):
    """The validation figures of the step that best.pt was saved at, which has the best mean R@1."""
    best = {}
    for line in (out / 'log.jsonl').read_text().splitlines():
        entry = json.loads(line)
        if 'eval' in entry:
            found = entry['eval']['retrieval']
            mean = (found['image_to_text_R@1'] + found['text_to_image_R@1']) / 2
            if mean > best.get('mean', -1):
                best = {'mean': mean, 'step': entry['step'], 'retrieval': found}
    return {'best_step': best['step'], 'val': best['retrieval']}


def test_figures(what, found):
    """The figures of a command, under the names of the columns. What it wrote about the checkpoint is left out."""
    for name in Origin._fields:
        found.pop(name, None)
    if what == 'cifar10':
        return {'cifar10': {'top1': found['top1']}}
    return {what: found.get(what, found)}


# --- 3. Many runs ----------------------------------------------------------------------------------------------------

def main():
    parser = Parser(prog='python -m lesson.photos', epilog=__doc__)
    add_options(parser, EXPERIMENTS)
    parser.add_argument('--flickr8k', type=Path, default=SHARED / 'data/flickr8k',
                        help='folder with dataset_flickr8k.json and Images/ (%(default)s)')
    parser.add_argument('--print', action='store_true', help='print the commands of the runs, and make none')
    args = parser.parse_args()
    variants = EXPERIMENTS[args.experiment]
    need((args.flickr8k / 'dataset_flickr8k.json').exists(),
         f'{args.flickr8k} has no dataset_flickr8k.json; docs/own-data.md says where to get it')
    for photographs in {variant.photographs for variant in variants.values()}:
        # Two runs must not pack the same folder at once, so it is packed here.
        shard_folder(args.flickr8k, photographs)
    if args.print:
        for name, variant in variants.items():
            for seed in variant.seeds[:args.seeds]:
                _, words = commands(variant, seed, args.flickr8k)
                print(f'# {name}, seed {seed}')
                lines = [f'OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= {shlex.join(each)}' for each in words.values()]
                print(' && '.join(lines))
        return
    make_runs(partial(make_row, variants, args.flickr8k), wanted_runs(args, variants))


if __name__ == '__main__':
    command(main)
