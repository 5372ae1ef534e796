"""Files are written whole or not at all. If one cannot be read, the error is a sentence instead of a traceback."""
import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from plumbing.errors import Refused


@contextmanager
def replacing(path):
    """Yields a temporary path next to `path`. When the block ends well, the temporary file takes the place of `path`;
    otherwise it is removed. Its name is random, so that two processes do not write into the same file."""
    path = Path(path)
    temporary = path.with_name(f'{path.name}.{os.urandom(4).hex()}.partial')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, 'rb+') as file:
            os.fsync(file.fileno())     # else a crash of the machine may leave an empty file
        temporary.replace(path)
    except OSError as error:
        raise Refused(f'{path} cannot be written ({error}); nothing at this path was changed') from None
    finally:
        with suppress(OSError):         # it was renamed, or never written
            temporary.unlink()


def save_tensors(path, value):
    """torch.save, whole or not at all."""
    with replacing(path) as temporary:
        try:
            torch.save(value, temporary)
        except RuntimeError as error:           # torch's, for a full disk
            raise OSError(error) from None      # so that `replacing` reports it


def write_json(path, value):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))


def drop_lost_lines(path, step):
    """Of a file of JSON lines, if it is there, keep those up to this step, from which a run goes on. A crash may leave
    lines of steps that are lost, and a torn line, behind which the next one would stand."""
    if path.exists():
        *lines, _ = path.read_bytes().split(b'\n')             # after the last line break: nothing, or a torn line
        kept = [line + b'\n' for line in lines if json.loads(line).get('step', 0) <= step]
        with replacing(path) as temporary:
            temporary.write_bytes(b''.join(kept))


@contextmanager
def reading(path):
    """Inside this block, an error in reading or decoding the file at `path` becomes Refused, which names the file."""
    try:
        yield
    except (OSError, UnicodeError, json.JSONDecodeError) as error:
        kind = type(error).__name__
        raise Refused(f'{path} cannot be read as this command expects ({kind}: {error}); '
                      'see --help') from None


def read_json(path):
    with reading(path):
        # utf-8-sig reads a file with or without a byte order mark
        return json.loads(Path(path).read_text(encoding='utf-8-sig'))


def read_lines(path, numbered=False):
    """The lines of a text file that are not blank. numbered: the number of a line says which class it belongs to, so a
    blank line, which would shift those after it, is refused, except at the end."""
    with reading(path):
        text = Path(path).read_text(encoding='utf-8-sig').rstrip()
    lines = [line.strip() for line in text.split('\n')]
    if numbered and '' in lines:
        raise Refused(f'line {lines.index("") + 1} of {path} is blank; give every class a line, '
                      'because the line number says which class it is')
    return [line for line in lines if line]
