"""Frozen weights as FP8 checkpoints have them: 8-bit values with a scale a block or a row, or one
scale.
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
from tunesmith.formats.form import ShippedForm
from tunesmith.units import ceil_div

if TYPE_CHECKING:
    from tunesmith.model.weights import StoredTensor


class Fp8Blocks(AsShipped):
    """tensors: the e4m3 codes of W [out, in], and their scales: fp32 [block rows, block columns].

    Attributes:
        height, width: of a block that shares a scale; 0: all that W has.
    """

    name = "fp8-blocks"
    drawn_scales = (2.0**-5,)

    def __init__(self, form: ShippedForm) -> None:
        self.height, self.width = form.block or (0, 0)
        super().__init__(form, self.height, self.width)

    @classmethod
    def parse(cls, height: int, width: int) -> Fp8Blocks:
        return cls(ShippedForm("fp8", (height, width) if height else None))

    def matrix_forms(self, rows: int, columns: int) -> Forms:
        return {
            "weight": TensorForm((rows, columns), torch.uint8, is_shared=True, read_as=E4M3),
            # Not persistent: a checkpoint of the base holds dense weights.
            "scale": TensorForm(self.form.scale_shape(rows, columns)),
        }

    def decode(self, weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
        codes, scales = weight.tensors
        out_features, in_features = weight.shape
        dense = codes.new_empty(weight.shape, dtype=dtype)
        rows = self.height or out_features
        of_columns = self._spread_columns(scales, in_features)  # [block rows, in or 1]
        # In fp32 there is one piece, of whole blocks.
        per_piece = max(1, MAX_DECODED_WEIGHTS // (rows * in_features))
        if len(of_columns) == 1:
            rows = max(1, MAX_DECODED_WEIGHTS // in_features)
            of_columns = of_columns.expand(ceil_div(out_features, rows), -1)
        for first in range(0, len(of_columns), per_piece):
            last = min(first + per_piece, len(of_columns))
            start, stop = first * rows, min(last * rows, out_features)
            values = codes[start:stop].float()
            whole = (stop - start) // rows * rows
            if whole:
                blocks = values[:whole].view(-1, rows, in_features)
                blocks.mul_(of_columns[first : first + len(blocks), None])
            values[whole:].mul_(of_columns[last - 1])
            dense[start:stop] = values
        return dense

    def _spread_columns(self, scales: Tensor, in_features: int) -> Tensor:
        """The scale of each column of each row of blocks, or one for all of a row."""
        if not self.width:
            return scales
        return scales.repeat_interleave(self.width, 1)[:, :in_features]

    def decode_experts(self, stack: FrozenStack, experts: slice, dtype: torch.dtype) -> Tensor:
        codes, scales = (tensor[experts] for tensor in stack.tensors)
        rows, columns = stack.matrix
        height = rows // scales.shape[1]  # of a part, in which blocks begin anew
        block_height = self.height or height
        of_block = Fp8Blocks.parse(block_height, self.width)
        codes = codes.flatten(0, 1)
        scales = scales.flatten(0, 1)
        # Where each part has whole blocks alone, all parts are dequantized as one matrix.
        parts_at_once = len(scales) if height % block_height == 0 else 1
        step = parts_at_once * height
        matrices = []
        for part in range(0, len(scales), parts_at_once):
            of_part = [
                codes[part * height : part * height + step],
                scales[part : part + parts_at_once].flatten(0, 1),
            ]
            matrices.append(FrozenWeight(of_block, of_part, (step, columns)).dense(dtype))
        dense = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
        return dense.view(-1, rows, columns)

    def decode_rows(self, codes: Sequence[Tensor], scale: Tensor | None, first: int) -> Tensor:
        assert scale is not None
        values = codes[0].view(E4M3).float()
        if not self.height:
            return values * scale
        of_rows = scale[torch.arange(first, first + len(values)) // self.height]
        return values * self._spread_columns(of_rows, values.shape[1])

    def read_scale(self, stored: StoredTensor, weight: str) -> Tensor:
        scales = stored.read().float()
        if not scales.isfinite().all():
            raise not_finite(weight, stored.name)
        return scales if scales.ndim > 1 else scales.view(-1, 1)
