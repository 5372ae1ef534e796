"""The set of scenes, what is measured on it, and the runs of the course; each docstring says what the result is
compared with.

    pytest lesson/test_lesson.py
"""
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from PIL.PngImagePlugin import PngInfo
from torch.testing import assert_close
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2.functional import pil_to_tensor

import data
import train
from cosmos import COSMOS, Config, Teacher, cosmos_terms, unit
from data import Preprocess, Shards, Tokenizer
from eval import class_vectors, embed_images
from lesson import experiments, plots, scenes, suppression
from lesson.experiments import EXPERIMENTS, Variant, WithoutHeads, WithoutResidual
from lesson.scenes import COLORS, NAMES, SHAPES, make_scenes
from lesson.suppression import listed_objects, presence, presence_and_binding, read_mask

WORDS = [*COLORS, *SHAPES]


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
    network = COSMOS(Config.preset('tiny', vocab_size=514))
    return network.eval(), Tokenizer([], 64), Preprocess(64)


@pytest.fixture
def views(model):
    """Two images and two captions of three pairs."""
    tokens = model[1](NAMES[:6])
    return torch.randn(2, 3, 3, 64, 64), tokens.view(2, 3, -1)


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


def names_in(objects):
    return [thing['name'] for thing in objects]


def word_indicators(lines, words=WORDS):
    """(n, len(words)): which of the words are in each line."""
    rows = []
    for line in lines:
        rows.append([float(word in line.split()) for word in words])
    return torch.tensor(rows)


# --- Scenes ----------------------------------------------------------------------------------------------------------

def test_any_number_of_workers_draws_the_same(drawn, tmp_path):
    """oracle: the bytes that one process drew with the same arguments."""
    assert run(scenes, tmp_path, '--train', 12, '--val', 24, '--seed', 1) is None
    for name in ('train/00000.tar', 'val/00000.tar'):
        assert (tmp_path / name).read_bytes() == (drawn / name).read_bytes()


def test_masks_boxes_and_captions_agree(val):
    """oracle: the pixels of the masks, counted again; the names in the captions."""
    for i, objects in enumerate(objects_in(val)):
        numbers = pil_to_tensor(read_mask(val, i))
        captions = val.record(i)['captions']
        for number, thing in enumerate(objects, 1):
            mask = numbers == number
            x, y, w, h = thing['bbox']
            assert masks_to_boxes(mask).tolist() == [[x, y, x + w - 1, y + h - 1]]
            assert thing['area'] == mask.sum()
            assert all(thing['name'] in caption for caption in captions)


def test_wrong_names_are_as_defined(val):
    """oracle: words counted anew. Of all colours with all shapes of a scene those are mixed that have one word of the
    object's name; absent names have none of the scene's words."""
    for objects in objects_in(val):
        scene = set(' '.join(names_in(objects)).split())
        for thing in objects:
            mixed = set()
            for name in NAMES:
                words = set(name.split())
                if words <= scene and len(words & set(thing['name'].split())) == 1:
                    mixed.add(name)
            assert set(thing['mixed']) == mixed
            absent = set(thing['absent'])
            assert len(absent & set(NAMES)) == 9
            assert not scene & set(' '.join(absent).split())


@pytest.mark.parametrize('named, counts', [(0.3, [3]), (0.25, [2, 3])])
def test_named_is_the_share_of_sentences_on_small_objects(drawn, tmp_path, named, counts):
    """oracle: sentences counted by the names in them; the pictures are those of the set without the flag."""
    assert run(scenes, tmp_path, '--train', 12, '--val', 1, '--seed', 1, '--named', named) is None
    shards = Shards(tmp_path / 'train')
    found = set()
    for i, objects in enumerate(objects_in(shards)):
        text = ' '.join(shards.pool(i)).lower()
        main, *small = [text.count(name) for name in names_in(objects)]
        assert main + sum(small) == len(shards.pool(i)) == 10
        found.add(sum(small))
        assert shards.image(i) == Shards(drawn / 'train').image(i)
    assert sorted(found) == counts


def test_sizes_of_objects(tmp_path):
    """oracle: boxes in pixels, to which the edge adds up to 3; what cannot be drawn is one sentence."""
    for size, least, most in (0.12, 0.42, 0.56), (0.44, 0.44, 0.44):
        make_scenes(tmp_path, 0, 12, small_size=size, objects=2)
        for objects in objects_in(Shards(tmp_path / 'val')):
            large, small = [max(thing['bbox'][2:]) for thing in objects]
            assert 0 <= small - 96 * size <= 3
            assert 96 * least <= large <= 96 * most + 3
    assert '4 objects do not fit' in run(scenes, tmp_path, '--objects', 4, '--small-size', 0.4)


