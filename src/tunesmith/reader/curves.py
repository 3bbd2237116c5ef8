"""The curves of runs as a page draws them: which there are, how they are smoothed and thinned."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from tunesmith.metrics.run_figures import finite
from tunesmith.reader.run_files import RunFiles
from tunesmith.run_dir import Fields

# Of the records: counts and positions, no curves.
NO_CHART = ("step", "epoch", "tokens", "supervised_tokens", "examples", "mfu_peak_tflops")


class Panel(NamedTuple):
    """One chart: the record fields that it shows, and by what they are multiplied for its unit."""

    title: str
    unit: str
    columns: tuple[str, ...]
    scale: float = 1.0


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


def curves(
    runs: Sequence[RunFiles],
    axis: str,
    low: float,
    high: float,
    points: int,
) -> list[Fields]:
    """The charts for a window of the x axis.

    Each series has about `points` points, spikes among them.
    """
    charts: list[Fields] = []
    for panel in (*PANELS, *_panels_of_other_columns(runs)):
        series = []
        for index, run in enumerate(runs):
            for line in _lines_of(run, panel, axis):
                # One point more on both sides: the curve goes on to the edge of the window.
                first = max(0, bisect_left(line["x"], low) - 1)
                end = bisect_right(line["x"], high) + 1
                x, y = downsample(line["x"][first:end], line["y"][first:end], points)
                if x:
                    scaled = [float(f"{value * panel.scale:.6g}") for value in y]
                    series.append({**line, "run": index, "x": x, "y": scaled})
        if series:
            charts.append({"title": panel.title, "unit": panel.unit, "series": series})
    return charts


def _panels_of_other_columns(runs: Sequence[RunFiles]) -> list[Panel]:
    """A panel for each record field that has none, such as a method's own metric."""
    names = set[str]()
    for run in runs:
        names.update(run.figures.columns, *run.ranks.values())
    names -= {*_IN_PANELS, *NO_CHART}
    return [Panel(name, "", (name,)) for name in sorted(names)]


def _lines_of(run: RunFiles, panel: Panel, axis: str) -> Iterator[Fields]:
    """The lines of a panel of one run, whole: each a record field of one rank (None for rank 0's
    own record); `smoothed` is the choice of the page, "" for raw values."""
    x = run.figures.axes.get(axis, run.figures.axes["step"])
    # Other ranks record their steps alone: rank 0 says how many tokens or seconds these are.
    x_by_step = dict(zip(run.figures.axes["step"], x, strict=True))
    for field in panel.columns:
        y = run.figures.columns.get(field, [])
        smooth_lines = smoothings(y) if field in _SMOOTHED else {}
        for smoothed, values in {"": y, **smooth_lines}.items():
            yield {"field": field, "rank": None, "smoothed": smoothed, "x": x, "y": values}
        for rank, columns in sorted(run.ranks.items()):
            if field in _OF_RANKS and field in columns:
                steps = [step or 0.0 for step in columns["step"]]
                if axis != "step":
                    steps = [x_by_step.get(step, 0.0) for step in steps]
                line = {"field": field, "rank": rank, "smoothed": ""}
                yield {**line, "x": steps, "y": columns[field]}


def downsample(
    x: Sequence[float | None], y: Sequence[float | None], points: int
) -> tuple[list[float], list[float]]:
    """At most `points` + 2 points of a curve, with the lowest and the highest of each stretch, the
    first and the last.

    A spike survives, which a mean would hide. Where either is None, NaN or infinite there is no
    point.
    """
    points_of = [
        (a, b)
        for a, b in zip(x, y, strict=False)
        if a is not None and b is not None and math.isfinite(b)
    ]
    if len(points_of) > points:
        chosen = sorted(_extremes([b for _, b in points_of], max(1, points // 2)))
        points_of = [points_of[i] for i in chosen]
    return [float(a) for a, _ in points_of], [float(b) for _, b in points_of]


def _extremes(values: Sequence[float], stretches: int) -> set[int]:
    """The indices of the first, the last, and of each stretch the lowest and the highest value."""
    chosen = {0, len(values) - 1}
    for start, end in pairwise(len(values) * i // stretches for i in range(stretches + 1)):
        stretch = values[start:end]
        chosen.add(start + stretch.index(min(stretch)))
        chosen.add(start + stretch.index(max(stretch)))
    return chosen


# The choices of the pages: what share of a run's steps a value counts over, and how many at least.
SMOOTHINGS = {"some": (0.02, 5), "strong": (0.1, 15)}
SMOOTH_FROM = 15  # steps; with fewer, the raw values read well


def smoothings(y: Sequence[float | None]) -> dict[str, list[float | None]]:
    """The values of a whole run by each choice of smoothing; none of few steps."""
    if len(finite(y)) < SMOOTH_FROM:
        return {}
    spans = {name: max(least, int(share * len(y))) for name, (share, least) in SMOOTHINGS.items()}
    return {name: smooth(y, span) for name, span in spans.items()}


def smooth(y: Sequence[float | None], span: int) -> list[float | None]:
    """The exponential moving average, with the weight of its start removed, as TensorBoard draws
    it.

    `span`: steps over which a value counts; its weight falls to 1/e in about half of that. Values
    that are missing or not finite are left out.
    """
    decay = 1.0 - 2.0 / (max(1, span) + 1)
    mean = 0.0
    weight = 0.0
    smoothed: list[float | None] = []
    for value in y:
        if value is None or not math.isfinite(value):
            smoothed.append(None)
            continue
        mean = decay * mean + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smoothed.append(mean / weight)
    return smoothed
