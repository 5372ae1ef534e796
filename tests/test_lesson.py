"""The set of scenes, what is measured on it, and the methods of the course; each docstring says what the result is
compared with.

    pytest tests/test_lesson.py
"""
import io
import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import train
from cosmos import COSMOS, Output, clip_loss, cosmos_loss, cosmos_terms, term_weights, total_loss, unit
from data import Counts, TrainingSet, Order, Shards, Tokenizer, loader
from eval import load, preprocessing, shard_image
from lesson import methods, onepage, scenes, suppression
from lesson.scenes import NAMES, SHAPES, draw_scene, make_scenes, mask_of
from lesson.suppression import Named, read_scenes
from plumbing.files import read_json
from plumbing.weights import read_checkpoint
from tests.helpers import MICRO, ROOT, encoded, pairs_tar, put, refused, run, seeded  # noqa: F401


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


# --- Scenes ----------------------------------------------------------------------------------------------------------

def test_any_number_of_workers_draws_the_same(drawn, tmp_path):
    """oracle: the bytes that one process drew with the same arguments. A second set does not mix with the first.
    Another seed draws other training scenes, and the same held-out ones."""
    flags = '--train', 12, '--val', 24, '--seed'
    assert run(scenes, tmp_path / 'same', *flags, 1) is None
    assert 'same exists; give another folder' in run(scenes, tmp_path / 'same', *flags, 1)
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


def test_nothing_but_outlines_tells_shapes():
    """oracle: pixels of the image, counted. A number for big objects and one for small ones, each pixel of an object in
    one colour and every other one in that of the ground: so what is drawn again from the json is what was drawn. Two
    pixels or more between objects. By its outline an object fits into the disc that it was given."""
    areas = {'dominant': set(), 'small': set()}
    for i in range(60):
        members = {name[7:]: value for name, value in draw_scene(0, 'val', i)}
        objects = json.loads(members['json'])['objects']
        pixels = np.array(Image.open(io.BytesIO(members['webp'])))
        mask = drawn_again(objects)
        places = []
        for number, thing in enumerate(objects, 1):
            areas[thing['role']].add((mask == number).sum())
            places.append(np.argwhere(mask == number))
        for number in range(1 + len(places)):
            assert len(np.unique(pixels[mask == number], axis=0)) == 1
        for other in places[1:]:
            assert abs(places[0][:, None] - other).max(axis=2).min() > 2
    assert areas == {'dominant': {829}, 'small': {369}}


def test_the_built_in_set_is_drawn_once(tmp_path, monkeypatch):
    """oracle: the folder, and how often it was drawn. An interrupted draw leaves no folder, and another set under this
    name is left alone."""
    root = tmp_path / 'runs/scenes'
    small = partial(make_scenes, train=4, val=4)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scenes, 'write_shard', interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_scenes(root, 4, 4, workers=1)
    assert not root.exists()
    small(root)
    before = (root / 'val/00000.tar').read_bytes()
    refused(f'is not the built-in set; .* --data {root}', scenes.built_in_set, root)
    assert (root / 'val/00000.tar').read_bytes() == before
    monkeypatch.setattr(scenes, 'draw_scene', lambda seed, split, index: [(f'{index}.txt', b'')])
    monkeypatch.setattr(scenes, 'ProcessPoolExecutor', ThreadPoolExecutor)
    for _ in range(2):
        assert scenes.built_in_set(tmp_path / 'built-in') == tmp_path / 'built-in'
    assert len([*(tmp_path / 'built-in').rglob('*.tar')]) == 5


# --- What is measured ------------------------------------------------------------------------------------------------

