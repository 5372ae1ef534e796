"""What extras/ promises, each claim with its oracle: the docstring says what the result is compared with.

    pytest extras/test_extras.py
"""
import base64
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import cosmos
import data
import eval as evaluation
import train
from cosmos import COSMOS, Config
from eval import load
from extras import bench, pairs, prepare, report, search

MICRO = Config.preset(
    'tiny', embed_dim=16, image_size=32, local_image_size=16, vision_width=24, vision_layers=2, text_width=16,
    context_length=12, vocab_size=514)

# --- Helpers ---------------------------------------------------------------------------------------------------------

def refused(sentence, call, *args):
    """The call raises ValueError with a sentence that matches."""
    with pytest.raises(ValueError, match=sentence):
        call(*args)


def put(path, value):
    """A file of bytes or text, and the folders it lies in -> path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value.encode() if isinstance(value, str) else value)
    return path


def picture(kind='JPEG', colour='red'):
    """A small image as the bytes of a file."""
    file = io.BytesIO()
    image = Image.new('RGB', (40, 30), colour)
    image.save(file, kind, save_all=kind == 'MPO', append_images=[image])
    return file.getvalue().ljust(2000, b'\0')           # all of one size


def write_pairs(path, lines):
    """A shard of one picture a line of JSON -> path."""
    members = []
    for i, line in enumerate(lines.splitlines()):
        image = picture(colour=f'hsl({60 * i}, 100%, 50%)')
        members += [(f'{i}.jpg', image), (f'{i}.json', line.encode())]
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


@pytest.fixture(autouse=True)
def user_cache(tmp_path, monkeypatch):
    """Torch's cache folder, for this test alone."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A file of random weights as train.py writes it. Its tokenizer reads text byte by byte."""
    path = tmp_path_factory.mktemp('run') / 'last.pt'
    torch.save({'student': COSMOS(MICRO).state_dict(), 'merges': [], 'config': asdict(MICRO)}, path)
    return path


# --- prepare ---------------------------------------------------------------------------------------------------------

COCO = """{
    "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "s/b.png"}],
    "annotations": [{"image_id": 1, "caption": "one dog"}, {"image_id": 2, "caption": "two. dogs"},
                    {"image_id": 1, "caption": "a dog"}]}"""
LINES = """{"image": "a.jpg", "captions": ["one dog", "a dog"]}
{"image": "bad.jpg", "captions": ["x"]}
{"image": "s/b.png", "captions": ["two. dogs"]}
{"image": "absent.jpg", "captions": ["y"]}"""
SOURCES = {
    'r.json': COCO,
    'r.csv': 'filepath,title\na.jpg,one dog\ns/b.png,two. dogs\na.jpg,a dog\n',
    'r.jsonl': LINES}


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
    run(prepare, *arguments)
    assert pools(out) == [['one dog', 'a dog'], ['two', 'dogs']]
    assert data.Shards(out).image(1) == picture('PNG')
    last = max(out.glob('*.tar'))
    whole = last.read_bytes()
    last.rename(f'{last}.partial')          # as a kill leaves it
    run(prepare, *arguments)
    assert last.read_bytes() == whole
    count = '2 of the 4 images listed, 2 left' if name == 'r.jsonl' else '2 of the 2 images listed, 0 left'
    assert capsys.readouterr().out.count(f'out holds {count} out\n') == 2


