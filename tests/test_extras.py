"""What extras/ promises, each claim with its oracle: the docstring says what the result is compared with."""
import base64
import csv
import html
import io
import itertools
import json
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import data
import eval as evaluation
import train
from cosmos import COSMOS, Teacher, total_loss
from eval import load
from extras import attend, export, look, prepare, report
from plumbing.shards import write_shard
from plumbing.weights import from_openclip
from tests.helpers import ROOT, encoded, put, refused, run, shared

MICRO = replace(train.PRESETS['micro'].sizes, vocab_size=514)

# --- Helpers ---------------------------------------------------------------------------------------------------------

def picture(kind='JPEG', colour='red'):
    """A small image as the bytes of a file."""
    image = Image.new('RGB', (40, 30), colour)
    encoding = encoded(image, kind, save_all=kind == 'MPO', append_images=[image])
    return encoding.ljust(2000, b'\0')                      # all of one size


def write_pairs(path, lines, *images):
    """A shard with one picture per line of JSON, the given pictures first -> path."""
    members = []
    for i, line in enumerate(lines.splitlines()):
        image = images[i] if i < len(images) else picture(colour=f'hsl({60 * i}, 100%, 50%)')
        members += [(f'{i}.jpg', image), (f'{i}.json', line.encode())]
    write_shard(path, members)
    return path


def pools(folder):
    """The sentences of all pairs of a folder of shards."""
    shards = data.Shards(folder)
    return [shards.pool(i) for i in range(len(shards))]


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
                    {"image_id": 1, "caption": "a dog"}, {"image_id": 3, "caption": "of no image"}]}"""
LINES = """{"image": "a.jpg", "caption": ["one dog", "a dog"]}
{"image": "bad.jpg", "caption": ["x"]}
{"image": "s/b.png", "caption": ["two. dogs"]}
{"image": "absent.jpg", "caption": ["y"]}"""
CSV = 'Image,CAPTION\na.jpg,one dog .\ns/b.png,two. dogs\na.jpg,a dog\n'
DOGS = [['one dog', 'a dog'], ['two', 'dogs']]          # the captions in each of these three


@pytest.fixture
def images(tmp_path):
    put(tmp_path / 'images/a.jpg', picture())
    put(tmp_path / 'images/b.jpg', picture('MPO'))
    put(tmp_path / 'images/s/b.png', picture('PNG'))
    put(tmp_path / 'images/bad.jpg', b'no image')
    return tmp_path / 'images'


def test_pack(tmp_path, images, capsys):
    """oracle: the rows that were packed. A folder that exists is refused."""
    out = tmp_path / 'new/out'
    arguments = ['pack', put(tmp_path / 'r.json', LINES), images, out, '--size', 1]
    run(prepare, *arguments)
    assert pools(out) == DOGS
    assert data.Shards(out).image(1) == picture('PNG')
    assert 'out holds 2 of the 4 images listed\n' in capsys.readouterr().out
    assert 'out exists; name a new folder' in run(prepare, *arguments)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The names of shards as they are written, while tmp_path/out may not exist. The second ends in an interruption."""
    names = []

    def write_or_stop(path, members):
        assert not (tmp_path / 'out').exists()
        names.append(path.name)
        if len(names) == 2:
            raise KeyboardInterrupt
        write_shard(path, members)

    monkeypatch.setattr(prepare, 'write_shard', write_or_stop)
    return names


