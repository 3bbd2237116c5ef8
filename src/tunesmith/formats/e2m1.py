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
