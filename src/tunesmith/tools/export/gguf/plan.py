"""Plan of a GGUF file: the header, the types of the tensors, and the exact size of the file.

No weight is read for a plan.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from tunesmith.errors import RecipeError
from tunesmith.host.packages import require
from tunesmith.tools.export.gguf.families import (
    SERVE_FOLDER,
    ModelConfig,
    config_keys,
    gguf_names,
    heads_to_permute,
    notes_on_config,
    read_family,
    rope_tensors,
)
from tunesmith.tools.export.gguf.quantize import load_ggml_if_needed
from tunesmith.tools.export.gguf.tokenizer import model_name, read_gguf_tokenizer
from tunesmith.tools.export.gguf.types import (
    GGUF_QUANT_TYPES,
    plain_tensors,
    tensor_bytes,
    tensor_types,
)
from tunesmith.tools.export.tuned_weights import RowSource, WholeRows
from tunesmith.units import ceil_div

if TYPE_CHECKING:
    from gguf import GGUFWriter

TENSOR_ALIGNMENT_BYTES = 32  # the data of each tensor starts at a multiple of this


@dataclass(frozen=True)
class GgufTensor:
    """Tensor of a GGUF file.

    Attributes:
        name: llama.cpp's name of the tensor.
        ggml_type: the type in the file, such as `Q4_K`.
        source: the values, in fp32.
        heads: number of attention heads, if `families.pair_neighbors` must reorder the rows of each
            head; None if the order of the rows is unchanged.
        offset: a number that is added to every value.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: str
    source: RowSource
    heads: int | None = None
    offset: float = 0.0

    @property
    def size(self) -> int:
        """Size of the tensor in bytes, without padding."""
        return tensor_bytes(self.ggml_type, self.shape)


@dataclass(frozen=True)
class GgufPlan:
    """Plan of the GGUF file that `write_gguf` writes.

    Attributes:
        header: the bytes before the first tensor, including padding.
        tensors: the tensors in the order of the file.
        notes: differences between llama.cpp and Transformers, for the user.
    """

    header: bytes
    tensors: tuple[GgufTensor, ...]
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return len(self.header) + sum(padded(tensor.size) for tensor in self.tensors)


def padded(size: int) -> int:
    """Round a size in bytes up to the alignment of tensors."""
    return ceil_div(size, TENSOR_ALIGNMENT_BYTES) * TENSOR_ALIGNMENT_BYTES


