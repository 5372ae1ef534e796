"""Train COSMOS on a CPU, one GPU or several. A run that stops can be resumed.

    python train.py                                             the built-in set on a laptop, in minutes
    torchrun --nproc_per_node=8 train.py --data /shards         vit-b-16, the paper's recipe, on eight GPUs
    torchrun --nproc_per_node=2 train.py --out runs/two         two processes, which need no GPU
    python train.py --data /shards --accum 8                    on one GPU that holds only an eighth of a batch
    python train.py --init CKPT --data /shards                  COSMOS, starting from an existing CLIP

The default of --preset is tiny for the built-in set; with --data it is vit-b-16 on a GPU, photo elsewhere. To continue
a run that stopped, give the same command with --resume. A run leaves in --out: last.pt (the checkpoint),
log.jsonl, config.json, eval.json, index.npy (where the pairs are in the shards) and lock (it keeps other runs out).
With held-out shards it also leaves best.pt (the networks with the best mean R@1 on --val); with extras/ also
report.html (the run as a page) and maps.npz (for that page).

On a first reading, take sections 1 to 3 (presets, the rows of Table 5, one step), and then section 6: `main` is the
loop, and `what_is_due` says when it logs, saves, evaluates and ends. Sections 4 and 5 set up, log, save and evaluate;
read them when you change them. lesson/onepage.py trains the same way on one page, without options, checkpoints or
several GPUs. You can skip what comes from plumbing/: `training_options` (the command line), `Processes` (the ranks:
their device, sums and broadcasts over them, how they end), `runs` (the folder of a run: checkpoints, log, resuming) and
`Progress` (what has happened since the process started, and since the last log entry).
"""
import os

if __name__ == '__main__':
    # OpenMP: let idle threads sleep, not spin. The variable must be set before torch is imported.
    os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from signal import SIGTERM
from typing import NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import eval as evaluation
from cosmos import COSMOS, GLOBALS, Config, Output, Teacher, cosmos_terms, gather, match, total_loss
from data import Shards
from plumbing import runs
from plumbing.captions import POOL_KEYS
from plumbing.errors import command, need
from plumbing.files import write_json
from plumbing.options import choose_data, fill_in, training_options
from plumbing.parts import StudentInParts, part_by_part
from plumbing.processes import (Processes, choose_dtype, compile_blocks, keep_memory, peak_memory,
                                signals_caught, use_cores)
from plumbing.progress import Progress
from plumbing.tokenizer import Tokenizer, learn_merges

# --- 1. Presets: the sizes of a model, and a recipe ------------------------------------------------------------------

# A recipe is a set of defaults for options; what is typed takes precedence. PAPER is the released recipe for CC3M
# (train_cc3m.sh).
PAPER = {
    'batch': 1024, 'lr': 5e-4, 'lr_end': 0.0, 'warmup': 2000, 'wd': 0.5,
    'momentum': 0.999, 'momentum_ramp': 0,
    'local_crops': 6, 'local_captions': 6, 'augment': 'full', 'vocab': 'clip'}
# For small sets on a laptop (`tiny` and `photo`, below). The learning rate ends at a tenth of its peak. After s steps
# the teacher's momentum, the paper's lambda, is at most s / (s + 10). Images are only cropped. In `tiny` that is
# because the captions of the built-in set name colours, which a jitter would make wrong. In `photo` it is because crops
# alone did better at retrieval on Flickr8k in a single short trial (docs/own-data.md).
LAPTOP = {
    'batch': 32, 'lr': 1e-3, 'lr_end': 0.1, 'warmup': 100, 'wd': 0.1,
    'momentum': 0.995, 'momentum_ramp': 10,
    'local_crops': 2, 'local_captions': 2, 'augment': 'crops', 'vocab': 'learn'}

# Used with --init, whatever the preset. The learning rate is small, because the weights are already trained. The
# momentum has no ramp, because the teacher's towers start as a copy of these weights, and have nothing to forget.
PRETRAINED = {'lr': 1e-5, 'wd': 0.1, 'momentum_ramp': 0}


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

