"""The experiments of the course: which runs they have, each run being a row of lesson/results.csv.

    python -m lesson.experiments minutes                    makes the runs of `minutes` that have no row
    python -m lesson.experiments minutes --print            shows the commands of all its runs, and makes none
    python -m lesson.experiments train --method two-terms   train.py, with the methods of section 1, too

A run is a command of train.py, and commands that score its networks. It takes one thread of a CPU. Its row is found by
its seed, and by the words of the training command that decide its numbers. A run that has a row is not made again, even
if several experiments use it, so after an interruption just give the command again.

On drawn scenes each seed draws training scenes of its own; the held-out scenes are always the same. After the last
step the moving average of the weights is scored, for CLIP, too. On photographs (docs/data.md says where to get
Flickr8k) all runs train on the same 6,000. The teacher, or the only network, is scored on 1,000 test photographs: at
the step that is best on 1,000 validation photographs, and at the last (`last`).

A new row keeps the figures that the first line of results.csv names. Commit a052a90 has all figures of all runs, with
machines and commits, and the runs that chose the rates. In old rows of drawn scenes `seconds` is the wall time of
training alone, elsewhere the processor time of the whole command; and no-cross-attention padded caption 0, which the
command now cuts, so it differs in the last bits.

A processor rounds bf16 in its own way, so no experiment compares runs of two. Rows of data called @amd were made on an
AMD EPYC, at e3f75eb (two at its parent); on photographs text-distill and fewer captions at 7307453 and dd8518a, and
no-average and teacher-sees-all at 4f0baa6; on scenes text-distill and every-image at 4f0baa6. Kinds of captions, crops
together and segmentation were made at 0ac0a0e to 3d5f70f, with their rates (on seed 100). Of the others, drawn
scenes but for `steps` come from an AMD EPYC, too, `steps` and photographs from an Intel Xeon. Commits 049e9e4, 9bf674e
and 5f95903 have the runs that chose the rates of @amd.
"""
import csv
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from math import ceil
from pathlib import Path
from typing import NamedTuple

import train
from eval import shard_image, show
from lesson.methods import add_methods
from lesson.scenes import mask_of
from lesson.suppression import Pointing, read_scenes
from plumbing.benchmarks import IGNORE
from plumbing.errors import command, need
from plumbing.files import read_json, write_json
from plumbing.options import Parser
from plumbing.shards import Shards

# --- 1. Methods that train.py does not have --------------------------------------------------------------------------

OF_TRAIN = set(train.METHODS)
METHODS = train.METHODS


def train_added(words):
    """train.py with these methods, too, and without its report."""
    train.add_method('watched', 'cosmos')               # with Pointing
    given, _ = train.read_options(words)
    train.main(words, [Pointing()] if given['method'] == 'watched' else [])


# --- 2. The experiments ----------------------------------------------------------------------------------------------

PHOTOGRAPHS = 'photographs'
AMD = '@amd'
SCENES = 'scenes'
MASKED = 'masked'                       # scenes that are also segmented
# How many captions each training photograph keeps, its first ones. Validation and test keep all.
FEWER = {'photographs-1': 1, 'photographs-2': 2}

