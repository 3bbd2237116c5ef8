"""Sum of the gradients over the ranks, for data parallelism with a full copy of the model on each
rank.

If all weights are trained, the all-reduce of a large gradient starts as soon as the gradient is
complete, while the last backward of the step is still running. Small gradients and the gradients of
an adapter are summed together after the backward.

torch's DistributedDataParallel is not used, because its buckets have the dtype of the weights. With
16-bit weights, gradients would be accumulated and reduced in 16 bits, which changed the loss by
3.6e-2. This module reduces fp32 gradients in place, without copying them into buckets, and reduces
16-bit gradients in fp32 pieces. As in DistributedDataParallel (Li et al. 2020, arXiv:2006.15704),
all ranks must complete their gradients in the same order. This is the case, because all ranks have
the same autograd graph. The projector of a vision model is an exception, because only micro batches
with pictures use it. Therefore the projector's gradients are summed after the backward.
"""

from collections import deque
from collections.abc import Container, Iterable, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.optim.adamw import HALF, ParameterState
from tunesmith.parallel.mesh import all_reduce_together

# Elements per piece, and maximum number of pieces that are reduced at the same time. A 16-bit
# gradient is summed in pieces, because each piece needs an fp32 copy and the copies take memory.
GRADIENT_PIECE = 1 << 24
MAX_GRADIENT_PIECES = 4
# Minimum number of elements of a gradient that is reduced by its own collective: 256 KiB in fp32.
# Smaller gradients are reduced together.
MIN_OVERLAPPED_ELEMENTS = 1 << 16


class GradientSum:
    """Object that sums the gradients of a step over the ranks of a group. It does nothing if
    `group` is None.

    Call `start` before the last backward of a step and `finish` after it, on all ranks. Create the
    object after the optimizer: the optimizer's hooks move gradients to the fp32 master weights and
    must run before the hooks of this object.

    Args:
        parts: the optimizer's state of each trained parameter.
        group: the ranks that have a copy of the model, or None for one process.
        beside_backward: whether large gradients are reduced during the backward.
        late: parameters whose gradients are always summed after the backward, because only ranks
            with pictures compute these gradients.
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
        # All-reduces that may still be running: torch's handle, the gradient or a piece of it, and
        # the tensor that is reduced, which is this piece or an fp32 copy of it.
        self.pending: deque[tuple[dist.Work, Tensor, Tensor]] = deque()
        # Names of the parameters whose all-reduce has been started in this step.
        self.begun: set[str] = set()
        if group is None or not beside_backward:
            return
        for part in parts:
            if part.weight.numel() >= MIN_OVERLAPPED_ELEMENTS and part.param not in late:
                part.param.register_post_accumulate_grad_hook(partial(self._begin, part))

    def start(self) -> None:
        """Record that the next backward is the last one of the step, after which its gradients are
        complete.
        """
        self.is_last_backward = True

    @torch.no_grad()
    def _begin(self, part: ParameterState, param: Tensor) -> None:
        """Start the all-reduce of a gradient. Autograd calls this hook after accumulating it."""
        if not self.is_last_backward:
            return
        # With fp32 master weights the gradient is in `part.grad`: the optimizer's hook, which runs
        # before this hook, has moved it there.
        gradient = part.grad if part.has_master else local_part(param.grad)
        assert gradient is not None
        # A gradient that is not contiguous has no flat view, so `finish` sums it later.
        if not gradient.is_contiguous():
            return
        self.begun.add(part.name)
        for piece in gradient.view(-1).split(GRADIENT_PIECE):
            # Sum in fp32: a sum in 16 bits would be rounded after each rank.
            total = piece.float() if piece.dtype in HALF else piece
            work = dist.all_reduce(total, group=self.group, async_op=True)
            assert work is not None
            self.pending.append((work, piece, total))
            # Limit the number of fp32 copies that exist at the same time.
            if total is not piece and len(self.pending) > MAX_GRADIENT_PIECES:
                self._complete_oldest()

    @torch.no_grad()
    def finish(self, gradients: Mapping[str, Tensor]) -> None:
        """Sum the remaining gradients of a step and wait until all sums are complete.

        Args:
            gradients: all gradients of the step by parameter name.
        """
        while self.pending:
            self._complete_oldest()
        # `gradients` has the order of the optimizer's parameters, which is the same on all ranks.
        rest = [gradient for name, gradient in gradients.items() if name not in self.begun]
        self.is_last_backward = False
        self.begun.clear()
        all_reduce_together(rest, self.group)

    def _complete_oldest(self) -> None:
        """Wait for the all-reduce that was started first. On a GPU only the current stream waits,
        and the CPU does not.
        """
        work, part, total = self.pending.popleft()
        work.wait()
        if total is not part:
            part.copy_(total)
