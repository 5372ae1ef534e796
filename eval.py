"""Zero-shot evaluation of a checkpoint, and pictures of what it attends to.

    python eval.py retrieval CKPT --coco DIR                      images/val2017 + annotations/captions_val2017.json
    python eval.py retrieval CKPT --karpathy dataset_coco.json --split test --images DIR
    python eval.py retrieval CKPT --shards runs/scenes/val
    python eval.py classify CKPT --folder DIR                     one folder a class, or labels.json with --classes FILE
    python eval.py classify CKPT --shards runs/scenes/val         the dominant and the small object of each scene
    python eval.py attend CKPT --image a.jpg --text "a red star" "a small blue ring" --out attention.png

CKPT is ours (runs/.../last.pt), a released cosmos_vitb*.pt, or an open_clip ViT state dict. Scores come from the
teacher, the averaged weights, unless --weights student. Features are float32 of unit length, scores their products.
"""
import io
import json
import math
import pickle
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from cosmos import COSMOS, Config, from_openclip, unit
from data import Parser, Preprocess, Shards, Tokenizer, cli

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


# --- 2. Features -----------------------------------------------------------------------------------------------------

class Images(torch.utils.data.Dataset):
    """Preprocessed images of a list of paths or of Shards."""

    def __init__(self, source, preprocess):
        self.source, self.preprocess = source, preprocess

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        inside = isinstance(self.source, Shards)
        try:
            data = self.source.image(i) if inside else Path(self.source[i]).read_bytes()
            return self.preprocess(Image.open(io.BytesIO(data)))
        except OSError as error:
            where = self.source.name(i) if inside else self.source[i]
            raise ValueError(f'{where} is no readable image ({error})') from None


def device_of(model):
    return next(model.parameters()).device


@torch.no_grad()
def embed_images(model, source, preprocess, batch=64, workers=0):
    """Paths or Shards -> (n, D) unit vectors on the CPU."""
    loader = torch.utils.data.DataLoader(Images(source, preprocess), batch, num_workers=workers)
    try:
        return torch.cat([unit(model.visual([images.to(device_of(model))])[0][0]).cpu()
                          for images in tqdm(loader, desc='images', disable=None, leave=False)])
    except ValueError as error:                         # from a worker it comes with a traceback; its sentence is last
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix('ValueError: ')) from None


@torch.no_grad()
def embed_texts(model, tokenizer, texts, batch=256):
    """n texts -> (n, D) unit vectors on the CPU. Neighbours in length share a batch, cut to its longest."""
    tokens = tokenizer(texts, model.config.context_length)
    length = tokens.argmax(dim=1) + 1                                   # the end has the largest id
    features = torch.empty(len(tokens), model.config.embed_dim)
    for some in tqdm(length.argsort().split(batch), desc='texts', disable=None, leave=False):
        ids = tokens[some, :int(length[some].max())].to(device_of(model))
        features[some] = unit(model.text([ids])[0][0]).cpu()
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


def read_json(path, *keys):
    """The JSON at `path`, an object with `keys` where any are named; else ValueError."""
    try:
        value = json.loads(Path(path).read_text(encoding='utf-8'))
    except OSError as error:
        raise ValueError(f'{path} cannot be read ({error.strerror})') from None
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


def class_vectors(model, tokenizer, names, templates=TEMPLATES):
    """Prompt ensemble: embed every template, normalise, average, normalise again. -> (len(names), D)"""
    prompts = [template.format(name) for name in names for template in templates]
    return unit(embed_texts(model, tokenizer, prompts).view(len(names), len(templates), -1).mean(dim=1))


def classify(image_features, vectors, labels):
    """Plain accuracy. image_features (n, D), vectors (K, D), labels (n,) -> top1, top5, counts, chance."""
    scores = image_features @ vectors.T
    own = scores.gather(1, labels[:, None])
    wrong = torch.arange(len(vectors)) != labels[:, None]
    ahead = ((scores >= own) & wrong).sum(dim=1)                        # ties count against us, as in `ranks`
    return {'images': len(labels), 'classes': len(vectors), 'chance': 1 / len(vectors),
            'top1': (ahead < 1).float().mean().item(), 'top5': (ahead < 5).float().mean().item()}


def folder_classes(root, classes=None, subset=None):
    """One folder per class, or labels.json [{"file", "class_id"}] and `classes` -> (paths, labels, names, templates).

    `classes` is a list of names, or {"classes": [{"id", "name", "noun_phrase"}], "subsets": {name: ids}, "templates"}.
    """
    root = Path(root)
    if not (root / 'labels.json').exists():
        folders = sorted(p for p in root.glob('[!.]*') if p.is_dir())   # NB: .cache would be one class more to guess
        found = [(p, k) for k, folder in enumerate(folders) for p in sorted(folder.rglob('[!.]*')) if p.is_file()]
        if not found:
            raise ValueError(f'{root} has neither one folder of images per class nor a labels.json')
        names = [folder.name.replace('_', ' ') for folder in folders]
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


