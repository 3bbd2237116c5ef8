"""Which type each tensor of a file has: the rules of `llama-quantize`, with its fallbacks.

`q4_k_m` and `q5_k_m` are mixtures: the head has 6 bits, and so have the values of attention and the
second matrix of the MLP in some layers, where quantization hurts most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from tunesmith.errors import RecipeError

if TYPE_CHECKING:
    from tunesmith.tools.export.gguf.families import ModelConfig


@dataclass(frozen=True)
class QuantType:
    """One value of --quant."""

    plain: str  # of most matrices
    file_type: int  # `gguf.LlamaFileType`
    is_mixture: bool = False


GGUF_QUANT_TYPES: dict[str, QuantType] = {
    "f32": QuantType("F32", 0),
    "f16": QuantType("F16", 1),
    "bf16": QuantType("BF16", 32),
    "q8_0": QuantType("Q8_0", 7),
    "q6_k": QuantType("Q6_K", 18),
    "q5_k_m": QuantType("Q5_K", 17, is_mixture=True),
    "q4_k_m": QuantType("Q4_K", 15, is_mixture=True),
}

# Values in a block and its bytes, by the type's name; ggml calls the numbers blck_size, type_size.
GGML_BLOCK_SIZES: dict[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
# For rows that are not whole blocks of 256.
_SMALLER_BLOCK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def read_quant(name: str) -> QuantType:
    """RecipeError where it is none."""
    if name not in GGUF_QUANT_TYPES:
        raise RecipeError(
            f"{name!r} is not a supported quantization",
            where="--quant",
            fix=f"one of {', '.join(GGUF_QUANT_TYPES)}",
        )
    return GGUF_QUANT_TYPES[name]


def tensor_bytes(ggml_type: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of a type, without padding."""
    values, size = GGML_BLOCK_SIZES[ggml_type]
    return prod(shape) // values * size


def tensor_type(
    name: str, shape: Sequence[int], quant: QuantType, config: "ModelConfig", *, tied: bool
) -> str:
    """The type of a tensor by llama.cpp's name, such as `blk.0.attn_v.weight`.

    `tied`: the file has no `output.weight`, so the embedding is the head.
    """
    if len(shape) < 2 or name.endswith("_norm.weight") or not name.endswith(".weight"):
        return "F32"
    columns = shape[-1]
    is_head = name == ("token_embd.weight" if tied else "output.weight")
    has_large_blocks = GGML_BLOCK_SIZES[quant.plain][0] == 256
    if is_head and has_large_blocks:
        ggml_type = "Q6_K" if columns % 256 == 0 else "Q8_0"
    elif quant.is_mixture:
        ggml_type = _mixture_type(name, quant, config)
    else:
        ggml_type = quant.plain
    # A row must be whole blocks: first the next smaller block, then none.
    if columns % GGML_BLOCK_SIZES[ggml_type][0] != 0:
        ggml_type = _SMALLER_BLOCK.get(ggml_type, "F16")
    if columns % GGML_BLOCK_SIZES[ggml_type][0] != 0:
        ggml_type = "F16"
    return ggml_type


def _mixture_type(name: str, quant: QuantType, config: "ModelConfig") -> str:
    # Embedding and head are no layers.
    if not name.startswith("blk."):
        return quant.plain
    layers = config["num_hidden_layers"]
    _, layer, part, _ = name.split(".")
    is_value = part in ("attn_v", "attn_qkv")
    if (is_value or part == "ffn_down") and _gets_more_bits(int(layer), layers):
        return "Q6_K"
    if is_value and quant.plain == "Q4_K" and _is_70b(config):
        return "Q5_K"
    return quant.plain


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
