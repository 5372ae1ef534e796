"""The claims of cosmos.py, data.py, eval.py and train.py. Each docstring names its oracle: what a result must equal.

    pytest test_cosmos.py

Numbers recorded from the released code are read from COSMOS_SHARED; where it is absent those tests are skipped.
"""
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial, partialmethod
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import active_children, current_process, set_forkserver_preload
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch._dynamo.testing import CompileCounter
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torchvision.transforms.v2 import functional as V

import cosmos
import data
import eval as evaluation
import train
from cosmos import COSMOS, Config, Output, Teacher
from cosmos import clip_loss, cosmos_loss, from_openclip, symmetric_nce, to_openclip, unit
from data import Colours, Order, Shards, Tokenizer, Views
from extras.prepare import sample_sheet
from lesson.scenes import make_scenes

HERE = Path(__file__).parent
SHARED = Path(os.environ.get('COSMOS_SHARED') or HERE.parent / 'shared')
MICRO = Config.preset(
    'tiny', embed_dim=16, image_size=32, local_image_size=16, vision_width=24,
    text_width=16, context_length=12, vocab_size=50)
cosmos.PRESETS['micro'] = MICRO
torch.set_num_threads(1)  # small models gain nothing from more, and lose much on a busy machine

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


def one_sentence(text, parts):
    """An error of one line that has all these parts."""
    assert len(text.splitlines()) == 1
    for part in ['error: ', *parts]:
        assert part in text


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


def losses_of(student, teacher, images, texts):
    """One forward pass of training -> the student's Output, the teacher's targets, [L_CLIP, L_COSMOS]."""
    out = student(images, texts)
    targets = teacher(images[:2], texts[:2])
    clip = clip_loss(out, student.logit_scale.exp())
    distill = cosmos_loss(out, *targets, student.distill_logit_scale.exp())
    return out, targets, [clip, distill]


def put(path, value=''):
    """A file, and the folders it lies in -> path. Text and bytes as they are, all else as JSON."""
    if not isinstance(value, (str, bytes)):
        value = json.dumps(value)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value.encode() if isinstance(value, str) else value)
    return path


def encoded(image, kind='PNG', **options):
    """A Pillow image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    """A tar of (name, value) -> path. Times are fractions, as webdataset has them: one more header in PAX."""
    with tarfile.open(path, 'w', format=format) as tar:
        for i, (name, value) in enumerate(members):
            if not isinstance(value, bytes):
                value = json.dumps(value).encode()
            info = tarfile.TarInfo(name)
            info.mtime = 1 + i / 7
            info.size = len(value)
            tar.addfile(info, io.BytesIO(value))
    return path


def pairs_tar(path, records, images=itertools.repeat(b'image'), format=tarfile.PAX_FORMAT):
    """A tar of i.png, the bytes of an image, and i.json, its record -> path."""
    members = []
    for i, (record, image) in enumerate(zip(records, images)):
        members += [(f'{i}.png', image), (f'{i}.json', record)]
    return write_tar(path, members, format)


def dog_tar(path, n, format=tarfile.PAX_FORMAT, broken=()):
    """n pairs, an image of a colour of its own and the caption 'dog i'; some images are broken -> path."""
    records = [{'caption': f'dog {i}'} for i in range(n)]
    images = [encoded(Image.new('RGB', (40, 30), (20 * i, 0, 9))) for i in range(n)]
    for i in broken:
        images[i] = b'no image'
    return pairs_tar(path, records, images, format)


def run(module, *argv):
    """A command in this process -> what its SystemExit carries, or None."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['prog', *map(str, argv)])
        try:
            data.cli(module.main)
        except SystemExit as stop:
            return stop.code


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def scenes(tmp_path_factory):
    """A small built-in set, drawn by this process: 60 training and 16 held-out scenes."""
    root = tmp_path_factory.mktemp('scenes')
    make_scenes(root, train=60, val=16, seed=1, workers=1, colors=16, objects=2)
    return root


# --- cosmos.py against the released code -----------------------------------------------------------------------------

# What the released code computes for the weights and inputs of the test below: L_CLIP and L_COSMOS; h_I of view 0 and
# h_T of caption 0 of pair 0; norms of the gradient of the sum of both.
RELEASED_LOSSES = [1.144916, 1.142693]
RELEASED_H_I = [
    0.281730, 0.157082, -0.238676, -0.069201, -0.208976, -0.218391, 0.097343, 0.412781, 0.007528, -0.096994, -0.227825,
    -0.070147, -0.195077, 0.302107, 0.115595, 0.035327, 0.179858, -0.263263, -0.144182, 0.325059, -0.274422, 0.103162,
    0.065460, -0.185481]
RELEASED_H_T = [
    -0.019756, 0.101438, -0.225228, 0.069547, 0.111738, -0.129658, -0.105673, -0.155727, 0.305763, -0.136925, -0.366250,
    0.210126, 0.257014, -0.232304, -0.179336, 0.079805, 0.501472, -0.034358, -0.055253, 0.346725, 0.019875, 0.092989,
    -0.181882, -0.043717]
RELEASED_NORMS = {
    'logit_scale': 0.0927175, 'distill_logit_scale': 0.0860079, 'visual.proj': 0.3107190, 'ln_final.weight': 0.4828501,
    'visual.positional_embedding': 0.01126796, 'token_embedding.weight': 0.07844206, 'image_token_mapping.weight':
    0.01063868, 'text_attn_cross_pool.attn.in_proj_weight': 0.07270283, 'text_token_mapping.weight': 0.03409340,
    'visual.attn_cross_pool.ln_k.bias': 0.01735885, 'transformer.resblocks.1.mlp.c_proj.bias': 0.04277705}


def released_names():
    names = ('logit_scale distill_logit_scale text_projection positional_embedding token_embedding.weight visual.proj '
             'visual.positional_embedding visual.class_embedding visual.conv1.weight').split()
    modules = ['ln_final', 'visual.ln_pre', 'visual.ln_post', 'image_token_mapping', 'text_token_mapping']
    blocks = [f'{tower}transformer.resblocks.{layer}' for tower in ('', 'visual.') for layer in (0, 1)]
    heads = ['visual.attn_cross_pool', 'text_attn_cross_pool']
    modules += [f'{block}.{part}' for block in blocks for part in ('ln_1', 'ln_2', 'mlp.c_fc', 'mlp.c_proj')]
    modules += [f'{head}.{norm}' for head in heads for norm in ('ln_q', 'ln_k')]
    for owner in blocks + heads:
        modules.append(f'{owner}.attn.out_proj')
        names += [f'{owner}.attn.in_proj_weight', f'{owner}.attn.in_proj_bias']
    for module in modules:
        names += [f'{module}.weight', f'{module}.bias']
    return set(names)


def wave(shape, number, size=1.0):
    j = torch.arange(math.prod(shape), dtype=torch.float64)
    return (size * (0.1 * j ** 2 + number).sin()).float().view(shape)


def wavy_model(first):
    model = COSMOS(Config(24, 32, 16, 8, 32, 2, 2, 24, 2, 2, 12, 30, 8))
    state = to_openclip(model.state_dict())
    for number, name in enumerate(sorted(state), first):
        if not name.endswith('logit_scale'):
            state[name] = wave(state[name].shape, number, 0.2)
    model.load_state_dict(from_openclip(state))
    return model


def test_equals_the_released_code():
    """oracle: the released code's losses, embeddings and gradients, which stand above, and its parameters' names."""
    student, teacher = wavy_model(0), Teacher(wavy_model(100))
    images = [wave((3, 3, side, side), k) for k, side in enumerate([32, 32, 16, 16, 16])]
    texts = torch.zeros(4, 3, 12, dtype=torch.long)
    for u, b in itertools.product(range(4), range(3)):
        words = [1 + (5 * u + 3 * b + 7 * k) % 27 for k in range(3 + (u + 2 * b) % 5)]
        texts[u, b, :len(words) + 2] = torch.tensor([28, *words, 29])
    out, _, losses = losses_of(student, teacher, images, texts)
    sum(losses).backward()
    assert [loss.item() for loss in losses] == pytest.approx(RELEASED_LOSSES, abs=1e-6)
    assert out.h_I[0, 0].tolist() == pytest.approx(RELEASED_H_I, abs=1e-6)
    assert out.h_T[0, 0].tolist() == pytest.approx(RELEASED_H_T, abs=1e-6)
    gradients = to_openclip({name: p.grad for name, p in student.named_parameters()})
    assert gradients.keys() == released_names()
    for name, norm in RELEASED_NORMS.items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=5e-5), name


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
    student = released(golden, 'student')
    teacher = Teacher(released(golden, 'teacher'))
    out, targets, losses = losses_of(student, teacher, golden['images'], golden['texts'])
    names = ('student_image student_text cross_image cross_text teacher_image teacher_text '
             'clip_loss cosmos_loss total_loss').split()
    for name, value in zip(names, (*out, *targets, *losses, sum(losses))):
        close(value, expected[name], 1e-6)
    sum(losses).backward()
    grads = from_openclip(expected['grads'])
    for name, p in student.named_parameters():
        close(p.grad, grads[name], 2e-5)
        p.grad = grads[name]        # Adam divides by its size, and that of the keys' bias is nothing but rounding noise
    train.make_optimizer(student, hyper['lr'], hyper['weight_decay']).step()
    student.clamp_scales()
    teacher.update(student, hyper['momentum'])
    for name, model in ('student_after_step', student), ('teacher_after_step', teacher.model):
        state = to_openclip(model.state_dict())
        for key, value in expected[name].items():
            close(state[key], value, 1e-6)


def test_golden_dense_features_and_attention(golden):
    """oracle: the released code, as recorded, at an image of 64 x 96 pixels: rows come first."""
    expected = golden['expected']
    model = released(golden, 'teacher')
    for name in 'dense_plain', 'dense_csa':
        found = model.encode_dense(golden['dense_images'], csa=name == 'dense_csa')
        assert found.shape[1:3] == (4, 6)
        close(found.flatten(1, 2), expected[name], 2e-6)
    over_patches, over_words = model.attention(golden['images'][0], golden['texts'][0])
    close(over_patches, expected['attn_image_given_text'], 2e-6)
    close(over_words, expected['attn_text_given_image'], 2e-6)


def test_sizes_and_initial_values_are_the_released():
    """oracle: the numbers of parameters of the paper's model and of open_clip's ViT-B/16 and /32; CLIP's scales of
    initial values, for a text tower of 128 channels and 2 layers."""
    for preset, heads, count in (
            ('vit-b-32', 0, 151_277_313), ('vit-b-16', 0, 149_620_737), ('vit-b-16', 8, 152_382_466)):
        with torch.device('meta'):
            model = COSMOS(Config.preset(preset, cross_heads=heads))
        assert sum(p.numel() for p in model.parameters()) == count
    text = COSMOS(Config.preset('tiny')).text
    scales = [p.std().item() for p in text.parameters() if p.ndim > 1]
    block = [128 ** -0.5, 512 ** -0.5, 256 ** -0.5, 512 ** -0.5]        # attention, its output, the MLP's two layers
    assert scales == pytest.approx([0.01, 128 ** -0.5, 0.02, *block, *block], rel=0.1)


# --- The losses ------------------------------------------------------------------------------------------------------

def test_losses_by_hand():
    """oracle: hand arithmetic to four decimals, the example in the docstring of nce."""
    rows = torch.tensor([[[1.0, 0], [0, 1]]])
    columns = torch.tensor([[[1.0, 0], [0.6, 0.8]]])
    loss = symmetric_nce(rows, columns, rows, columns, 1.0)
    assert loss.item() == pytest.approx(0.4489, abs=5e-5)  # the mean of 0.4421 and 0.4557


def test_losses_are_float32_under_autocast():
    """oracle: the same losses outside autocast."""
    model, images, texts = micro()
    with torch.autocast('cpu', torch.bfloat16):
        out = model(images, texts)
        losses = clip_loss(out, 14.0), cosmos_loss(out, out.cls, out.eot, 14.0)
    assert {features.dtype for features in out} == {torch.float32}
    assert losses == (clip_loss(out, 14.0), cosmos_loss(out, out.cls, out.eot, 14.0))


# --- Attention, blocks, towers ---------------------------------------------------------------------------------------

