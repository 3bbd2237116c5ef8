"""Packed attention against the plain softmax formula, written out with a mask over the whole block,
in float64.
"""

from __future__ import annotations

import pytest
import torch

from tunesmith.errors import ModelError
from tunesmith.model import attention
from tunesmith.model.attention import attend
from tunesmith.model.documents import QUERIES, Documents


def documents(lengths: list[int]) -> Documents:
    edges = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Documents(edges, max(lengths))


def formula(q, k, v, lengths, *, scale, window=None, softcap=None):
    """softmax(cap(scale q k^T) + mask) v with a [n, n] mask; keys repeated for grouped heads."""
    n, repeat = len(q), q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(n)
    seen = (owner[:, None] == owner) & (place[:, None] >= place)
    if window is not None:
        seen &= place[:, None] - place < window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


LENGTHS = {
    "one": [7],
    "alike": [9, 10, 9, 10, 10],
    "mixed": [1, 30, 2, 29, 17, 1],
    "blocks": [37, 70, 3],
}
RULES = {
    "plain": {"scale": 0.3},
    "window": {"scale": 0.3, "window": 8},
    "softcap": {"scale": 1.5, "softcap": 2.0},
    "window and softcap": {"scale": 1.5, "window": 5, "softcap": 2.0},
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (4, 1)], ids=lambda h: f"{h[0]}-on-{h[1]}")
def test_products_and_their_gradients_equal_the_formula(lengths, rule, heads, monkeypatch):
    # Small blocks, so that documents of 37 and 70 tokens go through several; the first length keeps
    # its probabilities.
    monkeypatch.setattr(attention, "QUERIES", 16)
    monkeypatch.setattr(attention, "KEEP", 32)
    attention._future.cache_clear()
    torch.manual_seed(0)
    n = sum(lengths)
    shapes = (n, heads[0], 8), (n, heads[1], 8), (n, heads[1], 12)
    q, k, v = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    weight = torch.randn(n, heads[0], 12, dtype=torch.float64)
    ours = attend(q, k, v, documents(lengths), **rule)
    got = torch.autograd.grad((ours * weight).sum(), (q, k, v))
    expected = formula(q, k, v, lengths, **rule)
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    for a, b in zip(got, wanted, strict=True):
        assert b.abs().max() > 1e-3, "a zero reference proves nothing"
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    attention._future.cache_clear()


@pytest.mark.parametrize("window", [None, 8])
def test_sdpa_by_document_equals_the_products(window):
    torch.manual_seed(1)
    lengths = [5, 20, 1, 13]
    q, k, v = (torch.randn(39, h, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    rule = attention.Rule(documents(lengths), 0.2, window)
    one, other = (
        attention._sdpa(q, k, v, rule),
        attend(q, k, v, rule.documents, scale=0.2, window=window),
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(one.square().sum(), (q, k, v)),
        torch.autograd.grad(other.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_long_documents_never_hold_the_square_of_their_length():
    """8,192 tokens of 4 heads: full scores would take 1 GiB in fp32; blocks of 128 queries take 16
    MiB.
    """
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    q, k, v = (torch.randn(8192, h, 4) for h in (4, 1, 1))
    with Watch(), torch.no_grad():
        out = attention._Products.forward(
            _Context(), q, k, v, attention.Rule(documents([8192]), 0.5)
        )
    assert largest == 4 * QUERIES * 8192
    assert torch.isfinite(out).all()


class _Context:
    needs_input_grad = (False, False, False, False)

    def save_for_backward(self, *tensors):
        pass


def test_bf16_is_as_near_to_the_truth_as_sdpa():
    torch.manual_seed(2)
    lengths = [40, 90, 33]
    exact = [torch.randn(163, h, 64) for h in (6, 2, 2)]
    truth = formula(*(t.bfloat16().double() for t in exact), lengths, scale=0.125)
    half = [t.bfloat16() for t in exact]
    rule = attention.Rule(documents(lengths), 0.125)
    ours = (attend(*half, rule.documents).double() - truth).norm() / truth.norm()
    theirs = (attention._sdpa(*half, rule).double() - truth).norm() / truth.norm()
    assert 0 < ours < 2 * theirs


def test_a_document_does_not_see_another():
    torch.manual_seed(3)
    q, k, v = (torch.randn(30, h, 8) for h in (4, 2, 2))
    before = attend(q, k, v, documents([10, 12, 8]))
    for t in (q, k, v):
        t[:10].normal_()
    after = attend(q, k, v, documents([10, 12, 8]))
    assert torch.equal(before[10:], after[10:])
    assert not torch.equal(before[:10], after[:10])


def test_documents_are_grouped_when_alike_and_all_tokens_are_taken_once():
    groups = documents([10, 9, 10, 3, 130, 0, 129]).groups
    assert [(g.count, g.length) for g in groups] == [(1, 130), (1, 129), (3, 10), (1, 3)]
    assert sorted(groups[2].tokens.tolist()) == list(range(29))


@pytest.mark.parametrize(
    "options",
    [
        {"documents": None},
        {"s_aux": torch.zeros(1)},
        {"is_causal": False},
        {"position_bias": torch.zeros(1)},
    ],
    ids=["no documents", "attention sinks", "not causal", "position bias"],
)
def test_what_would_have_to_be_ignored_is_refused(options):
    q = torch.zeros(1, 2, 4, 8)
    given = {"documents": documents([4]), **options}
    with pytest.raises(ModelError, match=r"model\.attention: eager"):
        attention.documents_attention(torch.nn.Identity(), q, q, q, None, **given)


def test_attention_dropout_keeps_the_mean():
    """Dropout goes through SDPA: over many draws the mean is that of no dropout, to the mean's own
    error.
    """
    torch.manual_seed(4)
    q, k, v = (torch.randn(12, h, 4) for h in (2, 2, 2))
    plain = attend(q, k, v, documents([5, 7]))
    draws = torch.stack([attend(q, k, v, documents([5, 7]), dropout=0.3) for _ in range(800)])
    error = draws.std(0) / 800**0.5
    assert ((draws.mean(0) - plain).abs() < 6 * error + 1e-6).all()
    assert draws.std(0).max() > 0.1