def test_named_can_be_cheated_by_little(tmp_path):
    """oracle: closed forms for hand-made models. All is named by who knows all names, and by who knows the shapes of a
    scene, but not their colours; nothing, by who likes some names whatever it sees; chance, within three points, of the
    small ones by who knows only the biggest object."""
    make_scenes(tmp_path / 'set', 0, 1000)
    listed = read_scenes(Shards(tmp_path / 'set/val'))
    liking = {name: random.Random(name).random() for name in NAMES}
    chance = pytest.approx(1 / 6, abs=0.03)
    for score, big, small in (
            (lambda scene, name: name in [thing.name for thing in scene], 1, 1),
            (lambda scene, name: name.split()[1] in [thing.shape for thing in scene], 1, 1),
            (lambda scene, name: liking[name], 0, 0),
            (lambda scene, name: scene[0].name == name, 1, chance)):
        table = []
        for scene in listed:
            table.append([score(scene, name) for name in NAMES])
        figures = suppression.named(torch.tensor(table, dtype=torch.double), listed)
        assert (figures['dominant']['top1'], figures['small']['top1']) == (big, small)


def arguments(**given):
    """What the command line of lesson.suppression gives."""
    defaults = {'checkpoint': 'out/last.pt', 'shards': None, 'device': 'cpu', 'workers': 0, 'vocab': None, 'quick_gelu': False,
                'only': None}
    return SimpleNamespace(**defaults | given)


def test_pointing_by_hand(monkeypatch, val, model):
    """oracle: numpy on the masks, for a head that looks at patch 27 of every image, but for an absent name at 28, and
    if it is blue at 35. 8 x 8 patches of an image of 64 pixels: their middles are pixels 4, 12, 20, ... The head is
    asked the right questions."""
    network, tokenizer, _ = model
    scenes = read_scenes(val)
    things = sum(scenes, [])
    patches = {'red': 28, 'blue': 35}
    asked = []

    def weights(queries, keys):
        patch = patches[things[len(asked)].color]
        asked.append(queries)
        assert keys.shape == (2, 64, 128)
        return torch.eye(64)[[27, patch]]

    monkeypatch.setattr(network.read_image, 'weights', weights)
    figures = suppression.pointing(arguments(), model, val, scenes)['pointing']
    hits = {'dominant.own_it': [], 'small.own_it': [], 'color.asked': [], 'color.other': []}
    for scene in scenes:
        mask = Image.fromarray(mask_of(scene))
        numbers = np.array(mask.resize((64, 64), Image.NEAREST))[4::8, 4::8].flatten()
        for number, thing in enumerate(scene, 1):
            hits[f'{thing.role}.own_it'].append(numbers[27] == number)
        colors = [None, *(thing.color for thing in scene)]
        if {'red', 'blue'} <= set(colors):
            for color, patch in patches.items():
                there = colors[numbers[patch]]
                hits['color.asked'].append(there == color)
                hits['color.other'].append(there not in (color, None))
    expected = {name: np.mean(each) for name, each in hits.items()}
    found = {f'{role}.{name}': share for role, columns in figures.items() for name, share in columns.items()}
    assert found == pytest.approx(expected)
    for thing, queries in zip(things, asked):
        sentences = [f'there is a {thing.name}', f'there is a {thing.absent[0]}']
        eot, _ = network.encode_text(tokenizer(sentences))
        assert_close(queries, eot)


def test_who_answers_what():
    """oracle: closed forms. Who only copies what it reads has 100 % in own and read, 0 in sentence; who only heeds the
    sentence the reverse. One eot for all sentences: a copier has the same, and 1 in 32 alone. Where all images are as
    near, none is picked: a tie is a miss."""
    images = unit(torch.randn(32, 128))
    copies = 1e4 * images
    one = images[:1].expand(32, -1)
    ones = torch.ones(32, 32)
    for eot, own, other, candidates, expected in (
            (images, images + copies, images + copies.roll(1, 0), images, (1, 0, 1, 1)),
            (images, images, images, images, (1, 1, 0, 1)),
            (one, one + copies, one + copies.roll(1, 0), images, (1, 0, 1, 1 / 32)),
            (ones, ones, ones, torch.eye(32), (0, 0, 0, 0))):
        shares = suppression.picked(eot, own, other, candidates)
        assert shares == dict(zip(('own', 'sentence', 'read', 'alone'), expected))


