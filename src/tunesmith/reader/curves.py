"""The curves of runs as the page draws them.

Every chart has one panel of record fields. A long curve is thinned, and a curve that fluctuates
from step to step is smoothed too.
"""

import math
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import NamedTuple

from tunesmith.metrics.run_figures import Columns, finite, mean
from tunesmith.reader.run_files import RunFiles
from tunesmith.run_dir import Fields

# Counts and positions, which have no curve.
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
    # Methods that learn from preferences record these.
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
# Fields that each rank measures itself; the others have the same value on all ranks.
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
# Fields that fluctuate from step to step, so that they are smoothed too.
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
POINTS = 600  # of a curve: two for each pixel of a wide chart
COLORS = 8  # of the page
MAX_RANKS = 7  # in one chart
# Smoothing: a value counts over this fraction of a run's steps, but over 5 at least.
SMOOTH_FRACTION, MIN_SMOOTH_SPAN = 0.02, 5
SMOOTH_FROM = 15  # steps; with fewer, the raw values are easy to read
FROM_ZERO = {"%", "tokens/s", "GiB", "W", "ms"}  # units whose charts start at zero


class Line(NamedTuple):
    """One line of a chart; `look` is raw, smooth, or dots for a curve of few points."""

    label: str
    color: int
    look: str
    x: list[float]
    y: list[float]


def curves(runs: Sequence[RunFiles]) -> tuple[list[Fields], list[tuple[str, str]]]:
    """Return the charts of the runs, and the names and values of fields that never change."""
    charts: list[Fields] = []
    constants = []
    for panel in (*PANELS, *_panels_of_other_columns(runs)):
        title = f"{panel.title} ({panel.unit})" if panel.unit else panel.title
        lines = [line for line in _lines_of(runs, panel) if line.x]
        values = {value for line in lines for value in line.y}
        if len(values) == 1:
            constants.append((title, f"{values.pop():.4g}"))
        elif lines:
            series = [line._asdict() for line in lines]
            from_zero = panel.unit in FROM_ZERO
            charts.append({"title": title, "from_zero": from_zero, "series": series})
    return charts, constants


def _panels_of_other_columns(runs: Sequence[RunFiles]) -> list[Panel]:
    """Return a panel for each record field that has none, such as a method's own metric."""
    names = set[str]()
    for run in runs:
        names.update(run.figures.columns, *run.ranks.values())
    names -= {*_IN_PANELS, *NO_CHART}
    return [Panel(name, "", (name,)) for name in sorted(names)]


def _lines_of(runs: Sequence[RunFiles], panel: Panel) -> Iterator[Line]:
    """Yield the lines of a panel.

    Several runs have a color each, and only their rank 0 is drawn. A single run has a color for
    each rank and field.
    """
    if len(runs) == 1 and len(panel.columns) == 1 and panel.columns[0] in _OF_RANKS:
        by_rank = _by_rank(runs[0], panel.columns[0])
        if by_rank.keys() - {0}:
            for rank, columns in by_rank.items():
                yield from _lines(columns, panel.columns[0], f"rank {rank}", rank, panel.scale)
            return
    for index, run in enumerate(runs):
        for number, field in enumerate(panel.columns):
            label = field
            if len(runs) > 1:
                label = run.label if len(panel.columns) == 1 else f"{run.label} {field}"
            color = index if len(runs) > 1 else number
            yield from _lines(run.figures.columns, field, label, color, panel.scale)


def _lines(columns: Columns, field: str, label: str, color: int, scale: float) -> Iterator[Line]:
    """Yield the smoothed line of a field if it has one, and its raw line or dots."""
    x, y = columns.get("step", []), columns.get(field, [])
    drawn = [(label, "dots" if field.startswith("val_") else "smooth", y)]
    if field in _SMOOTHED and len(finite(y)) >= SMOOTH_FROM:
        smoothed = smooth(y, max(MIN_SMOOTH_SPAN, int(SMOOTH_FRACTION * len(y))))
        drawn = [(f"{label}, raw", "raw", y), (label, "smooth", smoothed)]
    for name, look, values in drawn:
        steps, thinned = downsample(x, values, POINTS)
        scaled = [float(f"{value * scale:.6g}") for value in thinned]
        yield Line(name, color % COLORS, look, steps, scaled)


def _by_rank(run: RunFiles, field: str) -> dict[int, Columns]:
    """Return the columns of the ranks that have a field.

    Of many ranks only some are returned: rank 0 and those with the lowest and the highest mean.
    """
    columns = {0: run.figures.columns} | run.ranks
    means = {rank: mean(columns[rank].get(field, [])) for rank in sorted(columns)}
    measured = {rank: value for rank, value in means.items() if value is not None}
    ranks = [*measured]
    if len(ranks) > MAX_RANKS:
        others = sorted((rank for rank in ranks if rank), key=measured.__getitem__)
        ranks = sorted({0, *others[:3], *others[-3:]})
    return {rank: columns[rank] for rank in ranks}


def downsample(
    x: Sequence[float | None], y: Sequence[float | None], points: int
) -> tuple[list[float], list[float]]:
    """Thin a curve to at most `points` + 2 points: the first, the last, and the lowest and the
    highest value of each stretch.

    A spike survives, which a mean would hide. Values that are None, NaN or infinite have no point.
    """
    pairs = [
        (float(a), b)
        for a, b in zip(x, y, strict=False)
        if a is not None and b is not None and math.isfinite(b)
    ]
    if len(pairs) > points:
        chosen = {pairs[0], pairs[-1]}
        size = math.ceil(2 * len(pairs) / points)
        for first in range(0, len(pairs), size):
            stretch = pairs[first : first + size]
            chosen.add(min(stretch, key=itemgetter(1)))
            chosen.add(max(stretch, key=itemgetter(1)))
        pairs = sorted(chosen)
    return [a for a, _ in pairs], [b for _, b in pairs]


def smooth(y: Sequence[float | None], span: int) -> list[float | None]:
    """Compute the exponential moving average, with the bias of its start corrected, as TensorBoard
    does.

    Args:
        y: the values; those that are missing or not finite are left out.
        span: steps over which a value counts; its weight falls to 1/e in about half of them.
    """
    decay = 1.0 - 2.0 / (max(1, span) + 1)
    average = 0.0
    weight = 0.0
    smoothed: list[float | None] = []
    for value in y:
        if value is None or not math.isfinite(value):
            smoothed.append(None)
            continue
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smoothed.append(average / weight)
    return smoothed
