"""Resolve what `auto` means on a machine: dtype, compile, attention, micro batch and recompute.

Micro batch and recompute are chosen together, for the least time: a larger micro batch spreads the
fixed cost of a forward and backward, a smaller one leaves memory for activations. `calibrate.py`
corrects the estimate on a GPU.

Activations per token and layer of a Llama-like block, in elements: five vectors of the hidden width
(the block's input, the sum after attention, the two normed inputs, attention's output), q, k and v,
and three of the MLP's width (gate, up, and their product). Where neither a compiler nor our own
modules do the work, one more of each. A recomputed layer keeps its input alone. At 16,384 tokens of
an 8B LoRA run this comes to 68 GiB; 69 were measured on an H200.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from tunesmith.config.schema import Dtype, Model, Run, Train
from tunesmith.data.schedule import StepSize
from tunesmith.errors import MachineError
from tunesmith.formats.base import DENSE_BYTES
from tunesmith.host.chips import Chip
from tunesmith.loss import card_bytes, chunk_size
from tunesmith.model import attention
from tunesmith.model.architectures import ARCHITECTURES
from tunesmith.model.dtypes import DTYPES
from tunesmith.model.shipped import AS_SHIPPED, KEEPABLE, resolve_quantize
from tunesmith.model.spec import Layer, ModelSpec
from tunesmith.model.stored_form import bytes_aside
from tunesmith.optim.adamw import HALF, checkpoint_bytes_per_parameter, state_bytes_per_parameter
from tunesmith.parallel.copies import GRADIENT_PIECE, MOST_GRADIENT_PIECES
from tunesmith.parallel.mesh_shape import ONE, MeshShape, needs_fsdp
from tunesmith.planning.measured_layers import (
    count_adapter,
    count_expert_adapter,
    measure_activations,
)
from tunesmith.planning.run_plan import (
    Machine,
    MemoryEstimate,
    MicroBatchLayout,
    RunPlan,
    describe_reference,
)
from tunesmith.planning.savings import USABLE_ON_CPU, check_offload, moved_to_host
from tunesmith.quant.expert_rows import uses_grouped_mm
from tunesmith.quant.schemes import DENSE, Scheme, scheme_of
from tunesmith.runtime import compilation
from tunesmith.runtime.device import chip_of, free_memory, host_budget, is_integrated
from tunesmith.runtime.host import return_freed_memory
from tunesmith.units import Size, ceil_div

if TYPE_CHECKING:
    # With Transformers, which a plan can do without
    from tunesmith.hub.model_files import ModelFiles

log = logging.getLogger(__name__)

MAX_TOKENS = {"cuda": 16384, "cpu": 4096}  # a larger micro batch is not faster
# Of a mixture on a GPU: each pass reads all experts, whatever few a token is multiplied with.
MAX_TOKENS_OF_MIXTURE = 32768
# Of the free memory, to plan with: the rest is the allocator's, and the estimate's error.
USABLE = 0.9
# Of the free memory, which weights in fp32 may take where bf16 has no units.
MOST_WEIGHTS = 0.5
# Operations in the time of a byte, in 16 bits and in 8, by Machine.integrated. An H200 reaches 700
# TFLOP/s (in 8 bits twice that) and 4 TB/s, and other discrete cards lie between 150 and 300; a
# GB10 92 (in 8 bits 188) and 226 GB/s. So a pass over 70B in nf4 costs as much as 396 tokens on an
# H200 and as 922 on a GB10, which prefers larger micro batches.
OPERATIONS_PER_BYTE = {
    False: (175, 350),
    True: (407, 832),
}
# Layers that FSDP2 has gathered at once: one in use, the next one, and the flat buffer that a
# gather arrives in.
GATHERED_LAYERS = 3
# Rows of the hidden width and of an expert's that the kernels around the products of experts read
# and write for each expert of a token, forward and backward: gathers, sums and activations, as
# benchmarks/speed/count_kernels.py counts them. Where one kernel multiplies all experts, the
# products of an adapter's low rank go through memory too; in an expert's turn they are in the
# cache.
EXPERT_ROWS = (5, 17)
GROUPED_ROWS = (20, 35)
# A second forward, as a share of a step: 2 of 6 operations, or of 4.
RECOMPUTE_COST = {"none": 1 / 3, "lora": 1 / 2}
# Compiled graphs: rows of varied steps are padded to a multiple of so many tokens, a hundredth of a
# usual step...
ROW_MULTIPLE = 128
# ... and the longest document is stated in blocks of the attention kernel.
DOCUMENT_BLOCK = 128
# Without expandable segments (device.prepare_allocator) each length leaves blocks of its own in the
# allocator, which no other length fits. So rows of varied steps are padded to one of at least so
# many lengths, and fewer than twice as many.
LENGTHS = 16


def resolve_dtype(
    model: Model, train: Train, chip: Chip, read_sizes: Callable[[], ModelSpec]
) -> tuple[Dtype, str]:
    """The dtype that `model.dtype: auto` stands for on a chip, and a line about it for the user.

    Args:
        chip: a GPU, or `cpu`, with the memory that is free.
        read_sizes: of the model; called where the choice depends on them.

    Raises:
        MachineError: as `check_bf16`, where the recipe needs bf16.
    """
    name = "this CPU" if chip.name == "cpu" else chip.name

    def chosen(dtype: Dtype, why: str) -> tuple[Dtype, str]:
        return dtype, f"model.dtype: {dtype}, {why}"

    if chip.bf16:
        return chosen("bf16", f"which {name} has units for")
    needs = "model.quantize=fp8" if model.quantize == "fp8" else ""
    if train.master_weights == "stochastic":
        needs = "train.master_weights=stochastic"
    if needs:
        check_bf16("bf16", chip)
        return chosen("bf16", f"as {needs} needs it")
    # A GPU without units for bf16 has them for fp16; a CPU has them for neither.
    half: Dtype = "bf16" if chip.name == "cpu" else "fp16"
    if half == "fp16" and train.optimizer_in_backward:
        return chosen("fp32", "as train.optimizer_in_backward excludes fp16")
    sizes = read_sizes()
    if scheme_of(resolve_quantize(model, sizes)) is not DENSE:
        return chosen(half, f"as the base is quantized, although {name} has no units for bf16")
    weights = sizes.parameters * torch.float32.itemsize
    fp32_weights = f"weights of {weights / 2**30:.2g} GiB in fp32"
    if weights < MOST_WEIGHTS * chip.gib * 2**30:
        return chosen("fp32", f"as {name} has no units for bf16, and {fp32_weights} fit")
    too_large = f"{fp32_weights} leave too little of {chip.gib:.2g} GiB"
    return chosen(half, f"although {name} has no units for bf16: {too_large}")


def resolve_dtype_here(model: Model, device: str | torch.device) -> Dtype:
    """The dtype of a base on a device of this machine; a choice other than bf16 is logged."""
    if model.dtype != "auto":
        return model.dtype
    from tunesmith.hub.fetch import fetch_for_tokens
    from tunesmith.hub.model_files import spec_of_folder

    # Of a .gguf, which is converted to the dtype that is chosen here, without its weights.
    def read_sizes() -> ModelSpec:
        return spec_of_folder(fetch_for_tokens(model), model)

    dtype, line = resolve_dtype(model, Train(), chip_of(torch.device(device)), read_sizes)
    if dtype != "bf16":
        log.info(line)
    return dtype


def check_bf16(dtype: str, chip: Chip) -> None:
    """MachineError for bf16 on a GPU without units for it; a CPU emulates them."""
    if dtype == "bf16" and not chip.bf16 and chip.name != "cpu":
        raise MachineError(
            f"{chip.name} has no bf16 matmuls",
            where="model.dtype",
            why="GPUs older than Ampere have none",
            fix="model.dtype=fp16 (the loss is scaled), or model.dtype=fp32",
        )


def attention_backend(run: Run, files: ModelFiles, device: torch.device) -> tuple[str, str]:
    """How attention is computed, and why; `eager`: by Transformers, on padded rows."""
    if run.model.attention == "eager":
        return "eager", "as model.attention says"
    if files.support.state == "padded":
        return "eager", files.support.why
    softcap = files.spec.attention_softcap is not None
    dtype = DTYPES[run.model.dtype]
    return attention.select_attention_backend(device, dtype, files.spec.head_dim, softcap=softcap)


def probe_machine(
    run: Run,
    files: ModelFiles,
    device: torch.device,
    shapes: Sequence[tuple[int, int]] = (),
    ranks: Collection[int] = (),
) -> Machine:
    """What this machine has for a run, learned by trying: backends, compiler, memory, fp8 matmuls.

    Args:
        shapes: those of `eight_bit.eight_bit_shapes`, tried with many rows, few and one.
        ranks: process ids of the run's ranks on this host, which share its memory.
    """
    # Before the products are tried: torch keeps their memory, for the model to use.
    limit = None
    if device.type == "cpu":
        return_freed_memory()  # of reading the rows and the model's files
        free, size, limit = host_budget(ranks)
    else:
        free = free_memory(device)
        size = card_bytes(device)
    scaling = scheme_of(run.model).select_scaling(device, shapes)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    backend = attention_backend(run, files, device)
    return Machine(
        str(device),
        free,
        attention=backend,
        kernel=attention.KERNELS.get(backend[0], ""),
        compiles=compilation.select_compile(run.train.compile, device),
        scaling=scaling,
        card_bytes=size,
        integrated=is_integrated(device),
        grouped_mm=uses_grouped_mm(device, DTYPES[run.model.dtype]),
        name=name,
        limit=limit,
    )


def inference_plan(run: Run, files: ModelFiles, device: torch.device) -> RunPlan:
    """The plan of a model that only answers: nothing compiled or recomputed, no base in 8 bits."""
    backend, _ = attention_backend(run, files, device)
    return RunPlan(str(device), backend, run.model.dtype, files.spec.depth)


def resolve_plan(
    run: Run,
    spec: ModelSpec,
    machine: Machine,
    *,
    trained: int,
    step: StepSize,
    longest: int,
    probabilities: float = 0.0,
    whole: float = 1.0,
    previous_micro_batch: Size | None = None,
    mesh: MeshShape = ONE,
) -> RunPlan:
    """Resolve every `auto` of a recipe by what the machine has, whether it fits or not.

    Args:
        machine: that of each rank; the plan is each rank's, too.
        trained: trained parameters of all ranks.
        step: tokens of an optimizer step, of all ranks.
        longest: tokens of the longest example.
        probabilities, whole: as in `MemoryEstimator`.
        previous_micro_batch: of the start that a resumed run goes on from. `auto` keeps it while it
            fits: dropout and the order of sums depend on it.
    """

    check_offload(run, machine, mesh)
    estimator = MemoryEstimator(run, spec, machine, trained, mesh, probabilities, whole)
    return estimator.plan(rank_step(run, step, mesh), longest, previous_micro_batch)


def most_tokens(spec: ModelSpec, device: str) -> int:
    """Tokens of the largest micro batch that is planned on a device, `cuda:0` or `cpu`."""
    device_type = device.partition(":")[0]
    if device_type == "cuda" and any(layer.experts for layer in spec.layers):
        return MAX_TOKENS_OF_MIXTURE
    return MAX_TOKENS[device_type]


def usable_share(device: str) -> float:
    """The share of a device's free memory to plan with."""
    return USABLE_ON_CPU if device == "cpu" else USABLE


