"""CLIP's byte-pair encoding: texts -> ids, with CLIP's merges or with merges learned from captions."""
import gzip
import hashlib
import html
import os
import re
import unicodedata
from collections import Counter
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing.errors import Refused, Unreadable, need

VOCAB_URL = 'https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz'
VOCAB_SHA256 = '924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a'
MOST_WORDS = 200_000    # in the cache of `word_ids`: the web has no end of new words
# Fusing a word takes time that grows with the square of its length, and so many letters fill any context: an id of
# CLIP's stands for at most 32.
LONGEST_WORD = 5000
LEARN_FROM = 5000       # merges are learned from this many words, the most frequent ones
LEARNED_VOCAB = 8192    # ids of a vocabulary that is learned
PAIRS_TO_LEARN = 20_000     # or up to twice as many, if there are more; enough for frequent words
VOCAB_HELP = (f'give the file at {VOCAB_URL} with --vocab PATH or COSMOS_VOCAB, or learn a vocabulary '
              'from your captions with --vocab learn')

# Every byte is written as one visible character, so that merges are lines of text. First come the bytes that are
# printable in Latin-1, which stand for themselves; the other 68 become characters from U+0100 on. NB: this order gives
# the ids 0..255. With any other order released weights would read noise, and nothing would say so.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_SYMBOL = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + k) for k, byte in enumerate(OTHERS)}

SPECIAL = '<start_of_text>', '<end_of_text>'    # as open_clip spells them
# CLIP's pattern has \p{L} and \p{N}, which `re` lacks. Here [^\W\d_] is a letter and \d a digit, and `apart` makes
# other numbers, such as ½, into words of their own.
WORD = re.compile(r"<start_of_text>|<end_of_text>|'(?:[stmd]|re|ve|ll)|[^\W\d_]+|\d|(?:[^\w\s]|_)+")
LIGATURE_OR_WIDE = '[\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\ufb00-\ufb06\uff01-\uffef]'


def clean(text):
    """The text as ftfy rewrites it: without control characters; with straight quotes instead of curly ones, with plain
    letters instead of ligatures and of wide or narrow forms, and with U+FFFD for lone surrogates. Then its entities are
    decoded, as CLIP does."""
    # ftfy decodes entities first. But it takes a text with a '<' for HTML, and leaves them as they are.
    if '<' not in text:
        text = unescape(text)
    text = re.sub('[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]', '', text)
    if not text.isascii():
        text = text.replace('\ufb05', 'ſt')             # NFKC would give 'st'
        text = re.sub(LIGATURE_OR_WIDE, plain, text)
        text = re.sub('[\u02bc\u2018-\u201b]', "'", text)
        text = re.sub('[\u201c-\u201f]', '"', text)
        text = re.sub('[\ud800-\udfff]', '\ufffd', text)
    return unescape(unicodedata.normalize('NFC', text))


def unescape(text):
    """'&amp;amp;lt;' -> '&lt;': decodes entities twice, because web captions hold entities in entities."""
    return html.unescape(html.unescape(text))


def plain(found):
    """A match of LIGATURE_OR_WIDE -> plain letters."""
    return unicodedata.normalize('NFKC', found[0])


@lru_cache
def apart(char):
    """Numbers such as ² ½ Ⅷ ① are not digits, so WORD would take them for letters, and 'm²' for one word. Spaces keep
    them apart. (三 is a number, too, but also a letter.)"""
    is_number = char.isnumeric() and not char.isalpha() and not char.isdecimal()
    return f' {char} ' if is_number else char


def symbols_of(word):
    """'cat' -> ['c', 'a', 't</w>']: a symbol per UTF-8 byte. The mark tells 'cat' from the 'cat' in 'cats'."""
    symbols = [BYTE_SYMBOL[byte] for byte in word.encode()]
    symbols[-1] += '</w>'
    return symbols


def fuse(symbols, left, right):
    """Joins neighbours `left` and `right`, from the left on: fuse(['a', 'a', 'a'], 'a', 'a') is ['aa', 'a']."""
    fused = []
    for symbol in symbols:
        if symbol == right and fused and fused[-1] == left:
            fused[-1] += symbol
        else:
            fused.append(symbol)
    return fused


def fetch_vocab():
    """Path of CLIP's merges in torch's cache, downloaded on first use. Refused if that fails."""
    path = Path(torch.hub.get_dir(), 'bpe_simple_vocab_16e6.txt.gz')
    # Several nodes may fetch at once, because torch renames the file only when it is whole.
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(VOCAB_URL, str(path), VOCAB_SHA256, progress=False)
        except (OSError, RuntimeError) as error:  # RuntimeError: a wrong SHA-256, say of a proxy's page
            raise Refused(f'{VOCAB_URL} cannot be fetched ({error}); without internet, save it once on a login node as '
                          f'{path}, or {VOCAB_HELP}') from None
    return path


