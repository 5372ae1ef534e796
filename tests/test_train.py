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
import sys
import time
from multiprocessing import active_children, current_process, get_context, set_forkserver_preload
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import cosmos
import data
import eval as evaluation
import train
from cosmos import COSMOS, Output, Teacher, clip_loss, cosmos_loss
from data import Batch
from tests.helpers import close, dog_tar, micro, refused, run

QUICK = ('--preset micro --vocab learn --precision fp32 --device cpu --batch 4 --steps 6 --save-every 2 --warmup 2 '
         '--lr 0.1 --momentum 0.9 --momentum-ramp 10 --log-every 1 --eval-every 2 --workers 0 '
         '--augment full').split()
AUTO = ['--resume', 'auto']
ALONE = train.Processes('cpu')

# --- Helpers ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def dogs(tmp_path_factory):
    """A folder of two halves: 60 training and 16 held-out pairs, each image of a colour of its own."""
    root = tmp_path_factory.mktemp('dogs')
    for half, pairs in ('train', 60), ('val', 16):
        (root / half).mkdir()
        dog_tar(root / half / '0.tar', pairs)
    return root


@pytest.fixture(scope='session')
def fit(dogs):
    """fit(out, *flags): train.py for seconds -> its exit status, or its error."""
    def fit(out, *flags):
        return run(train, '--data', dogs, *QUICK, '--out', out, *flags)

    return fit


@pytest.fixture(scope='session')
def whole(fit, tmp_path_factory):
    """--out of a run of six steps that nothing disturbed."""
    out = tmp_path_factory.mktemp('fresh') / 'runs/whole'
    assert fit(out) == 0
    return out


def saved(out):
    return torch.load(out / 'last.pt', weights_only=True)


def read_log(out):
    """The entries, of equal steps the last."""
    entries = {}
    for line in (out / 'log.jsonl').read_text().splitlines():
        entry = json.loads(line)
        entries[entry['step']] = entry
    return list(entries.values())


def same_run(a, b):
    """Two --out folders hold bit-equal networks and optimizers, and logs that differ in times only."""
    runs = []
    for out in a, b:
        log = read_log(out)
        for entry in log:
            for name in 'pairs_per_s', 'waiting', 'memory_GB':
                entry.pop(name, None)
            entry.get('eval', {}).pop('seconds', None)
        state = saved(out)
        assert len(log) == state['step'] + 1            # and what the first weights can do
        runs.append([state['student'], state['teacher'], state['optimizer']['state'], state['best'], log])
    assert_close(*runs, rtol=0, atol=0)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def started(fit, *flags):
    """The Run that these flags make, as it stands before its first step."""
    runs = []

    def stop(run, val, caught):
        runs.append(run)
        sys.exit('before')

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'train', stop)
        assert fit(*flags) == 'before'
    return runs[0]


# --- One step --------------------------------------------------------------------------------------------------------

ROWS = {  # global and local images, global and local captions of a row of Table 5; its crop; its terms
    'clip': [1, 0, 1, 0, 0.9],
    'clip-aug': [2, 0, 1, 0, 0.4],
    'image-distill': [2, 6, 1, 0, 0.4, 'cls_cls_t'],
    'text-crop': [2, 6, 2, 6, 0.4, 'cls_cls_t'],
    'text-distill': [2, 6, 2, 6, 0.4, 'cls_cls_t', 'eot_eot_t'],
    'cosmos': [2, 6, 2, 6, 0.4, 'h_I_cls_t', 'h_I_eot_t', 'h_T_cls_t', 'h_T_eot_t']}


@pytest.mark.parametrize('method', ROWS)
def test_views_and_losses_of_each_row(fit, tmp_path, method):
    """oracle: the table, written out. clip alone has no colours where the recipe has them."""
    begun = started(fit, tmp_path, '--method', method, '--local-crops', 6, '--local-captions', 6)
    terms = ROWS[method][5:]
    assert [*begun.train_set.counts, begun.train_set.crop_min, *terms] == ROWS[method]
    assert (begun.teacher is not None) == bool(terms)
    options, *_ = train.read_options(['--data', 'x', '--method', method])
    assert options.augment == ('crops' if method == 'clip' else 'full')
    _, images, texts = micro()
    assert step_of(begun.student, images, texts, method).parts.keys() == {'clip', *terms}