# A line has a run, its seeds, and the experiments that use it. From `method` on, the columns are options of train.py.
# The rate is the best of those that we tried on other seeds: by the mean of big and small objects named, or by R@10
# both ways on the validation photographs. With another pair, COSMOS keeps its rate.
TABLE = """
# experiments              run                seeds data        method             batch steps lr       more
# In equal time; `across` compares who reads what. CLIP gets 15 % more steps than its first estimate of 1,684, because
# with those it took less time than COSMOS. Seeds 5 to 7 came where a difference was undecided after five, or nearly so.
minutes,across             cosmos             0-7   scenes      cosmos             32    1000  0.001
minutes,across             no-cross-attention 0-7   scenes      no-cross-attention 32    1150  0.001
minutes                    clip               0-7   scenes      clip-averaged      64    1932  0.00025
reading,across             another-pair       0-7   scenes      another-pair       32    1000  0.001
reading,across             across             0-7   scenes      across             32    1000  0.001
# From the same 32,000 pairs; `reading` compares who reads what.
reading,pairs              cosmos             0-7   scenes      cosmos             32    1000  0.001
reading,pairs              no-cross-attention 0-7   scenes      no-cross-attention 32    1000  0.001
pairs                      clip               0-7   scenes      clip-averaged      64    500   0.00025
reading                    two-terms          0-7   scenes      two-terms          32    1000  0.001
# Three times as long as `minutes`. Seed 0 has chosen the rates. The last two were undecided after five seeds.
longer                     clip               1-5   scenes      clip-averaged      64    5796  0.00025
longer                     no-cross-attention 1-8   scenes      no-cross-attention 32    3450  0.001
longer                     cosmos             1-8   scenes      cosmos             32    3000  0.001
longer-reading             no-cross-attention 1-5   scenes      no-cross-attention 32    3450  0.001
longer-reading             cosmos             1-5   scenes      cosmos             32    3000  0.001
longer-reading             another-pair       1-5   scenes      another-pair       32    3000  0.001
longer-reading             across             1-5   scenes      across             32    3000  0.001
# In `pairs` CLIP makes half as many steps as COSMOS. Does it learn more from as many, of 32 pairs each?
steps                      cosmos             10-14 scenes      cosmos             32    1000  0.001
steps                      clip               10-14 scenes      clip-averaged      32    1000  0.00025
# On photographs: from the same 51,200 pairs, of which `table-5` has the rows of the paper's Table 5, and in equal time.
photo-pairs,table-5,first  clip               0-4   photographs clip               64    800   0.00025
photo-pairs,table-5        clip-aug           0-4   photographs clip-aug           64    800   0.00025
table-5,first              image-distill      0-4   photographs image-distill      64    800   0.0005
table-5                    text-crop          0-4   photographs text-crop          64    800   0.002
table-5,ladder             text-distill       0-4   photographs text-distill       64    800   0.002
table-5,ladder,photo-across cosmos            0-4   photographs cosmos             64    800   0.001
# `ladder` takes the last row of Table 5 in two steps: first its losses on cls and eot themselves, then reading.
ladder                     no-cross-attention 0-4   photographs no-cross-attention 64    800   0.002
photo-pairs,photo-minutes  cosmos             0-7   photographs cosmos             64    800   0.001
photo-pairs                no-cross-attention 0-7   photographs no-cross-attention 64    800   0.002
photo-minutes,photo-across no-cross-attention 0-4   photographs no-cross-attention 64    870   0.002
photo-minutes              clip               0-7   photographs clip               64    2740  0.00025
photo-minutes              clip-aug           0-4   photographs clip-aug           64    1840  0.00025
photo-across               across             0-4   photographs across             64    800   0.001
# Which losses need both the image and the text? And what do other methods find from the same pairs as COSMOS?
cut,attention              cosmos             0-4   scenes@amd   watched           32    1000  0.001    --eval-every 125
cut                        without-clip       0-4   scenes@amd   without-clip      32    1000  0.001
cut                        another-pair       0-4   scenes@amd   another-pair      32    1000  0.001
cut                        cosmos-photographs 0-4   photographs@amd cosmos         64    800   0.001
rivals,captions            cosmos             0-4   photographs@amd cosmos         64    800   0.001
rivals,captions            clip               0-4   photographs@amd clip           64    800   0.00025
rivals                     several-captions   0-4   photographs@amd several-captions 64  800   0.0005
rivals,no-copy             every-image        0-4   photographs@amd every-image    64    800   0.001
# Is it the reading that every-image owes its score to, or the self-distillation beside it? The rate of text-distill was
# chosen on the Xeon.
no-copy                    text-distill       0-4   photographs@amd text-distill   64    800   0.002
scenes-no-copy             text-distill       0-4   scenes@amd   text-distill      32    1000  0.001
scenes-no-copy             cosmos             0-4   scenes@amd   watched           32    1000  0.001    --eval-every 125
scenes-no-copy             every-image        0-4   scenes@amd   every-image       32    1000  0.001
# Does the teacher have to be an average? And may it see the local crops?
teacher                    cosmos             0-4   photographs@amd cosmos         64    800   0.001
teacher                    no-average         0-4   photographs@amd cosmos         64    800   0.001    --momentum 0 --momentum-ramp 0
teacher                    teacher-sees-all   0-2   photographs@amd teacher-sees-all 64  800   0.001
# What is left of the lead if each training photograph has one caption, or two? With two, COSMOS has the rate that is
# best with one and with five.
captions                   clip-1             0-4   photographs-1@amd clip         64    800   0.0005
captions                   cosmos-1           0-4   photographs-1@amd cosmos       64    800   0.001
captions                   clip-2             0-4   photographs-2@amd clip         64    800   0.0005
captions                   cosmos-2           0-4   photographs-2@amd cosmos       64    800   0.001
# Does it matter that global captions are long and local ones short? And would captions of what view 0 shows be better?
tune-long                  a                  100-100 photographs@amd long-captions 64 800   0.001
tune-long                  b                  100-100 photographs@amd long-captions 64 800   0.002
tune-long                  c                  100-100 photographs@amd long-captions 64 800   0.0005
tune-long                  d                  100-100 photographs@amd long-captions 64 800   0.004
tune-short                 a                  100-100 photographs@amd short-captions 64 800  0.001
tune-short                 b                  100-100 photographs@amd short-captions 64 800  0.002
tune-short                 c                  100-100 photographs@amd short-captions 64 800  0.0005
tune-short                 d                  100-100 photographs@amd short-captions 64 800  0.004
tune-together              a                  100-100 scenes@amd crops-together    32    1000  0.001
tune-together              b                  100-100 scenes@amd crops-together    32    1000  0.002
tune-together              c                  100-100 scenes@amd crops-together    32    1000  0.0005
tune-together              d                  100-100 scenes@amd crops-together    32    1000  0.00025
together                   cosmos             0-4   scenes@amd   watched           32    1000  0.001    --eval-every 125
together                   crops-together     0-4   scenes@amd   crops-together    32    1000  0.0005
kinds                      cosmos             0-4   photographs@amd cosmos         64    800   0.001
kinds                      long-captions      0-4   photographs@amd long-captions  64    800   0.002
kinds                      short-captions     0-4   photographs@amd short-captions 64    800   0.002
# The paper's third task, on scenes, whose masks are known: runs in equal time, as in `minutes`.
segment                    cosmos             0-4   masked@amd   cosmos            32    1000  0.001
segment                    text-distill       0-4   masked@amd   text-distill      32    1000  0.001
segment                    across             0-4   masked@amd   across            32    1000  0.001
segment                    every-image        0-4   masked@amd   every-image       32    1000  0.001
segment                    clip               0-4   masked@amd   clip-averaged     64    1932  0.00025
"""


