"""The true shapes of a few open models, as the values of their config.json; no weights, no download.

Each table holds what the model's own config.json says of its size and arithmetic, from the repository that `source`
names, compared with copies that others keep of these files. Token ids are left out: they are the tokenizer's to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.config.names import nearest
from tunesmith.errors import UsageError


@dataclass(frozen=True)
class Shape:
    """One model's shape. source: the repository whose config.json it is. config: its values."""

    source: str
    config: Mapping[str, Any]


def _llama3(*, factor: float, **sizes: Any) -> dict[str, Any]:
    """What all of Llama 3.1 and 3.2 share; `factor` stretches the rotary frequencies from 8,192 positions."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": factor,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
        **sizes,
    }


SHAPES: dict[str, Shape] = {
    "llama3-8b": Shape(
        "meta-llama/Llama-3.1-8B",
        _llama3(factor=8.0, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    ),
    "llama3-3b": Shape(
        "meta-llama/Llama-3.2-3B",
        _llama3(
            factor=32.0,
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            tie_word_embeddings=True,
        ),
    ),
    "llama3-70b": Shape(
        "meta-llama/Llama-3.1-70B",
        _llama3(factor=8.0, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
    ),
    "qwen3-8b": Shape(
        "Qwen/Qwen3-8B",
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 12288,
            "max_position_embeddings": 40960,
            "max_window_layers": 36,
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    "mistral-7b": Shape(
        "mistralai/Mistral-7B-v0.3",
        {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "attention_dropout": 0.0,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "sliding_window": None,  # version 0.1 had a window of 4,096; later ones see everything
            "tie_word_embeddings": False,
            "vocab_size": 32768,
        },
    ),
}


def named(name: str) -> Shape:
    """A shape of the table.

    Raises:
        UsageError: there is none of that name; with the nearest one.
    """
    if name in SHAPES:
        return SHAPES[name]
    near = nearest(name, SHAPES)
    fix = f"did you mean --shape {near}?" if near else f"one of {', '.join(SHAPES)}"
    raise UsageError(f"there is no shape {name!r}", where="--shape", fix=fix)
