"""eval.py: each figure by hand, each command against the functions, what is read and what is refused."""
import json
import math
import multiprocessing
import os
import re
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms import v2

import eval as evaluation
from plumbing.captions import CAPTION_KEYS
from cosmos import COSMOS, Block, Config, unit
from data import Shards, Tokenizer
from plumbing import benchmarks
from plumbing.processes import SIGNALS
from plumbing.weights import to_openclip
from tests.helpers import MICRO, close, encoded, micro, pairs_tar, put, refused, run, seeded, shared  # noqa: F401


def embed(model, tokenizer, *texts):
    """All texts at full length, embedded by model.encode_text."""
    return unit(model.encode_text(tokenizer(texts))[0])


@pytest.fixture
def here(monkeypatch, tmp_path):
    """The test runs in a folder of its own, so that names of files are short."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def gallery(here, monkeypatch):
    """A checkpoint last.pt whose tokenizer reads bytes, and three pictures, also in images/: the model and tokenizer,
    the pictures, their features, and figures(line), which runs a command of eval.py."""
    monkeypatch.setattr(evaluation, 'TEXT_BATCH', 2)
    monkeypatch.setattr(evaluation, 'IMAGE_BATCH', 2)
    tokenizer = Tokenizer([], 48)                       # 48 ids hold every template with every name
    config = replace(MICRO, vocab_size=tokenizer.vocab_size, context_length=48)
    model = COSMOS(config).requires_grad_(False)
    torch.save({'config': vars(config), 'merges': [], 'student': model.state_dict()}, 'last.pt')
    preprocess = evaluation.preprocessing(32)
    images = [Image.effect_mandelbrot((50, 40), (i - 2, -1, 1, 1), 40) for i in range(3)]
    for i, image in enumerate(images):
        put(f'images/{i}.png', encoded(image))
    pixels = torch.stack([preprocess(image) for image in images])
    features = unit(model.encode_image(pixels)[0])

    def figures(line):
        name, *flags = line.split()
        # of a folder its last.pt
        workers = [] if name == 'segment' else ['--workers', 0]
        assert run(evaluation, name, '.', *workers, '--json', 'json', *flags) is None
        found = json.loads(Path('json').read_text())
        origin = [found.pop(name) for name in ('network', 'checkpoint', 'step', 'method')]
        assert origin == ['student', 'last.pt', 'unknown', None]
        return found

    return SimpleNamespace(scored=(model, tokenizer), images=images, features=features, figures=figures)


# --- Figures ---------------------------------------------------------------------------------------------------------

def test_retrieval_by_hand():
    """oracle: ranks read off by eye, with ties counted against the model; the same in chunks, and where the features
    are: torch's device meta does not mix with the CPU."""
    captions = torch.tensor([[1, 0], [0.9, 0.9],                        # right; a tie
                             [0.9, 0.2], [0.3, 0.8]])                   # finds image 0; right
    owner = torch.tensor([0, 0, 1, 1])
    figures = evaluation.retrieval(torch.eye(2), captions, owner)
    # image 0: its 1.0 is ahead of all. image 1: its best is 0.8, behind the 0.9 of a caption of image 0
    wanted = {'images': 2, 'captions': 4, 'chance': 0.5}
    for way in 'image_to_text', 'text_to_image':
        wanted |= {f'{way}_R@1': 0.5, f'{way}_R@5': 1, f'{way}_R@10': 1}
        wanted |= {f'{way}_mean_rank': 1.5, f'{way}_median_rank': 1.5}
    assert figures == wanted
    assert evaluation.target_ranks(captions, torch.eye(2), owner, torch.arange(2), chunk=1).tolist() == [1, 2, 2, 1]
    vectors = unit(torch.randn(10, 512))
    vectors[9] = vectors[0]                             # the scores of both must tie, wherever they stand
    images = unit(vectors[:1] + torch.randn(300, 512) / 30)
    assert (evaluation.target_ranks(images, vectors, torch.zeros(300), torch.arange(10)) > 1).all()
    one = unit(torch.randn(1, 512)).expand(65, -1) + 1e-8 * torch.randn(65, 512)        # one picture in several batches
    assert (evaluation.target_ranks(one, one, torch.arange(65), torch.arange(65)) == 65).all()
    near = unit(torch.tensor([[1, 0], [1, 0.01]]))      # 5e-5 behind is behind
    assert evaluation.target_ranks(near[:1], near, torch.arange(1), torch.arange(2)).tolist() == [1]
    ids = torch.arange(30) % 10
    features = torch.full((30, 6), math.nan)            # must not look perfect
    assert evaluation.target_ranks(features, features, ids, ids).tolist() == [28] * 30
    there = features.to('meta')
    assert evaluation.target_ranks(there, there, ids.to('meta'), ids.to('meta'), chunk=7).device.type == 'meta'


