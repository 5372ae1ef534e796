"""Draws the pictures of the course from lesson/results.csv, and writes the tables of lesson/RESULTS.md.

    python -m lesson.plots

In README.md and lesson/README.md the comment at the end of a paragraph says where its figures come from, in reading
order: experiment/run/column. There a~b is a minus b, for runs and for columns, and (a~b)~(c~d) is a difference of
differences.

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

from lesson.experiments import EXPERIMENTS, family, read_results, signed
from lesson.scenes import World, draw_scene
from plumbing.errors import command, need
from plumbing.options import Parser

TABLES = Path('lesson/RESULTS.md')
PICTURE = 'assets/lesson-{}.png'
CHANCE = 100 / 6                        # how often guessing names a shape, in percent
LEVEL = 0.05

# --- 1. Figures ------------------------------------------------------------------------------------------------------

def values(experiment, name, column):
    """-> {seed: percent, or minutes} of the seeds that have a row. column: one of the rows', or a~b, the difference of
    two."""
    run = EXPERIMENTS[experiment][name]
    rows = read_results()
    unit = 1 / 60 if column == 'seconds' else 100
    found = {}
    for seed in run.seeds:
        row = rows.get((run.key(), seed), {})
        parts = signed(column)
        if all(row.get(part) for part, _ in parts):
            found[seed] = unit * sum(sign * float(row[part]) for part, sign in parts)
    return found


def mean(experiment, name, column):
    """Over the seeds."""
    found = values(experiment, name, column)
    need(found, f'{experiment} has no {column} of {name}')
    return fmean(found.values())


@lru_cache
def student_t(freedom):
    """-> many t from 0 up, and the chance that |T| is larger than each. With t = sqrt(freedom) tan(u) the density of
    Student's t is cos(u) to the power freedom - 1."""
    u = (np.arange(100_000) + 0.5) / 100_000 * math.pi / 2
    density = np.cos(u) ** (freedom - 1)
    return math.sqrt(freedom) * np.tan(u), 1 - density.cumsum() / density.sum()


def difference(experiment, pair, column):
    """pair: 'a~b', a minus b, seed by seed -> the mean, half of its 95 % interval, and the p-value: the chance of a
    mean this far from 0 if there is no difference. None if fewer than two seeds have all."""
    sides = [(values(experiment, name, column), sign) for name, sign in signed(pair)]
    seeds = set.intersection(*(set(found) for found, _ in sides))
    gaps = [sum(sign * found[seed] for found, sign in sides) for seed in sorted(seeds)]
    if len(gaps) < 2:
        return None
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
    """All that is compared in an experiment and has rows -> {(pair, column): (gap, half)}, and which are decided."""
    gaps = {}
    chances = {}
    for test in family(experiment):
        found = difference(experiment, *test)
        if found:
            *gaps[test], chances[test] = found
    return gaps, holm(chances)


# --- 2. The tables ---------------------------------------------------------------------------------------------------

LABELS = {                              # of columns
    'dominant.top1': 'big named', 'small.top1': 'small named'}


def label(column):
    return LABELS.get(column) or re.sub('[._]', ' ', column.removeprefix('retrieval.'))


def as_table(rows):
    """[[cell, ...], ...], the first row being the heading -> Markdown; '' if there is nothing below the heading."""
    head, *rows = rows
    if not rows:
        return ''
    rule = ['---'] * len(head)
    return ''.join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *rows))


INTRODUCTION = """# All results

`python -m lesson.plots` writes this page from `results.csv`, which has a row for every run.
`python -m lesson.experiments NAME --print` shows the commands of the runs.

Figures are in percent; ± is half of the 95 % interval, over training scenes and seeds, and on
photographs over seeds alone. A difference is *undecided* if it does not survive Holm's correction
at 5 %, over all differences of its experiment. So one that stands in two experiments may be decided
in one of them only.
"""
RATES = """
## Learning rates

A rate was chosen by the mean of big and small objects named, or by the mean of R@10 both ways on
the validation photographs.

"""
CHOSEN_BY = ['dominant.top1', 'small.top1', 'val.image_to_text_R@10', 'val.text_to_image_R@10']


