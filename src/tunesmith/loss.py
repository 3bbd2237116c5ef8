"""The head and the cross-entropy in one, a chunk of positions at a time.

Logits are the largest tensor of a training step: 4096 positions of a 128k vocabulary take 2 GiB in fp32, and autograd
would keep several of them. Here only positions with a label come in, a chunk of logits exists at a time, and its
gradient is made while it exists, so that the backward holds nothing larger than the hidden states. The idea is that of
Liger's fused linear cross-entropy (Hsu et al. 2024, arXiv:2410.10989); the chunks are ours so that a frozen head, a
trained head, a tied one, a soft cap and a scale all take the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Raw logits [c, vocabulary], targets [c], soft cap, scale -> loss sum (0-d) and its derivative by the raw logits.
Score = Callable[[Tensor, Tensor, float | None, float], tuple[Tensor, Tensor]]

# What one chunk of fp32 logits may take. On a GPU larger chunks keep the products efficient; on a CPU the chunk should
# stay in the last-level cache.
CHUNK_BYTES = {"cpu": 32 << 20, "other": 256 << 20}
# Rows of a product's tile on a GPU, where a part of one takes as long as a whole.
TILE = 128


def chunked_cross_entropy(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
    score: Score | None = None,
) -> Tensor:
    """Sum of the cross-entropy of `cap(scale * head(hidden))` against `targets`, in nats.

    Args:
        hidden: [n, h], the hidden states of the supervised positions.
        head: the output layer. A plain `nn.Linear`, frozen or trained, has its gradient made in the forward; any other
            module (a head that carries an adapter) is called again in the backward, chunk by chunk.
        targets: int64 [n]; every one of them counts.
        softcap: c in c * tanh(logits / c) (Gemma 2), or None.
        scale: factor on the logits (Cohere's `logit_scale`, one over Granite's `logits_scaling`).
        chunk: positions at a time; None keeps a chunk of fp32 logits within `CHUNK_BYTES`.
        score: what makes loss and slope of a chunk; None takes `loss_and_slope`, else the same compiled.

    Returns:
        0-d, fp32 (fp64 where hidden is fp64).
    """
    size = chunk or chunk_size(_vocabulary(head), hidden.device, trained=_is_trained(head))
    size = even(len(targets), size, tile=1 if chunk or hidden.device.type == "cpu" else TILE)
    if type(head) is nn.Linear:
        course = _LossArguments(targets, softcap, scale, size, score or loss_and_grad)
        loss: Tensor = _HeadLoss.apply(hidden, head.weight, head.bias, course)
        return loss
    total = hidden.new_zeros((), dtype=_wide(hidden))
    for h, t in zip(hidden.split(size), targets.split(size), strict=True):
        total = total + checkpoint(_plain_loss, h, head, t, softcap, scale, use_reentrant=False)
    return total


@torch.no_grad()
def token_cross_entropy(
    hidden: Tensor, head: nn.Module, targets: Tensor, *, softcap: float | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each position, and whether the likeliest token is the target.

    Args and the order of the work as in `chunked_cross_entropy`.

    Returns:
        (fp32 or fp64 [n], bool [n]); without gradient.
    """
    size = chunk_size(_vocabulary(head), hidden.device)
    losses, hits = [hidden.new_zeros(0, dtype=_wide(hidden))], [targets.new_zeros(0, dtype=torch.bool)]
    for h, t in zip(hidden.split(size), targets.split(size), strict=True):
        logits = _logits(head(h), softcap, scale)
        losses.append(F.cross_entropy(logits, t, reduction="none"))
        hits.append(logits.argmax(-1) == t)
    return torch.cat(losses), torch.cat(hits)