def test_an_interrupted_pack_leaves_nothing_that_trains(tmp_path, images, written):
    """oracle: the folder, which is not there before its last shard is written, nor after an interruption."""
    table = put(tmp_path / 't.csv', CSV)
    out = tmp_path / 'out'
    with pytest.raises(KeyboardInterrupt):
        prepare.pack(table, images, out, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['images', 't.csv']
    prepare.pack(table, images, out, 1)
    assert len(written) == 4 and len(pools(out)) == 2


QUOTED = [['"Oh, a cat', 'two\ndogs'], ['a, b', 'x']]         # captions that a table has to quote


def written_table(delimiter):
    """What Python's csv module writes for QUOTED: quotation marks doubled, a newline inside a field."""
    file = io.StringIO()
    rows = csv.writer(file, delimiter=delimiter)
    rows.writerow(['caption', 'size', 'image'])
    for name, captions in zip(['a.jpg', 'b.jpg'], QUOTED):
        rows.writerows([caption, 7, name] for caption in captions)
    return file.getvalue()


TABLES = {              # what could be garbled: the captions, and the table; the columns to take, if they are named
    "COCO's list": (DOGS, COCO),
    'a CSV': (DOGS, CSV),
    'a CSV of the csv module': ([['"Oh, a cat', 'two', 'dogs'], ['a, b', 'x']], written_table(',')),
    'a TSV of the csv module': ([['"Oh, a cat', 'two', 'dogs'], ['a, b', 'x']], written_table('\t')),
    'columns that are named': (
        [['ein Hund']], 'photo\timage\tcaption\tde\na.jpg\tb.jpg\ta dog\tein Hund\n', 'PHOTO', 'de'),
    'rows of one image, in two forms; captions that are not text': (
        [['a dog', 'a cat'], ['An ox']],
        """{"image": "a.jpg", "caption": ["a dog", 5, null]}
            {"image": "./a.jpg", "caption": "a cat"}
            {"image": "b.jpg", "caption": "An ox"}
            {"image": "b.jpg"}"""),
    'a byte order mark, a row that is too short': (
        [['a dog']], '\ufeffimage,caption\nb.jpg\na.jpg,a dog\n')}
SAID = {'captions that are not text': "3 captions of {}/t, under 'caption', are absent or not text, and so not used",
        'csv module': '1 rows of {}/t take several lines, ',
        "COCO's": 'captions of 1 images are left out',
        'too short': '1 rows of {}/t have fewer fields than its first line, the first is row 1;'}


@pytest.mark.parametrize('case', TABLES)
def test_tables(case, tmp_path, images, capsys):
    """oracle: the captions that the table holds, and the lines that count what is not used. The content says what a
    table is, not the name."""
    expected, text, *columns = TABLES[case]
    prepare.pack(put(tmp_path / 't', text), images, tmp_path / 'out', 9, 0, *columns)
    assert pools(tmp_path / 'out') == expected
    printed = capsys.readouterr()
    for what, sentence in SAID.items():
        assert (sentence.format(tmp_path) in printed.out + printed.err) == (what in case)
    assert ("only 'photo' and 'de' are used, not image, caption" in printed.out) == bool(columns)


def test_a_share_is_held_out(tmp_path, images):
    """oracle: the rows, each in one half; the halves of a shorter table, because a name alone decides."""
    rows = []
    for i in range(30):
        put(images / f'{i}.jpg', picture())
        rows.append(f'{i}.jpg,dog {i}')
    halves = []
    for name, lines in {'few': rows[:17], 'all': rows[17:] + rows[:17]}.items():
        table = put(tmp_path / f'{name}.csv', '\n'.join(['image,caption', *lines]))
        prepare.pack(table, images, tmp_path / name, 4, 0.3)
        halves.append([{pool for [pool] in pools(tmp_path / name / half)} for half in ('train', 'val')])
    (few_train, few_val), (train, val) = halves
    assert few_train < train and few_val < val
    assert len(train) + len(val) == len(train | val) == 30 and 4 < len(val) < 14        # a share of 0.3 is about 9


def test_karpathys_list(tmp_path, capsys):
    """oracle: Karpathy's splits, by hand. --val is refused, because the list already says what is held out."""
    listed = []
    for i, split in enumerate(['train', 'restval', 'val', 'test', 'other']):
        put(tmp_path / f'f/{i}.jpg', picture())
        listed.append({'filename': f'{i}.jpg', 'filepath': 'f', 'split': split, 'sentences': [{'raw': f'a , {i} .'}]})
    rows = put(tmp_path / 'k', {'images': listed})
    out = tmp_path / 'out'
    refused('k already says which images are held out; leave out --val', prepare.pack, rows, tmp_path, out, 9, 0.1)
    prepare.pack(rows, tmp_path, out)
    assert pools(out / 'train') == [['a , 0'], ['a , 1']]
    assert pools(out / 'val') == [['a , 2']]
    assert '1 train, 1 restval, 1 val, 1 test, 1 other; ' in capsys.readouterr().out


GERMAN = 'image;Beschreibung\na.jpg;größer\nbad.jpg;alt\n'
NO_TABLES = {
    GERMAN: "/t has the columns image, Beschreibung, of which not one is 'caption'; say with --caption-column",
    'Image,image,caption\na.jpg,b.jpg,x\n': "of which not one is 'image'; say with --image-column",
    GERMAN.encode('cp1252'): "/t cannot be read .*UnicodeDecodeError: 'utf-8' codec",
    'image,caption\na.jpg,a dog, old\n': 'line 2 of .*/t has more fields than the first',
    'image,caption,caption,,\na.jpg,x,y,,\n': '/t has several columns called caption; .* several rows',
    '': '/t has no rows',
    '{"image": "a.jpg"}\n{"image"': 'line 2',
    '{"images": [' + ', '.join('{"filename": "a.jpg", "split": "%s", "sentences": []}' % half for half in ('val', 'test'))
    + ']}': 'a.jpg is in two splits of .*/t',
    '{"image": null, "caption": "x"}': "row 1 of .*/t has no file name under 'image'; its columns are image, caption",
    'image,"caption\na.jpg,x\n': '/t cannot be read from line 1 on .* quotation mark',
    'image,caption\na.jpg,x\nb.jpg,"a\ndog\n': '/t cannot be read from line 3 on .* quotation mark'}


def test_pack_refuses(tmp_path, images):
    """oracle: the sentence of the error, which names value and place; the corrected command is accepted."""
    out = tmp_path / 'out'
    for text, sentence in NO_TABLES.items():
        refused(sentence, prepare.pack, put(tmp_path / 't', text), images, out)
    german = put(tmp_path / 't', GERMAN)
    refused('none of the 2 images', prepare.pack, german, tmp_path, out, 9, 0, 'image', 'Beschreibung')
    refused('leaves .* empty', prepare.pack, german, images, out, 9, 1, 'image', 'Beschreibung')
    prepare.pack(german, images, out, 9, 0, 'image', 'Beschreibung')
    assert pools(out) == [['größer']]


URLS = r"""{"url": "http://x/0", "caption": "alt"}
{"url": "http://x/1", "caption": "alt", "key": "1"}
{"url": "http://x/2", "caption": "alt", "key": "2"}
{"url": null, "caption": "alt"}
{"url": "", "caption": "alt"}
{"url": "http://x/9", "caption": "alt"}"""


def test_join(tmp_path, capsys):
    """oracle: the rows of the table, matched by hand; texts become sentences, and the shard's own keys stay. A shard in
    which nothing matches leaves no tar. A short row does not hide a later one; it is counted, as others without use."""
    table = put(tmp_path / 'd.csv', '\ufeffImage Path,raw_caption,longIB_Captions\nhttp://x/2,dog\nhttp://x/2,two dogs,"A dog.\n'
                                    'It is 3.5 m, big."\n,no,no\nNone,no,no\nhttp://x/1,one dog,A dog\nhttp://x/1,cat,\nhttp://x/0,,\n')
    shard = write_pairs(tmp_path / 'in/i.tar', URLS)
    bare = write_pairs(tmp_path / 'in/j.tar', '{"caption": "dog"}')
    out = tmp_path / 'joined'
    run(prepare, 'join', table, shard, bare, f'{out}/')     # with the slash of a shell
    assert [path.name for path in out.glob('*.tar')] == ['00000.tar']
    printed = capsys.readouterr().out
    assert '2 of 7 pairs matched (28.6%)' in printed
    for counted in '1 rows of {} have not a URL', '1 rows of {} have not as many fields', '1 rows of {} have not captions', \
            '1 rows of {} have not a URL of their own', 'from the columns longIB_Captions, raw_caption of {}':
        assert counted.format(table) in printed
    assert pools(out) == [['one dog', 'A dog'], ['two dogs', 'A dog', 'It is 3.5 m, big']]
    shards = data.Shards(out)
    assert [shards.record(i)['key'] for i in range(2)] == ['1', '2']
    assert shards.record(1)['longIB_captions'] == 'A dog.\nIt is 3.5 m, big.'       # whole, as evaluation takes it
    refused('in exists; name a new folder', prepare.join, table, [shard], shard.parent)
    foreign = put(tmp_path / 'f.csv', 'url,raw_caption\nhttp://y/1,one dog\n')
    refused('no url of the pairs is in .*f.csv', prepare.join, foreign, [shard], tmp_path / 'another')


def test_an_interrupted_join_goes_on(tmp_path, written):
    """oracle: the pairs of each shard; the one that was there is not written again. A command with another table is
    refused. The folder appears when it is whole."""
    table = put(tmp_path / 'd.csv', 'url,raw_caption\nhttp://x/1,one dog\n')
    shards = [write_pairs(tmp_path / f'in/{i}.tar', URLS) for i in range(3)]
    out = tmp_path / 'out'
    with pytest.raises(KeyboardInterrupt):
        prepare.join(table, shards, out)
    longer = put(tmp_path / 'l.csv', 'url,raw_caption\nhttp://x/1,one dog\nhttp://x/2,two dogs\n')
    refused('out.partial was left by another command', prepare.join, longer, shards, out)
    prepare.join(table, shards, out)
    assert written == ['00000.tar', '00001.tar', '00001.tar', '00002.tar']
    assert pools(out) == 3 * [['one dog']]


def test_look(tmp_path, capsys, monkeypatch):
    """oracle: the pairs that were broken on purpose, and counts by hand; captions are cut at the 64 tokens of `tiny`.
    If a folder has two halves, its training pairs are read. Half an emoji is printed, too."""
    members = []
    for i, image in enumerate([picture(), picture(), b'no image', picture()[:600], picture('PNG')]):
        members += [(f'{i}.jpg', image), (f'{i}.txt', b'Dogs. A cat')]
    members[3] = '1.txt', 63 * b'Dogs '
    members.append(('4.json', b'{"raw_caption": ["Dogs\\ud83d. A cat."]}'))
    write_shard(tmp_path / 'train/0.tar', members)
    write_shard(tmp_path / 'val/0.tar', members[:2])
    monkeypatch.delenv('COSMOS_VOCAB', raising=False)
    assert run(look, tmp_path, '--out', tmp_path / 'sheet.png') is None
    printed = capsys.readouterr()
    assert re.findall(r'left out   .*0.tar:(\d)', printed.err) == ['2', '3']
    assert Image.open(tmp_path / 'sheet.png').size == (4 * 132 + 4, 3 * 132 + 4)    # views, pairs
    for line in ('reading .*/train; its folder holds', 'left out +2 of 5', r'keys +txt \(100%\), raw_caption \(33%\)',
                 'sentences per pair +least 1, .* most 2',
                 'words per sentence +least 1, .* most 63', 'repeated +1 of 3 images, 0 of 4 sentences',
                 'longer than context +4 of 12 text crops, .* 64 tokens of a vocabulary learned',
                 'row 1 of .*sheet.png: pair 0\n    global', r'row 3 of .*sheet.png: pair 4\n    global  .*Dogs\\ud83d'):
        assert re.search(line, printed.out), line
    monkeypatch.setattr(look, 'LOOKED_AT', 1)
    write_shard(tmp_path / 'bad.tar', members[4:6] + members[:2])       # a broken pair, which is tried, and a whole one
    assert 'none of the 1 pairs that were tried can be used' in run(look, tmp_path / 'bad.tar')


# --- attend ----------------------------------------------------------------------------------------------------------

def speller(config=MICRO, merges=('d o', 'do g</w>')):
    """-> (model, tokenizer, preprocess). The tokenizer reads text nearly byte by byte."""
    tokenizer = data.Tokenizer(merges, config.context_length)
    model = COSMOS(replace(config, vocab_size=tokenizer.vocab_size)).requires_grad_(False)
    return model, tokenizer, evaluation.preprocessing(config.image_size)


def test_attention_words(tmp_path):
    """oracle: the model's own weights. The pieces of a word add up, and start, end and padding are not words."""
    scored = model, tokenizer, preprocess = speller()
    image = Image.effect_mandelbrot((50, 40), (-2, -1, 1, 1), 40)
    grid, words = attend.attention(*scored, image, 'dog ab dog')
    patches, shares = model.attention(preprocess(image)[None], tokenizer(['dog ab dog']))
    _, dog, a, b, last, *_ = shares[0].numpy()
    names, found = zip(*words)
    assert names == ('dog', 'ab', 'dog')
    raw = np.array([dog, a + b, last])
    assert np.allclose(found, raw / raw.max())
    raw = patches.numpy().reshape(4, 4)                 # rows first
    assert np.allclose(grid, (raw - raw.min()) / np.ptp(raw))
    attend.attention_picture(*scored, image, ['dog ab dog'], tmp_path / 'seen.png')
    seen = np.array(Image.open(tmp_path / 'seen.png'))
    y, x = 36 + 56 * np.argwhere(grid == 1)[0]          # the middle of the brightest patch
    assert seen[y, x + 232, 0] > 127                    # the red in yellow, over the image


def test_attend_command(tmp_path, checkpoint):
    """oracle: a row of 232 pixels for each text, and the legend; the sentence that refuses a plain CLIP."""
    out = tmp_path / 'seen.png'
    image = put(tmp_path / 'a.png', picture('PNG'))
    run(attend, checkpoint, '--image', image, '--text', 'a', 'b', '--out', out, '--device', 'cpu')
    assert Image.open(out).size == (872, 2 * 232 + 30)
    plain = speller(replace(MICRO, cross_heads=0))
    args = '--image', image, '--text', 'a', '--out', tmp_path / 'a.jpg', '--device', 'cpu'
    assert 'a.jpg is no PNG; name a file that ends in .png' in run(attend, checkpoint, *args)
    refused('no cross-attention.*--method cosmos', attend.attention_picture, *plain, None, ['a'], out)


# --- export ----------------------------------------------------------------------------------------------------------

def test_export(tmp_path, checkpoint, capsys):
    """oracle: the towers of the model, under open_clip's names; nothing is overwritten. It says what it took, and that
    these heads are not as wide as open_clip's."""
    out = tmp_path / 'clip.pt'
    run(export, checkpoint, out)
    said = capsys.readouterr()
    assert f'export of student of {checkpoint}' in said.out and 'its heads are not 64 wide' in said.err
    model, _, _ = load(checkpoint)
    theirs = torch.load(out)
    assert 'ln_final.weight' in theirs
    state = model.state_dict()
    towers = {name: value for name, value in state.items() if not re.match('read_|image_map|text_map|distill', name)}
    assert_close(from_openclip(theirs), towers, rtol=0, atol=0)
    refused('clip.pt .*exists', export.export, checkpoint, out)
    refused('call the weights clip.pt', export.export, checkpoint, out.with_suffix('.json'))


@torch.no_grad()
def test_quick_gelu_in_and_out(tmp_path, monkeypatch, capsys):
    """oracle: the features of open_clip's own model with random weights, whose activation is OpenAI's. We read its
    state dict with --quick-gelu, and without it the features differ; it reads ours by the two lines that export prints."""
    open_clip = pytest.importorskip('open_clip')
    monkeypatch.setenv('COSMOS_VOCAB', str(shared('vocab', 'bpe_simple_vocab_16e6.txt.gz')))
    theirs = open_clip.create_model('ViT-B-32-quickgelu')
    torch.save(theirs.state_dict(), tmp_path / 'theirs.pt')
    model, tokenizer, _ = load(tmp_path / 'theirs.pt', quick_gelu=True)
    plain, _, _ = load(tmp_path / 'theirs.pt')
    torch.save({'config': asdict(model.config), 'merges': tokenizer.merges, 'student': model.state_dict()},
               tmp_path / 'ours.pt')
    run(export, tmp_path / 'ours.pt', tmp_path / 'back.pt')
    there = {'open_clip': open_clip}
    exec(capsys.readouterr().out, there)
    pair = torch.randn(1, 3, 224, 224), tokenizer(['a dog'])
    out = model(*[[view] for view in pair])
    for other in theirs, there['model']:
        cls, eot, _ = other.eval()(*pair)
        assert_close((out.cls[0], out.eot[0]), (cls, eot), rtol=0, atol=1e-6)
    assert (plain(*[[view] for view in pair]).cls - out.cls).norm() > 1e-3


# --- Pages -----------------------------------------------------------------------------------------------------------

PAGES = [ROOT / 'README.md', ROOT / 'lesson/README.md', *ROOT.glob('docs/*.md')]
FOREIGN = (             # options on our pages that belong to other programs
    # torchrun, Slurm, docker
    '--help --max-restarts --nnodes --nproc_per_node --rdzv_backend --rdzv_endpoint --rdzv_id --signals-to-handle '
    '--standalone --cpus-per-task --format --gpus-per-node --job --job-name --kill-on-bad-exit --nodes --noheader '
    '--ntasks-per-node --open-mode --output --requeue --signal --time --count --shm-size '
    # img2dataset, tar
    '--image_size --input_format --output_folder --output_format --resize_mode --url_col '
    '--url_list --dereference --hard-dereference').split()


def anchors(page):
    """The names that GitHub gives to the headings of a page."""
    text = re.sub('^```.*?^```', '', page.read_text(), flags=re.M | re.S)
    headings = re.findall('^#+ (.*)$', text, re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_scripts_and_options_of_a_page(page):
    """oracle: the files, the headings of the pages, and the options that the sources define; bash, which parses scripts
    but does not run them, because there is no Slurm here."""
    text = page.read_text()
    for script in re.findall('^```bash\n(.*?)^```', text, re.M | re.S):
        subprocess.run(['bash', '-n'], input=script, text=True, check=True)
    for link in re.findall(r'(?:\]\(|src="|href=")(?!http)([^)"\s]+)', text):
        name, _, anchor = link.partition('#')
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor and target.suffix == '.md':
            assert anchor in anchors(target), link
    ours = set(FOREIGN)
    for pattern in '*.py', 'plumbing/*.py', 'extras/*.py', 'lesson/*.py':
        for path in ROOT.glob(pattern):
            ours |= set(re.findall("'(--[a-z0-9-]+)'", path.read_text()))
    for option in re.findall(r'(?<![\w-])--[a-z][\w-]+', text):
        assert option in ours, option


def test_the_search_of_readme(tmp_path, checkpoint, monkeypatch, capsys):
    """oracle: the block of the page as it stands, on three pictures: the cosines of embed_images and embed_texts."""
    text = (ROOT / 'README.md').read_text()
    [block] = [block for block in re.findall('^```python\n(.*?)^```', text, re.M | re.S) if 'topk' in block]
    monkeypatch.chdir(tmp_path)
    put('runs/tiny-cosmos/last.pt', checkpoint.read_bytes())
    for colour in 'red', 'green', 'blue':
        put(f'photographs/{colour}.jpg', picture(colour=colour))
    exec(block, {})
    model, tokenizer, preprocess = load(checkpoint)
    query = evaluation.embed_texts(model, tokenizer, 'a red star')[0]
    expected = []
    for path in sorted(Path('photographs').iterdir()):
        score = (evaluation.embed_images(model, path, preprocess) @ query).item()
        expected.append((score, f'{score:.3f}  {path}'))
    assert capsys.readouterr().out.splitlines() == [line for _, line in sorted(expected, reverse=True)]


# --- report ----------------------------------------------------------------------------------------------------------

HOSTILE = 'a </script><b>red</b> dog'
RECORD = {'captions': [HOSTILE, 'dogs']}


def three_pairs(folder, *images):
    return data.Shards(write_pairs(folder / '0.tar', 3 * f'{json.dumps(RECORD)}\n', *images))


def train_on_three(folder, method='cosmos', val=True, watchers=(report.Report(),)):
    """A run of four steps -> its teacher, as `load` gives it. With val, it evaluates at steps 0, 2 and 4."""
    three_pairs(folder)
    flags = f'--data {folder} --out {folder} --method {method} --preset micro --vocab learn'
    if val:
        flags += f' --val {folder}'
    with pytest.raises(SystemExit, match='0'):
        train.main(f'{flags} --steps 4 --eval-every 2 --batch 2 --workers 0'.split(), watchers)
    return load(folder / 'last.pt')


def runs_on_page(*folders):
    text = report.write(folders).read_text()
    assert text.count('</script>') == 1
    return json.loads(re.search('^const RUNS = (.*);$', text, re.M)[1])


def unpacked(text, *shape):
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), np.int16) / 32767).view(shape)


