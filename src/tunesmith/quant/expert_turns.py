"""The rows of each expert times its weights, one expert after the other.

So on a CPU, for every dtype, and on GPUs for which torch has no kernel for all experts. An expert's
rows come from memory once a turn, as they are gathered, and are in the cache for the products that
follow; a quantized stack is dense for some experts at a time. On a CPU in 16 bits rows come in
blocks of few sizes, as each new size costs (see `_blocks`).
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.quant.expert_rows import RowIndex
from tunesmith.quant.frozen_stack import FrozenStack
from tunesmith.units import ceil_div

# Rows of a block of a product on a CPU in 16 bits: at most so many, and a multiple of the others.
BLOCK_ROWS = 256
# Of frozen weights, where empty rows cost most, and of A and B, where new sizes do.
FROZEN_STEP = 32
LORA_STEP = 128


class Product(NamedTuple):
    """Rows times the frozen weight of their expert, and the two factors of its update.

    Attributes:
        x: [rows, in]; the gradients [rows, out] if it `is_backward`, which exchanges `in` and
            `out`. If it `gathers`, those of the tokens.
        factors: [experts, in, rank] and [experts, rank, out]; None: there is no update.
        stack: W [experts, in, out], which is transposed if it `is_backward`; None: only the first
            factor is multiplied.
    """

    x: Tensor
    factors: tuple[Tensor, Tensor] | None
    stack: FrozenStack | None
    row_index: RowIndex
    is_backward: bool
    gathers: bool

    def empty_results(self) -> tuple[Tensor | None, Tensor | None]:
        """Room for x times the first factor, and x W: [rows, ...]; None for what there is not."""
        count = len(self.row_index.tokens)
        low = None
        y = None
        if self.factors is not None:
            low = self.x.new_empty(count, self.factors[0].shape[2])
        if self.stack is not None:
            y = self.x.new_empty(count, self.stack.shape[1 if self.is_backward else 2])
        return low, y


class FactorGradients:
    """The gradients of A and B, from the gradients dy of the rows and d_xa = dy B^T.

    d_A = d_xa^T x  [experts, rank, in],  d_B = xa^T dy  [experts, rank, out]

    Attributes:
        x, xa: of the forward; x are tokens if it `gathers`.
        tokens: of the rows, if it `gathers`.
    """

    def __init__(self, x: Tensor, xa: Tensor, row_index: RowIndex, *, gathers: bool) -> None:
        self.x = x
        self.xa = xa
        self.row_index = row_index
        self.tokens = row_index.tokens if gathers else None

    def allocate(self, dy: Tensor) -> None:
        """Zeros: what an expert without rows has."""
        experts = len(self.row_index.offsets)
        rank = self.xa.shape[1]
        # Blocks add up in fp32.
        dtype = torch.float32 if comes_in_blocks(dy) else dy.dtype
        self.d_A = dy.new_zeros(experts, rank, self.x.shape[1], dtype=dtype)
        self.d_B = dy.new_zeros(experts, rank, dy.shape[1], dtype=dtype)

    def add_block(self, expert: int, start: int, end: int, dy: Tensor, d_xa: Tensor) -> None:
        """Those of the rows from `start` on; rows from `end` on, of other experts, count as 0."""
        count = len(dy)
        of_expert = min(count, end - start)
        x = _rows(self.x, start, count, self.tokens)
        xa = _rows(self.xa[:end], start, count)
        if of_expert < count:
            d_xa = F.pad(d_xa[:of_expert], (0, 0, 0, count - of_expert))
        self.d_A[expert].add_(d_xa.T @ x)
        self.d_B[expert].add_(xa.T @ dy)

    def compute_at_once(self, dy: Tensor, d_xa: Tensor) -> None:
        """Those of all experts, by one kernel."""
        x = self.x
        if self.tokens is not None:
            x = x.index_select(0, self.tokens)
        self.d_A = F.grouped_mm(d_xa.T, x, offs=self.row_index.offsets)
        self.d_B = F.grouped_mm(self.xa.T, dy, offs=self.row_index.offsets)

    def results(self, dtype: torch.dtype) -> list[Tensor]:
        return [self.d_A.to(dtype), self.d_B.to(dtype)]


def multiply_in_turns(
    product: Product, gradients: FactorGradients | None
) -> tuple[Tensor | None, Tensor | None]:
    """x times the first factor, and x W with that times the second.

    Args:
        gradients: of the factors, to be computed beside.
    """
    low, y = product.empty_results()
    if gradients is not None:
        gradients.allocate(product.x)
    if comes_in_blocks(product.x):
        _multiply_in_blocks(product, low, y, gradients)
    else:
        _multiply_experts(product, low, y, gradients)
    return low, y


def _multiply_experts(
    product: Product, low: Tensor | None, y: Tensor | None, gradients: FactorGradients | None
) -> None:
    """Write `low` and `y`, and the gradients, all rows of an expert at a time."""
    counts = _rows_by_expert(product.row_index)
    # All are cut at once: a slice takes as long as a small product takes to start.
    x_parts = _Parts(product.x, counts, product.row_index.tokens if product.gathers else None)
    low_parts = low.split(counts) if low is not None else ()
    y_parts = y.split(counts) if y is not None else ()
    first_factors: Sequence[Tensor] = ()
    second_factors: Sequence[Tensor] = ()
    if product.factors is not None:
        first_factors, second_factors = (factor.unbind() for factor in product.factors)
    if gradients is not None:
        forward_parts = _Parts(gradients.x, counts, gradients.tokens)
        xa_parts = gradients.xa.split(counts)
        d_A = gradients.d_A.unbind()
        d_B = gradients.d_B.unbind()
    for expert, weight in _dense_weights(product, counts):
        x = x_parts[expert]
        if low is not None:
            torch.mm(x, first_factors[expert], out=low_parts[expert])
        if gradients is not None:
            torch.mm(low_parts[expert].T, forward_parts[expert], out=d_A[expert])
            torch.mm(xa_parts[expert].T, x, out=d_B[expert])
        if weight is None:
            continue
        if low is None:
            torch.mm(x, weight, out=y_parts[expert])
        else:
            torch.mm(low_parts[expert], second_factors[expert], out=y_parts[expert])
            y_parts[expert].addmm_(x, weight)
        del weight  # those of the next experts would be there beside it


class _Parts:
    """The rows of each expert in x, or of the tokens that its rows are copies of."""

    def __init__(self, x: Tensor, counts: Sequence[int], tokens: Tensor | None) -> None:
        self.x = x
        self.is_gathered = tokens is not None
        self.parts = (x if tokens is None else tokens).split(counts)

    def __getitem__(self, expert: int) -> Tensor:
        part = self.parts[expert]
        return self.x.index_select(0, part) if self.is_gathered else part


def _rows_by_expert(row_index: RowIndex) -> list[int]:
    """How many rows each expert has; the last number is of those that are no expert's here."""
    counts = []
    first = 0
    for end in row_index.ends_on_host():
        counts.append(end - first)
        first = end
    return [*counts, row_index.tokens.shape[0] - first]


