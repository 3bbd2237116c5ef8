"""What the linear layers with a quantized weight have in common, and how the linear layers of a model are found."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tunesmith.quant.frozen_matmul import grouped_matmul
from tunesmith.quant.frozen_weight import FrozenWeight


class FrozenLinear(nn.Module):
    """y = x W^T + b with a quantized W that gets no gradient. One layer is quantized without knowing of the others.

    What is as large as W is a parameter: FSDP shards parameters, and leaves buffers whole on every rank.

    Attributes:
        compute_dtype: of the matmuls' results, and of `dense`.
        bias: compute_dtype [out_features], or None.
    """

    in_features: int
    out_features: int
    compute_dtype: torch.dtype
    bias: nn.Parameter | None

    def frozen_weight(self) -> FrozenWeight:
        raise NotImplementedError

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The weight that the layer stands for: a new [out_features, in_features] in the compute dtype."""
        return self.frozen_weight().dense(self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; returns [..., out_features]."""
        return grouped_matmul(x, [self.frozen_weight()], [self.bias])[0]

    def extra_repr(self) -> str:
        kind = self.frozen_weight().kind
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {kind}"


def linear_names(model: nn.Module, *, head: bool) -> list[str]:
    """Full names of the linear layers, dense and quantized, in the model's order; with the output layer if `head`."""
    from transformers import PreTrainedModel

    left_out = model.get_output_embeddings() if isinstance(model, PreTrainedModel) and not head else None
    linear = (nn.Linear, FrozenLinear)
    return [name for name, m in model.named_modules() if isinstance(m, linear) and m is not left_out]


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model; tied ones count once, and a quantized weight as the dense one that it stands for."""
    count = sum(p.numel() for p in model.parameters())
    for layer in model.modules():
        if isinstance(layer, FrozenLinear):
            stored = sum(t.numel() for t in layer.frozen_weight().tensors if isinstance(t, nn.Parameter))
            count += layer.in_features * layer.out_features - stored
    return count
