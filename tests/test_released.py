"""A training step recorded from the released code; and tests.released, with a stand-in for the released code: our own
side again, or one that is a little off."""
import json
import re
import sys

import pytest
import torch

import train
from cosmos import COSMOS, Config, Teacher, total_loss
from eval import encode_dense
from plumbing.weights import from_openclip, to_openclip
from tests import released
from tests.formula import SMALL, wavy_inputs
from tests.helpers import ROOT, close, run, shared

# --- A recorded step -------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def golden():
    """Skipped where COSMOS_SHARED (by default ../shared) is absent."""
    return torch.load(shared('golden', 'tiny.pt'), weights_only=True)


def recorded_model(golden, name):
    """The recorded `student` or `teacher`, under our names."""
    model = COSMOS(Config(**golden['config']))
    model.load_state_dict(from_openclip(golden[name]))
    return model


def test_golden_training_step(golden):
    """oracle: what was recorded of the released code: features, losses, gradients, both models after the step."""
    expected = golden['expected']
    hyper = golden['hyper']
    images = golden['images']
    texts = golden['texts']
    student = recorded_model(golden, 'student')
    teacher = Teacher(recorded_model(golden, 'teacher'))
    out = student(images, texts)
    cls_t, eot_t = teacher(images[:2], texts[:2])
    loss, _ = total_loss(student, out, cls_t, eot_t)
    found = {
        'student_image': out.cls, 'student_text': out.eot, 'cross_image': out.h_I, 'cross_text': out.h_T,
        'teacher_image': cls_t, 'teacher_text': eot_t, 'total_loss': loss}
    for name, value in found.items():
        close(value, expected[name], 1e-6)
    loss.backward()
    gradients = from_openclip(expected['grads'])
    for name, p in student.named_parameters():
        close(p.grad, gradients[name], 2e-5)
        # The step is made with the recorded gradients. Adam divides a gradient by its own size, and the gradient of the
        # keys' bias is only rounding noise, so with our gradients the step would be another one.
        p.grad = gradients[name]
    train.make_optimizer(student, hyper['lr'], hyper['weight_decay']).step()
    student.clamp_scales()
    teacher.update(student, hyper['momentum'])
    for name, model in ('student_after_step', student), ('teacher_after_step', teacher.model):
        state = to_openclip(model.state_dict())
        for key, value in expected[name].items():
            close(state[key], value, 1e-6)


def test_golden_dense_features_and_attention(golden):
    """oracle: what was recorded of the released code, on 64 x 96 pixels: a grid of 4 rows and 6 columns."""
    expected = golden['expected']
    model = recorded_model(golden, 'teacher')
    for name in 'dense_plain', 'dense_csa':
        found = encode_dense(model, golden['dense_images'], csa=name == 'dense_csa')
        assert found.shape[1:3] == (4, 6)
        close(found.flatten(1, 2), expected[name], 2e-6)
    over_patches, over_words = model.attention(golden['images'][0], golden['texts'][0])
    close(over_patches, expected['attn_image_given_text'], 2e-6)
    close(over_words, expected['attn_text_given_image'], 2e-6)


# --- tests.released --------------------------------------------------------------------------------------------------

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
    """oracle: the exit status; by hand, how many rows the table has; our losses, the recorded ones."""
    assert run(released, clone, '--precision', 'bf16') is None
    printed = capsys.readouterr().out
    assert printed.count(' yes\n') == 11 and 'ratio' in printed
    found = released.backward(released.Ours(SMALL), *wavy_inputs())
    recorded = json.loads((ROOT / 'tests/formula.json').read_text())
    assert found['L_CLIP'].item() == pytest.approx(recorded['clip_loss'], rel=1e-5)
    assert found['L_COSMOS'].item() == pytest.approx(recorded['cosmos_loss'], rel=1e-5)


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
