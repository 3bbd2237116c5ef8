"""llama.cpp's names for the families of `model/architectures.py`, and their numbers in a header.

A family without a row here, or one with a setting that llama.cpp would compute otherwise, is
refused: a GGUF file has no place for what its architecture does not name, so it would load and
answer wrongly. Names of keys and tensors are those of the package `gguf`.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from tunesmith.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFWriter

LLAMA_CPP = "https://github.com/ggml-org/llama.cpp"
OWN_SCRIPT = f"tunesmith merge RUN, then convert_hf_to_gguf.py of {LLAMA_CPP}, which has more"

_ATTENTION_INPUTS = ("attn_q", "attn_k", "attn_v")
_ALL_LINEARS = (*_ATTENTION_INPUTS, "attn_output", "ffn_gate", "ffn_up", "ffn_down")


class Rope(TypedDict, total=False):
    """Rotary embeddings of a config.json."""

    rope_type: str
    rope_theta: float
    factor: float
    partial_rotary_factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float
    truncate: bool
    low_freq_factor: float
    high_freq_factor: float
    long_factor: Sequence[float]
    short_factor: Sequence[float]


class RopeByAttention(Rope, total=False):
    """Rotary embeddings of a config.json, which may be one by type of attention."""

    full_attention: Rope
    sliding_attention: Rope


class ModelConfig(TypedDict, total=False):
    """The keys of a config.json that a GGUF file depends on; the first nine are always there."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int
    max_position_embeddings: int
    vocab_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    head_dim: int
    num_key_value_heads: int
    hidden_act: str
    hidden_activation: str
    sliding_window: int
    use_sliding_window: bool
    layer_types: Sequence[str]
    no_rope_layers: Sequence[int]
    query_pre_attn_scalar: int
    attn_logit_softcapping: float
    final_logit_softcapping: float
    rope_parameters: RopeByAttention
    original_max_position_embeddings: int
    attention_multiplier: float
    embedding_multiplier: float
    residual_multiplier: float
    logits_scaling: float
    bos_token_id: int
    eos_token_id: int
    unk_token_id: int
    sep_token_id: int
    pad_token_id: int
    mask_token_id: int


@dataclass(frozen=True)
class GgufFamily:
    """One row: what differs between families in a GGUF file."""

    arch: str  # llama.cpp's name of the architecture
    # Its rotary kernel takes neighbors as a pair, Transformers' the two halves of a head: rows of
    # q and k change places.
    pairs_neighbors: bool = False
    # Transformers multiplies with 1 + weight of a norm, llama.cpp with the weight; the activation
    # is `gelu_pytorch_tanh` in place of `silu`; llama.cpp reads no `output.weight`.
    is_gemma: bool = False
    # Types of rotary embeddings beside the plain one.
    ropes: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()  # layers whose bias llama.cpp reads
    # Every n-th layer sees all tokens, and the others a window.
    full_attention_every: int | None = None
    # llama.cpp computes full attention where the config asks for a window.
    ignores_window: bool = False
    # The number of layers at which llama.cpp scales scores by hidden_size / heads.
    scaled_by_width_at: int | None = None


_LLAMA_ROPES = ("linear", "yarn", "llama3")

FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily(
        "llama",
        pairs_neighbors=True,
        ropes=_LLAMA_ROPES,
        biases=_ALL_LINEARS,
    ),
    "mistral": GgufFamily(
        "llama",
        pairs_neighbors=True,
        ropes=_LLAMA_ROPES,
        ignores_window=True,
    ),
    "smollm3": GgufFamily(
        "smollm3",
        pairs_neighbors=True,
        ropes=("linear", "yarn"),
        ignores_window=True,
    ),
    "granite": GgufFamily(
        "granite",
        pairs_neighbors=True,
        ropes=_LLAMA_ROPES,
        biases=_ALL_LINEARS,
    ),
    "qwen2": GgufFamily(
        "qwen2", ropes=("linear", "yarn"), biases=_ATTENTION_INPUTS, ignores_window=True
    ),
    "qwen3": GgufFamily("qwen3", ropes=("linear", "yarn"), ignores_window=True),
    "olmo2": GgufFamily("olmo2", ropes=("linear", "yarn")),
    "phi3": GgufFamily("phi3", ropes=("longrope",), ignores_window=True),
    "gemma": GgufFamily("gemma", is_gemma=True),
    "gemma2": GgufFamily(
        "gemma2",
        is_gemma=True,
        full_attention_every=2,
        scaled_by_width_at=46,
    ),
    "gemma3_text": GgufFamily(
        "gemma3",
        is_gemma=True,
        ropes=("linear",),
        full_attention_every=6,
        scaled_by_width_at=62,
    ),
}


