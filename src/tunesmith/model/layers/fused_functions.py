"""Rotary embedding, gated activations and RMSNorm with memory-efficient backward functions.

Inside torch.compile, the functions use plain formulas, because the compiler fuses these better than
a custom backward. The computation uses the same precision as Transformers: the dtype of the input,
or fp32 (fp64 for fp64 inputs) where Transformers uses fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.distributed.torch_private import SavingContext


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, pairs: bool = False) -> Tensor:
    """Apply the rotary embedding (Su et al. 2021, arXiv:2104.09864) to the first `width` channels.

    Args:
        x: [n, heads, d].
        cos, sin: [n, width]. Each angle occurs twice, at the two channels that it rotates.
        pairs: if True, rotate pairs of neighboring channels, as in the paper. If False, rotate
            channel i of the first half with channel i of the second half, as most models of
            Transformers do.

    Returns:
        [n, heads, d] in the dtype of x.
    """
    cos = cos.unsqueeze(1)
    sin = sin.unsqueeze(1)
    if torch.compiler.is_compiling():
        return _rotate_formula(x, cos, sin, pairs)
    return _Rotate.apply(x, cos, sin, pairs)


class _RotateContext(SavingContext):
    pairs: bool


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _RotateContext, x: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.pairs = pairs
        return _rotate_parts(x, cos, sin, pairs)

    @staticmethod
    def backward(ctx: _RotateContext, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        # The gradient is multiplied by the transpose of the rotation matrix: sin becomes -sin.
        return _rotate_parts(grads[0], cos, -sin, ctx.pairs), None, None, None


def _rotate_formula(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
    width = cos.shape[-1]
    rotated = x[..., :width]
    # (a, b) -> (a cos - b sin, b cos + a sin)
    if pairs:
        a = rotated[..., ::2]
        b = rotated[..., 1::2]
        half_rotated = torch.stack((-b, a), -1).flatten(-2)
    else:
        # The channels a and b of a pair are width / 2 apart.
        a = rotated[..., : width // 2]
        b = rotated[..., width // 2 :]
        half_rotated = torch.cat((-b, a), -1)
    out = rotated * cos + half_rotated * sin
    return _with_rest(out.to(x.dtype), x)


def _with_rest(out: Tensor, x: Tensor) -> Tensor:
    """Append the channels of x after `width`, which partial rotary embedding does not change."""
    width = out.shape[-1]
    if width == x.shape[-1]:
        return out
    return torch.cat((out, x[..., width:]), -1)


def _rotate_parts(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
    width = cos.shape[-1]
    first = slice(width // 2)
    second = slice(width // 2, None)
    if pairs:
        first = slice(0, None, 2)
        second = slice(1, None, 2)
    rotated = x[..., :width]
    # Compute a cos - b sin in `first` and b cos + a sin in `second`, in place on one tensor.
    out = rotated * cos
    out[..., first].addcmul_(rotated[..., second], sin[..., first], value=-1)
    out[..., second].addcmul_(rotated[..., first], sin[..., second])
    return _with_rest(out.to(x.dtype), x)  # cos and sin can be fp32


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) * up (Shazeer 2020, arXiv:2002.05202). Only the two inputs are saved."""
    if torch.compiler.is_compiling():
        return F.silu(gate) * up
    return _Gated.apply(gate, up, False)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute gelu(gate) * up with the tanh approximation. Only the two inputs are saved."""
    if torch.compiler.is_compiling():
        return F.gelu(gate, approximate="tanh") * up
    return _Gated.apply(gate, up, True)


class _GatedContext(SavingContext):
    gelu: bool


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _GatedContext, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        # Multiply in place, because `_activate` returns a new tensor.
        return _activate(gate, gelu).mul_(up)

    @staticmethod
    def backward(ctx: _GatedContext, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        # Recompute the activation, because the forward saved only gate and up.
        activated = _activate(gate, ctx.gelu)
        d_up = grads[0] * activated
        # Write d_activated to the memory of `activated`, which is no longer needed.
        d_activated = torch.mul(grads[0], up, out=activated)
        if ctx.gelu:
            d_gate = torch.ops.aten.gelu_backward(d_activated, gate, approximate="tanh")
        else:
            d_gate = torch.ops.aten.silu_backward(d_activated, gate)
        return d_gate, d_up, None


def _activate(gate: Tensor, gelu: bool) -> Tensor:
    if gelu:
        return F.gelu(gate, approximate="tanh")
    return F.silu(gate)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, wide: bool = False, offset: float = 0.0
) -> Tensor:
    """Compute (offset + weight) * x / sqrt(mean(x^2) + eps), with the mean and the root in fp32.

    Reference: Zhang and Sennrich 2019, arXiv:1910.07467.

    Args:
        wide: if True, multiply by the weight in fp32 and round once (OLMo 2, Gemma). If False,
            round the normalized x to its dtype before the multiplication (Llama).
        offset: used only with `wide`. Gemma uses 1.0, because its weights are centered at zero.
    """
    if not torch.compiler.is_compiling():
        return _RMSNorm.apply(x, weight, eps, wide, offset)
    normed, scale = _normalize(x, eps)
    if wide:
        factor = weight.to(scale.dtype) + offset
        return (normed * factor).to(x.dtype)
    return weight * normed.to(x.dtype)


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x * scale and scale = 1 / sqrt(mean(x^2) + eps), [..., 1]. Both are in fp32."""
    x_wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return x_wide * scale, scale


class _NormContext(SavingContext):
    wide: bool
    offset: float


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _NormContext, x: Tensor, weight: Tensor, eps: float, wide: bool, offset: float
    ) -> Tensor:
        normed, scale = _normalize(x, eps)
        # Save only one number per row. The backward recomputes the normalized row.
        ctx.save_for_backward(x, weight, scale)
        ctx.wide = wide
        ctx.offset = offset
        if wide:
            factor = weight.to(scale.dtype) + offset
            return normed.mul_(factor).to(x.dtype)
        return normed.to(x.dtype).mul_(weight)

    @staticmethod
    def backward(
        ctx: _NormContext, *grads: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, weight, scale = ctx.saved_tensors
        dy = grads[0]
        # [n, width] in fp32
        normed = x.to(scale.dtype) * scale
        if ctx.wide:
            factor = weight.to(scale.dtype) + ctx.offset
            d_normed = dy.to(scale.dtype) * factor
        else:
            d_normed = (dy * weight).to(scale.dtype)
        d_weight = None
        if ctx.needs_input_grad[1]:
            # Sum over all positions in fp32 and round once.
            d_weight = (dy.to(scale.dtype) * normed).flatten(0, -2).sum(0)
            d_weight = d_weight.to(weight.dtype)
        # Let r = 1 / sqrt(mean(x^2) + eps) and normed = r * x. Then dx = r * (d_normed - normed *
        # mean(d_normed * normed)).
        inner = (d_normed * normed).mean(-1, keepdim=True)
        dx = d_normed.addcmul_(normed, inner, value=-1).mul_(scale).to(x.dtype)
        return dx, d_weight, None, None, None
