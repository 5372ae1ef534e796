"""Tars of image-text pairs. Every header is read once, into an index; after that any pair is one read away."""
import hashlib
import io
import os
import re
import tarfile
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm.contrib.concurrent import process_map, thread_map

from plumbing.captions import caption_pool, record_of
from plumbing.errors import Refused, Unreadable
from plumbing.files import replacing
from plumbing.images import read_image
from plumbing.tars import COLUMN, NO_PAIR, WIDTH, find_shards, scan_shard

# A run starts only if at least one of its first 20 pairs can be used. These are enough to tell wrong keys from a few
# broken pairs.
FIRST_PAIRS = 20


class Shards:
    """Random access to all pairs of a set of tars.

    caption_keys: the json keys of the captions, joined by commas. split: see find_shards. index: a file that `save` has
    written, or will write. If it belongs to the same tars (same names, sizes and times of modification), it is mapped
    into memory, and no header is read. In either case the first pairs are read, to see whether they can be used.
    fingerprint: a hash of names and sizes only, so that a copied set counts as the same set.
    """

    def __init__(self, paths, caption_keys=None, split=None, index=None):
        self.paths = find_shards(paths, split)
        self.caption_keys = re.split(' *, *', caption_keys.strip()) if caption_keys else None
        self.sizes = list(map(os.path.getsize, self.paths))
        names = list(map(os.path.basename, self.paths))
        self.fingerprint = digest([names, self.sizes])
        times = list(map(os.path.getmtime, self.paths))
        # By this number a stored index knows its tars again: 60 bits, which fit into int64.
        self.mark = int(digest([names, self.sizes, times])[:15], 16)
        stored = self.read_index(index)
        self.is_mapped = stored is not None
        # The mark and all rows are kept in one flat array, as in the file. Otherwise saving would copy all rows.
        self.stored = stored if self.is_mapped else self.scan()
        self.check_first_pairs()

    @property
    def index(self):
        """The rows, (pairs, WIDTH), a view."""
        return self.stored[1:].reshape(-1, WIDTH)

    def __len__(self):
        return len(self.index)

    def scan(self):
        """Read all headers -> the mark and the rows, as one flat array."""
        # Processes take seconds to start, so for a few shards they are not worth it.
        scan_all = process_map if len(self.paths) > 16 else thread_map
        tables = scan_all(scan_shard, self.paths, range(len(self.paths)), chunksize=1, desc='reading headers',
                          disable=None)                 # None: no bar without a terminal
        return np.concatenate([[self.mark], *map(np.ravel, tables)])

    def save(self, path):
        """Write the index, unless it was read from a file."""
        if not self.is_mapped:
            with replacing(path) as temporary, open(temporary, 'wb') as file:
                np.save(file, self.stored)

    def read_index(self, path):
        """-> the mark and the rows; None if there is no file. None, too, if the file belongs to other shards or is
        damaged, and in that case a line says so."""
        if not path or not os.path.exists(path):
            return None
        with suppress(OSError, ValueError, EOFError):   # not a numpy array
            stored = np.load(path, mmap_mode='r')
            if stored.ndim == 1 and len(stored) % WIDTH == 1 and stored[0] == self.mark:
                return stored
        print(f'data       {path} belongs to other shards, or is damaged, or the shards have changed since it was '
              'written, so their headers are read again')
        return None

    def check_first_pairs(self):
        """Raises Refused if none of the first pairs can be used, which means that captions have other keys, or images
        are of another kind."""
        if not len(self):
            raise Refused(f'{self.paths[0]}: {NO_PAIR}')
        for i in range(min(FIRST_PAIRS, len(self))):
            try:
                self.pool(i)
                read_image(self.image(i))
                return
            except Unreadable as error:
                problem = error
        raise Refused(f'none of the first {i + 1} pairs can be used, the last is {self.name(i)} ({problem}); name the '
                      'captions with --caption-keys, or look at the shards with python -m extras.prepare inspect')

    def read(self, shard, places):
        """The bytes at several places (offset, size) of a tar. Unreadable if it is cut off, or if the disk fails twice.
        """
        path = self.paths[shard]
        try:
            found = read_at(path, places)
        except OSError:
            try:
                found = read_at(path, places)           # again, because network disks stumble
            except OSError as error:
                raise Unreadable(f'{path} cannot be read ({error})') from None
        for data, (_, size) in zip(found, places):
            if len(data) < size:
                raise Unreadable(f'{path} has been cut off: it had {self.sizes[shard]:,} bytes, now '
                                 f'{os.path.getsize(path):,}')
        return found

    def members(self, i, *kinds):
        """The bytes of these members of pair i, b'' for one that it lacks. The tar is opened once for all of them."""
        row = self.index[i].tolist()
        places = []
        for kind in kinds:
            column = COLUMN[kind]
            places.append(row[column:column + 2])
        return self.read(row[0], places)

    def image(self, i):
        """The encoded bytes of image i."""
        [data] = self.members(i, 'jpg')         # all kinds of images share this column
        return data

    def record(self, i):
        """The json of pair i as a dict, with the .txt under 'txt'. A bare list or string becomes {'captions': it}.

        Raises Unreadable if it is not JSON.
        """
        return record_of(*self.members(i, 'json', 'txt'))

    def pool(self, i):
        """All sentences of pair i. Unreadable if there are none."""
        return self.sentences(*self.members(i, 'json', 'txt'))

    def pair(self, i):
        """-> all sentences of pair i, as `pool` gives them, and the encoded bytes of its image. The tar is opened once.
        """
        image, *texts = self.members(i, 'jpg', 'json', 'txt')
        return self.sentences(*texts), image

    def sentences(self, json_bytes, txt_bytes):
        record = record_of(json_bytes, txt_bytes)
        pool = caption_pool(record, self.caption_keys)
        if not pool:
            raise Unreadable(f"no usable caption under the keys {', '.join(sorted(record)) or '(none)'}")
        return pool

    def name(self, i):
        """Where pair i lies, for messages: the tar, the member, and the file that extras.prepare packed it from. Of a
        name of over 100 bytes, only the part that the member's own header has."""
        shard, offset = self.index[i, :2].tolist()
        name = f'byte {offset}'
        with suppress(Unreadable, KeyError, tarfile.HeaderError):
            [header] = self.read(shard, [(offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)])
            name = tarfile.TarInfo.frombuf(header, 'utf-8', 'replace').name
            name += f" ({self.record(i)['file']})"
        return f'{self.paths[shard]}:{name}'


def digest(value):
    return hashlib.sha1(repr(value).encode()).hexdigest()


def read_at(path, places):
    """The bytes at several places (offset, size) of a file.

    The buffer is as large as a block of a tar. By default `open` uses a buffer as large as a block of the file system,
    1 MB on NFS and 4 MB on Lustre, and fills it even for an image of 30 kB.
    """
    found = []
    # Opened again for each pair, so that there are never too many open files.
    with open(path, 'rb', buffering=tarfile.BLOCKSIZE) as file:
        for offset, size in places:
            file.seek(offset)
            found.append(file.read(size))
    return found


def write_shard(path, members):
    """Write a tar of (name, bytes), whole or not at all, and none if there are no members. Equal members give equal
    bytes."""
    path = Path(path)
    with replacing(path) as partial, tarfile.open(partial, 'w', format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)            # its time of modification is 0
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    if not tar.members:
        path.unlink()
