"""train.py: every claim with its oracle. Each docstring says what the result is compared with."""
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import cosmos
import data
import eval as evaluation
import train
from cosmos import COSMOS, Config, Output, Teacher, symmetric_nce
from lesson.scenes import make_scenes

HERE = Path(__file__).parent
cosmos.PRESETS['micro'] = Config.preset(
    'tiny', embed_dim=16, image_size=32, local_image_size=16, vision_width=24, text_width=16, context_length=12,
    vocab_size=50)
QUICK = ('--preset micro --vocab learn --precision fp32 --device cpu --batch 4 --steps 6 --save-every 2 --warmup 30 '
         '--lr 1e-3 --momentum 0.99 --momentum-ramp 10 --log-every 1 --workers 0').split()
AUTO = ['--resume', 'auto']
SCALER = torch.amp.GradScaler('cpu', enabled=False)


def close(a, b, tolerance=1e-5):
    """Relative distance of the whole tensors."""
    assert a.shape == b.shape
    distance = ((a - b).norm() / b.norm().clamp_min(1e-12)).item()
    assert distance <= tolerance, f'relative distance {distance:.2e}, allowed {tolerance}'


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


def dogs(path, n, broken=()):
    """A tar of n pairs, i.jpg and the i.txt of 'dog i'; some images broken -> path."""
    file = io.BytesIO()
    Image.new('RGB', (40, 30), (200, 30, 60)).save(file, 'JPEG')
    members = []
    for i in range(n):
        members.append((f'{i}.jpg', b'no image' if i in broken else file.getvalue()))
        members.append((f'{i}.txt', f'dog {i}'.encode()))
    data.write_shard(path, members)
    return path


@pytest.fixture(scope='session')
def scenes(tmp_path_factory):
    """A small built-in set, drawn by this process: 60 training and 16 held-out scenes."""
    root = tmp_path_factory.mktemp('scenes')
    make_scenes(root, train=60, val=16, seed=1, workers=1)
    return root


def run(module, *argv):
    """A command in this process -> what its SystemExit carries, or None."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['prog', *map(str, argv)])
        try:
            data.cli(module.main)
        except SystemExit as stop:
            return stop.code


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
    states = []
    logs = []
    for out in a, b:
        state = saved(out)
        states.append([state['student'], state.get('teacher', {}), state['optimizer']['state']])
        logs.append(read_log(out))
        for entry in logs[-1]:
            for name in 'pairs_per_s', 'waiting', 'memory_GB', 'seconds', 'eval':
                entry.pop(name, None)
    assert_close(*states, rtol=0, atol=0)
    assert logs[0] == logs[1]
    assert len(logs[0]) == state['step'] + 1            # the final figures are a line, too


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

ROWS = {        # global and local images, global and local captions that a row of Table 5 sees; its terms
    'clip': [1, 0, 1, 0], 'clip-aug': [2, 0, 1, 0],
    'image-distill': [2, 6, 1, 0, 'II'],
    'text-crop': [2, 6, 2, 6, 'II'],
    'text-distill': [2, 6, 2, 6, 'II', 'TT'],
    'cosmos': [2, 6, 2, 6, 'iI', 'iT', 'tI', 'tT']}


@pytest.mark.parametrize('method', ROWS)
def test_views_and_losses_of_each_row(fit, tmp_path, method):
    """oracle: the table, written out, with I, T for [cls], [eot] and i, t for h_I, h_T."""
    terms = ROWS[method][4:]
    views = started(fit, tmp_path, '--method', method).views
    counts = [views.global_images, views.local_images, views.global_texts, views.local_texts]
    assert counts + terms == ROWS[method]
    torch.manual_seed(0)
    out = Output(*cosmos.unit(torch.randn(4, 3, 5, 16)))
    student = dict(zip('ITit', out))
    targets = cosmos.unit(torch.randn(2, 2, 5, 16))
    teacher = dict(zip('IT', targets))
    wanted = []
    for s, t in terms:
        wanted.append(symmetric_nce(student[s], teacher[t], student[s], teacher[t], 1 / 0.07))
    given = (targets[0], targets[1] if len(terms) > 1 else None)
    model, _, _ = micro(method)
    loss = train.losses(model, train.METHODS[method], out, given)
    wanted = torch.stack(wanted or [torch.tensor(0.0)])
    close(loss.terms, wanted)
    close(loss.total, cosmos.clip_loss(out, 1 / 0.07) + wanted.mean())


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
        student = DistributedDataParallel(student)
    state = SimpleNamespace(
        model=model, student=student, device=processes.device, dtype=None, method=train.METHODS[method],
        teacher=Teacher(COSMOS(model.config)), optimizer=torch.optim.SGD(model.parameters()), scaler=SCALER)
    loss = train.forward_backward(state, batch)[2]
    [total] = processes.sum([loss.total])
    return {name: p.grad for name, p in model.named_parameters()}, total / world


def one_rank(rank, world, port, path, flags):
    """One of `world` processes: saves its gradients; of two processes, train.py with `flags`, too."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    processes = train.Processes('cpu')
    for method in OBJECTIVES:
        for accum in 1, 2:
            torch.save(gradients(processes, method, accum), path / f'{world}-{rank}-{method}-{accum}')
    if world == 2:
        train.Processes = lambda device: processes
        run(train, *flags)
    train.leave(0)


