"""What train.py promises. Each docstring names its oracle: what a result must equal.

    pytest tests/test_train.py
"""
import copy
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from dataclasses import replace
from functools import partial
from multiprocessing import active_children, get_context, set_forkserver_preload
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import cosmos
import eval as evaluation
import train
from cosmos import COSMOS, GLOBALS, Attention, Output, Teacher, clip_loss, cosmos_loss
from data import Batch
from lesson import scenes
from plumbing import runs, setup
from plumbing.files import read_json
from plumbing.options import choose_data, settle
from plumbing.parts import StudentInParts
from plumbing.processes import LONGEST_WAIT, choose_device, choose_dtype, compile_blocks, end_workers
from plumbing.progress import LOG_NAMES, Progress, log_entry, print_entry
from plumbing.setup import check_batch
from tests.helpers import MICRO, ROOT, close, dog_tar, micro, put, refused, run

QUICK = ('--preset micro --precision fp32 --device cpu --batch 4 --steps 6 --save-every 2 --warmup 2 '
         '--lr 0.003 --log-every 1 --eval-every 2 --workers 0 '
         '--augment full').split()
ALONE = train.Processes('cpu')
LIMITS = resource.getrlimit(resource.RLIMIT_FSIZE)

def read_options(words):
    """The options that train.py has before they are settled."""
    unsettled, _ = train.read_options(words)
    return SimpleNamespace(**unsettled)


# --- Helpers ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def dogs(tmp_path_factory):
    """A folder with two halves, 60 training and 16 held-out pairs. Each image has a colour of its own."""
    root = tmp_path_factory.mktemp('dogs')
    for half, pairs in ('train', 60), ('val', 16):
        (root / half).mkdir()
        dog_tar(root / half / '0.tar', pairs)
    return root


@pytest.fixture(scope='session')
def fit(dogs):
    """fit(out, *flags): runs train.py for seconds -> its exit status, or its error."""
    def fit(out, *flags, watchers=()):
        program = SimpleNamespace(main=partial(train.main, watchers=watchers))
        status = run(program, '--data', dogs, *QUICK, '--out', out, *flags)
        end_workers()           # as at the end of a process; else torch waits for each worker of a failed run
        return status

    return fit


@pytest.fixture(scope='session')
def started(dogs):
    """started(out, *flags): the Run that these flags make, as it stands before its first step."""
    def started(out, *flags):
        argv = ['--data', dogs, *QUICK, '--out', out, *flags]
        begun, _ = train.set_up(*train.read_options(list(map(str, argv))), ALONE, None)
        return begun

    return started


@pytest.fixture(scope='session')
def whole(fit, tmp_path_factory):
    """The --out of a run of six steps that nothing disturbed."""
    out = tmp_path_factory.mktemp('fresh') / 'runs/whole'
    assert fit(out) == 0
    assert read_log(out)[-1]['spread'] > 0.1            # has not collapsed; otherwise all would score alike
    return out


def saved(out, name='last.pt'):
    return torch.load(out / name, weights_only=True)


def read_log(out):
    """The entries of the log, one per step. If a step was logged twice, the last figures count. Times are set to 0."""
    entries = {}
    for line in (out / 'log.jsonl').read_text().splitlines():
        entry = json.loads(re.sub('"(pairs_per_s|TFLOP_per_s|waiting|seconds)": [^,}]+', '"time": 0', line))
        entries.setdefault(entry['step'], {}).update(entry)
    return list(entries.values())


def same_run(a, b, whole_log=True):
    """Asserts that networks, optimizers, figures and logs of two --out folders are equal bit for bit, but for times."""
    found = []
    for out in a, b:
        log = read_log(out)
        held = log if whole_log else [entry['eval'] for entry in log if 'eval' in entry]
        for name in 'last.pt', 'best.pt':
            state = saved(out, name)
            held += [state['student'], state['teacher'], state['step']]
        found.append([*held, saved(out)['optimizer']['state']])
    assert_close(*found, rtol=0, atol=0)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- One step --------------------------------------------------------------------------------------------------------

G = GLOBALS
ROWS = {  # for each row of Table 5: global and local images, global and local captions; smallest crop; terms
    'clip': [1, 0, 1, 0, 0.9],
    'clip-aug': [G, 0, 1, 0, 0.4],
    'image-distill': [G, 6, 1, 0, 0.4, 'cls_cls_t'],
    'text-crop': [G, 6, G, 6, 0.4, 'cls_cls_t'],
    'text-distill': [G, 6, G, 6, 0.4, 'cls_cls_t', 'eot_eot_t'],
    'cosmos': [G, 6, G, 6, 0.4, 'h_I_cls_t', 'h_I_eot_t', 'h_T_cls_t', 'h_T_eot_t'],
    'no-cross-attention': [G, 6, G, 6, 0.4, 'cls_cls_t', 'cls_eot_t', 'eot_cls_t', 'eot_eot_t'],
    'across': [G, 6, G, 6, 0.4, 'h_I_cls_t', 'cls_eot_t', 'eot_cls_t', 'h_T_eot_t']}


@pytest.mark.parametrize('method', train.METHODS)
def test_views_and_losses_of_each_row(started, tmp_path, method):
    """oracle: the table. If a recipe changes colours, clip alone leaves them as they are."""
    row = train.METHODS[method]
    flags = []
    if row.has_local_images:
        flags += ['--local-crops', 6]
    if row.has_text_crops:
        flags += ['--local-captions', 6]
    begun = started(tmp_path, '--method', method, *flags)
    terms = ROWS[method][5:]
    assert [*begun.train_set.counts, begun.train_set.crop_min, *terms] == ROWS[method]
    assert (begun.teacher is not None) == bool(terms)
    assert begun.student.has_two_scales == (method in ('cosmos', 'no-cross-attention', 'across'))
    options = read_options(['--preset', 'vit-b-16', '--method', method])
    assert options.augment == ('crops' if method == 'clip' else 'full')
    assert row.global_images == GLOBALS or not (row.has_local_images or row.has_teacher)
    _, images, texts = micro()
    images[-1].requires_grad_()                 # a local view
    assert step_of(begun.student, images, texts, method).terms.keys() == {'clip', *terms}
    assert images[-1].grad.any() == row.has_local_images        # if it is seen, something is learnt from it
    # Each parameter learns. If one had no gradient, DDP would stop at the second step.
    assert [name for name, p in begun.student.named_parameters() if p.grad is None] == []


