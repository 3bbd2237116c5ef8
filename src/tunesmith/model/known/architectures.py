"""A table of the supported families of dense decoders.

Each row has the defaults of keys that config.json may omit, and the family's differences from
Llama. To add a family, add a row to this table and a variant to `tests/model/families.py`. The
parity tests then compare its sizes, attention keywords, logits, gradients and loaded weights with
those of Transformers. This module does not import torch.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class GgufFamily:
    """A family's architecture name in llama.cpp, and the features that llama.cpp supports."""

    arch: str  # value of general.architecture in the GGUF file
    # Whether llama.cpp's rotary kernel rotates pairs of neighboring elements. Transformers rotates
    # element i of a head's first half with element i of the second half, so the export reorders the
    # rows of q and k.
    rotates_neighbors: bool = False
    # Types of rotary embeddings that llama.cpp supports in addition to the default type.
    ropes: tuple[str, ...] = ("linear", "yarn")
    reads_biases: bool = False  # whether llama.cpp reads the biases of linear layers


@dataclass(frozen=True)
class Architecture:
    """Sizes, defaults and features of one family of dense decoders."""

    examples: str  # names of models of this family, shown in messages
    tied: bool = False  # default of `tie_word_embeddings`
    head_dim: int | None = None  # default; None: hidden_size / attention heads
    # Default of `num_key_value_heads`. None means the number of attention heads.
    kv_heads: int | None = None
    # Whether the attention projections have a bias. None means that the config's `attention_bias`
    # decides.
    qkv_bias: bool | None = None
    output_bias: bool | None = None
    norms: int = 2  # number of norms of width hidden_size in each layer
    # Norms of q and k: none, one for each head, or one over the entire projection.
    head_norms: Literal["none", "head", "projection"] = "none"
    # Layers with sliding-window attention. "all": all layers if the config sets `sliding_window`.
    # "opt-in": the layers that the config lists if `use_sliding_window` is true. "pattern": the
    # layers that `sliding_window_pattern` selects.
    window: Literal["none", "all", "opt-in", "every-second", "pattern"] = "none"
    attention_softcap: float | None = None  # default of `attn_logit_softcapping`
    all_fused: bool = (
        False  # `model/layers/fused.py` supports the family's attention, MLP and norms
    )
    joined: bool = False  # q, k and v are one linear layer; gate and up are another
    gguf: GgufFamily | None = None  # None: export to GGUF is not supported


_LLAMA_ROPES = ("linear", "yarn", "llama3")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        "Llama 2, 3, 3.1, 3.2, 3.3, SmolLM, SmolLM2, Yi, TinyLlama",
        all_fused=True,
        gguf=GgufFamily("llama", rotates_neighbors=True, ropes=_LLAMA_ROPES, reads_biases=True),
    ),
    "mistral": Architecture(
        "Mistral 7B, Nemo, Small",
        kv_heads=8,
        qkv_bias=False,
        output_bias=False,
        window="all",
        all_fused=True,
        gguf=GgufFamily("llama", rotates_neighbors=True, ropes=_LLAMA_ROPES),
    ),
    "qwen2": Architecture(
        "Qwen2, Qwen2.5",
        qkv_bias=True,
        output_bias=False,
        window="opt-in",
        all_fused=True,
        gguf=GgufFamily("qwen2", reads_biases=True),
    ),
    "qwen3": Architecture(
        "Qwen3 (dense)",
        head_dim=128,
        head_norms="head",
        window="opt-in",
        all_fused=True,
        gguf=GgufFamily("qwen3"),
    ),
    "gemma": Architecture(
        "Gemma", tied=True, head_dim=256, kv_heads=16, gguf=GgufFamily("gemma", ropes=())
    ),
    "gemma2": Architecture(
        "Gemma 2",
        tied=True,
        head_dim=256,
        kv_heads=4,
        norms=4,
        window="every-second",
        attention_softcap=50.0,
        gguf=GgufFamily("gemma2", ropes=()),
    ),
    "gemma3_text": Architecture(
        "Gemma 3 (text)",
        tied=True,
        head_dim=256,
        kv_heads=4,
        norms=4,
        head_norms="head",
        window="pattern",
        gguf=GgufFamily("gemma3", ropes=("linear",)),
    ),
    "phi3": Architecture(
        "Phi-3, Phi-3.5, Phi-4",
        qkv_bias=False,
        output_bias=False,
        window="all",
        joined=True,
        gguf=GgufFamily("phi3", ropes=("longrope",)),
    ),
    "smollm3": Architecture(
        "SmolLM3",
        tied=True,
        kv_heads=4,
        window="opt-in",
        all_fused=True,
        gguf=GgufFamily("smollm3", rotates_neighbors=True),
    ),
    "olmo2": Architecture("OLMo 2", head_norms="projection", gguf=GgufFamily("olmo2")),
    "granite": Architecture(
        "Granite 3",
        gguf=GgufFamily("granite", rotates_neighbors=True, ropes=_LLAMA_ROPES, reads_biases=True),
    ),
}


def families_text() -> str:
    """Return the supported families as text for messages: `llama (Llama 2, ...); ...`."""
    return "; ".join(f"{name} ({row.examples})" for name, row in ARCHITECTURES.items())
