"""Data from elsewhere into shards, and a look at shards.

    python -m extras.prepare pack rows.csv images/ shards/train       JSONL, CSV, TSV or COCO captions alike
    python -m extras.prepare pack rows.csv images/ shards --val 0.1   a tenth held out: shards/train and shards/val
    python -m extras.prepare join dreamlip.csv /shards /joined        DreamLIP's captions onto img2dataset's shards
    python -m extras.prepare inspect shards/train                     counts, captions, what training would skip, a sheet

`pack` and `join` go on where they were interrupted, and refuse a folder of shards that were made from something else.
"""
import csv
import io
import json
import math
import os
import random
import sqlite3
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from cosmos import PRESETS, Config
from data import (CAPTION_KEYS, Parser, Shards, Views, caption_pool, cli, find_shards, open_image,
                  read_image, replacing, sample_sheet, sentences, write_shard)
from eval import first_line, need, progress, read_json, write_json

IMAGE_COLUMNS = 'image', 'image_path', 'filepath', 'file_name', 'filename', 'path', 'file'
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
    return [{'image': names[annotation['image_id']], 'caption': annotation['caption']}
            for annotation in whole['annotations']]


def read_rows(path):
    """The rows of a JSONL, JSON, CSV or TSV file, as dicts. Raises ValueError that names the file and the row."""
    kind = Path(path).suffix.lower()
    try:
        text = Path(path).read_text(encoding='utf-8-sig')
        if kind == '.json':
            rows = parse_json(text)
        elif kind in ('.csv', '.tsv'):
            delimiter = csv.Sniffer().sniff(text.partition('\n')[0], ',;\t|').delimiter
            # A TSV has no quoting: a caption in it may begin with a quotation mark.
            quoting = csv.QUOTE_NONE if kind == '.tsv' else csv.QUOTE_MINIMAL
            rows = list(csv.DictReader(io.StringIO(text), strict=True, delimiter=delimiter,
                                       quoting=quoting))
        else:                           # not splitlines: JSON may hold U+2028, which would end a line
            rows = [json.loads(line) for line in text.split('\n') if line.strip()]
    except Exception as error:          # of many kinds, for files of other kinds
        raise ValueError(f'{path} cannot be read as JSONL, JSON, CSV or TSV ({error!r})') from None
    need(rows, f'{path} has no rows')
    for number, row in enumerate(rows, 1):
        need(isinstance(row, dict), f'row {number} of {path} has no names for its values')
        need(None not in row, f'row {number} of {path} has more fields than the first; '
             'put texts that hold the delimiter in quotes')
    return rows


def find_column(names, columns, path, remedy=''):
    """The first of `names` among the columns of a table."""
    for name in names:
        if name in columns:
            return name
    raise ValueError(f"{path} has the columns {', '.join(columns)}, none of {', '.join(names)}{remedy}")


def as_list(value):
    if isinstance(value, list):
        return value
    return [value] if value else []


def add_captions(record, other):
    """Append the captions of `other` to those of `record`, key by key, each once."""
    for key in sum(CAPTION_KEYS, []):
        captions = as_list(record.get(key))
        captions += [caption for caption in as_list(other.get(key)) if caption not in captions]
        if captions:
            record[key] = captions


def records_by_image(rows, path, image_column=None, caption_column=None):
    """Rows -> {image name: record}. Rows of one image become one record with all captions."""
    names = [image_column] if image_column else IMAGE_COLUMNS
    column = find_column(names, rows[0], path, '; name that of the images by --image-column')
    if caption_column:
        find_column([caption_column], rows[0], path)
    records = {}
    for number, row in enumerate(rows, 1):
        record = dict(row)
        name = record.pop(column, None)
        need(isinstance(name, str), f"row {number} of {path} has no '{column}'")
        record.setdefault('file', name)
        if caption_column:              # under the first of CAPTION_KEYS, before whatever else the row has
            record['raw_caption'] = record.pop(caption_column, None)
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
    if not label.exists():
        need(not list(Path(out).glob('*.tar')),
             f'{out} holds shards made from something else than {source}; give another folder, or empty it')
        Path(out).mkdir(parents=True, exist_ok=True)
        write_json(label, made)
    known = read_json(label)
    need(known == made, f'{out} holds shards made from {known}, not from {made}; '
         'give another folder, or empty it')


def write_missing(out, count, members):
    """Shards out/00000.tar ... of members(number). What is there is left alone: only whole shards have that name."""
    for number in progress(range(count), 'writing shards'):
        path = Path(out, f'{number:05d}.tar')
        if not path.exists():
            write_shard(path, members(number))


def image_kind(image):
    """The extension for encoded bytes in a shard; ValueError for what shards cannot hold."""
    kind = open_image(image).format
    need(kind in KINDS, f'{kind} is not among the kinds of image here; save it as JPEG, PNG or WebP')
    return KINDS[kind]


