"""The experiments of the course: which runs they have, each run being a row of lesson/results.csv.

    python -m lesson.experiments minutes                    makes the runs of `minutes` that have no row, two at a time
    python -m lesson.experiments minutes --print            shows their commands, and makes none
    python -m lesson.experiments train --method two-terms   train.py, with the methods of section 1, too

A run is a command of train.py, and commands that score its networks. Its row is found by its seed, and by the words of
the training command that decide its numbers. A run that has a row is not made again, even if several experiments use
it, so after an interruption just give the command again. A run takes one thread of a CPU. Data and networks are kept in
runs/lesson.

On drawn scenes each seed draws training scenes of its own; the held-out scenes are always the same. After the last
step the moving average of the weights is scored, for CLIP, too. On photographs (docs/own-data.md says where to get
Flickr8k) all runs train on the same 6,000. The teacher, or the only network, is scored on 1,000 test photographs: at
the step that is best on 1,000 validation photographs, and at the last (`last`).

Old rows of drawn scenes: `seconds` is the wall time of training alone, elsewhere the processor time of the whole
command; no-cross-attention padded caption 0, which the command now cuts, so it differs in the last bits.
Rows of photographs of 965bc15: the columns of `minor` were added later, from networks that were made again, and that
gave all other figures to the digit.
"""
import csv
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import ceil
from pathlib import Path
from typing import NamedTuple

import train
import torch
import torch.nn.functional as F

from cosmos import COSMOS, Output, Teacher, attention_weights, cosmos_terms, match, unit
from cosmos import gather
from eval import show
from plumbing.errors import command, need, warn
from plumbing.files import read_json, replacing
from plumbing.options import Parser
from plumbing.weights import Origin

# --- 1. Methods that train.py does not have --------------------------------------------------------------------------

class ReadsAnotherPair(COSMOS):
    """What is read comes from another pair than the targets, so it cannot help to find them."""

    def forward(self, images, texts):
        cls, image_sequence = self.visual.with_sequence(images)
        eot, text_sequence = self.text.with_sequence(texts)
        # Pair i reads the image and the caption of pair i - 1.
        patches = self.image_map(image_sequence[:, 1:]).roll(1, dims=0)
        words = self.text_map(text_sequence).roll(1, dims=0)
        h_I = self.text_cross(cls, words) + cls         # (V, B, D)
        h_T = self.image_cross(eot, patches) + eot      # (U, B, D)
        return Output(unit(cls), unit(eot), unit(h_I), unit(h_T))


class ReadsEveryImage(COSMOS):
    """Each caption reads every image of the batch through C^I. There is no residual, so what was read can only help to
    find the image if it agrees with the caption. After FLAIR (CVPR 2025). One process, --accum 1; h_I is None."""

    def forward(self, images, texts):
        """-> Output, with h_T (B, U, B, D): what each caption of each pair (the middle two) has read in each image."""
        cls, image_sequence = self.visual.with_sequence(images)
        eot = self.text(texts)                                          # (U, B, D)
        patches = self.image_map(image_sequence[:, 1:])                 # (B, P, D)
        cross = self.image_cross
        queries = cross.ln_q(eot).flatten(0, 1)[None]                   # (1, U * B, D), the same for every image
        q, k, v = cross.attn.project(queries, cross.ln_k(patches))
        read = attention_weights(q, k) @ v                              # (B, H, U * B, d)
        read = cross.attn.out_proj(read.transpose(1, 2).flatten(2))     # (B, U * B, D)
        return Output(unit(cls), unit(eot), None, unit(read).unflatten(1, eot.shape[:2]))


def every_image_terms(out, cls_t, eot_t, scale):
    """A caption must find its own image among all, by what it reads there, and an image its own caption. Beside it,
    self-distillation of both sides, as in text-distill."""
    scores = scale * (out.h_T * out.eot).sum(dim=-1)                    # (B images, U, B captions)
    own = torch.arange(len(scores), device=scores.device)
    own = own[:, None].expand(-1, out.eot.shape[0])                     # (B, U)
    finds_caption = F.cross_entropy(scores.transpose(1, 2), own)        # over the captions of a view
    finds_image = F.cross_entropy(scores.permute(2, 0, 1), own)         # over the images
    return {
        'reads': (finds_caption + finds_image) / 2,
        'cls_cls_t': match(*gather(out.cls, cls_t), scale),
        'eot_eot_t': match(*gather(out.eot, eot_t), scale)}


