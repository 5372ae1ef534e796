"""The set of scenes, what is measured on it, and the runs of the course; each docstring says what the result is
compared with.

    pytest tests/test_lesson.py
"""
import base64
import io
import json
import re
import shutil
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from xml.etree.ElementTree import fromstring

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision.ops import masks_to_boxes

import eval
import train
from cosmos import COSMOS, Output, Teacher, cosmos_terms, gather, match, total_loss, unit
from data import Counts, Crops, Order, Shards, Tokenizer
from eval import embed_images, embed_texts, load, preprocessing, shard_image
from extras import report
from lesson import experiments, onepage, photos, picture, plots, scenes, suppression
from lesson.experiments import EXPERIMENTS, METHODS, Variant
from lesson.scenes import COLORS, NAMES, SHAPES, World, draw_scene, make_scenes, mask_of
from lesson.setting import Setting
from lesson.suppression import Named, read_scenes, score_table
from plumbing.files import read_json
from plumbing.weights import Origin, read_checkpoint
from tests.helpers import MICRO, encoded, pairs_tar, put, refused, run, shared

WORDS = [*COLORS, *SHAPES]


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """A small built-in set, drawn by one process: 12 training scenes, 24 held-out ones, 12 pairs of twins."""
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


@pytest.fixture
def views(model):
    """Two images and two captions of three pairs."""
    ids = model[1](NAMES[:6])
    return torch.randn(2, 3, 3, 64, 64), ids.view(2, 3, -1)


def objects_in(shards):
    """The objects of each scene, [[{'name', ...}, ...], ...]."""
    return [shards.record(i)['objects'] for i in range(len(shards))]


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
    for part in 'train', 'twins', 'val':
        first, same, other = [(root / part / '00000.tar').read_bytes() for root in (
            drawn, tmp_path / 'same', tmp_path / 'other')]
        assert first == same
        assert (first == other) == (part != 'train')


def test_what_is_listed(val):
    """oracle: masks, for the boxes; the caption, which has each name once, that of the dominant object first in about a
    third; the definition of absent names: of the object's colour, of two, with the five shapes that the scene lacks."""
    dominant_first = 0
    first_colors = set()
    for i, objects in enumerate(objects_in(val)):
        numbers = torch.from_numpy(drawn_again(objects))
        [caption] = val.record(i)['captions']
        assert [thing['role'] for thing in objects] == ['dominant', 'small', 'small']
        colors, shapes = zip(*[thing['name'].split() for thing in objects])
        first_colors.update(colors)
        for number, thing in enumerate(objects, 1):
            x, y, w, h = thing['bbox']
            [box] = masks_to_boxes(numbers[None] == number).tolist()
            assert box == [x, y, x + w - 1, y + h - 1]
            assert caption.count(thing['name']) == 1
            assert (numbers == number).sum() == thing['area']
            lacking = set(list(SHAPES)[:8]) - set(shapes)
            absent = [f'{colors[number - 1]} {shape}' for shape in lacking]
            assert sorted(thing['absent']) == sorted(absent)
        dominant_first += caption.split('. ')[0].endswith(objects[0]['name'])
    assert 2 <= dominant_first <= 14 and first_colors == {'red', 'blue'}


TWO = World(objects=2, dominant_size=0.38, colors=16)


@pytest.mark.parametrize('world, big', [
    (World(shapes=10), {829}), (TWO, {1331}), (replace(TWO, company='equal'), {369}),
    (replace(TWO, company='none'), set())])
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


@pytest.mark.parametrize('named, counts', [(0.3, [3]), (0.25, [2, 3])])
def test_named_is_the_share_of_sentences_on_small_objects(named, counts):
    """oracle: sentences counted by the names in them; the pictures are those of the world without the flag. Without the
    name a sentence is one of the same few forms, for large and for small objects."""
    forms = {'dominant': set(), 'small': set()}
    found = set()
    for i in range(12):
        captions, objects, pixels, _ = drawn_scene(World(named=named), 'train', i)
        _, _, same, _ = drawn_scene(World(), 'train', i)
        counts_of = []
        for thing in objects:
            naming = [sentence for sentence in captions if thing['name'] in sentence]
            counts_of.append(len(naming))
            for sentence in naming:
                forms[thing['role']].add(sentence.replace(f"a {thing['name']}", '{}'))
        _, *small = counts_of
        assert sum(counts_of) == len(captions) == 10
        assert max(small) - min(small) <= 1                     # they take turns
        assert (pixels == same).all()
        found.add(sum(small))
    assert sorted(found) == counts
    assert forms['dominant'] == forms['small'] == set(scenes.FORMS)


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


def test_big_shapes_are_no_small_ones():
    """oracle: the order of SHAPES: here small objects have the first six, and big ones the last four. Wrong names are
    of the six, all but the scene's own."""
    six, four = set(list(SHAPES)[:6]), set(list(SHAPES)[6:])
    found = set()
    for i in range(60):
        _, [big, small], *_ = drawn_scene(replace(TWO, shapes=6, big_shapes=4), 'val', i)
        own = small['name'].split()[1]
        found |= {big['name'].split()[1]}
        assert {name.split()[1] for name in small['absent']} == six - {own}
    assert found == four


def test_twins_differ_in_one_shape(drawn):
    """oracle: the definition, by json and mask: one object of each pair has another shape and the same colour, the rest
    is equal. Its old shape is absent in the other scene."""
    shards = Shards(drawn / 'twins')
    objects = objects_in(shards)
    assert len(objects) == 24
    roles = set()
    for i in range(0, 24, 2):
        changed = []
        for k, (a, b) in enumerate(zip(objects[i], objects[i + 1]), 1):
            if a['name'] == b['name']:
                assert ((drawn_again(objects[i]) == k) == (drawn_again(objects[i + 1]) == k)).all()
                continue
            changed.append(a['role'])
            assert a['name'].split()[0] == b['name'].split()[0]
            assert a['name'] in b['absent'] and b['name'] in a['absent']
        assert len(changed) == 1
        roles.update(changed)
    assert roles == {'dominant', 'small'}


@pytest.mark.parametrize('flags, sentence', [
    ('--objects 4 --shapes 9 --small-size 0.3', '4 objects do not fit'),
    ('--objects 4', 'give --shapes 9'),
    ('--objects 1 --company none', 'give --objects 2 or more'),
    ('--shapes 8 --big-shapes 3', '--big-shapes 3 is too many after --shapes 8; there are 10'),
    ('--company me', '--company me is none of big, equal, none'),
    ('--named 1.5', '--named 1.5 is out of range; give 0 to 1')])
