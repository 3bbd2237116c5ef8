"""Trial steps on a GPU that correct the planned number of recomputed layers."""

import math
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType

import torch

from tunesmith.batches.batch import Batch
from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.errors import MachineError
from tunesmith.planning.run_plan import RunPlan
from tunesmith.runtime.recompute import recompute_layers
from tunesmith.train_model import TrainModel


class MemoryMeter:
    """Reads the memory of one GPU from torch's allocator: the current bytes, and the peak since the
    last call of `restart`.

    Attributes:
        previous_peak: maximum peak before the last call of `restart`.
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
    """Set the number of recomputed layers from trials on the GPU. Each trial runs a forward and a
    backward and measures the memory.

    The first trial must not run out of memory: on an integrated GPU this would freeze the machine,
    and on other GPUs it fragments the allocator's memory. If the estimate needs at most three
    quarters of the budget, the first trial recomputes the estimated number of layers, because the
    estimate was never wrong by more than a quarter. Otherwise at most an eighth of the layers keep
    their activations in the first trial. In later trials, the number of recomputed layers is only
    reduced if the measured peak plus the additional activations are within the budget.

    This is a collective call. All ranks pass the same plan and a batch of the same size. All ranks
    use the same number of recomputed layers, which fits on the rank with the least free memory.

    Args:
        model: the model with its weights, without an optimizer. Its gradients are dropped.
        budget: maximum bytes that may be allocated.
        shares: whether the ranks communicate within a forward or backward.

    Returns:
        The plan with the new number.

    Raises:
        MachineError: the micro batch does not fit although every layer is recomputed, or a rank
            runs out of memory while other ranks wait for it, so that no other number can be tried.
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
        # Reset the statistics, so that `meter.peak()` below is the peak of this trial.
        meter.restart()
        activations = None
        # If `shares`, the other ranks of a failed rank wait in a collective of the trial. The ranks
        # cannot exchange errors then, so only the failed rank raises its error.
        with nullcontext() if shares else ranks.raise_on_all_ranks():
            try:
                activations = _trial(model, batch, meter)
            except torch.OutOfMemoryError as error:
                if count == total or shares:
                    raise MachineError(
                        f"a micro batch of {tokens:,} tokens does not fit into this GPU's memory",
                        where="train.micro_batch",
                        why=f"{str(error).partition('.')[0]}, although {count} of {total} layers "
                        "are recomputed",
                        fix="set model.quantize=nf4 or a smaller data.seq_len, or end other "
                        "programs that use this GPU",
                    ) from error
            finally:
                model.zero_grad(set_to_none=True)
        by_rank = ranks.all_gather_object((activations, meter.peak()))
        peak = max(peak for _, peak in by_rank)
        measured = [activations for activations, _ in by_rank if activations is not None]
        if len(measured) < len(by_rank):
            # A rank ran out of memory, because other programs use more memory than when the plan
            # was made. Recompute all layers.
            count = total
            continue
        activations = max(measured)
        # Bytes that the activations of the largest micro batch need in addition to those of
        # `batch`.
        extra = activations * (estimate.tokens / tokens - 1)
        room = budget - estimate.optimizer - estimate.copies - peak - extra
        revised = revise_recomputed(
            count, total, activations + extra, estimate.recomputed_layer, room=room
        )
        # If the new number is smaller, measure it in another trial before it is used. Only 0 is
        # used without another trial, unless layers are streamed.
        if revised >= count or (revised == 0 and not plan.streamed_layers):
            break
        count = revised
    recompute_layers(layers, revised)
    model.train(was_training)
    # Store the peak of all earlier trials, because the allocator's statistics contain only the peak
    # of the last trial.
    return replace(plan, recomputed_layers=revised, trial_peak=meter.previous_peak)


def _trial(model: TrainModel, batch: Batch, meter: MemoryMeter) -> float:
    """Run a forward and backward. Return the bytes that the forward saved for the backward.

    This is a separate function, so that the loss and its graph are freed before the next trial,
    even if the backward fails.
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
    """Compute the number of layers to recompute, from a trial with `count` recomputed layers.

    Args:
        layers: number of layers of the model.
        activations: bytes that all layers together saved in the trial.
        recomputed_layer: bytes that a recomputed layer saves.
        room: bytes that were free in the trial. Negative if the trial needed more than the budget.
    """
    if count == layers:
        return count  # all layers were recomputed, so the activations of a whole layer are unknown
    # activations = count * recomputed_layer + (layers - count) * whole_layer
    whole_layer = (activations - count * recomputed_layer) / (layers - count)
    saving = whole_layer - recomputed_layer
    if saving <= 0:
        return count
    # Round the number of saved layers down: it is safer to recompute one layer too many.
    return min(layers, max(0, count - math.floor(room / saving)))
