"""What plumbing/ promises, and how mistakes and bugs end. Each docstring names its oracle."""
import gzip
import hashlib
import importlib
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import MagicMock, Mock, call

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import data
import eval as evaluation
import train
from cosmos import CrossAttention
from data import Counts, TrainingSet, Shards, Tokenizer
from plumbing import processes, runs, tokenizer
from plumbing.captions import caption_pool, record_of, sentences
from plumbing.errors import Unreadable
from plumbing.images import decode, read_header, load_image
from plumbing.shards import find_shards, tar_members, write_shard
from plumbing.tables import rows_of_json
from tests.helpers import MICRO, ROOT, dog_tar, encoded, pairs_tar, put, refused, run, shared, write_tar

# --- Imports ---------------------------------------------------------------------------------------------------------

IMPORTS = '''
import os, resource, signal, sys, warnings
os.environ.pop('OMP_WAIT_POLICY', None)
import torch.distributed, torch.utils.checkpoint, torchvision.transforms.v2, tqdm.contrib.concurrent
names = [getattr(resource, name) for name in dir(resource) if name.startswith('RLIMIT')]
def state(limit=resource.getrlimit):
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    return dict(os.environ), [limit(name) for name in names], warnings.filters[:], handlers
before = state()
for name in 'fcntl', 'resource':
    sys.modules[name] = None
for name in 'SIGUSR1', 'SIGCHLD', 'SIGKILL', 'SIGHUP', 'SIGALRM':
    delattr(signal, name)
del os.sched_getaffinity
import cosmos, data, eval, train
assert state() == before
'''


def test_imports_change_nothing_and_need_nothing_of_unix():
    """oracle: limits, warning filters and signals as they were; the status, without what Windows lacks."""
    subprocess.run([sys.executable, '-c', IMPORTS], cwd=ROOT, check=True)


# --- Programs: the four files, bugs, mistakes ------------------------------------------------------------------------

