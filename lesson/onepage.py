"""A whole training run of COSMOS on one page, without options, checkpoints or several GPUs.

    python -m lesson.onepage            draws scenes if need be, trains (minutes on two CPU cores), prints scores

Student, teacher and losses come from cosmos.py, views from data.py, drawn scenes from lesson/scenes.py. Symbols:

    B pairs in a batch      V views of an image: 2 large (global) ones, 2 small (local) ones
                            U captions: 2 global ones of up to five sentences, 2 local ones of a single sentence
    T tokens of a caption   cls_t, eot_t: the teacher's vectors of the global images and of the global captions

`python train.py --preset tiny` takes the same steps. A test runs both for 20 steps in float32 (train.py with
--precision fp32 --batch 4 --workers 0), and checks that student, teacher and optimizer agree bit for bit. The rest of
train.py deals with options, other methods, several GPUs, logging and recovery.
"""
import math

import torch

from cosmos import COSMOS, GLOBALS, Config, Teacher, total_loss
from data import Counts, Order, Shards, Tokenizer, TrainingSet, collate
from eval import preprocessing, show, zero_shot_retrieval
from lesson import suppression
from lesson.scenes import built_in_set
from plumbing.errors import command
from plumbing.options import Parser
from plumbing.processes import choose_dtype, keep_memory
from plumbing.tokenizer import learn_merges

CONTEXT = 64                    # maximum tokens per caption, start and end included


def learning_rate(step, steps, peak):
    """The rate rises for a tenth of the run, at most 100 steps, then falls along a cosine to a tenth of the peak."""
    warmup = min(100, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return peak * (0.1 + (1 - 0.1) * cosine)


def train(folder, steps=1000, seed=0, precision='auto', batch=32, rate=1e-3):
    """-> student, teacher, optimizer. folder: where the shards are, such as those that lesson/scenes.py draws. rate:
    the peak learning rate."""
    keep_memory()                                       # keep freed memory for reuse, which is faster
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    dtype = choose_dtype(precision, device)             # auto: bfloat16 if it is fast here; None: float32
    multiple = 8 if dtype else 1        # caption lengths are rounded up to a multiple: faster in half precision

    # Sizes and recipe are those of the preset `tiny` of train.py. The paper's recipe is that of `vit-b-16`.
    shards = Shards(folder, split='train')
    batch = min(batch, len(shards))                     # a set smaller than a batch is one batch
    tokenizer = Tokenizer(learn_merges(shards), CONTEXT)        # its vocabulary is learned from the captions
    config = Config(embed_dim=128, cross_heads=4,
                    image_size=48, local_image_size=24, patch_size=8,
                    vision_width=96, vision_layers=4, vision_heads=3,
                    text_width=128, text_layers=2, text_heads=2,
                    context_length=CONTEXT, vocab_size=tokenizer.vocab_size)
    # train_set[epoch, index]: four random crops of image number `index`, two global and two local, and the token ids of
    # four captions.
    counts = Counts(local_images=2, local_texts=2)
    train_set = TrainingSet(shards, tokenizer, config, seed, counts, augment='crops')

    # Student, teacher, optimizer. Weight decay applies to matrices (and the patches' convolution), but not to vectors
    # and scales, which are biases, LayerNorms, the class embedding and both temperatures.
    torch.manual_seed(seed)
    student = COSMOS(config).to(device)
    teacher = Teacher(student)
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim < 2]
    groups = [{'params': matrices, 'weight_decay': 0.1}, {'params': vectors, 'weight_decay': 0.0}]
    optimizer = torch.optim.AdamW(groups, rate, betas=(0.9, 0.98), fused=True)

    # For each step the places of B pairs, (epoch, index of the pair).
    order = Order(len(shards), batch, start=0, stop=steps, seed=seed)
    for step, places in enumerate(order):
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(step, steps, rate)

        # A batch of B pairs. Global captions are cut to the longest global of the batch, local ones to the longest
        # local. Only the student's caption 0 stays whole, because cross-attention reads the vectors of its padding.
        # They come last, and the text tower is causal, so they have seen the whole caption.
        samples = [train_set[place] for place in places]
        inputs = collate(samples, multiple, whole_first=True).to(device)
        images = inputs.views(seed, step)               # V (B, 3, s, s), normalised
        texts = inputs.texts                            # U tensors (B, T) of different T

        # The student sees all views and captions, the teacher only the globals; its caption 0 is cut, too.
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            out = student(images, texts)
            cls_t, eot_t = teacher(images[:GLOBALS], inputs.teacher_texts)
        loss, terms = total_loss(student, out, cls_t, eot_t)            # L_CLIP + L_COSMOS, in float32

        # The optimizer moves the student. The teacher follows it, quickly at first so that its random start fades. From
        # step 1,990 on, if a run is that long, the momentum is 0.995.
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        student.clamp_scales()
        taken = step + 1
        teacher.update(student, min(0.995, taken / (taken + 10)))
        if taken % 100 == 0:
            print(f'step {taken:5}  loss {loss:.3f}')
            for name, term in terms.items():
                print(f'    {name:10} {term:.3f}')
    return student, teacher, optimizer


def main():
    Parser(prog='python -m lesson.onepage', epilog=__doc__).parse_args()
    folder = built_in_set()
    _, teacher, _ = train(folder)
    model = teacher.model               # a moving average of the student
    tokenizer = Tokenizer(learn_merges(Shards(folder, split='train')), CONTEXT)     # the same as in `train`
    held_out = Shards(folder, split='val')
    preprocess = preprocessing(model.config.image_size)
    figures, image_features = zero_shot_retrieval(model, tokenizer, preprocess, held_out)
    # How often an image ranks the right name of a big or of a small object first. COSMOS should raise the latter.
    show(figures | suppression.scene_figures(model, tokenizer, image_features, held_out))


if __name__ == '__main__':
    command(main)
