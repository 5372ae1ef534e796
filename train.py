"""Train COSMOS: one step, many times, on 1 to N GPUs, resumable.

    python train.py                                             the built-in set on a laptop, in minutes
    torchrun --nproc_per_node=8 train.py --data /shards         vit-b-16, the paper's recipe, on eight GPUs
    python train.py --data /shards --accum 8                    the same on one, whose memory holds an eighth of a batch
    python train.py --init CKPT --data /shards                  COSMOS put onto a CLIP that exists

The same command with --resume goes on where the run in --out stopped. --out then holds last.pt (the checkpoint),
best.pt (the networks with the best R@1 on --val), report.html (the run as a page; maps.npz has its pictures),
log.jsonl, config.json, eval.json and index.npy (of the shards).

First reading: sections 1 to 3, which are the paper's (presets, the rows of Table 5, one step), then `main` at the end,
the run from top to bottom. Sections 4 to 6 set up, log and save; read them when you change them. lesson/onepage.py
trains the same way in a hundred lines, without options, checkpoints and several GPUs.

From plumbing/ come `Processes` (the ranks: their device, sums and broadcasts over them, how they end), `runs` (the
folder of a run: checkpoints, log, going on), and types of options; it need not be read.
"""
import os

if __name__ == '__main__':
    # OpenMP: let idle threads sleep, not spin. torch reads it when it is imported.
    os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from signal import SIGTERM
from typing import NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import eval as evaluation
from cosmos import (COSMOS, GLOBALS, Config, Output, Teacher, across_terms, cosmos_terms, embedding_terms, gather,
                    image_terms, no_terms, plain_terms, total_loss)
from data import Shards
from plumbing import runs
from plumbing.captions import POOL_KEYS
from plumbing.errors import command, need, warn
from plumbing.files import write_json
from plumbing.options import Parser, above_zero, amount, count, positive, share
from plumbing.processes import (CORES, DTYPES, Processes, choose_dtype, compile_blocks, peak_memory,
                                signals_caught, use_cores)
from plumbing.tokenizer import Tokenizer, learn_merges

# --- 1. Presets: the sizes of a model, and a recipe ------------------------------------------------------------------

# Recipes are defaults for the options of section 4. PAPER is the released recipe for CC3M (train_cc3m.sh).
PAPER = {
    'batch': 1024, 'lr': 5e-4, 'lr_end': 0.0, 'warmup': 2000, 'wd': 0.5,
    'momentum': 0.999, 'momentum_ramp': 0,
    'local_crops': 6, 'local_captions': 6, 'augment': 'full', 'vocab': 'clip'}
# Small sets on a laptop. The learning rate ends at a tenth of its peak; after s steps lambda is at most s / (s + 10).
# Captions there name colours and sides, which a jitter or a flip would make wrong, so images are only cropped.
LAPTOP = {
    'batch': 32, 'lr': 1e-3, 'lr_end': 0.1, 'warmup': 100, 'wd': 0.1,
    'momentum': 0.995, 'momentum_ramp': 10,
    'local_crops': 2, 'local_captions': 2, 'augment': 'crops', 'vocab': 'learn'}


class Preset(NamedTuple):
    sizes: Config
    recipe: dict            # with steps or epochs


PRESETS = {
    # the paper's main model, 152,382,466 parameters, and the other released one
    'vit-b-16': Preset(Config(), PAPER | {'epochs': 32}),
    'vit-b-32': Preset(Config(patch_size=32), PAPER | {'epochs': 32}),
    # ours
    'vit-s-16': Preset(
        Config(embed_dim=384, vision_width=384, vision_heads=6, text_width=384, text_heads=6),
        PAPER | {'epochs': 32}),
    'tiny': Preset(
        Config(embed_dim=128, image_size=48, local_image_size=24, patch_size=8,
               vision_width=96, vision_layers=4, vision_heads=3,
               text_width=128, text_layers=2, text_heads=2,
               context_length=64, cross_heads=4),
        LAPTOP | {'steps': 1000}),
    # some thousand photographs on a laptop, in 20 minutes
    'photo': Preset(
        Config(embed_dim=128, image_size=64, local_image_size=32, patch_size=8,
               vision_width=128, vision_layers=4, vision_heads=4,
               text_width=128, text_layers=2, text_heads=2,
               context_length=64, cross_heads=4),
        LAPTOP | {'batch': 64, 'local_crops': 4, 'local_captions': 4, 'augment': 'full', 'steps': 800}),
}