def test_worlds_that_cannot_be_drawn(tmp_path, flags, sentence):
    """oracle: one sentence that names the flag and the remedy."""
    error = run(scenes, tmp_path, '--train', 3, '--val', 1, *flags.split())
    assert sentence in error and len(error.splitlines()) == 1


def test_an_older_set_is_left_alone(drawn, tmp_path, monkeypatch):
    """oracle: which folder is returned, and what is drawn. A set of an older version, with or without a recipe, stays,
    and so does one of another world; one that was interrupted is drawn again in its place."""
    root = tmp_path / 'scenes'
    made = []
    monkeypatch.setattr(scenes, 'make_scenes', made.append)
    (root / 'train').mkdir(parents=True)
    assert scenes.built_in_set(root) == root and made == [root]
    (root / 'val').mkdir()
    (root / 'val/00000.tar').touch()
    second = tmp_path / 'scenes-2'
    assert scenes.built_in_set(root) == second and made == [root, second]
    for version, world, folder in (
            (1, World(), second), (scenes.VERSION, World(colors=16), second), (scenes.VERSION, World(), root)):
        put(root / 'world.json', {'version': version} | asdict(world))
        assert scenes.built_in_set(root) == folder


# --- What is measured ------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module', params=[2, 16])
def parts(request, tmp_path_factory):
    """Scenes for training and held-out ones, 1,000 of each, of so many colours."""
    root = tmp_path_factory.mktemp('parts')
    make_scenes(root, 1000, 1000, colors=request.param)
    return [read_scenes(Shards(root / part)) for part in ('train', 'val')]


def knows_names(scene, color, shape):
    return f'{color} {shape}' in [thing.name for thing in scene]


def test_who_knows_all_names(val):
    """oracle: all are right."""
    listed = read_scenes(val)
    table = score_table(listed, knows_names)
    for figure in suppression.named(table, listed).values():
        assert figure['top1'] == 1
    bound = suppression.bound(table, listed)
    assert bound['dominant_small'] == bound['small_small'] == 1


def test_who_knows_little_gets_little(parts):
    """oracle: closed forms for who knows only the biggest object, adds the words of all, multiplies them, or likes some
    names; chance, within three points, for who knows how many pixels each colour covers. 1,000 scenes."""
    found = suppression.adversaries(*parts)
    names = {}
    for who, figures in found.items():
        names[who] = figures['dominant']['top1'], figures['small']['top1']
    assert names['areas'] == pytest.approx((1 / 6, 1 / 6), abs=0.03)
    assert names['biggest'][0] == 1 and names['biggest'][1] < 0.2
    assert names['sums'] == names['products'] == (1, 1)
    assert names['likes'] == (0, 0)
    for who in 'biggest', 'sums', 'products':
        assert found[who]['bound']['dominant_small'] == found[who]['bound']['small_small'] == 0


def test_ten_scenes_by_hand(model, val):
    """oracle: loops over the objects of ten scenes, each sentence embedded by itself; means are over all 24."""
    network, tokenizer, preprocess = model
    image_features = embed_images(network, val, preprocess)
    columns = {}
    for name in NAMES:
        total = 0
        for form in 'there is a {}', 'we see a {}', 'here is a {}', 'it shows a {}':
            total = total + embed_texts(network, tokenizer, form.format(name))[0]
        columns[name] = image_features @ (total / total.norm())                     # (24,)
    hits = {'dominant': [], 'small': []}
    both = {'dominant_small': [], 'small_small': []}
    listed = read_scenes(val)[:10]
    for i, scene in enumerate(listed):
        score = {name: column[i] for name, column in columns.items()}
        raised = {name: column[i] - column.mean() for name, column in columns.items()}
        for thing in scene:
            wrong = max(raised[name] for name in thing.absent)
            hits[thing.role].append(raised[thing.name] > wrong)
        big, c, d = scene
        couples = [
            ('dominant_small', big, c),
            ('dominant_small', big, d),
            ('small_small', c, d)]
        for roles, a, b in couples:
            if a.color != b.color:
                first = score[a.name] > score[f'{a.color} {b.shape}']
                both[roles].append(first and score[b.name] > score[f'{b.color} {a.shape}'])
    scores = suppression.scores_of(val, *model)
    figures = suppression.named(scores, listed)
    for role, found in hits.items():
        expected = {'top1': np.mean(found), 'chance': 1 / 6, 'objects': len(found)}
        assert figures[role] == pytest.approx(expected)
    figures = suppression.bound(scores, listed)
    assert figures.pop('pairs') == sum(map(len, both.values()))
    assert figures == {roles: np.mean(found) for roles, found in both.items()}


def test_oracles_by_playing(val):
    """oracle: scenes are counted: of k that look alike each is drawn once in k times. Names tell more."""
    listed = read_scenes(val)
    figures = suppression.oracles(listed)
    colors = [sorted(thing.color for thing in scene) for scene in listed]
    shares = [1 / colors.count(each) for each in colors]
    assert figures['colors'] == pytest.approx(np.mean(shares)) and figures['names'] == 1


PATCHES = {'red': 28, 'blue': 35}


