"""Pairs in, batches of views out: shards, captions, tokenizer, text crops, image crops, loader.

A shard is a tar as img2dataset writes it. Members that share a stem are one pair:

    000000017.jpg     jpg, jpeg, png or webp
    000000017.json    {"raw_caption": "...", "shortIB_captions": ["...", "..."], ...}; see CAPTION_KEYS
    000000017.txt     the caption alone; used where the json has none

Every random choice for a sample comes from (seed, epoch, index of the pair), and the order of the pairs from
(seed, epoch). So a run sees the same numbers with any number of workers and GPUs, and goes on from any step.
"""
import argparse
import contextlib
import difflib
import functools
import glob
import gzip
import hashlib
import html
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import tarfile
import textwrap
import traceback
import unicodedata
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageOps
from torchvision.transforms import v2
from torchvision.utils import make_grid
from tqdm import tqdm

# --- 1. Shards: every header is read once, then any pair is one read away --------------------------------------------

PAIR = np.dtype([               # where the members of a pair lie in its shard: offsets and sizes in bytes
    ('shard', '<i4'),
    ('image', '<i8'), ('image_size', '<i4'),
    ('json', '<i8'), ('json_size', '<i4'),
    ('txt', '<i8'), ('txt_size', '<i4'),
    ('mask', '<i8'), ('mask_size', '<i4'),
])
ROLES = {'jpg': 'image', 'jpeg': 'image', 'png': 'image', 'webp': 'image',
         'json': 'json', 'txt': 'txt', 'mask.png': 'mask'}
MEMBER = re.compile(r'((?:.*/)?[^/.]+)\.([^/]+)', re.DOTALL)            # stem and extension: up to the first dot
NO_PAIR = 'no readable tar of images, each with a .json or .txt of the same name; see docs/data.md for the format'


def warn(message):
    print(f'WARNING    {message}', file=sys.stderr)


@contextlib.contextmanager
def replacing(path):
    """A temporary path beside `path`, which takes its place when the block ends well and is removed when not."""
    path = Path(path)
    partial = path.with_name(f'{path.name}.{os.getpid()}.partial')
    try:
        yield partial
        with open(partial, 'rb+') as file:
            os.fsync(file.fileno())             # else a crash of the machine may leave an empty file under the name
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def find_shards(pattern, quiet=True):
    """A folder, a glob, a brace pattern such as /shards/{00000..00575}.tar, or several joined by '::' -> paths.

    Unless quiet, says how many shards of a brace pattern are missing, and how many are named twice: those count once.
    Raises ValueError where a part matches nothing.
    """
    paths = []
    for part in str(pattern).split('::'):
        found = [tars_of(name) for name in expand_braces(os.path.expanduser(part))]
        missing = found.count([])
        if missing == len(found):
            raise ValueError(f"'{part}' does not exist or holds no .tar file; give a folder of tars, a glob, or "
                             "'/shards/{00000..00575}.tar'")
        if missing and not quiet:
            warn(f'{missing} of {len(found)} shards of the pattern are missing ({part})')
        for tars in found:
            paths += tars
    unique = {os.path.realpath(path): path for path in paths}
    twice = len(paths) - len(unique)
    if twice and not quiet:
        warn(f'{twice} shards are named twice; each is used once')
    return list(unique.values())


def tars_of(name):
    """The tars that a name without braces stands for."""
    if os.path.isfile(name):
        return [name]
    if os.path.isdir(name):
        name = os.path.join(glob.escape(name), '*.tar')
    return sorted(glob.glob(name))


def expand_braces(pattern):
    """'{08..10}.tar' -> 08.tar, 09.tar, 10.tar; '{a,b}.tar' -> a.tar, b.tar; of several braces, every combination."""
    brace = re.search(r'{(\d+)\.\.(\d+)}|{([^{}]*,[^{}]*)}', pattern)
    if not brace:
        return [pattern]
    first, last, listed = brace.groups()
    if listed:
        items = listed.split(',')
    else:
        items = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    names = []
    for item in items:
        names += expand_braces(pattern.replace(brace[0], item, 1))
    return names


def read_headers(path):
    """The files in a tar of any format -> [(name, offset of the data, size)], and whether a part is damaged.

    tarfile passes over what is no header, so only the files whose headers are damaged are lost.
    """
    files = []
    length = os.path.getsize(path)
    end = 0                                             # of the member before
    damaged = False
    with tarfile.open(path, 'r:', encoding='utf-8', ignore_zeros=True) as tar:
        while True:
            try:
                member = tar.next()
            except Exception:                           # a header that promises another one, or the end of a cut tar
                damaged = True
                tar.offset += tarfile.BLOCKSIZE
                if tar.offset < length:
                    continue
                break
            if member is None:
                break
            tar.members = []                            # tarfile would keep them all
            damaged = damaged or not_zero(tar.fileobj, end, member.offset)
            if member.size < 0:
                tar.offset = member.offset_data         # else tarfile goes back and never ends
                damaged = True
            elif member.offset_data + member.size > length:
                damaged = True
            elif member.isreg():
                files.append((member.name, member.offset_data, member.size))
            end = tar.offset
        damaged = damaged or not_zero(tar.fileobj, end, length)
    return files, damaged


def not_zero(file, start, stop):
    """Zeros end a tar, or lie between tars that were joined. Anything else between members is damage."""
    file.seek(start)
    return bool(file.read(max(stop - start, 0)).strip(b'\0'))


