"""The interface `Format` for the storage formats of frozen weights. Each format has its own file.

- dense: the weight is not quantized.
- nf4: 4-bit codes and their scales, in bitsandbytes' format (Dettmers et al. 2023,
  arXiv:2305.14314).
- fp8: 8-bit values with one scale per row or one scale per matrix, for 8-bit matmuls.
- fp8-blocks, nvfp4, mxfp4: the tensors of a checkpoint in FP8, NVFP4 or MXFP4.

A format object creates and reads the tensors of a matrix [out, in] or of a stack of experts. The
format object does not hold the tensors: the modules `FrozenLinear` and `ExpertStack` hold them.
`FrozenWeight` and `FrozenStack` pass them to the matmuls.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.distributed.torch_private import collective
from tunesmith.distributed.vocab_parallel import sharding_groups
from tunesmith.formats.stored import Stored, StoredParts

if TYPE_CHECKING:  # these modules import this one
    from tunesmith.formats.linear import FrozenLinear
    from tunesmith.formats.stack import ExpertStack

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max
# Minimum scale, which avoids a division by zero for a row of zeros. It is tiny, because gradients
# that are multiplied by the scales of W can be 1e-12 and smaller.
MIN_SCALE = 1e-30
# Maximum number of quantized weights that are dequantized in one step. The result is fp32, four
# bytes each.
MAX_DECODED_WEIGHTS = 1 << 24
# Maximum size of the experts that are dequantized in one step if one kernel multiplies all experts.
# In 16 bits, a stack of Qwen3-30B-A3B or gpt-oss-20b is smaller than this limit, and a stack of
# gpt-oss-120b has 4 GiB.
DENSE_BYTES = 1 << 30
Update = tuple[Tensor, Tensor] | None  # low-rank update: its two factors


class TensorForm(NamedTuple):
    """Shape and dtype of one tensor of a stored weight.

    Attributes:
        is_shared: whether FSDP shards the tensor. If True, the tensor is a parameter and has values
            for each row or block of the weight. If False, the tensor is a buffer, which is complete
            on every rank.
        read_as: dtype of the values if it differs from the dtype of storage. Some tensors are
            stored as integers because torch and FSDP cannot move them otherwise.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    is_shared: bool = False
    read_as: torch.dtype | None = None


Forms = dict[str, TensorForm]  # tensors of a weight, by their names in a layer


class TensorShard(NamedTuple):
    """The shard of a weight [out, in] on one rank. The weight is split along `dim` into `parts`
    equal parts, and the shard has the index `part`.

    The other shards are on the other ranks of the process group `group`.
    """

    dim: int
    part: int
    parts: int
    group: str

    def shard_of(self, blocks: Tensor, rows: int) -> Tensor:
        """Return this rank's shard of a tensor with one value per block. The result is a view
        [rows, blocks per row].
        """
        # A chunk along dimension 0 has complete rows. A chunk along dimension 1 has some blocks of
        # every row.
        return blocks.view(rows, -1).chunk(self.parts, self.dim)[self.part]


