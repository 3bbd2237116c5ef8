"""Measurement of a model's sizes. The model is built and run on meta, without weights."""

import torch
from transformers import PretrainedConfig, PreTrainedModel

from tunesmith.config.schema import Model, StatedDtype
from tunesmith.errors import ModelError, errors_at
from tunesmith.model.arch.load import build_on_meta
from tunesmith.model.arch.spec import ModelSpec, read_spec
from tunesmith.model.arch.text_config import cannot_measure, experts_per_token, read_configs
from tunesmith.model.known.architectures import ARCHITECTURES
from tunesmith.model.measuring.count_layers import count_layers
from tunesmith.model.measuring.meta_forward import MEASURED_TOKENS, run_on_meta
from tunesmith.model.weights.safetensors_files import Config


def measure_sizes(sizes: Config, where: str) -> ModelSpec:
    """Build the model on meta, run one forward, and count its layers and parameters."""
    config, full_config = read_configs(sizes, where)
    # The text part of a multimodal model may be in the table of architectures.
    if config.model_type in ARCHITECTURES:
        return read_spec(config.to_dict(), where=where)
    try:
        with errors_at(where):
            model = build_to_measure(config, full_config=full_config)
            calls, _ = run_on_meta(model, MEASURED_TOKENS)
            return count_layers(model, calls, experts_per_token(config))
    except ModelError:
        raise
    # Operations on meta tensors raise this error if the code needs tensor values, for example to
    # route tokens to experts.
    except NotImplementedError as error:
        raise ModelError(
            f"the sizes of this {config.model_type} cannot be measured",
            where=where,
            why=f"its code depends on tensor values, which are not available here: {error}",
            fix="use a model of another type; `tunesmith models` lists the supported types",
        ) from error
    # The code of 140 model types can raise any exception for unusual configs.
    except Exception as error:
        raise cannot_measure(sizes, where, error) from error


def build_to_measure(
    config: PretrainedConfig,
    dtype: StatedDtype = "bf16",
    *,
    full_config: PretrainedConfig | None = None,
) -> PreTrainedModel:
    """Build the model like `build_on_meta`, but with all parameters and buffers on meta."""
    # Put the buffers on meta too. `build_on_meta` computes real buffers, and some models would
    # compute real parameters from these.
    with torch.device("meta"):
        model = build_on_meta(
            config, Model(name=config.model_type, dtype=dtype), full_config=full_config
        )
    return model.to("meta")
