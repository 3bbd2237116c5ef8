"""Matmuls of 8-bit factors: how a factor is rounded, and the product that applies the scales.

- fp8: e4m3 with a scale a row or a scale a tensor (Micikevicius et al. 2022, arXiv:2209.05433).
- int8: a scale a row, after a rotation of the summed dimension by a block-diagonal Hadamard matrix. The rotation is
  orthonormal, so x H (W H)^T = x W^T, and it spreads an outlier over its block (QuaRot: Ashkboos et al. 2024,
  arXiv:2404.00456). It costs 2 * block operations an element; nothing is folded into norms or embeddings, which would
  spare a quarter of that and change every parameter of the model.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.private import int_mm, scaled_mm

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max
INT8_MAX = 127
ROW_WISE, TENSOR_WISE, INT8 = "fp8 row-wise", "fp8 tensor-wise", "int8 rotated"
KINDS = {"fp8": (ROW_WISE, TENSOR_WISE), "int8": (INT8,)}  # of each value of `model.quantize`, the best first
FUSED = {"fp8": f"{ROW_WISE} fused", "int8": f"{INT8} fused"}  # the same numbers by the kernel of `triton_matmul`
# Fewer rows are padded to so many. cuBLASLt has no row-wise kernel for a large K below 257 rows on Hopper
# (github.com/pytorch/ao/issues/4582: K = 9216), and torch's int8 product on CUDA asks for more than 16.
LEAST_ROWS = {ROW_WISE: 272, TENSOR_WISE: 16, INT8: 32}
MAX_BLOCK = 128  # of the rotation
CPU_ROWS = 256  # rows whose int32 sums stay in a CPU's cache until they are scaled


def quantize(kind: str, x: Tensor, signs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [n, k] as 8-bit values and their scales: fp32 [n, 1], or [1, 1] for TENSOR_WISE; int8 with `signs`, else e4m3.

    x = e4m3 * scale, or `hadamard_rotate(x, signs)` = int8 * scale. A value that is not finite makes its row so (its tensor).
    """
    x = x if signs is None else hadamard_rotate(x, signs)
    largest = x.abs().amax() if kind == TENSOR_WISE else torch.linalg.vector_norm(x, math.inf, -1, keepdim=True)
    scale = (largest.float() / (E4M3_MAX if signs is None else INT8_MAX)).clamp(min=1e-12)
    scaled = x / scale  # fp32: the scale's dtype
    codes = scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3) if signs is None else scaled.round_().to(torch.int8)
    return codes, scale.view(-1, 1)


def hadamard_rotate(x: Tensor, signs: Tensor) -> Tensor:
    """x [n, k] times the orthonormal block-diagonal Hadamard matrix, which is its own inverse; in the dtype of x.

    A block is the largest power of two that divides k, up to MAX_BLOCK. signs: of `hadamard`, in the dtype of x.
    """
    block = min(x.shape[-1] & -x.shape[-1], MAX_BLOCK)
    matrix = signs[:block, :block] * block**-0.5  # the first rows and columns of a Hadamard matrix are one
    return (x.reshape(-1, block) @ matrix).view(x.shape)


@cache
def hadamard(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Sylvester's Hadamard matrix [MAX_BLOCK, MAX_BLOCK] of 1 and -1; one tensor for all layers."""
    signs = torch.ones(1, 1, dtype=dtype)
    while len(signs) < MAX_BLOCK:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    return signs.to(device)


def scaled_matmul(
    kind: str,
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    dtype: torch.dtype,
    product: Callable[..., Tensor] | None = None,
) -> Tensor:
    """left [n, k] times the transpose of right [m, k], each as from `quantize`: a new [n, m] in `dtype`.

    `product` takes the place of `private.scaled_mm` for fp8, of `private.int_mm` for int8.
    """
    (a, a_scale), (b, b_scale) = left, right
    n, short = len(a), LEAST_ROWS[kind] - len(a)
    if short > 0:
        a = F.pad(a.view(torch.uint8), (0, 0, 0, short)).view(a.dtype)
        a_scale = a_scale if kind == TENSOR_WISE else F.pad(a_scale, (0, 0, 0, short), value=1.0)
    if kind != INT8:
        product = product or scaled_mm
        fast = a.is_cuda  # fewer bits between partial sums, as all fp8 training does on Hopper
        return product(a, b.t(), scale_a=a_scale, scale_b=b_scale.t(), out_dtype=dtype, use_fast_accum=fast)[:n]
    product = product or int_mm
    y = a_scale.new_empty(len(a), len(b), dtype=dtype)
    parts = 1 if a.is_cuda else max(1, len(a) // CPU_ROWS)
    for codes, scale, out in zip(*(t.tensor_split(parts) for t in (a, a_scale, y)), strict=True):
        out.copy_((product(codes, b.t()) * scale).mul_(b_scale.t()))
    return y[:n]
