"""Frozen experts in MXFP4, the format of gpt-oss checkpoints. 32 weights share an exponent.

The format is defined in OCP Microscaling Formats, version 1.0. A checkpoint stores the experts of a
layer in one tensor [experts, out, in]. Transformers' model has the experts as [experts, in, out].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from tunesmith.formats.as_shipped import AsShipped
from tunesmith.formats.base import (
    MAX_DECODED_WEIGHTS,
    Forms,
    FrozenStack,
    FrozenWeight,
    TensorForm,
    row_pieces,
)
from tunesmith.formats.e2m1 import unpack_fp4
from tunesmith.formats.form import MXFP4_GROUP

EXPONENT_BIAS = 127
NAN_EXPONENT = 255  # stored exponent that means NaN


class Mxfp4(AsShipped):
    """MXFP4 format. Its tensors are the blocks, uint8 [..., out, groups, 16], and the exponents,
    uint8 [..., out, groups].
    """

    name = "mxfp4"
    drawn_scales = (EXPONENT_BIAS - 7,)
    is_output_major = True

    def matrix_forms(self, rows: int, columns: int) -> Forms:
        groups = (rows, columns // MXFP4_GROUP)
        return {
            "weight": TensorForm((*groups, MXFP4_GROUP // 2), torch.uint8, is_shared=True),
            # Shard the scales too. They are large: a sixteenth of the size of the blocks.
            "weight_scales": TensorForm(groups, torch.uint8, is_shared=True),
        }

    def decode(self, weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
        blocks, exponents = weight.tensors
        dense = blocks.new_empty(weight.shape, dtype=dtype)
        # bf16 represents every value of MXFP4 exactly. fp16 does not, because its exponent
        # range is smaller.
        exact = dtype if dtype == torch.bfloat16 else torch.float32
        for rows in row_pieces(0, *weight.shape, MAX_DECODED_WEIGHTS):
            decode_mxfp4(blocks[rows], exponents[rows], exact, out=dense[rows])
        return dense

    def decode_experts(self, stack: FrozenStack, experts: slice, dtype: torch.dtype) -> Tensor:
        if not stack.is_compiled:
            return super().decode_experts(stack, experts, dtype)
        blocks, exponents = (tensor[experts].flatten(0, 1) for tensor in stack.tensors)
        return compiled_mxfp4()(blocks, exponents, dtype).view(-1, *stack.matrix)

    def decode_rows(self, codes: Sequence[Tensor], scale: Tensor | None, first: int) -> Tensor:
        blocks, exponents = codes
        return decode_mxfp4(blocks, exponents)

    def has_nan_scale(self, codes: Sequence[Tensor]) -> bool:
        return bool((codes[-1] == NAN_EXPONENT).any())


def decode_mxfp4(
    blocks: Tensor,
    exponents: Tensor,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Convert MXFP4 blocks to values [..., groups * 32].

    Each value is exact unless its exponent is close to the minimum or maximum of the range.

    Args:
        blocks: uint8 [..., groups, 16], two codes per byte, the low half first.
        exponents: uint8 [..., groups]. The scale of a group is 2 ** (exponent - 127).
        dtype: dtype of the computation: fp32 or bf16, because both have the exponent range of
            MXFP4.
        out: tensor for the result, which is rounded to its dtype. If None, a new tensor is
            returned.
    """
    ones = torch.ones_like(exponents, dtype=torch.float32)
    powers = torch.ldexp(ones, exponents.int() - EXPONENT_BIAS).to(dtype)
    values = unpack_fp4(blocks, dtype)
    groups = values if out is None else out.unflatten(-1, (-1, MXFP4_GROUP))
    torch.mul(values, powers.unsqueeze(-1), out=groups)
    return groups.flatten(-2)


def mxfp4_formula(blocks: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute `decode_mxfp4` without lookups, so that a compiler can generate a single kernel.

    The kernel reads half a byte per weight and writes the value. `decode_mxfp4` reads and writes
    eight bytes per weight more.
    """
    low = blocks & 15
    high = blocks >> 4
    codes = torch.stack([low, high], dim=-1).flatten(-2).int()  # [..., groups, 32]

    # A code consists of a sign, two exponent bits and one mantissa bit.
    mantissa = codes & 1
    exponent = (codes >> 1) & 3
    # Values below 1 (0 and 0.5) have exponent 0 and no implicit leading one.
    shift = (exponent - 1).clamp_min(0)
    normal_halves = (mantissa + 2) << shift
    halves = torch.where(exponent == 0, mantissa, normal_halves)
    sizes = halves.to(torch.float32) * 0.5
    values = torch.where(codes >= 8, -sizes, sizes)

    # Build the bits of the fp32 power of two by shifting the exponent to its position. For exponent
    # 0 the power is subnormal, and only its highest mantissa bit is set.
    biased = exponents.int()
    bits = torch.where(biased == 0, 1 << 22, biased << 23)
    powers = bits.view(torch.float32).unsqueeze(-1)
    return (values * powers).to(dtype).flatten(-2)


@cache
def compiled_mxfp4() -> Callable[[Tensor, Tensor, torch.dtype], Tensor]:
    """Compile `mxfp4_formula` to one kernel."""
    return torch.compile(mxfp4_formula)
