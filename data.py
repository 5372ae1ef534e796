"""Pairs in, views out: shards, captions, tokenizer, text crops, image crops, and the built-in set of drawn scenes.

    python data.py make DIR              draws the built-in set: DIR/train/*.tar, DIR/val/*.tar
    python data.py inspect SHARDS        counts, caption statistics, and a contact sheet of views and text crops
    python data.py pack ROWS IMAGES OUT  JSONL, CSV, TSV or COCO captions and a folder of images into shards
    python data.py join CSV SHARDS OUT   DreamLIP's captions onto img2dataset's shards, by URL
    python data.py bench SHARDS          samples a second of one loader worker, by part

A shard is a tar as img2dataset writes it: members that share a stem are one pair.

    000000017.jpg     jpg, jpeg, png or webp
    000000017.json    {"raw_caption": "...", "shortIB_captions": ["...", "..."], ...}; see CAPTION_KEYS
    000000017.txt     the caption alone; used when the json has none

Every random choice for a sample comes from (seed, epoch, index of the pair), and the order of pairs from (seed, epoch).
So a run sees the same numbers with any number of workers and GPUs, and goes on from any step.
"""
import argparse
import contextlib
import csv
import difflib
import glob
import gzip
import hashlib
import html
import io
import json
import math
import multiprocessing
import os
import random
import re
import signal
import socket
import sqlite3
import sys
import tarfile
import textwrap
import time
import traceback
import unicodedata
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torchvision.transforms import v2
from tqdm import tqdm

from cosmos import Config

try:
    from torchvision.io import ImageReadMode, decode_image
except ImportError:         # deprecated since torchvision 0.29; without it Pillow decodes, more slowly
    decode_image = None

# --- 1. Shards: every header is read once, then any pair is one seek away --------------------------------------------

PAIR = np.dtype([('shard', '<i4')] + [(name + part, kind) for name in ('image', 'json', 'txt', 'mask')
                                      for part, kind in (('', '<i8'), ('_size', '<i4'))])       # 52 bytes a pair
FIELDS = {'jpg': 1, 'jpeg': 1, 'png': 1, 'webp': 1, 'json': 3, 'txt': 5, 'mask.png': 7}     # where in PAIR they start
NO_PAIR = 'no readable tar of images, each with a .json or .txt of the same name; see the format in README'


def find_shards(pattern):
    """A folder, a glob, a brace pattern such as /shards/{00000..00575}.tar, or several joined by '::' -> sorted paths.

    Raises ValueError when a part matches nothing.
    """
    paths = []
    for part in str(pattern).split('::'):
        names, found = expand_braces(os.path.expanduser(part)), []
        for name in names:
            inside = os.path.join(glob.escape(name), '*.tar') if os.path.isdir(name) else name
            found += [name] if os.path.isfile(name) else sorted(glob.glob(inside))
        if not found:
            what = 'holds no .tar file' if os.path.isdir(names[0]) else 'does not exist or matches nothing'
            raise ValueError(f"'{part}' {what}; give a folder of tars, a glob, or '/shards/{{00000..00575}}.tar'")
        paths += found
    return paths


def expand_braces(pattern):
    """'{08..10}.tar' -> 08.tar, 09.tar, 10.tar; '{a,b}.tar' -> a.tar, b.tar; of several braces, every combination."""
    brace = re.search(r'{([^{}]*)}', pattern)
    if not brace:
        return [pattern]
    items, bounds = brace[1].split(','), re.fullmatch(r'(\d+)\.\.(\d+)', brace[1])
    if bounds:
        items = [f'{i:0{len(bounds[1])}d}' for i in range(int(bounds[1]), int(bounds[2]) + 1)]
    if len(items) == 1 and not bounds or not items:
        raise ValueError(f"cannot read the braces of '{pattern}'; write {{00000..00575}} or {{a,b}}")
    return [name for item in items for name in expand_braces(pattern.replace(brace[0], item, 1))]


def tar_number(field):
    """A number in a tar header: octal, or GNU's binary form for what that cannot hold. ValueError for neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], 'big')
    return int(field.partition(b'\0')[0] or b'0', 8)


def tar_members(file):
    """(name, offset of the data, size) of the files in an open tar of any format, USTAR, GNU, PAX.

    tarfile stops at the first damaged header. This goes on at the next one whose checksum is right, so that a flipped
    bit in a header hides neither the rest nor gives a file another's name; and it is several times as fast.
    """
    def read(offset, size):
        file.seek(offset)
        return file.read(size)
    end, at, name, size = file.seek(0, os.SEEK_END), 0, None, None
    after = 1                                                           # where to look for headers once one is damaged
    while at + 512 <= end:
        header = read(at, 512)
        try:    # The checksum is the sum of bytes, its own 8 taken as spaces. Adler's lower half is 1 + sum, mod 65521.
            total = (zlib.adler32(header) & 0xffff) - 1 - sum(header[148:156]) + 8 * 32
            length = tar_number(header[124:136])
            if length < 0 or (total - tar_number(header[148:156])) % 65521:
                raise ValueError
        except ValueError:      # The zeros of the end, or damage: it may have moved what follows into the last file.
            at, name, size = next_header(read, after, end), None, None
            after = at + 1
            continue
        kind, after = header[156:157], at + 512
        at = after
        if kind in b'xL':                               # of the next file: PAX's fields, GNU's long name
            extra = read(at, min(length, 1 << 20))
            fields = dict(re.findall(rb'\d+ (path|size)=([^\n]*)\n', extra)) if kind == b'x' else {}
            name = extra.rstrip(b'\0') if kind == b'L' else fields.get(b'path', name)
            size = int(fields[b'size']) if fields.get(b'size', b'').isdigit() else size
        elif kind in b'0\0':
            length = size or length
            prefix = header[345:500].rstrip(b'\0') if header[257:263] == b'ustar\0' else b''
            name = name or (prefix + b'/' if prefix else b'') + header[:100].partition(b'\0')[0]
            if 0 < length <= end - at:                                  # the last file of a cut tar is not whole
                yield name.decode('utf-8', 'surrogateescape'), at, length
        if kind not in b'xLKg':
            name = size = None
        at += 0 if kind in b'123456' else -(-length // 512) * 512       # links and folders have no data


def next_header(read, at, end, step=1 << 20):
    """Offset of the next place, from `at` on, that has the magic word of a header; `end` where there is none."""
    for start in range(at, end, step):
        found = read(start, step + 512).find(b'ustar', 257)             # its place in a header
        if found >= 0:
            return start + found - 257
    return end


def scan_shard(path, number):
    """Headers of one tar -> its pairs, (n,) PAIR in order of their images. What is whole in a damaged one counts."""
    pairs = {}
    with open(path, 'rb', buffering=1 << 14) as file:                   # headers of small files nearby come along
        for name, offset, length in tar_members(file):
            dot = name.find('.', name.rfind('/') + 1)                   # the first in the name, folders left aside
            field = FIELDS.get(name[dot + 1:].lower())
            if field and dot > 0 and length < 1 << 31:
                pair = pairs.setdefault(name[:dot], [number, *[0] * 8])
                if not pair[field]:                                     # of several images the first
                    pair[field:field + 2] = offset, length
    return np.array(sorted(tuple(pair) for pair in pairs.values() if pair[1] and (pair[3] or pair[5])), dtype=PAIR)


class Shards:
    """Random access to all pairs of a set of tars. `cache` is a folder for the index, which is then memory-mapped;
    `caption_keys` are the json keys of the captions, joined by commas. With `together` all ranks read headers, each of
    its share of the shards: every rank must come here.

    Shards without a pair are named and left out. Raises ValueError when no pair is left, or when a shard's captions are
    under none of the keys, naming shard and keys.
    """

    def __init__(self, pattern, cache=None, caption_keys=None, together=False):
        self.paths, self.files, self.index = find_shards(pattern), {}, None
        self.ahead = False                                              # read a shard whole when it is first opened
        self.caption_keys = [key.strip() for key in caption_keys.split(',')] if caption_keys else None
        self.stamps = [(os.path.getsize(path), os.stat(path).st_mtime_ns) for path in self.paths]
        key = hashlib.sha1(repr((PAIR.descr, caption_keys, self.paths, self.stamps)).encode()).hexdigest()[:16]
        name = cache and os.path.join(cache, f'index-{key}.npy')
        together = together and dist.is_initialized()
        rank, world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        asked = [name, bool(name) and os.path.exists(name)]
        if together:                        # rank 0 decides: others may see other times of their copies of the shards
            dist.broadcast_object_list(asked)
        name, cached = asked
        if not cached:
            own = self.scan(rank, world)
            parts = [own] * world
            if together:
                dist.all_gather_object(parts, own)
            pairs = np.concatenate(parts)
            if not len(pairs):
                raise ValueError(f'{pattern}: {NO_PAIR}')
            if rank == 0 or not name:
                self.pairs = pairs[np.argsort(pairs['shard'], kind='stable')]   # the same for any number of ranks
            if name and rank == 0:
                os.makedirs(cache, exist_ok=True)
                np.save(f'{name}.partial.npy', self.pairs)              # renamed when whole: others see all or nothing
                os.replace(f'{name}.partial.npy', name)
            if together:
                dist.barrier()
        if name:
            self.index, self.pairs = name, np.load(name, mmap_mode='r')

    def scan(self, rank, world):
        """Pairs of every world-th shard from `rank` on."""
        parts = [np.empty(0, PAIR)]
        for number in tqdm(range(rank, len(self.paths), world), desc='reading headers', disable=None, leave=False):
            self.pairs = scan_shard(self.paths[number], number)
            if len(self.pairs):
                self.check_captions()
                parts.append(self.pairs)
            else:
                print(f'WARNING    {self.paths[number]}: {NO_PAIR}', file=sys.stderr)
        return np.concatenate(parts)

    def __len__(self):
        return len(self.pairs)

    def __getstate__(self):     # to a worker that is spawned go neither open files nor a copy of a memory-mapped index
        return {**self.__dict__, 'files': {}, 'pairs': None if self.index else self.pairs}

    def __setstate__(self, state):
        self.__dict__ = state
        if self.index:
            self.pairs = np.load(self.index, mmap_mode='r')

    def read(self, shard, offset, size):
        key = os.getpid(), shard                                        # NB: forked workers would share its position
        if key not in self.files:
            if len(self.files) >= 128:                                  # stay far below the usual limit of 1,024
                self.files.pop(next(iter(self.files))).close()
            file = open(self.paths[shard], 'rb', buffering=0)
            if (os.fstat(file.fileno()).st_size, os.fstat(file.fileno()).st_mtime_ns) != self.stamps[shard]:
                raise ValueError(f'{self.paths[shard]} was changed after its headers were read')
            if self.ahead and hasattr(os, 'posix_fadvise'):             # into the system's cache, from start to end
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            self.files[key] = file
        self.files[key].seek(offset)
        data = self.files[key].read(size)
        if len(data) < size:
            raise ValueError(f'{self.paths[shard]} ends before byte {offset + size}; it was cut during the run')
        return data

    def bounds(self):
        """The first pair of every shard that has pairs, and the number of pairs, as a tuple: for `order`."""
        return (*np.unique(self.pairs['shard'], return_index=True)[1].tolist(), len(self))

    def image(self, i):
        """The encoded bytes of image i."""
        return self.read(*self.pairs[i][['shard', 'image', 'image_size']])

    def mask(self, i):
        """The bytes of pair i's KEY.mask.png, as in the built-in set; else None."""
        place = self.pairs[i][['shard', 'mask', 'mask_size']]
        return self.read(*place) if place['mask_size'] else None

    def record(self, i):
        """The json of pair i as a dict, with the .txt under 'txt'."""
        pair, record = self.pairs[i], {}
        if max(pair['json_size'], pair['txt_size']) > 16 << 20:
            raise ValueError(f"a caption file of {max(pair['json_size'], pair['txt_size']):,} bytes is too large")
        if pair['json_size']:
            try:
                record = json.loads(self.read(*pair[['shard', 'json', 'json_size']]))
            except RecursionError:
                raise ValueError('its json is nested too deep') from None
            record = record if isinstance(record, dict) else {'captions': record}
        if pair['txt_size']:
            record.setdefault('txt', self.read(*pair[['shard', 'txt', 'txt_size']]).decode('utf-8', 'replace'))
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
        pair, header = self.pairs[i], b'(gone)'
        with contextlib.suppress(OSError, ValueError):                  # of a shard that vanished during the run
            header = self.read(pair['shard'], pair['image'] - 512, 100)
        return f"{self.paths[pair['shard']]}:{header.rstrip(bytes(1)).decode('utf-8', 'replace')}"

    def check_captions(self):
        """Of the first pairs one must have captions: if none has, the keys are wrong, not the pairs."""
        for i in range(min(20, len(self))):
            try:
                return self.pool(i)
            except ValueError as error:
                problem = error
        raise ValueError(f"{self.name(0).rpartition(':')[0]} has captions that cannot be used ({problem}); "
                         'name the right ones with --caption-keys')