def test_workers(gallery, monkeypatch):
    """oracle: the features without workers, although Slurm and torchrun signal every process, here each worker at each
    image. One image may be a name, a path or opened."""
    model, _ = gallery.scored
    preprocess = evaluation.preprocessing(32)
    wanted = evaluation.embed_images(model, gallery.images, preprocess)
    load_image = evaluation.load_image

    def signalled(image):
        assert multiprocessing.parent_process()         # this is a worker
        for number in SIGNALS:
            os.kill(os.getpid(), number)
        return load_image(image)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, 'load_image', signalled)
        found = evaluation.embed_images(model, gallery.images, preprocess, workers=2)
    assert_close(found, wanted, rtol=0, atol=0)
    for source in 'images/1.png', Path('images/1.png'), Image.open('images/1.png'):
        close(evaluation.embed_images(model, source, preprocess), wanted[1:2])


def test_classification_by_hand():
    """oracle: hand-made scores: right, fifth, sixth, tied."""
    falling = [7.0, 6, 5, 4, 3, 2, 1]
    scores = torch.tensor([falling, falling, falling, [3, 1, 3, 0, 0, 0, 0]])
    figures = evaluation.classify(scores, torch.eye(7), torch.tensor([0, 4, 5, 0]))
    assert figures == {'images': 4, 'classes': 7, 'chance': 1 / 7, 'top1': 1 / 4, 'top5': 3 / 4,
                       'mean_per_class_top1': pytest.approx(1 / 6)}


def test_windows_are_averaged(gallery):
    """oracle: the windows by hand, on sides that are no multiple of half a window; torch scales each up alone."""
    model, _ = gallery.scored
    pixels = torch.randn(3, 37, 63)
    vectors = unit(torch.randn(5, 16))
    total = torch.zeros(5, 37, 63)
    count = torch.zeros(37, 63)
    for y in 0, 5:
        for x in 0, 16, 31:                             # the last windows end at the border
            window = (..., slice(y, y + 32), slice(x, x + 32))
            grid = evaluation.encode_dense(model, pixels[window][None], csa=True)           # (1, 4, 4, D)
            scores = torch.einsum('byxd,qd->bqyx', grid, vectors)
            total[window] += F.interpolate(scores, scale_factor=8, mode='bilinear')[0]
            count[window] += 1
    close(evaluation.window_scores(model, pixels, vectors, csa=True), total / count)


def test_correlative_attention_is_two_of_torchs():
    """oracle: two of torch's own attentions: keys projected as the queries are, and queries as the keys are."""
    model, images, _ = micro()
    assert_close(evaluation.encode_dense(model, images[0]), evaluation.encode_dense(model, images[0], csa=False))
    block = Block(24, 4, quick_gelu=False, causal=False)
    attention = block.attn
    x = torch.randn(3, 7, 24)
    found = evaluation.correlative_block(block, x)
    rows = F.layer_norm(x, (24,))
    q, k, v = attention.in_proj_weight.data.chunk(3)
    expected = x
    for weights in q, k:
        attention.in_proj_weight.data = torch.cat([weights, weights, v])
        bias = attention.in_proj_bias, None, None, False, 0.0, attention.out_proj.weight, None
        expected = expected + F.multi_head_attention_forward(
            *[rows.transpose(0, 1)] * 3, 24, 4, attention.in_proj_weight, *bias)[0].transpose(0, 1)
    close(found, expected + block.mlp(F.layer_norm(expected, (24,))))


