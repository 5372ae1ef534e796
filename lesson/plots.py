"""Figures and pictures of the course, from lesson/results.csv alone.

    python -m lesson.plots              write them: into the two README.md and assets/lesson-*.png
    python -m lesson.plots --check      are the runs complete, and does all of that agree with them?
    python -m lesson.plots --look       before: what single runs see in single scenes, into lesson/looks.json

In README.md and lesson/README.md a figure is followed by the place it comes from, that of a difference names two
variants:

    94.8<!--minutes/cosmos/small.top1-->    +5.3 ± 2.1<!--minutes/cosmos~clip/small.top1-->

Shares are in percent, `seconds` in minutes, `pairs` in thousands. A difference is the mean of those within the seeds,
with its 95 % interval (Student's t): all runs of a seed have the same training scenes. The differences of a page are
one family (Holm): what does not survive at 5 % has "(open)" behind it.
"""
import hashlib
import math
import re
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from PIL import Image

from eval import load, shard_image
from extras.attend import attention
from lesson import suppression
from lesson.experiments import (COMPANY, EXPERIMENTS, METHODS, RESULTS, missing_runs, read_results, recipe,
                                run_folder, scene_folder)
from plumbing.errors import Parser, command, need, read_json, write_json
from plumbing.shards import Shards

PAGES = [Path('README.md'), Path('lesson/README.md')]
LOOKS = Path('lesson/looks.json')
PICTURE = 'assets/lesson-{}.png'
UNITS = {'pairs': 1e-3, 'seconds': 1 / 60}      # of others 100: percent
CHANCE = 100 / 6                        # of naming a shape, in percent
LEVEL = 0.05

# --- 1. Figures ------------------------------------------------------------------------------------------------------

def values(experiment, name, column):
    """-> {seed: value}, in its unit, of the seeds of this experiment: another one may have tuned on others."""
    variant = EXPERIMENTS[experiment][name]
    factor = UNITS.get(column, 100)
    rows = read_results()
    found = {}
    for seed in variant.seeds:
        row = rows.get((recipe(variant), seed), {})
        if row.get(column):
            found[seed] = factor * float(row[column])
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
    """name minus other, seed by seed: the runs of a seed have the same training scenes, and rise and fall together
    -> the mean, half of its 95 % interval, the chance of such a mean between equals."""
    a = values(experiment, name, column)
    b = values(experiment, other, column)
    gaps = [a[seed] - b[seed] for seed in a if seed in b]
    need(len(gaps) > 1, f'{experiment} has no two seeds with {column} of {name} and {other}')
    gap = fmean(gaps)
    error = stdev(gaps) / math.sqrt(len(gaps))
    t, chance = student_t(len(gaps) - 1)
    half = error * np.interp(-LEVEL, -chance, t)        # with a minus, for interp wants what rises
    by_chance = np.interp(abs(gap) / error, t, chance)
    return gap, half, by_chance


def holm(chances):
    """{test: chance} -> the tests that survive. The least must be below LEVEL / n, the next below LEVEL / (n - 1), ..."""
    survived = set()
    for k, test in enumerate(sorted(chances, key=chances.get)):
        if chances[test] > LEVEL / (len(chances) - k):
            break
        survived.add(test)
    return survived


MARK = r'[-+.\d]+(?: ± [.\d]+)?(?: \(open\))?(?=<!--([\w-]+)/([^\s/~]+)(?:~(\S+?))?/(\S+)-->)'


def filled(text):
    """The text of a page with all figures as results.csv has them. A heading begins a family of differences."""
    parts = re.split(r'(?m)^(?=## )', text)
    return ''.join(map(filled_part, parts))


def filled_part(part):
    figures = {}
    chances = {}
    for place in re.findall(MARK, part):
        experiment, name, other, column = place
        if other:
            gap, half, chances[place] = difference(*place)
            figures[place] = f'{gap:+.1f} ± {half:.1f}'
        else:
            figures[place] = f'{mean(experiment, name, column):.1f}'
    for place in chances.keys() - holm(chances):
        figures[place] += ' (open)'
    return re.sub(MARK, lambda match: figures[match.groups('')], part)


# --- 2. Looks: single runs, single scenes ----------------------------------------------------------------------------

SCENE = 0               # of the first picture
SCENES = 6              # of the maps: the first ones


def scored_run(variant):
    """Of seed 0 -> what eval.load returns, and its held-out scenes."""
    return load(run_folder(variant, 0)), held_out(variant.world)


def name_bars(variant):
    """The small object of a scene: how much the scene raises each of its six names, in deviations over all scenes."""
    scored, shards = scored_run(variant)
    scores = suppression.scores_of(shards, *scored)
    raised = (scores - scores.mean(dim=0)) / scores.std(dim=0)
    thing = suppression.read_scenes(shards)[SCENE][-1]
    bars = {}
    for name in [thing.name, *thing.absent]:
        bars[name] = raised[SCENE, suppression.COLUMN[name]].item()
    return bars


