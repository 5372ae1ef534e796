"""Pairs in, batches of views out: shards, captions, tokenizer, text crops, image crops, loader.

A shard is a tar as img2dataset writes it. Members that share a stem are one pair:

    000000017.jpg     jpg, jpeg, png or webp
    000000017.json    {"raw_caption": "...", "shortIB_captions": ["...", "..."], ...}; see CAPTION_KEYS
    000000017.txt     the caption alone; used where the json has none

Every random choice for a sample comes from (seed, epoch, index of the pair), and the order of the pairs from
(seed, epoch). So a run sees the same numbers with any number of workers and GPUs, and goes on from any step.
"""
import argparse
import difflib
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
import sys
import tarfile
import traceback
import unicodedata
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from math import ceil
from pathlib import Path
from resource import RLIMIT_NOFILE, getrlimit, setrlimit
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as V
from tqdm import tqdm
from tqdm.contrib.concurrent import process_map, thread_map

# --- 1. Shards: every header is read once, then any pair is one read away --------------------------------------------

PLACE = np.dtype([('offset', '<i8'), ('size', '<i8')])          # in bytes; of size 0 there is none
PAIR = np.dtype([('shard', '<i4'), ('image', PLACE), ('json', PLACE), ('txt', PLACE),
                 ('mask', PLACE)])
ROLES = {'jpg': 'image', 'jpeg': 'image', 'png': 'image', 'webp': 'image',
         'json': 'json', 'txt': 'txt', 'mask.png': 'mask'}
MEMBER = re.compile(r'((?:.*/)?[^/.]+)\.([^/]+)')   # stem and extension: up to the first dot
FEW_SHARDS = 16
FIRST_PAIRS = 20        # are looked at before a run starts: enough to tell wrong keys from a broken pair
NO_PAIR = 'no readable tar of images, each with a .json or .txt of the same name; see docs/data.md for the format'


def warn(message):
    print(f'WARNING    {message}', file=sys.stderr)


@contextmanager
def replacing(path):
    """A temporary path beside `path`, which takes its place when the block ends well and is removed when not.

    ValueError where it cannot be written, as on a full disk.
    """
    path = Path(path)
    temporary = path.with_name(f'{path.name}.partial')
    try:
        yield temporary
        if temporary.exists():
            with open(temporary, 'rb+') as file:
                os.fsync(file.fileno())  # else a crash of the machine may leave an empty file under the name
            os.replace(temporary, path)
    except (OSError, RuntimeError) as error:    # RuntimeError: torch.save's
        raise ValueError(f'{path} cannot be written ({error}); what was there before is whole') from None
    finally:
        temporary.unlink(missing_ok=True)


def find_shards(pattern):
    """A folder, a glob, a brace pattern such as /shards/{00000..00575}.tar, or several joined by '::' -> paths.

    Says how many shards of a brace pattern are missing, and how many are named twice: those count once.
    Raises ValueError where a part matches nothing.
    """
    paths = []
    for part in str(pattern).split('::'):
        found = list(map(tars_of, expand_braces(os.path.expanduser(part))))
        missing = found.count([])
        if missing == len(found):
            raise ValueError(f"'{part}' does not exist or holds no .tar file; give a folder of tars, a glob, or "
                             "'/shards/{00000..00575}.tar'")
        if missing:
            warn(f'{missing} of {len(found)} shards of the pattern are missing ({part})')
        paths += sum(found, [])
    unique = set(map(os.path.realpath, paths))
    twice = len(paths) - len(unique)
    if twice:
        warn(f'{twice} shards are named twice; each is used once')
    return sorted(unique)


def half_of(pattern, half):
    """DIR/train or DIR/val, and a line that says so, where `pattern` is a folder DIR of these two; else the pattern.

    A folder with tars of its own stands for these tars.
    """
    halves = [f'{pattern}/train', f'{pattern}/val']
    if tars_of(str(pattern)) or not all(map(tars_of, halves)):
        return pattern
    print(f'data       of {pattern} the half {half}/')
    return f'{pattern}/{half}'


