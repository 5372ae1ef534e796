"""Zero-shot evaluation of a checkpoint, search, and pictures of what it attends to.

    python eval.py retrieval CKPT --coco DIR                      images/val2017 + annotations/captions_val2017.json
    python eval.py retrieval CKPT --karpathy dataset_coco.json --split test --images DIR
    python eval.py retrieval CKPT --flickr flickr30k_val.json --images DIR
    python eval.py retrieval CKPT --shards runs/scenes/val
    python eval.py classify CKPT --dataset dtd --root DIR         a set of torchvision.datasets, by name
    python eval.py classify CKPT --folder DIR                     one folder a class, or labels.json with --classes FILE
    python eval.py classify CKPT --shards runs/scenes/val         the dominant and the small object of each scene
    python eval.py segment CKPT --images DIR --masks DIR --classes voc.txt --benchmark voc21 --csa --save DIR
    python eval.py pairs CKPT --items items.jsonl                 SugarCrepe, SVO-Probes, MMVP-VLM, Winoground, or yours
    python eval.py pairs CKPT --suppression DIR                   probes.json: the dominant against the small object
    python eval.py attend CKPT --image a.jpg --text "a red star" "a small blue ring" --out attention.png
    python eval.py search CKPT --images DIR "a red star"          ranks the images of a folder
    python eval.py export CKPT OUT.pt                             a state dict that open_clip loads

CKPT is ours (runs/.../last.pt), a released cosmos_vitb*.pt, or an open_clip ViT state dict. Scores come from the
teacher, the averaged weights, unless --weights student. Features are float32 of unit length, scores their products.
"""
import colorsys
import csv
import hashlib
import inspect
import io
import json
import math
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from cosmos import COSMOS, Config, from_openclip, to_openclip, unit
from data import Parser, Preprocess, Shards, Tokenizer, cli, normalize

# --- 1. Checkpoints --------------------------------------------------------------------------------------------------

def read_checkpoint(path):
    """A file of tensors and plain values. Anything that would have to execute code to load is refused (ValueError)."""
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise ValueError(f'checkpoint {path} does not exist') from None
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = (str(error) or 'it ends too early').splitlines()[0][:120]
        raise ValueError(f'{path} is no checkpoint of tensors and plain values ({reason}); where you trust it, '
                         'convert it: torch.save(torch.load(OLD, weights_only=False)[...], NEW)') from None


def infer_config(state):
    """Config of released or open_clip weights, from their shapes: towers have heads 64 wide, cross-attention has 8."""
    width, _, _, patch = state['visual.conv1.weight'].shape
    layers = lambda prefix: len({key.split('resblocks.')[1].split('.')[0] for key in state if key.startswith(prefix)})
    context_length, text_width = state['positional_embedding'].shape
    grid = math.isqrt(len(state['visual.positional_embedding']) - 1)    # one row is the class token's
    return Config(embed_dim=state['text_projection'].shape[1], image_size=grid * patch, patch_size=patch,
                  local_image_size=96 // patch * patch or patch, vision_width=width, vision_heads=width // 64,
                  vision_layers=layers('visual.transformer.'), text_layers=layers('transformer.'),
                  text_width=text_width, text_heads=text_width // 64, context_length=context_length,
                  vocab_size=len(state['token_embedding.weight']),
                  cross_heads=8 if 'image_token_mapping.weight' in state else 0)


def load_weights(model, state, path):
    """Strictly: every name and shape must fit, or ValueError lists what is missing, unexpected and of another shape."""
    own = model.state_dict()
    problems = {'missing': [key for key in own if key not in state],
                'unexpected': [key for key in state if key not in own],
                'of another shape': [f'{key} {tuple(state[key].shape)}, not {tuple(own[key].shape)}' for key in own
                                     if key in state and state[key].shape != own[key].shape]}
    told = [f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for kind, keys in problems.items() if keys]
    if told:
        raise ValueError(f'{path} does not fit this model: ' + '; '.join(told))
    model.load_state_dict(state)


def load(path, weights='teacher', config=None, vocab=None):
    """-> (model in eval mode, tokenizer, preprocess: PIL image -> (3, S, S)).

    path: our checkpoint, a released one (dict with 'student' and 'teacher'), or an open_clip state dict; `module.` and
    `_orig_mod.` prefixes are stripped. Where there is no teacher the student is taken: model.origin tells which it was.
    `config` is needed only where heads are not 64 wide; `vocab` goes to Tokenizer.clip.
    """
    saved = read_checkpoint(path)
    if not isinstance(saved, dict):
        raise ValueError(f'{path} holds a {type(saved).__name__}, not a state dict')
    origin = next((name for name in (weights, 'student', 'state_dict') if name in saved), 'state dict')
    state = {re.sub(r'^((module|_orig_mod)\.)+', '', key): value for key, value in saved.get(origin, saved).items()}
    if 'merges' in saved:                                               # ours
        config, tokenizer = Config(**saved['config']), Tokenizer(saved['merges'], saved['config']['context_length'])
    elif 'input_resolution' in state:                                   # NB: they would load, and score low unnoticed
        raise ValueError(f"{path} holds OpenAI's weights, which need QuickGELU; this model has GELU: take LAION's")
    elif 'visual.class_embedding' in state and 'positional_embedding' in state:
        config = config or infer_config(state)
        state, tokenizer = from_openclip(state), Tokenizer.clip(vocab, config.context_length)
    else:
        raise ValueError(f"{path} holds no weights of this model (its keys: {', '.join(map(str, list(saved)[:5]))}); "
                         'give a checkpoint of train.py, a released cosmos_vitb*.pt or an open_clip ViT state dict')
    model = COSMOS(config)
    load_weights(model, state, path)
    model.origin = origin
    return model.eval(), tokenizer, Preprocess(config.image_size)


def export(model, path):
    """Write the towers and the scale under open_clip's names. It has no place for COSMOS's heads: they stay behind."""
    heads = ('image_cross.', 'text_cross.', 'image_tokens.', 'text_tokens.', 'distill_logit_scale')
    state = to_openclip({key: value for key, value in model.state_dict().items() if not key.startswith(heads)})
    torch.save(state, path)
    return {'tensors': len(state), 'parameters': sum(value.numel() for value in state.values()), 'file': str(path)}


# --- 2. Features -----------------------------------------------------------------------------------------------------

