"""The model against its oracles: each docstring says what the result is compared with."""
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

import cosmos
import train
from cosmos import COSMOS, Config, Output, Teacher, clip_loss, cosmos_loss, from_openclip, to_openclip

HERE = Path(__file__).parent
SHARED = Path(os.environ.get('COSMOS_SHARED') or HERE.parent / 'shared')
cosmos.PRESETS['micro'] = Config.preset(
    'tiny', embed_dim=16, image_size=32, local_image_size=16, vision_width=24, text_width=16, context_length=12,
    vocab_size=50)


# --- Helpers ---------------------------------------------------------------------------------------------------------

def shared(*parts):
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f'{path} is absent; set COSMOS_SHARED to the folder with the recorded numbers')
    return path


def close(a, b, tolerance=1e-5):
    """Relative distance of the whole tensors."""
    assert a.shape == b.shape
    distance = ((a - b).norm() / b.norm().clamp_min(1e-12)).item()
    assert distance <= tolerance, f'relative distance {distance:.2e}, allowed {tolerance}'


def refused(sentence, call, *args, **kwargs):
    """The call raises ValueError, and its text matches `sentence`."""
    with pytest.raises(ValueError, match=sentence):
        call(*args, **kwargs)


def captions(B, length):
    """(B, 12) words with ends (the highest id) at most `length` long. Words follow the end too: noise for padding."""
    ids = torch.randint(1, 49, (B, 12))
    pairs = torch.arange(B)
    ids[pairs, length - 1 - pairs % 3] = 49
    return ids


def micro(method='cosmos', B=3):
    """A micro model with one batch: (model, 2 + 2 images, 2 + 3 captions)."""
    torch.manual_seed(0)
    heads = 2 if method == 'cosmos' else 0
    model = COSMOS(Config.preset('micro', cross_heads=heads))
    images = [torch.randn(B, 3, side, side) for side in (32, 32, 16, 16)]
    texts = [captions(B, length) for length in (9, 12, 5, 5, 5)]
    return model, images, texts


def total_loss(model, images, texts):
    """What training minimises, at its start: the teacher is a copy of the student."""
    out = model(images, texts)
    loss = clip_loss(out, model.logit_scale.exp())
    if model.has_heads:
        targets = Teacher(model)(images[:2], texts[:2])
        loss = loss + cosmos_loss(out, *targets, model.distill_logit_scale.exp())
    return loss


# --- cosmos.py against the released code -----------------------------------------------------------------------------

@pytest.fixture(scope='module')
def golden():
    return torch.load(shared('golden', 'tiny.pt'), weights_only=True)


def released(golden, name):
    """The recorded `student` or `teacher`, in our names."""
    model = COSMOS(Config(**golden['config']))
    model.load_state_dict(from_openclip(golden[name]))
    return model


def test_golden_training_step(golden):
    """oracle: the released code, as recorded: features, losses, gradients, both models after the step."""
    expected = golden['expected']
    hyper = golden['hyper']
    images = golden['images']
    texts = golden['texts']
    student = released(golden, 'student')
    teacher = Teacher(released(golden, 'teacher'))
    out = student(images, texts)
    targets = teacher(images[:2], texts[:2])
    clip = clip_loss(out, student.logit_scale.exp())
    distill = cosmos_loss(out, *targets, student.distill_logit_scale.exp())
    names = ('student_image student_text cross_image cross_text teacher_image teacher_text '
             'clip_loss cosmos_loss total_loss').split()
    for name, value in zip(names, (*out, *targets, clip, distill, clip + distill)):
        close(value, expected[name], 1e-6)
    (clip + distill).backward()
    grads = from_openclip(expected['grads'])
    for name, p in student.named_parameters():
        close(p.grad, grads[name], 2e-5)
        p.grad = grads[name]        # Adam divides by its size, and that of the keys' bias is nothing but rounding noise
    train.make_optimizer(student, hyper['lr'], hyper['weight_decay']).step()
    student.clamp_scales()
    teacher.update(student, hyper['momentum'])
    for name, model in (('student_after_step', student), ('teacher_after_step', teacher.model)):
        state = to_openclip(model.state_dict())
        for key, value in expected[name].items():
            close(state[key], value, 1e-6)


