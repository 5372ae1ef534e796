"""The experiments of the course: which runs they have, each run being a row of lesson/results.csv.

    python -m lesson.experiments minutes                    makes the runs of `minutes` that have no row, two at a time
    python -m lesson.experiments minutes --run cosmos 0     makes one run: prints figures, adds a row if it has none

A run that has a row is not made again, even if several experiments use it. So after an interruption just give the
command again. A run is a call of lesson.onepage.train, in a process with one thread on the CPU. Its scenes and its
networks (last.pt) are kept in runs/lesson. Each seed draws training scenes of its own; the held-out scenes are always
the same.

Methods race on two tracks. In `pairs` all see equally many pairs, which is the paper's comparison; in `minutes` all
take equally long. Every run completes its own schedule. We measure the moving average of the weights, in every method.

To add an experiment of your own: give your method a row in METHODS, your runs an entry in EXPERIMENTS (`race` names the
methods and their steps, `tune` the rates to try), and what is to be compared an entry in COMPARISONS, where `a~b` is a
minus b. Take seeds from 20 to 99, because the others have rows that come from other machines, and an experiment must
not mix machines. lesson/plots.py wants a colour for the method (PAINT) if a picture shows it.
"""
import csv
import math
import os
import platform
import re
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from cosmos import COSMOS, GLOBALS, Output, cosmos_terms, unit
from data import Counts, Order, Shards
from eval import embed_texts, load, retrieval, shard_captions, show, zero_shot_retrieval
from lesson import onepage, suppression
from lesson.scenes import VERSION, make_scenes
from plumbing import runs
from plumbing.errors import command, need
from plumbing.files import read_json, replacing, save_tensors, write_json
from plumbing.lists import published_captions
from plumbing.options import Parser, positive
from train import across_terms, image_terms, no_cross_attention_terms, no_terms

# --- 1. Other models, and other batches ------------------------------------------------------------------------------

class WithoutCrossAttention(COSMOS):
    """The model of train.py's method `no-cross-attention`; onepage.train gives it the sizes of COSMOS."""

    def __init__(self, config):
        super().__init__(replace(config, cross_heads=0, two_scales=True))


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


def two_terms(out, cls_t, eot_t, scale):
    """Eq. 6 without the two terms that copying can make small. The other two have a weight of one half each."""
    terms = cosmos_terms(out, cls_t, eot_t, scale)
    del terms['h_T_cls_t'], terms['h_I_eot_t']
    return terms


def groups_of(scenes, by):
    """-> a number for each scene, (n,). Scenes have the same number if they have the same colours or, by 'big', the
    same big object. The numbers follow the alphabet, so groups with the same first colour are neighbours."""
    keys = []
    for scene in scenes:
        if by == 'big':
            keys.append(scene[0].name)
        else:
            keys.append(' '.join(sorted(thing.color for thing in scene)))
    _, groups = np.unique(keys, return_inverse=True)
    return groups


@dataclass
class Grouped(Order):
    """An order in which a share of the batches is grouped: all pairs of such a batch belong to one group, or to
    neighbouring groups. Every epoch still has each pair at most once."""
    groups: np.ndarray = None       # (pairs,)
    share: float = 1.0
    since: float = 0.0  # which part of the run has passed before the first grouped batch

    def permutation(self, epoch):
        batches = self.pairs // self.batch
        if epoch * batches < self.since * self.stop:
            return super().permutation(epoch)
        order = super().permutation(epoch)[:batches * self.batch]
        mixed, grouped = np.split(order, [round((1 - self.share) * batches) * self.batch])
        grouped = grouped[self.groups[grouped].argsort(kind='stable')]
        rows = np.concatenate([mixed, grouped]).reshape(batches, self.batch)
        return np.random.default_rng((self.seed, epoch, 1)).permutation(rows).flatten()


# --- 2. The experiments ----------------------------------------------------------------------------------------------

