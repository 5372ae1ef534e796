"""A whole training run of COSMOS on one page, without options, checkpoints or several GPUs.

    python -m lesson.onepage            draws scenes, trains for some minutes on two CPU cores, prints figures

It takes the student, the teacher and the losses from cosmos.py, the views from data.py, and drawn scenes from
lesson/scenes.py. With the preset `tiny` and its defaults train.py takes the same steps: a test holds the two together,
bit for bit. What train.py has beside this page keeps a run alive, or is an option.
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
          model=COSMOS, terms=cosmos_terms, heads=4, counts=COUNTS, augment='crops', crop_min=0.4,
          order=Order, batch=32, rate=1e-3, watch=print_loss):
    """-> student, teacher, optimizer. folder: scenes as lesson/scenes.py draws them, or other shards.

    What comes after `precision` is for the experiments of the course; a first reader may take it as it is. model: the
    class of the student. terms: what is learned beside L_CLIP. heads: of C^I and C^T; 0 gives a plain CLIP, and then
    terms must not be cosmos_terms. counts: of views and captions. augment, crop_min: see data.Crops. order, batch:
    which pairs make a batch. rate: the peak. watch(step, loss, parts) is called after every step.
    """
    keep_memory()                                       # makes a CPU a tenth faster
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    dtype = choose_dtype(precision, device)             # bfloat16 where it is fast; None: float32
    multiple = 8 if dtype else 1                        # of the lengths of captions: half precision likes 8

    # Sizes are those of the preset `tiny` of train.py.
    shards = Shards(folder, split='train')
    tokenizer = learn_tokenizer(shards)
    config = Config(embed_dim=128, cross_heads=heads,
                    image_size=48, local_image_size=24, patch_size=8,
                    vision_width=96, vision_layers=4, vision_heads=3,
                    text_width=128, text_layers=2, text_heads=2,
                    context_length=CONTEXT, vocab_size=tokenizer.vocab_size)
    # (epoch, index of a pair) -> random crops of the image, random sentences of its captions as ids
    train_set = Crops(shards, tokenizer, config, seed, counts, augment, crop_min)

    # Student, teacher, optimizer. Weight decay is for matrices, not for biases, LayerNorms and scales.
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
        samples = [train_set[place] for place in places]
        inputs = collate(samples, multiple, whole_first=heads > 0, global_texts=counts.global_texts).to(device)
        images = inputs.views(f'{seed} {step}')         # V tensors (B, 3, s, s)
        texts = inputs.texts                            # U tensors (B, T)

        # The student sees all views and captions, the teacher the globals, with caption 0 cut like the others.
        cls_t = eot_t = None
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            out = student(images, texts)
            if terms is not no_terms:                   # L_CLIP alone needs no teacher
                cls_t, eot_t = teacher(images[:GLOBALS], inputs.teacher_texts)
        loss, parts = total_loss(student, out, cls_t, eot_t, terms)     # in float32

        # The student follows the gradient, the teacher the student. lambda starts low, to forget the random start.
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        student.clamp_scales()
        taken = step + 1
        teacher.update(student, min(0.995, taken / (taken + 10)))
        watch(taken, loss, parts)
    return student, teacher, optimizer


if __name__ == '__main__':
    folder = built_in_set()
    _, teacher, _ = train(folder)
    model = teacher.model               # the average of many students knows more than the last one
    tokenizer = learn_tokenizer(Shards(folder, split='train'))          # the same as in `train`
    scored = model, tokenizer, preprocessing(model.config.image_size)
    held_out = Shards(folder, split='val')
    figures, image_features = zero_shot_retrieval(*scored, held_out)
    show(figures | suppression.during_training(*scored, image_features, held_out))      # objects named
