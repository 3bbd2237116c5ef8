"""The output head and the cross-entropy together, a chunk of positions at a time.

Logits are the largest tensor of a training step: 4096 positions of a 128k vocabulary take 2 GiB in
fp32, and autograd would keep several copies. Here only positions with a label come in, one chunk of
logits exists at a time, and its gradient is computed while it exists, so the backward holds nothing
larger than the hidden states. The idea is that of Liger's fused linear cross-entropy (Hsu et al.
2024, arXiv:2410.10989). The chunks are ours so that frozen, trained and tied heads, a soft cap
and a logit scale all take the same path.
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
# Raw logits [c, vocabulary], targets [c], weights [c] or None, soft cap, scale, the logits' part of
# the vocabulary -> weighted losses [c], and the gradient of their sum by the raw logits.
LossAndGradFn = Callable[
    [Tensor, Tensor, Tensor | None, float | None, float, Shard], tuple[Tensor, Tensor]
]

# Budget of one chunk of fp32 logits. On a CPU the chunk should stay in the last-level cache. On a
# GPU the gradient by the hidden states is a product of only [rows, h]: with h = 4096, 512 rows make
# 64 tiles of 128 x 256 for the 132 multiprocessors of an H200, 2048 rows make 256. Large cards get
# the room for that, and long micro batches alone.
CPU_CHUNK_BYTES = 32 << 20
# At least and at most, between them a 96th of the card's memory.
GPU_CHUNK_BYTES = (256 << 20, 1 << 30)
MAX_TRAINED_CHUNK_BYTES = 2 << 30  # with a trained head
# Rows whose loss is computed together on a CPU: their fp32 logits stay in its cache, for half the
# time of a whole chunk.
CACHED_ROWS = 16
# Rows of the head that a thread multiplies together on a CPU in fp32, with MKL: 55 to 80 % of the
# time of the whole on two threads, for 16 to 168 positions and heads [49152, 576] and [128256,
# 2048]. Four times as many take 75 to 90 %, eight times as many 90 to 103 %.
HEAD_ROWS_A_THREAD = 512
# Rows of a trained head's gradient that are added up together on a CPU: 2 MiB where they have 576
# columns. SmolLM2's trained head and its backward take a fifth less time than without.
GRADIENT_ROWS = 1024
# Rows of a GPU matmul's tile: a partial tile takes as long as a whole one.
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
    """Sum of `cross_entropy(cap(scale * head(hidden)), targets)`, in nats.

    Args:
        hidden: [n, h], hidden states of the supervised positions.
        head: the output layer. A plain `nn.Linear`, frozen or trained, has its gradient computed in
            the forward; one with another forward (an adapter) is called again in the backward,
            chunk by chunk. Of a `ShardedHead` the loss is whole on every rank, and the gradient of
            `hidden` this rank's part of a sum.
        targets: int64 [n].
        softcap: c in c * tanh(logits / c) (Gemma 2), or None.
        scale: factor on the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        chunk: positions per chunk; None takes `chunk_size`.
        loss_and_grad_fn: computes loss and gradient of a chunk; None takes `loss_and_grad`, which
            may also be passed compiled.

    Returns:
        0-d, fp32 (fp64 where hidden is fp64).
    """
    # The forward computes the gradients too, as the loss is a sum.
    args = _arguments(head, targets, softcap, scale, chunk, loss_and_grad_fn)
    if _is_plain(head):
        weight = local_part(head.weight)
        return _HeadLoss.apply(hidden, weight, local_part(head.bias), args)
    # A head with an adapter: plain autograd, with each chunk's logits recomputed.
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
    """Log-probability of each target, with gradient: fp32 (or fp64) [n].

    Each position's weight in a loss is known only in the backward. Over a frozen head the forward
    makes the gradient of each log-probability by its hidden state, for the backward to weigh: as
    many head matmuls as `chunked_cross_entropy`. A trained head's own gradient adds up weighted
    positions, so the backward computes each chunk's logits again: one more. The memory is the same.
    Args as there.
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
    """Cross-entropy of each position, and whether the most likely token is the target.

    Returns:
        fp32 or fp64 [n], and bool [n].
    """
    size = chunk_size(head.out_features, len(targets), hidden.device)
    shard = shard_of(head)
    # Empty first items: `cat` then has a tensor, of the right dtype, for a batch without labels.
    losses = [hidden.new_zeros(0, dtype=_wide(hidden))]
    hits = [targets.new_zeros(0, dtype=torch.bool)]
    for chunk, chunk_targets in zip(hidden.split(size), targets.split(size), strict=True):
        logits = _logits(head(chunk), softcap, scale)
        tokens = logits.argmax(-1) if shard is None else shard.most_likely(logits)
        hits.append(tokens == chunk_targets)
        if shard is None:
            losses.append(F.cross_entropy(logits, chunk_targets, reduction="none"))
        else:
            losses.append(
                shard.softmax(logits, chunk_targets)[0].squeeze(1)
            )  # in the logits' place
    return torch.cat(losses), torch.cat(hits)


