"""Block-diagonal causal attention: every document of a packed row sees itself and nothing else.

Transformers finds it by name through its public `AttentionInterface`; the edges of the documents travel as one keyword
argument, `documents`, through the model's forward. Behind one door, `attend`, stand three ways to the same numbers:

varlen      CUDA, `torch.nn.attention.varlen`: FlashAttention on the flattened block, no padding, no mask.
products    grouped batched matrix products with an explicit softmax. On CPU `scaled_dot_product_attention` in bf16 is
            several times slower on short documents; it is also the only one that knows a soft cap.
sdpa        one `scaled_dot_product_attention` a document: cards that varlen refuses, and attention dropout.

No mask is ever built for the model, and attention without documents is refused: a plain causal mask over a packed row
would let documents see each other. Generation therefore runs under another name ("sdpa"), never this one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from tunesmith.errors import ModelError, first_line
from tunesmith.model.documents import KEEP, QUERIES, Documents, Group

NAME = "tunesmith"

# Keywords of this torch's varlen_attn: they differ between releases; `enable_gqa` came after 2.11, which needs no word for it.
VARLEN = frozenset(inspect.signature(varlen_attn).parameters)

# What Transformers passes to every attention function and that does not change the result here.
HARMLESS = frozenset(
    {"position_ids", "use_cache", "output_attentions", "cache_position", "position_embeddings", "is_causal"}
    | {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "num_items_in_batch", "output_router_logits"}
)


class Rule(NamedTuple):
    """Who sees whom and how strongly; see `attend`."""

    documents: Documents
    scale: float
    window: int | None = None
    softcap: float | None = None


def register() -> str:
    """Make the attention known to Transformers and return the name to give to `set_attn_implementation`.

    It is registered without a mask function: the documents say who sees whom, a [1, 1, n, n] mask would be 16 million
    entries for 4096 tokens, and before it makes one Transformers asks the device whether the row is packed.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, documents_attention)
    return NAME


