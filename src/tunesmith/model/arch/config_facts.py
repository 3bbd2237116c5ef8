"""Checks and facts of a model's config.json, for which torch is imported at most once.

Transformers imports torch to read a config. Its result for an unchanged config.json is cached.
"""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tunesmith.config.schema import Model
from tunesmith.host.files import measure_once
from tunesmith.host.signals import loading_libraries
from tunesmith.model.arch.spec import check_supported, read_spec
from tunesmith.model.known.architectures import ARCHITECTURES
from tunesmith.model.weights.safetensors_files import Config, read_model_config
from tunesmith.model.weights.shipped import check_quantize


@dataclass(frozen=True)
class ConfigFacts:
    """Values of a text model's config, with the defaults of Transformers.

    Attributes:
        vocab_size: number of rows of the embedding.
        positions: maximum sequence length in tokens. None if the config has no such value.
    """

    vocab_size: int
    positions: int | None


def check_config(folder: Path, model: Model) -> dict[str, Any]:
    """Check config.json without Transformers, and return its values.

    Raise ModelError if the config is missing or broken, if the model is not supported, or if the
    recipe's `model` section does not fit the model.
    """
    file = folder / "config.json"
    stated = read_model_config(folder)
    check_supported(stated, str(file), vision=model.vision)
    check_quantize(model.quantize, stated, str(file))
    runs_own_code = model.trust_remote_code and "auto_map" in stated
    if stated["model_type"] in ARCHITECTURES or runs_own_code:
        # Check the values of the file itself, before Transformers adds its defaults.
        read_spec(stated, where=str(file), trust_remote_code=model.trust_remote_code)
    return stated


def read_config_facts(folder: Path, model: Model, stated: Config) -> ConfigFacts:
    """Return facts of the config in a model folder. Raise the errors of `load.load_configs`.

    Args:
        stated: the values of config.json.
    """

    def read() -> ConfigFacts:
        with loading_libraries():
            from tunesmith.model.arch.load import load_configs  # imports torch

        config, _ = load_configs(folder, model, stated)
        return ConfigFacts(int(config.vocab_size), getattr(config, "max_position_embeddings", None))

    # The code of a repository can change without its config. Pictures import torch anyway.
    if model.trust_remote_code or model.vision:
        return read()
    return measure_once("configs", [version("transformers"), stated], read, ConfigFacts)
