"""Functions that round a factor of a matmul to fp8, and that multiply two fp8 factors with their
scales.

A factor consists of e4m3 values with one scale per row or one per tensor (Micikevicius et al. 2022,
arXiv:2209.05433).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.distributed.torch_private import scaled_mm
from tunesmith.formats.base import E4M3, E4M3_MAX, MIN_SCALE

ROW_WISE = "fp8 row-wise"
TENSOR_WISE = "fp8 tensor-wise"
SCALING_RECIPES = (ROW_WISE, TENSOR_WISE)  # in order of preference
# Minimum number of rows. Smaller inputs are padded, because on Hopper cuBLASLt has no row-wise
# kernel for a large K below 257 rows (github.com/pytorch/ao/issues/4582: K = 9216).
MIN_ROWS = {ROW_WISE: 272, TENSOR_WISE: 16}


def quantize(recipe: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize x [n, k] to e4m3 values and their scales: fp32 [n, 1], or [1, 1] for TENSOR_WISE.

    x = e4m3 * scale. A value that is not finite makes its entire row (or tensor) not finite.
    """
    scale = find_scale(recipe, x)
    return round_to_e4m3(x, scale), scale


def find_scale(recipe: str, x: Tensor) -> Tensor:
    """Return the scale that maps the largest value of each row of x [n, k] to e4m3's maximum: fp32
    [n, 1].

    For TENSOR_WISE, return one scale for the largest value of x, [1, 1].
    """
    return (find_largest(recipe, x) / E4M3_MAX).clamp(min=MIN_SCALE)


def find_largest(recipe: str, x: Tensor) -> Tensor:
    """Return the largest absolute value of each row of x [n, k], fp32 [n, 1].

    For TENSOR_WISE, return the largest absolute value of the entire x, [1, 1].
    """
    if recipe == TENSOR_WISE:
        largest = x.abs().amax()
    else:
        largest = torch.linalg.vector_norm(x, math.inf, -1, keepdim=True)
    return largest.float().view(-1, 1)


def round_to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """Return x / scale as e4m3 values. Values outside the range are clamped."""
    scaled = x / scale  # fp32, because the scale is fp32
    return scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)


def scaled_matmul(
    recipe: str,
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    fast_sums: bool = False,
) -> Tensor:
    """Compute left [n, k] times the transpose of right [m, k]: a new tensor [n, m] in `dtype`.

    Args:
        left, right: results of `quantize`.
        fast_sums: whether the matmul accumulates with fewer bits, see `Fp8`.
    """
    a, a_scale = left
    b, b_scale = right
    rows = len(a)
    padding = MIN_ROWS[recipe] - rows
    if padding > 0:
        # Pad as integers, because torch cannot pad fp8.
        a = F.pad(a.view(torch.uint8), (0, 0, 0, padding)).view(a.dtype)
        if recipe != TENSOR_WISE:
            # The rows added by padding are zeros with a scale of 1. They are removed from the
            # result below.
            a_scale = F.pad(a_scale, (0, 0, 0, padding), value=1.0)
    product = scaled_mm(
        a,
        # The second factor must be column-major. b is row-major, so its transpose is column-major.
        b.t(),
        scale_a=a_scale,
        scale_b=b_scale.t(),
        out_dtype=dtype,
        use_fast_accum=fast_sums,
    )
    return product[:rows]
