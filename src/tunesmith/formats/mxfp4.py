"""Frozen experts in MXFP4, in which gpt-oss ships them: 32 weights share an exponent (OCP
Microscaling Formats, version 1.0).

A checkpoint has the experts of a layer in one tensor, as [experts, out, in]; the model has them as
[experts, in, out].
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
)
from tunesmith.formats.e2m1 import unpack_fp4
from tunesmith.formats.form import MXFP4_GROUP, ShippedForm

EXPONENT_BIAS = 127
NAN_EXPONENT = 255  # as it is stored


class Mxfp4(AsShipped):
    """tensors: blocks uint8 [..., out, groups, 16] and exponents uint8 [..., out, groups]."""

    name = "mxfp4"
    drawn_scales = (EXPONENT_BIAS - 7,)
    is_output_major = True

    @classmethod
    def parse(cls) -> Mxfp4:
        return cls(ShippedForm("mxfp4"))

    def matrix_forms(self, rows: int, columns: int) -> Forms:
        groups = (rows, columns // MXFP4_GROUP)
        return {
            "weight": TensorForm((*groups, MXFP4_GROUP // 2), torch.uint8, is_shared=True),
            # Shared too: it is a sixteenth of the blocks.
            "weight_scales": TensorForm(groups, torch.uint8, is_shared=True),
        }

    def decode(self, weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
        blocks, exponents = weight.tensors
        _, in_features = weight.shape
        dense = blocks.new_empty(weight.shape, dtype=dtype)
        # bf16 has every value of MXFP4, fp16 has not.
        exact = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        step = max(1, MAX_DECODED_WEIGHTS // in_features)  # rows that are looked up at a time
        for start in range(0, len(blocks), step):
            rows = slice(start, start + step)
            decode_mxfp4(blocks[rows], exponents[rows], exact, out=dense[rows])
        return dense

    def decode_experts(self, stack: FrozenStack, experts: slice, dtype: torch.dtype) -> Tensor:
        blocks, exponents = (tensor[experts].flatten(0, 1) for tensor in stack.tensors)
        if stack.is_compiled:
            dense = compiled_mxfp4()(blocks, exponents, dtype)
        else:
            shape = (len(blocks), stack.matrix[1])
            dense = FrozenWeight(self, [blocks, exponents], shape).dense(dtype)
        return dense.view(-1, *stack.matrix)

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
    """The values of mxfp4 weights: [..., groups * 32].

    Each is exact, but for the outermost exponents.

    Args:
        blocks: uint8 [..., groups, 16], two codes a byte, the low half first.
        exponents: uint8 [..., groups], of a power of two, with a bias of 127.
        dtype: fp32 or bf16, which have the same exponents; in it the values are computed.
        out: where they are written, rounded to its dtype.
    """
    ones = torch.ones_like(exponents, dtype=torch.float32)
    powers = torch.ldexp(ones, exponents.int() - EXPONENT_BIAS).to(dtype)
    values = unpack_fp4(blocks, dtype)
    groups = values if out is None else out.unflatten(-1, (-1, MXFP4_GROUP))
    torch.mul(values, powers.unsqueeze(-1), out=groups)
    return groups.flatten(-2)


def mxfp4_formula(blocks: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """`decode_mxfp4` without look-ups, which a compiler makes one kernel of.

    It reads half a byte a weight and writes its value; the look-ups move eight bytes more.
    """
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).int()
    mantissa = codes & 1
    exponent = (codes >> 1) & 3
    # Below 1 there is no leading one: 0 and a half.
    halves = torch.where(exponent == 0, mantissa, (mantissa + 2) << (exponent - 1).clamp_min(0))
    sizes = halves.to(torch.float32) * 0.5
    values = torch.where(codes >= 8, -sizes, sizes)
    # The bits of a power of two: its exponent, or of the smallest one the highest of the mantissa.
    biased = exponents.int()
    powers = torch.where(biased == 0, 1 << 22, biased << 23).view(torch.float32)
    return (values * powers.unsqueeze(-1)).to(dtype).flatten(-2)


@cache
def compiled_mxfp4() -> Callable[[Tensor, Tensor, torch.dtype], Tensor]:
    """`mxfp4_formula` as one kernel."""
    return torch.compile(mxfp4_formula)
