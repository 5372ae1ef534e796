"""The set of scenes, what is measured on it, and the runs of the course; each docstring says what the result is
compared with.

    pytest tests/test_lesson.py
"""
import io
import json
import random
import re
import shutil
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import train
from cosmos import COSMOS, Output, cosmos_terms, unit
from data import Shards, Tokenizer
from eval import load, preprocessing, shard_image
from lesson import experiments, onepage, plots, scenes, suppression
from lesson.experiments import EXPERIMENTS, ON_PHOTOGRAPHS, ON_SCENES, Variant
from lesson.scenes import NAMES, SHAPES, World, draw_scene, make_scenes, mask_of
from lesson.suppression import Named, read_scenes
from plumbing.files import read_json
from plumbing.weights import read_checkpoint
from tests.helpers import MICRO, encoded, pairs_tar, put, refused, run, shared


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """A small built-in set, drawn by one process: 12 training scenes, 24 held-out ones."""
    root = tmp_path_factory.mktemp('scenes') / 'set'
    make_scenes(root, 12, 24, seed=1, workers=1)
    return root


@pytest.fixture(scope='module')
def val(drawn):
    return Shards(drawn / 'val')


@pytest.fixture(scope='module')
def model():
    """(model, tokenizer, preprocess) with random weights, which reads text byte by byte."""
    torch.manual_seed(0)
    network = COSMOS(replace(train.PRESETS['tiny'].sizes, vocab_size=514, image_size=64))
    return network.eval(), Tokenizer([], 64), preprocessing(64)


def drawn_again(objects):
    """The numbers in the mask of a scene, (96, 96), by what its json lists."""
    things = []
    for listed in objects:
        _, shape = listed['name'].split()
        things.append(SimpleNamespace(**listed, shape=shape))
    return mask_of(things)


def drawn_scene(world, split, i):
    """Scene i of a world, drawn -> captions, objects, pixels, numbers in the mask."""
    members = {name[7:]: value for name, value in draw_scene(world, split, i)}
    record = json.loads(members['json'])
    pixels = np.array(Image.open(io.BytesIO(members['webp'])))
    return record['captions'], record['objects'], pixels, drawn_again(record['objects'])


# --- Scenes ----------------------------------------------------------------------------------------------------------

def test_any_number_of_workers_draws_the_same(drawn, tmp_path):
    """oracle: the bytes that one process drew with the same arguments. A second set does not mix with the first.
    Another seed draws other training scenes, and the same held-out ones."""
    flags = '--train', 12, '--val', 24, '--seed'
    assert run(scenes, tmp_path / 'same', *flags, 1) is None
    assert 'holds a set of scenes' in run(scenes, tmp_path / 'same', *flags, 1)
    make_scenes(tmp_path / 'other', 12, 24, seed=2, workers=1)
    for part in 'train', 'val':
        first, same, other = [(root / part / '00000.tar').read_bytes() for root in (
            drawn, tmp_path / 'same', tmp_path / 'other')]
        assert first == same
        assert (first == other) == (part != 'train')


def test_what_is_listed(val):
    """oracle: masks; the caption, which has each name once, that of the dominant object first in about a third; the
    definition of absent names: of the object's colour, of two, with the five shapes that the scene lacks."""
    dominant_first = 0
    first_colors = set()
    for i in range(len(val)):
        objects = val.record(i)['objects']
        numbers = drawn_again(objects)
        [caption] = val.record(i)['captions']
        assert [thing['role'] for thing in objects] == ['dominant', 'small', 'small']
        colors, shapes = zip(*[thing['name'].split() for thing in objects])
        first_colors.update(colors)
        for number, thing in enumerate(objects, 1):
            assert caption.count(thing['name']) == 1
            assert (numbers == number).sum() == thing['area']
            lacking = set(SHAPES) - set(shapes)
            absent = [f'{colors[number - 1]} {shape}' for shape in lacking]
            assert sorted(thing['absent']) == sorted(absent)
        dominant_first += caption.split('. ')[0].endswith(objects[0]['name'])
    assert 2 <= dominant_first <= 14 and first_colors == {'red', 'blue'}


TWO = World(objects=2, dominant_size=0.38)


@pytest.mark.parametrize('world, big', [
    (World(), {829}), (TWO, {1331}), (replace(TWO, company='equal'), {369}), (replace(TWO, company='none'), set())])
