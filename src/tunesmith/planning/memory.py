"""Estimate of a run's memory on one rank, by part.

Activations per token and layer of a Llama-like block, in elements: five vectors of the hidden size
(the block's input, the sum after attention, the two normed inputs, the attention output), q, k and
v, and three vectors of the MLP's intermediate size (gate, up, and their product). If neither a
compiler nor tunesmith's fused modules are used, one more vector of each of the two sizes is saved.
A recomputed layer saves only its input. For example, for an 8B LoRA run with 16,384 tokens, the
estimate is 68 GiB; 69 GiB were measured on an H200.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from tunesmith.config.schema import Run
from tunesmith.formats.base import DENSE_BYTES
from tunesmith.loss import chunk_size
from tunesmith.model.arch.spec import Layer, ModelSpec
from tunesmith.model.known.architectures import ARCHITECTURES
from tunesmith.model.known.dtypes import DTYPES
from tunesmith.model.layers.slots import ANSWERS_AT_ONCE, answers_at_once
from tunesmith.optim.adamw import HALF, state_bytes_per_parameter
from tunesmith.parallel.copies import GRADIENT_PIECE, MAX_GRADIENT_PIECES
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

# Number of layers whose gathered weights are in memory at the same time with FSDP2: the current
# layer, the next layer, and the flat buffer that receives a gather.
GATHERED_LAYERS = 3
# Bytes per logit while a token is drawn: the logits, their exponentials and probabilities in fp32,
# and the cumulated probabilities in fp64.
LOGIT_BYTES = 24
# Fraction of the free memory that the plan uses. The rest is for the allocator and for errors of
# the estimate.
USABLE_SHARE = 0.9
# Fraction of a CPU's free memory that the plan uses. The resident memory of runs exceeded the
# estimate by up to a quarter (docs/plan.md).
USABLE_CPU_SHARE = 0.8


@dataclass(frozen=True)
class MemoryEstimator:
    """Estimates the memory of micro batches on one rank.

    Values that do not depend on the micro batch are computed once, because hundreds of sizes are
    compared.

    Attributes:
        trained: number of trained parameters of the whole model.
        probabilities: mean number of attention probabilities that a head saves per token
            (`documents.count_saved_probabilities`).
        whole: tokens in attention per computed token (`Workload.whole`). More than 1 if sequences
            share their prompt.
        longest: tokens of the longest prompt with a sampled answer. `data.seq_len` is the maximum.
    """

    run: Run
    spec: ModelSpec
    machine: Machine
    trained: int
    mesh: MeshShape = ONE
    probabilities: float = 0.0
    whole: float = 1.0
    longest: int = sys.maxsize

    def estimate(self, tokens: int) -> MemoryEstimate:
        """Estimate the memory of a micro batch of `tokens` tokens, including padding.

        If the recipe does not set the number of recomputed layers, the minimum number that fits is
        used.
        """
        spec = self.spec
        itemsize = self.itemsize
        fixed = self.fixed
        layers = self._layer_bytes(tokens, itemsize)
        hidden = ceil_div(spec.hidden, self.mesh.tensor)
        layer_input = hidden * itemsize * tokens
        input_on_host = layer_input if "activations" in self.moved else 0
        recomputed_layer = layer_input - input_on_host
        # Bytes for the input of the last norm, and for the gradient of its output.
        ends = (spec.hidden + hidden) * itemsize * tokens
        if spec.measured:
            saved = measure_activations(spec, self.run.adapter, self.run.model.dtype)
            ends = int((spec.hidden * itemsize + saved.outside) * tokens)
        # Count the pixel arrays as if all tokens were picture tokens. The vision model's workspace
        # is freed before the first layer saves activations, so it is not counted.
        ends += spec.picture_bytes * tokens
        backward = self._backward_bytes(tokens, itemsize)
        # If layer inputs are offloaded, the input of the layer being recomputed is copied back from
        # the host.
        workspace = max(self._head_bytes(tokens, itemsize), backward) + input_on_host

        usable = int(fixed.free * usable_share(self.machine.device))
        # `room` is for the activations, which include the inputs that recomputed layers save.
        room = usable - fixed.static - workspace - ends
        recomputed = self._recomputed_layers(room, layers, recomputed_layer)
        # The backward frees the activations of layers that are not recomputed before the first
        # recomputation, so this memory is reused. If all layers are recomputed, the activations of
        # one layer are needed in addition.
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
        """Return the number of layers to stream from the host. `room` is the number of bytes on the
        device that are left for layers, after the slots (buffers for streamed layers) are
        allocated.

        Return 0 if all layers fit, because then no slots are needed. Otherwise return at least
        SLOTS + 1.
        """
        if self.streamed_bytes - self.slot_bytes <= room:
            return 0
        depth = self.spec.depth
        resident = max(0, room * depth // self.streamed_bytes)
        return min(depth, max(SLOTS + 1, depth - resident))

    def _recomputed_layers(self, room: int, layers: Sequence[int], recomputed_layer: int) -> int:
        """Return the number of layers to recompute. If the recipe has `auto`, this is the minimum
        with which the activations fit into `room` bytes.
        """
        recompute = self.run.train.recompute
        if recompute == "auto":
            return min_recomputed(room, layers, recomputed_layer)
        if recompute == "none":
            return 0
        return len(layers) if recompute == "full" else min(recompute, len(layers))

    def _rollouts(self, fixed: MemoryEstimate) -> tuple[int, int]:
        """Return the bytes of the keys and values of sampled answers, and the total bytes while
        answers are sampled. Both are 0 if the method samples no answers.
        """
        if not self.run.samples_answers:
            return 0, 0
        spec = self.spec
        # A validation samples ANSWERS_AT_ONCE answers, one to each prompt.
        answers = max(answers_at_once(self.run.method.group), ANSWERS_AT_ONCE)
        width = sum(layer.kv_heads * (layer.head_dim + layer.value_dim) for layer in spec.layers)
        room = min(self.longest, self.run.data.seq_len)
        slots = answers * room * width * self.itemsize
        # Sharded weights are gathered once for all tokens.
        gathered = sum(self.weights(self.itemsize)) if self.sharded else 0
        logits = answers * spec.head_matmul // spec.hidden * LOGIT_BYTES
        # While prompts are computed, about three vectors of the widest layer exist for each token.
        prompts = answers * max(1, room - self.run.method.answer_tokens)
        widest = 3 * max(layer.intermediate for layer in spec.layers)
        temporary = max(logits, prompts * widest * self.itemsize)
        return slots, fixed.weights + gathered + fixed.optimizer + slots + temporary

    def min_step_bytes(self, tokens: int, recomputed_layers: int) -> int:
        """Estimate the bytes that the forward of a micro batch needs in a step after the first one.

        The optimizer's moments already exist at this time, but there are no gradients.
        """
        run = replace(self.run, train=replace(self.run.train, recompute=recomputed_layers))
        memory = replace(self, run=run).estimate(tokens)
        # `total` includes the moments. The gradients of the previous step were dropped.
        return memory.step - memory.gradients

    @property
    def itemsize(self) -> int:
        """Bytes per element in matmuls."""
        return DTYPES[self.run.model.dtype].itemsize

    @property
    def trains_adapter(self) -> bool:
        return self.run.adapter.kind == "lora"

    @cached_property
    def sharded(self) -> bool:
        """Return whether the base is sharded by `fully_shard`."""
        return needs_fsdp(self.run, self.mesh, offload="parameters" in self.moved)

    @property
    def streams(self) -> bool:
        """Return whether the plan may stream frozen layers from the host (`runtime/stream.py`)."""
        return "parameters" in self.moved and self.mesh.world == 1

    @cached_property
    def streamed_bytes(self) -> int:
        """Bytes of the layers' frozen matrices. Scales are not included, because they stay on the
        device.
        """
        return self.weights(self.itemsize)[0] - self.scales

    @property
    def slot_bytes(self) -> int:
        """Bytes of the GPU's slots for streamed layers. Each slot can hold the largest layer."""
        scheme = self.scheme
        width = scheme.weight_bytes or self.itemsize
        expert_width = scheme.expert_bytes or self.itemsize
        sizes = [layer.matmul * width + layer.experts * expert_width for layer in self.spec.layers]
        return round(SLOTS * self.streamed_bytes * (max(sizes) / sum(sizes)))

    @cached_property
    def scheme(self) -> Scheme:
        """Storage scheme of the base. This is the recipe's scheme, or dense if the recipe has fp8
        but the machine has no fp8 matmuls.
        """
        scheme = scheme_of(self.run.model, self.spec.quantized)
        if scheme.has_fp8_matmuls and self.machine.scaling[0] is None:
            return DENSE
        return scheme

    @property
    def fp32_gradients(self) -> bool:
        """Return whether linear layers accumulate the gradients of their weights in fp32.

        Return True for fully trained 16-bit weights with fp32 masters on one GPU. Return False with
        several ranks, because they reduce the 16-bit gradients that autograd returns. Return False
        for an update in the backward, because it frees each gradient at once. Return False on a
        CPU, because it cannot multiply 16-bit matrices and accumulate into an fp32 matrix.
        """
        train = self.run.train
        has_masters = DTYPES[self.run.model.dtype] in HALF and train.master_weights == "fp32"
        is_full_training = not (self.trains_adapter or train.optimizer_in_backward)
        on_one_gpu = self.mesh.world == 1 and self.machine.device.startswith("cuda")
        return has_masters and is_full_training and on_one_gpu

    @property
    def saves_probabilities(self) -> bool:
        """Return whether attention saves its probabilities for the backward."""
        return self.machine.attention[0] == "batched_matmul" and self.spec.attention_softcap is None

    @property
    def moved(self) -> tuple[str, ...]:
        """Parts of the training state that are offloaded to the host, such as `parameters`."""
        return moved_to_host(self.run, self.machine)

    def weights(self, itemsize: float) -> tuple[int, int]:
        """Return the bytes of the base on a tensor-parallel rank as two numbers: the matrices in
        all layers, and all other weights. For Llama-3-8B in bf16 on one rank, these are 14 GB and
        2.1 GB.

        Tensor parallelism shards everything except experts, norms and biases. Scales are included,
        except those of fp8 rows (4 bytes per row).
        """
        spec = self.spec
        tensor = self.mesh.tensor
        width = self.scheme.weight_bytes or itemsize
        layers = int(ceil_div(spec.linear_matrices, tensor) * width) + self.scales
        layers += self._expert_weights(itemsize)
        # Parameters of embedding and output layer. If they are tied, they are one matrix.
        tables = spec.head_matmul if spec.tied else 2 * spec.head_matmul
        rest = spec.parameters - spec.layer_matrices - tables
        return layers, int((ceil_div(tables, tensor) + rest) * itemsize)

    def _expert_weights(self, itemsize: float) -> int:
        """Return the bytes of all experts, without scales."""
        spec = self.spec
        width = self.scheme.expert_bytes or itemsize
        experts = spec.layer_matrices - spec.linear_matrices
        return int(spec.expert_stacks * width + (experts - spec.expert_stacks) * itemsize)

    @property
    def summed_expert_parameters(self) -> int:
        """Number of trained expert parameters whose gradients are summed over tensor-parallel
        ranks, because each of these ranks has all experts. 0 without tensor parallelism.
        """
        if self.mesh.tensor == 1:
            return 0
        if self.trains_adapter:
            return count_expert_adapter(self.spec, self.run.adapter)
        return ceil_div(self._expert_weights(1), self.mesh.shard)

    @cached_property
    def scales(self) -> int:
        """Bytes of the scales of a quantized base on a tensor-parallel rank."""
        linears = self.spec.linear_matrices * self.scheme.scale_bytes / self.mesh.tensor
        return int(linears + self.spec.expert_stacks * self.scheme.expert_scale_bytes)

    @cached_property
    def trained_on_rank(self) -> int:
        """Number of trained parameters on one rank.

        Every data rank has the entire adapter. All other trained parameters are sharded.
        """
        tensor = self.mesh.tensor
        adapter = self.run.adapter
        if self.trains_adapter:
            whole = count_adapter(self.spec, adapter)
            return self.trained - whole + count_adapter(self.spec, adapter, tensor)
        # `weights(1)` counts the elements in this rank's shard of each layer.
        return ceil_div(sum(self.weights(1)) * self.trained, self.spec.parameters * self.mesh.shard)

    def base_bytes(self, itemsize: float) -> int:
        """Return the bytes of the base on one rank. If the base is frozen, only its layers are
        sharded.
        """
        layers, ends = self.weights(itemsize)
        shard = self.mesh.shard
        # Scales are buffers, which FSDP2 does not shard. `layers` includes the scales and is
        # divided by `shard` below, so add the missing scales.
        scales = self.scales - self.scales // shard
        if self.trains_adapter:
            return ceil_div(layers, shard) + ends + scales
        return ceil_div(layers + ends, shard) + scales

    @cached_property
    def fixed(self) -> MemoryEstimate:
        """Parts of the estimate that do not depend on the micro batch."""
        run = self.run
        trained = self.trained_on_rank
        # `width` is the number of bytes per trained weight. The weights of an adapter are fp32 and
        # are not part of the base. While a checkpoint is written, `copies` holds a copy of these
        # weights and their moments.
        width = self.itemsize
        base_width = width
        adapter = 0
        copies = 0
        if self.trains_adapter:
            width = 4
            adapter = width * trained
            if run.extra_forwards and run.adapter.from_ is not None:
                adapter *= 2  # the reference model uses a copy of the initial adapter
            copies = 12 * trained
        elif self.sharded and run.train.master_weights == "fp32":
            # With FSDP, fully trained 16-bit weights are stored in fp32 and need no separate master
            # copy.
            width = 4
            base_width = width
        base = self.base_bytes(base_width)
        # The backward returns gradients in the dtype of the weights.
        gradients = width * trained
        if self.fp32_gradients:
            gradients += (4 - width) * self.spec.linear_matrices
        # `state` includes an fp32 gradient, even if the backward returns another dtype.
        state = int(trained * state_bytes_per_parameter(run.train, width))
        host = 0
        if self.streams:
            host = self.streamed_bytes
            base += self.slot_bytes - host
        elif "parameters" in self.moved:
            # Frozen layers are in host memory, but embedding, norms and output layer stay on the
            # device.
            if self.trains_adapter:
                _, outside_layers = self.weights(self.itemsize)
                host = base - outside_layers
                base = outside_layers
            else:
                # With FSDP2's offloading, the shards, gradients and moments are all on the host.
                host = base + state
                base = 0
                state = 0
                gradients = 0
        memory = MemoryEstimate(
            weights=base + adapter + self.spec.vision_parameters * self.itemsize,
            gradients=gradients,
            # Subtract the gradients from `state`, because they are a separate part of the estimate.
            optimizer=state - gradients,
            copies=copies,
            gathered=self._gathered_bytes(),
            host=host,
            free=self.machine.free_bytes,
        )
        slots, rollouts = self._rollouts(memory)
        return replace(memory, slots=slots, rollouts=rollouts)

    def _gathered_bytes(self) -> int:
        """Estimate the temporary memory for weights and gradients of other ranks.

        The memory holds GATHERED_LAYERS layers, the embedding and output layer of a fully trained
        model, and gradients that are being reduced. The gradients of a layer exist in the layer's
        dtype, and twice in fp32: for the reduction of this layer, and for the reduction of the
        previous layer, which may not be complete.
        """
        itemsize = self.itemsize
        if not self.sharded:
            has_16_bit_gradients = itemsize < 4 and self.run.train.master_weights == "stochastic"
            if self.mesh.data == 1 or self.trains_adapter or not has_16_bit_gradients:
                return 0
            # `parallel/copies.py` converts 16-bit gradients to fp32 in pieces of this size and sums
            # them.
            return 4 * GRADIENT_PIECE * MAX_GRADIENT_PIECES
        layers, ends = self.weights(itemsize)
        gathered = GATHERED_LAYERS * layers // self.spec.depth
        if self.trains_adapter:
            return gathered
        gathered += (itemsize + 2 * 4) * layers // itemsize // self.spec.depth
        if self.spec.tied:
            return gathered + 2 * ends
        # Count only the output layer's gradient, because it is reduced while all activations exist.
        # The embedding's gradient is reduced after the activations are freed.
        head = ceil_div(self.spec.head_matmul, self.mesh.tensor)
        # Add the gathered weight, its gradient, and the gradient in fp32 for the reduction.
        return gathered + head * (2 * itemsize + 4)

    def _layer_bytes(self, tokens: int, itemsize: int) -> list[int]:
        """Estimate the bytes that each layer saves without recomputation. See the docstring of the
        module.
        """
        spec = self.spec
        if not spec.measured:
            size = self._block_bytes(spec.layers[0], tokens, itemsize)
            return [size] * spec.depth
        saved = measure_activations(spec, self.run.adapter, self.run.model.dtype)
        sizes = []
        for layer, by_token, constant in zip(
            spec.layers, saved.by_token, saved.constant, strict=True
        ):
            size = int(by_token * tokens + constant)
            size += int(self._whole_elements(layer) * tokens) * itemsize
            # What a compiled layer saves is only known for layers with attention and a plain MLP,
            # not for recurrent layers and experts.
            is_plain = layer.heads and not layer.state and not layer.experts
            # A compiled plain block saves at most as much as a block with tunesmith's fused
            # modules.
            if is_plain and self.machine.compiles[0]:
                size = min(size, self._block_bytes(layer, tokens, itemsize))
            elif self.saves_probabilities:
                size += int(layer.heads * self.probabilities * tokens) * itemsize
            sizes.append(size)
        return sizes

    def _whole_elements(self, layer: Layer) -> float:
        """Count the additional elements per token that attention saves if two sequences share
        tokens.

        Attention needs queries, keys, values and outputs of entire documents, including repeated
        prompts. q, k and v of each computed token are already counted.
        """
        if self.whole == 1:
            return 0.0
        outputs = layer.heads * layer.value_dim
        inputs = (layer.heads + layer.kv_heads) * layer.head_dim + layer.kv_heads * layer.value_dim
        return ((self.whole - 1) * inputs + self.whole * outputs) / self.mesh.tensor

    def _block_bytes(self, layer: Layer, tokens: int, itemsize: int) -> int:
        """Estimate the bytes that a Llama-like layer saves. See the docstring of the module."""
        spec = self.spec
        adapter = self.run.adapter
        tensor = self.mesh.tensor
        family = ARCHITECTURES.get(spec.model_type)
        is_fused = self.machine.compiles[0] or (family is not None and family.all_fused)
        vectors = 3 if is_fused else 4
        # With tensor parallelism, only the normed inputs have the full hidden size, because they
        # are gathered before attention and MLP.
        wide = ceil_div(layer.intermediate, tensor)
        # Elements of q, k and v. k and v have only `kv_heads` heads.
        heads = layer.head_dim * (layer.heads + 2 * layer.kv_heads) // tensor
        # Elements of the two normed inputs, and of `vectors` vectors each of the hidden size and of
        # the MLP's size.
        hidden = ceil_div(spec.hidden, tensor)
        elements: float = 2 * spec.hidden + vectors * (hidden + wide) + heads
        if self.saves_probabilities:
            elements += layer.heads * self.probabilities / tensor
        elements += self._whole_elements(layer)
        factors = 0
        # With LoRA, seven linear layers each save x A^T, and a copy of A and B in the dtype of the
        # matmuls.
        if self.trains_adapter:
            elements += 7 * adapter.rank
            layer_adapter = replace(adapter, modules_to_save=())
            factors = count_adapter(spec, layer_adapter, tensor) // spec.depth
        # With dropout, each of the seven linear layers saves its own input, and a mask with one
        # byte per element on a GPU.
        if adapter.dropout:
            attention_width = layer.heads * layer.head_dim // tensor
            mask = 1.0 if self.machine.device == "cpu" else 1 / itemsize
            # Additional inputs, and the masks: five for the inputs of q, k, v, gate and up, one for
            # o, and one for down.
            elements += 3 * spec.hidden + attention_width
            elements += mask * (5 * spec.hidden + attention_width + wide)
        return int(elements * tokens + factors) * itemsize

    def _head_bytes(self, tokens: int, itemsize: int) -> int:
        """Estimate the memory for a chunk of logits. It holds the logits in 16 bits and in fp32,
        and their gradient.

        If the output layer is trained, the fp32 sum of its gradients and the gradient of one chunk
        are added.
        """
        trained = not self.trains_adapter
        vocabulary = ceil_div(self.spec.vocab, self.mesh.tensor)
        device = torch.device(self.machine.device)
        card = self.machine.card_bytes
        chunk = min(tokens, chunk_size(vocabulary, tokens, device, trained=trained, card=card))
        hidden = self.spec.hidden if trained else 0
        # Bytes of the logits in the dtype of matmuls, and of their gradient.
        logits = 2 * itemsize * chunk
        gradients = itemsize * (chunk + hidden)
        # On a GPU, 16-bit logits are also copied to fp32. A CPU needs no copy, because it converts
        # only a few rows at a time.
        if itemsize < 4 and device.type != "cpu":
            logits += 4 * chunk
            gradients += itemsize * chunk
        # Logits and gradients are not needed at the same time. The fp32 sum of a trained output
        # layer's gradients always exists.
        return vocabulary * (4 * hidden + max(logits, gradients))

    def _backward_bytes(self, tokens: int, itemsize: int) -> int:
        """Estimate the additional bytes that the backward of a layer needs. The chunk of logits is
        freed before.

        The bytes are the gradients of three hidden vectors, and the larger need of the MLP at two
        points in time. At the first point, the gradients of gate, up and their product exist. At
        the second point, the gradient of the product exists together with one of these: the
        gradient of a weight, nf4's dequantized weight, or fp8's transposed codes.
        """
        hidden = self.spec.hidden
        layer = self.spec.widest
        wide = ceil_div(layer.intermediate, self.mesh.tensor)
        largest = layer.largest
        if not layer.experts:
            largest = ceil_div(largest, self.mesh.tensor)
        # With a frozen base, the dequantized weight counts instead of the gradient of a weight.
        weight = largest
        if self.trains_adapter:
            weight = self.scheme.backward_elements(largest, itemsize)
            if layer.experts:
                # Only a part of the tensor with all experts is dequantized at any time. On a CPU,
                # this is one expert.
                weight = min(weight, DENSE_BYTES // itemsize)
        mlp = wide * tokens + max(wide * tokens, weight)
        # Each token is copied for each of its experts.
        copies = layer.experts_per_token * hidden * tokens
        if layer.experts and self.machine.device != "cpu":
            # A GPU computes all experts together, so the gradients of the copies and those of gate,
            # up and their product are added. A grouped kernel needs another copy of the tokens.
            # This formula was not checked on a GPU.
            mlp += (1 + self.machine.grouped_mm) * copies + 2 * wide * tokens
        elif layer.experts and self.trains_adapter:
            # A CPU processes the experts one after the other, so only the larger of two parts
            # counts: the gradients of the copies, or those of gate, up and their product. With
            # adapters on experts, the backward also computes the activation again.
            mlp = max(mlp, copies, 4 * wide * tokens)
        elif layer.experts:
            # In full training, there are two and a half gradients per copy.
            mlp = max(mlp, 5 * copies // 2)
        return (3 * hidden * tokens + mlp) * itemsize

    def overrun(self, memory: MemoryEstimate) -> float:
        """Return 0 if a micro batch fits, else the ratio of needed to available memory."""
        needed = memory.activations + memory.workspace
        room = int(memory.free * usable_share(self.machine.device)) - memory.static
        return needed / max(room, 1) if needed > room else 0.0


def min_recomputed(room: float, layers: Sequence[int], recomputed_layer: int) -> int:
    """Return the minimum number of layers to recompute so that the activations fit. Layers are
    recomputed from the first one on.

    Return the number of all layers if the activations do not fit even then.

    Args:
        room: bytes that are available for the activations.
        layers: bytes that each layer saves.
        recomputed_layer: bytes that a recomputed layer saves.
    """
    missing = sum(layers) - room
    for count, layer in enumerate(layers):
        # `missing` is the number of bytes by which the activations exceed `room`. Each recomputed
        # layer reduces it.
        if missing <= 0:
            return count
        missing -= layer - recomputed_layer
    return len(layers)


def usable_share(device: str) -> float:
    """Return the fraction of a device's free memory that a plan uses."""
    return USABLE_CPU_SHARE if device == "cpu" else USABLE_SHARE


def moved_to_host(run: Run, machine: Machine) -> tuple[str, ...]:
    """Return the parts of `train.cpu_offload` that have an effect on this machine."""
    return run.train.cpu_offload if machine.device.startswith("cuda") else ()
