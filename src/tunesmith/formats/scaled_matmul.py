"""Matmuls of fp8 factors: how a factor is rounded, and the product that applies the scales.

A factor is e4m3 with a scale a row or a scale a tensor (Micikevicius et al. 2022,
arXiv:2209.05433).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.distributed.torch_private import scaled_mm
from tunesmith.formats.base import E4M3, E4M3_MAX, LEAST_SCALE

ROW_WISE = "fp8 row-wise"
TENSOR_WISE = "fp8 tensor-wise"
SCALING_RECIPES = (ROW_WISE, TENSOR_WISE)  # the best first
# Fewer rows are padded to so many. cuBLASLt has no row-wise kernel for a large K below 257 rows on
# Hopper (github.com/pytorch/ao/issues/4582: K = 9216).
LEAST_ROWS = {ROW_WISE: 272, TENSOR_WISE: 16}


def quantize(recipe: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, k] as e4m3 values and their scales: fp32 [n, 1], or [1, 1] for TENSOR_WISE.

    x = e4m3 * scale. A value that is not finite makes its row so (its tensor).
    """
    scale = find_scale(recipe, x)
    return round_to_e4m3(x, scale), scale


def find_scale(recipe: str, x: Tensor) -> Tensor:
    """The scale at which the largest value of each row of x [n, k] is e4m3's largest: fp32 [n, 1].

    TENSOR_WISE: the largest value of all of x, [1, 1].
    """
    return (find_largest(recipe, x) / E4M3_MAX).clamp(min=LEAST_SCALE)


def find_largest(recipe: str, x: Tensor) -> Tensor:
    """The largest absolute value of each row of x [n, k], or of all: fp32 [n, 1], or [1, 1]."""
    if recipe == TENSOR_WISE:
        largest = x.abs().amax()
    else:
        largest = torch.linalg.vector_norm(x, math.inf, -1, keepdim=True)
    return largest.float().view(-1, 1)


def round_to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale as e4m3 values; what lies beyond the largest becomes the largest."""
    scaled = x / scale  # fp32: the scale's dtype
    return scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)


def scaled_matmul(
    recipe: str,
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    fast_sums: bool = False,
) -> Tensor:
    """left [n, k] times the transpose of right [m, k], each as from `quantize`: [n, m] in `dtype`.

    The result is a new tensor.
    """
    a, a_scale = left
    b, b_scale = right
    rows = len(a)
    padding = LEAST_ROWS[recipe] - rows
    if padding > 0:
        # Padded as integers: torch pads no fp8.
        a = F.pad(a.view(torch.uint8), (0, 0, 0, padding)).view(a.dtype)
        if recipe != TENSOR_WISE:
            # Rows of zeros with a scale of 1 stay zeros; they are cut off below.
            a_scale = F.pad(a_scale, (0, 0, 0, padding), value=1.0)
    product = scaled_mm(
        a,
        # The second factor must be column-major: the transpose of rows, which is a view.
        b.t(),
        scale_a=a_scale,
        scale_b=b_scale.t(),
        out_dtype=dtype,
        use_fast_accum=fast_sums,
    )
    return product[:rows]