def test_nothing_but_outlines_tells_shapes(world, big):
    """oracle: pixels of the image, counted. A number for big objects and one for small ones, each pixel of an object in
    one colour and every other one in that of the ground: so what is drawn again from the json is what was drawn. Two
    pixels or more between objects. By its outline an object fits into the disc that it was given."""
    areas = {'dominant': set(), 'small': set()}
    for i in range(60):
        _, objects, pixels, mask = drawn_scene(world, 'val', i)
        places = []
        for number, thing in enumerate(objects, 1):
            areas[thing['role']].add((mask == number).sum())
            places.append(np.argwhere(mask == number))
        for number in range(1 + len(places)):
            assert len(np.unique(pixels[mask == number], axis=0)) == 1
        for other in places[1:]:
            assert abs(places[0][:, None] - other).max(axis=2).min() > 2
    assert areas == {'dominant': big, 'small': {369}}


def test_company():
    """oracle: the set with a big object. Alone and beside an equal the small object is the same, pixel by pixel, and so
    are the sentences on it; those on an object that is left out name a picture."""
    worlds = {}
    for company in scenes.COMPANY:
        worlds[company] = replace(TWO, company=company)
    for i in range(8):
        found = {}
        pools = {}
        for company, world in worlds.items():
            _, (*other, small), pixels, mask = drawn_scene(world, 'val', i)
            here = mask == 1 + len(other)
            found[company] = small, here.tolist(), pixels[here].tolist()
            areas = {'big': [1331], 'equal': [369], 'none': []}
            assert [thing['area'] for thing in other] == areas[company]
            pools[company], objects, *_ = drawn_scene(world, 'train', i)
            if company == 'big':
                left_out = objects[0]['name']
        assert found['big'] == found['equal'] == found['none']
        assert pools['big'] == pools['equal']
        sentences = [re.sub(f'an? {left_out}', 'a picture', sentence) for sentence in pools['big']]
        assert pools['none'] == sentences and ' '.join(sentences).count('picture') == 5


@pytest.mark.parametrize('flags, sentence', [
    ('--dominant-size 0.5', '3 objects do not fit into an image; give lower --dominant-size or --objects'),
    ('--objects 4', '--objects: invalid choice: 4')])
def test_worlds_that_cannot_be_drawn(tmp_path, flags, sentence):
    """oracle: one sentence that names the flag and the remedy."""
    error = run(scenes, tmp_path, '--train', 3, '--val', 1, *flags.split())
    assert sentence in error and len(error.splitlines()) == 1


def test_an_older_set_is_left_alone(drawn, tmp_path, monkeypatch, capsys):
    """oracle: which folder is returned, and what is drawn. A set of an older version, with or without a recipe, stays,
    and so does one of another world; one that was interrupted is drawn again in its place. Whoever has a run on the
    older set is told how to go on."""
    root = tmp_path / 'scenes'
    made = []
    monkeypatch.setattr(scenes, 'make_scenes', made.append)
    (root / 'train').mkdir(parents=True)
    assert scenes.built_in_set(root) == root and made == [root]
    assert 'another version' not in capsys.readouterr().out
    (root / 'val').mkdir()
    (root / 'val/00000.tar').touch()
    second = tmp_path / 'scenes-2'
    assert scenes.built_in_set(root) == second and made == [root, second]
    assert f'another version or another world; a run that began on them goes on with --resume --data {root}' in (
        capsys.readouterr().out)
    for version, world, folder in (
            (1, World(), second), (scenes.VERSION, TWO, second), (scenes.VERSION, World(), root)):
        put(root / 'world.json', {'version': version} | asdict(world))
        assert scenes.built_in_set(root) == folder


# --- What is measured ------------------------------------------------------------------------------------------------

def score_table(scenes, score):
    """What a formula score(scene, color, shape) gives for all scenes and names, (n, K)."""
    rows = []
    for scene in scenes:
        rows.append([score(scene, *name.split()) for name in NAMES])
    return torch.tensor(rows, dtype=torch.double)


def salience(scene, word):
    """How salient a colour or a shape is, if a big object counts as three small ones."""
    weights = {'dominant': 3, 'small': 1}
    return sum(weights[thing.role] for thing in scene if word in (thing.color, thing.shape))


