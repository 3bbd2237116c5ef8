"""Weights in 4-bit floats (e2m1: a sign, two bits of exponent, one of mantissa), in groups of a row
that share a scale.

- MXFP4, in which gpt-oss ships its experts: 32 weights share an exponent (OCP Microscaling Formats,
  version 1.0). A checkpoint has the experts of a layer as [out, in]; where the model has them as
  [in, out] a reader turns them.
- NVFP4: 16 weights share a scale in e4m3, and all of a matrix one in fp32.
"""

from collections.abc import Callable
from functools import cache

import torch

from tunesmith.model.shipped import NVFP4_GROUP

E2M1_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1_MAX = 6.0
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
NAN = 255  # as an exponent of mxfp4
SIGNLESS_NAN = 127  # as a scale of nvfp4
SMALLEST = 1e-12  # of a matrix of zeros


def unpack_fp4(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values of codes [..., n], two a byte, the low half first: [..., 2 n] in fp32 or bf16."""
    positive = E2M1_VALUES.to(packed.device, dtype)
    values = torch.cat([positive, -positive])
    # The two values of each byte as one word: one look-up for both, and no third dimension.
    low, high = torch.meshgrid(values, values, indexing="xy")
    word = torch.int64 if dtype.itemsize == 4 else torch.int32
    pairs = torch.stack([low, high], dim=-1).view(256, 2).view(word).view(256)
    return pairs[packed.int()].view(dtype)


def pack_fp4(values: torch.Tensor) -> torch.Tensor:
    """Round values [..., n] from -6 to 6 to codes, two a byte: [..., n / 2]."""
    codes = round_e2m1(values.abs()) | (values < 0).long() << 3
    low, high = codes.to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4


def round_e2m1(sizes: torch.Tensor) -> torch.Tensor:
    """The codes 0 to 7 of values from 0 to 6, rounded to the nearest, ties to the even code."""
    values = E2M1_VALUES.to(sizes.device)
    middles = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(sizes.contiguous(), middles)  # a tie takes the lower code
    is_tie = (sizes == middles[codes.clamp(max=6)]) & (codes % 2 == 1)
    return codes + is_tie.long()


# ---- MXFP4


def decode_mxfp4(
    blocks: torch.Tensor,
    exponents: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The values of mxfp4 weights: [..., groups * 32].

    Each is exact, but for the outermost exponents.

    Args:
        blocks: uint8 [..., groups, 16], two codes a byte, the low half first.
        exponents: uint8 [..., groups], of a power of two, with a bias of 127.
        dtype: fp32 or bf16, which have the same exponents; in it the values are computed.
        out: where they are written, rounded to its dtype.
    """
    ones = torch.ones_like(exponents, dtype=torch.float32)
    powers = torch.ldexp(ones, exponents.int() - 127).to(dtype)
    values = unpack_fp4(blocks, dtype)
    groups = values if out is None else out.unflatten(-1, (-1, 32))
    torch.mul(values, powers.unsqueeze(-1), out=groups)
    return groups.flatten(-2)


def mxfp4_formula(
    blocks: torch.Tensor, exponents: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
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
def compiled_mxfp4() -> Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]:
    """`mxfp4_formula` as one kernel."""
    return torch.compile(mxfp4_formula)


def encode_mxfp4(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round weights [..., groups * 32] to mxfp4, each group by its largest: blocks and exponents
    as of `decode_mxfp4`.
    """
    groups = weights.float().unflatten(-1, (-1, 32))
    largest = groups.abs().amax(-1, keepdim=True)
    # The largest code is 6 = 1.5 * 2^2.
    _, power = torch.frexp(largest)
    exponents = (power - 3 + 127).clamp_(0, 254)
    scaled = torch.ldexp(groups, 127 - exponents).clamp_(-E2M1_MAX, E2M1_MAX)
    return pack_fp4(scaled), exponents.squeeze(-1).to(torch.uint8)


# ---- NVFP4


def decode_nvfp4(
    packed: torch.Tensor, scales: torch.Tensor, scale: torch.Tensor, *, divides: bool
) -> torch.Tensor:
    """The values of nvfp4 weights in fp32: [..., n].

    Args:
        packed: uint8 [..., n / 2], two codes a byte, the low half first.
        scales: e4m3 [..., n / 16].
        scale: fp32, of all; of a shape that `scales` can be multiplied with.
        divides: `scales` are divided by it, as compressed-tensors does. ModelOpt multiplies.
    """
    steps = scales.float()
    steps = steps.div_(scale) if divides else steps.mul_(scale)
    groups = unpack_fp4(packed, torch.float32).unflatten(-1, (-1, NVFP4_GROUP))
    return groups.mul_(steps.unsqueeze(-1)).flatten(-2)


def nvfp4_scale(largest: float) -> float:
    """The scale of matrices whose largest weight is `largest`, for `encode_nvfp4`: the largest of
    the groups' scales then is e4m3's largest.
    """
    return E4M3_MAX * E2M1_MAX / max(largest, SMALLEST)


def encode_nvfp4(weights: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Round weights [..., n] to nvfp4, each group by its largest: `packed` and `scales` as of
    `decode_nvfp4`, which divides by `scale`.
    """
    groups = weights.float().unflatten(-1, (-1, NVFP4_GROUP))
    largest = groups.abs().amax(-1)
    scales = (largest / E2M1_MAX * scale).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)
    # A group that rounds to no scale at all is zeros in any case.
    scales = torch.where(scales.float() == 0, torch.ones_like(scales), scales)
    # What a reader multiplies with: the group's rounded scale over that of all.
    steps = (scales.float() / scale).unsqueeze(-1)
    return pack_fp4((groups / steps).clamp_(-E2M1_MAX, E2M1_MAX).flatten(-2)), scales


def has_nan_scale(scales: torch.Tensor) -> bool:
    """Whether one of some e4m3 scales, as bytes, is no number."""
    return bool(((scales & SIGNLESS_NAN) == SIGNLESS_NAN).any())