def card_bytes(device: torch.device) -> int:
    """All memory of a GPU, in use or not; 0 for other devices."""
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
    """Choose how many of `positions` make a chunk, by the budget of the device.

    A `trained` head accumulates its gradient, [vocabulary, h] in fp32, once a chunk: on a GPU that
    takes longer than the matmuls of a small chunk, so it gets up to four times the room.

    Args:
        card: bytes of the GPU; None asks it.
    """
    # The loss is computed in fp32, whatever dtype the head's product has.
    row_bytes = 4 * vocabulary  # of fp32 logits
    if device.type == "cpu":
        return max(16, CPU_CHUNK_BYTES // row_bytes)
    if card is None:
        card = card_bytes(device)
    least, most = GPU_CHUNK_BYTES
    # More than a quarter of the positions would make few chunks fewer, and cost a small micro batch
    # its small peak.
    # vocabulary * positions is a quarter of 4 * vocabulary * positions, all the fp32 logits.
    budget = max(least, min(most, card // 96, vocabulary * positions))
    if trained:
        budget = min(4 * budget, MAX_TRAINED_CHUNK_BYTES)
    rows = budget // row_bytes
    # Below one tile there is no whole one; then as many rows as the budget has.
    whole_tiles = rows // TILE_ROWS * TILE_ROWS
    return max(16, whole_tiles or rows)


def even_chunk_size(count: int, size: int, *, tile: int = 1) -> int:
    """Size of equal chunks, as many as `size` makes of `count`: compiled code sees no small last
    one.

    With a `tile` all chunks but the last are whole tiles, unless that leaves one position for the
    last: torch.compile makes another graph for a dimension of 1.
    """
    chunks = max(1, ceil_div(count, size))
    # `or 1`: without labels `spans` would count in steps of 0.
    even = ceil_div(count, chunks) or 1
    whole_tiles = ceil_div(even, tile) * tile
    if count % whole_tiles == 1 or whole_tiles > size:
        return even
    return whole_tiles


class _LossArguments(NamedTuple):
    """The arguments that the autograd functions take beside their differentiable inputs."""

    targets: Tensor
    softcap: float | None
    scale: float
    size: int  # positions of a chunk
    loss_and_grad_fn: LossAndGradFn
    shard: Shard

    def spans(self) -> list[slice]:
        """The positions of each chunk."""
        starts = range(0, len(self.targets), self.size)
        return [slice(start, start + self.size) for start in starts]

    def loss_and_grad(
        self, raw: Tensor, span: slice, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Losses and gradient of one chunk, of its raw logits and weights."""
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
            # Only a GPU's matmul has tiles that a few more rows would leave partly empty.
            tile = TILE_ROWS
    size = even_chunk_size(len(targets), chunk, tile=tile)
    loss_and_grad_fn = loss_and_grad_fn or loss_and_grad
    return _LossArguments(targets, softcap, scale, size, loss_and_grad_fn, shard_of(head))


def _is_plain(head: nn.Linear) -> bool:
    """Tell whether the head computes what an `nn.Linear` does.

    By its forward: `fully_shard` gives it a class of another name.
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
    """Cross-entropy of each position by plain autograd, [n].

    The head is called again in the backward, chunk by chunk.
    """

    # [c, h] -> [c]; `checkpoint` keeps the chunk's inputs and drops its logits until the backward.
    def chunk_losses(chunk: Tensor, targets: Tensor) -> Tensor:
        logits = _logits(head(chunk), args.softcap, args.scale)
        return F.cross_entropy(logits, targets, reduction="none")

    losses = [hidden.new_zeros(0, dtype=_wide(hidden))]
    # Without a position the head is called on no rows: its adapter then gets a gradient of zeros,
    # as on other ranks.
    for span in args.spans() or [slice(0, 0)]:
        chunk = hidden[span]
        targets = args.targets[span]
        losses.append(checkpoint(chunk_losses, chunk, targets, use_reentrant=False))
    return torch.cat(losses)


def _raw_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden W^T + b, [c, vocabulary]: a new tensor, which the loss may overwrite."""
    is_cpu_fp32 = hidden.device.type == "cpu" and hidden.dtype == torch.float32
    if not is_cpu_fp32 or bias is not None or not torch.backends.mkl.is_available():
        return F.linear(hidden, weight, bias)
    raw = hidden.new_empty(len(hidden), len(weight))
    # All threads wait for the slowest at the end of each part.
    size = HEAD_ROWS_A_THREAD * torch.get_num_threads()
    for columns, rows in zip(raw.split(size, 1), weight.split(size), strict=True):
        torch.mm(hidden, rows.T, out=columns)
    return raw


class _HeadGradients:
    """Gradients of a chunked head, added up chunk by chunk; None where an input needs none."""

    def __init__(
        self, needed: tuple[bool, ...], hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> None:
        # Every position lies in one chunk, which writes its rows: no zeros are needed.
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = None
        self.bias = None
        # A sum over many chunks in bf16 would lose what the later ones add.
        if needed[1]:
            self.weight = torch.zeros_like(weight, dtype=_wide(hidden))
        if bias is not None and needed[2]:
            self.bias = torch.zeros_like(bias, dtype=_wide(hidden))

    def add(self, span: slice, grad_logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Add one chunk's part: grad_logits [c, vocabulary], hidden [c, h]."""
        if self.hidden is not None:
            # [c, vocabulary] x [vocabulary, h]
            self.hidden[span] = grad_logits @ weight
        if self.weight is not None:
            # [vocabulary, c] x [c, h]
            product = grad_logits.T @ hidden
            # Of two dtypes torch widens one on a CPU into a tensor of its own, which should stay in
            # the cache.
            rows = GRADIENT_ROWS if product.device.type == "cpu" else len(product)
            for total, part in zip(self.weight.split(rows), product.split(rows), strict=True):
                total.add_(part)
        if self.bias is not None:
            self.bias += grad_logits.sum(0, dtype=self.bias.dtype)


class _HeadLoss(torch.autograd.Function):
    """Loss sum and its gradients in one pass over chunks of logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        args: _LossArguments,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=_wide(hidden))
        # Of needs_input_grad only the first three are read: hidden, weight, bias.
        grads = _HeadGradients(ctx.needs_input_grad, hidden, weight, bias)
        for span in args.spans():
            # [c, vocabulary], this chunk's alone: the loss may overwrite it.
            raw = _raw_logits(hidden[span], weight, bias)
            losses, grad_logits = args.loss_and_grad(raw, span, None)
            total += losses.sum()
            grads.add(span, grad_logits, hidden[span], weight)
        # Gradients, not inputs: the backward only multiplies them by the gradient of the sum.
        ctx.save_for_backward(grads.hidden, grads.weight, grads.bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        def scaled(grad: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            if grad is None:
                return None
            # Written in its last dtype: in fp32 first, a trained head's is 1.6 GB more to write and
            # read.
            # grads[0] is the 0-d gradient of the loss, on the device: no value is read by the host.
            return torch.mul(grad, grads[0], out=torch.empty_like(grad, dtype=dtype))

        return (*map(scaled, ctx.saved_tensors, ctx.dtypes), None)


class _HeadLogprobs(torch.autograd.Function):
    """Log-probability of each target; see `token_logprobs`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, args: _LossArguments
    ) -> Tensor:
        ctx.args = args
        logprobs = hidden.new_empty(len(hidden), dtype=_wide(hidden))
        by_hidden, *by_head = ctx.needs_input_grad[:3]
        # Over a frozen head the gradients are computed here, and weighted in the backward.
        ctx.only_hidden = by_hidden and not any(by_head)
        grads = _HeadGradients((ctx.only_hidden, False, False), hidden, weight, bias)
        for span in args.spans():
            raw = _raw_logits(hidden[span], weight, bias)
            # Of a reference too, whose loss is then rounded as the model's: where both are alike,
            # their log-probabilities are equal.
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
            # A log-probability is minus a loss.
            factors = -grads[0].unsqueeze(1)
            by_hidden = torch.mul(loss_by_hidden, factors, out=torch.empty_like(loss_by_hidden))
            return by_hidden, None, None, None
        hidden, weight, bias = ctx.saved_tensors
        args: _LossArguments = ctx.args
        sums = _HeadGradients(ctx.needs_input_grad, hidden, weight, bias)
        for span in args.spans():
            raw = _raw_logits(hidden[span], weight, bias)
            # d(sum of g * logprob) = -d(sum of g * loss): the gradient of a log-probability comes
            # in as minus the weight of its loss.
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
    """A chunk's weighted losses [c], and the gradient of their sum by the raw logits, in their
    dtype.

    On a CPU the gradient overwrites `raw` [c, vocabulary], a few rows at a time.
    """
    # Eager code on a CPU works through rows that fit its cache; a compiler makes such loops itself.
    # A shard reduces over ranks in each call, so its chunk stays whole.
    is_eager_on_cpu = raw.device.type == "cpu" and not torch.compiler.is_compiling()
    if shard is not None or not is_eager_on_cpu:
        return _loss_and_grad(raw, targets, weights, softcap, scale, shard)
    losses = raw.new_empty(len(raw), dtype=_wide(raw))
    for start in range(0, len(raw), CACHED_ROWS):
        rows = slice(start, start + CACHED_ROWS)
        row_weights = None if weights is None else weights[rows]
        losses[rows], grad = _loss_and_grad(raw[rows], targets[rows], row_weights, softcap, scale)
        # The product's memory takes the gradient: no second tensor [c, vocabulary].
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
    # raw belongs to this chunk alone, so the wide copy and everything after it work in place.
    logits = raw.to(_wide(raw))
    if scale != 1.0:
        logits = logits.mul_(scale)
    softcap_grad = None
    if softcap is not None:
        # d tanh(z) / dz = 1 - tanh(z)^2; the factors softcap and 1 / softcap cancel.
        logits = logits.div_(softcap).tanh_()
        softcap_grad = 1 - logits * logits
        logits = logits.mul_(softcap)

    # Losses [c, 1], and the probabilities in place of the logits.
    column = targets.unsqueeze(1)
    is_compiling = torch.compiler.is_compiling()
    if shard is not None:
        losses, grad = shard.softmax(logits, targets)
        # Target ids of this rank's part count from its first token; others match no column.
        column = column - shard.first
    elif is_compiling or logits.dtype == raw.dtype:
        # Log-sum-exp in steps: exp(logit - largest) cannot overflow.
        largest = logits.amax(-1, keepdim=True)
        picked = logits.gather(1, column)
        grad = logits.sub_(largest).exp_()
        total = grad.sum(-1, keepdim=True)
        losses = total.log().add_(largest) - picked
        grad.div_(total)
    else:
        # One kernel, whose exponential errs by 2e-6: much less than 16-bit logits do. The largest
        # probability is one over the sum of exp(logit - largest), and never 0.
        # [c, 1]
        largest = logits.amax(-1, keepdim=True)
        picked = logits.gather(1, column)
        grad = logits.softmax(-1)
        # log-sum-exp = largest - log(largest probability), as that probability is 1 / total.
        losses = largest.sub_(grad.amax(-1, keepdim=True).log_()) - picked

    # The gradient of a loss by its logits: the probabilities, less 1 at the target.
    if is_compiling:
        # Fused into the kernel that writes the gradient; for a scatter the compiler would first
        # write it out in fp32.
        one_hot = torch.arange(grad.shape[1], device=grad.device) == column
        grad = grad - one_hot.to(grad.dtype)
    elif shard is not None:
        shard.subtract_one_hot(grad, targets)
    else:
        # One entry a row; `expand` makes the -1 of each row a view of one number.
        grad.scatter_add_(1, column, grad.new_full((), -1.0).expand(len(targets), 1))
    if softcap_grad is not None:
        # The chain rule in reverse: cap, then scale, then the weight of the position.
        grad.mul_(softcap_grad)
    if scale != 1.0:
        grad.mul_(scale)
    if weights is not None:
        losses = losses * weights.unsqueeze(1)
        grad.mul_(weights.unsqueeze(1))
    # In the dtype of the logits: the head's matmuls take it as it is.
    return losses.squeeze(1), grad.to(raw.dtype)
