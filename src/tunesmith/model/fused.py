"""Faster, equal forwards for the modules of known families: attention, gated MLPs, norms and rotary
embeddings.

Transformers' modules read their input once for each of q, k and v, again for gate and up, and keep
many small tensors for the backward. Here a module gets a class with another `forward`. Other
families keep Transformers' forward, and so does generation, which has a cache and no documents. The
forwards compute in the input's dtype where Transformers does, and in fp32 (fp64 for fp64 input)
where it does. Inside torch.compile they are plain formulas, which the compiler fuses better than a
hand-written backward.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.model.architectures import ARCHITECTURES, Architecture
from tunesmith.model.attention import attend
from tunesmith.model.documents import Documents

Project = Callable[[Tensor, Sequence[nn.Module]], Sequence[Tensor]]


def separately(x: Tensor, linears: Sequence[nn.Module]) -> Sequence[Tensor]:
    """Project one input by several layers, one after the other."""
    return [linear(x) for linear in linears]


def fuse_modules(model: nn.Module, *, project: Project = separately) -> int:
    """Give the modules of known families their faster forward, in place; returns how many were
    changed.

    `project` computes several linear layers of one input; `adapter.lora.project` reads x once for
    all adapters.
    """
    count = 0
    module: Any
    for module in model.modules():
        row = _fused_classes().get(type(module))
        if row is None:
            continue
        mixin, family = row
        if mixin is FusedMLP and module.config.hidden_act != "silu":
            continue
        add_mixin(module, mixin)
        module.project = project
        module.family = family
        count += 1
    return count


@cache
def _fused_classes() -> dict[type, tuple[type[nn.Module], Architecture]]:
    """Transformers' class -> the mixin with the faster forward, and its family."""
    mixins: dict[type, tuple[type[nn.Module], Architecture]] = {}
    for name, family in ARCHITECTURES.items():
        if family.fused:
            classes = vars(importlib.import_module(f"transformers.models.{name}.modeling_{name}"))
            mixins[classes[f"{family.fused}Attention"]] = (FusedAttention, family)
            mixins[classes[f"{family.fused}MLP"]] = (FusedMLP, family)
            mixins[classes[f"{family.fused}RMSNorm"]] = (FusedNorm, family)
    return mixins


def add_mixin(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Put `mixin` before the module's own class: parameters, names and hooks stay as they are.

    Layers of one class share a graph of torch.compile; functions bound on the instances would be
    compiled one by one.
    """
    first: Any = mixin
    second: Any = type(module)
    module.__class__ = _mixed_class(first, second)


@cache
def _mixed_class(mixin: Any, base: Any) -> Any:
    return type(f"{mixin.__name__}{base.__name__}", (mixin, base), {})


class FusedAttention(nn.Module):
    """q, k and v from one reading of the input, rotated, and attended by document."""

    group = ("q_proj", "k_proj", "v_proj")  # layers of one input
    family: Architecture
    project: Project
    # Of Transformers' class. A norm or window is there where the family has one.
    config: Any
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    head_dim: int
    scaling: float
    sliding_window: int | None
    attention_dropout: float
    use_rope: bool

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        *,
        documents: Documents | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: [1, n, width].

        Without documents (generation, eager) it is the forward of Transformers' class.
        """
        if documents is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, **others)
        if position_embeddings is None:
            others["documents"] = documents
            return super().forward(hidden_states, position_embeddings, attention_mask, **others)
        family = self.family
        layers = (self.q_proj, self.k_proj, self.v_proj)
        projected = self.project(hidden_states.flatten(0, -2), layers)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)
        if family.head_norms == "head":
            q = self.q_norm(q)
            k = self.k_norm(k)
        if not family.rope_by_layer or self.use_rope:
            cos, sin = (t.flatten(0, -2) for t in position_embeddings)
            q = rotate(q, cos, sin)
            k = rotate(k, cos, sin)
        window = None
        if family.window == "all":
            window = self.config.sliding_window
        elif family.window != "none":
            window = self.sliding_window
        dropout = self.attention_dropout if self.training else 0.0
        out = attend(q, k, v, documents, scale=self.scaling, window=window, dropout=dropout)
        return self.o_proj(out.flatten(1)).view_as(hidden_states), None


class FusedMLP(nn.Module):
    """A gated MLP whose gate and up come from one reading of the input."""

    group = ("gate_proj", "up_proj")
    project: Project
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.project(x, (self.gate_proj, self.up_proj))
        return self.down_proj(swiglu(gate, up))


class FusedNorm(nn.Module):
    """An RMSNorm that keeps its input and one number a row for the backward."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, local_part(self.weight), self.variance_epsilon)


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