class SilentTeacher(Teacher):
    """An average of the student that is evaluated, but teaches nothing: for CLIP on drawn scenes."""

    def forward(self, images, texts):
        silence = images[0].new_zeros(1, len(images[0]), self.model.config.embed_dim)
        return silence, silence


def two_terms(out, cls_t, eot_t, scale):
    """Eq. 6 without the two terms that copying can make small. The other two have a weight of one half each."""
    terms = cosmos_terms(out, cls_t, eot_t, scale)
    del terms['h_T_cls_t'], terms['h_I_eot_t']
    return terms


# {name: a row for train.METHODS, and what takes the place of train.COSMOS and of train.Teacher}
ADDED = {
    'clip-averaged': (train.METHODS['clip']._replace(has_teacher=True), COSMOS, SilentTeacher),
    'several-captions': (
        train.METHODS['text-distill']._replace(has_local_images=False, has_teacher=False, terms=train.no_terms),
        COSMOS, Teacher),
    'every-image': (train.METHODS['cosmos']._replace(terms=every_image_terms), ReadsEveryImage, Teacher),
    # Its teacher sees the local image views, too.
    'teacher-sees-all': (train.METHODS['cosmos'], COSMOS, Teacher),
    'another-pair': (train.METHODS['cosmos'], ReadsAnotherPair, Teacher),
    'two-terms': (train.METHODS['cosmos']._replace(terms=two_terms), COSMOS, Teacher)}


def train_added(words):
    """train.py with these methods, too. NB: it changes the module for the rest of this process."""
    train.METHODS = train.METHODS | {name: row for name, (row, _, _) in ADDED.items()}
    method = train.read_options(words).method
    if method in ADDED:
        _, train.COSMOS, train.Teacher = ADDED[method]
    if method == 'teacher-sees-all':
        train.GLOBALS = None            # train_step gives the teacher images[:GLOBALS], so these are all
    train.main(words)


# --- 2. The experiments ----------------------------------------------------------------------------------------------

PHOTOGRAPHS = 'photographs'
FEWER = {'photographs-1': 1, 'photographs-2': 2}    # how many captions a training photograph keeps, the first ones
TWO = '--objects 2 --dominant-size 0.38'
WORLDS = {                          # options of lesson.scenes, for drawn scenes
    'built-in': '',
    'alone': f'{TWO} --company none',
    'equal': f'{TWO} --company equal',
    'big': TWO}
FIVE = range(5)                     # seeds
EIGHT = range(8)                    # if a difference was undecided or barely decided after five
LATER = range(1, 6)                 # of long runs: 0 has chosen the rates, see `tune-longer`


class Variant(NamedTuple):
    """How runs are made. Variants that differ in nothing but the last three fields share their runs."""
    method: str                     # of train.METHODS, or of ADDED
    batch: int
    steps: int
    rate: float                     # peak learning rate
    world: str = 'built-in'         # of WORLDS, or PHOTOGRAPHS
    more: str = ''                  # further options of train.py
    seeds: range = FIVE
    tested: tuple = ()              # further worlds in which objects are to be named
    is_scored: bool = True          # on the test photographs; runs that choose a rate are not

    @property
    def is_of_photographs(self):
        return self.world == PHOTOGRAPHS or self.world in FEWER

    def words(self):
        """The words of the training command that decide the numbers of a run, except its seed."""
        program = '-m lesson.experiments train' if self.method in ADDED else 'train.py'
        preset = 'tiny'
        eval_every = 0
        if self.is_of_photographs:
            preset = 'photo'
            eval_every = ceil(self.steps / 8)
        return (f'{program} --preset {preset} --method {self.method} --batch {self.batch} --steps {self.steps} '
                f'--lr {self.rate} --eval-every {eval_every} --precision bf16 {self.more}').split()

    def key(self):
        """What identifies a row, in addition to its seed."""
        data = ['Flickr8k:']
        if self.world in FEWER:
            data = [f'Flickr8k-{FEWER[self.world]}:']
        elif self.world != PHOTOGRAPHS:
            data = ['lesson.scenes', *WORLDS[self.world].split(), 'DIR:']
        return ' '.join([*data, *self.words()])