class Images(torch.utils.data.Dataset):
    """Preprocessed images of a list of paths, of Shards or of a torchvision set -> (pixels (3, S, S), label or -1).

    A file that is no image raises ValueError that names it; with `skip` its pixels are NaN instead.
    """

    def __init__(self, source, preprocess, skip=False):
        self.source, self.preprocess, self.skip = source, preprocess, skip

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        try:
            if isinstance(self.source, torchvision.datasets.VisionDataset):
                image, label = self.source[i]
                return self.preprocess(image), int(label)
            inside = isinstance(self.source, Shards)
            data = self.source.image(i) if inside else Path(self.source[i]).read_bytes()
            return self.preprocess(Image.open(io.BytesIO(data))), -1
        except OSError as error:
            if self.skip:
                return self.preprocess(Image.new('RGB', (8, 8))) * math.nan, -1
            where = (self.source.name(i) if isinstance(self.source, Shards) else
                     self.source[i] if isinstance(self.source, list) else f'image {i} of the set')
            raise ValueError(f'{where} is no readable image ({error})') from None


def device_of(model):
    return next(model.parameters()).device


@torch.no_grad()
def embed_labelled(model, source, preprocess, batch=64, workers=0, skip=False):
    """Paths, Shards or a torchvision set -> (n, D) unit vectors and (n,) labels, -1 where there are none."""
    loader = torch.utils.data.DataLoader(Images(source, preprocess, skip), batch, num_workers=workers)
    features, labels = [], []
    try:
        for images, some in tqdm(loader, desc='images', disable=None, leave=False):
            features.append(unit(model.visual([images.to(device_of(model))])[0][0]).cpu())
            labels.append(some)
    except ValueError as error:                         # from a worker it comes with a traceback; its sentence is last
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix('ValueError: ')) from None
    return torch.cat(features), torch.cat(labels)


def embed_images(model, source, preprocess, batch=64, workers=0):
    """Paths or Shards -> (n, D) unit vectors on the CPU."""
    return embed_labelled(model, source, preprocess, batch, workers)[0]


@torch.no_grad()
def embed_texts(model, tokenizer, texts, batch=256, chunk=8192):
    """n texts -> (n, D) unit vectors on the CPU. Neighbours in length share a batch, cut to its longest.

    A chunk of texts is in memory as tokens at a time: a million captions cost their features and no more.
    """
    features = torch.empty(len(texts), model.config.embed_dim)
    for first in tqdm(range(0, len(texts), chunk), desc='texts', disable=None, leave=False):
        tokens = tokenizer(texts[first:first + chunk], model.config.context_length)
        length = tokens.argmax(dim=1) + 1                               # the end has the largest id
        for some in length.argsort().split(batch):
            ids = tokens[some, :int(length[some].max())].to(device_of(model))
            features[first + some] = unit(model.text([ids])[0][0]).cpu()
    return features


# --- 3. Retrieval ----------------------------------------------------------------------------------------------------

def ranks(queries, targets, query_ids, target_ids, chunk=1024):
    """Rank from 1 of each query's best right target, (n,). Right targets have the query's id; they do not outrank it.

    A wrong target with an equal score counts as ahead: features that are all the same must not look perfect.
    """
    out = []
    for some in torch.arange(len(queries)).split(chunk):                # never the whole n x m matrix
        scores = queries[some] @ targets.T                              # (chunk, m)
        right = query_ids[some, None] == target_ids[None]
        best = scores.masked_fill(~right, -math.inf).amax(dim=1, keepdim=True)
        out.append(1 + ((scores >= best) & ~right).sum(dim=1))
    return torch.cat(out)


def retrieval(image_features, text_features, owner):
    """Zero-shot retrieval figures. owner (captions,): the image of each caption.

    An image has a hit if any of its captions does. R@K are fractions, ranks count from 1, chance is R@1 of guessing.
    """
    ids = torch.arange(len(image_features))
    figures = {'images': len(ids), 'captions': len(owner), 'chance': 1 / len(ids)}
    for name, found in (('image_to_text', ranks(image_features, text_features, ids, owner)),
                        ('text_to_image', ranks(text_features, image_features, owner, ids))):
        figures |= {f'{name}_R@{k}': (found <= k).float().mean().item() for k in (1, 5, 10)}
        figures |= {f'{name}_mean_rank': found.float().mean().item(), f'{name}_median_rank': float(np.median(found))}
    return figures


def read_text(path):
    try:
        return Path(path).read_text(encoding='utf-8')
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{path} cannot be read ({getattr(error, 'strerror', 'no UTF-8 text')})") from None


def read_lines(path):
    """The lines of a text file that are not blank, or the items of a JSON list."""
    text = read_text(path)
    return [line for line in (read_json(path) if text.lstrip()[:1] == '[' else text.splitlines()) if line]


def read_json(path, *keys):
    """The JSON at `path`, an object with `keys` where any are named; else ValueError."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f'{path} is no JSON ({error})') from None
    for key in keys:
        if key not in value:
            raise ValueError(f"{path} has no '{key}'; is it the file that --help describes?")
    return value


def coco_captions(root):
    """COCO layout -> (image paths, captions, owner)."""
    root = Path(root)
    listing = read_json(root / 'annotations/captions_val2017.json', 'images', 'annotations')
    number = {image['id']: i for i, image in enumerate(listing['images'])}
    paths = [root / 'images/val2017' / image['file_name'] for image in listing['images']]
    return (paths, [a['caption'] for a in listing['annotations']],
            torch.tensor([number[a['image_id']] for a in listing['annotations']]))


def karpathy_captions(path, split, images):
    """Karpathy's dataset_coco.json or dataset_flickr30k.json -> (image paths, captions, owner) of one split."""
    chosen = [image for image in read_json(path, 'images')['images'] if image.get('split') == split]
    if not chosen:
        raise ValueError(f"{path} has no image of split '{split}'; Karpathy's are train, restval, val, test")
    root = Path(images or Path(path).parent)
    paths = [root / image.get('filepath', '') / image['filename'] for image in chosen]
    pairs = [(i, sentence['raw']) for i, image in enumerate(chosen) for sentence in image['sentences']]
    return paths, [caption for _, caption in pairs], torch.tensor([i for i, _ in pairs])


def flickr_captions(path, images):
    """The released code's flickr30k_val.json, [{"image", "caption": [five]}] -> (image paths, captions, owner)."""
    listing, root = read_json(path), Path(images or Path(path).parent)
    if not (isinstance(listing, list) and listing and all({'image', 'caption'} <= item.keys() for item in listing)):
        raise ValueError(f"{path} is no list of objects with 'image' and 'caption'")
    captions = [[item['caption']] if isinstance(item['caption'], str) else item['caption'] for item in listing]
    owner = [i for i, some in enumerate(captions) for _ in some]
    return [root / item['image'] for item in listing], sum(captions, []), torch.tensor(owner)


