"""Tables of images and captions: rows of JSON, CSV or TSV, and the lists that COCO, Karpathy and Flickr30k publish."""
import csv
import io
import json
import re
from collections import defaultdict
from pathlib import Path

import torch

from plumbing.captions import without_spaced_stop
from plumbing.errors import Refused, need
from plumbing.files import field, read_json

SPLIT = 'karpathy_split'  # a key in the json of pairs that came from Karpathy's list

# The next two functions return the rows of a published list, for eval.py and for extras.prepare, which packs them. A
# list of another form is refused, and the error names its file, `path`.

def coco_rows(listing, path):
    """COCO's captions -> [(name of an image, its captions), ...]."""
    captions = defaultdict(list)                                    # {the image's id: captions}
    for annotation in field(listing, 'annotations', path, list):
        image_id = field(annotation, 'image_id', path, (int, str))
        captions[image_id].append(field(annotation, 'caption', path))
    rows = []
    for image in field(listing, 'images', path, list):
        image_id = field(image, 'id', path, (int, str))
        rows.append((field(image, 'file_name', path, str), captions[image_id]))
    return rows


def karpathy_rows(listing, path):
    """Karpathy's dataset_coco.json and the like -> [(split, name of an image, its captions), ...]."""
    rows = []
    for image in field(listing, 'images', path, list):
        split = field(image, 'split', path, str)
        name = field(image, 'filename', path, str)
        if image.get('filepath'):                                   # COCO's images lie in two folders
            name = f"{field(image, 'filepath', path, str)}/{name}"
        sentences = field(image, 'sentences', path, list)
        rows.append((split, name, [field(sentence, 'raw', path) for sentence in sentences]))
    return rows


# The three lists as eval.py takes them: each function returns [(path of an image, its captions), ...]. images: the
# folder of the images; if none is given, they are looked for next to the list.

def read_coco(folder):
    """COCO's folder, with images/val2017 and annotations/captions_val2017.json."""
    path = Path(folder, 'annotations/captions_val2017.json')
    rows = coco_rows(read_json(path), path)
    return [(Path(folder, 'images/val2017', name), captions) for name, captions in rows]


def read_karpathy(path, images, split):
    """One split of Karpathy's list."""
    folder = images or Path(path).parent
    rows = karpathy_rows(read_json(path), path)
    return [(Path(folder, name), captions) for part, name, captions in rows if part == split]


def read_flickr(path, images):
    """The released code's flickr30k_val.json: [{"image": path, "caption": [five]}, ...]."""
    folder = images or Path(path).parent
    listing = read_json(path)
    need(isinstance(listing, list), f'{path} is not a list of images and captions; see --help')
    captions = defaultdict(list)            # {path of an image: its captions}; an image may have several items
    for item in listing:
        caption = field(item, 'caption', path)
        more = caption if isinstance(caption, list) else [caption]
        captions[Path(folder, field(item, 'image', path, str))] += more
    return list(captions.items())


def has_caption(value):
    """Whether a string, or an item of a list, is not blank. What is not text counts, too: with_owners refuses it."""
    items = value if isinstance(value, list) else [value]
    return any(str(item or '').strip() for item in items)


def with_owners(pools, name):
    """For each image its captions, a string or a list -> all captions in one list, and owner (captions,), the image
    that each belongs to.

    name(i): what messages call image i. An image is Refused if it has no caption, or one that is not text. A final ' .'
    is taken off, as in training.
    """
    captions = []
    owner = []
    for i, pool in enumerate(pools):
        usable = []
        for caption in pool if isinstance(pool, list) else [pool]:
            if not isinstance(caption, str):
                raise Refused(f'{name(i)} has a caption that is not text: {str(caption)[:80]}; '
                              'mend it, or take it out')
            if caption.strip():
                usable.append(without_spaced_stop(caption))
        if not usable:
            raise Refused(f'{name(i)} has no caption; give it one, or take the image out')
        captions += usable
        owner += [i] * len(usable)
    return captions, torch.tensor(owner)


