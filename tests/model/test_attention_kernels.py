"""Which kernel of torch's attention over packed documents is taken: the first that is right,
whatever torch and the machine have.

Only a GPU has the kernels. Here an operator with right or wrong arithmetic stands for them; it
obeys torch's own switches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunesmith.model import attention
from tunesmith.model.attention_kernels import TORCH_KERNEL, choose_kernel
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
        if (
            self.obeys
            and cuda.cudnn_sdp_enabled()
            and self.kernels.get("cudnn", REFUSES) != REFUSES
        ):
            return "cudnn"
        if self.obeys and not cuda.flash_sdp_enabled():
            refused = cuda.cudnn_sdp_enabled()
            raise RuntimeError(
                "its constraints are not satisfied"
                if refused
                else "No viable backend for varlen_attn."
            )
        return nn.attention.current_flash_attention_impl() or "own"

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        edges: Tensor,
        _: Tensor,
        longest: int,
        *__: Any,
        **others: Any,
    ):
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


def choose(machine: Torch, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[str]]:
    monkeypatch.setattr(attention, "varlen_attn", machine)
    for version in ("FA3", "FA4"):
        nn.attention.register_flash_attention_impl(
            version, register_fn=lambda version=version: machine.register(version)
        )
    shape = attention.VarlenShape(torch.device("cpu"), torch.bfloat16, 32, 32)
    return choose_kernel(lambda: attention.find_varlen_fault(shape))


@pytest.mark.parametrize(
    ("obeys", "kernels", "name", "taken", "at_fault"),
    [
        (True, {"cudnn": RIGHT, "FA3": RIGHT, "own": RIGHT}, "cuDNN", "cudnn", []),
        (True, {"FA3": RIGHT, "own": RIGHT}, "FlashAttention 3", "FA3", ["cuDNN"]),
        (True, {"cudnn": WRONG, "own": RIGHT}, TORCH_KERNEL, "own", ["cuDNN"]),
        (False, {"own": RIGHT}, TORCH_KERNEL, "own", []),
        (False, {"FA4": RIGHT, "FA3": RIGHT, "own": RIGHT}, "FlashAttention 4", "FA4", []),
        (False, {"FA4": REFUSES, "FA3": WRONG, "own": RIGHT}, TORCH_KERNEL, "own",
         ["FlashAttention 4", "FlashAttention 3"]),
    ],
)  # fmt: skip
def test_the_first_right_kernel_is_taken_and_stays(
    obeys: bool,
    kernels: dict[str, str],
    name: str,
    taken: str,
    at_fault: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Torch(obeys=obeys, **kernels)
    chosen, faults = choose(machine, monkeypatch)
    assert chosen == name
    assert machine.taken() == taken
    assert [fault.partition(":")[0] for fault in faults] == at_fault


def test_a_torch_without_a_choice_has_no_cudnn_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, faults = choose(Torch(obeys=False, own=REFUSES), monkeypatch)
    assert chosen == ""
    assert faults == [f"{TORCH_KERNEL}: {NO_KERNEL}"]
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_where_none_is_right_each_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, faults = choose(Torch(obeys=True, cudnn=WRONG, FA3=REFUSES, own=WRONG), monkeypatch)
    assert chosen == ""
    assert "%" in faults[0]
    assert NO_KERNEL in faults[1]
    assert faults[2].startswith(f"{TORCH_KERNEL}: ")
    assert "%" in faults[2]
    assert len(faults) == 3


def test_a_gradient_that_is_no_number_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, faults = choose(Torch(obeys=False, own=NAN), monkeypatch)
    assert chosen == ""
    assert "nan" in faults[0]


def test_the_kernel_has_its_name_beside_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "ATTENTION_KERNELS", {})
    monkeypatch.setattr(attention, "_FITS_VARLEN", {})
    monkeypatch.setattr(attention, "choose_kernel", lambda _: ("FlashAttention 3", []))
    select = attention.select_attention_backend.__wrapped__
    backend, _ = select(torch.device("cuda"), torch.bfloat16, 64)
    assert (
        attention.ATTENTION_KERNELS
        == {backend: "FlashAttention 3"}
        == {"varlen": "FlashAttention 3"}
    )
