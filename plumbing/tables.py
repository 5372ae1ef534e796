"""Tables of images and captions: rows of JSON, CSV or TSV, and the lists that COCO, Karpathy and Flickr30k publish."""
import csv
import io
import json
import re
from collections import defaultdict
from pathlib import Path

import torch

from plumbing.captions import without_spaced_stop
from plumbing.errors import Refused, need, warn
from plumbing.files import reading

SPLIT = 'karpathy_split'  # a key in the json of pairs that came from Karpathy's list

# --- 1. Published lists ----------------------------------------------------------------------------------------------

def published_captions(coco, karpathy, flickr, images, split):
    """The images and captions of COCO's folder, or else of Karpathy's list or the released code's flickr30k_val.json,
    [{"image": path, "caption": [five]}, ...] -> paths, and captions and owner as in `with_owners`. images: the folder
    of the images (that of the list, if none is given)."""
    listing = Path(karpathy or flickr or f'{coco}/annotations/captions_val2017.json')
    folder = Path(coco, 'images/val2017') if coco else images or listing.parent
    key = 'captions' if karpathy else 'caption'
    needed = {'image', key, SPLIT} if karpathy else {'image', key}
    pools = defaultdict(list)   # {path of an image: its captions}; an image may have several rows
    for row in read_rows(listing):
        need(row.keys() >= needed and isinstance(row['image'], str),
             f"a row of {listing} has the keys {', '.join(row)}; it needs image, a name, and {key}")
        if not karpathy or row[SPLIT] == split:
            found = row[key]
            pools[Path(folder, row['image'])] += found if isinstance(found, list) else [found]
    chosen = f' of the split {split}' if karpathy else ''
    need(pools, f'{listing} lists no image{chosen}; see --help')
    paths = list(pools)
    captions, owner = with_owners(pools.values(), lambda i: f'{paths[i]}, listed in {listing},')
    return paths, captions, owner


# --- 2. Captions and their owners ------------------------------------------------------------------------------------

def has_caption(value):
    """Whether a string, or an item of a list, is not blank. What is not text counts, too: with_owners refuses it."""
    items = value if isinstance(value, list) else [value]
    return any(str(item or '').strip() for item in items)


def with_owners(pools, name):
    """For each image its captions, a string or a list -> all captions in one list, and owner (captions,), the image
    that each belongs to. An image is Refused if it has no caption, or one that is not text; name(i) is what the message
    calls image i. A final ' .' is taken off, as in training."""
    captions = []
    owner = []
    for i, pool in enumerate(pools):
        if not has_caption(pool):   # the name is looked up only here, because that may cost a read
            raise Refused(f'{name(i)} has no caption; give it one, or take the image out')
        for caption in pool if isinstance(pool, list) else [pool]:
            if not isinstance(caption, str):
                raise Refused(f'{name(i)} has a caption that is not text: {str(caption)[:80]}; '
                              'mend it, or take it out')
            if caption.strip():
                captions.append(without_spaced_stop(caption))
                owner.append(i)
    return captions, torch.tensor(owner)


# --- 3. Rows of any table --------------------------------------------------------------------------------------------

def karpathy_row(image):
    """An image of Karpathy's dataset_coco.json and the like -> row."""
    name = image['filename']
    if image.get('filepath'):           # COCO's images lie in two folders
        name = f"{image['filepath']}/{name}"
    captions = [sentence['raw'] for sentence in image['sentences']]
    return {'image': name, 'captions': captions, SPLIT: image['split']}


def rows_of_json(text):
    """JSON lines, a list of objects, COCO's captions or Karpathy's list -> rows."""
    decoder = json.JSONDecoder(parse_constant={}.get)       # NaN, which is not JSON, becomes None
    values = []
    place = 0
    while place < len(text):
        value, place = decoder.raw_decode(text, place)
        values.append(value)
        place = re.compile(r'\s*').match(text, place).end()  # raw_decode does not skip white space
    if len(values) > 1:
        return values
    [whole] = values
    if isinstance(whole, list):
        return whole
    if 'annotations' in whole:                              # COCO's captions
        captions = defaultdict(list)                        # {the image's id: captions}
        for annotation in whole['annotations']:
            captions[annotation['image_id']].append(annotation['caption'])
        images = whole['images']
        return [{'image': image['file_name'], 'caption': captions[image['id']]} for image in images]
    if 'images' in whole and 'captions' not in whole:       # Karpathy's list
        return [karpathy_row(image) for image in whole['images']]
    return values                                           # JSON lines with one line


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
    """The rows of a CSV, a TSV, or Flickr30k's table. The first line shows what the delimiter is."""
    first_line = text.partition('\n')[0]
    delimiter = max(',;\t|', key=first_line.count)
    quoting = csv.QUOTE_MINIMAL
    if delimiter == '\t' or '| ' in first_line:     # a TSV, Flickr30k's table: a caption may begin with a "
        quoting = csv.QUOTE_NONE
    rows = list(table_rows(io.StringIO(text), path, delimiter=delimiter, quoting=quoting, skipinitialspace=True))
    short = [number for number, row in enumerate(rows, 1) if None in row.values()]
    if short:           # as one in Flickr30k's table, which lacks a delimiter
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
