"""The products of a stack with the rows of all experts at once, where torch has kernels for them.

    y = x W_e + (x A_e^T) B_e

The products with a stack are `grouped_mm`. Those with A and B do little with many bytes: each reads
or writes all rows. On the side of the tokens, whose rows are copies of one token's or are added up
to one, dense products of the tokens take their place:

    x A_e^T          the columns of e in x A^T, with A [experts * rank, in] those of all experts
    sum_e xa_e B_e   spread xa times B [experts * rank, out]: spread xa is [n, experts * rank], and
                     zero where an expert has no row of a token

They make experts / k times as many operations of k times fewer rows. For Qwen3-30B-A3B and rank 8
the operations take an H200 0.1 ms; products of rows took it 0.23 to 0.58 (profiled).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from tunesmith.formats.base import FrozenStack
from tunesmith.quant.expert_rows import RowIndex, add_low, sum_of_rows, take_rows

# Columns of a dense product for each expert of a token: with more its operations take longer than
# the bytes of the rows do.
DENSE_COLUMNS = 256


class AtOnce(NamedTuple):
    """The products of a stack with the rows of some tokens; the arguments of `expert_matmul`."""

    stack: FrozenStack
    row_index: RowIndex
    gathers: bool
    sums: bool

    def forward(self, x: Tensor, lora: Sequence[Tensor]) -> list[Tensor]:
        """The output, and x A^T [rows, rank] where there is an update (`lora` is [A, B])."""
        index = self.row_index
        rows = take_rows(x, index.tokens) if self.gathers else x
        if not lora:
            y = _multiply(rows, self.stack, index)
            return [sum_of_rows(y, index.places) if self.sums else y]
        inputs, outputs = self._sides(lora)
        xa = inputs.reduce(x, rows)
        return [outputs.expand(xa, _multiply(rows, self.stack, index)), xa]

    def backward(
        self, dy: Tensor, saved: Sequence[Tensor], lora: Sequence[Tensor], needs_dx: bool
    ) -> list[Tensor]:
        """The gradients of x (empty unless `needs_dx`) and of `lora`; saved: x and x A^T."""
        index = self.row_index
        rows = take_rows(dy, index.tokens) if self.sums else dy
        dx = dy.new_empty(0)
        if needs_dx:
            dx = _multiply(rows, self.stack, index, backward=True)
        if not lora:
            return [sum_of_rows(dx, index.places) if needs_dx and self.gathers else dx]
        x, xa = saved
        inputs, outputs = self._sides(lora)
        d_xa = outputs.reduce(dy, rows)
        d_lora = [inputs.gradient(d_xa, x), outputs.gradient(xa, dy)]
        return [inputs.expand(d_xa, dx) if needs_dx else dx, *d_lora]

    def _sides(self, lora: Sequence[Tensor]) -> "tuple[Side, Side]":
        lora_A, lora_B = lora
        index = self.row_index
        slots = index.slots()
        return Side(index, slots, lora_A, self.gathers), Side(index, slots, lora_B, self.sums)


class Side(NamedTuple):
    """The inputs or the outputs of a stack, and the factor of its update on that side.

    Attributes:
        row_index: the rows of the experts; slots: its `slots`, for both sides.
        factors: N [experts, rank, width]: A of the inputs, B of the outputs.
        of_tokens: inputs are gathered from tokens [n, width], outputs are added up to them.
    """

    row_index: RowIndex
    slots: Tensor
    factors: Tensor
    of_tokens: bool

    @property
    def is_dense(self) -> bool:
        """Tell whether products of the tokens take the place of those of their rows."""
        experts, rank, _ = self.factors.shape
        return self.of_tokens and experts * rank <= DENSE_COLUMNS * self.row_index.places.shape[1]

    def reduce(self, x: Tensor, rows: Tensor) -> Tensor:
        """x N_e^T of each row: [rows, rank]. x: as it is outside; rows: its rows."""
        if not self.is_dense:
            return F.grouped_mm(rows, self.factors.mT, offs=self.row_index.offsets)
        of_all = x @ self.factors.flatten(0, 1).T
        return of_all.view(-1, self.factors.shape[1]).index_select(0, self.slots)

    def expand(self, low: Tensor, rows: Tensor) -> Tensor:
        """The rows [rows, width], which may be overwritten, and low N_e: as outside."""
        if not self.is_dense:
            add_low(rows, low, self.factors, self.row_index.offsets)
        total = sum_of_rows(rows, self.row_index.places) if self.of_tokens else rows
        if self.is_dense:
            total.addmm_(self._spread(low), self.factors.flatten(0, 1))
        return total

    def gradient(self, low: Tensor, x: Tensor) -> Tensor:
        """low^T x of each expert, the gradient of N: [experts, rank, width]; x: as outside."""
        if self.is_dense:
            return (self._spread(low).T @ x).view_as(self.factors)
        rows = take_rows(x, self.row_index.tokens) if self.of_tokens else x
        return F.grouped_mm(low.T, rows, offs=self.row_index.offsets)

    def _spread(self, low: Tensor) -> Tensor:
        """Low of the rows [rows, rank], by token: [n, experts * rank]."""
        experts, rank, _ = self.factors.shape
        tokens = len(self.row_index.places)
        spread = low.new_zeros(tokens * experts, rank)
        # Added: a router might choose an expert twice. Else a place has one row, and one order.
        return spread.index_add_(0, self.slots, low).view(tokens, -1)


def _multiply(x: Tensor, stack: FrozenStack, index: RowIndex, *, backward: bool = False) -> Tensor:
    """x W_e, or x W_e^T if `backward`: by one kernel for all experts, or for each group of them."""
    experts, width, out_width = stack.shape
    step = stack.experts_at_once(x.dtype)
    if index.ends is None or step == experts:
        weights = stack.dense(0, experts, x.dtype)
        return F.grouped_mm(x, weights.mT if backward else weights, offs=index.offsets)
    y = x.new_zeros(len(x), width if backward else out_width)
    ends = index.ends_on_host()
    first_row = 0
    for first in range(0, experts, step):
        last = min(first + step, experts)
        end_row = ends[last - 1]
        if end_row > first_row:
            weights = stack.dense(first, last, x.dtype)
            of_group = slice(first_row, end_row)
            y[of_group] = F.grouped_mm(
                x[of_group],
                weights.mT if backward else weights,
                offs=index.offsets[first:last] - first_row,
            )
            del weights  # the next group's would be there beside it
        first_row = end_row
    return y
