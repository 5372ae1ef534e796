"""Zero-shot evaluation of a checkpoint, search, and pictures of what it attends to.

    python eval.py retrieval CKPT --shards runs/scenes/val        or --coco DIR, or --flickr flickr30k_val.json
    python eval.py retrieval CKPT --karpathy dataset_coco.json --split test --images DIR
    python eval.py classify CKPT --shards runs/scenes/val         the dominant and the small object of each scene
    python eval.py classify CKPT --dataset dtd --root DIR         a set of torchvision.datasets by name; or --folder DIR
    python eval.py segment CKPT --images DIR --masks DIR --classes voc.txt --benchmark voc21 --csa --save DIR
    python eval.py pairs CKPT --items items.jsonl                 hard negatives; or --suppression DIR with probes.json
    python eval.py attend CKPT --image a.jpg --text "a red star" "a small blue ring" --out attention.png
    python eval.py attend CKPT --shards runs/scenes/val           how often attention falls on the named object
    python eval.py search CKPT --images DIR "a red star"          ranks the images of a folder; or --like a.jpg
    python eval.py export CKPT OUT.pt                             a state dict that open_clip loads

CKPT is ours (runs/.../last.pt), a released cosmos_vitb*.pt, or an open_clip ViT state dict. Scores come from the
teacher, the averaged weights, unless --weights student. Features are float32 of unit length, scores their products.
"""
import contextlib
import csv
import hashlib
import inspect
import io
import json
import math
import os
import re
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from torchvision.transforms import v2
from tqdm import tqdm

from cosmos import COSMOS, Config, from_openclip, to_openclip, unit
from data import Parser, Preprocess, Shards, Tokenizer, cli, normalize, upright

# --- 1. Files and checkpoints ----------------------------------------------------------------------------------------

IMAGE_KINDS = '.jpg', '.jpeg', '.png', '.webp'


def need(condition, message):
    if not condition:
        raise ValueError(message)


@contextlib.contextmanager
def reading(path):
    """Errors in reading and taking apart the file at `path` become a ValueError that names it."""
    try:
        yield
    except (OSError, UnicodeError, json.JSONDecodeError, csv.Error,
            LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f'{path} cannot be read as this command expects ({type(error).__name__}: {error}); see README '
                         'and --help') from None


def read_json(path, *keys):
    """The JSON at `path`, an object with `keys` where any are named; else ValueError."""
    with reading(path):
        value = json.loads(Path(path).read_text(encoding='utf-8-sig'))  # with or without a byte order mark
    for key in keys:
        need(isinstance(value, dict) and key in value, f"{path} has no '{key}'; is it the file that --help describes?")
    return value


def read_lines(path):
    """The lines of a text file that are not blank, or the items of a JSON list."""
    with reading(path):
        text = Path(path).read_text(encoding='utf-8-sig')
        lines = json.loads(text) if text.lstrip()[:1] == '[' else text.splitlines()
        lines = [line.strip() for line in lines if line.strip()]
    need(lines, f'{path} holds no lines of text')
    return lines


def read_image(file, name=None):
    """A path, or an open file and its name -> PIL image, pixels as stored. ValueError names what is no image."""
    try:
        image = Image.open(file)
        image.load()
        return image
    except Exception as error:                                          # decoders raise what they like
        raise ValueError(f'{name or file} is no readable image ({error})') from None


def read_picture(file, name=None):
    """`read_image` as training sees it: upright, and 16 bits of grey scaled to 8."""
    image = read_image(file, name)
    try:
        return upright(image)
    except Exception as error:                                          # Pillow's SyntaxError, for broken EXIF
        raise ValueError(f'{name or file} is no readable image ({error})') from None


def images_in(folder):
    """Paths of the images in a folder and its subfolders, sorted; hidden files are left out."""
    return [path for path in sorted(Path(folder).rglob('*')) if path.suffix.lower() in IMAGE_KINDS and path.is_file()
            and not any(part.startswith('.') for part in path.relative_to(folder).parts)]


def read_checkpoint(path):
    """A file of tensors and plain values. Anything that would have to execute code to load is refused (ValueError)."""
    need(Path(path).exists(), f'checkpoint {path} does not exist')
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:                                          # of many kinds, for torn and for other files
        reason = (str(error) or 'it ends too early').splitlines()[0][:120]
        if Path(path).is_file():
            with open(path, 'rb') as file:                              # 'P' as in PK of a zip, 0x80 of a pickle
                reason = reason if file.read(1) in (b'P', b'\x80', b'') else 'perhaps a web page or a git-lfs pointer'
        raise ValueError(f'{path} is no checkpoint of tensors and plain values ({reason}); where you trust it, '
                         'convert it: torch.save(torch.load(OLD, weights_only=False)[...], NEW)') from None


def infer_config(state):
    """Config of released or open_clip weights, from their shapes: towers have heads 64 wide, cross-attention has 8."""
    shape = state['visual.conv1.weight'].shape
    width, patch = shape[0], shape[3]
    layers = lambda prefix: len({key.split('resblocks.')[1].split('.')[0] for key in state if key.startswith(prefix)})
    context_length, text_width = state['positional_embedding'].shape
    grid = math.isqrt(len(state['visual.positional_embedding']) - 1)    # one row is the class token's
    return Config(embed_dim=state['text_projection'].shape[1], image_size=grid * patch, patch_size=patch,
                  local_image_size=96 // patch * patch or patch, vision_width=width,
                  vision_heads=width // (80 if width == 1280 else 64),                  # ViT-H's are 80 wide
                  vision_layers=layers('visual.transformer.'), text_layers=layers('transformer.'),
                  text_width=text_width, text_heads=text_width // 64, context_length=context_length,
                  vocab_size=len(state['token_embedding.weight']),
                  cross_heads=8 if 'image_token_mapping.weight' in state else 0)


def load_weights(model, state, path):
    """Strictly: every name and shape must fit, or ValueError lists what is missing, unexpected and of another shape."""
    own, shape = model.state_dict(), lambda value: tuple(getattr(value, 'shape', [type(value).__name__]))
    problems = {'missing': [key for key in own if key not in state],
                'unexpected': [key for key in state if key not in own],
                'of another shape': [f'{key} {shape(state[key])}, not {shape(own[key])}' for key in own
                                     if key in state and shape(state[key]) != shape(own[key])]}
    told = [f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for kind, keys in problems.items() if keys]
    need(not told, f'{path} does not fit this model: ' + '; '.join(told))
    model.load_state_dict(state)


def load(path, weights='teacher', config=None, vocab=None):
    """-> (model in eval mode, tokenizer, preprocess: PIL image -> (3, S, S)).
    path: our checkpoint, a released one (dict with 'student' and 'teacher'), or an open_clip state dict; `module.` and
    `_orig_mod.` prefixes are stripped. Where there is no teacher the student is taken: model.origin tells which it was.
    `config` is needed only where heads are not 64 wide; `vocab` goes to Tokenizer.clip."""
    saved = read_checkpoint(path)
    need(isinstance(saved, dict), f'{path} holds a {type(saved).__name__}, not a state dict')
    origin = next((name for name in (weights, 'student', 'state_dict') if name in saved), 'state dict')
    state = saved.get(origin, saved)
    need(isinstance(state, dict) and all(isinstance(key, str) for key in state), f'{path} holds no names of weights')
    state = {re.sub(r'^((module|_orig_mod)\.)+', '', key): value for key, value in state.items()}
    if 'merges' in saved:                                               # ours
        with reading(path):
            config = Config(**saved['config'])
            tokenizer = Tokenizer(saved['merges'], config.context_length)
    elif 'input_resolution' in state:                                   # NB: they would load, and score low unnoticed
        raise ValueError(f"{path} holds OpenAI's weights, which need QuickGELU; this model has GELU: take LAION's")
    elif 'visual.class_embedding' in state and 'positional_embedding' in state:
        with reading(path):
            config = config or infer_config(state)
        state, tokenizer = from_openclip(state), Tokenizer.clip(vocab, config.context_length)
    else:
        raise ValueError(f"{path} holds no weights of this model (its keys: {', '.join(map(str, list(saved)[:5]))}); "
                         'give a checkpoint of train.py, a released cosmos_vitb*.pt or an open_clip ViT state dict')
    model = COSMOS(config)
    load_weights(model, state, path)
    broken = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    need(not broken, f"{path} holds NaN or infinity in {', '.join(broken[:2])}; take an earlier checkpoint")
    model.origin = origin
    return model.eval(), tokenizer, Preprocess(config.image_size)