def step_of(model, images, texts, method='cosmos', accum=1, processes=ALONE, clip_grad=0, teacher=None, dtype=None):
    """train_step on this batch, by plain gradient descent with rate 0.5. The teacher becomes the student."""
    if teacher is None:
        teacher = Teacher(COSMOS(model.config))
    student = StudentInParts(model, accum)
    if processes.world > 1:
        student = DistributedDataParallel(student)
    options = SimpleNamespace(accum=accum, clip_grad=clip_grad, seed=0, lr=1, warmup=2, momentum=0,
                              momentum_ramp=0)
    state = train.Run(
        options=options, method=train.METHODS[method], processes=processes, train_set=None, student=model,
        student_to_call=student, teacher=teacher, optimizer=torch.optim.SGD(model.parameters()),
        scaler=torch.amp.GradScaler('cpu', enabled=False), dtype=dtype)
    batch = Batch(None, None, texts, texts[:GLOBALS], 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, 'views', lambda batch, seed, step: images)
        return train.train_step(state, batch)


def test_a_step_by_hand():
    """oracle: the sum of both losses, and a step of gradient descent by hand, whose gradient is clipped to a norm of
    0.1. The teacher sees only the globals, and follows the student."""
    model, images, texts = micro()
    before = copy.deepcopy(model)
    teacher = Teacher(COSMOS(model.config))
    targets = teacher(images[:GLOBALS], texts[:GLOBALS])
    done = step_of(model, images, texts, clip_grad=0.1, teacher=teacher)
    out = before(images, texts)
    loss = clip_loss(out, before.logit_scale.exp()) + cosmos_loss(out, *targets, before.distill_logit_scale.exp())
    loss.backward()
    norm = math.hypot(*[p.grad.norm() for p in before.parameters()])
    assert [done.loss.item(), done.norm.item()] == pytest.approx([loss.item(), norm])
    for after, p in zip(model.parameters(), before.parameters()):
        close(after, p - 0.5 * 0.1 / norm * p.grad)
    assert_close(teacher.model.state_dict(), model.state_dict())
    torch.nn.init.constant_(model.logit_scale, 9)
    step_of(model, images, texts, clip_grad=0.1)
    assert model.logit_scale.item() == pytest.approx(math.log(100))     # a step clamps


OBJECTIVES = 'cosmos', 'across', 'no-cross-attention', 'text-distill', 'image-distill', 'clip'


def gradients(processes, method, accum):
    """A step on this process's share of 8 pairs -> {parameter: gradient}, and the mean loss over all processes."""
    model, images, texts = micro(method, B=8)
    if method in ('image-distill', 'clip'):
        texts = texts[:1]
    images, texts = ([x.chunk(processes.world)[processes.rank] for x in xs] for xs in (images, texts))
    loss = step_of(model, images, texts, method, accum, processes).loss
    [total] = processes.sum([loss])
    return {name: p.grad for name, p in model.named_parameters()}, total / processes.world