def shard_captions(shards):
    """-> (shards, captions, owner): what `captions` lists, else the one raw caption of a pair; whole, never split."""
    captions, owner = [], []
    for i in range(len(shards)):
        record = shards.record(i)
        found = next((record[key] for key in ('captions', 'raw_caption', 'caption', 'txt') if record.get(key)), None)
        found = found if isinstance(found, list) else [found]
        captions += [caption for caption in found if isinstance(caption, str)]
        owner += [i] * sum(isinstance(caption, str) for caption in found)
    missing = sorted(set(range(len(shards))) - set(owner))
    if missing:
        raise ValueError(f'{shards.name(missing[0])} has no caption to retrieve by; held-out pairs need captions, '
                         'raw_caption, caption or a .txt')
    return shards, captions, torch.tensor(owner)


# --- 4. Zero-shot classification -------------------------------------------------------------------------------------

TEMPLATES = ('a photo of a {}', 'a picture of a {}', 'an image of a {}', 'there is a {} in the picture',
             'a small {}', 'a large {}')


def read_templates(path):
    """Prompts with {} for the class: a line each, or a JSON list. CLIP_benchmark's {c} will do too."""
    templates = [str(line).strip().replace('{c}', '{}') for line in read_lines(path)]
    for template in templates:
        if template.count('{}') != 1 or re.search(r'[{}]', template.replace('{}', '')):
            raise ValueError(f"template '{template}' of {path} needs one {{}} where the class goes")
    return templates


def class_vectors(model, tokenizer, names, templates=TEMPLATES):
    """Prompt ensemble: embed every template, normalise, average, normalise again. -> (len(names), D)"""
    prompts = [template.format(name) for name in names for template in templates]
    return unit(embed_texts(model, tokenizer, prompts).view(len(names), len(templates), -1).mean(dim=1))


def classify(image_features, vectors, labels):
    """image_features (n, D), vectors (K, D), labels (n,) -> top1, top5, mean of the classes' top1, counts, chance."""
    scores = image_features @ vectors.T
    own = scores.gather(1, labels[:, None])
    wrong = torch.arange(len(vectors)) != labels[:, None]
    ahead = ((scores >= own) & wrong).sum(dim=1)                        # ties count against us, as in `ranks`
    count = torch.bincount(labels, minlength=len(vectors))
    right = torch.bincount(labels[ahead < 1], minlength=len(vectors))
    return {'images': len(labels), 'classes': len(vectors), 'chance': 1 / len(vectors),
            'top1': (ahead < 1).float().mean().item(), 'top5': (ahead < 5).float().mean().item(),
            'mean_per_class_top1': (right / count)[count > 0].mean().item()}


def torchvision_set(name, root, split=None, download=False):
    """A classification set of torchvision.datasets, by its class's name in any case -> (the set, class names).

    split: its name there (default: test, else val). Raises ValueError for a set without class names, or not at `root`.
    """
    kinds = {kind.lower(): kind for kind in torchvision.datasets.__all__}
    if name.lower() not in kinds:
        raise ValueError(f"torchvision.datasets has no '{name}'; it has {', '.join(sorted(kinds.values()))}")
    kind, error = getattr(torchvision.datasets, kinds[name.lower()]), None
    accepts = inspect.signature(kind).parameters
    for wanted in [split] if split else ['test', 'val']:
        given = {'split': wanted} if 'split' in accepts or kind is torchvision.datasets.ImageNet else {}
        given |= {'train': wanted == 'train'} if 'train' in accepts else {}
        given |= {'download': True} if download and 'download' in accepts else {}
        try:
            source = kind(root, **given)
            break
        except (TypeError, ValueError, RuntimeError, OSError, AttributeError, ImportError) as failed:
            error = error or failed                                     # of 'test' and 'val' the first says more
    else:
        raise ValueError(f'torchvision cannot read {name} from {root} ({str(error).splitlines()[0]}); try --download, '
                         'or another --split')
    names = getattr(source, 'classes', None) or getattr(source, 'categories', None)
    if not names:
        raise ValueError(f"torchvision's {name} has no class names; use --folder with one folder per class")
    plain = lambda name: (name if isinstance(name, str) else name[0])   # ImageNet's are tuples of synonyms
    return source, [re.sub(r'[_/]+', ' ', plain(name)).strip() for name in names]


def wordnet_names(folders, root):
    """Names for folders called n01440764 and so on: torchvision's thousand, which are in the order of the ids."""
    if len(folders) != 1000:
        raise ValueError(f'{root} has {len(folders)} folders of WordNet ids, not all 1,000 of ImageNet; name them with '
                         '--classes FILE, a JSON object of id: name')
    return list(torchvision.models.ResNet18_Weights.DEFAULT.meta['categories'])


def folder_classes(root, classes=None, subset=None):
    """One folder per class, or labels.json [{"file", "class_id"}] and `classes` -> (paths, labels, names, templates).

    `classes` is a list of names, or {"classes": [{"id", "name", "noun_phrase"}], "subsets": {name: ids}, "templates"};
    for folders, {folder: name}. Folders of WordNet ids have torchvision's names of ImageNet.
    """
    root = Path(root)
    if not (root / 'labels.json').exists():
        folders = sorted(p for p in root.glob('[!.]*') if p.is_dir())   # NB: .cache would be one class more to guess
        found = [(p, k) for k, folder in enumerate(folders) for p in sorted(folder.rglob('[!.]*')) if p.is_file()]
        if not found:
            raise ValueError(f'{root} has neither one folder of images per class nor a labels.json')
        names = [folder.name.replace('_', ' ') for folder in folders]
        if classes:
            table = read_json(classes, *(folder.name for folder in folders))
            names = [table[folder.name] for folder in folders]
        elif all(re.fullmatch(r'n\d{8}', name) for name in names):
            names = wordnet_names(folders, root)
        return [path for path, _ in found], torch.tensor([k for _, k in found]), names, TEMPLATES
    if not classes:
        raise ValueError(f'{root}/labels.json numbers its classes; name them with --classes FILE')
    listing = read_json(classes)
    if isinstance(listing, list):
        listing = {'classes': [{'id': i, 'name': name} for i, name in enumerate(listing)]}
    subsets = listing.get('subsets', {})
    if subset and subset not in subsets:
        raise ValueError(f"{classes} has no subset '{subset}'; it has: {', '.join(subsets) or 'none'}")
    wanted = {item['id']: item.get('noun_phrase') or item['name'] for item in listing['classes']}
    wanted = {i: wanted[i] for i in (subsets[subset] if subset else wanted)}
    number = {class_id: k for k, class_id in enumerate(wanted)}
    chosen = [item for item in read_json(root / 'labels.json') if item['class_id'] in number]
    if not chosen:
        raise ValueError(f'no image of {root}/labels.json is of a class in {classes}; are its ids the same?')
    return ([root / item['file'] for item in chosen], torch.tensor([number[item['class_id']] for item in chosen]),
            list(wanted.values()), listing.get('templates', TEMPLATES))