# What a race starts from. Steps: how many, by our estimate, take as long as those of COSMOS. The rate: of those that
# `tune`, `tune-again` and `tune-across` tried, the one with which the mean of big and small objects named is highest,
# over all seeds that tried it. With another pair, COSMOS keeps its rate.
ON_SCENES = {
    'clip': Variant('clip-averaged', 64, 1684, 2.5e-4),
    'no-cross-attention': Variant('no-cross-attention', 32, 1150, 1e-3),
    'another-pair': Variant('another-pair', 32, 1000, 1e-3),
    'across': Variant('across', 32, 1000, 1e-3),
    'two-terms': Variant('two-terms', 32, 1000, 1e-3),
    'cosmos': Variant('cosmos', 32, 1000, 1e-3)}
# The rate: the one with the best R@10 on the validation photographs, averaged over both directions. For CLIP it is the
# same with many steps and with few.
ON_PHOTOGRAPHS = {
    'clip': Variant('clip', 64, 2740, 2.5e-4, PHOTOGRAPHS),
    'clip-aug': Variant('clip-aug', 64, 1840, 2.5e-4, PHOTOGRAPHS),
    'image-distill': Variant('image-distill', 64, 800, 5e-4, PHOTOGRAPHS),
    'text-crop': Variant('text-crop', 64, 800, 2e-3, PHOTOGRAPHS),
    'text-distill': Variant('text-distill', 64, 800, 2e-3, PHOTOGRAPHS),
    'no-cross-attention': Variant('no-cross-attention', 64, 870, 2e-3, PHOTOGRAPHS),
    'across': Variant('across', 64, 800, 1e-3, PHOTOGRAPHS),
    'cosmos': Variant('cosmos', 64, 800, 1e-3, PHOTOGRAPHS)}
RIVALS_ON_PHOTOGRAPHS = {
    'several-captions': Variant('several-captions', 64, 800, 1e-3, PHOTOGRAPHS),
    'every-image': Variant('every-image', 64, 800, 1e-3, PHOTOGRAPHS),
    'no-average': Variant('cosmos', 64, 800, 1e-3, PHOTOGRAPHS, '--momentum 0 --momentum-ramp 0'),
    'teacher-sees-all': Variant('teacher-sees-all', 64, 800, 1e-3, PHOTOGRAPHS),
    'clip-1': Variant('clip', 64, 800, 2.5e-4, 'photographs-1'),
    'cosmos-1': Variant('cosmos', 64, 800, 1e-3, 'photographs-1'),
    'clip-2': Variant('clip', 64, 800, 2.5e-4, 'photographs-2'),
    'cosmos-2': Variant('cosmos', 64, 800, 1e-3, 'photographs-2')}
SAME_PAIRS = dict.fromkeys(ON_PHOTOGRAPHS, 800)                 # steps
# On scenes: as many as 32,000 pairs make, and three times as many as `minutes` has.
PAIRS = {'clip': 500, 'no-cross-attention': 1000}
LONGER = {'clip': 5796, 'no-cross-attention': 3450, 'across': 3000, 'another-pair': 3000, 'cosmos': 3000}


def race(table, methods, seeds=FIVE, steps={}, **how):
    """A variant for each method of a table. steps: {method: if they are not those of the table}."""
    variants = {}
    for name in methods.split():
        usual = table[name]
        variants[name] = usual._replace(steps=steps.get(name, usual.steps), seeds=seeds, **how)
    return variants


def tune(table, tried, steps={}, seeds=range(100, 101), **how):
    """Which learning rate is best? tried: {method: rates}. These seeds, but for 0, are used for nothing else."""
    variants = {}
    for name, usual in race(table, ' '.join(tried), seeds, steps, is_scored=False, **how).items():
        for rate in map(float, tried[name].split()):
            variants[f'{name}-{rate:g}'] = usual._replace(rate=rate)
    return variants


