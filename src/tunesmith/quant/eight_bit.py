"""Frozen linear layers whose matmuls run in 8 bits, for speed; nf4 is for memory.

Weights, inputs and output gradients are e4m3; the matmuls give bf16. Only the frozen base is rounded: the
adapter's own matmuls and gradients stay in bf16.
"""

from collections.abc import Sequence
from itertools import product as pairs
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tunesmith.errors import first_line
from tunesmith.quant.frozen_matmul import FrozenLinear
from tunesmith.quant.frozen_weight import EightBitWeight, FrozenWeight
from tunesmith.quant.scaled_matmul import E4M3, KINDS
from tunesmith.sharded import local_part

ALIGNED = 16  # the GPU's 8-bit matmuls take widths that are a multiple of 16


class ScalingRecipe(NamedTuple):
    """How this machine scales 8-bit matmuls: one of KINDS, or None for none; and why."""

    kind: str | None
    why: str


def select_scaling(
    device: torch.device,
    shapes: Sequence[tuple[int, int]] = ((48, 32),),
    rows: Sequence[int] = (1, 16, 40),
) -> ScalingRecipe:
    """The first kind of `model.quantize: fp8` whose matmuls are right on this device: by trying, not by version.

    sm_120 and sm_121 have fp8 tensor-wise only. All layers take one kind.

    Args:
        shapes: (out_features, in_features) of the model's layers; rows: of x, each tried with each shape.
    """
    faults: list[str] = []
    for kind in KINDS:
        trials = (matmul_fault(kind, device, shape, n) for shape, n in pairs(shapes, rows))
        fault = next(filter(None, trials), "")
        if not fault:
            return ScalingRecipe(kind, "; ".join([f"{kind} matmuls run here", *faults]))
        faults.append(f"{kind} does not: {fault}")
    return ScalingRecipe(None, f"this device has no fp8 matmuls: {'; '.join(faults)}")


@torch.no_grad()
def matmul_fault(
    kind: str,
    device: torch.device,
    shape: tuple[int, int],
    n: int,
    dtype: torch.dtype = torch.bfloat16,
) -> str:
    """What is wrong with a forward and two added backwards of one frozen layer and its adapter on n rows, or "".

    Rows and columns are different powers of two, so that scales that are swapped or shifted change the result.
    """

    def powers(count: int, period: int) -> Tensor:
        return torch.arange(count, device=device).remainder(period).float().exp2()

    (n_out, n_in), of_x, of_out, of_in = shape, powers(n, 7), powers(shape[0], 5), powers(shape[1], 3)
    of_y, of_dx = of_out * of_in.sum(), of_in * of_out.sum()
    # xa and B, d_xa and A^T: a column each, which is as much again as the frozen product.
    sides = ((of_x, n_in), (of_x, n_out), (of_x, 1), (of_y, 1), (of_dx, 1))
    x, dy, xa, b, a = (left.outer(torch.ones(width, device=device)).to(dtype) for left, width in sides)
    try:
        weight = EightBitWeight.from_dense(kind, of_out.outer(of_in).to(dtype))
        y = weight.forward_matmul(x, weight.quantize_input(x), (xa, b))
        dy8 = weight.quantize_gradient(dy)
        dx = weight.backward_matmul(dy, dy8, weight.backward_matmul(dy, dy8, None, (xa, a)))
        expected = (2 * of_x.outer(of_y), 3 * of_x.outer(of_dx))
        # The powers are e4m3 numbers: only bf16 rounds.
        right = all(torch.allclose(*pair, rtol=0.02) for pair in zip((y.float(), dx.float()), expected, strict=True))
        fault = "" if right else "a wrong result"
    except Exception as error:  # whatever torch and the driver raise for products that they do not have
        fault = first_line(error)
    return fault and f"{n} rows times [{n_in}, {n_out}]: {fault}"


class EightBitLinear(FrozenLinear):
    """A dense linear layer's weight in 8 bits; its bias is taken over.

    Attributes (frozen):
        weight: uint8 [out_features, in_features], the e4m3 codes: torch and FSDP move integers as they are.
        scale: fp32 [out_features, 1] or [1, 1], whole on every rank.
    """

    scale: Tensor

    @torch.no_grad()
    def __init__(self, base: nn.Linear, kind: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, base.bias
        self.parts = base.weight.numel() // (self.in_features * self.out_features)
        codes, scale = EightBitWeight.from_dense(kind, local_part(base.weight)).tensors
        self.store(kind, codes.view(torch.uint8), scale)

    def store(self, kind: str, codes: Tensor, scale: Tensor) -> None:
        """Take the codes, uint8, and the scale of the layer's weight; the codes may be a DTensor."""
        self.kind, self.compute_dtype = kind, torch.bfloat16
        self.weight = nn.Parameter(codes, requires_grad=False)
        # Not persistent: a checkpoint of the base holds dense weights.
        self.register_buffer("scale", scale, persistent=False)

    def frozen_weight(self) -> FrozenWeight:
        codes = local_part(self.weight).view(E4M3)
        return EightBitWeight(self.kind, [codes, self.scale], (self.out_features, self.in_features))
