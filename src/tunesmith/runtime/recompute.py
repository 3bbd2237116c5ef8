"""Recompute a layer's forward in the backward instead of keeping its activations: memory for time.

`torch.utils.checkpoint` on the forward of a decoder layer, instead of Transformers' flag, which wraps differently from
version to version. One layer of 32 costs a third of that layer's time, a hundredth of the step's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from tunesmith.model.fused import add_mixin


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
        if not self.training or not self.recomputed:
            return forward(*args, **kwargs)
        # The batch's documents and the rotary tables travel in kwargs; both are made once a batch and kept anyway.
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
