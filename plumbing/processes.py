"""The processes of a run, and what they use of the machine.

1. the processes: ranks, devices, sums and broadcasts over all of them, and how they end
2. threads and memory: cores() for each process, keep_memory, peak_memory
3. precision and torch.compile
4. signals: a run is saved before it ends
"""
import atexit
import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from plumbing.errors import Refused, need

DTYPES = {'fp32': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}           # None: no autocast

# --- 1. Processes ----------------------------------------------------------------------------------------------------

class Processes:
    """The processes of this run: a single one, or those of torchrun. Its environment variables alone decide which."""

    def __init__(self, device):
        gpu = torch.cuda.is_available()
        if device == 'cuda' and not gpu:
            raise Refused('--device cuda: torch finds no GPU on this machine; use --device auto')
        self.device = torch.device('cuda' if gpu and device != 'cpu' else 'cpu')
        if self.device.type == 'cuda':
            # cuDNN's attention would plan for half a second at each new shape, and captions have dozens of lengths.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.rank = 0
        self.world = 1
        self.patient = None             # a group of all processes with a timeout of days
        if 'RANK' in os.environ:
            self.join()

    def join(self):
        if self.device.type == 'cuda':
            local = int(os.environ['LOCAL_RANK'])
            if local >= torch.cuda.device_count():
                raise Refused(f'process {local} of this node has no GPU; lower --nproc_per_node')
            self.device = torch.device('cuda', local)
            torch.cuda.set_device(local)
        dist.init_process_group()       # nccl for GPUs, gloo for CPUs
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        if self.rank > 0:
            sys.stdout = open(os.devnull, 'w')          # from here on rank 0 speaks for all
        # While rank 0 reads headers or evaluates, the others wait on this group, because the usual one gives up after
        # minutes.
        self.patient = dist.new_group(backend='gloo', timeout=timedelta(days=7))

    def sum(self, values):
        """Numbers or scalar tensors, each summed over all processes -> list of floats."""
        tensors = [torch.as_tensor(value, dtype=torch.double, device=self.device) for value in values]
        total = torch.stack(tensors)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def sum_meanwhile(self, count):
        """Start to sum the numbers of count() over all processes, while this one goes on -> a function that waits for
        the sums and returns them, a list of floats.

        With several processes count() is called now, and gloo adds the numbers on the CPU; `sum` would make the CPU
        wait for all that its GPU has yet to do. A single process calls count() only when it asks for the sums, so its
        numbers are a little newer.
        """
        if self.world == 1:
            return count
        total = torch.tensor(count(), dtype=torch.double)
        adding = dist.all_reduce(total, group=self.patient, async_op=True)

        def wait():
            adding.wait()
            return total.tolist()

        return wait

    def broadcast(self, value):
        """Rank 0's value, on all ranks."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, group=self.patient)
        return box[0]

    def wait_for_rank_0(self):
        """The other ranks wait here until rank 0 comes here, too. Rank 0 may have to wait for some of them."""
        self.broadcast(None)

    @contextlib.contextmanager
    def rank_0_first(self):
        """The other processes enter this block after rank 0 has left it, and find the files that rank 0 wrote in it. If
        rank 0 is refused inside the block, all processes end."""
        if self.rank > 0:
            try:
                self.wait_for_rank_0()
            except RuntimeError:
                os._exit(1)             # rank 0 was refused, and has said why, or another rank is gone
        yield
        if self.rank == 0:
            self.wait_for_rank_0()      # lets the others in

    def must_agree(self, value, sentence):
        """Refused, with this sentence, on a rank whose value differs from rank 0's."""
        need(self.broadcast(value) == value, sentence)

    def end_all(self, sentence):
        """All ranks must call it. Rank 0 says why, and all end with status 1.

        The others wait until rank 0 is here, too, because torchrun ends all processes when one has failed, and rank 0
        may still be saving.
        """
        self.wait_for_rank_0()
        if self.rank > 0:
            os._exit(1)
        raise Refused(sentence)

    def leave(self, status):
        """End the process. If there are several, each waits here until all have come.

        NB: the process group is not destroyed, because that may hang: freeing DDP, which sys.exit would do, holds the
        GIL and waits for gloo's thread, which may be waiting for the GIL.
        """
        if self.patient:
            dist.barrier(group=self.patient)
            sys.stdout.flush()
            os._exit(status)
        sys.exit(status)


