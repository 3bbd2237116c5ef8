"""The one table of model families: what config.json may leave out, and differences from Llama.

To add a family, add a row here and a variant to `tests/model/families.py`: the parity tests then
compare its sizes, attention keywords, logits, gradients and loaded weights with Transformers' own.
No torch is imported here.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class GgufFamily:
    """A family in llama.cpp: what differs between families there."""

    arch: str  # its name of the architecture
    # Its rotary kernel takes neighbors as a pair, Transformers' the two halves of a head: rows of
    # q and k change places in a file.
    rotates_neighbors: bool = False
    # Types of rotary embeddings beside the plain one.
    ropes: tuple[str, ...] = ("linear", "yarn")
    reads_biases: bool = False  # of linear layers


@dataclass(frozen=True)
class Architecture:
    """One family of dense decoders."""

    examples: str  # models of the family, for messages
    tied: bool = False  # the default of tie_word_embeddings
    head_dim: int | None = None  # its default; None: hidden_size / heads
    # The default of num_key_value_heads; None: as many as heads.
    kv_heads: int | None = None
    # Whether attention's projections have a bias; None: as `attention_bias` says.
    qkv_bias: bool | None = None
    output_bias: bool | None = None
    norms: int = 2  # of hidden_size, per layer
    # Norms on q and k: over one head, or over all of them.
    head_norms: Literal["none", "head", "projection"] = "none"
    # Which layers see a bounded window: none, all with `sliding_window`, those that the config
    # picks and only with `use_sliding_window`, all but every second, or `sliding_window_pattern`.
    window: Literal["none", "all", "opt-in", "every-second", "pattern"] = "none"
    attention_softcap: float | None = None  # the default of attn_logit_softcapping
    all_fused: bool = False  # attention, MLP and norms have the forwards of `model/fused.py`
    joined: bool = False  # q, k and v are one linear layer, and so are gate and up
    gguf: GgufFamily | None = None  # None: there is no export to GGUF


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
    """The families that work, for messages: `llama (Llama 2, ...); ...`."""
    return "; ".join(f"{name} ({row.examples})" for name, row in ARCHITECTURES.items())
