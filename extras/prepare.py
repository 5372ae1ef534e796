"""Data from elsewhere into shards, and a look at shards.

    python -m extras.prepare pack ROWS IMAGES OUT    JSONL, CSV, TSV or COCO captions and a folder of images
    python -m extras.prepare join CSV SHARDS OUT     DreamLIP's captions onto img2dataset's shards, by URL
    python -m extras.prepare inspect SHARDS          counts, caption statistics, a sheet of views and text crops

`pack` and `join` go on where they were interrupted, and refuse a folder of shards that were made from something else.
"""
import csv
import io
import json
import math
import os
import sqlite3
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cosmos import PRESETS, Config
from data import (CAPTION_KEYS, Parser, Shards, Views, caption_pool, cli, find_shards, open_image,
                  read_image, replacing, sample_sheet, sentences, write_shard)
from eval import need, read_json

IMAGE_COLUMNS = 'image', 'filepath', 'file_name', 'filename', 'path', 'file'
URL_COLUMNS = 'url', 'URL', 'image_url', 'Image Path', 'image_path'     # DreamLIP's CSV: Image Path
CAPTION_COLUMNS = 'title', 'text', 'sentence'                           # what others call a caption
KINDS = {'JPEG': 'jpg', 'MPO': 'jpg', 'PNG': 'png', 'WEBP': 'webp'}     # MPO: of some phones

# --- 1. Rows ---------------------------------------------------------------------------------------------------------

def parse_json(text):
    """A list of objects, an object of objects (SugarCrepe), or COCO's captions -> list of rows."""
    whole = json.loads(text)
    if isinstance(whole, list):
        return whole
    if 'annotations' not in whole:
        return list(whole.values())
    names = {image['id']: image['file_name'] for image in whole['images']}
    rows = []
    for annotation in whole['annotations']:
        rows.append({'image': names[annotation['image_id']], 'caption': annotation['caption']})
    return rows


def read_rows(path):
    """The rows of a JSONL, JSON, CSV or TSV file, as dicts. Raises ValueError that names the file and the row."""
    kind = Path(path).suffix.lower()
    try:
        text = Path(path).read_text(encoding='utf-8-sig')
        if kind == '.json':
            rows = parse_json(text)
        elif kind == '.csv':
            rows = list(csv.DictReader(io.StringIO(text), strict=True))
        elif kind == '.tsv':            # without quoting: a caption may begin with a quotation mark
            rows = list(csv.DictReader(io.StringIO(text), delimiter='\t', quoting=csv.QUOTE_NONE))
        else:                           # not splitlines: JSON may hold U+2028, which would end a line
            rows = [json.loads(line) for line in text.split('\n') if line.strip()]
    except Exception as error:          # of many kinds, for files of other kinds
        raise ValueError(f'{path} cannot be read as JSONL, JSON, CSV or TSV ({error!r})') from None
    need(rows, f'{path} has no rows')
    for number, row in enumerate(rows, 1):
        need(isinstance(row, dict), f'row {number} of {path} has no names for its values')
        need(None not in row, f'row {number} of {path} has more fields than the first; '
             'put texts with commas in quotes')
    return rows


def find_column(names, columns, path):
    """The first of `names` among the columns of a table."""
    for name in names:
        if name in columns:
            return name
    columns = ', '.join(map(str, columns))
    raise ValueError(f"{path} has the columns {columns}, none of {', '.join(names)}")


def as_list(value):
    if isinstance(value, list):
        return value
    return [value] if value else []


def add_captions(record, other):
    """Append the captions of `other` to those of `record`, key by key, each once."""
    for key in sum(CAPTION_KEYS, []):
        captions = []
        for caption in as_list(record.get(key)) + as_list(other.get(key)):
            if caption not in captions:
                captions.append(caption)
        if captions:
            record[key] = captions


def records_by_image(rows, path):
    """Rows -> {image name: record}. Rows of one image become one record with all captions."""
    column = find_column(IMAGE_COLUMNS, rows[0], path)
    records = {}
    for number, row in enumerate(rows, 1):
        record = dict(row)
        name = record.pop(column, None)
        need(isinstance(name, str) and name, f"row {number} of {path} has no '{column}'")
        for other_name in CAPTION_COLUMNS:
            if 'caption' not in record and record.get(other_name):
                record['caption'] = record[other_name]
        if name in records:
            add_captions(records[name], record)
        else:
            records[name] = record
    return records