class Run(NamedTuple):
    """A line of the table."""
    seeds: range
    data: str                       # SCENES, PHOTOGRAPHS, or of FEWER; then, perhaps, @amd
    method: str                     # of METHODS
    batch: str
    steps: str
    rate: str                       # peak learning rate
    more: list                      # words of further options

    @property
    def source(self):
        """The data without their @amd."""
        return self.data.removesuffix(AMD)

    @property
    def has_photographs(self):
        return self.source not in (SCENES, MASKED)

    @property
    def words(self):
        """The words of the training command that decide the numbers of a run, except its seed."""
        program = 'train.py' if self.method in OF_TRAIN else '-m lesson.experiments train'
        preset = 'tiny'
        eval_every = 0
        if self.has_photographs:
            preset = 'photo'
            eval_every = ceil(int(self.steps) / 8)
        whole = (f'{program} --preset {preset} --method {self.method} --batch {self.batch} --steps {self.steps} '
                 f'--lr {self.rate} --eval-every {eval_every} --precision bf16')
        return [*whole.split(), *self.more]

    @property
    def key(self):
        """What identifies a row, in addition to its seed."""
        machine = self.data.removeprefix(self.source)
        data = f'lesson.scenes{machine} DIR:'
        if self.source == MASKED:
            data = f'lesson.scenes{machine} MASKED:'
        if self.has_photographs:
            data = self.data.replace(PHOTOGRAPHS, 'Flickr8k') + ':'
        return ' '.join([data, *self.words])


def read_table(text):
    """-> {experiment: {name: Run}}"""
    found = {}
    for line in text.splitlines():
        if line and not line.startswith('#'):
            experiments, name, seeds, data, method, batch, steps, rate, *more = line.split()
            first, last = seeds.split('-')
            run = Run(range(int(first), int(last) + 1), data, method, batch, steps, rate, more)
            for experiment in experiments.split(','):
                found.setdefault(experiment, {})[name] = run
    return found


