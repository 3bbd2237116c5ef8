"""Block-diagonal causal attention: each token attends only to tokens of its own document.

A packed row contains several documents. Their boundaries are passed through the model's forward as
the keyword argument `documents`. If a model does not pass the argument on to its attention,
`current_documents` is used. There are three backends:

- varlen: CUDA kernels on the flattened block, without padding or a mask. Our own kernel
  (`packed_attention`) runs on GPUs where it was measured; otherwise cuDNN or FlashAttention runs
  through `torch.nn.attention.varlen`.
- batched_matmul: batched matmuls over groups of documents with an explicit softmax. On a CPU this
  is several times faster than sdpa for short documents in bf16. It is the only backend with a soft
  cap.
- sdpa: one `scaled_dot_product_attention` call per document, for GPUs that varlen does not support
  and for attention dropout.

Attention without `documents` raises an error, because a plain causal mask over a packed row would
let documents attend to each other. Generation therefore uses Transformers' "sdpa" attention.
"""

import inspect
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
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
from tunesmith.model.layers import packed_attention
from tunesmith.model.layers.attention_kernels import choose_kernel
from tunesmith.model.layers.documents import (
    BLOCK_QUERIES,
    MAX_SAVED_TOKENS,
    AttentionGroup,
    Documents,
    Group,
    RepeatedTokens,
    current_documents,
)
from tunesmith.model.layers.sinks import SinkAttention

ATTENTION_NAME = "tunesmith"

# Keyword arguments of the installed varlen_attn. They differ between torch releases. For example,
# torch 2.11 supports grouped-query attention, but has no argument `enable_gqa`.
VARLEN_KEYWORDS = frozenset(inspect.signature(varlen_attn).parameters)

# Maximum error of a kernel, as a fraction of the norm of the output or gradient. bf16 rounding
# causes an error of about 0.005. Attention to tokens of another document causes an error far above
# this limit.
VARLEN_TOLERANCE = 0.03

# Maximum head width for which grouped-query attention does not repeat the keys and values. torch's
# FlashAttention supports grouped heads only without a mask, and on some GPUs only up to this width.
# In all other cases the keys and values are repeated, because torch would otherwise compute the
# matrix of all scores in fp32, [heads, n, m].
MAX_GROUPED_WIDTH = 192

# Keyword arguments that Transformers passes to every attention function. They do not change the
# result of this implementation.
HARMLESS_KEYWORDS = frozenset(
    """
    position_ids use_cache output_attentions cache_position position_embeddings is_causal
    cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k num_items_in_batch output_router_logits
    """.split()
)


class Rule(NamedTuple):
    """Rule by which an attention call computes the weights. `attend` describes the fields."""

    documents: Documents
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0


