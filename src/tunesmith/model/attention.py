"""Block-diagonal causal attention: every document of a packed row sees itself and nothing else.

The edges of the documents travel as one keyword argument, `documents`, through the model's forward. Three backends:

varlen      CUDA, `torch.nn.attention.varlen`: cuDNN or FlashAttention on the flattened block, no padding, no mask.
products    grouped batched matrix products with an explicit softmax: on CPU several times faster than sdpa in bf16 on
            short documents, and the only backend with a soft cap.
sdpa        one `scaled_dot_product_attention` a document: cards that varlen refuses, and attention dropout.

Attention without documents is refused: a plain causal mask over a packed row would let documents see each other.
Generation therefore runs under another name ("sdpa"), never this one.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from tunesmith.errors import ModelError, first_line
from tunesmith.model.attention_kernels import choose_kernel
from tunesmith.model.documents import KEEP, QUERIES, Documents, Group

NAME = "tunesmith"

# Keywords of this torch's varlen_attn: they differ between releases; 2.11 takes grouped heads without `enable_gqa`.
VARLEN = frozenset(inspect.signature(varlen_attn).parameters)

# Of the norm of output or gradients: bf16 loses half a percent, and a token that sees another document changes much more.
VARLEN_ERROR = 0.03

# Keywords that Transformers passes to every attention function and that do not change the result here.
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
    """Make the attention known to Transformers and return the name to give to `set_attn_implementation`."""
    from transformers import AttentionInterface

    # Without a mask function: a [1, 1, n, n] mask would have 16 million entries for 4096 tokens, and before it makes
    # one Transformers asks the device whether the row is packed.
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
    """Attention as Transformers calls it: query [1, heads, n, d], key and value [1, kv heads, n, d] -> [1, n, heads, d].

    ModelError where no documents were given, or the model asks for something that would have to be ignored.
    """
    unknown = sorted(k for k, v in others.items() if v is not None and k not in HARMLESS)
    if unknown or attention_mask is not None or documents is None or others.get("is_causal") is False:
        what = f"an unknown attention option: {', '.join(unknown)}" if unknown else "attention over unmarked documents"
        why = "the packed attention would have to ignore it and answer differently"
        raise ModelError(f"{type(module).__name__} asks for {what}", why=why, fix="set model.attention: eager")
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

    Returns [n, heads, d] in q's dtype.
    """
    if window is not None and window >= documents.max_seqlen:
        window = None
    rule = Rule(documents, q.shape[-1] ** -0.5 if scale is None else scale, window, softcap)
    if dropout:
        if softcap is not None:
            what = "attention dropout together with a soft cap is not supported"
            raise ModelError(what, fix="set the model's attention_dropout to 0")
        return _sdpa(q, k, v, rule, dropout)
    backend = documents.backend or select_attention_backend(q.device, q.dtype, q.shape[-1])[0]
    if backend == "products" or softcap is not None:
        return _products(q, k, v, rule)
    if backend == "varlen" and (window is None or "window_size" in VARLEN):
        return _varlen(q, k, v, rule)
    return _sdpa(q, k, v, rule)


@cache
def select_attention_backend(
    device: torch.device, dtype: torch.dtype, head_dim: int, *, softcap: bool = False
) -> tuple[str, str]:
    """The fastest backend that works here, found by trying, and why; `softcap`: the model caps its attention scores."""
    if softcap:
        return "products", "the model caps its attention scores, which torch's attention cannot"
    if device.type != "cuda":
        return "products", "on a CPU batched products are faster than torch's attention per document"
    kernel, faults = choose_kernel(lambda: find_varlen_fault(device, dtype, head_dim))
    if not kernel:
        return "sdpa", f"this GPU's varlen attention is not right in {dtype}: {'; '.join(faults)}"
    why = f"{kernel} over packed documents is right here, forward and backward"
    return "varlen", "; ".join([why, *faults])


