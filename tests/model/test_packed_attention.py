"""Our kernels of attention over packed documents: on a GPU, and here in Triton's interpreter."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from devices import gpu, run_interpreted
from tunesmith.model import attention, packed_attention

# Heads, key heads, width of a head, edges of documents. Documents of one token, of none,
# over several tiles, and a last one that is shorter than a tile; groups of heads that are a power
# of two, and more than a tile has rows, and are not.
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
    from tunesmith.model.packed_attention import packed_attention, spans_of

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
        ("", "", True),
        ("FlashAttention 4", "", False),  # beside these it was not measured
        ("cuDNN", "", False),
        ("torch's own FlashAttention 2", "wrong here", False),
    ],
)
def test_where_it_is_chosen(
    of_torch: str, fault: str, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    if of_torch and not chosen:
        assert {"varlen": of_torch} == attention.ATTENTION_KERNELS
    assert why.startswith("our own kernel" if chosen else of_torch)
    assert fault in why
    assert [*attention._FITS_VARLEN.values()] == [bool(of_torch)]
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


def test_spans_are_made_where_the_kernel_takes_the_documents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    edges = torch.tensor([0, 1, 1, 3], dtype=torch.int32)
    assert packed_attention.spans_if_chosen(edges, 3, 2) is None, "not chosen on a CPU"
    monkeypatch.setattr(packed_attention, "_CHOSEN", {"cpu"})
    found = packed_attention.spans_if_chosen(edges, 3, 4096)
    assert found is not None
    assert found.tolist() == [[0, 1, 1], [1, 3, 3]]
    assert packed_attention.spans_if_chosen(edges, 3, 4097) is None, "not measured"


@pytest.mark.slow
def test_the_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_the_kernels(device: str) -> None:
    # bf16 loses half a percent.
    compare(device, torch.bfloat16, 1e-2)


if __name__ == "__main__":
    compare("cpu", torch.float32, 2e-6)  # in the interpreter a `tl.dot` of bf16 is wrong
