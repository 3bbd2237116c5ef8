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
from typing import Any

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


class ExpertProducts(AtOnce):
    """The products of a stack with the rows of some tokens, forward and backward."""

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
        *,
        is_compiled: bool = False,
    ) -> "ExpertProducts":
        experts, in_features, out_features = shape
        gathers, sums, is_transposed = flags
        sizes = (experts, in_features, out_features)
        stack = FrozenStack(find_format(encoding), tensors, sizes, is_transposed, is_compiled)
        return cls(stack, RowIndex.of_tensors(of_index), gathers, sums)

    def forward(self, x: Tensor, lora: Sequence[Tensor]) -> list[Tensor]:
        """The output, and x A^T [rows, rank] where there is an update."""
        if _is_at_once(x):
            return super().forward(x, lora)
        index = self.row_index
        y = x.new_empty(len(index.tokens), self.stack.shape[2])
        xa = [x.new_empty(len(index.tokens), lora[0].shape[1])] if lora else []
        y_parts = index.split(y)
        # On meta no expert is multiplied, and there are no parts.
        updates = [*zip(*lora, *map(index.split, xa), strict=False)]
        for expert, rows, weight in _by_expert(x, index, self.gathers, self.stack):
            update = None
            if updates:
                a, b, low = updates[expert]
                update = torch.mm(rows, a.T, out=low), b
            if weight is not None:
                _multiply_into(y_parts[expert], rows, weight, update)
            del weight  # those of the next experts would be there beside it
        return [sum_of_rows(y, index.places) if self.sums else y, *xa]

    def backward(
        self, dy: Tensor, saved: Sequence[Tensor], lora: Sequence[Tensor], needs_dx: bool
    ) -> list[Tensor]:
        """The gradients of x (empty unless `needs_dx`) and of `lora`.

        saved: x and x A^T, or empty without updates.
        """
        dy = dy.contiguous()  # of a sum's gradient all rows are one, which no product takes
        if _is_at_once(dy):
            return super().backward(dy, saved, lora, needs_dx)
        index = self.row_index
        dx = dy.new_empty((len(index.tokens), self.stack.shape[1]) if needs_dx else 0)
        # An expert without rows has gradients of zeros.
        d_lora = [dy.new_zeros(factor.shape) for factor in lora]
        dx_parts = index.split(dx) if needs_dx else []
        updates: list[Sequence[Tensor]] = []
        if lora:
            x, xa = saved
            parts = index.split(index.tokens if self.gathers else x)
            updates = [*zip(parts, index.split(xa), *lora, *d_lora, strict=False)]
        stack = self.stack if needs_dx else None
        for expert, rows, weight in _by_expert(dy, index, self.sums, stack):
            update = None
            if updates:
                part, xa_part, a, b, d_a, d_b = updates[expert]
                update = rows @ b.T, a
                of_x = x.index_select(0, part) if self.gathers else part
                torch.mm(update[0].T, of_x, out=d_a)
                torch.mm(xa_part.T, rows, out=d_b)
            if weight is not None:
                _multiply_into(dx_parts[expert], rows, weight.T, update)
            del weight  # as above
        if needs_dx and self.gathers:
            dx = sum_of_rows(dx, index.places)
        return [dx, *d_lora]


def _multiply_into(
    out: Tensor, rows: Tensor, weight: Tensor, update: tuple[Tensor, Tensor] | None
) -> None:
    """out = rows W, plus the product of the two factors of an update."""
    if update is None:
        torch.mm(rows, weight, out=out)
    else:
        torch.mm(*update, out=out)
        out.addmm_(rows, weight)


def _is_at_once(x: Tensor) -> bool:
    """Tell whether all experts are multiplied at once."""
    return not x.is_meta and expert_rows.uses_grouped_mm(x.device, x.dtype)


def is_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _by_expert(
    x: Tensor, index: RowIndex, gathers: bool, stack: FrozenStack | None
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Each expert that has rows, these rows, and its dense weight [in, out], None without a stack.

    x: [rows, width], or the tokens of which the rows are copies if it `gathers`. On meta there are
    none. A GPU makes some experts dense at a time, as that may take several kernels.
    """
    step = 1
    if stack is not None and not is_cpu(x):
        step = stack.experts_at_once(x.dtype)
    weights = None
    dense_from = 0
    dense_to = 0
    for expert, part in enumerate(index.split(index.tokens if gathers else x)):
        if not len(part):
            continue
        if stack is not None and expert >= dense_to:
            weights = None  # before others are there beside them
            dense_from = expert - expert % step
            dense_to = min(dense_from + step, stack.shape[0])
            weights = stack.dense(dense_from, dense_to, x.dtype)
        rows = x.index_select(0, part) if gathers else part
        yield expert, rows, None if weights is None else weights[expert - dense_from]


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
    return ExpertProducts.of_parts(*parts, is_compiled=True).forward(x, lora)


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
    products = ExpertProducts.of_parts(*parts, is_compiled=True)
    return products.backward(dy, saved, lora, needs_dx)


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