def test_named_can_be_cheated_by_little(tmp_path):
    """oracle: closed forms for hand-made models. All is named by who knows all names, and by who adds the words of a
    scene, without knowing which belong together; nothing, by who likes some names whatever it sees; chance, within
    three points, of the small ones by who knows only the biggest object."""
    make_scenes(tmp_path, 0, 1000)
    listed = read_scenes(Shards(tmp_path / 'val'))
    liking = {name: random.Random(name).random() for name in NAMES}
    chance = pytest.approx(1 / 6, abs=0.03)
    for score, big, small in (
            (lambda scene, *name: ' '.join(name) in [thing.name for thing in scene], 1, 1),
            (lambda scene, color, shape: salience(scene, color) + salience(scene, shape), 1, 1),
            (lambda scene, *name: liking[' '.join(name)], 0, 0),
            (lambda scene, *name: scene[0].name == ' '.join(name), 1, chance)):
        figures = suppression.named(score_table(listed, score), listed)
        assert (figures['dominant']['top1'], figures['small']['top1']) == (big, small)


PATCHES = {'red': 28, 'blue': 35}


def arguments(**given):
    """What the command line of lesson.suppression gives."""
    defaults = {'checkpoint': 'out/last.pt', 'shards': None, 'device': 'cpu',
                'workers': 0, 'vocab': None, 'only': None}
    return SimpleNamespace(**defaults | given)


def test_pointing_by_hand(monkeypatch, val, model):
    """oracle: numpy on the masks, for a head that looks at patch 27 of every image, but for an absent name at 28, and
    if it is blue at 35. 8 x 8 patches of an image of 64 pixels: their middles are pixels 4, 12, 20, ... The head is
    asked the right questions."""
    network, tokenizer, _ = model
    scenes = read_scenes(val)
    things = sum(scenes, [])
    asked = []

    def weights(queries, keys):
        patch = PATCHES[things[len(asked)].color]
        asked.append(queries)
        assert keys.shape == (2, 64, 128)
        return torch.eye(64)[[27, patch]]

    monkeypatch.setattr(network.image_cross, 'weights', weights)
    figures = suppression.pointing(arguments(), model, val, scenes)['pointing']
    expected = {}
    for scene in scenes:
        mask = Image.fromarray(mask_of(scene))
        numbers = np.array(mask.resize((64, 64), Image.NEAREST))[4::8, 4::8].flatten()
        for thing in scene:
            expected.setdefault((thing.role, 'own_it'), []).append(numbers[27] == thing.number)
        colors = [None, *(thing.color for thing in scene)]
        if {'red', 'blue'} <= set(colors):
            for color, patch in PATCHES.items():
                there = colors[numbers[patch]]
                for place, hit in ('asked', there == color), ('other', there not in (color, None)):
                    expected.setdefault(('color', place), []).append(hit)
    for (role, name), shares in expected.items():
        assert figures[role][name] == pytest.approx(np.mean(shares))
    assert len(expected) == 4
    for thing, queries in zip(things, asked):
        sentences = [f'there is a {thing.name}', f'there is a {thing.absent[0]}']
        eot, _ = network.encode_text(tokenizer(sentences))
        assert_close(queries, eot)


def test_who_answers_what():
    """oracle: closed forms. Who only copies what it reads has 100 % in own and read, 0 in sentence; who only heeds the
    sentence the reverse. One eot for all sentences: a copier has the same, and 1 in 32 alone. One answer for all, the
    mean of all images, is 1 in 32, or where all are as near none: a tie is a miss."""
    images = unit(torch.randn(32, 128))
    one = images[:1].expand(32, -1)
    alike = torch.eye(32)

    def copy(queries, tokens):
        return 1e4 * tokens.mean(dim=1)[None]

    def heed(queries, tokens):
        return torch.zeros_like(queries)

    def say_mean(queries, tokens):
        return 1e4 * images.mean(dim=0) + heed(queries, tokens)

    for queries, cross, candidates, expected in (
            (images, copy, images, (1, 0, 1, 1)),
            (images, heed, images, (1, 1, 0, 1)),
            (one, copy, images, (1, 0, 1, 1 / 32)),
            (one, say_mean, images, (1 / 32, 1 / 32, 1 / 32, 1 / 32)),
            (torch.ones(32, 32), heed, alike, (0, 0, 0, 0))):
        shares = suppression.picked(queries, candidates[:, None], cross, candidates)
        assert tuple(shares.values()) == expected
    assert list(shares) == ['own', 'sentence', 'read', 'alone']


