"""Train COSMOS: one step, many times, on 1 to N GPUs, resumable.

    python train.py                                             the built-in set on a laptop, in minutes: see README
    python train.py --data /shards                              one GPU
    torchrun --nproc_per_node=8 train.py --data /shards         one node; the paper's recipe for vit-b-16
    python train.py --resume auto                               goes on where the newest checkpoint in --out stopped

--out then holds last.pt, log.jsonl, config.json, eval.json, samples.png (what the student sees), attention.png, and
with --eval-every strip.png (attention over training).
"""
import contextlib
import ctypes
import dataclasses
import inspect
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import eval as evaluation
from cosmos import COSMOS, Block, Config, Output, Teacher, clip_loss, cosmos_terms, distill_terms
from data import (POOLS, SIGNALS, Batch, Order, Parser, Preprocess, Shards, Tokenizer, Views, caption_pool, cli,
                  loader, make_scenes, sample_sheet)

# --- 1. The methods; options: one list, whose comments are the --help ------------------------------------------------

TERMS = 'h_I_cls', 'h_I_eot', 'h_T_cls', 'h_T_eot'                      # of Eq. 6


class Method(NamedTuple):
    """What a row of Table 5 trains with, beside L_CLIP."""
    images: int = 2             # global image views
    captions: int = 2           # global captions, of 1-5 sentences
    crops: bool = True          # --local-crops more image views
    sentences: bool = True      # --local-captions more captions
    terms: tuple = ()           # student's feature and teacher's of every self-distillation term; () for no teacher
    cross: bool = False         # cross-attention heads

    @property
    def teaches_text(self):
        return len(self.terms) > 1


# Rows of Table 5, each with what the one above has. Of the released code is the last only; the others are our reading
# of the table's labels. Its "text augmentation" seems to bring the synthetic captions too, for the rows above it are
# far below the CLIP of Table 1: give those rows --caption-pool raw for that. The first two are scored as trained, the
# others by their teacher.
METHODS = {
    'clip':          Method(images=1, captions=1, crops=False, sentences=False),
    'clip-aug':      Method(captions=1, crops=False, sentences=False),                  # + image augmentation
    'image-distill': Method(captions=1, sentences=False, terms=('cls_cls',)),           # + image self-distillation
    'text-crop':     Method(terms=('cls_cls',)),                                        # + text augmentation
    'text-distill':  Method(terms=('cls_cls', 'eot_eot')),                              # + text self-distillation
    'cosmos':        Method(terms=TERMS, cross=True),                                   # + cross-attention
}


@dataclass
class Options:
    data: str = None             # training shards: a folder, glob or brace pattern of tars (default: the built-in set)
    val: str = None              # held-out shards, evaluated every --eval-every steps and at the end
    out: str = None              # folder for checkpoint, log and pictures (default: runs/PRESET-METHOD)
    preset: str = None           # vit-b-16, vit-b-32, vit-s-16 or tiny (default: tiny without --data, else vit-b-16)
    method: str = 'cosmos'       # clip, clip-aug, image-distill, text-crop, text-distill or cosmos: METHODS in train.py
    steps: int = None            # optimizer steps in all (default: the preset's)
    epochs: float = None         # instead of --steps: passes over the data (default: the preset's)
    batch: int = None            # pairs a step, over all processes and --accum (default: the preset's)
    accum: int = 1               # parts a process runs one after the other: the same gradient, less memory
    lr: float = None             # peak learning rate (default: the preset's)
    lr_end: float = None         # share of the peak at which the cosine ends (default: the preset's)
    warmup: int = None           # steps of linear warm-up before the cosine (default: the preset's)
    wd: float = None             # weight decay of matrices; vectors and scales have none (default: the preset's)
    momentum: float = None       # lambda of the teacher (default: the preset's)
    momentum_ramp: int = None    # R: lambda is at most s / (s + R) in step s; 0 leaves it fixed (default: the preset's)
    clip_grad: float = 0.0       # largest norm of the gradient; 0 does not clip, as released
    local_crops: int = 6         # local image views a pair
    local_captions: int = 6      # single-sentence captions a pair
    aligned_crops: bool = False  # captions name what lies in their image crop, as far as some do; the built-in set only
    augment: str = None          # full: flip, colour, blur as released; or crops (default: the preset's; clip: crops)
    shuffle: str = 'pairs'       # pairs: all of them; shards: whole tars, and pairs within --window of them
    window: int = 8              # tars that --shuffle shards mixes
    caption_keys: str = None     # comma-separated json keys of the captions (default: the formats in README)
    caption_pool: str = 'all'    # of DreamLIP's captions: raw, short, long or all
    vocab: str = None            # clip, learn (from the captions), or a path to CLIP's merges (default: the preset's)
    precision: str = 'auto'      # fp32, bf16, fp16, or auto: bf16 where the hardware has it, else fp32
    device: str = 'auto'         # cuda, mps or cpu
    workers: int = None          # loader processes per training process (default: 8 on a GPU, 1 on a CPU)
    seed: int = 0                # of everything random
    resume: str = None           # a checkpoint, or auto: the newest in --out, or a fresh start
    save_every: int = 1000       # steps between checkpoints; one is always written at the end
    save_minutes: float = 30.0   # minutes between checkpoints, whichever comes first
    eval_every: int = 0          # steps between evaluations on --val; 0 evaluates at the end only
    log_every: int = 20          # steps between log lines
    bench: int = 0               # time this many steps on random data by part, and stop
    max_skipped: int = 5         # steps in a row that may be skipped because their loss or gradient is not finite
    compile: bool = False        # torch.compile the student: for GPUs, on CPUs it gains nothing
    grad_checkpoint: bool = False  # recompute activations in the backward pass: less memory, one more forward pass


PAPER = dict(epochs=32, batch=1024, lr=5e-4, lr_end=0.0, warmup=2000, wd=0.5, momentum=0.999, momentum_ramp=0,
             augment='full', vocab='clip')          # of CC3M (released train_cc3m.sh); README has those of larger sets
