"""Hold a frozen base in fp8 if this machine can and the loss stays what it was, measured before and after on real rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tunesmith.adapter import lora
from tunesmith.data.batch import Batch
from tunesmith.methods.base import TrainModel
from tunesmith.quant import fp8
from tunesmith.runtime.choices import Choice

# Of the loss. Rounding both factors of every product to e4m3 moved that of SmolLM2-135M by 1.2 to 2.2 % on some 4,500
# tokens of alpaca rows, as chats and as plain text; nf4 moved it by 7 %. What moves it further than this is not rounding.
TOLERANCE = 0.03
PROBED = 4096  # tokens, at least


def quantize_base_fp8(model: TrainModel, batches: Sequence[Batch]) -> Choice:
    """Put the frozen linear layers into fp8, and say with which figures.

    Where `taken` is not an fp8 form the machine has none, and the model is as before, or the loss moved by more than
    TOLERANCE: then it must be built anew, since its dense weights are gone.

    Args:
        model: loaded, dense.
        batches: micro batches of the run's own rows, on the model's device.
    """
    way = fp8.select_scaling(batches[0].input_ids.device)
    if way.kind is None:
        return Choice("base", "bf16", way.why)
    before = _loss(model, batches)
    count = lora.convert_to_fp8(model.model, way.kind)
    after = _loss(model, batches)
    moved = (after - before) / before
    tokens = sum(batch.tokens for batch in batches)
    figures = f"loss {after:.4f} where bf16 has {before:.4f} ({moved:+.2%}) on {tokens:,} tokens of the data"
    if not math.isfinite(after) or abs(moved) > TOLERANCE:
        return Choice("base", "bf16", f"{way.kind} was tried and given up: {figures}, more than {TOLERANCE:.0%}")
    return Choice("base", way.kind, f"{way.why}; {count} layers; {figures}")


@torch.no_grad()
def _loss(model: TrainModel, batches: Sequence[Batch]) -> float:
    training = model.training
    model.eval()
    results = [model(batch) for batch in batches]
    model.train(training)
    return sum(float(made.loss) for made in results) / sum(made.denominator for made in results)