@pytest.fixture(scope='session')
def by_ranks(tmp_path_factory):
    """A folder with what `one_rank` leaves: gradients, the run 'two' of two processes; and the run 'one' of one."""
    path = tmp_path_factory.mktemp('ranks')
    shards = dogs(path / 'dogs.tar', 80, broken=[3, 40])
    flags = ['--data', shards, *QUICK, '--steps', 20, '--out']
    for world in 2, 4:
        with socket.create_server(('127.0.0.1', 0)) as server:
            port = server.getsockname()[1]
        torch.multiprocessing.spawn(one_rank, (world, port, path, [*flags, path / 'two']), nprocs=world)
    assert run(train, *flags, path / 'one') == 0
    return path


@pytest.mark.parametrize('method', OBJECTIVES)
def test_ranks_and_accumulation_equal_one_process(by_ranks, method):
    """oracle: one process with the whole batch: same loss, same gradient in every parameter and scale, with --accum 2
    (and --grad-checkpoint), with 2 and 4 processes, and with both."""
    alone = train.Processes('cpu')
    expected, total = gradients(alone, method, 1)
    found = [gradients(alone, method, 2)]
    for path in by_ranks.glob(f'?-?-{method}-?'):
        found.append(torch.load(path))
    assert len(found) == 13
    for grads, loss in found:
        assert loss == pytest.approx(total, rel=1e-6)
        for name in expected:
            close(grads[name], expected[name])


def test_two_processes_log_the_same(by_ranks):
    """oracle: the single process with the same batches. Broken pairs are summed over the processes."""
    one = read_log(by_ranks / 'one')
    two = read_log(by_ranks / 'two')
    assert len(one) == len(two) == 21 and one[19]['bad_pairs'] == 2
    for a, b in zip(one[:20], two):
        assert a.keys() == b.keys()
        for key in 'step', 'loss', 'clip', 'distill', 'h_T_eot', 'grad_norm', 'scale', 'cosine', 'bad_pairs':
            assert a[key] == pytest.approx(b[key], rel=2e-4), key


