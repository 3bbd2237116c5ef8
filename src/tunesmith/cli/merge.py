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
from tunesmith.host.streams import show


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
    from rich.console import Console
    from rich.table import Table

    from tunesmith.export.merge import merge

    merged = merge(args.run, args.output, dtype=args.dtype, force=args.force, device=args.device)
    if args.json:
        print(json.dumps(asdict(merged), indent=2))
        return
    check = merged.merge_check
    table = Table("against the adapter", "max logit diff", "mean KL (nats)", "same top token")
    rows = [
        ("merged", check.merged),
        ("base", check.base),
        (f"noise of {check.dtype}", check.noise),
    ]
    if check.exact is not None:
        rows.insert(1, ("merged, in fp32", check.exact.difference))
    for name, diff in rows:
        table.add_row(name, f"{diff.max_logit:.3g}", f"{diff.mean_kl:.3g}", f"{diff.agreement:.2%}")
    Console().print(table)
    positions = f"{check.positions} positions of {check.probes}"
    print(f"largest logit difference {check.merged.max_logit:.3g}, over {positions}")
    for text, _ in check.rules:
        show(f"passed: {text}", sys.stdout)
    if merged.note:
        show(merged.note, sys.stdout)
    weights = f"{merged.bytes / 2**20:.0f} MiB in {merged.dtype}"
    print(f"{merged.output}: {weights}; Transformers loads it as it is")
    print(f"next: tunesmith chat {merged.output}")