def documents_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    documents: Documents | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that Transformers calls: query [1, heads, n, d], key and value [1, kv heads, n, d].

    Returns:
        [1, n, heads, d], and None in place of the weights.

    Raises:
        ModelError: no documents were given, or the model asks for something that would have to be ignored.
    """
    strange = sorted(k for k, v in others.items() if v is not None and k not in HARMLESS)
    if strange or attention_mask is not None or documents is None or others.get("is_causal") is False:
        what = f"an unknown attention option: {', '.join(strange)}" if strange else "attention over unmarked documents"
        raise ModelError(
            f"{type(module).__name__} asks for {what}",
            why="the packed attention would have to ignore it and answer differently",
            fix="set model.attention: eager",
        )
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    out = attend(q, k, v, documents, scale=scaling, window=sliding_window, softcap=softcap, dropout=dropout)
    return out.unsqueeze(0), None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention within each document.

    Args:
        q: [n, heads, d]; k, v: [n, kv heads, d], heads a multiple of kv heads (grouped-query attention); any strides.
        scale: factor on the products; None takes d ** -0.5.
        window: how many tokens a query sees, itself counted; None sees all before it.
        softcap: c in c * tanh(score / c) (Gemma 2); None leaves scores as they are.
        dropout: probability of dropping an attention weight.

    Returns:
        [n, heads, d] in q's dtype.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if window is not None and window >= documents.max_seqlen:
        window = None
    rule = Rule(documents, scale, window, softcap)
    if dropout:
        if softcap is not None:
            raise ModelError(
                "attention dropout together with a soft cap is not supported",
                fix="set the model's attention_dropout to 0",
            )
        return _sdpa(q, k, v, rule, dropout)
    door = documents.door or select_attention_backend(q.device, q.dtype, q.shape[-1]).name
    if door == "products" or softcap is not None:
        return _products(q, k, v, rule)
    if door == "varlen" and (window is None or "window_size" in VARLEN):
        return _varlen(q, k, v, rule)
    return _sdpa(q, k, v, rule)


class AttentionBackend(NamedTuple):
    """One of the ways, and why it is the one to take."""

    name: str
    why: str


# Not one of ours: Transformers' own, on padded rows.
EAGER = AttentionBackend("eager", "as model.attention says")


@cache
def select_attention_backend(
    device: torch.device, dtype: torch.dtype, width: int, *, soft: bool = False
) -> AttentionBackend:
    """The quickest way that works here: found by trying, not by version.

    Args:
        width: channels of a head.
        soft: whether the model caps its scores softly.
    """
    if soft:
        return AttentionBackend("products", "the model caps its scores softly, which torch's attention does not know")
    if device.type != "cuda":
        return AttentionBackend(
            "products", "on a CPU batched products are quicker than torch's attention, document by document"
        )
    documents = Documents(torch.tensor([0, 8, 16], dtype=torch.int32, device=device), 8)
    q = torch.zeros(16, 2, width, device=device, dtype=dtype, requires_grad=True)
    try:
        with torch.enable_grad():
            _varlen(q, q[:, :1], q[:, :1], Rule(documents, 1.0)).sum().backward()
    except (RuntimeError, ImportError, ValueError, TypeError) as error:
        return AttentionBackend("sdpa", f"this GPU's varlen attention does not run in {dtype}: {first_line(error)}")
    return AttentionBackend("varlen", "FlashAttention over packed documents runs here, forward and backward")


# varlen


def _varlen(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    documents, scale, window, _ = rule
    given: dict[str, Any] = {}
    if "is_causal" in VARLEN:
        given["is_causal"] = True
    if "window_size" in VARLEN:
        given["window_size"] = (-1 if window is None else window - 1, 0)
    if "enable_gqa" in VARLEN:
        given["enable_gqa"] = q.shape[1] != k.shape[1]
    if "scale" in VARLEN:
        given["scale"] = scale
    elif scale != q.shape[-1] ** -0.5:
        q = q * (scale * q.shape[-1] ** 0.5)
    # The bound is a constant of a compiled graph; the batches of a run all state the same one (see data/loader.py).
    edges, longest = documents.cu_seqlens, documents.max_seqlen
    out = varlen_attn(q, k, v, edges, edges, longest, longest, **given)
    assert isinstance(out, Tensor)  # the tuple is for return_aux
    return out


# sdpa


@torch.compiler.disable  # its shapes are those of the documents, new in every batch
def _sdpa(q: Tensor, k: Tensor, v: Tensor, rule: Rule, dropout: float = 0.0) -> Tensor:
    documents, scale, window, _ = rule
    parts = []
    for a, b in zip(documents.edges, documents.edges[1:], strict=False):
        mask = None
        if window is not None and b - a > window:
            mask = torch.ones(b - a, b - a, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        one_q, one_k, one_v = (t[a:b].transpose(0, 1).unsqueeze(0) for t in (q, k, v))
        out = F.scaled_dot_product_attention(
            one_q, one_k, one_v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scale, enable_gqa=True
        )
        parts.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(parts)


# products


@torch.compiler.disable  # as above
def _products(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    out: Tensor = _Products.apply(q, k, v, rule)
    return out


class _Products(torch.autograd.Function):
    """softmax(scale * q k^T + mask) v by batched products, one batch a group of documents.

    The queries that share a key head are laid under each other, so keys and values are never repeated. The backward is
    that of FlashAttention: dS = P * (dO V^T - rowsum(dO * O)).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        documents, scale, window, softcap = ctx.rule = rule
        out = q.new_empty(*q.shape[:2], v.shape[2])
        kept: list[Tensor] = []
        keep = softcap is None and any(ctx.needs_input_grad[:3])
        for group in documents.groups:
            queries, keys, values = _lay(q, group, k.shape[1], scale), _lay(k, group, None), _lay(v, group, None)
            results = []
            for a, b, lo in _blocks(group.length, window):
                rows = queries[:, :, a:b]
                probabilities, _ = _probabilities(rows, keys[:, lo:b], a - lo, window, softcap)
                results.append(torch.bmm(probabilities, values[:, lo:b]).view(*rows.shape[:3], -1))
                if keep and group.length <= KEEP:
                    kept.append(probabilities)
            _put(out, results[0] if len(results) == 1 else torch.cat(results, 2), group)
        ctx.save_for_backward(q, k, v, out, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *kept = ctx.saved_tensors
        documents, scale, window, softcap = ctx.rule
        d_out, saved = grads[0], iter(kept)
        dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        for group in documents.groups:
            queries, keys, values = _lay(q, group, k.shape[1], scale), _lay(k, group, None), _lay(v, group, None)
            d_result = _lay(d_out, group, k.shape[1])
            delta = (d_result * _lay(out, group, k.shape[1])).sum(-1, keepdim=True)
            d_queries, d_keys, d_values = [], _Total(keys), _Total(values)
            for a, b, lo in _blocks(group.length, window):
                rows, slope = queries[:, :, a:b], None
                if softcap is None and group.length <= KEEP:
                    probabilities = next(saved)
                else:
                    probabilities, slope = _probabilities(rows, keys[:, lo:b], a - lo, window, softcap)
                d_rows = d_result[:, :, a:b].flatten(1, 2)
                d_scores = torch.bmm(d_rows, values[:, lo:b].transpose(1, 2))
                d_scores.sub_(delta[:, :, a:b].flatten(1, 2)).mul_(probabilities)
                if slope is not None:
                    d_scores.mul_(slope)
                d_values.add(torch.bmm(probabilities.transpose(1, 2), d_rows), lo, b)
                d_keys.add(torch.bmm(d_scores.transpose(1, 2), rows.flatten(1, 2)), lo, b)
                d_queries.append(torch.bmm(d_scores, keys[:, lo:b]).mul_(scale).view_as(rows))
            _put(dq, torch.cat(d_queries, 2) if len(d_queries) > 1 else d_queries[0], group)
            _put(dk, d_keys.value.unsqueeze(1), group)
            _put(dv, d_values.value.unsqueeze(1), group)
        return dq, dk, dv, None


class _Total:
    """The sum of what blocks of queries add to keys or values, in fp32 where there are several blocks."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.value = like

    def add(self, part: Tensor, lo: int, hi: int) -> None:
        if part.shape == self.like.shape and self.value is self.like:
            self.value = part
            return
        if self.value is self.like:
            self.value = torch.zeros_like(self.like, dtype=torch.promote_types(part.dtype, torch.float32))
        self.value[:, lo:hi] += part


def _blocks(length: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    """Blocks of queries [a, b) and the first key `lo` that any of them sees; their last key is their own, b - 1."""
    for a in range(0, length, QUERIES):
        yield a, min(a + QUERIES, length), 0 if window is None else max(0, a - window + 1)


def _lay(x: Tensor, group: Group, kv_heads: int | None, scale: float | None = None) -> Tensor:
    """Lay the group's tokens of x [n, heads, d] out by head, padded.

    Returns:
        For keys and values (`kv_heads` None) [count * heads, length, d]; for queries
        [count * kv heads, heads a kv head, length, d], times `scale`.
    """
    if group.places is None or group.tokens is None:
        rows = x[group.start : group.start + group.length].unsqueeze(0)
    else:
        # Zeros in the padding: in the backward they are the gradients of rows that nobody reads.
        rows = x.new_zeros(group.count * group.length, *x.shape[1:])
        rows = rows.index_copy_(0, group.places, x.index_select(0, group.tokens)).unflatten(0, (group.count, -1))
    if kv_heads is None:
        return rows.transpose(1, 2).reshape(-1, group.length, x.shape[2])
    rows = rows.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
    laid = x.new_empty(rows.shape)
    if scale is None:
        laid.copy_(rows)
    else:
        torch.mul(rows, scale, out=laid)
    return laid.flatten(0, 1)


def _put(out: Tensor, laid: Tensor, group: Group) -> None:
    """Write what was laid out by head, [count * kv heads, heads a kv head, length, d], to its tokens in out [n, heads, d]."""
    rows = laid.unflatten(0, (group.count, -1)).permute(0, 3, 1, 2, 4)
    if group.tokens is None or group.places is None:
        place = out[group.start : group.start + group.length]
        place.view(rows.shape[1:]).copy_(rows[0])
    else:
        flat = rows.reshape(-1, *out.shape[1:]).index_select(0, group.places)
        out.index_copy_(0, group.tokens, flat.to(out.dtype))


def _probabilities(
    queries: Tensor, keys: Tensor, offset: int, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Softmax of the masked scores, and the soft cap's derivative where there is one.

    Args:
        queries: [batch, heads a key head, rows, d], scaled; the key of the first row is number `offset`.
        keys: [batch, offset + rows, d].

    Returns:
        [batch, heads a key head * rows, offset + rows] each.
    """
    scores = torch.bmm(queries.flatten(1, 2), keys.transpose(1, 2))
    slope = None
    if softcap is not None:
        scores.div_(softcap).tanh_()
        slope = 1 - scores * scores
        scores.mul_(softcap)
    rows = queries.shape[2]
    by_head = scores.view(-1, rows, keys.shape[1])
    by_head[:, :, offset:].add_(_future(scores.dtype, scores.device)[:rows, :rows])
    if window is not None:
        ones = torch.ones(rows, keys.shape[1], dtype=torch.bool, device=scores.device)
        by_head.masked_fill_(ones.tril(offset - window), float("-inf"))
    return scores.softmax(-1), slope


@cache
def _future(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[QUERIES, QUERIES]: minus infinity where the key lies in the query's future. Added, it is cheaper than a fill."""
    return torch.full((QUERIES, QUERIES), float("-inf"), dtype=dtype, device=device).triu(1)
