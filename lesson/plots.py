"""Draws the pictures of the course from lesson/results.csv, and writes the tables of lesson/RESULTS.md.

    python -m lesson.plots

In README.md and lesson/README.md the comment at the end of a paragraph says where its figures come from, in reading
order: experiment/run/column, where a~b is a minus b, and (a~b)~(c~d) a difference of differences.

Shares are written in percent, `seconds` in minutes. Differences are taken within seeds, because all runs of a seed have
the same training scenes. (All runs on photographs have the same photographs; there the rule is kept, which costs a
little power.) What is written is their mean, with its 95 % interval (Student's t). All differences of an experiment are
one family, and Holm's correction says which of them are decided at 5 %.
"""
import io
import math
import re
from functools import lru_cache
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from PIL import Image

from lesson.experiments import EXPERIMENTS, read_results
from lesson.scenes import World, draw_scene
from plumbing.errors import command, need
from plumbing.options import Parser

CHANCE = 100 / 6                        # how often guessing names a shape, in percent
LEVEL = 0.05

# --- 1. What is compared ---------------------------------------------------------------------------------------------

# {experiment: {columns: pairs of runs}}. a~b is a minus b. All differences of one experiment are one family. It was
# fixed before the first row, except `company-size` and LAST; later additions to `reading`, `across` and
# `longer-reading` only made it harder to decide something.
NAMED = 'dominant.top1 small.top1'
R_AT_1 = 'retrieval.image_to_text_R@1'
# Of 1,000 photographs, R@10 is measured more precisely than R@1.
R_AT_10 = 'retrieval.image_to_text_R@10 retrieval.text_to_image_R@10'
# In photo-* we decided to compare these after the runs.
LAST = 'last.image_to_text_R@10 last.text_to_image_R@10'
RIVALS = 'cosmos~clip no-cross-attention~clip no-cross-attention~cosmos'
PHOTO_RIVALS = 'cosmos~clip cosmos~clip-aug cosmos~no-cross-attention no-cross-attention~clip'
READERS = ('across~cosmos across~no-cross-attention across~another-pair another-pair~cosmos '
           'another-pair~no-cross-attention no-cross-attention~cosmos')
ROW_BY_ROW = ('clip-aug~clip image-distill~clip-aug text-crop~image-distill text-distill~text-crop '
              'cosmos~text-distill cosmos~clip')
COMPARISONS = {
    'company': {
        'small.top1': 'clip-equal~clip-alone clip-big~clip-equal cosmos-equal~cosmos-alone cosmos-big~cosmos-equal',
        'alone.small.top1': 'clip-big~clip-alone clip-big~clip-equal cosmos-big~cosmos-alone cosmos-big~cosmos-equal'},
    'company-size': {'small.top1': '(cosmos-big~cosmos-equal)~(clip-big~clip-equal)'},
    'minutes': {NAMED: RIVALS},
    'pairs': {NAMED: RIVALS},
    'longer': {NAMED: RIVALS},
    'reading': {NAMED: f'{READERS} two-terms~cosmos across~two-terms'},
    'across': {f'{NAMED} {R_AT_1}': READERS},
    'longer-reading': {f'{NAMED} {R_AT_1}': READERS},
    'steps': {NAMED: 'cosmos~clip'},
    'photo-pairs': {R_AT_10: PHOTO_RIVALS, LAST: 'cosmos~no-cross-attention'},
    'photo-minutes': {R_AT_10: PHOTO_RIVALS, LAST: 'cosmos~clip cosmos~clip-aug'},
    'photo-across': {R_AT_10: 'across~cosmos across~no-cross-attention', LAST: 'across~cosmos'},
    'table-5': {f'{R_AT_10} {LAST}': ROW_BY_ROW},
    'local-crops': {f'{R_AT_10} {LAST}': 'cosmos-0~cosmos-4 cosmos-2~cosmos-4 cosmos-6~cosmos-4'}}


def signed(words):
    """'a~b' -> [('a', 1), ('b', -1)]; '(a~b)~(c~d)' -> [('a', 1), ('b', -1), ('c', -1), ('d', 1)]"""
    return list(zip(re.findall('[^~()]+', words), (1, -1, -1, 1)))


# --- 2. Figures ------------------------------------------------------------------------------------------------------

def values(experiment, name, column):
    """-> {seed: percent, or minutes}. Refused if a run has no row, because without it a family would shrink unseen."""
    run = EXPERIMENTS[experiment][name]
    rows = read_results()
    unit = 1 / 60 if column == 'seconds' else 100
    found = {}
    for seed in run.seeds:
        row = rows.get((run.key, seed), {})
        need(row.get(column), f'results.csv has no {column} of {experiment}/{name}, seed {seed}; '
             f'make this run by python -m lesson.experiments {experiment}')
        found[seed] = unit * float(row[column])
    return found


def mean(experiment, name, column):
    """Over the seeds."""
    return fmean(values(experiment, name, column).values())


