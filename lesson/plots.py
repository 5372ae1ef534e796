"""Writes the figures, tables and pictures of the course from lesson/results.csv, and the picture of the method.

    python -m lesson.plots              writes README.md, lesson/README.md, lesson/RESULTS.md and assets/lesson-*
    python -m lesson.plots --accept     does the same even if a figure in the text moves by more than 5 points
    python -m lesson.plots --check      are the runs complete, and do pages and pictures agree with them?
    python -m lesson.plots --mine       draws the pictures into runs/lesson, with your own runs as stars

In README.md and lesson/README.md every number with a decimal point is a figure. A comment at the end of the paragraph
names the sources of its figures, in reading order:

    COSMOS names 33.8 % of the small objects, CLIP +5.3 ± 2.1 more. The paper has 53.1 %.
    <!-- minutes/cosmos/small.top1 minutes/clip~cosmos/small.top1 paper -->

A difference may leave out its ±. What the paper reports has the source `paper`, and constants are put in backticks. A
table is written whole, below a comment that names its columns and its rows:

    <!-- table: dominant.top1 small.top1 | minutes/clip worlds/built-in/likes -->

Shares are written in percent, `seconds` in minutes, `pairs` in thousands. Differences are taken within seeds, because
all runs of a seed have the same training scenes. (All runs on photographs have the same photographs; there the rule is
kept, which costs a little power.) What is written is their mean, with its 95 % interval (Student's t).
All differences of an experiment are one family (see COMPARISONS), and Holm's correction says which of them are decided
at 5 %.
"""
import hashlib
import io
import json
import math
import re
from collections import defaultdict
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from PIL import Image

from lesson import experiments, photos, picture
from lesson.experiments import (COMPANY, EQUAL_COMMITS, METHODS, RESULTS, WORLDS, missing_runs,
                                read_results)
from lesson.scenes import World, draw_scene
from plumbing.errors import Refused, command, need
from plumbing.files import read_json
from plumbing.options import Parser

COMPLETE_PHOTOS = {name: variants for name, variants in photos.EXPERIMENTS.items() if name not in photos.OPEN}
EXPERIMENTS = experiments.EXPERIMENTS | COMPLETE_PHOTOS
COMPARISONS = experiments.COMPARISONS | photos.COMPARISONS
PAGES = [Path('README.md'), Path('lesson/README.md')]
APPENDIX = Path('lesson/RESULTS.md')
PICTURE = 'assets/lesson-{}.png'
UNITS = {                               # all others: 100, which makes a share a percentage
    'pairs': 1e-3, 'seconds': 1 / 60, 'best_step': 1,
    'retrieval.image_to_text_median_rank': 1, 'retrieval.text_to_image_median_rank': 1}
CHANCE = 100 / 6                        # how often guessing names a shape, in percent
LEVEL = 0.05
JUMP = 5                                # points; a larger change needs --accept

# --- 1. Figures ------------------------------------------------------------------------------------------------------

@lru_cache(1)
def parsed(text):
    """The rows. text: what RESULTS holds, so that the rows are read again when it has changed."""
    return read_results()


def in_unit(row, column):
    return UNITS.get(column, 100) * float(row[column])


def values(experiment, name, column):
    """-> {seed: value in its unit}, for the seeds of this experiment; another one may have tuned on others."""
    need(name in EXPERIMENTS.get(experiment, {}), f'there is no experiment {experiment} with a variant {name}')
    variant = EXPERIMENTS[experiment][name]
    rows = parsed(RESULTS.read_text())
    found = {}
    for seed in variant.seeds:
        row = rows.get((variant.recipe(), seed), {})
        if row.get(column):
            found[seed] = in_unit(row, column)
    return found


def mean(experiment, name, column):
    """Over the seeds."""
    found = values(experiment, name, column)
    need(found, f'{experiment} has no {column} of {name}')
    return fmean(found.values())


def student_t(freedom):
    """-> many t from 0 up, and the chance that |T| is larger than each. With t = sqrt(freedom) tan(u) the density of
    Student's t is cos(u) to the power freedom - 1."""
    u = (np.arange(100_000) + 0.5) / 100_000 * math.pi / 2
    density = np.cos(u) ** (freedom - 1)
    return math.sqrt(freedom) * np.tan(u), 1 - density.cumsum() / density.sum()


def difference(experiment, name, other, column):
    """name minus other, seed by seed, because the runs of a seed have the same training scenes and rise and fall
    together -> the mean, half of its 95 % interval, and the p-value: the chance of a mean this far from 0 if the two
    are equal. None if fewer than two seeds have both."""
    a = values(experiment, name, column)
    b = values(experiment, other, column)
    gaps = [a[seed] - b[seed] for seed in a if seed in b]
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


