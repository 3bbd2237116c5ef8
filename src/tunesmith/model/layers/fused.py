"""Faster forwards for attention, gated MLPs and norms, with the same results as Transformers'.

Transformers' modules read their input separately for q, k and v, and for gate and up, and save many
small tensors for the backward. `fuse_modules` replaces the class of these modules by a subclass
with another `forward`. The modules are recognized by their code, not by their name: the code must
be identical to one of the references below. All other modules keep Transformers' forward.
Generation also uses Transformers' forward, because generation has a cache and no `documents`.
"""

import importlib
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.model.layers.attention import attend
from tunesmith.model.layers.documents import Documents
from tunesmith.model.layers.fused_functions import geglu, rms_norm, rotate, swiglu
from tunesmith.model.weights.same_code import forward_code

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Mixin = TypeVar("Mixin", bound=nn.Module)
Gated = Callable[[Tensor, Tensor], Tensor]  # a gated activation: (gate, up) -> Tensor
Project = Callable[[Tensor, Sequence[nn.Module]], Sequence[Tensor]]


def fuse_modules(model: nn.Module, *, project: Project) -> int:
    """Replace the forward of all modules whose code is identical to a reference, in place.

    Args:
        project: function that computes several linear layers with the same input.
            `adapter.lora.project` reads the input only once for all adapters.

    Returns:
        The number of changed modules.
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
    """Return a mapping from an activation class to its fused function of gate and up."""
    from transformers.activations import ACT2FN

    functions = {"silu": swiglu, "swish": swiglu, "gelu_pytorch_tanh": geglu}
    return {type(ACT2FN[name]): function for name, function in functions.items()}


def _is_candidate(module: nn.Module) -> bool:
    """Return whether the module may be an attention, an MLP or a norm.

    This cheap check avoids importing the references for all other modules.
    """
    if type(module).forward.__module__.startswith(("torch.", "tunesmith.")):
        return False
    parts = dict(module.named_children()) | dict(module.named_parameters(recurse=False))
    return not parts.keys().isdisjoint(("o_proj", "down_proj", "weight"))


@cache
def _reference_of(module_class: type[nn.Module]) -> str | None:
    """Return the key, in ATTENTIONS or MIXINS, of the reference that has the code of the class.

    Return None if no reference has this code.
    """
    # `forward_code` returns None if the code of the class cannot be compared.
    code = forward_code(module_class)
    if code is None:
        return None
    # First try the references from the Python module that defines the class, so that most runs
    # import no other Python module.
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
    """Insert `mixin` before the module's own class. Parameters, names and hooks do not change.

    Layers of one class share a compiled graph of torch.compile. If the forward were set on each
    instance, every layer would be compiled separately.
    """
    module.__class__ = _mixed_class(mixin, type(module))  # type: ignore[arg-type]
    assert isinstance(module, mixin)
    return module


@cache
def _mixed_class(mixin: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    return type(f"{mixin.__name__}{base.__name__}", (mixin, base), {})


class AttentionForm(NamedTuple):
    """Optional features of an attention layer."""

    # Norms of q and k: none, one for each head, or one over the entire projection.
    head_norms: Literal["none", "head", "projection"] = "none"
    # Source of the sliding window: "none" if there is no window, "config" if one value in the
    # config applies to all layers, or "layer" if each layer has its own attribute.
    window: Literal["none", "config", "layer"] = "none"
    # Whether the layer's attribute `use_rope` decides if q and k are rotated.
    rope_by_layer: bool = False
    # Whether the rotary embedding rotates neighboring channels. cos and sin still have the layout
    # of two halves, as in most models.
    pairs: bool = False
    # Whether q_proj has twice the rows: for each head the query, and a gate for the head's output.
    gated: bool = False
    # Whether queries at positions beyond the pre-training length are scaled by the logarithm of the
    # position.
    grows: bool = False
    softcap: bool = False  # the scores have a soft cap
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
    """Attention within documents that computes q, k and v in one pass over the input."""

    group = ("q_proj", "k_proj", "v_proj")  # layers with the same input
    form: AttentionForm
    project: Project
    # Attributes of Transformers' class. `form` decides which of them exist.
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
        """Compute attention within each document.

        Without `documents` (generation, eager attention), call the forward of Transformers' class.

        Args:
            hidden_states: [1, n, width].
        """
        # Without rotary embedding, use Transformers' forward. Pass it the documents, because it
        # calls `documents_attention`.
        if position_embeddings is None and documents is not None:
            others["documents"] = documents
        if position_embeddings is None or documents is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, **others)
        form = self.form
        q, k, v, gate = self._heads(hidden_states.flatten(0, -2))
        if not form.rope_by_layer or self.use_rope:
            # [1, n, width] -> [n, width]
            cos, sin = (t.flatten(0, -2) for t in position_embeddings)
            if form.pairs:
                cos = _by_pairs(cos)
                sin = _by_pairs(sin)
            # Rotate k before cos and sin are scaled, because the scale applies only to q.
            k = rotate(k, cos, sin, pairs=form.pairs)
            if form.grows:
                growth = _query_growth(others["position_ids"], self.config)
                # Scaling cos and sin, [n, width], gives the same result as scaling q, and is
                # cheaper because q has this shape for every head.
                cos = (cos * growth).to(cos.dtype)
                sin = (sin * growth).to(sin.dtype)
            q = rotate(q, cos, sin, pairs=form.pairs)
        window = None
        if form.window == "config":
            window = self.config.sliding_window
        elif form.window == "layer":
            window = self.sliding_window
        softcap = self.attn_logit_softcapping if form.softcap else None
        dropout = self.attention_dropout if self.training else 0.0
        out = attend(
            q,
            k,
            v,
            documents,
            scale=self.scaling,
            window=window,
            softcap=softcap,
            dropout=dropout,
        )
        if gate is not None:
            out = out * torch.sigmoid(gate)
        # [n, heads * head_dim] -> [1, n, width]
        return self.o_proj(out.flatten(1)).view_as(hidden_states), None

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return q, k, v and the gate (or None) for x [n, width], each [n, heads, head_dim]."""
        form = self.form
        if form.joined:
            width = self.num_key_value_heads * self.head_dim
            qkv = self.qkv_proj(x)
            # k and v have `width` columns each. The other columns belong to q, which may be wider.
            q, k, v = qkv.split([qkv.shape[-1] - 2 * width, width, width], -1)
        else:
            q, k, v = self.project(x, (self.q_proj, self.k_proj, self.v_proj))
        # A norm over the entire projection is applied before the heads are split.
        if form.head_norms == "projection":
            q = self.q_norm(q)
            k = self.k_norm(k)
        gate = None
        by_head = (-1, self.head_dim)
        if form.gated:
            # In q_proj, each head has the rows of its query followed by the rows of its gate.
            q, gate = q.unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, -1)
        else:
            q = q.unflatten(-1, by_head)
        k = k.unflatten(-1, by_head)
        v = v.unflatten(-1, by_head)
        # A norm over each head is applied after the split.
        if form.head_norms == "head":
            q = self.q_norm(q)
            k = self.k_norm(k)
        return q, k, v, gate