GARBLED = {
    "rows of one image, in two keys and two forms; DreamLIP's strings are split, items of its lists are not": (
        'r.jsonl', [['a dog', 'a cat'], ['An ox', 'A cow of J. Smith', 'Grass. Green.']],
        """{"image": "a.jpg", "captions": ["a dog"]}
            {"image": "b.jpg", "raw_caption": "An ox. A cow of J. Smith."}
            {"image": "a.jpg", "captions": "a cat"}
            {"image": "b.jpg", "raw_caption": ["Grass. Green."]}
            {"image": "a.jpg", "captions": [{}]}"""),
    'semicolons': ('s.csv', [['a dog; old, big']], 'image_path;text\na.jpg;"a dog; old, big"\n'),
    'a line separator in a text': (
        'u.jsonl', [['a\u2028dog']], '{"image": "a.jpg", "caption": "a\u2028dog"}\n\n'),
    'a quotation mark in a TSV': (
        'q.tsv', [['"Oh, a cat'], ['a dog']], 'image\tcaption\na.jpg\t"Oh, a cat\nb.jpg\ta dog\n'),
    'a byte order mark, two columns of texts': (
        'u.csv', [['a dog'], ['a cat']], '\ufeffimage,title,text\na.jpg,a dog,\nb.jpg,,a cat\n'),
    'a caption beside another text': (
        't.csv', [['a dog'], ['a cat, old']], 'image,caption,text\na.jpg,a dog,SALE\nb.jpg,"a cat, old",\n'),
    "Flickr30k's, with a quotation mark, and a row that lacks a delimiter": (
        'f.csv', [['Dogs run'], ['" Oh , a cat']],
        'image_name| comment_number| comment\na.jpg| 0| Dogs run .\nb.jpg| 0| " Oh , a cat .\na.jpg| 4   A dog .\n')}


@pytest.mark.parametrize('case', GARBLED)
def test_tables_that_could_be_garbled(case, tmp_path, images):
    """oracle: the captions that stand in the table."""
    name, expected, text = GARBLED[case]
    prepare.pack(put(tmp_path / name, text), images, tmp_path / 'out')
    assert pools(tmp_path / 'out') == expected


def test_columns_that_are_named(tmp_path, images):
    """oracle: the row by hand. A column that is named wins over one that would be found."""
    table = put(tmp_path / 'b.csv', 'photo\timage\tcaption\tde\na.jpg\tb.jpg\ta dog\tein Hund\n')
    out = tmp_path / 'out'
    run(prepare, 'pack', table, images, out, '--image-column', 'photo', '--caption-column', 'de')
    assert pools(out) == [['ein Hund']]
    assert data.Shards(out).record(0)['file'] == 'a.jpg'
    refused('b.csv has .*none of fr', prepare.pack, table, images, out, 9, 0, None, 'fr')
    refused('none of foto; .*--image-column', prepare.pack, table, images, out, 9, 0, 'foto')


def test_a_table_that_grew(tmp_path, images, capsys):
    """oracle: the rows, each in one half; the shards of before, byte by byte; counts by hand. New rows stand first,
    and an image that was broken is whole now. Refused, without a trace: rows that are gone or changed."""
    rows = ['bad.jpg,dog bad']
    for i in range(30):
        put(images / f'{i}.jpg', picture())
        rows.append(f'{i}.jpg,dog {i}')
    table = tmp_path / 't.csv'
    out = tmp_path / 'out'

    def pack(lines):
        put(table, '\n'.join(['image,caption', *lines]))
        prepare.pack(table, f'{images}/', out, 4, 0.3)
        return {path: path.read_bytes() for path in out.rglob('*.tar')}

    before = pack(rows[:17])
    put(images / 'bad.jpg', picture())
    after = pack(rows[17:] + rows[:17])
    assert after.items() > before.items() and after == pack(rows)
    train = pools(out / 'train')
    val = pools(out / 'val')
    assert sorted(train + val) == sorted([line.partition(',')[2]] for line in rows)
    assert f'/train holds {len(train)} of the {len(train)} images listed, 0 left out' in capsys.readouterr().out
    refused("val holds '3.jpg', whose rows .*t.csv are gone or changed", pack, rows[:4] + rows[5:])
    refused("val holds '3.jpg', whose", pack, [*rows, '3.jpg,another', 'a.jpg,new'])
    assert after == pack(rows)
    refused('--val 10 is no share', prepare.pack, table, images, tmp_path, 9, 10)


