"""The families of `model/architectures.py` in llama.cpp: names of tensors, numbers of the header.

A family that it does not know, or one with a setting that llama.cpp would compute otherwise, is
refused: a GGUF file has no place for what its architecture does not name, so it would load and
answer wrongly. Names of keys and tensors are those of the package `gguf`.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor
from transformers import AutoConfig

from tunesmith.errors import ModelError
from tunesmith.model.architectures import ARCHITECTURES, GgufFamily

if TYPE_CHECKING:
    from gguf import GGUFWriter

LLAMA_CPP = "https://github.com/ggml-org/llama.cpp"
OWN_SCRIPT = f"tunesmith merge RUN, then convert_hf_to_gguf.py of {LLAMA_CPP}, which has more"


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


# At so many layers llama.cpp scales scores by hidden_size / heads: the 27B sizes.
_SCALED_BY_WIDTH_AT = {"gemma2": 46, "gemma3": 62}


def read_family(config: ModelConfig) -> GgufFamily:
    """The row of a parsed config.json (`config.to_dict()`).

    ModelError where the family has none, or a value of the config is one that llama.cpp computes
    otherwise.
    """
    model_type = config["model_type"]
    row = ARCHITECTURES.get(model_type)
    if row is None or row.gguf is None:
        supported = [name for name, other in ARCHITECTURES.items() if other.gguf]
        raise ModelError(
            f"{model_type} is not supported for GGUF export",
            where="config.json: model_type",
            why=f"supported: {', '.join(supported)}",
            fix=OWN_SCRIPT,
        )
    _check_rope(config, row.gguf)
    _check_defaults(config)
    _check_attention_scale(config, row.gguf.arch)
    return row.gguf


def _reads_window(config: ModelConfig) -> bool:
    """Tell whether llama.cpp computes the windows of the family; the others it ignores."""
    return ARCHITECTURES[config["model_type"]].window in ("every-second", "pattern")


def notes_on_config(config: ModelConfig) -> list[str]:
    """List for the user what llama.cpp leaves out of the model; it changes long texts only."""
    notes = []
    window = config.get("sliding_window")
    is_used = config.get("use_sliding_window", True) and not _reads_window(config)
    # A window as long as the context changes nothing.
    if is_used and window and window < config["max_position_embeddings"]:
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


def _check_defaults(config: ModelConfig) -> None:
    """Refuse what a file has no key for, unless it is the family's default: that is computed."""
    layers = config["num_hidden_layers"]
    plain = AutoConfig.for_model(config["model_type"], num_hidden_layers=layers)
    defaults: Mapping[str, object] = plain.to_dict()
    values: Mapping[str, object] = config
    unwritten = ["hidden_act", "hidden_activation", "no_rope_layers"]
    if _reads_window(config):
        unwritten.append("layer_types")
    for key in unwritten:
        pair = values.get(key), defaults.get(key)
        # The first Gemma was published with `gelu` and meant its approximation by tanh.
        is_meant = pair[0] == pair[1] or pair == ("gelu", "gelu_pytorch_tanh")
        if key in defaults and pair[0] and not is_meant:
            raise _other_math(key, *pair)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        # A header without a cap stands for the default.
        if defaults.get(key) and not values.get(key):
            raise _other_math(key, values.get(key), defaults[key])
    if config.get("attn_logit_softcapping") and not defaults.get("attn_logit_softcapping"):
        raise _other_math("attn_logit_softcapping", config["attn_logit_softcapping"], "none")


def _check_attention_scale(config: ModelConfig, arch: str) -> None:
    """Scores are divided by the root of a number that the header does not have."""
    computed = head_dim(config)
    # The published scale is that of the width, not of the head.
    if config["num_hidden_layers"] == _SCALED_BY_WIDTH_AT.get(arch):
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
    if partial != 1.0 and family.arch != "phi3":
        raise _other_math("partial_rotary_factor", partial, 1.0)
    if rope_type == "yarn":
        _check_yarn(full)
    if rope_type == "longrope":
        pairs = rotary_dims(config) // 2
        long, short = full.get("long_factor", ()), full.get("short_factor", ())
        for key, factors in {"long_factor": long, "short_factor": short}.items():
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
    writer.add_head_count_kv(config["num_key_value_heads"])
    is_phi3 = family.arch == "phi3"
    _add_rope(writer, config, is_phi3=is_phi3)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    # Only where the config has the key, as llama.cpp's converter does.
    if config.get("head_dim") is not None:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    # As llama.cpp's converter does.
    if family.rotates_neighbors:
        writer.add_vocab_size(config["vocab_size"])
    if family.rotates_neighbors or is_phi3:
        writer.add_rope_dimension_count(rotary_dims(config))
    if _reads_window(config) or is_phi3:
        writer.add_sliding_window(config["sliding_window"] or 0)
    factors = (
        (writer.add_attention_scale, config.get("attention_multiplier")),
        (writer.add_embedding_scale, config.get("embedding_multiplier")),
        (writer.add_residual_scale, config.get("residual_multiplier")),
        (writer.add_logit_scale, config.get("logits_scaling")),
        (writer.add_attn_logit_softcapping, config.get("attn_logit_softcapping")),
        (writer.add_final_logit_softcapping, config.get("final_logit_softcapping")),
    )
    for add, factor in factors:
        if factor:
            add(factor)


def _add_rope(writer: "GGUFWriter", config: ModelConfig, *, is_phi3: bool) -> None:
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
    if is_phi3:
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
        is_lost_bias = name.endswith(".bias") and not family.reads_biases
        if new_name is None or is_lost_bias:
            raise ModelError(
                f"llama.cpp's {family.arch} has no place for {name}",
                where="the model's weights",
                why="it would load without them and give wrong answers",
                fix="serve the Transformers folder: tunesmith merge RUN",
            )
        renamed[name] = new_name
    return renamed


def heads_to_permute(new_name: str, config: ModelConfig, family: GgufFamily) -> int | None:
    """Heads of a tensor whose rows change places; None: they stay."""
    if not family.rotates_neighbors:
        return None
    layer = new_name.split(".")[-2]
    if layer == "attn_q":
        return config["num_attention_heads"]
    if layer == "attn_k":
        return config["num_key_value_heads"]
    return None


def pair_neighbors(rows: Tensor, head: int) -> Tensor:
    """Rows of whole heads of `head` rows each: the two halves of a head, in turns."""
    # [heads, 2, half] -> [heads, half, 2]: channel i of the second half comes after i of the first.
    halves = rows.unflatten(0, (-1, 2, head // 2))
    return halves.transpose(1, 2).reshape(rows.shape)