def scan_shard(path, number):
    """Headers of one tar -> its pairs, (n,) PAIR in order of their images, and whether it is damaged."""
    try:
        files, damaged = read_headers(path)
    except tarfile.TarError:
        return np.empty(0, PAIR), True
    places = defaultdict(dict)                          # stem -> {role: (offset, size)}
    for name, offset, size in files:
        match = MEMBER.fullmatch(name)
        role = match and ROLES.get(match[2].lower())
        if role and 0 < size < 2 ** 31:
            places[match[1]].setdefault(role, (offset, size))           # of several images the first
    complete = [place for place in places.values() if 'image' in place and ('json' in place or 'txt' in place)]
    pairs = np.zeros(len(complete), PAIR)
    pairs['shard'] = number
    for row, place in zip(pairs, complete):
        for role, (offset, size) in place.items():
            row[role] = offset
            row[f'{role}_size'] = size
    return np.sort(pairs, order='image'), damaged


def most_open_files():
    """How many shards this process may hold open, once the system's limit is raised as far as it goes."""
    try:
        import resource
    except ImportError:                                 # Windows
        return 256
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError):               # macOS: its hard limit is none, and it grants less
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 512)


@functools.lru_cache(most_open_files())
def open_shard(path, time, process):
    """time: a shard that was replaced is opened anew. process: forked ones would move each other's position."""
    return open(path, 'rb', buffering=0)


def digest(*values):
    return hashlib.sha1(repr(values).encode()).hexdigest()[:16]


class Shards:
    """Random access to all pairs of a set of tars.

    caption_keys: the json keys of the captions, joined by commas. index: path of an index that `save` wrote; it is
    mapped and no header is read. cache: a folder where an index of these very shards may lie.
    Raises ValueError where no pair is left, or where a shard's captions are under none of the keys.
    """

    def __init__(self, pattern, caption_keys=None, cache=None, index=None):
        self.paths = find_shards(pattern, quiet=index is not None)
        self.caption_keys = None
        if caption_keys:
            self.caption_keys = [key.strip() for key in caption_keys.split(',')]
        self.sizes = [os.path.getsize(path) for path in self.paths]
        self.times = [os.path.getmtime(path) for path in self.paths]
        name = digest(PAIR.descr, self.caption_keys, self.paths, self.sizes, self.times)
        self.index_name = f'index-{name}.npy'
        if cache and Path(cache, self.index_name).exists():
            index = Path(cache, self.index_name)
        self.index = index
        if index:
            self.pairs = np.load(index, mmap_mode='r')
        else:
            self.pairs = self.scan()
            if not len(self.pairs):
                raise ValueError(f'{pattern}: {NO_PAIR}')
            self.check_captions()
        self.fingerprint = digest([os.path.basename(path) for path in self.paths], self.sizes, len(self.pairs))

    def scan(self):
        """Pairs of all shards, (n,) PAIR. Few or small ones are not worth starting processes for."""
        many = len(self.paths) >= 8 and sum(self.sizes) >= 2 ** 28
        parts = []
        with ProcessPoolExecutor() as pool:             # it starts processes only when it is used
            each = pool.map if many else map
            results = each(scan_shard, self.paths, range(len(self.paths)))
            bar = tqdm(results, 'reading headers', len(self.paths), leave=False, disable=None)
            for path, (pairs, damaged) in zip(self.paths, bar):
                if not len(pairs):
                    warn(f'{path}: {NO_PAIR}')
                elif damaged:
                    warn(f'{path} is damaged; {len(pairs)} pairs of it can be read')
                parts.append(pairs)
        return np.concatenate(parts)

    def check_captions(self):
        """Of the first pairs of a shard one must have captions: if none has, the keys are wrong, not the pairs."""
        firsts = np.unique(self.pairs['shard'], return_index=True)[1]
        for indices in np.split(np.arange(len(self)), firsts[1:]):
            for i in indices[:20]:
                try:
                    self.pool(i)
                    break
                except ValueError as error:
                    problem = error
            else:
                raise ValueError(f'{self.path(i)} has captions that cannot be used ({problem}); name the right ones '
                                 'with --caption-keys')

    def save(self, folder):
        """Writes the index into a folder, maps it from there, and returns its path."""
        self.index = Path(folder, self.index_name)
        if not self.index.exists():
            with replacing(self.index) as partial, open(partial, 'wb') as file:
                np.save(file, self.pairs)
        self.pairs = np.load(self.index, mmap_mode='r')
        return self.index

    def __len__(self):
        return len(self.pairs)

    def __getstate__(self):
        """To a worker that is spawned goes the path of a mapped index, not a copy."""
        return {**self.__dict__, 'pairs': None if self.index else self.pairs}

    def __setstate__(self, state):
        self.__dict__ = state
        if self.index:
            self.pairs = np.load(self.index, mmap_mode='r')

    def path(self, i):
        """Of the shard of pair i."""
        return self.paths[self.pairs[i]['shard']]

    def read(self, i, offset, size):
        """Bytes of the shard of pair i."""
        shard = self.pairs[i]['shard']
        file = open_shard(self.paths[shard], self.times[shard], os.getpid())
        file.seek(offset)
        data = file.read(size)
        if len(data) < size:
            raise ValueError(f'{self.paths[shard]} was cut after its headers were read')
        return data

    def member(self, i, role):
        """The bytes of a member of pair i; None where it has no such member."""
        pair = self.pairs[i]
        size = pair[f'{role}_size']
        return self.read(i, pair[role], size) if size else None

    def image(self, i):
        """The encoded bytes of image i."""
        return self.member(i, 'image')

    def mask(self, i):
        """The bytes of pair i's KEY.mask.png, as in the built-in set; else None."""
        return self.member(i, 'mask')

    def record(self, i):
        """The json of pair i as a dict, with the .txt under 'txt'."""
        record = json.loads(self.member(i, 'json') or '{}')
        if not isinstance(record, dict):
            record = {'captions': record}
        text = self.member(i, 'txt')
        if text:
            record.setdefault('txt', text.decode('utf-8', 'replace'))
        return record

    def pool(self, i):
        """All sentences of pair i; ValueError when there is none."""
        record = self.record(i)
        pool = caption_pool(record, self.caption_keys)
        if not pool:
            raise ValueError(f"no usable caption under the keys {', '.join(sorted(record)) or '(none)'}")
        return pool

    def name(self, i):
        """Where pair i lies, for messages: shard and member."""
        name = b'(gone)'
        with contextlib.suppress(OSError, ValueError):                  # of a shard that vanished during the run
            name = self.read(i, self.pairs[i]['image'] - tarfile.BLOCKSIZE, 100)
        return f"{self.path(i)}:{name.rstrip(bytes(1)).decode('utf-8', 'replace')}"