# --- 2. Into shards --------------------------------------------------------------------------------------------------

def claim(out, source, **settings):
    """A folder of shards belongs to one source: a second run goes on with it, for another ValueError is raised."""
    label = Path(out, 'source.json')
    stat = os.stat(source)
    identity = f'{Path(source).resolve()}, {stat.st_size:,} bytes, {stat.st_mtime_ns}'
    made = {'source': identity, **settings}
    known = read_json(label) if label.exists() else None
    if known == made:
        return
    need(known is None and not list(Path(out).glob('*.tar')), f'{out} holds shards made from '
         f'{known or "something else"}, not from {made}; give another folder, or empty it')
    Path(out).mkdir(parents=True, exist_ok=True)
    with replacing(label) as partial:
        partial.write_text(json.dumps(made))


def write_missing(out, count, members):
    """Shards out/00000.tar ... of members(number). What is there is left alone: only whole shards have that name."""
    for number in tqdm(range(count), 'writing shards', disable=None):
        path = Path(out, f'{number:05d}.tar')
        if not path.exists():
            write_shard(path, members(number))


def image_kind(image):
    """The extension for encoded bytes in a shard; ValueError for what shards cannot hold."""
    kind = open_image(image).format
    need(kind in KINDS, f'{kind} is not among the kinds of image here; save it as JPEG, PNG or WebP')
    return KINDS[kind]


def pack(rows, images, out, size=5000):
    """A file of rows and a folder of images -> shards of `size` images in `out`.

    Image bytes are copied as they are. Rows whose image is missing or no image, or without a caption, are named.
    """
    need(size > 0, f'--size {size} is less than 1')
    need(Path(images).is_dir(), f'{images} is no folder of images')
    records = list(records_by_image(read_rows(rows), rows).items())
    claim(out, rows, size=size)

    def members(number):
        for i, (name, record) in enumerate(records[number * size:(number + 1) * size]):
            key = f'{number:05d}{i:05d}'
            try:
                image = Path(images, name).read_bytes()
                read_image(image, name)
                need(caption_pool(record), f"no caption under {', '.join(record)}")
                kind = image_kind(image)
            except (OSError, ValueError) as error:
                print(f'left out   {name}: {error}', file=sys.stderr)
                continue
            yield f'{key}.{kind}', image
            yield f'{key}.json', json.dumps(record).encode()

    write_missing(out, math.ceil(len(records) / size), members)
    need(list(Path(out).glob('*.tar')),
         f'none of the {len(records)} images of {rows} could be packed; are they in {images}?')
    packed = len(Shards(out))           # with those of an earlier call
    print(f'{packed:,} images packed, {len(records) - packed:,} left out, in {out}')


def read_captions(table):
    """DreamLIP's CSV -> a database with the captions of each URL, as sentences.

    It lies in a temporary file, for the table may be larger than memory.
    """
    csv.field_size_limit(1 << 24)
    database = sqlite3.connect('')      # '' is a temporary file
    database.execute('create table captions (url primary key, record)')
    with open(table, encoding='utf-8-sig', errors='replace', newline='') as file:
        reader = csv.DictReader(file)
        column = find_column(URL_COLUMNS, reader.fieldnames or (), table)
        try:
            for row in tqdm(reader, 'reading the table', disable=None):
                url = (row[column] or '').strip()
                record = {}
                for key in CAPTION_KEYS[0]:
                    found = sentences(row.get(key))
                    if found:
                        record[key] = found
                if url and record:
                    values = (url, json.dumps(record))
                    database.execute('insert or ignore into captions values (?, ?)', values)
        except csv.Error as error:
            raise ValueError(f'{table} is no CSV after its line {reader.line_num} ({error})') from None
    return database


