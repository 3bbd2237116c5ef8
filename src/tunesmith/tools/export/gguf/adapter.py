"""Export of a LoRA as a GGUF file.

`llama-server --lora` loads this file together with the GGUF file of the base model.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from tunesmith.adapter.peft_files import PREFIX
from tunesmith.config.schema import Adapter
from tunesmith.errors import ModelError
from tunesmith.tools.export.gguf.families import (
    ModelConfig,
    gguf_names,
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


@dataclass(frozen=True)
class AdapterTarget:
    """Properties of an adapter for the header of its GGUF file.

    Attributes:
        name: the adapter's name, which llama.cpp shows.
        adapter: the adapter section of the recipe, with rank and alpha.
        added_tokens: number of tokens that the run added to the vocabulary.
    """

    name: str
    adapter: Adapter
    added_tokens: int = 0


BASE_COPY = ".base_layer.weight"  # suffix of PEFT's copies of a frozen head or embedding
WHOLE_MODEL_FIX = "export the entire model, without --adapter"


def plan_adapter(
    config: ModelConfig, weights: Mapping[str, RowSource], target: AdapterTarget
) -> GgufPlan:
    """Plan the GGUF file of an adapter. No weight is read.

    Args:
        config: `config.to_dict()` of the base's text model.
        weights: the tensors of `adapter_model.safetensors`. The names are those of an adapter of a
            text-only model, even if the base is a vision-language model.

    Raise ModelError if the run trained weights that an adapter file cannot hold.
    """
    require_gguf()
    family = read_family(config)
    matrices = lora_matrices(weights, target, is_tied=bool(config.get("tie_word_embeddings")))
    new_names = gguf_names({base_name for base_name, _ in matrices}, config, family)
    tensors = []
    for (base_name, suffix), weight in matrices.items():
        new_name = new_names[base_name]
        heads = None
        # If GGUF reorders the rows of the base weight, the rows of B need the same order. A
        # corresponds to the columns of the base weight, which are never reordered.
        if suffix == ".lora_b":
            heads = heads_to_permute(new_name, config, family)
        # llama.cpp's tensors `lora_a` [r, in] and `lora_b` [out, r] have the same shapes as PEFT's
        # matrices, so nothing is transposed.
        tensors.append(GgufTensor(new_name + suffix, tuple(weight.shape), "F16", weight, heads))
    return adapter_plan(family.arch, target, tensors)


def adapter_plan(arch: str, target: AdapterTarget, tensors: list[GgufTensor]) -> GgufPlan:
    """Return the plan of an adapter file: its header, and these tensors."""
    writer = new_writer(arch)
    writer.add_type("adapter")
    writer.add_name(target.name)
    writer.add_string("adapter.type", "lora")
    alpha = target.adapter.alpha
    # llama.cpp scales an adapter by alpha / r, but rsLoRA scales by alpha / sqrt(r).
    if target.adapter.rslora:
        alpha *= math.sqrt(target.adapter.rank)
    writer.add_float32("adapter.lora.alpha", alpha)
    return GgufPlan(header_bytes(writer, tensors), tuple(tensors))


def lora_matrices(
    weights: Mapping[str, RowSource], target: AdapterTarget, *, is_tied: bool
) -> dict[tuple[str, str], RowSource]:
    """Return a dict from (name of the base weight, llama.cpp's suffix) to each LoRA matrix.

    For example, the matrix A of `q_proj` has the key
    `("model.layers.0.self_attn.q_proj.weight", ".lora_a")`.

    Raise ModelError if the run trained weights that llama.cpp cannot apply from an adapter.
    """
    if target.added_tokens:
        raise _inexpressible(
            f"has {count_of(target.added_tokens, 'added token')} that the base does not have"
        )
    matrices = {}
    for name, weight in weights.items():
        if name.endswith(BASE_COPY):
            continue
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name.removeprefix(PREFIX))
        if match is None:
            # The tensor belongs to a fully trained module or to another kind of adapter.
            raise _inexpressible(f"has {name}, which is not a LoRA matrix")
        matrices[f"{match[1]}.weight", f".lora_{match[2].lower()}"] = weight
    for base_name, _ in matrices:
        if base_name == "model.embed_tokens.weight":
            raise _inexpressible("changes the embedding")
        if base_name == "lm_head.weight" and is_tied:
            raise _inexpressible("changes an output layer that is tied to the embedding")
        # Refuse this weight, because llama.cpp silently ignores an adapter of it.
        if base_name == "model.per_layer_model_projection.weight":
            raise _inexpressible("changes per_layer_model_projection, which llama.cpp ignores")
        if ".experts." in base_name:
            raise _inexpressible("has LoRA matrices of experts")
    return matrices


def _inexpressible(what: str) -> ModelError:
    return ModelError(
        f"the adapter {what}",
        where="--adapter",
        why="llama.cpp supports LoRA matrices only for linear layers that are not experts",
        fix=WHOLE_MODEL_FIX,
    )
