"""One input times several frozen weights, each with a LoRA update: x is read once, and each y is written once.

    xa  = x A^T                  A: the A's of all layers stacked, [sum of ranks, in]
    y_i = x W_i^T + xa_i B_i^T

The backward keeps x and xa and nothing dense, and adds up dx in place. Two paths share the arithmetic: an autograd
function in eager mode (an operator takes 0.6 ms longer for three layers on a CPU), and one opaque operator inside
torch.compile, whose own patterns would undo the order of the sums (see `FrozenWeight.forward_matmul`). xa is an input of
both: as an output of the operator it would make a recomputed layer run its last product again, whose y nobody reads.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tunesmith.model.weights import Hook, StoredTensor
from tunesmith.quant.frozen_weight import FrozenWeight, frozen_weight
from tunesmith.sharded import local_part


def grouped_matmul(
    x: Tensor,
    weights: Sequence[FrozenWeight],
    biases: Sequence[Tensor | None],
    lora_A: Sequence[Tensor] = (),
    lora_B: Sequence[Tensor] = (),
) -> Sequence[Tensor]:
    """y_i = x W_i^T + b_i + (x A_i^T) B_i^T; no gradient reaches W and b.

    Args:
        x: [..., in].
        weights: of one kind.
        biases: [out_i] each, or None.
        lora_A: [rank_i, in] each; lora_B: times the layer's scaling, [out_i, rank_i] each. Of any dtype, computed in that
            of x. Both empty: no update.

    Returns:
        [..., out_i] each, in the dtype of x.
    """
    # A DTensor would make its own collectives out of the products.
    assert all(type(t) in (Tensor, nn.Parameter) for w in weights for t in w.tensors)
    rows = x.flatten(0, -2)
    kind, widths = weights[0].kind, [w.shape[0] for w in weights]
    tensors = [t for w in weights for t in w.tensors]
    lora = [torch.cat(list(lora_A)).to(x.dtype), *(b.to(x.dtype) for b in lora_B)] if lora_A else []
    xa = [rows.detach() @ lora[0].detach().T] if lora else []  # the operator's backward has the gradients of x and A
    is_compiling = torch.compiler.is_compiling()
    outputs: Sequence[Tensor] = ()
    if not torch.is_grad_enabled() and not is_compiling:
        outputs = _few_rows(rows, weights, xa, lora)
    if not outputs:
        quantized = weights[0].quantize_input(rows.detach())
        if is_compiling:
            outputs = frozen_matmul(rows, xa, quantized, lora, tensors, kind, widths)
        else:
            counts = (len(xa), len(quantized), len(lora))
            outputs = _FrozenMatmul.apply(rows, kind, widths, counts, *xa, *quantized, *lora, *tensors)
    ys = [y if b is None else y + b for y, b in zip(outputs, biases, strict=True)]
    return [y.unflatten(0, x.shape[:-1]) for y in ys]


# ---- the arithmetic; `lora` is [stacked A, B_1, B_2, ...] and `xa` is [x A^T], or both are empty ----


def _weights(kind: str, tensors: list[Tensor], widths: list[int], in_features: int) -> list[FrozenWeight]:
    each = len(tensors) // len(widths)  # one kind, so equally many tensors a layer
    cut = (tensors[i : i + each] for i in range(0, len(tensors), each))
    return [frozen_weight(kind, own, (width, in_features)) for own, width in zip(cut, widths, strict=True)]


def _few_rows(x: Tensor, weights: Sequence[FrozenWeight], xa: Sequence[Tensor], lora: Sequence[Tensor]) -> list[Tensor]:
    """The outputs where the weights have a kernel for so few rows, else none; without gradients."""
    products = [product for w in weights if (product := w.few_rows_matmul(x)) is not None]
    if products and lora:  # the weights are of one kind: all have it, or none
        bs = lora[1:]
        for product, part, b in zip(products, xa[0].split([b.shape[1] for b in bs], 1), bs, strict=True):
            product.addmm_(part, b.T)
    return products


def _forward(
    x: Tensor,
    xa: list[Tensor],
    quantized: list[Tensor],
    lora: list[Tensor],
    tensors: list[Tensor],
    kind: str,
    widths: list[int],
) -> list[Tensor]:
    """The outputs."""
    weights = _weights(kind, tensors, widths, x.shape[1])
    if not lora:
        return [w.forward_matmul(x, quantized, None) for w in weights]
    bs = lora[1:]
    updates = zip(xa[0].split([b.shape[1] for b in bs], 1), bs, strict=True)
    return [w.forward_matmul(x, quantized, u) for w, u in zip(weights, updates, strict=True)]


def _backward(
    dys: list[Tensor],
    quantized: list[Tensor],
    saved: list[Tensor],
    lora: list[Tensor],
    tensors: list[Tensor],
    kind: str,
    in_features: int,
    needs_dx: bool,
) -> list[Tensor]:
    """Gradients of x (empty unless `needs_dx`) and of `lora`.

    saved: [x, xa], or empty without updates. quantized: `quantize_gradient` of each of `dys`, one after the other.
    """
    weights = _weights(kind, tensors, [dy.shape[1] for dy in dys], in_features)
    each = len(quantized) // len(dys)
    d_xa, d_lora, dx = None, [], None
    if lora:
        (x, xa), (a, *bs) = saved, lora
        parts = xa.split([b.shape[1] for b in bs], 1)
        d_xa = torch.cat([dy @ b for dy, b in zip(dys, bs, strict=True)], 1)
        d_lora = [d_xa.T @ x, *(gradient_of_b(dy, part) for dy, part in zip(dys, parts, strict=True))]
    if not needs_dx:
        return [dys[0].new_empty(0), *d_lora]
    update = None if d_xa is None else (d_xa, a.T)
    for i, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
        dx = weight.backward_matmul(dy, quantized[i * each : (i + 1) * each], dx, update if i == 0 else None)
    assert dx is not None
    return [dx, *d_lora]


def gradient_of_b(dy: Tensor, xa: Tensor) -> Tensor:
    """dy^T xa, [out, rank]."""
    if dy.device.type == "cpu":  # oneDNN takes two to three times as long for a transposed left factor of this shape
        return (xa.T @ dy).T.contiguous()
    return dy.T @ xa


# ---- what both paths keep for the backward ----


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep what the backward reads, and the sizes that gradients are told apart by."""
    x, xa, quantized, lora, tensors, ctx.kind, ctx.widths = inputs
    ctx.in_features, ctx.counts = x.shape[1], (len(xa), len(quantized), len(lora), len(tensors))
    ctx.save_for_backward(*([x, *xa] if lora else []), *lora, *tensors)


