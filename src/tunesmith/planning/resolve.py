"""Resolve what `auto` means on a machine: compile, attention backend, micro batch, and how many layers recompute.

Micro batch and recompute are chosen together, for the least time: a larger micro batch spreads the fixed cost of a
forward and backward, a smaller one leaves memory for activations. `recompute.py` corrects the estimate on a GPU.

Activations per token and layer of a Llama-like block, in elements: five vectors of the hidden width (the block's input, the
sum after attention, the two normed inputs, attention's output), q, k and v, and three of the MLP's width (gate, up, and
their product). Where neither a compiler nor our own modules do the work, one more of each. A recomputed layer keeps its
input alone. At 16,384 tokens of an 8B LoRA run this comes to 68 GiB; 69 were measured on an H200.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from tunesmith.config.schema import Run
from tunesmith.data.schedule import StepSize
from tunesmith.loss import card_bytes, chunk_size
from tunesmith.model import attention
from tunesmith.model.architectures import ARCHITECTURES
from tunesmith.model.dtypes import DTYPES
from tunesmith.model.spec import ModelSpec, adapter_parameters
from tunesmith.optim.adamw import HALF, checkpoint_bytes_per_parameter, state_bytes_per_parameter
from tunesmith.parallel.copies import GRADIENT_PIECE, GRADIENT_PIECES
from tunesmith.parallel.mesh_shape import ONE, MeshShape, needs_fsdp
from tunesmith.planning.run_plan import Machine, MemoryEstimate, MicroBatchLayout, RunPlan
from tunesmith.planning.savings import USABLE_ON_CPU, find_savings, moved_to_host, refuse_offload
from tunesmith.quant.schemes import DENSE, Scheme, scheme_of
from tunesmith.runtime import compilation
from tunesmith.runtime.device import free_memory, host_budget, is_integrated
from tunesmith.runtime.host import return_freed_memory
from tunesmith.units import Size

if TYPE_CHECKING:
    # With Transformers, which a plan can do without
    from tunesmith.hub.model_files import (
        ModelFiles,
    )

MAX_TOKENS = {"cuda": 16384, "cpu": 4096}  # a larger micro batch is not faster
USABLE = (
    0.9  # of the free memory, to plan with: the rest is the allocator's, and the estimate's error
)
# Operations in the time of a byte: an H200 reaches 700 TFLOP/s (in 8 bits twice that) and 4 TB/s, and other discrete cards
# lie between 150 and 300; a GB10 92 (in 8 bits 188) and 226 GB/s. So a pass over 70B in nf4 costs as much as 396 tokens on
# an H200 and as 922 on a GB10, which prefers larger micro batches.
# By Machine.integrated: in 16 bits, in 8 bits
OPERATIONS_PER_BYTE = {
    False: (175, 350),
    True: (407, 832),
}
# Layers that FSDP2 has gathered at once: one in use, the next one, and the flat buffer that a gather arrives in.
GATHERED_LAYERS = 3
# A second forward, as a share of a step: 2 of 6 operations, or of 4
RECOMPUTE_COST = {
    "none": 1 / 3,
    "lora": 1 / 2,
}
# Compiled graphs: rows of varied steps are padded to a multiple of so many tokens, a hundredth of a usual step...
ROW_MULTIPLE = 128
# Without expandable segments (device.prepare_allocator) each length leaves blocks of its own in the allocator, which no other
# length fits. So rows of varied steps are padded to one of at least so many lengths, and fewer than twice as many.
LENGTHS = 16
# ... and the longest document is stated in blocks of the attention kernel.
DOCUMENT_BLOCK = 128


def attention_backend(run: Run, files: ModelFiles, device: torch.device) -> tuple[str, str]:
    """How attention is computed in a run (`eager`: by Transformers, on padded rows), and why."""
    if run.model.attention == "eager":
        return "eager", "as model.attention says"
    softcap, dtype = files.spec.attention_softcap is not None, DTYPES[run.model.dtype]
    return attention.select_attention_backend(device, dtype, files.spec.head_dim, softcap=softcap)


def probe_machine(
    run: Run,
    files: ModelFiles,
    device: torch.device,
    shapes: Sequence[tuple[int, int]] = (),
    ranks: Collection[int] = (),
) -> Machine:
    """What this machine has for a run, found by trying: backends, compiler, memory, 8-bit matmuls.

    `shapes` are those of `eight_bit.eight_bit_shapes`, tried with many rows, few and one. `ranks` are the process ids of the
    run's ranks on this host, which share its memory.
    """
    # Before the products are tried: torch keeps their memory, for the model to use.
    if device.type == "cpu":
        return_freed_memory()  # of reading the rows and the model's files
        free, size, limit = host_budget(ranks)
    else:
        free, size, limit = free_memory(device), card_bytes(device), None
    scaling = scheme_of(run.model).select_scaling(device, shapes)
    backend, compiles = (
        attention_backend(run, files, device),
        compilation.select_compile(run.train.compile, device),
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return Machine(
        str(device), free, backend, compiles, scaling, size, is_integrated(device), name, limit
    )


def inference_plan(run: Run, files: ModelFiles, device: torch.device) -> RunPlan:
    """The plan of a model that is only asked: nothing compiled or recomputed, no base in 8 bits."""
    return RunPlan(
        str(device), attention_backend(run, files, device)[0], run.model.dtype, files.spec.layers
    )


def resolve_plan(
    run: Run,
    spec: ModelSpec,
    machine: Machine,
    *,
    trained: int,
    step: StepSize,
    longest: int,
    probabilities: float = 0.0,
    before: Size | None = None,
    mesh: MeshShape = ONE,
) -> RunPlan:
    """Resolve every `auto` of a recipe by what the machine has, whether it fits or not.

    `trained` counts trained parameters, `step` the tokens of an optimizer step, both of all ranks; `longest` those of the
    longest example; `probabilities` as in `MemoryEstimator`. `auto` keeps the micro batch that a resumed run had `before`
    while it fits: dropout and the order of sums depend on it. `machine` and the plan are those of each rank of the `mesh`.
    """

    def plan_of(changed: Run) -> RunPlan:
        """The plan of a recipe that differs in what `find_savings` changes."""
        count = (
            trained
            if changed.adapter.kind == run.adapter.kind
            else adapter_parameters(spec, changed.adapter)
        )
        share = changed.train.global_batch.amount / run.train.global_batch.amount
        size = rank_step(
            changed, StepSize(step.mean * share, math.ceil(step.largest * share)), mesh
        )
        estimator = MemoryEstimator(changed, spec, machine, count, mesh, probabilities)
        return estimator.plan(size, min(longest, changed.data.seq_len), before)

    refuse_offload(run, machine, mesh)
    plan = plan_of(run)
    # Less than a tenth would not be worth a change.
    below = min(int(plan.memory.free * usable_share(machine.device)), plan.memory.total * 9 // 10)
    return replace(
        plan, savings=partial(find_savings, run, plan, plan_of, below=below, longest=longest)
    )


def usable_share(device: str) -> float:
    """The share of a device's free memory to plan with."""
    return USABLE_ON_CPU if device == "cpu" else USABLE


