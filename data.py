"""Pairs in, batches of views out: shards, captions, tokenizer, text crops, image crops, loader.

A shard is a tar as img2dataset writes it. Members that share a stem are one pair:

    000000017.jpg     jpg, jpeg, png or webp
    000000017.json    {"raw_caption": "...", "shortIB_captions": ["...", "..."], ...}; see CAPTION_KEYS
    000000017.txt     the caption alone; used where the json has none

A pair gives image crops and text crops (Sec. 3.1). With its colours changed an image crop is a view; a text crop is a
caption. Every random choice for a pair comes from (seed, epoch, index of the pair), and the order of the pairs from
(seed, epoch). So a run sees the same numbers with any number of workers and GPUs, and goes on from any step.
"""
import argparse
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
from torchvision.transforms.v2 import functional as V
from tqdm import tqdm
from tqdm.contrib.concurrent import process_map, thread_map

from cosmos import GLOBALS

# --- 1. Errors, and files that are written whole ---------------------------------------------------------------------

class Refused(ValueError):
    """What a user can mend: an option, a path, a format. One sentence with the value, the place and the remedy."""


class Unreadable(Refused):
    """Bytes that cannot be decoded: an image, a json, or one without a caption. Training takes another pair instead."""


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
        # From a loader's worker it comes behind a traceback, as the last line.
        leave(f"error: {str(error).rpartition('Refused: ')[2].strip()}")
    except Exception:
        leave(traceback.format_exc())


def leave(message):
    """End the process with status 1. Loader workers and process groups could keep Python from ending, so it does not
    wait for them."""
    if multiprocessing.active_children() or dist.is_initialized():
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
        yield temporary
        with open(temporary, 'rb+') as file:
            os.fsync(file.fileno())     # else a crash of the machine may leave an empty file under the name
        temporary.replace(path)
    except OSError as error:
        raise Refused(f'{path} cannot be written ({error}); what was there before is whole') from None
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path, value):
    """torch.save, whole or not at all."""
    with replacing(path) as temporary:
        try:
            torch.save(value, temporary)
        except RuntimeError as error:           # so it says that the disk is full
            raise OSError(error) from None


# --- 2. Shards: every header is read once, then any pair is one read away --------------------------------------------

# The index is an array of integers, a row a pair: the number of its shard, then offset and size in bytes of each of its
# members, from these columns on. The size of a member that it lacks is 0.
COLUMN = {'jpg': 1, 'jpeg': 1, 'png': 1, 'webp': 1, 'json': 3, 'txt': 5, 'mask.png': 7}
FIRST_PAIRS = 20        # are looked at before a run starts: enough to tell wrong keys from a broken pair
NO_PAIR = 'no readable tar of images, each with a .json or .txt of the same name; see docs/data.md for the format'


def find_shards(paths, half=None):
    """A tar, a folder of tars, a quoted glob, or a list of these -> sorted paths of tars, each once.

    half: 'train' or 'val'. Of a folder that holds both, only this one is taken, and a line says so.
    Raises Refused where nothing is found. A line says how many paths lead nowhere, or are named twice.
    """
    found = []
    missing = []
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        path = os.path.expanduser(path)
        if half and os.path.isdir(f'{path}/train') and os.path.isdir(f'{path}/val'):
            path = f'{path}/{half}'
            print(f'data       the half {path}')
        if os.path.isdir(path):
            tars = glob.glob(f'{glob.escape(path)}/*.tar')
        elif os.path.isfile(path):
            tars = [path]
        else:
            tars = glob.glob(path)
        found += tars
        if not tars:
            missing.append(path)
    if not found:
        raise Refused(f"'{missing[0]}' does not exist or holds no .tar file; give tars, or folders of them")
    if missing:
        warn(f'{len(missing)} of {len(missing) + len(found)} shards are missing, the first is {missing[0]}')
    unique = set(map(os.path.realpath, found))
    if len(unique) < len(found):
        warn(f'{len(found) - len(unique)} shards are named twice; each is used once')
    return sorted(unique)