def test_quick_gelu_by_hand():
    """oracle: x / (1 + exp(-1.702 x)), in each block of both towers."""
    x = torch.linspace(-3, 3, 7)
    model = COSMOS(replace(MICRO, quick_gelu=True))
    for tower in model.visual, model.text:
        for block in tower.transformer.resblocks:
            close(block.mlp.gelu(x), x / (1 + torch.exp(-1.702 * x)), 1e-6)


def test_text_tower_equals_the_long_way(monkeypatch):
    """oracle: captions at full length, through every block on all rows, behind a mask; the row of the end, and no
    other, is picked. The same where captions are cut, and where activations are computed again."""
    model, _, texts = micro()
    tower = model.text
    cut = texts[:2] + [caption[:, :5] for caption in texts[2:]]
    ids = torch.cat(texts)
    x = tower.token_embedding(ids) + tower.positional_embedding
    for block in tower.transformer.resblocks:
        x = block(x, torch.ones(12, 12).tril() > 0)
    x = tower.norm(x)
    ends = cosmos.pick(x, ids.argmax(dim=1))
    assert ends.equal(x[ids == 49][:, None])
    monkeypatch.setattr(cosmos, 'checkpoint', Mock(wraps=cosmos.checkpoint))
    for recompute in False, True:
        tower.transformer.grad_checkpointing = recompute
        eot, words = tower.with_sequence(cut)
        for found in eot, tower(cut):
            close(found.flatten(0, 1), ends[:, 0] @ tower.proj)
        close(words, x[:3])
        assert cosmos.checkpoint.called == recompute


def test_sizes_that_do_not_fit_are_refused():
    """oracle: the rule for errors: one sentence with the value and the place."""
    for size in 'image_size', 'local_image_size', 'vision_width', 'text_width', 'embed_dim':
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
    for value, expected in (9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0):
        for scale in model.logit_scale, model.distill_logit_scale:
            scale.data.fill_(value)
            model.clamp_scales()
            assert scale.item() == pytest.approx(expected)


def test_compiled_blocks_are_few_and_equal(monkeypatch):
    """oracle: the model as it is; a backend that counts graphs, which serve all layers, batches and lengths."""
    torch._dynamo.reset()
    counter = CompileCounter()
    model = micro()[0]
    plain = Teacher(model).model
    monkeypatch.setattr(cosmos.Block, 'compile', partialmethod(torch.nn.Module.compile, backend=counter))
    train.compile_blocks(model)
    for B, length in (4, 5), (3, 7), (2, 9), (4, 8):
        _, images, texts = micro(B=B)
        texts = [texts[0], texts[2][:, :length]]
        for a, b in zip(model(images, texts), plain(images, texts)):
            close(a, b, 1e-6)
    assert 0 < counter.frame_count < 8                  # by default the compiler gives up at 8


def test_the_walk_through_runs():
    """oracle: the shapes of 5 views and 4 captions of 3 pairs, as a reader sees them."""
    done = subprocess.run([sys.executable, 'cosmos.py'], cwd=HERE, capture_output=True, text=True)
    assert re.findall(r'\((\d), 3, 128\)', done.stdout) == list('545422'), done.stderr
    assert 'loss' in done.stdout

LOW = Tokenizer(['l o', 'lo w</w>', 'lo w', 'e r</w>', 'e s', 'es t</w>', 'low est</w>'], 8)

BOAT = ['a boat', 'A 3.5 m boat', 'Two men', 'A lake']


def mandelbrot(width, height):
    image = Image.effect_mandelbrot((width, height), (-2, -1.2, 1, 1.2), 60)
    return image.convert('RGB')


def readable(shards):
    """{first sentence: pixels} of the pairs that can be read."""
    found = {}
    for i in range(len(shards)):
        with suppress(Exception):
            caption = shards.pool(i)[0]
            found[caption] = data.decode(shards.image(i))
    return found


# --- Tokenizer and captions ------------------------------------------------------------------------------------------

def test_tokenizer_equals_clip():
    """oracle: ids of CLIP's own tokenizer on 35 hard texts, recorded in golden/tokenizer.json."""
    tokenizer = Tokenizer.clip(shared('vocab', 'bpe_simple_vocab_16e6.txt.gz'))
    tokenizer = pickle.loads(pickle.dumps(tokenizer))                   # as workers get it
    for text, ids, padded in json.loads(shared('golden', 'tokenizer.json').read_text()):
        assert [49406, *tokenizer.encode(text), 49407] == ids, text
        assert tokenizer([text]).tolist() == [padded]
    assert tokenizer.decode(tokenizer('A naïve café,\n 3 cats 😀')[0]) == 'a naïve café , 3 cats 😀'


@contextmanager
def served(folder):
    """A server on the loopback address of the files of a folder -> its address."""
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(SimpleHTTPRequestHandler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('no_proxy', '127.0.0.1')
        yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


def test_the_vocabulary_is_fetched_once(tmp_path, monkeypatch):
    """oracle: the merges in a server's file: of another digest they are not kept; of the right one they are there without
    the server, too. Where there are none a sentence names the remedies."""
    file = put(tmp_path / 'served/vocab.gz', gzip.compress(b'header\nl o\nlo w</w>'))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.delenv('COSMOS_VOCAB', raising=False)
    remedies = f'{tmp_path}.* is absent or not .*--vocab PATH or COSMOS_VOCAB.*--vocab learn.*--preset tiny'
    with served(file.parent) as address:
        for url in 'file:///absent', f'{address}/vocab.gz':
            monkeypatch.setattr(data, 'VOCAB_URL', url)
            refused(remedies, Tokenizer.clip)
        assert not list(tmp_path.glob('home/**/*.*'))
        monkeypatch.setattr(data, 'VOCAB_SHA256', hashlib.sha256(file.read_bytes()).hexdigest())
        assert Tokenizer.clip().merges == ['l o', 'lo w</w>']
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda *_, **options: pytest.fail('again'))
    assert Tokenizer.clip().merges == ['l o', 'lo w</w>']


def test_ids_and_words_by_hand():
    """oracle: pencil: rank 1 'lo w</w>' ends low, rank 2 'lo w' starts the others; cut rows keep their end."""
    assert LOW.encode('low lower lowest') == [513, 514, 515, 518]  # 512 + the line of each merge
    assert LOW.words('Low  LOWER') == [('low', 1), ('lower', 2)]
    assert LOW.encode('!l')[0] == 256   # '!' is byte symbol 0, and 256 + 0 where it closes a word
    assert LOW('low ' * 20).tolist() == [[519] + 6 * [513] + [520]]
    assert LOW('low').tolist() == [[519, 513, 520, 0, 0, 0, 0, 0]]
    text = 'x²+Ⅷ①_é\'S “ﬁn” ＡＢ&amp;lt;\x07 \ud800'
    assert Tokenizer.split(text) == "x ² + ⅷ ① _ é 's \" fin \" ab < \ufffd".split()


def test_learn_by_hand():
    """oracle: pencil: 'l o' and 'w e' come three times, and of equal pairs the first one met is merged first."""
    learned = Tokenizer.learn(['low low lower', 'newest newest'], 600)
    assert learned.merges == ['l o', 'w e', 'lo w</w>', 'n e', 'ne we', 'newe s', 'newes t</w>']
    assert learned.decode(learned.encode('lowest new wéw')) == 'lowest new wéw'


@pytest.mark.parametrize('record, pool', [
    ({'raw_caption': 'a boat', 'longSV_captions': 'A 3.5 m boat. Two men\nA lake</s>'}, BOAT),
    ({'raw_caption': BOAT[0], 'longSV_captions': [*BOAT[1:], 'One. Two.\n'], 'caption': 'x'}, [*BOAT, 'One. Two.']),
    ({'original_caption': "St. Mary's Church", 'caption': 'One. Two.'}, ["St. Mary's Church", 'One', 'Two']),
    ({'captions': ['one dog.', 'two. The U.S. Army. J. Smith'], 'caption': 'no'},
     ['one dog', 'two', 'The U.S. Army', 'J. Smith']),
    ({'caption': 'one dog', 'txt': 'no'}, ['one dog']),
    ({'caption': None, 'txt': 'one dog'}, ['one dog']),
    ({'captions': ['o', 'n', 'e'], 'caption': [None, 7, ''], 'alt': 'one dog'}, [])])
def test_captions_of_every_format(record, pool):
    """oracle: pools written by hand. PixelProse's original caption and items of DreamLIP's lists pass whole, as
    released; the same where their keys are named."""
    assert data.caption_pool(record) == pool
    assert data.caption_pool(record, list(record)[:2])[:len(pool)] == pool


def test_text_crops_come_in_every_order():
    """oracle: the rule itself: 1 to 5 distinct sentences a global, distinct locals; every order of a small pool."""
    pool = list('abcdefghi')
    lengths = Counter()
    orders = set()
    for seed in range(300):
        rng = random.Random(seed)
        crop, *local = data.text_crops(pool, rng, 1, 6)
        parts = crop.split('. ')
        lengths[len(parts)] += 1
        assert len(set(parts)) == len(parts) and len(set(local)) == 6
        orders.add(tuple(data.text_crops(pool[:3], rng, 0, 3)))
    assert len(orders) == 6
    assert sorted(lengths) == [1, 2, 3, 4, 5]
    assert min(lengths.values()) > 40                                   # uniform: 60 each
    crops = data.text_crops(['a', 'b'], rng, 0, 5)
    assert crops[:4] == ['a', 'b', 'a', 'b']            # whole repeats, then a random rest


# --- Shards ----------------------------------------------------------------------------------------------------------

def test_patterns_and_their_lines(tmp_path, capsys):
    """oracle: the files that were written, and which of them a pattern names."""
    for name in '08', '09', '11', 'a[1]':
        Path(tmp_path, f'{name}.tar').touch()

    def found(pattern):
        paths = data.find_shards(pattern.replace('DIR', str(tmp_path)))
        return ' '.join(Path(path).stem for path in paths), capsys.readouterr().err

    assert found('DIR') == ('08 09 11 a[1]', '')
    assert found('DIR/0*.tar::DIR/a[1].tar') == ('08 09 a[1]', '')
    names, line = found('DIR/{0..1}{8..9}.tar')
    assert names == '08 09' and '2 of 4 shards of the pattern are missing' in line
    names, line = found('DIR/{08..09}.tar::DIR')
    assert names == '08 09 11 a[1]' and '2 shards are named twice' in line
    for pattern in 'absent', '{5..4}.tar', 'x{7..8}.tar':
        refused('does not exist or holds no .tar file', data.find_shards, tmp_path / pattern)


def test_tars_of_every_format(tmp_path):
    """oracle: the pairs and names as written, in any order of members; the same by a mapped index, not scanned."""
    jpg = encoded(mandelbrot(40, 32), 'JPEG')
    long = 'folder' * 15 + '/' + 'name' * 15        # over 100 characters: GNU and PAX add a header
    members = [('x/b.json', {'caption': 'json', 'file': 'my cat.jpg'}), ('x/a.txt', b'text'), ('x/b.JPG', jpg),
               ('x/b.png', b'2nd'), ('x/a.jpg', jpg), (f'{long}.png', jpg), (f'{long}.txt', b'long'),
               ('x/alone.jpg', jpg)]
    for form in tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT:       # 0, 1, 2
        path = write_tar(tmp_path / f'{form}.tar', members, form)
    shards = Shards(tmp_path)
    pools = [shards.pool(i) for i in range(len(shards))]
    assert pools == [['json'], ['text'], ['long']] * 3
    assert {shards.image(i) for i in range(9)} == {jpg}
    assert data.open_shard(shards.paths[0]).tell() == 0  # workers share it, so no read may move it
    assert shards.name(0).endswith('0.tar:x/b.JPG (my cat.jpg)')
    assert shards.name(1).endswith('0.tar:x/a.jpg')
    table = shards.pairs
    shards.save(tmp_path)
    spawned = pickle.loads(pickle.dumps(shards))                        # as workers get it
    for other in Shards(tmp_path, cache=tmp_path), spawned:
        assert isinstance(other.pairs, np.memmap)
        assert np.array_equal(other.pairs, table)
    shutil.copytree(tmp_path, tmp_path / 'moved')
    assert Shards(tmp_path / 'moved').fingerprint == shards.fingerprint
    os.replace(dog_tar(tmp_path / 'new', 5), path)
    changed = Shards(tmp_path, cache=tmp_path)          # not by the old index, nor from the file that is open
    assert changed.pool(6) == ['dog 0']
    assert changed.fingerprint != shards.fingerprint


