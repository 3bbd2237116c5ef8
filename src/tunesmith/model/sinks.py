"""Attention sinks (GPT-OSS; Xiao et al. 2023, arXiv:2309.17453) with a kernel that has none.

A sink is one more score of each head, without a value: softmax over [scores, sink]. With lse' =
logaddexp(lse, sink), the kernel's output times exp(lse - lse') is the output with the sink, y. Its
backward is the kernel's own, called with y and lse' in place of its output and lse: FlashAttention
computes dS = P * (dO V^T - rowsum(dO * O)) with P = exp(S - lse), and both hold for y and lse'.
Scaling the output under autograd instead would lose the gradient that passes through lse, which
the kernel's backward ignores: dq and dk would be off by a third.
"""

import torch
from torch import Tensor

from tunesmith.distributed.torch_private import SavingContext, varlen_backward, varlen_forward


def varlen_with_sinks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor,
    edges: Tensor,
    *,
    longest: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """Causal attention within documents, each head with a sink.

    Args:
        q: [n, heads, d]; k and v: [n, kv heads, d].
        sinks: [heads], any dtype.
        edges: int32 [documents + 1].
        window: how many tokens a query sees, itself counted; None sees all before it.

    Returns [n, heads, d] in q's dtype.
    """
    return _SinkAttention.apply(q, k, v, sinks, edges, longest, scale, window)


class _SinkContext(SavingContext):
    options: tuple[int, float, int | None]  # longest, scale and window


class _SinkAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _SinkContext,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor,
        edges: Tensor,
        longest: int,
        scale: float,
        window: int | None,
    ) -> Tensor:
        out, lse, random_state = varlen_forward(
            q, k, v, edges, longest=longest, scale=scale, window=window
        )
        # lse' of the docstring.
        total = torch.logaddexp(lse, sinks.float().unsqueeze(1))  # [heads, n], fp32
        # [heads, n] -> [n, heads, 1]
        share = torch.exp(lse - total).transpose(0, 1).unsqueeze(2)
        y = (out * share).to(q.dtype)
        # y and lse' in the places of the kernel's output and lse: see the top of the file.
        ctx.save_for_backward(q, k, v, sinks, edges, y, total, random_state)
        ctx.options = (longest, scale, window)
        return y

    @staticmethod
    def backward(ctx: _SinkContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, edges, y, total, random_state = ctx.saved_tensors
        longest, scale, window = ctx.options
        dy = grads[0].contiguous()
        dq, dk, dv = varlen_backward(
            dy, q, k, v, y, total, edges, random_state, longest=longest, scale=scale, window=window
        )
        delta = (dy.float() * y.float()).sum(2)  # [n, heads]
        # What the softmax gives the sink: [n, heads].
        probability = torch.exp(sinks.float().unsqueeze(1) - total).transpose(0, 1)
        # Its value is zero, so dS = -P_sink * rowsum(dy * y).
        d_sinks = -(probability * delta).sum(0).to(sinks.dtype)
        return dq, dk, dv, d_sinks, None, None, None, None
