"""Forecast memory and time of a run on machines that need not be here, for every mesh of ranks.

Memory, micro batch and recompute are what `train` plans by, in `planning/resolve.py`. Time is a sum
over an optimizer step of the busiest rank: products and attention at what whole steps reach on the
chip, layers that recompute, the fixed cost of a pass, the update at the memory's bandwidth, FSDP2's
copies, and communication.

Gathers of shards and reductions into them hide behind the compute of their pass as far as they are
shorter, except that of the first layer, and those of an embedding that is trained: the forward
begins and the backward ends with it. A head that shares its weight with the embedding goes with
that. Nothing hides tensor parallelism's gathers and scatters, nor the sum of an adapter's
gradients. Experts are assumed to be evenly loaded.

The rate of whole steps was measured on dense models and has their norms and activations in it. The
products of experts are counted at the rate of products alone, with the empty part of each expert's
last tile, and what the kernels around them move comes on top, at the memory's bandwidth: k copies
of a token are more to move than a dense layer has. A pass reads all experts, and makes quantized
ones dense.

FSDP2 copies what it gathers out of one flat buffer into the weights, and gradients into the buffer
of their reduction, in the stream that computes. Shards are copied into the gather's buffer in the
stream of the gather, and count as a part of it.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import numpy as np

from tunesmith.config.schema import Run
from tunesmith.data.schedule import BatchSchedule, StepSize
from tunesmith.data.tokens import TokenSet
from tunesmith.errors import first_line
from tunesmith.model.documents import count_saved_probabilities
from tunesmith.model.dtypes import DTYPES
from tunesmith.model.shipped import AS_SHIPPED
from tunesmith.model.spec import Layer, ModelSpec, flops
from tunesmith.parallel.mesh import meshes_for
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.planning import resolve, savings
from tunesmith.planning.machines import MEASURED_HERE, Cluster
from tunesmith.planning.measured_layers import count_active_adapter, count_adapter
from tunesmith.planning.run_plan import Machine, RunPlan, Saving
from tunesmith.quant.schemes import DENSE, scheme_of
from tunesmith.units import Size, ceil_div, count_of

log = logging.getLogger(__name__)

# Of whole steps, beside bf16: 794 and 551 TFLOP/s, LoRA of an 8B on an H200.
EIGHT_BIT_SPEED = 1.44
# Of products alone, beside whole steps: 700 and 551 TFLOP/s, LoRA of an 8B on an H200. Nobody has
# measured those of experts: that they reach it is assumed, but for the tiles below.
PRODUCT_SPEED = 1.27
# Rows of a tile of a grouped product: the last one of each expert is half empty on average.
TILE = 128
# Bytes that an update moves for a parameter: norm 4, clipping 8, AdamW 28, 16-bit copy 6.
UPDATE_BYTES = 46
# The share of the time that a mesh must save over one with fewer shards or tensor ranks or within
# the nodes, or a micro batch over that of `auto`, which knows of no link. Forecasts differ from
# measurements by as much.
MIN_GAIN = 0.05
# A model whose first layers and head have more parameters is not tried on a CPU, which would take
# many seconds.
MOST_TRIED = 1_000_000_000
# How a workload describes examples of unknown length.
FILLED = "assumed to fill data.seq_len"


class Workload(NamedTuple):
    """What a run trains on.

    Attributes:
        steps: None where unknown.
        operations: floating-point ones, of a token that is computed.
        attention, experts: the shares of attention and of the experts' products in them.
        probabilities: that a head keeps of a token on a CPU, on average.
        whole: tokens of sequences for each that is computed: more than 1 where the sequences of a
            pair share some.
        document: tokens of a sequence, on average.
        supervised: the share of tokens that enter the loss.
        source: what the lengths of examples are from.
    """

    step: StepSize
    longest: int
    steps: int | None
    operations: float
    attention: float
    experts: float
    probabilities: float
    whole: float
    document: float
    supervised: float
    source: str


class TokenTime(NamedTuple):
    """Seconds of a token, forward and backward, on one rank.

    Attributes:
        products: those of experts not among them.
        expert_copies: what moves the k copies of a token, around the products of experts.
    """

    products: float
    attention: float
    experts: float
    expert_copies: float


class Collective(NamedTuple):
    """A gather or reduction of `size` bytes in a ring of `ranks`, `stride` apart.

    It comes so many `times` a step.
    """

    times: int
    size: float
    ranks: int
    stride: int

    @property
    def sent(self) -> float:
        """Bytes that each rank passes on: all parts but one."""
        return self.size * (self.ranks - 1) / self.ranks


class Collectives(NamedTuple):
    """What the groups of a rank gather and reduce in a step."""

    tensor_parallel: Collective
    gather: Collective
    gather_head: Collective
    gather_first: Collective
    reduce: Collective
    reduce_last: Collective
    gradients: Collective
    expert_gradients: Collective


class StepTime(NamedTuple):
    """Seconds of an optimizer step by part, and the communication that they hide.

    The gathers of shards hide wholly in micro batches of `hides_from` tokens or more.
    """

    parts: dict[str, float]
    hidden: float
    hides_from: int


def _describe_assumed(
    run: Run, rows: int, length: int | None, *, held_out: int, is_assumed: bool, is_estimated: bool
) -> str:
    """What is assumed of examples that no token cache holds; `rows` is 0 where unknown."""
    counted = count_of(rows + held_out, "row") if rows else "unknown"
    if is_assumed:
        counted += " (--rows)"
    if held_out:
        counted += f", {held_out:,} of them held out"
    sequences = run.row_tokens // run.data.seq_len
    each = f"{FILLED}, {run.data.seq_len:,} tokens each"
    if length:
        each = f"about {length:,} tokens each"
        if is_estimated:
            are_texts = all(source.format == "text" for source in run.data.train)
            without = "" if are_texts else ", without a chat template"
            each += f" (estimated from characters{without})"
    elif sequences > 1:
        each = f"{FILLED}, {sequences} x {run.data.seq_len:,} tokens each"
    return f"{counted}, {each}, all counted as supervised"


def measure_work(
    run: Run,
    spec: ModelSpec,
    tokens: TokenSet | None,
    length: int | None = None,
    schedule: BatchSchedule | None = None,
    *,
    rows: int = 0,
    held_out: int = 0,
    is_assumed: bool = False,
    is_estimated: bool = False,
) -> Workload:
    """From the recipe's tokens.

    Without them every example has `length` tokens, or fills `data.seq_len`; there are `rows` of
    them, if that is known, beside those that are `held_out`.

    Args:
        is_assumed: the rows were not counted, `--rows` says so.
        is_estimated: `length` is, from the characters of rows.
    """
    steps = None
    shared = np.zeros(1, np.int64)
    if tokens is not None:
        lengths = tokens.lengths
        shared = tokens.shared
        documents = tokens.document_lengths()
        supervised = tokens.counts.supervised
        schedule = schedule or BatchSchedule.of(run, tokens)
        step = schedule.step_size()
        steps = schedule.steps(run.train.duration)
        source = f"{len(lengths):,} in the token cache, {lengths.mean():,.0f} tokens on average"
    else:
        sequences = run.row_tokens // run.data.seq_len
        supervised = min(length or run.row_tokens, run.row_tokens)
        lengths = np.array([supervised])
        documents = np.repeat(supervised // sequences, sequences)
        step, steps = _steps_of_equal_rows(run, rows, supervised)
        source = _describe_assumed(
            run,
            rows,
            supervised if length else None,
            held_out=held_out,
            is_assumed=is_assumed,
            is_estimated=is_estimated,
        )
    trained: Literal["full", "lora"] = "full"
    adapter_weights = 0
    if run.adapter.kind == "lora":
        trained = "lora"
        adapter_weights = count_active_adapter(spec, run.adapter)

    def operations(spec: ModelSpec) -> float:
        count = partial(
            flops,
            spec,
            trained=trained,
            adapter_parameters=adapter_weights,
            forwards=run.extra_forwards,
        )
        return count(documents.tolist(), supervised) - count(shared.tolist(), 0)

    everything = operations(spec)
    # Without heads no attention is counted: what is left is products.
    without_heads = tuple(replace(layer, heads=0) for layer in spec.layers)
    products = operations(replace(spec, layers=without_heads))
    total = float(lengths.sum() - shared.sum())
    experts = (6 if trained == "full" else 4) * spec.active_of_experts * total
    return Workload(
        step,
        longest=int(lengths.max()) if schedule is None else schedule.longest,
        steps=steps,
        operations=everything / total,
        attention=1 - products / everything,
        experts=experts / everything,
        probabilities=float(count_saved_probabilities(documents).sum()) / total,
        whole=float(lengths.sum()) / total,
        document=float(documents.mean()),
        supervised=supervised / float(lengths.sum()),
        source=source,
    )


def _steps_of_equal_rows(run: Run, rows: int, length: int) -> tuple[StepSize, int | None]:
    """What a step has, and the steps of the run, with `rows` examples of `length` tokens each; 0:
    their number is not known.
    """
    duration = run.train.duration
    steps = int(duration.amount) if duration.unit == "steps" else None
    units_per_step = resolve.step_units(run)
    counts_examples = run.train.global_batch.unit == "examples"
    unit_tokens = length if counts_examples else run.row_tokens
    if not rows:
        return StepSize(units_per_step * unit_tokens, units_per_step * unit_tokens), steps
    units = rows if counts_examples else ceil_div(rows, run.row_tokens // length)
    steps_per_epoch = ceil_div(units, units_per_step)
    if duration.unit == "epochs":
        # The small term removes what binary fractions add.
        steps = max(1, math.ceil(duration.amount * steps_per_epoch - 1e-6))
    largest = min(units, units_per_step) * unit_tokens
    # The last step of an epoch may have fewer examples.
    mean = rows * length / steps_per_epoch if counts_examples else largest
    return StepSize(mean, largest), steps


@dataclass(frozen=True)
class Forecast:
    """The forecast of a run on a mesh. None: a speed or a count is not known.

    Attributes:
        tight: it fits with less to spare than the estimate may err.
        room: bytes that a rank can have.
        phases: bytes that a rank needs, by phase.
        idle_share: of the data ranks, as a step has too few examples.
        sent: bytes a step that a rank sends over its link in the node and over its network.
        seconds: of an optimizer step by part; `shard copies` are FSDP2's copies of gathered weights
            and of gradients.
        hidden_seconds: of the communication that they hide.
        hides_from: tokens of a micro batch that wholly hides the gathers of shards.
        keys: of the recipe, which make a run of it.
    """

    plan: RunPlan
    fits: bool
    tight: bool
    room: int
    phases: dict[str, int]
    idle_share: float
    sent: dict[str, float]
    seconds: dict[str, float]
    hidden_seconds: float
    hides_from: int
    step_seconds: float | None
    tokens_per_second: float | None
    hours: float | None
    keys: str

    @property
    def order(self) -> tuple[bool, bool, float]:
        """The least is the fastest with memory to spare; then what fits; then the nearest to it."""
        cost: float = self.phases["step"]
        if self.fits:
            cost = self.step_seconds or 0.0
        return not self.fits, self.tight, cost


def plan_on_paper(run: Run, spec: ModelSpec, cluster: Cluster, work: Workload) -> "Planner":
    """The planner for machines that are not here.

    Everything is assumed to work which the chip has. MachineError for bf16, where it has none.
    """
    chip = cluster.chip
    dtype = run.model.dtype
    if dtype == "auto":
        dtype, line = resolve.resolve_dtype(run.model, run.train, chip, lambda: spec)
        log.info(line)
        run = replace(run, model=replace(run.model, dtype=dtype))
    resolve.check_bf16(dtype, chip)
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
    trained = spec.parameters
    if run.adapter.kind == "lora":
        trained = count_adapter(spec, run.adapter)
    return Planner(run, spec, cluster, work, machine, trained)


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

    @property
    def trains_adapter(self) -> bool:
        return self.run.adapter.kind == "lora"

    def meshes(self) -> list[MeshShape]:
        return meshes_for(self.run, self.spec, self.cluster.world, self.cluster.per_node)

    def measured_here(self, config: Mapping[str, Any]) -> "Planner":
        """The same with the speed of this CPU, by a trial of a second or two of the model that
        `config` describes; as it is where the trial would take long or is of another kind.
        """
        from tunesmith.planning.calibrate import TRIAL_LAYERS, measure_cpu

        run = self.run
        spec = self.spec
        best = self.ranked()[0]
        size = 2 * spec.head_matmul
        size += sum(layer.matmul + layer.experts for layer in spec.layers[:TRIAL_LAYERS])
        is_recurrent = any(layer.mixing == "recurrent" for layer in spec.layers)
        is_dense = scheme_of(run.model, spec.quantized) is DENSE
        if not best.fits or size > MOST_TRIED or is_recurrent or not is_dense:
            return self
        try:
            tflops, bandwidth = measure_cpu(run, spec, config, best.plan, self.work)
        # Code of 190 model types, for a figure that a plan can do without.
        except Exception as error:
            log.warning(f"the speed of this CPU is not measured: {first_line(error)}")
            return self
        chip = replace(self.cluster.chip, tflops=tflops, bandwidth=bandwidth, source=MEASURED_HERE)
        return replace(self, cluster=replace(self.cluster, chip=chip))

    def choose(self) -> RunPlan:
        """What each rank does: by the first mesh of `ranked`; MachineError where none fits."""
        best = self.ranked()[0]
        resumed = self.previous_micro_batch is not None
        savings.check_memory_fits(best.plan, self.machine, resumed=resumed)
        plan = savings.warn_of_overrun(best.plan, self.machine, resumed=resumed)
        warning = self.warn_of_exposed_gathers(best)
        if warning:
            plan = replace(plan, warnings=(*plan.warnings, warning))
        reason = "the first that fits, because the speed is unknown"
        if best.step_seconds:
            reason = "the fastest in the forecast"
        reason = f"{reason}, of {len(self.meshes())} possible meshes"
        return replace(plan, why={**plan.why, "mesh": reason})

    def warn_of_exposed_gathers(self, forecast: Forecast) -> str | None:
        """A warning where a rank's share of a step is too short to hide the gathers of shards.

        It names the key that makes it longer. None where ranks wait for them less than a twentieth
        of the time, and where micro batches are as short for want of memory.
        """
        run = self.run
        mesh = forecast.plan.mesh
        exposed = forecast.seconds.get("shards", 0.0)
        if not forecast.step_seconds or exposed <= MIN_GAIN * forecast.step_seconds:
            return None
        share = resolve.rank_step(run, self.work.step, mesh).mean
        if share >= forecast.hides_from:
            return None
        batch = run.train.global_batch
        # Each data rank takes whole examples, or whole packed rows.
        unit = mesh.data
        if batch.unit == "tokens":
            unit *= run.row_tokens
        amount = math.ceil(batch.amount * forecast.hides_from / share / unit) * unit
        fix = f"train.global_batch='{Size(amount, batch.unit)}'"
        if run.train.micro_batch != "auto":
            fix += " train.micro_batch=auto"
        return (
            f"warning: ranks wait {exposed / forecast.step_seconds:.0%} of the time for other "
            f"ranks' weights: a step gives each {share:,.0f} tokens, and {forecast.hides_from:,} "
            f"would hide that; fix: {fix}, for fewer and larger steps"
        )

    def ranked(self) -> list[Forecast]:
        """Every mesh, the best first: those that fit, by the seconds of a step; then the others, by
        the memory that they lack.

        A mesh with more shards or tensor ranks than another, or with groups over several nodes,
        comes first only if its step is shorter by MIN_GAIN of the other's at least. Where no speed
        is known, those that fit keep the order of `meshes_for`, and groups over nodes come last.
        """
        forecasts = [self.fastest(mesh) for mesh in self.meshes()]
        # The class of the best: whether it fails to fit, fits tightly (`Forecast.tight`), or spans
        # nodes at an unknown speed. Only others of the same class can come before it.
        *best_class, least_cost = min(map(self._order, forecasts))
        contenders = []
        for forecast in forecasts:
            *forecast_class, cost = self._order(forecast)
            if forecast_class == best_class and (1 - MIN_GAIN) * cost <= least_cost:
                contenders.append(forecast)
        # `meshes_for` has those with the fewest tensor ranks and shards first, and `min` takes the
        # first of equal ones.
        first = min(contenders, key=self._crosses_nodes)
        others = [forecast for forecast in forecasts if forecast is not first]
        return [first, *sorted(others, key=self._order)]

    def _crosses_nodes(self, forecast: Forecast) -> bool:
        mesh = forecast.plan.mesh
        return mesh.shard * mesh.tensor > self.cluster.per_node

    def _order(self, forecast: Forecast) -> tuple[bool, bool, bool, float]:
        """`Forecast.order`; of those that fit at an unknown speed, groups over nodes come last."""
        fails, tight, cost = forecast.order
        has_no_speed = forecast.fits and not forecast.step_seconds
        return fails, tight, has_no_speed and self._crosses_nodes(forecast), cost

    def fastest(self, mesh: MeshShape) -> Forecast:
        """A mesh with the micro batch that `train` takes, or with another that is faster."""
        auto = self.forecast(mesh)
        train = self.run.train
        if train.micro_batch != "auto" or self.previous_micro_batch is not None:
            return auto
        # Without links `auto` is the fastest already; an update in the backward takes the whole
        # global batch at once.
        if mesh.world == 1 or not auto.step_seconds or train.optimizer_in_backward:
            return auto
        limit = resolve.most_tokens(self.spec, self.machine.device)
        largest = min(limit, resolve.rank_step(self.run, self.work.step, mesh).largest)
        best = auto
        fails, tight, cost = auto.order
        # Another micro batch than that of `auto` must save MIN_GAIN of its cost.
        least = (fails, tight, (1 - MIN_GAIN) * cost)
        tokens = self.run.row_tokens
        while tokens <= largest:
            forecast = self.forecast(mesh, Size(tokens, "tokens"))
            if forecast.order < least:
                best = forecast
                least = forecast.order
            tokens *= 2
        return best

    def forecast(self, mesh: MeshShape, size: Size | None = None) -> Forecast:
        """Memory and time of a mesh, with the recipe's micro batch or one of `size`."""
        run = self.run
        keys = " ".join(f"parallel.{name}={ranks}" for name, ranks in mesh._asdict().items())
        if size:
            run = replace(run, train=replace(run.train, micro_batch=size))
            keys += f" train.micro_batch='{size}'"
        work = self.work
        plan = resolve.resolve_plan(
            run,
            self.spec,
            self.machine,
            trained=self.trained,
            step=work.step,
            longest=work.longest,
            probabilities=work.probabilities,
            whole=work.whole,
            previous_micro_batch=self.previous_micro_batch,
            mesh=mesh,
        )
        plan = replace(plan, savings=cache(partial(self._savings, plan)))
        if work.whole > 1:
            reason = f"attention sees both answers whole; {1 - 1 / work.whole:.0%} fewer tokens"
            plan = replace(plan, prompts="once a pair", why={**plan.why, "prompts": reason})
        needed, room = savings.memory_needs(plan, self.machine)

        tokens = resolve.rank_step(run, work.step, mesh).mean
        # A share that is whole micro batches but for rounding makes no further one.
        micro_batches = max(1, math.ceil(tokens / plan.memory.tokens - 1e-9))
        if plan.layout.row_length:
            # Padding is computed too.
            tokens = micro_batches * plan.layout.row_length
        collectives = self._collectives(plan, tokens, micro_batches)
        time = StepTime({}, hidden=0.0, hides_from=0)
        if self.cluster.chip.tflops:
            time = self._step_time(plan, tokens, micro_batches, collectives)
        step_seconds = sum(time.parts.values()) or None

        hours = None
        if run.train.duration.seconds:
            hours = run.train.duration.seconds / 3600
        elif work.steps and step_seconds:
            hours = work.steps * step_seconds / 3600
        units = resolve.step_units(run)
        return Forecast(
            plan,
            fits=needed <= room,
            # `room` is what can be allocated; USABLE of the memory is what is planned with.
            tight=needed > room * resolve.USABLE / savings.ALLOCATABLE,
            room=room,
            phases=self._phase_bytes(plan),
            # Ranks without a unit in the last round wait for those with one.
            idle_share=1 - units / (mesh.data * ceil_div(units, mesh.data)),
            sent=self._sent(collectives),
            seconds=time.parts,
            hidden_seconds=time.hidden,
            hides_from=time.hides_from,
            step_seconds=step_seconds,
            tokens_per_second=step_seconds and work.step.mean * work.whole / step_seconds,
            hours=hours,
            keys=keys,
        )

    def stored_bytes(self) -> int:
        """What is read to load the base: codes where it ships in them, else 16 bits a weight."""
        quantize: Literal["none", "nf4", "as-shipped"] = "none"
        if self.spec.quantized == "bnb-nf4":
            quantize = "nf4"
        elif self.spec.quantized:
            quantize = AS_SHIPPED
        run = replace(self.run, model=replace(self.run.model, quantize=quantize))
        estimator = resolve.MemoryEstimator(run, self.spec, self.machine, self.trained)
        return sum(estimator.weights(2))

    def _savings(self, plan: RunPlan) -> tuple[Saving, ...]:
        """Find the keys with which this run needs less memory than `plan`."""

        def plan_of(changed: Run) -> RunPlan:
            return self._changed(changed).ranked()[0].plan

        usable = int(plan.memory.free * resolve.usable_share(plan.device))
        return savings.find_savings(
            self.run, plan, self.machine, plan_of, below=usable, longest=self.work.longest
        )

    def _changed(self, run: Run) -> "Planner":
        """The planner of a recipe that differs in what `find_savings` changes."""
        trained = self.trained
        if run.adapter.kind != self.run.adapter.kind:
            trained = count_adapter(self.spec, run.adapter)
        step = self.work.step
        share = run.train.global_batch.amount / self.run.train.global_batch.amount
        work = self.work._replace(
            step=StepSize(step.mean * share, math.ceil(step.largest * share)),
            longest=min(self.work.longest, run.row_tokens),
        )
        return replace(self, run=run, work=work, trained=trained)

    def _phase_bytes(self, plan: RunPlan) -> dict[str, int]:
        memory = plan.memory
        # Of the tensors, which come and go one by one
        largest = max(self.spec.head_matmul, *(layer.largest for layer in self.spec.layers))
        # An adapter's copies are written beside the next steps; a whole model between two, tensor
        # by tensor.
        save = memory.total
        if not self.trains_adapter:
            save = memory.static
            if plan.mesh.world > 1:
                save += 4 * largest
        return {
            "load": memory.weights + largest * DTYPES[self.run.model.dtype].itemsize,
            "step": memory.total - memory.copies,
            "save": save,
        }

    def _estimator(self, mesh: MeshShape) -> resolve.MemoryEstimator:
        return resolve.MemoryEstimator(self.run, self.spec, self.machine, self.trained, mesh)

    def _collectives(self, plan: RunPlan, tokens: float, micro_batches: int) -> Collectives:
        """Those of a step of `tokens`, in so many micro batches."""
        spec = self.spec
        replicate, shard, tensor = plan.mesh
        itemsize = DTYPES[self.run.model.dtype].itemsize
        estimator = self._estimator(plan.mesh)
        layers, ends = estimator.weights(itemsize)
        # In fp32; of a model trained in full, of this rank's shards.
        # An all-reduce is a reduction and a gather: 2 times 4 bytes a parameter.
        gradients = 2 * 4 * estimator.trained_here
        head = 0
        embedding = 0
        in_fp32 = 0.0
        if self.trains_adapter:
            # Neither embedding nor head is sharded, and a frozen base has no gradients.
            # Every data rank has a whole adapter.
            sum_of_gradients = Collective(1, gradients, replicate * shard, tensor)
        else:
            if not spec.tied:
                head = itemsize * ceil_div(spec.head_matmul, tensor)
            embedding = ends - head
            in_fp32 = 4 / itemsize
            # FSDP2's reductions have summed over the shards: the copies of each shard are left.
            sum_of_gradients = Collective(1, gradients, replicate, tensor * shard)

        def of_shards(times: int, size: float) -> Collective:
            return Collective(times, size, shard, tensor)

        return Collectives(
            # 2: each sum is a scatter and a gather.
            tensor_parallel=Collective(
                1, 2 * self._tensor_sums(plan) * tokens * spec.hidden * itemsize, tensor, 1
            ),
            # In each pass: of all layers but one, as the last stays for the backward, and nothing
            # hides the first one's.
            gather=of_shards(2 * micro_batches, layers * (1 - 1 / spec.depth)),
            gather_head=of_shards(micro_batches, head),
            gather_first=of_shards(micro_batches, embedding + layers / spec.depth),
            reduce=of_shards(micro_batches, (layers + head) * in_fp32),
            reduce_last=of_shards(micro_batches, embedding * in_fp32),
            gradients=sum_of_gradients,
            # Beside the sum over the data ranks.
            expert_gradients=Collective(1, 2 * 4 * estimator.summed_of_experts, tensor, 1),
        )

    def _tensor_sums(self, plan: RunPlan) -> int:
        """Sums over a tensor group in a step, each a scatter and a gather of all tokens.

        One of each block, forward and backward, that of the forward again where its layer is
        recomputed; and of the embedding and the head's gradient.
        """
        blocks = [self._shared_blocks(layer) for layer in self.spec.layers]
        return 2 * sum(blocks) + sum(blocks[: plan.recomputed_layers]) + 2

    def _shared_blocks(self, layer: Layer) -> int:
        """How many blocks of a layer a tensor group shares: attention, and an MLP of all tokens.

        Of a mixture that is one of shared experts: what there is beside attention and router.
        """
        if not layer.experts:
            return 2
        of_heads = layer.heads + layer.kv_heads
        attention = self.spec.hidden * of_heads * (layer.head_dim + layer.value_dim)
        router = self.spec.hidden * layer.expert_count
        return 1 + (layer.matmul > attention + router)

    def _step_time(
        self, plan: RunPlan, tokens: float, micro_batches: int, collectives: Collectives
    ) -> StepTime:
        """The time of a step of `tokens`, in so many micro batches."""
        token_seconds = sum(self._token_time(plan))
        recompute = self._recompute_share(plan)
        gather = self._gather_seconds(collectives.gather)
        gather_head = self._gather_seconds(collectives.gather_head)
        gather_first = self._gather_seconds(collectives.gather_first)
        reduce = self._transfer_seconds(collectives.reduce)
        reduce_last = self._transfer_seconds(collectives.reduce_last)
        gradients = self._transfer_seconds(collectives.gradients)

        # A frozen weight has no gradient of its own: two matmuls a token in place of three.
        passes = 2 if self.trains_adapter else 3
        forward = tokens * token_seconds / micro_batches / passes
        backward = (1 + recompute) * tokens * token_seconds / micro_batches - forward
        beside_forward = gather + gather_head
        beside_backward = gather + reduce
        exposed = gather_first + reduce_last
        exposed += max(0.0, beside_forward - forward) + max(0.0, beside_backward - backward)
        # Gradients of copies are summed beside the last backward, those of an adapter after it.
        exposed_sum = gradients
        if not self.trains_adapter:
            exposed_sum = max(0.0, gradients - backward)
        communication = {
            "tensor parallel": self._transfer_seconds(collectives.tensor_parallel),
            "shards": micro_batches * exposed,
            "gradients": exposed_sum + self._transfer_seconds(collectives.expert_gradients),
        }
        of_micro_batch = beside_forward + beside_backward + gather_first + reduce_last
        # So many times longer the passes must be, and so the micro batch.
        hiding_passes = max(beside_forward / forward, beside_backward / backward)
        return StepTime(
            self._compute_seconds(plan, tokens, micro_batches, collectives) | communication,
            hidden=micro_batches * (of_micro_batch - exposed) + gradients - exposed_sum,
            hides_from=math.ceil(hiding_passes * tokens / micro_batches),
        )

    def _token_time(self, plan: RunPlan) -> TokenTime:
        """What a token takes in a plan's micro batches."""
        tflops = self.cluster.chip.tflops
        assert tflops is not None
        work = self.work
        rate = tflops * 1e12
        product_rate = PRODUCT_SPEED * rate
        if plan.base.startswith("fp8"):
            rate *= EIGHT_BIT_SPEED
        # The ranks of a tensor group share a token's work.
        operations = work.operations / plan.mesh.tensor
        traffic = self._estimator(plan.mesh).expert_traffic
        return TokenTime(
            products=operations * (1 - work.attention - work.experts) / rate,
            attention=operations * work.attention / rate,
            experts=operations * work.experts * self._tile_cost(plan) / product_rate,
            expert_copies=traffic / self._memory_bandwidth,
        )

    def _tile_cost(self, plan: RunPlan) -> float:
        """What the products of experts cost beside the same with full tiles."""
        mixture = max(self.spec.layers, key=lambda layer: layer.expert_count)
        if not mixture.expert_count:
            return 1.0
        # The ranks of a tensor group share the tokens.
        tokens = plan.memory.tokens / plan.mesh.tensor
        rows = tokens * mixture.experts_per_token / mixture.expert_count
        return 1 + TILE / 2 / rows

    def _recompute_share(self, plan: RunPlan) -> float:
        """What recomputed layers add to a step's products, as a share of them."""
        cost = resolve.RECOMPUTE_COST[self.run.adapter.kind]
        return cost * plan.recomputed_layers / self.spec.depth

    def _compute_seconds(
        self, plan: RunPlan, tokens: float, micro_batches: int, collectives: Collectives
    ) -> dict[str, float]:
        """The parts of `_step_time` that are no communication."""
        estimator = self._estimator(plan.mesh)
        time = self._token_time(plan)
        token_seconds = sum(time)
        passes = estimator.pass_tokens * token_seconds
        # A layer that recomputes reads its experts a third time.
        reads = 1 + plan.recomputed_layers / self.spec.depth / 2
        passes += reads * estimator.expert_pass_bytes / self._memory_bandwidth
        if self.machine.device == "cpu":
            passes = 0.0  # its measured rate is that of such passes
        parts = {
            "products": tokens * time.products,
            "attention": tokens * time.attention,
            "recompute": tokens * token_seconds * self._recompute_share(plan),
            "fixed cost of passes": micro_batches * passes,
            "update": UPDATE_BYTES * estimator.trained_here / self._memory_bandwidth,
            "shard copies": self._copied_bytes(collectives) / self._memory_bandwidth,
        }
        if self.work.experts:
            parts["experts"] = tokens * time.experts
            parts["copies for experts"] = tokens * time.expert_copies
        return parts

    @property
    def _memory_bandwidth(self) -> float:
        """Bytes/s; without an end where unknown, so that nothing waits for it."""
        bandwidth = self.cluster.chip.bandwidth
        return 1e9 * bandwidth if bandwidth else math.inf

    def _transfer_seconds(self, collective: Collective) -> float:
        """Of all that one collective sends."""
        if not collective.sent:
            return 0.0
        return collective.sent / self.cluster.bandwidth(collective.ranks, collective.stride)

    def _gather_seconds(self, gather: Collective) -> float:
        """Of one gather, with the copy of this rank's shards into its buffer."""
        copy_seconds = self._shard_copy_bytes(gather) / self._memory_bandwidth
        return self._transfer_seconds(gather) + copy_seconds

    def _copied_bytes(self, collectives: Collectives) -> float:
        """Bytes that a step moves to copy weights out of FSDP2's buffers, and gradients into them.

        Each is read and written.
        """
        if collectives.gather.ranks == 1:
            return 0.0
        itemsize = DTYPES[self.run.model.dtype].itemsize
        copied = 0.0
        for gather in (collectives.gather, collectives.gather_head, collectives.gather_first):
            copied += 2 * gather.times * gather.size
        # Read in the weights' dtype, written in fp32.
        for reduce in (collectives.reduce, collectives.reduce_last):
            copied += (1 + itemsize / 4) * reduce.times * reduce.size
        return copied

    def _shard_copy_bytes(self, gather: Collective) -> float:
        """Bytes that one gather reads and writes to copy this rank's shards into its buffer."""
        if gather.ranks == 1:
            return 0.0
        read = 1.0
        if not self.trains_adapter and self.run.train.master_weights == "fp32":
            read = 4 / DTYPES[self.run.model.dtype].itemsize
        return (read + 1) * gather.size / gather.ranks

    def _sent(self, collectives: Collectives) -> dict[str, float]:
        """Bytes that a rank sends in a step over its `link` in the node and over its `network`."""
        sent = {"link": 0.0, "network": 0.0}
        for collective in collectives:
            inside = self.cluster.inside(collective.ranks, collective.stride)
            if inside > 1:
                sent["link"] += collective.times * collective.sent
            if inside < collective.ranks:
                # All members of a node share what the ring sends to the next node.
                sent["network"] += collective.times * collective.sent / inside
        return sent
