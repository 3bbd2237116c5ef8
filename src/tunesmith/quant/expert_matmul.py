"""Matmuls of tokens with the frozen weights of their experts, with a LoRA update of each expert.

    y = x W_e + (x A_e^T) B_e        for the copies of tokens that are routed to expert e

The copies are rows sorted by expert. A matmul can gather its input rows from the tokens, and can
sum the output rows of each token. Gathering is the transpose of summing. Therefore the backward
gathers if the forward has summed, and vice versa. The backward computes no gradient of W. The
tensors saved for the backward are the tokens instead of their copies. Dequantized weights are not
saved.

Eager mode uses an autograd function. torch.compile uses one opaque operator, inside which the host
can read the row ranges of the experts. A compiled graph cannot read values of device tensors. Both
code paths compute the same.

On GPUs for which torch has a grouped kernel (see `uses_grouped_mm`), all experts are multiplied by
one kernel, and the host does not wait for the row ranges. On all other devices, the experts are
multiplied one by one, as torch's own `grouped_mm` would do. The host then reads the row ranges once
per layer and forward. The rows of an expert are gathered right before their matmuls, so that they
are still in the cache.

A quantized stack of experts whose dequantized weights are large (see `formats.base.DENSE_BYTES`) is
multiplied in groups of experts on every GPU. The matmul of a group needs its first and last row on
the host, because torch has no kernel that reads its first row number from device memory. Waiting
for the router costs little, because each of these matmuls takes milliseconds.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.formats.base import FrozenStack, find_format
from tunesmith.quant import expert_rows
from tunesmith.quant.expert_rows import RowIndex, sum_of_rows
from tunesmith.quant.grouped_experts import GroupedProducts

# `grouped_mm` requires that the rows of a matrix start at multiples of 16 bytes.
ROW_ALIGNMENT_BYTES = 16


def expert_matmul(
    x: Tensor,
    stack: FrozenStack,
    row_index: RowIndex,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    *,
    gathers: bool = False,
    sums: bool = False,
) -> Tensor:
    """Compute y = x W_e + (x A_e^T) B_e for the rows of each expert e. W gets no gradient.

    Args:
        x: [rows, in], sorted by expert. If `gathers` is set, the tokens [n, in].
        lora_A: [experts, rank, in] in the dtype of x, or None if there is no adapter.
        lora_B: [experts, rank, out] in the dtype of x, times the scaling. The dimensions are in
            this order, because MKL is eight times slower with a narrow matrix on the right.
        gathers: whether to gather the input rows from the tokens.
        sums: whether to sum the output rows of each token.

    Returns:
        [rows, out], or [n, out] if `sums` is set.
    """
    lora = []
    if lora_A is not None and lora_B is not None:
        lora = [lora_A, lora_B]
        if expert_rows.uses_grouped_mm(x.device, x.dtype):
            missing = -lora_A.shape[1] % (ROW_ALIGNMENT_BYTES // x.dtype.itemsize)
            if missing:
                lora = [F.pad(factor, (0, 0, 0, missing)) for factor in lora]
    products = ExpertProducts(stack, row_index, gathers, sums)
    y: Tensor
    if torch.compiler.is_compiling():
        y, *_ = expert_products(x, lora, *products.parts())
    else:
        y = _ExpertMatmul.apply(x, products, *lora)
    return y


# ---- the arithmetic. `lora` is [A, B], or empty if there is no adapter


class ExpertProducts(GroupedProducts):
    """Forward and backward of the matmuls of token rows with a stack of experts."""

    def parts(self) -> tuple[list[Tensor], list[Tensor], str, list[int], list[bool]]:
        """Return all fields as types that a torch operator accepts. `of_parts` creates the object
        again.
        """
        stack = self.stack
        flags = [self.gathers, self.sums, stack.is_transposed]
        encoding = stack.format.encoding
        return self.row_index.tensors(), list(stack.tensors), encoding, list(stack.shape), flags

    @classmethod
    def of_parts(
        cls,
        index_tensors: Sequence[Tensor],
        tensors: Sequence[Tensor],
        encoding: str,
        shape: Sequence[int],
        flags: Sequence[bool],
        *,
        is_compiled: bool = False,
    ) -> "ExpertProducts":
        experts, in_features, out_features = shape
        gathers, sums, is_transposed = flags
        sizes = (experts, in_features, out_features)
        stack = FrozenStack(find_format(encoding), tensors, sizes, is_transposed, is_compiled)
        return cls(stack, RowIndex(*index_tensors), gathers, sums)

    def forward(self, x: Tensor, lora: Sequence[Tensor]) -> list[Tensor]:
        """Return the output, and x A^T [rows, rank] if there is an adapter."""
        if _uses_one_kernel(x):
            return super().forward(x, lora)
        index = self.row_index
        count = len(index.tokens)
        y = x.new_empty(count, self.stack.shape[2])
        outputs = []
        updates = []
        if lora:
            xa = x.new_empty(count, lora[0].shape[1])
            outputs = [xa]
            # On the meta device `index.split` returns an empty list. Therefore no expert is
            # multiplied.
            updates = [*zip(*lora, index.split(xa), strict=False)]
        y_parts = index.split(y)
        for expert, rows, weight in _by_expert(x, index, self.gathers, self.stack):
            update = None
            if updates:
                a, b, low = updates[expert]
                torch.mm(rows, a.T, out=low)
                update = low, b
            if weight is not None:
                _multiply_into(y_parts[expert], rows, weight, update)
            del weight  # free the memory before the next weights are dequantized
        if self.sums:
            y = sum_of_rows(y, index.places)
        return [y, *outputs]

    def backward(
        self, dy: Tensor, saved: Sequence[Tensor], lora: Sequence[Tensor], needs_dx: bool
    ) -> list[Tensor]:
        """Return the gradients of x (empty unless `needs_dx`) and of `lora`.

        Args:
            saved: x and x A^T, or empty without an adapter.
        """
        dy = dy.contiguous()  # the gradient of `sum` is expanded, which matmuls do not support
        if _uses_one_kernel(dy):
            return super().backward(dy, saved, lora, needs_dx)
        index = self.row_index
        dx = dy.new_empty(0)
        dx_parts: Sequence[Tensor] = []
        stack = None
        if needs_dx:
            stack = self.stack
            dx = dy.new_empty(len(index.tokens), stack.shape[1])
            dx_parts = index.split(dx)
        # The gradients of an expert without rows are zero.
        d_lora = [dy.new_zeros(factor.shape) for factor in lora]
        updates: list[Sequence[Tensor]] = []
        if lora:
            x, xa = saved
            parts = index.split(index.tokens if self.gathers else x)
            updates = [*zip(parts, index.split(xa), *lora, *d_lora, strict=False)]
        for expert, rows, weight in _by_expert(dy, index, self.sums, stack):
            update = None
            if updates:
                part, xa_part, a, b, d_a, d_b = updates[expert]
                if self.gathers:
                    part = x.index_select(0, part)
                low = rows @ b.T
                torch.mm(low.T, part, out=d_a)
                torch.mm(xa_part.T, rows, out=d_b)
                update = low, a
            if weight is not None:
                _multiply_into(dx_parts[expert], rows, weight.T, update)
            del weight  # free the memory before the next weights are dequantized
        if needs_dx and self.gathers:
            dx = sum_of_rows(dx, index.places)
        return [dx, *d_lora]


def _multiply_into(
    out: Tensor, rows: Tensor, weight: Tensor, update: tuple[Tensor, Tensor] | None
) -> None:
    """Write the product of `rows` and `weight` to `out`. Add the product of `update` if given."""
    if update is None:
        torch.mm(rows, weight, out=out)
    else:
        torch.mm(*update, out=out)
        out.addmm_(rows, weight)


def _uses_one_kernel(x: Tensor) -> bool:
    """Return whether one kernel multiplies all experts."""
    return not x.is_meta and expert_rows.uses_grouped_mm(x.device, x.dtype)


def is_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _by_expert(
    x: Tensor, index: RowIndex, gathers: bool, stack: FrozenStack | None
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Yield each expert with rows, its rows, and its dequantized weight [in, out].

    The weight is None if there is no stack. On the meta device nothing is yielded. On a GPU,
    several experts are dequantized at once, because dequantization can need several kernel
    launches.

    Args:
        x: [rows, width]. If `gathers` is set, the tokens from which the rows are gathered.
    """
    step = 1
    if stack is not None and not is_cpu(x):
        step = stack.experts_per_step(x.dtype)
    weights = None
    dense_from = 0
    dense_to = 0
    for expert, part in enumerate(index.split(index.tokens if gathers else x)):
        if not len(part):
            continue
        if stack is not None and expert >= dense_to:
            weights = None  # free the memory before the next weights are dequantized
            dense_from = expert - expert % step
            dense_to = min(dense_from + step, stack.shape[0])
            weights = stack.dense(dense_from, dense_to, x.dtype)
        rows = part
        if gathers:
            rows = x.index_select(0, part)
        # Do not assign the expert's weight to a variable, which would keep its memory alive.
        yield expert, rows, None if weights is None else weights[expert - dense_from]