def attention_maps(variant):
    """Of the first scenes -> [{asked: weights of C^I over the patches, scaled to [0, 1]}]: a big object, a small one, an
    absent one."""
    scored, shards = scored_run(variant)
    found = []
    for pair, (big, small, *_) in enumerate(suppression.read_scenes(shards)[:SCENES]):
        image = shard_image(shards, pair)
        maps = {}
        for name in (big.name, small.name, small.absent[0]):
            grid, _ = attention(*scored, image, suppression.question(name))
            maps[name] = grid.tolist()
        found.append(maps)
    return found


def look():
    """Write LOOKS, from checkpoints in runs/lesson."""
    bars = {}
    for name, variant in EXPERIMENTS['company'].items():
        bars[name] = name_bars(variant)
    maps = attention_maps(EXPERIMENTS['reading']['cosmos'])
    write_json(LOOKS, {'bars': bars, 'maps': maps})


# --- 3. Pictures -----------------------------------------------------------------------------------------------------

PAINT = {
    'clip': 'tab:blue', 'text-crop': 'tab:gray', 'without-cross-attention': 'tab:green', 'cosmos': 'tab:orange'}


def held_out(world):
    return Shards(scene_folder(world, 0) / 'val')


def draw_suppression(figure):
    """Page 1: a scene in each company, and below it the bars of the six names by each method."""
    looks = read_json(LOOKS)['bars']
    axes = figure.subplots(3, len(COMPANY), height_ratios=[1.3, 1, 1])
    for column, world in zip(axes.T, COMPANY):
        column[0].imshow(shard_image(held_out(world), SCENE))
        column[0].axis('off')
        column[0].set_title(COMPANY[world])
        for axis, method in zip(column[1:], ('clip', 'cosmos')):
            bars = looks[f'{method}-{world}']
            colors = ['tab:red'] + ['0.7'] * (len(bars) - 1)
            axis.barh(list(bars), list(bars.values()), color=colors)
            axis.invert_yaxis()
            axis.axvline(0, color='black', linewidth=0.8)
            axis.set_xlim(-3, 3)
            axis.set_title(f'{METHODS[method].label}, trained on such scenes', fontsize=9)
        column[2].set_xlabel('how much this scene raises the\nname, in standard deviations', fontsize=9)
    for axis in axes[1:, 1:].flat:
        axis.set_yticklabels([])


def draw_batches(figure):
    """Page 2: R@1 across, shapes named up; a line a method, from batches as they come to batches of equal colours."""
    axes = figure.subplots(1, 2, sharey=True)
    columns = 'retrieval.image_to_text_R@1', 'small.top1'
    for axis, colors in zip(axes, (4, 16)):
        for method in 'clip', 'cosmos':
            paint = PAINT[method]
            means = {}
            for kind, mark in ('mixed', 'o'), ('half', '^'), ('sorted', 'x'):
                name = f'{method}-{colors}-{kind}'
                if name in EXPERIMENTS['batches']:
                    x, y = [values('batches', name, column).values() for column in columns]
                    axis.plot(x, y, mark, color=paint, markersize=5, alpha=0.5)         # a point a run
                    means[kind] = [mean('batches', name, column) for column in columns]
            arrow = {'arrowstyle': '->', 'linewidth': 2, 'color': paint}
            axis.annotate('', means['sorted'], means['mixed'], arrowprops=arrow)
            axis.plot([], color=paint, label=METHODS[method].label)
        axis.axhline(CHANCE, color='grey', linestyle='--', label='chance of naming')
        axis.set_title(f'{colors} colours')
        axis.set_xlabel('R@1, image to text, %')
        axis.set_xlim(-0.5, 17)
        axis.set_ylim(10, 50)
    axes[0].set_ylabel('objects named, %')
    axes[1].legend(fontsize=9)


def draw_company(figure):
    """Page 3: a square a method: trained down, tested across."""
    axes = figure.subplots(1, 2)
    for axis, method in zip(axes, ('clip', 'cosmos')):
        square = []
        for trained in COMPANY:
            square.append([mean('company', f'{method}-{trained}', f'{tested}.small.top1') for tested in COMPANY])
        axis.imshow(square, vmin=CHANCE, vmax=100, cmap='Greens')
        for y, x in np.ndindex(3, 3):
            color = 'white' if square[y][x] > 70 else 'black'
            axis.text(x, y, f'{square[y][x]:.0f}', color=color, ha='center', va='center', fontsize=14)
        axis.set_xticks(range(3), COMPANY.values(), fontsize=9)
        axis.set_yticks(range(3), COMPANY.values(), fontsize=9)
        axis.set_xlabel('tested')
        axis.set_ylabel('trained')
        axis.set_title(f'{METHODS[method].label}: small objects\nnamed, % (chance 17)', fontsize=11)


