"""Recipe keys with which a run needs less memory, found by planning the run with each of them; and where one has no effect."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from tunesmith.config.check import check_run
from tunesmith.config.dump import differences
from tunesmith.config.schema import Run
from tunesmith.errors import MachineError, RecipeError, UsageError
from tunesmith.host.shell import shell_word
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.planning.run_plan import Machine, RunPlan, Saving
from tunesmith.units import Size

# A plan beyond this is refused. Weights, gradients and moments are counted, and the one estimate of activations that was
# compared with a GPU was 1.5 % too small; segments that the allocator cannot fill take a few percent (not measured).
ALLOCATABLE = 0.97
# The share of a CPU's free memory that is planned with: a run's resident memory exceeded the estimate by up to a quarter
# there (docs/plan.md).
USABLE_ON_CPU = 0.8
SHORTEST = 128  # tokens of data.seq_len that is offered; shorter ones cut most answers

Keys = dict[str, Any]  # dotted recipe keys and their new values


def find_savings(
    run: Run, plan: RunPlan, plan_of: Callable[[Run], RunPlan], *, below: int, longest: int
) -> tuple[Saving, ...]:
    """Changes that bring a run below so many bytes: of each kind the smallest, in the order in which a user would try them.

    Where none does alone, the first two or three that do together stand in their place; training an adapter comes last.
    `plan_of` plans a changed recipe; what the recipe's rules refuse is left out. `longest`: tokens of the longest example.
    """

    def smallest(*kinds: list[Keys]) -> list[Saving]:
        """The first change that is enough, made of one change of each kind; empty where there is none."""
        for parts in itertools.product(*kinds):
            changed = _with_keys(run, itertools.chain.from_iterable(part.items() for part in parts))
            try:
                check_run(changed, lambda key: "")
            except UsageError:
                continue
            if (total := plan_of(changed).memory.total) <= below:
                changes = differences(run, changed)
                words = {
                    c.key: c.new if isinstance(c.new, str) else json.dumps(c.new) for c in changes
                }
                keys = " ".join(f"{key}={shell_word(word)}" for key, word in words.items())
                return [Saving(keys, total, all(change.allowed for change in changes))]
        return []

    *changes, adapter = _changes(run, plan, longest)
    found, as_adapter = [saving for kind in changes for saving in smallest(kind)], smallest(adapter)
    if not found:
        kinds = changes if as_adapter else [*changes, adapter]
        together = itertools.chain(
            itertools.combinations(kinds, 2), itertools.combinations(kinds, 3)
        )
        found = next((savings for several in together if (savings := smallest(*several))), [])
    return (*found, *as_adapter)


def _changes(run: Run, plan: RunPlan, longest: int) -> list[list[Keys]]:
    """Changes of a recipe, kind by kind, the smaller ones first; some change nothing. Training an adapter is the last."""
    size, seq_len = plan.layout.micro_batch, run.data.seq_len
    # An update in the backward takes the global batch as one micro batch.
    batch = "train.global_batch" if run.train.optimizer_in_backward else "train.micro_batch"
    least = seq_len if size.unit == "tokens" else 1
    return [
        [{batch: Size(amount, size.unit)} for amount in _halves(size.amount, least)],
        [{"train.recompute": "full"}],
        [_shorter(run, length, longest) for length in _halves(seq_len, SHORTEST)],
        [{"train.optimizer": "adamw-8bit"}],
        [{"train.master_weights": "stochastic"}],
        [{"train.optimizer_in_backward": True, "train.clip_norm": None}],
        [{"model.quantize": "nf4"}],
        [
            {
                "adapter.kind": "lora",
                "train.master_weights": "fp32",
                "train.optimizer_in_backward": False,
            }
        ],
    ]


def _shorter(run: Run, length: int, longest: int) -> Keys:
    """A smaller seq_len; where it would cut answers, which the token contract refuses, the examples that it cuts go."""
    keys: Keys = {"data.seq_len": length}
    if length < longest and not run.data.allow_cut_answers:
        keys["data.too_long"] = "drop"
    return keys


def _halves(amount: int, least: int) -> Iterator[int]:
    while (amount := amount // 2) >= least:
        yield amount


def _with_keys(run: Run, keys: Iterable[tuple[str, Any]]) -> Run:
    for key, value in keys:
        section, name = key.split(".")
        run = replace(run, **{section: replace(getattr(run, section), **{name: value})})
    return run


def refuse_overrun(
    plan: RunPlan, machine: Machine, *, resumed: bool = False, where: str = "", more: str = ""
) -> None:
    """MachineError where a plan needs more memory than there is, with `more` advice; `where`: not the plan's device."""
    needed, there = memory_needs(plan, machine)
    if there and needed > there:
        what = f"the run does not fit: it needs about {needed / 2**30:.1f} GiB, and {there / 2**30:.1f} GiB can be used"
        ranks = f"{plan.mesh.describe()}, " if plan.mesh.world > 1 else ""
        how = f"{ranks}micro batch of {plan.choices['micro batch']}, recompute {plan.choices['recompute']}"
        fix = _ways_to_fit(plan, machine, resumed=resumed) + more
        place = ", ".join(
            filter(None, [plan.device, machine.limit.describe() if machine.limit else ""])
        )
        raise MachineError(
            what, where=where or place, why=f"{plan.memory.describe()}; {how}", fix=fix
        )