def test_schedules_and_decay():
    """oracle: closed forms at the corners of warm-up, cosine and ramp; the paper's settings; the rule that matrices
    decay, but not LayerNorms, biases, the class token and the scales."""
    typed = train.parse_command_line('--steps 110 --warmup 10 --lr 1 --momentum 0.9 --momentum-ramp 3'.split())
    options = train.combine_options(typed, {}, 'vit-b-16')
    assert [train.lr_at(step, options) for step in (0, 9, 60, 110)] == pytest.approx([0.1, 1.0, 0.5, 0])
    options.lr_end = 0.2
    assert [train.lr_at(step, options) for step in (60, 110)] == pytest.approx([0.6, 0.2])
    assert [train.momentum_at(step, options) for step in (0, 2, 99)] == [0.25, 0.5, 0.9]
    options.momentum_ramp = 0
    assert train.momentum_at(0, options) == 0.9
    paper = {'batch': 1024, 'lr': 5e-4, 'wd': 0.5, 'warmup': 2000, 'epochs': 32, 'momentum': 0.999,
             'momentum_ramp': 0, 'lr_end': 0, 'clip_grad': 0}
    assert paper.items() <= vars(train.combine_options({}, {}, 'vit-b-16')).items()
    model, _, _ = micro()
    decay, free = train.make_optimizer(model, 1e-3, 0.3).param_groups
    assert (decay['weight_decay'], free['weight_decay'], decay['betas']) == (0.3, 0, (0.9, 0.98))
    free = set(map(id, free['params']))
    for name, p in model.named_parameters():
        assert (id(p) in free) == bool(re.search('bias|ln_.*weight|scale|class_embedding', name)), name


@pytest.mark.parametrize('most, share', [(0, 1), (2, 0.4), (9, 1)])
def test_gradients_are_clipped_by_their_norm(most, share):
    """oracle: plain gradient descent by hand, of a gradient of norm 5: clipped to 2, to 9, and not at all."""
    model = torch.nn.Linear(5, 5, bias=False)
    model.clamp_scales = dict                           # it has none
    before = model.weight.detach().clone()
    model.weight.grad = torch.ones(5, 5)
    options = train.Options(clip_grad=most, warmup=0, lr=0.5, lr_end=1.0, steps=9)
    optimizer = torch.optim.SGD(model.parameters())
    state = SimpleNamespace(options=options, optimizer=optimizer, model=model, step=0, teacher=None, scaler=SCALER)
    train.update(state, torch.tensor(5.0))
    close(model.weight.detach(), before - 0.5 * share)


# --- train.py: whole runs --------------------------------------------------------------------------------------------

def test_a_run_leaves_everything(whole, scenes, tmp_path):
    """oracle: the list of design: files, log fields; values by arithmetic; eval.py's score of the checkpoint."""
    assert {'last.pt', 'previous.pt', 'config.json', 'samples.png', 'attention.png'} <= contents(whole).keys()
    first, *_, final = entries = read_log(whole)
    names = ('step epoch loss clip distill h_I_cls h_I_eot h_T_cls h_T_eot chance accuracy spread lr momentum scale '
             'distill_scale grad_norm cosine pairs_per_s waiting memory_GB bad_pairs')
    assert first.keys() == set(names.split())
    assert first['loss'] == pytest.approx(first['clip'] + first['distill'], rel=1e-5)
    found = [first[name] for name in ('epoch', 'lr', 'momentum', 'scale', 'chance', 'cosine')]
    assert found == pytest.approx([4 / 60, 1e-3 / 30, 1 / 11, 1 / 0.07, math.log(4), 1], rel=2e-3)
    assert [entry['step'] for entry in entries if 'eval' in entry] == [5, 6]
    figures = json.loads((whole / 'eval.json').read_text())
    assert figures == {'steps': 6, 'seconds': final['seconds'], **final['eval']}
    assert figures['dominant'].keys() == figures['small'].keys() == {'top1', 'chance', 'bound', 'objects'}
    again = tmp_path / 'again.json'
    assert run(evaluation, 'retrieval', whole / 'last.pt', '--shards', scenes / 'val', '--json', again) is None
    assert figures['retrieval'].items() <= json.loads(again.read_text()).items()


