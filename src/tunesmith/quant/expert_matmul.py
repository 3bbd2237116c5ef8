"""Tokens times the frozen weights of their experts, with a LoRA update of each.

    y = x W_e + (x A_e^T) B_e        for the copies of tokens that go to expert e

The copies are rows sorted by expert. A product may gather them from the tokens, and may add up a
token's rows afterwards; each is the other's transpose, so a backward gathers where its forward
added. The backward makes no gradient of W, saves tokens rather than their copies, and nothing
dense.

Two paths share the arithmetic: an autograd function in eager mode, and one opaque operator inside
torch.compile, in which the host may read the edges between experts, as no graph can.

GPUs for which torch has a kernel (see `uses_grouped_mm`) multiply all experts at once, and the host
does not wait for the edges. Everything else takes them in turns, as torch's own `grouped_mm` would
on other GPUs; the host reads the edges once a layer and forward. An expert's rows come from memory
once a turn, as they are gathered, and are in the cache for the products that follow.

A stack in codes that is large when dense (see `formats.base.DENSE_BYTES`) is multiplied by groups
of experts on any GPU. A group's product takes the rows between two edges, and no kernel of torch
begins at a row that only the device knows. So the host reads the edges there too. It waits for the
router then, and the products that follow take milliseconds each: the GPU has work again before
long.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.formats.base import FrozenStack
from tunesmith.formats.registry import find_format
from tunesmith.quant import expert_rows
from tunesmith.quant.expert_rows import RowIndex, sum_of_rows

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
        flags = [gathers, sums, stack.is_transposed]
        tensors = list(stack.tensors)
        y, *_ = expert_products(
            x, lora, row_index.tensors(), tensors, stack.format.encoding, list(stack.shape), flags
        )
        return y
    form = _ProductForm(stack.format.encoding, stack.shape, gathers, sums, stack.is_transposed)
    of_index = row_index.tensors()
    y = _ExpertMatmul.apply(x, form, len(lora), len(of_index), *lora, *of_index, *stack.tensors)
    return y


class _ProductForm(NamedTuple):
    """What products have beside their tensors; encoding and shape are those of the stack."""

    encoding: str
    shape: tuple[int, int, int]
    gathers: bool
    sums: bool
    is_transposed: bool


# ---- the arithmetic; `lora` is [A, B], or empty


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
        self.d_A = dy.new_zeros(experts, rank, self.x.shape[1])
        self.d_B = dy.new_zeros(experts, rank, dy.shape[1])

    def compute_at_once(self, dy: Tensor, d_xa: Tensor) -> None:
        """Those of all experts, by one kernel."""
        x = self.x
        if self.tokens is not None:
            x = x.index_select(0, self.tokens)
        self.d_A = F.grouped_mm(d_xa.T, x, offs=self.row_index.offsets)
        self.d_B = F.grouped_mm(self.xa.T, dy, offs=self.row_index.offsets)


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
        y = sum_of_rows(y, row_index.places)
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
        dx = sum_of_rows(dx, row_index.places)
    return [dx] if gradients is None else [dx, gradients.d_A, gradients.d_B]


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
    return _multiply_in_turns(product, gradients)


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


def is_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _multiply_in_turns(
    product: Product, gradients: FactorGradients | None
) -> tuple[Tensor | None, Tensor | None]:
    """`_multiply`, all rows of an expert at a time."""
    low, y = product.empty_results()
    if gradients is not None:
        gradients.allocate(product.x)
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
    return low, y


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
    """How many rows each expert has."""
    counts = []
    first = 0
    for end in row_index.ends_on_host():
        counts.append(end - first)
        first = end
    return counts


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
    for expert, count in enumerate(counts):
        if not count:
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


# ---- what both paths rebuild, and what they save: [x, x A^T], and the tensors of three lists


def _rebuild(
    form: _ProductForm,
    tensors: Sequence[Tensor],
    of_index: Sequence[Tensor],
    *,
    is_compiled: bool = False,
) -> tuple[FrozenStack, RowIndex]:
    """The stack and the index of some tensors."""
    kind = find_format(form.encoding)
    stack = FrozenStack(kind, tensors, form.shape, form.is_transposed, is_compiled)
    return stack, RowIndex.of_tensors(of_index)


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
