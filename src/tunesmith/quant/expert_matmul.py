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
from tunesmith.quant.experts_at_once import AtOnce

# Rows of a matrix that `grouped_mm` takes begin at multiples of 16 bytes.
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
            missing = -lora_A.shape[1] % (ROW_ALIGNMENT_BYTES // x.dtype.itemsize)
        if missing:
            lora_A = F.pad(lora_A, (0, 0, 0, missing))
            lora_B = F.pad(lora_B, (0, 0, 0, missing))
        lora = [lora_A, lora_B]
    products = ExpertProducts(stack, row_index, gathers, sums)
    y: Tensor
    if torch.compiler.is_compiling():
        y, *_ = expert_products(x, lora, *products.parts())
    else:
        y = _ExpertMatmul.apply(x, products, *lora)
    return y


# ---- the arithmetic; `lora` is [A, B], or empty


class GatheredRows(NamedTuple):
    """The rows of all experts: x [rows, width], or the tokens of which they are copies, if it
    `gathers`.
    """

    x: Tensor
    row_index: RowIndex
    gathers: bool

    def split(self, counts: Sequence[int]) -> Sequence[Tensor]:
        """Split what `part` takes by expert."""
        return (self.row_index.tokens if self.gathers else self.x).split(counts)

    def part(self, part: Tensor) -> Tensor:
        """The rows of an expert."""
        return self.x.index_select(0, part) if self.gathers else part


class Product(NamedTuple):
    """Rows times the frozen weight of their expert, and the two factors of its update.

    Attributes:
        rows: [rows, in]; the gradients [rows, out] if it `is_backward`, which exchanges `in` and
            `out`.
        factors: [experts, in, rank] and [experts, rank, out]; None: there is no update.
        stack: W [experts, in, out], which is transposed if it `is_backward`; None: only the first
            factor is multiplied.
        forward: x and x A^T, for the gradients of A and B.
    """

    rows: GatheredRows
    factors: tuple[Tensor, Tensor] | None
    stack: FrozenStack | None
    is_backward: bool = False
    forward: tuple[GatheredRows, Tensor] | None = None


class Results(NamedTuple):
    """The tensors that a product makes; None for those that it does not.

    Attributes:
        low: the rows times the first factor; y: times W, and low times the second factor.
        d_A: d_xa^T x [experts, rank, in]; d_B: xa^T dy [experts, rank, out]. An expert without rows
            has zeros.
    """

    low: Tensor | None
    y: Tensor | None
    d_A: Tensor | None
    d_B: Tensor | None

    @classmethod
    def empty(cls, product: Product) -> "Results":
        """Room for what a product makes."""
        x, index, _ = product.rows
        low = y = d_A = d_B = None
        if product.factors is not None:
            low = x.new_empty(len(index.tokens), product.factors[0].shape[2])
        if product.stack is not None:
            y = x.new_empty(len(index.tokens), product.stack.shape[1 if product.is_backward else 2])
        if product.forward is not None:
            forward, xa = product.forward
            of_experts = (len(index.offsets), xa.shape[1])
            d_A = x.new_zeros(*of_experts, forward.x.shape[1])
            d_B = x.new_zeros(*of_experts, x.shape[1])
        return cls(low, y, d_A, d_B)


class ExpertProducts(NamedTuple):
    """The products of a stack with the rows of some tokens, forward and backward."""

    stack: FrozenStack
    row_index: RowIndex
    gathers: bool
    sums: bool

    def parts(self) -> tuple[list[Tensor], list[Tensor], str, list[int], list[bool]]:
        """All of it as an operator takes it, for `of_parts`."""
        stack = self.stack
        flags = [self.gathers, self.sums, stack.is_transposed]
        encoding = stack.format.encoding
        return self.row_index.tensors(), list(stack.tensors), encoding, list(stack.shape), flags

    @classmethod
    def of_parts(
        cls,
        of_index: Sequence[Tensor],
        tensors: Sequence[Tensor],
        encoding: str,
        shape: Sequence[int],
        flags: Sequence[bool],
    ) -> "ExpertProducts":
        experts, in_features, out_features = shape
        gathers, sums, is_transposed = flags
        sizes = (experts, in_features, out_features)
        stack = FrozenStack(find_format(encoding), tensors, sizes, is_transposed)
        return cls(stack, RowIndex.of_tensors(of_index), gathers, sums)

    def forward(self, x: Tensor, lora: Sequence[Tensor]) -> list[Tensor]:
        """The output, and x A^T [rows, rank] where there is an update."""
        if _is_at_once(x):
            return AtOnce(*self).forward(x, lora)
        factors = (lora[0].mT, lora[1]) if lora else None
        rows = GatheredRows(x, self.row_index, self.gathers)
        xa, y, _, _ = _multiply(Product(rows, factors, self.stack))
        assert y is not None  # as there is a stack
        if self.sums:
            y = sum_of_rows(y, self.row_index.places)
        return [y] if xa is None else [y, xa]

    def backward(
        self, dy: Tensor, saved: Sequence[Tensor], lora: Sequence[Tensor], needs_dx: bool
    ) -> list[Tensor]:
        """The gradients of x (empty unless `needs_dx`) and of `lora`.

        saved: x and x A^T, or empty without updates.
        """
        dy = dy.contiguous()  # of a sum's gradient all rows are one, which no product takes
        if _is_at_once(dy):
            return AtOnce(*self).backward(dy, saved, lora, needs_dx)
        factors = None
        forward = None
        if lora:
            x, xa = saved
            lora_A, lora_B = lora
            factors = (lora_B.mT, lora_A)
            forward = (GatheredRows(x, self.row_index, self.gathers), xa)
        rows = GatheredRows(dy, self.row_index, self.sums)
        stack = self.stack if needs_dx else None
        _, dx, *d_lora = _multiply(Product(rows, factors, stack, is_backward=True, forward=forward))
        if dx is None:
            dx = dy.new_empty(0)
        elif self.gathers:
            dx = sum_of_rows(dx, self.row_index.places)
        return [dx, *(gradient for gradient in d_lora if gradient is not None)]


def _is_at_once(x: Tensor) -> bool:
    """Tell whether all experts are multiplied at once."""
    return not x.is_meta and expert_rows.uses_grouped_mm(x.device, x.dtype)


def is_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _multiply(product: Product) -> Results:
    """Multiply all rows of an expert at a time."""
    results = Results.empty(product)
    if product.rows.x.is_meta:
        return results
    counts = product.rows.row_index.counts_on_host()
    # All are cut at once: a slice takes as long as a small product takes to start.
    x_parts = product.rows.split(counts)
    low_parts = () if results.low is None else results.low.split(counts)
    y_parts = () if results.y is None else results.y.split(counts)
    factors = list(zip(*(factor.unbind() for factor in product.factors or ()), strict=True))
    of_gradients = []
    if product.forward is not None and results.d_A is not None and results.d_B is not None:
        forward, xa = product.forward
        parts = (forward.split(counts), xa.split(counts))
        of_gradients = list(zip(*parts, results.d_A, results.d_B, strict=True))
    for expert, weight in _dense_weights(product, counts):
        x = product.rows.part(x_parts[expert])
        if low_parts:
            torch.mm(x, factors[expert][0], out=low_parts[expert])
        if of_gradients:
            forward_x, xa_part, d_A, d_B = of_gradients[expert]
            torch.mm(low_parts[expert].T, forward.part(forward_x), out=d_A)
            torch.mm(xa_part.T, x, out=d_B)
        if weight is None:
            continue
        if low_parts:
            torch.mm(low_parts[expert], factors[expert][1], out=y_parts[expert])
            y_parts[expert].addmm_(x, weight)
        else:
            torch.mm(x, weight, out=y_parts[expert])
        del weight  # those of the next experts would be there beside it
    return results


def _dense_weights(product: Product, counts: Sequence[int]) -> Iterator[tuple[int, Tensor | None]]:
    """Each expert that has rows, and its dense weight, transposed in a backward.

    A GPU makes some experts dense at a time, as that may take several kernels.
    """
    stack = product.stack
    step = 1
    if stack is not None and not is_cpu(product.rows.x):
        step = stack.experts_at_once(product.rows.x.dtype)
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
            weights = stack.dense(dense_from, dense_to, product.rows.x.dtype)
        assert weights is not None
        weight = weights[expert - dense_from]
        yield expert, weight.T if product.is_backward else weight
        del weight


# ---- what both paths save: [x, x A^T], and the tensors of three lists


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """inputs: x, `lora`, and `ExpertProducts.parts`. Without updates x is not needed."""
    x, lora, of_index, tensors, *ctx.form = inputs
    _, *xa = output
    lists = ((x, *xa) if xa else (), lora, of_index, tensors)
    ctx.counts = [len(saved) for saved in lists]
    ctx.save_for_backward(*(tensor for saved in lists for tensor in saved))


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
    def forward(ctx: Any, x: Tensor, products: ExpertProducts, *lora: Tensor) -> Tensor:
        outputs = products.forward(x, lora)
        _save(ctx, (x, lora, *products.parts()), outputs)
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        saved, lora, of_index, tensors = _saved_lists(ctx)
        products = ExpertProducts.of_parts(of_index, tensors, *ctx.form)
        needs_dx = ctx.needs_input_grad[0]
        dx, *d_lora = products.backward(grads[0], saved, lora, needs_dx)
        return (dx if needs_dx else None, None, *d_lora)


# ---- inside torch.compile


def _expert_products(
    x: Tensor,
    lora: list[Tensor],
    of_index: list[Tensor],
    tensors: list[Tensor],
    encoding: str,
    shape: list[int],
    flags: list[bool],
) -> list[Tensor]:
    parts = (of_index, tensors, encoding, shape, flags)
    return ExpertProducts.of_parts(*parts).forward(x, lora)


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
    parts = (of_index, tensors, encoding, shape, flags)
    return ExpertProducts.of_parts(*parts).backward(dy, saved, lora, needs_dx)


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


expert_products.register_autograd(_differentiate, setup_context=_save)
