"""Frozen weights W [out, in]: one small class for each way to store W, with the matmuls of its forward and backward.

- dense: W itself.
- nf4: 4-bit codes and their scales, in bitsandbytes' format (Dettmers et al. 2023, arXiv:2305.14314).
- fp8: 8-bit values with a scale a row of W, or one scale (see `scaled_matmul`).

A `torch.library` operator takes strings and tensors, not objects. `kind` and `tensors` describe a weight in full;
`frozen_weight` builds it again from them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith import packages
from tunesmith.quant.scaled_matmul import E4M3, TENSOR_WISE, quantize, scaled_matmul

DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
# Rows for which bitsandbytes reads 4-bit weights inside the product. To make W dense first moves nine times as many bytes.
FEW_ROWS = 16
Update = tuple[Tensor, Tensor] | None  # of low rank: its two factors


def nf4_functions() -> Any:
    """`bitsandbytes.functional`, or a MachineError that says how to install it."""
    return packages.bitsandbytes("nf4 weights", "model.quantize")


class FrozenWeight(ABC):
    """A weight that gets no gradient.

    Attributes:
        kind: a key of WEIGHT_CLASSES, and the options of its class after it.
        tensors: what stores the weight.
        shape: (out_features, in_features).
    """

    def __init__(self, kind: str, tensors: Sequence[Tensor], shape: tuple[int, int]) -> None:
        self.kind, self.tensors, self.shape = kind, tensors, shape

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """W, [out, in]."""

    def quantize_input(self, x: Tensor) -> list[Tensor]:
        """What `forward_matmul` needs of x beside itself. Plain tensor code: the compiler fuses it into x's producer."""
        return []

    def quantize_gradient(self, dy: Tensor) -> list[Tensor]:
        """What `backward_matmul` needs of dy beside itself, as above."""
        return []

    def few_rows_matmul(self, x: Tensor) -> Tensor | None:
        """x W^T for so few rows as decoding has, by a kernel of their own; None where there is none. It has no backward."""
        return None

    def forward_matmul(self, x: Tensor, quantized: Sequence[Tensor], update: Update) -> Tensor:
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

    def backward_matmul(
        self, dy: Tensor, quantized: Sequence[Tensor], dx: Tensor | None, update: Update = None
    ) -> Tensor:
        """dy W for dy [n, out], added to `dx` [n, in] if there is one, which is then overwritten.

        quantized: `quantize_gradient(dy)`.
        update: d_xa [n, rank] and A^T [in, rank], whose product is added; not beside `dx`.
        """
        weight = self.dense(dy.dtype)
        dx = dx if update is None else update[0] @ update[1].T
        return dy @ weight if dx is None else dx.addmm_(dy, weight)


class DenseWeight(FrozenWeight):
    """tensors: W [out, in], in the dtype of x."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.tensors[0]


class Nf4Weight(FrozenWeight):
    """tensors: the buffers of an `Nf4Linear` in the order of its docstring, without the three that may be None.

    The options of `kind`: weights a scale, scales a nested scale (0: none), and the dtype that was quantized. A matmul of
    training makes W dense again: a kept copy would undo the saving of 4 bits.
    """

    def dense(self, dtype: torch.dtype) -> Tensor:
        weight: Tensor = nf4_functions().dequantize_4bit(self.tensors[0], self._state())
        return weight.to(dtype)

    def few_rows_matmul(self, x: Tensor) -> Tensor | None:
        if len(x) > FEW_ROWS:
            return None
        from bitsandbytes import matmul_4bit

        product: Tensor = matmul_4bit(x, self.tensors[0], self._state())
        return product

    def _state(self) -> Any:
        """What bitsandbytes needs beside the codes."""
        functional = nf4_functions()
        _, block, nested_block, stored = self.kind.split()
        _, absmax, code, *nested = self.tensors
        offset, state2 = None, None
        if nested:
            scales, values, offset = nested
            state2 = functional.QuantState(scales, blocksize=int(nested_block), code=values, dtype=torch.float32)
        return functional.QuantState(
            absmax=absmax, shape=torch.Size(self.shape), code=code, blocksize=int(block), quant_type="nf4",
            dtype=DTYPES[stored], offset=offset, state2=state2,
        )  # fmt: skip


class EightBitWeight(FrozenWeight):
    """tensors: the e4m3 codes of W [out, in], and their scale: fp32 [out, 1], or [1, 1] of the whole matrix.

    dx = dy W sums over the rows of W. Their scales are factors within that sum, where no matmul applies them, so they are
    multiplied into dy before it is rounded. A GPU multiplies along contiguous rows only: the backward makes W^T of the codes.
    """

    @classmethod
    def from_dense(cls, kind: str, dense: Tensor) -> "EightBitWeight":
        """Quantize W [out, in] in the dtype of x; `kind` is one of `scaled_matmul.KINDS`."""
        return cls(kind, quantize(kind, dense), (dense.shape[0], dense.shape[1]))

    def dense(self, dtype: torch.dtype) -> Tensor:
        codes, scale = self.tensors
        return (codes.float() * scale).to(dtype)

    def quantize_input(self, x: Tensor) -> list[Tensor]:
        return list(quantize(self.kind, x))

    def quantize_gradient(self, dy: Tensor) -> list[Tensor]:
        _, scale = self.tensors
        return list(quantize(self.kind, dy if self.kind == TENSOR_WISE else dy * scale.T))

    def forward_matmul(self, x: Tensor, quantized: Sequence[Tensor], update: Update) -> Tensor:
        y = scaled_matmul(self.kind, quantized, self.tensors, x.dtype)
        return y if update is None else y.addmm_(update[0], update[1].T)

    def backward_matmul(
        self, dy: Tensor, quantized: Sequence[Tensor], dx: Tensor | None, update: Update = None
    ) -> Tensor:
        codes, scale = self.tensors
        transposed = codes.view(torch.uint8).t().contiguous().view(E4M3)
        if self.kind != TENSOR_WISE:
            scale = scale.new_ones(len(transposed), 1)  # it is in `quantized`
        product = scaled_matmul(self.kind, quantized, (transposed, scale), dy.dtype)
        if update is not None:
            product.addmm_(update[0], update[1].T)
        return product if dx is None else dx.add_(product)


WEIGHT_CLASSES: dict[str, type[FrozenWeight]] = {
    "dense": DenseWeight,
    "nf4": Nf4Weight,
    "fp8": EightBitWeight,
}


def frozen_weight(kind: str, tensors: Sequence[Tensor], shape: tuple[int, int]) -> FrozenWeight:
    """The weight of this kind; see `FrozenWeight`."""
    return WEIGHT_CLASSES[kind.split(maxsplit=1)[0]](kind, tensors, shape)