def family(experiment):
    """The comparisons of an experiment that have rows -> {(name, other, column): (gap, half)}, and which are
    decided."""
    gaps = {}
    chances = {}
    for columns, pairs in COMPARISONS.get(experiment, {}).items():
        for name, other in re.findall('(\\S+)~(\\S+)', pairs):
            for column in columns.split():
                found = difference(experiment, name, other, column)
                if found:
                    *gaps[name, other, column], chances[name, other, column] = found
    return gaps, holm(chances)


# --- 2. Tables -------------------------------------------------------------------------------------------------------

TRACKS = {              # for experiments
    'pairs': 'same pairs', 'minutes': 'same minutes', 'longer': 'three times the minutes',
    'longer-reading': 'three times the minutes', 'photo-pairs': 'same pairs',
    'photo-minutes': 'same minutes'}
LABELS = {              # for columns, and what stands before a column
    'seconds': 'minutes', 'pairs': 'thousand pairs',
    'dominant.top1': 'big named', 'small.top1': 'small named',
    'areas': 'how many pixels each colour covers', 'biggest': "the big object's name",
    'sums': 'colours and shapes, added up', 'products': 'colours and shapes, multiplied',
    'likes': 'which names it likes',
    'conflict.h_T': 'h_T of a sentence', 'conflict.h_T_caption': 'h_T of a caption'}


def label(word):
    return LABELS.get(word) or re.sub('[._]', ' ', word.removeprefix('retrieval.'))


def row_label(experiment, name, *prefix):
    """How a page names a row: 'CLIP, same minutes'."""
    if experiment == 'worlds':
        return label(*prefix)
    words = [EXPERIMENTS[experiment][name].label(), *map(label, prefix), TRACKS.get(experiment)]
    return ', '.join(filter(None, words))


def variant_label(experiment, name, *prefix):
    """How RESULTS.md names a row, with its number of runs."""
    runs = len(EXPERIMENTS[experiment][name].seeds)
    return ', '.join([f'{name} × {runs}', *prefix])


def as_table(rows):
    """[[cell, ...], ...], the first row being the heading -> Markdown; '' if there is nothing below the heading."""
    head, *rows = rows
    if not rows:
        return ''
    rule = ['---'] * len(head)
    return ''.join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *rows))


def table(columns, places, name_row):
    """A table of means. A place is [experiment, name], or [experiment, name, what stands before the columns]. Rows and
    columns without a value are left out."""
    cells = defaultdict(dict)
    for place in places:
        experiment, name, *prefix = place
        for column in columns:
            found = values(experiment, name, '.'.join([*prefix, column]))
            if found:
                cells[name_row(*place)][column] = f'{fmean(found.values()):.1f}'
    columns = [column for column in columns if any(column in row for row in cells.values())]
    rows = [['in %', *map(label, columns)]]
    for words, row in cells.items():
        rows.append([words, *(row.get(column, '') for column in columns)])
    return as_table(rows)


PHOTOGRAPHS = 'On photographs'          # a section that other experiments leave out
SECTIONS = [            # heading, what stands before the columns, columns
    ('Named and found', [''],
     'seconds pairs dominant.top1 small.top1 retrieval.image_to_text_R@1 retrieval.image_to_text_R@10 '
     'retrieval.text_to_image_R@1 retrieval.text_to_image_R@10'),
    (PHOTOGRAPHS, [''],
     'best_step last.image_to_text_R@10 last.text_to_image_R@10 student.image_to_text_R@10 '
     'student.text_to_image_R@10 retrieval.image_to_text_R@5 retrieval.text_to_image_R@5 '
     'retrieval.image_to_text_median_rank retrieval.text_to_image_median_rank cifar10.top1'),
    ('On the validation photographs', ['val'],
     'image_to_text_R@1 image_to_text_R@10 text_to_image_R@1 text_to_image_R@10'),
    ('Found by captions that do not describe the background', ['objects'],
     'image_to_text_R@1 image_to_text_R@10 text_to_image_R@1 text_to_image_R@10'),
    ('Bound', [''], 'bound.dominant_small bound.small_small'),
    ('Named in other company than in training', [*COMPANY], 'dominant.top1 small.top1'),
    ("Where C^I's peak lies, asked for an object's own name (own) or an absent one (absent), and a blind guess (area)",
     ['pointing.dominant', 'pointing.small'],
     'own_it own_other own_ground absent_it absent_other absent_ground area_it area_other area_ground'),
    ("C^I's peak, asked for an absent name of each of two colours", ['pointing.color'], 'asked other'),
    ("C^I's peak, asked with a whole caption", ['pointing.caption'], 'dominant small ground'),
    ('What the answer of C^I tells about the object that it is asked for, and about the others',
     ['handed.dominant', 'handed.small'], 'named_top1 other_top1 named_found other_found'),
    ('Cosines of two answers of C^I: to two names or two random queries about a scene, to one name about two scenes',
     ['handed.cosine'], 'names random scenes'),
    ('Conflict: what is picked', ['conflict.h_T', 'conflict.h_T_caption', 'conflict.h_I'],
     'own sentence read alone kept'),
    ("Losses of the last batch, as a share of a blind guess's", ['loss'],
     'clip h_I_cls_t h_I_eot_t h_T_cls_t h_T_eot_t cls_cls_t cls_eot_t eot_cls_t eot_eot_t'),
    ('Hand-made models that know little', ['areas', 'biggest', 'sums', 'products', 'likes'],
     'dominant.top1 small.top1 bound.dominant_small bound.small_small'),
    ('R@1 of a model that knows all colours, or all names', ['R@1'], 'colors names')]