def test_pack_refuses(tmp_path, images, capsys):
    """oracle: the sentence of the error, which names value and place. Before any image is read, and the corrected
    command is taken."""
    out = tmp_path / 'out'
    german = put(tmp_path / 'g.csv', 'image;Beschreibung\na.jpg;größer\nbad.jpg;alt\n')
    refused('g.csv has no .* columns are image, Beschreibung: .*--caption-column', prepare.pack, german, images, out)
    refused('none of text; .*--caption-column', prepare.pack, german, images, out, 9, 0, None, 'text')
    assert not capsys.readouterr().err
    excel = put(tmp_path / 'e.csv', german.read_text().encode('cp1252'))
    with pytest.raises(ValueError, match=r'e.csv is not UTF-8 \(line 2\); .*CSV UTF-8') as error:
        prepare.pack(excel, images, out)
    assert len(str(error.value)) < 200
    refused('none of the 2 images', prepare.pack, german, tmp_path, out, 9, 0, None, 'Beschreibung')
    prepare.pack(german, images, out, 9, 0, None, 'Beschreibung')
    assert pools(out) == [['größer']]
    out = tmp_path / 'other'
    rows = put(tmp_path / 'r.csv', SOURCES['r.csv'])
    prepare.pack(rows, images, out)
    other = put(tmp_path / 'other.jsonl', LINES)
    refused('other holds shards made from .*r.csv', prepare.pack, other, images, out)
    refused('none of the 2 images', prepare.pack, rows, out, tmp_path / 'new')
    wide = put(tmp_path / 'w.csv', 'image,caption\na.jpg,a dog, old\n')
    refused('row 1 of .*w.csv has more fields than the first', prepare.pack, wide, images, out)


def test_ten_are_named(tmp_path, images, capsys):
    """oracle: 13 rows of absent images, counted by hand."""
    rows = ['image,caption', 'a.jpg,dog']
    for i in range(13):
        rows.append(f'{i}.jpg,dog')
    prepare.pack(put(tmp_path / 't.csv', '\n'.join(rows)), images, tmp_path / 'out')
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(':')[0] for line in lines] == [
        *[f'left out   {i}.jpg' for i in range(10)], 'left out   3 more']


URLS = r"""{"url": "http://x/0", "caption": "alt"}
{"url": "http://x/1", "caption": "alt", "key": "1"}
{"url": "http://x/2", "caption": "alt", "key": "2"}
{"url": null, "caption": "alt"}
{"url": "", "caption": "alt"}
{"url": "http://x/9", "caption": "alt"}
{"url": "\ud800", "caption": "alt"}"""


def test_join(tmp_path, capsys):
    """oracle: the rows of the table, matched by hand; texts become sentences, the shard's own keys stay. Sentences of
    errors."""
    table = put(tmp_path / 'd.csv', '\ufeffImage Path,raw_caption,longIB_captions\nhttp://x/2,two dogs,"A dog.\n'
                                    'It is 3.5 m, big."\n,no,no\nNone,no,no\nhttp://x/1,one dog,A dog\nhttp://x/0,,\n')
    shard = write_pairs(tmp_path / 'in/i.tar', URLS)
    out = tmp_path / 'joined'
    run(prepare, 'join', table, shard, out)
    assert '2 of 7 pairs matched (28.6%)' in capsys.readouterr().out
    assert pools(out) == [['one dog', 'A dog'], ['two dogs', 'A dog', 'It is 3.5 m, big']]
    shards = data.Shards(out)
    assert [shards.record(i)['key'] for i in range(2)] == ['1', '2']
    refused('in holds shards made from something else', prepare.join, table, shard, shard.parent)
    bare = write_pairs(tmp_path / 'bare.tar', '{"caption": "dog"}')
    refused("bare.tar has no 'url' to join by", prepare.join, table, bare, out)
    nameless = put(tmp_path / 'n.csv', 'filepath,title\na,b\n')
    refused('n.csv has the columns filepath, title, none of url', prepare.join, nameless, shard, out)


