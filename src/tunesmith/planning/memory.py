"""The memory of a run on one rank, estimated by part.

Activations per token and layer of a Llama-like block, in elements: five vectors of the hidden width
(the block's input, the sum after attention, the two normed inputs, attention's output), q, k and v,
and three of the MLP's width (gate, up, and their product). Where neither a compiler nor our own
modules do the work, one more of each. A recomputed layer keeps its input alone. At 16,384 tokens of
an 8B LoRA run this comes to 68 GiB; 69 were measured on an H200.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from tunesmith.config.schema import Run
from tunesmith.formats.base import DENSE_BYTES
from tunesmith.loss import chunk_size
from tunesmith.model.architectures import ARCHITECTURES
from tunesmith.model.dtypes import DTYPES
from tunesmith.model.spec import Layer, ModelSpec
from tunesmith.optim.adamw import HALF, state_bytes_per_parameter
from tunesmith.parallel.copies import GRADIENT_PIECE, MOST_GRADIENT_PIECES
from tunesmith.parallel.mesh_shape import ONE, MeshShape, needs_fsdp
from tunesmith.planning.measured_layers import (
    count_adapter,
    count_expert_adapter,
    measure_activations,
)
from tunesmith.planning.run_plan import Machine, MemoryEstimate
from tunesmith.quant.schemes import DENSE, Scheme, scheme_of
from tunesmith.runtime.stream import SLOTS
from tunesmith.units import ceil_div

# Layers that FSDP2 has gathered at once: one in use, the next one, and the flat buffer that a
# gather arrives in.
GATHERED_LAYERS = 3
# The share of the free memory that is planned with: the rest is the allocator's, and the estimate's
# error.
USABLE_SHARE = 0.9
# The share of a CPU's free memory that is planned with: a run's resident memory exceeded the
# estimate by up to a quarter there (docs/plan.md).
USABLE_CPU_SHARE = 0.8


@dataclass(frozen=True)
class MemoryEstimator:
    """Estimates the memory of micro batches on one rank.

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

    def estimate(self, tokens: int) -> MemoryEstimate:
        """Memory of a micro batch of `tokens`, padding counted.

        With the fewest recomputed layers that fit.
        """
        run = self.run
        spec = self.spec
        itemsize = self.itemsize
        fixed = self.fixed
        layers = self._layer_bytes(tokens, itemsize)
        layer_input = ceil_div(spec.hidden, self.mesh.tensor) * itemsize * tokens
        recomputed_layer = 0 if "activations" in self.moved else layer_input
        input_on_host = layer_input - recomputed_layer
        # The last norm's input, and the gradient of its output.
        ends = (spec.hidden + ceil_div(spec.hidden, self.mesh.tensor)) * itemsize * tokens
        if spec.measured:
            outside = measure_activations(spec, run.adapter, run.model.dtype).outside
            ends = int((spec.hidden * itemsize + outside) * tokens)
        # A micro batch may be all pictures. What the vision part computes with them is gone before
        # the first layer keeps anything.
        ends += spec.picture_bytes * tokens
        backward = self._backward_bytes(tokens, itemsize)
        # The input of the layer that is recomputed comes back from the host.
        workspace = max(self._head_bytes(tokens, itemsize), backward) + input_on_host

        usable = int(fixed.free * usable_share(self.machine.device))
        # Of the activations the layers that recompute keep their inputs.
        room = usable - fixed.static - workspace - ends
        recomputed = self._recomputed_layers(room, layers, recomputed_layer)
        # Otherwise the last layer's activations are gone when the first one recomputes.
        if recomputed == spec.depth:
            workspace = max(workspace, backward + max(layers) - recomputed_layer)
        memory = replace(
            fixed,
            tokens=tokens,
            recomputed_layers=recomputed,
            activations=sum(layers[recomputed:]) + recomputed * recomputed_layer + ends,
            recomputed_layer=recomputed_layer,
            workspace=workspace,
            host=fixed.host + input_on_host * recomputed,
        )
        if not self.streams:
            return memory
        streamed = self.count_streamed(usable - memory.total)
        kept = self.streamed_bytes * (spec.depth - streamed) // spec.depth
        return replace(
            memory,
            weights=memory.weights + kept - (0 if streamed else self.slot_bytes),
            host=memory.host - kept,
            streamed_layers=streamed,
        )

    def count_streamed(self, room: int) -> int:
        """Count the layers that do not stay on the device, of which as many stay as fit in `room`.

        None stream where all fit in place of the slots, else more than have a slot each, if there
        are as many.
        """
        if self.streamed_bytes - self.slot_bytes <= room:
            return 0
        depth = self.spec.depth
        resident = max(0, room * depth // self.streamed_bytes)
        return min(depth, max(SLOTS + 1, depth - resident))

    def _recomputed_layers(self, room: int, layers: Sequence[int], recomputed_layer: int) -> int:
        """Count the layers that recompute: those of the recipe, or as few as fit into `room`."""
        recompute = self.run.train.recompute
        if recompute == "auto":
            return fewest_recomputed(room, layers, recomputed_layer)
        if recompute == "none":
            return 0
        if recompute == "full":
            return self.spec.depth
        return min(recompute, self.spec.depth)

    def least_bytes(self, tokens: int, recomputed_layers: int) -> int:
        """Estimate what the forward of a micro batch of `tokens` takes in a later step.

        The moments are there, gradients are not.
        """
        run = replace(self.run, train=replace(self.run.train, recompute=recomputed_layers))
        memory = replace(self, run=run).estimate(tokens)
        # The moments are in `total`; the gradients of the step before are dropped.
        return memory.step - memory.gradients

    @property
    def itemsize(self) -> int:
        """Bytes of a number that products compute with."""
        return DTYPES[self.run.model.dtype].itemsize

    @property
    def trains_adapter(self) -> bool:
        return self.run.adapter.kind == "lora"

    @cached_property
    def sharded(self) -> bool:
        """Tell whether the base goes through `fully_shard`."""
        return needs_fsdp(self.run, self.mesh, offload="parameters" in self.moved)

    @property
    def streams(self) -> bool:
        """Tell whether the frozen layers come from the host one by one (`runtime/stream.py`)."""
        return "parameters" in self.moved and self.mesh.world == 1

    @cached_property
    def streamed_bytes(self) -> int:
        """Bytes of the layers' frozen matrices. Scales stay on the device."""
        layers, _ = self.weights(self.itemsize)
        return layers - self.scales

    @property
    def slot_bytes(self) -> int:
        """Bytes of the slots, each for the largest layer."""
        scheme = self.scheme
        width = scheme.weight_bytes or self.itemsize
        expert_width = scheme.expert_bytes or self.itemsize
        sizes = [layer.matmul * width + layer.experts * expert_width for layer in self.spec.layers]
        return round(SLOTS * self.streamed_bytes * (max(sizes) / sum(sizes)))

    @cached_property
    def scheme(self) -> Scheme:
        """Choose how the base is stored: as the recipe says, but dense without its fp8 matmuls."""
        scheme = scheme_of(self.run.model, self.spec.quantized)
        if scheme.has_fp8_matmuls and self.machine.scaling[0] is None:
            return DENSE
        return scheme

    @property
    def fp32_gradients(self) -> bool:
        """Tell whether linear layers add up their weights' gradients in fp32: wherever that works.

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
        """List what is offloaded to the host."""
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
        """Bytes of a base's scales on a tensor-parallel rank."""
        linears = self.spec.linear_matrices * self.scheme.scale_bytes / self.mesh.tensor
        return int(linears + self.spec.expert_stacks * self.scheme.expert_scale_bytes)

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
    def fixed(self) -> MemoryEstimate:
        """Estimate what a rank holds whatever its micro batch is."""
        run = self.run
        trained = self.trained_here
        # An adapter's weights are fp32 and not in the base; while its checkpoint is written, they
        # and the moments are there twice.
        width = self.itemsize
        base_width = width
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
        if self.streams:
            host = self.streamed_bytes
            base += self.slot_bytes - host
        elif "parameters" in self.moved:
            # The frozen layers wait on the host; embedding, norms and head stay.
            if self.trains_adapter:
                _, outside_layers = self.weights(self.itemsize)
                host = base - outside_layers
                base = outside_layers
            else:
                # FSDP2 keeps shards, gradients and moments together on the host.
                host = base + state
                base = 0
                state = 0
                gradients = 0
        return MemoryEstimate(
            weights=base + adapter + self.spec.vision_parameters * self.itemsize,
            gradients=gradients,
            # `state` has the gradients in it, which are shown apart.
            optimizer=state - gradients,
            copies=copies,
            gathered=self._gathered_bytes(),
            host=host,
            free=self.machine.free_bytes,
        )

    def _gathered_bytes(self) -> int:
        """Estimate what is there for a moment beside parameters and gradients of this rank.

        GATHERED_LAYERS, embedding and head of a model trained in full, and gradients on their way
        to the shards. Those of a layer are there in its dtype, and in fp32 on the way; the
        reduction of the layer before may not be complete.
        """
        itemsize = self.itemsize
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

    def _layer_bytes(self, tokens: int, itemsize: int) -> list[int]:
        """Estimate what each layer without recompute keeps: see the docstring of this file."""
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
        """Count what attention keeps more of a token where two sequences share some.

        Queries, keys, values and outputs of whole documents, in place of the first three of the
        row's tokens.
        """
        if self.whole == 1:
            return 0.0
        outputs = layer.heads * layer.value_dim
        inputs = (layer.heads + layer.kv_heads) * layer.head_dim + layer.kv_heads * layer.value_dim
        return ((self.whole - 1) * inputs + self.whole * outputs) / self.mesh.tensor

    def _block_bytes(self, layer: Layer, tokens: int, itemsize: int) -> int:
        """Estimate what a Llama-like layer keeps: see the docstring of this file."""
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
        """Estimate what the backward of a layer adds to its activations, while no chunk of logits
        is there.

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

    def overrun(self, memory: MemoryEstimate) -> float:
        """0 where a micro batch fits, else how many times the memory that it may take it needs."""
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


def usable_share(device: str) -> float:
    """The share of a device's free memory to plan with."""
    return USABLE_CPU_SHARE if device == "cpu" else USABLE_SHARE


def moved_to_host(run: Run, machine: Machine) -> tuple[str, ...]:
    """List what `train.cpu_offload` has an effect on."""
    return run.train.cpu_offload if machine.device.startswith("cuda") else ()
