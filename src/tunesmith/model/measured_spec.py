"""The spec of any decoder: read from config.json where the table has its family, else measured.

To measure, the model is built without weights and run on meta: parameters are counted, and each
layer is seen at work. That takes some seconds, so what was measured stays on the disk, by the
config and the version of Transformers. Nothing heavy is imported for a family of the table, nor for
a model that was measured before.
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
    read_spec,
    stated_position_limit,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SPEC_CACHE_VERSION = 6  # of the cached files; how layers are counted, counts
# A whole number of the chunks that recurrent layers compute in: 64 tokens, of Mamba2 256.
MEASURED_TOKENS = 256
# What a config says beside the model's sizes.
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
# Keys for how many experts a token goes to, of models whose experts Transformers does not call
# through its interface.
PER_TOKEN = (*EXPERTS_PER_TOKEN, "top_k")


def model_spec(config: Config, *, where: str, trust_remote_code: bool = False) -> ModelSpec:
    """The spec of a parsed config.json, which errors call `where`.

    It says nothing about whether this engine trains the model. Raises as `read_spec` for a family
    of the table, else as `measure_spec`.
    """
    check_decoder(config, where)
    runs_own_code = trust_remote_code and "auto_map" in config
    if config["model_type"] in ARCHITECTURES or runs_own_code:
        return read_spec(config, where=where, trust_remote_code=trust_remote_code)
    return measure_spec(config, where=where)


def measure_spec(config: Config, *, where: str) -> ModelSpec:
    """The spec of a model of Transformers, from its parsed config.json or `to_dict` of its config.

    Of a checkpoint with images or sound it is that of the text model. Only code of Transformers
    runs. ModelError where that cannot build the model, or the model does not run on meta.
    """
    quantized = stored_quantization(config, where)
    sizes = {key: value for key, value in config.items() if key not in NO_SIZES}
    sizes.pop("quantization_config", None)
    text = json.dumps(sizes, sort_keys=True, default=str)
    key = [SPEC_CACHE_VERSION, version("transformers"), sizes]
    spec = measure_once("specs", key, lambda: _measure(sizes, where), ModelSpec)
    # Read off the config each time: neither is in what was measured.
    limit = stated_position_limit(config, spec.layers, where=where)
    return replace(spec, quantized=quantized, position_limit=limit, measured=text)


def _measure(sizes: Config, where: str) -> ModelSpec:
    from tunesmith.model.measure_on_meta import measure_sizes  # loads torch

    return measure_sizes(sizes, where)


def read_configs(sizes: Config, where: str) -> tuple["PretrainedConfig", "PretrainedConfig | None"]:
    """The config of a model's text part, with all defaults, and the whole model's config where
    Transformers has the text model in that alone, and no class of it by itself (Qwen3-VL).

    ModelError where Transformers does not read it.
    """
    from transformers import AutoConfig, PretrainedConfig

    # Infinity, for which JSON has no number, is a mapping there.
    values = PretrainedConfig._decode_special_floats(dict(sizes))
    try:
        whole: PretrainedConfig = AutoConfig.for_model(values.pop("model_type"), **values)
        config = text_part(whole)
    # Unknown types, and keys of the wrong kind, in many forms.
    except Exception as error:
        raise cannot_measure(sizes, where, error) from error
    # Ids of tokens are no sizes, and a family's default may be beyond a small vocabulary.
    padding = config.to_dict().get("pad_token_id")
    if padding is not None and padding >= config.vocab_size:
        config.pad_token_id = None
    if config is whole or has_own_class(config):
        return config, None
    return config, whole


def cannot_measure(config: Config, where: str, error: Exception) -> ModelError:
    """The error for a config that a library does not make a model of."""
    text = " ".join(str(error).split())
    why = f"{type(error).__name__}: {text[:300]}"
    fix = (
        "take config.json from the model's page again: tunesmith fetch MODEL; "
        "a newer type needs a newer Transformers"
    )
    if "auto_map" in config:
        why = f"its repository contains code, which runs only if trusted; {why}"
        fix = (
            "review that code, then set model.trust_remote_code: true; for a command that "
            "takes a run add --trust-remote-code"
        )
    return ModelError(
        f"Transformers cannot build this {config['model_type']} from its config",
        where=where,
        why=why,
        fix=fix,
    )


def experts_per_token(config: "PretrainedConfig") -> int | None:
    """Return how many experts a token goes to, as the config says. Return None if it does not."""
    values = config.to_dict()
    return next((int(values[key]) for key in PER_TOKEN if values.get(key)), None)