def write_shard(path, members):
    """A tar of (name, bytes), whole or not at all, and none of nothing; equal members give equal bytes."""
    members = iter(members)
    first = next(members, None)
    if first is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, tarfile.open(partial, 'w', format=tarfile.USTAR_FORMAT) as tar:
        for name, data in itertools.chain([first], members):
            info = tarfile.TarInfo(name)                                # its time is 0
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


# --- 2. Captions: a pool of sentences per pair, and text crops from it ---------------------------------- Sec. 3.1 ---

SHORT = ['shortIB_captions', 'shortSV_captions', 'shortLLA_captions']
LONG = ['longIB_captions', 'longSV_captions', 'longLLA_captions']
CAPTION_KEYS = [                # the first family that has a sentence is the pool
    ['raw_caption', *SHORT, *LONG],             # DreamLIP, the paper's main data
    ['original_caption', 'caption'],            # PixelProse
    ['captions'],
    ['caption'],
    ['txt'],
]
POOLS = {'raw': 'raw_caption', 'short': ','.join(SHORT), 'long': ','.join(LONG), 'all': None}       # --caption-pool


def sentences(value):
    """A string, or a list of strings, -> its sentences: split at newlines, '</s>' and full stops, '3.5' kept whole.

    Both forms give the same list. (The released sampler, given a string, trains on single letters without a word.)
    """
    if isinstance(value, str):
        parts = re.split(r'\n|</s>|\.(?!\d)|(?<!\d)\.', value)
        return [part.strip() for part in parts if part.strip()]
    found = []
    if isinstance(value, (list, tuple)):
        for item in value:
            found += sentences(item)
    return found


def caption_pool(record, keys=None):
    """The record's sentences as one flat list, duplicates kept; [] where it has none, or only single characters."""
    for family in [keys] if keys else CAPTION_KEYS:
        if not keys and family[0] == 'original_caption' and 'original_caption' not in record:
            continue                            # else img2dataset's own 'caption' would pass for PixelProse's
        pool = []
        for key in family:
            value = record.get(key)
            if key == 'original_caption' and isinstance(value, str):
                pool += [value.strip()] if value.strip() else []        # whole, as released: "St. Mary's Church"
            else:
                pool += sentences(value)
        if any(len(sentence) > 1 for sentence in pool):
            return pool
    return []


def text_crops(pool, rng, globals_=2, local=6):
    """Globals of 1-5 sentences joined by '. ', then `local` single sentences -> list of globals_ + local strings.

    Sentences come in random order, without replacement in a global and in the locals, independently between them.
    code≠paper: a pool that is too small is repeated whole, plus a random rest.
    """
    def draw(count):
        if count <= len(pool):
            return rng.sample(pool, count)
        repeats, rest = divmod(count, len(pool))
        return pool * repeats + rng.sample(pool, rest)

    captions = ['. '.join(draw(rng.randint(1, 5))) for _ in range(globals_)]
    return captions + draw(local)


# --- 3. Tokenizer: CLIP's byte-pair encoding, with CLIP's merges or learned ones -------------------------------------

VOCAB_URL = 'https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz'
VOCAB_SHA256 = '924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a'
VOCAB_HELP = f'give the file at {VOCAB_URL} by --vocab PATH or COSMOS_VOCAB, or learn a vocabulary with --vocab learn'

# Every byte is shown as one visible character, so that merges are lines of text: printable Latin-1 as itself and first,
# the other 68 from U+0100 on. NB: this order is ids 0..255; with any other, released weights quietly read noise.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
SYMBOL_BYTE = {chr(byte): byte for byte in VISIBLE}
SYMBOL_BYTE.update({chr(256 + k): byte for k, byte in enumerate(HIDDEN)})
BYTE_SYMBOL = {byte: symbol for symbol, byte in SYMBOL_BYTE.items()}

SPECIAL = '<start_of_text>', '<end_of_text>'
WORD = re.compile(r"<start_of_text>|<end_of_text>|'(?:[stmd]|re|ve|ll)|[^\W\d_]+|\d|(?:[^\w\s]|_)+")
CONTROL = re.compile('[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]')
COMPOSED = re.compile('[\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\ufb00-\ufb04\ufb06\uff01-\uffef]')


def clean(text):
    """The text as ftfy rewrites it: no controls, plain quotes, ligatures and widths, U+FFFD for lone surrogates."""
    text = CONTROL.sub('', html.unescape(html.unescape(text)))          # twice: web captions hold '&amp;lt;'
    if not text.isascii():
        text = ''.join(map(plain, text))
        text = re.sub('[\u02bc\u2018-\u201b]', "'", text)
        text = re.sub('[\u201c-\u201f]', '"', text)
        text = re.sub('[\ud800-\udfff]', '\ufffd', text)
    return unicodedata.normalize('NFC', text)


