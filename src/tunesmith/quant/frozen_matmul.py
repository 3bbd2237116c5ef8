"""Products of one input with several frozen weights, each with its update of low rank: read x once, write y once.

    low = x A^T          A: the A's of all layers under each other, [sum of ranks, in]
    y_i = x W_i^T + low_i B_i^T

The update is laid down first and the large product is added onto it in its own epilogue, so that y is not read and
written again for eight more columns of work. The backward adds up the gradient of x in place in the same manner. How W
is held (dense, nf4, fp8) is a `Kind`; nothing dense is kept for the backward but x and low.

Two doors lead to the same arithmetic: an autograd function where nothing is compiled, and inside torch.compile one
operator, which the compiler takes whole: its own patterns would undo the order above.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class WeightKind(Protocol):
    """How a frozen weight is held, and how it is multiplied with. `weight` are the tensors that hold one layer's."""

    tensors: int  # how many these are
    adds: bool  # whether `back` adds onto what is there in its own epilogue; else it takes another pass

    def quantise(self, x: Tensor) -> list[Tensor]:
        """What the products need of an input beside itself: nothing, or its fp8 form. Plain tensor code: under
        torch.compile it is fused into what makes the input."""

    def times(
        self, x: Tensor, quantised: Sequence[Tensor], weight: Sequence[Tensor], update: LowRankUpdate | None
    ) -> Tensor:
        """x W^T, plus the update: x [n, in] -> a new [n, out]."""

    def back(self, dy: Tensor, quantised: Sequence[Tensor], weight: Sequence[Tensor], onto: Tensor | None) -> Tensor:
        """dy W, plus `onto`, which may be overwritten: dy [n, out] -> [n, in]."""


class LowRankUpdate(NamedTuple):
    """The small factors of one layer's update: low [n, rank], up [out, rank]; both in the dtype of the products."""

    low: Tensor
    up: Tensor


class DenseKind:
    """A weight [out, in] in the dtype of its products."""

    tensors = 1
    adds = True

    def quantise(self, x: Tensor) -> list[Tensor]:
        return []

    def times(
        self, x: Tensor, quantised: Sequence[Tensor], weight: Sequence[Tensor], update: LowRankUpdate | None
    ) -> Tensor:
        if update is None:
            return F.linear(x, weight[0])
        return (update.low @ update.up.T).addmm_(x, weight[0].T)

    def back(self, dy: Tensor, quantised: Sequence[Tensor], weight: Sequence[Tensor], onto: Tensor | None) -> Tensor:
        return dy @ weight[0] if onto is None else onto.addmm_(dy, weight[0])


KINDS: dict[str, WeightKind] = {"dense": DenseKind()}


class FrozenWeight(NamedTuple):
    """One frozen weight [out, in]: the name of its kind in KINDS, the tensors that hold it, and `out`."""

    kind: str
    tensors: list[Tensor]
    width: int


def grouped_matmul(
    x: Tensor,
    weights: Sequence[FrozenWeight],
    biases: Sequence[Tensor | None],
    downs: Sequence[Tensor] = (),
    ups: Sequence[Tensor] = (),
) -> list[Tensor]:
    """y_i = x W_i^T + b_i + (x A_i^T) B_i^T for layers of one kind; no gradient reaches W and b.

    Args:
        x: [..., in].
        weights: the layers' frozen weights, all of one kind.
        biases: [out_i] each, or None.
        downs: A_i, [rank_i, in]; ups: B_i times the layer's scaling, [out_i, rank_i]; of any dtype, computed in that of
            x. Both empty: the frozen layers alone.

    Returns:
        [..., out_i] each, in the dtype of x.
    """
    rows = x.flatten(0, -2)
    kind, widths = weights[0].kind, [w.width for w in weights]
    held = [t for w in weights for t in w.tensors]
    small = [torch.cat(list(downs)).to(x.dtype), *(up.to(x.dtype) for up in ups)] if downs else []
    quantised = KINDS[kind].quantise(rows.detach())
    if torch.compiler.is_compiling():
        outputs = frozen_products(rows, quantised, small, held, kind, widths)
    else:
        outputs = list(_FrozenProducts.apply(rows, kind, widths, len(small), *quantised, *small, *held))
    # Where there are updates the last output is low, which the backward alone reads.
    ys = [y if b is None else y + b for y, b in zip(outputs[: len(widths)], biases, strict=True)]
    return [y.unflatten(0, x.shape[:-1]) for y in ys]


# The arithmetic, for both doors


def _forward(x: Tensor, quantised: list[Tensor], small: list[Tensor], held: list[Tensor], kind: str) -> list[Tensor]:
    """The outputs, and low [n, sum of ranks] if there are updates. `small` is [all A's, B_1, B_2, ...], or empty."""
    if not small:
        return [KINDS[kind].times(x, quantised, w, None) for w in _each(held, kind)]
    down, *ups = small
    low = x @ down.T
    parts = low.split([up.shape[1] for up in ups], 1)
    updates = [LowRankUpdate(part, up) for part, up in zip(parts, ups, strict=True)]
    return [*(KINDS[kind].times(x, quantised, w, u) for w, u in zip(_each(held, kind), updates, strict=True)), low]


