"""Functions and classes for the forward of modules whose parameters or vocabulary are sharded over
ranks.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tunesmith.distributed.torch_private import collective

T = TypeVar("T")


def local_part(tensor: T) -> T:
    """Return this rank's shard of a DTensor as a plain tensor. Return any other value unchanged.

    Gradients flow back to the DTensor. Forward passes use the local shard, because operations on
    DTensors would insert collectives.
    """
    return cast("T", tensor.to_local()) if isinstance(tensor, DTensor) else tensor


def sharding_groups(param: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """Return the process groups over which a parameter is sharded, or () if it is not sharded."""
    if not isinstance(param, DTensor):
        return ()
    mesh = param.device_mesh
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(param.placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    )


class VocabularyShard(NamedTuple):
    """The range of tokens whose logits this rank computes, if the vocabulary is sharded.

    The range starts at `first` and has as many tokens as the local output layer has rows. For each
    position the ranks exchange three numbers: the largest logit, the sum of the exponentials, and
    the target's logit, which only one rank has (Shoeybi et al. 2019, arXiv:1909.08053). `softmax`
    and `most_likely` are collective calls.

    Attributes:
        first: the first token of this rank.
        group: the name of the process group whose ranks share the vocabulary.
    """

    first: int
    group: str

    def softmax(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the cross-entropy of each position and the probabilities of this rank's tokens.

        Args:
            logits: logits of this rank's tokens, [c, local tokens], in fp32 or wider. They are
                overwritten.
            targets: target tokens, int64 [c]. Any token of the entire vocabulary is allowed.

        Returns:
            The cross-entropy [c, 1] and the probabilities [c, local tokens].
        """
        column, inside = self._columns(targets, logits)
        # If another rank has the target, `column` is clamped to a valid column, and the value from
        # this column is replaced by 0.
        picked = logits.gather(1, column).where(inside, 0)
        largest = collective("all_reduce", logits.amax(-1, keepdim=True), "max", self.group)
        # Subtract the largest logit, so that no exponential overflows.
        exps = logits.sub_(largest).exp_()
        # Sum the exponentials and the target's logit over the ranks in one collective.
        sums = torch.cat([exps.sum(-1, keepdim=True), picked], 1)
        total, picked = collective("all_reduce", sums, "sum", self.group).split(1, 1)
        return total.log() + largest - picked, exps.div_(total)

    def subtract_one_hot(self, probabilities: Tensor, targets: Tensor) -> None:
        """Subtract 1 from the probability of each position's target, in place.

        Only the rank whose shard contains the target changes its probabilities.
        """
        column, inside = self._columns(targets, probabilities)
        # Add -1 in the target's column, or 0 if another rank has the target.
        probabilities.scatter_add_(1, column, -inside.to(probabilities.dtype))

    def most_likely(self, logits: Tensor) -> Tensor:
        """Return the token with the largest logit of each position, int64 [c].

        If several tokens have the largest logit, return the smallest token.

        Args:
            logits: logits of this rank's tokens, [c, local tokens].
        """
        # If several logits of this rank are equal, `max` returns the first of them. The "min"
        # reduction below selects the first over all ranks.
        largest, token = logits.max(-1)
        global_largest = collective("all_reduce", largest, "max", self.group)
        # A rank that does not have the largest logit contributes a number that is larger than any
        # token id.
        none = torch.iinfo(torch.int64).max
        token = (token + self.first).where(largest == global_largest, none)
        return collective("all_reduce", token, "min", self.group)

    def _columns(self, targets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the column of each target in `logits`, and whether this rank has the target.

        Both have the shape [c, 1]. If another rank has the target, its column is clamped to a valid
        column.
        """
        column = targets.unsqueeze(1) - self.first
        last = logits.shape[1] - 1
        return column.clamp(0, last), (column >= 0) & (column <= last)


class ShardedHead(nn.Module):
    """Mixin for an output layer (`nn.Linear`) that has only the rows of the tokens in `shard`."""

    shard: VocabularyShard


def shard_of(head: nn.Module) -> VocabularyShard | None:
    """Return the range of tokens that this rank has of a sharded head, or None if the head is not
    sharded.
    """
    return head.shard if isinstance(head, ShardedHead) else None


class GatheredHead(nn.Module):
    """Mixin for an output layer (`nn.Linear`) that is sharded by FSDP.

    FSDP gathers the weight before `compute`, as it does before `forward`.
    """

    def compute(
        self, function: Callable[..., Tensor], hidden: Tensor, *arguments: object, **options: object
    ) -> Tensor:
        """Return the result of `function(hidden, head, ...)`. While the function runs, the weight
        of the head is gathered.
        """
        return function(hidden, self, *arguments, **options)


def compute_with_head(
    function: Callable[..., Tensor],
    hidden: Tensor,
    head: nn.Module,
    *arguments: object,
    **options: object,
) -> Tensor:
    """Return `function(hidden, head, ...)`.

    If FSDP shards the head, its weight is gathered first.
    """
    if isinstance(head, GatheredHead):
        return head.compute(function, hidden, *arguments, **options)
    return function(hidden, head, *arguments, **options)