def test_segmentation_by_hand(monkeypatch):
    """oracle: six pixels worked out by pencil. The short side sets the size, or the limit on the long one, or a window."""
    # names: ground | ape, monkey | ox. Softmax at scale ln 3 and cosines 0 or 1: one name at 1 of 4 gets 3/6.
    scores = torch.eye(4)[[0, 1, 2, 2, 3, 1]]
    scores[5, 2] = scores[1, 3] = 1                     # ape and monkey; ape and ox, of which the first counts

    def window_scores(model, pixels, *rest):
        assert pixels.shape == (3, 4, 6)
        return scores.T.view(4, 2, 3)

    monkeypatch.setattr(evaluation, 'window_scores', window_scores)
    assert evaluation.LONGEST_SIDE == 2048              # as released
    monkeypatch.setattr(evaluation, 'LONGEST_SIDE', 6)
    for size, window, changes, expected in (
            (4, 2, {}, [0, 1, 1, 1, 2, 1]),                                # monkey is ape
            (4, 2, {'probability': 0.4}, [0, 0, 1, 1, 2, 0]),              # two names share: 3/8 each
            (2, 4, {'area': 0.2}, [0, 1, 1, 1, 0, 1]),                     # ox has 1 of 5 foreground pixels
            (9, 2, {'area': 0.19}, [0, 1, 1, 1, 2, 1])):
        settings = benchmarks.Settings(size, scale=math.log(3), **changes)
        model = SimpleNamespace(config=SimpleNamespace(image_size=window))
        found = evaluation.segment_image(model, Image.new('RGB', (3, 2)), scores, [0, 1, 1, 2], settings).flatten()
        assert found.tolist() == expected
    truth = torch.tensor([0, 1, 1, 255, 3, 0])
    figures = evaluation.segmentation_figures(
        evaluation.confusion(truth, found, 5), ['ground', 'ape', 'ox', 'cow', 'absent'])
    assert figures == {'IoU': pytest.approx({'ground': 1 / 2, 'ape': 2 / 3, 'ox': 0, 'cow': 0}),
                       'mIoU': pytest.approx(7 / 24), 'pixel_accuracy': 3 / 5, 'classes': 3}


def test_large_photos_are_segmented_name_by_name(monkeypatch):
    """oracle: the softmax over all names at once, on all pixels. No step enlarges more than one name."""
    logits = 4 * torch.randn(10, 3, 4)
    whole = F.interpolate(logits[None], (15, 20), mode='bilinear')[0].softmax(dim=0)
    class_0_and_3 = torch.stack([whole[:2].amax(dim=0), whole[7:].amax(dim=0)])
    spy = Mock(wraps=F.interpolate)
    monkeypatch.setattr(F, 'interpolate', spy)
    highest, classes = benchmarks.best_class(logits, (15, 20), [0, 0, 1, 2, 2, 2, 2, 3, 3, 3], [0, 3])
    close(highest, class_0_and_3.amax(dim=0))
    assert classes.equal(3 * class_0_and_3.argmax(dim=0))
    assert {call.args[0].shape for call in spy.call_args_list} == {(1, 1, 3, 4)}


# --- What is read ----------------------------------------------------------------------------------------------------

def test_checkpoints_of_every_origin(here):
    """oracle: the model that was saved, under the released names, with prefixes, and under open_clip's."""
    vocab = shared('vocab', 'bpe_simple_vocab_16e6.txt.gz')
    model = COSMOS(Config(64, 224, 96, 16, 128, 2, 2, 64, 1, 1, 77, 49408, 8))
    plain = COSMOS(replace(model.config, cross_heads=0, vision_width=64, vision_heads=1))
    theirs = to_openclip(model.state_dict())
    other = to_openclip(plain.state_dict())

    def load(state, weights='teacher'):
        torch.save(state, 'saved.pt')
        return evaluation.load('saved.pt', weights, vocab)

    both = {'student': other, 'teacher': theirs}
    prefixed = {f'_orig_mod.module._orig_mod.{key}': value for key, value in theirs.items()}
    for state, weights, origin, source in [
            (both, 'teacher', 'teacher', model),
            (both, 'student', 'student', plain),
            ({'student': other}, 'teacher', 'student', plain),          # it says what it scored
            ({'state_dict': prefixed}, 'teacher', 'state_dict', model),
            (other, 'teacher', 'state dict', plain)]:
        loaded, _, _ = load(state, weights)
        assert (loaded.config, str(loaded.origin)) == (source.config, f'{origin} of saved.pt')
        assert_close(loaded.state_dict(), source.state_dict(), rtol=0, atol=0)
    refused("has values that are not finite, first in .'logit_scale'.", load, other | {'logit_scale': torch.tensor(math.nan)})
    small = torch.ones(1, 1)
    refused('size mismatch for visual.proj', load, other | {'visual.proj': small})
    refused('it has other merges', load, other | {'token_embedding.weight': small})
    refused('this model: Missing key', load, {name: other[name] for name in other if 'mlp' not in name})
    wide = COSMOS(replace(plain.config, vision_width=1024, vision_layers=1, vision_heads=16,     # of ViT-L
                          text_width=128, text_heads=2, image_size=16, local_image_size=16))     # one patch
    assert load(to_openclip(wide.state_dict()))[0].config == wide.config


