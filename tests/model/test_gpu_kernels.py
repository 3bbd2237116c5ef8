"""Kernels that are installed beside Transformers are not called for tensors of a CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

from tunesmith.model.gpu_kernels import keep_kernels_to_gpus


def refuse_cpu(x: Tensor) -> Tensor:
    raise RuntimeError("Expected x.is_cuda()")


def double(x: Tensor) -> Tensor:
    return 2 * x


def as_plain(function: Callable[..., Any]) -> Any:
    return function


def as_module(function: Callable[..., Any]) -> Any:
    """As the package `kernels` does, where it is installed (0.18)."""

    class Func(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    return Func()


@pytest.mark.parametrize("form", [as_plain, as_module])
def test_a_kernel_is_not_called_on_the_cpu(
    form: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = ModuleType("some_kernels")
    package.__spec__ = ModuleSpec("some_kernels", None)
    package.scale = refuse_cpu
    monkeypatch.setitem(sys.modules, "some_kernels", package)
    code = ModuleType("modeling_scaled")
    monkeypatch.setitem(sys.modules, "modeling_scaled", code)
    code.scale = form(use_kernel_func_from_hub_with_fallback("scale", "some_kernels")(double))

    class Scaled(nn.Module):
        __module__ = "modeling_scaled"

        def forward(self, x: Tensor) -> Tensor:
            return code.scale(x)

    layer = Scaled()
    with pytest.raises(RuntimeError):
        layer(torch.ones(2))
    keep_kernels_to_gpus(layer)
    assert torch.equal(layer(torch.ones(2)), torch.full((2,), 2.0))
    # A second time changes nothing.
    chosen = code.scale
    keep_kernels_to_gpus(layer)
    assert code.scale is chosen