# --- 2. The methods of Table 5 ---------------------------------------------------------------------------------------

# All methods but `cosmos` use one of these in place of cosmos.cosmos_terms. ours: we do not know the paper's losses for
# the other rows of Table 5. As in cosmos_terms, each view of the student is compared with each of the teacher.

def no_terms(out, cls_t, eot_t, scale):
    return {}


def image_terms(out, cls_t, eot_t, scale):
    """Self-distillation of images: cls, without cross-attention, must find its own pair's cls_t."""
    return {'cls_cls_t': match(*gather(out.cls, cls_t), scale)}


def embedding_terms(out, cls_t, eot_t, scale):
    """Self-distillation of images and of texts, each within its own modality."""
    return {
        'cls_cls_t': match(*gather(out.cls, cls_t), scale),
        'eot_eot_t': match(*gather(out.eot, eot_t), scale)}


def no_cross_attention_terms(out, cls_t, eot_t, scale):
    """Eq. 6 with cls and eot in place of h_I and h_T."""
    cls, eot = gather(out.cls, out.eot)
    cls_t, eot_t = gather(cls_t, eot_t)
    return {
        'cls_cls_t': match(cls, cls_t, scale),
        'cls_eot_t': match(cls, eot_t, scale),
        'eot_cls_t': match(eot, cls_t, scale),
        'eot_eot_t': match(eot, eot_t, scale)}


def across_terms(out, cls_t, eot_t, scale):
    """Eq. 6, but no vector looks for what it has read. h_T has read the image, and could find cls_t by copying, so eot,
    which has read nothing, looks for cls_t. In the same way cls, and not h_I, looks for eot_t."""
    cls, eot, h_I, h_T = gather(out.cls, out.eot, out.h_I, out.h_T)
    cls_t, eot_t = gather(cls_t, eot_t)
    return {
        'h_I_cls_t': match(h_I, cls_t, scale),
        'cls_eot_t': match(cls, eot_t, scale),
        'eot_cls_t': match(eot, cls_t, scale),
        'h_T_eot_t': match(h_T, eot_t, scale)}


class Method(NamedTuple):
    """A row of Table 5, or one of ours: what the student sees, and what it learns in addition to L_CLIP."""
    global_images: int
    global_texts: int               # captions of 1-5 sentences
    has_local_images: bool          # as many as --local-crops says
    has_local_texts: bool           # captions of one sentence, as many as --local-captions says
    crop_min: float                 # smallest share of the image in a global crop
    only_crops: bool                # --augment is 'crops' by default, whatever the preset says
    has_teacher: bool
    # C^I and C^T. Terms must use both h_I and h_T, because DDP stops if a parameter gets no gradient.
    has_cross_attention: bool
    two_scales: bool                # the terms have a temperature of their own, not that of L_CLIP
    terms: Callable                 # returns what is learned in addition to L_CLIP, {name: term}


# Each row of the table adds to the one above. Only the rows clip and cosmos can be found in the released code, where
# clip uses open_clip's default crop and no colour jitter (transform.py:66). The others are our reading of the table's
# labels. In the paper the first three score far below the CLIP of its Table 1, so they were probably trained on raw
# captions only (--caption-pool raw).
G = GLOBALS
METHODS = {
    #                            globals   locals         crop  only   tea-   cross  two     learns
    #                            img. txt. img.   txt.    min   crops  cher   attn.  scales  L_CLIP and
    'clip':               Method(1,   1,   False, False,  0.9,  True,  False, False, False,  no_terms),
    'clip-aug':           Method(G,   1,   False, False,  0.4,  False, False, False, False,  no_terms),
    'image-distill':      Method(G,   1,   True,  False,  0.4,  False, True,  False, False,  image_terms),
    'text-crop':          Method(G,   G,   True,  True,   0.4,  False, True,  False, False,  image_terms),
    'text-distill':       Method(G,   G,   True,  True,   0.4,  False, True,  False, False,  embedding_terms),
    'cosmos':             Method(G,   G,   True,  True,   0.4,  False, True,  True,  True,   cosmos_terms),
    # ours, not in the table
    'no-cross-attention': Method(G,   G,   True,  True,   0.4,  False, True,  False, True,   no_cross_attention_terms),
    'across':             Method(G,   G,   True,  True,   0.4,  False, True,  True,  True,   across_terms)}