def test_inspect(tmp_path, capsys, monkeypatch):
    """oracle: the pairs broken on purpose, counts by hand, and what is written on the sheet. Of a folder of two halves
    the training pairs are read."""
    texts = []
    fonts = set()

    def write(self, place, text, font, **how):
        texts.append(text)
        fonts.add((font.getname(), font.size))

    monkeypatch.setattr(ImageDraw.ImageDraw, 'text', write)
    members = []
    for i, image in enumerate([picture(), picture(), b'no image', picture()[:600], picture('PNG')]):
        members += [(f'{i}.jpg', image), (f'{i}.txt', b'Dogs. A cat')]
    members.append(('4.json', b'{"raw_caption": ["Dogs. A cat."]}'))
    data.write_shard(tmp_path / 'train/0.tar', members)
    data.write_shard(tmp_path / 'val/0.tar', members[:2])
    run(prepare, 'inspect', tmp_path, '--out', tmp_path / 'sheet.png')
    printed = capsys.readouterr()
    assert re.findall(r'left out   .*0.tar:(\d)', printed.err) == ['2', '3']
    for line in ('of .* the half train/', 'left out +2 of 5', r'keys +txt \(100%\), raw_caption \(33%\)',
                 'unsplit paragraphs +in 1 of 3 pairs', 'sentences per pair +0 % 1, .* 100 % 2',
                 'words per sentence +0 % 1, .* 100 % 3', 'repeated +1 of 3 images, 2 of 5 sentences'):
        assert re.search(line, printed.out), line
    assert texts[0].startswith('2 global views, the others local')
    assert fonts == {(data.picture_font(12).getname(), 12)}
    below = texts[1:]           # of one pair after the other
    assert sum(line.startswith('G   ') for line in below) == 2 * 3 and below.count('L   Dogs') >= 3


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


PROBES = """[
    {"images": {"A": "1", "B": "2", "C": "-1"},
     "dominant_query": {"positive": "1", "swap": "-1", "negatives": ["0"]},
     "small_query": {"positive": "1", "swap": "-1", "negatives": ["0"]}},
    {"images": {"A": "1", "B": "2", "C": "-1"},
     "dominant_query": {"positive": "1", "swap": "-1", "negatives": ["0"]},
     "small_query": {"positive": "-1", "swap": "1", "negatives": ["0"]}}]"""


def test_suppression_by_hand(tmp_path, monkeypatch):
    """oracle: two probes by pencil. Pictures and captions are numbers, and a score is their product."""
    put(tmp_path / 'probes.json', PROBES)

    def features(model, other, names):
        return torch.tensor([[float(Path(name).name)] for name in names])

    monkeypatch.setattr(pairs, 'embed_texts', features)
    monkeypatch.setattr(pairs, 'embed_images', lambda model, paths, *args, **how: features(model, args, paths))
    figures = pairs.suppression(None, None, None, tmp_path)
    for role, expected in ('dominant', [1, 1, 0]), ('small', [0.5, 0.5, 0.5]):
        found = figures[role]
        assert [found['scene_top1'], found['name_top1'], found['standard_error']] == pytest.approx(expected)


def test_pairs_command(tmp_path, checkpoint):
    """oracle: the items in the file; of two with exchanged captions one is right, by the scores beside it; an image
    against itself is a tie, so a miss."""
    image = put(tmp_path / '7.png', picture())
    items = put(tmp_path / 'items.jsonl', """{"images": ["7"], "captions": ["a dog", "two cats"]}
        {"images": ["7"], "captions": ["two cats", "a dog"], "type": "t"}
        {"images": ["7", "7"], "captions": ["a dog"]}""")
    run(pairs, checkpoint, '--items', items, '--json', tmp_path / 'f.json', '--workers', 0, '--device', 'cpu')
    figures = json.loads((tmp_path / 'f.json').read_text())
    assert figures['t 1 x 2']['items'] == 1
    assert figures['all 1 x 2']['text_score'] == 0.5
    assert figures['all 2 x 1'] == {'items': 1, 'image_score': 0, 'image_chance': 0.5}
    first, second, _ = figures['each']
    [[dog, cats]] = scores = first['scores']
    assert first == {'images': [str(image)], 'captions': ['a dog', 'two cats'], 'scores': scores, 'right': dog > cats}
    assert second['right'] == (dog < cats)


