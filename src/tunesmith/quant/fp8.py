"""A frozen linear layer whose products are computed in 8-bit floats (Micikevicius et al. 2022, arXiv:2209.05433).

Weights, inputs and output gradients are held as e4m3 with one scale a row (row-wise) or one a tensor (tensor-wise, what
sm_120 and sm_121 take); products add up in fp32 and come out in bf16. The adapter's own products stay in bf16, and so do
its gradients: only the frozen base is rounded.

    y  = x  W^T   x scaled by row, W by output channel
    dx = dy W     dy scaled by row, W by input channel

The chip multiplies only along contiguous rows, so W is held twice, as [out, in] and as [in, out]: together as large as
bf16. This is for speed; nf4 is for memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tunesmith.errors import first_line
from tunesmith.private import scaled_mm
from tunesmith.quant import frozen_matmul

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
ALIGNED = 16  # the chip's products take rows of a multiple of 16


class ScalingRecipe(NamedTuple):
    """How this machine multiplies in fp8: the name of a kind in `products.KINDS`, or None; and why."""

    kind: str | None
    why: str


@cache
def select_scaling(device: torch.device) -> ScalingRecipe:
    """Row-wise where the chip does it, else tensor-wise, else none: found by trying, not by version."""
    reason = ""
    for kind in KINDS:
        x = torch.ones(32, 32, device=device, dtype=torch.bfloat16)
        try:
            way = frozen_matmul.KINDS[kind]
            held = _hold(x, kind)
            y = way.times(x, way.quantise(x), held, None)
            dx = way.back(x, way.quantise(x), held, None)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            reason = reason or first_line(error)
            continue
        if torch.equal(y, torch.full_like(y, 32)) and torch.equal(dx, y):
            return ScalingRecipe(kind, f"{kind} products run here")
        reason = reason or f"{kind} products gave a wrong result"
    return ScalingRecipe(None, f"this chip has no fp8 products: {reason}")


def quantise(x: Tensor, *, whole: bool) -> tuple[Tensor, Tensor]:
    """e4m3 form of x [n, k] and its scales, fp32 [n, 1], or [1, 1] for the `whole` tensor: x = form * scale.

    Plain tensor code, which torch.compile fuses with what makes x. A value that is not finite makes its row NaN.
    """
    wide = x.float()
    largest = wide.abs().amax() if whole else wide.abs().amax(-1, keepdim=True)
    scale = (largest / LARGEST).clamp(min=1e-12)
    return (wide / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale.view(-1, 1)


class Fp8Kind:
    """Products with a weight held in fp8: [form, scale] of [out, in], then of [in, out]."""

    tensors = 4
    adds = False

    def __init__(self, *, whole: bool) -> None:
        self.whole = whole

    def quantise(self, x: Tensor) -> list[Tensor]:
        return list(quantise(x, whole=self.whole))

    def times(
        self,
        x: Tensor,
        quantised: Sequence[Tensor],
        weight: Sequence[Tensor],
        update: frozen_matmul.LowRankUpdate | None,
    ) -> Tensor:
        y = _product(quantised, weight[:2], x.dtype)
        return y if update is None else y.addmm_(update.low, update.up.T)

    def back(self, dy: Tensor, quantised: Sequence[Tensor], weight: Sequence[Tensor], onto: Tensor | None) -> Tensor:
        dx = _product(quantised, weight[2:], dy.dtype)
        return dx if onto is None else onto.add_(dx)


def _product(left: Sequence[Tensor], right: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """left [n, k] times the transpose of right [m, k], each a form and its scales: [n, m]."""
    (a, a_scale), (b, b_scale) = left, right
    return scaled_mm(
        a, b.t(), scale_a=a_scale, scale_b=b_scale.t(), out_dtype=dtype, use_fast_accum=a.device.type == "cuda"
    )


ROW, TENSOR = "fp8 row-wise", "fp8 tensor-wise"
KINDS = (ROW, TENSOR)
frozen_matmul.KINDS.update({ROW: Fp8Kind(whole=False), TENSOR: Fp8Kind(whole=True)})


def _hold(weight: Tensor, kind: str) -> list[Tensor]:
    """The four tensors that hold a dense weight [out, in]."""
    whole = kind == TENSOR
    return [*quantise(weight, whole=whole), *quantise(weight.T.contiguous(), whole=whole)]


class Fp8Linear(nn.Module):
    """y = x W^T + b with W held in fp8.

    Attributes (frozen):
        weight: e4m3 [out_features, in_features]; scale: fp32 [out_features, 1] or [1, 1].
        turned: e4m3 [in_features, out_features]; turned_scale: fp32 [in_features, 1] or [1, 1].
        bias: bf16 [out_features], or None.
    """

    scale: Tensor
    turned: Tensor
    turned_scale: Tensor

    def __init__(self, base: nn.Linear, kind: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kind = base.in_features, base.out_features, kind
        weight, scale, turned, turned_scale = _hold(base.weight.detach(), kind)
        self.weight = nn.Parameter(weight, requires_grad=False)
        # Not persistent: a checkpoint of the base holds dense weights.
        for name, tensor in (("scale", scale), ("turned", turned), ("turned_scale", turned_scale)):
            self.register_buffer(name, tensor, persistent=False)
        self.bias = base.bias

    def held(self) -> frozen_matmul.FrozenWeight:
        """The weight in the form that the products take."""
        return frozen_matmul.FrozenWeight(
            self.kind, [self.weight, self.scale, self.turned, self.turned_scale], self.out_features
        )

    def dense(self) -> Tensor:
        """What the forward multiplies with, [out_features, in_features] in bf16."""
        return (self.weight.float() * self.scale).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; returns [..., out_features]."""
        return frozen_matmul.grouped_matmul(x, [self.held()], [self.bias])[0]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.kind}"


@torch.no_grad()
def replace_linears(model: nn.Module, make: Callable[[nn.Module], nn.Module]) -> int:
    """Swap the frozen linear layers of a loaded model but its head, one at a time, and return how many.

    Layers whose widths the chip's products do not take stay as they are.

    Args:
        model: whole, with weights.
        make: the fp8 layer for a linear one.
    """
    from transformers import PreTrainedModel

    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head and _fits(m)]
    for name in names:  # by name: a list of the layers would keep every dense weight alive
        model.set_submodule(name, make(model.get_submodule(name)))
    return len(names)


def _fits(module: nn.Linear) -> bool:
    whole = module.in_features % ALIGNED == 0 and module.out_features % ALIGNED == 0
    return whole and not module.weight.requires_grad
