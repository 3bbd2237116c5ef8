"""Recipe keys with which a run needs less memory, found by planning the run with each of them."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from tunesmith.config.check import check_run
from tunesmith.config.dump import differences
from tunesmith.config.schema import Run
from tunesmith.errors import UsageError
from tunesmith.runtime.plan import RunPlan, Saving
from tunesmith.units import Size

SHORTEST = 128  # tokens of data.seq_len that is offered; shorter ones cut most answers


def find_savings(run: Run, plan: RunPlan, plan_of: Callable[[Run], RunPlan], *, below: int) -> tuple[Saving, ...]:
    """Changes that bring a run below so many bytes: of each kind the smallest, in the order in which a user would try them.

    Where none does alone, or only training an adapter, the first two or three that do together come last. `plan_of`
    plans a changed recipe; what the recipe's rules refuse is left out.
    """

    def saving(changed: Run) -> Saving | None:
        try:
            check_run(changed, lambda key: "")
        except UsageError:
            return None
        total, changes = plan_of(changed).memory.total, differences(run, changed)
        words = {c.key: c.new if isinstance(c.new, str) else json.dumps(c.new) for c in changes}
        keys = " ".join(f"{key}={shlex.quote(word)}" for key, word in words.items())
        return Saving(keys, total, all(change.allowed for change in changes)) if total <= below else None

    found: list[Saving] = []
    changes = _changes(run, plan)
    for kinds in itertools.chain.from_iterable(itertools.combinations(changes, count) for count in (1, 2, 3)):
        adapter_only = all("adapter.kind" in s.keys for s in found)
        if len(kinds) == 1 or not found or (adapter_only and "adapter" not in kinds):
            tried = map(saving, _variants(run, plan, kinds))
            found += [first] if (first := next(filter(None, tried), None)) else []
    return tuple(found)


def _variants(run: Run, plan: RunPlan, kinds: tuple[str, ...]) -> Iterator[Run]:
    """The recipe with each change of the first kind, and on it each of the next."""
    for changed in _changes(run, plan)[kinds[0]]:
        yield from _variants(changed, plan, kinds[1:]) if kinds[1:] else (changed,)


def _changes(run: Run, plan: RunPlan) -> dict[str, list[Run]]:
    """The recipe with changes of each kind, the smaller ones first; some change nothing."""
    size, seq_len = plan.layout.micro_batch, run.data.seq_len
    # An update in the backward takes the global batch as one micro batch.
    batch = "global_batch" if run.train.optimizer_in_backward else "micro_batch"
    sizes = [Size(n, size.unit) for n in _halves(size.amount, seq_len if size.unit == "tokens" else 1)]

    def train(changed: Run, **keys: Any) -> Run:
        return replace(changed, train=replace(run.train, **keys))

    lora = replace(run, adapter=replace(run.adapter, kind="lora"))
    return {
        "batch": [train(run, **{batch: smaller}) for smaller in sizes],
        "recompute": [train(run, recompute="full")],
        "length": [replace(run, data=replace(run.data, seq_len=n)) for n in _halves(seq_len, SHORTEST)],
        "moments": [train(run, optimizer="adamw-8bit")],
        "masters": [train(run, master_weights="stochastic")],
        "gradients": [train(run, optimizer_in_backward=True, clip_norm=None)],
        "base": [replace(run, model=replace(run.model, quantize="nf4"))],
        "adapter": [train(lora, master_weights="fp32", optimizer_in_backward=False)],
    }


def _halves(amount: int, least: int) -> Iterator[int]:
    while (amount := amount // 2) >= least:
        yield amount
