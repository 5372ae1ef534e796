"""Tables and plots of the course, from lesson/results.csv alone; of experiments that have rows.

    python -m lesson.plots              write lesson/tables.md, draw assets/lesson-*.png (needs matplotlib)
    python -m lesson.plots --check      are the runs complete, do tables, plots and lesson/README.md agree with them?

In lesson/README.md a figure is followed by the place it comes from, that of a difference names two variants:

    94.8<!--minutes/cosmos/small.top1-->    +5.3 ± 2.1<!--minutes/cosmos~clip/small.top1-->

Shares are in percent, `seconds` in minutes, `pairs` in thousands.
"""
import functools
import hashlib
import math
import re
from pathlib import Path
from statistics import fmean, variance
from typing import NamedTuple

from PIL import Image

from data import Parser, run
from eval import need
from lesson.experiments import EXPERIMENTS, METHODS, missing_runs, read_results, recipe

README = Path('lesson/README.md')
TABLES = Path('lesson/tables.md')
PLOT = 'assets/lesson-{}.png'
COLUMNS = {                             # of tables, and their headings
    'dominant.top1': 'big named',
    'small.top1': 'small named',
    'bound.dominant_small': 'bound',
    'seen.small': 'small seen',
    'small.probe_top1': 'small probed',
    'retrieval.image_to_text_R@1': 'R@1 image to text',
    'retrieval.text_to_image_R@1': 'R@1 text to image',
    'pointing.small.own_it': 'small pointed at',
    'pointing.small.own_other': 'another pointed at',
    'pairs': 'thousand pairs',
    'seconds': 'minutes',
    'pairs_per_s': 'pairs a second'}
UNITS = {'pairs': 1e-3, 'seconds': 1 / 60, 'pairs_per_s': 1}            # of others 100: percent
HELD_OUT = 1000                         # scenes
CHANCE = 100 / 6                        # of naming a shape, in percent

# --- 1. Figures ------------------------------------------------------------------------------------------------------

results = functools.cache(read_results)


def rows_of(experiment):
    """-> {(name of a variant, seed): row}"""
    found = {}
    for name, variant in EXPERIMENTS[experiment].items():
        for (made, seed), row in results().items():
            if made == recipe(variant):
                found[name, seed] = row
    return found


def values(experiment, name, column):
    """-> {seed: value}, in its unit"""
    unit = UNITS.get(column, 100)
    found = {}
    for (variant, seed), row in rows_of(experiment).items():
        if variant == name and row.get(column):
            found[seed] = unit * float(row[column])
    return found


def variants_with(experiment, column):
    return [name for name in EXPERIMENTS[experiment] if values(experiment, name, column)]


# 97.5 % quantiles of Student's t for 1 to 8 degrees of freedom, which are rounded down: no interval gets shorter
QUANTILES = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31]


def half_interval(numbers):
    """Half of the 95 % interval of their mean; 0 for fewer than three: that of two is too wide to say anything."""
    freedom = len(numbers) - 1
    if freedom < 2:
        return 0.0
    return QUANTILES[freedom - 1] * math.sqrt(variance(numbers) / len(numbers))


def welch(a, b):
    """Half of the 95 % interval of the difference of two means over as many runs, with variances of their own (Welch)."""
    u = variance(a)
    v = variance(b)
    if u + v == 0:
        return 0.0
    freedom = (len(a) - 1) * (u + v) ** 2 / (u ** 2 + v ** 2)
    return QUANTILES[int(freedom) - 1] * math.sqrt((u + v) / len(a))


def difference(experiment, name, other, column):
    """name minus other, over the blocks (seeds) that have both -> '+5.3 ± 2.1', '' for fewer than three blocks.

    In bold where it is decided: the interval is without 0, and the difference is at least twice the sampling error of
    a share of the held-out scenes.
    """
    ours = values(experiment, name, column)
    theirs = values(experiment, other, column)
    blocks = [seed for seed in ours if seed in theirs]
    if len(blocks) < 3:
        return ''
    a = [ours[seed] for seed in blocks]
    b = [theirs[seed] for seed in blocks]
    gap = fmean(a) - fmean(b)
    half = welch(a, b)
    least = half
    if column not in UNITS:
        share = fmean(a + b) / 100
        least = max(half, 200 * math.sqrt(share * (1 - share) / HELD_OUT))
    mark = '**' if abs(gap) > least else ''
    return f'{mark}{gap:+.1f} ± {half:.1f}{mark}'


def cell(experiment, name, column):
    """The mean over seeds, and the difference to the first variant: '94.8, **+5.3 ± 2.1**'."""
    found = values(experiment, name, column)
    if not found:
        return '-'
    text = f'{fmean(found.values()):.1f}'
    first = next(iter(EXPERIMENTS[experiment]))
    gap = difference(experiment, name, first, column)
    if name == first or column in UNITS or not gap:
        return text
    return f'{text}, {gap}'


