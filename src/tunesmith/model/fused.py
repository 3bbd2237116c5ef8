"""Faster equal parts for blocks that are known: attention's projections, gated MLPs, norms and rotary embeddings.

Transformers' blocks read their input once for each of q, k and v, again for gate and up, and leave many small tensors
for the backward. Here a module is given a class with another `forward`: parameters, names and hooks stay as they are,
every other model keeps the plain path, and so does generation, which has a cache and no documents.

The parts compute in the input's dtype where Transformers does, and in fp32 (fp64 for fp64 input) where it does. Inside
torch.compile they are written as plain formulas, which the compiler fuses better than it does somebody's backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralMLP, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm
from transformers.models.smollm3.modeling_smollm3 import SmolLM3Attention, SmolLM3MLP, SmolLM3RMSNorm

from tunesmith.model.attention import attend
from tunesmith.model.documents import Documents

Project = Callable[[Tensor, Sequence[nn.Module]], Sequence[Tensor]]


@dataclass(frozen=True)
class AttentionVariant:
    """What one attention class does beyond Llama's.

    Attributes:
        qk_norm: q and k are normed over each head's width before the rotation (Qwen 3).
        window: the layer's sliding window, from the module; None sees everything.
        rotated: whether this layer rotates q and k at all (SmolLM 3 leaves some out).
    """

    qk_norm: bool = False
    window: Callable[[Any], int | None] = lambda module: None
    rotated: Callable[[Any], bool] = lambda module: True


def _own_window(module: Any) -> int | None:
    window: int | None = module.sliding_window
    return window


ATTENTION: dict[type, AttentionVariant] = {
    LlamaAttention: AttentionVariant(),
    MistralAttention: AttentionVariant(window=lambda module: module.config.sliding_window),
    Qwen2Attention: AttentionVariant(window=_own_window),
    Qwen3Attention: AttentionVariant(qk_norm=True, window=_own_window),
    SmolLM3Attention: AttentionVariant(window=_own_window, rotated=lambda module: bool(module.use_rope)),
}
MLPS = (LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MLP, SmolLM3MLP)
NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, SmolLM3RMSNorm)


def separately(x: Tensor, linears: Sequence[nn.Module]) -> Sequence[Tensor]:
    """The plain way to project one input by several layers."""
    return [linear(x) for linear in linears]


def fuse_modules(model: nn.Module, *, project: Project = separately) -> int:
    """Give known blocks their faster forward, in place.

    Args:
        model: any model; blocks of other families are left alone.
        project: computes several linear layers of one input; `adapter.lora.project` reads x once for all adapters.

    Returns:
        how many modules were changed.
    """
    count = 0
    module: Any
    for module in model.modules():
        part = _part(module)
        if part is not None:
            mix_in(module, part)
            module.project = project
            count += 1
    return count


def _part(module: Any) -> type[nn.Module] | None:
    if type(module) in ATTENTION:
        return FusedAttention
    if type(module) in MLPS and module.config.hidden_act == "silu":
        return FusedMLP
    return FusedNorm if type(module) in NORMS else None


def mix_in(module: nn.Module, part: type[nn.Module]) -> None:
    """Let `module` be of a class that has `part` before its own: parameters, names and hooks stay as they are.

    A class instead of a function bound on the instance: torch.compile shares one graph among the layers of a model
    when these are of one class, and would compile each anew for a function of its own.
    """
    first: Any = part
    second: Any = type(module)
    module.__class__ = _class_of(first, second)


@cache
def _class_of(part: Any, own: Any) -> Any:
    return type(f"{part.__name__}{own.__name__}", (part, own), {"kind": ATTENTION.get(own)})


class FusedAttention(nn.Module):
    """q, k and v of one reading, rotated, and attended by document."""

    kind: AttentionVariant
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
            given: dict[str, Any] = {} if documents is None else {"documents": documents}
            result: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, position_embeddings, attention_mask, **given, **others
            )
            return result
        projected = self.project(hidden_states.flatten(0, -2), (own.q_proj, own.k_proj, own.v_proj))
        q, k, v = (y.unflatten(-1, (-1, own.head_dim)) for y in projected)
        if self.kind.qk_norm:
            q, k = own.q_norm(q), own.k_norm(k)
        if self.kind.rotated(self):
            cos, sin = (t.flatten(0, -2) for t in position_embeddings)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        dropout = own.attention_dropout if self.training else 0.0
        out = attend(q, k, v, documents, scale=own.scaling, window=self.kind.window(self), dropout=dropout)
        return own.o_proj(out.flatten(1)).view_as(hidden_states), None


class FusedMLP(nn.Module):
    """A gated MLP whose gate and up are made of one reading."""

    project: Project

    def forward(self, x: Tensor) -> Tensor:
        own: Any = self
        gate, up = self.project(x, (own.gate_proj, own.up_proj))
        out: Tensor = own.down_proj(swiglu(gate, up))
        return out


class FusedNorm(nn.Module):
    """An RMSNorm that keeps its input and one number a row for the backward."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        own: Any = self
        return rms_norm(hidden_states, own.weight, own.variance_epsilon)


# The parts


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864) in Transformers' layout, halves instead of pairs.

    Args:
        x: [n, heads, d]; cos, sin: [n, d], both halves alike.
    """
    if torch.compiler.is_compiling():
        return x * cos.unsqueeze(1) + torch.cat(
            (-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1
        ) * sin.unsqueeze(1)
    out: Tensor = _Rotate.apply(x, cos.unsqueeze(1), sin.unsqueeze(1))
    return out


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
    out: Tensor = _SwiGLU.apply(gate, up)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        d_up = grads[0] * silu
        # silu'(g) = s (1 + g (1 - s)) = s + silu(g) (1 - s)
        slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
        return (grads[0] * up).mul_(slope), d_up


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, arXiv:1910.07467), the mean and root in fp32."""
    if torch.compiler.is_compiling():
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    out: Tensor = _RMSNorm.apply(x, weight, eps)
    return out


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