def _backward_inputs(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """The arguments of `_backward`; an output that nobody used has a gradient of zeros."""
    kept, n_lora = list(ctx.saved_tensors), ctx.counts[2]
    at = 2 if n_lora else 0
    like = next(g for g in grads if g is not None)
    wide = zip(grads[: len(ctx.widths)], ctx.widths, strict=True)
    dys = [like.new_zeros(like.shape[0], n) if dy is None else dy.contiguous() for dy, n in wide]
    tensors = kept[at + n_lora :]
    weights = _weights(ctx.kind, tensors, ctx.widths, ctx.in_features)
    quantized = [t for dy, weight in zip(dys, weights, strict=True) for t in weight.quantize_gradient(dy)]
    needs_dx = ctx.needs_input_grad[0]
    lora = kept[at : at + n_lora]
    return dys, quantized, kept[:at], lora, tensors, ctx.kind, ctx.in_features, needs_dx


# ---- eager ----


class _FrozenMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kind: str, widths: list[int], counts: tuple[int, ...], *flat: Tensor
    ) -> tuple[Tensor, ...]:
        given = iter(flat)
        xa, quantized, lora = ([next(given) for _ in range(n)] for n in counts)
        inputs = (x, xa, quantized, lora, list(given), kind, widths)
        _save(ctx, inputs, None)
        return tuple(_forward(*inputs))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        dx, *d_lora = _backward(*_backward_inputs(ctx, grads))
        n_xa, n_quantized, _, n_tensors = ctx.counts
        dx_or_none = dx if ctx.needs_input_grad[0] else None
        return (dx_or_none, *[None] * (3 + n_xa + n_quantized), *d_lora, *[None] * n_tensors)


# ---- inside torch.compile ----


frozen_matmul = torch.library.custom_op("tunesmith::frozen_matmul", _forward, mutates_args=())
frozen_matmul_backward = torch.library.custom_op("tunesmith::frozen_matmul_backward", _backward, mutates_args=())


@frozen_matmul.register_fake
def _(x, xa, quantized, lora, tensors, kind, widths):  # type: ignore[no-untyped-def]
    return [x.new_empty(x.shape[0], width) for width in widths]


