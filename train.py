"""Train COSMOS on a CPU, one GPU or several. A run that stops can be resumed.

    python train.py                                             the built-in set on a laptop, in minutes
    torchrun --nproc_per_node=8 train.py --data /shards         vit-b-16, the paper's recipe, on eight GPUs
    torchrun --nproc_per_node=2 train.py --out runs/two         two processes, which need no GPU
    python train.py --data /shards --accum 8                    on one GPU that holds only an eighth of a batch
    python train.py --init CKPT --data /shards                  COSMOS, starting from an existing CLIP

The default of --preset is tiny for the built-in set; with --data it is vit-b-16 on a GPU, photo elsewhere. To continue
a run that stopped, give the same command with --resume. A run leaves in --out: last.pt (the checkpoint),
log.jsonl, config.json, eval.json, index-*.npy (where the pairs are in the shards) and lock (it keeps other runs out).
With held-out shards it also leaves best.pt (the networks with the best mean R@1 on --val); with extras/ also
report.html (the run as a page) and maps.jsonl (for that page).

Read the file from the top: one step, which is the method; the loop around it; and the presets and the rows of Table 5,
from which a run is chosen. lesson/onepage.py trains the same way on one page, without options, checkpoints or several
GPUs. You can skip what comes from plumbing/: `training_options` (the command line), `choose_inputs` and `make_run`
(setup.py: how options, data and model become a Run), `Processes` (the ranks: their device, sums and broadcasts over
them, how they end), `part_by_part` (--accum), `runs` (the folder of a run: checkpoints, log, resuming) and `Progress`
(what is counted for the log).
"""
import os

if __name__ == '__main__':
    # OpenMP: let idle threads sleep, not spin. The variable must be set before torch is imported.
    os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from signal import SIGTERM
from typing import NamedTuple

import torch
from tqdm import tqdm

import data
import eval as evaluation
from cosmos import COSMOS, GLOBALS, Config, Output, Teacher, cosmos_terms, gather, match, total_loss
from plumbing import runs
from plumbing.errors import command, need
from plumbing.files import write_json
from plumbing.options import training_options
from plumbing.parts import part_by_part
from plumbing.processes import Processes, signals_caught
from plumbing.progress import LOG_NAMES, Progress, log_entry, print_entry
from plumbing.setup import choose_inputs, make_run

# --- 1. One step -----------------------------------------------------------------------------------------------------

@dataclass
class Run:
    """What a step needs and changes, and what the loop records about the run."""
    options: Namespace              # all that --help lists
    method: 'Method'                # the row of METHODS, in part 4, that --method names
    processes: Processes
    train_set: data.TrainingSet     # has the model's Config and the tokenizer, too
    student: COSMOS
    # What train_step calls: the student, wrapped for --accum and, on several ranks, in DDP.
    student_to_call: torch.nn.Module
    teacher: Teacher                # None if the method has none
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler    # for fp16; otherwise it does nothing
    dtype: torch.dtype              # autocast's; None: float32
    batches: Iterator = None        # one for each step that is left
    step: int = 0                   # steps taken
    saved_step: int = 0             # the step of last.pt
    saved_at: float = field(default_factory=time.perf_counter)
    # When the run began; after --resume, now minus the seconds that it had already run.
    begun: float = field(default_factory=time.perf_counter)

    @property
    def folder(self):
        return Path(self.options.out)

    @property
    def model(self):
        """The network that is evaluated: the teacher's if there is one."""
        return self.teacher.model if self.teacher else self.student


class StepResult(NamedTuple):
    """What a step has used and computed, for the log."""
    out: Output                 # the student's vectors
    # The teacher's, (2, B, D), or (V, B, D) if it sees local views, too. None without a teacher.
    cls_t: torch.Tensor
    loss: torch.Tensor
    terms: dict                 # {name: term}: L_CLIP, and those that the method adds to it
    norm: torch.Tensor          # the norm of the gradient
    finite: bool                # is the norm finite? if not, the update was skipped
    lr: float
    momentum: float             # None without a teacher