def one_rank(rank, port, path, flags):
    """What each of two processes does. It saves its gradients and makes three runs: an undisturbed one, one that fails,
    and one that is stopped and resumed. What it complains of goes into a file."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    processes = train.Processes('cpu')
    assert (sys.stdout.name == os.devnull) == (rank > 0)                # rank 0 speaks for all
    for method in OBJECTIVES:
        for accum in 1, 2:
            torch.save(gradients(processes, method, accum), path / f'{rank}-{method}-{accum}')
    train.Processes = {'auto': processes, 'cpu': processes}.get
    choose_model = setup.choose_model
    train_step = train.train_step

    def in_turn(*choices):
        for _ in 'begins', 'ends':
            with open(path / 'turns', 'a') as file:
                file.write(f'{rank} ')
            time.sleep(0.1)
        return choose_model(*choices)

    def signalled(run, batch):
        if (rank, run.step) == (1, 4):
            os.kill(os.getpid(), signal.SIGUSR1)
        return train_step(run, batch)

    with pytest.MonkeyPatch.context() as patch, open(path / f'{rank}.txt', 'w') as complaints:
        patch.setattr(os, '_exit', sys.exit)            # ends the run, but not this process
        patch.setattr(sys, 'stderr', complaints)
        patch.setattr(setup, 'choose_model', in_turn)
        assert run(train, *flags, path / 'two') == 0
        patch.setattr(setup, 'choose_model', choose_model)
        assert run(train, *flags, path / 'failed', '--lr', 1e30) == 1
        patch.setattr(train, 'train_step', signalled)
        number = signal.SIGUSR1 if rank else signal.SIGTERM         # only rank 1 knows which signal it was
        assert run(train, *flags, path / 'stopped') == 128 + number
        patch.setattr(train, 'train_step', train_step)
        assert saved(path / 'stopped')['step'] == 5     # that of the signal
        assert run(train, *flags, path / 'stopped', '--resume') == 0
    processes.leave(0)


@pytest.fixture(scope='session')
def by_ranks(tmp_path_factory):
    """A folder with what two processes leave (see `one_rank`), and with the run 'one' of a single process."""
    path = tmp_path_factory.mktemp('ranks')
    shards = dog_tar(path / 'dogs.tar', 80, broken=[3, 20])
    flags = ['--data', shards, shards, *QUICK, '--steps', 12, '--lr', 1e-3, '--out']
    set_forkserver_preload([__name__])                  # imported once, not in each process
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    start_processes(one_rank, (port, path, flags), nprocs=2, start_method='forkserver')
    assert run(train, *flags, path / 'one') == 0
    return path


class Weight(torch.nn.Linear):
    """A student with a single weight, whose last output is image times weight. The others are absent."""

    def forward(self, images, texts):
        return Output(None, None, None, super().forward(images[0])[None])

    def clamp_scales(self):
        """It has none."""


def test_parts_are_exact_in_half_precision(monkeypatch):
    """oracle: by hand: two parts, whose gradients are 256 and 1. In bf16 their sum would be 256. What is absent
    keeps its place among the outputs."""
    monkeypatch.setattr(train, 'total_loss', lambda student, out, *rest: (out.h_T.float().sum(), {}))
    model = Weight(1, 1, bias=False)
    values = [torch.tensor([[256.0], [1.0]])]
    step_of(model, values, values, 'clip', accum=2, teacher='none', dtype=torch.bfloat16)
    assert model.weight.grad.item() == 257


@pytest.mark.parametrize('method', OBJECTIVES)
def test_ranks_and_accumulation_equal_one_process(monkeypatch, by_ranks, method):
    """oracle: one process with the whole batch. Its loss and each of its gradients equal those of --accum 2, of two
    processes, and of both together. No gradient is all zero. What is computed again draws
    nothing, so torch must not look at its random state."""
    monkeypatch.setattr(torch, 'get_rng_state', None)
    expected, total = gradients(ALONE, method, 1)
    found = [gradients(ALONE, method, 2)]
    for path in by_ranks.glob(f'?-{method}-?'):
        found.append(torch.load(path))
    assert len(found) == 5
    for grads, loss in found:
        assert loss == pytest.approx(total, rel=1e-6)
        for name in expected:
            assert expected[name].any(), name
            close(grads[name], expected[name])


class Elsewhere(torch.Tensor):
    """A tensor on the CPU that says it is on a GPU."""
    device = torch.device('cuda')


def test_attention_of_gpus_equals_that_of_cpus(monkeypatch):
    """oracle: the loss and all gradients of the CPU. There torch's kernel is not called; on a GPU it is, as (rows of
    queries: of an image, of a text, or one per view; dimensions of the mask, or 'causal')."""
    project = Attention.project
    kernel = F.scaled_dot_product_attention
    calls = set()

    def elsewhere(*inputs):
        q, k, v = project(*inputs)
        return q.as_subclass(Elsewhere), k, v

    def counted(q, k, v, attn_mask=None, is_causal=False):
        mask = 'causal' if is_causal else getattr(attn_mask, 'ndim', 0)
        calls.add((q.shape[2], mask))
        return kernel(q.as_subclass(torch.Tensor), k, v, attn_mask, is_causal=is_causal)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', counted)
    expected, total = gradients(ALONE, 'cosmos', 1)
    assert calls == set()
    monkeypatch.setattr(Attention, 'project', elsewhere)
    found, loss = gradients(ALONE, 'cosmos', 1)
    assert calls == {(17, 0), (5, 0), (12, 'causal'), (1, 0), (1, 4), (GLOBALS + 2, 0)}
    assert loss == pytest.approx(total, rel=1e-6)
    for name in expected:
        close(found[name], expected[name])


def test_a_step_leaves_nothing_on_the_cpu(monkeypatch):
    """oracle: torch's device meta, which refuses tensors of the CPU (and lacks autocast and `isfinite`)."""
    monkeypatch.setattr(torch, 'autocast', lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(torch.Tensor, 'isfinite', lambda norm: True)
    model, images, texts = micro(B=2)
    model.to('meta')
    images = [view.to('meta') for view in images]
    texts = [caption.to('meta') for caption in texts]
    seen = []

    def note(network, inputs):
        seen.append((type(network).__name__, len(inputs[0]), *[len(views[0]) for views in inputs]))

    teacher = Teacher(model)
    for network in model, teacher:
        network.register_forward_pre_hook(note)
    done = step_of(model, images, texts, accum=2, clip_grad=1, teacher=teacher)
    # Two pairs come one by one, to the student twice, because the backward pass computes it again.
    assert seen == [('Teacher', GLOBALS, 1, 1)] * 2 + [('COSMOS', len(images), 1, 1)] * 4
    _, class_row = model.visual.embed(images[0])
    for x in (done.loss, done.norm, class_row, *model.parameters()):
        assert x.device.type == 'meta'


def test_two_processes_are_one_run(by_ranks):
    """oracle: one process with the same batches. Warnings and failures are told once. Rank 0 chooses model and
    vocabulary before rank 1 begins. The run that a signal stopped equals the undisturbed one, bit for bit."""
    one = read_log(by_ranks / 'one')
    two = read_log(by_ranks / 'two')
    assert len(one) == len(two) == 12 and one[-1]['bad_pairs'] == 2
    for a, b in zip(one, two):
        for key in 'loss', 'h_T_eot_t', 'grad_norm', 'scale', 'cosine', 'bad_pairs', 'accuracy', 'spread':
            assert a[key] == pytest.approx(b[key], rel=2e-4), key
    said = [(by_ranks / f'{rank}.txt').read_text() for rank in range(2)]
    # The failure of one run, the shards of each of four starts, and no bar, because this is no terminal.
    for words, count in ('gradients of 5 steps in a row', 1), ('1 shards are named twice', 4), ('%|', 0):
        assert [text.count(words) for text in said] == [count, 0]
    assert (by_ranks / 'turns').read_text() == '0 0 1 1 '
    kept = []
    for name in 'two', 'stopped':
        state = saved(by_ranks / name)
        kept.append([state['step'], state['student'], state['teacher'], state['optimizer']['state']])
    assert_close(*kept, rtol=0, atol=0)


def test_ranks_must_agree(monkeypatch, fit, started, whole, tmp_path):
    """oracle: the refusal, if rank 0 has another rate, number of pairs, or checkpoint than this rank. The same files
    may lie elsewhere, but all ranks learn the vocabulary or none does, and all have held-out data or none has."""
    begun = started(tmp_path / 'begun')
    told = []

    def rank_0s(mine):
        told.append(mine)
        return told[0]

    def check(**options):
        options = SimpleNamespace(**vars(begun.options) | options)
        setup.check_ranks(options, begun.train_set.shards, {}, SimpleNamespace(broadcast=rank_0s))

    check(vocab='clip')                                 # rank 0
    check(vocab='file', data=['a'], val=['b'], workers=9)
    for other in {'vocab': 'learn'}, {'vocab': 'clip', 'val': None}:
        refused('are not the same for all processes', check, **other)
    for out, flag, other in (
            (tmp_path, '--seed=0', {'lr': 9.0}),
            (tmp_path, '--seed=0', {'pairs': 9}),
            (whole, '--resume', {'last.pt': 9.0})):
        def broadcast(processes, value):
            return value | other if isinstance(value, dict) else value

        monkeypatch.setattr(train.Processes, 'broadcast', broadcast)
        assert 'the same command, the same files in --data, and one --out' in fit(out, flag)
    assert not (tmp_path / 'last.pt').exists()


def test_torchrun_as_it_is_typed(tmp_path):
    """oracle: the command at the head of train.py, with a small set and one step: status 0, and each line once."""
    run(scenes, tmp_path / 'runs/scenes', '--train', 64, '--val', 16)
    command = 'torchrun --nproc_per_node=2 train.py --out runs/two'
    assert command in train.__doc__
    words = command.replace('train.py', str(ROOT / 'train.py')).split()[1:]
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', *words, '--steps', '1', '--eval-every', '0',
                           '--data', 'runs/scenes'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [done.stdout.count(word) for word in ('on 2 x ', '\nstep 1 ', '\ndone ')] == [1, 1, 1]


def test_loaders_start_before_the_model(monkeypatch, started, tmp_path):
    """oracle: DDP's notes: once nccl is up, nothing may be forked. DDP comes later than the model."""
    before = active_children()

    def model(config):
        assert len(active_children()) == len(before) + 2
        return COSMOS(config)

    monkeypatch.setitem(train.METHODS, 'cosmos', train.METHODS['cosmos']._replace(student=model))
    begun = started(tmp_path, '--workers', 2)
    assert len(next(begun.batches).crops[0]) == 4


# --- Options ---------------------------------------------------------------------------------------------------------

def test_workers_share_the_cores_of_a_node(monkeypatch):
    """oracle: all processes together get half of the cores for loaders, but each has at least one and at most eight."""
    for cores, processes, workers in (16, None, 8), (16, 8, 1), (64, 4, 8), (24, 4, 3), (4, 8, 1):
        monkeypatch.setattr(os, 'sched_getaffinity', {0: range(cores)}.get)         # 0: this process
        if processes:
            monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
        assert read_options([]).workers == workers


def test_schedules_and_decay():
    """oracle: closed forms at the corners of warm-up, cosine and ramp. Only matrices decay."""
    options = read_options(
        '--preset vit-b-16 --steps 110 --warmup 10 --lr 1 --momentum 0.9 --momentum-ramp 3'.split())    # its lr_end is 0
    rates = [train.lr_at(step, options) for step in (0, 9, 10, 60, 110)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.5, 0])
    options.lr_end = 0.2
    assert [train.lr_at(step, options) for step in (60, 110)] == pytest.approx([0.6, 0.2])
    assert [train.momentum_at(step, options) for step in (0, 2, 99)] == [0.25, 0.5, 0.9]
    model, _, _ = micro()
    decay, free = train.make_optimizer(model, 1e-3, 0.3).param_groups
    assert (decay['weight_decay'], free['weight_decay']) == (0.3, 0)
    free = set(map(id, free['params']))
    for name, p in model.named_parameters():
        assert (id(p) in free) == bool(re.search('bias|ln_|norm|scale|class_embedding', name)), name


