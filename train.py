"""Train COSMOS: one step, many times, on 1 to N GPUs, resumable.

    python train.py                                             the built-in set on a laptop, in minutes
    python train.py --data /shards                              one GPU
    torchrun --nproc_per_node=8 train.py --data /shards         one node; the paper's recipe for vit-b-16
    python train.py --init CKPT --data /shards                  COSMOS put onto a CLIP that exists
    python train.py --resume auto                               goes on where the checkpoint in --out stopped

--out then holds last.pt (the checkpoint; the one before is previous.pt), log.jsonl, config.json, eval.json, samples.png
(what the student sees) and, for COSMOS, attention.png. Section 6 is the step of the paper.
"""
import argparse
import contextlib
import ctypes
import fcntl
import json
import math
import os
import resource
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import eval as evaluation
from cosmos import COSMOS, PRESETS, Config, Output, Teacher
from cosmos import clip_loss, cosmos_terms, gather, symmetric_nce
from data import POOLS, SIGNALS, Order, Parser, Preprocess, Shards, Tokenizer, Views
from data import cli, loader, replacing, sample_sheet

# --- 1. The methods of Table 5, and the options ----------------------------------------------------------------------

class Method(NamedTuple):
    """What a row of Table 5 trains with, beside L_CLIP."""
    global_images: int = 2
    global_captions: int = 2            # of 1-5 sentences
    local_images: bool = True           # --local-crops more image views
    local_captions: bool = True         # --local-captions more captions, of one sentence
    terms: tuple = ()       # STUDENT_TEACHER: h_I_eot pairs h_I with EOT_t; without any, no teacher
    heads: bool = False                 # cross-attention


# Each row adds to the one above; cosmos replaces the self-distillation terms by those of Eq. 6. Only cosmos is the
# released code's. The others are our reading of the table's labels. The table's "text augmentation" seems to bring the
# synthetic captions: the rows above it are far below the CLIP of Table 1. Give those rows --caption-pool raw for that.
METHODS = {
    'clip': Method(global_images=1, global_captions=1, local_images=False, local_captions=False),
    # + image augmentation
    'clip-aug': Method(global_captions=1, local_images=False, local_captions=False),
    # + image self-distillation
    'image-distill': Method(global_captions=1, local_captions=False, terms=('cls_cls',)),
    # + text augmentation
    'text-crop': Method(terms=('cls_cls',)),
    # + text self-distillation
    'text-distill': Method(terms=('cls_cls', 'eot_eot')),
    # + cross-attention
    'cosmos': Method(terms=('h_I_cls', 'h_I_eot', 'h_T_cls', 'h_T_eot'), heads=True)}

# The paper's recipe for CC3M (released train_cc3m.sh); docs/scaling.md has those of the larger sets.
PAPER = {'epochs': 32.0, 'batch': 1024, 'lr': 5e-4, 'warmup': 2000, 'wd': 0.5, 'momentum': 0.999}
# Captions of the built-in set name sides and colours, so a flip or a jitter would make them wrong.
LAPTOP = {
    'steps': 320, 'batch': 32, 'lr': 1e-3, 'lr_end': 0.5, 'warmup': 30, 'wd': 0.1,
    'momentum': 0.99, 'momentum_ramp': 10, 'augment': 'crops', 'vocab': 'learn'}


DTYPES = {'fp32': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}           # None: no autocast


def bounded(kind, low, high=math.inf):
    """A type for argparse: a number from `low` to `high`."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f'{text} is out of range; give {low} to {high}')
        return value
    return number


KINDS = {
    bool: {'action': 'store_true'},
    int: {'type': bounded(int, 0)},
    float: {'type': bounded(float, 0)}}
at_least_1 = bounded(int, 1)
WORKERS = min(8, os.cpu_count() // 2 or 1)


def option(help, default=None, **argparse_options):
    """A field of Options: an option on the command line. A default of None: none, or the preset's recipe."""
    return field(default=default, metadata=dict(argparse_options, help=help))


