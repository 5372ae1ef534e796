"""Every option of train.py and eval.py, with its type and its help."""
import argparse
import math
import sys
from contextlib import suppress
from pathlib import Path

from plumbing.benchmarks import BENCHMARKS, TORCHVISION_SETS
from plumbing.errors import Refused, need, note
from plumbing.processes import DEVICES, DTYPES, choose_device, cores
from plumbing.weights import BEST, LAST

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
        with suppress(ValueError):
            value = kind(text)
            if least <= value <= most:      # NaN is in no range
                return value
        raise argparse.ArgumentTypeError(f'{text} is not {words}')
    return parse


positive = number_type(int, 'a whole number of 1 or more', 1)
count = number_type(int, 'a whole number of 0 or more', 0)
seed = number_type(int, 'a whole number from 0 to 2^64 - 1', 0, 2 ** 64 - 1)   # as in torch
share = number_type(float, 'a number from 0 to 1', 0, 1)
amount = number_type(float, 'a number of 0 or more', 0, sys.float_info.max)
passes = number_type(float, 'a number above 0 and at most a million', sys.float_info.min, 1e6)


# --- 2. train.py -----------------------------------------------------------------------------------------------------

def add_training(parser, presets, methods):
    """Every option of train.py. Those without a default get it from the recipe, or below."""
    add = parser.add_argument_group('data').add_argument
    add('--data', nargs='+', help='tars, or folders of them; without it the built-in set')
    add('--val', nargs='+', help='held-out shards (the val/ of a single --data folder)')
    add('--caption-keys', help='comma-separated json keys of the captions; see docs/data.md')
    add('--vocab', help="clip, learn (from the captions), or a path to CLIP's file")
    loaders = min(8, cores() // 2 or 1)
    add('--workers', type=count, default=loaders, help='loaders of each process (%(default)s)')

    add = parser.add_argument_group('method').add_argument
    add('--preset', choices=presets,
        help='sizes and recipe (tiny; with --data vit-b-16 on a GPU, otherwise photo)')
    add('--method', choices=methods, default='cosmos', help='Table 5, or ours (%(default)s)')
    add('--init', help='weights to start from, ours or not; they set sizes and vocabulary')
    add('--quick-gelu', action='store_true', help="the weights of --init have OpenAI's activation")
    add('--local-crops', type=count, help='local image views per pair')
    add('--local-captions', type=count, help='local captions per pair')
    add('--augment', choices=['full', 'crops'], help='full: also flips and changes of colour')

    schedule = parser.add_argument_group('schedule')
    length = schedule.add_mutually_exclusive_group().add_argument
    length('--steps', type=positive, help='optimizer steps in total')
    length('--epochs', type=passes, help='passes over the data, instead of --steps')
    add = schedule.add_argument
    add('--batch', type=positive, help='pairs per step, over all processes and parts')
    add('--accum', type=positive, default=1, help='parts of a batch, to save memory (%(default)s)')
    add('--lr', type=amount, help='peak learning rate')
    add('--lr-end', type=share, help='final rate as a share of --lr')
    add('--warmup', type=count, help='steps of linear warm-up (at most a tenth of the run)')
    add('--wd', type=amount, help='weight decay, of matrices only')
    add('--momentum', type=share, help="lambda, the teacher's momentum")
    add('--momentum-ramp', type=count, help='R: lambda at step s is at most s / (s + R)')
    add('--clip-grad', type=amount, default=0.0, help='largest norm of the gradient; 0: no limit')
    add('--seed', type=seed, default=0, help='seed of everything random (%(default)s)')


def add_machine_and_output(parser):
    add = parser.add_argument_group('machine').add_argument
    add('--precision', choices=['auto', *DTYPES], default='auto', help='auto: bf16 if it is fast')
    add('--device', choices=DEVICES, default='auto', help='auto: cuda if available, otherwise cpu')
    add('--compile', action='store_true', help='torch.compile; gains nothing on CPUs')

    add = parser.add_argument_group('output').add_argument
    add('--out', help='folder of checkpoint, log, report (runs/PRESET-METHOD, or runs/INIT-METHOD)')
    add('--resume', action='store_true', help='go on with the run in --out, or start one there')
    add('--save-minutes', type=amount, default=20.0,
        help='most minutes between checkpoints; 0: no limit (%(default)s)')
    add('--save-every', type=count, default=0, help='also save at multiples of this step; 0: never')
    add('--eval-every', type=count,
        help='steps between evaluations (a quarter of the run); 0: only at the end')
    add('--log-every', type=positive, default=20, help='steps between log lines (%(default)s)')


def default_preset(data, device, init):
    if not data:
        return 'tiny'
    preset = 'photo'
    about = 'a small model, because there is no GPU'
    if choose_device(device).type == 'cuda':
        preset = 'vit-b-16'
        about = 'the model of the paper, because there is a GPU'
    if init:
        about = 'of which only the recipe is used, because --init sets the sizes'
    note(f'--preset is {preset}, {about}')
    return preset


UNTYPED = object()


def training_options(argv, description, presets, methods, recipe_of):
    """The command line -> options and typed, two dicts {option: value}. typed: what was typed. options: that, else the
    recipe, else the default above. `settle` then decides what depends on the data or on a checkpoint."""
    recipes = ''.join(f'\n{name}: {recipe_of(name, "cosmos", None)}' for name in presets)
    parser = Parser(usage='%(prog)s [options]', epilog=f'{description}\nA recipe decides the options '
                    f'that are not typed. With --init it changes.\n\nRecipes:{recipes}')
    add_training(parser, presets, methods)
    add_machine_and_output(parser)
    defaults = {action.dest: action.default for action in parser._actions if action.dest != 'help'}
    # argparse leaves alone what the namespace has already, unless it is typed.
    parsed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, UNTYPED))))
    typed = {name: value for name, value in parsed.items() if value is not UNTYPED}
    options = defaults | typed
    need(options['init'] or not options['quick_gelu'],
         '--quick-gelu says how the weights of --init were trained; give --init, too')
    options['preset'] = typed.get('preset') or default_preset(options['data'], options['device'], options['init'])
    recipe = recipe_of(options['preset'], options['method'], options['init'])
    method = options['method']
    for option in typed:
        words = option.replace('_', '-')
        need(option not in recipe or recipe[option] is not None,
             f'--{words} does nothing with --method {method}; omit it')
    if options['init']:
        vocab = typed.get('vocab')
        need(vocab not in ('clip', 'learn'),
             f'--vocab {vocab} does nothing with --init, whose weights say the vocabulary; omit it')
        recipe['vocab'] = None
    name = options['preset']
    if options['init']:         # clip.pt -> clip; runs/mine and runs/mine/best.pt -> mine
        path = Path(options['init']).resolve()
        name = path.parent.name if path.name in (LAST, BEST) else path.stem
    out = f'runs/{name}-{method}'
    return defaults | {'out': out} | recipe | typed | {'preset': options['preset']}, typed


