"""Cross-entropy fused with the output layer (the "head"), computed in chunks of positions.

The logits are the largest tensor of a training step: 4096 positions with a vocabulary of 128k take
2 GiB in fp32, and autograd would store several copies. This module computes the logits only for
positions with a label, and one chunk at a time. The gradient of a chunk is computed together with
its loss, so that no tensor larger than the hidden states is stored for the backward. The idea comes
from Liger's fused linear cross-entropy (Hsu et al. 2024, arXiv:2410.10989). This implementation
uses the same code for frozen, trained and tied heads, with a soft cap and a logit scale.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunesmith.distributed.vocab_parallel import ShardedHead, VocabularyShard, local_part, shard_of
from tunesmith.units import ceil_div

Shard = VocabularyShard | None
# Function with these arguments: raw logits [c, vocabulary], targets [c], weights [c] or None, soft
# cap, scale, and the vocabulary shard of the logits. It returns the weighted losses [c] and the
# gradient of their sum with respect to the raw logits.
LossAndGradFn = Callable[
    [Tensor, Tensor, Tensor | None, float | None, float, Shard], tuple[Tensor, Tensor]
]

# Maximum bytes of the fp32 logits of one chunk on a CPU. A chunk of this size fits into the
# last-level cache.
CPU_CHUNK_BYTES = 32 << 20
# Minimum and maximum bytes of the fp32 logits of one chunk on a GPU. Between these limits, a chunk
# may take 1/96 of the GPU's memory. The gradient of the hidden states is a matmul with a result of
# only [rows, h]. With h = 4096, a chunk of 512 rows gives only 64 tiles of 128 x 256 for the 132
# multiprocessors of an H200, and a chunk of 2048 rows gives 256 tiles. Therefore chunks are larger
# on a large GPU.
GPU_CHUNK_BYTES = (256 << 20, 1 << 30)
# Maximum bytes of the fp32 logits of one chunk on a GPU if the head is trained.
MAX_TRAINED_CHUNK_BYTES = 2 << 30
# Rows whose loss is computed together on a CPU, so that their fp32 logits fit into the cache. This
# takes half the time of computing the loss of an entire chunk at once.
CACHED_ROWS = 16
# Rows of the head per thread in one fp32 matmul with MKL on a CPU. The head is multiplied in
# several matmuls of this size, because they take 55 to 80 % of the time of one large matmul (two
# threads, 16 to 168 positions, heads of [49152, 576] and [128256, 2048]). With 2,048 rows per
# thread, they take 75 to 90 %, and with 4,096 rows 90 to 103 %.
HEAD_ROWS_A_THREAD = 512
# Rows of a trained head's gradient that are accumulated in one step on a CPU. With 576 columns they
# take 2 MiB. This reduces the time of SmolLM2's trained head with its backward by a fifth.
GRADIENT_ROWS = 1024
# Rows of one tile of a GPU matmul. A partial tile takes as long as a full tile.
TILE_ROWS = 128


def chunked_cross_entropy(
    hidden: Tensor,
    head: nn.Linear,
    targets: Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
    loss_and_grad_fn: LossAndGradFn | None = None,
) -> Tensor:
    """Compute the sum of `cross_entropy(cap(scale * head(hidden)), targets)`, in nats.

    Args:
        hidden: [n, h], hidden states of the supervised positions.
        head: the output layer. The gradients of a plain `nn.Linear` are computed in the forward. If
            the forward of the head is not that of `nn.Linear`, for example because of an adapter,
            the head is called again in the backward for each chunk. If it is a `ShardedHead`, every
            rank gets the full loss but only a part of the gradient of `hidden`. The caller must sum
            these gradients over the ranks.
        targets: int64 [n].
        softcap: c in c * tanh(logits / c) (Gemma 2), or None.
        scale: factor on the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        chunk: positions per chunk. None means `chunk_size`.
        loss_and_grad_fn: function that computes the loss and gradient of a chunk, such as a
            compiled `loss_and_grad`. None means `loss_and_grad`.

    Returns:
        A 0-d tensor in fp32, or in fp64 if `hidden` is fp64.
    """
    args = _arguments(head, targets, softcap, scale, chunk, loss_and_grad_fn)
    if _is_plain(head):
        weight = local_part(head.weight)
        return _HeadLoss.apply(hidden, weight, local_part(head.bias), args)
    # The forward of the head is not that of `nn.Linear`, for example because of an adapter. Use
    # autograd, and recompute the logits of each chunk in the backward.
    return _module_losses(hidden, head, args).sum()


def token_logprobs(
    hidden: Tensor,
    head: nn.Linear,
    targets: Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
    loss_and_grad_fn: LossAndGradFn | None = None,
) -> Tensor:
    """Compute the log-probability of each target. The result has a gradient.

    The weight of each position in the loss is only known in the backward. If the head is frozen,
    the forward computes the gradient of each log-probability with respect to its hidden state, and
    the backward multiplies this gradient by the weight. The number of matmuls with the head is the
    same as in `chunked_cross_entropy`. If the head is trained, the backward computes the logits of
    each chunk again, because the gradient of the head is a weighted sum over positions. This takes
    one more matmul with the head, but no more memory.

    Args:
        hidden, head, targets, softcap, scale, chunk, loss_and_grad_fn: as in
            `chunked_cross_entropy`.

    Returns:
        fp32 [n], or fp64 if `hidden` is fp64.
    """
    args = _arguments(head, targets, softcap, scale, chunk, loss_and_grad_fn)
    if _is_plain(head):
        return _HeadLogprobs.apply(hidden, local_part(head.weight), local_part(head.bias), args)
    return -_module_losses(hidden, head, args)


@torch.no_grad()
def token_cross_entropy(
    hidden: Tensor,
    head: nn.Linear,
    targets: Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of each position, and whether the most likely token is the target.

    Returns:
        The cross-entropy, fp32 or fp64 [n], and whether the most likely token is the target, bool
        [n].
    """
    size = chunk_size(head.out_features, len(targets), hidden.device)
    shard = shard_of(head)
    # Start with empty tensors, so that `torch.cat` returns the right dtype if the batch has no
    # labels.
    losses = [hidden.new_zeros(0, dtype=_wide(hidden))]
    hits = [targets.new_zeros(0, dtype=torch.bool)]
    for chunk, chunk_targets in zip(hidden.split(size), targets.split(size), strict=True):
        logits = _logits(head(chunk), softcap, scale)
        tokens = logits.argmax(-1) if shard is None else shard.most_likely(logits)
        hits.append(tokens == chunk_targets)
        if shard is None:
            losses.append(F.cross_entropy(logits, chunk_targets, reduction="none"))
        else:
            # `shard.softmax` overwrites the logits.
            losses.append(shard.softmax(logits, chunk_targets)[0].squeeze(1))
    return torch.cat(losses), torch.cat(hits)


