"""Draws the pictures of the course from lesson/results.csv and curves.csv, and writes the tables of lesson/RESULTS.md.

    python -m lesson.plots

In README.md and lesson/README.md the comment at the end of a paragraph says where its figures come from, in reading
order: experiment/run/column, where a~b is a minus b, and (a~b)~(c~d) a difference of differences. A minus before it
turns the sign, and `constant` is a figure that has no row.

Shares are written in percent, `seconds` in minutes. Differences are taken within seeds, because all runs of a seed have
the same training scenes. (All runs on photographs have the same photographs; there the rule is kept, which costs a
little power.) What is written is their mean, with its 95 % interval (Student's t). All differences of an experiment are
one family, and Holm's correction says which of them are decided at 5 %.
"""
import csv
import math
import re
from functools import lru_cache
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

from lesson.experiments import CURVES, EXPERIMENTS, read_results
from lesson.scenes import AREA, SIZE
from plumbing.errors import command, need
from plumbing.options import Parser

CHANCE = 100 / 6                        # how often guessing names a shape, in percent
LEVEL = 0.05

# --- 1. What is compared ---------------------------------------------------------------------------------------------

# {experiment: {columns: pairs of runs}}. a~b is a minus b. All differences of one experiment are one family. It was
# fixed before the first row that it added, except `ladder`, `first` and, in photo-*, LAST; later additions to `reading`,
# `across` and `longer-reading` only made it harder to decide something.
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
    'first': {f'{R_AT_10} {LAST}': 'image-distill~clip'},
    'ladder': {f'{R_AT_10} {LAST}': 'no-cross-attention~text-distill cosmos~no-cross-attention'},
    'rivals': {f'{R_AT_10} {LAST}': 'cosmos~clip several-captions~clip cosmos~several-captions every-image~cosmos'},
    'no-copy': {f'{R_AT_10} {LAST}': 'every-image~text-distill'},
    'scenes-no-copy': {NAMED: 'every-image~text-distill every-image~cosmos'},
    'teacher': {f'{R_AT_10} {LAST}': 'cosmos~no-average cosmos~teacher-sees-all'},
    'together': {NAMED: 'crops-together~cosmos'},
    'kinds': {f'{R_AT_10} {LAST}': 'cosmos~long-captions cosmos~short-captions'},
    'captions': {
        f'{R_AT_10} {LAST}': 'cosmos-1~clip-1 cosmos-2~clip-2 cosmos~clip (cosmos~clip)~(cosmos-1~clip-1)'}}


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

