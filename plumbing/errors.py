"""Mistakes that a user can mend, and commands that report them in one sentence."""
import io
import os
import re
import sys
import traceback

import torch.distributed as dist

# --- 1. Mistakes and bugs --------------------------------------------------------------------------------------------

class Refused(ValueError):
    """A mistake that the user can mend: an option, a path, a format. Its message is one sentence, which names
    the value, the place and the remedy."""


class Unreadable(Refused):
    """A pair whose image or json cannot be decoded, or that has no caption. Training takes another pair instead."""


def need(condition, message):
    """Raises Refused with this sentence unless the condition holds."""
    if not condition:
        raise Refused(message)


def note(message):
    """Print a line that a user should know, on rank 0 only."""
    if os.environ.get('RANK', '0') == '0':
        print(f'note       {message}')


def warn(message):
    """Print a line on stderr, on rank 0 only."""
    if os.environ.get('RANK', '0') == '0':
        print(f'WARNING    {message}', file=sys.stderr)


# --- 2. Commands -----------------------------------------------------------------------------------------------------

def command(main):
    """Run a program. Refused becomes one sentence. Any other error is a bug, and keeps its traceback. Both exit with
    status 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # errors: names and captions from the web may hold half an emoji, which cannot be printed. line_buffering: if
        # stdout is a file, such as Slurm's log, Python would otherwise write many lines at a time, and late.
        sys.stdout.reconfigure(errors='backslashreplace', line_buffering=True)
    try:
        main()
    except Refused as error:
        # A DataLoader raises a worker's error again, but puts "Caught Refused in ...", the traceback and the name of
        # the class in front of its sentence.
        message = re.sub(r'(?s)^Caught .*\nplumbing\.errors\.\w+: ', '', str(error))
        message = f'error: {message.rstrip()}'
    except BrokenPipeError:                 # of `... | head`, which has read enough
        message = 'error: the program that read the output has ended'
        sys.stdout = open(os.devnull, 'w')  # else Python would try again to write what is left
    except Exception:
        message = traceback.format_exc()
    else:
        return
    if dist.is_initialized():           # sys.exit may hang then, see Processes.leave
        print(message, file=sys.stderr)
        sys.stdout.flush()
        os._exit(1)
    sys.exit(message)
