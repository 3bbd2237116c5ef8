"""Restriction of the kernels of recurrent layers to GPU tensors.

If flash-linear-attention, causal-conv1d or mamba-ssm is installed, Transformers' layers call the
package's kernels on every device, but these kernels support only GPUs. On the CPU and on meta, the
layers must use the PyTorch code that Transformers runs without these packages.
"""

import sys
from collections.abc import Callable
from functools import wraps
from inspect import getclosurevars, unwrap
from types import FunctionType

from torch import Tensor, nn
from transformers.integrations import hub_kernels


def keep_kernels_to_gpus(model: nn.Module) -> None:
    """Make the layers of this model's type use the kernels on GPUs and PyTorch code elsewhere.

    This affects all models of the type in this process.
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
    """Return Transformers' wrapper that calls a kernel instead of the wrapped function.

    Return None if `function` has no such wrapper.

    If the package `kernels` is installed, `function` can be a module without parameters. Its
    forward then calls the wrapper.
    """
    candidates = (
        [*getclosurevars(type(function).forward).nonlocals.values()]
        if isinstance(function, nn.Module)
        else [function]
    )
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