def test_a_folder_means_its_best(gallery):
    """oracle: the file that was written as best.pt; in words, the file and its step."""
    model, _ = gallery.scored
    saved = torch.load('last.pt')
    saved['student'] = {name: value + 1 for name, value in saved['student'].items()}
    torch.save(saved | {'step': 70, 'method': 'across'}, 'best.pt')
    loaded, _, _ = evaluation.load('.')
    assert_close(loaded.logit_scale, model.logit_scale + 1)
    assert str(loaded.origin) == 'student of best.pt, step 70 of --method across'


def test_images_are_resized_as_torchvision_does():
    """oracle: torchvision's own transforms: bit for bit up to eight times as long as wide and just above that; up to
    rounding for longer images, of which only a part is enlarged. White in the middle has OpenAI's values."""
    plain = v2.Compose([v2.RGB(), v2.Resize(32, evaluation.BICUBIC), v2.CenterCrop(32), v2.PILToTensor()])
    ordinary = [(32, 32), (41, 30), (47, 64), (64, 47), (120, 90), (13, 104), (104, 13), (30, 241), (241, 30)]
    for size in ordinary + [(3, 6000), (3, 6003), (6000, 2), (6003, 2)]:
        image = Image.effect_noise(size, 90)
        wanted = evaluation.normalize(plain(image))
        found = evaluation.preprocessing(32)(image)
        assert found.equal(wanted) or size not in ordinary
        assert (found - wanted).abs().mean() < 0.05                     # deviations are 1
        assert max(evaluation.shorten(image).size) <= 8 * min(size) + 1
    assert evaluation.preprocessing(32).transforms[0] == evaluation.shorten             # else 6,000 pixels take 1.2 GB
    image = Image.new('RGB', (448, 224))
    image.paste('white', (112, 0, 336, 224))
    white = evaluation.preprocessing(224)(image).amin(dim=(1, 2))
    close(white, torch.tensor([1.9303, 2.0749, 2.1459]), 1e-4)


def test_captions_of_held_out_shards(here):
    """oracle: pairs written here: the first key that has a caption, of the named ones if any; nothing is split."""
    records = [
        b'{"captions": ["an ape. an ox", "a cow"], "caption": "dog", "mine": "an eel"}',
        b'{"captions": ["", " "], "raw_caption": "a gnu. a hen", "caption": "ibis", "mine": " ", '
        b'"other": ["jay", "a kid. a lion"]}']
    pairs_tar('a.tar', records, [encoded(Image.new('L', (9, 9)))] * 2)
    for family in CAPTION_KEYS:
        assert set(family) & set(evaluation.HELD_OUT_KEYS), family
    for keys, captions, owner in (
            (None, ['an ape. an ox', 'a cow', 'a gnu. a hen'], [0, 0, 1]),
            ('mine , other', ['an eel', 'jay', 'a kid. a lion'], [0, 1, 1])):
        found, owners = evaluation.shard_captions(Shards('a.tar', keys))
        assert (found, owners.tolist()) == (captions, owner)
    refused('a.tar:1.png .* under mine; .*--caption-keys', evaluation.shard_captions, Shards('a.tar', 'mine'))
    for caption, sentence in (['x', None], 'a caption that is not text: .*None'), ([' '], 'no caption under'):
        pairs_tar('b.tar', [{'caption': 'x'}, {'caption': caption}])
        refused(f'b.tar:1.png has {sentence}', evaluation.shard_captions, Shards(['a.tar', 'b.tar']))