def step_of(model, images, texts, method='cosmos', accum=1, processes=ALONE, clip_grad=0, teacher=None):
    """train_step on this batch, with a plain gradient descent of rate 0.5, and a teacher that becomes the student."""
    teacher = teacher or Teacher(COSMOS(model.config))
    student = train.InParts(model, accum)
    if processes.world > 1:
        student = DistributedDataParallel(student)
    options = SimpleNamespace(method=method, clip_grad=clip_grad, seed=0, lr=1, warmup=2, momentum=0, momentum_ramp=0)
    state = train.Run(
        options, processes, None, model, student, teacher, torch.optim.SGD(model.parameters()),
        torch.amp.GradScaler('cpu', enabled=False), dtype=None, make_order=None)
    batch = Batch(None, None, texts, texts[:2], 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, 'views', lambda batch, seed: images)
        return train.train_step(state, batch)


def test_a_step_by_hand():
    """oracle: clip_loss + cosmos_loss, and gradient descent by hand, of a gradient that is clipped to a norm of 0.1.
    The teacher sees two images of 32 pixels and two captions, no more, and follows."""
    model, images, texts = micro()
    before = copy.deepcopy(model)
    teacher = Teacher(COSMOS(model.config))
    targets = teacher(images[:2], texts[:2])
    done = step_of(model, images, texts, clip_grad=0.1, teacher=teacher)
    out = before(images, texts)
    loss = clip_loss(out, before.logit_scale.exp()) + cosmos_loss(out, *targets, before.distill_logit_scale.exp())
    loss.backward()
    norm = math.hypot(*[p.grad.norm() for p in before.parameters()])
    assert [done.loss.item(), done.norm.item()] == pytest.approx([loss.item(), norm])
    for after, p in zip(model.parameters(), before.parameters()):
        close(after, p - 0.5 * 0.1 / norm * p.grad)
    assert_close(teacher.model.state_dict(), model.state_dict())


OBJECTIVES = 'cosmos', 'text-distill', 'image-distill', 'clip'


def gradients(processes, method, accum):
    """Of this process's share of one batch of 8 -> {parameter: gradient}, and the mean loss of all processes."""
    model, images, texts = micro(method, B=8)
    if method in ('image-distill', 'clip'):
        texts = texts[:1]
    model.visual.transformer.grad_checkpointing = accum > 1
    images, texts = ([x.chunk(processes.world)[processes.rank] for x in xs] for xs in (images, texts))
    loss = step_of(model, images, texts, method, accum, processes).loss
    [total] = processes.sum([loss])
    return {name: p.grad for name, p in model.named_parameters()}, total / processes.world


