"""Merge an adapter into its base, and check that the answers stay the same.

example:
  tunesmith merge runs/my-run --output merged
  tunesmith merge runs/my-run --output merged --dtype fp32 --json

The folder is plain Transformers: weights in safetensors, tokenizer, chat
template. It gets its name only after Transformers has loaded it and answered
like the adapter; otherwise it is kept as OUTPUT.rejected, and the exit code is
1.
"""

import argparse
import json
import sys
from dataclasses import asdict

from tunesmith.cli.options import add_json, add_run
from tunesmith.host.streams import width_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="a folder that is new or empty"
    )
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="of what is written (default: the base's)"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace an earlier merge there, once the check is passed",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    from tunesmith.export.merge import merge

    merged = merge(args.run, args.output, dtype=args.dtype, force=args.force, device=args.device)
    if args.json:
        print(json.dumps(asdict(merged), indent=2))
        return
    print(merged.table().text(width_of(sys.stdout)))
