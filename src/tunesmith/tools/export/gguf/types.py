"""Which type each tensor of a file has: the rules of `llama-quantize`, with its fallbacks.

`q4_k_m` and `q5_k_m` are mixtures: the head has 6 bits, and so have the values of attention and the
second matrix of the MLP in some layers, where quantization hurts most.
"""

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunesmith.tools.export.gguf.families import ModelConfig


# Values of --quant -> the type of most matrices; those on _k_m are mixtures.
GGUF_QUANT_TYPES = {
    "f32": "F32",
    "f16": "F16",
    "bf16": "BF16",
    "q8_0": "Q8_0",
    "q6_k": "Q6_K",
    "q5_k_m": "Q5_K",
    "q4_k_m": "Q4_K",
}
# For rows that are not whole blocks of 256.
_SMALLER_BLOCK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def block_of(ggml_type: str) -> tuple[int, int]:
    """Values in a block of a type, and its bytes."""
    import gguf

    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[ggml_type]]
    return values, size


def tensor_bytes(ggml_type: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of a type, without padding."""
    values, size = block_of(ggml_type)
    return prod(shape) // values * size


def tensor_type(
    name: str, shape: Sequence[int], quant: str, config: "ModelConfig", *, tied: bool
) -> str:
    """The type of a tensor by llama.cpp's name, such as `blk.0.attn_v.weight`.

    `quant`: of GGUF_QUANT_TYPES; `tied`: no `output.weight`, so the embedding is the head.
    """
    if len(shape) < 2 or name.endswith("_norm.weight") or not name.endswith(".weight"):
        return "F32"
    columns = shape[-1]
    is_head = name == ("token_embd.weight" if tied else "output.weight")
    plain = GGUF_QUANT_TYPES[quant]
    if is_head and block_of(plain)[0] == 256:
        ggml_type = "Q6_K" if columns % 256 == 0 else "Q8_0"
    elif quant.endswith("_k_m"):
        ggml_type = _mixture_type(name, plain, config)
    else:
        ggml_type = plain
    # A row must be whole blocks: first the next smaller block, then none.
    if columns % block_of(ggml_type)[0] != 0:
        ggml_type = _SMALLER_BLOCK.get(ggml_type, "F16")
    if columns % block_of(ggml_type)[0] != 0:
        ggml_type = "F16"
    return ggml_type


def _mixture_type(name: str, plain: str, config: "ModelConfig") -> str:
    # Embedding and head are no layers.
    if not name.startswith("blk."):
        return plain
    layers = config["num_hidden_layers"]
    _, layer, part, _ = name.split(".")
    is_value = part in ("attn_v", "attn_qkv")
    if (is_value or part == "ffn_down") and _gets_more_bits(int(layer), layers):
        return "Q6_K"
    if is_value and plain == "Q4_K" and _is_70b(config):
        return "Q5_K"
    return plain


def _gets_more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _is_70b(config: "ModelConfig") -> bool:
    """Llama 70B and Qwen2 72B: eight heads share a key and a value head, so those are small."""
    heads = config["num_attention_heads"]
    return (
        config["model_type"] in ("llama", "mistral", "qwen2")
        and config["num_hidden_layers"] == 80
        and (config.get("num_key_value_heads") or heads) != heads
    )
