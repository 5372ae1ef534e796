"""Train COSMOS: one step, many times, on 1 to N GPUs, resumable.

    python train.py                                             the built-in set on a laptop, in minutes
    torchrun --nproc_per_node=8 train.py --data /shards         vit-b-16, the paper's recipe, on eight GPUs
    python train.py --data /shards --accum 8                    the same on one, whose memory holds an eighth of a batch
    python train.py --init CKPT --data /shards                  COSMOS put onto a CLIP that exists
    python train.py --resume runs/a                             goes on where the run in runs/a stopped

--out then holds last.pt (the checkpoint), best.pt (the networks with the best R@1 on --val), report.html (the run as a
page; maps.npz has its pictures), log.jsonl, config.json, eval.json and index.npy (of the shards).

Sections 1 and 2 are the paper's: the rows of Table 5, and one step. `main`, at the end, is the run from top to bottom.
"""
import os

if __name__ == '__main__':
    # OpenMP: let idle threads sleep, not spin. torch reads it when it is imported.
    os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

import argparse
import contextlib
import ctypes
import json
import math
import resource
import shutil
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import eval as evaluation
from cosmos import COSMOS, GLOBALS, PRESETS, Config, Output, Teacher, total_loss
from data import Refused, Shards, Tokenizer

HERE = Path(__file__).parent

# --- 1. The methods of Table 5 ---------------------------------------------------------------------------------------

class Method(NamedTuple):
    """A row of Table 5: what the student sees, and what it learns beside L_CLIP."""
    global_images: int
    global_texts: int               # captions of 1-5 sentences
    local_images: bool              # adds as many local image views as --local-crops says
    local_texts: bool               # adds as many captions of one sentence as --local-captions says
    crop_min: float                 # smallest share of the image in a global crop
    augments: bool                  # changes colours and flips, unless --augment says crops
    distills_images: bool           # images learn from the teacher
    distills_texts: bool            # captions, too
    cross_attention: bool           # h_I and h_T learn from both: L_COSMOS


# Each row adds to the one above. Only the first and the last are the released code's: clip has open_clip's own crop,
# and no colours (transform.py:66). The others are our reading of the table's labels. In the paper the first three score
# far below the CLIP of its Table 1, so they probably had raw captions only: give them --caption-pool raw.
G = GLOBALS
METHODS = {
    #                  global  global  local   local   crop   augments  distills distills  cross-
    #                  images  texts   images  texts   min              images   texts     attention
    'clip':          Method(1,      1, False,  False,  0.9,   False,    False,   False,    False),
    'clip-aug':      Method(G,      1, False,  False,  0.4,   True,     False,   False,    False),
    'image-distill': Method(G,      1, True,   False,  0.4,   True,     True,    False,    False),
    'text-crop':     Method(G,      G, True,   True,   0.4,   True,     True,    False,    False),
    'text-distill':  Method(G,      G, True,   True,   0.4,   True,     True,    True,     False),
    'cosmos':        Method(G,      G, True,   True,   0.4,   True,     True,    True,     True)}

# --- 2. One step -----------------------------------------------------------------------------------------------------

@dataclass
class Run:
    """What a step needs and changes."""
    options: argparse.Namespace
    processes: 'Processes'
    train_set: data.Crops           # has the model's Config and the tokenizer, too
    student: COSMOS
    forward: torch.nn.Module        # the student in InParts, and on several GPUs in DistributedDataParallel
    teacher: Teacher                # None where nothing is distilled, unless main(keep_teacher=True)
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    dtype: torch.dtype              # of autocast; None: float32
    make_order: object              # data.Order, or what makes one in its place: which pairs make each batch
    step: int = 0
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
    """One step of training -> Step. Student, teacher, loss, backward; if all is finite, update."""
    # V tensors (B, 3, s, s). The loader has cropped them, and has drawn how strongly each colour jitter acts. The jitters
    # run here, in an order that this string seeds, the same on all ranks.
    images = batch.views(f'{run.options.seed} {run.step}')
    run.optimizer.zero_grad()

    # The student sees all views and captions, the teacher the globals, without gradient. Caption 0 comes twice: at full
    # length for the student, whose C^T reads the padding, and cut, as all other captions are, for the teacher.
    cls_t = eot_t = None
    with torch.autocast(run.processes.device.type, run.dtype, enabled=run.dtype is not None):
        out = run.forward(images, batch.texts)
        if run.method.distills_images:              # no method distils captions alone
            captions = batch.teacher_texts if run.method.distills_texts else None
            cls_t, eot_t = run.teacher(images[:GLOBALS], captions)

    loss, parts = total_loss(run.student, out, cls_t, eot_t)
    # DDP averages all gradients. (Those of the scales, too, though total_loss and not run.forward uses them: DDP's hooks
    # are on the parameters.)
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    gradients = [p.grad for p in run.student.parameters() if p.grad is not None]    # None: frozen
    norm = torch.nn.utils.get_total_norm(gradients)

    # A step that is not finite on one rank is left out by all.
    finite = torch.isfinite(loss) & torch.isfinite(norm)
    [broken_ranks] = run.processes.sum([~finite])
    if broken_ranks == 0:
        update(run, norm)
    else:
        run.scaler.update()     # fp16: unscale_ saw the infinity, so this lowers the scale
        tqdm.write(f'WARNING    step {run.step + 1} is left out: loss {loss:.4g}, gradient norm {norm:.4g}')
    return Step(out, cls_t, loss, parts, norm, broken_ranks == 0)


