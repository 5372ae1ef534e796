"""Turn data from elsewhere into shards.

    python -m extras.prepare pack rows.csv images/ shards --val 0.1   a tenth held out: shards/train and shards/val
    python -m extras.prepare pack rows.jsonl images/ shards           nothing held out; JSON, TSV, COCO's lists, too
    python -m extras.prepare pack dataset_flickr8k.json Images shards Karpathy's list says what is held out
    python -m extras.prepare join dreamlip.csv /shards /joined        DreamLIP's captions onto img2dataset's shards

The output folder must be a new one, and it appears only when it is whole. If `join` was interrupted, the same command
goes on where it stopped; `pack` starts again.
"""
import csv
import json
import os
import random
import sqlite3
import sys
from collections import Counter, defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from eval import progress_bar
from plumbing.captions import DREAMLIP, sentences
from plumbing.errors import Refused, command, need
from plumbing.files import read_json, reading, write_json
from plumbing.images import open_image, pillow_errors, load_image
from plumbing.tables import read_list, table_rows
from plumbing.options import Parser, positive, share
from plumbing.shards import Shards, write_shard

URL_COLUMNS = 'url', 'image_url', 'image path', 'image_path'    # in any case; DreamLIP's CSV: Image Path
HALVES = {'train': 'train', 'restval': 'train', 'val': 'val'}  # Karpathy's other splits stay out
NAMED = 10              # how many unusable images are named: the first few show what is wrong with all
KINDS = {'JPEG': 'jpg', 'MPO': 'jpg', 'PNG': 'png', 'WEBP': 'webp'}  # MPO: JPEGs from some phones

# --- 1. A table and a folder of images -------------------------------------------------------------------------------

def name_left_out(problems):
    """Name the first ten images that cannot be used, and count the others."""
    for problem in problems[:NAMED]:
        print(f'left out   {problem}', file=sys.stderr)
    if len(problems) > NAMED:
        print(f'left out   {len(problems) - NAMED} more', file=sys.stderr)


def image_kind(image):
    """Encoded bytes -> the extension that they get in a shard. An image that shards cannot hold is Refused."""
    with pillow_errors('its image'):
        kind = open_image(image).format
    need(kind in KINDS, f'{kind} is not a kind of image that shards can hold; save it as JPEG, PNG or WebP')
    return KINDS[kind]


def pack(rows, images, out, size=5000, val=0.0, image_column='image', caption_column='caption'):
    """A table or a published list, and a folder of images -> shards of up to `size` images in `out`, a new folder.

    val: as --val. An image's name alone decides where it goes; Karpathy's list says so itself. Image bytes are copied
    as they are. The json of a pair has the name of its image as `file`, and its captions as `caption`. An image that is
    missing or broken, or has no caption, is left out.
    """
    out = Path(out)
    need(not out.exists(), f'{out} exists; name a new folder, or remove that one')
    sides = divide(read_list(rows, image_column, caption_column), rows, out, val)
    problems = []
    out.parent.mkdir(parents=True, exist_ok=True)
    # The folder is written under another name, because training on half of it would go unnoticed.
    with TemporaryDirectory(prefix=f'{out.name}.', suffix='.partial', dir=out.parent) as folder:
        whole = Path(folder, out.name)
        for half, side in sorted(sides.items()):                            # train first
            before = len(problems)
            for number, start in enumerate(range(0, len(side), size)):
                path = whole / half / f'{number:05d}.tar'
                write_shard(path, packed(side[start:start + size], images, number, problems))
            found = len(side) - (len(problems) - before)
            print(f'{out / half} holds {found:,} of the {len(side):,} images listed')
        name_left_out(problems)
        listed = sum(map(len, sides.values()))
        need(len(problems) < listed, f'none of the {listed} images could be packed; are they in {images}?')
        whole.rename(out)


def divide(listed, rows, out, val):
    """Which images go into which folder in `out` -> {folder: [(name, captions), ...]}."""
    splits = Counter(image.split for image in listed.values() if image.split)
    need(not (val and splits), f'{rows} already says which images are held out; leave out --val')
    sides = defaultdict(list)
    for name, image in listed.items():
        if splits:
            half = HALVES.get(image.split)
        elif val:
            half = 'val' if random.Random(name).random() < val else 'train'
        else:
            half = ''
        if half is not None:
            sides[half].append((name, image.captions))
    need(not val or len(sides) == 2, f'--val {val} of {len(listed)} images leaves {out}/train or {out}/val empty; give '
         'another share')
    if splits:
        counts = ', '.join(f'{n:,} {split}' for split, n in splits.items())
        print(f'splits     {counts}; train and restval go to {out}/train, val to {out}/val')
    return sides


def packed(side, images, number, problems):
    """Yields (name, bytes) of the members of a shard. If an image is left out, the reason goes into `problems`."""
    for i, (name, captions) in enumerate(progress_bar(side, 'packing')):
        try:
            image = Path(images, name).read_bytes()
            load_image(image)
            need(captions, 'it has no caption')
            kind = image_kind(image)
        except (OSError, Refused) as error:
            problems.append(f'{name}: {error}')
            continue
        key = f'{number:05d}{i:05d}'
        yield f'{key}.{kind}', image
        yield f'{key}.json', json.dumps({'file': name, 'caption': captions}).encode()


# --- 2. DreamLIP's captions onto img2dataset's shards ----------------------------------------------------------------

