"""Data from elsewhere into shards, and a look at shards.

    python -m extras.prepare pack rows.csv images/ shards --val 0.1   a tenth held out: shards/train and shards/val
    python -m extras.prepare pack rows.jsonl images/ shards           nothing held out; CSV, TSV and COCO's JSON do, too
    python -m extras.prepare join dreamlip.csv /shards /joined        DreamLIP's captions onto img2dataset's shards
    python -m extras.prepare inspect shards/train                     counts, captions, what training would skip, views

`pack` and `join` go on where they were interrupted, and refuse a folder of shards that were made from something else.
Of a table that grew `pack` adds what is new.
"""
import csv
import io
import itertools
import json
import os
import random
import sqlite3
import sys
import textwrap
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torchvision.transforms.v2.functional import resize, to_pil_image
from torchvision.utils import make_grid

from cosmos import PRESETS, Config
from data import (CAPTION_KEYS, DREAMLIP, Parser, Shards, Views, caption_pool, cli, find_shards, half_of,
                  open_image, picture_font, read_image, replacing, sample_views, sentences, unsplit,
                  write_shard)
from eval import first_line, need, progress, read_json, write_json

IMAGE_COLUMNS = 'image', 'image_path', 'filepath', 'file_name', 'filename', 'path', 'file', 'image_name'
EVERY_CAPTION_KEY = sum(CAPTION_KEYS, [])
URL_COLUMNS = 'url', 'URL', 'image_url', 'Image Path', 'image_path'     # DreamLIP's CSV: Image Path
CAPTION_COLUMNS = 'caption', 'title', 'text', 'sentence'                # the first that is filled is the caption
NAMED = 10              # images that cannot be used: the first show what is wrong with all
INSPECTED = 5000        # pairs at most: enough for percentages, read in minutes
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
            delimiter = csv.Sniffer().sniff(first_line(text), ',;\t|').delimiter
            # A TSV has no quoting, nor has Flickr30k's '| ': a caption may begin with a quotation mark.
            unquoted = kind == '.tsv' or '| ' in first_line(text)
            quoting = csv.QUOTE_NONE if unquoted else csv.QUOTE_MINIMAL
            rows = list(csv.DictReader(io.StringIO(text), strict=True, delimiter=delimiter,
                                       quoting=quoting, skipinitialspace=True))
        else:                           # not splitlines: JSON may hold U+2028, which would end a line
            rows = [json.loads(line) for line in text.split('\n') if line.strip()]
    except UnicodeDecodeError as error:
        line = error.object.count(b'\n', 0, error.start) + 1
        raise ValueError(f'{path} is not UTF-8 (line {line}); save it as UTF-8, '
                         'in Excel as the type CSV UTF-8') from None
    except Exception as error:          # of many kinds, for files of other kinds
        raise ValueError(f'{path} cannot be read as JSONL, JSON, CSV or TSV ({error!r})') from None
    need(rows, f'{path} has no rows')
    for number, row in enumerate(rows, 1):
        need(isinstance(row, dict), f'row {number} of {path} has no names for its values')
        need(None not in row, f'row {number} of {path} has more fields than the first; '
             'put texts that hold the delimiter in quotes')
    return rows


def find_column(names, columns, path, remedy=''):
    """The first of `names` that the table has as a column. ValueError, with the remedy, where it has none of them."""
    for name in names:
        if name in columns:
            return name
    raise ValueError(f"{path} has the columns {', '.join(columns)}, none of {', '.join(names)}{remedy}")


def captions_under(key, record):
    """The record's captions under a key, as a list. Strings of DreamLIP's are split: items of its lists pass whole."""
    value = record.get(key)
    if isinstance(value, list):
        return value
    if key in DREAMLIP:
        return sentences(value)
    return [value] if value else []


def add_captions(record, other):
    """Append the captions of `other` to those of `record`, key by key, each once. They become lists."""
    for key in EVERY_CAPTION_KEY:
        captions = captions_under(key, record)
        for caption in captions_under(key, other):
            if caption not in captions:
                captions.append(caption)
        if captions:
            record[key] = captions


