"""A run's folder: how a run begins and ends in it, its checkpoints, its log, and how a stopped run is resumed. No
random state is saved, because every random number is a function of the seed and of either the step or the epoch and the
pair. `run` is a train.Run."""
import json
import os
import subprocess
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm

from cosmos import GLOBALS
from plumbing.errors import Refused, Unreadable, need, note, warn
from plumbing.files import drop_lost_lines, save_tensors, write_json
from plumbing.weights import BEST, LAST, TENSORS, load_weights, networks, read_checkpoint

# --- 1. The folder, and what a user should know about the data -------------------------------------------------------

def lock(folder):
    """Lock the folder; Refused while another process has a run in it. The system frees the lock when the process ends,
    even by SIGKILL. Partial files, which a kill in the middle of a save leaves, are removed, but not those of other
    programs, which may be writing a report here."""
    path = Path(folder, 'lock')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A mere number, which stays open. A file object would be closed at the end of this function, and free the lock.
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    except OSError as error:
        raise Refused(f'{path} cannot be written ({error}); give another --out') from None
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise Refused(f'{folder} is in use by another run; wait until it has ended, or give another --out') from None
    except (OSError, ImportError) as error:             # ImportError: Windows has no fcntl
        warn(f'{path}: no locks here ({error}), so do not start a second job in this folder')
        return
    for name in LAST, BEST, 'index-*.npy':
        for torn in path.parent.glob(f'{name}.*partial'):
            torn.unlink()


def print_notes(shards, val, captions):
    """captions: how many are taken from a pair."""
    looked_at = min(100, len(shards))
    single = 0
    for i in range(looked_at):
        with suppress(Unreadable):
            single += len(shards.pool(i)) == 1
    if captions > 1 and single > looked_at / 2:
        note(f'most pairs have one sentence ({single} of the first {looked_at}), so text crops only repeat it; '
             'give longer captions, or --method clip, which takes less time; see docs/data.md')
    if val is None:
        note('nothing is held out, so overfitting cannot be seen; '
             'python -m extras.prepare pack --val 0.1 holds a tenth out')
        return
    in_both = set(map(os.path.realpath, shards.paths)) & set(map(os.path.realpath, val.paths))
    if in_both:
        warn(f'{len(in_both)} shards are in --data and in --val')


def write_config(run):
    """Write config.json, and remove an old eval.json and what a start left that ended before its first checkpoint."""
    old = ['eval.json']
    if run.step == 0:
        old += ['log.jsonl', BEST]
    for name in old:
        Path(run.folder, name).unlink(missing_ok=True)
    drop_lost_lines(run.folder / 'log.jsonl', run.step)
    more = {'config': asdict(run.train_set.config), 'commit': commit()}
    write_json(run.folder / 'config.json', vars(run.options) | more)


def write_log(run, entry, watchers):
    """Rank 0 appends an entry to log.jsonl. The last entry of a step counts: an evaluation adds its figures in another
    one, and a resumed run logs some steps again."""
    if run.processes.rank == 0:
        with open(run.folder / 'log.jsonl', 'a') as file:
            file.write(json.dumps(entry) + '\n')
        for watcher in watchers:
            watcher.logged(run, entry)


@lru_cache                              # asked once, because files may change during a run
def commit():
    """The commit of the code, with '-dirty' if files have changed since; '' if git cannot say."""
    command = ['git', 'describe', '--always', '--dirty', '--exclude=*']  # no tags, only the commit
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:                     # no git
        return ''
    return answer.stdout.strip()


# --- 2. How a run begins and ends ------------------------------------------------------------------------------------

class Watcher:
    """What accompanies a run, such as a report. Rank 0 calls these methods, which do nothing unless a subclass says so.
    train.py's own watchers stand at its foot; a program hands others to train.main."""

    def begin(self, run):
        """Before the first step of this process."""

    def logged(self, run, entry):
        """After each line of log.jsonl. entry: its content."""

    def evaluated(self, run, val, image_features):
        """After each evaluation on held-out shards -> more figures for eval.json."""
        return {}

    def finish(self, run):
        """After the last step, or after the one in which a signal came."""


def begin(run, val, watchers):
    """If the run is complete, end here: `leave` does not return. Otherwise rank 0 says what the run will do, and writes
    config.json."""
    options = run.options
    # A run that has taken all its steps but has no eval.json was stopped in its last evaluation, which is due again.
    has_figures = run.processes.broadcast((run.folder / 'eval.json').exists())
    if run.step >= options.steps and has_figures:
        print(f'nothing is left to do: step {run.step} of {options.steps} is reached')
        run.processes.leave(0)
    if run.processes.rank > 0:
        return
    shards = run.train_set.shards
    size = sum(p.numel() for p in run.student.parameters())
    print(f'run        {options.method}, {size:,} parameters, into {run.folder}')
    print(f'           steps {run.step} to {options.steps}, each with {options.batch} of {len(shards):,} pairs')
    print(f'           on {run.processes.world} x {run.processes.device.type} in {run.dtype or torch.float32}')
    counts = run.train_set.counts
    print_notes(shards, val, counts.global_texts + counts.local_texts)
    write_config(run)
    for watcher in watchers:
        watcher.begin(run)


def finish(run, watchers):
    """Let the watchers finish, and say what to do next."""
    if run.processes.rank > 0:
        return
    for watcher in watchers:
        watcher.finish(run)
    if run.step < run.options.steps:
        print(f'stopped    step {run.saved_step} is saved; to go on, give the same command with --resume '
              f'--out {run.folder}')
        return
    shards = (run.options.val or run.options.data)[0]
    print(f'done       {run.folder}; try python eval.py retrieval {run.folder} --shards {shards}')


