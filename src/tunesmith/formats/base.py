"""The interface of the formats in which frozen weights are stored: `Format`, one file a format.

- dense: the weight itself.
- nf4: 4-bit codes and their scales, in bitsandbytes' format (Dettmers et al. 2023,
  arXiv:2305.14314).
- fp8: 8-bit values with a scale a row, or one scale, for products in 8 bits.
- fp8-blocks, nvfp4, mxfp4: what a checkpoint in FP8, NVFP4 or MXFP4 holds.

A format makes and reads the tensors of a matrix [out, in], and those of a stack of experts. It
holds no tensors itself: `FrozenLinear` and `ExpertStack` do, and `FrozenWeight` and `FrozenStack`
are what the products take of them.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from tunesmith.formats.linear import FrozenLinear
    from tunesmith.formats.stack import ExpertStack
    from tunesmith.model.weights import StoredTensor

    Stored: TypeAlias = StoredTensor | Tensor  # a weight of a checkpoint, or one that was drawn
    StoredParts: TypeAlias = Mapping[str, Stored]  # a weight under "", companions by suffix

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max
# Of a row of zeros. A row of gradients that the scales of W are multiplied into may be of 1e-12
# and less.
LEAST_SCALE = 1e-30
# Weights as shipped that are dequantized at a time: they are in fp32 then.
MAX_DECODED_WEIGHTS = 1 << 24
# Of a stack that is dense at a time, where all experts are multiplied by one kernel: a stack of
# Qwen3-30B-A3B or of gpt-oss-20b takes less in 16 bits, one of gpt-oss-120b 4 GiB.
DENSE_BYTES = 1 << 30
Update = tuple[Tensor, Tensor] | None  # of low rank: its two factors


class TensorForm(NamedTuple):
    """A tensor of a stored weight.

    Attributes:
        is_shared: it grows with the weight: a parameter, of which FSDP leaves each rank a part. The
            others are buffers, whole on every rank.
        read_as: the dtype of its bytes, where torch and FSDP shall move them as integers.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    is_shared: bool = False
    read_as: torch.dtype | None = None


Forms = dict[str, TensorForm]  # the tensors of a weight, by their names in a layer


