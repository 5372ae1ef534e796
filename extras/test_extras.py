"""What extras/ promises, each claim with its oracle: the docstring says what the result is compared with.

    pytest extras/test_extras.py
"""
import io
import itertools
import json
import re
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import cosmos
import data
import train
from cosmos import COSMOS, Config
from extras import bench, pairs, prepare, search

MICRO = Config(embed_dim=16, image_size=32, local_image_size=16, patch_size=8, vision_width=24, vision_layers=2,
               vision_heads=2, text_width=16, text_layers=2, text_heads=2, context_length=12, vocab_size=50,
               cross_heads=2)

# --- Helpers ---------------------------------------------------------------------------------------------------------

def refused(sentence, call, *args):
    """The call raises ValueError with a sentence that matches."""
    with pytest.raises(ValueError, match=sentence):
        call(*args)


def put(path, value):
    """A file of bytes, text or JSON, and the folders it lies in -> path."""
    if not isinstance(value, (bytes, str)):
        value = json.dumps(value)
    if isinstance(value, str):
        value = value.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value)
    return path


def picture(kind='JPEG', colour=(200, 30, 60)):
    """A small image as the bytes of a file."""
    file = io.BytesIO()
    image = Image.new('RGB', (40, 30), colour)
    more = {'save_all': True, 'append_images': [image]} if kind == 'MPO' else {}
    image.save(file, kind, **more)
    return file.getvalue().ljust(2000, b'\0')           # all of one size


def write_pairs(path, records):
    """A shard of one picture a record; a record may be text that is no JSON -> path."""
    members = []
    for i, record in enumerate(records):
        text = record if isinstance(record, str) else json.dumps(record)
        members += [(f'{i}.jpg', picture()), (f'{i}.json', text.encode())]
    data.write_shard(path, members)
    return path


def pools(folder):
    """The sentences of all pairs of a folder of shards."""
    shards = data.Shards(folder)
    return [shards.pool(i) for i in range(len(shards))]


def run(module, *argv):
    """A command in this process; its SystemExit would fail the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['prog', *map(str, argv)])
        module.main()


def number(printed, unit):
    """The number before a unit."""
    return float(re.search(rf'([\d,.]+) {unit}', printed)[1].replace(',', ''))


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A file of random weights as train.py writes it. Its tokenizer reads text byte by byte."""
    torch.manual_seed(0)
    tokenizer = data.Tokenizer([], 48)
    config = replace(MICRO, vocab_size=tokenizer.vocab_size, context_length=48)
    path = tmp_path_factory.mktemp('run') / 'last.pt'
    torch.save({'student': COSMOS(config).state_dict(), 'merges': [], 'config': asdict(config)}, path)
    return path


# --- prepare ---------------------------------------------------------------------------------------------------------

TABLE = 'filepath{0}title\na.jpg{0}one dog\ns/b.png{0}two. dogs\na.jpg{0}a dog\n'
COCO = {'images': [{'id': 1, 'file_name': 'a.jpg'}, {'id': 2, 'file_name': 's/b.png'}],
        'annotations': [{'image_id': 1, 'caption': 'one dog'}, {'image_id': 2, 'caption': 'two. dogs'},
                        {'image_id': 1, 'caption': 'a dog'}]}
ROWS = [{'image': 'a.jpg', 'captions': ['one dog', 'a dog']}, {'image': 'bad.jpg', 'captions': ['x']},
        {'image': 's/b.png', 'captions': ['two. dogs']}, {'image': 'absent.jpg', 'captions': ['y']}]
SOURCES = {'r.json': json.dumps(COCO), 'r.csv': TABLE.format(','), 'r.tsv': TABLE.format('\t'),
           'r.jsonl': '\n'.join(map(json.dumps, ROWS))}


@pytest.fixture
def images(tmp_path):
    put(tmp_path / 'images/a.jpg', picture())
    put(tmp_path / 'images/b.jpg', picture('MPO'))
    put(tmp_path / 'images/s/b.png', picture('PNG'))
    put(tmp_path / 'images/bad.jpg', b'no image')
    return tmp_path / 'images'


