"""How a sweep spends its steps: successive halving over listed candidates, Optuna over ranges.

Both see candidates through two functions alone, and decide by what these return. So a sweep that was killed is run again:
what is done already returns at once, and all decisions are as before.

Jamieson and Talwalkar 2016, arXiv:1502.07943 (successive halving); Li et al. 2020, arXiv:1810.05934 (its form for
candidates that come one after the other); Akiba et al. 2019, arXiv:1907.10902 (Optuna).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tunesmith import packages
from tunesmith.sweep.space import Space

C = TypeVar("C")
SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler"}
PRUNERS = {"halving": "SuccessiveHalvingPruner", "hyperband": "HyperbandPruner", "median": "MedianPruner"}
# Unless told otherwise: rungs are at a quarter and at half of the steps, and none before so many updates. Until then losses
# fall by the learning rate, and the highest one leads.
RUNGS, EARLIEST = 2, 8


@dataclass(frozen=True)
class Search:
    """How to search. `rungs`: at how many the worse half stops (None: see `rung_steps`, 0: none does); `candidates`: how many
    to draw from ranges."""

    rungs: int | None = None
    candidates: int = 16
    sampler: str = "tpe"
    pruner: str = "halving"


def rung_steps(total: int, count: int, interval: int, rungs: int | None = None, warmup: int = 0) -> list[int]:
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


def halve(candidates: Sequence[C], rungs: Sequence[int], measure: Callable[[C, int | None], float]) -> None:
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


def sample(
    space: Space,
    search: Search,
    rungs: Sequence[int],
    *,
    seed: int,
    make: Callable[[dict[str, str]], C],
    measure: Callable[[C, int | None], float],
) -> None:
    """Draw candidates one after the other by Optuna's sampler; its pruner stops one after a rung.

    `make` turns values by key into a candidate; `measure` is as for `halve`.
    """
    packages.require("optuna", where="key=LOW..HIGH", fix="list values: key=a,b,c")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = vars(optuna.samplers)[SAMPLERS[search.sampler]](seed=seed)
    # Rungs are counted 1, 2, 4, ..., as its halving expects them.
    limits = {"min_resource": 1, "reduction_factor": 2} if search.pruner in ("halving", "hyperband") else {}
    pruner = vars(optuna.pruners)[PRUNERS[search.pruner]](**limits)
    study = optuna.create_study(sampler=sampler, pruner=pruner, study_name="sweep")  # the name seeds Hyperband
    for _ in range(search.candidates):
        trial = study.ask()
        values = {key: str(trial.suggest_categorical(key, listed)) for key, listed in space.choices.items()}
        for key, (low, high, whole) in space.ranges.items():
            draw, log = trial.suggest_int if whole else trial.suggest_float, space.ranges[key].log
            values[key] = f"{draw(key, low, high, log=log):{'d' if whole else '.4g'}}"
        candidate = make(values)
        for number, step in enumerate([*rungs, None]):
            loss = measure(candidate, step)
            trial.report(loss, 2**number)
            pruned = loss == math.inf or (step is not None and trial.should_prune())
            if pruned:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, loss)