def tars_of(name):
    """The tars that a name without braces stands for."""
    if os.path.isdir(name):
        return glob.glob(f'{glob.escape(name)}/*.tar')
    return [name] if os.path.isfile(name) else glob.glob(name)


def expand_braces(pattern):
    """'{08..10}.tar' -> 08.tar, 09.tar, 10.tar; of several braces, every combination."""
    brace = re.search(r'{(\d+)\.\.(\d+)}', pattern)
    if not brace:
        return [pattern]
    names = []
    for number in range(int(brace[1]), int(brace[2]) + 1):
        digits = f'{number:0{len(brace[1])}}'           # as many as the first number has
        names += expand_braces(pattern.replace(brace[0], digits, 1))
    return names


def tar_files(path):
    """(name, offset of the data, size) of the files in a tar of any format; of a damaged one what tarfile reads.

    ignore_zeros: tars may be joined by `cat`, and tarfile steps over a header that it cannot read.
    """
    length = os.path.getsize(path)
    end = 0                                             # of the last whole file
    with tarfile.open(path, 'r:', ignore_zeros=True) as tar:
        with suppress(Exception):                       # a damaged header raises what it likes
            for member in tar:
                if member.size < 0 or member.offset_data + member.size > length:
                    break                               # below 0 tarfile would go back, and never end
                yield member.name, member.offset_data, member.size
                end = member.offset_data + member.size
        if tar.offset != length:
            warn(f'{path} is damaged behind byte {end:,}; what lies before it is used')


def scan_shard(path, number):
    """Headers of one tar -> its pairs, (n,) PAIR in order of their images."""
    places = defaultdict(dict)                          # stem -> {role: (offset, size)}
    with suppress(tarfile.TarError, ValueError):        # no tar at all
        for name, offset, size in tar_files(path):
            match = MEMBER.fullmatch(name)
            role = match and ROLES.get(match[2].lower())
            if role and size:
                places[match[1]].setdefault(role, (offset, size))   # of several images the first
    rows = []
    for place in places.values():
        if 'image' in place and ('json' in place or 'txt' in place):
            members = [place.get(role, (0, 0)) for role in PAIR.names[1:]]
            rows.append((number, *members))
    if not rows:
        warn(f'{path}: {NO_PAIR}')
    return np.array(sorted(rows), PAIR)


_, hard_limit = getrlimit(RLIMIT_NOFILE)
with suppress(ValueError):                              # macOS has no hard limit, and grants less
    setrlimit(RLIMIT_NOFILE, (hard_limit, hard_limit))