def test_conflict_is_what_the_model_computes(model, val, monkeypatch):
    """oracle: COSMOS.forward of pairs that do not belong together. Of three groups of eight two count; the teacher has
    other weights."""
    network, tokenizer, preprocess = model
    teacher = COSMOS(network.config).eval()
    loaded = {
        'student': (network, tokenizer, preprocess),
        'teacher': (teacher, tokenizer, preprocess)}
    monkeypatch.setattr(suppression, 'load', lambda path, name, vocab: loaded[name])
    monkeypatch.setattr(suppression, 'GROUP', 8)
    monkeypatch.setattr(suppression, 'GROUPS', 2)
    captions = [val.record(i)['captions'][0] for i in range(24)]
    figures = suppression.conflict(arguments(), model, val, None)['conflict']['h_T_caption']
    images = [preprocess(shard_image(val, i)) for i in range(16)]
    itself = torch.arange(8)
    hits = {'own': [], 'sentence': [], 'read': [], 'alone': []}
    for x, ids in zip(torch.stack(images).split(8), tokenizer(captions).split(8)):
        out = network([x], [ids])
        other = network([x.roll(1, 0)], [ids]).h_T
        answered = {
            'own': (out.h_T, itself), 'sentence': (other, itself), 'read': (other, itself.roll(1)),
            'alone': (out.eot, itself)}
        for name, (vectors, right) in answered.items():
            best = (vectors[0] @ unit(teacher.visual([x])[0]).T).argmax(dim=1)
            hits[name] += (best == right).tolist()
    assert figures == {name: np.mean(each) for name, each in hits.items()} and len(set(figures.values())) > 1


def test_other_sets(model, tmp_path, monkeypatch):
    """oracle: one sentence that names the folder and the remedy, for a plain CLIP; of others there is `conflict`.
    During training there is nothing to report. Objects may be listed in another way."""
    image = encoded(Image.new('RGB', (64, 64)))
    nameless = {'role': 'small', 'centre': [1, 2], 'absent': []}
    no_centre = {'name': 'dog', 'role': 'small', 'absent': []}
    for objects in [], ['dog'], 2, [3, 17], [['dog', [1, 2]]], [no_centre], [nameless]:
        record = {'captions': ['a dog'], 'objects': objects}
        shards = Shards(pairs_tar(tmp_path / '0.tar', [record], [image]))
        assert suppression.scene_figures(*model[:2], None, shards) == {}
    args = arguments(shards=tmp_path)
    clip = COSMOS(replace(model[0].config, cross_heads=0))
    refused(r'can measure \[\]; .* a set drawn by python -m lesson.scenes', suppression.measure, args, clip, *model[1:])
    monkeypatch.setitem(suppression.MEASURES, 'conflict', lambda *given: {'conflict': given[-1]})
    assert suppression.measure(args, *model) == {'conflict': []}
    args.only = 'pointing'
    refused(r"can measure \['conflict'\]; ", suppression.measure, args, *model)


# --- The course ------------------------------------------------------------------------------------------------------

def test_reading_another_pair(model):
    """oracle: the cross-attention of a COSMOS with these weights, called by hand on the pair before."""
    whole, tokenizer, _ = model
    images = torch.randn(2, 3, 3, 64, 64)
    texts = tokenizer(NAMES[:6]).view(2, 3, -1)
    cls, patches = whole.encode_image(images[0])
    eot, words = whole.encode_text(texts[0])
    network = experiments.ReadsAnotherPair(whole.config)
    network.load_state_dict(whole.state_dict())
    out = network(images, texts)
    before = [2, 0, 1]
    h_I = whole.text_cross(cls[None], words[before]) + cls
    h_T = whole.image_cross(eot[None], patches[before]) + eot
    assert_close(out.h_I[:1], unit(h_I))
    assert_close(out.h_T[:1], unit(h_T))


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """An empty folder to run in. What lesson.experiments changes in train.py is taken back."""
    monkeypatch.chdir(tmp_path)
    for name in 'METHODS', 'COSMOS', 'Teacher':
        monkeypatch.setattr(train, name, getattr(train, name))


def test_onepage_is_train(drawn, sandbox):
    """oracle: train.py. After 20 steps of `tiny` student, teacher and optimizer are equal, bit for bit. And what its
    watcher tells of objects is what the command finds in its checkpoint."""
    flags = (f'--preset tiny --data {drawn} --precision fp32 --workers 0 --batch 4 '
             '--steps 20 --out out')
    program = SimpleNamespace(main=partial(train.main, watchers=[Named()]))
    assert run(program, *flags.split()) == 0
    student, teacher, optimizer = onepage.train(drawn, 20, precision='fp32', batch=4)
    saved = read_checkpoint('out/last.pt')
    made = {'student': student, 'teacher': teacher.model, 'optimizer': optimizer}
    for name, part in made.items():
        assert_close(saved[name], part.state_dict(), rtol=0, atol=0, check_device=False)
    figures = read_json('out/eval.json')
    again = suppression.measure(arguments(checkpoint='out', shards=drawn), *load('out'))
    assert again['conflict'].keys() == {'h_T_caption'}
    for key in 'dominant', 'small':
        assert figures[key].items() <= again[key].items()


