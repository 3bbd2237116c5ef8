"""Forwards of a model's modules where ranks hold parts of a parameter or of the vocabulary."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tunesmith.distributed.torch_private import collective

T = TypeVar("T")


def local_part(tensor: T) -> T:
    """This rank's part of a DTensor, which its gradient goes back to; anything else as it is.

    Forwards compute with parts: products of DTensors would make collectives of their own.
    """
    return cast("T", tensor.to_local()) if isinstance(tensor, DTensor) else tensor


def sharding_groups(param: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The groups whose ranks hold the other parts of a parameter; none where it is whole."""
    if not isinstance(param, DTensor):
        return ()
    mesh = param.device_mesh
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(param.placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    )


class VocabularyShard(NamedTuple):
    """The tokens whose logits this rank has: as many as its output layer has rows, from `first` on.

    Ranks share three numbers a position: the largest logit, the sum of the exponentials, and the
    target's logit, which one of them has (Shoeybi et al. 2019, arXiv:1909.08053). Every method is a
    collective call.
    """

    first: int
    group: str  # name of the process group whose ranks have the others

    def softmax(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each position, [c, 1], and the probabilities of this rank's tokens.

        Args:
            logits: [c, own tokens] in fp32 or wider; overwritten.
            targets: int64 [c], tokens of the whole vocabulary.
        """
        column, inside = self._columns(targets, logits)
        # A target of another rank reads a clamped column, and counts as 0 in the sum below.
        picked = logits.gather(1, column).where(inside, 0)
        largest = collective("all_reduce", logits.amax(-1, keepdim=True), "max", self.group)
        # Less the largest, so that no exponential overflows.
        exps = logits.sub_(largest).exp_()
        # Both numbers in one collective: [c, 2].
        sums = torch.cat([exps.sum(-1, keepdim=True), picked], 1)
        total, picked = collective("all_reduce", sums, "sum", self.group).split(1, 1)
        return total.log() + largest - picked, exps.div_(total)

    def subtract_one_hot(self, probabilities: Tensor, targets: Tensor) -> None:
        """Subtract 1 at each position's target, in place, on the rank that has it."""
        column, inside = self._columns(targets, probabilities)
        # -1 in the target's column, or 0 where another rank has it.
        probabilities.scatter_add_(1, column, -inside.to(probabilities.dtype))

    def most_likely(self, logits: Tensor) -> Tensor:
        """The token with the largest logit, the first of several, int64 [c].

        logits: [c, own tokens].
        """
        # The first of equal ones on this rank; `min` below takes the first of all ranks.
        largest, token = logits.max(-1)
        global_largest = collective("all_reduce", largest, "max", self.group)
        # Ranks that do not have it give a token that is larger than any.
        none = torch.iinfo(torch.int64).max
        token = (token + self.first).where(largest == global_largest, none)
        return collective("all_reduce", token, "min", self.group)

    def _columns(self, targets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Each target's column in `logits`, [c, 1], and whether it is there at all."""
        column = targets.unsqueeze(1) - self.first
        last = logits.shape[1] - 1
        return column.clamp(0, last), (column >= 0) & (column <= last)


class ShardedHead(nn.Module):
    """An output layer with the rows of `shard`; a mixin of `nn.Linear`."""

    shard: VocabularyShard


def shard_of(head: nn.Module) -> VocabularyShard | None:
    """The tokens of a head that ranks share; None for a whole one."""
    return head.shard if isinstance(head, ShardedHead) else None


class GatheredHead(nn.Module):
    """An output layer that FSDP gathers for `compute`, as for its forward.

    A mixin of `nn.Linear`.
    """

    def compute(
        self, function: Callable[..., Tensor], hidden: Tensor, *arguments: object, **options: object
    ) -> Tensor:
        """`function(hidden, head, ...)`, which reads the head's weight."""
        return function(hidden, self, *arguments, **options)


def compute_with_head(
    function: Callable[..., Tensor],
    hidden: Tensor,
    head: nn.Module,
    *arguments: object,
    **options: object,
) -> Tensor:
    """`function(hidden, head, ...)`, for which a head that is a group of FSDP's is gathered."""
    if isinstance(head, GatheredHead):
        return head.compute(function, hidden, *arguments, **options)
    return function(hidden, head, *arguments, **options)
