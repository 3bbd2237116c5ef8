"""The sum of gradients over ranks that hold whole parameters.

Of a model trained in full the large gradients are summed beside the last backward of a step: as
soon as one is complete, its all-reduce begins. All others, and those of an adapter, are summed in
one piece after it.

torch's DistributedDataParallel does not fit. Its buckets have the weights' dtype, in which
gradients of micro batches would be added up and reduced: a reduction in 16 bits was off by 3.6e-2
in the loss. Here fp32 gradients are reduced where they lie, without a bucket to copy them into, and
16-bit ones in fp32 pieces. As in DistributedDataParallel (Li et al. 2020, arXiv:2006.15704), all
ranks must complete their gradients in the same order. They do, because they have the same graph,
except at the projector: only micro batches with pictures use it. Its gradients are summed last.
"""

from collections import deque
from collections.abc import Container, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.optim.adamw import HALF, ParameterState
from tunesmith.parallel.mesh import all_reduce_together

# 16-bit gradients of copies are summed in fp32 by pieces: elements of one, and how many may be on
# their way.
GRADIENT_PIECE = 1 << 24
MOST_GRADIENT_PIECES = 4
# Of a gradient that is worth a collective of its own: 256 KiB in fp32.
MIN_OVERLAPPED_ELEMENTS = 1 << 16


class PendingSum(NamedTuple):
    """An all-reduce that may still run. `total` is `part` itself, or its copy in fp32."""

    work: dist.Work
    part: Tensor
    total: Tensor


class GradientSum:
    """Sums the gradients of a step over the ranks of `group`; does nothing where that is None.

    Its methods are collective calls: `start` before the last backward of a step, `finish` after it.
    Make it after the optimizer, whose hooks move gradients into those of fp32 masters and must run
    first.

    Args:
        parts: the optimizer's, of all trained parameters.
        beside_backward: begin with large gradients in the backward.
        late: parameters whose gradients are summed after the backward, because only ranks with
            pictures compute them in the backward.
    """

    def __init__(
        self,
        parts: Iterable[ParameterState],
        group: dist.ProcessGroup | None,
        *,
        beside_backward: bool,
        late: Container[nn.Parameter] = frozenset(),
    ) -> None:
        self.group = group
        self.is_last_backward = False
        self.pending: deque[PendingSum] = deque()
        # Names of the parameters whose gradients are summed, or on the way.
        self.begun: set[str] = set()
        if group is None or not beside_backward:
            return
        for part in parts:
            if part.weight.numel() >= MIN_OVERLAPPED_ELEMENTS and part.param not in late:
                part.param.register_post_accumulate_grad_hook(partial(self._begin, part))

    def start(self) -> None:
        """Sum the gradients that the coming backward completes."""
        self.is_last_backward = True

    @torch.no_grad()
    def _begin(self, part: ParameterState, param: Tensor) -> None:
        """A hook of autograd: the gradient of this backward has been added."""
        if not self.is_last_backward:
            return
        # With fp32 masters the optimizer's hook, which ran before this one, has moved the gradient
        # into `part.grad`.
        gradient = part.grad if part.has_master else local_part(param.grad)
        assert gradient is not None
        # `view` needs one run of memory; such a gradient is left to `finish`.
        if not gradient.is_contiguous():
            return
        self.begun.add(part.name)
        for piece in gradient.view(-1).split(GRADIENT_PIECE):
            # Added up in 16 bits, the sum over ranks would be rounded once a rank.
            total = piece.float() if piece.dtype in HALF else piece
            work = dist.all_reduce(total, group=self.group, async_op=True)
            assert work is not None
            self.pending.append(PendingSum(work, piece, total))
            # fp32 copies of a few pieces at a time, not of the whole gradient.
            if total is not piece and len(self.pending) > MOST_GRADIENT_PIECES:
                self._complete_oldest()

    @torch.no_grad()
    def finish(self, gradients: Mapping[str, Tensor]) -> None:
        """Sum what is left of a step's gradients, by the parameter's name.

        All are complete afterwards.
        """
        while self.pending:
            self._complete_oldest()
        # By the order of the optimizer's parameters, which is the same on all ranks.
        rest = [gradient for name, gradient in gradients.items() if name not in self.begun]
        self.is_last_backward = False
        self.begun.clear()
        all_reduce_together(rest, self.group)

    def _complete_oldest(self) -> None:
        """Wait for a sum; on a GPU only the current stream does."""
        work, part, total = self.pending.popleft()
        work.wait()
        if total is not part:
            part.copy_(total)