def published_captions(coco, karpathy, flickr, images, split):
    """Whichever of the three lists is given -> the paths of its images, and captions and owner as in `with_owners`."""
    if coco:
        pairs = read_coco(coco)
    elif karpathy:
        pairs = read_karpathy(karpathy, images, split)
    else:
        pairs = read_flickr(flickr, images)
    listing = coco or karpathy or flickr
    chosen = f' of the split {split}' if karpathy else ''
    need(pairs, f'{listing} lists no image{chosen}; see --help')
    paths = [path for path, _ in pairs]
    pools = [pool for _, pool in pairs]

    def name(i):
        return f'{paths[i]}, listed in {listing},'

    captions, owner = with_owners(pools, name)
    return paths, captions, owner


# Rows of any table, for extras.prepare and extras.pairs.

def json_values(text):
    """All JSON values in a text, one after another. JSON has one, JSON lines have one per line."""
    decoder = json.JSONDecoder(parse_constant={}.get)       # NaN, which is not JSON, becomes None
    values = []
    place = 0
    while place < len(text):
        value, place = decoder.raw_decode(text, place)
        values.append(value)
        place = re.compile(r'\s*').match(text, place).end()  # raw_decode does not skip white space
    return values


def rows_of_json(text, path):
    """JSON lines, a list of objects, an object of objects (SugarCrepe), COCO's captions or Karpathy's list -> rows."""
    values = json_values(text)
    whole = values[0]
    if len(values) > 1:
        return values
    if isinstance(whole, list):
        return whole
    images = whole.get('images')
    if 'annotations' in whole:
        return [{'image': name, 'caption': captions}
                for name, captions in coco_rows(whole, path)]
    if isinstance(images, list) and images and isinstance(images[0], dict):
        return [{'image': name, 'captions': captions, SPLIT: split}
                for split, name, captions in karpathy_rows(whole, path)]
    if all(isinstance(value, dict) for value in whole.values()):
        return list(whole.values())
    return values                       # JSON lines with one line


def table_rows(file, path, **form):
    """The rows of an open CSV or TSV, as dicts. A quotation mark that nothing closes is Refused, with its line, because
    it would swallow all rows up to the next one."""
    reader = csv.DictReader(file, strict=True, **form)
    line = 1
    try:
        names = [name for name in reader.fieldnames or [] if name.strip()]  # of the first line
        for name in set(names):
            need(names.count(name) == 1, f'{path} has several columns called {name}; '
                 'give an image with several captions several rows')
        line = reader.line_num + 1
        for row in reader:
            yield row
            line = reader.line_num + 1
    except csv.Error as error:
        raise Refused(f'{path} cannot be read from line {line} on ({error}); '
                      'close the quotation mark there, or double it') from None


def rows_of_table(text, path):
    """The rows of a CSV, a TSV, or Flickr30k's table. The first line shows what the delimiter is."""
    first_line = text.partition('\n')[0]
    delimiter = csv.Sniffer().sniff(first_line, ',;\t|').delimiter
    # Neither a TSV nor Flickr30k's table, with its '| ', has quoting: a caption may begin with a quotation mark.
    unquoted = delimiter == '\t' or '| ' in first_line
    quoting = csv.QUOTE_NONE if unquoted else csv.QUOTE_MINIMAL
    return list(table_rows(io.StringIO(text), path, delimiter=delimiter, quoting=quoting,
                           skipinitialspace=True))


def read_rows(path):
    """The rows of a JSONL, JSON, CSV or TSV file, as dicts. The content says which it is, because names vary:
    Flickr8k's captions.txt is a CSV. Any other file is Refused; the message names the file and, if there is one, the
    row."""
    try:
        text = Path(path).read_text(encoding='utf-8-sig')
        if text.lstrip().startswith(('{', '[')):
            rows = rows_of_json(text.strip(), path)
        else:
            rows = rows_of_table(text, path)
    except UnicodeDecodeError as error:
        line = error.object.count(b'\n', 0, error.start) + 1
        raise Refused(f'{path} is not UTF-8 (line {line}); save it as UTF-8, '
                      'in Excel as the type CSV UTF-8') from None
    except (OSError, json.JSONDecodeError, csv.Error) as error:
        raise Refused(f'{path} cannot be read as JSONL, JSON, CSV or TSV ({error!r}); '
                      'docs/data.md shows what a table looks like') from None
    need(rows, f'{path} has no rows')
    for number, row in enumerate(rows, 1):
        need(isinstance(row, dict), f'row {number} of {path} is not an object with names for its values')
        need(None not in row, f'row {number} of {path} has more fields than the first; '
             'put texts that hold the delimiter in quotes')
    return rows