# --- search ----------------------------------------------------------------------------------------------------------

def test_search_refreshes_what_changed(tmp_path, monkeypatch, capsys):
    """oracle: features without an index; the files that were opened: new or changed ones once, bad ones ever and twice;
    the one file in the user's cache. An index that cannot be read or written ends nothing."""
    folder = tmp_path / 'photos'
    put(folder / 'b/one.png', picture('PNG'))
    put(folder / 'two.png', picture('PNG'))
    put(folder / 'bad.jpg', b'no image')
    opened = []

    def open_and_list(source):
        opened.append(source.name)
        return Image.open(source)

    monkeypatch.setattr(data, 'open_image', open_and_list)
    first = COSMOS(MICRO).eval()

    def check(names, new, model=first):
        opened.clear()
        paths, features, left_out = search.folder_features(model, data.Preprocess(32), folder)
        assert [path.name for path in paths] == names
        assert sorted(opened) == ['bad.jpg', 'bad.jpg', *new] and left_out == 1
        whole = search.embed_images(model, paths, data.Preprocess(32))
        torch.testing.assert_close(features, whole, rtol=1e-5, atol=1e-6)

    check(['one.png', 'two.png'], ['one.png', 'two.png'])
    put(folder / 'two.png', picture('PNG', 'blue'))
    put(folder / 'three.png', picture())
    check(['one.png', 'three.png', 'two.png'], ['three.png', 'two.png'])
    (folder / 'b/one.png').unlink()
    both = ['three.png', 'two.png']
    check(both, [])
    check(both, both, COSMOS(MICRO).eval())                     # other weights
    [index] = (tmp_path / 'home').rglob('*.pt')
    put(index, b'torn')
    check(both, both)
    monkeypatch.setenv('TORCH_HOME', str(folder / 'two.png'))
    check(both, both)
    assert 'not kept' in capsys.readouterr().out
    refused('absent is missing', search.folder_features, None, None, tmp_path / 'absent')


def test_search_command(tmp_path, checkpoint, capsys):
    """oracle: an image and its copy score 1, and their tiles differ, as only their folders do; the sheet is as wide as
    the images that are shown. All three are ranked, and the features that are saved give the scores; what is broken is
    named and counted, what is hidden is not looked at."""
    photos = tmp_path / 'photos'
    put(photos / 'bad.jpg', b'no image')
    put(photos / '.hidden/one.png', picture())
    put(photos / '._one.png', b'no image')
    (photos / 'empty').mkdir()
    sheet = tmp_path / 'sheet.png'
    for name, colour in {'a/one.png': 'red', 'b/one.png': 'red', 'two.png': 'blue'}.items():
        put(photos / name, picture('PNG', colour))
    common = [checkpoint, '--images', photos, '--workers', 0, '--device', 'cpu', '--out', sheet]
    run(search, *common, 'a red star', '--json', tmp_path / 'f.json', '--save', tmp_path / 'f.pt')
    printed = capsys.readouterr()
    assert re.findall('left out .*', printed.err) == [f'left out   {photos}/bad.jpg is no image that can be read '
                                                      f"(cannot identify image file '{photos}/bad.jpg')"]
    assert re.search('left out +1\n', printed.out)
    found = json.loads((tmp_path / 'f.json').read_text())
    assert found['left out'] == 1
    saved = torch.load(tmp_path / 'f.pt', weights_only=True)
    assert saved['paths'] == [f'{photos}/a/one.png', f'{photos}/b/one.png', f'{photos}/two.png']
    query = search.embed_texts(*load(checkpoint)[:2], ['a red star'])[0]
    scores = dict(zip(saved['paths'], (saved['features'] @ query).tolist()))
    ranking = [(row['image'], row['score']) for row in found['ranking']]
    assert dict(ranking) == pytest.approx(scores) and ranking == sorted(ranking, key=lambda row: -row[1])
    assert Image.open(sheet).width == 3 * (search.TILE + 2) + 2
    run(search, *common, '--top', 2, '--like', photos / 'a/one.png')
    assert len(re.findall('^1.0000 .*one.png', capsys.readouterr().out, re.M)) == 2
    left, right = data.decode(sheet.read_bytes())[..., 2:].chunk(2, dim=2)
    assert not left.equal(right)
    refused('--like', run, search, *common)
    refused('quotes: "a red star"', run, search, *common, 'a', 'red', 'star')