def read_family(config: ModelConfig) -> GgufFamily:
    """The row of a parsed config.json (`config.to_dict()`).

    ModelError where the family has none, or a value of the config is one that llama.cpp computes
    otherwise.
    """
    model_type = config["model_type"]
    family = FAMILIES.get(model_type)
    if family is None:
        raise ModelError(
            f"{model_type} is not supported for GGUF export",
            where="config.json: model_type",
            why=f"supported: {', '.join(FAMILIES)}",
            fix=OWN_SCRIPT,
        )
    _check_rope(config, family)
    _check_activation(config, family)
    _check_softcaps(config)
    if model_type == "smollm3":
        _check_layers_without_rope(config)
    if family.full_attention_every is not None:
        _check_layer_types(config, family.full_attention_every)
    if family.scaled_by_width_at is not None:
        _check_attention_scale(config, family.scaled_by_width_at)
    # Without `key_length` in the header llama.cpp divides the width by the heads.
    if family.arch == "granite" and head_dim(config) != _default_head_dim(config):
        raise _other_math("head_dim", head_dim(config), _default_head_dim(config))
    return family


def notes_on_config(config: ModelConfig, family: GgufFamily) -> list[str]:
    """List for the user what llama.cpp leaves out of the model; it changes long texts only."""
    notes = []
    window = config.get("sliding_window")
    is_used = config.get("use_sliding_window", True)
    # A window as long as the context changes nothing.
    if family.ignores_window and window and is_used and window < config["max_position_embeddings"]:
        notes.append(
            f"llama.cpp has no sliding window for this family: it differs after {window} tokens"
        )
    full, _ = rope_parameters(config)
    if full["rope_type"] == "longrope":
        original = _original_context(config, full)
        notes.append(
            f"llama.cpp uses the long rope factors for short texts too if its context is above "
            f"{original}: start it with -c {original} for those"
        )
    return notes


def _other_math(key: str, value: object, computed: object) -> ModelError:
    return ModelError(
        f"llama.cpp has no {key} = {value} for this family",
        where=f"config.json: {key}",
        why=f"it computes with {computed}, and a GGUF file cannot change that",
        fix=f"serve the Transformers folder: tunesmith merge RUN; or see {LLAMA_CPP}",
    )


def _default_head_dim(config: ModelConfig) -> int:
    return config["hidden_size"] // config["num_attention_heads"]


def head_dim(config: ModelConfig) -> int:
    """Channels of a head."""
    return config.get("head_dim") or _default_head_dim(config)


def kv_heads(config: ModelConfig) -> int:
    """Heads of keys and values."""
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def _check_activation(config: ModelConfig, family: GgufFamily) -> None:
    computed = "gelu_pytorch_tanh" if family.is_gemma else "silu"
    activation = config.get("hidden_activation") or config.get("hidden_act") or computed
    # The first Gemma was published with `gelu` and meant its approximation by tanh.
    if activation != computed and not (family.is_gemma and activation == "gelu"):
        raise _other_math("hidden_act", activation, computed)


def _check_softcaps(config: ModelConfig) -> None:
    """llama.cpp has numbers of its own for a Gemma 2 without them, and no first one for Gemma 3."""
    attention = config.get("attn_logit_softcapping")
    if config["model_type"] == "gemma2":
        if not attention:
            raise _other_math("attn_logit_softcapping", attention, 50.0)
        if not config.get("final_logit_softcapping"):
            raise _other_math("final_logit_softcapping", None, 30.0)
    if config["model_type"] == "gemma3_text" and attention:
        raise _other_math("attn_logit_softcapping", attention, "none")


def _check_layers_without_rope(config: ModelConfig) -> None:
    """llama.cpp's SmolLM3 rotates in all layers but every fourth."""
    layers = config["num_hidden_layers"]
    rotated = config.get("no_rope_layers")  # 1: rotated
    computed = [int((layer + 1) % 4 != 0) for layer in range(layers)]
    if rotated and list(rotated) != computed:
        raise _other_math("no_rope_layers", rotated, "rotation in all layers but every fourth")