def one_rank(rank, port, path, flags):
    """One of two processes: saves its gradients, and runs train.py with `flags`."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    processes = train.Processes('cpu')
    assert (sys.stdout.name == os.devnull) == (rank > 0)                # rank 0 speaks for all
    for method in OBJECTIVES:
        for accum in 1, 2:
            torch.save(gradients(processes, method, accum), path / f'{rank}-{method}-{accum}')
    train.Processes = {'auto': processes, 'cpu': processes}.get
    run(train, *flags)
    processes.leave(0)


@pytest.fixture(scope='session')
def by_ranks(tmp_path_factory):
    """A folder with what `one_rank` leaves: gradients, the run 'two' of two processes; and the run 'one' of one."""
    path = tmp_path_factory.mktemp('ranks')
    shards = dog_tar(path / 'dogs.tar', 80, broken=[3, 40])
    flags = ['--data', shards, *QUICK, '--steps', 20, '--lr', 1e-3, '--out']
    set_forkserver_preload([__name__])                  # imported once, not in each process
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    start_processes(one_rank, (port, path, [*flags, path / 'two']), nprocs=2, start_method='forkserver')
    assert run(train, *flags, path / 'one') == 0
    return path


@pytest.mark.parametrize('method', OBJECTIVES)
def test_ranks_and_accumulation_equal_one_process(by_ranks, method):
    """oracle: one process with the whole batch: same loss, same gradient in every parameter and scale, with --accum 2
    (and --grad-checkpoint), with two processes, and with both. None of them is all zero: it would never learn."""
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


def test_two_processes_log_the_same(by_ranks):
    """oracle: the single process with the same batches. Broken pairs are summed over the processes."""
    one = read_log(by_ranks / 'one')
    two = read_log(by_ranks / 'two')
    assert len(one) == len(two) == 20 and one[-1]['bad_pairs'] == 2
    for a, b in zip(one, two):
        for key in 'loss', 'h_T_eot_t', 'grad_norm', 'scale', 'cosine', 'bad_pairs':
            assert a[key] == pytest.approx(b[key], rel=2e-4), key


def test_schedules_and_decay():
    """oracle: closed forms at the corners of warm-up, cosine and ramp; the rule that matrices decay, but not
    LayerNorms, biases, the class token and the scales."""
    options, *_ = train.read_options(
        '--data x --steps 110 --warmup 10 --lr 1 --momentum 0.9 --momentum-ramp 3'.split())     # its lr_end is 0
    rates = [train.lr_at(step, options) for step in (0, 9, 60, 110)]
    assert rates == pytest.approx([0.1, 1.0, 0.5, 0])
    options.lr_end = 0.2
    assert [train.lr_at(step, options) for step in (60, 110)] == pytest.approx([0.6, 0.2])
    assert [train.momentum_at(step, options) for step in (0, 2, 99)] == [0.25, 0.5, 0.9]
    model, _, _ = micro()
    decay, free = train.make_optimizer(model, 1e-3, 0.3).param_groups
    assert (decay['weight_decay'], free['weight_decay']) == (0.3, 0)
    free = set(map(id, free['params']))
    for name, p in model.named_parameters():
        assert (id(p) in free) == bool(re.search('bias|ln_|norm|scale|class_embedding', name)), name


# --- Whole runs ------------------------------------------------------------------------------------------------------

def test_log_entry_by_hand(fit, tmp_path):
    """oracle: by hand. Orthogonal embeddings spread by 1. Two of four exchanged: half an accuracy, half a cosine. A
    part of the loss is logged under its name."""
    begun = started(fit, tmp_path)
    exchanged = torch.eye(4)[None, [1, 0, 2, 3]]
    out = Output(torch.eye(4)[None], exchanged, None, None)
    parts = {'clip': (1, 2.0), 'mine': (0.5, 3.0)}
    done = train.Step(out, exchanged, 3.5, parts, 0, True)
    found = train.log_entry(begun, done, steps=3, seconds=2, waited=1)
    wanted = {'spread': 1, 'accuracy': 0.5, 'cosine': 0.5, 'distill': 1.5, 'mine': 3, 'pairs_per_s': 6, 'waiting': 0.5}
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)


def test_a_run_leaves_everything(whole, dogs, tmp_path):
    """oracle: the list of design: files, log fields; values by arithmetic; the step with the best mean of both R@1;
    eval.py's score of the checkpoint."""
    assert {'last.pt', 'best.pt', 'config.json', 'index.npy', 'eval.json', 'report.html'} <= contents(whole).keys()
    entries = read_log(whole)
    first = entries[1]
    names = ('step epoch loss clip distill h_I_cls_t h_I_eot_t h_T_cls_t h_T_eot_t weights chance accuracy spread lr '
             'momentum scale distill_scale grad_norm cosine pairs_per_s waiting memory_GB bad_pairs')
    assert first.keys() == set(names.split())
    found = [first[name] for name in ('epoch', 'lr', 'momentum', 'chance')]
    assert found == pytest.approx([4 / 60, 0.05, 1 / 11, math.log(4)])
    assert 0 < first['waiting'] < 1
    means = {}
    for entry in entries[::2]:
        figures = entry['eval']['retrieval']
        means[entry['step']] = figures['image_to_text_R@1'] + figures['text_to_image_R@1']
    assert torch.load(whole / 'best.pt', weights_only=True)['step'] == max(means, key=means.get)  # of equals the first
    again = tmp_path / 'again.json'
    command = ['retrieval', whole / 'last.pt', '--shards', dogs, '--json', again]
    assert run(evaluation, *command) is None
    figures = json.loads((whole / 'eval.json').read_text())
    assert figures == entry['eval'] and figures['retrieval'] == json.loads(again.read_text())