def pack(rows, images, out, size=5000, val=0.0, image_column=None, caption_column=None):
    """A file of rows and a folder of images -> shards of `size` images in `out`.

    val: this share of the images goes to out/val, the others to out/train. Which ones depends on their names alone.
    Image bytes are copied as they are. Rows whose image is missing or no image, or without a caption, are named.
    """
    need(size > 0, f'--size {size} is less than 1')
    need(0 <= val < 1, f'--val {val} is no share; give 0.1 for a tenth')
    need(Path(images).is_dir(), f'{images} is no folder of images')
    records = records_by_image(read_rows(rows), rows, image_column, caption_column)
    claim(out, rows, size=size, val=val, columns=[image_column, caption_column])
    parts = defaultdict(list)           # folder -> its images
    for name, record in records.items():
        half = 'val' if random.Random(name).random() < val else 'train'
        parts[Path(out, half if val else '')].append((name, record))
    for folder, part in parts.items():
        pack_part(part, images, folder, size)


def pack_part(records, images, out, size):
    """Shards of (image name, record)s in `out`, and a line that counts them."""
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
         f'none of the {len(records)} images for {out} could be packed; are they in {images}?')
    there = len(Shards(out))            # with those of an earlier call
    print(f'{out} holds {there:,} of the {len(records):,} images listed, {len(records) - there:,} left out')


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
            for row in progress(reader, 'reading the table'):
                url = (row[column] or '').strip()
                record = {}
                for key in CAPTION_KEYS[0]:
                    found = sentences(row.get(key))
                    if found:
                        record[key] = found
                if url and record:
                    database.execute('insert or ignore into captions values (?, ?)',
                                     (url, json.dumps(record)))
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
    print(f"{counts['matched']:,} of {counts['pairs']:,} pairs matched "
          f"({counts['matched'] / max(counts['pairs'], 1):.1%}), in the shards that {out} lacked")


# --- 3. A look at shards ---------------------------------------------------------------------------------------------

def percentiles(values):
    return ', '.join(f'{q} % {np.percentile(values, q):g}' for q in (0, 10, 50, 90, 100))


def inspect(pattern, caption_keys=None, preset='tiny', out='samples.png'):
    """Counts, captions and unreadable pairs on the terminal, of at most 5,000 pairs from all over the set, and a sheet."""
    shards = Shards(pattern, caption_keys)
    augment = 'crops' if preset == 'tiny' else 'full'
    views = Views(shards, None, Config.preset(preset), seed=0, batch=1, augment=augment)
    sample = np.linspace(0, len(shards) - 1, min(len(shards), 5000), dtype=int)
    pools = []
    images = set()
    keys = Counter()
    for i in progress(sample, 'reading pairs'):
        try:
            views.views(0, i)                       # as training does
        except Exception as error:                  # decoders raise what they like
            print(f'would be skipped  {shards.name(i)}: {error}', file=sys.stderr)
            continue
        pools.append(shards.pool(i))
        images.add(hash(shards.image(i)))
        keys.update(shards.record(i).keys())
    count = len(pools)
    need(count, f'none of {len(sample)} pairs of {pattern} can be read')
    texts = sum(pools, [])
    print(f'{len(shards):,} pairs in {len(shards.paths)} shards, {sum(shards.sizes) / 2**20:,.1f} MiB')
    print('would be skipped    ', f'{len(sample) - count} of {len(sample)} read')
    print('keys                ', ', '.join(f'{key} ({n / count:.0%})' for key, n in keys.most_common()))
    print('sentences per pair  ', percentiles([len(pool) for pool in pools]))
    print('words per sentence  ', percentiles([len(text.split()) for text in texts]))
    print('repeated            ', f'{count - len(images)} of {count} images, '
          f'{len(texts) - len(set(texts))} of {len(texts)} sentences')
    print('an example          ', ' | '.join(pools[0]))
    sample_sheet(views, out)
    print('views and text crops', out)


# --- 4. Commands -----------------------------------------------------------------------------------------------------

def main():
    parser = Parser(description=first_line(__doc__))
    commands = parser.add_subparsers(required=True)

    def command(run, text):
        parser = commands.add_parser(run.__name__, help=text)
        parser.set_defaults(run=run)
        return parser.add_argument

    add = command(pack, 'rows and a folder of images into shards')
    add('rows', help='JSONL {"image", "captions"}, a CSV or TSV alike, or COCO-caption JSON')
    add('images', help='folder in which the images have these names')
    add('out', help='folder of the shards')
    add('--image-column', help=f"that of the names, where it is none of {', '.join(IMAGE_COLUMNS)}")
    add('--caption-column', help='the one to train on, where there are several, or by another name')
    add('--val', type=float, default=0.0, help='share of the images for OUT/val; the others go to OUT/train')
    add('--size', type=int, default=5000, help='images a shard')
    add = command(join, "DreamLIP's captions onto img2dataset's shards")
    add('table', help='CSV with a column of URLs, and seven of captions')
    add('pattern', help='folder, glob or pattern of shards whose json has the url')
    add('out', help='folder of the new shards')
    add = command(inspect, 'counts, captions, what training would skip, and a sheet of views')
    add('pattern', help='folder, glob or pattern of shards')
    add('--caption-keys', help='comma-separated json keys of the captions')
    add('--preset', choices=PRESETS, default='tiny', help='whose views to draw')
    add('--out', default='samples.png', help='the contact sheet')
    options = vars(parser.parse_args())
    run = options.pop('run')
    run(**options)


if __name__ == '__main__':
    cli(main)
