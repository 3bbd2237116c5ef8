"""The sizes of a model that no table has: built without weights, run on meta, and counted."""

import torch
from transformers import PretrainedConfig, PreTrainedModel

from tunesmith.config.schema import Model, StatedDtype
from tunesmith.errors import ModelError, errors_at
from tunesmith.model.architectures import ARCHITECTURES
from tunesmith.model.count_layers import count_layers
from tunesmith.model.load import build_on_meta
from tunesmith.model.measured_spec import (
    MEASURED_TOKENS,
    cannot_measure,
    experts_per_token,
    read_configs,
)
from tunesmith.model.meta_forward import run_on_meta
from tunesmith.model.safetensors_files import Config
from tunesmith.model.spec import ModelSpec, read_spec


def measure_sizes(sizes: Config, where: str) -> ModelSpec:
    """Build and run the model, and count what is seen."""
    config, whole = read_configs(sizes, where)
    # The text part of a composite may be a family of the table.
    if config.model_type in ARCHITECTURES:
        return read_spec(config.to_dict(), where=where)
    try:
        with errors_at(where):
            model = build_to_measure(config, whole=whole)
            calls, _ = run_on_meta(model, MEASURED_TOKENS)
            return count_layers(model, calls, experts_per_token(config))
    except ModelError:
        raise
    # Of a tensor on meta: its code asks, for example, which tokens go where.
    except NotImplementedError as error:
        raise ModelError(
            f"the sizes of this {config.model_type} cannot be measured",
            where=where,
            why=f"its code depends on tensor values, which are not available here: {error}",
            fix="use a model of another type: tunesmith models lists those that are supported",
        ) from error
    # Code of 140 model types, on a config that may be absurd.
    except Exception as error:
        raise cannot_measure(sizes, where, error) from error


def build_to_measure(
    config: PretrainedConfig,
    dtype: StatedDtype = "bf16",
    *,
    whole: PretrainedConfig | None = None,
) -> PreTrainedModel:
    """The model with all its parameters and buffers on meta; as `build_on_meta` otherwise."""
    # `build_on_meta` computes buffers for real, and some models their parameters with them.
    with torch.device("meta"):
        model = build_on_meta(config, Model(name=config.model_type, dtype=dtype), whole=whole)
    return model.to("meta")
