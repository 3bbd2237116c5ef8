"""Frozen weights of FP8 checkpoints: 8-bit values with one scale per block, row or matrix."""

from __future__ import annotations

from collections.abc import Sequence

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
from tunesmith.formats.stored import StoredTensor
from tunesmith.units import ceil_div


class Fp8Blocks(AsShipped):
    """Format of FP8 checkpoints. Its tensors are the e4m3 codes of W [out, in] and the scales, fp32
    [block rows, block columns].

    Attributes:
        height, width: size of a block of weights that share a scale. 0 means the entire dimension
            of W.
    """

    name = "fp8-blocks"
    drawn_scales = (2.0**-5,)

    def __init__(self, form: ShippedForm) -> None:
        self.height, self.width = form.block or (0, 0)
        super().__init__(form, self.height, self.width)

    def matrix_forms(self, rows: int, columns: int) -> Forms:
        return {
            "weight": TensorForm((rows, columns), torch.uint8, is_shared=True, read_as=E4M3),
            # The scale is not in `state_dict`: it is loaded together with the codes.
            "scale": TensorForm(self.form.scale_shape(rows, columns)),
        }

    def decode(self, weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
        codes, scales = weight.tensors
        out_features, in_features = weight.shape
        dense = codes.new_empty(weight.shape, dtype=dtype)

        rows = self.height or out_features
        column_scales = self._spread_columns(scales, in_features)  # [block rows, in or 1]
        # Number of rows of blocks that are converted to fp32 in one step.
        per_piece = max(1, MAX_DECODED_WEIGHTS // (rows * in_features))
        if len(column_scales) == 1:
            # All rows have the same scales, so a piece can start at any row of the matrix.
            rows = max(1, MAX_DECODED_WEIGHTS // in_features)
            column_scales = column_scales.expand(ceil_div(out_features, rows), -1)

        for first in range(0, len(column_scales), per_piece):
            last = min(first + per_piece, len(column_scales))
            start = first * rows
            stop = min(last * rows, out_features)
            values = codes[start:stop].float()
            # Number of rows in complete blocks. The last block of the matrix may be incomplete.
            whole = len(values) // rows * rows
            if whole:
                blocks = values[:whole].view(-1, rows, in_features)
                block_scales = column_scales[first : first + len(blocks)]
                blocks.mul_(block_scales.unsqueeze(1))
            values[whole:].mul_(column_scales[last - 1])
            dense[start:stop] = values
        return dense

    def _spread_columns(self, scales: Tensor, in_features: int) -> Tensor:
        """Return the scale of each column, for each row of blocks. Return only one scale per row of
        blocks if a block has all columns.
        """
        if not self.width:
            return scales
        return scales.repeat_interleave(self.width, 1)[:, :in_features]

    def decode_experts(self, stack: FrozenStack, experts: slice, dtype: torch.dtype) -> Tensor:
        codes, scales = (tensor[experts] for tensor in stack.tensors)
        rows, columns = stack.matrix
        height = rows // scales.shape[1]  # height of a part; blocks do not cross parts
        block_height = self.height or height
        part_format = Fp8Blocks(ShippedForm("fp8", (block_height, self.width)))
        codes = codes.flatten(0, 1)
        scales = scales.flatten(0, 1)

        # Each part consists of complete blocks, so all parts can be dequantized as one matrix.
        parts_at_once = len(scales) if height % block_height == 0 else 1
        step = parts_at_once * height
        pieces = zip(codes.split(step), scales.split(parts_at_once), strict=True)
        matrices = []
        for piece_codes, piece_scales in pieces:
            tensors = [piece_codes, piece_scales.flatten(0, 1)]
            weight = FrozenWeight(part_format, tensors, (step, columns))
            matrices.append(weight.dense(dtype))

        if len(matrices) == 1:
            return matrices[0].view(-1, rows, columns)
        return torch.cat(matrices).view(-1, rows, columns)

    def decode_rows(self, codes: Sequence[Tensor], scale: Tensor | None, first: int) -> Tensor:
        assert scale is not None
        values = codes[0].view(E4M3).float()
        if not self.height:
            return values * scale
        rows = torch.arange(first, first + len(values))
        row_scales = scale[rows // self.height]
        return values * self._spread_columns(row_scales, values.shape[1])

    def read_scale(self, stored: StoredTensor, weight: str) -> Tensor:
        scales = stored.read().float()
        if not scales.isfinite().all():
            raise not_finite(weight, stored.name)
        return scales if scales.ndim > 1 else scales.view(-1, 1)
