"""Frozen weights of NVFP4 checkpoints.

16 weights of a row share a scale in e4m3, and all weights of a matrix share a scale in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.formats.as_shipped import AsShipped, not_finite
from tunesmith.formats.base import (
    E4M3,
    MAX_DECODED_WEIGHTS,
    Forms,
    FrozenWeight,
    TensorForm,
    row_pieces,
)
from tunesmith.formats.e2m1 import unpack_fp4
from tunesmith.formats.form import NVFP4_GROUP, ShippedForm
from tunesmith.formats.stored import StoredTensor

SIGNLESS_NAN = 127  # byte of a scale, without its sign, that means NaN
ONE_IN_E4M3 = 0x38  # byte of a scale of 1


class Nvfp4(AsShipped):
    """NVFP4 format. Its tensors are the codes of W, uint8 [out, in / 2]; the scale of each group of
    16 weights of a row, e4m3 [out, in / 16]; and the scale of the matrix, fp32 [1, 1]. If the rows
    of the matrix are divided into parts, each part has its own scale, [parts, 1, 1].

    Attributes:
        divides: whether the scales of the groups are divided by the scale of the matrix, as
            compressed-tensors does. If False, they are multiplied by it, as ModelOpt does.
    """

    name = "nvfp4"

    def __init__(self, form: ShippedForm) -> None:
        assert form.names is not None
        self.divides = form.names.divides
        super().__init__(form, self.divides)
        self.drawn_scales = (ONE_IN_E4M3, 2.0**7 if self.divides else 2.0**-7)

    def matrix_forms(self, rows: int, columns: int) -> Forms:
        groups = (rows, columns // NVFP4_GROUP)
        return {
            "weight": TensorForm((rows, columns // 2), torch.uint8, is_shared=True),
            # Shard the scales too. They are large: an eighth of the size of the codes.
            "weight_scales": TensorForm(groups, torch.uint8, is_shared=True, read_as=E4M3),
            "scale": TensorForm((1, 1)),
        }

    def decode(self, weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
        codes, scales, scale = weight.tensors
        # `scale` has one value, or one value per part of a weight that is made of several parts.
        scale = scale.view(-1, 1, 1).expand(-1, weight.shape[0] // scale.numel(), 1).reshape(-1, 1)
        dense = codes.new_empty(weight.shape, dtype=dtype)
        for rows in row_pieces(0, *weight.shape, MAX_DECODED_WEIGHTS):
            dense[rows] = decode_nvfp4(codes[rows], scales[rows], scale[rows], divides=self.divides)
        return dense

    def decode_rows(self, codes: Sequence[Tensor], scale: Tensor | None, first: int) -> Tensor:
        assert scale is not None
        packed, scales = codes
        return decode_nvfp4(packed, scales.view(E4M3), scale, divides=self.divides)

    def read_scale(self, stored: StoredTensor, weight: str) -> Tensor:
        scale = stored.read().view(1, 1)
        if not scale.isfinite() or scale <= 0:
            raise not_finite(weight, stored.name, f" and above 0: {scale.item():g}")
        return scale

    def has_nan_scale(self, codes: Sequence[Tensor]) -> bool:
        return bool(((codes[1] & SIGNLESS_NAN) == SIGNLESS_NAN).any())


def decode_nvfp4(packed: Tensor, scales: Tensor, scale: Tensor, *, divides: bool) -> Tensor:
    """Convert NVFP4 codes to values in fp32: [..., n].

    Args:
        packed: uint8 [..., n / 2], two codes per byte, the low half first.
        scales: e4m3 [..., n / 16].
        scale: fp32 scale of the matrix, with a shape that broadcasts to `scales`.
        divides: see `Nvfp4`.
    """
    steps = scales.float()
    steps = steps.div_(scale) if divides else steps.mul_(scale)
    groups = unpack_fp4(packed, torch.float32).unflatten(-1, (-1, NVFP4_GROUP))
    return groups.mul_(steps.unsqueeze(-1)).flatten(-2)
