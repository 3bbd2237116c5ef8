"""A LoRA alone as a GGUF file, which `llama-server --lora` adds to the GGUF of its base."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.adapter.peft_files import PREFIX
from tunesmith.config.schema import Adapter
from tunesmith.errors import ModelError
from tunesmith.tools.export.gguf.families import (
    ModelConfig,
    check_tensor_names,
    heads_to_permute,
    read_family,
)
from tunesmith.tools.export.gguf.plan import (
    GgufPlan,
    GgufTensor,
    header_bytes,
    new_writer,
    require_gguf,
)
from tunesmith.tools.export.tuned_weights import RowSource
from tunesmith.units import count_of

if TYPE_CHECKING:
    from gguf import GGUFWriter


@dataclass(frozen=True)
class GgufBase:
    """The GGUF file that a run was trained on, and the only one that its adapter is for."""

    file: Path
    sha256: str


@dataclass(frozen=True)
class AdapterTarget:
    """The adapter that a GGUF file is written for, and what its header says.

    Attributes:
        name: what llama.cpp shows as its name.
        adapter: its rank and alpha.
        added_tokens: tokens that the run added to the base's.
        base: the one file that it is for, where the run was trained on a GGUF file.
    """

    name: str
    adapter: Adapter
    added_tokens: int = 0
    base: GgufBase | None = None


# PEFT's suffixes and llama.cpp's.
_FACTOR_SUFFIXES = {".lora_A.weight": ".lora_a", ".lora_B.weight": ".lora_b"}
WHOLE_MODEL_FIX = "export the whole model: the same command without --adapter"


def plan_adapter(
    config: ModelConfig, weights: Mapping[str, RowSource], target: AdapterTarget
) -> GgufPlan:
    """The file of an adapter; no weight is read.

    Args:
        config: `config.to_dict()` of the base's text model.
        weights: those of `adapter_model.safetensors`, by the names that a text model has there.

    ModelError where more was trained than such a file can hold.
    """
    require_gguf()
    family = read_family(config)
    refuse_unsupported(weights, target, is_tied=bool(config.get("tie_word_embeddings")))
    matrices = lora_matrices(weights)
    new_names = check_tensor_names({base_name for base_name, _ in matrices}, config, family)
    tensors = []
    for (base_name, suffix), weight in matrices.items():
        new_name = new_names[base_name]
        heads = None
        # Rows of B are those of the base's weight; A has its columns, which stay.
        if suffix == ".lora_b":
            heads = heads_to_permute(new_name, config, family)
        tensors.append(GgufTensor(new_name + suffix, tuple(weight.shape), "F16", weight, heads))
    writer = adapter_header(family.arch, target)
    return GgufPlan(header_bytes(writer, tensors), tuple(tensors))


def adapter_header(arch: str, target: AdapterTarget) -> "GGUFWriter":
    """Return a writer with the keys of an adapter's file."""
    writer = new_writer(arch)
    # `lora_a` is [r, in] and `lora_b` [out, r], as PEFT stores them.
    writer.add_type("adapter")
    writer.add_name(target.name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", _alpha(target.adapter))
    if target.base is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, target.base.file.name)
        writer.add_string("tunesmith.base.sha256", target.base.sha256)
    return writer


def refuse_unsupported(
    weights: Mapping[str, RowSource], target: AdapterTarget, *, is_tied: bool
) -> None:
    """Raise ModelError where more was trained than llama.cpp applies from an adapter's file."""
    if target.added_tokens:
        raise _inexpressible(
            f"{count_of(target.added_tokens, 'token')} that the base does not have"
        )
    for base_name, _ in lora_matrices(weights):
        if base_name == "model.embed_tokens.weight":
            raise _inexpressible("a change of the embedding")
        if base_name == "lm_head.weight" and is_tied:
            raise _inexpressible("a change of a head that is the embedding")
        # llama.cpp multiplies by it without the adapter.
        if base_name == "model.per_layer_model_projection.weight":
            raise _inexpressible("a change of per_layer_model_projection")
        if ".experts." in base_name:
            raise _inexpressible("matrices of experts")


def lora_matrices(weights: Mapping[str, RowSource]) -> dict[tuple[str, str], RowSource]:
    """Return the matrices by llama.cpp's suffix and the weight's name in the text model."""
    matrices = {}
    for name, weight in weights.items():
        if name.endswith(".base_layer.weight"):
            continue  # PEFT's copy of a frozen head or embedding
        for part, suffix in _FACTOR_SUFFIXES.items():
            if name.endswith(part):
                layer = name.removeprefix(PREFIX).removesuffix(part)
                matrices[f"{layer}.weight", suffix] = weight
                break
        # No suffix matched: a LoRA of another form, or a part that was trained whole.
        else:
            raise _inexpressible(f"{name}, which is not a LoRA matrix")
    return matrices


def _alpha(adapter: Adapter) -> float:
    """llama.cpp scales by alpha / r; rsLoRA by alpha / sqrt(r)."""
    return adapter.alpha * math.sqrt(adapter.rank) if adapter.rslora else adapter.alpha


def _inexpressible(what: str) -> ModelError:
    return ModelError(
        f"the adapter has {what}",
        where="--adapter",
        why="llama.cpp only supports LoRA matrices of linear layers",
        fix=WHOLE_MODEL_FIX,
    )
