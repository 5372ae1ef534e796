"""Tars: which ones a path means, and their members. What cannot be read of them costs a line, no run."""
import glob
import io
import os
import tarfile
from contextlib import suppress
from pathlib import Path

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