@functools.lru_cache(2 ** 16)
def plain(sign):
    """One character without ligature and width.

    CLIP's pattern wants \\p{L} and \\p{N}, which `re` lacks. Its \\w is exactly L, N and '_', but its \\d only the
    decimal N: the others (² ½ Ⅷ ①) get spaces here, or they would pass for letters.
    """
    if COMPOSED.match(sign):
        sign = unicodedata.normalize('NFKC', sign)
    if sign.isnumeric() and not sign.isalpha() and not sign.isdecimal():
        return f' {sign} '
    return sign.replace('\ufb05', 'ſt')


def symbols_of(word):
    """'cat' -> ['c', 'a', 't</w>']: a symbol per UTF-8 byte, the last one marked: 'cat' is not the 'cat' of 'cats'."""
    symbols = [BYTE_SYMBOL[byte] for byte in word.encode()]
    symbols[-1] += '</w>'
    return symbols


def fuse(symbols, left, right):
    """Joins every neighbour pair `left`, `right`, from left to right: a a a with (a, a) gives aa a."""
    fused = []
    for symbol in symbols:
        if symbol == right and fused and fused[-1] == left:
            fused[-1] += symbol
        else:
            fused.append(symbol)
    return fused


def fetch_vocab():
    """Path of CLIP's merges in the user's cache, downloaded on first use. ValueError when they can't be had."""
    path = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'cosmos', Path(VOCAB_URL).name).expanduser()
    patience = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(10)                            # else a silent network hangs the run
        if not path.is_file():                                  # ranks may fetch side by side: each renames its own
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(VOCAB_URL, str(path), VOCAB_SHA256, progress=False)
        return path
    except Exception as error:                                  # no network, a proxy's page, a full disk: one remedy
        raise ValueError(f"CLIP's vocabulary could not be fetched into {path} ({error}); {VOCAB_HELP}") from None
    finally:
        socket.setdefaulttimeout(patience)


class Tokenizer:
    """CLIP's tokenizer: clean, split into words, byte-pair encode each. tokenizer(texts) -> (n, context_length) int64

    merges: lines 'left right', most urgent first. Ids: 256 bytes, 256 bytes closing a word, one a merge, start, end.
    The end is highest because the text tower finds it by argmax; padding is 0. Ids equal CLIP's (simple_tokenizer.py
    with ftfy and regex), but ftfy's repair of wrongly decoded text ('Ã©' for 'é', C1 controls) is not reproduced; and
    U+0345, which regex takes for a letter, is none here.
    """

    def __init__(self, merges, context_length=77):
        self.merges = list(merges)
        self.context_length = context_length
        pairs = [tuple(line.split()) for line in self.merges]
        closing = [f'{symbol}</w>' for symbol in SYMBOL_BYTE]
        fused = [left + right for left, right in pairs]
        self.symbols = [*SYMBOL_BYTE, *closing, *fused, *SPECIAL]
        self.vocab_size = len(self.symbols)
        self.sot = self.vocab_size - 2
        self.eot = self.vocab_size - 1
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.rank = {pair: i for i, pair in enumerate(pairs)}
        self.cache = {symbol: [self.ids[symbol]] for symbol in SPECIAL}         # word -> ids

    @classmethod
    def clip(cls, path=None, context_length=77):
        """CLIP's 48,894 merges: from `path`, else $COSMOS_VOCAB, else cache or net. ValueError if it's another file."""
        path = os.path.expanduser(path or os.environ.get('COSMOS_VOCAB') or fetch_vocab())
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"CLIP's vocabulary {path} can't be read ({error.strerror}); {VOCAB_HELP}") from None
        if hashlib.sha256(data).hexdigest() != VOCAB_SHA256:
            raise ValueError(f"{path} is not CLIP's vocabulary (wrong SHA-256), perhaps a git-lfs pointer or a web page: "
                             f'remove it, then {VOCAB_HELP}')
        lines = gzip.decompress(data).decode().split('\n')
        return cls(lines[1:48895], context_length)              # line 0 is a header; CLIP does not use the rest

    @classmethod
    def learn(cls, texts, vocab_size, context_length=77):
        """Merges the most frequent pair (of equals the smallest) until `vocab_size`, or until none occurs twice."""
        if vocab_size < 514:
            raise ValueError(f'vocabulary size {vocab_size} leaves no room for bytes, start and end; use 514 or more')
        tally = Counter()
        for text in texts:
            tally.update(word for word in cls.split(text) if word not in SPECIAL)
        words = [symbols_of(word) for word in tally]
        times = list(tally.values())
        count = Counter()                       # pair of symbols -> how often it occurs in all texts
        holders = defaultdict(set)              # pair -> indices of words that have or had it

        def recount(i, sign):
            for pair in zip(words[i], words[i][1:]):
                count[pair] += sign * times[i]
                holders[pair].add(i)

        for i in range(len(words)):
            recount(i, 1)
        merges = {}                             # a dict: a pair may return (abc = ab c or a bc) but keeps its rank
        while len(merges) < vocab_size - 514:
            most = max(count.values(), default=0)
            if most < 2:
                break
            left, right = min(pair for pair, number in count.items() if number == most)
            merges[f'{left} {right}'] = None
            for i in holders.pop((left, right)):
                recount(i, -1)
                words[i] = fuse(words[i], left, right)
                recount(i, 1)
        return cls(merges, context_length)

    @staticmethod
    def split(text):
        """Words of the cleaned text by CLIP's pattern: letters, single digits, other signs, 's 't 're 've 'm 'll 'd."""
        return WORD.findall(clean(text).lower())

    def word_ids(self, word):
        """Ids of one word: fuses the pair of lowest rank while there is any. Cached: few words fill most texts."""
        if word in self.cache:
            return self.cache[word]
        symbols = symbols_of(word)
        while True:
            pairs = [pair for pair in zip(symbols, symbols[1:]) if pair in self.rank]
            if not pairs:
                break
            symbols = fuse(symbols, *min(pairs, key=self.rank.get))
        ids = [self.ids[symbol] for symbol in symbols]
        if len(self.cache) < 200_000:                           # the web never runs out of new words; memory does
            self.cache[word] = ids
        return ids

    def words(self, text):
        """[(word, how many ids it takes)] in order, to sum attention over pieces into attention over words."""
        return [(word, len(self.word_ids(word))) for word in self.split(text)]

    def encode(self, text):
        """Ids without start, end and padding."""
        ids = []
        for word in self.split(text):
            ids += self.word_ids(word)
        return ids

    def decode(self, ids):
        """Text of ids (list or tensor row) up to the first end: beyond it is padding, which would read '!!!'."""
        symbols = ''
        for i in map(int, ids):
            if i == self.eot:
                break
            if i != self.sot:
                symbols += self.symbols[i]
        data = bytes(map(SYMBOL_BYTE.get, symbols))
        return data.decode(errors='replace').replace('</w>', ' ').strip()

    def __call__(self, texts, context_length=None):
        """n texts (or one) -> (n, context_length) int64: start, ids, end, zeros. A long text loses ids, not its end."""
        if isinstance(texts, str):
            texts = [texts]
        length = context_length or self.context_length
        tokens = torch.zeros(len(texts), length, dtype=torch.int64)
        for row, text in zip(tokens, texts):
            ids = [self.sot, *self.encode(text)[:length - 2], self.eot]
            row[:len(ids)] = torch.tensor(ids)
        return tokens


