"""Rows sorted by expert, times the frozen weights of the experts, with a LoRA update of each.

    y = x W_e + (x A_e^T) B_e        for the rows of expert e

The backward makes no gradient of W and saves nothing dense. A GPU multiplies all experts by
`grouped_mm`, which reads the edges between experts on the device. A CPU takes one expert after the
other: equally fast, for every dtype, and a quantized stack is dense for one expert at a time. In 16
bits their rows come in blocks of few sizes, as each new size costs (see `_blocks`).

A stack in codes that is large when dense (see `frozen_stack.DENSE_BYTES`) is multiplied by groups
of experts on a GPU too. A group's product takes the rows between two edges, and no kernel of torch
begins at a row that only the device knows: rows before it would have to be copied, or multiplied
with zeros. So the host reads the edges, once a layer and forward. It waits for the router then, and
the products that follow take milliseconds each: the GPU has work again before long.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.quant.frozen_stack import FrozenStack, frozen_stack
from tunesmith.units import ceil_div

# Rows of a matrix that `grouped_mm` takes begin at multiples of 16 bytes.
ALIGNMENT = 16
# Rows of a block of a product on a CPU in 16 bits: at most so many, and a multiple of the others.
BLOCK_ROWS = 256
# Of frozen weights, where empty rows cost most, and of A and B, where new sizes do.
FROZEN_STEP = 32
LORA_STEP = 128


class ExpertRows(NamedTuple):
    """Where the rows of each expert are.

    Attributes:
        offsets: int32 [experts], on the device: the end of each expert's rows.
        spans: on the host, (expert, first row, end row) of those that have rows; None where the
            host does not know, so that it need not wait for a GPU.
        ends: `offsets` on the host, where a GPU takes the experts by groups.
    """

    offsets: Tensor
    spans: tuple[tuple[int, int, int], ...] | None
    ends: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls, sorted_experts: Tensor, experts: int, dtype: torch.dtype, *, in_groups: bool = False
    ) -> "ExpertRows":
        """Where rows are, by their experts.

        Args:
            sorted_experts: int64 [rows], the expert of each row, in ascending order.
            in_groups: a stack is dense for some experts at a time.
        """
        device = sorted_experts.device
        numbers = torch.arange(experts, device=device)
        offsets = torch.searchsorted(sorted_experts, numbers, right=True, out_int32=True)
        if device.type == "meta" or uses_grouped_mm(device, dtype):
            has_ends = in_groups and device.type != "meta"
            return cls(offsets, None, tuple(offsets.tolist()) if has_ends else None)
        spans = []
        first = 0
        for expert, end in enumerate(offsets.tolist()):
            if end > first:
                spans.append((expert, first, end))
            first = end
        return cls(offsets, tuple(spans))


def uses_grouped_mm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the products of all experts are one kernel."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16, torch.float32)


def expert_matmul(
    x: Tensor,
    stack: FrozenStack,
    rows: ExpertRows,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
) -> Tensor:
    """y = x W_e + (x A_e^T) B_e; no gradient reaches W.

    Args:
        x: [rows, in], sorted by expert.
        lora_A: [experts, rank, in] in the dtype of x, or None for no update.
        lora_B: [experts, rank, out] in the dtype of x, times the scaling; in this order, as MKL
            multiplies a narrow matrix on the right at an eighth of the speed.

    Returns [rows, out].
    """
    if lora_A is not None and lora_B is not None and rows.spans is None:
        missing = -lora_A.shape[1] % (ALIGNMENT // x.dtype.itemsize)
        if missing:
            lora_A = F.pad(lora_A, (0, 0, 0, missing))
            lora_B = F.pad(lora_B, (0, 0, 0, missing))
    y: Tensor = _ExpertMatmul.apply(
        x, lora_A, lora_B, rows, stack.encoding, stack.shape, *stack.tensors
    )
    return y


class _ExpertMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        rows: ExpertRows,
        encoding: str,
        shape: tuple[int, int, int],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.rows = rows
        ctx.encoding = encoding
        ctx.shape = shape
        stack = frozen_stack(encoding, tensors, shape)
        factors = None
        if lora_A is not None and lora_B is not None:
            factors = lora_A.mT, lora_B
        xa, y = _multiply(x, factors, stack, rows, backward=False)
        assert y is not None  # as there is a stack
        lora = () if xa is None else (x, xa, lora_A, lora_B)
        ctx.lora_count = len(lora)
        ctx.save_for_backward(*lora, *tensors)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        dy = grads[0].contiguous()  # of a sum's gradient all rows are one, which no product takes
        rows = ctx.rows
        saved = ctx.saved_tensors  # read once: a recomputed layer unpacks them once
        lora = saved[: ctx.lora_count]
        tensors = saved[ctx.lora_count :]
        factors = None
        d_lora_A = None
        d_lora_B = None
        if lora:
            x, xa, lora_A, lora_B = lora
            factors = lora_B.mT, lora_A
        stack = None
        if ctx.needs_input_grad[0]:
            stack = frozen_stack(ctx.encoding, tensors, ctx.shape)
        d_xa, dx = _multiply(dy, factors, stack, rows, backward=True)
        if d_xa is not None:
            d_lora_A = _products_of_columns(d_xa, x, rows)
            d_lora_B = _products_of_columns(xa, dy, rows)
        return (dx, d_lora_A, d_lora_B, None, None, None, *[None] * len(tensors))


def _multiply(
    x: Tensor,
    factors: tuple[Tensor, Tensor] | None,
    stack: FrozenStack | None,
    rows: ExpertRows,
    *,
    backward: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Each row times its expert's frozen weight and the two factors of its update.

    Args:
        x: [rows, in]; the gradients [rows, out] if `backward`, which exchanges `in` and `out`.
        factors: [experts, in, rank] and [experts, rank, out]; None: there is no update.
        stack: W [experts, in, out], which is transposed if `backward`; None: the second is not
            needed.

    Returns x times the first factor, and x W with that times the second.
    """
    low = None
    y = None
    if x.is_meta or rows.spans is not None:
        if factors is not None:
            low = x.new_empty(len(x), factors[0].shape[2])
        if stack is not None:
            y = x.new_empty(len(x), stack.shape[1 if backward else 2])
        if rows.spans is not None:
            _multiply_by_expert(x, low, y, factors, stack, rows.spans, backward=backward)
        return low, y
    if factors is not None:
        low = F.grouped_mm(x, factors[0], offs=rows.offsets)
        if stack is not None:
            y = F.grouped_mm(low, factors[1], offs=rows.offsets)
    if stack is not None:
        y = _add_grouped(y, x, stack, rows, backward=backward)
    return low, y


