"""What ranks share before and after a step."""

from __future__ import annotations

import os
import signal
import time
from typing import Any
from unittest import mock

import pytest
import torch
from torch import distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed import fake_pg

from errors import refuses
from ranks import run_ranks
from tunesmith.distributed.ranks import (
    COLLECTIVE_TIMEOUT,
    WATCHDOG_SETTINGS,
    Ranks,
    choose_gpu,
    join_ranks,
)
from tunesmith.distributed.torch_private import find_nccl_error
from tunesmith.distributed.vocab_parallel import sharding_groups
from tunesmith.errors import DataError, MachineError, OtherRankError, TunesmithError
from tunesmith.host.signals import StopRequest
from tunesmith.parallel.mesh import Mesh, MeshShape


def test_one_process_shares_with_itself():
    with join_ranks() as ranks:
        assert ranks == Ranks()
        assert ranks.broadcast_object("a") == "a"
        assert ranks.broadcast_number(0.1) == 0.1
        assert ranks.all_gather_object(1) == [1]
        with pytest.raises(DataError), ranks.raise_on_all_ranks():
            raise DataError("broken")


def shared() -> tuple[object, ...]:
    with join_ranks() as ranks:
        raised = None
        try:
            with ranks.raise_on_all_ranks():
                if ranks.rank >= 1:
                    raise DataError(f"rows of {ranks.rank}")
        except TunesmithError as error:
            raised = type(error).__name__, error.what, error.exit_code
        order = []
        with ranks.local_main_process_first():
            order.append(ranks.rank)
        mesh = Mesh.of(MeshShape(1, 2, 2), "cpu")
        groups: Any = [*distributed_c10d._world.pg_map]
        limits = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
        assert find_nccl_error() == ""
        shared_values = ranks.broadcast_object(ranks.rank), ranks.broadcast_number(0.1 + ranks.rank)
        every = ranks.all_gather_object(ranks.rank)
        return shared_values, every, raised, (mesh.data_rank, mesh.tensor_rank), limits


@pytest.mark.slow
def test_ranks_share_values_and_errors():
    found = run_ranks(4, shared)
    values, every, raised, places, limits = zip(*found, strict=True)
    assert values == ((0, 0.1),) * 4
    assert every == ([0, 1, 2, 3],) * 4
    names, texts, codes = zip(*raised, strict=True)
    assert names == ("OtherRankError", "DataError", "OtherRankError", "OtherRankError")
    assert set(codes) == {OtherRankError("", exit_code=2).exit_code}
    assert "rows of 1" in texts[0]
    assert places == ((0, 0), (0, 1), (1, 0), (1, 1))
    assert limits == ({COLLECTIVE_TIMEOUT},) * 4  # torch's own is half an hour


def left_together(fault: str) -> tuple[str, int]:
    """The error with which a rank leaves a block in which rank 0 acts first, and its code."""
    try:
        with StopRequest(), join_ranks() as ranks:
            pids = ranks.all_gather_object(os.getpid())
            with ranks.raise_on_all_ranks():
                if fault == "error" and ranks.rank == 1:
                    raise DataError("broken")
                with ranks.local_main_process_first():
                    time.sleep(1)  # rank 1 waits in a collective
                    for pid in reversed(pids) if fault == "stop" else ():
                        os.kill(pid, signal.SIGTERM)
    except TunesmithError as error:
        return type(error).__name__, error.exit_code
    return "", 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "left"),
    [
        ("stop", [("StoppedEarlyError", 75)] * 2),
        ("error", [("OtherRankError", 2), ("DataError", 2)]),
    ],
)
def test_ranks_leave_a_block_together_wherever_one_of_them_fails(fault, left):
    assert run_ranks(2, left_together, fault) == left


def test_nccls_watchdog_ends_no_process_unless_the_user_wants_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("tunesmith.distributed.ranks.choose_gpu", lambda *_: None)
    rank = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    names = [f"TORCH_NCCL_{name}" for name in WATCHDOG_SETTINGS]
    with mock.patch.dict(os.environ, rank | {names[0]: "3"}):
        os.environ.pop("MASTER_ADDR", None)
        with refuses(MachineError, names=["MASTER_ADDR"]), join_ranks():
            pass
        assert [os.environ[name] for name in names] == ["3", "0", "0", "0"]


def test_a_later_training_of_a_process_takes_its_own_groups():
    """The group names of the first training are gone in the second."""
    for shape in (MeshShape(2, 2, 2), MeshShape(4, 1, 2)):
        dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=6, world_size=8)
        try:
            mesh = Mesh.of(shape, "cpu")
            param = DTensor.from_local(torch.ones(2, 2), mesh.tensor, [Shard(0)], run_check=False)
            made = param.detach()  # torch caches the mesh of what an operator makes
            assert sharding_groups(made) == (mesh.tensor_group,)
            assert dist.get_process_group_ranks(sharding_groups(made)[0]) == [6, 7]
        finally:
            dist.destroy_process_group()


@pytest.mark.parametrize(
    ("count", "shown", "taken"), [(8, None, 3), (1, "3", 0), (1, None, None), (2, "0,1", None)]
)
def test_a_rank_takes_its_gpu_or_the_only_one_that_it_is_shown(count, shown, taken, monkeypatch):
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    if taken is not None:
        choose_gpu(3, 4)
        assert chosen == [taken]
        return
    with refuses(MachineError, names=["4 ranks", count], fix=[f"--nproc-per-node {count}"]):
        choose_gpu(3, 4)