@pytest.fixture
def taught(model, val, monkeypatch):
    """A checkpoint whose student is `model`: its teacher, with other weights, and the first two groups of ten scenes,
    pixels and ids. The set has 24."""
    network, tokenizer, preprocess = model
    teacher = COSMOS(network.config).eval()
    loaded = {'student': network, 'teacher': teacher}
    monkeypatch.setattr(suppression, 'load', lambda path, name, vocab, quick_gelu: (loaded[name], tokenizer, preprocess))
    monkeypatch.setattr(suppression, 'GROUP', 10)
    images = torch.stack([preprocess(shard_image(val, i)) for i in range(20)])
    ids = tokenizer([val.record(i)['captions'][0] for i in range(20)])
    return teacher, [*zip(images.split(10), ids.split(10))]


def test_conflict_is_what_the_model_computes(model, val, taught, monkeypatch):
    """oracle: COSMOS.forward of pairs that do not belong together, in one group of two."""
    network, *_ = model
    teacher, groups = taught
    monkeypatch.setattr(suppression, 'GROUPS', 1)
    figures = suppression.conflict(arguments(), model, val, None)['conflict']['h_T_caption']
    itself = torch.arange(10)
    hits = {'own': [], 'sentence': [], 'read': [], 'alone': []}
    for x, ids in groups[:1]:
        out = network([x], [ids])
        other = network([x.roll(1, 0)], [ids]).h_T
        answered = {
            'own': (out.h_T, itself), 'sentence': (other, itself), 'read': (other, itself.roll(1)),
            'alone': (out.eot, itself)}
        for name, (vectors, right) in answered.items():
            best = (vectors[0] @ unit(teacher.visual([x])[0]).T).argmax(dim=1)
            hits[name] += (best == right).tolist()
    assert figures == {name: np.mean(each) for name, each in hits.items()} and len(set(figures.values())) > 1


def test_one_pair_is_refused(model):
    """oracle: the sentence. The loss of a single pair is 0, and so is that of guessing."""
    for measure in suppression.cut, suppression.conflict:
        refused('there is one pair', measure, arguments(), model, [0], None)


def test_cut_is_what_a_step_computes(model, val, taught, monkeypatch):
    """oracle: with everything, the losses of COSMOS.forward on what the loader of train.py gives, of all 24 scenes but
    the last four. If C^T and C^I give nothing, h_I is cls and h_T is eot: a cut of the other side changes nothing."""
    network, tokenizer, _ = model
    teacher, _ = taught
    figures = suppression.cut(arguments(), model, val, None)['cut']
    crops = TrainingSet(val, tokenizer, network.config, 0, Counts(2, 2, 2, 2), 'crops')
    expected = {name: [] for name in figures}
    for batch in loader(crops, Order(24, 10, 0, 2, 0), 0, torch.device('cpu'), 8, True):
        images = batch.views(0, 0)
        out = network(images, batch.texts)
        targets = teacher(images[:2], batch.teacher_texts)
        terms = cosmos_terms(out, targets.cls, targets.eot, network.distill_logit_scale.exp())
        for name, loss in (terms | {'L_CLIP': clip_loss(out, network.logit_scale.exp())}).items():
            expected[name].append(loss.item() / np.log(10))
    assert {name: each['all'] for name, each in figures.items()} == pytest.approx(
        {name: np.mean(each) for name, each in expected.items()}, rel=1e-4)
    assert all(each['all'] != each['text_cut'] and each['all'] != each['image_cut'] for each in figures.values())
    for cross in network.read_text, network.read_image:
        monkeypatch.setattr(cross, 'forward', lambda query, tokens: torch.zeros_like(query))
    figures = suppression.cut(arguments(), model, val, None)['cut']
    for name, column in ('h_I_cls_t', 'text_cut'), ('h_T_eot_t', 'image_cut'):
        assert figures[name][column] == pytest.approx(figures[name]['all'], rel=1e-5)


