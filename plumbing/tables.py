"""Lists of images and captions: tables in JSON, CSV or TSV, and the lists that COCO and Karpathy publish."""
import csv
import io
import json
import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch

from plumbing.captions import without_spaced_stop
from plumbing.errors import Refused, need, note, warn
from plumbing.files import reading

# --- 1. Rows ---------------------------------------------------------------------------------------------------------

SPLIT = 'karpathy_split'        # of a row that comes from Karpathy's list


def rows_of_json(text):
    """JSON lines, a list of objects, COCO's captions or Karpathy's list -> rows."""
    decoder = json.JSONDecoder(parse_constant={}.get)       # NaN, which is not JSON, becomes None
    values = []
    place = 0
    while place < len(text):
        value, place = decoder.raw_decode(text, place)
        values.append(value)
        place = re.compile(r'\s*').match(text, place).end()  # raw_decode does not skip white space
    if len(values) == 1 and isinstance(values[0], list):
        return values[0]
    if len(values) == 1 and 'annotations' in values[0]:     # COCO's captions
        captions = defaultdict(list)                        # {the image's id: captions}
        for annotation in values[0]['annotations']:
            captions[annotation['image_id']].append(annotation['caption'])
        images = values[0]['images']
        unknown = captions.keys() - {image['id'] for image in images}
        if unknown:
            warn(f'captions of {len(unknown)} images are left out, because the list does not name these images')
        return [{'image': image['file_name'], 'caption': captions[image['id']]} for image in images]
    if len(values) == 1 and 'images' in values[0]:          # Karpathy's list
        rows = []
        for image in values[0]['images']:
            name = os.path.join(image.get('filepath', ''), image['filename'])   # COCO's images lie in two folders
            captions = [sentence['raw'] for sentence in image['sentences']]
            rows.append({'image': name, 'caption': captions, SPLIT: image['split']})
        return rows
    return values


def table_rows(file, path, **form):
    """The rows of an open CSV or TSV, as dicts. A row is Refused, with its line, if it has too many fields, or nothing
    closes its quotation mark, because that would swallow all rows up to the next one."""
    reader = csv.DictReader(file, strict=True, **form)
    line = 1
    try:
        columns = reader.fieldnames or []                               # of the first line
        for name in columns:
            need(columns.count(name) == 1 or not name.strip(), f'{path} has several columns called {name}; '
                 'give an image with several captions several rows')
        line = reader.line_num + 1
        for row in reader:
            need(None not in row, f'line {line} of {path} has more fields than the first; '
                 'put texts that hold the delimiter in quotes')
            yield row
            line = reader.line_num + 1
    except csv.Error as error:
        raise Refused(f'{path} cannot be read from line {line} on ({error}); '
                      'close the quotation mark there, or double it') from None


def rows_of_table(text, path):
    """The rows of a CSV or a TSV. The first line shows what the delimiter is."""
    delimiter = max(',;\t|', key=text.partition('\n')[0].count)
    rows = list(table_rows(io.StringIO(text), path, delimiter=delimiter, skipinitialspace=True))
    long = [number for number, row in enumerate(rows, 1) if '\n' in ''.join(filter(None, row.values()))]
    if long:
        note(f'{len(long)} rows of {path} take several lines, because a quotation mark opens in one and closes in '
             f'another; the first is row {long[0]}')
    short = [number for number, row in enumerate(rows, 1) if None in row.values()]
    if short:
        warn(f'{len(short)} rows of {path} have fewer fields than its first line, the first is '
             f'row {short[0]}; their last columns count as empty')
    return rows