def table(experiment):
    """Markdown: a line per variant that has rows, a column per figure that has values."""
    columns = [column for column in COLUMNS if variants_with(experiment, column)]
    headings = [COLUMNS[column] for column in columns]
    lines = [f'| {experiment} | {" | ".join(headings)} |', '|---' * (1 + len(columns)) + '|']
    for name in variants_with(experiment, 'seconds'):
        cells = [cell(experiment, name, column) for column in columns]
        lines.append(f'| {name} | {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n\n'


NOTE = '''Means over seeds, and differences to the first line with 95 % intervals (Welch). Bold: 0 lies outside, and the
difference is twice the sampling error of the held-out scenes or more. The rest is open.

'''


def all_tables():
    return NOTE + ''.join(table(experiment) for experiment in EXPERIMENTS if rows_of(experiment))


# --- 2. Plots --------------------------------------------------------------------------------------------------------

class Panel(NamedTuple):
    title: str
    experiment: str
    column: str


PICTURES = {                    # panels side by side, all from 0 to 100 %
    'race': [
        Panel('Big objects named,\nthe same pairs', 'pairs', 'dominant.top1'),
        Panel('Small objects named,\nthe same pairs', 'pairs', 'small.top1'),
        Panel('Big objects named,\nthe same minutes', 'minutes', 'dominant.top1'),
        Panel('Small objects named,\nthe same minutes', 'minutes', 'small.top1')]}


def draw_rows(axis, panel):
    """A row per variant: the mean of its runs, and its interval."""
    variants = variants_with(panel.experiment, panel.column)
    for y, name in enumerate(variants):
        found = values(panel.experiment, name, panel.column).values()
        axis.errorbar(fmean(found), y, xerr=half_interval(found), fmt='ko', capsize=3)
    axis.set_yticks(range(len(variants)), [METHODS[name].label for name in variants])
    axis.set_ylim(len(variants) - 0.5, -0.5)        # the first one on top
    axis.set_xlim(0, 100)
    axis.set_xlabel('named, %')
    axis.axvline(CHANCE, color='grey', linestyle='--', label='chance')


def source(panels):
    """A digest of the rows that a picture shows. It travels in the file, for --check."""
    rows = [rows_of(panel.experiment) for panel in panels]
    return hashlib.sha1(repr(rows).encode()).hexdigest()


def draw(name):
    """A panel whose experiment has no rows yet is left out."""
    from matplotlib import pyplot
    panels = [panel for panel in PICTURES[name] if rows_of(panel.experiment)]
    size = 2 + 2.1 * len(panels), 3.2               # in inches
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=size, sharey=True, squeeze=False, layout='constrained')
    for axis, panel in zip(axes[0], panels):
        axis.set_title(panel.title, fontsize=10)
        draw_rows(axis, panel)
        axis.label_outer()                          # what panels share stands once
    figure.savefig(PLOT.format(name), metadata={'Description': source(PICTURES[name])})
    pyplot.close(figure)


# --- 3. Check --------------------------------------------------------------------------------------------------------

def check(experiment):
    """The runs of an experiment. Refused with a sentence on the first thing that is wrong."""
    missing = missing_runs(experiment)
    need(not missing, f'{experiment} lacks runs, first {missing[:1]}; make them by lesson.experiments')
    rows = rows_of(experiment).values()
    commits = {(row['commit'], row['precision']) for row in rows}
    need(len(commits) == 1, f'{experiment} has runs of several commits: {commits}; make them anew at one')
    machine_of = {}
    for row in rows:
        other = machine_of.setdefault(row['seed'], row['machine'])
        need(row['machine'] == other,
             f"seed {row['seed']} of {experiment} has runs of several machines; make them anew on one")


def check_text(tables):
    """The tables, and every figure in README.md that says where it comes from."""
    need(TABLES.read_text() == tables, f'{TABLES} differs from results.csv; run python -m lesson.plots')
    marked = r'([-+.\d]+(?: ± [.\d]+)?)<!--([\w-]+)/([^\s/~]+)(?:~(\S+?))?/(\S+)-->'
    for figure, experiment, name, other, column in re.findall(marked, README.read_text()):
        right = cell(experiment, name, column).split(',')[0]
        if other:
            right = difference(experiment, name, other, column).strip('*')
        need(figure == right,
             f'{column} of {name} ({experiment}) is {figure} in {README}, {right} in results.csv')


def main():
    parser = Parser(epilog=__doc__)
    parser.add_argument('--check', action='store_true', help='only compare with results.csv')
    args = parser.parse_args()
    pictures = [name for name, panels in PICTURES.items() if any(rows_of(panel.experiment) for panel in panels)]
    if not args.check:
        for name in pictures:
            draw(name)
        TABLES.write_text(all_tables())
        return
    for experiment in EXPERIMENTS:
        if rows_of(experiment):
            check(experiment)
        else:
            print(f'{experiment} has no rows yet')
    for name in pictures:
        drawn_with = Image.open(PLOT.format(name)).text.get('Description')
        need(drawn_with == source(PICTURES[name]), f'the plot {name} shows other figures; run python -m lesson.plots')
    check_text(all_tables())


if __name__ == '__main__':
    run(main)
