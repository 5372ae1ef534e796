"""The set of scenes and what is measured on it; each docstring says what the result is compared with.

    pytest lesson/test_lesson.py
"""
import json
import sys
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
from cosmos import COSMOS, Config
from data import Preprocess, Shards, Tokenizer
from eval import TEMPLATES, embed_images
from lesson import scenes, suppression
from lesson.scenes import COLORS, NAMES, SHAPES, make_scenes
from lesson.suppression import listed_objects, presence, read_mask


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """A small built-in set, drawn by one process: 12 training and 24 held-out scenes."""
    root = tmp_path_factory.mktemp('scenes')
    make_scenes(root, 12, 24, seed=1, workers=1)
    return root


@pytest.fixture(scope='module')
def val(drawn):
    return Shards(drawn / 'val')


@pytest.fixture(scope='module')
def model():
    """(model, tokenizer, preprocess) with random weights, which reads text byte by byte."""
    torch.manual_seed(0)
    tokenizer = Tokenizer([], 64)
    config = Config.preset('tiny', vocab_size=tokenizer.vocab_size)
    return COSMOS(config).eval(), tokenizer, Preprocess(config.image_size)


def run(module, *argv):
    """A command in this process -> what its SystemExit carries, or None."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['prog', *map(str, argv)])
        try:
            data.cli(module.main)
        except SystemExit as stop:
            return stop.code


def objects_in(shards):
    """The objects of each scene, [[{'name', ...}, ...], ...]."""
    return [suppression.objects_of(shards, i) for i in range(len(shards))]


def word_indicators(lines):
    """(n, 26): which colours and shapes are in each line."""
    rows = []
    for line in lines:
        rows.append([float(word in line.split()) for word in (*COLORS, *SHAPES)])
    return torch.tensor(rows)


# --- Scenes ----------------------------------------------------------------------------------------------------------

def test_any_number_of_workers_draws_the_same(drawn, tmp_path):
    """oracle: the bytes that one process drew with the same arguments; another seed gives others."""
    again = tmp_path / 'again'
    other = tmp_path / 'other'
    assert run(scenes, again, '--train', 12, '--val', 24, '--seed', 1) is None
    make_scenes(other, 12, 24, seed=2, workers=3)
    for name in 'train/00000.tar', 'val/00000.tar':
        expected = (drawn / name).read_bytes()
        assert (again / name).read_bytes() == expected
        assert (other / name).read_bytes() != expected
    (again / 'train/00001.tar').touch()
    with pytest.raises(ValueError, match='holds shards of a larger set'):
        make_scenes(again, 12, 24)


def test_masks_boxes_and_captions_agree(val):
    """oracle: the pixels of the masks, counted again; the names in the captions."""
    for i, objects in enumerate(objects_in(val)):
        mask = np.array(read_mask(val, i))
        small = len(objects) - 1
        assert mask.max() == len(objects)
        assert [thing['role'] for thing in objects] == ['dominant'] + ['small'] * small
        assert len(val.pool(i)) == 1 + 3 + 3 * (2 + small)
        captions = val.record(i)['captions']
        for number, thing in enumerate(objects, 1):
            ys, xs = np.nonzero(mask == number)
            x, y, w, h = thing['bbox']
            assert (x, x + w - 1, y, y + h - 1) == (xs.min(), xs.max(), ys.min(), ys.max())
            assert thing['area'] == len(xs)
            assert [thing['name'] in caption for caption in captions] == [True] * 5


def test_wrong_names_are_as_defined(val):
    """oracle: words counted anew. Of all colours with all shapes of a scene those are mixed that have one word of the
    object's name; absent names have none of the scene's words."""
    for objects in objects_in(val):
        scene = ' '.join(thing['name'] for thing in objects).split()
        for thing in objects:
            words = set(thing['name'].split())
            mixed = set()
            for name in NAMES:
                color, shape = name.split()
                if {color, shape} <= set(scene) and len(words & {color, shape}) == 1:
                    mixed.add(name)
            assert sorted(thing['mixed']) == sorted(mixed)
            assert len(set(thing['absent'])) == 9 and set(thing['absent']) <= set(NAMES)
            assert not set(' '.join(thing['absent']).split()) & set(scene)


@pytest.mark.parametrize('named, counts', [(0, [0]), (0.3, [3]), (0.25, [2, 3]), (1, [10])])
def test_named_is_the_share_of_sentences_on_small_objects(drawn, tmp_path, named, counts):
    """oracle: sentences counted by the names in them; the pictures are those of the set without the flag."""
    assert run(scenes, tmp_path, '--train', 12, '--val', 1, '--seed', 1, '--named', named) is None
    shards = Shards(tmp_path / 'train')
    found = set()
    for i, objects in enumerate(objects_in(shards)):
        text = ' '.join(shards.pool(i)).lower()
        main, *small = [text.count(thing['name']) for thing in objects]
        assert main + sum(small) == len(shards.pool(i)) == 10
        found.add(sum(small))
        assert shards.image(i) == Shards(drawn / 'train').image(i)
    assert sorted(found) == counts


def test_sizes_and_numbers_of_objects(tmp_path):
    """oracle: boxes in pixels, to which the edge adds up to 3; what cannot be drawn is one sentence."""
    for size, least, most in (0.12, 0.42, 0.56), (0.44, 0.44, 0.44):
        folder = tmp_path / f'{size}'
        make_scenes(folder, 0, 12, small_size=size, objects=2)
        for objects in objects_in(Shards(folder / 'val')):
            large, small = [max(thing['bbox'][2:]) for thing in objects]
            assert 0 <= small - 96 * size <= 3
            assert 96 * least <= large <= 96 * most + 3
    assert run(scenes, tmp_path, '--train', 0, '--val', 9, '--objects', 4) is None
    assert {len(objects) for objects in objects_in(Shards(tmp_path / 'val'))} == {4}
    with pytest.raises(ValueError, match='4 objects do not fit'):
        make_scenes(tmp_path, 0, 1, small_size=0.4, objects=4)
    for flag, value in ('--objects', 5), ('--named', 30), ('--small-size', -1):
        assert run(scenes, tmp_path, flag, value) == 1


def test_an_older_set_is_left_alone(monkeypatch, tmp_path):
    """oracle: the older set's bytes; the new one beside it is drawn once."""
    monkeypatch.setattr(scenes, 'make_scenes', partial(make_scenes, train=2, val=2))
    root = tmp_path / 'scenes'
    beside = tmp_path / 'scenes-2'
    assert scenes.built_in_set(root) == root
    assert scenes.built_in_set(root) == root
    shard = root / 'val/00000.tar'
    older = shard.read_bytes().replace(b'"mixed"', b'"other"')
    shard.write_bytes(older)
    assert scenes.built_in_set(root) == beside
    monkeypatch.delattr(scenes, 'make_scenes')
    assert scenes.built_in_set(root) == beside
    assert shard.read_bytes() == older