# --- 2. The methods of Table 5 ---------------------------------------------------------------------------------------

class Method(NamedTuple):
    """A row of Table 5: what the student sees, and what it learns beside L_CLIP."""
    global_images: int
    global_texts: int               # captions of 1-5 sentences
    has_local_images: bool          # as many as --local-crops says
    has_local_texts: bool           # captions of one sentence, as many as --local-captions says
    crop_min: float                 # smallest share of the image in a global crop
    augments: bool                  # colours and flips change, unless --augment or the recipe says 'crops'
    has_teacher: bool
    has_cross_attention: bool       # C^I and C^T. If no term reads h_I and h_T they would never train
    has_own_scale: bool             # the terms have a temperature of their own, not that of L_CLIP
    terms: Callable                 # what is learned beside L_CLIP, a function of cosmos.py


# Each row adds to the one above. Only the first and the last are the released code's: clip has open_clip's own crop,
# and no colours (transform.py:66). The others are our reading of the table's labels. In the paper the first three score
# far below the CLIP of its Table 1, so they probably had raw captions only: give them --caption-pool raw.
G = GLOBALS
METHODS = {
    #                  global  global  local   local   crop  aug-    teacher  cross-  own     learns beside L_CLIP
    #                  images  texts   images  texts   min   ments            attn.   scale
    'clip':          Method(1,      1, False,  False,  0.9,  False,  False,   False,  False,  no_terms),
    'clip-aug':      Method(G,      1, False,  False,  0.4,  True,   False,   False,  False,  no_terms),
    'image-distill': Method(G,      1, True,   False,  0.4,  True,   True,    False,  False,  image_terms),
    'text-crop':     Method(G,      G, True,   True,   0.4,  True,   True,    False,  False,  image_terms),
    'text-distill':  Method(G,      G, True,   True,   0.4,  True,   True,    False,  False,  embedding_terms),
    'cosmos':        Method(G,      G, True,   True,   0.4,  True,   True,    True,   True,   cosmos_terms),
    # ours, no rows of the table
    'plain':         Method(G,      G, True,   True,   0.4,  True,   True,    False,  True,   plain_terms),
    'across':        Method(G,      G, True,   True,   0.4,  True,   True,    True,   True,   across_terms)}

# --- 3. One step -----------------------------------------------------------------------------------------------------

@dataclass
class Run:
    """What a step needs and changes."""
    options: argparse.Namespace
    processes: Processes
    train_set: data.Crops           # has the model's Config and the tokenizer, too
    student: COSMOS
    forward: torch.nn.Module        # the student as a step calls it: in InParts; on several GPUs in DDP, too
    teacher: Teacher                # None where nothing is distilled
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler    # of fp16; otherwise it does nothing
    dtype: torch.dtype              # of autocast; None: float32
    step: int = 0                   # steps taken
    # Of the loop:
    saved_step: int = 0             # of last.pt
    best: tuple = (-1.0, 0)         # mean R@1 on --val, and its step
    begun: float = field(default_factory=time.perf_counter)

    @property
    def method(self):
        return METHODS[self.options.method]

    @property
    def folder(self):
        return Path(self.options.out)


class Step(NamedTuple):
    """What a step has computed, for the log."""
    out: Output                 # of the student
    cls_t: torch.Tensor         # of the teacher, (2, B, D); None where nothing is distilled
    loss: torch.Tensor
    parts: dict                 # of the loss: {name: (weight, term)}
    norm: torch.Tensor          # of the gradient
    finite: bool                # else the student was not updated


