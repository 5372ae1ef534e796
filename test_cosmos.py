"""Every claim with its oracle: each docstring says what the result is compared with. Runs on a CPU in minutes.

    pytest test_cosmos.py

Numbers recorded from the released code and CLIP's vocabulary lie in COSMOS_SHARED, or ../shared; without that folder
the tests that need them are skipped, and say so.
"""
import contextlib
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import timeit
import unicodedata
import zlib
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

import cosmos
import data
import eval as evaluation
import train
from cosmos import COSMOS, Config, Output, Teacher, clip_loss, cosmos_loss, from_openclip, to_openclip
from data import Tokenizer

HERE = Path(__file__).parent
SHARED = Path(os.environ.get('COSMOS_SHARED') or HERE.parent / 'shared')
CPU, FORMATS = torch.device('cpu'), (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
cosmos.PRESETS['micro'] = dict(embed_dim=16, image_size=32, local_image_size=16, patch_size=8, vision_width=24,
                               vision_layers=2, vision_heads=2, text_width=16, text_layers=2, text_heads=2,
                               context_length=12, cross_heads=2)
train.RECIPES['micro'] = train.RECIPES['tiny']
MICRO = Config.preset('micro', vocab_size=50)
QUICK = '--preset micro --batch 4 --log-every 1 --workers 0'.split()    # train.py in seconds
SIX = '--steps 6 --save-every 2 --eval-every 5 --augment full'.split()

# --- Helpers: comparing, micro models, files, runs --------------------------------------------------------------------

def shared(*parts):
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f'{path} is absent; set COSMOS_SHARED to the folder with the recorded numbers')
    return path


def close(a, b, tolerance=1e-5):
    """Relative distance of the whole tensors."""
    distance = ((a - b).norm() / b.norm().clamp_min(1e-12)).item()
    assert distance <= tolerance, f'relative distance {distance:.2e}, allowed {tolerance}'


def refused(told, call, *args, **kwargs):
    """The call raises ValueError with a sentence that matches `told`."""
    with pytest.raises(ValueError, match=told):
        call(*args, **kwargs)


def micro(method='cosmos', seed=0, B=3, local=2):
    """A micro model with one batch: (model, V images, U captions). Captions: start, words, end, padding."""
    torch.manual_seed(seed)
    model, texts = COSMOS(replace(MICRO, cross_heads=2 if method == 'cosmos' else 0)), []
    images = [torch.randn(B, 3, s, s) for s in [32, 32] + [16] * local]
    for length in [9, 12] + [5] * (local + 1):
        tokens = torch.randint(1, 48, (B, 12))
        tokens[:, 0], tokens[:, length - 1] = 48, 49                    # start and end: the two highest ids
        texts.append(tokens * (torch.arange(12) < length))
    return model, images, texts


def spelling_model(merges=(), length=48):
    """(model, tokenizer) that reads text byte by byte; 48 ids hold every template with every name."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(merges, length)
    return COSMOS(replace(MICRO, vocab_size=tokenizer.vocab_size, context_length=length)), tokenizer


def total_loss(model, teacher, images, texts):
    """What train.py minimises."""
    plan = SimpleNamespace(method=train.METHODS['cosmos' if model.config.cross_heads else 'clip'], device=CPU)
    return train.losses(plan, model(images, texts), teacher(images[:2], texts[:2]), train.scales_of(model))[0]


def naive_losses(out, teacher_image, teacher_text, scale, distill_scale, clip=True):
    """L_CLIP and the terms of L_COSMOS as a reader of the paper would loop them: an N x N product a pair of views."""
    def pair(a, b, scale):
        logits, own = scale * a @ b.T, torch.arange(len(a))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    mean = lambda first, second, scale: torch.stack([pair(a, b, scale) for a in first for b in second]).mean()
    targets = teacher_image, teacher_text
    terms = [mean(h, target, distill_scale) for h in (out.image_x, out.text_x) for target in targets]
    return mean(out.image[:2], out.text, scale) if clip else None, torch.stack(terms)


def as_bytes(value):
    """Bytes as they are, text as UTF-8, all else as JSON."""
    value = value if isinstance(value, (bytes, str)) else json.dumps(value)
    return value.encode() if isinstance(value, str) else value


def put(path, value=''):
    """A file, and the folders it lies in -> path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(as_bytes(value))
    return path


def encoded(image, kind='PNG', **options):
    """A Pillow image as the bytes of a file."""
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def picture(kind='JPEG', colour=(200, 30, 60)):
    return encoded(Image.new('RGB', (40, 30), colour), kind)


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    """A tar of (name, value) -> path. Times are fractions, as webdataset's writer has them: a header more in PAX."""
    with tarfile.open(path, 'w', format=format) as tar:
        for i, (name, value) in enumerate(members):
            info, value = tarfile.TarInfo(name), as_bytes(value)
            info.size, info.mtime = len(value), 1 + i / 7
            tar.addfile(info, io.BytesIO(value))
    return path


def dogs(n, no_image=(), no_text=()):
    """The members of n pairs, i.jpg and the i.json of 'dog i', some of them broken."""
    return [member for i in range(n) for member in (
        (f'{i}.jpg', b'no image' if i in no_image else picture()),
        (f'{i}.json', '{broken' if i in no_text else {'caption': f'dog {i}'}))]


def readable(shards, *errors):
    """{first sentence: pixels} of the pairs that can be read."""
    found = {}
    for i in range(len(shards)):
        with contextlib.suppress(*errors):
            found[shards.pool(i)[0]] = data.decode(shards.image(i))
    return found


@pytest.fixture(scope='session')
def scenes(tmp_path_factory):
    """A small built-in set, drawn by this process: 40 training and 12 held-out scenes."""
    root = tmp_path_factory.mktemp('scenes')
    data.make_scenes(root, train=40, val=12, seed=1, workers=1)
    return root


def run(module, *argv):
    """A command in this process -> what its SystemExit carries, or None."""
    handlers, threads = {number: signal.getsignal(number) for number in train.SIGNALS}, torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['prog', *map(str, argv)])
        try:
            data.cli(module.main)
        except SystemExit as stop:
            return stop.code
        finally:
            torch.set_num_threads(threads)                              # data.py bench takes one
            for number, handler in handlers.items():
                signal.signal(number, handler)


@pytest.fixture(scope='session')
def fit(scenes):
    """fit(out, *flags): train.py for seconds on the built-in set -> its exit status, or its error."""
    return lambda out, *flags: run(train, '--data', scenes, *QUICK, '--out', out, *flags)


@pytest.fixture(scope='session')
def whole(fit, tmp_path_factory):
    """--out of a run of six steps that nothing disturbed; what it printed is in its file `told`."""
    out = tmp_path_factory.mktemp('whole')
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert fit(out, *SIX) == 0
    put(out / 'told', told.getvalue())
    return out


def saved(out):
    return torch.load(out / 'last.pt', weights_only=True)


def read_log(out):
    return [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]


def same_run(a, b):
    """Two --out folders hold bit-equal networks and optimizers, and logs of every step that differ in times only."""
    one, two = saved(a), saved(b)
    parts = lambda state: [state[name] for name in ('student', 'teacher') if name in state] + [
        *state['optimizer']['state'].values()]
    for x, y in zip(parts(one), parts(two), strict=True):
        assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)
    timed = 'samples_per_s', 'data_share', 'memory_GiB', 'minutes_left'
    logs = [[{k: v for k, v in entry.items() if k not in timed} for entry in read_log(path)] for path in (a, b)]
    assert logs[0] == logs[1] and [entry['step'] for entry in logs[0]] == list(range(1, one['step'] + 1))


# --- cosmos.py against the released code -----------------------------------------------------------------------------

def test_golden(tmp_path):
    """oracle: the released code, as recorded: features, losses, gradients, a step, dense features, attention."""
    recorded = torch.load(shared('golden', 'tiny.pt'), weights_only=True)
    expected, hyper, images, texts = (recorded[key] for key in ('expected', 'hyper', 'images', 'texts'))
    torch.save({name: recorded[name] for name in ('student', 'teacher')}, tmp_path / 'released.pt')
    config, vocab = Config(**recorded['config']), shared('vocab', 'bpe_simple_vocab_16e6.txt.gz')
    load = lambda name: evaluation.load(tmp_path / 'released.pt', name, config, vocab)[0]
    student, other = load('student'), load('teacher')
    found = {name: other.encode_dense(recorded['dense_images'], csa=name == 'dense_csa')
             for name in ('dense_plain', 'dense_csa')}
    assert found['dense_csa'].shape == found['dense_plain'].shape == (2, 4, 6, 32)      # 64 x 96 pixels: rows first
    found['attn_image_given_text'], found['attn_text_given_image'] = other.attention(images[0], texts[0])
    out, teacher = student(images, texts), Teacher(other)
    target = teacher(images[:2], texts[:2])
    found |= {'student_image': out.image, 'student_text': out.text, 'cross_image': out.image_x,
              'cross_text': out.text_x, 'teacher_image': target[0], 'teacher_text': target[1]}
    for name, value in found.items():
        close(value.flatten(), expected[name].flatten(), 2e-6)
    clip = clip_loss(out, student.logit_scale.exp())
    distill = cosmos_loss(out, *target, student.distill_logit_scale.exp())
    for name, value in [('clip_loss', clip), ('cosmos_loss', distill), ('total_loss', clip + distill)]:
        close(value, expected[name], 1e-6)
    (clip + distill).backward()
    grads = to_openclip({name: p.grad for name, p in student.named_parameters()})
    assert grads.keys() == expected['grads'].keys()
    for name, grad in expected['grads'].items():
        close(grads[name], grad, 2e-5)
    options = SimpleNamespace(lr=hyper['lr'], wd=hyper['weight_decay'], momentum=hyper['momentum'], warmup=0, lr_end=1,
                              steps=1, momentum_ramp=0, clip_grad=0)
    train.update(SimpleNamespace(
        model=student, teacher=teacher, options=options, step=0, scaler=torch.amp.GradScaler(enabled=False),
        optimizer=train.make_optimizer(student, options, CPU)), None)
    for name, model in (('student_after_step', student), ('teacher_after_step', teacher.model)):
        state = to_openclip(model.state_dict())
        for key, value in expected[name].items():
            ours = state[key].clone()
            if key.endswith('in_proj_bias'):        # softmax ignores a shift of all keys: their gradient is rounding
                third = len(value) // 3             # noise, and Adam's first step divides noise by its own size
                ours[third:2 * third] = value[third:2 * third]
            close(ours, value, 1e-4)


def test_names_and_sizes_are_the_released():
    """oracle: the identity on all names, whatever the values; names and counts written out."""
    values = {name: i for i, name in enumerate(micro()[0].state_dict())}
    theirs = to_openclip(values)
    assert from_openclip(theirs) == values and len(theirs) == len(values)
    assert {'visual.conv1.weight', 'transformer.resblocks.0.attn.in_proj_weight', 'text_projection', 'logit_scale',
            'visual.attn_cross_pool.ln_k.bias', 'text_attn_cross_pool.attn.out_proj.weight', 'image_token_mapping.bias',
            'distill_logit_scale'} <= theirs.keys()
    assert not any(key.startswith('text.') for key in theirs)
    refused('no_such_name', to_openclip, {'no_such_name': 0})
    with torch.device('meta'):
        count, plain = (sum(p.numel() for p in COSMOS(Config.preset('vit-b-16', cross_heads=heads)).parameters())
                        for heads in (8, 0))
    assert plain == 149_620_737                                         # open_clip's; then two heads, two maps, a scale
    assert count == 152_382_466 == plain + 2 * 1_052_672 + 393_728 + 262_656 + 1


# --- cosmos.py against plain forms -----------------------------------------------------------------------------------

def test_losses_by_pencil_loops_and_limits():
    """oracle: hand arithmetic to four decimals, the example of cosmos.nce and of README; loops over views in float64;
    closed forms: equal features give ln N in every term, orthogonal pairs at a large scale 0."""
    rows, columns = torch.tensor([[[1.0, 0], [0, 1]]]), torch.tensor([[[1.0, 0], [0.6, 0.8]]])
    assert round(cosmos.nce(cosmos.compare(rows, columns, 1.0)).item(), 4) == 0.4421
    assert round(cosmos.nce(cosmos.compare(columns, rows, 1.0)).item(), 4) == 0.4557
    assert round(clip_loss(Output(rows, columns, None, None), 1.0).item(), 4) == 0.4489
    for text in (cosmos.nce.__doc__, (HERE / 'README.md').read_text(encoding='utf-8')):
        assert all(n in text for n in ('0.5130', '0.3711', '0.4421', '0.3133', '0.5981', '0.4557', '0.4489'))
    torch.manual_seed(0)
    draw = lambda n: F.normalize(torch.randn(n, 4, 8, dtype=torch.float64), dim=-1)
    out, targets = Output(draw(5), draw(3), draw(5), draw(3)), (draw(2), draw(2))
    clip, terms = naive_losses(out, *targets, 9.0, 7.0)
    for found, want in ((clip_loss(out, 9.0), clip), (cosmos.cosmos_terms(out, *targets, 7.0), terms),
                        (cosmos_loss(out, *targets, 7.0), terms.mean())):
        assert found.shape == want.shape and (found - want).abs().max() < 1e-12
    alone = naive_losses(Output(None, None, out.image, out.text), *targets, 1.0, 7.0, clip=False)[1][[0, 3]]
    for text, want in ((targets[1], alone), (None, alone[:1])):         # the rows of Table 5 below cross-attention
        found = cosmos.distill_terms(out, targets[0], text, 7.0)
        assert found.shape == want.shape and (found - want).abs().max() < 1e-12
    same, apart = F.normalize(torch.ones(2, 6, 4), dim=-1), torch.eye(6).expand(2, 6, 6)
    terms = cosmos.cosmos_terms(Output(same, same, same, same), same, same, 14.0)
    assert torch.allclose(terms, torch.tensor(math.log(6)).expand(4))
    assert cosmos_loss(Output(apart, apart, apart, apart), apart, apart, 100.0).item() < 1e-6


def test_which_views_enter_which_loss():
    """oracle: invariance. A local image moves L_COSMOS but not L_CLIP, a local caption both; keys come from view 0."""
    model, images, texts = micro()
    teacher = Teacher(model)
    targets = teacher(images[:2], texts[:2])
    assert not any(x.requires_grad for x in (*targets, *teacher.parameters()))
    def losses(images, texts):
        out = model(images, texts)
        return clip_loss(out, 14.0), cosmos_loss(out, *targets, 14.0)
    clip, distill = losses(images, texts)
    clip_i, distill_i = losses([*images[:-1], -images[-1]], texts)
    clip_t, distill_t = losses(images, [*texts[:-1], texts[-1].flip(0)])
    assert torch.equal(clip, clip_i) and not torch.isclose(distill, distill_i)
    assert not torch.isclose(clip, clip_t) and not torch.isclose(distill, distill_t)
    base, moved = model(images, texts), model([images[0], -images[1], *images[2:]], texts)
    assert torch.equal(moved.text_x, base.text_x) and not torch.allclose(moved.image_x[1], base.image_x[1])
    moved = model(images, [texts[0], texts[1].flip(0), *texts[2:]])
    assert torch.equal(moved.image_x, base.image_x) and not torch.allclose(moved.text_x[1], base.text_x[1])


