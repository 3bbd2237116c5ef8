"""What `watch` shows of runs: where each stands, its curves, its texts."""

import json
import logging
import math
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.config.dump import leaves
from tunesmith.errors import UsageError
from tunesmith.host.shell import shell_word
from tunesmith.launch.jobs import Job, find_job, holds_run
from tunesmith.metrics.conversations import conversations_of, whole_characters
from tunesmith.report.run_files import (
    NO_CHART,
    DamagedFile,
    RunFiles,
    downsample,
    finite,
    how_it_ended,
    smoothings,
)
from tunesmith.run_dir import RunState, shown
from tunesmith.units import Length

log = logging.getLogger(__name__)

# Seconds between two looks at a job that waits.
QUEUE = 5.0
# Steps that speeds are means of: one step alone would flicker.
RECENT = 20
# Lines of the log that are shown.
LINES = 40


class Panel(NamedTuple):
    """One chart: the record fields that it shows, and by what they are multiplied for its unit."""

    title: str
    unit: str
    columns: tuple[str, ...]
    scale: float = 1.0


class Series(NamedTuple):
    """A record field of one rank; `rank`: None for rank 0's own record.

    `smoothed`: the choice of the page, "" for raw values.
    """

    field: str
    rank: int | None
    x: Sequence[float]
    y: Sequence[float | None]
    smoothed: str = ""


PANELS = (
    Panel("Training loss", "", ("loss",)),
    Panel("Validation loss", "", ("val_loss",)),
    # Of methods that learn from preferences.
    Panel("Reward accuracy", "%", ("reward_accuracy", "val_reward_accuracy"), 100),
    Panel("Reward margin", "", ("reward_margin", "val_reward_margin")),
    Panel("Reward of chosen answers", "", ("rewards_chosen", "val_rewards_chosen")),
    Panel("Reward of rejected answers", "", ("rewards_rejected", "val_rewards_rejected")),
    Panel("KL to the reference", "", ("kl", "val_kl")),
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
    Panel("Speed of a short matmul", "TFLOP/s", ("product_tflops",)),
    Panel("Learning rate", "", ("learning_rate",)),
    Panel("Gradient norm", "", ("grad_norm",)),
)
# What each rank has of its own; the rest of its records is that of all.
_OF_RANKS = {
    "memory_gib",
    "host_memory_percent",
    "gpu_utilization",
    "gpu_power_watts",
    "gpu_temperature_celsius",
    "gpu_clock_mhz",
    "network_bytes_per_second",
    "nvlink_bytes_per_second",
    "product_tflops",
    "data_seconds",
}
# Fields that move much from step to step: they are drawn smoothed too.
_SMOOTHED = {
    "loss",
    "reward_accuracy",
    "reward_margin",
    "rewards_chosen",
    "rewards_rejected",
    "kl",
    "tokens_per_second",
    "grad_norm",
    "step_seconds",
}
_IN_PANELS = {column for panel in PANELS for column in panel.columns}