def card_bytes(device: torch.device) -> int:
    """Return the total memory of a GPU in bytes, or 0 for other devices."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).total_memory


def chunk_size(
    vocabulary: int,
    positions: int,
    device: torch.device,
    *,
    trained: bool = False,
    card: int | None = None,
) -> int:
    """Return the number of positions per chunk, from the memory budget of the device.

    Args:
        vocabulary: the number of rows of the head.
        positions: the number of positions with a label.
        trained: whether the head is trained. The gradient of a trained head, [vocabulary, h] in
            fp32, is accumulated once per chunk. On a GPU this takes longer than the matmuls of a
            small chunk. Therefore the memory budget for a trained head is up to four times as
            large.
        card: the memory of the GPU in bytes. None queries the device.
    """
    # Bytes of the logits of one position. The loss is computed in fp32 for every dtype of the head.
    row_bytes = 4 * vocabulary
    if device.type == "cpu":
        return max(16, CPU_CHUNK_BYTES // row_bytes)
    if card is None:
        card = card_bytes(device)
    minimum, maximum = GPU_CHUNK_BYTES
    # Limit a chunk to a quarter of all fp32 logits. All logits take 4 * vocabulary * positions
    # bytes, and a quarter is vocabulary * positions bytes. In a small micro batch, larger chunks
    # would increase the peak memory but save almost no time.
    budget = max(minimum, min(maximum, card // 96, vocabulary * positions))
    if trained:
        budget = min(4 * budget, MAX_TRAINED_CHUNK_BYTES)
    rows = budget // row_bytes
    # Round down to full tiles, unless the budget is smaller than one tile.
    full_tiles = rows // TILE_ROWS * TILE_ROWS
    return max(16, full_tiles or rows)


def even_chunk_size(count: int, size: int, *, tile: int = 1) -> int:
    """Return a chunk size that divides `count` positions into chunks of about equal size.

    The number of chunks is the same as with chunks of `size` positions. If all chunks have about
    the same size, torch.compile does not compile a second graph for a small last chunk. The size is
    rounded up to full tiles of `tile` positions, unless the last chunk would then have only one
    position, because torch.compile creates another graph for a dimension of 1.
    """
    chunks = max(1, ceil_div(count, size))
    # Use at least 1. If there are no labels, the result would be 0, which `range` in `spans` does
    # not accept.
    even = ceil_div(count, chunks) or 1
    full_tiles = ceil_div(even, tile) * tile
    if count % full_tiles == 1 or full_tiles > size:
        return even
    return full_tiles


class _LossArguments(NamedTuple):
    """Arguments without gradient, for the autograd functions of this module."""

    targets: Tensor
    softcap: float | None
    scale: float
    size: int  # number of positions per chunk
    loss_and_grad_fn: LossAndGradFn
    shard: Shard

    def spans(self) -> list[slice]:
        """Return the range of positions of each chunk."""
        starts = range(0, len(self.targets), self.size)
        return [slice(start, start + self.size) for start in starts]

    def loss_and_grad(
        self, raw: Tensor, span: slice, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Compute the losses and the gradient of one chunk from its raw logits and weights."""
        return self.loss_and_grad_fn(
            raw, self.targets[span], weights, self.softcap, self.scale, self.shard
        )