def test_drawings_are_of_their_names():
    """oracle: the second most frequent colour, after the ground's, is that of the name, a little darker."""
    for name in NAMES:
        pixels = scenes.draw_alone(name).getcolors(scenes.SIZE ** 2)
        *_, (_, found), _ = sorted(pixels)
        pure = ImageColor.getrgb(COLORS[name.split()[0]])
        np.testing.assert_allclose(found, pure, rtol=0.05, atol=1)


# --- What is measured ------------------------------------------------------------------------------------------------

def test_presence_and_binding_by_hand(model, val):
    """oracle: ten scenes by loops, one name at a time."""
    network, tokenizer, preprocess = model
    image_features = embed_images(network, val, preprocess)
    heights = {}
    for name in NAMES:
        [vector] = class_vectors(network, tokenizer, [name])
        heights[name] = image_features @ vector
    scores = suppression.name_scores(network, tokenizer, image_features)
    groups = listed_objects(val, 10)
    figures = presence_and_binding(scores, groups)
    for role in ('dominant', 'small'):
        hits, shares = [], []
        for thing in groups[role]:
            height = heights[thing.name][thing.pair]
            hits.append(all(heights[name][thing.pair] < height for name in thing.absent))
            shares += [heights[name][thing.pair] < height for name in thing.mixed]
        assert figures[role] == pytest.approx(
            {'top1': np.mean(hits), 'bound': np.mean(shares), 'objects': len(hits)})


@pytest.mark.parametrize('most, words', [(4, WORDS), (4, COLORS), (1, WORDS)])
def test_word_indicators_by_closed_forms(monkeypatch, drawn, val, most, words):
    """oracle: closed forms. Who knows which words are in a scene and nothing else names every object and its shape, and
    binds as by the toss of a coin. Who knows no shapes: names of one colour tie. Who knows the words of the dominant
    object only names and finds that one alone, in a caption where it stands by turns."""
    names = [names_in(objects) for objects in objects_in(val)]
    features = word_indicators([' '.join(each[:most]) for each in names], words)
    drawings = word_indicators(NAMES, words)
    patches = {
        'embed_images': lambda *args, **how: features,
        'embed_texts': lambda model, tokenizer, texts: word_indicators(texts, words) * features,
        'class_vectors': lambda *args: drawings,
        'segmentation': lambda *args: None}
    for name, function in patches.items():
        monkeypatch.setattr(suppression, name, function)
    network = SimpleNamespace(
        config=SimpleNamespace(cross_heads=0), logit_scale=features, encode_image=lambda images: (drawings, None))
    args = SimpleNamespace(shards=drawn / 'val', workers=0, pictures=None)
    figures = suppression.run(args, network, None, Preprocess(64))
    for role, known in ('dominant', True), ('small', most == 4):
        found = figures[role]
        assert found['top1'] == known
        assert found['shape_top1'] == (known and words is WORDS)
        assert (found['bound'] == 0.5) == (most == 4)
    if most == 1:
        nearest = figures['nearest']
        assert nearest['name'] == nearest['drawing'] == {'first': 1, 'last': 0}
        turns = [pair % len(each) for pair, each in enumerate(names)]
        assert nearest['caption'] == {'first': turns.count(0) / 24, 'last': turns.count(1) / 24}
    assert figures['pointing'] == {}                            # of a plain CLIP, which has no maps
    suppression.track_attention(None, network, None, None, val, 1)


