"""Every option of train.py and eval.py, with its type and its help.

1. a parser whose errors are sentences, and the types of options
2. the options of train.py, and where their defaults come from
3. the options of eval.py, and those that every command on a checkpoint takes
"""
import argparse
import math
import sys
from pathlib import Path

import torch

from plumbing.benchmarks import BENCHMARKS, TORCHVISION_SETS
from plumbing.captions import POOL_KEYS
from plumbing.errors import Refused, need
from plumbing.processes import DTYPES, cores

# --- 1. Parser and types ---------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse, but its errors are Refused, and options cannot be abbreviated, because a typo would pass as an
    abbreviation. Its help shows the program's docstring as it stands."""

    def __init__(self, *args, **settings):
        super().__init__(*args, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message):
        raise Refused(f'{message}; see {self.prog} --help')


def number_type(kind, words, least, most=float('inf')):
    """A type for argparse: a number from least to most. words: how the error describes such a number."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:      # NaN is in no range
            raise argparse.ArgumentTypeError(f'{text} is not {words}')
        return value
    return parse


def device_type(text):
    """A type for argparse: a device that torch has on this machine."""
    try:
        torch.zeros(1, device=text)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise argparse.ArgumentTypeError(f'{text} is not a device on this machine ({str(error)[:80]})') from None
    return text


positive = number_type(int, 'a whole number of 1 or more', 1)
count = number_type(int, 'a whole number of 0 or more', 0)
share = number_type(float, 'a number from 0 to 1', 0, 1)
amount = number_type(float, 'a number of 0 or more', 0, sys.float_info.max)
above_zero = number_type(float, 'a number above 0', sys.float_info.min, sys.float_info.max)


# --- 2. train.py -----------------------------------------------------------------------------------------------------

def add_data(parser):
    add = parser.add_argument_group('data').add_argument
    workers = min(8, cores() // 2 or 1)
    add('--data', nargs='+', help='tars, or folders of them; without it the built-in set')
    add('--val', nargs='+',
        help='held-out shards, evaluated as --eval-every says (the val/ of a single --data folder)')
    add('--caption-keys', help='comma-separated json keys of the captions; see docs/data.md')
    add('--caption-pool', choices=POOL_KEYS, default='all',
        help="which of DreamLIP's captions to use (%(default)s)")
    add('--vocab', default='clip', help="clip, learn (from the captions), or a path to CLIP's file")
    add('--workers', type=count, default=workers,
        help='processes that load data, for each process that trains (%(default)s)')


def add_method(parser, presets, methods):
    add = parser.add_argument_group('method').add_argument
    add('--preset', choices=presets, help='sizes and recipe (vit-b-16 with --data, else tiny)')
    add('--method', choices=methods, default='cosmos',
        help='a row of Table 5, or ours: no-cross-attention, across (%(default)s)')
    add('--init', help='weights to start from, ours or not. They set sizes and vocabulary, and the '
        'defaults of --lr, --wd, --momentum-ramp and --out')
    add('--quick-gelu', action='store_true',
        help="the weights of --init use OpenAI's activation, and their file does not say so")
    add('--local-crops', type=count, default=6, help='local image views per pair (%(default)s)')
    add('--local-captions', type=count, default=6, help='local captions per pair (%(default)s)')
    add('--augment', choices=['full', 'crops'], default='full',
        help='crops: only crops; full: also flips and changes of colour')


def add_schedule(parser):
    schedule = parser.add_argument_group('schedule')
    length = schedule.add_mutually_exclusive_group().add_argument
    length('--steps', type=positive, help='optimizer steps in total')
    length('--epochs', type=above_zero, help='passes over the data, instead of --steps')
    add = schedule.add_argument
    add('--batch', type=positive,
        help='pairs per step, over all processes and all parts of --accum')
    add('--accum', type=positive, default=1, help='parts of a batch, to save memory (%(default)s)')
    add('--lr', type=amount, help='peak learning rate (1e-5 with --init)')
    add('--lr-end', type=share, default=0.0, help='final rate as a share of --lr (%(default)s)')
    add('--warmup', type=count,
        help='steps of linear warm-up before the cosine (at most a tenth of the run)')
    add('--wd', type=amount, help='weight decay, of matrices only (0.1 with --init)')
    add('--momentum', type=share,
        help='lambda, the momentum of the teacher, which is a moving average')
    add('--momentum-ramp', type=count, default=0,
        help="R: at step s the teacher's lambda is at most s / (s + R); 0 means no ramp (with --init: 0)")
    add('--clip-grad', type=amount, default=0.0, help='largest norm of the gradient; 0: no limit')
    add('--seed', type=count, default=0, help='seed of everything random (%(default)s)')


def add_machine(parser):
    add = parser.add_argument_group('machine').add_argument
    switch = argparse.BooleanOptionalAction
    add('--precision', choices=['auto', *DTYPES], default='auto', help='auto: bf16 if it is fast')
    add('--device', choices=['auto', 'cuda', 'cpu'], default='auto', help='auto: cuda if available')
    add('--compile', action=switch, default=False, help='torch.compile; gains nothing on CPUs')
    add('--grad-checkpoint', action=switch, default=False, help='less memory, more time')


def add_output(parser):
    add = parser.add_argument_group('output').add_argument
    add('--out', help='folder of checkpoint, log, report (runs/PRESET-METHOD, or runs/INIT-METHOD)')
    add('--resume', action='store_true', help='go on with the run in --out, or start one there')
    add('--save-minutes', type=amount, default=20.0,
        help='most minutes between checkpoints; 0: no limit (%(default)s)')
    add('--save-every', type=count, default=0,
        help='also save at every step that is a multiple of this; 0: do not (%(default)s)')
    add('--eval-every', type=count,
        help='steps between evaluations (a quarter of the run); 0: only at the end')
    add('--log-every', type=positive, default=20, help='steps between log lines (%(default)s)')


def name_of(weights):
    """clip.pt -> clip, runs/tiny-cosmos and runs/tiny-cosmos/best.pt -> tiny-cosmos"""
    path = Path(weights).resolve()
    return path.parent.name if path.name in ('last.pt', 'best.pt') else path.stem


def training_options(argv, description, presets, methods, recipe_of):
    """The command line -> a namespace. An option's value is what is typed, else the recipe's, else the default above.

    argv: the words of the command; None: sys.argv's. presets, methods: their names. recipe_of(preset,
    method, init) returns the recipe, {option: its default}.
    """
    words = sys.argv[1:] if argv is None else argv
    recipes = ''.join(f'\n{name}: {recipe_of(name, "cosmos", None)}' for name in presets)
    parser = Parser(usage='%(prog)s [options]', epilog=f'{description}\nA recipe takes precedence '
                    f'over the defaults in brackets, and --init over a recipe.\n\nRecipes:{recipes}')
    add_data(parser)
    add_method(parser, presets, methods)
    add_schedule(parser)
    add_machine(parser)
    add_output(parser)

    first_look = parser.parse_args(words)               # at what chooses the recipe
    preset = first_look.preset or ('vit-b-16' if first_look.data else 'tiny')
    recipe = recipe_of(preset, first_look.method, first_look.init)
    recipe.pop('warmup', None)          # choose_lengths sets it, and shortens it for a short run
    # A typed length excludes the recipe's.
    if first_look.steps or first_look.epochs:
        recipe.pop('steps', None)
        recipe.pop('epochs', None)
    name = name_of(first_look.init) if first_look.init else preset
    parser.set_defaults(preset=preset, out=f'runs/{name}-{first_look.method}')
    # The recipe's words go in front of the typed ones. So argparse checks them against types and choices, too, and the
    # typed ones win, because they come later.
    recipe_words = [f"--{name.replace('_', '-')}={value}" for name, value in recipe.items()]
    return parser.parse_args([*recipe_words, *words])


def choose_data(options, built_in_set):
    """Fill in --data and --val if they are not typed. built_in_set() draws shards, and returns their folder.

    If --data is one folder with train/ and val/, --val becomes the same folder: Shards takes train/ for --data, and
    val/ for --val.
    """
    if options.data is None:
        need(built_in_set,
             'the built-in set is drawn by lesson/, which is absent; give shards with --data')
        options.data = [str(built_in_set())]
    folder = Path(options.data[0])
    has_halves = (folder / 'train').is_dir() and (folder / 'val').is_dir()
    if options.val is None and len(options.data) == 1 and has_halves:
        options.val = options.data


def choose_lengths(options, pairs, warmup):
    """Fill in --steps, and --warmup and --eval-every if they are not typed. warmup: that of the recipe."""
    if options.epochs is not None:
        options.steps = round(options.epochs * (pairs // options.batch)) or 1
    if options.warmup is None:
        options.warmup = min(warmup, options.steps // 10)       # a tenth of a short run
    if options.eval_every is None:
        options.eval_every = math.ceil(options.steps / 4)


# --- 3. eval.py, and other commands on a checkpoint ------------------------------------------------------------------

def add_checkpoint(parser):
    """The options of every command that eval.execute runs."""
    add = parser.add_argument
    add('checkpoint', metavar='CKPT')
    add('--weights', choices=['teacher', 'student'], default='teacher',
        help='which network (default: %(default)s)')
    add('--device', type=device_type, default='cuda' if torch.cuda.is_available() else 'cpu',
        help='cuda or cpu (default: %(default)s)')
    add('--workers', type=count, default=2,
        help='processes that read images; segment ignores it (default: %(default)s)')
    add('--vocab', help="file of CLIP's merges, for checkpoints that carry none")
    add('--json', help='also write the figures to this file')


def add_retrieval(parser, caption_keys):
    one = parser.add_mutually_exclusive_group(required=True).add_argument
    one('--coco', help='folder with images/val2017 and annotations/captions_val2017.json')
    one('--karpathy', help="Karpathy's dataset_coco.json or dataset_flickr30k.json")
    one('--flickr', help="the released code's flickr30k_val.json: a list of images with captions")
    one('--shards', nargs='+', help='held-out shards; a folder with train/ and val/ means its val/')
    add = parser.add_argument
    add('--split', help="Karpathy's split (default: test)")
    add('--images', help='folder of the images of --karpathy or --flickr (default: the folder of the JSON)')
    add('--caption-keys', help='json keys of the captions of --shards, joined by commas. For each pair '
        f"only the first key that is present is used (default: {','.join(caption_keys)})")


def add_classify(parser):
    one = parser.add_mutually_exclusive_group(required=True).add_argument
    one('--dataset', choices=TORCHVISION_SETS, metavar='NAME',
        help='a classification set of torchvision.datasets: CIFAR10, DTD, ...')
    one('--folder', help='one folder of images per class')
    add = parser.add_argument
    add('--root', default='data', help='folder of --dataset (default: %(default)s)')
    add('--split', help="torchvision's name for the split (default: test; ImageNet has val)")
    add('--download', action='store_true', help='let torchvision fetch it into --root')
    add('--classes', help='file of class names, one per line in the order of the sorted folders '
        "(default: torchvision's, or the folders' names)")
    add('--templates', help='file of prompts with {} for the class, one per line; or open_clip: the 80 '
        'prompts of the installed open_clip, and for ImageNet also its class names')


def add_segment(parser):
    add = parser.add_argument
    add('--images', required=True, help='folder of images')
    add('--masks', required=True, help='folder of PNG masks of class numbers; 255 is ignored')
    add('--classes', required=True,
        help='file: a line with the names of each class, joined by commas, from class 0 on')
    add('--image-suffix', default='',
        help='suffix that only the names of images have, like _leftImg8bit')
    add('--mask-suffix', default='', help='suffix that only the names of masks have, like _gtFine_labelTrainIds')
    add('--list', help='file of the images to evaluate, one name per line, without ending and suffix')
    add('--templates', help='file of prompts with {} for the class; or open_clip: its 80 prompts')
    add('--benchmark', choices=BENCHMARKS, help='the released settings of this set (default: plain '
        'ones). The 80 released prompts are not among them; give those with --templates')
    add('--csa', action='store_true', help='correlative self-attention in the last block')


def evaluation_options(description, caption_keys):
    """The command line of eval.py -> a namespace, whose `command` is one of the three. caption_keys: the default of
    --caption-keys."""
    program = Parser(usage='%(prog)s COMMAND CKPT [options]', epilog=description)
    commands = program.add_subparsers(dest='command', required=True, prog=program.prog)

    def add_command(name, text):
        parser = commands.add_parser(name, help=text, description=text)
        add_checkpoint(parser)
        return parser

    add_retrieval(add_command('retrieval', 'zero-shot R@1/5/10 and ranks, both ways'), caption_keys)
    add_classify(add_command('classify', 'zero-shot top-1, top-5, mean per class'))
    add_segment(add_command('segment', 'zero-shot mIoU, and IoU of each class'))
    return program.parse_args()
