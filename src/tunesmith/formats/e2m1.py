"""4-bit floats (e2m1: a sign, two exponent bits, one mantissa bit), stored as two codes per
byte.
"""

import torch

E2M1_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def unpack_fp4(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert codes [..., n] to values [..., 2 n] in fp32 or bf16.

    The low half of a byte is the first of its two codes.
    """
    positive = E2M1_VALUES.to(packed.device, dtype)
    values = torch.cat([positive, -positive])
    # Store the two values of each possible byte as one word, so that one lookup returns both values
    # and the codes need no additional dimension.
    low, high = torch.meshgrid(values, values, indexing="xy")
    word = torch.int64 if dtype.itemsize == 4 else torch.int32
    pairs = torch.stack([low, high], dim=-1).view(256, 2).view(word).view(256)
    return pairs[packed.int()].view(dtype)
