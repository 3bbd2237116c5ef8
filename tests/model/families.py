"""A tiny random model of every supported family, small enough that all of them build in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# model_type -> settings that bring out what is special about the family
VARIANTS: dict[str, dict] = {
    "llama": {"tie_word_embeddings": True},
    "llama-3": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 256,
        },
        "attention_bias": True, "mlp_bias": True,
    },
    "mistral": {"sliding_window": 16},
    "qwen2": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
                                  "original_max_position_embeddings": 128}},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16},
    "phi3": {
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
                            "long_factor": [2.0] * 4, "original_max_position_embeddings": 128},
        "tie_word_embeddings": False,
    },
    "smollm3": {},
    "olmo2": {"attention_bias": True},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
                "attention_multiplier": 0.2},
}  # fmt: skip

# Tied head, biases, windows, caps, joined projections, a mixture, sinks and a recurrent layer.
TIER_1 = (
    "llama", "llama-3", "qwen3", "gemma2", "gemma3_text", "phi3", "qwen3_moe", "gpt_oss",
    "qwen3_5_text",
)  # fmt: skip


def marked(rows: list[dict[str, Any]]) -> list[Any]:
    """The rows of tier 1 run in `make test`, the others in `make nightly`."""
    lanes = {True: pytest.mark.slow, False: pytest.mark.nightly}
    return [pytest.param(row, marks=lanes[row["family"] in TIER_1]) for row in rows]


def tiny_config(name: str):
    """The config of a variant as Transformers builds it."""
    from transformers import AutoConfig

    return AutoConfig.for_model(name.split("-", maxsplit=1)[0], **{**SMALL, **VARIANTS[name]})


def random_model(config, dtype: str = "float32"):
    """A model whose norms and biases are drawn too, so that a lost one shows in the logits."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def build(name: str, folder: Path, dtype: str = "float32") -> Path:
    """Save a random model of the variant."""
    random_model(tiny_config(name), dtype).save_pretrained(folder / name)
    return folder / name