def _multiply_by_expert(
    x: Tensor,
    low: Tensor | None,
    y: Tensor | None,
    factors: tuple[Tensor, Tensor] | None,
    stack: FrozenStack | None,
    spans: tuple[tuple[int, int, int], ...],
    *,
    backward: bool,
) -> None:
    """What `_multiply` returns, written into `low` and `y` one expert after the other.

    A block may reach into the rows of the experts behind its own. These are written after it.
    """
    for expert, first, end in spans:
        weights: list[Tensor] = []
        if factors is not None:
            weights = [factor[expert] for factor in factors]
        if stack is not None:
            weight = stack.dense(expert, expert + 1, x.dtype)[0]
            weights.append(weight.T if backward else weight)
        for block in _blocks(end - first, x.dtype.itemsize):
            start = first + block.start
            count = block.lora_rows
            low_part = _part(low, start, count)
            y_part = _part(y, start, count)
            _multiply_block(_rows(x, start, count), low_part, y_part, weights, block)
            if start + count <= len(x):
                continue
            for whole, part in ((low, low_part), (y, y_part)):
                if whole is not None and part is not None:
                    whole[start:end] = part[: end - start]


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


@lru_cache(maxsize=1024)
def _blocks(rows: int, itemsize: int) -> tuple[_Block, ...]:
    """The blocks of an expert's rows, in a dtype of so many bytes.

    In 16 bits oneDNN compiles a kernel for each number of rows, which takes as long as a product
    with W and eight times as long as one with A; of the kernels it keeps few (see
    `runtime/host.py`). So there are few sizes: multiples of a step, and powers of two below it.
    """
    if itemsize != 2:
        return (_Block(0, rows, rows),)
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


def _add_grouped(
    y: Tensor | None, x: Tensor, stack: FrozenStack, rows: ExpertRows, *, backward: bool
) -> Tensor:
    """x W_e, or x W_e^T if `backward`, added to y if there is one, which may be overwritten.

    By one kernel for all experts, or for each group of them.
    """
    experts, width, out_width = stack.shape
    step = stack.experts_at_once(x.dtype)
    if rows.ends is None or step == experts:
        weights = stack.dense(0, experts, x.dtype)
        product = F.grouped_mm(x, weights.mT if backward else weights, offs=rows.offsets)
        return product if y is None else product.add_(y)
    if y is None:
        y = x.new_zeros(len(x), width if backward else out_width)
    first_row = 0
    for first in range(0, experts, step):
        last = min(first + step, experts)
        end_row = rows.ends[last - 1]
        if end_row > first_row:
            weights = stack.dense(first, last, x.dtype)
            offsets = rows.offsets[first:last] - first_row
            of_group = slice(first_row, end_row)
            y[of_group] += F.grouped_mm(
                x[of_group], weights.mT if backward else weights, offs=offsets
            )
            del weights  # the next group's would be there beside it
        first_row = end_row
    return y


def _products_of_columns(left: Tensor, right: Tensor, rows: ExpertRows) -> Tensor:
    """left^T right over the rows of each expert: [experts, left's width, right's width].

    left: the narrow one, of width rank.
    """
    experts = len(rows.offsets)
    shape = (experts, left.shape[1], right.shape[1])
    if left.is_meta:
        return left.new_empty(shape)
    if rows.spans is None:
        return F.grouped_mm(left.T, right, offs=rows.offsets)
    # Of an expert without rows it is 0. Blocks add up in fp32.
    products = left.new_zeros(shape, dtype=torch.promote_types(left.dtype, torch.float32))
    for expert, first, end in rows.spans:
        for block in _blocks(end - first, left.dtype.itemsize):
            start = first + block.start
            # The rows of other experts count as 0.
            columns = _rows(left[:end], start, block.lora_rows).T
            products[expert].add_(columns @ _rows(right, start, block.lora_rows))
    return products.to(left.dtype)


def _rows(x: Tensor, first: int, count: int) -> Tensor:
    """Some rows of x; those behind its last one are 0."""
    rows = x[first : first + count]
    missing = count - len(rows)
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows
