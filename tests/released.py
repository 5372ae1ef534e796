"""The released code beside ours: do both compute the same numbers, and how long does a training step take on each side?

    git clone https://github.com/ExplainableML/cosmos CLONE && git -C CLONE checkout c80348f
    pip install -r requirements.txt ftfy regex
    python -m tests.released CLONE                                         a small model, timed in float32
    python -m tests.released CLONE --preset vit-b-16 --precision bf16      the paper's model, timed in bf16

Both sides get the same weights, images and captions. Their numbers are compared in float32. If they agree, both sides
take training steps in turns, and the exit status is 0. OMP_NUM_THREADS sets the number of threads.
"""
import math
import statistics
import sys
import time
from pathlib import Path

import torch

import train
from cosmos import COSMOS, GLOBALS, Config, Teacher, clip_loss, cosmos_loss
from data import cut_to_longest
from extras.export import openclip_config
from plumbing.errors import command, need
from plumbing.options import Parser
from plumbing.processes import DTYPES
from plumbing.weights import from_openclip, to_openclip
from tests.formula import SMALL, wavy_inputs, wavy_model

# sizes of the model, pairs, views of an image, captions
COMPARED = {'small': (SMALL, 3, 5, 4), 'vit-b-16': (Config(), 2, 8, 8)}
TIMED = {'small': (Config(128, 64, 32, 8, 192, 6, 3, 128, 4, 2), 32, 8, 8),
         'vit-b-16': (Config(), 4, 8, 8)}
# Relative distances. Gradients may be 20 times as far apart; docs/measurements.md says how far they are.
ALLOWED = {'small': 1e-6, 'vit-b-16': 3e-6}
NUMBERS = 'cls', 'eot', 'h_I', 'h_T', 'cls_t', 'eot_t', 'L_CLIP', 'L_COSMOS'
RATE = 1e-3
DECAY = 0.5
MOMENTUM = 0.99
TURNS = 7

# --- 1. Two sides with one interface ---------------------------------------------------------------------------------

class Ours:
    """What a comparison needs: student, teacher and optimizer. `forward` computes NUMBERS, `update` does what comes
    after the backward pass, and `rename` turns the names of parameters into the released ones."""
    rename = staticmethod(to_openclip)

    def __init__(self, config):
        """SMALL gets the weights of test_cosmos.py, any other model initial ones."""
        torch.manual_seed(0)
        small = config == SMALL
        self.student = wavy_model(0) if small else COSMOS(config)
        self.average = Teacher(wavy_model(100) if small else COSMOS(config))
        self.teacher = self.average.model
        self.optimizer = train.make_optimizer(self.student, RATE, DECAY)

    def forward(self, images, texts):
        multiple = 8 if torch.is_autocast_enabled('cpu') else 1     # captions are cut as in data.collate
        globals_cut = cut_to_longest(texts[:GLOBALS], multiple)
        locals_cut = cut_to_longest(texts[GLOBALS:], multiple)
        out = self.student(images, [texts[0], *globals_cut[1:], *locals_cut])
        cls_t, eot_t = self.average(images[:GLOBALS], globals_cut)
        clip = clip_loss(out, self.student.logit_scale.exp())
        cosmos = cosmos_loss(out, cls_t, eot_t, self.student.distill_logit_scale.exp())
        return [*out, cls_t, eot_t, clip, cosmos]

    def update(self):
        self.optimizer.step()
        self.student.clamp_scales()
        self.average.update(self.student, MOMENTUM)


class Released:
    """The released code with the same interface. main has put CLONE on the path, so open_clip is the released one."""
    rename = staticmethod(dict)

    def __init__(self, ours):
        from open_clip.loss import COSMOSLoss
        self.loss = COSMOSLoss()
        self.student = self.copy(ours.student)
        self.teacher = self.copy(ours.teacher).requires_grad_(False)
        # The released main.py goes by the names of parameters, too, but gets the same two groups.
        matrices = [p for p in self.student.parameters() if p.ndim > 1]
        vectors = [p for p in self.student.parameters() if p.ndim < 2]
        groups = [{'params': matrices}, {'params': vectors, 'weight_decay': 0.0}]
        self.optimizer = torch.optim.AdamW(groups, RATE, (0.9, 0.98), weight_decay=DECAY)

    def copy(self, model):
        """A released model with our weights and sizes, which replace those of ViT-B/16."""
        from open_clip import create_model
        flags = {'output_all': True, 'attentional_pool': True}
        sizes = openclip_config(model.config)
        sizes['vision_cfg'] |= flags
        sizes['text_cfg'] |= flags
        released = create_model('ViT-B-16', output_dict=True, cosmos=True, **sizes)
        released.load_state_dict(to_openclip(model.state_dict()))
        return released

    def forward(self, images, texts):
        B = len(images[0])
        out = self.student(images, torch.cat(texts), B)
        out_t = self.teacher(torch.cat(images[:GLOBALS]), torch.cat(texts[:GLOBALS]))
        kinds = ['image_features', 'text_features', 'img_crossmodal_features', 'txt_crossmodal_features']
        vectors = {f's_{kind}': out[kind].split(B) for kind in kinds}       # V or U tensors (B, D)
        vectors |= {f't_{kind}': out_t[kind].split(B) for kind in kinds[:2]}
        scales = {name: out[name] for name in ('logit_scale', 'distill_logit_scale')}
        losses = self.loss(**vectors, **scales, output_dict=True)
        stacked = [torch.stack(views) for views in vectors.values()]
        return [*stacked, losses['clip_loss'], losses['distill_loss']]

    @torch.no_grad()
    def update(self):
        """The order is ours. The released code updates the teacher before the optimizer's step, in the same time."""
        self.optimizer.step()
        for scale in self.student.logit_scale, self.student.distill_logit_scale:
            scale.clamp_(0, math.log(100))
        for average, p in zip(self.teacher.parameters(), self.student.parameters()):
            average.mul_(MOMENTUM)
            average.add_((1 - MOMENTUM) * p)


