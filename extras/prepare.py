"""Turn data from elsewhere into shards.

    python -m extras.prepare pack rows.csv images/ shards --val 0.1   a tenth held out: shards/train and shards/val
    python -m extras.prepare pack rows.jsonl images/ shards           nothing held out; JSON, TSV, COCO's lists work too
    python -m extras.prepare pack dataset_flickr8k.json Images shards Karpathy's list says what is held out
    python -m extras.prepare join dreamlip.csv /shards /joined        DreamLIP's captions onto img2dataset's shards

The output folder must be a new one, and it appears only when it is whole. If `join` was interrupted, the same command
goes on where it stopped; `pack` starts again.
"""
import csv
import itertools
import json
import os
import random
import re
import sqlite3
import sys
from collections import Counter, defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from eval import progress_bar
from plumbing.captions import CAPTION_KEYS, DREAMLIP, caption_pool, sentences
from plumbing.errors import Refused, command, need
from plumbing.files import read_json, reading, write_json
from plumbing.images import open_image, pillow_errors, load_image
from plumbing.tables import SPLIT, read_rows, table_rows
from plumbing.options import Parser, positive, share
from plumbing.shards import Shards, write_shard

IMAGE_COLUMNS = ('image', 'image_path', 'filepath', 'file_name', 'filename', 'path', 'file',
                 'image_name')
EVERY_CAPTION_KEY = sum(CAPTION_KEYS, [])
URL_COLUMNS = 'url', 'URL', 'image_url', 'Image Path', 'image_path'     # DreamLIP's CSV: Image Path
CAPTION_COLUMNS = 'caption', 'title', 'text', 'sentence'                # the first that is filled
HALVES = {'train': 'train', 'restval': 'train', 'val': 'val'}  # Karpathy's other splits stay out
NAMED = 10              # how many unusable images are named: the first few show what is wrong with all
KINDS = {'JPEG': 'jpg', 'MPO': 'jpg', 'PNG': 'png', 'WEBP': 'webp'}  # MPO: JPEGs from some phones

# --- 1. Rows ---------------------------------------------------------------------------------------------------------

def find_column(names, columns, path, remedy=''):
    """The first of `names` that the table has as a column. Refused, with the remedy, if it has none of them."""
    for name in names:
        if name in columns:
            return name
    raise Refused(f"{path} has the columns {', '.join(map(str, columns))}, but none of {', '.join(names)}{remedy}")


def captions_under(key, record):
    """The record's captions under a key, as a list. Strings under DreamLIP's keys are split, but items of a list pass
    whole. What is blank, or not text, is not a caption."""
    value = record.get(key)
    if key in DREAMLIP and not isinstance(value, list):
        return sentences(value)
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, str) and item.strip()]


def add_captions(record, other):
    """Append the captions of `other` to those of `record`, key by key, without duplicates. Captions become lists, and
    keys without captions are removed."""
    for key in EVERY_CAPTION_KEY:
        captions = captions_under(key, record)
        for caption in captions_under(key, other):
            if caption not in captions:
                captions.append(caption)
        record.pop(key, None)
        if captions:
            record[key] = captions


def records_by_image(rows, path, image_column=None, caption_column=None):
    """Rows -> {image name: record}. All rows of an image become one record with all its captions."""
    columns = dict.fromkeys(itertools.chain.from_iterable(rows))        # in their order
    names = [image_column] if image_column else IMAGE_COLUMNS
    column = find_column(names, columns, path, '; give that of the image names with --image-column')
    text_columns = CAPTION_COLUMNS
    if 'comment_number' in columns:                 # Flickr30k's table
        text_columns = ['comment']
    if caption_column:
        text_columns = [find_column([caption_column], columns, path, '; mend --caption-column')]
    records = {}
    for number, record in enumerate(rows, 1):
        name = record.pop(column, None)
        # A string of JSON can hold a NUL or half a surrogate pair, but a file name cannot.
        need(isinstance(name, str) and not re.search('[\0\ud800-\udfff]', name),
             f"row {number} of {path} has no file name under '{column}'")
        name = os.path.normpath(name)               # ./a.jpg is a.jpg
        record['file'] = name
        texts = [record[key] for key in text_columns if captions_under(key, record)]
        if caption_column:  # other captions are then used for neither training nor retrieval
            for key in EVERY_CAPTION_KEY:
                record.pop(key, None)
        if texts:
            record['caption'] = texts[0]
        # If it is the image's first row, this only turns its captions into lists.
        add_captions(records.setdefault(name, record), record)
    need(any(map(caption_pool, records.values())),
         f"{path} has no captions under a name known here; its columns are {', '.join(columns)}: "
         'give that of the captions with --caption-column')
    return records