def test_lengths_of_runs():
    """oracle: arithmetic on 60 pairs and 16 held-out ones: 15 batches of four a pass. Of steps and passes the fewer
    count, unless one alone was typed. At most a tenth of a run is warm-up; a quarter lies between evaluations."""
    for flags, *lengths in (
            ('--preset tiny', 450, 45, 113),             # 30 passes
            ('--preset tiny --steps 700', 700, 70, 175),
            ('--preset tiny --epochs 100 --eval-every 7', 1500, 100, 7),
            ('--steps 30000 --epochs 3000', 30000, 2000, 7500),
            ('--steps 700 --epochs 2', 30, 3, 8),
            ('--epochs 0.01', 1, 0, 1),                  # a step at least
            ('', 480, 48, 120)):
        options, *_ = train.read_options(['--data', 'x', '--val', 'y', '--batch', '4', *flags.split()])
        train.choose_lengths(options, 60)
        assert [options.steps, options.warmup, options.eval_every] == lengths


def test_resume_is_exact(monkeypatch, fit, whole, tmp_path):
    """oracle: the run that was not interrupted, read by the main process: weights, optimizer, teacher and log. SIGTERM
    goes to the loader's workers, too, as torchrun and Slurm send it."""
    step = train.train_step
    stopped = []

    def interrupted(run, batch):
        if run.step == 3 and not stopped:
            stopped.append(True)
            for process in [*active_children(), current_process()]:
                os.kill(process.pid, signal.SIGTERM)
        return step(run, batch)

    monkeypatch.setattr(train, 'train_step', interrupted)
    assert fit(tmp_path, '--workers', 2) == 143 and saved(tmp_path)['step'] == 4
    assert fit(tmp_path, *AUTO, '--workers', 2) == 0
    same_run(whole, tmp_path)


def in_a_process(arguments):
    run(train, *arguments)


def test_a_kill_in_mid_run(fit, whole, tmp_path, dogs):
    """oracle: the run that nobody killed, bit by bit. Its last save was torn, too."""
    flags = ['--save-every', '1', *AUTO]
    out = tmp_path / 'killed'
    log = out / 'log.jsonl'
    arguments = ['--data', dogs, *QUICK, *flags, '--workers', '1', '--out', out]
    child = get_context('forkserver').Process(target=in_a_process, args=[arguments])
    child.start()
    while not log.exists() or log.read_text().count('\n') < 3:
        assert child.is_alive()
        time.sleep(0.002)
    child.kill()
    child.join()
    (out / 'last.pt.partial').touch()                                   # as of a kill within a save
    assert fit(out, *flags) == 0
    same_run(whole, out)


def test_full_disks(tmp_path):
    """oracle: the file before, where files may not grow beyond a limit."""
    path = tmp_path / 'new/run/last.pt'
    data.save_tensors(path, 'before')
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    refused('last.pt cannot be written', data.save_tensors, path, torch.zeros(10_000))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert torch.load(path) == 'before' and len(list(path.parent.iterdir())) == 1


def test_a_run_never_costs_another(monkeypatch, capsys, fit, whole, dogs, tmp_path):
    """oracle: the files of a finished run, byte by byte, after each command that must leave them alone. A fresh start
    takes the first free name. Figures that are absent are made again."""
    out = tmp_path / 'out'
    shutil.copytree(whole, out)
    other = dog_tar(tmp_path / '0.tar', 9)
    assert 'started on other shards' in fit(out, *AUTO, '--data', other)
    assert 'started with --method cosmos, not clip' in fit(out, *AUTO, '--method', 'clip')
    assert 'name the captions with --caption-keys' in fit(out, *AUTO, '--caption-keys', 'title')
    with monkeypatch.context() as patch:
        patch.setattr(train, 'GLOBALS', 9)
        assert f'trained with GLOBALS = {cosmos.GLOBALS}, not 9' in fit(out, *AUTO)
    capsys.readouterr()
    assert fit(out, '--resume', out, '--steps', 4, '--vocab', 'clip') == 0      # nothing is left to do
    assert re.findall('note +(.*)', capsys.readouterr().out) == [
        '--vocab is ignored: the checkpoint has weights and vocabulary', '--steps was 6, is now 4']
    for number in 2, 3:
        assert fit(out, '--steps', number) == 0
        assert saved(tmp_path / f'out-{number}')['step'] == number
        assert f'out holds a run, this one goes into {out}-{number}' in capsys.readouterr().out
    assert contents(out) == contents(whole)
    (out / 'eval.json').unlink()
    assert fit(out, '--resume', out) == 0
    figures = [json.loads((folder / 'eval.json').read_text())['retrieval'] for folder in (out, whole)]
    assert figures[0] == figures[1]