def read_captions(table):
    """DreamLIP's CSV -> a database with the captions of each URL. The first row of a URL that has captions counts. Rows
    that are not used are counted, and said."""
    csv.field_size_limit(1 << 24)       # Python's own limit of 131,072 characters may be too low
    database = sqlite3.connect('')      # a temporary file: the table may be larger than memory
    database.execute('create table captions (url primary key, record)')
    key_of = {key.lower(): key for key in DREAMLIP}
    used = set()                        # columns
    without = Counter()
    with reading(table), open(table, encoding='utf-8-sig', newline='') as file:
        for row in progress_bar(table_rows(file, table), 'reading the table'):
            url = (row[url_column(row, table)] or '').strip()
            record = {}
            for name, text in row.items():
                key = key_of.get(name.lower())
                if key and sentences(text):
                    record[key] = text
                    used.add(name)
            if not url:
                without['a URL'] += 1
            elif None in row.values():
                without['as many fields as the first line'] += 1
            elif not record:
                without['captions'] += 1
            else:
                done = database.execute('insert or ignore into captions values (?, ?)', (url, json.dumps(record)))
                if not done.rowcount:
                    without['a URL of their own'] += 1
    print(f"captions   from the columns {', '.join(sorted(used))} of {table}")
    for what, rows in without.items():
        print(f'note       {rows:,} rows of {table} have not {what}, and are not used')
    return database


def url_column(row, table):
    """The name of the column that has the URLs."""
    found = [name for name in row if name.lower() in URL_COLUMNS]
    need(len(found) == 1, f"{table} has the columns {', '.join(row)}; one of them, and no more, must be called "
         f"{', '.join(URL_COLUMNS)}; rename that of the URLs to url")
    return found[0]


def join(table, shards, out):
    """Put DreamLIP's captions onto img2dataset's shards, matched by URL. The new shards hold the pairs that match. They
    are written into OUT.partial, which becomes OUT when all are there."""
    out = Path(out)         # without the slash that a shell may have put behind it
    need(not out.exists(), f'{out} exists; name a new folder, or remove that one')
    need(Path(table).is_file(), f'{table} is not a file; give a CSV with the captions')
    source = Shards(shards)
    database = read_captions(table)
    partial = Path(f'{out}.partial')
    label = partial / 'source.json'
    made_from = {'table': f'{Path(table).resolve()}, {os.path.getsize(table):,} bytes',
                 'shards': source.fingerprint}
    need(not label.exists() or read_json(label) == made_from,
         f'{partial} was left by another command (see {label}); name another folder, or remove it')
    write_json(label, made_from)
    counts = Counter()
    problems = []

    def members(number):
        for i in np.flatnonzero(source.index[:, 0] == number):          # the pairs of this shard
            counts['pairs'] += 1
            try:
                image = source.image(i)
                record = source.record(i)
                kind = image_kind(image)
            except Refused as error:
                problems.append(f'{source.name(i)}: {error}')
                continue
            url = str(record.get('url') or '').strip()
            found = database.execute('select record from captions where url = ?', (url,))
            row = found.fetchone()
            if row:
                counts['matched'] += 1
                yield f'{number:05d}{i:07d}.{kind}', image
                yield f'{number:05d}{i:07d}.json', json.dumps(record | json.loads(row[0])).encode()

    for number in progress_bar(range(len(source.paths)), 'writing shards'):
        path = partial / f'{number:05d}.tar'
        if not path.exists():                       # only whole shards have that name
            write_shard(path, members(number))
    name_left_out(problems)
    need(any(partial.glob('*.tar')), f'no url of the pairs is in {table}; compare them, and remove {partial}')
    partial.rename(out)
    print(f"{counts['matched']:,} of {counts['pairs']:,} pairs matched "
          f"({counts['matched'] / max(counts['pairs'], 1):.1%}), in the shards that this command has written")


# --- 3. Commands -----------------------------------------------------------------------------------------------------

def main():
    prog = 'python -m extras.prepare'
    parser = Parser(prog=prog, usage='%(prog)s pack|join ... [options]', epilog=__doc__)
    commands = parser.add_subparsers(required=True, prog=prog)

    def add_command(function, arguments, text):
        one = commands.add_parser(function.__name__, usage=f'%(prog)s {arguments} [options]', help=text)
        one.set_defaults(function=function)
        return one.add_argument

    add = add_command(pack, 'ROWS IMAGES OUT', 'make shards from rows and a folder of images')
    add('rows', help='JSONL {"image", "caption"}, a CSV or TSV with these columns, COCO-caption JSON, or '
        "Karpathy's list")
    add('images', help='folder of the images; the rows name them by their paths in it')
    add('out', help='folder for the shards')
    add('--image-column', default='image', help='column of the image names (%(default)s, in any case)')
    add('--caption-column', default='caption', help='column of the captions (%(default)s, in any case)')
    add('--val', type=share, default=0.0, help='share of the images that goes to OUT/val; the others go to OUT/train '
        "(default: all go to OUT; Karpathy's list already says what is held out)")
    add('--size', type=positive, default=5000, help='images per shard (default: %(default)s)')
    add = add_command(join, 'TABLE SHARDS ... OUT', "put DreamLIP's captions onto img2dataset's shards")
    add('table', help='CSV with a column of URLs, and up to seven of captions')
    add('shards', nargs='+', help='tars, or folders of them; the json of their pairs has the url')
    add('out', help='folder for the new shards')
    options = vars(parser.parse_args())
    function = options.pop('function')
    function(**options)


if __name__ == '__main__':
    command(main)
