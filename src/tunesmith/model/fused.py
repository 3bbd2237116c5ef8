"""Faster, equal forwards for attention, gated MLPs and norms.

Transformers' modules read their input once for each of q, k and v, again for gate and up, and keep
many small tensors for the backward. Here a module gets a class with another `forward`. It goes by
code and not by names: a module that runs the code of one of the references below counts as that
one. All others keep Transformers' forward, and so does generation, which has a cache and no
documents.
"""

import importlib
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.model.attention import attend
from tunesmith.model.documents import Documents
from tunesmith.model.fused_functions import geglu, rms_norm, rotate, swiglu
from tunesmith.model.same_code import forward_code

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Mixin = TypeVar("Mixin", bound=nn.Module)
Gated = Callable[[Tensor, Tensor], Tensor]  # a function of gate and up
Project = Callable[[Tensor, Sequence[nn.Module]], Sequence[Tensor]]


def fuse_modules(model: nn.Module, *, project: Project) -> int:
    """Give the modules that run the code of a reference their faster forward, in place; returns how
    many were changed.

    `project` computes several linear layers of one input; `adapter.lora.project` reads x once for
    all adapters.
    """
    count = 0
    for module in model.modules():
        if not _is_candidate(module):
            continue
        reference = _reference_of(type(module))  # type: ignore[arg-type]
        if reference is None:
            continue
        mixin = MIXINS.get(reference, FusedAttention)
        gated = None
        if issubclass(mixin, FusedMLP | FusedJoinedMLP):
            activation = type(module.get_submodule(mixin.activation))
            gated = _gated_activations().get(activation)
            if gated is None:
                continue
        fused = add_mixin(module, mixin)
        if isinstance(fused, FusedAttention):
            fused.form = ATTENTIONS[reference]
        if isinstance(fused, FusedAttention | FusedMLP):
            fused.project = project
        if isinstance(fused, FusedMLP | FusedJoinedMLP) and gated is not None:
            fused.gated = gated
        count += 1
    return count


@cache
def _gated_activations() -> dict[type, Gated]:
    """Class of an MLP's activation -> function of gate and up."""
    from transformers.activations import ACT2FN

    functions = {"silu": swiglu, "swish": swiglu, "gelu_pytorch_tanh": geglu}
    return {type(ACT2FN[name]): function for name, function in functions.items()}


def _is_candidate(module: nn.Module) -> bool:
    """Tell whether it has what all attentions, MLPs or norms have, so may be a copy of one.

    References are not imported for the sake of the others.
    """
    if type(module).forward.__module__.startswith(("torch.", "tunesmith.")):
        return False
    parts = dict(module.named_children()) | dict(module.named_parameters(recurse=False))
    return not parts.keys().isdisjoint(("o_proj", "down_proj", "weight"))


@cache
def _reference_of(module_class: type[nn.Module]) -> str | None:
    """The key of ATTENTIONS or MIXINS whose code the class runs; None where it runs none."""
    # None where the class's code cannot be compared.
    code = forward_code(module_class)
    if code is None:
        return None
    # The class itself and its neighbors first: most runs import no other reference.
    references = sorted(
        (*MIXINS, *ATTENTIONS),
        key=lambda reference: _module_name(reference) != module_class.__module__,
    )
    for reference in references:
        if code == _reference_code(reference):
            return reference
    return None


def _module_name(reference: str) -> str:
    family, _, _ = reference.partition(".")
    return f"transformers.models.{family}.modeling_{family}"


@cache
def _reference_code(reference: str) -> Hashable | None:
    _, _, name = reference.partition(".")
    return forward_code(vars(importlib.import_module(_module_name(reference)))[name])


def add_mixin(module: nn.Module, mixin: type[Mixin]) -> Mixin:
    """Insert `mixin` before the module's own class: parameters, names and hooks stay as they are.

    Layers of one class share a graph of torch.compile; functions bound on the instances would be
    compiled one by one.
    """
    module.__class__ = _mixed_class(mixin, type(module))  # type: ignore[arg-type]
    assert isinstance(module, mixin)
    return module


