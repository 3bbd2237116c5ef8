"""The spec of any decoder, read from config.json for known families and else measured.

To measure a spec, the model is built without weights and run on meta. Parameters are counted and
the calls of each layer are recorded. Because this takes some seconds, the result is cached on disk.
The cache key contains the config and the version of Transformers. Torch is not imported if the
family is in the table or the result is cached.
"""

import json
from dataclasses import replace
from importlib.metadata import version

from tunesmith.host.files import measure_once
from tunesmith.model.arch.spec import (
    ModelSpec,
    check_decoder,
    read_spec,
    stated_position_limit,
)
from tunesmith.model.known.architectures import ARCHITECTURES
from tunesmith.model.weights.safetensors_files import Config
from tunesmith.model.weights.shipped import stored_quantization

SPEC_CACHE_VERSION = 6  # increase it if the counting of layers changes
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
    from tunesmith.model.measuring.measure_on_meta import measure_sizes  # loads torch

    return measure_sizes(sizes, where)