def test_device_and_precision(monkeypatch):
    """oracle: the rule: the GPU that torch finds, unless another device is asked for, and bf16 if it has units for
    that, or a CPU has. A device that is absent is refused, and so is the second process on one GPU."""
    found = torch.cuda
    for has_gpu, has_mps, asked, device in (
            (False, True, 'auto', 'cpu'),
            (True, True, 'mps', 'mps'),
            (True, False, 'cpu', 'cpu'),
            (True, False, 'auto', 'cuda'),
            (True, False, 'cuda', 'cuda')):
        monkeypatch.setattr(found, 'is_available', lambda: has_gpu)
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: has_mps)
        assert choose_device(asked).type == device
    monkeypatch.delattr(torch.cpu, '_is_amx_tile_supported', raising=False)     # as in some versions
    for has_units, dtype in (True, torch.bfloat16), (False, None):
        monkeypatch.setattr(found, 'is_bf16_supported', lambda including_emulation: has_units or including_emulation)
        monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: has_units)
        for device in 'cuda', 'cpu':
            assert choose_dtype('auto', torch.device(device)) == dtype
    monkeypatch.setattr(found, 'device_count', lambda: 1)
    monkeypatch.setattr(os, 'environ', {'RANK': '1', 'LOCAL_RANK': '1'})
    refused('process 1 of this node has no GPU', train.Processes, 'auto')
    monkeypatch.setattr(found, 'is_available', lambda: False)
    for name in 'cuda', 'mps':
        refused(f'--device {name}: torch finds no such device here', choose_device, name)


def test_what_is_not_typed(monkeypatch, capsys):
    """oracle: the rule, and a line where the preset depends on the machine. --init gives each preset the same defaults,
    and its folder the name of the weights; what is typed wins."""
    for has_gpu, flags, preset, lines in (
            (True, '', 'tiny', []),
            (True, '--data x', 'vit-b-16', ['vit-b-16']),
            (True, '--data x --device cpu', 'photo', ['photo']),
            (False, '--data x', 'photo', ['photo']),
            (False, '--data x --preset tiny', 'tiny', [])):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: has_gpu)
        options = read_options(flags.split())
        assert [options.preset, options.out] == [preset, f'runs/{preset}-cosmos']
        assert re.findall('note +--preset is (.*?), .* because', capsys.readouterr().out) == lines
    assert read_options(['--data', 'x', '--init', 'clip.pt']).preset == 'photo'
    for preset in train.PRESETS:
        for weights, name in ('runs/mine/best.pt', 'mine'), ('a/clip.pt', 'clip'):
            options = read_options(f'--preset {preset} --wd 0.3 --init {weights} --method across'.split())
            found = [options.lr, options.wd, options.momentum, options.momentum_ramp, options.vocab, options.out]
            assert found == [1e-5, 0.3, 0.99, 0, None, f'runs/{name}-across']


def test_options_that_do_nothing_are_refused(fit, whole, tmp_path):
    """oracle: the rule: what a method or the weights of --init have no use for is refused if it is typed. Otherwise it
    is no part of config.json."""
    for method, option in (
            ('clip', '--local-crops'), ('clip-aug', '--local-captions'), ('image-distill', '--local-captions'),
            ('clip', '--momentum'), ('clip-aug', '--momentum-ramp')):
        refused(f'{option} does nothing with --method {method}; omit it',
                train.read_options, ['--method', method, option, '1'])
    for vocab, sentence in (
            ('learn', '--vocab learn does nothing with --init'),
            ('clip', '--vocab clip does nothing with --init'),
            ('file', 'last.pt carries its vocabulary; omit --vocab')):
        assert sentence in fit(tmp_path, '--init', whole / 'last.pt', '--vocab', vocab)
    assert fit(tmp_path, '--method', 'clip', '--steps', 1, '--init', whole / 'last.pt') == 0
    used = read_json(tmp_path / 'config.json')
    for name in 'local_crops', 'local_captions', 'momentum', 'momentum_ramp', 'vocab':
        assert used[name] is None


def test_what_depends_on_the_data(capsys, tmp_path):
    """oracle: arithmetic on 60 pairs. At most a tenth of a run is warm-up, and a quarter lies between evaluations. A
    batch is lowered to what pairs and parts allow; a resumed run has its own. What is typed wins."""
    def filled_in(flags, pairs=60, parts=1, batch_before=None):
        return settle(*train.read_options(flags.split()), pairs, parts, batch_before)

    for flags, *lengths in (
            ('--preset photo', 800, 80, 200),
            ('--preset photo --batch 7 --epochs 100 --eval-every 7', 800, 80, 7),
            ('--preset vit-b-16 --steps 30000', 30000, 2000, 7500),
            ('--preset vit-b-16 --epochs 0.01', 1, 0, 1)):                  # at least one step
        options = filled_in(f'--batch 4 {flags}')
        assert [options.steps, options.warmup, options.eval_every] == lengths
    for flags, parts, before, batch in (
            ('--preset tiny', 3, None, 32),                                 # check_batch refuses it
            ('--preset photo', 7, None, 56),
            ('--preset photo', 7, 20, 20),
            ('--preset photo --batch 99', 7, 20, 99)):
        assert filled_in(flags, 60, parts, before).batch == batch
    assert filled_in('--preset photo', 64).batch == 64
    assert re.findall('--batch is (.*?), because', capsys.readouterr().out) == ['56, not 64']
    refused('--data has 60 pairs, fewer than 61 .processes x --accum.', filled_in, '--preset photo', 60, 61)
    refused('--epochs: 1e308 is not a number above 0 and at most a million', filled_in, '--epochs 1e308')
    halved = [str(tmp_path)]
    for half, val in ('val', None), ('train', halved):                  # both halves make one held out
        (tmp_path / half).mkdir()
        assert choose_data({'data': halved, 'val': None}, None) == (halved, val)