def tar_files(path):
    """(name, offset of the data, size) of the files in a tar of any format. A damaged tar gives what tarfile reads of
    it, and one warning.

    ignore_zeros: tars may be joined by `cat`, and tarfile steps over a header that it cannot read.
    """
    length = os.path.getsize(path)
    end = 0                                             # of the last whole file
    with suppress(tarfile.TarError, ValueError), tarfile.open(path, 'r:', ignore_zeros=True) as tar:
        for member in tar:
            if member.size < 0 or member.offset_data + member.size > length:
                break                                   # below 0 tarfile would go back, and never end
            yield member.name, member.offset_data, member.size
            end = member.offset_data + member.size
        if tar.offset == length:
            return
    warn(f'{path} is damaged behind byte {end:,}; what lies before it is used')


def scan_shard(path, number):
    """Headers of one tar -> the rows of its pairs in the index, in order of their images."""
    rows = {}                                           # by stem
    for name, offset, size in tar_files(path):
        stem, _, kind = name.rpartition('/')[2].partition('.')          # up to the first dot
        stem = name[:len(name) - len(kind)]
        column = COLUMN.get(kind.lower())
        row = rows.setdefault(stem, [number] + 8 * [0])
        if column and not row[column + 1]:              # of several images the first
            row[column:column + 2] = offset, size
    pairs = []
    for row in rows.values():
        _, _, image, _, json, _, text, _, _ = row       # sizes
        if image and (json or text):
            pairs.append(row)
    if not pairs:
        warn(f'{path}: {NO_PAIR}')
    return np.array(sorted(pairs), np.int64).reshape(-1, 9)


class Shards:
    """Random access to all pairs of a set of tars.

    caption_keys: the json keys of the captions, joined by commas. half: see find_shards. index: the file of an earlier
    Shards' index of the same tars; it is mapped, and no header is read.
    Raises Refused where there is no pair, or where none of the first can be used.
    """

    def __init__(self, paths, caption_keys=None, half=None, index=None):
        self.paths = find_shards(paths, half)
        self.caption_keys = re.split(' *, *', caption_keys) if caption_keys else None
        self.sizes = list(map(os.path.getsize, self.paths))
        names = list(map(os.path.basename, self.paths))
        self.fingerprint = hashlib.sha1(repr([names, self.sizes]).encode()).hexdigest()
        if index:
            self.index = np.load(index, mmap_mode='r')
            return
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
        """One of them must be usable: if none is, the captions have other keys, or the images are of another kind."""
        problem = NO_PAIR
        for i in range(min(FIRST_PAIRS, len(self))):
            try:
                self.pool(i)
                return read_image(self.image(i), 'its image')
            except Unreadable as error:
                problem = f'{self.name(i)} and the pairs before it cannot be used ({error})'
        raise Refused(f'{self.paths[0]}: {problem}; name the captions with --caption-keys, or look at the shards with '
                      'python -m extras.prepare inspect')

    def member(self, i, kind):
        """The bytes of a member of pair i; b'' where it has none."""
        column = COLUMN[kind]
        return self.read(*self.index[i, [0, column, column + 1]].tolist())

    def read(self, shard, offset, size):
        with open(self.paths[shard], 'rb') as file:     # anew for each read, so that there are never too many open
            file.seek(offset)
            return file.read(size)

    def image(self, i):
        """The encoded bytes of image i."""
        return self.member(i, 'jpg')

    def record(self, i):
        """The json of pair i as a dict, with the .txt under 'txt'. Unreadable where it is no JSON."""
        try:
            record = json.loads(self.member(i, 'json') or '{}')
        except ValueError as error:
            raise Unreadable(f'its json cannot be read: {error}') from None
        if not isinstance(record, dict):
            record = {'captions': record}
        text = self.member(i, 'txt')
        if text:
            record.setdefault('txt', text.decode('utf-8', 'replace'))
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
        header = self.read(shard, offset - tarfile.BLOCKSIZE, 100)
        name = f"{self.paths[shard]}:{header.rstrip(bytes(1)).decode('utf-8', 'replace')}"
        with suppress(Unreadable, KeyError):
            name += f" ({self.record(i)['file']})"
        return name


