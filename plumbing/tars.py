"""Tars: which ones a path means, what members they have, and which members make up a pair. A damaged part of a tar is
left out, and does not end the run; in most cases a line says so."""
import glob
import os
import tarfile
from pathlib import Path

import numpy as np

from plumbing.errors import Refused, warn

# --- 1. Finding them -------------------------------------------------------------------------------------------------

def find_shards(paths, split=None):
    """A tar, a folder of tars, a quoted glob, or a list of these -> sorted paths of tars, each once.

    split: 'train' or 'val'. If a folder holds both as subfolders, this one is taken, and a line says so.
    Raises Refused if nothing is found. A line says how many paths lead nowhere, and how many tars are named twice.
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
                print(f'data       reading {match}; its folder holds train/ and val/')
            if os.path.isdir(match):
                tars += glob.glob(f'{glob.escape(match)}/*.tar')
            else:
                tars.append(match)
        for tar in tars or [path]:
            if os.path.isfile(tar):
                found.append(tar)
            else:
                missing.append(tar)
    if not found:
        raise Refused(f"'{missing[0]}' does not exist or holds no .tar file; give tars, or folders of them")
    if missing:
        warn(f'{len(missing)} of {len(missing) + len(found)} shards are missing, the first is {missing[0]}')
    unique = {os.path.realpath(path): path for path in sorted(found)}
    if len(unique) < len(found):
        warn(f'{len(found) - len(unique)} shards are named twice; each is used once')
    return sorted(unique.values())


# --- 2. Members ------------------------------------------------------------------------------------------------------

def tar_members(path):
    """The members of a tar, as tarfile's TarInfo. If the tar is damaged, those that tarfile can read.

    ignore_zeros allows tars that were joined by `cat`. It also makes tarfile step silently over most headers that it
    cannot read. It stops reading at the others, and at the place where a file is cut off; in both cases we print a
    line.
    """
    length = os.path.getsize(path)
    end = 0                                             # where the last whole member ends
    whole = False
    try:
        # Without a buffer, because it would be filled anew for each header of 512 bytes, on Lustre with 4 MB.
        with open(path, 'rb', buffering=0) as file, tarfile.open(fileobj=file, mode='r:', ignore_zeros=True) as tar:
            for member in tar:
                if member.size < 0:                     # broken: tarfile would jump back for ever
                    break
                if member.offset_data + member.size > length:           # cut off
                    break
                yield member
                end = member.offset_data + member.size
                if tar.offset > length:                 # only the zeros after the member are cut off
                    break
            else:                       # no break: tarfile stopped, at the end of the file or before
                whole = tar.offset == length
    except OSError as error:            # of the disk, or a lack of permission
        raise Refused(f'{path} cannot be read ({error}); mend that, or leave it out') from None
    except Exception:                   # tarfile raises many kinds for a header that it cannot read
        pass
    if not whole:
        warn(f'{path} is damaged, or is not a tar; only its first {end:,} bytes are used')


# --- 3. Pairs --------------------------------------------------------------------------------------------------------

# The index has 7 integers per pair. A size of 0 bytes means that the pair has no such member.
#     shard | image: offset, size | json: offset, size | txt: offset, size
# {ending of the name: column of the offset}. The size is in the next column.
COLUMN = {'jpg': 1, 'jpeg': 1, 'png': 1, 'webp': 1, 'json': 3, 'txt': 5}
WIDTH = 7
NO_PAIR = ('no readable tar of images, each next to a .json or .txt of the same name; unpack it if it is compressed, '
           'and see docs/data.md for the format')


def scan_shard(path, number):
    """Headers of one tar -> the rows of its pairs in the index, in the order of the tar.

    The members of a pair are neighbours, as in WebDataset. If a name comes up again later, it is another pair.
    """
    rows = []
    open_stem = None                                    # of the pair that is being read
    left_out = 0
    for member in tar_members(path):
        kind = os.path.basename(member.name).partition('.')[2]          # after the first dot
        stem = member.name.removesuffix(kind)           # with its folders
        kind = kind.lower()
        if kind not in COLUMN:
            continue
        if member.issym() or member.islnk():
            left_out += 1               # without bytes of its own
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

    pairs = []
    for row in rows:
        image_size, json_size, txt_size = row[2::2]
        if image_size and (json_size or txt_size):
            pairs.append(row)
    left_out += len(rows) - len(pairs)
    if not pairs:
        warn(f'{path}: {NO_PAIR}')
    elif left_out:
        warn(f'{path}: {left_out:,} links and incomplete pairs are left out; the files of a pair must be neighbours')
    return np.array(pairs, np.int64).reshape(-1, WIDTH)
