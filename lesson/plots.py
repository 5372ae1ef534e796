"""Tables and plots of the course, from lesson/results.csv alone.

    python -m lesson.plots              print the tables, put them into lesson/README.md, draw the plots (matplotlib)
    python -m lesson.plots --check      are the runs complete, and do README.md and the plots agree with them?

In lesson/README.md the table of an experiment stands between <!-- table NAME --> and <!-- end -->. Behind a figure in a
sentence stands where it comes from: 94.8<!-- named q0.2-cosmos small.top1 -->.
"""
import functools
import math
import re
from pathlib import Path
from statistics import fmean, stdev

from PIL import Image

from data import Parser, cli
from eval import need
from lesson.experiments import EXPERIMENTS, missing_runs, read_results

README = Path('lesson/README.md')
PLOT = 'assets/lesson-{}.png'
BLOCK = r'(?s)(<!-- table {} -->\n)(.*?)(<!-- end -->)'
FIGURES = (
    'dominant.top1 small.top1 small.all_top1 small.probe_top1 dominant.bound small.bound '
    'retrieval.image_to_text_R@1 retrieval.text_to_image_R@1 segmentation.mIoU').split()
POINTING = (
    'pointing.dominant.peak pointing.dominant.absent_peak '
    'pointing.small.peak pointing.small.absent_peak').split()
# Plots with curves, and what their x axis has.
CURVES = {'named': 'share of sentences on the small object', 'size': 'steps'}
# 97.5 % quantiles of Student's t, by degrees of freedom.
QUANTILES = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

# --- 1. Tables -------------------------------------------------------------------------------------------------------

results = functools.cache(read_results)


def columns_of(experiment):
    return FIGURES + POINTING if experiment == 'cross' else FIGURES


def values(experiment, name, figure):
    """-> {seed: value}; fractions in percent, seconds and steps as they are."""
    found = {}
    for row in results():
        if (row['experiment'], row['variant']) == (experiment, name) and row.get(figure):
            found[row['seed']] = float(row[figure]) * (100 if '.' in figure else 1)
    return found


def mean(experiment, name, figure):
    """Over seeds; NaN where there is none."""
    return fmean(values(experiment, name, figure).values() or [math.nan])


def difference(a, b):
    """Of the seeds in both {seed: value} -> the mean difference, and half of its 95 % interval (infinite: unknown)."""
    gaps = [a[seed] - b[seed] for seed in a if seed in b]
    quantile = QUANTILES.get(len(gaps) - 1)
    if quantile is None:
        return math.nan, math.inf
    return fmean(gaps), quantile * stdev(gaps) / math.sqrt(len(gaps))


def table(experiment):
    """Markdown: a line a variant; a cell has the mean over seeds, then the difference to another variant."""
    columns = columns_of(experiment)
    heading = ' | '.join(columns)
    lines = [f'| variant | against | {heading} |', '|---' * (2 + len(columns)) + '|']
    for name, variant in EXPERIMENTS[experiment].items():
        cells = [name, variant.against]
        for figure in columns:
            cell = f'{mean(experiment, name, figure):.1f}'
            base = values(experiment, variant.against, figure)
            gap, half = difference(values(experiment, name, figure), base)
            if name != variant.against and half < math.inf:
                mark = '**' if abs(gap) > half else ''                  # the interval is without 0
                cell += f', {mark}{gap:+.1f} ± {half:.1f}{mark}'
            cells.append(cell)
        lines.append(f'| {" | ".join(cells)} |')
    text = '\n'.join(lines)
    return f'{text}\n\n{text.count("±")} differences with 95 % intervals. Bold: 0 is outside, the others are open.\n'


# --- 2. Plots --------------------------------------------------------------------------------------------------------

def points(experiment, figure):
    """-> {label: [(x, y), ...]}: a curve over q or over steps, else a point a seed in a row a variant."""
    lines = {}
    for name in EXPERIMENTS[experiment]:
        if experiment == 'named':
            share, method = name[1:].split('-', 1)
            lines.setdefault(method, []).append((float(share), mean(experiment, name, figure)))
        elif experiment == 'size':
            steps = range(40, 321, 40)
            lines[name] = [(step, mean(experiment, name, f'{figure}@{step}')) for step in steps]
        else:
            seeds = values(experiment, name, figure).values()
            lines[name] = [(value, name) for value in seeds or [math.nan]]
    return lines


def draw(experiment):
    """A panel a figure. The file carries the table that it was drawn with, for --check."""
    from matplotlib import pyplot
    columns = FIGURES[:2] if experiment in CURVES else columns_of(experiment)
    picture, axes = pyplot.subplots(
        1, len(columns), sharey=True, figsize=(16, 4), layout='constrained')
    for axis, figure in zip(axes, columns):
        axis.set_title(figure.replace('.', '\n'), fontsize=7)
        for label, line in points(experiment, figure).items():
            axis.plot(*zip(*line), 'o-', label=label)
        if experiment in CURVES:
            axis.set_xlabel(CURVES[experiment])
            axis.legend()
    picture.savefig(PLOT.format(experiment), metadata={'Description': table(experiment)})


# --- 3. Check --------------------------------------------------------------------------------------------------------

def check(experiment, page, readme):
    """A page's runs, table and plot. ValueError with a sentence on the first thing that is wrong."""
    missing = missing_runs(experiment)
    need(not missing, f'{page} lacks {len(missing)} runs, first {missing[:1]}; see python -m lesson.experiments')
    rows = [row for row in results() if row['experiment'] == experiment]
    origins = {row['commit'] + ', ' + row['machine'] for row in rows}
    need(len(origins) == 1, f'{page} has runs of several commits or machines: {origins}')
    block = re.search(BLOCK.format(experiment), readme)
    need(block, f'{page} has no table in {README}: it needs <!-- table {experiment} --> and <!-- end -->')
    right = table(experiment)
    for cell, wanted in zip(block[2].split('|'), right.split('|')):
        need(cell == wanted, f'{page}: {README} has{cell}where results.csv gives{wanted}')
    need(block[2] == right, f'{page}: {README} has other rows or words than results.csv gives')
    stamp = Image.open(PLOT.format(experiment)).text.get('Description')
    need(stamp == right, f'{page}: the plot shows other figures than results.csv; run python -m lesson.plots')


def check_sentences(readme):
    """Every figure in a sentence that says where it comes from."""
    source = r'([-.\d]+)<!-- (\w+) (\S+) (\S+) -->'
    for figure, experiment, name, column in re.findall(source, readme):
        right = f'{mean(experiment, name, column):.1f}'
        need(right == figure, f'{column} of {name} ({experiment}) is {figure} in {README}, {right} in results.csv')


def main():
    parser = Parser()
    parser.add_argument('--check', action='store_true', help='only compare with results.csv')
    args = parser.parse_args()
    readme = README.read_text()
    for number, experiment in enumerate(EXPERIMENTS, 2):
        if args.check:
            check(experiment, f'page {number} ({experiment})', readme)
            continue
        text = table(experiment)
        print(f'{experiment}\n\n{text}')
        readme = re.sub(BLOCK.format(experiment), rf'\1{text}\3', readme)
        draw(experiment)
    if args.check:
        check_sentences(readme)
    else:
        README.write_text(readme)


if __name__ == '__main__':
    cli(main)
