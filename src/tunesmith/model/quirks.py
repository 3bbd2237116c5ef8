"""The one table of differences between families that the engine must know; all else is the model's own forward.

Each row says what a family does around the parts that the engine replaces: the head and loss, attention, and the
projections that adapters and fused parts look for. Values come from the config; a name that a family does not have is
simply not in its row.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig


@dataclass(frozen=True)
class Quirks:
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


def of(config: PretrainedConfig) -> Quirks:
    """The row of a model's family."""
    match config.model_type:
        case "gemma":
            return Quirks(embedding_scale=config.hidden_size**0.5)
        case "gemma2" | "gemma3_text":
            return Quirks(
                final_softcap=config.final_logit_softcapping,
                attention_softcap=config.attn_logit_softcapping,
                embedding_scale=config.hidden_size**0.5,
                windowed=True,
            )
        case "granite":
            return Quirks(logit_scale=1.0 / config.logits_scaling, embedding_scale=config.embedding_multiplier)
        case "mistral":
            return Quirks(windowed=config.sliding_window is not None)
        case "phi3":
            return Quirks(
                qkv=("self_attn.qkv_proj",),
                gate_up=("mlp.gate_up_proj",),
                windowed=config.sliding_window is not None,
            )
        case "qwen2" | "qwen3":
            return Quirks(windowed=config.use_sliding_window)
        case _:
            return Quirks()
