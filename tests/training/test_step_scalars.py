"""The numbers of a step keep their names through the reduction over ranks and the copy to the host."""

from __future__ import annotations

import pytest
import torch

from tunesmith.parallel.mesh import ALONE, Mesh
from tunesmith.training.step_scalars import RankStatus, StepScalars


def scalars_of(loss: float, accuracy: float, margin: float) -> StepScalars:
    metrics = {"accuracy": torch.tensor(accuracy), "margin": torch.tensor(margin)}
    return StepScalars(torch.tensor(loss), metrics)


def test_one_process_has_no_status() -> None:
    scalars = scalars_of(2.0, 0.5, 3.0)
    scalars.copy_to_host(torch.tensor(7.0))
    numbers = scalars.read()
    assert (numbers.loss, numbers.grad_norm) == (2.0, 7.0)
    assert numbers.metrics == {"accuracy": 0.5, "margin": 3.0}
    assert numbers.status is None


@pytest.mark.parametrize("tensor_rank", [0, 1])
def test_the_sum_of_two_ranks(tensor_rank: int) -> None:
    """Of a tensor group one rank's loss counts, and each rank's own status does."""
    first = scalars_of(2.0, 0.5, 3.0)
    second = scalars_of(4.0, 0.25, 1.0)
    mesh = Mesh(tensor_rank=tensor_rank)
    one = first.pack(RankStatus(stop_requests=1.0, failed_writes=0.0, ends=1.0), ALONE)
    other = second.pack(RankStatus(stop_requests=0.0, failed_writes=1.0, ends=0.0), mesh)
    first.values = (one + other).unbind()
    first.has_status = True
    first.copy_to_host(torch.tensor(7.0))
    numbers = first.read()
    counts = tensor_rank == 0
    assert numbers.loss == 2.0 + 4.0 * counts
    assert numbers.metrics == {"accuracy": 0.5 + 0.25 * counts, "margin": 3.0 + 1.0 * counts}
    assert numbers.status == RankStatus(stop_requests=1.0, failed_writes=1.0, ends=1.0)
    assert numbers.grad_norm == 7.0