@dataclass
class Options:
    """Every option, once. GROUPS says where a group begins in --help."""
    data: str = option('shards: a folder, glob or brace pattern of tars (default: the built-in set)')
    val: str = option('held-out shards, evaluated every --eval-every steps and at the end')
    caption_keys: str = option('comma-separated json keys of the captions; see docs/data.md')
    caption_pool: str = option("DreamLIP's captions, without --caption-keys", 'all', choices=POOLS)
    vocab: str = option("clip, learn (from the captions), or a path to CLIP's merges", 'clip')
    workers: int = option('loader processes per training process', WORKERS)
    preset: str = option('model and recipe (vit-b-16 with --data, else tiny)', choices=PRESETS)
    method: str = option('row of Table 5', 'cosmos', choices=METHODS)
    init: str = option('weights to start from: ours, released, open_clip; with their sizes and ids')
    local_crops: int = option('local image views a pair', 6)
    local_captions: int = option('captions of one sentence a pair', 6)
    augment: str = option('full: with flips and colours (not for clip)', 'full', choices=['full', 'crops'])
    steps: int = option('optimizer steps in all', type=at_least_1)
    epochs: float = option('passes over the data; wins over --steps', type=bounded(float, 1e-9))
    batch: int = option('pairs a step, over all processes and --accum', type=bounded(int, 2))
    accum: int = option('parts a batch is cut into: less memory', 1, type=at_least_1)
    lr: float = option('peak learning rate')
    lr_end: float = option('share of the peak at which the cosine ends', 0.0, type=bounded(float, 0, 1))
    warmup: int = option('steps of linear warm-up before the cosine')
    wd: float = option('weight decay of matrices; vectors and scales have none')
    momentum: float = option('lambda of the teacher', type=bounded(float, 1e-9, 1))
    momentum_ramp: int = option('R: lambda is at most s / (s + R) in step s; 0: fixed', 0)
    clip_grad: float = option('largest norm of the gradient; 0 does not clip, as released', 0.0)
    seed: int = option('of everything random', 0)
    precision: str = option('auto: bf16 where it is fast', 'auto', choices=['auto', *DTYPES])
    device: str = option('where to train', 'auto', choices=['auto', 'cuda', 'cpu'])
    compile: bool = option('torch.compile: for GPUs, on CPUs it gains nothing', False)
    grad_checkpoint: bool = option('less memory, one more forward pass', False)
    out: str = option('folder of checkpoint, log and pictures (default: runs/PRESET-METHOD)')
    resume: str = option('a checkpoint, or auto: the one in --out, or a fresh start')
    save_every: int = option('steps between checkpoints', 1000, type=at_least_1)
    save_minutes: float = option('minutes between checkpoints; 0: steps alone', 30.0)
    eval_every: int = option('steps between evaluations on --val; 0: at the end only', 0)
    log_every: int = option('steps between log lines', 20, type=at_least_1)
    max_skipped: int = option('steps in a row that may have no finite loss or gradient', 5)


GROUPS = {'data': 'data', 'preset': 'method', 'steps': 'schedule', 'precision': 'machine', 'out': 'output'}


def parse_command_line(argv=None):
    """What was typed, {name: value}. Everything else comes from the recipe of the preset, or the resumed checkpoint."""
    parser = Parser(description=evaluation.first_line(__doc__),
                    epilog=f'Defaults of vit-*: {PAPER}. Of tiny: {LAPTOP}.')
    for entry in fields(Options):
        if entry.name in GROUPS:
            group = parser.add_argument_group(GROUPS[entry.name])
        how = {**KINDS.get(entry.type, {}), **entry.metadata}
        if entry.default:
            how['help'] += f' (default: {entry.default})'
        group.add_argument('--' + entry.name.replace('_', '-'), default=argparse.SUPPRESS, **how)
    return vars(parser.parse_args(argv))


# --- 2. Where it runs ------------------------------------------------------------------------------------------------

