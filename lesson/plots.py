"""Tables and plots of the course, from lesson/results.csv alone; of experiments that have rows.

    python -m lesson.plots              write lesson/tables.md, draw assets/lesson-*.png (needs matplotlib)
    python -m lesson.plots --check      are the runs complete, do tables, plots and lesson/README.md agree with them?

In lesson/README.md a figure is followed by the place it comes from, that of a difference names two variants:

    94.8<!--main/cosmos/averaged.small.top1-->    +5.3 ± 2.1<!--main/cosmos~clip/averaged.small.top1-->

Shares are in percent, `seconds` in minutes, `pairs` in thousands.
"""
import functools
import math
import re
from pathlib import Path
from statistics import fmean, variance
from typing import NamedTuple

from PIL import Image

from data import Parser, cli
from eval import need, read_text
from lesson.experiments import EXPERIMENTS, METHODS, missing_runs, read_results

README = Path('lesson/README.md')
TABLES = Path('lesson/tables.md')
PLOT = 'assets/lesson-{}.png'
COLUMNS = {                             # of tables, and their headings
    'averaged.dominant.top1': 'big named',
    'averaged.small.top1': 'small named',
    'averaged.bound.dominant_small': 'bound',
    'averaged.twins.small': 'twins, small',
    'averaged.small.probe_top1': 'small probed',
    'averaged.retrieval.image_to_text_R@1': 'R@1 image to text',
    'averaged.retrieval.text_to_image_R@1': 'R@1 text to image',
    'raw.dominant.top1': 'big named, raw',
    'raw.small.top1': 'small named, raw',
    'raw.bound.dominant_small': 'bound, raw',
    'averaged.pointing.small.peak': 'small pointed at',
    'averaged.pointing.small.absent_peak': 'asked for an absent name',
    'pairs': 'thousand pairs',
    'seconds': 'minutes',
    'pairs_per_s': 'pairs a second'}
UNITS = {'pairs': 1e-3, 'seconds': 1 / 60, 'pairs_per_s': 1}            # of others 100: percent
HELD_OUT = 1000                         # scenes

# --- 1. Figures ------------------------------------------------------------------------------------------------------

results = functools.cache(read_results)


def rows_of(experiment):
    return [row for row in results() if row['experiment'] == experiment]


def values(experiment, name, column):
    """-> {seed: value}, in its unit"""
    unit = UNITS.get(column, 100)
    found = {}
    for row in rows_of(experiment):
        if row['variant'] == name and row.get(column):
            found[row['seed']] = unit * float(row[column])
    return found


# 97.5 % quantiles of Student's t for 1 to 8 degrees of freedom
QUANTILES = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31]


def quantile(freedom):
    """Degrees of freedom are rounded down, which makes an interval longer, never shorter."""
    return QUANTILES[min(int(freedom), len(QUANTILES)) - 1]


def half_interval(numbers):
    """Half of the 95 % interval of their mean; 0 for a single one."""
    count = len(numbers)
    if count < 2:
        return 0.0
    return quantile(count - 1) * math.sqrt(variance(numbers) / count)


def welch(a, b):
    """Half of the 95 % interval of the difference of two means, whose variances may differ (Welch)."""
    u = variance(a) / len(a)
    v = variance(b) / len(b)
    if u + v == 0:
        return 0.0
    freedom = (u + v) ** 2 / (u ** 2 / (len(a) - 1) + v ** 2 / (len(b) - 1))
    return quantile(freedom) * math.sqrt(u + v)


def difference(experiment, name, other, column):
    """name minus other, over the blocks (seeds) that have both -> '+5.3 ± 2.1', '' for less than two blocks.

    In bold where it is decided: the interval is without 0, and the difference is at least twice the sampling error of
    a share of the held-out scenes.
    """
    ours = values(experiment, name, column)
    theirs = values(experiment, other, column)
    blocks = [seed for seed in ours if seed in theirs]
    if len(blocks) < 2:
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
    if name == first or not gap:
        return text
    return f'{text}, {gap}'


def table(experiment):
    """Markdown: a line per variant that has rows, a column per figure that has values."""
    rows = rows_of(experiment)
    columns = [column for column in COLUMNS if any(row.get(column) for row in rows)]
    headings = [COLUMNS[column] for column in columns]
    lines = [f'| {experiment} | {" | ".join(headings)} |', '|---' * (1 + len(columns)) + '|']
    for name in EXPERIMENTS[experiment]:
        if any(row['variant'] == name for row in rows):
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
    """`columns` of an experiment under a title; `guess`: what chance reaches, in percent."""
    title: str
    experiment: str
    columns: list
    guess: float = 100 / 6
    method: str = ''            # for curves: whose


class Picture(NamedTuple):
    """Panels side by side, in one scale from 0 to 100 %."""
    draw: object                # (axis, panel, picture)
    panels: list
    label: str                  # of the x axis
    marks: list = ['own weights', 'averaged weights']           # what the columns of a panel are


