"""Block-diagonal causal attention: every document of a packed row sees itself and nothing else.

The edges of the documents travel as one keyword argument, `documents`, through the model's forward;
where a model does not pass it on, they are those of `current_documents`. Three backends:

- varlen: kernels on the flattened block on CUDA, no padding, no mask: our own (`packed_attention`)
  where they were measured, else cuDNN or FlashAttention by `torch.nn.attention.varlen`.
- products: grouped batched matrix products with an explicit softmax: on a CPU several times faster
  than sdpa in bf16 on short documents, and the only backend with a soft cap.
- sdpa: one `scaled_dot_product_attention` a document: cards that varlen refuses, and attention
  dropout.

Attention without documents is refused: a plain causal mask over a packed row would let documents
see each other. Generation therefore runs under another name ("sdpa"), never this one.
"""

import inspect
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from tunesmith.distributed.torch_private import SavingContext
from tunesmith.errors import ModelError, first_line
from tunesmith.model import packed_attention
from tunesmith.model.attention_kernels import choose_kernel
from tunesmith.model.documents import (
    BLOCK_QUERIES,
    MAX_SAVED_TOKENS,
    Documents,
    Group,
    RepeatedTokens,
    current_documents,
)
from tunesmith.model.sinks import varlen_with_sinks

ATTENTION_NAME = "tunesmith"

# Keywords of this torch's varlen_attn: they differ between releases; 2.11 takes grouped heads
# without `enable_gqa`.
VARLEN_KEYWORDS = frozenset(inspect.signature(varlen_attn).parameters)

# Of the norm of output or gradients: bf16 loses half a percent, and a token that sees another
# document changes much more.
VARLEN_TOLERANCE = 0.03

# torch's FlashAttention takes grouped heads, but no mask, and on some cards only heads of at most
# this width. Otherwise torch computes all scores in fp32, [heads, n, m], unless keys and values are
# repeated.
MAX_GROUPED_WIDTH = 192

# Keywords that Transformers passes to every attention function and that do not change the result
# here.
HARMLESS_KEYWORDS = frozenset(
    {
        "position_ids",
        "use_cache",
        "output_attentions",
        "cache_position",
        "position_embeddings",
        "is_causal",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "num_items_in_batch",
        "output_router_logits",
    }
)


class Rule(NamedTuple):
    """Who sees whom and how strongly; see `attend`."""

    documents: Documents
    scale: float
    window: int | None = None
    softcap: float | None = None


