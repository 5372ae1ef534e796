"""Train COSMOS: one step, many times, on 1 to N GPUs, resumable.

    python train.py                                             the built-in set on a laptop, in minutes
    python train.py --data /shards                              one GPU
    torchrun --nproc_per_node=8 train.py --data /shards         one node; the paper's recipe for vit-b-16
    python train.py --init CKPT --data /shards                  COSMOS put onto a CLIP that exists
    python train.py --resume runs/a                             goes on where the run in runs/a stopped

--out then holds last.pt (the checkpoint), best.pt (the networks with the best R@1 on --val), report.html (the run as a
page), log.jsonl, config.json, eval.json, samples.png (what the student sees) and, for COSMOS, attention.png. Section 6
is the step of the paper.
"""
import argparse
import contextlib
import ctypes
import fcntl
import json
import math
import os
import platform
import resource
import shutil
import signal
import sys
import time
from dataclasses import asdict, replace
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
from data import cli, half_of, loader, replacing

# --- 1. The methods of Table 5, and the options ----------------------------------------------------------------------

class Method(NamedTuple):
    """What a row of Table 5 trains with, beside L_CLIP."""
    global_images: int = 2              # the defaults are the views of cosmos; the rows above it take some away
    global_captions: int = 2            # of 1-5 sentences
    local_images: bool = True           # --local-crops more image views
    local_captions: bool = True         # --local-captions more captions, of one sentence
    distills_images: bool = False       # the student's images learn from the teacher
    distills_texts: bool = False        # the student's captions, too
    cross_attention: bool = False       # h_I and h_T learn from both: L_COSMOS


# Each row adds to the one above. Only cosmos is the released code's. The others are our reading of the table's labels.
# The rows above "text augmentation" score far below the CLIP of Table 1, so they probably had raw captions only. To do
# the same, give them --caption-pool raw.
METHODS = {
    'clip': Method(global_images=1, global_captions=1, local_images=False, local_captions=False),
    # + image augmentation
    'clip-aug': Method(global_captions=1, local_images=False, local_captions=False),
    # + image self-distillation
    'image-distill': Method(global_captions=1, local_captions=False, distills_images=True),
    # + text augmentation
    'text-crop': Method(distills_images=True),
    # + text self-distillation
    'text-distill': Method(distills_images=True, distills_texts=True),
    # + cross-attention
    'cosmos': Method(distills_images=True, distills_texts=True, cross_attention=True)}

# The paper's recipe for CC3M (released train_cc3m.sh); docs/scaling.md has those of the larger sets.
PAPER = {'epochs': 32.0, 'batch': 1024, 'lr': 5e-4, 'warmup': 2000, 'wd': 0.5, 'momentum': 0.999}
# Captions of the built-in set name colours, and own ones may name sides: a jitter or a flip would make them wrong.
LAPTOP = {
    'steps': 700, 'batch': 32, 'lr': 1e-3, 'lr_end': 0.1, 'warmup': 100, 'wd': 0.1,
    'momentum': 0.995, 'momentum_ramp': 10, 'augment': 'crops', 'vocab': 'learn'}