def write_tensors(state, path):
    """torch.save, whole or not at all."""
    partial = Path(f'{path}.{os.getpid()}.partial')
    try:
        torch.save(state, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:                            # RuntimeError: torch's, for a missing folder
        partial.unlink(missing_ok=True)
        raise ValueError(f'{path} cannot be written ({str(error).splitlines()[0]})') from None


def export(model, path):
    """Write the towers and the scale under open_clip's names. It has no place for COSMOS's heads: they stay behind."""
    heads = ('image_cross.', 'text_cross.', 'image_tokens.', 'text_tokens.', 'distill_logit_scale')
    state = to_openclip({key: value for key, value in model.state_dict().items() if not key.startswith(heads)})
    write_tensors(state, path)
    return {'tensors': len(state), 'parameters': sum(value.numel() for value in state.values()), 'file': str(path)}


# --- 2. Features -----------------------------------------------------------------------------------------------------

def read_batch(source, preprocess, numbers):
    """Images by number of a list of paths, of Shards or of a torchvision set -> pixels (B, 3, S, S), labels (B,) or -1,
    and a sentence on each file that is no image; its pixels are NaN."""
    pixels, labels, problems = [], [], []
    for i in numbers:
        label = -1
        try:
            if isinstance(source, torchvision.datasets.VisionDataset):
                image, label = source[i]
            else:
                image = shard_image(source, i) if isinstance(source, Shards) else read_picture(source[i])
            pixels.append(preprocess(image))
        except (OSError, ValueError) as error:
            problems.append(f'image {i} of the set: {error}' if isinstance(error, OSError) else str(error))
            pixels.append(preprocess(Image.new('RGB', (8, 8))) * math.nan)
        labels.append(int(label))
    return torch.stack(pixels), torch.tensor(labels), problems


@torch.no_grad()
def embed_labelled(model, source, preprocess, batch=64, workers=0, skip=False):
    """Paths, Shards or a torchvision set -> (n, D) unit vectors and (n,) labels, -1 where there are none."""
    loader = torch.utils.data.DataLoader(range(len(source)), batch, num_workers=workers,
                                         collate_fn=partial(read_batch, source, preprocess))
    features, labels = [], []
    for images, some, problems in tqdm(loader, desc='images', disable=None, leave=False):
        for problem in problems:                        # told here: a worker's exception carries a traceback
            need(skip, problem)
            tqdm.write(f'left out   {problem}')
        features.append(unit(model.visual([images.to(model.logit_scale.device)])[0][0]).cpu())
        labels.append(some)
    return torch.cat(features), torch.cat(labels)


def embed_images(model, source, preprocess, batch=64, workers=0):
    """Paths or Shards -> (n, D) unit vectors on the CPU."""
    return embed_labelled(model, source, preprocess, batch, workers)[0]


@torch.no_grad()
def embed_texts(model, tokenizer, texts, batch=256):
    """n texts -> (n, D) unit vectors on the CPU. Neighbours in length share a batch, cut to its longest."""
    features = torch.empty(len(texts), model.config.embed_dim)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for first in tqdm(range(0, len(texts), batch), desc='texts', disable=None, leave=False):
        some = order[first:first + batch]
        tokens = tokenizer([texts[i] for i in some], model.config.context_length)
        longest = int(tokens.argmax(dim=1).max()) + 1                   # the end has the largest id
        features[some] = unit(model.text([tokens[:, :longest].to(model.logit_scale.device)])[0][0]).cpu()
    return features


# --- 3. Retrieval ----------------------------------------------------------------------------------------------------

def ranks(queries, targets, query_ids, target_ids, chunk=1024):
    """Rank from 1 of each query's best right target, (n,). Right targets have the query's id; they do not outrank it.
    A wrong target with an equal score counts as ahead: features that are all the same must not look perfect."""
    out = []
    for some in torch.arange(len(queries)).split(chunk):                # never the whole n x m matrix
        scores = queries[some] @ targets.T                              # (chunk, m)
        right = query_ids[some, None] == target_ids[None]
        best = scores.masked_fill(~right, -math.inf).amax(dim=1, keepdim=True)
        out.append(1 + (~(scores < best) & ~right).sum(dim=1))         # NaN, too, is ahead
    return torch.cat(out)


def retrieval(image_features, text_features, owner):
    """Zero-shot retrieval figures. owner (captions,): the image of each caption.
    An image has a hit if any of its captions does. R@K are fractions, ranks count from 1, chance is R@1 of guessing."""
    ids = torch.arange(len(image_features))
    figures = {'images': len(ids), 'captions': len(owner), 'chance': 1 / len(ids)}
    for name, found in (('image_to_text', ranks(image_features, text_features, ids, owner)),
                        ('text_to_image', ranks(text_features, image_features, owner, ids))):
        figures |= {f'{name}_R@{k}': (found <= k).float().mean().item() for k in (1, 5, 10)}
        figures |= {f'{name}_mean_rank': found.float().mean().item(), f'{name}_median_rank': float(np.median(found))}
    return figures


def with_owners(path, images, told):
    """told: [(number of an image, a caption of it)] -> (images, captions, owner (captions,))."""
    need(told and all(isinstance(caption, str) for _, caption in told), f'{path} lists no captions in words')
    return images, [caption for _, caption in told], torch.tensor([i for i, _ in told])


def coco_captions(root):
    """COCO layout -> (image paths, captions, owner)."""
    path = Path(root, 'annotations/captions_val2017.json')
    listing = read_json(path, 'images', 'annotations')
    with reading(path):
        number = {image['id']: i for i, image in enumerate(listing['images'])}
        return with_owners(path, [Path(root, 'images/val2017', image['file_name']) for image in listing['images']],
                           [(number[a['image_id']], a['caption']) for a in listing['annotations']])


def karpathy_captions(path, split, images):
    """Karpathy's dataset_coco.json or dataset_flickr30k.json -> (image paths, captions, owner) of one split."""
    root, listing = Path(images or Path(path).parent), read_json(path, 'images')['images']
    with reading(path):
        chosen = [image for image in listing if image.get('split') == split]
        need(chosen, f"{path} has no image of split '{split}'; Karpathy's are train, restval, val, test")
        return with_owners(path, [root / image.get('filepath', '') / image['filename'] for image in chosen],
                           [(i, sentence['raw']) for i, image in enumerate(chosen) for sentence in image['sentences']])


def flickr_captions(path, images):
    """The released code's flickr30k_val.json, [{"image", "caption": [five]}] -> (image paths, captions, owner)."""
    listing, root = read_json(path), Path(images or Path(path).parent)
    with reading(path):
        pools = [[item['caption']] if isinstance(item['caption'], str) else item['caption'] for item in listing]
        return with_owners(path, [root / item['image'] for item in listing],
                           [(i, caption) for i, pool in enumerate(pools) for caption in pool])


def record_of(shards, i):
    """The json of a held-out pair, and ValueError that says where it is broken."""
    try:
        return shards.record(i)
    except ValueError as error:
        raise ValueError(f'{shards.name(i)} cannot be read ({error})') from None


def shard_captions(shards):
    """-> (shards, captions, owner): what `captions` lists, else the one raw caption of a pair; whole, never split."""
    told = []
    for i in range(len(shards)):
        record = record_of(shards, i)
        found = next((record[key] for key in ('captions', 'raw_caption', 'caption', 'txt') if record.get(key)), None)
        texts = [text for text in (found if isinstance(found, list) else [found]) if isinstance(text, str)]
        told += [(i, text) for text in texts]
        if not texts:
            raise ValueError(f'{shards.name(i)} has no caption to retrieve by; held-out pairs need captions, '
                             'raw_caption, caption or a .txt')
    return with_owners(shards.paths[0], shards, told)


# --- 4. Zero-shot classification -------------------------------------------------------------------------------------

TEMPLATES = ('a photo of a {}', 'a picture of a {}', 'an image of a {}', 'there is a {} in the picture',
             'a small {}', 'a large {}')


def read_templates(path, default=TEMPLATES):
    """Prompts with {} for the class: a line each, or a JSON list. CLIP_benchmark's {c} will do too."""
    if not path:
        return default
    templates = [line.replace('{c}', '{}') for line in read_lines(path)]
    for template in templates:
        need(re.findall('[{}]', template) == ['{', '}'] and '{}' in template,
             f"template '{template}' of {path} needs one {{}} where the class goes")
    return templates


def class_vectors(model, tokenizer, names, templates=TEMPLATES):
    """Prompt ensemble: embed every template, normalise, average, normalise again. -> (len(names), D)"""
    prompts = [template.format(name) for name in names for template in templates]
    return unit(embed_texts(model, tokenizer, prompts).view(len(names), len(templates), -1).mean(dim=1))


def classify(image_features, vectors, labels):
    """image_features (n, D), vectors (K, D), labels (n,) -> top1, top5, mean of the classes' top1, counts, chance."""
    K = len(vectors)
    rank = ranks(image_features, vectors, labels, torch.arange(K))
    count, right = torch.bincount(labels, minlength=K), torch.bincount(labels[rank == 1], minlength=K)
    return {'images': len(labels), 'classes': K, 'chance': 1 / K, 'top1': (rank == 1).float().mean().item(),
            'top5': (rank <= 5).float().mean().item(), 'mean_per_class_top1': (right / count)[count > 0].mean().item()}


def torchvision_set(name, root, split=None, download=False):
    """A classification set of torchvision.datasets, by its class's name in any case -> (the set, class names, split).
    split: its name there (default: test, else val). ValueError for a set without class names, or not at `root`."""
    kinds = {kind.lower(): kind for kind in torchvision.datasets.__all__}
    need(name.lower() in kinds, f"torchvision.datasets has no '{name}'; it has {', '.join(sorted(kinds.values()))}")
    kind, failed = getattr(torchvision.datasets, kinds[name.lower()]), []
    # EMNIST passes on to its parent what it does not name: all that any of them takes.
    known = {key for base in kind.__mro__[:-1] for key in inspect.signature(base).parameters}
    need(split is None or 'split' in known or 'train' in known and split in ('train', 'test'),
         f"torchvision's {name} has {'the splits train and test' if 'train' in known else 'no splits'}, not '{split}'")
    for wanted in [split] if split else ['test', 'val']:
        given = {'split': wanted, 'train': wanted == 'train', 'download': download}
        try:
            source = kind(root, **{key: given[key] for key in given if key in known})
            labels = getattr(source, 'targets', None)
            if not isinstance(labels, list) or labels[:1] != [None]:
                break
            failed.append(f'its split {wanted} has no labels')          # Places365's test
        except (TypeError, ValueError, RuntimeError, OSError, AttributeError, ImportError) as error:
            failed.append((str(error) or type(error).__name__).splitlines()[0])
    else:                                                               # of 'test' and 'val' the first says more
        raise ValueError(f'torchvision cannot read {name} from {root} ({failed[0]}); try --download or another --split')
    names = getattr(source, 'classes', None) or getattr(source, 'categories', None)
    need(names, f"torchvision's {name} has no class names; use --folder with one folder per class")
    names = [name if isinstance(name, str) else name[0] for name in names]              # ImageNet: tuples of synonyms
    names = [re.sub(r'^/\w/', '', name) for name in names]                                              # Places365
    names = [re.sub(r'[_/]+', ' ', name).strip() for name in names]
    return source, names, wanted if known & {'split', 'train'} else 'all'


def folder_classes(root, classes=None, subset=None):
    """One folder per class, or labels.json [{"file", "class_id"}] and `classes` -> (paths, labels, names, templates).
    `classes` is a list of names, or {"classes": [{"id", "name", "noun_phrase"}], "subsets": {name: ids}, "templates"};
    for folders, {folder: name}. A thousand folders of WordNet ids have torchvision's names of ImageNet."""
    root = Path(root)
    if not (root / 'labels.json').exists():
        folders = sorted(p for p in root.glob('[!.]*') if p.is_dir())   # NB: .cache would be one class more to guess
        found = [(p, k) for k, folder in enumerate(folders) for p in sorted(folder.rglob('[!.]*')) if p.is_file()]
        need(found, f'{root} has neither one folder of images per class nor a labels.json')
        ids = [folder.name for folder in folders]
        names = [name.replace('_', ' ') for name in ids]
        if classes:
            names = list(map(read_json(classes, *ids).get, ids))
        elif all(re.fullmatch(r'n\d{8}', name) for name in ids):
            need(len(ids) == 1000, f'{root} has {len(ids)} folders of WordNet ids, not all 1,000 of ImageNet; name '
                                   'them with --classes FILE, a JSON object of id: name')
            names = torchvision.models.ResNet18_Weights.DEFAULT.meta['categories']      # in the order of the ids
        return [path for path, _ in found], torch.tensor([k for _, k in found]), names, TEMPLATES
    need(classes, f'{root}/labels.json numbers its classes; name them with --classes FILE')
    listing = read_json(classes)
    with reading(classes):
        if isinstance(listing, list):
            listing = {'classes': [{'id': i, 'name': name} for i, name in enumerate(listing)]}
        names = {item['id']: item.get('noun_phrase') or item['name'] for item in listing['classes']}
        subsets = {None: names, **listing.get('subsets', {})}
        need(subset in subsets, f"{classes} has no subset '{subset}'; it has: {', '.join(list(subsets)[1:]) or 'none'}")
        number = {class_id: k for k, class_id in enumerate(subsets[subset])}
        named = [names[class_id] for class_id in number]
    with reading(root / 'labels.json'):
        chosen = [item for item in read_json(root / 'labels.json') if item['class_id'] in number]
        need(chosen, f'no image of {root}/labels.json is of a class in {classes}; are its ids the same?')
        return ([root / item['file'] for item in chosen], torch.tensor([number[item['class_id']] for item in chosen]),
                named, listing.get('templates') or TEMPLATES)


def objects_of(shards, i):
    """What the json of pair i lists as `objects`: dicts, {} for what is none; [] where it lists nothing."""
    listed = record_of(shards, i).get('objects')
    return [thing if isinstance(thing, dict) else {} for thing in listed] if isinstance(listed, list) else []


def listed_objects(shards, most=None):
    """[(pair, its k-th object, the object)] of shards as of data.py make, whose objects have name, role, negatives; of
    the first `most` pairs."""
    return [(i, k, thing) for i in range(len(shards))[:most] for k, thing in enumerate(objects_of(shards, i))
            if {'name', 'role', 'negatives'} <= thing.keys()]


def shard_image(shards, i):
    return read_picture(io.BytesIO(shards.image(i)), shards.name(i))


def scene(shards, i):
    """Pair i -> its image, its listed objects, and its KEY.mask.png as (h, w) numbers of these, or None."""
    image, listed, data = shard_image(shards, i), objects_of(shards, i), shards.mask(i)
    mask = None if data is None else np.array(read_image(io.BytesIO(data), f'the mask of {shards.name(i)}'))
    need(mask is None or mask.shape == image.size[::-1] and mask.max() <= len(listed),
         f'the mask of {shards.name(i)} does not number its {len(listed)} objects pixel by pixel')
    return image, listed, mask


def own_name_wins(objects, score):
    """score(pair, names) -> (len(names),). For each object: is its own name above the wrong ones listed for it?"""
    scores = (score(i, [thing['name'], *thing['negatives']]) for i, _, thing in objects)
    return [bool((some[0] > some[1:]).all()) for some in scores]


def probe_objects(image_features, objects, penalty=0.1):
    """Is it in the features, whatever texts find there? Own name against wrong ones as above, by a linear probe.
    objects: of one role. Ridge regression from image features to the words of their names, fitted on pairs of even
    number and asked about the odd ones, then the reverse; a name's score is the mean of its words'. So it cannot tell
    whose colour is whose where a pair has several. -> list of bool, [] where one half has no pair."""
    words = {word for _, _, thing in objects for name in (thing['name'], *thing['negatives']) for word in name.split()}
    number, hits = {word: k for k, word in enumerate(sorted(words))}, []
    spelt = lambda name: [number[word] for word in name.split()]
    target = torch.zeros(len(image_features), len(number))
    for i, _, thing in objects:
        target[i, spelt(thing['name'])] = 1
    pairs = torch.tensor(sorted({i for i, _, _ in objects}))
    for odd in (0, 1):
        fit, asked = pairs[pairs % 2 == odd], [thing for thing in objects if thing[0] % 2 != odd]
        if not len(fit):
            return []
        x = (image_features - image_features[fit].mean(dim=0)) / image_features[fit].std(dim=0, correction=0).add(1e-6)
        gram = x[fit].T @ x[fit] + penalty * len(fit) * torch.eye(x.shape[1])
        scores = x @ torch.linalg.solve(gram, x[fit].T @ (target[fit] - target[fit].mean(dim=0))) + target[fit].mean(0)
        hits += own_name_wins(asked, lambda i, names: torch.stack([scores[i, spelt(name)].mean() for name in names]))
    return hits


def classify_objects(model, tokenizer, image_features, shards, templates=TEMPLATES):
    """Feature suppression, measured: does an object's own name score above the wrong names listed for it?
    -> {role: {top1, chance, objects, probe_top1 of a linear probe}} over the objects of all scenes; {} where the shards
    list none. The small ones have `of_dominant` too, what they are above chance as a share of what the dominant are: 1
    would be no suppression, though small things are harder in any case."""
    objects, figures = listed_objects(shards), {}
    names = sorted({name for *_, thing in objects for name in [thing['name'], *thing['negatives']]})
    vectors = dict(zip(names, class_vectors(model, tokenizer, names, templates))) if names else {}
    score = lambda i, names: torch.stack([vectors[name] for name in names]) @ image_features[i]
    for role in dict.fromkeys(thing['role'] for *_, thing in objects):
        some = [item for item in objects if item[2]['role'] == role]
        figures[role] = {'top1': float(np.mean(own_name_wins(some, score))),
                         'chance': 1 / (1 + len(some[0][2]['negatives'])), 'objects': len(some)}
        probed = probe_objects(image_features, some)
        figures[role] |= {'probe_top1': float(np.mean(probed))} if probed else {}
    above = {role: figures[role]['top1'] - figures[role]['chance'] for role in figures}
    if above.get('dominant', 0) > 0 and 'small' in above:
        figures['small']['of_dominant'] = above['small'] / above['dominant']
    return figures


@torch.no_grad()
def pointing(model, tokenizer, preprocess, shards, most=300):
    """Where do maps of a named object point? For the objects of the first `most` pairs, by their masks -> {map: {role:
    figures}}. Maps: 'cross_attention', weights of C^I asked by "a NAME" (COSMOS only); 'cosine' of patches and caption.
    hit: the middle of the highest patch lies on the object. mass: share of the weight on it. Both by chance: its share
    of the area. others_...: the same for the scene's other objects. entropy of the weights, 1 for a uniform map. {}
    where the shards have no masks."""
    c, device, figures = model.config, model.logit_scale.device, {}
    cut = v2.Compose([v2.Resize(c.image_size, v2.InterpolationMode.NEAREST), v2.CenterCrop(c.image_size)])
    p = c.patch_size
    for i, some in groupby(listed_objects(shards, most), key=lambda item: item[0]):
        some, (image, _, mask) = list(some), scene(shards, i)
        if mask is None:
            continue
        mask = torch.from_numpy(np.array(cut(Image.fromarray(mask))))                           # as `preprocess` cuts
        own = torch.stack([mask == k + 1 for _, k, _ in some])                                      # (n, S, S)
        _, patches = model.visual([preprocess(image)[None].to(device)], keep=True)                  # (1, P, C)
        text, _ = model.encode_text(tokenizer([f"a {thing['name']}" for *_, thing in some]).to(device))     # (n, D)
        maps = {'cosine': unit(text) @ unit(patches @ model.visual.proj)[0].T}                      # (n, P)
        if c.cross_heads:
            keys = model.image_tokens(patches).expand(len(some), -1, -1)
            maps['cross_attention'] = model.image_cross.weights(text, keys)
        for name, weights in maps.items():
            weights, told = weights.float().cpu(), {}
            for which, masks in ('', own.float()), ('others_', ((mask > 0) & ~own).float()):
                middle, area = masks[:, p // 2::p, p // 2::p].flatten(1), masks.mean(dim=(1, 2))    # (n, P), (n,)
                hit = middle.gather(1, weights.argmax(dim=1, keepdim=True))[:, 0]
                told |= {f'{which}hit': hit, f'{which}hit_chance': area}
                if name == 'cross_attention':
                    mass = (weights * F.avg_pool2d(masks, p).flatten(1)).sum(dim=1)
                    told |= {f'{which}mass': mass, f'{which}mass_chance': area}
            if name == 'cross_attention':
                told['entropy'] = torch.special.entr(weights).sum(dim=1) / math.log(weights.shape[1])
            for k, (*_, thing) in enumerate(some):
                row = {key: value[k].item() for key, value in told.items()}
                figures.setdefault(name, {}).setdefault(thing['role'], []).append(row)
    return {name: {role: {'objects': len(rows)} | {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
                   for role, rows in roles.items()} for name, roles in figures.items()}


def evaluate(model, tokenizer, preprocess, shards):
    """All that held-out shards allow: retrieval; the dominant and the small object where they list objects; and where
    maps of them point, by their masks."""
    model.eval()
    _, captions, owner = shard_captions(shards)
    image_features = embed_images(model, shards, preprocess)
    figures = {'retrieval': retrieval(image_features, embed_texts(model, tokenizer, captions), owner)}
    figures |= classify_objects(model, tokenizer, image_features, shards)
    maps = pointing(model, tokenizer, preprocess, shards)
    return figures | ({'pointing': maps} if maps else {})


# --- 5. Zero-shot segmentation ---------------------------------------------------------------------------------------

class Settings(NamedTuple):
    """How to segment. Each is a flag of `segment`, with its comment as help."""
    size: int                           # short side of the image in pixels (default: 1.5 windows)
    scale: float                        # scale of the cosines before the softmax (default: 40)
    probability: float                  # pixels whose best class has less become class 0 (default: 0)
    area: float                         # classes with no more than this share of the foreground vanish (default: 0)
    reduce_zero_label: bool             # label 0 of the masks is ignored, 1 becomes class 0
    window: int = 224                   # side of the window (default: the model's image)
    stride: int = 112                   # step of the window (default: half of it)
    csa: bool = False                   # correlative self-attention in the last block


BENCHMARKS = {      # size, scale, probability, area, reduce_zero_label: of the released code, after SCLIP
    'voc21': (336, 65, 0.1, 0.1, False), 'context60': (336, 50, 0.1, 0, False), 'coco-object': (336, 50, 0.1, 0, False),
    'voc20': (336, 40, 0, 0, True), 'cityscapes': (560, 40, 0, 0, False), 'context59': (336, 40, 0, 0, True),
    'ade20k': (336, 40, 0, 0, True), 'coco-stuff': (448, 40, 0, 0, False)}
IGNORE = 255                                                            # a mask's pixels that count nowhere


@torch.no_grad()
def window_scores(model, pixels, vectors, window, stride, csa=False):
    """pixels (3, H, W), vectors (Q, D) -> (Q, H, W): cosines of patches and texts, averaged over sliding windows.
    Every window is scored alone, its grid of patches made bilinear to its pixels; the last ones end at the border."""
    _, H, W = pixels.shape
    starts = lambda length: [min(s, length - window) for s in range(0, length - window + stride, stride)]
    corners = [(y, x) for y in starts(H) for x in starts(W)]
    total, count = pixels.new_zeros(len(vectors), H, W), pixels.new_zeros(H, W)
    for first in range(0, len(corners), 16):
        some = corners[first:first + 16]
        dense = model.encode_dense(torch.stack([pixels[:, y:y + window, x:x + window] for y, x in some]), csa)
        for (y, x), grid in zip(some, dense @ vectors.T):               # (window / p, window / p, Q)
            scores = F.interpolate(grid.permute(2, 0, 1)[None], (window, window), mode='bilinear')[0]
            total[:, y:y + window, x:x + window] += scores
            count[y:y + window, x:x + window] += 1
    return total / count


def segment_image(model, image, vectors, counts, o):
    """One image -> (h, w) int64 class of each pixel. vectors (Q, D) of all names, counts: how many each class has.
    Steps of clip_segmentor.py:113-276 of the released code: softmax over all names at o.scale, of a class's names the
    best; classes under o.area of the foreground vanish; pixels under o.probability become class 0."""
    width, height = image.size
    zoom = max(min(o.size / min(image.size), 2048 / max(image.size)), o.window / min(image.size))
    small = image.convert('RGB').resize((round(width * zoom), round(height * zoom)), Image.BILINEAR)
    pixels = normalize(torch.from_numpy(np.array(small)).permute(2, 0, 1).to(model.logit_scale.device))
    scores = window_scores(model, pixels, vectors, o.window, o.stride, o.csa)
    shares = (o.scale * F.interpolate(scores[None], (height, width), mode='bilinear')[0]).softmax(dim=0)
    best = torch.stack([names.amax(dim=0) for names in shares.split(counts)])           # (classes, h, w)
    if o.area:
        count = torch.bincount(best.argmax(dim=0).flatten(), minlength=len(best))
        best[1:][count[1:] <= o.area * count[1:].sum()] = 0
    most, labels = best.max(dim=0)
    return labels.masked_fill(most < o.probability, 0).cpu()


def confusion(truth, labels, classes):
    """truth, labels: integer arrays of one shape -> (classes, classes) counts, rows are the truth; IGNORE left out."""
    seen = truth != IGNORE
    return torch.bincount(truth[seen] * classes + labels[seen], minlength=classes ** 2).view(classes, classes)


def segmentation_figures(matrix, names):
    """mIoU over classes that occur in truth or prediction, pixel accuracy, and what class 0 everywhere would give."""
    hit, truth, found = matrix.diag().double(), matrix.sum(dim=1).double(), matrix.sum(dim=0).double()
    iou, everything = hit / (truth + found - hit), truth.sum()          # NaN for a class that occurs nowhere
    return {'mIoU': iou.nanmean().item(), 'pixel_accuracy': (hit.sum() / everything).item(),
            'all_class_0_mIoU': (truth[0] / everything / (truth > 0).sum()).item(),
            'all_class_0_pixel_accuracy': (truth[0] / everything).item(), 'classes': int((truth > 0).sum()),
            'IoU': {name: value for name, value in zip(names, iou.tolist()) if value == value}}


def read_mask(path, size, classes, reduce_zero_label=False):
    """A PNG of class numbers, grey or palette, of `size` (w, h) -> (h, w) int64, IGNORE where it does not count."""
    mask = read_image(path)
    values = torch.from_numpy(np.array(mask).astype(np.int64))
    need(values.ndim == 2, f'mask {path} has colours ({mask.mode}), not class numbers; save it as grey or palette PNG')
    need(mask.size == size, f'mask {path} is {mask.width} x {mask.height} pixels, its image {size[0]} x {size[1]}')
    if reduce_zero_label:
        values = torch.where((values == 0) | (values == IGNORE), IGNORE, values - 1)
    most = int(values.masked_fill(values == IGNORE, 0).max())
    need(most < classes, f'mask {path} has label {most}, the class file names 0 to {classes - 1}')
    return values


def mask_pairs(images, masks, image_suffix='', mask_suffix='', listing=None):
    """[(image path, mask path)] of equal stems, suffixes cut off; of those in `listing`, a stem a line, if given."""
    def by_stem(paths, suffix):
        found = {}
        for path in (path for path in paths if path.stem.endswith(suffix)):
            other = found.setdefault(path.stem.removesuffix(suffix), path)
            need(other is path, f'{other} and {path} have one name; rename one, or give folders apart')
        return found
    pictures, found = by_stem(images_in(images), image_suffix), by_stem(sorted(Path(masks).rglob('*.png')), mask_suffix)
    stems = dict.fromkeys(read_lines(listing)) if listing else found
    need(stems, f"{listing or masks} names no mask '*{mask_suffix}.png'; see --mask-suffix")
    for stem in stems:
        mask = found.get(stem, Path(masks, f'{stem}{mask_suffix}.png'))
        need(stem in pictures and stem in found, f'{mask} and an image of that name in {images} are not both there; '
             'see --image-suffix')
    return [(pictures[stem], found[stem]) for stem in stems]


def scene_masks(shards, classes):
    """(name, image, (h, w) truth) of shards with a KEY.mask.png that numbers their `objects`, as of data.py make.
    classes: lists of names. An object is of the first class with one that is part of its own name, as 'red' of 'red
    star', and is ignored where there is none; what is no object is class 0."""
    for i in tqdm(range(len(shards)), desc='images', disable=None, leave=False):
        image, listed, mask = scene(shards, i)
        need(listed and mask is not None, f'{shards.name(i)} has no objects with a KEY.mask.png; see README')
        owns = lambda thing, names: any(f' {name} ' in f" {thing.get('name')} " for name in names)
        numbers = [next((k for k, names in enumerate(classes) if owns(thing, names)), IGNORE) for thing in listed]
        yield f'{i:06d}', image, torch.tensor([0, *numbers])[torch.from_numpy(mask).long()]


def overlay(image, labels, names, path):
    """PNG of an image under its classes in colours, with a legend of name and share; 'background' stays as it is."""
    palette = [ImageColor.getrgb(f'hsv({k * 222.5 % 360},85%,100%)') for k in range(len(names))]    # neighbours differ
    mixed = Image.blend(image.convert('RGB'), Image.fromarray(np.uint8(palette)[labels]), 0.65)
    if names[0].lower() == 'background':
        mixed.paste(image, mask=Image.fromarray(np.uint8(255 * (labels == 0))))
        palette[0] = 'white'
    present, count = np.unique(labels, return_counts=True)
    canvas = Image.new('RGB', (image.width + 220, max(image.height, 22 * len(present) + 8)), 'white')
    canvas.paste(mixed)
    draw = ImageDraw.Draw(canvas)
    for row, i in enumerate(count.argsort()[::-1]):
        x, y, k = image.width + 8, 4 + 22 * row, present[i]
        draw.rectangle((x, y, x + 16, y + 16), fill=palette[k], outline='black')
        draw.text((x + 22, y), f'{names[k][:22]} {count[i] / labels.size:.0%}', 'black', font_size=13)
    canvas.save(path)


# --- 6. Pairs: k images and k captions that differ in one thing ------------------------------------------------------

PAIR_LAYOUTS = {    # the keys that tell a row's layout: the row as images, captions, type
    ('images', 'captions'): lambda row: (row['images'], row['captions'], row.get('type')),                  # ours
    ('filename', 'caption', 'negative_caption'): lambda row: (                                              # SugarCrepe
        [row['filename']], [row['caption'], row['negative_caption']], None),
    ('pos_image_id', 'neg_image_id', 'sentence'): lambda row: (                                             # SVO-Probes
        [row['pos_image_id'], row['neg_image_id']], [row['sentence']],
        next((key for key in ('subj_neg', 'verb_neg', 'obj_neg') if str(row.get(key)).lower() == 'true'), None)),
    ('image_0', 'image_1', 'caption_0', 'caption_1'): lambda row: (                                         # Winoground
        [row['image_0'], row['image_1']], [row['caption_0'], row['caption_1']], row.get('tag')),
    ('Question ID', 'Type', 'Statement'): lambda row: (                             # MMVP-VLM, two rows are a 2 x 2
        [f"{row['Type']}/{row['Question ID']}"], [f"a photo of {row['Statement']}"], row['Type'])}


def read_pairs(path):
    """Items of a hard-negative test as (image names, captions, type). The right ones stand at the same position.
    JSONL, JSON or CSV; a row is ours, {"images": [...], "captions": [...], "type"}, or of a published layout."""
    kind, items = Path(path).suffix, []
    with reading(path):
        text = Path(path).read_text(encoding='utf-8-sig')
        rows = (list(csv.DictReader(io.StringIO(text))) if kind == '.csv' else json.loads(text) if kind != '.jsonl' else
                [json.loads(line) for line in text.split('\n') if line.strip()])         # see data.read_rows
        rows = list(rows.values()) if isinstance(rows, dict) else rows
        need(rows, f'{path} lists no items')
        for number, row in enumerate(rows, 1):
            read = next((read for keys, read in PAIR_LAYOUTS.items() if {*keys} <= row.keys()), None)
            need(read, f"item {number} of {path} has the keys {', '.join(map(str, row)) or '(none)'}; it needs images "
                       'and captions, or those of SugarCrepe, SVO-Probes, Winoground or MMVP-VLM')
            items.append(read(row))
        if read is PAIR_LAYOUTS['Question ID', 'Type', 'Statement']:
            pairs = (items[k:k + 2] for k in range(0, len(items), 2))
            items = [(sum((row[0] for row in two), []), sum((row[1] for row in two), []), two[0][2]) for two in pairs]
    for number, (images, captions, _) in enumerate(items, 1):
        need(isinstance(images, list) and isinstance(captions, list) and all(isinstance(c, str) for c in captions),
             f'item {number} of {path} needs a list of images and a list of captions in words')
        k, m = len(images), len(captions)
        need(k == m > 1 or min(k, m) == 1 < max(k, m),
             f'item {number} of {path} has {k} images and {m} captions; give k and k, k and 1, 1 and k')
    return items


def pair_hits(scores):
    """scores (k images, m captions), right ones at equal positions -> (image hits, text hits): one bool a question.
    Image hits: for each caption, is its image above all others? Text hits: the same with the roles exchanged. Empty
    where there is nothing to choose from. A tie is a miss."""
    def hits(scores):
        own, others = scores.diagonal(), len(scores) - 1
        return ((scores[:, :len(own)] < own).sum(dim=0) == others).tolist() if others else []
    return hits(scores), hits(scores.T)


def pair_scores(matrices):
    """Score matrices of items of one shape -> shares of items with all image, all text, and all questions right."""
    hits, (k, m), figures = list(map(pair_hits, matrices)), matrices[0].shape, {'items': len(matrices)}
    for name, choices, side in (('image', k, 0), ('text', m, 1)):
        if choices > 1:
            figures[f'{name}_score'] = float(np.mean([all(hit[side]) for hit in hits]))
            figures[f'{name}_chance'] = (1 / choices) ** min(k, m)
    if min(k, m) > 1:
        figures['group_score'] = float(np.mean([all(a + b) for a, b in hits]))
    return figures


def embed_items(model, tokenizer, preprocess, items, root, workers=0):
    """Items of `read_pairs` -> their score matrices. Every image and every caption is embedded once."""
    def locate(name):
        found = [Path(root, f'{name}{kind}') for kind in ('', *IMAGE_KINDS)]
        return next((path for path in found if path.is_file()), found[0])
    names = list(dict.fromkeys(str(name) for images, _, _ in items for name in images))
    texts = list(dict.fromkeys(text for _, captions, _ in items for text in captions))
    image = dict(zip(names, embed_images(model, [locate(name) for name in names], preprocess, workers=workers)))
    text = dict(zip(texts, embed_texts(model, tokenizer, texts)))       # caption: its (D,)
    return [torch.stack([image[str(name)] for name in images]) @ torch.stack([text[c] for c in captions]).T
            for images, captions, _ in items]


def suppression(model, tokenizer, preprocess, root, workers=0):
    """Feature suppression by root/probes.json: scenes A and B differ at the small object only, A and C at the big one.
    -> per role: how often a name of the object finds its scene of the two, with the standard error over probes, and how
    often scene A finds the name among nine others'."""
    path, figures = Path(root, 'probes.json'), {}
    probes = read_json(path)
    need(probes, f'{path} lists no probe')
    for role, other in (('dominant', 'C'), ('small', 'B')):
        with reading(path):
            asked = [(probe['images'], probe[f'{role}_query']) for probe in probes]
            scenes = [([image['A'], image[other]], [text['positive'], text['swap']], None) for image, text in asked]
            names = [([image['A']], [text['positive'], *text['negatives']], None) for image, text in asked]
        matrices = embed_items(model, tokenizer, preprocess, scenes + names, root, workers)
        share = np.array([np.mean(pair_hits(matrix)[0]) for matrix in matrices[:len(probes)]])
        named = pair_scores(matrices[len(probes):])
        figures[role] = {'probes': len(probes), 'scene_top1': float(share.mean()), 'scene_chance': 0.5,
                         'name_top1': named['text_score'], 'name_chance': named['text_chance']}
        if len(share) > 1:
            figures[role]['standard_error'] = float(share.std(ddof=1) / math.sqrt(len(share)))
    return figures


# --- 7. Attention pictures -------------------------------------------------------------------------------------------

def shade(grey):
    """A grey picture in dark blue over grey to yellow, readable by the colour-blind."""
    return ImageOps.colorize(grey, (0, 32, 77), (255, 234, 70), mid=(124, 123, 120))


@torch.no_grad()
def attention(model, tokenizer, preprocess, image, caption):
    """-> map (h, w) of C^I asked by the caption, and [(word, weight)] of C^T asked by the image, both scaled to [0, 1].
    Pieces of a word are summed. Start, end and padding are keys too, but no words: they are left out before scaling."""
    device, words, length = model.logit_scale.device, tokenizer.words(caption), model.config.context_length
    tokens = tokenizer([caption], length)
    patch_weights, token_weights = model.attention(preprocess(image)[None].to(device), tokens.to(device))
    ends = 1 + np.cumsum([pieces for _, pieces in words], dtype=int)    # position 0 is the start
    sums = [token_weights[0, end - pieces:end].sum().item() for end, (_, pieces) in zip(ends, words) if end < length]
    scaled = lambda x: (x - x.min()) / max(x.max() - x.min(), 1e-12)
    grid = patch_weights[0].unflatten(0, (math.isqrt(patch_weights.shape[1]), -1)).cpu().numpy()
    return scaled(grid), list(zip([word for word, _ in words], scaled(np.array(sums or [0.0]))))


def attention_picture(model, tokenizer, preprocess, image, captions, path, tile=224):
    """PNG of a row per caption: the image, the map of C^I over it, and the words shaded by C^T."""
    font, width, gap = ImageFont.load_default(15), 3 * tile + 200, 8
    canvas = Image.new('RGB', (width, len(captions) * (tile + gap) + gap + 22), 'white')
    draw = ImageDraw.Draw(canvas)
    view = ImageOps.fit(image.convert('RGB'), (tile, tile), Image.BICUBIC)      # what `preprocess` shows the model
    for row, caption in enumerate(captions):
        grid, words = attention(model, tokenizer, preprocess, image, caption)
        heat = shade(Image.fromarray(np.uint8(255 * grid)).resize((tile, tile), Image.BILINEAR))
        left, y = 2 * tile + 3 * gap, gap + row * (tile + gap)
        canvas.paste(view, (gap, y))
        canvas.paste(Image.blend(view, heat, 0.6), (2 * gap + tile, y))
        x = left
        for word, weight in words:
            length = int(draw.textlength(word, font)) + 8
            if x + length > width - gap:
                x, y = left, y + 26
            canvas.paste(shade(Image.new('L', (length, 22), int(255 * weight))), (x, y))
            draw.text((x + 4, y + 2), word, 'black' if weight > 0.5 else 'white', font)
            x += length + 3
    draw.text((gap, canvas.height - 22), 'image | where C^I looks for the caption | which words C^T reads for the '
              'image. Dark blue low, yellow high; start, end and padding left out.', 'black', font_size=12)
    canvas.save(path)
    return path


def attention_strip(image, columns, path, tile=112):
    """PNG of maps over training: a row a caption; the image, then a column a (label, {caption: map in [0, 1]})."""
    captions = list(columns[0][1])
    canvas = Image.new('RGB', ((tile + 4) * (len(columns) + 1) + 4, (tile + 24) * len(captions) + 24), 'white')
    draw, view = ImageDraw.Draw(canvas), ImageOps.fit(image.convert('RGB'), (tile, tile), Image.BICUBIC)
    for row, caption in enumerate(captions):
        y = 24 + row * (tile + 24)
        canvas.paste(view, (4, y))
        draw.text((4, y + tile + 2), f'"{caption}"', 'black', font_size=13)
        for k, (label, maps) in enumerate(columns, 1):
            grid = Image.fromarray(np.uint8(255 * np.array(maps[caption]))).resize((tile, tile), Image.BILINEAR)
            canvas.paste(Image.blend(view, shade(grid), 0.6), (4 + k * (tile + 4), y))
            draw.text((4 + k * (tile + 4), 4), label, 'black', font_size=13)
    canvas.save(path)


def naming_picture(model, tokenizer, image_features, shards, templates, path, scenes=3, tile=176):
    """PNG of the first scenes, and beside each the names to choose from for up to three objects, best first: bars are
    their cosines with the image, from the least to the most of the ten; the right name is green, or red if it loses."""
    groups = [list(some)[:3] for _, some in islice(groupby(listed_objects(shards), lambda item: item[0]), scenes)]
    canvas = Image.new('RGB', (tile + 12 + 200 * max(map(len, groups)), len(groups) * (tile + 8) + 8), 'white')
    draw = ImageDraw.Draw(canvas)
    for row, some in enumerate(groups):
        y, image = 8 + row * (tile + 8), shard_image(shards, some[0][0])
        canvas.paste(ImageOps.fit(image.convert('RGB'), (tile, tile), Image.BICUBIC), (6, y))
        for column, (pair, _, thing) in enumerate(some):
            names, x = [thing['name'], *thing['negatives']], tile + 14 + 200 * column
            scores = class_vectors(model, tokenizer, names, templates) @ image_features[pair]
            colour = (0, 140, 60) if scores.argmax() == 0 else (200, 30, 30)
            draw.text((x, y - 2), f"{thing['role']}: {thing['name']}", colour, font_size=12)
            for k, i in enumerate(scores.argsort(descending=True).tolist(), 1):
                length = 80 * float((scores[i] - scores.min()) / (scores.max() - scores.min()).clamp_min(1e-12))
                top, shown = y + 16 * k, colour if i == 0 else (150, 150, 150)
                draw.rectangle((x, top + 2, x + 1 + length, top + 12), shown)
                draw.text((x + 86, top), names[i], shown if i == 0 else 'black', font_size=12)
    canvas.save(path)


# --- 8. Search -------------------------------------------------------------------------------------------------------

def folder_features(model, preprocess, folder, workers=0):
    """All images under a folder -> (paths, (n, D) features), unreadable ones left out and named.
    Kept in FOLDER.features.pt beside it, per file with size and time: a second call embeds only what is new or changed.
    Other weights start over."""
    paths, cache, known = images_in(folder), Path(f'{Path(folder).resolve()}.features.pt'), {}
    need(paths, f'{folder} holds no jpg, jpeg, png or webp image')
    weights = hashlib.sha1(model.visual.proj.detach().cpu().numpy().tobytes()).hexdigest()
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):          # what is no cache is made anew
        saved = read_checkpoint(cache)
        known = saved['features'] if saved['weights'] == weights else {}
    stamps = [f'{p.relative_to(folder)}|{p.stat().st_size}|{p.stat().st_mtime_ns}' for p in paths]
    new = [i for i, stamp in enumerate(stamps) if stamp not in known]
    if new:
        fresh, _ = embed_labelled(model, [paths[i] for i in new], preprocess, workers=workers, skip=True)
        known |= {stamps[i]: feature.clone() for i, feature in zip(new, fresh) if feature.isfinite().all()}
        try:
            write_tensors({'weights': weights, 'features': {key: known[key] for key in stamps if key in known}}, cache)
        except ValueError as error:                                     # a folder one may only read
            print(f'not cached: {error}')
    good = [i for i, stamp in enumerate(stamps) if stamp in known]
    need(good, f'no image of {folder} can be read')
    return [paths[i] for i in good], torch.stack([known[stamps[i]] for i in good])


def contact_sheet(paths, scores, title, out, tile=176, columns=6):
    """PNG of images in rows, best first, with score and name below each."""
    rows, step = -(-len(paths) // columns), tile + 26
    canvas = Image.new('RGB', (columns * (tile + 6) + 6, rows * step + 30), 'white')
    draw = ImageDraw.Draw(canvas)
    draw.text((6, 6), title, 'black', font_size=15)
    for k, (path, score) in enumerate(zip(paths, scores)):
        x, y = 6 + k % columns * (tile + 6), 30 + k // columns * step
        canvas.paste(ImageOps.pad(read_picture(path).convert('RGB'), (tile, tile), Image.BICUBIC, 'white'), (x, y))
        draw.text((x, y + tile + 2), f'{score:.3f} {path.name}'[:tile // 7], 'black', font_size=12)
    canvas.save(out)


# --- 9. Commands -----------------------------------------------------------------------------------------------------

def show(figures, indent=''):
    """Print nested figures, one a line: fractions in percent, with what guessing gives beside them; and ranks."""
    for name, value in figures.items():
        top = re.fullmatch(r'\w*(?:R@|top)(\d+)', name)
        own = figures.get(f'{name}_chance', figures.get(f"{name.rpartition('_')[0]}_chance"))
        chance = figures.get('chance') if top and own is None else own
        if isinstance(value, dict):
            print(f'{indent}{name}')
            show(value, indent + '  ')
        elif not name.endswith('chance'):                               # K guesses find one target K times as often
            told = f'    chance {min(1, int(top[1] if top else 1) * chance):.2%}' if chance else ''
            form = '>8' if not isinstance(value, float) else '8.1f' if name.endswith('_rank') else '8.2%'
            print(f'{indent}{name:28} {value:{form}}{told}')


def run_retrieval(args, model, tokenizer, preprocess):
    source, captions, owner = (coco_captions(args.coco) if args.coco else
                               karpathy_captions(args.karpathy, args.split, args.images) if args.karpathy else
                               flickr_captions(args.flickr, args.images) if args.flickr else
                               shard_captions(Shards(args.shards)))
    image_features = embed_images(model, source, preprocess, workers=args.workers)
    return retrieval(image_features, embed_texts(model, tokenizer, captions), owner)


def run_classify(args, model, tokenizer, preprocess):
    own, told = TEMPLATES, {}
    if args.shards:
        source = Shards(args.shards)
    elif args.dataset:
        source, names, told['split'] = torchvision_set(args.dataset, args.root, args.split, args.download)
    else:
        source, labels, names, own = folder_classes(args.folder, args.classes, args.subset)
    need(args.shards or not args.picture, '--picture draws the objects of --shards; give those')
    templates = read_templates(args.templates, own)
    image_features, known = embed_labelled(model, source, preprocess, workers=args.workers)
    if args.shards:
        figures = classify_objects(model, tokenizer, image_features, source, templates)
        need(figures, f"{args.shards} lists no objects to name; its json needs 'objects', as of data.py make")
        if args.picture:
            naming_picture(model, tokenizer, image_features, source, templates, args.picture)
    else:
        vectors = class_vectors(model, tokenizer, names, templates)
        figures = classify(image_features, vectors, known if args.dataset else labels)
    return {**told, 'prompts': ' | '.join(templates), **figures}


def folder_masks(args, classes, reduce_zero_label):
    """(name, image, (h, w) truth) of --images and --masks."""
    pairs = mask_pairs(args.images, args.masks, args.image_suffix, args.mask_suffix, args.list)
    for picture, mask in tqdm(pairs, desc='images', disable=None, leave=False):
        image = read_image(picture)
        yield picture.stem, image, read_mask(mask, image.size, classes, reduce_zero_label)


def run_segment(args, model, tokenizer, preprocess):
    window = args.window or model.config.image_size
    o = Settings(*BENCHMARKS.get(args.benchmark, (window * 3 // 2, 40, 0, 0, False)), window, window // 2)
    o = o._replace(**{name: value for name, value in vars(args).items() if name in o._fields and value is not None})
    need(0 < o.stride <= o.window and o.size > 0, f'--window {o.window}, --stride {o.stride}, --size {o.size}: the '
         'stride must be above 0 and no more than the window')
    for folder in filter(None, (args.images, args.masks)):
        need(not args.save or not Path(args.save).resolve().is_relative_to(Path(folder).resolve()),
             f'--save {args.save} lies in {folder}, whose files it could overwrite; name another folder')
    classes = [[name.strip() for name in line.split(',')] for line in read_lines(args.classes)]
    names, templates = [some[0] for some in classes], read_templates(args.templates)
    need(args.shards or args.images, '--masks need their images: --images DIR')
    need(not (args.shards and o.reduce_zero_label), '--reduce-zero-label is of --masks; --shards have no such label')
    vectors = class_vectors(model, tokenizer, sum(classes, []), templates).to(model.logit_scale.device)
    scenes, count, matrix = (scene_masks(Shards(args.shards), classes) if args.shards else
                             folder_masks(args, len(classes), o.reduce_zero_label)), 0, 0
    for name, image, truth in scenes:
        labels = segment_image(model, image, vectors, list(map(len, classes)), o)
        count, matrix = count + 1, matrix + confusion(truth, labels, len(classes))
        if args.save:
            Path(args.save).mkdir(parents=True, exist_ok=True)
            overlay(image, labels.numpy(), names, Path(args.save, f'{name}.png'))
    return {'images': count, 'settings': json.dumps(o._asdict()), 'prompts': ' | '.join(templates),
            **segmentation_figures(matrix, names)}


def run_pairs(args, model, tokenizer, preprocess):
    if args.suppression:
        return suppression(model, tokenizer, preprocess, args.suppression, args.workers)
    items, groups = read_pairs(args.items), {}
    matrices = embed_items(model, tokenizer, preprocess, items, args.images or Path(args.items).parent, args.workers)
    for matrix, (_, _, kind) in zip(matrices, items):
        for name in dict.fromkeys(('all', str(kind or 'all'))):
            groups.setdefault(f'{name} {matrix.shape[0]} x {matrix.shape[1]}', []).append(matrix)
    return {name: pair_scores(some) for name, some in groups.items()}


def run_attend(args, model, tokenizer, preprocess):
    if args.shards:
        need(not args.text, '--text goes with --image; --shards are asked for the objects that they list')
        figures = pointing(model, tokenizer, preprocess, Shards(args.shards))
        need(figures, f'{args.shards} has no KEY.mask.png of listed objects, as the held-out half of data.py make has')
        return figures
    need(args.text, 'attend --image needs captions to ask with: --text "a red star"')
    return {'picture': attention_picture(model, tokenizer, preprocess, read_picture(args.image), args.text, args.out)}


def run_search(args, model, tokenizer, preprocess):
    need(bool(args.query) != bool(args.like), 'search takes a query in words, or --like IMAGE')
    need(args.top > 0, f'--top {args.top} shows nothing; give 1 or more')
    paths, features = folder_features(model, preprocess, args.images, args.workers)
    query = (embed_texts(model, tokenizer, [args.query]) if args.query else
             embed_images(model, [args.like], preprocess))[0]
    scores, best = (features @ query).topk(min(args.top, len(paths)))
    found, scores = [paths[i] for i in best], scores.tolist()
    contact_sheet(found, scores, args.query or f'like {args.like}', args.out)
    for path, score in zip(found, scores):
        print(f'{score:.4f}  {path}')
    return {'images': len(paths), 'picture': args.out}


def run_export(args, model, *_):
    need(Path(args.out).resolve() != Path(args.checkpoint).resolve(), f'{args.out} is the checkpoint; name another')
    return export(model, args.out)


must = lambda help, **more: dict(required=True, help=help, **more)
COMMON = {          # flag: its help, or what argparse is told
    'checkpoint': dict(metavar='CKPT'), '--vocab': "CLIP's merges, for checkpoints that carry none",
    '--weights': dict(choices=['teacher', 'student'], default='teacher', help='which network'),
    '--device': 'cuda or cpu (default: cuda where there is one)', '--json': 'also write the figures to this file',
    '--workers': dict(type=int, default=2, help='processes that read images')}
COMMANDS = {        # what it does, function, flags of which exactly one is given, other flags
    'retrieval': ('R@1/5/10 and ranks, both ways', run_retrieval, {
        '--coco': 'folder with images/val2017 and annotations/captions_val2017.json', '--shards': 'held-out shards',
        '--karpathy': "Karpathy's dataset_coco.json or dataset_flickr30k.json",
        '--flickr': "the released code's flickr30k_val.json: a list of image and captions"}, {
        '--split': dict(default='test', help="Karpathy's split"),
        '--images': 'folder of the images of --karpathy or --flickr (default: beside the JSON)'}),
    'classify': ('zero-shot top-1, top-5 and mean per class', run_classify, {
        '--dataset': 'a classification set of torchvision.datasets, such as cifar10, dtd, food101',
        '--folder': 'one folder of images per class, or images with a labels.json',
        '--shards': 'shards that list objects: names the dominant and the small ones'}, {
        '--root': dict(default='data', help='where --dataset lies'),
        '--split': "torchvision's name of the split (default: test, else val)",
        '--download': dict(action='store_true', help='let torchvision fetch it into --root'),
        '--picture': 'PNG of three scenes of --shards, with the names to choose from and their scores',
        '--classes': 'JSON of class names: for a labels.json, or {folder: name}',
        '--subset': 'a subset that the classes file lists',
        '--templates': 'file of prompts with {} for the class, a line each or a JSON list'}),
    'segment': ('zero-shot segmentation: mIoU, IoU of each class, pixel accuracy', run_segment, {
        '--masks': 'folder of PNG masks of class numbers; 255 is ignored',
        '--shards': 'held-out shards with masks of their objects, which are of the class they have in their name'}, {
        '--images': 'folder of the images of --masks',
        '--classes': must('a class a line, in the order of its numbers, names by commas'),
        '--templates': 'file of prompts with {} for the class', '--save': 'folder for overlays with a legend',
        '--image-suffix': dict(default='', help='end of image names that masks lack, as _leftImg8bit'),
        '--mask-suffix': dict(default='', help='end of mask names that images lack, as _labelTrainIds'),
        '--list': 'file of the stems to evaluate, as of a split',
        '--benchmark': dict(choices=BENCHMARKS, help="a benchmark's settings; what follows changes single ones")}),
    'pairs': ('hard negatives: image, text and group score', run_pairs, {
        '--items': 'JSONL of images and captions, or a file of SugarCrepe, SVO, MMVP-VLM, Winoground',
        '--suppression': 'folder with probes.json: dominant against small objects'}, {
        '--images': 'folder of the images of --items (default: beside it)'}),
    'attend': ('picture of the cross-attention weights, or how often they fall on what is named', run_attend, {
        '--image': 'the image of the picture', '--shards': 'held-out shards with masks of their objects, to count'}, {
        '--text': dict(nargs='+', help='one or more captions'),
        '--out': dict(default='attention.png', help='the picture')}),
    'search': ('rank the images of a folder for a query', run_search, {}, {
        'query': dict(nargs='?', help='what to look for'), '--like': 'an image to look for instead of words',
        '--images': must('folder of images; features are kept beside it'),
        '--top': dict(type=int, default=12, help='how many to show'),
        '--out': dict(default='search.png', help='the contact sheet')}),
    'export': ("open_clip's state dict", run_export, {}, {
        'out': dict(metavar='OUT')})}


def parse_arguments():
    """The command line, by COMMANDS; the fields of Settings are flags of `segment`."""
    parser = Parser(description=__doc__.split('\n')[0])
    commands = parser.add_subparsers(dest='command', required=True)
    told = dict(re.findall(r'^    (\w+): .*?# (.*)$', inspect.getsource(Settings), re.M))
    kinds = {bool: dict(action='store_true', default=None), int: dict(type=int), float: dict(type=float)}
    settings = {f"--{name.replace('_', '-')}": dict(help=told[name], **kinds[kind])
                for name, kind in Settings.__annotations__.items()}
    for name, (about, run, one_of, others) in COMMANDS.items():
        sub = commands.add_parser(name, help=about)
        sub.set_defaults(run=run)
        for flag, how in {**COMMON, **one_of, **others, **(settings if run is run_segment else {})}.items():
            sub.add_argument(flag, **({'help': how} if isinstance(how, str) else how))
    args, rest = parser.parse_known_args()
    if args.command == 'search' and rest and not (args.query or rest[0].startswith('-')):
        args.query = rest.pop(0)            # argparse before Python 3.13 does not find an optional word behind flags
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    one_of = COMMANDS[args.command][2]
    if one_of and sum(bool(vars(args)[flag[2:]]) for flag in one_of) != 1:
        parser.error(f"{args.command} takes exactly one of {', '.join(one_of)}")
    return args


def main():
    args = parse_arguments()
    model, tokenizer, preprocess = load(args.checkpoint, args.weights, vocab=args.vocab)
    asked = 'coco karpathy flickr dataset folder shards items suppression masks images image'.split()
    given = [str(vars(args)[name]) for name in asked if vars(args).get(name)]
    if vars(args).get('karpathy') or vars(args).get('dataset') and args.split:
        given.append(f'split {args.split}')
    source, count = ', '.join(given), sum(p.numel() for p in model.parameters())
    print(f'{args.command} of {args.checkpoint} ({model.origin}, {count:,} parameters)' + f' on {source}' * bool(given))
    try:
        model.to(args.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'--device {args.device} cannot be used ({str(error).splitlines()[0]}); use cpu') from None
    figures = args.run(args, model, tokenizer, preprocess)
    show(figures)
    if args.json:
        about = {'checkpoint': args.checkpoint, 'weights': model.origin, 'data': source}
        Path(args.json).write_text(json.dumps(about | figures, indent=1))


if __name__ == '__main__':
    cli(main)