def test_other_sets(model, tmp_path, monkeypatch):
    """oracle: one sentence that names the folder and the remedy, for a plain CLIP; others have `conflict` and the cuts.
    During training there is nothing to report. Objects may be listed in another way."""
    image = encoded(Image.new('RGB', (64, 64)))
    nameless = {'role': 'small', 'centre': [1, 2], 'absent': []}
    no_area = {'name': 'red dog', 'role': 'small', 'centre': [1, 2], 'absent': []}
    for objects in [], ['dog'], 2, [3, 17], [['dog', [1, 2]]], [no_area], [nameless]:
        record = {'captions': ['a dog'], 'objects': objects}
        shards = Shards(pairs_tar(tmp_path / '0.tar', [record], [image]))
        assert suppression.scene_figures(*model[:2], None, shards) == {}
    listed = {'name': 'red ring', 'role': 'small', 'centre': [1, 2], 'absent': [], 'area': 4}
    mixed = Shards(pairs_tar(tmp_path / 'mixed.tar', [{'captions': ['a'], 'objects': [listed]}, {'captions': ['a']}],
                             [image] * 2))
    assert read_scenes(mixed) == []
    (tmp_path / 'mixed.tar').unlink()
    args = arguments(shards=tmp_path)
    clip = COSMOS(replace(model[0].config, cross_heads=0))
    refused(r'can measure \[\]; .* a set drawn by python -m lesson.scenes', suppression.measure, args, clip, *model[1:])
    for name in suppression.ANY_SET:
        monkeypatch.setitem(suppression.MEASURES, name, lambda *given, name=name: {name: given[-1]})
    assert suppression.measure(args, *model) == {'conflict': [], 'cut': []}
    args.only = 'pointing'
    refused(r"can measure \['conflict', 'cut'\]; ", suppression.measure, args, *model)


# --- The course ------------------------------------------------------------------------------------------------------

def test_reading_another_pair(model):
    """oracle: the cross-attention of a COSMOS with these weights, called by hand on the pair before."""
    whole, tokenizer, _ = model
    images = torch.randn(2, 3, 3, 64, 64)
    texts = tokenizer(NAMES[:6]).view(2, 3, -1)
    cls, patches = whole.encode_image(images[0])
    eot, words = whole.encode_text(texts[0])
    network = methods.ReadsAnotherPair(whole.config)
    network.load_state_dict(whole.state_dict())
    out = network(images, texts)
    before = [2, 0, 1]
    h_I = whole.read_text(cls[None], words[before]) + cls
    h_T = whole.read_image(eot[None], patches[before]) + eot
    assert_close(out.h_I[:1], unit(h_I))
    assert_close(out.h_T[:1], unit(h_T))


