"""Every claim with its oracle: each docstring says what the result is compared with. Runs on a CPU in minutes.

    pytest test_cosmos.py

Numbers recorded from the released code and CLIP's vocabulary lie in COSMOS_SHARED, or ../shared; without that folder
the tests that need them are skipped, and say so.
"""
import ast
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
import socket
import subprocess
import sys
import tarfile
import time
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch.utils.flop_counter import FlopCounterMode

import cosmos
import data
import eval as evaluation
import train
from cosmos import COSMOS, Config, Output, Teacher, clip_loss, cosmos_loss, from_openclip, to_openclip
from data import Tokenizer

HERE = Path(__file__).parent
SHARED = Path(os.environ.get('COSMOS_SHARED') or HERE.parent / 'shared')
MICRO = dict(embed_dim=16, image_size=32, local_image_size=16, patch_size=8, vision_width=24, vision_layers=2,
             vision_heads=2, text_width=16, text_layers=2, text_heads=2, context_length=12, vocab_size=50,
             cross_heads=2)


def shared(*parts):
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f'{path} is absent; set COSMOS_SHARED to the folder with the recorded numbers')
    return path


def close(a, b, tolerance=1e-5):
    """Relative distance of the whole tensors."""
    distance = ((a - b).norm() / b.norm().clamp_min(1e-12)).item()
    assert distance <= tolerance, f'relative distance {distance:.2e}, allowed {tolerance}'


def micro(seed=0, B=3, local=2, **changes):
    """A micro model with one batch: (model, V images, U captions). Captions: start, words, end, padding."""
    torch.manual_seed(seed)
    model, texts = COSMOS(Config(**{**MICRO, **changes})), []
    images = [torch.randn(B, 3, s, s) for s in [32, 32] + [16] * local]
    for length in [9, 12] + [5] * (local + 1):
        tokens = torch.randint(1, 48, (B, 12))
        tokens[:, 0], tokens[:, length - 1] = 48, 49                    # start and end: the two highest ids
        texts.append(tokens * (torch.arange(12) < length))
    return model, images, texts


def naive_loss(out, teacher_image, teacher_text, scale, distill_scale):
    """L_CLIP + L_COSMOS as a reader of the paper would loop it: a full N x N product for every pair of views."""
    def pair(a, b, scale):
        logits, own = scale * a @ b.T, torch.arange(len(a))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    mean = lambda first, second, scale: torch.stack([pair(a, b, scale) for a in first for b in second]).mean()
    targets = teacher_image, teacher_text
    terms = [mean(h, target, distill_scale) for h in (out.image_x, out.text_x) for target in targets]
    return mean(out.image[:2], out.text, scale) + torch.stack(terms).mean()


def total_loss(model, teacher, images, texts, forward=None):
    """What train.py minimises; L_CLIP alone in a plain CLIP. `forward` stands in for the model, as DDP does."""
    out = (forward or model)(images, texts)
    loss = clip_loss(out, model.logit_scale.exp())
    if out.image_x is None:
        return loss
    return loss + cosmos_loss(out, *teacher(images[:2], texts[:2]), model.distill_logit_scale.exp())


# --- cosmos.py against the released code -----------------------------------------------------------------------------

def test_golden():
    """oracle: features, losses, gradients, one step of AdamW and EMA, dense features (plain and CSA) and the weights of
    both heads, all recorded from the released code."""
    recorded = torch.load(shared('golden', 'tiny.pt'), weights_only=True)
    expected, hyper = recorded['expected'], recorded['hyper']
    student, other = COSMOS(Config(**recorded['config'])), COSMOS(Config(**recorded['config']))
    student.load_state_dict(from_openclip(recorded['student']))
    other.load_state_dict(from_openclip(recorded['teacher']))
    for csa, name in ((False, 'dense_plain'), (True, 'dense_csa')):
        dense = other.encode_dense(recorded['dense_images'], csa=csa)
        assert dense.shape == (2, 4, 6, 32)                             # 64 x 96 pixels: rows first
        close(dense.flatten(1, 2), expected[name], 2e-6)
    for weights, name in zip(other.attention(recorded['images'][0], recorded['texts'][0]),
                             ('attn_image_given_text', 'attn_text_given_image')):
        close(weights, expected[name].view_as(weights), 2e-6)
    teacher = Teacher(other)
    out = student(recorded['images'], recorded['texts'])
    teacher_image, teacher_text = teacher(recorded['images'][:2], recorded['texts'][:2])
    for name, value in [('student_image', out.image), ('student_text', out.text), ('cross_image', out.image_x),
                        ('cross_text', out.text_x), ('teacher_image', teacher_image), ('teacher_text', teacher_text)]:
        close(value, expected[name], 2e-6)
    clip = clip_loss(out, student.logit_scale.exp())
    distill = cosmos_loss(out, teacher_image, teacher_text, student.distill_logit_scale.exp())
    for name, value in [('clip_loss', clip), ('cosmos_loss', distill), ('total_loss', clip + distill)]:
        close(value, expected[name], 1e-6)
    (clip + distill).backward()
    grads = to_openclip({name: p.grad for name, p in student.named_parameters()})
    assert grads.keys() == expected['grads'].keys()
    for name, grad in expected['grads'].items():
        close(grads[name], grad, 2e-5)
    groups = [{'params': [p for p in student.parameters() if p.ndim >= 2], 'weight_decay': hyper['weight_decay']},
              {'params': [p for p in student.parameters() if p.ndim < 2], 'weight_decay': 0.0}]
    torch.optim.AdamW(groups, lr=hyper['lr'], betas=hyper['betas'], eps=hyper['eps']).step()
    student.clamp_scales()
    teacher.update(student, hyper['momentum'])
    for name, model in (('student_after_step', student), ('teacher_after_step', teacher.model)):
        state = to_openclip(model.state_dict())
        for key, value in expected[name].items():
            ours = state[key].clone()
            if key.endswith('in_proj_bias'):        # softmax ignores a shift of all keys: their gradient is rounding
                third = len(value) // 3             # noise, and Adam's first step divides noise by its own size
                ours[third:2 * third] = value[third:2 * third]
            close(ours, value, 1e-4)


def test_names_and_sizes_are_the_released():
    """oracle: the identity on all names, whatever the values; names and counts written out. 152,382,466 parameters of
    ViT-B/16 are open_clip's 149,620,737, two heads, two maps and one scale."""
    values = {name: i for i, name in enumerate(micro()[0].state_dict())}
    theirs = to_openclip(values)
    assert from_openclip(theirs) == values and len(theirs) == len(values)
    assert {'visual.conv1.weight', 'transformer.resblocks.0.attn.in_proj_weight', 'text_projection', 'logit_scale',
            'visual.attn_cross_pool.ln_k.bias', 'text_attn_cross_pool.attn.out_proj.weight', 'image_token_mapping.bias',
            'distill_logit_scale'} <= theirs.keys()
    assert not any(key.startswith('text.') for key in theirs)
    with pytest.raises(ValueError, match='no_such_name'):
        to_openclip({'no_such_name': 0})
    with torch.device('meta'):
        count = sum(p.numel() for p in COSMOS(Config.preset('vit-b-16')).parameters())
        plain = sum(p.numel() for p in COSMOS(Config.preset('vit-b-16', cross_heads=0)).parameters())
    assert plain == 149_620_737 and count == 152_382_466 == plain + 2 * 1_052_672 + 393_728 + 262_656 + 1


# --- cosmos.py against plain forms -----------------------------------------------------------------------------------

def test_losses_equal_naive_loops_and_limits():
    """oracle: loops over views, rows and columns in float64; closed forms: equal features give ln N in every term,
    orthogonal pairs at a large scale 0."""
    def naive(rows, columns, scale):
        """Symmetric InfoNCE of all pairs of views of two stacks: one pair, one row, one logit after the other."""
        def nce(a, b):
            logits = [[scale * float(x @ y) for y in b] for x in a]
            return sum(math.log(sum(map(math.exp, row))) - row[i] for i, row in enumerate(logits)) / len(a)
        pairs = [(nce(a, b) + nce(b, a)) / 2 for a in rows for b in columns]
        return sum(pairs) / len(pairs)
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: F.normalize(torch.randn(n, 4, 8, dtype=torch.float64, generator=generator), dim=-1)
    out, t_image, t_text = Output(draw(5), draw(3), draw(5), draw(3)), draw(2), draw(2)
    assert abs(clip_loss(out, 9.0).item() - naive(out.image[:2], out.text, 9.0)) < 1e-12
    terms = [naive(rows, columns, 7.0) for rows in (out.image_x, out.text_x) for columns in (t_image, t_text)]
    assert np.allclose(cosmos.cosmos_terms(out, t_image, t_text, 7.0), terms, atol=1e-12)
    assert abs(cosmos_loss(out, t_image, t_text, 7.0).item() - sum(terms) / 4) < 1e-12


def test_pencil_example():
    """oracle: hand arithmetic to four decimals, the example of cosmos.nce and of README."""
    rows, columns = torch.tensor([[[1.0, 0], [0, 1]]]), torch.tensor([[[1.0, 0], [0.6, 0.8]]])
    assert round(cosmos.nce(rows, columns, 1.0).item(), 4) == 0.4421
    assert round(cosmos.nce(columns, rows, 1.0).item(), 4) == 0.4557
    assert round(clip_loss(Output(rows, columns, None, None), 1.0).item(), 4) == 0.4489
    for text in (cosmos.nce.__doc__, (HERE / 'README.md').read_text(encoding='utf-8')):
        assert all(n in text for n in ('0.5130', '0.3711', '0.4421', '0.3133', '0.5981', '0.4557', '0.4489'))
    same, apart = F.normalize(torch.ones(2, 6, 4), dim=-1), torch.eye(6).expand(2, 6, 6)
    terms = cosmos.cosmos_terms(Output(same, same, same, same), same, same, 14.0)
    assert torch.allclose(terms, torch.full((4,), math.log(6)))
    assert cosmos_loss(Output(apart, apart, apart, apart), apart, apart, 100.0).item() < 1e-6


def test_which_views_enter_which_loss():
    """oracle: invariance. A local image moves L_COSMOS but not L_CLIP, a local caption both; the teacher gets none."""
    model, images, texts = micro()
    teacher, scale = Teacher(model), 14.0
    t_image, t_text = teacher(images[:2], texts[:2])
    assert not t_image.requires_grad and not any(p.requires_grad for p in teacher.parameters())
    other_image, other_text = [*images[:-1], -images[-1]], [*texts[:-1], texts[-1].flip(0)]
    base, image_moved, text_moved = model(images, texts), model(other_image, texts), model(images, other_text)
    assert torch.equal(clip_loss(base, scale), clip_loss(image_moved, scale))
    distill = lambda out: cosmos_loss(out, t_image, t_text, scale)
    assert not torch.isclose(distill(base), distill(image_moved))
    assert not torch.isclose(clip_loss(base, scale), clip_loss(text_moved, scale))
    assert not torch.isclose(distill(base), distill(text_moved))
    # Keys are the tokens of view 0: another view 1 moves only its own cross-modal embedding.
    moved = model([images[0], -images[1], *images[2:]], texts)
    assert torch.equal(moved.text_x, base.text_x) and not torch.allclose(moved.image_x[1], base.image_x[1])


