"""Changes of colour in batches, each image with a strength of its own, on the device where the images are."""
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

# Below, x is (n, 3, h, w) in [0, 1] and a strength (n, 1, 1, 1).

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
    """Turn the hue: RGB to HSV and back, by the textbook."""
    red, green, blue = x.split(1, dim=1)                                # each (n, 1, h, w)
    value = x.amax(dim=1, keepdim=True)
    chroma = value - x.amin(dim=1, keepdim=True)
    # 6 hue, in a case for each largest channel: green or blue, then red over both. Of grey any hue will do.
    share = 1 / chroma.clamp_min(1e-8)
    if_red = (green - blue) * share
    if_green = (blue - red) * share + 2
    if_blue = (red - green) * share + 4
    six_hue = torch.where(value == green, if_green, if_blue)
    six_hue = torch.where(value == red, if_red, six_hue)
    turned = six_hue / 6 + turn + 1                                     # + 1: never below 0
    # Back: channel = value - chroma * clamp(min(k, 4 - k), 0, 1), k = (start + 6 hue) mod 6. Of red, hue 0, k is
    # 5, 3, 1, and the clamp 0, 1, 1: the red channel stays at value.
    start = torch.tensor([5, 3, 1], device=x.device)    # of red, green, blue
    start = start.view(3, 1, 1)
    k = 6 * torch.frac(turned + start / 6)              # (n, 3, h, w)
    lost = torch.minimum(k, 4 - k).clamp_(0, 1)
    return value - chroma * lost


def blur(x, sigma):
    """Gaussian blur; borders are mirrored. The kernel ends after 6 pixels, three of the largest sigma."""
    offsets = torch.arange(-6, 7, device=x.device)
    # The softmax makes its sum 1. The clamp avoids denormal numbers, which are slow on a CPU.
    exponents = -0.5 * (offsets / sigma) ** 2           # (n, 1, 1, 13)
    kernel = exponents.clamp_min(-80).softmax(-1)
    kernel = kernel.repeat_interleave(3, dim=0)         # (3 n, 1, 1, 13): for each channel
    padded = F.pad(x, [6, 6, 6, 6], 'reflect')
    channels = padded.flatten(0, 1)                     # (3 n, h + 12, w + 12): one image of 3 n channels
    rows = F.conv2d(channels, kernel, groups=len(kernel))
    both = F.conv2d(rows, kernel.mT, groups=len(kernel))
    return both.view_as(x)


def solarize(x, threshold):
    return torch.where(x > threshold, 1 - x, x)


OPERATIONS = {
    'brightness': brightness,
    'contrast': contrast,
    'saturation': saturation,
    'hue': hue,
    'grey': saturation,         # with strength 0
    'blur': blur,
    'solarize': solarize}
# Strengths that change nothing. An image with such a one is left out of the operation.
NEUTRAL = {
    'brightness': 1.0,
    'contrast': 1.0,
    'saturation': 1.0,
    'hue': 0.0,
    'grey': 1.0,
    'blur': 0.0,
    'solarize': 1.0}
JITTERS = 'brightness', 'contrast', 'saturation', 'hue'


def recolour(images, strengths, order):
    """uint8 (B, 3, h, w), strengths {operation: (B,)} on the CPU, the operations in order -> float32 in [0, 1].

    Were the strengths on a GPU, each operation would wait for it to know how many images it changes.
    """
    x = images.float().div_(255)
    for name in order:
        is_changed = strengths[name] != NEUTRAL[name]
        changed = is_changed.nonzero().flatten()        # which images
        if len(changed):
            strength = strengths[name][changed].view(-1, 1, 1, 1)
            strength = strength.to(x.device, non_blocking=True)
            changed = changed.to(x.device, non_blocking=True)
            x[changed] = OPERATIONS[name](x[changed], strength)
    return x