def _arguments(
    head: nn.Linear,
    targets: Tensor,
    softcap: float | None,
    scale: float,
    chunk: int | None,
    loss_and_grad_fn: LossAndGradFn | None,
) -> _LossArguments:
    device = targets.device
    tile = 1
    if chunk is None:
        trained = any(p.requires_grad for p in head.parameters())
        chunk = chunk_size(head.out_features, len(targets), device, trained=trained)
        if device.type != "cpu":
            # On a GPU a partial tile of a matmul takes as long as a full tile.
            tile = TILE_ROWS
    size = even_chunk_size(len(targets), chunk, tile=tile)
    loss_and_grad_fn = loss_and_grad_fn or loss_and_grad
    return _LossArguments(targets, softcap, scale, size, loss_and_grad_fn, shard_of(head))


def _is_plain(head: nn.Linear) -> bool:
    """Return whether the head computes the same as `nn.Linear`.

    The check compares the `forward` method, because `fully_shard` replaces the class of the head.
    """
    return isinstance(head, ShardedHead) or type(head).forward is nn.Linear.forward


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _logits(raw: Tensor, softcap: float | None, scale: float) -> Tensor:
    logits = raw.to(_wide(raw))
    if scale != 1.0:
        logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits


def _module_losses(hidden: Tensor, head: nn.Linear, args: _LossArguments) -> Tensor:
    """Compute the cross-entropy of each position, [n], with autograd.

    The head is called again in the backward for each chunk.
    """

    # [c, h] -> [c]. `checkpoint` stores only the inputs of the chunk, not its logits.
    def chunk_losses(chunk: Tensor, targets: Tensor) -> Tensor:
        logits = _logits(head(chunk), args.softcap, args.scale)
        return F.cross_entropy(logits, targets, reduction="none")

    losses = [hidden.new_zeros(0, dtype=_wide(hidden))]
    # If there are no positions, call the head with zero rows, so that the adapter gets a gradient
    # of zeros instead of None. Gradients are summed over the ranks, so every rank must have one.
    for span in args.spans() or [slice(0, 0)]:
        chunk = hidden[span]
        targets = args.targets[span]
        losses.append(checkpoint(chunk_losses, chunk, targets, use_reentrant=False))
    return torch.cat(losses)


def _raw_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute hidden W^T + b, [c, vocabulary]. The loss may overwrite the new tensor."""
    is_cpu_fp32 = hidden.device.type == "cpu" and hidden.dtype == torch.float32
    if not is_cpu_fp32 or bias is not None or not torch.backends.mkl.is_available():
        return F.linear(hidden, weight, bias)
    raw = hidden.new_empty(len(hidden), len(weight))
    # Several matmuls with HEAD_ROWS_A_THREAD rows per thread are faster than one large matmul.
    size = HEAD_ROWS_A_THREAD * torch.get_num_threads()
    for columns, rows in zip(raw.split(size, 1), weight.split(size), strict=True):
        torch.mm(hidden, rows.T, out=columns)
    return raw


class _HeadGradients:
    """Gradients of hidden states, weight and bias, accumulated over the chunks. A gradient is None
    if the input does not require one.
    """

    def __init__(
        self, needed: tuple[bool, ...], hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> None:
        # The tensor need not be filled with zeros, because every position is in exactly one chunk,
        # and the chunk writes the row of the position.
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = None
        self.bias = None
        # Accumulate in fp32, because a bf16 sum over many chunks would lose the contributions of
        # later chunks.
        if needed[1]:
            self.weight = torch.zeros_like(weight, dtype=_wide(hidden))
        if bias is not None and needed[2]:
            self.bias = torch.zeros_like(bias, dtype=_wide(hidden))

    def add(self, span: slice, grad_logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Add the gradients of one chunk, from grad_logits [c, vocabulary] and hidden [c, h]."""
        if self.hidden is not None:
            # [c, vocabulary] x [vocabulary, h]
            self.hidden[span] = grad_logits @ weight
        if self.weight is not None:
            # [vocabulary, c] x [c, h]
            product = grad_logits.T @ hidden
            # On a CPU, torch first converts `product` to the dtype of the sum, which creates a new
            # tensor. Therefore add only a few rows at a time, so that the new tensor fits into the
            # cache.
            rows = GRADIENT_ROWS if product.device.type == "cpu" else len(product)
            for total, part in zip(self.weight.split(rows), product.split(rows), strict=True):
                total.add_(part)
        if self.bias is not None:
            self.bias += grad_logits.sum(0, dtype=self.bias.dtype)