class Processes:
    """The processes of this run: one, or those of torchrun, whose environment variables are the only switch."""

    def __init__(self, device):
        gpu = torch.cuda.is_available()
        if device == 'cuda' and not gpu:
            raise ValueError('--device cuda: torch finds no GPU on this machine; use --device auto')
        self.device = torch.device('cuda' if gpu and device != 'cpu' else 'cpu')
        self.rank = 0
        self.world = 1
        if 'RANK' in os.environ:
            self.join()

    def join(self):
        if self.device.type == 'cuda':
            local = int(os.environ['LOCAL_RANK'])
            if local >= torch.cuda.device_count():
                raise ValueError(f'process {local} of this node has no GPU of its own; lower --nproc_per_node')
            self.device = torch.device('cuda', local)
            torch.cuda.set_device(local)
        dist.init_process_group()                                     # nccl for GPUs, gloo for CPUs
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        if self.rank > 0:
            sys.stdout = open(os.devnull, 'w')                          # rank 0 speaks for all
        # Rank 0 reads headers and evaluates, as long as it takes. The others wait on this group: the usual one gives
        # up after minutes.
        self.patient = dist.new_group(backend='gloo', timeout=timedelta(days=7))

    def sum(self, values):
        """Numbers or scalar tensors, each summed over all processes -> list of floats."""
        total = torch.stack(
            [torch.as_tensor(value, dtype=torch.double, device=self.device) for value in values])
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def share(self, value):
        """Rank 0's value, on all of them."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, group=self.patient)
        return box[0]


def keep_memory():
    """Have the C library keep what is freed. By itself it hands large blocks back to the system, and the next step gets
    them anew, page by page and filled with zeros: a tenth of the time of a vit-b-16 step on a CPU."""
    with contextlib.suppress(Exception):                                # glibc's only
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)                                        # M_MMAP_MAX: no block of its own
        libc.mallopt(-1, -1)                                            # M_TRIM_THRESHOLD: never


def choose_precision(name, device):
    """-> (name, autocast dtype or None). bfloat16 needs units for it: a CPU without computes it slower than float32."""
    if name == 'auto':
        if device.type == 'cuda':
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            # private: some versions lack them
            tests = ('_is_avx512_bf16_supported', '_is_amx_tile_supported')
            fast = any(getattr(torch.cpu, test, bool)() for test in tests)
        name = 'bf16' if fast else 'fp32'
    return name, DTYPES[name]


def compile_blocks(model):
    """torch.compile block by block, in place: parameters keep their names, and a graph serves all layers and lengths of
    captions, where one of the whole model would be compiled anew for each."""
    # All blocks share their code: by default the compiler gives up after 8 graphs of it.
    torch._dynamo.config.cache_size_limit = 128
    for block in [*model.visual.transformer.resblocks, *model.text.transformer.resblocks]:
        block.compile(dynamic=True)


# --- 3. Schedules, pure functions of the step (from 0), and the optimizer --------------------------------------------

def lr_at(step, options):
    """Linear warm-up to the peak, then a cosine to its share lr_end, 0 as released (scheduler.py:43-53)."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    progress = (step - options.warmup) / max(options.steps - options.warmup, 1)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return options.lr * (options.lr_end + (1 - options.lr_end) * cosine)


def momentum_at(step, options):
    """The teacher's lambda. A fixed one would not forget the random start within a short run, hence the ramp."""
    return min(options.momentum, (step + 1) / (step + 1 + options.momentum_ramp))


def make_optimizer(model, lr, wd):
    """AdamW; no decay for vectors (LayerNorm, biases) and the two scales (main.py:373-392 of the released code)."""
    matrices = {'params': [p for p in model.parameters() if p.ndim > 1], 'weight_decay': wd}
    vectors = {'params': [p for p in model.parameters() if p.ndim < 2], 'weight_decay': 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=lr, betas=(0.9, 0.98), fused=True)


# --- 4. What a run is made of: checkpoint, options, data, model, folder ----------------------------------------------

def find_checkpoint(resume, out):
    """What --resume names -> (path, its content), or (None, {}) for a fresh start."""
    paths = [Path(resume)] if resume else []
    if resume == 'auto':
        paths = [path for path in (out / 'last.pt', out / 'previous.pt') if path.exists()]
    for path in paths:
        try:
            saved = evaluation.read_checkpoint(path)
            if 'shards' in saved:
                return path, saved
            raise ValueError(f'{path} holds no run to resume, or one of an older version; see --init')
        except ValueError as error:
            if path == paths[-1]:
                raise
            print(f'WARNING    {error}; going on from {paths[-1]} instead')
    return None, {}


def combine_options(typed, resumed, preset):
    """Recipe of the preset, then the resumed run's options, then what was typed -> Options. Says what differs."""
    for name in ('preset', 'method'):
        if name in typed and typed[name] != resumed.get(name, typed[name]):
            raise ValueError(f'this run was started with --{name} {resumed[name]}, not {typed[name]}; give '
                             'the same to resume it, or another --out')
    values = {'preset': preset, 'method': 'cosmos', **resumed, **typed}
    recipe = dict(LAPTOP if values['preset'] == 'tiny' else PAPER)
    if values['method'] == 'clip':
        recipe['augment'] = 'crops'
    options = Options(**recipe | values)
    if 'epochs' in typed:
        options.steps = None                                            # Run works them out anew
    locate_data(options)
    for name, value in resumed.items():
        if name in typed and value != getattr(options, name):
            print(f'note       --{name} was {value}, is now {getattr(options, name)}')
    return options


