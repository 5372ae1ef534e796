"""Where the time of a training step goes, and what one worker of the loader does.

    python -m extras.bench step --preset vit-b-16 --batch 128     time by part, FLOPs, share of the matmul peak
    python -m extras.bench step --preset tiny --method clip       without teacher and cross-attention
    python -m extras.bench loader SHARDS                          samples a second of one worker, by part
"""
import contextlib
import statistics
import time
from collections import defaultdict

import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from cosmos import COSMOS, GLOBALS, PRESETS, Config, Teacher, total_loss
from data import Crops, Parser, Shards, Tokenizer, Unreadable, read_image, run
from extras.prepare import counts_of

SECONDS = 5             # time for each part of the loader
WARM_UP = 2             # steps that are not timed: the first ones allocate memory and choose kernels
PRODUCTS = 12           # of two matrices, the best of which counts as the peak

# --- 1. A step -------------------------------------------------------------------------------------------------------

class Clock:
    """`with clock('backward'): ...` adds the seconds of the block to clock.seconds['backward'], the GPU's included."""

    def __init__(self, device):
        self.device = device
        self.seconds = defaultdict(list)

    @contextlib.contextmanager
    def __call__(self, part):
        begun = time.perf_counter()
        yield
        if self.device.type != 'cpu':
            torch.accelerator.synchronize()
        self.seconds[part].append(time.perf_counter() - begun)


def matmul_peak(device, dtype):
    """FLOP/s of the best of several products of two matrices."""
    n = 2048 if device.type == 'cpu' else 8192              # side: large enough to hide a GPU's launch
    matrix = torch.randn(n, n, device=device, dtype=dtype)
    clock = Clock(device)
    for _ in range(PRODUCTS):
        with clock('product'):
            matrix @ matrix
    return 2 * n ** 3 / min(clock.seconds['product'])


def random_views(config, method, counts, B, device):
    """V images of noise and U captions of random words, as many as a method has of `counts`."""
    sides = [config.image_size] * method.global_images
    lengths = [config.context_length] * method.global_texts
    if method.local_images:
        sides += [config.local_image_size] * counts.local_images
    if method.local_texts:
        longest = min(24, config.context_length)            # of the sentences of a batch
        lengths += [longest] * counts.local_texts
    images = [torch.randn(B, 3, side, side, device=device) for side in sides]
    texts = [torch.randint(config.vocab_size, (B, length), device=device) for length in lengths]
    return images, texts


def measure_step(preset, method, batch, precision, steps, compile):
    """Steps on random data, timed by part: medians, samples/s, memory, FLOPs and their share of the machine's peak."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    train.keep_memory()
    row = train.METHODS[method]
    changes = {} if row.cross_attention else {'cross_heads': 0}
    config = Config.preset(preset, **changes)
    dtype = train.choose_dtype(precision, device)
    model = COSMOS(config).to(device)
    teacher = Teacher(model) if row.distills_images else None
    optimizer = train.make_optimizer(model, 1e-4, 0.1)
    images, texts = random_views(config, row, counts_of(PRESETS[preset].recipe), batch, device)
    taught = texts[:GLOBALS] if row.distills_texts else None
    clock = Clock(device)

    def step():
        cls_t = eot_t = None
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            with clock('student forward'):
                out = model(images, texts)
            if teacher:
                with clock('teacher forward'):
                    cls_t, eot_t = teacher(images[:GLOBALS], taught)
        with clock('losses'):
            loss, _ = total_loss(model, out, cls_t, eot_t)
        with clock('backward'):
            loss.backward()
        with clock('AdamW'):
            optimizer.step()
            optimizer.zero_grad()
        if teacher:
            with clock('EMA'):
                teacher.update(model, 0.99)

    with FlopCounterMode(display=False) as counter:         # of matrix products
        step()
    if compile:
        train.compile_blocks(model)
        if teacher:
            train.compile_blocks(teacher.model)
    for _ in range(steps + WARM_UP):
        with clock('step'):
            step()
    print(f'{preset}, {method}, batch {batch}, {len(images)} images and {len(texts)} captions, '
          f'{dtype or torch.float32} on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}')
    report(clock, steps, batch, counter.get_total_flops(), matmul_peak(device, dtype))


def report(clock, steps, batch, flops, peak):
    """Print medians of the last `steps`, samples/s, memory, and FLOP/s beside the peak of a product of matrices."""
    medians = {part: statistics.median(seconds[-steps:]) for part, seconds in clock.seconds.items()}
    step = medians.pop('step')
    for part, seconds in medians.items():
        print(f'{part:18} {1000 * seconds:10.1f} ms   {seconds / step:4.0%}')
    memory = train.peak_memory(clock.device)
    speed = flops / step
    print(f'step               {1000 * step:10.1f} ms   {batch / step:,.1f} samples/s   '
          f'{memory:.2f} GB')
    print(f'FLOPs              {flops / 1e9:10,.3f} GFLOP   {speed / 1e9:,.1f} GFLOP/s, '
          f'{speed / peak:.0%} of the {peak / 1e9:,.0f} that a product of large matrices reaches here')


# --- 2. The loader ---------------------------------------------------------------------------------------------------

def measure_loader(shards, preset):
    """What one worker does a second, by part."""
    source = Shards(shards, split='train')
    config, recipe = PRESETS[preset]
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
    command = commands.add_parser('step', help='time of a step by part', usage='%(prog)s [options]')
    command.set_defaults(function=measure_step)
    add = command.add_argument
    add('--preset', choices=PRESETS, default='vit-b-16', help='model (default: %(default)s)')
    add('--method', choices=train.METHODS, default='cosmos', help='default: %(default)s')
    add('--batch', type=int, default=32, help='pairs a step (default: %(default)s)')
    add('--precision', choices=['auto', *train.DTYPES], default='auto', help='auto: bf16 if fast')
    add('--steps', type=int, default=10, help='how many are timed (default: %(default)s)')
    add('--compile', action='store_true', help="compile the transformer's blocks")
    command = commands.add_parser('loader', help='speed of one worker by part',
                                  usage='%(prog)s SHARDS ... [options]')
    command.set_defaults(function=measure_loader)
    add = command.add_argument
    add('shards', nargs='+', help='tars, or folders of them; of train/ and val/ the half train/')
    add('--preset', choices=PRESETS, default='vit-b-16', help='whose views (default: %(default)s)')
    options = vars(parser.parse_args())
    function = options.pop('function')
    function(**options)


if __name__ == '__main__':
    run(main)
