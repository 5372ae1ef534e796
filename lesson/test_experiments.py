"""The runs of the course and their statistics; each docstring says what the result is compared with.

    pytest lesson/test_experiments.py
"""
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import train
from cosmos import COSMOS, Config, Teacher, cosmos_terms, unit
from lesson import experiments, plots
from lesson.experiments import EXPERIMENTS, Variant, WithoutHeads, WithoutResidual
from lesson.scenes import make_scenes

TINY = Config.preset('tiny', vocab_size=50)


@pytest.fixture
def views():
    """Two images and two captions of three pairs."""
    torch.manual_seed(0)
    texts = torch.randint(1, 49, (2, 3, 64))
    texts[..., -1] = 49
    return list(torch.randn(2, 3, 3, 64, 64)), texts


def test_without_heads(views):
    """Against the four terms of the embeddings themselves. Each parameter has a gradient."""
    model = WithoutHeads(TINY)
    out = model(*views)
    targets = Teacher(model)(*views)
    loss = train.losses(model, train.METHODS['cosmos'], out, targets)
    embeddings = out._replace(image_x=out.image, text_x=out.text)
    assert_close(loss.terms, cosmos_terms(embeddings, *targets, 1 / 0.07))
    loss.total.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_without_residual(views):
    """Against the heads of a COSMOS with these weights, called one by one."""
    whole = COSMOS(TINY)
    model = WithoutResidual(TINY)
    model.load_state_dict(whole.state_dict())
    out = model(*views)
    cls, patches = whole.encode_image(views[0][0])
    eot, words = whole.encode_text(views[1][0])
    assert_close(out.image_x[:1], unit(whole.text_cross(cls[None], words)))
    assert_close(out.text_x[:1], unit(whole.image_cross(eot[None], patches)))


def test_variants():
    """train.py takes every flag, and every variant is compared with one that is there."""
    for variants in EXPERIMENTS.values():
        for variant in variants.values():
            assert variant.against in variants
            train.parse_command_line(variant.flags.split())


@pytest.fixture
def course(tmp_path, monkeypatch):
    """Two experiments that share their only run, two steps; no result yet."""
    monkeypatch.chdir(tmp_path)
    variants = {'a': Variant('--steps 2 --batch 4 --eval-every 1', seeds=1)}
    for module in (experiments, plots):
        monkeypatch.setattr(module, 'EXPERIMENTS', {'one': variants, 'two': variants})
    monkeypatch.setattr(plots, 'README', Path('README.md'))
    monkeypatch.setattr(plots, 'PLOT', '{}.png')
    monkeypatch.setattr(experiments, 'RESULTS', Path('results.csv'))
    experiments.RESULTS.write_text('experiment,variant,seed\n')


def test_runs_are_made_once(course, monkeypatch):
    """A run that is made gives both experiments their row, and needs no process for that."""
    make_scenes('set', 12, 24, workers=1)
    monkeypatch.setattr(experiments, 'built_in_set', Path('set').absolute)
    experiments.run(plots.EXPERIMENTS['one']['a'], 0)
    monkeypatch.setattr(experiments, 'subprocess', None)
    for name in ('one', 'two'):
        [key] = experiments.missing_runs(name)
        experiments.launch(key)
        assert not experiments.missing_runs(name)
    first, second = experiments.read_results()
    assert first | {'experiment': 'two'} == second
    assert {'small.top1@1', 'pointing.small.peak'} < first.keys()


def test_difference():
    """By hand: gaps 1, 2, 3 have the mean 2 and the deviation 1, so half an interval is 4.303 / sqrt(3)."""
    found = plots.difference({0: 2, 1: 4, 2: 6, 3: 9}, {0: 1, 1: 2, 2: 3})
    assert found == pytest.approx((2, 4.303 / 3 ** 0.5))


def test_check(course, monkeypatch):
    """Complete pages pass; a changed cell, sentence or plot and a lacking run are named."""
    monkeypatch.setattr(sys, 'argv', ['plots.py', '--check'])
    text = 'It is 94.8<!-- one a small.top1 --> %.\n'
    row = {'variant': 'a', 'seed': 0, 'commit': 'c', 'machine': 'm', 'small.top1': 0.948}
    for name in ('one', 'two'):
        experiments.add_result({'experiment': name} | row)
        plots.results.cache_clear()
        text += f'<!-- table {name} -->\n{plots.table(name)}<!-- end -->\n'
    plot = SimpleNamespace(text={'Description': plots.table('one')})
    monkeypatch.setattr(plots.Image, 'open', lambda path: plot)
    plots.README.write_text(text)
    plots.main()

    def refused(text, sentence):
        plots.README.write_text(text)
        with pytest.raises(ValueError, match=sentence):
            plots.main()

    refused(text.replace('is 94.8', 'is 94.7'), r'small.top1 of a \(one\) is 94.7')
    refused(text.replace('| 94.8', '| 94.9'), r'page 2 \(one\): README.md has 94.9 where results.csv gives 94.8')
    plot.text.clear()
    refused(text, 'the plot')
    experiments.RESULTS.write_text('experiment,variant,seed\n')
    refused(text, r'page 2 \(one\) lacks 1 runs')