@pytest.mark.parametrize('box, visible', [
    ((0, 0, 20, 20), slice(1)), ((50, 30, 40, 40), slice(1, 2)), ((0, 40, 30, 30), slice(3, 4)),
    ((0, 0, 90, 90), slice(3))])
def test_sentences_that_a_crop_may_have(box, visible):
    """oracle: by hand, which objects have their centre in the box (y, x, h, w)."""
    pool = ['A red star', 'a blue ring', 'the red star is above the blue ring', 'grey ground']
    star = {'name': 'red star', 'bbox': [0, 0, 10, 10]}
    record = {'objects': [star, {'name': 'blue ring', 'bbox': [40, 60, 8, 8]}]}
    assert scenes.visible_sentences(pool, record, box) == pool[visible]
    assert scenes.visible_sentences(pool[:3], record, (20, 20, 9, 9)) == pool[:3]


# --- What is measured ------------------------------------------------------------------------------------------------

def test_presence_and_binding_by_hand(model, tmp_path):
    """oracle: ten scenes by loops, one text at a time."""
    network, tokenizer, preprocess = model
    make_scenes(tmp_path, 0, 10, seed=5)
    shards = Shards(tmp_path / 'val')
    image_features = embed_images(network, shards, preprocess)

    @torch.no_grad()
    def score(i, name):
        total = 0
        for template in TEMPLATES:
            text = tokenizer([template.format(name)])
            total += F.normalize(network.encode_text(text)[0][0], dim=0)
        return (image_features[i] @ F.normalize(total, dim=0)).item()

    figures = suppression.presence_and_binding(network, tokenizer, image_features, shards)
    for role, found in figures.items():
        hits = []
        shares = []
        for i, objects in enumerate(objects_in(shards)):
            for thing in objects:
                if thing['role'] == role:
                    height = score(i, thing['name'])
                    hits.append(all(score(i, name) < height for name in thing['absent']))
                    shares += [score(i, name) < height for name in thing['mixed']]
        assert found['top1'] == pytest.approx(np.mean(hits))
        assert found['bound'] == pytest.approx(np.mean(shares))
        assert (found['chance'], found['objects']) == (0.1, len(hits))
    assert list(figures) == ['dominant', 'small']


def test_ties_by_pencil():
    """oracle: by pencil, against names that are level, below, and twice above."""
    name, level, below, above = NAMES[:4]
    scores = torch.tensor([[3, 3, 2, 4]])
    thing = SimpleNamespace(pair=0, name=name, mixed=[level, below, above, above])
    assert suppression.binding(scores, [thing]) == (0.5 + 1) / 4
    assert presence(scores, thing, [below])
    assert not presence(scores, thing, [below, level])


@pytest.mark.parametrize('most', [4, 1])
def test_word_indicators_name_all_and_bind_by_chance(monkeypatch, val, most):
    """oracle: closed form. Who knows which words are in a scene and nothing else names every object, and binds as by
    the toss of a coin. Who knows those of the dominant object only names that one alone."""
    monkeypatch.setattr(suppression, 'class_vectors', lambda model, tokenizer, names: word_indicators(names))
    lines = [' '.join(thing['name'] for thing in objects[:most]) for objects in objects_in(val)]
    features = word_indicators(lines)
    figures = suppression.presence_and_binding(None, None, features, val)
    assert figures['dominant']['top1'] == 1
    assert figures['small']['top1'] == (most == 4)
    for role in figures:
        assert (figures[role]['bound'] == 0.5) == (most == 4)
    scores = suppression.name_scores(None, None, features)
    for thing in listed_objects(val)['dominant']:
        assert presence(scores, thing, scenes.clean_names(NAMES, thing.scene))


