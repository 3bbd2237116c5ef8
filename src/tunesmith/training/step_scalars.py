"""Values of one step, such as the loss. They are summed over the ranks in one collective and copied
to the host.

A signal or an error may occur on only one rank. If only this rank stopped, the other ranks would
wait for it in a collective. Therefore the collective that sums the loss also sums counts of stop
requests and errors, so that all ranks know them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tunesmith.parallel.mesh import Mesh
from tunesmith.runtime.transfer import AsyncScalars
from tunesmith.training.stop_control import RankStatus


@dataclass(frozen=True)
class StepNumbers:
    """Loss, metrics, gradient norm and rank status of a step, as numbers on the host."""

    loss: float
    metrics: dict[str, float]  # metrics of the method
    grad_norm: float
    status: RankStatus | None  # sum over all ranks, or None with one process


class StepScalars:
    """Loss and metrics of a step. They are 0-d tensors on the device until `read` returns them as
    numbers.

    With several ranks, call `all_reduce` first. Then call `copy_to_host`, and `read` last.
    """

    def __init__(self, loss: Tensor, metrics: Mapping[str, Tensor]) -> None:
        self.metric_names = list(metrics)
        self.values: Sequence[Tensor] = [loss, *metrics.values()]
        self.has_status = False

    def all_reduce(self, status: RankStatus, mesh: Mesh) -> None:
        """Sum the values and each rank's status over all ranks. This is a collective call."""
        packed = self.pack(status, mesh)
        dist.all_reduce(packed)
        self.values = packed.unbind()
        self.has_status = True

    def pack(self, status: RankStatus, mesh: Mesh) -> Tensor:
        """Return loss, metrics and status as one tensor, float64 [1 + metrics + fields of
        RankStatus].
        """
        # All ranks of a tensor-parallel group have the same loss. To count it once, all ranks
        # except the first one of the group add zeros.
        values = torch.stack([value.double() for value in self.values]) * (mesh.tensor_rank == 0)
        # Use pinned memory: a copy from pageable memory would wait for all work of the device.
        pinned = torch.tensor(status, dtype=values.dtype, pin_memory=values.is_cuda)
        return torch.cat([values, pinned.to(values.device, non_blocking=True)])

    def copy_to_host(self, grad_norm: Tensor) -> None:
        """Start the copy of the values to the host. The gradient norm is the last value."""
        self.on_host = AsyncScalars(*self.values, grad_norm.to(self.values[0].device))

    def read(self) -> StepNumbers:
        """Return the values as numbers. This waits only until the device has computed them, not for
        later steps.
        """
        # The values are in the order in which `pack` and `copy_to_host` have stored them.
        values = self.on_host.read()
        after_metrics = 1 + len(self.metric_names)
        metrics = dict(zip(self.metric_names, values[1:after_metrics], strict=True))
        status = RankStatus(*values[after_metrics:-1]) if self.has_status else None
        return StepNumbers(values[0], metrics, grad_norm=values[-1], status=status)
