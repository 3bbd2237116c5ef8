"""Packed attention against the plain softmax formula with a mask over the whole row, in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise as pairwise_of

import numpy as np
import pytest
import torch

from errors import refuses
from pairwise import name_of, pairwise
from tunesmith.batches.batch import collate
from tunesmith.errors import ModelError
from tunesmith.model.layers import attention
from tunesmith.model.layers import sinks as sinks_module
from tunesmith.model.layers.attention import attend
from tunesmith.model.layers.documents import (
    BLOCK_QUERIES,
    Documents,
    RepeatedTokens,
    count_saved_probabilities,
)
from tunesmith.tokens.text.example import Example


def documents(lengths: list[int]) -> Documents:
    edges = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Documents(edges, max(lengths))


def dense_scores(q, k, lengths, scale, window=None, softcap=None, pictures=()):
    """[heads, n, n], minus infinity where a query does not see a key."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(q))
    seen = (owner[:, None] == owner) & (place[:, None] >= place)
    for first, stop in pictures:
        seen[first:stop, first:stop] = True
    if window is not None:
        seen &= place[:, None] - place < window
    return scores.masked_fill(~seen, float("-inf"))


def formula(q, k, v, lengths, *, sinks=None, **rule):
    """A sink is one more key, whose score it is and whose value is zero."""
    n, repeat = len(q), q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = dense_scores(q, k, lengths, **rule)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, n, 1)], -1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :n], v)


def draw(lengths, heads=(6, 2), widths=(8, 8)):
    """q, k and v, and a sink for each head, in float64."""
    torch.manual_seed(6)
    n, (width, v_width) = sum(lengths), widths
    shapes = (n, heads[0], width), (n, heads[1], width), (n, heads[1], v_width), (heads[0],)
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


