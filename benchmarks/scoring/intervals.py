"""How often the 95 % intervals of `eval --score` hold, and how many rows tell two models apart.

    python benchmarks/scoring/intervals.py coverage   # of mean and difference: 93 to 97 %
    python benchmarks/scoring/intervals.py rows       # the table of docs/evaluate.md

Scores are drawn from models whose true means are known: right or wrong answers, and shares as f1
gives them. Everything is seeded.
"""

import argparse
from collections.abc import Callable

import numpy as np

from tunesmith.scoring.intervals import MIN_DIFFERING, paired_intervals

# The product takes 10,000: fewer move the ends by a hundredth of the width or so.
RESAMPLES = {"coverage": 4000, "rows": 1000}
Pairs = tuple[np.ndarray, np.ndarray]
COUNTS = (10, 20, 30, 40, 50, 75, 100, 150, 200, 300, 400, 500, 750, 1000, 1500, 2000, 3000, 5000)


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


DRAWS = {
    "right or wrong, 50 % and 60 %": (lambda rng, n: binary(rng, n, 0.5, 0.1, 0.3), 0.5, 0.1),
    "right or wrong, 80 % and 85 %": (lambda rng, n: binary(rng, n, 0.8, 0.05, 0.15), 0.8, 0.05),
    "right or wrong, no difference": (lambda rng, n: binary(rng, n, 0.6, 0.0, 0.2), 0.6, 0.0),
    "shares, skewed": (shares, 2 / 7, 1 / 14),
}


def coverage(trials: int) -> dict[tuple[str, int], tuple[float, float, float]]:
    """How often the intervals of base and difference hold the true value, and the sentence says a
    difference, by draw and rows."""
    results = {}
    for name, (draw, mean, gain) in DRAWS.items():
        for n in (25, 50, 100, 400):
            rng = np.random.default_rng(n)
            base_holds = difference_holds = apart = 0
            for _ in range(trials):
                base, tuned = draw(rng, n)
                intervals = paired_intervals(base, tuned, resamples=RESAMPLES["coverage"])
                base_holds += (
                    intervals.base.low <= mean + 1e-12 and mean <= intervals.base.high + 1e-12
                )
                low, high = intervals.difference.low, intervals.difference.high
                difference_holds += low <= gain + 1e-12 and gain <= high + 1e-12
                apart += (low > 0 or high < 0) and intervals.differing >= MIN_DIFFERING
            results[name, n] = (base_holds / trials, difference_holds / trials, apart / trials)
    return results


def power(gain: float, differing: float, rows: int, trials: int) -> float:
    """How often `rows` rows tell a gain apart in the right direction."""
    rng = np.random.default_rng(rows)
    apart = 0
    for _ in range(trials):
        base, tuned = binary(rng, rows, 0.5, gain, differing)
        intervals = paired_intervals(base, tuned, resamples=RESAMPLES["rows"])
        apart += intervals.difference.low > 0 and intervals.differing >= MIN_DIFFERING
    return apart / trials


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
    args = parser.parse_args()
    if args.what == "coverage":
        print(
            "| scores | rows | interval of the mean holds | of the difference | told apart |\n|---|---|---|---|---|"
        )
        for (name, n), (base, difference, apart) in coverage(args.trials or 4000).items():
            print(f"| {name} | {n} | {base:.1%} | {difference:.1%} | {apart:.1%} |", flush=True)
        return
    print("| gain | a tenth differs | a fifth | two fifths |\n|---|---|---|---|")
    for gain in (0.20, 0.10, 0.05, 0.02):
        cells = []
        for differing in (0.1, 0.2, 0.4):
            if gain > differing:
                cells.append("–")
                continue
            rows = rows_needed(lambda n, d=differing, g=gain: power(g, d, n, args.trials or 200))
            cells.append(f"{rows:,}" if rows else f"above {COUNTS[-1]:,}")
        print(f"| {100 * gain:.0f} points | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