def register() -> str:
    """Register the attention with Transformers and return the name to give to
    `set_attn_implementation`.
    """
    from transformers import AttentionInterface

    # Without a mask function: a [1, 1, n, n] mask would have 16 million entries for 4096 tokens,
    # and before it makes one Transformers asks the device whether the row is packed.
    AttentionInterface.register(ATTENTION_NAME, documents_attention)
    # An error, not ignored: an unknown option may change the result.
    return ATTENTION_NAME


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
    s_aux: Tensor | None = None,
    documents: Documents | None = None,
    query_factor: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attention as Transformers calls it.

    ModelError where neither the keyword nor the context names documents, or the model asks for
    something that would have to be ignored.

    Args:
        query: [1, heads, n, d]; key and value: [1, kv heads, n, d]; value may have another d.
        s_aux: attention sinks, [heads]: one more score of each head, without a value.
        query_factor: [n], multiplies the queries (`chunked.TunedAttention`).

    Returns:
        [1, n, heads, d of value], and None for the weights.
    """
    if documents is None:
        documents = current_documents()
    unknown = sorted(k for k, v in others.items() if v is not None and k not in HARMLESS_KEYWORDS)
    request = ""
    if unknown:
        request = f"an unknown attention option: {', '.join(unknown)}"
    elif attention_mask is not None or documents is None or others.get("is_causal") is False:
        request = "attention over unmarked documents"
    if request:
        raise ModelError(
            f"{type(module).__name__} asks for {request}",
            why="packed attention would ignore it and give different results",
            fix="set model.attention: eager",
        )
    assert documents is not None
    # One factor a position, the same for all heads: [n, 1] on [1, heads, n, d].
    if query_factor is not None:
        query = (query * query_factor.unsqueeze(1)).to(query.dtype)
    out = attend(
        # [1, heads, n, d] -> [n, heads, d]: a view, the order of the flattened batch.
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        documents,
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        dropout=dropout,
    )
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
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention within each document.

    Args:
        q: [n, heads, d], with any strides.
        k, v: [n, kv heads, d]; heads are a multiple of kv heads (grouped-query attention), and the
            width of v may differ (multi-head latent attention).
        scale: factor on the products; None takes d ** -0.5.
        window: how many tokens a query sees, itself counted; None sees all before it.
        softcap: c in c * tanh(score / c) (Gemma 2); None leaves scores as they are.
        sinks: [heads], one more score of each head, without a value (GPT-OSS); None: there is none.
        dropout: probability of dropping an attention weight.

    Returns [n, heads, width of v] in q's dtype.
    """
    sees_ahead = documents.both_ways == "all" or (documents.both_ways and window is not None)
    # A window as long as the longest document hides nothing.
    if window is not None and window >= documents.max_seqlen:
        window = None
    if scale is None:
        scale = q.shape[-1] ** -0.5
    rule = Rule(documents, scale, window, softcap)
    if documents.repeated is not None:
        return _attend_whole(q, k, v, rule, documents.repeated, sinks, dropout)
    out = _attend_each(q, k, v, rule, sinks, dropout)
    if sees_ahead:
        if softcap is not None or sinks is not None:
            what = "attention that sees pictures both ways has neither a soft cap nor sinks here"
            raise ModelError(what, fix="model.vision=false")
        out = _let_pictures_see(out, q, k, v, rule, dropout)
    return out


@torch.compiler.disable  # shapes follow the pictures and change with every batch
def _let_pictures_see(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, rule: Rule, dropout: float
) -> Tensor:
    """Replace the rows of pictures' queries by those that see keys up to the picture's end.

    The window, or the document, still bounds what they see before them.
    """
    documents, _, window, _ = rule
    # On the device: a copy of what the host made would be waited for in each layer.
    places = torch.arange(len(q), device=q.device)
    rows = []
    indices = []
    for first, stop in documents.pictures:
        start = documents.edges[bisect_right(documents.edges, first) - 1]
        mask = None
        if window is not None:
            # The first query sees furthest back: `window` tokens, itself included.
            start = max(start, first - window + 1)
            if stop - start > window:
                mask = places[first:stop, None] - places[start:stop] < window
        seen = k[start:stop], v[start:stop]
        rows.append(_attend_fused(q[first:stop], *seen, rule.scale, mask=mask, dropout=dropout))
        indices.append(places[first:stop])
    if not rows:
        return out
    return out.index_copy(0, torch.cat(indices), torch.cat(rows))


def _attend_each(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, sinks: Tensor | None, dropout: float
) -> Tensor:
    """`attend` where n are the tokens of all documents, one document after another."""
    documents, _, window, softcap = rule
    # Only sdpa drops weights, and it knows neither caps nor sinks.
    if dropout:
        if softcap is not None or sinks is not None:
            what = "attention dropout together with a soft cap or sinks is not supported"
            raise ModelError(what, fix="set the model's attention_dropout to 0")
        return _sdpa(q, k, v, rule, dropout)
    backend = documents.backend
    if backend is None:
        backend, _ = select_attention_backend(q.device, q.dtype, q.shape[-1])
    if backend == "products" or softcap is not None:
        return _products(q, k, v, rule, sinks)
    if _takes_packed(q, k, v, rule, sinks):
        return _packed(q, k, v, rule)
    # A run has one backend, and a layer may have heads that its kernel does not take: the full
    # attention of Gemma 4 has heads of 512, its sliding attention of 256.
    if (
        backend == "varlen"
        and (window is None or "window_size" in VARLEN_KEYWORDS)
        and fits_varlen(q.device, q.dtype, q.shape[-1], v.shape[-1], sinks is not None)
    ):
        return _varlen(q, k, v, rule, sinks)
    # sdpa takes no extra score; the products add a column for it.
    if sinks is not None:
        return _products(q, k, v, rule, sinks)
    return _sdpa(q, k, v, rule)