def test_attention_equals_torch():
    """oracle: nn.MultiheadAttention of the same parameters, values and weights; torch's fused kernel with a mask."""
    torch.manual_seed(0)
    ours, theirs = cosmos.Attention(32, 4), torch.nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, context = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    rows, keys, groups = query.flatten(0, 1), context.flatten(0, 1), [cosmos.Group(2, 5, 5, None)]
    close(ours(rows, rows, groups), theirs(query, query, query)[0].flatten(0, 1))
    groups = [cosmos.Group(1, 5, 7, None)] * 2                          # the two sequences as groups of their own
    close(ours(rows, keys, groups), theirs(query, context, context)[0].flatten(0, 1))
    (q, k, v), mask = torch.randn(3, 2, 4, 5, 8), torch.ones(5, 5).tril() > 0
    close(cosmos.attend(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    head, query = micro()[0].image_cross, torch.randn(3, 16)            # the cross-attention head: one query a pair
    tokens, theirs = torch.randn(3, 7, 16), torch.nn.MultiheadAttention(16, 2, batch_first=True)
    theirs.load_state_dict(head.attn.state_dict())
    pooled, weights = theirs(head.ln_q(query)[:, None], head.ln_k(tokens), head.ln_k(tokens))
    close(head.weights(query, tokens), weights[:, 0])
    close(head(query[None], tokens)[0], pooled[:, 0])


def test_shortcuts_change_nothing():
    """oracle: the long way: a block on all rows, every view through its tower alone, every caption at full length."""
    torch.manual_seed(0)
    stack, long, short = cosmos.Transformer(16, 2, 2), torch.randn(4, 6, 16), torch.randn(3, 5, 16)
    row, both = torch.tensor([0, 3, 5, 2, 4, 1, 0]), torch.cat([long.flatten(0, 1), short.flatten(0, 1)])
    for causal in (False, True):
        alone = []
        for x in (*long, *short):
            mask = torch.ones(len(x), len(x)).tril() > 0 if causal else None
            for block in stack.resblocks:
                x = block(x, [cosmos.Group(1, len(x), len(x), mask)])
            alone.append(x)
        for keep in (0, 2, 4):
            rows, tokens = stack(both, [(4, 6), (3, 5)], row, keep, causal)
            close(rows, torch.stack([x[i] for x, i in zip(alone, row)]), 1e-6)
            if keep:
                close(tokens, torch.stack(alone[:keep]), 1e-6)
            assert (tokens is None) == (keep == 0)
    model, images, texts = micro(local=3)
    image, patches = model.visual(images, keep=True)
    for i, view in enumerate(images):
        close(image[i], model.visual([view])[0][0], 1e-5)
    close(patches, model.visual([images[0]], keep=True)[1], 1e-5)
    cut = [texts[0]] + [caption[:, :int(caption.argmax(dim=1).max()) + 1] for caption in texts[1:]]
    assert cut[2].shape[1] == 5 < texts[2].shape[1]
    full, short = model(images, torch.stack(texts)), model(images, cut)
    for a, b in zip(full, short):
        close(b, a, 1e-5)
    for U, whole in ((5, 1), (5, 0), (2, 0), (1, 0)):                   # the same, sorted by length
        ends = torch.randint(2, 12, (U, 3))
        ids = torch.randint(1, 48, (U, 3, 12)).scatter(2, ends[..., None], 49)
        plan = data.Batch([], [], ids, ends, 0).cut(1, whole)
        assert sum(n * L for n, L in plan) < ids.numel()
        plain, ours, grads = model.text(list(ids), whole > 0), model.text(list(ids), whole > 0, plan), []
        for found in (plain, ours):
            loss = sum((x * torch.linspace(0, 1, x.numel()).view_as(x)).sum() for x in found[:1 + whole])
            grads.append(torch.autograd.grad(loss, list(model.text.parameters())))
        for a, b in zip((*plain[:1 + whole], *grads[0]), (*ours[:1 + whole], *grads[1])):
            close(b, a, 1e-5)
    teacher, grads = Teacher(COSMOS(model.config)), []                  # and the gradients, of the losses in loops too
    scales = model.logit_scale.exp(), model.distill_logit_scale.exp()
    clip, terms = naive_losses(full, *teacher(images[:2], texts[:2]), *scales)
    for loss in (clip + terms.mean(), total_loss(model, teacher, images, cut)):
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*grads):
        close(b, a, 2e-5)
    noisy = torch.where(torch.arange(12) > 4, 7, texts[2])              # behind its end
    close(model.encode_text(noisy)[0], model.encode_text(texts[2])[0], 1e-6)


def test_compiled_blocks_are_few_and_equal():
    """oracle: the model as it is; a backend that counts graphs: none comes once the sizes have varied."""
    counter, graphs, (model, images, _) = CompileCounter(), [], micro(B=4)
    torch._dynamo.reset()
    compiled = Teacher(model).model.requires_grad_(True)
    train.compile_blocks(compiled, counter)
    assert compiled.state_dict().keys() == model.state_dict().keys()
    for B in (4, 3, 2, 3, 4, 2, 3, 4, 2):
        ends, some = torch.randint(2, 12, (5, B)), [view[:B] for view in images]
        ids = torch.randint(1, 48, (5, B, 12)).scatter(2, ends[..., None], 49)
        for a, b in zip(compiled(some, ids, data.Batch([], [], ids, ends, 0).cut(1, 1)), model(some, ids)):
            close(a, b, 1e-6)
        graphs.append(counter.frame_count)
    assert graphs[3] == graphs[-1] <= 8, graphs


def test_positions_are_bicubic_with_a_tenth_added():
    """oracle: torch's grid_sample, bicubic with borders repeated, asked at (i + 0.5) / (n + 0.1) of the side."""
    tower = micro()[0].visual
    assert tower.positions(4, 4) is tower.positional_embedding
    table = tower.positional_embedding[1:].T.view(1, 24, 4, 4)
    at = lambda n: 2 * (torch.arange(n) + 0.5) / (n + 0.1) - 1          # the sides are at -1 and 1
    for h, w in ((2, 2), (3, 5), (7, 4)):
        places = torch.stack(torch.meshgrid(at(w), at(h), indexing='xy'), dim=-1)[None]             # (1, h, w, 2)
        want = F.grid_sample(table, places, 'bicubic', 'border', align_corners=False)
        close(tower.positions(h, w)[1:], want[0].flatten(1).T, 1e-5)


def test_teacher_is_a_moving_average():
    """oracle: closed form: after k updates towards a constant student, s + lambda^k (t0 - s); nothing is shared."""
    teacher = Teacher(model := micro()[0])
    start = [p.clone() for p in teacher.model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    assert all(map(torch.equal, start, teacher.model.parameters()))
    for _ in range(7):
        teacher.update(model, 0.9)
    for t0, t, s in zip(start, teacher.model.parameters(), model.parameters()):
        assert torch.allclose(t, s + 0.9 ** 7 * (t0 - s), atol=1e-5)


@pytest.mark.parametrize('method, local', [('cosmos', 2), ('cosmos', 0), ('clip', 2), ('clip', 0)])
def test_every_parameter_gets_a_gradient(method, local):
    """oracle: none may be missing, or DDP waits for ever, nor all zero, or it never learns; bf16 features float32."""
    model, images, texts = micro(method, local=local)
    total_loss(model, Teacher(model), images, texts).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    with torch.autocast('cpu', torch.bfloat16):
        assert all(x is None or x.dtype == torch.float32 for x in model(images, texts))


CASES = {       # processes -> (--accum, dtype)
    1: [(1, None), (1, torch.bfloat16), (2, None), (4, None), (4, torch.bfloat16)], 2: [(1, None), (2, None)],
    4: [(1, None)]}
OBJECTIVES = 'cosmos', 'text-distill', 'image-distill', 'clip'


def rank_gradients(rank, world, path):
    """One of `world` processes, with its share of one batch of 8. Saves for each objective and case the gradients that
    train.py leaves, the mean loss, and how many numbers the collectives and cross-entropies were given."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{path}.store', rank=rank, world_size=world)
    found, given = {method: [] for method in OBJECTIVES}, {}
    def counted(name, call):
        def count(*args, **kwargs):
            given[name].append(max(x.numel() for x in args if torch.is_tensor(x)))
            return call(*args, **kwargs)
        return count
    for module, name in ((dist, 'all_gather'), (dist, 'all_reduce'), (F, 'cross_entropy')):
        setattr(module, name, counted(name, getattr(module, name)))
    for method, (accum, dtype) in product(OBJECTIVES, CASES[world]):
        model, _, texts = micro(method, B=8)
        for caption in texts:                                           # other ends for every pair: the order matters
            caption.scatter_(1, torch.randint(2, 12, (8, 1)), 49)
        large, small = (torch.randint(0, 256, (8, 2, 3, s, s), dtype=torch.uint8) for s in (32, 16))
        texts = texts if train.METHODS[method].sentences else texts[1:2]
        samples = list(zip(large, small, torch.empty(8, 4, 0), torch.stack(texts, dim=1), [0] * 8))
        batch = data.collate(samples[rank * 8 // world:(rank + 1) * 8 // world])
        model.set_grad_checkpointing(accum == 4)
        run = SimpleNamespace(
            model=model, student=torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model,
            teacher=Teacher(COSMOS(model.config)), method=train.METHODS[method], device=CPU, dtype=dtype, world=world,
            options=SimpleNamespace(accum=accum), optimizer=torch.optim.SGD(model.parameters()),
            scaler=torch.amp.GradScaler(enabled=False))
        given.update(all_gather=[], all_reduce=[], cross_entropy=[])
        loss = train.forward_backward(run, batch)['loss']
        sizes = {name: list(some) for name, some in given.items()}
        dist.all_reduce(loss)
        found[method].append(({name: p.grad for name, p in model.named_parameters()}, loss / world, sizes))
    found['index'] = data.Shards(path.parent / 'tars', path.parent / f'index{world}', together=True).pairs.tolist()
    torch.save(found, f'{path}.{rank}')
    train.leave(0)


def traffic(V, U, B, N, D):
    """What a rank sends in the gathers, reduces in the backward pass (in numbers), and its logits: README's table."""
    vectors = (2 + U) + (V + U + 4) if N > B else 0                     # of L_CLIP, of L_COSMOS with the teacher's four
    pairs = 2 * U + 2 * (2 * V + 2 * U)
    return [vectors * B * D, vectors * N * D, 2 * pairs * B * N]


@pytest.fixture(scope='session')
def by_ranks(tmp_path_factory):
    """{processes: what rank 0 saved of `rank_gradients`}."""
    path = tmp_path_factory.mktemp('ranks')
    (path / 'tars').mkdir()
    for n in range(3):
        write_tar(path / f'tars/{n}.tar', dogs(n + 1))
    for world in CASES:
        torch.multiprocessing.spawn(rank_gradients, (world, path / str(world)), nprocs=world)
    return {world: torch.load(path / f'{world}.0') for world in CASES}


@pytest.mark.parametrize('method', OBJECTIVES)
def test_ranks_and_accumulation_equal_one_process(by_ranks, method):
    """oracle: one process with the whole batch: same loss, same gradient in every parameter and scale, also where
    activations are recomputed (--accum 4), and in bf16. Of README's table the counts and sizes."""
    half, want = torch.bfloat16, {}
    for world, cases in CASES.items():
        for (_, dtype), (grads, loss, sizes) in zip(cases, by_ranks[world][method], strict=True):
            want_grads, want_loss = want.setdefault(dtype, (grads, loss))               # the first of its kind
            close(loss, want_loss, 0.01 if dtype else 1e-6)
            for name in want_grads:
                close(grads[name], want_grads[name], 0.02 if dtype else 1e-5)
            if method == 'cosmos':
                assert [sum(some) for some in sizes.values()] == traffic(4, 5, 8 // world, 8, 16)
                assert [len(sizes[name]) for name in ('all_gather', 'all_reduce')] == [2 * (world > 1)] * 2
    close(want[half][1], want[None][1], 0.02)
    assert [n for n, *_ in by_ranks[1]['index']] == [0, 1, 1, 2, 2, 2]                      # the pairs, read together
    assert by_ranks[1]['index'] == by_ranks[2]['index'] == by_ranks[4]['index']


# --- data.py: tokenizer ----------------------------------------------------------------------------------------------

LOW = Tokenizer(['l o', 'lo w</w>', 'lo w', 'e r</w>', 'e s', 'es t</w>', 'low est</w>'], context_length=8)


def test_tokenizer_equals_clip():
    """oracle: ids of CLIP's own tokenizer on 35 hard texts, recorded in golden/tokenizer.json."""
    recorded = json.loads(shared('golden', 'tokenizer.json').read_text(encoding='utf-8'))
    pickled = pickle.dumps(Tokenizer.clip(shared('vocab', 'bpe_simple_vocab_16e6.txt.gz')))
    tokenizer = pickle.loads(pickled)                                   # as workers get it
    assert (tokenizer.vocab_size, tokenizer.sot, tokenizer.eot) == (49408, 49406, 49407)
    texts, ids, padded = zip(*recorded)
    for text, want in zip(texts, ids):
        assert [tokenizer.sot, *tokenizer.encode(text), tokenizer.eot] == want, text
        assert sum(n for _, n in tokenizer.words(text)) == len(want) - 2
    assert torch.equal(tokenizer(list(texts)), torch.tensor(padded))
    assert tokenizer.decode(tokenizer('A naïve café,\n 3 cats 😀')[0]) == 'a naïve café , 3 cats 😀'


def test_ids_and_words_by_hand():
    """oracle: pencil: rank 1 'lo w</w>' ends low, rank 2 'lo w' starts the others; cut rows keep their end. Of all code
    points unicodedata.category: between a and #, L joins the a, N stays alone, others join #."""
    low_end, low, er, lowest = (512 + LOW.merges.index(m) for m in ('lo w</w>', 'lo w', 'e r</w>', 'low est</w>'))
    assert LOW.encode('low lower lowest') == [low_end, low, er, lowest]
    assert LOW.words('Low  LOWER lowest') == [('low', 1), ('lower', 2), ('lowest', 1)]
    assert LOW.encode('!l')[0] == 256                   # '!' is byte symbol 0, and 256 + 0 where it closes a word
    assert LOW.decode(LOW('low lower lowest')[0]) == 'low lower lowest'
    ids = LOW(['low ' * 20, 'low', ''])
    assert ids.dtype == torch.int64 and (LOW.sot, LOW.eot) == (519, 520)
    assert ids.tolist() == [[519, *[513] * 6, 520], [519, 513, 520, *[0] * 5], [519, 520, *[0] * 6]]
    assert ids.argmax(-1).tolist() == [7, 2, 1] and LOW('low', 3).shape == (1, 3) and LOW([]).shape == (0, 8)
    for char in map(chr, range(sys.maxunicode + 1)):
        if data.CLEAN.get(ord(char), f' {char} ') == f' {char} ':       # not replaced when cleaning
            want = {'L': [f'a{char}', '#'], 'N': ['a', char, '#']}.get(
                unicodedata.category(char)[0], ['a', f'{char}#'.strip()])
            assert data.WORD.findall(f'a{char}#'.translate(data.CLEAN)) == want, hex(ord(char))
    assert Tokenizer.split('x²+Ⅷ①_é\'S “ﬁn” ＡＢ&amp;lt;\x07') == "x ² + ⅷ ① _ é 's \" fin \" ab <".split()


def test_learn_equals_naive_recounting():
    """oracle: a loop that keeps no counts between rounds; aaaa, ties and pairs that return included."""
    def naive_merges(texts, n):
        words, merges = [data.symbols_of(word) for text in texts for word in text.split()], []
        while len(merges) < n:
            count = Counter(pair for word in words for pair in zip(word, word[1:]))
            best = min(count, key=lambda pair: (-count[pair], pair), default=None)
            if best is None or count[best] < 2:
                break
            merges += [' '.join(best)] if ' '.join(best) not in merges else []
            words = [data.fuse(word, *best) for word in words]
        return merges
    assert data.fuse(list('aaabab'), 'a', 'a') == ['aa', 'a', 'b', 'a', 'b']
    assert data.fuse(list('aaabab'), 'a', 'b') == ['a', 'a', 'ab', 'ab']
    rng = random.Random(0)
    for letters, length in (('ab', 7), ('abcé', 5), ('etaoinshr', 6)):
        texts = [' '.join(''.join(rng.choices(letters, k=rng.randint(1, length))) for _ in range(6)) for _ in range(60)]
        for size in (514, 560, 5000):
            learned = Tokenizer.learn(texts, size)
            assert learned.merges == naive_merges(texts, size - 514)
            assert learned.vocab_size == 514 + len(learned.merges) <= size
        assert [learned.decode(learned.encode(text)) for text in texts] == texts


# --- data.py: captions, shards, order, crops -------------------------------------------------------------------------

def test_captions_and_text_crops():
    """oracle: pools written by hand for every format, strings and lists alike; of 300 crops the rule itself: 1 to 5
    distinct sentences a global, distinct locals, all from the pool."""
    text, listed = 'A 3.5 m boat. Two men\nA lake</s>', ['A 3.5 m boat', 'Two men.', 'A lake']
    assert data.sentences(text) == data.sentences(listed) == ['A 3.5 m boat', 'Two men', 'A lake']
    pool = data.caption_pool
    for long in (text, listed):
        assert pool({'raw_caption': 'boat', 'longSV_captions': long, 'caption': 'x'}) == ['boat', *data.sentences(text)]
    assert pool({'original_caption': 'raw', 'caption': 'One. Two.'}) == ['raw', 'One', 'Two']       # PixelProse
    assert pool({'captions': ['one dog', 'two'], 'caption': 'no'}) == ['one dog', 'two']
    assert pool({'caption': 'one dog', 'txt': 'no'}) == pool({'caption': None, 'txt': 'one dog'}) == ['one dog']
    assert pool({'alt': 'one dog'}) == [] and pool({'alt': 'one dog'}, ['alt']) == ['one dog']
    assert pool({'caption': list('one dog')}) == [] and pool({'captions': [None, 7, '']}) == []    # no letters, no junk
    pool, lengths = [f's{i}' for i in range(9)], Counter()
    for seed in range(300):
        one, two, *local = data.text_crops(pool, random.Random(seed), 2, 6)
        for crop in (one, two):
            parts = crop.split('. ')
            lengths[len(parts)] += 1
            assert len(set(parts)) == len(parts) and set(parts) <= set(pool)
        assert len(set(local)) == 6 and set(local) <= set(pool)
    assert sorted(lengths) == [1, 2, 3, 4, 5] and min(lengths.values()) > 80            # uniform: 120 each
    few = data.text_crops(['a', 'b'], random.Random(0), 1, 5)[1:]
    assert few[:4] == ['a', 'b', 'a', 'b'] and few[4] in 'ab'                       # whole repeats, then a random rest


def test_pools_and_aligned_crops(monkeypatch, scenes, fit, tmp_path):
    """oracle: the keys of each pool; by hand, which sentences name what lies in a box; of drawn samples, that sentences
    which name an object whose centre was cut off come only where no other could."""
    record = {'raw_caption': 'rr', 'shortIB_captions': ['ab'], 'longIB_captions': ['cd', 'ef'], 'longSV_captions': 'gh'}
    pool = lambda name: data.caption_pool(record, data.POOLS[name] and data.POOLS[name].split(','))
    assert [pool(name) for name in ('raw', 'short', 'long')] == [['rr'], ['ab'], ['cd', 'ef', 'gh']]
    assert pool('all') == ['rr', 'ab', 'cd', 'ef', 'gh']
    things = [{'name': 'red star', 'bbox': [0, 0, 10, 10]}, {'name': 'blue ring', 'bbox': [40, 40, 8, 8]}]
    told = ['A red star', 'a blue ring', 'the red star is above the blue ring', 'grey ground']
    for box, seen in (((0, 0, 20, 20), told[:1]), ((30, 30, 40, 40), told[1:2]), ((0, 0, 90, 90), told[:3]),
                      ((20, 20, 9, 9), told[3:])):
        assert data.seen_sentences(told, things, box) == seen
    assert data.seen_sentences(told[:3], things, (20, 20, 9, 9)) == told[:3]
    shards, cut, boxes = data.Shards(scenes / 'train'), data.image_crops, []
    monkeypatch.setattr(data, 'image_crops', lambda *args: boxes.append(cut(*args)) or boxes[-1])
    for counts in ((2, 2, 2, 3), (2, 3, 2, 1), (2, 0, 1, 0)):
        views = data.Views(shards, LOW, MICRO, 0, 4, counts, 'crops', aligned=True)
        for i in range(20):
            captions = views.views(0, i)[-1]
            assert len(captions) == sum(counts[2:])
            whole, objects = shards.pool(i), shards.record(i)['objects']
            places = boxes[-1][1][:counts[0]][:counts[2]] + boxes[-1][1][counts[0]:][:counts[3]]
            kept = captions[:counts[2]] + captions[counts[2]:][:counts[1]]
            for caption, box in zip(kept, places, strict=True):
                assert set(caption.split('. ')) <= set(data.seen_sentences(whole, objects, box))
    assert fit(tmp_path, *'--steps 2 --aligned-crops --caption-pool short'.split()) == 0


def test_rows_of_table_5_show_what_they_say():
    """oracle: the table of METHODS, read out by hand: views, captions, teacher and heads of each row."""
    flags = ['--data', 'x', '--local-crops', '4', '--local-captions', '5', '--method']
    counts = {name: train.view_counts(train.parse_options([*flags, name])) for name in train.METHODS}
    assert counts == {'clip': (1, 0, 1, 0), 'clip-aug': (2, 0, 1, 0), 'image-distill': (2, 4, 1, 0),
                      'text-crop': (2, 4, 2, 5), 'text-distill': (2, 4, 2, 5), 'cosmos': (2, 4, 2, 5)}
    assert [len(method.terms) for method in train.METHODS.values()] == [0, 0, 1, 1, 2, 4]
    assert [method.cross for method in train.METHODS.values()] == [False] * 5 + [True]
    assert train.parse_options([*flags, 'clip']).augment == 'crops' != train.parse_options([*flags, 'clip-aug']).augment


def test_built_in_set_and_its_masks(scenes):
    """oracle: the masks themselves: boxes and areas recounted, every pixel's class by a loop, what no class names is
    ignored; tarfile's bytes."""
    shards, classes = data.Shards(scenes / 'val'), [['background'], ['red', 'blue'], ['star']]
    with tarfile.open(scenes / 'val/00000.tar') as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    for i, (key, image, truth) in enumerate(evaluation.scene_masks(shards, classes)):
        record, png = json.loads(files[f'{key}.json']), files[f'{key}.mask.png']
        mask, names = np.array(Image.open(io.BytesIO(png))), [o['name'] for o in record['objects']]
        assert shards.mask(i) == png and mask.max() == len(names) and len(record['captions']) == 5
        assert [o['role'] for o in record['objects']] == ['dominant'] + ['small'] * (len(names) - 1)
        for k, o in enumerate(record['objects'], 1):
            ys, xs = np.nonzero(mask == k)
            assert o['bbox'] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1] and o['area'] == len(xs)
            assert all(o['name'] in caption for caption in record['captions'])
            assert len({*o['negatives']} - {*names}) == 9
        kind = [0] + [1 if name.split()[0] in ('red', 'blue') else 2 if 'star' in name else 255 for name in names]
        assert truth.tolist() == [[kind[k] for k in row] for row in mask] and image.size == truth.T.shape
    assert key == '000011' and data.Shards(scenes / 'train').mask(0) is None
    refused('00000.tar:000000.webp has no objects with a KEY.mask.png',
            lambda: list(evaluation.scene_masks(data.Shards(scenes / 'train'), classes)))


def test_tars_of_every_format_and_pattern(monkeypatch, tmp_path):
    """oracle: tarfile's own reader; the pairs that were written, through every pattern and in any order of members, and
    through a cached index: that scans no header, unless the file has changed."""
    jpg, long = picture(), 'folder' * 15 + '/' + 'name' * 15            # over 100 characters: GNU and PAX add a header
    for n, form in enumerate(FORMATS):
        path = write_tar(tmp_path / f'{n:05d}.tar', [
            ('x/b.json', {'caption': f'json {n}'}), ('x/a.txt', f'text {n}'),
            *((f'{i}.cls', 'x' * i) for i in range(1, 60)),             # more headers than one read takes in
            ('x/b.JPG', jpg), ('x/a.jpg', jpg), (f'{long}.png', picture('PNG')), (f'{long}.txt', f'long {n}'),
            ('x/alone.jpg', jpg)], form)
        with tarfile.open(path) as tar, open(path, 'rb') as file:
            assert list(data.tar_members(file)) == [(m.name, m.offset_data, m.size) for m in tar]
    for pattern in ('', '/*.tar', '/{00000..00002}.tar', '/{00000,00001,00002}.tar',
                    f'/00000.tar::{tmp_path}/{{00001..00002}}.tar'):
        shards = data.Shards(f'{tmp_path}{pattern}')
        assert [shards.pool(i) for i in range(len(shards))] == [
            [text] for n in range(3) for text in (f'json {n}', f'text {n}', f'long {n}')]
        assert all(data.decode(shards.image(i)).shape == (3, 30, 40) for i in range(9))
    shutil.copy(path, tmp_path / 'a[1].tar')
    assert len(data.Shards(tmp_path / 'a[1].tar')) == 3
    assert pickle.loads(pickle.dumps(shards)).name(1).endswith('00000.tar:x/a.jpg')
    mapped = data.Shards(shards.paths[0], cache=tmp_path / 'cache')     # goes to a worker by name, not by value
    assert pickle.loads(pickle.dumps(mapped)).pairs.tolist() == mapped.pairs.tolist()
    assert mapped.__getstate__()['pairs'] is None and isinstance(mapped.pairs, np.memmap)
    cached = lambda: data.Shards(path, tmp_path / 'cache')
    assert len(cached()) == 3
    with monkeypatch.context() as patch:
        patch.setattr(data, 'scan_shard', None)                         # calling it would raise
        assert cached().pool(0) == ['json 2']
    write_tar(path, dogs(5))
    assert len(cached()) == 5


def test_odd_members_are_read_or_refused(tmp_path):
    """oracle: what each is by construction: names, images of one colour, bad captions, cut and huge files."""
    wide, exif = lambda mode, colour: Image.new(mode, (40, 20), colour), Image.Exif()
    red, gray, noise = wide('RGB', 'red'), wide('L', 128), Image.effect_noise((64, 64), 50)
    exif[0x112] = 6                                                     # the camera was held upright
    colours = {'cmyk': (225, 49, 137), 'gray': (128, 128, 128), 'alpha': (0, 200, 100)}         # of all others: red
    good = {'cmyk.jpg': encoded(wide('CMYK', (0, 200, 100, 30)), 'JPEG'), 'gray.png': encoded(gray),
            'gray2.jpg': encoded(gray, 'JPEG'), 'palette.png': encoded(red.convert('P')),
            'alpha.png': encoded(wide('RGBA', (0, 200, 100, 30))), 'photo.jpeg': encoded(red, 'JPEG', exif=exif),
            'w.webp': encoded(red, 'WEBP'), 'photo turned.webp': encoded(red, 'WEBP', exif=exif),
            'gray16.png': encoded(Image.fromarray(np.full((20, 40), 128 * 257, np.uint16)))}
    for name in ('UPPER.JPG', 'ünï/cödé.jpg', f"{'long' * 40}/{'name' * 30}.jpg", 'deep/er/dot.jpg'):
        good[name] = encoded(red, 'JPEG')
    huge = bytearray(encoded(red))
    huge[16:24] = (60000).to_bytes(4, 'big') * 2                        # says it is 60,000 x 60,000
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, 'big')
    refused('exceeds limit', data.decode, bytes(huge))
    bad = {f'cut {kind}.{kind}': encoded(noise, kind)[:600] for kind in ('jpeg', 'png', 'webp')}
    bad |= {'bomb.png': bytes(huge), 'text.jpg': b'GIF8', 'empty.jpg': b''}
    text = {'null': {'caption': None}, 'none': {'caption': ''}, 'digit': {'caption': 5}, 'broken': '{"caption": "a d',
            'list': {'caption': [None, 3, ' ']}, 'big': ' ' * (17 << 20)}
    stem = lambda name: name.rpartition('.')[0]
    members = [*good.items(), *bad.items(), ('alone.jpg', picture()), ('alone2.json', {})]
    members += [(f'{stem(name)}.json', {'caption': f'the {stem(name)}'}) for name in [*good, *bad]]
    members += [m for name, value in text.items() for m in ((f'{name}.json', value), (f'{name}.jpg', picture()))]
    for form in FORMATS[1:]:                                            # USTAR has no place for the long name
        shards = data.Shards(write_tar(tmp_path / 'a.tar', members, form))
        served = readable(shards, ValueError, OSError, RuntimeError)
        assert served.keys() == {f'the {stem(name)}' for name in good}
        assert len(shards) == len(good) + len(bad) - 1 + len(text)      # an empty image is as good as none
        for name, pixels in served.items():
            assert pixels.dtype == torch.uint8 and pixels.shape == ((3, 40, 20) if 'photo' in name else (3, 20, 40))
            want = next((colours[kind] for kind in colours if kind in name), (255, 0, 0))
            assert (pixels[:, 10, 10].int() - torch.tensor(want)).abs().max() <= 6, name


def test_damaged_shards_lose_only_what_is_damaged(tmp_path):
    """oracle: which bytes were damaged: 240 tars from a seed. Every untouched pair is there, image with caption."""
    rng, colour = random.Random(0), lambda i: (i * 20, 255 - i * 20, 7 * i)
    names = ['long/' * 25 * (i % 2) + str(i) for i in range(10)]        # long ones take a header more in GNU and PAX
    pairs = [m for i, name in enumerate(names) for m in (
        (f'{name}.png', encoded(Image.new('RGB', (8, 8), colour(i))) + bytes(1500 * (i % 3))),
        (f'{name}.json', {'caption': f'dog {i}'}))]
    raw = bytearray(write_tar(tmp_path / 'b.tar', pairs).read_bytes())
    with tarfile.open(tmp_path / 'b.tar') as tar:
        at = tar.getmembers()[4].offset_data - 512
    raw[at + 124:at + 136] = b'-0000001000\0'                           # a right checksum, a size below 0
    raw[at + 148:at + 156] = b'%06o\0 ' % (sum(raw[at:at + 148]) + 8 * 32 + sum(raw[at + 156:at + 512]))
    assert len(data.Shards(put(tmp_path / 'b.tar', bytes(raw)))) == 9
    for trial in range(240):
        members = rng.sample(pairs, 20) if trial % 4 == 3 else pairs    # partners far apart, or neighbours
        raw = bytearray(write_tar(tmp_path / 'a.tar', members, FORMATS[trial % 3]).read_bytes())
        with tarfile.open(tmp_path / 'a.tar') as tar:                   # bytes of each member, headers included
            spans = {m.name: (m.offset, m.offset_data + -(-m.size // 512) * 512) for m in tar}
        at, n = rng.randrange(spans[members[-1][0]][1]), rng.randrange(1, 3000)
        first, last, new = (
            (at, at + 1, bytes([raw[at] ^ 1 << rng.randrange(8)])),     # one flipped bit
            (at, len(raw), b''),                                        # the rest cut off
            (at // 512 * 512, at // 512 * 512 + 512, bytes(512)),       # a block of zeros
            (at, at, rng.randbytes(n)),                                 # garbage between: later headers lose their grid
            (at, at + n, b''))[trial // 3 % 5]                          # a part lost
        raw[first:last] = new
        touched = {name for name, (a, b) in spans.items() if a < max(last, first + 1) and b > first}
        untouched = [i for i, name in enumerate(names) if not {f'{name}.png', f'{name}.json'} & touched]
        if untouched:                                                   # none: it was cut within the first pair
            put(tmp_path / 'a.tar', bytes(raw))
            found = readable(data.Shards(tmp_path / 'a.tar'), Exception)
            for i in untouched:
                assert found[f'dog {i}'][:, 0, 0].tolist() == list(colour(i)), trial


def test_pack_and_join(tmp_path, capsys):
    """oracle: the rows that were packed, and an interrupted packing; a table joined by URL, its texts as sentences."""
    for name, value in (('a.jpg', picture()), ('s/b.png', picture('PNG')), ('bad.jpg', b'-')):
        put(tmp_path / 'images' / name, value)
    coco = {'images': [{'id': 1, 'file_name': 'a.jpg'}, {'id': 2, 'file_name': 's/b.png'}],
            'annotations': [{'image_id': i, 'caption': c} for i, c in ((1, 'one dog'), (2, 'two. dogs'), (1, 'a dog'))]}
    jsonl = [{'image': 'a.jpg', 'captions': ['one dog', 'a dog']}, {'image': 's/b.png', 'captions': ['two. dogs']},
             {'image': 'bad.jpg', 'captions': ['x']}, {'image': 'absent.jpg', 'captions': ['y']}]
    table = 'filepath{0}title\na.jpg{0}one dog\ns/b.png{0}two. dogs\na.jpg{0}a dog\n'
    for name, text in (('r.json', coco), ('r.jsonl', '\n'.join(map(json.dumps, jsonl))),
                       ('r.csv', table.format(',')), ('r.tsv', table.format('\t'))):
        out, arguments = tmp_path / f'out-{name}', (put(tmp_path / name, text), tmp_path / 'images')
        assert run(data, 'pack', *arguments, out, '--size', 1) is None
        count = '4 images, 2 left out' if name == 'r.jsonl' else '2 images, 0 left out'
        assert count in capsys.readouterr().out
        shards = data.Shards(out)
        assert [shards.pool(i) for i in range(2)] == [['one dog', 'a dog'], ['two', 'dogs']]
        assert shards.image(1) == picture('PNG')
    packed = {path.name: path.read_bytes() for path in out.glob('*.tar')}
    (out / '00001.tar').rename(out / '00001.tar.partial')               # as a kill leaves it
    data.pack(*arguments, out, size=1)
    assert {path.name: path.read_bytes() for path in out.glob('*.tar')} == packed
    put(tmp_path / 'd.csv', 'Image Path,raw_caption,longIB_captions\nhttp://x/2,two dogs,"A dog.\n'
                            'It is 3.5 m, big."\nhttp://x/9,none,none\nhttp://x/1,one dog,A dog\n')
    write_tar(tmp_path / 'i.tar', [m for i in range(3) for m in (
        (f'{i}.jpg', picture()), (f'{i}.json', {'url': f'http://x/{i}', 'caption': 'alt', 'key': str(i)}))])
    assert run(data, 'join', tmp_path / 'd.csv', tmp_path / 'i.tar', tmp_path / 'joined') is None
    assert '2 of 3 pairs matched (66.7%)' in capsys.readouterr().out
    shards = data.Shards(tmp_path / 'joined')
    assert [shards.pool(i) for i in range(2)] == [['one dog', 'A dog'], ['two dogs', 'A dog', 'It is 3.5 m, big']]
    assert [shards.record(i)['key'] for i in range(2)] == ['1', '2']
    refused('r.csv has the columns filepath, title, none of url',
            data.join, tmp_path / 'r.csv', tmp_path / 'i.tar', tmp_path / 'joined')


def test_tables_and_folders_that_could_be_garbled(tmp_path):
    """oracle: the captions that stand in the files; what a second run, or a wrong folder, must not mix."""
    for name in 'ab':
        put(tmp_path / f'images/{name}.jpg', encoded(Image.new('RGB', (8, 8)), 'MPO' if name == 'b' else 'JPEG'))
    (tmp_path / 'none').mkdir()
    def packed(name, text, size=9, images=tmp_path / 'images'):
        out = tmp_path / f'out-{name}'
        data.pack(put(tmp_path / name, text), images, out, size)
        shards = data.Shards(out)
        return [shards.pool(i) for i in range(len(shards))]
    line = lambda name, **record: json.dumps({'image': f'{name}.jpg', **record}) + '\n'
    assert packed('r.jsonl', line('a', captions=['a dog']) + line('b', raw_caption='ox') + line('a', captions='a cat') +
                  line('b', raw_caption='cow') + line('a', captions=[{}])) == [['a dog', 'a cat'], ['ox', 'cow']]
    assert packed('q.tsv', 'image\tcaption\na.jpg\t"Oh, a cat\nb.jpg\ta dog\n') == [['"Oh, a cat'], ['a dog']]
    assert packed('u.csv', 'image,title,text\na.jpg,a dog,\nb.jpg,,a cat\n') == [['a dog'], ['a cat']]
    assert packed('t.csv', 'image,caption,text\na.jpg,a dog,SALE\nb.jpg,"a cat, old",\n') == [['a dog'], ['a cat, old']]
    refused('row 1 of .*w.csv has more fields', packed, 'w.csv', 'image,caption\na.jpg,a dog, old\n')
    refused("row 1 of .*l.jsonl has no 'image'", packed, 'l.jsonl', json.dumps({'image': ['a.jpg']}))
    refused('--size 0', packed, 'r.jsonl', line('a', caption='x'), 0)
    refused('absent is no folder', packed, 's.jsonl', line('a', caption='x'), 9, tmp_path / 'absent')
    refused('none of the 1 rows', packed, 's.jsonl', line('a', caption='x'), 9, tmp_path / 'none')
    refused('out-t.csv holds shards made from .*size', packed, 't.csv', (tmp_path / 't.csv').read_text(), 8)
    put(tmp_path / 'in/0.tar')
    shards = write_tar(tmp_path / 'in/0.tar', [m for i, url in enumerate(('', None, 'u', 'none', '\ud800')) for m in (
        (f'{i}.jpg', picture()), (f'{i}.json', {'url': url, 'caption': 'alt'}))])
    table = put(tmp_path / 'd.csv', '\ufeffurl,raw_caption\n,no\nNone,no\nnone,\nu,a dog\n')
    put(tmp_path / 'joined/source.json')                                # as a kill leaves it
    assert data.join(table, shards, tmp_path / 'joined') == (5, 1)
    assert data.Shards(tmp_path / 'joined').pool(0) == ['a dog']
    refused('holds shards made from something else', data.join, table, shards, tmp_path / 'in')
    write_tar(tmp_path / 'b.tar', dogs(2))
    refused("b.tar has no 'url' to join by", data.join, table, tmp_path / 'b.tar', tmp_path / 'other')
    table = put(tmp_path / 'e.csv', f'url,raw_caption\nu,x\nv,{"x" * (1 << 24)}y')
    refused('e.csv is no CSV after its line 2', data.join, table, shards, tmp_path / 'third')


def test_make_and_inspect(tmp_path, scenes, capsys):
    """oracle: the set that one process drew: equal bytes; counts by hand; the picture opens."""
    def command(*argv):
        assert run(data, *argv) is None
        return capsys.readouterr().out
    told = command('make', tmp_path / 'set', '--train', 40, '--val', 12, '--seed', 1)
    assert '40 training and 12 held-out' in told
    for name in ('train/00000.tar', 'val/00000.tar'):
        assert (tmp_path / 'set' / name).read_bytes() == (scenes / name).read_bytes()
    told = command('inspect', scenes / 'train', '--out', tmp_path / 'seen.png')
    pools = [data.Shards(scenes / 'train').pool(i) for i in range(40)]
    assert '40 pairs in 1 shards' in told and 'unusable captions    0 of 40' in told and ' | '.join(pools[0]) in told
    assert f'50 % {np.median([len(pool) for pool in pools]):g}' in told
    assert Image.open(tmp_path / 'seen.png').width > 1000


def test_order_is_a_pure_function(monkeypatch, tmp_path):
    """oracle: numpy's permutation of (seed, epoch), which ranks and restarts only cut; of windows of shards, sets, and
    what the system is told: to read every tar from start to end, once."""
    steps = list(data.Order(23, 4, 0, 12, seed=5))
    for step, rows in enumerate(steps):
        epoch, k = divmod(step, 5)                                      # 23 // 4 whole batches an epoch
        expected = np.random.default_rng((5, epoch)).permutation(23)[4 * k:4 * k + 4]
        assert rows == [(epoch, 4 * k + i, index) for i, index in enumerate(expected)]
    assert list(data.Order(23, 4, 7, 12, seed=5)) == steps[7:]
    two = [list(data.Order(23, 4, 0, 12, 5, rank, 2)) for rank in range(2)]
    assert [a + b for a, b in zip(*two)] == steps
    bounds = 0, 5, 12, 13, 20, 30
    for epoch in (0, 1):
        found, at = data.order(3, epoch, 30, bounds, 2).tolist(), 0
        shards = np.random.default_rng((3, epoch)).permutation(5)
        for some in (shards[:2], shards[2:4], shards[4:]):              # each window whole, before the next, and mixed
            own = [i for k in some for i in range(bounds[k], bounds[k + 1])]
            window = found[at:at + len(own)]
            assert sorted(window) == sorted(own) and (window != own or len(own) == 1)
            at += len(own)
        rows = [row for step in data.Order(30, 6, 5 * epoch, 5 * epoch + 5, 3, shuffle=(bounds, 2)) for row in step]
        assert [index for _, _, index in rows] == found
    for name in 'abcd':
        write_tar(tmp_path / f'{name}.tar', dogs(6))
    shards, told = data.Shards(tmp_path), []
    if not hasattr(os, 'posix_fadvise'):                                # macOS, Windows
        return
    monkeypatch.setattr(os, 'posix_fadvise', lambda file, *what: told.append((os.fstat(file).st_ino, *what)))
    for ahead in (False, True):
        shards.ahead, shards.files = ahead, {}
        for i in data.order(0, 0, 24, shards.bounds(), 2):
            shards.record(int(i))
    assert sorted(told) == sorted((os.stat(path).st_ino, 0, 0, os.POSIX_FADV_WILLNEED) for path in shards.paths)


def test_captions_are_cut_in_few_groups(monkeypatch):
    """oracle: by hand. And in training no more rows are looked up than that."""
    # All but the first, sorted: 17, 8, 7, 6, 6, 5, 5, 5, 4, 4, 4, 3, 3, 3, 3, 3.
    many = [(9, 20), (17, 6), (3, 4), (5, 5), (6, 7), (8, 3), (4, 4), (5, 3), (3, 3)]
    for lengths, some, want in (
            (many, dict(whole=1), [(2, 25), (1, 20), (1, 8), (6, 7), (6, 4), (2, 3)]),
            (many, dict(whole=1, multiple=3), [(2, 25), (1, 24), (1, 12), (6, 9), (6, 6), (2, 3)]),
            (many, dict(some=2, multiple=2), [(1, 24), (1, 24), (1, 16), (1, 8)]),
            ([(7, 2, 5)], {}, [(2, 8), (1, 4)]),
            ([(8,), (5,), (24,)], dict(whole=1, multiple=8), [(1, 25), (1, 25), (1, 8)])):
        batch = data.Batch([], [], torch.empty(len(lengths), len(lengths[0]), 25), torch.tensor(lengths) - 1, 0)
        assert batch.cut(**some) == want, some
    for method in train.METHODS:
        model, images, _ = micro(method)
        ends, rows = torch.tensor([[9, 2, 3]] * 5), []
        texts = torch.randint(1, 48, (5, 3, 12)).scatter(2, ends[..., None], 49)
        batch = data.Batch([], [], texts, ends, 0)
        monkeypatch.setattr(data.Batch, 'views', lambda self: images)
        plan = SimpleNamespace(method=train.METHODS[method], device=CPU, dtype=None, teacher=Teacher(model))
        for tower in (model.text, plan.teacher.model.text):
            tower.token_embedding.register_forward_hook(lambda module, given, _: rows.append(given[0].numel()))
        train.forward(plan, batch, model)
        plans = [some for some in train.cuts(batch, plan.method, None) if some]
        assert rows == [sum(n * L for n, L in some) for some in plans] and rows[0] < texts.numel()
        assert len(rows) == 1 or rows[1] < texts[:2].numel()
    wide = batch._replace(texts=torch.empty(5, 3, 77), ends=ends + 30)
    assert [L for _, L in train.cuts(wide, train.METHODS['cosmos'], torch.bfloat16)[0]] == [77, 64, 64, 40]
    assert [L for _, L in train.cuts(wide, train.METHODS['cosmos'], None)[1]] == [40, 36, 36]


def test_batches_are_exact_and_have_no_bad_pair(tmp_path, scenes, capsys):
    """oracle: where captions end; the pairs broken on purpose: none is served, each is counted and named once."""
    shards = data.Shards(scenes / 'train')
    tokenizer = Tokenizer.learn((s for i in range(len(shards)) for s in shards.pool(i)), 600, 12)
    views_, (rows,) = data.Views(shards, tokenizer, MICRO, 3, 4, (2, 2, 2, 3)), data.Order(40, 4, 1, 2, seed=3)
    (batch,) = data.loader(views_, [rows], 0)
    drawn = [tokenizer(data.Views.views(views_, epoch, index)[-1]) for epoch, _, index in rows]
    assert [tuple(x.shape) for x in batch.views()] == [(4, 3, 32, 32)] * 2 + [(4, 3, 16, 16)] * 2
    assert torch.equal(batch.texts, torch.stack(drawn, dim=1)) and batch.texts.shape == (5, 4, 12)
    assert batch.views()[0].min() < 0                                   # normalised
    assert batch.texts.gather(2, batch.ends[..., None]).unique().tolist() == [tokenizer.vocab_size - 1]
    assert all(torch.equal(torch.cat(some, dim=1), whole)
               for some, whole in zip(list(zip(*batch.split(2)))[2:4], batch[2:4]))
    shards = data.Shards(write_tar(tmp_path / 'a.tar', dogs(12, no_image=[5], no_text=[7])))
    views = data.Views(shards, LOW, MICRO, 3, 4, (2, 2, 2, 3))
    for epoch in range(2):
        batches = list(data.loader(views, data.Order(12, 4, 3 * epoch, 3 * epoch + 3, seed=3), 0))
        assert sum(batch.bad for batch in batches) >= 2
        assert all(len({*map(tuple, batch.texts[0].tolist())}) == 4 for batch in batches)   # none is in a batch twice
        served = {LOW.decode(row).partition(' .')[0] for batch in batches for row in batch.texts[0]}
        assert {text.replace(' ', '') for text in served} == {f'dog{i}' for i in range(12) if i not in (5, 7)}
    told = capsys.readouterr().err
    assert told.count('a.tar:5.jpg') == told.count('a.tar:7.jpg') == 1
    (batch,) = data.loader(data.Views(shards, LOW, MICRO, 3, 12, (2, 2, 2, 3)), data.Order(12, 12, 0, 1, seed=3), 0)
    assert batch.bad >= 2                                               # also where one batch is the whole set
    shards = data.Shards(write_tar(tmp_path / 'a.tar', dogs(4, no_image=range(3))))
    (batch,) = data.loader(data.Views(shards, LOW, MICRO, 3, 2, (2, 2, 2, 3)), data.Order(4, 2, 0, 1, seed=3), 0)
    assert batch.bad and LOW.decode(batch.texts[0, 0].tolist()).replace(' ', '').startswith('dog3')     # the only one


def test_image_crops_are_the_pixels_of_their_boxes(monkeypatch):
    """oracle: torchvision's crop of each box, and its box where none fits. Of large JPEGs the crops of the whole image,
    and a decoder that tells at which scale it was asked."""
    draws, kinds = random.Random(0), data.view_kinds(MICRO)
    whole = torch.randint(0, 256, (3, 144, 192), dtype=torch.uint8)
    file = encoded(data.v2.functional.to_pil_image(whole))
    for _ in range(50):
        for view, box, kind in zip(*data.image_crops(file, kinds, draws), kinds, strict=True):
            want = data.v2.functional.resized_crop(whole, *box, [kind.size] * 2, data.BICUBIC)
            assert view.shape == want.shape and (view.int() - want.int()).abs().max() <= 1              # of 255
    image, asked, decode = Image.effect_mandelbrot((2000, 1400), (-2, -1.2, 1, 1.2), 60), [], data.decode
    file, crops = encoded(image.convert('RGB'), 'JPEG', quality=95), []
    for limit in (8, 1):
        spy = lambda data, shrink=1: (asked.append(shrink), decode(data, min(shrink, limit)))[1]
        monkeypatch.setattr(data, 'decode', spy)
        crops.append(data.image_crops(file, kinds, random.Random(3))[0])
    assert asked == [8, 8] and decode(file, 8).shape == (3, 175, 250)
    for small, large in zip(*crops):
        assert (small.float() - large.float()).abs().mean() < 6                             # of 255
    for h, w in ((10, 400), (400, 10)):                                                     # no box of that area fits
        middle = data.v2.RandomResizedCrop.get_params(torch.empty(3, h, w), (1, 1), (3 / 4, 4 / 3))
        assert data.random_box(h, w, (1, 1), draws) == middle


def test_colours_equal_torchvision_one_by_one():
    """oracle: torchvision's own functions, image by image, in the order drawn; alone or in a batch the same."""
    torch.manual_seed(0)
    images, rng, V = torch.randint(0, 256, (40, 3, 20, 24), dtype=torch.uint8), random.Random(0), data.v2.functional
    images[0], images[1, :, :10] = 77, torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)       # gray, pure red
    colours = torch.tensor([data.draw_colours(data.Kind(20, (0, 1), 0.5, 0.5), rng) for _ in images])
    together = data.photometric(images, colours)
    for image, numbers, found in zip(images, colours, together):
        assert torch.allclose(data.photometric(image[None], numbers[None])[0], found, atol=1e-6)
        flip, *order, b, c, s, h, gray, sigma, solarize = numbers.tolist()
        want = V.horizontal_flip(image.float() / 255) if flip else image.float() / 255
        for k in map(int, order if h else ()):                          # without jitter its hue is turned by 0
            operation = (V.adjust_brightness, V.adjust_contrast, V.adjust_saturation, V.adjust_hue)[k]
            want = operation(want, (b, c, s, h)[k])
        want = V.rgb_to_grayscale(want, 3) if gray else want
        want = V.gaussian_blur(want, 2 * math.ceil(3 * sigma) + 1, sigma) if sigma else want        # cut at 3 sigma
        want = V.solarize(want, 128 / 255) if solarize else want
        assert torch.allclose(found, want, atol=2e-5), numbers
    assert data.photometric(images, torch.empty(40, 0)).equal(images.float() / 255)
    wide = images[:8].repeat(1, 1, 9, 9)                                # too large to share a CPU's cache
    assert torch.allclose(data.photometric(wide, colours[:8]), data.change_colours(wide / 255, colours[:8]), atol=1e-6)
    noise, inside = torch.rand(1, 3, 48, 64), lambda x: x[..., 6:-6, 6:-6] - 0.5        # borders differ
    for sigma in (0.6, 1.0, 2.0):       # the released blur is Pillow's, three boxes, 11 % away; a wrong sigma is 20 %
        pillow = V.to_pil_image(noise[0]).filter(ImageFilter.GaussianBlur(sigma))
        close(inside(data.blur(noise.clone(), torch.tensor([sigma]))), inside(V.to_image(pillow) / 255), 0.13)


def test_colours_come_as_often_and_as_strong_as_released():
    """oracle: the released probabilities and ranges, all uniform, over 5,000 draws for each kind of view."""
    rng, kinds = random.Random(1), data.view_kinds(MICRO)
    assert kinds == [(32, (0.4, 1.0), 1.0, 0.0), (32, (0.4, 1.0), 0.1, 0.2), (16, (0.05, 0.4), 0.5, 0.0)]
    for kind in kinds:
        flip, *order, b, c, s, h, gray, sigma, solarize = map(
            np.array, zip(*(data.draw_colours(kind, rng) for _ in range(5000))))
        for touched, p in ((flip > 0, 0.5), (b != 1, 0.8), (gray > 0, 0.2), (sigma > 0, kind.blur),
                           (solarize > 0, kind.solarize)):
            assert abs(touched.mean() - p) <= 4 * math.sqrt(p * (1 - p) / 5000)
        for x, still, low, high in ((b, 1, 0.6, 1.4), (c, 1, 0.6, 1.4), (s, 1, 0.8, 1.2), (h, 0, -0.1, 0.1),
                                    (sigma, 0, 0.1, 2)):
            x = x[x != still]
            assert low <= x.min() and x.max() <= high and abs(x.mean() - (low + high) / 2) < 0.05 * (high - low)
            assert abs(x.std() - (high - low) / math.sqrt(12)) < 0.05 * (high - low)
        assert all(np.bincount(k).size == 4 and abs(np.bincount(k) - 1250).max() < 150 for k in order)


def test_views_have_the_statistics_of_the_released_recipe(monkeypatch):
    """oracle: 5,000 views of each kind by torchvision, one by one. Mean and spread over the views of their channels'
    means, contrast and edges, and of the boxes' place, sides, area and aspect, are equal within 4 standard errors."""
    T, V, rng = data.v2, data.v2.functional, random.Random(0)
    image = Image.effect_mandelbrot((192, 144), (-2, -1.2, 1, 1.2), 60)
    image = Image.merge('RGB', [image, ImageOps.flip(image), ImageOps.invert(image)])
    file, whole = encoded(image), V.pil_to_tensor(image)
    monkeypatch.setattr(data, 'decode', lambda file, shrink=1: whole)                   # the same pixels, sooner
    kinds, n = data.view_kinds(MICRO), 5000
    torch.manual_seed(0)
    drawn, boxes = zip(*(data.image_crops(file, kinds, rng) for _ in range(n)))
    errors = lambda ours, theirs: abs(ours.mean(0) - theirs.mean(0)) / ((ours.var(0) + theirs.var(0)) / n).sqrt()
    for k, kind in enumerate(kinds):
        colours = torch.tensor([data.draw_colours(kind, rng) for _ in range(n)])
        ours = data.photometric(torch.stack([crops[k] for crops in drawn]), colours)
        recipe = T.Compose([
            T.RandomResizedCrop(kind.size, kind.scale, interpolation=data.BICUBIC), T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), T.RandomGrayscale(0.2),
            T.ToDtype(torch.float, True), T.RandomApply([T.GaussianBlur(13, (0.1, 2.0))], kind.blur),
            T.RandomSolarize(128 / 255, kind.solarize)])
        theirs, crop = torch.stack([recipe(whole) for _ in range(n)]), recipe.transforms[0]
        spans = [torch.tensor(some).float() for some in (
            [places[k] for places in boxes], [crop.get_params(whole, crop.scale, crop.ratio) for _ in range(n)])]
        told = [torch.stack([*x.mean(dim=(2, 3)).T, x.std(dim=(1, 2, 3)), x.diff(dim=3).abs().mean(dim=(1, 2, 3)),
                             x.diff(dim=2).abs().mean(dim=(1, 2, 3)), *span.T, span[:, 2:].prod(dim=1),
                             (span[:, 3] / span[:, 2]).log()], dim=1) for x, span in zip((ours, theirs), spans)]
        assert (errors(*told) < 4).all(), kind
        centre = torch.cat(told).mean(dim=0)
        assert (errors(*((x - centre) ** 2 for x in told)) < 4).all(), kind


# --- eval.py ---------------------------------------------------------------------------------------------------------

def test_retrieval_by_hand_and_by_loops():
    """oracle: ranks read off by eye, ties counted against us; Python loops over single scores, for any chunk."""
    images, owner = torch.eye(2), torch.tensor([0] * 5 + [1] * 5)
    first = [(1.0, 0.0), (0.9, 0.1), (0.2, 0.9), (0.5, 0.5), (0.6, 0.3)]      # the third finds image 1, the fourth ties
    second = [(0.95, 0.2), (0.3, 0.4), (0.1, 0.2), (0.1, 0.8), (0.2, 0.7)]      # the first finds image 0
    figures = evaluation.retrieval(images, torch.tensor(first + second), owner)
    assert (figures['images'], figures['captions'], figures['chance']) == (2, 10, 0.5)
    assert figures['text_to_image_R@1'] == pytest.approx(7 / 10) and figures['text_to_image_R@5'] == 1
    # image 0: its 1.0 is ahead of all. image 1: its best is 0.8, behind the 0.9 of a caption of image 0
    assert figures['image_to_text_R@1'] == 0.5 and figures['image_to_text_mean_rank'] == 1.5
    assert figures['image_to_text_median_rank'] == 1.5                  # ranks 1 and 2
    for same in (1.0, math.nan):
        collapsed = evaluation.retrieval(torch.full((2, 2), same), torch.full((10, 2), same), owner)
        assert collapsed['image_to_text_R@5'] == collapsed['text_to_image_R@1'] == 0
    torch.manual_seed(0)
    queries, targets, ids = torch.randn(20, 6), torch.randn(30, 6), torch.arange(20)
    target_ids, slow = torch.cat([torch.randperm(20), torch.randint(0, 20, (10,))]), []
    for q, own in zip(queries, ids):
        best = max(float(q @ t) for t, i in zip(targets, target_ids) if i == own)
        slow.append(1 + sum(float(q @ t) >= best for t, i in zip(targets, target_ids) if i != own))
    for chunk in (1, 7, 1000):
        assert evaluation.ranks(queries, targets, ids, target_ids, chunk).tolist() == slow


def test_classification_by_hand():
    """oracle: hand-made scores; the ensemble computed one text at a time; features that are an object's own name."""
    scores = torch.tensor([[7.0, 1, 2, 3, 4, 5, 6], [1, 7, 6, 5, 4, 3, 2], [3, 1, 3, 0, 0, 0, 0]])
    figures = evaluation.classify(scores, torch.eye(7), torch.tensor([0, 4, 0]))        # right; fourth; tied
    assert (figures['top1'], figures['top5'], figures['chance']) == (pytest.approx(1 / 3), 1.0, 1 / 7)
    model, tokenizer = spelling_model()
    vectors = evaluation.class_vectors(model, tokenizer, ['tabby cat', 'dog'], ('a {}', '{}!'))     # lengths unsorted
    embed = lambda text: F.normalize(model.encode_text(tokenizer([text]))[0], dim=-1)
    for vector, name in zip(vectors, ('tabby cat', 'dog')):
        close(vector, F.normalize(embed(f'a {name}') + embed(f'{name}!'), dim=-1)[0])
    texts = ['a long text', 'ox', 'a dog', '']
    close(evaluation.embed_texts(model, tokenizer, texts, batch=2), torch.cat([embed(text) for text in texts]))
    class Scenes(list):
        record = lambda self, i: {'objects': self[i]}
    thing = lambda role, name, other: {'role': role, 'name': name, 'negatives': ['ox', other]}
    scene = [thing('dominant', 'red star', 'blue ring'), thing('small', 'blue ring', 'red star')]
    for seen, dominant in ((['red star', 'red star'], 1.0), (['red star', 'blue ring'], 0.5)):
        features = evaluation.class_vectors(model, tokenizer, seen)
        figures = evaluation.classify_objects(model, tokenizer, features, Scenes([scene, scene]))
        for role, top1 in (('dominant', dominant), ('small', 1 - dominant)):
            assert {'top1': top1, 'chance': 1 / 3, 'objects': 2}.items() <= figures[role].items()
        assert figures['small']['of_dominant'] == pytest.approx((1 - dominant - 1 / 3) / (dominant - 1 / 3))


def test_probe_finds_what_is_there():
    """oracle: features made of an object's own words and noise beside them: all are named right. Of noise alone the
    same objects as by numpy's least squares, the penalty as rows of their own."""
    torch.manual_seed(0)
    rng, words, shapes = random.Random(0), ('red', 'blue', 'lime', 'pink'), ('star', 'ring', 'moon')
    code = dict(zip(words + shapes, torch.eye(7)))
    objects = []
    for i in range(200):
        name, *others = rng.sample([f'{word} {shape}' for word in words for shape in shapes], 3)
        objects.append((i, 0, {'name': name, 'role': 'small', 'negatives': others}))
    clean = torch.stack([sum(code[word] for word in thing['name'].split()) for *_, thing in objects])
    noise = torch.randn(200, 8)
    features = torch.cat([clean, noise], dim=1)
    assert all(evaluation.probe_objects(features, objects))
    found, hits = evaluation.probe_objects(noise, objects), []
    target = clean.numpy()
    for odd in (0, 1):
        fit, asked = np.arange(odd, 200, 2), range(1 - odd, 200, 2)
        x = (noise.numpy() - noise.numpy()[fit].mean(axis=0)) / noise.numpy()[fit].std(axis=0)
        mean = target[fit].mean(axis=0)
        rows = np.r_[x[fit], np.sqrt(0.1 * 100) * np.eye(8)], np.r_[target[fit] - mean, np.zeros((8, 7))]
        scores = x @ np.linalg.lstsq(*rows, rcond=None)[0] + mean
        score = lambda i, name: sum(scores[i, list(code).index(word)] for word in name.split())
        hits += [max([thing['name'], *thing['negatives']], key=lambda name: score(i, name)) == thing['name']
                 for i, _, thing in objects if i in asked]
    assert hits == found and len(hits) == 200


def test_maps_point_at_masks(scenes, monkeypatch):
    """oracle: a uniform map puts as much weight on an object as it has area, at entropy 1; one with all its weight on
    the patch that the object covers most has that share by numpy, and hits where the mask is set at its centre."""
    (model, tokenizer), shards, preprocess = spelling_model(), data.Shards(scenes / 'val'), data.Preprocess(32)
    objects = evaluation.listed_objects(shards)
    masks = np.array([np.array(Image.open(io.BytesIO(shards.mask(i))).resize((32, 32), Image.NEAREST)) == k + 1
                      for i, k, _ in objects])                          # (n, 32, 32)
    scene, big = np.array([i for i, *_ in objects]), np.array([thing['role'] == 'dominant' for *_, thing in objects])
    cells = masks.reshape(-1, 4, 8, 4, 8).mean(axis=(2, 4)).reshape(-1, 16)     # the share of a patch it covers
    middle, best, area = masks[:, 4::8, 4::8].reshape(-1, 16), cells.argmax(axis=1), masks.mean(axis=(1, 2))
    assert len(objects) > 24
    figures = {}
    for name, grids in (('uniform', np.full_like(cells, 1 / 16)), ('best', np.eye(16)[best])):
        left = iter(np.float32(grids))
        monkeypatch.setattr(model.image_cross, 'weights', lambda text, keys: (
            torch.from_numpy(np.stack([next(left) for _ in text]))))
        both = evaluation.pointing(model, tokenizer, preprocess, shards)
        figures[name] = both['cross_attention']
    for told, entropy in ((figures['uniform']['dominant'], 1), (figures['best']['dominant'], 0)):
        assert told['entropy'] == pytest.approx(entropy, abs=1e-5)
        assert told['hit_chance'] == told['mass_chance'] == pytest.approx(area[big].mean())
    assert figures['uniform']['small']['mass'] == pytest.approx(figures['uniform']['small']['mass_chance'])
    others = [(masks[scene == i].any(axis=0) & ~mask).mean() for i, mask in zip(scene[big], masks[big])]
    for key in ('others_mass', 'others_mass_chance', 'others_hit_chance'):
        assert figures['uniform']['dominant'][key] == pytest.approx(np.mean(others))
    hit = middle[np.arange(len(best)), best][big].mean()
    assert figures['best']['dominant']['mass'] == pytest.approx(cells.max(axis=1)[big].mean())
    assert figures['best']['dominant']['hit'] == pytest.approx(hit) and hit > 0.7
    hits = []                                                           # of the cosines, one image and text at a time
    for (i, _, thing), centres in zip(objects, middle):
        dense = model.encode_dense(preprocess(evaluation.shard_image(shards, i))[None])[0].flatten(0, 1)
        hits.append(centres[int((dense @ model.encode_text(tokenizer([f"a {thing['name']}"]))[0][0]).argmax())])
    for role, own in (('dominant', big), ('small', ~big)):
        assert both['cosine'][role]['hit'] == pytest.approx(np.array(hits)[own].mean())


def test_attention_words():
    """oracle: the model's own weights: pieces of a word add up; start, end and padding are no words."""
    model, tokenizer = spelling_model(['d o', 'do g</w>'], 12)
    preprocess, image = data.Preprocess(32), Image.new('RGB', (50, 40), 'red')
    grid, words = evaluation.attention(model, tokenizer, preprocess, image, 'dog ab dog')
    patches, (weights,) = model.attention(preprocess(image)[None], tokenizer(['dog ab dog']))
    raw = np.array([weights[1].item(), weights[2:4].sum().item(), weights[4].item()])
    assert [word for word, _ in words] == ['dog', 'ab', 'dog']
    assert np.allclose([weight for _, weight in words], (raw - raw.min()) / np.ptp(raw))
    patches = patches.detach().numpy().reshape(4, 4)                    # rows first
    assert np.allclose(grid, (patches - patches.min()) / np.ptp(patches))
    assert len(evaluation.attention(model, tokenizer, preprocess, image, 'dog ' * 20)[1]) == 10     # what fits in 12


def test_published_layouts(tmp_path):
    """oracle: files written here as COCO's, Karpathy's, ImageNet's and so on, and what must be read."""
    write = lambda name, value='': put(tmp_path / name, value)
    write('annotations/captions_val2017.json', {
        'images': [{'id': 7, 'file_name': 'a.jpg'}, {'id': 3, 'file_name': 'b.jpg'}],
        'annotations': [{'image_id': i, 'caption': caption} for i, caption in ((3, 'x'), (7, 'y'), (3, 'z'))]})
    paths, captions, owner = evaluation.coco_captions(tmp_path)
    assert ([path.name for path in paths], captions, owner.tolist()) == (['a.jpg', 'b.jpg'], ['x', 'y', 'z'], [1, 0, 1])
    listed = write('k.json', {'images': [
        {'split': split, 'filepath': 'val2014', 'filename': f'{split}.jpg', 'sentences': [{'raw': split}, {'raw': 'b'}]}
        for split in ('train', 'test')]})
    paths, captions, owner = evaluation.karpathy_captions(listed, 'test', None)
    assert (paths, captions, owner.tolist()) == ([tmp_path / 'val2014/test.jpg'], ['test', 'b'], [0, 0])
    refused("no 'annotations'", evaluation.read_json, listed, 'images', 'annotations')
    for read, name, value, told in (        # keys that are not there, lists for objects: the file, and what it lacks
            (evaluation.coco_captions, 'wrong/annotations/captions_val2017.json',
             {'images': [{'id': 1}], 'annotations': []}, 'file_name'),
            (evaluation.coco_captions, 'wrong/annotations/captions_val2017.json',
             {'images': [{'id': 1, 'file_name': 'a'}], 'annotations': [{'image_id': 1, 'caption': None}]}, 'in words'),
            (lambda root: evaluation.karpathy_captions(root / 'k.json', 'test', None), 'wrong/k.json',
             {'images': [{'split': 'test', 'filename': 'a'}]}, 'sentences'),
            (lambda root: evaluation.flickr_captions(root / 'f.json', 'x'), 'wrong/f.json', [{'image': 'a'}], 'KeyErr'),
            (lambda root: evaluation.flickr_captions(root / 'f.json', 'x'), 'wrong/f.json', ['a'], 'TypeError'),
            (lambda root: evaluation.suppression(None, None, None, root), 'wrong/probes.json', [{'images': {}}],
             'dominant_query'),
            (lambda root: evaluation.folder_classes(root, root / 'c.json'), 'wrong/c.json', [], 'labels.json')):
        write('wrong/labels.json', {'file': 'a'})
        refused(f'wrong/.*{told}', read, write(name, value) and tmp_path / 'wrong')
    root = [write(f'folder/{name}') for name in ('ox_2/1.png', 'ape/2.png', 'ape/.x', '.cache/3.png')][0].parents[1]
    paths, labels, names, _ = evaluation.folder_classes(root)
    assert ([path.name for path in paths], labels.tolist(), names) == (['2.png', '1.png'], [0, 1], ['ape', 'ox 2'])
    write('folder/labels.json', [{'file': f'{i}.png', 'class_id': i} for i in (5, 6, 7)])
    classes = write('classes.json', {'subsets': {'one': [5]}, 'classes': [
        {'id': 7, 'name': 'ape'}, {'id': 5, 'name': 'ox', 'noun_phrase': 'an ox'}]})
    _, labels, names, _ = evaluation.folder_classes(root, classes)
    assert (labels.tolist(), names) == ([1, 0], ['ape', 'an ox'])
    assert evaluation.folder_classes(root, classes, 'one')[2] == ['an ox']
    refused('ids the same', evaluation.folder_classes, root, write('other.json', ['ape']))
    for i in range(1000):
        (tmp_path / f'in/n{i:08d}').mkdir(parents=True)
    write('in/n00000002/x.png')
    _, labels, names, _ = evaluation.folder_classes(tmp_path / 'in')
    assert labels.tolist() == [2] and names[2] == 'great white shark' and len(names) == 1000
    (tmp_path / 'in/n00000999').rmdir()
    refused('999 folders of WordNet ids', evaluation.folder_classes, tmp_path / 'in')
    assert evaluation.read_templates(write('prompts', 'a {}\n\nthe {c}!\n')) == ['a {}', 'the {}!']
    assert evaluation.read_lines(write('classes.txt', 'ox\n \ncat\n')) == ['ox', 'cat']
    refused("'nothing'", evaluation.read_templates, write('prompts', ['a {} b', 'nothing']))


def test_images_as_tensors_and_by_workers(monkeypatch, tmp_path, scenes):
    """oracle: Pillow's resizing and cropping, OpenAI's mean and deviation; for workers the main process."""
    model, preprocess = micro()[0].eval(), data.Preprocess(32)
    image = Image.effect_mandelbrot((50, 40), (-2, -1, 1, 1), 40).convert('RGB')
    raw = torch.from_numpy(np.array(image.resize((40, 32), Image.BICUBIC).crop((4, 0, 36, 32)))).permute(2, 0, 1)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    for found in (preprocess(image), data.normalize(raw)):
        close(found, (raw / 255 - mean) / std)
    for name, told in (('dtdd', "has no 'dtdd'; it has .*DTD"), ('food101', 'cannot read food101 from .*--download'),
                       ('FakeData', 'no class names')):
        refused(told, evaluation.torchvision_set, name, tmp_path)
    asked, sets = [], evaluation.torchvision.datasets                   # EMNIST hands most of its options to MNIST
    monkeypatch.setattr(sets.MNIST, '__init__', lambda self, root, train=1, download=1: asked.append((train, download)))
    evaluation.torchvision_set('emnist', tmp_path, 'balanced')
    assert asked == [(False, False)]
    shards = data.Shards(scenes / 'val')
    features = evaluation.embed_images(model, shards, preprocess, 4)
    shards.record(0)                                                    # leaves a file open, and not at an image
    places = [file.tell() for file in shards.files.values()]
    assert places and torch.equal(evaluation.embed_images(model, shards, preprocess, 4, workers=1), features)
    assert [file.tell() for file in shards.files.values()] == places    # a fork that shares it would garble both
    file = io.BytesIO(encoded(image, 'PNG', exif=b'Exif\0\0garbage'))
    refused('a.png is no readable image', evaluation.read_picture, file, 'a.png')
    for workers in (0, 1):
        refused(r'^\S*absent.jpg is no readable image \(.*\)$',
                evaluation.embed_images, model, [tmp_path / 'absent.jpg'], preprocess, 4, workers)


def test_checkpoints_of_every_origin(tmp_path):
    """oracle: the model that was saved, under released, prefixed and open_clip's names; an export: a plain CLIP's."""
    vocab = shared('vocab', 'bpe_simple_vocab_16e6.txt.gz')
    torch.manual_seed(0)
    config = Config(64, 32, 96, 16, 64, 2, 1, 64, 1, 1, 77, 49408, 8)
    model, plain = COSMOS(config), COSMOS(replace(config, cross_heads=0))
    image, tokens = torch.randn(1, 3, 32, 32), Tokenizer.clip(vocab)(['a dog'])
    released, other = to_openclip(model.state_dict()), to_openclip(plain.state_dict())
    marked = lambda prefix: {prefix + key: value for key, value in released.items()}
    def load(state, weights='teacher'):
        torch.save(state, tmp_path / 'saved')
        return evaluation.load(tmp_path / 'saved', weights, vocab=vocab)
    for state, weights, origin, source in [
            ({'student': other, 'teacher': released}, 'teacher', 'teacher', model),
            ({'student': other, 'teacher': released}, 'student', 'student', plain),
            ({'student': other}, 'teacher', 'student', plain),          # what it says must be what it scored
            ({'teacher': marked('module.')}, 'teacher', 'teacher', model),
            ({'state_dict': marked('_orig_mod.module.')}, 'teacher', 'state_dict', model),
            (other, 'teacher', 'state dict', plain)]:
        loaded, tokenizer, _ = load(state, weights)
        assert (loaded.config, tokenizer.vocab_size) == (source.config, 49408) and loaded.origin == origin
        close(loaded.encode_image(image)[0], source.encode_image(image)[0], 1e-6)
        close(loaded.encode_text(tokens)[0], source.encode_text(tokens)[0], 1e-6)
    refused('4 missing', load, {key: value for key, value in released.items() if 'ln_q' not in key})
    refused('QuickGELU', load, {**other, 'input_resolution': torch.tensor(224)})
    refused('open_clip ViT', load, {'visual.conv1.weight': image, 'positional_embedding': image})       # a ResNet
    evaluation.export(model, tmp_path / 'clip.pt')
    written = torch.load(tmp_path / 'clip.pt', weights_only=True)
    assert written.keys() == other.keys() and all(torch.equal(written[key], released[key]) for key in written)


def test_segmentation_by_hand(monkeypatch):
    """oracle: numpy's interp, row by row and column by column of each window, on a size that no stride fits; then six
    pixels decided by pencil: synonyms, probability and area thresholds, IoU."""
    model, (W, H) = micro()[0].eval(), (47, 37)
    pixels, vectors = torch.randn(3, H, W), F.normalize(torch.randn(5, 16), dim=-1)
    at = (np.arange(32) + 0.5) * 4 / 32 - 0.5                           # of 32 pixels in a row of 4 patches
    share = torch.tensor(np.stack([np.interp(at, range(4), one) for one in np.eye(4)], axis=1)).float()     # (32, 4)
    for csa in (False, True):
        total, count = torch.zeros(5, H, W), torch.zeros(H, W)
        for y, x in [(y, x) for y in (0, 5) for x in (0, 12, 15)]:      # the last windows end at the border
            grid = model.encode_dense(pixels[None, :, y:y + 32, x:x + 32], csa)[0] @ vectors.T              # (4, 4, 5)
            total[:, y:y + 32, x:x + 32] += torch.einsum('yv,xu,vuq->qyx', share, share, grid)
            count[y:y + 32, x:x + 32] += 1
        close(evaluation.window_scores(model, pixels, vectors, 32, 12, csa), total / count)
    # names: ground | ape, monkey | ox. Softmax at scale ln 3 and cosines 0 or 1: one name at 1 of 4 gets 3/6.
    scores = torch.tensor([[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 1], [0, 0, 1, 1, 0, 1], [0, 0, 0, 0, 1, 0.0]])
    monkeypatch.setattr(evaluation, 'window_scores', lambda *a: scores.view(4, 2, 3))
    settings, image = evaluation.Settings(2, math.log(3), 0, 0, False, 2, 1), Image.new('RGB', (3, 2))
    segment = lambda **changes: evaluation.segment_image(
        model, image, vectors, [1, 2, 1], settings._replace(**changes)).flatten().tolist()
    assert segment() == [0, 1, 1, 1, 2, 1]                              # monkey is ape
    assert segment(probability=0.4) == [0, 1, 1, 1, 2, 0]               # two names share: 3/8 each
    assert segment(area=0.2) == [0, 1, 1, 1, 0, 1]                      # ox has 1 of 5 foreground pixels, no more
    assert segment(area=0.19) == [0, 1, 1, 1, 2, 1]
    matrix = evaluation.confusion(torch.tensor([0, 1, 1, 255, 3, 0]), torch.tensor(segment()), 5)
    figures = evaluation.segmentation_figures(matrix, ['ground', 'ape', 'ox', 'cow', 'absent'])
    assert figures == {'IoU': {'ground': 1 / 2, 'ape': 2 / 3, 'ox': 0, 'cow': 0}, 'mIoU': pytest.approx(7 / 24),
                       'pixel_accuracy': 3 / 5, 'classes': 3, 'all_class_0_mIoU': pytest.approx(2 / 5 / 3),
                       'all_class_0_pixel_accuracy': 2 / 5}             # ox is found only, cow is there only


def test_masks_and_their_errors(tmp_path):
    """oracle: masks written here; what is wrong with one names its file and says what."""
    gray = Image.fromarray(np.array([[0, 1, 255], [2, 2, 0]], np.uint8))
    palette = Image.frombytes('P', (3, 2), gray.tobytes())
    palette.putpalette(list(range(256)) * 3)
    for name, image in (('a.png', gray), ('p.png', palette), ('colour.png', gray.convert('RGB'))):
        image.save(tmp_path / name)
    for name in ('a.png', 'p.png'):
        assert evaluation.read_mask(tmp_path / name, (3, 2), 3).tolist() == [[0, 1, 255], [2, 2, 0]]
        assert evaluation.read_mask(tmp_path / name, (3, 2), 2, True).tolist() == [[255, 0, 255], [1, 1, 255]]
    for name, size, classes, told in [('a.png', (3, 2), 2, 'a.png has label 2, the class file names 0 to 1'),
                                      ('a.png', (2, 3), 3, 'a.png is 3 x 2 pixels, its image 2 x 3'),
                                      ('colour.png', (3, 2), 3, 'colour.png has colours'),
                                      ('x.png', (3, 2), 3, 'x.png')]:
        refused(told, evaluation.read_mask, tmp_path / name, size, classes)
    for name in ('images/s/a_rgb.jpg', 'images/s/b_rgb.jpg', 'masks/s/a_ids.png', 'masks/s/a_colour.png', 'list.txt'):
        put(tmp_path / name, 'a\nb\n')
    arguments = tmp_path / 'images', tmp_path / 'masks', '_rgb', '_ids'
    assert [tuple(p.name for p in pair) for pair in evaluation.mask_pairs(*arguments)] == [('a_rgb.jpg', 'a_ids.png')]
    refused('b_ids.png', evaluation.mask_pairs, *arguments, listing=tmp_path / 'list.txt')
    (tmp_path / 'images/s/a_rgb.jpg').unlink()
    refused('a_ids.png', evaluation.mask_pairs, *arguments)
    for name in ('images/s/a_rgb.jpg', 'images/t/a_rgb.jpg'):
        put(tmp_path / name)
    refused('s/a_rgb.jpg and .*t/a_rgb.jpg have one name', evaluation.mask_pairs, *arguments)


def test_pairs_by_hand_and_published_rows(tmp_path, monkeypatch):
    """oracle: Winoground's three scores by pencil, ties as misses; rows as each set publishes them; probes by hand."""
    table, yes, no = lambda *rows: torch.tensor(rows), [True, True], [False, True]
    right, image, text = table((2.0, 1), (1, 2)), table((2.0, 3), (1, 4)), table((2.0, 1), (3, 4))
    tie = table((1.0, 1), (1, 1))
    assert [evaluation.pair_hits(m) for m in (right, image, text, tie)] == [
        (yes, yes), (yes, no), (no, yes), ([False, False], [False, False])]
    assert evaluation.pair_scores([right, image, text, tie]) == {
        'items': 4, 'image_score': 0.5, 'image_chance': 0.25, 'text_score': 0.5, 'text_chance': 0.25,
        'group_score': 0.25}
    assert evaluation.pair_scores([table((3.0, 1, 2)), table((1.0, 0, 2))]) == {
        'items': 2, 'text_score': 0.5, 'text_chance': pytest.approx(1 / 3)}
    assert evaluation.pair_scores([table((3.0,), (1.0,))]) == {'items': 1, 'image_score': 1.0, 'image_chance': 0.5}
    rows = lambda name, text: evaluation.read_pairs(put(tmp_path / name, text))
    line = json.dumps({'images': ['a.jpg'], 'captions': ['x', 'y'], 'type': 't'})
    assert rows('own.jsonl', line + '\n\n' + line) == [(['a.jpg'], ['x', 'y'], 't')] * 2
    assert rows('crepe.json', {'0': {'filename': 'a.jpg', 'caption': 'x', 'negative_caption': 'y'}}) == [
        (['a.jpg'], ['x', 'y'], None)]
    assert rows('wino.jsonl', {'id': 0, 'image_0': 'a', 'image_1': 'b', 'caption_0': 'x', 'caption_1': 'y',
                               'tag': 'Object'}) == [(['a', 'b'], ['x', 'y'], 'Object')]
    assert rows('svo.csv', 'sentence,pos_image_id,neg_image_id,subj_neg,verb_neg,obj_neg\nx,7,8,False,True,False') == [
        (['7', '8'], ['x'], 'verb_neg')]
    assert rows('Questions.csv', 'Question ID,Type,Statement\n1,Color,red\n2,Color,blue\n') == [
        (['Color/1', 'Color/2'], ['a photo of red', 'a photo of blue'], 'Color')]
    refused('item 1 of .*a.jsonl has the keys image;', rows, 'a.jsonl', '{"image": "a"}')
    refused('b.jsonl', rows, 'b.jsonl', '{')
    refused('2 images and 3 captions', rows, 'c.jsonl', '{"images": [1, 2], "captions": ["x", "y", "z"]}')
    # Two probes; a feature is one number a picture, one a name, and the score their product.
    query = lambda right, swap: {'positive': right, 'swap': swap, 'negatives': ['no']}
    put(tmp_path / 'probes.json', [
        {'images': {'A': 'a', 'B': 'b', 'C': 'c'}, 'dominant_query': query('good', 'bad'), 'small_query': query(*small)}
        for small in (('good', 'bad'), ('bad', 'good'))])
    values = {'a': 1.0, 'b': -1, 'c': -1, 'good': 1, 'bad': -1, 'no': 0}
    known = lambda names: torch.tensor([[float(values[name])] for name in names])
    monkeypatch.setattr(evaluation, 'embed_images', lambda m, paths, p, workers: known(path.stem for path in paths))
    monkeypatch.setattr(evaluation, 'embed_texts', lambda m, t, texts: known(texts))
    figures = evaluation.suppression(None, None, None, tmp_path)
    for role, right, error in (('dominant', 1.0, 0), ('small', 0.5, pytest.approx(0.5))):
        assert (figures[role]['scene_top1'], figures[role]['name_top1']) == (right, right)
        assert figures[role]['standard_error'] == error


def test_search_refreshes_what_changed(tmp_path, monkeypatch, capsys):
    """oracle: features without a cache, and the list of files that were embedded: only new or changed ones, ever."""
    folder, asked, embed = tmp_path / 'photos', [], evaluation.embed_labelled
    for name in ('b/one.png', 'two.png', 'bad.jpg', 'note.txt'):
        put(folder / name, picture('PNG') if name.endswith('png') else b'no image')
    monkeypatch.setattr(evaluation, 'embed_labelled', lambda model, source, *rest, **more: (
        asked.append([path.name for path in source]), embed(model, source, *rest, **more))[1])
    model, preprocess = micro()[0].eval(), data.Preprocess(32)
    def found(names, embedded, model=model):
        asked.clear()
        paths, features = evaluation.folder_features(model, preprocess, folder)
        assert [path.name for path in paths] == names and asked == embedded
        close(features, evaluation.embed_images(model, paths, preprocess))
    found(['one.png', 'two.png'], [['one.png', 'bad.jpg', 'two.png']])
    assert 'bad.jpg is no readable image' in capsys.readouterr().out
    put(folder / 'two.png', picture('PNG', 'blue'))
    put(folder / 'three.png', picture())
    found(['one.png', 'three.png', 'two.png'], [['bad.jpg', 'three.png', 'two.png']])      # bad is tried again
    (folder / 'b/one.png').unlink()
    found(['three.png', 'two.png'], [['bad.jpg']])
    found(['three.png', 'two.png'], [['bad.jpg', 'three.png', 'two.png']], micro(seed=1)[0].eval())     # other weights
    cache = tmp_path / 'photos.features.pt'
    cache.write_bytes(cache.read_bytes()[:500])                         # torn: made anew
    put(folder / '.thumbs/two.png', picture())
    found(['three.png', 'two.png'], [['bad.jpg', 'three.png', 'two.png']])
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [cache.name]


@pytest.mark.parametrize('decoder', [data.decode_image, None])
def test_pictures_are_seen_as_in_training(monkeypatch, tmp_path, decoder):
    """oracle: the decoder of training, with torchvision's and without, for kinds of image that could look different."""
    monkeypatch.setattr(data, 'decode_image', decoder)
    ramp = Image.fromarray(np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32))
    exif = Image.Exif()
    exif[0x112] = 6                                                     # turned by 90 degrees
    colour = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 40).convert('RGB')
    for name, value in (('grey16.png', encoded(ramp)), ('turned.png', encoded(colour, exif=exif)),
                        ('cmyk.jpg', encoded(colour.convert('CMYK'), 'JPEG'))):
        seen = evaluation.read_picture(put(tmp_path / name, value)).convert('RGB')
        assert data.v2.functional.pil_to_tensor(seen).equal(data.decode(value)), name


@pytest.fixture
def gallery(tmp_path, capsys):
    """Three pictures, a checkpoint that spells, and command(name, *flags) -> eval.py's figures and what it told."""
    (model, tokenizer), checkpoint = spelling_model(), put(tmp_path / 'runs/tiny-cosmos/last.pt')
    torch.save({'config': vars(model.config), 'merges': [], 'student': model.state_dict()}, checkpoint)
    fractals = [Image.effect_mandelbrot((50, 40), (-2 + i, -1, 1, 1), 40).convert('RGB') for i in range(3)]
    paths = [put(tmp_path / f'images/{i}.jpg', encoded(image, 'JPEG')) for i, image in enumerate(fractals)]
    def command(name, *argv):
        figures = tmp_path / 'figures.json'
        assert run(evaluation, name, checkpoint, *argv, '--workers', 0, '--json', figures) is None
        return json.loads(figures.read_text()), capsys.readouterr().out
    return SimpleNamespace(model=model, tokenizer=tokenizer, paths=paths, images=['--images', tmp_path / 'images'],
                           features=evaluation.embed_images(model, paths, data.Preprocess(32)), command=command,
                           words=lambda *texts: evaluation.embed_texts(model, tokenizer, texts))


def test_every_command_of_eval(monkeypatch, tmp_path, scenes, gallery, capsys):
    """oracle: the functions that the tests above check, on the same input; pictures open, README's snippet runs."""
    model, tokenizer, paths, images, features, command, words = vars(gallery).values()
    striped = encoded(Image.fromarray(np.arange(2000, dtype=np.uint8).reshape(40, 50) % 2))
    masks = [put(tmp_path / f'masks/{i}.png', striped) for i in range(3)]
    figures, told = command('segment', *images, '--masks', tmp_path / 'masks', '--classes',
                            put(tmp_path / 'classes.txt', 'ground, sky\nox\n'), '--benchmark', 'voc21', '--size', 40,
                            '--area', 0, '--save', tmp_path / 'seen')
    assert json.loads(figures['settings']) == {'size': 40, 'scale': 65, 'probability': 0.1, 'area': 0.0,
                                               'reduce_zero_label': False, 'window': 32, 'stride': 16, 'csa': False}
    vectors, matrix = evaluation.class_vectors(model, tokenizer, ['ground', 'sky', 'ox']), 0
    settings = evaluation.Settings(**json.loads(figures['settings']))
    for path, mask in zip(paths, masks):
        labels = evaluation.segment_image(model, Image.open(path), vectors, [2, 1], settings)
        matrix = matrix + evaluation.confusion(evaluation.read_mask(mask, (50, 40), 2), labels, 2)
    assert figures['mIoU'] == evaluation.segmentation_figures(matrix, ['ground', 'ox'])['mIoU'] and 'IoU' in told
    assert Image.open(tmp_path / 'seen/2.png').size == (270, 52)
    item = {'images': ['0', '1'], 'captions': ['an ox', 'a cat'], 'type': 'big'}
    figures, _ = command('pairs', '--items', put(tmp_path / 'items.jsonl', item), *images)
    scores = features[:2] @ words('an ox', 'a cat').T
    assert figures['all 2 x 2'] == figures['big 2 x 2'] == evaluation.pair_scores([scores])
    figures, told = command('search', 'an ox', *images, '--out', tmp_path / 'found.png')
    scores, order = (features @ words('an ox')[0]).sort(descending=True)
    lines = [line.split() for line in told.splitlines()[1:4]]
    assert [path for _, path in lines] == [str(paths[i]) for i in order]
    assert [float(score) for score, _ in lines] == pytest.approx(scores.tolist(), abs=1e-4)
    _, told = command('search', '--like', paths[2], *images, '--top', 1, '--out', tmp_path / 'found.png')
    assert str(paths[2]) in told and '1.0000' in told and Image.open(tmp_path / 'found.png').size[0] > 1000
    flickr = put(tmp_path / 'flickr.json', [{'image': f'{i}.jpg', 'caption': [f'{i}', 'ox']} for i in range(3)])
    figures, _ = command('retrieval', '--flickr', flickr, *images)
    want = evaluation.retrieval(features, words('0', 'ox', '1', 'ox', '2', 'ox'), torch.tensor([0, 0, 1, 1, 2, 2]))
    assert want.items() <= figures.items()
    figures, _ = command('export', tmp_path / 'clip.pt')
    heads = re.compile('(image|text)_(cross|tokens)|distill')
    assert figures['parameters'] == sum(p.numel() for name, p in model.named_parameters() if not heads.match(name))
    command('attend', '--image', paths[0], '--text', 'an ox', '--out', tmp_path / 'seen.png')
    assert Image.open(tmp_path / 'seen.png').mode == 'RGB'
    figures, _ = command('attend', '--shards', scenes / 'val')
    want = evaluation.pointing(model, tokenizer, data.Preprocess(32), data.Shards(scenes / 'val'))
    assert want.items() <= figures.items()
    readme = (HERE / 'README.md').read_text(encoding='utf-8')
    (snippet,) = re.findall(r'```python\n(import torch\n.*?)```', readme, re.S)
    monkeypatch.chdir(tmp_path)
    shutil.copy(paths[0], 'photo.jpg')
    exec(snippet, {})
    assert capsys.readouterr().out.strip() == str(features[:1] @ words('a red star', 'a blue ring').T)


def test_classify_of_every_source(tmp_path, scenes, gallery):
    """oracle: the functions that the tests above check, on the same images; the picture opens."""
    model, tokenizer, paths, images, features, command, words = vars(gallery).values()
    prompts, shards = put(tmp_path / 't.txt', 'my {}'), data.Shards(scenes / 'val')
    figures, told = command('classify', '--shards', scenes / 'val', '--picture', tmp_path / 'names.png', '--templates',
                            prompts)
    seen = evaluation.embed_images(model, shards, data.Preprocess(32))
    assert evaluation.classify_objects(model, tokenizer, seen, shards, ['my {}']).items() <= figures.items()
    assert figures['small'].keys() >= {'top1', 'probe_top1', 'of_dominant'} and 'probe_top1' in told
    assert Image.open(tmp_path / 'names.png').mode == 'RGB'
    for i, name in enumerate(('an_ox', 'a_cat', 'an_ox')):
        put(tmp_path / f'classes/{name}/{i}.jpg', paths[i].read_bytes())
    figures, _ = command('classify', '--folder', tmp_path / 'classes', '--templates', prompts)
    want = evaluation.classify(features[[1, 0, 2]], words('my a cat', 'my an ox'), torch.tensor([0, 1, 1]))
    assert want.items() <= figures.items() and figures['prompts'] == 'my {}'
    for name in ('images/woven/0.jpg', 'images/banded/1.jpg', 'labels/test1.txt'):              # torchvision's DTD
        put(tmp_path / 'dtd/dtd' / name, paths[int(name[-5])].read_bytes() if name[-1] == 'g' else
            'woven/0.jpg\nbanded/1.jpg\n')
    source, names, split = evaluation.torchvision_set('dtd', tmp_path)
    found, labels = evaluation.embed_labelled(model, source, data.Preprocess(32))
    assert (names, split) == (['banded', 'woven'], 'test') and labels.tolist() == [1, 0]
    close(found, features[:2])
    figures, told = command('classify', '--dataset', 'dtd', '--root', tmp_path)
    want = evaluation.classify(found, evaluation.class_vectors(model, tokenizer, names), labels)
    assert want.items() <= figures.items() and 'mean_per_class_top1' in told


# --- train.py, end to end --------------------------------------------------------------------------------------------

def test_schedules_and_decay():
    """oracle: closed forms at the corners of warm-up, cosine and ramp; the paper's settings; and the rule that matrices
    decay, but not LayerNorms, biases, the class token and the two scales."""
    options = train.parse_options('--steps 110 --warmup 10 --lr 1 --lr-end 0 --momentum 0.9 --momentum-ramp 3'.split())
    assert [train.lr_at(step, options) for step in (0, 9, 60, 110)] == pytest.approx([0.1, 1.0, 0.5, 0])
    options.lr_end = 0.2
    assert [train.lr_at(step, options) for step in (60, 110)] == pytest.approx([0.6, 0.2])
    assert [train.momentum_at(step, options) for step in (0, 2, 99)] == [0.25, 0.5, 0.9]
    options.momentum_ramp = 0
    assert train.momentum_at(0, options) == 0.9
    paper = train.parse_options(['--data', 'x'])
    assert {'preset': 'vit-b-16', 'batch': 1024, 'lr': 5e-4, 'wd': 0.5, 'warmup': 2000, 'epochs': 32, 'momentum': 0.999,
            'momentum_ramp': 0, 'lr_end': 0}.items() <= vars(paper).items()
    model = micro()[0]
    decay, free = train.make_optimizer(model, train.parse_options(['--wd', '0.3']), CPU).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decay['weight_decay'], free['weight_decay']) == (0.3, 0.0)
    assert (decay['betas'], decay['eps']) == ((0.9, 0.98), 1e-8)
    assert {'logit_scale', 'distill_logit_scale', 'visual.class_embedding', 'visual.ln_pre.weight'} <= {
        names[id(p)] for p in free['params']}
    assert all(p.ndim >= 2 for p in decay['params']) and len(names) == len(decay['params']) + len(free['params'])


@pytest.mark.parametrize('most, share', [(0, 1), (2, 0.4), (9, 1)])
def test_gradients_are_clipped_by_their_norm(most, share):
    """oracle: plain gradient descent by hand, of a gradient of norm 5: clipped to 2, to 9, and not at all."""
    model, options = micro('clip')[0], train.parse_options(f'--clip-grad {most} --warmup 0 --lr 0.5'.split())
    before = [p.detach().clone() for p in model.parameters()]
    gradient = torch.randn(sum(p.numel() for p in before))
    gradient = (5 * F.normalize(gradient, dim=0)).split([p.numel() for p in before])
    for p, g in zip(model.parameters(), gradient):
        p.grad = g.view_as(p).clone()
    plan = SimpleNamespace(options=options, optimizer=torch.optim.SGD(model.parameters(), 1), model=model, step=0,
                           teacher=None, scaler=torch.amp.GradScaler('cpu', enabled=False))
    train.update(plan, torch.tensor(5.0))
    for p, old, g in zip(model.parameters(), before, gradient):
        close(p.detach(), old - 0.5 * share * g.view_as(p))
    assert plan.step == 1
    model.logit_scale.data.fill_(9.0)                                   # beyond its bound
    train.update(plan, torch.tensor(5.0))
    assert model.logit_scale.item() == pytest.approx(math.log(100))


def test_a_run_leaves_everything(whole, scenes, tmp_path):
    """oracle: the list of design: files, log fields; chances by arithmetic; eval.py's score of the checkpoint."""
    assert all((whole / name).stat().st_size for name in (
        'last.pt', 'log.jsonl', 'config.json', 'samples.png', 'attention.png', 'strip.png', 'eval.json'))
    first, *_ = entries = read_log(whole)
    assert {'step', 'loss', 'clip', 'cosmos', 'h_I_cls', 'h_I_eot', 'h_T_cls', 'h_T_eot', 'chance', 'logit_scale', 'lr',
            'momentum', 'distill_logit_scale', 'grad_norm', 'accuracy', 'spread', 'teacher_cosine', 'samples_per_s',
            'data_share', 'memory_GiB'} <= first.keys()
    assert first['loss'] == pytest.approx(first['clip'] + first['cosmos'], rel=1e-5)
    assert [first[key] for key in ('lr', 'momentum', 'logit_scale')] == pytest.approx([1e-3 / 30, 1 / 11, 1 / 0.07])
    assert first['teacher_cosine'] == pytest.approx(1, abs=0.01)        # a copy of the student still
    assert first['chance'] == math.log(4) and [e['step'] for e in entries if 'eval' in e] == [5]
    figures, told = json.loads((whole / 'eval.json').read_text()), (whole / 'told').read_text()
    assert figures['steps'] == 6 and figures['retrieval']['chance'] == 1 / 12 and figures['retrieval']['captions'] == 60
    assert figures['dominant']['chance'] == figures['small']['chance'] == 0.1
    assert all(word in told for word in ('40 pairs in 1 shards', '12 held out', 'parameters', 'min left', 'chance'))
    again = tmp_path / 'again.json'
    assert run(evaluation, 'retrieval', whole / 'last.pt', '--shards', scenes / 'val', '--json', again) is None
    assert figures['retrieval'].items() <= json.loads(again.read_text()).items()


def test_it_learns(fit, tmp_path):
    """oracle: guessing, ln 8, where both losses start: 150 steps on 40 pairs take each below three quarters of it."""
    assert fit(tmp_path, *'--steps 150 --batch 8 --lr 3e-3'.split()) == 0
    entries = read_log(tmp_path)
    for name in ('clip', 'cosmos'):
        start, end = (np.mean([entry[name] for entry in some]) for some in (entries[:3], entries[-10:]))
        assert end < 0.75 * math.log(8) < 1.2 * start


@pytest.mark.parametrize('method, workers', [('cosmos', 0), ('cosmos', 2), ('clip', 0), ('image-distill', 0)])
def test_resume_is_exact(monkeypatch, fit, whole, tmp_path, method, workers):
    """oracle: the run that was not interrupted, read by the main process: weights, optimizer, teacher and log."""
    flags, step = [*SIX, '--method', method, '--workers', workers], train.forward_backward
    if method != 'cosmos':
        whole = tmp_path / 'whole'
        assert fit(whole, *flags) == 0
    def interrupted(run, batch):
        if run.step == 3 and run.options.resume is None:
            for pid in [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]:
                os.kill(pid, signal.SIGTERM)                            # to the whole group, as torchrun and Slurm do
        return step(run, batch)
    monkeypatch.setattr(train, 'forward_backward', interrupted)
    assert fit(tmp_path / 'two', *flags) == 128 + signal.SIGTERM and saved(tmp_path / 'two')['step'] == 4
    assert fit(tmp_path / 'two', *flags, '--resume', 'auto') == 0
    same_run(whole, tmp_path / 'two')


@pytest.mark.parametrize('workers', [0, 2])
def test_kills_at_random_moments(fit, tmp_path, scenes, workers):
    """oracle: the run that nobody killed, bit by bit. SIGKILL in each third; COSMOS_KILLS sets how many times over."""
    code = 'import test_cosmos, data, train; data.cli(train.main)'      # knows the micro preset
    flags = f'--steps 12 --save-every 1 --workers {workers} --resume auto'.split()
    command = [sys.executable, '-c', code, '--data', str(scenes), *QUICK, *flags, '--out']
    start = lambda out: subprocess.Popen([*command, out], cwd=HERE, text=True, stdout=subprocess.PIPE,
                                         stderr=subprocess.STDOUT, start_new_session=True)
    assert fit(tmp_path / 'whole', *flags) == 0
    rng = random.Random()
    for trial in range(int(os.environ.get('COSMOS_KILLS', 1))):
        out = tmp_path / f'killed{trial}'
        for third in range(3):
            child, seen = start(out), 4 * third + rng.randint(0, 3)
            while not (out / 'log.jsonl').exists() or (out / 'log.jsonl').read_bytes().count(b'\n') < seen:
                assert child.poll() is None, child.communicate()[0]
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
        assert 'holds last.pt' in start(out).communicate()[0]
        same_run(tmp_path / 'whole', out)


def test_torn_checkpoints_and_full_disks(monkeypatch, fit, whole, tmp_path, capsys):
    """oracle: the run without mishap: a torn last.pt falls back to previous.pt, a full disk leaves the old one."""
    torn, full, flags = tmp_path / 'torn', tmp_path / 'full', [*SIX, '--resume', 'auto']
    shutil.copytree(whole, torn)
    put(torn / 'last.pt', (torn / 'last.pt').read_bytes()[:10_000])     # so short that torch raises OSError
    assert fit(torn, *flags) == 0
    assert 'WARNING' in (told := capsys.readouterr().out) and 'steps 4 to 6' in told
    same_run(whole, torn)
    assert 'was trained with --method cosmos, not clip' in fit(torn, *flags, '--method', 'clip')
    for name in ('last.pt', 'previous.pt'):
        put(torn / name)
    assert 'previous.pt is no checkpoint' in fit(torn, *flags)
    write = torch.save
    def save(state, file):
        if state['step'] > 2:
            file.write(b'half')
            raise OSError(28, 'No space left on device')
        write(state, file)
    with monkeypatch.context() as patch:
        patch.setattr(torch, 'save', save)
        told = fit(full, *flags)
    assert told.startswith('error: step 6 could not be saved') and 'No space left' in told
    assert 'WARNING    step 4 could not be saved' in capsys.readouterr().out
    assert saved(full)['step'] == 2 and not list(full.glob('*.partial'))
    assert fit(full, *flags) == 0
    same_run(whole, full)
    save = train.Run.save
    with monkeypatch.context() as patch:                                # killed right behind its first checkpoint
        patch.setattr(train.Run, 'save', lambda run, must=True: (save(run, must), sys.exit('killed')))
        assert fit(tmp_path / 'behind', *SIX) == 'killed' and saved(tmp_path / 'behind')['step'] == 2
    assert fit(tmp_path / 'behind', *flags) == 0
    same_run(whole, tmp_path / 'behind')
    with monkeypatch.context() as patch:                                # a fresh start, killed before its first save
        patch.setattr(train, 'train', lambda run: sys.exit('killed'))
        assert fit(full, *SIX) == 'killed' and (full / 'before.pt').exists()
    capsys.readouterr()
    assert fit(full, *flags) == 0 and 'steps 0 to 6' in capsys.readouterr().out         # not from the run before
    with monkeypatch.context() as patch:                                # a signal while the last checkpoint is written
        patch.setattr(torch, 'save', lambda state, file: (write(state, file), state['step'] == 6 and os.kill(
            os.getpid(), signal.SIGTERM)))
        assert fit(tmp_path / 'end', *SIX, '--save-every', 4) == 128 + signal.SIGTERM
    assert not (tmp_path / 'end/eval.json').exists()
    with open(tmp_path / 'end/log.jsonl', 'a') as file:                 # a full disk cut a line short
        file.write('{"step": 3, "lo\n')
    assert fit(tmp_path / 'end', *flags) == 0 and (tmp_path / 'end/eval.json').exists()
    same_run(whole, tmp_path / 'end')
    old, elsewhere = (full / 'last.pt').read_bytes(), ['--resume', whole / 'previous.pt']       # another run's
    assert 'not clip' in fit(full, *SIX, *elsewhere, '--method', 'clip') and (full / 'last.pt').read_bytes() == old
    assert fit(full, *SIX, *elsewhere) == 0 and (full / 'before.pt').read_bytes() == old
    assert not (full / 'previous.pt').exists() and [entry['step'] for entry in read_log(full)] == [5, 6]
    shutil.copy(whole / 'log.jsonl', full)
    same_run(whole, full)
    shutil.copy(whole / 'previous.pt', full)
    assert fit(full, *SIX, '--resume', full / 'previous.pt') == 0 and (full / 'before.pt').read_bytes() == old
    same_run(whole, full)
    shutil.copy(whole / 'previous.pt', full / 'last.pt')
    capsys.readouterr()
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')               # torchrun --max-restarts, without --resume
    assert fit(full, *SIX) == 0 and 'steps 4 to 6' in capsys.readouterr().out
    same_run(whole, full)


def test_a_failed_evaluation_ends_no_run(monkeypatch, fit, whole, tmp_path, capsys):
    """oracle: the run whose evaluations went well: the same weights."""
    def fail(*some):
        raise RuntimeError('out of luck')
    monkeypatch.setattr(evaluation, 'evaluate', fail)
    assert fit(tmp_path / 'unlucky', *SIX) == 0
    told = capsys.readouterr().out
    assert told.count('not evaluated to the end: RuntimeError, out of luck') == 2 and 'nothing' in told
    one, two = saved(whole), saved(tmp_path / 'unlucky')
    assert all(torch.equal(one['student'][name], two['student'][name]) for name in one['student'])


def test_a_defect_ends_the_process(tmp_path, scenes):
    """oracle: the clock: neither bad input nor a signal, while loader workers, who ignore signals, wait for work."""
    code = 'import test_cosmos, data, train; train.losses = lambda *some: 1 / 0; data.cli(train.main)'
    flags = ['--data', scenes, *QUICK, '--workers', '1', '--out', tmp_path]
    ended = subprocess.run([sys.executable, '-c', code, *map(str, flags)], cwd=HERE, text=True, capture_output=True,
                           timeout=120)
    assert ended.returncode == 1 and 'ZeroDivisionError' in ended.stderr


def test_half_precision_with_a_scaler(fit, tmp_path):
    """oracle: the float32 run: the loss of its first step. The scaler's state is saved and read again."""
    for name in ('fp32', 'fp16'):
        assert fit(tmp_path / name, '--steps', 3, '--precision', name) == 0
    full, half = (read_log(tmp_path / name) for name in ('fp32', 'fp16'))
    assert full[0]['loss'] == pytest.approx(half[0]['loss'], rel=0.01)
    assert len(half) == 3 and all(math.isfinite(entry['loss']) for entry in half)
    scale = saved(tmp_path / 'fp16')['scaler']['scale']
    assert fit(tmp_path / 'fp16', '--steps', 4, '--precision', 'fp16', '--resume', 'auto', '--wd', 0.3) == 0
    last = saved(tmp_path / 'fp16')
    assert last['scaler']['scale'] == scale > 1
    assert [group['weight_decay'] for group in last['optimizer']['param_groups']] == [0.3, 0.0]


def test_what_is_skipped_and_what_stops_a_run(monkeypatch, fit, tmp_path):
    """oracle: the share of pairs broken on purpose, below and above 5 %; losses made NaN in chosen steps, few in a row
    skipped without a trace, more not; a rank that stands at another step, by an all_reduce that answers for it."""
    for bad in (5, 20):
        write_tar(tmp_path / 'a.tar', dogs(120, no_image=range(bad)))
        told = fit(tmp_path / str(bad), '--data', tmp_path / 'a.tar', '--steps', 25)
        assert told == 0 if bad == 5 else 'over 5 % of the pairs cannot be read' in told
        assert 0 < saved(tmp_path / str(bad))['step'] <= 25             # what was learnt is kept
    losses = train.losses
    def broken(out, steps, *flags):
        with monkeypatch.context() as patch:
            patch.setattr(train, 'losses', lambda run, *rest: [
                x * (math.nan if run.step in steps else 1) for x in losses(run, *rest)])
            told = fit(out, '--steps', 8, '--max-skipped', 2, *flags)
        assert all(torch.isfinite(x).all() for x in saved(out)['student'].values())
        return told, saved(out)
    told, state = broken(tmp_path / 'half', {2, 5}, '--precision', 'fp16')
    assert told == 0 and state['step'] == 8
    told, state = broken(tmp_path / 'few', {2, 3, 5})
    assert told == 0 and state['step'] == 8
    assert {int(moments['step']) for moments in state['optimizer']['state'].values()} == {5}
    assert [entry['step'] for entry in read_log(tmp_path / 'few') if entry['loss'] is None] == [3, 4, 6]
    told, state = broken(tmp_path / 'many', {2, 3, 4, 5})
    assert 'not finite in step 5, 3 steps in a row' in told and '"logit_scale"' in told and '\n' not in told
    assert state['step'] == 4
    own = SimpleNamespace(step=3, options=SimpleNamespace(steps=9), shards=[0] * 5, config=MICRO, world=2, device='cpu')
    check, behind = train.Run.check_agreement, torch.zeros(4, dtype=torch.long)
    monkeypatch.setattr(dist, 'all_reduce', lambda x, op: x.sub_(behind) if op == dist.ReduceOp.MIN else x)
    check(own)
    behind[0] = 3
    refused(r'\[0, 9, 5, 50\] and \[3, 9, 5, 50\]; let all nodes see the same', check, own)


@pytest.mark.parametrize('method', train.METHODS)
def test_flops_and_bench(monkeypatch, method, scenes, capsys):
    """oracle: torch's own counter, around the calls that --bench times; of its lines, that the parts add up."""
    model, images, texts = micro(method)
    plan, found = SimpleNamespace(method=train.METHODS[method], device=CPU), {}
    teacher = Teacher(model) if plan.method.terms else None
    images = images[:plan.method.images] + images[2:] * plan.method.crops
    texts = torch.stack(texts[2 - plan.method.captions:2] + texts[2:] * plan.method.sentences)
    cut, short = train.cuts(data.Batch([], [], texts, texts.argmax(dim=-1), 0), plan.method, None)
    taught = texts[:2 * plan.method.teaches_text]
    def counted(name, call):
        with FlopCounterMode(display=False) as counter:
            result = call()
        found[name] = counter.get_total_flops()
        return result
    out = counted('student', lambda: model(images, texts, cut))
    target = counted('teacher', lambda: teacher(images[:2], taught, short) if teacher else ())
    loss = counted('losses', lambda: train.losses(plan, out, target, train.scales_of(model))[0])
    counted('backward', loss.backward)
    sides = [tuple(view.shape[-2:]) for view in images]
    assert train.count_flops(model.config, 3, sides, cut, short, plan.method) == found
    run(train, *QUICK, '--method', method, '--bench', 3, '--device', 'cpu')
    told = capsys.readouterr().out
    parts = dict(re.findall(r'^(\w[\w ]*?) +([\d.]+) ms', told, re.M))
    step, teachers = float(parts.pop('step')), {'teacher forward', 'EMA'} if teacher else set()
    assert parts.keys() == {'student forward', 'losses', 'backward', 'AdamW'} | teachers
    assert 0.5 * step < sum(map(float, parts.values())) < 1.5 * step
    speed = float(re.search(r'([\d,.]+) samples/s', told)[1].replace(',', ''))
    assert speed == pytest.approx(4000 / step, rel=0.05) and 'GFLOP/s' in told
    run(data, 'bench', scenes / 'val', '--preset', 'tiny', '--rate', 1e6, '--seconds', 0.05)
    told = capsys.readouterr().out
    monkeypatch.setattr(train, 'setup', lambda options: (0, 2, CPU))
    assert run(train, *QUICK, '--bench', 3) == 'error: --bench 3 times one process, not 2; run it without torchrun'
    speeds = [float(number.replace(',', '')) for number in re.findall(r'([\d,]+) samples/s$', told, re.M)]
    assert len(speeds) == 4 and speeds[0] > speeds[3] > 0
    assert int(re.search(r'need (\d+) workers', told)[1]) == pytest.approx(1e6 / speeds[3], rel=0.01)


def test_two_processes_log_the_same(tmp_path, scenes):
    """oracle: the single process with the same global batch, by torchrun; it goes on from the two's checkpoint."""
    line = ('--preset tiny --batch 4 --steps 3 --save-every 2 --log-every 1 --workers 0 --precision fp32 --device cpu '
            f'--data {scenes} --out').split()
    def fit(out, *resume):
        assert run(train, *line, tmp_path / out, *resume) == 0
        return read_log(tmp_path / out)
    launch = '-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc_per_node 2 train.py'.split()
    done = subprocess.run([sys.executable, *launch, *line, tmp_path / 'two'], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = fit('one'), read_log(tmp_path / 'two')
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in ('loss', 'clip', 'cosmos', 'grad_norm', 'logit_scale'):
            assert a[key] == pytest.approx(b[key], rel=2e-4), key
    (on,) = fit('on', '--resume', tmp_path / 'two/previous.pt')
    assert on['step'] == 3 and on['loss'] == pytest.approx(two[2]['loss'], rel=1e-5)


# --- What a newcomer gets wrong, and what the documents promise ------------------------------------------------------

WRONG = [               # a command, and what its sentence must name; SCENES is the small built-in set
    (train, '--batch 1', ['--batch 1', 'at least 2']),
    (train, '--seed -1', ['--seed -1', 'at least 0']),
    (train, '--momentum 2', ['--momentum 2.0', 'at most 1']),
    (train, '--steps 5 --epochs 2', ['--steps 5', '--epochs 2', 'one of them']),
    (train, '--stepz 3', ["'--stepz'", 'did you mean --steps?']),
    (train, '--preset vit-b-61', ["'vit-b-61'", 'vit-b-16']),
    (train, '--steps many', ['--steps', "'many'"]),
    (train, '--method clap', ["'clap'", 'clip, clip-aug']),
    (train, '--caption-pool raw --caption-keys a', ['--caption-keys a', '--caption-pool raw', 'one of them']),
    (train, '--data brief.tar --preset tiny --aligned-crops', ['brief.tar', "'objects'", '--aligned-crops']),
    (train, '--data brief.tar --preset tiny --caption-pool long', ['brief.tar', '--caption-keys']),
    (train, '--data absent', ['absent', 'does not exist']),
    (train, '--data empty', ['empty', 'no .tar file']),
    (train, '--data silent.tar', ['silent.tar', 'alt, url', '--caption-keys']),
    (train, '--data lonely.tar', ['lonely.tar', '.json or .txt']),
    (train, '--data text.tar', ['text.tar', 'no readable tar']),
    (train, '--data SCENES --preset tiny --batch 64', ['--batch 64', '40 pairs', 'lower']),
    (train, '--data SCENES --preset tiny --vocab stub.gz', ['stub.gz', 'git-lfs', '--vocab PATH']),
    (train, '--data SCENES --preset tiny --resume other.pt', ['other.pt', 'no run to resume']),
    (evaluation, 'retrieval junk.pt --shards SCENES/val', ['junk.pt', 'no checkpoint']),
    (evaluation, 'retrieval absent.pt --shards SCENES/val', ['absent.pt', 'does not exist']),
    (evaluation, 'retrieval empty.pt --shards SCENES/val', ['empty.pt', 'no checkpoint']),
    (evaluation, 'retrieval other.pt --shards SCENES/val', ['other.pt', 'weights', 'train.py']),
    (evaluation, 'retrieval bad.pt --shards SCENES/val', ['bad.pt', 'plain values', 'where you trust it']),
    (evaluation, 'retrieval other.pt --shards x --shardz x', ['--shardz', 'did you mean --shards?']),
    (evaluation, 'retrieval nan.pt --shards SCENES/val', ['nan.pt', 'NaN', 'visual.proj', 'earlier']),
    (evaluation, 'retrieval page.pt --shards SCENES/val', ['page.pt', 'web page']),
    (evaluation, 'retrieval numbers.pt --shards SCENES/val', ['numbers.pt', 'names of weights']),
    (evaluation, 'retrieval bare.pt --shards SCENES/val', ['bare.pt', "KeyError: 'config'"]),
    (evaluation, 'retrieval odd.pt --shards SCENES/val', ['odd.pt', "visual.proj ('int',), not (24, 16)"]),
    (evaluation, 'search fine.pt x --images bad', ['no image of bad', 'can be read']),
    (evaluation, 'classify fine.pt --dataset sun397 --split trian', ["'trian'", 'no splits']),
    (evaluation, 'classify fine.pt --dataset cifar10 --split trian', ["'trian'", 'train and test']),
    (evaluation, 'retrieval fine.pt --shards broken.tar', ['broken.tar:a.jpg', 'cannot be read']),
    (evaluation, 'retrieval fine.pt --shards SCENES/val --device tpu', ['--device tpu', 'cannot be', 'cpu']),
    (evaluation, 'export fine.pt fine.pt', ['fine.pt is the checkpoint']),
    (evaluation, 'export fine.pt nowhere/a.pt', ['nowhere/a.pt cannot be written']),
    (evaluation, 'search fine.pt x --images SCENES --top 0', ['--top 0']),
    (evaluation, 'classify fine.pt --shards SCENES/val --templates empty.pt', ['empty.pt', 'no lines of text']),
    (evaluation, 'segment fine.pt --shards SCENES/val --classes c.txt --stride 0', ['--stride 0']),
    (evaluation, 'segment fine.pt --images a --masks b --classes c.txt --save b/c', ['--save b/c lies in b']),
    (evaluation, 'pairs fine.pt --items words.jsonl', ['item 1', 'words.jsonl', 'a list of captions']),
    (evaluation, 'pairs fine.pt --items empty.pt', ['empty.pt']),
    (data, 'bench SCENES/val --seconds 0', ['--seconds 0']),
    (data, 'inspect absent', ['absent', 'does not exist'])]


def test_errors_are_one_sentence(monkeypatch, tmp_path, scenes):
    """oracle: the rule: status 1, one line, with the value, the place and the remedy; also where no network is."""
    monkeypatch.chdir(tmp_path)
    Path('empty').mkdir()
    write_tar('silent.tar', [('a.jpg', picture()), ('a.json', {'alt': 'a dog', 'url': 'x'})])
    write_tar('lonely.tar', [('a.jpg', picture())])
    write_tar('brief.tar', dogs(4))
    for name, text in (('stub.gz', 'version https://git'), ('text.tar', 'no tar'), ('junk.pt', 'x'), ('empty.pt', ''),
                       ('page.pt', '<html>'), ('c.txt', 'red\nblue\n'),
                       ('words.jsonl', {'images': ['a.jpg'], 'captions': 'a dog'})):
        put(Path(name), text)
    class Malicious:
        def __reduce__(self):
            return os.system, ('touch executed',)
    torch.save({'weights': torch.zeros(1)}, 'other.pt')
    torch.save({'student': Malicious()}, 'bad.pt')
    torch.save({0: torch.zeros(1)}, 'numbers.pt')
    model, _ = spelling_model()
    fine = {'config': vars(model.config), 'merges': [], 'student': model.state_dict()}
    torch.save(fine, 'fine.pt')
    state = fine['student']
    torch.save({'student': state, 'merges': []}, 'bare.pt')
    torch.save(fine | {'student': state | {'visual.proj': 1}}, 'odd.pt')
    put(Path('bad/a.jpg'), 'x')
    torch.save(fine | {'student': state | {'visual.proj': state['visual.proj'] * math.nan}}, 'nan.pt')
    write_tar('broken.tar', [('a.jpg', picture()), ('a.json', b'{"caption": "a'), *dogs(2)])
    monkeypatch.setattr(data.Parser, 'exit', lambda self, status, told: sys.exit(told.strip() if status == 1 else 2))
    for module, line, parts in WRONG:
        told = run(module, *line.replace('SCENES', str(scenes)).split())
        assert isinstance(told, str) and told.startswith('error: ') and '\n' not in told, (line, told)
        assert all(part in told for part in parts), told
    def interrupted():
        raise KeyboardInterrupt
    assert run(SimpleNamespace(main=interrupted)) == 130                # as of a shell's Ctrl-C
    assert not Path('executed').exists()                                # what the pickle in bad.pt would have done
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.delenv('COSMOS_VOCAB', raising=False)
    for door in ('socket.socket.connect', 'socket.getaddrinfo'):
        monkeypatch.setattr(door, lambda *a, **k: (_ for _ in ()).throw(OSError('no network')))
    refused(f'be fetched into {tmp_path}.*no network.*--vocab PATH or COSMOS_VOCAB', Tokenizer.clip)
    refused('image_size 100 .* 16; choose 96', Config, image_size=100)
    refused('vision_width 100 cannot be split into 12', Config, vision_width=100)
    refused('30 x 32 pixels .* patches of 8', micro()[0].encode_image, torch.zeros(1, 3, 30, 32))


def test_documents_keep_their_promises(capsys):
    """oracle: the files. Each option has its comment as help, names in cosmos.py's docstring are defined there, and
    README's line ranges, flags and sizes are right."""
    with pytest.raises(SystemExit):
        train.parse_options(['--help'])
    told, source = ' '.join(capsys.readouterr().out.split()), (HERE / 'train.py').read_text(encoding='utf-8')
    flags = {name: '--' + name.replace('_', '-') for name in vars(train.Options())}
    for name, flag in flags.items():
        comment = re.search(rf'^    {name}: .*?# (.*)$', source, re.M)[1]
        assert flag in told and ' '.join(comment.split())[:30] in told
    step = cosmos.__doc__[cosmos.__doc__.index('    out = model('):cosmos.__doc__.index('Read it beside')]
    called = set(re.findall(r'(?<![.\w])(\w+)\(', step))             # as functions, not as methods
    assert called == {'model', 'teacher', 'clip_loss', 'cosmos_loss'}
    for owner, names in ((cosmos, ('VisionTower', 'TextTower', 'clip_loss', 'cosmos_loss')),
                         (micro()[0], ('text_cross', 'image_cross', 'logit_scale', 'distill_logit_scale'))):
        assert all(name in cosmos.__doc__ and hasattr(owner, name) for name in names)
    text = (HERE / 'README.md').read_text(encoding='utf-8')
    lines = (HERE / 'cosmos.py').read_text(encoding='utf-8').splitlines()
    ranges = re.findall(r'`(\w+)`[^|]*\| (\d+)-(\d+) \|', text)
    assert len(ranges) >= 8
    for name, first, last in ranges:
        found = re.match(rf'(class|def) {name}\b', lines[int(first) - 1])
        assert found and int(first) < int(last) <= len(lines), f'{name} is not at line {first}'
    number = lambda cell: float(cell.replace(',', ''))
    row = r'^\| ([\d,]+) \| (\d+) \| [\d,]+ \| (\d), \d \| (.*) MB \| (.*) MB \| (.*) MB \| (\d+), (.*) MB'
    rows = re.findall(row, text, re.M)
    assert len(rows) == 8
    for N, W, count, *told, released, logits in ([number(cell) for cell in row] for row in rows):
        want = [*traffic(8, 8, N // W, N, 512), traffic(8, 8, N, N, 512)[2]]            # the released: all on each rank
        assert [*told, logits] == [pytest.approx(4e-6 * n, abs=0.6) for n in want]
        assert (count, released) == ((0, 0), (2, 160))[W > 1]
    commands = re.findall(r'(?:python|torchrun[^\n]*?) train\.py([^\n`]*)', text)
    assert commands
    for command in commands:
        assert set(re.findall(r'--[\w-]+', command)) <= set(flags.values()), command


# --- What the shortcuts gain ------------------------------------------------------------------------------------------

def gains(config, B):
    """Prints the time of a forward and a backward pass in the plain form and in ours, medians of 7 or 49 turns.

    Plain: captions padded to the context, all rows of all blocks; keys and values projected per view; naive_losses.
    """
    torch.manual_seed(0)
    model, D, end = COSMOS(config), config.embed_dim, config.vocab_size - 1
    padded = torch.randint(1, end - 1, (8, B, config.context_length))
    for caption, most in zip(padded, [config.context_length] * 2 + [20] * 6):           # of two globals, six locals
        caption[torch.arange(B), torch.randint(9, most, (B,))] = end
    cut = data.Batch([], [], padded, padded.argmax(dim=-1), 0).cut(whole=1)
    query, tokens = torch.randn(8, B, D, requires_grad=True), torch.randn(B, 64, D, requires_grad=True)
    out = Output(*(cosmos.unit(torch.randn(8, B, D)).requires_grad_() for _ in range(4)))
    targets, cross = [cosmos.unit(torch.randn(2, B, D)) for _ in range(2)], model.image_cross
    for part, turns, *forms in (
            ('text tower', 7, lambda: sum(x.sum() for x in model.text([padded.flatten(0, 1)], keep=True)),
             lambda: sum(x.sum() for x in model.text(list(padded), True, cut))),
            ('cross-attention', 49, lambda: torch.cat([cross(one[None], tokens) for one in query]).sum(),
             lambda: cross(query, tokens).sum()),
            ('losses', 49, lambda: sum(x.mean() for x in naive_losses(out, *targets, 14, 14)),
             lambda: clip_loss(out, 14) + cosmos_loss(out, *targets, 14))):
        rounds = [[timeit.timeit(lambda: form().backward(), number=1) for form in forms] for _ in range(turns)]
        plain, ours = 1000 * np.median(rounds, axis=0)
        print(f'D {D:4} {part:16} plain {plain:8.1f} ms  ours {ours:8.1f} ms  {plain / ours:5.1f} x')


if __name__ == '__main__':      # python test_cosmos.py: the gains of README's table on this machine
    gains(Config.preset('tiny', context_length=77, vision_layers=6, text_layers=4), 32)
    gains(Config(), 4)
