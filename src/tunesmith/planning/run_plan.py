"""The plan of a run on a machine: all choices for this machine, which are made before the model is
built.

This module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from tunesmith.config.schema import Run
from tunesmith.errors import RecipeError
from tunesmith.host.memory import NO_LIMIT, MemoryLimit
from tunesmith.model.arch.spec import ModelSpec, check_seq_len
from tunesmith.model.known.model_types import Support
from tunesmith.model.weights.shipped import check_frozen
from tunesmith.parallel.mesh_shape import ONE, MeshShape
from tunesmith.units import Size, ceil_div


def describe_reference(run: Run) -> tuple[str, str]:
    """Return the kind of the method's reference model, and its cost. Both are empty if the method
    needs no reference model.
    """
    if not run.uses_reference:
        return "", ""
    if run.adapter.kind == "none":
        what = "the base, scored before training"
        cost = "a forward pass over all answers before training, cached with the tokens"
    elif run.adapter.from_ is None:
        what = "the base, with the adapter disabled"
        cost = "one forward pass per step"
    else:
        what = "the adapter of adapter.from before this training"
        cost = "one forward pass per step, and a copy of the adapter"
    if run.method_facts.passes[1]:
        cost += "; and as many for its KL, over prompts with answers of other rows"
    return what, cost


def shares_prompts(run: Run, recurrent: Collection[str]) -> bool:
    """Return whether packed rows contain the common prompt of a preference pair only once.

    Return False for models with recurrent layers, because such a layer would carry the state of the
    first answer into the second answer.

    Args:
        recurrent: class names of the model's recurrent layers.
    """
    is_packed = run.data.pack and run.model.attention != "eager"
    return run.method_facts.sequences > 1 and is_packed and not recurrent


def fit_to_model(
    run: Run, spec: ModelSpec, support: Support, *, where: str, checks_length: bool = True
) -> Run:
    """Return the recipe adapted to the model. If the model has layers that cannot separate packed
    documents, packing is turned off, and Transformers' own attention is used.

    Raise RecipeError if the model does not support the recipe: its quantization, its `seq_len`, or
    a global batch in tokens.

    Args:
        where: the model's config.json.
        checks_length: whether `data.seq_len` is compared with the model's context.
    """
    check_frozen(run)
    if checks_length:
        check_seq_len(spec, run.data.seq_len, where=where)
    if support.state != "padded":
        return run
    if run.train.global_batch.unit == "tokens":
        raise RecipeError(
            f"train.global_batch is in tokens, but {spec.model_type} cannot be trained on packed "
            "rows",
            where="train.global_batch",
            why=support.why,
            fix="set train.global_batch: 64 examples",
        )
    return replace(
        run,
        data=replace(run.data, pack=False),
        model=replace(run.model, attention="eager"),
    )


@dataclass(frozen=True)
class Machine:
    """Facts about a machine that a plan needs. `resolve.probe_machine` finds them.

    Attributes:
        free_bytes: memory that is available now.
        attention, compiles, scaling: the attention backend, whether layers are compiled, and the
            scaling recipe of an 8-bit base (or None), each with its reason.
        card_bytes: total memory of the GPU. If the GPU is `integrated`, it shares this memory with
            the host. On a CPU, the maximum memory that this rank could ever use within its `limit`.
            0 if unknown.
        grouped_mm: whether one kernel multiplies all experts of a mixture.
        kernel: kernel of the attention backend. Empty if it was not tested.
        name: name of the GPU that the driver reports.
        limit: on a CPU, the limit of the process's memory.
        host_link: measured GB/s from page-locked host memory to the GPU. 0 if it was not measured.
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
    limit: MemoryLimit = NO_LIMIT
    host_link: float = 0.0


@dataclass(frozen=True)
class MicroBatchLayout:
    """The layout of examples in micro batches. The fields are passed to `Loader` as arguments."""

    micro_batch: Size
    row_length: int | None = None
    multiple: int = 1
    max_document: int | None = None

    def multiple_of(self, tensor: int) -> MicroBatchLayout:
        """Return this layout with micro batches that can be divided into `tensor` equal parts."""
        row_length = self.row_length
        if row_length is not None:
            row_length = ceil_div(row_length, tensor) * tensor
        return replace(self, row_length=row_length, multiple=math.lcm(self.multiple, tensor))


ONE_EXAMPLE = MicroBatchLayout(Size(1, "examples"))