# --- 2. Threads and memory -------------------------------------------------------------------------------------------

def cores():
    """How many cores this process may use: its share of the cores that Slurm, or the machine, gives to this node's
    processes."""
    # Only Linux says which cores a job may use.
    here = len(os.sched_getaffinity(0)) if sys.platform == 'linux' else os.cpu_count()
    return here // int(os.environ.get('LOCAL_WORLD_SIZE', 1)) or 1      # torchrun says how many processes a node has


def use_cores(workers):
    """For a run on a CPU: each worker of the loader gets a core, this process gets the other cores (unless
    OMP_NUM_THREADS is set, as torchrun does for several processes), and freed memory is kept."""
    keep_memory()
    if 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(max(1, cores() - workers))


def keep_memory():
    """Make the C library keep memory that is freed. By default it hands large blocks back to the system. The next step
    then gets them again, page by page and filled with zeros, which takes a tenth of a vit-b-16 step on a CPU."""
    with contextlib.suppress(AttributeError):           # only glibc has mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)             # M_MMAP_MAX: no blocks from mmap, which go back when freed
        libc.mallopt(-1, -1)            # M_TRIM_THRESHOLD: no other memory goes back


def peak_memory(device):
    """The most memory used so far, in GB: by tensors on the GPU or, if there is none, by this process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == 'darwin' else 1e6)            # macOS counts bytes, Linux kilobytes


# --- 3. Precision and torch.compile ----------------------------------------------------------------------------------

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
    """torch.compile block by block, in place, so that parameters keep their names. A graph serves all layers of a tower
    and all lengths of captions, while the whole model would be compiled again for each length."""
    # torch allows 8 graphs per piece of code. All blocks run the same piece, and together they need more than 8: each
    # tower needs its own, with gradient and without, and its last block, which may compute one row only, needs more.
    torch._dynamo.config.cache_size_limit = 128
    # Inside DistributedDataParallel, torch would otherwise cut each block after its first megabyte of parameters, so
    # that gradients can be sent while others are computed. We need no cuts, because the gradients of other blocks are
    # sent meanwhile.
    torch._dynamo.config.optimize_ddp = False
    for block in [*model.visual.transformer.resblocks, *model.text.transformer.resblocks]:
        block.compile(dynamic=True)


# --- 4. Signals ------------------------------------------------------------------------------------------------------

SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1                 # USR1: Slurm
# Seconds. Under torchrun, signals that come within this time of the first count as the same one, because Slurm and
# torchrun may both deliver it.
ONE_EVENT = 2.0


@contextlib.contextmanager
def signals_caught():
    """Inside this block the first signal does not end the process. Instead its number is put into the list that the
    block gets. Another signal ends the process."""
    caught = []
    first = 0.0                     # when the first signal came

    def note(number, frame):
        nonlocal first
        now = time.monotonic()
        if not caught:
            caught.append(number)
            first = now
            # Not by print, because the signal may have interrupted a print.
            os.write(2, b'\nsignal     waiting for the end of this step, or of the evaluation under way; then '
                        b'the run is saved and ends. Another signal ends it at once\n')
        elif 'RANK' not in os.environ or now - first > ONE_EVENT:
            os._exit(128 + number)

    handlers = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# Seconds. A batch that takes longer is an error. A worker that was forked beside CUDA and nccl may, rarely, hang for ever
# (pytorch#130610), and the other processes would wait with it.
LONGEST_WAIT = 1800


def loading(workers):
    """Settings of a DataLoader. Its workers ignore the signals that end a run, and they end when the process ends."""
    if workers:
        atexit.register(end_workers)
    return {'num_workers': workers,
            'timeout': LONGEST_WAIT if workers else 0,
            'worker_init_fn': ignore_signals,
            # A forked worker shares the index of the shards, while a spawned one gets a copy. Without workers,
            # DataLoader refuses the setting.
            'multiprocessing_context': 'fork' if workers and sys.platform == 'linux' else None}


def ignore_signals(worker):
    """Slurm and torchrun signal all processes. If a worker died of a signal, the step under way would
    fail."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers():
    """Kill the workers. On exit Python would send them SIGTERM and wait; they ignore it, so the wait would never
    end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # otherwise torch raises an error for each worker that ends
    for worker in multiprocessing.active_children():
        if worker.daemon:               # as the loader's workers are; other children are not ours to kill
            worker.kill()
