"""The search that spends a sweep's steps: successive halving.

It sees candidates through one function alone, and decides by what that returns. So a sweep that
was killed is run again: what is complete returns at once, and all decisions are as before.

Jamieson and Talwalkar 2016, arXiv:1502.07943 (successive halving).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tunesmith.units import ceil_div

C = TypeVar("C")
# The default: rungs at a quarter and at half of the steps.
RUNGS = 2
# And none before so many updates: until then losses fall by the learning rate, and the highest one
# leads.
EARLIEST = 8


@dataclass(frozen=True)
class Search:
    """The settings of a search.

    Attributes:
        rungs: at how many the worse half stops; None: see `rung_steps`, 0: none stops.
        candidates: how many to draw from ranges.
    """

    rungs: int | None = None
    candidates: int = 16


def rung_steps(
    total: int, count: int, interval: int, rungs: int | None = None, warmup: int = 0
) -> list[int]:
    """The steps after which the worse half of `count` candidates stops.

    They are r, 2r, 4r, ..., about half of `total`.

    There are `rungs`, or as many as leave one candidate if that is less. None: RUNGS at most, so
    that two candidates are left at the end, none of them before step EARLIEST or before twice the
    `warmup`. r is a multiple of `interval`, the steps from one validation to the next, where it is
    not shorter than that; 0 for no interval.
    """
    if not total:
        return []
    halvings_to_one = math.ceil(math.log2(max(count, 1)))
    if rungs is None:
        halvings = min(RUNGS, halvings_to_one - 1)
        # A candidate that has just warmed up tells little.
        earliest = max(EARLIEST, 2 * warmup)
    else:
        halvings = min(rungs, halvings_to_one)
        earliest = 1
    halvings = max(0, min(halvings, int(math.log2(total))))
    # Each rung is twice the last one, and the end twice the last rung.
    first = total >> halvings
    # On a step at which the recipe validates anyway.
    if 0 < interval <= first:
        first -= first % interval
    steps = [first << k for k in range(halvings)]
    return [step for step in steps if step >= earliest]


def halve(
    candidates: Sequence[C], rungs: Sequence[int], measure: Callable[[C, int | None], float]
) -> None:
    """Train all for the first rung, the better half for the next one, and the last ones to the end.

    `measure(candidate, step)` trains up to that step (None: to the end) and returns the loss there,
    infinite where it diverged. Of equal ones the earlier goes on.
    """
    remaining = list(candidates)
    for step in rungs:
        losses = [measure(candidate, step) for candidate in remaining]
        ranking = sorted(range(len(remaining)), key=losses.__getitem__)
        best = sorted(ranking[: ceil_div(len(remaining), 2)])
        remaining = [remaining[i] for i in best if losses[i] < math.inf]
    for candidate in remaining:
        measure(candidate, None)