def write_shard(path, members):
    """A tar of (name, bytes), whole or not at all, and none of nothing; equal members give equal bytes."""
    partial = Path(f'{path}.{os.getpid()}.partial')                     # an interrupted one must not look whole
    partial.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(partial, 'w', format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)                                # with mtime 0
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        empty = not tar.offset
    partial.unlink() if empty else os.replace(partial, path)


# --- 2. Captions: a pool of sentences per pair, and text crops from it ---------------------------------- Sec. 3.1 ---

CAPTION_KEYS = [        # the first family that has a sentence is the pool
    ['raw_caption', 'shortIB_captions', 'shortSV_captions', 'shortLLA_captions',
     'longIB_captions', 'longSV_captions', 'longLLA_captions'],         # DreamLIP, the paper's main data
    ['original_caption', 'caption'],                                    # PixelProse
    ['captions'], ['caption'], ['txt'],
]
POOLS = {'raw': 'raw_caption', 'short': ','.join(CAPTION_KEYS[0][1:4]), 'long': ','.join(CAPTION_KEYS[0][4:]),
         'all': None}                                                   # --caption-pool


def sentences(value):
    """A string, or a list of strings, -> its sentences: split at newlines, '</s>' and full stops, '3.5' kept whole.

    Both forms give the same list. (The released sampler, given a string, trains on single letters without a word.)
    """
    if isinstance(value, (list, tuple)):
        return [sentence for item in value for sentence in sentences(item)]
    if not isinstance(value, str):
        return []
    return [part.strip() for part in re.split(r'\n|</s>|\.(?!\d)|(?<!\d)\.', value) if part.strip()]


def caption_pool(record, keys=None):
    """The record's sentences as one flat list, duplicates kept; [] when it has none, or only single characters."""
    for family in [keys] if keys else CAPTION_KEYS:
        if not keys and family[0] == 'original_caption' and 'original_caption' not in record:
            continue                                # else img2dataset's own 'caption' would pass for PixelProse's
        pool = [sentence for key in family for sentence in sentences(record.get(key))]
        if any(len(sentence) > 1 for sentence in pool):
            return pool
    return []


def text_crops(pool, rng, globals_=2, local=6):
    """Globals of 1-5 sentences joined by '. ', then `local` single sentences -> list of globals_ + local strings.

    Sentences come in random order, without replacement in a global and in the locals, independently between them.
    A pool that is too small is repeated whole, plus a random rest (code≠paper: data.py:238-270 of the released code).
    """
    def draw(k):
        times, rest = divmod(k, len(pool))
        return pool * times + rng.sample(pool, rest)
    return ['. '.join(draw(rng.randint(1, 5))) for _ in range(globals_)] + draw(local)


def seen_sentences(pool, objects, box):
    """The sentences that name objects of a scene, and only such as have their centre in the image crop `box` (y, x, h,
    w); where there is none those that name no object, or else all. objects: [{'name', 'bbox': (x, y, w, h)}].
    """
    seen = {}
    for thing in objects:
        x, y, w, h = thing['bbox']
        seen[thing['name']] = 0 <= y + h / 2 - box[0] < box[2] and 0 <= x + w / 2 - box[1] < box[3]
    told = [[seen[name] for name in seen if name in sentence.lower()] for sentence in pool]
    return ([sentence for sentence, named in zip(pool, told) if named and all(named)] or
            [sentence for sentence, named in zip(pool, told) if not named] or pool)


# --- 3. Tokenizer: CLIP's byte-pair encoding, with CLIP's merges or learned ones -------------------------------------

VOCAB_URL = 'https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz'
VOCAB_SHA256 = '924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a'
VOCAB_HELP = f'give the file at {VOCAB_URL} by --vocab PATH or COSMOS_VOCAB, or learn a vocabulary with --vocab learn'

# Every byte is shown as one visible character, so that merges are lines of text: printable Latin-1 as itself and first,
# the other 68 from U+0100 on. NB: this order is ids 0..255; with any other, released weights quietly read noise.
BYTE_SYMBOL = {byte: chr(byte) for byte in [*range(33, 127), *range(161, 173), *range(174, 256)]}
BYTE_SYMBOL |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in BYTE_SYMBOL)}
SYMBOL_BYTE = {symbol: byte for byte, symbol in BYTE_SYMBOL.items()}

# ftfy's rewriting by character: no controls, straight quotes, U+FFFD for lone surrogates, plain ligatures and widths.
CLEAN = dict.fromkeys([*range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)], '')
CLEAN |= dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
CLEAN |= dict.fromkeys(range(0xD800, 0xE000), '\ufffd')
CLEAN |= {code: unicodedata.normalize('NFKC', chr(code)) for code in [
    0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07), *range(0xFF01, 0xFFF0)]}