def train_step(run, batch):
    """One step of training -> Step: student, teacher, loss, backward, optimizer, scales, moving average."""
    options = run.options
    student = run.student
    for group in run.optimizer.param_groups:
        group['lr'] = lr_at(run.step, options)
    # V tensors (B, 3, s, s). The loader has cropped them, and has drawn how strongly each colour jitter acts. The
    # jitters run here, in an order that this string seeds, the same on all ranks.
    images = batch.views(f'{options.seed} {run.step}')

    # The student sees all views and captions, the teacher the globals, without gradient. Caption 0 comes twice: at full
    # length for the student, whose C^T reads the padding, and cut, as all other captions are, for the teacher.
    cls_t = eot_t = None
    with torch.autocast(run.processes.device.type, run.dtype, enabled=run.dtype is not None):
        out = run.forward(images, batch.texts)
        if run.method.has_teacher:
            cls_t, eot_t = run.teacher(images[:GLOBALS], batch.teacher_texts)

    loss, parts = total_loss(student, out, cls_t, eot_t, run.method.terms)
    run.optimizer.zero_grad()
    # DDP averages all gradients in the backward pass, also of the scales, which are used in the loss alone.
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    # A frozen parameter has no gradient.
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)

    # DDP has averaged: all ranks have the same gradient. So a step that is not finite on one is left out by all.
    finite = bool(norm.isfinite())
    if finite:
        if options.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(student.parameters(), options.clip_grad, norm)
        run.scaler.step(run.optimizer)
        student.clamp_scales()
        if run.method.has_teacher:
            run.teacher.update(student, momentum_at(run.step, options))
    else:
        tqdm.write(f'WARNING    step {run.step + 1} is left out: loss {loss:.4g}, '
                   f'gradient norm {norm:.4g}')
    run.scaler.update()             # fp16: after an infinity it lowers the scale
    run.step += 1                   # a step that was left out counts
    return Step(out, cls_t, loss, parts, norm, finite)


class InParts(torch.nn.Module):
    """The student, run on --accum parts of a batch. DistributedDataParallel goes around it, and sees one forward pass.

    With several parts no activations are stored: the backward pass computes them again, part by part (checkpoint). The
    loss sees the embeddings of all parts at once, so the gradient is that of the whole batch, exactly. Averaging the
    losses of parts would lose negatives.
    """

    def __init__(self, student, accum):
        super().__init__()
        self.student = student
        self.accum = accum

    def forward(self, images, texts):
        if self.accum == 1:
            return self.student(images, texts)
        outs = []
        for k in range(self.accum):
            some_images = [view.chunk(self.accum)[k] for view in images]    # (B / accum, 3, s, s)
            some_texts = [text.chunk(self.accum)[k] for text in texts]      # (B / accum, T)
            outs.append(checkpoint(self.student, some_images, some_texts, use_reentrant=False))
        fields = []
        for pieces in zip(*outs):   # first the cls of all parts, then their eot, h_I, h_T
            if pieces[0] is None:
                fields.append(None)
            else:
                fields.append(torch.cat(pieces, dim=1))
        return Output(*fields)


# Schedules are pure functions of `step`, how many steps have been taken.

def lr_at(step, options):
    """Linear warm-up to the peak, then a cosine to its share lr_end, 0 as released (scheduler.py:43-53)."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    progress = (step - options.warmup) / max(options.steps - options.warmup, 1)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return options.lr * (options.lr_end + (1 - options.lr_end) * cosine)


def momentum_at(step, options):
    """The teacher's lambda. A fixed one would not forget the random start within a short run, hence the ramp."""
    taken = step + 1
    return min(options.momentum, taken / (taken + options.momentum_ramp))


def make_optimizer(student, lr, wd):
    """AdamW; no decay for vectors (LayerNorm, biases) and the two scales (main.py:373-392 of the released code)."""
    matrices = {'params': [p for p in student.parameters() if p.ndim > 1], 'weight_decay': wd}
    vectors = {'params': [p for p in student.parameters() if p.ndim < 2], 'weight_decay': 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=lr, betas=(0.9, 0.98), fused=True)


# --- 4. Options ------------------------------------------------------------------------------------------------------