def records_by_image(rows, path, image_column=None, caption_column=None):
    """Rows -> {image name: record}. Rows of one image become one record with all captions."""
    columns = dict.fromkeys(itertools.chain.from_iterable(rows))        # in their order
    names = [image_column] if image_column else IMAGE_COLUMNS
    column = find_column(names, columns, path,
                         '; give the column of the image names by --image-column')
    text_columns = CAPTION_COLUMNS
    if 'comment_number' in columns:                 # Flickr30k's
        text_columns = ['comment']
    if caption_column:
        text_columns = [find_column([caption_column], columns, path,
                                    '; give the column of the captions by --caption-column')]
    records = {}
    for number, row in enumerate(rows, 1):
        record = dict(row)
        name = record.pop(column, None)
        need(isinstance(name, str), f"row {number} of {path} has no file name under '{column}'")
        name = os.path.normpath(name)               # ./a.jpg is a.jpg
        record['file'] = name
        texts = [record[key] for key in text_columns if record.get(key)]
        if caption_column:                          # the other captions are for neither training nor retrieval
            for key in EVERY_CAPTION_KEY:
                record.pop(key, None)
        if texts:
            record['caption'] = texts[0]
        add_captions(records.setdefault(name, record), record)
    need(any(map(caption_pool, records.values())),
         f"{path} has no captions under a name known here; its columns are {', '.join(columns)}: "
         'name that of the captions by --caption-column')
    return records


# --- 2. Into shards --------------------------------------------------------------------------------------------------

class LeftOut:
    """Names the first ten images that cannot be used, and counts them all."""
    count = 0

    def add(self, problem):
        self.count += 1
        if self.count <= NAMED:
            print(f'left out   {problem}', file=sys.stderr)

    def end(self):
        if self.count > NAMED:
            print(f'left out   {self.count - NAMED} more', file=sys.stderr)


def claim(out, **source):
    """A folder of shards belongs to one source. A second run on it goes on; another source raises ValueError."""
    label = Path(out, 'source.json')
    if list(Path(out).rglob('*.tar')):              # without a shard it belongs to none: a command may be corrected
        known = read_json(label) if label.exists() else {}
        for key, value in source.items():
            need(known.get(key) == value, f'{out} holds shards made from something else '
                 f'({key} was {known.get(key)}, is {value}); give another folder, or empty it')
    Path(out).mkdir(parents=True, exist_ok=True)
    write_json(label, source)


def image_kind(image):
    """The extension for encoded bytes in a shard; ValueError for what shards cannot hold."""
    kind = open_image(image).format
    need(kind in KINDS, f'{kind} is not among the kinds of image here; save it as JPEG, PNG or WebP')
    return KINDS[kind]


def pack(rows, images, out, size=5000, val=0.0, image_column=None, caption_column=None):
    """A file of rows and a folder of images -> shards of `size` images in `out`.

    val: this share of the images goes to out/val, the others to out/train. Which ones depends on their names alone.
    Image bytes are copied as they are. Rows whose image is missing or no image, or without a caption, are left out.
    What is in a shard already stays there; what is in none goes into further ones.
    """
    need(size > 0, f'--size {size} is less than 1')
    need(0 <= val < 1, f'--val {val} is no share; give 0.1 for a tenth')
    need(Path(images).is_dir(), f'{images} is no folder of images')
    records = records_by_image(read_rows(rows), rows, image_column, caption_column)
    parts = defaultdict(dict)                       # folder of shards -> its {image name: record}
    for name, record in records.items():
        side = 'val' if random.Random(name).random() < val else 'train'
        folder = Path(out, side) if val else Path(out)
        parts[folder][name] = record
    need(not val or len(parts) == 2,
         f'--val {val} of {len(records)} images leaves a side empty; give another share')
    claim(out, source=f'{Path(rows).resolve()}', images=f'{Path(images).resolve()}',
          val=val, columns=[image_column, caption_column])
    new = {}
    for folder, part in parts.items():              # of both sides, before a shard of either is written
        new[folder] = not_packed(part, folder, rows)
    packed = 0
    for folder, part in sorted(parts.items()):      # train first
        write_new(new[folder], images, folder, size)
        there = len(Shards(folder)) if list(folder.glob('*.tar')) else 0
        print(f'{folder} holds {there:,} of the {len(part):,} images listed, '
              f'{len(part) - there:,} left out')
        packed += there
    need(packed, f'none of the {len(records)} images could be packed; are they in {images}?')