def train_words(drawn, method, steps, out):
    return ['train', '--preset', 'tiny', '--method', method, '--batch', 4, '--steps', steps, '--lr', 0.01,
            '--data', drawn, '--workers', 0, '--eval-every', 0, '--precision', 'fp32', '--out', out]


@pytest.mark.parametrize('method', experiments.ADDED)
def test_methods_that_train_does_not_have(method, drawn, sandbox):
    """oracle: for CLIP the weights before and after a step, averaged by the formula; for the others what COSMOS gives,
    which is something else. train.py itself does not know the method."""
    assert 'invalid choice' in run(train, '--method', method)
    of_train = 'clip' if method == 'clip-averaged' else 'cosmos'
    assert run(experiments, *train_words(drawn, of_train, 1, 'plain')) == 0
    assert run(experiments, *train_words(drawn, method, 1, 'out')) == 0
    saved = read_checkpoint('out/last.pt')
    plain = read_checkpoint('plain/last.pt')['student']
    if of_train == 'cosmos':
        assert plain.keys() == saved['student'].keys()
        assert not all(plain[name].equal(saved['student'][name]) for name in plain)
        return
    assert_close(saved['student'], plain, rtol=0, atol=0)
    torch.manual_seed(0)
    first = COSMOS(train.Config(**saved['config'])).state_dict()
    average = {name: (first[name] + 10 * after) / 11 for name, after in saved['student'].items()}
    assert_close(saved['teacher'], average)


def test_experiments():
    """oracle: by hand: keys; how many pairs and steps the tracks have; no race has a seed that chose its rate; what is
    compared exists, and the families of the paper's experiments, in the order of its table."""
    assert EXPERIMENTS['company']['clip-alone'].key() == (
        'lesson.scenes --objects 2 --dominant-size 0.38 --company none DIR: -m lesson.experiments train --preset tiny '
        '--method clip-averaged --batch 64 --steps 1684 --lr 0.00025 --eval-every 0 --precision bf16')
    assert EXPERIMENTS['local-crops']['cosmos-2'].key() == (
        'Flickr8k: train.py --preset photo --method cosmos --batch 64 --steps 800 --lr 0.001 --eval-every 100 '
        '--precision bf16 --local-crops 2')
    for experiment, pairs in ('pairs', 32_000), ('reading', 32_000), ('photo-pairs', 51_200), ('table-5', 51_200):
        assert {v.steps * v.batch for v in EXPERIMENTS[experiment].values()} == {pairs}
    for name, variant in EXPERIMENTS['longer'].items():
        assert variant.steps == 3 * EXPERIMENTS['minutes'][name].steps
    runs = {True: set(), False: set()}                  # of races, and of those that choose a rate
    for variants in EXPERIMENTS.values():
        for variant in variants.values():
            runs[variant.is_scored].update((variant.key(), seed) for seed in variant.seeds)
    assert runs[False] and not runs[True] & runs[False]
    for experiment in experiments.COMPARISONS:
        for pair, _ in experiments.family(experiment):
            assert {name for name, _ in experiments.signed(pair)} <= set(EXPERIMENTS[experiment])
    pairs = [pair for pair, column in experiments.family('table-5') if column == 'last.text_to_image_R@10']
    assert pairs == ['clip-aug~clip', 'image-distill~clip-aug', 'text-crop~image-distill', 'text-distill~text-crop',
                     'cosmos~text-distill', 'cosmos~clip']
    assert len(experiments.family('local-crops')) == 12


def test_two_terms():
    """oracle: Eq. 6, of which two terms stay."""
    *views, cls_t, eot_t = unit(torch.randn(6, 2, 3, 8))
    terms = cosmos_terms(Output(*views), cls_t, eot_t, 5)
    kept = {name: terms[name] for name in ('h_I_cls_t', 'h_T_eot_t')}
    assert_close(experiments.two_terms(Output(*views), cls_t, eot_t, 5), kept)


def in_this_process(words):
    """What experiments.call does, without the seconds that a process takes to start."""
    words = list(map(str, words))
    if words[0] == '-m':
        words = words[1:]
    name, *argv = words
    assert run(import_module(name.removesuffix('.py')), *argv) in (None, 0)
    return 7.9


