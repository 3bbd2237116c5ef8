"""The plan of a run on a machine: one frozen value, resolved before anything is built.

Importable without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from tunesmith.config.schema import PAIR_METHODS, Run
from tunesmith.errors import RecipeError
from tunesmith.host.memory import MemoryLimit
from tunesmith.model.model_types import Support
from tunesmith.model.shipped import check_frozen
from tunesmith.model.spec import ModelSpec, check_seq_len
from tunesmith.parallel.mesh_shape import ONE, MeshShape
from tunesmith.units import Size, ceil_div


class Reference(NamedTuple):
    """The model that a method compares with, and what that costs; both empty for others."""

    what: str = ""
    cost: str = ""


def describe_reference(run: Run) -> Reference:
    method = run.method.name
    if method not in ("dpo", "kto"):
        return Reference()
    if run.adapter.kind == "none":
        what = "the base, scored before training"
        cost = "a forward pass over all answers before training, cached with the tokens"
    elif run.adapter.from_ is None:
        what = "the base, with the adapter disabled"
        cost = "a forward pass a step"
    else:
        what = "the adapter of adapter.from before this training"
        cost = "a forward pass a step, and a copy of the adapter"
    if method == "kto":
        cost += "; and as many for its KL, over the mismatched answers"
    return Reference(what, cost)


def shares_prompts(run: Run, recurrent: Collection[str]) -> bool:
    """Tell whether a packed row holds the prompt of a pair's two answers once.

    Where attention alone looks at other tokens: a layer that is `recurrent` (a class of the
    model's, by name) would carry the state of the wrong answer on.
    """
    is_packed = run.data.pack and run.model.attention != "eager"
    return run.method.name in PAIR_METHODS and is_packed and not recurrent


def fit_to_model(
    run: Run, spec: ModelSpec, support: Support, *, where: str, began: bool = False
) -> Run:
    """The recipe as its model can be trained: with one document a row, where layers do not keep
    packed documents apart. RecipeError where the model rules out more.

    Args:
        where: the model's config.json.
        began: the run goes on, with rows that were cut when it began.
    """
    check_frozen(run)
    if not began:
        check_seq_len(spec, run.data.seq_len, where=where)
    if support.state != "padded":
        return run
    if run.train.global_batch.unit == "tokens":
        raise RecipeError(
            f"train.global_batch counts tokens, but {spec.model_type} trains unpacked",
            where="train.global_batch",
            why=support.why,
            fix="train.global_batch: 64 examples",
        )
    return replace(
        run,
        data=replace(run.data, pack=False),
        model=replace(run.model, attention="eager"),
    )


@dataclass(frozen=True)
class Machine:
    """The facts of a machine that a plan depends on, as `resolve.probe_machine` finds them.

    Attributes:
        free_bytes: can be had now.
        attention, compiles, scaling: the attention backend, whether layers are compiled, and the
            scaling recipe of an 8-bit base or None; each with its reason.
        card_bytes: all memory of a GPU, which an `integrated` one shares with the host; on a CPU
            the most that this rank could ever have, within its `limit`. 0: unknown.
        grouped_mm: one kernel multiplies all experts of a mixture.
        kernel: that the attention backend takes; empty: not tried.
        name: of the GPU, as the driver has it.
        limit: of a CPU: what bounds its memory.
        host_link: measured from the host's page-locked memory to the GPU, GB/s; 0: it was not.
    """

    device: str
    free_bytes: int
    attention: tuple[str, str]
    compiles: tuple[bool, str]
    scaling: tuple[str | None, str] = (None, "")
    card_bytes: int = 0
    integrated: bool = False
    grouped_mm: bool = False
    kernel: str = ""
    name: str = ""
    limit: MemoryLimit | None = None
    host_link: float = 0.0


@dataclass(frozen=True)
class MicroBatchLayout:
    """The layout of examples in micro batches; the fields are arguments of `Loader`."""

    micro_batch: Size
    row_length: int | None = None
    multiple: int = 1
    max_document: int | None = None

    def multiple_of(self, tensor: int) -> MicroBatchLayout:
        """The layout whose micro batches can be sharded into `tensor` equal parts."""
        row_length = self.row_length
        if row_length is not None:
            row_length = ceil_div(row_length, tensor) * tensor
        return replace(self, row_length=row_length, multiple=math.lcm(self.multiple, tensor))


ONE_EXAMPLE = MicroBatchLayout(Size(1, "examples"))


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device while it trains on a micro batch of `tokens`, padding counted, by part.

    Attributes:
        recomputed_layers: decoder layers that recompute in the backward.
        weights: of the base and the adapter.
        gradients: as the backward makes them, in the dtype of the weights.
        optimizer: what the first optimizer step adds: moments, fp32 masters and gradients.
        copies: of an adapter and its moments while its checkpoint is written; without room training
            waits.
        activations: what the layers keep for the backward.
        recomputed_layer: the part of it of one layer that recomputes.
        gathered: weights whose shards FSDP has gathered, and gradients on the way to theirs.
        workspace: there for a moment: one layer's gradients, a chunk of logits, the embeddings'
            rows.
        host: in the host's memory, by train.cpu_offload; in none of the sums.
        streamed_layers: whose frozen matrices come from there, on one process.
        free: what there was before anything was built.
        least: what a step on the longest example alone takes, before any gradient is there.
    """

    tokens: int = 0
    recomputed_layers: int = 0
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    copies: int = 0
    activations: int = 0
    recomputed_layer: int = 0
    gathered: int = 0
    workspace: int = 0
    host: int = 0
    streamed_layers: int = 0
    free: int = 0
    least: int = 0

    @property
    def static(self) -> int:
        """Add up what does not depend on the micro batch."""
        return self.weights + self.gradients + self.optimizer + self.copies + self.gathered

    @property
    def total(self) -> int:
        return self.static + self.activations + self.workspace

    @property
    def step(self) -> int:
        """Count what a step takes: an adapter's checkpoint waits where its copies have no room."""
        return self.total - self.copies

    def describe(self) -> str:
        """The parts, in GiB."""
        parts = "weights gradients optimizer gathered activations workspace host".split()
        rare = ("gathered", "host")
        sizes = {name: vars(self)[name] for name in parts if vars(self)[name] or name not in rare}
        return ", ".join(f"{name} {size / 2**30:.1f}" for name, size in sizes.items()) + " GiB"


class Saving(NamedTuple):
    """A change of the recipe.

    Attributes:
        keys: as words of the command line.
        total: bytes that a step then needs.
        resumes: whether a run that is resumed may change them.
        cost: of layers that stream, as the plan says it.
    """

    keys: str
    total: int
    resumes: bool
    cost: str = ""

    def describe(self) -> str:
        """`model.quantize=nf4 (45.1 GiB)`."""
        cost = f"; {self.cost}" if self.cost else ""
        return f"{self.keys} ({self.total / 2**30:.1f} GiB{cost})"


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run on its machine, and why, by part. The defaults are those of inference.

    Attributes:
        kernel: of attention; empty where it was not tried, as the plan is for another machine.
        base: how the base's weights are stored: in a dtype, nf4, or a scaling recipe of fp8.
        layers: decoder layers of the model.
        reference: what the method compares with; empty where it compares with nothing.
        prompts: how often that of a pair is computed; empty where it stands in both sequences.
        recomputed_layers: those of them that recompute in the backward.
        streamed_layers: those of them whose frozen matrices wait in the host's memory.
        fp32_gradients: those of linear layers' weights are added up in fp32 by the products that
            make them.
        savings: finds changes that need less memory than this plan. It is called when advice is
            asked for, as it takes some 0.3 s.
        trial_peak: the most bytes that were allocated before the last trial of memory, which begins
            the allocator's statistics anew.
    """

    device: str
    attention: str
    base: str
    layers: int
    kernel: str = ""
    reference: str = ""
    prompts: str = ""
    compiled: bool = False
    deterministic: bool = False
    recomputed_layers: int = 0
    streamed_layers: int = 0
    fp32_gradients: bool = False
    cpu_offload: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    layout: MicroBatchLayout = ONE_EXAMPLE
    memory: MemoryEstimate = MemoryEstimate()
    mesh: MeshShape = ONE
    savings: Callable[[], Sequence[Saving]] = tuple
    trial_peak: int = 0
    why: Mapping[str, str] = field(default_factory=dict)

    @property
    def choices(self) -> dict[str, str]:
        """List what was decided, by part, as env.json holds it."""
        size = self.layout.micro_batch
        recompute = f"{self.recomputed_layers} of {self.layers} layers"
        if self.recomputed_layers == self.layers:
            recompute = "full"
        elif self.recomputed_layers == 0:
            recompute = "none"
        choices = {
            "attention": f"{self.attention}, {self.kernel}" if self.kernel else self.attention,
            "loss": "chunked, compiled" if self.compiled else "chunked",
            "base": self.base,
            "compile": "per layer" if self.compiled else "off",
            "recompute": recompute,
            "micro batch": f"{size.amount:,} {size.unit}",
        }
        if self.reference:
            choices["reference"] = self.reference
        if self.prompts:
            choices["prompts"] = self.prompts
        if self.deterministic:
            choices["kernels"] = "deterministic"
        if self.fp32_gradients:
            choices["weight gradients"] = "added up in fp32"
        if self.cpu_offload:
            choices["cpu offload"] = ", ".join(self.cpu_offload)
            if self.streamed_layers:
                choices["cpu offload"] += f", {self.streamed_layers} of {self.layers} layers stream"
        return choices

    def less_memory(self, *, resumed: bool = False, recompute: bool = True) -> str:
        """The advice for a run that does not fit.

        Args:
            resumed: it has a checkpoint.
            recompute: that may help.
        """
        savings = []
        for saving in self.savings():
            if recompute or not saving.keys.startswith("train.recompute"):
                savings.append(saving)
        if not savings:
            return "a smaller model, more GPUs, or a device with more memory"
        resumable = [saving for saving in savings if saving.resumes]
        if resumed and resumable:
            savings = resumable
        # As all choices of a fix, so that each gets a line of its own where they are long.
        keys = "; or ".join(saving.describe() for saving in savings)
        return f"{keys} with --fresh" if resumed and not resumable else keys

    def describe(self, *, why: bool = False) -> list[str]:
        """One line, `attention: varlen; loss: chunked; ...`.

        With `why` one line a choice, with its reason.
        """
        choices = {part: f"{part}: {value}" for part, value in self.choices.items()}
        if not why:
            return ["; ".join(choices.values())]
        width = max(map(len, choices.values()))
        return [f"{text:<{width}}  {self.why[part]}" for part, text in choices.items()]
