"""MXFP4, in which gpt-oss ships its experts: 4-bit floats in groups of 32 that share an exponent.

OCP Microscaling Formats, version 1.0. A checkpoint has the experts of a layer as [out, in]; where
the model has them as [in, out] a reader turns them.
"""

import torch

# Of 4 bits: sign, two of exponent, one of mantissa (e2m1).
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NAN = 255  # as an exponent


def decode_mxfp4(
    blocks: torch.Tensor, exponents: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The values of mxfp4 weights: [..., groups * 32].

    Each is exact, but for the outermost exponents.

    Args:
        blocks: uint8 [..., groups, 16], two codes a byte, the low half first.
        exponents: uint8 [..., groups], of a power of two, with a bias of 127.
        dtype: fp32 or bf16, which have the same exponents.
    """
    values = torch.tensor([*FP4, *(-value for value in FP4)], dtype=dtype, device=blocks.device)
    # The two values of each byte as one word: one look-up for both, and no third dimension.
    low, high = torch.meshgrid(values, values, indexing="xy")
    word = torch.int64 if dtype.itemsize == 4 else torch.int32
    pairs = torch.stack([low, high], dim=-1).view(256, 2).view(word).view(256)
    dense = pairs[blocks.int()].view(dtype)
    ones = torch.ones_like(exponents, dtype=torch.float32)
    powers = torch.ldexp(ones, exponents.int() - 127).to(dtype)
    return dense.mul_(powers.unsqueeze(-1)).flatten(-2)


def encode_mxfp4(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round weights [..., groups * 32] to mxfp4, each group by its largest: blocks and exponents
    as of `decode_mxfp4`.
    """
    groups = weights.float().unflatten(-1, (-1, 32))
    largest = groups.abs().amax(-1, keepdim=True)
    # The largest code is 6 = 1.5 * 2^2.
    _, power = torch.frexp(largest)
    exponents = (power - 3 + 127).clamp_(0, 254)
    scaled = torch.ldexp(groups, 127 - exponents).clamp_(-6, 6)
    # Codes change halfway between two values.
    values = torch.tensor(FP4, device=weights.device)
    codes = torch.bucketize(scaled.abs(), (values[1:] + values[:-1]) / 2).to(torch.uint8)
    codes |= (scaled < 0).to(torch.uint8) << 3
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4, exponents.squeeze(-1).to(torch.uint8)
