"""The adapter into its base, with a proof.

example:
  tunesmith merge runs/my-run --output merged
  tunesmith merge runs/my-run --output merged --dtype fp32 --json

The folder is plain Transformers: weights in safetensors, tokenizer, chat template. It gets its name only after
Transformers has loaded it and answered like the adapter; otherwise it is kept as OUTPUT.rejected and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from tunesmith.errors import EXIT_OK

if TYPE_CHECKING:
    from tunesmith.inference.merge import Merged


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory, checkpoint, final/ or adapter's folder")
    parser.add_argument("--output", required=True, metavar="DIR", help="a folder that is new or empty")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="of the written weights (default: the base's)"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace what is in the output folder, once the proof is passed"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda where there is one)")


def run(args: argparse.Namespace) -> int:
    from tunesmith.inference.merge import merge

    done = merge(args.run, args.output, dtype=args.dtype, force=args.force, device=args.device)
    if args.json:
        print(done.to_json())
    else:
        show(done)
    return EXIT_OK


def show(done: Merged) -> None:
    """The proof as a table, then where the model lies and how to use it; on stdout."""
    from rich.console import Console
    from rich.table import Table

    proof = done.merge_check
    table = Table("against the adapter", "max logit diff", "mean KL (nats)", "same top token")
    rows = [("merged", proof.merged), ("base: what was taught", proof.base), (f"noise of {proof.dtype}", proof.noise)]
    if proof.exact is not None:
        rows.insert(1, ("merged, in fp32", proof.exact.difference))
    for name, diff in rows:
        table.add_row(name, f"{diff.max_logit:.3g}", f"{diff.mean_kl:.3g}", f"{diff.agreement:.2%}")
    Console(file=sys.stdout).print(table)
    print(f"largest logit difference {proof.merged.max_logit:.3g}, over {proof.positions} positions of {proof.probes}")
    for text, _ in proof.rules:
        print(f"passed: {text}")
    if proof.exact is None and proof.dtype != "fp32":
        print("not compared in fp32: no room in memory for the model in fp32")
    if done.note:
        print(done.note)
    print(f"{done.output}: {done.bytes / 2**20:.0f} MiB in {done.dtype}, to be loaded by Transformers as it is")
    print(f"next: tunesmith chat {done.output}")