def classify_objects(model, tokenizer, image_features, shards):
    """Feature suppression, measured: does an object's own name score above the wrong names listed for it?

    -> {role: {top1, chance, objects}} over the objects of all scenes; {} where the shards list none.
    """
    objects = [(i, thing) for i in range(len(shards)) for thing in shards.record(i).get('objects', [])]
    if not objects:
        return {}
    names = sorted({name for _, thing in objects for name in [thing['name'], *thing['negatives']]})
    number = {name: k for k, name in enumerate(names)}
    vectors, right = class_vectors(model, tokenizer, names), {}
    for i, thing in objects:
        scores = vectors[[number[name] for name in [thing['name'], *thing['negatives']]]] @ image_features[i]
        right.setdefault(thing['role'], []).append(bool((scores[0] > scores[1:]).all()))
    wrong = len(objects[0][1]['negatives'])
    return {role: {'top1': float(np.mean(hits)), 'chance': 1 / (1 + wrong), 'objects': len(hits)}
            for role, hits in right.items()}


def evaluate(model, tokenizer, preprocess, shards):
    """All that held-out shards allow: retrieval, and the dominant and small object where they list objects."""
    model.eval()
    _, captions, owner = shard_captions(shards)
    image_features = embed_images(model, shards, preprocess)
    figures = {'retrieval': retrieval(image_features, embed_texts(model, tokenizer, captions), owner)}
    return figures | classify_objects(model, tokenizer, image_features, shards)


# --- 5. Zero-shot segmentation ---------------------------------------------------------------------------------------

class Settings(NamedTuple):
    """How to segment."""
    size: int                           # short side of the image, in pixels
    scale: float                        # of the cosines before the softmax
    probability: float                  # pixels whose best class has less become class 0
    area: float                         # classes with no more than this share of the foreground vanish
    reduce_zero_label: bool             # label 0 of the masks is ignored, 1 becomes class 0
    window: int = 224
    stride: int = 112
    csa: bool = False                   # correlative self-attention in the last block


BENCHMARKS = {      # size, scale, probability, area, reduce_zero_label: of the released code, after SCLIP
    'voc21': (336, 65, 0.1, 0.1, False), 'context60': (336, 50, 0.1, 0, False), 'coco-object': (336, 50, 0.1, 0, False),
    'voc20': (336, 40, 0, 0, True), 'cityscapes': (560, 40, 0, 0, False), 'context59': (336, 40, 0, 0, True),
    'ade20k': (336, 40, 0, 0, True), 'coco-stuff': (448, 40, 0, 0, False),
}
IGNORE = 255                                                            # a mask's pixels that count nowhere