def test_golden_dense_features_and_attention(golden):
    """oracle: the released code, as recorded, at an image of 64 x 96 pixels: rows come first."""
    expected = golden['expected']
    model = released(golden, 'teacher')
    for name in ('dense_plain', 'dense_csa'):
        found = model.encode_dense(golden['dense_images'], csa=name == 'dense_csa')
        assert found.shape[1:3] == (4, 6)
        close(found.flatten(1, 2), expected[name], 2e-6)
    over_patches, over_words = model.attention(golden['images'][0], golden['texts'][0])
    close(over_patches, expected['attn_image_given_text'], 2e-6)
    close(over_words, expected['attn_text_given_image'], 2e-6)


def test_names_and_sizes_are_the_released():
    """oracle: names written out; the numbers of parameters of the paper's model and of open_clip's ViT-B/16 and /32."""
    counts = []
    for preset, heads in (('vit-b-32', 0), ('vit-b-16', 0), ('vit-b-16', 8)):
        with torch.device('meta'):
            model = COSMOS(Config.preset(preset, cross_heads=heads))
        counts.append(sum(p.numel() for p in model.parameters()))
        assert from_openclip(to_openclip(model.state_dict())).keys() == model.state_dict().keys()
    assert counts == [151_277_313, 149_620_737, 152_382_466]
    theirs = to_openclip(micro()[0].state_dict())
    assert theirs.keys() >= {
        'transformer.resblocks.0.attn.in_proj_weight', 'visual.attn_cross_pool.ln_k.bias',
        'text_attn_cross_pool.attn.out_proj.weight', 'image_token_mapping.bias'}


# --- The losses ------------------------------------------------------------------------------------------------------

def naive_symmetric(a, b, scale):
    """The definition, looped: each view of a against each view of b, each row of it and each column."""
    losses = []
    for a_view in a:
        for b_view in b:
            logits = scale * a_view @ b_view.T
            for i, row in enumerate(logits):
                losses.append(row.logsumexp(dim=0) - row[i])
                losses.append(logits[:, i].logsumexp(dim=0) - row[i])
    return torch.stack(losses).mean()


def test_losses_by_pencil():
    """oracle: hand arithmetic to four decimals, the example in the docstring of nce."""
    rows = torch.tensor([[[1.0, 0], [0, 1]]])
    columns = torch.tensor([[[1.0, 0], [0.6, 0.8]]])
    for found, expected in ((cosmos.nce(rows, columns, 1.0), 0.4421),
                            (cosmos.nce(columns, rows, 1.0), 0.4557),
                            (cosmos.symmetric_nce(rows, columns, rows, columns, 1.0), 0.4489)):
        assert found.item() == pytest.approx(expected, abs=5e-5)


def test_losses_equal_loops():
    """oracle: the definition in three loops, in float64; of L_COSMOS the mean of its terms."""
    torch.manual_seed(0)
    views = F.normalize(torch.randn(22, 4, 8, dtype=torch.float64), dim=-1)
    features = views.split([5, 3, 6, 4, 2, 2])
    out = Output(*features[:4])
    targets = features[4:]
    clip = naive_symmetric(out.image[:2], out.text, 9.0)
    terms = torch.stack([naive_symmetric(h, target, 7.0) for h in features[2:4] for target in targets])
    close(clip_loss(out, 9.0), clip, 1e-12)
    close(cosmos.cosmos_terms(out, *targets, 7.0), terms, 1e-12)
    close(cosmos_loss(out, *targets, 7.0), terms.mean(), 1e-12)


def test_losses_have_closed_forms():
    """oracle: equal features give ln N in every term, orthogonal pairs at a large scale 0."""
    same = torch.full((2, 6, 4), 0.5)
    apart = torch.eye(6).expand(2, 6, 6)
    terms = cosmos.cosmos_terms(Output(same, same, same, same), same, same, 14.0)
    assert terms.tolist() == pytest.approx([math.log(6)] * 4)
    assert cosmos_loss(Output(apart, apart, apart, apart), apart, apart, 100.0).item() < 1e-6