def not_packed(records, folder, rows):
    """{image name: record} of what is in no shard yet. ValueError where a shard holds what is not among the records."""
    new = dict(records)
    shards = Shards(folder) if list(folder.glob('*.tar')) else ()
    for i in progress(range(len(shards)), 'reading shards'):
        name = shards.record(i)['file']
        record = json.dumps(new.pop(name, None))
        need(record.encode() == shards.member(i, 'json'),
             f"{folder} holds '{name}', whose rows in {rows} are gone or changed; "
             'give another folder, or empty it')
    return new


def usable(records, images):
    """(extension, bytes, record) of the images that can be packed. The others are left out."""
    left_out = LeftOut()
    for name, record in progress(records.items(), 'packing'):
        try:
            path = Path(images, name)
            image = path.read_bytes()
            read_image(path, 'it')
            need(caption_pool(record), f"no caption under {', '.join(record)}")
            kind = image_kind(image)
        except (OSError, ValueError) as error:
            left_out.add(f'{name}: {error}')
            continue
        yield kind, image, record
    left_out.end()


def write_new(records, images, folder, size):
    """Further shards, 00000.tar ..., of `size` images. A name that is taken is passed over: its shard is whole."""
    found = usable(records, images)

    def members(number):
        for i, (kind, image, record) in enumerate(itertools.islice(found, size)):
            key = f'{number:05d}{i:05d}'
            yield f'{key}.{kind}', image
            yield f'{key}.json', json.dumps(record).encode()

    for number in itertools.count():
        path = Path(folder, f'{number:05d}.tar')
        if not path.exists():
            write_shard(path, members(number))
            if not path.exists():                   # nothing was left for it
                break


def read_captions(table):
    """DreamLIP's CSV -> a database with the captions of each URL, as sentences.

    It lies in a temporary file, for the table may be larger than memory.
    """
    csv.field_size_limit(1 << 24)       # bytes: Python's own limit of 128 KiB is for shorter texts than seven captions
    database = sqlite3.connect('')      # '' is a temporary file
    database.execute('create table captions (url primary key, record)')
    with open(table, encoding='utf-8-sig', errors='replace', newline='') as file:
        reader = csv.DictReader(file)
        column = find_column(URL_COLUMNS, reader.fieldnames or (), table)
        try:
            for row in progress(reader, 'reading the table'):
                url = (row[column] or '').strip()
                record = {}
                for key in DREAMLIP:
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
    stat = os.stat(table)
    claim(out, source=f'{Path(table).resolve()}, {stat.st_size:,} bytes, {stat.st_mtime_ns}',
          shards=shards.fingerprint)
    counts = Counter()
    left_out = LeftOut()

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
                left_out.add(f'{shards.name(i)}: {error}')
                continue
            if row:
                counts['matched'] += 1
                yield f'{number:05d}{i:07d}.{kind}', image
                yield f'{number:05d}{i:07d}.json', json.dumps(record | json.loads(row[0])).encode()

    for number in progress(range(len(shards.paths)), 'writing shards'):
        path = Path(out, f'{number:05d}.tar')
        if not path.exists():                       # only whole shards have that name
            write_shard(path, members(number))
    left_out.end()
    print(f"{counts['matched']:,} of {counts['pairs']:,} pairs matched "
          f"({counts['matched'] / max(counts['pairs'], 1):.1%}), in the shards that {out} lacked")


# --- 3. A look at shards ---------------------------------------------------------------------------------------------

TILE = 128      # side of a view on the sheet, in pixels
LINE = 17       # height of a line of text
LETTER = 8      # width of a letter: capitals on the average, others less