def test_attention_equals_torch():
    """oracle: nn.MultiheadAttention of the same parameters, values and weights; torch's fused kernel with a mask."""
    torch.manual_seed(0)
    ours, theirs = cosmos.Attention(32, 4), torch.nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, context = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    close(ours(query, query), theirs(query, query, query)[0])
    close(ours(query, context), theirs(query, context, context)[0])
    (q, k, v), mask = torch.randn(3, 2, 4, 5, 8), torch.ones(5, 5).tril() > 0
    close(cosmos.attend(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    head, query = micro()[0].image_cross, torch.randn(3, 16)            # the cross-attention head: one query a pair
    tokens, theirs = torch.randn(3, 7, 16), torch.nn.MultiheadAttention(16, 2, batch_first=True)
    theirs.load_state_dict(head.attn.state_dict())
    pooled, weights = theirs(head.ln_q(query)[:, None], head.ln_k(tokens), head.ln_k(tokens))
    close(head.weights(query, tokens), weights[:, 0])
    close(head(query[None], tokens)[0], pooled[:, 0])


def test_shortcuts_change_nothing():
    """oracle: the long way: a block on all rows, every view through its tower alone, every caption at full length.
    The text tower is causal, which allows the cuts: another token at position 5 changes no row before it."""
    torch.manual_seed(0)
    block, x, row = cosmos.Block(16, 2), torch.randn(4, 6, 16), torch.tensor([0, 3, 5, 2])
    for causal in (False, True):
        close(block(x, causal, row)[:, 0], block(x, causal)[torch.arange(4), row], 1e-6)
    model, images, texts = micro(local=3)
    image, patches = model.visual(images, keep=True)
    for i, view in enumerate(images):
        close(image[i], model.visual([view])[0][0], 1e-5)
    close(patches, model.visual([images[0]], keep=True)[1], 1e-5)
    cut = [texts[0]] + [caption[:, :int(caption.argmax(dim=1).max()) + 1] for caption in texts[1:]]
    assert cut[2].shape[1] == 5 < texts[2].shape[1]
    whole, short = model(images, torch.stack(texts)), model(images, cut)
    for a, b in zip(whole, short):
        close(b, a, 1e-5)
    teacher, grads = Teacher(COSMOS(model.config)), []
    scales = model.logit_scale, model.distill_logit_scale               # and the gradients, of the losses in loops too
    for loss in (naive_loss(whole, *teacher(images[:2], texts[:2]), *(scale.exp() for scale in scales)),
                 total_loss(model, teacher, images, cut)):
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*grads):
        close(b, a, 2e-5)
    one, other = texts[1].clone(), texts[1].clone()
    other[:, 5] = one[:, 5] % 40 + 1
    a, b = model.encode_text(one)[1], model.encode_text(other)[1]
    assert torch.equal(a[:, :5], b[:, :5]) and not torch.allclose(a[:, 5:], b[:, 5:])
    ended = texts[2]                                                    # ends at position 4
    noisy = torch.where(torch.arange(12) > 4, 7, ended)
    close(model.encode_text(noisy)[0], model.encode_text(ended)[0], 1e-6)


def test_positions_are_bicubic_with_a_tenth_added():
    """oracle: Keys' cubic kernel (a = -0.75) evaluated at (i + 0.5) / ((n + 0.1) / grid) - 0.5, borders repeated."""
    tower, grid = micro()[0].visual, 4
    assert tower.positions(grid, grid) is tower.positional_embedding
    table = tower.positional_embedding[1:].detach().double().numpy().reshape(grid, grid, -1)
    def kernel(x, a=-0.75):
        near, far = (a + 2) * x ** 3 - (a + 3) * x ** 2 + 1, a * (x ** 3 - 5 * x ** 2 + 8 * x - 4)
        return near if x <= 1 else far if x < 2 else 0
    def weights(n):
        out = np.zeros((n, grid))
        for i, at in enumerate((i + 0.5) / ((n + 0.1) / grid) - 0.5 for i in range(n)):
            for k in range(math.floor(at) - 1, math.floor(at) + 3):
                out[i, min(max(k, 0), grid - 1)] += kernel(abs(at - k))
        return out
    for h, w in ((2, 2), (3, 5), (7, 4)):
        want = np.einsum('hi,wj,ijc->hwc', weights(h), weights(w), table).reshape(h * w, -1)
        close(tower.positions(h, w)[1:].double(), torch.from_numpy(want), 1e-5)


def test_teacher_is_a_moving_average():
    """oracle: closed form: after k updates towards a constant student, s + lambda^k (t0 - s); nothing is shared."""
    teacher = Teacher(model := micro()[0])
    start = [p.clone() for p in teacher.model.parameters()]
    assert all(p.data_ptr() != q.data_ptr() for p, q in zip(model.parameters(), teacher.model.parameters()))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    for _ in range(7):
        teacher.update(model, 0.9)
    for t0, t, s in zip(start, teacher.model.parameters(), model.parameters()):
        assert torch.allclose(t, s + 0.9 ** 7 * (t0 - s), atol=1e-5)


@pytest.mark.parametrize('method, local', [('cosmos', 2), ('cosmos', 0), ('clip', 2), ('clip', 0)])
def test_every_parameter_gets_a_gradient(method, local):
    """oracle: none may be missing, or DDP waits for ever; none may be all zero, or it never learns."""
    model, images, texts = micro(local=local, cross_heads=2 if method == 'cosmos' else 0)
    total_loss(model, Teacher(model), images, texts).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_checkpointing_and_bf16():
    """oracle: the plain float32 run: recomputed activations give its gradients, bf16 its loss to two digits."""
    model, images, texts = micro()
    teacher = Teacher(COSMOS(model.config))
    plain = total_loss(model, teacher, images, texts)
    plain.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    total_loss(model, teacher, images, texts).backward()
    for p, grad in zip(model.parameters(), grads):
        close(p.grad, grad, 1e-6)
    with torch.autocast('cpu', torch.bfloat16):
        assert all(x.dtype == torch.float32 for x in model(images, texts))
        half = total_loss(model, teacher, images, texts)
    assert abs(half.item() - plain.item()) < 0.02 * plain.item()


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as probe:
        return probe.getsockname()[1]


def rank_gradients(rank, world, accum, method, path, port, dtype=None):
    """One of `world` processes: the gradients that train.py leaves on rank 0, from its share of one batch of 8."""
    torch.set_num_threads(1)
    if world > 1:
        address = f'tcp://127.0.0.1:{port}'
        torch.distributed.init_process_group('gloo', init_method=address, rank=rank, world_size=world)
    model, _, texts = micro(B=8, cross_heads=2 if method == 'cosmos' else 0)
    share, texts = slice(rank * 8 // world, (rank + 1) * 8 // world), torch.stack(texts)
    images = [torch.randint(0, 256, (2, 8, 3, s, s), dtype=torch.uint8)[:, share] for s in (32, 16)]
    texts = [texts[:1, share], texts[1:2, share], texts[2:, share, :5]]
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    model.set_grad_checkpointing(dtype is not None and accum > 1)
    run = SimpleNamespace(model=model, student=wrapped, teacher=Teacher(COSMOS(model.config)), dtype=dtype, world=world,
                          cosmos=method == 'cosmos', device=torch.device('cpu'), options=SimpleNamespace(accum=accum),
                          optimizer=torch.optim.SGD(model.parameters()), scaler=torch.amp.GradScaler(enabled=False))
    calls, dist, products = [], torch.distributed, []
    counted = lambda call: lambda *args: (calls.append((call.__name__, args[-1].numel())), call(*args))[1]
    dist.all_gather, dist.all_reduce = counted(dist.all_gather), counted(dist.all_reduce)
    entropy = F.cross_entropy
    F.cross_entropy = lambda logits, target: (products.append(logits.numel()), entropy(logits, target))[1]
    batch = data.Batch(images, [torch.empty(2, len(x[0]), 0) for x in images], texts, 12, 0)
    loss = train.forward_backward(run, batch)['loss']
    F.cross_entropy, sent = entropy, calls[:]
    if world > 1:
        torch.distributed.all_reduce(loss)
    if rank == 0:
        grads = {name: p.grad for name, p in model.named_parameters()}
        torch.save((grads, loss / world, sent, sum(products)), f'{path}/{world}{accum}.pt')
    if world > 1:
        train.leave(0)


def traffic(V, U, B, N, D):
    """Numbers that a rank sends in the gathers and reduces in the backward pass, and logits, of README's table."""
    vectors = (2 + U) + (V + U + 4)                                     # of L_CLIP, of L_COSMOS with the teacher's four
    pairs = 2 * U + 2 * (2 * V + 2 * U)
    return vectors * B * D, vectors * N * D, 2 * pairs * B * N


@pytest.mark.parametrize('method', ['cosmos', 'clip'])
def test_ranks_and_accumulation_equal_one_process(tmp_path, method):
    """oracle: one process with the whole batch: same loss, and the same gradient in every parameter and scale."""
    rank_gradients(0, 1, 1, method, str(tmp_path), None)
    want, want_loss, sent, _ = torch.load(tmp_path / '11.pt')
    assert not sent
    for world, accum in ((1, 2), (1, 4), (2, 1), (4, 1), (2, 2)):
        if world == 1:
            rank_gradients(0, 1, accum, method, str(tmp_path), None)
        else:
            args = (world, accum, method, str(tmp_path), free_port())
            torch.multiprocessing.spawn(rank_gradients, args, nprocs=world)
        found, loss, sent, products = torch.load(tmp_path / f'{world}{accum}.pt')
        close(loss, want_loss, 1e-6)
        if method == 'cosmos':
            sends, reduces, logits = traffic(4, 5, 8 // world, 8, 16)
            assert products == logits
            assert [name for name, _ in sent] == (['all_gather'] * 2 + ['all_reduce'] * 2 if world > 1 else [])
            assert world == 1 or [sum(n for _, n in some) for some in (sent[:2], sent[2:])] == [sends, reduces]
        for name in want:
            close(found[name], want[name], 1e-5)
    if method == 'cosmos':                                              # and in bf16, recomputing activations
        for accum in (1, 4):
            rank_gradients(0, 1, accum, method, str(tmp_path), None, torch.bfloat16)
        want, found = (torch.load(tmp_path / f'1{accum}.pt')[0] for accum in (1, 4))
        for name in want:
            close(found[name], want[name], 0.02)


def test_map_names_what_exists():
    """oracle: the module itself: every name that the pseudo-code in cosmos.py's docstring calls is defined there."""
    step = cosmos.__doc__[cosmos.__doc__.index('    out = model('):cosmos.__doc__.index('Read it beside')]
    called = {node.func.id for node in ast.walk(ast.parse(re.sub(r'^    ', '', step, flags=re.M)))
              if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert called == {'model', 'teacher', 'clip_loss', 'cosmos_loss'}
    for owner, names in ((cosmos, ('VisionTower', 'TextTower', 'clip_loss', 'cosmos_loss')),
                         (micro()[0], ('text_cross', 'image_cross', 'logit_scale', 'distill_logit_scale'))):
        assert all(name in cosmos.__doc__ and hasattr(owner, name) for name in names)


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


def test_ids_by_hand():
    """oracle: pencil: rank 1 'lo w</w>' ends low, rank 2 'lo w' starts the others; cut rows keep their end."""
    low_end, low, er, lowest = (512 + LOW.merges.index(m) for m in ('lo w</w>', 'lo w', 'e r</w>', 'low est</w>'))
    assert LOW.encode('low lower lowest') == [low_end, low, er, lowest]
    assert LOW.words('Low  LOWER lowest') == [('low', 1), ('lower', 2), ('lowest', 1)]
    assert LOW.encode('!l')[0] == 256                   # '!' is byte symbol 0, and 256 + 0 where it closes a word
    assert LOW.decode(LOW('low lower lowest')[0]) == 'low lower lowest'
    ids = LOW(['low ' * 20, 'low', ''])
    assert ids.dtype == torch.int64 and (LOW.sot, LOW.eot) == (519, 520)
    assert ids.tolist() == [[519, *[513] * 6, 520], [519, 513, 520, *[0] * 5], [519, 520, *[0] * 6]]
    assert ids.argmax(-1).tolist() == [7, 2, 1] and LOW('low', 3).shape == (1, 3) and LOW([]).shape == (0, 8)


def test_word_classes_are_unicodes():
    """oracle: unicodedata.category of all code points. Between a and #, L joins the a, N stays alone, others join #."""
    for char in map(chr, range(sys.maxunicode + 1)):
        if data.CLEAN.get(ord(char), f' {char} ') == f' {char} ':       # not replaced when cleaning
            want = {'L': [f'a{char}', '#'], 'N': ['a', char, '#']}.get(
                unicodedata.category(char)[0], ['a', f'{char}#'.strip()])
            assert data.WORD.findall(f'a{char}#'.translate(data.CLEAN)) == want, hex(ord(char))
    assert Tokenizer.split('x²+Ⅷ①_é\'S “ﬁn” ＡＢ&amp;lt;\x07') == "x ² + ⅷ ① _ é 's \" fin \" ab <".split()


def test_learn_equals_naive_recounting():
    """oracle: a loop that keeps no counts between rounds; aaaa, ties and pairs that return included."""
    def naive_merges(texts, n):
        spelled = lambda word: ' '.join(data.BYTE_SYMBOL[byte] for byte in word.encode()) + '</w>'
        words, merges = Counter(spelled(word) for text in texts for word in text.split()), []
        while len(merges) < n:
            count = Counter()
            for word, times in words.items():
                for pair in zip(word.split(' '), word.split(' ')[1:]):
                    count[pair] += times
            best = min(count, key=lambda pair: (-count[pair], pair), default=None)
            if best is None or count[best] < 2:
                break
            merges += [' '.join(best)] if ' '.join(best) not in merges else []
            seam = re.compile(rf'(?<!\S){re.escape(best[0])} {re.escape(best[1])}(?!\S)')
            words = {seam.sub(lambda m: m[0].replace(' ', ''), word): times for word, times in words.items()}
        return merges
    rng = random.Random(0)
    for letters, length in (('ab', 7), ('abcé', 5), ('etaoinshr', 6)):
        texts = [' '.join(''.join(rng.choices(letters, k=rng.randint(1, length))) for _ in range(6)) for _ in range(60)]
        for size in (514, 560, 5000):
            learned = Tokenizer.learn(texts, size)
            assert learned.merges == naive_merges(texts, size - 514)
            assert learned.vocab_size == 514 + len(learned.merges) <= size
        assert [learned.decode(learned.encode(text)) for text in texts] == texts


# --- data.py: captions, shards, order, crops -------------------------------------------------------------------------

def test_caption_pools():
    """oracle: pools written by hand for every format; a string and a list of sentences give the same."""
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


def test_text_crops():
    """oracle: the rule itself, on 300 draws: 1 to 5 distinct sentences a global, distinct locals, all from the pool."""
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


@pytest.fixture(scope='session')
def scenes(tmp_path_factory):
    """A small built-in set: 40 training and 12 held-out scenes."""
    root = tmp_path_factory.mktemp('scenes')
    data.make_scenes(root, train=40, val=12, seed=1)
    return root


def write_tar(path, members, **kwargs):
    """A tar of (name, bytes or str or dict) members."""
    with tarfile.open(path, 'w', **kwargs) as tar:
        for name, value in members:
            value = json.dumps(value) if isinstance(value, (dict, list)) else value
            value, info = value.encode() if isinstance(value, str) else value, tarfile.TarInfo(name)
            info.size = len(value)
            tar.addfile(info, io.BytesIO(value))
    return path


def picture(kind='JPEG', mode='RGB'):
    file, flat = io.BytesIO(), {'L': 128, 'RGB': (200, 30, 60)}.get(mode, (0, 200, 100, 30))
    Image.new(mode, (40, 30), flat).save(file, kind)
    return file.getvalue()


def test_built_in_set(scenes, tmp_path):
    """oracle: the masks themselves (boxes and areas recounted), and a second making: equal bytes."""
    data.make_scenes(tmp_path, train=40, val=12, seed=1, workers=1)
    for split in ('train', 'val'):
        assert (tmp_path / split / '00000.tar').read_bytes() == (scenes / split / '00000.tar').read_bytes()
    with tarfile.open(scenes / 'val/00000.tar') as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    for name in (name for name in files if name.endswith('.json')):
        record = json.loads(files[name])
        mask = np.asarray(Image.open(io.BytesIO(files[name.replace('json', 'mask.png')])))
        assert mask.max() == len(record['objects']) and len(record['captions']) == 5
        assert [o['role'] for o in record['objects']] == ['dominant'] + ['small'] * (len(record['objects']) - 1)
        for k, o in enumerate(record['objects'], 1):
            ys, xs = np.nonzero(mask == k)
            assert o['bbox'] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1] and o['area'] == len(xs)
            assert all(o['name'] in caption for caption in record['captions'])
            assert len({*o['negatives']} - {other['name'] for other in record['objects']}) == 9


def test_shards_and_images_of_every_format(tmp_path):
    """oracle: the pairs that were written, read back through every pattern, member order, case and tar format;
    and one flat colour, saved as JPEG, PNG, WebP, CMYK, grey and with alpha."""
    jpg, long = picture(), 'folder' * 15 + '/' + 'name' * 15            # over 100 characters: GNU and PAX add a header
    for n, kind in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        write_tar(tmp_path / f'{n:05d}.tar', [
            ('x/b.json', {'caption': f'json {n}'}), ('x/a.txt', f'text {n}'), ('x/b.JPG', jpg), ('x/a.jpg', jpg),
            (f'{long}.png', picture('PNG')), (f'{long}.txt', f'long {n}'), ('x/alone.jpg', jpg)], format=kind)
    for pattern in ('', '/*.tar', '/{00000..00002}.tar', '/{00000,00001,00002}.tar',
                    f'/00000.tar::{tmp_path}/{{00001..00002}}.tar'):
        shards = data.Shards(f'{tmp_path}{pattern}')
        assert [shards.pool(i) for i in range(len(shards))] == [
            [text] for n in range(3) for text in (f'json {n}', f'text {n}', f'long {n}')]
        assert all(data.decode(shards.image(i)).shape == (3, 30, 40) for i in range(9))
    assert pickle.loads(pickle.dumps(shards)).name(1).endswith('00000.tar:x/a.jpg')
    want = {'RGB': (200, 30, 60), 'L': (128, 128, 128), 'RGBA': (0, 200, 100), 'CMYK': (225, 49, 137)}
    for kind, mode in [case.split() for case in ('JPEG RGB', 'PNG RGB', 'WEBP RGB', 'JPEG CMYK', 'JPEG L', 'PNG RGBA')]:
        image = data.decode(picture(kind, mode=mode))
        assert image.shape == (3, 30, 40) and image.dtype == torch.uint8
        assert (image[:, 15, 20].int() - torch.tensor(want[mode])).abs().max() <= 6, mode


def test_index_follows_the_files(monkeypatch, tmp_path):
    """oracle: the files: a second reading scans no header, a changed one is scanned again, a cut one keeps its rest."""
    path = write_tar(tmp_path / 'a.tar', [('a.jpg', picture()), ('a.txt', 'one dog')])
    assert len(data.Shards(path, tmp_path / 'cache')) == 1
    with monkeypatch.context() as patch:
        patch.setattr(data, 'scan_shard', None)                         # calling it would raise
        assert data.Shards(path, tmp_path / 'cache').pool(0) == ['one dog']
    write_tar(path, [('a.jpg', picture()), ('a.txt', 'one dog'), ('b.jpg', picture()), ('b.txt', 'two dogs')])
    assert len(data.Shards(path, tmp_path / 'cache')) == 2
    write_tar(path, [m for i in range(4) for m in ((f'{i}.txt', f'dog {i}'), (f'{i}.jpg', picture()))])
    third = data.Shards(path).pairs[2]
    path.write_bytes(path.read_bytes()[:int(third['image']) + 10])
    cut = data.Shards(path)
    assert [cut.pool(i) for i in range(len(cut))] == [['dog 0'], ['dog 1']]


def test_damaged_shards_lose_only_what_is_damaged(tmp_path, capsys):
    """oracle: which bytes were damaged: 240 tars from a seed. Every untouched pair is there, image with caption."""
    def colour(i):
        file = io.BytesIO()
        Image.new('RGB', (8, 8), (i * 20, 255 - i * 20, 7 * i)).save(file, 'PNG')
        return file.getvalue() + bytes(1500 * (i % 3))
    rng = random.Random(0)
    for trial in range(240):
        order = [m for i in range(10) for m in ((f'd/{i}.png', colour(i)), (f'd/{i}.json', {'caption': f'dog {i}'}))]
        if trial % 4 == 3:
            rng.shuffle(order)                                          # partners far apart
        formats = {'format': (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[trial % 3]}
        raw = bytearray(write_tar(tmp_path / 'a.tar', order, **formats).read_bytes())
        with tarfile.open(tmp_path / 'a.tar') as tar:                   # bytes of each member, header included
            spans = {m.name: (m.offset, m.offset_data + -(-m.size // 512) * 512) for m in tar}
        touched, at = set(), rng.randrange(spans[order[-1][0]][1])
        touch = lambda first, last: touched.update(n for n, (a, b) in spans.items() if a < last and b > first)
        kind = ('header', 'payload', 'cut', 'zeros', 'garbage', 'lost')[trial // 3 % 6]
        if kind in ('header', 'payload'):
            a, b = rng.choice(list(spans.values()))
            at = rng.randrange(a, a + 512) if kind == 'header' else rng.randrange(a + 512, b)
            raw[at] ^= 1 << rng.randrange(8)
            touch(at, at + 1)
        elif kind == 'cut':
            del raw[at:]
            touch(at, len(raw) + 10 ** 6)
        elif kind == 'zeros':
            raw[at // 512 * 512:at // 512 * 512 + 512] = bytes(512)
            touch(at, at + 1)
        elif kind == 'garbage':                                         # of any length: later headers lose their grid
            raw[at:at] = rng.randbytes(rng.randrange(1, 3000))
            touch(at, at + 1)
        else:
            length = rng.randrange(1, 3000)
            del raw[at:at + length]
            touch(at, at + length)
        (tmp_path / 'a.tar').write_bytes(raw)
        whole = {i for i in range(10) if not {f'd/{i}.png', f'd/{i}.json'} & touched}
        if not whole and kind == 'cut':
            continue
        shards, served = data.Shards(tmp_path / 'a.tar'), set()
        for k in range(len(shards)):
            try:
                i, pixels = int(shards.pool(k)[0].split()[-1]), data.decode(shards.image(k))
            except Exception:
                continue
            if i in whole:
                assert pixels[:, 0, 0].tolist() == [i * 20, 255 - i * 20, 7 * i], (trial, kind)
                served.add(i)
        assert served == whole, (trial, kind)
    assert 'Traceback' not in capsys.readouterr().err


def test_odd_members_are_read_or_refused(tmp_path):
    """oracle: what each is by construction: names of every tar format, kinds of image, captions of no use, bombs."""
    def encoded(image, kind, **more):
        image.save(file := io.BytesIO(), kind, **more)
        return file.getvalue()
    exif, wide = Image.Exif(), Image.new('RGB', (40, 20), 'red')
    exif[0x112] = 6                                                     # the camera was held upright
    good = {'cmyk.jpg': encoded(wide.convert('CMYK'), 'JPEG'), 'gray.png': encoded(wide.convert('L'), 'PNG'),
            'palette.png': encoded(wide.convert('P'), 'PNG'), 'alpha.png': encoded(wide.convert('RGBA'), 'PNG'),
            'UPPER.JPG': encoded(wide, 'JPEG'), 'photo.jpeg': encoded(wide, 'JPEG', exif=exif),
            'w.webp': encoded(wide, 'WEBP'), 'ünï/cödé.jpg': encoded(wide, 'JPEG'),
            f"{'long' * 40}/{'name' * 30}.jpg": encoded(wide, 'JPEG'), 'deep/er/dot.jpg': encoded(wide, 'JPEG')}
    noise, huge = Image.effect_noise((64, 64), 50), bytearray(encoded(wide, 'PNG'))
    huge[16:24] = (60000).to_bytes(4, 'big') * 2                        # says it is 60,000 x 60,000
    bad = {f'cut.{kind}': encoded(noise, kind)[:600] for kind in ('jpeg', 'png', 'webp')}
    bad |= {'bomb.png': bytes(huge), 'text.jpg': b'GIF8'}
    bad = {f'{k}{name}': value for k, (name, value) in enumerate(bad.items())}          # a stem each
    text = {'null': {'caption': None}, 'none': {'caption': ''}, 'digit': {'caption': 5}, 'broken': '{"caption": "a d',
            'list': {'caption': [None, 3, ' ']}, 'big': ' ' * (17 << 20)}
    members = [*good.items(), *bad.items()]
    members += [(f"{name.rpartition('.')[0]}.json", {'caption': f'the name {name}'}) for name in [*good, *bad]]
    members += [m for name, value in text.items() for m in ((f'{name}.json', value), (f'{name}.jpg', picture()))]
    members += [('empty.jpg', b''), ('empty.json', {'caption': 'x'}), ('alone.jpg', picture()), ('alone2.json', {})]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        shards = data.Shards(write_tar(tmp_path / 'a.tar', members, format=form))
        served, refused = {}, 0
        for i in range(len(shards)):
            try:
                served[shards.pool(i)[0]] = data.decode(shards.image(i))
            except (ValueError, OSError, RuntimeError):
                refused += 1
        names = {data.sentences(f'the name {name}')[0] for name in good}
        assert names == set(served) and refused == len(bad) + len(text)
        for name, pixels in served.items():
            assert pixels.shape == ((3, 40, 20) if 'photo' in name else (3, 20, 40)), name


def test_tars_of_every_writer_read_alike(tmp_path):
    """oracle: tarfile's own reader: three formats, with the fractional times that webdataset's writer leaves in PAX."""
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / 'a.tar', 'w', format=form) as tar:
            for i in range(50):
                for kind, value in (('jpg', picture()), ('json', b'{"caption": "a dog"}'), ('cls', b'3')):
                    info = tarfile.TarInfo(f'{i:05d}.{kind}')
                    info.size, info.uname = len(value), 'bigdata'
                    info.mtime = 1.7e9 + i / 7 if form == tarfile.PAX_FORMAT else 17
                    tar.addfile(info, io.BytesIO(value))
        with tarfile.open(tmp_path / 'a.tar') as tar, open(tmp_path / 'a.tar', 'rb') as file:
            assert list(data.tar_members(file)) == [(m.name, m.offset_data, m.size) for m in tar]
        assert len(data.Shards(tmp_path / 'a.tar')) == 50


def test_pack_and_join(tmp_path, capsys):
    """oracle: the rows that were packed, and an interrupted packing; a table joined by URL, its texts as sentences."""
    (tmp_path / 'images/s').mkdir(parents=True)
    for name, value in (('a.jpg', picture()), ('s/b.png', picture('PNG')), ('bad.jpg', b'-')):
        (tmp_path / 'images' / name).write_bytes(value)
    coco = {'images': [{'id': 1, 'file_name': 'a.jpg'}, {'id': 2, 'file_name': 's/b.png'}],
            'annotations': [{'image_id': i, 'caption': c} for i, c in ((1, 'one dog'), (2, 'two. dogs'), (1, 'a dog'))]}
    jsonl = [{'image': 'a.jpg', 'captions': ['one dog', 'a dog']}, {'image': 's/b.png', 'captions': ['two. dogs']},
             {'image': 'bad.jpg', 'captions': ['x']}, {'image': 'absent.jpg', 'captions': ['y']}]
    table = 'filepath{0}title\na.jpg{0}one dog\ns/b.png{0}two. dogs\na.jpg{0}a dog\n'
    for name, text in (('r.json', json.dumps(coco)), ('r.jsonl', '\n'.join(map(json.dumps, jsonl))),
                       ('r.csv', table.format(',')), ('r.tsv', table.format('\t'))):
        (tmp_path / name).write_text(text)
        out = tmp_path / f'out-{name}'
        rows, bad = data.pack(tmp_path / name, tmp_path / 'images', out, size=1)
        assert (rows, bad) == ((4, 2) if name == 'r.jsonl' else (2, 0))
        shards = data.Shards(out)
        assert [shards.pool(i) for i in range(2)] == [['one dog', 'a dog'], ['two', 'dogs']]
        assert shards.image(1) == picture('PNG')
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / '00001.tar').rename(out / '00001.tar.partial')               # as a kill leaves it
    data.pack(tmp_path / name, tmp_path / 'images', out, size=1)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    (tmp_path / 'd.csv').write_text('Image Path,raw_caption,longIB_captions\nhttp://x/2,two dogs,"A dog.\n'
                                    'It is 3.5 m, big."\nhttp://x/9,none,none\nhttp://x/1,one dog,A dog\n')
    write_tar(tmp_path / 'i.tar', [m for i in range(3) for m in (
        (f'{i}.jpg', picture()), (f'{i}.json', {'url': f'http://x/{i}', 'caption': 'alt', 'key': str(i)}))])
    assert data.join(tmp_path / 'd.csv', tmp_path / 'i.tar', tmp_path / 'joined') == (3, 2)
    shards = data.Shards(tmp_path / 'joined')
    assert [shards.pool(i) for i in range(2)] == [['one dog', 'A dog'], ['two dogs', 'A dog', 'It is 3.5 m, big']]
    assert [shards.record(i)['key'] for i in range(2)] == ['1', '2']
    with pytest.raises(ValueError, match='r.csv has the columns filepath, title, none of url'):
        data.join(tmp_path / 'r.csv', tmp_path / 'i.tar', tmp_path / 'joined')


def make_views(shards, tokenizer=None, batch=4, augment='full', counts=(2, 2, 3)):
    tokenizer = tokenizer or Tokenizer.learn((s for i in range(len(shards)) for s in shards.pool(i)), 600, 12)
    return data.Views(shards, tokenizer, Config(**MICRO), 3, batch, counts, augment)


def test_order_and_batches_are_pure_functions(scenes):
    """oracle: numpy's permutation of (seed, epoch), which ranks and restarts only cut into pieces; for the batches the
    main process, bit for bit. Captions are cut exactly behind their longest."""
    whole = list(data.Order(23, 4, 0, 12, seed=5))
    for step, rows in enumerate(whole):
        epoch, k = divmod(step, 5)                                      # 23 // 4 whole batches an epoch
        expected = np.random.default_rng((5, epoch)).permutation(23)[4 * k:4 * k + 4]
        assert rows == [(epoch, 4 * k + i, index) for i, index in enumerate(expected)]
    assert list(data.Order(23, 4, 7, 12, seed=5)) == whole[7:]
    two = [list(data.Order(23, 4, 0, 12, 5, rank, 2)) for rank in range(2)]
    assert [a + b for a, b in zip(*two)] == whole
    views = make_views(data.Shards(scenes / 'train'))
    runs = [list(data.loader(views, data.Order(40, 4, 1, 4, seed=3), workers)) for workers in (0, 1, 3)]
    for one, *others in zip(*runs, strict=True):
        for other in others:
            assert all(map(torch.equal, one.images + one.colours + one.texts,
                           other.images + other.colours + other.texts))
    batch = runs[0][0]
    images, texts = batch.views()
    assert [tuple(x.shape) for x in images] == [(4, 3, 32, 32)] * 2 + [(4, 3, 16, 16)] * 2 and len(texts) == 5
    assert texts[0].shape[1] == 12 and texts[1].shape[1] == batch.length
    ends = torch.stack([F.pad(text, (0, 12 - text.shape[1])) for text in texts]).argmax(dim=-1)         # (U, B)
    assert (ends[2:-1] <= ends[3:]).all()                               # local ones from short to long, each cut alone
    assert [text.shape[1] for text in texts[2:]] == [min(-(-(int(end.max()) + 1) // 8) * 8, 12) for end in ends[2:]]


def test_shuffled_shards_are_read_one_window_after_the_other():
    """oracle: sets: each window of the permuted shards gives all pairs of its shards, mixed, before the next begins."""
    bounds = 0, 5, 12, 13, 20, 30
    for epoch in (0, 1):
        found, at = data.order(3, epoch, 30, bounds, 2).tolist(), 0
        shards = np.random.default_rng((3, epoch)).permutation(5)
        for some in (shards[:2], shards[2:4], shards[4:]):
            own = [i for k in some for i in range(bounds[k], bounds[k + 1])]
            window = found[at:at + len(own)]
            assert sorted(window) == sorted(own) and (window != own or len(own) == 1)
            at += len(own)
        rows = [row for step in data.Order(30, 6, 5 * epoch, 5 * epoch + 5, 3, shuffle=(bounds, 2)) for row in step]
        assert [index for _, _, index in rows] == found


def test_bad_pairs_are_replaced_and_counted(tmp_path, capsys):
    """oracle: the pairs that were broken on purpose: none is served, each is counted and named once."""
    members = [m for i in range(12) for m in ((f'{i}.jpg', picture() if i != 5 else b'no image'),
                                              (f'{i}.json', {'caption': f'dog {i}'} if i != 7 else '{broken'))]
    views = make_views(data.Shards(write_tar(tmp_path / 'a.tar', members)), LOW)
    for epoch in range(2):
        batches = list(data.loader(views, data.Order(12, 4, 3 * epoch, 3 * epoch + 3, seed=3), 0))
        assert sum(batch.bad for batch in batches) >= 2 and all(len(batch.images[0][0]) == 4 for batch in batches)
        served = {LOW.decode(row).partition(' .')[0] for batch in batches for row in batch.views()[1][0]}
        assert {text.replace(' ', '') for text in served} == {f'dog{i}' for i in range(12) if i not in (5, 7)}
    told = capsys.readouterr().err
    assert told.count('a.tar:5.jpg') == told.count('a.tar:7.jpg') == 1


def test_image_crops_follow_the_released_distribution():
    """oracle: area and aspect drawn by numpy, those that fit kept; pixels that hold their own place tell the crop's."""
    ys, xs = torch.meshgrid(torch.arange(256), torch.arange(256), indexing='ij')
    Image.fromarray(torch.stack([ys, xs, ys], dim=-1).to(torch.uint8).numpy()).save(file := io.BytesIO(), 'PNG')
    torch.manual_seed(0)
    rng, kinds = np.random.default_rng(0), data.view_kinds(Config(**MICRO))
    drawn = [data.image_crops(file.getvalue(), kinds) for _ in range(300)]
    for views, (low, high) in zip(zip(*drawn), ((0.4, 1.0), (0.4, 1.0), (0.05, 0.4))):
        area, aspect = [], []
        for view in views:
            view, n = view.float(), view.shape[1]
            h, w = ((view[c, -1, -1] - view[c, 0, 0]).item() * n / (n - 1) for c in (0, 1))
            area.append(h * w / 256 ** 2)
            aspect.append(w / h)
        a, log_r = rng.uniform(low, high, 10_000), rng.uniform(-math.log(4 / 3), math.log(4 / 3), 10_000)
        fits = a * np.exp(np.abs(log_r)) <= 1
        assert low * 0.9 < min(area) and max(area) < high * 1.05
        assert abs(np.mean(area) - a[fits].mean()) < 0.03 * (low + high)
        assert np.std(aspect) > 0.7 * np.std(np.exp(log_r[fits])) and abs(np.mean(np.log(aspect))) < 0.05
        assert 0.7 < min(aspect) and max(aspect) < 1.43


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
        want = V.gaussian_blur(want, 13, sigma) if sigma else want
        want = V.solarize(want, 128 / 255) if solarize else want
        assert torch.allclose(found, want, atol=2e-5), numbers
    assert data.photometric(images, torch.empty(40, 0)).equal(images.float() / 255)


def test_views_have_the_statistics_of_the_released_recipe():
    """oracle: torchvision's transforms with the released probabilities, and Pillow's blur, on the same image: mean and
    variance of 2,500 views within sampling error; how often and how strongly each operation comes, over 5,000 draws."""
    torch.manual_seed(0)
    noise = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 8), (48, 64), mode='bicubic')[0].clamp(0, 1)
    Image.fromarray((noise * 255).byte().permute(1, 2, 0).numpy()).save(file := io.BytesIO(), 'PNG')
    picture_, v2, rng = Image.open(file).convert('RGB'), data.v2, random.Random(1)
    for kind in data.view_kinds(Config(**MICRO)):
        reference = v2.Compose([
            v2.RandomResizedCrop(kind.size, kind.scale, interpolation=data.BICUBIC), v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), v2.RandomGrayscale(0.2),
            lambda x: x.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2))) if rng.random() < kind.blur else x,
            v2.RandomSolarize(128, p=kind.solarize), v2.PILToTensor()])
        want = torch.stack([reference(picture_) for _ in range(2500)]).float() / 255
        views = torch.stack([data.image_crops(file.getvalue(), [kind])[0] for _ in range(2500)])
        found = data.photometric(views, torch.tensor([data.draw_colours(kind, rng) for _ in views]))
        for statistic in (lambda x: x.mean(dim=(1, 2, 3)), lambda x: x.var(dim=(1, 2, 3)),
                          lambda x: (x[..., 1:] - x[..., :-1]).abs().mean(dim=(1, 2, 3)),       # falls with the blur
                          lambda x: (x.amax(dim=1) - x.amin(dim=1)).mean(dim=(1, 2))):          # colourfulness
            a, b = statistic(want), statistic(found)
            error = ((a.var() + b.var()) / 2500).sqrt()
            assert abs(a.mean() - b.mean()) < 4 * error + 0.01 * a.mean(), (kind, a.mean(), b.mean(), error)
            assert 0.85 < a.std() / b.std() < 1.18
        flip, *order, b, c, s, h, gray, sigma, solarize = zip(*(data.draw_colours(kind, rng) for _ in range(5000)))
        touched = np.array(flip) > 0, np.array(b) != 1, np.array(gray) > 0, np.array(sigma) > 0, np.array(solarize) > 0
        for share, p in zip(map(np.mean, touched), (0.5, 0.8, 0.2, kind.blur, kind.solarize)):
            assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / 5000)
        for strength, low, high in ((b, 0.6, 1.4), (c, 0.6, 1.4), (s, 0.8, 1.2), (h, -0.1, 0.1), (sigma, 0.1, 2)):
            x = np.array([v for v in strength if v != (strength is not h) and (strength is not sigma or v)])
            assert low <= x.min() and x.max() <= high and abs(x.mean() - (low + high) / 2) < 0.05 * (high - low)
            assert abs(x.std() - (high - low) / math.sqrt(12)) < 0.05 * (high - low)
        assert Counter(order[0]).keys() == {0, 1, 2, 3} and max(Counter(order[0]).values()) < 1400


def test_large_jpegs_are_decoded_small(monkeypatch):
    """oracle: the same crops from the whole image; a decoder that tells at which scale it was asked."""
    image, asked, whole = Image.effect_mandelbrot((2000, 1400), (-2, -1.2, 1, 1.2), 60).convert('RGB'), [], data.decode
    image.save(file := io.BytesIO(), 'JPEG', quality=95)
    kinds = data.view_kinds(Config(**MICRO))
    crops = []
    for limit in (8, 1):
        spy = lambda data, shrink=1: (asked.append(shrink), whole(data, min(shrink, limit)))[1]
        monkeypatch.setattr(data, 'decode', spy)
        torch.manual_seed(3)
        crops.append(data.image_crops(file.getvalue(), kinds))
    assert asked == [8, 8] and whole(file.getvalue(), 8).shape == (3, 175, 250)
    for small, large in zip(*crops):
        assert (small.float() - large.float()).abs().mean() < 6                             # of 255


# --- eval.py ---------------------------------------------------------------------------------------------------------

def test_retrieval_by_hand_and_by_loops():
    """oracle: ranks read off by eye. Two images of five captions each, and a tie, which counts against us.
    Then Python loops over single scores, in chunks of 1, 7 and all."""
    images = torch.eye(2)
    first = [(1.0, 0.0), (0.9, 0.1), (0.2, 0.9), (0.5, 0.5), (0.6, 0.3)]      # the third finds image 1, the fourth ties
    second = [(0.95, 0.2), (0.3, 0.4), (0.1, 0.2), (0.1, 0.8), (0.2, 0.7)]      # the first finds image 0
    owner = torch.tensor([0] * 5 + [1] * 5)
    figures = evaluation.retrieval(images, torch.tensor(first + second), owner)
    assert (figures['images'], figures['captions'], figures['chance']) == (2, 10, 0.5)
    assert math.isclose(figures['text_to_image_R@1'], 7 / 10, rel_tol=1e-6) and figures['text_to_image_R@5'] == 1
    # image 0: its 1.0 is ahead of all. image 1: its best is 0.8, behind the 0.9 of a caption of image 0
    assert figures['image_to_text_R@1'] == 0.5 and figures['image_to_text_mean_rank'] == 1.5
    assert figures['image_to_text_median_rank'] == 1.5                  # ranks 1 and 2
    collapsed = evaluation.retrieval(torch.ones(2, 2), torch.ones(10, 2), owner)
    assert collapsed['image_to_text_R@5'] == collapsed['text_to_image_R@1'] == 0
    torch.manual_seed(0)
    queries, targets = torch.randn(20, 6), torch.randn(30, 6)
    query_ids, target_ids = torch.arange(20), torch.randint(0, 20, (30,))
    target_ids[:20] = torch.randperm(20)
    slow = []
    for q, own in zip(queries, query_ids):
        best = max(float(q @ t) for t, i in zip(targets, target_ids) if i == own)
        slow.append(1 + sum(float(q @ t) >= best for t, i in zip(targets, target_ids) if i != own))
    for chunk in (1, 7, 1000):
        assert evaluation.ranks(queries, targets, query_ids, target_ids, chunk).tolist() == slow


def spelling_model(merges=(), length=48):
    """(model, tokenizer) that reads text byte by byte; 48 ids hold every template with every name."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(merges, length)
    return COSMOS(Config(**{**MICRO, 'vocab_size': tokenizer.vocab_size, 'context_length': length})), tokenizer


def test_classification_by_hand():
    """oracle: hand-made scores of 7 classes, and the prompt ensemble computed one text at a time."""
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


def test_objects_are_named_by_their_own_scores(scenes):
    """oracle: a model that knows: features made from the names give 100 %, from a wrong name 0 %."""
    shards = data.Shards(scenes / 'val')
    things = [shards.record(i)['objects'] for i in range(len(shards))]
    model, tokenizer = spelling_model()
    for role in ('dominant', 'small'):
        for pick, want in ((lambda o: o['name'], 1.0), (lambda o: o['negatives'][3], 0.0)):
            chosen = [next(o for o in row if o['role'] == role) for row in things]
            features = evaluation.class_vectors(model, tokenizer, [pick(o) for o in chosen])
            shards.record = lambda i: {'objects': [chosen[i]]}
            figures = evaluation.classify_objects(model, tokenizer, features, shards)
            del shards.record
            assert figures == {role: {'top1': want, 'chance': 0.1, 'objects': 12}}


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


def test_published_layouts(tmp_path):
    """oracle: files written here as COCO's, Karpathy's, folders of classes and labels.json, and what must be read."""
    def write(name, value):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(value))
        return tmp_path / name
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
    with pytest.raises(ValueError, match="no 'annotations'"):
        evaluation.read_json(listed, 'images', 'annotations')
    root = [write(f'folder/{name}', '') for name in ('ox_2/1.png', 'ape/2.png', 'ape/.x', '.cache/3.png')][0].parents[1]
    paths, labels, names, _ = evaluation.folder_classes(root)
    assert ([path.name for path in paths], labels.tolist(), names) == (['2.png', '1.png'], [0, 1], ['ape', 'ox 2'])
    write('folder/labels.json', [{'file': f'{i}.png', 'class_id': i} for i in (5, 6, 7)])
    classes = write('classes.json', {'subsets': {'one': [5]}, 'classes': [
        {'id': 7, 'name': 'ape'}, {'id': 5, 'name': 'ox', 'noun_phrase': 'an ox'}]})
    _, labels, names, _ = evaluation.folder_classes(root, classes)
    assert (labels.tolist(), names) == ([1, 0], ['ape', 'an ox'])
    assert evaluation.folder_classes(root, classes, 'one')[2] == ['an ox']
    with pytest.raises(ValueError, match='ids the same'):
        evaluation.folder_classes(root, write('other.json', ['ape']))


def test_images_by_workers(tmp_path, scenes):
    """oracle: the main process. Workers move no file of its own, and their errors are the same single sentence."""
    shards, model, preprocess = data.Shards(scenes / 'val'), micro()[0], data.Preprocess(32)
    one = evaluation.embed_images(model, shards, preprocess, 4)
    shards.record(0)                                                    # leaves a file open, and not at an image
    places = [file.tell() for file in shards.files.values()]
    assert places and torch.equal(evaluation.embed_images(model, shards, preprocess, 4, workers=1), one)
    assert [file.tell() for file in shards.files.values()] == places    # a fork that shares it would garble both
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r'^\S*absent.jpg is no readable image \(.*\)$'):
            evaluation.embed_images(model, [tmp_path / 'absent.jpg'], preprocess, 4, workers)


def test_checkpoints_of_every_origin(tmp_path):
    """oracle: the model that was saved: released and prefixed names, either network, open_clip's without heads."""
    vocab = shared('vocab', 'bpe_simple_vocab_16e6.txt.gz')
    torch.manual_seed(0)
    config = Config(64, 32, 32, 16, 64, 2, 1, 64, 1, 1, 77, 49408, 8)
    model, plain = COSMOS(config), COSMOS(Config(**{**vars(config), 'cross_heads': 0}))
    image, tokens = torch.randn(1, 3, 32, 32), Tokenizer.clip(vocab)(['a dog'])
    released, other = to_openclip(model.state_dict()), to_openclip(plain.state_dict())
    marked = lambda prefix: {prefix + key: value for key, value in released.items()}
    for saved, weights, origin, source in [
            ({'student': other, 'teacher': released}, 'teacher', 'teacher', model),
            ({'student': other, 'teacher': released}, 'student', 'student', plain),
            ({'student': other}, 'teacher', 'student', plain),          # what it says must be what it scored
            ({'teacher': marked('module.')}, 'teacher', 'teacher', model),
            ({'state_dict': marked('_orig_mod.module.')}, 'teacher', 'state_dict', model),
            (other, 'teacher', 'state dict', plain)]:
        torch.save(saved, tmp_path / 'saved')
        loaded, tokenizer, _ = evaluation.load(tmp_path / 'saved', weights, vocab=vocab)
        assert (loaded.config.vision_layers, loaded.config.image_size, tokenizer.vocab_size) == (2, 32, 49408)
        assert loaded.origin == origin
        close(loaded.encode_image(image)[0], source.encode_image(image)[0], 1e-6)
        close(loaded.encode_text(tokens)[0], source.encode_text(tokens)[0], 1e-6)
    for saved, told in [({key: value for key, value in released.items() if 'ln_q' not in key}, '4 missing'),
                        ({**other, 'input_resolution': torch.tensor(224)}, 'QuickGELU'),
                        ({'visual.conv1.weight': image, 'positional_embedding': image}, 'open_clip ViT')]:   # a ResNet
        torch.save(saved, tmp_path / 'saved')
        with pytest.raises(ValueError, match=told):
            evaluation.load(tmp_path / 'saved', vocab=vocab)


def test_sliding_windows_equal_loops_over_pixels():
    """oracle: a loop over windows and single pixels with the bilinear formula written out, on a size no stride fits."""
    model, (W, H) = micro()[0].eval(), (47, 37)
    pixels, vectors = torch.randn(3, H, W), F.normalize(torch.randn(5, 16), dim=-1)
    for csa in (False, True):
        total, count = torch.zeros(5, H, W), torch.zeros(H, W)
        for y0 in (0, 5):                                               # the last window ends at the border
            for x0 in (0, 12, 15):
                grid = model.encode_dense(pixels[None, :, y0:y0 + 32, x0:x0 + 32], csa)[0] @ vectors.T      # (4, 4, 5)
                for y in range(32):
                    for x in range(32):
                        (v, a), (u, b) = (divmod(min(max((p + 0.5) * 4 / 32 - 0.5, 0), 3), 1) for p in (y, x))
                        v, u, below, right = int(v), int(u), min(int(v) + 1, 3), min(int(u) + 1, 3)
                        value = ((1 - a) * ((1 - b) * grid[v, u] + b * grid[v, right])
                                 + a * ((1 - b) * grid[below, u] + b * grid[below, right]))
                        total[:, y0 + y, x0 + x] += value.detach()
                        count[y0 + y, x0 + x] += 1
        close(evaluation.window_scores(model, pixels, vectors, 32, 12, csa), total / count)


def test_segmentation_by_hand(monkeypatch):
    """oracle: six pixels decided by pencil: synonyms, probability and area thresholds; then IoU from sets of pixels."""
    # names: ground | ape, monkey | ox. Softmax at scale ln 3 and cosines 0 or 1: one name at 1 of 4 gets 3/6.
    scores = torch.tensor([[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 1], [0, 0, 1, 1, 0, 1], [0, 0, 0, 0, 1, 0.0]])
    monkeypatch.setattr(evaluation, 'window_scores', lambda *a: scores.view(4, 2, 3))
    settings = evaluation.Settings(2, math.log(3), 0, 0, False, 2, 1)
    image, vectors = Image.new('RGB', (3, 2)), torch.zeros(4, 16)
    segment = lambda **changes: evaluation.segment_image(
        micro()[0], image, vectors, [1, 2, 1], settings._replace(**changes)).flatten().tolist()
    assert segment() == [0, 1, 1, 1, 2, 1]                              # monkey is ape
    assert segment(probability=0.4) == [0, 1, 1, 1, 2, 0]               # two names share: 3/8 each
    assert segment(area=0.2) == [0, 1, 1, 1, 0, 1]                      # ox has 1 of 5 foreground pixels, no more
    assert segment(area=0.19) == [0, 1, 1, 1, 2, 1]
    truth, labels = torch.tensor([0, 1, 1, 255, 2, 0]), torch.tensor(segment())
    matrix = evaluation.confusion(truth, labels, 4)
    figures = evaluation.segmentation_figures(matrix, ['ground', 'ape', 'ox', 'absent'])
    assert figures['IoU'] == {'ground': 1 / 2, 'ape': 2 / 3, 'ox': 1.0} and figures['pixel_accuracy'] == 4 / 5
    assert figures['mIoU'] == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)
    assert figures['all_class_0_mIoU'] == pytest.approx(2 / 5 / 3) and figures['all_class_0_pixel_accuracy'] == 2 / 5
    torch.manual_seed(0)
    truth, labels = torch.randint(0, 7, (30, 40)), torch.randint(0, 6, (30, 40))
    truth[torch.rand(30, 40) < 0.1] = 255
    figures = evaluation.segmentation_figures(evaluation.confusion(truth, labels, 8), 'abcdefgh')
    places = lambda values, k: {i for i, v in enumerate(values.flatten().tolist()) if v == k}
    counted = places(truth != 255, True)
    for k, name in enumerate('abcdefg'):
        own, found = places(truth, k), places(labels, k) & counted
        assert figures['IoU'][name] == len(own & found) / len(own | found)
    assert 'h' not in figures['IoU'] and figures['classes'] == 7


def test_masks_and_their_errors(tmp_path):
    """oracle: masks written here; what is wrong with one names its file and says what."""
    save = lambda name, values, mode='L': Image.fromarray(np.array(values, np.uint8), mode).save(tmp_path / name)
    save('a.png', [[0, 1, 255], [2, 2, 0]])
    save('colour.png', np.zeros((2, 3, 3)), 'RGB')
    palette = Image.fromarray(np.array([[0, 1, 255], [2, 2, 0]], np.uint8)).convert('L')
    palette = Image.frombytes('P', (3, 2), palette.tobytes())
    palette.putpalette(list(range(256)) * 3)
    palette.save(tmp_path / 'p.png')
    for name in ('a.png', 'p.png'):
        assert evaluation.read_mask(tmp_path / name, (3, 2), 3).tolist() == [[0, 1, 255], [2, 2, 0]]
        assert evaluation.read_mask(tmp_path / name, (3, 2), 2, True).tolist() == [[255, 0, 255], [1, 1, 255]]
    for name, size, classes, told in [('a.png', (3, 2), 2, 'a.png has label 2, the class file names 0 to 1'),
                                      ('a.png', (2, 3), 3, 'a.png is 3 x 2 pixels, its image 2 x 3'),
                                      ('colour.png', (3, 2), 3, 'colour.png has colours'),
                                      ('x.png', (3, 2), 3, 'x.png')]:
        with pytest.raises(ValueError, match=told):
            evaluation.read_mask(tmp_path / name, size, classes)
    for name in ('images/s/a_rgb.jpg', 'images/s/b_rgb.jpg', 'masks/s/a_ids.png', 'masks/s/a_colour.png', 'list.txt'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('a\nb\n')
    pair = lambda **rest: evaluation.mask_pairs(tmp_path / 'images', tmp_path / 'masks', '_rgb', '_ids', **rest)
    assert [tuple(p.name for p in some) for some in pair()] == [('a_rgb.jpg', 'a_ids.png')]
    with pytest.raises(ValueError, match='b_ids.png'):
        pair(listing=tmp_path / 'list.txt')
    (tmp_path / 'images/s/a_rgb.jpg').unlink()
    with pytest.raises(ValueError, match='a_ids.png'):
        pair()


def test_pairs_by_hand_and_published_rows(tmp_path, monkeypatch):
    """oracle: Winoground's three scores by pencil, ties as misses; rows as each set publishes them; probes by hand."""
    table, yes, no = lambda *rows: torch.tensor(rows), [True, True], [False, True]
    right, image, text = table((2.0, 1), (1, 2)), table((2.0, 3), (1, 4)), table((2.0, 1), (3, 4))
    tie = table((1.0, 1), (1, 1))
    assert [evaluation.pair_hits(m) for m in (right, image, text, tie)] == [
        (yes, yes), (yes, no), (no, yes), ([False, False], [False, False])]
    figures = evaluation.pair_scores([right, image, text, tie])
    assert figures == {'items': 4, 'image_score': 0.5, 'image_chance': 0.25, 'text_score': 0.5, 'text_chance': 0.25,
                       'group_score': 0.25}
    assert evaluation.pair_scores([table((3.0, 1, 2)), table((1.0, 0, 2))]) == {
        'items': 2, 'text_score': 0.5, 'text_chance': pytest.approx(1 / 3)}
    assert evaluation.pair_scores([table((3.0,), (1.0,))]) == {'items': 1, 'image_score': 1.0, 'image_chance': 0.5}
    def rows(name, text):
        (tmp_path / name).write_text(text)
        return evaluation.read_pairs(tmp_path / name)
    line = json.dumps({'images': ['a.jpg'], 'captions': ['x', 'y'], 'type': 't'})
    assert rows('own.jsonl', line + '\n\n' + line) == [(['a.jpg'], ['x', 'y'], 't')] * 2
    assert rows('crepe.json', json.dumps({'0': {'filename': 'a.jpg', 'caption': 'x', 'negative_caption': 'y'}})) == [
        (['a.jpg'], ['x', 'y'], None)]
    assert rows('wino.jsonl', json.dumps({'id': 0, 'image_0': 'a', 'image_1': 'b', 'caption_0': 'x', 'caption_1': 'y',
                                          'tag': 'Object'})) == [(['a', 'b'], ['x', 'y'], 'Object')]
    assert rows('svo.csv', 'sentence,pos_image_id,neg_image_id,subj_neg,verb_neg,obj_neg\nx,7,8,False,True,False') == [
        (['7', '8'], ['x'], 'verb_neg')]
    assert rows('Questions.csv', 'Question ID,Type,Statement\n1,Color,red\n2,Color,blue\n') == [
        (['Color/1', 'Color/2'], ['a photo of red', 'a photo of blue'], 'Color')]
    for name, text, told in [('a.jsonl', '{"image": "a"}', 'item 1 of .*a.jsonl has the keys image;'),
                             ('b.jsonl', '{', 'b.jsonl'),
                             ('c.jsonl', '{"images": [1, 2], "captions": ["x", "y", "z"]}', '2 images and 3 captions')]:
        with pytest.raises(ValueError, match=told):
            rows(name, text)
    # Two probes; a feature is one number a picture, one a name, and the score their product.
    query = lambda right, swap: {'positive': right, 'swap': swap, 'negatives': ['no']}
    images = {'A': 'a', 'B': 'b', 'C': 'c'}
    probes = [{'images': images, 'dominant_query': query('good', 'bad'), 'small_query': query(*small)}
              for small in (('good', 'bad'), ('bad', 'good'))]
    (tmp_path / 'probes.json').write_text(json.dumps(probes))
    values = {'a': 1.0, 'b': -1, 'c': -1, 'good': 1, 'bad': -1, 'no': 0}
    known = lambda names: torch.tensor([[float(values[name])] for name in names])
    monkeypatch.setattr(evaluation, 'embed_images', lambda m, paths, p, workers: known(path.stem for path in paths))
    monkeypatch.setattr(evaluation, 'embed_texts', lambda m, t, texts: known(texts))
    figures = evaluation.suppression(None, None, None, tmp_path)
    assert (figures['dominant']['scene_top1'], figures['small']['scene_top1']) == (1.0, 0.5)
    assert (figures['dominant']['name_top1'], figures['small']['name_top1']) == (1.0, 0.5)
    assert (figures['dominant']['standard_error'], figures['small']['standard_error']) == (0, pytest.approx(0.5))


def test_torchvision_sets_and_wordnet_folders(tmp_path):
    """oracle: a describable-textures folder written here as torchvision reads it; labels, names and both errors."""
    for name, text in (('labels/test1.txt', 'woven/a.jpg\nbanded/b.jpg\n'), ('labels/train1.txt', '')):
        (tmp_path / 'dtd/dtd' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'dtd/dtd' / name).write_text(text)
    for name in ('woven/a.jpg', 'banded/b.jpg'):
        (tmp_path / 'dtd/dtd/images' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'dtd/dtd/images' / name).write_bytes(picture())
    source, names = evaluation.torchvision_set('dtd', tmp_path)
    assert names == ['banded', 'woven']
    model, preprocess = micro()[0].eval(), data.Preprocess(32)
    features, labels = evaluation.embed_labelled(model, source, preprocess)
    assert labels.tolist() == [1, 0]
    paths = [tmp_path / 'dtd/dtd/images' / name for name in ('woven/a.jpg', 'banded/b.jpg')]
    close(features, evaluation.embed_images(model, paths, preprocess))
    for name, told in (('dtdd', "has no 'dtdd'; it has .*DTD"), ('food101', 'cannot read food101 from .*--download'),
                       ('FakeData', 'no class names')):
        with pytest.raises(ValueError, match=told):
            evaluation.torchvision_set(name, tmp_path)
    for i in range(1000):
        (tmp_path / f'in/n{i:08d}').mkdir(parents=True)
    (tmp_path / 'in/n00000002/x.png').write_bytes(b'')
    _, labels, names, _ = evaluation.folder_classes(tmp_path / 'in')
    assert labels.tolist() == [2] and names[2] == 'great white shark' and len(names) == 1000
    (tmp_path / 'in/n00000999').rmdir()
    with pytest.raises(ValueError, match='999 folders of WordNet ids'):
        evaluation.folder_classes(tmp_path / 'in')
    (tmp_path / 'templates').write_text('a {}\n\nthe {c}!\n')
    assert evaluation.read_templates(tmp_path / 'templates') == ['a {}', 'the {}!']
    (tmp_path / 'templates').write_text('["a {} b", "nothing"]')
    with pytest.raises(ValueError, match="'nothing'"):
        evaluation.read_templates(tmp_path / 'templates')


def test_search_refreshes_what_changed(tmp_path, monkeypatch, capsys):
    """oracle: features without a cache, and the list of files that were embedded: only new or changed ones, ever."""
    folder, asked = tmp_path / 'photos', []
    for name in ('b/one.png', 'two.png', 'bad.jpg', 'note.txt'):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture('PNG') if name.endswith('png') else b'no image')
    whole = evaluation.embed_labelled
    monkeypatch.setattr(evaluation, 'embed_labelled', lambda model, source, *rest, **more: (
        asked.append([path.name for path in source]), whole(model, source, *rest, **more))[1])
    model, preprocess = micro()[0].eval(), data.Preprocess(32)
    paths, features = evaluation.folder_features(model, preprocess, folder)
    assert [path.name for path in paths] == ['one.png', 'two.png']
    assert 'bad.jpg is no readable image' in capsys.readouterr().out
    close(features, evaluation.embed_images(model, paths, preprocess))
    asked.clear()
    (folder / 'two.png').write_bytes(picture('PNG', 'L'))
    (folder / 'three.png').write_bytes(picture())
    paths, features = evaluation.folder_features(model, preprocess, folder)
    assert asked == [['three.png', 'two.png']]
    close(features, evaluation.embed_images(model, paths, preprocess))
    (folder / 'b/one.png').unlink()
    asked.clear()
    assert len(evaluation.folder_features(model, preprocess, folder)[0]) == 2 and asked == []
    evaluation.folder_features(micro(seed=1)[0].eval(), preprocess, folder)
    assert len(asked[0]) == 3                                           # other weights: all of them, the bad one too


def test_export_is_open_clips(tmp_path):
    """oracle: the recorded names and shapes of the released checkpoint without its heads, and the values."""
    golden = torch.load(shared('golden', 'tiny.pt'), weights_only=True)
    for prefix in ('', 'module.'):
        saved = {name: {prefix + key: value for key, value in golden[name].items()} for name in ('student', 'teacher')}
        torch.save(saved, tmp_path / 'released.pt')
        config, vocab = Config(**golden['config']), shared('vocab', 'bpe_simple_vocab_16e6.txt.gz')
        model, _, _ = evaluation.load(tmp_path / 'released.pt', config=config, vocab=vocab)
        evaluation.export(model, tmp_path / 'clip.pt')
        written = torch.load(tmp_path / 'clip.pt', weights_only=True)
        heads = 'attn_cross_pool', 'token_mapping', 'distill'
        wanted = {key: value for key, value in golden['teacher'].items() if not any(part in key for part in heads)}
        assert written.keys() == wanted.keys() and all(torch.equal(written[key], wanted[key]) for key in wanted)
        out = model.visual(golden['images'][:2])[0]
        close(F.normalize(out, dim=-1), golden['expected']['teacher_image'], 2e-5)


def test_every_command_of_eval(monkeypatch, tmp_path, capsys):
    """oracle: the functions that the tests above check, called on the same input; the pictures open."""
    model, tokenizer = spelling_model()
    torch.save({'config': vars(model.config), 'merges': [], 'student': model.state_dict()}, tmp_path / 'ours.pt')
    for kind in ('images', 'masks'):
        (tmp_path / kind).mkdir()
    for i in range(3):
        Image.effect_mandelbrot((50, 40), (-2 + i, -1, 1, 1), 40).convert('RGB').save(tmp_path / f'images/{i}.jpg')
        Image.fromarray(np.arange(2000, dtype=np.uint8).reshape(40, 50) % 2).save(tmp_path / f'masks/{i}.png')
    (tmp_path / 'classes.txt').write_text('ground, sky\nox\n')
    item = {'images': ['0', '1'], 'captions': ['an ox', 'a cat'], 'type': 'big'}
    (tmp_path / 'items.jsonl').write_text(json.dumps(item))
    flickr = [{'image': f'{i}.jpg', 'caption': [f'{i}', 'ox']} for i in range(3)]
    (tmp_path / 'flickr.json').write_text(json.dumps(flickr))
    def run(command, *argv):
        figures = ['--workers', 0, '--json', tmp_path / 'figures.json']
        assert run_main(monkeypatch, evaluation.main, command, tmp_path / 'ours.pt', *argv, *figures) is None
        return json.loads((tmp_path / 'figures.json').read_text()), capsys.readouterr().out
    images, preprocess = ['--images', tmp_path / 'images'], data.Preprocess(32)
    paths = [tmp_path / f'images/{i}.jpg' for i in range(3)]
    features = evaluation.embed_images(model, paths, preprocess)
    words = lambda *texts: evaluation.embed_texts(model, tokenizer, texts)
    figures, told = run('segment', *images, '--masks', tmp_path / 'masks', '--classes', tmp_path / 'classes.txt',
                        '--benchmark', 'voc21', '--size', 40, '--area', 0, '--save', tmp_path / 'seen')
    assert json.loads(figures['settings']) == {'size': 40, 'scale': 65, 'probability': 0.1, 'area': 0.0,
                                               'reduce_zero_label': False, 'window': 32, 'stride': 16, 'csa': False}
    vectors, matrix = evaluation.class_vectors(model, tokenizer, ['ground', 'sky', 'ox']), 0
    for i, path in enumerate(paths):
        settings = evaluation.Settings(**json.loads(figures['settings']))
        labels = evaluation.segment_image(model, Image.open(path), vectors, [2, 1], settings)
        truth = evaluation.read_mask(tmp_path / f'masks/{i}.png', (50, 40), 2)
        matrix = matrix + evaluation.confusion(truth, labels, 2)
    assert figures['mIoU'] == evaluation.segmentation_figures(matrix, ['ground', 'ox'])['mIoU'] and 'IoU' in told
    assert Image.open(tmp_path / 'seen/2.png').size == (270, 52)
    figures, _ = run('pairs', '--items', tmp_path / 'items.jsonl', *images)
    scores = features[:2] @ words('an ox', 'a cat').T
    assert figures['all 2 x 2'] == figures['big 2 x 2'] == evaluation.pair_scores([scores])
    figures, told = run('search', 'an ox', *images, '--out', tmp_path / 'found.png')
    scores, order = (features @ words('an ox')[0]).sort(descending=True)
    assert [line.split()[1] for line in told.splitlines()[1:4]] == [str(paths[i]) for i in order]
    assert [float(line.split()[0]) for line in told.splitlines()[1:4]] == pytest.approx(scores.tolist(), abs=1e-4)
    _, told = run('search', '--like', paths[2], *images, '--top', 1, '--out', tmp_path / 'found.png')
    assert str(paths[2]) in told and '1.0000' in told and Image.open(tmp_path / 'found.png').size[0] > 1000
    figures, _ = run('retrieval', '--flickr', tmp_path / 'flickr.json', *images)
    want = evaluation.retrieval(features, words('0', 'ox', '1', 'ox', '2', 'ox'), torch.tensor([0, 0, 1, 1, 2, 2]))
    assert {key: figures[key] for key in want} == want
    figures, _ = run('export', tmp_path / 'clip.pt')
    assert figures['parameters'] == sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for name, p in model.named_parameters() if re.match('(image|text)_(cross|tokens)|distill', name))
    run('attend', '--image', paths[0], '--text', 'an ox', '--out', tmp_path / 'seen.png')
    assert Image.open(tmp_path / 'seen.png').mode == 'RGB'


def test_checkpoint_that_executes_is_refused(tmp_path, monkeypatch):
    """oracle: the file that its pickle would create: it must not exist."""
    class Malicious:
        def __reduce__(self):
            return os.system, ('touch executed',)
    monkeypatch.chdir(tmp_path)
    torch.save({'student': Malicious()}, 'bad.pt')
    with pytest.raises(ValueError, match='plain values'):
        evaluation.load('bad.pt')
    assert not Path('executed').exists()


# --- train.py, end to end --------------------------------------------------------------------------------------------

def test_schedules_and_decay():
    """oracle: closed forms at the corners of warm-up, cosine and ramp; the paper's settings; and the rule that matrices
    decay, but not LayerNorms, biases, the class token and the two scales."""
    options = train.parse_options('--steps 110 --warmup 10 --lr 1 --lr-end 0 --momentum 0.9 --momentum-ramp 3'.split())
    assert [train.lr_at(step, options) for step in (0, 9)] == [0.1, 1.0]
    assert train.lr_at(60, options) == pytest.approx(0.5) and train.lr_at(110, options) == pytest.approx(0)
    options.lr_end = 0.2
    assert train.lr_at(60, options) == pytest.approx(0.6) and train.lr_at(110, options) == pytest.approx(0.2)
    assert [train.momentum_at(step, options) for step in (0, 2, 99)] == [0.25, 0.5, 0.9]
    options.momentum_ramp = 0
    assert train.momentum_at(0, options) == 0.9
    paper = train.parse_options(['--data', 'x'])
    assert {'preset': 'vit-b-16', 'batch': 1024, 'lr': 5e-4, 'wd': 0.5, 'warmup': 2000, 'epochs': 32, 'momentum': 0.999,
            'momentum_ramp': 0, 'lr_end': 0}.items() <= vars(paper).items()
    model, _, _ = micro()
    decay, free = train.make_optimizer(model, train.parse_options(['--wd', '0.3']), torch.device('cpu')).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decay['weight_decay'], free['weight_decay']) == (0.3, 0.0)
    assert {'logit_scale', 'distill_logit_scale', 'visual.class_embedding', 'visual.ln_pre.weight'} <= {
        names[id(p)] for p in free['params']}
    assert all(p.ndim >= 2 for p in decay['params']) and len(names) == len(decay['params']) + len(free['params'])