Each table is an experiment, and each row a difference of two of its runs, in percent; ± is half of
the 95 % interval, over training scenes and seeds, and on photographs over seeds alone. A difference
is *undecided* if it does not survive Holm's correction at 5 %, over all differences of its
experiment. So one that stands in two experiments may be decided in one of them only. In `cut` a row
is a loss of a run, in percent of what guessing costs: of crops as in training, and of one whole view
on both sides.
"""


def label(column):
    words = column.replace('dominant.top1', 'big named').replace('small.top1', 'small named')
    return re.sub('[._]', ' ', words.removeprefix('retrieval.'))


FINDINGS = {
    'minutes': 'In equal time COSMOS without cross-attention names the most; COSMOS and CLIP cannot be told apart.',
    'pairs': 'From the same pairs COSMOS leads CLIP, which is still at chance.',
    'longer': 'In three times the time COSMOS and CLIP cannot be told apart; reading nothing leads both.',
    'reading': 'From the same pairs closing the leak, or reading the wrong pair, helps COSMOS with the small objects.',
    'across': 'In equal time, too; but neither beats reading nothing.',
    'longer-reading': 'In three times the time reading nothing names more small objects than either.',
    'steps': 'With as many steps CLIP is at chance, too.',
    'photo-pairs': 'On photographs COSMOS leads CLIP; reading adds 0.9 points to finding photographs.',
    'photo-minutes': 'In equal time COSMOS leads CLIP by 3.5 points, and so does COSMOS without cross-attention.',
    'photo-across': 'On photographs closing the leak costs nothing that we could see.',
    'table-5': 'Three rungs bring about two points each; the last is a step down.',
    'first': 'Image self-distillation with its augmentation brings 2.5 points over CLIP.',
    'ladder': 'The step down comes with the losses across the sides, which also halve the weight of those within, not with reading.',
    'rivals': 'Several captions without a teacher have 2.6 of the 5.9 points.',
    'no-copy': 'Reading that cannot copy does no better than no reading.',
    'scenes-no-copy': 'On scenes neither can be told apart from the others.',
    'teacher': 'We could not tell whether an average, or a teacher of globals only, matters.',
    'together': 'On scenes we could not tell whether captions of only what the first crop shows are better.',
    'kinds': 'Without short captions COSMOS finds fewer photographs; without long ones we could not tell.',
    'captions': 'The lead over CLIP grows with the captions that a photograph has.'}


def difference_tables(experiment):
    """Markdown: a finding, and for each group of columns a table with a row for each pair."""
    gaps, decided = differences(experiment)
    text = f"\n{FINDINGS[experiment]}\n"
    for columns, pairs in COMPARISONS[experiment].items():
        columns = columns.split()
        text += f"\n| **{experiment}** | {' | '.join(map(label, columns))} |\n"
        text += '| --- ' * (1 + len(columns)) + '|\n'
        for pair in pairs.split():
            text += f"| {pair.replace('~', ' - ')} |"
            for column in columns:
                gap, half = gaps[pair, column]
                verdict = '' if (pair, column) in decided else ', undecided'
                text += f' {gap:+.1f} ± {half:.1f}{verdict} |'
            text += '\n'
    return text


LOSSES = 'L_CLIP', 'h_I_cls_t', 'h_I_eot_t', 'h_T_cls_t', 'h_T_eot_t'
CUTS = {'all': 'nothing cut', 'text_cut': 'text cut', 'image_cut': 'image cut'}
VIEWS = {'cut': 'crops', 'cut_views': 'whole views'}
# the columns of the table
DRAWN = [f'{views}.{loss}.{column}' for views in VIEWS for loss in LOSSES for column in CUTS]


def cut_table():
    """Markdown: what each loss costs, in percent of what guessing costs, with everything and with one side cut away."""
    titles = [f'{views}: {cut}' for views in VIEWS.values() for cut in CUTS.values()]
    text = f"\n| **cut** | loss | {' | '.join(titles)} |\n" + '| --- ' * (2 + len(titles)) + '|\n'
    for name in EXPERIMENTS['cut']:
        for loss in LOSSES:
            shares = []
            for views in VIEWS:
                shares += [f"{mean('cut', name, f'{views}.{loss}.{column}'):.1f}" for column in CUTS]
            text += f"| {name} | {loss} | {' | '.join(shares)} |\n"
    return text


# What the pages cite of single methods: experiment, run, column, and whose runs they are.
MEANS = [
    ('minutes', 'cosmos', 'conflict.h_T_caption.read'), ('minutes', 'cosmos', 'conflict.h_T_caption.sentence'),
    ('photo-minutes', 'cosmos', 'conflict.h_T_caption.read'),
    ('reading', 'cosmos', 'pointing.small.own_it'), ('reading', 'cosmos', 'pointing.color.asked'),
    ('reading', 'cosmos', 'pointing.color.other'), ('cut', 'without-clip', 'pointing.small.own_it'),
    ('cut', 'without-clip', 'retrieval.image_to_text_R@10'), ('cut', 'without-clip', 'retrieval.text_to_image_R@10'),
    ('minutes', 'cosmos', 'small.top1'), ('minutes', 'clip', 'small.top1'),
    ('minutes', 'no-cross-attention', 'small.top1'),
    ('scenes-no-copy', 'text-distill', 'small.top1'), ('scenes-no-copy', 'cosmos', 'small.top1'),
    ('photo-minutes', 'cosmos', 'retrieval.text_to_image_R@10'),
    ('photo-minutes', 'cosmos', 'student.text_to_image_R@10'),
    ('photo-minutes', 'clip', 'retrieval.text_to_image_R@10'),
    ('rivals', 'every-image', 'retrieval.text_to_image_R@10'), ('rivals', 'cosmos', 'retrieval.text_to_image_R@10'),
    *[('ladder' if name == 'no-cross-attention' else 'table-5', name, f'retrieval.{way}_R@10')
      for name in ('clip', 'clip-aug', 'image-distill', 'text-crop', 'text-distill', 'no-cross-attention', 'cosmos')
      for way in ('text_to_image', 'image_to_text')]]

# Not of results.csv: measured once, or at a052a90.
SINGLE = """
| **single figures** | |
| --- | --- |
| README's first command on an AMD EPYC: small objects named, % | 39.15 |
| its report, screen 4: C^T's weight on padding, % | 74.6 |
| its report, screen 5: mean cosine of h_T with what C^I has read, and with eot | 0.90, 0.38 |
| the proof: ln 256 | 5.5452 |
| the same five runs as `cut` cosmos, before the first step: peak on the small object, % | 9.5 |
| L_CLIP on crops of photographs, a run with short captions: at the learned scale, 14.6, and at 8, % of a guess | 88.0, 77.5 |
| log.jsonl of ordinary runs on scenes: `clip` at the end; without L_CLIP; a guess | 2.3 to 3.0; 3.3 to 3.4; 3.5 |
| the mean of the other four terms, with and without L_CLIP | 0.7 to 1.1 |
| `cosine` at step 500 of ordinary runs; without an average | 0.97 to 0.99; 1.00 |