@pytest.mark.parametrize('device, backend', [('cpu', 'gloo'), ('mps', 'gloo'), ('cuda', 'nccl')])
def test_what_ranks_are_started_with(monkeypatch, device, backend):
    """oracle: the rule: --device names the backend, whatever accelerator torch finds. nccl waits longer than a loader,
    whose error tells more. Numbers are added on the CPU, by the group that is patient. A rank that is refused, or whose
    rank 0 is, ends at once, because sys.exit may hang."""
    dist = Mock()
    dist.get_rank.return_value = 0
    dist.get_world_size.return_value = 2
    monkeypatch.setattr('plumbing.processes.dist', dist)
    monkeypatch.setattr(os, 'environ', {'RANK': '0', 'LOCAL_RANK': '0'})
    for name in 'cuda.is_available', 'backends.mps.is_available', 'cuda.device_count', 'cuda.set_device':
        monkeypatch.setattr(f'torch.{name}', lambda *device: 1)
    started = train.Processes(device)
    [call] = dist.init_process_group.call_args_list
    assert call.args == (backend,)
    assert call.kwargs['timeout'].total_seconds() == 1800 == 2 * LONGEST_WAIT
    dist.new_group.assert_called_with(backend='gloo', timeout=timedelta(days=7))
    assert started.sum([1, 2]) == [1, 2]
    [call] = dist.all_reduce.call_args_list
    assert call.args[0].device.type == 'cpu' and call.kwargs == {'group': dist.new_group()}
    started.rank = 1
    dist.broadcast_object_list.side_effect = RuntimeError               # rank 0 was refused
    monkeypatch.setattr(os, '_exit', sys.exit)
    with pytest.raises(SystemExit) as ended, started.rank_0_first():
        pass
    assert ended.value.code == 1
    monkeypatch.setattr('plumbing.errors.dist', dist)
    assert run(SimpleNamespace(main=partial(check_batch, 9, 8, 1))) == 1


def test_compiled_blocks_of_a_gpu_have_one_cpu_thread(monkeypatch):
    """oracle: the rule. (With more, `--compile --accum 2` ends at the first backward pass on a GPU. We tried it on a CPU,
    with a backward pass in a thread of its own.)"""
    numbers = []
    monkeypatch.setattr(torch, 'set_num_threads', numbers.append)
    tower = SimpleNamespace(transformer=SimpleNamespace(resblocks=[]))
    for is_cuda in True, False:
        parameters = iter([SimpleNamespace(is_cuda=is_cuda)])
        compile_blocks(SimpleNamespace(visual=tower, text=tower, parameters=lambda: parameters))
    assert numbers == [1]


# --- What a run leaves -----------------------------------------------------------------------------------------------

def test_log_entry_by_hand(started, tmp_path, capsys):
    """oracle: by hand. Four orthogonal embeddings have a spread of the root of 3/4. Of the teacher's, three of four are
    exchanged. Image 2 alone finds its caption, captions 0 and 2 their images. Four of six steps are left. Then all counts begin anew. A step that overflows in fp16 is not yet a broken one."""
    begun = started(tmp_path)
    begun.step = 2
    orthogonal = torch.eye(4, 6)[None]
    exchanged = orthogonal[:, [1, 2, 0, 3]]
    captions = torch.stack([orthogonal[:, 0], 3 * orthogonal[:, 0], orthogonal[:, 2], orthogonal[:, 1]], dim=1)
    out = Output(orthogonal, captions)
    step = train.StepResult(out, exchanged, 3.5, {'clip': 0.5, 'mine': 3.0}, torch.ones(()), True, 0.1, 0.9)
    progress = Progress(step, steps=3, seconds=2, waited=1, flops=4e12)
    found = log_entry(begun, progress)
    wanted = {'spread': 0.75 ** 0.5, 'accuracy': 0.25, 'cosine': 0.25, 'mine': 3,
              'pairs_per_s': 6, 'TFLOP_per_s': 6, 'waiting': 0.5}
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    print_entry(found, begun.options)
    line = 'step 2  loss 3.500  clip 0.500  accuracy 25%  lr 1.0e-01  6 pairs/s  6 TFLOP/s  0:00:02 left\n'
    assert capsys.readouterr().out.endswith(line)
    assert progress == Progress(step, flops=4e12)
    progress.count(step._replace(finite=False), scale=2, pairs=4, bad=0, signals=0)
    assert progress.broken == 0


def test_operations_of_a_step_by_hand():
    """oracle: 2 m k n for each matrix product of CLIP with one view and one caption: forward once, and backward once for
    its weights and once for its input, which the patches lack. On a CPU attention is two products, too."""
    B, P, T = 3, 16, 12
    sizes = replace(MICRO, cross_heads=0)
    model = COSMOS(sizes)
    progress = Progress()
    with progress.first_step_counted():
        cls, eot = model.visual([torch.randn(B, 3, 32, 32)]), model.text([torch.randint(1, 49, (B, T))])
        (cls[0] @ eot[0].T).sum().backward()

    def tower(rows, width, layers):
        products = 0
        for layer in range(layers):
            asked = 1 if layer == layers - 1 else rows          # the last block computes one row of each sequence
            products += (2 * rows + 2 * asked) * width ** 2     # keys and values; queries and the output
            products += 2 * asked * 4 * width ** 2              # the MLP
            products += 2 * asked * rows * width                # scores, and the sum of the values
        return products + width * sizes.embed_dim               # proj

    patches = P * 3 * 8 ** 2 * sizes.vision_width
    towers = (tower(P + 1, sizes.vision_width, sizes.vision_layers) + tower(T, sizes.text_width, sizes.text_layers))
    logits = B * B * sizes.embed_dim
    assert progress.flops == 2 * (B * (3 * towers + 2 * patches) + 3 * logits)


def test_a_term_must_not_hide_a_figure_of_the_log(monkeypatch, fit, whole, tmp_path):
    """oracle: the log: a term of one's own with the name of another figure ends the run before its first step. All
    names of the log are known, but those of terms."""
    figures = {name for line in (whole / 'log.jsonl').read_text().splitlines() for name in json.loads(line)}
    assert figures - set(ROWS['cosmos']) == LOG_NAMES - {'memory_GB'}
    for name in 'loss', 'clip', 'cosine', 'step':
        monkeypatch.setattr(train, 'METHODS', dict(train.METHODS))
        train.add_method('mine', 'clip', terms=lambda out, cls_t, eot_t, scale: {name: out.cls.mean()})
        assert f'a term is named {name}, but the log has' in fit(tmp_path, '--method', 'mine')
        assert not (tmp_path / 'last.pt').exists()