EXPERIMENTS = read_table(TABLE)

# --- 3. One run ------------------------------------------------------------------------------------------------------

FOLDER = Path('runs/lesson')


def first_captions(listing, count):
    """Write the list of photographs again, with the first `count` captions of each training photograph -> its path."""
    shorter = FOLDER / f'first-{count}.json'
    if not shorter.exists():
        whole = read_json(listing)
        for photograph in whole['images']:
            if photograph['split'] in ('train', 'restval'):
                photograph['sentences'] = photograph['sentences'][:count]
        FOLDER.mkdir(parents=True, exist_ok=True)
        write_json(shorter, whole)
    return shorter


def data_command(data, seed, flickr8k):
    """-> the folder of training and held-out data, and the words that make it."""
    if data not in (SCENES, MASKED):
        path = FOLDER / data
        listing = flickr8k / 'dataset_flickr8k.json'
        if data in FEWER:
            listing = first_captions(listing, FEWER[data])
        return path, ['-m', 'extras.prepare', 'pack', listing, flickr8k / 'Images', path]
    path = FOLDER / f'scenes-{seed}'
    return path, ['-m', 'lesson.scenes', path, '--seed', seed]


def commands(run, seed, flickr8k):
    """-> the folder of a run, and {file: the words of the command that writes it}: the data (the file is their last
    tar), the networks, the figures."""
    name = f'{run.data} {run.method} {run.steps} {run.rate} {" ".join(run.more)} {seed}'
    out = FOLDER / re.sub('[ -]+', '-', name)
    best = out / 'best.pt'
    last = out / 'last.pt'
    shards, making = data_command(run.source, seed, flickr8k)
    found = {
        shards / 'val/00000.tar': making,
        last: [*run.words, '--seed', seed, '--data', shards, '--workers', 0, '--out', out]}
    measure = ['-m', 'lesson.suppression']
    images = ['--karpathy', flickr8k / 'dataset_flickr8k.json', '--images', flickr8k / 'Images']
    retrieval = ['eval.py', 'retrieval', *images, '--split', 'test']
    scoring = {}                        # {group of figures: words}
    if run.has_photographs:
        scoring['retrieval'] = [*retrieval, best]
        scoring['last'] = [*retrieval, last]            # does a lead depend on when training stops?
        if METHODS[run.method].has_teacher:             # or on the teacher, which averages weights?
            scoring['student'] = [*retrieval, best, '--weights', 'student']
        if METHODS[run.method].has_cross_attention and run.method != 'every-image':     # which has no Eq. 1-2
            scoring['reading'] = [*measure, best, '--shards', shards]
    else:
        scoring['scenes'] = [*measure, last, '--shards', shards]
        if run.method == 'every-image':
            scoring['scenes'] += ['--only', 'named']
        if run.source == MASKED:
            masks = FOLDER / 'masks'
            found[masks / 'classes.txt'] = ['-m', 'lesson.experiments', 'masks', shards, masks]
            scoring['segment'] = ['eval.py', 'segment', last, '--images', masks / 'images', '--masks', masks / 'masks',
                                  '--classes', masks / 'classes.txt', '--templates', masks / 'templates.txt']
    for group, words in scoring.items():
        path = out / f'{group}.json'
        found[path] = [*words, '--json', path]
    return out, found


def line_of(words):
    """A command as a line to copy."""
    return 'OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= ' + shlex.join(['python', *map(str, words)])


def call(words):
    """Run python with these words, in a process of its own with one thread -> its processor seconds. NB: they are right
    only while one process runs at a time."""
    alone = os.environ | {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *map(str, words)], stdout=subprocess.DEVNULL, env=alone)
    need(done.returncode == 0, f'this command failed: {line_of(words)}')
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def flat(figures, prefix=''):
    """{'small': {'top1': x}} -> {'small.top1': x}"""
    row = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            row |= flat(value, f'{prefix}{name}.')
        elif isinstance(value, (int, float)):           # commands also write the name of the checkpoint
            row[prefix + name] = round(value, 4)
    return row


