"""Frozen weights W [out, in]: one small class for each way to store W, with the matmuls of its forward and backward.

- dense: W itself.
- nf4: 4-bit codes and their scales, in bitsandbytes' format (Dettmers et al. 2023, arXiv:2305.14314).
- fp8: e4m3 with one scale a row or one a tensor (Micikevicius et al. 2022, arXiv:2209.05433), stored twice: the GPU
  multiplies along contiguous rows only, and the backward needs the rows of W^T.

A `torch.library` operator takes strings and tensors, not objects. `kind` and `tensors` describe a weight in full;
`frozen_weight` builds it again from them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith import packages
from tunesmith.private import scaled_mm

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max
ROW_WISE, TENSOR_WISE = "fp8 row-wise", "fp8 tensor-wise"
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def nf4_functions() -> Any:
    """`bitsandbytes.functional`, or a MachineError that says how to install it."""
    return packages.bitsandbytes("nf4 weights", "model.quantize")


class FrozenWeight(ABC):
    """A weight that gets no gradient.

    Attributes:
        kind: a key of WEIGHT_CLASSES, and the options of its class after it.
        tensors: what stores the weight.
        shape: (out_features, in_features).
        adds_in_epilogue: whether `backward_matmul` adds in the matmul's own pass over dx, or in a pass of its own.
    """

    adds_in_epilogue = True

    def __init__(self, kind: str, tensors: Sequence[Tensor], shape: tuple[int, int]) -> None:
        self.kind, self.tensors, self.shape = kind, tensors, shape

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """W, [out, in]."""

    def quantize_input(self, x: Tensor) -> list[Tensor]:
        """What the matmuls need of x (or dy) beside itself. Plain tensor code: the compiler fuses it into x's producer."""
        return []

    def forward_matmul(self, x: Tensor, quantized: Sequence[Tensor], update: tuple[Tensor, Tensor] | None) -> Tensor:
        """x W^T + (x A^T) B^T: a new [n, out].

        Args:
            x: [n, in].
            quantized: `quantize_input(x)`.
            update: x A^T [n, rank] and B [out, rank] in the dtype of x, or None for x W^T alone.
        """
        weight = self.dense(x.dtype)
        if update is None:
            return F.linear(x, weight)
        xa, b = update
        # The small product first: `addmm` adds x W^T onto it in its epilogue, so y is written once.
        return (xa @ b.T).addmm_(x, weight.T)

    def backward_matmul(self, dy: Tensor, quantized: Sequence[Tensor], dx: Tensor | None) -> Tensor:
        """dy W for dy [n, out], added to `dx` [n, in] if there is one, which is then overwritten."""
        weight = self.dense(dy.dtype)
        return dy @ weight if dx is None else dx.addmm_(dy, weight)


class DenseWeight(FrozenWeight):
    """tensors: W [out, in], in the dtype of x."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.tensors[0]


class Nf4Weight(FrozenWeight):
    """tensors: the buffers of an `Nf4Linear` in the order of its docstring, without the three that may be None.

    The options of `kind`: weights a scale, scales a nested scale (0: none), and the dtype that was quantized. Each matmul
    makes W dense again: a kept copy would undo the saving of 4 bits.
    """

    def dense(self, dtype: torch.dtype) -> Tensor:
        functional = nf4_functions()
        _, block, nested_block, stored = self.kind.split()
        packed, absmax, code, *nested = self.tensors
        offset, state2 = None, None
        if nested:
            scales, values, offset = nested
            state2 = functional.QuantState(scales, blocksize=int(nested_block), code=values, dtype=torch.float32)
        state = functional.QuantState(
            absmax=absmax, shape=torch.Size(self.shape), code=code, blocksize=int(block), quant_type="nf4",
            dtype=DTYPES[stored], offset=offset, state2=state2,
        )  # fmt: skip
        weight: Tensor = functional.dequantize_4bit(packed, state)
        return weight.to(dtype)


class Fp8Weight(FrozenWeight):
    """tensors: e4m3 [out, in] and its scale, e4m3 [in, out] and its scale; scales are fp32 [rows, 1] or [1, 1]."""

    adds_in_epilogue = False

    @classmethod
    def from_dense(cls, kind: str, dense: Tensor) -> Fp8Weight:
        """Quantize W [out, in]; `kind` is ROW_WISE or TENSOR_WISE."""
        both = (quantize_fp8(w, per_tensor=kind == TENSOR_WISE) for w in (dense, dense.T.contiguous()))
        return cls(kind, [tensor for pair in both for tensor in pair], (dense.shape[0], dense.shape[1]))

    def dense(self, dtype: torch.dtype) -> Tensor:
        return (self.tensors[0].float() * self.tensors[1]).to(dtype)

    def quantize_input(self, x: Tensor) -> list[Tensor]:
        return list(quantize_fp8(x, per_tensor=self.kind == TENSOR_WISE))

    def forward_matmul(self, x: Tensor, quantized: Sequence[Tensor], update: tuple[Tensor, Tensor] | None) -> Tensor:
        y = _matmul_fp8(quantized, self.tensors[:2], x.dtype)
        return y if update is None else y.addmm_(update[0], update[1].T)

    def backward_matmul(self, dy: Tensor, quantized: Sequence[Tensor], dx: Tensor | None) -> Tensor:
        product = _matmul_fp8(quantized, self.tensors[2:], dy.dtype)
        return product if dx is None else dx.add_(product)


def quantize_fp8(x: Tensor, *, per_tensor: bool) -> tuple[Tensor, Tensor]:
    """x [n, k] as e4m3 and its scales, with x = e4m3 * scale: fp32 [n, 1], or [1, 1] if `per_tensor`.

    A value that is not finite makes its row NaN (its tensor, if `per_tensor`).
    """
    wide = x.float()
    largest = wide.abs().amax() if per_tensor else wide.abs().amax(-1, keepdim=True)
    scale = (largest / E4M3_MAX).clamp(min=1e-12)
    return (wide / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale.view(-1, 1)


def _matmul_fp8(left: Sequence[Tensor], right: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """left [n, k] times the transpose of right [m, k], each e4m3 with its scales; adds up in fp32: [n, m] in `dtype`."""
    (a, a_scale), (b, b_scale) = left, right
    return scaled_mm(a, b.t(), scale_a=a_scale, scale_b=b_scale.t(), out_dtype=dtype, use_fast_accum=a.is_cuda)


WEIGHT_CLASSES: dict[str, type[FrozenWeight]] = {"dense": DenseWeight, "nf4": Nf4Weight, "fp8": Fp8Weight}


def frozen_weight(kind: str, tensors: Sequence[Tensor], shape: tuple[int, int]) -> FrozenWeight:
    """The weight of this kind; see `FrozenWeight`."""
    return WEIGHT_CLASSES[kind.split(maxsplit=1)[0]](kind, tensors, shape)
