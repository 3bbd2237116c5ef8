"""Forecast memory and time of a run on machines that need not be here, for every mesh that their ranks can make.

Memory, micro batch and recompute are what `train` plans by, in `planning/resolve.py`. Time is a sum over an optimizer step
of the busiest rank: products and attention at what whole steps reach on the chip, layers that recompute, the fixed cost of
a pass, the update at the memory's bandwidth, FSDP2's copies, and communication.

Gathers of shards and reductions into them hide behind the compute of their pass as far as they are shorter, except that of
the first layer, and those of an embedding that is trained: the forward begins and the backward ends with it. A head that
shares its weight with the embedding goes with that. Nothing hides tensor parallelism's gathers and scatters, nor the sum of
an adapter's gradients.

FSDP2 copies what it gathers out of one flat buffer into the weights, and gradients into the buffer of their reduction, in
the stream that computes. Shards are copied into the gather's buffer in the stream of the gather, and count as a part of it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from tunesmith.config.schema import Run
from tunesmith.data.schedule import BatchSchedule, StepSize
from tunesmith.data.tokens import TokenSet
from tunesmith.model.documents import kept_probabilities
from tunesmith.model.dtypes import DTYPES
from tunesmith.model.spec import ModelSpec, adapter_parameters, flops
from tunesmith.parallel.mesh import meshes_for
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.planning import resolve, savings
from tunesmith.planning.machines import Cluster
from tunesmith.planning.run_plan import Machine, RunPlan, Saving
from tunesmith.quant.schemes import scheme_of
from tunesmith.units import Size

EIGHT_BIT_SPEED = 1.44  # of whole steps, beside bf16: 794 and 551 TFLOP/s, LoRA of an 8B on an H200
UPDATE_BYTES = (
    46  # that an update moves for a parameter: norm 4, clipping 8, AdamW 28, 16-bit copy 6
)
# Of the time: what a mesh must gain over one with fewer cuts or shards or within the nodes, or a micro batch over that of
# `auto`, which knows of no link. Forecasts differ from what was measured by as much.
BETTER = 0.95


class Workload(NamedTuple):
    """What a run trains on. `steps`: None where not known; `operations`: floating-point, of a token; `attention`: its
    share of them; `probabilities`: that a head keeps of a token on a CPU, on average; `source`: what the lengths of
    examples are from."""

    step: StepSize
    longest: int
    steps: int | None
    operations: float
    attention: float
    probabilities: float
    source: str


class Ring(NamedTuple):
    """A gather or reduction of `size` bytes among `ranks`, `stride` apart, so many `times` a step."""

    times: int
    size: float
    ranks: int
    stride: int

    @property
    def sent(self) -> float:
        """Bytes that each rank passes on: all parts but one."""
        return self.size * (self.ranks - 1) / self.ranks


def measure_work(
    run: Run,
    spec: ModelSpec,
    tokens: TokenSet | None,
    length: int | None = None,
    schedule: BatchSchedule | None = None,
) -> Workload:
    """From the recipe's tokens; without them every example has `length` tokens, or fills `data.seq_len`."""
    seq_len, steps = run.data.seq_len, None
    if tokens is not None:
        lengths, supervised = tokens.lengths, tokens.counts.supervised
        schedule = schedule or BatchSchedule(lengths, run.data, run.train, repeats=tokens.repeats)
        step, steps = schedule.step_size(), schedule.steps(run.train.duration)
        source = f"{len(lengths):,} in the token cache, {lengths.mean():,.0f} tokens on average"
    else:
        supervised = min(length or seq_len, seq_len)
        lengths = np.array([supervised])
        most = resolve.step_units(run) * (
            supervised if run.train.global_batch.unit == "examples" else seq_len
        )
        step, source = (
            StepSize(most, most),
            f"not known, taken as {supervised:,} tokens each, all with a label",
        )
        if run.train.duration.unit == "steps":
            steps = int(run.train.duration.amount)
    kind: Literal["full", "lora"] = "lora" if run.adapter.kind == "lora" else "full"
    count, shapes = adapter_parameters(spec, run.adapter), (spec, replace(spec, heads=0))
    count *= kind == "lora"
    whole, products = (
        flops(s, lengths, supervised, trained=kind, adapter_parameters=count) for s in shapes
    )
    total = float(lengths.sum())
    kept = float(kept_probabilities(lengths).sum()) / total
    return Workload(
        step, int(lengths.max()), steps, whole / total, 1 - products / whole, kept, source
    )


