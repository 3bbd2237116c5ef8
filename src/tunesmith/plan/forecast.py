"""Forecast memory and time of a run on machines that need not be here, for every mesh that their ranks can make.

Memory, micro batch and recompute are what `train` plans by, in `runtime/resolve.py`. Time is a sum over an optimizer step
of the busiest rank: products and attention at what whole steps reach on the chip, layers that recompute, the fixed cost of
a pass, the update at the memory's bandwidth, and communication. Gathers of shards and reductions into them hide behind the
compute of their pass as far as they are shorter, except those of the first layer and of embedding and head. Nothing hides
tensor parallelism's gathers and scatters, nor the one of an adapter's gradients.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from tunesmith.config.schema import Run
from tunesmith.data.schedule import BatchSchedule, StepSize
from tunesmith.data.tokens import TokenSet
from tunesmith.errors import RecipeError
from tunesmith.model.architectures import ARCHITECTURES
from tunesmith.model.spec import ModelSpec, adapter_parameters, flops
from tunesmith.optim.adamw import checkpoint_bytes_per_parameter
from tunesmith.parallel.mesh import possible_shapes
from tunesmith.plan.hardware import Cluster
from tunesmith.quant.scaled_matmul import KINDS
from tunesmith.runtime import resolve
from tunesmith.runtime.plan import Machine, MeshShape, RunPlan
from tunesmith.units import Size

EIGHT_BIT_SPEED = 1.44  # of whole steps, beside bf16: 794 and 551 TFLOP/s, LoRA of an 8B on an H200
UPDATE_BYTES = 46  # that an update moves for a parameter: norm 4, clipping 8, AdamW 28, 16-bit copy 6
# Of the time: what a mesh must gain over one with fewer cuts or shards, or a micro batch over that of `auto`, which knows of
# no link. Forecasts differ from what was measured by as much.
BETTER = 0.95


class Workload(NamedTuple):
    """What a run trains on. `steps`: None where not known; `operations`: floating-point, of a token; `attention`: its
    share of them; `source`: what the lengths of examples are from."""

    step: StepSize
    longest: int
    steps: int | None
    operations: float
    attention: float
    source: str


def measure_work(run: Run, spec: ModelSpec, tokens: TokenSet | None, length: int | None) -> Workload:
    """From the recipe's tokens; without them every example has `length` tokens, or fills `data.seq_len`."""
    seq_len, steps = run.data.seq_len, None
    if tokens is not None:
        lengths, supervised = tokens.lengths, tokens.counts.supervised
        schedule = BatchSchedule(lengths, run.data, run.train, repeats=tokens.repeats)
        step, steps = schedule.step_size(), schedule.steps(run.train.duration)
        source = f"{len(lengths):,} in the token cache, {lengths.mean():,.0f} tokens on average"
    else:
        supervised = min(length or seq_len, seq_len)
        lengths = np.array([supervised])
        most = resolve.step_units(run) * (supervised if run.train.global_batch.unit == "examples" else seq_len)
        step, source = StepSize(most, most), f"not known, taken as {supervised:,} tokens each, all with a label"
        if run.train.duration.unit == "steps":
            steps = int(run.train.duration.amount)
    kind: Literal["full", "lora"] = "lora" if run.adapter.kind == "lora" else "full"
    count, shapes = adapter_parameters(spec, run.adapter), (spec, replace(spec, heads=0))
    whole, products = (
        flops(s, lengths, supervised, trained=kind, adapter_parameters=count * (kind == "lora")) for s in shapes
    )
    return Workload(step, int(lengths.max()), steps, whole / float(lengths.sum()), 1 - products / whole, source)


@dataclass(frozen=True)
class Forecast:
    """What a mesh makes of a run.

    `seconds` of an optimizer step by part, and the communication that they hide, shards' gathers wholly in micro batches of
    `hides_from` tokens or more; `idle_share` of the data ranks, as a step
    has too few examples; `phases`: bytes of a rank, of which it can have `room`. None: a speed or a count is not known.
    """

    plan: RunPlan
    fits: bool
    room: int
    phases: dict[str, int]
    idle_share: float
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
        tight = self.phases["step"] > resolve.USABLE * self.plan.memory.free
        return not self.fits, tight, (self.step_seconds or 0.0) if self.fits else self.phases["step"]


