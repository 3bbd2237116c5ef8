"""The comparison of runs for Python programs and `report --json`."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.errors import UsageError
from tunesmith.launch.jobs import with_runs_of_folders
from tunesmith.metrics.result_table import ResultTable, Tabular
from tunesmith.reader.compare import Verdict, differing_keys, judge
from tunesmith.reader.figures import figure_rows
from tunesmith.reader.run_files import RunFiles, label_apart
from tunesmith.run_dir import EvalScores, Fields, shown


@dataclass(frozen=True)
class Comparison(Tabular):
    """The result of `compare` on some runs.

    Attributes:
        runs: their names, in the order of the call.
        verdict: `kind` is `better`, `equal`, `none` (it cannot be said) or `alone` (one run);
            `headline` and `reasons` are sentences; `best` are the indices in `runs` of the better
            ones.
        figures: what differs and what was measured: a text for each run, `–` where there is none.
    """

    runs: tuple[str, ...]
    verdict: Verdict
    figures: dict[str, list[str]]

    def table(self) -> ResultTable:
        """The figures, a column for each run, and the verdict."""
        rows = [(name, *cells) for name, cells in self.figures.items()]
        return ResultTable(rows, self.runs, notes=[self.verdict.headline, *self.verdict.reasons])


def compare(*runs: str | os.PathLike[str]) -> Comparison:
    """Compare runs: their figures, and which is better, or why that cannot be said.

    >>> tunesmith.compare("runs/lr-1e-4", "runs/lr-1e-3")

    Only runs that `evaluate` has measured on the same rows get a verdict, row by row.

    Args:
        runs: run directories, or the `Result` of each, or folders of runs; they may still be
            running, or have failed.

    Raises:
        UsageError: no folder was named, or one is no run directory.
    """
    if not runs:
        raise UsageError("there are no runs", where="compare(...)", fix="name run directories")
    read = [RunFiles(folder) for folder in with_runs_of_folders([os.fspath(run) for run in runs])]
    label_apart(read)
    names = tuple(run.label for run in read)
    return Comparison(names, judge(read), _figures(read))


def comparison_values(runs: Sequence[RunFiles], verdict: Verdict) -> dict[str, object]:
    """Return figures and verdict as plain values, for `report --json`."""
    rows = []
    for run in runs:
        figures = run.figures
        step = figures.best_step
        rows.append(
            {
                "run": run.label,
                "run_dir": shown(run.folder),
                "state": run.state,
                "step": run.steps,
                "final_step": run.final_step,
                "best": step and {"value": figures.validations[step], "step": step},
                "val_losses": [
                    {"step": step, "value": value} for step, value in figures.validations.items()
                ],
                "loss": figures.loss,
                "tokens": figures.tokens,
                "seconds": figures.seconds,
                "tokens_per_second": figures.speed,
                "mfu": figures.mfu,
                "memory_gib": figures.memory_gib,
                "evals": [_without_rows(result) for result in run.evals],
                "warnings": run.warnings,
                "damaged": [str(file) for file in run.damaged],
            }
        )
    keys = differing_keys(runs)
    return {
        "verdict": {
            **verdict._asdict(),
            "best": [runs[index].label for index in verdict.best],
        },
        "runs": rows,
        "differing_keys": {difference.key: difference.values for difference in keys},
    }


def _without_rows(result: EvalScores) -> Fields:
    """Return the numbers of an `eval` without those of each row."""
    values: Fields = {key: value for key, value in result.items() if key != "row_losses"}
    values["scores"] = {
        scorer: {key: value for key, value in score.items() if key != "by_row"}
        for scorer, score in result["scores"].items()
    }
    return values


def _figures(runs: Sequence[RunFiles]) -> dict[str, list[str]]:
    """Return the keys that change what is learned, and the figures, as a text for each run."""
    texts: dict[str, list[str]] = {}
    for difference in differing_keys(runs):
        if difference.learns:
            texts[difference.key] = [json.dumps(value) for value in difference.values]
    return texts | dict(figure_rows(runs))
