"""Rotary embedding, gated activations and RMSNorm, each with a backward of its own that keeps
little.

Inside torch.compile they are plain formulas, which the compiler fuses better than a hand-written
backward. They compute in the input's dtype where Transformers does, and in fp32 (fp64 for fp64
input) where it does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.distributed.torch_private import SavingContext


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, pairs: bool = False) -> Tensor:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864) of the first `width` channels of a head.

    Args:
        x: [n, heads, d].
        cos, sin: [n, width]. Each angle occurs twice, where the two channels are that it turns.
        pairs: an angle turns neighbors, as in the paper; else a channel of the first half and one
            of the second, as in most models of Transformers.

    Returns [n, heads, d] in x's dtype.
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
        # The inverse of a rotation is its transpose; also where it scales.
        return _rotate_parts(grads[0], cos, -sin, ctx.pairs), None, None, None


def _rotate_formula(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
    width = cos.shape[-1]
    rotated = x[..., :width]
    if pairs:
        half_rotated = torch.stack((-rotated[..., 1::2], rotated[..., ::2]), -1).flatten(-2)
    else:
        # (a, b) -> (a cos - b sin, b cos + a sin), with a and b half a width apart.
        half = width // 2
        half_rotated = torch.cat((-rotated[..., half:], rotated[..., :half]), -1)
    out = (rotated * cos + half_rotated * sin).to(x.dtype)
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
    # In place on one tensor: first = a cos - b sin, second = b cos + a sin.
    out = rotated * cos
    out[..., first].addcmul_(rotated[..., second], sin[..., first], value=-1)
    out[..., second].addcmul_(rotated[..., first], sin[..., second])
    out = out.to(x.dtype)  # some models have cos and sin in fp32
    if width == x.shape[-1]:
        return out
    # Channels past the rotary width (partial rotary) pass unchanged.
    return torch.cat((out, x[..., width:]), -1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202); keeps the two inputs only."""
    if torch.compiler.is_compiling():
        return F.silu(gate) * up
    return _Gated.apply(gate, up, False)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, by the formula with tanh (same paper); keeps the two inputs only."""
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
        # `mul_`: the activation is a new tensor that nobody else reads.
        return _activate(gate, gelu).mul_(up)

    @staticmethod
    def backward(ctx: _GatedContext, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        # Computed again: the forward saved gate and up alone.
        activated = _activate(gate, ctx.gelu)
        d_up = grads[0] * activated
        # Its memory is free now: d_activated takes it.
        d_activated = torch.mul(grads[0], up, out=activated)
        if ctx.gelu:
            d_gate = torch.ops.aten.gelu_backward(d_activated, gate, approximate="tanh")
        else:
            d_gate = torch.ops.aten.silu_backward(d_activated, gate)
        return d_gate, d_up, None


def _activate(gate: Tensor, gelu: bool) -> Tensor:
    return F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, wide: bool = False, offset: float = 0.0
) -> Tensor:
    """(offset + weight) * x / sqrt(mean(x^2) + eps), the mean and root in fp32.

    Zhang and Sennrich 2019, arXiv:1910.07467.

    Args:
        wide: multiply in fp32 and round once (OLMo 2, Gemma); else the normed x is rounded to its
            own dtype before it meets the weight (Llama).
        offset: with `wide`; 1.0 of weights that are centered at zero (Gemma).
    """
    if not torch.compiler.is_compiling():
        return _RMSNorm.apply(x, weight, eps, wide, offset)
    x_wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # [..., 1] in fp32
    scale = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    if wide:
        return (x_wide * scale * (weight.to(scale.dtype) + offset)).to(x.dtype)
    return weight * (x_wide * scale).to(x.dtype)


class _NormContext(SavingContext):
    wide: bool
    offset: float


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _NormContext, x: Tensor, weight: Tensor, eps: float, wide: bool, offset: float
    ) -> Tensor:
        x_wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
        # One number a row; the normed row is computed again from it.
        ctx.save_for_backward(x, weight, scale)
        ctx.wide = wide
        ctx.offset = offset
        normed = x_wide * scale
        if wide:
            return normed.mul_(weight.to(scale.dtype) + offset).to(x.dtype)
        return normed.to(x.dtype).mul_(weight)

    @staticmethod
    def backward(
        ctx: _NormContext, *grads: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, weight, scale = ctx.saved_tensors
        # [n, width] in fp32
        normed = x.to(scale.dtype) * scale
        if ctx.wide:
            d_normed = grads[0].to(scale.dtype) * (weight.to(scale.dtype) + ctx.offset)
        else:
            d_normed = (grads[0] * weight).to(scale.dtype)
        d_weight = None
        if ctx.needs_input_grad[1]:
            # The sum over all positions is in fp32, and rounded once.
            d_weight = (grads[0].to(scale.dtype) * normed).flatten(0, -2).sum(0).to(weight.dtype)
        # With r = 1 / sqrt(mean(x^2) + eps) and normed = r x:
        # dx = r * (d_normed - normed * mean(d_normed * normed))
        inner = (d_normed * normed).mean(-1, keepdim=True)
        dx = d_normed.addcmul_(normed, inner, value=-1).mul_(scale).to(x.dtype)
        return dx, d_weight, None, None, None