def difference_table(experiment):
    """A row for each pair, a column for each figure; '' if there is nothing to compare yet."""
    gaps, decided = differences(experiment)
    columns = list(dict.fromkeys(column for _, column in gaps))
    rows = [['difference', *map(label, columns)]]
    for pair in dict.fromkeys(pair for pair, _ in gaps):
        row = [pair.replace('~', ' - ')]
        for column in columns:
            cell = ''
            if (pair, column) in gaps:
                gap, half = gaps[pair, column]
                cell = f'{gap:+.1f} ± {half:.1f}'
                if (pair, column) not in decided:
                    cell += ', undecided'
            row.append(cell)
        rows.append(row)
    return as_table(rows)


def rate_table():
    """A row for each rate that was tried, and what it reached."""
    rows = [['in %', *map(label, CHOSEN_BY)]]
    for experiment in EXPERIMENTS:
        if 'tune' not in experiment:
            continue
        for name in EXPERIMENTS[experiment]:
            cells = []
            for column in CHOSEN_BY:
                found = values(experiment, name, column)
                cells.append(f'{fmean(found.values()):.1f}' if found else '')
            if any(cells):
                rows.append([f'{experiment}/{name}', *cells])
    return as_table(rows)


def results_page():
    """RESULTS.md: the differences of all experiments, and the rates that were tried."""
    text = INTRODUCTION
    for experiment in EXPERIMENTS:
        found = difference_table(experiment)
        if found:
            text += f'\n## {experiment}\n\n{found}'
    return text + RATES + rate_table()


# --- 3. Pictures -----------------------------------------------------------------------------------------------------

PAINT = {
    'clip': '#0072b2', 'clip-averaged': '#0072b2', 'cosmos': '#d55e00', 'no-cross-attention': '#009e73'}
NAMES = {'clip': 'CLIP', 'no-cross-attention': 'COSMOS without cross-attention', 'cosmos': 'COSMOS'}


def show_runs(axis, experiment, name, column, x, color=None, is_flat=False):
    """Draw runs as dots and their mean as a bar -> the mean. color: if it is not the
    method's. is_flat: x is a height, and the values go to the right."""
    runs = list(values(experiment, name, column).values())
    color = color or PAINT[EXPERIMENTS[experiment][name].method]
    dots = {'marker': 'o', 'color': color, 'linestyle': '', 'alpha': 0.4}
    places = [x] * len(runs)
    if is_flat:
        axis.plot(runs, places, **dots)
        axis.plot(fmean(runs), x, '|', color=color, markersize=12, markeredgewidth=2)
    else:
        axis.plot(places, runs, **dots)
        axis.plot(x, fmean(runs), '_', color=color, markersize=18, markeredgewidth=2)
    return fmean(runs)


def show_scale(axis, words, ticks, chance=CHANCE):
    """Label the axis with what is measured, and mark chance by a dotted line."""
    axis.axhline(chance, color='black', linestyle=':')
    axis.set_yticks([chance, *ticks], ['chance', *ticks])
    axis.set_ylabel(words)
    axis.spines[['top', 'right']].set_visible(False)


COMPANY = {             # of page 2: a world, its options, and its label
    'alone': (World(2, 0.38, 'none'), 'alone'),
    'equal': (World(2, 0.38, 'equal'), 'beside an equal'),
    'big': (World(2, 0.38), 'beside a big one')}


def draw_company(figure):
    """Page 2: a small object in three kinds of company, and how often it is named."""
    axis = figure.subplots()
    for x, (name, (world, words)) in enumerate(COMPANY.items()):
        for method, side, shift in ('clip', 'right', -0.1), ('cosmos', 'left', 0.1):
            height = show_runs(axis, 'company', f'{method}-{name}', 'small.top1', x + shift)
            if name == 'alone':
                axis.text(x + 2 * shift, height, NAMES[method], color=PAINT[method], ha=side)
        box = axis.inset_axes([x - 0.3, -0.36, 0.6, 0.32], transform=axis.get_xaxis_transform())
        (_, image), _ = draw_scene(world, 'val', 17)
        box.imshow(Image.open(io.BytesIO(image)))
        box.set(xticks=[], yticks=[], xlabel=words)
    show_scale(axis, 'small object named, %', (40, 60, 80, 100))
    axis.set(xlim=(-0.5, 2.5), ylim=(0, 103), xticks=[])


