"""eval.py: every claim with its oracle. Each docstring says what the result is compared with."""
import io
import json
import math
import os
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval as evaluation
from cosmos import COSMOS, Config, to_openclip, unit
from data import Tokenizer

HERE = Path(__file__).parent
SHARED = Path(os.environ.get('COSMOS_SHARED') or HERE.parent / 'shared')
MICRO = Config(embed_dim=16, image_size=32, local_image_size=16, patch_size=8, vision_width=24,
               vision_layers=2, vision_heads=2, text_width=16, text_layers=2, text_heads=2,
               context_length=12, vocab_size=50, cross_heads=2)


def shared(*parts):
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f'{path} is absent; set COSMOS_SHARED to the folder with the recorded numbers')
    return path


def close(a, b, tolerance=1e-5):
    """Relative distance of the whole tensors."""
    distance = ((a - b).norm() / b.norm().clamp_min(1e-12)).item()
    assert distance <= tolerance, f'relative distance {distance:.2e}, allowed {tolerance}'


def refused(sentence, call, *args, **kwargs):
    """The call raises ValueError with a text that matches `sentence`."""
    with pytest.raises(ValueError, match=sentence):
        call(*args, **kwargs)


def put(path, value=''):
    """A file, and the folders it lies in -> path. Text and bytes as they are, all else as JSON."""
    if not isinstance(value, (str, bytes)):
        value = json.dumps(value)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value.encode() if isinstance(value, str) else value)
    return path


def encoded(image, kind='PNG', **options):
    """A Pillow image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_tar(path, members):
    with tarfile.open(path, 'w') as tar:
        for name, value in members:
            info = tarfile.TarInfo(name)
            info.size = len(value)
            tar.addfile(info, io.BytesIO(value))
    return path


def run(module, *argv):
    """A command in this process -> what its SystemExit carries, or None."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['prog', *map(str, argv)])
        try:
            data.cli(module.main)
        except SystemExit as stop:
            return stop.code


# --- eval.py ---------------------------------------------------------------------------------------------------------

def spelling_model(merges=(), length=48):
    """(model, tokenizer) that reads text byte by byte; 48 ids hold every template with every name."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(merges, length)
    config = replace(MICRO, vocab_size=tokenizer.vocab_size, context_length=length)
    return COSMOS(config).requires_grad_(False), tokenizer


def embed(model, tokenizer, *texts):
    """Texts, one at a time, by the model's door."""
    pooled = [model.encode_text(tokenizer([text]))[0] for text in texts]
    return unit(torch.cat(pooled))