def run_main(monkeypatch, main, *argv):
    """A command in this process -> SystemExit's code, or None."""
    monkeypatch.setattr(sys, 'argv', ['prog', *map(str, argv)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        data.cli(main)
    except SystemExit as stop:
        return stop.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def read_log(out):
    return [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]


@pytest.fixture
def quick(monkeypatch, scenes):
    """Flags of a run of seconds, on a micro preset."""
    monkeypatch.setitem(cosmos.PRESETS, 'micro', {k: v for k, v in MICRO.items() if k != 'vocab_size'})
    monkeypatch.setitem(train.RECIPES, 'micro', train.RECIPES['tiny'])
    return ['--data', scenes, '--preset', 'micro', '--batch', 4, '--log-every', 1, '--workers', 0]


@pytest.mark.parametrize('method, workers', [('cosmos', 0), ('cosmos', 2), ('clip', 0)])
def test_resume_is_exact(monkeypatch, quick, tmp_path, method, workers):
    """oracle: the run that was not interrupted: weights, optimizer, teacher and log are bit-equal."""
    common = [*quick, '--method', method, '--workers', workers, '--steps', 6]
    assert run_main(monkeypatch, train.main, *common, '--out', tmp_path / 'whole') == 0
    step = train.forward_backward
    def interrupted(run, batch):
        if run.step == 3 and run.options.resume is None:
            for pid in [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]:
                os.kill(pid, signal.SIGTERM)                            # to the whole group, as torchrun and Slurm do
        return step(run, batch)
    monkeypatch.setattr(train, 'forward_backward', interrupted)
    assert run_main(monkeypatch, train.main, *common, '--out', tmp_path / 'two') == 128 + signal.SIGTERM
    assert torch.load(tmp_path / 'two/last.pt', weights_only=True)['step'] == 4
    assert run_main(monkeypatch, train.main, *common, '--out', tmp_path / 'two', '--resume', 'auto') == 0
    whole, two = (torch.load(tmp_path / name / 'last.pt', weights_only=True) for name in ('whole', 'two'))
    for part in ('student', 'teacher')[:2 if method == 'cosmos' else 1]:
        assert all(torch.equal(whole[part][key], two[part][key]) for key in whole[part])
    for a, b in zip(whole['optimizer']['state'].values(), two['optimizer']['state'].values()):
        assert all(torch.equal(a[key], b[key]) for key in a)
    measured = {'samples_per_s', 'data_share', 'memory_GiB', 'minutes_left'}
    one, other = ([{key: entry[key] for key in entry.keys() - measured} for entry in read_log(tmp_path / name)]
                  for name in ('whole', 'two'))
    assert one == other and [entry['step'] for entry in one] == [1, 2, 3, 4, 5, 6]


def test_a_run_leaves_everything(monkeypatch, quick, tmp_path, capsys):
    """oracle: the list of design: files, log fields, and an eval.json whose chances are known by arithmetic."""
    assert run_main(monkeypatch, train.main, *quick, '--steps', 3, '--out', tmp_path, '--eval-every', 2) == 0
    assert all((tmp_path / name).stat().st_size for name in (
        'last.pt', 'log.jsonl', 'config.json', 'samples.png', 'attention.png', 'eval.json'))
    entries = read_log(tmp_path)
    assert {'step', 'loss', 'clip', 'cosmos', 'h_I_cls', 'h_I_eot', 'h_T_cls', 'h_T_eot', 'chance', 'logit_scale', 'lr',
            'momentum', 'distill_logit_scale', 'grad_norm', 'accuracy', 'spread', 'teacher_cosine', 'samples_per_s',
            'data_share', 'memory_GiB'} <= entries[0].keys()
    assert entries[0]['loss'] == pytest.approx(entries[0]['clip'] + entries[0]['cosmos'], rel=1e-5)
    assert entries[0]['chance'] == math.log(4) and [e['step'] for e in entries if 'eval' in e] == [2]
    figures = json.loads((tmp_path / 'eval.json').read_text())
    assert figures['steps'] == 3 and figures['retrieval']['chance'] == 1 / 12 and figures['retrieval']['captions'] == 60
    assert figures['dominant']['chance'] == figures['small']['chance'] == 0.1
    told = capsys.readouterr().out
    assert all(word in told for word in ('40 pairs in 1 shards', '12 held out', 'parameters', 'min left', 'chance'))
    # The checkpoint is complete: another program scores it the same.
    assert run_main(monkeypatch, evaluation.main, 'retrieval', tmp_path / 'last.pt', '--shards', quick[1] / 'val',
                    '--json', tmp_path / 'again.json', '--workers', 0) is None
    again = json.loads((tmp_path / 'again.json').read_text())
    assert all(again[key] == value for key, value in figures['retrieval'].items())


def test_it_learns(monkeypatch, quick, tmp_path):
    """oracle: guessing, ln 8, where both losses start: 150 steps on 40 pairs take each below three quarters of it."""
    assert run_main(monkeypatch, train.main, *quick, '--steps', 150, '--batch', 8, '--lr', 3e-3, '--out', tmp_path) == 0
    entries = read_log(tmp_path)
    for name in ('clip', 'cosmos'):
        start, end = (np.mean([entry[name] for entry in some]) for some in (entries[:3], entries[-10:]))
        assert end < 0.75 * math.log(8) < 1.2 * start


def same_run(a, b):
    """Two --out folders hold bit-equal networks and optimizers, and logs that differ in times only."""
    one, two = (torch.load(path / 'last.pt', weights_only=True) for path in (a, b))
    for part in ('student', 'teacher'):
        assert all(torch.equal(one[part][key], two[part][key]) for key in one[part])
    for x, y in zip(one['optimizer']['state'].values(), two['optimizer']['state'].values(), strict=True):
        assert all(torch.equal(x[key], y[key]) for key in x)
    timed = 'samples_per_s', 'data_share', 'memory_GiB', 'minutes_left', 'bad'
    logs = [[{k: v for k, v in entry.items() if k not in timed} for entry in read_log(path)] for path in (a, b)]
    assert logs[0] == logs[1] and len(logs[0]) == one['step']


@pytest.mark.parametrize('workers', [0, 2])
def test_kills_at_random_moments(tmp_path, scenes, workers):
    """oracle: the run that nobody killed, bit by bit. SIGKILL in each third; COSMOS_KILLS sets how many times over."""
    code = (f'import cosmos, data, train; cosmos.PRESETS["micro"] = {MICRO}; del cosmos.PRESETS["micro"]["vocab_size"];'
            'train.RECIPES["micro"] = train.RECIPES["tiny"]; data.cli(train.main)')
    command = [sys.executable, '-c', code, '--data', scenes, '--preset', 'micro', '--batch', 4, '--steps', 12,
               '--log-every', 1, '--save-every', 1, '--workers', workers, '--resume', 'auto', '--out']
    start = lambda out: subprocess.Popen([*map(str, command), str(out)], cwd=HERE, stdout=subprocess.PIPE,
                                         stderr=subprocess.STDOUT, start_new_session=True, text=True)
    whole, rng = start(tmp_path / 'whole'), random.Random()
    assert 'holds last.pt' in whole.communicate()[0]
    for trial in range(int(os.environ.get('COSMOS_KILLS', 1))):
        out = tmp_path / f'killed{trial}'
        for third in range(3):
            run, seen = start(out), 4 * third + rng.randint(0, 3)
            while run.poll() is None and not (out / 'log.jsonl').exists() or len(read_log(out)) < seen:
                assert run.poll() is None, run.communicate()[0]
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
            os.killpg(run.pid, signal.SIGKILL)
            run.communicate()
        assert 'holds last.pt' in start(out).communicate()[0]
        same_run(tmp_path / 'whole', out)


def test_torn_checkpoints_and_full_disks(monkeypatch, quick, tmp_path, capsys):
    """oracle: the run without mishap: a torn last.pt falls back to previous.pt, a full disk leaves the old one."""
    common = [*quick, '--steps', 6, '--save-every', 2, '--resume', 'auto', '--out']
    assert run_main(monkeypatch, train.main, *common, tmp_path / 'whole') == 0
    out = tmp_path / 'torn'
    shutil.copytree(tmp_path / 'whole', out)
    last = (out / 'last.pt').read_bytes()
    (out / 'last.pt').write_bytes(last[:len(last) // 2])
    assert run_main(monkeypatch, train.main, *common, out) == 0
    assert 'WARNING' in (told := capsys.readouterr().out) and 'steps 4 to 6' in told
    same_run(tmp_path / 'whole', out)
    for name in ('last.pt', 'previous.pt'):
        (out / name).write_bytes(b'')
    assert 'previous.pt is no checkpoint' in run_main(monkeypatch, train.main, *common, out)
    write, full = torch.save, []
    def save(state, file):
        if full:
            file.write(b'half')
            raise OSError(28, 'No space left on device')
        write(state, file)
    monkeypatch.setattr(torch, 'save', save)
    step = train.update
    monkeypatch.setattr(train, 'update', lambda run, norm: (step(run, norm), full.append(1) if run.step == 3 else None))
    told = run_main(monkeypatch, train.main, *common, tmp_path / 'full')
    assert told.startswith('error: step 6 could not be saved') and 'No space left' in told
    assert 'WARNING    step 4 could not be saved' in capsys.readouterr().out
    assert torch.load(tmp_path / 'full/last.pt', weights_only=True)['step'] == 2
    assert not list((tmp_path / 'full').glob('*.partial'))
    full.clear()
    monkeypatch.setattr(train, 'update', step)
    assert run_main(monkeypatch, train.main, *common, tmp_path / 'full') == 0
    same_run(tmp_path / 'whole', tmp_path / 'full')


def test_too_many_bad_pairs_and_ranks_that_differ(monkeypatch, quick, tmp_path):
    """oracle: the share of pairs broken on purpose, below and above 5 %; a rank that stands at another step."""
    for bad, told in ((3, None), (40, 'over 5 % of the pairs cannot be read')):
        members = [m for i in range(120) for m in ((f'{i}.jpg', picture() if i >= bad else b'no image'),
                                                   (f'{i}.json', {'caption': f'dog {i}'}))]
        write_tar(tmp_path / 'a.tar', members)
        flags = [*quick, '--data', tmp_path / 'a.tar', '--steps', 25, '--out', tmp_path / str(bad)]
        stopped = run_main(monkeypatch, train.main, *flags)
        assert stopped == 0 if told is None else told in stopped
    run = SimpleNamespace(step=3, options=SimpleNamespace(steps=9), shards=[0] * 5, config=Config(**MICRO), world=2,
                          device='cpu')
    def reduce(behind):
        least = torch.distributed.ReduceOp.MIN
        return lambda x, op: x.sub_(torch.tensor([behind, 0, 0, 0])) if op == least else x
    monkeypatch.setattr(torch.distributed, 'all_reduce', reduce(0))
    assert train.Run.check_agreement(run) is None
    monkeypatch.setattr(torch.distributed, 'all_reduce', reduce(3))
    with pytest.raises(ValueError, match=r'\[0, 9, 5, 50\] and \[3, 9, 5, 50\]; let all nodes see the same'):
        train.Run.check_agreement(run)


def test_half_precision_with_a_scaler(monkeypatch, quick, tmp_path):
    """oracle: the float32 run: the loss of its first step. The scaler's state is saved and read again."""
    run = lambda name, *flags: run_main(
        monkeypatch, train.main, *quick, '--precision', name, '--out', tmp_path / name, *flags)
    for name in ('fp32', 'fp16'):
        assert run(name, '--steps', 3) == 0
    full, half = (read_log(tmp_path / name) for name in ('fp32', 'fp16'))
    assert full[0]['loss'] == pytest.approx(half[0]['loss'], rel=0.01)
    assert len(half) == 3 and all(math.isfinite(entry['loss']) for entry in half)
    scale = torch.load(tmp_path / 'fp16/last.pt', weights_only=True)['scaler']['scale']
    assert run('fp16', '--steps', 4, '--resume', 'auto') == 0
    assert torch.load(tmp_path / 'fp16/last.pt', weights_only=True)['scaler']['scale'] == scale > 1


@pytest.mark.parametrize('method', ['cosmos', 'clip'])
def test_flops_are_counted_exactly(method):
    """oracle: torch's own counter, around the calls that --bench times."""
    cosmos_, B = method == 'cosmos', 3
    model, images, texts = micro(B=B, cross_heads=2 if cosmos_ else 0)
    images, texts = (images, texts[:2] + [t[:, :5] for t in texts[2:]]) if cosmos_ else (images[:1], texts[1:2])
    teacher, found = Teacher(model), {}
    run = SimpleNamespace(cosmos=cosmos_, device=torch.device('cpu'))
    def counted(name, call):
        with FlopCounterMode(display=False) as counter:
            result = call()
        found[name] = counter.get_total_flops()
        return result
    out = counted('student', lambda: model(images, texts))
    target = counted('teacher', lambda: teacher(images[:2], texts[:2]) if cosmos_ else ())
    loss = counted('losses', lambda: train.losses(run, out, target, train.scales_of(model))[0])
    counted('backward', loss.backward)
    sides, lengths = [tuple(view.shape[-2:]) for view in images], [text.shape[1] for text in texts]
    assert train.count_flops(model.config, B, sides, lengths, cosmos_) == found


def test_bench_prints_what_it_timed(monkeypatch, quick, capsys):
    """oracle: its own lines: the parts add up to the step, the rates follow from it."""
    run_main(monkeypatch, train.main, '--preset', 'micro', '--batch', 4, '--bench', 3, '--device', 'cpu')
    told = capsys.readouterr().out
    parts = dict(re.findall(r'^(\w[\w ]*?) +([\d.]+) ms', told, re.M))
    step = float(parts.pop('step'))
    assert parts.keys() == {'student forward', 'teacher forward', 'losses', 'backward', 'AdamW', 'EMA'}
    assert 0.5 * step < sum(map(float, parts.values())) < 1.5 * step
    speed = float(re.search(r'([\d,.]+) samples/s', told)[1].replace(',', ''))
    assert speed == pytest.approx(4000 / step, rel=0.05) and 'GFLOP/s' in told


def test_steps_that_are_not_finite(monkeypatch, quick, tmp_path, capsys):
    """oracle: losses made NaN in chosen steps: few in a row are skipped without a trace, more stop the run, saved."""
    whole = train.losses
    def broken(steps):
        monkeypatch.setattr(train, 'losses', lambda run, *rest: [
            x * (math.nan if run.step in steps else 1) for x in whole(run, *rest)])
    broken({2, 3, 5})
    assert run_main(monkeypatch, train.main, *quick, '--steps', 8, '--max-skipped', 2, '--out', tmp_path / 'few') == 0
    saved = torch.load(tmp_path / 'few/last.pt', weights_only=True)
    assert saved['step'] == 8 and all(torch.isfinite(x).all() for x in saved['student'].values())
    assert {int(state['step']) for state in saved['optimizer']['state'].values()} == {5}
    assert [entry['step'] for entry in read_log(tmp_path / 'few') if entry['loss'] is None] == [3, 4, 6]
    broken({2, 3, 4, 5})
    told = run_main(monkeypatch, train.main, *quick, '--steps', 8, '--max-skipped', 2, '--out', tmp_path / 'many')
    assert 'not finite in step 5, 3 steps in a row' in told and '"logit_scale"' in told and '\n' not in told
    saved = torch.load(tmp_path / 'many/last.pt', weights_only=True)
    assert saved['step'] == 4 and all(torch.isfinite(x).all() for x in saved['student'].values())


def test_two_processes_log_the_same(tmp_path, scenes):
    """oracle: the single process with the same global batch: same fields and losses, by torchrun and gloo; and it goes
    on with the two processes' checkpoint as they did."""
    flags = ('train.py --preset tiny --batch 4 --steps 3 --save-every 2 --log-every 1 --workers 0 --precision fp32 '
             '--device cpu --data')
    run = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_port', str(free_port())]
    for name, command in (('one', [sys.executable]), ('two', run)):
        done = subprocess.run([*command, *flags.split(), str(scenes), '--out', str(tmp_path / name)], cwd=HERE,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    for a, b in zip(read_log(tmp_path / 'one'), read_log(tmp_path / 'two'), strict=True):
        assert a.keys() == b.keys()
        for key in ('loss', 'clip', 'cosmos', 'grad_norm', 'logit_scale'):
            assert a[key] == pytest.approx(b[key], rel=2e-4), key
    goes_on = ['--resume', str(tmp_path / 'two/previous.pt'), '--out', str(tmp_path / 'on')]
    subprocess.run([sys.executable, *flags.split(), str(scenes), *goes_on], cwd=HERE, check=True, capture_output=True)
    for a, b in zip(read_log(tmp_path / 'on'), read_log(tmp_path / 'two')[2:], strict=True):
        assert a['step'] == b['step'] and a['loss'] == pytest.approx(b['loss'], rel=1e-5)


# --- What a newcomer gets wrong, and what the documents promise ------------------------------------------------------

def test_errors_are_one_sentence(monkeypatch, tmp_path, scenes):
    """oracle: the rule: status 1, one line, with the value, the place and the remedy; also where no network is."""
    (tmp_path / 'empty').mkdir()
    write_tar(tmp_path / 'silent.tar', [('a.jpg', picture()), ('a.json', {'alt': 'a dog', 'url': 'x'})])
    write_tar(tmp_path / 'lonely.tar', [('a.jpg', picture())])
    for name, text in (('stub.gz', 'version https://git'), ('text.tar', 'no tar'), ('junk.pt', 'x'), ('empty.pt', '')):
        (tmp_path / name).write_text(text)
    torch.save({'weights': torch.zeros(1)}, tmp_path / 'other.pt')
    out, val = ['--out', tmp_path / 'out'], ['--shards', scenes / 'val']
    tiny = ['--preset', 'tiny', *out]
    cases = [
        (train, ['--steps', '0'], ['--steps 0', 'at least 1']),
        (train, ['--momentum', '2'], ['--momentum 2.0', 'at most 1']),
        (train, ['--steps', '5', '--epochs', '2'], ['--steps 5', '--epochs 2', 'one of them']),
        (train, ['--data', scenes, '--resume', tmp_path / 'other.pt', *tiny], ['other.pt', 'no run to resume']),
        (train, ['--data', tmp_path / 'absent', *out], ['absent', 'does not exist']),
        (train, ['--data', tmp_path / 'empty', *out], ['empty', 'no .tar file']),
        (train, ['--data', tmp_path / 'silent.tar', *out], ['silent.tar', 'alt, url', '--caption-keys']),
        (train, ['--data', tmp_path / 'lonely.tar', *out], ['lonely.tar', '.json or .txt']),
        (train, ['--data', tmp_path / 'text.tar', *out], ['text.tar', 'no readable tar']),
        (train, ['--data', scenes, '--batch', '64', *tiny], ['--batch 64', '40 pairs', 'lower']),
        (train, ['--data', scenes, '--batch', '1', *tiny], ['--batch 1', 'at least 2']),
        (train, ['--stepz', '3'], ["'--stepz'", 'did you mean --steps?']),
        (train, ['--preset', 'vit-b-61'], ["'vit-b-61'", 'vit-b-16']),
        (train, ['--steps', 'many'], ['--steps', "'many'"]),
        (train, ['--method', 'clap', *tiny], ["'clap'", 'cosmos, clip']),
        (train, ['--data', scenes, '--vocab', tmp_path / 'stub.gz', *tiny], ['stub.gz', 'git-lfs', '--vocab PATH']),
        (train, ['--data', scenes, '--resume', tmp_path / 'junk.pt', *tiny], ['junk.pt', 'no checkpoint']),
        (evaluation, ['retrieval', tmp_path / 'absent.pt', *val], ['absent.pt', 'does not exist']),
        (evaluation, ['retrieval', tmp_path / 'empty.pt', *val], ['empty.pt', 'no checkpoint']),
        (evaluation, ['retrieval', tmp_path / 'other.pt', *val], ['other.pt', 'weights', 'train.py']),
        (evaluation, ['retrieval', tmp_path / 'other.pt', '--shardz', 'x'], ['--shardz', '--shards']),
        (data, ['inspect', tmp_path / 'absent'], ['absent', 'does not exist'])]
    monkeypatch.setattr(data.Parser, 'exit', lambda self, status, told: sys.exit(told.strip() if status == 1 else 2))
    for module, argv, parts in cases:
        told = run_main(monkeypatch, module.main, *argv)
        assert isinstance(told, str) and told.startswith('error: ') and '\n' not in told, (argv, told)
        assert all(part in told for part in parts), told
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.delenv('COSMOS_VOCAB', raising=False)
    for door in ('socket.socket.connect', 'socket.getaddrinfo'):
        monkeypatch.setattr(door, lambda *a, **k: (_ for _ in ()).throw(OSError('no network')))
    with pytest.raises(ValueError, match=f'be fetched into {tmp_path}.*no network.*--vocab PATH or COSMOS_VOCAB'):
        Tokenizer.clip()
    with pytest.raises(ValueError, match='image_size 100 .* 16; choose 96'):
        Config(image_size=100)
    with pytest.raises(ValueError, match='vision_width 100 cannot be split into 12'):
        Config(vision_width=100)
    with pytest.raises(ValueError, match='30 x 32 pixels .* patches of 8'):
        micro()[0].encode_image(torch.zeros(1, 3, 30, 32))


def test_help_is_the_comments(monkeypatch, capsys):
    """oracle: the dataclass: every field is a flag, with its own comment as help."""
    with pytest.raises(SystemExit):
        train.parse_options(['--help'])
    told = ' '.join(capsys.readouterr().out.split())
    source = (HERE / 'train.py').read_text(encoding='utf-8')
    for name in vars(train.Options()):
        comment = re.search(rf'^    {name}: .*?# (.*)$', source, re.M)[1]
        assert '--' + name.replace('_', '-') in told and ' '.join(comment.split())[:30] in told


def test_readme_snippet_runs(monkeypatch, tmp_path, capsys):
    """oracle: the snippet under 'Use a checkpoint' itself, run on a checkpoint and a picture of those names."""
    model, tokenizer = spelling_model()
    saved = {'config': vars(model.config), 'merges': [], 'student': model.state_dict()}
    monkeypatch.chdir(tmp_path)
    Path('runs/tiny-cosmos').mkdir(parents=True)
    torch.save(saved, 'runs/tiny-cosmos/last.pt')
    Path('photo.jpg').write_bytes(picture())
    readme = (HERE / 'README.md').read_text(encoding='utf-8')
    (snippet,) = re.findall(r'```python\n(import torch\n.*?)```', readme, re.S)
    exec(snippet, {})
    scores = evaluation.embed_images(model, ['photo.jpg'], data.Preprocess(32)) @ evaluation.embed_texts(
        model, tokenizer, ['a red star', 'a blue ring']).T
    assert capsys.readouterr().out.strip() == str(scores)


def test_readme_keeps_its_promises():
    """oracle: the files: line ranges, flags and commands that README names are there."""
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
    for N, W, count, *told, released, whole in ([number(cell) for cell in row] for row in rows):
        sends, reduces, logits = traffic(8, 8, N // W, N, 512)
        want = [0, 0, logits] if W == 1 else [sends, reduces, logits]
        assert told == [pytest.approx(4e-6 * n, abs=0.6) for n in want]
        assert (count, released) == ((0, 0), (2, 160))[W > 1]
        assert whole == pytest.approx(4e-6 * traffic(8, 8, N, N, 512)[2], abs=0.6)
    known = {'--' + name.replace('_', '-') for name in vars(train.Options())}
    commands = re.findall(r'(?:python|torchrun[^\n]*?) train\.py([^\n`]*)', text)
    assert commands
    for command in commands:
        assert set(re.findall(r'--[\w-]+', command)) <= known, command


# --- What the shortcuts gain ------------------------------------------------------------------------------------------

def against_plain_forms(config, B, lengths, repeats=7):
    """Seconds, forward and backward, of the parts in their plain form and in ours, in turn -> {part: (plain, ours)}.

    Plain: captions padded to the context, all rows of all blocks; keys and values projected for every view; naive_loss.
    """
    torch.manual_seed(0)
    model, D, V = COSMOS(config), config.embed_dim, 8
    whole = torch.randint(1, config.vocab_size - 2, (8, B, config.context_length))
    for caption, (least, most) in zip(whole, lengths):
        caption[torch.arange(B), torch.randint(least - 1, most, (B,))] = config.vocab_size - 1
    samples = [(torch.empty(2, 0), torch.empty(6, 0), torch.empty(8, 0), whole[:, i], 0) for i in range(B)]
    cut = [caption for group in data.collate(samples).texts for caption in group]
    query, tokens = torch.randn(V, B, D, requires_grad=True), torch.randn(B, 64, D, requires_grad=True)
    vectors = [cosmos.unit(torch.randn(n, B, D)).requires_grad_() for n in (8, 8, 8, 8)]
    targets, out = [cosmos.unit(torch.randn(2, B, D)) for _ in range(2)], Output(*vectors)
    cross = model.image_cross
    parts = {
        'text tower': (lambda: sum(x.sum() for x in model.text([whole.flatten(0, 1)], keep=True)),
                       lambda: sum(x.sum() for x in model.text(cut, keep=True))),
        'cross-attention': (lambda: torch.cat([cross(query[v:v + 1], tokens) for v in range(V)]).sum(),
                            lambda: cross(query, tokens).sum()),
        'losses': (lambda: naive_loss(out, *targets, 14, 14),
                   lambda: clip_loss(out, 14) + cosmos_loss(out, *targets, 14))}
    times = {name: ([], []) for name in parts}
    for _ in range(repeats):
        for name, forms in parts.items():
            for form, kept in zip(forms, times[name]):
                begun = time.perf_counter()
                form().backward()
                kept.append(time.perf_counter() - begun)
    return {name: tuple(sorted(some)[repeats // 2] for some in pair) for name, pair in times.items()}


if __name__ == '__main__':      # python test_cosmos.py: the gains of README's table on this machine
    small = Config.preset('tiny', context_length=77, vision_layers=6, text_layers=4)
    for name, config, B in (('small', small, 32), ('big', Config(), 4)):
        for part, (plain, ours) in against_plain_forms(config, B, [(10, 77)] * 2 + [(10, 20)] * 6).items():
            print(f'{name:6} {part:16} plain {1000 * plain:8.1f} ms  ours {1000 * ours:8.1f} ms  {plain / ours:5.1f} x')