# --- 2. Into shards --------------------------------------------------------------------------------------------------

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


def pack(rows, images, out, size=5000, val=0.0, image_column=None, caption_column=None):
    """A file of rows and a folder of images -> shards of up to `size` images in `out`, a new folder.

    val: as --val. An image's name alone decides where it goes; Karpathy's list says so itself. Image bytes are copied
    as they are. An image that is missing or broken, or has no caption, is left out.
    """
    out = Path(out)
    need(not out.exists(), f'{out} exists; name a new folder, or remove that one')
    records = records_by_image(read_rows(rows), rows, image_column, caption_column)
    sides = divide(records, rows, out, val)
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


def divide(records, rows, out, val):
    """Which images go into which folder in `out` -> {folder: their records}."""
    splits = Counter(record[SPLIT] for record in records.values() if SPLIT in record)
    need(not (val and splits), f'{rows} already says which images are held out; leave out --val')
    sides = defaultdict(list)
    for name, record in records.items():
        if splits:
            half = HALVES.get(record.get(SPLIT))
        elif val:
            half = 'val' if random.Random(name).random() < val else 'train'
        else:
            half = ''
        if half is not None:
            sides[half].append(record)
    need(not val or len(sides) == 2, f'--val {val} of {len(records)} images leaves {out}/train or {out}/val empty; give '
         'another share')
    if splits:
        counts = ', '.join(f'{n:,} {split}' for split, n in splits.items())
        print(f'splits     {counts}; train and restval go to {out}/train, val to {out}/val')
    return sides


def packed(records, images, number, problems):
    """Yields (name, bytes) of the members of a shard. If an image is left out, the reason goes into `problems`."""
    for i, record in enumerate(progress_bar(records, 'packing')):
        try:
            image = Path(images, record['file']).read_bytes()
            load_image(image)
            need(caption_pool(record), f"no caption; the row has only {', '.join(record)}")
            kind = image_kind(image)
        except (OSError, Refused) as error:
            problems.append(f"{record['file']}: {error}")
            continue
        key = f'{number:05d}{i:05d}'
        yield f'{key}.{kind}', image
        yield f'{key}.json', json.dumps(record).encode()


def read_captions(table):
    """DreamLIP's CSV -> a database with the captions of each URL, as sentences."""
    csv.field_size_limit(1 << 24)       # Python's own limit of 131,072 characters may be too low
    database = sqlite3.connect('')      # a temporary file: the table may be larger than memory
    database.execute('create table captions (url primary key, record)')
    with reading(table), open(table, encoding='utf-8-sig', newline='') as file:
        for row in progress_bar(table_rows(file, table), 'reading the table'):
            url = (row[find_column(URL_COLUMNS, row, table)] or '').strip()
            record = {}
            for key in DREAMLIP:
                found = sentences(row.get(key))
                if found:
                    record[key] = found
            if url and record:
                database.execute('insert or ignore into captions values (?, ?)',
                                 (url, json.dumps(record)))
    return database


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
    add('rows', help='JSONL {"image", "captions"}, a CSV or TSV with such columns, COCO-caption JSON, or '
        "Karpathy's list")
    add('images', help='folder of the images; the rows name them by their paths in it')
    add('out', help='folder for the shards')
    add('--image-column',
        help=f"column of the image names (default: the first of {', '.join(IMAGE_COLUMNS)})")
    add('--caption-column', help='column of the caption; no other text of the row is then used')
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