def _dense_weights(product: Product, counts: Sequence[int]) -> Iterator[tuple[int, Tensor | None]]:
    """Each expert that has rows, and its dense weight, transposed in a backward.

    A GPU makes some experts dense at a time, as that may take several kernels.
    """
    stack = product.stack
    step = 1
    if stack is not None and not is_cpu(product.x):
        step = stack.experts_at_once(product.x.dtype)
    weights = None
    dense_from = 0
    dense_to = 0
    for expert in range(len(counts) - 1):
        if not counts[expert]:
            continue
        if stack is None:
            yield expert, None
            continue
        if expert >= dense_to:
            weights = None  # before others are there beside them
            dense_from = expert - expert % step
            dense_to = min(dense_from + step, stack.shape[0])
            weights = stack.dense(dense_from, dense_to, product.x.dtype)
        assert weights is not None
        weight = weights[expert - dense_from]
        yield expert, weight.T if product.is_backward else weight
        del weight


# ---- blocks


def _multiply_in_blocks(
    product: Product, low: Tensor | None, y: Tensor | None, gradients: FactorGradients | None
) -> None:
    """`_multiply_experts` in blocks of rows.

    A block may reach into the rows of the experts behind its own. These are written after it.
    """
    counts = _rows_by_expert(product.row_index)
    ends = product.row_index.ends_on_host()
    tokens = product.row_index.tokens if product.gathers else None
    row_count = len(product.row_index.tokens)
    for expert, weight in _dense_weights(product, counts):
        end = ends[expert]
        first = end - counts[expert]
        weights: list[Tensor] = []
        if product.factors is not None:
            weights = [factor[expert] for factor in product.factors]
        if weight is not None:
            weights.append(weight)
        for block in _blocks(end - first):
            start = first + block.start
            x_part = _rows(product.x, start, block.lora_rows, tokens)
            low_part = _part(low, start, block.lora_rows)
            y_part = _part(y, start, block.lora_rows)
            _multiply_block(x_part, low_part, y_part, weights, block)
            if start + block.lora_rows > row_count:
                for whole, part in ((low, low_part), (y, y_part)):
                    if whole is not None and part is not None:
                        whole[start:end] = part[: end - start]
            if gradients is not None:
                assert low_part is not None  # there are factors
                gradients.add_block(expert, start, end, x_part, low_part)
        del weight, weights  # those of the next expert would be there beside them