CLEAN |= {0x149: "'n", 0xFB05: 'ſt'}
# CLIP's pattern wants \p{L} and \p{N}, which `re` lacks. Its \w is exactly L, N and '_', but its \d only the decimal N:
# the others (² ½ Ⅷ ①) get spaces here, or they would pass for letters. (Listed in a [class] they slow `re` down 25x.)
CLEAN |= {ord(c): f' {c} ' for c in map(chr, range(sys.maxunicode + 1)) if c.isnumeric() > c.isalpha() + c.isdecimal()}
SPECIAL = '<start_of_text>', '<end_of_text>'
WORD = re.compile(r"<start_of_text>|<end_of_text>|'(?:[stmd]|re|ve|ll)|[^\W\d_]+|\d|(?:[^\w\s]|_)+")


def symbols_of(word):
    """'cat' -> ['c', 'a', 't</w>']: a symbol per UTF-8 byte, the last one marked: 'cat' is not the 'cat' of 'cats'."""
    *start, last = (BYTE_SYMBOL[byte] for byte in word.encode())
    return [*start, last + '</w>']


def fuse(symbols, left, right):
    """Joins every neighbour pair `left`, `right`, from left to right: a a a with (a, a) gives aa a."""
    out = []
    for symbol in symbols:
        if symbol == right and out and out[-1] == left:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


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
        self.merges, self.context_length = list(merges), context_length
        pairs = [tuple(line.split()) for line in self.merges]
        self.symbols = [*SYMBOL_BYTE, *(s + '</w>' for s in SYMBOL_BYTE), *map(''.join, pairs), *SPECIAL]
        self.vocab_size = len(self.symbols)
        self.sot, self.eot = self.vocab_size - 2, self.vocab_size - 1
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
            kind = {b'v': 'a git-lfs pointer', b'<': 'a web page'}.get(data[:1], f'{len(data)} bytes of something else')
            raise ValueError(f"{path} is {kind}, not CLIP's vocabulary (wrong SHA-256): remove it, then {VOCAB_HELP}")
        return cls(gzip.decompress(data).decode().split('\n')[1:48895], context_length)  # 0: header, rest: unused

    @classmethod
    def learn(cls, texts, vocab_size, context_length=77):
        """Merges the most frequent pair (of equals the smallest) until `vocab_size`, or until none occurs twice."""
        if vocab_size < 514:
            raise ValueError(f'vocabulary size {vocab_size} leaves no room for bytes, start and end; use 514 or more')
        tally = Counter(word for text in texts for word in cls.split(text) if word not in SPECIAL)
        words = [[symbols_of(word), times] for word, times in tally.items()]
        count, holders = Counter(), defaultdict(set)            # holders: pair -> words that have or had it

        def recount(i, sign):
            symbols, times = words[i]
            for pair in zip(symbols, symbols[1:]):
                count[pair] += sign * times
                holders[pair].add(i)

        for i in range(len(words)):
            recount(i, 1)
        merges = {}                             # a dict: a pair may return (abc = ab c or a bc) but keeps its rank
        while len(merges) < vocab_size - 514 and (most := max(count.values(), default=0)) > 1:
            pair = min(pair for pair, times in count.items() if times == most)
            merges[' '.join(pair)] = None
            for i in holders.pop(pair):
                recount(i, -1)
                words[i][0] = fuse(words[i][0], *pair)
                recount(i, 1)
        return cls(merges, context_length)

    @staticmethod
    def split(text):
        """Words of the cleaned text by CLIP's pattern: letters, single digits, other signs, 's 't 're 've 'm 'll 'd."""
        text = html.unescape(html.unescape(text))               # twice: web captions hold '&amp;lt;'
        return WORD.findall(' '.join(unicodedata.normalize('NFC', text.translate(CLEAN)).split()).lower())

    def word_ids(self, word):
        """Ids of one word: fuses the pair of lowest rank while there is any. Cached: few words fill most texts."""
        if word in self.cache:
            return self.cache[word]
        symbols, last = symbols_of(word), len(self.rank)
        while (pair := min(zip(symbols, symbols[1:]), key=lambda p: self.rank.get(p, last), default=None)) in self.rank:
            symbols = fuse(symbols, *pair)
        ids = [self.ids[symbol] for symbol in symbols]
        if len(self.cache) < 200_000:                           # the web never runs out of new words; memory does
            self.cache[word] = ids
        return ids

    def encode(self, text):
        """Ids without start, end and padding."""
        return [i for word in self.split(text) for i in self.word_ids(word)]

    def words(self, text):
        """[(word, how many ids it takes)] in order, to sum attention over pieces into attention over words."""
        return [(word, len(self.word_ids(word))) for word in self.split(text)]

    def decode(self, ids):
        """Text of ids (list or tensor row) up to the first end: beyond it is padding, which would read '!!!'."""
        ids = [int(i) for i in ids if int(i) != self.sot] + [self.eot]
        data = bytes(SYMBOL_BYTE[char] for i in ids[:ids.index(self.eot)] for char in self.symbols[i])
        return data.decode(errors='replace').replace('</w>', ' ').strip()

    def __call__(self, texts, context_length=None):
        """n texts (or one) -> (n, context_length) int64: start, ids, end, zeros. A long text loses ids, not its end."""
        texts, length = [texts] if isinstance(texts, str) else texts, context_length or self.context_length
        rows = [[self.sot, *self.encode(text)[:length - 2], self.eot] for text in texts]
        return torch.tensor([row + [0] * (length - len(row)) for row in rows], dtype=torch.int64).view(-1, length)


# --- 4. Image crops: boxes and pixels in the loader's workers, colours in batches where the model runs -- Sec. 3.1 ---

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)      # OpenAI's, as released
BICUBIC = v2.InterpolationMode.BICUBIC


def upright_size(data):
    """Height and width of encoded bytes, upright as EXIF says, from the header alone. Raises OSError or ValueError."""
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:                       # at twice as many pixels as below
        raise ValueError(str(error)) from None
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:             # a few bytes can ask for all memory
        raise ValueError(f'an image of {image.width} x {image.height} pixels is too large')
    return tuple(image.size if image.getexif().get(0x112, 1) > 4 else image.size[::-1])


