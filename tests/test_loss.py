"""The chunked head and loss against plain logits and `F.cross_entropy`, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pairwise import name_of, pairwise
from tunesmith.adapter.lora import LoraLinear
from tunesmith.config.schema import Adapter
from tunesmith.loss import (
    HEAD_ROWS_A_THREAD,
    TILE_ROWS,
    chunk_size,
    chunked_cross_entropy,
    even_chunk_size,
    loss_and_grad,
    token_cross_entropy,
    token_logprobs,
)


class Products(TorchDispatchMode):
    """Counts matrix products, those of the backward too."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


CAPS = [{}, {"softcap": 3.0}, {"scale": 0.25}, {"softcap": 3.0, "scale": 2.0}]
KINDS = ["frozen", "trained", "bias", "lora"]
COVERED_HEADS = pairwise({"kind": KINDS, "chunk": [1, 5, 23, 100], "options": CAPS})


def plain(hidden, head, targets, *, softcap=None, scale=1.0, reduction="sum"):
    logits = head(hidden) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction=reduction)


def case(kind: str):
    torch.manual_seed(0)
    head = nn.Linear(6, 40, bias=kind == "bias", dtype=torch.float64)
    nn.init.normal_(head.weight)
    if kind == "frozen":
        head.requires_grad_(False)
    if kind == "lora":
        head.requires_grad_(False)
        head = LoraLinear(head, Adapter(rank=2)).double()
        nn.init.normal_(head.lora_A)
        nn.init.normal_(head.lora_B)
    hidden = torch.randn(23, 6, dtype=torch.float64, requires_grad=True)
    return hidden, head, torch.randint(0, 40, (23,))


def assert_equal_with_gradients(ours, expected, leaves):
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=0)
    got = torch.autograd.grad(ours * 0.37, leaves)
    wanted = torch.autograd.grad(expected * 0.37, leaves)
    for a, b in zip(got, wanted, strict=True):
        assert b.abs().max() > 1e-3, "a zero reference proves nothing"
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case_of", COVERED_HEADS, ids=name_of)
def test_value_and_gradients(case_of):
    kind, chunk, options = case_of.values()
    hidden, head, targets = case(kind)
    leaves = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    ours = chunked_cross_entropy(hidden, head, targets, chunk=chunk, **options)
    expected = plain(hidden, head, targets, **options)
    assert_equal_with_gradients(ours, expected, leaves)


@pytest.mark.parametrize("trained", [False, True])
def test_a_large_vocabulary_in_fp32(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is multiplied in parts, the last of which is smaller."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    torch.manual_seed(0)
    head = nn.Linear(6, 2 * HEAD_ROWS_A_THREAD + 5, bias=False).requires_grad_(trained)
    hidden = torch.randn(23, 6, requires_grad=True)
    # Of each part, the edges too
    targets = torch.arange(23) % 2 * HEAD_ROWS_A_THREAD + torch.arange(23) // 2
    edges = [HEAD_ROWS_A_THREAD - 1, HEAD_ROWS_A_THREAD, 2 * HEAD_ROWS_A_THREAD + 4]
    targets[:3] = torch.tensor(edges)
    leaves = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    ours = chunked_cross_entropy(hidden, head, targets, chunk=5)
    got = torch.autograd.grad(ours, leaves)
    wide = copy.deepcopy(head).double()
    wide_leaves = [hidden.detach().double().requires_grad_(), *wide.parameters()][: len(leaves)]
    expected = plain(wide_leaves[0], wide, targets)
    wanted = torch.autograd.grad(expected, wide_leaves)
    # fp32 rounding of a sum over 1,029 tokens
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=0)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case_of", COVERED_HEADS, ids=name_of)
def test_log_probabilities_have_gradients(case_of):
    """Against `log_softmax` of all logits, below a function that is not linear in them."""
    kind, chunk, options = case_of.values()
    hidden, head, targets = case(kind)
    leaves = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    ours = token_logprobs(hidden, head, targets, chunk=chunk, **options)
    expected = -plain(hidden, head, targets, reduction="none", **options)
    assert ours.shape == (23,)
    assert_equal_with_gradients(ours.square().mean(), expected.square().mean(), leaves)


def test_bf16_head_sums_its_gradient_in_fp32():
    """4,096 equal rows, one a chunk: a bf16 sum of them would stop growing at 256 times the first."""
    hidden = torch.ones(4096, 1, dtype=torch.bfloat16)
    head = nn.Linear(1, 2, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(head.weight)
    loss = chunked_cross_entropy(hidden, head, torch.zeros(4096, dtype=torch.long), chunk=1)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.item(), 4096 * 0.6931472, rtol=1e-4, atol=0)
    assert head.weight.grad.flatten().tolist() == [-2048.0, 2048.0]