class Tokenizer:
    """CLIP's tokenizer: clean a text, split it into words, byte-pair encode each word. tokenizer(texts) ->
    (n, context_length) int64

    merges: lines 'left right', in order of priority. From 0 on, the ids stand for the 256 bytes, the 256 bytes at the
    end of a word, the merges (one id each), the start, and the end. The end has the highest id, because the text tower
    finds it by argmax. Padding is 0.
    Ids equal CLIP's (simple_tokenizer.py with ftfy and regex). ours: ftfy's repair of wrongly decoded text ('Ã©' for
    'é', C1 controls) is left out; and U+0345, which regex takes for a letter, is not one here.
    """

    def __init__(self, merges, context_length=77):
        self.merges = list(merges)
        self.context_length = context_length
        self.rank = {tuple(line.split()): i for i, line in enumerate(self.merges)}
        byte_symbols = list(BYTE_SYMBOL.values())
        closing = [f'{symbol}</w>' for symbol in byte_symbols]
        fused = [left + right for left, right in self.rank]
        symbols = [*byte_symbols, *closing, *fused, *SPECIAL]
        # Two merges may give the same symbol, such as a + bc and ab + c. Its id is that of the later one, as in CLIP.
        self.ids = {symbol: i for i, symbol in enumerate(symbols)}
        self.vocab_size = len(symbols)
        self.sot, self.eot = [self.ids[symbol] for symbol in SPECIAL]

    @classmethod
    def clip(cls, path=None, context_length=77):
        """CLIP's 48,894 merges, from `path`, else $COSMOS_VOCAB, else `fetch_vocab`. Refused if it is another file."""
        path = os.path.expanduser(path or os.environ.get('COSMOS_VOCAB') or fetch_vocab())
        need(os.path.isfile(path), f'{path} does not exist; {VOCAB_HELP}')
        data = Path(path).read_bytes()
        need(hashlib.sha256(data).hexdigest() == VOCAB_SHA256,
             f"{path} is not CLIP's vocabulary (wrong SHA-256; perhaps a git-lfs pointer or a web page); {VOCAB_HELP}")
        lines = gzip.decompress(data).decode().split('\n')
        return cls(lines[1:48895], context_length)  # line 0 is a header; CLIP does not use the rest

    @classmethod
    def learn(cls, texts, vocab_size, context_length=77):
        """Merges the most frequent pair again and again, until there are `vocab_size` ids, or until no pair occurs
        twice. Of several equally frequent pairs the one that was met first is taken."""
        tally = Counter()
        for text in texts:
            tally.update(cls.split(text))
        words = {word: symbols_of(word) for word, _ in tally.most_common(LEARN_FROM) if word not in SPECIAL}
        # A dict, because a pair may be chosen twice: (abc, d) after a + bc has made abc, and again after ab + c.
        merges = {}
        most_merges = vocab_size - 2 * 256 - len(SPECIAL)
        for _ in tqdm(range(most_merges), 'learning merges', leave=False, disable=None):
            count = Counter()   # pair of symbols -> how often it occurs in these words
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
        """Words of the cleaned text by CLIP's pattern: letters, single digits, other signs, 's 't 're 've 'm 'll 'd.
        ours: only the beginning of a very long word is taken, because web pages hold endless ones."""
        text = clean(text).lower()
        if not text.isascii():
            text = ''.join(map(apart, text))
        return [word[:LONGEST_WORD] for word in WORD.findall(text)]

    @lru_cache(MOST_WORDS)
    def word_ids(self, word):
        """Ids of one word: fuses the pair of lowest rank while there is one."""
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
        ids = []
        for word in self.split(text):
            ids += self.word_ids(word)
        return ids

    def __call__(self, texts):
        """n texts (or one) -> (n, context_length) int64: start, ids, end, zeros. A long text loses its last ids."""
        if isinstance(texts, str):
            texts = [texts]
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in zip(ids, texts):
            encoded = [self.sot, *self.encode(text)[:self.context_length - 2], self.eot]
            row[:len(encoded)] = torch.tensor(encoded)
        return ids


def learn_merges(shards):
    """The merges of a vocabulary that is learned from pairs spread evenly over the set."""
    captions = []
    step = max(1, len(shards) // PAIRS_TO_LEARN)
    for i in range(0, len(shards), step):
        with suppress(Unreadable):                      # training reports a broken pair
            captions += shards.pool(i)
    return Tokenizer.learn(captions, LEARNED_VOCAB).merges