def _part(x: Tensor | None, first: int, count: int) -> Tensor | None:
    """Rows of x to write; new ones where x ends before."""
    if x is None:
        return None
    part = x[first : first + count]
    return part if len(part) == count else x.new_empty(count, x.shape[1])


class _Block(NamedTuple):
    """Rows of an expert that are multiplied at a time.

    Attributes:
        start: of its first row, among those of the expert.
        frozen_rows, lora_rows: so many are multiplied with W, and with A and B; the latter are not
            fewer, and both may be more than there are.
    """

    start: int
    frozen_rows: int
    lora_rows: int


def is_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def comes_in_blocks(x: Tensor) -> bool:
    """Whether an expert's rows are multiplied in blocks of few sizes."""
    return is_cpu(x) and x.dtype.itemsize == 2


@lru_cache(maxsize=1024)
def _blocks(rows: int) -> tuple[_Block, ...]:
    """The blocks of an expert's rows.

    On a CPU in 16 bits oneDNN compiles a kernel for each number of rows, which takes as long as a
    product with W and eight times as long as one with A; of the kernels it keeps few (see
    `runtime/host.py`). So there are few sizes: multiples of a step, and powers of two below it.
    """
    blocks = []
    for start in range(0, rows, BLOCK_ROWS):
        count = min(BLOCK_ROWS, rows - start)
        blocks.append(_Block(start, _round_up(count, FROZEN_STEP), _round_up(count, LORA_STEP)))
    return tuple(blocks)


def _round_up(count: int, step: int) -> int:
    if count < step:
        return 1 << (count - 1).bit_length()
    return ceil_div(count, step) * step


def _multiply_block(
    x: Tensor, low: Tensor | None, y: Tensor | None, weights: Sequence[Tensor], block: _Block
) -> None:
    """Write a block's rows of `low` and `y`.

    weights: both factors, where there is `low`, then W, where there is `y`.
    """
    if low is not None:
        torch.mm(x, weights[0], out=low)
    if y is None:
        return
    frozen = slice(block.frozen_rows)
    if low is None:
        torch.mm(x[frozen], weights[-1], out=y[frozen])
    else:
        torch.mm(low, weights[1], out=y)
        y[frozen].addmm_(x[frozen], weights[-1])


def _rows(x: Tensor, first: int, count: int, tokens: Tensor | None = None) -> Tensor:
    """Rows of x, or those of `tokens`; behind the last one they are 0."""
    if tokens is None:
        rows = x[first : first + count]
    else:
        rows = x.index_select(0, tokens[first : first + count])
    missing = count - len(rows)
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows
