"""The claims of the paper and of cosmos.py. Each docstring names its oracle: what a result must equal.

    pytest test_cosmos.py           this file
    pytest                          all tests: also those of data, training, evaluation, plumbing, course and extras

Part 1 compares with the released code: tests/formula.json has what it gives for the weights and inputs of
tests/formula.py, so this needs no other file. Parts 2-5 come in the order of cosmos.py.
"""
import json
import math
import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

import cosmos
import train
from cosmos import COSMOS, GLOBALS, Config, Teacher, clip_loss, cosmos_loss, total_loss, unit
from eval import encode_dense
from plumbing.processes import compile_blocks
from plumbing.progress import Progress
from plumbing.weights import to_openclip
from tests.formula import wavy_inputs, wavy_model
from tests.helpers import MICRO, ROOT, close, micro, refused, seeded

# --- 1. The released code --------------------------------------------------------------------------------------------

def test_equals_the_released_code():
    """oracle: what the released code gives for the weights and inputs of tests/formula.py: both losses, h_I of view 0 and
    h_T of caption 0 of one pair, and the norm of the gradient of each parameter. Norms below 1e-5, of the LayerNorms of
    the queries, are what is left of sums that cancel, so they are held to 1e-9."""
    released = json.loads((ROOT / 'tests/formula.json').read_text())
    student = wavy_model(0)
    teacher = Teacher(wavy_model(100))
    images, texts = wavy_inputs()
    out = student(images, texts)
    cls_t, eot_t = teacher(images[:2], texts[:2])
    loss, terms = total_loss(student, out, cls_t, eot_t)
    loss.backward()
    clip = terms['clip'].item()
    assert clip == pytest.approx(released['clip_loss'], abs=1e-6)
    assert loss.item() - clip == pytest.approx(released['cosmos_loss'], abs=1e-6)
    assert out.h_I[0, 0].tolist() == pytest.approx(released['h_I_view0_pair0'], abs=1e-6)
    assert out.h_T[0, 0].tolist() == pytest.approx(released['h_T_caption0_pair0'], abs=1e-6)
    gradients = to_openclip({name: p.grad for name, p in student.named_parameters()})
    norms = {name: gradient.norm().item() for name, gradient in gradients.items()}
    assert norms == pytest.approx(released['gradient_norms'], rel=1e-5, abs=1e-9)


def test_sizes_and_initial_values_are_the_released():
    """oracle: the parameters of the paper's ViT-B/16 and open_clip's ViT-B/32; the standard deviations of CLIP's start;
    the bounds 0 and ln 100 of the scales."""
    for preset, cross_heads, count in ('vit-b-32', 0, 151_277_313), ('vit-b-16', 8, 152_382_466):
        with torch.device('meta'):
            model = COSMOS(replace(train.PRESETS[preset].sizes, cross_heads=cross_heads))
        assert sum(p.numel() for p in model.parameters()) == count
    model = COSMOS(train.PRESETS['tiny'].sizes)
    found = [p.std().item() for p in model.text.parameters() if p.ndim > 1]
    block = [128 ** -0.5, 512 ** -0.5, 256 ** -0.5, 512 ** -0.5]        # attention, its output, the MLP's two layers
    # Positions, projection, tokens, two blocks.
    assert found == pytest.approx([0.01, 128 ** -0.5, 0.02, *block, *block], rel=0.1)
    visual = model.visual
    for p in visual.class_embedding, visual.positional_embedding, visual.proj:
        assert p.std().item() == pytest.approx(96 ** -0.5, rel=0.2)
    for scale in model.log_scales():
        assert scale.item() == pytest.approx(math.log(1 / 0.07))
        for value, clamped in (9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0):
            scale.data.fill_(value)
            model.clamp_scales()
            assert scale.item() == pytest.approx(clamped)


# --- 2. Presets and sizes --------------------------------------------------------------------------------------------

def test_sizes_and_recipes():
    """oracle: the released models and their script for CC3M; ours recorded, because if they move, every run is another
    one. A recipe sets options of train.py. A model of every size can be built."""
    options, _ = train.read_options([])
    paper = dict(epochs=32, batch=1024, lr=5e-4, lr_end=0, warmup=2000, wd=0.5, momentum=0.999, momentum_ramp=0,
                 local_crops=6, local_captions=6, augment='full', vocab='clip')
    laptop = dict(steps=1000, batch=32, lr=1e-3, lr_end=0.1, warmup=100, wd=0.1, momentum=0.995, momentum_ramp=10,
                  local_crops=2, local_captions=2, augment='crops', vocab='learn')
    small = dict(embed_dim=128, patch_size=8, vision_layers=4, text_width=128, text_layers=2, text_heads=2,
                 context_length=64, cross_heads=4)
    released = dict(embed_dim=512, image_size=224, local_image_size=96, patch_size=16, vision_width=768,
                    vision_layers=12, vision_heads=12, text_width=512, text_layers=12, text_heads=8,
                    context_length=77, vocab_size=49408, cross_heads=8, two_scales=False, quick_gelu=False)
    assert vars(Config()) == released
    expected = {
        Config(): paper,
        Config(patch_size=32): paper,
        Config(embed_dim=384, vision_width=384, vision_heads=6, text_width=384, text_heads=6): paper,
        Config(**small, image_size=48, local_image_size=24, vision_width=96, vision_heads=3): laptop,
        Config(**small, image_size=64, local_image_size=32, vision_width=128, vision_heads=4):
            laptop | dict(steps=800, batch=64, local_crops=4, local_captions=4),
        MICRO: laptop}
    assert {preset.sizes: preset.recipe for preset in train.PRESETS.values()} == expected
    assert train.PRETRAINED == dict(lr=1e-5, wd=0.1, momentum=0.99, momentum_ramp=0)
    for sizes, recipe in expected.items():
        assert recipe.keys() < options.keys()
        with torch.device('meta'):
            COSMOS(sizes)               # its widths can be divided by its heads


# --- 3. Student and teacher ------------------------------------------------------------------------------------------

def test_a_plain_clip_has_the_same_towers():
    """oracle: a model with cross-attention and the same weights. A plain CLIP has no patches and no words."""
    model, images, texts = micro()
    plain, _, _ = micro('clip')
    plain.load_state_dict(model.state_dict(), strict=False)
    out = plain(images, texts)
    full = model(images, texts)
    close(out.cls, full.cls)
    close(out.eot, full.eot)
    _, patches = plain.encode_image(images[2])
    _, words = plain.encode_text(texts[2])
    assert out.h_I is out.h_T is patches is words is None


def test_every_view_reads_view_0_and_caption_0():
    """oracle: Eq. 1-2 as they stand, one view at a time, with torch's own attention, which returns weights, too."""
    model, images, texts = micro()
    out = model(images, texts)

    def read(cross, query, tokens):
        cross.attn.batch_first = True
        keys = cross.ln_k(tokens)
        values, weights = torch.nn.MultiheadAttention.forward(cross.attn, cross.ln_q(query)[:, None], keys, keys)
        return F.normalize(values[:, 0] + query, dim=-1), weights[:, 0]

    cls, patches = zip(*map(model.encode_image, images))
    eot, words = zip(*map(model.encode_text, texts))
    for query, h_I in zip(cls, out.h_I, strict=True):
        close(h_I, read(model.read_text, query, words[0])[0])
    for query, h_T in zip(eot, out.h_T, strict=True):
        close(h_T, read(model.read_image, query, patches[0])[0])
    over_patches, over_words = model.attention(images[0], texts[0])
    close(over_patches, read(model.read_image, eot[0], patches[0])[1])
    close(over_words, read(model.read_text, cls[0], words[0])[1])


