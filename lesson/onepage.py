"""A whole training run of COSMOS on one page, without options, checkpoints or several GPUs.

    python -m lesson.onepage            draws scenes, trains for some minutes on two CPU cores, prints figures

It takes the student, the teacher and the losses from cosmos.py, the views from data.py, and drawn scenes from
lesson/scenes.py. train.py takes the same steps, and a test holds the two together, bit for bit. So all that train.py
has beside this page keeps a run alive; it changes no number.
"""
import math

import torch

from cosmos import COSMOS, GLOBALS, Config, Teacher, cosmos_terms, no_terms, total_loss
from data import Counts, Crops, Order, Shards, Tokenizer, collate
from eval import preprocessing, show, zero_shot_retrieval
from lesson import suppression
from lesson.scenes import built_in_set
from plumbing.processes import choose_dtype, keep_memory
from plumbing.tokenizer import learn_merges

COUNTS = Counts(local_images=2, local_texts=2)      # of a pair, beside GLOBALS global ones of both
CONTEXT = 64                    # tokens of a caption, at most


def learn_tokenizer(shards):
    """A tokenizer whose vocabulary is learned from the captions of training shards."""
    return Tokenizer(learn_merges(shards), CONTEXT)


def print_loss(step, loss, parts):
    if step % 100 == 0:
        print(f'step {step:5}  loss {loss:.3f}')
        for name, (weight, term) in parts.items():
            print(f'    {name:10} {term:.3f}')


def learning_rate(step, steps, peak):
    """It rises for a tenth of the run, at most 100 steps, then falls along a cosine to a tenth of the peak."""
    warmup = min(100, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return peak * (0.1 + (1 - 0.1) * cosine)


def train(folder, steps=1000, seed=0, precision='auto',
          model=COSMOS, terms=cosmos_terms, heads=4, counts=COUNTS, crop_min=0.4,
          order=Order, batch=32, rate=1e-3, watch=print_loss):
    """-> student, teacher, optimizer. folder: scenes as lesson/scenes.py draws them.

    What comes after `precision` is for the experiments of the course; a first reader may take it as it is. model: its
    class. terms: what is learned beside L_CLIP. heads: of cross-attention; with 0, a plain CLIP, give other terms.
    counts: of views and captions. crop_min: least share of the image in a global crop. order: which pairs make a batch.
    rate: the peak of the learning rate. watch(step, loss, parts) is called after every step.
    """
    keep_memory()                                       # a CPU is a tenth faster so
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    dtype = choose_dtype(precision, device)             # bfloat16 where it is fast; None: float32
    multiple = 8 if dtype else 1                        # of the lengths of captions: half precision likes 8

    # The training set: (epoch, index of a pair) -> random crops of the image, random sentences of its captions as ids.
    shards = Shards(folder, split='train')
    tokenizer = learn_tokenizer(shards)
    config = Config(embed_dim=128, cross_heads=heads,
                    image_size=48, local_image_size=24, patch_size=8,
                    vision_width=96, vision_layers=4, vision_heads=3,
                    text_width=128, text_layers=2, text_heads=2,
                    context_length=CONTEXT, vocab_size=tokenizer.vocab_size)
    pairs = Crops(shards, tokenizer, config, seed, counts, 'crops', crop_min)

    # Student, teacher, optimizer. Only matrices decay.
    torch.manual_seed(seed)
    student = model(config).to(device)
    teacher = Teacher(student)
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim < 2]
    groups = [{'params': matrices, 'weight_decay': 0.1}, {'params': vectors, 'weight_decay': 0.0}]
    optimizer = torch.optim.AdamW(groups, rate, betas=(0.9, 0.98), fused=True)

    batches = order(len(shards), batch, start=0, stop=steps, seed=seed)
    for step, places in enumerate(batches):
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(step, steps, rate)

        # A batch of B pairs. Captions are cut, but C^T reads the padding of caption 0, so that one stays whole.
        samples = [pairs[place] for place in places]    # a place: (epoch, index of a pair)
        inputs = collate(samples, multiple, heads > 0, counts.global_texts).to(device)
        images = inputs.views(f'{seed} {step}')         # V tensors (B, 3, s, s)
        texts = inputs.texts                            # U tensors (B, T)

        # The student sees all views and captions, the teacher the globals. (Its captions are the same, cut shorter.)
        cls_t = eot_t = None
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            out = student(images, texts)
            if terms is not no_terms:                   # a plain CLIP learns nothing from it
                cls_t, eot_t = teacher(images[:GLOBALS], inputs.teacher_texts)
        loss, parts = total_loss(student, out, cls_t, eot_t, terms)     # in float32

        # The student follows the gradient, the teacher the student. lambda rises: early students are soon forgotten.
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        student.clamp_scales()
        momentum = min(0.995, (step + 1) / (step + 11))
        teacher.update(student, momentum)
        watch(step + 1, loss, parts)
    return student, teacher, optimizer


if __name__ == '__main__':
    folder = built_in_set()
    _, teacher, _ = train(folder)
    model = teacher.model               # the average of many students knows more than the last one
    tokenizer = learn_tokenizer(Shards(folder / 'train'))
    held_out = Shards(folder / 'val')
    evaluated = model, tokenizer, preprocessing(model.config.image_size)
    figures, image_features = zero_shot_retrieval(*evaluated, held_out)
    show(figures | suppression.during_training(*evaluated, image_features, held_out))
