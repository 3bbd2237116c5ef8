"""What ranks share before and after a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed import distributed_c10d

from ranks import run_ranks
from tunesmith.cli.main import framed
from tunesmith.errors import DataError, MachineError, OtherRankError, TunesmithError
from tunesmith.parallel.mesh import Mesh, MeshShape
from tunesmith.ranks import PATIENCE, Ranks, join_ranks


def test_one_process_shares_with_itself():
    with join_ranks() as ranks:
        assert ranks == Ranks()
        assert ranks.share("a") == "a"
        assert ranks.gather(1) == [1]
        with pytest.raises(DataError), ranks.together():
            raise DataError("broken")


def shared() -> tuple[object, ...]:
    with join_ranks() as ranks:
        raised = None
        try:
            with ranks.together():
                if ranks.rank >= 1:
                    raise DataError(f"rows of {ranks.rank}")
        except TunesmithError as error:
            raised = type(error).__name__, error.what, error.exit_code
        order = []
        with ranks.node_leader_first():
            order.append(ranks.rank)
        mesh = Mesh.of(MeshShape(1, 2, 2), "cpu")
        groups: Any = [*distributed_c10d._world.pg_map]
        limits = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
        return ranks.share(ranks.rank), ranks.gather(ranks.rank), raised, mesh.data_rank, mesh.tensor_rank, limits


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
    assert [f[5] for f in found] == [{PATIENCE}] * 4  # of all groups: torch gives a mesh's half an hour


def test_a_command_leaves_it_to_the_other_rank_to_tell_its_error(capsys: pytest.CaptureFixture[str]):
    def fail() -> int:
        raise OtherRankError("rank 1 on b failed", exit_code=2)

    assert framed(fail, process=False) == 2
    assert capsys.readouterr().err == ""


def test_an_address_that_no_launcher_has_set_is_named(monkeypatch: pytest.MonkeyPatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(MachineError, match="MASTER_ADDR"), join_ranks():
        pass