@pytest.fixture
def here(monkeypatch, tmp_path):
    """A folder of the test's, in which it runs: names of files are short."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def gallery(here):
    """A checkpoint that spells, last.pt; three pictures in images, their features; figures(name, *flags)."""
    model, tokenizer = spelling_model()
    state = {'config': vars(model.config), 'merges': [], 'student': model.state_dict()}
    torch.save(state, 'last.pt')
    preprocess = data.Preprocess(32)
    paths = []
    features = []
    for i in range(3):
        image = Image.effect_mandelbrot((50, 40), (i - 2, -1, 1, 1), 40)
        paths.append(put(f'images/{i}.png', encoded(image)))
        pooled, _ = model.encode_image(preprocess(image)[None])
        features.append(unit(pooled))

    def figures(line, workers=0):
        name, *flags = line.split()
        flags += ['--workers', workers, '--json', 'figures.json']
        assert run(evaluation, name, 'last.pt', *flags) is None
        return json.loads(Path('figures.json').read_text())

    return SimpleNamespace(scored=(model, tokenizer), preprocess=preprocess, paths=paths,
                           features=torch.cat(features), figures=figures)


def test_retrieval_by_hand_and_by_loops():
    """oracle: ranks read off by eye, ties counted against us; Python loops over single scores, for any chunk."""
    captions = torch.tensor([[1, 0], [0.9, 0.9],                        # right; a tie
                             [0.9, 0.2], [0.3, 0.8]])                   # finds image 0; right
    figures = evaluation.retrieval(torch.eye(2), captions, torch.tensor([0, 0, 1, 1]))
    # image 0: its 1.0 is ahead of all. image 1: its best is 0.8, behind the 0.9 of a caption of image 0
    wanted = {'images': 2, 'captions': 4, 'chance': 0.5}
    for way in ('image_to_text', 'text_to_image'):
        wanted |= {f'{way}_R@1': 0.5, f'{way}_R@5': 1, f'{way}_R@10': 1}
        wanted |= {f'{way}_mean_rank': 1.5, f'{way}_median_rank': 1.5}
    assert figures == wanted
    ids = torch.arange(30) % 10
    for same in (1.0, math.nan):        # what has collapsed must not look perfect
        features = torch.full((30, 6), same)
        assert evaluation.ranks(features, features, ids, ids).tolist() == [28] * 30
    torch.manual_seed(0)
    queries = torch.randn(10, 6)
    targets = torch.randn(30, 6)
    for chunk in (1, 7, 1000):
        found = evaluation.ranks(queries, targets, torch.arange(10), ids, chunk)
        for number, query in enumerate(queries):
            scores = targets @ query
            best = max(scores[ids == number])
            assert found[number] == 1 + sum(score >= best for score in scores[ids != number])


def test_classification_by_hand():
    """oracle: hand-made scores; the ensemble computed one text at a time."""
    scores = torch.tensor([[7.0, 1, 2, 3, 4, 5, 6],                     # right
                           [1, 7, 6, 5, 4, 3, 2],                       # fourth
                           [3, 1, 3, 0, 0, 0, 0]])                      # tied
    figures = evaluation.classify(scores, torch.eye(7), torch.tensor([0, 4, 0]))
    assert figures == {'images': 3, 'classes': 7, 'chance': 1 / 7, 'top1': pytest.approx(1 / 3),
                       'top5': 1, 'mean_per_class_top1': 1 / 4}
    scored = spelling_model()
    vectors = evaluation.class_vectors(*scored, ['tabby cat', 'dog'], ('a {}', '{}!'))
    both = embed(*scored, 'a tabby cat', 'a dog') + embed(*scored, 'tabby cat!', 'dog!')
    close(vectors, unit(both))
    texts = ['a long text', 'ox', '']
    close(evaluation.embed_texts(*scored, texts, batch=2), embed(*scored, *texts))


def test_attention_words(gallery):
    """oracle: the model's own weights: pieces of a word add up; start, end and padding are no words."""
    model, tokenizer = spelling_model(['d o', 'do g</w>'], 12)
    image = Image.open('images/0.png')
    scored = (model, tokenizer, gallery.preprocess, image)
    grid, words = evaluation.attention(*scored, 'dog ab dog')
    pixels = gallery.preprocess(image)[None]
    patches, weights = model.attention(pixels, tokenizer(['dog ab dog']))
    _, dog, a, b, last, *_ = weights[0].numpy()
    names, shares = zip(*words)
    assert names == ('dog', 'ab', 'dog')
    raw = np.array([dog, a + b, last])
    assert np.allclose(shares, (raw - raw.min()) / np.ptp(raw))
    raw = patches.numpy().reshape(4, 4)                                 # rows first
    assert np.allclose(grid, (raw - raw.min()) / np.ptp(raw))
    _, words = evaluation.attention(*scored, 'dog ' * 20)
    assert len(words) == 10             # what fits between start and end of 12


