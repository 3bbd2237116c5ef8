"""Matmuls of one input with several frozen weights and LoRA updates.

x is read once, and each y is written once:

    xa  = x A^T                  A: the A's of all layers stacked, [sum of ranks, in]
    y_i = x W_i^T + xa_i B_i^T

The backward pass saves x and xa but no dense weights, and accumulates dx in place. There are two
code paths with the same arithmetic. Eager mode uses an autograd function, because an operator takes
0.6 ms longer for three layers on a CPU. torch.compile uses one opaque operator, because the
compiler's patterns would change the order of the sums (see `Format.forward_matmul`). xa is an input
of both paths. If the operator returned xa, activation checkpointing would run the last matmul of a
layer again only to get xa.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.formats.base import FrozenWeight, Update, find_format


def grouped_matmul(
    x: Tensor,
    weights: Sequence[FrozenWeight],
    biases: Sequence[Tensor | None],
    lora_A: Sequence[Tensor] = (),
    lora_B: Sequence[Tensor] = (),
) -> Sequence[Tensor]:
    """Compute y_i = x W_i^T + b_i + (x A_i^T) B_i^T for each layer i. W and b get no gradient.

    Args:
        x: [..., in].
        weights: weights with the same encoding.
        biases: [out_i] each, or None.
        lora_A: [rank_i, in] each, in any dtype. They are converted to the dtype of x. Empty if
            there is no update.
        lora_B: [out_i, rank_i] each, multiplied by the layer's scaling.

    Returns:
        [..., out_i] each, in the dtype of x.
    """
    tensors = [tensor for weight in weights for tensor in weight.tensors]
    # Do not accept DTensors, because a matmul with a DTensor would insert collectives.
    assert all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
    # The kernels need matrices: [n, in].
    rows = x.flatten(0, -2)
    kind = weights[0].format
    encoding = kind.encoding
    widths = [weight.shape[0] for weight in weights]
    lora = []
    xa = []
    if lora_A:
        # Concatenate the A's to one matrix [sum of ranks, in], so that x is read once for all of
        # them.
        lora = [torch.cat(list(lora_A)).to(x.dtype), *(b.to(x.dtype) for b in lora_B)]
        # Detach x and A, because the backward of the operator computes their gradients.
        xa = [rows.detach() @ lora[0].detach().T]

    is_compiling = torch.compiler.is_compiling()
    outputs: Sequence[Tensor] = ()
    # Generation has no autograd graph, so a kernel without a backward can be used.
    if not torch.is_grad_enabled() and not is_compiling:
        outputs = _few_rows(rows, weights, xa, lora)
    if not outputs:
        quantized = kind.quantize_input(rows.detach())
        if is_compiling:
            # In a traced graph, call the operator, whose arguments can be lists of tensors.
            outputs = frozen_matmul(rows, xa, quantized, lora, tensors, encoding, widths)
        else:
            # Pass the LoRA tensors one by one, because autograd does not track tensors in lists.
            outputs = _FrozenMatmul.apply(rows, xa, quantized, tensors, encoding, widths, *lora)

    results = []
    for y, bias in zip(outputs, biases, strict=True):
        result = y + bias if bias is not None else y
        results.append(result.unflatten(0, x.shape[:-1]))
    return results


# ---- arithmetic. `lora` is [stacked A, B_1, B_2, ...] and `xa` is [x A^T], or both are empty


def _rebuild_weights(
    encoding: str, tensors: list[Tensor], widths: list[int], in_features: int
) -> list[FrozenWeight]:
    kind = find_format(encoding)
    # All layers have the same encoding, and therefore the same number of tensors.
    per_layer = len(tensors) // len(widths)
    weights = []
    for i, width in enumerate(widths):
        layer_tensors = tensors[i * per_layer : (i + 1) * per_layer]
        weights.append(FrozenWeight(kind, layer_tensors, (width, in_features)))
    return weights


def _split_by_layer(xa: Tensor, lora_B: Sequence[Tensor]) -> Sequence[Tensor]:
    """Split x A^T, which has the columns of all layers, into x A_i^T for each layer."""
    return xa.split([b.shape[1] for b in lora_B], 1)


def _few_rows(
    x: Tensor, weights: Sequence[FrozenWeight], xa: Sequence[Tensor], lora: Sequence[Tensor]
) -> list[Tensor]:
    """Return the outputs if the weights have a kernel for few rows, else [].

    The outputs have no gradients, because the kernel has no backward.
    """
    products = []
    for weight in weights:
        product = weight.format.few_rows_matmul(weight, x)
        if product is None:
            return []
        products.append(product)
    if lora:
        lora_B = lora[1:]
        parts = _split_by_layer(xa[0], lora_B)
        for product, part, b in zip(products, parts, lora_B, strict=True):
            # Add in place, because the kernel has returned a new tensor.
            product.addmm_(part, b.T)
    return products


def _forward(
    x: Tensor,
    xa: list[Tensor],
    quantized: list[Tensor],
    lora: list[Tensor],
    tensors: list[Tensor],
    encoding: str,
    widths: list[int],
) -> list[Tensor]:
    weights = _rebuild_weights(encoding, tensors, widths, x.shape[1])
    updates: list[Update] = [None] * len(weights)
    if lora:
        lora_B = lora[1:]
        updates = [*zip(_split_by_layer(xa[0], lora_B), lora_B, strict=True)]

    return [
        weight.format.forward_matmul(weight, x, quantized, update)
        for weight, update in zip(weights, updates, strict=True)
    ]


def _backward(
    dys: list[Tensor],
    quantized: list[Tensor],
    saved: list[Tensor],
    lora: list[Tensor],
    tensors: list[Tensor],
    encoding: str,
    in_features: int,
    needs_dx: bool,
) -> list[Tensor]:
    """Compute the gradients of x and of `lora`. The gradient of x is empty unless `needs_dx`.

    Args:
        quantized: result of `quantize_gradients`. Empty unless `needs_dx`.
        saved: [x, xa]. Empty if there are no LoRA updates.
    """
    update: Update = None
    d_lora = []
    if lora:
        x, xa = saved
        a, *lora_B = lora
        # With y_i = x W_i^T + xa_i B_i^T and xa = x A^T, the gradients are:
        # d_xa_i = dy_i B_i     [n, rank_i], concatenated to [n, sum of ranks]
        # dA     = d_xa^T x     [sum of ranks, in]
        # dB_i   = dy_i^T xa_i  [out_i, rank_i]
        # dx     = sum over i of dy_i W_i, plus d_xa A
        d_xa = torch.cat([_gradient_of_xa(dy, b) for dy, b in zip(dys, lora_B, strict=True)], 1)
        d_lora.append(d_xa.T @ x)
        for dy, xa_part in zip(dys, _split_by_layer(xa, lora_B), strict=True):
            d_lora.append(gradient_of_b(dy, xa_part))
        # `backward_matmul` multiplies by the transpose of the second factor, so transpose A here.
        update = (d_xa, a.T)
    if not needs_dx:
        return [dys[0].new_empty(0), *d_lora]

    weights = _rebuild_weights(encoding, tensors, [dy.shape[1] for dy in dys], in_features)
    dx = weights[0].format.backward_matmul(weights, dys, quantized, update)
    return [dx, *d_lora]


def _gradient_of_xa(dy: Tensor, lora_B: Tensor) -> Tensor:
    """Compute dy B, the gradient of xa = x A^T. The shape is [n, rank]."""
    if dy.device.type == "cpu" and dy.dtype == torch.float32 and lora_B.shape[1] <= 8:
        # Make the columns of B contiguous. With 8 columns, MKL takes 1.7 times as long if the rows
        # are contiguous instead. With 16 to 64 columns, contiguous rows are 10 % faster.
        lora_B = lora_B.T.contiguous().T
    return dy @ lora_B


def gradient_of_b(dy: Tensor, xa: Tensor) -> Tensor:
    """Compute dy^T xa, the gradient of B. The shape is [out, rank]."""
    if dy.device.type == "cpu":
        # Transpose the result instead of dy, because oneDNN takes two to three times as long if the
        # left factor dy is transposed.
        return (xa.T @ dy).T.contiguous()
    return dy.T @ xa


# ---- saved tensors of both code paths


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save the tensors for the backward, and the number of tensors in each list argument."""
    x, xa, quantized, lora, tensors, encoding, widths = inputs
    ctx.encoding = encoding
    ctx.widths = widths
    ctx.in_features = x.shape[1]
    ctx.counts = [len(tensors_of) for tensors_of in (xa, quantized, lora, tensors)]

    if lora:
        ctx.save_for_backward(x, *xa, *lora, *tensors)
    # Without adapters, do not save x: the backward needs x only for the gradients of the adapters.
    else:
        ctx.save_for_backward(*tensors)


