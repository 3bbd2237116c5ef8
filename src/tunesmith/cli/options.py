"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunesmith.inference.decoding import Decoding

FORMATS = ("auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text")


def whole_number(text: str) -> int:
    """A count of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def positive_number(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value) or value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def add_run(parser: argparse.ArgumentParser) -> None:
    """RUN and the device to load it to."""
    parser.add_argument("run", metavar="RUN", help="run directory, checkpoint, final/, adapter or model folder")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda where there is one)")


def add_rows(parser: argparse.ArgumentParser, *, batch_size: str) -> None:
    """How rows are read and how many are answered at once."""
    parser.add_argument(
        "--format", choices=FORMATS, default="auto", help="what a row looks like (default: by its columns)"
    )
    parser.add_argument("--batch-size", type=whole_number, default=16, metavar="N", help=f"{batch_size} (default: 16)")


def add_decoding(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    """How tokens are chosen; greedy unless a temperature is given."""
    help_text = f"longest answer (default: {max_new_tokens})"
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help=help_text)
    help_text = "0 is greedy (default); 1.0 draws from the model's own probabilities"
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help=help_text)
    help_text = "with a temperature: draw from the likeliest tokens that make up P"
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help=help_text)
    help_text = "with a temperature: draw from the K likeliest tokens"
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help=help_text)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")


def decoding_of(args: argparse.Namespace) -> Decoding:
    """The options of `add_decoding`, checked."""
    from tunesmith.inference.decoding import Decoding

    return Decoding(args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.seed)
