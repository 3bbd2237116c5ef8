"""Merge an adapter into its base model, and check that the outputs stay the same.

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

from tunesmith.answers.load_run import locate_run
from tunesmith.cli.options import add_json, add_run, notify_weights
from tunesmith.host.streams import width_of
from tunesmith.tools.export.output import check_merge_output

LOADS_TORCH = "here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        help="dtype of the merged weights (default: the dtype of the base model)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace an existing merged model if the new one gives the same outputs as the "
        "adapter",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    # Check the paths first, because the import of torch takes seconds.
    location = locate_run(args.run, trust_remote_code=args.trust_remote_code)
    check_merge_output(args.run, args.output, location, force=args.force)
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