def find_varlen_fault(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What is wrong with torch's varlen attention on a few packed documents, or "": it is compared with fp32 attention of
    each document alone."""
    edges = [0, 40, 200, 456]
    documents = Documents(torch.tensor(edges, dtype=torch.int32, device=device), 256)
    rule = Rule(documents, head_dim**-0.5)
    generator = torch.Generator(device).manual_seed(0)

    def draw(heads: int) -> Tensor:
        return torch.randn(edges[-1], heads, head_dim, generator=generator, device=device).to(dtype)

    q, k, v, d_out = draw(4), draw(2), draw(2), draw(4)
    try:
        found = _output_and_gradients(_varlen, (q, k, v), d_out, rule)
    except Exception as error:  # FlashAttention 4 is compiled here, by a compiler of its own
        return first_line(error)
    with sdpa_kernel(SDPBackend.MATH):
        expected = _output_and_gradients(_sdpa, (q.float(), k.float(), v.float()), d_out.float(), rule)
    change = max(float((a.float() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
    return "" if change < VARLEN_ERROR else f"it is off by {change:.1%} of the values' norm"


def _output_and_gradients(
    attention: Callable[[Tensor, Tensor, Tensor, Rule], Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    d_out: Tensor,
    rule: Rule,
) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = attention(leaves[0], leaves[1], leaves[2], rule)
        return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def _varlen(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    documents, scale, window, _ = rule
    window_size = (-1 if window is None else window - 1, 0)
    options = {"is_causal": True, "window_size": window_size, "enable_gqa": q.shape[1] != k.shape[1], "scale": scale}
    if "scale" not in VARLEN and scale != q.shape[-1] ** -0.5:
        q = q * (scale * q.shape[-1] ** 0.5)
    # The bound is a constant of a compiled graph; the batches of a run all state the same one (see data/loader.py).
    edges, longest = documents.cu_seqlens, documents.max_seqlen
    given: dict[str, Any] = {name: value for name, value in options.items() if name in VARLEN}
    out = varlen_attn(q, k, v, edges, edges, longest, longest, **given)
    assert isinstance(out, Tensor)  # the tuple is for return_aux
    return out


@torch.compiler.disable  # shapes follow the documents and change with every batch
def _sdpa(q: Tensor, k: Tensor, v: Tensor, rule: Rule, dropout: float = 0.0) -> Tensor:
    documents, scale, window, _ = rule
    outputs = []
    for a, b in zip(documents.edges, documents.edges[1:], strict=False):
        mask = None
        if window is not None and b - a > window:
            mask = torch.ones(b - a, b - a, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        one_q, one_k, one_v = (t[a:b].transpose(0, 1).unsqueeze(0) for t in (q, k, v))
        out = F.scaled_dot_product_attention(
            one_q, one_k, one_v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scale, enable_gqa=True
        )
        outputs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


@torch.compiler.disable  # as above
def _products(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    return _Products.apply(q, k, v, rule)


class _Products(torch.autograd.Function):
    """softmax(scale * q k^T + mask) v by batched products, one batch a group of documents.

    Queries that share a key head are stacked in one matrix, so keys and values are never repeated. The backward is
    FlashAttention's: dS = P * (dO V^T - rowsum(dO * O)).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        documents, scale, window, softcap = ctx.rule = rule
        out = q.new_empty(*q.shape[:2], v.shape[2])
        saved: list[Tensor] = []
        save = softcap is None and any(ctx.needs_input_grad[:3])
        for group in documents.groups:
            queries = _pack_queries(q, group, k.shape[1], scale)
            keys, values = _pack_keys(k, group), _pack_keys(v, group)
            results = []
            for a, b, lo in _blocks(group.length, window):
                rows = queries[:, :, a:b]
                probabilities, _ = _probabilities(rows, keys[:, lo:b], a - lo, window, softcap)
                results.append(torch.bmm(probabilities, values[:, lo:b]).view(*rows.shape[:3], -1))
                if save and group.length <= KEEP:
                    saved.append(probabilities)
            _scatter_back(out, results[0] if len(results) == 1 else torch.cat(results, 2), group)
        ctx.save_for_backward(q, k, v, out, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *probabilities_of_blocks = ctx.saved_tensors
        documents, scale, window, softcap = ctx.rule
        d_out, saved = grads[0], iter(probabilities_of_blocks)
        dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        for group in documents.groups:
            queries = _pack_queries(q, group, k.shape[1], scale)
            keys, values = _pack_keys(k, group), _pack_keys(v, group)
            d_result = _pack_queries(d_out, group, k.shape[1])
            delta = (d_result * _pack_queries(out, group, k.shape[1])).sum(-1, keepdim=True)
            d_queries, d_keys, d_values = [], keys, values
            for a, b, lo in _blocks(group.length, window):
                rows, d_cap = queries[:, :, a:b], None
                if softcap is None and group.length <= KEEP:
                    probabilities = next(saved)
                else:
                    probabilities, d_cap = _probabilities(rows, keys[:, lo:b], a - lo, window, softcap)
                d_rows = d_result[:, :, a:b].flatten(1, 2)
                d_scores = torch.bmm(d_rows, values[:, lo:b].transpose(1, 2))
                d_scores.sub_(delta[:, :, a:b].flatten(1, 2)).mul_(probabilities)
                if d_cap is not None:
                    d_scores.mul_(d_cap)
                d_values = _add_block(d_values, values, torch.bmm(probabilities.transpose(1, 2), d_rows), lo)
                d_keys = _add_block(d_keys, keys, torch.bmm(d_scores.transpose(1, 2), rows.flatten(1, 2)), lo)
                d_queries.append(torch.bmm(d_scores, keys[:, lo:b]).mul_(scale).view_as(rows))
            _scatter_back(dq, d_queries[0] if len(d_queries) == 1 else torch.cat(d_queries, 2), group)
            _scatter_back(dk, d_keys.unsqueeze(1), group)
            _scatter_back(dv, d_values.unsqueeze(1), group)
        return dq, dk, dv, None


def _add_block(total: Tensor, packed: Tensor, part: Tensor, lo: int) -> Tensor:
    """The gradient of `packed` keys or values, summed over blocks of queries; `total` is `packed` before the first.

    The part of a single block is the gradient; several are summed in fp32.
    """
    if total is packed:
        if part.shape == packed.shape:
            return part
        total = torch.zeros_like(packed, dtype=torch.promote_types(part.dtype, torch.float32))
    total[:, lo : lo + part.shape[1]] += part
    return total


def _blocks(length: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    """Blocks of queries [a, b) and the first key `lo` that any of them sees; their last key is their own, b - 1."""
    for a in range(0, length, QUERIES):
        yield a, min(a + QUERIES, length), 0 if window is None else max(0, a - window + 1)


def _gather(x: Tensor, group: Group) -> Tensor:
    """The group's tokens of x [n, heads, d], padded: [count, length, heads, d]."""
    if group.places is None or group.tokens is None:
        return x[group.start : group.start + group.length].unsqueeze(0)
    # Padding is zero: in the backward it stands for the gradients of rows without a token.
    rows = x.new_zeros(group.count * group.length, *x.shape[1:])
    return rows.index_copy_(0, group.places, x.index_select(0, group.tokens)).unflatten(0, (group.count, -1))


def _pack_keys(x: Tensor, group: Group) -> Tensor:
    """Keys or values x [n, kv heads, d] of the group, by head: [count * kv heads, length, d]."""
    return _gather(x, group).transpose(1, 2).reshape(-1, group.length, x.shape[2])


def _pack_queries(x: Tensor, group: Group, kv_heads: int, scale: float = 1.0) -> Tensor:
    """x [n, heads, d] of the group times `scale`, by key head: [count * kv heads, heads a kv head, length, d]."""
    rows = _gather(x, group).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
    return torch.mul(rows, scale, out=x.new_empty(rows.shape)).flatten(0, 1)


def _scatter_back(out: Tensor, packed: Tensor, group: Group) -> None:
    """Write packed heads [count * kv heads, heads a kv head, length, d] to their tokens in out [n, heads, d]."""
    rows = packed.unflatten(0, (group.count, -1)).permute(0, 3, 1, 2, 4)
    if group.tokens is None or group.places is None:
        out[group.start : group.start + group.length].view(rows.shape[1:]).copy_(rows[0])
    else:
        flat = rows.reshape(-1, *out.shape[1:]).index_select(0, group.places)
        out.index_copy_(0, group.tokens, flat.to(out.dtype))


def _probabilities(
    queries: Tensor, keys: Tensor, offset: int, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Softmax of the masked scores, and the soft cap's derivative: [batch, heads a key head * rows, offset + rows] each.

    queries: [batch, heads a key head, rows, d], scaled, the first with key number `offset`; keys: [batch, offset + rows, d].
    """
    scores = torch.bmm(queries.flatten(1, 2), keys.transpose(1, 2))
    d_cap = None
    if softcap is not None:
        scores.div_(softcap).tanh_()
        d_cap = 1 - scores * scores
        scores.mul_(softcap)
    rows = queries.shape[2]
    by_head = scores.view(-1, rows, keys.shape[1])
    by_head[:, :, offset:].add_(_future(scores.dtype, scores.device)[:rows, :rows])
    if window is not None:
        ones = torch.ones(rows, keys.shape[1], dtype=torch.bool, device=scores.device)
        by_head.masked_fill_(ones.tril(offset - window), float("-inf"))
    return scores.softmax(-1), d_cap


@cache
def _future(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[QUERIES, QUERIES]: minus infinity where the key lies in the query's future; adding is cheaper than filling."""
    return torch.full((QUERIES, QUERIES), float("-inf"), dtype=dtype, device=device).triu(1)