def show_legend(figure, colors):
    """Above the panels. colors: {words: colour}."""
    from matplotlib.lines import Line2D
    lines = [Line2D([], [], color=color, linewidth=4) for color in colors.values()]
    figure.legend(lines, [*colors], loc='outside upper center', ncols=len(colors), frameon=False)


RACES = {'pairs': 'same pairs', 'minutes': 'equal time'}


def draw_half_of_race(axis, prefix, column, top):
    """All runs of both races. prefix: of the names of the experiments."""
    for x, race in enumerate(RACES):
        for method, shift in ('clip', -0.2), ('no-cross-attention', 0), ('cosmos', 0.2):
            show_runs(axis, prefix + race, method, column, x + shift)
    axis.set_xticks(range(len(RACES)), RACES.values())
    axis.set(xlim=(-0.5, 1.5), ylim=(0, 1.03 * top))


def draw_race(figure):
    """Page 2: what is named and found from the same pairs and in equal time, on drawn scenes and on photographs."""
    scenes, photographs = figure.subplots(1, 2)
    draw_half_of_race(scenes, '', 'small.top1', 60)
    show_scale(scenes, 'small objects named, %', [30, 60])
    draw_half_of_race(photographs, 'photo-', 'retrieval.text_to_image_R@10', 20)
    show_scale(photographs, 'R@10, %', [10, 20], chance=1)
    scenes.set_title('drawn scenes', loc='left')
    photographs.set_title('photographs', loc='left')
    show_legend(figure, {NAMES[method]: PAINT[method] for method in NAMES})


# Table 5 of the paper, on CC3M: its rows, and R@1 on COCO, image to text and text to image.
TABLE_5 = {
    'clip': ('CLIP', 15.0, 10.7),
    'clip-aug': ('+ image augmentation', 17.5, 12.7),
    'image-distill': ('+ image self-distillation', 20.6, 14.6),
    'text-crop': ('+ text augmentation', 50.4, 37.5),
    'text-distill': ('+ text self-distillation', 51.0, 38.0),
    'cosmos': ('+ cross-attention = COSMOS', 53.1, 40.1)}
WAYS = {'retrieval.image_to_text_R@10': '#0072b2', 'retrieval.text_to_image_R@10': '#d55e00'}
WAY_COLORS = dict(zip(('image to text', 'text to image'), WAYS.values()))


def draw_table_5(figure):
    """Page 2: Table 5 row by row, the paper's and ours."""
    paper, ours = figure.subplots(1, 2)
    for y, (name, (_, *of_paper)) in enumerate(TABLE_5.items()):
        for share, (column, color), shift in zip(of_paper, WAYS.items(), (-0.2, 0.2)):
            paper.plot([share], [y + shift], '|', color=color, markersize=12, markeredgewidth=2)
            show_runs(ours, 'table-5', name, column, y + shift, color, is_flat=True)
    for axis in paper, ours:
        axis.set_yticks(range(len(TABLE_5)), [words for words, *_ in TABLE_5.values()])
        axis.hlines(np.arange(len(TABLE_5)) + 0.5, 0, 60, color='#dddddd', linewidth=1)
        axis.set_ylim(len(TABLE_5) - 0.5, -0.5)
        axis.spines[['top', 'right']].set_visible(False)
    ours.tick_params('y', labelleft=False)
    paper.set(xlim=(0, 60), title='the paper: CC3M, COCO', xlabel='R@1, %')
    ours.set(xlim=(0, 20), title='here: Flickr8k', xlabel='R@10, %')
    show_legend(figure, WAY_COLORS)


PICTURES = {            # how it is drawn, inches
    'company': (draw_company, (6, 4)),
    'race': (draw_race, (8.4, 3.8)),
    'table-5': (draw_table_5, (9, 3.8))}


def draw(name, path):
    from matplotlib import pyplot
    function, inches = PICTURES[name]
    with pyplot.rc_context({'font.size': 13}):
        figure = pyplot.figure(figsize=inches, layout='constrained')
        function(figure)
        figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(path)


# --- 4. The command --------------------------------------------------------------------------------------------------

def main():
    Parser(prog='python -m lesson.plots', epilog=__doc__).parse_args()
    TABLES.write_text(results_page())
    for name in PICTURES:
        draw(name, PICTURE.format(name))


if __name__ == '__main__':
    command(main)
