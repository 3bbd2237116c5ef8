"""What the page shows of runs: where they stand, and their curves."""

from __future__ import annotations

import fcntl
import json
import math
from pathlib import Path

import pytest

from errors import holds, refuses
from records import record
from tunesmith.errors import UsageError
from tunesmith.launch.job import save_job
from tunesmith.launch.slurm_job import SlurmJob
from tunesmith.reader.curves import MAX_RANKS, POINTS, curves
from tunesmith.reader.run_files import RunFiles, end_fields
from tunesmith.tools.report.run_watch import open_run
from watching import add_steps, write_run


def series(*runs: RunFiles) -> dict[str, list[dict]]:
    charts, _ = curves(runs)
    return {chart["title"]: chart["series"] for chart in charts}


def test_warnings_of_the_start_are_kept(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 20)
    with (folder / "log.txt").open("a") as log:
        log.write("2026-01-01 10:00:02  step 2\n" * 1000)
        log.write("2026-01-01 10:00:09  warning: the chip is slow\n" * 2)
    run = RunFiles(folder)
    first, chip = run.warnings
    assert holds(first, 3)
    assert holds(chip, "chip")
    (folder / "log.txt").write_text("2026-01-01 11:00:00  warning: anew\n")
    run.refresh()
    assert run.warnings == ["anew"]


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
    (tmp_path / "run/stopped.json").write_text(
        json.dumps({"signal": None, "reason": "memory", "figures": {"free_bytes": 5}})
    )
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


@pytest.mark.slow
def test_a_spike_of_one_step_in_20_000_is_seen(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 10)
    line = (folder / "metrics.jsonl").read_text().splitlines()[0]
    high = line.replace('"loss": ', '"loss": 9')
    steps = [
        (high if step == 5_321 else line).replace('"step": 1,', f'"step": {step},')
        for step in range(1, 20_001)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(steps) + "\n")
    raw = series(RunFiles(folder))["loss"][0]
    assert len(raw["x"]) <= POINTS + 2
    assert raw["x"][raw["y"].index(max(raw["y"]))] == 5_321


def test_every_panel_of_the_fields_of_a_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 30, ranks=3)
    with (folder / "metrics.jsonl").open("a") as file:
        extra = {"reward_margin": 0.5, "val_reward_accuracy": 0.75, "kl": 0.1, "my_own": 2.0}
        file.write(record(31, loss=math.nan, extra=extra).to_json() + "\n")
    run = RunFiles(folder)
    panels = series(run)
    assert [(line["label"], line["y"][-1]) for line in panels["memory_gib"]] == [
        ("rank 0", 1.5),
        ("rank 1", 2.0),
        ("rank 2", 3.0),
    ]
    # The records of other ranks repeat the loss.
    assert [line["label"] for line in panels["loss"]] == ["loss, raw", "loss"]
    assert panels["loss"][0]["x"][-1] == 30.0
    constants = dict(curves([run])[1])
    assert constants["mfu"] == "0.4"
    assert constants["data_seconds"] == "0.01"
    assert constants["my_own"] == "2"
    assert constants["val_reward_accuracy"] == "0.75"
    assert constants["reward_margin"] == "0.5"
    assert "gpu_temperature_celsius" not in {*panels, *constants}


def test_of_many_ranks_the_outermost_are_drawn(tmp_path: Path) -> None:
    run = RunFiles(write_run(tmp_path / "run", 5, ranks=16))
    labels = [line["label"] for line in series(run)["memory_gib"]]
    assert labels == [f"rank {rank}" for rank in (0, 1, 2, 3, 13, 14, 15)]
    assert len(labels) == MAX_RANKS


def test_of_several_runs_rank_0_is_drawn_in_the_color_of_the_run(tmp_path: Path) -> None:
    runs = [RunFiles(write_run(tmp_path / name, 20, ranks=2)) for name in ("a", "b")]
    (folder := runs[1].folder / "metrics.jsonl").write_text(
        folder.read_text().replace('"memory_gib": 1.5', '"memory_gib": 2.5')
    )
    runs[1].refresh()
    lines = series(*runs)["memory_gib"]
    assert [(line["label"], line["color"], line["y"][0]) for line in lines] == [
        ("a", 0, 1.5),
        ("b", 1, 2.5),
    ]
    labels = [(line["label"], line["color"]) for line in series(*runs)["loss"]]
    assert labels == [("a, raw", 0), ("a", 0), ("b, raw", 1), ("b", 1)]


def test_fields_that_fluctuate_are_smoothed_from_15_steps_on(tmp_path: Path) -> None:
    """Over 2 % of all steps, and then thinned."""
    assert len(series(RunFiles(write_run(tmp_path / "14", 14)))["loss"]) == 1
    run = RunFiles(write_run(tmp_path / "run", 2000, spike=500))
    decay = 1 - 2 / (0.02 * 2000 + 1)
    mean = weight = 0.0
    expected = {}
    for step in range(1, 2001):
        loss = 9.0 if step == 500 else 1.0 + math.exp(-step / 100)
        mean, weight = decay * mean + (1 - decay) * loss, decay * weight + (1 - decay)
        expected[float(step)] = mean / weight
    raw, line = series(run)["loss"]
    assert (raw["look"], line["look"]) == ("raw", "smooth")
    assert max(raw["y"]) == 9.0
    # The page has values in six digits.
    assert line["y"] == [pytest.approx(expected[step], rel=1e-5) for step in line["x"]]


def test_a_run_is_read_again_after_it_grew_and_was_cut_back(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 30, of=100)
    run = RunFiles(folder)
    signatures = [run.signature()]
    add_steps(folder, 31, 35)
    signatures.append(run.signature())
    run.refresh()
    assert run.figures.columns["step"][-1] == 35
    (folder / "metrics.jsonl").write_text(
        "".join((folder / "metrics.jsonl").read_text().splitlines(True)[:20])
    )
    signatures.append(run.signature())
    run.refresh()
    assert run.figures.columns["step"] == [*range(1, 21)]
    (folder / "samples.jsonl").write_text("")
    signatures.append(run.signature())
    run.refresh()
    assert run.samples == []
    assert len({*map(repr, signatures)}) == 4
    assert run.signature() == signatures[-1]


def test_a_run_by_the_name_of_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue, folder = tmp_path / "bin" / "squeue", tmp_path / "run"
    squeue.parent.mkdir()
    squeue.write_text("#!/bin/sh\necho 'PENDING|Resources|0:00|1:00|'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(squeue.parent), prepend=":")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (folder / "launch").mkdir(parents=True)  # a launch creates it before the job begins
    save_job(SlurmJob("slurm-7", str(folder), details={"id": "7"}))
    for word in ("slurm-7", str(folder)):
        with refuses(UsageError, where=str(folder), names=["slurm-7"]) as caught:
            open_run(word)
        assert caught.value.why == "PENDING: Resources"
    add_steps(folder, 1, 3)
    assert open_run("slurm-7").figures.columns["step"] == [1, 2, 3]