def test_it_learns(fit, scenes, tmp_path):
    """oracle: guessing, ln 8, where both losses start: 150 steps on 60 pairs take each below three quarters of it; in
    retrieval of these pairs chance is 1/6."""
    flags = '--steps 150 --batch 8 --lr 3e-3 --augment crops --save-every 150 --val'.split()
    assert fit(tmp_path, *flags, scenes / 'train') == 0
    *entries, final = read_log(tmp_path)
    for name in 'clip', 'distill':
        losses = [entry[name] for entry in entries]
        assert sum(losses[-10:]) / 10 < 0.75 * math.log(8) < 1.2 * sum(losses[:3]) / 3
    assert final['eval']['retrieval']['image_to_text_R@10'] > 0.5


@pytest.mark.parametrize('method, workers', [('cosmos', 0), ('cosmos', 2), ('clip', 0)])
def test_resume_is_exact(monkeypatch, fit, whole, tmp_path, method, workers):
    """oracle: the run that was not interrupted, read by the main process: weights, optimizer, teacher and log. SIGTERM
    goes to the loader's workers, too, as torchrun and Slurm send it."""
    flags = ['--method', method, '--workers', workers]
    if method != 'cosmos':
        whole = tmp_path / 'whole'
        assert fit(whole, *flags) == 0
    step = train.forward_backward

    def interrupted(run, batch):
        if run.step == 3 and not run.checkpoint:
            for pid in [os.getpid(), *(worker.pid for worker in active_children())]:
                os.kill(pid, signal.SIGTERM)
        return step(run, batch)

    monkeypatch.setattr(train, 'forward_backward', interrupted)
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
        for fresh in [], AUTO:
            assert 'another run is at work in' in fit(out, *fresh)
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        (out / 'last.pt.1.partial').touch()                             # as of a kill within a save
    assert fit(out, *flags) == 0
    same_run(tmp_path / 'whole', out)
    assert not list(out.glob('*.partial'))


def test_torn_checkpoints_and_full_disks(fit, whole, tmp_path, capsys):
    """oracle: the run without mishap: a torn last.pt falls back to previous.pt, torn lines of the log are written again,
    and a disk that is full (files may not grow beyond a limit) leaves the old checkpoint."""
    out = tmp_path / 'out'
    shutil.copytree(whole, out)
    last = out / 'last.pt'
    complete = last.read_bytes()
    last.write_bytes(complete[:10_000])
    with open(out / 'log.jsonl', 'a') as file:
        file.write('{"step": 3, "lo')
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(complete) // 2, hard))
    error = fit(out, *AUTO)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert re.fullmatch('error: .*last.pt could not be saved .*', error)
    printed = capsys.readouterr().out
    assert 'WARNING' in printed and 'steps 4 to 6' in printed
    assert not list(out.glob('*.partial'))
    assert fit(out, *AUTO) == 0
    same_run(whole, out)
    for name in 'last.pt', 'previous.pt':
        (out / name).write_text('torn')
    assert 'previous.pt is no checkpoint' in fit(out, *AUTO)


def test_a_run_never_costs_another(fit, whole, scenes, tmp_path, capsys):
    """oracle: the files of a finished run, byte by byte, after each command that must leave them alone."""
    out = tmp_path / 'out'
    shutil.copytree(whole, out)
    inside = dogs(out / 'dogs.tar', 9)
    before = contents(out)
    for words, *flags in (
            ('does not exist', '--data', 'scenez'),
            ('lies in', '--data', inside),
            ('lies in', '--val', inside),
            ('lies in', '--init', out / 'last.pt'),
            ('started on other shards', *AUTO, '--data', inside),
            ('started on other shards', *AUTO, '--data', f'{scenes}/train::{inside}'),
            ('started with --method cosmos, not clip', *AUTO, '--method', 'clip'),
            ('0', *AUTO, '--steps', 4)):
        assert words in str(fit(out, *flags)), flags
        assert contents(out) == before, flags
    notes = re.findall('note.*: (.*)|(nothing is left)', capsys.readouterr().out)
    assert notes[-2:] == [('steps 6 -> 4', ''), ('', 'nothing is left')]
    (out / 'eval.json').unlink()
    assert fit(out, *AUTO, '--steps', 4) == 0
    assert (out / 'eval.json').exists() and (out / 'last.pt').read_bytes() == before['last.pt']
    moved = contents(out)
    for number in 1, 2:                                                 # a fresh start moves the old run aside
        assert fit(out, '--steps', number, '--val', scenes / 'train') == 0
        assert saved(out)['step'] == number
        assert contents(tmp_path / f'out-{number}') == moved
        moved = contents(out)
    assert capsys.readouterr().out.count('1 shards are in --data and in --val') == 2


