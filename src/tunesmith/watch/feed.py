"""What a watcher shows of runs, for the page and for scripts: where each stands, its curves, its texts."""

import json
import math
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.config.dump import leaves
from tunesmith.errors import UsageError
from tunesmith.launch.jobs import Job, find_job
from tunesmith.report.run_files import (
    NO_CHART,
    DamagedFile,
    RunFiles,
    downsample,
    holds_run,
    how_it_ended,
    known,
    smooth,
)
from tunesmith.run_directory import shown
from tunesmith.shell import shell_word
from tunesmith.units import Length

QUEUE = 5.0  # seconds between two looks at a job that waits
RECENT = 20  # steps that a pace is the mean of
LINES = 40  # of the log
SMALLEST_SHARE = 1e-12  # of a run that is done, below which its end cannot be told
SMOOTH_FROM = 100  # steps; with fewer, the raw loss reads well


class Panel(NamedTuple):
    """One chart: which record fields it shows, and what they are multiplied by to be in its unit."""

    title: str
    unit: str
    columns: tuple[str, ...]
    scale: float = 1.0


PANELS = (
    Panel("Loss", "", ("loss", "val_loss")),
    Panel("Speed", "tokens/s", ("tokens_per_second",)),
    Panel("MFU", "%", ("mfu",), 100),
    Panel("Memory", "GiB", ("memory_gib",)),
    Panel("Host memory", "%", ("host_memory_percent",)),
    Panel("GPU utilization", "%", ("gpu_utilization",)),
    Panel("GPU power", "W", ("gpu_power_watts",)),
    Panel("GPU temperature", "°C", ("gpu_temperature_celsius",)),
    Panel("GPU clock", "MHz", ("gpu_clock_mhz",)),
    Panel("Network", "MB/s", ("network_bytes_per_second",), 1e-6),
    Panel("NVLink", "GB/s", ("nvlink_bytes_per_second",), 1e-9),
    Panel("Wait for data", "ms", ("data_seconds",), 1e3),
    Panel("Imbalance of ranks", "%", ("idle_share",), 100),
    Panel("Step time", "s", ("step_seconds",)),
    Panel("Speed of a short product", "TFLOP/s", ("product_tflops",)),
    Panel("Learning rate", "", ("learning_rate",)),
    Panel("Gradient norm", "", ("grad_norm",)),
)
# What each rank has of its own; the rest of its records is that of all.
_OF_RANKS = {"memory_gib", "host_memory_percent", "gpu_utilization", "gpu_power_watts", "gpu_temperature_celsius", "gpu_clock_mhz",
             "network_bytes_per_second", "nvlink_bytes_per_second", "product_tflops", "data_seconds"}  # fmt: skip
_KNOWN = {column for panel in PANELS for column in panel.columns} | {*NO_CHART}


