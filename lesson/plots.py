"""Tables and plots of the course, from lesson/results.csv alone; of experiments that have rows.

    python -m lesson.plots              write lesson/tables.md, draw assets/lesson-*.png (needs matplotlib)
    python -m lesson.plots --check      are the runs complete, do tables, plots and lesson/README.md agree with them?
    python -m lesson.plots --scenes     draw scenes, and what CLIP and COSMOS name in them; needs both runs of `pairs`,
                                        seed 0, in runs/lesson

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

from data import Parser, Shards, cli, digest
from eval import embed_images, load, need, read_text, shard_image
from lesson import suppression
from lesson.experiments import (
    EXPERIMENTS, METHODS, TWO, count_steps, missing_runs, read_results, run_folder, scene_folder)

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
CHANCE = 100 / 6                        # of naming a shape, in percent

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

# A colour, of a palette for the colour-blind, is a method in every plot; what else differs is black. Markers tell
# all apart, too.
STYLES = {
    'CLIP': 'C0o-', 'text crops': 'C1s-', 'COSMOS without heads': 'C2D-', 'COSMOS': 'C3^-',
    'alone': 'ko:', 'beside an equal': 'ks--', 'beside a big one': 'k^-',
    'own weights': 'kx', 'averaged weights': 'ko'}
COMPANY = {'none': 'alone', 'equal': 'beside an equal', 'big': 'beside a big one'}


def draw_rows(axis, panel, marks):
    """A row per variant, with a mark for each column of the panel."""
    variants = variants_with(panel.experiment, panel.columns[0])
    for y, name in enumerate(variants):
        for k, (label, column) in enumerate(zip(marks, panel.columns)):
            found = values(panel.experiment, name, column).values()
            half = half_interval(found)
            below = y + 0.25 * k
            axis.errorbar(
                fmean(found), below, xerr=half, fmt=STYLES[label], label=label, capsize=3)
    axis.set_yticks(range(len(variants)), [METHODS[name].label for name in variants])
    axis.set_ylim(len(variants) - 0.25, -0.5)       # the first one on top
    axis.set_xlim(0, 100)
    axis.axvline(CHANCE, color='grey', linestyle='--', label='chance')


def draw_lines(axis, panel, marks):
    """A line per method over the number at the end of a variant's name."""
    lines = {}
    column = panel.columns[-1]
    for name in variants_with(panel.experiment, column):
        method, _, x = name.rpartition('-')
        found = values(panel.experiment, name, column)
        lines.setdefault(METHODS[method].label, {})[float(x)] = found
    axis.set_xscale('log')
    plot_lines(axis, panel, lines)
    xs = sorted(set().union(*lines.values()))
    axis.set_xticks(xs, [f'{x:g}' for x in xs], rotation=45)
    axis.minorticks_off()


def draw_curves(axis, panel, marks):
    """A curve per scene over training, of the method that the panel is called after."""
    curves = {}
    for column in results()[0]:
        figure, _, step = column.partition('@')
        if figure not in panel.columns or not step:
            continue
        for name in variants_with(panel.experiment, column):
            method, _, scene = name.rpartition('-')
            if panel.title.startswith(METHODS[method].label):
                found = values(panel.experiment, name, column)
                done = 100 * int(step) / count_steps(EXPERIMENTS[panel.experiment][name])
                curves.setdefault(COMPANY[scene], {})[done] = found
    plot_lines(axis, panel, curves)


def plot_lines(axis, panel, lines):
    """Means with their intervals. lines: {label: {x: {seed: value}}}"""
    for label, points in lines.items():
        xs = sorted(points)
        means = [fmean(points[x].values()) for x in xs]
        halves = [half_interval(points[x].values()) for x in xs]
        axis.errorbar(xs, means, halves, fmt=STYLES[label], label=label, capsize=3)
    axis.set_ylim(0, 100)
    axis.set_ylabel('shapes named, %')
    axis.axhline(CHANCE, color='grey', linestyle='--', label='chance')


class Panel(NamedTuple):
    title: str
    experiment: str
    columns: list               # a plot of lines shows the last one


class Picture(NamedTuple):
    """Panels side by side, all from 0 to 100 %."""
    draw: object                # (axis, panel, marks)
    label: str                  # of the x axis
    panels: list
    marks: list = ['own weights', 'averaged weights']           # what the columns of rows are


def both(figure):
    return [f'raw.{figure}', f'averaged.{figure}']


def named(experiment, where=''):
    return [
        Panel(f'Big objects named{where}', experiment, both('dominant.top1')),
        Panel(f'Small objects named{where}', experiment, both('small.top1'))]


SMALL = both('small.top1')
PICTURES = {
    'race': Picture(draw_rows, 'named, %', [
        *named('pairs', ',\nthe same pairs'),
        *named('main', ',\nthe same minutes')]),
    'parts': Picture(draw_rows, 'named, %', named('parts')),
    'rates': Picture(draw_lines, 'peak learning rate', [
        *named('tune-a', ',\nof three in a scene'),
        *named('tune-b', ',\nof two in a scene')]),
    'colors': Picture(draw_lines, 'colours in the world', named('colors')),
    'company': Picture(draw_curves, 'share of the run, %', [
        Panel(f'{METHODS[method].label}, small objects', 'company', SMALL) for method in TWO])}


def source(picture):
    """A digest of the rows that a picture shows. It travels in the file, for --check."""
    rows = []
    for panel in picture.panels:
        rows += rows_of(panel.experiment)
    return digest(rows)