# --- 4. Image crops: boxes, pixels and flips, in the loader's workers ------------------------------------ Sec. 3.1 ---

MEAN = (0.48145466, 0.4578275, 0.40821073)      # OpenAI's, as released
STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = v2.InterpolationMode.BICUBIC
TILE = 112                                      # side of an image in sample_sheet
warnings.simplefilter('error', Image.DecompressionBombWarning)      # a few bytes can ask for all memory


def open_image(source):
    """A path, an open file or encoded bytes -> Pillow image, of which only the header is read yet."""
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    return Image.open(source)


def upright(image):
    """A Pillow image turned as EXIF says, 16 bits of grey scaled to 8: Pillow would cut them off at 255."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I'):
        gray = np.asarray(image).clip(0, 65535) // 257
        image = Image.fromarray(gray.astype(np.uint8))
    return image


def read_image(source, name=None):
    """A path, an open file or encoded bytes -> upright Pillow image. ValueError with its name for what is no image."""
    try:
        return upright(open_image(source))
    except Exception as error:                                          # decoders raise what they like
        raise ValueError(f'{name or source} is no image that can be read ({error})') from None


def pixels_of(image):
    """Pillow image -> (3, h, w) uint8, upright; in memory the three colours of a pixel stay neighbours."""
    return torch.from_numpy(np.array(upright(image).convert('RGB'))).permute(2, 0, 1)


def decode(data):
    """Encoded bytes -> (3, h, w) uint8, upright. Raises OSError or ValueError for what is no image."""
    return pixels_of(open_image(data))


class Kind(NamedTuple):
    """A kind of image view."""
    size: int           # side, in pixels
    scale: tuple        # least and most share of the image's area
    blur: float         # probability
    solarize: float     # probability


def view_kinds(config):
    """Global view 0, global view 1, local view, as released."""
    return [Kind(config.image_size, (0.4, 1.0), blur=1.0, solarize=0.0),
            Kind(config.image_size, (0.4, 1.0), blur=0.1, solarize=0.2),
            Kind(config.local_image_size, (0.05, 0.4), blur=0.5, solarize=0.0)]


def random_box(height, width, scale, rng):
    """A crop of an image -> (y, x, h, w): share of the area and log of the aspect uniform, then the place.

    The distribution is that of torchvision's RandomResizedCrop, which draws from torch's global generator, not from
    rng. Where ten do not fit, as in a very long image, it is the middle.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = (4 / 3) ** rng.uniform(-1, 1)
        h = round(math.sqrt(area / aspect))
        w = round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    h = min(height, round(width * 4 / 3))
    w = min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def image_crops(data, kinds, rng, flip=True):
    """One random crop for each kind of view -> list of (3, s, s) uint8, and their boxes in the image (y, x, h, w)."""
    image = open_image(data)
    width, height = image.size
    if image.getexif().get(ExifTags.Base.Orientation, 1) > 4:
        width, height = height, width
    boxes = [random_box(height, width, kind.scale, rng) for kind in kinds]
    # Pillow decodes a JPEG at 1/2, 1/4 or 1/8 where that is still as large as asked for, in much less time.
    room = min(min(h, w) / kind.size for (_, _, h, w), kind in zip(boxes, kinds))
    image.draft('RGB', (math.ceil(image.width / room), math.ceil(image.height / room)))
    pixels = pixels_of(image)
    tall = pixels.shape[1] / height                     # 1, or about 1/2, 1/4, 1/8
    wide = pixels.shape[2] / width
    crops = []
    for (y, x, h, w), kind in zip(boxes, kinds):
        place = [int(y * tall), int(x * wide), int(h * tall), int(w * wide)]    # rounded down: never over an edge
        crop = v2.functional.resized_crop(pixels, *place, [kind.size] * 2, BICUBIC)
        if flip and rng.random() < 0.5:
            crop = crop.flip(-1)
        crops.append(crop.contiguous())         # colour after colour, which the operations below are fast on
    return crops, boxes


