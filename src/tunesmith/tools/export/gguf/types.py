"""The type of each tensor in a quantized file: the rules of `llama-quantize`, with its fallbacks.

`q4_k_m` and `q5_k_m` are mixtures: the head has 6 bits, and so have the values of attention and the
second matrix of the MLP in some layers, where quantization hurts most.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

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
# llama.cpp looks for its names anywhere in the name of a tensor.
_VALUES = ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight")
# Small matrices of Gemma 3n and Gemma 4 that are not quantized.
_KEPT = ("altup", "laurel", "per_layer_model_proj")
# Architectures -> layers of the sizes that llama.cpp calls 70B. Eight heads share a value head
# there, so the values are small and get more bits.
_LAYERS_OF_70B = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}


class PlainTensor(NamedTuple):
    """A tensor of a file that is not quantized.

    Attributes:
        shape: in the order of PyTorch, the columns last.
        ggml_type: such as `BF16`.
    """

    shape: Sequence[int]
    ggml_type: str


def block_of(ggml_type: str) -> tuple[int, int]:
    """Values in a block of a type, and its bytes."""
    import gguf

    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[ggml_type]]
    return values, size


def tensor_bytes(ggml_type: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of a type, without padding."""
    values, size = block_of(ggml_type)
    return prod(shape) // values * size


def plain_tensors(shapes: Mapping[str, Sequence[int]], quant: str) -> dict[str, PlainTensor]:
    """Return the tensors of the file that a quantization starts from, which is in bf16.

    Vectors, norms and biases are in F32. With `quant` f32, f16 or bf16 the matrices have that type.
    """
    plain = GGUF_QUANT_TYPES[quant]
    matrix_type = plain if block_of(plain)[0] == 1 else "BF16"
    tensors = {}
    for name, shape in shapes.items():
        is_matrix = len(shape) > 1 and name.endswith(".weight")
        is_norm = name.endswith("_norm.weight")
        tensors[name] = PlainTensor(shape, matrix_type if is_matrix and not is_norm else "F32")
    return tensors


def tensor_types(
    tensors: Mapping[str, PlainTensor], quant: str, header: Mapping[str, Any]
) -> dict[str, str]:
    """Return the type of every tensor of a file.

    A tensor that is in F32 in the plain file stays, as do tensors that are quantized already.

    Args:
        tensors: by llama.cpp's names, such as `blk.0.attn_v.weight`; `plain_tensors` makes them.
        quant: a name of GGUF_QUANT_TYPES.
        header: the values of the file's keys, such as `llama.block_count`.
    """
    types = {name: tensor.ggml_type for name, tensor in tensors.items()}
    base = GGUF_QUANT_TYPES[quant]
    if block_of(base)[0] == 1:
        return types
    arch = header["general.architecture"]
    layers = header[f"{arch}.block_count"]
    experts = header.get(f"{arch}.expert_count", 0)
    # llama.cpp computes the head with the embedding if the file has no other.
    heads = ["output.weight"]
    if "output.weight" not in tensors:
        heads = ["token_embd.weight", "per_layer_token_embd.weight"]
    names = [name for name, tensor in tensors.items() if _is_quantized(name, tensor)]
    more_bits = set()
    if quant.endswith("_k_m"):
        more_bits = _names_with_more_bits(names, layers, by_layer=experts > 1)
    has_small_values = base == "Q4_K" and _is_70b(header, arch, layers)
    for name in names:
        columns = tensors[name].shape[-1]
        is_value = any(part in name for part in _VALUES)
        if name in heads:
            ggml_type = "Q6_K" if columns % 256 == 0 and base != "Q8_0" else "Q8_0"
        # Attention is a small part of a mixture of eight experts, such as Mixtral.
        elif experts == 8 and (is_value or "attn_k.weight" in name):
            ggml_type = "Q8_0"
        elif experts == 8 and "attn_output.weight" in name and base == "Q4_K":
            ggml_type = "Q5_K"
        elif name in more_bits:
            ggml_type = "Q6_K"
        else:
            ggml_type = "Q5_K" if is_value and has_small_values else base
        types[name] = _fitting_type(ggml_type, columns)
    return types


def _is_quantized(name: str, tensor: PlainTensor) -> bool:
    is_matrix = prod(tensor.shape[:-1]) > 1
    is_kept = any(part in name for part in _KEPT)
    return tensor.ggml_type in ("F16", "BF16") and is_matrix and not is_kept


def _names_with_more_bits(names: Sequence[str], layers: int, *, by_layer: bool) -> set[str]:
    """Return values of attention and second matrices of the MLP that a mixture gives 6 bits.

    llama.cpp counts them in the order of the layers, and not every layer of a hybrid has them. In
    mixtures of experts (`by_layer`) the number of the layer counts for the MLP.
    """
    ordered = sorted(names, key=lambda name: (_layer_of(name), name))
    values = [name for name in ordered if any(part in name for part in _VALUES)]
    downs = [name for name in ordered if "ffn_down" in name]
    chosen = set()
    for index, name in enumerate(values):
        if _gets_more_bits(index, len(values)):
            chosen.add(name)
    for index, name in enumerate(downs):
        if _gets_more_bits(_layer_of(name) if by_layer else index, layers):
            chosen.add(name)
    return chosen


def _layer_of(name: str) -> int:
    """Return the number of a tensor's layer, or -1 if it is in none."""
    prefix, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if prefix == "blk" else -1


def _gets_more_bits(index: int, count: int) -> bool:
    """Return whether an index is in the first or last eighth, or the third of three between."""
    eighth = count // 8
    return index < eighth or index >= 7 * count // 8 or (index - eighth) % 3 == 2


def _is_70b(header: Mapping[str, Any], arch: str, layers: int) -> bool:
    if layers != _LAYERS_OF_70B.get(arch):
        return False
    # Llama 65B has as many value heads as heads.
    heads = header[f"{arch}.attention.head_count"]
    return arch != "llama" or heads != header.get(f"{arch}.attention.head_count_kv", heads)


def _fitting_type(ggml_type: str, columns: int) -> str:
    """Return the type, or one with smaller blocks if the rows are not whole blocks."""
    if columns % block_of(ggml_type)[0] == 0:
        return ggml_type
    ggml_type = _SMALLER_BLOCK.get(ggml_type, ggml_type)
    return ggml_type if columns % block_of(ggml_type)[0] == 0 else "F16"
