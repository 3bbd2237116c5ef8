"""How good a run is on a held-out file, beside its base.

example:
  tunesmith eval runs/my-run                # on the rows that the run itself held out
  tunesmith eval runs/my-run --data held-out.jsonl --exact-match --max-examples 100
  tunesmith eval runs/my-run --data held-out.csv --columns prompt=question,completion=answer
  tunesmith eval runs/my-run --no-base --json

Loss, perplexity and token accuracy are over the supervised tokens, given all true tokens before,
computed as in training. Exact match answers greedily and compares with the row's answer after
removing outer whitespace and making every run of whitespace one space.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tunesmith.cli.options import ProgressCounter, add_rows, add_run, fixes_as_options, whole_number
from tunesmith.errors import UsageError

if TYPE_CHECKING:
    from tunesmith.inference.evaluate import EvalResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    files = "jsonl, json, csv, parquet, or a Hub id"
    data = f"rows with answers: {files} (default: the rows that the run held out)"
    parser.add_argument("--data", metavar="FILE", help=data)
    parser.add_argument(
        "--split", metavar="SPLIT", help="of a Hub dataset, or a slice such as train[:100]"
    )
    parser.add_argument(
        "--max-examples", type=whole_number, metavar="N", help="take the first N rows"
    )
    beside = "score the base beside it (default: yes)"
    parser.add_argument("--base", action=argparse.BooleanOptionalAction, default=True, help=beside)
    parser.add_argument(
        "--exact-match", action="store_true", help="answer every row greedily and compare texts"
    )
    longest = "for exact match: longest answer (default: 256)"
    parser.add_argument(
        "--max-new-tokens", type=whole_number, default=256, metavar="N", help=longest
    )
    add_rows(parser, batch_size="for exact match: rows answered at once")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    from tunesmith.inference.load_run import locate_run

    # A wrong path is reported before torch is imported.
    locate_run(args.run)
    from tunesmith.inference.evaluate import evaluate

    if args.data is None:
        check_rows_of_the_run(args)
    options = vars(args) | {"columns": dict(args.columns) or None}
    for name in ("run", "data", "json"):
        del options[name]
    with ProgressCounter() as progress, fixes_as_options():
        result = evaluate(args.run, args.data, progress=progress, **options)
    if args.json:
        report: dict[str, Any] = {
            "run": args.run,
            "data": result.data,
            "dropped": result.dropped,
            "cut": result.cut,
        }
        for name, score in result.scores.items():
            values = asdict(score)
            values["asked"] = values.pop("answered")
            for key, value in values.items():
                # JSON has neither NaN nor infinity.
                if isinstance(value, float) and not math.isfinite(value):
                    values[key] = None
            report[name] = values
        print(json.dumps(report, indent=2))
        return
    print(f"rows: {result.data}", file=sys.stderr)
    print_scores(result.scores)
    for count, what in ((result.dropped, "dropped"), (result.cut, "cut short")):
        if count:
            rows = f"{count} of {result.rows} rows were {what}"
            print(f"{rows}: longer than the recipe's seq_len", file=sys.stderr)


def check_rows_of_the_run(args: argparse.Namespace) -> None:
    """UsageError for options of --data, where the rows are those that the run held out."""
    option = ""
    if args.split:
        option = "--split"
    elif args.columns:
        option = "--columns"
    elif args.format_name != "auto":
        option = "--format"
    if option:
        what = f"{option} is for the rows of --data"
        raise UsageError(what, where=option, fix="add --data FILE")


def print_scores(scores_of: "Mapping[str, EvalResult]") -> None:
    """A table with a column for each model."""
    from rich.console import Console
    from rich.table import Table

    scores = scores_of.values()
    table = Table("", *scores_of)
    table.add_row("loss (nats a token)", *(f"{score.loss:.4f}" for score in scores))
    perplexities = []
    for score in scores:
        is_finite = score.perplexity < math.inf
        perplexities.append(f"{score.perplexity:.3f}" if is_finite else "above 1e308")
    table.add_row("perplexity", *perplexities)
    table.add_row("token accuracy", *(f"{score.token_accuracy:.2%}" for score in scores))
    matches = []
    for score in scores:
        share = score.exact_match
        if share is not None:
            matches.append(f"{share:.1%} ({share * score.answered:.0f}/{score.answered})")
    if matches:
        table.add_row("exact match", *matches)
    table.add_row("rows", *(str(score.rows) for score in scores))
    table.add_row("supervised tokens", *(str(score.tokens) for score in scores))
    Console().print(table)
