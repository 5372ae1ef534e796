"""Colour changes, and blur, for a batch, on the device that holds the images."""
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

# --- 1. Operations: x is (n, 3, h, w) in [0, 1], a strength (n, 1, 1, 1) ---------------------------------------------

@lru_cache
def constant(numbers, device):
    """Three numbers -> (3, 1, 1) on a device. They are copied there only once, because each copy makes a GPU wait."""
    return torch.tensor(numbers, device=device).view(3, 1, 1)


def brightness(x, strength):
    return (x * strength).clamp_(0, 1)


def contrast(x, strength):
    mean = x.mean(dim=(2, 3), keepdim=True)             # (n, 3, 1, 1)
    grey = TF.rgb_to_grayscale(mean)                    # the mean of the grey image
    return torch.lerp(grey, x, strength).clamp_(0, 1)


def saturation(x, strength):
    grey = TF.rgb_to_grayscale(x)
    return torch.lerp(grey, x, strength).clamp_(0, 1)


def hue(x, turn):
    """Turn the hue; a turn of 1 is the full circle. RGB to HSV and back, as in textbooks."""
    red, green, blue = x.split(1, dim=1)                                # each (n, 1, h, w)
    value = x.amax(dim=1, keepdim=True)
    chroma = value - x.amin(dim=1, keepdim=True)
    # Six times the hue is computed by one of three formulas, depending on which channel is the largest. If two are
    # equally large, red goes before green, and green before blue. A grey pixel has no hue, so any value will do.
    per_chroma = 1 / chroma.clamp_min(1e-8)
    if_red = (green - blue) * per_chroma
    if_green = (blue - red) * per_chroma + 2
    if_blue = (red - green) * per_chroma + 4
    six_hue = torch.where(value == green, if_green, if_blue)
    six_hue = torch.where(value == red, if_red, six_hue)
    turned = six_hue / 6 + turn + 1                                     # + 1, so that it is never negative
    # Back: channel = value - chroma * clamp(min(k, 4 - k), 0, 1) with k = (start + 6 hue) mod 6. For a red pixel,
    # whose hue is 0, k is 5, 3, 1 and the clamp gives 0, 1, 1. So red stays at value, and the others lose the chroma.
    start = constant((5, 3, 1), x.device)               # for red, green, blue
    k = 6 * torch.frac(turned + start / 6)              # (n, 3, h, w)
    lost = torch.minimum(k, 4 - k).clamp_(0, 1)
    return value - chroma * lost


def blur(x, sigma):
    """Gaussian blur; borders are mirrored. The kernel ends after 6 pixels, which is three times the largest sigma."""
    offsets = torch.arange(-6, 7, device=x.device)
    # The softmax makes the kernel sum to 1. The clamp avoids denormal numbers, which are slow on a CPU.
    exponents = -0.5 * (offsets / sigma) ** 2           # (n, 1, 1, 13)
    kernel = exponents.clamp_min(-80).softmax(-1)
    kernel = kernel.repeat_interleave(3, dim=0)         # (3 n, 1, 1, 13): one per channel
    padded = F.pad(x, [6, 6, 6, 6], 'reflect')
    channels = padded.flatten(0, 1)                     # (3 n, h + 12, w + 12): one image of 3 n channels
    rows = F.conv2d(channels, kernel, groups=len(kernel))
    both = F.conv2d(rows, kernel.mT, groups=len(kernel))
    return both.view_as(x)


def solarize(x, threshold):
    return torch.where(x > threshold, 1 - x, x)


# In the order in which they act. The jitters act first, in an order that is drawn (Batch.views).
OPERATIONS = {
    'brightness': brightness,
    'contrast': contrast,
    'saturation': saturation,
    'hue': hue,
    'grey': saturation,         # with strength 0
    'blur': blur,
    'solarize': solarize}
JITTERS = ['brightness', 'contrast', 'saturation', 'hue']
AFTER_JITTERS = [name for name in OPERATIONS if name not in JITTERS]


# --- 2. Which images of a batch each operation changes ----------------------------------------------------------------

class Changes(NamedTuple):
    """The changes of B pairs with V views each, in two tables, because each tensor more is one more copy to a GPU.
    The CPU counts them, because asking a GPU how many images change would make it wait."""
    images: torch.Tensor        # (operations, V, B): the images that change, 0 to B - 1; then zeros, which are not used
    strengths: torch.Tensor     # (operations, V, B), in the same order
    counts: list                # for each operation V numbers: how many images change

    def to(self, device):
        return self._replace(images=self.images.to(device, non_blocking=True),
                             strengths=self.strengths.to(device, non_blocking=True))


def changes_of(pairs):
    """For each of B pairs its V dicts {operation: strength} -> Changes."""
    names = list(OPERATIONS)
    V = len(pairs[0])
    images = np.zeros((len(names), V, len(pairs)), np.int64)
    strengths = np.zeros(images.shape, np.float32)
    counts = [[0] * V for _ in names]
    for image, views in enumerate(pairs):
        for view, of_view in enumerate(views):
            for name, strength in of_view.items():
                operation = names.index(name)
                place = counts[operation][view]
                images[operation, view, place] = image
                strengths[operation, view, place] = strength
                counts[operation][view] += 1
    return Changes(torch.from_numpy(images), torch.from_numpy(strengths), counts)


def recolour(images, changes, view, order):
    """The uint8 images (B, 3, h, w) of a view, the Changes of all views, and a list of all operations in the order in
    which they act -> float32 in [0, 1]."""
    x = images.float().div_(255)
    names = list(OPERATIONS)
    for name in sorted(names, key=order.index):         # an error if an operation is missing in `order`
        operation = names.index(name)
        count = changes.counts[operation][view]
        if count:
            changed = changes.images[operation, view, :count]
            strengths = changes.strengths[operation, view, :count].view(-1, 1, 1, 1)
            x[changed] = OPERATIONS[name](x[changed], strengths)
    return x