def test_probe_finds_what_is_there_and_nothing_else():
    """oracle: of features made of a name's words every object is found; of noise alone, nearly as wide as there are
    pairs to fit, as many as by guessing: no pair is asked that was fitted."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    group = []
    for pair in range(300):
        name, *absent = rng.choice(NAMES, 10, replace=False)
        group.append(SimpleNamespace(pair=pair, name=name, absent=absent))
    words = word_indicators([thing.name for thing in group])
    noise = torch.randn(300, 100)
    for features, least, most in (words, 1, 1), (noise, 0.05, 0.15):
        scores = suppression.probe_scores(features, group)
        hits = [presence(scores, thing, thing.absent) for thing in group]
        assert least <= np.mean(hits) <= most


def test_masked_keys_by_hand(model):
    """oracle: the head, called on the patches that are left. The object covers the middles of 10, 11 and 12, and of
    those below the half above their middles."""
    network = model[0]
    images = torch.randn(1, 3, 64, 64)
    tokens = model[1](['a'])
    pixels = torch.zeros(64, 64, dtype=torch.bool)
    pixels[8:20, 16:37] = True
    keys = [*range(10), *range(13, 64)]
    with torch.no_grad():
        figures = suppression.point(network, images, tokens, pixels)
        whole = network([images], [tokens]).h_T[0]
        eot, _ = network.encode_text(tokens)
        _, patches = network.encode_image(images)
        masked = unit(network.image_cross(eot[None], patches[:, keys])[0] + eot)
    assert_close(figures['used'], 1 - (whole * masked).sum(), rtol=1e-3, atol=0)


def test_pointing_over_a_set(monkeypatch, val, model):
    """oracle: numpy, for a head that always looks at patch 27, but at 28 for an absent name."""
    middles = []
    for thing in listed_objects(val)['small']:
        numbers = np.array(read_mask(val, thing.pair).resize((64, 64), Image.NEAREST))
        middles.append(numbers[28, [28, 36]] == thing.number)
    network, tokenizer, preprocess = model
    asked = []

    def attention(images, tokens):
        asked.append(tokens)
        return torch.eye(64)[[28 - len(asked) % 2]], None

    monkeypatch.setattr(network, 'attention', attention)
    figures = suppression.pointing(network, tokenizer, preprocess, val)['small']
    assert [figures['peak'], figures['absent_peak']] == pytest.approx(np.mean(middles, axis=0))
    assert torch.cat(asked[-2:]).equal(tokenizer([f'a {thing.name}', f'a {thing.absent[0]}']))


def test_segmentation_by_colours(monkeypatch, val, model):
    """oracle: labels that are painted object by object are all right."""
    truth = []
    for i, objects in enumerate(objects_in(val)):
        numbers = pil_to_tensor(read_mask(val, i))[0]
        labels = torch.zeros(numbers.shape, dtype=torch.long)
        for number, name in enumerate(names_in(objects), 1):
            labels[numbers == number] = 1 + list(COLORS).index(name.split()[0])
        truth.append(labels)
    monkeypatch.setattr(suppression, 'segment_image', lambda *args: truth.pop(0))
    figures = suppression.segmentation(*model[:2], val)
    assert figures['mIoU'] == 1


# --- The course ------------------------------------------------------------------------------------------------------

def test_without_heads(model, views):
    """oracle: the four terms of the embeddings themselves."""
    network = WithoutHeads(model[0].config)
    out = network(*views)
    targets = Teacher(network)(*views)
    terms = train.distill_terms(train.METHODS['cosmos'], network, out, *targets)
    embeddings = out._replace(h_I=out.cls, h_T=out.eot)
    assert_close(terms, cosmos_terms(embeddings, *targets, 1 / 0.07))


def test_without_residual(model, views):
    """oracle: the heads of a COSMOS with these weights, called one by one."""
    whole = model[0]
    network = WithoutResidual(whole.config)
    network.load_state_dict(whole.state_dict())
    out = network(*views)
    cls, patches = whole.encode_image(views[0][0])
    eot, words = whole.encode_text(views[1][0])
    assert_close(out.h_I[:1], unit(whole.text_cross(cls[None], words)))
    assert_close(out.h_T[:1], unit(whole.image_cross(eot[None], patches)))


def test_variants(monkeypatch):
    """oracle: train.py and lesson.scenes take every flag, and every variant is compared with one that is there."""
    monkeypatch.setattr(scenes, 'make_scenes', dict)
    for variants in EXPERIMENTS.values():
        for variant in variants.values():
            assert variant.against in variants
            train.parse_command_line(variant.flags.split())
            if variant.scenes != 'emoji':
                assert run(scenes, 'folder', *variant.scenes.split()) is None


@pytest.fixture
def course(tmp_path, monkeypatch):
    """Two experiments that share their only run, two steps; no result yet."""
    monkeypatch.chdir(tmp_path)
    Path('lesson').mkdir()
    Path('assets').mkdir()
    variants = {'a': Variant('--steps 2 --batch 4 --eval-every 1', seeds=1)}
    for module in (experiments, plots):
        monkeypatch.setattr(module, 'EXPERIMENTS', {'one': variants, 'two': variants})
    experiments.RESULTS.write_text('experiment,variant,seed\n')
    plots.results.cache_clear()


def test_a_run_has_one_row(course, drawn, monkeypatch):
    """oracle: the commands on its checkpoint. A run that is made gives both experiments their row, without a process. A
    variant may ask for the student's weights. A set with probes is asked about these."""
    monkeypatch.setattr(experiments, 'scene_folder', lambda options: drawn)
    assert run(experiments, 'one', '--run', 'a', 0) is None
    monkeypatch.setattr(experiments.sys, 'executable', None)
    for name in 'one', 'two', 'one':
        assert run(experiments, name) is None
    first, second = experiments.read_results()
    assert first | {'experiment': 'two'} == second
    assert first['small.top1'] == first['small.top1@2']
    assert first['steps'] == '2'
    variant = plots.EXPERIMENTS['one']['a']
    out = experiments.run_folder(variant, 0)
    command = partial(run, suppression, out / 'last.pt', '--device', 'cpu', '--shards')
    assert command(drawn / 'val', '--json', 'figures.json') is None
    figures = experiments.evaluation.read_json('figures.json')
    for name, value in experiments.flat(figures).items():
        assert first[name] == str(value)
    student = experiments.run(variant._replace(weights='student'), 0)
    asked = ['retrieval', out / 'last.pt', '--shards', drawn / 'val', '--weights', 'student', '--json', 'ranks.json']
    assert run(experiments.evaluation, *asked) is None
    figures = experiments.evaluation.read_json('ranks.json')
    for name, value in experiments.flat(figures, 'retrieval.').items():
        assert student[name] == value
    name = 'retrieval.text_to_image_mean_rank'
    assert str(student[name]) != first[name]
    # four scenes a row with lines between, two evaluations
    for name, width in ('naming-mixed.png', 4 * 258 + 2), ('strip.png', 2 * 232):
        assert Image.open(out / name).width == width
    assert 'lists no objects' in command(drawn / 'train')
    monkeypatch.setattr(experiments.pairs, 'suppression', lambda *args: {'small': {'name_top1': 0.5, 'each': []}})
    (drawn / 'probes.json').touch()
    assert experiments.run(variant, 0)['small.name_top1'] == 0.5


