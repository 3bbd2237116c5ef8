"""Correct the memory plan by a trial: one micro batch, forward and backward, on the real model.

An estimate errs by what a compiler decides to keep. Here the first micro batch is run before there is an optimizer, what
its layers kept is measured, and as many layers are set to run again as that leaves no room for: the fewest that fit.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch

from tunesmith.data.batch import Batch
from tunesmith.errors import MachineError
from tunesmith.methods.base import TrainModel
from tunesmith.runtime.memory_plan import MemoryPlan
from tunesmith.runtime.recompute import recompute_layers


class MemoryMeter(Protocol):
    """Bytes of memory on a device."""

    def held(self) -> int:
        """Held now."""

    def peak(self) -> int:
        """The most that was held since `restart`."""

    def restart(self) -> None:
        """Forget the peak."""


class CudaMeter:
    """What torch's allocator holds on one GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def held(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def restart(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)


def calibrate_recompute(
    model: TrainModel, batch: Batch, plan: MemoryPlan, meter: MemoryMeter, *, budget: int, later: int
) -> int:
    """Set how many layers are run again in the backward, and return it.

    Args:
        model: with its weights, before there is an optimizer; its gradients are dropped afterwards.
        batch: a micro batch of the run, on the model's device.
        plan: the estimate to begin with.
        meter: of the model's device.
        budget: bytes that may be held in all.
        later: bytes of optimizer state, which comes with the first step.

    Raises:
        MachineError: the micro batch does not fit even where every layer is run again.
    """
    layers, count = model.layers, plan.recomputed
    was = model.training
    model.train()
    while True:
        recompute_layers(layers, count)
        meter.restart()
        try:
            kept = _trial(model, batch, meter)
            break
        except torch.OutOfMemoryError as error:
            if count == len(layers):
                raise MachineError(
                    f"a micro batch of {batch.input_ids.numel():,} tokens does not fit into this GPU's memory",
                    where="train.micro_batch",
                    why=f"with every layer run again; {str(error).partition('.')[0]}",
                    fix="a smaller train.micro_batch or data.seq_len, or model.quantize=nf4",
                ) from error
        finally:
            model.zero_grad(set_to_none=True)
        count = min(len(layers), count + max(1, len(layers) // 8))
    room = budget - later - meter.peak()
    size = plan.micro_tokens / batch.input_ids.numel()  # the largest micro batch, in trials
    count = revised(count, len(layers), kept=kept * size, rerun=plan.rerun_bytes * plan.micro_tokens, room=room)
    recompute_layers(layers, count)
    model.train(was)
    return count


def _trial(model: TrainModel, batch: Batch, meter: MemoryMeter) -> int:
    """Forward and backward; the bytes that the forward kept. A function of its own, so that a loss whose backward
    failed, and all that hangs on it, is gone before the next trial."""
    before = meter.held()
    loss = model(batch).loss
    kept = meter.held() - before
    loss.backward()
    return kept


def revised(count: int, layers: int, *, kept: float, rerun: float, room: float) -> int:
    """How many layers to run again where `count` of `layers` together keep `kept` bytes and leave `room` (or lack it).

    Args:
        rerun: bytes that one layer keeps if it is run again.
    """
    if count == layers:
        # Nothing was measured of a layer that is not run again; what a kept one takes stays the estimate's guess.
        return count
    saving = (kept - count * rerun) / (layers - count) - rerun
    if saving <= 0:
        return count
    return min(layers, max(0, count - math.floor(room / saving)))
