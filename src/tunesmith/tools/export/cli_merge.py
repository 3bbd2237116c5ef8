"""Merge an adapter into its base, and check that outputs stay the same.

example:
  tunesmith merge runs/my-run --output merged
  tunesmith merge runs/my-run --output merged --dtype fp32 --json

The folder is in Transformers format: weights in safetensors, tokenizer, chat
template. It is renamed to OUTPUT only after Transformers has loaded it and
reproduced the adapter's outputs; otherwise it is kept as OUTPUT.rejected, and
the exit code is 1.
"""

import argparse
import json
import sys
from dataclasses import asdict

from tunesmith.cli.options import add_json, add_run, notify_weights
from tunesmith.host.streams import width_of
from tunesmith.inference.load_run import locate_run
from tunesmith.tools.export.output import merge_place

LOADS_TORCH = "here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        help="dtype of the weights (default: the base's)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace an existing merge once the check passes",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    # Wrong paths are reported before torch is imported.
    location = locate_run(args.run, trust_remote_code=args.trust_remote_code)
    merge_place(args.run, args.output, location, force=args.force)
    notify_weights(location)
    from tunesmith.tools.export.merge import merge

    merged = merge(
        args.run,
        args.output,
        dtype=args.dtype,
        force=args.force,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
    )
    if args.json:
        print(json.dumps(asdict(merged), indent=2))
        return
    print(merged.table().text(width_of(sys.stdout)))