def company():
    """Page 2: trained and tested with a small object alone, beside an equal, beside a big one; then tested alone."""
    variants = {}
    for world in 'alone', 'equal', 'big':
        runs = race(ON_SCENES, 'clip cosmos', world=world, tested=('alone',))
        variants |= {f'{name}-{world}': variant for name, variant in runs.items()}
    return variants


EXPERIMENTS = {
    'tune': tune(ON_SCENES, {
        'clip': '5e-4 2.5e-4 1.25e-4', 'no-cross-attention': '2e-3 1e-3 5e-4',
        'cosmos': '2e-3 1e-3 5e-4 2.5e-4'}),
    'tune-again': tune(ON_SCENES, {'clip': '2.5e-4 1.25e-4', 'cosmos': '1e-3 5e-4'}, seeds=range(101, 102)),
    'tune-pairs': tune(ON_SCENES, {'clip': '1e-3 5e-4 2.5e-4 1.25e-4'}, PAIRS),
    'tune-longer': tune(ON_SCENES, {
        'clip': '2.5e-4 1.25e-4', 'no-cross-attention': '1e-3 5e-4', 'across': '1e-3 5e-4',
        'cosmos': '1e-3 5e-4'}, LONGER, range(1)),
    'tune-big': tune(ON_SCENES, {'clip': '1e-3 5e-4 2.5e-4 1.25e-4', 'cosmos': '1e-3 5e-4'}, world='big'),
    'tune-across': tune(ON_SCENES, {'across': '2e-3', 'two-terms': '2e-3 1e-3 5e-4'}) | tune(
        ON_SCENES, {'across': '1e-3 5e-4'}, seeds=range(100, 102)),
    'company': company(),
    'company-size': company(),          # asked when the rows were known, so a family of its own
    # CLIP gets 15 % more steps than its row says, because with those it took less time than COSMOS.
    'minutes': race(ON_SCENES, 'cosmos no-cross-attention clip', EIGHT, {'clip': 1932}),
    'pairs': race(ON_SCENES, 'cosmos no-cross-attention clip', EIGHT, PAIRS),
    # The last two were undecided after five seeds.
    'longer': race(ON_SCENES, 'clip', LATER, LONGER) | race(
        ON_SCENES, 'no-cross-attention cosmos', range(1, 9), LONGER),
    # Who reads what: from the same pairs (`reading`), in about the same minutes (`across`), in three times the minutes.
    'reading': race(ON_SCENES, 'cosmos another-pair no-cross-attention across two-terms', EIGHT, PAIRS),
    'across': race(ON_SCENES, 'cosmos another-pair no-cross-attention across', EIGHT),
    'longer-reading': race(ON_SCENES, 'cosmos another-pair no-cross-attention across', LATER, LONGER),
    # What C^I hands over; other seeds, because these runs come from another machine.
    'handed': race(ON_SCENES, 'cosmos', range(10, 15)),
    # In `pairs` CLIP makes half as many steps as COSMOS. Does it learn more from as many, of 32 pairs each?
    'tune-steps': tune(ON_SCENES, {'clip': '1e-3 5e-4 2.5e-4 1.25e-4'}, {'clip': 1000}, batch=32),
    'steps': race(ON_SCENES, 'cosmos clip', range(10, 15), {'clip': 1000}, batch=32),
    'photo-tune': tune(ON_PHOTOGRAPHS, {
        'clip': '2e-3 1e-3 5e-4 2.5e-4 1.25e-4', 'clip-aug': '1e-3 5e-4 2.5e-4 1.25e-4',
        'no-cross-attention': '4e-3 2e-3 1e-3 5e-4', 'across': '2e-3 1e-3 5e-4',
        'cosmos': '2e-3 1e-3 5e-4'}),
    'photo-tune-pairs': tune(ON_PHOTOGRAPHS, {
        'clip': '1e-3 5e-4 2.5e-4 1.25e-4', 'clip-aug': '1e-3 5e-4 2.5e-4 1.25e-4'}, SAME_PAIRS),
    'tune-table-5': tune(ON_PHOTOGRAPHS, {
        'image-distill': '1e-3 5e-4 2.5e-4', 'text-crop': '4e-3 2e-3 1e-3 5e-4',
        'text-distill': '4e-3 2e-3 1e-3 5e-4'}),
    'photo-pairs': race(ON_PHOTOGRAPHS, 'clip clip-aug', FIVE, SAME_PAIRS) | race(
        ON_PHOTOGRAPHS, 'no-cross-attention cosmos', EIGHT, SAME_PAIRS),
    'photo-minutes': race(ON_PHOTOGRAPHS, 'clip-aug no-cross-attention') | race(
        ON_PHOTOGRAPHS, 'clip cosmos', EIGHT),
    'photo-across': race(ON_PHOTOGRAPHS, 'no-cross-attention across cosmos'),
    'table-5': race(ON_PHOTOGRAPHS, ' '.join(ON_PHOTOGRAPHS), FIVE, SAME_PAIRS),
    # At the rate of four local crops, with the same four local captions. Four is the default, but is typed, so that
    # these runs are made together with the others: their times are compared.
    'local-crops': {f'cosmos-{n}': ON_PHOTOGRAPHS['cosmos']._replace(more=f'--local-crops {n}') for n in (0, 2, 4, 6)},
    # Rivals that critics ask for: from the same pairs as COSMOS.
    'rivals-tune': tune(RIVALS_ON_PHOTOGRAPHS, {
        'several-captions': '2e-3 1e-3 5e-4 2.5e-4', 'every-image': '2e-3 1e-3 5e-4', 'no-average': '2e-3 1e-3 5e-4'}),
    'captions-tune': tune(RIVALS_ON_PHOTOGRAPHS, {
        'clip-1': '1e-3 5e-4 2.5e-4 1.25e-4', 'cosmos-1': '2e-3 1e-3 5e-4'}),
    'probe': race(ON_PHOTOGRAPHS, 'cosmos clip', range(1), SAME_PAIRS),
    # Rates: the best of `rivals-tune` on the validation photographs, R@10 averaged over both directions.
    'anew': race(ON_PHOTOGRAPHS, 'cosmos clip text-distill', FIVE, SAME_PAIRS) | {
        'several-captions': RIVALS_ON_PHOTOGRAPHS['several-captions']._replace(rate=5e-4),
        'every-image': RIVALS_ON_PHOTOGRAPHS['every-image']._replace(rate=1e-3),
        'no-average': RIVALS_ON_PHOTOGRAPHS['no-average']._replace(rate=1e-3)},
    'anew-scenes': race(ON_SCENES, 'cosmos clip across another-pair', FIVE, PAIRS),
    'minor': race(ON_PHOTOGRAPHS, 'cosmos no-cross-attention', FIVE, SAME_PAIRS) | {
        'clip-pairs': ON_PHOTOGRAPHS['clip']._replace(steps=800), 'clip-minutes': ON_PHOTOGRAPHS['clip']}}