def test_many_shards_are_read_by_processes(tmp_path):
    """oracle: the pairs that were written. A thread of torch is at work: forks must not wait for its locks."""
    for n in range(20):
        dog_tar(tmp_path / f'{n:02d}.tar', 2)
    matrix = torch.rand(1500, 1500)
    thread = threading.Thread(target=matrix.matrix_power, args=[20])
    thread.start()
    shards = Shards(tmp_path)
    assert shards.pairs['shard'].tolist() == sorted([*range(20)] * 2)
    thread.join()


def test_odd_members_are_read_or_refused(tmp_path):
    """oracle: what each is by construction: names, images of one colour, bad captions, broken files."""
    red = Image.new('RGB', (20, 40), 'red')
    cmyk = Image.new('CMYK', (40, 20), (0, 200, 100, 30))
    gray16 = Image.fromarray(np.full((20, 40), 128 * 257, np.uint16))
    exif = Image.Exif()
    exif[0x112] = 6                                     # the camera was held upright
    odd = [('cmyk', 'jpg', encoded(cmyk, 'JPEG'), [225, 49, 137]),
           ('ünï/' + 'cödé' * 40, 'png', encoded(gray16), [128, 128, 128]),
           ('turned', 'webp', encoded(red, 'WEBP', exif=exif), [255, 0, 0])]
    members = [('broken.jpg', b'x'), ('broken.json', b'{"a')]
    for name, kind, value, _ in odd:
        members += [(f'{name}.{kind}', value), (f'{name}.json', [name])]
    shards = Shards(write_tar(tmp_path / 'a.tar', members))
    served = readable(shards)
    assert (len(shards), len(served)) == (4, 3)
    for name, _, _, colour in odd:
        assert served[name].shape[1:] == (20, 40)
        assert_close(served[name][:, 10, 10].tolist(), colour, rtol=0, atol=6)
    for value in b'GIF8', encoded(mandelbrot(64, 64))[:400]:
        refused('a.tar:x is no image that can be read', data.read_image, value, 'a.tar:x')


def test_damaged_shards_give_what_tarfile_reads(tmp_path, capsys):
    """oracle: which of five pairs each damage of the third leaves, and that tarfile stops there. It steps over a header
    in USTAR; in PAX that is the second of two, and an error. Joined tars give the pairs of both."""
    image = encoded(Image.new('RGB', (9, 9)))
    joined = write_tar(tmp_path / 'b.tar', [('5.png', image), ('5.json', ['dog 5'])]).read_bytes()
    noise = random.Random(0).randbytes(512)

    def check(value, left):
        path.write_bytes(value)
        shards = Shards(path)
        assert len(shards) == len(left) and readable(shards).keys() == {f'dog {i}' for i in left}
        stopped = 'a.tar is damaged behind byte' in capsys.readouterr().err
        assert stopped == (left == '01')

    for form, stepped_over in (tarfile.USTAR_FORMAT, '0134'), (tarfile.PAX_FORMAT, '01'):
        path = dog_tar(tmp_path / 'a.tar', 5, form)
        raw = path.read_bytes()
        with tarfile.open(path) as tar:
            info, text = tar.getmembers()[4:6]
        start = info.offset_data - 512
        check(raw, '01234')
        check(raw[:start + 100], '01')
        check(raw[:text.offset_data + 5], '01')
        check(raw + joined, '012345')
        check(raw[:start] + noise + raw[start + 512:], stepped_over)
    info.size = -1000                                   # would send tarfile back for ever
    check(raw[:start] + info.tobuf(tarfile.GNU_FORMAT)[-512:] + raw[start + 512:], '01')


def test_a_folder_of_two_halves(tmp_path, capsys):
    """oracle: the files that were written: a half where there are both and no tar beside them, else the folder."""
    for half in 'train', 'val':
        assert data.half_of(tmp_path, half) == tmp_path
        put(tmp_path / half / '0.tar')
    assert capsys.readouterr().out == ''
    for half in 'train', 'val':
        assert data.half_of(tmp_path, half) == f'{tmp_path}/{half}'
        assert capsys.readouterr().out == f'data       of {tmp_path} the half {half}/\n'
        assert data.half_of(f'{tmp_path}/{half}', half) == f'{tmp_path}/{half}'
    put(tmp_path / '1.tar')
    assert data.half_of(tmp_path, 'val') == tmp_path


# --- Order and batches -----------------------------------------------------------------------------------------------

def test_order_is_a_pure_function():
    """oracle: numpy's permutation of (seed, epoch), which a restart only cuts."""
    steps = list(Order(23, 4, 0, 12, seed=5))
    for step, rows in enumerate(steps):
        epoch, k = divmod(step, 5)                      # 23 // 4 whole batches an epoch
        expected = np.random.default_rng((5, epoch)).permutation(23)
        places = range(4 * k, 4 * k + 4)
        assert rows == [(epoch, place, expected[place]) for place in places]
    assert list(Order(23, 4, 7, 12, seed=5)) == steps[7:]


def test_batches_are_equal_by_workers_and_ranks(tmp_path):
    """oracle: one process without workers, whole batches."""
    shards = Shards(dog_tar(tmp_path / 'a.tar', 12))
    views = Views(shards, LOW, MICRO, 3, 4, (2, 2, 2, 3))

    def served(rank=0, world=1, workers=0):
        order = Order(12, 4, 2, 5, 3, rank, world)
        return list(data.loader(views, order, workers, multiple=8))

    alone = served()
    assert len({batch.key for batch in alone}) == 3
    ranks = zip(served(0, 2), served(1, 2))
    for others in zip(served(workers=2)), ranks:
        for parts, batch in zip(others, alone, strict=True):
            found = zip(*(part.views() + part.texts for part in parts))
            for pieces, whole in zip(found, batch.views() + batch.texts, strict=True):
                assert_close(torch.cat(pieces), whole, rtol=0, atol=1e-6)


def test_captions_are_cut():
    """oracle: by hand: at most 7 ids in the globals, 4 in the locals; caption 0 keeps all 8."""
    samples = []
    for counts in (4, 1, 0, 2), (3, 5, 0, 1):           # words, between start and end
        ids = LOW(['low ' * count for count in counts])
        samples.append(([torch.zeros(3, 4, 4)], torch.zeros(1, 7), ids, 'key', 1))
    for multiple, cuts in (1, [8, 7, 4, 4]), (3, [8, 8, 6, 6]):
        batch = data.collate(samples, multiple)
        assert [text.shape[1] for text in batch.texts] == cuts
        assert (batch.longest, batch.bad) == (cuts[1], 2)
        for text in batch.texts:
            assert (text == LOW.eot).any(dim=1).all()                   # every end is there


def test_bad_pairs_are_replaced_and_counted(tmp_path, capsys):
    """oracle: the pairs broken on purpose: none is served, each is counted and named once, none is twice in a batch."""
    def served_batches(n, broken, steps):
        shards = Shards(dog_tar(tmp_path / 'a.tar', n, broken=broken))
        views = Views(shards, LOW, MICRO, 3, 4, (2, 0, 1, 0))
        return list(data.loader(views, Order(n, 4, 0, steps, seed=3), workers=0))

    batches = served_batches(12, [5, 7], 6)
    assert sum(batch.bad for batch in batches) >= 4
    served = set()
    for batch in batches:
        dogs = {LOW.decode(row).replace(' ', '').partition('.')[0] for row in batch.texts[0]}
        assert len(dogs) == 4
        served |= dogs
    assert served == {f'dog{i}' for i in range(12)} - {'dog5', 'dog7'}
    lines = capsys.readouterr().err
    assert lines.count('a.tar:5.png') == lines.count('a.tar:7.png') == 1
    batch, = served_batches(4, range(3), 1)                             # one batch is the whole set
    starts = batch.texts[0][:, :5]
    assert len(starts.unique(dim=0)) == 1                               # dog 3
    refused('100 pairs in a row cannot be read', served_batches, 4, range(4), 1)


def test_paragraphs_in_lists_are_said_once(tmp_path, capsys):
    """oracle: the records by hand: the last two have a list of one item, under DreamLIP's keys, with two full stops."""
    records = [{'raw_caption': ['A dog. A cat.', 'An ox.']}, {'longIB_captions': ['The U.S. Army.']},
               {'raw_caption': 'A dog. A cat.'}, {'captions': ['A dog. A cat.']},
               {'longSV_captions': ['A dog. A cat.']}, {'shortIB_captions': ['One. Two.']}]
    Views(Shards(pairs_tar(tmp_path / 'a.tar', records)), LOW, MICRO, 3, 4)
    line, = capsys.readouterr().err.splitlines()
    assert 'a.tar:4.png has several sentences in one item' in line and '-m extras.prepare pack' in line


@pytest.mark.parametrize('counts', [(2, 9, 1, 1), (1, 0, 2, 0)])
def test_the_sheet_of_samples_cuts_nothing(tmp_path, counts):
    """oracle: a black image, of which every view is black at its place, and a long caption of wide letters: the right
    and the bottom edge are white, and lines are no longer than the row of views asks for."""
    image = encoded(Image.new('RGB', (50, 40)))
    shard = pairs_tar(tmp_path / 'a.tar', [60 * 'WIDE LETTERS '], [image])
    sample_sheet(Views(Shards(shard), LOW, MICRO, 3, 1, counts, 'crops'), tmp_path / 'sheet.png')
    red = data.decode((tmp_path / 'sheet.png').read_bytes())[0]
    assert red[-4:].min() == red[:, -2:].min() == 255 and red.shape[1] < 2200
    for k in range(counts[0] + counts[1]):
        assert red[100, 132 * k + 10:132 * k + 120].max() == 0


def test_letters_in_pictures(monkeypatch, capsys):
    """oracle: where a font is found, letters that are not ASCII differ from the box of an unknown one; else one line
    says so, and there is a font all the same."""
    data.picture_font.cache_clear()
    letters = {bytes(data.picture_font(13).getmask(letter)) for letter in 'üß\uffff'}
    assert len(letters) == 3 or 'WARNING' in capsys.readouterr().err
    data.picture_font.cache_clear()
    monkeypatch.setattr(data, 'FONTS', ['absent.ttf'])
    assert [data.picture_font(13).size for _ in range(2)] == [13, 13]
    line, = capsys.readouterr().err.splitlines()
    assert 'not ASCII' in line
    data.picture_font.cache_clear()


# --- Image crops and colours -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('width, kind, tolerance', [
    (192, 'PNG', 0.5), (2000, 'JPEG', 6), (1, 'PNG', 0.5), (1, 'JPEG', 0.5), (3, 'JPEG', 6)])
