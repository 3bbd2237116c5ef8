"""Frozen weights W [out, in]: a class for each way to store W, with its matmuls.

- dense: W itself.
- nf4: 4-bit codes and their scales, in bitsandbytes' format (Dettmers et al. 2023,
  arXiv:2305.14314).
- fp8: 8-bit values with a scale a row of W, or one scale (see `scaled_matmul`).
- shipped: what an FP8 checkpoint holds, 8-bit values with a scale a block or a row, or one scale.
- nvfp4: what an NVFP4 checkpoint holds, 4-bit values with a scale for 16 of them, and one scale.

`encoding` and `tensors` describe a weight in full; `frozen_weight` builds it again from them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.host import packages
from tunesmith.model.fp4 import decode_nvfp4
from tunesmith.quant.scaled_matmul import (
    E4M3,
    FAST_SUMS,
    TENSOR_WISE,
    quantize,
    scaled_matmul,
)
from tunesmith.units import ceil_div

DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
# Rows for which bitsandbytes reads 4-bit weights inside the product. To make W dense first moves
# nine times as many bytes.
FEW_ROWS = 16
PIECE = 1 << 24  # weights as shipped that are dequantized at a time: they are in fp32 then
Update = tuple[Tensor, Tensor] | None  # of low rank: its two factors


def nf4_functions() -> Any:
    """`bitsandbytes.functional`, or a MachineError that says how to install it."""
    return packages.bnb_functional("nf4 weights", "model.quantize")


class FrozenWeight(ABC):
    """A weight that gets no gradient.

    Attributes:
        encoding: a key of WEIGHT_CLASSES, and the options of its class after it. It is one string
            because a `torch.library` operator takes strings and tensors but no objects, and because
            two weights can share an operator where their strings are equal.
        tensors: what stores the weight.
        shape: (out_features, in_features).
    """

    def __init__(self, encoding: str, tensors: Sequence[Tensor], shape: tuple[int, int]) -> None:
        self.encoding = encoding
        self.tensors = tensors
        self.shape = shape

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """W, [out, in]."""

    def quantize_input(self, x: Tensor) -> list[Tensor]:
        """What `forward_matmul` needs of x beside itself.

        Plain tensor code: the compiler fuses it into x's producer.
        """
        return []

    def quantize_gradient(self, dy: Tensor) -> list[Tensor]:
        """What `backward_matmul` needs of dy beside itself, as above."""
        return []

    def few_rows_matmul(self, x: Tensor) -> Tensor | None:
        """x W^T for so few rows as decoding has, by a kernel of their own, without a backward.

        None where there is no such kernel.
        """
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
        if update is not None:
            d_xa, a_transposed = update
            # [n, rank] times [rank, in].
            dx = d_xa @ a_transposed.T
        if dx is None:
            return dy @ weight
        return dx.addmm_(dy, weight)


class DenseWeight(FrozenWeight):
    """tensors: W [out, in], in the dtype of x."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.tensors[0]


class Nf4Encoding(NamedTuple):
    """How an nf4 weight was quantized; its text is the `encoding` of an `Nf4Weight`."""

    block: int  # weights that share a scale
    nested_block: int  # scales that share a scale; 0: the scales are fp32
    dtype: torch.dtype  # of the weight before

    def __str__(self) -> str:
        return f"nf4 {self.block} {self.nested_block} {self.dtype}"

    @classmethod
    def parse(cls, text: str) -> "Nf4Encoding":
        _, block, nested_block, dtype = text.split()
        return cls(int(block), int(nested_block), DTYPES[dtype])


class Nf4Weight(FrozenWeight):
    """A weight in NF4.

    tensors: the buffers of an `Nf4Linear` in the order of its docstring, without the three that may
    be None. encoding: an `Nf4Encoding`. A matmul of training makes W dense again: a dense copy that
    stays would undo the saving of 4 bits.
    """

    def dense(self, dtype: torch.dtype) -> Tensor:
        weight: Tensor = nf4_functions().dequantize_4bit(self.tensors[0], self._quant_state())
        return weight.to(dtype)

    def few_rows_matmul(self, x: Tensor) -> Tensor | None:
        if len(x) > FEW_ROWS:
            return None
        from bitsandbytes import matmul_4bit

        product: Tensor = matmul_4bit(x, self.tensors[0], self._quant_state())
        return product

    def _quant_state(self) -> Any:
        """bitsandbytes' QuantState: what it needs beside the codes."""
        functional = nf4_functions()
        encoding = Nf4Encoding.parse(self.encoding)
        # The codes, their scales, and where these are in 8 bits the scales of the scales.
        _, absmax, code, *nested = self.tensors
        offset = None
        nested_state = None
        if nested:
            nested_absmax, nested_code, offset = nested
            nested_state = functional.QuantState(
                nested_absmax,
                blocksize=encoding.nested_block,
                code=nested_code,
                dtype=torch.float32,
            )
        return functional.QuantState(
            absmax=absmax,
            shape=torch.Size(self.shape),
            code=code,
            blocksize=encoding.block,
            quant_type="nf4",
            dtype=encoding.dtype,
            offset=offset,
            state2=nested_state,
        )


