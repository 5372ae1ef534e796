"""Published lists of images and captions: COCO's, Karpathy's, and the released code's list of Flickr30k."""
from collections import defaultdict
from pathlib import Path

import torch

from plumbing.captions import without_spaced_stop
from plumbing.errors import Refused, need
from plumbing.files import field, read_json

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
