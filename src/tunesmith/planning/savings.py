"""Recipe keys with which a run needs less memory: the run is planned with each of them.

And the checks of a plan against the memory of its machine.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from tunesmith.config.check import check_run
from tunesmith.config.dump import differences
from tunesmith.config.schema import Run
from tunesmith.errors import MachineError, RecipeError, UsageError
from tunesmith.host.shell import shell_word
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.planning.memory import USABLE_CPU_SHARE, moved_to_host, usable_share
from tunesmith.planning.run_plan import Machine, RunPlan, Saving
from tunesmith.units import Size

# A plan beyond this is refused. Weights, gradients and moments are counted, and the one estimate of
# activations that was compared with a GPU was 1.5 % too small; segments that the allocator cannot
# fill take a few percent (not measured).
ALLOCATABLE_SHARE = 0.97
MIN_SEQ_LEN = 128  # tokens of data.seq_len that is offered; shorter ones cut most answers

Keys = dict[str, object]  # dotted recipe keys and their new values
ADAPTER_KEYS: Keys = {
    "adapter.kind": "lora",
    "train.master_weights": "fp32",
    "train.optimizer_in_backward": False,
}


class PlannedChange(NamedTuple):
    """A changed recipe and its plan."""

    run: Run
    plan: RunPlan


def find_savings(
    run: Run, plan: RunPlan, machine: Machine, plan_of: Callable[[Run], RunPlan], *, longest: int
) -> tuple[Saving, ...]:
    """Find changes with which a run fits, in the order in which a user would try them. Training an
    adapter comes after them, and last frozen layers that stream from the host, which changes no
    number.

    Args:
        plan_of: plans a changed recipe; what the recipe's rules or the meshes refuse is left out.
        longest: tokens of the longest example.
    """
    most = plan.memory.total
    # If the run may fit, less than a tenth is not worth a change.
    if not _exceeds(plan, machine):
        most = most * 9 // 10

    def is_enough(limit: int, changed: RunPlan) -> bool:
        return changed.memory.total <= limit and _fits(changed, machine)

    start = PlannedChange(run, plan)
    starts = [start]
    if run.adapter.kind == "none":
        starts += _changed(start, ADAPTER_KEYS, plan_of)
    enough: list[PlannedChange] = []
    usable = int(plan.memory.free * usable_share(plan.device))
    # If no change leaves room for the error of the estimate, one that just fits is enough.
    for limit in (min(most, usable), most):
        for each in starts:
            enough += _find_enough(each, partial(is_enough, limit), plan_of, longest)
        if enough:
            break
    offloaded = run.train.cpu_offload
    # Several ranks have other ways to share what one cannot hold.
    if plan.mesh.world == 1 and "parameters" not in offloaded:
        streamed = _changed(start, {"train.cpu_offload": (*offloaded, "parameters")}, plan_of)
        enough += [change for change in streamed if is_enough(most, change.plan)]
    return tuple(_saving(run, change) for change in enough)


def _find_enough(
    start: PlannedChange,
    is_enough: Callable[[RunPlan], bool],
    plan_of: Callable[[Run], RunPlan],
    longest: int,
) -> list[PlannedChange]:
    """Find what is enough: the start itself; or of each kind of change the smallest that does
    alone; or all that save memory, made one after the other until they do together.
    """
    if is_enough(start.plan):
        return [start]
    kinds = _changes(start.run, start.plan, longest)
    enough = []
    for kind in kinds:
        changes = [change for keys in kind for change in _changed(start, keys, plan_of)]
        enough += [change for change in changes if is_enough(change.plan)][:1]
    if enough:
        return enough
    for keys in itertools.chain(*kinds):
        for change in _changed(start, keys, plan_of):
            if change.plan.memory.total < start.plan.memory.total:
                start = change
        if is_enough(start.plan):
            return [start]
    return []


def _changed(
    start: PlannedChange, keys: Keys, plan_of: Callable[[Run], RunPlan]
) -> list[PlannedChange]:
    """The start with other keys; empty where they are refused."""
    run = start.run
    for key, value in keys.items():
        section, name = key.split(".")
        run = replace(run, **{section: replace(getattr(run, section), **{name: value})})
    try:
        check_run(run, lambda key: "")
        return [PlannedChange(run, plan_of(run))]
    except UsageError:
        return []


def _saving(run: Run, planned: PlannedChange) -> Saving:
    changes = differences(run, planned.run)
    words = []
    for change in changes:
        value = change.new if isinstance(change.new, str) else json.dumps(change.new)
        if isinstance(change.new, list):
            value = f"[{', '.join(change.new)}]"
        words.append(f"{change.key}={shell_word(value)}")
    resumes = all(change.allowed for change in changes)
    plan = planned.plan
    cost = plan.why["cpu offload"] if plan.streamed_layers else ""
    return Saving(" ".join(words), plan.memory.step, resumes, cost)


def _changes(run: Run, plan: RunPlan, longest: int) -> list[list[Keys]]:
    """Changes of a recipe, kind by kind, the smaller ones first; some change nothing."""
    size = plan.layout.micro_batch
    # An update in the backward takes the global batch as one micro batch.
    batch = "train.global_batch" if run.train.optimizer_in_backward else "train.micro_batch"
    least = run.row_tokens if size.unit == "tokens" else 1
    return [
        [{"parallel.tensor": "auto"}] if plan.mesh.world > 1 else [],
        [{batch: Size(amount, size.unit)} for amount in _halves(size.amount, least)],
        [{"train.recompute": "full"}],
        [{"train.optimizer": "adamw-8bit"}],
        [{"train.master_weights": "stochastic"}],
        [{"train.optimizer_in_backward": True, "train.clip_norm": None}],
        [{"model.quantize": "nf4"}],
        [_shorter(run, length, longest) for length in _halves(run.data.seq_len, MIN_SEQ_LEN)],
    ]


def _shorter(run: Run, length: int, longest: int) -> Keys:
    """A smaller seq_len; examples whose answers it would cut go, as the token contract says."""
    keys: Keys = {"data.seq_len": length}
    sequences = run.row_tokens // run.data.seq_len
    are_split = run.data.too_long == "auto" and all(
        source.format == "text" for source in run.data.train
    )
    if length * sequences < longest and not run.data.allow_cut_answers and not are_split:
        keys["data.too_long"] = "drop"
    return keys


def _halves(amount: int, least: int) -> Iterator[int]:
    amount //= 2
    while amount >= least:
        yield amount
        amount //= 2


def check_memory_fits(
    plan: RunPlan,
    machine: Machine,
    *,
    resumed: bool = False,
    where: str = "",
) -> None:
    """MachineError where a plan needs more memory than there is.

    Args:
        where: names machines that are not here, in place of the plan's device.
    """
    if not _exceeds(plan, machine):
        return
    needed, there = memory_needs(plan, machine)
    layout = f"micro batch of {plan.choices['micro batch']}, recompute {plan.choices['recompute']}"
    if plan.mesh.world > 1:
        layout = f"{plan.mesh.describe()}, {layout}"
    if not where:
        where = plan.device
        limit = machine.limit.describe() if machine.limit else ""
        if limit:
            where += f", {limit}"
    why = f"{plan.memory.describe()}; {layout}"
    scaling, reason = machine.scaling
    # Of a base that was to be in fp8.
    if reason and not scaling:
        why += f"; the base stays in {plan.base}: {reason}"
    raise MachineError(
        f"the run does not fit: it needs about {needed / 2**30:.1f} GiB, and "
        f"{there / 2**30:.1f} GiB can be used",
        where=where,
        why=why,
        fix=_ways_to_fit(plan, machine, resumed=resumed),
    )


def warn_of_overrun(plan: RunPlan, machine: Machine, *, resumed: bool = False) -> RunPlan:
    """The plan of a run on a CPU, with a warning where it may need more than can be had now."""
    if not _may_overrun(plan, machine):
        return plan
    needed = plan.memory.step
    there = machine.free_bytes
    place = ""
    if machine.limit and machine.limit.name:
        place = f" ({machine.limit.describe()})"
    warning = (
        f"warning: the run may not fit: it needs about {needed / 2**30:.1f} GiB, on a CPU up to a "
        f"quarter more, and {there / 2**30:.1f} GiB are available{place}; "
        f"fix: {_ways_to_fit(plan, machine, resumed=resumed)}"
    )
    return replace(plan, warnings=(*plan.warnings, warning))


def _fits(plan: RunPlan, machine: Machine) -> bool:
    """Tell whether `train` takes a plan without an error, and without a warning."""
    return not _exceeds(plan, machine) and not _may_overrun(plan, machine)


def _exceeds(plan: RunPlan, machine: Machine) -> bool:
    needed, there = memory_needs(plan, machine)
    # Of some machines the memory is unknown.
    return bool(there) and needed > there


def _may_overrun(plan: RunPlan, machine: Machine) -> bool:
    """Tell whether a run on a CPU may need more than can be had now."""
    if machine.device != "cpu" or not machine.card_bytes:
        return False
    return plan.memory.step > machine.free_bytes * USABLE_CPU_SHARE


def _ways_to_fit(plan: RunPlan, machine: Machine, *, resumed: bool) -> str:
    """Keys with which the run needs less, and how to raise the limit that it does not fit into."""
    keys = plan.less_memory(resumed=resumed)
    if machine.limit is None:
        return keys
    # Of what the limit allows a part is planned with, so more than the estimate must be there.
    missing = int(plan.memory.total / USABLE_CPU_SHARE) - machine.free_bytes
    larger = machine.limit.fix(max(0, missing))
    return f"{keys} or {larger}" if larger else keys


def memory_needs(plan: RunPlan, machine: Machine) -> tuple[int, int]:
    """Bytes that a plan cannot do without, and those that there are (0: unknown).

    A CPU's free memory grows as other programs give way, and
    micro batches may be smaller than planned: there only what is certain counts, the whole run's
    share or a step on the longest example alone, against all that the process could have.
    """
    memory = plan.memory
    if plan.device.startswith("cuda"):
        return memory.step, int(machine.free_bytes * ALLOCATABLE_SHARE)
    return max(memory.static - memory.copies, memory.least), machine.card_bytes


def check_offload(run: Run, machine: Machine, mesh: MeshShape) -> None:
    """RecipeError where `train.cpu_offload` asks for what a GPU or the mesh cannot have.

    On a CPU it has no effect.
    """
    moved = moved_to_host(run, machine)
    if moved and machine.integrated:
        raise RecipeError(
            "this GPU shares the host's memory",
            where="train.cpu_offload",
            why="offloading would use the same memory",
            fix="train.cpu_offload=[]",
        )
    if "parameters" not in moved or mesh.world > 1:
        return
    if run.adapter.kind == "none":
        raise RecipeError(
            "a single process offloads frozen parameters only",
            where="train.cpu_offload",
            why="gradients and moments of a model trained in full would have to move too, which "
            "FSDP2 does over several ranks",
            fix="train.cpu_offload=[] with train.optimizer=adamw-8bit, or several ranks, or "
            "adapter.kind=lora",
        )
