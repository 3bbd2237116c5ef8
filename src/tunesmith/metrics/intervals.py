"""The trust that a mean over rows deserves: 95 % intervals and a sentence.

Right or wrong (scores of 0 and 1)
    A mean is a share of right rows: Clopper and Pearson's interval with mid-p (Lancaster 1961;
    Agresti and Gottard 2005). A difference is that of two paired shares: Tango's score interval
    (1998), and McNemar's mid-p test beside it, as Fagerland, Lydersen and Laake recommend (2014,
    "Recommended tests and confidence intervals for paired binomial proportions"). A bootstrap of
    such scores takes few values, and leaves out what no row among few has shown.
Shares (f1, fields of a JSON)
    A paired bootstrap: rows are drawn again with replacement, for both models the same ones, so
    that what makes a row hard for both does not blur their difference. Its percentiles are further
    out than 2.5 and 97.5: with few rows the bootstrap's are too narrow (Hesterberg 2015, "What
    Teachers Should Know About the Bootstrap", expanded percentile interval). An end is at least as
    far out as Student's: where few rows differ at all, nearly every resample has them on one side.

Losses
    A mean over tokens, whose rows are the sample: tokens of a row are easy or hard together. The
    difference of two such means is a ratio of sums over rows, and its interval Student's (Cochran
    1977, "Sampling Techniques", 6.4).

Where all values are equal no resample differs, and the interval is that of the share of such rows
(Clopper-Pearson). The seed is fixed: the same scores give the same interval, on any machine.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from tunesmith.units import count_of

RESAMPLES = 10_000
SEED = 20_240_607
TAIL_PROBABILITY = 0.025  # beyond each end of a 95 % interval
# Five rows that differ all point one way once in 16 times by chance, six once in 32.
MIN_DIFFERING = 6
# DRAWS_AT_ONCE are 32 MiB of row numbers, and as much of what they pick.
RESAMPLES_AT_ONCE = 100
DRAWS_AT_ONCE = 1 << 22


class Interval(NamedTuple):
    """A mean and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


class PairedIntervals(NamedTuple):
    """The difference of two models on the same rows, with its interval.

    Attributes:
        difference: tuned less base.
        differing: rows on which their scores are not equal.
        chance: of right or wrong answers, how often as many of the differing rows point one way
            where both models are equally good (McNemar's mid-p); None of other scores.
    """

    difference: Interval
    differing: int
    chance: float | None

    @property
    def is_apart(self) -> bool:
        """Tell whether the difference is more than chance does in 5 of 100 evaluations."""
        holds_zero = self.difference.low <= 0 <= self.difference.high
        if holds_zero or self.differing < MIN_DIFFERING:
            return False
        # At the edge the score interval leaves out 0 in up to 5.4 % of evaluations.
        return self.chance is None or self.chance < 2 * TAIL_PROBABILITY


def mean_interval(scores: Sequence[float], *, resamples: int = RESAMPLES) -> Interval:
    """Compute the interval of one model's scores, each from 0 to 1."""
    values = np.asarray(scores, np.float64)
    if _is_constant(values):
        return _constant_interval(values, 0.0)
    if _is_right_or_wrong(values):
        return share_interval(int(values.sum()), len(values))
    return _bootstrap_interval(values, 0.0, resamples)


def paired_intervals(
    base: Sequence[float], tuned: Sequence[float], *, resamples: int = RESAMPLES
) -> PairedIntervals:
    """Compare two models' scores on the same rows, in the same order, each from 0 to 1."""
    pairs = np.stack([np.asarray(base, np.float64), np.asarray(tuned, np.float64)], axis=1)
    differences = pairs[:, 1] - pairs[:, 0]
    differing = int(np.count_nonzero(differences))
    chance = None
    if _is_right_or_wrong(pairs):
        won = int((differences > 0).sum())
        chance = mcnemar_chance(won, differing - won)
        difference = paired_share_interval(won, differing - won, len(pairs))
    else:
        difference = _bootstrap_interval(differences, -1.0, resamples)
    # All values are equal: that other ones are rare is all that they tell.
    if _is_constant(differences):
        difference = _constant_interval(differences, -1.0)
    return PairedIntervals(difference, differing, chance)


def _is_constant(values: np.ndarray) -> bool:
    return bool(values.min() == values.max())


