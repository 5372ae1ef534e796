"""Tars of image-text pairs. tarfile reads every header once, into an index; after that any pair is one read away."""
import glob
import hashlib
import io
import math
import os
import re
import tarfile
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm.contrib.concurrent import process_map, thread_map

from plumbing.captions import caption_pool, record_of
from plumbing.errors import Refused, Unreadable, warn
from plumbing.files import reading, replacing
from plumbing.images import load_image

# The index has 7 integers per pair. A size of 0 bytes means that the pair has no such member.
#     shard | image: offset, size | json: offset, size | txt: offset, size
# {ending of the name: column of the offset}. The size is in the next column.
COLUMN = {'jpg': 1, 'jpeg': 1, 'png': 1, 'webp': 1, 'json': 3, 'txt': 5}
WIDTH = 7
FIRST_PAIRS = 20        # enough to tell wrong keys from a few broken pairs

# --- 1. Any pair of a set --------------------------------------------------------------------------------------------

class Shards:
    """Random access to all pairs of a set of tars.

    caption_keys: the json keys of the captions, joined by commas. split: see find_shards. index: the path of a table
    that `save` has written or will write, such as OUT/index.npy. A mark of the tars, a hash of their names, sizes and
    times of modification, is put into its name. So no header is read again if a table of the same tars is there.
    fingerprint: a hash that tells sets apart. It leaves out times, so that a copied set counts as the same set.
    """

    def __init__(self, paths, caption_keys=None, split=None, index=None):
        self.paths = find_shards(paths, split)
        self.caption_keys = re.split(' *, *', caption_keys.strip()) if caption_keys else None
        self.sizes = [os.path.getsize(path) for path in self.paths]
        names = [os.path.basename(path) for path in self.paths]
        times = [os.path.getmtime(path) for path in self.paths]
        mark = hashlib.sha1(repr([names, self.sizes, times]).encode()).hexdigest()[:15]
        self.file = index and Path(index).with_stem(f'{Path(index).stem}-{mark}')
        stored = self.stored()
        self.index = self.scan() if stored is None else stored          # (pairs, WIDTH)
        self.check_first_pairs()
        self.fingerprint = self.hash_of_content(names)

    def __len__(self):
        return len(self.index)

    def scan(self):
        """Read all headers -> the index."""
        # Processes take seconds to start, so for a few shards they are not worth it.
        scan_all = process_map if len(self.paths) > 16 else thread_map
        numbers = range(len(self.paths))
        tables = scan_all(scan_shard, self.paths, numbers, chunksize=1, desc='reading headers', disable=None)
        return np.concatenate(tables)

    def save(self):
        """Write the index, unless it was read from its file."""
        if not isinstance(self.index, np.memmap):
            with replacing(self.file) as temporary, open(temporary, 'wb') as file:
                np.save(file, self.index)

    def stored(self):
        """-> the index in the file. None if there is no file, or if a line says that it is damaged."""
        if not self.file or not self.file.exists():
            return None
        with suppress(OSError, ValueError, EOFError):   # not a numpy array
            table = np.load(self.file, mmap_mode='r')
            if table.shape[1:] == (WIDTH,):
                return table
        print(f'data       {self.file} is damaged, so headers are read again')
        return None

    def hash_of_content(self, names):
        """Two sets may have tars of the same names and sizes, and even pairs at the same places. So a few kB of each tar
        are read, too, a quarter of the tar apart."""
        digest = hashlib.sha1(repr([names, self.sizes]).encode())
        digest.update(np.ascontiguousarray(self.index))
        for path, size in zip(self.paths, self.sizes):
            with reading(path), open(path, 'rb', buffering=0) as file:
                for quarter in range(4):
                    file.seek(size * quarter // 4)
                    digest.update(file.read(4096))
        return digest.hexdigest()

    def check_first_pairs(self):
        """Refused if none can be used, because then captions have other keys, or images are of another kind. A line names
        those of --caption-keys that none of these pairs has, because they may be misspelt."""
        if not len(self):
            raise Refused(f'{self.paths[0]}: no readable tar of images, each with a .json or .txt of the same name '
                          'next to it; docs/data.md shows the format')
        first = range(min(FIRST_PAIRS, len(self)))
        keys = set()
        problems = []
        for i in first:
            try:
                keys |= self.record(i).keys()
                self.pool(i)
                load_image(self.image(i))
            except Unreadable as error:
                problems.append(f'{self.name(i)} ({error})')
        if len(problems) == len(first):
            raise Refused(f'none of the first {len(first)} pairs can be used, the last is {problems[-1]}; name the '
                          'captions with --caption-keys, or look at the shards with python -m extras.look')
        unknown = [key for key in self.caption_keys or () if key not in keys]
        if unknown:
            warn(f"none of the first {len(first)} pairs has the key {', '.join(unknown)} of --caption-keys; "
                 f"they have {', '.join(sorted(keys))}")

    def read(self, shard, places):
        """The bytes at several places (offset, size) of a tar. Unreadable if the disk fails, or the tar is cut off."""
        path = self.paths[shard]
        found = []
        try:
            # Opened for each pair, so that there are never too many open files. By default a buffer is as large as a
            # block of the file system, 1 MB on NFS and 4 MB on Lustre, and is filled even for an image of 30 kB.
            with open(path, 'rb', buffering=tarfile.BLOCKSIZE) as file:
                for offset, size in places:
                    file.seek(offset)
                    found.append(file.read(size))
        except OSError as error:
            raise Unreadable(f'{path} cannot be read ({error})') from None
        if sum(map(len, found)) < sum(size for _, size in places):
            raise Unreadable(f'{path} has been cut off since its headers were read')
        return found

    def members(self, i, *kinds):
        """The bytes of these members of pair i, b'' for one that it lacks."""
        row = self.index[i].tolist()
        places = [row[COLUMN[kind]:COLUMN[kind] + 2] for kind in kinds]
        return self.read(row[0], places)

    def image(self, i):
        """The encoded bytes of image i."""
        [data] = self.members(i, 'jpg')         # all kinds of images share this column
        return data

    def record(self, i):
        """The json and .txt of pair i as a dict, see record_of. Unreadable if it is not JSON."""
        return record_of(*self.members(i, 'json', 'txt'))

    def pool(self, i):
        """All sentences of pair i. Unreadable if there are none."""
        return self.sentences(self.record(i))

    def pair(self, i):
        """-> all sentences of pair i, and the encoded bytes of its image. The tar is opened once."""
        image, *texts = self.members(i, 'jpg', 'json', 'txt')
        return self.sentences(record_of(*texts)), image

    def sentences(self, record):
        pool = caption_pool(record, self.caption_keys)
        if not pool:
            keys = ', '.join(sorted(record)) or '(none)'
            raise Unreadable(f'no usable caption under the keys {keys}')
        return pool

    def name(self, i):
        """Where pair i lies, for messages: the tar, the member, and the file that extras.prepare packed it from."""
        shard, offset = self.index[i, :2].tolist()
        name = f'byte {offset}'
        with suppress(Unreadable, KeyError, tarfile.HeaderError):
            [header] = self.read(shard, [(offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)])
            # A name of over 100 bytes takes several headers; this one holds only its beginning.
            name = tarfile.TarInfo.frombuf(header, 'utf-8', 'replace').name
            name += f" ({self.record(i)['file']})"
        return f'{self.paths[shard]}:{name}'


# --- 2. Which tars a path means --------------------------------------------------------------------------------------

def find_shards(paths, split=None):
    """A tar, a folder of tars, a quoted glob, or a list of these -> sorted paths of tars, each once.

    split: 'train' or 'val'. If a folder holds both as subfolders, this one is taken, and a line says so.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    tars = []
    for path in map(str, paths):
        matches = [path] if os.path.exists(path) else glob.glob(path)
        for match in matches or [path]:
            if split and os.path.isdir(f'{match}/train') and os.path.isdir(f'{match}/val'):
                match = f'{match}/{split}'
                print(f'data       reading {match}; its folder holds train/ and val/')
            if os.path.isdir(match):
                tars += glob.glob(f'{glob.escape(match)}/*.tar') or [match]
            else:
                tars.append(match)
    found = [tar for tar in tars if os.path.isfile(tar)]
    missing = [tar for tar in tars if not os.path.isfile(tar)]
    if not found:
        raise Refused(f"'{missing[0]}' does not exist or holds no .tar file; give tars, or folders of them")
    if missing:
        warn(f'{len(missing)} of {len(tars)} shards are missing, the first is {missing[0]}')
    unique = {os.path.realpath(path): path for path in sorted(found)}
    if len(unique) < len(found):
        warn(f'{len(found) - len(unique)} shards are named twice; each is used once')
    return sorted(unique.values())


# --- 3. Which pairs a tar holds --------------------------------------------------------------------------------------

def tar_members(path):
    """The members of a tar, as tarfile's TarInfo. If the tar is damaged, those that tarfile can read, and a line.

    ignore_zeros allows tars that were joined by `cat`. It also makes tarfile step silently over most headers that it
    cannot read. It stops at the others, and where a file is cut off.
    """
    length = os.path.getsize(path)
    end = 0                             # of what could be read
    holes = 0                           # how many bytes between members tarfile stepped over
    is_whole = False
    try:
        # Without a buffer, because it would be filled anew for each header of 512 bytes, on Lustre with 4 MB.
        with open(path, 'rb', buffering=0) as file, tarfile.open(fileobj=file, mode='r:', ignore_zeros=True) as tar:
            for member in tar:
                # A negative size would send tarfile back again and again. The other member is cut off.
                if member.size < 0 or member.offset_data + member.size > length:
                    break
                if member.offset > end:         # between tars that were joined by `cat` there are a few kB of zeros
                    file.seek(end)
                    skipped = file.read(member.offset - end)
                    if any(skipped) or len(skipped) > 2 * tarfile.RECORDSIZE:
                        holes += len(skipped)
                yield member
                blocks = math.ceil(member.size / tarfile.BLOCKSIZE)
                end = member.offset_data + blocks * tarfile.BLOCKSIZE
            is_whole = tar.offset == length             # else reading has stopped before the end
    except OSError as error:            # of the disk, or a lack of permission
        raise Refused(f'{path} cannot be read ({error}); mend that, or leave it out') from None
    except Exception:                   # tarfile raises many kinds for a header that it cannot read
        pass
    if holes:
        warn(f'{path} is damaged: {holes:,} bytes between its members cannot be read, and their pairs are left out')
    if not is_whole:
        warn(f'{path} is damaged after byte {end:,}, or is not a tar; only what could be read is used')


def scan_shard(path, number):
    """Headers of one tar -> the rows of its pairs in the index, in the order of the tar.

    The members of a pair are neighbours, as in WebDataset. If a name comes up again later, it is another pair. As in
    WebDataset, a name ends at its first dot. So a.v2.jpg and a.v2.json are not a pair, and a line says so.
    """
    rows = []
    open_stem = None                                    # of the pair that is being read
    kinds = set()                                       # of its members so far
    left_out = 0
    dotted = defaultdict(set)                           # {a.v2: its columns}
    for member in tar_members(path):
        name = os.path.basename(member.name)
        if name.startswith('.'):                        # hidden, as the ._0.jpg that macOS adds for each 0.jpg
            continue
        ending = name.partition('.')[2]                 # after the first dot
        stem = member.name.removesuffix(ending)         # with its folders
        kind = ending.lower()
        if kind not in COLUMN:
            longer_stem, _, last = member.name.rpartition('.')
            if last.lower() in COLUMN:
                dotted[longer_stem].add(COLUMN[last.lower()])
            continue
        if member.issym() or member.islnk():            # a link has no bytes of its own
            left_out += 1
            continue
        if stem != open_stem or kind in kinds:
            open_stem = stem
            kinds = set()
            row = [number] + [0] * (WIDTH - 1)
            rows.append(row)
        kinds.add(kind)
        column = COLUMN[kind]
        if not row[column + 1]:                         # of a .jpg and a .png the first one counts
            row[column:column + 2] = member.offset_data, member.size
    table = np.array(rows, np.int64).reshape(-1, WIDTH)
    image_size, json_size, txt_size = table[:, 2::2].T
    pairs = table[(image_size > 0) & (json_size + txt_size > 0)]
    left_out += len(rows) - len(pairs)
    if left_out or not len(pairs):
        warn(f'{path} has {len(pairs):,} pairs; {left_out:,} links and incomplete pairs are left out')
    # Those that have an image and a text.
    lost = [name for name in dotted if COLUMN['jpg'] in dotted[name] and len(dotted[name]) > 1]
    if lost:
        warn(f'{path} has {len(lost):,} pairs with a dot in their name, such as {lost[0]}, which are '
             'left out; as in WebDataset, a name ends at its first dot, so rename them')
    return pairs


def write_shard(path, members):
    """Write a tar of (name, bytes), if there are any, whole or not at all. Equal members give equal bytes."""
    path = Path(path)
    with replacing(path) as partial, tarfile.open(partial, 'w', format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)            # its time of modification is 0
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    if not tar.members:
        path.unlink()