def test_teacher_is_a_moving_average():
    """oracle: the closed form s + lambda^k (t0 - s) after k updates. Teacher and student share no tensor."""
    model, images, texts = micro()
    teacher = Teacher(model)
    start = [p.clone() for p in model.parameters()]
    for p in model.parameters():
        p.data.normal_()
    for _ in range(7):
        teacher.update(model, 0.9)
    for t0, t, s in zip(start, teacher.parameters(), model.parameters(), strict=True):
        close(t, s + 0.9 ** 7 * (t0 - s))
    cls_t, eot_t = teacher(images[:2], texts[:2])
    for x in (*teacher.parameters(), cls_t, eot_t):
        assert not x.requires_grad


# --- 4. The losses ---------------------------------------------------------------------------------------------------

def slow_loss(a, b, scale):
    """L_sym-nce in loops: for each pair of views, row i must find column i, and the other way round."""
    own = torch.arange(a.shape[1])
    losses = []
    for one in a:
        for other in b:
            logits = scale * one @ other.T
            losses.append(F.cross_entropy(logits, own))
            losses.append(F.cross_entropy(logits.T, own))
    return sum(losses) / len(losses)


def a_forward_pass(method):
    """(model, out, cls_t, eot_t). The scales differ, and the teacher's vectors are random."""
    model, images, texts = micro(method)
    for k, scale in enumerate(model.log_scales(), 1):
        scale.data.fill_(k)
    cls_t, eot_t = F.normalize(torch.randn(2, GLOBALS, 3, 16), dim=-1)
    return model, model(images, texts), cls_t, eot_t


@pytest.mark.parametrize('method', train.METHODS)
def test_total_loss_of_each_method(method):
    """oracle: L_CLIP, and what the name of a term says, as loops. The scale is e; if there is a second, it is e^2."""
    model, out, cls_t, eot_t = a_forward_pass(method)
    vectors = out._asdict() | {'cls_t': cls_t, 'eot_t': eot_t}
    second = math.e ** len(model.log_scales())
    loss, terms = total_loss(model, out, cls_t, eot_t, train.METHODS[method].terms)
    clip, *added = terms
    expected = {clip: slow_loss(out.cls[:GLOBALS], out.eot, math.e)}
    for name in added:                                  # such as h_I_cls_t: h_I must find cls_t
        for target in 'cls_t', 'eot_t':
            if name.endswith(f'_{target}'):
                expected[name] = slow_loss(vectors[name.removesuffix(f'_{target}')], vectors[target], second)
    assert_close(terms, expected)
    assert_close(loss, expected[clip] + sum(expected[name] / len(added) for name in added))
    if method == 'cosmos':
        assert_close(loss, clip_loss(out, math.e) + cosmos_loss(out, cls_t, eot_t, second))


@pytest.mark.parametrize('method, forward, backward', [
    ('cosmos', [2 + 5, 4 + 5, 2 + 2], [4 + 5, 2 + 5]),
    ('no-cross-attention', [2 + 5, 4 + 5, 2 + 2], [4 + 5, 2 + 5]),
    ('across', [2 + 5, 4 + 5 + 4 + 5, 2 + 2], [4 + 5 + 4 + 5, 2 + 5]),
    ('clip', [2 + 5], [2 + 5])])
def test_collectives_of_a_step(monkeypatch, method, forward, backward):
    """oracle: the table of docs/differences.md: how many vectors each collective sends: 2 cls and 5 eot; 4 h_I and 5
    h_T, or 4 cls and 5 eot, or all of these; 2 cls_t and 2 eot_t, without a gradient. The other GPU has the same pairs,
    so every key is there twice, and every L_nce is larger by ln 2. On a GPU nothing is gathered on the CPU: torch's
    device meta does not mix with it."""
    gathered = []
    reduced = []

    def all_gather(everyones, x):
        gathered.append(len(x))
        everyones.copy_(torch.cat([x, x]))

    model, out, cls_t, eot_t = a_forward_pass(method)
    added_terms = train.METHODS[method].terms
    alone, terms = total_loss(model, out, cls_t, eot_t, added_terms)
    monkeypatch.setattr(cosmos, 'dist', SimpleNamespace(
        is_initialized=lambda: True, get_world_size=lambda: 2, get_rank=lambda: 0,
        all_gather_single=all_gather, all_reduce=lambda grad: reduced.append(len(grad))))
    loss, _ = total_loss(model, out, cls_t, eot_t, added_terms)
    loss.backward()
    assert (gathered, reduced) == (forward, backward)
    losses = 1 if len(terms) == 1 else 2        # L_CLIP, and the mean of the others
    assert_close(loss, alone + losses * math.log(2))
    [there] = cosmos.gather(torch.ones(2, 3, 16, device='meta'))
    assert there.keys.shape == (2, 6, 16)