def train_step(run, batch):
    """One training step -> StepResult: teacher, student, loss, backward, optimizer, scales, moving average."""
    options = run.options
    method = run.method
    student = run.student
    momentum = momentum_at(run.step, options) if method.has_teacher else None
    lr = lr_at(run.step, options)
    for group in run.optimizer.param_groups:
        group['lr'] = lr
    # V tensors (B, 3, s, s). The loader has cropped; the changes of colour, and the blur, are made here, on the device.
    images = batch.views(options.seed, run.step)

    # The teacher sees the globals, without gradient; the student sees all views and captions. teacher_texts are the
    # same global captions, all cut; the student's caption 0 is whole if C^T reads it. The teacher runs first, while the
    # student holds no memory for its backward pass. With --accum the towers run in parts, the student's inside
    # student_to_call, but the loss sees the whole batch.
    cls_t = eot_t = None
    teacher_images = images if method.teacher_sees_locals else images[:GLOBALS]
    # NB: with autocast's cache all passes of a tower share one half-precision copy of a weight, and their gradients are
    # summed in half precision. --accum makes many passes, and a longer sum loses more. So there the cache is off: each
    # pass makes its own copy, and the sum is in float32.
    with torch.autocast(run.processes.device.type, run.dtype, enabled=run.dtype is not None,
                        cache_enabled=options.accum == 1):
        if method.has_teacher:
            cls_t, eot_t = part_by_part(run.teacher, teacher_images, batch.teacher_texts, options.accum)
        out = run.student_to_call(images, batch.texts)

    loss, terms = total_loss(student, out, cls_t, eot_t, method.checked_terms, method.clip_weight)
    run.optimizer.zero_grad()
    # DDP averages the gradients of all parameters, also of the two scales, which are used outside its forward pass.
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    # A parameter that no term uses has no gradient. (On several GPUs DDP stops a run for that.)
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)

    # DDP has averaged the gradients, so if one rank's is not finite, neither is the mean, and all ranks skip the step.
    finite = bool(norm.isfinite())
    if finite:
        if options.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(student.parameters(), options.clip_grad, norm)
        run.scaler.step(run.optimizer)
        student.clamp_scales()
        if method.has_teacher:
            run.teacher.update(student, momentum)
    else:
        tqdm.write(f'WARNING    step {run.step + 1} was skipped, '
                   f'because the norm of its gradient is {norm:.4g}')
    run.scaler.update()             # fp16: after an infinity it lowers the scale
    run.step += 1                   # a skipped step counts, too
    return StepResult(out, cls_t, loss, terms, norm, finite, lr, momentum)


# Schedules are pure functions of `step`, the number of steps taken so far.

