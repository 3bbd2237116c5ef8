"""Memory that the layers of a model need in training, measured on the meta device. This is for
model types that are not in the table of architectures.

The adapter is attached to the model on the meta device. Forwards with two sequence lengths show how
many bytes autograd saves in each layer: bytes per token, and bytes that do not depend on the
length. Recurrent layers are measured with their PyTorch implementation and one long document; their
kernels save less. The measurement takes seconds, so its result is cached on disk.
"""

from dataclasses import asdict, replace
from functools import lru_cache
from importlib.metadata import version

from tunesmith.config.schema import Adapter, StatedDtype
from tunesmith.host.files import measure_once
from tunesmith.model.arch.spec import ModelSpec, adapter_parameters
from tunesmith.planning.run_plan import SavedActivations

# Version of the cached files. Increase it after a change of the modules that tunesmith fuses or
# adds adapters to.
MEASURED_LAYERS_VERSION = 12


def count_active_adapter(spec: ModelSpec, adapter: Adapter) -> int:
    """Count the adapter parameters that one token uses, without those of unused experts. Raises the
    same errors as `count_adapter`.
    """
    if not spec.measured:
        return adapter_parameters(spec, adapter)
    return measure_activations(spec, adapter, "bf16").active


def count_expert_adapter(spec: ModelSpec, adapter: Adapter) -> int:
    """Count the adapter parameters of experts. Raises the same errors as `count_adapter`."""
    if not spec.measured:
        return 0
    return measure_activations(spec, adapter, "bf16").experts


def count_adapter(spec: ModelSpec, adapter: Adapter, tensor: int = 1) -> int:
    """Count the parameters of an adapter on one of `tensor` tensor-parallel ranks.

    Raise RecipeError if the adapter targets a layer that the model does not have. This is only
    detected for models whose layers are measured on the meta device.
    """
    if not spec.measured:
        return adapter_parameters(spec, adapter, tensor)
    return measure_activations(spec, adapter, "bf16").adapter


def measure_activations(spec: ModelSpec, adapter: Adapter, dtype: StatedDtype) -> SavedActivations:
    """Measure the bytes that each layer saves for the backward, with matmuls in `dtype`. The model
    must be one with `spec.measured`.

    Raise RecipeError if the adapter targets a layer that the model does not have. Raise ModelError
    if the model does not run on the meta device.
    """
    # Copy only the settings that change the saved bytes, so that adapters that differ in other
    # settings use the same cache entry.
    same = Adapter(kind=adapter.kind)
    if adapter.kind == "lora":
        same = replace(
            same,
            rank=adapter.rank,
            dropout=adapter.dropout,
            target=adapter.target,
            modules_to_save=adapter.modules_to_save,
        )
    return _measure(spec.measured, same, dtype)


# Cache the result in memory, because a plan asks for it hundreds of times.
@lru_cache(maxsize=32)
def _measure(sizes: str, adapter: Adapter, dtype: StatedDtype) -> SavedActivations:
    """Measure the saved bytes, or read them from the cache on disk. `sizes` is the model's config
    as JSON.
    """

    def measure() -> SavedActivations:
        # Import late, because plans of model types in the table do not need Transformers.
        from tunesmith.planning.layers_on_meta import measure_layers

        return measure_layers(sizes, adapter, dtype)

    key = [
        MEASURED_LAYERS_VERSION,
        version("transformers"),
        version("torch"),
        sizes,
        asdict(adapter),
        dtype,
    ]
    return measure_once("specs", key, measure, SavedActivations)