def test_pointing_by_hand(monkeypatch, val, model):
    """oracle: numpy on the masks, for a head that looks at patch 27 of every image, but for an absent name at 28, if it
    is blue at 35, and for a whole caption at 28. 8 x 8 patches of an image of 64 pixels: their middles are pixels 4,
    12, 20, ... The head is asked the right questions."""
    network, tokenizer, _ = model
    scenes = read_scenes(val)
    things = sum(scenes, [])
    asked = []
    captions = []

    def weights(queries, keys):
        if len(queries) == 1:                           # asked with a whole caption
            captions.append(queries)
            return torch.eye(64)[[28]]
        patch = PATCHES[things[len(asked)].color]
        asked.append(queries)
        assert keys.shape == (2, 64, 128)
        return torch.eye(64)[[27, patch]]

    monkeypatch.setattr(network.image_cross, 'weights', weights)
    figures = suppression.pointing(*model, val, scenes)
    expected = {}
    for pair, scene in enumerate(scenes):
        mask = Image.fromarray(mask_of(scene))
        numbers = np.array(mask.resize((64, 64), Image.NEAREST))[4::8, 4::8].flatten()
        for thing in scene:
            asked_absent = PATCHES[thing.color]
            peaks = ('own', numbers[[27]]), ('absent', numbers[[asked_absent]]), ('area', numbers)
            for where, there in peaks:
                on_it = there == thing.number
                on_other = (there > 0) & ~on_it
                for place, hits in ('it', on_it), ('other', on_other), ('ground', there == 0):
                    expected.setdefault((thing.role, f'{where}_{place}'), []).append(hits.mean())
        role = ['ground', *(thing.role for thing in scene)][numbers[28]]
        for place in 'dominant', 'small', 'ground':
            expected.setdefault(('caption', place), []).append(role == place)
        colors = [None, *(thing.color for thing in scene)]
        if {'red', 'blue'} <= set(colors):
            for color, patch in PATCHES.items():
                there = colors[numbers[patch]]
                for place, hit in ('asked', there == color), ('other', there not in (color, None)):
                    expected.setdefault(('color', place), []).append(hit)
    for (role, name), shares in expected.items():
        assert figures[role][name] == pytest.approx(np.mean(shares))
    assert len(expected) == 23
    eot, _ = network.encode_text(tokenizer([val.record(i)['captions'][0] for i in range(24)]))
    assert_close(torch.cat(captions), eot)
    for thing, queries in zip(things, asked):
        sentences = [f'there is a {thing.name}', f'there is a {thing.absent[0]}']
        eot, _ = network.encode_text(tokenizer(sentences))
        assert_close(queries, eot)


def test_what_is_handed_over(val, model):
    """oracle: loops. Every object of every scene is asked for, C^I alone answers, and for each object of the scene the
    answer's cosines with names, and with images that have it or not, are compared one by one. The mean of all 24
    scenes' answers to the same question is taken off."""
    network, tokenizer, preprocess = model
    listed = read_scenes(val)
    images = torch.stack([preprocess(shard_image(val, i)) for i in range(24)])
    cls, patches = network.encode_image(images)
    owners = {}                                         # of each name, the scenes that have it
    for thing in sum(listed, []):
        owners.setdefault(thing.name, set()).add(thing.pair)
    names = {}
    for name in NAMES:
        forms = [f'{form} a {name}' for form in ('there is', 'we see', 'here is', 'it shows')]
        names[name] = unit(embed_texts(network, tokenizer, forms).mean(dim=0))
    expected = {}
    about = {i: [] for i in range(24)}                  # of each scene, the answers to all names
    between_scenes = []
    for asked in owners:
        eot, _ = network.encode_text(tokenizer([f'there is a {asked}']))
        answers = [unit(network.image_cross(eot[None], patches[[i]])[0, 0]) for i in range(24)]
        for i, answer in enumerate(answers):
            about[i].append(answer)
            between_scenes += [(answer @ other).item() for k, other in enumerate(answers) if k != i]
        for pair in owners[asked]:
            def raised(vector):
                return answers[pair] @ vector - torch.stack(answers).matmul(vector).mean()

            for thing in listed[pair]:
                who = 'named' if thing.name == asked else 'other'
                wins = [raised(names[thing.name]) > raised(names[wrong]) for wrong in thing.absent]
                expected.setdefault((thing.role, f'{who}_top1'), []).append(all(wins))
                wins = []
                for other in owners[thing.name] - {pair}:
                    for without in set(range(24)) - owners[thing.name]:
                        wins.append(raised(unit(cls[other])) > raised(unit(cls[without])))
                if wins:
                    expected.setdefault((thing.role, f'{who}_found'), []).append(np.mean(wins))
    figures = suppression.handed(*model, val, listed)
    for (role, name), shares in expected.items():
        assert figures[role][name] == pytest.approx(np.mean(shares))
    assert len(expected) == 8
    between_names = []
    for answers in about.values():
        for i, answer in enumerate(answers):
            between_names += [(answer @ other).item() for k, other in enumerate(answers) if k != i]
    expected = {'names': np.mean(between_names), 'scenes': np.mean(between_scenes)}
    names_asked = [name for name in NAMES if name in owners]
    eot, _ = network.encode_text(tokenizer([f'there is a {name}' for name in names_asked]))
    queries = torch.randn(eot.shape, generator=torch.Generator().manual_seed(0)) * eot.std()
    between_random = []
    for i in range(24):
        answers = [unit(network.image_cross(query[None, None], patches[[i]])[0, 0]) for query in queries]
        for k, answer in enumerate(answers):
            between_random += [(answer @ other).item() for j, other in enumerate(answers) if j != k]
    expected['random'] = np.mean(between_random)
    assert figures['cosine'] == pytest.approx(expected, rel=1e-5)


def test_who_answers_what():
    """oracle: closed forms. Who only copies what it reads has 100 % in own and read, 0 in sentence and kept; who only
    heeds the sentence the reverse. One eot for all sentences: a copier has the same, and 1 in 32 alone. One answer for
    all, the mean of all images, is 1 in 32, or where all are as near none: a tie is a miss."""
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
            (images, copy, images, (1, 0, 1, 1, 0)),
            (images, heed, images, (1, 1, 0, 1, 1)),
            (one, copy, images, (1, 0, 1, 1 / 32, 0)),
            (one, say_mean, images, (1 / 32, 1 / 32, 1 / 32, 1 / 32, 1 / 32)),
            (torch.ones(32, 32), heed, alike, (0, 0, 0, 0, 0))):
        shares = suppression.picked(queries, candidates[:, None], cross, candidates, candidates)
        assert tuple(shares.values()) == expected
    assert list(shares) == ['own', 'sentence', 'read', 'alone', 'kept']