def lr_at(step, options):
    """Linear warm-up to the peak lr, then a cosine towards lr_end times the peak; lr_end is 0 in the released
    recipe (scheduler.py:43-53)."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    share = (step - options.warmup) / (options.steps - options.warmup)      # of the way down
    cosine = (1 + math.cos(math.pi * share)) / 2
    return options.lr * (options.lr_end + (1 - options.lr_end) * cosine)


def momentum_at(step, options):
    """The teacher's momentum lambda: --momentum, as in the paper's recipe, or with --momentum-ramp less in the first
    steps. With a fixed 0.995 the random initial weights would still make up 37 % of the teacher after 200 steps, a
    fifth of a run of `tiny`. So `tiny` has a ramp of 10, which reaches 0.995 only at the 1,990th step, past the end of
    its run."""
    taken = step + 1
    return min(options.momentum, taken / (taken + options.momentum_ramp))


def make_optimizer(student, lr, wd):
    """AdamW; weight decay for matrices and convolutions, but not for vectors (LayerNorm, biases, the class embedding)
    and the scales (main.py:373-392 of the released code)."""
    matrices = {'params': [p for p in student.parameters() if p.ndim > 1], 'weight_decay': wd}
    vectors = {'params': [p for p in student.parameters() if p.ndim < 2], 'weight_decay': 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=lr, betas=(0.9, 0.98), fused=True)


# --- 2. The loop -----------------------------------------------------------------------------------------------------

def evaluate(run, val, watchers):
    """-> figures, {name: value}, the same on all ranks: steps, seconds and, with held-out shards, scores. Rank 0, the
    only one that has val, computes the scores while the others wait."""
    figures = {'steps': run.step, 'seconds': int(time.perf_counter() - run.begun)}
    if val:
        preprocess = evaluation.preprocessing(run.model.config.image_size)
        figures['retrieval'], image_features = evaluation.zero_shot_retrieval(
            run.model, run.train_set.tokenizer, preprocess, val, workers=run.options.workers)
        runs.keep_best(run, figures['retrieval'], val)
        for watcher in watchers:
            figures |= watcher.evaluated(run, val, image_features)
    return run.processes.broadcast(figures)             # here the others wait


class Due(NamedTuple):
    """What the loop does at the top of a turn, before it takes the next step."""
    last: bool          # all steps are taken: the run is complete
    stop: bool          # a signal came: the run ends; it is saved, unless its latest gradient was not finite
    evaluate: bool
    log: bool
    save: bool


def due(run, progress):
    """NB: ranks log, evaluate and stop together. If one rank decides differently, the others hang. So base decisions on
    what all ranks share: the step, the options, figures, and progress, except its timings. Only saving, which rank 0
    does alone, may depend on the clock."""
    options = run.options
    is_last = run.step >= options.steps
    is_stopped = progress.signals > 0 and not is_last
    # Step 0 is a multiple, too, and shows what the networks know before this training.
    is_regular = bool(options.val) and is_multiple(run.step, options.eval_every)
    to_evaluate = is_last or (is_regular and not is_stopped)
    # Step 1 shows early whether all is well. An evaluated step has its loss in the log, too, except step 0. The last
    # step before a stop is logged, because the resumed run may evaluate it first, but no longer knows its loss.
    to_log = to_evaluate or is_stopped or run.step == 1 or is_multiple(run.step, options.log_every)
    # An evaluation takes long and may fail, so all is saved before it.
    time_to_save = (is_stopped or to_evaluate or is_multiple(run.step, options.save_every)
                    or runs.is_overdue(run))
    # progress.broken: the latest gradient was not finite. It was not applied, but an earlier update may have spoiled
    # the weights. So we keep the last good save, except at the end of the run.
    to_save = is_last or (time_to_save and not progress.broken)
    return Due(is_last, is_stopped, to_evaluate, to_log, to_save)


def is_multiple(step, every):
    """every: an option; 0 means never."""
    return every > 0 and step % every == 0


def main(argv=None, watchers=(), built_in_set=None):
    """Train until all steps are done, a signal comes or the run fails, then end the process; status 0: all are done.

    watchers: they add figures to an evaluation, or a page to the folder, see runs.Watcher. built_in_set(): draws the
    scenes of a run without --data, writes them as shards, and returns their folder.
    """
    unsettled, typed = read_options(argv)
    processes = Processes(unsettled['device'])          # from here on only rank 0 writes to stdout
    run, val = set_up(unsettled, typed, processes, built_in_set)
    options = run.options
    runs.begin(run, val, watchers)
    progress = Progress()
    bar = tqdm(total=options.steps, initial=run.step, disable=True if processes.rank else None)
    with bar, runs.memory_needed(), signals_caught() as signals:
        # A turn does what is due after run.step steps. Then it takes the next step, or the loop ends.
        while True:
            now = due(run, progress)
            entry = {}
            if now.log and progress.latest:             # before the first step there is nothing to log
                entry = log_entry(run, progress)
                print_entry(entry, options)
                runs.write_log(run, entry, watchers)    # before the save: a resumed run logs only later steps
            if now.save:
                runs.save(run)
            if now.evaluate:
                figures = evaluate(run, val, watchers)
                runs.write_log(run, entry | {'step': run.step, 'eval': figures}, watchers)     # the step's second line
            if now.last or now.stop:                    # here the last turn ends
                break

            batch = progress.next_batch(run.batches)
            with progress.first_step_counted():
                latest = train_step(run, batch.to(processes.device))
            bar.update()
            bad, signalled = processes.sum([batch.bad_pairs, len(signals)])     # so all ranks stop in the same turn
            progress.count(latest, run.scaler.get_scale(), options.batch, bad, signalled)
            failure = progress.reason_to_fail(run.step, run.folder)
            if failure:
                if latest.finite:           # otherwise an earlier step may have spoiled the weights
                    runs.save(run)
                processes.leave(f'error: {failure}')    # does not return

        if now.last and processes.rank == 0:
            write_json(run.folder / 'eval.json', figures)
            evaluation.show(figures)
        runs.finish(run, watchers)                      # signals are still caught, so that none cuts a report short
    if now.last:
        processes.leave(0)
    number = signals[0] if signals else SIGTERM     # signals is empty if only other ranks got one
    processes.leave(128 + number)       # the status that a shell reports; `leave` does not return


# --- 3. Presets: the sizes of a model, and a recipe ------------------------------------------------------------------

# A recipe is a set of defaults for options, which the command line overrides. PAPER is the released recipe for CC3M
# (train_cc3m.sh).
PAPER = {
    'batch': 1024, 'lr': 5e-4, 'lr_end': 0.0, 'warmup': 2000, 'wd': 0.5,
    'momentum': 0.999, 'momentum_ramp': 0,
    'local_crops': 6, 'local_captions': 6, 'augment': 'full', 'vocab': 'clip'}
# For small sets on a laptop (`tiny` and `photo`, below).
LAPTOP = {
    'batch': 32, 'lr': 1e-3, 'lr_end': 0.1, 'warmup': 100, 'wd': 0.1,
    'momentum': 0.995, 'momentum_ramp': 10,             # the ramp decides, see momentum_at
    # Images are only cropped. The captions of the built-in set name colours, which a jitter would make wrong, and on
    # Flickr8k crops alone did better at retrieval in a single short trial.
    'augment': 'crops',
    'local_crops': 2, 'local_captions': 2, 'vocab': 'learn'}

# Used with --init, whatever the preset. The learning rate is small, because the weights are already trained. The
# momentum has no ramp, because the teacher's towers start as a copy of these weights: no random start has to fade.
PRETRAINED = {'lr': 1e-5, 'wd': 0.1, 'momentum': 0.99, 'momentum_ramp': 0}


class Preset(NamedTuple):
    sizes: Config
    recipe: dict            # a recipe as above, with steps or epochs


PRESETS = {
    # the paper's main model, 152,382,466 parameters
    'vit-b-16': Preset(Config(), PAPER | {'epochs': 32}),
    # the other released one
    'vit-b-32': Preset(Config(patch_size=32), PAPER | {'epochs': 32}),
    # ours, from here on
    'vit-s-16': Preset(
        Config(embed_dim=384, vision_width=384, vision_heads=6, text_width=384, text_heads=6),
        PAPER | {'epochs': 32}),
    'tiny': Preset(
        Config(embed_dim=128, image_size=48, local_image_size=24, patch_size=8,
               vision_width=96, vision_layers=4, vision_heads=3,
               text_width=128, text_layers=2, text_heads=2,
               context_length=64, cross_heads=4),
        LAPTOP | {'steps': 1000}),
    # a few thousand photographs, in ten minutes of processor time if the processor has bf16 units
    'photo': Preset(
        Config(embed_dim=128, image_size=64, local_image_size=32, patch_size=8,
               vision_width=128, vision_layers=4, vision_heads=4,
               text_width=128, text_layers=2, text_heads=2,
               context_length=64, cross_heads=4),
        LAPTOP | {'batch': 64, 'local_crops': 4, 'local_captions': 4, 'steps': 800}),
}


# --- 4. The methods of Table 5 ---------------------------------------------------------------------------------------

def terms_of(*names):
    """-> a function such as cosmos.cosmos_terms, with a term for each name. In 'h_I_cls_t' the student's h_I must find
    the teacher's cls_t of its own pair."""
    return partial(named_terms, names)


