"""Codes of 4-bit floats (e2m1: a sign, two bits of exponent, one of mantissa), two a byte."""

import torch

E2M1_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


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
    """The codes nearest to values [..., n], two a byte: [..., n / 2]."""
    middles = (E2M1_VALUES[1:] + E2M1_VALUES[:-1]) / 2
    sizes = torch.bucketize(values.abs().contiguous(), middles.to(values.device))
    codes = sizes | (values < 0).long() << 3
    low, high = codes.to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4
