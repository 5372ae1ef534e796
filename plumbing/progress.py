"""What the loop of train.py remembers from one step to the next: how fast it goes, and what goes wrong."""
import time
from dataclasses import dataclass

MOST_BROKEN = 5         # this many steps in a row without a finite gradient end the run


@dataclass
class Progress:
    """What has happened since this process started. All ranks have the same numbers, except for the times."""
    done: tuple = None      # the latest Step
    signals: int = 0        # how many processes got a signal to end
    bad: int = 0            # pairs that could not be read
    seen: int = 0           # pairs of all steps
    broken: int = 0         # how many of the latest steps, in a row, had no finite gradient
    begun: float = 0.0      # when the latest step began
    # Since the last log entry:
    steps: int = 0
    seconds: float = 0.0    # what these steps took
    waited: float = 0.0     # the part of them spent waiting for data

    def next_batch(self, batches):
        """Every step begins with this call."""
        self.begun = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - self.begun
        return batch

    def count(self, done, scale, pairs, bad, signals):
        """Every step ends with this call. scale: that of fp16's scaler, otherwise 1. All others are sums over all
        ranks: pairs, how many the step had; bad, how many of these were unreadable; signals, how many processes got a
        signal so far."""
        self.done = done
        self.seen += pairs
        self.bad += bad
        self.signals = signals
        if done.finite:
            self.broken = 0
        elif scale <= 1:    # above 1 it is fp16 that overflows: the scale is halved until it fits
            self.broken += 1
        self.steps += 1
        self.seconds += time.perf_counter() - self.begun

    def restart_clock(self):
        self.steps = 0
        self.seconds = self.waited = 0.0

    def reason_to_fail(self, step, folder):
        """A sentence if too many pairs are bad, or if too many steps in a row are broken; otherwise None."""
        if self.bad > max(0.05 * self.seen, 10):
            read = self.seen + self.bad         # for each bad one another pair was read
            return (f'over 5 % of the pairs cannot be read ({self.bad:.0f} of {read:.0f}); '
                    'see the lines above, and python -m extras.prepare inspect')
        if self.broken == MOST_BROKEN:
            return (f'the gradients of {MOST_BROKEN} steps in a row, up to step {step}, were not finite; they '
                    f'are not saved, and {folder}/last.pt is as it was before, so give the same command with '
                    '--resume and a lower --lr, --clip-grad 1, or --precision fp32')
        return None