def test_conflict_is_what_the_model_computes(model, val, monkeypatch):
    """oracle: COSMOS.forward of pairs that do not belong together. Of three groups of eight two count; the teacher has
    other weights."""
    network, tokenizer, preprocess = model
    teacher = COSMOS(network.config).eval()
    network.origin, teacher.origin = 'student', 'teacher'
    loaded = {
        'student': (network, tokenizer, preprocess),
        'teacher': (teacher, tokenizer, preprocess)}
    monkeypatch.setattr(suppression, 'load', lambda path, name, vocab: loaded[name])
    monkeypatch.setattr(suppression, 'GROUP', 8)
    monkeypatch.setattr(suppression, 'GROUPS', 2)
    captions = [val.record(i)['captions'][0] for i in range(24)]
    questions = [caption.split('. ')[0] for caption in captions]
    figures = suppression.conflict(experiments.options_for('', ''), val, captions, questions)
    images = [preprocess(shard_image(val, i)) for i in range(16)]
    itself = torch.arange(8)
    for who, texts in ('h_T', questions), ('h_T_caption', captions), ('h_I', captions):
        hits = {'own': [], 'sentence': [], 'read': [], 'alone': [], 'kept': []}
        groups = torch.stack(images).split(8), tokenizer(texts).split(8), tokenizer(captions).split(8)
        for x, ids, whole_ids in zip(*groups):
            out = network([x], [ids])
            if who == 'h_I':
                h, alone, targets, kept = out.h_I, out.cls, teacher.text([ids]), teacher.visual([x])
                other = network([x], [ids.roll(1, 0)]).h_I
            else:
                h, alone, targets, kept = out.h_T, out.eot, teacher.visual([x]), teacher.text([whole_ids])
                other = network([x.roll(1, 0)], [ids]).h_T
            answered = {
                'own': (h, targets, itself),
                'sentence': (other, targets, itself),
                'read': (other, targets, itself.roll(1)),
                'alone': (alone, targets, itself),
                'kept': (other, kept, itself)}
            for name, (vectors, among, right) in answered.items():
                best = (vectors[0] @ unit(among[0]).T).argmax(dim=1)
                hits[name] += (best == right).tolist()
        assert figures[who] == {name: np.mean(each) for name, each in hits.items()}
    assert len(set(figures['h_I'].values())) > 1