@contextmanager
def memory_needed():
    """If the GPU's memory does not suffice in this block, the error says what a user can do."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise Refused('the GPU has too little memory for this run; give --accum with more parts, '
                      'or in a new run a smaller --batch; '
                      '--resume goes on from the last save') from None


# --- 3. Saving -------------------------------------------------------------------------------------------------------

def is_overdue(run):
    """Is the last save older than --save-minutes? 0 means no limit."""
    minutes = (time.perf_counter() - run.saved_at) / 60
    return 0 < run.options.save_minutes < minutes


def save(run):
    """Rank 0 writes last.pt if any step has been taken since the last save. To save something else, add it here and in
    `restore`."""
    if run.processes.rank == 0 and run.step > run.saved_step:
        save_tensors(run.folder / LAST, networks(run, commit()) | {
            'optimizer': run.optimizer.state_dict(),
            'scaler': run.scaler.state_dict(),
            'options': vars(run.options),
            'globals': GLOBALS,
            'data': run.train_set.shards.fingerprint[:8],
            'seconds': time.perf_counter() - run.begun})
    run.saved_step = run.step
    run.saved_at = time.perf_counter()


def keep_best(run, scores, val):
    """Write best.pt if the mean R@1 on the held-out shards is the best so far. scores: those of retrieval."""
    to_text = scores['image_to_text_R@1']
    to_image = scores['text_to_image_R@1']
    mean = (to_text + to_image) / 2
    path = run.folder / BEST
    best = read_checkpoint(path, mmap=True) if path.exists() else {}
    scored = f'{val.fingerprint} {val.caption_keys}'
    if best and best.get('val') != scored:
        older = path.with_stem(f"best-{best['step']}")
        path.rename(older)
        note(f'{older} was the best on other held-out shards, or on other captions of theirs; {BEST} begins anew')
        best = {}
    if not best or mean > best['score']:
        best = networks(run, commit()) | {'score': mean, 'val': scored}
        save_tensors(path, best)
    tqdm.write(f'eval       step {run.step}  R@1 {to_text:.1%} image to text, {to_image:.1%} text to '
               f"image, mean {mean:.1%}  best {best['score']:.1%} at step {best['step']}")


# --- 4. Resuming -----------------------------------------------------------------------------------------------------

def read_last(folder, resume):
    """What last.pt of a run to resume holds, but for its tensors; {} for a new run, which must not go into the folder
    of another. If the folder has only a best.pt of step 0 that train.py wrote, an earlier start ended before its first
    checkpoint, so it is used as it is."""
    last = Path(folder, LAST)
    best = Path(folder, BEST)
    start_anew = f'give another --out, and --init {best} to start from its weights'
    if not last.exists():
        if best.exists():
            state = read_checkpoint(best, mmap=True)
            # Only train.py's have a score. Another one may be somebody's own, and this run would write over it.
            left_over = 'score' in state and state['step'] == 0
            need(left_over, f'{folder} holds a best.pt but no last.pt; {start_anew}')
        return {}
    need(resume, f'{folder} holds a run; give --resume to go on from its last.pt, or another --out')
    # The loaders are forked after this, and keep for the whole run what was read before. So nothing but plain values is
    # read here; `restore` reads the tensors.
    remedy = start_anew if best.exists() else 'remove it to start anew'
    saved = read_checkpoint(last, remedy, mmap=True)
    for name in TENSORS:
        saved.pop(name, None)
    need('data' in saved, f'{last} holds no run of this version to resume; to start from its weights give --init')
    return saved


# These must be those of the checkpoint. The last three are used by a first start only, so config.json would name what was
# not used.
FIXED = 'preset', 'method', 'batch', 'seed', 'local_crops', 'local_captions', 'init', 'vocab', 'quick_gelu'
NOT_COMPARED = 'out', 'resume'


def check_resumed(saved, options, shards):
    """Refused if what must stay the same has changed: the options in FIXED, the data, and GLOBALS, in case somebody
    edits it. Other options may differ, and so may the code; a line says what does."""
    changed = {}
    for name, new in vars(options).items():
        old = saved['options'].get(name, new)           # the code that saved it may not have had this option
        if old != new and name not in NOT_COMPARED:
            changed[name] = f"--{name.replace('_', '-')} was {old}, is now {new}"
    wrong = [changed.pop(name) for name in FIXED if name in changed]
    if saved['data'] != shards.fingerprint[:8]:
        wrong.append('--data were other shards')
    if saved['globals'] != GLOBALS:
        wrong.append(f"GLOBALS was {saved['globals']}, is now {GLOBALS}")
    need(not wrong, f"{options.out} cannot be resumed so: {', '.join(wrong)}; give the same to resume it, or another "
         '--out, or start anew from its weights with --init')
    if saved['commit'] != commit() or commit().endswith('-dirty'):
        note(f"the code may have changed: it was at {saved['commit']}, is at {commit()}")
    for line in changed.values():
        note(line)


def restore(run, step):
    """Put what `save` has saved back into the run, whose batches begin after this step."""
    path = run.folder / LAST
    remedy = f'it is damaged; --init {run.folder / BEST} starts another run from those weights, if they are there'
    saved = read_checkpoint(path, remedy)
    need(saved['step'] == step, f'{path} is of step {saved["step"]}, but was of step {step} when this started: another '
         'run has just ended in its folder; give the command again')
    load_weights(run.student, saved['student'], path)
    if run.teacher:
        load_weights(run.teacher.model, saved['teacher'], path)
    settings = run.optimizer.state_dict()['param_groups']       # this command's --wd, not the checkpoint's
    run.optimizer.load_state_dict(saved['optimizer'] | {'param_groups': settings})
    if saved['scaler']:
        run.scaler.load_state_dict(saved['scaler'])
    run.step = run.saved_step = saved['step']
    run.begun -= saved['seconds']