def half_of_one(names, clip_weight=1):
    weights = {'clip': clip_weight}
    for name in names:
        if name != 'clip':
            weights[name] = 0.125 if name == 'h_T_eot_t' else 0.25
    return weights


@pytest.mark.parametrize('method', train.METHODS)
def test_the_log_says_what_was_trained(monkeypatch, fit, tmp_path, method):
    """oracle: by hand: each term but L_CLIP weighs one share, and the sum of all, weighted, is the loss. With one number
    of term_weights halved, the log follows, and a guess still costs ln 4."""
    flags = ['--method', method, '--steps', 1, '--eval-every', 0]
    assert fit(tmp_path / 'plain', *flags) == 0
    monkeypatch.setattr(cosmos.term_weights, '__code__', half_of_one.__code__)
    assert fit(tmp_path / 'halved', *flags) == 0
    for out in 'plain', 'halved':
        [entry, *_] = read_log(tmp_path / out)
        clip, *added = entry['weights'].values()
        assert entry['loss'] == pytest.approx(sum(weight * entry[name] for name, weight in entry['weights'].items()))
        assert entry['chance'] == pytest.approx(math.log(4))
        if out == 'plain':
            assert [clip, sum(added)] == [1, 1 if added else 0] and len(set(added)) < 2
    if method == 'cosmos':
        assert entry['weights'] == {'clip': 1, 'h_I_cls_t': 0.25, 'h_I_eot_t': 0.25, 'h_T_cls_t': 0.25, 'h_T_eot_t': 0.125}


def test_a_run_leaves_everything(whole, dogs, tmp_path):
    """oracle: the files and the log's fields, written out; values by arithmetic; eval.py's score of the teacher."""
    [index] = [path.name for path in whole.glob('index-*.npy')]
    assert contents(whole).keys() == {'last.pt', 'best.pt', 'log.jsonl', 'config.json', index, 'eval.json', 'lock'}
    line = (whole / 'log.jsonl').read_text().splitlines()[1]
    first = json.loads(line)
    names = ('step loss clip h_I_cls_t h_I_eot_t h_T_cls_t h_T_eot_t weights chance accuracy spread lr momentum scale '
             'distill_scale grad_norm cosine pairs_per_s TFLOP_per_s waiting bad_pairs')
    assert first.keys() == set(names.split())
    assert [first['lr'], first['momentum'], first['chance']] == pytest.approx([0.0015, 1 / 11, math.log(4)])
    assert 0 < first['waiting'] < 1 < first['pairs_per_s']
    state = saved(whole)
    assert 0 < state['seconds'] < 600 and len(state['data']) == 8
    more = {name: state[name] for name in ('config', 'commit')}
    assert read_json(whole / 'config.json') == state['options'] | more
    scores = []
    for weights in 'teacher', 'student':
        path = tmp_path / weights
        run(evaluation, 'retrieval', whole / 'last.pt', '--shards', dogs, '--weights', weights, '--json', path)
        scores.append(read_json(path))
    figures = read_json(whole / 'eval.json')
    assert figures['steps'] == 6 and 0 <= figures['seconds'] < 600
    figures = figures['retrieval']
    assert figures == read_log(whole)[-1]['eval']['retrieval'] != scores[1]
    assert scores[0] == figures | {'network': 'teacher', 'checkpoint': str(whole / 'last.pt'), 'step': 6, 'method': 'cosmos'}


def test_what_is_due_and_best(monkeypatch, capsys, fit, whole, dogs, tmp_path):
    """oracle: what is due, written out: saved before it is evaluated, and nothing twice. Scripted figures say which
    step is best. best.pt has its networks, and stays when the run goes on. With other held-out shards, or other
    captions of theirs, it is kept under another name. A watcher gets what is logged, and a signal does not cut its end short."""
    write = runs.save_tensors
    happened = []
    learned = {}
    logged = []

    def noted(path, state):
        happened.append(f'{path.stem} {state["step"]}')
        write(path, state)

    def look(run, val, image_features):
        happened.append(f'score {run.step}')
        assert run.model is run.teacher.model and len(val) >= 16 and image_features == 'features'
        learned[run.step] = copy.deepcopy([run.student.state_dict(), run.teacher.model.state_dict()])
        return {'mine': run.step}

    def score(*scored, workers):
        to_text, to_image = scores.pop(0)
        return {'image_to_text_R@1': to_text, 'text_to_image_R@1': to_image}, 'features'

    monkeypatch.setattr(runs, 'save_tensors', noted)
    monkeypatch.setattr(evaluation, 'zero_shot_retrieval', score)
    watcher = runs.Watcher()
    watcher.evaluated = look
    watcher.logged = lambda run, entry: logged.append(json.dumps(entry))
    watcher.finish = lambda run: os.kill(os.getpid(), signal.SIGINT)
    shutil.copy(whole / 'log.jsonl', tmp_path)
    torch.save({'step': 0, 'score': 0.0}, tmp_path / 'best.pt')
    copied = shutil.copytree(dogs / 'val', tmp_path / 'copied')
    for flags, scores, best_step in (
            ('--steps 4 --save-every 3 --log-every 3', [(0.02, 0), (0, 0.06), (0.04, 0)], 2),
            # At step 6 the score is that of step 2, which stays.
            (f'--steps 6 --resume --save-every 9 --save-minutes 1e-9 --val {copied}', [(0.04, 0.01), (0.06, 0)], 2),
            (f'--steps 8 --resume --val {dogs}/train', [(0.02, 0.02), (0.03, 0)], 6),
            (f'--steps 10 --resume --val {dogs}/train --caption-keys caption', [(0.01, 0.01), (0, 0)], 8)):
        assert fit(tmp_path, *flags.split(), watchers=[watcher]) == 0
        best = saved(tmp_path, 'best.pt')
        assert best['step'] == best_step and best['score'] == {2: 0.03, 6: 0.02, 8: 0.01}[best_step]
        assert_close([best['student'], best['teacher']], learned[best_step], rtol=0, atol=0)
        assert read_json(tmp_path / 'eval.json')['mine'] == max(learned)
    assert [saved(tmp_path, f'best-{step}.pt')['score'] for step in (2, 6)] == [0.03, 0.02]
    line = 'eval       step 2  R@1 0.0% image to text, 6.0% text to image, mean 3.0%  best 3.0% at step 2\n'
    assert line in capsys.readouterr().out
    assert ', '.join(happened).startswith(
        'best 0, score 0, last 2, best 2, score 2, last 3, last 4, score 4, score 4, last 5, last 6, score 6')
    assert (tmp_path / 'log.jsonl').read_text().splitlines() == logged
    assert [json.loads(line)['step'] for line in logged if 'loss' in line] == [1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8, 9, 10, 10]


