"""Recompute a layer's forward in the backward instead of keeping its activations: memory for time.

`torch.utils.checkpoint` on the forward of a decoder layer, instead of Transformers' flag, which wraps differently from
version to version. One layer of 32 costs a third of that layer's time, a hundredth of the step's. How many layers
recompute is estimated by `resolve.py`, which errs by what a compiler decides to keep; on a GPU a trial corrects it.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from tunesmith.data.batch import Batch
from tunesmith.errors import MachineError
from tunesmith.model.fused import add_mixin
from tunesmith.ranks import ONE_PROCESS, Ranks
from tunesmith.runtime.plan import RunPlan


def recompute_layers(layers: Sequence[nn.Module], count: int) -> None:
    """Recompute the first `count` layers and no others. It may be called again with another count.

    The first ones: they recompute at the end of the backward, when the activations of the others are freed.
    """
    for number, layer in enumerate(layers):
        recomputed: Any = layer
        if not isinstance(layer, RecomputedLayer):
            add_mixin(recomputed, RecomputedLayer)
        recomputed.recomputed = number < count


class RecomputedLayer(nn.Module):
    """A layer whose forward runs again in the backward where `recomputed` is set. In eval mode it runs as before."""

    recomputed: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward
        if not self.training or not self.recomputed or isinstance(self, OffloadedLayer):
            return forward(*args, **kwargs)
        # The batch's documents and the rotary tables travel in kwargs; both are made once a batch and kept anyway.
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def offload_inputs(layers: Sequence[nn.Module]) -> None:
    """Keep the inputs of those `layers` that recompute in the host's memory until the backward; after compiling them."""
    for layer in layers:
        add_mixin(layer, OffloadedLayer)


class OffloadedLayer(nn.Module):
    """A `RecomputedLayer` whose input waits on the host, around all that is compiled.

    The reentrant form of checkpoint saves its inputs as tensors, which a hook can move; the other's closure keeps them. On
    a CPU the input is copied.
    """

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        own: Any = self
        forward = super().forward
        if not (self.training and own.recomputed):
            return forward(hidden, *args, **kwargs)
        # Over frozen embeddings; this form recomputes for inputs with a gradient only
        if not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        with save_on_cpu(pin_memory=hidden.is_cuda):
            return checkpoint(partial(forward, **kwargs), hidden, *args, use_reentrant=True)


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