class _HeadLoss(torch.autograd.Function):
    """Autograd function for the sum of the losses. The forward computes the gradients together with
    the losses.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        args: _LossArguments,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=_wide(hidden))
        # `_HeadGradients` reads only the first three entries: hidden, weight, bias.
        grads = _HeadGradients(ctx.needs_input_grad, hidden, weight, bias)
        for span in args.spans():
            # [c, vocabulary]. The loss may overwrite this tensor, because only this chunk uses it.
            raw = _raw_logits(hidden[span], weight, bias)
            losses, grad_logits = args.loss_and_grad(raw, span, None)
            total += losses.sum()
            grads.add(span, grad_logits, hidden[span], weight)
        # Save the gradients, not the inputs: the backward only multiplies them by the gradient of
        # the loss.
        ctx.save_for_backward(grads.hidden, grads.weight, grads.bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        def scaled(grad: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            if grad is None:
                return None
            # Write the result in its final dtype. For a trained head, an fp32 result in between
            # would write and read 1.6 GB more. `grads[0]`, the gradient of the loss, is a 0-d
            # tensor on the device, so the host does not wait for its value.
            return torch.mul(grad, grads[0], out=torch.empty_like(grad, dtype=dtype))

        return (*map(scaled, ctx.saved_tensors, ctx.dtypes), None)


class _HeadLogprobs(torch.autograd.Function):
    """Autograd function that computes the log-probability of each target. See `token_logprobs`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, args: _LossArguments
    ) -> Tensor:
        ctx.args = args
        logprobs = hidden.new_empty(len(hidden), dtype=_wide(hidden))
        by_hidden, *by_head = ctx.needs_input_grad[:3]
        # If the head is frozen, compute the gradients here, and multiply them by the weights in the
        # backward.
        ctx.only_hidden = by_hidden and not any(by_head)
        grads = _HeadGradients((ctx.only_hidden, False, False), hidden, weight, bias)
        for span in args.spans():
            raw = _raw_logits(hidden[span], weight, bias)
            # Use the same function for a reference model, which needs no gradient. Its losses are
            # then rounded in the same way, so that equal models give equal log-probabilities.
            losses, grad_logits = args.loss_and_grad(raw, span, None)
            grads.add(span, grad_logits, hidden[span], weight)
            logprobs[span] = -losses
        if ctx.only_hidden:
            ctx.save_for_backward(grads.hidden)
        else:
            ctx.save_for_backward(hidden, weight, bias)
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.only_hidden:
            [loss_by_hidden] = ctx.saved_tensors
            # The log-probability is the negative loss.
            factors = -grads[0].unsqueeze(1)
            by_hidden = torch.mul(loss_by_hidden, factors, out=torch.empty_like(loss_by_hidden))
            return by_hidden, None, None, None
        hidden, weight, bias = ctx.saved_tensors
        args: _LossArguments = ctx.args
        sums = _HeadGradients(ctx.needs_input_grad, hidden, weight, bias)
        for span in args.spans():
            raw = _raw_logits(hidden[span], weight, bias)
            # A log-probability is a negative loss: sum(g * logprob) = sum(-g * loss). Therefore the
            # weight of each loss is the negative gradient g of the log-probability.
            _, grad_logits = args.loss_and_grad(raw, span, -grads[0][span])
            sums.add(span, grad_logits, hidden[span], weight)
        d_weight = None if sums.weight is None else sums.weight.to(weight.dtype)
        d_bias = None if sums.bias is None else sums.bias.to(bias.dtype)
        return sums.hidden, d_weight, d_bias, None