def test_sharing_batches_with_two_big_objects():
    """oracle: the page, with equally many scenes of each big object: about half of CLIP's sharing batches hold two big
    objects, but a quarter in the world whose big objects have four shapes, and a quarter of COSMOS's."""
    for big_objects, batch, wanted in (16, 64, 0.5), (8, 64, 0.25), (16, 32, 0.25):
        groups = np.arange(4000) % big_objects
        counts = []
        for pairs in experiments.Grouped(4000, batch, 0, 4000 // batch, groups=groups, share=0.5):
            counts.append(len({groups[index] for _, index in pairs}))
        sharing = [count for count in counts if count <= 3]             # mixed batches hold nearly all of them
        assert abs(len(sharing) - len(counts) / 2) <= 1
        assert np.mean(np.array(sharing) > 1) == pytest.approx(wanted, abs=0.05)


def test_other_sets(model, tmp_path, monkeypatch):
    """oracle: one sentence that names the folder and the remedy, for a plain CLIP; of others there is `conflict`, on
    first sentences. During training there is nothing to report. Objects may be listed in another way."""
    image = encoded(Image.new('RGB', (64, 64)))
    for objects in [], ['dog'], 2, [3, 17], [['dog', [1, 2]]], [{'name': 'dog', 'role': 'small', 'absent': []}]:
        record = {'captions': ['a dog'], 'objects': objects}
        shards = Shards(pairs_tar(tmp_path / '0.tar', [record], [image]))
        assert Named().evaluated(None, train.Evaluated(*model, shards, None)) == {}
        assert not [text for kind, text, _ in report.texts_about(0, [['a dog']], record) if kind == 'absent']
    args = experiments.options_for('out/last.pt', tmp_path)
    clip = COSMOS(replace(model[0].config, cross_heads=0))
    refused('lists no objects with centres and absent names; draw a set', suppression.measure, args, clip, *model[1:])
    records = [{'captions': ['a dog. It barks.', 'no']}, {'caption': 'a cat'}]
    pairs_tar(tmp_path / '0.tar', records, [image] * 2)
    monkeypatch.setattr(suppression, 'conflict', lambda args, shards, *texts: texts)
    texts = ['a dog. It barks.', 'a cat'], ['a dog', 'a cat']
    assert suppression.measure(args, *model) == {'conflict': texts}
    args.only = 'pointing'
    refused('lists no objects with centres and absent names', suppression.measure, args, *model)
    refused('has no cross-attention, so --only pointing has nothing', suppression.measure, args, clip, *model[1:])


def test_one_group_of_figures(model, drawn):
    """oracle: all figures at once; which groups a model without cross-attention has."""
    args = experiments.options_for('out/last.pt', drawn)
    network, *rest = model
    network.origin = 'student'
    clip = COSMOS(replace(network.config, cross_heads=0)).eval()
    whole = suppression.measure(args, clip, *rest)
    assert set(whole) == {'dominant', 'small', 'bound', 'retrieval'}
    for only, keys in ('objects', set(whole)), ('pointing', {'pointing'}), ('handed', {'handed'}):
        args.only = only
        assert set(suppression.measure(args, *model)) == keys


# --- The course ------------------------------------------------------------------------------------------------------

def test_without_cross_attention(model, views):
    """oracle: L_CLIP and the four terms of the embeddings themselves, with a second scale, as train.py's `no-cross-attention`."""
    network = experiments.WithoutCrossAttention(model[0].config)
    teacher = Teacher(network)
    targets = teacher(*views)
    out = network(*views)
    loss, parts = total_loss(network, out, *targets, METHODS['without-cross-attention'].differs['terms'])
    terms = cosmos_terms(out._replace(h_I=out.cls, h_T=out.eot), *targets, 1 / 0.07)
    assert_close([term for name, (_, term) in parts.items() if name != 'clip'], [*terms.values()])
    assert_close(loss, parts['clip'][1] + sum(terms.values()) / 4)
    assert len(network.scales()) == 2 and not teacher.model.has_cross_attention


def test_reading_another_pair(model, views):
    """oracle: the cross-attention of a COSMOS with these weights, called by hand on the pair before."""
    whole = model[0]
    cls, patches = whole.encode_image(views[0][0])
    eot, words = whole.encode_text(views[1][0])
    network = experiments.ReadsAnotherPair(whole.config)
    network.load_state_dict(whole.state_dict())
    out = network(*views)
    before = [2, 0, 1]
    h_I = whole.text_cross(cls[None], words[before]) + cls
    h_T = whole.image_cross(eot[None], patches[before]) + eot
    assert_close(out.h_I[:1], unit(h_I))
    assert_close(out.h_T[:1], unit(h_T))


def test_grouped_batches():
    """oracle: by hand. Of 16 scenes 8 have each of two sets of colours. In an epoch of four batches each scene comes
    once, batches are of one kind, or half of them are, and they come in another order each time."""
    listed = []
    for i in range(16):
        colors = ('red', 'blue', 'red') if i % 2 else ('blue', 'red', 'blue')
        listed.append([SimpleNamespace(color=color) for color in colors])
    groups = experiments.groups_of(listed, 'colors')
    assert sorted(groups) == 8 * [0] + 8 * [1] and groups[0] == groups[2] != groups[1]
    for share in 1, 0.5:
        indices = []
        for batch in experiments.Grouped(16, 4, 0, 40, groups=groups, share=share):
            indices.append([index for _, index in batch])
        epochs = np.array(indices).reshape(10, 16)
        assert (np.sort(epochs) == np.arange(16)).all()
        kinds = groups[epochs].reshape(10, 4, 4).sum(axis=2)            # how many of a batch are of the second kind
        pure = (kinds % 4 == 0).sum(axis=1)             # batches of an epoch
        assert pure.min() >= 1 and (pure.min() == 4) == (share == 1)
        assert len(np.unique(kinds, axis=0)) > 1
    late = experiments.Grouped(16, 4, 0, 40, groups=groups, since=0.5)
    plain = Order(16, 4, 0, 40)
    for epoch in range(10):
        assert (late.permutation(epoch) == plain.permutation(epoch)).all() == (epoch < 5)


def test_grouped_by_the_big_object():
    """oracle: the first object's name, by hand."""
    listed = []
    for name in 'red star', 'blue star', 'red star', 'red ring':
        listed.append([SimpleNamespace(name=name), SimpleNamespace(name='blue heart')])
    assert experiments.groups_of(listed, 'big').tolist() == [2, 0, 2, 1]


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """An empty folder to run in."""
    monkeypatch.chdir(tmp_path)


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
    again = suppression.measure(experiments.options_for('out', drawn), *load('out'))
    assert again['conflict'].keys() == {'h_T', 'h_T_caption', 'h_I'}
    for key in 'dominant', 'small', 'bound':
        assert figures[key].items() <= again[key].items()


def test_average_without_a_teacher(drawn):
    """oracle: the weights before and after a step, averaged by the formula."""
    student, teacher, _ = onepage.train(drawn, 1, terms=train.no_terms, batch=4, rate=0.05)
    torch.manual_seed(0)
    before = COSMOS(student.config).state_dict()
    average = {name: (before[name] + 10 * after.cpu()) / 11 for name, after in student.state_dict().items()}
    assert_close(teacher.model.state_dict(), average, check_device=False)


def test_variants():
    """oracle: the setting has every name, and there is every world. On the track `pairs` all see as many. A run that
    two experiments need has one recipe."""
    for variant in [each for variants in EXPERIMENTS.values() for each in variants.values()]:
        for world in {variant.world, *variant.tested} - experiments.SETS.keys():
            World(**experiments.WORLDS[world])
    for method in METHODS.values():
        assert method.differs.keys() <= set(Setting._fields)
    for variant in EXPERIMENTS['pairs'].values():
        assert variant.steps * METHODS[variant.method].batch == 32_000
    assert EXPERIMENTS['minutes']['cosmos'].recipe() == EXPERIMENTS['pairs']['cosmos'].recipe()


def test_reading_across():
    """oracle: the four pairs written out. Where what was read could be copied, what has read nothing is compared; the
    control has these two terms not at all."""
    *views, cls_t, eot_t = unit(torch.randn(6, 2, 3, 8))
    out = Output(*views)
    terms = train.across_terms(out, cls_t, eot_t, 5)
    pairs = {
        'h_I_cls_t': (out.h_I, cls_t),
        'cls_eot_t': (out.cls, eot_t),
        'eot_cls_t': (out.eot, cls_t),
        'h_T_eot_t': (out.h_T, eot_t)}
    for name, (a, b) in pairs.items():
        assert_close(terms[name], match(*gather(a, b), 5))
    assert terms.keys() == pairs.keys()
    kept = experiments.two_terms(out, cls_t, eot_t, 5)
    assert_close(kept, {name: terms[name] for name in ('h_I_cls_t', 'h_T_eot_t')})


def figures_in(path):
    """What a command has written by --json, without what it says of the checkpoint."""
    found = read_json(path)
    for name in Origin._fields:
        del found[name]
    return found


@pytest.fixture
def course(sandbox, monkeypatch):
    """Two experiments that share a run of two steps; no result yet."""
    Path('lesson').mkdir()
    variants = {'clip': Variant('clip', seeds=range(1), tested=('big',))}
    for module in experiments, plots:
        monkeypatch.setattr(module, 'EXPERIMENTS', {'one': dict(variants), 'two': dict(variants)})
    for method in 'clip', 'without-cross-attention', 'cosmos':
        monkeypatch.setitem(METHODS, method, METHODS[method]._replace(batch=4, steps=2))
    experiments.RESULTS.write_text('')


def test_missing_runs(course, monkeypatch):
    """oracle: by hand. Seeds one after another, variants in their order; what has a row is left out, in whichever
    experiment it was made."""
    variants = {'b': Variant('clip', seeds=range(7, 9)), 'a': Variant('cosmos', seeds=range(7, 8))}
    monkeypatch.setitem(experiments.EXPERIMENTS, 'one', variants)
    experiments.add_result({'run': variants['b'].recipe(), 'seed': 7})
    assert experiments.missing_runs(variants) == [(7, 'a'), (8, 'b')]
    assert experiments.missing_runs(variants, 3) == [(7, 'a'), (8, 'b'), (8, 'a'), (9, 'b'), (9, 'a')]
    assert 'no variant is called c; take one of b, a' in run(experiments, 'one', '--run', 'c', 7)


def test_a_set_that_is_not_drawn(course, tmp_path, monkeypatch):
    """oracle: the commands of eval.py and of lesson.suppression on its checkpoint. Held-out pairs may be shards, or lie
    as in COCO."""
    records = []
    images = []
    listing = {'images': [], 'annotations': []}
    for i in range(6):
        caption = f'a {NAMES[i]}. It is here.'
        records.append({'captions': [caption]})
        images.append(encoded(Image.new('RGB', (64, 64), (40 * i, 9, 9))))
        put(tmp_path / f'coco/images/val2017/{i}.png', images[i])
        listing['images'].append({'id': i, 'file_name': f'{i}.png'})
        listing['annotations'].append({'image_id': i, 'caption': caption, 'kind': 'names'})
    put(tmp_path / 'coco/annotations/captions_val2017.json', listing)
    pairs_tar(tmp_path / '0.tar', records, images)
    variant = Variant('cosmos', 'mine', augment='full')
    rows = []
    for held_out in '0.tar', 'coco':
        monkeypatch.setitem(experiments.SETS, 'mine', (tmp_path / '0.tar', tmp_path / held_out))
        rows.append(experiments.make_row({'a': variant}, (0, 'a')) | {'seconds': 0})
    assert rows[0] == rows[1]
    assert rows[0]['run'].startswith('cosmos, pairs of mine, augment full, grouped')
    for annotation in listing['annotations'][:5]:
        listing['annotations'].append(annotation | {'caption': 'on black', 'kind': 'names, background'})
    put(tmp_path / 'coco/annotations/captions_val2017.json', listing)
    out = experiments.run_folder(variant, 0)
    scored = eval.load(out / 'last.pt')
    told = experiments.set_figures('mine', experiments.options_for(out, None), scored)
    asked = experiments.flat({'retrieval': told['objects']})
    assert (told['retrieval']['captions'], rows[0] | asked) == (11, rows[0])        # as if they were not there
    crops = experiments.make_row({'a': variant._replace(augment='crops')}, (0, 'a'))
    assert crops['loss.clip'] != rows[0]['loss.clip']
    flags = '--shards', tmp_path / '0.tar', '--json', 'x.json', '--device', 'cpu'
    figures = {}
    for module, words in (eval, ['retrieval']), (suppression, []):
        assert run(module, *words, experiments.run_folder(variant, 0), *flags) is None
        figures |= figures_in('x.json')
    conflict = {'conflict': figures.pop('conflict')}
    assert rows[0].items() >= experiments.flat({'retrieval': figures} | conflict).items()


@pytest.mark.parametrize('method', ['clip', 'without-cross-attention'])
def test_a_run_has_one_row(method, course, drawn, monkeypatch):
    """oracle: the command on its checkpoint and on its scenes; the loss of the same training. It is not made again for
    the other experiment, and a row that is there stays."""
    variant = Variant(method, seeds=range(3, 4), tested=('big',))
    for variants in experiments.EXPERIMENTS.values():
        variants['clip'] = variant
    monkeypatch.setattr(experiments, 'scene_folder', lambda *which: drawn)
    monkeypatch.setattr(experiments, 'ProcessPoolExecutor', lambda *how: ThreadPoolExecutor(1))
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    steps = []
    onepage.train(
        drawn, 2, seed=3, precision='bf16', batch=4, rate=METHODS[method].rate,
        watch=lambda *step: steps.append(step), **METHODS[method].differs)
    assert run(experiments, 'one') is None
    monkeypatch.setattr(onepage, 'train', None)
    assert run(experiments, 'two') is None
    [row] = experiments.read_results().values()
    own = read_json(experiments.run_folder(variant, 3) / 'row.json')
    assert {name: str(value) for name, value in own.items()} == row
    experiments.add_result({'run': row['run'], 'seed': 3})
    assert [row] == [*experiments.read_results().values()]
    assert row.items() >= {'seed': '3', 'steps': '2', 'pairs': '8', 'precision': 'bf16'}.items()
    assert row['small.top1'] == row['big.small.top1']
    _, _, parts = steps[-1]
    for name, (_, term) in parts.items():
        assert float(row[f'loss.{name}']) == pytest.approx(term.item() / np.log(4), abs=1e-4)
    out = experiments.run_folder(variant, 3)
    command = [out / 'last.pt', '--shards', drawn, '--json', 'figures.json', '--device', 'cpu']
    assert run(suppression, *command) is None
    for name, value in experiments.flat(figures_in('figures.json')).items():
        assert row[name] == str(value)
    world = experiments.make_row({'a': Variant(experiments.NOBODY)}, (0, 'a'))
    assert world['R@1.names'] == 1 and world['sums.bound.dominant_small'] == 0


def add_rows(columns, *rows):
    """Rows `variant seed figures ...` of the first experiment."""
    for row in rows:
        name, seed, *figures = row.split()
        recipe = plots.EXPERIMENTS['one'][name].recipe()
        experiments.add_result({'run': recipe, 'seed': seed} | dict(zip(columns.split(), figures)))


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
    """Variants clip, b and c, with rows of seeds 0 to 2; two comparisons. Seed 100 is of no experiment here."""
    monkeypatch.setattr(plots, 'PICTURES', {})
    monkeypatch.setattr(picture, 'PICTURES', {})
    monkeypatch.setattr(plots, 'COMPARISONS', {'one': {'small.top1': 'b~clip c~clip'}})
    plots.EXPERIMENTS['one'] |= {
        'clip': Variant('clip'),
        'b': Variant('cosmos', rate=1),
        'c': Variant('cosmos', rate=2)}
    add_rows(
        'small.top1 seconds', 'clip 0 .39 60', 'clip 1 .40 60', 'clip 2 .41 60', 'b 0 .5 60', 'b 1 .5 60', 'b 2 .5 60',
        'c 0 .42 60', 'c 1 .45 60', 'c 2 .48 90', 'c 100 0 0')


PAGE = """# 1.2 is a figure, too
<!-- paper -->

It names 40.0 %, then +10.0 ± 2.5
more in 1.2 minutes, or +5.0. See [1.1](https://1.1) and `2.5`.
<!-- one/clip/small.top1 one/b~clip/small.top1 one/c/seconds
     one/c~clip/small.top1 paper -->

    0.1 of code

```
0.2 of code

0.3
```

<!-- table: small.top1 bound.small_small seconds | one/clip one/c -->
| in % | small named | minutes |
| --- | --- | --- |
| CLIP | 40.0 | 1.0 |
| COSMOS | 45.0 | 1.2 |
"""


@pytest.mark.parametrize('old, new, sentence', [
    ('40.0 %', '40.0 % or 3.5', '5 sources'),
    ('+10.0 ± 2.5', '-10.0 ± 2.5', '"-10.0 ± 2.5", and results.csv "+10.0 ± 2.5" (one/b~clip/small.top1)'),
    ('+10.0', '10.0', '"10.0 ± 2.5", and'),
    ('1.2 minutes', '1.3 minutes', '"1.3", and results.csv "1.2"'),
    ('40.0 %, then +10.0 ± 2.5', '+10.0 ± 2.5 %, then 40.0', '"+10.0 ± 2.5", and results.csv "40.0"'),
    ('`2.5`', '2.5', '6 figures'),
    (' one/c/seconds', '', '4 sources'),
    ('| 45.0', '| 40.0', 'a table'),
    ('-->\n|', '-->\n\n|', 'figures'),
    ('    0.1', '0.1', '1 figures (0.1) and 0 sources'),
    ('one/b~clip', 'one/b~c', 'COMPARISONS of one'),
    ('one/clip/small.top1 one', 'one/clip/small.named one', 'no small.named of clip'),
    ('one/clip/small.top1 one', 'one/d/small.top1 one', 'no experiment one with a variant d')])
def test_figures_and_sources(families, old, new, sentence):
    """oracle: by hand. Gaps of 11, 10 and 9 in three seeds: 4.303 / sqrt(3) = 2.5. The page passes as it is, and no
    changed one does."""
    plots.PAGES[0].write_text(PAGE)
    assert plots.changes(plots.PAGES[0]) == [] and old in PAGE
    plots.PAGES[1].write_text(PAGE.replace(old, new))
    assert sentence in run(plots, '--check')


def test_filling_in(families, capsys):
    """oracle: by hand, as above. What changes is printed; more than 5 points are refused without --accept, and nothing
    is written. RESULTS.md begins with the family and what is decided in it; experiments that tune are folded at its
    end.
    """
    plots.EXPERIMENTS['tune-one'] = {'d': Variant('cosmos', rate=2)}
    for page in plots.PAGES:
        page.write_text(PAGE.replace('40.0 %', '41.0 %').replace('| 45.0', '| 50.0'))
    assert run(plots) is None
    assert 'README.md: 41.0 becomes 40.0 (one/clip/small.top1)' in capsys.readouterr().out
    assert plots.PAGES[0].read_text() == plots.PAGES[1].read_text() == PAGE
    table = plots.APPENDIX.read_text()
    assert '| b - clip | small.top1 | +10.0 ± 2.5 | yes |' in table
    assert '| c - clip | small.top1 | +5.0 ± 5.0 | yes |' in table
    assert '| clip × 5 | 1.0 | 40.0 |' in table
    in_order = '| b - clip |', '| clip × 5 |', '<summary>tune-one</summary>', '| d × 5 |'
    parts = [table.index(words) for words in in_order]
    assert parts == sorted(parts)
    wrong = PAGE.replace('40.0 %', '46.0 %')
    plots.PAGES[1].write_text(wrong)
    assert '46.0 would become 40.0' in run(plots) and plots.PAGES[1].read_text() == wrong
    assert run(plots, '--accept') is None and plots.PAGES[1].read_text() == PAGE


def test_check(course, monkeypatch):
    """oracle: what is complete passes; another page, picture, commit or machine, and a missing run are named. Commits
    that are equal may stand together. One's own run is a star, with --mine."""
    pytest.importorskip('matplotlib')
    Path('assets').mkdir()
    drawn = []

    def show(figure):
        axis = figure.subplots()
        plots.show_runs(axis, 'one', 'clip', 'small.top1', 0)
        drawn.append([line.get_ydata().tolist() for line in axis.lines])

    monkeypatch.setattr(plots, 'PICTURES', {'a': (show, (1, 1))})
    monkeypatch.setattr(plots, 'MINE', [])
    variants = {'clip': Variant('clip', seeds=range(2))}
    for module in experiments, plots:
        monkeypatch.setattr(module, 'EXPERIMENTS', {'one': variants})
    for page in plots.PAGES:
        page.write_text('')
    first, second = experiments.EQUAL_COMMITS[:2]
    columns = 'commit machine precision small.top1'
    add_rows(columns, f'clip 0 {first} m bf16 .5', f'clip 1 {second} m bf16 .25')
    assert run(plots) is None and run(plots, '--check') is None
    put('runs/lesson/x/row.json', {'run': variants['clip'].recipe(), 'small.top1': 0.75})
    put('runs/photos/tuned/row.json', {'run': variants['clip'].recipe()})
    assert run(plots, '--mine') is None and Path('runs/lesson/a.png').exists()
    assert drawn == [[[50, 25], [37.5], []], [[50, 25], [37.5], [75]]]
    results = experiments.RESULTS
    for path, old, new, sentence in (
            (plots.APPENDIX, '37.5', '37.6', 'RESULTS.md was written from other rows'),
            (results, f'1,{second}', '1,x', 'one has runs of several origins'),
            (results, ',m,', ',n,', 'one has runs of several origins'),
            (results, f'1,{second}', f'7,{second}', 'one lacks 1 runs')):
        text = path.read_text()
        path.write_text(text.replace(old, new, 1))
        if path == results:
            assert run(plots) is None
        assert sentence in run(plots, '--check')
        path.write_text(text)
    plots.APPENDIX.write_text(plots.appendix())
    assert 'the picture a was drawn from other rows' in run(plots, '--check')
    assert run(plots) is None
    path, *_ = picture.PICTURES
    put(path, Path(path).read_text().replace('eot_t', 'eot'))
    assert f'{path} is not what lesson/picture.py draws; run python -m lesson.plots' in run(plots, '--check')


def test_the_picture_of_a_step():
    """oracle: Crops, on the same scene with the recipe of `tiny`. The drawing has the names of cosmos.py, and each page
    of the course another picture; the pictures are well-formed."""
    (_, image), (_, record) = draw_scene(World(), 'train', picture.PAIR)
    shards = SimpleNamespace(pair=lambda i: (json.loads(record)['captions'], image))
    crops = Crops(shards, None, train.PRESETS['tiny'].sizes, 0, Counts(2, 2, 2, 2), 'crops')
    views, _, captions, _ = crops.sample(picture.EPOCH, picture.PAIR)
    steps = picture.drawn_steps()
    large, *small = [fromstring(svg) for svg in steps.values()]
    words = [text.text for text in large.iter('{http://www.w3.org/2000/svg}text')]
    for name in *captions, *captions[:2], 'cls', 'eot', 'h_I', 'h_T', 'cls_t', 'eot_t', 'L_CLIP':
        words.remove(name)
    assert 'C^I: a sentence' in words and 'C^T: a view' in words
    found = [pixels.get('href') for pixels in large.iter('{http://www.w3.org/2000/svg}image')]
    for view, uri in zip(views, found, strict=True):
        pixels = Image.open(io.BytesIO(base64.b64decode(uri.partition(',')[2])))
        assert_close(torch.from_numpy(np.array(pixels)), view.permute(1, 2, 0), rtol=0, atol=1)
    assert len(set(steps.values())) == len(steps) == 6


# --- Photographs -----------------------------------------------------------------------------------------------------

@pytest.fixture
def album(sandbox, monkeypatch):
    """Six training pictures in Karpathy's layout, two for validation, three for the test; a model that is quick."""
    listing = {'images': []}
    for i, split in enumerate(['train'] * 6 + ['val'] * 2 + ['test'] * 3):
        sentences = [{'raw': f'A {NAMES[i]} .'}, {'raw': f'It is the {NAMES[i]} .'}]
        listing['images'].append({'filename': f'{i}.png', 'split': split, 'imgid': i, 'sentences': sentences})
        put(f'flickr8k/Images/{i}.png', encoded(Image.new('RGB', (70, 64), (20 * i, 9, 9))))
        put(f'cifar10/{NAMES[i]}/{i}.png', encoded(Image.new('RGB', (32, 32), (20 * i, 9, 9))))
    put('flickr8k/dataset_flickr8k.json', listing)
    put('lesson/photos.json', [4, 1, 5])
    experiments.RESULTS.write_text('')
    recipe = train.LAPTOP | {'batch': 2, 'steps': 8, 'augment': 'full'}
    monkeypatch.setitem(train.PRESETS, 'photo', train.Preset(replace(MICRO, image_size=32), recipe))
    monkeypatch.setattr(photos, 'BATCH', 2)
    monkeypatch.setattr(photos, 'CIFAR10', Path('cifar10'))
    monkeypatch.setattr(photos, 'ALL', 6)


def in_this_process(words):
    """What photos.call does, without the seconds that a process takes to start."""
    if words[0] == '-m':
        words = words[1:]
    name, *argv = words
    module = import_module(name.removesuffix('.py'))
    assert run(module, *argv) in (None, 0)


def test_rows_of_photographs(album, monkeypatch, capsys):
    """oracle: the commands that --print shows, given by hand, and the log. --print packs what they train on. A run that
    chooses a rate is not scored on the test photographs; half of the photographs are those of the list."""
    monkeypatch.setattr(photos, 'call', in_this_process)
    variant = photos.Photos('cosmos', 8, 1e-3, range(3, 4), photographs=2)
    tuned = variant._replace(method='plain', photographs=6, is_scored=False)
    variants = {'cosmos': variant, 'tuned': tuned}
    monkeypatch.setitem(photos.EXPERIMENTS, 'photo-half', variants)
    assert run(photos, 'photo-half', '--flickr8k', 'flickr8k', '--print') is None
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('OMP_NUM_THREADS=1 ')]
    flickr8k = Path('flickr8k')
    row = photos.make_row(variants, flickr8k, (3, 'cosmos'))
    listed = {record['file'] for record in map(Shards('runs/photos/shards-2/train').record, range(2))}
    assert listed == {'4.png', '1.png'}
    out, words = photos.commands(variant, 3, flickr8k)
    assert [*words] == ['train', 'retrieval', 'last', 'student', 'cifar10', 'conflict']
    shown = [line.split() for line in lines[0].replace('OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= ', '').split(' && ')]
    assert shown == [*words.values()]
    saved = read_checkpoint(out / 'last.pt')['student']
    shutil.rmtree(out)
    for _, *each in shown:
        in_this_process(each)
    assert_close(read_checkpoint(out / 'last.pt')['student'], saved, rtol=0, atol=0)
    for what, column in (
            ('retrieval', 'text_to_image_R@1'), ('last', 'text_to_image_mean_rank'),
            ('student', 'text_to_image_mean_rank'), ('cifar10', 'top1'), ('conflict', 'conflict')):
        found = read_json(out / f'{what}.json')[column]
        expected = experiments.flat({column: found}, '' if what == 'conflict' else f'{what}.')
        assert expected.items() <= row.items()
    evaluations = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines() if '"eval"' in line]
    best = [each['eval']['retrieval'] for each in evaluations if each['step'] == row['best_step']]
    assert row['val.text_to_image_R@5'] == round(best[0]['text_to_image_R@5'], 4)
    assert row['pairs'] == 16 and row['retrieval.images'] == 3 and row['val.images'] == 2
    assert not any(name.startswith('retrieval') for name in photos.make_row(variants, flickr8k, (3, 'tuned')))