INTRODUCTION = """# All results

`python -m lesson.plots` writes this page from `results.csv`. It begins with the differences; then
come the figures of each experiment, and at the end, folded, those that chose learning rates or that
only check a measure.

Figures are means, over as many runs as the number after × says, or over those of them that have the
figure. They are in percent, except for steps, ranks, minutes and thousands of pairs; cosines are
times 100. Losses are those of the last batch. The held-out scenes are the same in all runs, so ± is
over training scenes and seeds; for emoji and photographs it is over seeds alone.

## Differences

A difference is *decided* if it survives Holm's correction at 5 %, over all differences of its
experiment. So one that stands in two experiments may be decided in one of them only.
"""


def differences(experiment):
    """A table of what is compared in an experiment; '' if nothing is, or if its runs have not been made."""
    gaps, decided = family(experiment)
    rows = [['difference', 'of', 'points', 'decided']]
    for test, (gap, half) in gaps.items():
        name, other, column = test
        verdict = 'yes' if test in decided else 'undecided'
        rows.append([f'{name} - {other}', column, f'{gap:+.1f} ± {half:.1f}', verdict])
    return as_table(rows)


def tables(experiment):
    """All figures of an experiment."""
    text = ''
    for heading, prefixes, columns in SECTIONS:
        if heading == PHOTOGRAPHS and experiment not in photos.EXPERIMENTS:
            continue
        places = []
        for name in EXPERIMENTS[experiment]:
            for prefix in prefixes:
                places.append([experiment, name, *prefix.split()])
        found = table(columns.split(), places, variant_label)
        if found:
            text += f'\n{heading}\n\n{found}'
    return text


def is_folded(experiment):
    """Experiments that chose learning rates, or that only check a measure."""
    return 'tune' in experiment or experiment in ('worlds', 'batches-half')


def appendix():
    """RESULTS.md: what the rows of all experiments say."""
    text = INTRODUCTION
    for experiment in EXPERIMENTS:
        found = differences(experiment)
        if found:
            text += f'\n### {experiment}\n\n{found}'
    for experiment in EXPERIMENTS:
        if not is_folded(experiment):
            text += f'\n## {experiment}\n{tables(experiment)}'
    text += '\n## Learning rates, and checks of the measures\n'
    for experiment in EXPERIMENTS:
        if is_folded(experiment):
            text += f'\n<details><summary>{experiment}</summary>\n{tables(experiment)}\n</details>\n'
    return text


# --- 3. Pages --------------------------------------------------------------------------------------------------------

TABLE = re.compile(r'<!-- table: ([^|]*)\|([^>]*) -->\n((?:\|.*\n)*)')
# Code, in blocks and in lines, and the addresses of links: their numbers are not figures.
CODE = re.compile(r'(?ms)^```.*?^```|(?<=\n\n)(?: {4}[^\n]*\n?)+|`[^`]*`|\]\([^)]*\)')
PARAGRAPH = re.compile(r'(?:.+\n?)+')
SOURCES = re.compile(r'<!--([^<>]*)-->\s*$')
FIGURE = re.compile(r'[-+]?\d+\.\d+(?: ± \d+\.\d+)?')


def blanked(match):
    return re.sub('.', ' ', match[0])