def read_rows(path):
    """The rows of a JSONL, JSON, CSV or TSV file, as dicts. The content says which it is, because names vary:
    Flickr8k's captions.txt is a CSV."""
    with reading(path):
        text = Path(path).read_text(encoding='utf-8-sig')
        try:
            is_json = text.lstrip().startswith(('{', '['))
            rows = rows_of_json(text.strip()) if is_json else rows_of_table(text, path)
        except (KeyError, TypeError) as error:          # lists of images without their captions, and the like
            raise Refused(f'{path} is JSON of an unknown kind ({error!r}); docs/data.md shows which are known') from None
    need(rows and all(isinstance(row, dict) for row in rows),
         f'{path} has no rows; docs/data.md shows what a table looks like')
    return rows


# --- 2. Images and their captions ------------------------------------------------------------------------------------

@dataclass
class Listed:
    """An image of a list."""
    split: str                                          # of Karpathy's lists, None elsewhere
    captions: list = field(default_factory=list)


def find_column(columns, wanted, option, path):
    """The column called `wanted`, in any case. Refused, with the columns that there are, if there is not exactly one."""
    found = [name for name in columns if name.lower() == wanted.lower()]
    need(len(found) == 1, f"{path} has the columns {', '.join(columns)}, of which not one is '{wanted}'; "
         f'say with {option} which to take')
    return found[0]


def read_list(path, image_column='image', caption_column='caption'):
    """A table, or a published list -> {image name: Listed}. An image may have several rows. A caption is a string, or
    an item of a list of them. What is blank is none, and what is not text is counted, and said."""
    rows = read_rows(path)
    columns = dict.fromkeys(chain.from_iterable(rows))                  # each once, in their order
    image_column = find_column(columns, image_column, '--image-column', path)
    caption_column = find_column(columns, caption_column, '--caption-column', path)
    others = [name for name in columns if name not in (image_column, caption_column, SPLIT)]
    if others:
        note(f"of {path} only '{image_column}' and '{caption_column}' are used, not {', '.join(others)}")
    listed = {}
    not_text = 0
    for number, row in enumerate(rows, 1):
        name = row.get(image_column)
        # A string of JSON can hold a NUL or half a surrogate pair, but a file name cannot.
        need(isinstance(name, str) and not re.search('[\0\ud800-\udfff]', name),
             f"row {number} of {path} has no file name under '{image_column}'; its columns are {', '.join(row)}")
        image = listed.setdefault(os.path.normpath(name), Listed(row.get(SPLIT)))       # ./a.jpg is a.jpg
        need(image.split == row.get(SPLIT), f'{name} is in two splits of {path}; take it out of one')
        value = row.get(caption_column)
        for caption in value if isinstance(value, list) else [value]:
            if not isinstance(caption, str):
                not_text += 1
            elif caption.strip():
                image.captions.append(caption)
    if not_text:
        warn(f"{not_text} captions of {path}, under '{caption_column}', are absent or not text, and so not used")
    return listed


def published_captions(path, images=None, split=None):
    """A list, the folder of its images (that of the list, if none is given), and a split of Karpathy's lists (test, if
    none is given) -> paths, and captions and owner as in `with_owners`."""
    listed = read_list(path)
    splits = {image.split for image in listed.values()} - {None}
    need(splits or not split, f'{path} has no splits; omit --split')
    wanted = (split or 'test') if splits else None
    chosen = {name: image.captions for name, image in listed.items() if image.split == wanted}
    need(chosen, f"{path} lists no image of the split {wanted}; give one of {', '.join(sorted(splits))} with --split")
    for name, captions in chosen.items():
        need(captions, f'{name}, listed in {path}, has no caption; give it one, or take the image out')
    paths = [Path(images or Path(path).parent, name) for name in chosen]
    return paths, *with_owners(chosen.values())


def with_owners(pools):
    """For each image a list of captions -> all captions in one list, and owner (captions,), the image that each belongs
    to. A final ' .' is taken off, as in training."""
    captions = []
    owner = []
    for i, pool in enumerate(pools):
        for caption in pool:
            captions.append(without_spaced_stop(caption))
            owner.append(i)
    return captions, torch.tensor(owner)