@pytest.fixture
def course(sandbox, monkeypatch):
    """Two experiments that share a run; no result yet."""
    Path('lesson').mkdir()
    variants = {'clip': Variant('clip-averaged', 4, 2, 0.001, seeds=range(3, 4), tested=('big',))}
    for module in experiments, plots:
        monkeypatch.setattr(module, 'EXPERIMENTS', {'one': dict(variants), 'two': dict(variants)})
    monkeypatch.setattr(experiments, 'call', in_this_process)
    one_by_one = nullcontext(SimpleNamespace(map=map))      # signals can be caught only in the main thread
    monkeypatch.setattr(experiments, 'ThreadPoolExecutor', lambda workers: one_by_one)
    experiments.RESULTS.write_text('run,seed\n')


def test_missing_runs(course, monkeypatch, capsys):
    """oracle: by hand. Seeds one after another, variants in their order. A run is left out if its row has all that is
    compared, in whichever experiment it was made. What a row lacks is filled in; what it has stays, and a figure that
    differs is named, but no time."""
    variants = {
        'b': Variant('clip', 4, 2, 1, seeds=range(7, 9)),
        'a': Variant('cosmos', 4, 2, 1, seeds=range(7, 8)),
        'c': Variant('cosmos', 4, 2, 2, seeds=range(7, 8))}
    monkeypatch.setitem(experiments.EXPERIMENTS, 'one', variants)
    monkeypatch.setattr(experiments, 'COMPARISONS', {'one': {'y~z': 'a~b'}})
    old = {'run': variants['b'].key(), 'seed': 7, 'seconds': 1, 'x': 0.5, 'y': 0.25}
    experiments.add_result(old)
    experiments.add_result({'run': variants['c'].key(), 'seed': 7})
    assert experiments.missing_runs('one') == [(7, 'b'), (7, 'a'), (8, 'b')]
    experiments.add_result(old | {'seconds': 2, 'x': 0.75, 'y': 0.25, 'z': 0.5})
    assert experiments.missing_runs('one') == [(7, 'a'), (8, 'b')]
    row, _ = experiments.read_results().values()
    assert row == {**old, 'seed': '7', 'seconds': '1', 'x': '0.5', 'y': '0.25', 'z': '0.5'}
    [warning] = capsys.readouterr().err.splitlines()
    assert 'x stays 0.5, although it is now 0.75: seed 7 of lesson.scenes' in warning


def test_a_process_is_timed():
    """oracle: a loop that takes a tenth of a second of processor time, a sleep that takes none, and an error."""
    busy = 'import time\nwhile time.process_time() < 0.1: pass'
    import_only = experiments.call(['-c', 'import time; time.sleep(0.2)'])
    assert 0 < import_only < 0.2 and experiments.call(['-c', busy]) >= 0.1
    refused('this command failed: .* python -c .raise SystemExit', experiments.call, ['-c', 'raise SystemExit(3)'])


@pytest.mark.parametrize('method', ['clip-averaged', 'cosmos'])
def test_a_run_has_one_row(method, course, drawn, capsys):
    """oracle: the commands that --print shows, on its checkpoint and on its scenes, and the log. Only a model with
    cross-attention has all groups of figures; in another world objects are named. The run is not made again for the
    other experiment."""
    variant = Variant(method, 4, 2, 0.001, seeds=range(3, 4), tested=('big',))
    for variants in experiments.EXPERIMENTS.values():
        variants['clip'] = variant
    Path('runs/lesson').mkdir(parents=True)
    for world in 'built-in', 'big':
        Path(f'runs/lesson/scenes-{world}-3').symlink_to(drawn)
    assert run(experiments, 'one') is None
    [row] = experiments.read_results().values()
    assert row.items() >= {'run': variant.key(), 'seed': '3', 'steps': '2', 'pairs': '8', 'seconds': '7'}.items()
    assert row['small.top1'] == row['big.small.top1']
    for column in 'conflict.h_T_caption.read', 'pointing.small.own_it':
        assert (column in row) == (method == 'cosmos') and f'big.{column}' not in row
    capsys.readouterr()
    assert run(experiments, 'two', '--print') is None
    lines = capsys.readouterr().out.replace('OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= python ', '').splitlines()
    assert lines[:3] == ['-m lesson.scenes runs/lesson/scenes-built-in-3 --seed 3',
                         '-m lesson.scenes runs/lesson/scenes-big-3 --objects 2 --dominant-size 0.38 --seed 3',
                         '# clip, seed 3']
    out, _ = experiments.commands(variant, 3, None)
    saved = read_checkpoint(out / 'last.pt')['teacher']
    shutil.rmtree(out)
    for line in lines[3].split(' && '):
        in_this_process(line.split())
    assert_close(read_checkpoint(out / 'last.pt')['teacher'], saved, rtol=0, atol=0)
    found = read_json(out / 'scenes.json')
    for name in 'dominant', 'small', 'retrieval':
        for column, value in experiments.flat({name: found[name]}).items():
            assert row[column] == str(value)
    entry = json.loads((out / 'log.jsonl').read_text().splitlines()[-1])
    for name in entry['weights']:
        assert float(row[f'loss.{name}']) == pytest.approx(entry[name] / np.log(4), abs=1e-4)
    shutil.rmtree(out)
    assert run(experiments, 'two') is None and not out.exists()


