"""Facts of a model's config.json, for which torch is imported at most once.

Transformers imports torch to read a config. Its result for an unchanged config.json is cached.
"""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tunesmith.config.schema import Model
from tunesmith.host.files import measure_once
from tunesmith.host.signals import loading_libraries
from tunesmith.model.weights.safetensors_files import Config


@dataclass(frozen=True)
class ConfigFacts:
    """Values of a text model's config, with the defaults of Transformers.

    Attributes:
        vocab_size: number of rows of the embedding.
        positions: maximum sequence length in tokens. None if the config has no such value.
    """

    vocab_size: int
    positions: int | None


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
