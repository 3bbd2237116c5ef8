"""Choice of the micro batch of a run: its number of tokens, and the shapes of its rows.

Micro batch and recomputation are chosen together to minimize the time. A larger micro batch spreads
the fixed cost of a forward and backward over more tokens. A smaller micro batch leaves memory for
activations, so that fewer layers recompute.
"""

import math
from dataclasses import replace
from typing import NamedTuple

from tunesmith.batches.schedule import StepSize
from tunesmith.config.schema import Run
from tunesmith.model.arch.spec import ModelSpec
from tunesmith.planning.machines import Cluster
from tunesmith.planning.memory import MemoryEstimator
from tunesmith.planning.run_plan import Machine, MemoryEstimate, MicroBatchLayout
from tunesmith.planning.step_time import Step
from tunesmith.planning.workload import Workload, rank_step
from tunesmith.units import Size, ceil_div

MAX_MICRO_BATCH_TOKENS = {"cuda": 16384, "cpu": 4096}  # a larger micro batch is not faster
# Maximum number of tokens for mixtures of experts on a GPU. It is larger than for dense models,
# because each pass reads the weights of all experts, although a token uses only a few.
MAX_MIXTURE_TOKENS = 32768
# With compiled graphs, rows of different lengths are padded to a multiple of this number of tokens.
# The padding is about 1 % of a usual step.
PACKED_ROW_MULTIPLE = 128
# The length of the longest document is rounded up to a multiple of the attention kernel's block
# size.
DOCUMENT_BLOCK = 128
# Without expandable segments (device.prepare_allocator), each row length leaves blocks in the
# allocator that rows of other lengths cannot use. Therefore the number of different row lengths is
# limited: padding leaves between MIN_ROW_LENGTHS and 2 * MIN_ROW_LENGTHS different lengths.
MIN_ROW_LENGTHS = 16


def max_tokens(spec: ModelSpec, device: str) -> int:
    """Return the maximum tokens of a planned micro batch. `device` is `cuda:0` or `cpu`."""
    device_type = device.partition(":")[0]
    if device_type == "cuda" and any(layer.experts for layer in spec.layers):
        return MAX_MIXTURE_TOKENS
    return MAX_MICRO_BATCH_TOKENS[device_type]


class MicroBatch(NamedTuple):
    """The chosen micro batch of a run: its size, memory and reason.

    Attributes:
        memory: estimated memory for a micro batch with the maximum number of tokens.
        one_shape: whether every micro batch is padded to the same shape.
        reason: the reason for this size.
    """

    size: Size
    memory: MemoryEstimate
    one_shape: bool
    reason: str


def choose_micro_batch(
    estimator: MemoryEstimator, cluster: Cluster, work: Workload, previous: Size | None
) -> MicroBatch:
    """Return the micro batch that the recipe sets. If the recipe has `auto`, return the micro batch
    of the checkpoint if it fits, else the fastest one.

    Args:
        previous: micro batch of the checkpoint from which a run resumes. None for a new run.
    """
    run = estimator.run
    batch = run.train.global_batch
    size = run.train.micro_batch
    step = rank_step(run, work.step, estimator.mesh)

    def estimate(size: Size) -> MemoryEstimate:
        return estimator.estimate(max_batch_tokens(run, size, step, work.longest))

    reason = "as train.micro_batch says"
    if run.train.optimizer_in_backward:
        # With an update in the backward, a step has only one micro batch, so the micro batch is
        # this rank's part of the global batch.
        size = Size(ceil_div(batch.amount, estimator.mesh.data), batch.unit)
        reason = "the whole global batch"
    elif size == "auto" and previous is not None and not estimator.overrun(estimate(previous)):
        size = previous
        reason = "from the checkpoint"
    # If every step has the same number of tokens, all micro batches can be padded to one shape.
    one_shape = estimator.machine.compiles[0] and run.data.pack and batch.unit == "tokens"
    if size == "auto":
        memory = fastest_micro_batch(estimator, cluster, work, one_shape=one_shape)
        size = Size(memory.tokens, "tokens")
        reason = "the fastest in the estimate"
    else:
        memory = estimate(size)
        one_shape = one_shape and size.unit == "tokens"
    if one_shape:
        # The row must be long enough for the longest example.
        size = Size(max(size.amount, work.longest), "tokens")
    return MicroBatch(size, memory, one_shape, reason)


def fastest_micro_batch(
    estimator: MemoryEstimator, cluster: Cluster, work: Workload, *, one_shape: bool
) -> MemoryEstimate:
    """Return the micro batch that fits into memory and with which a step takes the least time. All
    compared micro batches have one or more whole rows.

    If no micro batch fits, return the one that exceeds the memory least. If several micro batches
    take the same time, return the largest.

    Args:
        one_shape: whether every micro batch is padded to one shape. A step should then be a whole
            number of micro batches.
    """
    run = estimator.run
    estimators = [estimator]
    if estimator.streams and run.train.recompute == "auto":
        # Also try to recompute all layers. This frees memory, so more layers stay on the device and
        # fewer are copied from the host.
        recompute_all = replace(run, train=replace(run.train, recompute="full"))
        estimators.append(replace(estimator, run=recompute_all))
    limit = max_tokens(estimator.spec, estimator.machine.device)
    step = rank_step(run, work.step, estimator.mesh)
    rows = math.ceil(step.largest / run.row_tokens)
    rows = min(rows, limit // run.row_tokens)

    def cost(memory: MemoryEstimate) -> tuple[float, float]:
        overrun = estimator.overrun(memory)
        if overrun:
            return overrun, 0.0
        return 0.0, sum(Step(estimator, cluster, work, memory, one_shape).time().parts.values())

    memories = []
    for count in range(max(1, rows), 0, -1):
        tokens = count * run.row_tokens
        memories += [each.estimate(tokens) for each in estimators]
    # `min` returns the first of equal elements, and the largest micro batch is first.
    return min(memories, key=cost)


def max_batch_tokens(run: Run, size: Size, step: StepSize, longest: int) -> int:
    """Return the maximum number of tokens of a micro batch, including padding.

    Args:
        longest: tokens of the longest example.
    """
    if size.unit == "tokens":
        return size.amount
    tokens = size.amount * longest  # without packing, each row is padded to the longest row
    if run.data.pack:
        return min(tokens, max(step.largest, longest))
    return tokens


def make_layout(run: Run, machine: Machine, chosen: MicroBatch, longest: int) -> MicroBatchLayout:
    """Return the layout that gives micro batches their shapes. `longest` is the number of tokens of
    the longest example.
    """
    size = chosen.size
    bucket = 1
    if machine.integrated:
        # Pad row lengths to a multiple of a power of two. The power of two is at most row /
        # MIN_ROW_LENGTHS, where `row` is the longest row.
        row = chosen.memory.tokens if run.data.pack else longest
        bucket = 1 << max(0, (row // MIN_ROW_LENGTHS).bit_length() - 1)
    if not machine.compiles[0]:
        return MicroBatchLayout(size, multiple=bucket)
    max_document = ceil_div(longest, DOCUMENT_BLOCK) * DOCUMENT_BLOCK
    if chosen.one_shape:
        return MicroBatchLayout(size, row_length=size.amount, max_document=max_document)
    multiple = PACKED_ROW_MULTIPLE if run.data.pack else DOCUMENT_BLOCK // 8
    return MicroBatchLayout(size, multiple=max(bucket, multiple), max_document=max_document)