def test_the_watcher(tmp_path, capsys):
    """oracle: by hand, the steps on the page (without --val the first and the last), the line at the end, and eval.json,
    to which it adds no figures. Runs without it have the same weights, bit for bit."""
    students = []
    for name, options in {'val': {}, 'no val': {'val': False}, 'nobody': {'watchers': ()}}.items():
        folder = tmp_path / name.replace(' ', '-')
        train_on_three(folder, **options)
        students.append(load(folder / 'last.pt', 'student')[0].state_dict())
    assert f'\nreport     {tmp_path}/val/report.html\n' in capsys.readouterr().out
    [page] = runs_on_page(tmp_path / 'val')
    assert [kept['step'] for kept in page['maps']['batch']] == [0, 2, 4]
    assert page['eval'].keys() == {'steps', 'seconds', 'retrieval'}
    [page] = runs_on_page(tmp_path / 'no-val')
    assert [kept['step'] for kept in page['maps']['batch']] == [0, 4]
    for other in students[1:]:
        assert_close(students[0], other, rtol=0, atol=0)


def test_the_step_is_that_of_the_loss(tmp_path):
    """oracle: total_loss on the same pairs, as the loader gives them; for h_I_other and h_T_other the student, given
    other captions and images; its own attention; by hand, cosines, and the tokens of a caption."""
    teacher, tokenizer, _ = train_on_three(tmp_path)
    student, *_ = load(tmp_path / 'last.pt', 'student')
    crops = data.TrainingSet(data.Shards(tmp_path), tokenizer, student.config, 0, data.Counts(2, 2, 2, 2), 'crops')
    batch = data.collate([crops[0, i] for i in range(3)], 1, True)
    images = batch.views(0, 0)
    texts = batch.texts
    with torch.no_grad():
        out = student(images, texts)
        cls_t, eot_t = Teacher(teacher)(images[:2], batch.teacher_texts)
        loss, terms = total_loss(student, out, cls_t, eot_t)
        expected = out._asdict() | {'cls_t': cls_t, 'eot_t': eot_t}
        expected['h_I_other'] = student(images, [ids.roll(1, 0) for ids in texts]).h_I
        expected['h_T_other'] = student([view.roll(1, 0) for view in images], texts).h_T
        patches, _ = student.attention(images[0], texts[3])
        _, words = student.attention(images[2], texts[0])
    [page] = runs_on_page(tmp_path)
    kept = page['maps']['batch'][-1]
    vectors = {}
    for name, x in expected.items():
        vectors[name] = unpacked(kept['vectors'][name], *x.shape)
        assert_close(vectors[name], x.double(), rtol=0, atol=1e-4)
    assert_close(unpacked(kept['weights']['C_I'], 4, 3, 16)[3], patches.double(), rtol=0, atol=1e-4)
    assert_close(unpacked(kept['weights']['C_T'], 4, 3, 12)[2], words.double(), rtol=0, atol=1e-4)
    length = student.encode_image(images[3])[0].norm(dim=1).tolist()
    assert kept['lengths']['cls'][3] == pytest.approx(length, abs=1e-4)
    for name, term in terms.items():
        assert kept['figures'][name]['loss'] == pytest.approx(term.item(), abs=1e-4)
    cosines = torch.stack([a @ b.T for a, b in itertools.product(vectors['cls'][:2], vectors['eot'])])
    own = cosines.diagonal(dim1=1, dim2=2)
    assert [kept['figures']['clip'][name] for name in ('mean', 'own')] == pytest.approx(
        [cosines.mean().item(), own.mean().item()], abs=1e-4)
    pair = page['maps']['start']['pairs'][1]
    spelled = ''.join(pair['tokens']).replace('</w>', ' ')
    words = ' '.join(tokenizer.split(pair['captions'][0]))
    assert spelled.startswith('<start_of_text>') and words.startswith(spelled[15:].partition('<end')[0])