class Preprocess(v2.Compose):
    """The evaluation transform: PIL image -> (3, size, size) float. Short side to `size`, bicubic, then the centre."""

    def __init__(self, size):
        super().__init__([v2.RGB(), v2.Resize(size, BICUBIC), v2.CenterCrop(size), v2.ToImage(),
                          v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


# --- 5. Colours: in batches, where the model runs -------------------------------------------------------- Sec. 3.1 ---

class Colours(NamedTuple):
    """How the colours of a view change: numbers for one view, or tensors (B,). The defaults change nothing."""
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0            # turn of the colour circle; 1 is once around
    gray: float = 0.0           # 1 takes all colour
    blur: float = 0.0           # standard deviation in pixels
    solarize: float = 1.0       # brighter values than this are inverted


def draw_colours(kind, rng):
    """Colours of one view, with the probabilities and ranges as released."""
    colours = Colours()
    if rng.random() < 0.8:
        colours = Colours(brightness=rng.uniform(0.6, 1.4), contrast=rng.uniform(0.6, 1.4),
                          saturation=rng.uniform(0.8, 1.2), hue=rng.uniform(-0.1, 0.1))
    if rng.random() < 0.2:
        colours = colours._replace(gray=1.0)
    if rng.random() < kind.blur:
        colours = colours._replace(blur=rng.uniform(0.1, 2.0))
    if rng.random() < kind.solarize:
        colours = colours._replace(solarize=127.5 / 255)                # between two of the 256 values
    return colours


# Below, x is (n, 3, h, w) in [0, 1] and a strength (n, 1, 1, 1).

def brightness(x, strength):
    return (x * strength).clamp_(0, 1)


def contrast(x, strength):
    mean = v2.functional.rgb_to_grayscale(x.mean(dim=(2, 3), keepdim=True))
    return torch.lerp(mean, x, strength).clamp_(0, 1)


def saturation(x, strength):
    return torch.lerp(v2.functional.rgb_to_grayscale(x), x, strength).clamp_(0, 1)


def hue(x, turn):
    """RGB -> HSV, hue turned, -> RGB, by the textbook formulas."""
    red, green, blue = x.unbind(dim=1)                                  # each (n, h, w)
    value = x.amax(dim=1)
    chroma = value - x.amin(dim=1)
    # Where the colour lies on the circle, in sixths times chroma.
    sixths = torch.where(value == red, green - blue,
                         torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma))
    angle = sixths / (6 * chroma).clamp_min(1e-8) + turn[:, 0] + 1      # of gray any will do; + 1: above 0
    channels = []
    for start in (5, 3, 1):                                             # red, green, blue
        k = 6 * torch.frac(angle + start / 6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, dim=1)


def gray(x, strength):
    return torch.lerp(x, v2.functional.rgb_to_grayscale(x), strength)


def blur(x, sigma, reach=6):
    """Gaussian blur; borders are mirrored. reach: where the kernel ends, 3 of the largest sigma."""
    n, channels, h, w = x.shape
    offsets = torch.arange(-reach, reach + 1, device=x.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel * (offsets.abs() < 3 * sigma + 1)                   # what is smaller slows a CPU's products down
    kernel = kernel / kernel.sum(dim=-1, keepdim=True)
    kernel = kernel.repeat_interleave(channels, dim=0)                  # (3 n, 1, 1, 13): each channel has its own
    x = F.pad(x, (reach,) * 4, mode='reflect').flatten(0, 1)            # (3 n, h + 12, w + 12)
    x = F.conv2d(x, kernel, groups=len(kernel))                         # along rows
    x = F.conv2d(x, kernel.mT, groups=len(kernel))                      # along columns
    return x.view(n, channels, h, w)


def solarize(x, threshold):
    return torch.where(x > threshold, 1 - x, x)


JITTERS = {'brightness': brightness, 'contrast': contrast, 'saturation': saturation, 'hue': hue}
OPERATIONS = {**JITTERS, 'gray': gray, 'blur': blur, 'solarize': solarize}


def recolour(images, colours, order):
    """uint8 (B, 3, h, w), the numbers of Colours (B, 7), the four jitters in order -> float32 in [0, 1].

    colours stay on the CPU. There it is known which images an operation changes, without waiting for the GPU.
    """
    x = images.float().div_(255)
    strengths = Colours(*colours.unbind(dim=1))
    for name in [*order, 'gray', 'blur', 'solarize']:
        strength = getattr(strengths, name)
        changed = (strength != getattr(Colours(), name)).nonzero()[:, 0]
        if len(changed):
            strength = strength[changed].view(-1, 1, 1, 1).to(x.device, non_blocking=True)
            changed = changed.to(x.device, non_blocking=True)
            x[changed] = OPERATIONS[name](x[changed], strength)
    return x


def normalize(images):
    """uint8, or float in [0, 1], (..., 3, h, w) -> float32, with the released mean and deviation."""
    if images.dtype == torch.uint8:
        images = images.float() / 255
    mean, std = torch.tensor([MEAN, STD]).view(2, 3, 1, 1).to(images.device, non_blocking=True)
    return (images - mean) / std


# --- 6. Samples and batches ------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=1)
def order(seed, epoch, pairs):
    """The order of all pairs in an epoch, (pairs,): a pure function, so no state has to be saved to go on with it."""
    return np.random.default_rng((seed, epoch)).permutation(pairs).astype(np.uint32)


class Order(torch.utils.data.Sampler):
    """Which pairs make batch `step`: a pure function of (seed, step), cut into equal slices for the ranks.

    Yields, for every step in [start, stop), this rank's list of (epoch, position in its order, index of the pair). An
    epoch holds pairs // batch whole batches; the rest of its order is left out.
    """

    def __init__(self, pairs, batch, start, stop, seed=0, rank=0, world=1):
        if batch > pairs:
            raise ValueError(f'--batch {batch} is larger than the set of {pairs} pairs; lower --batch')
        if batch % world:
            raise ValueError(f'--batch {batch} cannot be split over {world} processes; choose a multiple of {world}')
        self.pairs = pairs
        self.batch = batch
        self.steps = range(start, stop)
        self.seed = seed
        self.rank = rank
        self.share = batch // world

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        for step in self.steps:
            epoch, k = divmod(step, self.pairs // self.batch)
            first = k * self.batch + self.rank * self.share
            indices = order(self.seed, epoch, self.pairs)[first:first + self.share].tolist()
            yield [(epoch, first + i, index) for i, index in enumerate(indices)]


class Sample(NamedTuple):
    """What a worker makes of one pair."""
    crops: list         # V views (3, s, s) uint8
    colours: list       # a Colours for each view; empty where colours stay
    tokens: object      # (U, T)
    orders: list        # the four jitters in order, for each view: the same in all samples of a step
    bad: int            # pairs before this one that could not be read


class Views(torch.utils.data.Dataset):
    """The training set: (epoch, position, index) -> Sample.

    counts: global and local images, global and local captions. augment: 'full' is the released recipe, 'crops' leaves
    colours and sides alone, for captions that name them. choose_sentences(pool, record, box) gives the sentences that
    the crop `box` may have; then caption k is drawn for crop k, globals for globals and locals for locals.
    A pair that cannot be read is replaced by one further on in the order, reported once with shard and name, counted.
    """

    def __init__(self, shards, tokenizer, config, seed, batch, counts=(2, 6, 2, 6), augment='full',
                 choose_sentences=None):
        self.shards = shards
        self.tokenizer = tokenizer
        self.seed = seed
        self.batch = batch
        self.global_images, self.local_images, self.global_texts, self.local_texts = counts
        kinds = view_kinds(config)
        self.kinds = kinds[:self.global_images] + kinds[2:] * self.local_images
        self.augment = augment
        self.choose_sentences = choose_sentences
        self.reported = set()

    def __getitem__(self, where):
        epoch, position, index = where
        pairs = len(self.shards)
        step = epoch * (pairs // self.batch) + position // self.batch
        for bad in range(100):
            try:
                crops, colours, captions = self.views(epoch, index)
                return Sample(crops, colours, self.tokenizer(captions), self.orders(step), bad)
            except Exception as error:                                  # decoders raise what they like: none ends a run
                if index not in self.reported:
                    self.reported.add(index)
                    print(f'skipped {self.shards.name(index)}: {error}', file=sys.stderr)
            # A batch further on: the next is often in the same batch, and twice in one is a false negative. If that one
            # is bad, too, one by one, or only positions of one remainder would ever be tried.
            jump = 1 if bad else self.batch % pairs or 1
            position = (position + jump) % pairs
            index = int(order(self.seed, epoch, pairs)[position])
        raise ValueError('100 pairs in a row cannot be read; look at the shards with python -m extras.prepare inspect')

    def orders(self, step):
        """ours: one order of the jitters for each view of a batch. The released code draws one for every image."""
        rng = random.Random(f'{self.seed} order {step}')
        return [rng.sample(list(JITTERS), 4) for _ in self.kinds]

    def views(self, epoch, index):
        """-> V crops (3, s, s) uint8, the Colours of each, or none, and U captions as strings; globals first."""
        rng = random.Random(f'{self.seed} {epoch} {index}')
        full = self.augment == 'full'
        pool = self.shards.pool(index)
        captions = text_crops(pool, rng, self.global_texts, self.local_texts)
        crops, boxes = image_crops(self.shards.image(index), self.kinds, rng, flip=full)
        if self.choose_sentences:
            record = self.shards.record(index)
            for k, box in enumerate(boxes[:self.global_images][:self.global_texts]):
                captions[k] = text_crops(self.choose_sentences(pool, record, box), rng, 1, 0)[0]
            for k, box in enumerate(boxes[self.global_images:][:self.local_texts], self.global_texts):
                captions[k] = rng.choice(self.choose_sentences(pool, record, box))
        colours = [draw_colours(kind, rng) for kind in self.kinds] if full else []
        return crops, colours, captions


class Batch(NamedTuple):
    """Views of B pairs."""
    images: list        # V views (B, 3, s, s) uint8
    colours: object     # (B, V, 7), the numbers of Colours, on the CPU; (B, 0) where colours stay as they are
    orders: list        # the four jitters in order, for each view
    texts: list         # U captions (B, T_u) int64, globals first
    longest: int        # length of the longest global caption, rounded up
    bad: int            # pairs that were replaced because they could not be read

    def change(self, change):
        """The batch with another form of every tensor that the model reads."""
        return self._replace(images=list(map(change, self.images)), texts=list(map(change, self.texts)))

    def to(self, device):
        """The batch on a device, without waiting for it."""
        def move(tensor):
            return tensor.to(device, non_blocking=True)

        return self.change(move)

    def split(self, parts):
        """The batch as `parts` batches of equally many pairs."""
        pieces = []
        for k in range(parts):
            def part(tensor):
                return tensor.chunk(parts)[k]

            pieces.append(self.change(part)._replace(colours=part(self.colours)))
        return pieces

    def views(self):
        """V images (B, 3, s, s), float32, normalised."""
        views = []
        for k, images in enumerate(self.images):
            if self.colours.shape[1]:
                few = 8 if images.device.type == 'cpu' else len(images)         # few stay in a CPU's cache
                parts = zip(images.split(few), self.colours[:, k].split(few))
                images = torch.cat([recolour(part, colours, self.orders[k]) for part, colours in parts])
            views.append(normalize(images))
        return views


def collate(samples, multiple=1, globals_=2):
    """Samples -> Batch. Caption 0 keeps all T positions: C^T reads its padding, too. The others are cut: global ones to
    the longest global, local ones to the longest local, rounded up to a `multiple`, at most T."""
    tokens = torch.stack([sample.tokens for sample in samples], dim=1)          # (U, B, T)
    T = tokens.shape[2]
    lengths = tokens.argmax(dim=2).amax(dim=1) + 1                              # (U,); the largest id ends a text

    def cut(captions):
        longest = int(lengths[captions].max())
        return min(math.ceil(longest / multiple) * multiple, T)

    longest = cut(slice(globals_))
    texts = [tokens[0]]
    texts += [text[:, :longest] for text in tokens[1:globals_]]
    if len(tokens) > globals_:
        texts += tokens[globals_:, :, :cut(slice(globals_, None))]
    images = [torch.stack(views) for views in zip(*(sample.crops for sample in samples))]
    colours = torch.tensor([sample.colours for sample in samples])
    return Batch(images, colours, samples[0].orders, texts, longest, sum(sample.bad for sample in samples))


SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGUSR1') if hasattr(signal, name)]   # USR1: Slurm


def ignore_signals(worker):
    """Slurm and torchrun signal a whole process group. A worker that died of it would keep the run from saving."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def loader(views, order, workers, multiple=1):
    """The plain DataLoader that serves batch after batch of an Order."""
    merge = functools.partial(collate, multiple=multiple, globals_=views.global_texts)
    return torch.utils.data.DataLoader(views, batch_sampler=order, num_workers=workers, collate_fn=merge,
                                       pin_memory=torch.cuda.is_available(), prefetch_factor=2 if workers else None,
                                       worker_init_fn=ignore_signals)


def sample_sheet(views, path, count=4):
    """What the student is shown, as a PNG: for some pairs the image, its views, and its text crops (Global, Local)."""
    tiles = []
    lines = []
    for index in np.linspace(0, len(views.shards) - 1, count, dtype=int).tolist():
        try:
            crops, colours, captions = views.views(0, index)
            image = read_image(views.shards.image(index)).convert('RGB')
        except Exception as error:                                      # a picture for the reader: do without this pair
            print(f'not drawn: {views.shards.name(index)}: {error}', file=sys.stderr)
            continue
        tiles.append(v2.functional.pil_to_tensor(ImageOps.pad(image, (TILE, TILE), color='white')) / 255)
        for k, crop in enumerate(crops):
            view = recolour(crop[None], torch.tensor(colours[k:k + 1]), JITTERS) if colours else crop[None] / 255
            tiles.append(v2.functional.resize(view[0], [TILE, TILE]))
        for k, caption in enumerate(captions):
            kind = 'Global' if k < views.global_texts else 'Local'
            lines += textwrap.wrap(f'{kind}  {caption}', 150)
        lines.append('')
    grid = v2.functional.to_pil_image(make_grid(tiles, nrow=1 + len(views.kinds), pad_value=1))
    sheet = Image.new('RGB', (max(grid.width, 1056), grid.height + 17 * len(lines)), 'white')
    sheet.paste(grid)
    ImageDraw.Draw(sheet).text((4, grid.height), '\n'.join(lines), 'black', font_size=13)
    with replacing(path) as partial:
        sheet.save(partial, 'PNG')


# --- 7. Commands -----------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse that answers in one sentence, exit status 1, and names the nearest flag for one it does not know."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        unknown = re.match('unrecognized arguments: ([^ =]+)', message)
        if unknown:
            known = list(self._option_string_actions)
            for action in self._actions:
                if isinstance(action.choices, dict):                    # commands, each with a parser of its own
                    for parser in action.choices.values():
                        known += parser._option_string_actions
            near = difflib.get_close_matches(unknown[1], known, n=1)
            remedy = f'did you mean {near[0]}?' if near else 'see --help'
            message = f"unknown argument '{unknown[1]}'; {remedy}"
        self.exit(1, f'error: {message}\n')


def cli(main):
    """Run a command: what a user can cause becomes one sentence and exit status 1, all else keeps its traceback."""
    if hasattr(sys.stdout, 'reconfigure'):                              # a terminal that cannot show a character
        sys.stdout.reconfigure(errors='backslashreplace')
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = traceback.format_exc()
        if isinstance(error, (ValueError, OSError)):
            # From a loader's worker it comes wrapped in a traceback, of which it is the last line.
            lines = str(error).strip().splitlines() or [repr(error)]
            message = f"error: {lines[-1].removeprefix('ValueError: ')}"
        # Python would wait for loader workers before it ends, and they for it: they ignore the signal it sends them.
        # Of a process group see train.leave: the usual way out may hang.
        if multiprocessing.active_children() or dist.is_available() and dist.is_initialized():
            print(message, file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)
        sys.exit(message)