class WatchedRun:
    """A run directory."""

    def __init__(self, folder: Path) -> None:
        self.place = shown(folder)
        self.files = RunFiles(folder)
        self._fault = ""  # an error of ours, in place of a page that stands still
        self._axes: dict[str, list[float]] = {}
        self._smooth: list[float | None] = []
        self._ended = how_it_ended(self.files)

    def refresh(self, lock: threading.Lock) -> bool:
        """Read what was added; whether something changed. The lock is held while what others read is changed."""
        previous_fault = self._fault
        changed = False
        try:
            with lock:
                changed = self.files.refresh()
                if changed:
                    self._axes, self._smooth = {}, []
                    self._ended = how_it_ended(self.files)
            self._fault = ""
        except Exception as error:  # one run must not stop the page of others
            self._fault = f"{type(error).__name__}: {error}"
        return changed or self._fault != previous_fault

    def axis(self, name: str) -> list[float]:
        """For each record its step, the tokens up to it, or the seconds of training up to it."""
        if name not in self._axes:
            column = {"tokens": "tokens", "seconds": "step_seconds"}.get(name, "step")
            values = [value if value and math.isfinite(value) else 0.0 for value in self.files.columns.get(column, [])]
            self._axes[name] = values if column == "step" else list(accumulate(values))
        return self._axes[name]

    def status(self) -> dict[str, Any]:
        """Where it stands: its state, progress, the newest figures in the records' units, warnings and how it ended."""
        columns, files = self.files.columns, self.files
        steps, pace = len(columns.get("step", [])), _recent_mean(columns.get("step_seconds", []))
        step = columns["step"][-1] if steps else 0
        done = self._share_done(step or 0)
        whole = (step or 0) / done if done else None  # steps of the whole run
        left = (whole - (step or 0)) * pace if files.state == "running" and whole and pace else None
        figures = {name: value for name in columns if (value := _newest(columns[name])) is not None}
        if recent := _recent_mean(columns.get("tokens_per_second", [])):
            figures["tokens_per_second"] = recent
        if pace and (wait := _recent_mean(columns.get("data_seconds", []))) is not None:
            figures["data_share"] = wait / pace
        return {
            "name": files.name, "place": self.place, "state": files.state,
            "step": step, "steps": round(whole) if step and whole else None, "done": done, "seconds_left": left,
            "figures": figures, "warnings": files.warnings, "end": self._ended, "log": files.log_tail[-LINES:], "texts": files.revision,
            "damaged": self.damaged(),
        }  # fmt: skip

    def damaged(self) -> list[dict[str, Any]]:
        """What could not be read of the run: each file, how many of its lines were skipped (None: all of it is), and why."""
        rows = [file._asdict() for file in self.files.damaged]
        if self._fault:
            rows.append(DamagedFile(".", None, self._fault)._asdict())
        return rows

    def _share_done(self, step: float) -> float | None:
        """The part of its duration that it has trained, from 0 to 1; None where the recipe is not there yet."""
        columns = self.files.columns
        with suppress(KeyError, ValueError, TypeError, AttributeError):  # a file that somebody edited
            duration = Length.parse(self.files.recipe["train"]["duration"])
            if duration.seconds:
                return _share(sum(known(columns.get("step_seconds", []))), duration.seconds)
            at = _newest(columns.get("epoch", [])) or 0.0 if duration.unit == "epochs" else step
            return _share(at, duration.amount)
        return None

    def texts(self) -> dict[str, Any]:
        """What is read rather than plotted, and seldom changes: the recipe, as dotted keys, and the samples."""
        recipe = self.files.recipe
        return {"recipe": leaves(recipe) if recipe else {}, "samples": self.files.samples}

    def table(self, low: float, high: float, count: int) -> dict[str, Any]:
        """About `count` records of a window of steps, evenly spaced, the last one among them."""
        columns, steps = self.files.columns, self.axis("step")
        i, j = bisect_left(steps, low), bisect_right(steps, high)
        chosen = sorted({j - 1 - k * (j - i) // count for k in range(count)}) if j > i else []
        names = list(columns)
        return {"columns": names, "rows": [[columns[name][k] for name in names] for k in chosen]}

    def series(self, panel: Panel, axis: str) -> Iterator[tuple[str, int | None, list[float], Sequence[float | None]]]:
        """What a panel shows of this run: field, rank (None: rank 0's own record), x and y."""
        x = self.axis(axis)
        for column in panel.columns:
            if y := self.files.columns.get(column):
                yield column, None, x, y
                if column == "loss" and len(y) >= SMOOTH_FROM:
                    self._smooth = self._smooth or smooth(y, max(10, len(y) // 50))
                    yield "loss, smoothed", None, x, self._smooth
            at = dict(zip(self.axis("step"), x, strict=True)) if self.files.ranks and axis != "step" else None
            for rank, columns in sorted(self.files.ranks.items()):
                if column in columns and column in _OF_RANKS:
                    steps = [value or 0.0 for value in columns["step"]]
                    yield column, rank, [at.get(s, 0.0) for s in steps] if at else steps, columns[column]


def open_run(word: str, say: Callable[[str], None] | None = None) -> WatchedRun:
    """A run by its directory or by the name of its job; UsageError if it is none.

    A job that waits in a queue is waited for, and `say` takes the reason; without `say` that is an error.
    """
    folder = Path(word)
    if not holds_run(folder):
        folder = _begun(find_job(word), say)
    return WatchedRun(folder)


def _begun(job: Job, say: Callable[[str], None] | None) -> Path:
    """The run directory of a job, once there is a run in it."""
    folder, told = Path(job.run_dir), ""
    while not holds_run(folder):
        state = job.state()
        if say is None or not state.at_work:
            what, fix = f"{job.name} has not begun", f"tunesmith status {shell_word(job.name)}"
            raise UsageError(what, where=str(folder), why=state.text, fix=fix)
        if state.text != told:
            say(f"{job.name} has not begun: {state.text}; waiting for it, ctrl-C ends that")
        told = state.text
        time.sleep(QUEUE)
    return folder


def curves(
    runs: Sequence[WatchedRun], axis: str, low: float, high: float, points: int, most: int | None = None
) -> list[dict[str, Any]]:
    """The charts for a window of the x axis, the first `most`; each series as about `points` points, spikes among them."""
    named = {column for run in runs for columns in (run.files.columns, *run.files.ranks.values()) for column in columns}
    extra = tuple(Panel(column, "", (column,)) for column in sorted(named - _KNOWN))
    found: list[dict[str, Any]] = []
    for panel in (*PANELS, *extra):
        if len(found) == most:
            break
        series = []
        for index, run in enumerate(runs):
            for field, rank, x, y in run.series(panel, axis):
                i, j = max(0, bisect_left(x, low) - 1), bisect_right(x, high) + 1
                xs, ys = downsample(x[i:j], y[i:j], points)
                if xs:
                    ys = [float(f"{value * panel.scale:.6g}") for value in ys]
                    series.append({"run": index, "field": field, "rank": rank, "x": xs, "y": ys})
        if series:
            found.append({"title": panel.title, "unit": panel.unit, "series": series})
    return found


def _share(done: float, whole: float) -> float | None:
    """A part from 0 to 1; None where it is too small to go by."""
    share = min(1.0, done / whole) if whole > 0 else 0.0
    return share if share > SMALLEST_SHARE else None


def _newest(values: Sequence[float | None]) -> float | None:
    return next((value for value in reversed(values) if value is not None and math.isfinite(value)), None)


def _recent_mean(values: Sequence[float | None]) -> float | None:
    """The mean of the last steps; the first step of a run compiles and warms up, and is left out."""
    recent = [value for value in values[1:][-RECENT:] or values[-1:] if value is not None and math.isfinite(value)]
    return sum(recent) / len(recent) if recent else None


def to_json(value: Any) -> str:
    """Strict JSON: what is not finite is null there."""
    return json.dumps(_finite_only(value), allow_nan=False, separators=(",", ":"))


def _finite_only(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: _finite_only(item) for key, item in value.items()}
    return [_finite_only(item) for item in value] if isinstance(value, list | tuple) else value