def test_image_crops_are_the_pixels_of_their_boxes(width, kind, tolerance):
    """oracle: torchvision's crop of each box, flipped or not. Of a large JPEG, decoded smaller, that of the whole."""
    rng = random.Random(0)
    kinds = data.view_kinds(MICRO)
    file = encoded(mandelbrot(width, max(width * 7 // 10, 1)), kind)
    whole = data.decode(file)
    for _ in range(30):
        crops, boxes = data.image_crops(file, kinds, rng)
        for crop, box, view in zip(crops, boxes, kinds, strict=True):
            size = [view.size, view.size]
            want = V.resized_crop(whole, *box, size, data.BICUBIC).float()
            distance = (crop - want).abs().mean()
            mirrored = (crop.flip(-1) - want).abs().mean()
            assert min(distance, mirrored) < tolerance                  # of 255


def blurred(image, sigma):
    return V.gaussian_blur(image, 13, sigma)


def grayed(image, strength):
    return V.rgb_to_grayscale(image, 3)

OPERATIONS = [  # torchvision's function; the released probability for each kind of view, and range
    ('brightness', V.adjust_brightness, [0.8] * 3, 0.6, 1.4),
    ('contrast', V.adjust_contrast, [0.8] * 3, 0.6, 1.4),
    ('saturation', V.adjust_saturation, [0.8] * 3, 0.8, 1.2),
    ('hue', V.adjust_hue, [0.8] * 3, -0.1, 0.1),
    ('gray', grayed, [0.2] * 3, 1, 1),
    ('blur', blurred, [1.0, 0.1, 0.5], 0.1, 2.0),
    ('solarize', V.solarize, [0.0, 0.2, 0.0], 0.5, 0.5)]


@pytest.mark.parametrize('name, function, shares, low, high', OPERATIONS)
def test_each_colour_operation_is_the_released(monkeypatch, name, function, shares, low, high):
    """oracle: torchvision's own function, image by image; an image of neutral strength stays as it is, bit by bit. Of
    5,000 draws for each kind of view the released probabilities and ranges, all uniform."""
    images = torch.randint(0, 256, (12, 3, 20, 24), dtype=torch.uint8)
    images[0] = 77                                                      # gray
    images[1, 1:] = 0                                                   # red
    colours = torch.tensor([Colours()] * 12)
    column = Colours._fields.index(name)
    neutral = Colours()[column]
    colours[:9, column] = torch.linspace(low, high, 9)
    monkeypatch.setattr(data, 'normalize', torch.clone)
    found, = data.Batch([images], colours[:, None], 'key', [], 0, 0).views()
    strengths = colours[:, column].tolist()
    for image, strength, x in zip(images / 255, strengths, found):
        if strength == neutral:
            assert x.equal(image)
        else:
            assert_close(x, function(image, strength), rtol=0, atol=2e-5)
    rng = random.Random(1)
    for kind, share in zip(data.view_kinds(MICRO), shares, strict=True):
        values = np.array([data.draw_colours(kind, rng)[column] for _ in range(5000)])
        changed = values[values != neutral]
        error = math.sqrt(share * (1 - share) / 5000)
        assert abs(len(changed) / 5000 - share) <= 4 * error
        if share:
            assert low <= changed.min() and changed.max() <= high
            quarters = np.quantile(changed, [0.25, 0.5, 0.75])
            expected = np.linspace(low, high, 5)[1:4]                   # uniform
            assert abs(quarters - expected).max() <= 0.05 * (high - low)


# --- Commands --------------------------------------------------------------------------------------------------------

def test_help_ends_with_the_docstring():
    """oracle: the epilog, line by line, of a program and of its subcommand, which shows the defaults it names."""
    text = 'Tool.\n\n    python -m tool pack a.csv      10 % of the rows\n\n--it holds two lines\nof text.\n'
    parser = data.Parser(epilog=text)
    command = parser.add_subparsers().add_parser('pack', epilog=text)
    command.add_argument('--size', default=5, help='images (default: %(default)s)')
    assert parser.format_help().endswith(f'\n\n{text}')
    assert command.format_help().endswith(f'images (default: 5)\n\n{text}')


# --- eval.py ---------------------------------------------------------------------------------------------------------

def spelling_model(merges=(), length=48):
    """(model, tokenizer) that reads text byte by byte; 48 ids hold every template with every name."""
    tokenizer = Tokenizer(merges, length)
    config = replace(MICRO, vocab_size=tokenizer.vocab_size, context_length=length)
    return COSMOS(config).requires_grad_(False), tokenizer


def embed(model, tokenizer, *texts):
    """Texts, one at a time, by the model's door."""
    pooled = [model.encode_text(tokenizer([text]))[0] for text in texts]
    return unit(torch.cat(pooled))


@pytest.fixture
def here(monkeypatch, tmp_path):
    """A folder of the test's, in which it runs: names of files are short."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def gallery(here):
    """A checkpoint that spells, last.pt; three pictures in images, their features; figures(name, *flags)."""
    model, tokenizer = spelling_model()
    state = {'config': vars(model.config), 'merges': [], 'student': model.state_dict()}
    torch.save(state, 'last.pt')
    preprocess = data.Preprocess(32)
    paths = []
    features = []
    for i in range(3):
        image = Image.effect_mandelbrot((50, 40), (i - 2, -1, 1, 1), 40)
        paths.append(put(f'images/{i}.png', encoded(image)))
        features.append(model.encode_image(preprocess(image)[None])[0])

    def figures(line, workers=0):
        name, *flags = line.split()
        flags += ['--workers', workers, '--json', 'figures.json']
        assert run(evaluation, name, 'last.pt', *flags) is None
        return json.loads(Path('figures.json').read_text())

    return SimpleNamespace(scored=(model, tokenizer), preprocess=preprocess, paths=paths,
                           features=unit(torch.cat(features)), figures=figures)


def test_retrieval_by_hand():
    """oracle: ranks read off by eye, ties counted against us; the same in chunks."""
    captions = torch.tensor([[1, 0], [0.9, 0.9],                        # right; a tie
                             [0.9, 0.2], [0.3, 0.8]])                   # finds image 0; right
    figures = evaluation.retrieval(torch.eye(2), captions, torch.tensor([0, 0, 1, 1]))
    # image 0: its 1.0 is ahead of all. image 1: its best is 0.8, behind the 0.9 of a caption of image 0
    wanted = {'images': 2, 'captions': 4, 'chance': 0.5}
    for way in 'image_to_text', 'text_to_image':
        wanted |= {f'{way}_R@1': 0.5, f'{way}_R@5': 1, f'{way}_R@10': 1}
        wanted |= {f'{way}_mean_rank': 1.5, f'{way}_median_rank': 1.5}
    assert figures == wanted
    ids = torch.arange(30) % 10
    for same in (1.0, math.nan):        # what has collapsed must not look perfect
        features = torch.full((30, 6), same)
        assert evaluation.ranks(features, features, ids, ids).tolist() == [28] * 30
    queries = torch.randn(10, 6)
    targets = torch.randn(30, 6)
    ids = ids[:10], ids
    expected = evaluation.ranks(queries, targets, *ids)
    for chunk in 1, 7:
        assert evaluation.ranks(queries, targets, *ids, chunk).equal(expected)


def test_classification_by_hand():
    """oracle: hand-made scores; the ensemble computed one text at a time."""
    scores = torch.tensor([[7.0, 1, 2, 3, 4, 5, 6],                     # right
                           [1, 7, 6, 5, 4, 3, 2],                       # fifth
                           [1, 7, 6, 5, 4, 3, 2],                       # sixth
                           [3, 1, 3, 0, 0, 0, 0]])                      # tied
    figures, found, matrix = evaluation.classify(scores, torch.eye(7), torch.tensor([0, 5, 6, 0]))
    assert found.tolist() == [0, 1, 1, 2]
    assert matrix.nonzero().tolist() == [[0, 0], [0, 2], [5, 1], [6, 1]]
    assert figures == {'images': 4, 'classes': 7, 'chance': 1 / 7, 'top1': 1 / 4, 'top5': 3 / 4,
                       'mean_per_class_top1': pytest.approx(1 / 6)}
    scored = spelling_model()
    vectors = evaluation.class_vectors(*scored, ['tabby cat', 'dog'], ('a {}', '{}!'))
    both = embed(*scored, 'a tabby cat', 'a dog') + embed(*scored, 'tabby cat!', 'dog!')
    close(vectors, unit(both))


def test_embeddings_of_many_of_one_and_of_none(gallery, monkeypatch):
    """oracle: texts and images one at a time, in their order, as Pillow images; a string is one text; a sentence where
    there is nothing, no image, no label."""
    monkeypatch.setattr(evaluation, 'TEXT_BATCH', 2)
    model, tokenizer = gallery.scored
    texts = ['a long text', 'ox', '']
    close(evaluation.embed_texts(model, tokenizer, texts), embed(model, tokenizer, *texts))
    close(evaluation.embed_texts(model, tokenizer, 'a car'), embed(model, tokenizer, 'a car'))
    refused('no text to embed', evaluation.embed_texts, model, tokenizer, [])
    images = [Image.open(path) for path in gallery.paths]
    embed_images = partial(evaluation.embed_images, model, preprocess=gallery.preprocess)
    close(embed_images(images), gallery.features)
    refused('no image to embed', embed_images, [])
    refused('x.jpg is no image', embed_images, [put('x.jpg'), *images])
    refused('None', embed_images, [(images[0], None)])          # labels of torchvision's Places365


def test_attention_words(gallery):
    """oracle: the model's own weights: pieces of a word add up; start, end and padding are no words.

    In the picture the bar of the most read word is the longest, that of the least read has no length.
    """
    model, tokenizer = spelling_model(['d o', 'do g</w>'], 12)
    image = Image.open('images/0.png')
    scored = (model, tokenizer, gallery.preprocess, image)
    grid, words = evaluation.attention(*scored, 'dog ab dog')
    pixels = gallery.preprocess(image)[None]
    patches, weights = model.attention(pixels, tokenizer(['dog ab dog']))
    _, dog, a, b, last, *_ = weights[0].numpy()
    names, shares = zip(*words)
    assert names == ('dog', 'ab', 'dog')
    for found, raw in (shares, np.array([dog, a + b, last])), (grid, patches.numpy().reshape(4, 4)):    # rows first
        assert np.allclose(found, (raw - raw.min()) / np.ptp(raw))
    evaluation.attention_picture(*scored, ['dog ab dog'], 'seen.png')
    picture = np.array(Image.open('seen.png'))                          # (h, w, 3)
    for value, bar in (0, [255, 255, 255]), (1, [255, 234, 70]):
        y, x = 36 + 56 * np.argwhere(grid == value)[0]                  # the middle of such a patch
        assert (picture[y, x + 232, 0] > 127) == value  # red of blue and of yellow, over the image
        assert picture[10 + 18 * shares.index(value), 690].tolist() == bar
    assert evaluation.attention(*scored, '')[1] == []
    _, words = evaluation.attention(*scored, 20 * 'dog ')
    assert len(words) == 10                             # 12 ids without start and end


def test_published_layouts(here):
    """oracle: lists written here as COCO's, Karpathy's and Flickr's, and what must be read; what they lack is named."""
    images = [{'id': 7, 'file_name': 'a.jpg'}, {'id': 3, 'file_name': 'b.jpg'}]
    notes = [{'image_id': 3, 'caption': 'x'}, {'image_id': 7, 'caption': 'y'},
             {'image_id': 3, 'caption': 'z'}]
    coco = {'images': images, 'annotations': notes}
    first = {'split': 'test', 'filename': 'a.jpg', 'sentences': [{'raw': 'y'}]}
    second = {'split': 'test', 'filename': 'b.jpg', 'filepath': 'f',
              'sentences': [{'raw': 'x'}, {'raw': 'z'}]}
    karpathy = {'images': [first, first | {'split': 'val'}, second]}
    flickr = [{'image': 'a.jpg', 'caption': 'y'}, {'image': 'b.jpg', 'caption': ['x', 'z']}]
    read = evaluation.listed_captions
    for listing, name in (coco, 'images/val2017/b.jpg'), (flickr, 'b.jpg'), (karpathy, 'f/b.jpg'):
        file = put('list.json', listing)
        paths, captions, owner = read(file, 'root')
        assert paths[1] == Path('root', name)
        assert (captions, owner.tolist()) == (['y', 'x', 'z'], [0, 1, 1])
    refused('list.json.*none of this split', read, file, 'root', 'vall')
    refused("list.json.*'caption'", read, put(file, [{'image': 'a'}]), 'root')


def test_captions_of_held_out_shards(here):
    """oracle: pairs written here: the first key that a pair has, never split; only those that were named."""
    pairs_tar('a.tar', [
        {'captions': ['an ape. an ox', 'a cow'], 'caption': 'dog', 'mine': 'an eel. a fox', 'number': 5},
        {'raw_caption': 'a gnu. a hen', 'caption': 'ibis', 'mine': '', 'other': ['jay', 'a kid. a lion']}])

    def read(keys=None):
        captions, owner = evaluation.shard_captions(Shards('a.tar', keys))
        return captions, owner.tolist()

    assert read() == (['an ape. an ox', 'a cow', 'a gnu. a hen'], [0, 0, 1])
    assert read('mine , other') == (['an eel. a fox', 'jay', 'a kid. a lion'], [0, 1, 1])
    refused('json of .*a.tar:1.png .* under mine; .*--caption-keys', read, 'mine')
    refused('json of .*a.tar:0.png .* neither', read, 'number,mine')


def test_class_names_of_every_source(here):
    """oracle: names as torchvision's sets have them, files written here, and what must be read."""
    def names(classes, text=None, **more):
        file = text and put('names', text)
        return evaluation.class_names(SimpleNamespace(classes=classes, **more), file)

    animals = ['ape', 'ox_2']
    assert names(animals) == ['ape', 'ox 2']
    assert names(animals, 'monkey\n\n bull\n') == ['monkey', 'bull']
    refused('1 names for 2 classes', names, animals, 'monkey')
    refused('names holds no lines', names, animals, '\n')
    refused('no class names', names, [])
    assert names([], categories=['crab_leg']) == ['crab leg']           # Caltech101
    imagenet = [('tench', 'Tinca tinca'), ('goldfish', 'Carassius')]
    assert names(imagenet) == ['tench', 'goldfish']
    folders = [f'n{i:08d}' for i in range(1000)]
    assert names(folders)[2] == 'great white shark'
    refused('999 folders have WordNet ids', names, folders[1:])


def test_torchvision_sets(monkeypatch):
    """oracle: what the sets are called with, EMNIST's held-out half among them; sentences for what cannot be read."""
    for name, split, sentence in (('dtdd', None, "has no 'dtdd'; it has .*dtd"),
                                  ('food101', None, 'cannot read food101 from .*--download'),
                                  ('sun397', 'trian', "not 'trian'"),
                                  ('cifar10', 'val', "the splits .*'test'.*, not 'val'")):
        refused(sentence, evaluation.torchvision_set, name, 'absent', split)
    sets = evaluation.torchvision.datasets
    calls = []

    def mnist(self, root, train=True, download=True):
        calls.append([train, download])

    monkeypatch.setattr(sets.MNIST, '__init__', mnist)
    assert isinstance(evaluation.torchvision_set('mnist', '', 'train', True), sets.MNIST)
    evaluation.torchvision_set('emnist', '', 'balanced')
    assert calls == [[True, True], [False, False]]


def test_checkpoints_of_every_origin(here, capsys):
    """oracle: the model that was saved, under released, prefixed and open_clip's names."""
    vocab = shared('vocab', 'bpe_simple_vocab_16e6.txt.gz')
    model = COSMOS(Config(64, 224, 96, 32, 64, 2, 1, 64, 1, 1, 77, 49408, 8))
    plain = COSMOS(replace(model.config, cross_heads=0))
    theirs = to_openclip(model.state_dict())
    other = to_openclip(plain.state_dict())

    def load(state, weights='teacher'):
        torch.save(state, 'saved.pt')
        return evaluation.load('saved.pt', weights, vocab=vocab)

    both = {'student': other, 'teacher': theirs}
    prefixed = {f'_orig_mod.module.{key}': value for key, value in theirs.items()}
    for state, weights, origin, source in [
            (both, 'teacher', 'teacher', model),
            (both, 'student', 'student', plain),
            ({'student': other}, 'teacher', 'student', plain),  # what it says must be what it scored
            ({'state_dict': prefixed}, 'teacher', 'state_dict', model),
            (other, 'teacher', 'state dict', plain)]:
        loaded, tokenizer, preprocess = load(state, weights)
        assert (loaded.config, loaded.origin) == (source.config, origin)
        assert_close(loaded.state_dict(), source.state_dict(), rtol=0, atol=0)
    white = preprocess(Image.new('RGB', (300, 250), 'white')).amax(dim=(1, 2))
    close(white, torch.tensor([1.9303, 2.0749, 2.1459]), 1e-4)  # by OpenAI's means and deviations
    assert 'GELU is assumed for saved.pt' in capsys.readouterr().out
    assert evaluation.load('saved.pt', vocab=vocab, quick_gelu=True)[0].config.quick_gelu
    load(theirs)                        # with cross-attention: released
    assert capsys.readouterr().out == ''
    # one patch: 3/7 of it would be none
    small = replace(plain.config, image_size=32, local_image_size=32)
    state = to_openclip(COSMOS(small).state_dict())
    assert evaluation.infer_config(state, {}) == small
    state['visual.conv1.weight'] = torch.empty(1280, 3, 14, 14)         # ViT-H
    assert evaluation.infer_config(state, {}).vision_heads == 16
    evaluation.export(plain, tokenizer, 'clip.pt')
    assert 'merges' not in Path('clip.json').read_text()                # CLIP's are known to all
    refused('its keys: visual.*open_clip ViT', load, {'visual.conv1.weight': white})    # a ResNet
    del other['visual.ln_post.bias']
    other |= {'visual.extra': white, 'visual.proj': white}
    refused('Missing.*visual.norm.bias.*Unexpected.*extra.*size mismatch for visual.proj', load, other)


def test_export_and_back(here, monkeypatch):
    """oracle: features before, with learned merges, quick GELU and heads that are not 64 wide; a plain CLIP's names. The
    same from safetensors; a sentence where that package is missing."""
    model, tokenizer = spelling_model(['d o', 'do g</w>'])
    model = COSMOS(replace(model.config, quick_gelu=True)).requires_grad_(False)
    evaluation.export(model, tokenizer, 'clip.pt')
    loaded, spelling, _ = evaluation.load('clip.pt')
    assert loaded.config == replace(model.config, cross_heads=0)
    close(embed(loaded, spelling, 'dog', 'ox'), embed(model, tokenizer, 'dog', 'ox'), 1e-6)
    image = torch.randn(1, 3, 32, 32)
    close(loaded.encode_image(image)[0], model.encode_image(image)[0], 1e-6)
    safetensors = pytest.importorskip('safetensors.torch')
    safetensors.save_file(torch.load('clip.pt'), 'clip.safetensors')
    again, _, _ = evaluation.load('clip.safetensors')
    assert_close(again.state_dict(), loaded.state_dict(), rtol=0, atol=0)
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    refused('clip.safetensors .* pip install safetensors', evaluation.load, 'clip.safetensors')
    layout = json.loads(Path('clip.json').read_text())
    del layout['text_cfg']['tokenizer_kwargs']          # as if the json were another's
    put('clip.json', layout)
    vocab = shared('vocab', 'bpe_simple_vocab_16e6.txt.gz')
    refused('clip.pt knows 516 ids, .* 49,408', evaluation.load, 'clip.pt', vocab=vocab)


def test_quick_gelu_in_and_out(here):
    """oracle: features of open_clip's own model of random weights; ours read its file, and it reads ours by the two
    lines that `export` prints."""
    open_clip = pytest.importorskip('open_clip')
    theirs = open_clip.create_model('ViT-B-32-quickgelu')
    torch.save(theirs.state_dict(), 'theirs.pt')
    vocab = shared('vocab', 'bpe_simple_vocab_16e6.txt.gz')
    model, tokenizer, _ = evaluation.load('theirs.pt', vocab=vocab, quick_gelu=True)
    there = {'open_clip': open_clip}
    for line in list(evaluation.export(model, tokenizer, 'ours.pt').values())[:2]:
        exec(line, there)
    image = torch.randn(1, 3, 224, 224)
    text = tokenizer(['a dog'])
    out = model([image], [text])
    for other in theirs, there['model']:
        cls, eot, _ = other(image, text)
        assert_close(out.cls[0], cls, rtol=0, atol=1e-6)
        assert_close(out.eot[0], eot, rtol=0, atol=1e-6)


def test_released_names_are_fetched_once(gallery, monkeypatch):
    """oracle: the weights in a server's file, without the server the second time; then a sentence with the address. A
    run's folder means its last.pt."""
    put('here/cosmos_vitb32_cc12m.pt', Path('last.pt').read_bytes())
    monkeypatch.setenv('TORCH_HOME', 'home')
    with served('here') as address:
        monkeypatch.setattr(evaluation, 'RELEASED', address + '/{}.pt')
        evaluation.load('cosmos_vitb32_cc12m')
    model, _ = gallery.scored
    for name in 'cosmos_vitb32_cc12m', '.':
        loaded, _, _ = evaluation.load(name)
        assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    refused(f'{address}/cosmos_vitb16_cc3m.pt', evaluation.load, 'cosmos_vitb16_cc3m')
    refused('cosmos_vitb16_laion does not exist', evaluation.load, 'cosmos_vitb16_laion')


def test_windows_are_averaged():
    """oracle: numpy's interp, row by row and column by column of each window, on a size that no stride fits."""
    model, _ = spelling_model()
    pixels = torch.randn(3, 37, 47)
    vectors = unit(torch.randn(5, 16))
    at = (np.arange(32) + 0.5) / 8 - 0.5                # of 32 pixels in a row of 4 patches
    share = np.stack([np.interp(at, range(4), one) for one in np.eye(4)])       # (4, 32)
    share = torch.from_numpy(share).float()
    for csa in False, True:
        total = torch.zeros(5, 37, 47)
        count = torch.zeros(37, 47)
        for y in 0, 5:
            for x in 0, 12, 15:                       # the last windows end at the border
                window = (..., slice(y, y + 32), slice(x, x + 32))
                grid = model.encode_dense(pixels[window][None], csa)[0]         # (4, 4, D)
                total[window] += torch.einsum('vy,ux,vud,qd->qyx', share, share, grid, vectors)
                count[window] += 1
        settings = evaluation.Settings(window=32, stride=12, csa=csa)
        close(evaluation.window_scores(model, pixels, vectors, settings), total / count)


def test_segmentation_by_hand(monkeypatch):
    """oracle: six pixels decided by pencil: synonyms, probability and area thresholds, IoU."""
    # names: ground | ape, monkey | ox. Softmax at scale ln 3 and cosines 0 or 1: one name at 1 of 4 gets 3/6.
    scores = torch.eye(4)[[0, 1, 2, 2, 3, 1]]
    scores[5, 2] = 1                                    # ape and monkey
    monkeypatch.setattr(evaluation, 'window_scores', lambda *args: scores.T.view(4, 2, 3))

    def segment(**changes):
        settings = evaluation.Settings(size=2, scale=math.log(3), window=2, **changes)
        image = Image.new('RGB', (3, 2))
        return evaluation.segment_image(None, image, scores, [1, 2, 1], settings).flatten()

    assert segment().tolist() == [0, 1, 1, 1, 2, 1]                     # monkey is ape
    assert segment(probability=0.4).tolist() == [0, 1, 1, 1, 2, 0]      # two names share: 3/8 each
    assert segment(area=0.2).tolist() == [0, 1, 1, 1, 0, 1]     # ox has 1 of 5 foreground pixels, no more
    assert segment(area=0.19).equal(segment())
    truth = torch.tensor([0, 1, 1, 255, 3, 0])
    matrix = evaluation.confusion(truth, segment(), 5)
    figures = evaluation.segmentation_figures(matrix, ['ground', 'ape', 'ox', 'cow', 'absent'])
    assert figures == {'IoU': pytest.approx({'ground': 1 / 2, 'ape': 2 / 3, 'ox': 0, 'cow': 0}),
                       'mIoU': pytest.approx(7 / 24), 'pixel_accuracy': 3 / 5, 'classes': 3}
    refused('every pixel', evaluation.segmentation_figures, 0 * matrix, [])


def test_masks_and_their_errors(here):
    """oracle: masks written here; what is wrong with one names its file and says what."""
    numbers = np.array([[0, 1, 255], [2, 2, 0]], np.uint8)
    grey = Image.fromarray(numbers)
    palette = Image.frombytes('P', (3, 2), numbers.tobytes())
    palette.putpalette(list(range(256)) * 3)
    read = evaluation.read_mask
    for image in palette, grey:
        path = put('masks/a_ids.png', encoded(image))
        assert read(path, (3, 2), 3).tolist() == numbers.tolist()
        reduced = read(path, (3, 2), 2, reduce_zero_label=True)
        assert reduced.tolist() == [[255, 0, 255], [1, 1, 255]]
    refused('a_ids.png has label 2, the class file names 0 to 1', read, path, (3, 2), 2)
    put(path, encoded(grey.convert('RGB')))
    refused('a_ids.png is a RGB image', read, path, (3, 2), 3)
    image = put('images/s/a_rgb.jpg')
    folders = ('images', 'masks', '_rgb', '_ids')
    assert evaluation.mask_pairs(*folders) == [(image, path)]
    refused('b_ids.png', evaluation.mask_pairs, *folders, put('list', 'a\nb\n'))
    put('images/t/a_rgb.jpg')
    refused('s/a_rgb.jpg and .*t/a_rgb.jpg have one name', evaluation.mask_pairs, *folders)


def test_every_command(gallery, capsys):
    """oracle: the functions that the tests above check, on the same input; pictures open."""
    settings = evaluation.Settings(40, 65, 0.1, 0.0, window=32, stride=16, csa=True)
    vectors = evaluation.class_vectors(*gallery.scored, ['background', 'sky', 'ox'])
    model, _ = gallery.scored
    for path in gallery.paths:          # masks of what must be found
        image = Image.open(path)
        labels = evaluation.segment_image(model, image, vectors, [2, 1], settings)
        mask = Image.fromarray(labels.byte().numpy())
        put(f'masks/{path.name}', encoded(mask))
    put('classes', 'background, sky\nox\n')
    line = 'segment --images images --masks masks --classes classes --benchmark voc21 --size 40 --area 0 --csa'
    figures = gallery.figures(line)
    assert re.search('^  ox .* 100.00%$', capsys.readouterr().out, re.M)
    assert (figures['mIoU'], figures['images']) == (1, 3)
    assert figures['settings'] == f'{settings}; but six prompts of ours, not the 80 released ones'
    gallery.figures('attend --image images/0.png --text ox cat --out seen.png')
    assert Image.open('seen.png').size == (872, 494)
    gallery.figures('export clip.pt')
    assert Path('clip.json').exists()


def test_retrieval_of_shards_and_lists(gallery, capsys):
    """oracle: retrieval of the captions written here, of the half val/ where there are two. A broken image is left out
    with its captions; lines count and name it."""
    captions = ['ox 0', 'ox 1', 'ox 2']
    wanted = evaluation.retrieval(gallery.features, embed(*gallery.scored, *captions), torch.arange(3))
    records = [{'caption': 'same', 'mine': caption} for caption in captions]
    pairs_tar(put('set/val/0.tar'), records, [path.read_bytes() for path in gallery.paths])
    put('set/train/0.tar')
    assert gallery.figures('retrieval --shards set --caption-keys mine') == wanted
    listing = [{'image': f'{i}.png', 'caption': caption} for i, caption in enumerate(captions)]
    listing.insert(1, {'image': 'x.png', 'caption': ['ox 9', 'ox 1']})
    put('images/x.png')
    for file, flags in ('images/list', ''), ('list', '--images images'):
        put(file, listing)
        assert gallery.figures(f'retrieval --flickr {file} {flags}', workers=1) == wanted
        assert re.search('left out +1 of 4 images\n.* image 1: images/x.png is', capsys.readouterr().out)


def test_help_lists_every_flag(capsys):
    """oracle: the rule: --help of all commands has the examples, that of `segment` a flag for each field of Settings."""
    run(evaluation, '--help')
    text = capsys.readouterr().out
    for name in 'retrieval', 'classify', 'segment', 'attend', 'export':
        assert f'python eval.py {name} CKPT' in text
        assert re.search(f'^    {name} +[A-Za-z]', text, re.M), name     # its line of help
    run(evaluation, 'segment', '--help')
    text = capsys.readouterr().out
    for field in evaluation.Settings._fields:
        assert re.search(rf"^  --{field.replace('_', '-')}\b", text, re.M), field


def test_classify_of_every_source(gallery, capsys):
    """oracle: the function that a test above checks, on the same images; of each image its class and score. A broken
    one is left out and named."""
    names = ['banded', 'woven']
    files = ['banded/1.png', 'banded/x.png', 'woven/0.png', 'woven/2.png']
    put('images/x.png')
    for file in files:                                                  # as torchvision's DTD
        put(f'dtd/dtd/images/{file}', Path('images', Path(file).name).read_bytes())
    put('dtd/dtd/labels/test1.txt', '\n'.join(files))
    put('prompts', 'my {}\n')
    del files[1]
    vectors = embed(*gallery.scored, 'my banded', 'my woven')
    features = gallery.features[[1, 0, 2]]
    wanted, found, matrix = evaluation.classify(features, vectors, torch.tensor([0, 1, 1]))
    wanted |= {'prompts': 'my {}', 'names': names, 'confusion': matrix.tolist()}
    scores = features @ vectors.T
    paths = [f'dtd/dtd/images/{file}' for file in files]
    for source, images in (('--folder dtd/dtd/images', paths), ('--dataset dtd --root .', [0, 2, 3])):
        figures = gallery.figures(f'classify {source} --templates prompts')
        for i, item in enumerate(figures.pop('predictions')):
            score = pytest.approx(scores[i].max().item(), abs=1e-5)
            assert item == {'image': images[i], 'truth': files[i][:-6],
                            'prediction': names[found[i]], 'score': score}
        assert figures == wanted
        assert re.search('left out +1 of 4 images\n.* image 1: .*x.png', capsys.readouterr().out)


WRONG = [               # a command, and what its sentence must name
    ('retrieval page.pt --shards a.tar', ['page.pt', 'no checkpoint', 'web page']),
    ('retrieval bad.pt --shards a.tar', ['bad.pt', 'holds posix.system', 'where you trust it']),
    ('retrieval script.pt --shards a.tar',
     ['script.pt', 'TorchScript', "load_openai_model('script.pt')", 'torch.save', '--quick-gelu']),
    ('retrieval face.pt --shards a.tar', ["Hugging Face's", 'open_clip.create_model', 'torch.save']),
    ('retrieval nan.pt --shards a.tar', ['nan.pt', 'NaN', 'visual.proj', 'earlier']),
    ('retrieval last.pt --shards a.tar', ['the json of', 'a.tar:1.png']),
    ('retrieval last.pt --coco x', ['x/annotations/captions_val2017.json']),
    ('retrieval last.pt --flickr list.json', ['absent.jpg is no image']),
    ('retrieval last.pt --flickr list.json --device tpu', ['--device tpu', 'cannot be', 'cpu']),
    ('classify last.pt --folder images', ['class folder', 'images']),
    ('export last.pt last.pt', ['last.pt or last.json', 'no export']),
    ('export last.pt x.safetensors', ['x.safetensors', 'OUT.pt']),
    ('segment last.pt --images a --masks b --classes c --stride 0', ['--stride 0', 'above 0']),
    ('segment last.pt --images a --masks b --classes page.pt --templates page.pt',
     ["'<html>' in page.pt", '{}']),
]


def test_errors_are_one_sentence(monkeypatch, gallery):
    """oracle: the rule: status 1, one line, with the value, the place and the remedy; no pickle is executed."""
    class Malicious:
        def __reduce__(self):
            return os.system, ('touch executed',)

    write_tar('a.tar', [('0.png', b'x'), ('0.txt', b'an ox'), ('1.png', b'x'), ('1.json', b'{"caption": "a')])
    put('list.json', [{'image': 'absent.jpg', 'caption': 'x'}])
    put('page.pt', '<html>')
    torch.save({'student': Malicious()}, 'bad.pt')
    torch.save({'vision_model.proj': 0}, 'face.pt')
    torch.jit.script(torch.nn.ReLU()).save('script.pt')
    saved = torch.load('last.pt')
    saved['student']['visual.proj'] *= math.nan
    torch.save(saved, 'nan.pt')
    monkeypatch.setattr(data.Parser, 'exit', lambda self, status, text: sys.exit(text.strip()))
    for line, parts in WRONG:
        one_sentence(run(evaluation, *line.split(), '--workers', 0), parts)
    assert not Path('executed').exists()


# --- train.py: helpers -----------------------------------------------------------------------------------------------

QUICK = ('--preset micro --vocab learn --precision fp32 --device cpu --batch 4 --steps 6 --save-every 2 --warmup 30 '
         '--lr 1e-3 --momentum 0.99 --momentum-ramp 10 --log-every 1 --eval-every 0 --workers 0').split()
AUTO = ['--resume', 'auto']
SCALER = torch.amp.GradScaler('cpu', enabled=False)


@pytest.fixture(scope='session')
def fit(scenes):
    """fit(out, *flags): train.py for seconds on the built-in set -> its exit status, or its error."""
    def fit(out, *flags):
        return run(train, '--data', scenes, *QUICK, '--out', out, *flags)

    return fit


@pytest.fixture(scope='session')
def whole(fit, tmp_path_factory):
    """--out of a run of six steps that nothing disturbed."""
    out = tmp_path_factory.mktemp('runs') / 'whole'
    assert fit(out, '--eval-every', 5) == 0
    return out


def saved(out):
    return torch.load(out / 'last.pt', weights_only=True)


def read_log(out):
    return [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]


def same_run(a, b):
    """Two --out folders hold bit-equal networks and optimizers, and logs that differ in times and evaluations only."""
    runs = []
    for out in a, b:
        log = [entry for entry in read_log(out) if 'loss' in entry]  # others have evaluations only
        for entry in log:
            for name in 'pairs_per_s', 'waiting', 'memory_GB', 'eval':
                entry.pop(name, None)
        state = saved(out)
        assert len(log) == state['step']
        runs.append([state['student'], state.get('teacher', {}), state['optimizer']['state'], log])
    assert_close(*runs, rtol=0, atol=0)


def four_steps(monkeypatch, fit, out, *flags):
    """The first four steps of the run `whole`, or with `flags`, as if it had been stopped then."""
    with monkeypatch.context() as patch:
        patch.setattr(train, 'finish', id)
        assert fit(out, '--steps', 4, *flags) == 0


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def started(fit, *flags):
    """The Run that these flags make, as it stands before its first step."""
    runs = []

    def stop(run):
        runs.append(run)
        sys.exit('before')

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'train', stop)
        assert fit(*flags) == 'before'
    return runs[0]


# --- train.py: one step ----------------------------------------------------------------------------------------------

ROWS = {  # global and local images, global and local captions that a row of Table 5 sees; its terms
    'clip': [1, 0, 1, 0], 'clip-aug': [2, 0, 1, 0],
    'image-distill': [2, 6, 1, 0, 'cls_cls_t'],
    'text-crop': [2, 6, 2, 6, 'cls_cls_t'],
    'text-distill': [2, 6, 2, 6, 'cls_cls_t', 'eot_eot_t'],
    'cosmos': [2, 6, 2, 6, 'h_I_cls_t', 'h_I_eot_t', 'h_T_cls_t', 'h_T_eot_t']}


@pytest.mark.parametrize('method', ROWS)
def test_views_and_losses_of_each_row(fit, tmp_path, method):
    """oracle: the table, written out: a term is named by what the student has and, with _t, by what the teacher has."""
    begun = started(fit, tmp_path, '--method', method)
    views = begun.views
    counts = [views.global_images, views.local_images, views.global_texts, views.local_texts]
    assert counts == ROWS[method][:4]
    assert (begun.teacher is not None) == (len(ROWS[method]) > 4)
    out = Output(*unit(torch.randn(4, 3, 5, 16)))
    cls_t, eot_t = unit(torch.randn(2, 2, 5, 16))
    named = out._asdict() | {'cls_t': cls_t, 'eot_t': eot_t}
    wanted = {}
    for name in ROWS[method][4:]:
        a, b = re.fullmatch('(.+)_(.+_t)', name).groups()
        wanted[name] = symmetric_nce(named[a], named[b], named[a], named[b], 1 / 0.07)
    found = train.distill_terms(train.METHODS[method], micro(method)[0], out, cls_t, eot_t)
    assert_close(found, wanted)


OBJECTIVES = 'cosmos', 'text-distill', 'image-distill', 'clip'


def gradients(processes, method, accum):
    """Of this process's share of one batch of 8 -> {parameter: gradient}, and the mean loss of all processes."""
    model, images, texts = micro(method, B=8)
    if method in ('image-distill', 'clip'):
        texts = texts[:1]
    world = processes.world
    model.visual.transformer.grad_checkpointing = accum > 1
    images, texts = ([x.chunk(world)[processes.rank] for x in xs] for xs in (images, texts))
    batch = SimpleNamespace(views=lambda: images, texts=texts, longest=12)
    student = train.Student(model, accum)
    if world > 1:
        assert dist.get_world_size() == world and len(images[0]) == 8 // world
        student = DistributedDataParallel(student)
    state = SimpleNamespace(
        model=model, student=student, device=processes.device, dtype=None, method=train.METHODS[method],
        teacher=Teacher(COSMOS(model.config)), optimizer=torch.optim.SGD(model.parameters()), scaler=SCALER,
        processes=processes, step=0,
        options=SimpleNamespace(clip_grad=0, lr=0, warmup=1, momentum=1, momentum_ramp=0))
    loss = train.train_step(state, batch).loss
    [total] = processes.sum([loss])
    return {name: p.grad for name, p in model.named_parameters()}, total / world


def one_rank(rank, world, port, path, flags):
    """One of `world` processes: saves its gradients; of two processes, train.py with `flags`, too."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    processes = train.Processes('cpu')
    assert (processes.rank, processes.world) == (rank, world)
    assert (sys.stdout.name == os.devnull) == (rank > 0)                # rank 0 speaks for all
    for method in OBJECTIVES:
        for accum in 1, 2:
            torch.save(gradients(processes, method, accum), path / f'{world}-{rank}-{method}-{accum}')
    if world == 2:
        train.Processes = {'auto': processes, 'cpu': processes}.get
        run(train, *flags)
    train.leave(0)


@pytest.fixture(scope='session')
def by_ranks(tmp_path_factory):
    """A folder with what `one_rank` leaves: gradients, the run 'two' of two processes; and the run 'one' of one."""
    path = tmp_path_factory.mktemp('ranks')
    shards = dog_tar(path / 'dogs.tar', 80, broken=[3, 40])
    flags = ['--data', shards, *QUICK, '--steps', 20, '--out']
    set_forkserver_preload([__name__])                  # imported once, not in each process
    for world in 2, 4:
        with socket.create_server(('127.0.0.1', 0)) as server:
            port = server.getsockname()[1]
        arguments = world, port, path, [*flags, path / 'two']
        start_processes(one_rank, arguments, nprocs=world, start_method='forkserver')
    assert run(train, *flags, path / 'one') == 0
    return path


@pytest.mark.parametrize('method', OBJECTIVES)
def test_ranks_and_accumulation_equal_one_process(by_ranks, method):
    """oracle: one process with the whole batch: same loss, same gradient in every parameter and scale, with --accum 2
    (and --grad-checkpoint), with 2 and 4 processes, and with both. None of them is all zero: it would never learn."""
    alone = train.Processes('cpu')
    expected, total = gradients(alone, method, 1)
    found = [gradients(alone, method, 2)]
    for path in by_ranks.glob(f'?-?-{method}-?'):
        found.append(torch.load(path))
    assert len(found) == 13
    for grads, loss in found:
        assert loss == pytest.approx(total, rel=1e-6)
        for name in expected:
            assert expected[name].any(), name
            close(grads[name], expected[name])


def test_two_processes_log_the_same(by_ranks, tmp_path):
    """oracle: the single process with the same batches. Broken pairs are summed over the processes.
    The picture at the end is that of the first pair."""
    *one, _ = read_log(by_ranks / 'one')
    *two, _ = read_log(by_ranks / 'two')
    assert len(one) == len(two) == 20 and one[-1]['bad_pairs'] == 2
    for a, b in zip(one, two):
        for key in 'step', 'loss', 'clip', 'distill', 'h_T_eot_t', 'grad_norm', 'scale', 'cosine', 'bad_pairs':
            assert a[key] == pytest.approx(b[key], rel=2e-4), key
    scored = evaluation.load(by_ranks / 'one/last.pt')
    image = evaluation.shard_image(Shards(by_ranks / 'dogs.tar'), 0)
    evaluation.attention_picture(*scored, image, ['dog 0'], tmp_path / 'a.png')
    assert (tmp_path / 'a.png').read_bytes() == (by_ranks / 'one/attention.png').read_bytes()


def test_schedules_and_decay():
    """oracle: closed forms at the corners of warm-up, cosine and ramp; the rule that matrices decay, but not
    LayerNorms, biases, the class token and the scales."""
    typed, defaults = train.parse_command_line(
        '--data x --steps 110 --warmup 10 --lr 1 --momentum 0.9 --momentum-ramp 3'.split())
    options = train.combine_options(typed, defaults, {}, 'vit-b-16')    # its lr_end is 0
    assert [train.lr_at(step, options) for step in (0, 9, 60, 110)] == pytest.approx([0.1, 1.0, 0.5, 0])
    options.lr_end = 0.2
    assert [train.lr_at(step, options) for step in (60, 110)] == pytest.approx([0.6, 0.2])
    assert [train.momentum_at(step, options) for step in (0, 2, 99)] == [0.25, 0.5, 0.9]
    model, _, _ = micro()
    decay, free = train.make_optimizer(model, 1e-3, 0.3).param_groups
    assert (decay['weight_decay'], free['weight_decay']) == (0.3, 0)
    free = set(map(id, free['params']))
    for name, p in model.named_parameters():
        assert (id(p) in free) == bool(re.search('bias|ln_|norm|scale|class_embedding', name)), name


@pytest.mark.parametrize('most, share', [(0, 1), (2, 0.4), (9, 1)])
def test_gradients_are_clipped_by_their_norm(most, share):
    """oracle: plain gradient descent by hand, of a gradient of norm 5: clipped to 2, to 9, and not at all."""
    model = torch.nn.Linear(5, 5, bias=False)
    model.clamp_scales = dict                           # it has none
    before = model.weight.clone()
    model.weight.grad = torch.ones(5, 5)
    options = SimpleNamespace(clip_grad=most, warmup=2, lr=1)
    run = SimpleNamespace(options=options, model=model, step=0, teacher=None, scaler=SCALER)
    run.optimizer = torch.optim.SGD(model.parameters())
    train.update(run, torch.tensor(5.0))
    close(model.weight, before - 0.5 * share)


# --- train.py: whole runs --------------------------------------------------------------------------------------------

def test_log_entry_by_hand():
    """oracle: by hand. Orthogonal embeddings spread by 1, equal ones by 0. Two of four exchanged: half an accuracy, half
    a cosine."""
    options = SimpleNamespace(batch=4, lr=1, warmup=1, momentum=0.5, momentum_ramp=0)
    model = SimpleNamespace(scales=lambda: [torch.zeros(())] * 2)
    processes = SimpleNamespace(world=1, sum=list)
    run = SimpleNamespace(options=options, model=model, processes=processes, teacher=True, step=1, pairs=4,
                          shards=range(8), device=torch.device('cpu'))
    cls = torch.eye(4)
    exchanged = cls[[1, 0, 2, 3]]
    meter = train.Meter()
    meter.losses.append(torch.ones(()))

    def entry(features):
        out = cosmos.Output(features[None], exchanged[None], None, None)
        return train.describe(run, meter, train.Step(out, exchanged[None], 2, {}, 3, 0, True))

    found = [entry(cls)[name] for name in ('spread', 'accuracy', 'cosine', 'distill')]
    assert found == pytest.approx([1, 0.5, 0.5, 1])
    assert entry(cls[[0, 0, 0, 0]])['spread'] == 0


def test_a_run_leaves_everything(whole, scenes, tmp_path):
    """oracle: the list of design: files, log fields; values by arithmetic; eval.py's score of the checkpoint."""
    assert {'last.pt', 'best.pt', 'config.json', 'samples.png', 'attention.png'} <= contents(whole).keys()
    assert len(list(whole.glob('index-*.npy'))) == 2                    # of --data and of --val
    before, first, *_, final = entries = read_log(whole)
    names = ('step epoch loss mean_loss clip distill h_I_cls_t h_I_eot_t h_T_cls_t h_T_eot_t '
             'chance accuracy spread lr momentum scale distill_scale grad_norm cosine '
             'pairs_per_s waiting memory_GB bad_pairs')
    assert first.keys() == set(names.split())
    assert 0 < first['spread'] < 1              # between equal and orthogonal features
    found = [first[name] for name in ('epoch', 'lr', 'momentum', 'scale', 'chance', 'cosine')]
    assert found == pytest.approx([4 / 60, 1e-3 / 30, 1 / 11, 1 / 0.07, math.log(4), 1], rel=2e-3)
    assert [entry['step'] for entry in entries if 'eval' in entry] == [0, 5, 6] and len(before) == 2
    figures = json.loads((whole / 'eval.json').read_text())
    assert final == {'step': 6, 'eval': figures} and figures['steps'] == 6
    again = tmp_path / 'again.json'
    assert run(evaluation, 'retrieval', whole / 'last.pt', '--shards', scenes / 'val', '--json', again) is None
    assert figures['retrieval'].items() <= json.loads(again.read_text()).items()


def test_lengths_of_runs(monkeypatch, scenes, tmp_path, capsys):
    """oracle: arithmetic on 60 pairs and 16 held-out ones: 15 batches of four a pass; thirty passes at most for tiny,
    32 for the paper's; a tenth of the run between evaluations, unless ten could take a tenth of it."""
    monkeypatch.setattr('lesson.scenes.built_in_set', lambda: scenes)

    def lengths(*flags):
        typed, defaults = train.parse_command_line([*flags, '--batch', '4', '--out', f'{tmp_path}/out'])
        options = train.Run(typed, defaults, 1, 0).options
        return options.steps, options.eval_every, capsys.readouterr().out.count('ten evaluations')

    data = '--data', str(scenes)
    assert lengths(*data, '--preset', 'tiny') == (450, 45, 0)
    assert lengths(*data, '--preset', 'tiny', '--steps', '100') == (100, 0, 1)
    assert lengths(*data, '--preset', 'tiny', '--epochs', '12', '--eval-every', '7') == (180, 7, 0)
    assert lengths(*data, '--vocab', 'learn') == (480, 48, 0)
    assert lengths() == (450, 0, 0)


def test_best_networks_are_kept(monkeypatch, fit, tmp_path, capsys):
    """oracle: the figures of the log: the step with the best mean of both R@1, also over a stop; pairs by arithmetic."""
    out = tmp_path / 'out'
    four_steps(monkeypatch, fit, out, '--eval-every', 1, '--lr', 0.1, '--warmup', 1)
    assert fit(out, *AUTO, '--batch', 8, '--eval-every', 1) == 0
    means = {}
    for entry in read_log(out):
        if 'eval' in entry:
            figures = entry['eval']['retrieval']
            means[entry['step']] = figures['image_to_text_R@1'] + figures['text_to_image_R@1']
        elif entry['step'] == 5:
            assert entry['epoch'] == pytest.approx((4 * 4 + 8) / 60)
    assert list(means) == [0, 1, 2, 3, 5, 6]            # of step 4 `finish` would have had them
    best = max(means, key=means.get)                                    # of equals the first
    assert torch.load(out / 'best.pt', weights_only=True)['step'] == best
    printed = capsys.readouterr().out
    assert f'best {means[best] / 2:.1%} at step {best}\n' in printed
    assert re.search(r'step 6  loss \d.*  clip .*  accuracy .*%  lr .*  \d+ pairs/s  0:00:00 left', printed)
    assert evaluation.load(out / 'best.pt')[0].origin == 'teacher'
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=10 ** 6))
    assert re.search(r'out has 1 MB free, .* need \d+ MB', fit(out))