# What is compared: {experiment: {columns: pairs of variants}}. a~b is a minus b, for columns, too. All differences of
# one experiment are one family. It was fixed before the first row, except `company-size` and LAST; later additions to
# `reading`, `across` and `longer-reading` only made it harder to decide something.
NAMED = 'dominant.top1 small.top1'
R_AT_1 = 'retrieval.image_to_text_R@1'
# Of 1,000 photographs, R@10 is measured more precisely than R@1.
R_AT_10 = 'retrieval.image_to_text_R@10 retrieval.text_to_image_R@10'
# In photo-* we decided to compare these after the runs.
LAST = 'last.image_to_text_R@10 last.text_to_image_R@10'
RIVALS = 'cosmos~clip no-cross-attention~clip no-cross-attention~cosmos'
PHOTO_RIVALS = 'cosmos~clip cosmos~clip-aug cosmos~no-cross-attention no-cross-attention~clip'
READERS = ('across~cosmos across~no-cross-attention across~another-pair another-pair~cosmos '
           'another-pair~no-cross-attention no-cross-attention~cosmos')
COMPARISONS = {
    'company': {
        'small.top1':
            'clip-equal~clip-alone clip-big~clip-equal cosmos-equal~cosmos-alone cosmos-big~cosmos-equal',
        'alone.small.top1':
            'clip-big~clip-alone clip-big~clip-equal cosmos-big~cosmos-alone cosmos-big~cosmos-equal'},
    'company-size': {'small.top1': '(cosmos-big~cosmos-equal)~(clip-big~clip-equal)'},
    'minutes': {NAMED: RIVALS},
    'pairs': {NAMED: RIVALS},
    'steps': {NAMED: 'cosmos~clip'},
    'longer': {NAMED: RIVALS},
    'reading': {NAMED: f'{READERS} two-terms~cosmos across~two-terms'},
    'across': {f'{NAMED} {R_AT_1}': READERS},
    'longer-reading': {f'{NAMED} {R_AT_1}': READERS},
    'photo-pairs': {R_AT_10: PHOTO_RIVALS, LAST: 'cosmos~no-cross-attention'},
    'photo-minutes': {R_AT_10: PHOTO_RIVALS, LAST: 'cosmos~clip cosmos~clip-aug'},
    'photo-across': {R_AT_10: 'across~cosmos across~no-cross-attention', LAST: 'across~cosmos'},
    'table-5': {
        f'{R_AT_10} {LAST}':
            'clip-aug~clip image-distill~clip-aug text-crop~image-distill text-distill~text-crop cosmos~text-distill '
            'cosmos~clip'},
    'local-crops': {f'{R_AT_10} {LAST}': 'cosmos-0~cosmos-4 cosmos-2~cosmos-4 cosmos-6~cosmos-4'},
    # The third column asks: does COSMOS lift what is minor more than what is dominant?
    'minor': {
        'minor.minor.auc minor.dominant.auc minor.minor.auc~minor.dominant.auc':
            'cosmos~clip-minutes cosmos~clip-pairs cosmos~no-cross-attention'}}


