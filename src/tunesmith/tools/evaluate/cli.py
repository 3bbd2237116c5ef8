"""Evaluate a run on held-out rows, compared with its base or with other runs.

example:
  tunesmith eval runs/my-run  # on the run's own held-out rows
  tunesmith eval runs/lr-1e-4 runs/lr-1e-3  # which of two runs is better
  tunesmith eval runs/my-run --data held-out.jsonl --score exact --score f1
  tunesmith eval runs/my-run --data calls.jsonl --score tool-call \\
    --max-new-tokens 128
  tunesmith eval runs/my-run --data held-out.jsonl --score my_scorer.py:function
  tunesmith eval runs/my-run --data held-out.csv \\
    --columns prompt=title,completion=summary
  tunesmith eval runs/my-run --tasks gsm8k,ifeval --limit 200
  tunesmith eval runs/my-run --no-base --json

Loss, perplexity and token accuracy are computed over the supervised tokens, as
in training. The loss is compared row by row: tuned is better or worse than the
base, or the rows cannot tell. Of several runs the best is compared with each of
the others.

--score answers every row, scores each answer against the row's, and compares
the scores in the same way:

  exact      equal, ignoring leading and trailing whitespace
  contains   the answer contains the row's answer
  regex      the row's answer is a pattern
  f1         word-level F1, as in SQuAD
  rouge-l    longest common word sequence
  json       share of equal fields; 0 if not JSON or not valid by `schema`
  tool-call  names and arguments of the tool calls

Answers are saved in the run's evals/ (or --output), so an interrupted eval
resumes. Under torchrun the ranks divide the rows; results are those of one
process.

--tasks runs benchmarks of lm-evaluation-harness instead: task names, your own
YAML files, or folders of them. Prompts use the run's chat template if it was
trained with one. See docs/evaluate.md for how many rows you need.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.cli.options import (
    ProgressCounter,
    add_decoding,
    add_json,
    add_rows,
    add_run,
    check_not_given,
    decoding_of,
    fixes_as_options,
    leave_lines_to_rank_0,
    notify,
    notify_weights,
    whole_number,
)
from tunesmith.data.source.folders import check_local
from tunesmith.data.source.open_source import is_local
from tunesmith.distributed.ranks import (
    join_ranks,
    reported_once_a_node,
    require_one_process,
    started_as,
)
from tunesmith.host.streams import width_of
from tunesmith.tools.evaluate.scorers import check_scorer_names

if TYPE_CHECKING:
    from tunesmith.inference.load_run import RunLocation
    from tunesmith.metrics.intervals import Interval, LossDifference
    from tunesmith.tools.evaluate.evaluate import Evaluation
    from tunesmith.tools.evaluate.evaluate_runs import RunsEvaluation
    from tunesmith.tools.evaluate.harness import TaskEvaluation, TaskMetric
    from tunesmith.tools.evaluate.score_rows import RowScores

LOADS_TORCH = "here"

MAX_NEW_TOKENS = 256
FOR_TASKS = ("limit", "chat_template")
# Keywords of `evaluate` that have the names of their options, and no others.
KEYWORDS = (
    "split",
    "max_examples",
    "exact_match",
    "scorers",
    "output",
    "fresh",
    "max_new_tokens",
    "format_name",
)
OF_DECODING = ("temperature", "top_p", "top_k", "seed")
FOR_ROWS = ("data", *KEYWORDS, *OF_DECODING, "columns")


def task_names(text: str) -> list[str]:
    """`gsm8k,my_tasks/` as a list."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name")
    return names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, several=True)
    files = "jsonl, json, csv, parquet, or a Hub id"
    data = f"rows with answers: {files} (default: the rows that the run held out)"
    parser.add_argument("--data", metavar="FILE", help=data)
    parser.add_argument(
        "--split", metavar="SPLIT", help="of a Hub dataset, or a slice such as train[:100]"
    )
    parser.add_argument(
        "--max-examples", type=whole_number, metavar="N", help="take the first N rows"
    )
    beside = "also score the base (default: yes; of several runs no)"
    parser.add_argument("--base", action=argparse.BooleanOptionalAction, help=beside)
    parser.add_argument(
        "--exact-match",
        action="store_true",
        help="also the share of greedy answers that --score exact would count",
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
    output = "for --score: where answers are kept, and resumed from (default: evals/ of the run)"
    parser.add_argument("--output", metavar="FILE", help=output)
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="for --score: move earlier answers aside and answer again",
    )
    tasks = "benchmarks of lm-evaluation-harness: names, .yaml files, folders/; may be repeated"
    parser.add_argument(
        "--tasks", type=task_names, action="extend", default=[], metavar="NAME,...", help=tasks
    )
    parser.add_argument(
        "--limit", type=whole_number, metavar="N", help="for --tasks: the first N rows of each"
    )
    through = "for --tasks: use the run's chat template (default: as in training)"
    parser.add_argument("--chat-template", action=argparse.BooleanOptionalAction, help=through)
    add_decoding(parser, max_new_tokens=MAX_NEW_TOKENS)
    add_rows(parser, batch_size="rows answered at once")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    from tunesmith.inference.load_run import locate_run

    # A run that is named twice is one.
    args.runs = list(dict.fromkeys(args.runs))
    # What files and names alone can tell is told before torch is imported.
    with reported_once_a_node():
        locations = [locate_run(run_name) for run_name in args.runs]
        for location in locations:
            notify_weights(location)
        if len(args.runs) > 1:
            check_not_given(
                args,
                ("tasks", "output"),
                "is for one run",
                why=f"{len(args.runs)} are named: {', '.join(args.runs)}",
                fix="use one command for each run; `tunesmith report RUN RUN` shows them together",
            )
    if args.base is None:
        args.base = len(args.runs) == 1
    if args.tasks:
        run_tasks(args)
    else:
        run_rows(args, locations)


