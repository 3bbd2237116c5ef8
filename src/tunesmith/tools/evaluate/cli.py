"""Evaluate a run on held-out rows, and compare it with its base or other runs.

example:
  tunesmith eval runs/my-run  # on the run's own held-out rows
  tunesmith eval runs/lr-1e-4 runs/lr-1e-3  # which of two runs is better
  tunesmith eval runs/my-run --data held-out.jsonl --score exact --score f1
  tunesmith eval runs/my-run --data calls.jsonl --score tool-call \\
    --max-new-tokens 128
  tunesmith eval runs/my-run --data held-out.jsonl --score my_scorer.py:function
  tunesmith eval runs/my-run --data held-out.csv \\
    --columns prompt=title,completion=summary
  tunesmith eval runs/my-run --no-base --json

Loss, perplexity and token accuracy are computed over the supervised tokens, as
in training. The losses are compared row by row: the tuned model is better or
worse than the base, or the difference is not significant. If you name several
runs, the best run is compared with each of the others.

--score lets the model answer every row, compares each answer with the answer in
the row, and compares the scores of two models in the same way:

  exact      equal, ignoring leading and trailing whitespace
  contains   the answer contains the row's answer
  regex      the row's answer is a pattern
  f1         word-level F1, as in SQuAD
  rouge-l    longest common word sequence
  json       share of equal fields; 0 if the answer is not JSON, or not valid by
             the row's `schema`
  tool-call  names and arguments of the tool calls

Answers are saved in the run's evals/ (or --output), so an interrupted eval can
resume. Under torchrun the ranks divide the rows; the results are the same as
with one process.

See docs/evaluate.md for how many rows you need, and for benchmarks with
lm-evaluation-harness.
"""

import argparse
from pathlib import Path

from tunesmith.answers.load_run import locate_run, require_held_out
from tunesmith.answers.scoring.scorers import check_scorer_names
from tunesmith.cli.options import (
    add_decoding,
    add_json,
    add_rows,
    add_run,
    check_not_given,
    notify_weights,
    whole_number,
)
from tunesmith.config.schema import Source
from tunesmith.distributed.ranks import reported_once_a_node
from tunesmith.rows.source.folders import check_local
from tunesmith.rows.source.open_source import is_local, read_rows
from tunesmith.tools.evaluate.row_source import find_source

LOADS_TORCH = "here"

MAX_NEW_TOKENS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, several=True)
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="rows with answers: jsonl, json, csv, parquet, or a Hub id (default: the rows that "
        "the run held out)",
    )
    parser.add_argument(
        "--split",
        metavar="SPLIT",
        help="split of a Hub dataset, or a slice of the rows such as train[:100]",
    )
    parser.add_argument(
        "--max-examples", type=whole_number, metavar="N", help="use only the first N rows"
    )
    parser.add_argument(
        "--base",
        action=argparse.BooleanOptionalAction,
        help="also score the base model (default: yes for one run, no for several runs)",
    )
    parser.add_argument(
        "--score",
        action="append",
        default=[],
        dest="scorers",
        metavar="SCORER",
        help="generate answers and score them with exact, contains, regex, json, f1, rouge-l, "
        "tool-call, or your file.py:function; may be repeated",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="with --score: file that stores the answers, so that an interrupted evaluation can "
        "continue; with several runs, a folder (default: evals/ in each run)",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="with --score: rename the existing answers file, and generate all answers again",
    )
    add_decoding(parser, max_new_tokens=MAX_NEW_TOKENS)
    add_rows(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    # Drop repeated runs.
    args.runs = list(dict.fromkeys(args.runs))
    if args.base is None:
        args.base = len(args.runs) == 1
    # Check files and names first, because the import of torch takes seconds.
    with reported_once_a_node():
        locations = [
            locate_run(run_name, trust_remote_code=args.trust_remote_code) for run_name in args.runs
        ]
        for location in locations:
            notify_weights(location)
        # Check that options do not contradict each other, and that the rows exist.
        if args.data is None:
            data_options = ("split", "columns", "format_name")
            check_not_given(args, data_options, "requires --data", fix="add --data FILE")
            for run_name, location in zip(args.runs, locations, strict=True):
                require_held_out(location, run_name)
        elif is_local(args.data):
            path = Path(args.data).expanduser()
            check_local(path)
            rows = read_rows(Source(source=str(path), split=args.split))
            for location in locations:
                find_source(rows, location.sources, args.format_name, dict(args.columns) or None)
        if not args.scorers:
            answer_options = ("output", "fresh", "temperature", "seed")
            check_not_given(
                args, answer_options, "requires --score", fix="add --score exact, or another scorer"
            )
        check_scorer_names(args.scorers)
    from tunesmith.tools.evaluate.run_eval import run_rows

    run_rows(args)