SETTINGS = {            # as released, after SCLIP: size, classes, scale, probability, area, whether label 0 is ignored
    'voc21': (336, 21, 65, 0.1, 0.1, False),
    'context60': (336, 60, 50, 0.1, 0, False),
    'coco-object': (336, 81, 50, 0.1, 0, False),
    'voc20': (336, 20, 40, 0, 0, True),
    'cityscapes': (560, 19, 40, 0, 0, False),
    'context59': (336, 59, 40, 0, 0, True),
    'ade20k': (336, 150, 40, 0, 0, True),
    'coco-stuff': (448, 171, 40, 0, 0, False)}


def test_masks_and_their_errors(here, capsys):
    """oracle: a mask written here; a label too large is refused, with its file; the released settings."""
    numbers = [[0, 1, 255], [2, 2, 0]]
    image = Image.fromarray(np.uint8(numbers))
    image.putpalette(list(range(256)) * 3)
    path = put('a_ids.png', encoded(image))
    read = benchmarks.read_mask
    assert read(path, 3, False).tolist() == numbers
    assert read(path, 2, True).tolist() == [[255, 0, 255], [1, 1, 255]]
    assert read(put('16.png', encoded(Image.fromarray(np.uint16([[0, 299]])))), 300, False).tolist() == [[0, 299]]
    refused('a_ids.png has label 2; with 2 lines in the class file it may be at most 1', read, path, 2, False)
    assert read(put('one.png', encoded(Image.new('L', (2, 1)))), 1, False).tolist() == [[0, 0]]
    four_bits = b'\x89PNG\r\n\x1a\n'                    # grey: 1 and 2, which Pillow makes 17 and 34
    for kind, content in ((b'IHDR', struct.pack('>IIBBBBB', 2, 1, 4, 0, 0, 0, 0)), (b'IDAT', zlib.compress(b'\0\x12')),
                          (b'IEND', b'')):
        four_bits += struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
    refused('four.png .*grey of 4 bits', read, put('four.png', four_bits), 150, False)
    benchmarks.read_synonyms(put('names', 'wall, bed\nox\nbed\n'))
    assert 'in names several lines have the name bed; ' in capsys.readouterr().out
    refused('would tie: crane', benchmarks.check_names, ['Crane', 'ox', 'crane'])
    found = {name: settings[:6] for name, settings in benchmarks.BENCHMARKS.items()}
    assert found == SETTINGS and benchmarks.Settings(336) == (336, 0, 40, 0, 0, False, False)


# --- Commands --------------------------------------------------------------------------------------------------------

def test_retrieval_of_shards_and_lists(gallery):
    """oracle: retrieval of the captions written here. In the lists they end in ' .', which is taken off; COCO's stand
    in another order; one of white space is none. Of a folder with two halves val/ is used."""
    captions = ['ox 0', 'ox 1', 'ox 2']
    wanted = evaluation.retrieval(gallery.features, embed(*gallery.scored, *captions), torch.arange(3))
    records = [{'caption': 'same', 'mine': caption} for caption in captions]
    pairs_tar(put('set/val/0.tar'), records, map(encoded, gallery.images))
    put('set/train/0.tar')
    assert gallery.figures('retrieval --shards set --caption-keys mine') == wanted
    listing = [{'image': f'{i}.png', 'caption': f'{caption} .'} for i, caption in enumerate(captions)]
    karpathy = [{'filename': 'x', 'split': 'train', 'sentences': [{'raw': 'x'}]}]
    coco = {'images': [], 'annotations': []}
    for i, caption in enumerate(captions):
        put(f'images/val2017/coco{i}.png', encoded(gallery.images[i]))
        coco['images'].append({'id': i, 'file_name': f'coco{i}.png'})
        coco['annotations'].insert(0, {'image_id': i, 'caption': caption})
        sentences = [{'raw': f'{caption} .'}, {'raw': ' '}]
        karpathy.append({'filepath': 'val2017', 'filename': f'coco{i}.png', 'split': 'test', 'sentences': sentences})
    put('annotations/captions_val2017.json', coco)
    put('images/karpathy', {'images': karpathy})
    put('karpathy', {'images': karpathy})
    assert gallery.figures('retrieval --list annotations/captions_val2017.json --images images/val2017') == wanted
    assert gallery.figures('retrieval --list images/karpathy --split test') == wanted
    assert gallery.figures('retrieval --list karpathy --images images') == wanted
    for file, flags in ('images/list', ''), ('list', '--images images --workers 1'):
        put(file, listing)
        assert gallery.figures(f'retrieval --list {file} {flags}') == wanted
    # An image may have several items.
    put('list', [{'image': '0.png', 'caption': 'ox 0'}, *listing[1:], {'image': '0.png', 'caption': 'ox 3'}])
    grouped = [{'image': '0.png', 'caption': ['ox 0', 'ox 3']}, *listing[1:]]
    put('grouped', grouped)
    figures = gallery.figures('retrieval --list list --images images')
    assert figures == gallery.figures('retrieval --list grouped --images images')
    assert (figures['images'], figures['captions']) == (3, 4)


