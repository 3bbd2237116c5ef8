"""A trial on the GPU, which corrects the planned number of recomputed layers."""

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tunesmith.data.batch import Batch
from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.errors import MachineError
from tunesmith.planning.run_plan import RunPlan
from tunesmith.runtime.recompute import recompute_layers


class MemoryMeter:
    """Bytes that torch's allocator has on one GPU: now, at most since `restart`, and at most `before` the last restart."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.device, self.cuda, self.before = device, cuda, 0

    def allocated(self) -> int:
        return int(self.cuda.memory_allocated(self.device))

    def peak(self) -> int:
        return int(self.cuda.max_memory_allocated(self.device))

    def restart(self) -> None:
        self.before = max(self.before, self.peak())
        self.cuda.empty_cache()
        self.cuda.reset_peak_memory_stats(self.device)


def calibrate_recompute(
    model: Any,
    plan: RunPlan,
    batch: Batch,
    meter: MemoryMeter,
    *,
    budget: int,
    ranks: Ranks = ONE_PROCESS,
    shares: bool = False,
) -> RunPlan:
    """Set how many of the model's `layers` are recomputed by forwards and backwards of `batch`; the plan with this number.

    The model has its weights and no optimizer yet; its gradients are dropped. `budget` bytes may be allocated in all.
    The first trial is the estimate's where that leaves a quarter of the budget, more than it was ever off. Elsewhere it
    keeps the activations of an eighth of the layers at most, and of fewer where the estimate says so; fewer layers recompute
    only as far as the measured peak, with what they are measured to keep more, is within the budget: on an integrated GPU
    a trial that ran out of memory would freeze the machine, on another it leaves the allocator in pieces.

    A collective call of `ranks`, with the same plan and as large a batch: all take the number that suits the one with the
    least room. `shares`: they need each other within a forward or backward.

    MachineError, with the plan's advice, where the micro batch does not fit although every layer is recomputed; and where a
    rank runs out of memory while others wait for its part, which cannot try again.
    """
    layers, estimate, training = model.layers, plan.memory, model.training
    total, tokens = len(layers), batch.input_ids.numel()
    trial, count = estimate.recomputed_layers, total + 1
    if estimate.total > budget * 3 // 4:
        trial = max(trial, total - max(1, total // 8))
    model.train()
    # What the last trial leads to is measured, unless it is 0
    while trial < count and (trial or count > total):
        count = trial
        recompute_layers(layers, count)
        meter.restart()
        with nullcontext() if shares else ranks.together():
            try:
                activations = _trial(model, batch, meter)
            except torch.OutOfMemoryError as error:
                if count == total or shares:
                    what = f"a micro batch of {tokens:,} tokens does not fit into this GPU's memory"
                    why = (
                        f"with {count} of {total} layers recomputed; {str(error).partition('.')[0]}"
                    )
                    fix = plan.less_memory(recompute=False)
                    raise MachineError(what, where="train.micro_batch", why=why, fix=fix) from error
                activations = None  # others have taken memory since the plan was made
            finally:
                model.zero_grad(set_to_none=True)
        measured = ranks.gather((activations, meter.peak()))
        if None in (kept for kept, _ in measured):
            trial, count = total, total + 1
            continue
        activations, peak = (max(figures) for figures in zip(*measured, strict=True))
        more = activations * (estimate.tokens / tokens - 1)  # in the largest micro batch
        room = budget - estimate.optimizer - estimate.copies - peak - more
        trial = revise_recomputed(
            count, total, activations + more, estimate.recomputed_layer, room=room
        )
    recompute_layers(layers, trial)
    model.train(training)
    return replace(plan, recomputed_layers=trial, trial_peak=meter.before)


def _trial(model: nn.Module, batch: Batch, meter: MemoryMeter) -> float:
    """Forward and backward; the bytes that the forward kept. A function of its own, so that a loss whose backward
    failed is freed, with its graph, before the next trial."""
    before = meter.allocated()
    loss = model(batch).loss
    activations = meter.allocated() - before
    loss.backward()
    return activations


def revise_recomputed(
    count: int, layers: int, activations: float, recomputed_layer: float, *, room: float
) -> int:
    """How many of `layers` to recompute, where `count` of them do and all together keep `activations` bytes.

    A recomputed layer keeps `recomputed_layer` bytes; `room` bytes are left, or missing where it is negative.
    """
    if count == layers:
        return count  # what a layer keeps that is not recomputed was not measured
    saving = (activations - count * recomputed_layer) / (layers - count) - recomputed_layer
    if saving <= 0:
        return count
    return min(layers, max(0, count - math.floor(room / saving)))
