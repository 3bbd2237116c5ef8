"""Comparison of runs as Python objects, for `tunesmith.compare` and for `report --json`."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.errors import UsageError
from tunesmith.launch.jobs import with_runs_of_folders
from tunesmith.metrics.result_table import ResultTable, Tabular
from tunesmith.run_dir import EvalScores, Fields, shown
from tunesmith.tools.report.figures import differing_keys, figure_rows
from tunesmith.tools.report.run_files import RunFiles, label_apart


@dataclass(frozen=True)
class Comparison(Tabular):
    """Result of `compare`: the measured values of several runs.

    Attributes:
        runs: the names of the runs, in the order of the call.
        figures: name -> one text per run. The names are recipe keys with different values, and
            measured values such as the loss. The text `–` means that a run has no value.
    """

    runs: tuple[str, ...]
    figures: dict[str, list[str]]

    def table(self) -> ResultTable:
        """Return a table with one column per run."""
        rows = [(name, *cells) for name, cells in self.figures.items()]
        return ResultTable(rows, self.runs)


def compare(*runs: str | os.PathLike[str]) -> Comparison:
    """Compare recipes and measured values of runs.

    >>> tunesmith.compare("runs/lr-1e-4", "runs/lr-1e-3")

    `tunesmith eval A B` says which run is better, because it measures the same rows with each run.

    Args:
        runs: run directories, folders with runs, or `Result` objects. The runs may still be
            running, or may have failed.

    Raises:
        UsageError: if no folder is given, or if a folder is not a run directory.
    """
    if not runs:
        raise UsageError(
            "no runs were given", where="compare(...)", fix="give at least one run directory"
        )
    read = [RunFiles(folder) for folder in with_runs_of_folders([os.fspath(run) for run in runs])]
    label_apart(read)
    # Leave out recipe keys that do not affect the trained weights.
    figures = {
        key: list(map(json.dumps, values)) for key, values, learns in differing_keys(read) if learns
    }
    names = tuple(run.label for run in read)
    return Comparison(names, figures | dict(figure_rows(read)))


def comparison_values(runs: Sequence[RunFiles]) -> dict[str, object]:
    """Return the measured values in the format of `report --json`."""
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
                "damaged": list(map(str, run.damaged)),
            }
        )
    return {
        "runs": rows,
        "differing_keys": {key: values for key, values, _ in differing_keys(runs)},
    }


def _without_rows(result: EvalScores) -> Fields:
    """Return the scores of an `eval` without the lists that have a value for each row."""
    scores = {}
    for scorer, score in result["scores"].items():
        scores[scorer] = {key: value for key, value in score.items() if key != "by_row"}
    values = {**result, "scores": scores}
    del values["row_losses"]
    return values
