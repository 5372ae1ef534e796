"""Tars of image-text pairs: every header is read once, into an index; then any pair is one read away."""
import glob
import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm.contrib.concurrent import process_map, thread_map

from plumbing.captions import caption_pool
from plumbing.errors import Refused, Unreadable, warn
from plumbing.files import replacing
from plumbing.images import read_image

# The index has 7 integers a pair. A size of 0 bytes: the pair has no such member.
#     shard | image: offset, size | json: offset, size | txt: offset, size
# The column of the offset, by the ending of the name; that of the size is the next one.
COLUMN = {'jpg': 1, 'jpeg': 1, 'png': 1, 'webp': 1, 'json': 3, 'txt': 5}
WIDTH = 7
FIRST_PAIRS = 20  # one of these must be usable, else no run starts: enough to tell wrong keys from a broken pair
NO_PAIR = 'no readable tar of images, each beside a .json or .txt of the same name; see docs/data.md for the format'

# --- 1. Finding tars, and reading their headers ----------------------------------------------------------------------

def find_shards(paths, split=None):
    """A tar, a folder of tars, a quoted glob, or a list of these -> sorted paths of tars, each once.

    split: 'train' or 'val'. Of a folder that holds both as subfolders, this one is taken, and a line says so.
    Raises Refused where nothing is found. A line says how many paths lead nowhere, or are named twice.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else paths
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
        raise Refused(f"'{missing[0]}' does not exist or holds no .tar file; give tars, or folders of "
                      'them')
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
    """Headers of one tar -> the rows of its pairs in the index, in the order of the tar.

    Members of a pair are neighbours, as WebDataset has it. A name that comes again later is another pair.
    """
    groups = []                                         # (stem, kinds of members, row)
    for name, offset, size in tar_files(path):
        kind = os.path.basename(name).partition('.')[2]                 # behind the first dot
        stem = name.removesuffix(kind)                  # with its folders
        kind = kind.lower()
        if kind not in COLUMN:
            continue
        if not groups or groups[-1][0] != stem or kind in groups[-1][1]:
            groups.append((stem, set(), [number] + [0] * (WIDTH - 1)))
        _, kinds, row = groups[-1]
        kinds.add(kind)
        column = COLUMN[kind]
        if not row[column + 1]:                         # of several images the first
            row[column:column + 2] = offset, size

    occurs = Counter(stem for stem, _, _ in groups)
    pairs = []
    apart = 0
    for stem, _, row in groups:
        image_size, json_size, txt_size = row[2::2]
        if image_size and (json_size or txt_size):
            pairs.append(row)
        elif occurs[stem] > 1:
            apart += 1
    if apart:
        warn(f'{path}: {apart} members do not stand beside the others of their name, and are left out')
    if not pairs:
        warn(f'{path}: {NO_PAIR}')
    return np.array(pairs, np.int64).reshape(-1, WIDTH)


# --- 2. Random access ------------------------------------------------------------------------------------------------

class Shards:
    """Random access to all pairs of a set of tars.

    caption_keys: the json keys of the captions, joined by commas. split: see find_shards. index: a file that `save` has
    written. If it is of the same tars (their names and sizes) it is mapped, and no header is read. The first pairs are
    tried.
    """

    def __init__(self, paths, caption_keys=None, split=None, index=None):
        self.paths = find_shards(paths, split)
        self.caption_keys = re.split(' *, *', caption_keys.strip()) if caption_keys else None
        self.sizes = list(map(os.path.getsize, self.paths))
        names = list(map(os.path.basename, self.paths))
        self.fingerprint = hashlib.sha1(repr([names, self.sizes]).encode()).hexdigest()
        self.mark = int(self.fingerprint[:15], 16)      # the first number of an index file
        stored = self.read_index(index)
        self.is_mapped = stored is not None
        self.index = stored if self.is_mapped else self.scan()          # (pairs, WIDTH)
        self.check_first_pairs()

    def __len__(self):
        return len(self.index)

    def scan(self):
        # Few shards are not worth the seconds that processes take to start.
        each = process_map if len(self.paths) > 16 else thread_map
        tables = each(scan_shard, self.paths, range(len(self.paths)), chunksize=1,
                      desc='reading headers', disable=None)
        return np.concatenate(tables)

    def save(self, path):
        """The index as one flat array: the mark, then the rows."""
        with replacing(path) as temporary, open(temporary, 'wb') as file:
            np.save(file, np.append(self.mark, self.index.ravel()))

    def read_index(self, path):
        """-> (pairs, WIDTH), or None where there is no file, or one of other shards."""
        with suppress(OSError, ValueError, EOFError):   # no file, or no array of numpy's
            stored = np.load(path, mmap_mode='r') if path else np.array([])
            if stored.ndim == 1 and len(stored) and stored[0] == self.mark:
                return stored[1:].reshape(-1, WIDTH)
        return None

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

    def read(self, shard, offset, size):
        """`size` bytes of a tar. Unreadable where it is cut off, or where the disk fails twice."""
        path = self.paths[shard]
        try:
            found = read_at(path, offset, size)
        except OSError:
            try:
                found = read_at(path, offset, size)     # network disks stumble
            except OSError as error:
                raise Unreadable(f'{path} cannot be read ({error})') from None
        if len(found) < size:
            raise Unreadable(f'{path} has been cut off: it had {self.sizes[shard]:,} bytes, now '
                             f'{os.path.getsize(path):,}')
        return found

    def member(self, i, kind):
        """The bytes of a member of pair i; b'' where it has none."""
        column = COLUMN[kind]
        shard, offset, size = self.index[i, [0, column, column + 1]].tolist()
        return self.read(shard, offset, size) if size else b''

    def image(self, i):
        """The encoded bytes of image i."""
        return self.member(i, 'jpg')            # one column for all kinds of images

    def record(self, i):
        """The json of pair i as a dict, with the .txt under 'txt'. A bare list becomes {'captions': list}.

        Raises Unreadable for what is no JSON.
        """
        text = self.member(i, 'json') or '{}'
        try:
            record = json.loads(text)
        except ValueError as error:
            raise Unreadable(f'its json cannot be read: {error}') from None
        if not isinstance(record, dict):
            record = {'captions': record}
        caption = self.member(i, 'txt')
        if caption and not record.get('txt'):
            record['txt'] = caption.decode('utf-8', 'replace')
        return record

    def pool(self, i):
        """All sentences of pair i. Unreadable when there is none."""
        record = self.record(i)
        pool = caption_pool(record, self.caption_keys)
        if not pool:
            raise Unreadable(f"no usable caption under the keys {', '.join(sorted(record)) or '(none)'}")
        return pool

    def name(self, i):
        """Where pair i lies, for messages: the tar, the member, and the file that extras.prepare has packed it from."""
        shard, offset = self.index[i, :2].tolist()
        name = f'byte {offset}'
        with suppress(Unreadable, tarfile.TarError, KeyError):
            # The block before the data is the member's header.
            header = self.read(shard, offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
            name = tarfile.TarInfo.frombuf(header, 'utf-8', 'replace').name
            name += f" ({self.record(i)['file']})"
        return f'{self.paths[shard]}:{name}'


def read_at(path, offset, size):
    with open(path, 'rb') as file:              # anew for each read, so that there are never too many open
        file.seek(offset)
        return file.read(size)


def write_shard(path, members):
    """A tar of (name, bytes), whole or not at all; of no members there is none. Equal members give equal bytes."""
    path = Path(path)
    with replacing(path) as partial, tarfile.open(partial, 'w', format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)            # its time is 0
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    if not tar.members:
        path.unlink()