@lru_cache
def student_t(freedom):
    """-> many t from 0 up, and the chance that |T| is larger than each. With t = sqrt(freedom) tan(u) the density of
    Student's t is cos(u) to the power freedom - 1."""
    u = (np.arange(100_000) + 0.5) / 100_000 * math.pi / 2
    density = np.cos(u) ** (freedom - 1)
    return math.sqrt(freedom) * np.tan(u), 1 - density.cumsum() / density.sum()


def difference(experiment, pair, column):
    """pair: 'a~b', a minus b, for each seed that both have -> the mean, half of its 95 % interval, and the p-value: the
    chance of a mean this far from 0 if there is no difference."""
    sides = [(values(experiment, name, column), sign) for name, sign in signed(pair)]
    seeds = set.intersection(*(set(found) for found, _ in sides))
    gaps = [sum(sign * found[seed] for found, sign in sides) for seed in sorted(seeds)]
    gap = fmean(gaps)
    error = max(stdev(gaps), 1e-9) / math.sqrt(len(gaps))
    t, chance = student_t(len(gaps) - 1)
    half = error * np.interp(-LEVEL, -chance, t)  # np.interp needs rising values, hence the minus
    by_chance = np.interp(abs(gap) / error, t, chance)
    return gap, half, by_chance


def holm(chances):
    """{test: chance} -> the tests that survive. The smallest chance must be below LEVEL / n, the next one below
    LEVEL / (n - 1), and so on."""
    survived = set()
    for k, test in enumerate(sorted(chances, key=chances.get)):
        if chances[test] > LEVEL / (len(chances) - k):
            break
        survived.add(test)
    return survived


def differences(experiment):
    """All that is compared in an experiment -> {(pair, column): (gap, half)}, and which of these are decided."""
    gaps = {}
    chances = {}
    for columns, pairs in COMPARISONS[experiment].items():
        for pair in pairs.split():
            for column in columns.split():
                gap, half, chance = difference(experiment, pair, column)
                gaps[pair, column] = gap, half
                chances[pair, column] = chance
    return gaps, holm(chances)


# --- 3. The tables ---------------------------------------------------------------------------------------------------

INTRODUCTION = """# All results

`python -m lesson.plots` writes this page from `results.csv`, which has a row for every run.
`python -m lesson.experiments NAME --print` shows the commands of the runs.

Figures are in percent; ± is half of the 95 % interval, over training scenes and seeds, and on
photographs over seeds alone. A difference is *undecided* if it does not survive Holm's correction
at 5 %, over all differences of its experiment. So one that stands in two experiments may be decided
in one of them only.
"""


def label(column):
    words = column.replace('dominant.top1', 'big named').replace('small.top1', 'small named')
    return re.sub('[._]', ' ', words.removeprefix('retrieval.'))


def difference_tables(experiment):
    """Markdown: for each group of columns a table with a row for each pair."""
    gaps, decided = differences(experiment)
    text = f'\n## {experiment}\n'
    for columns, pairs in COMPARISONS[experiment].items():
        columns = columns.split()
        text += f"\n| difference | {' | '.join(map(label, columns))} |\n"
        text += '| --- ' * (1 + len(columns)) + '|\n'
        for pair in pairs.split():
            text += f"| {pair.replace('~', ' - ')} |"
            for column in columns:
                gap, half = gaps[pair, column]
                verdict = '' if (pair, column) in decided else ', undecided'
                text += f' {gap:+.1f} ± {half:.1f}{verdict} |'
            text += '\n'
    return text


def results_page():
    return INTRODUCTION + ''.join(map(difference_tables, COMPARISONS))


# --- 4. Pictures -----------------------------------------------------------------------------------------------------

METHODS = {             # words, colour
    'clip': ('CLIP', '#0072b2'),
    'no-cross-attention': ('COSMOS without cross-attention', '#009e73'),
    'cosmos': ('COSMOS', '#d55e00')}
WAYS = {'image to text': '#0072b2', 'text to image': '#d55e00'}


def show_runs(axis, experiment, name, column, x, color, is_flat=False):
    """Draw runs as dots and their mean as a bar -> the mean. is_flat: x is a height, and the values go to the right."""
    runs = list(values(experiment, name, column).values())
    places = [x] * len(runs)
    if is_flat:
        axis.plot(runs, places, 'o', color=color, alpha=0.4)
        axis.plot(fmean(runs), x, '|', color=color, markersize=12, markeredgewidth=2)
    else:
        axis.plot(places, runs, 'o', color=color, alpha=0.4)
        axis.plot(x, fmean(runs), '_', color=color, markersize=18, markeredgewidth=2)
    return fmean(runs)


def show_scale(axis, words, ticks, chance):
    """Label the axis with what is measured, and mark chance by a dotted line."""
    axis.axhline(chance, color='black', linestyle=':')
    axis.set_yticks([chance, *ticks], ['chance', *ticks])
    axis.set_ylabel(words)
    axis.spines[['top', 'right']].set_visible(False)


def show_legend(figure, colors):
    """Above the panels. colors: {words: colour}."""
    from matplotlib.lines import Line2D
    lines = [Line2D([], [], color=color, linewidth=4) for color in colors.values()]
    figure.legend(lines, [*colors], loc='outside upper center', ncols=len(colors), frameon=False)


