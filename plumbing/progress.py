"""What the loop of train.py counts from one step to the next: how fast it goes, what goes wrong, and the log entry."""
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from cosmos import gather, term_weights
from plumbing.processes import peak_memory

# What an entry of the log can hold, apart from the terms that a method adds to L_CLIP.
LOG_NAMES = set('step loss clip weights chance accuracy spread lr momentum scale distill_scale grad_norm cosine '
                'pairs_per_s TFLOP_per_s waiting memory_GB bad_pairs eval'.split())
MOST_BROKEN = 5         # this many steps in a row without a finite gradient end the run


@dataclass
class Progress:
    """What has happened since this process started. All ranks have the same numbers, except for the times."""
    latest: tuple = None    # the latest train.StepResult; None before the first one
    signals: int = 0        # how many processes got a signal to end
    bad: int = 0            # pairs that could not be read
    seen: int = 0           # pairs of all steps
    broken: int = 0         # how many of the latest steps, in a row, had no finite gradient
    begun: float = 0.0      # when the latest step began
    # Since the last log entry:
    steps: int = 0
    seconds: float = 0.0    # what these steps took
    flops: int = 0          # of one step of this process, see first_step_counted
    waited: float = 0.0     # the part of them spent waiting for data

    def next_batch(self, batches):
        """Every step begins with this call."""
        self.begun = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - self.begun
        return batch

    @contextmanager
    def first_step_counted(self):
        """Counts the floating-point operations of the first step in this block: those of matrix products, convolutions
        and attention, in student and teacher, forward and backward, as torch counts them. A product of m x k and k x n
        has 2 m k n. Later steps count as equal, although their captions may be cut to other lengths."""
        if self.flops:
            yield
            return
        counter = FlopCounterMode(display=False)
        # NB: what torch.compile met first inside the counter would never be compiled, so this step runs without it.
        with counter, torch.compiler.set_stance('force_eager'):
            yield
        self.flops = counter.get_total_flops()

    def count(self, latest, scale, pairs, bad, signals):
        """Every step ends with this call. scale: that of fp16's scaler, otherwise 1. Over all ranks: pairs and bad of
        this step, and signals so far."""
        self.latest = latest
        self.seen += pairs
        self.bad += bad
        self.signals = signals
        if latest.finite:
            self.broken = 0
        elif scale <= 1:    # above 1 it is fp16 that overflows: the scale is halved until it fits
            self.broken += 1
        self.steps += 1
        self.seconds += time.perf_counter() - self.begun

    def reason_to_fail(self, step, folder):
        """A sentence if too many pairs are bad, or if too many steps in a row are broken; otherwise None."""
        read = self.seen + self.bad             # for each bad one another pair was read
        if self.bad > max(0.05 * read, 10):
            return (f'over 5 % of the pairs cannot be read ({self.bad:.0f} of {read:.0f}); '
                    'see the lines above, and python -m extras.look')
        if self.broken == MOST_BROKEN:
            return (f'the gradients of {MOST_BROKEN} steps in a row, up to step {step}, were not finite; they '
                    f'are not saved, and {folder}/last.pt, if any, is as it was before, so give the same command with '
                    '--resume and a lower --lr, --clip-grad 1, or --precision fp32')
        return None


@torch.no_grad()
def log_entry(run, progress):
    """The log entry of the latest step, {name: value}. Every rank must call it. What progress counts since the last
    entry begins anew."""
    latest = progress.latest
    cls_of_all, eot_of_all = gather(latest.out.cls[:1], latest.out.eot[:1])
    images = cls_of_all.keys[0]     # view 0 of the pairs of all ranks, (N, D)
    captions = eot_of_all.keys[0]   # and caption 0
    nearest = (images @ captions.T).argmax(dim=1).cpu()     # which caption each image finds, (N,)
    entry = {  # the same on all ranks, except the speeds; rank 0 writes its own
        'step': run.step,
        'lr': latest.lr,
        'chance': math.log(run.options.batch),  # what guessing costs in each term of the loss
        'weights': term_weights(latest.terms, run.method.clip_weight),
        'accuracy': (nearest == torch.arange(len(nearest))).double().mean().item(),
        'spread': images.std(dim=0, correction=0).norm().item(),  # from 0, all images alike, to 1
        'grad_norm': latest.norm.item(),
        'scale': run.student.logit_scale.exp().item(),
        'pairs_per_s': progress.steps * run.options.batch / progress.seconds,
        'TFLOP_per_s': progress.steps * progress.flops / progress.seconds / 1e12,       # of this process
        'bad_pairs': progress.bad}
    if run.student.has_two_scales:
        entry['distill_scale'] = run.student.distill_logit_scale.exp().item()
    # What differs between ranks. Its mean is logged.
    means = {'loss': latest.loss, 'waiting': progress.waited / progress.seconds}
    means |= latest.terms
    memory = peak_memory(run.processes.device)
    if memory is not None:
        means['memory_GB'] = memory
    if run.teacher:
        entry['momentum'] = latest.momentum
        cls = latest.out.cls[0]                                 # (B, D)
        means['cosine'] = (cls * latest.cls_t[0]).sum() / len(cls)      # of student and teacher, view 0
    for name, total in zip(means, run.processes.sum(means.values())):
        entry[name] = total / run.processes.world
    progress.steps = 0
    progress.seconds = progress.waited = 0.0
    return entry


def print_entry(entry, options):
    """Print the numbers to watch from a log entry."""
    seconds_left = (options.steps - entry['step']) * options.batch / entry['pairs_per_s']
    line = ('step {step}  loss {loss:.3f}  clip {clip:.3f}  accuracy {accuracy:.0%}  lr {lr:.1e}  '
            '{pairs_per_s:.0f} pairs/s  {TFLOP_per_s:.3g} TFLOP/s'.format(**entry))
    tqdm.write(f'{line}  {timedelta(seconds=int(seconds_left))} left')
