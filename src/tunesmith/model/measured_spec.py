"""The spec of any decoder, read from config.json for known families and else measured.

To measure a spec, the model is built without weights and run on meta. Parameters are counted and
the calls of each layer are recorded. Because this takes some seconds, the result is cached on disk.
The cache key contains the config and the version of Transformers. Torch is not imported if the
family is in the table or the result is cached.
"""

import json
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING

from tunesmith.errors import ModelError
from tunesmith.host.files import measure_once
from tunesmith.model.architectures import ARCHITECTURES
from tunesmith.model.names import has_own_class, text_part
from tunesmith.model.safetensors_files import Config
from tunesmith.model.shipped import stored_quantization
from tunesmith.model.spec import (
    EXPERTS_PER_TOKEN,
    ModelSpec,
    check_decoder,
    one_line,
    read_spec,
    stated_position_limit,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SPEC_CACHE_VERSION = 6  # increase it if the counting of layers changes
# Number of tokens of the measured forward. Recurrent layers compute chunks of 64 tokens (Mamba2:
# 256), and 256 is a multiple of both.
MEASURED_TOKENS = 256
# Config keys that have no effect on the model's sizes.
NO_SIZES = (
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
)
# Config keys for the number of experts per token. They include keys of models whose experts are not
# called through Transformers' experts interface.
PER_TOKEN = (*EXPERTS_PER_TOKEN, "top_k")


def model_spec(config: Config, *, where: str, trust_remote_code: bool = False) -> ModelSpec:
    """Return the spec of a parsed config.json. `where` is its name in error messages.

    A spec does not imply that tunesmith can train the model. Raise the errors of `read_spec` if the
    family is in the table, else the errors of `measure_spec`.
    """
    check_decoder(config, where)
    runs_own_code = trust_remote_code and "auto_map" in config
    if config["model_type"] in ARCHITECTURES or runs_own_code:
        return read_spec(config, where=where, trust_remote_code=trust_remote_code)
    return measure_spec(config, where=where)


def measure_spec(config: Config, *, where: str) -> ModelSpec:
    """Measure the spec of a Transformers model from its config.json or from `config.to_dict()`.

    For a multimodal model, return the spec of its text model. Only code of Transformers runs. Raise
    ModelError if Transformers cannot build the model, or if the model does not run on meta.
    """
    quantized = stored_quantization(config, where)
    sizes = without_labels(config)
    sizes.pop("quantization_config", None)
    text = json.dumps(sizes, sort_keys=True, default=str)
    key = [SPEC_CACHE_VERSION, version("transformers"), sizes]
    spec = measure_once("specs", key, lambda: _measure(sizes, where), ModelSpec)
    # The cached spec does not contain `limit` and `quantized`, so read them from the config.
    limit = stated_position_limit(config, spec.layers, where=where)
    return replace(spec, quantized=quantized, position_limit=limit, measured=text)


def without_labels(config: Config) -> dict[str, object]:
    """Return the values of the config that describe the model's sizes and layers."""
    return {key: value for key, value in config.items() if key not in NO_SIZES}


def _measure(sizes: Config, where: str) -> ModelSpec:
    from tunesmith.model.measure_on_meta import measure_sizes  # loads torch

    return measure_sizes(sizes, where)


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