def recipe_of(preset, method, init):
    """Defaults of options, {option: value}. init: what --init gives (a path), or None."""
    recipe = dict(PRESETS[preset].recipe)
    if METHODS[method].only_crops:
        recipe['augment'] = 'crops'
    if not METHODS[method].has_teacher:
        del recipe['momentum']
    if init:
        recipe |= PRETRAINED
    return recipe


# --- 3. One step -----------------------------------------------------------------------------------------------------

@dataclass
class Run:
    """What a step needs and changes, and what the loop records about the run."""
    options: Namespace              # all that --help lists, see read_options
    processes: Processes
    train_set: data.Crops           # has the model's Config and the tokenizer, too
    student: COSMOS
    # The student as a step calls it: in --accum parts, which the backward pass computes again; in DDP on several ranks.
    forward: torch.nn.Module
    teacher: Teacher                # None if the method has none
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler    # for fp16; otherwise it does nothing
    dtype: torch.dtype              # autocast's; None: float32
    batches: Iterator = None        # one for each step that is left
    step: int = 0                   # steps taken
    saved_step: int = 0             # the step of last.pt
    saved_at: float = field(default_factory=time.perf_counter)
    best: tuple = (-1.0, 0)         # the best mean R@1 on --val, and its step
    # After --resume: moved back by the time already taken.
    begun: float = field(default_factory=time.perf_counter)

    @property
    def method(self):
        return METHODS[self.options.method]

    @property
    def folder(self):
        return Path(self.options.out)

    @property
    def model(self):
        """The network that is evaluated."""
        return self.teacher.model if self.teacher else self.student


class Step(NamedTuple):
    """What a step has computed, for the log."""
    out: Output                 # the student's vectors
    cls_t: torch.Tensor         # the teacher's, (2, B, D), or None
    loss: torch.Tensor
    parts: dict                 # the weighted terms in the loss, {name: (weight, term)}
    norm: torch.Tensor          # the norm of the gradient
    finite: bool                # the norm is finite; if not, the update was skipped


def train_step(run, batch):
    """One training step -> Step. The order is teacher, student, loss, backward, optimizer, scales, moving average."""
    options = run.options
    student = run.student
    for group in run.optimizer.param_groups:
        group['lr'] = lr_at(run.step, options)
    # V tensors (B, 3, s, s). The loader has cropped the images, and drawn how strongly the colours of each crop change.
    # Here, on the device, they are changed and normalised. The string seeds the order of the jitters, so that it is the
    # same on all ranks.
    images = batch.views(f'{options.seed} {run.step}')

    cls_t = eot_t = None
    # The teacher sees the globals, without gradient. It runs first, while the student holds no memory for its backward
    # pass. The student sees all views and captions. If there is C^T, the student's caption 0 keeps its padding, which
    # C^T reads. Others, the teacher's included, are cut: globals to the longest global, locals to the longest local.
    # cache_enabled: autocast keeps one half-precision copy of each weight. The parts of --accum would share it, and
    # their gradients would be summed there, in half precision. Without the cache they are summed in float32.
    with torch.autocast(run.processes.device.type, run.dtype, enabled=run.dtype is not None,
                        cache_enabled=options.accum == 1):
        if run.method.has_teacher:
            cls_t, eot_t = part_by_part(run.teacher, images[:GLOBALS], batch.teacher_texts, options.accum)
        out = run.forward(images, batch.texts)

    loss, parts = total_loss(student, out, cls_t, eot_t, run.method.terms)
    run.optimizer.zero_grad()
    # In the backward pass DDP averages all gradients, even those of the two scales, which total_loss uses outside of
    # run.forward.
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    # p.grad is None if somebody has frozen p, or, on one GPU, if no term uses it.
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)

    # DDP has averaged the gradients, so if one rank's is not finite, neither is the mean, and all ranks skip the step.
    finite = bool(norm.isfinite())
    if finite:
        if options.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(student.parameters(), options.clip_grad, norm)
        run.scaler.step(run.optimizer)
        student.clamp_scales()
        if run.method.has_teacher:
            run.teacher.update(student, momentum_at(run.step, options))
    else:
        tqdm.write(f'WARNING    step {run.step + 1} was skipped, because the norm of its gradient is {norm:.4g}')
    run.scaler.update()             # fp16: after an infinity it lowers the scale
    run.step += 1                   # a skipped step counts, too
    return Step(out, cls_t, loss, parts, norm, finite)