def test_it_learns(fit, scenes, tmp_path):
    """oracle: guessing, ln 8, where both losses start: 150 steps on 60 pairs take each below three quarters of it; in
    retrieval of these pairs chance is 1/6."""
    flags = '--steps 150 --batch 8 --lr 4e-3 --lr-end 0.5 --wd 0.1 --augment crops --save-every 150 --val'.split()
    assert fit(tmp_path, *flags, scenes / 'train') == 0
    *entries, final = read_log(tmp_path)
    for name in 'clip', 'distill':
        losses = [entry[name] for entry in entries]
        assert sum(losses[-10:]) / 10 < 0.75 * math.log(8) < 1.2 * sum(losses[:3]) / 3
    assert final['eval']['retrieval']['image_to_text_R@10'] > 0.33


@pytest.mark.parametrize('method, workers', [('cosmos', 0), ('cosmos', 2), ('clip', 0)])
def test_resume_is_exact(monkeypatch, fit, whole, tmp_path, method, workers):
    """oracle: the run that was not interrupted, read by the main process: weights, optimizer, teacher and log. SIGTERM
    goes to the loader's workers, too, as torchrun and Slurm send it."""
    flags = ['--method', method, '--workers', workers]
    if method != 'cosmos':
        whole = tmp_path / 'whole'
        assert fit(whole, *flags) == 0
    step = train.train_step

    def interrupted(run, batch):
        if run.step == 3 and not run.checkpoint:
            for process in [*active_children(), current_process()]:
                os.kill(process.pid, signal.SIGTERM)
        return step(run, batch)

    monkeypatch.setattr(train, 'train_step', interrupted)
    two = tmp_path / 'two'
    assert fit(two, *flags) == 143 and saved(two)['step'] == 4
    assert not (two / 'eval.json').exists()
    assert fit(two, *flags, *AUTO) == 0
    same_run(whole, two)


