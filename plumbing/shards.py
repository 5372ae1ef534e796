"""Tars of image-text pairs: every header is read once, into an index; then any pair is one read away."""
import hashlib
import io
import os
import re
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing.captions import caption_pool, record_of
from plumbing.errors import Refused, Unreadable
from plumbing.files import replacing
from plumbing.images import read_image
from plumbing.tars import COLUMN, HEADERS, NO_PAIR, WIDTH, find_shards, member_name, scan_shard, why_unreadable

MINUTE = 60.0       # seconds, between two lines that say how far the headers are read
FIRST_PAIRS = 20  # one of these must be usable, else no run starts: enough to tell wrong keys from a broken pair


class Shards:
    """Random access to all pairs of a set of tars.

    caption_keys: the json keys of the captions, joined by commas. split: see find_shards. index: a file that `save` has
    written, or will write. If it is of the same tars (their names, sizes and times of modification) it is mapped, and
    no header is read. The first pairs are tried.
    fingerprint: of names and sizes alone, so that a copied set is the same set.
    """

    def __init__(self, paths, caption_keys=None, split=None, index=None):
        self.paths = find_shards(paths, split)
        self.caption_keys = re.split(' *, *', caption_keys.strip()) if caption_keys else None
        self.sizes = list(map(os.path.getsize, self.paths))
        names = list(map(os.path.basename, self.paths))
        self.fingerprint = digest([names, self.sizes])
        times = list(map(os.path.getmtime, self.paths))
        self.mark = int(digest([names, self.sizes, times])[:15], 16)
        stored = self.read_index(index)
        self.is_mapped = stored is not None
        # As in the file: one flat array of the mark and all rows. To join them there would take a copy.
        self.stored = stored if self.is_mapped else self.scan(index and part_of(index))
        self.check_first_pairs()

    @property
    def index(self):
        """(pairs, WIDTH), a view."""
        return self.stored[1:].reshape(-1, WIDTH)

    def __len__(self):
        return len(self.index)

    def scan(self, part):
        """The mark and the rows. Every minute what was read so far goes into the file `part`, if one is named, so that
        a start which is interrupted goes on there; and without a terminal, which has a bar, a line says how far it is.
        """
        tables = [[self.mark]]
        shard = 0                                       # the next one to be read
        before = self.read_index(part)
        if before is not None and len(before) > 1:
            tables = [before]
            shard = int(before[-WIDTH]) + 1             # its last row is of the last shard that had pairs
        # Few shards are not worth the seconds that processes take to start.
        executor = ProcessPoolExecutor if len(self.paths) - shard > 16 else ThreadPoolExecutor
        shown = time.monotonic()
        with executor(min(32, os.cpu_count() + 4)) as pool:
            found = pool.map(scan_shard, self.paths[shard:], range(shard, len(self.paths)))
            bar = tqdm(found, 'reading headers', len(self.paths), initial=shard, disable=None)
            for table in bar:
                tables.append(table.ravel())
                shard += 1
                if time.monotonic() - shown > MINUTE:
                    shown = time.monotonic()
                    if bar.disable:
                        print(f'data       the headers of {shard:,} of {len(self.paths):,} shards are read')
                    if part:
                        write_index(part, np.concatenate(tables))
        return np.concatenate(tables)

    def save(self, path):
        """Write the index, unless it was read from there."""
        if not self.is_mapped:
            write_index(path, self.stored)
            part_of(path).unlink(missing_ok=True)

    def read_index(self, path):
        """-> the mark and the rows; None where there is no file, or one of other shards: then a line says so."""
        if not path or not os.path.exists(path):
            return None
        with suppress(OSError, ValueError, EOFError):   # no array of numpy's
            stored = np.load(path, mmap_mode='r')
            if stored.ndim == 1 and len(stored) % WIDTH == 1 and stored[0] == self.mark:
                return stored
        print(f'data       {path} is of other shards, or they have changed since: '
              'their headers are read again')
        return None

    def check_first_pairs(self):
        """Refused where none of them can be used: the captions have other keys, or the images are of another kind."""
        if not len(self):
            raise Refused(f'{self.paths[0]}: {why_unreadable(self.paths[0]) or NO_PAIR}')
        for i in range(min(FIRST_PAIRS, len(self))):
            try:
                self.pool(i)
                read_image(self.image(i))
                return
            except Unreadable as error:
                problem = error
        raise Refused(f'{self.name(i)} and the pairs before it cannot be used ({problem}); name the captions with '
                      '--caption-keys, or look at the shards with python -m extras.prepare inspect')

    def read(self, shard, places):
        """The bytes at several places (offset, size) of a tar. Unreadable where it is cut off, or where the disk fails
        twice."""
        path = self.paths[shard]
        try:
            found = read_at(path, places)
        except OSError:
            try:
                found = read_at(path, places)           # network disks stumble
            except OSError as error:
                raise Unreadable(f'{path} cannot be read ({error})') from None
        for data, (_, size) in zip(found, places):
            if len(data) < size:
                raise Unreadable(f'{path} has been cut off: it had {self.sizes[shard]:,} bytes, now '
                                 f'{os.path.getsize(path):,}')
        return found

    def members(self, i, *kinds):
        """The bytes of these members of pair i, b'' for one that it lacks. Its tar is opened once for all of them."""
        row = self.index[i].tolist()
        places = []
        for kind in kinds:
            column = COLUMN[kind]
            places.append(row[column:column + 2])
        return self.read(row[0], places)

    def image(self, i):
        """The encoded bytes of image i."""
        [data] = self.members(i, 'jpg')         # one column for all kinds of images
        return data

    def record(self, i):
        """The json of pair i as a dict, with the .txt under 'txt'. A bare list becomes {'captions': list}.

        Raises Unreadable for what is no JSON.
        """
        return record_of(*self.members(i, 'json', 'txt'))

    def pool(self, i):
        """All sentences of pair i. Unreadable when there is none."""
        return self.sentences(i, *self.members(i, *self.kinds_of_text(i)))

    def pair(self, i):
        """-> all sentences of pair i, as `pool` gives them, and the encoded bytes of its image, by one open."""
        image, *texts = self.members(i, 'jpg', *self.kinds_of_text(i))
        return self.sentences(i, *texts), image

    def kinds_of_text(self, i):
        """Which members have the captions of pair i. img2dataset repeats that of the json in a .txt, so the .txt is
        read only if there is no json, or if --caption-keys names it."""
        has_json = self.index[i, COLUMN['json'] + 1] > 0
        if has_json and 'txt' not in (self.caption_keys or []):
            return ['json']
        return ['json', 'txt']

    def sentences(self, i, *texts):
        pool = caption_pool(record_of(*texts), self.caption_keys)
        if not pool:
            record = self.record(i)                     # with the .txt, whatever was read before
            pool = caption_pool(record, self.caption_keys)
            if not pool:
                raise Unreadable(f"no usable caption under the keys {', '.join(sorted(record)) or '(none)'}")
        return pool

    def name(self, i):
        """Where pair i lies, for messages: the tar, the member, and the file that extras.prepare has packed it from."""
        shard, offset = self.index[i, :2].tolist()
        name = f'byte {offset}'
        with suppress(Unreadable, KeyError):
            size = min(offset, HEADERS * tarfile.BLOCKSIZE)
            [headers] = self.read(shard, [(offset - size, size)])
            name = member_name(headers) or name
            name += f" ({self.record(i)['file']})"
        return f'{self.paths[shard]}:{name}'


def part_of(index):
    """The file beside an index that holds the part of it that has been read."""
    return Path(f'{index}.part')


def write_index(path, stored):
    with replacing(path) as temporary, open(temporary, 'wb') as file:
        np.save(file, stored)


def digest(value):
    return hashlib.sha1(repr(value).encode()).hexdigest()


def read_at(path, places):
    """The bytes at several places (offset, size) of a file.

    The buffer is a block of a tar. By itself `open` takes a block of the file system, 1 MB on NFS and 4 MB on Lustre,
    and fills it for an image of 30 kB.
    """
    found = []
    # Opened anew for each pair, so that there are never too many open.
    with open(path, 'rb', buffering=tarfile.BLOCKSIZE) as file:
        for offset, size in places:
            file.seek(offset)
            found.append(file.read(size))
    return found


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
