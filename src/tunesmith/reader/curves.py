"""The curves of runs as the page draws them.

Every chart has one record field. A long curve is thinned, and a curve that fluctuates
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


# Record fields in the order of their charts. Other fields, such as a method's own metric, follow.
CHARTS = (
    *("loss", "val_loss"),
    # Methods that learn from preferences record these.
    *("reward_accuracy", "val_reward_accuracy", "reward_margin", "val_reward_margin"),
    *("rewards_chosen", "val_rewards_chosen", "rewards_rejected", "val_rewards_rejected"),
    *("kl", "val_kl"),
    *("tokens_per_second", "mfu", "memory_gib", "host_memory_percent"),
    *("gpu_utilization", "gpu_power_watts", "gpu_temperature_celsius", "gpu_clock_mhz"),
    *("network_bytes_per_second", "nvlink_bytes_per_second", "data_seconds", "idle_share"),
    *("step_seconds", "learning_rate", "grad_norm"),
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
POINTS = 600  # of a curve: two for each pixel of a wide chart
COLORS = 8  # of the page
MAX_RANKS = 7  # in one chart
# Smoothing: a value counts over this fraction of a run's steps, but over 5 at least.
SMOOTH_FRACTION, MIN_SMOOTH_SPAN = 0.02, 5
SMOOTH_FROM = 15  # steps; with fewer, the raw values are easy to read
# Fields whose charts start at zero
FROM_ZERO = {
    *("reward_accuracy", "val_reward_accuracy", "tokens_per_second", "mfu", "memory_gib"),
    *("host_memory_percent", "gpu_utilization", "gpu_power_watts", "data_seconds", "idle_share"),
}


class Line(NamedTuple):
    """One line of a chart; `look` is raw, smooth, or dots for a curve of few points."""

    label: str
    color: int
    look: str
    x: list[float]
    y: list[float]


def curves(runs: Sequence[RunFiles]) -> tuple[list[Fields], list[tuple[str, str]]]:
    """Return the charts of the runs, and the names and values of fields that never change."""
    names = set[str]()
    for run in runs:
        names.update(run.figures.columns, *run.ranks.values())
    charts: list[Fields] = []
    constants = []
    for field in (*CHARTS, *sorted(names - {*CHARTS, *NO_CHART})):
        lines = [line for line in _lines_of(runs, field) if line.x]
        values = {value for line in lines for value in line.y}
        if len(values) == 1:
            constants.append((field, f"{values.pop():.4g}"))
        elif lines:
            series = [line._asdict() for line in lines]
            charts.append({"title": field, "from_zero": field in FROM_ZERO, "series": series})
    return charts, constants


def _lines_of(runs: Sequence[RunFiles], field: str) -> Iterator[Line]:
    """Yield the lines of a chart.

    Several runs have a color each, and only their rank 0 is drawn. A single run has a color for
    each rank.
    """
    by_rank = _by_rank(runs[0], field) if len(runs) == 1 and field in _OF_RANKS else {}
    if by_rank.keys() - {0}:
        for rank, columns in by_rank.items():
            yield from _lines(columns, field, f"rank {rank}", rank)
        return
    for index, run in enumerate(runs):
        label = run.label if len(runs) > 1 else field
        yield from _lines(run.figures.columns, field, label, index)


def _lines(columns: Columns, field: str, label: str, color: int) -> Iterator[Line]:
    """Yield the smoothed line of a field if it has one, and its raw line or dots."""
    x, y = columns.get("step", []), columns.get(field, [])
    drawn = [(label, "dots" if field.startswith("val_") else "smooth", y)]
    if field in _SMOOTHED and len(finite(y)) >= SMOOTH_FROM:
        smoothed = smooth(y, max(MIN_SMOOTH_SPAN, int(SMOOTH_FRACTION * len(y))))
        drawn = [(f"{label}, raw", "raw", y), (label, "smooth", smoothed)]
    for name, look, values in drawn:
        steps, thinned = downsample(x, values, POINTS)
        rounded = [float(f"{value:.6g}") for value in thinned]
        yield Line(name, color % COLORS, look, steps, rounded)


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