def test_published_layouts(here):
    """oracle: files written here as COCO's, Karpathy's and Flickr's, and what must be read; what they lack is named."""
    images = [{'id': 7, 'file_name': 'a.jpg'}, {'id': 3, 'file_name': 'b.jpg'}]
    notes = [{'image_id': 3, 'caption': 'x'}, {'image_id': 7, 'caption': 'y'},
             {'image_id': 3, 'caption': 'z'}]
    put('annotations/captions_val2017.json', {'images': images, 'annotations': notes})
    found = {'images/val2017/b.jpg': evaluation.coco_captions('.')}
    first = {'split': 'test', 'filename': 'a.jpg', 'sentences': [{'raw': 'y'}]}
    second = {'split': 'test', 'filename': 'b.jpg', 'filepath': 'f',
              'sentences': [{'raw': 'x'}, {'raw': 'z'}]}
    put('k.json', {'images': [first, first | {'split': 'val'}, second]})
    found['f/b.jpg'] = evaluation.karpathy_captions('k.json', 'test')
    refused('k.json.*none of this split', evaluation.karpathy_captions, 'k.json', 'vall')
    put('f.json', [{'image': 'a.jpg', 'caption': 'y'},
                   {'image': 'b.jpg', 'caption': ['x', 'z']}])
    found['photos/b.jpg'] = evaluation.flickr_captions('f.json', 'photos')
    for name, (paths, captions, owner) in found.items():
        assert paths[1] == Path(name)
        assert (captions, owner.tolist()) == (['y', 'x', 'z'], [0, 1, 1])
    refused("f.json.*'caption'", evaluation.flickr_captions, put('f.json', [{'image': 'a'}]))


def test_class_names_of_every_source(here):
    """oracle: names as torchvision's sets have them, files written here, and what must be read."""
    def names(classes, text=None, **more):
        file = text and put('names', text)
        return evaluation.class_names(SimpleNamespace(classes=classes, **more), file)

    animals = ['ape', 'ox_2']
    assert names(animals) == ['ape', 'ox 2']
    assert names(animals, 'monkey\n\n bull\n') == ['monkey', 'bull']
    refused('1 names for 2 classes', names, animals, 'monkey')
    refused('no class names', names, [])
    assert names([], categories=['/a/arch_gate/outdoor']) == ['arch gate outdoor']      # Places365
    imagenet = [('tench', 'Tinca tinca'), ('goldfish', 'Carassius')]
    assert names(imagenet) == ['tench', 'goldfish']
    assert names(imagenet, {'n2': 'b', 'n1': 'a'}, wnids=['n1', 'n2']) == ['a', 'b']
    folders = [f'n{i:08d}' for i in range(1000)]
    assert names(folders)[2] == 'great white shark'
    refused('999 folders have WordNet ids', names, folders[1:])


def test_torchvision_sets(monkeypatch):
    """oracle: what the sets are called with, EMNIST's held-out half among them; sentences for what cannot be read."""
    for name, split, sentence in (('dtdd', None, "has no 'dtdd'; it has .*dtd"),
                                  ('food101', None, 'cannot read food101 from .*--download'),
                                  ('sun397', 'trian', "not 'trian'"),
                                  ('cifar10', 'val', "the splits .*'test'.*, not 'val'")):
        refused(sentence, evaluation.torchvision_set, name, 'absent', split)
    sets = evaluation.torchvision.datasets
    calls = []

    def mnist(self, root, train=True, download=True):
        calls.append([train, download])

    def places365(self, root, split='train-standard'):
        self.targets = [None]

    monkeypatch.setattr(sets.MNIST, '__init__', mnist)
    evaluation.torchvision_set('mnist', '', 'train', True)
    evaluation.torchvision_set('emnist', '', 'balanced')
    assert calls == [[True, True], [False, False]]
    monkeypatch.setattr(sets.Places365, '__init__', places365)
    refused('no labels.*such as val', evaluation.torchvision_set, 'places365', '')


