"""All runs of some folders, a line for each: state, step, losses and a sparkline.

A list of hundreds of runs must not hold their records: a run is read again only when its files have
changed, and only what goes on stays open. Reading many takes long: a look ends in time, and the
next one goes on.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import TypedDict

from tunesmith.errors import UsageError
from tunesmith.launch.jobs import is_at_work, run_folders
from tunesmith.metrics.run_figures import finite
from tunesmith.reader.run_files import FINAL_MANIFEST, RunFiles, signature_of
from tunesmith.run_dir import FAILURE, METRICS, RECIPE, STOPPED, RunState, shown
from tunesmith.units import ceil_div

SPARK_POINTS = 48  # of a sparkline, at most
LOOK_SECONDS = 0.3  # after which a look reads no further run
# The content of a line.
_SIGNATURE_FILES = (METRICS, FAILURE, STOPPED, FINAL_MANIFEST)


class Row(TypedDict):
    """The line of a run; `look` is the number of the look that found it so."""

    id: int
    name: str
    look: int
    place: str
    state: RunState
    step: int
    loss: float | None
    val_loss: float | None
    started: float
    spark: list[float]
    damage: str


class RunList:
    """The runs of some folders, and of folders in them, such as those of a sweep.

    Attributes:
        rows: by folder, each with the number of its run as `id`, which is that of no other run.
        looks: how often the runs were looked at.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders
        self.rows: dict[Path, Row] = {}
        self.looks = 0
        self._names: dict[Path, str] = {}
        self._running: dict[Path, RunFiles] = {}
        self._signatures: dict[Path, list[object]] = {}
        self._next = 0  # the number of the run to go on with

    def refresh(self) -> None:
        """Look for new runs, then at those that have changed, as many as there is time for."""
        began = time.monotonic()
        self.looks += 1
        for folder in self.folders:
            for path in run_folders(folder, listed=self._names.keys()):
                # Runs of two sweeps may have the same name.
                self._names.setdefault(path, shown(path.relative_to(folder)))
        for number, (path, name) in islice(enumerate(self._names.items()), self._next, None):
            signature = [
                is_at_work(path),
                *(signature_of(path / file) for file in _SIGNATURE_FILES),
            ]
            if signature == self._signatures.get(path):
                continue
            self._signatures[path] = signature
            # One that is removed keeps its line.
            with suppress(UsageError):
                run = self._running.pop(path, None) or RunFiles(path)
                run.refresh()
                if run.state is RunState.RUNNING:
                    self._running[path] = run
                self.rows[path] = _row_of(run, number, name, self.looks)
            if time.monotonic() - began > LOOK_SECONDS:
                self._next = (number + 1) % len(self._names)
                return
        self._next = 0


def _row_of(run: RunFiles, number: int, name: str, look: int) -> Row:
    return {
        "id": number,
        "name": name,
        "look": look,
        "place": shown(run.folder),
        "state": run.state,
        "step": run.steps,
        "loss": run.figures.last("loss"),
        "val_loss": run.figures.last("val_loss"),
        "started": signature_of(run.folder / RECIPE)[0] / 1e9,
        "spark": sparkline(finite(run.figures.column("loss"))),
        "damage": str(next(iter(run.damaged), "")),
    }


def sparkline(losses: Sequence[float]) -> list[float]:
    """The losses as at most SPARK_POINTS means."""
    width = max(1, ceil_div(len(losses), SPARK_POINTS))
    means = [fmean(losses[start : start + width]) for start in range(0, len(losses), width)]
    return [float(f"{mean:.4g}") for mean in means]