@dataclass(frozen=True)
class Forecast:
    """What a mesh makes of a run.

    `phases`: bytes of a rank, of which it can have `room`; `idle_share` of the data ranks, as a step has too few examples;
    `sent`: bytes a step that a rank sends over its link in the node and over its network. `seconds` of an optimizer step
    by part, and the communication that they hide, that of shards wholly in micro batches of `hides_from` tokens or more.
    `shard copies` among them are FSDP2's copies of gathered weights and of gradients.
    None: a speed or a count is not known.
    """

    plan: RunPlan
    fits: bool
    tight: bool  # it fits with less to spare than the estimate may err
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
    keys: str  # of the recipe, which make a run of it

    @property
    def order(self) -> tuple[bool, bool, float]:
        """The least is the fastest with memory to spare, as the estimate errs; then what fits; then the nearest to it."""
        return (
            not self.fits,
            self.tight,
            (self.step_seconds or 0.0) if self.fits else self.phases["step"],
        )


def plan_on_paper(run: Run, spec: ModelSpec, cluster: Cluster, work: Workload) -> "Planner":
    """The planner for machines that are not here: everything is assumed to work which the chip has."""
    chip, compiles = cluster.chip, run.train.compile != "off"
    device, size = ("cpu" if chip.name == "cpu" else "cuda"), int(chip.gib * 2**30)
    scaling: tuple[str | None, str] = (None, "")
    if scheme_of(run.model).has_fp8_matmuls:
        scaling = ("fp8", "assumed") if chip.fp8 else (None, f"{chip.name} has no fp8 matmuls")
    machine = Machine(
        device, size, ("varlen" if device == "cuda" else "products", "assumed"), (compiles and device == "cuda", "assumed"),
        scaling, size, chip.integrated,
    )  # fmt: skip
    trained = (
        adapter_parameters(spec, run.adapter) if run.adapter.kind == "lora" else spec.parameters
    )
    return Planner(run, spec, cluster, work, machine, trained)