def right_figure(figure, source):
    """What should stand in the text in place of `figure`."""
    if source == 'paper':
        return figure
    need(source.count('/') == 2, f'{source} is no source; give experiment/variant/column')
    experiment, name, column = source.split('/')
    if '~' not in name:
        return f'{mean(experiment, name, column):.1f}'
    gaps, _ = family(experiment)
    test = (*name.split('~'), column)
    need(test in gaps, f'{source} has no rows, or is not among the COMPARISONS of {experiment}')
    gap, half = gaps[test]
    return f'{gap:+.1f} ± {half:.1f}' if '±' in figure else f'{gap:+.1f}'


def right_figures(text):
    """The text of a page -> [(begin, end, what should stand there, its source)] for all figures and tables. Refused if
    a paragraph has more figures than sources, or fewer."""
    found = []
    for match in TABLE.finditer(text):
        places = [place.split('/') for place in match[2].split()]
        found.append((*match.span(3), table(match[1].split(), places, row_label), 'a table'))
    prose = CODE.sub(blanked, TABLE.sub(blanked, text))
    for paragraph in PARAGRAPH.finditer(prose):
        comment = SOURCES.search(paragraph[0])
        sources = comment[1].split() if comment else []
        end = paragraph.start() + comment.start() if comment else paragraph.end()
        figures = list(FIGURE.finditer(prose, paragraph.start(), end))
        words = ' '.join(figure[0] for figure in figures)
        need(len(figures) == len(sources), f'the paragraph "{text[paragraph.start():][:60]}..." has {len(figures)} '
             f'figures ({words}) and {len(sources)} sources; give one for each, in reading order')
        for figure, source in zip(figures, sources):
            found.append((*figure.span(), right_figure(figure[0], source), source))
    return sorted(found)


def changes(page):
    """-> [(begin, end, old, new, source)] for everything that differs from results.csv."""
    text = page.read_text()
    found = []
    for begin, end, new, source in right_figures(text):
        if text[begin:end] != new:
            found.append((begin, end, text[begin:end], new, source))
    return found


def fill(page, accept):
    """-> the text of a page with all figures and tables as results.csv has them. It prints what changes."""
    text = page.read_text()
    for begin, end, old, new, source in reversed(changes(page)):
        print(f'{page}: {old} becomes {new} ({source})')
        text = text[:begin] + new + text[end:]
        if source != 'a table':
            move = abs(float(new.split()[0]) - float(old.split()[0]))
            need(accept or move <= JUMP,
                 f'{page}: {old} would become {new} ({source}); if that is right, give --accept')
    return text


# --- 4. Pictures -----------------------------------------------------------------------------------------------------

PAINT = {
    'clip': '#0072b2', 'cosmos': '#d55e00', 'without-cross-attention': '#009e73', 'text-crop': '#777777',
    'another-pair': '#cc79a7', 'across': '#6a3d9a', 'plain': '#009e73', 'clip-aug': '#56b4e9'}
RED = 'tab:red'
MINE = []               # the rows of your own runs, with --mine


def show_runs(axis, experiment, name, column, x, color=None):
    """Draw runs as dots, their mean as a bar, and your own runs as stars -> the mean. color: if it is not the method's.
    """
    variant = EXPERIMENTS[experiment][name]
    runs = list(values(experiment, name, column).values())
    height = mean(experiment, name, column)
    mine = [row for row in MINE if row['run'] == variant.recipe() and column in row]
    stars = [in_unit(row, column) for row in mine]
    for shares, mark, size, alpha in (runs, 'o', 6, 0.4), ([height], '_', 18, 1), (stars, '*', 18, 1):
        axis.plot([x] * len(shares), shares, mark, color=color or PAINT[variant.method], markersize=size,
                  markeredgewidth=size / 9, alpha=alpha)
    return height


def show_name(axis, x, y, method, side='left'):
    words = photos.LABELS.get(method) or METHODS[method].label
    axis.text(x, y, words, color=PAINT[method], ha=side, va='center')


def show_log(axis, ticks, words):
    """Make the x axis logarithmic, and label it."""
    axis.set_xscale('log')
    axis.set_xticks(ticks, map(str, ticks))
    axis.set_xticks([], minor=True)
    axis.set_xlabel(words)


def show_names(axis, x, heights, apart):
    """Write the names of methods near their heights, but so far apart that they can be read."""
    names = {}
    height = -apart
    for method in sorted(heights, key=heights.get):
        height = max(heights[method], height + apart)
        names[method] = height
    # All names then move down by the mean rise, so that on average they stand where their heights are.
    rise = fmean(names.values()) - fmean(heights.values())
    for method, height in names.items():
        show_name(axis, x, height - rise, method)


