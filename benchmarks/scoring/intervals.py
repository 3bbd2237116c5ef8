"""Coverage of the 95 % intervals of `eval --score`, and number of rows that show a difference.

    python benchmarks/scoring/intervals.py coverage --json docs/measurements/intervals.json
    python benchmarks/scoring/intervals.py rows       # the table of docs/evaluate.md

Scores are drawn from distributions with known means: right or wrong answers, and fractions such as
the scores f1 and json. The tuned model and the base have equal scores on most rows. All random
generators have fixed seeds.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.metrics.intervals import (
    MIN_DIFFERING,
    Interval,
    PairedIntervals,
    mcnemar_chance,
    mean_interval,
    paired_intervals,
)

# `tunesmith eval` uses 10,000 resamples. With 1,000, the ends of an interval change by about 1 % of
# its width.
RESAMPLES = 1000
Pairs = tuple[np.ndarray, np.ndarray]
COUNTS = (10, 20, 30, 40, 50, 75, 100, 150, 200, 300, 400, 500, 750, 1000, 1500, 2000, 3000, 5000)


@dataclass(frozen=True)
class Draw:
    """A distribution of scores.

    Attributes:
        pairs: draws the scores of the base and of the tuned model for a number of rows.
        mean: true mean of the base's score.
        gain: true mean of the difference, tuned minus base.
    """

    pairs: Callable[[np.random.Generator, int], Pairs]
    mean: float
    gain: float


def binary(rng: np.random.Generator, n: int, base: float, gain: float, differing: float) -> Pairs:
    """Draw right or wrong answers of two models.

    The models differ with probability `differing`. Only the tuned model is right with probability
    (differing + gain) / 2.
    """
    kind = rng.choice(
        4,
        size=n,
        p=np.array(
            [
                (differing + gain) / 2,
                (differing - gain) / 2,
                base - (differing - gain) / 2,
                1 - base - (differing + gain) / 2,
            ]
        ),
    )
    # The kinds are: 0 only the tuned model is right, 1 only the base, 2 both, 3 neither.
    return np.isin(kind, (1, 2)).astype(float), np.isin(kind, (0, 2)).astype(float)


def shares(rng: np.random.Generator, n: int) -> Pairs:
    """Draw fractions such as f1. The tuned model closes half of the gap to 1 in a fifth of rows."""
    base = rng.beta(2, 5, size=n)
    better = rng.random(n) < 0.2
    return base, np.where(better, base + (1 - base) * 0.5, base)


def mostly_right(rng: np.random.Generator, n: int) -> Pairs:
    """Draw fractions of correct JSON fields, most of them 1.

    The base scores 1 in 90 % of the rows. The tuned model corrects half of the other rows, and then
    2 % of all rows get a new score. Few rows differ, but their differences are large.
    """
    base = np.where(rng.random(n) < 0.1, rng.beta(2, 2, size=n), 1.0)
    tuned = np.where((base < 1) & (rng.random(n) < 0.5), 1.0, base)
    return base, np.where(rng.random(n) < 0.02, rng.beta(2, 2, size=n), tuned)


def equally_good(rng: np.random.Generator, n: int) -> Pairs:
    """Draw skewed fractions of two equally good models that differ in 40 % of the rows."""
    base = rng.beta(0.5, 0.2, size=n)
    return base, np.where(rng.random(n) < 0.4, rng.beta(0.5, 0.2, size=n), base)


def right_or_wrong(base: float, gain: float, differing: float) -> Draw:
    return Draw(lambda rng, n: binary(rng, n, base, gain, differing), base, gain)


# True means of `mostly_right`. The mean of beta(2, 2) is 0.5. The base scores 0.9 + 0.1 * 0.5 =
# 0.95. Correcting half of the other rows gives 0.975, and then 2 % of the rows fall to a mean of
# 0.5.
RIGHT_BASE = 0.95
RIGHT_GAIN = 0.98 * 0.975 + 0.02 * 0.5 - RIGHT_BASE
DRAWS = {
    "right or wrong, 10 % and 20 %": right_or_wrong(0.1, 0.1, 0.15),
    "right or wrong, 50 % and 60 %": right_or_wrong(0.5, 0.1, 0.3),
    "right or wrong, 80 % and 85 %": right_or_wrong(0.8, 0.05, 0.15),
    "right or wrong, 90 % and 95 %": right_or_wrong(0.9, 0.05, 0.1),
    "right or wrong, 10 %, no difference": right_or_wrong(0.1, 0.0, 0.1),
    "right or wrong, 50 %, no difference": right_or_wrong(0.5, 0.0, 0.4),
    "right or wrong, 90 %, no difference": right_or_wrong(0.9, 0.0, 0.1),
    "shares, skewed": Draw(shares, 2 / 7, 1 / 14),
    "shares, skewed, no difference": Draw(equally_good, 0.5 / 0.7, 0.0),
    "shares, mostly all right": Draw(mostly_right, RIGHT_BASE, RIGHT_GAIN),
}


def coverage(trials: int) -> Iterator[dict[str, Any]]:
    """Yield for each distribution and number of rows how often the intervals contain the true
    value, and how often the difference is significant.
    """
    for name, draw in DRAWS.items():
        paired = intervals_of_counts if name.startswith("right") else intervals_of
        for n in (25, 50, 100, 400):
            rng = np.random.default_rng(n)
            base_holds = difference_holds = apart = 0
            # Use fewer trials for a bootstrap of 400 rows, which takes long and whose coverage is
            # not in doubt.
            count = trials // 4 if n == 400 and paired is intervals_of else trials
            for _ in range(count):
                base, intervals = paired(*draw.pairs(rng, n))
                base_holds += holds(base, draw.mean)
                difference_holds += holds(intervals.difference, draw.gain)
                apart += intervals.is_apart
            yield {
                "scores": name,
                "rows": n,
                "trials": count,
                "mean_holds": base_holds / count,
                "difference_holds": difference_holds / count,
                "apart": apart / count,
            }


def holds(interval: Interval, value: float) -> bool:
    return interval.low <= value + 1e-12 and value <= interval.high + 1e-12


def intervals_of(base: np.ndarray, tuned: np.ndarray) -> tuple[Interval, PairedIntervals]:
    difference = paired_intervals(base.tolist(), tuned.tolist(), resamples=RESAMPLES)
    return mean_interval(base.tolist(), resamples=RESAMPLES), difference


def intervals_of_counts(base: np.ndarray, tuned: np.ndarray) -> tuple[Interval, PairedIntervals]:
    """Compute the intervals of right or wrong answers.

    They depend only on a few counts, so intervals are cached by these counts.
    """
    rows = len(base)
    won = int((tuned > base).sum())
    lost = int((tuned < base).sum())
    difference = difference_of_counts(won, lost, rows)
    paired = PairedIntervals(difference, won + lost, mcnemar_chance(won, lost), rows)
    return mean_of_count(int(base.sum()), rows), paired


@cache
def mean_of_count(right: int, rows: int) -> Interval:
    return mean_interval([1.0] * right + [0.0] * (rows - right))


@cache
def difference_of_counts(won: int, lost: int, rows: int) -> Interval:
    base = [0.0] * won + [1.0] * (rows - won)
    tuned = [1.0] * (rows - lost) + [0.0] * lost
    return paired_intervals(base, tuned).difference


def power(gain: float, differing: float, rows: int) -> float:
    """Compute the probability that `rows` right or wrong answers show the gain significantly and in
    the right direction.

    The result is exact: a sum over all numbers of rows that differ, and of rows that only the tuned
    model answers correctly.
    """
    share_won = (differing + gain) / 2 / differing
    apart = 0.0
    for count, probability in enumerate(probabilities(rows, differing)):
        # Less probable numbers do not change the result.
        if probability > 1e-9:
            won = probabilities(count, share_won)[won_to_be_apart(count) :]
            apart += float(probability * won.sum())
    return apart


def probabilities(count: int, share: float) -> np.ndarray:
    """Return the binomial probabilities of 0 to `count` successes: fp64 [count + 1].

    Args:
        share: the probability of one success.
    """
    factorials = log_factorials(5001)[: count + 1]
    successes = np.arange(count + 1)
    logs = factorials[-1] - factorials - factorials[::-1] + successes * math.log(share)
    if share == 1:
        return (successes == count).astype(float)
    result: np.ndarray = np.exp(logs + (count - successes) * math.log1p(-share))
    return result


@cache
def log_factorials(count: int) -> np.ndarray:
    return np.array([math.lgamma(number + 1) for number in range(count)])


@cache
def won_to_be_apart(differing: int) -> int:
    """Return the minimum number of won rows with which the tuned model is significantly better.

    A won row is one that only the tuned model answers correctly. Whether Tango's interval excludes
    0 depends only on the rows that differ, as in McNemar's test, and not on the number of all rows.

    Args:
        differing: number of rows in which the models differ.
    """
    for won in range(differing // 2 + 1, differing + 1):
        lost = differing - won
        is_score_apart = won - lost > 1.96 * math.sqrt(differing)
        if differing >= MIN_DIFFERING and is_score_apart and mcnemar_chance(won, lost) < 0.05:
            return won
    return differing + 1


def rows_needed(power_at: Callable[[int], float], *, wanted: float = 0.8) -> int | None:
    """Return the minimum number in COUNTS that reaches the wanted power, or None. Use bisection."""
    low, high = 0, len(COUNTS)
    while low < high:
        middle = (low + high) // 2
        if power_at(COUNTS[middle]) >= wanted:
            high = middle
        else:
            low = middle + 1
    return COUNTS[low] if low < len(COUNTS) else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("coverage", "rows"))
    parser.add_argument("--trials", type=int, default=None)
    parser.add_argument("--json", type=Path, help="file for the coverage")
    args = parser.parse_args()
    if args.what == "coverage":
        trials = args.trials or 2000
        rows = []
        print(
            "| scores | rows | interval of the mean holds | of the difference | told apart |\n"
            "|---|---|---|---|---|"
        )
        for row in coverage(trials):
            rows.append(row)
            cells = [f"{row[key]:.1%}" for key in ("mean_holds", "difference_holds", "apart")]
            print(f"| {row['scores']} | {row['rows']} | {' | '.join(cells)} |", flush=True)
        if args.json:
            command = "python benchmarks/scoring/intervals.py coverage"
            lines = ",\n".join(json.dumps(row) for row in rows)
            args.json.write_text(f'{{"command": "{command}",\n"rows": [\n{lines}\n]}}\n')
        return
    print("| gain | a tenth differs | a fifth | two fifths |\n|---|---|---|---|")
    for gain in (0.20, 0.10, 0.05, 0.02):
        cells = []
        for differing in (0.1, 0.2, 0.4):
            if gain > differing:
                cells.append("–")
                continue
            rows = rows_needed(lambda n, d=differing, g=gain: power(g, d, n))
            cells.append(f"{rows:,}" if rows else f"above {COUNTS[-1]:,}")
        print(f"| {100 * gain:.0f} points | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
