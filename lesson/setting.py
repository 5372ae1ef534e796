"""What the experiments of the course change in lesson/onepage.py. If you read nothing but onepage.py, you may skip
this."""
from collections.abc import Callable
from typing import NamedTuple

from cosmos import COSMOS, cosmos_terms
from data import Counts, Order


def print_loss(step, loss, parts):
    if step % 100 == 0:
        print(f'step {step:5}  loss {loss:.3f}')
        for name, (weight, term) in parts.items():
            print(f'    {name:10} {term:.3f}')


class Setting(NamedTuple):
    """The defaults are COSMOS, as train.py trains it with the preset `tiny`."""
    counts: Counts = Counts(local_images=2, local_texts=2)      # on top of the global ones
    augment: str = 'crops'              # data.Crops explains augment and crop_min
    crop_min: float = 0.4
    model: type = COSMOS                # the class of the student
    heads: int = 4                      # of C^I and C^T; 0: neither, so no h_I and h_T for `terms`
    terms: Callable = cosmos_terms      # gives the losses in addition to L_CLIP
    order: Callable = Order             # which pairs make a batch
    watch: Callable = print_loss        # called after every step