class Format(ABC):
    """A way to store a frozen weight.

    Attributes:
        encoding: name and options as a string, for which `find_format` returns the format. It is
            a string because a `torch.library` operator accepts strings and tensors but no
            objects. Two weights can be multiplied by one operator call if their strings are equal.
        block: number of consecutive weights of a row that share a scale. Their codes must be on the
            same rank.
        rounds: whether loading a dense weight quantizes it, which rounds its values.
        is_output_major: whether an expert's matrix is always stored as [out, in], even if the stack
            of Transformers is [experts, in, out].
    """

    name: ClassVar[str]
    block: int = 1
    rounds: ClassVar[bool] = False
    is_output_major: ClassVar[bool] = False

    def __init__(self, *options: str | float | None) -> None:
        self.encoding = json.dumps([self.name, *options])
        _FORMATS[self.encoding] = self

    # ---- tensors

    @abstractmethod
    def matrix_forms(self, rows: int, columns: int) -> Forms:
        """Return the shape and dtype of each tensor of a matrix. The keys are the names of the
        tensors in a layer.

        The first entry describes the codes of the weight.
        """

    def stack_forms(self, experts: int, rows: int, columns: int, parts: int) -> Forms:
        """Return the shape and dtype of each tensor of a stack. The first dimension of tensors with
        `is_shared` is the expert.

        Args:
            parts: number of parts of an expert's matrix. The rows of the second part follow the
                rows of the first part.
        """
        raise NotImplementedError

    def load_matrix(self, layer: FrozenLinear, stored: StoredParts, name: str) -> None:
        """Load the weight `name` into the layer, from the tensors of a checkpoint or from random
        values.

        This can be a collective call.
        """
        raise NotImplementedError

    def load_stack(self, stack: ExpertStack, weight: Stored, first: int) -> None:
        """Load the experts of a stack from a dense or quantized weight, starting at expert `first`
        of the checkpoint.

        A rank loads only its own experts. This is a collective call if the stack is sharded.
        """
        raise NotImplementedError

    # ---- values

    @abstractmethod
    def decode(self, weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
        """Return the dense matrix."""

    def decode_experts(self, stack: FrozenStack, experts: slice, dtype: torch.dtype) -> Tensor:
        """Return the dense matrices of some experts: [experts, *stack.matrix]."""
        raise NotImplementedError

    # ---- matmuls

    def quantize_input(self, x: Tensor) -> list[Tensor]:
        """Return the tensors that `forward_matmul` needs in addition to x.

        The code uses only plain tensor operations, so that the compiler can fuse them into the
        kernel that computes x.
        """
        return []

    def quantize_gradients(
        self, weights: Sequence[FrozenWeight], dys: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the tensors that `backward_matmul` needs in addition to `dys` and `weights`.

        The code uses only plain tensor operations, for the reason given in `quantize_input`.
        """
        return []

    def few_rows_matmul(self, weight: FrozenWeight, x: Tensor) -> Tensor | None:
        """Compute x W^T for a few rows, as in generation, with a kernel that has no backward.

        Return None if the format has no such kernel.
        """
        return None

    def forward_matmul(
        self, weight: FrozenWeight, x: Tensor, quantized: Sequence[Tensor], update: Update
    ) -> Tensor:
        """Compute x W^T + (x A^T) B^T as a new tensor [n, out].

        Args:
            x: [n, in].
            quantized: `quantize_input(x)`.
            update: x A^T [n, rank] and B [out, rank] in the dtype of x. None means that only x W^T
                is computed.
        """
        dense = weight.dense(x.dtype)
        if update is None:
            return F.linear(x, dense)
        xa, b = update
        # Compute the small product first. `addmm_` adds x W^T to it in its epilogue, so y is
        # written once.
        return (xa @ b.T).addmm_(x, dense.T)

    def backward_matmul(
        self,
        weights: Sequence[FrozenWeight],
        dys: Sequence[Tensor],
        quantized: Sequence[Tensor],
        update: Update,
    ) -> Tensor:
        """Compute the sum of dy_i W_i, plus d_xa A, as a new tensor [n, in].

        Args:
            weights: weights of the layers that have the same input.
            dys: gradients of the outputs, [n, out_i] each.
            quantized: `quantize_gradients(weights, dys)`.
            update: d_xa [n, rank] and A^T [in, rank], or None.
        """
        dx = None
        if update is not None:
            d_xa, a_transposed = update
            # The product of [n, rank] and [rank, in] is [n, in].
            dx = d_xa @ a_transposed.T
        # Add each product to the same dx, so that there is only one tensor [n, in] for all layers.
        for weight, dy in zip(weights, dys, strict=True):
            dense = weight.dense(dy.dtype)
            dx = dy @ dense if dx is None else dx.addmm_(dy, dense)
        assert dx is not None
        return dx


def max_over_ranks(values: Tensor, weight: Tensor) -> Tensor:
    """Return the maximum of the values over the ranks that have shards of a weight.

    Each rank has 0 for the scales of rows that belong to other ranks, so the maximum combines the
    scales of all ranks. This is a collective call if the weight is sharded.
    """
    for group in sharding_groups(weight):
        values = collective("all_reduce", values, "max", group.group_name)
    return values


# The formats of this process by their `encoding`.
_FORMATS: dict[str, Format] = {}


def find_format(encoding: str) -> Format:
    """Return the format object with this encoding."""
    return _FORMATS[encoding]


def row_pieces(first: int, end: int, columns: int, max_weights: int) -> Iterator[slice]:
    """Yield slices of rows with at most `max_weights` weights each, but at least one row."""
    step = max(1, max_weights // columns)
    for start in range(first, end, step):
        yield slice(start, min(start + step, end))


class FrozenWeight(NamedTuple):
    """A frozen weight W in the form in which the matmuls use it.

    Attributes:
        tensors: the tensors of `format.matrix_forms`.
        shape: (out_features, in_features).
    """

    format: Format
    tensors: Sequence[Tensor]
    shape: tuple[int, int]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return W, [out, in]."""
        return self.format.decode(self, dtype)


class FrozenStack(NamedTuple):
    """The frozen weights of all experts of a layer, in the form in which the matmuls use them.

    Attributes:
        tensors: the tensors of `format.stack_forms`.
        shape: (experts, in_features, out_features).
        is_transposed: whether the experts' matrices are stored as [in, out] instead of [out, in].
        is_compiled: whether torch.compile is used, which can generate a kernel for `dense`.
    """

    format: Format
    tensors: Sequence[Tensor]
    shape: tuple[int, int, int]
    is_transposed: bool = False
    is_compiled: bool = False

    @property
    def matrix(self) -> tuple[int, int]:
        """Number of rows and columns of the stored matrix of one expert."""
        _, in_features, out_features = self.shape
        return (in_features, out_features) if self.is_transposed else (out_features, in_features)

    def experts_per_step(self, dtype: torch.dtype) -> int:
        """Return the number of experts that are dequantized in one step, so that their dense
        weights take at most DENSE_BYTES.
        """
        experts = self.shape[0]
        # A dense stack in this dtype needs no copy, so there is no limit. The codes of a quantized
        # stack have another dtype.
        if self.tensors[0].dtype == dtype:
            return experts
        expert_bytes = math.prod(self.matrix) * dtype.itemsize
        return min(experts, max(1, DENSE_BYTES // expert_bytes))

    def dense(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Return the dense weights of the experts from `first` to `last` (exclusive): [last -
        first, in, out], for y = x W.

        The result is a view if the stack is dense. It is transposed if the stack is stored as
        [experts, out, in].
        """
        dense = self.format.decode_experts(self, slice(first, last), dtype)
        return dense if self.is_transposed else dense.mT