def test_checkpoints_of_every_origin(here):
    """oracle: the model that was saved, under released, prefixed and open_clip's names."""
    vocab = shared('vocab', 'bpe_simple_vocab_16e6.txt.gz')
    torch.manual_seed(0)
    model = COSMOS(Config(64, 224, 96, 32, 64, 2, 1, 64, 1, 1, 77, 49408, 8))
    plain = COSMOS(replace(model.config, cross_heads=0))
    theirs = to_openclip(model.state_dict())
    other = to_openclip(plain.state_dict())
    image = torch.randn(1, 3, 224, 224)

    def load(state, weights='teacher'):
        torch.save(state, 'saved.pt')
        return evaluation.load('saved.pt', weights, vocab=vocab)

    both = {'student': other, 'teacher': theirs}
    prefixed = {f'_orig_mod.module.{key}': value for key, value in theirs.items()}
    for state, weights, origin, source in [
            (both, 'teacher', 'teacher', model),
            (both, 'student', 'student', plain),
            ({'student': other}, 'teacher', 'student', plain),  # what it says must be what it scored
            ({'state_dict': prefixed}, 'teacher', 'state_dict', model),
            (other, 'teacher', 'state dict', plain)]:
        loaded, tokenizer, _ = load(state, weights)
        assert (loaded.config, loaded.origin) == (source.config, origin)
        text = tokenizer(['a dog'])
        found = loaded([image], [text])
        wanted = source([image], [text])
        close(found.image, wanted.image, 1e-6)
        close(found.text, wanted.text, 1e-6)
    refused('QuickGELU', load, other | {'input_resolution': image})
    refused('its keys: visual.*open_clip ViT', load, {'visual.conv1.weight': image})    # a ResNet
    del other['visual.ln_post.bias']
    other |= {'visual.extra': image, 'visual.proj': image}
    refused('Missing.*ln_post.bias.*Unexpected.*extra.*size mismatch for visual.proj', load, other)


def test_export_and_back(here):
    """oracle: features before, with learned merges and heads that are not 64 wide; a plain CLIP's names."""
    model, tokenizer = spelling_model(['d o', 'do g</w>'])
    evaluation.export(model, tokenizer, 'clip.pt')
    plain = COSMOS(replace(model.config, cross_heads=0))
    assert torch.load('clip.pt').keys() == to_openclip(plain.state_dict()).keys()
    loaded, spelling, _ = evaluation.load('clip.pt')
    close(embed(loaded, spelling, 'dog', 'ox'), embed(model, tokenizer, 'dog', 'ox'), 1e-6)
    image = torch.randn(1, 3, 32, 32)
    close(loaded.encode_image(image)[0], model.encode_image(image)[0], 1e-6)
    layout = json.loads(Path('clip.json').read_text())
    del layout['text_cfg']['tokenizer_kwargs']          # as if the json were another's
    put('clip.json', layout)
    vocab = shared('vocab', 'bpe_simple_vocab_16e6.txt.gz')
    refused('clip.pt knows 516 ids, .* 49,408', evaluation.load, 'clip.pt', vocab=vocab)


def test_windows_are_averaged():
    """oracle: numpy's interp, row by row and column by column of each window, on a size that no stride fits."""
    model, _ = spelling_model()
    pixels = torch.randn(3, 37, 47)
    vectors = unit(torch.randn(5, 16))
    at = (np.arange(32) + 0.5) / 8 - 0.5                # of 32 pixels in a row of 4 patches
    share = np.stack([np.interp(at, range(4), one) for one in np.eye(4)])       # (4, 32)
    share = torch.from_numpy(share).float()
    for csa in (False, True):
        total = torch.zeros(5, 37, 47)
        count = torch.zeros(37, 47)
        for y in (0, 5):
            for x in (0, 12, 15):                       # the last windows end at the border
                window = (..., slice(y, y + 32), slice(x, x + 32))
                grid = model.encode_dense(pixels[window][None], csa)[0]         # (4, 4, D)
                total[window] += torch.einsum('vy,ux,vud,qd->qyx', share, share, grid, vectors)
                count[window] += 1
        settings = evaluation.Settings(window=32, stride=12, csa=csa)
        close(evaluation.window_scores(model, pixels, vectors, settings), total / count)