# --- 5. Attention pictures -------------------------------------------------------------------------------------------

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


# --- 6. Commands -----------------------------------------------------------------------------------------------------

def show(figures, indent=''):
    """Print nested figures, one a line: fractions in percent, with what guessing gives beside them; and ranks."""
    for name, value in figures.items():
        top = re.search(r'(?:R@|top)(\d+)$', name)
        if isinstance(value, dict):
            print(f'{indent}{name}')
            show(value, indent + '  ')
        elif top and 'chance' in figures:                               # K guesses find one target K times as often
            print(f"{indent}{name:28} {value:8.2%}    chance {min(1, int(top[1]) * figures['chance']):.2%}")
        elif name != 'chance':
            print(f'{indent}{name:28} {value:>8.1f}' if isinstance(value, float) else f'{indent}{name:28} {value:>8}')


def run_retrieval(args, model, tokenizer, preprocess):
    chosen = [name for name in ('coco', 'karpathy', 'shards') if getattr(args, name)]
    if len(chosen) != 1:
        raise ValueError('retrieval takes exactly one of --coco DIR, --karpathy JSON and --shards SHARDS')
    if args.coco:
        source, captions, owner = coco_captions(args.coco)
    elif args.karpathy:
        source, captions, owner = karpathy_captions(args.karpathy, args.split, args.images)
    else:
        source, captions, owner = shard_captions(Shards(args.shards))
    image_features = embed_images(model, source, preprocess, workers=args.workers)
    return retrieval(image_features, embed_texts(model, tokenizer, captions), owner)


def run_classify(args, model, tokenizer, preprocess):
    if bool(args.folder) == bool(args.shards):
        raise ValueError('classify takes exactly one of --folder DIR and --shards SHARDS')
    if args.shards:
        shards = Shards(args.shards)
        image_features = embed_images(model, shards, preprocess, workers=args.workers)
        figures = classify_objects(model, tokenizer, image_features, shards)
        if not figures:
            raise ValueError(f"{args.shards} lists no objects to name; its json needs 'objects', as of data.py make")
        return {'prompts': ' | '.join(TEMPLATES), **figures}
    paths, labels, names, templates = folder_classes(args.folder, args.classes, args.subset)
    image_features = embed_images(model, paths, preprocess, workers=args.workers)
    vectors = class_vectors(model, tokenizer, names, templates)
    return {'prompts': ' | '.join(templates), **classify(image_features, vectors, labels)}


def run_attend(args, model, tokenizer, preprocess):
    attention_picture(model, tokenizer, preprocess, Image.open(args.image), args.text, args.out)
    return {'picture': args.out}


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
    sub.add_argument('--images', help="folder of Karpathy's images (default: beside the JSON)")
    sub.add_argument('--shards', help='held-out shards')
    sub = command('classify', run_classify, 'zero-shot top-1 and top-5')
    sub.add_argument('--folder', help='one folder of images per class, or images with a labels.json')
    sub.add_argument('--classes', help='JSON of class names for a labels.json')
    sub.add_argument('--subset', help='a subset that the classes file lists')
    sub.add_argument('--shards', help='shards that list objects: names the dominant and the small ones')
    sub = command('attend', run_attend, 'picture of the cross-attention weights')
    sub.add_argument('--image', required=True)
    sub.add_argument('--text', required=True, nargs='+', help='one or more captions')
    sub.add_argument('--out', default='attention.png')

    args = parser.parse_args()
    model, tokenizer, preprocess = load(args.checkpoint, args.weights, vocab=args.vocab)
    given = [vars(args).get(name) for name in ('coco', 'karpathy', 'folder', 'shards', 'image')]
    source = ', '.join(filter(None, given)) + (f', split {args.split}' if getattr(args, 'karpathy', None) else '')
    count = sum(p.numel() for p in model.parameters())
    print(f'{args.command} of {args.checkpoint} ({model.origin}, {count:,} parameters) on {source}')
    figures = args.run(args, model.to(args.device), tokenizer, preprocess)
    show(figures)
    if args.json:
        about = {'checkpoint': args.checkpoint, 'weights': model.origin, 'data': source}
        Path(args.json).write_text(json.dumps(about | figures, indent=1))


if __name__ == '__main__':
    cli(main)
