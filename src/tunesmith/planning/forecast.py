"""The forecast of a run's memory and time on a mesh, and the choice of the mesh.

`train` and `plan` choose by it. Memory, micro batch and recompute come from `resolve.py`, the time
of a step from `step_time.py`.
"""

import math
from dataclasses import dataclass, replace
from functools import cache, partial

from rich.filesize import decimal as size_text

from tunesmith.config.schema import Run
from tunesmith.data.batches.schedule import StepSize
from tunesmith.model.spec import ModelSpec
from tunesmith.parallel.mesh import meshes_for
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.planning import resolve, savings
from tunesmith.planning.machines import Cluster
from tunesmith.planning.measured_layers import count_adapter
from tunesmith.planning.memory import USABLE_SHARE, MemoryEstimator
from tunesmith.planning.run_plan import Machine, RunPlan, Saving
from tunesmith.planning.step_time import Step, StepTime
from tunesmith.planning.workload import Workload, rank_step
from tunesmith.quant.schemes import scheme_of
from tunesmith.units import Size

# The share of the time that a mesh must save over one with fewer shards or tensor ranks or within
# the nodes. Forecasts differ from measurements by as much.
MIN_GAIN_SHARE = 0.05


@dataclass(frozen=True)
class Forecast:
    """The forecast of a run on a mesh. None: a speed or a count is not known.

    Attributes:
        tight: it fits with less to spare than the estimate may err.
        room: bytes that a rank can have.
        phases: bytes that a rank needs in a step, and while an adapter is saved beside it.
        seconds: of an optimizer step, by part.
        hides_from: tokens of a micro batch that hides the communication of its passes.
    """

    plan: RunPlan
    fits: bool
    tight: bool
    room: int
    phases: dict[str, int]
    seconds: dict[str, float]
    hides_from: int
    step_seconds: float | None
    tokens_per_second: float | None
    hours: float | None


def plan_on_paper(run: Run, spec: ModelSpec, cluster: Cluster, work: Workload) -> "Planner":
    """Return the planner for machines that are not here.

    Everything is assumed to work which the chip has. MachineError for bf16, where it has none.
    """
    chip = cluster.chip
    run = replace(run, model=resolve.with_dtype(run.model, run.train, chip, lambda: spec))
    resolve.check_bf16(run.model.dtype, chip)
    is_cpu = chip.name == "cpu"
    size = int(chip.gib * 2**30)
    scaling: tuple[str | None, str] = (None, "")
    if scheme_of(run.model).has_fp8_matmuls:
        scaling = ("fp8", "assumed") if chip.fp8 else (None, f"{chip.name} has no fp8 matmuls")
    machine = Machine(
        device="cpu" if is_cpu else "cuda",
        free_bytes=size,
        attention=("products" if is_cpu else "varlen", "assumed"),
        compiles=(run.train.compile != "off" and not is_cpu, "assumed"),
        scaling=scaling,
        card_bytes=size,
        integrated=chip.integrated,
        grouped_mm=chip.grouped_mm and run.model.dtype == "bf16",
    )
    return Planner(run, spec, cluster, work, machine, _count_trained(run, spec))


def _count_trained(run: Run, spec: ModelSpec) -> int:
    """Parameters that a recipe trains, of all ranks."""
    trained = spec.parameters
    if run.adapter.kind == "lora":
        trained = count_adapter(spec, run.adapter)
    if run.model.train_projector:
        trained += spec.projector_parameters
    return trained


def _order(forecast: Forecast) -> tuple[bool, bool, float]:
    """Return a key whose least value has the fastest forecast with memory to spare; then come
    those that fit, then the nearest to it.
    """
    if forecast.fits:
        return False, forecast.tight, forecast.step_seconds or 0.0
    return True, forecast.tight, forecast.phases["step"]