LAPTOP = dict(steps=320, batch=32, lr=1e-3, lr_end=0.5, warmup=30, wd=0.1, momentum=0.99, momentum_ramp=10,
              augment='crops', vocab='learn')       # captions of the lesson name sides and colours: no flip, no jitter
RECIPES = {'vit-b-16': PAPER, 'vit-b-32': PAPER, 'vit-s-16': PAPER, 'tiny': LAPTOP}
CHOICES = {'method': METHODS, 'caption_pool': POOLS, 'precision': ('auto', 'fp32', 'bf16', 'fp16'),
           'augment': ('full', 'crops'), 'shuffle': ('pairs', 'shards'), 'device': ('auto', 'cuda', 'mps', 'cpu')}
LEAST = {'batch': 2, 'steps': 1, 'epochs': 1e-9, 'momentum': 1e-9, 'save_every': 1, 'log_every': 1, 'accum': 1,
         'window': 1}                                                   # 0 for every other number
MOST = {'momentum': 1, 'lr_end': 1}


def parse_options(argv=None):
    """Options from the command line, and the preset's recipe for what is not given. --help is the comments above."""
    parser = Parser(description=__doc__.split('\n')[0])
    comments = dict(re.findall(r'^    (\w+): .*?# (.*)$', inspect.getsource(Options), re.M))
    for field in dataclasses.fields(Options):
        help, kind = comments[field.name].replace('%', '%%'), {'action': 'store_true'}
        if field.type is not bool:
            kind = {'type': field.type, 'default': field.default}
            help += '' if field.default is None else f' (default: {field.default})'
        parser.add_argument('--' + field.name.replace('_', '-'), help=help, **kind)
    options = Options(**vars(parser.parse_args(argv)))
    options.preset = options.preset or ('vit-b-16' if options.data else 'tiny')
    Config.preset(options.preset)                                       # raises for a name it does not know
    if options.steps is not None and options.epochs is not None:
        raise ValueError(f'--steps {options.steps} and --epochs {options.epochs} both set the length; give one of them')
    recipe = RECIPES[options.preset] | ({'augment': 'crops'} if options.method == 'clip' else {})
    for name, value in recipe.items():
        length = name in ('steps', 'epochs') and not (options.steps is None and options.epochs is None)
        if getattr(options, name) is None and not length:
            setattr(options, name, value)
    for name, allowed in CHOICES.items():
        if getattr(options, name) not in allowed:
            raise ValueError(f"unknown --{name.replace('_', '-')} '{getattr(options, name)}'; choose from "
                             f"{', '.join(allowed)}")
    if options.caption_keys and options.caption_pool != 'all':
        raise ValueError(f'--caption-keys {options.caption_keys} and --caption-pool {options.caption_pool} both name '
                         'the captions; give one of them')
    for name, value in vars(options).items():
        least, most = LEAST.get(name, 0), MOST.get(name, sys.maxsize)
        if isinstance(value, (int, float)) and not least <= value <= most:
            bounds = f'at least {least:g}' + (f' and at most {most}' if name in MOST else '')
            raise ValueError(f"--{name.replace('_', '-')} {value} makes no sense; give {bounds}")
    options.out = options.out or f'runs/{options.preset}-{options.method}'
    return options


# --- 2. Where it runs ------------------------------------------------------------------------------------------------

def setup(options):
    """-> (rank, world, device). torchrun's environment is the only switch: alone, the same code runs with world 1."""
    there = ['cuda'] * torch.cuda.is_available() + ['mps'] * torch.backends.mps.is_available() + ['cpu']
    kind = there[0] if options.device == 'auto' else options.device
    if kind not in there:
        raise ValueError(f'--device {kind} is not on this machine; use --device auto')
    if 'RANK' not in os.environ:
        return 0, 1, torch.device(kind)
    device = torch.device(kind, int(os.environ['LOCAL_RANK']) if kind == 'cuda' else None)
    if kind == 'cuda':
        if device.index >= torch.cuda.device_count():
            raise ValueError(f'process {device.index} of this node has no GPU, there are {torch.cuda.device_count()}; '
                             'lower --nproc_per_node')
        torch.cuda.set_device(device)
    # A rank that hangs or is gone ends the others after this time. While rank 0 evaluates they wait, hence not less.
    dist.init_process_group('nccl' if kind == 'cuda' else 'gloo', timeout=timedelta(minutes=30),
                            device_id=device if kind == 'cuda' else None)
    return dist.get_rank(), dist.get_world_size(), device


def keep_memory():
    """Have the C library keep what is freed. By itself it hands large blocks back to the system, and the next step gets
    them anew, page by page and filled with zeros: a tenth of the time of a vit-b-16 step on a CPU."""
    with contextlib.suppress(OSError, TypeError, AttributeError):       # glibc's only
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0), mallopt(-1, -1)                                 # M_MMAP_MAX: none; M_TRIM_THRESHOLD: never


def barrier():
    """Wait for the other processes, if there are any."""
    if dist.is_initialized():
        dist.barrier()


def choose_precision(name, device):
    """-> (name, autocast dtype or None). bfloat16 needs units for it: a CPU without computes it slower than float32."""
    if name == 'auto':
        has = lambda test: bool(getattr(torch.cpu, test, lambda: False)())      # private: some versions lack them
        fast = (torch.cuda.get_device_capability(device) >= (8, 0) if device.type == 'cuda' else
                device.type == 'cpu' and (has('_is_avx512_bf16_supported') or has('_is_amx_tile_supported')))
        name = 'bf16' if fast else 'fp32'
    return name, {'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': None}[name]


# --- 3. Schedules, pure functions of the step (from 0), and the optimizer --------------------------------------------