def register() -> str:
    """Register `documents_attention` as an attention implementation of Transformers.

    Returns:
        The name to pass to `set_attn_implementation`.
    """
    from transformers import AttentionInterface

    # Do not register a mask function, so that Transformers builds no mask. A [1, 1, n, n] mask has
    # 16 million elements for 4096 tokens. Before building it, Transformers would also synchronize
    # with the device, to check for packed rows.
    AttentionInterface.register(ATTENTION_NAME, documents_attention)
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
    """Compute the attention of a layer. Transformers calls this function.

    Args:
        query: [1, heads, n, d]. `key` and `value` are [1, kv heads, n, d], and the width d of
            `value` may differ.
        s_aux: attention sinks, [heads]. A sink is an additional score of its head that has no value
            vector.
        query_factor: [n], the factor by which each query is multiplied (`chunked.TunedAttention`).

    Returns:
        The output [1, n, heads, width of value], and None in place of the attention weights.

    Raises:
        ModelError: if the documents are unknown, or if an argument is not supported and ignoring it
            could change the result.
    """
    if documents is None:
        documents = current_documents()
    unknown = [
        name
        for name, option in others.items()
        if option is not None and name not in HARMLESS_KEYWORDS
    ]
    request = ""
    if unknown:
        request = f"an unknown attention option: {', '.join(sorted(unknown))}"
    elif attention_mask is not None or documents is None or others.get("is_causal") is False:
        request = "attention over a row with unknown document boundaries"
    if request:
        raise ModelError(
            f"{type(module).__name__} requests {request}",
            why="packed attention would ignore it and give different results",
            fix="set model.attention: eager",
        )
    assert documents is not None
    # One factor per position for all heads: [n, 1] is broadcast to [1, heads, n, d].
    if query_factor is not None:
        query = (query * query_factor.unsqueeze(1)).to(query.dtype)
    out = attend(
        # [1, heads, n, d] -> [n, heads, d]. This is a view. The tokens keep the order of the packed
        # row.
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
    """Compute causal attention within each document.

    Args:
        q: [n, heads, d], with any strides.
        k, v: [n, kv heads, d]. The number of heads is a multiple of kv heads (grouped-query
            attention). The width of v may differ (multi-head latent attention).
        scale: factor of the scores. The default None means d ** -0.5.
        window: number of tokens that a query attends to, including itself. None means all earlier
            tokens of its document.
        softcap: c in c * tanh(score / c) (Gemma 2). None means no cap.
        sinks: [heads], an additional score of each head without a value vector (GPT-OSS), or None.
        dropout: probability of dropping an attention weight.

    Returns:
        [n, heads, width of v] in the dtype of q.
    """
    sees_ahead = documents.bidirectional_pictures == "all" or (
        documents.bidirectional_pictures and window is not None
    )
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if documents.slots is not None:
        if documents.slots.holds_prompts:
            return documents.slots.attend(
                q, k, v, scale=scale, window=window, softcap=softcap, sinks=sinks
            )
        documents.slots.add_prompts(k, v, documents.edges)
    # A window that is as long as the longest document masks nothing.
    if window is not None and window >= documents.max_seqlen:
        window = None
    rule = Rule(documents, scale, window, softcap, sinks, dropout)
    if documents.repeated is not None:
        return _attend_repeated(q, k, v, rule, documents.repeated)
    out = _attend_documents(q, k, v, rule)
    if sees_ahead:
        if softcap is not None or sinks is not None:
            raise ModelError(
                "bidirectional attention to pictures does not support a soft cap or sinks",
                fix="set model.vision=false",
            )
        out = _recompute_pictures(out, q, k, v, rule)
    return out


@torch.compiler.disable  # shapes depend on the pictures of the batch
def _recompute_pictures(out: Tensor, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """Recompute the output of picture tokens, which also attend to later tokens of the picture.

    The window or the start of the document still limits attention to earlier tokens.
    """
    documents = rule.documents
    # Create the indices on the device. Copying them from the host would synchronize in each layer.
    places = torch.arange(len(q), device=q.device)
    rows = []
    indices = []
    for first, stop in documents.pictures:
        document = bisect_right(documents.edges, first) - 1
        start = documents.edges[document]
        mask = None
        if rule.window is not None:
            # Keep the keys in the window of the picture's first query, which starts earliest. The
            # window has `window` tokens, including the query itself.
            start = max(start, first - rule.window + 1)
            if stop - start > rule.window:
                mask = places[first:stop, None] - places[start:stop] < rule.window
        rows.append(_attend_fused(q[first:stop], k[start:stop], v[start:stop], rule, mask=mask))
        indices.append(places[first:stop])
    if not rows:
        return out
    return out.index_copy(0, torch.cat(indices), torch.cat(rows))


def _attend_documents(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """Compute `attend` for a packed row in which no two documents share a token."""
    return _choose_attention(q, k, v, rule)(q, k, v, rule)


def _choose_attention(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule
) -> Callable[[Tensor, Tensor, Tensor, Rule], Tensor]:
    """Return the function that computes this layer's attention."""
    documents, _, window, softcap, sinks, dropout = rule
    # Only sdpa implements dropout, and sdpa supports neither a soft cap nor sinks.
    if dropout:
        if softcap is not None or sinks is not None:
            raise ModelError(
                "attention dropout together with a soft cap or sinks is not supported",
                fix="set the model's attention_dropout to 0",
            )
        return _sdpa
    backend = documents.backend
    if backend is None:
        backend, _ = select_attention_backend(q.device, q.dtype, q.shape[-1])
    if backend == "batched_matmul" or softcap is not None:
        return _products
    if _takes_packed(q, k, v, rule):
        return _packed
    # The backend is selected once per run, but its kernel may not support all layers. For example,
    # Gemma 4 has heads of width 512 in full attention and of width 256 in sliding attention.
    if (
        backend == "varlen"
        and (window is None or "window_size" in VARLEN_KEYWORDS)
        and fits_varlen(q.device, q.dtype, q.shape[-1], v.shape[-1], sinks is not None)
    ):
        return _varlen
    # sdpa has no argument for sinks. `_products` adds a column of scores for them.
    return _sdpa if sinks is None else _products


@torch.compiler.disable  # shapes depend on the documents of the batch
def _attend_repeated(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, repeated: RepeatedTokens
) -> Tensor:
    """Compute `attend` for a block that stores a token only once if two documents share it."""
    attention = _choose_attention(q, k, v, rule)
    k, v = (_Repeat.apply(x, repeated) for x in (k, v))
    if attention is _products:
        return _products(q, k, v, rule)
    # The other functions compute the queries of a shared token for each of its documents.
    q = _Repeat.apply(q, repeated)
    return _TakeFirsts.apply(attention(q, k, v, rule), repeated)


class _RepeatContext(SavingContext):
    repeated: RepeatedTokens


class _Repeat(torch.autograd.Function):
    """Conversion from the tokens of a block [n, ...] to the tokens of its documents [m, ...].

    A token that two documents share is repeated, therefore m >= n.
    """

    @staticmethod
    def forward(ctx: _RepeatContext, x: Tensor, repeated: RepeatedTokens) -> Tensor:
        ctx.repeated = repeated
        return x.index_select(0, repeated.places)

    @staticmethod
    def backward(ctx: _RepeatContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        places, firsts, seconds = ctx.repeated
        total = grads[0].index_select(0, firsts)
        # In each call no position occurs twice in the index, so the order of the sum is fixed.
        for part in seconds:
            total.index_add_(0, places.index_select(0, part), grads[0].index_select(0, part))
        return total, None


class _TakeFirsts(torch.autograd.Function):
    """Conversion from the tokens of documents [m, ...] to the tokens of the block [n, ...].

    If two documents share a token, take the first copy. Both copies have the same value (except for
    dropout), because they attend to the same earlier tokens.
    """

    @staticmethod
    def forward(ctx: _RepeatContext, x: Tensor, repeated: RepeatedTokens) -> Tensor:
        ctx.repeated = repeated
        return x.index_select(0, repeated.firsts)

    @staticmethod
    def backward(ctx: _RepeatContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        places, firsts, _ = ctx.repeated
        d_documents = grads[0].new_zeros(len(places), *grads[0].shape[1:])
        return d_documents.index_copy_(0, firsts, grads[0]), None


# Description of each backend's kernel, for the log. `select_attention_backend` adds "varlen", whose
# kernel is selected at run time.
ATTENTION_KERNELS = {
    "batched_matmul": "torch.bmm",
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
    """Select the fastest attention backend that gives correct results on this device.

    The choice is made by running the kernels.

    Args:
        group: number of query heads per key head.
        softcap: whether the model caps its attention scores.

    Returns:
        The name of the backend, and the reason for the choice.
    """
    if softcap:
        return (
            "batched_matmul",
            "the model caps its attention scores, which torch's attention does not support",
        )
    if device.type != "cuda":
        return (
            "batched_matmul",
            "on a CPU batched matmuls are faster than torch's attention per document",
        )
    shape = VarlenShape(device, dtype, head_dim, head_dim)
    # Select torch's kernel even if our own kernel will run, because torch's kernel computes the
    # layers that our kernel does not support.
    kernel, faults = choose_kernel(lambda: find_varlen_fault(shape))
    # Store the result for `fits_varlen`, which the layers call with the same shape.
    _FITS_VARLEN[shape.on_any_device()] = bool(kernel)
    if kernel in packed_attention.SLOWER and packed_attention.takes(device, dtype, head_dim, group):
        fault = find_varlen_fault(shape, "packed")
        if fault:
            faults.append(f"{packed_attention.NAME}: {fault}")
        else:
            packed_attention.choose_packed(device)
            faults.append(f"{kernel or 'batched products'} for layers that it does not support")
            kernel = packed_attention.NAME
    if not kernel:
        faults_text = "; ".join(faults)
        return "sdpa", f"varlen attention gives wrong results on this GPU in {dtype}: {faults_text}"
    ATTENTION_KERNELS["varlen"] = kernel
    why = f"{kernel} over packed documents is correct on this GPU, forward and backward"
    return "varlen", "; ".join([why, *faults])


class VarlenShape(NamedTuple):
    """Properties of an attention layer that decide whether the varlen kernel supports it."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int  # width of a head of queries and keys
    v_dim: int
    has_sinks: bool = False

    def on_any_device(self) -> "VarlenShape":
        """Return the shape without the index of the device, because a process uses one device."""
        return self._replace(device=torch.device(self.device.type))


_FITS_VARLEN: dict[VarlenShape, bool] = {}  # results of the trials in this process


@torch.compiler.assume_constant_result  # supports no tuples, such as VarlenShape
def fits_varlen(
    device: torch.device, dtype: torch.dtype, head_dim: int, v_dim: int, has_sinks: bool
) -> bool:
    """Return whether this process's varlen kernel is correct for layers of this shape.

    The kernel runs once per shape. Later calls return the stored result.
    """
    shape = VarlenShape(device, dtype, head_dim, v_dim, has_sinks)
    key = shape.on_any_device()
    if key not in _FITS_VARLEN:
        _FITS_VARLEN[key] = not find_varlen_fault(shape)
    return _FITS_VARLEN[key]


def find_varlen_fault(shape: VarlenShape, kernel: str = "varlen") -> str:
    """Return the error of an attention kernel on a few packed documents, or "" if it is correct.

    The result is compared with fp32 attention that is computed for each document separately.

    Args:
        kernel: "varlen" for torch's kernel, or "packed" for our own.
    """
    device, dtype, head_dim, v_dim, has_sinks = shape
    # Three documents of 40, 160 and 256 tokens. Some of their edges are multiples of a kernel's
    # tile size, others are not.
    edges = [0, 40, 200, 456]
    cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=device)
    spans = packed_attention.spans_of(cu_seqlens, edges[-1])
    documents = Documents(cu_seqlens, 256, spans=spans)
    rule = Rule(documents, head_dim**-0.5)
    generator = torch.Generator(device).manual_seed(0)

    def draw(heads: int, width: int) -> Tensor:
        return torch.randn(edges[-1], heads, width, generator=generator, device=device).to(dtype)

    # Four query heads and two key heads, so that grouped-query attention is tested as well.
    inputs = [draw(4, head_dim), draw(2, head_dim), draw(2, v_dim)]
    d_out = draw(4, v_dim)
    if has_sinks:
        # Use sinks that are about as large as the logsumexp of the scores, so that they change the
        # result measurably.
        inputs.append(torch.linspace(0, 4, 4, device=device).to(dtype))
    try:
        attend_by = _packed if kernel == "packed" else _varlen
        results = _output_and_gradients(attend_by, inputs, d_out, rule)
    except Exception as error:  # FlashAttention 4's compiler can raise any exception
        return first_line(error)
    # Use the MATH backend for the reference: it is torch's formula without a fused kernel.
    with sdpa_kernel(SDPBackend.MATH):
        inputs = [x.float() for x in inputs]
        attend_by = _products if has_sinks else _sdpa
        expected = _output_and_gradients(attend_by, inputs, d_out.float(), rule)
    errors = [
        float((result.float() - reference).norm() / reference.norm())
        for result, reference in zip(results, expected, strict=True)
    ]
    largest = float(torch.tensor(errors).max())  # is NaN if any error is NaN
    if largest < VARLEN_TOLERANCE:
        return ""
    return f"its error is {largest:.1%} of the norm of the correct result"


def _output_and_gradients(
    attention: Callable[[Tensor, Tensor, Tensor, Rule], Tensor],
    inputs: Sequence[Tensor],
    d_out: Tensor,
    rule: Rule,
) -> list[Tensor]:
    """Compute the output and the gradients of all inputs: q, k, v and optionally the sinks."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in inputs]
        q, k, v, *sinks = leaves
        out = attention(q, k, v, rule._replace(sinks=sinks[0] if sinks else None))
        gradients = torch.autograd.grad(out, leaves, d_out)
        return [out.detach(), *gradients]


def _takes_packed(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> bool:
    """Return whether our own kernels were selected and support this layer."""
    if rule.documents.spans is None or rule.window is not None or rule.sinks is not None:
        return False
    group = q.shape[1] // k.shape[1]
    return v.shape == k.shape and packed_attention.takes(q.device, q.dtype, q.shape[-1], group)


def _packed(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    spans = rule.documents.spans
    assert spans is not None
    out, _ = packed_attention.packed_attention(q, k, v, spans, rule.scale)
    assert isinstance(out, Tensor)
    return out


def _varlen(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    documents, scale, window, _, sinks, _ = rule
    edges = documents.cu_seqlens
    # max_seqlen is a constant of the compiled graph. All batches of a run have the same value (see
    # batches/loader.py), so that the graph is compiled only once.
    longest = documents.max_seqlen
    head_dim = q.shape[-1]
    width = v.shape[-1]
    # In multi-head latent attention, values are narrower than queries and keys.
    if width < head_dim:
        # The kernel requires equal widths. Pad v with zeros; the padded columns of the output are
        # removed below.
        v = F.pad(v, (0, head_dim - width))
    if sinks is not None:
        out = SinkAttention.apply(q, k, v, sinks, edges, longest, scale, window)
    else:
        # varlen_attn's window does not count the query itself, but `window` does.
        left = window - 1 if window is not None else -1
        options: dict[str, Any] = {
            "is_causal": True,
            "window_size": (left, 0),
            "enable_gqa": q.shape[1] != k.shape[1],
            "scale": scale,
        }
        options = {name: value for name, value in options.items() if name in VARLEN_KEYWORDS}
        # Older versions of varlen_attn always multiply the scores by d ** -0.5. Multiply q by scale
        # / d ** -0.5, so that the total factor is `scale`.
        if "scale" not in VARLEN_KEYWORDS and scale != head_dim**-0.5:
            q = q * (scale * head_dim**0.5)
        out = varlen_attn(q, k, v, edges, edges, longest, longest, **options)
        assert isinstance(out, Tensor)  # varlen_attn returns a tuple only with return_aux
    # Remove the padded columns. Their gradients are zero.
    return out[..., :width]


@torch.compiler.disable  # shapes depend on the documents of the batch
def _sdpa(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    window = rule.window
    outputs = []
    # One call per document with inputs [1, heads, length, d], so that documents are independent.
    for start, end in pairwise(rule.documents.edges):
        length = end - start
        mask = None
        # Query i attends to key j if 0 <= i - j < window.
        if window is not None and length > window:
            ones = torch.ones(length, length, dtype=torch.bool, device=q.device)
            mask = ones.tril().triu(1 - window)
        document = q[start:end], k[start:end], v[start:end]
        # Pass no mask if the document fits into the window, because torch's fused kernels do not
        # support masks.
        outputs.append(_attend_fused(*document, rule, mask=mask, is_causal=mask is None))
    return torch.cat(outputs)


def _attend_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: Rule,
    *,
    mask: Tensor | None,
    is_causal: bool = False,
) -> Tensor:
    """Compute the attention of q [n, heads, d] to k and v [m, kv heads, d] with torch's SDPA.

    Args:
        mask: bool [n, m], True if the query attends to the key. None means no mask.
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
        dropout_p=rule.dropout,
        scale=rule.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.squeeze(0).transpose(0, 1)


@torch.compiler.disable  # shapes depend on the documents of the batch
def _products(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    # Autograd tracks only tensors that are arguments.
    return _Products.apply(q, k, v, rule._replace(sinks=None), rule.sinks)


class _ProductsContext(SavingContext):
    rule: Rule


class _Products(torch.autograd.Function):
    """Attention, softmax(scale * q k^T + mask) v, with one batched matmul per group of documents.

    q has the tokens of the block. k and v have the tokens of all documents, which are more if
    documents share tokens.

    Query heads that share a key head are stacked in one matrix, so keys and values are not
    repeated. The backward uses FlashAttention's formula: dS = P * (dO V^T - rowsum(dO * O)). A sink
    is an additional column of scores. Its value vector is zero.
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
            queries = _pack_queries(q, group.queries, k.shape[1], rule.scale)
            keys = _pack_keys(k, group.keys)
            values = _pack_keys(v, group.keys)
            # Save the probabilities of either all blocks of a group or none. The backward reads the
            # saved probabilities in the order of this loop.
            saves = needs_backward and _saves_probabilities(group, rule.softcap)
            results = []
            for block in _blocks(group, rule.window):
                # [count * kv heads, heads per kv head, rows, d]
                rows = queries[:, :, block.queries]
                probabilities, _ = _probabilities(rows, keys[:, block.keys], sinks, block, rule)
                # [batch, heads per kv head * rows, keys], without the column of the sinks.
                key_probabilities, _ = _split_sinks(probabilities, sinks)
                result = torch.bmm(key_probabilities, values[:, block.keys])
                results.append(result.view(*rows.shape[:3], -1))
                if saves:
                    saved.append(probabilities)
            _scatter_back(out, _join(results), group.queries)
        ctx.save_for_backward(q, k, v, sinks, out, *saved)  # type: ignore[arg-type]
        return out

    @staticmethod
    def backward(ctx: _ProductsContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, *saved = ctx.saved_tensors
        saved_probabilities = iter(saved)
        # `empty_like` suffices for q: each query is in exactly one group. A document whose tokens
        # are all shared is in no group. The gradient of its keys and values is zero.
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk = torch.zeros_like(k, memory_format=torch.contiguous_format)
        dv = torch.zeros_like(v, memory_format=torch.contiguous_format)
        d_sinks = None
        if sinks is not None:
            # Sum over all documents in fp32: a 16-bit sum would round small terms to zero.
            d_sinks = torch.zeros_like(sinks, dtype=torch.promote_types(q.dtype, torch.float32))
        for group in ctx.rule.documents.groups:
            d_queries, d_keys, d_values = _group_gradients(
                q, k, v, sinks, d_sinks, out, grads[0], group, ctx.rule, saved_probabilities
            )
            _scatter_back(dq, d_queries, group.queries)
            # Add a dimension for the query heads per key head, because `_scatter_back` expects the
            # layout of `_pack_queries`.
            _scatter_back(dk, d_keys.unsqueeze(1), group.keys)
            _scatter_back(dv, d_values.unsqueeze(1), group.keys)
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
    group: AttentionGroup,
    rule: Rule,
    saved_probabilities: Iterator[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of a group's packed queries, keys and values.

    The tensor arguments contain all tokens of the packed row. The gradient of the sinks is added to
    `d_sinks` in place.
    """
    # Multiply the queries by `rule.scale`, as in the forward. Because the scores are (scale * q)
    # k^T, the gradient of q is also multiplied by `rule.scale` below.
    queries = _pack_queries(q, group.queries, k.shape[1], rule.scale)
    keys = _pack_keys(k, group.keys)
    values = _pack_keys(v, group.keys)
    d_result = _pack_queries(d_out, group.queries, k.shape[1])
    # rowsum(dO * O), [batch, heads per kv head, length, 1]: "delta" in FlashAttention.
    delta = (d_result * _pack_queries(out, group.queries, k.shape[1])).sum(-1, keepdim=True)
    d_queries = []
    d_keys = None
    d_values = None
    for block in _blocks(group, rule.window):
        rows = queries[:, :, block.queries]
        d_cap = None
        # The forward called this function with the same arguments to decide whether to save the
        # probabilities.
        if _saves_probabilities(group, rule.softcap):
            probabilities = next(saved_probabilities)
        else:
            probabilities, d_cap = _probabilities(rows, keys[:, block.keys], sinks, block, rule)
        key_probabilities, sink_probabilities = _split_sinks(probabilities, sinks)
        # [batch, heads per kv head * rows, width of v]
        d_rows = d_result[:, :, block.queries].flatten(1, 2)
        # dP = dO V^T, [batch, heads per kv head * rows, keys]
        d_scores = torch.bmm(d_rows, values[:, block.keys].transpose(1, 2))
        delta_rows = delta[:, :, block.queries]
        # dS = P * (dP - delta). The result overwrites dP in `d_scores`.
        d_scores.sub_(delta_rows.flatten(1, 2)).mul_(key_probabilities)
        if d_cap is not None:
            d_scores.mul_(d_cap)
        if d_sinks is not None and sink_probabilities is not None:
            # The value of a sink is zero, therefore its dP is 0 and its dS is -P_sink * delta. The
            # batch dimension is documents * kv heads, with documents outermost. Therefore the
            # result can be viewed as [documents, heads, rows].
            delta_rows = sink_probabilities.view_as(delta_rows) * delta_rows
            delta_rows = delta_rows.view(group.queries.count, len(d_sinks), -1)
            d_sinks -= delta_rows.sum((0, 2), dtype=d_sinks.dtype)
        # dV = P^T dO. The query heads of a key head are stacked as rows of one matrix, so the
        # matmul also sums over these heads.
        part = torch.bmm(key_probabilities.transpose(1, 2), d_rows)
        d_values = _add_block(d_values, part, values, block)
        # dK = dS^T (scale * Q). `rows` already contains scale * Q.
        part = torch.bmm(d_scores.transpose(1, 2), rows.flatten(1, 2))
        d_keys = _add_block(d_keys, part, keys, block)
        # dQ = scale * dS K
        part = torch.bmm(d_scores, keys[:, block.keys]).mul_(rule.scale)
        d_queries.append(part.view_as(rows))
    assert d_keys is not None
    assert d_values is not None
    return _join(d_queries), d_keys, d_values


def _saves_probabilities(group: AttentionGroup, softcap: float | None) -> bool:
    """Return whether a group's probabilities are saved for the backward.

    Otherwise the backward recomputes them.
    """
    return softcap is None and group.keys.length <= MAX_SAVED_TOKENS


def _join(blocks: list[Tensor]) -> Tensor:
    """Concatenate blocks of queries [..., rows, d]. A single block is returned without a copy."""
    if len(blocks) == 1:
        return blocks[0]
    return torch.cat(blocks, 2)


class Block(NamedTuple):
    """Some queries of a document, and the keys that at least one of these queries attends to.

    The last key has the position of the last query.
    """

    queries: slice
    keys: slice


def _blocks(group: AttentionGroup, window: int | None) -> Iterator[Block]:
    shared = group.shared
    for start in range(shared, group.keys.length, BLOCK_QUERIES):
        end = min(start + BLOCK_QUERIES, group.keys.length)
        # Keep the keys in the window of the block's first query, which starts earliest. The
        # window has `window` tokens, including the query itself.
        first_key = max(0, start - window + 1) if window is not None else 0
        yield Block(slice(start - shared, end - shared), slice(first_key, end))


def _add_block(total: Tensor | None, part: Tensor, packed: Tensor, block: Block) -> Tensor:
    """Add a block's gradient `part` to `total`, the gradient of the `packed` keys or values.

    `total` is None for the first block. Several blocks are summed in fp32. If a single block
    contains all keys, its part is returned unchanged.
    """
    if total is None:
        # This is the only block and it contains all keys, so there is nothing to sum.
        if part.shape == packed.shape:
            return part
        total = torch.zeros_like(packed, dtype=torch.promote_types(part.dtype, torch.float32))
    total[:, block.keys] += part
    return total


def _pack_keys(x: Tensor, group: Group) -> Tensor:
    """Arrange keys or values x [n, kv heads, d] of a group as [count * kv heads, length, d]."""
    return group.rows_of(x).transpose(1, 2).reshape(-1, group.length, x.shape[2])


def _pack_queries(x: Tensor, group: Group, kv_heads: int, scale: float = 1.0) -> Tensor:
    """Multiply the group's queries x [n, heads, d] by `scale` and arrange them by key head.

    Returns:
        [count * kv heads, heads per kv head, length, d].
    """
    # [count, length, kv heads, heads per kv head, d]
    # -> [count, kv heads, heads per kv head, length, d]
    rows = group.rows_of(x).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
    # Scale the rows and make them contiguous for `bmm` in a single pass over the data.
    return torch.mul(rows, scale, out=x.new_empty(rows.shape)).flatten(0, 1)


def _scatter_back(out: Tensor, packed: Tensor, group: Group) -> None:
    """Write packed heads to the rows of their tokens in out [n, heads, d].

    Args:
        packed: [count * kv heads, heads per kv head, length, d].
    """
    # [count, kv heads, heads per kv head, length, d]
    # -> [count, length, kv heads, heads per kv head, d]
    rows = packed.unflatten(0, (group.count, -1)).permute(0, 3, 1, 2, 4)
    if group.tokens is None or group.places is None:
        out[group.start : group.start + group.length].view(rows.shape[1:]).copy_(rows[0])
    else:
        # Copy only real tokens. `group.places` are their positions in the padded rows, in the order
        # of `group.tokens`.
        flat = rows.reshape(-1, *out.shape[1:]).index_select(0, group.places)
        out.index_copy_(0, group.tokens, flat.to(out.dtype))


def _split_sinks(probabilities: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Split the probabilities of the keys from the last column, the probabilities of the sinks.

    Return None in place of the column if there are no sinks.
    """
    if sinks is None:
        return probabilities, None
    return probabilities[..., :-1], probabilities[..., -1]


def _probabilities(
    queries: Tensor, keys: Tensor, sinks: Tensor | None, block: Block, rule: Rule
) -> tuple[Tensor, Tensor | None]:
    """Compute the softmax of a block's masked scores, and the derivative of the soft cap.

    Args:
        queries: [batch, heads per key head, rows, d], already scaled.
        keys: [batch, keys, d].
        sinks: [heads], or None.

    Returns:
        The probabilities [batch, heads per key head * rows, keys] and the derivative of the same
        shape. The derivative is None without a soft cap. With sinks, the probabilities have an
        additional last column for the sinks.
    """
    window = rule.window
    softcap = rule.softcap
    # Shape [batch, heads per key head * rows, keys]. All query heads of a key head are in one
    # matrix, so that the keys are read once.
    scores = torch.bmm(queries.flatten(1, 2), keys.transpose(1, 2))
    d_cap = None
    if softcap is not None:
        scores.div_(softcap).tanh_()
        # The derivative of c * tanh(z / c) is 1 - tanh(z / c) ** 2.
        d_cap = 1 - scores * scores
        scores.mul_(softcap)
    batch, group, rows, _ = queries.shape
    key_count = keys.shape[1]
    offset = key_count - rows  # index of the key of the first query
    # View the scores as [batch * heads per key head, rows, keys], so that one mask is broadcast to
    # all heads.
    by_head = scores.view(-1, rows, key_count)
    # Keys before `offset` are visible to every query of the block, so only later keys are masked.
    by_head[:, :, offset:].add_(_future(scores.dtype, scores.device)[:rows, :rows])
    if window is not None:
        ones = torch.ones(rows, key_count, dtype=torch.bool, device=scores.device)
        # Row i is the query at key position offset + i. Keys up to offset + i - window are outside
        # its window.
        by_head.masked_fill_(ones.tril(offset - window), float("-inf"))
    if sinks is not None:
        documents = batch * group // sinks.shape[0]
        # Repeat the sinks to [documents * kv heads, heads per kv head, rows], the row order of
        # `scores`.
        column = sinks.to(scores.dtype).view(-1, group, 1)
        column = column.repeat(documents, 1, rows)
        scores = torch.cat([scores, column.view(batch, -1, 1)], -1)
    return scores.softmax(-1), d_cap


@cache
def _future(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a causal mask [BLOCK_QUERIES, BLOCK_QUERIES]: -inf for future keys, else 0.

    Adding this mask is cheaper than `masked_fill_`.
    """
    infinite = torch.full((BLOCK_QUERIES, BLOCK_QUERIES), float("-inf"), dtype=dtype, device=device)
    return infinite.triu(1)
