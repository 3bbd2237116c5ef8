"""Kernels of attention over packed documents: ours, and which of torch's is taken."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from devices import gpu, run_interpreted
from tunesmith.model.layers import attention, packed_attention
from tunesmith.model.layers.attention_kernels import TORCH_KERNEL, choose_kernel
from varlen import varlen

# Heads, key heads, width of a head, edges of documents: of one token, of none, over several tiles.
CASES = [
    (4, 2, 64, [0, 1, 40, 40, 200, 300]),
    (6, 2, 64, [0, 130, 131]),
    (2, 2, 128, [0, 70]),
    (128, 1, 64, [0, 20]),
]


def expected(q: Tensor, k: Tensor, v: Tensor, edges: list[int], scale: float) -> Tensor:
    """Each document by plain formulas."""
    group = q.shape[1] // k.shape[1]
    outputs = []
    for start, end in pairwise(edges):
        parts = (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
        queries, keys, values = (x[start:end].transpose(0, 1) for x in parts)
        seen = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).tril()
        scores = (queries @ keys.mT * scale).masked_fill(~seen, float("-inf"))
        outputs.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs)


def compare(device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Output and gradients of each case beside fp32."""
    from tunesmith.model.layers.packed_attention import packed_attention, spans_of

    for heads, kv_heads, width, edges in CASES:
        generator = torch.Generator().manual_seed(0)
        n = edges[-1]
        shapes = [(n, heads, width), *[(n, kv_heads, width)] * 2, (n, heads, width)]
        *inputs, d_out = (torch.randn(*s, generator=generator).to(device, dtype) for s in shapes)
        spans = spans_of(torch.tensor(edges, dtype=torch.int32, device=device), n)
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, _ = packed_attention(*leaves, spans, 0.1)
        results = [out, *torch.autograd.grad(out, leaves, d_out)]
        leaves = [x.float().requires_grad_() for x in inputs]
        plain = expected(*leaves, edges, 0.1)
        references = [plain, *torch.autograd.grad(plain, leaves, d_out.float())]
        for result, reference in zip(results, references, strict=True):
            error = (result.float() - reference).norm() / reference.norm()
            assert error < tolerance, (heads, kv_heads, edges, float(error))


@pytest.mark.parametrize(
    ("of_torch", "fault", "chosen"),
    [
        ("torch's own FlashAttention 2", "", True),
        ("FlashAttention 4", "", False),  # beside these it was not measured
        ("torch's own FlashAttention 2", "wrong here", False),
    ],
)
def test_where_our_kernel_is_chosen(of_torch, fault, chosen, monkeypatch) -> None:
    """Torch's kernel is chosen too, for layers that ours does not take."""
    device = torch.device("cuda")
    monkeypatch.setattr(packed_attention, "_CHOSEN", set())
    monkeypatch.setattr(packed_attention, "takes", lambda *_: True)
    monkeypatch.setattr(attention, "choose_kernel", lambda _: (of_torch, []))
    monkeypatch.setattr(attention, "find_varlen_fault", lambda *_: fault)
    monkeypatch.setattr(attention, "_FITS_VARLEN", {})
    monkeypatch.setattr(attention, "ATTENTION_KERNELS", {})
    attention.select_attention_backend.cache_clear()
    backend, why = attention.select_attention_backend(device, torch.bfloat16, 128, group=4)
    attention.select_attention_backend.cache_clear()
    assert backend == "varlen"
    if not chosen:
        assert {"varlen": of_torch} == attention.ATTENTION_KERNELS
    assert why.startswith("our own kernel" if chosen else of_torch)
    assert fault in why
    assert [*attention._FITS_VARLEN.values()] == [True]
    assert ({"cuda"} if chosen else set()) == packed_attention._CHOSEN


def test_layers_that_were_not_measured_keep_torchs_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    device = torch.device("cuda")
    for head_dim, group, taken in [(128, 4, True), (128, 8, True), (128, 3, False), (64, 4, False)]:
        assert packed_attention.takes(device, torch.bfloat16, head_dim, group) == taken
    edges = torch.tensor([0, 3], dtype=torch.int32)
    documents = attention.Documents(edges, 3, spans=packed_attention.spans_of(edges, 3))
    q, k = (torch.empty(3, heads, 128, dtype=torch.bfloat16) for heads in (8, 2))
    monkeypatch.setattr(packed_attention, "takes", lambda *shape: shape[2:] == (128, 4))
    for window, taken in [(None, True), (2, False)]:
        rule = attention.Rule(documents, 1.0, window)
        assert attention._takes_packed(q, k, k, rule) == taken


# Only a GPU has torch's kernels: an operator with right or wrong arithmetic stands for them.
NO_KERNEL = "no kernel image is available"  # as CUDA says
RIGHT, WRONG, REFUSES, NAN = "right", "wrong", "refuses", "no number in a gradient"


class Torch:
    """torch's varlen attention: `kernels` says how each of those that are installed computes.

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
        return Mock()


@pytest.fixture
def torch_as_before() -> Iterator[None]:
    implementations = nn.attention._registry._FLASH_ATTENTION_IMPLS
    before = dict(implementations)
    yield
    if nn.attention.current_flash_attention_impl():
        nn.attention.restore_flash_attention_impl()
    implementations.update(before)
    torch.backends.cuda.enable_cudnn_sdp(True)


# Whether torch obeys its switches, its kernels, the one that is taken, and values of each fault.
MACHINES: list[tuple[bool, dict[str, str], str, list[str]]] = [
    (True, {"cudnn": RIGHT, "FA3": RIGHT, "own": RIGHT}, "cuDNN", []),
    (True, {"cudnn": WRONG, "own": RIGHT}, TORCH_KERNEL, ["%"]),
    (False, {"FA4": RIGHT, "FA3": RIGHT, "own": RIGHT}, "FlashAttention 4", []),
    (False, {"FA4": REFUSES, "FA3": WRONG, "own": RIGHT}, TORCH_KERNEL, ["FlashAttention 4", "%"]),
    (False, {"own": NAN}, "", ["nan"]),
    (True, {"cudnn": WRONG, "FA3": REFUSES, "own": WRONG}, "", ["%", NO_KERNEL, "%"]),
]
SHORT = {"cuDNN": "cudnn", "FlashAttention 3": "FA3", "FlashAttention 4": "FA4"}


@pytest.mark.usefixtures("torch_as_before")
@pytest.mark.parametrize(("obeys", "kernels", "name", "faults"), MACHINES)
def test_the_first_right_kernel_is_taken_and_stays(obeys, kernels, name, faults, monkeypatch):
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


@pytest.mark.slow
def test_the_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_the_kernels(device: str) -> None:
    compare(device, torch.bfloat16, 1e-2)  # bf16 loses half a percent


if __name__ == "__main__":
    compare("cpu", torch.float32, 2e-6)  # in the interpreter a `tl.dot` of bf16 is wrong