# Schedules are pure functions of `step`, the number of steps taken so far.

def lr_at(step, options):
    """Linear warm-up to the peak lr, then a cosine down to lr_end times the peak; lr_end is 0 as released
    (scheduler.py:43-53)."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    progress = (step - options.warmup) / max(options.steps - options.warmup, 1)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return options.lr * (options.lr_end + (1 - options.lr_end) * cosine)


def momentum_at(step, options):
    """The teacher's momentum lambda. With a fixed 0.995 the random initial weights would still make up 37 % of the
    teacher after 200 steps, which are a fifth of a run of `tiny`. So with --momentum-ramp the momentum starts low and
    rises. Without a ramp, as in the paper's recipe, it is fixed."""
    taken = step + 1
    return min(options.momentum, taken / (taken + options.momentum_ramp))


def make_optimizer(student, lr, wd):
    """AdamW; no decay for vectors (LayerNorm, biases, [cls]) and the scales (main.py:373-392 of the released code)."""
    matrices = {'params': [p for p in student.parameters() if p.ndim > 1], 'weight_decay': wd}
    vectors = {'params': [p for p in student.parameters() if p.ndim < 2], 'weight_decay': 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=lr, betas=(0.9, 0.98), fused=True)


# --- 4. Set-up: options, data, model, teacher, optimizer --------------------------------------------------------------

def read_options(argv=None):
    """A namespace with every option that --help lists: what is typed, else the recipe, else the default in --help.
    `open_shards` fills in what depends on the data or on a checkpoint, such as --batch."""
    return training_options(argv, __doc__, PRESETS, METHODS, recipe_of)


def fixed_settings(options, shards):
    """What must stay the same when a run is resumed, {what: value}: the options below, the data, and GLOBALS, in case
    somebody edits it. Other options may change."""
    names = 'preset', 'method', 'batch', 'seed', 'local_crops', 'local_captions'
    fixed = {'--' + name.replace('_', '-'): getattr(options, name) for name in names}
    return fixed | {'GLOBALS': GLOBALS, 'fingerprint of --data': shards.fingerprint[:8]}


def open_shards(options, processes, saved, built_in_set):
    """-> training shards, and held-out shards. The latter are None on ranks other than 0, and everywhere if nothing is
    held out. Also fills in and checks the options that depend on the data or on the checkpoint, locks --out, and writes
    index.npy there."""
    index = f'{options.out}/index.npy'
    choose_data(options, built_in_set)
    shards = Shards(options.data, options.caption_keys, 'train', index)
    recipe = recipe_of(options.preset, options.method, options.init)
    parts = processes.world * options.accum
    if options.caption_pool != 'all':
        keys = POOL_KEYS[options.caption_pool]
        shards.caption_keys = keys.split(',')
        pools = runs.first_pools(shards)
        need(pools.count([]) <= len(pools) / 2,
             f'--caption-pool {options.caption_pool} takes {keys} of DreamLIP, but '
             f'{pools.count([])} of the first {len(pools)} pairs of --data have none; '
             'leave it out, or give --caption-keys in its place')
    fill_in(options, recipe, len(shards), parts, saved)
    data.check_batch(options.batch, len(shards), parts)
    if saved:
        runs.check_fixed(saved, options, fixed_settings(options, shards))
    if processes.rank > 0:
        return shards, None

    val = None
    if options.val:
        val = Shards(options.val, options.caption_keys, 'val')      # --caption-pool is for training
        evaluation.check_held_out(val, options.workers)     # fail now, not in the middle of the run
    # Nothing is written to --out before this line. The other ranks will memory-map the index.
    runs.lock(options.out)
    shards.save(index)
    return shards, val


