"""Conversion of model configs to GGUF, for the model families of `model/known/architectures.py`.

The functions return tensor names and header values. They refuse families that llama.cpp does not
support, and settings for which GGUF has no key. With such a setting llama.cpp would load the file
and give wrong answers. The names of keys and tensors come from the package `gguf`.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from tunesmith.errors import ModelError
from tunesmith.model.known.architectures import ARCHITECTURES, GgufFamily

LLAMA_CPP = "https://github.com/ggml-org/llama.cpp"
# Fixes for errors: what the user can do if GGUF export does not support the model.
SERVE_FOLDER = (
    "serve the model with Transformers or vLLM: run `tunesmith merge RUN --output FOLDER` and "
    "serve FOLDER (a full fine-tune needs no merge: serve its folder final/)"
)
OWN_SCRIPT = (
    "run `tunesmith merge RUN --output FOLDER`, then convert FOLDER with convert_hf_to_gguf.py of "
    f"{LLAMA_CPP}, which supports more model types (a full fine-tune needs no merge: convert its "
    "folder final/)"
)


ModelConfig = Mapping[str, Any]  # `config.to_dict()` of a text model, as in config.json
# Parameters of rotary position embeddings (RoPE), from `rope_parameters` in a config.json.
Rope = Mapping[str, Any]
# Key of a config.json, its value, and a description of the values that llama.cpp supports.
Setting = tuple[str, object, object]

# Architecture -> number of layers of its 27B model. llama.cpp recognizes the 27B models by this
# number. It divides their attention scores by sqrt(hidden_size / heads), and those of all other
# models by sqrt(head_dim).
_SCALED_BY_WIDTH_AT = {"gemma2": 46, "gemma3": 62}


def read_family(config: ModelConfig) -> GgufFamily:
    """Return the GGUF family of a model.

    Raise ModelError if the model type is not supported, or if llama.cpp would compute a value of
    the config differently.
    """
    model_type = config["model_type"]
    row = ARCHITECTURES.get(model_type)
    if row is None or row.gguf is None:
        supported = [name for name, other in ARCHITECTURES.items() if other.gguf]
        raise ModelError(
            f"GGUF export does not support the model type {model_type}",
            where="config.json: model_type",
            why=f"the supported model types are {', '.join(supported)}",
            fix=OWN_SCRIPT,
        )
    # Report only the first unsupported setting.
    for key, value, supported_value in _unsupported_settings(config, row.gguf):
        raise ModelError(
            f"llama.cpp does not support {key} = {value} for this model family",
            where=f"config.json: {key}",
            why=f"llama.cpp supports only {supported_value}, and a GGUF file cannot set another "
            "value",
            fix=SERVE_FOLDER,
        )
    return row.gguf


def _unsupported_settings(config: ModelConfig, family: GgufFamily) -> Iterator[Setting]:
    """Yield the settings that llama.cpp computes differently, because GGUF has no key for them."""
    yield from _unsupported_rope(config, family)
    yield from _unsupported_defaults(config)
    # The model divides the attention scores by the square root of `query_pre_attn_scalar`.
    computed = head_dim(config)
    # For the 27B models, llama.cpp uses hidden_size / heads instead of the head dimension.
    if config["num_hidden_layers"] == _SCALED_BY_WIDTH_AT.get(family.arch):
        computed = config["hidden_size"] // config["num_attention_heads"]
    scalar = config.get("query_pre_attn_scalar", computed)
    if scalar != computed:
        yield "query_pre_attn_scalar", scalar, computed


def _reads_window(config: ModelConfig) -> bool:
    """Return whether llama.cpp supports the sliding attention windows of the model's family."""
    return ARCHITECTURES[config["model_type"]].window in ("every-second", "pattern")


def notes_on_config(config: ModelConfig) -> list[str]:
    """Return notes for the user about features that llama.cpp does not support.

    These features only affect long texts, so the model can be exported.
    """
    notes = []
    window = config.get("sliding_window")
    is_used = config.get("use_sliding_window", True) and not _reads_window(config)
    # Skip a window that is as long as the context, because it has no effect.
    if is_used and window and window < config["max_position_embeddings"]:
        notes.append(
            "llama.cpp does not support the sliding window of this model: the answers differ after "
            f"{window} tokens"
        )
    full = full_rope(config)
    if full["rope_type"] == "longrope":
        original = _original_context(config, full)
        notes.append(
            f"with a context above {original}, llama.cpp uses the long rope factors also for short "
            f"texts: start llama.cpp with -c {original} for short texts"
        )
    return notes


