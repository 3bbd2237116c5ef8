"""Rows of activations gathered over the ranks of a group, and sums of them scattered, with
gradients: each is the gradient of the other.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tunesmith.distributed.torch_private import SavingContext, collective


class RankGroup(NamedTuple):
    """A process group as one of its ranks sees it, in constants of a compiled graph."""

    name: str
    size: int
    rank: int


def gather_rows(x: Tensor, group: RankGroup) -> Tensor:
    """The rows of all ranks, in their order: [n, ...] -> [ranks * n, ...]; n is one on all ranks.

    A collective call, and another one in the backward.
    """
    rows: Tensor = _Exchange.apply(x, group, True)
    return rows


def scatter_sum(x: Tensor, group: RankGroup) -> Tensor:
    """This rank's rows of the sum over the ranks: [ranks * n, ...] -> [n, ...].

    A collective call, and another one in the backward.
    """
    rows: Tensor = _Exchange.apply(x, group, False)
    return rows


def _exchange(x: Tensor, group: RankGroup, gather: bool) -> Tensor:
    if gather:
        return collective("all_gather_into_tensor", x, group.size, group.name)
    return collective("reduce_scatter_tensor", x, "sum", group.size, group.name)


class _ExchangeContext(SavingContext):
    group: RankGroup
    gather: bool


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _ExchangeContext, x: Tensor, group: RankGroup, gather: bool) -> Tensor:
        ctx.group, ctx.gather = group, gather
        return _exchange(x, group, gather)

    @staticmethod
    def backward(ctx: _ExchangeContext, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _exchange(grads[0], ctx.group, not ctx.gather), None, None