def make_parser():
    """All options. In --help a value in brackets is the default, where the preset's recipe has no other."""
    recipes = ''.join(f'\n{name}: {preset.recipe}' for name, preset in PRESETS.items())
    parser = Parser(usage='%(prog)s [options]', epilog=f'{__doc__}\nRecipes:{recipes}')
    add = parser.add_argument_group('data').add_argument
    add('--data', nargs='+', help='tars, or folders of them (the built-in set)')
    add('--val', nargs='+', help='held-out shards, evaluated every --eval-every steps and at the end')
    add('--caption-keys', help='comma-separated json keys of the captions; see docs/data.md')
    add('--caption-pool', choices=POOL_KEYS, default='all', help="of DreamLIP's captions (%(default)s)")
    add('--vocab', default='clip', help="%(default)s, learn (from the captions), or a path to CLIP's file")
    add('--workers', type=count, default=min(8, CORES // 2 or 1), help='loaders for each GPU (%(default)s)')
    add = parser.add_argument_group('method').add_argument
    add('--preset', choices=PRESETS, help='sizes and recipe (vit-b-16 with --data, else tiny)')
    add('--method', choices=METHODS, default='cosmos', help='row of Table 5, or ours: plain, across (%(default)s)')
    add('--init', help='weights to start from, ours or others; they set sizes and vocabulary')
    add('--quick-gelu', action='store_true', help="of --init: OpenAI's activation, where no file says it")
    add('--local-crops', type=count, default=6, help='local image views per pair (%(default)s)')
    add('--local-captions', type=count, default=6, help='local captions per pair (%(default)s)')
    add('--augment', choices=['full', 'crops'], default='full', help='full: with flips and colours')
    schedule = parser.add_argument_group('schedule')
    length = schedule.add_mutually_exclusive_group().add_argument
    length('--steps', type=positive, help='optimizer steps in all')
    length('--epochs', type=above_zero, help='passes over the data, in their place')
    add = schedule.add_argument
    add('--batch', type=positive, help='pairs per step, over all processes and --accum')
    add('--accum', type=positive, default=1, help='parts a batch is cut into, for memory (%(default)s)')
    add('--lr', type=amount, help='peak learning rate')
    add('--lr-end', type=share, default=0.0, help='share of the peak at the end (%(default)s)')
    add('--warmup', type=count, help='steps of linear warm-up before the cosine')
    add('--wd', type=amount, help='weight decay of matrices; vectors and scales have none')
    add('--momentum', type=share, help='lambda of the teacher')
    add('--momentum-ramp', type=count, default=0, help='R: at step s lambda is at most s / (s + R); 0: no ramp')
    add('--clip-grad', type=amount, default=0.0, help='largest norm of the gradient; 0: none')
    add('--seed', type=count, default=0, help='of everything random (%(default)s)')
    add = parser.add_argument_group('machine').add_argument
    add('--precision', choices=['auto', *DTYPES], default='auto', help='auto: bf16 if fast')
    add('--device', choices=['auto', 'cuda', 'cpu'], default='auto', help='auto: cuda if found')
    add('--compile', action=argparse.BooleanOptionalAction, default=False, help='torch.compile, for GPUs alone')
    add('--grad-checkpoint', action=argparse.BooleanOptionalAction, default=False, help='less memory, more time')
    add = parser.add_argument_group('output').add_argument
    add('--out', help='folder of checkpoint, log and report (runs/PRESET-METHOD)')
    add('--resume', action='store_true', help='go on with the run in --out, or start it where there is none')
    add('--save-every', type=positive, default=1000, help='steps between checkpoints (%(default)s)')
    add('--save-minutes', type=amount, default=30.0, help='or minutes; 0: steps only (%(default)s)')
    add('--eval-every', type=count, help='steps between evaluations (a quarter of the run); 0: at the end only')
    add('--log-every', type=positive, default=20, help='steps between log lines (%(default)s)')
    return parser


def read_options(argv):
    """What is typed, else the recipe of the preset, else the defaults above."""
    parser = make_parser()
    typed = parser.parse_args(argv)                     # a first look, at what decides the recipe
    preset = typed.preset or ('vit-b-16' if typed.data else 'tiny')
    recipe = dict(PRESETS[preset].recipe)
    need(not {'preset', 'method'} & recipe.keys(), f'the recipe of {preset} may not choose preset or method')
    recipe.pop('warmup', None)                          # choose_lengths takes less of it for a short run
    if typed.steps or typed.epochs:
        recipe.pop('steps', None)
        recipe.pop('epochs', None)
    if not METHODS[typed.method].augments:
        recipe['augment'] = 'crops'
    # The recipe is put before what is typed. So it goes through types and choices, too, and what is typed wins.
    words = [f"--{name.replace('_', '-')}={value}" for name, value in recipe.items()]
    parser.set_defaults(preset=preset, out=f'runs/{preset}-{typed.method}')
    return parser.parse_args([*words, *(sys.argv[1:] if argv is None else argv)])


def choose_lengths(options, pairs):
    """Fill in --steps, and --warmup and --eval-every where they are not given."""
    if options.epochs is not None:
        options.steps = round(options.epochs * (pairs // options.batch)) or 1
    need(options.steps, f'preset {options.preset} has neither steps nor epochs; give --steps')
    if options.warmup is None:                          # of a short run a tenth
        options.warmup = min(PRESETS[options.preset].recipe.get('warmup', 0), options.steps // 10)
    if options.eval_every is None:
        options.eval_every = math.ceil(options.steps / 4)


# --- 5. Data, model, teacher, optimizer ------------------------------------------------------------------------------

def find_data(options, built_in_set):
    """Without --data: the built-in set. If --data is one folder with train/ and val/, --val becomes the same folder:
    Shards takes train/ for --data, and val/ for --val."""
    if options.data is None:
        need(built_in_set, 'the built-in set is drawn by lesson/, which is absent; give shards by --data')
        options.data = [str(built_in_set())]
    folder = Path(options.data[0])
    has_halves = (folder / 'train').is_dir() and (folder / 'val').is_dir()
    if options.val is None and len(options.data) == 1 and has_halves:
        options.val = options.data


def identity(options, shards):
    """What a run cannot change when it goes on, {what: value}. All else may change."""
    names = 'preset', 'method', 'batch', 'seed', 'local_crops', 'local_captions'
    same = {'--' + name.replace('_', '-'): getattr(options, name) for name in names}
    return same | {'GLOBALS': GLOBALS, 'fingerprint of --data': shards.fingerprint[:8]}


def open_shards(options, processes, saved, built_in_set):
    """-> training shards, held-out shards (None on other ranks than 0, and where nothing is held out).

    Also fills in --data, --val, --steps, --warmup and --eval-every, where they are not given.
    """
    index = Path(options.out, 'index.npy')
    val = None
    with processes.rank_0_first():          # it reads all headers, and saves what the others map
        find_data(options, built_in_set)
        keys = options.caption_keys or POOL_KEYS[options.caption_pool]
        shards = Shards(options.data, keys, 'train', index)
        data.check_batch(options.batch, len(shards), processes.world * options.accum)
        choose_lengths(options, len(shards))
        if saved:
            runs.check_same(saved, options, identity(options, shards))
        if processes.rank == 0:
            if options.val:
                val = Shards(options.val, options.caption_keys, 'val')      # --caption-pool is of --data
                evaluation.check_held_out(val)  # better refused now than after the first epoch
            if not shards.is_mapped:
                shards.save(index)
    return shards, val


def choose_model(options, saved):
    """-> Config, tokenizer, weights to start from: of the resumed run, of --init, or of the preset and --vocab.

    The tokenizer is None where it must be learned. The weights are {} for a start from nothing.
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
    if method.has_cross_attention:
        heads = config.cross_heads
        if not heads:       # a plain CLIP gets as many as the presets
            heads = 8 if config.embed_dim >= 256 else 4
    two_scales = method.has_own_scale and not method.has_cross_attention
    return replace(config, cross_heads=heads, two_scales=two_scales), tokenizer, weights


def make_run(options, processes, train_set, weights):
    """Model, teacher and optimizer on this process, before the first step."""
    device = processes.device
    torch.manual_seed(options.seed)                     # all ranks start from the same weights
    student = COSMOS(train_set.config).to(device)
    if weights:             # perhaps without cross-attention, or with one that this model lacks
        missing = student.load_state_dict(weights, strict=False).missing_keys
        fresh = dict.fromkeys(name.partition('.')[0] for name in missing)
        print(f"init       {options.init}{'; these start fresh: ' + ', '.join(fresh) if fresh else ''}")
    for tower in student.visual, student.text:
        tower.transformer.grad_checkpointing = options.grad_checkpoint
    teacher = Teacher(student) if METHODS[options.method].has_teacher else None
    optimizer = make_optimizer(student, options.lr, options.wd)
    dtype = choose_dtype(options.precision, device)
    # The usual start, 65,536, would overflow many times before it settles.
    scaler = torch.amp.GradScaler(device.type, 1024.0, enabled=dtype == torch.float16)
    forward = InParts(student, options.accum)
    return Run(options, processes, train_set, student, forward, teacher, optimizer, scaler, dtype)


def set_up(options, processes, built_in_set):
    """A run before its first step, or where it stopped -> run, held-out shards."""
    saved = runs.read_last(options.out) if options.resume else {}
    # The seconds that it was trained for tell one checkpoint from another.
    processes.must_agree(saved.get('seconds'), f'{options.out}/last.pt is not the same for all processes; '
                         'let all nodes see the same --out')
    if not saved:
        options.out = processes.broadcast(runs.free_name(options.out))
    config, tokenizer, weights = choose_model(options, saved)           # may refuse, before a file is written
    shards, val = open_shards(options, processes, saved, built_in_set)
    if tokenizer is None:
        merges = processes.broadcast(learn_merges(shards) if processes.rank == 0 else None)
        tokenizer = Tokenizer(merges, config.context_length)
        config = replace(config, vocab_size=tokenizer.vocab_size)
    method = METHODS[options.method]
    counts = data.Counts(
        global_images=method.global_images,
        local_images=options.local_crops if method.has_local_images else 0,
        global_texts=method.global_texts,
        local_texts=options.local_captions if method.has_local_texts else 0)
    train_set = data.Crops(shards, tokenizer, config, options.seed, counts,
                           augment=options.augment, crop_min=method.crop_min)
    run = make_run(options, processes, train_set, weights)
    if saved:
        runs.restore(saved, run.student, run.teacher, run.optimizer, run.scaler, options.out)
        run.step = run.saved_step = saved['step']
        run.begun -= saved['seconds']
    if options.compile:
        compile_blocks(run.student)
        if run.teacher:
            compile_blocks(run.teacher.model)
    if processes.world > 1:
        run.forward = DistributedDataParallel(run.forward, gradient_as_bucket_view=True)
    return run, val


# --- 6. Log, checkpoint, figures -------------------------------------------------------------------------------------

@torch.no_grad()
def log_entry(run, done, steps, seconds, waited):
    """The log entry of the Step just done, {name: number}. Every rank must call it.

    steps: since the last entry. seconds: that they took. waited: seconds of these spent waiting for data.
    """
    options = run.options
    cls, eot = gather(done.out.cls[:1], done.out.eot[:1])
    images = cls.keys[0]            # view 0 of the pairs of all ranks, (N, D)
    captions = eot.keys[0]          # and caption 0
    nearest = (images @ captions.T).argmax(dim=1).cpu()     # the caption that each image finds, (N,)
    used = run.step - 1             # the step whose rates were used
    entry = {                       # the same on all ranks
        'step': run.step,
        'lr': lr_at(used, options),
        'momentum': momentum_at(used, options),
        'chance': math.log(options.batch),      # of each part of the loss: a blind guess
        'weights': {name: weight for name, (weight, _) in done.parts.items()},
        'accuracy': (nearest == torch.arange(len(nearest))).double().mean().item(),
        'spread': images.std(dim=0, correction=0).norm().item(),        # 0: collapsed
        'grad_norm': done.norm.item(),
        'scale': run.student.logit_scale.exp().item(),
        'pairs_per_s': steps * options.batch / seconds}
    if run.student.has_two_scales:
        entry['distill_scale'] = run.student.distill_logit_scale.exp().item()
    means = {                       # of each rank another; the mean is logged
        'loss': done.loss,
        'waiting': waited / seconds,
        'memory_GB': peak_memory(run.processes.device)}
    if done.cls_t is not None:
        mine = done.out.cls[0]                                          # (B, D)
        means['cosine'] = (mine * done.cls_t[0]).sum() / len(mine)
    terms = {name: term for name, (_, term) in done.parts.items()}
    taken = terms.keys() & (entry.keys() | means.keys())
    assert not taken, f'a part of the loss is called {taken}, as another figure of the log'
    means |= terms
    for name, total in zip(means, run.processes.sum(means.values())):
        entry[name] = total / run.processes.world
    return entry


def networks(run):
    return runs.networks(
        run.student, run.teacher, run.train_set.config, run.train_set.tokenizer.merges, run.step)


def save(run):
    """last.pt, by rank 0, unless it holds this step."""
    if run.processes.rank == 0 and run.step > run.saved_step:
        seconds = time.perf_counter() - run.begun
        same = identity(run.options, run.train_set.shards)
        runs.save(run.folder, networks(run), run.optimizer, run.scaler, run.options, same, seconds)
    run.saved_step = run.step


class Evaluated(NamedTuple):
    """What an evaluation has at hand, for the watchers. The first three are what eval.load returns."""
    model: COSMOS                   # the teacher, where there is one
    tokenizer: Tokenizer
    preprocess: Callable
    val: Shards
    image_features: torch.Tensor    # (n, D)


def evaluate(run, val, watchers):
    """Rank 0 scores the held-out shards, while the others wait -> figures, {} on the others. best.pt is written where
    the mean R@1 is the best so far."""
    figures = {}
    if run.processes.rank == 0:
        figures = {'steps': run.step, 'seconds': int(time.perf_counter() - run.begun)}
        if val:
            figures |= held_out_figures(run, val, watchers)
    run.processes.wait_for_rank_0()
    return figures


def held_out_figures(run, val, watchers):
    """-> {'retrieval': ...}, and what the watchers add."""
    model = run.teacher.model if run.teacher else run.student
    scored = model, run.train_set.tokenizer, evaluation.preprocessing(model.config.image_size)
    retrieval, image_features = evaluation.zero_shot_retrieval(*scored, val)
    to_text = retrieval['image_to_text_R@1']
    to_image = retrieval['text_to_image_R@1']
    mean = (to_text + to_image) / 2
    if mean > run.best[0]:
        run.best = mean, run.step
        runs.save_best(run.folder, networks(run), mean, run.options.val)
    tqdm.write(f'eval       step {run.step}  R@1 {to_text:.1%} image to text, {to_image:.1%} text to '
               f'image, mean {mean:.1%}  best {run.best[0]:.1%} at step {run.best[1]}')
    figures = {'retrieval': retrieval}
    for watcher in watchers:
        figures |= watcher.evaluated(run, Evaluated(*scored, val, image_features))
    return figures


def print_plan(run, val):
    """What this run will do."""
    options = run.options
    shards = run.train_set.shards
    size = sum(p.numel() for p in run.student.parameters())
    passes = options.steps * options.batch / len(shards)
    print(f'run        {options.method}, {options.preset}, {size:,} parameters, into {run.folder}')
    print(f'           steps {run.step} to {options.steps} of {options.batch} pairs, {passes:.1f} passes over '
          f'{len(shards):,} pairs')
    print(f'           on {run.processes.world} x {run.processes.device} in {run.dtype or torch.float32}, '
          f'{torch.get_num_threads()} threads and {options.workers} loaders each')
    if options.init and options.lr > 1e-4:
        print(f'note       --lr {options.lr} is for training from nothing; with --init try 1e-5')
    if val is None:
        print('note       nothing is held out, so overfitting cannot be seen; '
              'python -m extras.prepare pack --val 0.1 holds a tenth out')
        return
    in_both = set(map(os.path.realpath, shards.paths)) & set(map(os.path.realpath, val.paths))
    if in_both:
        warn(f'{len(in_both)} shards are in --data and in --val')


# --- 7. A run, from the command line to the figures ------------------------------------------------------------------

MOST_BROKEN = 5             # steps in a row whose gradient is not finite


def batches_left(run):
    """The batches of the steps that are left, for this rank."""
    options = run.options
    order = data.Order(len(run.train_set.shards), options.batch, run.step, options.steps,
                       options.seed, run.processes.rank, run.processes.world)
    # Half precision is faster with captions of multiples of 8 tokens.
    return iter(data.loader(run.train_set, order, options.workers,
                            multiple=8 if run.dtype else 1,
                            whole_first=run.method.has_cross_attention))    # C^T reads its padding


def reason_to_stop(run, broken, bad, seen):
    """A sentence where too many pairs are bad, or steps in a row broken, else None. All ranks have the same counts."""
    if bad > max(0.05 * seen, 10):
        return (f'over 5 % of the pairs cannot be read ({bad:.0f} of {seen}); see the lines above, and '
                'python -m extras.prepare inspect')
    if broken == MOST_BROKEN:
        return (f'{broken} steps in a row were not finite, the last is step {run.step}; they have not changed the '
                f'weights in {run.folder}/last.pt: give the same command with --resume and a lower --lr, '
                '--clip-grad 1, or --precision fp32')
    return None


def begin(run, val, watchers):
    """The plan, and config.json; rank 0, before the first step."""
    print_plan(run, val)
    runs.begin(run.folder, run.options, run.train_set.config, goes_on=run.step > 0)
    run.best = runs.best_so_far(run.folder, run.options.val)
    for watcher in watchers:
        watcher.begin(run)


def finish(run, figures, watchers):
    """eval.json, what the watchers write, and what to do next."""
    write_json(run.folder / 'eval.json', figures)
    evaluation.show(figures)
    for watcher in watchers:
        watcher.finish(run)
    best = 'best.pt' if (run.folder / 'best.pt').exists() else 'last.pt'
    print(f'done       {run.folder}, the networks are in {best}; try python eval.py retrieval '
          f'{run.folder}/{best} --shards {(run.options.val or run.options.data)[0]}')


def main(argv=None, watchers=(), built_in_set=None):
    """A run. It ends the process, with status 0 when all steps are done.

    Rank 0 calls begin(run), evaluated(run, an Evaluated) -> more figures, and finish(run) of every watcher.
    built_in_set(): draws shards, and returns their folder; for a run without --data.
    """
    options = read_options(argv)
    processes = Processes(options.device)               # from here on only rank 0 prints
    if processes.device.type == 'cpu':
        use_cores(options.workers)
    run, val = set_up(options, processes, built_in_set)
    has_figures = processes.broadcast((run.folder / 'eval.json').exists())     # else its evaluation was cut short
    if run.step >= options.steps and has_figures:
        print(f'nothing is left to do: step {run.step} of {options.steps} is reached')
        processes.leave(0)
    if processes.rank == 0:
        begin(run, val, watchers)

    batches = batches_left(run)
    done = None                     # the latest Step
    broken = 0                      # steps in a row that were not finite
    bad = seen = 0                  # pairs that cannot be read, and all, since this start
    signals = 0
    waited = 0.0                    # seconds, since the last log entry
    logged_step = run.step
    logged_at = saved_at = time.perf_counter()
    bar = tqdm(total=options.steps, initial=run.step, disable=True if processes.rank else None)
    saving = runs.saved_on_error(run.student, partial(save, run))       # unless its weights are not finite
    with bar, saving, signals_caught() as caught:
        # A turn does what is due after run.step steps, then takes a step; the last one takes none.
        while True:
            # What is due? All ranks must find the same, for they log and evaluate together.
            last = run.step >= options.steps
            failure = reason_to_stop(run, broken, bad, seen)
            stop = last or signals or failure
            if stop:
                eval_due = last and not failure
            else:                   # at step 0 the untrained networks
                eval_due = options.val and options.eval_every and run.step % options.eval_every == 0
            log_due = done and (eval_due or run.step == 1 or run.step % options.log_every == 0)
            minutes = (time.perf_counter() - saved_at) / 60     # ranks may differ, but rank 0 alone saves
            overdue = options.save_minutes and minutes > options.save_minutes
            save_due = stop or eval_due or overdue or run.step % options.save_every == 0

            # Log, save, evaluate.
            entry = {}
            if log_due:
                seconds = time.perf_counter() - logged_at
                entry = log_entry(run, done, run.step - logged_step, seconds, waited)
                entry['bad_pairs'] = bad
                runs.print_progress(entry, options.steps, options.batch)
            if save_due:
                save(run)           # before the evaluation, which takes long, and may fail
                saved_at = time.perf_counter()
            if eval_due:
                figures = evaluate(run, val, watchers)
                entry |= {'step': run.step, 'eval': figures}
            if entry:
                if processes.rank == 0:
                    runs.write_log(run.folder, entry)
                logged_step = run.step
                waited = 0.0
                logged_at = time.perf_counter()
            if stop:
                break

            # One step.
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            done = train_step(run, batch.to(processes.device))
            bar.update()
            signals, bad_pairs = processes.sum([len(caught), batch.bad])
            bad += bad_pairs
            seen += options.batch
            broken = 0 if done.finite else broken + 1

    if failure:
        processes.end_all(failure)
    if not last:
        print(f'stopped    step {run.step} is saved; the same command with --resume --out {run.folder} goes on')
        processes.leave(128 + SIGTERM)                  # as a shell has it for who was stopped
    if processes.rank == 0:
        finish(run, figures, watchers)
    processes.leave(0)


if __name__ == '__main__':
    # What extras/ and lesson/ add to a run. Without them it trains and evaluates all the same.
    HERE = Path(__file__).parent
    added = {'watchers': []}
    if (HERE / 'lesson').is_dir():
        from lesson.scenes import built_in_set
        from lesson.suppression import Named
        added['built_in_set'] = built_in_set
        added['watchers'].append(Named())
    if (HERE / 'extras').is_dir():
        from extras.report import Report
        added['watchers'].append(Report())
    command(partial(main, **added))