@dataclass(frozen=True)
class SavedActivations:
    """Bytes that each decoder layer saves for the backward.

    Attributes:
        by_token: bytes per token of each layer, without attention probabilities.
        constant: bytes of each layer that do not depend on the number of tokens.
        outside: bytes per token that are saved outside of the layers, by rotary tables and the last
            norm.
        adapter: number of parameters of the adapter. 0 if the model is fully trained.
        active: number of adapter parameters that a token uses. A token uses only some of the
            experts.
        experts: number of adapter parameters of all experts.
    """

    by_token: tuple[float, ...]
    constant: tuple[float, ...]
    outside: float
    adapter: int
    active: int
    experts: int = 0


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device during training with a micro batch of `tokens` tokens (including
    padding), by part.

    Attributes:
        recomputed_layers: number of decoder layers that are recomputed in the backward.
        weights: weights of base and adapter.
        gradients: gradients in the dtype in which the backward returns them.
        optimizer: memory that the first optimizer step adds, for moments, fp32 masters and fp32
            gradients.
        copies: copy of an adapter and its moments that exists while a checkpoint is written. If it
            does not fit, training waits until the checkpoint is written.
        activations: memory that the layers save for the backward.
        recomputed_layer: bytes that one recomputed layer saves. They are included in `activations`.
        gathered: weights that FSDP has gathered, and gradients that are being reduced.
        workspace: temporary memory: one layer's gradients, a chunk of logits, rows of the
            embedding.
        host: host memory for train.cpu_offload. Not included in the sums.
        streamed_layers: number of layers whose frozen matrices are streamed from the host, with one
            process.
        free: free memory at the time before the model is built.
        slots: keys and values of answers that are sampled. They are freed before the batch is
            computed.
        rollouts: memory while answers are sampled, with `slots`.
        least: memory that a step needs if its micro batch contains only the longest example, before
            the gradients are allocated.
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
    slots: int = 0
    rollouts: int = 0
    least: int = 0

    @property
    def static(self) -> int:
        """Sum of the parts that do not depend on the micro batch."""
        return self.weights + self.gradients + self.optimizer + self.copies + self.gathered

    @property
    def total(self) -> int:
        return self.static + self.activations + self.workspace

    @property
    def step(self) -> int:
        """Memory of a step. `copies` is not included, because training waits for the save if there
        is no memory for copies.
        """
        return self.total - self.copies

    def describe(self) -> str:
        """Return a text that lists the parts of the memory estimate in GiB."""
        parts = "weights gradients optimizer gathered activations workspace slots host".split()
        sizes = {name: vars(self)[name] for name in parts}
        texts = [
            f"{name} {size / 2**30:.1f}"
            for name, size in sizes.items()
            if size or name not in ("gathered", "slots", "host")
        ]
        return f"{', '.join(texts)} GiB"


class DenseExperts(NamedTuple):
    """A warning: the model's experts are stored quantized, but the plan makes them dense.

    Attributes:
        share: fraction of the model's parameters that are in experts.
        stored: the form in which they are stored, such as `mxfp4`.
    """

    share: float
    stored: str


class Overrun(NamedTuple):
    """A warning: on a CPU, a step may need more memory than is free.

    Attributes:
        limit: the limit of the process's memory.
        fix: advice to the user, as in the error for a plan that does not fit.
    """

    limit: MemoryLimit
    fix: str


class StagedLayers(NamedTuple):
    """A warning: the driver does not page-lock all memory of streamed layers, so a thread copies
    the other layers first.

    Attributes:
        layers: number of layers that the thread copies.
        rate: bytes per second of these copies, as measured.
    """

    layers: int
    rate: int


PlanWarning = DenseExperts | Overrun | StagedLayers


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run on its machine, with a reason for each choice. The default values are for
    inference.

    Attributes:
        kernel: attention kernel. Empty if it was not tested, because the plan is for another
            machine.
        base: storage of the base's weights: a dtype, nf4, or a scaling recipe of fp8.
        layers: number of decoder layers.
        reference: the reference model of the method. Empty if there is none.
        prompts: text for the user if the prompt of a pair is computed only once. Empty if both
            sequences of the pair contain the prompt.
        recomputed_layers: number of layers that are recomputed in the backward.
        streamed_layers: number of layers whose frozen matrices are in host memory.
        fp32_gradients: whether the matmuls accumulate the gradients of linear weights in fp32.
        trial_peak: peak of allocated bytes in earlier memory trials. The allocator's statistics do
            not include it, because the last trial has reset them.
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
    warnings: tuple[PlanWarning, ...] = ()
    layout: MicroBatchLayout = ONE_EXAMPLE
    memory: MemoryEstimate = MemoryEstimate()
    mesh: MeshShape = ONE
    trial_peak: int = 0
    why: Mapping[str, str] = field(default_factory=dict)

    @property
    def choices(self) -> dict[str, str]:
        """The choices as texts for env.json. The keys are names such as `attention` or `micro
        batch`.
        """
        size = self.layout.micro_batch
        recompute = f"{self.recomputed_layers} of {self.layers} layers"
        if self.recomputed_layers == self.layers:
            recompute = "full"
        elif self.recomputed_layers == 0:
            recompute = "none"
        offload = list(self.cpu_offload)
        if self.streamed_layers:
            offload.append(f"{self.streamed_layers} of {self.layers} layers stream")
        choices = {
            "attention": f"{self.attention}, {self.kernel}" if self.kernel else self.attention,
            "loss": "chunked, compiled" if self.compiled else "chunked",
            "base": self.base,
            "compile": "per layer" if self.compiled else "off",
            "recompute": recompute,
            "micro batch": f"{size.amount:,} {size.unit}",
            "reference": self.reference,
            "prompts": self.prompts,
            "kernels": "deterministic" if self.deterministic else "",
            "weight gradients": "accumulated in fp32" if self.fp32_gradients else "",
            "cpu offload": ", ".join(offload),
        }
        return {name: text for name, text in choices.items() if text}