def upright(image):
    """A Pillow image turned as EXIF says, 16 bits of grey scaled to 8: Pillow would cut them off at 255."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I'):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image


def decode(data, shrink=1):
    """Encoded bytes -> (3, h, w) uint8, upright. A JPEG may come at 1/2, 1/4 or 1/8 of its size, in less time.

    Raises OSError, RuntimeError or ValueError for what is no image.
    """
    size = upright_size(data)
    if shrink == 1 and decode_image:
        with contextlib.suppress(RuntimeError):
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            image = decode_image(encoded, ImageReadMode.RGB, apply_exif_orientation=True)
            if image.dtype == torch.uint8 and image.shape[1:] == size:
                return image
    # Rarer kinds, slower but all: CMYK, 16 bits a colour, a WebP that EXIF turns.
    image = Image.open(io.BytesIO(data))
    image.draft('RGB', (image.width // shrink, image.height // shrink))
    return v2.functional.pil_to_tensor(upright(image).convert('RGB'))


class Kind(NamedTuple):
    """A kind of image view."""
    size: int           # side, in pixels
    scale: tuple        # least and most share of the image's area
    blur: float         # probability
    solarize: float     # probability


def view_kinds(config):
    """Global view 0, global view 1, local view, as released (transform.py:462-515)."""
    size, local = config.image_size, config.local_image_size
    return [Kind(size, (0.4, 1.0), 1.0, 0.0), Kind(size, (0.4, 1.0), 0.1, 0.2), Kind(local, (0.05, 0.4), 0.5, 0.0)]


def random_box(h, w, scale, rng):
    """A crop of an h x w image -> (y, x, h, w): share of the area and log of the aspect uniform, then the place.

    The distribution is that of torchvision's RandomResizedCrop, whose own draws take twenty times as long. Where
    ten do not fit, as in a very long image, it is the middle.
    """
    for _ in range(10):
        area, aspect = h * w * rng.uniform(*scale), (4 / 3) ** rng.uniform(-1, 1)
        tall, wide = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < tall <= h and 0 < wide <= w:
            return rng.randint(0, h - tall), rng.randint(0, w - wide), tall, wide
    tall, wide = min(h, round(w * 4 / 3)), min(w, round(h * 4 / 3))
    return (h - tall) // 2, (w - wide) // 2, tall, wide


def image_crops(data, kinds, rng):
    """One random crop for each kind of view -> list of (3, s, s) uint8, and their boxes in the image (y, x, h, w)."""
    h, w = upright_size(data)
    boxes = [random_box(h, w, kind.scale, rng) for kind in kinds]
    room = min(min(box[2:]) / kind.size for box, kind in zip(boxes, kinds))
    image, crops = decode(data, 8 if room >= 8 else 4 if room >= 4 else 2 if room >= 2 else 1)[None], []
    zoom = image.shape[2] / h, image.shape[3] / w
    for box, kind in zip(boxes, kinds):
        y, x, tall, wide = (int(n * z) for n, z in zip(box, zoom * 2))  # rounded down: never over an edge
        # What torchvision's resized_crop does, in 0.7 of its time: bytes stay pixel by pixel, as they were decoded.
        crop = image[..., y:y + tall, x:x + wide].contiguous(memory_format=torch.channels_last)
        crops.append(F.interpolate(crop, [kind.size] * 2, mode='bicubic', antialias=True)[0])
    return crops, boxes


def draw_colours(kind, rng):
    """The 12 numbers of a view for `photometric`: flip; the order of the four jitters and their strengths; gray; sigma
    of the blur in pixels, 0 for none; solarise. Probabilities and ranges as released (transform.py:470-506)."""
    order, strengths = rng.sample(range(4), 4), [1.0, 1.0, 1.0, 0.0]    # brightness, contrast, saturation, hue
    if rng.random() < 0.8:
        strengths = [rng.uniform(0.6, 1.4), rng.uniform(0.6, 1.4), rng.uniform(0.8, 1.2), rng.uniform(-0.1, 0.1)]
    sigma = rng.uniform(0.1, 2.0) if rng.random() < kind.blur else 0.0
    return [rng.random() < 0.5, *order, *strengths, rng.random() < 0.2, sigma, rng.random() < kind.solarize]


# All change x, (B, 3, h, w) in [0, 1], in place and return it; strengths are (B, 1, 1, 1). On one core, for an image of
# 224 x 224 pixels, shifts in place of a convolution make blur eight times as fast.

def gray(x):
    """Of x, which stays as it is: (B, 1, h, w)."""
    red, green, blue = x.unbind(dim=1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)[:, None]


def brightness(x, strength):
    return x.mul_(strength).clamp_(0, 1)


def contrast(x, strength):
    mean = gray(x.mean(dim=(2, 3), keepdim=True))
    return x.mul_(strength).add_((1 - strength) * mean).clamp_(0, 1)


def saturation(x, strength):
    return torch.lerp(gray(x), x, strength, out=x).clamp_(0, 1)


def hue(x, turn):
    """Turn the colour circle by `turn` of its full way, at most a sixth; value and chroma stay.

    Around the circle a channel is high for two sixths and low for two; on the slopes between it is the middle one of
    the three. 2 c - mid is c itself on a slope and, where c is flat, what the nearer slope would be if it went on. So a
    turn moves every channel along its slope, up or down as the order of the other two tells, and the clamp does the
    rest.
    """
    r, g, b = x.unbind(dim=1)
    less, more = torch.minimum(r, g), torch.maximum(r, g)
    low, high, mid = torch.minimum(less, b), torch.maximum(more, b), torch.maximum(less, torch.minimum(more, b))
    step = torch.sub(low, high, out=less).mul_(6 * turn[:, 0])                          # (B, h, w), downwards
    for channel, order in zip((r, g, b), (g - b, b - r, r - g)):
        torch.lerp(mid, channel, 2, out=channel).addcmul_(order.sign_(), step).clamp_(low, high)
    return x


def blur(x, sigma, reach=6):
    """Gaussian blur, a sigma for each image, cut at 3 of it; borders mirrored. reach: 3 of the largest, in pixels."""
    far = torch.arange(reach + 1, device=x.device)
    kernel = torch.exp(-0.5 * (far / sigma) ** 2) * (far < 3 * sigma + 1)               # (B, 1, 1, reach + 1)
    kernel = (kernel / (2 * kernel.sum(dim=-1, keepdim=True) - 1))[..., None].unbind(dim=-2)        # each (B, 1, 1, 1)
    for dim, border in ((3, (reach, reach, 0, 0)), (2, (0, 0, reach, reach))):
        size, padded = x.shape[dim], F.pad(x, border, mode='reflect')
        x.mul_(kernel[0])
        for far in range(1, reach + 1):
            for start in (reach - far, reach + far):
                x.addcmul_(kernel[far], padded.narrow(dim, start, size))
    return x


def photometric(images, colours):
    """uint8 (B, 3, h, w) and the numbers of `draw_colours` (B, 12), or (B, 0) for none -> float32 in [0, 1].

    `colours` stays on the CPU: which images an operation touches must not be asked of the GPU, that would wait for it.
    """
    x = images.float().div_(255)
    if colours.shape[1]:
        for at in changed_together(x, colours):
            x[at] = change_colours(x[at], colours[at])
    return x


def changed_together(x, colours):
    """Groups of images, as indices: on a GPU all; on a CPU so few that they stay in its cache through all operations,
    of those that have one order of jitters: each operation then starts once for several small images."""
    if x.device.type != 'cpu':
        return [slice(None)]
    most = 60_000 // x[0, 0].numel()
    if most < 2:
        return [slice(i, i + 1) for i in range(len(x))]
    rows, groups = colours.tolist(), defaultdict(list)
    for i in sorted(range(len(rows)), key=lambda i: rows[i][10]):       # neighbours are blurred about equally far
        groups[tuple(rows[i][1:5]) if rows[i][8] else None].append(i)
    return [group[k:k + most] for group in groups.values() for k in range(0, len(group), most)]


def change_colours(x, colours):
    """`photometric` of x, which is in [0, 1] already, in place -> x."""
    rows, move = colours.tolist(), lambda numbers: numbers.to(x.device, non_blocking=True)

    def change(operation, rule, column=0):
        """The operation, with the numbers of a column, on the images whose numbers obey the rule."""
        at = [i for i, numbers in enumerate(rows) if rule(numbers)]
        if at:
            strength = move(torch.tensor([rows[i][column] for i in at]).view(-1, 1, 1, 1))
            if len(at) == len(x):
                operation(x, strength)
            else:
                at = move(torch.tensor(at))
                x[at] = operation(x[at], strength)

    change(lambda x, _: x.copy_(x.flip(-1)), lambda row: row[0])
    jitters = brightness, contrast, saturation, hue
    for place in range(1, 5):
        for k in sorted({int(row[place]) for row in rows}):
            change(jitters[k], lambda row: row[place] == k and row[5 + k] != (k < 3), 5 + k)        # 1, 1, 1, 0 change
    change(lambda x, _: x.copy_(gray(x)), lambda row: row[9])
    reach = math.ceil(3 * max(row[10] for row in rows))
    change(lambda x, sigma: blur(x, sigma, reach), lambda row: row[10], 10)
    change(lambda x, _: x.copy_(torch.where(x >= 128 / 255, 1 - x, x)), lambda row: row[11])
    return x


def normalize(images):
    """uint8, or float in [0, 1] and then in place, (..., 3, h, w) -> float32, with the released mean and deviation."""
    mean, std = (torch.tensor(x).view(3, 1, 1).to(images.device, non_blocking=True) for x in (MEAN, STD))
    return (images.float().div_(255) if images.dtype == torch.uint8 else images).sub_(mean).div_(std)


class Preprocess(v2.Compose):
    """The evaluation transform: PIL image -> (3, size, size) float. Short side to `size`, bicubic, then the centre."""

    def __init__(self, size):
        super().__init__([v2.RGB(), v2.Resize(size, BICUBIC), v2.CenterCrop(size), v2.ToImage(),
                          v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


# --- 5. Samples and batches ------------------------------------------------------------------------------------------

@lru_cache(maxsize=1)
def order(seed, epoch, pairs, bounds=(), window=0):
    """The order of all pairs in an epoch, (pairs,): a pure function, so no state has to be saved to go on with it.

    With `window` shards are shuffled, and the pairs within so many of them at a time: an epoch ends them before
    it opens the next window, so a cache serves it. bounds: the first pair of every shard, and the number of pairs.
    """
    rng = np.random.default_rng((seed, epoch))
    if not window:
        return rng.permutation(pairs).astype(np.uint32)
    spans = [np.arange(a, b, dtype=np.uint32) for a, b in zip(bounds, bounds[1:])]
    shards = rng.permutation(len(spans))
    return np.concatenate([rng.permutation(np.concatenate([spans[k] for k in shards[i:i + window]]))
                           for i in range(0, len(shards), window)])


class Order(torch.utils.data.Sampler):
    """Which pairs make batch `step`: a pure function of (seed, step), cut into equal slices for the ranks.

    Yields, for every step in [start, stop), this rank's list of (epoch, position in its order, index of the pair). An
    epoch holds pairs // batch whole batches; the rest of its order is left out.
    """

    def __init__(self, pairs, batch, start, stop, seed=0, rank=0, world=1, shuffle=()):
        self.pairs, self.batch, self.start, self.stop, self.seed = pairs, batch, start, stop, seed
        self.shuffle = shuffle                                          # (bounds, window) of `order`, or ()
        self.share, self.rank = batch // world, rank
        if batch > pairs:
            raise ValueError(f'--batch {batch} is larger than the set of {pairs} pairs; lower --batch')
        if batch % world:
            raise ValueError(f'--batch {batch} cannot be split over {world} processes; choose a multiple of {world}')

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        for step in range(self.start, self.stop):
            epoch, k = divmod(step, self.pairs // self.batch)
            first = k * self.batch + self.rank * self.share
            indices = order(self.seed, epoch, self.pairs, *self.shuffle)[first:first + self.share].tolist()
            yield [(epoch, first + i, index) for i, index in enumerate(indices)]


class Views(torch.utils.data.Dataset):
    """The training set: (epoch, position, index) -> views of one pair, as uint8 crops and token ids.

    A pair that cannot be read is replaced by one further on in the order, reported once with shard and name, counted.
    """

    def __init__(self, shards, tokenizer, config, seed, batch, counts=(2, 6, 2, 6), augment='full', shuffle=(),
                 aligned=False):
        self.shards, self.tokenizer, self.seed, self.batch, self.shuffle = shards, tokenizer, seed, batch, shuffle
        self.counts, self.aligned = counts, aligned                     # global and local images, captions
        self.kinds, self.augment, self.reported = view_kinds(config), augment, set()

    def __getitem__(self, where):
        epoch, position, index = where
        for bad in range(100):
            try:
                large, small, colours, captions = self.views(epoch, index)
                return large, small, colours, self.tokenizer(captions), bad
            except Exception as error:                                  # decoders raise what they like: none ends a run
                if index not in self.reported:
                    self.reported.add(index)
                    print(f'skipped {self.shards.name(index)}: {error}', file=sys.stderr)
            # A batch further on: the next is often in the same batch, and twice in one is a false negative. If that one
            # is bad, too, one by one, or only positions of one remainder would ever be asked.
            position = (position + (1 if bad else self.batch % len(self.shards) or 1)) % len(self.shards)
            index = int(order(self.seed, epoch, len(self.shards), *self.shuffle)[position])
        raise ValueError('100 pairs in a row cannot be read; look at the shards with python data.py inspect')

    def views(self, epoch, index):
        """-> global images (m, 3, S, S) and local ones (n, 3, s, s), uint8, before `photometric`; its numbers for them,
        (m + n, 12); global and local captions, list of strings. `counts` says how many of each.

        augment 'full' is the released recipe; 'crops' leaves colours and sides alone, for captions that name them.
        """
        rng, (globals_, locals_, *texts) = random.Random(f'{self.seed} {epoch} {index}'), self.counts
        pool = self.shards.pool(index)
        captions = text_crops(pool, rng, *texts)
        kinds = self.kinds[:globals_] + self.kinds[2:] * locals_
        crops, boxes = image_crops(self.shards.image(index), kinds, rng)
        if self.aligned:        # Caption k tells what crop k shows, globals to globals and locals to locals.
            objects = self.shards.record(index).get('objects') or []
            for k, box in enumerate(boxes[:globals_][:texts[0]]):
                captions[k] = text_crops(seen_sentences(pool, objects, box), rng, 1, 0)[0]
            for k, box in enumerate(boxes[globals_:][:texts[1]], texts[0]):
                captions[k] = rng.choice(seen_sentences(pool, objects, box))
        large, small = torch.stack(crops[:globals_]), crops[globals_:]
        colours = torch.tensor([draw_colours(kind, rng) if self.augment == 'full' else [] for kind in kinds])
        return large, torch.stack(small) if small else large[:0], colours, captions


class Batch(NamedTuple):
    """Views of B pairs in few large tensors."""
    images: list        # global ones (m, B, 3, S, S) and local ones (n, B, 3, s, s), uint8
    colours: list       # (m, B, 12) and (n, B, 12), for `photometric`; they stay on the CPU
    texts: object       # token ids of the captions (U, B, T), global ones first
    ends: object        # (U, B), where each caption ends; it stays on the CPU, for `cut`
    bad: int            # pairs that were replaced because they could not be read

    def to(self, device):
        """The batch on a device, without waiting for it."""
        move = lambda tensor: tensor.to(device, non_blocking=True)
        return self._replace(images=[move(group) for group in self.images], texts=move(self.texts))

    def split(self, parts):
        """The batch as `parts` batches of equally many pairs."""
        chunks = lambda tensors: zip(*(tensor.chunk(parts, dim=1) for tensor in tensors))
        texts, ends = self.texts.chunk(parts, dim=1), self.ends.chunk(parts, dim=1)
        pieces = zip(chunks(self.images), chunks(self.colours), texts, ends)
        return [Batch(*piece, self.bad) for piece in pieces]

    def views(self):
        """V images (B, 3, s, s), normalised."""
        images = []
        for group, colours in zip(self.images, self.colours):           # all views of one size at once
            pixels = normalize(photometric(group.flatten(0, 1), colours.flatten(0, 1)))
            images += pixels.unflatten(0, group.shape[:2])
        return images

    def cut(self, multiple=1, whole=0, some=None):
        """The plan for TextTower, [(n, L), ...]: the n longest captions are cut to L tokens, the next n to the next L.

        It is made for the first `some` captions of each pair, or all. The first `whole` (0 or 1) stay uncut, in front:
        C^T reads the padding of caption 0. 32 pairs: [(32, 77), (16, 77), (16, 64), (96, 24), (96, 16)].

        Lengths of global captions differ the most. So the longest, as many as there are global ones to cut, form groups
        of B / 2, the others of 3 B: smaller ones would lose in small products what they save in padding. L is rounded
        up to a `multiple`, for the longest, which vary the most from batch to batch, to four times that; T at most.
        """
        ends, (_, B, T) = self.ends[whole:some], self.texts.shape
        lengths = sorted((ends.flatten() + 1).tolist(), reverse=True)
        long = B * min(len(ends), 2 - whole)
        first = [*range(0, long, -(-B // 2)), *range(long, len(lengths), 3 * B), len(lengths)]
        plan = [(B, T)] * whole
        for a, b in zip(first, first[1:]):
            step = 4 * multiple if a < long else multiple
            plan.append((b - a, min(-(-lengths[a] // step) * step, T)))
        return plan


def collate(samples):
    """Samples of Views -> Batch."""
    large, small, colours, tokens, bad = zip(*samples)
    images = [torch.stack(part, dim=1) for part in (large, small) if len(part[0])]
    colours = torch.stack(colours, dim=1).split([len(group) for group in images])
    tokens = torch.stack(tokens, dim=1)                                 # (U, B, T); the largest id ends a text
    return Batch(images, list(colours), tokens, tokens.argmax(dim=-1), sum(bad))


SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGUSR1') if hasattr(signal, name)]   # USR1: Slurm


def ignore_signals(worker):
    """Slurm and torchrun signal a whole process group. A worker that died of it would keep the run from saving."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def loader(views, sampler, workers):
    """The plain DataLoader that serves batch after batch of `sampler`."""
    return torch.utils.data.DataLoader(views, batch_sampler=sampler, num_workers=workers, collate_fn=collate,
                                       pin_memory=torch.cuda.is_available(), prefetch_factor=2 if workers else None,
                                       worker_init_fn=ignore_signals)


