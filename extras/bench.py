"""How long a training step takes, how fast one loader worker is, and what a run will need.

    python -m extras.bench step --preset vit-b-16 --batch 128     median time, memory, FLOPs, share of the matmul peak
    python -m extras.bench step --preset tiny --method clip       without teacher and cross-attention
    python -m extras.bench step --data SHARDS --accum 4           any option of train.py
    python -m extras.bench loader SHARDS                          samples that one worker makes per second
    python -m extras.bench plan --gpus 8 --pairs 2800000          FLOPs, memory and hours, counted without a GPU

`step` sets up a run as train.py does, takes a batch from its loader, and times train.train_step on it, again and again.
"""
import io
import itertools
import json
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from PIL import Image
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import cosmos
import train
from cosmos import COSMOS, GLOBALS, Teacher
from data import check_batch
from extras.prepare import crops_of
from plumbing.errors import command
from plumbing.options import Parser, above_zero, fill_in, positive
from plumbing.processes import DTYPES, Processes, peak_memory
from plumbing.shards import Shards, find_shards, write_shard
from plumbing.tokenizer import LEARNED_VOCAB, Tokenizer

SECONDS = 5             # for how long the loader is measured
WARM_UP = 2             # steps that are not timed: the first ones allocate memory and choose kernels
PRODUCTS = 12           # how many products of two matrices are timed; the fastest counts as the peak

# --- 1. A step -------------------------------------------------------------------------------------------------------

STEP = """The options are those of train.py, except --workers, because the loader is not timed, and
--out. Some defaults differ: --preset vit-b-16 --batch 32 --steps 10 (that many steps are timed),
and without --data images are noise and captions random words."""
DEFAULTS = '--preset=vit-b-16', '--batch=32', '--steps=10'
WORDS = 'a small red dog runs over the green grass near blue water with some people behind it'.split()


def make_shard(path, pairs):
    """A tar of images of noise, each with five sentences of 5 to 20 random words -> path."""
    rng = random.Random(0)
    members = []
    for i in range(pairs):
        file = io.BytesIO()
        Image.effect_noise((256, 256), 64).save(file, 'JPEG')
        captions = [' '.join(rng.choices(WORDS, k=rng.randint(5, 20))) for _ in range(5)]
        members.append((f'{i}.jpg', file.getvalue()))
        members.append((f'{i}.json', json.dumps(captions).encode()))
    write_shard(path, members)
    return path


def timed(action, times, device):
    """Call an action `times` times -> the seconds of each call, including the GPU's work."""
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        action()
        if device.type != 'cpu':
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - begun)
    return seconds


def matmul_peak(device, dtype):
    """FLOP/s of the fastest of several products of two matrices."""
    # The side of the matrices. They are so large that the time to launch a GPU's kernel does not count.
    n = 2048 if device.type == 'cpu' else 8192
    matrix = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / min(timed(lambda: matrix @ matrix, PRODUCTS, device))


def measure_step(flags):
    """Print time, samples/s, memory, FLOPs, and their speed as a share of the machine's peak."""
    with TemporaryDirectory() as folder:
        options = train.read_options([*DEFAULTS, *flags, '--workers=0', f'--out={folder}'])
        processes = Processes(options.device)
        device = processes.device
        if options.data is None:
            options.data = make_shard(Path(folder, 'made.tar'), options.batch)
        # We pass tars, not a folder. If the folder had a val/, train.set_up would decode all its images first.
        options.data = find_shards(options.data, 'train')
        run, _ = train.set_up(options, processes, None)
        batch = next(run.batches)

    def step():
        train.train_step(run, batch.to(device))

    parameters = sum(p.numel() for p in run.student.parameters())
    print(f'{options.preset}, {options.method}, batch {options.batch}, {len(batch.crops)} images and '
          f'{len(batch.texts)} captions, {parameters:,} parameters, {run.dtype or torch.float32} '
          f'on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}')
    timed(step, WARM_UP, device)
    seconds = statistics.median(timed(step, options.steps, device))
    # The peak of memory is read before FLOPs are counted, because the step that counts them may need more.
    memory = peak_memory(device)
    in_gb = '' if memory is None else f'   {memory:.2f} GB'
    print(f'step   {1000 * seconds:10,.1f} ms, the median of {options.steps}   '
          f'{options.batch / seconds:,.1f} samples/s{in_gb}')
    # Only matrix products are counted. The counter does not see into compiled blocks, so this step runs them
    # uncompiled.
    with torch.compiler.set_stance('force_eager'), FlopCounterMode(display=False) as counter:
        step()
    flops = counter.get_total_flops()
    speed = flops / seconds
    peak = matmul_peak(device, run.dtype)
    print(f'FLOPs  {flops / 1e9:10,.3f} GFLOP   {speed / 1e9:,.1f} GFLOP/s, {speed / peak:.0%} of '
          f'the {peak / 1e9:,.0f} that a product of large matrices reaches here')