def test_two_jobs_in_one_folder(fit, tmp_path):
    """oracle: the refusal. After a kill the next one gets in, and removes a torn save."""
    out = tmp_path / 'out'
    torn = out / 'last.pt.0123.partial'

    def hold():
        runs.lock(out)
        put(torn)
        time.sleep(60)

    holder = get_context('fork').Process(target=hold)
    holder.start()
    while not torn.exists():
        assert holder.is_alive()
    assert 'out is in use by another run; ' in fit(out)
    assert contents(out).keys() == {'lock', torn.name}
    holder.kill()
    holder.join()
    assert fit(out, '--steps', 1) == 0
    assert not torn.exists()
    assert saved(out)['step'] == 1


# --- Going on --------------------------------------------------------------------------------------------------------

raise_a_bug = Mock(side_effect=RuntimeError('a bug'))
fill_the_gpu = Mock(side_effect=torch.OutOfMemoryError('CUDA out of memory'))


def fill_the_disk(run):
    """From here on files may not grow beyond a limit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, LIMITS[1]))


@pytest.mark.parametrize('function, at, harm, ends, kept', [
    ('train_step', 3, signal.SIGTERM, '143', 4),
    ('train_step', 5, signal.SIGUSR1, '0', 6),                          # in the last step, so the run ends as usual
    ('train_step', 0, raise_a_bug, 'RuntimeError: a bug\n', None),      # without a step there is no run to save
    ('train_step', 3, fill_the_gpu, 'error: the GPU has too little memory for this run; give --accum', 2),
    ('train_step', 3, fill_the_disk, 'last.pt cannot be written', 2),
    ('evaluate', 6, raise_a_bug, 'RuntimeError: a bug\n', 6)])
def test_resume_is_exact(monkeypatch, fit, whole, tmp_path, function, at, harm, ends, kept):
    """oracle: the undisturbed run. A signal saves the last step, and watchers finish; after an error the save before it
    stands."""
    original = getattr(train, function)
    signalled = isinstance(harm, signal.Signals)
    workers = 2 * signalled
    shutil.copy(whole / 'eval.json', tmp_path)          # from an earlier start; it is removed

    def harmed(run, *rest):
        if run.step == at:
            os.kill(os.getpid(), harm) if signalled else harm(run)
        return original(run, *rest)

    monkeypatch.setattr(train, function, harmed)
    watcher = Mock(**{'evaluated.return_value': {}})
    found = fit(tmp_path, '--workers', workers, watchers=[watcher])
    monkeypatch.undo()
    assert watcher.finish.called == signalled
    resource.setrlimit(resource.RLIMIT_FSIZE, LIMITS)
    assert ends in str(found) and runs.read_last(tmp_path, resume=True).get('step') == kept
    assert list(tmp_path.glob('*.partial')) == []
    assert fit(tmp_path, '--resume', '--workers', workers) == 0
    same_run(whole, tmp_path, whole_log=function == 'train_step')


def test_the_log_of_a_resumed_run_is_whole(monkeypatch, fit, whole, tmp_path):
    """oracle: the log of the undisturbed run. A signal comes in a step that will be evaluated, and a crash leaves a line of
    a step that is lost, and a torn one."""
    original = train.train_step

    def stopped(run, batch):
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, batch)

    monkeypatch.setattr(train, 'train_step', stopped)
    assert fit(tmp_path, '--log-every', 9) == 143
    monkeypatch.undo()
    with open(tmp_path / 'log.jsonl', 'a') as file:
        file.write('{"step": 5, "loss": 7}\n{"step": 5, "lo')
    assert fit(tmp_path, '--log-every', 9, '--resume') == 0
    assert read_log(tmp_path) == [entry for entry in read_log(whole) if entry['step'] in (0, 1, 2, 4, 6)]


def test_another_run_ends_while_this_one_starts(monkeypatch, started, whole, tmp_path):
    """oracle: the refusal, if last.pt is of another step when its weights are read than when the batches were chosen."""
    shutil.copytree(whole, tmp_path / 'out')

    def saved_meanwhile(run, step):
        torch.save(saved(tmp_path / 'out') | {'step': 5}, tmp_path / 'out/last.pt')
        restore(run, step)

    restore = runs.restore
    monkeypatch.setattr(runs, 'restore', saved_meanwhile)
    refused('is of step 5, but was of step 6 .* give the command again', started, tmp_path / 'out', '--resume')


def test_a_run_never_costs_another(monkeypatch, capsys, fit, whole, dogs, tmp_path):
    """oracle: the files of a finished run, byte for byte, after each command that must leave them alone. What must stay
    is refused with old and new values; other changes are noted. An option that older code did not have is no change."""
    out = tmp_path / 'out'
    shutil.copytree(whole, out)
    flags = '--preset tiny --method across --batch 5 --seed 1 --local-crops 3 --local-captions 4 --init none'.split()
    error = fit(out, '--resume', *flags, '--data', dog_tar(tmp_path / '0.tar', 9))
    assert re.findall('--batch was .*?,|--data were other shards', error) == ['--batch was 4,', '--data were other shards']
    assert set(re.findall('(--[a-z-]+) w', error)) == {'--data', '--vocab', *flags[::2]}      # --init has its own
    assert '--vocab was learn, is now clip' in fit(out, '--resume', '--vocab', 'clip')
    for content, sentence in (
            ((whole / 'last.pt').read_bytes()[:9000], 'it is torn, or of another kind'),
            ((whole / 'best.pt').read_bytes(), 'holds no run of this version to resume')):
        put(tmp_path / 'last.pt', content)
        assert sentence in fit(tmp_path, '--resume')
        assert (tmp_path / 'last.pt').read_bytes() == content
    monkeypatch.setattr(runs, 'commit', lambda: 'another')
    assert fit(out, '--resume', '--steps', 4, '--lr', 1) == 0
    monkeypatch.undo()
    said = capsys.readouterr().out
    assert 'nothing is left to do: step 6 of 4 is reached' in said
    assert re.findall('note +(.*)', said) == [
        f"the code may have changed: it was at {saved(whole)['commit']}, is at another",
        '--steps was 6, is now 4',
        '--lr was 0.003, is now 1.0']
    moved = shutil.copytree(dogs, tmp_path / 'moved', copy_function=shutil.copyfile)    # its files have other times
    assert fit(out, '--resume', '--data', moved) == 0
    for index in {path.name for path in out.glob('index-*.npy')} - contents(whole).keys():
        (out / index).unlink()                          # that of the moved set
    older = saved(whole)
    del older['options']['seed']
    torch.save(older, tmp_path / 'last.pt')
    assert fit(tmp_path, '--resume') == 0
    refusal = f'error: {out} holds a run; give --resume to go on from its last.pt, or another --out'
    assert fit(out, '--steps', 2) == refusal
    assert contents(out) == contents(whole)


def test_a_broken_held_out_image_ends_the_start(fit, tmp_path):
    """oracle: the rule. The first evaluation, before any step, names the image. The folder can be used again."""
    broken = dog_tar(tmp_path / 'val.tar', 4, broken=[2])
    out = tmp_path / 'out'
    assert 'val.tar:2.png' in fit(out, '--val', broken)
    assert not (out / 'last.pt').exists()
    assert fit(out, '--steps', 1) == 0


def test_init(fit, started, tmp_path, capsys):
    """oracle: the weights of the file; cross-attention, which it lacks, is that of a fresh model. A note says that
    text crops repeat the only sentence of these pairs."""
    note = 'one sentence (60 of the first 60), so text crops only repeat it; give longer captions, or --method clip'
    assert fit(tmp_path / 'clip', '--method', 'clip') == 0
    assert note not in capsys.readouterr().out          # clip takes one caption
    assert 'momentum' not in read_log(tmp_path / 'clip')[0]             # and has no teacher
    path = tmp_path / 'clip/last.pt'
    begun = started(tmp_path / 'begun', '--init', path, '--batch', 60)  # all pairs
    runs.begin(begun, None, [])
    said = capsys.readouterr().out
    assert f'--init is the student of {path}, step 6 of --method clip' in said
    assert note in said and 'on 1 x cpu in torch.float32\n' in said
    weights = evaluation.load(path)[0].state_dict()
    torch.manual_seed(0)
    expected = COSMOS(begun.train_set.config).state_dict() | weights
    for found in begun.student, begun.teacher.model:
        assert_close(found.state_dict(), expected, rtol=0, atol=0)
    assert begun.train_set.config.cross_heads == 4      # because its width is below 256
    assert fit(tmp_path / 'out', '--init', path, '--steps', 2) == 0
    error = fit(tmp_path / 'out', '--init', tmp_path / 'clip/best.pt', '--steps', 4, '--resume')
    assert re.search('--init was .*last.pt, is now .*best.pt', error)      # whose weights would not be used


def test_overflows_in_half_precision(started, tmp_path):
    """oracle: by hand: a step that overflows halves the scale and counts, but changes neither network. The first one
    that does not overflow has the gradient norm of float32."""
    begun = started(tmp_path, '--precision', 'fp16')
    begun.scaler = torch.amp.GradScaler('cpu', 2.0 ** 18)
    begun.teacher.model.logit_scale.data.zero_()        # an update would move it
    networks = begun.student.state_dict(), begun.teacher.model.state_dict()
    before = copy.deepcopy(networks)
    batch = next(begun.batches)
    done = train.train_step(begun, batch)
    while not done.finite:
        assert begun.scaler.get_scale() == 2 ** (18 - begun.step)
        assert_close(networks, before, rtol=0, atol=0)
        done = train.train_step(begun, batch)
    assert begun.step > 1
    plain = started(tmp_path)
    plain.step = begun.step - 1
    expected = train.train_step(plain, batch)
    assert done.norm.item() == pytest.approx(expected.norm.item(), rel=0.01)
    lengths = [next(run.batches).texts[-1].shape[1] for run in (begun, plain)]
    assert lengths == [8, 5]            # start, dog, two digits, end; half precision is faster with a multiple of 8
    assert begun.optimizer.state[begun.student.logit_scale]['step'] == 1
    assert begun.teacher.model.logit_scale > 0


def test_bad_pairs_stop_a_run_beyond_5_percent(fit, tmp_path):
    """oracle: how many pairs were broken on purpose, and the limits by hand."""
    shards = dog_tar(tmp_path / 'a.tar', 120, broken=range(100, 120))
    said = fit(tmp_path, '--data', shards, '--steps', 25)
    bad, read = re.search(r'over 5 % of the pairs cannot be read \((\d+) of (\d+)\)', said).groups()
    assert int(read) - int(bad) == 4 * saved(tmp_path)['step'] < 100    # what was learnt is not lost
    for bad, seen, stops in (10, 20, False), (11, 20, True), (52, 1000, False), (53, 1000, True):     # of 1,052 and 1,053
        assert bool(Progress(bad=bad, seen=seen).reason_to_fail(0, tmp_path)) == stops
    assert '(24 of 44)' in Progress(bad=24, seen=20).reason_to_fail(0, tmp_path)        # each bad one was replaced


def test_broken_steps_are_skipped_or_stop_a_run(monkeypatch, capsys, fit, started, tmp_path):
    """oracle: chosen steps, whose losses are made NaN, or so large that the norm is infinite. A few are skipped with a
    line each; five stop the run, and do not replace what was saved before. In fp16 they only lower the scale, which is
    saved and restored. A typed --wd wins over the checkpoint's."""
    loss = cosmos.clip_loss

    def spoilt(*arguments):
        return loss(*arguments) * (factor if next(numbers) in steps else 1)

    monkeypatch.setattr(cosmos, 'clip_loss', spoilt)
    stopped = 'error: the gradients of 5 steps in a row, .* step 7.* not saved, .*last.pt, if any, is as it was .* --clip-grad 1'
    for steps, factor, norm, precision, status, last, taken in (
            ([1, 2, 3, 4, 6], 1e30, 'inf', 'fp32', 0, 9, 4), ([3, 4, 5, 6, 7], math.nan, 'nan', 'fp32', stopped, 2, 2),
            ([3, 4, 5, 6, 7], math.nan, 'nan', 'fp16', 0, 9, 4)):
        numbers = itertools.count(1)
        out = tmp_path / f'{precision}-{last}'
        assert re.match(str(status), str(fit(out, '--steps', 9, '--eval-every', 0, '--precision', precision)))
        skipped = re.findall(f'step (.+) was skipped, because the norm of its gradient is {norm}', capsys.readouterr().out)
        assert skipped == list(map(str, steps))
        state = saved(out)
        assert state['step'] == last
        assert state['optimizer']['state'][0]['step'] == taken
    resumed = started(out, '--resume', '--precision', 'fp16', '--wd', 0.3, '--steps', 10)
    assert resumed.scaler.state_dict() == state['scaler'] and resumed.scaler.get_scale() == 1024 / 2 ** 5
    assert [group['weight_decay'] for group in resumed.optimizer.param_groups] == [0.3, 0]
    assert state['seconds'] < time.perf_counter() - resumed.begun < 600     # time goes on
