"""How long a training step takes, what it is spent on, and what one worker of the loader does.

    python -m extras.bench step --preset vit-b-16 --batch 128     median time, FLOPs, share of the matmul peak, parts
    python -m extras.bench step --preset tiny --method clip       without teacher and cross-attention
    python -m extras.bench step --data SHARDS --accum 4           any option of train.py
    python -m extras.bench loader SHARDS                          samples a second of one worker, by part

`step` sets up a run as train.py does, takes a batch from its loader, and times train.train_step on it, again and again.
Without --data the pairs are made: images of noise, captions of random words.
"""
import contextlib
import io
import json
import random
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

import train
from data import Crops
from extras.prepare import counts_of
from plumbing.errors import Unreadable, command
from plumbing.images import read_image
from plumbing.options import Parser
from plumbing.processes import Processes, peak_memory
from plumbing.shards import Shards, find_shards, write_shard
from plumbing.tokenizer import Tokenizer

SECONDS = 5             # time for each part of the loader
WARM_UP = 2             # steps that are not timed: the first ones allocate memory and choose kernels
PRODUCTS = 12           # of two matrices, the best of which counts as the peak
OPERATIONS = 10         # shown, those that cost most

# --- 1. A step -------------------------------------------------------------------------------------------------------

STEP = """The options are those of train.py, but --workers, for the loader is not timed. Other defaults than there:
--preset vit-b-16 --batch 32 --steps 10 (so many steps are timed), and --data is made."""
DEFAULTS = '--preset=vit-b-16', '--batch=32', '--steps=10'
SIDE = 256                                              # of an image that is made, in pixels
WORDS = 'a small red dog runs over the green grass near blue water with some people behind it'.split()


def make_shard(path, pairs):
    """A tar of images of noise, each with five sentences of 5 to 20 random words -> path."""
    rng = random.Random(0)
    members = []
    for i in range(pairs):
        noise = np.frombuffer(rng.randbytes(SIDE * SIDE * 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise.reshape(SIDE, SIDE, 3)).save(file, 'JPEG')
        captions = []
        for _ in range(5):
            captions.append(' '.join(rng.choices(WORDS, k=rng.randint(5, 20))))
        members.append((f'{i}.jpg', file.getvalue()))
        members.append((f'{i}.json', json.dumps(captions).encode()))
    write_shard(path, members)
    return path


def timed(action, times, device):
    """Call it so many times -> the seconds of each call, the GPU's work included."""
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        action()
        if device.type != 'cpu':
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - begun)
    return seconds


def matmul_peak(device, dtype):
    """FLOP/s of the best of several products of two matrices."""
    n = 2048 if device.type == 'cpu' else 8192              # side: large enough to hide a GPU's launch
    matrix = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / min(timed(lambda: matrix @ matrix, PRODUCTS, device))


def measure_step(flags):
    """Time, samples/s, memory, FLOPs and their share of the machine's peak, and the operations that cost most."""
    with TemporaryDirectory() as folder:
        options = train.read_options([*DEFAULTS, *flags, '--workers=0', f'--out={folder}'])
        processes = Processes(options.device)
        device = processes.device
        if options.data is None:
            options.data = make_shard(Path(folder, 'made.tar'), options.batch)
        # Tars, no folder: a held-out half in it would be tried, image by image.
        options.data = find_shards(options.data, 'train')
        run, _ = train.set_up(options, processes, None)
        batch = next(train.batches_left(run))

    def step():
        train.train_step(run, batch.to(device))

    parameters = sum(p.numel() for p in run.student.parameters())
    print(f'{options.preset}, {options.method}, batch {options.batch}, {len(batch.crops)} images and '
          f'{len(batch.texts)} captions, {parameters:,} parameters, {run.dtype or torch.float32} '
          f'on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}')
    # Of matrix products. The counter does not see into compiled blocks.
    with torch.compiler.set_stance('force_eager'), FlopCounterMode(display=False) as counter:
        step()
    timed(step, WARM_UP, device)
    seconds = statistics.median(timed(step, options.steps, device))
    print(f'step   {1000 * seconds:10,.1f} ms, the median of {options.steps}   '
          f'{options.batch / seconds:,.1f} samples/s   {peak_memory(device):.2f} GB')
    flops = counter.get_total_flops()
    speed = flops / seconds
    peak = matmul_peak(device, run.dtype)
    print(f'FLOPs  {flops / 1e9:10,.3f} GFLOP   {speed / 1e9:,.1f} GFLOP/s, {speed / peak:.0%} of '
          f'the {peak / 1e9:,.0f} that a product of large matrices reaches here')
    print_parts(step, device)


def print_parts(step, device):
    """The operations that cost most in a step, forward and backward together, without those that they call."""
    with torch.profiler.profile() as profile:
        timed(step, 1, device)
    clock = 'self_cpu_time_total' if device.type == 'cpu' else 'self_device_time_total'
    costs = []
    for event in profile.key_averages():
        if event.device_type == DeviceType.CPU:     # the others are the kernels of these
            costs.append((getattr(event, clock), event.key, event.count))   # microseconds
    costs.sort(reverse=True)
    total = sum(cost for cost, _, _ in costs)
    for cost, name, calls in costs[:OPERATIONS]:
        milliseconds = cost / 1000
        print(f'{name[:40]:40} {milliseconds:10,.1f} ms   {cost / total:4.0%}   {calls:6,} calls')


# --- 2. The loader ---------------------------------------------------------------------------------------------------

def measure_loader(shards, preset):
    """What one worker does a second, by part."""
    source = Shards(shards, split='train')
    config, recipe = train.PRESETS[preset]
    order = torch.randperm(len(source)).tolist()
    tokenizer = Tokenizer([], config.context_length)        # ids of words are cached, so merges cost no time
    crops = Crops(source, tokenizer, config, 0, counts_of(recipe), recipe.get('augment', 'full'))
    torch.set_num_threads(1)                                # as in a worker

    parts = {'read': lambda i: (source.image(i), source.record(i)),
             'read and decode': lambda i: read_image(source.image(i)),
             'whole sample': lambda i: crops[0, i]}
    for name, part in parts.items():
        done = 0
        begun = time.perf_counter()
        while time.perf_counter() - begun < SECONDS:
            with contextlib.suppress(Unreadable):           # training goes on after a bad pair, too
                part(order[done % len(order)])
            done += 1
        speed = done / (time.perf_counter() - begun)
        print(f'{name:16} {speed:9,.0f} samples/s')


# --- 3. Commands -----------------------------------------------------------------------------------------------------

def main():
    prog = 'python -m extras.bench'
    parser = Parser(prog=prog, usage='%(prog)s step|loader ... [options]', epilog=__doc__)
    commands = parser.add_subparsers(required=True, prog=prog)
    one = commands.add_parser('step', help='time of a step, and what it is spent on', description=STEP,
                              usage='%(prog)s [options of train.py]')
    one.set_defaults(function=measure_step)
    one = commands.add_parser('loader', help='speed of one worker by part',
                              usage='%(prog)s SHARDS ... [options]')
    one.set_defaults(function=measure_loader)
    add = one.add_argument
    add('shards', nargs='+', help='tars, or folders of them; of train/ and val/ the half train/')
    add('--preset', choices=train.PRESETS, default='vit-b-16',
        help='whose views (default: %(default)s)')
    options, others = parser.parse_known_args()
    options = vars(options)
    function = options.pop('function')
    if function is measure_step:
        options['flags'] = others                           # for train.py's own parser
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    function(**options)


if __name__ == '__main__':
    command(main)