def test_kills_at_random_moments(fit, tmp_path, scenes):
    """oracle: the run that nobody killed, bit by bit. SIGKILL in each half; and while it lives it has its folder to
    itself: another process that wants it is refused."""
    flags = ['--steps', '12', '--save-every', '1', *AUTO]
    assert fit(tmp_path / 'whole', *flags) == 0
    out = tmp_path / 'killed'
    log = out / 'log.jsonl'
    code = f'import {__name__}, data, train; data.cli(train.main)'      # knows the micro preset
    command = [sys.executable, '-c', code, '--data', scenes, *QUICK, *flags, '--workers', '1', '--out', out]
    rng = random.Random(0)
    for half in range(2):
        child = subprocess.Popen(command, cwd=HERE, start_new_session=True)
        lines = 6 * half + rng.randint(1, 5)
        while not log.exists() or log.read_text().count('\n') < lines:
            assert child.poll() is None
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        os.killpg(child.pid, signal.SIGSTOP)
        assert 'another run is at work in' in fit(out)
        assert 'another run is at work in' in fit(out, *AUTO)
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        (out / 'last.pt.partial').touch()                               # as of a kill within a save
    assert fit(out, *flags) == 0
    same_run(tmp_path / 'whole', out)
    assert not list(out.glob('*.partial'))


