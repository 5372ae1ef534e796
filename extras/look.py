"""Look at shards: counts, captions, what training would skip, and a sheet of views.

    python -m extras.look SHARDS ...
"""
from collections import Counter

import numpy as np
from torchvision.transforms.v2.functional import resize
from torchvision.utils import save_image

from data import Counts, TrainingSet
from eval import progress_bar
from extras.prepare import name_left_out
from extras.report import sample_views
from plumbing.errors import Unreadable, command, need
from plumbing.files import replacing
from plumbing.options import Parser
from plumbing.shards import Shards
from plumbing.tokenizer import LEARNED_VOCAB, Tokenizer
from train import PRESETS

LOOKED_AT = 5000        # at most this many pairs are read: enough for percentages, and it takes only minutes
TILE = 128      # side of a view on the sheet, in pixels


def sample_sheet(crops, path):
    """Draw, as a PNG, what the student is shown, with a row for each pair, and print the captions."""
    tiles = []
    labels = ['global'] * crops.counts.global_texts + ['local'] * crops.counts.local_texts
    for index, views, captions, _ in sample_views(crops):
        tiles += [resize(view, [TILE, TILE]) for view in views]
        print(f'row {len(tiles) // len(views)} of {path}: pair {index}')
        for label, caption in zip(labels, captions):
            print(f'    {label:6}  {caption}')
    with replacing(path) as partial:
        save_image(tiles, partial, format='png', nrow=len(crops.kinds), padding=4, pad_value=1)


def too_long(captions, texts, preset, vocab):
    """In words: how many captions are longer than the context, and with which vocabulary this was counted."""
    config, recipe = PRESETS[preset]
    if vocab or recipe['vocab'] == 'clip':
        tokenizer = Tokenizer.clip(vocab)
        by = "CLIP's vocabulary"
    else:
        tokenizer = Tokenizer.learn(texts, LEARNED_VOCAB)
        by = 'a vocabulary learned from these pairs'
    room = config.context_length - 2                # without start and end
    long = sum(len(tokenizer.encode(caption)) > room for caption in captions)
    return (f'{long:,} of {len(captions):,} text crops, drawn as for one step; the context holds '
            f'{config.context_length} tokens of {by}')


def percentiles(values):
    least, tenth, median, ninetieth, most = np.percentile(values, (0, 10, 50, 90, 100))
    return f'least {least:g}, 10th percentile {tenth:g}, median {median:g}, 90th {ninetieth:g}, most {most:g}'


def look(shards, caption_keys, preset, augment, vocab, out):
    """Print a report on pairs from all over the set, and draw a sheet of views. Unreadable pairs are left out."""
    source = Shards(shards, caption_keys, 'train')
    config, recipe = PRESETS[preset]
    counts = Counts(local_images=recipe['local_crops'], local_texts=recipe['local_captions'])
    augment = augment or recipe['augment']
    crops = TrainingSet(source, None, config, seed=0, counts=counts, augment=augment)      # what the preset makes of them
    sample = np.unique(np.linspace(0, len(source) - 1, LOOKED_AT, dtype=int))
    problems = []
    pools = []
    captions = []
    images = set()
    keys = Counter()
    for i in progress_bar(sample, 'reading pairs'):
        try:
            drawn = crops.sample(0, i).captions         # decodes and draws, as training does
        except Unreadable as error:
            problems.append(f'{source.name(i)}: {error}')
            continue
        captions += drawn
        pools.append(source.pool(i))
        images.add(hash(source.image(i)))
        keys.update(source.record(i).keys())
    name_left_out(problems)
    need(pools, f'none of the {len(sample)} pairs that were tried can be used; see the reasons above')
    texts = sum(pools, [])
    print(f'{len(source):,} pairs in {len(source.paths)} shards, {sum(source.sizes) / 2**20:,.1f} MiB')
    print('left out            ', f'{len(problems)} of {len(sample)} pairs that were tried; '
          'training skips such pairs in --data, but does not start with one in --val')
    shares = [f'{key} ({n / len(pools):.0%})' for key, n in keys.most_common()]
    print('keys                ', ', '.join(shares))
    print('sentences per pair  ', percentiles(list(map(len, pools))))
    print('words per sentence  ', percentiles([len(text.split()) for text in texts]))
    print('longer than context ', too_long(captions, texts, preset, vocab))
    print('repeated            ', f'{len(pools) - len(images)} of {len(pools)} images, '
          f'{len(texts) - len(set(texts))} of {len(texts)} sentences')
    sample_sheet(crops, out)


def main():
    parser = Parser(prog='python -m extras.look', usage='%(prog)s SHARDS ... [options]', epilog=__doc__)
    add = parser.add_argument
    add('shards', nargs='+', help='tars, or folders of them; if a folder has train/ and val/, its train/ is read')
    add('--caption-keys', help='comma-separated json keys of the captions')
    add('--preset', choices=PRESETS, default='tiny', help='the preset whose views are drawn (default: %(default)s)')
    add('--augment', choices=('full', 'crops'), help="as in train.py (default: the preset's)")
    add('--vocab', help="file of CLIP's merges, to count tokens (default: the preset's vocabulary)")
    add('--out', default='runs/samples.png', help='the sheet of views (default: %(default)s)')
    look(**vars(parser.parse_args()))


if __name__ == '__main__':
    command(main)