class EightBitWeight(FrozenWeight):
    """tensors: the e4m3 codes of W [out, in], and their scale: fp32 [out, 1], or [1, 1] of all.

    encoding: one of `scaled_matmul.SCALING_RECIPES`, and FAST_SUMS where the forward takes them.

    dx = dy W sums over the rows of W. Their scales are factors within that sum, where no matmul
    applies them, so they are multiplied into dy before it is rounded. A GPU multiplies along
    contiguous rows only: the backward makes W^T of the codes.
    """

    @classmethod
    def from_dense(cls, encoding: str, dense: Tensor) -> "EightBitWeight":
        """Quantize W [out, in] in the dtype of x."""
        stored = quantize(encoding.removesuffix(FAST_SUMS), dense)
        return cls(encoding, stored, (dense.shape[0], dense.shape[1]))

    @property
    def recipe(self) -> str:
        return self.encoding.removesuffix(FAST_SUMS)

    def dense(self, dtype: torch.dtype) -> Tensor:
        codes, scale = self.tensors
        return (codes.float() * scale).to(dtype)

    def quantize_input(self, x: Tensor) -> list[Tensor]:
        return list(quantize(self.recipe, x))

    def quantize_gradient(self, dy: Tensor) -> list[Tensor]:
        if self.recipe != TENSOR_WISE:
            _, scale = self.tensors
            # [n, out] times [1, out].
            dy = dy * scale.T
        return list(quantize(self.recipe, dy))

    def forward_matmul(self, x: Tensor, quantized: Sequence[Tensor], update: Update) -> Tensor:
        fast_sums = self.encoding.endswith(FAST_SUMS)
        y = scaled_matmul(self.recipe, quantized, self.tensors, x.dtype, fast_sums=fast_sums)
        if update is not None:
            xa, b = update
            y.addmm_(xa, b.T)
        return y

    def backward_matmul(
        self, dy: Tensor, quantized: Sequence[Tensor], dx: Tensor | None, update: Update = None
    ) -> Tensor:
        codes, scale = self.tensors
        # [in, out] in memory, rows contiguous; the codes are moved as bytes.
        transposed = codes.view(torch.uint8).t().contiguous().view(E4M3)
        if self.recipe != TENSOR_WISE:
            scale = scale.new_ones(len(transposed), 1)  # it is in `quantized`
        product = scaled_matmul(self.recipe, quantized, (transposed, scale), dy.dtype)
        if update is not None:
            d_xa, a_transposed = update
            product.addmm_(d_xa, a_transposed.T)
        if dx is None:
            return product
        return dx.add_(product)


class ShippedEncoding(NamedTuple):
    """The blocks of a weight as shipped; its text is the `encoding` of a `ShippedWeight`.

    Attributes:
        rows, columns: of a block that shares a scale; 0: all that W has.
    """

    rows: int
    columns: int

    def __str__(self) -> str:
        return f"shipped {self.rows} {self.columns}"

    @classmethod
    def parse(cls, text: str) -> "ShippedEncoding":
        _, rows, columns = text.split()
        return cls(int(rows), int(columns))


class ShippedWeight(FrozenWeight):
    """A weight of an FP8 checkpoint, which computes what its dense weight does.

    tensors: the e4m3 codes of W [out, in], and their scales: fp32 [block rows, block columns].
    encoding: a `ShippedEncoding`.
    """

    def dense(self, dtype: torch.dtype) -> Tensor:
        codes, scales = self.tensors
        rows, _ = ShippedEncoding.parse(self.encoding)
        out_features, in_features = self.shape
        weight = codes.new_empty(self.shape, dtype=dtype)
        if not rows:
            rows = out_features
        of_columns = self._spread_columns(scales)  # [block rows, in or 1]
        # In fp32 there is one piece, of whole blocks.
        per_piece = max(1, PIECE // (rows * in_features))
        if len(of_columns) == 1:
            rows = max(1, PIECE // in_features)
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
            weight[start:stop] = values
        return weight

    def _spread_columns(self, scales: Tensor) -> Tensor:
        """The scale of each column of each row of blocks, or one for all of a row."""
        _, columns = ShippedEncoding.parse(self.encoding)
        if not columns:
            return scales
        return scales.repeat_interleave(columns, 1)[:, : self.shape[1]]


class Nvfp4Encoding(NamedTuple):
    """How the scales of an NVFP4 weight are combined; its text is the `encoding` of it.

    Attributes:
        divides: those of the groups are divided by that of all; False: multiplied.
    """

    divides: bool

    def __str__(self) -> str:
        return "nvfp4 divided" if self.divides else "nvfp4 multiplied"

    @classmethod
    def parse(cls, text: str) -> "Nvfp4Encoding":
        return cls(text == str(cls(divides=True)))


class Nvfp4Weight(FrozenWeight):
    """A weight of an NVFP4 checkpoint, which computes what its dense weight does.

    tensors: the codes of W, uint8 [out, in / 2]; the scale of each 16 of a row, e4m3 [out, in /
    16]; and that of all, fp32 [1, 1], or of each row, [out, 1]. encoding: an `Nvfp4Encoding`.
    """

    def dense(self, dtype: torch.dtype) -> Tensor:
        codes, scales, scale = self.tensors
        divides = Nvfp4Encoding.parse(self.encoding).divides
        out_features, in_features = self.shape
        scale = scale.expand(out_features, 1)
        weight = codes.new_empty(self.shape, dtype=dtype)
        step = max(1, PIECE // in_features)
        for start in range(0, out_features, step):
            rows = slice(start, start + step)
            weight[rows] = decode_nvfp4(codes[rows], scales[rows], scale[rows], divides=divides)
        return weight


WEIGHT_CLASSES: dict[str, type[FrozenWeight]] = {
    "dense": DenseWeight,
    "nf4": Nf4Weight,
    "fp8": EightBitWeight,
    "shipped": ShippedWeight,
    "nvfp4": Nvfp4Weight,
}


def frozen_weight(encoding: str, tensors: Sequence[Tensor], shape: tuple[int, int]) -> FrozenWeight:
    """The weight of this encoding; see `FrozenWeight`."""
    name = encoding.split(maxsplit=1)[0]
    return WEIGHT_CLASSES[name](encoding, tensors, shape)