def test_losses_of_two_ranks_are_those_of_one(monkeypatch):
    """oracle: one process with all six pairs. Each rank has three of them as queries, and all as keys."""
    a, b = F.normalize(torch.randn(2, 4, 6, 16), dim=-1)
    whole = cosmos.match(cosmos.Gathered(a, a), cosmos.Gathered(b, b), 5)
    losses = []
    for rank in 0, 1:
        monkeypatch.setattr(cosmos, 'dist', SimpleNamespace(
            is_initialized=lambda: True, get_world_size=lambda: 2, get_rank=lambda: rank))
        own = slice(3 * rank, 3 * rank + 3)
        losses.append(cosmos.match(cosmos.Gathered(a[:, own], a), cosmos.Gathered(b[:, own], b), 5))
    assert_close(sum(losses) / 2, whole)


def test_losses_are_float32_under_autocast():
    """oracle: the same loss outside autocast."""
    model, images, texts = micro()
    with torch.autocast('cpu', torch.bfloat16):
        out = model(images, texts)
        loss = cosmos_loss(out, out.cls, out.eot, 14.0)
    assert {features.dtype for features in out} == {torch.float32}
    assert loss == cosmos_loss(out, out.cls, out.eot, 14.0)
    lengths = unit(torch.randn(50, 16).bfloat16()).norm(dim=-1)         # rounded to bf16 they would differ by 1e-3
    assert_close(lengths, torch.ones(50), rtol=0, atol=1e-6)


