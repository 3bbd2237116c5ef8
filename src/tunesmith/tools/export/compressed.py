"""Linear weights rounded to fp8 in the files of compressed-tensors, which vLLM opens.

They are e4m3 values with one scale a row; vLLM rounds activations to 8 bits too, token by token:

    NAME.weight  W / scale        NAME.weight_scale  bf16 [out, 1] = max |row| / 448

Nothing is calibrated: scales are those of the weights. Embedding and head stay as they are. The
format is compressed-tensors' `float-quantized`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.formats.base import E4M3, E4M3_MAX
from tunesmith.tools.export.tuned_weights import TunedWeight

SMALLEST_SCALE = 1e-12  # of a row of zeros


@dataclass(frozen=True)
class StoredPart:
    """A tensor of the file that is computed from a weight's rows.

    Attributes:
        rows: the part's rows that belong to a weight's rows from `first` to before `last`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], Tensor]


class RoundedWeight:
    """A linear weight [out, in] in fp8. As a `RowSource` it is what the file stands for."""

    def __init__(self, name: str, weight: TunedWeight) -> None:
        self.name = name.removesuffix(".weight")
        self.weight = weight

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def parts(self) -> list[StoredPart]:
        """The tensors that the file has of it."""
        out = self.shape[0]
        return [
            StoredPart(f"{self.name}.weight", tuple(self.shape), E4M3, self._values),
            StoredPart(f"{self.name}.weight_scale", (out, 1), torch.bfloat16, self._scales),
        ]

    def rows(self, first: int, last: int) -> Tensor:
        """Rows in fp32, from the rounded values."""
        return self._values(first, last).float() * self._scales(first, last).float()

    def _values(self, first: int, last: int) -> Tensor:
        rows = self.weight.rows(first, last)
        # The scale is rounded to bf16 before it divides: the file holds bf16, and a reader
        # multiplies with that. It may lift a value above 448, which e4m3 turns into NaN.
        scaled = rows / _row_scales(rows).float()
        return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)

    def _scales(self, first: int, last: int) -> Tensor:
        return _row_scales(self.weight.rows(first, last))


def _row_scales(rows: Tensor) -> Tensor:
    """The scale of each row, bf16 [n, 1]."""
    # The row's largest value becomes e4m3's largest, 448.
    largest = rows.abs().amax(dim=1, keepdim=True)
    return (largest / E4M3_MAX).clamp(min=SMALLEST_SCALE).to(torch.bfloat16)