@torch.no_grad()
def window_scores(model, pixels, vectors, window, stride, csa=False):
    """pixels (3, H, W), vectors (Q, D) -> (Q, H, W): cosines of patches and texts, averaged over sliding windows.

    Every window is scored alone, its grid of patches made bilinear to its pixels; the last ones end at the border.
    """
    (_, H, W), patch = pixels.shape, model.config.patch_size
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
    best; classes under o.area of the foreground vanish; pixels under o.probability become class 0.
    """
    width, height = image.size
    zoom = max(min(o.size / min(image.size), 2048 / max(image.size)), o.window / min(image.size))
    small = image.convert('RGB').resize((round(width * zoom), round(height * zoom)), Image.BILINEAR)
    pixels = normalize(torch.from_numpy(np.array(small)).permute(2, 0, 1).to(device_of(model)))
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
    try:
        mask = Image.open(path)
        values = torch.from_numpy(np.array(mask).astype(np.int64))
    except OSError as error:
        raise ValueError(f'mask {path} cannot be read ({error})') from None
    if values.ndim != 2:
        raise ValueError(f'mask {path} has colours ({mask.mode}), not class numbers; save it as grey or palette PNG')
    if mask.size != size:
        raise ValueError(f'mask {path} is {mask.size[0]} x {mask.size[1]} pixels, its image {size[0]} x {size[1]}')
    if reduce_zero_label:
        values = torch.where((values == 0) | (values == IGNORE), IGNORE, values - 1)
    labels = values[values != IGNORE]
    if labels.numel() and int(labels.max()) >= classes:
        raise ValueError(f'mask {path} has label {int(labels.max())}, the class file names 0 to {classes - 1}')
    return values


def mask_pairs(images, masks, image_suffix='', mask_suffix='', listing=None):
    """[(image path, mask path)] of equal stems, suffixes cut off; of those in `listing`, a stem a line, if given."""
    kinds, stems = ('.jpg', '.jpeg', '.png', '.webp'), read_text(listing).split() if listing else None
    stem = lambda path, suffix: path.stem[:len(path.stem) - len(suffix)] if path.stem.endswith(suffix) else None
    pictures = {stem(p, image_suffix): p for p in sorted(Path(images).rglob('*')) if p.suffix.lower() in kinds}
    found = {stem(p, mask_suffix): p for p in sorted(Path(masks).rglob('*.png'))}
    pairs = {name: path for name, path in found.items() if name and (stems is None or name in stems)}
    missing = [path for name, path in pairs.items() if name not in pictures]
    missing += [Path(masks, f'{name}{mask_suffix}.png') for name in stems or () if name not in found]
    if missing:
        raise ValueError(f'{missing[0]} and an image of that name in {images} are not both there; see --image-suffix')
    if not pairs:
        raise ValueError(f"{masks} holds no mask '*{mask_suffix}.png'; see --mask-suffix")
    return [(pictures[name], path) for name, path in pairs.items()]


def overlay(image, labels, names, path):
    """PNG of an image under its classes in colours, with a legend of name and share; 'background' stays as it is."""
    present, count = np.unique(labels, return_counts=True)
    hue = lambda k: tuple(int(255 * c) for c in colorsys.hsv_to_rgb(k * 0.618 % 1, 0.85, 1))   # neighbours far apart
    palette = np.array([hue(k) for k in range(len(names))], np.float32)
    pixels = np.asarray(image.convert('RGB'), np.float32)
    bare = 0 if names[0].lower() == 'background' else -1
    mixed = np.where(labels[..., None] == bare, pixels, 0.35 * pixels + 0.65 * palette[labels])
    canvas = Image.new('RGB', (image.width + 220, max(image.height, 22 * len(present) + 8)), 'white')
    canvas.paste(Image.fromarray(np.uint8(mixed)), (0, 0))
    draw = ImageDraw.Draw(canvas)
    for row, (k, share) in enumerate(sorted(zip(present, count / labels.size), key=lambda item: -item[1])):
        y = 4 + 22 * row
        fill = 'white' if k == bare else hue(k)
        draw.rectangle((image.width + 8, y, image.width + 24, y + 16), fill=fill, outline='black')
        draw.text((image.width + 30, y), f'{names[k][:22]} {share:.0%}', 'black', font_size=13)
    canvas.save(path)


# --- 6. Pairs: k images and k captions that differ in one thing ------------------------------------------------------

def read_pairs(path):
    """Items of a hard-negative test as (image names, captions, type). The right ones stand at the same position.

    JSONL, JSON or CSV; a row is ours, {"images": [...], "captions": [...], "type"}, or of a published layout:
    SugarCrepe (1 image x 2), SVO-Probes (2 x 1), Winoground (2 x 2), MMVP-VLM's Questions.csv (two rows are a 2 x 2).
    """
    text = read_text(path)
    try:
        rows = (list(csv.DictReader(io.StringIO(text))) if str(path).endswith('.csv') else
                [json.loads(line) for line in text.splitlines() if line.strip()] if str(path).endswith('.jsonl') else
                json.loads(text))
    except ValueError as error:
        raise ValueError(f'{path} is neither JSON lines nor JSON nor CSV ({error})') from None
    rows, items = list(rows.values()) if isinstance(rows, dict) else rows, []
    for number, row in enumerate(rows, 1):
        keys = row.keys() if isinstance(row, dict) else ()
        if {'images', 'captions'} <= keys:
            items.append((row['images'], row['captions'], row.get('type')))
        elif {'filename', 'caption', 'negative_caption'} <= keys:
            items.append(([row['filename']], [row['caption'], row['negative_caption']], None))
        elif {'image_0', 'image_1', 'caption_0', 'caption_1'} <= keys:
            items.append(([row['image_0'], row['image_1']], [row['caption_0'], row['caption_1']], row.get('tag')))
        elif {'sentence', 'pos_image_id', 'neg_image_id'} <= keys:
            kind = next((k for k in ('subj_neg', 'verb_neg', 'obj_neg') if str(row.get(k)).lower() == 'true'), None)
            items.append(([row['pos_image_id'], row['neg_image_id']], [row['sentence']], kind))
        elif {'Question ID', 'Type', 'Statement'} <= keys:
            picture, caption = f"{row['Type']}/{row['Question ID']}", f"a photo of {row['Statement']}"
            if number % 2:
                items.append(([picture], [caption], row['Type']))
            else:
                items[-1][0].append(picture)
                items[-1][1].append(caption)
        else:
            raise ValueError(f"item {number} of {path} has the keys {', '.join(keys) or '(none)'}; it needs images and "
                             'captions, or those of SugarCrepe, SVO-Probes, Winoground or MMVP-VLM')
    for number, (images, captions, _) in enumerate(items, 1):
        k, m = len(images), len(captions)
        if min(k, m) < 1 or k * m < 2 or min(k, m) > 1 and k != m:
            raise ValueError(f'item {number} of {path} has {k} images and {m} captions; give k and k, k and 1, 1 and k')
    return items


def pair_hits(scores):
    """scores (k images, m captions), right ones at equal positions -> (image hits, text hits): one bool a question.

    Image hits: for each caption, is its image above all others? Text hits: the same with the roles exchanged. Empty
    where there is nothing to choose from. A tie is a miss.
    """
    def hits(scores):
        own, others = scores.diagonal(), len(scores) - 1
        return ((scores[:, :len(own)] < own).sum(dim=0) == others).tolist() if others else []
    return hits(scores), hits(scores.T)


def pair_scores(matrices):
    """Score matrices of items of one shape -> shares of items with all image, all text, and all questions right."""
    hits = [pair_hits(matrix) for matrix in matrices]
    (k, m), figures = matrices[0].shape, {'items': len(matrices)}
    for name, choices, chosen in (('image', k, [all(image) for image, _ in hits]),
                                  ('text', m, [all(text) for _, text in hits])):
        if choices > 1:
            figures |= {f'{name}_score': float(np.mean(chosen)), f'{name}_chance': (1 / choices) ** min(k, m)}
    return figures | ({'group_score': float(np.mean([all(a + b) for a, b in hits]))} if min(k, m) > 1 else {})


def embed_items(model, tokenizer, preprocess, items, root, workers=0):
    """Items of `read_pairs` -> their score matrices. Every image and every caption is embedded once."""
    def locate(name):
        found = [Path(root, f'{name}{kind}') for kind in ('', '.jpg', '.png', '.jpeg', '.webp')]
        return next((path for path in found if path.is_file()), found[0])
    pictures = {name: i for i, name in enumerate(dict.fromkeys(str(name) for item in items for name in item[0]))}
    texts = {text: i for i, text in enumerate(dict.fromkeys(text for item in items for text in item[1]))}
    image_features = embed_images(model, [locate(name) for name in pictures], preprocess, workers=workers)
    text_features = embed_texts(model, tokenizer, list(texts))
    pick = lambda features, number, names: features[[number[name] for name in names]]
    return [pick(image_features, pictures, map(str, images)) @ pick(text_features, texts, captions).T
            for images, captions, _ in items]


def suppression(model, tokenizer, preprocess, root, workers=0):
    """Feature suppression by root/probes.json: scenes A and B differ at the small object only, A and C at the big one.

    -> per role: how often a name of the object finds its scene of the two, with the standard error over probes, and how
    often scene A finds the name among nine others'.
    """
    probes, figures = read_json(Path(root, 'probes.json')), {}
    for role, other in (('dominant', 'C'), ('small', 'B')):
        asked = [probe[f'{role}_query'] for probe in probes]
        pairs = [([probe['images']['A'], probe['images'][other]], [query['positive'], query['swap']], None)
                 for probe, query in zip(probes, asked)]
        names = [([probe['images']['A']], [query['positive'], *query['negatives']], None)
                 for probe, query in zip(probes, asked)]
        matrices = embed_items(model, tokenizer, preprocess, pairs + names, root, workers)
        share = np.array([np.mean(pair_hits(matrix)[0]) for matrix in matrices[:len(pairs)]])
        figures[role] = {'probes': len(probes), 'scene_top1': float(share.mean()), 'scene_chance': 0.5,
                         'standard_error': float(share.std(ddof=1) / math.sqrt(len(share))),
                         'name_top1': float(np.mean([pair_hits(matrix)[1][0] for matrix in matrices[len(pairs):]])),
                         'name_chance': 1 / len(names[0][1])}
    return figures


# --- 7. Attention pictures -------------------------------------------------------------------------------------------

RAMP = np.float32([(0, 32, 77), (66, 78, 108), (124, 123, 120), (186, 174, 105), (255, 234, 70)])      # low to high


def colour(values):
    """Values in [0, 1] -> (..., 3) float32: dark blue over grey to yellow, readable by the colour-blind."""
    at = np.clip(values, 0, 1) * (len(RAMP) - 1)
    low = np.minimum(at.astype(int), len(RAMP) - 2)
    return RAMP[low] + (RAMP[low + 1] - RAMP[low]) * (at - low)[..., None]


@torch.no_grad()
def attention(model, tokenizer, preprocess, image, caption):
    """-> map (h, w) of C^I asked by the caption, and [(word, weight)] of C^T asked by the image, both scaled to [0, 1].

    Pieces of a word are summed. Start, end and padding are keys too, but no words: they are left out before scaling.
    """
    pixels, tokens = preprocess(image)[None].to(device_of(model)), tokenizer([caption], model.config.context_length)
    patch_weights, token_weights = model.attention(pixels, tokens.to(device_of(model)))
    side = math.isqrt(patch_weights.shape[1])
    words, at = [], 1                                                   # position 0 is the start
    for word, pieces in tokenizer.words(caption):
        if at + pieces >= model.config.context_length:
            break
        words.append((word, token_weights[0, at:at + pieces].sum().item()))
        at += pieces
    scaled = lambda x: (x - x.min()) / max(x.max() - x.min(), 1e-12)
    grid = scaled(patch_weights[0].view(side, side).cpu().numpy())
    return grid, list(zip([word for word, _ in words], scaled(np.array([weight for _, weight in words] or [0.0]))))


def attention_picture(model, tokenizer, preprocess, image, captions, path, tile=224):
    """PNG of a row per caption: the image, the map of C^I over it, and the words shaded by C^T."""
    font, small, width, gap = ImageFont.load_default(15), ImageFont.load_default(12), 3 * tile + 200, 8
    canvas = Image.new('RGB', (width, len(captions) * (tile + gap) + gap + 22), 'white')
    draw = ImageDraw.Draw(canvas)
    view, side = image.convert('RGB'), min(image.size)
    left, top = (view.width - side) // 2, (view.height - side) // 2     # the part that `preprocess` shows the model
    view = view.crop((left, top, left + side, top + side)).resize((tile, tile), Image.BICUBIC)
    for row, caption in enumerate(captions):
        grid, words = attention(model, tokenizer, preprocess, image, caption)
        heat = np.asarray(Image.fromarray(np.float32(grid)).resize((tile, tile), Image.BILINEAR))
        over = Image.fromarray(np.uint8(0.4 * np.asarray(view, np.float32) + 0.6 * colour(heat)))
        y = gap + row * (tile + gap)
        canvas.paste(view, (gap, y))
        canvas.paste(over, (2 * gap + tile, y))
        x, line = 2 * tile + 3 * gap, y
        for word, weight in words:
            length = draw.textlength(word, font) + 8
            if x + length > width - gap:
                x, line = 2 * tile + 3 * gap, line + 26
            draw.rectangle((x, line, x + length, line + 22), fill=tuple(int(c) for c in colour(np.array(weight))))
            draw.text((x + 4, line + 2), word, fill='black' if weight > 0.5 else 'white', font=font)
            x += length + 3
    draw.text((gap, canvas.height - 22), 'image | where C^I looks for the caption | which words C^T reads for the '
              'image. Dark blue low, yellow high; start, end and padding left out.', fill='black', font=small)
    canvas.save(path)


# --- 8. Search -------------------------------------------------------------------------------------------------------

def folder_features(model, preprocess, folder, workers=0):
    """All images under a folder -> (paths, (n, D) features), unreadable ones left out and named.

    Kept in FOLDER.features.pt beside it, per file with size and time: a second call embeds only what is new or changed.
    Other weights start over.
    """
    folder = Path(folder)
    paths = [p for p in sorted(folder.rglob('[!.]*')) if p.suffix.lower() in ('.jpg', '.jpeg', '.png', '.webp')]
    if not paths:
        raise ValueError(f'{folder} holds no jpg, jpeg, png or webp image')
    weights = hashlib.sha1(model.visual.proj.detach().cpu().numpy().tobytes()).hexdigest()
    cache, known = folder.absolute().with_name(folder.absolute().name + '.features.pt'), {}
    if cache.exists():
        saved = read_checkpoint(cache)
        known = saved['features'] if saved.get('weights') == weights else {}
    stamps = [f'{p.relative_to(folder)}|{p.stat().st_size}|{p.stat().st_mtime_ns}' for p in paths]
    new = [i for i, stamp in enumerate(stamps) if stamp not in known]
    if new:
        fresh, _ = embed_labelled(model, [paths[i] for i in new], preprocess, workers=workers, skip=True)
        known |= {stamps[i]: feature for i, feature in zip(new, fresh)}
    if new or len(known) > len(paths):
        try:
            torch.save({'weights': weights, 'features': {stamp: known[stamp].clone() for stamp in stamps}}, cache)
        except (OSError, RuntimeError) as error:                        # a folder one may only read
            print(f'not cached in {cache}: {error}')
    features = torch.stack([known[stamp] for stamp in stamps])
    good = features.isfinite().all(dim=1)
    for path in [path for path, ok in zip(paths, good) if not ok]:
        print(f'left out   {path} is no readable image')
    return [path for path, ok in zip(paths, good) if ok], features[good]


def contact_sheet(paths, scores, title, out, tile=176, columns=6):
    """PNG of images in rows, best first, with score and name below each."""
    rows, step = -(-len(paths) // columns), tile + 26
    canvas = Image.new('RGB', (columns * (tile + 6) + 6, rows * step + 30), 'white')
    draw = ImageDraw.Draw(canvas)
    draw.text((6, 6), title, 'black', font_size=15)
    for k, (path, score) in enumerate(zip(paths, scores)):
        x, y = 6 + k % columns * (tile + 6), 30 + k // columns * step
        picture = ImageOps.contain(Image.open(path).convert('RGB'), (tile, tile), Image.BICUBIC)
        canvas.paste(picture, (x + (tile - picture.width) // 2, y + (tile - picture.height) // 2))
        draw.text((x, y + tile + 2), f'{score:.3f} {path.name}'[:tile // 7], 'black', font_size=12)
    canvas.save(out)


# --- 9. Commands -----------------------------------------------------------------------------------------------------

def show(figures, indent=''):
    """Print nested figures, one a line: fractions in percent, with what guessing gives beside them; and ranks."""
    for name, value in figures.items():
        top = re.fullmatch(r'\w*(?:R@|top)(\d+)', name)
        chance = figures.get(f"{name.rpartition('_')[0]}_chance", figures.get('chance') if top else None)
        if isinstance(value, dict):
            print(f'{indent}{name}')
            show(value, indent + '  ')
        elif name.endswith('chance'):
            continue
        elif isinstance(value, float) and 'rank' not in name:           # K guesses find one target K times as often
            told = f'    chance {min(1, int(top[1] if top else 1) * chance):.2%}' if chance else ''
            print(f'{indent}{name:28} {value:8.2%}{told}')
        else:
            print(f'{indent}{name:28} {value:>8.1f}' if isinstance(value, float) else f'{indent}{name:28} {value:>8}')


def exactly_one(args, *names):
    """The one of these options that is given; ValueError for none or several."""
    chosen = [name for name in names if getattr(args, name)]
    if len(chosen) != 1:
        raise ValueError(f"{args.command} takes exactly one of {', '.join('--' + name for name in names)}")
    return chosen[0]


def run_retrieval(args, model, tokenizer, preprocess):
    read = {'coco': lambda: coco_captions(args.coco), 'flickr': lambda: flickr_captions(args.flickr, args.images),
            'karpathy': lambda: karpathy_captions(args.karpathy, args.split, args.images),
            'shards': lambda: shard_captions(Shards(args.shards))}
    source, captions, owner = read[exactly_one(args, *read)]()
    image_features = embed_images(model, source, preprocess, workers=args.workers)
    return retrieval(image_features, embed_texts(model, tokenizer, captions), owner)


def run_classify(args, model, tokenizer, preprocess):
    kind = exactly_one(args, 'dataset', 'folder', 'shards')
    if kind == 'shards':
        shards = Shards(args.shards)
        image_features = embed_images(model, shards, preprocess, workers=args.workers)
        figures = classify_objects(model, tokenizer, image_features, shards)
        if not figures:
            raise ValueError(f"{args.shards} lists no objects to name; its json needs 'objects', as of data.py make")
        return {'prompts': ' | '.join(TEMPLATES), **figures}
    if kind == 'dataset':
        (source, names), templates = torchvision_set(args.dataset, args.root, args.split, args.download), TEMPLATES
        image_features, labels = embed_labelled(model, source, preprocess, workers=args.workers)
    else:
        source, labels, names, templates = folder_classes(args.folder, args.classes, args.subset)
        image_features = embed_images(model, source, preprocess, workers=args.workers)
    templates = read_templates(args.templates) if args.templates else templates
    vectors = class_vectors(model, tokenizer, names, templates)
    return {'prompts': ' | '.join(templates), **classify(image_features, vectors, labels)}


def run_segment(args, model, tokenizer, preprocess):
    window = args.window or model.config.image_size
    o = Settings(*BENCHMARKS.get(args.benchmark, (window * 3 // 2, 40, 0, 0, False)), window, window // 2)
    o = o._replace(**{k: v for k, v in vars(args).items() if k in o._fields and v is not None and v is not False})
    classes = [[name.strip() for name in line.split(',')] for line in read_lines(args.classes)]
    names, templates = [some[0] for some in classes], read_templates(args.templates) if args.templates else TEMPLATES
    vectors = class_vectors(model, tokenizer, sum(classes, []), templates).to(device_of(model))
    pairs, matrix = mask_pairs(args.images, args.masks, args.image_suffix, args.mask_suffix, args.list), 0
    for picture, mask in tqdm(pairs, desc='images', disable=None, leave=False):
        try:
            image = Image.open(picture).convert('RGB')
        except OSError as error:
            raise ValueError(f'{picture} is no readable image ({error})') from None
        truth = read_mask(mask, image.size, len(classes), o.reduce_zero_label)
        labels = segment_image(model, image, vectors, list(map(len, classes)), o)
        matrix = matrix + confusion(truth, labels, len(classes))
        if args.save:
            Path(args.save).mkdir(parents=True, exist_ok=True)
            overlay(image, labels.numpy(), names, Path(args.save, f'{picture.stem}.png'))
    return {'images': len(pairs), 'settings': json.dumps(o._asdict()), 'prompts': ' | '.join(templates),
            **segmentation_figures(matrix, names)}


def run_pairs(args, model, tokenizer, preprocess):
    if exactly_one(args, 'items', 'suppression') == 'suppression':
        return suppression(model, tokenizer, preprocess, args.suppression, args.workers)
    items, groups = read_pairs(args.items), {}
    matrices = embed_items(model, tokenizer, preprocess, items, args.images or Path(args.items).parent, args.workers)
    for matrix, (_, _, kind) in zip(matrices, items):
        for name in dict.fromkeys(('all', kind or 'all')):
            groups.setdefault(f'{name} {matrix.shape[0]} x {matrix.shape[1]}', []).append(matrix)
    return {name: pair_scores(some) for name, some in groups.items()}


def run_attend(args, model, tokenizer, preprocess):
    attention_picture(model, tokenizer, preprocess, Image.open(args.image), args.text, args.out)
    return {'picture': args.out}


def run_search(args, model, tokenizer, preprocess):
    if bool(args.query) == bool(args.like):
        raise ValueError('search takes a query in words, or --like IMAGE')
    paths, features = folder_features(model, preprocess, args.images, args.workers)
    query = (embed_texts(model, tokenizer, [args.query]) if args.query else
             embed_images(model, [args.like], preprocess))[0]
    scores, best = (features @ query).topk(min(args.top, len(paths)))
    found = [paths[i] for i in best]
    contact_sheet(found, scores.tolist(), args.query or f'like {args.like}', args.out)
    for path, score in zip(found, scores.tolist()):
        print(f'{score:.4f}  {path}')
    return {'images': len(paths), 'picture': args.out}


def run_export(args, model, tokenizer, preprocess):
    return export(model, args.out)


def main():
    parser = Parser(description=__doc__.split('\n')[0])
    commands = parser.add_subparsers(dest='command', required=True)

    def command(name, run, help):
        sub = commands.add_parser(name, help=help)
        sub.set_defaults(run=run)
        sub.add_argument('checkpoint', metavar='CKPT')
        sub.add_argument('--weights', choices=['teacher', 'student'], default='teacher', help='which network')
        sub.add_argument('--vocab', help="CLIP's merges, for checkpoints that carry none")
        sub.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
        sub.add_argument('--workers', type=int, default=2, help='processes that read images')
        sub.add_argument('--json', help='also write the figures to this file')
        return sub

    sub = command('retrieval', run_retrieval, 'R@1/5/10 and ranks, both ways')
    sub.add_argument('--coco', help='folder with images/val2017 and annotations/captions_val2017.json')
    sub.add_argument('--karpathy', help="Karpathy's dataset_coco.json or dataset_flickr30k.json")
    sub.add_argument('--split', default='test', help="Karpathy's split")
    sub.add_argument('--flickr', help="the released code's flickr30k_val.json: a list of image and captions")
    sub.add_argument('--images', help='folder of the images of --karpathy or --flickr (default: beside the JSON)')
    sub.add_argument('--shards', help='held-out shards')
    sub = command('classify', run_classify, 'zero-shot top-1, top-5 and mean per class')
    sub.add_argument('--dataset', help='a classification set of torchvision.datasets, such as cifar10, dtd, food101')
    sub.add_argument('--root', default='data', help='where it lies')
    sub.add_argument('--split', help="torchvision's name of the split (default: test, else val)")
    sub.add_argument('--download', action='store_true', help='let torchvision fetch it into --root')
    sub.add_argument('--folder', help='one folder of images per class, or images with a labels.json')
    sub.add_argument('--classes', help='JSON of class names: for a labels.json, or {folder: name}')
    sub.add_argument('--subset', help='a subset that the classes file lists')
    sub.add_argument('--templates', help='file of prompts with {} for the class, a line each or a JSON list')
    sub.add_argument('--shards', help='shards that list objects: names the dominant and the small ones')
    sub = command('segment', run_segment, 'zero-shot segmentation: mIoU, IoU of each class, pixel accuracy')
    sub.add_argument('--images', required=True, help='folder of images')
    sub.add_argument('--masks', required=True, help='folder of PNG masks of class numbers; 255 is ignored')
    sub.add_argument('--classes', required=True, help='a class a line, in the order of its numbers, names by commas')
    sub.add_argument('--templates', help='file of prompts with {} for the class')
    sub.add_argument('--benchmark', choices=BENCHMARKS, help="a benchmark's settings; what follows changes single ones")
    sub.add_argument('--size', type=int, help='short side in pixels (default: 1.5 windows)')
    sub.add_argument('--window', type=int, help="side of the window (default: the model's image)")
    sub.add_argument('--stride', type=int, help='step of the window (default: half of it)')
    sub.add_argument('--csa', action='store_true', help='correlative self-attention in the last block')
    sub.add_argument('--scale', type=float, help='scale of the cosines before the softmax (default: 40)')
    sub.add_argument('--probability', type=float, help='pixels under it become class 0 (default: 0)')
    sub.add_argument('--area', type=float, help='classes with no more of the foreground vanish (default: 0)')
    sub.add_argument('--reduce-zero-label', action='store_true', help='label 0 is ignored, 1 becomes class 0')
    sub.add_argument('--image-suffix', default='', help='end of image names that masks lack, as _leftImg8bit')
    sub.add_argument('--mask-suffix', default='', help='end of mask names that images lack, as _labelTrainIds')
    sub.add_argument('--list', help='file of the stems to evaluate, as of a split')
    sub.add_argument('--save', help='folder for overlays with a legend')
    sub = command('pairs', run_pairs, 'hard negatives: image, text and group score')
    sub.add_argument('--items', help='JSONL of images and captions, or a file of SugarCrepe, SVO, MMVP-VLM, Winoground')
    sub.add_argument('--images', help='folder of its images (default: beside it)')
    sub.add_argument('--suppression', help='folder with probes.json: dominant against small objects')
    sub = command('attend', run_attend, 'picture of the cross-attention weights')
    sub.add_argument('--image', required=True)
    sub.add_argument('--text', required=True, nargs='+', help='one or more captions')
    sub.add_argument('--out', default='attention.png')
    sub = command('search', run_search, 'rank the images of a folder for a query')
    sub.add_argument('query', nargs='?', help='what to look for')
    sub.add_argument('--images', required=True, help='folder of images; features are kept beside it')
    sub.add_argument('--like', help='an image to look for instead of words')
    sub.add_argument('--top', type=int, default=12, help='how many to show')
    sub.add_argument('--out', default='search.png', help='the contact sheet')
    sub = command('export', run_export, "open_clip's state dict")
    sub.add_argument('out', metavar='OUT')

    args = parser.parse_args()
    model, tokenizer, preprocess = load(args.checkpoint, args.weights, vocab=args.vocab)
    asked = 'coco karpathy flickr dataset folder shards items suppression masks images image'.split()
    given = [str(vars(args)[name]) for name in asked if vars(args).get(name)]
    source = ', '.join(given) + (f', split {args.split}' if getattr(args, 'split', None) else '')
    count = sum(p.numel() for p in model.parameters())
    print(f'{args.command} of {args.checkpoint} ({model.origin}, {count:,} parameters)' + f' on {source}' * bool(given))
    figures = args.run(args, model.to(args.device), tokenizer, preprocess)
    show(figures)
    if args.json:
        about = {'checkpoint': args.checkpoint, 'weights': model.origin, 'data': source}
        Path(args.json).write_text(json.dumps(about | figures, indent=1))


if __name__ == '__main__':
    cli(main)
