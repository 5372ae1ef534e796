"""Files that are written whole, and read with a sentence where they are broken."""
import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from plumbing.errors import Refused, need


@contextmanager
def replacing(path):
    """A temporary path beside `path`, which takes its place when the block ends well and is removed when not. Its name
    is random, so that two processes do not write into one file."""
    path = Path(path)
    temporary = path.with_name(f'{path.name}.{os.urandom(4).hex()}.partial')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, 'rb+') as file:
            os.fsync(file.fileno())     # else a crash of the machine may leave an empty file under the name
        temporary.replace(path)
    except OSError as error:
        raise Refused(f'{path} cannot be written ({error}); what was there before is whole') from None
    finally:
        with suppress(OSError):         # it is gone, or never was
            temporary.unlink()


def save_tensors(path, value):
    """torch.save, whole or not at all."""
    with replacing(path) as temporary:
        try:
            torch.save(value, temporary)
        except RuntimeError as error:   # torch's error for a full disk
            raise OSError(error) from None


def write_json(path, value):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))


@contextmanager
def reading(path):
    """Inside this block, errors of reading and decoding the file at `path` become Refused, with its name."""
    try:
        yield
    except (OSError, UnicodeError, json.JSONDecodeError) as error:
        raise Refused(f'{path} cannot be read as this command expects ({type(error).__name__}: {error}); '
                      'see --help') from None


def read_json(path):
    with reading(path):
        # -sig: a byte order mark or none
        return json.loads(Path(path).read_text(encoding='utf-8-sig'))


def field(record, name, path, kind=object):
    """record[name], of what was read from the json file at `path`. Refused if there is none, or none of this kind."""
    need(isinstance(record, dict) and name in record and isinstance(record[name], kind),
         f"{path} has another form than this command expects: '{name}' is missing in {str(record)[:80]}, "
         'or is of another kind; see --help')
    return record[name]


def read_lines(path, numbered=False):
    """The lines of a text file that are not blank.

    numbered: line i is about number i. Then a blank line is refused, for it would shift the others; at the end it is
    none.
    """
    with reading(path):
        text = Path(path).read_text(encoding='utf-8-sig').rstrip()
    need(text, f'{path} holds no lines of text')
    lines = [line.strip() for line in text.split('\n')]
    if numbered and '' in lines:
        raise Refused(f'line {lines.index("") + 1} of {path} is blank; give every class a line, '
                      'for the line decides which class it is')
    return [line for line in lines if line]