# --- 2. The loader ---------------------------------------------------------------------------------------------------

def measure_loader(shards, preset):
    """Print how many whole samples, with all crops and tokens, one worker makes per second."""
    source = Shards(shards, split='train')
    # It has no merges. In a long run they cost no time, because the ids of words are cached.
    tokenizer = Tokenizer([], train.PRESETS[preset].sizes.context_length)
    crops = crops_of(source, preset, tokenizer)
    torch.set_num_threads(1)                                # as in a worker
    order = itertools.cycle(torch.randperm(len(source)).tolist())
    done = 0
    begun = time.perf_counter()
    while time.perf_counter() - begun < SECONDS:
        crops[0, next(order)]                       # in place of a bad pair this makes another
        done += 1
    print(f'one worker makes {done / (time.perf_counter() - begun):,.0f} samples/s')


# --- 3. A plan, without a GPU ----------------------------------------------------------------------------------------

PLAN = """Torch runs a step on its `meta` device, whose tensors have shapes but no numbers, and we
count what docs/scaling.md says. The other options are those of train.py, with the defaults
--preset vit-b-16 --precision bf16."""


class HalfOnGPU(TorchFunctionMode):
    """What autocast does on a GPU, done here because autocast does not know the device meta: both factors of a product
    are cast to autocast's dtype. Attention is one kernel, which keeps query, key, value and result, but no weights."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.linear, torch.Tensor.matmul, F.scaled_dot_product_attention):
            args = [x.to(self.dtype) for x in args]
        if function is F.scaled_dot_product_attention:
            # no bias, and what the backward pass needs is kept
            out, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(*args, None, True)
            return out
        return function(*args, **(kwargs or {}))


def kept_bytes(student, images, texts, dtype):
    """Bytes that a forward pass keeps for the backward pass, including copies of weights, but not the weights."""
    storages = set()                    # several tensors may share one
    weights = {p.untyped_storage() for p in student.parameters()}

    def keep(tensor):
        storages.add(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, keep), HalfOnGPU(dtype):
        student(images, texts)
    return sum(storage.nbytes() for storage in storages - weights)


def step_flops(options, student, images, texts):
    """FLOPs of a step, forward and backward, without its losses."""
    with FlopCounterMode(display=False) as counter:
        out = student(images, texts)
        if options.accum > 1:           # the backward pass begins with another forward pass
            student(images, texts)
        if train.METHODS[options.method].has_teacher:
            Teacher(student)(images[:GLOBALS], texts[:GLOBALS])
        vectors = [x for x in out if x is not None]
        torch.autograd.backward(vectors, [torch.ones_like(x) for x in vectors])
    return counter.get_total_flops()


def step_bytes(options, student, images, texts):
    """Bytes that stay on a GPU during a step. images, texts: those of all pairs on the GPU."""
    dtype = DTYPES[options.precision] or torch.float32
    pairs = len(images[0])
    kept = []
    for n in 1, 2:
        some = [[view[:n] for view in views] for views in (images, texts)]
        kept.append(kept_bytes(student, *some, dtype))
    a_pair = kept[1] - kept[0]
    copies = kept[0] - a_pair               # of weights, in half precision: each pass makes its own
    parameters = sum(p.numel() for p in student.parameters())
    if options.accum == 1 and copies:       # autocast shares a copy among all passes
        copies = 2 * parameters
    networks = 16 * parameters              # weights, gradients and AdamW's two moments, in float32
    if train.METHODS[options.method].has_teacher:
        networks += 4 * parameters
    pixels = sum(5 * view.numel() for view in images)       # as bytes and as float32
    logits = 4 * GLOBALS * max(len(images), len(texts)) * pairs * options.batch     # of one L_nce
    # From MANY_LOGITS on, those of one L_nce are kept at a time, else those of all 10: L_CLIP and the four terms of
    # Eq. 6, each in both directions.
    if logits < 4 * cosmos.MANY_LOGITS:
        logits *= 10
    return networks + copies + pixels + a_pair * pairs // options.accum + logits


def plan(flags, gpus, pairs, tokens, peak, share):
    """Print the FLOPs, memory and hours of a run."""
    options = train.read_options(['--preset=vit-b-16', '--precision=bf16', *flags])
    learns = options.vocab == 'learn'
    options.vocab = 'learn'                             # no merges are needed
    config, _, _ = train.choose_model(options, {})
    if learns:
        config = replace(config, vocab_size=LEARNED_VOCAB)
    parts = gpus * options.accum
    fill_in(options, train.recipe_of(options.preset, options.method, options.init), pairs, parts, {})
    check_batch(options.batch, pairs, parts)
    crops = train.make_train_set(options, None, None, config)   # for its numbers; it has no pairs
    sides = [kind.size for kind in crops.kinds]
    lengths = [config.context_length] * crops.counts.global_texts
    lengths += [tokens] * crops.counts.local_texts
    mine = options.batch // gpus
    with torch.device('meta'):
        student = COSMOS(config)
        images = [torch.empty(mine, 3, side, side) for side in sides]
        texts = [torch.empty(mine, length, dtype=torch.long) for length in lengths]
    for tower in student.visual, student.text:
        tower.transformer.grad_checkpointing = options.grad_checkpoint
    size = sum(p.numel() for p in student.parameters())
    print(f'{options.preset}, {options.method}, {size:,} parameters, {options.precision}, {len(sides)} images, '
          f'{len(lengths)} captions, of {config.context_length} tokens, local ones of {tokens}')
    print(f'{options.steps:,} steps of {options.batch:,} pairs, {mine:,} on each of {gpus} GPUs')

    flops = step_flops(options, student, images, texts) / mine
    print(f'{flops / 1e9:,.3f} GFLOP per pair')
    print(f'{step_bytes(options, student, images, texts) / 1e9:,.2f} GB per GPU')
    for part in share if peak else []:
        speed = gpus * part * peak * 1e12 / flops
        hours = options.steps * options.batch / speed / 3600
        print(f'at {part:.0%} of {peak:,.0f} TFLOP/s per GPU: {speed:,.0f} pairs/s, {hours:,.1f} hours, '
              f'{hours * gpus:,.0f} GPU-hours')


# --- 4. Commands -----------------------------------------------------------------------------------------------------

def main():
    prog = 'python -m extras.bench'
    parser = Parser(prog=prog, usage='%(prog)s step|loader|plan ... [options]', epilog=__doc__)
    commands = parser.add_subparsers(required=True, prog=prog)
    one = commands.add_parser('step', help='how long a step takes', description=STEP,
                              usage='%(prog)s [options of train.py]')
    one.set_defaults(function=measure_step)
    one = commands.add_parser('plan', help='FLOPs, memory and hours of a run, without a GPU', description=PLAN,
                              usage='%(prog)s --gpus N --pairs M [options of train.py]')
    one.set_defaults(function=plan)
    add = one.add_argument
    add('--gpus', type=positive, required=True, help='GPUs of all nodes together')
    add('--pairs', type=positive, required=True, help='pairs in the training set')
    add('--tokens', type=positive, default=40,
        help='tokens of the longest local caption in a batch (default: %(default)s)')
    add('--peak', type=above_zero, help='peak TFLOP/s of a GPU in --precision; without it no hours are printed')
    add('--share', type=above_zero, nargs='+', default=[0.25, 0.4],
        help='shares of the peak that a run may reach (default: %(default)s)')
    one = commands.add_parser('loader', help='speed of one worker',
                              usage='%(prog)s SHARDS ... [options]')
    one.set_defaults(function=measure_loader)
    add = one.add_argument
    add('shards', nargs='+', help='tars, or folders of them; if a folder has train/ and val/, its train/ is read')
    add('--preset', choices=train.PRESETS, default='vit-b-16',
        help='the preset whose views are made (default: %(default)s)')
    options, others = parser.parse_known_args()
    options = vars(options)
    function = options.pop('function')
    if function in (measure_step, plan):
        options['flags'] = others                           # for train.py's own parser
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    function(**options)


if __name__ == '__main__':
    command(main)