def _check_layer_types(config: ModelConfig, every: int) -> None:
    kinds = config.get("layer_types")
    computed = []
    for layer in range(config["num_hidden_layers"]):
        is_full = (layer + 1) % every == 0
        computed.append("full_attention" if is_full else "sliding_attention")
    if kinds and list(kinds) != computed:
        raise _other_math("layer_types", kinds, f"full attention in every layer of {every}")


def _check_attention_scale(config: ModelConfig, by_width_at: int) -> None:
    """Scores are divided by the root of a number that the header does not have."""
    # The 27B sizes: the published scale is that of the width, not of the head.
    computed = head_dim(config)
    if config["num_hidden_layers"] == by_width_at:
        computed = _default_head_dim(config)
    scalar = config.get("query_pre_attn_scalar", computed)
    if scalar != computed:
        raise _other_math("query_pre_attn_scalar", scalar, computed)


# Rotary embeddings


def rope_parameters(config: ModelConfig) -> tuple[Rope, Rope]:
    """Return those of full and of sliding attention; the second is empty where all layers have one.

    Transformers writes older spellings into `rope_parameters` when it reads a config.json.
    """
    parameters = config["rope_parameters"]
    if "full_attention" in parameters:
        return parameters["full_attention"], parameters["sliding_attention"]
    return parameters, {}


def _check_rope(config: ModelConfig, family: GgufFamily) -> None:
    full, sliding = rope_parameters(config)
    rope_type = full["rope_type"]
    if rope_type != "default" and rope_type not in family.ropes:
        computed = " or ".join(("plain ones", *family.ropes))
        raise _other_math("rope_type", rope_type, computed)
    if sliding and sliding.get("rope_type", "default") != "default":
        raise _other_math("rope_type", sliding["rope_type"], "plain ones in layers with a window")
    partial = full.get("partial_rotary_factor") or 1.0
    # Phi-4 mini rotates a part of each head; the others here rotate all of it.
    if partial != 1.0 and config["model_type"] != "phi3":
        raise _other_math("partial_rotary_factor", partial, 1.0)
    if rope_type == "yarn":
        _check_yarn(full)
    if rope_type == "longrope":
        pairs = rotary_dims(config) // 2
        long, short = full.get("long_factor", ()), full.get("short_factor", ())
        lists = {"long_factor": long, "short_factor": short}
        for key, factors in lists.items():
            if len(factors) != pairs:
                raise _other_math(key, factors, f"a list of {pairs} factors")


def _check_yarn(rope: Rope) -> None:
    """llama.cpp scales scores by 0.1 ln(factor) + 1, and rounds the bounds of its ramp."""
    computed = 0.1 * math.log(rope["factor"]) + 1.0
    factor = rope.get("attention_factor")
    if factor is not None and not math.isclose(factor, computed, rel_tol=1e-6):
        raise _other_math("attention_factor", factor, computed)
    scales = {"mscale": rope.get("mscale"), "mscale_all_dim": rope.get("mscale_all_dim")}
    for key, scale in scales.items():
        if scale:
            raise _other_math(key, scale, "none")
    if rope.get("truncate") is False:
        raise _other_math("truncate", False, True)


def rotary_dims(config: ModelConfig) -> int:
    """Channels of a head that are rotated."""
    full, _ = rope_parameters(config)
    partial = full.get("partial_rotary_factor") or 1.0
    return int(head_dim(config) * partial)


def rope_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Compute the divisors of the frequencies, by the tensors' names: fp32 [rotary_dims / 2]."""
    full, _ = rope_parameters(config)
    if full["rope_type"] == "llama3":
        return {"rope_freqs.weight": _llama3_factors(full, rotary_dims(config))}
    if full["rope_type"] == "longrope":
        return {
            "rope_factors_long.weight": torch.tensor(full["long_factor"], dtype=torch.float32),
            "rope_factors_short.weight": torch.tensor(full["short_factor"], dtype=torch.float32),
        }
    return {}


def _llama3_factors(rope: Rope, dims: int) -> Tensor:
    """1 for short waves, `factor` for long ones, and a line between the two in frequency."""
    factor = rope["factor"]
    low = rope["low_freq_factor"]
    high = rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    exponents = torch.arange(0, dims, 2, dtype=torch.float32) / dims
    # `rope_freqs.weight` divides the frequencies: the same three ranges that Transformers has.
    wavelengths = 2 * math.pi / (1.0 / (rope["rope_theta"] ** exponents))
    smooth = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