def signed(words):
    """'a~b' -> [('a', 1), ('b', -1)]; '(a~b)~(c~d)' -> [('a', 1), ('b', -1), ('c', -1), ('d', 1)]"""
    return list(zip(re.findall('[^~()]+', words), (1, -1, -1, 1)))


def family(experiment):
    """-> [(pair of variants, column)]: all that is compared in an experiment."""
    tests = []
    for columns, pairs in COMPARISONS.get(experiment, {}).items():
        for pair in pairs.split():
            tests += [(pair, column) for column in columns.split()]
    return tests


# --- 3. One run ------------------------------------------------------------------------------------------------------

FOLDER = Path('runs/lesson')


def data_command(world, seed, flickr8k):
    """-> the folder of training and held-out data, and the words that make it."""
    if world == PHOTOGRAPHS:
        path = FOLDER / PHOTOGRAPHS
        listing = flickr8k / 'dataset_flickr8k.json'
        return path, ['-m', 'extras.prepare', 'pack', listing, flickr8k / 'Images', path]
    if world in FEWER:
        path = FOLDER / world
        listing = FOLDER / f'{world}.json'
        if not listing.exists():
            FOLDER.mkdir(parents=True, exist_ok=True)
            whole = read_json(flickr8k / 'dataset_flickr8k.json')
            for photograph in whole['images']:
                if photograph['split'] in ('train', 'restval'):
                    photograph['sentences'] = photograph['sentences'][:FEWER[world]]
            listing.write_text(json.dumps(whole))
        return path, ['-m', 'extras.prepare', 'pack', listing, flickr8k / 'Images', path]
    path = FOLDER / f'scenes-{world}-{seed}'
    return path, ['-m', 'lesson.scenes', path, *WORLDS[world].split(), '--seed', seed]


