"""Pairs in, batches of views out: shards, captions, tokenizer, text crops, image crops, loader.

A shard is a tar as img2dataset writes it. Members of one name up to the first dot are one pair:

    000000017.jpg     jpg, jpeg, png or webp
    000000017.json    {"raw_caption": "...", "shortIB_captions": ["...", "..."], ...}; see CAPTION_KEYS
    000000017.txt     the caption alone; used where the json has none
    000000017.mask.png     of drawn scenes, for lesson/suppression.py alone

Sections 3, 5 and 6 are the paper's: text crops, image crops, colours. Section 7 makes batches of them. Sections 1, 2 and
4, storage and a tokenizer, may be skipped.

A pair gives image crops and text crops (Sec. 3.1). An image crop with its colours changed is an image view. A text crop
is one sentence, or a few, from all captions of the pair. Random choices for a pair come from (seed, epoch, index of the
pair), the order of the pairs from (seed, epoch), that of the colour jitters from (seed, step). So a run sees the same
batches with any number of workers and GPUs, and can be resumed at any step.
"""
import argparse
import atexit
import glob
import gzip
import hashlib
import html
import io
import json
import multiprocessing
import os
import random
import re
import signal
import struct
import sys
import tarfile
import traceback
import unicodedata
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm
from tqdm.contrib.concurrent import process_map, thread_map

from cosmos import GLOBALS, Config

# --- 1. Errors, and files that are written whole ---------------------------------------------------------------------

class Refused(ValueError):
    """A mistake that the user can mend: an option, a path, a format. One sentence with value, place and remedy."""


class Unreadable(Refused):
    """A pair whose image or json cannot be decoded, or that has no caption. Training takes another one instead."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are Refused. Its help shows the program's docstring as it stands."""

    def __init__(self, *args, **settings):
        super().__init__(*args, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message):
        raise Refused(f'{message}; see {self.prog} --help')


def run(main):
    """A command: what is Refused becomes one sentence and exit status 1. All else is a bug and keeps its traceback."""
    try:
        main()
    except Refused as error:
        # A DataLoader raises the error of a worker again: "Caught Refused in ...", the traceback, "data.Refused: ...".
        message = re.sub(r'(?s)^Caught .*\ndata\.\w+: ', '', str(error))
        leave(f'error: {message.rstrip()}')
    except Exception:
        leave(traceback.format_exc())


def leave(message):
    """End the process with status 1. With a process group sys.exit may hang, so then it is os._exit."""
    if dist.is_initialized():
        print(message, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)
    sys.exit(message)


def warn(message):
    print(f'WARNING    {message}', file=sys.stderr)


@contextmanager
def replacing(path):
    """A temporary path beside `path`, which takes its place when the block ends well and is removed when not."""
    path = Path(path)
    temporary = path.with_name(f'{path.name}.partial')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, 'rb+') as file:
            os.fsync(file.fileno())  # else a crash of the machine may leave an empty file under the name
        temporary.replace(path)
    except OSError as error:
        raise Refused(f'{path} cannot be written ({error}); what was there before is whole') from None
    finally:
        with suppress(OSError):                         # it is gone, or never was
            temporary.unlink()


def save_tensors(path, value):
    """torch.save, whole or not at all."""
    with replacing(path) as temporary:
        try:
            torch.save(value, temporary)
        except RuntimeError as error:           # torch's error for a full disk
            raise OSError(error) from None


# --- 2. Shards: every header is read once, then any pair is one read away --------------------------------------------

# The index is an array of 9 integers a pair. A size of 0 bytes: the pair has no such member.
#     shard | image: offset, size | json: offset, size | txt: offset, size | mask: offset, size
# The column of the offset, by the ending of the name; that of the size is the next one.
COLUMN = {'jpg': 1, 'jpeg': 1, 'png': 1, 'webp': 1, 'json': 3, 'txt': 5, 'mask.png': 7}
FIRST_PAIRS = 20  # one of these must be usable, else no run starts: enough to tell wrong keys from a broken pair
NO_PAIR = 'no readable tar of images, each with a .json or .txt of the same name; see docs/data.md for the format'