def both(figure):
    return [f'raw.{figure}', f'averaged.{figure}']


# For the colour-blind (Okabe and Ito), and told apart by their markers, too
INKS = ['#0072b2', '#d55e00', '#009e73', '#cc79a7']
MARKERS = 'osD^'
PAPER = {                       # Table 5: R@1 of captions among the 5,000 images of COCO
    'clip': 15.0, 'clip-aug': 17.5, 'image-distill': 20.6,
    'text-crop': 50.4, 'text-distill': 51.0, 'cosmos': 53.1}


def draw_rows(axis, panel, picture):
    """A row per variant: its columns on one line, with the interval of the last."""
    variants = [name for name in EXPERIMENTS[panel.experiment]
                if values(panel.experiment, name, panel.columns[0])]
    for y, name in enumerate(variants):
        ends = []
        for ink, marker, column in zip(INKS, MARKERS, panel.columns):
            found = list(values(panel.experiment, name, column).values())
            ends.append(fmean(found))
            axis.errorbar(ends[-1], y, xerr=half_interval(found), color=ink, marker=marker,
                          capsize=3, label=picture.marks[len(ends) - 1] if y == 0 else None)
        axis.plot(ends, [y] * len(ends), color='lightgrey', linewidth=4, zorder=0)
    labels = [METHODS[name].label if name in METHODS else name for name in variants]
    axis.set_yticks(range(len(variants)), labels)
    axis.set_ylim(len(variants) - 0.5, -0.5)
    axis.set_xlim(0, 100)
    axis.set_xlabel(picture.label)
    axis.axvline(panel.guess, color='grey', linestyle='--', linewidth=1)


def draw_paper(axis, panel, picture):
    """The paper's rows."""
    labels = [METHODS[name].label for name in PAPER]
    axis.barh(labels, PAPER.values(), color=INKS[0], height=0.4)
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel('captions found first among 5,000 images, %')


def draw_lines(axis, panel, picture):
    """A line per method over the number that a variant's name ends with; small dots: single runs."""
    [column] = panel.columns
    lines = {}
    for name in EXPERIMENTS[panel.experiment]:
        method, _, x = name.rpartition('-')
        found = list(values(panel.experiment, name, column).values())
        if found:
            lines.setdefault(method, {})[float(x)] = found
    for ink, marker, (method, points) in zip(INKS, MARKERS, lines.items()):
        xs = sorted(points)
        for x in xs:
            axis.plot([x] * len(points[x]), points[x], '.', color=ink, markersize=4)
        means = [fmean(points[x]) for x in xs]
        axis.plot(xs, means, color=ink, marker=marker, label=METHODS[method].label)
    axis.set_xscale('log', base=2)
    axis.set_xticks(xs, [f'{x:g}' for x in xs], rotation=45, minor=False)
    finish_axis(axis, panel, picture)


def draw_curves(axis, panel, picture):
    """Over training: a curve per variant of the panel's method, the mean over seeds."""
    [column] = panel.columns
    scenes = {'none': 'alone', 'equal': 'beside an equal', 'big': 'beside a big one'}
    for ink, marker, (scene, label) in zip(INKS, MARKERS, scenes.items()):
        name = f'{panel.method}-{scene}'
        points = {}
        for row in rows_of(panel.experiment):
            for each in row:
                if row['variant'] == name and row[each] and each.startswith(f'{column}@'):
                    step = int(each.partition('@')[2])
                    share = 100 * step / float(row['steps'])
                    points.setdefault(share, []).append(100 * float(row[each]))
        xs = sorted(points)
        means = [fmean(points[x]) for x in xs]
        bars = [half_interval(points[x]) for x in xs]
        axis.errorbar(xs, means, bars, color=ink, marker=marker, capsize=3, label=label)
    finish_axis(axis, panel, picture)


def finish_axis(axis, panel, picture):
    axis.axhline(panel.guess, color='grey', linestyle='--', linewidth=1)
    axis.set_ylim(0, 100)
    axis.set_xlabel(picture.label)


