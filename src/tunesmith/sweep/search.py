"""How a sweep spends its steps: successive halving.

It sees candidates through one function alone, and decides by what that returns. So a sweep that was killed is run again:
what is done already returns at once, and all decisions are as before.

Jamieson and Talwalkar 2016, arXiv:1502.07943 (successive halving).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

C = TypeVar("C")
# Unless told otherwise: rungs are at a quarter and at half of the steps, and none before so many updates. Until then losses
# fall by the learning rate, and the highest one leads.
RUNGS, EARLIEST = 2, 8


@dataclass(frozen=True)
class Search:
    """How to search. `rungs`: at how many the worse half stops (None: see `rung_steps`, 0: none does); `candidates`: how many
    to draw from ranges."""

    rungs: int | None = None
    candidates: int = 16


def rung_steps(
    total: int, count: int, interval: int, rungs: int | None = None, warmup: int = 0
) -> list[int]:
    """The steps after which the worse half of `count` candidates stops: r, 2r, 4r, ..., about half of `total`.

    There are `rungs`, or as many as leave one candidate if that is less. None: RUNGS at most, so that two candidates are left
    at the end, none of them before step EARLIEST or before twice the `warmup`. r is a multiple of `interval`, the steps
    from one validation to the next, where it is not shorter than that; 0 for no interval.
    """
    most = math.ceil(math.log2(max(count, 1)))
    halvings = min(RUNGS, most - 1) if rungs is None else min(rungs, most)
    halvings = max(0, min(halvings, int(math.log2(total)))) if total else 0
    first, least = total >> halvings, max(EARLIEST, 2 * warmup) if rungs is None else 1
    first -= first % interval if 0 < interval <= first else 0
    return [step for step in (first << k for k in range(halvings)) if step >= least]


def halve(
    candidates: Sequence[C], rungs: Sequence[int], measure: Callable[[C, int | None], float]
) -> None:
    """Train all for the first rung, the better half for the next one, and so on; those that are left to the end.

    `measure(candidate, step)` trains up to that step (None: to the end) and returns the loss there, infinite where it
    diverged. Of equal ones the earlier is kept.
    """
    left = list(candidates)
    for step in rungs:
        losses = [measure(candidate, step) for candidate in left]
        best = sorted(range(len(left)), key=lambda i: (losses[i], i))[: math.ceil(len(left) / 2)]
        left = [left[i] for i in sorted(best) if losses[i] < math.inf]
    for candidate in left:
        measure(candidate, None)