def commands(variant, seed, flickr8k):
    """-> the folder of a run, {what: the words of a command}. 'train' comes first; each of the others writes
    WHAT.json."""
    name = f'{variant.world} {variant.method} {variant.steps} {variant.rate} {variant.more} {seed}'
    out = FOLDER / re.sub('[ -]+', '-', name)
    best = out / 'best.pt'
    last = out / 'last.pt'
    shards, _ = data_command(variant.world, seed, flickr8k)
    measure = ['-m', 'lesson.suppression']
    found = {'train': [*variant.words(), '--seed', seed, '--data', shards, '--workers', 0, '--out', out]}
    if not variant.is_of_photographs:
        found['scenes'] = [*measure, last, '--shards', shards]
        for world in variant.tested:
            other, _ = data_command(world, seed, flickr8k)
            found[world] = [*measure, last, '--shards', other, '--only', 'objects']
    elif variant.is_scored:
        images = ['--karpathy', flickr8k / 'dataset_flickr8k.json', '--images', flickr8k / 'Images']
        retrieval = ['eval.py', 'retrieval', *images, '--split', 'test']
        found['retrieval'] = [*retrieval, best]
        found['last'] = [*retrieval, last]              # does a lead depend on when training stops?
        added = {name: row for name, (row, _, _) in ADDED.items()}
        method = (train.METHODS | added)[variant.method]
        if method.has_teacher:                          # or on the teacher, which averages weights?
            found['student'] = [*retrieval, best, '--weights', 'student']
        if method.has_cross_attention:
            found['conflict'] = [*measure, best, '--shards', shards, '--only', 'conflict']
            found['cut'] = [*measure, best, '--shards', shards, '--only', 'cut']
    for what, words in found.items():
        if what != 'train':
            words += ['--json', out / f'{what}.json']
    return out, found


