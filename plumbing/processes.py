"""The processes of a run, and what they use of the machine. Windows lacks some of it; such things are looked for where
they are needed, not when this is imported."""
import atexit
import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from plumbing.errors import need

DEVICES = 'auto', 'cuda', 'mps', 'cpu'
# A process that waits longer than this for the embeddings or gradients of the others ends.
TIMEOUT = timedelta(minutes=30)
DTYPES = {'fp32': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}           # None: no autocast

# --- 1. Ranks --------------------------------------------------------------------------------------------------------

def choose_device(name):
    """The device that --device names; auto means a GPU if torch finds one, otherwise the CPU."""
    found = {
        'cuda': torch.cuda.is_available(),
        'mps': torch.backends.mps.is_available(),
        'cpu': True}
    if name == 'auto':
        name = 'cuda' if found['cuda'] else 'cpu'
    need(found[name], f'--device {name}: torch finds no such device here; use --device auto')
    return torch.device(name)


class Processes:
    """The processes of this run: a single one, or those of torchrun. Its environment variables alone decide which."""

    def __init__(self, device):
        self.device = choose_device(device)
        is_cuda = self.device.type == 'cuda'
        if is_cuda:
            # Captions have many lengths, and the freed memory of one often does not fit the next. With segments that
            # grow, less of it is lost. torch reads this when CUDA starts, before version 2.9 under the second name.
            conf = os.environ.setdefault('PYTORCH_CUDA_ALLOC_CONF', 'expandable_segments:True')
            os.environ.setdefault('PYTORCH_ALLOC_CONF', conf)
            # cuDNN's attention plans anew for each shape, and captions have many lengths; we expect that to be slow.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.rank = 0
        self.world = 1
        self.patient = None             # a group of all processes that waits for days
        if 'RANK' not in os.environ:
            return
        if is_cuda:
            local = int(os.environ['LOCAL_RANK'])
            need(local < torch.cuda.device_count(),
                 f'process {local} of this node has no GPU; lower --nproc_per_node')
            self.device = torch.device('cuda', local)
            torch.cuda.set_device(local)
        # Without a name torch would take the backend of an accelerator that it finds, even with --device cpu.
        dist.init_process_group('nccl' if is_cuda else 'gloo', timeout=TIMEOUT)
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        if self.rank > 0:
            sys.stdout = open(os.devnull, 'w')          # from here on rank 0 speaks for all
        # While rank 0 reads headers or evaluates, the others wait on this group, because the usual one gives up after
        # TIMEOUT. The counts of a step go through it, too.
        self.patient = dist.new_group(backend='gloo', timeout=timedelta(days=7))

    def sum(self, values):
        """Numbers or scalar tensors, each summed over all processes -> list of floats."""
        # All is added on the CPU, by gloo: mps has no doubles, and on a GPU plain numbers would wait for its work.
        numbers = [value.item() if isinstance(value, torch.Tensor) else value for value in values]
        total = torch.tensor(numbers, dtype=torch.double)
        if self.world > 1:
            dist.all_reduce(total, group=self.patient)
        return total.tolist()

    def broadcast(self, value):
        """Rank 0's value, on all ranks. The other ranks wait here until rank 0 comes here, too."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, group=self.patient)
        return box[0]

    @contextlib.contextmanager
    def rank_0_first(self):
        """The other processes enter this block after rank 0 has left it, and find the files that rank 0 wrote in it. If
        rank 0 is refused inside the block, all processes end."""
        if self.rank > 0:
            try:
                self.broadcast(None)
            except RuntimeError:
                os._exit(1)     # rank 0 was refused, and has said why, or another rank is gone
        yield
        if self.rank == 0:
            self.broadcast(None)        # lets the others in

    def leave(self, status):
        """End the process. status: a number or, as for sys.exit, a sentence. Several processes wait here until all have
        come, because torchrun ends all when one has failed, while rank 0 may still be saving. NB: os._exit, because
        sys.exit may hang: it frees DDP, which holds the GIL and waits for gloo's thread, which may wait for the GIL."""
        if self.patient is None:
            sys.exit(status)
        if isinstance(status, str):
            if self.rank == 0:
                print(status, file=sys.stderr)
            status = 1
        dist.barrier(group=self.patient)
        sys.stdout.flush()
        os._exit(status)


# --- 2. The machine: threads, memory, precision, torch.compile --------------------------------------------------------