def loss_and_grad(
    raw: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    softcap: float | None,
    scale: float,
    shard: Shard = None,
) -> tuple[Tensor, Tensor]:
    """Compute the weighted losses [c] of a chunk, and the gradient of their sum.

    The gradient is with respect to `raw` [c, vocabulary] and has its dtype. On a CPU the gradient
    overwrites `raw`, a few rows at a time.
    """
    # In eager mode on a CPU, process a few rows at a time, which fit into the cache. torch.compile
    # generates such loops itself. If the vocabulary is sharded, each call needs a reduction over
    # the ranks, so the chunk is not divided.
    is_eager_on_cpu = raw.device.type == "cpu" and not torch.compiler.is_compiling()
    if shard is not None or not is_eager_on_cpu:
        return _loss_and_grad(raw, targets, weights, softcap, scale, shard)
    losses = raw.new_empty(len(raw), dtype=_wide(raw))
    for start in range(0, len(raw), CACHED_ROWS):
        rows = slice(start, start + CACHED_ROWS)
        row_weights = None if weights is None else weights[rows]
        losses[rows], grad = _loss_and_grad(raw[rows], targets[rows], row_weights, softcap, scale)
        # Overwrite the logits with the gradient, so that no second tensor [c, vocabulary] is
        # needed.
        raw[rows] = grad
    return losses, raw


def _loss_and_grad(
    raw: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    softcap: float | None,
    scale: float,
    shard: Shard = None,
) -> tuple[Tensor, Tensor]:
    # Only this chunk uses `raw`, so all operations work in place.
    logits = raw.to(_wide(raw))
    if scale != 1.0:
        logits = logits.mul_(scale)
    softcap_grad = None
    if softcap is not None:
        # d tanh(z) / dz = 1 - tanh(z)^2. The factors softcap and 1 / softcap cancel out in the
        # gradient.
        logits = logits.div_(softcap).tanh_()
        softcap_grad = 1 - logits * logits
        logits = logits.mul_(softcap)

    # Compute the losses [c, 1]. `grad` holds the probabilities, which overwrite the logits.
    column = targets.unsqueeze(1)
    is_compiling = torch.compiler.is_compiling()
    if shard is not None:
        losses, grad = shard.softmax(logits, targets)
        # Make the target ids relative to the first token of this rank's shard. A target in another
        # shard then matches no column of this rank.
        column = column - shard.first
    elif is_compiling or logits.dtype == raw.dtype:
        # Log-sum-exp with the largest logit subtracted, so that exp cannot overflow.
        largest = logits.amax(-1, keepdim=True)
        picked = logits.gather(1, column)
        grad = logits.sub_(largest).exp_()
        total = grad.sum(-1, keepdim=True)
        losses = total.log().add_(largest) - picked
        grad.div_(total)
    else:
        # Use the softmax kernel. Its exponential has an error of 2e-6, which is much smaller than
        # the rounding error of 16-bit logits. `largest` and `picked` are [c, 1].
        largest = logits.amax(-1, keepdim=True)
        picked = logits.gather(1, column)
        grad = logits.softmax(-1)
        # log-sum-exp = largest - log(largest probability), because the largest probability is
        # 1 / sum(exp(logit - largest)). It is never 0.
        losses = largest.sub_(grad.amax(-1, keepdim=True).log_()) - picked

    # The gradient of the loss with respect to the logits: the probabilities, minus 1 at the target.
    if is_compiling:
        # Subtract a one-hot tensor, because the compiler can fuse this into the kernel that writes
        # the gradient. With a scatter, the compiler would first write the gradient in fp32 to
        # memory.
        one_hot = torch.arange(grad.shape[1], device=grad.device) == column
        grad = grad - one_hot.to(grad.dtype)
    elif shard is not None:
        shard.subtract_one_hot(grad, targets)
    else:
        # Subtract 1 at the target of each row. `expand` creates a view of a single number.
        grad.scatter_add_(1, column, grad.new_full((), -1.0).expand(len(targets), 1))
    if softcap_grad is not None:
        # Apply the chain rule in reverse order: soft cap, scale, weight of the position.
        grad.mul_(softcap_grad)
    if scale != 1.0:
        grad.mul_(scale)
    if weights is not None:
        losses = losses * weights.unsqueeze(1)
        grad.mul_(weights.unsqueeze(1))
    # Return the gradient in the dtype of the logits, which the matmuls of the head need.
    return losses.squeeze(1), grad.to(raw.dtype)