@pytest.mark.parametrize('name', SOURCES)
def test_pack(name, tmp_path, images, capsys):
    """oracle: the rows that were packed, and after a kill the shards of the packing that nothing disturbed."""
    out = tmp_path / 'out'
    arguments = ['pack', put(tmp_path / name, SOURCES[name]), images, out, '--size', 1]
    left_out = 2 if name == 'r.jsonl' else 0
    run(prepare, *arguments)
    assert f'2 images packed, {left_out} left out' in capsys.readouterr().out
    assert pools(out) == [['one dog', 'a dog'], ['two', 'dogs']]
    assert data.Shards(out).image(1) == picture('PNG')
    packed = {path: path.read_bytes() for path in out.glob('*.tar')}
    last = max(packed)
    last.rename(f'{last}.partial')          # as a kill leaves it
    run(prepare, *arguments)
    assert {path: path.read_bytes() for path in out.glob('*.tar')} == packed
    assert f'2 images packed, {left_out} left out' in capsys.readouterr().out


GARBLED = {
    'rows of one image, in two keys and two forms': ('r.jsonl', [['a dog', 'a cat'], ['ox', 'cow']], '\n'.join([
        '{"image": "a.jpg", "captions": ["a dog"]}', '{"image": "b.jpg", "raw_caption": "ox"}',
        '{"image": "a.jpg", "captions": "a cat"}', '{"image": "b.jpg", "raw_caption": "cow"}',
        '{"image": "a.jpg", "captions": [{}]}'])),
    'a line separator in a text': (
        'u.jsonl', [['a\u2028dog']], '{"image": "a.jpg", "caption": "a\u2028dog"}\n\n'),
    'a quotation mark in a TSV': (
        'q.tsv', [['"Oh, a cat'], ['a dog']], 'image\tcaption\na.jpg\t"Oh, a cat\nb.jpg\ta dog\n'),
    'a byte order mark, two columns of texts': (
        'u.csv', [['a dog'], ['a cat']], '\ufeffimage,title,text\na.jpg,a dog,\nb.jpg,,a cat\n'),
    'a caption beside another text': (
        't.csv', [['a dog'], ['a cat, old']], 'image,caption,text\na.jpg,a dog,SALE\nb.jpg,"a cat, old",\n')}


@pytest.mark.parametrize('case', GARBLED)
def test_tables_that_could_be_garbled(case, tmp_path, images):
    """oracle: the captions that stand in the table."""
    name, expected, text = GARBLED[case]
    prepare.pack(put(tmp_path / name, text), images, tmp_path / 'out')
    assert pools(tmp_path / 'out') == expected


def test_pack_refuses(tmp_path, images):
    """oracle: the sentence of the error, which names value and place; the folder stays as it was."""
    out = tmp_path / 'out'
    rows = put(tmp_path / 'r.csv', SOURCES['r.csv'])
    prepare.pack(rows, images, out)
    files = sorted(out.iterdir())
    refused('out holds shards made from .*size', prepare.pack, rows, images, out, 8)
    other = put(tmp_path / 'other.jsonl', SOURCES['r.jsonl'])
    refused('out holds shards made from .*r.csv', prepare.pack, other, images, out)
    assert sorted(out.iterdir()) == files
    refused('--size 0', prepare.pack, rows, images, out, 0)
    refused('absent is no folder', prepare.pack, rows, tmp_path / 'absent', out)
    refused('none of the 2 images', prepare.pack, rows, tmp_path / 'out', tmp_path / 'new')
    texts = {'more fields than the first': ('w.csv', 'image,caption\na.jpg,a dog, old\n'),
             "row 1 of .*l.jsonl has no 'image'": ('l.jsonl', '{"image": ["a.jpg"]}'),
             'b.json cannot be read': ('b.json', '{')}
    for sentence, (name, text) in texts.items():
        refused(sentence, prepare.pack, put(tmp_path / name, text), images, tmp_path / 'new')


def test_join(tmp_path, capsys):
    """oracle: the rows of the table, matched by hand; texts become sentences, the shard's own keys stay."""
    table = put(tmp_path / 'd.csv', '\ufeffImage Path,raw_caption,longIB_captions\nhttp://x/2,two dogs,"A dog.\n'
                                    'It is 3.5 m, big."\n,no,no\nNone,no,no\nhttp://x/1,one dog,A dog\nhttp://x/0,,\n')
    urls = ['http://x/0', 'http://x/1', 'http://x/2', None, '', 'http://x/9', '\ud800']
    records = [{'url': url, 'caption': 'alt', 'key': str(i)} for i, url in enumerate(urls)]
    shard = write_pairs(tmp_path / 'i.tar', records)
    out = tmp_path / 'joined'
    run(prepare, 'join', table, shard, out)
    assert '2 of 7 pairs matched (28.6%)' in capsys.readouterr().out
    assert pools(out) == [['one dog', 'A dog'], ['two dogs', 'A dog', 'It is 3.5 m, big']]
    shards = data.Shards(out)
    assert [shards.record(i)['key'] for i in range(2)] == ['1', '2']
    run(prepare, 'join', table, shard, out)
    assert '0 of 0 pairs' in capsys.readouterr().out           # all shards are there


