"""--accum: a batch runs in parts, with the gradient of the whole batch."""
import torch
from torch.utils.checkpoint import checkpoint

from cosmos import Output


class InParts(torch.nn.Module):
    """The student, run on --accum parts of a batch. DistributedDataParallel wraps it, and sees one forward pass.

    With several parts no activations are stored. The backward pass computes them again, part by part (checkpoint). The
    loss sees the embeddings of all parts at once, so the gradient is that of the whole batch, up to rounding. Averaging
    the losses of the parts would lose negatives.
    """

    def __init__(self, student, accum):
        super().__init__()
        self.student = student
        self.accum = accum

    def forward(self, images, texts):
        if self.accum == 1:
            return self.student(images, texts)
        outs = []
        for k in range(self.accum):
            some_images = [view.chunk(self.accum)[k] for view in images]    # (B / accum, 3, s, s)
            some_texts = [text.chunk(self.accum)[k] for text in texts]      # (B / accum, T)
            outs.append(checkpoint(self.student, some_images, some_texts, use_reentrant=False))
        # Join the parts along the batch: cls, eot and, with cross-attention, h_I and h_T. Without it these two are
        # None.
        joined = [torch.cat(pieces, dim=1) for pieces in zip(*outs) if pieces[0] is not None]
        return Output(*joined)