def choose_data(options, built_in_set):
    """-> --data and --val. Without --data built_in_set() draws shards, and returns their folder. If --data is one
    folder with train/ and val/, --val is the same folder: Shards takes the half that it is asked for."""
    data = options['data']
    val = options['val']
    if data is None:
        need(built_in_set,
             'without --data only train.py itself trains, on a set that lesson/ draws; give shards with --data')
        data = [str(built_in_set())]
    folder = Path(data[0])
    has_halves = (folder / 'train').is_dir() and (folder / 'val').is_dir()
    if val is None and len(data) == 1 and has_halves:
        val = data
    return data, val


def settle(options, typed, pairs, parts, batch_before):
    """Options as training_options gives them -> all options, as argparse.Namespace. What is not typed of --batch,
    --steps, --warmup and --eval-every depends on the data or on the run that is resumed.

    pairs: how many the training set has. parts: processes x --accum, into which a batch is cut. batch_before: that of
    the run that is resumed, else None.
    """
    batch = options['batch']
    if 'batch' not in typed:
        if batch_before:
            batch = batch_before
        elif pairs < batch:
            need(pairs >= parts, f'--data has {pairs} pairs, fewer than {parts} (processes x --accum)')
            batch = pairs // parts * parts
            note(f"--batch is {batch}, not {options['batch']}, because --data has {pairs} pairs")
    steps = options['steps']
    epochs = options['epochs']
    if 'steps' in typed:
        epochs = None
    elif epochs is not None:
        steps = round(epochs * (pairs // batch)) or 1
    warmup = options['warmup']
    if 'warmup' not in typed:
        warmup = min(warmup, steps // 10)               # a tenth of a short run
    eval_every = typed.get('eval_every', math.ceil(steps / 4))
    return argparse.Namespace(**options | {
        'batch': batch, 'steps': steps, 'epochs': epochs, 'warmup': warmup, 'eval_every': eval_every})


# --- 3. eval.py, and other commands on a checkpoint ------------------------------------------------------------------

def add_checkpoint(parser, workers=True):
    """The options of every command that eval.execute runs. workers: whether it has processes that read images."""
    add = parser.add_argument
    add('checkpoint', metavar='CKPT')
    add('--weights', choices=['teacher', 'student'], default='teacher', help='(%(default)s)')
    add('--device', choices=DEVICES, default='auto', help='auto: cuda if available, otherwise cpu')
    if workers:
        add('--workers', type=count, default=2, help='processes that read images (%(default)s)')
    add('--vocab', help="file of CLIP's merges, for checkpoints that carry none")
    add('--quick-gelu', action='store_true', help="a state dict has the activation of OpenAI's CLIP")
    add('--json', help='also write the figures to this file')


def evaluation_options(description):
    """The command line of eval.py -> a namespace, whose `command` is one of the three."""
    program = Parser(usage='%(prog)s COMMAND CKPT [options]', epilog=description)
    commands = program.add_subparsers(dest='command', required=True, prog=program.prog)

    def add_command(name, text):
        parser = commands.add_parser(name, help=text, description=text)
        add_checkpoint(parser, workers=name != 'segment')
        return parser

    parser = add_command('retrieval', 'zero-shot R@1/5/10 and ranks, both ways')
    one = parser.add_mutually_exclusive_group(required=True).add_argument
    one('--list', metavar='FILE', help="COCO's captions, Karpathy's list, or a table of images and captions")
    one('--shards', nargs='+', help='held-out shards; a folder with train/ and val/ means its val/')
    add = parser.add_argument
    add('--images', help='folder of the images of --list (default: that of the list)')
    add('--split', help="split of Karpathy's list (default: test)")
    add('--caption-keys', help='comma-separated json keys of the captions of --shards')

    parser = add_command('classify', 'zero-shot top-1, top-5, mean per class')
    one = parser.add_mutually_exclusive_group(required=True).add_argument
    one('--dataset', choices=TORCHVISION_SETS, metavar='NAME', help="torchvision's: CIFAR10, DTD, ...")
    one('--folder', help='one folder of images per class')
    add = parser.add_argument
    add('--root', default='data', help='folder of --dataset (%(default)s)')
    add('--split', help="torchvision's name for the split (default: test; ImageNet has val)")
    add('--download', action='store_true', help='let torchvision fetch it into --root')
    add('--classes', help='file of class names, a line each in the order of the sorted folders; or open_clip')
    add('--templates', help='file of prompts with {} for the class; or open_clip, see docs/data.md')

    add = add_command('segment', 'zero-shot mIoU, and IoU of each class').add_argument
    add('--images', required=True, help='folder of images')
    add('--masks', required=True, help='folder of PNG masks of class numbers; 255 is ignored')
    add('--classes', required=True, help='file: for each class a line of its names, with commas')
    add('--image-suffix', default='', help='which only images have, like _leftImg8bit')
    add('--mask-suffix', default='', help='which only masks have, like _gtFine_labelTrainIds')
    add('--list', help='file of the images to evaluate, a name per line, without ending')
    add('--templates', help='file of prompts with {} for the class; or open_clip: its 80 prompts')
    add('--benchmark', choices=BENCHMARKS, help='the released settings of this set, but no prompts')
    add('--csa', action='store_true', help='correlative self-attention in the last block')
    return program.parse_args()