def draw(name):
    """A panel whose experiment has no rows yet is left out."""
    from matplotlib import pyplot
    pyplot.style.use('tableau-colorblind10')
    picture = PICTURES[name]
    panels = [panel for panel in picture.panels if rows_of(panel.experiment)]
    size = 2 + 2.1 * len(panels), 3.2               # in inches
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=size, sharey=True, squeeze=False, layout='constrained')
    for axis, panel in zip(axes[0], panels):
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel(picture.label)
        picture.draw(axis, panel, picture.marks)
        axis.label_outer()                          # what panels share stands once
    handles, labels = axes[0, 0].get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    figure.legend(unique.values(), unique.keys(), loc='outside lower center', ncols=3)
    figure.savefig(PLOT.format(name), metadata={'Description': source(picture)})
    pyplot.close(figure)


# --- 3. Scenes, and what two runs name -------------------------------------------------------------------------------

ANSWERS = PLOT.format('answers')
INK = {'✓': '#006ba4', '✗': '#c85200'}          # of the palette, by the first letter of a line


def write(axis, row, lines):
    """Below an image, in one of three rows of three lines."""
    for k, line in enumerate(lines):
        y = -0.15 - 0.14 * (4 * row + k)        # in heights of the image
        axis.text(0, y, line, color=INK.get(line[0]), fontsize=9, transform=axis.transAxes)


def answer(scores, thing):
    """The highest of an object's name and its absent names, marked as right or wrong."""
    row = scores[thing.pair]
    names = [*thing.absent, thing.name]         # in this order a tie is a miss
    best = max(names, key=lambda name: row[suppression.COLUMN[name]])
    mark = '✓' if best == thing.name else '✗'
    return f'{mark} {best}'


def draw_answers():
    """What CLIP and COSMOS name in the first held-out scenes, from the same pairs, and in how many of all."""
    from matplotlib import pyplot
    variants = EXPERIMENTS['pairs']
    shards = Shards(scene_folder(variants['cosmos']) / 'val')
    scenes = suppression.read_scenes(shards)
    figure, (legend, *axes) = pyplot.subplots(1, 7, figsize=(10, 3.6))
    figure.subplots_adjust(0.01, 0.55, 0.99, 0.99)
    legend.set_box_aspect(1)                    # as the images have
    write(legend, 0, ['big object', 'small object', 'small object'])
    for k, axis in enumerate(axes):
        axis.imshow(shard_image(shards, k))
        write(axis, 0, [thing.name for thing in scenes[k]])
    for row, name in enumerate(['clip', 'cosmos'], 1):
        model, tokenizer, preprocess = load(run_folder(variants[name], 0) / 'last.pt')
        features = embed_images(model, shards, preprocess)
        scores = suppression.name_scores(model, tokenizer, features)
        shares = suppression.named(scores, scenes)
        big = f"big: {shares['dominant']['top1']:.1%} right"
        small = f"small: {shares['small']['top1']:.1%}"
        write(legend, row, [METHODS[name].label, big, small])
        for axis, scene in zip(axes, scenes):
            write(axis, row, [answer(scores, thing) for thing in scene])
    for axis in (legend, *axes):
        axis.axis('off')
    figure.savefig(ANSWERS, metadata={'Description': digest(rows_of('pairs'))})
    pyplot.close(figure)


def draw_company():
    """The same held-out scene in each kind of company."""
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, len(COMPANY), figsize=(5.5, 2.1), layout='constrained')
    for axis, (name, title) in zip(axes, COMPANY.items()):
        shards = Shards(scene_folder(EXPERIMENTS['company'][f'clip-{name}']) / 'val')
        axis.imshow(shard_image(shards, 0))
        axis.set_title(title, fontsize=10)
        axis.axis('off')
    figure.savefig(PLOT.format('scenes'))
    pyplot.close(figure)


# --- 4. Check --------------------------------------------------------------------------------------------------------

def check(experiment):
    """The runs of an experiment. ValueError with a sentence on the first thing that is wrong."""
    missing = missing_runs(experiment)
    need(not missing, f'{experiment} lacks runs, first {missing[:1]}; make them by lesson.experiments')
    commits = {(row['commit'], row['precision']) for row in rows_of(experiment)}
    need(len(commits) == 1, f'{experiment} has runs of several commits: {commits}; make them anew at one')
    machine_of = {}
    for row in rows_of(experiment):
        other = machine_of.setdefault(row['seed'], row['machine'])
        need(row['machine'] == other,
             f"seed {row['seed']} of {experiment} has runs of several machines; make them anew on one")


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
    parser.add_argument('--scenes', action='store_true', help='draw scenes, no more')
    args = parser.parse_args()
    if args.scenes:
        draw_company()
        draw_answers()
        return
    pictures = []
    for name, picture in PICTURES.items():
        if any(rows_of(panel.experiment) for panel in picture.panels):
            pictures.append(name)
    if args.check:
        for experiment in EXPERIMENTS:
            if rows_of(experiment):
                check(experiment)
            else:
                print(f'{experiment} has no rows yet')
        for name in pictures:
            drawn_with = Image.open(PLOT.format(name)).text.get('Description')
            need(drawn_with == source(PICTURES[name]),
                 f'the plot {name} shows other figures; run python -m lesson.plots')
        need(Image.open(ANSWERS).text.get('Description') == digest(rows_of('pairs')),
             f'{ANSWERS} is of other runs; run python -m lesson.plots --scenes')
        check_text(all_tables())
    else:
        for name in pictures:
            draw(name)
        TABLES.write_text(all_tables())


if __name__ == '__main__':
    cli(main)