def test_every_image(model):
    """oracle: a loop over captions and images, each read by COSMOS's own C^I."""
    whole, tokenizer, _ = model
    images = torch.randn(2, 3, 3, 64, 64)
    texts = tokenizer(NAMES[:6]).view(2, 3, -1)
    network = methods.ReadsEveryImage(whole.config)
    network.load_state_dict(whole.state_dict())
    out = network(images, texts)
    _, patches = whole.encode_image(images[0])
    eot = torch.stack(whole.text(texts))
    scores = torch.zeros(2, 3, 3)
    for u in range(2):
        for caption in range(3):
            query = eot[u, caption][None, None]
            for image in range(3):
                read = whole.read_image(query, patches[[image]])[0, 0]
                scores[u, caption, image] = 5 * torch.cosine_similarity(read, eot[u, caption], dim=0)
    costs = []
    for table in *scores, *scores.transpose(1, 2):
        costs.append(-table.log_softmax(dim=1).diag().mean())
    terms = methods.every_image_terms(out, out.cls, out.eot, 5)
    assert_close(terms['reads'], sum(costs) / 4)
    assert terms.keys() == {'reads', 'cls_cls_t', 'eot_eot_t'} and out.h_I is None


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """An empty folder to run in. The rows that lesson.methods adds are taken back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, 'METHODS', dict(train.METHODS))


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
    assert again['conflict'].keys() == {'h_T_caption'} and len(again['cut']) == 5
    for key in 'dominant', 'small':
        assert figures[key].items() <= again[key].items()


def test_onepage_of_a_small_set(drawn):
    """oracle: a batch of 12, asked for, of 12 scenes. More than there are, as by default, means the same."""
    students = [onepage.train(drawn, 1, precision='fp32', batch=batch)[0].state_dict() for batch in (12, 32)]
    assert_close(*students, rtol=0, atol=0)


def test_every_image_needs_the_whole_batch(drawn, sandbox, monkeypatch):
    """oracle: the rule."""
    flags = f'--preset tiny --batch 4 --steps 1 --data {drawn} --workers 0 --method every-image --out'
    said = 'error: --method every-image needs the whole batch at once; give it '
    assert run(methods, *flags.split(), 'parts', '--accum', 2) == said + '--accum 1'
    monkeypatch.setattr(methods, 'has_other_ranks', lambda: True)
    refused('give it one process', methods.ReadsEveryImage.forward, None, None, None)


NEAREST = {             # each method of the course, and the one of train.py that is next to it
    'several-captions': 'clip-aug', 'another-pair': 'cosmos', 'without-clip': 'cosmos', 'every-image': 'cosmos',
    'teacher-sees-all': 'cosmos', 'long-captions': 'cosmos', 'short-captions': 'cosmos'}


def test_a_method_is_refused_what_it_cannot_use(drawn, sandbox):
    """oracle: the rule. A part of one pair would read itself."""
    flags = '--preset tiny --batch 4 --steps 1 --workers 0 --eval-every 0 --out out --method another-pair --accum 4'
    assert 'two pairs or more' in run(methods, *flags.split(), '--data', drawn)


@pytest.mark.parametrize('method', NEAREST)
def test_methods_of_the_course(method, drawn, sandbox):
    """oracle: what the method next to it gives, which is something else. The logged loss is that of the logged terms and
    weights. train.py itself does not know the method."""
    assert 'invalid choice' in run(train, '--method', method)
    flags = f'--preset tiny --batch 4 --steps 1 --lr 0.01 --data {drawn} --workers 0 --eval-every 0 --precision fp32'
    for name, out in (NEAREST[method], 'plain'), (method, 'out'):
        assert run(methods, *flags.split(), '--method', name, '--out', out) == 0
    assert train.METHODS.keys() >= NEAREST.keys()
    entry = json.loads(Path('out/log.jsonl').read_text().splitlines()[0])
    assert entry['loss'] == pytest.approx(sum(weight * entry[name] for name, weight in entry['weights'].items()))
    assert entry['weights']['clip'] == (method != 'without-clip')
    found = read_checkpoint('out/last.pt')['student']
    plain = read_checkpoint('plain/last.pt')['student']
    assert plain.keys() == found.keys()
    assert not all(plain[name].equal(found[name]) for name in plain)


def test_captions_of_the_course(drawn):
    """oracle: the rules. Of long captions some local one has several sentences, of short ones none has."""
    drawings = {}
    for kind in methods.LongCaptions, methods.ShortCaptions:
        train_set = kind(Shards(drawn / 'train'), None, MICRO, 0, Counts(2, 2, 2, 2), 'crops')
        drawings[kind] = [train_set.sample(epoch, index) for epoch in range(4) for index in range(12)]
    assert any('. ' in sample.captions[3] for sample in drawings[methods.LongCaptions])
    assert not any('. ' in caption for sample in drawings[methods.ShortCaptions] for caption in sample.captions)


def test_without_clip(model):
    """oracle: L_COSMOS, which stays without L_CLIP."""
    *views, cls_t, eot_t = unit(torch.randn(6, 2, 3, 8))
    row = train.METHODS['cosmos']._replace(clip_weight=0)
    loss, terms = total_loss(model[0], Output(*views), cls_t, eot_t, row.terms, row.clip_weight)
    assert_close(loss, cosmos_loss(Output(*views), cls_t, eot_t, model[0].distill_logit_scale.exp()))
    assert term_weights(terms, row.clip_weight)['clip'] == 0 < terms['clip']