def test_races_of_photographs():
    """oracle: by hand. From the same pairs all methods see 800 steps of 64; those of a longer race take three times the
    steps; a rate is chosen on a seed that no race has."""
    for variant in photos.EXPERIMENTS['photo-pairs'].values():
        assert variant.steps * photos.BATCH == 51_200
    for method, variant in photos.EXPERIMENTS['photo-longer'].items():
        assert variant.steps == 3 * photos.EXPERIMENTS['photo-minutes'][method].steps
    tuned, raced = set(), set()
    for variants in photos.EXPERIMENTS.values():
        for variant in variants.values():
            (raced if variant.is_scored else tuned).update(variant.seeds)
    assert tuned and not tuned & raced


@pytest.mark.parametrize('experiment', ['photo-tune', 'photo-tune-pairs', 'photo-tune-across'])
def test_rates_of_photographs(experiment):
    """oracle: the rows. The rate of a method has its best R@10 on the validation photographs, over both directions, and
    a lower and a higher rate were tried, too."""
    rows = experiments.read_results()
    found = defaultdict(dict)
    for variant in photos.EXPERIMENTS[experiment].values():
        row = rows[variant.recipe(), 100]
        both = float(row['val.image_to_text_R@10']) + float(row['val.text_to_image_R@10'])
        found[variant.method][variant.rate] = both
    for method, scores in found.items():
        best = max(scores, key=scores.get)
        assert photos.RATES[method] == best
        assert min(scores) < best < max(scores)


def test_rates_of_drawn_scenes():
    """oracle: the rows. Of the rates that all seeds of tuning tried, a method's own names most objects, big and
    small."""
    rows = experiments.read_results()
    found = defaultdict(lambda: defaultdict(list))
    for experiment in 'tune', 'tune-again', 'tune-across':
        for variant in experiments.EXPERIMENTS[experiment].values():
            for seed in variant.seeds:
                row = rows[variant.recipe(), seed]
                both = float(row['dominant.top1']) + float(row['small.top1'])
                found[variant.method][variant.rate].append(both)
    assert set(found) == set(METHODS) - {'another-pair'}
    for method, scores in found.items():
        seeds = max(map(len, scores.values()))
        means = {rate: fmean(values) for rate, values in scores.items() if len(values) == seeds}
        assert METHODS[method].rate == max(means, key=means.get)


def test_photographs_that_are_kept():
    """oracle: half of the training photographs, each once, and no others."""
    kept = read_json(photos.FEWER)
    assert len(kept) == len(set(kept)) == 3000
    listing = read_json(shared('data/flickr8k/dataset_flickr8k.json'))
    splits = {image['imgid']: image['split'] for image in listing['images']}
    assert {splits[i] for i in kept} == {'train'}
