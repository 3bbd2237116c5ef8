"""The options of `add_decoding`, read: how the tokens of answers are chosen."""

import argparse

from tunesmith.errors import UsageError
from tunesmith.inference.decoding import Decoding


def decoding_of(args: argparse.Namespace) -> Decoding:
    """Read the options of `add_decoding`; UsageError where one is out of range."""
    try:
        return Decoding(args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.seed)
    except UsageError as error:
        error.where = f"--{error.where.replace('_', '-')}"
        raise