# --- 6. The built-in set: scenes with one dominant and one to three small objects, drawn -----------------------------

COLORS = {'red': (222, 30, 38), 'orange': (255, 132, 0), 'yellow': (255, 224, 30), 'lime': (160, 235, 40),
          'green': (20, 135, 50), 'cyan': (40, 215, 235), 'blue': (28, 90, 235), 'navy': (20, 25, 110),
          'purple': (130, 40, 180), 'pink': (255, 130, 195), 'white': (250, 250, 250), 'black': (25, 25, 25),
          'teal': (15, 135, 135), 'magenta': (215, 15, 140), 'maroon': (110, 15, 30), 'peach': (255, 195, 150)}
GROUNDS = {'grey': (132, 134, 136), 'beige': (205, 190, 162), 'brown': (116, 92, 74), 'olive': (122, 124, 86),
           'slate': (92, 104, 120), 'mauve': (158, 134, 148)}
PATTERNS = {            # where the second of two colours shows, 0 to 1; u and v count periods
    'plain': lambda u, v: 0 * u,
    'striped': lambda u, v: u % 1 < 0.42,
    'dotted': lambda u, v: (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.075,
    'checkered': lambda u, v: (u % 2 < 1) ^ (v % 2 < 1),
    'shaded': lambda u, v: (u - u.min()) / np.ptp(u),
}
# Outlines as complex x + iy of any scale, y down as in images; the first is filled and a second one is a hole in it.
T, TEN = np.linspace(0, 2 * np.pi, 60, endpoint=False), np.arange(10)
ROUND = np.exp(1j * T)
SHAPES = {
    'circle': [ROUND], 'ring': [ROUND, 0.5 * ROUND], 'square': [1j ** np.arange(4) * (1 + 1j)],
    'triangle': [np.array([-0.95j, 1 + 0.8j, -1 + 0.8j])],
    'star': [-1j * np.exp(0.2j * np.pi * TEN) * np.where(TEN % 2, 0.43, 1)],
    'flower': [ROUND * (0.55 + 0.45 * np.abs(np.sin(3 * T))), 0.2 * ROUND],
    'heart': [16 * np.sin(T) ** 3 - 1j * (13 * np.cos(T) - 5 * np.cos(2 * T) - 2 * np.cos(3 * T) - np.cos(4 * T))],
    'cross': [np.outer(1j ** np.arange(4), [0.34 + 1j, -0.34 + 1j, -0.34 + 0.34j]).ravel()],
    'moon': [np.r_[np.exp(1j * np.linspace(0.9, 5.38)), 0.45 + 0.8 * np.exp(1j * np.linspace(4.5, 1.78))]],
    'fish': [np.r_[0.25 - 0.75 * np.cos(T[4:-3]) - 0.55j * np.sin(T[4:-3]), -1 + 0.6j, -0.8, -1 - 0.6j]],
}
VOICES = {              # three describers: large, small, place, the main object, the others, a relation, the ground
    'IB': ('large', 'small', 'at the {}', 'there is {}', '{} is {}', 'the {a} is {r} the {b}', 'the background is {}'),
    'SV': ('big', 'little', 'in the {} part', 'we see {}', '{} sits {}', '{r} the {b} is the {a}', 'the ground is {}'),
    'LLA': ('huge', 'tiny', 'near the {}', 'the image shows {}', '{} appears {}', 'the {a} lies {r} the {b}',
            'everything lies on a {} surface'),
}
TEXTURES = list(PATTERNS)[:3]                   # of objects; grounds have all patterns
SS = 2                                          # supersampling per axis


def _woven(pattern, n, period, first, second, rng):
    """An (n, n) RGB image of two colours in a pattern at a random angle; period in its own (supersampled) pixels."""
    x = np.arange(n, dtype=np.float32) - n / 2
    z = (x + 1j * x[:, None]) * np.complex64(np.exp(1j * rng.uniform(0, np.pi)) / period)
    share = Image.fromarray((PATTERNS[pattern](z.real, z.imag) * 255.0).astype(np.uint8))
    return Image.composite(Image.new('RGB', (n, n), second), Image.new('RGB', (n, n), first), share)


def _layout(rng, size):
    """Two to four objects as dicts, the dominant one first; `at` is the centre x + iy, `side` the longer side."""
    objects, gaps = [], [0]
    count = rng.randint(2, 4)
    for k, (shape, color) in enumerate(zip(rng.sample(list(SHAPES), count), rng.sample(list(COLORS), count))):
        side = size * (rng.uniform(0.24, 0.32) if k else rng.uniform(0.42, 0.56))
        objects.append(dict(name=f'{color} {shape}', shape=shape, color=color, texture=rng.choice(TEXTURES), side=side,
                            role='small' if k else 'dominant'))
    while min(gaps) <= 0:       # until small ones are 2 px apart; they may reach 4 px into the dominant one's square
        for o in objects:
            o['at'] = complex(*(rng.uniform(2 + o['side'] / 2, size - 2 - o['side'] / 2) for _ in 'xy'))
        gaps = [max(abs((a['at'] - b['at']).real), abs((a['at'] - b['at']).imag)) - (a['side'] + b['side']) / 2
                - (2 if a['role'] == 'small' else -4) for a, b in combinations(objects, 2)]
    for o in objects:
        column, row = int(3 * o['at'].real / size), int(3 * o['at'].imag / size)
        o['place'] = f"{('top', '', 'bottom')[row]} {('left', '', 'right')[column]}".strip() or 'centre'
    return objects


def _paint(canvas, o, rng):
    """Paint object `o` on the supersampled canvas; returns the pixels it covers by half or more, (size, size) bool."""
    warp, turn = rng.uniform(0.87, 1.15), np.exp(1j * rng.uniform(-0.3, 0.3))
    lines = [(line.real * warp + 1j * line.imag) * turn for line in SHAPES[o['shape']]]
    low, high = (complex(f(lines[0].real), f(lines[0].imag)) for f in (np.min, np.max))
    zoom = o['side'] / max((high - low).real, (high - low).imag)
    fill, edge = Image.new('L', canvas.size), Image.new('L', canvas.size)
    for k, line in enumerate(lines):
        line = SS * (o['at'] + (line - (low + high) / 2) * zoom)
        points = list(zip(line.real, line.imag))
        ImageDraw.Draw(fill).polygon(points, fill=0 if k else 255)
        ImageDraw.Draw(edge).line(points + points[:2], 255, round(SS * (0.9 + 0.015 * o['side'])), joint='curve')
    fill.paste(255, mask=edge)
    color, dark = (tuple(int(f * c) for c in COLORS[o['color']]) for f in (rng.uniform(0.95, 1), 0.3))
    accent = tuple(int(0.6 * c + (90 if max(color) < 120 else 0)) for c in color)      # dark ones get lighter stripes
    canvas.paste(_woven(o['texture'], canvas.width, SS * (2.6 + 0.12 * o['side']), color, accent, rng), mask=fill)
    canvas.paste(dark, mask=edge)
    return np.asarray(fill.reduce(SS)) >= 128


def _relation(a, b):
    x, y = (a['at'] - b['at']).real, (a['at'] - b['at']).imag
    return ('above' if y < 0 else 'below') if abs(y) > abs(x) else ('left of' if x < 0 else 'right of')


def _captions(rng, objects, ground):
    """DreamLIP's keys, of which the long captions tell all, and five captions that name every object, for val."""
    main, *small = objects
    name, texture, other, grounded = main['name'], main['texture'], rng.choice(small)['name'], rng.choice(list(VOICES))
    raw = rng.choice([f'{name} picture', f'photo of a {name}', f'cute {name}', f'my {texture} {name}'])
    record, told = {'raw_caption': [raw]}, {}
    for voice, (large, little, place, first, also, relation, last) in VOICES.items():
        said = [(f"a {large if o is main else little} {o['name']}", place.format(o['place'])) for o in objects]
        told[voice] = ' and '.join(' '.join(pair) for pair in said)
        a, b = rng.sample(objects, 2)
        related = relation.format(a=a['name'], b=b['name'], r=_relation(a, b))
        record[f'short{voice}_captions'] = [rng.choice([f'a {large} {name}', f'a {texture} {name}',
                                                        f'a {name} and a {other}', f'a picture of a {large} {name}'])]
        long = [first.format(' '.join(said[0])), *(also.format(*pair) for pair in rng.sample(said[1:], len(small))),
                last.format(ground) if voice == grounded else related]
        record[f'long{voice}_captions'] = [sentence.capitalize() for sentence in long]
    names, around = (' and '.join(part) for part in ([f"a {o['name']}" for o in objects],
                                                      [f"a {o['name']} {_relation(o, main)} it" for o in small]))
    return record, [told['IB'], f'a {name} with {around}', f'the image shows {names}',
                    f"{told['SV']} on a {ground} ground", f"on a {ground} background there is {told['LLA']}"]


def _scene(job):
    """(seed, split, index, size) -> [(member name, bytes), ...]; an rng of its own makes it alike in any process."""
    seed, split, index, size = job
    rng = random.Random(f'{seed}/{split}/{index}')
    objects, pattern, (one, two) = _layout(rng, size), rng.choice(list(PATTERNS)), rng.sample(list(GROUNDS), 2)
    canvas = _woven(pattern, size * SS, SS * size * rng.uniform(0.12, 0.25), GROUNDS[one], GROUNDS[two], rng)
    mask = np.zeros((size, size), np.uint8)
    for k, o in enumerate(objects, 1):
        mask[_paint(canvas, o, rng)] = k
    image = Image.fromarray((np.asarray(canvas.reduce(SS)) * rng.uniform(0.85, 1.1)).clip(0, 255).astype(np.uint8))
    record, captions = _captions(rng, objects, f'plain {one}' if pattern == 'plain' else f'{pattern} {one} and {two}')
    webp, png = io.BytesIO(), io.BytesIO()
    image.save(webp, 'WEBP', quality=50)                                # about 1.1 KB
    members, record['objects'], present = {'webp': webp.getvalue()}, [], {o['name'] for o in objects}
    absent = [name for name in (f'{color} {shape}' for color in COLORS for shape in SHAPES) if name not in present]
    for k, o in enumerate(objects, 1):
        x, y, right, bottom = Image.fromarray(mask == k).getbbox()
        thing = {'name': o['name'], 'bbox': [x, y, right - x, bottom - y]}
        if split == 'val':
            thing |= {'role': o['role'], 'area': int((mask == k).sum()), 'negatives': rng.sample(absent, 9)}
        record['objects'].append(thing)
    if split == 'val':
        record['captions'] = captions
        Image.fromarray(mask).save(png, 'PNG', optimize=True)
        members['mask.png'] = png.getvalue()
    text = json.dumps(record, separators=(',', ':'))
    members['json'] = re.sub(r'\b([Aa]) (?=[aeiou])', r'\1n ', text).encode()      # a orange -> an orange
    return [(f'{index:06d}.{kind}', data) for kind, data in members.items()]


def make_scenes(root, train=8000, val=1000, seed=0, size=96, workers=None):
    """Draw the synthetic data set on all cores, as WebDataset tars root/{train,val}/00000.tar ... of 1,000 pairs each.

    Train members: KEY.webp (size x size RGB) and KEY.json: DreamLIP's caption keys and `objects` (name, and bbox: x, y,
    w, h in pixels). Val adds KEY.mask.png (uint8, 0 = ground, k = k-th of the objects) and to the json `captions` (5
    strings) and more of the objects: role, area in pixels, nine names of absent ones. Equal arguments give equal bytes,
    whatever `workers` is. Raises FileExistsError where a folder holds tars that this call would not replace: a reader
    of *.tar would mix the two sets.
    """
    shards = []
    for split, count in (('train', train), ('val', val)):
        stale = [p for p in Path(root, split).glob('*.tar') if p.name >= f'{-(-count // 1000):05d}.tar']
        if stale:
            raise FileExistsError(f'{stale[0]} is not part of a set of {count} {split} scenes: remove it first')
        shards += [(split, range(start, min(start + 1000, count))) for start in range(0, count, 1000)]
    # Ctrl-C is for this process: a worker that died of it could leave the pool waiting for ever.
    with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        for split, indices in tqdm(shards, 'drawing shards', disable=None):
            scenes = pool.map(_scene, [(seed, split, index, size) for index in indices], chunksize=25)
            path = Path(root, split, f'{indices[0] // 1000:05d}.tar')
            write_shard(path, (member for scene in scenes for member in scene))


# --- 7. Data from elsewhere: into shards (pack), captions onto shards (join) ------------------------------------------

IMAGE_COLUMNS = 'image', 'filepath', 'file_name', 'filename', 'path', 'file'
URL_COLUMNS = 'url', 'URL', 'image_url', 'Image Path', 'image_path'                     # DreamLIP's CSV: Image Path
CAPTION_COLUMNS = 'title', 'text', 'sentence'                                           # what others call a caption


def first_of(names, columns, path):
    found = [name for name in names if name in columns]
    if not found:
        raise ValueError(f"{path} has the columns {', '.join(map(str, columns))}, none of {', '.join(names)}")
    return found[0]


def read_rows(path):
    """JSONL, CSV, TSV or COCO-caption JSON -> {image name: record}. Rows of one image become one with all captions."""
    kind, rows = Path(path).suffix.lower(), {}
    try:
        text = Path(path).read_text(encoding='utf-8-sig')
        if kind == '.csv':
            listing = list(csv.DictReader(io.StringIO(text, newline=''), strict=True))
        elif kind == '.tsv':                # without quoting: a caption may begin with a quotation mark
            listing = list(csv.DictReader(io.StringIO(text, newline=''), delimiter='\t', quoting=csv.QUOTE_NONE))
        elif kind == '.json':
            whole = json.loads(text)
            names = {image['id']: image['file_name'] for image in whole['images']}
            listing = [{'image': names[a['image_id']], 'caption': a['caption']} for a in whole['annotations']]
        else:                               # not splitlines: JSON may hold U+2028, which that takes for a line's end
            listing = [json.loads(line) for line in text.split('\n') if line.strip()]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f'{path} cannot be read as JSONL, CSV, TSV or COCO captions ({error})') from None
    if not listing or not all(isinstance(row, dict) for row in listing):
        raise ValueError(f'{path} has no rows, or rows without names')
    column = first_of(IMAGE_COLUMNS, listing[0], path)
    for number, row in enumerate(listing, 1):
        if None in row:
            raise ValueError(f'row {number} of {path} has more fields than the first; put texts with commas in quotes')
        if not isinstance(row.get(column), str) or not row[column]:
            raise ValueError(f"row {number} of {path} has no '{column}'")
        record = {key: value for key, value in row.items() if key != column}
        told = next((row[name] for name in CAPTION_COLUMNS if row.get(name)), None)
        if told and 'caption' not in row:
            record['caption'] = told
        known = rows.setdefault(row[column], record)
        for key in sum(CAPTION_KEYS, []) if known is not record else ():
            told = [some if isinstance(some, list) else [some] for some in (known.get(key), record.get(key)) if some]
            if told:
                known[key] = list({json.dumps(some): some for some in sum(told, [])}.values())
    return rows


