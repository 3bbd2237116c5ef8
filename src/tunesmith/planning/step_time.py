"""The time of an optimizer step on machines that need not be here, and what its ranks send.

Time is a sum over an optimizer step of the busiest rank: products and attention at what whole steps
reach on the chip, layers that recompute, the fixed cost of a pass, the update at the memory's
bandwidth, FSDP2's copies, and communication.

Gathers of shards, reductions into them and layers from the host hide behind the compute of their
pass as far as they are shorter, except those of an embedding that is trained. Nothing hides tensor
parallelism's gathers and scatters, nor the sum of an adapter's gradients. Experts are assumed to be
evenly loaded.

The rate of whole steps was measured on dense models and has their norms and activations in it. The
products of experts are counted at the rate of products alone, with the empty part of each expert's
last tile, and what the kernels around them move comes on top, at the memory's bandwidth: k copies
of a token are more to move than a dense layer has. A pass reads all experts, and makes quantized
ones dense.

FSDP2 copies what it gathers out of one flat buffer into the weights, and gradients into the buffer
of their reduction, in the stream that computes.

A frozen vision part is counted by the tokens of pictures that the rows have. Its operations for one
are those of a picture of 640 x 480: on a larger one its attention takes more for each token, where
it sees the picture in whole.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from tunesmith.config.schema import Run
from tunesmith.model.spec import Layer, ModelSpec
from tunesmith.planning.machines import Cluster
from tunesmith.planning.measured_layers import count_expert_adapter
from tunesmith.planning.memory import MemoryEstimator
from tunesmith.planning.run_plan import MemoryEstimate
from tunesmith.planning.workload import Workload, rank_step
from tunesmith.runtime.stream import SLOTS

# Of whole steps, beside bf16: 794 and 551 TFLOP/s, LoRA of an 8B on an H200.
EIGHT_BIT_SPEED = 1.44
# Of products alone, beside whole steps: 700 and 551 TFLOP/s, LoRA of an 8B on an H200. Nobody has
# measured those of experts: that they reach it is assumed, but for the tiles below.
PRODUCT_SPEED = 1.27
# From the host to a GPU of which nothing is known, GB/s: 80 % of PCIe 4.0 x16.
PCIE_4_LINK = 25.6
# Rows of a tile of a grouped product: the last one of each expert is half empty on average.
TILE_ROWS = 128
# Bytes that an update moves for a parameter: norm 4, clipping 8, AdamW 28, 16-bit copy 6.
UPDATE_BYTES = 46
# Of a chip of which nothing is known. An H200 reaches so many in products alone, 700 TFLOP/s at
# 4 TB/s.
USUAL_TFLOPS = 551.0
USUAL_OPERATIONS_PER_BYTE = 175
# Rows of the hidden width and of an expert's that the kernels around the products of experts read
# and write for each expert of a token, forward and backward: gathers, sums and activations, as
# benchmarks/speed/count_kernels.py counts them in an expert's turn, where an adapter's products of
# low rank are in the cache. Where one kernel multiplies all experts these go through memory too,
# and kernels do not reach its bandwidth: so many rows there are what an H200 took for them
# (27,374 tokens/s of Qwen3-30B-A3B), more than they move by the count.
EXPERT_ROWS = (5, 17)
GROUPED_ROWS = (20, 35)
# A forward, as a share of both passes: 2 of 6 operations. With an adapter they are 2 of 4, but an
# H200 took 0.98 s for a step of an 8B, and 1.31 s with all layers recomputed.
FORWARD_SHARE = 1 / 3


class StepTime(NamedTuple):
    """Seconds of an optimizer step by part.

    Micro batches of `hides_from` tokens or more hide the communication of their passes.
    """

    parts: dict[str, float]
    hides_from: int


@dataclass(frozen=True)
class Step:
    """An optimizer step of the busiest rank.

    Attributes:
        estimator: of the recipe and mesh.
        memory: of a micro batch, with the layers that recompute and those that stream.
        fixed: every micro batch is padded to one size.
    """

    estimator: MemoryEstimator
    cluster: Cluster
    work: Workload
    memory: MemoryEstimate
    fixed: bool

    @property
    def run(self) -> Run:
        return self.estimator.run

    @property
    def spec(self) -> ModelSpec:
        return self.estimator.spec

    @cached_property
    def micro_batches(self) -> int:
        share = rank_step(self.run, self.work.step, self.estimator.mesh).mean
        # A share that is whole micro batches but for rounding makes no further one.
        return max(1, math.ceil(share / self.memory.tokens - 1e-9))

    @cached_property
    def tokens(self) -> float:
        """Tokens of the rank that are computed, padding counted."""
        if self.fixed:
            # A padded row must hold the longest example.
            return self.micro_batches * max(self.memory.tokens, self.work.longest)
        return rank_step(self.run, self.work.step, self.estimator.mesh).mean

    def _tensor_sums(self) -> int:
        """Sums over a tensor group in a step, each a scatter and a gather of all tokens.

        One of each block, forward and backward, that of the forward again where its layer is
        recomputed; and of the embedding and the head's gradient.
        """
        blocks = [self._shared_blocks(layer) for layer in self.spec.layers]
        return 2 * sum(blocks) + sum(blocks[: self.memory.recomputed_layers]) + 2

    def _shared_blocks(self, layer: Layer) -> int:
        """Count the blocks of a layer that a tensor group shares: attention, an MLP of all tokens.

        Of a mixture that is one of shared experts: what there is beside attention and router.
        """
        if not layer.experts:
            return 2
        of_heads = layer.heads + layer.kv_heads
        attention = self.spec.hidden * of_heads * (layer.head_dim + layer.value_dim)
        router = self.spec.hidden * layer.expert_count
        return 1 + (layer.matmul > attention + router)

    def time(self) -> StepTime:
        """Estimate the seconds of the step; in proportion where the chip's speed is unknown."""
        micro_batches = self.micro_batches
        tensor = self.estimator.mesh.tensor
        gather, reduce, copies, embedding_share = self._shard_seconds()
        streamed = self._streamed_bytes / (1e9 * self.host_link)
        # No compute runs while the embedding is gathered, or while its gradient is reduced at the
        # end of the backward.
        beside_forward = streamed + (1 - embedding_share) * gather
        beside_backward = beside_forward + (1 - embedding_share) * reduce
        # Compute hides it as far as it is shorter.
        compute = self.tokens * sum(self.token_seconds.values()) / micro_batches
        forward = FORWARD_SHARE * compute
        backward = (1 + self._recompute_share) * compute - forward
        exposed = embedding_share * (gather + reduce)
        exposed += max(0.0, beside_forward - forward) + max(0.0, beside_backward - backward)
        # Each sum of a tensor group is a scatter and a gather.
        tensor_bytes = 2 * self._tensor_sums() * self.tokens * self.spec.hidden
        parts = self._compute_seconds() | {
            "shard copies": micro_batches * copies,
            "tensor parallel": self._ring_seconds(
                tensor_bytes * self.estimator.itemsize, tensor, 1
            ),
            "host copies" if streamed else "shards": micro_batches * exposed,
            "gradients": self._gradient_seconds(backward),
        }
        # The passes, and so the micro batch, must be so many times longer.
        longer = max(beside_forward / forward, beside_backward / backward)
        return StepTime(parts, math.ceil(longer * self.tokens / micro_batches))

    def _shard_seconds(self) -> tuple[float, float, float, float]:
        """Seconds in which a pass gathers weights, a backward reduces gradients, and a micro batch
        copies both; and the share of the embedding in the weights that are gathered.
        """
        itemsize = self.estimator.itemsize
        _, shard, tensor = self.estimator.mesh
        # Of a frozen base only the layers are sharded.
        gathered, ends = self.estimator.weights(itemsize)
        reduced = embedding_share = 0.0
        if not self.estimator.trains_adapter:
            gathered += ends
            # Gradients are reduced in fp32.
            reduced = 4 / itemsize * gathered
            embedding_share = self.spec.head_matmul * itemsize / tensor / gathered
        # FSDP2 reads and writes what it copies: weights in both passes, and gradients from the
        # weights' dtype to fp32.
        copied = 2 * 2 * gathered + (1 + itemsize / 4) * reduced if shard > 1 else 0.0
        gather = self._ring_seconds(gathered, shard, tensor)
        reduce = self._ring_seconds(reduced, shard, tensor)
        return gather, reduce, copied / self._memory_bandwidth, embedding_share

    def _gradient_seconds(self, backward: float) -> float:
        """Estimate the seconds that the sum of gradients over the data ranks adds to a step.

        An all-reduce is a reduction and a gather, each of 4 bytes a parameter.

        Args:
            backward: seconds of a micro batch's backward.
        """
        estimator = self.estimator
        replicate, shard, tensor = estimator.mesh
        size = 2 * 4 * estimator.trained_here
        of_experts = self._ring_seconds(2 * 4 * estimator.summed_of_experts, tensor, 1)
        if estimator.trains_adapter:
            # Every data rank has a whole adapter.
            return of_experts + self._ring_seconds(size, replicate * shard, tensor)
        # FSDP2 has already summed over the shards. The sum over the copies overlaps the last
        # backward.
        of_copies = self._ring_seconds(size, replicate, tensor * shard)
        return of_experts + max(0.0, of_copies - backward)

    def _ring_seconds(self, size: float, ranks: int, stride: int) -> float:
        """Estimate the seconds of a gather or reduction of `size` bytes in a ring of `ranks`,
        `stride` apart; none over an unknown link.
        """
        bandwidth = self.cluster.bandwidth(ranks, stride)
        # Each rank passes on all parts but one.
        return size * (ranks - 1) / ranks / bandwidth if bandwidth else 0.0

    @property
    def host_link(self) -> float:
        """From the host's page-locked memory to the GPU, GB/s: measured, or by the table."""
        chip = self.cluster.chip
        return self.estimator.machine.host_link or chip.host_link or chip.link or PCIE_4_LINK

    @property
    def _streamed_bytes(self) -> float:
        """Bytes that a pass copies from the host: all streamed layers but those in the slots."""
        copied = max(0, self.memory.streamed_layers - SLOTS)
        return self.estimator.streamed_bytes * copied / self.spec.depth

    @cached_property
    def token_seconds(self) -> dict[str, float]:
        """Estimate the time of a token in the plan's micro batches, both passes, by part."""
        work = self.work
        rate = self._tflops * 1e12
        product_rate = PRODUCT_SPEED * rate
        if self.estimator.scheme.has_fp8_matmuls:
            rate *= EIGHT_BIT_SPEED
        # The ranks of a tensor group share a token's work.
        operations = work.operations / self.estimator.mesh.tensor
        seconds = {
            "products": operations * (1 - work.attention - work.experts) / rate,
            "attention": operations * work.attention / rate,
        }
        if work.experts:
            seconds["experts"] = operations * work.experts * self._tile_cost() / product_rate
            seconds["copies for experts"] = self.expert_traffic / self._memory_bandwidth
        return seconds

    @property
    def expert_traffic(self) -> float:
        """Bytes of a token that the kernels around the products of experts move, both ways."""
        estimator = self.estimator
        spec = self.spec
        has_adapter = count_expert_adapter(spec, self.run.adapter)
        in_one_kernel = estimator.machine.grouped_mm and has_adapter
        of_hidden, of_width = GROUPED_ROWS if in_one_kernel else EXPERT_ROWS
        elements = 0
        for layer in spec.layers:
            if layer.expert_count:
                elements += of_hidden * layer.experts_per_token * spec.hidden
                elements += of_width * layer.intermediate
        return estimator.itemsize * elements / estimator.mesh.tensor

    @property
    def pass_bytes(self) -> float:
        """Bytes of weights that one forward and backward of a micro batch reads and makes dense.

        Of experts all, whatever few a token goes to; a tensor group shares the other layers.
        """
        estimator = self.estimator
        spec = self.spec
        scheme = estimator.scheme
        linears = spec.active - spec.active_of_experts
        experts = spec.layer_matrices - spec.linear_matrices
        # The products read dense weights; codes are dequantized first.
        dense_bytes = scheme.expert_dense_bytes
        # Experts that train in full are Transformers', and in no compiled graph.
        compiled = estimator.machine.compiles[0] and estimator.trains_adapter
        if compiled and scheme.compiled_dense_bytes:
            dense_bytes = scheme.compiled_dense_bytes
        of_experts = 2 * (experts * estimator.itemsize + spec.expert_stacks * dense_bytes)
        return linears * scheme.traffic_bytes / estimator.mesh.tensor + of_experts

    def _tile_cost(self) -> float:
        """Compute the cost of the experts' products, relative to the same with full tiles."""
        mixture = max(self.spec.layers, key=lambda layer: layer.expert_count)
        if not mixture.expert_count:
            return 1.0
        # The ranks of a tensor group share the tokens.
        tokens = self.memory.tokens / self.estimator.mesh.tensor
        rows = tokens * mixture.experts_per_token / mixture.expert_count
        return 1 + TILE_ROWS / 2 / rows

    @property
    def _recompute_share(self) -> float:
        """Compute what recomputed layers add to a step's products, as a share of them."""
        return FORWARD_SHARE * self.memory.recomputed_layers / self.spec.depth

    def _compute_seconds(self) -> dict[str, float]:
        """Estimate the parts of the step that are no communication."""
        parts = {name: self.tokens * seconds for name, seconds in self.token_seconds.items()}
        recompute = self._recompute_share * sum(parts.values())
        # A layer that recomputes reads its weights a third time.
        reads = 1 + self.memory.recomputed_layers / self.spec.depth / 2
        passes = self.micro_batches * reads * self.pass_bytes
        updated = UPDATE_BYTES * self.estimator.trained_here
        if self.work.pictures:
            # The vision part has no backward and no 8-bit matmuls. It computes each picture once,
            # and padding has no pictures.
            tokens = rank_step(self.run, self.work.step, self.estimator.mesh).mean
            operations = self.work.pictures * tokens * self.spec.picture_flops
            parts["vision part"] = operations / (1e12 * self._tflops)
        return parts | {
            "recompute": recompute,
            "fixed cost of passes": passes / self._memory_bandwidth,
            "update": updated / self._memory_bandwidth,
        }

    @property
    def _tflops(self) -> float:
        return self.cluster.chip.tflops or USUAL_TFLOPS

    @property
    def _memory_bandwidth(self) -> float:
        """Bytes/s; in proportion to the speed of products where either is unknown."""
        chip = self.cluster.chip
        if chip.tflops and chip.bandwidth:
            return 1e9 * chip.bandwidth
        return 1e12 * self._tflops / USUAL_OPERATIONS_PER_BYTE
