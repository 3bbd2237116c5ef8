"""The micro batch of a run: how many tokens, in which shapes, and what a pass costs beside them.

Micro batch and recompute are chosen together, for the least time: a larger micro batch spreads the
fixed cost of a forward and backward, a smaller one leaves memory for activations.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from tunesmith.config.schema import Run
from tunesmith.data.batches.schedule import StepSize
from tunesmith.model.spec import ModelSpec
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.planning.measured_layers import count_expert_adapter
from tunesmith.planning.memory import MemoryEstimator
from tunesmith.planning.run_plan import Machine, MicroBatchLayout
from tunesmith.units import Size, ceil_div

MAX_MICRO_BATCH_TOKENS = {"cuda": 16384, "cpu": 4096}  # a larger micro batch is not faster
# Of a mixture on a GPU: each pass reads all experts, whatever few a token is multiplied with.
MAX_MIXTURE_TOKENS = 32768
# Operations in the time of a byte, in 16 bits and in 8, by Machine.integrated. An H200 reaches 700
# TFLOP/s (in 8 bits twice that) and 4 TB/s, and other discrete cards lie between 150 and 300; a
# GB10 92 (in 8 bits 188) and 226 GB/s. So a pass over 70B in nf4 costs as much as 396 tokens on an
# H200 and as 922 on a GB10, which prefers larger micro batches.
OPERATIONS_PER_BYTE = {
    False: (175, 350),
    True: (407, 832),
}
# Rows of the hidden width and of an expert's that the kernels around the products of experts read
# and write for each expert of a token, forward and backward: gathers, sums and activations, as
# benchmarks/speed/count_kernels.py counts them. Where one kernel multiplies all experts, the
# products of an adapter's low rank go through memory too; in an expert's turn they are in the
# cache.
EXPERT_ROWS = (5, 17)
GROUPED_ROWS = (20, 35)
# A second forward, as a share of a step: 2 of 6 operations, or of 4.
RECOMPUTE_SHARE = {"none": 1 / 3, "lora": 1 / 2}
# Compiled graphs: rows of varied steps are padded to a multiple of so many tokens, a hundredth of a
# usual step...
PACKED_ROW_MULTIPLE = 128
# ... and the longest document is stated in blocks of the attention kernel.
DOCUMENT_BLOCK = 128
# Without expandable segments (device.prepare_allocator) each length leaves blocks of its own in the
# allocator, which no other length fits. So rows of varied steps are padded to one of at least so
# many lengths, and fewer than twice as many.
MIN_ROW_LENGTHS = 16


def most_tokens(spec: ModelSpec, device: str) -> int:
    """Tokens of the largest micro batch that is planned on a device, `cuda:0` or `cpu`."""
    device_type = device.partition(":")[0]
    if device_type == "cuda" and any(layer.experts for layer in spec.layers):
        return MAX_MIXTURE_TOKENS
    return MAX_MICRO_BATCH_TOKENS[device_type]


def step_units(run: Run) -> int:
    """Count what an optimizer step has, and no rank shares with another.

    Examples, or packed rows where the recipe counts tokens.
    """
    size = run.train.global_batch
    if size.unit == "examples":
        return size.amount
    return max(1, size.amount // run.row_tokens)


def rank_step(run: Run, step: StepSize, mesh: MeshShape) -> StepSize:
    """Find what the busiest data rank takes of a step."""
    units = step_units(run)
    # Examples and rows are not divided: the busiest rank's share is rounded up.
    share = ceil_div(units, mesh.data) / units
    return StepSize(step.mean * share, math.ceil(step.largest * share))


class MicroBatch(NamedTuple):
    """The micro batch of a run.

    Attributes:
        tokens: the most that it has, padding counted.
        fixed: every micro batch is padded to one size.
        reason: why it has this size.
    """

    size: Size
    tokens: int
    fixed: bool
    reason: str


def choose_micro_batch(
    estimator: MemoryEstimator, step: StepSize, longest: int, previous: Size | None
) -> MicroBatch:
    """The micro batch that the recipe names, or that of the checkpoint if it fits, or the fastest.

    Args:
        step: a rank's share of a step.
        longest: tokens of the longest example.
        previous: of the checkpoint that a run goes on from.
    """
    run = estimator.run
    batch = run.train.global_batch
    size = run.train.micro_batch
    reason = "as train.micro_batch says"
    if run.train.optimizer_in_backward:
        # An update in the backward leaves no place for a second micro batch.
        size = Size(ceil_div(batch.amount, estimator.mesh.data), batch.unit)
        reason = "the whole global batch"
    elif size == "auto" and previous is not None:
        memory = estimator.estimate(tokens_of(run, previous, step, longest))
        if not estimator.overrun(memory):
            size = previous
            reason = "from the checkpoint"
    if size != "auto" and size.unit == "examples":
        return MicroBatch(size, tokens_of(run, size, step, longest), False, reason)
    # Where every step has the same tokens, one padded shape serves all micro batches.
    fixed = estimator.machine.compiles[0] and run.data.pack and batch.unit == "tokens"
    if size == "auto":
        tokens = fastest_micro_batch(estimator, step, fixed=fixed)
        reason = "the fastest in the estimate"
    else:
        tokens = size.amount
    # A padded row must hold the longest example.
    size = Size(max(tokens, longest) if fixed else tokens, "tokens")
    return MicroBatch(size, tokens, fixed, reason)


def fastest_micro_batch(estimator: MemoryEstimator, step: StepSize, *, fixed: bool) -> int:
    """Tokens of the micro batch with the least time, in whole rows; the largest of equal.

    fixed: every micro batch is padded to one size, so that a step should be a whole number of them.
    """
    row = estimator.run.row_tokens
    limit = most_tokens(estimator.spec, estimator.machine.device)
    largest = min(limit, math.ceil(step.largest / row) * row)
    largest = max(row, largest // row * row)
    costs = PassCosts(estimator)
    # `min` takes the first of equal ones.
    candidates = range(largest, 0, -row)
    return min(candidates, key=lambda tokens: costs.step_cost(tokens, step, fixed=fixed))


@dataclass(frozen=True)
class PassCosts:
    """The costs of a forward and backward whatever its tokens are, and beside their products."""

    estimator: MemoryEstimator

    def step_cost(self, tokens: int, step: StepSize, *, fixed: bool) -> float:
        """Time of an optimizer step, in units of one without fixed cost and recompute.

        Huge where it does not fit.
        """
        estimator = self.estimator
        memory = estimator.estimate(tokens)
        recomputed = memory.recomputed_layers / estimator.spec.depth
        work = 1 + RECOMPUTE_SHARE[estimator.run.adapter.kind] * recomputed
        micro_batches = math.ceil(step.mean / tokens)
        if fixed:
            # Padding up to the fixed size is computed too.
            work *= micro_batches * tokens / step.mean
        pass_tokens = self.pass_tokens + self._expert_pass_tokens * (1 + recomputed / 2)
        fixed_cost = pass_tokens * micro_batches / step.mean
        # Whatever fits is cheaper than what does not; of these the least overrun is.
        return work + fixed_cost + 1e6 * estimator.overrun(memory)

    @cached_property
    def pass_tokens(self) -> float:
        """The fixed cost of a forward and backward, in tokens whose products take as long.

        Experts are not counted.
        """
        spec = self.estimator.spec
        linear_share = (spec.active - spec.active_of_experts) / spec.active
        # 4: the operations of a token and a weight.
        tokens = self.estimator.scheme.traffic_bytes * self._operations_per_byte / 4
        return tokens * linear_share * self._product_share

    @cached_property
    def _expert_pass_tokens(self) -> float:
        """Count as `pass_tokens` does, of the experts: a third more where a layer recomputes."""
        bytes_of_token = 4 * self.estimator.spec.active / self._operations_per_byte
        return self.expert_pass_bytes * self._product_share / bytes_of_token

    @property
    def expert_pass_bytes(self) -> float:
        """Bytes of this rank's experts that one forward and backward reads and makes dense.

        All experts: those of few tokens are read as those of many.
        """
        estimator = self.estimator
        spec = estimator.spec
        scheme = estimator.scheme
        experts = spec.layer_matrices - spec.linear_matrices
        # The products read dense weights; codes are dequantized first.
        dense_bytes = scheme.expert_dense_bytes
        # Experts that train in full are Transformers', and in no compiled graph.
        compiled = estimator.machine.compiles[0] and estimator.trains_adapter
        if compiled and scheme.compiled_dense_bytes:
            dense_bytes = scheme.compiled_dense_bytes
        return 2 * (experts * estimator.itemsize + spec.expert_stacks * dense_bytes)

    @cached_property
    def expert_traffic(self) -> float:
        """Bytes of a token that the kernels around the products of experts move, both ways."""
        estimator = self.estimator
        spec = estimator.spec
        has_adapter = count_expert_adapter(spec, estimator.run.adapter)
        in_one_kernel = estimator.machine.grouped_mm and has_adapter
        of_hidden, of_width = GROUPED_ROWS if in_one_kernel else EXPERT_ROWS
        elements = 0
        for layer in spec.layers:
            if layer.expert_count:
                elements += of_hidden * layer.experts_per_token * spec.hidden
                elements += of_width * layer.intermediate
        return estimator.itemsize * elements / estimator.mesh.tensor

    @property
    def _product_share(self) -> float:
        """The share of products in the time of a token; the rest is `expert_traffic`."""
        products = 4 * self.estimator.spec.active
        return products / (products + self.expert_traffic * self._operations_per_byte)

    @property
    def _operations_per_byte(self) -> int:
        estimator = self.estimator
        in_8_bits = estimator.scheme.has_fp8_matmuls
        return OPERATIONS_PER_BYTE[estimator.machine.integrated][in_8_bits]


def tokens_of(run: Run, size: Size, step: StepSize, longest: int) -> int:
    """The most tokens of a micro batch, padding counted.

    longest: tokens of the longest example.
    """
    if size.unit == "tokens":
        return size.amount
    tokens = size.amount * longest  # without packing each row is padded to the longest
    if run.data.pack:
        return min(tokens, max(step.largest, longest))
    return tokens


def layout_of(run: Run, machine: Machine, chosen: MicroBatch, longest: int) -> MicroBatchLayout:
    """The shapes of micro batches; `longest` as for `choose_micro_batch`."""
    size = chosen.size
    bucket = 1
    if machine.integrated:
        # The largest power of two in a MIN_ROW_LENGTHS-th of the longest row.
        row = chosen.tokens if run.data.pack else longest
        bucket = 1 << max(0, (row // MIN_ROW_LENGTHS).bit_length() - 1)
    if not machine.compiles[0]:
        return MicroBatchLayout(size, multiple=bucket)
    max_document = ceil_div(longest, DOCUMENT_BLOCK) * DOCUMENT_BLOCK
    if chosen.fixed:
        return MicroBatchLayout(size, row_length=size.amount, max_document=max_document)
    multiple = PACKED_ROW_MULTIPLE if run.data.pack else DOCUMENT_BLOCK // 8
    return MicroBatchLayout(size, multiple=max(bucket, multiple), max_document=max_document)
