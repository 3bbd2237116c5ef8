"""The numbers of one step: summed over the ranks in one collective, then copied to the host.

What one rank decides alone, by a signal or an error, would leave the others waiting in a
collective. So the reduction of the loss carries these decisions too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tunesmith.parallel.mesh import Mesh
from tunesmith.runtime.transfer import AsyncScalars


class RankStatus(NamedTuple):
    """One rank's share of the numbers of a step; summed, it is the same on all ranks."""

    stop_requests: float  # 1 where this rank has a stop request
    failed_writes: float  # 1 where the write of a checkpoint failed on this rank
    ends: float  # 1 where the caller of `train` ends the run


@dataclass(frozen=True)
class StepNumbers:
    """The numbers of a step on the host."""

    loss: float
    metrics: dict[str, float]  # the method's
    grad_norm: float
    status: RankStatus | None  # summed over the ranks; None on one process


class StepScalars:
    """Loss and metrics of a step, 0-d tensors on the device, until `read` has them on the host.

    Call `all_reduce` where there are several ranks, then `copy_to_host`, then `read`.
    """

    def __init__(self, loss: Tensor, metrics: Mapping[str, Tensor]) -> None:
        self.metric_names = list(metrics)
        self.values: Sequence[Tensor] = [loss, *metrics.values()]
        self.has_status = False

    def all_reduce(self, status: RankStatus, mesh: Mesh) -> None:
        """Sum over all ranks, with what each says of itself; a collective call."""
        packed = self.pack(status, mesh)
        dist.all_reduce(packed)
        self.values = packed.unbind()
        self.has_status = True

    def pack(self, status: RankStatus, mesh: Mesh) -> Tensor:
        """float64 [1 + metrics + fields of RankStatus]: the loss, the metrics, the status."""
        # All ranks of a tensor group have the same loss, which counts once.
        values = torch.stack([value.double() for value in self.values]) * (mesh.tensor_rank == 0)
        # A copy from pageable memory would wait for all that the device has to do.
        pinned = torch.tensor(status, dtype=values.dtype, pin_memory=values.is_cuda)
        return torch.cat([values, pinned.to(values.device, non_blocking=True)])

    def copy_to_host(self, grad_norm: Tensor) -> None:
        """Begin to copy the numbers, with the gradient norm as the last one."""
        self.on_host = AsyncScalars(*self.values, grad_norm.to(self.values[0].device))

    def read(self) -> StepNumbers:
        """The numbers by name; waits for the step that they are of, and for no later one."""
        # In the order of `pack` and `copy_to_host`.
        values = self.on_host.read()
        after_metrics = 1 + len(self.metric_names)
        metrics = dict(zip(self.metric_names, values[1:after_metrics], strict=True))
        status = RankStatus(*values[after_metrics:-1]) if self.has_status else None
        return StepNumbers(values[0], metrics, grad_norm=values[-1], status=status)
