"""`profile:` leaves for each rank and cycle a trace that tools open, a memory track and a table."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from tunesmith.config.schema import Profile
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


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_each_cycle_leaves_its_files_and_holds_its_active_steps(tmp_path: Path) -> None:
    profiler = Profiler(Profile(enabled=True, wait=1, warmup=1, active=3, cycles=2), tmp_path, rank=1, device=CPU)
    work(profiler, 20)
    folder = tmp_path
    traces = sorted(folder.glob("rank1.*.pt.trace.json.gz"))
    assert len(traces) == len(profiler.traces) == 2
    for trace in traces:
        assert sum(e.get("name") == "aten::mm" and e.get("ph") == "X" for e in load(trace)) == 3
    for cycle in (1, 2):
        tracks = load(folder / f"memory-rank1-{cycle}.json.gz")
        assert tracks
        assert {e["ph"] for e in tracks} == {"C"}
        assert max(e["args"]["bytes"] for e in tracks) >= 3 * 64 * 64 * 4
        assert "aten::mm" in (folder / f"top-rank1-{cycle}.txt").read_text()


def test_a_run_that_ends_early_still_leaves_what_was_seen(tmp_path: Path) -> None:
    work(Profiler(Profile(enabled=True, wait=0, warmup=1, active=50), tmp_path, rank=0, device=CPU), 5)
    assert len(list(tmp_path.glob("rank0.*.pt.trace.json.gz"))) == 1


def test_two_ranks_share_the_folder(tmp_path: Path) -> None:
    for rank in (0, 1):
        work(Profiler(Profile(enabled=True, wait=0, warmup=1, active=2), tmp_path, rank=rank, device=CPU), 4)
    assert {p.name.split(".")[0] for p in tmp_path.glob("*.pt.trace.json.gz")} == {"rank0", "rank1"}


def test_not_enabled_writes_nothing(tmp_path: Path) -> None:
    work(Profiler(Profile(), tmp_path, rank=0, device=CPU), 40)
    assert list(tmp_path.iterdir()) == []