def test_sets_of_torchvision(gallery, monkeypatch):
    """oracle: stand-ins for four sets. SUN397's names are words; EuroSAT's are not, so --classes is asked for. CIFAR10
    has a switch in place of splits. The last has a label that no name is given for."""
    put('SUN397/ClassName.txt', '/a/abbey\n/b/ball_pit')
    files = 'SUN397/a/abbey/sun_a.jpg SUN397/b/ball_pit/sun_b.jpg eurosat/2750/AnnualCrop/a.png'
    for file in files.split():
        put(file, encoded(gallery.images[0]))
    figures = gallery.figures('classify --dataset SUN397 --root .')
    assert (figures['names'], figures['split'], figures['images']) == (['abbey', 'ball pit'], 'none, all images', 2)
    line = 'classify . --dataset EuroSAT --root .'
    assert '--classes' in run(evaluation, *line.split())

    def cifar(root, train, transform, download=False):
        return train, download

    monkeypatch.setattr(benchmarks.torchvision.datasets, 'CIFAR10', cifar)
    for split, switches in (None, (False, False)), ('train', (True, True)):
        assert benchmarks.torchvision_set('CIFAR10', '.', split, switches[1], None) == (switches, split or 'test')
    put('names', 'ox\ngnu')
    monkeypatch.setattr(evaluation, 'torchvision_set', lambda *how: ([(torch.zeros(3, 32, 32), 2)], 'test'))
    said = run(evaluation, 'classify', '.', '--dataset', 'DTD', '--workers', 0, '--classes', 'names')
    assert said.startswith('error: the labels go up to 2, counted from 0, but there are 2 names; ')


def test_prompts_of_open_clip(monkeypatch, gallery):
    """oracle: a stand-in for the package. Its names come with --classes. Of torchvision's synonyms the first is the name;
    equal names are refused."""
    stand_in = SimpleNamespace(OPENAI_IMAGENET_TEMPLATES=(lambda c: f'my {c}.', lambda c: f'{c}!'),
                               IMAGENET_CLASSNAMES=['crane', 'crane'])
    monkeypatch.setitem(sys.modules, 'open_clip', stand_in)
    assert benchmarks.read_templates('open_clip', None) == ['my {}.', '{}!']
    for i in range(2):
        put(f'set/n0000000{i}/a.png', encoded(gallery.images[i]))
    put('names', 'ox\ngnu')
    line = 'classify --folder set --templates open_clip'
    figures = gallery.figures(f'{line} --classes names')
    assert (figures['names'], figures['prompts']) == (['ox', 'gnu'], 'my {}. | {}!')
    assert gallery.figures(f'{line} --classes open_clip')['names'] == ['crane', 'crane']
    synonyms = [('crane', 'bird'), ('ox',)]
    assert benchmarks.class_names(SimpleNamespace(classes=synonyms)) == ['crane', 'ox']
    refused('would tie: crane, ox', benchmarks.class_names, SimpleNamespace(classes=2 * synonyms))


