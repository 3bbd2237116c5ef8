"""Computation of 95 % confidence intervals of means over rows, and sentences that describe them.

Right or wrong (scores of 0 and 1)
    The mean is the fraction of right rows. Its interval is Clopper and Pearson's with mid-p
    (Lancaster 1961; Agresti and Gottard 2005). The difference of two models is a difference of
    paired fractions. Its interval is Tango's score interval (1998), together with McNemar's mid-p
    test, as Fagerland, Lydersen and Laake recommend (2014, "Recommended tests and confidence
    intervals for paired binomial proportions"). A bootstrap is not used: with few rows, its means
    have only few different values, and an outcome that no row has shown never occurs.

Fractions (f1, fields of a JSON)
    The interval is that of a paired bootstrap. Rows are drawn with replacement, the same rows for
    both models, so that rows that are difficult for both do not widen the interval of the
    difference. The percentiles are farther out than 2.5 and 97.5, because with few rows these two
    would give a too narrow interval (Hesterberg 2015, "What Teachers Should Know About the
    Bootstrap", expanded percentile interval). The interval is at least as wide as Student's
    interval, because if only few rows differ, nearly every resample has the same sign.

Losses
    The mean is over tokens, but rows are the sample, because the tokens of one row are easy or
    difficult together. The difference of two models is a ratio of sums over rows, with Student's
    interval (Cochran 1977, "Sampling Techniques", 6.4).

If all values are equal, all resamples are equal, so a bootstrap gives no interval. The interval is
then derived from the maximum fraction of rows with other values (Clopper-Pearson). The seed is
fixed, so the same scores give the same interval on every machine.

`scipy.stats` has the distributions and the bootstrap. The functions import it, because its import
is slow and most commands compute no interval. It has no mid-p interval and none of Tango's, so this
module computes these two.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from tunesmith.units import count_of

RESAMPLES = 10_000
SEED = 20_240_607
TAIL_PROBABILITY = 0.025  # probability beyond each end of a 95 % interval
# Minimum number of rows with different scores that can show a significant difference at 5 %. If two
# models are equally good, five such rows all favor the same model with probability 1/16, and six
# rows with probability 1/32.
MIN_DIFFERING = 6
# Maximum number of row indices that are drawn in one step. They take 32 MiB, and the values of
# these rows take another 32 MiB.
DRAWS_AT_ONCE = 1 << 22


class Interval(NamedTuple):
    """A mean and the ends of its 95 % confidence interval. The ends are infinite if too few rows
    differ for an interval.
    """

    mean: float
    low: float
    high: float

    @property
    def has_zero(self) -> bool:
        return self.low <= 0 <= self.high


class PairedIntervals(NamedTuple):
    """The difference of two models on the same rows, with its interval.

    Attributes:
        difference: score of the second model minus score of the first, or the same for losses in
            nats per token.
        differing: number of rows with different scores or losses.
        chance: p-value of McNemar's mid-p test. This is the probability that two equally good
            models give a result that favors one of them at least as clearly. None for losses, and
            for scores other than 0 and 1.
        rows: number of rows. For losses, only rows with supervised tokens count.
    """

    difference: Interval
    differing: int
    chance: float | None
    rows: int

    @property
    def is_apart(self) -> bool:
        """Return whether the difference is significant at the 5 % level."""
        if self.difference.has_zero or self.differing < MIN_DIFFERING:
            return False
        # For equally good models, the score interval excludes 0 in up to 5.4 % of evaluations.
        # Therefore McNemar's test must be significant too.
        return self.chance is None or self.chance < 2 * TAIL_PROBABILITY


def mean_interval(scores: Sequence[float], *, resamples: int = RESAMPLES) -> Interval:
    """Compute the mean and its interval for the scores of one model.

    Scores outside 0 to 1, such as rewards, have no limits.
    """
    values = np.asarray(scores, np.float64)
    if _is_right_or_wrong(values) and np.ptp(values):
        return share_interval(int(values.sum()), len(values))
    is_limited = values.min() >= 0 and values.max() <= 1
    limits = (0.0, 1.0) if is_limited else (-math.inf, math.inf)
    return _interval(values, limits, resamples)


def paired_intervals(
    base: Sequence[float], tuned: Sequence[float], *, resamples: int = RESAMPLES
) -> PairedIntervals:
    """Compare two models' scores on the same rows, in the same order. Scores are from 0 to 1."""
    pairs = np.stack([np.asarray(base, np.float64), np.asarray(tuned, np.float64)], axis=1)
    differences = pairs[:, 1] - pairs[:, 0]
    differing = int(np.count_nonzero(differences))

    won = int((differences > 0).sum())
    lost = differing - won
    chance = mcnemar_chance(won, lost) if _is_right_or_wrong(pairs) else None

    if chance is not None and np.ptp(differences):
        difference = paired_share_interval(won, lost, len(pairs))
    else:
        difference = _interval(differences, (-1.0, 1.0), resamples)
    return PairedIntervals(difference, differing, chance, len(pairs))


