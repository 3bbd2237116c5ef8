"""Attention sinks (GPT-OSS; Xiao et al. 2023, arXiv:2309.17453) for a kernel without sinks.

A sink is an additional score of each head without a value: softmax over [scores, sink]. Let lse' =
logaddexp(lse, sink). The output with the sink is y = out * exp(lse - lse'), where `out` and `lse`
are results of the kernel. The backward calls the kernel's backward with y and lse' instead of out
and lse. This is correct, because FlashAttention's formula dS = P * (dO V^T - rowsum(dO * O)) with P
= exp(S - lse) also holds for y and lse'. If autograd differentiated the scaling of the output
instead, the gradient through lse would be lost, because the kernel's backward ignores it. The error
of dq and dk would be a third.
"""

import torch
from torch import Tensor

from tunesmith.distributed.torch_private import SavingContext, varlen_backward, varlen_forward


class _SinkContext(SavingContext):
    options: tuple[int, float, int | None]  # (longest, scale, window)


class SinkAttention(torch.autograd.Function):
    """Causal attention within documents, with a sink for each head.

    Args of `apply`: q: [n, heads, d]. k and v are [n, kv heads, d]. sinks: [heads], any dtype.
    edges: int32 [documents + 1]. longest: number of tokens of the longest document. window: number
    of tokens that a query attends to, including itself. None means all earlier tokens of its
    document.

    Returns:
        [n, heads, d] in the dtype of q.
    """

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
        # `total` is lse' in the module docstring.
        total = torch.logaddexp(lse, sinks.float().unsqueeze(1))  # [heads, n], fp32
        # [heads, n] -> [n, heads, 1]
        share = torch.exp(lse - total).transpose(0, 1).unsqueeze(2)
        y = (out * share).to(q.dtype)
        # Save y and lse' instead of the kernel's output and lse. The module docstring explains the
        # reason.
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
        # Probability of the sink in the softmax: [heads, n] -> [n, heads].
        probability = torch.exp(sinks.float().unsqueeze(1) - total)
        probability = probability.transpose(0, 1)
        # The value of a sink is zero, so dS = -P_sink * rowsum(dy * y).
        d_sinks = -(probability * delta).sum(0)
        return dq, dk, dv, d_sinks.to(sinks.dtype), None, None, None, None
