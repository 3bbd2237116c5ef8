"""Frozen linear layers whose matmuls run in 8-bit floats, for speed; nf4 is for memory.

Weights, inputs and output gradients are e4m3; the matmuls add up in fp32 and give bf16. Only the frozen base is rounded:
the adapter's own matmuls and gradients stay in bf16. W is stored twice (see `Fp8Weight`), together as large as bf16.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tunesmith.errors import first_line
from tunesmith.quant.frozen_matmul import FrozenLinear
from tunesmith.quant.frozen_weight import ROW_WISE, TENSOR_WISE, Fp8Weight, FrozenWeight

KINDS = (ROW_WISE, TENSOR_WISE)
ALIGNED = 16  # the GPU's fp8 matmuls take widths that are a multiple of 16


class ScalingRecipe(NamedTuple):
    """How this machine scales fp8 matmuls: one of KINDS, or None for no fp8; and why."""

    kind: str | None
    why: str


@cache
def select_scaling(device: torch.device) -> ScalingRecipe:
    """Row-wise where it runs, else tensor-wise (all that sm_120 and sm_121 have), else none: by trying, not by version."""
    reason = ""
    for kind in KINDS:
        x = torch.ones(32, 32, device=device, dtype=torch.bfloat16)
        try:
            weight = Fp8Weight.from_dense(kind, x)
            y = weight.forward_matmul(x, weight.quantize_input(x), None)
            dx = weight.backward_matmul(x, weight.quantize_input(x), None)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            reason = reason or first_line(error)
            continue
        if torch.equal(y, torch.full_like(y, 32)) and torch.equal(dx, y):
            return ScalingRecipe(kind, f"{kind} matmuls run here")
        reason = reason or f"{kind} matmuls gave a wrong result"
    return ScalingRecipe(None, f"this device has no fp8 matmuls: {reason}")


class Fp8Linear(FrozenLinear):
    """A dense linear layer's weight in fp8; its bias is taken over.

    Attributes (frozen):
        weight: e4m3 [out_features, in_features]; scale: fp32 [out_features, 1] or [1, 1].
        transposed_weight: e4m3 [in_features, out_features]; transposed_scale: fp32 [in_features, 1] or [1, 1].
    """

    scale: Tensor
    transposed_scale: Tensor

    @torch.no_grad()
    def __init__(self, base: nn.Linear, kind: str) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.kind, self.compute_dtype, self.bias = kind, torch.bfloat16, base.bias
        weight, scale, transposed_weight, transposed_scale = Fp8Weight.from_dense(kind, base.weight).tensors
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.transposed_weight = nn.Parameter(transposed_weight, requires_grad=False)
        # Not persistent: a checkpoint of the base holds dense weights.
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("transposed_scale", transposed_scale, persistent=False)

    def frozen_weight(self) -> FrozenWeight:
        tensors = [self.weight, self.scale, self.transposed_weight, self.transposed_scale]
        return Fp8Weight(self.kind, tensors, (self.out_features, self.in_features))
