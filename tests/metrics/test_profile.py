"""`profile:` leaves for each rank and cycle a trace that tools open, a memory track and a table."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.config.schema import Profile
from tunesmith.metrics.profile import Profiler, idle_share

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


def test_idle_time_lies_between_kernels_that_overlap_nest_and_touch() -> None:
    line = [(0.0, 10.0), (2.0, 4.0), (8.0, 15.0), (15.0, 16.0), (20.0, 21.0), (30.0, 40.0)]
    assert idle_share(line) == idle_share(reversed(line)) == 13 / 40
    assert idle_share([(0, 10), (1, 2), (12, 13)]) == 2 / 13, "a long one covers the end of a later short one"
    assert idle_share([(5, 6)]) == idle_share([(5, 5)]) == 0
    assert idle_share([]) is None


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), min_size=1, max_size=12))
def test_idle_time_is_what_a_count_of_microseconds_finds(pieces: list[tuple[int, int]]) -> None:
    """Reference: mark each whole microsecond that some span covers."""
    spans = [(start, start + length) for start, length in pieces]
    covered = {t for start, end in spans for t in range(start, end)}
    every = range(min(covered), max(covered) + 1)
    assert idle_share(spans) == pytest.approx(1 - len(covered) / len(every))
