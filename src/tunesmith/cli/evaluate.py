"""How good a run is on a held-out file, beside its base.

example:
  tunesmith eval runs/my-run                          # on the rows that the run itself held out
  tunesmith eval runs/my-run --data held-out.jsonl --exact-match --max-examples 100
  tunesmith eval runs/my-run --data held-out.csv --columns prompt=question --columns completion=answer
  tunesmith eval runs/my-run --no-base --json

Loss, perplexity and token accuracy are over the supervised tokens, given all true tokens before, computed as in
training. Exact match answers greedily and compares with the row's answer after removing outer whitespace and making
every run of whitespace one space.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict
from typing import Any

from tunesmith.cli.options import ProgressCounter, add_rows, add_run, fixes_as_options, whole_number
from tunesmith.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    data_help = "rows with answers: jsonl, json, csv, parquet, or a Hub id (default: the rows that the run held out)"
    parser.add_argument("--data", metavar="FILE", help=data_help)
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

    locate_run(args.run)  # a wrong path is reported before torch is imported
    from tunesmith.inference.evaluate import evaluate

    options = {
        name: value for name, value in vars(args).items() if name not in ("run", "data", "json")
    }
    options["columns"] = dict(args.columns) or None
    given = {"split": args.split, "columns": args.columns, "format": args.format_name != "auto"}
    if args.data is None and (name := next((name for name, value in given.items() if value), "")):
        raise UsageError(
            f"--{name} is for the rows of --data", where=f"--{name}", fix="add --data FILE"
        )
    with ProgressCounter() as progress, fixes_as_options():
        found = evaluate(args.run, args.data, progress=progress, **options)
    if args.json:
        about: dict[str, Any] = {
            "run": args.run,
            "data": found.data,
            "dropped": found.dropped,
            "cut": found.cut,
        }
        for name, score in found.scores.items():
            values = asdict(score)
            values["asked"] = values.pop("answered")
            # JSON has neither NaN nor infinity: such values become null.
            finite = {
                k: None if isinstance(v, float) and not math.isfinite(v) else v
                for k, v in values.items()
            }
            about[name] = finite
        print(json.dumps(about, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    print(f"rows: {found.data}", file=sys.stderr)
    scores = found.scores.values()
    table = Table("", *found.scores)
    table.add_row("loss (nats a token)", *(f"{s.loss:.4f}" for s in scores))
    table.add_row(
        "perplexity",
        *(f"{s.perplexity:.3f}" if s.perplexity < math.inf else "above 1e308" for s in scores),
    )
    table.add_row("token accuracy", *(f"{s.token_accuracy:.2%}" for s in scores))
    matches = [(s.exact_match, s.answered) for s in scores if s.exact_match is not None]
    if matches:
        table.add_row(
            "exact match",
            *(f"{share:.1%} ({share * answered:.0f}/{answered})" for share, answered in matches),
        )
    table.add_row("rows", *(str(s.rows) for s in scores))
    table.add_row("supervised tokens", *(str(s.tokens) for s in scores))
    Console().print(table)
    for count, what in ((found.dropped, "dropped"), (found.cut, "cut short")):
        if count:
            print(
                f"{count} of {found.rows} rows were {what}: longer than the recipe's seq_len",
                file=sys.stderr,
            )
