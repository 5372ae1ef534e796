"""Mistakes that a user can mend, and commands that report them in one sentence."""
import io
import os
import re
import sys
import traceback

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

def command(main):
    """Run a program: Refused becomes one sentence and exit status 1. All else is a bug and keeps its traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names and captions of strangers may hold half an emoji. And a file, as Slurm's, would get 80 lines at a time.
        sys.stdout.reconfigure(errors='backslashreplace', line_buffering=True)
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