def test_partial_runs_give_a_page(tmp_path):
    """oracle: TrainingSet itself; by hand, what the page has of a killed run in which a pair is broken and files are
    torn."""
    model, tokenizer, _ = speller()
    crops = data.TrainingSet(three_pairs(tmp_path, b'no image'), tokenizer, MICRO, seed=0)
    started = SimpleNamespace(train_set=crops, folder=tmp_path, step=0, student=model, teacher=None,
                              method=train.METHODS['clip']._replace(terms=train.terms_of()),
                              processes=SimpleNamespace(device=torch.device('cpu')))
    report.Report().begin(started)
    put(tmp_path / 'config.json', 'torn')
    put(tmp_path / 'log.jsonl', '{"step": 9, "a": 1}\n{"step": 3}\n{"step": 9, "a": 2}\n{"step": 9, "b": NaN}\n{"st')
    [killed] = runs_on_page(tmp_path)
    second, third = killed['maps']['start']['pairs']
    drawn = crops.sample(0, 2)
    assert third['captions'] == drawn.captions != second['captions'] and third['boxes'][7] == list(drawn.boxes[7])
    # If a step was logged twice, the last entry counts, and adds to what was logged before.
    assert str(killed['log']) == "[{'step': 3}, {'step': 9, 'a': 2, 'b': nan}]"
    assert 'missing' in killed['config'] and 'missing' in killed['eval']
    whole = (tmp_path / 'maps.jsonl').read_bytes()
    put(tmp_path / 'maps.jsonl', whole + whole[:500])           # the last line is torn
    assert runs_on_page(tmp_path)[0]['maps'] == killed['maps']
    started.step = 1
    report.Report().begin(started)                              # a resumed run cuts it off
    assert (tmp_path / 'maps.jsonl').read_bytes().startswith(whole + b'{"part": "start"')
    refused('absent holds no run', report.write, [tmp_path / 'absent'])