def call(words):
    """Run python with these words, in a process of its own with one thread -> its processor seconds."""
    alone = os.environ | {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    whole = [sys.executable, *map(str, words)]
    process = subprocess.Popen(whole, stdout=subprocess.DEVNULL, env=alone)
    _, status, usage = os.wait4(process.pid, 0)         # of this process only: two runs are made at once
    process.returncode = os.waitstatus_to_exitcode(status)
    need(process.returncode == 0, f'this command failed: {line_of(words)}')
    return usage.ru_utime + usage.ru_stime


def line_of(words):
    """A command as a line to copy."""
    return 'OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= ' + shlex.join(['python', *map(str, words)])


def make_row(variants, flickr8k, wanted):
    """Train a run, and return all its figures. wanted: seed, name of a variant."""
    seed, name = wanted
    variant = variants[name]
    out, found = commands(variant, seed, flickr8k)
    shutil.rmtree(out, ignore_errors=True)              # a run that was interrupted starts anew
    figures = {'steps': variant.steps, 'pairs': variant.steps * variant.batch}
    for what, words in found.items():
        seconds = call(words)
        if what == 'train':
            figures |= {'seconds': int(seconds)} | log_figures(out)
        else:
            figures |= figures_of(what, read_json(out / f'{what}.json'))
    return {'run': variant.key(), 'seed': seed} | origin() | flat(figures)


def log_figures(out):
    """The losses of the last batch, each as a share of the loss of a blind guess. And `val`, the figures of the
    held-out set at the step that best.pt was saved at, which has the best mean R@1."""
    best = -1
    for line in (out / 'log.jsonl').read_text().splitlines():
        entry = json.loads(line)
        if 'eval' in entry:
            found = entry['eval']['retrieval']
            mean = (found['image_to_text_R@1'] + found['text_to_image_R@1']) / 2
            if mean > best:
                best = mean
                figures = {'best_step': entry['step'], 'val': found}
    losses = {name: entry[name] / entry['chance'] for name in entry['weights']}
    return {'loss': losses} | figures


def figures_of(what, found):
    """The figures of a command, under the names of the columns. What it wrote about the checkpoint is left out."""
    for name in Origin._fields:
        del found[name]
    if what == 'scenes':
        return found
    if what in WORLDS:
        del found['retrieval']
    elif len(found) == 1:                               # lesson.suppression names its group of figures
        [found] = found.values()
    return {what: found}


def flat(figures, prefix=''):
    """{'small': {'top1': x}} -> {'small.top1': x}"""
    row = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            row |= flat(value, f'{prefix}{name}.')
        else:
            row[prefix + name] = round(value, 4)
    return row


# Runs of these commits have equal rows, so an experiment may mix them. (Only R@1 of three long runs moved, by one or
# two captions of 1,000.) A commit that changes no number joins this list once runs that are made again have shown it.
EQUAL_COMMITS = ('1d83ab1', '7e3ef2a', '01e2c63', 'bd9b7b1', '965bc15', '96c9c58', '0a9b1b2', '76c4783', '1117868')
CODE = 'cosmos.py data.py eval.py train.py plumbing lesson/scenes.py lesson/suppression.py'


def origin():
    """The last commit that changed the code of a run, and the machine. NB: edits that are not committed go unnoticed,
    and so do edits of this file; if you change a method of section 1, give it another name."""
    # Linux says more than `platform`.
    line = subprocess.getoutput('grep -sm1 "model name" /proc/cpuinfo')
    name = line.partition(': ')[2] or platform.processor()
    return {'commit': subprocess.getoutput(f'git log -1 --format=%h -- {CODE}'),
            'machine': f'{name}, {os.cpu_count()} cores'}


# --- 4. Many runs ----------------------------------------------------------------------------------------------------

RESULTS = Path('lesson/results-anew.csv')     # of one AMD EPYC, so that old rows, of an Intel Xeon, stay apart


def read_results():
    """-> {(run, seed): row}; a row is {column: text}."""
    if not RESULTS.exists():
        return {}
    rows = csv.DictReader(RESULTS.read_text().splitlines())
    return {(row['run'], int(row['seed'])): row for row in rows}


def add_result(row):
    """Add a row. If the run has one, only the columns that it lacks are filled, and a figure that differs is a warning.
    There may be new columns, so the file is written anew, whole or not at all."""
    rows = read_results()
    old = rows.setdefault((row['run'], int(row['seed'])), {})
    for column, value in row.items():
        if not old.get(column):
            old[column] = value
        elif old[column] != str(value) and column not in ('seconds', 'commit', 'machine'):
            warn(f'{column} stays {old[column]}, although it is now {value}: seed {row["seed"]} of {row["run"]}')
    columns = {}
    for each in rows.values():
        columns |= each
    with replacing(RESULTS) as temporary, open(temporary, 'w') as file:
        writer = csv.DictWriter(file, columns, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows.values())


def missing_runs(experiment):
    """-> [(seed, name of a variant)] of the runs that have no row, or one that lacks a column that is compared. Sorted
    by seed, so that all variants get their first seed first."""
    needed = {name: {'run'} for name in EXPERIMENTS[experiment]}        # columns
    for pair, compared in family(experiment):
        for name, _ in signed(pair):
            needed[name].update(column for column, _ in signed(compared))
    rows = read_results()
    missing = []
    for name, variant in EXPERIMENTS[experiment].items():
        for seed in variant.seeds:
            row = rows.get((variant.key(), seed), {})
            if not all(row.get(column) for column in needed[name]):
                missing.append((seed, name))
    return sorted(missing, key=lambda wanted: wanted[0])


def main():
    if sys.argv[1:2] == ['train']:
        return train_added(sys.argv[2:])
    parser = Parser(prog='python -m lesson.experiments', epilog=__doc__)
    parser.add_argument('experiment', choices=EXPERIMENTS)
    parser.add_argument('--print', action='store_true', help='print the commands, and make no run')
    parser.add_argument('--flickr8k', type=Path, default='flickr8k',
                        help='folder with dataset_flickr8k.json and Images/ (%(default)s)')
    args = parser.parse_args()
    variants = EXPERIMENTS[args.experiment]
    if args.print:
        wanted = [(seed, name) for name, variant in variants.items() for seed in variant.seeds]
    else:
        wanted = missing_runs(args.experiment)
        print(f'{len(wanted)} runs have no row in {RESULTS}, or not all of it')
    data = {}                           # {folder: the words that make it}
    for seed, name in wanted:
        for world in (variants[name].world, *variants[name].tested):
            path, words = data_command(world, seed, args.flickr8k)
            data[path] = words
    if args.print:
        print(*map(line_of, data.values()), sep='\n')
        for seed, name in wanted:
            _, found = commands(variants[name], seed, args.flickr8k)
            print(f'# {name}, seed {seed}\n' + ' && '.join(map(line_of, found.values())))
        return
    for path, words in data.items():                    # now, before two runs need the same folder
        if not (path / 'val/00000.tar').exists():       # written last
            call(words)
    with ThreadPoolExecutor(2) as pool:
        for row in pool.map(partial(make_row, variants, args.flickr8k), wanted):
            show(row)
            add_result(row)


if __name__ == '__main__':
    command(main)