@pytest.mark.parametrize('module', [bench, pairs, prepare, search])
def test_help_shows_the_command_as_it_is_typed(module, capsys):
    """oracle: the module's name."""
    with pytest.raises(SystemExit):
        run(module, '--help')
    assert capsys.readouterr().out.startswith(f'usage: python -m {module.__name__} [')


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
    monkeypatch.setattr(torch, 'set_num_threads', int)          # not for the tests that follow
    write_pairs(tmp_path / 'train/0.tar', 9 * '{"caption": "dogs run"}\n')
    write_pairs(tmp_path / 'val/0.tar', '{}')
    run(bench, 'loader', tmp_path, '--preset', 'tiny', '--rate', 1e6)
    half, read, _, whole, workers = capsys.readouterr().out.splitlines()
    assert half.endswith('the half train/')
    speed = number(whole, 'samples')
    assert number(read, 'samples') > speed > 0
    assert number(workers, 'workers') == pytest.approx(1e6 / speed, rel=0.01)


# --- report ----------------------------------------------------------------------------------------------------------

HOSTILE = 'a </script><b>red</b> dog'
RECORD = {'captions': [HOSTILE, 'dogs'], 'objects': [{'name': 'red star', 'absent': ['red ring']}]}


def three_pairs(folder):
    return data.Shards(write_pairs(folder / '0.tar', 3 * f'{json.dumps(RECORD)}\n'))


def train_on_three(folder, method='cosmos'):
    """A run with evaluations before the first step, after five and after ten -> what they were of: the teacher."""
    three_pairs(folder)
    flags = f'--data {folder} --val {folder} --out {folder} --method {method} --preset micro --vocab learn'
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match='0'):
        patch.setitem(cosmos.PRESETS, 'micro', MICRO)
        run(train, *flags.split(), *'--steps 10 --eval-every 5 --batch 2 --workers 0'.split())
    return load(folder / 'last.pt')


def runs_on_page(*folders):
    text = report.write(folders).read_text()
    assert text.count('</script>') == 1
    return json.loads(re.search('^const RUNS = (.*);$', text, re.M)[1])


@pytest.mark.parametrize('method', ['cosmos', 'clip'])
def test_the_page_says_what_eval_says(tmp_path, method):
    """oracle: eval.attention, or encode_dense, asked by one text at a time; products of features; by hand the texts."""
    model, tokenizer, preprocess = train_on_three(tmp_path, method)
    [page] = runs_on_page(tmp_path)
    entries = [entry for entry in page['maps']['steps'][-1]['texts'] if entry['image'] == 2]
    texts = [entry['text'] for entry in entries]
    assert texts == [HOSTILE, 'dogs', HOSTILE, HOSTILE, 'a red star', 'a red ring']
    assert entries[3]['of'] is None and entries[5]['of'] == 0
    image = evaluation.shard_image(data.Shards(tmp_path), 2)
    pixels = preprocess(image)[None]
    vectors = evaluation.embed_texts(model, tokenizer, texts)
    cls = evaluation.embed_images(model, [image], preprocess)[0]
    for entry, vector in zip(entries, vectors):
        assert entry['cosine'] == pytest.approx((cls @ vector).item(), abs=1e-5)
        if model.has_cross_attention:
            weights, _ = model.attention(pixels, tokenizer([entry['text']]))
            _, words = evaluation.attention(model, tokenizer, preprocess, image, entry['text'])
            assert entry['words'] == [[word, pytest.approx(share, abs=1e-4)] for word, share in words]
        else:
            weights = model.encode_dense(pixels) @ vector
        least, most = entry['ends']
        levels = np.frombuffer(base64.b64decode(entry['map']), np.uint8)
        shown = least + (most - least) * levels / 255
        assert shown == pytest.approx(weights.flatten().tolist(), abs=0.005 * (most - least))