def plan_gguf(
    config: ModelConfig,
    weights: Mapping[str, RowSource],
    tokenizer: PreTrainedTokenizerBase,
    *,
    quant: str,
    name: str,
    generation: Mapping[str, float] = {},
    turn_end: int | None = None,
) -> GgufPlan:
    """Plan the GGUF file of an entire model. No weight is read.

    Args:
        config: `model.config.to_dict()`.
        weights: the weights by Transformers' parameter names, without a tied output layer.
        quant: a name of `types.GGUF_QUANT_TYPES`.
        name: the model's name, which llama.cpp shows.
        generation: the content of `generation_config.json`.
        turn_end: the token that ends an answer, if it is not the tokenizer's eos.

    Raises:
        ModelError: llama.cpp cannot compute this model.
        RecipeError: the quantization is not supported.
        MachineError: a package is missing.
    """
    require_gguf()
    import gguf

    if quant not in GGUF_QUANT_TYPES:
        raise RecipeError(
            f"{quant!r} is not a supported quantization",
            where="--quant",
            fix=f"use one of {', '.join(GGUF_QUANT_TYPES)}",
        )
    family = read_family(config)
    new_names = gguf_names(weights, config, family)
    rows = weights["model.embed_tokens.weight"].shape[0]
    vocabulary = read_gguf_tokenizer(tokenizer, rows, config, turn_end)
    factors = rope_tensors(config)
    shapes = {new_name: tuple(tensor.shape) for new_name, tensor in factors.items()}
    shapes |= {new_names[old_name]: tuple(weight.shape) for old_name, weight in weights.items()}
    parameters = sum(prod(shape) for shape in shapes.values())
    kind = "ALL" if quant == "f32" else "MOSTLY"
    keys = {
        "type": "model",
        "name": model_name(name, vocabulary.strips_space),
        "size_label": gguf.size_label(parameters, parameters, 0, 0),
        # llama.cpp uses these values as defaults of its sampler.
        "sampling_top_k": generation.get("top_k"),
        "sampling_top_p": generation.get("top_p"),
        "sampling_min_p": generation.get("min_p"),
        "sampling_temp": generation.get("temperature"),
        # Use the number of embedding rows as the vocabulary size, because the config may not count
        # added tokens.
        **config_keys({**config, "vocab_size": rows}, family),
        "file_type": gguf.LlamaFileType[f"{kind}_{quant.upper()}"],
        "quantization_version": gguf.GGML_QUANT_VERSION,
        **vocabulary.keys,
    }
    writer = new_writer(family.arch)
    add_keys(writer, keys)
    types = tensor_types(plain_tensors(shapes, quant), quant, header_values(writer))
    tensors = []
    for new_name, tensor in factors.items():
        source = WholeRows(tensor.shape, tensor.clone)
        tensors.append(GgufTensor(new_name, shapes[new_name], types[new_name], source))
    # Add 1 to the weights of Gemma's norms: Transformers multiplies by 1 + weight, but llama.cpp
    # multiplies by the stored weight.
    is_gemma = family.arch.startswith("gemma")
    for old_name, weight in weights.items():
        new_name = new_names[old_name]
        heads = heads_to_permute(new_name, config, family)
        offset = 1.0 if is_gemma and new_name.endswith("_norm.weight") else 0.0
        tensors.append(
            GgufTensor(new_name, shapes[new_name], types[new_name], weight, heads, offset)
        )
    load_ggml_if_needed(types.values())
    notes = (*notes_on_config(config), *vocabulary.notes)
    return GgufPlan(header_bytes(writer, tensors), tuple(tensors), notes)


def require_gguf() -> None:
    """Raise MachineError if the package `gguf`, which defines keys and tensor names, is missing."""
    require(
        "gguf",
        where="--to gguf",
        fix=SERVE_FOLDER,
    )


def new_writer(arch: str) -> "GGUFWriter":
    """Return a `gguf.GGUFWriter` without an open file."""
    import gguf

    return gguf.GGUFWriter(None, arch)


def add_keys(writer: "GGUFWriter", keys: Mapping[str, Any]) -> None:
    """Add values to the header of a `gguf.GGUFWriter`. Values that are None are left out.

    The value of the key `x` is added with the writer's method `add_x`. For example,
    `{"block_count": 24}` becomes `llama.block_count = 24` in the header.
    """
    for name, value in keys.items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)


def header_values(writer: "GGUFWriter") -> dict[str, Any]:
    """Return the values of the header by their full keys, such as `llama.block_count`."""
    return {key: value.value for key, value in writer.kv_data[0].items()}


def header_bytes(writer: "GGUFWriter", tensors: list[GgufTensor]) -> bytes:
    """Return the bytes of the file before the first tensor, including padding."""
    import gguf
    import numpy
    from gguf.gguf_writer import WriterState

    for tensor in tensors:
        ggml_type = gguf.GGMLQuantizationType[tensor.ggml_type]
        # Describe each tensor as raw bytes (dtype "V1") and give its size, because the writer gets
        # no data.
        writer.add_tensor_info(tensor.name, tensor.shape, numpy.dtype("V1"), tensor.size, ggml_type)
    # Give the writer a buffer instead of a file, and set its state as if a file had been opened.
    stream = io.BytesIO()
    writer.fout = [stream]
    writer.state = WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    header = stream.getvalue()
    return header.ljust(padded(len(header)), b"\0")
