"""`profile:` leaves for each rank and cycle a trace that tools open, a memory track and a table."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from errors import refuses
from recipes import make_run
from tunesmith.config.schema import Profile
from tunesmith.errors import UsageError
from tunesmith.metrics.profile import Profiler, idle_share, summarize

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
    for cycle in (1, 2):
        table = (folder / f"top-rank1-{cycle}.txt").read_text()
        assert "aten::mm" in table
        summary = json.loads((folder / f"summary-rank1-{cycle}.json").read_text())
        calls = {row["name"]: row["calls"] for row in summary["operations"]}
        assert calls["aten::mm"] == 3
        assert all(name in table for name in calls)
        assert sum(row["share"] for row in summary["operations"]) == pytest.approx(1, abs=1e-6), (
            "few enough to be all"
        )
        assert summary["peak_bytes"].keys() == {"CPU"}
        assert summary["peak_bytes"]["CPU"] >= 3 * 64 * 64 * 4
        assert summary["gpu_busy_share"] is None


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

    with refuses(UsageError, where="profile.ranks", names=["rank 3", "0 to 0"]):
        train(make_run(tiny, tmp_path, profile={"enabled": True, "ranks": [3]}), quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_time_of_an_operation_is_torchs(tmp_path: Path) -> None:
    """Reference: `self_cpu_time_total` of torch's own averages over the same trace."""
    settings = Profile(enabled=True, wait=0, warmup=1, active=3)
    profiler, seen = Profiler(settings, tmp_path, rank=0, device=CPU), {}
    write = profiler._write

    def also_average(done: torch.profiler.profile) -> None:
        seen.update({e.key: (e.self_cpu_time_total / 1e3, e.count) for e in done.key_averages()})
        write(done)

    with profiler:
        assert profiler._profile is not None
        profiler._profile.on_trace_ready = also_average
        for _ in range(4):
            layer = torch.nn.Linear(64, 64)
            torch.nn.functional.layer_norm(layer(torch.ones(64, 64)), (64,)).sum().backward()
            profiler.step()
    found = json.loads((tmp_path / "summary-rank0-1.json").read_text())["operations"]
    assert len(found) == 10
    for row in found:
        assert (row["ms"], row["calls"]) == (
            pytest.approx(seen[row["name"]][0], rel=0.01, abs=2e-3),
            seen[row["name"]][1],
        )


def test_the_time_of_kernels_goes_to_the_operation_that_launched_them() -> None:
    """As Kineto writes them: a kernel has its operation's External id; two overlap here, one has no
    operation.
    """

    def event(kind: str, name: str, start: float, length: float, number: int | None) -> dict:
        return {
            "cat": kind,
            "name": name,
            "ts": start,
            "dur": length,
            "tid": 1,
            "args": {"External id": number},
        }

    found = summarize(
        [
            event("cpu_op", "aten::mm", 0, 5, 1),
            event("cpu_op", "aten::add", 5, 5, 2),
            event("kernel", "gemm_a", 100, 40, 1),
            event("kernel", "gemm_b", 120, 40, 1),
            event("gpu_memcpy", "Memcpy HtoD", 180, 20, None),
        ]
    )
    assert [(row["name"], row["ms"], row["calls"]) for row in found["operations"]] == [
        ("aten::mm", 0.08, 2),
        ("Memcpy HtoD", 0.02, 1),
    ]
    assert [row["share"] for row in found["operations"]] == [0.8, 0.2]
    assert found["gpu_busy_share"] == pytest.approx(0.8)


@pytest.mark.slow
def test_a_run_is_profiled_on_all_ranks_unless_told_otherwise(tiny: Path, tmp_path: Path) -> None:
    from tunesmith.training.run import train

    settings = {"enabled": True, "wait": 0, "warmup": 1, "active": 2}
    train(
        make_run(tiny, tmp_path, held=False, train={"duration": "4 steps"}, profile=settings),
        quiet=True,
    )
    summary = json.loads((tmp_path / "run" / "profile" / "summary-rank0-1.json").read_text())
    assert len(summary["operations"]) == 10
    assert summary["peak_bytes"]["CPU"] > 0


def test_not_enabled_writes_nothing(tmp_path: Path) -> None:
    work(Profiler(Profile(), tmp_path, rank=0, device=CPU), 40)
    assert list(tmp_path.iterdir()) == []


def test_idle_time_lies_between_kernels_that_overlap_nest_and_touch() -> None:
    line = [(0.0, 10.0), (2.0, 4.0), (8.0, 15.0), (15.0, 16.0), (20.0, 21.0), (30.0, 40.0)]
    assert idle_share(line) == idle_share(reversed(line)) == 13 / 40
    assert idle_share([(0, 10), (1, 2), (12, 13)]) == 2 / 13, (
        "a long one covers the end of a later short one"
    )
    assert idle_share([(5, 6)]) == idle_share([(5, 5)]) == 0
    assert idle_share([]) is None


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), min_size=1, max_size=12))
def test_idle_time_is_what_a_count_of_microseconds_finds(pieces: list[tuple[int, int]]) -> None:
    """Reference: mark each whole microsecond that some span covers."""
    spans = [(start, start + length) for start, length in pieces]
    covered = {t for start, end in spans for t in range(start, end)}
    every = range(min(covered), max(covered) + 1)
    assert idle_share(spans) == pytest.approx(1 - len(covered) / len(every))