DTYPES = {'fp32': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}           # None: no autocast
WORKERS = min(8, os.cpu_count() // 2 or 1)


def make_parser():
    """All options. In --help a value in brackets is the default; the other numbers come from the preset's recipe."""
    parser = Parser(epilog=f'{__doc__}\nRecipe of vit-*: {PAPER}.\nOf tiny: {LAPTOP}.')
    add = parser.add_argument
    # data
    add('--data', help='shards: a folder, glob or brace pattern of tars (the built-in set)')
    add('--val', help='held-out shards, evaluated every --eval-every steps and at the end')
    add('--caption-keys', help='comma-separated json keys of the captions; see docs/data.md')
    add('--caption-pool', choices=POOLS, default='all', help="of DreamLIP's captions (%(default)s)")
    add('--vocab', default='clip', help="%(default)s, learn (from the captions), or a path to merges")
    add('--workers', type=int, default=WORKERS, help='loaders per process (%(default)s)')
    # method
    sizes = ', '.join(f'{name} {config.image_size} px' for name, config in PRESETS.items())
    add('--preset', choices=PRESETS, help=f'{sizes} (vit-b-16 with --data, else tiny)')
    add('--method', choices=METHODS, default='cosmos', help='row of Table 5 (%(default)s)')
    add('--init', help='weights to start from, ours or others; they set sizes and vocabulary')
    add('--quick-gelu', action='store_true', help="of --init: OpenAI's activation, where no file says it")
    add('--local-crops', type=int, default=6, help='local image views per pair (%(default)s)')
    add('--local-captions', type=int, default=6, help='local captions per pair (%(default)s)')
    add('--augment', choices=['full', 'crops'], default='full', help='full: with flips and colours')
    # schedule
    add('--steps', type=int, help='optimizer steps in all')
    add('--epochs', type=float, help='passes over the data; wins over --steps')
    add('--batch', type=int, help='pairs per step, over all processes and --accum')
    add('--accum', type=int, default=1, help='parts a batch is cut into, for memory (%(default)s)')
    add('--lr', type=float, help='peak learning rate')
    add('--lr-end', type=float, default=0.0, help='share of the peak at the end (%(default)s)')
    add('--warmup', type=int, help='steps of linear warm-up before the cosine')
    add('--wd', type=float, help='weight decay of matrices; vectors and scales have none')
    add('--momentum', type=float, help='lambda of the teacher')
    add('--momentum-ramp', type=int, default=0, help='R: lambda is at most s / (s + R)')
    add('--clip-grad', type=float, default=0.0, help='largest norm of the gradient; 0: none')
    add('--seed', type=int, default=0, help='of everything random (%(default)s)')
    # machine
    add('--precision', choices=['auto', *DTYPES], default='auto', help='auto: bf16 if fast')
    add('--device', choices=['auto', 'cuda', 'cpu'], default='auto', help='auto: cuda if found')
    add('--compile', action='store_true', help='torch.compile, for GPUs: on CPUs it gains nothing')
    add('--grad-checkpoint', action='store_true', help='less memory, one more forward pass')
    # output
    add('--out', help='folder of checkpoint, log and pictures (runs/PRESET-METHOD)')
    add('--resume', help="a checkpoint, a run's folder, or auto: that in --out, or a fresh start")
    add('--save-every', type=int, default=1000, help='steps between checkpoints (%(default)s)')
    add('--save-minutes', type=float, default=30.0, help='or minutes; 0: steps only (%(default)s)')
    add('--eval-every', type=int, help='steps between evaluations; 0: at the end (a tenth of the run)')
    add('--log-every', type=int, default=20, help='steps between log lines (%(default)s)')
    return parser


def parse_command_line(argv=None):
    """-> what was typed, and the defaults of all options, {name: value} each; None where an option has no default.

    What was typed must be known by itself: it overrules the recipe, and the options of a run that is resumed.
    """
    parser = make_parser()
    defaults = vars(parser.parse_args([]))
    # argparse puts a default only where the namespace has no such name.
    blank = argparse.Namespace(**dict.fromkeys(defaults))
    options = vars(parser.parse_args(argv, blank))
    typed = {name: value for name, value in options.items() if value is not None}
    return typed, defaults


# The least allowed value of a number is 0, except:
LEAST = {'steps': 1, 'batch': 2, 'accum': 1, 'save_every': 1, 'log_every': 1}
MOST = {'lr_end': 1, 'momentum': 1}


def check_ranges(options):
    """ValueError for a number that cannot be meant."""
    for name, value in vars(options).items():
        low = LEAST.get(name, 0)
        high = MOST.get(name, math.inf)
        if isinstance(value, (int, float)) and not low <= value <= high:
            flag = name.replace('_', '-')
            raise ValueError(f'--{flag} {value} is out of range; give {low} to {high}')


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
                raise ValueError(f'process {local} of this node has no GPU; lower --nproc_per_node')
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
    with contextlib.suppress(Exception):                                # only glibc has it
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
    """torch.compile block by block, in place, so that parameters keep their names. One graph serves all layers and all
    lengths of captions; the whole model would be compiled again for each length."""
    # All blocks share their code, and by default the compiler gives up after 8 graphs of it.
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
    last = out / 'last.pt'
    if not resume or (resume == 'auto' and not last.exists()):
        return None, {}
    path = last if resume == 'auto' else Path(resume)
    if path.is_dir():
        path = path / 'last.pt'
    saved = evaluation.read_checkpoint(path)
    if 'shards' not in saved:
        raise ValueError(f'{path} holds no run to resume, or one of an older version; see --init')
    return path, saved


def combine_options(typed, defaults, resumed, preset):
    """Defaults, the preset's recipe, the resumed run's options, what was typed: the last wins. Says what changes."""
    for name in ('preset', 'method'):
        if name in typed and typed[name] != resumed.get(name, typed[name]):
            raise ValueError(f'this run was started with --{name} {resumed[name]}, not {typed[name]}; give '
                             'the same to resume it, or another --out')
    chosen = {'preset': preset, 'method': defaults['method'], **resumed, **typed}
    recipe = dict(LAPTOP if chosen['preset'] == 'tiny' else PAPER)
    if chosen['method'] == 'clip':
        recipe['augment'] = 'crops'
    options = argparse.Namespace(**defaults | recipe | chosen)
    check_ranges(options)
    if 'epochs' in typed:
        options.steps = None                                # Run derives them from epochs
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
    whole = options.data
    options.data = half_of(whole, 'train')
    if options.val is None and options.data != whole:
        options.val = whole
    if options.val:
        options.val = half_of(options.val, 'val')


LEARNED_VOCAB = 8192
PAIRS_TO_LEARN = 20_000         # about so many teach the merges: enough for every frequent word


def choose_model(options, shards):
    """-> Config, tokenizer and weights of a fresh start: those of --init, or the preset's, --vocab's and none."""
    path = None if options.vocab in ('clip', 'learn') else options.vocab
    weights = {}
    if options.init:
        model, tokenizer, _ = evaluation.load(
            options.init, vocab=path, quick_gelu=options.quick_gelu)
        config = model.config
        weights = model.state_dict()
    else:
        config = PRESETS[options.preset]
        if options.vocab == 'learn':
            captions = []
            for i in range(0, len(shards), len(shards) // PAIRS_TO_LEARN or 1):
                with contextlib.suppress(ValueError):       # a broken pair is reported in its turn
                    captions += shards.pool(i)
            tokenizer = Tokenizer.learn(captions, LEARNED_VOCAB, config.context_length)
        else:
            tokenizer = Tokenizer.clip(path, config.context_length)
        config = replace(config, vocab_size=tokenizer.vocab_size)
    heads = 0
    if METHODS[options.method].cross_attention:           # a plain CLIP of --init gets new ones
        heads = config.cross_heads or (8 if config.embed_dim >= 256 else 4)
    return replace(config, cross_heads=heads), tokenizer, weights


def this_job():
    """What tells one job of torchrun from another: on a node all its processes, restarted or not, have one parent."""
    return f'{platform.node()} {os.getppid()}'


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
                             '--data, --val, --init or --resume; give another --out')
        number = 1
        while Path(f'{out}-{number}').exists():
            number += 1
        out.rename(f'{out}-{number}')
        print(f'note       the run that lay in {out} is now in {out}-{number}')
    out.mkdir(parents=True, exist_ok=True)
    lock_folder(out)


def resume_after_restart(out):
    """'auto' where this job left a checkpoint in --out before torchrun restarted it, else None: it starts again.

    ValueError where the folder is another job's: its run must not be taken for ours.
    """
    if not (out / 'last.pt').exists():
        return None
    if evaluation.read_json(out / 'config.json').get('job') != this_job():
        raise ValueError(f'{out} holds a run that this job did not start on this machine; '
                         'add --resume auto to go on with it, or give another --out')
    return 'auto'


MOST_PASSES = 30        # over a small set of one's own: by then it is known by heart

# --- 5. The run ------------------------------------------------------------------------------------------------------

class Run:
    """Everything of one training run.

    Rank 0 checks the options and reads the headers (__init__), all ranks get a copy, and each builds its model (start).
    """

    def __init__(self, typed, defaults, world, restarted):
        """Everything that can be refused is refused here, before claim_folder, the first that touches --out."""
        preset = typed.get('preset', 'vit-b-16' if 'data' in typed else 'tiny')
        resume = typed.pop('resume', None)
        if resume not in (None, 'auto'):
            folder = Path(resume) if Path(resume).is_dir() else Path(resume).parent
            typed.setdefault('out', str(folder))
        self.out = Path(typed.get('out', f"runs/{preset}-{typed.get('method', 'cosmos')}"))
        if restarted and not resume:
            resume = resume_after_restart(self.out)
        self.checkpoint, saved = find_checkpoint(resume, self.out)
        self.options = options = combine_options(typed, defaults, saved.get('options', {}), preset)
        options.out = str(self.out)
        self.method = METHODS[options.method]
        self.open_shards()
        # Only to check that --batch fits.
        Order(len(self.shards), options.batch, start=0, stop=1, world=world * options.accum)
        self.choose_lengths(typed, saved)
        self.weights = {}                                               # to start from
        if options.init and not saved and 'lr' not in typed:
            print(f'note       --lr {options.lr} is for training from nothing; with --init try 1e-5')
        if not saved:
            self.config, self.tokenizer, self.weights = choose_model(options, self.shards)
        elif saved['shards'] == self.shards.fingerprint:
            self.config = Config(**saved['config'])
            self.tokenizer = Tokenizer(saved['merges'], self.config.context_length)
        else:
            raise ValueError(f'this run was started on other shards or pairs than the {len(self.shards):,} '
                             f'of {options.data}; give the same --data, or start anew with --init')
        local_images = options.local_crops if self.method.local_images else 0
        local_captions = options.local_captions if self.method.local_captions else 0
        counts = self.method.global_images, local_images, self.method.global_captions, local_captions
        self.views = Views(self.shards, self.tokenizer, self.config, options.seed, options.batch,
                           counts, options.augment)
        sources = f'{options.data}::{options.val}::{options.init}::{self.checkpoint}'
        claim_folder(self.out, self.checkpoint, sources)
        self.shards.save(self.out)
        if self.val:
            self.val.save(self.out)

    def choose_lengths(self, typed, saved):
        """--steps from --epochs, and --eval-every, where they were not given."""
        options = self.options
        per_epoch = len(self.shards) // options.batch
        if options.steps is None:
            options.steps = round(options.epochs * per_epoch) or 1
        if options.preset == 'tiny' and not saved and not typed.keys() & {'steps', 'epochs'}:
            options.steps = min(options.steps, MOST_PASSES * per_epoch)
            options.warmup = typed.get('warmup', min(options.warmup, options.steps // 7))
        if options.eval_every is None:
            options.eval_every = 0
            # To train on a pair costs at least three times what it costs to evaluate one.
            if self.val and 30 * options.steps * options.batch < 1000 * len(self.val):
                print('note       ten evaluations on --val could take over a tenth of this run: the only one is at '
                      'its end; --eval-every gives more')
            elif self.val and 'data' in typed:          # the built-in set is evaluated at its end alone
                options.eval_every = options.steps // 10 or 1

    def open_shards(self):
        options = self.options
        keys = options.caption_keys or POOLS[options.caption_pool]
        self.shards = Shards(options.data, keys, cache=self.out)
        self.val = None
        if options.val:
            self.val = Shards(options.val, options.caption_keys, cache=self.out)
            evaluation.shard_captions(self.val)                 # better refused now than at the end
            both = set(self.shards.paths) & set(self.val.paths)
            if both:
                print(f'WARNING    {len(both)} shards are in --data and in --val')

    def start(self, processes):
        """Build the model and all that goes with it, on this rank."""
        options = self.options
        self.processes = processes
        self.device = processes.device
        self.first = processes.rank == 0
        options.precision, self.dtype = choose_precision(options.precision, self.device)
        torch.manual_seed(options.seed)                      # all ranks start from the same weights
        self.model = COSMOS(self.config).to(self.device)
        # Of --init, perhaps without cross-attention, or with one that this model lacks; {} without --init.
        missing = self.model.load_state_dict(self.weights, strict=False).missing_keys
        self.init_note = '; cross-attention starts fresh' if missing else ''
        del self.weights
        self.teacher = Teacher(self.model) if self.method.distills_images else None
        self.model.visual.transformer.grad_checkpointing = options.grad_checkpoint
        self.model.text.transformer.grad_checkpointing = options.grad_checkpoint
        self.optimizer = make_optimizer(self.model, options.lr, options.wd)
        # The usual start, 65,536, would overflow many times before it settles.
        fp16 = options.precision == 'fp16'
        self.scaler = torch.amp.GradScaler(self.device.type, 1024.0, enabled=fp16)
        self.step = 0
        self.pairs = 0                                       # seen, in steps of any size
        self.best = -1.0, 0                                  # mean R@1 on --val, and its step
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
        self.pairs = saved['pairs']
        self.best = tuple(saved['best'])
        self.begun -= saved['seconds']
        # Seconds tell one checkpoint from another.
        if self.processes.share(saved['seconds']) != saved['seconds']:
            raise ValueError(f'{path} is not what process 0 goes on from; let all nodes see the same --out')

    def save(self):
        """last.pt, whole or not at all. ValueError where the disk is full, or where the weights are not finite."""
        if not self.first:
            return
        state = self.networks() | {
            'options': vars(self.options),
            'shards': self.shards.fingerprint,
            'pairs': self.pairs,
            'best': self.best,
            'seconds': time.perf_counter() - self.begun,
            'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict()}
        last = self.out / 'last.pt'
        if not all(weights.isfinite().all() for weights in state['student'].values()):
            raise ValueError(f'the weights are not finite after step {self.step}, so they are not saved; go on '
                             f'from an earlier step by --resume {last} and a lower --lr or --precision fp32')
        with replacing(last) as partial:
            torch.save(state, partial)
        self.saved_at = time.perf_counter()

    def networks(self):
        """What evaluation needs, and best.pt holds."""
        state = {
            'config': asdict(self.config),
            'merges': self.tokenizer.merges,
            'step': self.step,
            'student': self.model.state_dict()}
        if self.teacher:
            state['teacher'] = self.teacher.model.state_dict()
        return state

    def keep_best(self, retrieval):
        """One line of R@1, and best.pt where the mean of both ways is the best so far."""
        to_text = retrieval['image_to_text_R@1']
        to_image = retrieval['text_to_image_R@1']
        mean = (to_text + to_image) / 2
        if mean > self.best[0]:
            self.best = mean, self.step
            with replacing(self.out / 'best.pt') as partial:
                torch.save(self.networks(), partial)
        tqdm.write(f'eval       step {self.step}  R@1 {to_text:.1%} image to text, {to_image:.1%} text to image, '
                   f'mean {mean:.1%}  best {self.best[0]:.1%} at step {self.best[1]}')

    def check_space(self):
        """ValueError where the disk has no room for last.pt and best.pt, each twice while it is written."""
        weights = sum(p.nbytes for p in self.model.parameters())
        networks = 2 if self.teacher else 1
        needed = 2 * weights * (networks + 2 + networks)    # 2: AdamW's averages, in last.pt
        free = shutil.disk_usage(self.out).free
        if free < needed:
            raise ValueError(f'{self.out} has {free / 1e6:,.0f} MB free, and the checkpoints of this run need '
                             f'{needed / 1e6:,.0f} MB; make room, or give another --out')


# --- 6. One step -----------------------------------------------------------------------------------------------------

class Step(NamedTuple):
    """What a step has computed, for the log."""
    out: Output                 # of the student
    cls_t: torch.Tensor         # of the teacher, (2, B, D); None without one
    clip: torch.Tensor          # L_CLIP
    terms: dict                 # of self-distillation, by name
    loss: torch.Tensor          # L_CLIP + the mean of the terms
    norm: torch.Tensor          # of the gradient
    finite: bool                # else the model was not updated


def train_step(run, batch):
    """One step of training -> Step. Student, teacher, two losses, backward; if all is finite, update."""
    method = run.method
    model = run.model
    images = batch.views()                                              # V tensors (B, 3, s, s)
    # Caption 0 comes at full length, because C^T reads its padding, too. Everything else reads it cut.
    global_texts = [ids[:, :batch.longest] for ids in batch.texts[:2]]
    if method.cross_attention:
        texts = batch.texts                                             # U tensors (B, T_u)
    else:
        texts = [*global_texts, *batch.texts[2:]]
    run.optimizer.zero_grad()

    # The student sees all views and captions, the teacher the two globals, without gradient.
    cls_t = eot_t = None
    with torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not None):
        out = run.student(images, texts)
        if run.teacher:
            cls_t, eot_t = run.teacher(images[:2], global_texts if method.distills_texts else None)

    # Two losses of equal weight: L_CLIP, and the mean of the terms, 0 where there are none.
    clip = clip_loss(out, model.logit_scale.exp())
    terms = distill_terms(method, model, out, cls_t, eot_t)
    loss = clip + sum(terms.values()) / max(len(terms), 1)
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])

    # A step that is not finite on one rank is left out by all.
    [broken_ranks] = run.processes.sum([~torch.isfinite(loss + norm)])
    if broken_ranks:
        run.scaler.update()                                 # fp16: a lower scale for the next step
    else:
        update(run, norm)
    return Step(out, cls_t, clip, terms, loss, norm, not broken_ranks)


def update(run, norm):
    """Optimizer, scales, average: the end of a step."""
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


def distill_terms(method, model, out, cls_t, eot_t):
    """The terms of self-distillation by name: with cross-attention the four of Eq. 6, for CLIP none.

    The rows of Table 5 between them have no cross-attention. The paper's loss for them is not known to us. Ours is that
    of Eq. 6 with the embeddings themselves in place of h_I and h_T, each against the teacher of its own modality.
    """
    if method.cross_attention:
        return cosmos_terms(out, cls_t, eot_t, model.distill_logit_scale.exp())
    scale = model.logit_scale.exp()             # without cross-attention there is no second one
    terms = {}
    if method.distills_images:
        all_cls, all_cls_t = gather(out.cls, cls_t)
        terms['cls_cls_t'] = symmetric_nce(out.cls, cls_t, all_cls, all_cls_t, scale)
    if method.distills_texts:
        all_eot, all_eot_t = gather(out.eot, eot_t)
        terms['eot_eot_t'] = symmetric_nce(out.eot, eot_t, all_eot, all_eot_t, scale)
    return terms


class Student(torch.nn.Module):
    """The model, run on --accum parts of a batch. DistributedDataParallel goes around it, and sees one forward pass.

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
        image_parts = zip(*[view.chunk(self.accum) for view in images])     # V views in each part
        text_parts = zip(*[text.chunk(self.accum) for text in texts])       # U captions in each
        outs = []
        for part in zip(image_parts, text_parts):
            outs.append(checkpoint(self.model, *part, use_reentrant=False))
        joined = []
        for parts in zip(*outs):                                            # cls, eot, h_I, h_T
            joined.append(None if parts[0] is None else torch.cat(parts, dim=1))
        return Output(*joined)


# --- 7. The log ------------------------------------------------------------------------------------------------------

class Meter:
    """Since the last log line: steps, time, how much of it went into waiting for data, and the finite losses."""

    def __init__(self):
        self.restart()

    def restart(self):
        self.begun = time.perf_counter()
        self.waited = 0.0
        self.steps = 0
        self.losses = []

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
def describe(run, meter, done):
    """The log entry of the Step just done: {name: number}, means over all ranks. Every rank must call it."""
    options = run.options
    cls = done.out.cls[0]                                               # (B, D)
    nearest = (cls @ done.out.eot[0].T).argmax(dim=1)
    seconds = time.perf_counter() - meter.begun
    values = {
        'epoch': run.pairs / len(run.shards),
        'loss': done.loss,
        'mean_loss': torch.stack(meter.losses).mean(),
        'clip': done.clip,
        'distill': done.loss - done.clip,
        **done.terms,
        'chance': math.log(options.batch),
        'accuracy': (nearest.cpu() == torch.arange(len(nearest))).double().mean(),
        'spread': cls.std(dim=0).norm(),
        'lr': lr_at(run.step - 1, options),
        'grad_norm': done.norm,
        'pairs_per_s': meter.steps * options.batch / seconds,
        'waiting': meter.waited / seconds,
        'memory_GB': peak_memory(run.device),
        **dict(zip(('scale', 'distill_scale'), torch.stack(run.model.scales()).exp()))}
    if run.teacher:
        values['momentum'] = momentum_at(run.step - 1, options)
        values['cosine'] = (cls * done.cls_t[0]).sum() / len(cls)
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
    """An entry to log.jsonl, and the numbers to watch to the terminal; rank 0's."""
    if not run.first:
        return
    with open(run.out / 'log.jsonl', 'a') as file:
        file.write(json.dumps(entry) + '\n')
    if 'loss' in entry:
        left = (run.options.steps - run.step) * run.options.batch / entry['pairs_per_s']
        tqdm.write('step {step}  loss {mean_loss:.3f}  clip {clip:.3f}  distill {distill:.3f}  accuracy {accuracy:.0%}'
                   '  lr {lr:.1e}  {pairs_per_s:.0f} pairs/s  '.format(**entry)
                   + f'{timedelta(seconds=int(left))} left')


# --- 8. The loop -----------------------------------------------------------------------------------------------------

MOST_BROKEN = 5         # steps in a row whose loss or gradient is not finite


def check_health(run, done, broken, bad, seen):
    """Ends a run with too many bad pairs, or broken steps in a row. All ranks have the same counts, so they end it
    together."""
    reason = None
    if bad > max(0.05 * seen, 10):
        reason = (f'over 5 % of the pairs cannot be read ({bad:.0f} of {seen}); see the lines above, and '
                  'python -m extras.prepare inspect')
    if broken:
        tqdm.write(f'WARNING    step {run.step} is left out: loss {done.loss:.4g}, gradient norm {done.norm:.4g}')
    if broken == MOST_BROKEN:
        reason = (f'{broken} steps in a row were not finite, the last is step {run.step}; go on from before them by '
                  f'--resume {run.out} and a lower --lr or --precision fp32')
    if reason:
        run.save()
        run.processes.share(None)       # rank 0 saves: if another leaves first, torchrun kills it
        raise ValueError(reason)


def train(run):
    """Take the steps that are left -> True where a signal ended it sooner. Either way the last step is saved."""
    options = run.options
    caught = []
    stop = False
    # Steps in a row that were not finite, pairs that cannot be read, all pairs.
    broken = bad = seen = 0
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: caught.append(number))
    meter = Meter()
    order = Order(len(run.shards), options.batch, run.step, options.steps, options.seed,
                  run.processes.rank, run.processes.world)
    # Half precision is faster with captions of multiples of 8 tokens.
    batches = iter(loader(run.views, order, options.workers, multiple=8 if run.dtype else 1))
    if options.eval_every and run.step == 0:
        write_log(run, {'step': 0, 'eval': evaluate(run)})  # what the first weights can do
        meter.restart()
    # A bar of rank 0. None: where there is a terminal.
    for _ in tqdm(range(run.step, options.steps), disable=None if run.first else True):
        batch = meter.next(batches).to(run.device)
        done = train_step(run, batch)
        run.step += 1                       # the pairs of a step that was left out count as seen
        run.pairs += options.batch
        if done.finite:
            meter.losses.append(done.loss.detach())
        signals, bad_pairs = run.processes.sum([len(caught), batch.bad])
        stop = signals > 0
        bad += bad_pairs
        seen += options.batch
        broken = 0 if done.finite else broken + 1
        check_health(run, done, broken, bad, seen)
        last = run.step == options.steps
        score_due = options.eval_every and run.step % options.eval_every == 0 and not last
        if done.finite and (run.step % options.log_every == 0 or run.step == 1 or last or score_due):
            entry = describe(run, meter, done) | {'bad_pairs': bad}
            if score_due:
                entry['eval'] = evaluate(run)
            # Before the checkpoint: a surplus line is trimmed on resume, a missing one stays missing.
            write_log(run, entry)
            meter.restart()
        seconds = time.perf_counter() - run.saved_at
        overdue = seconds > 60 * options.save_minutes > 0               # 0: never
        if stop or last or overdue or run.step % options.save_every == 0:
            run.save()
        if stop:
            break
    for number in SIGNALS:                               # nothing left to lose: a signal may end it
        signal.signal(number, signal.SIG_DFL)
    return stop


@contextlib.contextmanager
def for_the_report():
    """report.html and samples.png are extras: where one fails a line says so, without extras/ there are none."""
    try:
        yield
    except ModuleNotFoundError:
        pass
    except Exception as error:
        tqdm.write(f'WARNING    report.html or samples.png lacks a part: {type(error).__name__}, {error}')


def score(run, figures):
    """Figures of the held-out shards, into the dict as they come, and attention.png: the first pair and its captions.

    They are the teacher's, where there is one.
    """
    shards = run.val or run.shards
    model = run.teacher.model if run.teacher else run.model
    # as evaluation.load returns them
    loaded = model, run.tokenizer, Preprocess(run.config.image_size)
    if run.method.cross_attention:
        with contextlib.suppress(ValueError, OSError):   # a broken first pair, a full disk
            evaluation.attention_picture(*loaded, evaluation.shard_image(shards, 0), shards.pool(0)[:3],
                                         run.out / 'attention.png')
    if run.val:
        retrieval, image_features, text_features = evaluation.evaluate(*loaded, run.val)
        figures |= retrieval
        if 'objects' in run.val.record(0):
            with contextlib.suppress(ModuleNotFoundError):  # lesson/ may have been removed
                from lesson.suppression import during_training
                figures |= during_training(*loaded, image_features, run.val, run.out, run.step)
        with for_the_report():
            from extras.report import store
            store(*loaded, run.val, image_features, text_features, run.out, run.step)


def evaluate(run):
    """`score` on rank 0, while the others wait -> its figures. Nothing that goes wrong here ends a training."""
    figures = {}
    try:
        if run.first:
            score(run, figures)
            run.keep_best(figures['retrieval'])
    except Exception as error:              # a picture that fails must not end a run of weeks
        tqdm.write(f'WARNING    the evaluation failed: {type(error).__name__}, {error}')
    run.processes.share(None)
    return figures


# --- 9. Beginning and end --------------------------------------------------------------------------------------------

def announce(run):
    """What this run will do, before it does it; config.json and samples.png."""
    options = run.options
    run.check_space()
    passes = options.steps * options.batch / len(run.shards)
    sizes = ', '.join(f'{name} {value}' for name, value in asdict(run.config).items())
    print(f'run        {options.method}, {options.preset}, on {len(run.shards):,} pairs of {options.data}\n'
          f'           steps {run.step} to {options.steps} of {options.batch} pairs, {passes:.1f} passes, peak lr '
          f'{options.lr}\n'
          f'           on {run.processes.world} x {run.device} in {options.precision}, into {run.out}\n'
          f'model      {sum(p.numel() for p in run.model.parameters()):,} parameters: {sizes}')
    if options.init:
        print(f'init       {options.init}{run.init_note}')
    if not run.val:
        print('note       nothing is held out, so overfitting cannot be seen; python -m extras.prepare pack --val 0.1 '
              'holds a tenth out')
    evaluation.write_json(run.out / 'config.json', vars(options) | {'config': asdict(run.config), 'job': this_job()})
    (run.out / 'eval.json').unlink(missing_ok=True)                     # of an earlier step
    with for_the_report():
        from extras.prepare import sample_sheet
        from extras.report import begin
        sample_sheet(run.views, run.out / 'samples.png')
        begin(run.views, run.out)
    trim_log(run)


