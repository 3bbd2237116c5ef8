"""Functions that find and describe the linear layers of a model."""

import math
from collections.abc import Collection
from functools import partial

from torch import nn

from tunesmith.formats.linear import FrozenLinear, has_codes
from tunesmith.formats.stack import ExpertStack
from tunesmith.model.known.decoder import is_in_text
from tunesmith.model.layers.fused import add_mixin
from tunesmith.model.weights.weights import Hook


def load_hooks(model: nn.Module) -> dict[str, Hook]:
    """Return the hooks for `load_weights(convert=...)` that quantize frozen weights while they are
    read.

    A weight that is already quantized in the checkpoint is used unchanged.
    """
    hooks: dict[str, Hook] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, ExpertStack):
            hooks[name] = partial(layer.load, name=name)
        elif isinstance(layer, FrozenLinear) and has_codes(layer):
            hooks[f"{name}.weight"] = partial(layer.load, name=f"{name}.weight")
    return hooks


class BypassedLinear(nn.Module):
    """Mixin that marks a linear layer whose weight is read directly, by code outside of its
    forward.
    """


def set_bypassed(model: nn.Module, targets: Collection[str]) -> None:
    """Add the mixin `BypassedLinear` to the linear layers whose weight is read directly, by code
    outside of their forward.

    Args:
        targets: names of these layers within a decoder layer, without indices ("mixer.dt_proj").
    """
    endings = tuple(f".{target}" for target in targets)
    for name, module in model.named_modules():
        words = [word for word in name.split(".") if not word.isdigit()]
        if isinstance(module, nn.Linear) and ".".join(words).endswith(endings):
            add_mixin(module, BypassedLinear)


def is_plain_linear(module: nn.Module) -> bool:
    """Return whether a module computes only y = x W^T + b, so that another layer can replace it.

    Routers and stacks of Transformers are also subclasses of `nn.Linear`, but have their own
    forward. The result is False for layers marked by `set_bypassed`, because other code reads their
    weight and does not call their forward.
    """
    if isinstance(module, FrozenLinear):
        return True
    if not isinstance(module, nn.Linear) or isinstance(module, BypassedLinear):
        return False
    # The class whose forward runs is the first in the method resolution order that defines it.
    owner = next(base for base in type(module).__mro__ if "forward" in vars(base))
    # FalconLinear has its own forward, which computes the same as nn.Linear.
    is_linear = owner is nn.Linear or owner.__name__ == "FalconLinear"
    return is_linear or owner.__module__.startswith("tunesmith.")


def linear_names(model: nn.Module, *, head: bool) -> list[str]:
    """Return the full names of the text model's plain linear layers in model order. Quantized
    layers are included.

    The output layer is included if `head` is True.
    """
    from transformers import PreTrainedModel

    left_out = (
        model.get_output_embeddings() if isinstance(model, PreTrainedModel) and not head else None
    )
    names = []
    is_text = is_in_text(model)
    for name, module in model.named_modules():
        if is_plain_linear(module) and module is not left_out and is_text(name):
            names.append(name)
    return names


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters of a model. Tied parameters count once.

    A quantized weight counts as many parameters as its dequantized weight, including the shards of
    the other tensor-parallel ranks.
    """
    count = sum(p.numel() for p in model.parameters())
    for layer in model.modules():
        if not isinstance(layer, ExpertStack | FrozenLinear) or not has_codes(layer):
            continue
        # Count weights instead of stored elements: nf4 stores two weights in each element.
        for tensor in layer.stored_tensors():
            if isinstance(tensor, nn.Parameter):
                count -= tensor.numel()
        parts = (
            layer.tensor_shard.parts
            if isinstance(layer, FrozenLinear) and layer.tensor_shard is not None
            else 1
        )
        count += math.prod(layer.shape) * parts
    return count