def test_hits_and_misses(tmp_path):
    """oracle: by hand: the first caption is of image 0 but nearest to image 1, whose own comes second."""
    images = torch.tensor([[0.0, 1], [1, 0]])
    texts = torch.tensor([[0.75, 0.25], [0, 1], [0.5, 0]])
    hit, miss = report.examples(three_pairs(tmp_path), images, texts, 'abc', torch.tensor([0, 0, 1]))
    assert hit['rank'] == 1 and miss['rank'] == 2
    found = [(side['text'], side['cosine']) for side in hit['sides'] + miss['sides']]
    assert found == [('b', 1), ('c', 0), ('c', 0.5), ('a', 0.75)]


def test_partial_runs_give_a_page(tmp_path):
    """oracle: Views itself; by hand what a killed run lacks, and files that are torn."""
    views = data.Views(three_pairs(tmp_path), None, MICRO, seed=0, batch=2)
    report.begin(views, tmp_path)
    put(tmp_path / 'config.json', '{}')
    put(tmp_path / 'log.jsonl', '{"step": 1, "loss": NaN}\n{"step": 3, "lo')
    [killed] = runs_on_page(tmp_path)
    _, _, captions, boxes = views.views(0, 0)
    first = killed['maps']['start']['pairs'][0]
    assert first['captions'] == captions and first['boxes'][7] == list(boxes[7])
    assert killed['log'][-1]['step'] == 1 and 'held_out' not in killed['maps']
    for name in 'config.json', 'maps.npz':
        put(tmp_path / name, 'torn')
    [torn, _] = runs_on_page(tmp_path, tmp_path)
    assert 'missing' in torn['config'] and 'missing' in torn['maps']
    report.begin(views, tmp_path)                       # a damaged file is replaced
    refused('holds no config.json', report.write, [tmp_path / 'absent'])


def test_training_leaves_a_page(tmp_path, monkeypatch, capsys):
    """oracle: the run's own files and last lines. Of a long run first and last maps, some 400 lines, all evaluations."""
    train_on_three(tmp_path)
    printed = capsys.readouterr().out
    assert f'report     {tmp_path}/report.html' in printed and 'lacks' not in printed
    [page] = runs_on_page(tmp_path)
    log = evaluation.read_lines(tmp_path / 'log.jsonl')
    assert page['log'] == list(map(json.loads, log)) and page['config']['method'] == 'cosmos'
    assert page['eval']['retrieval'] == page['log'][-1]['eval']['retrieval']
    assert [entry['step'] for entry in page['maps']['steps']] == [0, 5, 10]
    monkeypatch.setattr(report, 'MOST_STEPS', 2)
    put(tmp_path / 'log.jsonl', 4000 * '{"step": 1}\n' + '{"eval": 1}\n{"eval": 2}')
    [page] = runs_on_page(tmp_path)
    assert [entry['step'] for entry in page['maps']['steps']] == [0, 10]
    assert 360 < len(page['log']) < 405 and page['log'][-2:] == [{'eval': 1}, {'eval': 2}]


@pytest.mark.skipif(not shutil.which('chromium'), reason='chromium is not installed')
def test_the_page_in_a_browser(tmp_path):
    """oracle: Chromium: a silent console, all parts of the page, captions as text, a picture that is no blank."""
    train_on_three(tmp_path)
    page = report.write([tmp_path]).as_uri()
    command = f'chromium --headless --no-sandbox --enable-logging=stderr --dump-dom --screenshot={tmp_path}/page.png'
    done = subprocess.run([*command.split(), '--window-size=400,3000', page], capture_output=True, text=True)
    built, _, _ = done.stdout.partition('<script>')
    assert 'CONSOLE' not in done.stderr
    assert built.count('aria-label="image ') == built.count('class="pair"') - 1 == 3
    assert '&lt;b&gt;red' in built and '<b>red' not in built
    assert len(Image.open(tmp_path / 'page.png').getcolors(1 << 20)) > 100