BIG = 'averaged.dominant.top1'
SMALL = 'averaged.small.top1'
PICTURES = {
    'race': Picture(draw_rows, [
        Panel('The same pairs,\nthree objects', 'pairs', both('small.top1')),
        Panel('The same minutes,\nthree objects', 'main', both('small.top1')),
        Panel('The same minutes,\na big and a small object', 'other-world', both('small.top1')),
        Panel('The paper, on photographs', 'main', [])], 'small objects named, %'),
    'main': Picture(draw_rows, [
        Panel('Big objects named', 'main', both('dominant.top1')),
        Panel('Small objects named', 'main', both('small.top1')),
        Panel('Colour bound to shape', 'main', both('bound.dominant_small'), 50),
        Panel('Caption found first', 'main', both('retrieval.image_to_text_R@1'), 0.1)], '%'),
    'parts': Picture(draw_rows, [
        Panel('Big objects named', 'parts', both('dominant.top1')),
        Panel('Small objects named', 'parts', both('small.top1'))], '%'),
    'pointing': Picture(draw_rows, [
        Panel(f'C^I asked for a {role} object', 'parts', [
            f'averaged.pointing.{column}.area',
            f'averaged.pointing.{column}.absent_peak',
            f'averaged.pointing.{column}.peak'], 0)
        for role, column in (('big', 'dominant'), ('small', 'small'))],
        'highest weight on the object, %',
        ['a blind guess', 'asked for an absent name', 'asked for its name']),
    'rates': Picture(draw_lines, [
        Panel('Big, three objects', 'tune-a', [BIG]),
        Panel('Small, three objects', 'tune-a', [SMALL]),
        Panel('Big, two objects', 'tune-b', [BIG]),
        Panel('Small, two objects', 'tune-b', [SMALL])], 'peak learning rate'),
    'colors': Picture(draw_lines, [
        Panel('Big objects', 'colors', [BIG]),
        Panel('Small objects', 'colors', [SMALL])], 'colours in the world'),
    'named': Picture(draw_lines, [
        Panel('Big objects', 'named', [BIG]),
        Panel('Small objects', 'named', [SMALL])], 'share of the sentences on small objects'),
    'company': Picture(draw_curves, [
        Panel(METHODS[method].label, 'company', [SMALL], method=method)
        for method in ('clip', 'text-crop', 'cosmos')], 'of the training, %')}


def source(picture):
    """All that a picture shows, as text: it travels in the file, for --check."""
    lines = []
    for panel in picture.panels:
        for row in rows_of(panel.experiment):
            for column, value in row.items():
                if column.partition('@')[0] in panel.columns and value:
                    lines.append(f"{panel.title} {row['variant']} {row['seed']} {column} {value}")
    return '\n'.join(lines)


def draw(name):
    """PNG of a picture; panels of experiments without rows stay empty."""
    from matplotlib import pyplot
    picture = PICTURES[name]
    count = len(picture.panels)
    rows = picture.draw is draw_rows
    figure, axes = pyplot.subplots(
        1, count, sharey=not rows, figsize=(1 + 3.2 * count, 3.6), layout='constrained')
    for axis, panel in zip(axes, picture.panels):
        axis.set_title(panel.title, fontsize=10)
        axis.spines[['top', 'right']].set_visible(False)
        if not panel.columns:
            draw_paper(axis, panel, picture)
        elif rows_of(panel.experiment):
            picture.draw(axis, panel, picture)
    if not rows:
        axes[0].set_ylabel('shape named, %')
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=4, frameon=False)
    figure.savefig(PLOT.format(name), dpi=110, metadata={'Description': source(picture)})
    pyplot.close(figure)


# --- 3. Check --------------------------------------------------------------------------------------------------------

def check(experiment):
    """The runs of an experiment. ValueError with a sentence on the first thing that is wrong."""
    missing = missing_runs(experiment)
    need(not missing, f'{experiment} lacks runs, first {missing[:1]}; make them by lesson.experiments')
    commits = set()
    machines = {}
    for row in rows_of(experiment):
        commits.add(row['commit'])
        machine = row['machine'], row['precision']
        other = machines.setdefault(row['seed'], machine)
        need(machine == other,
             f"seed {row['seed']} of {experiment} has runs of several machines; make them anew on one")
    need(len(commits) == 1, f'{experiment} has runs of several commits: {commits}; make them anew at one')


def check_plot(name):
    drawn_with = Image.open(PLOT.format(name)).text.get('Description')
    need(drawn_with == source(PICTURES[name]),
         f'the plot {name} shows other figures; run python -m lesson.plots')


def check_text(tables):
    """The tables, and every figure in README.md that says where it comes from."""
    need(read_text(TABLES) == tables, f'{TABLES} differs from results.csv; run python -m lesson.plots')
    marked = r'([-+.\d]+(?: ± [.\d]+)?)<!--([\w-]+)/([^\s/~]+)(?:~(\S+?))?/(\S+)-->'
    for figure, experiment, name, other, column in re.findall(marked, read_text(README)):
        right = cell(experiment, name, column).split(',')[0]
        if other:
            right = difference(experiment, name, other, column).strip('*')
        need(figure == right,
             f'{column} of {name} ({experiment}) is {figure} in {README}, {right} in results.csv')


def main():
    parser = Parser(epilog=__doc__)
    parser.add_argument('--check', action='store_true', help='only compare with results.csv')
    args = parser.parse_args()
    pictures = []
    for name, picture in PICTURES.items():
        if any(rows_of(panel.experiment) for panel in picture.panels):
            pictures.append(name)
    if args.check:
        for experiment in EXPERIMENTS:
            check(experiment)
        for name in pictures:
            check_plot(name)
        check_text(all_tables())
    else:
        for name in pictures:
            draw(name)
        TABLES.write_text(all_tables())


if __name__ == '__main__':
    cli(main)