def head_dim(config: ModelConfig) -> int:
    """Return the number of channels of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _unsupported_defaults(config: ModelConfig) -> Iterator[Setting]:
    """Yield the settings without a GGUF key that differ from the default of the model type.

    llama.cpp would compute with the default.
    """
    # The length of a default list, such as `layer_types`, is the number of layers.
    layers = config["num_hidden_layers"]
    plain = AutoConfig.for_model(config["model_type"], num_hidden_layers=layers)
    defaults: ModelConfig = plain.to_dict()
    unwritten = ["hidden_act", "hidden_activation", "no_rope_layers"]
    if _reads_window(config):
        unwritten.append("layer_types")
    for key in unwritten:
        value, default = config.get(key), defaults.get(key)
        # The config of Gemma 1 says `gelu`, but the model uses the tanh approximation.
        is_default = value == default or (value, default) == ("gelu", "gelu_pytorch_tanh")
        if key in defaults and value and not is_default:
            yield key, value, default
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        # If the header has no softcap, llama.cpp uses the default of the family. Therefore it would
        # compute a model without softcap wrongly.
        if defaults.get(key) and not config.get(key):
            yield key, config.get(key), defaults[key]
    # In llama.cpp, attention has no softcap in families that do not have one by default, such as
    # Gemma 3.
    softcap = config.get("attn_logit_softcapping")
    if softcap and not defaults.get("attn_logit_softcapping"):
        yield "attn_logit_softcapping", softcap, "none"


# Functions for rotary embeddings


def full_rope(config: ModelConfig) -> Rope:
    """Return the RoPE parameters of the layers with full attention.

    The layers with sliding attention can have other parameters, see `sliding_rope`. Only the key
    `rope_parameters` is read, because Transformers converts older keys to it when it reads a
    config.json.
    """
    by_attention: Mapping[str, Rope] = config["rope_parameters"]
    return by_attention.get("full_attention", by_attention)


def sliding_rope(config: ModelConfig) -> Rope:
    """Return the RoPE parameters of the layers with sliding attention.

    Return an empty dict if all layers have the same parameters.
    """
    by_attention: Mapping[str, Rope] = config["rope_parameters"]
    return by_attention.get("sliding_attention", {})


def _unsupported_rope(config: ModelConfig, family: GgufFamily) -> Iterator[Setting]:
    full, sliding = full_rope(config), sliding_rope(config)
    rope_type = full["rope_type"]
    supported = ("default", *family.ropes)
    if rope_type not in supported:
        yield "rope_type", rope_type, " or ".join(supported)
    if sliding.get("rope_type", "default") != "default":
        yield "rope_type", sliding["rope_type"], "the value default in layers with a window"
    partial = full.get("partial_rotary_factor") or 1.0
    # llama.cpp supports partial rotation only for Phi-4 mini. In other families it rotates the
    # entire head.
    if partial != 1.0 and family.arch != "phi3":
        yield "partial_rotary_factor", partial, 1.0
    if rope_type == "yarn":
        # llama.cpp always uses the attention factor 0.1 ln(factor) + 1, and always rounds the
        # bounds of the interpolation range to integers.
        computed = 0.1 * math.log(full["factor"]) + 1.0
        factor = full.get("attention_factor")
        if factor is not None and not math.isclose(factor, computed, rel_tol=1e-6):
            yield "attention_factor", factor, computed
        for key in ("mscale", "mscale_all_dim"):
            if full.get(key):
                yield key, full[key], "none"
        if full.get("truncate") is False:
            yield "truncate", False, True
    if rope_type == "longrope":
        pairs = rotary_dims(config) // 2
        for key in ("long_factor", "short_factor"):
            factors = full.get(key, ())
            if len(factors) != pairs:
                yield key, factors, f"a list of {pairs} factors"


def rotary_dims(config: ModelConfig) -> int:
    """Return the number of channels of a head that RoPE rotates."""
    full = full_rope(config)
    partial = full.get("partial_rotary_factor") or 1.0
    return int(head_dim(config) * partial)


def rope_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Return the GGUF tensors with the divisors of the RoPE frequencies: fp32 [rotary_dims / 2].

    Return an empty dict if the RoPE type needs no divisors.
    """
    full = full_rope(config)
    if full["rope_type"] == "llama3":
        return {"rope_freqs.weight": _llama3_factors(full, rotary_dims(config))}
    if full["rope_type"] == "longrope":
        return {
            f"rope_factors_{kind}.weight": torch.tensor(full[f"{kind}_factor"], dtype=torch.float32)
            for kind in ("long", "short")
        }
    return {}


def _llama3_factors(rope: Rope, dims: int) -> Tensor:
    """Compute the frequency divisors of Llama 3's RoPE.

    The divisor is 1 for short wavelengths and `factor` for long wavelengths. Between them the
    frequency is interpolated linearly.
    """
    factor = rope["factor"]
    low = rope["low_freq_factor"]
    high = rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    exponents = torch.arange(0, dims, 2, dtype=torch.float32) / dims
    # llama.cpp divides the frequencies by these factors, which gives the same frequencies as
    # Transformers.
    wavelengths = 2 * math.pi / (1.0 / (rope["rope_theta"] ** exponents))
    smooth = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