def choose_model(options, saved):
    """-> Config, tokenizer (None if it must be learned), weights to start from ({}: none).

    A resumed run takes Config and tokenizer from its checkpoint; set_up restores its weights later. --init gives all
    three (of our checkpoints the teacher's weights), with CLIP's tokenizer if the file has none. Otherwise --preset
    gives the Config, and --vocab the tokenizer. In a new run, --method decides on cross-attention and a second scale.
    """
    if saved:
        config = Config(**saved['config'])
        return config, Tokenizer(saved['merges'], config.context_length), {}
    path = None if options.vocab in ('clip', 'learn') else options.vocab
    tokenizer = None
    weights = {}
    config = PRESETS[options.preset].sizes
    if options.init:
        model, tokenizer, _ = evaluation.load(
            options.init, vocab=path, quick_gelu=options.quick_gelu)
        config = model.config
        weights = model.state_dict()
    elif options.vocab != 'learn':
        tokenizer = Tokenizer.clip(path, config.context_length)
    method = METHODS[options.method]
    heads = 0
    if method.has_cross_attention:      # those of config; if --init has none, as many as in a preset of its size
        heads = config.cross_heads or (8 if config.embed_dim >= 256 else 4)
    # A model with C^I and C^T always has two scales, so config says it only for one without.
    two_scales = method.two_scales and not method.has_cross_attention
    return replace(config, cross_heads=heads, two_scales=two_scales), tokenizer, weights


def make_train_set(options, shards, tokenizer, config):
    method = METHODS[options.method]
    counts = data.Counts(
        global_images=method.global_images,
        local_images=options.local_crops if method.has_local_images else 0,
        global_texts=method.global_texts,
        local_texts=options.local_captions if method.has_local_texts else 0)
    return data.Crops(shards, tokenizer, config, options.seed, counts,
                      augment=options.augment, crop_min=method.crop_min)


def batches_left(options, processes, train_set, step):
    """An iterator over the batches that are left after `step` steps, for this rank. The loader's workers start here."""
    order = data.Order(len(train_set.shards), options.batch, step, options.steps,
                       options.seed, processes.rank, processes.world)
    # Half precision is faster if the length of captions is a multiple of 8.
    multiple = 8 if choose_dtype(options.precision, processes.device) else 1
    # C^T reads caption 0's padding.
    whole_first = METHODS[options.method].has_cross_attention
    return iter(data.loader(train_set, order, options.workers, processes.device, multiple, whole_first))


def make_run(options, processes, train_set, weights, batches):
    """-> this process's Run before the first step: student, teacher, optimizer and scaler."""
    device = processes.device
    torch.manual_seed(options.seed)                     # all ranks start from the same weights
    student = COSMOS(train_set.config).to(device)
    if weights:             # they may lack cross-attention, or have it although this model does not
        missing = student.load_state_dict(weights, strict=False).missing_keys
        print(f'init       {options.init}; {len(missing)} tensors that it lacks start fresh')
    for tower in student.visual, student.text:
        tower.transformer.grad_checkpointing = options.grad_checkpoint
    teacher = Teacher(student) if METHODS[options.method].has_teacher else None
    optimizer = make_optimizer(student, options.lr, options.wd)
    dtype = choose_dtype(options.precision, device)
    # With torch's own initial scale, 65,536, the first steps would overflow again and again.
    scaler = torch.amp.GradScaler(device.type, 1024.0, enabled=dtype == torch.float16)
    forward = StudentInParts(student, options.accum)
    return Run(options, processes, train_set, student, forward, teacher, optimizer, scaler, dtype, batches)


