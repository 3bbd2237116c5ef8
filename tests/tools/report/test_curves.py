"""What the page shows of runs: where they stand, and their curves."""

from __future__ import annotations

import fcntl
import json
import math
from pathlib import Path

import pytest

from errors import holds
from records import record
from tunesmith.tools.report.curves import curves
from tunesmith.tools.report.run_files import RunFiles, end_fields
from watching import add_steps, write_run


def test_time_left_is_estimated_from_the_last_steps(tmp_path: Path) -> None:
    run = RunFiles(write_run(tmp_path / "run", 40, of=100))
    with (tmp_path / "run/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run.refresh()
        assert (run.state, run.total_steps) == ("running", 100)
        assert run.seconds_left == pytest.approx(60 * 0.25)
    run.refresh()  # the lock is gone
    assert run.state == "killed"
    assert run.seconds_left is None
    assert "tunesmith train" in end_fields(run)["next"]
    stopped = {"signal": None, "reason": "memory", "figures": {"free_bytes": 5}}
    (tmp_path / "run/stopped.json").write_text(json.dumps(stopped))
    run.refresh()
    assert end_fields(run) == {"reason": "memory", "figures.free_bytes": 5}
    (tmp_path / "run/stopped.json").write_text(json.dumps({"reason": "file", "step": 40}))
    run.refresh()
    assert holds(end_fields(run)["reason"], "tunesmith stop")


@pytest.mark.parametrize(
    ("duration", "total"), [("2 epochs", 200), ("20 s", 80), ("80 steps", 80), ("nonsense", None)]
)
def test_the_steps_of_the_entire_run(tmp_path: Path, duration: str, total: int | None) -> None:
    folder = write_run(tmp_path / "run", 40)
    (folder / "config.yaml").write_text(json.dumps({"train": {"duration": duration}}))
    assert RunFiles(folder).total_steps == total


def test_every_panel_of_the_fields_of_a_run(tmp_path: Path) -> None:
    """Of many ranks the outermost are drawn."""
    folder = write_run(tmp_path / "run", 30, ranks=16)
    with (folder / "metrics.jsonl").open("a") as file:
        extra = {"val_reward_accuracy": 0.75, "my_own": 2.0}
        file.write(record(31, loss=math.nan, extra=extra).to_json() + "\n")
    charts, constants = curves([RunFiles(folder)])
    panels = {chart["title"]: chart["series"] for chart in charts}
    memory = [(line["label"], line["y"][-1]) for line in panels["memory_gib"]]
    assert memory[:2] == [("rank 0", 1.5), ("rank 1", 2.0)]
    assert [label for label, _ in memory] == [f"rank {n}" for n in (0, 1, 2, 3, 13, 14, 15)]
    # The records of other ranks repeat the loss.
    assert [line["label"] for line in panels["loss"]] == ["loss, raw", "loss"]
    assert panels["loss"][0]["x"][-1] == 30.0
    expected = {"mfu": "0.4", "data_seconds": "0.01", "my_own": "2", "val_reward_accuracy": "0.75"}
    assert expected.items() <= dict(constants).items()
    assert "gpu_temperature_celsius" not in {*panels, *dict(constants)}


def test_a_run_is_read_again_after_it_grew_and_was_cut_back(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 30, of=100)
    run = RunFiles(folder)
    signatures = [run.signature()]
    add_steps(folder, 31, 35)
    signatures.append(run.signature())
    run.refresh()
    assert run.figures.columns["step"][-1] == 35
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:20]))
    (folder / "log.txt").write_text("2026-01-01 11:00:00  warning: anew\n")
    signatures.append(run.signature())
    run.refresh()
    assert run.figures.columns["step"] == [*range(1, 21)]
    assert run.warnings == ["anew"]
    assert len({*map(repr, signatures)}) == 3