def _is_right_or_wrong(values: np.ndarray) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _interval(values: np.ndarray, limits: tuple[float, float], resamples: int) -> Interval:
    """Compute the mean and its interval. `limits` are the minimum and maximum possible values."""
    lowest, highest = limits
    if np.ptp(values):
        return _bootstrap_interval(values, limits, resamples)
    # If all values are equal, all resamples are equal too, so a bootstrap gives no interval. The
    # sample shows only that other values are rare. `share` is the lower limit of the true fraction
    # of rows that have the value of the sample. If the fraction is lower, the probability of a
    # sample with only this value is below 2.5 %.
    mean = float(values.mean())
    share = TAIL_PROBABILITY ** (1 / len(values))
    return Interval(mean, share * mean + (1 - share) * lowest, share * mean + (1 - share) * highest)


def share_interval(right: int, rows: int) -> Interval:
    """Compute Clopper and Pearson's interval of a fraction with mid-p."""
    low = _root(lambda share: 1 - TAIL_PROBABILITY - _mid_p(right, rows, share), 0.0, 1.0)
    high = _root(lambda share: TAIL_PROBABILITY - _mid_p(right, rows, share), 0.0, 1.0)
    return Interval(right / rows, low, high)


def paired_share_interval(won: int, lost: int, rows: int) -> Interval:
    """Compute Tango's score interval of (won - lost) / rows.

    The interval contains each difference d that is at most 1.96 standard errors from the observed
    difference. The standard error is computed under the assumption that d is the true difference.
    """
    z = NormalDist().inv_cdf(1 - TAIL_PROBABILITY)
    net = won - lost
    mean = net / rows

    def distance(difference: float) -> float:
        """Return how many standard errors `difference` is from the observed difference."""
        # If `difference` is the true one, the maximum-likelihood fraction x of lost rows is a root
        # of 2 rows x^2 + linear x - lost difference (1 - difference).
        linear = (2 * rows - won + lost) * difference - won - lost
        discriminant = linear**2 + 8 * rows * (lost * difference * (1 - difference))
        root = math.sqrt(max(discriminant, 0.0))
        share_lost = (root - linear) / (4 * rows)
        variance = rows * (2 * share_lost + difference * (1 - difference))
        # For a difference of -1 or 1 the variance is 0, because all rows are lost or all are won.
        return (net - rows * difference) / math.sqrt(max(variance, 1e-12))

    low = _root(lambda difference: z - distance(difference), -1.0, mean)
    high = _root(lambda difference: -z - distance(difference), mean, 1.0)
    return Interval(mean, low, high)


def mcnemar_chance(won: int, lost: int) -> float:
    """Compute the p-value of McNemar's mid-p test.

    This is the probability that two equally good models give a result that favors one of them at
    least as clearly.
    """
    if won == lost:
        return 1.0
    return 2 * _mid_p(min(won, lost), won + lost, 0.5)