def test_init(fit, whole, tmp_path):
    """oracle: the weights in the file before the first step; a fresh model's cross-attention. A resumed run goes on."""
    assert fit(tmp_path / 'clip', '--method', 'clip') == 0
    path = tmp_path / 'clip/last.pt'
    begun = started(fit, tmp_path / 'begun', '--init', path, '--batch', 60)     # all pairs
    weights = evaluation.load(path)[0].state_dict()
    torch.manual_seed(0)
    expected = COSMOS(begun.train_set.config).state_dict() | weights
    for found in begun.student, begun.teacher.model:
        assert_close(found.state_dict(), expected, rtol=0, atol=0)
    shutil.copytree(whole, tmp_path / 'on')
    assert started(fit, tmp_path / 'on', '--init', path, *AUTO, '--steps', 7).step == 6


def test_half_precision_with_a_scaler(fit, whole, tmp_path):
    """oracle: the float32 run: the loss of its first step. The scaler's state is saved and read again, and --wd goes
    before the checkpoint's."""
    assert fit(tmp_path, '--steps', 3, '--precision', 'fp16') == 0
    assert read_log(tmp_path)[1]['loss'] == pytest.approx(read_log(whole)[1]['loss'], rel=0.01)
    resumed = started(fit, tmp_path, *AUTO, '--precision', 'fp16', '--wd', 0.3, '--steps', 4)
    assert resumed.scaler.state_dict() == saved(tmp_path)['scaler'] and resumed.scaler.get_scale() > 1
    assert [group['weight_decay'] for group in resumed.optimizer.param_groups] == [0.3, 0]


def test_bad_pairs_stop_a_run_beyond_5_percent(fit, tmp_path):
    """oracle: the number of pairs that were broken on purpose; the limits by hand."""
    shards = dog_tar(tmp_path / 'a.tar', 120, broken=range(100, 120))
    assert 'over 5 % of the pairs cannot be read' in fit(tmp_path, '--data', shards, '--steps', 25)
    assert 0 < saved(tmp_path)['step'] < 25             # what was learnt is not lost
    for bad, seen, stops in (10, 20, False), (11, 20, True), (50, 1000, False), (51, 1000, True):
        assert bool(train.reason_to_stop(None, 0, bad, seen)) == stops


def test_broken_steps_are_skipped_or_stop_a_run(monkeypatch, fit, tmp_path):
    """oracle: losses made NaN in chosen steps, few in a row skipped without a trace, more not. --save-every is 2."""
    loss = cosmos.clip_loss
    save = train.save
    saves = []

    def noted(run):
        saves.append(run.step)
        save(run)

    def spoilt(*arguments):
        return loss(*arguments) * (math.nan if next(numbers) in steps else 1)

    monkeypatch.setattr(train, 'save', noted)
    monkeypatch.setattr(cosmos, 'clip_loss', spoilt)
    stopped = 'error: 5 steps in a row .* step 7.* --clip-grad 1$'      # a run in fp32 is not told to take fp32
    for steps, status, last in ([1, 3, 4, 5, 6], 0, 9), ([3, 4, 5, 6, 7], stopped, 7):
        numbers = itertools.count(1)
        out = tmp_path / str(last)
        assert re.match(str(status), str(fit(out, '--steps', 9)))
        state = saved(out)
        assert state['step'] == last
        assert state['optimizer']['state'][0]['step'] == last - 5
        assert state['student']['visual.proj'].isfinite().all()
    assert saves == [2, 4, 6, 8, 9, 9] + [2, 4, 6, 7]
