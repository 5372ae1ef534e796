"""How long a training step takes, and how fast one loader worker is.

    python -m extras.bench step --preset vit-b-16 --batch 128     median time, memory, FLOPs, share of the matmul peak
    python -m extras.bench step --preset tiny --method clip       without teacher and cross-attention
    python -m extras.bench step --data SHARDS --accum 4           any option of train.py
    python -m extras.bench loader SHARDS                          samples that one worker makes per second

`step` sets up a run as train.py does, takes a batch from its loader, and times train.train_step on it, again and again.
"""
import io
import itertools
import json
import random
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import train
from extras.inspect import crops_of
from plumbing.errors import command
from plumbing.options import Parser
from plumbing.processes import Processes, peak_memory
from plumbing.shards import Shards, find_shards, write_shard
from plumbing.tokenizer import Tokenizer

SECONDS = 5             # for how long the loader is measured
WARM_UP = 2             # steps that are not timed: the first ones allocate memory and choose kernels
PRODUCTS = 12           # how many products of two matrices are timed; the fastest counts as the peak

# --- 1. A step -------------------------------------------------------------------------------------------------------

STEP = """The options are those of train.py, except --workers, because the loader is not timed, and
--out and --epochs. Some defaults differ: --preset vit-b-16 --batch 32 --steps 10 (that many steps
are timed), and without --data images are noise and captions random words."""
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
        given, typed = train.read_options([*DEFAULTS, *flags, '--workers=0', f'--out={folder}'])
        timed_steps = given['steps']
        given['steps'] += WARM_UP + 1                       # the last one counts FLOPs
        processes = Processes(given['device'])
        device = processes.device
        if given['data'] is None:
            given['data'] = make_shard(Path(folder, 'made.tar'), given['batch'])
        # We pass tars, not a folder. If the folder had a val/, train.set_up would decode all its images first.
        given['data'] = find_shards(given['data'], 'train')
        run, _ = train.set_up(given, typed, processes, None)
        options = run.options
        batch = next(run.batches)

    def step():
        train.train_step(run, batch.to(device))

    parameters = sum(p.numel() for p in run.student.parameters())
    print(f'{options.preset}, {options.method}, batch {options.batch}, {len(batch.crops)} images and '
          f'{len(batch.texts)} captions, {parameters:,} parameters, {run.dtype or torch.float32} '
          f'on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}')
    timed(step, WARM_UP, device)
    seconds = statistics.median(timed(step, timed_steps, device))
    # The peak of memory is read before FLOPs are counted, because the step that counts them may need more.
    memory = peak_memory(device)
    in_gb = '' if memory is None else f'   {memory:.2f} GB'
    print(f'step   {1000 * seconds:10,.1f} ms, the median of {timed_steps}   '
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


# --- 3. Commands -----------------------------------------------------------------------------------------------------

def main():
    prog = 'python -m extras.bench'
    parser = Parser(prog=prog, usage='%(prog)s step|loader ... [options]', epilog=__doc__)
    commands = parser.add_subparsers(required=True, prog=prog)
    one = commands.add_parser('step', help='how long a step takes', description=STEP,
                              usage='%(prog)s [options of train.py]')
    one.set_defaults(function=measure_step)
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
    if function == measure_step:
        options['flags'] = others                           # for train.py's own parser
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    function(**options)


if __name__ == '__main__':
    command(main)