def locate_data(options):
    """Fill in --data and --val: the built-in set, or the two halves of a folder like it."""
    if options.data is None:
        from lesson.scenes import built_in_set
        options.data = built_in_set()
    if os.path.isdir(f'{options.data}/val'):
        options.val = options.val or f'{options.data}/val'
        options.data = f'{options.data}/train'


def choose_model(options, shards):
    """-> Config, tokenizer and weights of a fresh start: those of --init, or the preset's, --vocab's and none."""
    path = None if options.vocab in ('clip', 'learn') else options.vocab
    weights = {}
    if options.init:
        model, tokenizer, _ = evaluation.load(options.init, vocab=path)
        config = model.config
        weights = model.state_dict()
    else:
        config = PRESETS[options.preset]
        if options.vocab == 'learn':
            captions = []
            # enough for every frequent word
            for i in range(0, len(shards), len(shards) // 20_000 or 1):
                # a broken pair is reported when it is its turn
                with contextlib.suppress(ValueError):
                    captions += shards.pool(i)
            tokenizer = Tokenizer.learn(captions, 8192, config.context_length)
        else:
            tokenizer = Tokenizer.clip(path, config.context_length)
        config = replace(config, vocab_size=tokenizer.vocab_size)
    heads = 0
    if METHODS[options.method].heads:           # a plain CLIP of --init gets new ones
        heads = config.cross_heads or (8 if config.embed_dim >= 256 else 4)
    return replace(config, cross_heads=heads), tokenizer, weights


def lock_folder(out):
    """Keep other runs out of the folder until this process ends. ValueError where one is at work in it."""
    # a bare number: closing a file would unlock it
    file = os.open(out / '.lock', os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f'another run is at work in {out}; give another --out') from None
    except OSError:                                             # a file system without locks
        pass


def claim_folder(out, checkpoint, sources):
    """Make --out ours. A fresh start moves a run that lies there aside, whole, to NAME-1, NAME-2, ...

    sources: paths that the run reads, joined by '::'.
    """
    resumes_here = checkpoint and checkpoint.parent.resolve() == out.resolve()
    if (out / 'config.json').exists() and not resumes_here:
        lock_folder(out)
        inside = any(Path(path).resolve().is_relative_to(out.resolve()) for path in sources.split('::'))
        if inside or out.is_mount():
            raise ValueError(f'{out} holds a run and cannot be moved aside: it is a mount point, or holds '
                             '--data, --val or --init; give another --out, or --resume auto')
        number = 1
        while Path(f'{out}-{number}').exists():
            number += 1
        out.rename(f'{out}-{number}')
        print(f'note       the run that lay in {out} is now in {out}-{number}')
    out.mkdir(parents=True, exist_ok=True)
    lock_folder(out)


# --- 5. The run ------------------------------------------------------------------------------------------------------

class Run:
    """Everything of one training run.

    Rank 0 checks the options and reads the headers (__init__), all ranks get a copy, and each builds its model (start).
    """

    def __init__(self, typed, world, restarted):
        """Everything that can be refused is refused here, before anything in --out is touched."""
        preset = typed.get('preset', 'vit-b-16' if 'data' in typed else 'tiny')
        resume = typed.pop('resume', None)
        if resume not in (None, 'auto'):
            typed.setdefault('out', str(Path(resume).parent))
        self.out = Path(typed.get('out', f"runs/{preset}-{typed.get('method', 'cosmos')}"))
        if restarted and any(self.out.glob('*.pt')):
            resume = 'auto'
        self.checkpoint, saved = find_checkpoint(resume, self.out)
        self.options = options = combine_options(typed, saved.get('options', {}), preset)
        options.out = str(self.out)
        self.method = method = METHODS[options.method]
        self.shards = Shards(options.data, options.caption_keys or POOLS[options.caption_pool], cache=self.out)
        self.val = None
        if options.val:
            self.val = Shards(options.val, options.caption_keys, cache=self.out)
            evaluation.shard_captions(self.val)                 # better refused now than at the end
            both = set(self.shards.paths) & set(self.val.paths)
            if both:
                print(f'WARNING    {len(both)} shards are in --data and in --val')
        # Raises where --batch does not fit.
        Order(len(self.shards), options.batch, 0, 1, world=world * options.accum)
        if options.steps is None:
            options.steps = round(options.epochs * (len(self.shards) // options.batch)) or 1
        self.weights = {}                                               # to start from
        if not saved:
            self.config, self.tokenizer, self.weights = choose_model(options, self.shards)
        elif saved['shards'] == self.shards.fingerprint:
            self.config = Config(**saved['config'])
            self.tokenizer = Tokenizer(saved['merges'], self.config.context_length)
        else:
            raise ValueError(f'this run was started on other shards or pairs than the {len(self.shards):,} of '
                             f'{options.data}; give the same --data, or start anew with --init')
        local_images = options.local_crops if method.local_images else 0
        local_captions = options.local_captions if method.local_captions else 0
        counts = (method.global_images, local_images, method.global_captions, local_captions)
        self.views = Views(self.shards, self.tokenizer, self.config, options.seed, options.batch, counts,
                           options.augment)
        claim_folder(self.out, self.checkpoint, f'{options.data}::{options.val}::{options.init}::{self.checkpoint}')
        self.shards.save(self.out)
        if self.val:
            self.val.save(self.out)

    def start(self, processes):
        """Build the model and all that goes with it, on this rank."""
        options = self.options
        self.processes = processes
        self.device = processes.device
        self.first = processes.rank == 0
        options.precision, self.dtype = choose_precision(options.precision, self.device)
        torch.manual_seed(options.seed)                      # all ranks start from the same weights
        self.model = COSMOS(self.config).to(self.device)
        self.model.load_state_dict(self.weights, strict=False)     # heads that they lack stay fresh
        del self.weights
        self.teacher = Teacher(self.model) if self.method.terms else None
        self.model.visual.transformer.grad_checkpointing = options.grad_checkpoint
        self.model.text.transformer.grad_checkpointing = options.grad_checkpoint
        self.optimizer = make_optimizer(self.model, options.lr, options.wd)
        # The usual start, 65,536, would overflow many times before it settles.
        self.scaler = torch.amp.GradScaler(self.device.type, 1024.0, enabled=options.precision == 'fp16')
        self.step = 0
        self.begun = self.saved_at = time.perf_counter()
        if self.checkpoint:
            self.restore(self.checkpoint)
        if options.compile:
            compile_blocks(self.model)
        self.student = Student(self.model, options.accum)
        if processes.world > 1:
            self.student = DistributedDataParallel(self.student, gradient_as_bucket_view=True)

    def restore(self, path):
        saved = evaluation.read_checkpoint(path)
        evaluation.load_weights(self.model, saved['student'], path)
        if self.teacher:
            evaluation.load_weights(self.teacher.model, saved['teacher'], path)
        self.optimizer.load_state_dict(saved['optimizer'])
        # this command's, not the checkpoint's
        self.optimizer.param_groups[0]['weight_decay'] = self.options.wd
        if saved['scaler']:
            self.scaler.load_state_dict(saved['scaler'])
        self.step = saved['step']
        self.begun -= saved['seconds']
        if self.processes.share(saved['seconds']) != saved['seconds']:
            raise ValueError(f'{path} is not what process 0 goes on from; let all nodes see the same --out')

    def save(self):
        """last.pt, whole or not at all; the one before becomes previous.pt. ValueError where the disk is full."""
        if not self.first:
            return
        state = {
            'options': asdict(self.options),
            'config': asdict(self.config),
            'merges': self.tokenizer.merges,
            'shards': self.shards.fingerprint,
            'step': self.step,
            'seconds': time.perf_counter() - self.begun,
            'student': self.model.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict()}
        if self.teacher:
            state['teacher'] = self.teacher.model.state_dict()
        last = self.out / 'last.pt'
        with replacing(last) as partial:
            torch.save(state, partial)
        self.saved_at = time.perf_counter()


# --- 6. One step -----------------------------------------------------------------------------------------------------

class Loss(NamedTuple):
    total: torch.Tensor     # L_CLIP + the mean of the terms
    clip: torch.Tensor      # L_CLIP
    # self-distillation terms, in the order of Method.terms; one zero without any
    terms: torch.Tensor


class Student(torch.nn.Module):
    """The model, run on --accum parts of a batch. DistributedDataParallel goes around it.

    With several parts no activations are stored: the backward pass computes them again, part by part (checkpoint). The
    loss sees the embeddings of all parts at once, so the gradient is that of the whole batch, exactly. Averaging the
    losses of parts would lose negatives.
    """

    def __init__(self, model, accum):
        super().__init__()
        self.model = model
        self.accum = accum

    def forward(self, images, texts):
        if self.accum == 1:
            return self.model(images, texts)
        image_parts = zip(*[view.chunk(self.accum) for view in images])     # a tuple of V views a part
        text_parts = zip(*[text.chunk(self.accum) for text in texts])       # a tuple of U captions a part
        outs = []
        for part in zip(image_parts, text_parts):
            outs.append(checkpoint(self.model, *part, use_reentrant=False))
        return Output(*[None if parts[0] is None else torch.cat(parts, dim=1) for parts in zip(*outs)])


def student_and_teacher(run, batch):
    """The student on all views, the teacher on the globals -> Output, (teacher_image, teacher_text) or ()."""
    images, texts = batch.views(), batch.texts
    short = [texts[0][:, :batch.longest], *texts[1:]]                   # without its padding; the others come cut
    if not run.method.heads:
        texts = short                                                   # only C^T reads padding
    targets = ()
    with torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not None):
        out = run.student(images, texts)
        if run.teacher:         # a single term is [cls] to CLS_t, which needs no text
            targets = run.teacher(images[:2], short[:2] if len(run.method.terms) > 1 else [])
    return out, targets


def distill_terms(out, teacher_image, teacher_text, scale):
    """Self-distillation without cross-attention -> (1,): [cls] to CLS_t; with a teacher_text (2,): [eot] to EOT_t, too.

    For the rows of Table 5 between CLIP and COSMOS. The paper's loss for them is not known to us. Ours is that of Eq. 6
    with the embeddings themselves in place of h_I and h_T, each against the teacher of its own modality.
    """
    all_cls, all_cls_t = gather(out.image, teacher_image)
    terms = [symmetric_nce(out.image, teacher_image, all_cls, all_cls_t, scale)]
    if teacher_text is not None:
        all_eot, all_eot_t = gather(out.text, teacher_text)
        terms.append(symmetric_nce(out.text, teacher_text, all_eot, all_eot_t, scale))
    return torch.stack(terms)


def losses(model, method, out, targets):
    """The two losses of the step -> Loss."""
    clip = clip_loss(out, model.logit_scale.exp())
    if method.heads:
        terms = cosmos_terms(out, *targets, model.distill_logit_scale.exp())
    elif method.terms:
        # a plain CLIP has no second scale
        terms = distill_terms(out, *targets, model.logit_scale.exp())
    else:
        terms = clip.new_zeros(1)
    return Loss(clip + terms.mean(), clip, terms)


def forward_backward(run, batch):
    """The first half of a step. With `update` these are the lines at the head of cosmos.py."""
    run.optimizer.zero_grad()
    out, targets = student_and_teacher(run, batch)
    loss = losses(run.model, run.method, out, targets)
    run.scaler.scale(loss.total).backward()
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters()])
    return out, targets, loss, norm


