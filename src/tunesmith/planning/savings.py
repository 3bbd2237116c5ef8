"""Search for recipe changes with which a run needs less memory. For each change, the run is planned
again.

The module also checks a plan against the memory of its machine.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from tunesmith.config.check import find_problems
from tunesmith.config.dump import differences, yaml_value
from tunesmith.config.schema import Run
from tunesmith.config.yaml_file import RecipeLayer
from tunesmith.data.tokens.tokenize import too_long_of
from tunesmith.errors import MachineError, RecipeError, UsageError
from tunesmith.host.shell import shell_word
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.planning.memory import USABLE_CPU_SHARE, moved_to_host, usable_share
from tunesmith.planning.run_plan import Machine, Overrun, RunPlan, Saving
from tunesmith.units import Size

# Maximum fraction of the memory that a plan may need. A plan that needs more is rejected. The
# estimate of weights, gradients and moments is exact. The estimate of activations was 1.5 % too
# small in the one comparison with a GPU. Memory that the allocator cannot use takes a few percent
# (not measured).
ALLOCATABLE_SHARE = 0.97
MIN_SEQ_LEN = 128  # minimum data.seq_len that is proposed; a shorter one truncates most answers

Keys = dict[str, object]  # recipe keys in dotted form, with new values
PlanOf = Callable[[Run], RunPlan]  # function that plans a changed recipe
ADAPTER_KEYS: Keys = {
    "adapter.kind": "lora",
    "train.master_weights": "fp32",
    "train.optimizer_in_backward": False,
}


class PlannedChange(NamedTuple):
    """A changed recipe, together with the plan for it."""

    run: Run
    plan: RunPlan


def find_savings(
    run: Run, plan: RunPlan, machine: Machine, plan_of: PlanOf, *, longest: int
) -> tuple[Saving, ...]:
    """Return changes with which a run fits, in the order in which a user would try them.

    A change from full training to an adapter comes after the changes that keep full training.
    Streaming frozen layers from the host is last: it does not change the results, but takes time.

    Args:
        plan_of: function that plans a changed recipe. If it raises UsageError, because the recipe's
            rules or the meshes do not allow the change, the change is not returned.
        longest: tokens of the longest example.
    """
    max_bytes = plan.memory.total
    # If the run may fit without a change, return only changes that save at least a tenth of the
    # memory.
    if not _exceeds(plan, machine):
        max_bytes = max_bytes * 9 // 10

    def is_sufficient(limit: int, changed: RunPlan) -> bool:
        # `train` must accept the plan without an error or a warning.
        return (
            changed.memory.total <= limit
            and not _exceeds(changed, machine)
            and not _may_overrun(changed, machine)
        )

    start = PlannedChange(run, plan)
    starts = [start]
    if run.adapter.kind == "none":
        starts += _changed(start, ADAPTER_KEYS, plan_of)
    sufficient: list[PlannedChange] = []
    usable = int(plan.memory.free * usable_share(plan.device))
    # First look for changes that leave spare memory, because the estimate can be too low. If there
    # are none, accept changes with which the run just fits.
    for limit in (min(max_bytes, usable), max_bytes):
        for each in starts:
            sufficient += _find_sufficient(each, partial(is_sufficient, limit), plan_of, longest)
        if sufficient:
            break
    offloaded = run.train.cpu_offload
    # Only propose streaming for one rank, because several ranks can shard the model instead.
    if plan.mesh.world == 1 and "parameters" not in offloaded:
        streamed = _changed(start, {"train.cpu_offload": (*offloaded, "parameters")}, plan_of)
        sufficient += [change for change in streamed if is_sufficient(max_bytes, change.plan)]
    return tuple(_saving(run, change) for change in sufficient)


def _find_sufficient(
    start: PlannedChange,
    is_sufficient: Callable[[RunPlan], bool],
    plan_of: PlanOf,
    longest: int,
) -> list[PlannedChange]:
    """Return the smallest change of each kind with which the memory is sufficient.

    If `start` is already sufficient, return only `start`. If no single change is sufficient, add
    one change after the other that saves memory, until the combination is sufficient.
    """
    if is_sufficient(start.plan):
        return [start]
    kinds = _changes(start.run, start.plan, longest)
    sufficient = []
    for kind in kinds:
        changes = [change for keys in kind for change in _changed(start, keys, plan_of)]
        sufficient += [change for change in changes if is_sufficient(change.plan)][:1]
    if sufficient:
        return sufficient
    for keys in itertools.chain(*kinds):
        for change in _changed(start, keys, plan_of):
            if change.plan.memory.total < start.plan.memory.total:
                start = change
        if is_sufficient(start.plan):
            return [start]
    return []


def _changed(start: PlannedChange, keys: Keys, plan_of: PlanOf) -> list[PlannedChange]:
    """Return a list with `start` changed by `keys`. Return [] if the recipe's rules do not allow
    this.
    """
    run = start.run
    for key, value in keys.items():
        section, name = key.split(".")
        changed = replace(getattr(run, section), **{name: value})
        run = replace(run, **{section: changed})
    if find_problems(run, RecipeLayer({}, {"": ""})):
        return []
    try:
        return [PlannedChange(run, plan_of(run))]
    except UsageError:
        return []


def _saving(run: Run, planned: PlannedChange) -> Saving:
    changes = differences(run, planned.run)
    words = [f"{change.key}={shell_word(yaml_value(change.new))}" for change in changes]
    resumes = all(change.allowed for change in changes)
    plan = planned.plan
    cost = ""
    if plan.streamed_layers:
        cost = plan.why["cpu offload"]
    return Saving(" ".join(words), plan.memory.step, resumes, cost)


def _changes(run: Run, plan: RunPlan, longest: int) -> list[list[Keys]]:
    """Return one list of changes per kind. Within a kind, smaller changes are first. Some changes
    may have no effect.
    """
    size = plan.layout.micro_batch
    # With an update in the backward, there is only one micro batch per step, so the global batch
    # must be smaller.
    batch = "train.global_batch" if run.train.optimizer_in_backward else "train.micro_batch"
    min_amount = run.row_tokens if size.unit == "tokens" else 1
    return [
        [{"parallel.tensor": "auto"}] if plan.mesh.world > 1 else [],
        [{batch: Size(amount, size.unit)} for amount in _halves(size.amount, min_amount)],
        [{"train.recompute": "full"}],
        [{"train.optimizer": "adamw-8bit"}],
        [{"train.master_weights": "stochastic"}],
        [{"train.optimizer_in_backward": True, "train.clip_norm": None}],
        [{"model.quantize": "nf4"}],
        [_shorter(run, length, longest) for length in _halves(run.data.seq_len, MIN_SEQ_LEN)],
    ]


def _shorter(run: Run, length: int, longest: int) -> Keys:
    """Return keys for a smaller seq_len. Unless the recipe allows truncated answers or splits plain
    texts, also drop the rows that are too long, because a run refuses truncated answers.
    """
    keys: Keys = {"data.seq_len": length}
    sequences = run.row_tokens // run.data.seq_len
    is_split = all(too_long_of(source, run.data) == "split" for source in run.data.train)
    if not run.data.allow_cut_answers and not is_split and length * sequences < longest:
        keys["data.too_long"] = "drop"
    return keys


def _halves(amount: int, min_amount: int) -> Iterator[int]:
    amount //= 2
    while amount >= min_amount:
        yield amount
        amount //= 2


def check_memory_fits(
    plan: RunPlan,
    machine: Machine,
    *,
    resumed: bool = False,
    where: str = "",
) -> None:
    """Raise MachineError if a plan needs more memory than the machine has.

    Args:
        resumed: whether the run is resumed, so that its micro batch can no longer be changed.
        where: name of the machine for the error, if the plan is not for this machine. If empty, the
            error names the plan's device.
    """
    if not _exceeds(plan, machine):
        return
    needed, available = memory_needs(plan, machine)
    layout = f"micro batch of {plan.choices['micro batch']}, recompute {plan.choices['recompute']}"
    if plan.mesh.world > 1:
        layout = f"{plan.mesh.describe()}, {layout}"
    if not where:
        where = ", ".join(filter(None, [plan.device, machine.limit.describe()]))
    why = f"{plan.memory.describe()}; {layout}"
    recipe, reason = machine.scaling
    # A reason without a scaling recipe: fp8 was requested, but the machine does not support it.
    if reason and recipe is None:
        why += f"; the base stays in {plan.base}: {reason}"
    raise MachineError(
        f"the run does not fit: it needs about {needed / 2**30:.1f} GiB, and "
        f"{available / 2**30:.1f} GiB can be used",
        where=where,
        why=why,
        fix=_ways_to_fit(plan, machine, resumed=resumed),
    )


def find_overrun(plan: RunPlan, machine: Machine, *, resumed: bool = False) -> Overrun | None:
    """Return a warning if a run on a CPU may need more memory than is available."""
    if not _may_overrun(plan, machine):
        return None
    return Overrun(machine.limit, _ways_to_fit(plan, machine, resumed=resumed))


def _exceeds(plan: RunPlan, machine: Machine) -> bool:
    needed, available = memory_needs(plan, machine)
    # `available` is 0 if the memory of the machine is unknown.
    return bool(available) and needed > available


def _may_overrun(plan: RunPlan, machine: Machine) -> bool:
    """Return whether a run on a CPU may need more memory than is available now."""
    if machine.device != "cpu" or not machine.card_bytes:
        return False
    return plan.memory.step > machine.free_bytes * USABLE_CPU_SHARE


def _ways_to_fit(plan: RunPlan, machine: Machine, *, resumed: bool) -> str:
    """Return advice for the user: keys with which the run needs less memory, and how to raise the
    memory limit of the process.
    """
    keys = plan.less_memory(resumed=resumed)
    # The limit must be higher than the estimate, because a plan uses only USABLE_CPU_SHARE of it.
    missing = int(plan.memory.total / USABLE_CPU_SHARE) - machine.free_bytes
    larger = machine.limit.fix(max(0, missing))
    return f"{keys}; or {larger}" if larger else keys


def memory_needs(plan: RunPlan, machine: Machine) -> tuple[int, int]:
    """Return the bytes that a plan needs at least, and the available bytes (0 if unknown).

    On a CPU, free memory can grow when other programs end, and micro batches may be smaller than
    planned. Therefore the minimum need is compared with all memory that the process could ever use.
    The minimum need is the static part, or a step on only the longest example if that is more.
    """
    memory = plan.memory
    if plan.device.startswith("cuda"):
        needed = max(memory.step, memory.rollouts)
        return needed, int(machine.free_bytes * ALLOCATABLE_SHARE)
    return max(memory.static - memory.copies, memory.least, memory.rollouts), machine.card_bytes


def check_offload(run: Run, machine: Machine, mesh: MeshShape) -> None:
    """Raise RecipeError if the GPU or the mesh does not support `train.cpu_offload`.

    On a CPU the key has no effect.
    """
    moved = moved_to_host(run, machine)
    if moved and machine.integrated:
        raise RecipeError(
            "offloading saves no memory on this GPU",
            where="train.cpu_offload",
            why="this GPU shares the host's memory",
            fix="set train.cpu_offload=[]",
        )
    if "parameters" not in moved or mesh.world > 1:
        return
    if run.adapter.kind == "none":
        raise RecipeError(
            "a single process can offload only frozen parameters",
            where="train.cpu_offload",
            why="full fine-tuning would have to offload gradients and moments too, which FSDP2 "
            "supports only with several ranks",
            fix="set train.cpu_offload=[] and train.optimizer=adamw-8bit, or use several ranks, or "
            "set adapter.kind=lora",
        )