def make_row(run, seed, flickr8k):
    """Train a run and score it -> its row."""
    out, found = commands(run, seed, flickr8k)
    shutil.rmtree(out, ignore_errors=True)              # a run that was interrupted starts anew
    row = {'run': run.key, 'seed': seed}
    for path, words in found.items():
        if path.exists():                               # data that another run has made
            continue
        seconds = call(words)
        if path.name == 'last.pt':
            row['seconds'] = int(seconds)
        if path.suffix == '.json':
            # lesson.suppression names the groups of its figures itself
            prefix = '' if path.stem in ('scenes', 'reading') else f'{path.stem}.'
            row |= flat(read_json(path), prefix)
    return row


# --- 4. Many runs ----------------------------------------------------------------------------------------------------

RESULTS = Path('lesson/results.csv')
CURVES = Path('lesson/curves.csv')


def read_results():
    """-> {(run, seed): row}; a row is {column: text}."""
    rows = csv.DictReader(RESULTS.read_text().splitlines())
    return {(row['run'], int(row['seed'])): row for row in rows}


def append_result(row):
    """Of a row only the columns of the file are written."""
    columns = RESULTS.read_text().splitlines()[0].split(',')
    with open(RESULTS, 'a', newline='') as file:
        csv.DictWriter(file, columns, extrasaction='ignore', lineterminator='\n').writerow(row)


def write_masks(shards, out):
    """The held-out scenes as images and masks for eval.py segment. The ground is left out, as in VOC20."""
    from PIL import Image
    from lesson.scenes import FORMS, NAMES
    out = Path(out)
    (out / 'images').mkdir(parents=True, exist_ok=True)
    (out / 'masks').mkdir(exist_ok=True)
    held_out = Shards(shards, split='val')
    for pair, scene in enumerate(read_scenes(held_out)):
        mask = mask_of(scene)
        classes = mask * 0 + IGNORE
        for number, thing in enumerate(scene, 1):
            classes[mask == number] = NAMES.index(thing.name)
        Image.fromarray(classes).save(out / f'masks/{pair:04d}.png')
        shard_image(held_out, pair).convert('RGB').save(out / f'images/{pair:04d}.png')
    (out / 'templates.txt').write_text('\n'.join(FORMS) + '\n')
    (out / 'classes.txt').write_text('\n'.join(NAMES) + '\n')


def append_curve(run, seed, out):
    """What the run in `out` has found on its way: a line of curves.csv for each evaluation."""
    columns = CURVES.read_text().splitlines()[0].split(',')
    with open(CURVES, 'a', newline='') as file:
        writer = csv.DictWriter(file, columns, extrasaction='ignore', lineterminator='\n')
        for line in (out / 'log.jsonl').read_text().splitlines():
            entry = json.loads(line)
            if 'eval' in entry:
                writer.writerow({'run': run.key, 'seed': seed, 'step': entry['step']} | flat(entry['eval']))


def main():
    add_methods()
    if sys.argv[1:2] == ['train']:
        return train_added(sys.argv[2:])
    if sys.argv[1:2] == ['masks']:
        return write_masks(*sys.argv[2:])
    parser = Parser(prog='python -m lesson.experiments', epilog=__doc__)
    parser.add_argument('experiment', choices=EXPERIMENTS)
    parser.add_argument('--print', action='store_true', help='print the commands, and make no run')
    parser.add_argument('--flickr8k', type=Path, default='flickr8k',
                        help='folder with dataset_flickr8k.json and Images/ (%(default)s)')
    args = parser.parse_args()
    runs = EXPERIMENTS[args.experiment]
    wanted = sorted((seed, name) for name, run in runs.items() for seed in run.seeds)
    if args.print:
        lines = []
        for seed, name in wanted:
            _, found = commands(runs[name], seed, args.flickr8k)
            lines += [f'# {name}, seed {seed}', *map(line_of, found.values())]
        print(*dict.fromkeys(lines), sep='\n')          # once, what makes data that runs share
        return
    for seed, name in wanted:
        run = runs[name]
        if (run.key, seed) not in read_results():
            row = make_row(run, seed, args.flickr8k)
            show(row)
            append_result(row)
            append_curve(run, seed, commands(run, seed, args.flickr8k)[0])


if __name__ == '__main__':
    command(main)
