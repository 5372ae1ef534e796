"""Tables and plots of the course, from lesson/results.csv alone.

    python -m lesson.plots              write lesson/tables.md, draw assets/lesson-*.png (needs matplotlib)
    python -m lesson.plots --check      are the runs complete, do tables, plots and lesson/README.md agree with them?

In lesson/README.md a figure is followed by the place it comes from: 94.8<!--named/q0.2-cosmos/small.top1-->.
"""
import functools
import math
import re
from pathlib import Path
from statistics import fmean, stdev

from PIL import Image

from data import Parser, cli
from eval import need, read_text
from lesson.experiments import EXPERIMENTS, missing_runs, read_results

README = Path('lesson/README.md')
TABLES = Path('lesson/tables.md')
PLOT = 'assets/lesson-{}.png'
FIGURES = (
    'dominant.top1 small.top1 small.all_top1 dominant.probe_top1 small.probe_top1 '
    'dominant.shape_top1 small.shape_top1 dominant.bound small.bound '
    'retrieval.image_to_text_R@1 retrieval.text_to_image_R@1 segmentation.mIoU').split()
COLUMNS = {                             # of experiments that do not show FIGURES
    'size': (
        'dominant.top1@80 small.top1@80 dominant.top1@160 small.top1@160 '
        'dominant.top1@320 small.top1@320 dominant.bound small.bound').split(),
    'drawings': (
        'dominant.scene_top1 small.scene_top1 dominant.name_top1 small.name_top1 '
        'retrieval.image_to_text_R@1 retrieval.text_to_image_R@1').split(),
    'cross': (
        'small.top1 small.probe_top1 segmentation.mIoU '
        'retrieval.image_to_text_R@1 retrieval.text_to_image_R@1 small.shape_top1 '
        'pointing.dominant.peak pointing.dominant.absent_peak '
        'pointing.small.peak pointing.small.absent_peak '
        'pointing.small.used pointing.small.absent_used').split()}
CURVES = {'named': 'share of sentences on the small object', 'size': 'side of the small object'}
QUANTILES = {3: 4.303, 5: 2.776}        # of Student's t, 97.5 %, by the number of seeds; others get no interval

# --- 1. Tables -------------------------------------------------------------------------------------------------------

results = functools.cache(read_results)


def values(experiment, name, figure):
    """-> {seed: percent}"""
    found = {}
    for row in results():
        if row['experiment'] == experiment and row['variant'] == name and row.get(figure):
            found[row['seed']] = 100 * float(row[figure])
    return found


def mean(experiment, name, figure):
    """Over seeds; NaN where there is none."""
    return fmean(values(experiment, name, figure).values() or [math.nan])


def cell(experiment, name, figure):
    """The mean over its seeds, and the difference to `against` over the seeds of both: '94.8, **+5.3 ± 2.1**'."""
    against = EXPERIMENTS[experiment][name].against
    ours = values(experiment, name, figure)
    base = values(experiment, against, figure)
    gaps = [ours[seed] - base[seed] for seed in ours if seed in base]
    text = f'{mean(experiment, name, figure):.1f}'
    if name == against or len(gaps) not in QUANTILES:
        return text
    gap = fmean(gaps)
    half = QUANTILES[len(gaps)] * stdev(gaps) / math.sqrt(len(gaps))    # of its 95 % interval
    mark = '**' if abs(gap) > half else ''                              # the interval is without 0
    return f'{text}, {mark}{gap:+.1f} ± {half:.1f}{mark}'


def table(experiment):
    """Markdown: a line per variant, a column per figure."""
    columns = COLUMNS.get(experiment, FIGURES)
    lines = [f'| {experiment} | against | {" | ".join(columns)} |', '|---' * (2 + len(columns)) + '|']
    for name, variant in EXPERIMENTS[experiment].items():
        cells = [cell(experiment, name, figure) for figure in columns]
        lines.append(f'| {name} | {variant.against} | {" | ".join(cells)} |')
    text = '\n'.join(lines)
    return f'{text}\n\n{text.count("±")} differences with 95 % intervals. Bold: 0 lies outside; the rest is open.\n\n'


# --- 2. Plots --------------------------------------------------------------------------------------------------------

def draw(experiment):
    """A panel per figure. In CURVES: means over the number that a variant's name begins with. Else a row per variant
    and a dot per seed. The file carries the table that it was drawn with, for --check."""
    from matplotlib import pyplot
    columns = COLUMNS.get(experiment, FIGURES)
    picture, axes = pyplot.subplots(
        2, len(columns) // 2, sharey=True, figsize=(12, 6), layout='constrained')
    for axis, figure in zip(axes.flat, columns):
        axis.set_title(figure.replace('.', '\n'), fontsize=8)
        curves = {}
        for name in reversed(EXPERIMENTS[experiment]):              # the first one on top
            if experiment in CURVES:
                x, label = name[1:].split('-', 1)                       # q0.1-clip
                curves.setdefault(label, {})[float(x)] = mean(experiment, name, figure)
            else:
                found = values(experiment, name, figure).values()
                axis.plot(found, [name] * len(found), 'C0o-')
        for label, curve in curves.items():
            axis.plot(curve.keys(), curve.values(), 'o-', label=label)
    if experiment in CURVES:
        picture.supxlabel(CURVES[experiment])
        axis.legend()                           # in the last panel
    picture.savefig(PLOT.format(experiment), metadata={'Description': table(experiment)})


# --- 3. Check --------------------------------------------------------------------------------------------------------

def check(experiment):
    """The runs of an experiment and its plot. ValueError with a sentence on the first thing that is wrong."""
    missing = missing_runs(experiment)
    need(not missing, f'{experiment} lacks runs, first {missing[:1]}; make them by lesson.experiments')
    origins = {(row['commit'], row['machine']) for row in results() if row['experiment'] == experiment}
    need(len(origins) == 1, f'{experiment} has runs of several commits or machines: {origins}')
    drawn_with = Image.open(PLOT.format(experiment)).text.get('Description')
    need(drawn_with == table(experiment),
         f'the plot of {experiment} shows other figures; run python -m lesson.plots')


def check_text(tables):
    """The tables, and every figure in README.md that says where it comes from."""
    need(read_text(TABLES) == tables, f'{TABLES} differs from results.csv; run python -m lesson.plots')
    source = r'([-+.\d]+(?: ± [.\d]+)?)<!--(\w+)/(\S+?)/(\S+)-->'
    for figure, experiment, name, column in re.findall(source, read_text(README)):
        right = cell(experiment, name, column)
        parts = right.replace('*', '').split(', ')
        need(figure in parts,
             f'{column} of {name} ({experiment}) is {figure} in {README}, {right} in results.csv')


def main():
    parser = Parser(epilog=__doc__)
    parser.add_argument('--check', action='store_true', help='only compare with results.csv')
    args = parser.parse_args()
    tables = ''.join(table(experiment) for experiment in EXPERIMENTS)
    if args.check:
        for experiment in EXPERIMENTS:
            check(experiment)
        check_text(tables)
    else:
        for experiment in EXPERIMENTS:
            draw(experiment)
        TABLES.write_text(tables)


if __name__ == '__main__':
    cli(main)