def chunk_size(vocabulary: int, device: torch.device, *, trained: bool = False) -> int:
    """Positions whose fp32 logits fit the budget of the device.

    A `trained` head has its gradient added up once a chunk, [vocabulary, h] in fp32: on a GPU that takes longer than
    the products of a small chunk, so it gets four times the room.
    """
    if device.type == "cpu":
        return max(16, CHUNK_BYTES["cpu"] // (4 * vocabulary))
    rows = CHUNK_BYTES["other"] * (4 if trained else 1) // (4 * vocabulary)
    return max(16, rows // TILE * TILE or rows)


def even(count: int, size: int, *, tile: int = 1) -> int:
    """The size of as many chunks as `size` makes of `count`, but all alike: a compiled score has no small last one.

    With a `tile` all but the last are whole tiles, unless one position alone would be left for the last: a compiler makes
    another graph for a dimension of 1.
    """
    alike = -(-count // max(1, -(-count // size))) or 1
    whole = -(-alike // tile) * tile
    return alike if count % whole == 1 or whole > size else whole


def _is_trained(head: nn.Module) -> bool:
    return any(p.requires_grad for p in head.parameters())


def _vocabulary(head: nn.Module) -> int:
    if not isinstance(head, nn.Linear):
        raise TypeError(f"the head is a {type(head).__name__}; an nn.Linear or a subclass of it is needed")
    return head.out_features


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _logits(raw: Tensor, softcap: float | None, scale: float) -> Tensor:
    logits = raw.to(_wide(raw))
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _plain_loss(hidden: Tensor, head: nn.Module, targets: Tensor, softcap: float | None, scale: float) -> Tensor:
    return F.cross_entropy(_logits(head(hidden), softcap, scale), targets, reduction="sum")


class _LossArguments(NamedTuple):
    """What `_HeadLoss` is given beside its differentiable inputs; `size` positions make a chunk."""

    targets: Tensor
    softcap: float | None
    scale: float
    size: int
    score: Score


class _HeadLoss(torch.autograd.Function):
    """Loss sum and its gradients in one pass over chunks of logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, course: _LossArguments) -> Tensor:
        targets, softcap, scale, size, score = course
        wide = _wide(hidden)
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        total = hidden.new_zeros((), dtype=wide)
        d_hidden = torch.empty_like(hidden) if for_hidden else None
        # A sum over many chunks in bf16 would lose what the later ones add.
        d_weight = torch.zeros_like(weight, dtype=wide) if for_weight else None
        d_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and for_bias else None
        for start in range(0, hidden.shape[0], size):
            span = slice(start, start + size)
            raw = F.linear(hidden[span], weight, bias)
            loss, slope = score(raw, targets[span], softcap, scale)
            total += loss
            if d_hidden is not None:
                d_hidden[span] = slope @ weight
            if d_weight is not None:
                d_weight += slope.T @ hidden[span]
            if d_bias is not None:
                d_bias += slope.sum(0, dtype=wide)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        of_weight, of_bias = ctx.dtypes
        return (
            None if d_hidden is None else (d_hidden * grads[0]).to(d_hidden.dtype),
            None if d_weight is None else (d_weight * grads[0]).to(of_weight),
            None if d_bias is None else (d_bias * grads[0]).to(of_bias),
            None,
        )


def loss_and_grad(raw: Tensor, targets: Tensor, softcap: float | None, scale: float) -> tuple[Tensor, Tensor]:
    """Loss sum of a chunk and its derivative by the raw logits, in their dtype; `raw` is [c, vocabulary]."""
    # raw belongs to this chunk alone, so the wide copy and all after it work in place.
    logits = raw.to(_wide(raw))
    if scale != 1.0:
        logits = logits.mul_(scale)
    bend = None
    if softcap is not None:
        logits = logits.div_(softcap).tanh_()
        bend = 1 - logits * logits
        logits = logits.mul_(softcap)
    # One exponential serves the sum and the probabilities: 2.4 times as fast as logsumexp and then exp.
    column = targets.unsqueeze(1)
    largest, picked = logits.amax(-1, keepdim=True), logits.gather(1, column)
    slope = logits.sub_(largest).exp_()
    total = slope.sum(-1, keepdim=True)
    loss = (total.log().add_(largest) - picked).sum()
    slope.div_(total)
    if torch.compiler.is_compiling():
        # Fused into the kernel that writes the slope; for a scatter the compiler would first write it out in fp32.
        slope = slope - (torch.arange(slope.shape[1], device=slope.device) == column).to(slope.dtype)
    else:
        slope.scatter_add_(1, column, slope.new_full((), -1.0).expand(len(targets), 1))
    if bend is not None:
        slope.mul_(bend)
    if scale != 1.0:
        slope.mul_(scale)
    return loss, slope.to(raw.dtype)
