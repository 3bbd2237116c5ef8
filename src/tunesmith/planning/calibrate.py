"""The trial on a GPU that corrects the planned number of recomputed layers."""

import math
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType

import torch

from tunesmith.data.batches.batch import Batch
from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.errors import MachineError
from tunesmith.methods.base import TrainModel
from tunesmith.planning.run_plan import RunPlan
from tunesmith.runtime.recompute import recompute_layers


class MemoryMeter:
    """Bytes that torch's allocator has on one GPU: now, and at most since `restart`.

    Attributes:
        previous_peak: at most before the last restart.
    """

    def __init__(self, device: torch.device, cuda: ModuleType = torch.cuda) -> None:
        self.device = device
        self.cuda = cuda
        self.previous_peak = 0

    def allocated(self) -> int:
        return int(self.cuda.memory_allocated(self.device))

    def peak(self) -> int:
        return int(self.cuda.max_memory_allocated(self.device))

    def restart(self) -> None:
        self.previous_peak = max(self.previous_peak, self.peak())
        self.cuda.empty_cache()
        self.cuda.reset_peak_memory_stats(self.device)


def calibrate_recompute(
    model: TrainModel,
    plan: RunPlan,
    batch: Batch,
    meter: MemoryMeter,
    *,
    budget: int,
    ranks: Ranks = ONE_PROCESS,
    shares: bool = False,
) -> RunPlan:
    """Set how many of the model's `layers` are recomputed, by forwards and backwards of `batch`.

    The first trial is the estimate's where that leaves a quarter of the budget, more than it was
    ever off. Elsewhere it keeps the activations of an eighth of the layers at most, and of fewer
    where the estimate says so. Fewer layers recompute only as far as the measured peak, with what
    they are measured to keep more, is within the budget: on an integrated GPU a trial that ran out
    of memory would freeze the machine, on another it leaves the allocator in pieces.

    A collective call of `ranks`, with the same plan and as large a batch: all take the number that
    suits the one with the least room.

    Args:
        model: with its weights and without an optimizer; its gradients are dropped.
        budget: bytes that may be allocated in all.
        shares: the ranks need each other within a forward or backward.

    Returns:
        The plan with this number.

    Raises:
        MachineError: with the plan's advice, where the micro batch does not fit although every
            layer is recomputed; and where a rank runs out of memory while others wait for its part,
            which cannot try again.
    """
    layers = model.layers
    total = len(layers)
    estimate = plan.memory
    tokens = batch.input_ids.numel()
    count = estimate.recomputed_layers
    if estimate.total > budget * 3 // 4:
        count = max(count, total - max(1, total // 8))
    was_training = model.training
    model.train()
    while True:
        recompute_layers(layers, count)
        # The peak that is read below is this trial's alone.
        meter.restart()
        activations = None
        # A rank that fails within a collective leaves the others waiting there: no gather after it.
        with nullcontext() if shares else ranks.raise_on_all_ranks():
            try:
                activations = _trial(model, batch, meter)
            except torch.OutOfMemoryError as error:
                if count == total or shares:
                    raise MachineError(
                        f"a micro batch of {tokens:,} tokens does not fit into this GPU's memory",
                        where="train.micro_batch",
                        why=f"with {count} of {total} layers recomputed; "
                        f"{str(error).partition('.')[0]}",
                        fix=plan.less_memory(recompute=False),
                    ) from error
            finally:
                model.zero_grad(set_to_none=True)
        by_rank = ranks.all_gather_object((activations, meter.peak()))
        peak = max(peak for _, peak in by_rank)
        measured = [activations for activations, _ in by_rank if activations is not None]
        if len(measured) < len(by_rank):
            # Others use more memory than at the time of the plan.
            count = total
            continue
        activations = max(measured)
        # What the largest micro batch keeps beyond this one.
        more = activations * (estimate.tokens / tokens - 1)
        room = budget - estimate.optimizer - estimate.copies - peak - more
        revised = revise_recomputed(
            count, total, activations + more, estimate.recomputed_layer, room=room
        )
        # Fewer layers are measured before they are believed, except none at all.
        if revised >= count or (revised == 0 and not plan.streamed_layers):
            break
        count = revised
    recompute_layers(layers, revised)
    model.train(was_training)
    # The allocator itself still counts the last trial's peak.
    return replace(plan, recomputed_layers=revised, trial_peak=meter.previous_peak)


def _trial(model: TrainModel, batch: Batch, meter: MemoryMeter) -> float:
    """Forward and backward; the bytes that the forward saved for it.

    A function of its own, so that a loss whose backward failed is freed, with its graph, before the
    next trial.
    """
    at_start = meter.allocated()
    with model.step_context(batch):
        loss = model(batch).loss
        activations = meter.allocated() - at_start
        loss.backward()
    return activations


def revise_recomputed(
    count: int, layers: int, activations: float, recomputed_layer: float, *, room: float
) -> int:
    """Choose how many of `layers` to recompute, by a trial in which `count` of them did.

    Args:
        activations: bytes that all layers together saved.
        recomputed_layer: bytes that a recomputed one saves.
        room: bytes that were left, or missing where it is negative.
    """
    if count == layers:
        return count  # what a layer saves that is not recomputed was not measured
    # activations = count * recomputed_layer + (layers - count) * whole_layer
    whole_layer = (activations - count * recomputed_layer) / (layers - count)
    saving = whole_layer - recomputed_layer
    if saving <= 0:
        return count
    # Rounded down: one layer too many recomputes rather than one too few.
    return min(layers, max(0, count - math.floor(room / saving)))