def update(run, norm):
    """Optimizer, scales, teacher: the second half of a step, once all ranks agree that loss and gradient are finite."""
    options = run.options
    for group in run.optimizer.param_groups:
        group['lr'] = lr_at(run.step, options)
    if options.clip_grad:
        torch.nn.utils.clip_grads_with_norm_(run.model.parameters(), options.clip_grad, norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.model.clamp_scales()
    if run.teacher:
        run.teacher.update(run.model, momentum_at(run.step, options))


# --- 7. The log ------------------------------------------------------------------------------------------------------

LEGEND = """
loss           clip (L_CLIP) + distill, the mean of the self-distillation terms, which follow
chance         ln N, what each single term is for a blind guess
accuracy       images that find their caption among the pairs of their GPU
spread         of the image features. 1: all over the sphere, 0: one point
scale          1/temperature of clip; distill_scale: that of distill
cosine         of the student's image features to the teacher's
waiting        share of the time spent waiting for data
"""


class Meter:
    """Steps and time since the last log line, and how much of it went into waiting for data."""

    def __init__(self):
        self.restart()

    def restart(self):
        self.begun = time.perf_counter()
        self.waited = 0.0
        self.steps = 0

    def next(self, batches):
        before = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - before
        self.steps += 1
        return batch


def peak_memory(device):
    """Most GB so far: on the GPU, else of this process (on Linux)."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


@torch.no_grad()
def describe(run, meter, out, targets, loss, norm):
    """The log entry of the step just done: {name: number}, means over all ranks. Every rank must call it."""
    options = run.options
    image = out.image[0]                                                # (B, D)
    nearest = (image @ out.text[0].T).argmax(dim=1)
    seconds = time.perf_counter() - meter.begun
    values = {
        'epoch': run.step * options.batch / len(run.shards),
        'loss': loss.total,
        'clip': loss.clip,
        'distill': loss.terms.mean(),
        **dict(zip(run.method.terms, loss.terms)),
        'chance': math.log(options.batch),
        'accuracy': (nearest.cpu() == torch.arange(len(nearest))).double().mean(),
        'spread': image.std(dim=0).norm(),
        'lr': lr_at(run.step - 1, options),
        'grad_norm': norm,
        'pairs_per_s': meter.steps * options.batch / seconds,
        'waiting': meter.waited / seconds,
        'memory_GB': peak_memory(run.device),
        **dict(zip(('scale', 'distill_scale'), torch.stack(run.model.scales()).exp()))}
    if run.teacher:
        values['momentum'] = momentum_at(run.step - 1, options)
        teacher_image, _ = targets
        values['cosine'] = (image * teacher_image[0]).sum() / len(image)
    sums = run.processes.sum(values.values())
    return {'step': run.step} | {name: value / run.processes.world for name, value in zip(values, sums)}


def trim_log(run):
    """Leave out what was logged after the checkpoint: it is computed, and logged, again."""
    path = run.out / 'log.jsonl'
    path.touch()
    lines = path.read_text(errors='replace').splitlines()
    with replacing(path) as partial, open(partial, 'w') as file:
        for line in lines:
            with contextlib.suppress(ValueError):                     # a line that a kill cut short
                if json.loads(line)['step'] <= run.step:
                    file.write(line + '\n')


def write_log(run, entry):
    """An entry to log.jsonl, and its numbers to the terminal."""
    with open(run.out / 'log.jsonl', 'a') as file:
        file.write(json.dumps(entry) + '\n')
    tqdm.write('  '.join(f'{name} {value:.6g}' for name, value in entry.items() if name != 'eval'))


# --- 8. The loop -----------------------------------------------------------------------------------------------------

class Health:
    """Counts broken steps and bad pairs over all ranks, so that all decide alike: one that stops alone leaves the
    others hanging."""

    def __init__(self, run):
        self.run = run
        self.skipped = 0                # steps in a row
        self.bad = 0                    # pairs
        self.seen = 0

    def check(self, loss, norm, bad_pairs, signals):
        """-> may the step count, and must the run stop? Ends a run with too many broken steps or bad pairs."""
        run = self.run
        broken, stop, bad = run.processes.sum([~torch.isfinite(loss.total + norm), signals, bad_pairs])
        self.bad += bad
        self.seen += run.options.batch
        if self.bad > max(0.05 * self.seen, 10):
            self.end(f'over 5 % of the pairs cannot be read ({self.bad:.0f} of {self.seen}); see the lines above, '
                     'and python -m extras.prepare inspect')
        self.skipped = self.skipped + 1 if broken else 0
        if broken:
            problem = f'step {run.step + 1} has the loss {loss.total:.4g}, its gradient the norm {norm:.4g}'
            tqdm.write(f'WARNING    {problem}: it is skipped')
            if self.skipped > run.options.max_skipped:
                self.end(f'{problem}, {self.skipped} steps in a row; {run.out}/last.pt has the weights before '
                         'them: go on with --resume auto and a lower --lr or --precision fp32')
            run.scaler.update()                     # fp16: a lower scale for the next step
        return not broken, stop > 0

    def end(self, reason):
        self.run.save()
        self.run.processes.share(None)   # wait for rank 0: a rank that leaves has the others killed
        raise ValueError(reason)


def train(run):
    """Take the steps that are left -> True where a signal ended it sooner. Either way the last one is saved."""
    options = run.options
    caught, stop = [], False
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: caught.append(number))
    meter, health = Meter(), Health(run)
    order = Order(len(run.shards), options.batch, run.step, options.steps, options.seed,
                  run.processes.rank, run.processes.world)
    # Half precision likes captions of multiples of 8 tokens.
    batches = iter(loader(run.views, order, options.workers, multiple=8 if run.dtype else 1))
    # A bar, of rank 0, where there is a terminal.
    for _ in tqdm(range(run.step, options.steps), disable=None if run.first else True):
        batch = meter.next(batches).to(run.device)
        out, targets, loss, norm = forward_backward(run, batch)
        healthy, stop = health.check(loss, norm, batch.bad, len(caught))
        if healthy:
            update(run, norm)
        run.step += 1                                    # the pairs of a skipped step count as seen
        last = run.step == options.steps
        score_due = options.eval_every and run.step % options.eval_every == 0 and not last
        if healthy and (run.step % options.log_every == 0 or run.step == 1 or last or score_due):
            entry = describe(run, meter, out, targets, loss, norm) | {'bad_pairs': health.bad}
            if score_due:
                entry['eval'] = evaluate(run)
            # Before the checkpoint: a line too many is trimmed on resume, a missing one stays missing.
            if run.first:
                write_log(run, entry)
            meter.restart()
        # --save-minutes 0: never
        overdue = time.perf_counter() - run.saved_at > 60 * options.save_minutes > 0
        if stop or last or overdue or run.step % options.save_every == 0:
            run.save()
        if stop:
            break
    for number in SIGNALS:                               # nothing left to lose: a signal may end it
        signal.signal(number, signal.SIG_DFL)
    return stop


def score(run, figures):
    """Figures of the held-out shards into the dict, and attention.png: the first pair and its captions."""
    shards = run.val or run.shards
    model = run.teacher.model if run.teacher else run.model
    # as evaluation.load returns them
    loaded = model, run.tokenizer, Preprocess(run.config.image_size)
    if run.method.heads:
        with contextlib.suppress(ValueError, OSError):   # a broken first pair, a full disk
            evaluation.attention_picture(*loaded, evaluation.shard_image(shards, 0), shards.pool(0)[:3],
                                         run.out / 'attention.png')
    if run.val:
        retrieval, image_features = evaluation.evaluate(*loaded, run.val)
        figures |= retrieval
        if 'objects' in run.val.record(0):
            with contextlib.suppress(ModuleNotFoundError):  # lesson/ may have been removed
                from lesson.suppression import during_training
                figures |= during_training(*loaded, image_features, run.val, run.out, run.step)


def evaluate(run):
    """`score` on rank 0, while the others wait -> its figures. Nothing that goes wrong here ends a training."""
    figures = {}
    try:
        if run.first:
            score(run, figures)
    except Exception as error:              # a picture that fails must not end a run of weeks
        tqdm.write(f'not evaluated to the end: {type(error).__name__}, {error}')
    run.processes.share(None)
    return figures


# --- 9. Beginning and end --------------------------------------------------------------------------------------------

def announce(run):
    """What this run will do, before it does it; config.json and samples.png."""
    options = run.options
    print(f'run        {options.method}, {options.preset}, on {len(run.shards):,} pairs of '
          f'{options.data}\n           steps {run.step} to {options.steps} of {options.batch} pairs on '
          f'{run.processes.world} x {run.device} in {options.precision}, into {run.out}{LEGEND}')
    evaluation.write_json(run.out / 'config.json', asdict(options) | {'config': asdict(run.config)})
    (run.out / 'eval.json').unlink(missing_ok=True)                     # of fewer steps
    sample_sheet(run.views, run.out / 'samples.png')
    trim_log(run)


def finish(run):
    """Final figures into eval.json and log.jsonl, and what to do next."""
    figures = {'steps': run.step, 'seconds': int(time.perf_counter() - run.begun)}
    if run.first:
        score(run, figures)
        evaluation.write_json(run.out / 'eval.json', figures)
        write_log(run, {'step': run.step, 'eval': figures})
        evaluation.show(figures)
        print(f'next       python eval.py retrieval {run.out}/last.pt --shards {run.options.val or "SHARDS"}')
    run.processes.share(None)


def leave(status):
    """End the process. Of several, once all are here.

    NB: destroying the process group may hang (one exit in three with torch 2.13): freeing DDP holds Python's lock and
    waits for gloo's thread, which may be waiting for that lock.
    """
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def main():
    typed = parse_command_line()
    processes = Processes(typed.get('device', 'auto'))
    if processes.device.type == 'cpu':
        keep_memory()
    # torchrun --max-restarts counts on the node that failed only, hence the sum.
    [restarts] = processes.sum([int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))])
    run = Run(typed, processes.world, restarts) if processes.rank == 0 else None
    try:
        run = processes.share(run)
    except RuntimeError:                    # rank 0 is gone: it was refused, and has said why
        os._exit(1)
    run.start(processes)
    if run.step < run.options.steps:
        if run.first:
            announce(run)
        if train(run):
            print(f'stopped    step {run.step} is saved in {run.out}/last.pt; go on with --resume auto')
            leave(128 + signal.SIGTERM)
        finish(run)
    else:
        print(f'nothing is left to do: {run.out} has reached step {run.step} of {run.options.steps}')
        if not processes.share((run.out / 'eval.json').exists()):
            finish(run)
    leave(0)


if __name__ == '__main__':
    cli(main)
