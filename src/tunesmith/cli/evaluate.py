"""How good a run is on a held-out file, beside its base.

example:
  tunesmith eval runs/my-run                # on the rows that the run itself held out
  tunesmith eval runs/my-run --data held-out.jsonl --score exact --score f1
  tunesmith eval runs/my-run --data calls.jsonl --score tool-call --max-new-tokens 128
  tunesmith eval runs/my-run --data held-out.jsonl --score my_scorer.py:function
  tunesmith eval runs/my-run --data held-out.csv --columns prompt=question,completion=answer
  tunesmith eval runs/my-run --no-base --json

Loss, perplexity and token accuracy are over the supervised tokens, given all true tokens before,
computed as in training. Exact match answers greedily and compares with the row's answer after
removing outer whitespace and making every run of whitespace one space.

--score answers every row, scores each answer against the row's own, and says whether tuned is
better than base, worse, or not told apart by so few rows:

  exact      equal, outer whitespace aside       contains   the row's answer stands in it
  regex      the row's answer is a pattern       json       valid, fits the row's `schema`, and the
  f1         common words, as SQuAD                         share of fields that are equal
  rouge-l    longest common word sequence        tool-call  names and arguments of the calls

Answers are kept in evals/ of the run (or --output): a killed eval goes on where it was.
docs/evaluate.md says how many rows it takes.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tunesmith.cli.options import (
    ProgressCounter,
    add_decoding,
    add_rows,
    add_run,
    decoding_of,
    fixes_as_options,
    notify,
    whole_number,
)
from tunesmith.errors import UsageError

if TYPE_CHECKING:
    from tunesmith.inference.evaluate import EvalResult, Evaluation
    from tunesmith.inference.score_rows import RowScores


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
    scorers = "exact, contains, regex, json, f1, rouge-l, tool-call, or your own, file.py:function"
    parser.add_argument(
        "--score",
        action="append",
        default=[],
        dest="scorers",
        metavar="SCORER",
        help=f"score the answers: {scorers}; may be repeated",
    )
    output = "for --score: where answers are kept, and gone on with (default: evals/ of the run)"
    parser.add_argument("--output", metavar="FILE", help=output)
    parser.add_argument(
        "--fresh", action="store_true", help="for --score: put earlier answers aside, answer again"
    )
    add_decoding(parser, max_new_tokens=256)
    add_rows(parser, batch_size="rows answered at once")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    from tunesmith.inference.load_run import locate_run

    # A wrong path is reported before torch is imported.
    locate_run(args.run)
    from tunesmith.inference.evaluate import evaluate

    if args.data is None:
        check_rows_of_the_run(args)
    check_answer_options(args)
    decoding = decoding_of(args)
    options = vars(args) | {"columns": dict(args.columns) or None, "decoding": decoding}
    for name in ("run", "data", "json", "temperature", "top_p", "top_k", "seed"):
        del options[name]
    with ProgressCounter() as progress, fixes_as_options():
        result = evaluate(args.run, args.data, progress=progress, **options)
    if args.json:
        print(json.dumps(as_report(args.run, result), indent=2))
        return
    print(f"rows: {result.data}", file=sys.stderr)
    print_scores(result.scores)
    for count, what in ((result.dropped, "dropped"), (result.cut, "cut short")):
        if count:
            rows = f"{count} of {result.rows} rows were {what}"
            print(f"{rows}: longer than the recipe's seq_len", file=sys.stderr)
    if result.by_scorer:
        print_row_scores(result.by_scorer)
    for note in notes_on(result):
        notify(note)


def as_report(run_name: str, result: "Evaluation") -> dict[str, Any]:
    """What --json prints."""
    report: dict[str, Any] = {
        "run": run_name,
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
    if result.answers is not None:
        report["answers"] = str(result.answers)
        report["unanswered"] = result.unanswered
        report["unfinished"] = dict(result.unfinished)
        report["scores"] = {scores.name: scores_as_json(scores) for scores in result.by_scorer}
    if result.seen is not None:
        report["seen"] = result.seen.count
    return report


def scores_as_json(scores: "RowScores") -> dict[str, Any]:
    """What one scorer says, without the scores of single rows."""
    values: dict[str, Any] = {"rows": scores.rows}
    for name, interval in scores.models.items():
        values[name] = interval._asdict()
    if scores.paired is not None:
        values["difference"] = scores.paired.difference._asdict()
        values["differing"] = scores.paired.differing
        values["verdict"] = scores.verdict
    return values


def check_answer_options(args: argparse.Namespace) -> None:
    """UsageError for options that are for --score, without it; exact match is always greedy."""
    if args.scorers:
        return
    for option in ("output", "fresh", "temperature", "seed"):
        if vars(args)[option]:
            what = f"--{option} is for the answers of --score"
            raise UsageError(what, where=f"--{option}", fix="add --score exact, or another")


def print_row_scores(by_scorer: "Sequence[RowScores]") -> None:
    """A table with a row for each scorer, and the sentences."""
    from rich.console import Console
    from rich.table import Table

    models = list(by_scorer[0].models)
    table = Table("score, 95 % interval", *models)
    for scores in by_scorer:
        cells = []
        for interval in scores.models.values():
            ends = f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"
            cells.append(f"{interval.mean:.1%} ({ends})")
        table.add_row(scores.name, *cells)
    Console().print(table)
    for scores in by_scorer:
        if scores.verdict:
            print(scores.verdict)


def notes_on(result: "Evaluation") -> Iterator[str]:
    """What a reader should know of the rows, a line each."""
    if result.seen is not None and result.seen.count:
        yield (
            f"warning: {result.seen.count} of {result.rows} rows were trained on, token for token: "
            f"they do not tell how good the model is on new ones; first {result.seen.where} "
            f"({result.seen.earlier})"
        )
    elif result.seen is not None:
        yield f"none of the {result.rows} rows was trained on, token for token"
    elif result.seen_fault:
        yield f"whether rows were trained on is not known: {result.seen_fault}"
    if result.unanswered:
        yield f"{result.unanswered} of {result.rows} rows have an empty answer: not scored"
    for model, count in result.unfinished.items():
        if count:
            rows = result.by_scorer[0].rows
            cut = f"{count} of {rows} answers of {model} were cut at --max-new-tokens"
            yield f"{cut}: they may score less than they would"
    if result.answers is not None:
        yield f"answers: {result.answers}"


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