def test_which_views_enter_which_loss():
    """oracle: invariance. A local image moves L_COSMOS but not L_CLIP, a local caption both."""
    model, images, texts = micro()
    targets = Teacher(model)(images[:2], texts[:2])
    out = model(images, texts)
    for moved, moves_clip in ((model([*images[:3], -images[3]], texts), False),
                              (model(images, [*texts[:4], texts[0]]), True)):
        assert (clip_loss(moved, 14.0) != clip_loss(out, 14.0)) == moves_clip
        assert cosmos_loss(moved, *targets, 14.0) != cosmos_loss(out, *targets, 14.0)


def test_losses_are_float32_under_autocast():
    """oracle: the same losses outside autocast."""
    model, images, texts = micro()
    with torch.autocast('cpu', torch.bfloat16):
        out = model(images, texts)
        losses = clip_loss(out, 14.0), cosmos_loss(out, out.image, out.text, 14.0)
    assert {features.dtype for features in out} == {torch.float32}
    assert losses == (clip_loss(out, 14.0), cosmos_loss(out, out.image, out.text, 14.0))


# --- Attention, blocks, towers ---------------------------------------------------------------------------------------

def test_attention_equals_torch():
    """oracle: nn.MultiheadAttention with the same parameters, whose masks are True where a key may not be seen."""
    torch.manual_seed(0)
    ours = cosmos.Attention(32, 4)
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x, y = torch.randn(2, 3, 5, 32)
    mask = torch.ones(5, 5).tril() > 0
    for query, context, seen in ((x, x, mask), (x, y, mask), (x[:, 2:3], x, mask[2:3])):
        close(ours(query, context, seen), theirs(query, context, context, attn_mask=~seen)[0])


def test_cross_attention_equals_torch():
    """oracle: nn.MultiheadAttention, one view at a time: values and weights."""
    head = micro()[0].image_cross
    theirs = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    theirs.load_state_dict(head.attn.state_dict())
    queries = torch.randn(4, 3, 16)
    tokens = torch.randn(3, 7, 16)
    keys = head.ln_k(tokens)
    for query, found in zip(queries, head(queries, tokens)):
        pooled, weights = theirs(head.ln_q(query)[:, None], keys, keys)
        close(found, pooled[:, 0])
        close(head.weights(query, tokens), weights[:, 0])


def all_rows(tower, x, mask=None):
    """The plain stack: the last block computes every row, as all others do."""
    for block in tower.transformer.resblocks:
        x = block(x, mask)
    return x


def test_vision_tower_equals_the_long_way():
    """oracle: each view alone, through every block on all rows; without `keep` the same."""
    model, images, _ = micro()
    tower = model.visual
    views = [*images, images[1]]                                        # of 32, 32, 16, 16, 32 pixels
    pooled, tokens = tower(views, keep=True)
    rows = [tower.ln_post(all_rows(tower, tower.ln_pre(tower.embed(view)))) for view in views]
    close(pooled, torch.stack([x[:, 0] for x in rows]) @ tower.proj)
    close(tokens, rows[0][:, 1:])
    close(tower(views)[0], pooled)


def test_text_tower_equals_the_long_way():
    """oracle: captions at full length, through every block on all rows, behind a mask; captions that are cut
    give the same gradients, also where activations are computed again."""
    model, images, texts = micro()
    tower = model.text
    cut = texts[:2] + [caption[:, :5] for caption in texts[2:]]
    pooled, tokens = tower(cut, keep=True)
    ids = torch.cat(texts)
    x = tower.token_embedding(ids) + tower.positional_embedding
    x = tower.ln_final(all_rows(tower, x, torch.ones(12, 12).tril() > 0))
    ends = x[torch.arange(len(ids)), ids.argmax(dim=1)]
    close(pooled.flatten(0, 1), ends @ tower.text_projection)
    close(tokens, x[:3])
    parameters = list(model.parameters())
    expected = torch.autograd.grad(total_loss(model, images, torch.stack(texts)), parameters)
    for recompute in (False, True):
        model.visual.transformer.grad_checkpointing = recompute
        tower.transformer.grad_checkpointing = recompute
        for a, b in zip(torch.autograd.grad(total_loss(model, images, cut), parameters), expected):
            close(a, b, 2e-5)


