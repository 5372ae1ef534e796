"""tests.released, with a stand-in for the released code: our own side again, or one that is a little off."""
import re
import sys

import pytest

import test_cosmos
from tests import released
from tests.formula import SMALL, wavy_inputs
from tests.helpers import run

WRONG = {}              # {one of released.NUMBERS: factor}


class StandIn(released.Ours):
    def __init__(self, ours):
        super().__init__(ours.student.config)           # the same weights as ours

    def forward(self, images, texts):
        numbers = zip(released.NUMBERS, super().forward(images, texts))
        return [value * WRONG.get(name, 1) for name, value in numbers]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder that looks like a checkout. The timed model is small, too."""
    monkeypatch.setattr(released, 'Released', StandIn)
    monkeypatch.setattr(sys, 'path', list(sys.path))       # main adds a folder
    monkeypatch.setitem(released.TIMED, 'small', (SMALL, 2, 3, 3))
    (tmp_path / 'src' / 'open_clip').mkdir(parents=True)
    return tmp_path


def test_equal_numbers_are_timed(clone, capsys):
    """oracle: the exit status; by hand, how many rows the table has; our losses, those of test_cosmos.py."""
    assert run(released, clone, '--precision', 'bf16') is None
    printed = capsys.readouterr().out
    assert printed.count(' yes\n') == 11 and 'ratio' in printed
    found = released.backward(released.Ours(SMALL), *wavy_inputs())
    losses = [found['L_CLIP'].item(), found['L_COSMOS'].item()]
    assert losses == pytest.approx(test_cosmos.RELEASED_LOSSES, rel=1e-5)


@pytest.mark.parametrize('name', released.NUMBERS)
def test_one_in_ten_thousand_is_too_much(clone, capsys, monkeypatch, name):
    """oracle: the exit status, and the row of what is wrong."""
    monkeypatch.setitem(WRONG, name, 1 + 1e-4)
    assert run(released, clone) == 'the numbers differ'
    assert re.search(rf'^{name} .* no$', capsys.readouterr().out, re.M)


@pytest.mark.parametrize('what', ['gradients', 'student after AdamW', 'teacher after its update'])
@pytest.mark.parametrize('factor', [1 + 1e-4, float('nan')])
def test_one_wrong_tensor_of_many_is_found(capsys, what, factor):
    """oracle: exactly its row says no."""
    found = released.step_by_step(released.Ours(SMALL), *wavy_inputs())
    wrong = found[what] | {'visual.proj': found[what]['visual.proj'] * factor}
    assert not released.compare(found | {what: wrong}, found, 1e-6)
    assert re.findall(r'(\w.*?)  .* no$', capsys.readouterr().out, re.M) == [what]