class Method(NamedTuple):
    """A method in the race.

    steps: how many, by our estimate, take as long as 1,000 steps of COSMOS. The rows have the seconds, and `minutes`
    corrects the steps of CLIP. rate: the peak learning rate; of those that `tune`, `tune-again` and `tune-across`
    tried, the one with which the mean of big and small objects named is highest, over all seeds that tried it. With
    another pair, COSMOS keeps its rate.
    """
    label: str                      # in plots
    batch: int
    steps: int
    rate: float
    differs: dict = {}              # what differs from COSMOS, under the names of lesson/setting.py


CLIP = {'terms': no_terms, 'heads': 0}
METHODS = {
    'clip': Method(
        'CLIP', 64, 1684, 2.5e-4, CLIP | {'counts': Counts(1, 0, 1, 0), 'crop_min': 0.9}),
    'clip-aug': Method(
        'CLIP, two crops', 32, 2256, 1.25e-4, CLIP | {'counts': Counts(GLOBALS, 0, 1, 0)}),
    'text-crop': Method('text crops', 32, 1368, 5e-4, {'terms': image_terms, 'heads': 0}),
    'without-cross-attention': Method(
        'COSMOS without cross-attention', 32, 1150, 1e-3,
        {'model': WithoutCrossAttention, 'terms': no_cross_attention_terms}),
    'another-pair': Method(
        'COSMOS that reads another pair', 32, 1000, 1e-3, {'model': ReadsAnotherPair}),
    'across': Method('COSMOS that reads across', 32, 1000, 1e-3, {'terms': across_terms}),
    'two-terms': Method(
        'COSMOS without the two terms that leak', 32, 1000, 1e-3, {'terms': two_terms}),
    'cosmos': Method('COSMOS', 32, 1000, 1e-3)}
SCENES = 4000                       # for training
EIGHT = range(8)                    # seeds, if a difference was undecided or barely decided after five
PRECISION = 'bf16'

# Options of make_scenes. After the built-in set come worlds with the same small object: alone, next to an equal (also
# with more colours), and next to a big one.
TWO = {'objects': 2, 'dominant_size': 0.38}
WORLDS = {
    'built-in': {},
    'alone': TWO | {'company': 'none'},
    'equal': TWO | {'company': 'equal'},
    'equal-4': TWO | {'company': 'equal', 'colors': 4},
    'equal-16': TWO | {'company': 'equal', 'colors': 16},
    'big': TWO,
    'apart': TWO | {'shapes': 6, 'big_shapes': 4}}  # big objects have shapes that no small one has

# Other worlds, which are not drawn: shards to train on, and held-out shards or a folder in COCO's layout. Add your own.
# The emoji are not shipped.
SHARED = Path(os.environ.get('COSMOS_SHARED', '../shared'))
SETS = {'emoji': (SHARED / 'data/emoji/train', SHARED / 'data/emoji/retrieval/seen_vendors')}
# The worlds of page 2, and their labels in plots.
COMPANY = {'alone': 'alone', 'equal': 'beside\nan equal', 'big': 'beside\na big one'}


class Variant(NamedTuple):
    """How runs are made. Variants that differ in nothing but seeds and `tested` share their runs, so the one that runs
    first decides in which further worlds objects are named."""
    method: str
    world: str = 'built-in'         # of WORLDS or of SETS
    steps: int = 0                  # 0 stands for the method's own, as it does for the rate
    rate: float = 0.0
    augment: str = 'crops'          # or 'full'
    grouped: float = 0.0            # share of the batches whose scenes have much in common
    by: str = 'colors'              # what they have in common: 'colors', or 'big', colour and shape of the big object
    since: float = 0.0              # such batches only after this part of the run
    seeds: range = range(5)
    tested: tuple = ()              # further worlds in which objects are to be named

    def label(self):
        return METHODS[self.method].label

    def schedule(self):
        """-> steps, peak learning rate"""
        method = METHODS[self.method]
        return self.steps or method.steps, self.rate or method.rate

    def recipe(self):
        """Everything that makes a run, except its seed, in words. The same recipe and seed are the same run."""
        pairs = 'pairs' if self.world in SETS else f'{SCENES} scenes'
        words = f'{self.method}, {pairs} of {self.world}'
        if self.augment != 'crops':
            words += f', augment {self.augment}'
        if self.method != NOBODY:
            steps, rate = self.schedule()
            words += f', grouped {self.grouped:g}'
            if self.by != 'colors':
                words += f' by {self.by}'
            if self.since:
                words += f' since {self.since:g}'
            words += f', batch {METHODS[self.method].batch}, steps {steps}, rate {rate}'
        return words


