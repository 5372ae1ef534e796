"""Weights, images and captions by formula. formula.json has what the released code computes from them, to which
test_cosmos.py compares ours; `python -m tests.released CLONE` runs the released code on them anew."""
import math

import torch

from cosmos import COSMOS, GLOBALS, Config
from plumbing.weights import from_openclip, to_openclip

SMALL = Config(
    embed_dim=24, image_size=32, local_image_size=16, patch_size=8,
    vision_width=32, vision_layers=2, vision_heads=2,
    text_width=24, text_layers=2, text_heads=2, context_length=12, vocab_size=30)


def wave(shape, number, size=1.0):
    j = torch.arange(math.prod(shape), dtype=torch.float64)
    return (size * (0.1 * j ** 2 + number).sin()).float().view(shape)


def wavy_model(first):
    """Every parameter except the scales is a wave, numbered from `first` in the order of the released names."""
    model = COSMOS(SMALL)
    state = to_openclip(model.state_dict())
    for number, name in enumerate(sorted(state), first):
        if not name.endswith('logit_scale'):
            state[name] = wave(state[name].shape, number, 0.2)
    model.load_state_dict(from_openclip(state))
    return model


def wavy_inputs(config=SMALL, pairs=3, views=5, captions=4):
    """-> images, a list of V (B, 3, s, s), and texts, a list of U (B, T). Captions of SMALL have 3 to 7 words. If the
    context is 77, global captions have 3 to 75 words, and local ones 3 to 19."""
    images = []
    for k in range(views):
        side = config.image_size if k < GLOBALS else config.local_image_size
        images.append(wave((pairs, 3, side, side), k))
    T = config.context_length
    end = config.vocab_size - 1
    texts = torch.zeros(captions, pairs, T, dtype=torch.long)
    for u in range(captions):
        stretch = max(1, (T - 5) // (4 if u < GLOBALS else 16))
        for b in range(pairs):
            count = 3 + (u + 2 * b) % 5 * stretch
            k = torch.arange(count)
            texts[u, b, 0] = end - 1
            texts[u, b, 1:count + 1] = 1 + (5 * u + 3 * b + 7 * k) % (end - 2)
            texts[u, b, count + 1] = end
    return images, list(texts)
