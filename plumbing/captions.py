"""Which keys of a pair's json hold its captions, and how a string is cut into sentences."""
import json
import re

from plumbing.errors import Unreadable

# --- 1. Keys ---------------------------------------------------------------------------------------------------------

SHORT = ['shortIB_captions', 'shortSV_captions', 'shortLLA_captions']
LONG = ['longIB_captions', 'longSV_captions', 'longLLA_captions']
# The keys of DreamLIP, the paper's main data. code≠paper: two summaries of the paper speak of the long captions; the
# released code uses raw and short ones as well.
DREAMLIP = ['raw_caption', *SHORT, *LONG]
# The pool comes from the first family that has a sentence. A key of yours belongs into HELD_OUT_KEYS of eval.py, too.
CAPTION_KEYS = [
    DREAMLIP,
    ['captions'],
    ['original_caption', 'caption'],            # PixelProse has both, img2dataset only the second
    ['txt'],
]


def record_of(json_bytes, txt_bytes):
    """The bytes of a .json and of a .txt (b'' if absent) -> a dict. A bare list or string becomes {'captions': it}."""
    try:
        record = json.loads(json_bytes or '{}')
        text = txt_bytes.decode()
    except (ValueError, RecursionError) as error:       # RecursionError: thousands of nested lists
        raise Unreadable(f'its json or .txt cannot be read: {error}') from None
    if not isinstance(record, dict):
        record = {'captions': record}
    if text and not record.get('txt'):
        record['txt'] = text
    return record


def caption_pool(record, keys=None):
    """The record's sentences as one flat list, duplicates kept; [] if it has none. keys: only these are looked up."""
    families = [keys] if keys else CAPTION_KEYS
    for family in families:
        pool = []
        for key in family:
            value = record.get(key)
            # As released, two kinds of strings are not split: the items of DreamLIP's lists, which are sentences
            # already, and original_caption. ours: a string under DreamLIP's keys is split. (The released code takes it
            # for a list of letters.)
            is_sentences = key in DREAMLIP and isinstance(value, list)
            pool += sentences(value, whole=is_sentences or key == 'original_caption')
        if pool:
            return pool
    return []


# --- 2. Sentences (ours) ---------------------------------------------------------------------------------------------

def sentences(value, whole=False):
    """A string, or a list -> the sentences of its strings. whole: each string is one sentence, and is not split."""
    found = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str):
            parts = [item] if whole else split(item)
            found += [without_spaced_stop(part) for part in parts if part.strip()]
    return found


def without_spaced_stop(text):
    """'a scarf , laughing .' -> 'a scarf , laughing'. Flickr8k writes a space before the full stop; both are cut."""
    return text.strip().removesuffix(' .').rstrip()


def split(text):
    """A sentence ends at a newline, at '</s>', or at a full stop before white space or the end; "3.5 m" stays whole.

    A full stop after a word of one letter does not end a sentence: "J. Smith", "e.g. a dog". The s of "dog's" does not
    count as a word.
    """
    parts = []
    start = 0
    # The group is a word of one character. A pattern for words of any length would be tried anew from each letter of a
    # word, which takes seconds for a long caption without spaces.
    for end in re.finditer(r"\n|</s>|((?<![\w'’])['’]*\w)?\.(?=\s|$)", text):
        word = end[1] or ''                     # the one-letter word before the full stop, '' if there is none
        if word and word[-1].isalpha():
            continue
        parts.append(text[start:end.start()] + word)
        start = end.end()
    return [*parts, text[start:]]