# --- 3. Captions: a pool of sentences per pair, and text crops from it ---------------------------------- Sec. 3.1 ---

SHORT = ['shortIB_captions', 'shortSV_captions', 'shortLLA_captions']
LONG = ['longIB_captions', 'longSV_captions', 'longLLA_captions']
# The paper's main data. code≠paper, which speaks of the long captions: the raw and the short ones are used as well.
DREAMLIP = ['raw_caption', *SHORT, *LONG]
CAPTION_KEYS = [                # the first family that has a sentence is the pool
    DREAMLIP,
    ['original_caption', 'caption'],            # PixelProse
    ['captions'],
    ['caption'],
    ['txt'],
]
POOLS = {'raw': 'raw_caption', 'short': ','.join(SHORT), 'long': ','.join(LONG), 'all': None}  # --caption-pool

# A newline, '</s>', or a full stop before white space or the end that is not behind a single letter (e.g., J. Smith).
BREAK = re.compile(r'\n|</s>|(?<!\b[^\W\d_])\.(?=\s|$)')


def sentences(value, whole=False):
    """A string, or a list of strings, -> its sentences. whole: each string is one, and is not split.

    (The released sampler splits nothing of DreamLIP's: given seven strings, it trains on single letters.)
    """
    found = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str):
            parts = [item] if whole else BREAK.split(item)
            found += [part.strip() for part in parts if part.strip()]
    return found


def caption_pool(record, keys=None):
    """The record's sentences as one flat list, duplicates kept; [] where it has none, or only single characters."""
    for family in [keys] if keys else CAPTION_KEYS:
        if not keys and family[0] == 'original_caption' and 'original_caption' not in record:
            continue    # else img2dataset's own 'caption' would pass for PixelProse's
        pool = []
        for key in family:
            value = record.get(key)
            # As released: DreamLIP's lists hold sentences already, and "St. Mary's Church" of PixelProse is one.
            listed = key in DREAMLIP and isinstance(value, list)
            pool += sentences(value, whole=listed or key == 'original_caption')
        if any(len(sentence) > 1 for sentence in pool):
            return pool
    return []