def warn_of_overrun(plan: RunPlan, machine: Machine, *, resumed: bool = False) -> RunPlan:
    """The plan of a run on a CPU, with a warning where it may need more memory than can be had now."""
    needed, there = plan.memory.total - plan.memory.copies, machine.free_bytes
    if machine.device != "cpu" or not machine.card_bytes or needed <= there * USABLE_ON_CPU:
        return plan
    what = f"it needs about {needed / 2**30:.1f} GiB, on a CPU up to a quarter more"
    place = f" ({machine.limit.describe()})" if machine.limit and machine.limit.name else ""
    text = (
        f"warning: the run may not fit: {what}, and {there / 2**30:.1f} GiB can be had now{place}"
    )
    fix = _ways_to_fit(plan, machine, resumed=resumed)
    return replace(plan, warnings=(*plan.warnings, f"{text}; fix: {fix}"))


def _ways_to_fit(plan: RunPlan, machine: Machine, *, resumed: bool) -> str:
    """Keys with which the run needs less, and how to raise the limit that it does not fit into."""
    keys = plan.less_memory(resumed=resumed)
    wanted = int(plan.memory.total / USABLE_ON_CPU) - machine.free_bytes
    larger = machine.limit.fix(max(0, wanted)) if machine.limit else ""
    return f"{keys} or {larger}" if larger else keys


def memory_needs(plan: RunPlan, machine: Machine) -> tuple[int, int]:
    """Bytes that a plan cannot do without, and those that there are (0: not known). An adapter's checkpoint may wait.

    A CPU's free memory grows as other programs give way, and micro batches may be smaller than planned: there only what is
    certain counts, the whole run's share or a step on the longest example alone, against all that the process could have.
    """
    memory = plan.memory
    if plan.device.startswith("cuda"):
        return memory.total - memory.copies, int(machine.free_bytes * ALLOCATABLE)
    return max(memory.static - memory.copies, memory.least), machine.card_bytes


def refuse_offload(run: Run, machine: Machine, mesh: MeshShape) -> None:
    """RecipeError where `train.cpu_offload` asks for what a GPU or the mesh cannot have; on a CPU it has no effect."""
    key, moved = "train.cpu_offload", moved_to_host(run, machine)
    if moved and machine.integrated:
        what, why = (
            "this GPU shares the host's memory",
            "what is moved to the host takes the same memory there",
        )
        raise RecipeError(what, where=key, why=why, fix=f"{key}=[]")
    if "parameters" in moved and mesh.world == 1:
        what, why = "one process offloads no parameters", "FSDP2 offloads what it shards over ranks"
        raise RecipeError(
            what, where=key, why=why, fix=f"{key}=[], or {key}=[activations], or several ranks"
        )


def moved_to_host(run: Run, machine: Machine) -> tuple[str, ...]:
    """What `train.cpu_offload` has an effect on."""
    return run.train.cpu_offload if machine.device.startswith("cuda") else ()