def strangers_that_copy(N=256, D=512):
    """Images that live in the first half of the coordinates, texts that live in the second, strangers to each other,
    and a cross-attention that copies what it reads -> Output."""
    x, y = torch.randn(2, 1, N, D // 2)
    nothing = torch.zeros_like(x)
    cls = cosmos.unit(torch.cat([x, nothing], dim=-1))
    eot = cosmos.unit(torch.cat([nothing, y], dim=-1))
    h = cosmos.unit(cls + eot)
    return cosmos.Output(cls, eot, h, h)


@pytest.mark.parametrize('scale', [1 / 0.07, 30, 100])
def test_a_low_cosmos_loss_proves_no_agreement(scale):
    """oracle: every cosine of an image with a text is 0, so L_CLIP is ln N, a guess, while each term of Eq. 6 is below
    1 % of it. Its complement: where L_CLIP is that low, each image and its text are nearer than any strangers."""
    out = strangers_that_copy()
    guess = math.log(256)
    assert clip_loss(out, scale).item() == pytest.approx(guess, rel=1e-6)
    for term in cosmos.cosmos_terms(out, out.cls, out.eot, scale).values():
        assert term < 0.01 * guess
    agreeing = out._replace(eot=cosmos.unit(out.cls + 0.5 * out.eot))
    assert clip_loss(agreeing, scale) < 0.01 * guess
    cosines = agreeing.cls[0] @ agreeing.eot[0].T
    assert cosines.diag().min() > (cosines - 2 * torch.eye(256)).max()


def test_the_proof_of_the_pages(capsys):
    """oracle: the block of README.md and of the course as it stands, and the output that the page prints below it."""
    for page in 'README.md', 'lesson/README.md':
        text = (ROOT / page).read_text()
        [(block, printed)] = re.findall(r'```python\n([^`]*strangers[^`]*)```\n+```\n([^`]*)```', text)
        exec(block, {})
        assert capsys.readouterr().out == printed


# --- 5. Towers, blocks, attention ------------------------------------------------------------------------------------

def test_towers_equal_the_long_way():
    """oracle: every row of every block by torch's own encoder layer, of which then one is picked; the same for captions
    cut, and for a single view."""
    model, images, texts = micro()
    cut = texts[:2] + [caption[:, :5] for caption in texts[2:]]
    ids = torch.cat(texts)
    text_rows = model.text.token_embedding(ids) + model.text.positional_embedding
    image_rows, _ = model.visual.embed(torch.cat(images[:2]))
    causal = torch.ones(12, 12, dtype=torch.bool).triu(1)
    for tower, views, x, mask, row in (
            (model.visual, images[:2], image_rows, None, torch.arange(17) == 0),
            (model.text, cut, text_rows, causal, ids == 49)):
        for block in tower.transformer.resblocks:
            normed = block.ln_1(x)
            block.attn.batch_first = True
            x = x + torch.nn.MultiheadAttention.forward(block.attn, normed, normed, normed, attn_mask=mask)[0]
            x = x + block.mlp(block.ln_2(x))
        x = tower.norm(x)
        expected = x[row.expand(x.shape[:2])] @ tower.proj
        close(torch.cat(tower(views)), expected)
        first, sequence = tower.with_sequence(views[0])
        close(first, expected[:3])
        close(sequence, x[:3])
    assert model(images[:1], texts[:1]).h_I.shape == (1, 3, 16)


def test_images_that_are_not_square():
    """oracle: torch's convolution, and positions sampled by grid_sample, on 3 x 5 patches, as in encode_dense; the
    sentence that refuses what is no multiple of a patch."""
    model, _, _ = micro()
    refused('30 x 32 pixels .* patches of 8', model.encode_image, torch.ones(1, 3, 30, 32),
            kind=ValueError)
    tower = model.visual
    images = torch.randn(2, 3, 24, 40)
    learned = tower.positional_embedding[1:].view(1, 4, 4, -1).permute(0, 3, 1, 2)
    y, x = [2 * (torch.arange(size) + 0.5) / (size + 0.1) - 1 for size in (3, 5)]       # DINO's 0.1 stretches the grid
    places = torch.cartesian_prod(y, x).flip(1).view(1, 3, 5, 2)
    positions = F.grid_sample(learned, places, 'bicubic', padding_mode='border', align_corners=False)
    patches = (tower.conv1(images) + positions).permute(0, 2, 3, 1)     # (2, 3, 5, W)
    x, _ = tower.embed(images)
    close(x[:, 1:], tower.ln_pre(patches).flatten(1, 2))
    for block in tower.transformer.resblocks:
        x = block(x)
    projected = F.normalize(tower.norm(x) @ tower.proj, dim=-1)
    close(encode_dense(model, images), projected[:, 1:].view(2, 3, 5, -1))


def test_quick_gelu_by_hand():
    """oracle: x / (1 + exp(-1.702 x)), in each block of both towers. (Exact GELU: test_equals_the_released_code.)"""
    x = torch.linspace(-3, 3, 7)
    model = COSMOS(replace(MICRO, quick_gelu=True))
    for tower in model.visual, model.text:
        for block in tower.transformer.resblocks:
            close(block.mlp.gelu(x), x / (1 + torch.exp(-1.702 * x)), 1e-6)


def test_compiled_blocks_are_few(monkeypatch):
    """oracle: four graphs for all layers, batches and lengths: each tower has whole sequences, and one row in its last
    block. As many without gradient, and in bf16; torch's own limit is 8, beyond which nothing is compiled. The count of
    FLOPs in the first step takes none of them away."""
    torch._dynamo.reset()
    graphs = CompileCounter()
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=graphs))
    model = COSMOS(MICRO)
    compile_blocks(model)
    with Progress().first_step_counted():
        _, images, texts = micro()
        model(images, texts)
    counts = []
    for settings in nullcontext(), torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        for B, length in (4, 5), (3, 7), (2, 9), (4, 8):
            _, images, texts = micro(B=B)
            with settings:
                model(images, [texts[0], texts[2][:, :length]])
        counts.append(graphs.frame_count)
    assert counts == [4, 8, 12]