# The header


def add_config(writer: "GGUFWriter", config: ModelConfig, family: GgufFamily) -> None:
    """The config's numbers into a `gguf.GGUFWriter`."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(kv_heads(config))
    _add_rope(writer, config)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    # Only where the config has the key, as llama.cpp's converter does.
    if family.arch != "granite" and config.get("head_dim") is not None:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    # As llama.cpp's converter does.
    if family.pairs_neighbors:
        writer.add_vocab_size(config["vocab_size"])
    if family.pairs_neighbors or family.arch == "phi3":
        writer.add_rope_dimension_count(rotary_dims(config))
    model_type = config["model_type"]
    if model_type == "granite":
        _add_granite(writer, config)
    if model_type == "phi3":
        writer.add_sliding_window(config.get("sliding_window") or 0)
    if family.full_attention_every is not None:
        writer.add_sliding_window(config["sliding_window"])
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def _add_granite(writer: "GGUFWriter", config: ModelConfig) -> None:
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])


def _add_rope(writer: "GGUFWriter", config: ModelConfig) -> None:
    import gguf

    full, sliding = rope_parameters(config)
    rope_type = full["rope_type"]
    if rope_type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    if rope_type == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(full["factor"])
        writer.add_rope_scaling_orig_ctx_len(_original_context(config, full))
        if full.get("beta_fast") is not None:
            writer.add_rope_scaling_yarn_beta_fast(full["beta_fast"])
        if full.get("beta_slow") is not None:
            writer.add_rope_scaling_yarn_beta_slow(full["beta_slow"])
    if config["model_type"] == "phi3":
        writer.add_rope_scaling_orig_ctx_len(_original_context(config, full))
    if rope_type == "longrope":
        writer.add_rope_scaling_attn_factors(_longrope_scale(config, full))
    writer.add_rope_freq_base(full["rope_theta"])
    if sliding:
        writer.add_rope_freq_base_swa(sliding["rope_theta"])


def _original_context(config: ModelConfig, rope: Rope) -> int:
    return (
        rope.get("original_max_position_embeddings")
        or config.get("original_max_position_embeddings")
        or config["max_position_embeddings"]
    )


def _longrope_scale(config: ModelConfig, rope: Rope) -> float:
    """Compute the factor of queries and keys, as Transformers does."""
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    original = _original_context(config, rope)
    factor = config["max_position_embeddings"] / original
    if factor <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original))


# Weights


def check_tensor_names(
    names: Collection[str], config: ModelConfig, family: GgufFamily
) -> dict[str, str]:
    """llama.cpp's name of each parameter. ModelError where it has none."""
    import gguf

    arches = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    layers = config["num_hidden_layers"]
    table = gguf.get_tensor_name_map(arches[family.arch], layers)
    renamed = {}
    for name in names:
        new_name = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if new_name is None or not _is_read(new_name, family):
            raise ModelError(
                f"llama.cpp's {family.arch} has no place for {name}",
                where="the model's weights",
                why="it would load without them and give wrong answers",
                fix="serve the Transformers folder: tunesmith merge RUN",
            )
        renamed[name] = new_name
    return renamed


def _is_read(new_name: str, family: GgufFamily) -> bool:
    if new_name == "output.weight":
        return not family.is_gemma
    if new_name.endswith(".bias"):
        # `blk.0.attn_q.bias`: the part before the last names the layer.
        layer = new_name.split(".")[-2]
        return layer in family.biases
    return True


def heads_to_permute(new_name: str, config: ModelConfig, family: GgufFamily) -> int | None:
    """Heads of a tensor whose rows change places; None: they stay."""
    if not family.pairs_neighbors:
        return None
    layer = new_name.split(".")[-2]
    if layer == "attn_q":
        return config["num_attention_heads"]
    if layer == "attn_k":
        return kv_heads(config)
    return None


def pair_neighbors(rows: Tensor, head: int) -> Tensor:
    """Rows of whole heads of `head` rows each: the two halves of a head, in turns."""
    # [heads, 2, half] -> [heads, half, 2]: channel i of the second half comes after i of the first.
    halves = rows.unflatten(0, (-1, 2, head // 2))
    return halves.transpose(1, 2).reshape(rows.shape)