def text_crops(pool, rng, global_texts, local_texts):
    """Globals of 1-5 sentences joined by '. ', then single sentences -> list of global_texts + local_texts strings.

    Sentences come in random order, without replacement in a global and in the locals, independently between them.
    paper silent: the order, ". ", and a pool that is too small, which is repeated whole, plus a random rest.
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
MOST_WORDS = 200_000    # whose ids are kept: the web never runs out of new words, memory does
LEARN_FROM = 5000       # most frequent words; rarer ones are written with what these have taught
VOCAB_HELP = (f'give the file at {VOCAB_URL} by --vocab PATH or COSMOS_VOCAB, or learn a vocabulary from your captions '
              'by --vocab learn')

# Every byte is shown as one visible character, so that merges are lines of text: printable Latin-1 as itself and first,
# the other 68 from U+0100 on. NB: this order is ids 0..255; with any other, released weights quietly read noise.
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES += [byte for byte in range(256) if byte not in BYTES]
BYTE_SYMBOL = {byte: chr(byte if k < 188 else k + 68) for k, byte in enumerate(BYTES)}

SPECIAL = '<start_of_text>', '<end_of_text>'
WORD = re.compile(r"<start_of_text>|<end_of_text>|'(?:[stmd]|re|ve|ll)|[^\W\d_]+|\d|(?:[^\w\s]|_)+")


def clean(text):
    """The text as ftfy rewrites it: no controls, plain quotes, ligatures and widths, U+FFFD for lone surrogates."""
    text = html.unescape(html.unescape(text))   # twice: web captions hold '&amp;lt;'
    text = re.sub('[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]', '', text)
    if not text.isascii():
        text = ''.join(map(plain, text))
        text = re.sub('[\u02bc\u2018-\u201b]', "'", text)
        text = re.sub('[\u201c-\u201f]', '"', text)
        text = re.sub('[\ud800-\udfff]', '\ufffd', text)
    return unicodedata.normalize('NFC', text)


@lru_cache          # of the 128 signs that came last: most texts use few
def plain(sign):
    """One character without ligature and width.

    CLIP's pattern wants \\p{L} and \\p{N}, which `re` lacks. Its \\w is exactly L, N and '_', but its \\d only the
    decimal N: the others (² ½ Ⅷ ①) get spaces here, or they would pass for letters.
    """
    if re.match('[\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\ufb00-\ufb04\ufb06\uff01-\uffef]', sign):
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
    """Path of CLIP's merges in torch's cache, downloaded on first use. Refused where that fails."""
    path = Path(torch.hub.get_dir(), 'bpe_simple_vocab_16e6.txt.gz')
    if not path.exists():   # ranks may fetch side by side: each renames its own
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(VOCAB_URL, str(path), VOCAB_SHA256, progress=False)
        except (OSError, RuntimeError) as error:    # RuntimeError: another SHA-256, as of a proxy's page
            raise Refused(f'{VOCAB_URL} cannot be fetched ({error}); {VOCAB_HELP}') from None
    return path


class Tokenizer:
    """CLIP's tokenizer: clean, split into words, byte-pair encode each. tokenizer(texts) -> (n, context_length) int64

    merges: lines 'left right', most urgent first. Ids: 256 bytes, 256 bytes closing a word, one a merge, start, end.
    The end is highest because the text tower finds it by argmax; padding is 0. Ids equal CLIP's (simple_tokenizer.py
    with ftfy and regex). ours: ftfy's repair of wrongly decoded text ('Ã©' for 'é', C1 controls) is left out; and
    U+0345, which regex takes for a letter, is none here.
    """

    def __init__(self, merges, context_length=77):
        self.merges = list(merges)
        self.context_length = context_length
        self.rank = {tuple(line.split()): i for i, line in enumerate(self.merges)}
        byte_symbols = list(BYTE_SYMBOL.values())
        closing = [f'{symbol}</w>' for symbol in byte_symbols]
        fused = [left + right for left, right in self.rank]
        symbols = [*byte_symbols, *closing, *fused, *SPECIAL]
        self.ids = {symbol: i for i, symbol in enumerate(symbols)}
        self.vocab_size = len(symbols)
        self.sot, self.eot = [self.ids[symbol] for symbol in SPECIAL]
        self.cache = {symbol: [self.ids[symbol]] for symbol in SPECIAL}         # word -> ids

    @classmethod
    def clip(cls, path=None, context_length=77):
        """CLIP's 48,894 merges: from `path`, else $COSMOS_VOCAB, else cache or net. Refused if it's another file."""
        path = os.path.expanduser(path or os.environ.get('COSMOS_VOCAB') or fetch_vocab())
        data = Path(path).read_bytes() if os.path.isfile(path) else b''
        if hashlib.sha256(data).hexdigest() != VOCAB_SHA256:
            raise Refused(f"{path} is absent or not CLIP's vocabulary (wrong SHA-256; perhaps a git-lfs pointer or a web "
                          f'page): remove it, then {VOCAB_HELP}')
        lines = gzip.decompress(data).decode().split('\n')
        return cls(lines[1:48895], context_length)  # line 0 is a header; CLIP does not use the rest

    @classmethod
    def learn(cls, texts, vocab_size, context_length=77):
        """Merges the most frequent pair (of equals the first met) until `vocab_size`, or until none occurs twice."""
        tally = Counter()
        for text in texts:
            tally.update(cls.split(text))
        words = {word: symbols_of(word) for word, _ in tally.most_common(LEARN_FROM) if word not in SPECIAL}
        merges = {}     # a dict: a pair may return (abc = ab c or a bc) but keeps its rank
        merges_left = vocab_size - 2 * 256 - len(SPECIAL)
        for _ in tqdm(range(merges_left), 'learning merges', leave=False, disable=None):
            count = Counter()   # pair of symbols -> how often it occurs in all texts
            for word, symbols in words.items():
                for pair in zip(symbols, symbols[1:]):
                    count[pair] += tally[word]
            pair = max(count, key=count.get, default=None)
            if count[pair] < 2:
                break
            merges[' '.join(pair)] = None
            for word, symbols in words.items():
                if pair[0] in symbols:
                    words[word] = fuse(symbols, *pair)
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
        while pairs := [pair for pair in zip(symbols, symbols[1:]) if pair in self.rank]:
            symbols = fuse(symbols, *min(pairs, key=self.rank.get))
        ids = [self.ids[symbol] for symbol in symbols]
        if len(self.cache) < MOST_WORDS:
            self.cache[word] = ids
        return ids

    def encode(self, text):
        """Ids without start, end and padding."""
        return sum(map(self.word_ids, self.split(text)), [])

    def __call__(self, texts):
        """n texts (or one) -> (n, context_length) int64: start, ids, end, zeros. A long text loses ids, not its end."""
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
# What Pillow raises for bytes that are no image.
BROKEN_IMAGE = OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError


@contextmanager
def reading_image(name):
    """Pillow's errors for bytes that are no image become Unreadable."""
    try:
        yield
    except BROKEN_IMAGE as error:
        raise Unreadable(f'{name} is no image that can be read ({error})') from None