def test_no_more_than_a_chunk_of_logits_exists():
    vocabulary, largest = 5000, 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == vocabulary:
                largest = max(largest, len(out))
            return out

    head = nn.Linear(4, vocabulary, bias=False)
    targets = torch.zeros(300, dtype=torch.long)
    with Watch():
        chunked_cross_entropy(torch.randn(300, 4), head, targets, chunk=64)
    assert largest == 60  # 300 in five chunks, all alike
    assert chunk_size(128256, 300, torch.device("cpu")) * 128256 * 4 <= 64 << 20


def test_no_positions_give_the_adapter_of_a_head_a_gradient_of_zeros():
    """A rank without a row takes part in the sum of gradients."""
    _, head, _ = case("lora")
    hidden, targets = torch.zeros(0, 6, dtype=torch.float64), torch.zeros(0, dtype=torch.long)
    loss = chunked_cross_entropy(hidden, head, targets)
    loss.backward()
    assert loss.item() == 0
    for parameter in (head.lora_A, head.lora_B):
        assert parameter.grad is not None
        assert not parameter.grad.any()
    hidden.requires_grad_()
    token_logprobs(hidden, head, targets).sum().backward()
    assert hidden.grad is not None


@pytest.mark.parametrize("options", CAPS, ids=str)
def test_token_losses_and_hits(options):
    hidden, head, targets = case("trained")
    losses, hits = token_cross_entropy(hidden, head, targets, **options)
    torch.testing.assert_close(
        losses, plain(hidden, head, targets, reduction="none", **options), rtol=0, atol=1e-12
    )
    assert hits.tolist() == (head(hidden).argmax(-1) == targets).tolist()
    assert not losses.requires_grad


def test_chunks_are_alike_and_on_a_gpu_whole_tiles_within_a_budget():
    assert (even_chunk_size(23, 5), even_chunk_size(100, 40)) == (5, 34)
    for count in range(1, 2000):
        chunk = even_chunk_size(count, 384, tile=TILE_ROWS)
        assert chunk <= 384
        assert -(-count // chunk) <= -(-count // 384)
        if (count - 1) % TILE_ROWS:
            assert chunk % TILE_ROWS == 0 or count <= chunk
    gpu, small, large = torch.device("cuda"), {"card": 24 << 30}, {"card": 141 << 30}
    assert chunk_size(128_256, 16384, gpu, **small) == 512
    assert chunk_size(151_936, 16384, gpu, **small, trained=True) == 1664
    assert chunk_size(128_256, 16384, gpu, **large) == 2048
    assert chunk_size(128_256, 2048, gpu, **large) == 512, "a small micro batch has a small peak"


@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (5.0, 0.5)])
def test_a_chunk_of_16_bit_logits_is_scored_as_in_fp64(softcap: float | None, scale: float) -> None:
    """With labels that are all but certain and all but impossible."""
    torch.manual_seed(3)
    raw = (torch.randn(37, 500) * 4).bfloat16()
    targets, weights = torch.randint(0, 500, (37,)), torch.rand(37) + 0.5
    raw[0, targets[0]], raw[1, targets[1]] = 40.0, -200.0
    exact = raw.double().requires_grad_()
    logits = exact * scale if softcap is None else softcap * torch.tanh(exact * scale / softcap)
    expected = F.cross_entropy(logits, targets, reduction="none") * weights
    expected.sum().backward()
    losses, grad = loss_and_grad(raw.clone(), targets, weights, softcap, scale)
    assert losses.dtype == torch.float32
    # fp32 with an exponential of 20 units in the last place; a 16-bit loss would be off by a
    # thousandth. All but certain labels have a loss near 0, a difference of large numbers.
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    # Half a unit in the last place of bf16, and the gradient's own cancellation where a label is
    # all but certain.
    torch.testing.assert_close(grad.double(), exact.grad, rtol=2**-8, atol=1e-5)


def test_log_probabilities_over_a_frozen_head_take_two_products_a_chunk():
    """Logits, and the gradient by the hidden states; nothing is multiplied again in the backward."""
    hidden, head, targets = case("frozen")
    with Products() as products:
        logprobs = token_logprobs(hidden, head, targets, chunk=5)
        logprobs.square().sum().backward()
    assert products.count == 2 * 5  # 23 positions in five chunks
    with Products() as products:
        token_logprobs(hidden.detach(), head, targets, chunk=5)
    assert products.count == 5