def sample_sheet(views, path):
    """A PNG of what the student is shown: for pairs from all over the set, the views, and below them the text crops."""
    width = max(len(views.kinds), 6) * (TILE + 4) + 4                   # 6: captions need room, too
    rows = []
    for _, images, captions, _ in sample_views(views):
        tiles = [resize(image, [TILE, TILE]) for image in images]
        lines = []
        for label, caption in zip('G' * views.global_texts + 'L' * views.local_texts, captions):
            lines += textwrap.wrap(f'{label}   {caption}', width // LETTER)
        rows.append((to_pil_image(make_grid(tiles, nrow=len(tiles), padding=4, pad_value=1)), lines))
    height = LINE + sum(picture.height + LINE * len(lines) for picture, lines in rows)
    sheet = Image.new('RGB', (width, height), 'white')
    write = partial(ImageDraw.Draw(sheet).text, fill='black', font=picture_font(12))
    write((4, 0), f'{views.global_images} global views, the others local; below: G a global caption, L a local one')
    top = LINE
    for picture, lines in rows:
        sheet.paste(picture, (0, top))
        top += picture.height
        for line in lines:
            write((4, top), line)
            top += LINE
    with replacing(path) as temporary:
        sheet.save(temporary, 'PNG')


def percentiles(values):
    return ', '.join(f'{q} % {np.percentile(values, q):g}' for q in (0, 10, 50, 90, 100))


def inspect(pattern, caption_keys, preset, out):
    """A report on pairs from all over the set, and a sheet of views. What cannot be read is left out."""
    shards = Shards(half_of(pattern, 'train'), caption_keys)
    views = Views(shards, None, Config.preset(preset), seed=0, batch=1,
                  augment='crops' if preset == 'tiny' else 'full')
    sample = np.unique(np.linspace(0, len(shards) - 1, INSPECTED, dtype=int))
    left_out = LeftOut()
    pools = []
    paragraphs = 0
    images = set()
    keys = Counter()
    for i in progress(sample, 'reading pairs'):
        try:
            views.views(0, i)                       # as training does
        except Exception as error:                  # decoders raise what they like
            left_out.add(f'{shards.name(i)}: {error}')
            continue
        pools.append(shards.pool(i))
        images.add(hash(shards.image(i)))
        record = shards.record(i)
        keys.update(record.keys())
        if unsplit(record):
            paragraphs += 1
    left_out.end()
    need(pools, f'none of {len(sample)} pairs of {pattern} can be read')
    texts = sum(pools, [])
    print(f'{len(shards):,} pairs in {len(shards.paths)} shards, {sum(shards.sizes) / 2**20:,.1f} MiB')
    print('left out            ', f'{left_out.count} of {len(sample)} pairs read; training skips them')
    print('keys                ',
          ', '.join(f'{key} ({n / len(pools):.0%})' for key, n in keys.most_common()))
    print('sentences per pair  ', percentiles(list(map(len, pools))))
    print('unsplit paragraphs  ', f'in {paragraphs} of {len(pools)} pairs'
          " under DreamLIP's keys; pack splits those that are strings")
    print('words per sentence  ', percentiles([len(text.split()) for text in texts]))
    print('repeated            ', f'{len(pools) - len(images)} of {len(pools)} images, '
          f'{len(texts) - len(set(texts))} of {len(texts)} sentences')
    print('an example          ', ' | '.join(pools[0]))
    sample_sheet(views, out)
    print('views and text crops', out)


# --- 4. Commands -----------------------------------------------------------------------------------------------------

def main():
    parser = Parser(prog='python -m extras.prepare', epilog=__doc__)
    commands = parser.add_subparsers(required=True)

    def command(run, text):
        subparser = commands.add_parser(run.__name__, help=text)
        subparser.set_defaults(run=run)
        return subparser.add_argument

    add = command(pack, 'rows and a folder of images into shards')
    add('rows', help='JSONL {"image", "captions"}, a CSV or TSV alike, or COCO-caption JSON')
    add('images', help='folder in which the images have these names')
    add('out', help='folder of the shards')
    add('--image-column', help=f"column of the image names (default: the first of {', '.join(IMAGE_COLUMNS)})")
    add('--caption-column', help='column of the caption; no other text of the row is then used')
    add('--val', type=float, default=0.0,
        help='share of the images for OUT/val; the others go to OUT/train (default: %(default)s)')
    add('--size', type=int, default=5000, help='images a shard (default: %(default)s)')
    add = command(join, "DreamLIP's captions onto img2dataset's shards")
    add('table', help='CSV with a column of URLs, and seven of captions')
    add('pattern', help='folder, glob or pattern of shards whose json has the url')
    add('out', help='folder of the new shards')
    add = command(inspect, 'counts, captions, what training would skip, and a sheet of views')
    add('pattern', help='folder, glob or pattern of shards')
    add('--caption-keys', help='comma-separated json keys of the captions')
    add('--preset', choices=PRESETS, default='tiny',
        help='whose views to draw (default: %(default)s)')
    add('--out', default='samples.png', help='the contact sheet (default: %(default)s)')
    options = vars(parser.parse_args())
    run = options.pop('run')
    run(**options)


if __name__ == '__main__':
    cli(main)
