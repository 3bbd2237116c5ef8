"""Functions that run the command `eval` for one run or several runs, and print its result."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

from pydantic_core import to_json

from tunesmith.cli.options import ProgressCounter, leave_lines_to_rank_0, notify
from tunesmith.distributed.ranks import (
    join_ranks,
    reported_once_a_node,
    require_one_process,
    started_as,
)
from tunesmith.host.streams import width_of
from tunesmith.tools.evaluate.decoding_options import read_decoding
from tunesmith.tools.evaluate.evaluate import Evaluation
from tunesmith.tools.evaluate.evaluate_runs import evaluate_runs
from tunesmith.tools.evaluate.score_rows import RowScores


def run_rows(args: argparse.Namespace) -> None:
    """Evaluate one run or several runs, and print the result. `args` are the checked options."""
    with reported_once_a_node():
        decoding = read_decoding(args)
    if started_as() is None:
        require_one_process("eval")
    leave_lines_to_rank_0()
    with join_ranks() as ranks:
        counter = ProgressCounter() if ranks.is_main_process else nullcontext(lambda *_: None)
        with counter as progress:
            result = evaluate_runs(
                args.runs,
                args.data,
                split=args.split,
                format_name=args.format_name,
                columns=dict(args.columns) or None,
                max_examples=args.max_examples,
                base=args.base,
                max_new_tokens=args.max_new_tokens,
                batch_size=args.batch_size,
                device=args.device,
                scorers=args.scorers,
                decoding=decoding,
                output=args.output,
                fresh=args.fresh,
                trust_remote_code=args.trust_remote_code,
                progress=progress,
                ranks=ranks,
            )
    if ranks.is_main_process:
        print_result(args, result)


def print_result(args: argparse.Namespace, result: Evaluation) -> None:
    """Print the scores as a table with warnings and notes, or as JSON."""
    if args.json:
        report = runs_as_report if result.runs else run_as_report
        # JSON has no NaN and no infinity.
        print(to_json(report(args.runs, result), indent=2, inf_nan_mode="null").decode())
        return
    table = result.table()
    notify(table.title)
    # Print the warnings before the scores, because a warning can mean that scores are unreliable.
    for warning in result.warnings():
        notify(warning)
    print(replace(table, title="", notes=result.verdicts()).text(width_of(sys.stdout)))
    for note in result.notes():
        notify(note)


def run_as_report(run_names: Sequence[str], result: Evaluation) -> dict[str, object]:
    """Return the values that --json prints for one run. Its name is the only one."""
    [run_name] = run_names
    report: dict[str, object] = {
        "run": run_name,
        "data": result.data,
        "dropped": result.dropped,
        "cut": result.cut,
    }
    for name, score in result.scores.items():
        names = ["rows"]
        if score.tokens:
            names += ["tokens", "loss", "perplexity", "token_accuracy"]
        report[name] = {each: getattr(score, each) for each in names}
    if result.answers is not None:
        report["answers"] = str(result.answers)
        report["unanswered"] = result.unanswered
        report["unfinished"] = dict(result.unfinished)
    if result.by_scorer:
        report["scores"] = {scores.name: scores_as_json(scores) for scores in result.by_scorer}
    for loss in result.loss_comparisons:
        report["loss_difference"] = {
            "rows": loss.paired.rows,
            **loss.paired.difference._asdict(),
            "verdict": loss.verdict,
        }
    if result.seen is not None:
        report["seen"] = result.seen.count
    return report


def runs_as_report(run_names: Sequence[str], result: Evaluation) -> dict[str, object]:
    """Return the values that --json prints for several runs."""
    evaluations = result.runs.items()
    return {
        "runs": {
            name: run_as_report([run_name], evaluation)
            for run_name, (name, evaluation) in zip(run_names, evaluations, strict=True)
        },
        "comparisons": [
            {
                "name": comparison.name,
                "best": comparison.best,
                "other": comparison.other,
                "is_better": comparison.paired.is_apart,
                "verdict": comparison.verdict,
                **comparison.paired.difference._asdict(),
            }
            for comparison in result.comparisons
        ],
        "not_compared": result.obstacles,
    }


def scores_as_json(scores: RowScores) -> dict[str, object]:
    """Return the results of one scorer for JSON, without the scores of single rows."""
    means = {name: interval._asdict() for name, interval in scores.models.items()}
    values: dict[str, object] = {"rows": scores.rows, **means}
    for comparison in scores.comparisons:
        values["difference"] = comparison.paired.difference._asdict()
        values |= {"differing": comparison.paired.differing, "verdict": comparison.verdict}
    return values