def run_rows(args: argparse.Namespace, locations: "Sequence[RunLocation]") -> None:
    """`eval` of rows, of one run or of several."""
    from tunesmith.inference.load_run import require_held_out

    with reported_once_a_node():
        fix = "add --tasks NAME; the first rows of --data are --max-examples N"
        check_not_given(args, FOR_TASKS, "is for --tasks", fix=fix)
        if args.data is None:
            of_data = ("split", "columns", "format_name")
            check_not_given(args, of_data, "is for the rows of --data", fix="add --data FILE")
            for run_name, location in zip(args.runs, locations, strict=True):
                require_held_out(location, run_name)
        elif is_local(args.data):
            check_local(Path(args.data).expanduser())
        if not args.scorers:
            # Exact match is always greedy.
            of_answers = ("output", "fresh", "temperature", "seed")
            fix = "add --score exact, or another"
            check_not_given(args, of_answers, "is for the answers of --score", fix=fix)
        check_scorer_names(args.scorers)
        decoding = decoding_of(args)
    from tunesmith.tools.evaluate.evaluate import evaluate
    from tunesmith.tools.evaluate.evaluate_runs import evaluate_runs

    if started_as() is None:
        require_one_process("eval")
    options = {name: vars(args)[name] for name in (*KEYWORDS, "base", "batch_size", "device")}
    options |= {"columns": dict(args.columns) or None, "decoding": decoding}
    leave_lines_to_rank_0()
    with join_ranks() as ranks, ExitStack() as stack, fixes_as_options():
        if ranks.is_main_process:
            options["progress"] = stack.enter_context(ProgressCounter())
        result: Evaluation | RunsEvaluation
        if len(args.runs) == 1:
            result = evaluate(args.runs[0], args.data, ranks=ranks, **options)
        else:
            result = evaluate_runs(args.runs, args.data, ranks=ranks, **options)
    if ranks.is_main_process:
        print_result(args, result)


def print_result(args: argparse.Namespace, result: "Evaluation | RunsEvaluation") -> None:
    """The table, with what a reader must know before and after it; or JSON."""
    from tunesmith.tools.evaluate.evaluate_runs import RunsEvaluation

    if args.json:
        if isinstance(result, RunsEvaluation):
            report = runs_as_report(args.runs, result)
        else:
            report = as_report(args.runs[0], result)
        print(json.dumps(report, indent=2))
        return
    table = result.table()
    notify(table.title)
    # What makes the scores doubtful comes before them.
    for warning in result.warnings():
        notify(warning)
    print(replace(table, title="", notes=result.verdicts()).text(width_of(sys.stdout)))
    for note in result.notes():
        notify(note)


def run_tasks(args: argparse.Namespace) -> None:
    """`eval --tasks`."""
    check_not_given(
        args,
        FOR_ROWS,
        "and --tasks cannot be combined",
        why="a task defines its rows, decoding and metrics",
        fix="remove {option}, or run two commands; the first rows of a task are --limit N",
    )
    from tunesmith.tools.evaluate.harness import evaluate_tasks

    # lm-eval and what a task brings print notes between, and stdout is for the result.
    with redirect_stdout(sys.stderr):
        result = evaluate_tasks(
            args.runs[0],
            args.tasks,
            limit=args.limit,
            base=args.base,
            batch_size=args.batch_size,
            chat_template=args.chat_template,
            device=args.device,
        )
    if args.json:
        print(json.dumps(tasks_as_report(args, result), indent=2))
        return
    print_task_metrics(result.metrics)
    prompts = "without a chat template"
    if result.chat_template:
        prompts = "with the run's chat template"
    notify(f"lm-eval {result.lm_eval}; prompts {prompts}")
    for file in result.files:
        notify(f"scores: {file}")


