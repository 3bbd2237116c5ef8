"""Hold a frozen base in fp8 if this machine can and the loss stays what it was, measured before and after on real rows."""

from __future__ import annotations

import math

import torch

from tunesmith.adapter import fp8, lora
from tunesmith.data.batch import Batch
from tunesmith.method.base import TrainModel
from tunesmith.parallel.choices import Choice

# Of the loss. Rounding both factors of every product to e4m3 moved that of SmolLM2-135M by 1.8 %, nf4 by 6.6 %; what moves
# it further is not rounding.
TOLERANCE = 0.02


def hold(model: TrainModel, batch: Batch) -> Choice:
    """Put the frozen linear layers into fp8, and say with which figures.

    Where `taken` is not an fp8 form the machine has none, and the model is as before, or the loss moved by more than
    TOLERANCE: then it must be built anew, since its dense weights are gone.

    Args:
        model: loaded, dense.
        batch: a micro batch of the run's own rows, on the model's device.
    """
    way = fp8.choose(batch.input_ids.device)
    if way.kind is None:
        return Choice("base", "bf16", way.why)
    before = _loss(model, batch)
    count = lora.to_fp8(model.model, way.kind)
    after = _loss(model, batch)
    moved = (after - before) / before
    figures = f"loss {after:.4f} where bf16 has {before:.4f} ({moved:+.2%}) on {batch.tokens:,} tokens of the data"
    if not math.isfinite(after) or abs(moved) > TOLERANCE:
        return Choice("base", "bf16", f"{way.kind} was tried and given up: {figures}, more than {TOLERANCE:.0%}")
    return Choice("base", way.kind, f"{way.why}; {count} layers; {figures}")


@torch.no_grad()
def _loss(model: TrainModel, batch: Batch) -> float:
    training = model.training
    model.eval()
    total, count = model(batch)
    model.train(training)
    return float(total) / count
