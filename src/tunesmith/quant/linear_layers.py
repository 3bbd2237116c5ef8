"""The questions that a model is asked about its linear layers."""

import math
from collections.abc import Collection
from functools import partial

from torch import nn

from tunesmith.formats.linear import FrozenLinear, has_codes
from tunesmith.formats.stack import ExpertStack
from tunesmith.model.decoder import is_in_text
from tunesmith.model.fused import add_mixin
from tunesmith.model.weights import Hook


def load_hooks(model: nn.Module) -> dict[str, Hook]:
    """For `load_weights(convert=...)`: what quantizes each frozen weight as it is read.

    A weight that was quantized before is used as it is.
    """
    hooks: dict[str, Hook] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, ExpertStack):
            hooks[name] = partial(layer.load, name=name)
        elif isinstance(layer, FrozenLinear) and has_codes(layer):
            hooks[f"{name}.weight"] = partial(layer.load, name=f"{name}.weight")
    return hooks


class BypassedLinear(nn.Module):
    """A linear layer whose weight other code reads past its forward: a mixin that says so."""


def set_bypassed(model: nn.Module, targets: Collection[str]) -> None:
    """Make `BypassedLinear` of the linear layers whose weight other code reads.

    `targets` are names within a decoder layer, without the numbers in them ("mixer.dt_proj").
    """
    endings = tuple(f".{target}" for target in targets)
    for name, module in model.named_modules():
        words = ".".join(word for word in name.split(".") if not word.isdigit())
        if isinstance(module, nn.Linear) and words.endswith(endings):
            add_mixin(module, BypassedLinear)


def is_plain_linear(module: nn.Module) -> bool:
    """Tell whether a module is y = x W^T + b and nothing else, so that another may stand in for it.

    Routers and stacks of Transformers derive from `nn.Linear` too, with a forward of their own; and
    of some linear layers only the weight is read (`set_bypassed`).
    """
    if isinstance(module, FrozenLinear):
        return True
    if not isinstance(module, nn.Linear) or isinstance(module, BypassedLinear):
        return False
    # The class whose forward runs: the first of the method resolution order that defines one.
    [owner, *_] = (base for base in type(module).__mro__ if "forward" in vars(base))
    # Falcon's is written out, and computes the same.
    is_linear = owner is nn.Linear or owner.__name__ == "FalconLinear"
    return is_linear or owner.__module__.startswith("tunesmith.")


def linear_names(model: nn.Module, *, head: bool) -> list[str]:
    """Full names of the text model's plain linear layers, dense and quantized, in its order.

    With the output layer if `head`.
    """
    from transformers import PreTrainedModel

    left_out = None
    if isinstance(model, PreTrainedModel) and not head:
        left_out = model.get_output_embeddings()
    names = []
    is_text = is_in_text(model)
    for name, module in model.named_modules():
        if is_plain_linear(module) and module is not left_out and is_text(name):
            names.append(name)
    return names


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model; tied ones count once.

    A quantized weight counts as the dense one that it stands for, which a tensor group shares.
    """
    count = sum(p.numel() for p in model.parameters())
    for layer in model.modules():
        if not isinstance(layer, ExpertStack | FrozenLinear) or not has_codes(layer):
            continue
        # Out with the stored elements (nf4 has two weights in each), in with the dense ones.
        stored = (tensor for tensor in layer.stored_tensors() if isinstance(tensor, nn.Parameter))
        count -= sum(parameter.numel() for parameter in stored)
        parts = 1
        if isinstance(layer, FrozenLinear) and layer.tensor_shard is not None:
            parts = layer.tensor_shard.parts
        count += math.prod(layer.shape) * parts
    return count