def _by_pairs(angles: Tensor) -> Tensor:
    """Convert cos or sin [n, width] from two equal halves to neighboring pairs of equal angles."""
    return angles[..., : angles.shape[-1] // 2].repeat_interleave(2, -1)


def _query_growth(positions: Tensor, config: "PretrainedConfig") -> Tensor:
    """Return the factor by which Ministral 3 multiplies the query at each position.

    The factor is 1 up to the pre-training length.

    Args:
        positions: [1, n].

    Returns:
        [n, 1] in fp32.
    """
    rope = config.rope_parameters
    # `lengths` is 0 within the pre-training length, so that the factor is 1.
    lengths = torch.floor(positions.squeeze(0) / rope["original_max_position_embeddings"])
    return (1 + rope["llama_4_scaling_beta"] * torch.log(1 + lengths)).unsqueeze(1)


class FusedMLP(nn.Module):
    """A gated MLP that computes gate and up in one pass over the input."""

    activation = "act_fn"  # attribute name in Transformers' class
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
    """A gated MLP that has gate and up in one linear layer."""

    activation = "activation_fn"
    gated: Gated
    gate_up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(self.gated(gate, up))


class FusedNorm(nn.Module):
    """An RMSNorm that saves only its input and one number per row for the backward."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, local_part(self.weight), self.variance_epsilon)


class FusedWideNorm(FusedNorm):
    """An RMSNorm that multiplies by its weight in fp32."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = local_part(self.weight)
        return rms_norm(hidden_states, weight, self.variance_epsilon, wide=True)


class FusedZeroCenteredNorm(nn.Module):
    """An RMSNorm that multiplies by 1 + weight."""

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