def test_join_refuses(tmp_path):
    """oracle: the sentence of the error."""
    shard = write_pairs(tmp_path / 'in/i.tar', [{'url': 'http://x/0', 'caption': 'alt'}])
    table = put(tmp_path / 'd.csv', 'url,raw_caption\nu,x\n')
    refused('in holds shards made from something else', prepare.join, table, shard, tmp_path / 'in')
    bare = write_pairs(tmp_path / 'bare.tar', [{'caption': 'dog'}])
    refused("bare.tar has no 'url' to join by", prepare.join, table, bare, tmp_path / 'out')
    nameless = put(tmp_path / 'n.csv', 'filepath,title\na,b\n')
    refused('n.csv has the columns filepath, title, none of url', prepare.join, nameless, shard, tmp_path / 'out')
    long = put(tmp_path / 'e.csv', f'url,raw_caption\nu,x\nv,{"x" * (1 << 24)}y')
    refused('e.csv is no CSV after its line 2', prepare.join, long, shard, tmp_path / 'out')


def test_inspect(tmp_path, capsys):
    """oracle: counts by hand; the sheet opens."""
    records = [{'caption': 'one dog. two big dogs', 'width': 3}, '{broken', {'caption': 'a cat'}]
    write_pairs(tmp_path / '0.tar', records)
    run(prepare, 'inspect', tmp_path, '--out', tmp_path / 'sheet.png')
    printed = capsys.readouterr().out
    lines = ['3 pairs in 1 shards', r'keys +caption \(100%\), width \(50%\)',
             'captions per pair +0 % 1, 10 % 1.1, 50 % 1.5, 90 % 1.9, 100 % 2',
             'words per caption +0 % 2, .*, 50 % 2, .*, 100 % 3', 'unusable captions +1 of 3 read .*1.jpg',
             r'an example +one dog \| two big dogs']
    for line in lines:
        assert re.search(f'^{line}', printed, re.M), line
    assert Image.open(tmp_path / 'sheet.png').width > 100


# --- pairs -----------------------------------------------------------------------------------------------------------

def test_pair_scores_by_hand():
    """oracle: Winoground's three scores by pencil, ties as misses."""
    right = torch.tensor([[2.0, 1], [1, 2]])
    image_only = torch.tensor([[2.0, 3], [1, 4]])       # each caption finds its image, image 0 not its caption
    text_only = torch.tensor([[2.0, 1], [3, 4]])
    tie = torch.ones(2, 2)
    assert pairs.pair_scores([right, image_only, text_only, tie]) == {
        'items': 4, 'image_score': 0.5, 'image_chance': 0.25, 'text_score': 0.5, 'text_chance': 0.25,
        'group_score': 0.25}
    assert pairs.pair_scores([torch.tensor([[3.0, 1, 2]]), torch.tensor([[1.0, 0, 2]])]) == {
        'items': 2, 'text_score': 0.5, 'text_chance': pytest.approx(1 / 3)}
    assert pairs.pair_scores([torch.tensor([[3.0], [1]])]) == {'items': 1, 'image_score': 1.0, 'image_chance': 0.5}


LAYOUTS = {
    'own.jsonl': ('{"images": ["a.jpg"], "captions": ["x", "y"], "type": "t"}\n\n', (['a.jpg'], ['x', 'y'], 't')),
    'crepe.json': ('{"0": {"filename": "a.jpg", "caption": "x", "negative_caption": "y"}}',
                   (['a.jpg'], ['x', 'y'], None)),
    'wino.jsonl': ('{"image_0": "a", "image_1": "b", "caption_0": "x", "caption_1": "y", "tag": "Object"}',
                   (['a', 'b'], ['x', 'y'], 'Object')),
    'svo.csv': ('sentence,pos_image_id,neg_image_id,subj_neg,verb_neg,obj_neg\nx,7,8,False,True,False',
                (['7', '8'], ['x'], 'verb_neg')),
    'Questions.csv': ('Question ID,Type,Statement\n1,Color,red\n2,Color,blue\n',
                      (['Color/1', 'Color/2'], ['a photo of red', 'a photo of blue'], 'Color'))}