class WatchedRun:
    """A run directory, read again as it grows."""

    def __init__(self, folder: Path) -> None:
        self.place = shown(folder)
        self.files = RunFiles(folder)
        # An error of ours: the page shows it, and does not stand still.
        self._fault = ""
        # Both are computed when a page asks, and hold until the run has grown.
        self._axes: dict[str, list[float]] = {}
        self._smooth: dict[str, dict[str, list[float | None]]] = {}
        self._ending = how_it_ended(self.files)

    def refresh(self, lock: threading.Lock) -> bool:
        """Read what was added; whether something changed.

        The lock is held while what other threads read is changed.
        """
        previous_fault = self._fault
        changed = False
        try:
            with lock:
                changed = self.files.refresh()
                if changed:
                    self._axes = {}
                    self._smooth = {}
                    self._ending = how_it_ended(self.files)
            self._fault = ""
        except Exception as error:
            # One run must not stop the page of the others.
            self._fault = f"{type(error).__name__}: {error}"
        return changed or self._fault != previous_fault

    def axis(self, name: str) -> list[float]:
        """For each record its step, the tokens up to it, or the seconds of training up to it."""
        if name not in self._axes:
            column = {"tokens": "tokens", "seconds": "step_seconds"}.get(name, "step")
            values = [_finite_or_zero(value) for value in self.files.columns.get(column, [])]
            if column != "step":
                values = list(accumulate(values))
            self._axes[name] = values
        return self._axes[name]

    def status(self) -> dict[str, Any]:
        """Where it stands: state, progress, newest figures, warnings, and how it ended.

        Figures are in the units of the records.
        """
        files = self.files
        steps = files.steps
        progress = self._progress(steps)
        total_steps = steps / progress if progress else 0.0
        seconds_per_step = _recent_mean(files.columns.get("step_seconds", []))
        seconds_left = None
        if files.state is RunState.RUNNING and total_steps and seconds_per_step:
            seconds_left = (total_steps - steps) * seconds_per_step
        return {
            "name": files.name,
            "place": self.place,
            "state": files.state,
            "step": steps,
            "final_step": files.final_step,
            "steps": round(total_steps) if total_steps else None,
            "done": progress,
            "seconds_left": seconds_left,
            "figures": self._figures(seconds_per_step),
            "warnings": files.warnings,
            "end": self._ending,
            "log": files.log_tail[-LINES:],
            "texts": files.revision,
            "damaged": self.damaged(),
        }

    def _figures(self, seconds_per_step: float | None) -> dict[str, float]:
        """The newest value of each record field.

        The speed and the share of the wait for data are means of the last steps.
        """
        columns = self.files.columns
        figures: dict[str, float] = {}
        for name, values in columns.items():
            newest = _newest(values)
            if newest is not None:
                figures[name] = newest
        tokens_per_second = _recent_mean(columns.get("tokens_per_second", []))
        if tokens_per_second:
            figures["tokens_per_second"] = tokens_per_second
        data_seconds = _recent_mean(columns.get("data_seconds", []))
        if seconds_per_step and data_seconds is not None:
            figures["data_share"] = data_seconds / seconds_per_step
        return figures

    def damaged(self) -> list[dict[str, Any]]:
        """What could not be read of the run.

        By file how many of its lines were skipped (None: all of it is), and why.
        """
        rows = [file._asdict() for file in self.files.damaged]
        if self._fault:
            rows.append(DamagedFile(".", None, self._fault)._asdict())
        return rows

    def _progress(self, step: float) -> float | None:
        """The part of its duration that it has trained, from 0 to 1.

        None where the recipe is not there yet.
        """
        columns = self.files.columns
        try:
            duration = Length.parse(self.files.recipe["train"]["duration"])
            return duration.share(
                steps=step,
                epochs=_newest(columns.get("epoch", [])) or 0.0,
                seconds=sum(finite(columns.get("step_seconds", []))),
            )
        except (KeyError, ValueError, TypeError, AttributeError):
            # There is no recipe yet, or somebody edited it.
            return None

    def texts(self) -> dict[str, Any]:
        """What is read rather than plotted, and seldom changes.

        The recipe, as dotted keys; the samples; the turns of their prompts, as (role, text), and
        the system prompt of all.
        """
        recipe = self.files.recipe
        samples = []
        for row in self.files.samples:
            samples.append(row | {"answer": whole_characters(row["answer"])})
        conversations, system = conversations_of(row["prompt"] for row in samples)
        return {
            "recipe": leaves(recipe) if recipe else {},
            "samples": samples,
            "conversations": conversations,
            "system": system,
        }

    def table(self, low: float, high: float, count: int) -> dict[str, Any]:
        """About `count` records of a window of steps, evenly spaced, the last one among them."""
        columns = self.files.columns
        steps = self.axis("step")
        first = bisect_left(steps, low)
        end = bisect_right(steps, high)
        records: set[int] = set()
        if end > first:
            records = {end - 1 - part * (end - first) // count for part in range(count)}
        rows = []
        for record in sorted(records):
            rows.append([values[record] for values in columns.values()])
        return {"columns": list(columns), "rows": rows}

    def series(self, panel: Panel, axis: str) -> Iterator[Series]:
        """What a panel shows of this run."""
        x = self.axis(axis)
        # Other ranks record their steps alone: rank 0 says how many tokens or seconds these are.
        x_by_step: dict[float, float] = {}
        if self.files.ranks and axis != "step":
            x_by_step = dict(zip(self.axis("step"), x, strict=True))
        for column in panel.columns:
            y = self.files.columns.get(column)
            if y:
                yield Series(column, None, x, y)
                if column in _SMOOTHED:
                    for name, smoothed in self._smoothed(column).items():
                        yield Series(column, None, x, smoothed, smoothed=name)
            if column not in _OF_RANKS:
                continue
            for rank, columns in sorted(self.files.ranks.items()):
                if column in columns:
                    rank_x = [value or 0.0 for value in columns["step"]]
                    if x_by_step:
                        rank_x = [x_by_step.get(step, 0.0) for step in rank_x]
                    yield Series(column, rank, rank_x, columns[column])

    def _smoothed(self, column: str) -> dict[str, list[float | None]]:
        if column not in self._smooth:
            self._smooth[column] = smoothings(self.files.columns[column])
        return self._smooth[column]


def open_run(word: str, *, wait: bool = False) -> WatchedRun:
    """A run by its directory or by the name of its job; UsageError if it is none.

    wait: wait for a job in a queue, and log the reason; else that is an error.
    """
    folder = Path(word)
    if not holds_run(folder):
        folder = _wait_for_run(find_job(word), wait=wait)
    return WatchedRun(folder)


def _wait_for_run(job: Job, *, wait: bool) -> Path:
    """The run directory of a job, once there is a run in it."""
    folder = Path(job.run_dir)
    last_reason = ""
    while not holds_run(folder):
        state = job.state()
        if not wait or not state.at_work:
            what = f"{job.name} has not begun"
            fix = f"tunesmith status {shell_word(job.name)}"
            raise UsageError(what, where=str(folder), why=state.text, fix=fix)
        if state.text != last_reason:
            log.info(f"{job.name} has not started: {state.text}; waiting, ctrl-C stops")
        last_reason = state.text
        time.sleep(QUEUE)
    return folder


def curves(
    runs: Sequence[WatchedRun],
    axis: str,
    low: float,
    high: float,
    points: int,
    most: int | None = None,
) -> list[dict[str, Any]]:
    """The charts for a window of the x axis, the first `most` of them.

    Each series has about `points` points, spikes among them.
    """
    charts: list[dict[str, Any]] = []
    for panel in (*PANELS, *_panels_of_other_columns(runs)):
        if len(charts) == most:
            break
        series = []
        for index, run in enumerate(runs):
            for line in run.series(panel, axis):
                # One point more on both sides: the curve goes on to the edge of the window.
                first = max(0, bisect_left(line.x, low) - 1)
                end = bisect_right(line.x, high) + 1
                x, y = downsample(line.x[first:end], line.y[first:end], points)
                if x:
                    scaled = [float(f"{value * panel.scale:.6g}") for value in y]
                    about = {"field": line.field, "rank": line.rank, "smoothed": line.smoothed}
                    series.append({"run": index, **about, "x": x, "y": scaled})
        if series:
            charts.append({"title": panel.title, "unit": panel.unit, "series": series})
    return charts


def _panels_of_other_columns(runs: Sequence[WatchedRun]) -> list[Panel]:
    """A panel for each record field that has none, such as a method's own metric."""
    names: set[str] = set()
    for run in runs:
        names.update(run.files.columns)
        for columns in run.files.ranks.values():
            names.update(columns)
    names -= _IN_PANELS
    names.difference_update(NO_CHART)
    return [Panel(name, "", (name,)) for name in sorted(names)]


def _finite(values: Iterable[float | None]) -> Iterator[float]:
    """The values that are numbers; a record may lack one, or hold NaN."""
    for value in values:
        if value is not None and math.isfinite(value):
            yield value


def _finite_or_zero(value: float | None) -> float:
    if not value or not math.isfinite(value):
        return 0.0
    return value


def _newest(values: Sequence[float | None]) -> float | None:
    return next(_finite(reversed(values)), None)


def _recent_mean(values: Sequence[float | None]) -> float | None:
    """The mean of the last steps.

    The first step of a run compiles and warms up, and is left out.
    """
    recent = list(_finite(values[1:][-RECENT:] or values[-1:]))
    return sum(recent) / len(recent) if recent else None


def to_json(value: Any) -> str:
    """Strict JSON: what is not finite is null there."""
    return json.dumps(_finite_only(value), allow_nan=False, separators=(",", ":"))


def _finite_only(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite_only(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_only(item) for item in value]
    return value
