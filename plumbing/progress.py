"""What the loop of train.py remembers from one turn to the next: how fast it goes, and what goes wrong."""
import time
from dataclasses import dataclass

MOST_BROKEN = 5         # steps in a row whose gradient is not finite


@dataclass
class Progress:
    """Since this start. All ranks have the same, but for the times."""
    done: tuple = None      # the latest Step
    signals: int = 0        # processes that were signalled to end
    bad: int = 0            # pairs that could not be read,
    seen: int = 0           # of so many
    broken: int = 0         # steps in a row whose gradient was not finite
    # Since the last log entry:
    steps: int = 0
    seconds: float = 0.0    # that these steps took
    waited: float = 0.0     # of these seconds, those spent waiting for data
    begun: float = 0.0      # when the latest step began

    def next_batch(self, batches):
        """A step begins with this."""
        self.begun = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - self.begun
        return batch

    def count(self, done, scale, pairs, bad, signals):
        """A step ends with this. scale: that of fp16's scaler, else 1. pairs: how many the step had. bad, signals: how
        many came in this step and so far, on all ranks together."""
        self.done = done
        self.seen += pairs
        self.bad += bad
        self.signals = signals
        if done.finite:
            self.broken = 0
        elif scale <= 1:    # fp16 starts higher, and each overflow halves the scale until it fits
            self.broken += 1
        self.steps += 1
        self.seconds += time.perf_counter() - self.begun

    def restart_clock(self):
        self.steps = 0
        self.seconds = self.waited = 0.0

    def reason_to_fail(self, step, folder):
        """A sentence if too many pairs are bad, or too many steps in a row broken, else None."""
        if self.bad > max(0.05 * self.seen, 10):
            return (f'over 5 % of the pairs cannot be read ({self.bad:.0f} of {self.seen}); '
                    'see the lines above, and python -m extras.prepare inspect')
        if self.broken == MOST_BROKEN:
            return (f'{MOST_BROKEN} steps in a row were not finite, the last is step {step}; they '
                    f'have not changed the weights in {folder}/last.pt: give the same command with '
                    '--resume and a lower --lr, --clip-grad 1, or --precision fp32')
        return None