def test_classify_of_every_source(gallery):
    """oracle: `classify`, which a test above checks, on the same images and prompts. Equal names have equal vectors, to
    the last bit, whichever batches of prompts they are in."""
    files = ['banded/0.png', 'woven_/1.png', 'woven_/2.png']
    for file, image in zip(files, gallery.images):                      # as torchvision's DTD
        put(f'dtd/dtd/images/{file}', encoded(image))
    put('dtd/dtd/labels/test1.txt', '\n'.join(files))
    put('prompts', 'my {}\n\n{}!')
    put('names', 'banded\n woven\n\n')                # a blank line at the end is none
    both = embed(*gallery.scored, 'my banded', 'my woven') + embed(*gallery.scored, 'banded!', 'woven!')
    close(evaluation.class_vectors(*gallery.scored, ['banded', 'woven'], ['my {}', '{}!']), unit(both))
    wanted = evaluation.classify(gallery.features, unit(both), torch.tensor([0, 1, 1]))
    wanted |= {'prompts': 'my {} | {}!', 'names': ['banded', 'woven']}
    for source, split in (('--dataset DTD --root . --classes names', 'test'),
                          ('--folder dtd/dtd/images', 'none, all images')):
        assert gallery.figures(f'classify {source} --templates prompts') == wanted | {'split': split}
    vectors = evaluation.class_vectors(*gallery.scored, ['ox', 'a cow of many words', 'ox', 'gnu', 'ox'], ['my {}'])
    assert vectors[0].equal(vectors[2]) and vectors[0].equal(vectors[4]) and not vectors[0].equal(vectors[3])


def test_segment_command(gallery, monkeypatch, capsys):
    """oracle: the functions that the tests above check, on the same input; by hand, what is printed."""
    model, _ = gallery.scored
    settings = benchmarks.BENCHMARKS['voc21']._replace(size=48, classes=2, area=0)
    monkeypatch.setitem(benchmarks.BENCHMARKS, 'voc21', settings)
    settings = settings._replace(csa=True)              # --csa
    vectors = evaluation.class_vectors(*gallery.scored, ['background', 'ox', 'water'])
    for i, image in enumerate(gallery.images):          # masks of what must be found
        labels = evaluation.segment_image(model, image, vectors, [0, 0, 1], settings)
        put(f'masks/{i}_ids.png', encoded(Image.fromarray(labels.byte().numpy())))
    put('classes', 'background, ox\nwater\n')
    line = 'segment --images images --masks masks --mask-suffix _ids --classes classes'
    figures = gallery.figures(f'{line} --benchmark voc21 --csa')
    assert (figures['images'], figures['mIoU']) == (3, 1)
    printed = re.findall('^(images|  background|  water) +(.*)$', capsys.readouterr().out, re.M)
    assert printed == [('images', '3'), ('  background', '100.00%'), ('  water', '100.00%')]
    assert figures['settings'] == str(settings)
    assert gallery.figures(line)['settings'] == str(benchmarks.Settings(48))
    put('masks/0_ids.png', encoded(Image.new('L', (3, 2))))
    assert 'masks/0_ids.png and image images/' in run(evaluation, *line.replace(' ', ' . ', 1).split())