def show_scale(axis, words, ticks, chance=CHANCE):
    """Label the axis with what is measured, and mark chance by a dotted line."""
    axis.axhline(chance, color='black', linestyle=':')
    axis.set_yticks([chance, *ticks], ['chance', *ticks])
    axis.set_ylabel(words)
    axis.spines[['top', 'right']].set_visible(False)


@lru_cache
def scene(world, split, number):
    """-> image, record"""
    (_, image), (_, record) = draw_scene(World(**WORLDS[world]), split, number)
    return Image.open(io.BytesIO(image)), json.loads(record)


def show_scene(axis, x, words, *which):
    """Draw a scene below the x axis, as the label of place x."""
    box = axis.inset_axes([x - 0.3, -0.36, 0.6, 0.32], transform=axis.get_xaxis_transform())
    image, _ = scene(*which)
    box.imshow(image)
    box.set(xticks=[], yticks=[], xlabel=words)


def draw_company(figure):
    """Page 2: a small object in three kinds of company, and how often it is named."""
    axis = figure.subplots()
    for x, (world, words) in enumerate(COMPANY.items()):
        for method, side, shift in ('clip', 'right', -0.1), ('cosmos', 'left', 0.1):
            height = show_runs(axis, 'company', f'{method}-{world}', 'small.top1', x + shift)
            if world == 'alone':
                show_name(axis, x + 2 * shift, height, method, side)
        show_scene(axis, x, words.replace('\n', ' '), world, 'val', 17)
    show_scale(axis, 'small object named, %', (40, 60, 80, 100))
    axis.set(xlim=(-0.5, 2.5), ylim=(0, 103), xticks=[])


ARROWS = [  # over the square: what may fall along it, begin, end, middle of the word, its angle
    ('drowned?', (-0.4, -0.66), (2.4, -0.66), (1, -0.84), 0),
    ('learnt less?', (-0.66, -0.4), (-0.66, 2.4), (-0.84, 1), 90),
    ('', (0.25, 0.25), (0.75, 0.75), (0, 0), 0),
    ('', (1.25, 1.25), (1.75, 1.75), (0, 0), 0)]


def draw_square(figure):
    """Page 2: a square for each method; rows are where it trained, columns where it is tested."""
    arrow = {'arrowstyle': '->', 'color': RED, 'lw': 2}
    for axis, method in zip(figure.subplots(1, 2), ('clip', 'cosmos')):
        square = np.zeros((3, 3))
        for y, trained in enumerate(COMPANY):
            for x, tested in enumerate(COMPANY):
                square[y, x] = mean('company', f'{method}-{trained}', f'{tested}.small.top1')
                axis.text(x, y, f'{square[y, x]:.0f}', ha='center', va='center', fontsize=15)
        axis.imshow(square, vmin=0, vmax=150, cmap='Greys')
        for words, begin, end, middle, angle in ARROWS:
            axis.annotate('', end, begin, arrowprops=arrow, annotation_clip=False)
            axis.text(*middle, words, color=RED, rotation=angle, ha='center', va='center')
        axis.set_xticks(range(3), COMPANY.values(), fontsize=10)
        axis.set_yticks(range(3), COMPANY.values())
        axis.tick_params('y', pad=36)
        axis.set(xlabel='tested', ylabel='trained')
        axis.set_title(METHODS[method].label, pad=36)


BATCHES = {  # numbers of training scenes; those of `sorted` all have the same two colours
    'mixed': (8, 9, 10, 11, 12, 13, 14, 15),
    'sorted': (5, 11, 38, 80, 140, 152, 305, 354)}


def draw_batches(figure):
    """Page 3: eight scenes of a batch, mixed and sorted by colour; beside them both halves of the guess."""
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.25])
    named_axis, found_axis = right.subplots(2)
    for x, (kind, batch), row in zip((0, 1), BATCHES.items(), left.subplots(2)):
        images = []
        colors = set()
        for number in batch:
            image, record = scene('equal-16', 'train', number)
            images.append(np.pad(image, [(4, 4), (4, 4), (0, 0)], constant_values=255))
            words = ' '.join(thing['name'] for thing in record['objects']).split()
            colors.add(' '.join(sorted(words[::2])))
        row.imshow(np.vstack([np.hstack(images[:4]), np.hstack(images[4:])]))
        row.set_axis_off()
        # among captions with equal colours, a model that knows only colours finds one
        row.set_title(f'{kind}: colours alone\nfind {len(colors)} of 8 captions')
        for method, shift, side in ('clip', -0.12, 'right'), ('cosmos', 0.12, 'left'):
            name = f'{method}-16-{kind}'
            height = show_runs(named_axis, 'batches', name, 'small.top1', x + shift)
            show_runs(found_axis, 'batches', name, 'retrieval.image_to_text_R@1', x + shift)
            if kind == 'sorted':
                show_name(named_axis, x + 2 * shift, height, method, side)
    colors_alone = mean('worlds', 'equal-16', 'R@1.colors')
    show_scale(named_axis, 'shapes\nnamed, %', [30])
    show_scale(found_axis, 'captions\nfound, %', [], chance=colors_alone)
    found_axis.set_yticks([0, colors_alone], ['0', 'colours\nalone'])
    for axis, top in (named_axis, 33), (found_axis, 18):
        axis.set_xticks((0, 1), BATCHES)
        axis.set(xlim=(-0.5, 2.0), ylim=(0, top))