def join(table, pattern, out):
    """DreamLIP's CSV onto img2dataset's shards, by URL: new shards of the pairs it knows, with its captions."""
    find_shards(pattern)                # its error is the better one where there are none
    try:
        shards = Shards(pattern, caption_keys='url')
    except ValueError:
        raise ValueError(f"{pattern} has no 'url' to join by in its json; "
                         'is it as img2dataset wrote it?') from None
    database = read_captions(table)
    claim(out, table, shards=shards.fingerprint)
    counts = Counter()

    def members(number):
        for i in np.flatnonzero(shards.pairs['shard'] == number):
            counts['pairs'] += 1
            try:
                image = shards.image(i)
                record = shards.record(i)
                kind = image_kind(image)
                url = str(record.get('url') or '').strip()
                row = database.execute('select record from captions where url = ?', (url,)).fetchone()
            except Exception as error:              # decoders raise what they like
                print(f'left out   {shards.name(i)}: {error}', file=sys.stderr)
                continue
            if row:
                counts['matched'] += 1
                yield f'{number:05d}{i:07d}.{kind}', image
                yield f'{number:05d}{i:07d}.json', json.dumps(record | json.loads(row[0])).encode()

    write_missing(out, len(shards.paths), members)
    share = counts['matched'] / max(counts['pairs'], 1)
    print(f"{counts['matched']:,} of {counts['pairs']:,} pairs matched ({share:.1%}), "
          f'in the shards that {out} lacked')


# --- 3. A look at shards ---------------------------------------------------------------------------------------------

def percentiles(values):
    return ', '.join(f'{q} % {np.percentile(values, q):g}' for q in (0, 10, 50, 90, 100))


def inspect(pattern, caption_keys=None, preset='tiny', out='samples.png', most=5000):
    """Counts and caption statistics of shards on the terminal, from at most `most` pairs, and a contact sheet PNG."""
    shards = Shards(pattern, caption_keys)
    sample = np.linspace(0, len(shards) - 1, min(len(shards), most), dtype=int)
    pools = []
    keys = Counter()
    problems = []
    for i in tqdm(sample, 'reading captions', disable=None, leave=False):
        try:
            pools.append(shards.pool(i))
            keys.update(shards.record(i).keys())
        except (OSError, ValueError) as error:
            problems.append(f'{shards.name(i)}: {error}')
    size = sum(map(os.path.getsize, shards.paths)) / 2 ** 20
    words = [len(sentence.split()) for pool in pools for sentence in pool]
    print(f'{len(shards):,} pairs in {len(shards.paths)} shards, {size:,.1f} MiB')
    print('bytes per image     ', percentiles(shards.pairs['image']['size']))
    shares = [f'{key} ({count / len(pools):.0%})' for key, count in keys.most_common()]
    print('keys                ', ', '.join(shares))
    print('captions per pair   ', percentiles([len(pool) for pool in pools]))
    print('words per caption   ', percentiles(words))
    print('unusable captions   ', f'{len(problems)} of {len(sample)} read', *problems[:1])
    print('an example          ', ' | '.join(pools[0]))
    augment = 'crops' if preset == 'tiny' else 'full'
    sample_sheet(Views(shards, None, Config.preset(preset), seed=0, batch=1, augment=augment), out)
    print('views and text crops', out)


# --- 4. Commands -----------------------------------------------------------------------------------------------------

def main():
    parser = Parser(description=__doc__.split('\n')[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser('pack', help='rows and a folder of images into shards')
    command.add_argument('rows', help='JSONL {"image", "captions"}, a CSV or TSV alike, or COCO-caption JSON')
    command.add_argument('images', help='folder in which the images have these names')
    command.add_argument('out', help='folder of the shards')
    command.add_argument('--size', type=int, default=5000, help='images a shard')
    command.set_defaults(run=pack)
    command = commands.add_parser('join', help="DreamLIP's captions onto img2dataset's shards")
    command.add_argument('table', help='CSV with a column of URLs, and seven of captions')
    command.add_argument('pattern', help='folder, glob or pattern of shards whose json has the url')
    command.add_argument('out', help='folder of the new shards')
    command.set_defaults(run=join)
    command = commands.add_parser('inspect', help='counts, caption statistics and a sheet of views')
    command.add_argument('pattern', help='folder, glob or pattern of shards')
    command.add_argument('--caption-keys', help='comma-separated json keys of the captions')
    command.add_argument('--preset', choices=PRESETS, default='tiny', help='whose views to draw')
    command.add_argument('--out', default='samples.png', help='the contact sheet')
    command.set_defaults(run=inspect)
    options = vars(parser.parse_args())
    run = options.pop('run')
    run(**options)


if __name__ == '__main__':
    cli(main)