def tune(rates, seed=100, steps={}, count=1, **how):
    """Which learning rate is best? The seeds, except that of `tune-longer`, are used for nothing else. rates: {method:
    those to try}. steps: {method: how many, if not its own}."""
    variants = {}
    for method, tried in rates.items():
        for rate in map(float, tried.split()):
            variants[f'{method}-{rate:g}'] = Variant(
                method, steps=steps.get(method, 0), rate=rate, seeds=range(seed, seed + count), **how)
    return variants


def batches():
    """Page 3: worlds of 4 and 16 colours; none or all of the batches are grouped by colours."""
    variants = {}
    for method, colors, seeds in ('clip', 4, 5), ('clip', 16, 8), ('cosmos', 4, 5), ('cosmos', 16, 5):
        mixed = Variant(method, f'equal-{colors}', seeds=range(seeds))
        variants[f'{method}-{colors}-mixed'] = mixed
        variants[f'{method}-{colors}-sorted'] = mixed._replace(grouped=1)
    return variants


def same_big():
    """Page 3: batches whose scenes share the big object, or at least its colour. Such are half of all batches, or all
    batches of the second half of a run. CLIP also does this in two worlds of two objects, in one of which (`apart`) big
    objects have shapes that no small one has."""
    variants = {}
    for method, world in ('cosmos', 'built-in'), ('clip', 'built-in'), ('clip', 'big'), ('clip', 'apart'):
        # Rows of lower seeds come from another machine.
        mixed = Variant(method, world, seeds=range(10, 15))
        # Half of the steps: what a run learns if grouped batches teach nothing.
        variants[f'{method}-{world}-short'] = mixed._replace(steps=METHODS[method].steps // 2)
        if world == 'built-in':
            variants[f'{method}-{world}-late'] = mixed._replace(grouped=1.0, by='big', since=0.5)
        variants[f'{method}-{world}-mixed'] = mixed
        variants[f'{method}-{world}-half'] = mixed._replace(grouped=0.5, by='big')
    return variants


def company():
    """Page 2: trained and tested with a small object alone, beside an equal, beside a big one."""
    variants = {}
    for method in 'clip', 'cosmos':
        for world in COMPANY:
            variants[f'{method}-{world}'] = Variant(method, world, tested=tuple(COMPANY))
    return variants


# Steps: three times those of `minutes`.
LONGER = {'clip': 5796, 'text-crop': 4104, 'without-cross-attention': 3450, 'across': 3000, 'another-pair': 3000,
          'cosmos': 3000}


def longer(methods):
    """-> {method: how many steps}"""
    return {method: LONGER[method] for method in methods.split()}


def race(steps, seeds=EIGHT, rates={}, **how):
    """steps: {method: how many, 0 for its own}. rates: {method: peak, if not its own}."""
    variants = {}
    for method, count in steps.items():
        rate = rates.get(method, 0)
        variants[method] = Variant(method, steps=count, rate=rate, seeds=seeds, **how)
    return variants


FIVE = range(1, 6)                  # seeds of long runs: 0 has chosen the rates, see `tune-longer`
EMOJI = {'world': 'emoji', 'augment': 'full'}
# The rates that `tune-emoji` found best, if they are not the method's own.
EMOJI_RATES = {'clip': 5e-4, 'cosmos': 5e-4, 'without-cross-attention': 5e-4}
NOBODY = 'nobody'  # the "method" of rows that say what adversaries reach in a world

EXPERIMENTS = {
    # In `apart` all wrong names of a big object have shapes of small ones, so it says little whether one is named.
    'worlds': {world: Variant(NOBODY, world, seeds=range(1)) for world in WORLDS if world != 'apart'},
    'tune': tune({
        'clip': '5e-4 2.5e-4 1.25e-4',
        'clip-aug': '5e-4 2.5e-4 1.25e-4',
        'text-crop': '1e-3 5e-4 2.5e-4',
        'without-cross-attention': '2e-3 1e-3 5e-4',
        'cosmos': '2e-3 1e-3 5e-4 2.5e-4'}),
    'tune-again': tune({
        'clip': '2.5e-4 1.25e-4',
        'text-crop': '5e-4 2.5e-4',
        'cosmos': '1e-3 5e-4'}, seed=101),
    'tune-pairs': tune({'clip': '1e-3 5e-4 2.5e-4 1.25e-4'}, steps={'clip': 500}),
    'tune-longer': tune({
        'clip': '2.5e-4 1.25e-4',
        'text-crop': '5e-4 2.5e-4',
        'without-cross-attention': '1e-3 5e-4',
        'across': '1e-3 5e-4',
        'cosmos': '1e-3 5e-4'}, seed=0, steps=LONGER),
    'tune-big': tune({'clip': '1e-3 5e-4 2.5e-4 1.25e-4', 'cosmos': '1e-3 5e-4'}, world='big'),
    'batches': batches(),
    'batches-half': {
        'clip-16-half': Variant('clip', 'equal-16', grouped=0.5, seeds=range(2)),
        'cosmos-16-half': Variant('cosmos', 'equal-16', grouped=0.5, seeds=range(2))},
    'same-big': same_big(),
    'company': company(),
    'first': race({'cosmos': 0}, range(1)),  # the run of `python train.py`
    # CLIP gets 15 % more steps than METHODS says, because with those it took less time than COSMOS.
    'minutes': race({'cosmos': 0, 'without-cross-attention': 0, 'text-crop': 0, 'clip': 1932}),
    'pairs': race(
        {'cosmos': 1000, 'without-cross-attention': 1000, 'text-crop': 1000, 'clip': 500}),
    # The last two have eight seeds, because after five their difference was undecided. Text crops take half of their
    # usual rate.
    'longer': race(longer('clip text-crop'), FIVE, {'text-crop': 2.5e-4}) | race(
        longer('without-cross-attention cosmos'), range(1, 9)),
    # Who reads what: from the same pairs (`reading`), in about the same minutes (`across`), in three times the minutes.
    'reading': race({
        'cosmos': 0, 'another-pair': 0, 'without-cross-attention': 1000, 'across': 0, 'two-terms': 0}),
    'tune-across': tune({'across': '2e-3', 'two-terms': '2e-3 1e-3 5e-4'}) | tune(
        {'across': '1e-3 5e-4'}, count=2),
    'across': race({'cosmos': 0, 'another-pair': 0, 'without-cross-attention': 0, 'across': 0}),
    'longer-reading': race(longer('cosmos another-pair without-cross-attention across'), FIVE),
    # Other pictures, with rich captions. CLIP trains without the full augmentation here, as its row of train.METHODS
    # says; the others have it.
    'tune-emoji': tune({
        'cosmos': '2e-3 1e-3 5e-4 2.5e-4',
        'without-cross-attention': '2e-3 1e-3 5e-4 2.5e-4',
        'across': '2e-3 1e-3 5e-4'}, **EMOJI) | tune(
            {'clip': '1e-3 5e-4 2.5e-4'}, steps={'clip': 1932}, world='emoji'),
    'emoji': race(
        {'cosmos': 0, 'without-cross-attention': 0, 'across': 0}, range(5), EMOJI_RATES, **EMOJI) | race(
            {'clip': 1932}, range(5), EMOJI_RATES, world='emoji')}

# What is compared: {experiment: {columns: pairs of variants}}; a~b is a minus b. All differences of one experiment are
# one family.
NAMED = 'dominant.top1 small.top1'
RECALL = 'retrieval.image_to_text_R@1'
RIVALS = 'cosmos~clip without-cross-attention~clip without-cross-attention~cosmos'
READERS = ('across~cosmos across~without-cross-attention across~another-pair another-pair~cosmos '
           'another-pair~without-cross-attention without-cross-attention~cosmos')
COMPARISONS = {
    'batches': {
        f'small.top1 {RECALL}':
            'clip-4-sorted~clip-4-mixed clip-16-sorted~clip-16-mixed '
            'cosmos-4-sorted~cosmos-4-mixed cosmos-16-sorted~cosmos-16-mixed'},
    'same-big': {
        NAMED:
            'cosmos-built-in-half~cosmos-built-in-mixed cosmos-built-in-late~cosmos-built-in-mixed '
            'clip-built-in-half~clip-built-in-mixed clip-built-in-late~clip-built-in-mixed '
            'clip-big-half~clip-big-mixed clip-apart-half~clip-apart-mixed '
            'cosmos-built-in-half~cosmos-built-in-short clip-built-in-half~clip-built-in-short '
            'clip-big-half~clip-big-short clip-apart-half~clip-apart-short'},
    'company': {
        'small.top1':
            'clip-equal~clip-alone clip-big~clip-equal cosmos-equal~cosmos-alone cosmos-big~cosmos-equal',
        'alone.small.top1':
            'clip-big~clip-alone clip-big~clip-equal cosmos-big~cosmos-alone cosmos-big~cosmos-equal'},
    'minutes': {NAMED: RIVALS},
    'pairs': {NAMED: RIVALS},
    'longer': {NAMED: RIVALS},
    'reading': {NAMED: f'{READERS} two-terms~cosmos across~two-terms'},
    'across': {f'{NAMED} {RECALL}': READERS},
    'longer-reading': {f'{NAMED} {RECALL}': READERS},
    'emoji': {
        f'{RECALL} retrieval.text_to_image_R@1 objects.image_to_text_R@10 objects.text_to_image_R@10':
            f'{RIVALS} across~cosmos across~without-cross-attention across~clip'}}


# --- 3. One run ------------------------------------------------------------------------------------------------------

def folder(words):
    """-> runs/lesson/WORDS-JOINED-BY-DASHES"""
    return Path('runs/lesson', re.sub('[^a-zA-Z0-9.]+', '-', words))


def run_folder(variant, seed):
    """Its name has the code's commit and the recipe, so that no other run is taken for it."""
    return folder(f"{origin()['commit']} {variant.recipe()} {seed}")


def scene_folder(world, seed):
    """The scenes of a world, which are drawn if they are absent; for a world of SETS, its training shards."""
    if world in SETS:
        training, _ = SETS[world]
        return training
    path = folder(f'scenes {VERSION} {WORLDS[world]} {SCENES} {seed}')
    if not (path / 'world.json').exists():              # written last
        make_scenes(path, SCENES, seed=seed, **WORLDS[world])
    return path


# Runs of these commits have equal rows, so an experiment may mix them. (One exception: since 01e2c63 equal scores tie
# to the last bit, which moved mean ranks by 0.002 at most, and R@1 of three long runs by one or two captions of 1,000.)
# 1d83ab1 trained drawn scenes by train.py, the others by onepage.py. To show that they are equal, runs of cosmos, clip,
# clip-aug, text-crop, without-cross-attention, another-pair and of sorted batches were made again, and in their rows
# every column but the seconds was the same. A commit that changes no number of a run joins this list once that has been
# shown again. Rows of photographs, which train.py makes, are of bd9b7b1 and 965bc15, which differ in a comment.
EQUAL_COMMITS = ('1d83ab1', '7e3ef2a', '01e2c63', 'bd9b7b1', '965bc15')
CODE = ('cosmos.py data.py eval.py lesson/onepage.py lesson/scenes.py lesson/setting.py lesson/suppression.py '
        'plumbing/captions.py plumbing/colours.py plumbing/images.py plumbing/processes.py plumbing/shards.py '
        'plumbing/tokenizer.py')


def origin(code=CODE):
    """The machine, and the last commit that changed the code of a run.

    NB: edits that are not committed go unnoticed, and so do edits of this file. Steps, rates and batches are in the
    recipe, but methods (their `differs`) and worlds are there by name only. So if you change one of these, give it
    another name.
    """
    # Linux says more than `platform`.
    line = subprocess.getoutput('grep -sm1 "model name" /proc/cpuinfo')
    name = line.partition(': ')[2] or platform.processor()
    return {
        'commit': subprocess.getoutput(f'git log -1 --format=%h -- {code}'),
        'machine': f'{name}, {os.cpu_count()} cores',
        'precision': PRECISION}


def flat(figures, prefix=''):
    """{'small': {'top1': x}} -> {'small.top1': x}"""
    row = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            row |= flat(value, f'{prefix}{name}.')
        else:
            row[prefix + name] = round(value, 4)
    return row


def train_run(variant, seed, scenes, out):
    """Train a variant and save its networks -> what that took, and the parts of the last loss, each as a share of the
    loss of a blind guess."""
    method = METHODS[variant.method]
    steps, rate = variant.schedule()
    differs = dict(method.differs)
    if variant.grouped:
        listed = suppression.read_scenes(Shards(scenes / 'train'))
        groups = groups_of(listed, variant.by)
        differs['order'] = partial(Grouped, groups=groups, share=variant.grouped, since=variant.since)
    losses = {}

    def keep_losses(step, loss, parts):
        for name, (_, term) in parts.items():
            losses[name] = term.item() / math.log(method.batch)

    begun = time.perf_counter()
    student, teacher, _ = onepage.train(
        scenes, steps, seed, PRECISION, augment=variant.augment, batch=method.batch, rate=rate,
        watch=keep_losses, **differs)
    seconds = int(time.perf_counter() - begun)
    merges = onepage.learn_tokenizer(Shards(scenes, split='train')).merges
    saved = runs.networks(student, teacher, student.config, merges, steps)
    save_tensors(out, saved)
    return {'steps': steps, 'seconds': seconds, 'pairs': steps * method.batch, 'loss': losses}


def world_figures(scenes):
    """What oracles and adversaries reach on these scenes."""
    known, listed = [suppression.read_scenes(Shards(scenes / part)) for part in ('train', 'val')]
    return {'R@1': suppression.oracles(listed)} | suppression.adversaries(known, listed)


def options_for(checkpoint, scenes):
    """The options of the commands in eval.py and lesson.suppression."""
    return SimpleNamespace(checkpoint=checkpoint, shards=scenes, device='cpu', workers=0, vocab=None, only=None)


def held_out_pairs(world):
    """-> the held-out images of a world of SETS, all their captions, and which image each caption belongs to."""
    _, path = SETS[world]
    if (path / 'annotations').is_dir():
        return published_captions(coco=path, karpathy=None, flickr=None, images=None, split=None)
    shards = Shards(path)
    return shards, *shard_captions(shards)


def background_captions(world):
    """-> the held-out captions whose `kind` in COCO's list says that they describe the background."""
    _, path = SETS[world]
    captions = set()
    if (path / 'annotations').is_dir():
        for annotation in read_json(path / 'annotations/captions_val2017.json')['annotations']:
            if 'background' in annotation.get('kind', ''):
                captions.add(annotation['caption'])
    return captions


def set_figures(world, args, scored):
    """Retrieval and conflict, because nothing else can be measured if no objects are listed. Backgrounds alone find
    many images, so captions that do not describe the background are also scored alone; these figures are called
    `objects`."""
    images, captions, owner = held_out_pairs(world)
    figures, image_features = zero_shot_retrieval(*scored, images, captions, owner)
    texts = suppression.texts_of(captions, owner)
    found = {'retrieval': figures}
    if scored[0].has_cross_attention:
        found['conflict'] = suppression.conflict(args, images, *texts)
    background = background_captions(world)
    of_objects = [i for i, caption in enumerate(captions) if caption not in background]
    if background:
        model, tokenizer, _ = scored
        text_features = embed_texts(model, tokenizer, [captions[i] for i in of_objects])
        found['objects'] = retrieval(image_features, text_features, owner[of_objects])
    return found


def run_figures(variant, seed, scenes):
    """Train, then measure the moving average of the weights."""
    out = run_folder(variant, seed) / 'last.pt'
    took = train_run(variant, seed, scenes, out)
    scored = load(out)
    args = options_for(out, scenes)
    if variant.world in SETS:
        return took | set_figures(variant.world, args, scored)
    figures = suppression.measure(args, *scored)
    for world in variant.tested:
        shards = Shards(scene_folder(world, seed) / 'val')
        scores = suppression.scores_of(shards, *scored)
        figures[world] = suppression.named(scores, suppression.read_scenes(shards))
    return took | figures


def make_row(variants, key):
    """Train a run, and return all its figures. key: seed, name of a variant."""
    seed, name = key
    variant = variants[name]
    scenes = scene_folder(variant.world, seed)
    if variant.method == NOBODY:
        figures = world_figures(scenes)
    else:
        figures = run_figures(variant, seed, scenes)
    row = {'run': variant.recipe(), 'seed': seed} | origin() | flat(figures)
    if variant.method != NOBODY:
        write_json(run_folder(variant, seed) / 'row.json', row)        # for lesson.plots --mine
    return row


# --- 4. Many runs ----------------------------------------------------------------------------------------------------

RESULTS = Path('lesson/results.csv')


def read_results():
    """-> {(run, seed): row}; a row is {column: text}."""
    rows = csv.DictReader(RESULTS.read_text().splitlines())
    return {(row['run'], int(row['seed'])): row for row in rows}


def add_result(row):
    """Add a row, unless the run has one. It may bring new columns, so the file is written anew, whole or not at all."""
    rows = read_results()
    rows.setdefault((row['run'], row['seed']), row)
    write_results(rows)


def write_results(rows):
    """rows: as read_results has them."""
    columns = {}
    for each in rows.values():
        columns |= each
    with replacing(RESULTS) as temporary, open(temporary, 'w') as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows.values())


