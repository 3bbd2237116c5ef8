"""Kernels are called where they are right: torch's attention, and those of other packages.

Only a GPU has torch's kernels. Here an operator with right or wrong arithmetic stands for them; it
obeys torch's own switches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

from tunesmith.model import attention
from tunesmith.model.attention_kernels import TORCH_KERNEL, choose_kernel
from tunesmith.model.gpu_kernels import keep_kernels_to_gpus
from varlen import varlen

NO_KERNEL = "no kernel image is available"  # as CUDA says
RIGHT, WRONG, REFUSES, NAN = "right", "wrong", "refuses", "no number in a gradient"


class Torch:
    """torch's varlen attention: `kernels` says how each of them computes; one that is not named is
    not installed.

    `obeys`: it has cuDNN too, and goes by what `sdpa_kernel` allows, as from 2.15 on.
    """

    def __init__(self, *, obeys: bool, **kernels: str) -> None:
        self.obeys, self.kernels = obeys, kernels

    def taken(self) -> str:
        cuda = torch.backends.cuda
        has_cudnn = self.kernels.get("cudnn", REFUSES) != REFUSES
        if self.obeys and cuda.cudnn_sdp_enabled() and has_cudnn:
            return "cudnn"
        if self.obeys and not cuda.flash_sdp_enabled():
            raise RuntimeError("constraints" if cuda.cudnn_sdp_enabled() else "no viable backend")
        return nn.attention.current_flash_attention_impl() or "own"

    def __call__(self, q, k, v, edges, _, longest, *__, **others) -> Tensor:
        how = self.kernels[self.taken()]
        if how == REFUSES:
            raise RuntimeError(NO_KERNEL)
        if how == WRONG:  # the second document sees the first
            edges, longest = torch.cat([edges[:1], edges[2:]]), len(q)
        if how == NAN:  # the derivative of this 0 is infinity times 0
            v = v + (v - v.detach()).square().sqrt()
        return varlen(q, k, v, edges, longest, others["scale"], None)

    def register(self, version: str) -> Any:
        if version not in self.kernels:
            raise ModuleNotFoundError("No module named 'flash_attn'")
        return Handle()


class Handle:
    def remove(self) -> None:
        """Nothing is to be undone."""


@pytest.fixture(autouse=True)
def torch_as_before() -> Iterator[None]:
    implementations = nn.attention._registry._FLASH_ATTENTION_IMPLS
    before = dict(implementations)
    yield
    if nn.attention.current_flash_attention_impl():
        nn.attention.restore_flash_attention_impl()
    implementations.update(before)
    torch.backends.cuda.enable_cudnn_sdp(True)


# Whether torch obeys its switches, its kernels, the one that is taken, and values of each fault.
CASES: list[tuple[bool, dict[str, str], str, list[str]]] = [
    (True, {"cudnn": RIGHT, "FA3": RIGHT, "own": RIGHT}, "cuDNN", []),
    (True, {"FA3": RIGHT, "own": RIGHT}, "FlashAttention 3", ["cuDNN"]),
    (True, {"cudnn": WRONG, "own": RIGHT}, TORCH_KERNEL, ["%"]),
    (False, {"own": RIGHT}, TORCH_KERNEL, []),
    (False, {"FA4": RIGHT, "FA3": RIGHT, "own": RIGHT}, "FlashAttention 4", []),
    (False, {"FA4": REFUSES, "FA3": WRONG, "own": RIGHT}, TORCH_KERNEL, ["FlashAttention 4", "%"]),
    (False, {"own": REFUSES}, "", [NO_KERNEL]),
    (False, {"own": NAN}, "", ["nan"]),
    (True, {"cudnn": WRONG, "FA3": REFUSES, "own": WRONG}, "", ["%", NO_KERNEL, "%"]),
]
SHORT = {"cuDNN": "cudnn", "FlashAttention 3": "FA3", "FlashAttention 4": "FA4"}


@pytest.mark.parametrize(("obeys", "kernels", "name", "faults"), CASES)
def test_the_first_right_kernel_is_taken_and_stays(
    obeys: bool,
    kernels: dict[str, str],
    name: str,
    faults: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Torch(obeys=obeys, **kernels)
    monkeypatch.setattr(attention, "varlen_attn", machine)
    for version in ("FA3", "FA4"):
        nn.attention.register_flash_attention_impl(
            version, register_fn=lambda version=version: machine.register(version)
        )
    shape = attention.VarlenShape(torch.device("cpu"), torch.bfloat16, 32, 32)
    chosen, found = choose_kernel(lambda: attention.find_varlen_fault(shape))
    assert chosen == name
    assert not name or machine.taken() == SHORT.get(name, "own")
    for fault, value in zip(found, faults, strict=True):
        assert value in fault
    assert obeys or torch.backends.cuda.cudnn_sdp_enabled()


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