@torch.compiler.disable  # shapes follow the documents and change with every batch
def _attend_whole(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: Rule,
    repeated: RepeatedTokens,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """`attend` where n are the tokens of a block that holds some once for two documents."""
    q, k, v = (_Repeat.apply(x, repeated) for x in (q, k, v))
    out = _attend_each(q, k, v, rule, sinks, dropout)
    return _TakeFirsts.apply(out, repeated)


class _RepeatContext(SavingContext):
    repeated: RepeatedTokens


class _Repeat(torch.autograd.Function):
    """The tokens of a block [n, ...] as those of its documents [m, ...]."""

    @staticmethod
    def forward(ctx: _RepeatContext, x: Tensor, repeated: RepeatedTokens) -> Tensor:
        ctx.repeated = repeated
        return x.index_select(0, repeated.places)

    @staticmethod
    def backward(ctx: _RepeatContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        places, firsts, seconds = ctx.repeated
        total = grads[0].index_select(0, firsts)
        # No place comes twice among these, so that each sum has two terms and one order.
        total.index_add_(0, places.index_select(0, seconds), grads[0].index_select(0, seconds))
        return total, None


class _TakeFirsts(torch.autograd.Function):
    """Take of the tokens of documents [m, ...] the first at each place of the block, [n, ...].

    Another one at that place has the same value (dropout aside): it sees the same
    tokens before it.
    """

    @staticmethod
    def forward(ctx: _RepeatContext, x: Tensor, repeated: RepeatedTokens) -> Tensor:
        ctx.repeated = repeated
        return x.index_select(0, repeated.firsts)

    @staticmethod
    def backward(ctx: _RepeatContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        places, firsts, _ = ctx.repeated
        of_documents = grads[0].new_zeros(len(places), *grads[0].shape[1:])
        return of_documents.index_copy_(0, firsts, grads[0]), None


# How each backend computes. That of varlen is the kernel that was chosen in this process.
ATTENTION_KERNELS = {
    "products": "grouped bmm",
    "sdpa": "one call a document",
    "eager": "Transformers' own",
}


@cache
def select_attention_backend(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    group: int = 1,
    softcap: bool = False,
) -> tuple[str, str]:
    """The fastest backend that works here, by trying, and why.

    `group`: query heads per key head. `softcap`: the model caps its attention scores.
    """
    if softcap:
        return (
            "products",
            "the model caps its attention scores, which torch's attention does not support",
        )
    if device.type != "cuda":
        return (
            "products",
            "on a CPU batched matmuls are faster than torch's attention per document",
        )
    shape = VarlenShape(device, dtype, head_dim, head_dim)
    # Chosen also where ours runs: layers that it does not take have torch's.
    kernel, faults = choose_kernel(lambda: find_varlen_fault(shape))
    # For `fits_varlen`, which the layers ask about the same shape.
    _FITS_VARLEN[shape.on_any_device()] = bool(kernel)
    if kernel in packed_attention.SLOWER and packed_attention.takes(device, dtype, head_dim, group):
        fault = find_varlen_fault(shape, "packed")
        if fault:
            faults.append(f"{packed_attention.NAME}: {fault}")
        else:
            packed_attention.choose_packed(device)
            other = f"{kernel or 'batched products'} for layers that it does not take"
            kernel, faults = packed_attention.NAME, [*faults, other]
    if not kernel:
        return "sdpa", f"this GPU's varlen attention is not right in {dtype}: {'; '.join(faults)}"
    ATTENTION_KERNELS["varlen"] = kernel
    why = f"{kernel} over packed documents is correct on this GPU, forward and backward"
    return "varlen", "; ".join([why, *faults])


class VarlenShape(NamedTuple):
    """The shape that decides whether the varlen kernel takes a layer."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int  # of queries and keys
    v_dim: int
    has_sinks: bool = False

    def on_any_device(self) -> "VarlenShape":
        """The same on the devices of this type; a process computes on one of them."""
        return self._replace(device=torch.device(self.device.type))


_FITS_VARLEN: dict[VarlenShape, bool] = {}  # what was tried in this process


@torch.compiler.assume_constant_result  # which takes no tuples
def fits_varlen(
    device: torch.device, dtype: torch.dtype, head_dim: int, v_dim: int, has_sinks: bool
) -> bool:
    """Try once whether this process's varlen kernel is right on layers of this shape."""
    shape = VarlenShape(device, dtype, head_dim, v_dim, has_sinks)
    key = shape.on_any_device()
    if key not in _FITS_VARLEN:
        _FITS_VARLEN[key] = not find_varlen_fault(shape)
    return _FITS_VARLEN[key]


def find_varlen_fault(shape: VarlenShape, kernels: str = "varlen") -> str:
    """Find what is wrong with attention on a few packed documents, or return "".

    kernels: "varlen" for torch's, "packed" for our own. They are compared with fp32 attention of
    each document alone.
    """
    device, dtype, head_dim, v_dim, has_sinks = shape
    # Three documents of 40, 160 and 256 tokens: edges that are and are not multiples of a tile.
    edges = [0, 40, 200, 456]
    cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=device)
    spans = packed_attention.spans_of(cu_seqlens, edges[-1])
    documents = Documents(cu_seqlens, 256, spans=spans)
    rule = Rule(documents, head_dim**-0.5)
    generator = torch.Generator(device).manual_seed(0)

    def draw(heads: int, width: int) -> Tensor:
        return torch.randn(edges[-1], heads, width, generator=generator, device=device).to(dtype)

    # Four heads on two key heads: grouped queries are tried too.
    inputs = [draw(4, head_dim), draw(2, head_dim), draw(2, v_dim)]
    d_out = draw(4, v_dim)
    if has_sinks:
        # About as large as a score's logsumexp, so that sinks take a part that shows.
        inputs.append(torch.linspace(0, 4, 4, device=device).to(dtype))
    try:
        results = _output_and_gradients(kernels, inputs, d_out, rule)
    except Exception as error:  # FlashAttention 4 is compiled here, by a compiler of its own
        return first_line(error)
    # Math only: the reference is torch's own formula and no kernel like the tried one.
    with sdpa_kernel(SDPBackend.MATH):
        inputs = [x.float() for x in inputs]
        backend = "products" if has_sinks else "sdpa"
        expected = _output_and_gradients(backend, inputs, d_out.float(), rule)
    errors = []
    for result, reference in zip(results, expected, strict=True):
        errors.append(float((result.float() - reference).norm() / reference.norm()))
    largest = float(torch.tensor(errors).max())  # torch's maximum is NaN where one of them is
    if largest < VARLEN_TOLERANCE:
        return ""
    return f"it is off by {largest:.1%} of the values' norm"


def _output_and_gradients(
    backend: str, inputs: Sequence[Tensor], d_out: Tensor, rule: Rule
) -> list[Tensor]:
    """Compute the output and the gradients of q, k, v and, where there is a fourth input, sinks."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in inputs]
        q, k, v, *rest = leaves
        sinks = rest[0] if rest else None
        if backend == "sdpa":
            out = _sdpa(q, k, v, rule)
        elif backend == "packed":
            out = _packed(q, k, v, rule)
        else:
            out = (_varlen if backend == "varlen" else _products)(q, k, v, rule, sinks)
        return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def _takes_packed(q: Tensor, k: Tensor, v: Tensor, rule: Rule, sinks: Tensor | None) -> bool:
    """Return whether our own kernels were chosen and support this layer."""
    if rule.documents.spans is None or rule.window is not None or sinks is not None:
        return False
    group = q.shape[1] // k.shape[1]
    return v.shape == k.shape and packed_attention.takes(q.device, q.dtype, q.shape[-1], group)


def _packed(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    spans = rule.documents.spans
    assert spans is not None
    out, _ = packed_attention.packed_attention(q, k, v, spans, rule.scale)
    assert isinstance(out, Tensor)
    return out


def _varlen(q: Tensor, k: Tensor, v: Tensor, rule: Rule, sinks: Tensor | None) -> Tensor:
    width = v.shape[-1]
    # Multi-head latent attention: values are narrower than queries and keys.
    if width < q.shape[-1]:
        # The kernel takes one width: zeros add nothing to the output, and their part is cut off.
        v = F.pad(v, (0, q.shape[-1] - width))
    if sinks is None:
        out = _plain_varlen(q, k, v, rule)
    else:
        out = varlen_with_sinks(
            q,
            k,
            v,
            sinks,
            rule.documents.cu_seqlens,
            longest=rule.documents.max_seqlen,
            scale=rule.scale,
            window=rule.window,
        )
    # A slice: the gradient of the padding is zero, as autograd pads it again.
    return out[..., :width]


def _plain_varlen(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    documents, scale, window, _ = rule
    options: dict[str, Any] = {
        "is_causal": True,
        # The kernel counts the keys to the left of the query; ours counts the query itself.
        "window_size": (-1 if window is None else window - 1, 0),
        "enable_gqa": q.shape[1] != k.shape[1],
        "scale": scale,
    }
    options = {name: value for name, value in options.items() if name in VARLEN_KEYWORDS}
    # An older varlen_attn divides by sqrt(d) always: the rest of the factor goes into q.
    if "scale" not in VARLEN_KEYWORDS and scale != q.shape[-1] ** -0.5:
        q = q * (scale * q.shape[-1] ** 0.5)
    # The bound is a constant of a compiled graph; the batches of a run all state the same one (see
    # data/batches/loader.py).
    edges = documents.cu_seqlens
    longest = documents.max_seqlen
    out = varlen_attn(q, k, v, edges, edges, longest, longest, **options)
    assert isinstance(out, Tensor)  # the tuple is for return_aux
    return out


@torch.compiler.disable  # shapes follow the documents and change with every batch
def _sdpa(q: Tensor, k: Tensor, v: Tensor, rule: Rule, dropout: float = 0.0) -> Tensor:
    documents, scale, window, _ = rule
    outputs = []
    # One call a document: [1, heads, length, d] each, so that none sees another.
    for start, end in pairwise(documents.edges):
        length = end - start
        mask = None
        # Key j of query i is seen where 0 <= i - j < window.
        if window is not None and length > window:
            ones = torch.ones(length, length, dtype=torch.bool, device=q.device)
            mask = ones.tril().triu(1 - window)
        document = q[start:end], k[start:end], v[start:end]
        # Without a mask torch may take a fused kernel.
        out = _attend_fused(*document, scale, mask=mask, is_causal=mask is None, dropout=dropout)
        outputs.append(out)
    return torch.cat(outputs)


def _attend_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Compute the attention of q [n, heads, d] to k and v [m, kv heads, d] by torch's fused kernel.

    mask: bool [n, m], which keys each query sees.
    """
    repeats = q.shape[1] // k.shape[1]
    takes_groups = mask is None and q.shape[-1] == v.shape[-1] <= MAX_GROUPED_WIDTH
    if repeats > 1 and not takes_groups:
        k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    # [n, heads, d] -> [1, heads, n, d]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=is_causal,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.squeeze(0).transpose(0, 1)


@torch.compiler.disable  # as above
def _products(q: Tensor, k: Tensor, v: Tensor, rule: Rule, sinks: Tensor | None = None) -> Tensor:
    return _Products.apply(q, k, v, rule, sinks)


class _ProductsContext(SavingContext):
    rule: Rule


class _Products(torch.autograd.Function):
    """softmax(scale * q k^T + mask) v by batched products, one batch a group of documents.

    Queries that share a key head are stacked in one matrix, so keys and values are never repeated.
    The backward is FlashAttention's: dS = P * (dO V^T - rowsum(dO * O)). A sink is a last column of
    scores whose value is zero.
    """

    @staticmethod
    def forward(
        ctx: _ProductsContext, q: Tensor, k: Tensor, v: Tensor, rule: Rule, sinks: Tensor | None
    ) -> Tensor:
        ctx.rule = rule
        # [n, heads, width of v]
        out = q.new_empty(*q.shape[:2], v.shape[2])
        saved: list[Tensor] = []
        needs_backward = any(ctx.needs_input_grad[:3])
        for group in rule.documents.groups:
            queries = _pack_queries(q, group, k.shape[1], rule.scale)
            keys = _pack_keys(k, group)
            values = _pack_keys(v, group)
            # A group either saves the probabilities of all its blocks or of none: the backward
            # reads them back in this order.
            saves = needs_backward and _saves_probabilities(group, rule.softcap)
            results = []
            for block in _blocks(group.length, rule.window):
                # [count * kv heads, heads a kv head, rows, d]
                rows = queries[:, :, block.queries]
                probabilities, _ = _probabilities(rows, keys[:, block.keys], sinks, block, rule)
                # [batch, heads a kv head * rows, keys] without the column of the sinks.
                of_keys, _ = _split_sinks(probabilities, sinks)
                result = torch.bmm(of_keys, values[:, block.keys])
                results.append(result.view(*rows.shape[:3], -1))
                if saves:
                    saved.append(probabilities)
            _scatter_back(out, _join(results), group)
        ctx.save_for_backward(q, k, v, sinks, out, *saved)  # type: ignore[arg-type]
        return out

    @staticmethod
    def backward(ctx: _ProductsContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, *saved = ctx.saved_tensors
        saved_probabilities = iter(saved)
        # `empty`: every token lies in one document of one group, so each row is written once.
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk = torch.empty_like(k, memory_format=torch.contiguous_format)
        dv = torch.empty_like(v, memory_format=torch.contiguous_format)
        d_sinks = None
        if sinks is not None:
            # A sum over all documents: in 16 bits the later ones would be lost.
            d_sinks = torch.zeros_like(sinks, dtype=torch.promote_types(q.dtype, torch.float32))
        for group in ctx.rule.documents.groups:
            d_queries, d_keys, d_values = _group_gradients(
                q, k, v, sinks, d_sinks, out, grads[0], group, ctx.rule, saved_probabilities
            )
            _scatter_back(dq, d_queries, group)
            # Key heads as packed queries with one query head each.
            _scatter_back(dk, d_keys.unsqueeze(1), group)
            _scatter_back(dv, d_values.unsqueeze(1), group)
        if d_sinks is not None:
            d_sinks = d_sinks.to(sinks.dtype)
        return dq, dk, dv, None, d_sinks


def _group_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    d_sinks: Tensor | None,
    out: Tensor,
    d_out: Tensor,
    group: Group,
    rule: Rule,
    saved_probabilities: Iterator[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a group's packed queries, keys and values; arguments are of the whole row.

    That of the sinks is added to `d_sinks`.
    """
    # Queries scaled as in the forward; `rule.scale` below is for their own gradient.
    queries = _pack_queries(q, group, k.shape[1], rule.scale)
    keys = _pack_keys(k, group)
    values = _pack_keys(v, group)
    d_result = _pack_queries(d_out, group, k.shape[1])
    # rowsum(dO * O), [batch, heads a kv head, length, 1]: FlashAttention's delta.
    delta = (d_result * _pack_queries(out, group, k.shape[1])).sum(-1, keepdim=True)
    d_queries = []
    d_keys = None
    d_values = None
    for block in _blocks(group.length, rule.window):
        rows = queries[:, :, block.queries]
        d_cap = None
        # As the forward decided: by the group and the cap alone, which both see.
        if _saves_probabilities(group, rule.softcap):
            probabilities = next(saved_probabilities)
        else:
            probabilities, d_cap = _probabilities(rows, keys[:, block.keys], sinks, block, rule)
        of_keys, of_sinks = _split_sinks(probabilities, sinks)
        # [batch, heads a kv head * rows, d of v]
        d_rows = d_result[:, :, block.queries].flatten(1, 2)
        # dP = dO V^T, [batch, heads a kv head * rows, keys]
        d_scores = torch.bmm(d_rows, values[:, block.keys].transpose(1, 2))
        delta_rows = delta[:, :, block.queries]
        # dS = P * (dP - delta), in dP's memory.
        d_scores.sub_(delta_rows.flatten(1, 2)).mul_(of_keys)
        if d_cap is not None:
            d_scores.mul_(d_cap)
        if d_sinks is not None and of_sinks is not None:
            # A sink's value is zero, so its dP is 0 and dS = -P_sink * delta.
            # [documents, heads, rows]: batch is documents times kv heads, documents outermost.
            delta_rows = of_sinks.view_as(delta_rows) * delta_rows
            d_sinks -= delta_rows.view(group.count, len(d_sinks), -1).sum(
                (0, 2), dtype=d_sinks.dtype
            )
        # dV = P^T dO: the query heads of a key head are rows of one matrix, so the product adds
        # them.
        part = torch.bmm(of_keys.transpose(1, 2), d_rows)
        d_values = _add_block(d_values, part, values, block)
        # dK = dS^T (scale * Q): the rows are scaled already.
        part = torch.bmm(d_scores.transpose(1, 2), rows.flatten(1, 2))
        d_keys = _add_block(d_keys, part, keys, block)
        # dQ = scale * dS K
        part = torch.bmm(d_scores, keys[:, block.keys]).mul_(rule.scale)
        d_queries.append(part.view_as(rows))
    assert d_keys is not None
    assert d_values is not None
    return _join(d_queries), d_keys, d_values


def _saves_probabilities(group: Group, softcap: float | None) -> bool:
    """Tell whether the backward of a group reads its probabilities, not computes them again."""
    return softcap is None and group.length <= MAX_SAVED_TOKENS


def _join(blocks: list[Tensor]) -> Tensor:
    """Blocks of queries [..., rows, d] as one tensor; a single one is not copied."""
    if len(blocks) == 1:
        return blocks[0]
    return torch.cat(blocks, 2)


class Block(NamedTuple):
    """Some queries of a document, and the keys that any of them sees; the last key is the last
    query's.
    """

    queries: slice
    keys: slice


def _blocks(length: int, window: int | None) -> Iterator[Block]:
    for start in range(0, length, BLOCK_QUERIES):
        end = min(start + BLOCK_QUERIES, length)
        first_key = 0
        if window is not None:
            # The first query of the block sees the furthest back: `window` tokens with itself.
            first_key = max(0, start - window + 1)
        yield Block(slice(start, end), slice(first_key, end))


def _add_block(total: Tensor | None, part: Tensor, packed: Tensor, block: Block) -> Tensor:
    """Add a block's part to the gradient of `packed` keys or values; `total` is None before the
    first.

    The part of a single block is the gradient; several are summed in fp32.
    """
    if total is None:
        # One block that sees all keys: nothing to add up.
        if part.shape == packed.shape:
            return part
        total = torch.zeros_like(packed, dtype=torch.promote_types(part.dtype, torch.float32))
    total[:, block.keys] += part
    return total


def _pack_keys(x: Tensor, group: Group) -> Tensor:
    """Keys or values x [n, kv heads, d] of the group, by head: [count * kv heads, length, d]."""
    return group.rows_of(x).transpose(1, 2).reshape(-1, group.length, x.shape[2])


def _pack_queries(x: Tensor, group: Group, kv_heads: int, scale: float = 1.0) -> Tensor:
    """x [n, heads, d] of the group times `scale`, by key head.

    Returns:
        [count * kv heads, heads a kv head, length, d].
    """
    # [count, length, kv heads, heads a kv head, d] -> [count, kv heads, heads a kv head, length, d]
    rows = group.rows_of(x).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
    # Written contiguous for `bmm`, and scaled in the same pass.
    return torch.mul(rows, scale, out=x.new_empty(rows.shape)).flatten(0, 1)


def _scatter_back(out: Tensor, packed: Tensor, group: Group) -> None:
    """Write packed heads to their tokens in out [n, heads, d].

    packed: [count * kv heads, heads a kv head, length, d].
    """
    # [count, kv heads, heads a kv head, length, d] -> [count, length, kv heads, heads a kv head, d]
    rows = packed.unflatten(0, (group.count, -1)).permute(0, 3, 1, 2, 4)
    if group.tokens is None or group.places is None:
        out[group.start : group.start + group.length].view(rows.shape[1:]).copy_(rows[0])
    else:
        # Padding is left out: the padded places that hold tokens, in the order of `group.tokens`.
        flat = rows.reshape(-1, *out.shape[1:]).index_select(0, group.places)
        out.index_copy_(0, group.tokens, flat.to(out.dtype))


def _split_sinks(probabilities: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The probabilities of the keys, and those of the sinks [batch, rows] if there are any."""
    if sinks is None:
        return probabilities, None
    return probabilities[..., :-1], probabilities[..., -1]


def _probabilities(
    queries: Tensor, keys: Tensor, sinks: Tensor | None, block: Block, rule: Rule
) -> tuple[Tensor, Tensor | None]:
    """Softmax of a block's masked scores, and the soft cap's derivative.

    Args:
        queries: [batch, heads a key head, rows, d], scaled.
        keys: [batch, keys, d].
        sinks: [heads]; None: there are none.

    Returns:
        [batch, heads a key head * rows, keys] each, or None without a cap. With sinks the first has
        one more column, theirs.
    """
    _, _, window, softcap = rule
    offset = block.queries.start - block.keys.start  # which key is the first query's own
    # [batch, heads a key head * rows, keys]: heads are rows, so a key head is read once.
    scores = torch.bmm(queries.flatten(1, 2), keys.transpose(1, 2))
    d_cap = None
    if softcap is not None:
        scores.div_(softcap).tanh_()
        # d tanh(z) / dz; the cap's two factors cancel.
        d_cap = 1 - scores * scores
        scores.mul_(softcap)
    rows = queries.shape[2]
    # [batch * heads a key head, rows, keys]: a view in which a mask is the same for each item.
    by_head = scores.view(-1, rows, keys.shape[1])
    # Keys before `offset` are the past of every query of the block.
    by_head[:, :, offset:].add_(_future(scores.dtype, scores.device)[:rows, :rows])
    if window is not None:
        ones = torch.ones(rows, keys.shape[1], dtype=torch.bool, device=scores.device)
        # Row i is the query of key offset + i: keys up to offset + i - window are out of its
        # window.
        by_head.masked_fill_(ones.tril(offset - window), float("-inf"))
    if sinks is not None:
        documents = scores.shape[0] * queries.shape[1] // sinks.shape[0]
        # [documents * kv heads, heads a kv head, rows], in the order of the rows of `scores`.
        by_batch = sinks.to(scores.dtype).view(-1, queries.shape[1], 1).repeat(documents, 1, rows)
        scores = torch.cat([scores, by_batch.view(*scores.shape[:2], 1)], -1)
    return scores.softmax(-1), d_cap


@cache
def _future(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[BLOCK_QUERIES, BLOCK_QUERIES]: minus infinity where the key lies in the query's future.

    To add it is cheaper than to fill.
    """
    infinite = torch.full((BLOCK_QUERIES, BLOCK_QUERIES), float("-inf"), dtype=dtype, device=device)
    return infinite.triu(1)