def test_table_by_hand(course, monkeypatch):
    """oracle: by hand. The gaps of paired seeds, 1, 2, 3 and 2, 3, 4, have the deviation 1, so half an interval is
    4.303 / sqrt(3) = 2.5."""
    monkeypatch.setitem(plots.EXPERIMENTS['one'], 'b', Variant(against='a'))
    experiments.RESULTS.write_text(
        'experiment,variant,seed,small.top1,small.bound\n'
        'one,a,0,.1,.1\none,a,1,.2,.2\none,a,2,.3,.3\n'
        'one,b,0,.11,.12\none,b,1,.22,.23\none,b,2,.33,.34\none,b,3,.9,\n')
    table = plots.table('one')
    assert '| 39.0, +2.0 ± 2.5 |' in table
    assert '| 23.0, **+3.0 ± 2.5** |' in table


def draw(experiment):
    """A plot without matplotlib."""
    note = PngInfo()
    note.add_text('Description', plots.table(experiment))
    Image.new('L', (1, 1)).save(plots.PLOT.format(experiment), pnginfo=note)


def test_check(course, monkeypatch):
    """oracle: whole pages pass; a changed text, table or plot, a second machine and a missing run are named."""
    monkeypatch.setattr(plots, 'draw', draw)
    plots.README.write_text('It is 94.8<!--one/a/small.top1--> %.')
    results = experiments.RESULTS
    results.write_text(
        'experiment,variant,seed,commit,machine,small.top1\none,a,0,c,m,0.948\ntwo,a,0,c,m,0.948\n')
    assert run(plots) is None
    assert run(plots, '--check') is None
    changes = [
        (plots.README, '94.8', '94.7', 'small.top1 of a (one) is 94.7'),
        (plots.TABLES, '94.8', '94.9', 'tables.md differs'),
        (results, '0.948', '0.951', 'the plot of one shows other figures'),
        (results, 'one,a,0', 'one,a,1', 'one lacks'),
        (results, 'one,a', 'one,a,0,c,other\none,a', 'several commits or machines')]
    for path, old, new, sentence in changes:
        text = path.read_text()
        path.write_text(text.replace(old, new))
        plots.results.cache_clear()
        assert sentence in run(plots, '--check')
        path.write_text(text)
