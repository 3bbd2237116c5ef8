"""`profile:` leaves for each rank and cycle a trace that tools open, with a memory track."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from errors import refuses
from recipes import make_run
from tunesmith.config.schema import Profile
from tunesmith.errors import UsageError
from tunesmith.metrics.profile import Profiler

CPU = torch.device("cpu")


def work(profiler: Profiler, steps: int) -> None:
    with profiler:
        for _ in range(steps):
            torch.ones(64, 64) @ torch.ones(64, 64)
            profiler.step()


def load(path: Path) -> list[dict]:
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def test_each_cycle_leaves_its_files_and_holds_its_active_steps(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    profiler = Profiler(
        Profile(enabled=True, wait=1, warmup=1, active=3, cycles=2), tmp_path, rank=1, device=CPU
    )
    work(profiler, 20)
    assert [str(warning.message) for warning in recwarn] == []
    folder = tmp_path
    traces = sorted(folder.glob("rank1.*.pt.trace.json.gz"))
    assert len(traces) == len(profiler.traces) == 2
    for trace in traces:
        assert sum(e.get("name") == "aten::mm" and e.get("ph") == "X" for e in load(trace)) == 3


def test_a_run_that_ends_early_still_leaves_what_was_seen(tmp_path: Path) -> None:
    work(
        Profiler(Profile(enabled=True, wait=0, warmup=1, active=50), tmp_path, rank=0, device=CPU),
        5,
    )
    assert len(list(tmp_path.glob("rank0.*.pt.trace.json.gz"))) == 1


def test_two_ranks_share_the_folder(tmp_path: Path) -> None:
    for rank in (0, 1):
        work(
            Profiler(
                Profile(enabled=True, wait=0, warmup=1, active=2), tmp_path, rank=rank, device=CPU
            ),
            4,
        )
    assert {p.name.split(".")[0] for p in tmp_path.glob("*.pt.trace.json.gz")} == {"rank0", "rank1"}


def test_only_the_ranks_that_are_named_record(tmp_path: Path) -> None:
    for rank in (0, 1):
        work(
            Profiler(
                Profile(enabled=True, wait=0, warmup=1, active=2, ranks=(1,)),
                tmp_path,
                rank=rank,
                device=CPU,
            ),
            4,
        )
    assert [p.name.split(".")[0] for p in tmp_path.glob("*.pt.trace.json.gz")] == ["rank1"]


def test_stacks_name_the_python_lines_of_an_operation(tmp_path: Path) -> None:
    for stacks in (False, True):
        settings = Profile(enabled=True, wait=0, warmup=1, active=2, stacks=stacks)
        profiler = Profiler(settings, tmp_path / str(stacks), rank=0, device=CPU)
        work(profiler, 4)
        assert (
            any(
                e.get("cat") == "python_function" and "work" in e["name"]
                for e in load(profiler.traces[0])
            )
            == stacks
        )


def test_a_rank_that_is_not_there_is_refused(tiny: Path, tmp_path: Path) -> None:
    from tunesmith.training.run import train

    with refuses(UsageError, where="profile.ranks", names=["rank 3"], fix=["profile.ranks=[0]"]):
        train(make_run(tiny, tmp_path, profile={"enabled": True, "ranks": [3]}), quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_is_profiled_on_all_ranks_unless_told_otherwise(tiny: Path, tmp_path: Path) -> None:
    from tunesmith.training.run import train

    settings = {"enabled": True, "wait": 0, "warmup": 1, "active": 2}
    train(
        make_run(tiny, tmp_path, held=False, train={"duration": "4 steps"}, profile=settings),
        quiet=True,
    )
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    events = load(trace)
    assert any(event.get("name") == "aten::mm" for event in events)
    assert any(event.get("name") == "[memory]" for event in events)


def test_not_enabled_writes_nothing(tmp_path: Path) -> None:
    work(Profiler(Profile(), tmp_path, rank=0, device=CPU), 40)
    assert list(tmp_path.iterdir()) == []
