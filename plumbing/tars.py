"""Tars: which ones a path means, their members, and which of these are a pair. What cannot be read of them costs a
line, no run."""
import glob
import io
import os
import tarfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np

from plumbing.errors import Refused, warn

# How compressed files begin, and what unpacks them.
COMPRESSED = {
    b'\x1f\x8b': 'gunzip',
    b'BZh9': 'bunzip2',
    b'\xfd7zXZ\0': 'unxz',
    b'\x28\xb5\x2f\xfd': 'unzstd'}

# --- 1. Finding them -------------------------------------------------------------------------------------------------

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
        raise Refused(nothing_in(missing[0]))
    if missing:
        warn(f'{len(missing)} of {len(missing) + len(found)} shards are missing, the first is {missing[0]}')
    unique = {os.path.realpath(path): path for path in sorted(found)}
    if len(unique) < len(found):
        warn(f'{len(found) - len(unique)} shards are named twice; each is used once')
    return sorted(unique.values())


def nothing_in(path):
    """What to say of a path that leads to no tar."""
    folder = glob.escape(path)
    deeper = glob.glob(f'{folder}/*/*.tar')
    if deeper:
        return (f"'{path}' holds no .tar file, but its subfolders hold {len(deeper)} tars: "
                f"give '{path}/*/*.tar'")
    compressed = glob.glob(f'{folder}/*.tar.*')
    if compressed:
        name = os.path.basename(compressed[0])
        return f"'{path}' holds no .tar file, but {len(compressed)} like {name}: unpack them"
    return f"'{path}' does not exist or holds no .tar file; give tars, or folders of them"


def why_unreadable(path):
    """What to say of a tar of which tarfile can read nothing: it is empty, or compressed; '' for neither."""
    with open(path, 'rb') as file:
        start = file.read(6)
    if not start:
        return 'is empty, it has 0 bytes; fetch it again'
    for mark, program in COMPRESSED.items():
        if start.startswith(mark):
            return f'is compressed, so no pair of it can be read alone; unpack it by {program}'
    return ''


# --- 2. Members ------------------------------------------------------------------------------------------------------

def tar_members(path):
    """The members of a tar, as tarfile's TarInfo. Of a damaged tar those that tarfile can read.

    ignore_zeros: tars may be joined by `cat`; and tarfile then steps over most headers that it cannot read, without a
    word. Others end the reading, as a file that is cut off does: then a line says so.
    """
    length = os.path.getsize(path)
    end = 0                                             # of the last whole member
    whole = False
    try:
        # Without a buffer, which would be filled for each header of 512 bytes: with 4 MB on Lustre.
        with open(path, 'rb', buffering=0) as file, tarfile.open(fileobj=file, mode='r:', ignore_zeros=True) as tar:
            for member in tar:
                if member.size < 0:                     # broken: tarfile would go back by it, and never end
                    break
                if member.offset_data + member.size > length:           # cut off
                    break
                yield member
                end = member.offset_data + member.size
                if tar.offset > length:                 # there tarfile would look for the next header
                    break
            else:                       # no `break`: tarfile came to an end, of the file or before
                whole = tar.offset == length
    except OSError:                     # of the disk
        raise
    except Exception:       # tarfile's, for a header that it cannot step over: TarError and many others
        pass
    if not whole:
        problem = '' if end else why_unreadable(path)
        problem = problem or f'is damaged behind byte {end:,}; what lies before it is used'
        warn(f'{path} {problem}')


HEADERS = 12            # blocks before a member's data, at most: for a name of 5,000 characters


def member_name(before):
    """The blocks before a member's data -> its name; '' where they hold none.

    The last block is the header of the member. A name that this cannot hold lies in two or more blocks before it, and
    before these lies their own header. So we go back, block by block, as long as one may begin there.
    """
    name = ''
    for size in range(tarfile.BLOCKSIZE, len(before) + 1, tarfile.BLOCKSIZE):
        with suppress(Exception):                       # tarfile's, as above
            file = io.BytesIO(before[-size:])
            tar = tarfile.open(fileobj=file, mode='r:', encoding='utf-8', errors='replace')
            member = tar.next()                         # None for a block of zeros
            if member and member.offset_data == size:
                name = member.name
    return name


# --- 3. Pairs --------------------------------------------------------------------------------------------------------

# The index has 7 integers a pair. A size of 0 bytes: the pair has no such member.
#     shard | image: offset, size | json: offset, size | txt: offset, size
# The column of the offset, by the ending of the name; that of the size is the next one.
COLUMN = {'jpg': 1, 'jpeg': 1, 'png': 1, 'webp': 1, 'json': 3, 'txt': 5}
WIDTH = 7
NO_PAIR = 'no readable tar of images, each beside a .json or .txt of the same name; see docs/data.md for the format'


def scan_shard(path, number):
    """Headers of one tar -> the rows of its pairs in the index, in the order of the tar.

    Members of a pair are neighbours, as WebDataset has it. A name that comes again later is another pair.
    """
    groups = []                                         # (stem, kinds of members, row)
    links = 0
    for member in tar_members(path):
        kind = os.path.basename(member.name).partition('.')[2]          # behind the first dot
        stem = member.name.removesuffix(kind)           # with its folders
        kind = kind.lower()
        if kind not in COLUMN:
            continue
        if member.issym() or member.islnk():
            links += 1
            continue
        if not groups or groups[-1][0] != stem or kind in groups[-1][1]:
            groups.append((stem, set(), [number] + [0] * (WIDTH - 1)))
        _, kinds, row = groups[-1]
        kinds.add(kind)
        column = COLUMN[kind]
        if not row[column + 1]:                         # of several images the first
            row[column:column + 2] = member.offset_data, member.size

    occurs = Counter(stem for stem, _, _ in groups)
    pairs = []
    apart = 0
    for stem, _, row in groups:
        image_size, json_size, txt_size = row[2::2]
        if image_size and (json_size or txt_size):
            pairs.append(row)
        elif occurs[stem] > 1:
            apart += 1
    if links:
        warn(f'{path}: {links} members are links to other files, and are left out; '
             'write the files themselves, by tar --dereference --hard-dereference')
    if apart:
        warn(f'{path}: {apart} members do not stand beside the others of their name, and are left out')
    if not pairs:
        warn(f'{path}: {NO_PAIR}')
    return np.array(pairs, np.int64).reshape(-1, WIDTH)
