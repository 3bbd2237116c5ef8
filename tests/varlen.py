"""An operator of varlen attention's signature for the CPU, with our own products inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.model.layers import attention
from tunesmith.model.layers.documents import Documents


@torch.library.custom_op("tunesmith_test::varlen", mutates_args=())
def varlen(
    q: Tensor, k: Tensor, v: Tensor, edges: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    assert int(edges.diff().max()) <= longest
    return attention._products(q, k, v, attention.Rule(Documents(edges, longest), scale, window))


@varlen.register_fake
def _(q, k, v, edges, longest, scale, window):
    return torch.empty_like(q)


def _keep(ctx, inputs, output):
    *tensors, ctx.longest, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors)


@torch.library.custom_op("tunesmith_test::varlen_backward", mutates_args=())
def varlen_backward(
    d: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edges: Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = attention._products(*leaves, attention.Rule(Documents(edges, longest), scale, window))
        return list(torch.autograd.grad(out, leaves, d))


@varlen_backward.register_fake
def _(d, q, k, v, edges, longest, scale, window):
    return [torch.empty_like(t) for t in (q, k, v)]


def _back(ctx, d):
    return *varlen_backward(
        d.contiguous(), *ctx.saved_tensors, ctx.longest, ctx.scale, ctx.window
    ), *[None] * 4


varlen.register_autograd(_back, setup_context=_keep)


@pytest.fixture
def varlen_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention takes the way of CUDA."""

    def varlen_attn(q, k, v, edges, _, longest, __, **others: Any) -> Tensor:
        left, right = others["window_size"]
        assert right == 0
        return varlen(q, k, v, edges, longest, others["scale"], None if left < 0 else left + 1)

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    chosen = ("varlen", "for this test")
    monkeypatch.setattr(attention, "select_attention_backend", lambda *_, **__: chosen)
    # Which is what choosing it on a GPU has tried.
    monkeypatch.setattr(attention, "fits_varlen", lambda *_: True)