def test_init(fit, whole, tmp_path):
    """oracle: the weights in the file, and their features, before the first step; a fresh model's heads."""
    def equal(a, b):
        assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)

    assert fit(tmp_path / 'clip', '--method', 'clip') == 0
    model, tokenizer, _ = evaluation.load(whole / 'last.pt')
    exported = tmp_path / 'open_clip.pt'
    evaluation.export(model, tokenizer, exported)
    for path in whole / 'last.pt', tmp_path / 'clip/last.pt', exported:
        begun = started(fit, tmp_path / 'begun', '--init', path)
        assert begun.step == 0
        equal(begun.model, begun.teacher.model)
        model, _, _ = evaluation.load(path)
        _, images, _ = micro()
        close(begun.model.encode_image(images[0])[0], model.encode_image(images[0])[0])
        torch.manual_seed(0)
        heads = model if model.has_heads else COSMOS(begun.config)
        for part in 'image_tokens', 'text_tokens', 'image_cross', 'text_cross':
            equal(getattr(begun.model, part), getattr(heads, part))
        for part in 'visual', 'text':
            equal(getattr(begun.model, part), getattr(model, part))
    state = saved(whole)
    state['teacher']['visual.proj'] = torch.zeros(3, 3)
    torch.save(state, tmp_path / 'wrong.pt')
    error = fit(tmp_path / 'wrong', '--init', tmp_path / 'wrong.pt')
    assert re.fullmatch('error: .*wrong.pt does not fit this model.*visual.proj.*', error)
    assert not (tmp_path / 'wrong').exists()
    shutil.copytree(whole, tmp_path / 'on')
    assert started(fit, tmp_path / 'on', '--init', exported, *AUTO, '--steps', 7).step == 6


def test_half_precision_with_a_scaler(fit, whole, tmp_path):
    """oracle: the float32 run: the loss of its first step. The scaler's state is saved and read again, and --wd goes
    before the checkpoint's."""
    for name in 'bf16', 'fp16':
        out = tmp_path / name
        assert fit(out, '--steps', 3, '--precision', name) == 0
        assert read_log(out)[0]['loss'] == pytest.approx(read_log(whole)[0]['loss'], rel=0.01)
    scale = saved(out)['scaler']['scale']
    assert fit(out, '--steps', 4, '--precision', 'fp16', '--wd', 0.3, *AUTO) == 0
    assert saved(out)['scaler']['scale'] == scale > 1
    assert [group['weight_decay'] for group in saved(out)['optimizer']['param_groups']] == [0.3, 0.0]


@pytest.mark.parametrize('bad', [5, 20])
def test_bad_pairs_stop_a_run_beyond_5_percent(fit, tmp_path, bad):
    """oracle: the number of pairs of 120 that were broken on purpose; a hundred of them are seen."""
    shards = dogs(tmp_path / 'a.tar', 120, broken=range(bad))
    status = fit(tmp_path / 'out', '--data', shards, '--steps', 25)
    assert status == 0 if bad == 5 else 'over 5 % of the pairs cannot be read' in status
    assert 0 < saved(tmp_path / 'out')['step'] <= 25                    # what was learnt is not lost


