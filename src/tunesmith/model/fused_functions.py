"""Rotary embedding, SwiGLU and RMSNorm, each with a backward of its own that keeps little.

Inside torch.compile they are plain formulas, which the compiler fuses better than a hand-written
backward. They compute in the input's dtype where Transformers does, and in fp32 (fp64 for fp64
input) where it does.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864) in Transformers' layout, halves instead
    of pairs.

    x: [n, heads, d]; cos, sin: [n, d], both halves alike.
    """
    cos = cos.unsqueeze(1)
    sin = sin.unsqueeze(1)
    if torch.compiler.is_compiling():
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate_halves(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # The inverse of a rotation is its transpose.
        return _rotate_halves(grads[0], cos, -sin), None, None


def _rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202); keeps the two inputs only."""
    if torch.compiler.is_compiling():
        return F.silu(gate) * up
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        silu = F.silu(gate)
        d_up = grads[0] * silu
        d_silu = torch.mul(grads[0], up, out=silu)
        return torch.ops.aten.silu_backward(d_silu, gate), d_up


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps), the mean and root in fp32.

    Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    if torch.compiler.is_compiling():
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight * (wide * scale).to(x.dtype)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        wide = x.to(scale.dtype) * scale  # the normed input
        d_wide = (grads[0] * weight).to(scale.dtype)
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (grads[0].to(scale.dtype) * wide).flatten(0, -2).sum(0).to(weight.dtype)
        inner = (d_wide * wide).mean(-1, keepdim=True)
        dx = d_wide.addcmul_(wide, inner, value=-1).mul_(scale).to(x.dtype)
        return dx, d_weight, None