def claim(out, source, **more):
    """A folder of shards belongs to one source: a second run goes on with it, another one is refused (ValueError)."""
    label, stat = Path(out, 'source.json'), os.stat(source)
    made = {'source': f'{Path(source).resolve()}, {stat.st_size:,} bytes, {stat.st_mtime_ns}', **more}
    try:
        known = json.loads(label.read_text()) if label.exists() else None
    except ValueError:                                                  # a kill left it torn
        known = None
    if known != made and (known or list(Path(out).glob('*.tar'))):
        raise ValueError(f'{out} holds shards made from {known or "something else"}, not from {made}; give another '
                         'folder, or empty it')
    if known != made:
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(json.dumps(made))


def image_kind(data):
    """The extension for encoded bytes in a shard; ValueError for what shards cannot hold."""
    kind = Image.open(io.BytesIO(data)).format
    if kind not in (kinds := {'JPEG': 'jpg', 'MPO': 'jpg', 'PNG': 'png', 'WEBP': 'webp'}):          # MPO: of phones
        raise ValueError(f'{kind} is not among the kinds of image here; save it as JPEG, PNG or WebP')
    return kinds[kind]


def pack(source, images, out, size=5000):
    """Rows and a folder of images -> shards out/00000.tar ... of `size` rows. Goes on where it was interrupted.

    Image bytes are copied as they are. Rows whose image is missing or no image are named, counted and left out.
    """
    if size < 1 or not Path(images).is_dir():
        raise ValueError(f'--size {size} is less than 1' if size < 1 else f'{images} is no folder of images')
    rows, left_out = list(read_rows(source).items()), []
    claim(out, source, size=size)

    def members(number):
        for i, (name, record) in enumerate(rows[number * size:(number + 1) * size]):
            key = f'{number:05d}{i:05d}'
            try:
                data = Path(images, name).read_bytes()
                decode(data)
                if not caption_pool(record):
                    raise ValueError(f"no caption under {', '.join(record)}")
                kind = image_kind(data)
            except Exception as error:                                  # decoders raise what they like
                left_out.append(name)
                print(f'left out   {name}: {error}', file=sys.stderr)
                continue
            yield f'{key}.{kind}', data
            yield f'{key}.json', json.dumps(record).encode()

    for number in tqdm(range(-(-len(rows) // size)), desc='writing shards', disable=None):
        path = Path(out, f'{number:05d}.tar')
        if not path.exists():                                           # only whole shards have that name
            write_shard(path, members(number))
    if not list(Path(out).glob('*.tar')):
        raise ValueError(f'none of the {len(rows)} rows of {source} could be packed; are its images in {images}?')
    return len(rows), len(left_out)


def join(table, pattern, out):
    """DreamLIP's CSV onto img2dataset shards by URL: pairs it knows, with its captions as sentences, in new shards.

    The table goes through a database in a temporary file, for it may be larger than memory. -> (pairs, matched), of the
    shards that were not there yet.
    """
    csv.field_size_limit(1 << 24)
    try:
        shards, pairs, matched = Shards(pattern, caption_keys='url'), 0, 0
    except ValueError as error:
        raise ValueError(str(error).replace('captions that cannot be used', "no 'url' to join by").partition(
            '; name the right ones')[0]) from None
    rows = sqlite3.connect('')                                          # '' is a temporary file
    rows.execute('create table captions (url primary key, record)')
    with open(table, encoding='utf-8-sig', errors='replace', newline='') as file:
        reader = csv.DictReader(file)
        column = first_of(URL_COLUMNS, reader.fieldnames or (), table)
        try:
            for row in tqdm(reader, desc='reading the table', disable=None, leave=False):
                url, told = (row[column] or '').strip(), {key: sentences(row.get(key)) for key in CAPTION_KEYS[0]}
                if url and any(told.values()):
                    rows.execute('insert or ignore into captions values (?, ?)', (url, json.dumps(
                        {key: value for key, value in told.items() if value})))
        except csv.Error as error:
            raise ValueError(f'{table} is no CSV after its line {reader.line_num} ({error})') from None
    claim(out, table, shards=hashlib.sha1(repr((shards.paths, shards.stamps)).encode()).hexdigest())

    def members(number):
        nonlocal pairs, matched
        for i in np.flatnonzero(shards.pairs['shard'] == number):
            pairs += 1
            try:
                record, data = shards.record(i), shards.image(i)
                kind, url = image_kind(data), str(record.get('url') or '').strip()
                known = rows.execute('select record from captions where url = ?', (url,)).fetchone()
            except Exception as error:
                print(f'left out   {shards.name(i)}: {error}', file=sys.stderr)
                continue
            if known:
                matched += 1
                yield f'{number:05d}{i:07d}.{kind}', data
                yield f'{number:05d}{i:07d}.json', json.dumps(record | json.loads(known[0])).encode()

    for number in tqdm(range(len(shards.paths)), desc='joining', disable=None):
        path = Path(out, f'{number:05d}.tar')
        if not path.exists():                                           # only whole shards have that name
            write_shard(path, members(number))
    return pairs, matched


# --- 8. Commands -----------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse that answers in one sentence, exit status 1, and names the nearest flag for one it does not know."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        unknown = re.match('unrecognized arguments: ([^ =]+)', message)
        if unknown:
            commands = [parser for action in self._actions if isinstance(action.choices, dict)
                        for parser in action.choices.values()]
            known = [flag for parser in [self, *commands] for flag in parser._option_string_actions]
            near = difflib.get_close_matches(unknown[1], known, n=1)
            message = f"unknown argument '{unknown[1]}'; " + (f'did you mean {near[0]}?' if near else 'see --help')
        self.exit(1, f'error: {message}\n')


def cli(main):
    """Run a command: what a user can cause becomes one sentence and exit status 1, all else keeps its traceback."""
    if hasattr(sys.stdout, 'reconfigure'):                              # a terminal that cannot show a character
        sys.stdout.reconfigure(errors='backslashreplace')
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        # From a loader's worker it comes wrapped in a traceback, of which it is the last line.
        told = f"error: {(str(error).strip() or repr(error)).splitlines()[-1].removeprefix('ValueError: ')}"
        if dist.is_available() and dist.is_initialized():               # see train.leave: the usual way out may hang
            print(told, file=sys.stderr, flush=True)
            os._exit(1)
        sys.exit(told)
    except Exception:
        # Python would wait for loader workers before it ends, and they for it: they ignore the signal it sends them.
        if multiprocessing.active_children() or dist.is_available() and dist.is_initialized():
            traceback.print_exc()
            sys.stdout.flush()
            os._exit(1)
        raise


def sample_sheet(views, path, count=4):
    """What the student is shown, as a PNG: for some pairs the image, its views, and its text crops (Global, Local)."""
    canvas, y = Image.new('RGB', (1056, 900 * count), 'white'), 6       # taller than any text; cut at the end
    draw = ImageDraw.Draw(canvas)
    for i in np.linspace(0, len(views.shards) - 1, count, dtype=int).tolist():
        try:
            large, small, colours, captions = views.views(0, i)
        except Exception as error:                                      # a picture for the reader: do without this pair
            print(f'not drawn: {views.shards.name(i)}: {error}', file=sys.stderr)
            continue
        shown = [photometric(view[None], colour[None])[0] for view, colour in zip([*large, *small], colours)]
        for k, image in enumerate([decode(views.shards.image(i)), *shown]):
            tile = ImageOps.contain(v2.functional.to_pil_image(image), (112, 112), Image.BICUBIC)
            canvas.paste(tile, (6 + 116 * k, y))
        text = '\n'.join(textwrap.fill(f"{'G' if k < len(large) else 'L'}  {caption}", 150)
                         for k, caption in enumerate(captions))
        draw.text((6, y + 116), text, 'black', font_size=13)
        y = int(draw.textbbox((6, y + 116), text, font_size=13)[3]) + 12
    canvas.crop((0, 0, 1056, y)).save(path)


def inspect(pattern, caption_keys, preset, out, most=5000):
    """Counts and caption statistics of shards on the terminal, and a contact sheet PNG."""
    shards = Shards(pattern, caption_keys=caption_keys)
    some = np.linspace(0, len(shards) - 1, min(len(shards), most), dtype=int)
    pools, kinds, bad = [], Counter(), []
    for i in tqdm(some, desc='reading captions', disable=None, leave=False):
        try:
            pools.append(shards.pool(i))
            kinds.update(shards.record(i).keys())
        except ValueError as error:
            bad.append(f'{shards.name(i)}: {error}')
    if not pools:
        raise ValueError(f'no caption of {pattern} can be read ({bad[0]})')
    show = lambda values: ', '.join(f'{q:g} % {np.percentile(values, q):g}' for q in (0, 10, 50, 90, 100))
    size = sum(map(os.path.getsize, shards.paths)) / 2 ** 20
    print(f'{len(shards):,} pairs in {len(shards.paths)} shards, {size:,.1f} MiB')
    print(f"bytes per image      {show(shards.pairs['image_size'])}")
    print(f'keys                 {", ".join(f"{key} ({n / len(pools):.0%})" for key, n in kinds.most_common())}')
    print(f'captions per pair    {show([len(pool) for pool in pools])}')
    print(f'words per caption    {show([len(sentence.split()) for pool in pools for sentence in pool])}')
    print(f'unusable captions    {len(bad)} of {len(some)} read' + (f', first {bad[0]}' if bad else ''))
    print(f'an example           {" | ".join(pools[0])}')
    views = Views(shards, None, Config.preset(preset), seed=0, batch=1, augment='full' if preset != 'tiny' else 'crops')
    sample_sheet(views, out)
    print(f'views and text crops {out}')


def bench(pattern, preset, augment, rate, seconds):
    """What one worker does a second, by part, on the terminal: reading, decoding, and whole samples without tokens."""
    if seconds <= 0 or rate <= 0:
        raise ValueError(f'--seconds {seconds:g} and --rate {rate:g} must be above 0')
    shards, config = Shards(pattern), Config.preset(preset)
    views, some = Views(shards, None, config, 0, 1, augment=augment), np.random.default_rng(0).permutation(len(shards))
    torch.set_num_threads(1)                                            # as in a loader's worker
    texts = []
    for i in some[:500]:
        with contextlib.suppress(ValueError):                           # a broken pair
            texts += shards.pool(i)
    tokenizer = Tokenizer.learn(texts, 8192, config.context_length)
    parts = {'read image and json': lambda i: (shards.image(i), shards.record(i)),
             'decode': lambda i: decode(shards.image(i)), 'all views, uint8': lambda i: views.views(0, int(i)),
             'all views and tokens': lambda i: tokenizer(views.views(0, int(i))[-1])}
    for name, part in parts.items():
        with contextlib.suppress(Exception):
            part(some[0])                                               # warms up
        begun, done = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            with contextlib.suppress(Exception):                        # training, too, goes on after a bad pair
                part(some[done % len(some)])
            done += 1
        speed = done / (time.perf_counter() - begun)
        print(f'{name:22} {speed:9,.0f} samples/s')
    print(f'{rate:,.0f} samples/s need {-(-rate // speed):.0f} workers of this kind ({preset}, {augment})')


def main():
    parser = Parser(description=__doc__.split('\n')[0])
    commands = parser.add_subparsers(dest='command', required=True)
    make = commands.add_parser('make', help='draw the built-in set')
    make.add_argument('root', metavar='DIR')
    make.add_argument('--train', type=int, default=8000, help='training pairs')
    make.add_argument('--val', type=int, default=1000, help='held-out pairs')
    make.add_argument('--seed', type=int, default=0)
    show = commands.add_parser('inspect', help='counts, caption statistics and a contact sheet of shards')
    show.add_argument('shards', help='a folder, glob or pattern of tars')
    show.add_argument('--caption-keys', help='comma-separated json keys of the captions')
    show.add_argument('--preset', default='tiny', help='whose views to draw')
    show.add_argument('--out', default='samples.png', help='the contact sheet')
    into = commands.add_parser('pack', help='rows and a folder of images into shards')
    into.add_argument('rows', help='JSONL {"image", "captions"}, CSV or TSV with such columns, or COCO-caption JSON')
    into.add_argument('images', help='folder that the image names are relative to')
    into.add_argument('out', help='folder of the shards')
    into.add_argument('--size', type=int, default=5000, help='rows a shard')
    onto = commands.add_parser('join', help="DreamLIP's captions onto img2dataset's shards")
    onto.add_argument('table', help='CSV with a column of URLs and the seven caption columns')
    onto.add_argument('shards', help='a folder, glob or pattern of tars whose json has the url')
    onto.add_argument('out', help='folder of the new shards')
    speed = commands.add_parser('bench', help='samples a second of one loader worker, by part')
    speed.add_argument('shards', help='a folder, glob or pattern of tars')
    speed.add_argument('--preset', default='vit-b-16', help='whose views to make')
    speed.add_argument('--augment', choices=['full', 'crops'], default='full')
    speed.add_argument('--rate', type=float, default=1000, help='samples/s that the GPUs of a node take')
    speed.add_argument('--seconds', type=float, default=5, help='time for each part')
    args = parser.parse_args()
    if args.command == 'bench':
        bench(args.shards, args.preset, args.augment, args.rate, args.seconds)
    elif args.command == 'pack':
        rows, bad = pack(args.rows, args.images, args.out, args.size)
        print(f'{rows:,} images, {bad:,} left out, in {args.out}')
    elif args.command == 'join':
        pairs, matched = join(args.table, args.shards, args.out)
        print(f'{matched:,} of {pairs:,} pairs matched ({matched / max(pairs, 1):.1%}), in {args.out}' if pairs else
              f'{args.out} has all shards already')
    elif args.command == 'make':
        make_scenes(args.root, args.train, args.val, args.seed)
        print(f'{args.train:,} training and {args.val:,} held-out scenes in {args.root}')
    else:
        inspect(args.shards, args.caption_keys, args.preset, args.out)


if __name__ == '__main__':
    cli(main)