def named_terms(names, out, cls_t, eot_t, scale):
    """As in cosmos_terms, each view of the student is compared with each of the teacher."""
    # 'h_I_cls_t' has the query 'h_I' and the target 'cls_t'.
    queries = {name: name[:-len('_cls_t')] for name in names}
    targets = {name: name[-len('cls_t'):] for name in names}
    asking = sorted(set(queries.values()))
    student = dict(zip(asking, gather(*[getattr(out, query) for query in asking])))
    teacher = dict(zip(['cls_t', 'eot_t'], gather(cls_t, eot_t)))   # apart, see cosmos_terms
    return {name: match(student[queries[name]], teacher[targets[name]], scale) for name in names}


def no_terms(out, cls_t, eot_t, scale):
    return {}


class Method(NamedTuple):
    """A row of the table below: what the student sees, and what it learns."""
    global_images: int
    crop_min: float             # smallest share of the image in a global crop
    has_local_images: bool      # as many as --local-crops says
    # yes: GLOBALS captions of 1-5 sentences and --local-captions of one sentence. no: one caption of 1-5 sentences.
    has_text_crops: bool
    has_teacher: bool
    has_cross_attention: bool   # C^I and C^T
    # What is learned in addition to L_CLIP: cosmos_terms, terms_of(...), or a function of yours with the same arguments
    # and result. On several GPUs DDP stops if a parameter gets no gradient. C^I gets none if your terms leave out h_T,
    # C^T none without h_I, the second scale none without `scale`. For what you leave out add a zero to a term, as
    # 0 * out.h_T.sum() or 0 * scale.
    terms: Callable
    # What few rows change:
    only_crops: bool = False            # --augment is 'crops' by default, whatever the preset says
    two_scales: bool = False            # the terms have a scale of their own, as they always have with C^I and C^T
    teacher_sees_locals: bool = False   # the local image views, too; each is a target like the globals
    clip_weight: float = 1              # of L_CLIP; 0 trains without it
    student: type = COSMOS              # or a subclass
    train_set: type = data.TrainingSet  # or a subclass

    def checked_terms(self, *arguments):
        """What `terms` gives. Refused if the log has another value under one of its names."""
        terms = self.terms(*arguments)
        taken = sorted(LOG_NAMES & terms.keys())
        need(not taken, f"a term is named {', '.join(taken)}, but the log has another value of that name; rename it in "
             'the `terms` of its method')
        return terms