@cache
def _mixed_class(mixin: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    return type(f"{mixin.__name__}{base.__name__}", (mixin, base), {})


class AttentionForm(NamedTuple):
    """The steps that an attention takes beside projecting, rotating and attending."""

    # Norms on q and k: over one head, or over all of them.
    head_norms: Literal["none", "head", "projection"] = "none"
    # Where a bounded window is stated: for all layers, or on each of them.
    window: Literal["none", "config", "layer"] = "none"
    # Its module says by `use_rope` whether it rotates q and k.
    rope_by_layer: bool = False
    # An angle turns neighboring channels; cos and sin still have the two halves of most models.
    pairs: bool = False
    # q_proj has twice as many rows: of each head the query, and a gate on its output.
    gated: bool = False
    # Queries grow with the logarithm of the position, beyond the length of pre-training.
    grows: bool = False
    softcap: bool = False  # scores are capped
    joined: bool = False  # q, k and v are one linear layer


ATTENTIONS = {
    "llama.LlamaAttention": AttentionForm(),
    "mistral.MistralAttention": AttentionForm(window="config"),
    "ministral3.Ministral3Attention": AttentionForm(window="config", grows=True),
    "qwen2.Qwen2Attention": AttentionForm(window="layer"),
    "qwen3.Qwen3Attention": AttentionForm(head_norms="head", window="layer"),
    "qwen3_next.Qwen3NextAttention": AttentionForm(head_norms="head", gated=True),
    "smollm3.SmolLM3Attention": AttentionForm(window="layer", rope_by_layer=True),
    "gemma2.Gemma2Attention": AttentionForm(window="layer", softcap=True),
    "gemma3.Gemma3Attention": AttentionForm(head_norms="head", window="layer"),
    "olmo2.Olmo2Attention": AttentionForm(head_norms="projection"),
    "olmo3.Olmo3Attention": AttentionForm(head_norms="projection", window="layer"),
    "glm4.Glm4Attention": AttentionForm(pairs=True),
    "phi3.Phi3Attention": AttentionForm(window="config", joined=True),
}


class FusedAttention(nn.Module):
    """q, k and v from one reading of the input, rotated, and attended by document."""

    group = ("q_proj", "k_proj", "v_proj")  # layers of one input
    form: AttentionForm
    project: Project
    # Of Transformers' class; each is there where the form has it.
    config: "PretrainedConfig"
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    qkv_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    head_dim: int
    scaling: float
    num_key_value_heads: int
    sliding_window: int | None
    attn_logit_softcapping: float | None
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
        # No rotary embedding: Transformers' forward, whose attention reads the documents.
        if position_embeddings is None:
            others["documents"] = documents
            return super().forward(hidden_states, position_embeddings, attention_mask, **others)
        form = self.form
        q, k, v, gate = self._heads(hidden_states.flatten(0, -2))
        if not form.rope_by_layer or self.use_rope:
            # [1, n, width] -> [n, width]
            cos, sin = (t.flatten(0, -2) for t in position_embeddings)
            if form.pairs:
                cos = _by_pairs(cos)
                sin = _by_pairs(sin)
            # Before the growth: that is a factor on queries alone.
            k = rotate(k, cos, sin, pairs=form.pairs)
            if form.grows:
                growth = _query_growth(others["position_ids"], self.config)
                # (s q) rotated = q rotated by s cos, s sin: one product on [n, width], not on every
                # head.
                cos = (cos * growth).to(cos.dtype)
                sin = (sin * growth).to(sin.dtype)
            q = rotate(q, cos, sin, pairs=form.pairs)
        window = None
        if form.window == "config":
            window = self.config.sliding_window
        elif form.window == "layer":
            window = self.sliding_window
        out = attend(
            q,
            k,
            v,
            documents,
            scale=self.scaling,
            window=window,
            softcap=self.attn_logit_softcapping if form.softcap else None,
            dropout=self.attention_dropout if self.training else 0.0,
        )
        if gate is not None:
            out = out * torch.sigmoid(gate)
        # [n, heads * head_dim] -> [1, n, width]
        return self.o_proj(out.flatten(1)).view_as(hidden_states), None

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v and, where there is one, the gate of an input [n, width]: [n, heads, head_dim]
        each.
        """
        form = self.form
        if form.joined:
            width = self.num_key_value_heads * self.head_dim
            qkv = self.qkv_proj(x)
            # What is left of the rows after k and v is q's: its heads may be more.
            q, k, v = qkv.split([qkv.shape[-1] - 2 * width, width, width], -1)
        else:
            q, k, v = self.project(x, (self.q_proj, self.k_proj, self.v_proj))
        # A norm over all heads: before they are split.
        if form.head_norms == "projection":
            q = self.q_norm(q)
            k = self.k_norm(k)
        gate = None
        if form.gated:
            # A head's rows in q_proj are its query, then its gate.
            q, gate = q.unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, -1)
        else:
            q = q.unflatten(-1, (-1, self.head_dim))
        k = k.unflatten(-1, (-1, self.head_dim))
        v = v.unflatten(-1, (-1, self.head_dim))
        # A norm over one head: after the split.
        if form.head_norms == "head":
            q = self.q_norm(q)
            k = self.k_norm(k)
        return q, k, v, gate


def _by_pairs(angles: Tensor) -> Tensor:
    """cos or sin of two halves alike, [n, width], with each angle twice in a row."""
    return angles[..., : angles.shape[-1] // 2].repeat_interleave(2, -1)


def _query_growth(positions: Tensor, config: "PretrainedConfig") -> Tensor:
    """Ministral 3's factor on the queries, 1 up to the length of pre-training.

    positions: [1, n]; returns [n, 1] in fp32.
    """
    rope = config.rope_parameters
    # 0 within the length of pre-training, so the factor is 1 there.
    lengths = torch.floor(positions.squeeze(0) / rope["original_max_position_embeddings"])
    return (1 + rope["llama_4_scaling_beta"] * torch.log(1 + lengths)).unsqueeze(1)


class FusedMLP(nn.Module):
    """A gated MLP whose gate and up come from one reading of the input."""

    activation = "act_fn"  # its name in Transformers' class
    group = ("gate_proj", "up_proj")
    project: Project
    gated: Gated
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.project(x, (self.gate_proj, self.up_proj))
        return self.down_proj(self.gated(gate, up))


class FusedJoinedMLP(nn.Module):
    """A gated MLP whose gate and up are one linear layer."""

    activation = "activation_fn"
    gated: Gated
    gate_up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(self.gated(gate, up))


class FusedNorm(nn.Module):
    """An RMSNorm that keeps its input and one number a row for the backward."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, local_part(self.weight), self.variance_epsilon)


class FusedWideNorm(FusedNorm):
    """One that multiplies by its weight in fp32."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = local_part(self.weight)
        return rms_norm(hidden_states, weight, self.variance_epsilon, wide=True)


class FusedZeroCenteredNorm(nn.Module):
    """One whose weight is the difference from 1."""

    weight: nn.Parameter
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, local_part(self.weight), self.eps, wide=True, offset=1.0)


MIXINS: dict[str, type[nn.Module]] = {
    "llama.LlamaMLP": FusedMLP,
    "llama.LlamaRMSNorm": FusedNorm,
    "phi3.Phi3MLP": FusedJoinedMLP,
    "gemma.GemmaRMSNorm": FusedZeroCenteredNorm,
    "olmo2.Olmo2RMSNorm": FusedWideNorm,
    "helium.HeliumRMSNorm": FusedWideNorm,
}