def set_up(options, processes, built_in_set):
    """-> a Run, new or restored from its checkpoint, and the held-out shards (or None)."""
    if processes.device.type == 'cpu':
        keep_memory()
        use_cores(options.workers)
    # Rank 0 may fetch CLIP's vocabulary, and writes the index of the shards.
    with processes.rank_0_first():
        saved = runs.read_last(options.out, options.resume)
        config, tokenizer, weights = choose_model(options, saved)
        shards, val = open_shards(options, processes, saved, built_in_set)
    # If ranks took different batches or learning rates, nothing would show it, so compare what determines them. Two
    # last.pt count as the same if their running times are equal.
    read = {'pairs': len(shards), 'fingerprint': shards.fingerprint, 'last.pt': saved.get('seconds')}
    to_agree_on = vars(options) | read | {'val': bool(options.val)}
    for name in 'workers', 'data', 'vocab':             # may differ: cores, and where a node has its files
        del to_agree_on[name]
    need(processes.broadcast(to_agree_on) == to_agree_on, 'options, shards or last.pt are not the same for all '
         'processes; give all nodes the same command, the same files in --data, and one --out that all see')

    if tokenizer is None:
        merges = processes.broadcast(learn_merges(shards) if processes.rank == 0 else None)
        tokenizer = Tokenizer(merges, config.context_length)
        config = replace(config, vocab_size=tokenizer.vocab_size)
    train_set = make_train_set(options, shards, tokenizer, config)
    # The loader forks its workers, and a fork may hang once nccl is up. DDP starts nccl, so it comes last; what was
    # broadcast above went over gloo. Evaluations fork later, but their loaders end with an error if a worker hangs.
    batches = batches_left(options, processes, train_set, saved.get('step', 0))
    run = make_run(options, processes, train_set, weights, batches)
    if saved:
        runs.restore(run)
    if options.compile:
        compile_blocks(run.student)
        if run.teacher:
            compile_blocks(run.teacher.model)
    if processes.world > 1:
        run.forward = DistributedDataParallel(run.forward, gradient_as_bucket_view=True)
    return run, val


# --- 5. Log, save, evaluate ------------------------------------------------------------------------------------------

@torch.no_grad()
def log_entry(run, progress):
    """The log entry of the step just done, {name: value}. Every rank must call it."""
    options = run.options
    done = progress.done
    cls_of_all, eot_of_all = gather(done.out.cls[:1], done.out.eot[:1])
    images = cls_of_all.keys[0]     # view 0 of the pairs of all ranks, (N, D)
    captions = eot_of_all.keys[0]   # and caption 0
    nearest = (images @ captions.T).argmax(dim=1).cpu()     # which caption each image finds, (N,)
    # run.step already counts the step just done, which used the lr and momentum of run.step - 1.
    used = run.step - 1
    entry = {  # the same on all ranks, except pairs_per_s; rank 0 writes its own
        'step': run.step,
        'lr': lr_at(used, options),
        'chance': math.log(options.batch),      # what guessing costs in each part of the loss
        'weights': {name: weight for name, (weight, _) in done.parts.items()},
        'accuracy': (nearest == torch.arange(len(nearest))).double().mean().item(),
        'spread': images.std(dim=0, correction=0).norm().item(),  # from 0, all images alike, to 1
        'grad_norm': done.norm.item(),
        'scale': run.student.logit_scale.exp().item(),
        'pairs_per_s': progress.steps * options.batch / progress.seconds,
        'bad_pairs': progress.bad}
    if run.student.two_scales:
        entry['distill_scale'] = run.student.distill_logit_scale.exp().item()
    if run.teacher:
        entry['momentum'] = momentum_at(used, options)
    means = {                       # these differ between ranks, so their mean is logged
        'loss': done.loss,
        'waiting': progress.waited / progress.seconds,
        'memory_GB': peak_memory(run.processes.device)}
    if done.cls_t is not None:
        cls = done.out.cls[0]                                           # (B, D)
        means['cosine'] = (cls * done.cls_t[0]).sum() / len(cls)  # of student and teacher, view 0
    for name, (_, term) in done.parts.items():
        means[name] = term
    for name, total in zip(means, run.processes.sum(means.values())):
        entry[name] = total / run.processes.world
    return entry


