"""Estimate of the time of an optimizer step, also on machines that are not available.

The time is computed for the rank with the most work. It is the sum of these parts: matmuls and
attention at the FLOP/s that whole steps reach on the chip, recomputed layers, the fixed cost of a
pass, the update at memory bandwidth, FSDP2's copies, and communication.

Gathers of shards, reductions, and copies of layers from the host run at the same time as the
computation of their pass. Therefore only the time by which they exceed the computation counts. The
communication of a trained embedding, of tensor parallelism, and of an adapter's gradients does not
overlap with computation. All experts are assumed to get the same number of tokens.

The rate of whole steps was measured on dense models, so it includes norms and activations. For the
matmuls of experts, the faster rate of matmuls alone is used, and the empty part of each expert's
last tile is counted as work. The memory traffic of the kernels around these matmuls is added,
because a mixture moves k copies of each token. Each pass reads all experts, and dequantizes them if
they are quantized.

FSDP2 copies gathered weights out of a flat buffer, and gradients into the buffer of the reduction.
These copies run in the stream of the computation.

The time of a frozen vision model is proportional to the number of picture tokens. The number of
operations per token is computed for a picture of 640 x 480. A larger picture needs more operations
per token if its attention covers the entire picture.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from tunesmith.config.schema import Run
from tunesmith.model.arch.spec import Layer, ModelSpec
from tunesmith.model.layers.slots import answers_at_once
from tunesmith.planning.machines import Cluster
from tunesmith.planning.measured_layers import count_expert_adapter
from tunesmith.planning.memory import MemoryEstimator
from tunesmith.planning.run_plan import MemoryEstimate
from tunesmith.planning.workload import Workload, rank_step, step_units
from tunesmith.runtime.stream import SLOTS
from tunesmith.units import ceil_div

# Speed of fp8 steps relative to bf16 steps: 794 / 551 TFLOP/s, measured with LoRA of an 8B model on
# an H200.
EIGHT_BIT_SPEED = 1.44
# Speed of matmuls relative to whole steps: 700 / 551 TFLOP/s, measured with LoRA of an 8B model on
# an H200. Matmuls of experts are assumed to reach the same rate, except for partly empty tiles.
# This was not measured.
PRODUCT_SPEED = 1.27
# Default host-to-GPU bandwidth in GB/s, if it is unknown: 80 % of PCIe 4.0 x16.
PCIE_4_LINK = 25.6
# Rows per tile of a grouped matmul. The last tile of each expert is half empty on average.
TILE_ROWS = 128
# Bytes of memory traffic per parameter in an update: 4 for the norm, 8 for clipping, 28 for AdamW,
# 6 for the 16-bit copy.
UPDATE_BYTES = 46
# Defaults for unknown chips. An H200 reaches this number of operations per byte in matmuls: 700
# TFLOP/s at 4 TB/s.
USUAL_TFLOPS = 551.0
USUAL_OPERATIONS_PER_BYTE = 175
# Memory traffic of the kernels around the experts' matmuls, for each token and each of its experts,
# in forward and backward. The first number counts rows of the hidden size, and the second number
# rows of an expert's size. EXPERT_ROWS counts gathers, sums and activations
# (benchmarks/speed/count_kernels.py). It is for experts that run one after the other. An adapter's
# low-rank matmuls are not counted, because they use the cache. GROUPED_ROWS is for one kernel that
# multiplies all experts. Low-rank matmuls then use memory too, and the kernels do not reach the
# memory bandwidth. Therefore GROUPED_ROWS is not a count but was fitted to the speed of an H200
# (27,374 tokens/s of Qwen3-30B-A3B).
EXPERT_ROWS = (5, 17)
GROUPED_ROWS = (20, 35)
# Time of the forward divided by the time of forward and backward: 2 of 6 operations. With an
# adapter one would expect 2 of 4 operations, but a measurement confirms 1/3: an H200 took 0.98 s
# for a step of an 8B model, and 1.31 s with all layers recomputed.
FORWARD_SHARE = 1 / 3


class StepTime(NamedTuple):
    """Estimated time of an optimizer step: the seconds of each part.

    Attributes:
        hides_from: minimum number of tokens of a micro batch whose computation takes longer than
            its communication.
    """

    parts: dict[str, float]
    hides_from: int


@dataclass(frozen=True)
class Step:
    """Estimator of the time of an optimizer step, for the rank with the most work.

    Attributes:
        estimator: estimator for the recipe and mesh.
        memory: memory of a micro batch, with the numbers of recomputed and streamed layers.
        one_shape: whether every micro batch is padded to the same shape.
    """

    estimator: MemoryEstimator
    cluster: Cluster
    work: Workload
    memory: MemoryEstimate
    one_shape: bool

    @property
    def run(self) -> Run:
        return self.estimator.run

    @property
    def spec(self) -> ModelSpec:
        return self.estimator.spec

    @cached_property
    def rank_tokens(self) -> float:
        """Mean number of tokens per step of the data rank with the most tokens."""
        return rank_step(self.run, self.work.step, self.estimator.mesh).mean

    @cached_property
    def micro_batches(self) -> int:
        # Subtract a small number before rounding up, so that a rounding error does not add a micro
        # batch.
        return max(1, math.ceil(self.rank_tokens / self.memory.tokens - 1e-9))

    @cached_property
    def tokens(self) -> float:
        """Number of tokens that the rank computes in a step, including padding."""
        if self.one_shape:
            # Each row is padded to at least the length of the longest example.
            return self.micro_batches * max(self.memory.tokens, self.work.longest)
        return self.rank_tokens

    def _tensor_sums(self) -> int:
        """Count the sums over a tensor-parallel group in a step. Each sum consists of a scatter and
        a gather of all tokens.

        Each block has one sum in the forward and one in the backward, and one more in the forward
        of recomputed layers. The embedding and the gradient of the output layer have one each.
        """
        blocks = [self._shared_blocks(layer) for layer in self.spec.layers]
        return 2 * sum(blocks) + sum(blocks[: self.memory.recomputed_layers]) + 2

    def _shared_blocks(self, layer: Layer) -> int:
        """Count the blocks of a layer that are tensor-parallel. These are the attention, and an MLP
        that all tokens use.

        A layer with experts has such an MLP only if it has shared experts. This is the case if
        `layer.matmul` counts more than the matrices of attention and router.
        """
        if not layer.experts:
            return 2
        head_count = layer.heads + layer.kv_heads
        attention = self.spec.hidden * head_count * (layer.head_dim + layer.value_dim)
        router = self.spec.hidden * layer.expert_count
        return 1 + (layer.matmul > attention + router)

    def time(self) -> StepTime:
        """Estimate the seconds of the step. If the chip's speed is unknown, only the proportions
        are meaningful.
        """
        micro_batches = self.micro_batches
        gather, reduce, copies, embedding_share = self._shard_seconds()
        # Layers that are not in a GPU slot are copied from the host, once in each pass.
        copied_layers = max(0, self.memory.streamed_layers - SLOTS)
        copied_bytes = self.estimator.streamed_bytes * copied_layers / self.spec.depth
        streamed = copied_bytes / (1e9 * self.host_link)
        # The communication of the embedding cannot overlap with computation: nothing else is
        # computed while it is gathered, and while its gradient is reduced at the end of the
        # backward.
        # Both passes gather the weights. The backward also reduces the gradients.
        forward_transfers = streamed + (1 - embedding_share) * gather
        backward_transfers = forward_transfers + (1 - embedding_share) * reduce
        # Communication overlaps with computation, so only the time by which it is longer than the
        # computation counts (`exposed`).
        compute = self.tokens * sum(self.token_seconds.values()) / micro_batches
        forward = FORWARD_SHARE * compute
        backward = (1 + self._recompute_share) * compute - forward
        exposed = embedding_share * (gather + reduce)
        exposed += max(0.0, forward_transfers - forward) + max(0.0, backward_transfers - backward)
        # The factor 2 is for the scatter and the gather of each sum.
        tensor_bytes = 2 * self._tensor_sums() * self.tokens * self.spec.hidden
        tensor_bytes *= self.estimator.itemsize
        parts = self._compute_seconds() | {
            "shard copies": micro_batches * copies,
            "tensor parallel": self._ring_seconds(tensor_bytes, self.estimator.mesh.tensor, 1),
            "host copies" if streamed else "shards": micro_batches * exposed,
            "gradients": self._gradient_seconds(backward),
            "rollouts": self._rollout_seconds(),
        }
        # The factor by which the micro batch must be larger, so that in both passes the computation
        # takes as long as the communication.
        batch_factor = max(forward_transfers / forward, backward_transfers / backward)
        return StepTime(parts, math.ceil(batch_factor * self.tokens / micro_batches))

    def _rollout_seconds(self) -> float:
        """Estimate the seconds to sample the answers of a step. Only memory traffic is counted.

        Each token of the answers reads all weights, and the keys and values of the slots.
        """
        method = self.run.method
        if not self.memory.slots:
            return 0.0
        prompts = answers_at_once(method.group) // method.group
        rounds = ceil_div(ceil_div(step_units(self.run), prompts), self.estimator.mesh.data)
        read = self.pass_bytes / 2 + self.memory.slots  # `pass_bytes` is for two passes
        return rounds * method.answer_tokens * read / self._memory_bandwidth

    def _shard_seconds(self) -> tuple[float, float, float, float]:
        """Estimate the seconds of FSDP's communication.

        Returns:
            Four numbers: seconds per pass to gather weights, seconds per backward to reduce
            gradients, seconds per micro batch to copy both, and the embedding's fraction of the
            gathered weights.
        """
        itemsize = self.estimator.itemsize
        _, shard, tensor = self.estimator.mesh
        # If the base is frozen, only its layers are sharded.
        gathered, ends = self.estimator.weights(itemsize)
        reduced = 0.0
        embedding_share = 0.0
        if not self.estimator.trains_adapter:
            gathered += ends
            # Gradients are reduced in fp32.
            reduced = 4 / itemsize * gathered
            embedding_share = self.spec.head_matmul * itemsize / tensor / gathered
        copied = 0.0
        if shard > 1:
            # Each copy of FSDP2 reads and writes the data. Weights are copied in both passes, and
            # gradients once, when they are converted to fp32.
            copied = 2 * 2 * gathered + (1 + itemsize / 4) * reduced
        gather = self._ring_seconds(gathered, shard, tensor)
        reduce = self._ring_seconds(reduced, shard, tensor)
        return gather, reduce, copied / self._memory_bandwidth, embedding_share

    def _gradient_seconds(self, backward: float) -> float:
        """Estimate the seconds per step for the sum of gradients over the data ranks.

        An all-reduce consists of a reduction and a gather. Each of them moves 4 bytes per
        parameter.

        Args:
            backward: seconds of a micro batch's backward.
        """
        estimator = self.estimator
        replicate, shard, tensor = estimator.mesh
        size = 2 * 4 * estimator.trained_on_rank
        # Each tensor rank has all experts, so their gradients are summed over these ranks too.
        expert_seconds = self._ring_seconds(2 * 4 * estimator.summed_expert_parameters, tensor, 1)
        if estimator.trains_adapter:
            # Every data rank has the entire adapter, so all of them take part in the sum. The sum
            # begins after the backward, so it does not overlap.
            return expert_seconds + self._ring_seconds(size, replicate * shard, tensor)
        # FSDP2 has already summed over the shards, so only the sum over the replicas is left. It
        # overlaps with the last backward.
        replica_seconds = self._ring_seconds(size, replicate, tensor * shard)
        return expert_seconds + max(0.0, replica_seconds - backward)

    def _ring_seconds(self, size: float, ranks: int, stride: int) -> float:
        """Estimate the seconds of a gather or reduction of `size` bytes in a ring of ranks.

        Return 0 if the bandwidth is unknown.

        Args:
            stride: difference of the rank numbers of two neighbors in the ring.
        """
        bandwidth = self.cluster.bandwidth(ranks, stride)
        # Each rank sends all parts of the data except one.
        return size * (ranks - 1) / ranks / bandwidth if bandwidth else 0.0

    @property
    def host_link(self) -> float:
        """GB/s from page-locked host memory to the GPU. If it was not measured, it is from the
        table of chips.
        """
        chip = self.cluster.chip
        return self.estimator.machine.host_link or chip.host_link or chip.link or PCIE_4_LINK

    @cached_property
    def token_seconds(self) -> dict[str, float]:
        """Seconds per token for forward and backward together. The keys are the parts of the
        computation.
        """
        work = self.work
        rate = self._tflops * 1e12
        # Experts are multiplied in 16 bits, so the factor of fp8 is not applied to them. It is
        # applied to attention, because it was measured for whole steps.
        product_rate = PRODUCT_SPEED * rate
        if self.estimator.scheme.has_fp8_matmuls:
            rate *= EIGHT_BIT_SPEED
        # The ranks of a tensor-parallel group share the work of a token.
        operations = work.operations / self.estimator.mesh.tensor
        seconds = {
            "matmuls": operations * (1 - work.attention - work.experts) / rate,
            "attention": operations * work.attention / rate,
        }
        if work.experts:
            seconds["experts"] = operations * work.experts * self._tile_cost() / product_rate
            seconds["copies for experts"] = self.expert_traffic / self._memory_bandwidth
        return seconds

    @property
    def expert_traffic(self) -> float:
        """Bytes per token that the kernels around the experts' matmuls read and write in both
        passes.
        """
        estimator = self.estimator
        spec = self.spec
        has_adapter = count_expert_adapter(spec, self.run.adapter)
        in_one_kernel = estimator.machine.grouped_mm and has_adapter
        hidden_rows, expert_rows = GROUPED_ROWS if in_one_kernel else EXPERT_ROWS
        elements = 0
        for layer in spec.layers:
            if layer.expert_count:
                elements += hidden_rows * layer.experts_per_token * spec.hidden
                elements += expert_rows * layer.intermediate
        return estimator.itemsize * elements / estimator.mesh.tensor

    @property
    def pass_bytes(self) -> float:
        """Memory traffic in bytes for the weights in one forward and backward, including
        dequantization.

        All experts are read, although a token uses only a few. All other weights are divided among
        the ranks of a tensor-parallel group.
        """
        estimator = self.estimator
        spec = self.spec
        scheme = estimator.scheme
        linears = spec.active - spec.active_of_experts
        experts = spec.layer_matrices - spec.linear_matrices
        # Bytes of traffic for the dense copies of quantized weights. Matmuls read dense weights, so
        # quantized weights are dequantized first.
        dense_bytes = scheme.expert_dense_bytes
        # In full fine-tuning, experts run Transformers' code, which is not compiled.
        compiled = estimator.machine.compiles[0] and estimator.trains_adapter
        if compiled and scheme.compiled_dense_bytes:
            dense_bytes = scheme.compiled_dense_bytes
        expert_bytes = 2 * (experts * estimator.itemsize + spec.expert_stacks * dense_bytes)
        return linears * scheme.traffic_bytes / estimator.mesh.tensor + expert_bytes

    def _tile_cost(self) -> float:
        """Return the factor by which partly empty tiles lengthen the experts' matmuls. It is 1 for
        a model without experts.
        """
        mixture = max(self.spec.layers, key=lambda layer: layer.expert_count)
        if not mixture.expert_count:
            return 1.0
        # The ranks of a tensor-parallel group share the tokens.
        tokens = self.memory.tokens / self.estimator.mesh.tensor
        rows = tokens * mixture.experts_per_token / mixture.expert_count
        return 1 + TILE_ROWS / 2 / rows

    @property
    def _recompute_share(self) -> float:
        """Additional computation for recomputed layers, as a fraction of the computation of both
        passes.
        """
        return FORWARD_SHARE * self.memory.recomputed_layers / self.spec.depth

    def _compute_seconds(self) -> dict[str, float]:
        """Estimate the seconds of all parts of the step except communication."""
        parts = {name: self.tokens * seconds for name, seconds in self.token_seconds.items()}
        recompute = self._recompute_share * sum(parts.values())
        # Recomputed layers read their weights three times per step instead of twice.
        reads = 1 + self.memory.recomputed_layers / self.spec.depth / 2
        passes = self.micro_batches * reads * self.pass_bytes
        updated = UPDATE_BYTES * self.estimator.trained_on_rank
        if self.work.pictures:
            # The vision model has no backward and no fp8 matmuls. It processes each picture once,
            # and there are no pictures in padding.
            operations = self.work.pictures * self.rank_tokens * self.spec.picture_flops
            parts["vision part"] = operations / (1e12 * self._tflops)
        return parts | {
            "recompute": recompute,
            "launch overhead": passes / self._memory_bandwidth,
            "update": updated / self._memory_bandwidth,
        }

    @property
    def _tflops(self) -> float:
        return self.cluster.chip.tflops or USUAL_TFLOPS

    @property
    def _memory_bandwidth(self) -> float:
        """Memory bandwidth in bytes per second. If it is unknown, it is derived from the
        chip's speed.
        """
        chip = self.cluster.chip
        if chip.tflops and chip.bandwidth:
            return 1e9 * chip.bandwidth
        return 1e12 * self._tflops / USUAL_OPERATIONS_PER_BYTE