def assert_same_gradients(ours, expected, inputs, tolerance=1e-12, of_output=1e-12):
    weight = torch.linspace(-1, 2, ours.numel(), dtype=ours.dtype).view_as(ours)
    torch.testing.assert_close(ours, expected, rtol=0, atol=of_output)
    got = torch.autograd.grad((ours * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    for a, b in zip(got, wanted, strict=True):
        assert b.abs().max() > 1e-3, "a zero reference proves nothing"
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


LENGTHS = {"alike": [9, 10, 9, 10, 10], "mixed": [1, 30, 2, 29, 17, 1], "blocks": [37, 70, 3]}
RULES = {
    "plain": {"scale": 0.3},
    "window": {"scale": 0.3, "window": 8},
    "softcap": {"scale": 1.5, "softcap": 2.0},
    "window and softcap": {"scale": 1.5, "window": 5, "softcap": 2.0},
    "sinks": {"scale": 0.3},
    "window and sinks": {"scale": 0.3, "window": 8},
}
COVERED_RULES = pairwise(
    {
        "rule": [*RULES], "lengths": [*LENGTHS], "heads": [(6, 2), (4, 4), (4, 1)],
        "backend": ["batched_matmul", "sdpa"],
    },
    # Its own kernels take neither.
    allows=lambda row: row.get("backend") != "sdpa" or row["rule"] in ("plain", "window"),
)  # fmt: skip


@pytest.fixture
def small_blocks(monkeypatch):
    """Documents of 37 and 70 tokens go through several blocks."""
    monkeypatch.setattr(attention, "BLOCK_QUERIES", 16)
    monkeypatch.setattr(attention, "MAX_SAVED_TOKENS", 32)
    attention._future.cache_clear()
    yield
    attention._future.cache_clear()


@pytest.mark.parametrize("case", COVERED_RULES, ids=name_of)
@pytest.mark.usefixtures("small_blocks")
def test_attention_and_its_gradients_equal_the_formula(case):
    lengths, rule = LENGTHS[case["lengths"]], dict(RULES[case["rule"]])
    *inputs, sinks = draw(lengths, case["heads"], (8, 12))
    if "sinks" in case["rule"]:
        rule["sinks"] = sinks
        inputs.append(sinks)
    packed = replace(documents(lengths), backend=case["backend"])
    ours = attend(*inputs[:3], packed, **rule)
    tolerance = 1e-11 if "sinks" in rule or case["backend"] == "sdpa" else 1e-12
    assert_same_gradients(ours, formula(*inputs[:3], lengths, **rule), inputs, tolerance)


SHARED = {
    # (length, number of first tokens that the last document without shared tokens stores)
    "alike": [(13, 0), (14, 9), (13, 9), (15, 9), (9, 0), (9, 4), (3, 0)],
    "blocks": [(70, 0), (60, 33), (37, 33), (40, 0), (45, 39)],
}
COVERED_SHARES = pairwise(
    {
        "rule": [*RULES], "documents": [*SHARED], "heads": [(6, 2), (4, 4), (4, 1)],
        "backend": ["batched_matmul", "sdpa"],
    },
    allows=lambda row: row.get("backend") != "sdpa" or row["rule"] in ("plain", "window"),
)  # fmt: skip


def documents_that_share(shapes: list[tuple[int, int]], backend: str | None = None) -> Documents:
    examples: list[Example] = []
    groups = [i for i, (_, shared) in enumerate(shapes) if not shared]
    for first, end in pairwise_of([*groups, len(shapes)]):
        lengths = tuple(length for length, _ in shapes[first:end])
        shared = shapes[end - 1][1]
        ids = np.zeros(sum(lengths), np.int32)
        examples.append(Example(ids, ids > 0, lengths, shared=shared))
    batch = collate([examples], length=sum(n - shared for n, shared in shapes), pad_id=0)
    assert batch.whole is not None
    repeated = RepeatedTokens(*batch.whole)
    packed = Documents(batch.cu_seqlens, batch.max_seqlen, backend, repeated=repeated)
    packed.set_shared(batch.shared)
    return packed


@pytest.mark.parametrize("case", COVERED_SHARES, ids=name_of)
@pytest.mark.usefixtures("small_blocks")
def test_documents_that_share_tokens_equal_the_formula(case):
    shapes, rule = SHARED[case["documents"]], dict(RULES[case["rule"]])
    lengths = [length for length, _ in shapes]
    packed = documents_that_share(shapes, case["backend"])
    *inputs, sinks = draw([n - shared for n, shared in shapes], case["heads"], (8, 12))
    if "sinks" in case["rule"]:
        rule["sinks"] = sinks
        inputs.append(sinks)
    ours = attend(*inputs[:3], packed, **rule)
    places, firsts, _ = packed.repeated
    expected = formula(*(x[places] for x in inputs[:3]), lengths, **rule)[firsts]
    tolerance = 1e-11 if "sinks" in rule or case["backend"] == "sdpa" else 1e-12
    assert_same_gradients(ours, expected, inputs, tolerance)


def test_a_shared_token_is_queried_once():
    packed = documents_that_share(SHARED["alike"])
    queries = sum(group.queries.count * group.queries.length for group in packed.groups)
    assert queries <= sum(n - shared for n, shared in SHARED["alike"]) + 3, "at most 3 of padding"


def test_the_plan_counts_the_probabilities_that_are_saved() -> None:
    for length, shared in ((60, 40), (300, 40), (500, 300), (520, 300)):
        packed = documents_that_share([(length, 0), (length, shared), (length, shared)])
        inputs = draw([length, length - shared, length - shared])[:3]
        saved: list[int] = []

        def keep(tensor: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            attend(*inputs, packed)
        places = len(packed.repeated.places)
        # q, k, v and the output: six and twice two heads of width 8.
        others = 2 * 6 * 8 * len(inputs[0]) + 2 * 2 * 8 * places
        counts = count_saved_probabilities(np.full(3, length), np.array([0, shared, shared]))
        assert sum(saved) - others == 6 * counts.sum()


def test_a_chunk_of_shared_tokens_alone_has_no_gradient_of_its_own():
    """The second document's first chunk has only tokens of the first document."""
    packed = documents_that_share([(13, 0), (14, 9)]).cut(4)
    inputs = draw([13, 5])[:3]
    places, firsts, _ = packed.repeated
    expected = formula(*(x[places] for x in inputs), [4, 4, 4, 1, 4, 4, 4, 2], scale=0.3)[firsts]
    assert_same_gradients(attend(*inputs, packed, scale=0.3), expected, inputs)


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


@pytest.mark.slow
def test_long_documents_never_hold_the_square_of_their_length(monkeypatch):
    sizes = []
    probabilities = attention._probabilities

    def watched(*args):
        found = probabilities(*args)
        sizes.append(found[0].numel())
        return found

    monkeypatch.setattr(attention, "_probabilities", watched)
    attend(*(torch.randn(8192, heads, 4) for heads in (4, 1, 1)), documents([8192]))
    assert max(sizes) == 4 * BLOCK_QUERIES * 8192


@pytest.mark.parametrize(
    "options", [{"documents": None}, {"is_causal": False}, {"position_bias": torch.zeros(1)}]
)
def test_what_would_have_to_be_ignored_is_refused(options):
    q = torch.zeros(1, 2, 4, 8)
    given = {"documents": documents([4]), **options}
    with pytest.raises(ModelError, match=r"model\.attention: eager"):
        attention.documents_attention(torch.nn.Identity(), q, q, q, None, **given)


def flash_forward(q, k, v, edges, *, longest, scale, window):
    """What FlashAttention computes, written out: output and logsumexp [heads, n]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = dense_scores(q, k, edges.diff().tolist(), scale, window)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1), edges


def flash_backward(d_out, q, k, v, out, lse, edges, state, *, longest, scale, window):
    """FlashAttention 2's algorithm 2 (arXiv:2307.08691), from the output and the logsumexp alone."""
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(groups, 1) for x in (k, v))
    probabilities = (
        dense_scores(q, keys, edges.diff().tolist(), scale, window) - lse.unsqueeze(2)
    ).exp()
    delta = (d_out * out).sum(-1).T.unsqueeze(2)
    d_scores = probabilities * (torch.einsum("qhd,khd->hqk", d_out, values) - delta) * scale
    dq = torch.einsum("hqk,khd->qhd", d_scores, keys)
    dk = torch.einsum("hqk,qhd->khd", d_scores, q)
    dv = torch.einsum("hqk,qhd->khd", probabilities, d_out)
    return dq, dk.unflatten(1, (-1, groups)).sum(2), dv.unflatten(1, (-1, groups)).sum(2)


@pytest.fixture
def kernel(monkeypatch):
    """The varlen kernel by its formulas, in any precision; only a GPU has it."""
    monkeypatch.setattr(sinks_module, "varlen_forward", flash_forward)
    monkeypatch.setattr(sinks_module, "varlen_backward", flash_backward)

    def varlen_attn(q, k, v, edges, _, longest, *__, scale, window_size, **others):
        if q.shape[-1] != v.shape[-1] or q.shape[-1] > 32:
            raise RuntimeError("the kernel takes heads of one width up to 32")
        assert others.get("is_causal", True)
        assert others.get("enable_gqa", True) or q.shape[1] == k.shape[1]
        window = None if window_size[0] < 0 else window_size[0] + 1
        return flash_forward(q, k, v, edges, longest=longest, scale=scale, window=window)[0]

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "_FITS_VARLEN", {})


@pytest.mark.parametrize("window", [None, 8])
def test_sinks_around_the_varlen_kernel_equal_the_formula(window, kernel):
    lengths = LENGTHS["mixed"]
    q, k, v, sinks = inputs = draw(lengths)
    packed = Documents(documents(lengths).cu_seqlens, max(lengths), "varlen")
    ours = attend(q, k, v, packed, scale=0.3, window=window, sinks=sinks)
    expected = formula(q, k, v, lengths, scale=0.3, window=window, sinks=sinks)
    assert type(ours.grad_fn).__name__ != "_ProductsBackward"
    shape = attention.VarlenShape(q.device, q.dtype, 8, 8, has_sinks=True)
    assert {shape: True} == attention._FITS_VARLEN
    # The sink's sums are in fp32.
    assert_same_gradients(ours, expected, inputs, 1e-5, of_output=1e-5)


@pytest.mark.parametrize(("head_dim", "v_dim", "fits"), [(24, 16, True), (64, 64, False)])
def test_a_layer_whose_heads_the_kernel_does_not_take_goes_another_way(
    head_dim, v_dim, fits, kernel
):
    lengths = [5, 20, 1, 13]
    q, k, v, _ = draw(lengths, (4, 2), (head_dim, v_dim))
    packed = Documents(documents(lengths).cu_seqlens, max(lengths), "varlen")
    ours = attend(q, k, v, packed, scale=0.2, window=8)
    assert [*attention._FITS_VARLEN.values()] == [fits]
    assert ours.shape == (39, 4, v_dim)
    assert_same_gradients(ours, formula(q, k, v, lengths, scale=0.2, window=8), (q, k, v), 1e-11)


def with_pictures(lengths: list[int], bidirectional_pictures: str) -> Documents:
    """Pictures at the beginning, in the middle and at the end of documents."""
    made = replace(documents(lengths), bidirectional_pictures=bidirectional_pictures)
    made.set_pictures(PICTURES)
    return made


PICTURES = ((0, 3), (9, 15), (26, 30))
PICTURE_LENGTHS = [7, 16, 7]


@pytest.fixture
def fused_only(monkeypatch):
    """torch's attention, where its fused kernels on CUDA take the arguments."""
    plain = attention.F.scaled_dot_product_attention

    def call(q, k, v, *, attn_mask, **options):
        assert k.shape[1] == q.shape[1] or (attn_mask is None and q.shape[-1] == v.shape[-1] <= 192)
        return plain(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", call)


@pytest.mark.usefixtures("fused_only")
@pytest.mark.parametrize(
    ("window", "bidirectional_pictures"),
    [(None, "all"), (4, "all"), (None, "sliding"), (4, "sliding"), (4, "")],
)
def test_pictures_are_seen_both_ways_as_the_formula_says(window, bidirectional_pictures):
    *leaves, _ = draw(PICTURE_LENGTHS, (4, 2))
    packed = with_pictures(PICTURE_LENGTHS, bidirectional_pictures)
    out = attend(*leaves, packed, scale=0.3, window=window)
    sees_all = bidirectional_pictures == "all" or (bidirectional_pictures and window)
    seen = PICTURES if sees_all else ()
    expected = formula(*leaves, PICTURE_LENGTHS, scale=0.3, window=window, pictures=seen)
    assert_same_gradients(out, expected, leaves)


@pytest.mark.parametrize("pictures", ["", "all"])
def test_attention_dropout_keeps_the_mean(pictures):
    """The error of the mean of equal values is that of the draws."""
    torch.manual_seed(4)
    q, k, v = (torch.ones(30, h, 8) for h in (40, 20, 20))
    draws = attend(q, k, v, with_pictures(PICTURE_LENGTHS, pictures), dropout=0.3)[1:]
    assert ((draws != 1).flatten(1).any(1)).all()
    assert abs(draws.mean() - 1) < 6 * draws[..., 0].std() / draws[..., 0].numel() ** 0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
@pytest.mark.parametrize("window", [None, 1024])
def test_attention_over_pictures_holds_no_scores(window):
    """Windows' keys and values and all gradients take 6 times the inputs; scores would take 8 more."""
    torch.manual_seed(0)
    shapes = [(8192, heads, 256) for heads in (8, 4, 4)]
    leaves = [torch.randn(s, device="cuda").bfloat16().requires_grad_() for s in shapes]
    d_out = torch.randn(shapes[0], device="cuda").bfloat16()
    edges = torch.tensor([0, 8192], dtype=torch.int32, device="cuda")
    made = Documents(edges, 8192, bidirectional_pictures="all")
    pictures = [(first, first + 256) for first in range(100, 8100, 500)]
    made.set_pictures(pictures)

    def results():
        out = attend(*leaves, made, scale=0.0625, window=window)
        return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]

    results()  # kernels are chosen
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ours = results()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 8 * sum(x.numel() * x.element_size() for x in leaves)
    exact = [x.detach().float().requires_grad_() for x in leaves]
    with torch.device("cuda"):
        out = formula(*exact, [8192], scale=0.0625, window=window, pictures=pictures)
    expected = [out.detach(), *torch.autograd.grad(out, exact, d_out.float())]
    for one, other in zip(ours, expected, strict=True):
        assert (one.float() - other).norm() < 0.03 * other.norm()


@pytest.mark.parametrize("option", [{"softcap": 2.0}, {"sinks": torch.zeros(4)}])
def test_what_pictures_would_be_seen_without_is_refused(option):
    q, k, v = (torch.randn(30, h, 8) for h in (4, 2, 2))
    with refuses(ModelError, names=["bidirectional"], fix=["model.vision=false"]):
        attend(q, k, v, with_pictures(PICTURE_LENGTHS, "all"), **option)