@frozen_matmul_backward.register_fake
def _(dys, quantized, saved, lora, tensors, kind, in_features, needs_dx):  # type: ignore[no-untyped-def]
    dx = dys[0].new_empty((dys[0].shape[0], in_features) if needs_dx else (0,))
    return [dx, *(factor.new_empty(factor.shape) for factor in lora)]


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    dx, *d_lora = frozen_matmul_backward(*_backward_inputs(ctx, grads))
    n_xa, n_quantized, _, n_tensors = ctx.counts
    dx_or_none = dx if ctx.needs_input_grad[0] else None
    return dx_or_none, [None] * n_xa, [None] * n_quantized, d_lora, [None] * n_tensors, None, None


frozen_matmul.register_autograd(_differentiate, setup_context=_save)


# ---- layers ----


class Cut(NamedTuple):
    """Number `part` of `parts` equal ones along a dimension of a weight [out_features, in_features].

    The others are on the ranks of the process group named `group`.
    """

    dim: int
    part: int
    parts: int
    group: str

    def of(self, blocks: Tensor, rows: int) -> Tensor:
        """The part [own rows, own blocks of a row] of a tensor [rows * blocks of a row], as a view."""
        return blocks.view(rows, -1).chunk(self.parts, self.dim)[self.part]


class FrozenLinear(nn.Module, ABC):
    """y = x W^T + b with a quantized W that gets no gradient. One layer is quantized without knowing of the others.

    What is as large as W is a parameter: FSDP shards parameters, and leaves buffers whole on every rank.

    Attributes:
        kind: of its frozen weight.
        compute_dtype: of the matmuls' results, and of `dense`.
        bias: compute_dtype [out_features], or None.
        cut: which part of the layer this rank of a tensor group has; `in_features` and `out_features` are those of the
            part. None: all of it.
    """

    in_features: int
    out_features: int
    kind: str
    compute_dtype: torch.dtype
    bias: nn.Parameter | None
    cut: Cut | None = None

    @abstractmethod
    def allocate(self, device: torch.device) -> None:
        """Make the tensors of the weight, empty, for the layer's sizes; the bias stays as it is."""

    @abstractmethod
    def load(self, stored: Mapping[str, StoredTensor | Tensor], name: str) -> None:
        """Take the weight, called `name`, of a checkpoint: a hook of `load_weights`. It may be a collective call."""

    @abstractmethod
    def frozen_weight(self) -> FrozenWeight:
        """The weight as the operators take it."""

    def part_of(self, dense: Tensor | StoredTensor, rows: slice) -> Tensor:
        """Those rows of the layer's part of the whole weight; a new tensor where they are read from a file."""
        first_row, first_column = self.origin
        columns = slice(first_column, first_column + self.in_features)
        return dense[slice(first_row + rows.start, first_row + rows.stop), columns]

    @property
    def origin(self) -> tuple[int, int]:
        """The first row and column of the whole weight that this rank has."""
        if self.cut is None:
            return 0, 0
        if self.cut.dim == 0:
            return self.cut.part * self.out_features, 0
        return 0, self.cut.part * self.in_features

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The weight that the layer stands for: a new [out_features, in_features] in the compute dtype."""
        return self.frozen_weight().dense(self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; returns [..., out_features]."""
        return grouped_matmul(x, [self.frozen_weight()], [local_part(self.bias)])[0]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.kind}"


def load_hooks(model: nn.Module) -> dict[str, Hook]:
    """For `load_weights(convert=...)`: what quantizes each frozen weight as it is read, or takes it as it was quantized."""
    frozen = ((name, m) for name, m in model.named_modules() if isinstance(m, FrozenLinear))
    return {f"{name}.weight": partial(layer.load, name=f"{name}.weight") for name, layer in frozen}


def linear_names(model: nn.Module, *, head: bool) -> list[str]:
    """Full names of the linear layers, dense and quantized, in the model's order; with the output layer if `head`."""
    from transformers import PreTrainedModel

    left_out = model.get_output_embeddings() if isinstance(model, PreTrainedModel) and not head else None
    linear = (nn.Linear, FrozenLinear)
    return [name for name, m in model.named_modules() if isinstance(m, linear) and m is not left_out]


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model; tied ones count once, and a quantized weight as the dense one that it stands for."""
    count = sum(p.numel() for p in model.parameters())
    for layer in model.modules():
        if isinstance(layer, FrozenLinear):
            stored = [p.numel() for name, p in layer.named_parameters(recurse=False) if name.endswith("weight")]
            parts = layer.cut.parts if layer.cut else 1
            count += layer.in_features * layer.out_features * parts - sum(stored)
    return count