def checkpoint_bytes(run: Run, trained: int) -> tuple[int, int]:
    """Bytes of one checkpoint of `trained` parameters on the disk, and how many checkpoints may be there at once."""
    width = 4 if run.adapter.kind == "lora" else DTYPES[run.model.dtype].itemsize
    size = int(trained * (width + checkpoint_bytes_per_parameter(run.train, width)))
    return size, run.checkpoint.keep + 3  # the one being written, the best one, and final/


def step_units(run: Run) -> int:
    """What an optimizer step has, and no rank shares with another: examples, or packed rows where tokens are counted."""
    size = run.train.global_batch
    return size.amount if size.unit == "examples" else max(1, size.amount // run.data.seq_len)


def rank_step(run: Run, step: StepSize, mesh: MeshShape) -> StepSize:
    """What the busiest data rank takes of a step."""
    units = step_units(run)
    share = -(-units // mesh.data) / units
    return StepSize(step.mean * share, math.ceil(step.largest * share))


@dataclass(frozen=True)
class MemoryEstimator:
    """Estimates memory and time of one micro batch on one rank; `trained` counts the trained parameters of all.

    `probabilities`: those of attention that a head keeps of a token, on average (`documents.kept_probabilities`).
    """

    run: Run
    spec: ModelSpec
    machine: Machine
    trained: int
    mesh: MeshShape = ONE
    probabilities: float = 0.0

    @property
    def sharded(self) -> bool:
        """Whether the base goes through `fully_shard`."""
        return needs_fsdp(self.run, self.mesh, offload="parameters" in self.moved)

    @property
    def scheme(self) -> Scheme:
        """How the base is stored: as the recipe says, but dense where the machine lacks fp8 matmuls."""
        scheme = scheme_of(self.run.model)
        if scheme.has_fp8_matmuls and self.machine.scaling[0] is None:
            return DENSE
        return scheme

    @property
    def fp32_gradients(self) -> bool:
        """Whether linear layers add up their weights' gradients in fp32: wherever that works.

        It does for 16-bit weights with fp32 masters, trained in full on one GPU. Several ranks reduce the gradients that
        autograd makes; an update in the backward frees each gradient at once; on a CPU no product of 16-bit matrices adds
        into an fp32 one.
        """
        train = self.run.train
        has_masters = DTYPES[self.run.model.dtype] in HALF and train.master_weights == "fp32"
        in_full = self.run.adapter.kind == "none" and not train.optimizer_in_backward
        return (
            has_masters
            and in_full
            and self.mesh.world == 1
            and self.machine.device.startswith("cuda")
        )

    @property
    def moved(self) -> tuple[str, ...]:
        """What is offloaded to the host."""
        return moved_to_host(self.run, self.machine)

    def weights(self, itemsize: float) -> tuple[int, int]:
        """Bytes of the base that a tensor-parallel rank computes with: of all layers' matrices, and of what else there is.

        Tensor-parallel ranks cut everything but norms and biases. The scales of a base in fp8, 4 bytes a row, are not
        counted.
        """
        spec, cut = self.spec, self.mesh.tensor
        matrices, tables = (
            spec.layers * spec.layer_matmul,
            spec.head_matmul * (1 if spec.tied else 2),
        )
        rest, width = spec.parameters - matrices - tables, self.scheme.weight_bytes
        if width is None:
            width = itemsize
        return int(-(-matrices // cut) * width) + self.scales, int(
            (-(-tables // cut) + rest) * itemsize
        )

    @property
    def scales(self) -> int:
        """Bytes of a base's scales on a tensor-parallel rank.

        Those of o and down, which are cut along their inputs, are no longer in one piece, and in fp32.
        """
        spec, cut, scheme = self.spec, self.mesh.tensor, self.scheme
        if not scheme.scale_bytes:
            return 0
        columns = (
            spec.layers * spec.hidden * (spec.heads * spec.head_dim + spec.intermediate) * (cut > 1)
        )
        rows = spec.layers * spec.layer_matmul - columns
        return int((rows * scheme.scale_bytes + columns * 4 / scheme.block) / cut)

    @property
    def trained_here(self) -> int:
        """Trained parameters of one rank. Those of an adapter are whole on every data rank, all others are sharded."""
        cut, adapter = self.mesh.tensor, self.run.adapter
        if adapter.kind == "lora":
            return (
                self.trained
                - adapter_parameters(self.spec, adapter)
                + adapter_parameters(self.spec, adapter, cut)
            )
        return -(-sum(self.weights(1)) * self.trained // (self.spec.parameters * self.mesh.shard))

    def plan(self, step: StepSize, longest: int, before: Size | None) -> RunPlan:
        """The plan of a rank whose share of a step is `step`, whether it fits or not."""
        run, machine, train, (compiled, compile_why) = (
            self.run,
            self.machine,
            self.run.train,
            self.machine.compiles,
        )
        size, why = train.micro_batch, "as train.micro_batch says"
        # An update in the backward leaves no place for a second micro batch
        if train.optimizer_in_backward:
            size = Size(-(-train.global_batch.amount // self.mesh.data), train.global_batch.unit)
            why = "the whole global batch"
        elif (
            size == "auto"
            and before is not None
            and not self.overrun(self.tokens_of(before, step, longest))
        ):
            size, why = before, "that of the checkpoint"
        by_examples = size != "auto" and size.unit == "examples"
        # Where every step has the same tokens, one padded shape serves all micro batches.
        fixed = (
            compiled and run.data.pack and train.global_batch.unit == "tokens" and not by_examples
        )
        if size == "auto":
            tokens, why = (
                self.fastest_micro_batch(step, fixed=fixed),
                "the least time by the estimate",
            )
        else:
            tokens = self.tokens_of(size, step, longest)
        memory = self.estimate(tokens)
        memory = replace(
            memory, least=self.least_bytes(min(tokens, longest), memory.recomputed_layers)
        )
        if size == "auto" or size.unit == "tokens":
            size = Size(max(tokens, longest) if fixed else tokens, "tokens")
        bucket = self.length_bucket(tokens if run.data.pack else longest)
        layout = MicroBatchLayout(size, multiple=bucket)
        if compiled:
            multiple = (
                1 if fixed else max(bucket, ROW_MULTIPLE if run.data.pack else DOCUMENT_BLOCK // 8)
            )
            bound = -(-longest // DOCUMENT_BLOCK) * DOCUMENT_BLOCK
            layout = MicroBatchLayout(
                size, pad_to=size.amount if fixed else None, multiple=multiple, bound=bound
            )
        base = self.scheme.storage(machine.scaling[0], run.model.dtype)
        return RunPlan(
            machine.device, machine.attention[0], base, self.spec.layers, compiled, train.deterministic,
            memory.recomputed_layers, self.fp32_gradients, self.moved, layout=layout, memory=memory, mesh=self.mesh,
            why={
                "attention": machine.attention[1],
                "loss": "head and loss on supervised positions alone",
                "base": machine.scaling[1] or "as the recipe says",
                "compile": compile_why,
                "kernels": "as train.deterministic says",
                "recompute": "as few as fit" if train.recompute == "auto" else "as train.recompute says",
                "weight gradients": "16-bit weights with fp32 masters on one GPU: the products add them up, unrounded",
                "cpu offload": f"as train.cpu_offload says: {memory.host / 2**30:.1f} GiB of the host's memory a rank",
                "micro batch": f"{why}: about {memory.total / 2**30:.1f} of {memory.free / 2**30:.1f} GiB",
            },
        )  # fmt: skip

    def length_bucket(self, longest: int) -> int:
        """The power of two that lengths of rows, `longest` tokens at most, are rounded up to a multiple of."""
        if not self.machine.integrated:
            return 1
        return 1 << max(0, (longest // LENGTHS).bit_length() - 1)

    def estimate(self, tokens: int) -> MemoryEstimate:
        """Memory of a micro batch of `tokens`, padding counted, with the fewest recomputed layers that fit."""
        run, spec, cut, itemsize = (
            self.run,
            self.spec,
            self.mesh.tensor,
            DTYPES[self.run.model.dtype].itemsize,
        )
        lora, trained = run.adapter.kind == "lora", self.trained_here
        # Sharded 16-bit weights that are trained in full are fp32, their own masters.
        masters = self.sharded and not lora and run.train.master_weights == "fp32"
        # An adapter's weights are fp32 and not in the base; while its checkpoint is written, they and the moments are
        # there twice.
        width, copies = (4, 12 * trained) if lora else (4 if masters else itemsize, 0)
        base = self.base_bytes(width if masters else itemsize)
        adapter = width * trained * lora
        gradients = width * trained
        if self.fp32_gradients:
            gradients += (4 - width) * spec.layers * spec.layer_matmul
        state, host = int(trained * state_bytes_per_parameter(run.train, width)), 0
        gathered = self.gathered_bytes(itemsize)
        if "parameters" in self.moved:
            _, outside_layers = self.weights(itemsize)
            staying = outside_layers if lora else 0
            host = base - staying
            base = staying
            if not lora:
                host, state, gradients = host + state, 0, 0

        layer = self._layer_bytes(tokens, itemsize)
        layer_input = -(-spec.hidden // cut) * itemsize * tokens
        recomputed_layer = 0 if "activations" in self.moved else layer_input
        # The last norm's input, and the gradient of its output.
        ends = (spec.hidden + -(-spec.hidden // cut)) * itemsize * tokens
        workspace = max(self._head_bytes(tokens, itemsize), self._backward_bytes(tokens, itemsize))
        workspace += layer_input - recomputed_layer  # of the layer that is recomputed

        room = (
            int(self.machine.free_bytes * usable_share(self.machine.device))
            - base
            - adapter
            - state
            - copies
            - gathered
            - workspace
            - ends
        )
        named = {
            "auto": fewest_recomputed(room, spec.layers, layer, recomputed_layer),
            "none": 0,
            "full": spec.layers,
        }
        given = run.train.recompute
        recomputed = min(given if isinstance(given, int) else named[given], spec.layers)
        # Otherwise the last layer's activations are gone when the first one recomputes
        if recomputed == spec.layers:
            again = self._backward_bytes(tokens, itemsize) + layer - recomputed_layer
            workspace = max(workspace, again)
        return MemoryEstimate(
            tokens=tokens, recomputed_layers=recomputed, weights=base + adapter, gradients=gradients,
            optimizer=state - gradients, copies=copies, gathered=gathered,
            activations=(spec.layers - recomputed) * layer + recomputed * recomputed_layer + ends,
            recomputed_layer=recomputed_layer, workspace=workspace,
            host=host + (layer_input - recomputed_layer) * recomputed, free=self.machine.free_bytes,
        )  # fmt: skip

    def least_bytes(self, tokens: int, recomputed_layers: int) -> int:
        """What the forward of a micro batch of `tokens` takes in a later step: the moments are there, gradients are not."""
        run = replace(self.run, train=replace(self.run.train, recompute=recomputed_layers))
        memory = replace(self, run=run).estimate(tokens)
        return memory.total - memory.gradients - memory.copies

    def _layer_bytes(self, tokens: int, itemsize: int) -> int:
        """What a layer that does not recompute keeps for the backward: see the docstring of this file."""
        spec, adapter, cut = self.spec, self.run.adapter, self.mesh.tensor
        family = ARCHITECTURES.get(spec.model_type)
        more = 0 if self.machine.compiles[0] or (family is not None and family.fused) else 1
        # Of what a tensor group keeps, only the normed inputs are whole: gathered before attention and MLP.
        wide, heads = (
            -(-spec.intermediate // cut),
            spec.head_dim * (spec.heads + 2 * spec.kv_heads) // cut,
        )
        kept: float = 2 * spec.hidden + (3 + more) * (-(-spec.hidden // cut) + wide) + heads
        if self.machine.attention[0] == "products" and spec.attention_softcap is None:
            kept += spec.heads * self.probabilities / cut
        factors = 0
        # X A^T of seven layers; each A and B once more, in the dtype of the products
        if adapter.kind == "lora":
            kept += 7 * adapter.rank
            factors = (
                adapter_parameters(spec, replace(adapter, modules_to_save=()), cut) // spec.layers
            )
        # Each of these layers has an input of its own, and a mask: a byte a number on a GPU
        if adapter.dropout:
            outs, mask = (
                spec.heads * spec.head_dim // cut,
                1 if self.machine.device == "cpu" else 1 / itemsize,
            )
            kept += 3 * spec.hidden + outs + mask * (5 * spec.hidden + outs + wide)
        return int(kept * tokens + factors) * itemsize

    def _head_bytes(self, tokens: int, itemsize: int) -> int:
        """A chunk of logits: raw, in fp32, and their raw gradient; of a trained head the fp32 sum of its gradients too, and
        one chunk's."""
        trained, vocabulary = (
            self.run.adapter.kind == "none",
            -(-self.spec.vocab // self.mesh.tensor),
        )
        device, card = torch.device(self.machine.device), self.machine.card_bytes
        chunk = min(tokens, chunk_size(vocabulary, tokens, device, trained=trained, card=card))
        # fp32 logits are scored in place, and on a CPU all are, a few rows at a time.
        half, hidden = itemsize < 4 and device.type != "cpu", self.spec.hidden * trained
        logits = (2 * itemsize + 4 * half) * chunk
        return vocabulary * (4 * hidden + max(logits, itemsize * ((1 + half) * chunk + hidden)))

    def _backward_bytes(self, tokens: int, itemsize: int) -> int:
        """What the backward of a layer adds to its activations, while no chunk of logits is there.

        Gradients of three hidden vectors, and those of gate, up and their product, as the product itself goes; or that of
        the product beside one weight's gradient, nf4's weight made dense, or the transposed codes of fp8's.
        """
        hidden, wide = self.spec.hidden, -(-self.spec.intermediate // self.mesh.tensor)
        weight = self.scheme.backward_elements(hidden * wide, itemsize)
        if self.run.adapter.kind == "none":
            weight = hidden * wide
        return (3 * hidden * tokens + wide * tokens + max(wide * tokens, weight)) * itemsize

    def base_bytes(self, itemsize: float) -> int:
        """Bytes of the base on one rank; of a frozen one only the layers are sharded."""
        layers, ends = self.weights(itemsize)
        scales = self.scales - self.scales // self.mesh.shard  # buffers, which FSDP2 leaves whole
        if self.run.adapter.kind == "lora":
            return -(-layers // self.mesh.shard) + ends + scales
        return -(-(layers + ends) // self.mesh.shard) + scales

    def gathered_bytes(self, itemsize: int) -> int:
        """What is there for a moment beside parameters and gradients of this rank: GATHERED_LAYERS, embedding and head of a
        model trained in full, and gradients on their way to the shards.

        Those of a layer are there in its dtype, and in fp32 on the way; the reduction of the layer before may not be done.
        """
        layers, ends = self.weights(itemsize)
        lora = self.run.adapter.kind == "lora"
        if not self.sharded:
            has_sixteen_bits = itemsize < 4 and self.run.train.master_weights == "stochastic"
            is_summed = self.mesh.data > 1 and not lora and has_sixteen_bits
            return 4 * GRADIENT_PIECE * GRADIENT_PIECES * is_summed
        gathered = GATHERED_LAYERS * layers // self.spec.layers
        if lora:
            return gathered
        gradients = (itemsize + 2 * 4) * layers // itemsize // self.spec.layers
        if self.spec.tied:
            return gathered + gradients + 2 * ends
        # The head's gradient is reduced at once, beside all activations; the embedding's when they are gone.
        head = -(-self.spec.head_matmul // self.mesh.tensor)
        return gathered + gradients + head * (2 * itemsize + 4)

    def fastest_micro_batch(self, step: StepSize, *, fixed: bool) -> int:
        """Tokens of the micro batch with the least time, in whole `seq_len`; the largest of equal ones.

        `fixed`: every micro batch is padded to one size, so that a step should be a whole number of them.
        """
        seq = self.run.data.seq_len
        limit = MAX_TOKENS[torch.device(self.machine.device).type]
        most = max(seq, min(limit, math.ceil(step.largest / seq) * seq))
        return min(
            range(most // seq * seq, 0, -seq),
            key=lambda tokens: self._cost(tokens, step, fixed=fixed),
        )

    def _cost(self, tokens: int, step: StepSize, *, fixed: bool) -> float:
        """Time of an optimizer step, in units of one without fixed cost and recompute; huge where it does not fit."""
        memory = self.estimate(tokens)
        work = (
            1 + RECOMPUTE_COST[self.run.adapter.kind] * memory.recomputed_layers / self.spec.layers
        )
        micro_batches = math.ceil(step.mean / tokens)
        padded = micro_batches * tokens / step.mean if fixed else 1.0
        return (
            work * padded
            + self.pass_tokens * micro_batches / step.mean
            + 1e6 * self.overrun(tokens)
        )

    @property
    def pass_tokens(self) -> float:
        """The fixed cost of a forward and backward, in tokens whose products take as long."""
        scheme = self.scheme
        operations = OPERATIONS_PER_BYTE[self.machine.integrated][scheme.has_fp8_matmuls]
        return scheme.traffic_bytes * operations / 4  # the operations of a token

    def tokens_of(self, size: Size, step: StepSize, longest: int) -> int:
        """The most tokens of a micro batch, padding counted, where the longest example has `longest`."""
        if size.unit == "tokens":
            return size.amount
        rows = size.amount * longest  # without packing each is padded to the longest
        return min(rows, max(step.largest, longest)) if self.run.data.pack else rows

    def overrun(self, tokens: int) -> float:
        """0 where a micro batch fits, else how many times the memory that it may take it needs."""
        memory = self.estimate(tokens)
        needed = memory.activations + memory.workspace
        room = int(memory.free * usable_share(self.machine.device)) - memory.static
        return needed / max(room, 1) if needed > room else 0.0


def fewest_recomputed(room: float, layers: int, layer: int, recomputed_layer: int) -> int:
    """The fewest of `layers` to recompute so that the activations fit into `room` bytes; all where they never do.

    `layer` and `recomputed_layer` are the bytes that one layer keeps, and keeps if it recomputes.
    """
    return min(layers, max(0, math.ceil((layers * layer - room) / (layer - recomputed_layer))))