# Clicks through the page: every screen at every evaluation, then the switch. It collects the values of the page and of
# Python.
CLICKS = """<script>{
    const seen = {screens: [], checks: []};
    const press = key => document.querySelector(`[data-key="${key}"]`).click();
    const note = () => seen.checks.push(...[...document.querySelectorAll('output.check')].map(
        ({dataset}) => [Number(dataset.page), Number(dataset.python)]));
    for (const key of [...document.querySelectorAll('nav button')].map(button => button.dataset.key)) {
        seen.screens.push(key.slice(-1));
        press(key);
        for (const at of [0, 1, 2]) {
            const slider = document.getElementById('evaluation');
            slider.value = at;
            slider.dispatchEvent(new Event('input'));
            note();
        }
        for (const reading of key === 'screen 6' ? ['own', 'other', 'nothing', 'across'] : []) {
            press(`reading ${reading}`);
            note();
        }
    }
    document.body.append(element('pre', {id: 'seen'}, JSON.stringify(seen)));
}</script></body>"""


@pytest.mark.skipif(not shutil.which('chromium'), reason='chromium is not installed')
@pytest.mark.parametrize('method, screens', [('across', '01234567'), ('clip', '01237')])
def test_the_page_in_a_browser(tmp_path, method, screens):
    """oracle: Chromium, whose console stays silent; Python's values, to 1e-3, on each screen, at each evaluation and in
    each position of the switch. Captions are text, never markup."""
    train_on_three(tmp_path, method)
    page = report.write([tmp_path])
    copy = put(tmp_path / 'page.html', page.read_text().replace('</body>', CLICKS))
    command = ['chromium', '--headless', '--no-sandbox', '--enable-logging=stderr', '--dump-dom', copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert 'CONSOLE' not in done.stderr
    seen = json.loads(html.unescape(re.search('<pre id="seen">(.*?)</pre>', done.stdout)[1]))
    assert ''.join(seen['screens']) == screens and len(seen['checks']) > 20
    for of_page, of_python in seen['checks']:
        assert of_page == pytest.approx(of_python, abs=1e-3)
    built = done.stdout.partition('<script>')[0]
    assert '&lt;b&gt;red' in built and '<b>red' not in built
