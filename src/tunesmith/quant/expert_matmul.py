"""Rows sorted by expert, times the frozen weights of the experts, with a LoRA update of each.

    y = x W_e + (x A_e^T) B_e        for the rows of expert e

The backward makes no gradient of W and saves nothing dense. A GPU multiplies all experts by
`grouped_mm`, which reads the edges between experts on the device. A CPU takes one expert after the
other: equally fast, for every dtype, and a quantized stack is dense for one expert at a time. In 16
bits it takes their rows in blocks of few sizes, as each new size costs (see `_blocks`).

A stack in codes that is large when dense (see `frozen_stack.DENSE_BYTES`) is multiplied by groups
of experts on a GPU too. A group's product takes the rows between two edges, and no kernel of torch
begins at a row that only the device knows: rows before it would have to be copied, or multiplied
with zeros. So the host reads the edges, once a layer and forward. It waits for the router then, and
the products that follow take milliseconds each: the GPU has work again before long.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.quant.frozen_stack import FrozenStack, frozen_stack

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
        update = None
        lora: tuple[Tensor, ...] = ()
        if lora_A is not None and lora_B is not None:
            xa = multiply_by_expert(x, lora_A.mT, rows)
            update = multiply_by_expert(xa, lora_B, rows)
            lora = (x, xa, lora_A, lora_B)
        ctx.lora_count = len(lora)
        ctx.save_for_backward(*lora, *tensors)
        return _add_products(update, x, stack, rows, backward=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        dy = grads[0].contiguous()  # of a sum's gradient all rows are one, which no product takes
        rows = ctx.rows
        saved = ctx.saved_tensors  # read once: a recomputed layer unpacks them once
        lora = saved[: ctx.lora_count]
        tensors = saved[ctx.lora_count :]
        update = None
        d_lora_A = None
        d_lora_B = None
        if lora:
            x, xa, lora_A, lora_B = lora
            d_xa = multiply_by_expert(dy, lora_B.mT, rows)
            d_lora_A = _products_of_columns(d_xa, x, rows)
            d_lora_B = _products_of_columns(xa, dy, rows)
            update = multiply_by_expert(d_xa, lora_A, rows)
        dx = None
        if ctx.needs_input_grad[0]:
            stack = frozen_stack(ctx.encoding, tensors, ctx.shape)
            dx = _add_products(update, dy, stack, rows, backward=True)
        return (dx, d_lora_A, d_lora_B, None, None, None, *[None] * len(tensors))


def multiply_by_expert(x: Tensor, weights: Tensor, rows: ExpertRows) -> Tensor:
    """x [rows, in] times the weight [in, out] of each row's expert: a new [rows, out]."""
    if x.is_meta:
        return x.new_empty(len(x), weights.shape[2])
    if rows.spans is None:
        return F.grouped_mm(x, weights, offs=rows.offsets)
    y = x.new_empty(len(x), weights.shape[2])
    for expert, first, end in rows.spans:
        _multiply_rows(x[first:end], weights[expert], y[first:end], step=LORA_STEP, adds=False)
    return y


def _add_products(
    y: Tensor | None, x: Tensor, stack: FrozenStack, rows: ExpertRows, *, backward: bool
) -> Tensor:
    """x W_e, or x W_e^T if `backward`, added to y if there is one, which is then overwritten."""
    _, width, out_width = stack.shape
    if backward:
        out_width = width
    if x.is_meta:
        return x.new_empty(len(x), out_width)
    if rows.spans is None:
        return _add_grouped(y, x, stack, rows, backward=backward)
    product = x.new_empty(len(x), out_width) if y is None else y
    for expert, first, end in rows.spans:
        weight = stack.dense(expert, expert + 1, x.dtype)[0]
        if backward:
            weight = weight.T
        part = product[first:end]
        _multiply_rows(x[first:end], weight, part, step=FROZEN_STEP, adds=y is not None)
    return product


def _multiply_rows(x: Tensor, weight: Tensor, y: Tensor, *, step: int, adds: bool) -> None:
    """Write x W into y, or add it if `adds`: an expert's rows, on a CPU."""
    for block, missing in _blocks(len(x), x.dtype, step):
        rows = _with_empty_rows(x[block], missing)
        part = y[block]
        if missing:
            part = _with_empty_rows(part, missing) if adds else y.new_empty(len(rows), y.shape[1])
        if adds:
            part.addmm_(rows, weight)
        else:
            torch.mm(rows, weight, out=part)
        if missing:
            y[block] = part[: len(part) - missing]


def _blocks(rows: int, dtype: torch.dtype, step: int) -> Iterator[tuple[slice, int]]:
    """The rows of an expert in blocks, each with how many empty rows make it a full one.

    In 16 bits oneDNN compiles a kernel for each number of rows, which takes as long as a product
    with W and eight times as long as one with A; of the kernels it keeps few (see
    `runtime/host.py`). So there are few sizes: multiples of `step`, and powers of two below it.
    """
    if dtype.itemsize != 2:
        yield slice(0, rows), 0
        return
    for first in range(0, rows, BLOCK_ROWS):
        count = min(BLOCK_ROWS, rows - first)
        full = -(-count // step) * step
        if count < step:
            full = 1 << (count - 1).bit_length()
        yield slice(first, first + count), full - count


def _add_grouped(
    y: Tensor | None, x: Tensor, stack: FrozenStack, rows: ExpertRows, *, backward: bool
) -> Tensor:
    """As `_add_products`, by one kernel for all experts, or for each group of them."""
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
    """left^T right over the rows of each expert: [experts, left's width, right's width]."""
    experts = len(rows.offsets)
    shape = (experts, left.shape[1], right.shape[1])
    if left.is_meta:
        return left.new_empty(shape)
    if rows.spans is None:
        return F.grouped_mm(left.T, right, offs=rows.offsets)
    # Of an expert without rows it is 0. Blocks add up in fp32.
    products = left.new_zeros(shape, dtype=torch.promote_types(left.dtype, torch.float32))
    for expert, first, end in rows.spans:
        left_rows = left[first:end]
        right_rows = right[first:end]
        for block, missing in _blocks(end - first, left.dtype, LORA_STEP):
            columns = _with_empty_rows(left_rows[block], missing).T
            products[expert] += columns @ _with_empty_rows(right_rows[block], missing)
    return products.to(left.dtype)


def _with_empty_rows(x: Tensor, missing: int) -> Tensor:
    return F.pad(x, (0, 0, 0, missing)) if missing else x