def finish(run):
    """Final figures into eval.json and log.jsonl, and what to do next."""
    figures = {'steps': run.step, 'seconds': int(time.perf_counter() - run.begun)}
    if run.first:
        score(run, figures)
        evaluation.write_json(run.out / 'eval.json', figures)
        write_log(run, {'step': run.step, 'eval': figures})
        evaluation.show(figures)
        with for_the_report():
            from extras.report import write
            print(f'report     {write([run.out])}')
        if run.val:
            run.keep_best(figures['retrieval'])
            name = 'best.pt' if run.best[1] < run.step else 'last.pt'
            print(f'next       the best networks are in {name}: python eval.py retrieval {run.out}/{name} '
                  f'--shards {run.options.val}')
    run.processes.share(None)


def leave(status):
    """End the process; of several processes, when all have come here.

    NB: destroying the process group may hang (one exit in three with torch 2.13): freeing DDP holds Python's lock and
    waits for gloo's thread, which may be waiting for that lock.
    """
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def main():
    typed, defaults = parse_command_line()
    processes = Processes(typed.get('device', 'auto'))
    if processes.device.type == 'cpu':
        keep_memory()
    # torchrun --max-restarts counts on the node that failed only, hence the sum.
    [restarts] = processes.sum([int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))])
    run = Run(typed, defaults, processes.world, restarts) if processes.rank == 0 else None
    try:
        run = processes.share(run)
    except RuntimeError:                    # rank 0 is gone: it was refused, and has said why
        os._exit(1)
    run.start(processes)
    if run.step < run.options.steps:
        if run.first:
            announce(run)
        if train(run):
            print(f'stopped    step {run.step} is saved; go on by python train.py --resume {run.out}')
            leave(128 + signal.SIGTERM)
        finish(run)
    else:
        print(f'nothing is left to do: {run.out} has reached step {run.step} of {run.options.steps}')
        if not processes.share((run.out / 'eval.json').exists()):
            finish(run)
    leave(0)


if __name__ == '__main__':
    cli(main)