def test_probe_finds_what_is_there_and_nothing_else():
    """oracle: of features made of a name's words with noise beside them every object is found; of noise alone, nearly
    as wide as there are pairs to fit, as many as by guessing: no pair is asked that was fitted."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    group = []
    for pair in range(300):
        name, *absent = rng.choice(NAMES, 10, replace=False)
        group.append(SimpleNamespace(pair=pair, name=name, absent=absent))
    words = word_indicators([thing.name for thing in group])
    noise = torch.randn(300, 100)
    for features, least, most in (torch.cat([words, noise[:, :8]], dim=1), 1, 1), (noise, 0.05, 0.15):
        scores = suppression.probe_scores(features, group)
        hits = [presence(scores, thing, thing.absent) for thing in group]
        assert least <= np.mean(hits) <= most


def test_maps_point_at_masks(monkeypatch, val, model):
    """oracle: numpy. A uniform map has as much weight on an object as this has area; one with all weight on the patch
    that an object covers most has that share, and its peak there."""
    cells, middles = [], []
    for thing in listed_objects(val)['small']:
        numbers = np.array(read_mask(val, thing.pair).resize((64, 64), Image.NEAREST))
        mask = numbers == thing.number
        cells.append(mask.reshape(8, 8, 8, 8).mean(axis=(1, 3)).flatten())
        middles.append(mask[4::8, 4::8].flatten())
        best = cells[-1].argmax()
        maps = torch.eye(64)[[best, 0]]
        figures = suppression.point(maps, torch.from_numpy(numbers), thing.number, 8)
        assert figures['peak'] == middles[-1][best]
        assert figures['weight'] == pytest.approx(cells[-1][best])
        assert figures['area'] + figures['others_area'] == pytest.approx((numbers > 0).mean())
    maps = torch.eye(64)[20:22]
    maps[0] = 1 / 64
    network, tokenizer, preprocess = model
    monkeypatch.setattr(network, 'attention', lambda images, tokens: (maps, None))
    figures = suppression.pointing(network, tokenizer, preprocess, val)['small']
    assert figures['weight'] == pytest.approx(figures['area']) == pytest.approx(np.mean(cells))
    assert figures['absent_weight'] == pytest.approx(np.mean(cells, axis=0)[21])
    assert figures['absent_peak'] == pytest.approx(np.mean(middles, axis=0)[21])


def test_segmentation_by_colours(monkeypatch, val, model):
    """oracle: labels by a loop over the pixels are all right."""
    truth = []
    for i, objects in enumerate(objects_in(val)):
        classes = [0]
        for thing in objects:
            color, _ = thing['name'].split()
            classes.append(1 + list(COLORS).index(color))
        rows = np.array(read_mask(val, i)).tolist()
        truth.append(torch.tensor([[classes[number] for number in row] for row in rows]))
    left = iter(truth)
    monkeypatch.setattr(suppression, 'segment_image', lambda *args: next(left))
    figures = suppression.segmentation(*model[:2], val)
    assert figures['mIoU'] == figures['pixel_accuracy'] == 1
    assert figures['classes'] == len(torch.cat(truth).unique())


def test_command_and_strip(drawn, val, model, tmp_path):
    """oracle: presence_and_binding of the same model; the pictures' sizes; the maps of a step are there once."""
    network, tokenizer, preprocess = model
    checkpoint = tmp_path / 'last.pt'
    path = tmp_path / 'figures.json'
    saved = {'config': asdict(network.config), 'merges': tokenizer.merges, 'teacher': network.state_dict()}
    torch.save(saved, checkpoint)
    flags = ['--workers', 0, '--device', 'cpu', '--json', path, '--picture', tmp_path / 'naming.png']
    assert run(suppression, checkpoint, '--shards', drawn / 'val', *flags) is None
    figures = json.loads(path.read_text())
    image_features = embed_images(network, val, preprocess)
    expected = suppression.presence_and_binding(network, tokenizer, image_features, val)
    for role in expected:
        assert expected[role].items() <= figures[role].items()
        assert figures[role]['all_top1'] <= figures[role]['top1']
    assert Image.open(tmp_path / 'naming.png').width > 4 * 256
    assert 'lists no objects' in run(suppression, checkpoint, '--shards', drawn / 'train')
    strip = tmp_path / 'strip.png'
    assert suppression.during_training(*model, image_features, val, tmp_path, 100) == expected
    assert not strip.exists()
    for step in 200, 200:
        suppression.track_attention(tmp_path, *model, val, step)
    maps = json.loads((tmp_path / 'maps.json').read_text())
    assert list(maps) == [f"a {thing['name']}" for thing in objects_in(val)[0]]
    assert all(list(by_step) == ['100', '200'] for by_step in maps.values())
    assert Image.open(strip).width > 3 * 112
