"""Transformers' config of a model's text part, built from the values of a config.json."""

from typing import TYPE_CHECKING

from tunesmith.errors import ModelError
from tunesmith.model.arch.spec import EXPERTS_PER_TOKEN, one_line
from tunesmith.model.weights.safetensors_files import Config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Config keys for the number of experts per token. They include keys of models whose experts are not
# called through Transformers' experts interface.
PER_TOKEN = (*EXPERTS_PER_TOKEN, "top_k")


def text_part(config: "PretrainedConfig") -> "PretrainedConfig":
    """Return the config of the text model, or the config itself if the model has no other parts."""
    text: PretrainedConfig = config.get_text_config()
    if text is config:
        return config
    # The outer config decides whether weights are tied, because Mistral 3's inner config has a
    # wrong value.
    inner = vars(text).get("tie_word_embeddings", False)
    text.tie_word_embeddings = vars(config).get("tie_word_embeddings", inner)
    text.name_or_path = config.name_or_path
    stored = vars(config).get("quantization_config")
    if stored is not None:
        text.quantization_config = stored
    return text


def has_own_class(text: "PretrainedConfig") -> bool:
    """Return whether Transformers has a causal LM class for this text model's config."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return type(text) in MODEL_FOR_CAUSAL_LM_MAPPING


def read_configs(sizes: Config, where: str) -> tuple["PretrainedConfig", "PretrainedConfig | None"]:
    """Return the config of the text model with all defaults, and the config of the entire model.

    The second config is None if Transformers has a separate class for the text model. For Qwen3-VL,
    it has no such class. Raise ModelError if Transformers cannot read the config.
    """
    from transformers import AutoConfig, PretrainedConfig

    # Transformers writes infinity as a mapping, because JSON has no such number.
    values = PretrainedConfig._decode_special_floats(dict(sizes))
    try:
        full_config: PretrainedConfig = AutoConfig.for_model(values.pop("model_type"), **values)
        config = text_part(full_config)
    # Unknown model types and invalid values raise many different exceptions.
    except Exception as error:
        raise cannot_measure(sizes, where, error) from error
    # Remove a padding id that is outside the vocabulary: it does not affect the sizes, and a
    # family's default can be too large for a small vocabulary.
    padding = config.to_dict().get("pad_token_id")
    if padding is not None and padding >= config.vocab_size:
        config.pad_token_id = None
    if config is full_config or has_own_class(config):
        return config, None
    return config, full_config


def cannot_measure(config: Config, where: str, error: Exception) -> ModelError:
    """Build the error for a config from which Transformers cannot build a model."""
    why = one_line(error)
    fix = "fetch config.json again: tunesmith fetch MODEL; a newer type needs a newer Transformers"
    if "auto_map" in config:
        why = f"its repository contains code, which runs only if trusted; {why}"
        fix = (
            "review that code, then set model.trust_remote_code: true; for a command that "
            "takes a run add --trust-remote-code"
        )
    return ModelError(
        f"Transformers cannot build this {config['model_type']} model from its config",
        where=where,
        why=why,
        fix=fix,
    )


def experts_per_token(config: "PretrainedConfig") -> int | None:
    """Return the number of experts per token from the config, or None if the config has none."""
    values = config.to_dict()
    for key in PER_TOKEN:
        if values.get(key):
            return int(values[key])
    return None