@dataclass(frozen=True)
class Planner:
    """Forecasts of a recipe for every mesh of a cluster's ranks, and the choice between them, in `plan` and in `train`.

    `machine` is that of each rank, `trained` counts the parameters that all of them train; `before`: the micro batch of
    the checkpoint that a run goes on from, as for `resolve_plan`.
    """

    run: Run
    spec: ModelSpec
    cluster: Cluster
    work: Workload
    machine: Machine
    trained: int
    before: Size | None = None

    @property
    def lora(self) -> bool:
        return self.run.adapter.kind == "lora"

    def meshes(self) -> list[MeshShape]:
        return meshes_for(self.run, self.spec, self.cluster.world, self.cluster.per_node)

    def choose(self) -> RunPlan:
        """What each rank does: by the first mesh of `ranked`; MachineError where none fits."""
        best, count = self.ranked()[0], len(self.meshes())
        resumed = self.before is not None
        savings.refuse_overrun(best.plan, self.machine, resumed=resumed)
        plan = savings.warn_of_overrun(best.plan, self.machine, resumed=resumed)
        if warning := self.warn_of_exposed_gathers(best):
            plan = replace(plan, warnings=(*plan.warnings, warning))
        how = (
            "the fastest by the forecast"
            if best.step_seconds
            else "the first that fits, as no speed is known here"
        )
        return replace(plan, why={**plan.why, "mesh": f"{how}, of {count} that the ranks can make"})

    def warn_of_exposed_gathers(self, forecast: Forecast) -> str | None:
        """A warning where ranks wait for the gathers of shards as their share of a step is too short to hide them, with the
        key that mends it; None where they wait for less than a twentieth of the time, or as the memory has no room."""
        run, mesh = self.run, forecast.plan.mesh
        exposed = forecast.seconds.get("shards", 0.0)
        if not forecast.step_seconds or exposed <= (1 - BETTER) * forecast.step_seconds:
            return None
        share = resolve.rank_step(run, self.work.step, mesh).mean
        if share >= forecast.hides_from:
            return None
        batch = run.train.global_batch
        # Each data rank takes whole examples, or whole rows of seq_len.
        unit = mesh.data * (run.data.seq_len if batch.unit == "tokens" else 1)
        amount = math.ceil(batch.amount * forecast.hides_from / share / unit) * unit
        fix = f"train.global_batch='{Size(amount, batch.unit)}'"
        if run.train.micro_batch != "auto":
            fix += " train.micro_batch=auto"
        what = f"a step gives each rank {share:,.0f} tokens, and {forecast.hides_from:,} would hide the gathers of shards"
        waiting = f"ranks wait for them {exposed / forecast.step_seconds:.0%} of the time"
        return f"warning: {what}: {waiting}; fix: {fix}, which makes fewer and larger steps"

    def ranked(self) -> list[Forecast]:
        """Every mesh: first those that fit, the fastest first, then the nearest to fitting.

        One with more shards or cuts, or with groups that reach over nodes, must gain BETTER over others. The seconds of such a
        group count what its slow link leaves exposed. Where no speed is known, those that fit stay in the order of
        `meshes_for`, with groups over nodes behind.
        """

        def crosses_nodes(forecast: Forecast) -> bool:
            mesh = forecast.plan.mesh
            return mesh.shard * mesh.tensor > self.cluster.per_node

        def order(forecast: Forecast) -> tuple[bool, bool, bool, float]:
            fails, tight, cost = forecast.order
            return (
                fails,
                tight,
                forecast.fits and not forecast.step_seconds and crosses_nodes(forecast),
                cost,
            )

        forecasts = [self.fastest(mesh) for mesh in self.meshes()]
        *rank, least = min(map(order, forecasts))
        near_best = [
            f for f in forecasts if order(f)[:3] == tuple(rank) and BETTER * f.order[2] <= least
        ]
        first = min(near_best, key=crosses_nodes)
        return sorted(forecasts, key=lambda f: (f is not first, *order(f)))

    def fastest(self, mesh: MeshShape) -> Forecast:
        """A mesh with the micro batch that `train` takes, or with another that is faster."""
        auto, sizes = self.forecast(mesh), []
        links, free = mesh.world > 1, self.run.train.micro_batch == "auto" and self.before is None
        if links and free and auto.step_seconds and not self.run.train.optimizer_in_backward:
            limit = resolve.MAX_TOKENS[self.machine.device.partition(":")[0]]
            most = min(limit, resolve.rank_step(self.run, self.work.step, mesh).largest)
            sizes = [
                self.run.data.seq_len << k for k in range(16) if self.run.data.seq_len << k <= most
            ]
        best = min(
            (self.forecast(mesh, Size(size, "tokens")) for size in sizes),
            key=lambda f: f.order,
            default=auto,
        )
        return (
            best
            if (*best.order[:2], best.order[2]) < (*auto.order[:2], BETTER * auto.order[2])
            else auto
        )

    def forecast(self, mesh: MeshShape, size: Size | None = None) -> Forecast:
        """Memory and time of a mesh, with the recipe's micro batch or one of `size`."""
        run, spec, machine, work = self.run, self.spec, self.machine, self.work
        run = replace(run, train=replace(run.train, micro_batch=size)) if size else run
        plan = resolve.resolve_plan(
            run, spec, machine,
            trained=self.trained, step=work.step, longest=work.longest, probabilities=work.probabilities,
            before=self.before, mesh=mesh,
        )  # fmt: skip
        plan = replace(plan, savings=partial(self._savings, plan))
        memory, (needed, room), units = (
            plan.memory,
            savings.memory_needs(plan, machine),
            resolve.step_units(run),
        )
        # Of the tensors, which come and go one by one
        largest = max(spec.head_matmul, spec.hidden * spec.intermediate)
        phases = {
            "load": memory.weights + largest * DTYPES[run.model.dtype].itemsize,
            "step": memory.total - memory.copies,
            # An adapter's copies are written beside the next steps; a whole model between two, tensor by tensor.
            "save": memory.total if self.lora else memory.static + 4 * largest * (mesh.world > 1),
        }
        tokens = resolve.rank_step(run, work.step, mesh).mean
        count = max(1, math.ceil(tokens / memory.tokens - 1e-9))  # of micro batches
        tokens = count * (plan.layout.pad_to or 0) or tokens
        sent = self._sent(self._rings(plan, tokens, count).values())
        seconds, hidden, most = (
            self._seconds(plan, tokens, count) if self.cluster.chip.tflops else ({}, 0.0, 0)
        )
        step, clock = sum(seconds.values()) or None, run.train.duration.seconds
        hours = clock / 3600 if clock else work.steps * step / 3600 if work.steps and step else None
        idle = 1 - units / (mesh.data * -(-units // mesh.data))
        fits, tight = needed <= room, needed > room * resolve.USABLE / savings.ALLOCATABLE
        keys = " ".join(f"parallel.{name}={count}" for name, count in mesh._asdict().items())
        keys += f" train.micro_batch='{size}'" if size else ""
        speed = step and work.step.mean / step
        return Forecast(
            plan,
            fits,
            tight,
            room,
            phases,
            idle,
            sent,
            seconds,
            hidden,
            most,
            step,
            speed,
            hours,
            keys,
        )

    def with_tensor(self) -> Forecast | None:
        """What `parallel.tensor=auto` makes of the run, if the recipe keeps to 1 and it fits."""
        if self.run.parallel.tensor != 1 or self.cluster.per_node == 1:
            return None
        best = replace(
            self, run=replace(self.run, parallel=replace(self.run.parallel, tensor="auto"))
        ).ranked()[0]
        return best if best.fits and best.plan.mesh.tensor > 1 else None

    def _savings(self, plan: RunPlan) -> Sequence[Saving]:
        """Those of a plan, and before them `parallel.tensor=auto`, which changes no result."""
        best = self.with_tensor()
        own = [Saving("parallel.tensor=auto", best.plan.memory.total, True)] if best else []
        return (*own, *plan.savings())

    def _rings(self, plan: RunPlan, tokens: float, count: int) -> dict[str, Ring]:
        """What the groups of a rank gather and reduce in a step of `tokens`, in `count` micro batches."""
        spec, (replicate, shard, tensor), itemsize = (
            self.spec,
            plan.mesh,
            DTYPES[self.run.model.dtype].itemsize,
        )
        estimator = resolve.MemoryEstimator(self.run, spec, self.machine, self.trained, plan.mesh)
        layers, ends = estimator.weights(itemsize)
        # In fp32; of a model trained in full, of this rank's shards
        gradients = 4 * estimator.trained_here
        # Sums over a tensor group, each a scatter and a gather of all tokens: two of a layer forward and two backward, those
        # of the forward again where it is recomputed; and of the embedding and the head's gradient.
        sums = 4 * spec.layers + 2 * plan.recomputed_layers + 2
        copies = (replicate * shard, tensor) if self.lora else (replicate, tensor * shard)
        head = 0 if self.lora or spec.tied else itemsize * -(-spec.head_matmul // tensor)
        embedding = 0 if self.lora else ends - head
        in_fp32 = 0 if self.lora else 4 / itemsize
        return {
            "tensor parallel": Ring(1, 2 * sums * tokens * spec.hidden * itemsize, tensor, 1),
            # In each pass: of all layers but one, as the last stays for the backward, and nothing hides the first one's.
            "gather": Ring(2 * count, layers * (1 - 1 / spec.layers), shard, tensor),
            "gather head": Ring(count, head, shard, tensor),
            "gather first": Ring(count, embedding + layers / spec.layers, shard, tensor),
            "reduce": Ring(count, (layers + head) * in_fp32, shard, tensor),
            "reduce last": Ring(count, embedding * in_fp32, shard, tensor),
            "gradients": Ring(1, 2 * gradients, *copies),
        }

    def _seconds(
        self, plan: RunPlan, tokens: float, count: int
    ) -> tuple[dict[str, float], float, int]:
        """Of such a step: its seconds by part, hidden ones, and tokens of `hides_from`."""
        run, chip = self.run, self.cluster.chip
        estimator = resolve.MemoryEstimator(run, self.spec, self.machine, self.trained, plan.mesh)
        rate = (
            (chip.tflops or 0.0) * 1e12 * (EIGHT_BIT_SPEED if plan.base.startswith("fp8") else 1.0)
        )
        token = self.work.operations / rate / plan.mesh.tensor
        again = resolve.RECOMPUTE_COST[run.adapter.kind] * plan.recomputed_layers / self.spec.layers
        bandwidth = 1e9 * chip.bandwidth if chip.bandwidth else math.inf
        rings = self._rings(plan, tokens, count)
        compute = {
            "products": tokens * token * (1 - self.work.attention),
            "attention": tokens * token * self.work.attention,
            "recompute": tokens * token * again,
            "fixed cost of passes": count * estimator.pass_tokens * token,
            "update": UPDATE_BYTES * estimator.trained_here / bandwidth,
            "shard copies": self._copied_bytes(rings) / bandwidth,
        }
        sent = {}
        for name, ring in rings.items():
            sent[name] = (
                ring.sent / self.cluster.bandwidth(ring.ranks, ring.stride) if ring.sent else 0.0
            )
            if name.startswith("gather"):
                sent[name] += self._shard_bytes_read(ring) / bandwidth
        forward = tokens * token / count / (2 if self.lora else 3)
        backward = (1 + again) * tokens * token / count - forward
        beside_forward = sent["gather"] + sent["gather head"]
        beside_backward = sent["gather"] + sent["reduce"]
        exposed = sent["gather first"] + sent["reduce last"]
        exposed += max(0.0, beside_forward - forward) + max(0.0, beside_backward - backward)
        # Gradients of copies are summed beside the last backward, those of an adapter after it.
        exposed_sum = sent["gradients"] if self.lora else max(0.0, sent["gradients"] - backward)
        shown = {
            "tensor parallel": sent["tensor parallel"],
            "shards": count * exposed,
            "gradients": exposed_sum,
        }
        of_micro_batch = (
            beside_forward + beside_backward + sent["gather first"] + sent["reduce last"]
        )
        hidden = count * (of_micro_batch - exposed) + sent["gradients"] - exposed_sum
        hiding_passes = max(beside_forward / forward, beside_backward / backward)
        return compute | shown, hidden, math.ceil(hiding_passes * tokens / count)

    def _copied_bytes(self, rings: Mapping[str, Ring]) -> float:
        """Bytes that a step reads and writes to copy gathered weights out of FSDP2's buffers, and gradients into them."""
        itemsize = DTYPES[self.run.model.dtype].itemsize
        copied = 0.0
        for name, ring in rings.items():
            if ring.ranks == 1:
                continue
            if name.startswith("gather"):
                copied += 2 * ring.times * ring.size
            elif name.startswith("reduce"):  # read in the weights' dtype, written in fp32
                copied += (1 + itemsize / 4) * ring.times * ring.size
        return copied

    def _shard_bytes_read(self, ring: Ring) -> float:
        """Bytes that one gather reads and writes to copy this rank's shards into its buffer."""
        if ring.ranks == 1:
            return 0.0
        itemsize = DTYPES[self.run.model.dtype].itemsize
        is_master = not self.lora and self.run.train.master_weights == "fp32"
        read = 4 / itemsize if is_master else 1.0
        return (read + 1) * ring.size / ring.ranks

    def _sent(self, rings: Iterable[Ring]) -> dict[str, float]:
        """Bytes that a rank sends in a step over its `link` in the node and over its `network`."""
        sent = {"link": 0.0, "network": 0.0}
        for ring in rings:
            inside = self.cluster.inside(ring.ranks, ring.stride)
            sent["link"] += ring.times * ring.sent * (inside > 1)
            sent["network"] += ring.times * ring.sent / inside * (inside < ring.ranks)
        return sent

    def enough_nodes(self) -> Cluster | None:
        """The smallest of some larger clusters on which the recipe fits; None where none does."""
        larger = (
            replace(self.cluster, nodes=self.cluster.nodes * times) for times in (2, 4, 8, 16, 32)
        )
        return next(
            (c for c in larger if c.chip.network and replace(self, cluster=c).ranked()[0].fits),
            None,
        )
