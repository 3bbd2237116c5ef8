"""The memory that training takes for a model that `measured_spec` measured: seen on meta, as its
sizes are.

The adapter is attached to the model on meta, and a forward of two lengths shows what autograd keeps
of each layer: what grows with the tokens, and what does not. Recurrent layers are counted in plain
PyTorch, on one long document; their kernels keep less. It takes seconds, so it is cached on the
disk.
"""

from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import version

from tunesmith.config.schema import Adapter, StatedDtype
from tunesmith.host.files import measure_once
from tunesmith.model.spec import ModelSpec, adapter_parameters

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
    return _measure(spec.measured, same, dtype)


# A plan asks hundreds of times.
@lru_cache(maxsize=32)
def _measure(sizes: str, adapter: Adapter, dtype: StatedDtype) -> SavedActivations:
    """Measure as `measure_activations` does, of the sizes that a spec was measured by."""

    def measure() -> SavedActivations:
        # Here, as a plan of a family in the table needs no Transformers.
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
