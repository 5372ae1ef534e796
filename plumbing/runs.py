"""A run's folder: its name, last.pt and best.pt, log.jsonl, and how a stopped run is resumed.

No random state is saved, because every random number is a function of the seed and of either the step or the epoch and
the pair.
"""
import fcntl
import json
import os
import socket
import subprocess
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from plumbing.errors import Refused, Unreadable, need, warn
from plumbing.files import save_tensors, write_json
from plumbing.weights import load_weights, read_checkpoint

# --- 1. The folder ---------------------------------------------------------------------------------------------------

def holds_run(folder):
    """Whether a folder has a last.pt, or a best.pt whose last.pt was removed. A best.pt of step 0 does not count: the
    evaluation before the first step writes one, but last.pt is not saved at step 0. So a best.pt of step 0 alone was
    left by a start that ended before its first checkpoint."""
    if Path(folder, 'last.pt').exists():
        return True
    best = Path(folder, 'best.pt')
    if not best.exists():
        return False
    try:
        return read_checkpoint(best)['step'] > 0
    except Refused:                     # broken, but still not ours to remove
        return True


def free_name(out):
    """The first free name of NAME, NAME-2, ..., because a fresh start never touches a folder that holds a run."""
    out = str(Path(out))                # without a slash at the end
    folder = out
    number = 2
    while holds_run(folder):
        folder = f'{out}-{number}'
        number += 1
    if folder != out:
        print(f'note       {out} holds a run, so this one goes into {folder}; to go on with the old one, give --resume')
    return folder


LOCKS = []      # open files; closing one would free its lock


def lock(folder):
    """Locks the folder; Refused while another process has a run in it. The system frees the lock when the process ends,
    even by SIGKILL, and workers do not inherit it. Partial files, which a kill in the middle of a save leaves, are
    removed."""
    path = Path(folder, 'lock')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, 'a+')
    except OSError as error:
        raise Refused(f'{path} cannot be written ({error}); give another --out') from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise Refused(f'{folder} is in use by {file.read()}; wait until it has ended, or give another --out') from None
    except OSError as error:
        warn(f'{path}: this file system has no locks ({error}), so do not start a second job in this folder')
        return
    LOCKS.append(file)
    file.truncate(0)
    job = os.environ.get('SLURM_JOB_ID', 'none')
    file.write(f'process {os.getpid()} on {socket.gethostname()}, Slurm job {job}')
    file.flush()
    for torn in path.parent.glob('*.partial'):
        torn.unlink()


def print_notes(shards, val, captions):
    """Before the first step, print what a user should know about the data. captions: how many are taken from a pair."""
    sample = range(min(100, len(shards)))
    single = 0
    for i in sample:
        with suppress(Unreadable):
            single += len(shards.pool(i)) == 1
    if captions > 1 and single > len(sample) / 2:
        print(f'note       most pairs have one sentence ({single} of the first {len(sample)}), so text crops repeat '
              'it; see docs/own-data.md')
    if val is None:
        print('note       nothing is held out, so overfitting cannot be seen; '
              'python -m extras.prepare pack --val 0.1 holds a tenth out')
        return
    in_both = set(map(os.path.realpath, shards.paths)) & set(map(os.path.realpath, val.paths))
    if in_both:
        warn(f'{len(in_both)} shards are in --data and in --val')


def begin(folder, options, config, goes_on):
    """Write config.json, and remove an old eval.json. If an earlier start in this folder ended before its first
    checkpoint, its log, its best.pt and its maps for the report are removed, too."""
    old = ['eval.json']
    if not goes_on:
        old += ['log.jsonl', 'maps.npz', 'best.pt']
    for name in old:
        Path(folder, name).unlink(missing_ok=True)
    write_json(Path(folder, 'config.json'), vars(options) | {'config': asdict(config), 'commit': commit()})


def print_progress(entry, steps, batch):
    """Print the numbers to watch from a log entry. steps: those of the whole run."""
    seconds_left = (steps - entry['step']) * batch / entry['pairs_per_s']
    line = ('step {step}  loss {loss:.3f}  clip {clip:.3f}  accuracy {accuracy:.0%}  lr {lr:.1e}  '
            '{pairs_per_s:.0f} pairs/s'.format(**entry))
    tqdm.write(f'{line}  {timedelta(seconds=int(seconds_left))} left')


def write_log(folder, entry):
    """Append an entry to log.jsonl. A resumed run logs some steps again; the last entry of a step counts."""
    with open(Path(folder, 'log.jsonl'), 'a') as file:
        file.write(json.dumps(entry) + '\n')