def cores():
    """How many cores this process may use: its share of those that Slurm, or the machine, gives to this node."""
    here = os.cpu_count()
    if hasattr(os, 'sched_getaffinity'):        # Linux, which says which cores a job may use
        here = len(os.sched_getaffinity(0))
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))      # torchrun sets it
    return max(1, here // processes)


def use_cores(workers):
    """For a run on a CPU: each worker of the loader gets a core, and this process gets the other cores, unless
    OMP_NUM_THREADS is set, as torchrun does for several processes."""
    if 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(max(1, cores() - workers))


def keep_memory():
    """Make the C library keep memory that is freed. By default it hands large blocks back to the system, and getting
    them again, page by page and filled with zeros, takes time."""
    with contextlib.suppress(AttributeError, TypeError):    # only glibc has it; Windows takes no None
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)             # M_MMAP_MAX: no blocks from mmap, which go back when freed
        libc.mallopt(-1, -1)            # M_TRIM_THRESHOLD: no other memory goes back


def peak_memory(device):
    """The most memory that tensors have used so far, in GB; None without a GPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == 'cuda' else None


def choose_dtype(precision, device):
    """-> dtype of autocast, or None for float32. A CPU without units for bfloat16 is slower in it than in float32."""
    if precision != 'auto':
        return DTYPES[precision]
    if device.type == 'cuda':
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # private functions of torch; some versions lack them
        tests = ('_is_avx512_bf16_supported', '_is_amx_tile_supported')
        fast = any(hasattr(torch.cpu, test) and getattr(torch.cpu, test)() for test in tests)
    return torch.bfloat16 if fast else None


def compile_blocks(model):
    """torch.compile block by block, so that one graph serves all layers of a tower and all lengths of captions, while
    the whole model would be compiled again for each length."""
    # torch compiles a piece of code at most 8 times, and all blocks are one piece. Each tower, each last block, with and
    # without gradient, and each precision needs a graph of its own. Beyond 8 a block would run as if not compiled.
    torch._dynamo.config.cache_size_limit = 128
    if next(model.parameters()).is_cuda:
        # Graphs hold for one number of CPU threads. With --accum blocks are computed again in the backward pass, which
        # on a GPU runs in a thread of its own, with one CPU thread. With more here it would end with an error.
        torch.set_num_threads(1)
    for tower in model.visual, model.text:
        for block in tower.transformer.resblocks:
            block.compile(dynamic=True)


# --- 3. Loaders and signals ------------------------------------------------------------------------------------------

SIGNALS = [signal.SIGTERM, signal.SIGINT]
if hasattr(signal, 'SIGUSR1'):          # Slurm sends it; Windows does not have it
    SIGNALS.append(signal.SIGUSR1)


@contextlib.contextmanager
def signals_caught():
    """Inside this block the first signal only puts its number into the list that the block gets. A second one ends the
    process at once, but not under torchrun, because Slurm and torchrun both signal, and the run must end saved."""
    received = []
    is_torchrun = 'RANK' in os.environ

    def note_signal(number, frame):
        if not received:
            received.append(number)
            # Not by print, because the signal may have interrupted a print.
            os.write(2, b'\nsignal     waiting for the end of this step, or of the evaluation under way; then '
                        b'the run is saved and ends\n')
        elif not is_torchrun:
            os._exit(128 + number)

    handlers = {number: signal.signal(number, note_signal) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# Seconds until a missing batch is an error. A worker that was forked beside CUDA and nccl may, rarely, hang for ever
# (pytorch#130610). Well before TIMEOUT, or nccl would end the processes that wait before the error is told.
LONGEST_WAIT = 900


def loading(workers):
    """Settings of a DataLoader. Its workers ignore the signals that end a run, and they end when the process ends."""
    if not workers:                     # DataLoader refuses the other settings then
        return {'num_workers': 0}
    atexit.register(end_workers)
    return {'num_workers': workers,
            'timeout': LONGEST_WAIT,
            'worker_init_fn': ignore_signals,
            # A forked worker shares the index of the shards, while a spawned one gets a copy.
            'multiprocessing_context': 'fork' if sys.platform == 'linux' else None}


def ignore_signals(worker):
    """Slurm and torchrun signal all processes. If a worker died of a signal, the step under way would fail."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers():
    """Kill the workers. On exit Python would send them SIGTERM, which they ignore, and wait for them for ever."""
    if hasattr(signal, 'SIGCHLD'):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # otherwise each worker's end is an error
    for worker in multiprocessing.active_children():
        if worker.daemon:       # as the loader's workers are; other children are not ours to kill
            worker.kill()