def test_segmentation_by_hand(monkeypatch):
    """oracle: six pixels decided by pencil: synonyms, probability and area thresholds, IoU."""
    # names: ground | ape, monkey | ox. Softmax at scale ln 3 and cosines 0 or 1: one name at 1 of 4 gets 3/6.
    scores = torch.eye(4)[[0, 1, 2, 2, 3, 1]]
    scores[5, 2] = 1                                    # ape and monkey
    monkeypatch.setattr(evaluation, 'window_scores', lambda *args: scores.T.view(4, 2, 3))

    def segment(**changes):
        settings = evaluation.Settings(size=2, scale=math.log(3), window=2, **changes)
        image = Image.new('RGB', (3, 2))
        return evaluation.segment_image(None, image, scores, [1, 2, 1], settings).flatten()

    assert segment().tolist() == [0, 1, 1, 1, 2, 1]                     # monkey is ape
    assert segment(probability=0.4).tolist() == [0, 1, 1, 1, 2, 0]      # two names share: 3/8 each
    assert segment(area=0.2).tolist() == [0, 1, 1, 1, 0, 1]     # ox has 1 of 5 foreground pixels, no more
    assert segment(area=0.19).equal(segment())
    truth = torch.tensor([0, 1, 1, 255, 3, 0])
    matrix = evaluation.confusion(truth, segment(), 5)
    figures = evaluation.segmentation_figures(matrix, ['ground', 'ape', 'ox', 'cow', 'absent'])
    assert figures == {'IoU': {'ground': 1 / 2, 'ape': 2 / 3, 'ox': 0, 'cow': 0},
                       'mIoU': pytest.approx(7 / 24), 'pixel_accuracy': 3 / 5, 'classes': 3,
                       'all_class_0_mIoU': pytest.approx(2 / 5 / 3)}


def test_masks_and_their_errors(here):
    """oracle: masks written here; what is wrong with one names its file and says what."""
    numbers = np.array([[0, 1, 255], [2, 2, 0]], np.uint8)
    grey = Image.fromarray(numbers)
    palette = Image.frombytes('P', (3, 2), numbers.tobytes())
    palette.putpalette(list(range(256)) * 3)
    deep = Image.fromarray(numbers.astype(np.uint16))
    read = evaluation.read_mask
    for image in (palette, deep, grey):
        path = put('masks/a_ids.png', encoded(image))
        assert read(path, (3, 2), 3).tolist() == numbers.tolist()
        reduced = read(path, (3, 2), 2, reduce_zero_label=True)
        assert reduced.tolist() == [[255, 0, 255], [1, 1, 255]]
    refused('a_ids.png has label 2, the class file names 0 to 1', read, path, (3, 2), 2)
    refused(r'a_ids.png is a L image of \(3, 2\) pixels', read, path, (2, 3), 3)
    put(path, encoded(grey.convert('RGB')))
    refused('a_ids.png is a RGB image', read, path, (3, 2), 3)
    image = put('images/s/a_rgb.jpg')
    folders = ('images', 'masks', '_rgb', '_ids')
    assert evaluation.mask_pairs(*folders) == [(image, path)]
    refused('b_ids.png', evaluation.mask_pairs, *folders, put('list', 'a\nb\n'))
    put('images/t/a_rgb.jpg')
    refused('s/a_rgb.jpg and .*t/a_rgb.jpg have one name', evaluation.mask_pairs, *folders)


def test_every_command(gallery):
    """oracle: the functions that the tests above check, on the same input; pictures open."""
    members = []
    for i, path in enumerate(gallery.paths):
        members.append((f'{i}.png', path.read_bytes()))
        members.append((f'{i}.txt', f'ox {i}'.encode()))
    write_tar('a.tar', members)
    texts = embed(*gallery.scored, 'ox 0', 'ox 1', 'ox 2')
    wanted = evaluation.retrieval(gallery.features, texts, torch.arange(3))
    assert gallery.figures('retrieval --shards a.tar', workers=1) == wanted
    shards = data.Shards('a.tar')
    found, features = evaluation.evaluate(*gallery.scored, gallery.preprocess, shards)
    assert found == {'retrieval': wanted}
    close(features, gallery.features)
    settings = evaluation.Settings(40, 65, 0.1, 0.0, window=32, stride=16, csa=True)
    vectors = evaluation.class_vectors(*gallery.scored, ['background', 'sky', 'ox'])
    model, _ = gallery.scored
    for path in gallery.paths:          # masks of what must be found
        image = Image.open(path)
        labels = evaluation.segment_image(model, image, vectors, [2, 1], settings)
        mask = Image.fromarray(labels.byte().numpy())
        put(f'masks/{path.name}', encoded(mask))
    put('classes', 'background, sky\nox\n')
    figures = gallery.figures('segment --images images --masks masks --classes classes --save seen '
                              '--benchmark voc21 --size 40 --area 0 --csa')
    assert (figures['settings'], figures['mIoU'], figures['images']) == (str(settings), 1, 3)
    assert Image.open('seen/2.overlay.png').size == (270, 40)
    gallery.figures('attend --image images/0.png --text ox cat --out seen.png')
    assert Image.open('seen.png').size == (872, 494)
    gallery.figures('export clip.pt')
    assert Path('clip.json').exists()