def test_the_four_files_and_plumbing_are_enough(tmp_path, monkeypatch):
    """oracle: the exit status and words of training and evaluation in a folder that has only these files."""
    dog_tar(tmp_path / 'dogs.tar', 9)
    folder = tmp_path / 'alone'
    shutil.copytree(ROOT / 'plumbing', folder / 'plumbing')
    for name in 'cosmos', 'data', 'eval', 'train':
        shutil.copy(ROOT / f'{name}.py', folder)
    for command in (
            'train.py --preset tiny --steps 2 --batch 4 --workers 1 --data ../dogs.tar --val ../dogs.tar --out out',
            'eval.py retrieval out --shards ../dogs.tar'):
        done = subprocess.run([sys.executable, *command.split()], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0 and 'R@1' in done.stdout, done.stderr
    monkeypatch.chdir(tmp_path)                         # because the folder of the project may hold runs
    assert re.match('error: without --data only train.py itself trains.*; give shards with --data', run(train))


def test_every_command_has_help(capsys):
    """oracle: a usage for --help, and a sentence for an unknown option, from every file that is a program."""
    modules = [train, evaluation]
    for path in [*ROOT.glob('lesson/*.py'), *ROOT.glob('extras/*.py')]:
        if '__main__' in path.read_text():
            modules.append(importlib.import_module(f'{path.parent.name}.{path.stem}'))
    for module in modules:
        assert run(module, '--help') == 0
        assert 'usage: ' in capsys.readouterr().out
        assert run(module, '--colours').startswith('error: ')


@pytest.mark.parametrize('place, name, error', [
    (data, 'text_crops', NameError), (data, 'collate', IndexError),                                     # in a worker
    (CrossAttention, 'forward', ValueError), (evaluation, 'target_ranks', OSError)])
def test_a_bug_shows_its_place(monkeypatch, tmp_path, place, name, error):
    """oracle: the last place that is named, also of a bug in a loader's worker, and the error at the end."""
    def spoilt(*args, **options):
        raise error('a bug')

    monkeypatch.setattr(place, name, spoilt)
    dogs = dog_tar(tmp_path / 'dogs.tar', 9)
    flags = f'--preset micro --steps 2 --batch 4 --workers 1 --eval-every 1 --device cpu --out {tmp_path}/out'
    said = run(train, '--data', dogs, '--val', dogs, *flags.split())
    assert re.findall(', in (.+)', said)[-1] == 'spoilt'
    assert said.rstrip().endswith(f'{error.__name__}: a bug')


REFUSED = {         # flags: what their sentence must say
    '--step 3': 'arguments: --step 3; see prog --help',
    '--batch 64': '--batch 64 .* 30 pairs; lower --batch',
    '--data broken.tar': 'broken.tar:1.png .*its image cannot be read as an image',
    '--data empty/page': 'page: no readable tar of images',
    '--batch 9 --accum 2': '--batch 9 cannot be cut into 2 parts',
    '--data wordless.tar': 'wordless.tar.*no usable caption .*--caption-keys',
    '--vocab empty/page': 'page is not CLIP[^;]*; perhaps a .*page.; give the file at .* --vocab learn',
    '--quick-gelu': '--quick-gelu says how .*; give --init, too',
    '--caption-keys raw_caption': 'none of the first 20 pairs .*no usable caption under the keys caption.; name the captions with --caption-keys'}


@pytest.mark.parametrize('line', REFUSED)
def test_what_a_user_can_mend_is_one_sentence(monkeypatch, tmp_path, line):
    """oracle: status 1 and one line with the value, the place and the remedy. Nothing is written."""
    monkeypatch.chdir(tmp_path)
    dog_tar('dogs.tar', 30)
    dog_tar('broken.tar', 2, broken=[0, 1])
    pairs_tar('wordless.tar', [{'number': 5}])
    put('empty/page', '<html>')
    flags = f'--data dogs.tar --preset micro --batch 4 --device cpu --out out {line}'
    assert re.fullmatch(f'error: .*{REFUSED[line]}.*', run(train, *flags.split()))
    assert not Path('out').exists()


NUMBERS = {             # which of the numbers below are taken: by these options of train.py
    '1': 'steps batch accum log-every',
    '0 1': 'workers local-crops local-captions warmup momentum-ramp seed save-every eval-every',
    '0 0.5 1': 'lr-end momentum',
    '0 0.5 1 1.5': 'lr wd clip-grad save-minutes',
    '0.5 1 1.5': 'epochs'}


def test_numbers_of_options():
    """oracle: the table. Anything else gives argparse's error."""
    for taken, names in NUMBERS.items():
        for name, text in itertools.product(names.split(), '0 0.5 1 -4 1.5 banana nan inf'.split()):
            flags = [f'--{name}', text]
            if text in taken.split():
                given, typed = train.read_options(flags)
                assert given[name.replace('-', '_')] == typed[name.replace('-', '_')] == float(text)
            else:
                refused(f'argument --{name}: {text} is not a .*number.*; see', train.read_options, flags)
    assert train.read_options([f'--seed={2 ** 64 - 1}'])[0]['seed'] == 2 ** 64 - 1      # the largest that torch takes


def test_a_best_is_a_run(tmp_path):
    """oracle: the rule for a folder without last.pt: a best.pt is a run, unless it is train.py's and of step 0."""
    best = tmp_path / 'best.pt'
    for resume in False, True:
        assert runs.read_last(tmp_path, resume) == {}
        torch.save({'step': 0, 'score': 0.0}, best)
        assert runs.read_last(tmp_path, resume) == {}
        for state in {'step': 1, 'score': 0.0}, {'step': 0}:            # the second was imported
            torch.save(state, best)
            refused(f'{tmp_path} holds a best.pt but no last.pt', runs.read_last, tmp_path, resume)
        best.unlink()
    put(best, 'broken')                 # and yet somebody's
    refused('best.pt is not a checkpoint', runs.read_last, tmp_path, False)


@pytest.mark.parametrize('rank, lived, status', [
    ({}, 'wait first', 143),                       # 128 + SIGTERM
    ({'RANK': '0'}, 'wait first second', 0)])
def test_a_second_signal_ends_at_once(monkeypatch, capfd, rank, lived, status):
    """oracle: the lines before the end, one for the first signal. torchrun's second signal is ignored."""
    def signalled():
        with processes.signals_caught() as caught:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert caught == [signal.SIGUSR1]
            os.write(2, b'first')
            os.kill(os.getpid(), signal.SIGTERM)
            os.write(2, b'second')

    monkeypatch.setattr(os, 'environ', os.environ | rank)
    process = get_context('fork').Process(target=signalled)
    process.start()
    process.join()
    found = re.findall('wait(?=ing for the end of this step)|first|second', capfd.readouterr().err)
    assert found == lived.split() and process.exitcode == status


# --- Shards ----------------------------------------------------------------------------------------------------------

def test_paths_and_their_lines(tmp_path, capsys):
    """oracle: the files that were written, and which of them a path names."""
    for name in '08', '09', '11', 'a[1]', 'halves/train/t', 'halves/val/v':
        put(tmp_path / f'{name}.tar')

    def found(*paths, split=None):
        tars = find_shards([f'{tmp_path}/{path}' for path in paths], split)
        lines = capsys.readouterr()
        return ' '.join(Path(tar).stem for tar in tars), lines.out + lines.err

    assert found('') == ('08 09 11 a[1]', '')
    assert found('0*.tar', 'a[1].tar') == ('08 09 a[1]', '')
    names, lines = found('09.tar', '', '18.tar', '19.tar')
    assert names == '08 09 11 a[1]'
    assert f'2 of 7 shards are missing, the first is {tmp_path}/18.tar' in lines
    assert '1 shards are named twice' in lines
    line = f'data       reading {tmp_path}/halves/val; its folder holds train/ and val/\n'
    assert found('halves', split='val') == ('v', line)
    refused("halves' does not exist or holds no .tar file; give tars, or folders of them", found, 'halves')


def test_tars_of_every_format(tmp_path, capsys):
    """oracle: the pairs and names as written, read through a saved index, and of over 16 shards by processes. Pairs
    with a dot in their name are counted; a mask is no half of a pair."""
    jpg = encoded(Image.new('RGB', (40, 32)), 'JPEG')
    long = 'folder' * 15 + '/' + 'name' * 15        # over 100 characters: GNU and PAX add a header
    members = [
        ('x/b.json', {'caption': 'json', 'file': 'my cat.jpg'}), ('x/b.JPG', jpg), ('x/b.png', b'2nd'),
        ('x/a.txt', b't'), ('x/a.mask.png', b'mask'), ('x/a.jpeg', jpg), (f'{long}.webp', jpg),
        (f'{long}.txt', b'long'), ('x/alone.jpg', jpg), ('c.v1.PNG', jpg), ('c.v1.txt', b''), ('d.v2.jpg', jpg),
        ('d.v2.json', {}), ('._x.jpg', b'of macOS'), ('._x.json', b'of macOS')]
    for form in range(3):                               # USTAR, GNU, PAX
        write_tar(tmp_path / f'{form}.tar', members, form)
    shards = Shards(tmp_path)
    assert '0.tar has 2 pairs with a dot in their name, such as c.v1, which are left' in capsys.readouterr().err
    Shards(tmp_path, index=tmp_path / 'index.npy').save()
    found = Shards(tmp_path, index=tmp_path / 'index.npy')
    assert isinstance(found.index, np.memmap) and found.index.shape == (9, 7)
    for i in range(9):
        assert found.pool(i) == [['json', 't', 'long'][i % 3]]
        assert found.image(i) == jpg
    assert found.name(0).endswith('0.tar:x/b.JPG (my cat.jpg)')
    assert found.name(1).endswith('0.tar:x/a.jpeg')
    shutil.copytree(tmp_path, tmp_path / 'moved')
    assert Shards(tmp_path / 'moved').fingerprint == shards.fingerprint
    many = [dog_tar(tmp_path / f'many{n:02d}.tar', 2) for n in range(20)]
    assert Shards(many).index[:, 0].tolist() == sorted([*range(20)] * 2)


def test_what_makes_a_pair(tmp_path, capsys):
    """oracle: the pairs that were written. Two joined tars have pairs of equal names; each has half a pair x, and half
    a pair whose other half is a link."""
    raw = b''
    images = encoded(Image.new('RGB', (9, 9))), b'another'
    path = tmp_path / 'a.tar'
    for i, (alone, kind) in enumerate([('x.jpg', tarfile.LNKTYPE), ('x.json', tarfile.SYMTYPE)]):
        members = [('0.png', images[i]), ('0.json', [f'dog {i}']), ('1.txt', b'cat')]
        members.insert(3 * i, (alone, images[0]))       # before them, behind them: both 0 are neighbours
        write_tar(path, members)
        with tarfile.open(path, 'a') as tar:
            for name in '1.png', 'notes':
                info = tarfile.TarInfo(name)
                info.type = kind
                info.linkname = '0.png'
                tar.addfile(info)
        raw += path.read_bytes()
    shards = Shards(put(path, raw))
    assert [shards.pair(i) for i in range(len(shards))] == [(['dog 0'], images[0]), (['dog 1'], images[1])]
    [line] = capsys.readouterr().err.splitlines()
    assert 'a.tar has 2 pairs; 6 links and incomplete pairs are left out' in line


def test_damaged_shards_give_what_tarfile_reads(tmp_path, capsys):
    """oracle: which of five pairs are left by damage to the third. tarfile steps over a broken header in USTAR; in PAX,
    where it is the second of two, it stops there. Joined tars give the pairs of both."""
    image = encoded(Image.new('RGB', (9, 9)))
    joined = write_tar(tmp_path / 'b.tar', [('5.png', image), ('5.json', ['dog 5'])]).read_bytes()
    noise = random.Random(0).randbytes(512)

    def check(value, left):
        path.write_bytes(value)
        shards = Shards(path)
        found = [shards.pool(i)[0] for i in range(len(shards))]
        assert found == [f'dog {i}' for i in left]
        stopped = 'a.tar is damaged after byte ' in capsys.readouterr().err
        assert stopped == (left == '01')

    for form, stepped_over in (tarfile.USTAR_FORMAT, '0134'), (tarfile.PAX_FORMAT, '01'):
        path = dog_tar(tmp_path / 'a.tar', 5, form)
        raw = path.read_bytes()
        with tarfile.open(path) as tar:
            info, text = tar.getmembers()[4:6]
        start = info.offset_data - 512
        check(raw[:start + 100], '01')
        check(raw[:text.offset_data + 5], '01')
        check(raw + joined, '012345')
        check(raw[:start] + noise + raw[start + 512:], stepped_over)
    assert len(Shards(put(path, raw[:text.offset_data + text.size]))) == 3      # cut off just behind a member
    path.write_bytes(raw[:600])                         # the first member is cut off
    refused('no readable tar', Shards, path)
    assert 'a.tar is damaged after byte 0, or is not a tar; only what could be read is used' in capsys.readouterr().err


def test_a_hole_in_a_tar_is_said(tmp_path, capsys):
    """oracle: one byte of a header in the middle, after which tarfile goes on with the next member."""
    path = put(tmp_path / 'a.tar', b'')
    members = [(f'{i}.{kind}', b'x' * 700) for i in range(4) for kind in ('jpg', 'txt')]
    write_shard(path, members)
    assert len(list(tar_members(path))) == 8 and not capsys.readouterr().err
    data = path.read_bytes()
    put(path, data.replace(b'2.jpg', b'3.jpg'))
    assert len(list(tar_members(path))) == 7
    assert 'is damaged: 1,536 bytes between its members' in capsys.readouterr().err


def test_a_pair_costs_its_bytes(tmp_path, monkeypatch):
    """oracle: how a tar is opened: once for all its headers, and once for a pair, with a buffer of at most 512 bytes.
    On NFS a buffer of no set size has 1 MB, and each read fills it."""
    path = dog_tar(tmp_path / 'a.tar', 2)
    opened = Mock(wraps=open)
    monkeypatch.setattr('builtins.open', opened)
    shards = Shards(path)
    assert opened.call_args_list[0] == call(str(path), 'rb', buffering=0)
    opened.reset_mock()
    shards.pair(1)
    opened.assert_called_once_with(str(path), 'rb', buffering=512)


def test_misspelt_caption_keys_are_said(tmp_path, capsys):
    """oracle: the line, and none for a key that only some pairs have."""
    records = [{'caption': 'a dog'}, {'caption': 'an ox', 'alt': 'x'}]
    tar = pairs_tar(tmp_path / 'a.tar', records, 2 * [encoded(Image.new('RGB', (9, 9)))])
    Shards(tar, 'alt,caption')
    assert capsys.readouterr().err == ''
    Shards(tar, 'captoin,caption')
    line = 'none of the first 2 pairs has the key captoin of --caption-keys; they have alt, caption\n'
    assert line in capsys.readouterr().err


def test_which_index_is_used(tmp_path, capsys, monkeypatch):
    """oracle: a fresh reading. With the index of the same shards no header is read again; a damaged one is made anew,
    with a line. A tar of the same name and size whose members lie elsewhere is read again, and so is a copy, whose
    times differ: they have indexes of their own. The fingerprint of the copy stays."""
    path = tmp_path / 'index.npy'
    tar = dog_tar(tmp_path / 'a.tar', 11)
    before = Shards(tar, index=path)
    before.save()
    [file] = tmp_path.glob('index-*.npy')
    whole = file.read_bytes()
    np.save(tmp_path / 'flat.npy', before.index.ravel())
    for content in (tmp_path / 'flat.npy').read_bytes(), whole[:-8], whole[:50], b'text', b'':
        put(file, content)
        found = Shards(tar, index=path)
        assert f'{file} is damaged, so headers are read again' in capsys.readouterr().out
        assert np.array_equal(found.index, before.index)
        found.save()
        assert file.read_bytes() == whole
    with monkeypatch.context() as patch:
        patch.setattr('plumbing.shards.scan_shard', None)
        assert np.array_equal(Shards(tar, index=path).index, before.index)
    size = tar.stat().st_size
    records = [{'caption': ['x' * 900, 'dog'][min(i, 1)]} for i in range(11)]
    pairs_tar(tar, records, [encoded(Image.new('RGB', (40, 30)))] * 11)
    assert tar.stat().st_size == size
    after = Shards(tar, index=path)
    assert after.pool(10) == ['dog'] and after.fingerprint != before.fingerprint
    assert after.index.tolist() != before.index.tolist()
    copy = Path(shutil.copy(tar, tmp_path / 'elsewhere.tar')).rename(put(tmp_path / 'copy/a.tar'))
    copied = Shards(copy, index=path)
    assert np.array_equal(copied.index, after.index) and copied.fingerprint == after.fingerprint
    assert len({shards.file for shards in (before, after, copied)}) == 3


def test_sets_of_one_shape_are_told_apart(tmp_path):
    """oracle: the pictures. The tars agree in name, size, and the places of all pairs, because PNGs that are not
    compressed are all of one size."""
    sets = []
    for seed in 0, 1:
        image = encoded(Image.fromarray(np.random.default_rng(seed).integers(256, size=(40, 30, 3), dtype=np.uint8)),
                        compress_level=0)
        (tmp_path / f'{seed}').mkdir()
        sets.append(Shards(pairs_tar(tmp_path / f'{seed}/a.tar', 3 * [{'caption': 'a dog'}], 3 * [image])))
    first, second = sets
    assert np.array_equal(first.index, second.index) and first.sizes == second.sizes
    assert first.fingerprint != second.fingerprint


def test_what_cannot_be_read_in_mid_run_is_replaced(tmp_path, capsys, monkeypatch):
    """oracle: the pairs that are left by a disk that fails once, and by a tar that is cut off. The pair is named."""
    tar = dog_tar(tmp_path / 'a.tar', 12)
    shards = Shards(tar)
    crops = TrainingSet(shards, list, MICRO, 3, Counts(1, 0, 0, 1))   # one image and one caption per pair

    def stumbling(*where, **settings):
        monkeypatch.undo()                              # so it stumbles once
        raise OSError('stumbled')

    monkeypatch.setattr('builtins.open', stumbling)
    sample = crops[0, 4]
    assert sample.bad_pairs == 1 and sample.ids != ['dog 4']
    os.truncate(tar, shards.index[2, 3] + 3)            # within the json of pair 2
    sample = crops[0, 11]
    assert sample.ids in (['dog 0'], ['dog 1']) and sample.bad_pairs > 0
    assert f'a.tar:byte {shards.index[11, 1]}: {tar} has been cut off' in capsys.readouterr().err


# --- Captions and tokenizer ------------------------------------------------------------------------------------------

BOAT = ['a boat', 'A 3.5 m boat', 'Two men', 'A lake']
LOW = Tokenizer(['l o', 'lo w</w>', 'lo w', 'e r</w>', 'e s', 'es t</w>', 'low est</w>'], 8)


@pytest.mark.parametrize('text, expected', [
    ('a dog, e.g. a puppy', ['a dog, e.g. a puppy']),
    ('A 3.5 m boat. Two men.', ['A 3.5 m boat', 'Two men']),
    ('at 3 p.m. we left', ['at 3 p.m. we left']),
    ('We met the U.S. Army. J. Smith\nleft</s> ', ['We met the U.S. Army', 'J. Smith', 'left']),
    ('a.jpg is. 1. B', ['a.jpg is', '1', 'B']),
    ("the dog's. It’s. 'J. Smith'. É. Zola. .", ["the dog's", 'It’s', "'J. Smith'", 'É. Zola'])])
def test_sentences_by_hand(text, expected):
    """oracle: by hand. A sentence ends at a full stop before white space, unless that stop follows a single letter."""
    assert sentences(text) == expected


@pytest.mark.parametrize('record, pool', [
    ({'raw_caption': 'a boat', 'longSV_captions': 'A 3.5 m boat. Two men\nA lake</s>'}, BOAT),
    ({'raw_caption': 'a boat', 'longSV_captions': [*BOAT[1:], 'One. Two.\n'], 'caption': 'x'},
     [*BOAT, 'One. Two.']),
    ({'raw_caption': ['a scarf , laughing .', 'a dog.'], 'longSV_captions': 'a hat , red .'},
     ['a scarf , laughing', 'a dog.', 'a hat , red']),
    ({'original_caption': "St. Mary's Church", 'caption': 'One. Two.'}, ["St. Mary's Church", 'One', 'Two']),
    ({'captions': ['one dog.', 'two. three'], 'caption': 'no'}, ['one dog', 'two', 'three']),
    ({'caption': 'one dog', 'txt': 'no'}, ['one dog']),
    ({'caption': None, 'txt': 'one dog'}, ['one dog']),
    ({'caption': [None, 7, ''], 'alt': 'one dog'}, [])])
def test_captions_of_every_format(record, pool):
    """oracle: pools written by hand. PixelProse's original caption and DreamLIP's lists pass whole, as released."""
    assert caption_pool(record) == pool
    assert caption_pool(record, list(record)[:2])[:len(pool)] == pool


def test_odd_bytes_of_records_and_rows():
    """oracle: by hand. A .txt in Latin-1, a NaN in a table."""
    refused('its json or .txt cannot be read', record_of, b'', b'a caf\xe9', kind=Unreadable)
    assert rows_of_json('[{"a": NaN}]') == [{'a': None}]


def test_tokenizer_equals_clip():
    """oracle: the ids that CLIP's own tokenizer gives 35 hard texts, recorded in golden/tokenizer.json."""
    clip = Tokenizer.clip(shared('vocab', 'bpe_simple_vocab_16e6.txt.gz'))
    for text, ids, padded in json.loads(shared('golden', 'tokenizer.json').read_text()):
        assert [49406, *clip.encode(text), 49407] == ids, text
        assert clip([text]).tolist() == [padded]


def test_the_vocabulary_is_fetched_once(tmp_path, monkeypatch):
    """oracle: the merges in a file. With a wrong digest they are not kept; with the right one they outlive the file."""
    file = put(tmp_path / 'vocab.gz', gzip.compress(b'header\nl o\nlo w</w>'))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.delenv('COSMOS_VOCAB', raising=False)
    monkeypatch.setattr('plumbing.tokenizer.VOCAB_URL', file.as_uri())
    refused('cannot be fetched .*on a login node as .*--vocab PATH or COSMOS_VOCAB.*--vocab learn', Tokenizer.clip)
    monkeypatch.setattr('plumbing.tokenizer.VOCAB_SHA256', hashlib.sha256(file.read_bytes()).hexdigest())
    for _ in range(2):
        assert Tokenizer.clip().merges == ['l o', 'lo w</w>']
        file.unlink(missing_ok=True)


def test_ids_and_words_by_hand():
    """oracle: by hand. Rank 1, 'lo w</w>', ends low, and rank 2, 'lo w', starts the others. Cut rows keep their end."""
    assert LOW.encode('low lower lowest') == [513, 514, 515, 518]       # 512 + the line of each merge
    assert LOW.encode('!l')[0] == 256                   # '!' is byte symbol 0, and 256 + 0 if it closes a word
    assert LOW('low ' * 20).tolist() == [[519] + 6 * [513] + [520]]
    assert LOW('low').tolist() == [[519, 513, 520, 0, 0, 0, 0, 0]]
    text = 'x²+Ⅷ①_é\'S “ﬁn” ＡＢ&amp;lt;\x07 \ud800'
    assert Tokenizer.split(text) == "x ² + ⅷ ① _ é 's \" fin \" ab < \ufffd".split()
    # ftfy leaves entities alone in a text that has a '<', so CLIP, which decodes them afterwards, keeps the quotes that
    # ftfy makes straight in other texts.
    assert Tokenizer.split('it&rsquo;s') == ['it', "'s"]
    assert Tokenizer.split('it&rsquo;s <3 m&sup2;') == 'it ’ s < 3 m ²'.split()


def test_a_megabyte_of_text_is_encoded_soon():
    """oracle: the ids of the words, one by one; of text without a full stop, one sentence. A pattern that starts again
    at each letter would take hours."""
    for part in 'x', 'J. ':
        text = part * (10**6 // len(part)) + 'x'
        assert sentences(text) == [text]
    clip = Tokenizer.clip(shared('vocab', 'bpe_simple_vocab_16e6.txt.gz'))
    begun = time.process_time()
    assert clip.encode('a dog ' * 150_000) == [*clip.encode('a dog')] * 150_000
    assert time.process_time() - begun < 10
    assert clip.split('a' + 999_999 * '-') == ['a', 5000 * '-']


def test_learn_by_hand(monkeypatch):
    """oracle: by hand. 'l o' and 'w e' come three times, and of equal pairs the first one met is merged first. Pairs
    are spread over the set. The numbers are recorded, because if they move, every run is another one."""
    learned = Tokenizer.learn(['low low lower', 'newest newest'], 600)
    assert learned.merges == ['l o', 'w e', 'lo w</w>', 'n e', 'ne we', 'newe s', 'newes t</w>']
    assert learned.encode('lowest') == [512, 513, 82, 256 + 83]        # lo, we, s, t at the end: '!' is 0
    assert len(Tokenizer.learn(['low low'], 515, 9).merges) == 1        # 512 bytes, start and end
    assert Tokenizer.learn(['low low'], 515, 9).context_length == 9
    assert {learned.context_length, Tokenizer([]).context_length} == {77}
    assert [tokenizer.LEARN_FROM, tokenizer.LEARNED_VOCAB, tokenizer.PAIRS_TO_LEARN] == [5000, 8192, 20_000]
    monkeypatch.setattr(tokenizer, 'PAIRS_TO_LEARN', 2)
    for pairs, read in (3, [0, 1, 2]), (5, [0, 2, 4]):
        shards = MagicMock(**{'__len__.return_value': pairs, 'pool.return_value': ['a dog']})
        tokenizer.learn_merges(shards)
        assert [place for [place], _ in shards.pool.call_args_list] == read


# --- Images ----------------------------------------------------------------------------------------------------------

MANDELBROT = Image.effect_mandelbrot((60, 40), (-2, -1, 1, 1), 40).convert('RGB')
HEAD = b'Exif\0\0MM\0*\0\0\0\10\0\1'                 # of EXIF with one entry: its tag, type, count and value follow
PLAIN_EXIF = [HEAD + struct.pack('>HHLHHL', 0x112, 3, 1, orientation, 0, 0) for orientation in range(9)]
EXIF = [                                # an orientation, and EXIF that means it
    *enumerate(PLAIN_EXIF),
    (1, HEAD + struct.pack('>HHL4sL', 0x112, 2, 2, b'6', 0)),           # a text
    (1, PLAIN_EXIF[6][:12]),
    (1, b'Exif\0\0no TIFF')]


def decoded(file):
    """The image as training's reader gives it, at full size."""
    image, turn, size = read_header(file)
    pixels = decode(image, turn).permute(1, 2, 0).numpy()
    assert size == pixels.shape[:2]
    return pixels


@pytest.mark.parametrize('orientation, odd', EXIF, ids=range(len(EXIF)))
@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP'])
def test_every_orientation_and_odd_exif(kind, orientation, odd):
    """oracle: Pillow's ImageOps.exif_transpose, if the EXIF is plain, by every reader; an image that is read twice is
    turned once. EXIF that cannot be read turns nothing."""
    file = encoded(MANDELBROT, kind, exif=odd)
    plain = encoded(MANDELBROT, kind, exif=PLAIN_EXIF[orientation])
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(plain))).convert('RGB')
    assert np.array_equal(decoded(file), wanted)
    assert np.array_equal(load_image(file), wanted)
    for image in Image.open(io.BytesIO(file)), load_image(file):
        [seen] = evaluation.Images([image], np.asarray)
        assert np.array_equal(seen, wanted)


NO_IMAGES = [                           # bytes, and Pillow's words (ours for PostScript)
    # Pillow would hand this to Ghostscript
    (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n', 'PostScript, a program'),
    (encoded(Image.new('1', (300, 300))), 'decompression bomb'),
    (encoded(Image.effect_noise((99, 99), 50), 'JPEG')[:-200], 'image file is truncated'),
    (encoded(Image.new('F', (3, 3)), 'TIFF'), 'it has over 8 bits a channel; save it with 8'),
    (encoded(Image.new('I;16', (3, 3))), 'it has over 8 bits a channel; save it with 8'),
    (b'<html>', 'cannot identify')]


@pytest.mark.parametrize('data, words', NO_IMAGES, ids=range(len(NO_IMAGES)))
def test_what_cannot_be_decoded_is_unreadable(monkeypatch, tmp_path, data, words):
    """oracle: the rule for errors, for training's reader and evaluation's."""
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 40_000)              # Pillow's own limit
    for read, source in (load_image, data), (load_image, put(tmp_path / 'a.jpg', data)), (decoded, data):
        refused(f'(its image|a.jpg) cannot be read as an image .*{words}', read, source)
