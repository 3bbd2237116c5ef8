"""Recipe keys with which a run needs less memory: the run is planned with each of them.

And the checks of a plan against the memory of its machine.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from tunesmith.config.check import check_run
from tunesmith.config.dump import differences
from tunesmith.config.schema import Run
from tunesmith.errors import MachineError, RecipeError, UsageError
from tunesmith.host.shell import shell_word
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.planning.run_plan import Machine, RunPlan, Saving
from tunesmith.units import Size

# A plan beyond this is refused. Weights, gradients and moments are counted, and the one estimate of
# activations that was compared with a GPU was 1.5 % too small; segments that the allocator cannot
# fill take a few percent (not measured).
ALLOCATABLE = 0.97
# The share of a CPU's free memory that is planned with: a run's resident memory exceeded the
# estimate by up to a quarter there (docs/plan.md).
USABLE_ON_CPU = 0.8
SHORTEST = 128  # tokens of data.seq_len that is offered; shorter ones cut most answers

Keys = dict[str, Any]  # dotted recipe keys and their new values


def find_savings(
    run: Run,
    plan: RunPlan,
    machine: Machine,
    plan_of: Callable[[Run], RunPlan],
    *,
    below: int,
    longest: int,
) -> tuple[Saving, ...]:
    """Changes that bring a run below so many bytes, in the order in which a user would try them.

    Of each kind the smallest. Where none does alone, the first two or three that do together stand
    in their place; training an adapter comes last. Where nothing brings it below, what just fits is
    enough.

    Args:
        plan_of: plans a changed recipe; what the recipe's rules refuse is left out.
        longest: tokens of the longest example.
    """
    worth = plan.memory.total
    # Of a run that may fit, less than a tenth would not be worth a change.
    if not _exceeds(plan, machine):
        worth = worth * 9 // 10

    def is_below(changed: RunPlan) -> bool:
        return changed.memory.total <= min(below, worth)

    def just_fits(changed: RunPlan) -> bool:
        return changed.memory.total <= worth and _fits(changed, machine)

    kinds = _changes(run, plan, longest)
    changed_runs = _ChangedRuns(run, machine, plan_of)
    savings = changed_runs.find_savings(kinds, is_below)
    return savings or changed_runs.find_savings(kinds, just_fits)


class _PlannedChange(NamedTuple):
    """A changed recipe and its plan."""

    run: Run
    plan: RunPlan


@dataclass
class _ChangedRuns:
    """A recipe with some of its keys changed, each change planned once.

    Attributes:
        planned: the changes so far, by their keys; None: the recipe's rules refuse it.
    """

    run: Run
    machine: Machine
    plan_of: Callable[[Run], RunPlan]
    planned: dict[str, _PlannedChange | None] = field(default_factory=dict)

    def find_savings(
        self, kinds: Sequence[Sequence[Keys]], is_enough: Callable[[RunPlan], bool]
    ) -> tuple[Saving, ...]:
        """As the function; the last of `kinds` trains an adapter."""
        *others, adapter = kinds
        savings = []
        for kind in others:
            saving = self.smallest([kind], is_enough)
            if saving is not None:
                savings.append(saving)
        as_adapter = self.smallest([adapter], is_enough)
        if not savings:
            combined = kinds if as_adapter is None else others
            pairs = itertools.combinations(combined, 2)
            triples = itertools.combinations(combined, 3)
            for several in itertools.chain(pairs, triples):
                saving = self.smallest(several, is_enough)
                if saving is not None:
                    savings.append(saving)
                    break
        if as_adapter is not None:
            savings.append(as_adapter)
        return tuple(savings)

    def smallest(
        self, kinds: Sequence[Sequence[Keys]], is_enough: Callable[[RunPlan], bool]
    ) -> Saving | None:
        """The first change that is enough, of one change of each kind."""
        for parts in itertools.product(*kinds):
            change = self._plan(parts)
            if change is not None and is_enough(change.plan):
                return _saving(self.run, change, self.machine)
        return None

    def _plan(self, parts: Sequence[Keys]) -> _PlannedChange | None:
        cache_key = repr(parts)
        if cache_key not in self.planned:
            changed = self.run
            for keys in parts:
                changed = _with_keys(changed, keys)
            try:
                check_run(changed, lambda key: "")
            except UsageError:
                self.planned[cache_key] = None
            else:
                self.planned[cache_key] = _PlannedChange(changed, self.plan_of(changed))
        return self.planned[cache_key]


def _saving(run: Run, planned: _PlannedChange, machine: Machine) -> Saving:
    changes = differences(run, planned.run)
    words = []
    for change in changes:
        value = change.new if isinstance(change.new, str) else json.dumps(change.new)
        words.append(f"{change.key}={shell_word(value)}")
    resumes = all(change.allowed for change in changes)
    return Saving(" ".join(words), bytes_of_run(planned.plan, machine), resumes, planned.run)


def bytes_of_run(plan: RunPlan, machine: Machine) -> int:
    """What a run takes: without an adapter's copies where its checkpoint waits for want of room."""
    needed, there = memory_needs(plan, machine)
    total = plan.memory.total
    if plan.device.startswith("cuda") and total > there:
        return needed
    return total


