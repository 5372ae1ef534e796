"""Mistakes that a user can mend, commands that report them in one sentence, and files that are written whole."""
import argparse
import json
import os
import re
import sys
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

# --- 1. Mistakes and bugs --------------------------------------------------------------------------------------------

class Refused(ValueError):
    """A mistake that the user can mend: an option, a path, a format. One sentence with value, place and remedy."""


class Unreadable(Refused):
    """A pair whose image or json cannot be decoded, or that has no caption. Training takes another one instead."""


def need(condition, message):
    """Refused with this sentence unless the condition holds."""
    if not condition:
        raise Refused(message)


def warn(message):
    """A line on the terminal, once for all processes."""
    if os.environ.get('RANK', '0') == '0':
        print(f'WARNING    {message}', file=sys.stderr)


# --- 2. Commands -----------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse whose errors are Refused, and which takes no abbreviated options: a typo would pass as one. Its help
    shows the program's docstring as it stands."""

    def __init__(self, *args, **settings):
        super().__init__(*args, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message):
        raise Refused(f'{message}; see {self.prog} --help')


def number_type(kind, words, least, most=float('inf')):
    """A type for argparse: a number in [least, most]. `words` say which, for the error."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:      # NaN is in no range
            raise argparse.ArgumentTypeError(f'{text} is not {words}')
        return value
    return parse


def device_type(text):
    """A type for argparse: a device that torch has on this machine."""
    try:
        torch.zeros(1, device=text)
    except (RuntimeError, AssertionError) as error:         # AssertionError: torch was built without CUDA
        raise argparse.ArgumentTypeError(f'{text} is no device of this machine ({str(error)[:80]})') from None
    return text


positive = number_type(int, 'a whole number of 1 or more', 1)
count = number_type(int, 'a whole number of 0 or more', 0)
share = number_type(float, 'a number from 0 to 1', 0, 1)
amount = number_type(float, 'a number of 0 or more', 0, sys.float_info.max)
above_zero = number_type(float, 'a number above 0', sys.float_info.min, sys.float_info.max)


def command(main):
    """Run a program: Refused becomes one sentence and exit status 1. All else is a bug and keeps its traceback."""
    try:
        main()
    except Refused as error:
        # A DataLoader raises a worker's error again: "Caught Refused in ...", the traceback, the name of the class.
        message = re.sub(r'(?s)^Caught .*\nplumbing\.errors\.\w+: ', '', str(error))
        end(f'error: {message.rstrip()}')
    except Exception:
        end(traceback.format_exc())


def end(message):
    """End the process with status 1. With a process group sys.exit may hang, so then it is os._exit."""
    if dist.is_initialized():
        print(message, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)
    sys.exit(message)


# --- 3. Files --------------------------------------------------------------------------------------------------------

@contextmanager
def replacing(path):
    """A temporary path beside `path`, which takes its place when the block ends well and is removed when not."""
    path = Path(path)
    temporary = path.with_name(f'{path.name}.partial')
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


def field(record, name, path):
    """record[name], of what was read from the json file at `path`. Refused where it has none."""
    need(isinstance(record, dict) and name in record,
         f"{path} has another form than this command expects: '{name}' is missing in {str(record)[:80]}; see --help")
    return record[name]


def read_lines(path):
    """The lines of a text file that are not blank."""
    with reading(path):
        lines = Path(path).read_text(encoding='utf-8-sig').splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    need(lines, f'{path} holds no lines of text')
    return lines
