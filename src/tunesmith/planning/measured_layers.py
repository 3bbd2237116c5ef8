"""The memory that training takes for a model that `measured_spec` measured: seen on meta, as its
sizes are.

The adapter is attached to the model on meta, and a forward of two lengths shows what autograd keeps
of each layer: what grows with the tokens, and what does not. Recurrent layers are counted in plain
PyTorch, on one long document; their kernels keep less. It takes seconds, so it is cached on the
disk.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING

from tunesmith.config.schema import Adapter, Model, StatedDtype
from tunesmith.errors import ModelError
from tunesmith.host.files import measure_once
from tunesmith.model.measured_spec import (
    MEASURED_TOKENS,
    PER_TOKEN,
    build_to_measure,
    first_of,
    limit_measuring,
    text_config,
)
from tunesmith.model.spec import ModelSpec, adapter_parameters

if TYPE_CHECKING:
    from torch import nn

    from tunesmith.model.meta_forward import LayerCall

# Of the cached files; which modules are fused, and which adapted, counts.
MEASURED_LAYERS_VERSION = 12


@dataclass(frozen=True)
class SavedActivations:
    """The bytes that training saves of each decoder layer for the backward.

    Attributes:
        by_token: bytes for a token, of each layer. Probabilities of attention are not among them.
        constant: bytes for any number of tokens, of each layer.
        outside: bytes for a token, beside the layers: rotary tables, the last norm.
        adapter: parameters that the adapter trains; 0 where the model is trained in full.
        active: of these, what a token is multiplied with: of experts those that it goes to.
        experts: of these, those of all experts.
    """

    by_token: tuple[float, ...]
    constant: tuple[float, ...]
    outside: float
    adapter: int
    active: int
    experts: int = 0


def count_active_adapter(spec: ModelSpec, adapter: Adapter) -> int:
    """Parameters of an adapter that a token is multiplied with; raises as `count_adapter`."""
    if not spec.measured:
        return adapter_parameters(spec, adapter)
    return measure_activations(spec, adapter, "bf16").active


def count_expert_adapter(spec: ModelSpec, adapter: Adapter) -> int:
    """Parameters of an adapter on experts; raises as `count_adapter`."""
    if not spec.measured:
        return 0
    return measure_activations(spec, adapter, "bf16").experts


def count_adapter(spec: ModelSpec, adapter: Adapter, tensor: int = 1) -> int:
    """Parameters that an adapter trains, on each of `tensor` ranks that compute a layer together.

    RecipeError for a target that a measured model does not have.
    """
    if not spec.measured:
        return adapter_parameters(spec, adapter, tensor)
    return measure_activations(spec, adapter, "bf16").adapter


def measure_activations(spec: ModelSpec, adapter: Adapter, dtype: StatedDtype) -> SavedActivations:
    """Measure what each layer of a measured model keeps, with products in `dtype`.

    RecipeError for a target that the model does not have; ModelError where it does not run on meta.
    """
    return _measure_cached(spec.measured, adapter, dtype)


# A plan asks hundreds of times.
@lru_cache(maxsize=32)
def _measure_cached(sizes: str, adapter: Adapter, dtype: StatedDtype) -> SavedActivations:
    """Measure as `measure_activations` does, of the sizes that a spec was measured by."""
    # Only these change what is saved.
    same = Adapter(kind=adapter.kind)
    if adapter.kind == "lora":
        same = replace(
            same,
            rank=adapter.rank,
            dropout=adapter.dropout,
            target=adapter.target,
            modules_to_save=adapter.modules_to_save,
        )
    return _measure_same(sizes, same, dtype)


@lru_cache(maxsize=32)
def _measure_same(sizes: str, adapter: Adapter, dtype: StatedDtype) -> SavedActivations:
    key = [
        MEASURED_LAYERS_VERSION,
        version("transformers"),
        version("torch"),
        sizes,
        asdict(adapter),
        dtype,
    ]
    return measure_once("specs", key, lambda: _measure(sizes, adapter, dtype), SavedActivations)


def _measure(sizes: str, adapter: Adapter, dtype: StatedDtype) -> SavedActivations:
    # Here, as a plan of a family in the table needs no Transformers.
    from tunesmith.adapter import lora
    from tunesmith.model.decoder import find_layers
    from tunesmith.model.fused import fuse_modules
    from tunesmith.model.meta_forward import run_on_meta
    from tunesmith.model.support import find_support
    from tunesmith.quant.linear_layers import set_bypassed

    values = json.loads(sizes)
    config = text_config(values, where="config.json")
    support = find_support(config, Model(name=config.model_type), where="config.json")
    with limit_measuring(config.model_type):
        model = build_to_measure(config, dtype)
        trained = 0
        set_bypassed(model, support.dead_targets)
        if adapter.kind == "lora":
            lora.attach_lora(model, adapter, seed=0)
            trained = lora.count_adapter_parameters(model, adapter)
        fuse_modules(model, project=lora.project)
        try:
            short, short_outside = run_on_meta(model, MEASURED_TOKENS, training=True)
            long, long_outside = run_on_meta(model, 2 * MEASURED_TOKENS, training=True)
        # Code of 140 model types.
        except Exception as error:
            raise ModelError(
                f"the memory of this {values['model_type']} cannot be measured",
                why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
                fix="plan and train on this machine with train.micro_batch and train.recompute set",
            ) from error
    by_token, constant = _lines(short, long)
    outside = (long_outside - short_outside) / MEASURED_TOKENS
    # Llama 4's choose within their own forward: nobody sees them choose.
    stated = first_of(config.to_dict(), PER_TOKEN) or 0
    chosen = [call.experts_per_token or stated for call in short]
    layers = [*model.get_submodule(find_layers(model)).children()]
    of_experts, idle = _expert_parameters(layers, chosen)
    return SavedActivations(by_token, constant, outside, trained, trained - idle, of_experts)


def _lines(
    short: "Sequence[LayerCall]", long: "Sequence[LayerCall]"
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute what layers keep for each token, and what for any number of them.

    Args:
        short, long: with MEASURED_TOKENS, and with twice as many: a line goes through two points.
    """
    by_token = []
    constant = []
    for first, second in zip(short, long, strict=True):
        slope = (second.saved_bytes - first.saved_bytes) / MEASURED_TOKENS
        by_token.append(slope)
        constant.append(first.saved_bytes - slope * MEASURED_TOKENS)
    return tuple(by_token), tuple(constant)


def _expert_parameters(layers: Sequence["nn.Module"], per_token: Sequence[int]) -> tuple[int, int]:
    """Parameters of the updates of all experts, and of those that a token does not go to.

    per_token: how many experts of each layer a token goes to.
    """
    from tunesmith.adapter.expert_lora import expert_updates

    total = 0
    idle = 0
    for layer, chosen in zip(layers, per_token, strict=True):
        for _, update in expert_updates(layer):
            experts = update.shape[0]
            count = update.lora_A.numel() + update.lora_B.numel()
            total += count
            idle += count * (experts - chosen) // experts
    return total, idle
