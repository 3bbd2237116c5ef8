"""Matmuls of all experts of a stack in one kernel, on GPUs for which torch has such a kernel.

    y = x W_e + (x A_e^T) B_e

The matmuls with the stack use `grouped_mm`. The matmuls with A and B have few operations, but each
reads or writes all rows. If the rows are copies of tokens or are summed per token, dense matmuls of
the tokens replace them:

- x A_e^T is computed as x A^T, where A [experts * rank, in] has the factors of all experts. Each
  row takes the columns of its expert e.
- The sum of xa_e B_e over the experts of a token is computed as S B, where B is [experts * rank,
  out]. S [n, experts * rank] from `_spread` has xa_e in the columns of e, or zeros if the token is
  not routed to e.

This needs experts / k times as many operations for k times fewer rows. For Qwen3-30B-A3B with rank
8 on an H200, the dense matmuls take 0.1 ms and the matmuls of rows 0.23 to 0.58 ms (profiled).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from tunesmith.formats.base import FrozenStack
from tunesmith.quant.expert_rows import RowIndex, add_low, sum_of_rows, take_rows

# Maximum number of columns of a dense matmul, divided by the number of experts per token. With more
# columns, the dense matmul takes longer than reading and writing the rows.
DENSE_COLUMNS = 256


class GroupedProducts(NamedTuple):
    """Matmuls of token rows with a stack of experts. The fields are the arguments of
    `expert_matmul`.
    """

    stack: FrozenStack
    row_index: RowIndex
    gathers: bool
    sums: bool

    def forward(self, x: Tensor, lora: Sequence[Tensor]) -> list[Tensor]:
        """Return the output, and x A^T [rows, rank] if there is an adapter (`lora` is [A, B])."""
        index = self.row_index
        rows = x
        if self.gathers:
            rows = take_rows(x, index.tokens)
        if not lora:
            y = _multiply(rows, self.stack, index)
            if self.sums:
                y = sum_of_rows(y, index.places)
            return [y]
        inputs, outputs = self._sides(lora)
        xa = inputs.reduce(x, rows)
        y = _multiply(rows, self.stack, index)
        return [outputs.expand(xa, y), xa]

    def backward(
        self, dy: Tensor, saved: Sequence[Tensor], lora: Sequence[Tensor], needs_dx: bool
    ) -> list[Tensor]:
        """Return the gradients of x (empty unless `needs_dx`) and `lora`. `saved` is [x, x A^T]."""
        index = self.row_index
        rows = dy
        if self.sums:
            rows = take_rows(dy, index.tokens)
        dx = dy.new_empty(0)
        if needs_dx:
            dx = _multiply(rows, self.stack, index, backward=True)
        if not lora:
            if needs_dx and self.gathers:
                dx = sum_of_rows(dx, index.places)
            return [dx]
        x, xa = saved
        inputs, outputs = self._sides(lora)
        d_xa = outputs.reduce(dy, rows)
        d_lora = [inputs.gradient(d_xa, x), outputs.gradient(xa, dy)]
        if needs_dx:
            dx = inputs.expand(d_xa, dx)
        return [dx, *d_lora]

    def _sides(self, lora: Sequence[Tensor]) -> "tuple[Side, Side]":
        lora_A, lora_B = lora
        index = self.row_index
        slots = index.slots()
        inputs = Side(index, slots, lora_A, self.gathers)
        outputs = Side(index, slots, lora_B, self.sums)
        return inputs, outputs


class Side(NamedTuple):
    """The input side or the output side of a stack, with the adapter's factor for this side.

    Attributes:
        row_index: the rows of the experts.
        slots: the result of `row_index.slots`.
        factors: N [experts, rank, width], which is A for the inputs and B for the outputs.
        per_token: whether this side has tokens [n, width] instead of rows: inputs are gathered from
            tokens, and outputs are summed per token.
    """

    row_index: RowIndex
    slots: Tensor
    factors: Tensor
    per_token: bool

    @property
    def is_dense(self) -> bool:
        """Return whether dense matmuls of the tokens replace the matmuls of the rows."""
        experts, rank, _ = self.factors.shape
        return self.per_token and experts * rank <= DENSE_COLUMNS * self.row_index.places.shape[1]

    def reduce(self, x: Tensor, rows: Tensor) -> Tensor:
        """Compute x N_e^T for each row, where e is the expert of the row: [rows, rank].

        Args:
            x: the tensor of this side, which has tokens if `per_token` is set.
            rows: x gathered to one row per copy.
        """
        if not self.is_dense:
            return F.grouped_mm(rows, self.factors.mT, offs=self.row_index.offsets)
        products = x @ self.factors.flatten(0, 1).T
        return products.view(-1, self.factors.shape[1]).index_select(0, self.slots)

    def expand(self, low: Tensor, rows: Tensor) -> Tensor:
        """Add `low N_e` to `rows` [rows, width] and sum the rows of each token. `rows` may be
        overwritten.

        The sum is computed only if `per_token` is set.
        """
        if not self.is_dense:
            add_low(rows, low, self.factors, self.row_index.offsets)
        total = rows
        if self.per_token:
            total = sum_of_rows(rows, self.row_index.places)
        if self.is_dense:
            all_factors = self.factors.flatten(0, 1)
            total.addmm_(self._spread(low), all_factors)
        return total

    def gradient(self, low: Tensor, x: Tensor) -> Tensor:
        """Compute the gradient of the factor N, which is low^T x for each expert: [experts, rank,
        width].
        """
        if self.is_dense:
            return (self._spread(low).T @ x).view_as(self.factors)
        index = self.row_index
        rows = x
        if self.per_token:
            rows = take_rows(x, index.tokens)
        return F.grouped_mm(low.T, rows, offs=index.offsets)

    def _spread(self, low: Tensor) -> Tensor:
        """Arrange the rows of low [rows, rank] by token and expert: [n, experts * rank]."""
        experts, rank, _ = self.factors.shape
        tokens = len(self.row_index.places)
        spread = low.new_zeros(tokens * experts, rank)
        # Use index_add_, because a router could select an expert twice for a token. If it does not,
        # each slot has only one row, so the result is deterministic.
        return spread.index_add_(0, self.slots, low).view(tokens, -1)


def _multiply(x: Tensor, stack: FrozenStack, index: RowIndex, *, backward: bool = False) -> Tensor:
    """Compute x W_e, or x W_e^T if `backward`. One kernel computes all experts, or one group of
    them.
    """
    experts, in_features, out_features = stack.shape
    offsets = index.offsets
    step = stack.experts_per_step(x.dtype)
    if index.ends is None or step == experts:
        weights = stack.dense(0, experts, x.dtype)
        if backward:
            weights = weights.mT
        return F.grouped_mm(x, weights, offs=offsets)
    width = out_features
    if backward:
        width = in_features
    y = x.new_zeros(len(x), width)
    ends = index.ends_on_host()
    first_row = 0
    for first in range(0, experts, step):
        last = min(first + step, experts)
        end_row = ends[last - 1]
        if end_row > first_row:
            weights = stack.dense(first, last, x.dtype)
            if backward:
                weights = weights.mT
            group_rows = slice(first_row, end_row)
            group_offsets = offsets[first:last] - first_row
            y[group_rows] = F.grouped_mm(x[group_rows], weights, offs=group_offsets)
            del weights  # free the memory before the next group
        first_row = end_row
    return y