@pytest.mark.parametrize('name', LAYOUTS)
def test_published_layouts(name, tmp_path):
    """oracle: rows as each set publishes them."""
    text, item = LAYOUTS[name]
    assert pairs.read_items(put(tmp_path / name, text)) == [item]


def test_items_refused(tmp_path):
    """oracle: the sentence of the error, with the number of the item."""
    texts = {'item 1 of .*a.jsonl has the keys image;': ('a.jsonl', '{"image": "a"}'),
             'item 1 of .*c.jsonl has 2 images and 3 captions': (
                 'c.jsonl', '{"images": ["1", "2"], "captions": ["x", "y", "z"]}'),
             'item 1 of .*d.jsonl needs a list': ('d.jsonl', '{"images": "a.jpg", "captions": ["x", "y"]}'),
             'e.csv has 3 rows': (
                 'e.csv', 'Question ID,Type,Statement\n1,Color,red\n2,Color,blue\n3,Color,green\n')}
    for sentence, (name, text) in texts.items():
        refused(sentence, pairs.read_items, put(tmp_path / name, text))


def test_suppression_by_hand(tmp_path, monkeypatch):
    """oracle: two probes by pencil. A feature is one number a picture, one a name, and the score their product."""
    values = {'a': 1, 'b': 2, 'c': -1, 'good': 1, 'bad': -1, 'no': 0}
    good = {'positive': 'good', 'swap': 'bad', 'negatives': ['no']}
    bad = {'positive': 'bad', 'swap': 'good', 'negatives': ['no']}
    scenes = {'A': 'a', 'B': 'b', 'C': 'c'}
    put(tmp_path / 'probes.json', [{'images': scenes, 'dominant_query': good, 'small_query': good},
                                   {'images': scenes, 'dominant_query': good, 'small_query': bad}])

    def score_items(model, tokenizer, preprocess, items, root, workers):
        matrices = []
        for item in items:
            images = torch.tensor([values[name] for name in item.images])
            captions = torch.tensor([values[caption] for caption in item.captions])
            matrices.append(images[:, None] * captions)
        return matrices

    monkeypatch.setattr(pairs, 'score_items', score_items)
    figures = pairs.suppression(None, None, None, tmp_path)
    dominant = figures['dominant']
    assert (dominant['scene_top1'], dominant['name_top1'], dominant['standard_error']) == (1, 1, 0)
    small = figures['small']
    assert (small['scene_top1'], small['name_top1'], small['standard_error']) == (0.5, 0.5, pytest.approx(0.5))


def test_pairs_command(tmp_path, checkpoint, capsys):
    """oracle: the number of items in the file; an image against itself is a tie, so a miss."""
    put(tmp_path / '7.png', picture())
    rows = put(tmp_path / 'svo.csv', 'sentence,pos_image_id,neg_image_id,subj_neg\na dog,7,7,True\na cat,7,7,False\n')
    run(pairs, checkpoint, '--items', rows, '--json', tmp_path / 'f.json', '--workers', 0, '--device', 'cpu')
    figures = json.loads((tmp_path / 'f.json').read_text())
    assert figures['all 2 x 1']['items'] == 2 and figures['subj_neg 2 x 1']['items'] == 1
    assert figures['all 2 x 1']['image_score'] == 0 and 'image_score' in capsys.readouterr().out     # ties


# --- search ----------------------------------------------------------------------------------------------------------

def test_search_refreshes_what_changed(tmp_path, monkeypatch, capsys):
    """oracle: features without a cache, and the list of files that were embedded: only new or changed ones, ever."""
    folder = tmp_path / 'photos'
    put(folder / 'b/one.png', picture('PNG'))
    put(folder / 'two.png', picture('PNG'))
    put(folder / 'bad.jpg', b'no image')
    embedded = []
    embed = search.embed_images

    def embed_and_list(model, paths, *args, **options):
        embedded.append([path.name for path in paths])
        return embed(model, paths, *args, **options)

    monkeypatch.setattr(search, 'embed_images', embed_and_list)
    torch.manual_seed(0)
    models = [COSMOS(MICRO).eval(), COSMOS(MICRO).eval()]

    def check(names, expected, model=models[0]):
        embedded.clear()
        paths, features = search.folder_features(model, data.Preprocess(32), folder)
        assert [path.name for path in paths] == names and embedded == expected
        torch.testing.assert_close(features, embed(model, paths, data.Preprocess(32)), rtol=1e-5, atol=1e-6)

    check(['one.png', 'two.png'], [['one.png', 'two.png']])
    assert 'bad.jpg is no image' in capsys.readouterr().out
    put(folder / 'two.png', picture('PNG', 'blue'))
    put(folder / 'three.png', picture())
    check(['one.png', 'three.png', 'two.png'], [['three.png', 'two.png']])
    (folder / 'b/one.png').unlink()
    check(['three.png', 'two.png'], [])
    check(['three.png', 'two.png'], [['three.png', 'two.png']], models[1])       # other weights
    put(tmp_path / 'photos.features.pt', b'torn')
    check(['three.png', 'two.png'], [['three.png', 'two.png']])