def tasks_as_report(args: argparse.Namespace, result: "TaskEvaluation") -> dict[str, object]:
    """Return what --json prints of an evaluation on tasks."""
    from tunesmith.tools.evaluate.harness import values_as_json

    tasks: dict[str, dict[str, object]] = {}
    for metric in result.metrics:
        tasks.setdefault(metric.task, {})[metric.name] = values_as_json(metric)
    return {
        "run": args.runs[0],
        "lm_eval": result.lm_eval,
        "limit": args.limit,
        "chat_template": result.chat_template,
        "files": [str(file) for file in result.files],
        "seen": {task: seen._asdict() for task, seen in result.seen.items()},
        "tasks": tasks,
    }


def print_task_metrics(metrics: "Sequence[TaskMetric]") -> None:
    """A table with a row for each metric, and the sentences."""
    from tunesmith.metrics.result_table import ResultTable

    models = list(metrics[0].values) if metrics else []
    rows = []
    notes = ["in brackets: 95 % intervals"]
    for metric in metrics:
        cells = [metric_text(metric, model) for model in models]
        rows.append([metric.task, metric.name, str(metric.rows), *cells])
        if metric.row_scores is not None and metric.row_scores.verdict:
            notes.append(metric.row_scores.verdict)
    print(ResultTable(rows, ["metric", "rows", *models], notes=notes).text(width_of(sys.stdout)))


def metric_text(metric: "TaskMetric", model: str) -> str:
    """`62.0% (52.1 to 71.3)` of the mean of shares, `12.3 (11.9 to 12.7)` of anything else."""
    value = metric.values[model].value
    interval = metric.interval(model)
    if interval is None:
        return f"{value:.4g}"
    if metric.row_scores is not None:
        return f"{value:.1%} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
    return f"{value:.4g} ({interval.low:.4g} to {interval.high:.4g})"


def as_report(run_name: str, result: "Evaluation") -> dict[str, object]:
    """Return what --json prints of one run."""
    report: dict[str, object] = {
        "run": run_name,
        "data": result.data,
        "dropped": result.dropped,
        "cut": result.cut,
    }
    for name, score in result.scores.items():
        values = asdict(score)
        values["asked"] = values.pop("answered")
        for key in ("pair_accuracy", "pairs", "row_losses", "row_tokens"):
            del values[key]
        for key, value in values.items():
            # JSON has neither NaN nor infinity.
            if isinstance(value, float) and not math.isfinite(value):
                values[key] = None
        report[name] = values
    if result.answers is not None:
        report["answers"] = str(result.answers)
        report["unanswered"] = result.unanswered
        report["unfinished"] = dict(result.unfinished)
    if result.by_scorer:
        report["scores"] = {scores.name: scores_as_json(scores) for scores in result.by_scorer}
    if result.loss_difference is not None:
        report["loss_difference"] = loss_difference_as_json(result.loss_difference)
    if result.seen is not None:
        report["seen"] = result.seen.count
    return report


def runs_as_report(run_names: Sequence[str], result: "RunsEvaluation") -> dict[str, object]:
    """Return what --json prints of several runs."""
    runs = {}
    evaluations = result.evaluations.items()
    for run_name, (name, evaluation) in zip(run_names, evaluations, strict=True):
        runs[name] = as_report(run_name, evaluation)
    comparisons = []
    for comparison in result.comparisons:
        comparisons.append(
            {
                "name": comparison.name,
                "best": comparison.best,
                "other": comparison.other,
                "is_better": comparison.is_better,
                "verdict": comparison.verdict,
                **difference_as_json(comparison.mean, comparison.interval),
            }
        )
    return {"runs": runs, "comparisons": comparisons, "not_compared": result.obstacles}


def loss_difference_as_json(difference: "LossDifference") -> dict[str, object]:
    """Return how much the loss of tuned differs from that of base, and the verdict."""
    from tunesmith.metrics.intervals import loss_sentence

    values = difference_as_json(difference.mean, difference.interval)
    return {"rows": difference.rows, **values, "verdict": loss_sentence(difference)}


def difference_as_json(mean: float, interval: "Interval | None") -> dict[str, float | None]:
    """A difference and the ends of its interval; None where there are too few rows for one."""
    low, high = (None, None) if interval is None else interval[1:]
    return {"mean": mean if math.isfinite(mean) else None, "low": low, "high": high}


def scores_as_json(scores: "RowScores") -> dict[str, object]:
    """Return the figures of one scorer, without the scores of single rows."""
    values: dict[str, object] = {"rows": scores.rows}
    for name, interval in scores.models.items():
        values[name] = interval._asdict()
    if scores.paired is not None:
        values["difference"] = scores.paired.difference._asdict()
        values["differing"] = scores.paired.differing
        values["verdict"] = scores.verdict
    return values