def add_rows(columns, *rows):
    """Rows `variant seed figures ...` of the first experiment."""
    for row in rows:
        name, seed, *figures = row.split()
        key = plots.EXPERIMENTS['one'][name].key()
        experiments.add_result({'run': key, 'seed': seed} | dict(zip(columns.split(), figures)))


def test_intervals_by_hand():
    """oracle: tables of Student's t, and its closed forms for one and two degrees of freedom."""
    for freedom, value, chance in (
            (1, 12.706, 0.05), (9, 2.262, 0.05), (1, 1, 1 / 2), (2, 3, 1 - 3 / 11 ** 0.5)):
        t, chances = plots.student_t(freedom)
        assert np.interp(value, t, chances) == pytest.approx(chance, abs=1e-4)
    assert plots.holm({'a': 0.02, 'b': 0.01, 'c': 0.04}) == {'a', 'b', 'c'}
    assert plots.holm({'a': 0.03, 'b': 0.01, 'c': 0.04}) == {'b'}           # 0.03 is above 0.05 / 2
    assert plots.holm({'a': 0.02, 'b': 0.02, 'c': 0.04}) == set()           # 0.02 is above 0.05 / 3


@pytest.fixture
def families(course, monkeypatch):
    """Variants clip, b and c, with rows of seeds 0 to 2; comparisons. Seed 100 is of no experiment here."""
    monkeypatch.setattr(plots, 'PICTURES', {})
    compared = {'small.top1': 'b~clip c~clip (b~clip)~(c~clip)', 'small.top1~big.top1': 'b~clip'}
    monkeypatch.setattr(experiments, 'COMPARISONS', {'one': compared})
    plots.EXPERIMENTS['one'] |= {
        'clip': Variant('clip', 4, 2, 0.1),
        'b': Variant('cosmos', 4, 2, 1.0),
        'c': Variant('cosmos', 4, 2, 2.0, more='--local-crops 2')}
    add_rows(
        'small.top1 seconds big.top1', 'clip 0 .39 60 .1', 'clip 1 .40 60 .1',
        'clip 2 .41 60 .1', 'b 0 .5 60 .1', 'b 1 .5 60 .1', 'b 2 .5 60 .1', 'c 0 .42 60 .1', 'c 1 .45 60 .1',
        'c 2 .48 90 .1', 'c 100 0 0 .1')


def test_tables(families):
    """oracle: by hand. Gaps of 11, 10 and 9 in three seeds: 4.303 / sqrt(3) = 2.5. A family has what COMPARISONS
    names, and a seed of no run counts nowhere."""
    assert run(plots) is None
    table = plots.TABLES.read_text()
    in_order = (
        '## one', '| difference | small named | small top1~big top1 |', '| b - clip | +10.0 ± 2.5 | +10.0 ± 2.5 |',
        '| c - clip | +5.0 ± 5.0, undecided |  |', '| (b - clip) - (c - clip) | +5.0 ± 7.5, undecided |  |')
    parts = [table.index(words) for words in in_order]
    assert parts == sorted(parts)
    assert plots.mean('one', 'clip', 'small.top1') == pytest.approx(40)
    assert plots.mean('one', 'c', 'seconds') == pytest.approx(70 / 60)
    refused('one has no small.named of clip', plots.mean, 'one', 'clip', 'small.named')


@pytest.mark.parametrize('is_flat', [False, True])
def test_runs_in_a_picture(families, is_flat):
    """oracle: the rows of `families`: a dot each, and a bar at their mean."""
    pyplot = pytest.importorskip('matplotlib.pyplot')
    axis = pyplot.figure().subplots()
    assert plots.show_runs(axis, 'one', 'clip', 'small.top1', 7, is_flat=is_flat) == pytest.approx(40)
    drawn = []
    for line in axis.lines:
        places = [line.get_xdata().tolist(), line.get_ydata().tolist()]
        drawn.append(places[::-1] if is_flat else places)
    pyplot.close()
    assert drawn == [[[7, 7, 7], [39, 40, 41]], [[7], [40]]]