# ---- tensors that eager mode and torch.compile save for the backward


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Save tensors for the backward. `inputs` are x, `lora` and `ExpertProducts.parts`.

    x is not saved if there is no adapter.
    """
    x, lora, index_tensors, tensors, *ctx.form = inputs
    _, *saved = output
    if saved:
        saved = [x, *saved]
    ctx.counts = [len(saved), len(lora), len(index_tensors), len(tensors)]
    ctx.save_for_backward(*saved, *lora, *index_tensors, *tensors)


def _saved_lists(ctx: Any) -> list[list[Tensor]]:
    """Return the saved tensors as four lists: [x, x A^T], `lora`, the tensors of the row index, and
    the tensors of the stack.
    """
    flat = list(ctx.saved_tensors)  # read only once, as activation checkpointing requires
    lists = []
    for count in ctx.counts:
        lists.append(flat[:count])
        flat = flat[count:]
    return lists


# ---- eager


class _ExpertMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, products: ExpertProducts, *lora: Tensor) -> Tensor:
        outputs = products.forward(x, lora)
        _save(ctx, (x, lora, *products.parts()), outputs)
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        saved, lora, index_tensors, tensors = _saved_lists(ctx)
        products = ExpertProducts.of_parts(index_tensors, tensors, *ctx.form)
        needs_dx = ctx.needs_input_grad[0]
        dx, *d_lora = products.backward(grads[0], saved, lora, needs_dx)
        return (dx if needs_dx else None, None, *d_lora)


# ---- inside torch.compile


@torch.library.custom_op("tunesmith::expert_products", mutates_args=())
def expert_products(
    x: Tensor,
    lora: list[Tensor],
    index_tensors: list[Tensor],
    tensors: list[Tensor],
    encoding: str,
    shape: list[int],
    flags: list[bool],
) -> list[Tensor]:
    products = ExpertProducts.of_parts(
        index_tensors, tensors, encoding, shape, flags, is_compiled=True
    )
    return products.forward(x, lora)


@torch.library.custom_op("tunesmith::expert_products_backward", mutates_args=())
def expert_products_backward(
    dy: Tensor,
    saved: list[Tensor],
    lora: list[Tensor],
    index_tensors: list[Tensor],
    tensors: list[Tensor],
    encoding: str,
    shape: list[int],
    flags: list[bool],
    needs_dx: bool,
) -> list[Tensor]:
    products = ExpertProducts.of_parts(
        index_tensors, tensors, encoding, shape, flags, is_compiled=True
    )
    return products.backward(dy, saved, lora, needs_dx)


# Use `shape[0]`, because `len` would compile another graph for each number of tokens.
@expert_products.register_fake
def _(x, lora, index_tensors, tensors, encoding, shape, flags):  # type: ignore[no-untyped-def]
    tokens, places, *_ = index_tensors
    _, sums, _ = flags
    rows = places if sums else tokens
    outputs = [x.new_empty(rows.shape[0], shape[2])]
    if lora:
        outputs.append(x.new_empty(tokens.shape[0], lora[0].shape[1]))
    return outputs


@expert_products_backward.register_fake
def _(dy, saved, lora, index_tensors, tensors, encoding, shape, flags, needs_dx):  # type: ignore[no-untyped-def]
    tokens, places, *_ = index_tensors
    gathers, _, _ = flags
    rows = places if gathers else tokens
    dx = dy.new_empty(0)
    if needs_dx:
        dx = dy.new_empty(rows.shape[0], shape[1])
    return [dx, *(factor.new_empty(factor.shape) for factor in lora)]


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    saved, lora, index_tensors, tensors = _saved_lists(ctx)
    dy, *_ = grads
    assert dy is not None  # the loss depends on the output, not on x A^T
    needs_dx = ctx.needs_input_grad[0]
    dx, *d_lora = expert_products_backward(
        dy, saved, lora, index_tensors, tensors, *ctx.form, needs_dx
    )
    d_index = [None] * len(index_tensors)
    d_tensors = [None] * len(tensors)
    # Gradients in the order of the arguments of `expert_products`.
    return dx if needs_dx else None, d_lora, d_index, d_tensors, None, None, None


expert_products.register_autograd(_differentiate, setup_context=_save)
