"""How far a mean over rows can be believed: 95 % intervals and a sentence.

A paired bootstrap: rows are drawn again with replacement, for both models the same ones, so that
what makes a row hard for both does not blur their difference. The percentiles taken are somewhat
further out than 2.5 and 97.5: with few rows the bootstrap's are too narrow (Hesterberg 2015, "What
Teachers Should Know About the Bootstrap", expanded percentile interval). Where all values are
equal no resample differs, and the interval is that of the share of such rows (Clopper-Pearson).

The seed is fixed: the same scores give the same interval, on any machine.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
SEED = 20_240_607
TAIL = 0.025  # beyond each end of a 95 % interval
# Five rows that differ all point one way once in 16 times by chance, six once in 32.
MIN_DIFFERING = 6
_DRAWS = 1 << 22  # row numbers drawn at a time: 32 MiB


class Interval(NamedTuple):
    """A mean and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


class PairedIntervals(NamedTuple):
    """Of two models on the same rows; `difference` is tuned less base. `differing`: rows on which
    their scores are not equal."""

    base: Interval
    tuned: Interval
    difference: Interval
    differing: int


def mean_interval(scores: Sequence[float], *, resamples: int = RESAMPLES) -> Interval:
    """Of one model's scores, each from 0 to 1."""
    values = np.asarray(scores, np.float64)
    return _interval(values, _resampled_means(values[:, None], resamples)[:, 0], 0.0)


def paired_intervals(
    base: Sequence[float], tuned: Sequence[float], *, resamples: int = RESAMPLES
) -> PairedIntervals:
    """Of two models' scores on the same rows, in the same order, each from 0 to 1."""
    pairs = np.stack([np.asarray(base, np.float64), np.asarray(tuned, np.float64)], axis=1)
    means = _resampled_means(pairs, resamples)
    differences = pairs[:, 1] - pairs[:, 0]
    return PairedIntervals(
        _interval(pairs[:, 0], means[:, 0], 0.0),
        _interval(pairs[:, 1], means[:, 1], 0.0),
        _interval(differences, means[:, 1] - means[:, 0], -1.0),
        int(np.count_nonzero(differences)),
    )


def _resampled_means(values: np.ndarray, resamples: int) -> np.ndarray:
    """Means over rows drawn with replacement: [n, k] values -> [resamples, k]."""
    count = len(values)
    rng = np.random.default_rng(SEED)
    # So many draws at once that their memory is bounded.
    at_once = max(1, _DRAWS // count)
    means = np.empty((resamples, values.shape[1]))
    for first in range(0, resamples, at_once):
        last = min(first + at_once, resamples)
        # The same rows for all columns: both models are resampled together.
        rows = rng.integers(count, size=(last - first, count), dtype=np.int64)
        for column in range(values.shape[1]):
            means[first:last, column] = values[rows, column].mean(axis=1)
    return means


def _interval(values: np.ndarray, means: np.ndarray, lowest: float) -> Interval:
    """`lowest`: the least value there can be; the greatest is 1."""
    mean = float(values.mean())
    if values.min() == values.max():
        # Rows with another value are at most so rare that none among these is no surprise.
        share = TAIL ** (1 / len(values))
        return Interval(mean, share * mean + (1 - share) * lowest, share * mean + (1 - share) * 1.0)
    tail = expanded_tail(len(values))
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean, float(low), float(high))


def expanded_tail(count: int) -> float:
    """The share of resampled means beyond each end of the interval: 2.5 % for many rows, less for
    few."""
    normal = NormalDist()
    z = normal.inv_cdf(1 - TAIL)
    freedom = count - 1
    # Student's t from the normal quantile (Abramowitz and Stegun 26.7.5)
    t = z
    t += (z**3 + z) / (4 * freedom)
    t += (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return normal.cdf(-t * math.sqrt(count / freedom))


def difference_sentence(
    name: str, intervals: PairedIntervals, rows: int, *, higher_is_better: bool = True
) -> str:
    """One sentence: whether the tuned model is better, worse, or not told apart from its base."""
    difference = intervals.difference
    span = (
        f"{points(difference.mean)} points, 95 % interval "
        f"{points(difference.low)} to {points(difference.high)}"
    )
    noun = "row" if rows == 1 else "rows"
    # The interval does not hold 0.
    is_apart = difference.low > 0 or difference.high < 0
    if is_apart and intervals.differing >= MIN_DIFFERING:
        # A metric may be better where it is lower.
        is_better = (difference.mean > 0) == higher_is_better
        direction = "better" if is_better else "worse"
        return f"{name}: tuned is {direction} than base on these {rows} {noun} ({span})"
    reason = ""
    if is_apart:
        reason = f"; only {intervals.differing} rows differ, which chance alone can do"
    return f"{name}: tuned and base are not told apart by {rows} {noun} ({span}{reason})"


def points(share: float) -> str:
    """A difference of shares in points of a hundred, with its sign."""
    return f"{100 * share:+.1f}"