def _is_right_or_wrong(values: np.ndarray) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _constant_interval(values: np.ndarray, lowest: float) -> Interval:
    """Bound the mean of equal values. `lowest`: the least value there can be; the greatest is 1."""
    mean = float(values.mean())
    # Rows with another value are at most so rare that none among these is no surprise.
    share = TAIL_PROBABILITY ** (1 / len(values))
    return Interval(mean, share * mean + (1 - share) * lowest, share * mean + (1 - share) * 1.0)


def share_interval(right: int, rows: int) -> Interval:
    """Clopper and Pearson's interval of a share with mid-p."""
    low = _root(lambda share: 1 - TAIL_PROBABILITY - _mid_p(right, rows, share), 0.0, 1.0)
    high = _root(lambda share: TAIL_PROBABILITY - _mid_p(right, rows, share), 0.0, 1.0)
    return Interval(right / rows, low, high)


def paired_share_interval(won: int, lost: int, rows: int) -> Interval:
    """Tango's score interval of (won - lost) / rows: the differences that the data are no more than
    1.96 standard errors from, the error computed as if each were the true one.
    """
    z = NormalDist().inv_cdf(1 - TAIL_PROBABILITY)
    mean = (won - lost) / rows

    def distance(difference: float) -> float:
        """Measure how far the data are from a difference, in standard errors."""
        # The most likely share of lost rows under this difference is a root of
        # 2 rows x^2 + linear x - lost difference (1 - difference).
        linear = (2 * rows - won + lost) * difference - won - lost
        constant = lost * difference * (1 - difference)
        root = math.sqrt(max(linear**2 + 8 * rows * constant, 0.0))
        share_lost = (root - linear) / (4 * rows)
        variance = rows * (2 * share_lost + difference * (1 - difference))
        # At -1 and 1 all rows are lost or won: there is no spread.
        return (won - lost - rows * difference) / math.sqrt(max(variance, 1e-12))

    low = _root(lambda difference: z - distance(difference), -1.0, mean)
    high = _root(lambda difference: -z - distance(difference), mean, 1.0)
    return Interval(mean, low, high)


def mcnemar_chance(won: int, lost: int) -> float:
    """McNemar's mid-p: how often equally good models differ as one-sidedly on as many rows."""
    if won == lost:
        return 1.0
    return 2 * _mid_p(min(won, lost), won + lost, 0.5)