def test_broken_steps_are_skipped_or_stop_a_run(monkeypatch, fit, tmp_path):
    """oracle: gradients made NaN in chosen steps, few in a row skipped without a trace, more not."""
    step = train.forward_backward
    broken = {2, 3, 5}

    def forward_backward(run, batch):
        out, teacher, loss, norm = step(run, batch)
        if run.step in broken:
            norm = norm * math.nan
            run.model.visual.proj.grad.fill_(math.nan)
        return out, teacher, loss, norm

    monkeypatch.setattr(train, 'forward_backward', forward_backward)
    out = tmp_path / 'few'
    flags = ['--steps', 8, '--max-skipped', 2]
    assert fit(out, *flags) == 0
    state = saved(out)
    assert {int(moments['step']) for moments in state['optimizer']['state'].values()} == {5}
    assert [entry['step'] for entry in read_log(out)] == [1, 2, 5, 7, 8, 8]
    assert state['student']['visual.proj'].isfinite().all()
    broken.add(4)
    error = fit(tmp_path / 'many', *flags)
    assert re.fullmatch('error: step 5 has the loss .* the last of 3 such steps.*', error)
    state = saved(tmp_path / 'many')
    assert state['step'] == 4 and state['student']['visual.proj'].isfinite().all()


def test_a_failed_evaluation_ends_no_run(monkeypatch, fit, whole, tmp_path, capsys):
    """oracle: the run whose evaluations went well: the same weights."""
    def fail(*arguments):
        raise RuntimeError('out of luck')

    monkeypatch.setattr(evaluation, 'evaluate', fail)
    assert fit(tmp_path, '--eval-every', 5) == 0
    assert capsys.readouterr().out.count('not evaluated to the end: RuntimeError, out of luck') == 2
    same_run(whole, tmp_path)


WRONG = {       # flags, and what their sentence must name
    '--stepz 3': ["'--stepz'", 'did you mean --steps?'],
    '--batch 1': ['--batch', '1 is out of range', '2'],
    '--steps many': ['--steps', "'many'"],
    '--method clap': ['--method', "'clap'", 'clip-aug'],
    '--batch 64': ['--batch 64', '20 pairs', 'lower'],
    '--accum 3': ['--batch 4', 'multiple of 3'],
    '--resume none.pt': ['none.pt', 'does not exist'],
    '--resume other.pt': ['other.pt', 'no run to resume', '--init'],
    '--init other.pt': ['other.pt', 'weights'],
    '--aligned-crops': ["'objects'", '--aligned-crops']}


def test_errors_are_one_sentence(monkeypatch, tmp_path, fit, capsys):
    """oracle: the rule: one line, with the value, the place and the remedy; --help has groups and defaults."""
    monkeypatch.chdir(tmp_path)
    shards = dogs(tmp_path / 'plain/0.tar', 20)
    torch.save({'weights': torch.zeros(1)}, 'other.pt')
    for line, parts in WRONG.items():
        status = fit('out', '--data', shards, *line.split())
        error = capsys.readouterr().err if status == 1 else status
        for part in ['error: ', *parts]:
            assert part in error
        assert len(error.splitlines()) == 1
    assert run(train, '--help') == 0
    text = re.sub(r'\s+', ' ', capsys.readouterr().out)
    for part in [*train.GROUPS.values(), '(default: all)', "'momentum': 0.999", "'lr': 0.001", 'row of Table 5']:
        assert part in text


def test_without_lesson_and_extras(scenes, whole, tmp_path):
    """oracle: the exit status of training and of evaluation, where the four files are alone."""
    for name in 'cosmos', 'data', 'eval', 'train':
        shutil.copy(HERE / f'{name}.py', tmp_path)
    flags = f'--data {scenes} --init {whole}/last.pt --out out --preset tiny --steps 2 --batch 4 --workers 0'
    for command in f'train.py {flags}', f'eval.py retrieval out/last.pt --shards {scenes}/val':
        done = subprocess.run([sys.executable, *command.split()], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and 'R@1' in done.stdout, done.stderr
