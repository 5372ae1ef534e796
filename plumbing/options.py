"""A parser whose errors are sentences, and the types of options."""
import argparse
import sys

import torch

from plumbing.errors import Refused


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