@dataclass(frozen=True)
class Planner:
    """Forecasts of a recipe on a cluster."""

    run: Run
    spec: ModelSpec
    cluster: Cluster
    work: Workload

    @property
    def lora(self) -> bool:
        return self.run.adapter.kind == "lora"

    @property
    def trained(self) -> int:
        """Trained parameters."""
        return adapter_parameters(self.spec, self.run.adapter) if self.lora else self.spec.parameters

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint on the disk."""
        width = 4 if self.lora else resolve.DTYPES[self.run.model.dtype].itemsize
        return int(self.trained * (width + checkpoint_bytes_per_parameter(self.run.train, width)))

    @property
    def machine(self) -> Machine:
        """That of each rank: everything is assumed to work which the chip has."""
        chip, base, compiles = self.cluster.chip, self.run.model.quantize, self.run.train.compile != "off"
        device, size = ("cpu" if chip.name == "cpu" else "cuda"), int(chip.gib * 2**30)
        return Machine(
            device, size, ("varlen", "assumed"), (compiles and device == "cuda", "assumed"),
            (base if base in chip.eight_bit else None, "assumed"), size, chip.integrated,
        )  # fmt: skip

    def meshes(self) -> list[MeshShape]:
        """Those that the ranks can make and the recipe allows, fewest cuts and shards first; RecipeError if there is none.

        `parallel.tensor: 1` may be the default, so others are tried. They stay within a node, and cut heads and widths
        evenly; nf4's blocks of 64 stay whole.
        """
        spec, given, family = self.spec, self.run.parallel, ARCHITECTURES.get(self.spec.model_type)
        block = 64 if self.run.model.quantize == "nf4" else 1
        widths = (spec.heads, spec.kv_heads, spec.intermediate / block, spec.heads * spec.head_dim / block)
        known, most, found = family is not None and family.fused and not spec.quantised, self.cluster.per_node, []
        for tensor in range(1, most + 1) if given.tensor == 1 else [given.tensor]:
            if tensor == 1 or (known and most % tensor == 0 and not any(width % tensor for width in widths)):
                with suppress(RecipeError):
                    found += possible_shapes(replace(given, tensor=tensor), self.cluster.world)
        if not found:
            what = f"no mesh of {self.cluster.world} ranks is as parallel says"
            why = "replicate x shard x tensor are all ranks, and tensor divides the GPUs of a node, heads and widths"
            fix = "parallel.replicate=auto parallel.shard=auto parallel.tensor=1"
            raise RecipeError(what, where="parallel", why=why, fix=fix)
        return found

    def ranked(self) -> list[Forecast]:
        """Every mesh: first those that fit, the fastest first, then the nearest to fitting."""
        found = [self.fastest(mesh) for mesh in self.meshes()]
        *rank, least = min(f.order for f in found)
        first = next(f for f in found if f.order[:2] == tuple(rank) and BETTER * f.order[2] <= least)
        return sorted(found, key=lambda f: (f is not first, *f.order))

    def fastest(self, mesh: MeshShape) -> Forecast:
        """A mesh with the micro batch that `train` takes, or with another that is faster."""
        auto, sizes = self.forecast(mesh), []
        if self.run.train.micro_batch == "auto" and not self.run.train.optimizer_in_backward:
            most = min(
                resolve.MAX_TOKENS[self.machine.device], resolve.rank_step(self.run, self.work.step, mesh).largest
            )
            sizes = [self.run.data.seq_len << k for k in range(16) if self.run.data.seq_len << k <= most]
        best = min((self.forecast(mesh, Size(size, "tokens")) for size in sizes), key=lambda f: f.order, default=auto)
        return best if (*best.order[:2], best.order[2]) < (*auto.order[:2], BETTER * auto.order[2]) else auto

    def forecast(self, mesh: MeshShape, size: Size | None = None) -> Forecast:
        """Memory and time of a mesh, with the recipe's micro batch or one of `size`."""
        run, spec, machine, work = self.run, self.spec, self.machine, self.work
        run = replace(run, train=replace(run.train, micro_batch=size)) if size else run
        plan = resolve.resolve_plan(
            run, spec, machine, trained=self.trained, step=work.step, longest=work.longest, mesh=mesh, refuse=False
        )
        memory, (needed, room), units = plan.memory, resolve.memory_needs(plan, machine), resolve.step_units(run)
        largest = max(spec.head_matmul, spec.hidden * spec.intermediate)  # of the tensors, which come and go one by one
        phases = {
            "load": memory.weights + largest * resolve.DTYPES[run.model.dtype].itemsize,
            "step": memory.total - memory.copies,
            # An adapter's copies are written beside the next steps; a whole model between two, tensor by tensor.
            "save": memory.total if self.lora else memory.static + 4 * largest * (mesh.world > 1),
        }
        seconds, hidden, tokens = self._seconds(plan) if self.cluster.chip.tflops else ({}, 0.0, 0)
        step, clock = sum(seconds.values()) or None, run.train.duration.seconds
        hours = clock / 3600 if clock else work.steps * step / 3600 if work.steps and step else None
        idle, fits = 1 - units / (mesh.data * -(-units // mesh.data)), max(needed, phases["load"]) <= room
        keys = " ".join(f"parallel.{name}={count}" for name, count in mesh._asdict().items())
        keys += f" train.micro_batch='{size}'" if size else ""
        speed = step and work.step.mean / step
        return Forecast(plan, fits, room, phases, idle, seconds, hidden, tokens, step, speed, hours, keys)

    def _seconds(self, plan: RunPlan) -> tuple[dict[str, float], float, int]:
        """Of an optimizer step on the busiest rank: its seconds by part, hidden ones, and tokens of `hides_from`."""
        run, spec, (replicate, shard, tensor), chip = self.run, self.spec, plan.mesh, self.cluster.chip
        estimator = resolve.MemoryEstimator(run, spec, self.machine, self.trained, plan.mesh)
        tokens, itemsize = (
            resolve.rank_step(run, self.work.step, plan.mesh).mean,
            resolve.DTYPES[run.model.dtype].itemsize,
        )
        count = max(1, math.ceil(tokens / plan.memory.tokens - 1e-9))  # of micro batches
        tokens = count * (plan.layout.pad_to or 0) or tokens
        rate = (chip.tflops or 0.0) * 1e12 * (EIGHT_BIT_SPEED if plan.base.startswith(tuple(KINDS)) else 1.0)
        token = self.work.operations / rate / tensor
        again = resolve.RECOMPUTE_COST[run.adapter.kind] * plan.recomputed_layers / spec.layers
        compute = {
            "products": tokens * token * (1 - self.work.attention),
            "attention": tokens * token * self.work.attention,
            "recompute": tokens * token * again,
            "fixed cost of passes": count * estimator.pass_tokens * token,
            "update": UPDATE_BYTES * estimator.trained_here / (1e9 * chip.bandwidth if chip.bandwidth else math.inf),
        }
        # Sums over a tensor group, each a scatter and a gather of all tokens: two of a layer forward and two backward, those
        # of the forward again where it is recomputed; and of the embedding and the head's gradient.
        reduces = 4 * spec.layers + 2 * plan.recomputed_layers + 2
        layers, rest = estimator.weights(itemsize)
        gradients = 4 * estimator.trained_here  # in fp32; of a model trained in full, of this rank's shards
        gather, ends = (self._ring(size, shard, tensor) for size in (layers, rest + layers / spec.layers))
        reduce = 0.0 if self.lora else self._ring(gradients * shard, shard, tensor)
        forward = tokens * token / count / (2 if self.lora else 3)
        backward = (1 + again) * tokens * token / count - forward
        exposed = ends + max(0.0, gather - forward) + max(0.0, gather + reduce - backward)
        copies = (replicate * shard, tensor) if self.lora else (replicate, tensor * shard)
        last = self._ring(2 * gradients, *copies)
        shown = {
            "tensor parallel": self._ring(2 * reduces * tokens * spec.hidden * itemsize, tensor, 1),
            "shards": count * exposed,
            "gradients": last if self.lora else max(0.0, last - backward),  # FSDP reduces in the last backward
        }
        hidden = count * (ends + 2 * gather + reduce) + last - shown["shards"] - shown["gradients"]
        return compute | shown, hidden, math.ceil(gather / forward * tokens / count)

    def _ring(self, size: float, ranks: int, stride: int) -> float:
        """Seconds of a gather or reduction of `size` bytes: each rank passes all parts but one on."""
        return size * (ranks - 1) / ranks / self.cluster.bandwidth(ranks, stride) if ranks > 1 else 0.0

    def enough_nodes(self) -> Cluster | None:
        """The smallest of some larger clusters on which the recipe fits; None where none does."""
        larger = (replace(self.cluster, nodes=self.cluster.nodes * times) for times in (2, 4, 8, 16, 32))
        return next((c for c in larger if c.chip.network and replace(self, cluster=c).ranked()[0].fits), None)
