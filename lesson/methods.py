"""train.py, with the methods that only the course compares.

    python -m lesson.methods --method every-image --preset photo --data shards --out runs/every-image

Its options are those of train.py. A program of yours may add rows of its own in the same way: train.add_method, then
train.main.
"""
import torch
import torch.nn.functional as F

import train
from cosmos import COSMOS, Output, has_other_ranks, unit
from data import TrainingSet, draw_sentences, text_crops
from extras.report import Report
from lesson.scenes import built_in_set
from lesson.suppression import Named
from plumbing.errors import command, need

# --- 1. Reading ------------------------------------------------------------------------------------------------------

class ReadsAnotherPair(COSMOS):
    """What is read comes from another pair than the targets, so it cannot help to find them. With --accum or several
    processes it comes from the same part of the batch."""

    def read(self, cls, eot, patches, words):
        need(len(patches) > 1, '--method another-pair needs two pairs or more in each part of a batch; give a lower '
             '--accum, or a larger --batch')
        # Pair i reads the image and the caption of pair i - 1.
        patches = patches.roll(1, dims=0)
        words = words.roll(1, dims=0)
        return super().read(cls, eot, patches, words)


class ReadsEveryImage(COSMOS):
    """Each caption reads every image of the batch through C^I, and what it reads there is not added to eot. So what was
    read cannot give the image away: the right one must be found by what agrees with the caption. After FLAIR (CVPR
    2025). One process, because patches are not gathered, and --accum 1."""

    def forward(self, images, texts):
        """-> Output without h_I. Its h_T is (U, B, B, D): what each caption has read in each image."""
        need(not has_other_ranks(), '--method every-image needs the whole batch at once; give it one process')
        cls, eot, patches, _ = self.encode(images, texts)
        captions = eot.flatten(0, 1)                                    # (U * B, D)
        # The captions of all pairs are queries of each image.
        queries = captions[:, None].expand(-1, len(patches), -1)        # (U * B, B, D)
        read = self.read_image(queries, patches)                        # (U * B, B, D)
        h_T = unit(read).unflatten(0, eot.shape[:2])
        return Output(cls=unit(cls), eot=unit(eot), h_T=h_T)


def every_image_terms(out, cls_t, eot_t, scale):
    """A caption must find its own image among all images, by what it reads in each, and an image its own caption. The
    self-distillation of both sides is added, as in text-distill."""
    scores = scale * (out.h_T * out.eot[:, :, None]).sum(dim=-1)        # (U, B captions, B images)
    U, B, images = scores.shape
    need(images == B, '--method every-image needs the whole batch at once; give it --accum 1')
    own_pair = torch.arange(B, device=scores.device).repeat(U)          # (U * B,)
    of_captions = scores.flatten(0, 1)                                  # (U * B, B images)
    of_images = scores.transpose(1, 2).flatten(0, 1)                    # (U * B, B captions)
    finds_image = F.cross_entropy(of_captions, own_pair)
    finds_caption = F.cross_entropy(of_images, own_pair)
    reads = (finds_image + finds_caption) / 2
    distilled = train.METHODS['text-distill'].terms(out, cls_t, eot_t, scale)
    return {'reads': reads} | distilled


# --- 2. Captions -----------------------------------------------------------------------------------------------------

class LongCaptions(TrainingSet):
    """Local captions have one to five sentences, too, so they differ from the global ones only in who sees them."""

    def captions(self, pool, rng):
        count = self.counts.global_texts + self.counts.local_texts
        return text_crops(pool, rng, count, 0)


class ShortCaptions(TrainingSet):
    """Global captions are single sentences, too."""

    def captions(self, pool, rng):
        global_captions = [rng.choice(pool) for _ in range(self.counts.global_texts)]
        return global_captions + draw_sentences(pool, self.counts.local_texts, rng)


# --- 3. The rows -----------------------------------------------------------------------------------------------------

def add_methods():
    add = train.add_method
    add('several-captions', 'clip-aug', has_text_crops=True)
    add('another-pair', 'cosmos', student=ReadsAnotherPair)
    add('without-clip', 'cosmos', clip_weight=0)
    add('every-image', 'cosmos', student=ReadsEveryImage, terms=every_image_terms)
    add('teacher-sees-all', 'cosmos', teacher_sees_locals=True)
    add('long-captions', 'cosmos', train_set=LongCaptions)
    add('short-captions', 'cosmos', train_set=ShortCaptions)


def main(argv=None):
    add_methods()
    train.main(argv, [Named(), Report()], built_in_set)


if __name__ == '__main__':
    command(main)
