"""Linear weights rounded to fp8 in the files of compressed-tensors, which vLLM opens.

They are e4m3 values with one scale a row; vLLM rounds activations to 8 bits too, token by token:

    NAME.weight  W / scale        NAME.weight_scale  bf16 [out, 1] = max |row| / 448

Nothing is calibrated: scales are those of the weights. Embedding and head stay as they are. The
format is compressed-tensors' `float-quantized`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tunesmith.formats.base import E4M3, E4M3_MAX
from tunesmith.tools.export.tuned_weights import TunedWeight

SMALLEST_SCALE = 1e-12  # of a row of zeros

# Rows from the first to before the last.
ReadRows = Callable[[int, int], Tensor]


class RoundedWeight:
    """A linear weight [out, in] in fp8. As a `RowSource` it is what the file stands for."""

    def __init__(self, name: str, weight: TunedWeight) -> None:
        self.name = name.removesuffix(".weight")
        self.weight = weight

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def parts(self) -> dict[str, tuple[Tensor, ReadRows]]:
        """The tensors that the file has of it, on meta, and what reads the rows of each."""
        values = torch.empty(self.shape, dtype=E4M3, device="meta")
        scales = torch.empty(self.shape[0], 1, dtype=torch.bfloat16, device="meta")
        return {
            f"{self.name}.weight": (values, self._values),
            f"{self.name}.weight_scale": (scales, self._scales),
        }

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
