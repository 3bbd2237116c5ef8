"""All-gather and reduce-scatter of activation rows with autograd support.

The backward of the all-gather is the reduce-scatter, and vice versa.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tunesmith.distributed.torch_private import SavingContext, collective


class RankGroup(NamedTuple):
    """Name and size of a process group, and this rank's number in the group. Unlike a ProcessGroup
    object, these values can be constants of a compiled graph.
    """

    name: str
    size: int
    rank: int


def gather_rows(x: Tensor, group: RankGroup) -> Tensor:
    """Gather the rows of all ranks in rank order: [n, ...] -> [ranks * n, ...].

    All ranks must have the same n. Forward and backward are collective calls.
    """
    rows: Tensor = _Exchange.apply(x, group, True)
    return rows


def scatter_sum(x: Tensor, group: RankGroup) -> Tensor:
    """Sum over the ranks and return this rank's rows of the sum: [ranks * n, ...] -> [n, ...].

    Forward and backward are collective calls.
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