def test_torn_logs_and_full_disks(monkeypatch, fit, whole, tmp_path, capsys):
    """oracle: the run without mishap: torn lines of the log are written anew, and a disk that is full (files may not
    grow beyond a limit) leaves the old checkpoint. A torn checkpoint is named."""
    out = tmp_path / 'out'
    four_steps(monkeypatch, fit, out)
    checkpoint = (out / 'last.pt').read_bytes()
    with open(out / 'log.jsonl', 'a') as file:
        file.write('{"step": 3, "lo')
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(checkpoint) // 2, hard))
    error = fit(out, *AUTO)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert re.fullmatch('error: .*last.pt cannot be written .*', error)
    assert 'steps 4 to 6' in capsys.readouterr().out
    assert (out / 'last.pt').read_bytes() == checkpoint and not list(out.glob('*.partial'))
    assert fit(out, '--resume', out) == 0               # a run's folder is its last.pt
    same_run(whole, out)
    (out / 'last.pt').write_bytes(checkpoint[:10_000])
    assert 'last.pt is no checkpoint' in fit(out, *AUTO)


def test_restarts_of_torchrun_resume_their_own_run(monkeypatch, fit, whole, tmp_path):
    """oracle: the run without a restart; for a run that another job left in the folder, its files, byte by byte."""
    out = tmp_path / 'out'
    four_steps(monkeypatch, fit, out)
    before = contents(out)
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    with monkeypatch.context() as patch:
        patch.setattr(os, 'getppid', lambda: -1)
        assert 'this job did not start' in fit(out)
        assert contents(out) == before
    assert fit(out) == 0                                                # without --resume
    assert fit(tmp_path / 'fresh') == 0
    for resumed in out, tmp_path / 'fresh':
        same_run(whole, resumed)