def checkpoint_bytes(run: Run, trained: int, base: Path | None) -> tuple[int, int]:
    """Bytes of one checkpoint of `trained` parameters, and how many of them the disk may hold.

    Args:
        base: the folder of the model, of which a vision tower is copied; None: unknown.
    """
    width = 4 if run.adapter.kind == "lora" else DTYPES[run.model.dtype].itemsize
    size = int(trained * (width + checkpoint_bytes_per_parameter(run.train, width)))
    if run.adapter.kind == "none" and base is not None:
        size += bytes_aside(base)
    return size, run.checkpoint.keep + 3  # the one being written, the best one, and final/


def step_units(run: Run) -> int:
    """What an optimizer step has, and no rank shares with another.

    Examples, or packed rows where the recipe counts tokens.
    """
    size = run.train.global_batch
    if size.unit == "examples":
        return size.amount
    return max(1, size.amount // run.row_tokens)


def rank_step(run: Run, step: StepSize, mesh: MeshShape) -> StepSize:
    """What the busiest data rank takes of a step."""
    units = step_units(run)
    # Examples and rows are not divided: the busiest rank's share is rounded up.
    share = ceil_div(units, mesh.data) / units
    return StepSize(step.mean * share, math.ceil(step.largest * share))


class FixedBytes(NamedTuple):
    """Bytes of a rank that do not depend on its micro batch.

    Attributes:
        base: the base, or the model that is trained in full.
        gradients: as the backward makes them.
        state: the optimizer's, with a gradient in fp32.
        copies: of an adapter and its moments while its checkpoint is written.
        host: in the host's memory, by train.cpu_offload.
    """

    base: int
    adapter: int
    gradients: int
    state: int
    copies: int
    host: int


@dataclass(frozen=True)
class MemoryEstimator:
    """Estimates memory and time of one micro batch on one rank.

    Attributes:
        trained: trained parameters of all ranks.
        probabilities: those of attention that a head keeps of a token, on average
            (`documents.count_saved_probabilities`).
        whole: tokens that attention sees for each that is computed (`Workload.whole`).

    What does not depend on the micro batch is computed once: hundreds of sizes are compared.
    """

    run: Run
    spec: ModelSpec
    machine: Machine
    trained: int
    mesh: MeshShape = ONE
    probabilities: float = 0.0
    whole: float = 1.0

    @property
    def trains_adapter(self) -> bool:
        return self.run.adapter.kind == "lora"

    @cached_property
    def sharded(self) -> bool:
        """Whether the base goes through `fully_shard`."""
        return needs_fsdp(self.run, self.mesh, offload="parameters" in self.moved)

    @cached_property
    def scheme(self) -> Scheme:
        """How the base is stored: as the recipe says, but dense without its fp8 matmuls."""
        scheme = scheme_of(self.run.model, self.spec.quantized)
        if scheme.has_fp8_matmuls and self.machine.scaling[0] is None:
            return DENSE
        return scheme

    @property
    def fp32_gradients(self) -> bool:
        """Whether linear layers add up their weights' gradients in fp32: wherever that works.

        It does for 16-bit weights with fp32 masters, trained in full on one GPU. Several ranks
        reduce the gradients that autograd makes; an update in the backward frees each gradient at
        once; on a CPU no product of 16-bit matrices adds into an fp32 one.
        """
        train = self.run.train
        has_masters = DTYPES[self.run.model.dtype] in HALF and train.master_weights == "fp32"
        in_full = self.run.adapter.kind == "none" and not train.optimizer_in_backward
        on_one_gpu = self.mesh.world == 1 and self.machine.device.startswith("cuda")
        return has_masters and in_full and on_one_gpu

    @property
    def moved(self) -> tuple[str, ...]:
        """What is offloaded to the host."""
        return moved_to_host(self.run, self.machine)

    def weights(self, itemsize: float) -> tuple[int, int]:
        """Bytes of the base that a tensor-parallel rank computes with.

        Of all layers' matrices, and of what else there is. Tensor-parallel ranks shard everything
        but experts, norms and biases. The scales of a base in fp8, 4 bytes a row, are not counted.
        """
        spec = self.spec
        tensor = self.mesh.tensor
        matrices = spec.linear_matrices
        experts = spec.layer_matrices - matrices
        # Embedding and head; tied they are one matrix.
        tables = spec.head_matmul if spec.tied else 2 * spec.head_matmul
        rest = spec.parameters - matrices - experts - tables
        width = self.scheme.weight_bytes
        if width is None:
            width = itemsize
        layers = int(ceil_div(matrices, tensor) * width) + self.scales
        layers += self._expert_weights(itemsize)
        ends = int((ceil_div(tables, tensor) + rest) * itemsize)
        return layers, ends

    def _expert_weights(self, itemsize: float) -> int:
        """Bytes of all experts, without scales."""
        spec = self.spec
        width = self.scheme.expert_bytes
        if width is None:
            width = itemsize
        experts = spec.layer_matrices - spec.linear_matrices
        return int(spec.expert_stacks * width + (experts - spec.expert_stacks) * itemsize)

    @property
    def summed_of_experts(self) -> int:
        """Trained parameters of experts, of which each tensor-parallel rank has a part of the
        gradient.
        """
        if self.mesh.tensor == 1:
            return 0
        if self.trains_adapter:
            return count_expert_adapter(self.spec, self.run.adapter)
        return ceil_div(self._expert_weights(1), self.mesh.shard)

    @cached_property
    def scales(self) -> int:
        """Bytes of a base's scales on a tensor-parallel rank.

        Those of o and down, which are sharded along their inputs, are no longer in one piece, and
        in fp32.
        """
        spec = self.spec
        tensor = self.mesh.tensor
        scheme = self.scheme
        of_stacks = spec.expert_stacks * scheme.expert_scale_bytes
        if not scheme.scale_bytes:
            return int(of_stacks)
        rowwise = 0
        if tensor > 1:
            layer = spec.layers[0]
            # o has heads * head_dim inputs, down the MLP's width; both have `hidden` outputs.
            inputs = layer.heads * layer.head_dim
            if not layer.experts:
                inputs += layer.intermediate
            rowwise = spec.depth * spec.hidden * inputs
        others = spec.linear_matrices - rowwise
        # In fp32: 4 bytes a block of weights.
        of_linears = (others * scheme.scale_bytes + rowwise * 4 / scheme.block) / tensor
        return int(of_linears + of_stacks)

    @cached_property
    def trained_here(self) -> int:
        """Trained parameters of one rank.

        Those of an adapter are whole on every data rank; all others are sharded.
        """
        tensor = self.mesh.tensor
        adapter = self.run.adapter
        if self.trains_adapter:
            whole = count_adapter(self.spec, adapter)
            here = count_adapter(self.spec, adapter, tensor)
            return self.trained - whole + here
        # `weights(1)` counts elements: those of this rank's part of each layer.
        weights = sum(self.weights(1))
        return ceil_div(weights * self.trained, self.spec.parameters * self.mesh.shard)

    def plan(self, step: StepSize, longest: int, previous_micro_batch: Size | None) -> RunPlan:
        """The plan of a rank whose share of a step is `step`, whether it fits or not."""
        run = self.run
        train = run.train
        machine = self.machine
        compiled, compile_reason = machine.compiles
        size = train.micro_batch
        size_reason = "as train.micro_batch says"
        if train.optimizer_in_backward:
            # An update in the backward leaves no place for a second micro batch.
            amount = ceil_div(train.global_batch.amount, self.mesh.data)
            size = Size(amount, train.global_batch.unit)
            size_reason = "the whole global batch"
        elif size == "auto" and previous_micro_batch is not None:
            previous_tokens = self.tokens_of(previous_micro_batch, step, longest)
            if not self.overrun(previous_tokens):
                size = previous_micro_batch
                size_reason = "from the checkpoint"
        # Where every step has the same tokens, one padded shape serves all micro batches.
        by_examples = size != "auto" and size.unit == "examples"
        has_equal_steps = run.data.pack and train.global_batch.unit == "tokens"
        fixed = compiled and has_equal_steps and not by_examples
        if size == "auto":
            tokens = self.fastest_micro_batch(step, fixed=fixed)
            size_reason = "the fastest in the estimate"
        else:
            tokens = self.tokens_of(size, step, longest)
        memory = self.estimate(tokens)
        least = self.least_bytes(min(tokens, longest), memory.recomputed_layers)
        memory = replace(memory, least=least)
        if not by_examples:
            # A padded row must hold the longest example.
            size = Size(max(tokens, longest) if fixed else tokens, "tokens")
        assert size != "auto"
        recompute_reason = "as train.recompute says"
        if train.recompute == "auto":
            recompute_reason = "as few as fit"
        reference = describe_reference(run)
        why = {
            "attention": machine.attention[1],
            "loss": "head and loss on supervised positions only",
            "base": machine.scaling[1] or "as the recipe says",
            "compile": compile_reason,
            "reference": reference.cost,
            "kernels": "as train.deterministic says",
            "recompute": recompute_reason,
            "weight gradients": "16-bit weights with fp32 masters on one GPU: the products add "
            "them up, unrounded",
            "cpu offload": f"as train.cpu_offload says: {memory.host / 2**30:.1f} GiB of the "
            "host's memory a rank",
            "micro batch": f"{size_reason}: about {memory.total / 2**30:.1f} of "
            f"{memory.free / 2**30:.1f} GiB",
        }
        return RunPlan(
            machine.device,
            machine.attention[0],
            kernel=machine.kernel,
            base=self.scheme.storage(machine.scaling[0], run.model.dtype),
            layers=self.spec.depth,
            reference=reference.what,
            compiled=compiled,
            deterministic=train.deterministic,
            recomputed_layers=memory.recomputed_layers,
            fp32_gradients=self.fp32_gradients,
            cpu_offload=self.moved,
            warnings=self._describe_dense_experts(),
            layout=self._layout(size, tokens, longest, fixed=fixed),
            memory=memory,
            mesh=self.mesh,
            why=why,
        )

    def _describe_dense_experts(self) -> tuple[str, ...]:
        """A line for the user where a base in fp8 leaves experts dense; a warning where it ships
        them in codes.
        """
        spec = self.spec
        model = self.run.model
        if not self.scheme.has_fp8_matmuls or not spec.expert_stacks:
            return ()
        itemsize = DTYPES[model.dtype].itemsize
        base = sum(replace(self, mesh=ONE).weights(itemsize))
        experts = spec.expert_stacks * itemsize
        left = (
            f"model.quantize=fp8 leaves experts in {model.dtype}: {experts / 1e9:.1f} GB of the "
            f"base's {base / 1e9:.1f}"
        )
        if spec.quantized is None or spec.quantized not in KEEPABLE:
            return (f"{left}; to save memory: model.quantize=nf4",)
        run = replace(self.run, model=replace(model, quantize=AS_SHIPPED))
        shipped = sum(replace(self, run=run, mesh=ONE).weights(itemsize))
        return (
            f"warning: {left}, which ships in {spec.quantized.upper()} and takes "
            f"{shipped / 1e9:.1f} GB so; fix: model.quantize={AS_SHIPPED}",
        )

    def _layout(self, size: Size, tokens: int, longest: int, *, fixed: bool) -> MicroBatchLayout:
        """The shapes of micro batches of `size`, which have up to so many tokens."""
        packed = self.run.data.pack
        bucket = self.length_bucket(tokens if packed else longest)
        compiled, _ = self.machine.compiles
        if not compiled:
            return MicroBatchLayout(size, multiple=bucket)
        max_document = ceil_div(longest, DOCUMENT_BLOCK) * DOCUMENT_BLOCK
        if fixed:
            return MicroBatchLayout(size, row_length=size.amount, max_document=max_document)
        multiple = ROW_MULTIPLE if packed else DOCUMENT_BLOCK // 8
        return MicroBatchLayout(size, multiple=max(bucket, multiple), max_document=max_document)

    def length_bucket(self, longest: int) -> int:
        """A power of two: lengths of rows are rounded up to a multiple of it.

        longest: tokens of the longest row.
        """
        if not self.machine.integrated:
            return 1
        # The largest power of two in a LENGTHS-th of the longest row.
        return 1 << max(0, (longest // LENGTHS).bit_length() - 1)

    def estimate(self, tokens: int) -> MemoryEstimate:
        """Memory of a micro batch of `tokens`, padding counted.

        With the fewest recomputed layers that fit.
        """
        run = self.run
        spec = self.spec
        itemsize = DTYPES[run.model.dtype].itemsize
        fixed = self._fixed_bytes
        layers = self._layer_bytes(tokens, itemsize)
        layer_input = ceil_div(spec.hidden, self.mesh.tensor) * itemsize * tokens
        recomputed_layer = 0 if "activations" in self.moved else layer_input
        input_on_host = layer_input - recomputed_layer
        # The last norm's input, and the gradient of its output.
        ends = (spec.hidden + ceil_div(spec.hidden, self.mesh.tensor)) * itemsize * tokens
        if spec.measured:
            outside = measure_activations(spec, run.adapter, run.model.dtype).outside
            ends = int((spec.hidden * itemsize + outside) * tokens)
        backward = self._backward_bytes(tokens, itemsize)
        # The input of the layer that is recomputed comes back from the host.
        workspace = max(self._head_bytes(tokens, itemsize), backward) + input_on_host

        gathered = self._gathered_bytes
        usable = int(self.machine.free_bytes * usable_share(self.machine.device))
        # What is left for activations, of which the layers that recompute keep their inputs.
        room = usable - fixed.base - fixed.adapter - fixed.state - fixed.copies
        room -= gathered + workspace + ends
        recomputed = self._recomputed_layers(room, layers, recomputed_layer)
        # Otherwise the last layer's activations are gone when the first one recomputes.
        if recomputed == spec.depth:
            workspace = max(workspace, backward + max(layers) - recomputed_layer)
        activations = sum(layers[recomputed:]) + recomputed * recomputed_layer + ends
        return MemoryEstimate(
            tokens=tokens,
            recomputed_layers=recomputed,
            weights=fixed.base + fixed.adapter,
            gradients=fixed.gradients,
            # `state` has the gradients in it, which are shown apart.
            optimizer=fixed.state - fixed.gradients,
            copies=fixed.copies,
            gathered=gathered,
            activations=activations,
            recomputed_layer=recomputed_layer,
            workspace=workspace,
            host=fixed.host + input_on_host * recomputed,
            free=self.machine.free_bytes,
        )

    @cached_property
    def _fixed_bytes(self) -> FixedBytes:
        """What a rank holds whatever its micro batch is."""
        run = self.run
        itemsize = DTYPES[run.model.dtype].itemsize
        trained = self.trained_here
        # An adapter's weights are fp32 and not in the base; while its checkpoint is written, they
        # and the moments are there twice.
        width = itemsize
        base_width = itemsize
        adapter = 0
        copies = 0
        if self.trains_adapter:
            width = 4
            adapter = width * trained
            if run.extra_forwards and run.adapter.from_ is not None:
                adapter *= 2  # the reference: the adapter as it came
            copies = 12 * trained
        elif self.sharded and run.train.master_weights == "fp32":
            # Sharded 16-bit weights that are trained in full are fp32, their own masters.
            width = 4
            base_width = width
        base = self.base_bytes(base_width)
        # As the backward makes them: in the dtype of the weights.
        gradients = width * trained
        if self.fp32_gradients:
            gradients += (4 - width) * self.spec.linear_matrices
        # Counts an fp32 gradient, whatever the backward makes.
        state = int(trained * state_bytes_per_parameter(run.train, width))
        host = 0
        if "parameters" in self.moved:
            # The frozen layers wait on the host; embedding, norms and head stay.
            if self.trains_adapter:
                _, outside_layers = self.weights(itemsize)
                host = base - outside_layers
                base = outside_layers
            else:
                # FSDP2 keeps shards, gradients and moments together on the host.
                host = base + state
                base = 0
                state = 0
                gradients = 0
        return FixedBytes(base, adapter, gradients, state, copies, host)

    def _recomputed_layers(self, room: int, layers: Sequence[int], recomputed_layer: int) -> int:
        """How many layers recompute: those that the recipe names, or as few as fit into `room`."""
        recompute = self.run.train.recompute
        if recompute == "auto":
            return fewest_recomputed(room, layers, recomputed_layer)
        if recompute == "none":
            return 0
        if recompute == "full":
            return self.spec.depth
        return min(recompute, self.spec.depth)

    def least_bytes(self, tokens: int, recomputed_layers: int) -> int:
        """What the forward of a micro batch of `tokens` takes in a later step.

        The moments are there, gradients are not.
        """
        run = replace(self.run, train=replace(self.run.train, recompute=recomputed_layers))
        memory = replace(self, run=run).estimate(tokens)
        # The moments are in `total`; the gradients of the step before are dropped.
        return memory.total - memory.gradients - memory.copies

    def _layer_bytes(self, tokens: int, itemsize: int) -> list[int]:
        """What each layer that does not recompute keeps: see the docstring of this file."""
        spec = self.spec
        if not spec.measured:
            return [self._block_bytes(spec.layers[0], tokens, itemsize)] * spec.depth
        saved = measure_activations(spec, self.run.adapter, self.run.model.dtype)
        sizes = []
        for layer, by_token, constant in zip(
            spec.layers, saved.by_token, saved.constant, strict=True
        ):
            size = int(by_token * tokens + constant)
            size += int(self._whole_elements(layer) * tokens) * itemsize
            # A compiler saves what our own modules save; unknown of recurrences and experts.
            is_plain = layer.heads and not layer.state and not layer.experts
            # The compiler does at least as well as our own modules on a plain block.
            if is_plain and self.machine.compiles[0]:
                size = min(size, self._block_bytes(layer, tokens, itemsize))
            elif self.machine.attention[0] == "products" and spec.attention_softcap is None:
                size += int(layer.heads * self.probabilities * tokens) * itemsize
            sizes.append(size)
        return sizes

    def _whole_elements(self, layer: Layer) -> float:
        """What attention keeps more of a token where two sequences share some.

        Queries, keys, values and outputs of whole documents, in place of the first three of the
        row's tokens.
        """
        if self.whole == 1:
            return 0.0
        outputs = layer.heads * layer.value_dim
        inputs = (layer.heads + layer.kv_heads) * layer.head_dim + layer.kv_heads * layer.value_dim
        return ((self.whole - 1) * inputs + self.whole * outputs) / self.mesh.tensor

    def _block_bytes(self, layer: Layer, tokens: int, itemsize: int) -> int:
        """What a Llama-like layer keeps: see the docstring of this file."""
        spec = self.spec
        adapter = self.run.adapter
        tensor = self.mesh.tensor
        family = ARCHITECTURES.get(spec.model_type)
        is_fused = self.machine.compiles[0] or (family is not None and family.all_fused)
        vectors = 3 if is_fused else 4
        # Of what a tensor group keeps, only the normed inputs are whole: gathered before attention
        # and MLP.
        wide = ceil_div(layer.intermediate, tensor)
        # q, and k and v of the key-value heads.
        heads = layer.head_dim * (layer.heads + 2 * layer.kv_heads) // tensor
        # The two normed inputs, then `vectors` of the hidden width and of the MLP's.
        elements: float = 2 * spec.hidden + vectors * (ceil_div(spec.hidden, tensor) + wide) + heads
        if self.machine.attention[0] == "products" and spec.attention_softcap is None:
            elements += layer.heads * self.probabilities / tensor
        elements += self._whole_elements(layer)
        factors = 0
        # X A^T of seven layers; each A and B once more, in the dtype of the products.
        if self.trains_adapter:
            elements += 7 * adapter.rank
            of_layers = replace(adapter, modules_to_save=())
            factors = count_adapter(spec, of_layers, tensor) // spec.depth
        # Each of these layers has an input of its own, and a mask: a byte a number on a GPU.
        if adapter.dropout:
            attention_width = layer.heads * layer.head_dim // tensor
            mask = 1 if self.machine.device == "cpu" else 1 / itemsize
            # Masks of the inputs of q, k, v, gate and up, of o, and of down.
            elements += 3 * spec.hidden + attention_width
            elements += mask * (5 * spec.hidden + attention_width + wide)
        return int(elements * tokens + factors) * itemsize

    def _head_bytes(self, tokens: int, itemsize: int) -> int:
        """A chunk of logits: raw, in fp32, and their raw gradient.

        Of a trained head the fp32 sum of its gradients too, and one chunk's.
        """
        trained = self.run.adapter.kind == "none"
        vocabulary = ceil_div(self.spec.vocab, self.mesh.tensor)
        device = torch.device(self.machine.device)
        card = self.machine.card_bytes
        chunk = min(tokens, chunk_size(vocabulary, tokens, device, trained=trained, card=card))
        hidden = self.spec.hidden if trained else 0
        # fp32 logits are scored in place, and on a CPU all are, a few rows at a time.
        has_wide_logits = itemsize < 4 and device.type != "cpu"
        # Raw logits, and their gradient.
        logits = 2 * itemsize * chunk
        gradients = itemsize * (chunk + hidden)
        if has_wide_logits:
            logits += 4 * chunk
            gradients += itemsize * chunk
        # The fp32 sum of a trained head's gradients is there beside either.
        return vocabulary * (4 * hidden + max(logits, gradients))

    def _backward_bytes(self, tokens: int, itemsize: int) -> int:
        """What the backward of a layer adds to its activations, while no chunk of logits is there.

        Gradients of three hidden vectors, and those of gate, up and their product, as the product
        itself goes; or that of the product beside one weight's gradient, nf4's dense weight,
        or the transposed codes of fp8's.
        """
        hidden = self.spec.hidden
        layer = self.spec.widest
        wide = ceil_div(layer.intermediate, self.mesh.tensor)
        largest = layer.largest
        if not layer.experts:
            largest = ceil_div(largest, self.mesh.tensor)
        weight = self.scheme.backward_elements(largest, itemsize)
        if layer.experts:
            # Of a stack so many experts at a time; a CPU takes one after the other.
            weight = min(weight, DENSE_BYTES // itemsize)
        if self.run.adapter.kind == "none":
            weight = largest
        elements = 3 * hidden * tokens
        gated = wide * tokens + max(wide * tokens, weight)
        copies = layer.experts_per_token * hidden * tokens
        if layer.experts and self.machine.device == "cpu":
            # Gradients of a token's copies, in full two and a half of each, or those of gate, up
            # and their product: one expert comes after the other, and neither waits.
            if self.run.adapter.kind == "none":
                elements += max(gated, 5 * copies // 2)
            else:
                # The activation is computed again there.
                elements += max(gated, copies, 4 * wide * tokens)
        elif layer.experts:
            # Both, as all experts are computed at once; where that is one kernel, copies of the
            # tokens too. Not measured on a GPU.
            elements += gated + (1 + self.machine.grouped_mm) * copies + 2 * wide * tokens
        else:
            elements += gated
        return elements * itemsize

    def base_bytes(self, itemsize: float) -> int:
        """Bytes of the base on one rank; of a frozen one only the layers are sharded."""
        layers, ends = self.weights(itemsize)
        # Scales are buffers, which FSDP2 leaves whole.
        # `layers` has their share of a shard: what is missing of them is added.
        scales = self.scales - self.scales // self.mesh.shard
        if self.trains_adapter:
            return ceil_div(layers, self.mesh.shard) + ends + scales
        return ceil_div(layers + ends, self.mesh.shard) + scales

    @cached_property
    def _gathered_bytes(self) -> int:
        """What is there for a moment beside parameters and gradients of this rank.

        GATHERED_LAYERS, embedding and head of a model trained in full, and gradients on their way
        to the shards. Those of a layer are there in its dtype, and in fp32 on the way; the
        reduction of the layer before may not be complete.
        """
        itemsize = DTYPES[self.run.model.dtype].itemsize
        if not self.sharded:
            if self.mesh.data == 1 or self.trains_adapter:
                return 0
            has_16_bit_gradients = itemsize < 4 and self.run.train.master_weights == "stochastic"
            # The pieces that `parallel/copies.py` sums in fp32 at a time.
            return 4 * GRADIENT_PIECE * MOST_GRADIENT_PIECES if has_16_bit_gradients else 0
        layers, ends = self.weights(itemsize)
        gathered = GATHERED_LAYERS * layers // self.spec.depth
        if self.trains_adapter:
            return gathered
        gathered += (itemsize + 2 * 4) * layers // itemsize // self.spec.depth
        if self.spec.tied:
            return gathered + 2 * ends
        # The head's gradient is reduced at once, beside all activations; the embedding's when they
        # are gone.
        head = ceil_div(self.spec.head_matmul, self.mesh.tensor)
        # Its gathered weight, its gradient, and that in fp32 for the reduction.
        return gathered + head * (2 * itemsize + 4)

    def fastest_micro_batch(self, step: StepSize, *, fixed: bool) -> int:
        """Tokens of the micro batch with the least time, in whole rows; the largest of equal.

        fixed: every micro batch is padded to one size, so that a step should be a whole number of
        them.
        """
        row = self.run.row_tokens
        limit = most_tokens(self.spec, self.machine.device)
        largest = min(limit, math.ceil(step.largest / row) * row)
        largest = max(row, largest // row * row)
        # `min` takes the first of equal ones.
        candidates = range(largest, 0, -row)
        return min(candidates, key=lambda tokens: self._cost(tokens, step, fixed=fixed))

    def _cost(self, tokens: int, step: StepSize, *, fixed: bool) -> float:
        """Time of an optimizer step, in units of one without fixed cost and recompute.

        Huge where it does not fit.
        """
        memory = self.estimate(tokens)
        recomputed = memory.recomputed_layers / self.spec.depth
        work = 1 + RECOMPUTE_COST[self.run.adapter.kind] * recomputed
        micro_batches = math.ceil(step.mean / tokens)
        if fixed:
            # Padding up to the fixed size is computed too.
            work *= micro_batches * tokens / step.mean
        pass_tokens = self.pass_tokens + self.expert_pass_tokens * (1 + recomputed / 2)
        fixed_cost = pass_tokens * micro_batches / step.mean
        # Whatever fits is cheaper than what does not; of these the least overrun is.
        return work + fixed_cost + 1e6 * self._overrun(memory)

    @cached_property
    def pass_tokens(self) -> float:
        """The fixed cost of a forward and backward, in tokens whose products take as long.

        Experts are not counted.
        """
        spec = self.spec
        linear_share = (spec.active - spec.active_of_experts) / spec.active
        # 4: the operations of a token and a weight.
        tokens = self.scheme.traffic_bytes * self._operations_per_byte / 4
        return tokens * linear_share * self._product_share

    @cached_property
    def expert_pass_tokens(self) -> float:
        """As `pass_tokens`, of the experts: a third of it more where a layer recomputes."""
        bytes_of_token = 4 * self.spec.active / self._operations_per_byte
        return self.expert_pass_bytes * self._product_share / bytes_of_token

    @property
    def expert_pass_bytes(self) -> float:
        """Bytes of this rank's experts that one forward and backward reads and makes dense.

        All experts: those of few tokens are read as those of many.
        """
        spec = self.spec
        itemsize = DTYPES[self.run.model.dtype].itemsize
        experts = spec.layer_matrices - spec.linear_matrices
        # The products read dense weights; codes are dequantized first.
        dense_bytes = self.scheme.expert_dense_bytes
        if self.compiles_experts and self.scheme.compiled_dense_bytes:
            dense_bytes = self.scheme.compiled_dense_bytes
        return 2 * (experts * itemsize + spec.expert_stacks * dense_bytes)

    @property
    def compiles_experts(self) -> bool:
        """Whether the experts are in the compiled graph of their layer.

        Those that train in full are Transformers'.
        """
        compiled, _ = self.machine.compiles
        return compiled and self.trains_adapter

    @property
    def expert_traffic(self) -> float:
        """Bytes of a token that the kernels around the products of experts move, both ways."""
        spec = self.spec
        run = self.run
        in_one_kernel = self.machine.grouped_mm and count_expert_adapter(spec, run.adapter)
        of_hidden, of_width = GROUPED_ROWS if in_one_kernel else EXPERT_ROWS
        elements = 0
        for layer in spec.layers:
            if layer.expert_count:
                elements += of_hidden * layer.experts_per_token * spec.hidden
                elements += of_width * layer.intermediate
        return DTYPES[run.model.dtype].itemsize * elements / self.mesh.tensor

    @property
    def _product_share(self) -> float:
        """The share of products in the time of a token; the rest is `expert_traffic`."""
        products = 4 * self.spec.active
        return products / (products + self.expert_traffic * self._operations_per_byte)

    @property
    def _operations_per_byte(self) -> int:
        scheme = self.scheme
        return OPERATIONS_PER_BYTE[self.machine.integrated][scheme.has_fp8_matmuls]

    def tokens_of(self, size: Size, step: StepSize, longest: int) -> int:
        """The most tokens of a micro batch, padding counted.

        longest: tokens of the longest example.
        """
        if size.unit == "tokens":
            return size.amount
        tokens = size.amount * longest  # without packing each row is padded to the longest
        if self.run.data.pack:
            return min(tokens, max(step.largest, longest))
        return tokens

    def overrun(self, tokens: int) -> float:
        """0 where a micro batch fits, else how many times the memory that it may take it needs."""
        return self._overrun(self.estimate(tokens))

    def _overrun(self, memory: MemoryEstimate) -> float:
        needed = memory.activations + memory.workspace
        room = int(memory.free * usable_share(self.machine.device)) - memory.static
        return needed / max(room, 1) if needed > room else 0.0


def fewest_recomputed(room: float, layers: Sequence[int], recomputed_layer: int) -> int:
    """The fewest layers to recompute, the first ones, so that the activations fit; all where they
    never do.

    Args:
        room: bytes for the activations.
        layers: bytes that each layer keeps.
        recomputed_layer: bytes that one keeps if it recomputes.
    """
    missing = sum(layers) - room
    for count, layer in enumerate(layers):
        # Activations minus room: each layer that recomputes takes its saving off.
        if missing <= 0:
            return count
        missing -= layer - recomputed_layer
    return len(layers)