def _mid_p(successes: int, count: int, share: float) -> float:
    """Return the binomial probability of fewer than `successes` successes, plus half the
    probability of exactly `successes`.
    """
    from scipy.stats import binom

    binomial = binom(count, share)
    return float(binomial.cdf(successes) - binomial.pmf(successes) / 2)


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    """Find the root of an increasing function by bisection, up to floating-point precision."""
    for _ in range(50):
        middle = (low + high) / 2
        if rising(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _bootstrap_interval(
    values: np.ndarray, limits: tuple[float, float], resamples: int
) -> Interval:
    """Compute the bootstrap interval of a mean with expanded percentiles.

    The interval is at least as wide as Student's interval on each side.

    Args:
        values: [rows], not all equal.
        limits: minimum and maximum possible values.
    """
    from scipy.stats import bootstrap, sem, t

    count = len(values)
    # The fixed seed draws the same rows in every call, so the intervals of two models and of their
    # difference use the same resamples.
    resampled = bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, DRAWS_AT_ONCE // count),
        confidence_level=1 - 2 * expanded_tail(count),
        method="percentile",
        rng=SEED,
    ).confidence_interval
    mean = float(values.mean())
    students = t.interval(1 - 2 * TAIL_PROBABILITY, count - 1, mean, sem(values))
    # Student's interval can exceed the range of the scores, so limit it.
    students_low, students_high = np.clip(students, *limits)
    low = min(resampled.low, students_low)
    high = max(resampled.high, students_high)
    return Interval(mean, float(low), float(high))


def expanded_tail(count: int) -> float:
    """Return the fraction of resampled means beyond each end of the interval.

    The fraction is close to 2.5 % if `count`, the number of rows, is large. It is smaller for few
    rows.
    """
    from scipy.stats import norm, t

    quantile = t.ppf(1 - TAIL_PROBABILITY, count - 1)
    return float(norm.cdf(-quantile * math.sqrt(count / (count - 1))))


def paired_losses(
    first: Sequence[float], second: Sequence[float], tokens: Sequence[int]
) -> PairedIntervals:
    """Compute the difference of two models' losses, with its interval.

    Args:
        first, second: loss of each row in nats, summed over its supervised tokens.
        tokens: number of supervised tokens of each row.
    """
    counts = np.asarray(tokens, np.float64)
    has_tokens = counts > 0
    counts = counts[has_tokens]
    differences = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    differences = differences[has_tokens]
    rows = len(counts)
    differing = int(np.count_nonzero(differences))
    total_tokens = float(counts.sum())
    mean = float(differences.sum()) / total_tokens if rows else math.nan

    interval = Interval(mean, -math.inf, math.inf)
    # A mean that is not finite has no interval.
    if differing >= MIN_DIFFERING and math.isfinite(mean):
        from scipy.stats import t

        residuals = differences - mean * counts
        squares = float((residuals**2).sum())
        error = math.sqrt(squares * rows / (rows - 1)) / total_tokens
        low, high = t.interval(1 - 2 * TAIL_PROBABILITY, rows - 1, mean, error)
        interval = Interval(mean, float(low), float(high))
    return PairedIntervals(interval, differing, None, rows)


def difference_sentence(
    name: str, found: PairedIntervals, *, first: str = "base", second: str = "tuned"
) -> str:
    """Return a sentence that says whether the second model is significantly better or worse.

    Args:
        name: the scorer, or `loss`.
    """
    rows = count_of(found.rows, "row")
    scale, digits, unit = (1, 4, "nats per token") if name == "loss" else (100, 1, "points")
    mean, low, high = (scale * value for value in found.difference)
    if not math.isfinite(mean):
        return f"{name}: {second} cannot be compared with {first}: a loss is not finite"
    figures = f"{mean:+.{digits}f} {unit}"
    if math.isfinite(low):
        figures += f", 95 % interval {low:+.{digits}f} to {high:+.{digits}f}"
    if found.is_apart:
        is_better = mean < 0 if name == "loss" else mean > 0
        direction = "better" if is_better else "worse"
        return f"{name}: {second} is {direction} than {first} on these {rows} ({figures})"
    if found.differing < MIN_DIFFERING:
        figures += f"; different rows: {found.differing}, but at least {MIN_DIFFERING} are needed"
    elif found.chance is not None and not found.difference.has_zero:
        figures += f"; chance alone causes such a difference in {found.chance:.1%} of evaluations"
    return f"{name}: no significant difference between {second} and {first} on {rows} ({figures})"