def test_classify_of_every_source(gallery):
    """oracle: the function that a test above checks, on the same images."""
    vectors = embed(*gallery.scored, 'my banded', 'my woven')
    wanted = evaluation.classify(gallery.features, vectors, torch.tensor([1, 0, 1]))
    listed = [{'file': '0.png', 'class_id': 6}]
    for path, name, number in zip(gallery.paths, ('woven', 'banded', 'woven'), (7, 5, 7)):
        put(f'dtd/dtd/images/{name}/{path.name}', path.read_bytes())    # as torchvision's DTD
        listed.append({'file': path.name, 'class_id': number})
    put('dtd/dtd/labels/test1.txt', 'woven/0.png\nbanded/1.png\nwoven/2.png\n')
    put('images/labels.json', listed)
    named = [{'id': 7, 'name': 'woven'}, {'id': 6, 'name': 'ox'},
             {'id': 5, 'name': 'x', 'noun_phrase': 'banded'}]
    put('classes', {'classes': named, 'subsets': {'two': [5, 7]}})
    put('prompts', 'my {c}\n')
    for source in ('--folder dtd/dtd/images', '--dataset dtd --root .',
                   '--folder images --classes classes --subset two'):
        figures = gallery.figures(f'classify {source} --templates prompts')
        assert figures == {'prompts': 'my {}'} | wanted


WRONG = [               # a command, and what its sentence must name
    ('retrieval page.pt --shards a.tar', ['page.pt', 'no checkpoint', 'web page']),
    ('retrieval absent.pt --shards a.tar', ['absent.pt', 'does not exist']),
    ('retrieval bad.pt --shards a.tar', ['bad.pt', 'plain values', 'where you trust it']),
    ('retrieval nan.pt --shards a.tar', ['nan.pt', 'NaN', 'visual.proj', 'earlier']),
    ('retrieval last.pt --shards a.tar --coco y', ['--coco', 'not allowed with argument --shards']),
    ('retrieval last.pt --shards a.tar', ['a.tar:1.png', 'cannot be read']),
    ('retrieval last.pt --flickr list.json', ['absent.jpg is no image']),
    ('retrieval last.pt --flickr list.json --device tpu', ['--device tpu', 'cannot be', 'cpu']),
    ('export last.pt last.pt', ['last.pt is the checkpoint']),
    ('export last.pt nowhere/a.pt', ['nowhere/a']),
    ('segment last.pt --images a --masks b --classes c --stride 0', ['--stride 0', 'above 0']),
    ('segment last.pt --images a --masks b --classes page.pt --templates page.pt',
     ["'<html>' in page.pt", '{}']),
]


def test_errors_are_one_sentence(monkeypatch, gallery):
    """oracle: the rule: status 1, one line, with the value, the place and the remedy; no pickle is executed."""
    class Malicious:
        def __reduce__(self):
            return os.system, ('touch executed',)

    write_tar('a.tar', [('0.png', b'x'), ('0.txt', b'an ox'), ('1.png', b'x'), ('1.json', b'{"caption": "a')])
    put('list.json', [{'image': 'absent.jpg', 'caption': 'x'}])
    put('page.pt', '<html>')
    torch.save({'student': Malicious()}, 'bad.pt')
    saved = torch.load('last.pt')
    saved['student']['visual.proj'] *= math.nan
    torch.save(saved, 'nan.pt')
    monkeypatch.setattr(data.Parser, 'exit', lambda self, status, text: sys.exit(text.strip()))
    for line, parts in WRONG:
        sentence = run(evaluation, *line.split(), '--workers', 0)
        assert isinstance(sentence, str) and sentence.startswith('error: '), (line, sentence)
        assert '\n' not in sentence and all(part in sentence for part in parts), sentence
    assert not Path('executed').exists()
