"""Faster, equal forwards for the modules of known families: attention, gated MLPs, norms and rotary embeddings.

Transformers' modules read their input once for each of q, k and v, again for gate and up, and keep many small tensors
for the backward. Here a module gets a class with another `forward`. Other families keep Transformers' forward, and so
does generation, which has a cache and no documents. The forwards compute in the input's dtype where Transformers does,
and in fp32 (fp64 for fp64 input) where it does. Inside torch.compile they are plain formulas, which the compiler fuses
better than a hand-written backward.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.model.architectures import ARCHITECTURES, Architecture
from tunesmith.model.attention import attend
from tunesmith.model.documents import Documents
from tunesmith.sharded import local_part

Project = Callable[[Tensor, Sequence[nn.Module]], Sequence[Tensor]]


def separately(x: Tensor, linears: Sequence[nn.Module]) -> Sequence[Tensor]:
    """Project one input by several layers, one after the other."""
    return [linear(x) for linear in linears]


def fuse_modules(model: nn.Module, *, project: Project = separately) -> int:
    """Give the modules of known families their faster forward, in place; returns how many were changed.

    `project` computes several linear layers of one input; `adapter.lora.project` reads x once for all adapters.
    """
    count = 0
    module: Any
    for module in model.modules():
        mixin, family = _fused_classes().get(type(module), (None, None))
        if mixin is None or (mixin is FusedMLP and module.config.hidden_act != "silu"):
            continue
        add_mixin(module, mixin)
        module.project, module.family = project, family
        count += 1
    return count


@cache
def _fused_classes() -> dict[type, tuple[type[nn.Module], Architecture]]:
    """Transformers' class -> the mixin with the faster forward, and its family."""
    found: dict[type, tuple[type[nn.Module], Architecture]] = {}
    for name, family in ARCHITECTURES.items():
        if family.fused:
            classes = vars(importlib.import_module(f"transformers.models.{name}.modeling_{name}"))
            for ending, mixin in (("Attention", FusedAttention), ("MLP", FusedMLP), ("RMSNorm", FusedNorm)):
                found[classes[family.fused + ending]] = (mixin, family)
    return found


def add_mixin(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Put `mixin` before the module's own class: parameters, names and hooks stay as they are.

    Layers of one class share a graph of torch.compile; functions bound on the instances would be compiled one by one.
    """
    first: Any = mixin
    second: Any = type(module)
    module.__class__ = _mixed_class(first, second)


@cache
def _mixed_class(mixin: Any, own: Any) -> Any:
    return type(f"{mixin.__name__}{own.__name__}", (mixin, own), {})


class FusedAttention(nn.Module):
    """q, k and v from one reading of the input, rotated, and attended by document."""

    group = ("q_proj", "k_proj", "v_proj")  # layers of one input
    family: Architecture
    project: Project

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        *,
        documents: Documents | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: [1, n, width]. Without documents (generation, eager) it is the module's own forward."""
        own: Any = self
        if documents is None or position_embeddings is None:
            given = others if documents is None else {"documents": documents, **others}
            return super().forward(hidden_states, position_embeddings, attention_mask, **given)
        projected = self.project(hidden_states.flatten(0, -2), (own.q_proj, own.k_proj, own.v_proj))
        q, k, v = (y.unflatten(-1, (-1, own.head_dim)) for y in projected)
        if self.family.head_norms == "head":
            q, k = own.q_norm(q), own.k_norm(k)
        if not self.family.rope_by_layer or own.use_rope:
            cos, sin = (t.flatten(0, -2) for t in position_embeddings)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        window = None
        if self.family.window != "none":
            window = own.config.sliding_window if self.family.window == "all" else own.sliding_window
        dropout = own.attention_dropout if self.training else 0.0
        out = attend(q, k, v, documents, scale=own.scaling, window=window, dropout=dropout)
        return own.o_proj(out.flatten(1)).view_as(hidden_states), None


class FusedMLP(nn.Module):
    """A gated MLP whose gate and up come from one reading of the input."""

    group = ("gate_proj", "up_proj")
    project: Project

    def forward(self, x: Tensor) -> Tensor:
        own: Any = self
        gate, up = self.project(x, (own.gate_proj, own.up_proj))
        return own.down_proj(swiglu(gate, up))


class FusedNorm(nn.Module):
    """An RMSNorm that keeps its input and one number a row for the backward."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        own: Any = self
        return rms_norm(hidden_states, local_part(own.weight), own.variance_epsilon)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864) in Transformers' layout, halves instead of pairs.

    x: [n, heads, d]; cos, sin: [n, d], both halves alike.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if torch.compiler.is_compiling():
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, -sin), None, None  # the inverse of a rotation is its transpose


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
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
        return torch.ops.aten.silu_backward(torch.mul(grads[0], up, out=silu), gate), d_up


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, arXiv:1910.07467), the mean and root in fp32."""
    if torch.compiler.is_compiling():
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
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
        return d_wide.addcmul_(wide, inner, value=-1).mul_(scale).to(x.dtype), d_weight, None
