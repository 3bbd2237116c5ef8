"""Kernels of recurrent layers are called for tensors of a GPU only.

Where flash-linear-attention, causal-conv1d or mamba-ssm is installed, Transformers' layers call
their kernels on every device, and these fail but on a GPU. What is measured on the CPU and on meta,
and a run on the CPU, takes the PyTorch code that Transformers falls back to without them.
"""

import sys
from collections.abc import Callable
from functools import wraps
from inspect import getclosurevars, unwrap
from types import FunctionType

from torch import Tensor, nn
from transformers.integrations import hub_kernels


def keep_kernels_to_gpus(model: nn.Module) -> None:
    """Let the layers of this model's type choose between kernel and PyTorch by the device.

    It holds for all models of the type in this process.
    """
    modules = set()
    for part in model.modules():
        for base in type(part).__mro__:
            modules.add(sys.modules[base.__module__])
    for module in modules:
        for name, function in list(vars(module).items()):
            wrapper = _kernel_wrapper(function)
            if wrapper is not None:
                setattr(module, name, _by_device(function, wrapper))


def _kernel_wrapper(function: object) -> FunctionType | None:
    """Transformers' wrapper, which calls a kernel in place of what it wraps; None for any other.

    Where the package `kernels` is installed, the wrapper is the function that the forward of a
    module without parameters calls.
    """
    candidates = [function]
    if isinstance(function, nn.Module):
        candidates = [*getclosurevars(type(function).forward).nonlocals.values()]
    for candidate in candidates:
        if not isinstance(candidate, FunctionType) or unwrap(candidate) is candidate:
            continue
        if candidate.__globals__ is vars(hub_kernels):
            return candidate
    return None


def _by_device(with_kernel: Callable[..., object], wrapper: FunctionType) -> Callable[..., object]:
    in_pytorch = vars(wrapper)["__wrapped__"]

    @wraps(wrapper)
    def run(x: Tensor, *args: object, **kwargs: object) -> object:
        function = with_kernel if x.device.type == "cuda" else in_pytorch
        return function(x, *args, **kwargs)

    return run