def open_image(source):
    """A path, an open file or encoded bytes -> Pillow image, of which only the header is read yet."""
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def upright(image):
    """A Pillow image turned as EXIF says, 16 bits of grey scaled to 8: Pillow would cut them off at 255."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I'):
        gray = np.asarray(image).clip(0, 65535) // 257
        image = Image.fromarray(np.uint8(gray))
    return image


def read_image(source, name=None):
    """A path, an open file or encoded bytes -> upright Pillow image. Unreadable, with its name, for what is no image."""
    with reading_image(name or source):
        return upright(open_image(source))


class Kind(NamedTuple):
    """A kind of image view."""
    size: int                       # side, in pixels
    scale: tuple                    # least and most share of the image's area
    blur: float                     # probability
    solarize: float = 0.0           # probability


def view_kinds(config, global_images, local_images, least=0.4):
    """The kinds of all V views, globals first, as released. least: the smallest share of the image in a global crop."""
    whole = least, 1.0
    first = Kind(config.image_size, whole, blur=1.0)
    other = Kind(config.image_size, whole, blur=0.1, solarize=0.2)
    local = Kind(config.local_image_size, (0.05, 0.4), blur=0.5)
    return [first] + [other] * (global_images - 1) + [local] * local_images


def image_crops(data, kinds, rng, flip=True):
    """One random crop for each kind of view -> list of (3, s, s) uint8, and their boxes in the image (y, x, h, w).

    rng decides everything. torchvision draws the boxes from torch's global generator, so that is seeded and set back.
    """
    with reading_image('its image'):
        image = open_image(data)
        width, height = image.size
        if image.getexif().get(0x112, 1) > 4:           # EXIF says that the camera was held upright
            width, height = height, width
    frame = torch.empty(1, 1, 1).expand(1, height, width)               # only its size counts
    with torch.random.fork_rng([]):
        torch.manual_seed(rng.getrandbits(32))
        boxes = [v2.RandomResizedCrop.get_params(frame, kind.scale, ASPECTS) for kind in kinds]
    # Pillow decodes a JPEG at 1/2, 1/4 or 1/8 where that is still as large as asked for, in much less time.
    room = min(min(box[2:]) / kind.size for box, kind in zip(boxes, kinds))
    with reading_image('its image'):
        image.draft('RGB', [ceil(side / room) for side in image.size])
        pixels = V.pil_to_tensor(upright(image).convert('RGB'))
    zoom = min(pixels.shape[1] / height, pixels.shape[2] / width)       # 1, or about 1/2, 1/4, 1/8
    crops = []
    for box, kind in zip(boxes, kinds):
        place = [int(side * zoom) for side in box]  # rounded down: never over an edge
        crop = V.resized_crop(pixels, *place, [kind.size] * 2, BICUBIC)
        if flip and rng.random() < 0.5:
            crop = crop.flip(-1)
        crops.append(crop.contiguous())  # colour after colour, which the operations below are fast on
    return crops, boxes


# --- 6. Colours: in batches, where the model runs -------------------------------------------------------- Sec. 3.1 ---

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
    uniform = rng.uniform
    changes = {}
    if rng.random() < 0.8:
        changes.update(brightness=uniform(0.6, 1.4), contrast=uniform(0.6, 1.4),
                       saturation=uniform(0.8, 1.2), hue=uniform(-0.1, 0.1))
    if rng.random() < 0.2:
        changes['gray'] = 1.0
    if rng.random() < kind.blur:
        changes['blur'] = uniform(0.1, 2.0)
    if rng.random() < kind.solarize:
        changes['solarize'] = 127.5 / 255   # between two of the 256 values
    return Colours(**changes)


# Below, x is (n, 3, h, w) in [0, 1] and a strength (n, 1, 1, 1).

def brightness(x, strength):
    return (x * strength).clamp_(0, 1)


def contrast(x, strength):
    mean = V.rgb_to_grayscale(x.mean(dim=(2, 3), keepdim=True))
    return torch.lerp(mean, x, strength).clamp_(0, 1)


def saturation(x, strength):
    return torch.lerp(V.rgb_to_grayscale(x), x, strength).clamp_(0, 1)


def hue(x, turn):
    """RGB -> HSV, hue turned, -> RGB, by the textbook formulas."""
    red, green, blue = x.split(1, dim=1)                                # each (n, 1, h, w)
    value = x.amax(dim=1, keepdim=True)
    chroma = value - x.amin(dim=1, keepdim=True)
    # Where the colour lies on the circle, in sixths times chroma. Of gray any place will do.
    otherwise = torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    sixths = torch.where(value == red, green - blue, otherwise)
    angle = sixths / (6 * chroma).clamp_min(1e-8) + turn + 1            # + 1: above 0
    starts = torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)  # 5 for red, 3 for green, 1 for blue
    k = 6 * torch.frac(angle + starts / 6)                              # (n, 3, h, w)
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


def gray(x, strength):
    return torch.lerp(x, V.rgb_to_grayscale(x), strength)


def blur(x, sigma):
    """Gaussian blur; borders are mirrored. The kernel ends after 6 pixels, three of the largest sigma."""
    offsets = torch.arange(-6, 7, device=x.device)
    # clamp: a CPU is slow with numbers that are smaller still.
    kernel = (-0.5 * (offsets / sigma) ** 2).clamp_min(-80).softmax(-1)
    kernel = kernel.repeat_interleave(3, dim=0)     # (3 n, 1, 1, 13): each channel has its own
    padded = F.pad(x, [6] * 4, 'reflect').flatten(0, 1)            # (3 n, h + 12, w + 12)
    rows = F.conv2d(padded, kernel, groups=len(kernel))
    return F.conv2d(rows, kernel.mT, groups=len(kernel)).view_as(x)


def solarize(x, threshold):
    return torch.where(x > threshold, 1 - x, x)


OPERATIONS = brightness, contrast, saturation, hue, gray, blur, solarize       # one for each column of Colours
JITTERS = range(4)      # the columns of those that come in a random order, before the others


def recolour(images, colours, jitters):
    """uint8 (B, 3, h, w), the numbers of Colours (B, 7), the JITTERS in some order -> float32 in [0, 1].

    colours stay on the CPU. There it is known which images an operation changes, without waiting for the GPU.
    """
    neutral = Colours()
    x = images.float().div_(255)
    for column in [*jitters, *range(len(JITTERS), len(OPERATIONS))]:
        strength = colours[:, column]
        changed = (strength != neutral[column]).nonzero().flatten()
        if len(changed):
            strength = strength[changed].view(-1, 1, 1, 1).to(x.device, non_blocking=True)
            changed = changed.to(x.device, non_blocking=True)
            x[changed] = OPERATIONS[column](x[changed], strength)
    return x


def normalize(images):
    """uint8, or float in [0, 1], (..., 3, h, w) -> float32, with the released mean and deviation."""
    return V.normalize(V.to_dtype(images, scale=True), MEAN, STD)


# --- 7. Samples and batches ------------------------------------------------------------------------------------------

@lru_cache(1)
def shuffled(seed, epoch, pairs):
    """The order of all pairs in an epoch, (pairs,): a pure function, so no state has to be saved to go on with it."""
    return np.random.default_rng((seed, epoch)).permutation(pairs).astype(np.uint32)


@dataclass
class Order:
    """Which pairs make batch `step`: a pure function of (seed, step), cut into equal slices for the ranks.

    Yields, for every step in [start, stop), this rank's list of (epoch, position in its order, index of the pair). An
    epoch holds pairs // batch whole batches; the rest of its order is left out.
    """
    pairs: int
    batch: int
    start: int
    stop: int
    seed: int = 0
    rank: int = 0
    world: int = 1

    def __post_init__(self):
        if self.batch > self.pairs:
            raise Refused(f'--batch {self.batch} is larger than the set of {self.pairs} pairs; lower --batch')
        if self.batch % self.world:
            raise Refused(f'--batch {self.batch} cannot be cut into {self.world} parts (processes x --accum); '
                          f'choose a multiple of {self.world}')

    def __iter__(self):
        share = self.batch // self.world
        for step in range(self.start, self.stop):
            epoch, k = divmod(step, self.pairs // self.batch)
            first = k * self.batch + self.rank * share
            indices = shuffled(self.seed, epoch, self.pairs)[first:first + share].tolist()
            yield [(epoch, position, index) for position, index in enumerate(indices, first)]


class Counts(NamedTuple):
    """How many views and captions a pair gives: V = global_images + local_images, U = global_texts + local_texts."""
    global_images: int = GLOBALS
    local_images: int = 6
    global_texts: int = GLOBALS
    local_texts: int = 6


@dataclass
class Crops(Dataset):
    """The training set: (epoch, position, index) -> the crops of one pair, for `collate`.

    augment: 'full' is the released recipe; 'crops' leaves colours and sides alone, for captions that name them.
    least: the smallest share of the image in a global crop.
    A pair that is Unreadable is named, counted, and replaced by one further on in the order.
    """
    shards: Shards
    tokenizer: Tokenizer
    config: object              # cosmos.Config
    seed: int
    batch: int
    counts: Counts = Counts()
    augment: str = 'full'
    least: float = 0.4

    def __post_init__(self):
        self.kinds = view_kinds(self.config, self.counts.global_images, self.counts.local_images, self.least)

    def __getitem__(self, where):
        epoch, position, index = where
        pairs = len(self.shards)
        key = f'{self.seed} {epoch} {position // self.batch}'           # the same in all of a step
        for bad in range(pairs):
            try:
                crops, colours, captions, _ = self.sample(epoch, index)
                return crops, torch.tensor(colours), self.tokenizer(captions), key, bad
            except Unreadable as error:
                print(f'skipped {self.shards.name(index)}: {error}', file=sys.stderr)
            # Not the next one: it is often in the same batch, where a pair that comes twice is its own negative. So a
            # batch further on. `bad`, as steps of one length might only meet pairs that cannot be read.
            position = (position + self.batch + bad) % pairs
            index = int(shuffled(self.seed, epoch, pairs)[position])
        raise Refused(f'none of {pairs} pairs can be read; look at the shards with python -m extras.prepare inspect')

    def sample(self, epoch, index):
        """-> V crops (3, s, s) uint8, the Colours of each, U captions as strings, and the V boxes; globals first."""
        counts = self.counts
        full = self.augment == 'full'
        # A generator for texts and one for images: options of captions leave the pictures as they are.
        text_rng = random.Random(f'{self.seed} {epoch} {index} texts')
        image_rng = random.Random(f'{self.seed} {epoch} {index} images')
        captions = text_crops(self.shards.pool(index), text_rng, counts.global_texts, counts.local_texts)
        crops, boxes = image_crops(self.shards.image(index), self.kinds, image_rng, flip=full)
        colours = [draw_colours(kind, image_rng) if full else Colours() for kind in self.kinds]
        return crops, colours, captions, boxes


class Batch(NamedTuple):
    """Crops of B pairs."""
    crops: list             # V image crops (B, 3, s, s) uint8
    colours: object         # (B, V, 7), the numbers of Colours, on the CPU
    key: str                # of the step; from it comes the order of the jitters
    texts: list             # U captions (B, T_u) int64 for the student, globals first
    teacher_texts: list     # the global ones for the teacher, (B, T_u)
    bad: int                # pairs that were replaced because they could not be read

    def to(self, device):
        """The batch on a device, without waiting for it."""
        moved = {}
        for name in ('crops', 'texts', 'teacher_texts'):
            moved[name] = [x.to(device, non_blocking=True) for x in getattr(self, name)]
        return self._replace(**moved)

    def views(self):
        """V images (B, 3, s, s), float32, normalised."""
        views = []
        for k, crops in enumerate(self.crops):
            # ours: one order for a view of all pairs. The released code draws one for every image.
            jitters = random.Random(f'{self.key} {k}').sample(JITTERS, 4)
            views.append(normalize(recolour(crops, self.colours[:, k], jitters)))
        return views


def cut(captions, multiple):
    """A list of (B, T) ids, all cut behind the end of the longest, rounded up to a multiple."""
    ends = [ids.argmax(dim=1).max().item() for ids in captions]         # the largest id ends a text
    length = ceil((max(ends, default=0) + 1) / multiple) * multiple
    return [ids[:, :length] for ids in captions]


def collate(samples, multiple=1, whole=True):
    """Samples -> Batch. The globals are cut to the longest of them, the local captions to the longest of those.

    whole: caption 0 keeps all T positions for the student, because C^T reads its padding, too.
    """
    crops, colours, ids, keys, bad = default_collate(samples)           # ids (B, U, T)
    captions = ids.unbind(dim=1)
    teacher_texts = cut(captions[:GLOBALS], multiple)
    texts = teacher_texts + cut(captions[GLOBALS:], multiple)
    if whole:
        texts[0] = captions[0]
    return Batch(crops, colours, keys[0], texts, teacher_texts, int(bad.sum()))


SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1                 # USR1: Slurm


def ignore_signals(worker):
    """Slurm and torchrun signal a whole process group. A worker that died of it would keep the run from saving."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def loader(crops, batches, workers, multiple=1, whole=True):
    """The plain DataLoader that serves batch after batch of an Order."""
    # Linux: forked workers share the index, where others would get a copy each.
    context = 'fork' if workers and sys.platform == 'linux' else None
    return DataLoader(crops, batch_sampler=batches, num_workers=workers,
                      collate_fn=partial(collate, multiple=multiple, whole=whole),
                      pin_memory=torch.cuda.is_available(), worker_init_fn=ignore_signals,
                      multiprocessing_context=context)