def _backward_inputs(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Return the arguments of `_backward`. If an output is unused, zeros replace its missing
    gradient.
    """
    tensors = list(ctx.saved_tensors)
    saved = []
    lora = []
    # Unpack the tensors in the order in which `_save` has stored them.
    lora_count = ctx.counts[2]
    if lora_count:
        saved = tensors[:2]
        lora = tensors[2 : 2 + lora_count]
        tensors = tensors[2 + lora_count :]

    # Create zeros for each missing gradient. They have as many rows as the other gradients, and the
    # width of their layer.
    like = next(grad for grad in grads if grad is not None)
    dys = []
    for dy, width in zip(grads[: len(ctx.widths)], ctx.widths, strict=True):
        if dy is None:
            dys.append(like.new_zeros(like.shape[0], width))
        else:
            dys.append(dy.contiguous())

    needs_dx = ctx.needs_input_grad[0]
    quantized = []
    if needs_dx:
        weights = _rebuild_weights(ctx.encoding, tensors, ctx.widths, ctx.in_features)
        quantized = weights[0].format.quantize_gradients(weights, dys)
    return dys, quantized, saved, lora, tensors, ctx.encoding, ctx.in_features, needs_dx


# ---- eager


class _FrozenMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        xa: list[Tensor],
        quantized: list[Tensor],
        tensors: list[Tensor],
        encoding: str,
        widths: list[int],
        *lora: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs = (x, xa, quantized, list(lora), tensors, encoding, widths)
        _save(ctx, inputs, None)
        return tuple(_forward(*inputs))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        dx, *d_lora = _backward(*_backward_inputs(ctx, grads))
        # Gradients in the order of the arguments of `forward`. dx already includes the gradient
        # through xa.
        return (dx if ctx.needs_input_grad[0] else None, *[None] * 5, *d_lora)


# ---- inside torch.compile


frozen_matmul = torch.library.custom_op("tunesmith::frozen_matmul", _forward, mutates_args=())
frozen_matmul_backward = torch.library.custom_op(
    "tunesmith::frozen_matmul_backward", _backward, mutates_args=()
)


@frozen_matmul.register_fake
def _(x, xa, quantized, lora, tensors, encoding, widths):  # type: ignore[no-untyped-def]
    return [x.new_empty(x.shape[0], width) for width in widths]


@frozen_matmul_backward.register_fake
def _(dys, quantized, saved, lora, tensors, encoding, width, needs_dx):  # type: ignore[no-untyped-def]
    shape = (dys[0].shape[0], width) if needs_dx else (0,)
    return [dys[0].new_empty(shape), *(factor.new_empty(factor.shape) for factor in lora)]


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    dx, *d_lora = frozen_matmul_backward(*_backward_inputs(ctx, grads))
    d_xa, d_quantized, _, d_tensors = ([None] * count for count in ctx.counts)
    dx_or_none = dx if ctx.needs_input_grad[0] else None
    # Gradients in the order of the arguments of `_forward`.
    return dx_or_none, d_xa, d_quantized, d_lora, d_tensors, None, None


frozen_matmul.register_autograd(_differentiate, setup_context=_save)
