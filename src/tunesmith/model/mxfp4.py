"""MXFP4, in which gpt-oss ships its experts: 4-bit floats in groups of 32 that share an exponent.

OCP Microscaling Formats, version 1.0. A checkpoint has the experts of a layer as [out, in]; where
the model has them as [in, out] a reader turns them.
"""

import torch

# Of 4 bits: sign, two of exponent, one of mantissa (e2m1).
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def decode_mxfp4(blocks: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """The values of mxfp4 weights: fp32 [..., groups * 32].

    Each is exact in fp32 and bf16, but for the outermost exponents.

    Args:
        blocks: uint8 [..., groups, 16], two codes a byte, the low half first.
        exponents: uint8 [..., groups], of a power of two, with a bias of 127.
    """
    values = torch.tensor([*FP4, *(-value for value in FP4)], device=blocks.device)
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    dense = torch.ldexp(values[codes.int()], exponents.int().unsqueeze(-1) - 127)
    return dense.flatten(-2)