KINDS = {'short': 'half the\nsteps', 'half': 'sharing', 'mixed': 'mixed'}
SAME_SHAPES = [         # of page 3: method, world, words
    ('clip', 'built-in', 'CLIP'), ('cosmos', 'built-in', 'COSMOS')]
OTHER_SHAPES = [
    ('clip', 'big', 'big and small ones have\nthe same shapes'),
    ('clip', 'apart', 'big ones have\nother shapes')]


def draw_sharing(groups, figure):
    """Page 3: small objects named after mixed batches, after batches of which half share the big object, and after half
    of the steps."""
    axis = figure.subplots()
    places = []
    for x, (method, world, words) in enumerate(groups):
        for kind, shift in zip(KINDS, (-0.28, 0, 0.28)):
            show_runs(axis, 'same-big', f'{method}-{world}-{kind}', 'small.top1', x + shift)
            places.append(x + shift)
        axis.text(x, 88, words, color=PAINT[method], ha='center', va='center', fontsize=12)
    show_scale(axis, 'small objects named, %', (40, 60, 80))
    axis.set_xticks(places, list(KINDS.values()) * len(groups), fontsize=11)
    axis.set(xlim=(-0.5, len(groups) - 0.5), ylim=(0, 97))


def draw_race(figure):
    """Page 4: small objects named, over pairs on the left and over minutes on the right; a dot is a whole run."""
    over_pairs, over_minutes = figure.subplots(1, 2, sharey=True, width_ratios=[1, 1.5])
    ends = {}
    for method, shift in ('clip', 0.85), ('text-crop', 1), ('without-cross-attention', 1), ('cosmos', 1.17):
        for axis, column, first in (over_pairs, 'pairs', 'pairs'), (over_minutes, 'seconds', 'minutes'):
            shown = [first, 'longer']
            if method == 'clip':        # whose `pairs` and `minutes` differ most: both panels show both
                shown = ['pairs', 'minutes', 'longer']
            for experiment in shown:
                x = shift * mean(experiment, method, column)                    # dots keep apart
                height = show_runs(axis, experiment, method, 'small.top1', x)
                if experiment == 'longer':
                    ends[method] = height
    show_names(over_minutes, 17, ends, 8)
    scales = ((over_pairs, (32, 120, 370), 'thousand pairs seen'),
              (over_minutes, (1.2, 4, 12), 'minutes of training'))
    for axis, ticks, words in scales:
        show_scale(axis, 'small objects named, %', (40, 60, 80, 100))
        show_log(axis, ticks, words)
    over_pairs.set(xlim=(20, 520), ylim=(0, 103))
    over_minutes.set(xlim=(0.8, 200), ylabel='')


SIDE_BY_SIDE = {        # of page 4: the upper end of the scale, ticks, {method: its experiments}
    'drawn scenes': (60, (1.2, 4), {
        'clip': ('pairs', 'minutes'), 'without-cross-attention': ('minutes',), 'cosmos': ('minutes',)}),
    'photographs': (20, (4, 12), {
        'clip': ('photo-pairs', 'photo-minutes'), 'clip-aug': ('photo-pairs', 'photo-minutes'),
        'plain': ('photo-minutes',), 'cosmos': ('photo-minutes',)})}
SHIFT = {'clip': 0.92, 'clip-aug': 0.9, 'plain': 1, 'without-cross-attention': 1.04, 'cosmos': 1.15}


