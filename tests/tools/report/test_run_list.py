"""The list of runs: what its lines say, and that it reads little."""

from __future__ import annotations

import fcntl
import math
import os
import tracemalloc
from pathlib import Path

import pytest

from tunesmith.launch.jobs import holds_runs
from tunesmith.tools.report import run_list
from tunesmith.tools.report.run_list import SPARK_POINTS, Row, RunList
from watching import add_steps, write_run


@pytest.fixture(autouse=True)
def whole_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_list, "LOOK_SECONDS", math.inf)


def rows(runs: RunList) -> dict[str, Row]:
    runs.refresh()
    return {row["name"]: row for row in runs.rows.values()}


def test_what_a_line_says(tmp_path: Path) -> None:
    write_run(tmp_path / "small", 40)
    write_run(tmp_path / "sweep" / "large", 1000, of=2000)
    assert holds_runs(tmp_path)
    assert not holds_runs(tmp_path / "small")
    told = rows(RunList([tmp_path]))
    assert list(told) == ["small", "sweep/large"]
    small, large = told.values()
    assert (small["state"], small["step"], large["state"], large["step"]) == (
        "finished",
        40,
        "killed",
        1000,
    )
    assert small["loss"] == pytest.approx(1.67032, abs=1e-4)
    assert small["val_loss"] == pytest.approx(1.77032, abs=1e-4)
    assert large["val_loss"] == pytest.approx(1.1, abs=1e-3)
    for row in told.values():
        assert 20 < len(row["spark"]) <= SPARK_POINTS
        assert row["spark"] == sorted(row["spark"], reverse=True)
        assert row["damage"] == ""


def test_a_line_follows_its_run_and_new_ones_are_found(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 10, of=100)
    runs = RunList([tmp_path])
    first = rows(runs)["run"]
    assert rows(runs)["run"] is first
    add_steps(folder, 11, 12)
    # A sweep at work locks its folder, and is no run.
    (tmp_path / "sweep.json").write_text("{}")
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert holds_runs(tmp_path)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        row = rows(runs)["run"]
        assert (row["step"], row["state"]) == (12, "running")
    assert rows(runs)["run"]["state"] == "killed"
    write_run(tmp_path / "other", 5)
    assert rows(runs)["other"]["id"] == 1
    (folder / "failure.json").write_text('{"what": "out of memory"}')
    assert rows(runs)["run"]["state"] == "failed"


def test_a_look_without_time_for_all_goes_on_at_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        write_run(tmp_path / name, 5)
    runs = RunList([tmp_path])
    monkeypatch.setattr(run_list, "LOOK_SECONDS", 0)
    assert [*rows(runs)] == ["a"]
    # What goes on does not keep the others waiting.
    add_steps(tmp_path / "a", 6, 7)
    assert [*rows(runs)] == ["a", "b"]
    told = rows(runs)
    assert {row["name"]: (row["look"], row["step"]) for row in told.values()} == {
        "a": (1, 5),
        "b": (2, 5),
        "c": (3, 5),
    }
    assert rows(runs)["a"]["step"] == 7


def test_damaged_runs_have_their_line(tmp_path: Path) -> None:
    for name in ("garbage", "pipe", "manifest"):
        write_run(tmp_path / name, 10)
    (tmp_path / "garbage/metrics.jsonl").write_text("garbage\n{}\n")
    (tmp_path / "pipe/metrics.jsonl").unlink()
    os.mkfifo(tmp_path / "pipe/metrics.jsonl")
    (tmp_path / "manifest/final/manifest.json").write_text("[]")
    (tmp_path / "no run").mkdir()
    told = rows(RunList([tmp_path]))
    assert list(told) == ["garbage", "manifest", "pipe"]
    assert "metrics.jsonl" in told["garbage"]["damage"]
    assert "metrics.jsonl" in told["pipe"]["damage"]
    assert "manifest.json" in told["manifest"]["damage"]
    assert told["manifest"]["step"] == 10


def test_the_records_of_a_run_are_not_held(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 3000)
    size = (tmp_path / "run/metrics.jsonl").stat().st_size
    runs = RunList([tmp_path])
    tracemalloc.start()
    runs.refresh()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < size / 20