def test_a_run_never_costs_another(fit, whole, scenes, tmp_path, capsys):
    """oracle: the files of a finished run, byte by byte, after each command that must leave them alone."""
    out = tmp_path / 'out'
    shutil.copytree(whole, out)
    inside = dog_tar(out / 'dogs.tar', 9)
    before = contents(out)
    for words, *flags in (
            ('does not exist', '--data', 'scenez'),
            ('cannot be moved', '--data', inside),
            ('cannot be moved', '--val', inside),
            ('cannot be moved', '--init', out / 'last.pt'),
            ('started on other shards', *AUTO, '--data', inside),
            ('started on other shards', *AUTO, '--data', f'{scenes}/train::{inside}'),
            ('started with --method cosmos, not clip', *AUTO, '--method', 'clip')):
        assert words in fit(out, *flags), flags
        assert contents(out) == before, flags
    capsys.readouterr()
    assert fit(out, *AUTO, '--steps', 4) == 0
    assert contents(out) == before
    printed = capsys.readouterr().out
    assert '--steps was 6, is now 4\n' in printed and '--data was' not in printed
    assert 'nothing is left to do' in printed
    (out / 'eval.json').unlink()
    assert fit(out, *AUTO, '--steps', 4) == 0
    assert (out / 'eval.json').exists() and (out / 'last.pt').read_bytes() == before['last.pt']
    moved = contents(out)
    for number in 1, 2:                                 # a fresh start moves the old run aside
        assert fit(out, '--steps', number, '--val', scenes / 'train') == 0
        assert saved(out)['step'] == number
        assert contents(tmp_path / f'out-{number}') == moved
        moved = contents(out)
    assert capsys.readouterr().out.count('1 shards are in --data and in --val') == 2


def test_init(fit, whole, tmp_path):
    """oracle: the weights in the file, and their features, before the first step; a fresh model's heads."""
    assert fit(tmp_path / 'clip', '--method', 'clip') == 0
    model, tokenizer, _ = evaluation.load(whole / 'last.pt')
    exported = tmp_path / 'open_clip.pt'
    evaluation.export(model, tokenizer, exported)
    _, images, _ = micro()
    for path in whole / 'last.pt', tmp_path / 'clip/last.pt', exported:
        begun = started(fit, tmp_path / 'begun', '--init', path)
        model, _, _ = evaluation.load(path)
        torch.manual_seed(0)
        expected = COSMOS(begun.config).state_dict() | model.state_dict()
        for found in begun.model, begun.teacher.model:
            assert_close(found.state_dict(), expected, rtol=0, atol=0)
            close(found.encode_image(images[0])[0], model.encode_image(images[0])[0])
        assert begun.step == 0
    shutil.copytree(whole, tmp_path / 'on')
    assert started(fit, tmp_path / 'on', '--init', exported, *AUTO, '--steps', 7).step == 6


def test_half_precision_with_a_scaler(fit, whole, tmp_path):
    """oracle: the float32 run: the loss of its first step. The scaler's state is saved and read again, and --wd goes
    before the checkpoint's."""
    for name in 'bf16', 'fp16':
        out = tmp_path / name
        assert fit(out, '--steps', 3, '--precision', name) == 0
        assert read_log(out)[0]['loss'] == pytest.approx(read_log(whole)[1]['loss'], rel=0.01)
    scaler = saved(out)['scaler']
    resumed = started(fit, out, *AUTO, '--precision', 'fp16', '--wd', 0.3, '--steps', 4)
    assert resumed.scaler.state_dict() == scaler and scaler['scale'] > 1
    assert [group['weight_decay'] for group in resumed.optimizer.param_groups] == [0.3, 0]


@pytest.mark.parametrize('bad', [5, 20])
def test_bad_pairs_stop_a_run_beyond_5_percent(fit, tmp_path, bad):
    """oracle: the number of pairs of 120 that were broken on purpose; a hundred of them are seen."""
    shards = dog_tar(tmp_path / 'a.tar', 120, broken=range(bad))
    status = fit(tmp_path / 'out', '--data', shards, '--steps', 25)
    assert status == 0 if bad == 5 else 'over 5 % of the pairs cannot be read' in status
    assert 0 < saved(tmp_path / 'out')['step'] <= 25    # what was learnt is not lost


def test_broken_steps_are_skipped_or_stop_a_run(monkeypatch, fit, tmp_path, capsys):
    """oracle: losses made NaN in chosen steps, few in a row skipped without a trace, more not."""
    clip_loss = train.clip_loss

    def broken(out, *steps):
        numbers = itertools.count(1)

        def spoilt(*arguments):
            return clip_loss(*arguments) * (math.nan if next(numbers) in steps else 1)

        monkeypatch.setattr(train, 'clip_loss', spoilt)
        status = fit(out, '--steps', 9)
        state = saved(out)
        assert state['student']['visual.proj'].isfinite().all()
        return status, state['step'], [entry['step'] for entry in read_log(out)], state['optimizer']

    *found, optimizer = broken(tmp_path / 'few', 1, 3, 4, 5, 6)
    assert found == [0, 9, [2, 7, 8, 9, 9]] and optimizer['state'][0]['step'] == 4
    *entries, _ = read_log(tmp_path / 'few')
    assert all(math.isfinite(entry['mean_loss']) for entry in entries)
    assert capsys.readouterr().out.count('is left out: loss nan') == 5
    error, step, *_ = broken(tmp_path / 'many', 3, 4, 5, 6, 7)
    assert re.fullmatch('error: 5 steps in a row .* step 7.*', error) and step == 7


def test_weights_that_are_not_finite_are_not_saved(monkeypatch, fit, tmp_path):
    """oracle: the checkpoint before: that of step 2."""
    def spoil(run, norm):
        with torch.no_grad():
            run.model.visual.proj[0, 0] = math.inf if run.step == 3 else 0

    monkeypatch.setattr(train, 'update', spoil)
    assert re.fullmatch('error: the weights are not finite after step 4, .* by --resume .*last.pt .*',
                        fit(tmp_path / 'out'))
    assert saved(tmp_path / 'out')['step'] == 2


def test_a_failed_evaluation_costs_nothing(monkeypatch, fit, whole, tmp_path, capsys):
    """oracle: the run whose evaluations went well. One on the way is reported; the last is made up for by --resume."""
    def fail(*arguments):
        raise RuntimeError('out of luck')

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, 'evaluate', fail)
        assert 'out of luck' in fit(tmp_path, '--eval-every', 5)
    assert 'the evaluation failed: RuntimeError, out of luck' in capsys.readouterr().out
    assert fit(tmp_path, *AUTO) == 0
    same_run(whole, tmp_path)

WRONG_OPTIONS = {       # flags, and what their sentence must name
    '--stepz 3': ["'--stepz'", 'did you mean --steps?'],
    '--learning-rate=1': ['did you mean --lr?'],
    '--batch 1': ['--batch 1 is out of range', '2'],
    '--lr-end 1.5': ['--lr-end 1.5 is out of range', '0 to 1'],
    '--local-crops -1': ['--local-crops -1 is out of range', '0 to'],
    '--batch 64': ['--batch 64', '20 pairs', 'lower'],
    '--accum 3': ['--batch 4', 'multiple of 3'],
    '--resume none.pt': ['none.pt', 'does not exist'],
    '--resume other.pt': ['other.pt', 'no run to resume', '--init'],
    '--init other.pt': ['other.pt', 'weights']}


def test_errors_of_training_are_one_sentence(monkeypatch, tmp_path, fit, capsys):
    """oracle: the rule: one line, with the value, the place and the remedy; --help has commands and defaults."""
    monkeypatch.chdir(tmp_path)
    shards = dog_tar(tmp_path / 'plain.tar', 20)
    torch.save({'weights': torch.zeros(1)}, 'other.pt')
    for line, parts in WRONG_OPTIONS.items():
        status = fit('out', '--data', shards, *line.split())
        one_sentence(capsys.readouterr().err if status == 1 else status, parts)
    with monkeypatch.context() as patch:        # of several processes: what was printed is not lost
        patch.setattr(dist, 'is_initialized', Mock())
        patch.setattr(os, '_exit', sys.exit)
        patch.setattr(sys, 'stdout', Mock())
        assert run(train, '--batch', 1) == 1 and sys.stdout.flush.called
    assert run(train, '--help') == 0
    text = re.sub(r'\s+', ' ', capsys.readouterr().out)
    for part in ["captions (all)", "'epochs': 32.0, 'batch': 1024, 'lr': 0.0005, 'warmup': 2000, 'wd': 0.5",
                 "'momentum': 0.999", "'momentum_ramp': 10", 'row of Table 5', 'torchrun --nproc']:
        assert part in text


def test_without_lesson_and_extras(scenes, whole, tmp_path):
    """oracle: the exit status of training and of evaluation, where the four files are alone."""
    for name in 'cosmos', 'data', 'eval', 'train':
        shutil.copy(HERE / f'{name}.py', tmp_path)
    flags = f'--data {scenes} --init {whole}/last.pt --out out --preset tiny --steps 2 --batch 4 --workers 0'
    for command in f'train.py {flags}', f'eval.py retrieval out/last.pt --shards {scenes}/val':
        done = subprocess.run([sys.executable, *command.split()], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and 'R@1' in done.stdout, done.stderr
