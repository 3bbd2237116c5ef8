"""Forecasts of a run's memory and time for each possible mesh, and the choice of the best mesh.

The commands `train` and `plan` use this module. `resolve.py` computes the memory, the micro batch
and the recomputation. `step_time.py` computes the time of a step.
"""

from dataclasses import dataclass, replace

from rich.filesize import decimal as size_text

from tunesmith.config.schema import Run
from tunesmith.model.arch.spec import ModelSpec
from tunesmith.parallel.mesh import meshes_for
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.planning import resolve, savings
from tunesmith.planning.machines import Cluster
from tunesmith.planning.measured_layers import count_adapter
from tunesmith.planning.memory import USABLE_SHARE, MemoryEstimator
from tunesmith.planning.run_plan import Machine, RunPlan
from tunesmith.planning.step_time import Step, StepTime
from tunesmith.planning.workload import Workload
from tunesmith.quant.schemes import scheme_of
from tunesmith.units import Size

# Minimum fraction of time that a more complex mesh must save to be preferred to a simpler one. A
# simpler mesh has fewer shards or tensor-parallel ranks, or its groups are within a node. Forecasts
# differ from measurements by up to this fraction.
MIN_GAIN_SHARE = 0.05


@dataclass(frozen=True)
class Forecast:
    """Forecast of a run's memory and time on a mesh. A value is None if a speed or a count that it
    needs is unknown.

    Attributes:
        tight: whether the free memory is smaller than the possible error of the estimate.
        room: bytes that are available to a rank.
        phases: bytes that a rank needs in a step, and in a step during which an adapter is saved.
        seconds: seconds of an optimizer step, by part.
        hides_from: minimum number of tokens of a micro batch whose computation takes longer than
            its communication.
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
    """Return a planner for machines that are not available.

    All features of the chip are assumed to work. Raise MachineError if the recipe uses bf16 but the
    chip has no bf16 units.
    """
    chip = cluster.chip
    dtype, _ = resolve.resolve_dtype(run.model, run.train, chip, spec)
    model = replace(run.model, dtype=dtype)
    run = replace(run, model=model)
    resolve.check_bf16(dtype, chip)
    is_cpu = chip.name == "cpu"
    size = int(chip.gib * 2**30)
    scaling: tuple[str | None, str] = (None, "")
    if scheme_of(model).has_fp8_matmuls:
        scaling = ("fp8", "assumed") if chip.fp8 else (None, f"{chip.name} has no fp8 matmuls")
    machine = Machine(
        device="cpu" if is_cpu else "cuda",
        free_bytes=size,
        attention=("batched_matmul" if is_cpu else "varlen", "assumed"),
        compiles=(run.train.compile != "off" and not is_cpu, "assumed"),
        scaling=scaling,
        card_bytes=size,
        integrated=chip.integrated,
        grouped_mm=chip.grouped_mm and model.dtype == "bf16",
    )
    return Planner(run, spec, cluster, work, machine, _count_trained(run, spec))


def _count_trained(run: Run, spec: ModelSpec) -> int:
    """Return the number of parameters that a recipe trains on all ranks."""
    trained = spec.parameters
    if run.adapter.kind == "lora":
        trained = count_adapter(spec, run.adapter)
    if run.model.train_projector:
        trained += spec.projector_parameters
    return trained


def _sort_key(forecast: Forecast) -> tuple[bool, bool, float]:
    """Return a sort key for forecasts. The best forecast has the minimum key.

    Forecasts that fit with spare memory come first, then forecasts that just fit. Both groups are
    sorted by time. Forecasts that do not fit come last, sorted by memory.
    """
    if forecast.fits:
        return False, forecast.tight, forecast.step_seconds or 0.0
    return True, forecast.tight, forecast.phases["step"]


@dataclass(frozen=True)
class Planner:
    """Makes a forecast of a run for every possible mesh, and chooses the best mesh.

    The commands `plan` and `train` use this class.

    Attributes:
        machine: the machine of each rank.
        trained: number of trained parameters of the whole model.
        previous_micro_batch: micro batch of the checkpoint from which a run resumes, or None for a
            new run. See `resolve_plan`.
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
        """Return the plan for the best mesh. Raise MachineError if the run does not fit."""
        best = self.best()
        plan = best.plan
        resumed = self.previous_micro_batch is not None
        savings.check_memory_fits(self.run, plan, self.machine, resumed=resumed)
        overrun = savings.find_overrun(self.run, plan, self.machine, resumed=resumed)
        warnings = (*plan.warnings, overrun)
        reason = "the first that fits, because the speed is unknown"
        if best.step_seconds:
            reason = "the fastest in the forecast"
        why = {**plan.why, "mesh": f"{reason}, of {len(self.meshes())} possible meshes"}
        return replace(plan, warnings=tuple(filter(None, warnings)), why=why)

    def best(self) -> Forecast:
        """Return the forecast of the mesh that `train` uses.

        This is the fastest mesh that fits with spare memory. If no mesh fits, it is the mesh that
        lacks the least memory. Simple meshes are preferred: a mesh with more shards or
        tensor-parallel ranks, or with groups over several nodes, is only used if its step is
        shorter by MIN_GAIN_SHARE. If the speed is unknown, the first mesh that fits is used, within
        the nodes if possible.
        """
        forecasts = [self.forecast(mesh) for mesh in self.meshes()]
        *best_class, min_cost = min(map(_sort_key, forecasts))
        contenders = []
        for forecast in forecasts:
            *forecast_class, cost = _sort_key(forecast)
            if forecast_class == best_class and (1 - MIN_GAIN_SHARE) * cost <= min_cost:
                contenders.append(forecast)
        # `meshes_for` lists meshes with fewer tensor-parallel ranks and shards first, and `min`
        # returns the first of equal elements.
        per_node = self.cluster.per_node
        return min(
            contenders, key=lambda each: each.plan.mesh.shard * each.plan.mesh.tensor > per_node
        )

    def forecast(self, mesh: MeshShape) -> Forecast:
        """Forecast memory and time on a mesh, with the micro batch that `train` uses."""
        run = self.run
        work = self.work
        estimator = MemoryEstimator(
            run,
            self.spec,
            self.machine,
            self.trained,
            mesh,
            probabilities=work.probabilities,
            whole=work.whole,
            longest=work.longest,
        )
        plan = resolve.resolve_plan(estimator, self.cluster, work, self.previous_micro_batch)
        if work.whole > 1:
            reason = f"attention sees each answer whole; {1 - 1 / work.whole:.0%} fewer tokens"
            unit = "group" if run.samples_answers else "pair"
            plan = replace(plan, prompts=f"once a {unit}", why={**plan.why, "prompts": reason})
        needed, room = savings.memory_needs(plan, self.machine)

        one_shape = plan.layout.row_length is not None
        step = Step(estimator, self.cluster, work, plan.memory, one_shape)
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

        seconds = run.train.duration.seconds
        if not seconds and work.steps and step_seconds:
            seconds = work.steps * step_seconds
        return Forecast(
            plan,
            fits=needed <= room,
            # The plan is tight if it needs more than USABLE_SHARE of the device's memory. Divide by
            # ALLOCATABLE_SHARE, because `room` is this share of the memory.
            tight=needed > room * USABLE_SHARE / savings.ALLOCATABLE_SHARE,
            room=room,
            phases={"step": plan.memory.step, "save": plan.memory.total},
            seconds=time.parts,
            hides_from=time.hides_from,
            step_seconds=step_seconds,
            tokens_per_second=tokens_per_second,
            hours=seconds / 3600 if seconds else None,
        )
