"""--accum: a batch runs in parts, with the gradient of the whole batch."""
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from cosmos import Output


def part_by_part(network, images, texts, accum):
    """network(images, texts), called for one part of the batch after another -> its outputs, joined along the batch."""
    outputs = []
    for k in range(accum):
        images_k = [view.chunk(accum)[k] for view in images]        # (B / accum, 3, s, s)
        texts_k = [text.chunk(accum)[k] for text in texts]          # (B / accum, T)
        outputs.append(network(images_k, texts_k))
    joined = []
    for pieces in zip(*outputs):
        # Without cross-attention the student's h_I and h_T are None. They keep their places among the outputs.
        joined.append(None if pieces[0] is None else torch.cat(pieces, dim=1))
    return joined


class StudentInParts(torch.nn.Module):
    """The student, for DistributedDataParallel, which sees one forward pass. With several parts no activations are
    stored: the backward pass computes them again, part by part. The loss sees the embeddings of all parts at once, so
    the gradient is that of the whole batch, up to rounding. Averaging the losses of the parts would lose negatives."""

    def __init__(self, student, accum):
        super().__init__()
        self.student = student
        self.accum = accum

    def forward(self, images, texts):
        if self.accum == 1:
            return self.student(images, texts)
        # The student draws no random numbers, so their state need not be kept.
        again_later = partial(checkpoint, self.student, use_reentrant=False, preserve_rng_state=False)
        return Output(*part_by_part(again_later, images, texts, self.accum))