def lr_at(step, options):
    """Linear warm-up to the peak, then a cosine to its share lr_end, 0 as released (scheduler.py:43-53)."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    cosine = (1 + math.cos(math.pi * (step - options.warmup) / max(options.steps - options.warmup, 1))) / 2
    return options.lr * (options.lr_end + (1 - options.lr_end) * cosine)


def momentum_at(step, options):
    """The teacher's lambda. A fixed one would not forget the random start within a short run, hence the ramp."""
    return min(options.momentum, (step + 1) / (step + 1 + options.momentum_ramp))


def make_optimizer(model, options, device):
    """AdamW; no decay for vectors (LayerNorm, biases) and the two scales (main.py:373-392 of the released code)."""
    groups = [{'params': [p for p in model.parameters() if p.ndim >= 2], 'weight_decay': options.wd},
              {'params': [p for p in model.parameters() if p.ndim < 2], 'weight_decay': 0.0}]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98), eps=1e-8, fused=device.type in ('cuda', 'cpu'))


# --- 4. The run: data, model, teacher, optimizer, and how they are saved ---------------------------------------------

# What decides the result of a step.
REPEATS = ('data', 'batch', 'seed', 'steps', 'lr', 'lr_end', 'warmup', 'wd', 'momentum', 'momentum_ramp', 'clip_grad',
           'augment', 'local_crops', 'local_captions', 'aligned_crops', 'caption_keys', 'caption_pool', 'shuffle',
           'window', 'precision')


class Run:
    """Everything of one training run. Raises ValueError for data, options and checkpoints that do not fit."""

    def __init__(self, options, rank, world, device):
        self.options, self.rank, self.world, self.device, self.step = options, rank, world, device, 0
        self.out, self.main, self.method = Path(options.out), rank == 0, METHODS[options.method]
        options.precision, self.dtype = choose_precision(options.precision, device)      # auto no more, for the resumed
        saved = self.find_checkpoint()
        self.open_data(saved)
        torch.manual_seed(options.seed)                                 # all ranks start from the same weights
        self.model = COSMOS(self.config).to(device)
        self.model.set_grad_checkpointing(options.grad_checkpoint)
        self.teacher = Teacher(self.model) if self.method.terms else None
        self.optimizer = make_optimizer(self.model, options, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.precision == 'fp16')
        self.begun, self.saved, self.saved_step = time.perf_counter(), time.monotonic(), None
        if saved:
            self.restore(saved)
        self.check_agreement()
        if options.compile:
            compile_blocks(self.model)
        self.student = self.model                                       # what forward is called on
        if world > 1:
            devices = [device.index] if device.type == 'cuda' else None
            self.student = DistributedDataParallel(self.model, device_ids=devices, gradient_as_bucket_view=True)

    def open_data(self, saved):
        options = self.options
        keys = options.caption_keys or POOLS[options.caption_pool]
        self.shards = Shards(options.data, self.out, keys, together=True)                        # index cached in --out
        self.val = Shards(options.val, self.out, options.caption_keys, together=True) if options.val else None
        if options.aligned_crops and not all({'name', 'bbox'} <= thing.keys()
                                             for thing in evaluation.objects_of(self.shards, 0) or [{}]):
            raise ValueError(f"{self.shards.name(0)} lists no 'objects' with name and bbox, which --aligned-crops "
                             'needs; draw the built-in set anew (data.py make), or leave it out')
        if self.val and self.main:
            evaluation.shard_captions(self.val)                         # better refused now than at the end
        if saved:
            self.config = Config(**saved['config'])
            self.tokenizer = Tokenizer(saved['merges'], self.config.context_length)
        else:
            preset = Config.preset(options.preset)
            self.tokenizer = make_tokenizer(options, self.shards, preset.context_length)
            self.config = dataclasses.replace(preset, vocab_size=self.tokenizer.vocab_size,
                                              cross_heads=preset.cross_heads if self.method.cross else 0)
        if options.steps is None:
            options.steps = max(1, round(options.epochs * (len(self.shards) // options.batch)))
        self.shuffle = (self.shards.bounds(), options.window) if options.shuffle == 'shards' else ()
        self.shards.ahead = bool(self.shuffle)
        self.views = Views(self.shards, self.tokenizer, self.config, options.seed, options.batch, view_counts(options),
                           options.augment, self.shuffle, options.aligned_crops)
        if options.batch // self.world % options.accum:
            raise ValueError(f'--batch {options.batch} on {self.world} processes cannot be split into --accum '
                             f'{options.accum} parts; choose a multiple of {self.world * options.accum}')

    def batches(self):
        """Batches from this step to the last. The global batch of a step is the same for any workers and ranks."""
        options, workers = self.options, self.options.workers
        workers = (8 if self.device.type == 'cuda' else 1) if workers is None else workers
        order = Order(len(self.shards), options.batch, self.step, options.steps, options.seed, self.rank, self.world,
                      self.shuffle)
        return iter(loader(self.views, order, workers))

    def find_checkpoint(self):
        """What --resume asks for, read; None for a fresh start. auto goes back to previous.pt where last.pt is torn.

        Where it is not this --out's own run that goes on, the checkpoint there is kept as before.pt, its log is not.
        """
        last, previous, resume = self.out / 'last.pt', self.out / 'previous.pt', self.options.resume
        kept, saved = [path for path in (last, previous) if path.exists()], None
        again = torch.tensor(int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)), device=self.device)
        if self.world > 1:                                              # only the node that failed counts
            dist.all_reduce(again, dist.ReduceOp.MAX)
        if kept and again:
            resume = 'auto'                                             # torchrun --max-restarts has started it again
        paths = kept if resume == 'auto' else [resume] if resume else []
        for path in paths:
            try:
                saved = evaluation.read_checkpoint(path)
                break
            except ValueError as error:
                if path == paths[-1]:
                    raise
                print(f'WARNING    {error}\nWARNING    going on from {previous} instead')
                if self.main:                                           # else it would become the next previous.pt
                    os.replace(last, self.out / 'torn.pt')
        if saved is not None:
            if not isinstance(saved, dict) or not {'step', 'config', 'options', 'merges', 'optimizer'} <= saved.keys():
                raise ValueError(f'{path} is no checkpoint of train.py, so there is no run to resume in it')
            for name in ('preset', 'method'):
                was, now = saved['options'][name], getattr(self.options, name)
                if was != now:
                    raise ValueError(f'{path} was trained with --{name} {was}, not {now}; give the same to resume it')
        own = resume == 'auto' or resume and self.out.resolve() in Path(resume).resolve().parents
        if kept and not own and self.main:
            print(f'note       the {kept[0].name} of the run before is now {self.out}/before.pt')
            os.replace(kept[0], self.out / 'before.pt')
            for name in ('previous.pt', 'log.jsonl', 'eval.json', 'attention.png', 'strip.png'):    # not of this run
                (self.out / name).unlink(missing_ok=True)
        return saved

    def restore(self, saved):
        now = asdict(self.options)
        before = now | saved['options']                                 # an older one lacks options that are new
        evaluation.load_weights(self.model, saved['student'], now['resume'])
        if self.teacher:
            evaluation.load_weights(self.teacher.model, saved['teacher'], now['resume'])
        own = self.optimizer.state_dict()                               # decay of this command, not of the checkpoint
        self.optimizer.load_state_dict(own | {'state': saved['optimizer']['state']})
        if saved['scaler']:
            self.scaler.load_state_dict(saved['scaler'])
        self.step, self.begun = saved['step'], self.begun - saved['seconds']
        changed = [f"--{name.replace('_', '-')} {before[name]} -> {now[name]}"
                   for name in REPEATS if now[name] != before[name]]
        if changed and self.main:
            print('note       not a repeat of the run it resumes: ' + ', '.join(changed))

    def check_agreement(self):
        """All ranks must stand at the same step of the same run: without a common --out some would start afresh."""
        own = [self.step, self.options.steps, len(self.shards), self.config.vocab_size]
        own = torch.tensor(own, device=self.device)
        most, least = own.clone(), own.clone()
        if self.world > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX)
            dist.all_reduce(least, dist.ReduceOp.MIN)
        if not torch.equal(least, most):
            raise ValueError(f'processes differ in step, steps, pairs or vocabulary, {least.tolist()} and '
                             f'{most.tolist()}; let all nodes see the same --data and --out')

    def save(self, must=True):
        """last.pt, written aside, flushed to the disk, then renamed; the one before becomes previous.pt. Where that
        fails the old one stays whole: ValueError, or without `must` a warning, for the run may outlive a full disk."""
        if not self.main or self.saved_step == self.step:
            return
        state = {'step': self.step, 'seconds': time.perf_counter() - self.begun,
                 'config': asdict(self.config), 'options': asdict(self.options), 'merges': self.tokenizer.merges,
                 'student': self.model.state_dict(), 'optimizer': self.optimizer.state_dict(),
                 'scaler': self.scaler.state_dict()}
        if self.teacher:
            state['teacher'] = self.teacher.model.state_dict()
        last, partial = self.out / 'last.pt', self.out / 'last.pt.partial'
        self.saved = time.monotonic()                                   # a full disk is tried again, but later
        try:
            with open(partial, 'wb') as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            if last.exists():
                os.replace(last, self.out / 'previous.pt')
            os.replace(partial, last)
            self.saved_step = self.step
        except (OSError, RuntimeError) as error:                        # torch's writer raises RuntimeError
            partial.unlink(missing_ok=True)
            told = f'step {self.step} could not be saved in {last} ({error}); the checkpoint before it is kept'
            if must:
                raise ValueError(f'{told}; make room, then go on with --resume auto') from None
            tqdm.write(f'WARNING    {told}')

    def scored(self):
        """What is evaluated: the teacher where there is one, its tokenizer, and what prepares its images."""
        model = self.teacher.model if self.teacher else self.model
        return model, self.tokenizer, Preprocess(self.config.image_size)


