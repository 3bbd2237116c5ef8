"""Recomputation of a layer's forward in the backward (activation checkpointing), which saves
memory.

It uses `torch.utils.checkpoint` on the forward of a decoder layer instead of Transformers' flag,
whose implementation differs between versions. One recomputed layer of 32 costs a third of that
layer's time, or 1 % of the step. `resolve.py` estimates how many layers must be recomputed. The
estimate cannot predict which tensors torch.compile saves, so on a GPU a trial step corrects it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from tunesmith.model.layers.fused import add_mixin


def recompute_layers(layers: Sequence[nn.Module], count: int) -> None:
    """Set the layers so that the backward recomputes the first `count` layers and no others. This
    function can be called again with another count.

    The first layers are chosen because they are recomputed at the end of the backward, when the
    activations of the other layers are already freed.
    """
    for number, layer in enumerate(layers):
        if isinstance(layer, RecomputedLayer):
            layer.recomputed = number < count
        else:
            add_mixin(layer, RecomputedLayer).recomputed = number < count


class RecomputedLayer(nn.Module):
    """A layer whose forward is run again in the backward if `recomputed` is set.

    In eval mode, the forward runs only once.
    """

    recomputed: bool

    def forward(self, *args: object, **kwargs: Any) -> object:
        forward = super().forward
        # An `OffloadedLayer` does the recomputation itself.
        if not self.training or not self.recomputed or isinstance(self, OffloadedLayer):
            return forward(*args, **kwargs)
        # `checkpoint` keeps the tensors in kwargs: the document boundaries and the rotary tables.
        # This takes no additional memory, because they are computed once per batch and exist
        # anyway.
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


class OffloadedLayer(nn.Module):
    """A `RecomputedLayer` whose input is kept in host memory. It wraps the compiled forward.

    The reentrant version of `checkpoint` is used. It saves its inputs with `save_for_backward`, so
    a hook can move them to the host. The non-reentrant version keeps them in a closure. If the
    model is on the CPU, the input is copied within host memory.
    """

    recomputed: bool

    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> object:
        forward = super().forward
        if not (self.training and self.recomputed):
            return forward(hidden, *args, **kwargs)
        # If the embeddings are frozen, the input of the first layer does not require a gradient.
        # The reentrant version computes gradients only if the input requires a gradient, so set
        # this here.
        if not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        with save_on_cpu(pin_memory=hidden.is_cuda):
            return checkpoint(partial(forward, **kwargs), hidden, *args, use_reentrant=True)