@lru_cache                              # asked once, because files may change during a run
def commit():
    """The commit of the code, with '-dirty' if files have changed since; '' if git cannot say."""
    command = ['git', 'describe', '--always', '--dirty', '--exclude=*']  # no tags, only the commit
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:                     # no git
        return ''
    return done.stdout.strip()


# --- 2. Checkpoints --------------------------------------------------------------------------------------------------

def networks(student, teacher, config, merges, step):
    """What evaluation needs, as best.pt and last.pt both hold it. teacher may be None."""
    state = {
        'config': asdict(config),
        'merges': merges,
        'step': step,
        'commit': commit(),
        'student': student.state_dict()}
    if teacher:
        state['teacher'] = teacher.model.state_dict()
    return state


def save(folder, state, optimizer, scaler, options, same, seconds):
    """Write last.pt, whole or not at all. state: see `networks`. same: see `check_same`. seconds: how long the run has
    taken.

    To save something else, add it here and in `restore`. Step and time are restored in train.set_up.
    """
    save_tensors(Path(folder, 'last.pt'), state | {
        'optimizer': optimizer.state_dict(),
        'scaler': scaler.state_dict(),
        'options': vars(options),
        'same': same,
        'seconds': seconds})


@contextmanager
def saved_on_error(student, write):
    """After an error in this block, write() is called if the weights are finite. Then the error is raised again. Only
    rank 0 writes; on GPUs an error of another rank ends the run unsaved, so last.pt is the previous checkpoint."""
    try:
        yield
    except Exception:
        if all(weights.isfinite().all() for weights in student.parameters()):
            try:
                write()
            except Refused as error:    # such as a full disk; the first error matters more
                warn(error)
        raise


def save_best(folder, state, score, val):
    """Write best.pt. val: the fingerprint of the held-out shards."""
    save_tensors(Path(folder, 'best.pt'), state | {'score': score, 'val': val})


def best_so_far(folder, val):
    """(score, step) of best.pt; (-1, 0) if there is none, or if it was scored on other held-out shards."""
    path = Path(folder, 'best.pt')
    if path.exists():
        best = read_checkpoint(path)
        if best['val'] == val:
            return best['score'], best['step']
    return -1.0, 0


# --- 3. Resuming -----------------------------------------------------------------------------------------------------

def read_last(folder):
    """The content of last.pt; {} if there is no run. Refused if a run's last.pt is gone."""
    path = Path(folder, 'last.pt')
    if not path.exists():
        need(not holds_run(folder), f'{path} is missing, so this run cannot go on; to start another one from its best '
             f"weights give --init {Path(folder, 'best.pt')}, without --resume")
        return {}
    saved = read_checkpoint(path)
    need('same' in saved, f'{path} holds no run to resume; to start from its weights give --init')
    return saved


def check_same(saved, options, same):
    """Refused if something has changed that must stay the same when a run is resumed. same: {its name: its value now},
    see train.identity.

    Other options may differ. They are taken from this command, typed or by default, except those that the checkpoint
    settles. A line is printed for each option that differs. The code may differ, too, and a line says so.
    """
    before = saved['same']
    differs = [what for what in same if before.get(what) != same[what]]
    was = ', '.join(f'{what} {before.get(what)}' for what in differs)
    now = ', '.join(f'{what} {same[what]}' for what in differs)
    need(not differs, f'{options.out} was started with {was}, not {now}; give the same to resume it, or another --out, '
         'or start anew from its weights with --init')
    if saved['commit'] != commit() or commit().endswith('-dirty'):
        print(f"note       the code may have changed: it was at {saved['commit']}, is at {commit()}")
    for name, new in vars(options).items():
        old = saved['options'].get(name, new)  # the code that saved it may not have had this option
        flag = '--' + name.replace('_', '-')
        if new == old or name in ('out', 'resume') or flag in same:
            continue
        note = f'was {old}, is now {new}'
        if name in ('init', 'vocab', 'quick_gelu'):
            note = 'is ignored, because the checkpoint has weights and vocabulary'
        print(f'note       {flag} {note}')


def restore(saved, student, teacher, optimizer, scaler, path):
    """Put what `save` has saved back into networks, optimizer and scaler."""
    load_weights(student, saved['student'], path)
    if teacher:
        load_weights(teacher.model, saved['teacher'], path)
    decays = [group['weight_decay'] for group in optimizer.param_groups]
    optimizer.load_state_dict(saved['optimizer'])
    for group, decay in zip(optimizer.param_groups, decays):
        group['weight_decay'] = decay                   # this command's, not the checkpoint's
    if saved['scaler']:
        scaler.load_state_dict(saved['scaler'])
