"""The trial of memory on several ranks: the one with the least room decides for all."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from ranks import run_ranks
from runtime.test_plan import Alike, Small, trial_plan
from tunesmith.distributed.ranks import ONE_PROCESS, Ranks, join_ranks
from tunesmith.errors import MachineError, TunesmithError
from tunesmith.planning.calibrate import calibrate_recompute
from tunesmith.planning.run_plan import MemoryEstimate

pytestmark = pytest.mark.slow

LAYER = 41_200  # bytes that a layer of `Alike` keeps, which has eight


class Shared(Small):
    """A device on which something else of this rank holds `held` bytes."""

    def __init__(self, size: int, held: int) -> None:
        super().__init__(size)
        self.held = held

    def peak(self) -> int:
        return super().peak() + self.held


def trial(size: int, held: int, ranks: Ranks, *, shares: bool = False) -> int:
    """How many layers recompute where `held` bytes of a pretended device are taken already."""
    model, meter, budget = Alike(), Shared(size, held), 10 * LAYER
    estimate = MemoryEstimate(128, 0, recomputed_layer=400)
    batch = SimpleNamespace(input_ids=torch.zeros(1, 128))
    with torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda t: t):
        plan = calibrate_recompute(
            model, trial_plan(estimate), batch, meter, budget=budget, ranks=ranks, shares=shares
        )
    return plan.recomputed_layers


def trial_of_rank(sizes: list[int], held: list[int], shares: bool) -> int | str:
    rank = int(os.environ["RANK"])
    try:
        with join_ranks() as ranks:
            return trial(sizes[rank], held[rank], ranks, shares=shares)
    except TunesmithError as error:
        return type(error).__name__


def test_all_ranks_recompute_what_the_least_room_needs():
    held = [0, 5 * LAYER]
    alone = [trial(10**9, held_here, ONE_PROCESS) for held_here in held]
    assert alone[0] == 0 < alone[1] < 8
    assert run_ranks(2, trial_of_rank, [10**9] * 2, held, True) == [alone[1]] * 2


def test_where_nothing_fits_all_ranks_that_share_a_model_end():
    """None can try again: others may wait for a part of the one that has no room."""
    found = run_ranks(2, trial_of_rank, [10**9, 5 * LAYER], [0, 0], True)
    assert found == ["OtherRankError", MachineError.__name__]