def save(run):
    """Rank 0 writes last.pt if any step has been taken since the last save."""
    if run.processes.rank == 0 and run.step > run.saved_step:
        runs.write_last(run, fixed_settings(run.options, run.train_set.shards))
    run.saved_step = run.step
    run.saved_at = time.perf_counter()


def evaluate(run, val, watchers):
    """-> figures, {name: value}: steps, seconds and, with held-out shards, scores. Rank 0, the only one that has val,
    computes the scores while the others wait. Afterwards all ranks know run.best."""
    figures = {'steps': run.step, 'seconds': int(time.perf_counter() - run.begun)}
    if val:
        figures |= held_out_figures(run, val, watchers)
    run.best = run.processes.broadcast(run.best)        # here the others wait
    return figures


def held_out_figures(run, val, watchers):
    """-> {'retrieval': ...}, and what the watchers add. best.pt is written if the mean R@1 is the best so far."""
    tokenizer = run.train_set.tokenizer
    preprocess = evaluation.preprocessing(run.model.config.image_size)
    retrieval, image_features = evaluation.zero_shot_retrieval(
        run.model, tokenizer, preprocess, val, workers=run.options.workers)
    to_text = retrieval['image_to_text_R@1']
    to_image = retrieval['text_to_image_R@1']
    mean = (to_text + to_image) / 2
    if mean > run.best[0]:
        run.best = mean, run.step
        runs.write_best(run, mean, val)
    tqdm.write(f'eval       step {run.step}  R@1 {to_text:.1%} image to text, {to_image:.1%} text to '
               f'image, mean {mean:.1%}  best {run.best[0]:.1%} at step {run.best[1]}')
    figures = {'retrieval': retrieval}
    for watcher in watchers:
        figures |= watcher.evaluated(run, val, image_features)
    return figures


def print_plan(run, val):
    """Print what this run will do."""
    options = run.options
    shards = run.train_set.shards
    size = sum(p.numel() for p in run.student.parameters())
    print(f'run        {options.method}, {size:,} parameters, into {run.folder}')
    print(f'           steps {run.step} to {options.steps}, each with {options.batch} of {len(shards):,} pairs')
    print(f'           on {run.processes.world} x {run.processes.device.type} in {run.dtype or torch.float32}')
    counts = run.train_set.counts
    runs.print_notes(shards, val, counts.global_texts + counts.local_texts)


def begin(run, val, watchers):
    """If the run is complete, end here: `leave` does not return. Otherwise rank 0 prints the plan, and writes
    config.json."""
    options = run.options
    # A run that has taken all its steps but has no eval.json was stopped in its last evaluation, which is due again.
    has_figures = run.processes.broadcast((run.folder / 'eval.json').exists())
    if run.step >= options.steps and has_figures:
        print(f'nothing is left to do: step {run.step} of {options.steps} is reached')
        run.processes.leave(0)
    if run.processes.rank == 0:
        print_plan(run, val)
        runs.write_config(run)          # it also removes what an earlier start has left, before best_so_far looks
        if val:
            run.best = runs.best_so_far(run.folder, val)
        for watcher in watchers:
            watcher.begin(run)
    run.best = run.processes.broadcast(run.best)


def finish(run, figures, watchers):
    """Rank 0 writes eval.json, lets the watchers write their own files, and says what to do next."""
    if run.processes.rank > 0:
        return
    write_json(run.folder / 'eval.json', figures)
    evaluation.show(figures)
    for watcher in watchers:
        watcher.finish(run)
    best = 'best.pt' if (run.folder / 'best.pt').exists() else 'last.pt'
    print(f'done       {run.folder}, the networks are in {best}; try python eval.py retrieval '
          f'{run.folder}/{best} --shards {(run.options.val or run.options.data)[0]}')