TRACKS = {'pairs': 'same pairs', 'minutes': 'same minutes', 'longer': 'three times\nthe minutes'}


def draw_race(figure):
    """Pages 4 and 6: tracks across, objects named up; a line a method, a point a run."""
    axes = figure.subplots(1, 2, sharey=True)
    titles = {'dominant.top1': 'Big objects', 'small.top1': 'Small objects'}
    for axis, column in zip(axes, titles):
        for number, (name, color) in enumerate(PAINT.items()):
            means = []
            for place, track in enumerate(TRACKS):
                top1 = values(track, name, column).values()
                x = place + 0.05 * number               # beside those of other methods
                axis.plot([x] * len(top1), top1, '.', color=color, alpha=0.4)
                means.append((x, fmean(top1)))
            axis.plot(*zip(*means), color=color, label=METHODS[name].label)
        axis.axhline(CHANCE, color='grey', linestyle='--', label='chance')
        axis.set_title(f'{titles[column]} named, %')
        axis.set_xticks(range(len(TRACKS)), TRACKS.values())
        axis.set_ylim(0, 103)
    axes[1].legend(fontsize=9, loc='upper left')


def draw_maps(figure):
    """Page 5: six scenes, and the weights of C^I, asked for the big object, a small one, an absent name: what it does not
    look at is dark."""
    axes = figure.subplots(4, SCENES)
    for pair, (column, maps) in enumerate(zip(axes.T, read_json(LOOKS)['maps'])):
        scene = np.array(shard_image(held_out('built-in'), pair))
        column[0].imshow(scene)
        for axis, (name, rows) in zip(column[1:], maps.items()):
            grid = np.array(rows)
            p = len(scene) // len(grid)                 # side of a patch
            light = 0.3 + 0.7 * np.kron(grid, np.ones((p, p)))
            axis.imshow(np.uint8(light[:, :, None] * scene))
            y, x = np.unravel_index(grid.argmax(), grid.shape)
            axis.plot((x + 0.5) * p, (y + 0.5) * p, 'ws', fillstyle='none', markersize=14)
            color, _ = name.split()
            axis.set_title(name, color=color, fontsize=9, pad=2)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for axis, label in zip(axes[:, 0], ('scene', 'the big one', 'a small one', 'absent')):
        axis.set_ylabel(label)


PICTURES = {            # how it is drawn, inches
    'suppression': (draw_suppression, (9, 7.5)),
    'batches': (draw_batches, (9, 3)),
    'company': (draw_company, (7.5, 4)),
    'race': (draw_race, (9, 3.4)),
    'maps': (draw_maps, (9, 6.4))}


def source():
    """A digest of all that pictures show. It travels in each, for --check."""
    return hashlib.sha1((RESULTS.read_text() + LOOKS.read_text()).encode()).hexdigest()


def draw(name):
    from matplotlib import pyplot
    function, inches = PICTURES[name]
    figure = pyplot.figure(figsize=inches, layout='constrained')
    function(figure)
    figure.savefig(PICTURE.format(name), dpi=80, metadata={'Description': source()})
    pyplot.close(figure)


# --- 4. The command --------------------------------------------------------------------------------------------------

def check():
    """Refused: runs that are missing or cannot be compared, a text or a picture that does not agree with the rows."""
    rows = read_results()
    for experiment, variants in EXPERIMENTS.items():
        missing = missing_runs(experiment)
        need(not missing,
             f'{experiment} lacks {len(missing)} runs; make them by python -m lesson.experiments {experiment}')
        origins = set()
        for variant in variants.values():
            for seed in variant.seeds:
                row = rows[recipe(variant), seed]
                origins.add((row['commit'], row['machine'], row['precision']))
        need(len(origins) == 1, f'{experiment} has runs of several origins: {origins}; remove their rows from '
             'results.csv, and make the runs anew at one')
    for page in PAGES:
        lines = page.read_text().splitlines()
        for line, right in zip(lines, filled(page.read_text()).splitlines()):
            need(line == right, f'{page} has "{line}", and results.csv "{right}"; run python -m lesson.plots')
    for name in PICTURES:
        description = Image.open(PICTURE.format(name)).text.get('Description')
        need(description == source(), f'the picture {name} was drawn from other rows; run python -m lesson.plots')


def main():
    parser = Parser(epilog=__doc__)
    parser.add_argument('--check', action='store_true', help='only compare with results.csv')
    parser.add_argument('--look', action='store_true', help='only look at single runs again')
    args = parser.parse_args()
    if args.check:
        check()
    elif args.look:
        look()
    else:
        texts = [filled(page.read_text()) for page in PAGES]            # both, before one is written
        for page, text in zip(PAGES, texts):
            page.write_text(text)
        for name in PICTURES:
            draw(name)


if __name__ == '__main__':
    command(main)
