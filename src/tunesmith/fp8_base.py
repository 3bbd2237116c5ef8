"""Quantize a frozen base to fp8 if the device can and the loss on the run's own rows stays what it was."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tunesmith.adapter import lora
from tunesmith.data.batch import Batch
from tunesmith.methods.base import TrainModel
from tunesmith.quant import fp8
from tunesmith.runtime.choices import Choice

# Relative change of the loss. Rounding to e4m3 changed that of SmolLM2-135M by 1.2 to 2.2 % on 4,500 tokens of alpaca
# rows, as chats and as plain text; nf4 changed it by 7 %. A larger change has another cause than rounding.
TOLERANCE = 0.03
PROBED = 4096  # tokens that the loss is measured on, at least


def quantize_base_fp8(model: TrainModel, batches: Sequence[Batch]) -> Choice:
    """Put the frozen linear layers into fp8, and give the loss before and after.

    If `taken` is not fp8, either the device lacks fp8 (the model is unchanged) or the loss changed by more than TOLERANCE
    (rebuild the model: its bf16 weights are freed).

    Args:
        model: loaded, dense.
        batches: micro batches of the run's own rows, on the model's device.
    """
    scaling = fp8.select_scaling(batches[0].input_ids.device)
    if scaling.kind is None:
        return Choice("base", "bf16", scaling.why)
    before = _loss(model, batches)
    count = lora.convert_to_fp8(model.model, scaling.kind)
    after = _loss(model, batches)
    change = (after - before) / before
    tokens = sum(batch.tokens for batch in batches)
    figures = f"loss {after:.4f} where bf16 has {before:.4f} ({change:+.2%}) on {tokens:,} tokens of the data"
    if not math.isfinite(after) or abs(change) > TOLERANCE:
        return Choice("base", "bf16", f"{scaling.kind} was tried and dropped: {figures}, more than {TOLERANCE:.0%}")
    return Choice("base", scaling.kind, f"{scaling.why}; {count} layers; {figures}")


@torch.no_grad()
def _loss(model: TrainModel, batches: Sequence[Batch]) -> float:
    training = model.training
    model.eval()
    results = [model(batch) for batch in batches]
    model.train(training)
    return sum(float(made.loss) for made in results) / sum(made.denominator for made in results)
