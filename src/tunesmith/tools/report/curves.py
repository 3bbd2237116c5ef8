"""The charts of the report page.

Each chart shows one record field. Long curves are downsampled, and curves that fluctuate from step
to step are also smoothed.
"""

import math
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import NamedTuple

from tunesmith.metrics.run_figures import Columns, finite, mean
from tunesmith.run_dir import Fields
from tunesmith.tools.report.run_files import RunFiles

# Record fields that have no chart, because they are counts or positions.
NO_CHART = (
    *("step", "epoch", "tokens", "supervised_tokens", "examples", "mfu_peak_tflops"),
    *("val_reward_low", "val_reward_high"),
)


# Record fields in the order of their charts. Charts of other fields, such as metrics of a single
# method, follow.
FIRST_CHARTS = ("reward", "val_reward")
SCORER_PREFIX = "reward/"  # prefix of the mean score of one scorer
CHARTS = (
    *("loss", "val_loss"),
    # Fields of preference methods.
    *("reward_accuracy", "val_reward_accuracy", "reward_margin", "val_reward_margin"),
    *("rewards_chosen", "val_rewards_chosen", "rewards_rejected", "val_rewards_rejected"),
    *("kl", "val_kl"),
    # Fields of reinforcement learning.
    *("reward_std", "kl_sampler", "kl_base", "entropy_sample"),
    *("answer_length", "cut_share", "groups_with_variance", "rollout_seconds"),
    *("tokens_per_second", "mfu", "memory_gib", "host_memory_percent"),
    *("gpu_utilization", "gpu_power_watts", "gpu_temperature_celsius", "gpu_clock_mhz"),
    *("network_bytes_per_second", "nvlink_bytes_per_second", "data_seconds", "idle_share"),
    *("step_seconds", "learning_rate", "grad_norm"),
)
# Fields that each rank measures for itself. All other fields have the same value on all ranks.
_PER_RANK = {
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
# Fields that fluctuate from step to step and are therefore also shown as a smoothed line.
_SMOOTHED = {
    "loss",
    "reward_accuracy",
    "reward_margin",
    "rewards_chosen",
    "rewards_rejected",
    "kl",
    "reward",
    "tokens_per_second",
    "grad_norm",
    "step_seconds",
}
POINTS = 600  # maximum points of a curve; two per pixel of a wide chart
COLORS = 8  # number of line colors on the page
MAX_RANKS = 7  # maximum number of ranks in one chart
# Span of the smoothing: this fraction of a run's steps, but at least 5 steps.
SMOOTH_FRACTION, MIN_SMOOTH_SPAN = 0.02, 5
SMOOTH_FROM = 15  # minimum number of steps; fewer raw values are easy to read
# Fields whose charts start at zero.
FROM_ZERO = {
    *("reward_accuracy", "val_reward_accuracy", "tokens_per_second", "mfu", "memory_gib"),
    *("host_memory_percent", "gpu_utilization", "gpu_power_watts", "data_seconds", "idle_share"),
}


class Line(NamedTuple):
    """One line of a chart. `look` is "raw", "smooth", or "dots" for a curve with few points."""

    label: str
    color: int
    look: str
    x: list[float]
    y: list[float]


def curves(runs: Sequence[RunFiles]) -> tuple[list[Fields], list[tuple[str, str]]]:
    """Return the charts of the runs, and the names and values of fields that are constant."""
    names = set[str]()
    for run in runs:
        names.update(run.figures.columns, *run.ranks.values())
    # For runs with rewards, `val_loss` is only another form of `val_reward`.
    if all(run.figures.reward_text for run in runs):
        names.discard("val_loss")
    scorers = sorted(name for name in names if name.startswith(SCORER_PREFIX))
    others = sorted(names.difference(FIRST_CHARTS, scorers, CHARTS, NO_CHART))

    charts: list[Fields] = []
    constants = []
    for field in (*FIRST_CHARTS, *scorers, *CHARTS, *others):
        if field not in names:
            continue
        lines = [line for line in _lines_of(runs, field) if line.x]
        values = {value for line in lines for value in line.y}
        if len(values) == 1:
            constants.append((field, f"{values.pop():.4g}"))
        elif values:
            series = [line._asdict() for line in lines]
            charts.append({"title": field, "from_zero": field in FROM_ZERO, "series": series})
    return charts, constants


def _lines_of(runs: Sequence[RunFiles], field: str) -> Iterator[Line]:
    """Yield the lines of a chart.

    If there are several runs, each run has one color and only its rank 0 is shown. If there is a
    single run, each rank has one color.
    """
    if len(runs) > 1:
        for index, run in enumerate(runs):
            yield from _lines(run.figures.columns, field, run.label, index)
        return
    by_rank = _by_rank(runs[0], field) if field in _PER_RANK else {}
    if by_rank.keys() <= {0}:
        yield from _lines(runs[0].figures.columns, field, field, 0)
        return
    for rank, columns in by_rank.items():
        yield from _lines(columns, field, f"rank {rank}", rank)


def _lines(columns: Columns, field: str, label: str, color: int) -> Iterator[Line]:
    """Yield the smoothed line of a field (only for smoothed fields), and the line or dots of its
    raw values.
    """
    x = columns.get("step", [])
    y = columns.get(field, [])

    # Each tuple has the label, the look and the values of a line.
    drawn = [(label, "smooth", y)]
    if field.startswith("val_"):
        drawn = [(label, "dots", y)]
    elif (field in _SMOOTHED or field.startswith(SCORER_PREFIX)) and len(finite(y)) >= SMOOTH_FROM:
        span = max(MIN_SMOOTH_SPAN, int(SMOOTH_FRACTION * len(y)))
        drawn = [(f"{label}, raw", "raw", y), (label, "smooth", smooth(y, span))]

    for name, look, values in drawn:
        steps, thinned = downsample(x, values, POINTS)
        rounded = [float(f"{value:.6g}") for value in thinned]
        yield Line(name, color % COLORS, look, steps, rounded)


def _by_rank(run: RunFiles, field: str) -> dict[int, Columns]:
    """Return a dict from each rank that has the field to its columns.

    If there are many ranks, return only rank 0 and the ranks with the lowest and highest means.
    """
    columns = {0: run.figures.columns} | run.ranks
    means = {rank: mean(columns[rank].get(field, [])) for rank in sorted(columns)}
    measured = {rank: value for rank, value in means.items() if value is not None}
    ranks = list(measured)
    if len(ranks) > MAX_RANKS:
        others = sorted(filter(None, ranks), key=measured.__getitem__)
        ranks = sorted({0, *others[:3], *others[-3:]})
    return {rank: columns[rank] for rank in ranks}


def downsample(
    x: Sequence[float | None], y: Sequence[float | None], points: int
) -> tuple[list[float], list[float]]:
    """Downsample a curve to at most `points` + 2 points.

    It keeps the first point, the last point, and the minimum and maximum of each interval. A spike
    is therefore still visible, unlike with means. Values that are None, NaN or infinite are
    skipped.
    """
    pairs = [
        (float(a), b)
        for a, b in zip(x, y, strict=False)
        if a is not None and b is not None and math.isfinite(b)
    ]
    if len(pairs) > points:
        chosen = {pairs[0], pairs[-1]}
        # Each interval gives two points: the minimum and the maximum.
        size = math.ceil(2 * len(pairs) / points)
        for first in range(0, len(pairs), size):
            stretch = pairs[first : first + size]
            chosen.add(min(stretch, key=itemgetter(1)))
            chosen.add(max(stretch, key=itemgetter(1)))
        pairs = sorted(chosen)

    return [a for a, _ in pairs], [b for _, b in pairs]


def smooth(y: Sequence[float | None], span: int) -> list[float | None]:
    """Compute the exponential moving average with bias correction, as TensorBoard does.

    Args:
        y: the values. Values that are missing or not finite stay None.
        span: number of steps that affect a value. After about half of these steps, the weight of a
            value has fallen to 1/e.
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
