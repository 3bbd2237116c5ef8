"""Linear weights rounded to 8 or 4 bits in the files of compressed-tensors, which vLLM opens.

fp8    e4m3 values with one scale a row; vLLM rounds activations to 8 bits too, token by token:

           NAME.weight  W / scale        NAME.weight_scale  bf16 [out, 1] = max |row| / 448

nvfp4  e2m1 values, two a byte, with an e4m3 scale for 16 of a row and one fp32 scale a matrix;
       activations stay 16 bits:

           NAME.weight_packed  uint8 [out, in / 2], the first of two in the low bits
           NAME.weight_scale   e4m3 [out, in / 16] = max |16 values| / 6 * global
           NAME.weight_global_scale  fp32 [1] = 448 * 6 / max |W|

Nothing is calibrated: scales are those of the weights. Embedding and head stay as they are. The
formats are compressed-tensors' `float-quantized` and `nvfp4-pack-quantized`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tunesmith.export.tuned_weights import TunedWeight
from tunesmith.model.fp4 import (
    E4M3,
    E4M3_MAX,
    decode_nvfp4,
    encode_nvfp4,
    nvfp4_scale,
)
from tunesmith.model.shipped import NVFP4_GROUP

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


class RoundedWeight(ABC):
    """A linear weight [out, in] in fewer bits. As a `RowSource` it is what the file stands for."""

    def __init__(self, name: str, weight: TunedWeight) -> None:
        self.name = name.removesuffix(".weight")
        self.weight = weight

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @abstractmethod
    def parts(self) -> list[StoredPart]:
        """What is stored."""

    @abstractmethod
    def rows(self, first: int, last: int) -> Tensor:
        """fp32, from the rounded values."""


class RoundedFp8(RoundedWeight):
    def parts(self) -> list[StoredPart]:
        out = self.shape[0]
        return [
            StoredPart(f"{self.name}.weight", tuple(self.shape), E4M3, self._values),
            StoredPart(f"{self.name}.weight_scale", (out, 1), torch.bfloat16, self._scales),
        ]

    def rows(self, first: int, last: int) -> Tensor:
        rows = self.weight.rows(first, last)
        # The scale is rounded to bf16 before it divides: the file holds bf16, and a reader
        # multiplies with that.
        scales = _row_scales(rows)
        return _to_e4m3(rows / scales.float()).float() * scales.float()

    def _values(self, first: int, last: int) -> Tensor:
        rows = self.weight.rows(first, last)
        return _to_e4m3(rows / _row_scales(rows).float())

    def _scales(self, first: int, last: int) -> Tensor:
        return _row_scales(self.weight.rows(first, last))


def _row_scales(rows: Tensor) -> Tensor:
    """bf16 [n, 1]."""
    # The row's largest value becomes e4m3's largest, 448.
    largest = rows.abs().amax(dim=1, keepdim=True)
    return (largest / E4M3_MAX).clamp(min=SMALLEST_SCALE).to(torch.bfloat16)


def _to_e4m3(values: Tensor) -> Tensor:
    # Rounding a scale to bf16 may lift a value above 448, which e4m3 turns into NaN.
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


@dataclass
class JointScale:
    """The fp32 scale of matrices that vLLM joins to one, and so must share it."""

    weights: list[TunedWeight] = field(default_factory=list)
    _value: float = 0.0

    def value(self) -> float:
        """448 * 6 / max |W| over all of them; they are read at the first call."""
        if not self._value:
            largest = 0.0
            for weight in self.weights:
                # In bands: the weights of one group together may not fit into memory.
                for band in weight.bands():
                    rows = weight.rows(band.start, band.stop)
                    largest = max(largest, float(rows.abs().max()))
            self._value = nvfp4_scale(largest)
        return self._value


class RoundedNvfp4(RoundedWeight):
    def __init__(self, name: str, weight: TunedWeight, joint: JointScale) -> None:
        super().__init__(name, weight)
        self.joint = joint
        joint.weights.append(weight)

    def parts(self) -> list[StoredPart]:
        out, width = self.shape
        groups = width // NVFP4_GROUP
        return [
            StoredPart(f"{self.name}.weight_packed", (out, width // 2), torch.uint8, self._packed),
            StoredPart(f"{self.name}.weight_scale", (out, groups), E4M3, self._scales),
            StoredPart(f"{self.name}.weight_global_scale", (1,), torch.float32, self._global),
        ]

    def rows(self, first: int, last: int) -> Tensor:
        packed, scales = self._encoded(first, last)
        return decode_nvfp4(packed, scales, torch.tensor(self.joint.value()), divides=True)

    def _encoded(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        return encode_nvfp4(self.weight.rows(first, last), self.joint.value())

    def _packed(self, first: int, last: int) -> Tensor:
        return self._encoded(first, last)[0]

    def _scales(self, first: int, last: int) -> Tensor:
        return self._encoded(first, last)[1]

    def _global(self, first: int, last: int) -> Tensor:
        return torch.tensor([self.joint.value()])
