"""Tokens times the frozen weights of their experts, with a LoRA update of each.

    y = x W_e + (x A_e^T) B_e        for the copies of tokens that go to expert e

The copies are rows sorted by expert. A product may gather them from the tokens, and may add up a
token's rows afterwards; each is the other's transpose, so a backward gathers where its forward
added. The backward makes no gradient of W, saves tokens rather than their copies, and nothing
dense.

Two paths share the arithmetic: an autograd function in eager mode, and one opaque operator inside
torch.compile, in which the host may read the edges between experts, as no graph can.

GPUs for which torch has a kernel (see `uses_grouped_mm`) multiply all experts at once, and the host
does not wait for the edges. Everything else takes them in turns (see `expert_turns`), as torch's
own `grouped_mm` would on other GPUs; the host reads the edges once a layer and forward.

A stack in codes that is large when dense (see `frozen_stack.DENSE_BYTES`) is multiplied by groups
of experts on any GPU. A group's product takes the rows between two edges, and no kernel of torch
begins at a row that only the device knows. So the host reads the edges there too. It waits for the
router then, and the products that follow take milliseconds each: the GPU has work again before
long.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.quant import expert_rows
from tunesmith.quant.expert_rows import RowIndex, sum_of_rows
from tunesmith.quant.expert_turns import FactorGradients, Product, multiply_in_turns
from tunesmith.quant.frozen_stack import FrozenStack, frozen_stack

# Rows of a matrix that `grouped_mm` takes begin at multiples of 16 bytes.
ALIGNMENT = 16


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
    """y = x W_e + (x A_e^T) B_e; no gradient reaches W.

    Args:
        x: [rows, in], sorted by expert; the tokens [n, in] if it `gathers` their copies.
        lora_A: [experts, rank, in] in the dtype of x, or None for no update.
        lora_B: [experts, rank, out] in the dtype of x, times the scaling; in this order, as MKL
            multiplies a narrow matrix on the right at an eighth of the speed.

    Returns [rows, out]; the sum of each token's rows [n, out] if it `sums`.
    """
    lora: list[Tensor] = []
    if lora_A is not None and lora_B is not None:
        missing = 0
        if expert_rows.uses_grouped_mm(x.device, x.dtype):
            missing = -lora_A.shape[1] % (ALIGNMENT // x.dtype.itemsize)
        if missing:
            lora_A = F.pad(lora_A, (0, 0, 0, missing))
            lora_B = F.pad(lora_B, (0, 0, 0, missing))
        lora = [lora_A, lora_B]
    y: Tensor
    if torch.compiler.is_compiling():
        flags = [gathers, sums, row_index.is_part]
        tensors = list(stack.tensors)
        y, *_ = expert_products(
            x, lora, row_index.tensors(), tensors, stack.encoding, list(stack.shape), flags
        )
        return y
    form = _ProductForm(stack.encoding, stack.shape, gathers, sums, row_index.is_part)
    of_index = row_index.tensors()
    y = _ExpertMatmul.apply(x, form, len(lora), len(of_index), *lora, *of_index, *stack.tensors)
    return y


class _ProductForm(NamedTuple):
    """What products have beside their tensors; encoding and shape are those of the stack."""

    encoding: str
    shape: tuple[int, int, int]
    gathers: bool
    sums: bool
    is_part: bool


# ---- the arithmetic; `lora` is [A, B], or empty


def _forward(
    x: Tensor, lora: Sequence[Tensor], stack: FrozenStack, row_index: RowIndex, form: _ProductForm
) -> list[Tensor]:
    """The output, and x A^T [rows, rank] where there is an update."""
    factors = (lora[0].mT, lora[1]) if lora else None
    xa, y = _multiply(
        Product(x, factors, stack, row_index, is_backward=False, gathers=form.gathers)
    )
    assert y is not None  # as there is a stack
    if form.sums:
        y = sum_of_rows(y, row_index.places, is_part=row_index.is_part)
    return [y] if xa is None else [y, xa]


def _backward(
    dy: Tensor,
    saved: Sequence[Tensor],
    lora: Sequence[Tensor],
    stack: FrozenStack,
    row_index: RowIndex,
    form: _ProductForm,
    needs_dx: bool,
) -> list[Tensor]:
    """The gradients of x (empty unless `needs_dx`) and of `lora`.

    saved: x and x A^T, or empty without updates.
    """
    dy = dy.contiguous()  # of a sum's gradient all rows are one, which no product takes
    factors = None
    gradients = None
    if lora:
        x, xa = saved
        lora_A, lora_B = lora
        factors = (lora_B.mT, lora_A)
        gradients = FactorGradients(x, xa, row_index, gathers=form.gathers)
    needed = stack if needs_dx else None
    product = Product(dy, factors, needed, row_index, is_backward=True, gathers=form.sums)
    _, dx = _multiply(product, gradients)
    if dx is None:
        dx = dy.new_empty(0)
    elif form.gathers:
        dx = sum_of_rows(dx, row_index.places, is_part=row_index.is_part)
    return [dx] if gradients is None else [dx, *gradients.results(dy.dtype)]


def _multiply(
    product: Product, gradients: FactorGradients | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """x times the first factor, and x W with that times the second: [rows, ...].

    gradients: of the factors, to be computed beside.
    """
    x = product.x
    if x.is_meta:
        if gradients is not None:
            gradients.allocate(x)
        return product.empty_results()
    if expert_rows.uses_grouped_mm(x.device, x.dtype):
        return _multiply_at_once(product, gradients)
    return multiply_in_turns(product, gradients)


def _multiply_at_once(
    product: Product, gradients: FactorGradients | None
) -> tuple[Tensor | None, Tensor | None]:
    """`_multiply` by kernels for all experts."""
    offsets = product.row_index.offsets
    x = product.x
    if product.gathers:
        x = x.index_select(0, product.row_index.tokens)
    low = None
    y = None
    if product.factors is not None:
        low = F.grouped_mm(x, product.factors[0], offs=offsets)
        if product.stack is not None:
            y = F.grouped_mm(low, product.factors[1], offs=offsets)
        if gradients is not None:
            gradients.compute_at_once(x, low)
    if product.stack is not None:
        y = _add_frozen(y, x, product.stack, product.row_index, backward=product.is_backward)
    return low, y


def _add_frozen(
    y: Tensor | None, x: Tensor, stack: FrozenStack, row_index: RowIndex, *, backward: bool
) -> Tensor:
    """x W_e, or x W_e^T if `backward`, added to y if there is one, which may be overwritten.

    By one kernel for all experts, or for each group of them.
    """
    experts, width, out_width = stack.shape
    step = stack.experts_at_once(x.dtype)
    if row_index.ends is None or step == experts:
        weights = stack.dense(0, experts, x.dtype)
        product = F.grouped_mm(x, weights.mT if backward else weights, offs=row_index.offsets)
        return product if y is None else product.add_(y)
    if y is None:
        y = x.new_zeros(len(x), width if backward else out_width)
    ends = row_index.ends_on_host()
    first_row = 0
    for first in range(0, experts, step):
        last = min(first + step, experts)
        end_row = ends[last - 1]
        if end_row > first_row:
            weights = stack.dense(first, last, x.dtype)
            offsets = row_index.offsets[first:last] - first_row
            of_group = slice(first_row, end_row)
            y[of_group] += F.grouped_mm(
                x[of_group], weights.mT if backward else weights, offs=offsets
            )
            del weights  # the next group's would be there beside it
        first_row = end_row
    return y


# ---- what both paths rebuild, and what they save: [x, x A^T], and the tensors of three lists


def _rebuild(
    form: _ProductForm,
    tensors: Sequence[Tensor],
    of_index: Sequence[Tensor],
    *,
    is_compiled: bool = False,
) -> tuple[FrozenStack, RowIndex]:
    """The stack and the index of some tensors."""
    stack = frozen_stack(form.encoding, tensors, form.shape, is_compiled=is_compiled)
    return stack, RowIndex.of_tensors(of_index, is_part=form.is_part)


def _save(ctx: Any, x: Tensor, xa: Sequence[Tensor], lists: Sequence[Sequence[Tensor]]) -> None:
    """lists: `lora`, those of the index, and of the stack. Without updates x is not needed."""
    saved = (x, *xa) if xa else ()
    ctx.counts = [len(saved), *(len(tensors) for tensors in lists)]
    flat = [tensor for tensors in lists for tensor in tensors]
    ctx.save_for_backward(*saved, *flat)


def _saved_lists(ctx: Any) -> list[list[Tensor]]:
    """Saved, lora, those of the index, and of the stack."""
    flat = list(ctx.saved_tensors)  # read once: a recomputed layer unpacks them once
    lists = []
    for count in ctx.counts:
        lists.append(flat[:count])
        flat = flat[count:]
    return lists


# ---- eager


class _ExpertMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, form: _ProductForm, lora_count: int, index_count: int, *flat: Tensor
    ) -> Tensor:
        ctx.form = form
        lora, flat = flat[:lora_count], flat[lora_count:]
        of_index, tensors = flat[:index_count], flat[index_count:]
        stack, row_index = _rebuild(form, tensors, of_index)
        y, *xa = _forward(x, lora, stack, row_index, form)
        _save(ctx, x, xa, (lora, of_index, tensors))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        form: _ProductForm = ctx.form
        saved, lora, of_index, tensors = _saved_lists(ctx)
        stack, row_index = _rebuild(form, tensors, of_index)
        needs_dx = ctx.needs_input_grad[0]
        dx, *d_lora = _backward(grads[0], saved, lora, stack, row_index, form, needs_dx)
        dx_or_none = dx if needs_dx else None
        nothing = [None] * (len(of_index) + len(tensors))
        return (dx_or_none, None, None, None, *d_lora, *nothing)


# ---- inside torch.compile; an operator takes a `RowIndex` and a `_ProductForm` in parts


def _form_of(encoding: str, shape: list[int], flags: list[bool]) -> _ProductForm:
    experts, in_features, out_features = shape
    return _ProductForm(encoding, (experts, in_features, out_features), *flags)


def _expert_products(
    x: Tensor,
    lora: list[Tensor],
    of_index: list[Tensor],
    tensors: list[Tensor],
    encoding: str,
    shape: list[int],
    flags: list[bool],
) -> list[Tensor]:
    form = _form_of(encoding, shape, flags)
    stack, row_index = _rebuild(form, tensors, of_index, is_compiled=True)
    return _forward(x, lora, stack, row_index, form)


def _expert_products_backward(
    dy: Tensor,
    saved: list[Tensor],
    lora: list[Tensor],
    of_index: list[Tensor],
    tensors: list[Tensor],
    encoding: str,
    shape: list[int],
    flags: list[bool],
    needs_dx: bool,
) -> list[Tensor]:
    form = _form_of(encoding, shape, flags)
    stack, row_index = _rebuild(form, tensors, of_index, is_compiled=True)
    return _backward(dy, saved, lora, stack, row_index, form, needs_dx)


expert_products = torch.library.custom_op(
    "tunesmith::expert_products", _expert_products, mutates_args=()
)
expert_products_backward = torch.library.custom_op(
    "tunesmith::expert_products_backward", _expert_products_backward, mutates_args=()
)


# `shape[0]` in both: `len` would make another graph for each number of tokens.
@expert_products.register_fake
def _(x, lora, of_index, tensors, encoding, shape, flags):  # type: ignore[no-untyped-def]
    tokens, places, *_ = of_index
    _, sums, _ = flags
    y = x.new_empty((places if sums else tokens).shape[0], shape[2])
    return [y, x.new_empty(tokens.shape[0], lora[0].shape[1])] if lora else [y]


@expert_products_backward.register_fake
def _(dy, saved, lora, of_index, tensors, encoding, shape, flags, needs_dx):  # type: ignore[no-untyped-def]
    tokens, places, *_ = of_index
    gathers, _, _ = flags
    rows = (places if gathers else tokens).shape[0]
    dx = dy.new_empty((rows, shape[1]) if needs_dx else (0,))
    return [dx, *(factor.new_empty(factor.shape) for factor in lora)]


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, lora, of_index, tensors, *ctx.form = inputs
    _, *xa = output
    _save(ctx, x, xa, (lora, of_index, tensors))


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    saved, lora, of_index, tensors = _saved_lists(ctx)
    dy, *_ = grads
    assert dy is not None  # the output is used, x A^T is not
    needs_dx = ctx.needs_input_grad[0]
    dx, *d_lora = expert_products_backward(dy, saved, lora, of_index, tensors, *ctx.form, needs_dx)
    d_index = [None] * len(of_index)
    d_tensors = [None] * len(tensors)
    # In the order of the arguments of `_expert_products`.
    return dx if needs_dx else None, d_lora, d_index, d_tensors, None, None, None


expert_products.register_autograd(_differentiate, setup_context=_save_inputs)