def update(run, norm):
    """Optimizer, scales, average: the end of a step."""
    options = run.options
    for group in run.optimizer.param_groups:
        group['lr'] = lr_at(run.step, options)
    if options.clip_grad:
        torch.nn.utils.clip_grads_with_norm_(run.student.parameters(), options.clip_grad, norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.student.clamp_scales()
    if run.teacher:
        run.teacher.update(run.student, momentum_at(run.step, options))


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
        joined = []
        for pieces in zip(*outs):    # of cls, of eot, of h_I, of h_T
            joined.append(None if pieces[0] is None else torch.cat(pieces, dim=1))
        return Output(*joined)


# Schedules are pure functions of the step, which counts from 0.

def lr_at(step, options):
    """Linear warm-up to the peak, then a cosine to its share lr_end, 0 as released (scheduler.py:43-53)."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    progress = (step - options.warmup) / max(options.steps - options.warmup, 1)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return options.lr * (options.lr_end + (1 - options.lr_end) * cosine)


def momentum_at(step, options):
    """The teacher's lambda. A fixed one would not forget the random start within a short run, hence the ramp."""
    done = step + 1
    return min(options.momentum, done / (done + options.momentum_ramp))


def make_optimizer(student, lr, wd):
    """AdamW; no decay for vectors (LayerNorm, biases) and the two scales (main.py:373-392 of the released code)."""
    matrices = {'params': [p for p in student.parameters() if p.ndim > 1], 'weight_decay': wd}
    vectors = {'params': [p for p in student.parameters() if p.ndim < 2], 'weight_decay': 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=lr, betas=(0.9, 0.98), fused=True)


# --- 3. Options ------------------------------------------------------------------------------------------------------

# How many this process may use: of a job of Slurm less than the machine has. (Only Linux tells.)
CORES = len(os.sched_getaffinity(0)) if sys.platform == 'linux' else os.cpu_count()
DTYPES = {'fp32': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}           # None: no autocast


def make_parser():
    """All options. In --help a value in brackets is the default, where the preset's recipe has no other."""
    recipes = ''.join(f'\n{name}: {preset.recipe}' for name, preset in PRESETS.items())
    parser = data.Parser(usage='%(prog)s [options]', epilog=f'{__doc__}\nRecipes:{recipes}')
    add = parser.add_argument
    # data
    add('--data', nargs='+', help='tars, or folders of them (the built-in set)')
    add('--val', nargs='+', help='held-out shards, evaluated every --eval-every steps and at the end')
    add('--caption-keys', help='comma-separated json keys of the captions; see docs/data.md')
    add('--caption-pool', choices=data.POOL_KEYS, default='all', help="of DreamLIP's captions (%(default)s)")
    add('--vocab', default='clip', help="%(default)s, learn (from the captions), or a path to CLIP's file")
    add('--workers', type=int, default=min(8, CORES // 2 or 1),
        help='processes that load data, for each GPU (%(default)s)')
    # method
    add('--preset', choices=PRESETS, help='sizes and recipe (vit-b-16 with --data, else tiny)')
    add('--method', choices=METHODS, default='cosmos', help='row of Table 5 (%(default)s)')
    add('--init', help='weights to start from, ours or others; they set sizes and vocabulary')
    add('--quick-gelu', action='store_true', help="of --init: OpenAI's activation, where no file says it")
    add('--local-crops', type=int, default=6, help='local image views per pair (%(default)s)')
    add('--local-captions', type=int, default=6, help='local captions per pair (%(default)s)')
    add('--augment', choices=['full', 'crops'], default='full', help='full: with flips and colours')
    # schedule
    add('--steps', type=int, help='optimizer steps in all')
    add('--epochs', type=float, help='passes over the data; if --steps is given too, the fewer steps count')
    add('--batch', type=int, help='pairs per step, over all processes and --accum')
    add('--accum', type=int, default=1, help='parts a batch is cut into, for memory (%(default)s)')
    add('--lr', type=float, help='peak learning rate')
    add('--lr-end', type=float, default=0.0, help='share of the peak at the end (%(default)s)')
    add('--warmup', type=int, help='steps of linear warm-up before the cosine')
    add('--wd', type=float, help='weight decay of matrices; vectors and scales have none')
    add('--momentum', type=float, help='lambda of the teacher')
    add('--momentum-ramp', type=int, default=0, help='R: at step s lambda is at most s / (s + R); 0: no ramp')
    add('--clip-grad', type=float, default=0.0, help='largest norm of the gradient; 0: none')
    add('--seed', type=int, default=0, help='of everything random (%(default)s)')
    # machine
    add('--precision', choices=['auto', *DTYPES], default='auto', help='auto: bf16 if fast')
    add('--device', choices=['auto', 'cuda', 'cpu'], default='auto', help='auto: cuda if found')
    add('--compile', action=argparse.BooleanOptionalAction, default=False, help='torch.compile, for GPUs alone')
    add('--grad-checkpoint', action=argparse.BooleanOptionalAction, default=False, help='less memory, more time')
    # output
    add('--out', help='folder of checkpoint, log and report (runs/PRESET-METHOD)')
    add('--resume', help="a checkpoint, a run's folder, or auto: that in --out, or a fresh start")
    add('--save-every', type=int, default=1000, help='steps between checkpoints (%(default)s)')
    add('--save-minutes', type=float, default=30.0, help='or minutes; 0: steps only (%(default)s)')
    add('--eval-every', type=int, help='steps between evaluations (a quarter of the run); 0: at the end only')
    add('--log-every', type=int, default=20, help='steps between log lines (%(default)s)')
    return parser


def check_ranges(options):
    """Refused: a number that cannot be meant."""
    for name, value in vars(options).items():
        least = 1 if name in ('steps', 'batch', 'accum', 'save_every', 'log_every') else 0
        most = 1 if name in ('momentum', 'lr_end') else math.inf
        if isinstance(value, (int, float)) and not least <= value <= most:
            flag = name.replace('_', '-')
            raise Refused(f'--{flag} {value} is out of range; give {least} to {most}')


def find_checkpoint(resume, out):
    """What --resume names -> path, or None for a fresh start."""
    if not resume:
        return None
    if resume == 'auto':
        path = Path(out, 'last.pt')
        return path if path.exists() else None
    path = Path(resume)
    return path / 'last.pt' if path.is_dir() else path


def read_options(argv):
    """-> options
    -> saved: the content of the checkpoint to resume, {} for a fresh start
    -> in_place: does a run go on in its own folder? Then index, log and best.pt there are its own

    1. Parse what is typed: it decides what the defaults are.
    2. Defaults: those of make_parser, over them the preset's recipe or, of a run that is resumed, all its options. Two
       exceptions: a fresh start takes its warm-up later, from choose_lengths; and if --steps or --epochs is typed, the
       other one has no default, for the fewer steps of both would count.
    3. Parse again: what is typed wins over these.
    """
    parser = make_parser()
    typed = parser.parse_args(argv)             # a first look, at what decides the defaults
    preset = typed.preset or ('vit-b-16' if typed.data else 'tiny')
    out = typed.out or f'runs/{preset}-{typed.method}'
    path = find_checkpoint(typed.resume, out)
    saved = {}
    resumed = {}                                # the options of that run
    if path:
        saved = evaluation.read_checkpoint(path)
        if 'optimizer' not in saved:            # as best.pt, which is for evaluation
            raise Refused(f'{path} holds no run to resume; to start from its weights give --init')
        resumed = dict(saved['options'])
        for name in ('out', 'resume', 'device'):    # are of this command alone
            del resumed[name]
        defaults = resumed | {'out': str(path.parent)}
    else:
        recipe = PRESETS[preset].recipe
        assert recipe.keys() <= vars(typed).keys(), f'what is no option in the recipe of {preset}?'
        defaults = recipe | {'preset': preset, 'out': out}
        defaults['warmup'] = None
        if not METHODS[typed.method].augments:
            defaults['augment'] = 'crops'
    if typed.steps or typed.epochs:             # the typed one comes back in the second parse
        defaults |= {'steps': None, 'epochs': None}
    parser.set_defaults(**defaults)
    options = parser.parse_args(argv)
    check_ranges(options)
    check_resumed(options, resumed)
    options.resume = str(path or '')            # what is meant by auto, or by a folder
    in_place = bool(path) and path.parent.resolve() == Path(options.out).resolve()
    return options, saved, in_place


def check_resumed(options, resumed):
    """Refused: a new preset, method or batch. Of every other change a line is printed. Weights and vocabulary are those of
    the checkpoint, whatever is typed."""
    for name, old in resumed.items():
        new = getattr(options, name)
        if new == old:
            continue
        if new is None:     # --steps or --epochs, if only the other one is typed
            continue
        flag = name.replace('_', '-')
        if name in ('preset', 'method', 'batch'):
            raise Refused(f'this run was started with --{flag} {old}, not {new}; give the same to resume it, or '
                          'another --out')
        note = f'was {old}, is now {new}'
        if name in ('init', 'vocab', 'quick_gelu'):
            setattr(options, name, old)
            note = 'is ignored: the checkpoint has weights and vocabulary'
        if os.environ.get('RANK', '0') == '0':
            print(f'note       --{flag} {note}')


def choose_lengths(options, pairs):
    """Fill in --steps, and --warmup and --eval-every where they are not given."""
    steps = options.steps or math.inf
    if options.epochs is not None:
        steps = min(steps, round(options.epochs * (pairs // options.batch)) or 1)
    options.steps = steps
    if options.warmup is None:                          # of a short run a tenth
        options.warmup = min(PRESETS[options.preset].recipe['warmup'], steps // 10)
    if options.eval_every is None:
        options.eval_every = math.ceil(steps / 4)


def choose_folder(options):
    """Take the first free name: a fresh start never touches a folder with a last.pt."""
    name = options.out
    number = 2
    while Path(options.out, 'last.pt').exists():
        options.out = f'{name}-{number}'
        number += 1
    if options.out != name:
        print(f'note       {name} holds a run, this one goes into {options.out}')


# --- 4. Where it runs ------------------------------------------------------------------------------------------------

class Processes:
    """The processes of this run: one, or those of torchrun, whose environment variables are the only switch."""

    def __init__(self, device):
        gpu = torch.cuda.is_available()
        if device == 'cuda' and not gpu:
            raise Refused('--device cuda: torch finds no GPU on this machine; use --device auto')
        self.device = torch.device('cuda' if gpu and device != 'cpu' else 'cpu')
        self.rank = 0
        self.world = 1
        self.patient = None             # a group of all processes that waits for days
        if 'RANK' in os.environ:
            self.join()

    def join(self):
        if self.device.type == 'cuda':
            local = int(os.environ['LOCAL_RANK'])
            if local >= torch.cuda.device_count():
                raise Refused(f'process {local} of this node has no GPU; lower --nproc_per_node')
            self.device = torch.device('cuda', local)
            torch.cuda.set_device(local)
        dist.init_process_group()    # nccl for GPUs, gloo for CPUs
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        if self.rank > 0:
            sys.stdout = open(os.devnull, 'w')    # from here on rank 0 speaks for all
        # Rank 0 reads headers and evaluates, as long as it takes. The others wait on this group: the usual one gives
        # up after minutes.
        self.patient = dist.new_group(backend='gloo', timeout=timedelta(days=7))

    def sum(self, values):
        """Numbers or scalar tensors, each summed over all processes -> list of floats."""
        tensors = [torch.as_tensor(value, dtype=torch.double, device=self.device) for value in values]
        total = torch.stack(tensors)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def broadcast(self, value):
        """Rank 0's value, on all of them."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, group=self.patient)
        return box[0]

    def wait_for_rank_0(self):
        """Other ranks wait here until rank 0 comes here, too. Rank 0 itself does not wait."""
        self.broadcast(None)

    @contextlib.contextmanager
    def rank_0_first(self):
        """The other processes enter this block when rank 0 has left it, and find the files that it wrote there. If rank 0
        is refused inside, it ends, and so do they."""
        if self.rank > 0:
            try:
                self.wait_for_rank_0()
            except RuntimeError:
                os._exit(1)                     # rank 0 is gone, and has said why
        yield
        if self.rank == 0:
            self.wait_for_rank_0()              # lets the others in

    def leave(self, status):
        """End the process. With several, each waits here until all have come.

        NB: destroying the process group may hang: freeing DDP holds Python's lock and waits for gloo's thread, which may
        be waiting for that lock.
        """
        if self.patient:
            dist.barrier(group=self.patient)
            sys.stdout.flush()
            os._exit(status)
        sys.exit(status)


def use_cores(workers):
    """On a CPU: a core for each loader, the others for this process, and freed memory stays at hand."""
    keep_memory()
    if 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(max(1, CORES - workers))


def keep_memory():
    """Have the C library keep what is freed. By itself it hands large blocks back to the system, and the next step gets
    them anew, page by page and filled with zeros: a tenth of the time of a vit-b-16 step on a CPU."""
    with contextlib.suppress(AttributeError):                           # only glibc has it
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)     # M_MMAP_MAX: no block by mmap, which goes back when freed
        libc.mallopt(-1, -1)    # M_TRIM_THRESHOLD: no other memory goes back


def choose_dtype(precision, device):
    """-> dtype of autocast, or None. A CPU that has no units for bfloat16 is slower in it than in float32."""
    if precision != 'auto':
        return DTYPES[precision]
    if device.type == 'cuda':
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # private: some versions lack them
        tests = ('_is_avx512_bf16_supported', '_is_amx_tile_supported')
        fast = any(hasattr(torch.cpu, test) and getattr(torch.cpu, test)() for test in tests)
    return torch.bfloat16 if fast else None


def compile_blocks(model):
    """torch.compile block by block, in place, so that parameters keep their names. A graph serves all layers of a tower
    and all lengths of captions; the whole model would be compiled again for each length."""
    # torch allows 8 graphs for a piece of code, and all blocks run the same piece. They need more graphs: for each tower,
    # for all rows and for one, with gradient and without.
    torch._dynamo.config.cache_size_limit = 128
    for block in [*model.visual.transformer.resblocks, *model.text.transformer.resblocks]:
        block.compile(dynamic=True)


# --- 5. Data and model -----------------------------------------------------------------------------------------------

LEARNED_VOCAB = 8192
PAIRS_TO_LEARN = 20_000     # enough for every frequent word


def name_data(options):
    """Without --data: the built-in set. If --data is one folder with train/ and val/, --val becomes the same folder:
    Shards takes train/ for --data, and val/ for --val."""
    if options.data is None:
        from lesson.scenes import built_in_set
        options.data = [str(built_in_set())]
    folder = Path(options.data[0])
    has_halves = (folder / 'train').is_dir() and (folder / 'val').is_dir()
    if options.val is None and len(options.data) == 1 and has_halves:
        options.val = options.data


def learn_merges(shards):
    """From every k-th pair: 20,000 to 40,000 of a large set, all of a small one."""
    captions = []
    for i in range(0, len(shards), len(shards) // PAIRS_TO_LEARN or 1):
        with contextlib.suppress(data.Unreadable):          # a broken pair is reported in its turn
            captions += shards.pool(i)
    return Tokenizer.learn(captions, LEARNED_VOCAB).merges


def choose_model(options, saved):
    """-> Config, tokenizer, weights to start from: of the resumed run, of --init, or of the preset and --vocab.

    The tokenizer is None where it must be learned from the captions. The weights are {} for a start from nothing.
    """
    if saved:
        config = Config(**saved['config'])
        return config, Tokenizer(saved['merges'], config.context_length), {}
    path = None if options.vocab in ('clip', 'learn') else options.vocab
    weights = {}
    tokenizer = None
    if options.init:
        model, tokenizer, _ = evaluation.load(
            options.init, vocab=path, quick_gelu=options.quick_gelu)
        config = model.config
        weights = model.state_dict()
    else:
        config = PRESETS[options.preset].sizes
        if options.vocab != 'learn':
            tokenizer = Tokenizer.clip(path, config.context_length)
    heads = 0
    if METHODS[options.method].cross_attention:
        heads = config.cross_heads
        if not heads:    # a plain CLIP gets as many as the presets
            heads = 8 if config.embed_dim >= 256 else 4
    return replace(config, cross_heads=heads), tokenizer, weights


def make_run(options, processes, train_set, weights, build, keep_teacher, make_order):
    """Model, teacher and optimizer on this process, before the first step."""
    device = processes.device
    torch.manual_seed(options.seed)                         # all ranks start from the same weights
    student = build(train_set.config).to(device)
    if weights:     # of --init, perhaps without cross-attention, or with one that this model lacks
        missing = student.load_state_dict(weights, strict=False).missing_keys
        print(f"init       {options.init}{'; cross-attention starts fresh' if missing else ''}")
    for tower in student.visual, student.text:
        tower.transformer.grad_checkpointing = options.grad_checkpoint
    teacher = None
    if METHODS[options.method].distills_images or keep_teacher:
        teacher = Teacher(student)
    optimizer = make_optimizer(student, options.lr, options.wd)
    dtype = choose_dtype(options.precision, device)
    # The usual start, 65,536, would overflow many times before it settles.
    scaler = torch.amp.GradScaler(device.type, 1024.0, enabled=dtype == torch.float16)
    forward = InParts(student, options.accum)
    return Run(options, processes, train_set, student, forward, teacher, optimizer, scaler, dtype,
               make_order)


# --- 6. Checkpoints --------------------------------------------------------------------------------------------------

def networks(run):
    """What evaluation needs, and best.pt holds."""
    state = {
        'config': asdict(run.train_set.config),
        'merges': run.train_set.tokenizer.merges,
        'step': run.step,
        'student': run.student.state_dict()}
    if run.teacher:
        state['teacher'] = run.teacher.model.state_dict()
    return state


def save(run):
    """last.pt, whole or not at all.

    Random numbers have no state to save: all come from the seed, and from the epoch and the pair, or from the step.
    """
    last = run.folder / 'last.pt'
    state = networks(run) | {
        'options': vars(run.options),
        'globals': GLOBALS,
        'shards': run.train_set.shards.fingerprint,
        'best': run.best,
        'seconds': time.perf_counter() - run.begun,
        'optimizer': run.optimizer.state_dict(),
        'scaler': run.scaler.state_dict()}
    if run.processes.rank == 0:
        data.save_tensors(last, state)


def restore(run, saved, in_place):
    """Go on from what `save` has saved."""
    path = run.options.resume
    if saved['globals'] != GLOBALS:
        raise Refused(f"{path} was trained with GLOBALS = {saved['globals']}, not {GLOBALS}; set it back in cosmos.py, "
                      'or start anew with --init')
    evaluation.load_weights(run.student, saved['student'], path)
    if run.teacher:
        evaluation.load_weights(run.teacher.model, saved['teacher'], path)
    run.optimizer.load_state_dict(saved['optimizer'])
    matrices, _ = run.optimizer.param_groups
    matrices['weight_decay'] = run.options.wd               # this command's, not the checkpoint's
    if saved['scaler']:
        run.scaler.load_state_dict(saved['scaler'])
    run.step = saved['step']
    # In another folder there is no best.pt yet, and R@1 on other data is no rival.
    if in_place and saved['options']['val'] == run.options.val:
        run.best = tuple(saved['best'])
    run.begun -= saved['seconds']
    # Has this rank read the same file as rank 0? No other checkpoint has been trained for exactly as many seconds.
    if run.processes.broadcast(saved['seconds']) != saved['seconds']:
        raise Refused(f'{path} does not hold what process 0 goes on from; let all nodes see the same --out')


def check_space(run):
    """Refused where the disk has no room for last.pt and best.pt, and for another last.pt while it is written."""
    weights = sum(p.nbytes for p in run.student.parameters())
    best = weights * (2 if run.teacher else 1)
    last = best + 2 * weights                               # and AdamW's two averages
    needed = best + 2 * last
    free = shutil.disk_usage(run.folder).free
    if free < needed:
        raise Refused(f'{run.folder} has {free / 1e6:,.0f} MB free, and the checkpoints of this run need '
                      f'{needed / 1e6:,.0f} MB; make room, or give another --out')


# --- 7. Log and figures ----------------------------------------------------------------------------------------------

def peak_memory(device):
    """Most GB so far: on the GPU, else of this process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == 'darwin' else 1e6)        # macOS counts bytes, Linux kilobytes


@torch.no_grad()
def log_entry(run, done, steps, seconds, waited):
    """The log entry of the Step just done, means over all ranks: {name: number}. Every rank must call it.

    steps: since the last entry. seconds: that they took. waited: seconds of these spent waiting for data.
    """
    options = run.options
    cls = done.out.cls[0]                                               # (B, D)
    nearest = (cls @ done.out.eot[0].T).argmax(dim=1)    # among the pairs of this GPU
    clip_weight, clip = done.parts['clip']
    terms = {name: term for name, (_, term) in done.parts.items()}
    values = {
        'loss': done.loss,
        'distill': done.loss - clip_weight * clip,                      # all of the loss but L_CLIP
        'accuracy': (nearest.cpu() == torch.arange(len(nearest))).double().mean(),
        'spread': cls.std(dim=0).norm(),    # 0 when the embeddings have collapsed
        'grad_norm': done.norm,
        'scale': run.student.logit_scale.exp(),
        'waiting': waited / seconds,
        'memory_GB': peak_memory(run.processes.device)}
    if run.method.cross_attention:
        values['distill_scale'] = run.student.distill_logit_scale.exp()
    if done.cls_t is not None:
        values['cosine'] = (cls * done.cls_t[0]).sum() / len(cls)
    used = run.step - 1    # the step whose rates were used
    entry = {                                           # the same on all ranks
        'step': run.step,
        'epoch': run.step * options.batch / len(run.train_set.shards),
        'lr': lr_at(used, options),
        'momentum': momentum_at(used, options),
        'chance': math.log(options.batch),    # of each part of the loss: a blind guess
        'weights': {name: weight for name, (weight, _) in done.parts.items()},
        'pairs_per_s': steps * options.batch / seconds}
    names = entry.keys() | values.keys()
    assert not names & terms.keys(), f'a part of the loss is called {names & terms.keys()}, as another figure of the log'
    values |= terms
    for name, total in zip(values, run.processes.sum(values.values())):
        entry[name] = total / run.processes.world
    return entry


def print_progress(run, entry):
    """The numbers to watch."""
    seconds_left = (run.options.steps - run.step) * run.options.batch / entry['pairs_per_s']
    line = ('step {step}  loss {loss:.3f}  clip {clip:.3f}  distill {distill:.3f}  '
            'accuracy {accuracy:.0%}  lr {lr:.1e}  {pairs_per_s:.0f} pairs/s'.format(**entry))
    tqdm.write(f'{line}  {timedelta(seconds=int(seconds_left))} left')


def write_log(run, entry):
    """An entry to log.jsonl. Of equal steps the last entry counts: a resumed run logs some again."""
    if run.processes.rank == 0:
        with open(run.folder / 'log.jsonl', 'a') as file:
            file.write(json.dumps(entry) + '\n')


def evaluate(run, val):
    """Rank 0 scores the held-out shards, while the others wait -> figures, {} on the others.

    The teacher is scored, where there is one. In mid-run a failure prints its traceback, and training goes on.
    """
    figures = {}
    if run.processes.rank == 0:
        figures = {'steps': run.step, 'seconds': int(time.perf_counter() - run.begun)}
    try:
        if val:
            figures |= held_out_figures(run, val)
    except Exception:
        if run.step >= run.options.steps:
            raise
        tqdm.write(traceback.format_exc())
    run.processes.wait_for_rank_0()
    return figures


def held_out_figures(run, val):
    """-> {'retrieval': ...}, and for shards that list the objects of their scenes the figures of lesson/suppression.py.

    Writes best.pt where the mean R@1 is the best so far.
    """
    model = run.teacher.model if run.teacher else run.student
    # model, tokenizer, preprocess: what eval.load returns, and all measures take
    scored = model, run.train_set.tokenizer, evaluation.preprocessing(model.config.image_size)
    retrieval, image_features = evaluation.zero_shot_retrieval(*scored, val)
    figures = {'retrieval': retrieval}
    to_text = retrieval['image_to_text_R@1']
    to_image = retrieval['text_to_image_R@1']
    mean = (to_text + to_image) / 2
    if mean > run.best[0]:
        data.save_tensors(run.folder / 'best.pt', networks(run))
        run.best = mean, run.step
    tqdm.write(f'eval       step {run.step}  R@1 {to_text:.1%} image to text, {to_image:.1%} text to image, '
               f'mean {mean:.1%}  best {run.best[0]:.1%} at step {run.best[1]}')
    if 'objects' in val.record(0) and (HERE / 'lesson').is_dir():
        from lesson.suppression import during_training
        figures |= during_training(*scored, image_features, val)
    if (HERE / 'extras').is_dir():
        from extras.report import store
        store(*scored, val, run.folder, run.step)
    return figures


def print_plan(run, val):
    """What this run will do."""
    options = run.options
    shards = run.train_set.shards
    print(f'run        {options.method}, {options.preset}, on {len(shards):,} pairs, into {run.folder}\n'
          f'           steps {run.step} to {options.steps} of {options.batch} pairs, '
          f'{options.steps * options.batch / len(shards):.1f} passes\n'
          f'           peak lr {options.lr} after {options.warmup} steps of warm-up, momentum {options.momentum} with '
          f'ramp {options.momentum_ramp}, augmentation {options.augment}\n'
          f'           on {run.processes.world} x {run.processes.device} in {run.dtype or torch.float32}, '
          f'{torch.get_num_threads()} threads and {options.workers} loaders each\n'
          f'model      {sum(p.numel() for p in run.student.parameters()):,} parameters, sizes in config.json')
    if options.init and options.lr > 1e-4:
        print(f'note       --lr {options.lr} is for training from nothing; with --init try 1e-5')
    if 2 * options.warmup > options.steps:
        print(f'note       --warmup {options.warmup} is over half of the {options.steps} steps')
    if val is None:
        print('note       nothing is held out, so overfitting cannot be seen; python -m extras.prepare pack --val 0.1 '
              'holds a tenth out')
        return
    in_both = set(map(os.path.realpath, shards.paths)) & set(map(os.path.realpath, val.paths))
    if in_both:
        print(f'WARNING    {len(in_both)} shards are in --data and in --val')


def prepare_folder(run, in_place):
    """config.json, and the first part of the report. An old eval.json goes. If an earlier start in this folder ended
    before its first checkpoint, its log, its best.pt and its maps for the report go, too."""
    old = ['eval.json']
    if not in_place:
        check_space(run)
        old += ['log.jsonl', 'maps.npz', 'best.pt']
    for name in old:
        (run.folder / name).unlink(missing_ok=True)
    config = vars(run.options) | {'config': asdict(run.train_set.config)}
    evaluation.write_json(run.folder / 'config.json', config)
    if (HERE / 'extras').is_dir():
        from extras.report import begin
        begin(run.train_set, run.folder)


def finish(run, figures):
    """eval.json, the report, and what to do next."""
    evaluation.write_json(run.folder / 'eval.json', figures)
    evaluation.show(figures)
    if (HERE / 'extras').is_dir():
        from extras.report import write
        print(f'report     {write([run.folder])}')
    best = 'best.pt' if (run.folder / 'best.pt').exists() else 'last.pt'
    print(f'done       {run.folder}, the networks are in {best}; try python eval.py retrieval '
          f'{run.folder}/{best} --shards {(run.options.val or run.options.data)[0]}')


# --- 8. The loop -----------------------------------------------------------------------------------------------------

MOST_BROKEN = 5         # steps in a row whose loss or gradient is not finite


def batches_left(run):
    """The batches of the steps that are left, for this rank."""
    options = run.options
    order = run.make_order(len(run.train_set.shards), options.batch, run.step, options.steps, options.seed,
                           rank=run.processes.rank, world=run.processes.world)
    # Half precision is faster with captions of multiples of 8 tokens.
    return iter(data.loader(run.train_set, order, options.workers,
                            multiple=8 if run.dtype else 1,
                            whole_first=run.method.cross_attention))    # C^T reads its padding


@contextlib.contextmanager
def signals_caught():
    """Inside this block signals end nothing -> the list that they go into."""
    caught = []

    def note(number, frame):
        caught.append(number)

    handlers = {number: signal.signal(number, note) for number in data.SIGNALS}
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(run, val, caught):
    """Take the steps that are left, and save the last one -> its log entry. None where a signal was caught before."""
    options = run.options
    processes = run.processes
    batches = batches_left(run)
    in_between = options.val and options.eval_every
    if in_between and run.step == 0:
        write_log(run, {'step': 0, 'eval': evaluate(run, val)})    # what the first weights can do
    broken = 0                      # steps in a row that were not finite
    bad = 0                         # pairs that cannot be read
    seen = 0                        # all pairs since this start
    logged_step = run.step
    waited = 0.0                    # seconds, since the last log entry
    logged_at = saved_at = time.perf_counter()
    quiet = True if processes.rank else None            # None: a bar where there is a terminal
    for _ in tqdm(range(run.step, options.steps), disable=quiet):
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        done = train_step(run, batch.to(processes.device))
        run.step += 1               # a step that was left out counts
        last = run.step == options.steps
        signals, bad_pairs = processes.sum([len(caught), batch.bad])
        bad += bad_pairs
        seen += options.batch
        broken = 0 if done.finite else broken + 1

        eval_due = in_between and run.step % options.eval_every == 0 and not last
        if run.step % options.log_every == 0 or run.step == 1 or eval_due or last:
            seconds = time.perf_counter() - logged_at
            entry = log_entry(run, done, run.step - logged_step, seconds, waited)
            entry['bad_pairs'] = bad
            print_progress(run, entry)
            if eval_due:
                entry['eval'] = evaluate(run, val)
            write_log(run, entry)
            logged_step = run.step
            waited = 0.0
            logged_at = time.perf_counter()

        # The clocks of ranks differ. No matter: rank 0 alone writes.
        overdue = options.save_minutes and time.perf_counter() - saved_at > 60 * options.save_minutes
        failure = reason_to_stop(run, broken, bad, seen)
        if signals or last or failure or overdue or run.step % options.save_every == 0:
            save(run)
            saved_at = time.perf_counter()
        if failure:
            processes.wait_for_rank_0()     # torchrun ends all when one exits, and rank 0 may still write
            raise Refused(failure)
        if signals and not last:
            return None
    return entry


def reason_to_stop(run, broken, bad, seen):
    """A sentence where too many pairs are bad, or steps in a row broken. All ranks have the same counts, so they end
    together."""
    if bad > max(0.05 * seen, 10):
        return (f'over 5 % of the pairs cannot be read ({bad:.0f} of {seen}); see the lines above, and python -m '
                'extras.prepare inspect')
    if broken == MOST_BROKEN:
        remedy = 'a lower --lr or --clip-grad 1'
        if run.dtype:
            remedy += ', or --precision fp32'
        return (f'{broken} steps in a row were not finite, the last is step {run.step}; they have not changed the '
                f'weights in last.pt: go on by --resume {run.folder} and {remedy}')


# --- 9. A run, from the command line to the figures ------------------------------------------------------------------

def main(argv=None, build=COSMOS, keep_teacher=False, make_order=data.Order):
    """A run. It ends the process, with status 0 when all steps are done.

    Three arguments are for lesson/experiments.py. build: the class of the model. keep_teacher: have a teacher also
    where it teaches nothing. make_order: data.Order, or a class in its place.
    """
    options, saved, in_place = read_options(argv)
    method = METHODS[options.method]
    processes = Processes(options.device)
    if processes.device.type == 'cpu':
        use_cores(options.workers)
    config, tokenizer, weights = choose_model(options, saved)

    # Data.
    if not in_place:
        choose_folder(options)
    index = Path(options.out, 'index.npy')
    val = None                                              # rank 0 evaluates
    with processes.rank_0_first():
        name_data(options)
        # Rank 0 reads all headers and saves the index, unless this run did so before. All others read that file.
        build_index = processes.rank == 0 and not (in_place and index.exists())
        keys = options.caption_keys or data.POOL_KEYS[options.caption_pool]
        shards = Shards(options.data, keys, 'train', index=None if build_index else index)
        if saved and saved['shards'] != shards.fingerprint:
            raise Refused(f'this run was started on other shards than the {len(shards.paths)} of {options.data}; give '
                          'the same --data, or start anew with --init')
        shards.check_first_pairs()                          # with an index Shards has not done so
        data.check_batch(options.batch, len(shards), processes.world * options.accum)
        if options.val and processes.rank == 0:
            val = Shards(options.val, options.caption_keys, 'val')  # --caption-pool is of --data
            evaluation.shard_captions(val)                  # better refused now than at the end
        if build_index:
            index.parent.mkdir(parents=True, exist_ok=True)
            shards.save(index)
    choose_lengths(options, len(shards))
    if tokenizer is None:
        merges = processes.broadcast(learn_merges(shards) if processes.rank == 0 else None)
        tokenizer = Tokenizer(merges, config.context_length)
        config = replace(config, vocab_size=tokenizer.vocab_size)
    counts = data.Counts(method.global_images, options.local_crops if method.local_images else 0,
                         method.global_texts, options.local_captions if method.local_texts else 0)
    train_set = data.Crops(shards, tokenizer, config, options.seed, counts,
                           options.augment, method.crop_min)

    # Model, teacher, optimizer; of a run that is resumed as they were saved.
    run = make_run(options, processes, train_set, weights, build, keep_teacher, make_order)
    if saved:
        restore(run, saved, in_place)
        del saved                       # its tensors are in the run now: do not hold them twice
    if options.compile:
        compile_blocks(run.student)
        if run.teacher:
            compile_blocks(run.teacher.model)
    if processes.world > 1:
        run.forward = DistributedDataParallel(run.forward, gradient_as_bucket_view=True)

    # The loop.
    steps_left = run.step < options.steps
    if steps_left:
        if processes.rank == 0:
            print_plan(run, val)
            prepare_folder(run, in_place)
        with signals_caught() as caught:
            entry = train(run, val, caught)
        if entry is None:
            print(f'stopped    step {run.step} is saved; go on by python train.py --resume {run.folder}')
            processes.leave(128 + signal.SIGTERM)
        # The last evaluation comes when log and checkpoint are written, because it may fail, or be ended by a signal.
        entry['eval'] = figures = evaluate(run, val)
        save(run)                   # once more: last.pt has run.best, which may be this step now
        write_log(run, entry)       # once more: of equal steps the last entry counts
    else:
        print(f'nothing is left to do: step {run.step} of {options.steps} is reached')
        figures = None
        # An earlier start has taken the last step, but its evaluation has failed.
        if processes.broadcast(in_place and not (run.folder / 'eval.json').exists()):
            figures = evaluate(run, val)
    if figures:                                             # {} on other ranks than 0
        finish(run, figures)
    processes.leave(0)


if __name__ == '__main__':
    data.run(main)
