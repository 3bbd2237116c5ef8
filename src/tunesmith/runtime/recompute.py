"""Recompute a layer's forward in the backward instead of keeping its activations: memory for time.

`torch.utils.checkpoint` on the forward of a decoder layer, instead of Transformers' flag, which
wraps differently from version to version. One layer of 32 costs a third of that layer's time, a
hundredth of the step's. How many layers recompute is estimated by `resolve.py`, which errs by what
a compiler decides to keep; on a GPU a trial corrects it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from tunesmith.model.fused import add_mixin


def recompute_layers(layers: Sequence[nn.Module], count: int) -> None:
    """Recompute the first `count` layers and no others. It may be called again with another count.

    The first ones: they recompute at the end of the backward, when the activations of the others
    are freed.
    """
    for number, layer in enumerate(layers):
        if isinstance(layer, RecomputedLayer):
            layer.recomputed = number < count
        else:
            add_mixin(layer, RecomputedLayer).recomputed = number < count


class RecomputedLayer(nn.Module):
    """A layer whose forward runs again in the backward where `recomputed` is set.

    In eval mode it runs once.
    """

    recomputed: bool

    def forward(self, *args: object, **kwargs: Any) -> object:
        forward = super().forward
        # An `OffloadedLayer` recomputes around this forward.
        if not self.training or not self.recomputed or isinstance(self, OffloadedLayer):
            return forward(*args, **kwargs)
        # The batch's documents and the rotary tables travel in kwargs; both are computed once a
        # batch and stay anyway.
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def offload_inputs(layers: Sequence[nn.Module]) -> None:
    """Keep the inputs of those `layers` that recompute in the host's memory until the backward.

    Call it after compiling them.
    """
    for layer in layers:
        add_mixin(layer, OffloadedLayer)


class OffloadedLayer(nn.Module):
    """A `RecomputedLayer` whose input waits on the host, around all that is compiled.

    The reentrant form of checkpoint saves its inputs as tensors, which a hook can move; the other's
    closure keeps them. On a CPU the input is copied.
    """

    recomputed: bool

    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> object:
        forward = super().forward
        if not (self.training and self.recomputed):
            return forward(hidden, *args, **kwargs)
        # Over frozen embeddings; this form recomputes for inputs with a gradient only.
        if not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        with save_on_cpu(pin_memory=hidden.is_cuda):
            return checkpoint(partial(forward, **kwargs), hidden, *args, use_reentrant=True)