def _backward(
    dys: list[Tensor],
    quantised: list[Tensor],
    saved: list[Tensor],
    small: list[Tensor],
    held: list[Tensor],
    kind: str,
    wanted: bool,
) -> list[Tensor]:
    """Gradients of x (of no rows unless `wanted`) and of `small`. `saved` is [x, low], or empty without updates;
    `quantised` holds the same count of tensors for each of `dys`."""
    way, each = KINDS[kind], len(quantised) // len(dys)
    d_low, d_small, d_x = None, [], None
    if small:
        (x, low), (down, *ups) = saved, small
        d_low = torch.cat([dy @ up for dy, up in zip(dys, ups, strict=True)], 1)
        parts = low.split([up.shape[1] for up in ups], 1)
        d_small = [d_low.T @ x, *(dy.T @ part for dy, part in zip(dys, parts, strict=True))]
    if not wanted:
        return [dys[0].new_empty(0), *d_small]
    if d_low is not None and way.adds:
        d_x = d_low @ down
    for i, (dy, w) in enumerate(zip(dys, _each(held, kind), strict=True)):
        d_x = way.back(dy, quantised[i * each : (i + 1) * each], w, d_x)
    assert d_x is not None
    if d_low is not None and not way.adds:
        d_x.addmm_(d_low, down)
    return [d_x, *d_small]


def _each(held: list[Tensor], kind: str) -> list[list[Tensor]]:
    """The tensors of each layer; every layer of a group has as many as its kind says, so the list is cut evenly."""
    size = KINDS[kind].tensors
    return [held[i : i + size] for i in range(0, len(held), size)]


def _save(ctx: Any, x: Tensor, low: Tensor | None, small: list[Tensor], held: list[Tensor]) -> None:
    """Keep what the backward reads; `low` is None without updates."""
    ctx.smalls = len(small)
    ctx.save_for_backward(*([] if low is None else [x, low]), *small, *held)


def _for_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[list[Tensor], ...]:
    """Gradients of all outputs, what their kind needs of them beside, and what `_save` kept: x and low, small, held.

    An output that nobody used has zeros.
    """
    tensors = list(ctx.saved_tensors)
    cut = 2 if ctx.smalls else 0
    saved, small, held = tensors[:cut], tensors[cut : cut + ctx.smalls], tensors[cut + ctx.smalls :]
    like = next(g for g in grads if g is not None)
    wide = zip(grads[: len(ctx.widths)], ctx.widths, strict=True)
    dys = [like.new_zeros(like.shape[0], n) if dy is None else dy.contiguous() for dy, n in wide]
    return dys, [t for dy in dys for t in KINDS[ctx.kind].quantise(dy)], saved, small, held


# Without a compiler


class _FrozenProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str, widths: list[int], smalls: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        held_at = len(tensors) - len(widths) * KINDS[kind].tensors
        quantised, small = list(tensors[: held_at - smalls]), list(tensors[held_at - smalls : held_at])
        held = list(tensors[held_at:])
        outputs = _forward(x, quantised, small, held, kind)
        _save(ctx, x, outputs[-1] if small else None, small, held)
        ctx.kind, ctx.widths, ctx.quantised = kind, widths, len(quantised)
        if small:
            ctx.mark_non_differentiable(outputs[-1])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        dys, quantised, saved, small, held = _for_backward(ctx, grads)
        d_x, *d_small = _backward(dys, quantised, saved, small, held, ctx.kind, ctx.needs_input_grad[0])
        none: list[None] = [None] * ctx.quantised
        return (d_x if ctx.needs_input_grad[0] else None, None, None, None, *none, *d_small, *[None] * len(held))


# Inside torch.compile


@torch.library.custom_op("tunesmith::frozen_products", mutates_args=())
def frozen_products(
    x: Tensor, quantised: list[Tensor], small: list[Tensor], held: list[Tensor], kind: str, widths: list[int]
) -> list[Tensor]:
    return _forward(x, quantised, small, held, kind)


@frozen_products.register_fake
def _(x, quantised, small, held, kind, widths):  # type: ignore[no-untyped-def]
    low = [x.new_empty(x.shape[0], small[0].shape[0])] if small else []
    return [*(x.new_empty(x.shape[0], width) for width in widths), *low]


@torch.library.custom_op("tunesmith::frozen_products_backward", mutates_args=())
def frozen_products_backward(
    dys: list[Tensor],
    quantised: list[Tensor],
    saved: list[Tensor],
    small: list[Tensor],
    held: list[Tensor],
    kind: str,
    width: int,
    wanted: bool,
) -> list[Tensor]:
    return _backward(dys, quantised, saved, small, held, kind, wanted)


@frozen_products_backward.register_fake
def _(dys, quantised, saved, small, held, kind, width, wanted):  # type: ignore[no-untyped-def]
    d_x = dys[0].new_empty((dys[0].shape[0], width) if wanted else (0,))
    return [d_x, *(s.new_empty(s.shape) for s in small)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, quantised, small, held, kind, widths = inputs
    _save(ctx, x, output[-1] if small else None, small, held)
    ctx.kind, ctx.widths, ctx.width = kind, widths, x.shape[1]
    ctx.unused = (len(quantised), len(held))


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    dys, quantised, saved, small, held = _for_backward(ctx, grads)
    wanted = ctx.needs_input_grad[0]
    d_x, *d_small = frozen_products_backward(dys, quantised, saved, small, held, ctx.kind, ctx.width, wanted)
    inputs, weights = ctx.unused
    return d_x if wanted else None, [None] * inputs, d_small, [None] * weights, None, None


frozen_products.register_autograd(_differentiate, setup_context=_keep)