| **segment**: mIoU of the 16 names on the objects of held-out scenes, %, three or four runs | lowest to highest |
| --- | --- |
| cosmos | 5.1 to 14.6 |
| across | 2.2 to 14.1 |
| every-image | 3.1 to 5.2 |
| text-distill | 1.7 to 3.2 |
| clip | 1.4 to 2.1 |
| guessing at random (the best constant: 0.4) | about 3 |

| **local-crops** (rows of a052a90, five seeds on an Intel Xeon) | 0 | 2 | 4 | 6 |
| --- | --- | --- | --- | --- |
| text to image R@10 | 15.3 ± 0.7 | 15.4 ± 0.5 | 15.1 ± 0.5 | 15.2 ± 0.2 |
| image to text R@10 | 16.4 ± 0.5 | 16.4 ± 1.3 | 16.1 ± 0.8 | 17.0 ± 0.7 |
| minutes | 13.0 ± 0.9 | 14.2 ± 1.7 | 14.7 ± 1.3 | 16.7 ± 1.1 |

| **the paper's Table 5**, R@1 on COCO: each row minus the one before | text to image | image to text |
| --- | --- | --- |
| clip (itself) | 10.7 | 15.0 |
| image augmentation | +2.0 | +2.5 |
| image self-distillation | +1.9 | +3.1 |
| text augmentation | +22.9 | +29.8 |
| text self-distillation | +0.5 | +0.6 |
| cosmos | +2.1 | +2.1 |
"""


def mean_table():
    """Markdown: the mean of a method over its seeds, with its 95 % interval."""
    text = '\n| **means** | run | column | % |\n| --- | --- | --- | --- |\n'
    for experiment, name, column in MEANS:
        found = list(values(experiment, name, column).values())
        t, chance = student_t(len(found) - 1)
        half = stdev(found) / math.sqrt(len(found)) * np.interp(-LEVEL, -chance, t)
        text += f'| {experiment} | {name} | {label(column)} | {fmean(found):.1f} ± {half:.1f} |\n'
    return text


def results_page():
    return INTRODUCTION + ''.join(map(difference_tables, COMPARISONS)) + cut_table() + mean_table() + SINGLE


# --- 4. Pictures -----------------------------------------------------------------------------------------------------

METHODS = {             # words, colour
    'clip': ('CLIP', '#0072b2'),
    'no-cross-attention': ('COSMOS without cross-attention', '#009e73'),
    'cosmos': ('COSMOS', '#d55e00')}


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


def draw_race(figure):
    """Page 2: what is named on drawn scenes, and found on photographs, from the same pairs, in equal time, and in three
    times it."""
    big, small, photographs = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    on_scenes = {'pairs': 'same\npairs', 'minutes': 'equal\ntime', 'longer': '3 x\nthe time'}
    on_photographs = {'photo-pairs': 'same\npairs', 'photo-minutes': 'equal\ntime'}
    for axis, title, races, column, top in (
            (big, 'big objects', on_scenes, 'dominant.top1', 100),
            (small, 'small objects', on_scenes, 'small.top1', 100),
            (photographs, 'photographs', on_photographs, 'retrieval.text_to_image_R@10', 20)):
        for x, race in enumerate(races):
            for (name, (_, color)), shift in zip(METHODS.items(), (-0.25, 0, 0.25)):
                show_runs(axis, race, name, column, x + shift, color)
        axis.set_xticks(range(len(races)), races.values())
        axis.set(xlim=(-0.5, len(races) - 0.5), ylim=(0, 1.03 * top))
        axis.set_title(title, loc='left')
    show_scale(big, 'named, %', [50, 100], CHANCE)
    show_scale(small, '', [50, 100], CHANCE)
    show_scale(photographs, 'R@10, %', [10, 20], 1)
    show_legend(figure, dict(METHODS.values()))


# Table 5 of the paper, on CC3M: its rows, and R@1 on COCO, text to image. Our two sources for it disagree on what the
# second row is called; one says EMA. We take its last row in two steps; the paper has no figure for the first of them.
RUNGS = {
    'clip': ('CLIP', 10.7),
    'clip-aug': ('+ image augmentation', 12.7),
    'image-distill': ('+ image self-distillation', 14.6),
    'text-crop': ('+ text augmentation', 37.5),
    'text-distill': ('+ text self-distillation', 38.0),
    'no-cross-attention': ('the losses of Eq. 6 instead,\nbut nothing is read', None),
    'cosmos': ('+ reading = COSMOS', 40.1)}
BLUE, ORANGE = '#0072b2', '#d55e00'
COLOR_OF = dict.fromkeys(RUNGS, BLUE) | {'no-cross-attention': ORANGE, 'cosmos': ORANGE}


def draw_ladder(figure):
    """Page 2: Table 5 row by row, the paper's and ours. Its last row, in orange, is taken in two steps."""
    paper, found_photographs, found_captions = figure.subplots(1, 3, sharey=True)
    for y, (name, (_, score)) in enumerate(RUNGS.items()):
        if score:
            paper.plot(score, y, '|', color=COLOR_OF[name], markersize=14, markeredgewidth=3)
    paper.set_yticks(range(len(RUNGS)), [words for words, _ in RUNGS.values()])
    paper.set(xlim=(0, 45), title='the paper: text to image', xlabel='R@1 on COCO, %')
    for axis, column, title in zip(
            (found_photographs, found_captions), ('text_to_image_R@10', 'image_to_text_R@10'),
            ('here: text to image', 'here: image to text')):
        mean_before = None
        for y, (name, color) in enumerate(COLOR_OF.items()):
            experiment = 'ladder' if name == 'no-cross-attention' else 'table-5'
            mean_here = show_runs(axis, experiment, name, f'retrieval.{column}', y, color, is_flat=True)
            if mean_before:
                axis.plot((mean_before, mean_here), (y - 1, y), color=color)
            mean_before = mean_here
        axis.set(xlim=(5, 20), title=title, xlabel='R@10 on Flickr8k, %')
    for axis in paper, found_photographs, found_captions:
        axis.spines[['top', 'right']].set_visible(False)
    paper.invert_yaxis()


def draw_pointing(figure):
    """Page 4: how often C^I looks at the small object that it is asked for, during training. A line is a run."""
    axis = figure.subplots()
    curves = {}                         # {seed: ([step, ...], [share in percent, ...])}
    for row in csv.DictReader(CURVES.read_text().splitlines()):
        if row['run'] == EXPERIMENTS['attention']['cosmos'].key:
            steps, shares = curves.setdefault(row['seed'], ([], []))
            steps.append(int(row['step']))
            shares.append(100 * float(row['pointing.small.own_it']))
    for steps, shares in curves.values():
        axis.plot(steps, shares, 'o-', color=ORANGE, alpha=0.5)
    axis.axhline(100 * AREA['small'] / SIZE ** 2, color='black', linestyle=':')
    axis.set(xlabel='training step', ylabel='peak on the object, %')
    axis.spines[['top', 'right']].set_visible(False)


PICTURES = {            # how it is drawn, inches
    'race': (draw_race, (10, 3.8)),
    'ladder': (draw_ladder, (11, 4)),
    'pointing': (draw_pointing, (5, 2.6))}


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
