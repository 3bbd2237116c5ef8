"""Choice of the type of each tensor in a quantized GGUF file, by the rules of `llama-quantize`.

`q4_k_m` and `q5_k_m` are mixtures. The output layer has 6 bits. The value projection of attention
and the second matrix of the MLP have 6 bits in some layers, because quantization errors of these
matrices affect the outputs most.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

# Value of --quant -> type of most matrices. In mixtures (names that end with _k_m) some matrices
# have a type with more bits.
GGUF_QUANT_TYPES = {
    "f32": "F32",
    "f16": "F16",
    "bf16": "BF16",
    "q8_0": "Q8_0",
    "q6_k": "Q6_K",
    "q5_k_m": "Q5_K",
    "q4_k_m": "Q4_K",
}
# K type -> replacement type with smaller blocks. It is used if the row length of a matrix is not a
# multiple of 256, the block size of K types.
_SMALLER_BLOCK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
# Parts of the names of value projections. They may occur anywhere in a tensor name, as in
# llama.cpp.
_VALUES = ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight")
# Small matrices of Gemma 3n and Gemma 4 that are not quantized.
_KEPT = ("altup", "laurel", "per_layer_model_proj")
# Architecture -> number of layers of its 70B model, by which llama.cpp recognizes 70B models. In
# these models eight heads share a value head, so the value projections are small and get more bits.
_LAYERS_OF_70B = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}


class PlainTensor(NamedTuple):
    """Shape and type of a tensor before quantization.

    Attributes:
        shape: the shape in PyTorch's order, with the columns last.
        ggml_type: the type, such as `BF16`.
    """

    shape: Sequence[int]
    ggml_type: str


def block_of(ggml_type: str) -> tuple[int, int]:
    """Return the number of values per block, and the number of bytes per block, of a type."""
    import gguf

    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[ggml_type]]
    return values, size


def tensor_bytes(ggml_type: str, shape: Sequence[int]) -> int:
    """Return the size in bytes of a tensor of a type, without padding."""
    values, size = block_of(ggml_type)
    return prod(shape) // values * size


def plain_tensors(shapes: Mapping[str, Sequence[int]], quant: str) -> dict[str, PlainTensor]:
    """Return the types of the tensors before quantization.

    Vectors, norms and biases are in F32. Matrices have the type of `quant` if it is f32, f16 or
    bf16, else BF16.
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
    """Return the type of every tensor of a quantized file.

    Tensors in F32 and tensors that are already quantized keep their types.

    Args:
        tensors: shapes and types before quantization, from `plain_tensors`, by llama.cpp's names,
            such as `blk.0.attn_v.weight`.
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
    # If the file has no output layer, llama.cpp uses the embedding as output layer.
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
        # In a model with eight experts, such as Mixtral, attention is a small part of the file.
        # Therefore the key and value projections get more bits.
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
    """Return the value projections and second MLP matrices that get 6 bits in a k_m mixture.

    Like llama.cpp, choose them by their index among the matrices of the same kind, because some
    layers of a hybrid model have no such matrix. If `by_layer` is set, as for mixtures of experts,
    choose MLP matrices by their layer number instead.
    """
    ordered = sorted(names, key=lambda name: (_layer_of(name), name))
    values = [name for name in ordered if any(part in name for part in _VALUES)]
    downs = [name for name in ordered if "ffn_down" in name]
    chosen = {name for index, name in enumerate(values) if _gets_more_bits(index, len(values))}
    for index, name in enumerate(downs):
        if _gets_more_bits(_layer_of(name) if by_layer else index, layers):
            chosen.add(name)
    return chosen


def _layer_of(name: str) -> int:
    """Return the layer number of a tensor, or -1 if the tensor is not in a layer."""
    prefix, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if prefix == "blk" else -1


def _gets_more_bits(index: int, count: int) -> bool:
    """Return whether the matrix at `index` of `count` gets more bits.

    The first eighth and the last eighth of the matrices get more bits, and every third matrix
    between them.
    """
    eighth = count // 8
    return index < eighth or index >= 7 * count // 8 or (index - eighth) % 3 == 2


def _is_70b(header: Mapping[str, Any], arch: str, layers: int) -> bool:
    if layers != _LAYERS_OF_70B.get(arch):
        return False
    # Llama 65B also has 80 layers, but no shared value heads: it has a value head for every head.
    heads = header[f"{arch}.attention.head_count"]
    return arch != "llama" or heads != header.get(f"{arch}.attention.head_count_kv", heads)


def _fitting_type(ggml_type: str, columns: int) -> str:
    """Return the type, or a type with smaller blocks if rows do not consist of complete blocks."""
    for fitting_type in (ggml_type, _SMALLER_BLOCK.get(ggml_type, "F16")):
        if columns % block_of(fitting_type)[0] == 0:
            return fitting_type
    return "F16"