def test_positions_are_bicubic_with_a_tenth_added():
    """oracle: torch's grid_sample, bicubic with borders repeated, at (i + 0.5) / (n + 0.1) of the side."""
    tower = micro()[0].visual
    assert tower.positions(4, 4) is tower.positional_embedding
    table = tower.positional_embedding[1:].T.view(1, 24, 4, 4)
    for h, w in ((3, 5), (7, 2)):
        y, x = (2 * (torch.arange(n) + 0.5) / (n + 0.1) - 1 for n in (h, w))            # the sides are at -1 and 1
        places = torch.cartesian_prod(y, x).flip(1).view(1, h, w, 2)
        expected = F.grid_sample(table, places, 'bicubic', 'border', align_corners=False)
        close(tower.positions(h, w)[1:], expected[0].flatten(1).T)


def test_sizes_that_do_not_fit_are_refused():
    """oracle: the rule for errors: one sentence with the value and the place."""
    for size in ('image_size', 'local_image_size', 'vision_width', 'text_width', 'embed_dim'):
        refused(f'^{size} 100 is no multiple of ', Config, **{size: 100})
    model, images, texts = micro('clip')
    refused('30 x 32 pixels .* patches of 8', model.encode_image, images[0][:, :, :30])
    refused('plain CLIP', model.attention, images[0], texts[0])


# --- Teacher, scales, gradients, compiling ---------------------------------------------------------------------------

def test_teacher_is_a_moving_average():
    """oracle: closed form: after k updates towards a constant student, s + lambda^k (t0 - s); nothing is shared."""
    model, images, texts = micro()
    teacher = Teacher(model)
    start = [p.clone() for p in model.parameters()]
    for p in model.parameters():
        p.data.normal_()
    for _ in range(7):
        teacher.update(model, 0.9)
    for t0, t, s in zip(start, teacher.parameters(), model.parameters()):
        close(t, s + 0.9 ** 7 * (t0 - s))
    for x in (*teacher.parameters(), *teacher(images[:2], texts[:2])):
        assert not x.requires_grad


def test_scales_are_clamped():
    """oracle: the bounds 0 and ln 100; a scale between them stays as it is."""
    model = micro()[0]
    for value, expected in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        for scale in (model.logit_scale, model.distill_logit_scale):
            scale.data.fill_(value)
            model.clamp_scales()
            assert scale.item() == pytest.approx(expected)


@pytest.mark.parametrize('method', ['cosmos', 'clip'])
def test_every_parameter_gets_a_gradient(method):
    """oracle: none may be missing, or DistributedDataParallel waits for ever, nor all zero, or it never learns."""
    model, images, texts = micro(method)
    total_loss(model, images, texts).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_compiled_blocks_are_few_and_equal():
    """oracle: the model as it is; a backend that counts graphs, which serve all layers, batches and lengths."""
    torch._dynamo.reset()
    counter = CompileCounter()
    model = micro()[0]
    plain = Teacher(model).model
    for module in model.modules():
        if isinstance(module, cosmos.Block):
            module.compile(dynamic=True, backend=counter)
    for B, length in ((4, 5), (3, 7), (2, 9), (4, 8)):
        _, images, texts = micro(B=B)
        texts = [texts[0], texts[2][:, :length]]
        for a, b in zip(model(images, texts), plain(images, texts)):
            close(a, b, 1e-6)
    assert 0 < counter.frame_count < 8                                  # at 8 the compiler gives up, without a word


def test_the_walk_through_runs():
    """oracle: the shapes of 5 views of 4 pairs, as a reader sees them."""
    done = subprocess.run([sys.executable, 'cosmos.py'], cwd=HERE, capture_output=True, text=True)
    assert done.stdout.count('(5, 4, 128)') == 4 and 'loss' in done.stdout, done.stderr
