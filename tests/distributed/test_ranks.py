"""What ranks share before and after a step."""

from __future__ import annotations

import os
import signal
import time
from threading import Timer
from typing import Any
from unittest import mock

import pytest
import torch
from torch import distributed as dist
from torch._C._distributed_c10d import ErrorType
from torch.distributed import distributed_c10d
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed import fake_pg

from errors import refuses
from ranks import run_ranks
from tunesmith.distributed.ranks import (
    COLLECTIVE_TIMEOUT,
    REPORT_S,
    WATCHDOG_SETTINGS,
    Ranks,
    choose_gpu,
    join_ranks,
    reported_once_a_node,
)
from tunesmith.distributed.torch_private import find_nccl_error
from tunesmith.distributed.vocab_parallel import sharding_groups
from tunesmith.errors import DataError, MachineError, OtherRankError, RecipeError, TunesmithError
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
        return (
            ranks.broadcast_object(ranks.rank),
            ranks.all_gather_object(ranks.rank),
            raised,
            mesh.data_rank,
            mesh.tensor_rank,
            limits,
            ranks.broadcast_number(0.1 + ranks.rank),
        )


@pytest.mark.slow
def test_ranks_share_values_and_errors():
    found = run_ranks(4, shared)
    assert [f[0] for f in found] == [0] * 4
    assert all(f[1] == [0, 1, 2, 3] for f in found)
    names = [f[2][0] for f in found]
    assert names == ["OtherRankError", "DataError", "OtherRankError", "OtherRankError"]
    assert {f[2][2] for f in found} == {OtherRankError("", exit_code=2).exit_code}
    assert "rows of 1" in found[0][2][1]
    assert [f[3] for f in found] == [0, 0, 1, 1]
    assert [f[4] for f in found] == [0, 1, 0, 1]
    assert [f[5] for f in found] == [
        {COLLECTIVE_TIMEOUT}
    ] * 4  # of all groups: torch gives a mesh's half an hour
    assert [f[6] for f in found] == [0.1] * 4


def test_a_later_training_of_a_process_takes_its_own_groups():
    """Both tensor groups of rank 6 are ranks 6 and 7, but the group names of the first training are
    gone in the second.
    """
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
    ("count", "shown", "local_rank", "taken"),
    [
        (8, None, 3, 3),
        (4, "4,5,6,7", 3, 3),
        (1, "3", 3, 0),
        (1, None, 0, None),
        (2, "0,1", 3, None),
    ],
)
def test_a_rank_takes_its_gpu_or_the_only_one_that_it_is_shown(
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    shown: str | None,
    local_rank: int,
    taken: int | None,
):
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    if taken is not None:
        choose_gpu(local_rank, 4)
        assert chosen == [taken]
        return
    with refuses(MachineError, names=["4 ranks", count], fix=[f"--nproc-per-node {count}"]):
        choose_gpu(local_rank, 4)


def test_nccls_watchdog_ends_no_process_unless_the_user_wants_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        "tunesmith.distributed.ranks.choose_gpu", lambda local_rank, local_world: None
    )
    rank = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    names = [f"TORCH_NCCL_{name}" for name in WATCHDOG_SETTINGS]
    with mock.patch.dict(os.environ, rank | {names[0]: "3"}):
        os.environ.pop("MASTER_ADDR", None)
        with refuses(MachineError, names=["MASTER_ADDR"]), join_ranks():
            pass
        assert [os.environ[name] for name in names] == ["3", "0", "0", "0"]


@pytest.mark.parametrize(
    ("error", "found"), [(ErrorType.SUCCESS, ""), (ErrorType.COMM_ERROR, "NCCL: COMM_ERROR")]
)
def test_an_error_of_nccl_is_found_in_any_group(
    monkeypatch: pytest.MonkeyPatch, error: ErrorType, found: str
):
    def group(**errors: ErrorType | None) -> Any:
        """A process group with backends that have these errors; gloo's has none to ask for."""
        backends = {
            name: mock.Mock(**{"get_error.return_value": value}) for name, value in errors.items()
        }
        for name, backend in backends.items():
            backend.name.return_value = name
        return mock.Mock(_device_types=[*backends], _get_backend=backends.__getitem__)

    fine = group(gloo=None, nccl=ErrorType.SUCCESS)
    groups = [group(gloo=None), fine, group(gloo=None, nccl=error)]
    monkeypatch.setattr(distributed_c10d, "_world", mock.Mock(pg_map=dict.fromkeys(groups)))
    assert find_nccl_error() == found


def test_a_rank_leaves_the_report_to_the_first_of_its_node(monkeypatch: pytest.MonkeyPatch):
    """A launcher stops all ranks as soon as one ends, and would stop it before it has reported."""
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    pause = 0.5
    with StopRequest() as request:
        request.defer_signals()
        Timer(pause, os.kill, (os.getpid(), signal.SIGTERM)).start()
        start = time.monotonic()
        with pytest.raises(OtherRankError), reported_once_a_node():
            raise RecipeError("no such key")
        assert pause - 0.1 < time.monotonic() - start < REPORT_S / 2