COMPANY = {             # of page 2: a world, its options, and its label
    'alone': (World(2, 0.38, 'none'), 'alone'),
    'equal': (World(2, 0.38, 'equal'), 'beside an equal'),
    'big': (World(2, 0.38), 'beside a big one')}


def draw_company(figure):
    """Page 2: a small object in three kinds of company, and how often it is named."""
    axis = figure.subplots()
    for x, (name, (world, words)) in enumerate(COMPANY.items()):
        for method, side, shift in ('clip', 'right', -0.1), ('cosmos', 'left', 0.1):
            whole_name, color = METHODS[method]
            height = show_runs(axis, 'company', f'{method}-{name}', 'small.top1', x + shift, color)
            if name == 'alone':
                axis.text(x + 2 * shift, height, whole_name, color=color, ha=side)
        box = axis.inset_axes([x - 0.3, -0.36, 0.6, 0.32], transform=axis.get_xaxis_transform())
        (_, image), _ = draw_scene(world, 'val', 17)
        box.imshow(Image.open(io.BytesIO(image)))
        box.set(xticks=[], yticks=[], xlabel=words)
    show_scale(axis, 'small object named, %', (40, 60, 80, 100), CHANCE)
    axis.set(xlim=(-0.5, 2.5), ylim=(0, 103), xticks=[])


def draw_race(figure):
    """Page 2: what is named and found from the same pairs and in equal time, on drawn scenes and on photographs."""
    scenes, photographs = figure.subplots(1, 2)
    for axis, title, prefix, column, top in (
            (scenes, 'drawn scenes', '', 'small.top1', 60),
            (photographs, 'photographs', 'photo-', 'retrieval.text_to_image_R@10', 20)):
        for x, race in enumerate(('pairs', 'minutes')):
            for (name, (_, color)), shift in zip(METHODS.items(), (-0.2, 0, 0.2)):
                show_runs(axis, prefix + race, name, column, x + shift, color)
        axis.set_xticks((0, 1), ('same pairs', 'equal time'))
        axis.set(xlim=(-0.5, 1.5), ylim=(0, 1.03 * top))
        axis.set_title(title, loc='left')
    show_scale(scenes, 'small objects named, %', [30, 60], CHANCE)
    show_scale(photographs, 'R@10, %', [10, 20], 1)
    show_legend(figure, dict(METHODS.values()))


# Table 5 of the paper, on CC3M: its rows, and R@1 on COCO, image to text and text to image. Our two sources for it
# disagree on what the second row is called.
TABLE_5 = {
    'clip': ('CLIP', 15.0, 10.7),
    'clip-aug': ('+ image augmentation\n(one source: EMA)', 17.5, 12.7),
    'image-distill': ('+ image self-distillation', 20.6, 14.6),
    'text-crop': ('+ text augmentation', 50.4, 37.5),
    'text-distill': ('+ text self-distillation', 51.0, 38.0),
    'cosmos': ('+ cross-attention = COSMOS', 53.1, 40.1)}


def draw_table_5(figure):
    """Page 2: Table 5 row by row, the paper's and ours."""
    paper, ours = figure.subplots(1, 2)
    for y, (name, (_, *of_paper)) in enumerate(TABLE_5.items()):
        for share, column, color, shift in zip(of_paper, R_AT_10.split(), WAYS.values(), (-0.2, 0.2)):
            paper.plot(share, y + shift, '|', color=color, markersize=12, markeredgewidth=2)
            show_runs(ours, 'table-5', name, column, y + shift, color, is_flat=True)
    for axis in paper, ours:
        axis.set_yticks(range(len(TABLE_5)), [words for words, *_ in TABLE_5.values()])
        axis.hlines(np.arange(len(TABLE_5)) + 0.5, 0, 60, color='#dddddd', linewidth=1)
        axis.set_ylim(len(TABLE_5) - 0.5, -0.5)
        axis.spines[['top', 'right']].set_visible(False)
    ours.tick_params('y', labelleft=False)
    paper.set(xlim=(0, 60), title='the paper: CC3M, COCO', xlabel='R@1, %')
    ours.set(xlim=(0, 20), title='here: Flickr8k', xlabel='R@10, %')
    show_legend(figure, WAYS)


PICTURES = {            # how it is drawn, inches
    'company': (draw_company, (6, 4)),
    'race': (draw_race, (8.4, 3.8)),
    'table-5': (draw_table_5, (9, 3.8))}


def main():
    Parser(prog='python -m lesson.plots', epilog=__doc__).parse_args()
    from matplotlib import pyplot       # --help and the tests do without it
    Path('lesson/RESULTS.md').write_text(results_page())
    for name, (function, inches) in PICTURES.items():
        with pyplot.rc_context({'font.size': 13}):
            figure = pyplot.figure(figsize=inches, layout='constrained')
            function(figure)
            figure.savefig(f'assets/lesson-{name}.png', dpi=120)
        pyplot.close(figure)


if __name__ == '__main__':
    command(main)