@dataclass(frozen=True)
class Planner:
    """Forecasts of a recipe for every mesh of a cluster's ranks, and the choice between them.

    Both `plan` and `train` choose by it.

    Attributes:
        machine: that of each rank.
        trained: parameters that all ranks train.
        previous_micro_batch: of the checkpoint that a run goes on from, as for `resolve_plan`.
    """

    run: Run
    spec: ModelSpec
    cluster: Cluster
    work: Workload
    machine: Machine
    trained: int
    previous_micro_batch: Size | None = None

    def meshes(self) -> list[MeshShape]:
        return meshes_for(self.run, self.spec, self.cluster.world, self.cluster.per_node)

    def choose(self) -> RunPlan:
        """Return what each rank does, on the best mesh; MachineError if the run does not fit."""
        best = self.best()
        resumed = self.previous_micro_batch is not None
        savings.check_memory_fits(best.plan, self.machine, resumed=resumed)
        plan = savings.warn_of_overrun(best.plan, self.machine, resumed=resumed)
        warning = self.warn_of_waits(best)
        if warning:
            plan = replace(plan, warnings=(*plan.warnings, warning))
        reason = "the first that fits, because the speed is unknown"
        if best.step_seconds:
            reason = "the fastest in the forecast"
        reason = f"{reason}, of {len(self.meshes())} possible meshes"
        return replace(plan, why={**plan.why, "mesh": reason})

    def warn_of_waits(self, forecast: Forecast) -> str | None:
        """Return a warning if steps are too short to hide the gathers of other ranks' weights.

        None if ranks wait less than a twentieth of the time, or if micro batches are short for want
        of memory.
        """
        run = self.run
        plan = forecast.plan
        exposed = forecast.seconds.get("shards", 0.0)
        if not forecast.step_seconds or exposed <= MIN_GAIN_SHARE * forecast.step_seconds:
            return None
        share = rank_step(run, self.work.step, plan.mesh).mean
        if share >= forecast.hides_from:
            return None
        batch = run.train.global_batch
        # Each data rank takes whole examples, or whole packed rows.
        unit = plan.mesh.data
        if batch.unit == "tokens":
            unit *= run.row_tokens
        amount = math.ceil(batch.amount * forecast.hides_from / share / unit) * unit
        fix = f"train.global_batch='{Size(amount, batch.unit)}'"
        if run.train.micro_batch != "auto":
            fix += " train.micro_batch=auto"
        return (
            f"warning: {exposed / forecast.step_seconds:.0%} of the time ranks wait for other "
            f"ranks' weights: a step gives each {share:,.0f} tokens in micro batches of "
            f"{plan.memory.tokens:,}, and {forecast.hides_from:,} would hide that; fix: {fix}, for "
            "fewer and larger steps"
        )

    def best(self) -> Forecast:
        """Return the forecast of the mesh that `train` takes.

        The fastest one that fits with memory to spare; if none fits, the one that lacks the least
        memory. Simpler meshes are preferred: one with more shards or tensor ranks than another, or
        with groups over several nodes, is taken only if its step is shorter by MIN_GAIN_SHARE. If
        the speed is unknown, the first mesh that fits is taken, within the nodes if possible.
        """
        forecasts = [self.forecast(mesh) for mesh in self.meshes()]
        *best_class, least_cost = min(map(_order, forecasts))
        contenders = []
        for forecast in forecasts:
            *forecast_class, cost = _order(forecast)
            if forecast_class == best_class and (1 - MIN_GAIN_SHARE) * cost <= least_cost:
                contenders.append(forecast)
        # `meshes_for` has those with the fewest tensor ranks and shards first, and `min` takes the
        # first of equal ones.
        per_node = self.cluster.per_node
        return min(
            contenders, key=lambda each: each.plan.mesh.shard * each.plan.mesh.tensor > per_node
        )

    def forecast(self, mesh: MeshShape) -> Forecast:
        """Forecast memory and time on a mesh, with the micro batch that `train` takes."""
        run = self.run
        work = self.work
        estimator = MemoryEstimator(
            run, self.spec, self.machine, self.trained, mesh, work.probabilities, work.whole
        )
        plan = resolve.resolve_plan(estimator, self.cluster, work, self.previous_micro_batch)
        plan = replace(plan, savings=cache(partial(self._savings, plan)))
        if work.whole > 1:
            reason = f"attention sees both answers whole; {1 - 1 / work.whole:.0%} fewer tokens"
            plan = replace(plan, prompts="once a pair", why={**plan.why, "prompts": reason})
        needed, room = savings.memory_needs(plan, self.machine)

        is_padded = plan.layout.row_length is not None
        step = Step(estimator, self.cluster, work, plan.memory, is_padded)
        time = step.time() if self.cluster.chip.tflops else StepTime({}, hides_from=0)
        step_seconds = sum(time.parts.values()) or None
        tokens_per_second = step_seconds and work.step.mean * work.whole / step_seconds
        if plan.streamed_layers:
            cost = f"{size_text(plan.memory.host)} of the host's memory"
            if tokens_per_second:
                cost += (
                    f" over {step.host_link:.0f} GB/s, hidden in micro batches of "
                    f"{time.hides_from:,} tokens; about {tokens_per_second:,.0f} tokens/s"
                )
            plan = replace(plan, why={**plan.why, "cpu offload": cost})

        hours = None
        if run.train.duration.seconds:
            hours = run.train.duration.seconds / 3600
        elif work.steps and step_seconds:
            hours = work.steps * step_seconds / 3600
        return Forecast(
            plan,
            fits=needed <= room,
            # `room` is what can be allocated; USABLE_SHARE of the memory is what is planned with.
            tight=needed > room * USABLE_SHARE / savings.ALLOCATABLE_SHARE,
            room=room,
            phases={"step": plan.memory.step, "save": plan.memory.total},
            seconds=time.parts,
            hides_from=time.hides_from,
            step_seconds=step_seconds,
            tokens_per_second=tokens_per_second,
            hours=hours,
        )

    def _savings(self, plan: RunPlan) -> tuple[Saving, ...]:
        """Find the keys with which this run needs less memory than `plan`."""

        def plan_of(changed: Run) -> RunPlan:
            return self._changed(changed).best().plan

        return savings.find_savings(
            self.run, plan, self.machine, plan_of, longest=self.work.longest
        )

    def _changed(self, run: Run) -> "Planner":
        """Return the planner of a recipe that differs in what `find_savings` changes."""
        trained = self.trained
        if run.adapter.kind != self.run.adapter.kind:
            trained = _count_trained(run, self.spec)
        step = self.work.step
        share = run.train.global_batch.amount / self.run.train.global_batch.amount
        work = self.work._replace(
            step=StepSize(step.mean * share, math.ceil(step.largest * share)),
            longest=min(self.work.longest, run.row_tokens),
        )
        return replace(self, run=run, work=work, trained=trained)