# Functions for the header of a GGUF file


def config_keys(config: ModelConfig, family: GgufFamily) -> dict[str, Any]:
    """Return the values of the config for the header, see `plan.add_keys`."""
    is_phi3 = family.arch == "phi3"
    has_window = _reads_window(config) or is_phi3
    has_rotary_dims = family.rotates_neighbors or is_phi3
    return {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "head_count": config["num_attention_heads"],
        "head_count_kv": config["num_key_value_heads"],
        **_rope_keys(config, is_phi3=is_phi3),
        "layer_norm_rms_eps": config["rms_norm_eps"],
        # llama.cpp's converter writes these two keys only if the config has `head_dim`.
        "key_length": config.get("head_dim"),
        "value_length": config.get("head_dim"),
        # The converter writes the vocabulary size only for families that rotate neighboring
        # channels.
        "vocab_size": config["vocab_size"] if family.rotates_neighbors else None,
        "rope_dimension_count": rotary_dims(config) if has_rotary_dims else None,
        "sliding_window": (config["sliding_window"] or 0) if has_window else None,
        "attention_scale": config.get("attention_multiplier") or None,
        "embedding_scale": config.get("embedding_multiplier") or None,
        "residual_scale": config.get("residual_multiplier") or None,
        "logit_scale": config.get("logits_scaling") or None,
        "attn_logit_softcapping": config.get("attn_logit_softcapping") or None,
        "final_logit_softcapping": config.get("final_logit_softcapping") or None,
    }


def _rope_keys(config: ModelConfig, *, is_phi3: bool) -> dict[str, Any]:
    import gguf

    full, sliding = full_rope(config), sliding_rope(config)
    rope_type = full["rope_type"]
    keys: dict[str, Any] = {}
    if rope_type in ("linear", "yarn"):
        keys["rope_scaling_type"] = gguf.RopeScalingType(rope_type)
        keys["rope_scaling_factor"] = full["factor"]
    if rope_type == "yarn" or is_phi3:
        keys["rope_scaling_orig_ctx_len"] = _original_context(config, full)
    if rope_type == "yarn":
        keys["rope_scaling_yarn_beta_fast"] = full.get("beta_fast")
        keys["rope_scaling_yarn_beta_slow"] = full.get("beta_slow")
    if rope_type == "longrope":
        keys["rope_scaling_attn_factors"] = _longrope_scale(config, full)
    keys["rope_freq_base"] = full["rope_theta"]
    keys["rope_freq_base_swa"] = sliding.get("rope_theta")
    return keys


def _original_context(config: ModelConfig, rope: Rope) -> int:
    key = "original_max_position_embeddings"
    return int(rope.get(key) or config.get(key) or config["max_position_embeddings"])


def _longrope_scale(config: ModelConfig, rope: Rope) -> float:
    """Compute longrope's scaling factor for queries and keys, with Transformers' formula."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = _original_context(config, rope)
    factor = config["max_position_embeddings"] / original
    if factor <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original))


# Functions for names and row order of weights


def gguf_names(names: Collection[str], config: ModelConfig, family: GgufFamily) -> dict[str, str]:
    """Return a dict from parameter names to llama.cpp's tensor names.

    Raise ModelError if llama.cpp has no name for a parameter.
    """
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
                f"llama.cpp's architecture {family.arch} does not support the weight {name}",
                where="the model's weights",
                why="llama.cpp would load the model without this weight and give wrong answers",
                fix=SERVE_FOLDER,
            )
        renamed[name] = new_name
    return renamed


def heads_to_permute(new_name: str, config: ModelConfig, family: GgufFamily) -> int | None:
    """Return the number of attention heads if GGUF stores the tensor's rows in another order.

    Return None if the order of the rows is the same as in Transformers.
    """
    if not family.rotates_neighbors:
        return None
    layer = new_name.split(".")[-2]
    if layer == "attn_q":
        return config["num_attention_heads"]
    if layer == "attn_k":
        return config["num_key_value_heads"]
    return None


def pair_neighbors(rows: Tensor, head: int) -> Tensor:
    """Reorder rows, so that the rows of the first and the second half of each head alternate.

    Args:
        head: number of rows per head.
    """
    # [heads, 2, half] -> [heads, half, 2]: row i of the first half is followed by row i of the
    # second half.
    halves = rows.unflatten(0, (-1, 2, head // 2))
    return halves.transpose(1, 2).reshape(rows.shape)