def _changes(run: Run, plan: RunPlan, longest: int) -> list[list[Keys]]:
    """Changes of a recipe, kind by kind, the smaller ones first; some change nothing.

    Training an adapter is the last.
    """
    size = plan.layout.micro_batch
    seq_len = run.data.seq_len
    # An update in the backward takes the global batch as one micro batch.
    batch = "train.global_batch" if run.train.optimizer_in_backward else "train.micro_batch"
    least = run.row_tokens if size.unit == "tokens" else 1
    adapter: Keys = {
        "adapter.kind": "lora",
        "train.master_weights": "fp32",
        "train.optimizer_in_backward": False,
    }
    return [
        [{batch: Size(amount, size.unit)} for amount in _halves(size.amount, least)],
        [{"train.recompute": "full"}],
        [_shorter(run, length, longest) for length in _halves(seq_len, SHORTEST)],
        [{"train.optimizer": "adamw-8bit"}],
        [{"train.master_weights": "stochastic"}],
        [{"train.optimizer_in_backward": True, "train.clip_norm": None}],
        [{"model.quantize": "nf4"}],
        [adapter],
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


def _with_keys(run: Run, keys: Keys) -> Run:
    for key, value in keys.items():
        section, name = key.split(".")
        run = replace(run, **{section: replace(getattr(run, section), **{name: value})})
    return run


def check_memory_fits(
    plan: RunPlan,
    machine: Machine,
    *,
    resumed: bool = False,
    where: str = "",
    machines: Sequence[str] = (),
) -> None:
    """MachineError where a plan needs more memory than there is.

    Args:
        where: names machines that are not here, in place of the plan's device.
        machines: on which the run fits.
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
        fix=_ways_to_fit(plan, machine, resumed=resumed, machines=machines),
    )


def warn_of_overrun(plan: RunPlan, machine: Machine, *, resumed: bool = False) -> RunPlan:
    """The plan of a run on a CPU, with a warning where it may need more than can be had now."""
    if not _may_overrun(plan, machine):
        return plan
    needed = plan.memory.total - plan.memory.copies
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
    """Whether `train` takes a plan without an error, and without a warning."""
    return not _exceeds(plan, machine) and not _may_overrun(plan, machine)


def _exceeds(plan: RunPlan, machine: Machine) -> bool:
    needed, there = memory_needs(plan, machine)
    # Of some machines the memory is unknown.
    return bool(there) and needed > there


def _may_overrun(plan: RunPlan, machine: Machine) -> bool:
    """Whether a run on a CPU may need more than can be had now."""
    if machine.device != "cpu" or not machine.card_bytes:
        return False
    needed = plan.memory.total - plan.memory.copies
    return needed > machine.free_bytes * USABLE_ON_CPU


def _ways_to_fit(
    plan: RunPlan, machine: Machine, *, resumed: bool, machines: Sequence[str] = ()
) -> str:
    """Keys with which the run needs less, and how to raise the limit that it does not fit into."""
    keys = plan.less_memory(resumed=resumed, machines=machines)
    if machine.limit is None:
        return keys
    # Of what the limit allows a part is planned with, so more than the estimate must be there.
    missing = int(plan.memory.total / USABLE_ON_CPU) - machine.free_bytes
    larger = machine.limit.fix(max(0, missing))
    return f"{keys} or {larger}" if larger else keys


def memory_needs(plan: RunPlan, machine: Machine) -> tuple[int, int]:
    """Bytes that a plan cannot do without, and those that there are (0: unknown).

    An adapter's checkpoint may wait. A CPU's free memory grows as other programs give way, and
    micro batches may be smaller than planned: there only what is certain counts, the whole run's
    share or a step on the longest example alone, against all that the process could have.
    """
    memory = plan.memory
    if plan.device.startswith("cuda"):
        return memory.total - memory.copies, int(machine.free_bytes * ALLOCATABLE)
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
    if "parameters" in moved and mesh.world == 1:
        is_full = run.adapter.kind == "none"
        smaller = "train.optimizer=adamw-8bit" if is_full else "model.quantize=nf4"
        raise RecipeError(
            "a single process cannot offload parameters",
            where="train.cpu_offload",
            why="FSDP2 moves the shards of several ranks, and one process has none",
            fix=f"train.cpu_offload=[] with {smaller}, or train.cpu_offload=[activations], or "
            "several ranks",
        )


def moved_to_host(run: Run, machine: Machine) -> tuple[str, ...]:
    """What `train.cpu_offload` has an effect on."""
    return run.train.cpu_offload if machine.device.startswith("cuda") else ()