def find_shards(paths, split=None):
    """A tar, a folder of tars, a quoted glob, or a list of these -> sorted paths of tars, each once.

    split: 'train' or 'val'. Of a folder that holds both as subfolders, this one is taken, and a line says so.
    Raises Refused where nothing is found. A line says how many paths lead nowhere, or are named twice.
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    found = []
    missing = []
    for path in map(str, paths):
        tars = []
        matches = [path] if os.path.exists(path) else glob.glob(path)
        for match in matches:
            if split and os.path.isdir(f'{match}/train') and os.path.isdir(f'{match}/val'):
                match = f'{match}/{split}'
                print(f'data       the half {match}')
            if os.path.isdir(match):
                tars += glob.glob(f'{glob.escape(match)}/*.tar')
            else:
                tars.append(match)
        found += tars
        if not tars:
            missing.append(path)
    if not found:
        raise Refused(f"'{missing[0]}' does not exist or holds no .tar file; give tars, or folders of them")
    if missing:
        warn(f'{len(missing)} of {len(missing) + len(found)} shards are missing, the first is {missing[0]}')
    unique = {os.path.realpath(path): path for path in sorted(found)}
    if len(unique) < len(found):
        warn(f'{len(found) - len(unique)} shards are named twice; each is used once')
    return sorted(unique.values())


def tar_files(path):
    """(name, offset of the data, size) of the members of a tar. Of a damaged tar those that tarfile can read.

    ignore_zeros: tars may be joined by `cat`; and tarfile then steps over most headers that it cannot read, without a
    word. Others end the reading, as a file that is cut off does: then a line says so.
    """
    length = os.path.getsize(path)
    end = 0                                             # of the last whole member
    whole = False
    with suppress(tarfile.TarError, ValueError):  # raised for a header that cannot be stepped over
        with tarfile.open(path, 'r:', ignore_zeros=True) as tar:
            for member in tar:
                if member.size < 0:                     # broken: tarfile would go back by it, and never end
                    break
                if member.offset_data + member.size > length:           # cut off
                    break
                yield member.name, member.offset_data, member.size
                end = member.offset_data + member.size
            else:                                       # no `break`: tarfile came to an end, of the file or before
                whole = tar.offset == length
    if not whole:
        warn(f'{path} is damaged behind byte {end:,}; what lies before it is used')


def scan_shard(path, number):
    """Headers of one tar -> the rows of its pairs in the index, in order of their images."""
    rows = {}                                           # by stem
    for name, offset, size in tar_files(path):
        _, _, kind = os.path.basename(name).partition('.')              # behind the first dot
        stem = name.removesuffix(kind)                  # with its folders
        column = COLUMN.get(kind.lower())
        row = rows.setdefault(stem, [number, 0, 0, 0, 0, 0, 0, 0, 0])
        if column and not row[column + 1]:              # of several images the first
            row[column:column + 2] = offset, size
    pairs = []
    for row in rows.values():
        image_size = row[2]
        json_size = row[4]
        txt_size = row[6]
        if image_size and (json_size or txt_size):
            pairs.append(row)
    if not pairs:
        warn(f'{path}: {NO_PAIR}')
    return np.array(sorted(pairs), np.int64).reshape(-1, 9)


class Shards:
    """Random access to all pairs of a set of tars.

    caption_keys: the json keys of the captions, joined by commas. split: see find_shards. index: a file that `save` has
    written; it is mapped, and no header is read. Whether it is of the same tars is for the caller to know: train.py
    compares the fingerprint, which is of their names and sizes. Without an index all headers are read, and the first
    pairs are tried.
    """

    def __init__(self, paths, caption_keys=None, split=None, index=None):
        self.paths = find_shards(paths, split)
        self.caption_keys = re.split(' *, *', caption_keys.strip()) if caption_keys else None
        self.sizes = list(map(os.path.getsize, self.paths))
        names = list(map(os.path.basename, self.paths))
        self.fingerprint = hashlib.sha1(repr([names, self.sizes]).encode()).hexdigest()
        if index:
            self.index = np.load(index, mmap_mode='r')
        else:
            # Few shards are not worth the seconds that processes take to start.
            each = process_map if len(self.paths) > 16 else thread_map
            tables = each(scan_shard, self.paths, range(len(self.paths)), chunksize=1,
                          desc='reading headers', disable=None)
            self.index = np.concatenate(tables)
            self.check_first_pairs()

    def __len__(self):
        return len(self.index)

    def save(self, path):
        with replacing(path) as temporary, open(temporary, 'wb') as file:
            np.save(file, self.index)

    def check_first_pairs(self):
        """Refused where none of them can be used: the captions have other keys, or the images are of another kind."""
        if not len(self):
            raise Refused(f'{self.paths[0]}: {NO_PAIR}')
        for i in range(min(FIRST_PAIRS, len(self))):
            try:
                self.pool(i)
                read_image(self.image(i))
                return
            except Unreadable as error:
                problem = error
        raise Refused(f'{self.name(i)} and the pairs before it cannot be used ({problem}); name the captions with '
                      '--caption-keys, or look at the shards with python -m extras.prepare inspect')

    def member(self, i, kind):
        """The bytes of a member of pair i; b'' where it has none."""
        column = COLUMN[kind]
        shard, offset, size = self.index[i, [0, column, column + 1]].tolist()
        return self.read(shard, offset, size) if size else b''

    def read(self, shard, offset, size):
        with open(self.paths[shard], 'rb') as file:  # anew for each read, so that there are never too many open
            file.seek(offset)
            return file.read(size)

    def image(self, i):
        """The encoded bytes of image i."""
        return self.member(i, 'jpg')            # one column for all kinds of images

    def record(self, i):
        """The json of pair i as a dict, with the .txt under 'txt'. A bare list becomes {'captions': list}.

        Raises Unreadable for what is no JSON.
        """
        try:
            record = json.loads(self.member(i, 'json') or '{}')
        except ValueError as error:
            raise Unreadable(f'its json cannot be read: {error}') from None
        if not isinstance(record, dict):
            record = {'captions': record}
        text = self.member(i, 'txt')
        if text and not record.get('txt'):
            record['txt'] = text.decode('utf-8', 'replace')
        return record

    def pool(self, i):
        """All sentences of pair i. Unreadable when there is none."""
        record = self.record(i)
        pool = caption_pool(record, self.caption_keys)
        if not pool:
            raise Unreadable(f"no usable caption under the keys {', '.join(sorted(record)) or '(none)'}")
        return pool

    def name(self, i):
        """Where pair i lies, for messages: shard and member, and the name of the file that it was packed from."""
        shard, offset = self.index[i, :2].tolist()
        # The block before the data is the member's header in the tar, and that begins with the name.
        header = self.read(shard, offset - tarfile.BLOCKSIZE, 100)
        name = header.rstrip(b'\0').decode('utf-8', 'replace')
        with suppress(Unreadable, KeyError):
            name += f" ({self.record(i)['file']})"    # extras.prepare keeps it there
        return f'{self.paths[shard]}:{name}'


# --- 3. Captions: a pool of sentences per pair, and text crops from it ---------------------------------- Sec. 3.1 ---

SHORT = ['shortIB_captions', 'shortSV_captions', 'shortLLA_captions']
LONG = ['longIB_captions', 'longSV_captions', 'longLLA_captions']
# The paper's main data. code≠paper, which speaks of the long captions: the raw and the short ones are used as well.
DREAMLIP = ['raw_caption', *SHORT, *LONG]
CAPTION_KEYS = [                # the first family that has a sentence is the pool
    DREAMLIP,
    ['captions'],
    ['original_caption', 'caption'],            # PixelProse, or a caption alone
    ['txt'],
]
POOL_KEYS = {'raw': 'raw_caption', 'short': ','.join(SHORT), 'long': ','.join(LONG), 'all': None}  # --caption-pool

# ours: a sentence ends at a newline, at '</s>', or at a full stop before white space or the end; so "3.5 m" stays
# whole. A stop behind a single letter ends none: "J. Smith" and "e.g. a dog" stay whole, too. But one behind "dog's"
# does: that s is no single letter.
BREAK = re.compile(r"""
    \n
    | </s>
    | (?<!                  # the stop is not behind
          (?<! \w['’] )     #     (not the s of "dog's")
          \b [^\W\d_]      #     a single letter
      )
      \.
      (?= \s | $ )""", re.VERBOSE)


def sentences(value, whole=False):
    """A string, or a list of strings, -> its sentences. whole: each string is one, and is not split."""
    found = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str):
            parts = [item] if whole else BREAK.split(item)
            found += [part.strip() for part in parts if part.strip()]
    return found


def caption_pool(record, keys=None):
    """The record's sentences as one flat list, duplicates kept; [] where it has none."""
    for family in [keys] if keys else CAPTION_KEYS:
        pool = []
        for key in family:
            value = record.get(key)
            # As released, items of DreamLIP's lists and original_caption are sentences already, and not split. ours: a
            # string under DreamLIP's keys is split. (The released code takes it for a list, of its letters.)
            is_sentences = key in DREAMLIP and isinstance(value, list)
            pool += sentences(value, whole=is_sentences or key == 'original_caption')
        if pool:
            return pool
    return []


def text_crops(pool, rng, global_texts, local_texts):
    """Globals of 1-5 sentences joined by '. ', then single sentences -> list of global_texts + local_texts strings.

    Each global is a draw of its own without replacement, in random order; the locals are one more draw.
    paper silent: the order, ". ", and a pool that is smaller than the count. Such a pool is repeated whole, in its own
    order, and a random rest follows.
    """
    def draw(count):
        if count <= len(pool):
            return rng.sample(pool, count)
        repeats, rest = divmod(count, len(pool))
        return pool * repeats + rng.sample(pool, rest)

    captions = []
    for _ in range(global_texts):
        count = rng.randint(1, 5)
        captions.append('. '.join(draw(count)))
    return captions + draw(local_texts)


# --- 4. Tokenizer: CLIP's byte-pair encoding, with CLIP's merges or learned ones -------------------------------------

VOCAB_URL = 'https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz'
VOCAB_SHA256 = '924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a'
MOST_WORDS = 200_000    # whose ids are kept, for `word_ids`: the web never runs out of new words, memory does
LEARN_FROM = 5000       # merges are learned from so many words, the most frequent ones
VOCAB_HELP = (f'give the file at {VOCAB_URL} by --vocab PATH or COSMOS_VOCAB, or learn a vocabulary from your captions '
              'by --vocab learn')

# Every byte is shown as one visible character, so that merges are lines of text: printable Latin-1 as itself and first,
# the other 68 from U+0100 on. NB: this order is ids 0..255; with any other, released weights quietly read noise.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_SYMBOL = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + k) for k, byte in enumerate(OTHERS)}

SPECIAL = '<start_of_text>', '<end_of_text>'    # as open_clip spells them
# CLIP's pattern has \p{L} and \p{N}, which `re` lacks: [^\W\d_] is a letter, \d a digit. Of other numbers, as ½,
# `plain` makes words of their own.
WORD = re.compile(r"<start_of_text>|<end_of_text>|'(?:[stmd]|re|ve|ll)|[^\W\d_]+|\d|(?:[^\w\s]|_)+")


def clean(text):
    """The text as ftfy rewrites it: no control characters, plain quotes, ligatures and widths, U+FFFD for lone
    surrogates."""
    text = html.unescape(html.unescape(text))   # twice: web captions hold '&amp;lt;'
    text = re.sub('[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]', '', text)
    if not text.isascii():
        text = ''.join(map(plain, text))
        text = re.sub('[\u02bc\u2018-\u201b]', "'", text)
        text = re.sub('[\u201c-\u201f]', '"', text)
        text = re.sub('[\ud800-\udfff]', '\ufffd', text)
    return unicodedata.normalize('NFC', text)


@lru_cache
def plain(char):
    """One character without ligature and width, as ftfy has it.

    Numbers such as ² ½ Ⅷ ① are no digits, so they would pass as letters in WORD, and 'm²' as one word. Spaces keep them
    apart.
    """
    if char == '\ufb05':
        return 'ſt'                                     # NFKC would give 'st'
    ligature_or_wide = '[\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\ufb00-\ufb06\uff01-\uffef]'
    if re.match(ligature_or_wide, char):
        char = unicodedata.normalize('NFKC', char)
    if char.isnumeric() and not char.isalpha() and not char.isdecimal():
        return f' {char} '
    return char


def symbols_of(word):
    """'cat' -> ['c', 'a', 't</w>']: a symbol per UTF-8 byte, the last one marked: 'cat' is not the 'cat' of 'cats'."""
    symbols = [BYTE_SYMBOL[byte] for byte in word.encode()]
    symbols[-1] += '</w>'
    return symbols


def fuse(symbols, left, right):
    """Joins neighbours `left`, `right`, from left to right: fuse(['a', 'a', 'a'], 'a', 'a') is ['aa', 'a']."""
    fused = []
    for symbol in symbols:
        if symbol == right and fused and fused[-1] == left:
            fused[-1] += symbol
        else:
            fused.append(symbol)
    return fused


def fetch_vocab():
    """Path of CLIP's merges in torch's cache, downloaded on first use. Refused where that fails."""
    path = Path(torch.hub.get_dir(), 'bpe_simple_vocab_16e6.txt.gz')
    if not path.exists():  # ranks may fetch side by side: each download is renamed when it is whole
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(VOCAB_URL, str(path), VOCAB_SHA256, progress=False)
        except (OSError, RuntimeError) as error:  # RuntimeError: another SHA-256, as of a proxy's page
            raise Refused(f'{VOCAB_URL} cannot be fetched ({error}); {VOCAB_HELP}') from None
    return path


class Tokenizer:
    """CLIP's tokenizer: clean, split into words, byte-pair encode each. tokenizer(texts) -> (n, context_length) int64

    merges: lines 'left right', most urgent first. Ids, from 0: 256 bytes, 256 bytes that end a word, one for each
    merge, start, end. The end is the highest, because the text tower finds it by argmax. Padding is 0.
    Ids equal CLIP's (simple_tokenizer.py with ftfy and regex). ours: ftfy's repair of wrongly decoded text ('Ã©' for
    'é', C1 controls) is left out; and U+0345, which regex takes for a letter, is none here.
    """

    def __init__(self, merges, context_length=77):
        self.merges = list(merges)
        self.context_length = context_length
        self.rank = {tuple(line.split()): i for i, line in enumerate(self.merges)}
        byte_symbols = list(BYTE_SYMBOL.values())
        closing = [f'{symbol}</w>' for symbol in byte_symbols]
        fused = [left + right for left, right in self.rank]
        symbols = [*byte_symbols, *closing, *fused, *SPECIAL]
        # Two merges may give one symbol, as a + bc and ab + c. It has the id of the later one, as in CLIP.
        self.ids = {symbol: i for i, symbol in enumerate(symbols)}
        self.vocab_size = len(symbols)
        self.sot, self.eot = [self.ids[symbol] for symbol in SPECIAL]

    @classmethod
    def clip(cls, path=None, context_length=77):
        """CLIP's 48,894 merges: from `path`, else $COSMOS_VOCAB, else cache or net. Refused if it's another file."""
        path = os.path.expanduser(path or os.environ.get('COSMOS_VOCAB') or fetch_vocab())
        data = Path(path).read_bytes() if os.path.isfile(path) else b''
        if hashlib.sha256(data).hexdigest() != VOCAB_SHA256:
            raise Refused(f"{path} is absent or not CLIP's vocabulary (wrong SHA-256; perhaps a git-lfs pointer or a "
                          f'web page): remove it, then {VOCAB_HELP}')
        lines = gzip.decompress(data).decode().split('\n')
        return cls(lines[1:48895], context_length)  # line 0 is a header; CLIP does not use the rest

    @classmethod
    def learn(cls, texts, vocab_size, context_length=77):
        """Merges the most frequent pair (of equals the first met) up to `vocab_size`, or until none occurs twice."""
        tally = Counter()
        for text in texts:
            tally.update(cls.split(text))
        words = {word: symbols_of(word) for word, _ in tally.most_common(LEARN_FROM) if word not in SPECIAL}
        # A dict, because a pair may win twice: (abc, d), where abc was fused from a + bc, and again where it was fused,
        # later, from ab + c. Its first place counts.
        merges = {}
        merges_left = vocab_size - 2 * 256 - len(SPECIAL)
        for _ in tqdm(range(merges_left), 'learning merges', leave=False, disable=None):
            count = Counter()   # pair of symbols -> how often it occurs in all texts
            for word, symbols in words.items():
                for pair in zip(symbols, symbols[1:]):
                    count[pair] += tally[word]
            if not count or max(count.values()) < 2:
                break
            pair = max(count, key=count.get)
            merges[' '.join(pair)] = None
            for word, symbols in words.items():
                if pair[0] in symbols:
                    words[word] = fuse(symbols, *pair)
        return cls(merges, context_length)

    @staticmethod
    def split(text):
        """Words of the cleaned text by CLIP's pattern: letters, single digits, other signs, 's 't 're 've 'm 'll 'd."""
        return WORD.findall(clean(text).lower())

    @lru_cache(MOST_WORDS)
    def word_ids(self, word):
        """Ids of one word: fuses the pair of lowest rank while there is any. Cached: few words fill most texts."""
        symbols = [word] if word in SPECIAL else symbols_of(word)
        while True:
            known = [pair for pair in zip(symbols, symbols[1:]) if pair in self.rank]
            if not known:
                break
            left, right = min(known, key=self.rank.get)
            symbols = fuse(symbols, left, right)
        return [self.ids[symbol] for symbol in symbols]

    def encode(self, text):
        """Ids without start, end and padding."""
        return sum(map(self.word_ids, self.split(text)), [])

    def __call__(self, texts):
        """n texts (or one) -> (n, context_length) int64: start, ids, end, zeros. A long text loses its last ids."""
        if isinstance(texts, str):
            texts = [texts]
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in zip(ids, texts):
            encoded = [self.sot, *self.encode(text)[:self.context_length - 2], self.eot]
            row[:len(encoded)] = torch.tensor(encoded)
        return ids


# --- 5. Image crops: boxes, pixels and flips, in the loader's workers ------------------------------------ Sec. 3.1 ---

MEAN = (0.48145466, 0.4578275, 0.40821073)      # OpenAI's, as released
STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = v2.InterpolationMode.BICUBIC
ASPECTS = (3 / 4, 4 / 3)                        # of crops, least and most
# What Pillow raises for bytes that are no image: SyntaxError for a broken PNG, LookupError and struct.error in EXIF.
BROKEN_IMAGE = OSError, ValueError, SyntaxError, EOFError, LookupError, struct.error, Image.DecompressionBombError
ORIENTATION = 0x112                             # the EXIF tag; 5 to 8 turn the image by 90 degrees


@contextmanager
def pillow_errors(name):
    """Inside this block, Pillow's errors for bytes that are no image become Unreadable, with this name."""
    try:
        yield
    except BROKEN_IMAGE as error:
        raise Unreadable(f'{name} is no image that can be read ({error})') from None


def open_image(source):
    """A path, an open file or encoded bytes -> Pillow image, of which only the header is read yet."""
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def read_image(source):
    """A path, an open file or encoded bytes -> Pillow image, turned as EXIF says. Else Unreadable, with the path."""
    with pillow_errors('its image' if isinstance(source, bytes) else source):
        return ImageOps.exif_transpose(open_image(source))


class Kind(NamedTuple):
    """How a view is made."""
    size: int                       # side of the view, in pixels
    scale: tuple                    # least and most share of the image's area
    blur: float                     # probability
    solarize: float = 0.0           # probability


def view_kinds(config, global_images, local_images, crop_min=0.4):
    """The kinds of all V views, globals first, as released. crop_min: the smallest share of the image in a global."""
    scale = crop_min, 1.0
    first = Kind(config.image_size, scale, blur=1.0)
    other = Kind(config.image_size, scale, blur=0.1, solarize=0.2)
    local = Kind(config.local_image_size, (0.05, 0.4), blur=0.5)
    return [first] + [other] * (global_images - 1) + [local] * local_images


def draw_boxes(height, width, kinds, rng):
    """A random box (y, x, h, w) in an image of this size for each kind of view, as torchvision draws them.

    get_params reads torch's global generator. It is seeded from rng here, and restored afterwards.
    """
    image = torch.empty(1, 1, 1).expand(1, height, width)               # only its size counts
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(rng.getrandbits(32))
        return [v2.RandomResizedCrop.get_params(image, kind.scale, ASPECTS) for kind in kinds]


def image_crops(data, kinds, rng, flip=True):
    """Encoded bytes -> one random crop for each kind of view, (3, s, s) uint8, and their boxes (y, x, h, w)."""
    with pillow_errors('its image'):
        image = open_image(data)
        width, height = image.size
        if image.getexif().get(ORIENTATION) in (5, 6, 7, 8):
            width, height = height, width
    boxes = draw_boxes(height, width, kinds, rng)
    # Pillow decodes a JPEG at 1/2, 1/4 or 1/8 of its size in much less time. No crop may then have fewer pixels than its
    # view. Say the image has 1000 x 800 pixels, and the tightest crop is one of 200 for a view of 96. Then the image may
    # be 200 / 96 = 2.08 times smaller: 480 x 384 pixels are enough, and `draft` takes the next size above, 500 x 400.
    most_shrink = min(min(h, w) / kind.size for (_, _, h, w), kind in zip(boxes, kinds))
    enough = [ceil(side / most_shrink) for side in image.size]          # as stored: draft comes before the EXIF turn
    with pillow_errors('its image'):
        image.draft('RGB', enough)
        pixels = TF.pil_to_tensor(ImageOps.exif_transpose(image).convert('RGB'))
    zoom = min(pixels.shape[1] / height, pixels.shape[2] / width)       # what draft took: 1, or about 1/2, 1/4, 1/8
    crops = []
    for box, kind in zip(boxes, kinds):
        y, x, h, w = [int(number * zoom) for number in box]  # rounded down: never over an edge
        crop = TF.resized_crop(pixels, y, x, h, w, [kind.size, kind.size], BICUBIC)
        if flip and rng.random() < 0.5:
            crop = crop.flip(-1)
        # Pillow interleaves colours, and a crop keeps that. The operations below are faster on a plane for each.
        crops.append(crop.contiguous())
    return crops, boxes


# --- 6. Colours: in batches, where the model runs -------------------------------------------------------- Sec. 3.1 ---

class Colours(NamedTuple):
    """How the colours of a view change. The defaults change nothing."""
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0            # turn of the colour circle; 1 is once around
    gray: float = 1.0           # 0 takes all colour
    blur: float = 0.0           # standard deviation in pixels
    solarize: float = 1.0       # brighter values than this are inverted


def draw_colours(kind, rng):
    """Colours of one view, with the probabilities and ranges as released."""
    uniform = rng.uniform
    changes = {}
    if rng.random() < 0.8:
        changes.update(brightness=uniform(0.6, 1.4), contrast=uniform(0.6, 1.4),
                       saturation=uniform(0.8, 1.2), hue=uniform(-0.1, 0.1))
    if rng.random() < 0.2:
        changes['gray'] = 0.0
    if rng.random() < kind.blur:
        changes['blur'] = uniform(0.1, 2.0)
    if rng.random() < kind.solarize:
        changes['solarize'] = 127.5 / 255  # between two of the 256 values
    return Colours(**changes)


# Below, x is (n, 3, h, w) in [0, 1] and a strength (n, 1, 1, 1).

def brightness(x, strength):
    return (x * strength).clamp_(0, 1)


def contrast(x, strength):
    mean = TF.rgb_to_grayscale(x.mean(dim=(2, 3), keepdim=True))        # the grey image has the same mean
    return torch.lerp(mean, x, strength).clamp_(0, 1)


def saturation(x, strength):
    return torch.lerp(TF.rgb_to_grayscale(x), x, strength).clamp_(0, 1)


def hue(x, turn):
    """Turn the hue: RGB to HSV and back, by the textbook."""
    red, green, blue = x.split(1, dim=1)                                # each (n, 1, h, w)
    value = x.amax(dim=1, keepdim=True)
    chroma = value - x.amin(dim=1, keepdim=True)
    # 6 hue, in a case for each largest channel: green or blue, then red over both. Of gray any hue will do.
    share = 1 / chroma.clamp_min(1e-8)
    six_hue = torch.where(value == green, (blue - red) * share + 2, (red - green) * share + 4)
    six_hue = torch.where(value == red, (green - blue) * share, six_hue)
    turned = six_hue / 6 + turn + 1                                     # + 1: never below 0
    # Back: channel = value - chroma * clamp(min(k, 4 - k), 0, 1), k = (start + 6 hue) mod 6. Of red, hue 0, k is 5, 3, 1,
    # and the clamp 0, 1, 1: the red channel stays at value.
    start = torch.tensor([5, 3, 1], device=x.device).view(3, 1, 1)      # of red, green, blue
    k = 6 * torch.frac(turned + start / 6)                                  # (n, 3, h, w)
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


def blur(x, sigma):
    """Gaussian blur; borders are mirrored. The kernel ends after 6 pixels, three of the largest sigma."""
    offsets = torch.arange(-6, 7, device=x.device)
    # The softmax makes its sum 1. The clamp avoids denormal numbers, which are slow on a CPU.
    kernel = (-0.5 * (offsets / sigma) ** 2).clamp_min(-80).softmax(-1)     # (n, 1, 1, 13)
    kernel = kernel.repeat_interleave(3, dim=0)    # (3 n, 1, 1, 13): for each channel
    padded = F.pad(x, [6, 6, 6, 6], 'reflect').flatten(0, 1)  # (3 n, h + 12, w + 12): one image of 3 n channels
    rows = F.conv2d(padded, kernel, groups=len(kernel))
    return F.conv2d(rows, kernel.mT, groups=len(kernel)).view_as(x)


def solarize(x, threshold):
    return torch.where(x > threshold, 1 - x, x)


OPERATIONS = [              # one for each field of Colours
    brightness, contrast, saturation, hue,
    saturation,             # gray: one without any saturation
    blur, solarize]
JITTERS = 0, 1, 2, 3        # those that come in a random order, before the others


def recolour(images, colours, order):
    """uint8 (B, 3, h, w), the numbers of Colours (B, 7), the order of the JITTERS -> float32 in [0, 1]."""
    neutral = Colours()
    x = images.float().div_(255)
    for column in [*order, *range(len(JITTERS), len(OPERATIONS))]:
        strength = colours[:, column]    # on the CPU: on a GPU the next line would wait for it
        changed = (strength != neutral[column]).nonzero().flatten()
        if len(changed):
            strength = strength[changed].view(-1, 1, 1, 1).to(x.device, non_blocking=True)
            changed = changed.to(x.device, non_blocking=True)
            x[changed] = OPERATIONS[column](x[changed], strength)
    return x


def normalize(images):
    """uint8, or float in [0, 1], (..., 3, h, w) -> float32, with the released mean and deviation."""
    return TF.normalize(TF.to_dtype(images, scale=True), MEAN, STD)


# --- 7. Samples and batches ------------------------------------------------------------------------------------------

@lru_cache(1)
def shuffled(seed, epoch, pairs):
    """The order of all pairs in an epoch, (pairs,): a pure function, so no state has to be saved to go on with it."""
    return np.random.default_rng((seed, epoch)).permutation(pairs).astype(np.uint32)


def check_batch(batch, pairs, parts):
    """Refused: a batch that the set cannot fill, or that cannot be cut into equal parts."""
    if batch > pairs:
        raise Refused(f'--batch {batch} is larger than the set of {pairs} pairs; lower --batch')
    if batch % parts:
        raise Refused(f'--batch {batch} cannot be cut into {parts} parts (processes x --accum); choose a multiple of '
                      f'{parts}')


@dataclass
class Order:
    """Which pairs make batch `step`: a pure function of (seed, step), cut into equal slices for the ranks.

    Yields, for every step in [start, stop), this rank's list of (epoch, index of the pair). An epoch holds
    pairs // batch whole batches; the rest of its order is left out.
    """
    pairs: int
    batch: int                  # of all ranks
    start: int
    stop: int
    seed: int = 0
    rank: int = 0
    world: int = 1

    def permutation(self, epoch):    # a subclass may have another, as in lesson/experiments.py
        return shuffled(self.seed, epoch, self.pairs)

    def __iter__(self):
        share = self.batch // self.world
        for step in range(self.start, self.stop):
            epoch, number = divmod(step, self.pairs // self.batch)
            begin = number * self.batch + self.rank * share
            indices = self.permutation(epoch)[begin:begin + share].tolist()
            yield [(epoch, index) for index in indices]


class Counts(NamedTuple):
    """How many views and captions a pair gives: V = global_images + local_images, U = global_texts + local_texts. The
    first rows of Table 5 have one global image and one global text."""
    global_images: int = GLOBALS
    local_images: int = 6
    global_texts: int = GLOBALS
    local_texts: int = 6


MOST_BAD = 1000         # pairs in a row that cannot be read


@dataclass
class Crops(Dataset):
    """The training set: (epoch, index of the pair) -> the crops of the pair, for `collate`.

    augment: 'full' is the released recipe; 'crops' neither changes colours nor flips, for captions that name colours
    and sides. crop_min: the smallest share of the image in a global crop.
    A pair that is Unreadable is named, counted, and replaced by another one, drawn at random; that may be in the batch
    already, which is rare in a set that is much larger than a batch.
    """
    shards: Shards
    tokenizer: Tokenizer
    config: Config
    seed: int
    counts: Counts = Counts()
    augment: str = 'full'
    crop_min: float = 0.4

    def __post_init__(self):
        self.kinds = view_kinds(self.config, self.counts.global_images, self.counts.local_images, self.crop_min)

    def __getitem__(self, where):
        epoch, index = where
        rng = random.Random(f'{self.seed} {epoch} {index} replacement')
        for bad in range(MOST_BAD):                     # how many were bad so far
            try:
                crops, colours, captions, _ = self.sample(epoch, index)
                return crops, torch.tensor(colours), self.tokenizer(captions), bad
            except Unreadable as error:
                print(f'skipped {self.shards.name(index)}: {error}', file=sys.stderr)
            index = rng.randrange(len(self.shards))     # a replacement
        raise Refused(f'{MOST_BAD} pairs in a row cannot be read; look at the shards with python -m extras.prepare '
                      'inspect')

    def sample(self, epoch, index):
        """-> V crops (3, s, s) uint8, the Colours of each, U captions as strings, and the V boxes; globals first."""
        counts = self.counts
        full = self.augment == 'full'
        # A generator for texts and one for images, so that options of captions do not change the image crops.
        text_rng = random.Random(f'{self.seed} {epoch} {index} texts')
        image_rng = random.Random(f'{self.seed} {epoch} {index} images')
        captions = text_crops(self.shards.pool(index), text_rng, counts.global_texts, counts.local_texts)
        crops, boxes = image_crops(self.shards.image(index), self.kinds, image_rng, flip=full)
        colours = [draw_colours(kind, image_rng) if full else Colours() for kind in self.kinds]
        return crops, colours, captions, boxes


class Batch(NamedTuple):
    """What a step needs of B pairs."""
    crops: list             # V image crops (B, 3, s, s) uint8
    colours: torch.Tensor   # (B, V, 7), the numbers of Colours, on the CPU
    texts: list             # U captions (B, T) int64 for the student, globals first; all but caption 0 are cut
    teacher_texts: list     # the global captions for the teacher, all of one T
    bad: int                # how often a pair, or its replacement, could not be read

    def to(self, device):
        """The batch on a device, without waiting for it."""
        moved = {}
        for name in ('crops', 'texts', 'teacher_texts'):
            moved[name] = [x.to(device, non_blocking=True) for x in getattr(self, name)]
        return self._replace(**moved)

    def views(self, seed_and_step):
        """V images (B, 3, s, s), float32, normalised. seed_and_step decide the order of the jitters on all ranks."""
        views = []
        for k, crops in enumerate(self.crops):
            # ours: view k of all pairs has one order of jitters. The released code draws one for every image.
            order = random.Random(f'{seed_and_step} {k}').sample(JITTERS, 4)
            views.append(normalize(recolour(crops, self.colours[:, k], order)))
        return views


def cut(captions, multiple):
    """A list of (B, T) ids, all cut behind the end of the longest, rounded up to a multiple; [] -> []."""
    ends = [ids.argmax(dim=1).max().item() for ids in captions]         # the largest id ends a text
    longest = max(ends, default=0) + 1
    length = ceil(longest / multiple) * multiple                        # beyond T a slice ends at T
    return [ids[:, :length] for ids in captions]


def collate(samples, multiple=1, whole_first=True, global_texts=GLOBALS):
    """Samples -> Batch. Global captions, the first ones, are cut to the longest of them, local ones to the longest of
    those.

    multiple: of the lengths; 8 is faster in half precision. whole_first: the student's caption 0 keeps all T positions,
    because C^T reads its padding, too.
    """
    crops, colours, ids, bad = default_collate(samples)     # ids (B, U, T)
    captions = ids.unbind(dim=1)
    globals_cut = cut(captions[:global_texts], multiple)
    locals_cut = cut(captions[global_texts:], multiple)
    first = captions[0] if whole_first else globals_cut[0]
    texts = [first, *globals_cut[1:], *locals_cut]
    return Batch(crops, colours, texts, globals_cut, int(bad.sum()))


SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1                 # USR1: Slurm


def ignore_signals(worker):
    """Slurm and torchrun signal all processes. A worker that died of it would keep the run from saving."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers():
    """Python would send SIGTERM at its exit, and wait. The workers ignore it, so the wait would never end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)           # else torch raises an error of its own for each that ends
    for worker in multiprocessing.active_children():
        worker.kill()


def loader(crops, batches, workers, multiple=1, whole_first=True):
    """The plain DataLoader that serves batch after batch of an Order."""
    atexit.register(end_workers)
    # A forked worker shares the index, a spawned one gets a copy. (Without workers there must be no context.)
    context = 'fork' if workers and sys.platform == 'linux' else None
    make_batch = partial(collate, multiple=multiple, whole_first=whole_first, global_texts=crops.counts.global_texts)
    return DataLoader(crops, batch_sampler=batches, num_workers=workers, collate_fn=make_batch,
                      pin_memory=torch.cuda.is_available(), worker_init_fn=ignore_signals,
                      multiprocessing_context=context)
