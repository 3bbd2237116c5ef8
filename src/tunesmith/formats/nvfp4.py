"""Frozen weights as NVFP4 checkpoints have them: 16 weights of a row share a scale in e4m3, and all
of a matrix one in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tunesmith.formats.as_shipped import AsShipped, not_finite
from tunesmith.formats.base import (
    E4M3,
    MAX_DECODED_WEIGHTS,
    Forms,
    FrozenStack,
    FrozenWeight,
    TensorForm,
)
from tunesmith.formats.e2m1 import unpack_fp4
from tunesmith.formats.form import COMPRESSED_TENSORS, MODELOPT, NVFP4_GROUP, ShippedForm

if TYPE_CHECKING:
    from tunesmith.model.weights import StoredTensor

SIGNLESS_NAN = 127  # as the byte of a scale
ONE_IN_E4M3 = 0x38  # as above


class Nvfp4(AsShipped):
    """tensors: the codes of W, uint8 [out, in / 2]; the scale of each 16 of a row, e4m3 [out, in /
    16]; and that of all, fp32 [1, 1], or of each row, [out, 1].

    Attributes:
        divides: the groups' scales are divided by that of all, as compressed-tensors does; False:
            multiplied, as ModelOpt does.
    """

    name = "nvfp4"

    def __init__(self, form: ShippedForm) -> None:
        assert form.names is not None
        self.divides = form.names.divides
        super().__init__(form, self.divides)
        self.drawn_scales = (ONE_IN_E4M3, 2.0**7 if self.divides else 2.0**-7)

    @classmethod
    def parse(cls, divides: bool) -> Nvfp4:
        return cls(ShippedForm("nvfp4", names=COMPRESSED_TENSORS if divides else MODELOPT))

    def matrix_forms(self, rows: int, columns: int) -> Forms:
        groups = (rows, columns // NVFP4_GROUP)
        return {
            "weight": TensorForm((rows, columns // 2), torch.uint8, is_shared=True),
            # Shared too: it is an eighth of the codes.
            "weight_scales": TensorForm(groups, torch.uint8, is_shared=True, read_as=E4M3),
            "scale": TensorForm((1, 1)),
        }

    def decode(self, weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
        codes, scales, scale = weight.tensors
        out_features, in_features = weight.shape
        scale = scale.expand(out_features, 1)
        dense = codes.new_empty(weight.shape, dtype=dtype)
        step = max(1, MAX_DECODED_WEIGHTS // in_features)
        for start in range(0, out_features, step):
            rows = slice(start, start + step)
            dense[rows] = decode_nvfp4(codes[rows], scales[rows], scale[rows], divides=self.divides)
        return dense

    def decode_experts(self, stack: FrozenStack, experts: slice, dtype: torch.dtype) -> Tensor:
        codes, scales, of_parts = (tensor[experts] for tensor in stack.tensors)
        rows, columns = stack.matrix
        # One matrix of all of them, whose rows have the scale of their part.
        height = rows // of_parts.shape[1]
        of_rows = of_parts.flatten().repeat_interleave(height).unsqueeze(1)
        matrix = [codes.flatten(0, 1), scales.flatten(0, 1), of_rows]
        dense = FrozenWeight(self, matrix, (len(of_rows), columns)).dense(dtype)
        return dense.view(-1, rows, columns)

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
    """The values of nvfp4 weights in fp32: [..., n].

    Args:
        packed: uint8 [..., n / 2], two codes a byte, the low half first.
        scales: e4m3 [..., n / 16].
        scale: fp32, of all; of a shape that `scales` can be multiplied with.
        divides: as of `Nvfp4`.
    """
    steps = scales.float()
    steps = steps.div_(scale) if divides else steps.mul_(scale)
    groups = unpack_fp4(packed, torch.float32).unflatten(-1, (-1, NVFP4_GROUP))
    return groups.mul_(steps.unsqueeze(-1)).flatten(-2)
