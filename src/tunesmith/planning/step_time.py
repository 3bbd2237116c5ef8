"""The time of an optimizer step on machines that need not be here, and what its ranks send.

Time is a sum over an optimizer step of the busiest rank: products and attention at what whole steps
reach on the chip, layers that recompute, the fixed cost of a pass, the update at the memory's
bandwidth, FSDP2's copies, and communication.

Gathers of shards and reductions into them hide behind the compute of their pass as far as they are
shorter, except that of the first layer, and those of an embedding that is trained: the forward
begins and the backward ends with it. A head that shares its weight with the embedding goes with
that. Nothing hides tensor parallelism's gathers and scatters, nor the sum of an adapter's
gradients. Experts are assumed to be evenly loaded.

The rate of whole steps was measured on dense models and has their norms and activations in it. The
products of experts are counted at the rate of products alone, with the empty part of each expert's
last tile, and what the kernels around them move comes on top, at the memory's bandwidth: k copies
of a token are more to move than a dense layer has. A pass reads all experts, and makes quantized
ones dense.

FSDP2 copies what it gathers out of one flat buffer into the weights, and gradients into the buffer
of their reduction, in the stream that computes. Shards are copied into the gather's buffer in the
stream of the gather, and count as a part of it.

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
from tunesmith.units import ceil_div

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


class Collective(NamedTuple):
    """A gather or reduction of `size` bytes in a ring of `ranks`, `stride` apart.

    It comes so many `times` a step.
    """

    times: int
    size: float
    ranks: int
    stride: int

    @property
    def sent(self) -> float:
        """Bytes that each rank passes on: all parts but one."""
        return self.size * (self.ranks - 1) / self.ranks


class Collectives(NamedTuple):
    """The collectives in which the groups of a rank gather and reduce in a step."""

    tensor_parallel: Collective
    gather: Collective
    gather_head: Collective
    gather_first: Collective
    reduce: Collective
    reduce_last: Collective
    gradients: Collective
    expert_gradients: Collective


class StepTime(NamedTuple):
    """Seconds of an optimizer step by part, and the communication that they hide.

    The gathers of shards hide wholly in micro batches of `hides_from` tokens or more.
    """

    parts: dict[str, float]
    hidden: float
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

    @cached_property
    def collectives(self) -> Collectives:
        """Collect what the rank's groups gather and reduce."""
        spec = self.spec
        estimator = self.estimator
        replicate, shard, tensor = self.estimator.mesh
        itemsize = estimator.itemsize
        layers, ends = estimator.weights(itemsize)
        # In fp32; of a model trained in full, of this rank's shards.
        # An all-reduce is a reduction and a gather: 2 times 4 bytes a parameter.
        gradients = 2 * 4 * estimator.trained_here
        head = 0
        embedding = 0
        in_fp32 = 0.0
        if estimator.trains_adapter:
            # Neither embedding nor head is sharded, and a frozen base has no gradients.
            # Every data rank has a whole adapter.
            sum_of_gradients = Collective(1, gradients, replicate * shard, tensor)
        else:
            if not spec.tied:
                head = itemsize * ceil_div(spec.head_matmul, tensor)
            embedding = ends - head
            in_fp32 = 4 / itemsize
            # FSDP2's reductions have summed over the shards: the copies of each shard are left.
            sum_of_gradients = Collective(1, gradients, replicate, tensor * shard)

        def of_shards(times: int, size: float) -> Collective:
            return Collective(times, size, shard, tensor)

        # 2: each sum is a scatter and a gather.
        summed = 2 * self._tensor_sums() * self.tokens * spec.hidden * itemsize
        micro_batches = self.micro_batches
        return Collectives(
            tensor_parallel=Collective(1, summed, tensor, 1),
            # In each pass: of all layers but one, as the last stays for the backward, and nothing
            # hides the first one's.
            gather=of_shards(2 * micro_batches, layers * (1 - 1 / spec.depth)),
            gather_head=of_shards(micro_batches, head),
            gather_first=of_shards(micro_batches, embedding + layers / spec.depth),
            reduce=of_shards(micro_batches, (layers + head) * in_fp32),
            reduce_last=of_shards(micro_batches, embedding * in_fp32),
            gradients=sum_of_gradients,
            # Beside the sum over the data ranks.
            expert_gradients=Collective(1, 2 * 4 * estimator.summed_of_experts, tensor, 1),
        )

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
        """The seconds of the step, by part; in proportion where the chip's speed is unknown."""
        collectives = self.collectives
        micro_batches = self.micro_batches
        gather = self._gather_seconds(collectives.gather)
        copies = self._streamed_bytes / (1e9 * self.host_link)
        beside_forward = copies + gather + self._gather_seconds(collectives.gather_head)
        beside_backward = copies + gather + self._transfer_seconds(collectives.reduce)
        # Nothing hides these.
        exposed = self._gather_seconds(collectives.gather_first)
        exposed += self._transfer_seconds(collectives.reduce_last)
        of_micro_batch = exposed + beside_forward + beside_backward
        gradients = self._transfer_seconds(collectives.gradients)

        seconds = self.tokens * sum(self.token_seconds.values()) / micro_batches
        forward = FORWARD_SHARE * seconds
        backward = (1 + self._recompute_share) * seconds - forward
        exposed += max(0.0, beside_forward - forward) + max(0.0, beside_backward - backward)
        # Gradients of copies are summed beside the last backward, those of an adapter after it.
        exposed_sum = gradients
        if not self.estimator.trains_adapter:
            exposed_sum = max(0.0, gradients - backward)
        communication = {
            "tensor parallel": self._transfer_seconds(collectives.tensor_parallel),
            "host copies" if copies else "shards": micro_batches * exposed,
            "gradients": exposed_sum + self._transfer_seconds(collectives.expert_gradients),
        }
        # So many times longer the passes must be, and so the micro batch.
        hiding_passes = max(beside_forward / forward, beside_backward / backward)
        return StepTime(
            self._compute_seconds() | communication,
            hidden=micro_batches * (of_micro_batch - exposed) + gradients - exposed_sum,
            hides_from=math.ceil(hiding_passes * self.tokens / micro_batches),
        )

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
        """The parts of the step that are no communication."""
        token_seconds = sum(self.token_seconds.values())
        # A layer that recomputes reads its weights a third time.
        reads = 1 + self.memory.recomputed_layers / self.spec.depth / 2
        passes = reads * self.pass_bytes / self._memory_bandwidth
        if self.estimator.machine.device == "cpu" and self.cluster.chip.tflops:
            passes = 0.0  # its measured rate is that of such passes
        parts = {name: self.tokens * seconds for name, seconds in self.token_seconds.items()}
        if self.work.pictures:
            parts["vision part"] = self.work.pictures * self.picture_seconds
        return parts | {
            "recompute": self.tokens * token_seconds * self._recompute_share,
            "fixed cost of passes": self.micro_batches * passes,
            "update": UPDATE_BYTES * self.estimator.trained_here / self._memory_bandwidth,
            "shard copies": self._copied_bytes() / self._memory_bandwidth,
        }

    @property
    def picture_seconds(self) -> float:
        """Estimate the time of the vision part in a step whose tokens are all of pictures.

        It runs forward alone, never in 8 bits, and sees each picture once; padding has none.
        """
        tokens = rank_step(self.run, self.work.step, self.estimator.mesh).mean
        return tokens * self.spec.picture_flops / (1e12 * self._tflops)

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

    def _transfer_seconds(self, collective: Collective) -> float:
        """Estimate the seconds of all that one collective sends; none over an unknown link."""
        bandwidth = self.cluster.bandwidth(collective.ranks, collective.stride)
        return collective.sent / bandwidth if bandwidth else 0.0

    def _gather_seconds(self, gather: Collective) -> float:
        """Estimate the seconds of a gather, with the copy of this rank's shards to its buffer."""
        copy_seconds = self._shard_copy_bytes(gather) / self._memory_bandwidth
        return self._transfer_seconds(gather) + copy_seconds

    def _copied_bytes(self) -> float:
        """Bytes that a step moves to copy weights out of FSDP2's buffers, and gradients into them.

        Each is read and written.
        """
        collectives = self.collectives
        if collectives.gather.ranks == 1:
            return 0.0
        copied = 0.0
        for gather in (collectives.gather, collectives.gather_head, collectives.gather_first):
            copied += 2 * gather.times * gather.size
        # Read in the weights' dtype, written in fp32.
        for reduce in (collectives.reduce, collectives.reduce_last):
            copied += (1 + self.estimator.itemsize / 4) * reduce.times * reduce.size
        return copied

    def _shard_copy_bytes(self, gather: Collective) -> float:
        """Bytes that one gather reads and writes to copy this rank's shards into its buffer."""
        if gather.ranks == 1:
            return 0.0
        read = 1.0
        if not self.estimator.trains_adapter and self.run.train.master_weights == "fp32":
            read = 4 / self.estimator.itemsize
        return (read + 1) * gather.size / gather.ranks

    def sent(self) -> dict[str, float]:
        """Bytes that the rank sends over its `link` in the node and over its `network`."""
        sent = {"link": 0.0, "network": 0.0}
        for collective in self.collectives:
            inside = self.cluster.inside(collective.ranks, collective.stride)
            if inside > 1:
                sent["link"] += collective.times * collective.sent
            if inside < collective.ranks:
                # All members of a node share what the ring sends to the next node.
                sent["network"] += collective.times * collective.sent / inside
        return sent