def _mid_p(successes: int, count: int, share: float) -> float:
    """The probability of fewer successes of `count`; as many count half."""
    # It takes a sixth of a second to load, which who only reads a run does not need.
    from scipy.special import bdtr

    fewer = bdtr(successes - 1, count, share) if successes else 0.0
    return float(fewer + bdtr(successes, count, share)) / 2


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    """Find where a rising function is 0, by bisection to the last bits."""
    for _ in range(50):
        middle = (low + high) / 2
        if rising(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _bootstrap_interval(values: np.ndarray, lowest: float, resamples: int) -> Interval:
    """The expanded percentiles of the means over rows drawn with replacement, or Student's ends.

    Args:
        values: [rows], not all equal.
        lowest: the least value there can be; the greatest is 1.
    """
    count = len(values)
    # The same rows for every call: what two models and their difference get is of the same draws.
    rng = np.random.default_rng(SEED)
    at_once = max(1, min(RESAMPLES_AT_ONCE, DRAWS_AT_ONCE // count))
    parts = []
    for first in range(0, resamples, at_once):
        rows = rng.integers(count, size=(min(at_once, resamples - first), count))
        parts.append(values[rows].mean(axis=1))
    tail = expanded_tail(count)
    low, high = np.quantile(np.concatenate(parts), [tail, 1 - tail])
    mean = float(values.mean())
    reach = students_t(count) * float(values.std(ddof=1)) / math.sqrt(count)
    # Student's knows nothing of the ends of the scale.
    return Interval(
        mean,
        min(float(low), max(mean - reach, lowest)),
        max(float(high), min(mean + reach, 1.0)),
    )


def expanded_tail(count: int) -> float:
    """The share of resampled means beyond each end of the interval: 2.5 % for many rows, less for
    few."""
    return NormalDist().cdf(-students_t(count) * math.sqrt(count / (count - 1)))


def students_t(count: int) -> float:
    """The quantile of Student's t that leaves 2.5 % above it, for so many values."""
    from scipy.special import stdtrit

    return float(stdtrit(count - 1, 1 - TAIL_PROBABILITY))


class LossDifference(NamedTuple):
    """The difference of two models' losses on the same rows.

    Attributes:
        rows: those with supervised tokens.
        differing: of them, rows on which the losses are not equal.
        mean: nats per token, the second model's less the first's.
        interval: of the mean; None where fewer than MIN_DIFFERING rows differ.
    """

    rows: int
    differing: int
    mean: float
    interval: Interval | None

    @property
    def is_apart(self) -> bool:
        """Tell whether the difference is more than chance does in 5 of 100 evaluations."""
        return self.interval is not None and not self.interval.low <= 0 <= self.interval.high


def paired_losses(
    first: Sequence[float], second: Sequence[float], tokens: Sequence[int]
) -> LossDifference:
    """The difference of two models' losses, with its interval.

    Args:
        first, second: nats of each row, summed over its supervised tokens.
        tokens: how many these are.
    """
    has_tokens = np.asarray(tokens) > 0
    counts = np.asarray(tokens, np.float64)[has_tokens]
    differences = (np.asarray(second, np.float64) - np.asarray(first, np.float64))[has_tokens]
    rows = len(counts)
    mean = float(differences.sum() / counts.sum()) if rows else math.nan
    differing = int(np.count_nonzero(differences))
    # A loss that is not finite has no interval either.
    if differing < MIN_DIFFERING or not math.isfinite(mean):
        return LossDifference(rows, differing, mean, None)
    residuals = differences - mean * counts
    error = math.sqrt(float((residuals**2).sum()) * rows / (rows - 1)) / float(counts.sum())
    reach = students_t(rows) * error
    return LossDifference(rows, differing, mean, Interval(mean, mean - reach, mean + reach))


def loss_sentence(difference: LossDifference, *, first: str = "base", second: str = "tuned") -> str:
    """One sentence: whether the second model is better or worse by its loss, or its rows do not
    say."""
    rows = count_of(difference.rows, "row")
    if not math.isfinite(difference.mean):
        return f"loss: {second} cannot be compared with {first}: a loss is not finite"
    if difference.interval is None:
        text = f"loss: {second} against {first}: {difference.mean:+.4f} nats per token on {rows}"
        return f"{text}; different rows: {difference.differing} of at least {MIN_DIFFERING} needed"
    low, high = difference.interval.low, difference.interval.high
    figures = f"{difference.mean:+.4f} nats per token, 95 % interval {low:+.4f} to {high:+.4f}"
    if difference.is_apart:
        return _apart("loss", difference.mean < 0, first, second, rows, figures)
    figures += f"; {rows} like these show a difference from about {high - difference.mean:.4f}"
    return _not_apart("loss", first, second, rows, figures)


def _apart(name: str, is_better: bool, first: str, second: str, rows: str, figures: str) -> str:
    direction = "better" if is_better else "worse"
    return f"{name}: {second} is {direction} than {first} on these {rows} ({figures})"


def _not_apart(name: str, first: str, second: str, rows: str, figures: str) -> str:
    return f"{name}: no significant difference between {second} and {first} on {rows} ({figures})"


def difference_sentence(
    name: str,
    intervals: PairedIntervals,
    rows: int,
    *,
    first: str = "base",
    second: str = "tuned",
) -> str:
    """One sentence: whether the second model is better or worse than the first, or the rows do not
    say."""
    difference = intervals.difference
    low, high = points(difference.low), points(difference.high)
    figures = f"{points(difference.mean)} points, 95 % interval {low} to {high}"
    of_rows = count_of(rows, "row")
    if intervals.is_apart:
        return _apart(name, difference.mean > 0, first, second, of_rows, figures)
    if not intervals.differing:
        figures += "; their scores are equal on every row"
    elif intervals.differing < MIN_DIFFERING:
        figures += f"; different rows: only {intervals.differing}, which can be chance"
    elif intervals.chance is not None and not difference.low <= 0 <= difference.high:
        figures += f"; by chance alone this happens in {intervals.chance:.1%} of evaluations"
    return _not_apart(name, first, second, of_rows, figures)


def points(share: float) -> str:
    """A difference of shares in points of a hundred, with its sign."""
    return f"{100 * share:+.1f}"
