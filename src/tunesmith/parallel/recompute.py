"""Run a layer's forward again in the backward instead of keeping what it computed: memory for a third more time.

Ours instead of Transformers' flag, which wraps differently from version to version; `torch.utils.checkpoint` on the
forward of each decoder layer is all it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_layers(layers: Iterable[nn.Module]) -> int:
    """Recompute every layer; returns how many. Without gradient, or in eval mode, a layer runs as before."""
    count = 0
    for layer in layers:
        layer.forward = partial(_recomputed, layer, layer.forward)
        count += 1
    return count


def _recomputed(layer: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not layer.training:
        return forward(*args, **kwargs)
    # The batch's documents and the rotary tables travel in kwargs; both are made once a batch and kept anyway.
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