def compile_blocks(model, backend='inductor'):
    """torch.compile block by block, in place: parameters keep their names, and a graph serves all layers and lengths of
    captions, where one of the whole model would be compiled anew for each."""
    torch._dynamo.config.cache_size_limit = 128     # towers, student or teacher, equal sizes: beyond 8 it gives up
    torch._dynamo.config.optimize_ddp = False       # DDP's cuts at bucket bounds are for graphs of whole models
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(dynamic=True, backend=backend)


def view_counts(options):
    """Global and local image views, global and local captions."""
    method = METHODS[options.method]
    return (method.images, options.local_crops * method.crops, method.captions,
            options.local_captions * method.sentences)


def make_tokenizer(options, shards, context_length):
    """CLIP's vocabulary, or one learnt from all captions: of any --caption-pool, or its words would cost more ids."""
    if options.vocab != 'learn':
        return Tokenizer.clip(None if options.vocab == 'clip' else options.vocab, context_length)
    texts = []
    for i in range(0, len(shards), max(1, len(shards) // 20_000)):      # enough to meet every frequent word
        with contextlib.suppress(ValueError):                           # a broken pair is reported when it is its turn
            texts += shards.pool(i) if options.caption_keys else caption_pool(shards.record(i))
    return Tokenizer.learn(texts, 8192, context_length)


# --- 5. One step -----------------------------------------------------------------------------------------------------

def cuts(batch, method, dtype):
    """Batch.cut of the captions for the student and for the teacher.

    In half precision to few lengths: tensor cores like multiples of 8, and a CPU prepares its products anew for each
    number of rows, 0.5 to 2 milliseconds and half a megabyte for every one.
    """
    multiple = 8 if dtype else 1
    return batch.cut(multiple, whole=int(method.cross)), batch.cut(multiple, some=2) if method.teaches_text else []


def forward(run, batch, student, with_teacher=True):
    """One batch through the student, and the teacher -> Output and (teacher image, teacher text), or () without one."""
    images, texts, (cut, short) = batch.views(), batch.texts, cuts(batch, run.method, run.dtype)
    with torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not None):
        out = student(images, texts, cut)
        if not with_teacher or not run.method.terms:
            return out, ()
        return out, run.teacher(images[:2], texts[:2 * run.method.teaches_text], short)


def losses(run, out, teacher, scales):
    """-> the total loss, L_CLIP, and the terms of L_COSMOS or of plain self-distillation (one zero in a CLIP)."""
    clip, terms = clip_loss(out, scales[0].exp()), torch.zeros(1, device=run.device)
    if run.method.cross:
        terms = cosmos_terms(out, *teacher, scales[1].exp())
    elif run.method.terms:
        terms = distill_terms(out, *teacher, scales[0].exp())
    return clip + terms.mean(), clip, terms                             # L_CLIP + L_COSMOS


def scales_of(model):
    return [getattr(model, name) for name in ('logit_scale', 'distill_logit_scale') if hasattr(model, name)]


def accumulate(run, batch):
    """--accum n: the gradient of the whole batch, exactly, with the activations of an n-th of it.

    All parts pass without gradient first, for their embeddings: from them the loss follows as if they had come at once.
    Then each passes again, and its embeddings get the gradient that the loss left at them. That is exact because an
    embedding, cross-modal or not, depends on its own pair only; averaging the losses of parts would lose negatives.
    """
    model, parts = run.model, batch.split(run.options.accum)
    with torch.no_grad():
        done = [forward(run, part, model) for part in parts]
    join = lambda some: None if some[0] is None else torch.cat(some, dim=1)             # (V, b, D) -> (V, B, D)
    out = Output(*map(join, zip(*(out for out, _ in done))))
    teacher = [join(some) for some in zip(*(teacher for _, teacher in done))]
    leaves = [x.requires_grad_() for x in out if x is not None]
    scales = [scale.detach().requires_grad_() for scale in scales_of(model)]
    total, clip, terms = losses(run, out, teacher, scales)
    run.scaler.scale(total).backward()
    owed = zip(*(x.grad.chunk(len(parts), dim=1) for x in leaves))
    for k, (part, grads) in enumerate(zip(parts, owed), 1):
        last = k == len(parts)                                          # DDP sends gradients once, with the last part
        with run.student.no_sync() if run.world > 1 and not last else contextlib.nullcontext():
            again = [x for x in forward(run, part, run.student, with_teacher=False)[0] if x is not None]
            if last:
                again, grads = again + scales_of(model), [*grads, *(scale.grad for scale in scales)]
            torch.autograd.backward(again, grads)
    return out, teacher, total, clip, terms


def forward_backward(run, batch):
    """Both losses and their gradients -> tensors for the log. The arithmetic of the method is all in cosmos.py."""
    model, batch = run.model, batch.to(run.device)
    run.optimizer.zero_grad()
    if run.options.accum > 1:
        out, teacher, total, clip, terms = accumulate(run, batch)
    else:
        out, teacher = forward(run, batch, run.student)
        total, clip, terms = losses(run, out, teacher, scales_of(model))
        run.scaler.scale(total).backward()
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    return dict(out=out, teacher_image=teacher[0] if teacher else None, norm=norm,
                loss=total.detach(), clip=clip.detach(), terms=terms.detach())


def update(run, norm):
    """Optimizer, scales, teacher: the second half of a step, once all ranks know that it may count."""
    for group in run.optimizer.param_groups:
        group['lr'] = lr_at(run.step, run.options)
    if run.options.clip_grad:
        torch.nn.utils.clip_grads_with_norm_(run.model.parameters(), run.options.clip_grad, norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.model.clamp_scales()
    if run.teacher:
        run.teacher.update(run.model, momentum_at(run.step, run.options))
    run.step += 1


def agree(run, *flags):
    """Each flag, true if it is true on any rank: no rank may stop or go on alone, or the others would hang."""
    flags = torch.stack([torch.as_tensor(flag, dtype=torch.float).to(run.device, non_blocking=True) for flag in flags])
    if run.world > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.tolist()


# --- 6. The log line -------------------------------------------------------------------------------------------------

def peak_memory(device):
    """Most bytes so far: on the GPU, else of this process; 0 where the system does not tell."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(ImportError):                              # Windows has none
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    return 0


@torch.no_grad()
def describe(run, state, seconds, waited, steps):
    """One log entry of plain numbers. Losses are means over ranks, the rest is of rank 0. Every rank must call it."""
    losses = torch.stack([state['loss'], state['clip'], *state['terms']])
    if run.world > 1:
        dist.all_reduce(losses)
    loss, clip, *terms = (losses / run.world).tolist()
    image, text, step = state['out'].image[0], state['out'].text[0], run.step
    right = (image @ text.T).argmax(dim=1) == torch.arange(len(image), device=run.device)
    entry = {'step': step + 1, 'loss': loss, 'clip': clip, 'cosmos': sum(terms) / len(terms),
             **dict(zip(run.method.terms, terms)),
             'chance': math.log(run.options.batch),                     # of every single term: a guess among N
             'logit_scale': run.model.logit_scale.exp().item(), 'lr': lr_at(step, run.options),
             'grad_norm': state['norm'].item(), 'accuracy': right.float().mean().item(),
             'spread': image.std(dim=0).norm().item()}                  # 1: all over the sphere, 0: one point
    if run.method.cross:
        entry |= {'distill_logit_scale': run.model.distill_logit_scale.exp().item()}
    if run.teacher:
        entry |= {'momentum': momentum_at(step, run.options),
                  'teacher_cosine': (image * state['teacher_image'][0]).sum(dim=-1).mean().item()}
    return entry | {'samples_per_s': steps * run.options.batch / seconds, 'data_share': waited / seconds,
                    'memory_GiB': peak_memory(run.device) / 2 ** 30,
                    'minutes_left': (run.options.steps - step) * seconds / steps / 60}


def log_line(e, total):
    """The entry for a reader, in one line."""
    several = [format(e[name], '.2f') for name in ('cls_cls', 'eot_eot', *TERMS) if name in e]
    name = 'distill' if len(several) < 4 else 'cosmos'
    terms = f" + {name} {e['cosmos']:.2f} ({' '.join(several)})" if several else ''
    scales = f"{e['logit_scale']:.1f}" + (f"/{e['distill_logit_scale']:.1f}" if 'distill_logit_scale' in e else '')
    teacher = f"  m {e['momentum']:.3f} cos {e['teacher_cosine']:.2f}" if 'momentum' in e else ''
    held = e.get('eval', {})
    chosen = {name: value for name, value in held.get('retrieval', {}).items() if name.endswith('R@1')}
    chosen |= {f'{role} top1': held[role]['top1'] for role in ('dominant', 'small') if role in held}
    held_out = '  held out: ' * bool(chosen) + ', '.join(f'{name} {value:.1%}' for name, value in chosen.items())
    return (f"{e['step']}/{total}  loss {e['loss']:.3f} = clip {e['clip']:.2f}{terms}, chance {e['chance']:.2f}  "
            f"acc {e['accuracy']:.2f}  scale {scales}{teacher}  spread {e['spread']:.2f}  lr {e['lr']:.1e}  "
            f"grad {e['grad_norm']:.2f}  {e['samples_per_s']:.0f}/s  data {e['data_share']:.0%}  "
            f"{e['memory_GiB']:.1f} GiB  {e['minutes_left']:.1f} min left{held_out}")


def read_log(path):
    """The entries of log.jsonl, without lines that a kill or a full disk cut short, and what was written onto them."""
    entries = []
    for line in path.read_text(errors='replace').splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return entries


class Log:
    """Entries to the terminal, to log.jsonl and, where it is installed, to TensorBoard. Rank 0 has one.

    log.jsonl keeps what a resumed run had logged up to its checkpoint; what came after is computed, and logged, again.
    """

    def __init__(self, run):
        self.path, self.writer = run.out / 'log.jsonl', None
        partial = run.out / 'log.jsonl.partial'                         # renamed: a kill here must not cost the log
        old = [entry for entry in read_log(self.path) if entry['step'] <= run.step]
        partial.write_text(''.join(json.dumps(entry) + '\n' for entry in old))
        os.replace(partial, self.path)
        with contextlib.suppress(ImportError):                          # welcome, not required
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(run.out)

    def __call__(self, entry, line):
        tqdm.write(line)
        # JSON has no NaN and no infinity (a skipped fp16 step has such a gradient norm)
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        try:
            with open(self.path, 'a') as file:
                file.write(json.dumps(plain) + '\n')
        except OSError as error:                                        # a full disk: the run may outlive it
            tqdm.write(f'WARNING    step {entry["step"]} is not in {self.path} ({error})')
        for name, value in entry.items() if self.writer else ():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, entry['step'])
        if self.writer:
            self.writer.flush()


# --- 7. The loop -----------------------------------------------------------------------------------------------------

def train(run):
    """Steps to the end or to a signal, whose number it returns, else 0."""
    options, log, caught = run.options, Log(run) if run.main else None, []
    handlers = {number: signal.signal(number, lambda number, frame: caught.append(number)) for number in SIGNALS}
    batches, bad, seen, skipped, first = run.batches(), 0, 0, 0, run.step
    clock, waited, since = time.perf_counter(), 0.0, run.step
    for _ in tqdm(range(first, options.steps), initial=first, total=options.steps, disable=None if run.main else True):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        bad, seen = bad + batch.bad, seen + options.batch // run.world
        state, step = forward_backward(run, batch), run.step + 1
        # fp16 gradients may overflow, the scaler then skips the step and lowers its scale. A loss never may.
        finite = torch.isfinite(state['loss'])
        finite &= run.scaler.get_scale() >= 1 if options.precision == 'fp16' else torch.isfinite(state['norm'])
        broken, stop, spoilt = agree(run, ~finite, bool(caught), bad > max(0.05 * seen, 10))
        scoring = not stop and options.eval_every and step % options.eval_every == 0 and step < options.steps
        due = step % options.log_every == 0 or step in (1, 5, options.steps) or scoring
        if due or broken:
            entry = describe(run, state, time.perf_counter() - clock, waited, step - since) | {'bad': bad}
            clock, waited, since = time.perf_counter(), 0.0, step
        skipped = skipped + 1 if broken else 0
        if skipped > options.max_skipped or spoilt:
            run.save()                                                  # the weights are those of the last good step
            barrier()                                                   # a rank that leaves has the others killed
        if skipped > options.max_skipped:
            raise ValueError(f'loss or gradient is not finite in step {step}, {skipped} steps in a row: '
                             f'{json.dumps(entry)}; {options.out}/last.pt holds the weights before them: go on with '
                             '--resume auto and a lower --lr or --precision fp32')
        if spoilt:
            raise ValueError(f'over 5 % of the pairs cannot be read ({bad} of {seen} in process {run.rank}); see the '
                             'lines above, and python data.py inspect')
        if broken:
            run.scaler.update()                                         # unscaled, but not stepped
            if run.main:
                told = json.dumps(entry)
                tqdm.write(f'WARNING    step {step} is skipped, its loss or gradient is not finite: {told}')
            run.step += 1                                               # its pairs count as seen
        else:
            update(run, state['norm'])

        if scoring:
            entry['eval'] = evaluate(run)
            clock = time.perf_counter()
        if due and run.main:                                            # first: a kill behind the checkpoint would
            log(entry, log_line(entry, options.steps))                  # cost this line, one before it costs nothing
        if stop or step % options.save_every == 0 or time.monotonic() - run.saved > 60 * options.save_minutes > 0:
            run.save(must=bool(stop))
        if stop:
            return caught[0] if caught else signal.SIGTERM
    run.save()                                                          # while no signal can cut it short
    (stop,) = agree(run, bool(caught))                                  # all wait for rank 0's, and end alike
    for number, handler in handlers.items():                            # nothing left to lose: a signal may end it
        signal.signal(number, handler)
    return 0 if not stop else caught[0] if caught else signal.SIGTERM


def evaluate(run):
    """Figures of the held-out shards, and `maps` as of draw_attention. Rank 0 makes them, the others wait. Nothing that
    goes wrong here ends a training."""
    figures = {}
    if run.main:
        try:
            if run.val:
                figures = evaluation.evaluate(*run.scored(), run.val)
            if run.method.cross:
                figures['maps'] = draw_attention(run)
        except Exception as error:                                      # a run of weeks outlives it
            tqdm.write(f'not evaluated to the end: {type(error).__name__}, {error}')
    run.model.train()
    barrier()
    return figures


def draw_attention(run):
    """attention.png: the first held-out image, or the first of training, asked with its objects, else its captions.
    strip.png: its maps in the log's evaluations and now -> {caption: C^I}, for the strips to come."""
    shards, scored = run.val or run.shards, run.scored()
    names = [f"a {thing['name']}" for thing in evaluation.objects_of(shards, 0) if 'name' in thing]
    image, captions = evaluation.shard_image(shards, 0), names or shards.pool(0)[:3]
    evaluation.attention_picture(*scored, image, captions, run.out / 'attention.png')
    maps = {caption: evaluation.attention(*scored, image, caption)[0].round(3).tolist() for caption in captions}
    columns = [(entry['step'], entry.get('eval', {}).get('maps')) for entry in read_log(run.out / 'log.jsonl')]
    columns = [(f'step {step}', some) for step, some in [*columns, (run.step, maps)]
               if some and some.keys() == maps.keys()]
    if len(columns) > 1:                                                # --eval-every
        evaluation.attention_strip(image, columns, run.out / 'strip.png')
    return maps


def announce(run):
    """What this run will do, before it does it."""
    o, views = run.options, run.views
    globals_, crops, captions, local = views.counts
    held = f'{len(run.val):,} held out in {o.val}' if run.val else 'none held out (--val)'
    print(f'data       {len(run.shards):,} pairs in {len(run.shards.paths)} shards of {o.data}, {held}')
    print(f'model      {o.preset}, {o.method}, {sum(p.numel() for p in run.model.parameters()):,} parameters, '
          f'vocabulary {run.tokenizer.vocab_size:,} ({o.vocab})')
    print(f'views      {globals_} + {crops} images, {captions} + {local} captions (global + local), {o.augment}')
    epochs = o.steps * o.batch / len(run.shards)
    parts = f' in {o.accum} parts' if o.accum > 1 else ''
    print(f'run        steps {run.step} to {o.steps} ({epochs:.1f} epochs) of {o.batch} pairs{parts} on {run.world} x '
          f'{run.device} in {o.precision}; lr {o.lr}, warm-up {o.warmup}, decay {o.wd}')
    if run.teacher and o.momentum < 1:
        half = math.log(0.5) / math.log(o.momentum)
        print(f'teacher    momentum {o.momentum}: half of it is the last {half:.0f} steps, {half * o.batch:,.0f} pairs')
    print(f'out        {o.out}; the log lines estimate the time left')


def finish(run):
    """Final figures, and where everything lies."""
    seconds, figures = time.perf_counter() - run.begun, evaluate(run)
    if not run.main:
        return
    figures.pop('maps', None)
    (run.out / 'eval.json').write_text(json.dumps({'steps': run.step, 'seconds': seconds, **figures}, indent=1))
    whose = 'teacher' if run.teacher else 'model'
    print(f'\n{run.step} steps, {seconds / 60:.1f} minutes; the {whose} on held-out pairs:')
    evaluation.show(figures or {'nothing': 'see above' if run.val else 'no --val shards'})
    files = ['last.pt', 'log.jsonl', 'config.json', 'eval.json', *sorted(path.name for path in run.out.glob('*.png'))]
    print(f"{run.out} holds {', '.join(files)}")
    print(f"next       python eval.py retrieval {run.out}/last.pt --shards {run.options.val or 'SHARDS'}")


# --- 8. --bench: time by part, and the share of what the machine's matrix products reach -----------------------------

def count_flops(config, B, images, cut, short, method=METHODS['cosmos']):
    """Floating-point operations of a step on one process: {'student', 'teacher', 'losses', 'backward'}.

    images: (h, w) of all views; cut, short: what `cuts` returns. A multiplication and its addition are two; counted are
    matrix products, as torch.utils.flop_counter does (test).
    """
    c, D = config, config.embed_dim

    def tower(L, C, layers, whole):                 # one sequence of L rows; `whole`: the last block does all of them
        block = L * 24 * C ** 2 + 4 * L ** 2 * C                        # q, k, v, out: 8 C^2, MLP: 16 C^2; attention
        row = L * 4 * C ** 2 + 20 * C ** 2 + 4 * L * C                  # k, v of all rows, the rest of one
        return (layers - 1) * block + (block if whole else row) + 2 * C * D

    patches = [h // c.patch_size * (w // c.patch_size) for h, w in images]
    stem = B * sum(P * 6 * c.patch_size ** 2 * c.vision_width for P in patches)         # conv1
    def towers(patches, texts, whole):
        return (B * sum(tower(P + 1, c.vision_width, c.vision_layers, whole and i == 0) for i, P in enumerate(patches))
                + sum(n * tower(L, c.text_width, c.text_layers, whole and i == 0) for i, (n, L) in enumerate(texts)))
    V, U = len(images), sum(n for n, _ in cut) // B
    student, teacher, clip, distill = towers(patches, cut, method.cross) + stem, 0, 2 * min(V, 2) * U * B * B * D, 0
    if method.cross:
        for n, L, C in ((U, patches[0], c.vision_width), (V, cut[0][1], c.text_width)):  # C^I, C^T
            student += B * (2 * L * C * D + L * 4 * D ** 2 + n * (4 * D ** 2 + 4 * L * D))
    if method.terms:
        teacher = towers(patches[:2], short, False) + stem * sum(patches[:2]) // sum(patches)
        distill = 2 * (2 * V + 2 * U * method.teaches_text) * B * B * D * (1 + method.cross)
    # Each product has two gradients, but none for pixels and for the teacher's features.
    return {'student': student, 'teacher': teacher, 'losses': clip + distill,
            'backward': 2 * student - stem + 2 * clip + distill}


def matmul_peak(device, dtype):
    """-> n, and FLOP/s of an n x n x n product, the best of 12; n is large enough to hide a GPU's launch."""
    n = 2048 if device.type == 'cpu' else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in 'ab')
    return n, 2 * n ** 3 / min(timed(device, lambda: a @ b)[1] for _ in range(12))


def timed(device, call):
    """-> what `call` returns, and its seconds, the device's work included."""
    begun = time.perf_counter()
    result = call()
    if device.type != 'cpu':
        getattr(torch, device.type).synchronize()
    return result, time.perf_counter() - begun


def bench(options, device):
    """Steps on random data, timed by part: medians, samples/s, memory, FLOPs and their share of the machine's peak."""
    method = METHODS[options.method]
    config = Config.preset(options.preset, **({} if method.cross else {'cross_heads': 0}))
    precision, dtype = choose_precision(options.precision, device)
    model, B = COSMOS(config).to(device), options.batch
    model.set_grad_checkpointing(options.grad_checkpoint)
    teacher, optimizer = Teacher(model) if method.terms else None, make_optimizer(model, options, device)
    if options.compile:
        compile_blocks(model)
    torch.manual_seed(options.seed)
    large, small, globals_, local = view_counts(options)
    sides = [config.image_size] * large + [config.local_image_size] * small
    images = [torch.randn(B, 3, side, side, device=device) for side in sides]
    # Lengths as in captions of the field: globals 10 to 77 tokens, locals 10 to 20.
    T, end = config.context_length, config.vocab_size - 1
    ends = torch.cat([torch.randint(min(9, T - 1), last, (n, B)) for n, last in ((globals_, T), (local, min(20, T)))])
    texts = torch.randint(1, end - 1, (globals_ + local, B, T)).scatter(2, ends[..., None], end)
    batch = Batch([], [], texts, ends, 0).to(device)
    cut, short = cuts(batch, method, dtype)
    run, taught, parts = SimpleNamespace(method=method, device=device), batch.texts[:2 * method.teaches_text], {}

    def part(name, call):
        result, seconds = timed(device, call)
        parts.setdefault(name, []).append(seconds)
        return result

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            out = part('student forward', lambda: model(images, batch.texts, cut))
            target = part('teacher forward', lambda: teacher(images[:2], taught, short)) if teacher else ()
        loss = part('losses', lambda: losses(run, out, target, scales_of(model))[0])
        part('backward', loss.backward)
        part('AdamW', lambda: (optimizer.step(), optimizer.zero_grad()))
        if teacher:
            part('EMA', lambda: teacher.update(model, 0.99))

    for i in range(options.bench + 2):
        parts = parts if i > 2 else {}                                  # the first two warm up
        part('step', step)
    medians = {name: sorted(times)[len(times) // 2] for name, times in parts.items()}
    flops = count_flops(config, B, [(side, side) for side in sides], cut, short, method)
    (n, peak), total, seconds = matmul_peak(device, dtype), sum(flops.values()), medians.pop('step')
    print(f'bench      {options.preset}, {options.method}, batch {B}, {len(sides)} images and {len(ends)} captions, '
          f'{precision} on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}')
    for name, value in medians.items():
        print(f'{name:18} {1000 * value:10.1f} ms   {value / seconds:4.0%}')
    memory, speed = peak_memory(device) / 2 ** 30, total / seconds
    print(f'step               {1000 * seconds:10.1f} ms   {B / seconds:,.1f} samples/s   {memory:.2f} GiB')
    print(f'FLOPs              {total / 1e9:10.1f} GFLOP   {speed / 1e9:,.0f} GFLOP/s, {speed / peak:.0%} of the '
          f'{peak / 1e9:,.0f} that a product of {n:,} x {n:,} matrices reaches here')


def locate_data(options, rank):
    """Fill in --data and --val: the built-in set, drawn if it is absent, or the two halves of a folder like it."""
    if options.data is None:
        options.data = 'runs/scenes'
        if rank == 0 and not Path(options.data, 'val/00000.tar').exists():      # the last file to be drawn
            print('data       drawing the built-in set into runs/scenes, once')
            make_scenes(options.data)
        barrier()
    train_half, val_half = Path(options.data, 'train'), Path(options.data, 'val')
    if train_half.is_dir() and val_half.is_dir():
        options.data, options.val = str(train_half), options.val or str(val_half)


def leave(status):
    """End the process. Of several, once all are here.

    NB: not by destroying the process group. Freeing DDP frees gloo's group with Python's lock held, while gloo's thread
    may want that lock to free the tensors of its last collective: one exit in three hung for ever with torch 2.13.
    """
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def main():
    options = parse_options()
    rank, world, device = setup(options)
    if device.type == 'cpu':
        keep_memory()
    if options.bench:
        if world > 1:
            raise ValueError(f'--bench {options.bench} times one process, not {world}; run it without torchrun')
        return bench(options, device)
    locate_data(options, rank)
    Path(options.out).mkdir(parents=True, exist_ok=True)
    run = Run(options, rank, world, device)
    if run.main:
        announce(run)
        (run.out / 'config.json').write_text(json.dumps(asdict(options) | {'config': asdict(run.config)}, indent=1))
        sample_sheet(run.views, run.out / 'samples.png')
    stopped = train(run)
    if not stopped:
        finish(run)
    elif run.main:
        name = signal.Signals(stopped).name
        print(f'{name}: step {run.step} is saved in {run.out}/last.pt; go on with --resume auto')
    leave(128 + stopped if stopped else 0)


if __name__ == '__main__':
    cli(record(main))       # torchrun then ends with the error of the rank that failed first