# --- 6. A run, from the command line to the figures ------------------------------------------------------------------

class Due(NamedTuple):
    """What the loop does after run.step steps, before the next one. Only the truth values count."""
    log: bool
    save: bool
    evaluate: bool
    stop: bool


def what_is_due(run, progress):
    """-> Due. To change when a run logs, saves, evaluates or ends, edit this function.

    NB: ranks log, evaluate and end together. If one decides differently, the others hang. So base decisions on what all
    ranks share: the step, the options, run.best (of past evaluations), and progress, except its timings. Only rank 0
    saves, so saving may depend on the clock.
    """
    options = run.options
    step = run.step
    finished = step >= options.steps
    # After a signal the run is saved, so that it can be resumed. It is not evaluated, unless this was the last step.
    interrupted = progress.signals > 0 and not finished
    # Step 0 is a multiple of --eval-every, and shows what the networks know before this training.
    in_between = options.val and is_multiple(step, options.eval_every)
    evaluate = finished or (in_between and not interrupted)
    # Step 1 shows early whether all is well. An evaluated step is logged, so that its loss and its scores share an
    # entry. progress.done is the latest Step; before the first one it is None, and there is nothing to log.
    log = progress.done and (evaluate or step == 1 or is_multiple(step, options.log_every))
    overdue = 0 < 60 * options.save_minutes < time.perf_counter() - run.saved_at
    # An evaluation takes a long time and may fail, so the run is saved first.
    save = evaluate or interrupted or overdue or is_multiple(step, options.save_every)
    return Due(log, save, evaluate, stop=finished or interrupted)


def is_multiple(step, every):
    """every: an option; 0 means never."""
    return every > 0 and step % every == 0


def main(argv=None, watchers=(), built_in_set=None):
    """Train until all steps are done or a signal comes, then end the process, with status 0 if all steps are done. Each
    turn of the loop does what is due and then, unless it is the last, takes a step.

    A watcher has three methods, which rank 0 calls: begin(run), evaluated(run, val, image_features), which returns more
    figures (or {}), and finish(run). built_in_set(): draws the scenes of a run without --data, writes them as shards,
    and returns their folder.
    """
    options = read_options(argv)
    processes = Processes(options.device)               # from here on only rank 0 prints
    run, val = set_up(options, processes, built_in_set)
    begin(run, val, watchers)

    progress = Progress()
    bar = tqdm(total=options.steps, initial=run.step, disable=True if processes.rank else None)
    with bar, runs.memory_needed(), signals_caught() as signals:
        while True:
            due = what_is_due(run, progress)
            entry = {}
            if due.log:
                entry = log_entry(run, progress)
                progress.restart_clock()
                runs.print_progress(entry, options.steps, options.batch)
            if due.save:
                save(run)
            if due.evaluate:
                figures = evaluate(run, val, watchers)
                entry |= {'step': run.step, 'eval': figures}
            if entry and processes.rank == 0:
                runs.write_log(run.folder, entry)
            if due.stop:
                break

            batch = progress.next_batch(run.batches)
            done = train_step(run, batch.to(processes.device))
            bar.update()
            bad, signalled = processes.sum([batch.bad, len(signals)])
            progress.count(done, run.scaler.get_scale(), options.batch, bad, signalled)
            failure = progress.reason_to_fail(run.step, run.folder)
            if failure:
                if done.finite:                 # otherwise the weights may have overflowed
                    save(run)
                processes.end_all(failure)

    if due.evaluate:                                    # else a signal has ended the loop
        finish(run, figures, watchers)
        processes.leave(0)
    print(f'stopped    step {run.step} is saved; to go on, give the same command with --resume --out {run.folder}')
    number = signals[0] if signals else SIGTERM     # signals is empty if only other ranks got one
    processes.leave(128 + number)                       # the status that a shell reports


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