def draw_photographs(figure):
    """Page 4: images found over minutes, on drawn scenes and on photographs; a dot is a whole run."""
    axes = figure.subplots(1, 2, width_ratios=[1, 1.9])
    for axis, (words, (top, ticks, shown)) in zip(axes, SIDE_BY_SIDE.items()):
        ends = {}
        for method, experiments_shown in shown.items():
            for experiment in experiments_shown:
                x = SHIFT[method] * mean(experiment, method, 'seconds')         # dots keep apart
                ends[method] = show_runs(axis, experiment, method, 'retrieval.text_to_image_R@10', x)
        show_scale(axis, 'image in the first ten, %', [top // 2, top], chance=1)
        show_log(axis, ticks, 'minutes of training')
        axis.set_title(words, loc='left')
        axis.set(xlim=(0.6 * ticks[0], 2 * ticks[1]), ylim=(0, top))
    show_names(axis, 22, ends, top / 11)
    axis.set(xlim=(2.4, 330), ylabel='')


def draw_pointing(figure):
    """Page 5: where the highest weight of C^I lies when it is asked for a colour, and how alike its answers are."""
    left, right = figure.subplots(1, 2)
    for x, what in enumerate(('asked', 'other')):
        show_runs(left, 'reading', 'cosmos', f'pointing.color.{what}', x)
    left.set_xticks(
        range(2), ('an object of the\ncolour it is asked for', 'an object of\nanother colour'), fontsize=11)
    left.set(ylim=(0, 100), xlim=(-0.5, 1.5), ylabel='C^I looks at, %')
    for x, what in enumerate(('names', 'random', 'scenes')):
        show_runs(right, 'same-big', 'cosmos-built-in-mixed', f'handed.cosine.{what}', x)
    right.set_xticks(
        range(3), ('two names,\none scene', 'two random\nqueries,\none scene', 'one name,\ntwo scenes'), fontsize=11)
    right.set_yticks((0, 50, 100), ('0', '0.5', '1'))
    right.set(ylim=(0, 103), xlim=(-0.5, 2.5), ylabel='cosine of two answers of C^I')
    for axis in left, right:
        axis.spines[['top', 'right']].set_visible(False)


CELLS = [               # of the 2 x 2: x, y, the term of COSMOS, the same term where nothing is read, is there a leak?
    (0, 0, 'h_I_cls_t', 'cls_cls_t', False),
    (1, 0, 'h_I_eot_t', 'cls_eot_t', True),
    (0, 1, 'h_T_cls_t', 'eot_cls_t', True),
    (1, 1, 'h_T_eot_t', 'eot_eot_t', False)]


def draw_leak(figure):
    """Page 5: who has read what, and what it must find; how far reading lowers each of the four losses."""
    from matplotlib.patches import Rectangle
    axis = figure.subplots()
    for x, y, term, plain_term, leaks in CELLS:
        before = mean('reading', 'without-cross-attention', f'loss.{plain_term}')
        after = mean('reading', 'cosmos', f'loss.{term}')
        ink = RED if leaks else '#555555'
        frame = Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, fill=False, edgecolor=ink,
                          linewidth=3 if leaks else 1, linestyle='--' if leaks else '-')
        axis.add_patch(frame)
        axis.text(x, y - 0.12, f'{before:.0f} → {after:.0f}', ha='center', va='center', fontsize=19, color=ink)
        words = 'a copy is enough' if leaks else 'a copy is not enough'
        axis.text(x, y + 0.24, words, ha='center', va='center', fontsize=11, color=ink)
    axis.set_xticks((0, 1), ("cls_t,\nthe teacher's image", "eot_t,\nthe teacher's caption"))
    axis.set_yticks(
        (0, 1), ('h_I, a view\nthat has read\nthe caption', 'h_T, a sentence\nthat has read\nthe image'))
    axis.set(xlim=(-0.5, 1.5), ylim=(1.5, -0.5),
             xlabel='loss, in % of guessing:\nwithout cross-attention → COSMOS')
    axis.set_title('must find', fontsize=13)
    axis.tick_params(length=0)
    axis.tick_params('x', labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)


READERS = {
    'cosmos': 'its own\npair', 'another-pair': 'another\npair', 'without-cross-attention': 'nothing'}
# Of page 5: the image that h_T has read, and its caption's.
PICKED = {'read': RED, 'sentence': '#333333'}


def draw_reading(figure):
    """Page 5: h_T of one caption has read another pair's image. Which of the two images does it pick? And how much is
    named after the same training?"""
    left, right = figure.subplots(1, 2)
    for x, method in enumerate(READERS):
        show_runs(right, 'reading', method, 'small.top1', x)
    for x, method in enumerate(('cosmos', 'another-pair')):             # the third reads nothing
        for (what, color), shift in zip(PICKED.items(), (-0.15, 0.15)):
            show_runs(left, 'reading', method, f'conflict.h_T_caption.{what}', x + shift, color)
    left.text(0.1, 80, 'the image\nthat it has read', color=PICKED['read'], va='center', fontsize=11)
    left.text(0.42, 57, "its caption's\nimage", color=PICKED['sentence'], va='center', fontsize=11)
    show_scale(left, 'h_T picks, %', (25, 50, 75, 100), chance=100 / 32)
    show_scale(right, 'small objects named, %', (0, 30, 40, 50))
    left.set(ylim=(-3, 103))
    right.set(ylim=(0, 52))
    for axis in left, right:
        axis.set_xticks(range(len(READERS)), READERS.values(), fontsize=10)
        axis.set(xlim=(-0.5, 2.5), xlabel='what is read in training')
    left.set_xlim(-0.5, 1.5)


PICTURES = {            # how it is drawn, inches
    'company': (draw_company, (6, 4)),
    'square': (draw_square, (7.6, 4)),
    'batches': (draw_batches, (7, 4)),
    'same-big': (partial(draw_sharing, SAME_SHAPES), (6.4, 3.6)),
    'apart': (partial(draw_sharing, OTHER_SHAPES), (6.4, 3.6)),
    'race': (draw_race, (8.4, 3.8)),
    'photographs': (draw_photographs, (8.8, 3.8)),
    'pointing': (draw_pointing, (8.4, 3.4)),
    'leak': (draw_leak, (6.4, 4)),
    'reading': (draw_reading, (8.6, 4))}


def digest():
    """A digest of the rows. It travels in each picture, for --check. A change of this file goes unnoticed."""
    return hashlib.sha1(RESULTS.read_bytes()).hexdigest()


def draw(name, path):
    from matplotlib import pyplot
    function, inches = PICTURES[name]
    with pyplot.rc_context({'font.size': 13}):
        figure = pyplot.figure(figsize=inches, layout='constrained')
        function(figure)
        figure.savefig(path, dpi=120, metadata={'Description': digest()})
    pyplot.close(figure)
    print(path)


# --- 5. The command --------------------------------------------------------------------------------------------------

REMEDY = 'run python -m lesson.plots'


def check_pages():
    """Refuses a text, a table or a picture that does not agree with the rows."""
    for page in PAGES:
        for _, _, old, new, source in changes(page):
            raise Refused(f'{page} has "{old}", and results.csv "{new}" ({source}); {REMEDY}')
    need(APPENDIX.read_text() == appendix(), f'{APPENDIX} was written from other rows; {REMEDY}')
    for name in PICTURES:
        description = Image.open(PICTURE.format(name)).text.get('Description')
        need(description == digest(), f'the picture {name} was drawn from other rows; {REMEDY}')
    for path, svg in picture.drawn_steps().items():
        drawn = picture.without_pixels(Path(path).read_text())
        need(drawn == picture.without_pixels(svg), f'{path} is not what lesson/picture.py draws; {REMEDY}')


def check_runs():
    """Refuses runs that are missing, or that cannot be compared."""
    rows = read_results()
    for experiment, variants in EXPERIMENTS.items():
        module = 'photos' if experiment in photos.EXPERIMENTS else 'experiments'
        missing = missing_runs(variants)
        need(not missing,
             f'{experiment} lacks {len(missing)} runs; make them by python -m lesson.{module} {experiment}')
        origins = set()
        for variant in variants.values():
            for seed in variant.seeds:
                row = rows[variant.recipe(), seed]
                commit = 'equal' if row['commit'] in EQUAL_COMMITS else row['commit']
                origins.add((commit, row['machine'], row['precision']))
        need(len(origins) == 1, f'{experiment} has runs of several origins: {origins}; remove their rows from '
             'results.csv, and make the runs again, on one machine and at one commit')


def main():
    parser = Parser(prog='python -m lesson.plots', epilog=__doc__)
    parser.add_argument('--check', action='store_true', help='only compare with results.csv')
    parser.add_argument('--accept', action='store_true',
                        help='figures of the text may move by more than 5 points')
    parser.add_argument('--mine', action='store_true', help='pictures with your own runs as stars')
    args = parser.parse_args()
    if args.check:
        check_pages()
        check_runs()
        return
    path = PICTURE
    if args.mine:
        MINE.extend(map(read_json, Path('runs').glob('*/*/row.json')))
        need(MINE, 'runs/lesson and runs/photos have no run of yours; the commands of the pages make some')
        path = 'runs/lesson/{}.png'
    else:
        # Both are filled in before one is written.
        texts = [fill(page, args.accept) for page in PAGES]
        for page, text in zip(PAGES, texts):
            page.write_text(text)
        APPENDIX.write_text(appendix())
        for file, svg in picture.drawn_steps().items():
            Path(file).write_text(svg)
    for name in PICTURES:
        draw(name, path.format(name))


if __name__ == '__main__':
    command(main)
