"""Conversion of the command-line options for decoding to a `Decoding` object."""

import argparse

from tunesmith.answers.decoding import Decoding
from tunesmith.errors import UsageError


def read_decoding(args: argparse.Namespace) -> Decoding:
    """Build a `Decoding` from the command-line options that `add_decoding` has added.

    Raise UsageError if an option is out of range.
    """
    try:
        return Decoding(args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.seed)
    except UsageError as error:
        error.where = f"--{error.where.replace('_', '-')}"
        raise
