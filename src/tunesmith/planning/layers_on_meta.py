"""Measurement of the bytes that autograd saves in each layer, by two forwards on the meta
device.
"""

import json
from collections.abc import Sequence

import numpy as np
from torch import nn

from tunesmith.adapter import lora
from tunesmith.adapter.expert_lora import expert_updates
from tunesmith.config.schema import Adapter, Model, StatedDtype
from tunesmith.errors import ModelError
from tunesmith.model.arch.text_config import experts_per_token, read_configs
from tunesmith.model.known.decoder import find_layers, find_text_model
from tunesmith.model.layers.fused import fuse_modules
from tunesmith.model.measuring.measure_on_meta import build_to_measure
from tunesmith.model.measuring.meta_forward import MEASURED_TOKENS, run_on_meta
from tunesmith.model.measuring.support import find_support
from tunesmith.planning.run_plan import SavedActivations
from tunesmith.quant.linear_layers import set_bypassed


def measure_layers(sizes: str, adapter: Adapter, dtype: StatedDtype) -> SavedActivations:
    """Attach the adapter to a model on the meta device, and run forwards with two lengths.

    Args:
        sizes: the config of the model as JSON.
    """
    config, full_config = read_configs(json.loads(sizes), where="config.json")
    support = find_support(
        config, Model(name=config.model_type), where="config.json", full_config=full_config
    )
    model = build_to_measure(config, dtype, full_config=full_config)
    trained = 0
    set_bypassed(model, support.dead_targets)
    if adapter.kind == "lora":
        lora.attach_lora(model, adapter, seed=0)
        trained = lora.count_adapter_parameters(model, adapter)
    fuse_modules(find_text_model(model)[1], project=lora.project)
    try:
        short, short_outside = run_on_meta(model, MEASURED_TOKENS, training=True)
        long, long_outside = run_on_meta(model, 2 * MEASURED_TOKENS, training=True)
    # Catch Exception, because the code of 140 model types may raise any exception.
    except Exception as error:
        raise ModelError(
            f"the memory that this {config.model_type} model needs cannot be measured",
            why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            fix="set train.micro_batch and train.recompute, and plan without --on",
        ) from error
    # The saved bytes are a linear function of the sequence length. Two lengths give its slope
    # (bytes per token) and its constant part.
    kept = np.array([call.saved_bytes for call in short])
    by_token = (np.array([call.saved_bytes for call in long]) - kept) / MEASURED_TOKENS
    constant = kept - by_token * MEASURED_TOKENS
    outside = (long_outside - short_outside) / MEASURED_TOKENS
    # If the forward did not show how many experts a token uses, take the number from the config.
    # For example, Llama 4's layers select experts inside their own code, where this cannot be
    # observed.
    stated = experts_per_token(config) or 0
    chosen = [call.experts_per_token or stated for call in short]
    expert_parameters, idle = _expert_parameters(
        [*model.get_submodule(find_layers(model)).children()], chosen
    )
    return SavedActivations(
        tuple(by_token.tolist()),
        tuple(constant.tolist()),
        outside,
        trained,
        trained - idle,
        expert_parameters,
    )


def _expert_parameters(layers: Sequence[nn.Module], per_token: Sequence[int]) -> tuple[int, int]:
    """Return the number of adapter parameters of all experts, and of the experts that a token does
    not use.

    Args:
        per_token: number of experts per token, for each layer.
    """
    total = 0
    idle = 0
    for layer, chosen in zip(layers, per_token, strict=True):
        for _, update in expert_updates(layer):
            experts = update.shape[0]
            count = update.lora_A.numel() + update.lora_B.numel()
            total += count
            idle += count * (experts - chosen) // experts
    return total, idle