# --- 2. The same numbers? --------------------------------------------------------------------------------------------

def backward(side, images, texts, dtype=None):
    side.optimizer.zero_grad()
    with torch.autocast('cpu', dtype, enabled=dtype is not None):
        found = dict(zip(NUMBERS, side.forward(images, texts)))
    (found['L_CLIP'] + found['L_COSMOS']).backward()
    return found


def step_by_step(side, images, texts, gradients=None):
    """One step -> {what: tensor, or {released name: tensor}}. AdamW takes `gradients`, if given, instead of the side's
    own, because its first step divides each number by its own size, and so blows up those that are only rounding."""
    found = backward(side, images, texts)
    parameters = dict(side.student.named_parameters())
    found['gradients'] = side.rename({name: p.grad for name, p in parameters.items()})
    if gradients:
        for name, gradient in from_openclip(gradients).items():
            parameters[name].grad = gradient
    side.update()
    found['student after AdamW'] = side.rename(side.student.state_dict())
    found['teacher after its update'] = side.rename(side.teacher.state_dict())
    return found


def distance(found, expected):
    """The largest relative distance of tensors with the same name."""
    if isinstance(expected, torch.Tensor):
        return distance({'': found}, {'': expected})
    distances = []
    for name, value in expected.items():
        # Four gradients of SMALL are sums that cancel. Their norms are below 1e-5, and rounding moves them by 1e-10.
        distances.append((found[name] - value).norm() / value.norm().clamp_min(5e-5))
    return torch.stack(distances).max().item()


def compare(found, expected, allowed):
    """Prints a table, and returns whether everything is within what is allowed."""
    print(f'{"":26}largest relative distance   allowed')
    agree = True
    for what in expected:
        apart = distance(found[what], expected[what])
        limit = 20 * allowed if what == 'gradients' else allowed
        within = apart <= limit                 # NaN is not
        print(f'{what:26}{apart:25.1e}{limit:10.0e}   {"yes" if within else "no"}')
        agree = agree and within
    return agree


# --- 3. Which is faster? ---------------------------------------------------------------------------------------------

def race(preset, precision):
    """Times steps of both sides in turns, so that other work on the machine slows both. The first turn is left out."""
    inputs = wavy_inputs(*TIMED[preset])
    ours = Ours(TIMED[preset][0])
    seconds = {ours: [], Released(ours): []}
    for _ in range(1 + TURNS):
        for side, times in seconds.items():
            begun = time.perf_counter()
            backward(side, *inputs, DTYPES[precision])
            side.update()
            times.append(time.perf_counter() - begun)
    mine, theirs = (times[1:] for times in seconds.values())
    ratios = [slow / fast for slow, fast in zip(theirs, mine)]
    print(f'released   {statistics.median(theirs):.3f} s a step, the median of {TURNS}')
    print(f'ours       {statistics.median(mine):.3f} s')
    print(f'ratio      {statistics.median(ratios):.2f}, in single turns {min(ratios):.2f} to {max(ratios):.2f}')


def main():
    parser = Parser(prog='python -m tests.released', epilog=__doc__, usage='%(prog)s CLONE [options]')
    parser.add_argument('clone', metavar='CLONE', help='a checkout of the released code')
    parser.add_argument('--preset', choices=list(TIMED), default='small', help='(default: %(default)s)')
    parser.add_argument('--precision', choices=['fp32', 'bf16'], default='fp32', help='of the timed steps')
    args = parser.parse_args()
    source = Path(args.clone, 'src')
    need((source / 'open_clip').is_dir(), f'{source} has no open_clip; give a checkout of ExplainableML/cosmos')
    sys.path.insert(0, str(source))
    inputs = wavy_inputs(*COMPARED[args.preset])
    ours = Ours(COMPARED[args.preset][0])
    expected = step_by_step(Released(ours), *inputs)
    found = step_by_step(ours, *inputs, expected['gradients'])
    if not compare(found, expected, ALLOWED[args.preset]):
        sys.exit('the numbers differ')
    _, pairs, *_ = TIMED[args.preset]
    print(f'\n{args.preset}, {pairs} pairs, {args.precision}, torch {torch.__version__}, '
          f'{torch.get_num_threads()} thread(s)')
    race(args.preset, args.precision)


if __name__ == '__main__':
    command(main)