class Format(ABC):
    """A way to store a frozen weight.

    Attributes:
        encoding: its name and options, of which `find_format` makes it again. It is one string
            because a `torch.library` operator takes strings and tensors but no objects, and because
            two weights can share an operator where their strings are equal.
        block: weights of a row that share a scale, and whose codes cannot be parted.
        rounds: a dense weight is rounded as it is loaded; False: it is taken as it is.
        is_output_major: the rows of a matrix of experts are outputs, however Transformers has them.
    """

    name: ClassVar[str]
    block: int = 1
    rounds: ClassVar[bool] = False
    is_output_major: ClassVar[bool] = False

    def __init__(self, *options: str | float | None) -> None:
        self.encoding = json.dumps([self.name, *options])

    @classmethod
    def parse(cls, *options: Any) -> Format:
        """The format of these options, as they are in `encoding`."""
        return cls(*options)

    # ---- tensors

    @abstractmethod
    def matrix_forms(self, rows: int, columns: int) -> Forms:
        """The tensors of a matrix, by their names in a layer; the weight's codes come first."""

    def stack_forms(self, experts: int, rows: int, columns: int, parts: int) -> Forms:
        """Those of a stack, whose experts are the first dimension of what is shared.

        parts: that an expert is stored in, one over the other.
        """
        raise NotImplementedError

    def load_matrix(self, layer: FrozenLinear, stored: StoredParts, name: str) -> None:
        """Take the weight, called `name`, of a checkpoint, or a tensor that was drawn.

        It may be a collective call.
        """
        raise NotImplementedError

    def load_stack(self, stack: ExpertStack, weight: Stored, first: int) -> None:
        """Take the experts of a dense or stored stack, of which this one's begin at `first`.

        A rank takes those that it holds. Where ranks share the stack it is a collective call.
        """
        raise NotImplementedError

    # ---- values

    @abstractmethod
    def decode(self, weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
        """The dense matrix."""

    def decode_experts(self, stack: FrozenStack, experts: slice, dtype: torch.dtype) -> Tensor:
        """The dense matrices of some experts: [experts, *stack.matrix]."""
        raise NotImplementedError

    def is_dense(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> bool:
        """Tell whether the weight is there in this dtype, so that `decode` takes no memory."""
        return False

    # ---- products

    def quantize_input(self, x: Tensor) -> list[Tensor]:
        """Return the tensors that `forward_matmul` needs of x beside x itself.

        Plain tensor code: the compiler fuses it into x's producer.
        """
        return []

    def quantize_gradients(
        self, weights: Sequence[FrozenWeight], dys: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the tensors that `backward_matmul` needs beside `dys` and `weights`, as above."""
        return []

    def few_rows_matmul(self, weight: FrozenWeight, x: Tensor) -> Tensor | None:
        """x W^T for so few rows as decoding has, by a kernel of their own, without a backward.

        None where there is no such kernel.
        """
        return None

    def forward_matmul(
        self, weight: FrozenWeight, x: Tensor, quantized: Sequence[Tensor], update: Update
    ) -> Tensor:
        """x W^T + (x A^T) B^T: a new [n, out].

        Args:
            x: [n, in].
            quantized: `quantize_input(x)`.
            update: x A^T [n, rank] and B [out, rank] in the dtype of x, or None for x W^T alone.
        """
        dense = weight.dense(x.dtype)
        if update is None:
            return F.linear(x, dense)
        xa, b = update
        # The small product first: `addmm` adds x W^T onto it in its epilogue, so y is written once.
        return (xa @ b.T).addmm_(x, dense.T)

    def backward_matmul(
        self,
        weights: Sequence[FrozenWeight],
        dys: Sequence[Tensor],
        quantized: Sequence[Tensor],
        update: Update,
    ) -> Tensor:
        """The sum of dy_i W_i, plus d_xa A: a new [n, in].

        Args:
            weights: of the layers of one input.
            dys: [n, out_i] each.
            quantized: `quantize_gradients(weights, dys)`.
            update: d_xa [n, rank] and A^T [in, rank], or None.
        """
        dx = None
        if update is not None:
            d_xa, a_transposed = update
            # [n, rank] times [rank, in].
            dx = d_xa @ a_transposed.T
        # Each product is added to the same dx: one tensor [n, in] for all layers.
        for weight, dy in zip(weights, dys, strict=True):
            dense = weight.dense(dy.dtype)
            dx = dy @ dense if dx is None else dx.addmm_(dy, dense)
        assert dx is not None
        return dx


class FrozenWeight(NamedTuple):
    """A weight W that gets no gradient, as the products take it.

    Attributes:
        tensors: those of `format.matrix_forms`.
        shape: (out_features, in_features).
    """

    format: Format
    tensors: Sequence[Tensor]
    shape: tuple[int, int]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W, [out, in]."""
        return self.format.decode(self, dtype)


class FrozenStack(NamedTuple):
    """The weights of all experts of a layer, which get no gradient, as the products take them.

    Attributes:
        tensors: those of `format.stack_forms`.
        shape: (experts, in_features, out_features).
        is_transposed: the matrices of experts are stored as [in, out], not [out, in].
        is_compiled: the compiler runs, and may make a kernel of its own for `dense`.
    """

    format: Format
    tensors: Sequence[Tensor]
    shape: tuple[int, int, int]
    is_transposed: bool = False
    is_compiled: bool = False

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of an expert, as it is stored."""
        _, in_features, out_features = self.shape
        return (in_features, out_features) if self.is_transposed else (out_features, in_features)

    def experts_at_once(self, dtype: torch.dtype) -> int:
        """So many experts are at most DENSE_BYTES when dense; one, if it is larger."""
        experts = self.shape[0]
        if self.format.is_dense(self.tensors, dtype):
            return experts
        of_expert = math.prod(self.matrix) * dtype.itemsize
        return min(experts, max(1, DENSE_BYTES // of_expert))

    def dense(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """The experts from `first` to before `last`: [last - first, in, out], y = x W.

        A view where it is stored so, and transposed where it is stored as [experts, out, in].
        """
        dense = self.format.decode_experts(self, slice(first, last), dtype)
        return dense if self.is_transposed else dense.mT