# --- Photographs -----------------------------------------------------------------------------------------------------

@pytest.fixture
def album(course, monkeypatch):
    """Six training pictures in Karpathy's layout, two for validation, three for the test; a model that is quick."""
    listing = {'images': []}
    for i, split in enumerate(['train'] * 6 + ['val'] * 2 + ['test'] * 3):
        sentences = [{'raw': f'A {NAMES[i]} .'}]
        listing['images'].append({'filename': f'{i}.png', 'split': split, 'imgid': i, 'sentences': sentences})
        put(f'flickr8k/Images/{i}.png', encoded(Image.new('RGB', (70, 64), (20 * i, 9, 9))))
    put('flickr8k/dataset_flickr8k.json', listing)
    recipe = train.LAPTOP | {'batch': 2, 'steps': 8, 'augment': 'full'}
    monkeypatch.setitem(train.PRESETS, 'photo', train.Preset(replace(MICRO, image_size=32), recipe))


def test_rows_of_photographs(album, monkeypatch, capsys):
    """oracle: the figures that its commands wrote, and the log. A run that chooses a rate is not scored on the test
    photographs."""
    variant = Variant('cosmos', 2, 8, 1e-3, experiments.PHOTOGRAPHS, seeds=range(3, 4))
    tuned = variant._replace(method='no-cross-attention', is_scored=False)
    variants = {'cosmos': variant, 'tuned': tuned}
    monkeypatch.setitem(experiments.EXPERIMENTS, 'one', variants)
    assert run(experiments, 'one', '--flickr8k', 'flickr8k') is None
    row = experiments.read_results()[variant.key(), 3]
    out, found = experiments.commands(variant, 3, Path('flickr8k'))
    assert [*found] == ['train', 'retrieval', 'last', 'student', 'conflict']
    for what in 'retrieval', 'last', 'student', 'conflict':
        figures = read_json(out / f'{what}.json')
        figures = figures.get(what, figures)      # lesson.suppression names its group
        for name in set(figures) - {'network', 'checkpoint', 'step'}:
            for column, value in experiments.flat({f'{what}.{name}': figures[name]}).items():
                assert row[column] == str(value)
    means = {}
    for line in (out / 'log.jsonl').read_text().splitlines():
        entry = json.loads(line)
        if 'eval' in entry:
            of_step = entry['eval']['retrieval']
            means[entry['step']] = of_step['image_to_text_R@1'] + of_step['text_to_image_R@1']
    assert int(row['best_step']) == max(means, key=means.get)
    assert (row['pairs'], row['retrieval.images'], row['val.images']) == ('16', '3', '2')
    second = experiments.read_results()[tuned.key(), 3]
    assert second['val.images'] == '2' and not second['retrieval.images']


@pytest.mark.parametrize('experiment', ['photo-tune', 'photo-tune-pairs', 'tune-table-5'])
def test_rates_of_photographs(experiment):
    """oracle: the rows. The rate of a method has its best R@10 on the validation photographs, over both directions, and
    a lower and a higher rate were tried, too."""
    rows = experiments.read_results()
    found = defaultdict(dict)
    for variant in EXPERIMENTS[experiment].values():
        row = rows[variant.key(), 100]
        both = float(row['val.image_to_text_R@10']) + float(row['val.text_to_image_R@10'])
        found[variant.method][variant.rate] = both
    for method, scores in found.items():
        best = max(scores, key=scores.get)
        assert ON_PHOTOGRAPHS[method].rate == best
        assert min(scores) < best < max(scores)


def test_rates_of_drawn_scenes():
    """oracle: the rows. Of the rates that all seeds of tuning tried, a method's own names most objects, big and
    small."""
    rows = experiments.read_results()
    found = defaultdict(lambda: defaultdict(list))
    for experiment in 'tune', 'tune-again', 'tune-across':
        for variant in EXPERIMENTS[experiment].values():
            for seed in variant.seeds:
                row = rows[variant.key(), seed]
                both = float(row['dominant.top1']) + float(row['small.top1'])
                found[variant.method][variant.rate].append(both)
    rates = {variant.method: variant.rate for variant in ON_SCENES.values()}
    assert set(found) == set(rates) - {'another-pair'}
    for method, scores in found.items():
        seeds = max(map(len, scores.values()))
        means = {rate: fmean(values) for rate, values in scores.items() if len(values) == seeds}
        assert rates[method] == max(means, key=means.get)