WRONG = {               # a command: what its sentence must say
    'retrieval page.pt --shards a.tar': 'page.pt is not (?!.*weights_only).*says: .{80}.; .*fetch it again',
    'retrieval empty --shards a.tar': 'empty/last.pt does not exist',
    'retrieval bad.pt --shards a.tar': 'bad.pt .* holds posix.system, which may run code',
    'retrieval last.pt --shards empty': "'empty' .* no .tar file",
    'retrieval last.pt --shards a.tar': 'a.tar:1.png.* json or .txt cannot be read.*extras.look',
    'retrieval last.pt --list white --split val': 'white lists no image of the split val; give one of test with --split',
    'retrieval last.pt --list white': 'a.jpg, listed in white, has no caption',
    'retrieval last.pt --list keys': "keys has the columns image, text, of which not one is 'caption'",
    'retrieval last.pt --list one --split val': 'one has no splits; omit --split',
    'retrieval last.pt --shards a.tar --split val': '--images and --split are for --list',
    'retrieval last.pt --shards a.tar --vocab x': 'last.pt carries its vocabulary; omit --vocab',
    'classify last.pt --dataset DTD --root nowhere': 'cannot open DTD in nowhere .*--download',
    'classify last.pt --dataset MNIST --split val': 'MNIST has no split val; give train or test',
    'classify last.pt --folder bad --workers 0': 'bad/class/x.jpg cannot be read as an image',
    'classify last.pt --folder empty': 'class folder in empty',
    'segment last.pt --images empty --masks images --classes page.pt': 'empty has no image 0; see --image-suffix',
    'segment last.pt --images images --masks empty --classes page.pt': 'empty has no mask .*--mask-suffix',
    'segment last.pt --images a --masks a --classes twice': 'several classes have the same name',
    'segment last.pt --images a --masks a --classes commas': 'commas must have a line for each class, with one name',
    'segment last.pt --images a --masks a --classes a.tar': 'a.tar cannot be read as .*UnicodeDecodeError',
    'classify last.pt --folder numbered --classes blank': 'line 2 of blank is blank; give every class a line',
    'segment last.pt --images a --masks a --classes page.pt --benchmark voc20': 'has 1 lines, but voc20 has 20 classes',
    'classify last.pt --folder numbered --classes commas': 'commas has 2 names for 1 classes; give one line',
    'classify last.pt --folder numbered': 'classes are called n01440764 and the like; .*--classes',
    'classify last.pt --folder halves': r"halves holds the halves train, validation, which are no classes; give one of them",
    'segment last.pt --images images --masks ignored --classes blank2 --list same': 'same names more than once 0; leave one',
    'classify last.pt --folder hidden': 'hidden holds the hidden folder .cache, which is no class',
    'classify last.pt --folder counted': 'counted are numbered, .*leading zeros',
    'segment last.pt --images images --masks colour --classes blank2': 'colour/0.png is in colour; save class numbers',
    'segment last.pt --images images --masks torn --classes blank2': 'torn/0.png cannot be read as an image',
    'segment last.pt --images images --masks ignored --classes blank2': 'every pixel of the masks is ignored',
    'segment last.pt --images images --masks ignored --classes blank2 --list three': 'ignored has no mask 1; see --mask',
    'retrieval numbers.pt --shards a.tar': 'numbers.pt is neither .*its keys: 0.; load other',
    'retrieval last.pt --list half': 'half cannot be read as this command expects .JSONDecodeError',
    'retrieval last.pt --list instances': "instances is JSON of an unknown kind .KeyError.'caption'",
    'segment last.pt --images a --masks a --classes page.pt --templates page.pt': "'<html>' in page.pt needs {}"}


def test_errors_are_one_sentence(gallery):
    """oracle: the rule: status 1, one line with the value, the place and the remedy; no pickle is executed."""
    class Malicious:
        def __reduce__(self):
            return os.system, ('touch executed',)

    image = encoded(gallery.images[0])
    pairs_tar('a.tar', [{'caption': 'an ox'}, b'{"caption": "a'], [image] * 2)
    put('page.pt', '<html>')
    put('empty/list')
    put('torn/0.png')
    put('bad/class/x.jpg')
    for folder in 'numbered/n01440764', 'halves/train', 'halves/validation', 'halves/ox', 'counted/2', 'counted/10', 'hidden/.cache', 'hidden/ox':
        put(f'{folder}/0.png', image)
    put('white', {'images': [{'filename': 'a.jpg', 'split': 'test', 'sentences': [{'raw': ' '}]}]})
    put('twice', 'ox, cow\nox')
    put('commas', 'ox\n,')
    put('blank', 'ox\n \ngnu')
    for folder, mask in ('colour', Image.new('RGB', (50, 40))), ('ignored', Image.new('L', (50, 40), 255)):
        put(f'{folder}/0.png', encoded(mask))
    put('blank2', 'ox\ngnu')
    put('three', '0\n1\n2')
    put('same', '0\n0')
    put('keys', [{'image': 'a.jpg', 'text': 'an ox'}])
    put('one', [{'image': 'a.jpg', 'caption': 'an ox'}])
    put('half', '[{')
    put('instances', {'images': [], 'annotations': [{'image_id': 1}]})
    torch.save({0: torch.ones(1)}, 'numbers.pt')
    torch.save({'student': Malicious()}, 'bad.pt')
    for line, sentence in WRONG.items():
        error = run(evaluation, *line.split())
        assert re.fullmatch(f'error: .*{sentence}.*', error), f'{line}: {error}'
    assert not Path('executed').exists()


def test_figures_outlive_a_file_that_cannot_be_written(gallery, capsys):
    """oracle: they are printed, and the sentence."""
    pairs_tar('a.tar', [{'caption': 'an ox'}], [encoded(gallery.images[0])])
    said = run(evaluation, *'retrieval . --shards a.tar --workers 0 --json images'.split())
    assert 'images cannot be written' in said and 'nothing at this path was changed' in said and 'image_to_text_R@1' in capsys.readouterr().out