def missing_runs(variants, seeds=None):
    """-> [(seed, name of a variant)] of the runs that have no row, sorted by seed, so that all variants get their first
    seed first. seeds: how many for each variant, instead of its own."""
    done = read_results()
    missing = []
    for name, variant in variants.items():
        first = variant.seeds.start
        count = seeds or len(variant.seeds)
        for seed in range(first, first + count):
            if (variant.recipe(), seed) not in done:
                missing.append((seed, name))
    return sorted(missing, key=lambda key: key[0])


def add_options(parser, experiments):
    parser.add_argument('experiment', choices=experiments)
    parser.add_argument('--seeds', type=positive, help='how many, instead of all')
    parser.add_argument('--run', nargs=2, metavar=('VARIANT', 'SEED'), help='make one run')


def wanted_runs(args, variants):
    """-> [(seed, name of a variant)]: the run that --run names, or all that have no row."""
    missing = missing_runs(variants, args.seeds)
    print(f'{len(missing)} runs have no row in {RESULTS}; to make a run again, give --run')
    if not args.run:
        return missing
    name, seed = args.run
    need(name in variants, f"no variant is called {name}; take one of {', '.join(variants)}")
    return [(int(seed), name)]


def make_runs(make, wanted):
    """Call make((seed, name of a variant)) for each, two at a time, and add the rows that it returns."""
    # These hold for the processes that start below: a run takes one thread, and no GPU.
    os.environ |= {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    with ProcessPoolExecutor(2, get_context('spawn')) as pool:
        for row in pool.map(make, wanted):
            show(row)
            add_result(row)


def main():
    parser = Parser(prog='python -m lesson.experiments', epilog=__doc__)
    add_options(parser, EXPERIMENTS)
    args = parser.parse_args()
    variants = EXPERIMENTS[args.experiment]
    wanted = wanted_runs(args, variants)
    for seed, name in wanted:  # draw the scenes now, before two runs need the same folder
        for world in (variants[name].world, *variants[name].tested):
            scene_folder(world, seed)
    make_runs(partial(make_row, variants), wanted)


if __name__ == '__main__':
    command(main)