def test_search_command(tmp_path, checkpoint, capsys):
    """oracle: an image finds itself with a score of 1; the sheet is as wide as six tiles or the images there are."""
    for colour in ('red', 'blue', 'green'):
        put(tmp_path / f'photos/{colour}.png', picture('PNG', colour))
    common = [checkpoint, '--images', tmp_path / 'photos', '--workers', 0, '--device', 'cpu', '--out',
              tmp_path / 'sheet.png']
    run(search, *common, '--like', tmp_path / 'photos/blue.png')
    assert re.search('^1.0000 .*blue.png', capsys.readouterr().out, re.M)
    run(search, *common, '--top', 2, 'a red star')
    assert len(re.findall(r'^-?0\.\d{4} .*png$', capsys.readouterr().out, re.M)) == 2
    assert Image.open(tmp_path / 'sheet.png').width == 2 * (search.TILE + 2) + 2
    refused('--like', run, search, *common)


# --- bench -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('method', train.METHODS)
def test_step(method, monkeypatch, capsys):
    """oracle: the parts that Table 5 gives a method; a clock that goes on by a second at each look."""
    monkeypatch.setattr(bench, 'time', SimpleNamespace(perf_counter=itertools.count().__next__))
    monkeypatch.setattr(bench, 'matmul_peak', lambda device, dtype: 1e6)
    monkeypatch.setitem(cosmos.PRESETS, 'micro', MICRO)
    run(bench, 'step', '--preset', 'micro', '--method', method, '--batch', 16, '--steps', 3, '--device', 'cpu')
    printed = capsys.readouterr().out
    parts = {'student forward', 'losses', 'backward', 'AdamW'}
    if not method.startswith('clip'):
        parts |= {'teacher forward', 'EMA'}
    assert set(re.findall(r'^(\w[\w ]*?) +1000\.0 ms', printed, re.M)) == parts
    seconds = 2 * len(parts) + 1
    assert number(printed, 'ms   .* samples/s') == 1000 * seconds
    assert number(printed, 'samples/s') == pytest.approx(16 / seconds, abs=0.05)
    if method == 'clip':
        assert number(printed, 'GFLOP ') == pytest.approx(clip_flops(16) / 1e9, abs=0.0005)


def clip_flops(B):
    """Of a step of MICRO as a CLIP, with one view of 16 patches and a class token, and one caption of 12 tokens."""
    patches = 2 * 16 * 192 * 24
    products = 2 * B * B * 16                           # logits of both directions
    total = B * 2 * patches + 6 * products              # their gradients: of the weights only; of both factors
    for L, C in ((17, 24), (12, 16)):
        block = 24 * L * C ** 2 + 4 * L ** 2 * C
        last_block = (4 * L + 20) * C ** 2 + 4 * L * C  # keys and values of all rows, all else of one
        total += 3 * B * (block + last_block + 2 * C * 16)
    return total


def test_loader(tmp_path, monkeypatch, capsys):
    """oracle: more work takes longer; the number of workers is the rate over the speed of the whole."""
    monkeypatch.setattr(bench, 'SECONDS', 0.05)
    monkeypatch.setattr(torch, 'set_num_threads', print)        # not for the tests that follow
    write_pairs(tmp_path / '0.tar', [{'caption': f'{i} dogs run'} for i in range(9)])
    run(bench, 'loader', tmp_path, '--preset', 'tiny', '--rate', 1e6)
    printed = capsys.readouterr().out
    speeds = [float(speed.replace(',', '')) for speed in re.findall(r'([\d,]+) samples/s$', printed, re.M)]
    assert len(speeds) == 3 and speeds[0] > speeds[2] > 0
    assert number(printed, 'workers') == pytest.approx(1e6 / speeds[2], rel=0.01)