@lru_cache(getrlimit(RLIMIT_NOFILE)[0] // 2)
def open_shard(path):
    """Files stay open: to open one for each pair would cost more than to read it."""
    return open(path, 'rb')


@lru_cache
def map_index(path):
    return np.load(path, mmap_mode='r')


def digest(*values):
    return hashlib.sha1(repr(values).encode()).hexdigest()


class Shards:
    """Random access to all pairs of a set of tars.

    caption_keys: the json keys of the captions, joined by commas. cache: a folder where `save` may have left an index
    of these very shards; it is mapped, and no header is read.
    Raises ValueError where no pair is left, or where the first captions are under none of the keys.
    """

    def __init__(self, pattern, caption_keys=None, cache=None):
        open_shard.cache_clear()                        # a file that was replaced is opened anew
        self.paths = find_shards(pattern)
        self.caption_keys = re.split(' *, *', caption_keys) if caption_keys else None
        self.sizes = list(map(os.path.getsize, self.paths))
        times = list(map(os.path.getmtime, self.paths))
        self.index_name = f'index-{digest(self.caption_keys, self.paths, self.sizes, times)}.npy'
        self.index = None
        if cache and Path(cache, self.index_name).exists():
            self.index = Path(cache, self.index_name)
        self.table = None if self.index else self.scan()        # the pairs, where they are not mapped
        if not len(self):
            raise ValueError(f'{pattern}: {NO_PAIR}')
        self.check_captions()
        self.fingerprint = digest(*map(os.path.basename, self.paths), self.sizes, len(self))

    @property
    def pairs(self):
        """(n,) PAIR. To a worker goes the path of a mapped index, not a copy."""
        return map_index(self.index) if self.index else self.table

    def __len__(self):
        return len(self.pairs)

    def scan(self):
        """Reads all headers. Few shards are not worth the seconds that processes take to start."""
        each = process_map if len(self.paths) > FEW_SHARDS else thread_map
        tables = each(scan_shard, self.paths, range(len(self.paths)), chunksize=1,
                      desc='reading headers', disable=None)
        return np.concatenate(tables)

    def check_captions(self):
        """Of the first pairs one must have captions: if none has, the keys are wrong, not the pairs."""
        for i in range(min(FIRST_PAIRS, len(self))):
            try:
                return self.pool(i)
            except ValueError as error:
                problem = error
        raise ValueError(f'{self.name(i)} has captions that cannot be used ({problem}); name the right ones '
                         'with --caption-keys')

    def save(self, folder):
        """Writes the index into a folder and maps it from there."""
        index = Path(folder, self.index_name)
        if not index.exists():
            with replacing(index) as temporary, open(temporary, 'wb') as file:
                np.save(file, self.pairs)
        self.index = index
        self.table = None

    def read(self, shard, offset, size):
        file = open_shard(self.paths[shard])
        return os.pread(file.fileno(), size, offset)    # not seek and read: forked workers share a file's position

    def member(self, i, role):
        """The bytes of a member of pair i; b'' where it has none."""
        pair = self.pairs[i]
        return self.read(pair['shard'], *pair[role].tolist())           # offset and size

    def image(self, i):
        """The encoded bytes of image i."""
        return self.member(i, 'image')

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
        """Where pair i lies, for messages: shard and member, and the name of the file that it was packed from."""
        pair = self.pairs[i]
        name = f"{self.paths[pair['shard']]}:"
        with suppress(Exception):       # the tar or the json may be what is broken
            header = self.read(pair['shard'], pair['image']['offset'] - tarfile.BLOCKSIZE, 100)
            name += header.rstrip(b'\0').decode('utf-8', 'replace')
            name += f" ({self.record(i)['file']})"
        return name


def write_shard(path, members):
    """A tar of (name, bytes), whole or not at all, and none of nothing; equal members give equal bytes."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        with tarfile.open(temporary, 'w', format=tarfile.USTAR_FORMAT) as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)                            # its time is 0
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        if not tar.members:
            temporary.unlink()


# --- 2. Captions: a pool of sentences per pair, and text crops from it ---------------------------------- Sec. 3.1 ---

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

# A newline, '</s>', or a full stop that is in no number (3.5) and behind no initial (J. Smith, the U.S. Army).
BREAK = re.compile(r'\n|</s>|(?<!\b[A-Z])(?:\.(?!\d)|(?<!\d)\.)')


def sentences(value, whole=False):
    """A string, or a list of strings, -> its sentences; whole: each string is one, and is not split.

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


def unsplit(record):
    """Whether a list of DreamLIP's is one item of several sentences. It passes whole, so it gives one text crop."""
    lists = [record[key] for key in DREAMLIP if isinstance(record.get(key), list)]
    return any(len(value) == 1 and len(BREAK.findall(f'{value[0]}')) > 1 for value in lists)


def text_crops(pool, rng, globals_, local):
    """Globals of 1-5 sentences joined by '. ', then `local` single sentences -> list of globals_ + local strings.

    Sentences come in random order, without replacement in a global and in the locals, independently between them.
    paper silent: the order, ". ", and a pool that is too small, which is repeated whole, plus a random rest.
    """
    def draw(count):
        if count <= len(pool):
            return rng.sample(pool, count)
        repeats, rest = divmod(count, len(pool))
        return pool * repeats + rng.sample(pool, rest)

    return ['. '.join(draw(rng.randint(1, 5))) for _ in range(globals_)] + draw(local)


# --- 3. Tokenizer: CLIP's byte-pair encoding, with CLIP's merges or learned ones -------------------------------------

VOCAB_URL = 'https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz'
VOCAB_SHA256 = '924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a'
MOST_WORDS = 200_000    # whose ids are kept: the web never runs out of new words, memory does
LEARN_FROM = 5000       # most frequent words; rarer ones are written with what these have taught
VOCAB_HELP = (f'give the file at {VOCAB_URL} by --vocab PATH or COSMOS_VOCAB, or train without it: --vocab learn, or '
              '--preset tiny, learns a vocabulary from your captions')

# Every byte is shown as one visible character, so that merges are lines of text: printable Latin-1 as itself and first,
# the other 68 from U+0100 on. NB: this order is ids 0..255; with any other, released weights quietly read noise.
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES += [byte for byte in range(256) if byte not in BYTES]
SYMBOL_BYTE = {chr(byte if k < 188 else k + 68): byte for k, byte in enumerate(BYTES)}
BYTE_SYMBOL = {byte: symbol for symbol, byte in SYMBOL_BYTE.items()}

SPECIAL = '<start_of_text>', '<end_of_text>'
WITHOUT_MERGES = 2 * 256 + len(SPECIAL)         # ids
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
    """Path of CLIP's merges in torch's cache, downloaded on first use; of no file where the net has none."""
    path = Path(torch.hub.get_dir(), 'bpe_simple_vocab_16e6.txt.gz')
    if not path.exists():   # ranks may fetch side by side: each renames its own
        with suppress(Exception):   # no network, a proxy's page, a full disk
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(VOCAB_URL, str(path), VOCAB_SHA256, progress=False)
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
        closing = [f'{symbol}</w>' for symbol in SYMBOL_BYTE]
        self.symbols = [*SYMBOL_BYTE, *closing, *map(''.join, self.rank), *SPECIAL]
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.vocab_size = len(self.symbols)
        self.sot, self.eot = map(self.ids.get, SPECIAL)
        self.cache = {symbol: [self.ids[symbol]] for symbol in SPECIAL}         # word -> ids

    @classmethod
    def clip(cls, path=None, context_length=77):
        """CLIP's 48,894 merges: from `path`, else $COSMOS_VOCAB, else cache or net. ValueError if it's another file."""
        path = os.path.expanduser(path or os.environ.get('COSMOS_VOCAB') or fetch_vocab())
        data = Path(path).read_bytes() if os.path.isfile(path) else b''
        if hashlib.sha256(data).hexdigest() != VOCAB_SHA256:
            raise ValueError(f"{path} is absent or not CLIP's vocabulary (wrong SHA-256; perhaps a git-lfs pointer or "
                             f'a web page): remove it, then {VOCAB_HELP}')
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
        for _ in tqdm(range(vocab_size - WITHOUT_MERGES), 'learning merges', leave=False, disable=None):
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

    def words(self, text):
        """[(word, how many ids it takes)] in order, to sum attention over pieces into attention over words."""
        return [(word, len(self.word_ids(word))) for word in self.split(text)]

    def encode(self, text):
        """Ids without start, end and padding."""
        return sum(map(self.word_ids, self.split(text)), [])

    def decode(self, ids):
        """Text of ids (list or tensor row) up to the first end: beyond it is padding, which would read '!!!'."""
        symbols = ''
        for i in map(int, ids):
            if i == self.eot:
                break
            symbols += self.symbols[i]
        data = bytes(map(SYMBOL_BYTE.get, symbols))
        return data.decode(errors='replace').removeprefix(SPECIAL[0]).replace('</w>', ' ').strip()

    def __call__(self, texts):
        """n texts (or one) -> (n, context_length) int64: start, ids, end, zeros. A long text loses ids, not its end."""
        if isinstance(texts, str):
            texts = [texts]
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in zip(ids, texts):
            encoded = [self.sot, *self.encode(text)[:self.context_length - 2], self.eot]
            row[:len(encoded)] = torch.tensor(encoded)
        return ids


# --- 4. Image crops: boxes, pixels and flips, in the loader's workers ------------------------------------ Sec. 3.1 ---

MEAN = (0.48145466, 0.4578275, 0.40821073)      # OpenAI's, as released
STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = v2.InterpolationMode.BICUBIC
ASPECTS = (3 / 4, 4 / 3)                        # of crops, least and most


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
        image = Image.fromarray(np.uint8(gray))
    return image


def read_image(source, name=None):
    """A path, an open file or encoded bytes -> upright Pillow image. ValueError with its name for what is no image."""
    try:
        return upright(open_image(source))
    except Exception as error:  # decoders raise what they like
        raise ValueError(f'{name or source} is no image that can be read ({error})') from None


def pixels_of(image):
    """Pillow image -> (3, h, w) uint8, upright; in memory the three colours of a pixel stay neighbours."""
    return V.pil_to_tensor(upright(image).convert('RGB'))


def decode(data):
    """Encoded bytes -> (3, h, w) uint8, upright. Raises OSError or ValueError for what is no image."""
    return pixels_of(open_image(data))


class Kind(NamedTuple):
    """A kind of image view."""
    size: int                       # side, in pixels
    blur: float                     # probability
    scale: tuple = (0.4, 1.0)       # least and most share of the image's area
    solarize: float = 0.0           # probability


def view_kinds(config):
    """Global view 0, global view 1, local view, as released."""
    return [Kind(config.image_size, blur=1.0),
            Kind(config.image_size, blur=0.1, solarize=0.2),
            Kind(config.local_image_size, blur=0.5, scale=(0.05, 0.4))]


def image_crops(data, kinds, rng, flip=True):
    """One random crop for each kind of view -> list of (3, s, s) uint8, and their boxes in the image (y, x, h, w).

    rng decides everything. torchvision draws the boxes from torch's global generator, so that is seeded and set back.
    """
    image = open_image(data)
    width, height = image.size
    if image.getexif().get(0x112, 1) > 4:               # EXIF says that the camera was held upright
        width, height = height, width
    frame = torch.empty(1, 1, 1).expand(1, height, width)               # only its size counts
    with torch.random.fork_rng([]):
        torch.manual_seed(rng.getrandbits(32))
        boxes = [v2.RandomResizedCrop.get_params(frame, kind.scale, ASPECTS) for kind in kinds]
    # Pillow decodes a JPEG at 1/2, 1/4 or 1/8 where that is still as large as asked for, in much less time.
    room = min(min(box[2:]) / kind.size for box, kind in zip(boxes, kinds))
    image.draft('RGB', [ceil(side / room) for side in image.size])
    pixels = pixels_of(image)
    zoom = min(pixels.shape[1] / height, pixels.shape[2] / width)       # 1, or about 1/2, 1/4, 1/8
    crops = []
    for box, kind in zip(boxes, kinds):
        place = [int(side * zoom) for side in box]  # rounded down: never over an edge
        crop = V.resized_crop(pixels, *place, [kind.size] * 2, BICUBIC)
        if flip and rng.random() < 0.5:
            crop = crop.flip(-1)
        crops.append(crop.contiguous())  # colour after colour, which the operations below are fast on
    return crops, boxes


def Preprocess(size):
    """The evaluation transform: PIL image -> (3, size, size) float. Short side to `size`, bicubic, then the centre."""
    return v2.Compose([v2.RGB(), v2.Resize(size, BICUBIC), v2.CenterCrop(size), v2.PILToTensor(), normalize])


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


# --- 6. Samples and batches ------------------------------------------------------------------------------------------

MOST_BAD = 100          # pairs in a row: a set where they occur has next to nothing to train on


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
            raise ValueError(f'--batch {self.batch} is larger than the set of {self.pairs} pairs; lower --batch')
        if self.batch % self.world:
            raise ValueError(f'--batch {self.batch} cannot be cut into {self.world} parts (processes x --accum); '
                             f'choose a multiple of {self.world}')

    def __iter__(self):
        share = self.batch // self.world
        for step in range(self.start, self.stop):
            epoch, k = divmod(step, self.pairs // self.batch)
            first = k * self.batch + self.rank * share
            indices = shuffled(self.seed, epoch, self.pairs)[first:first + share].tolist()
            yield [(epoch, position, index) for position, index in enumerate(indices, first)]


@dataclass
class Views(Dataset):
    """The training set: (epoch, position, index) -> the views of one pair, for `collate`.

    counts: global and local images, global and local captions. augment: 'full' is the released recipe, 'crops' leaves
    colours and sides alone, for captions that name them.
    A pair that cannot be read is replaced by one further on in the order. Each worker names it once, and it is counted.
    """
    shards: Shards
    tokenizer: Tokenizer
    config: object              # cosmos.Config
    seed: int
    batch: int
    counts: tuple = (2, 6, 2, 6)
    augment: str = 'full'

    def __post_init__(self):
        self.global_images, self.local_images, self.global_texts, self.local_texts = self.counts
        kinds = view_kinds(self.config)
        self.kinds = kinds[:self.global_images] + kinds[2:] * self.local_images
        self.reported = set()
        for i in range(min(FIRST_PAIRS, len(self.shards))):
            with suppress(ValueError):                  # a broken json is reported when it is its turn
                if unsplit(self.shards.record(i)):
                    warn(f"{self.shards.name(i)} has several sentences in one item of a list under DreamLIP's keys, "
                         'where none is split; give them as a string to python -m extras.prepare pack')
                    break

    def __getitem__(self, where):
        epoch, position, index = where
        pairs = len(self.shards)
        key = f'{self.seed} {epoch} {position // self.batch}'           # the same in all of a step
        for bad in range(MOST_BAD):
            try:
                crops, colours, captions, _ = self.views(epoch, index)
                return crops, torch.tensor(colours), self.tokenizer(captions), key, bad
            except Exception as error:  # decoders raise what they like: none ends a run
                if index not in self.reported:
                    self.reported.add(index)
                    print(f'skipped {self.shards.name(index)}: {error}', file=sys.stderr)
            # Not the next one: it is often in the same batch, where a pair that comes twice is its own negative. So a
            # batch further on. `bad`, as steps of one length might only meet pairs that cannot be read.
            position = (position + self.batch + bad) % pairs
            index = int(shuffled(self.seed, epoch, pairs)[position])
        raise ValueError(f'{MOST_BAD} pairs in a row cannot be read; '
                         'look at the shards with python -m extras.prepare inspect')

    def views(self, epoch, index):
        """-> V crops (3, s, s) uint8, the Colours of each, U captions as strings, and the V boxes; globals first."""
        rng = random.Random(f'{self.seed} {epoch} {index}')
        full = self.augment == 'full'
        captions = text_crops(self.shards.pool(index), rng, self.global_texts, self.local_texts)
        crops, boxes = image_crops(self.shards.image(index), self.kinds, rng, flip=full)
        colours = [draw_colours(kind, rng) if full else Colours() for kind in self.kinds]
        return crops, colours, captions, boxes


class Batch(NamedTuple):
    """Views of B pairs."""
    images: list        # V views (B, 3, s, s) uint8
    colours: object     # (B, V, 7), the numbers of Colours, on the CPU
    key: str            # of the step; from it comes the order of the jitters
    texts: list         # U captions (B, T_u) int64, globals first
    longest: int        # length of the longest global caption, rounded up
    bad: int            # pairs that were replaced because they could not be read

    def to(self, device):
        """The batch on a device, without waiting for it."""
        return self._replace(images=[view.to(device, non_blocking=True) for view in self.images],
                             texts=[text.to(device, non_blocking=True) for text in self.texts])

    def views(self):
        """V images (B, 3, s, s), float32, normalised."""
        views = []
        for k, images in enumerate(self.images):
            # ours: one order for a view of all pairs. The released code draws one for every image.
            jitters = random.Random(f'{self.key} {k}').sample(JITTERS, 4)
            views.append(normalize(recolour(images, self.colours[:, k], jitters)))
        return views


def collate(samples, multiple=1):
    """Samples -> Batch. Of a pair's captions 0 and 1 are the globals, the others locals.

    Caption 0 keeps all T positions: C^T reads its padding, too. Caption 1 is cut to the longest global, the others to
    the longest local, rounded up to a `multiple`, at most T.
    """
    images, colours, ids, keys, bad = default_collate(samples)         # ids (B, U, T)
    ends = ids.argmax(dim=2).amax(dim=0).tolist()       # U numbers; the largest id ends a text
    T = ids.shape[2]

    def cut(ends):
        return min(ceil((max(ends) + 1) / multiple) * multiple, T)

    longest = cut(ends[:2])
    lengths = [T, longest] + [cut(ends[2:] or ends)] * len(ends)        # longer than needed: zip stops with the texts
    texts = [text[:, :length] for text, length in zip(ids.unbind(dim=1), lengths)]
    return Batch(images, colours, keys[0], texts, longest, int(bad.sum()))


SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1                 # USR1: Slurm


def ignore_signals(worker):
    """Slurm and torchrun signal a whole process group. A worker that died of it would keep the run from saving."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def loader(views, batches, workers, multiple=1):
    """The plain DataLoader that serves batch after batch of an Order."""
    return DataLoader(views, batch_sampler=batches, num_workers=workers,
                      collate_fn=partial(collate, multiple=multiple),
                      pin_memory=torch.cuda.is_available(), worker_init_fn=ignore_signals)


FONTS = 'DejaVuSans.ttf', 'NotoSans-Regular.ttf', 'Arial Unicode.ttf'           # the last is macOS's


@lru_cache              # so that the line is printed once: all pictures have letters of one size
def picture_font(size):
    """A font with letters of many scripts, where Pillow finds one among the system's; else its own, and a line."""
    for name in FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    warn('no font DejaVu or Noto was found: in pictures, letters that are not ASCII will be boxes; '
         'install one, as by apt install fonts-dejavu-core')
    return ImageFont.load_default(size)


def sample_views(views):
    """What the student is shown: yields (index, views (3, s, s) in [0, 1], captions, boxes) of pairs from all over."""
    for index in np.linspace(0, len(views.shards) - 1, 4, dtype=int):
        with suppress(Exception):   # a picture for the reader: do without this pair
            crops, colours, captions, boxes = views.views(0, index)
            images = []
            for crop, numbers in zip(crops, colours):
                view = recolour(crop[None], torch.tensor([numbers]), JITTERS)
                images.append(view[0])
            yield index, images, captions, boxes


# --- 7. Commands -----------------------------------------------------------------------------------------------------

# What others call these flags: spelling does not tell.
OTHER_NAMES = {'--learning-rate': '--lr', '--weight-decay': '--wd'}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence, with exit status 1. An epilog keeps its lines: it is the program's
    docstring."""

    def __init__(self, *args, formatter_class=argparse.RawDescriptionHelpFormatter, **settings):
        super().__init__(*args, formatter_class=formatter_class, **settings)

    def parse_known_args(self, *args):
        """Refuses a flag that it does not know, here: the parser of a subcommand knows the right ones."""
        namespace, unknown = super().parse_known_args(*args)
        for flag in unknown:
            if flag.startswith('-'):
                name = flag.partition('=')[0]
                name = OTHER_NAMES.get(name, name)
                near = difflib.get_close_matches(name, self._option_string_actions, n=1, cutoff=0.7)
                remedy = f'did you mean {near[0]}?' if near else f'see {self.prog} --help'
                self.error(f"unknown argument '{flag}'; {remedy}")
        return namespace, unknown

    def error(self, message):
        self.exit(1, f'error: {message}\n')


def cli(main):
    """Run a command: what a user can cause becomes one sentence and exit status 1, all else keeps its traceback."""
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
        if multiprocessing.active_children() or dist.is_initialized():
            print(message, file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)
        sys.exit(message)
