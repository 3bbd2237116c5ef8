"""Run a layer's forward again in the backward instead of keeping what it computed: memory for a third more time.

Ours instead of Transformers' flag, which wraps differently from version to version; `torch.utils.checkpoint` on the
forward of each decoder layer is all it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from tunesmith.model.parts import become


def recompute_layers(layers: Iterable[nn.Module]) -> int:
    """Recompute every layer; returns how many. In eval mode a layer runs as before."""
    count = 0
    for layer in layers:
        become(layer, Recomputed)
        count += 1
    return count


class Recomputed(nn.Module):
    """A layer whose forward runs again in the backward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward
        if not self.training:
            return forward(*args, **kwargs)
        # The batch's documents and the rotary tables travel in kwargs; both are made once a batch and kept anyway.
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
