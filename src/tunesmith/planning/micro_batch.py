"""The micro batch of a run: how many tokens, and in which shapes.

Micro batch and recompute are chosen together, for the least time: a larger micro batch spreads the
fixed cost of a forward and backward, a smaller one leaves memory for activations.
"""

import math
from dataclasses import replace
from typing import NamedTuple

from tunesmith.config.schema import Run
from tunesmith.data.batches.schedule import StepSize
from tunesmith.model.spec import ModelSpec
from tunesmith.planning.machines import Cluster
from tunesmith.planning.memory import MemoryEstimator
from tunesmith.planning.run_plan import Machine, MemoryEstimate, MicroBatchLayout
from tunesmith.planning.step_time import Step
from tunesmith.planning.workload import Workload, rank_step
from tunesmith.units import Size, ceil_div

MAX_MICRO_BATCH_TOKENS = {"cuda": 16384, "cpu": 4096}  # a larger micro batch is not faster
# Of a mixture on a GPU: each pass reads all experts, whatever few a token is multiplied with.
MAX_MIXTURE_TOKENS = 32768
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


class MicroBatch(NamedTuple):
    """The micro batch of a run.

    Attributes:
        memory: of the most tokens that it has.
        fixed: every micro batch is padded to one size.
        reason: why it has this size.
    """

    size: Size
    memory: MemoryEstimate
    fixed: bool
    reason: str


def choose_micro_batch(
    estimator: MemoryEstimator, cluster: Cluster, work: Workload, previous: Size | None
) -> MicroBatch:
    """The micro batch that the recipe names, or that of the checkpoint if it fits, or the fastest.

    Args:
        previous: of the checkpoint that a run goes on from.
    """
    run = estimator.run
    batch = run.train.global_batch
    size = run.train.micro_batch
    step = rank_step(run, work.step, estimator.mesh)
    reason = "as train.micro_batch says"
    if run.train.optimizer_in_backward:
        # An update in the backward leaves no place for a second micro batch.
        size = Size(ceil_div(batch.amount, estimator.mesh.data), batch.unit)
        reason = "the whole global batch"
    elif size == "auto" and previous is not None:
        memory = estimator.estimate(tokens_of(run, previous, step, work.longest))
        if not estimator.overrun(memory):
            size = previous
            reason = "from the checkpoint"
    # Where every step has the same tokens, one padded shape serves all micro batches.
    fixed = estimator.machine.compiles[0] and run.data.pack and batch.unit == "tokens"
    if size == "auto":
        memory = fastest_micro_batch(estimator, cluster, work, fixed=fixed)
        size = Size(memory.tokens, "tokens")
        reason = "the fastest in the estimate"
    else:
        memory = estimator.estimate(tokens_of(run, size, step, work.longest))
        fixed = fixed and size.unit == "tokens"
    if fixed:
        # A padded row must hold the longest example.
        size = Size(max(size.amount, work.longest), "tokens")
    return MicroBatch(size, memory, fixed, reason)


def fastest_micro_batch(
    estimator: MemoryEstimator, cluster: Cluster, work: Workload, *, fixed: bool
) -> MemoryEstimate:
    """The micro batch with the shortest step, in whole rows, of those that fit; else the nearest to
    it. The largest of equal ones.

    fixed: every micro batch is padded to one size, so that a step should be a whole number of them.
    """
    run = estimator.run
    estimators = [estimator]
    if estimator.streams and run.train.recompute == "auto":
        # More layers then stay on the device, and fewer are copied.
        in_full = replace(run, train=replace(run.train, recompute="full"))
        estimators.append(replace(estimator, run=in_full))
    limit = most_tokens(estimator.spec, estimator.machine.device)
    step = rank_step(run, work.step, estimator.mesh)
    rows = min(limit // run.row_tokens, math.ceil(step.largest / run.row_tokens))

    def cost(memory: MemoryEstimate) -> tuple[float, float]:
        overrun = estimator.overrun(memory)
        if overrun:
            return overrun, 0.0
        time = Step(estimator, cluster, work, memory, fixed).time()
        return 0.0, sum(time.parts.values())

    counts = range(max(1, rows), 0, -1)
    memories = [each.estimate(n * run.row_tokens) for n in counts for each in estimators]
    # `min` takes the first of equal ones.
    return min(memories, key=cost)


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
        row = chosen.memory.tokens if run.data.pack else longest
        bucket = 1 << max(0, (row // MIN_ROW_LENGTHS).bit_length() - 1)
    if not machine.compiles[0]:
        return MicroBatchLayout(size, multiple=bucket)
    max_document = ceil_div(longest, DOCUMENT_BLOCK) * DOCUMENT_BLOCK
    if chosen.fixed:
        return MicroBatchLayout(size, row_length=size.amount, max_document=max_document)
    multiple = PACKED_ROW_MULTIPLE if run.data.pack else DOCUMENT_BLOCK // 8
    return MicroBatchLayout(size, multiple=max(bucket, multiple), max_document=max_document)
