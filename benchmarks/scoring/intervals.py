"""How often the 95 % intervals of `eval --score` hold, and how many rows tell two models apart.

    python benchmarks/scoring/intervals.py coverage --json docs/measurements/intervals.json
    python benchmarks/scoring/intervals.py rows       # the table of docs/evaluate.md

Scores are drawn from models whose true means are known: right or wrong answers, and shares as f1 and
json give them; tuned and base agree on most rows. Everything is seeded.
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

# The product takes 10,000: fewer move the ends by a hundredth of the width or so.
RESAMPLES = 1000
Pairs = tuple[np.ndarray, np.ndarray]
COUNTS = (10, 20, 30, 40, 50, 75, 100, 150, 200, 300, 400, 500, 750, 1000, 1500, 2000, 3000, 5000)


@dataclass(frozen=True)
class Draw:
    """Scores of base and tuned, the mean of the base's and of their difference."""

    pairs: Callable[[np.random.Generator, int], Pairs]
    mean: float
    gain: float


def binary(rng: np.random.Generator, n: int, base: float, gain: float, differing: float) -> Pairs:
    """Right or wrong answers of two models; they differ on a share `differing` of the rows, of
    which (differing + gain) / 2 are won."""
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
    # won, lost, both right, both wrong
    return np.isin(kind, (1, 2)).astype(float), np.isin(kind, (0, 2)).astype(float)


def shares(rng: np.random.Generator, n: int) -> Pairs:
    """Shares as f1 gives them: the tuned model closes half of the gap to 1 on a fifth of the rows."""
    base = rng.beta(2, 5, size=n)
    better = rng.random(n) < 0.2
    return base, np.where(better, base + (1 - base) * 0.5, base)


def mostly_right(rng: np.random.Generator, n: int) -> Pairs:
    """Fields of a JSON: nine of ten rows are all right, and the tuned model mends half of the
    others and spoils 2 % of all. Few rows differ, and those by much."""
    base = np.where(rng.random(n) < 0.1, rng.beta(2, 2, size=n), 1.0)
    tuned = np.where((base < 1) & (rng.random(n) < 0.5), 1.0, base)
    return base, np.where(rng.random(n) < 0.02, rng.beta(2, 2, size=n), tuned)


def equally_good(rng: np.random.Generator, n: int) -> Pairs:
    """Skewed shares of two models that are equally good and differ on two of five rows."""
    base = rng.beta(0.5, 0.2, size=n)
    return base, np.where(rng.random(n) < 0.4, rng.beta(0.5, 0.2, size=n), base)


def right_or_wrong(base: float, gain: float, differing: float) -> Draw:
    return Draw(lambda rng, n: binary(rng, n, base, gain, differing), base, gain)


# The means of `mostly_right`: of beta(2, 2) it is a half. Of all rows 5 % are mended, and 2 % then
# fall from what they are to a half.
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
    """How often the intervals of base and difference hold the true value, and the sentence says a
    difference, by draw and rows."""
    for name, draw in DRAWS.items():
        paired = intervals_of_counts if name.startswith("right") else intervals_of
        for n in (25, 50, 100, 400):
            rng = np.random.default_rng(n)
            base_holds = difference_holds = apart = 0
            # A bootstrap of 400 rows takes long, and is no question there.
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
    """Those of right or wrong answers, whose few outcomes are computed once."""
    rows = len(base)
    won = int((tuned > base).sum())
    lost = int((tuned < base).sum())
    difference = difference_of_counts(won, lost, rows)
    paired = PairedIntervals(difference, won + lost, mcnemar_chance(won, lost))
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
    """How often `rows` rows of right or wrong answers tell a gain apart in the right direction:
    exactly, over all numbers of rows that differ and are won."""
    share_won = (differing + gain) / 2 / differing
    apart = 0.0
    for count, probability in enumerate(probabilities(rows, differing)):
        # Rarer numbers of rows make no difference.
        if probability > 1e-9:
            won = probabilities(count, share_won)[won_to_be_apart(count) :]
            apart += float(probability * won.sum())
    return apart


def probabilities(count: int, share: float) -> np.ndarray:
    """Of 0 to `count` successes: fp64 [count + 1]."""
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
    """The least number of won rows among those that differ with which the tuned model is better.

    Tango's interval leaves out 0 where McNemar's test does, whatever the number of all rows.
    """
    for won in range(differing // 2 + 1, differing + 1):
        lost = differing - won
        is_score_apart = won - lost > 1.96 * math.sqrt(differing)
        if differing >= MIN_DIFFERING and is_score_apart and mcnemar_chance(won, lost) < 0.05:
            return won
    return differing + 1


def rows_needed(power_at: Callable[[int], float], *, wanted: float = 0.8) -> int | None:
    """The first of COUNTS that reaches the power, by bisection."""
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
    parser.add_argument("--json", type=Path, help="where the coverage is written")
    args = parser.parse_args()
    if args.what == "coverage":
        trials = args.trials or 2000
        rows = []
        print(
            "| scores | rows | interval of the mean holds | of the difference | told apart |\n|---|---|---|---|---|"
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