# The first six rows are those of Table 5. Only clip and cosmos can be found in the released code, where clip uses
# open_clip's default crop and no colour jitter (transform.py:66). ours: we do not know the paper's losses for the other
# four, which are our reading of the table's labels. In the paper clip, clip-aug and image-distill score far below the
# CLIP of Table 1, so they were probably trained on raw captions only (--caption-keys raw_caption).
#
# The last two rows are ours. no-cross-attention is Eq. 6 with cls and eot in place of h_I and h_T. across is Eq. 6
# without the copying that COSMOS.read describes: eot takes the place of h_T in finding cls_t, and cls that of h_I in
# finding eot_t, because eot and cls have read nothing. The other two terms stay.
no, yes = False, True
METHODS = {
    #                       global   least local   text   tea-  C^I
    #                       images   crop  images  crops  cher  C^T   terms
    'clip':          Method(1,       0.9,  no,     no,    no,   no,   no_terms, only_crops=yes),
    'clip-aug':      Method(GLOBALS, 0.4,  no,     no,    no,   no,   no_terms),
    'image-distill': Method(GLOBALS, 0.4,  yes,    no,    yes,  no,   terms_of('cls_cls_t')),
    'text-crop':     Method(GLOBALS, 0.4,  yes,    yes,   yes,  no,   terms_of('cls_cls_t')),
    'text-distill':  Method(GLOBALS, 0.4,  yes,    yes,   yes,  no,   terms_of('cls_cls_t', 'eot_eot_t')),
    'cosmos':        Method(GLOBALS, 0.4,  yes,    yes,   yes,  yes,  cosmos_terms),
    'no-cross-attention': Method(
        GLOBALS, 0.4, yes, yes, yes, no,
        terms_of('cls_cls_t', 'cls_eot_t', 'eot_cls_t', 'eot_eot_t'), two_scales=yes),
    'across': Method(
        GLOBALS, 0.4, yes, yes, yes, yes,
        terms_of('h_I_cls_t', 'cls_eot_t', 'eot_cls_t', 'h_T_eot_t'))}


def add_method(name, base, **changes):
    """Adds a row to the table: a copy of the row `base`, with these changes."""
    METHODS[name] = METHODS[base]._replace(**changes)


def recipe_of(preset, method, init):
    """Defaults of options, {option: value}; None if the method has no use for an option. init: what --init gives (a
    path), or None."""
    row = METHODS[method]
    recipe = dict(PRESETS[preset].recipe)
    if init:
        recipe |= PRETRAINED
    if row.only_crops:
        recipe['augment'] = 'crops'
    if not row.has_teacher:
        recipe |= {'momentum': None, 'momentum_ramp': None}
    if not row.has_local_images:
        recipe['local_crops'] = None
    if not row.has_text_crops:
        recipe['local_captions'] = None
    return recipe


# --- 5. A run --------------------------------------------------------------------------------------------------------

def read_options(argv=None):
    """-> two dicts {option: value}: every option as it is typed, else the recipe's, else the default in --help; and
    those that are typed. The few that depend on the data or on the run to resume, such as --batch, are settled
    later."""
    return training_options(argv, __doc__, PRESETS, METHODS, recipe_of)


def set_up(unsettled, typed, processes, built_in_set):
    """What read_options gives -> a Run, new or restored from last.pt, and the held-out shards, which only rank 0 gets;
    None if there are none."""
    inputs = choose_inputs(unsettled, typed, processes, built_in_set, PRESETS, METHODS)
    return make_run(inputs, processes, Run, make_optimizer), inputs.val


if __name__ == '__main__':
    # What lesson/ and extras/ add to a run. Without these folders train.py still trains on --data, and evaluates.
    HERE = Path(__file__).parent
    added = []
    draw = None
    if (HERE / 'lesson').is_dir():
        from lesson.scenes import built_in_set as draw
        from lesson.suppression import Named
        added.append(Named())
    if (HERE / 'extras').is_dir():
        from extras.report import Report
        added.append(Report())
    command(partial(main, watchers=added, built_in_set=draw))
