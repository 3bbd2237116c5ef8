"""The one table of differences between families that the engine must know; all else is the model's own forward.

Each row says what a family does around the parts that the engine replaces: the head and loss, attention, and the
projections that adapters and fused parts look for. Values come from the config; a name that a family does not have is
simply not in its row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig


@dataclass(frozen=True)
class Architecture:
    """What the engine does differently for one model.

    Attributes:
        final_softcap: logits become cap * tanh(logits / cap) before the loss, or None.
        attention_softcap: the same for attention scores; arrives in the attention's keyword `softcap`, or None.
        logit_scale: logits are multiplied by this before the loss (and before `final_softcap`).
        embedding_scale: the model multiplies its embeddings by this in its own forward.
        windowed: layers may see a bounded window of the past; it arrives in the keyword `sliding_window`.
        qkv, gate_up, output, down: names of the projections inside a layer, for adapters and fused parts.
        backbone, layers, head: where the decoder, its layers and the head are, as paths from the causal LM.
    """

    final_softcap: float | None = None
    attention_softcap: float | None = None
    logit_scale: float = 1.0
    embedding_scale: float = 1.0
    windowed: bool = False
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    output: str = "self_attn.o_proj"
    down: str = "mlp.down_proj"
    backbone: str = "model"
    layers: str = "model.layers"
    head: str = "lm_head"


def _softcapped(config: Any) -> Architecture:
    return Architecture(
        final_softcap=config.final_logit_softcapping,
        attention_softcap=config.attn_logit_softcapping,
        embedding_scale=config.hidden_size**0.5,
        windowed=True,
    )


_ROWS: dict[str, Callable[[Any], Architecture]] = {
    "gemma": lambda c: Architecture(embedding_scale=c.hidden_size**0.5),
    "gemma2": _softcapped,
    "gemma3_text": _softcapped,
    "granite": lambda c: Architecture(logit_scale=1.0 / c.logits_scaling, embedding_scale=c.embedding_multiplier),
    "mistral": lambda c: Architecture(windowed=c.sliding_window is not None),
    "phi3": lambda c: Architecture(
        qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",), windowed=c.sliding_window is not None
    ),
    "qwen2": lambda c: Architecture(windowed=c.use_sliding_window),
    "qwen3": lambda c: Architecture(windowed=c.use_sliding_window),
}


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The row of a model's family; a family without a row is as Llama."""
    row = _ROWS.get(config.model_type)
    return row(config) if row else Architecture()
