"""What a watcher shows of runs: where they stand and their curves."""

from __future__ import annotations

import fcntl
import json
import math
import shutil
from pathlib import Path

import pytest

from errors import holds, refuses
from logged import logged_lines
from records import record
from tunesmith.errors import UsageError
from tunesmith.launch.jobs import save_job
from tunesmith.reader.curves import curves
from tunesmith.reader.run_files import RunFiles, to_json
from tunesmith.tools.launch.slurm import SlurmJob
from tunesmith.tools.report import waiting
from tunesmith.tools.report.waiting import open_run
from watching import add_steps, write_run

ALL = (-math.inf, math.inf)


def test_a_finished_run(tmp_path: Path) -> None:
    status = RunFiles(write_run(tmp_path / "run", 100)).status()
    assert (status["state"], status["step"], status["steps"], status["done"]) == (
        "finished",
        100,
        100,
        1.0,
    )
    assert status["seconds_left"] is None
    assert status["figures"]["tokens_per_second"] == pytest.approx(400)
    assert status["figures"]["data_share"] == pytest.approx(0.04)
    assert status["figures"]["val_loss"] == pytest.approx(1.1 + math.exp(-1))


def test_warnings_of_the_start_are_kept(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 20)
    run = RunFiles(folder)
    with (folder / "log.txt").open("a") as log:
        log.write(
            "2026-01-01 10:00:02  step 2\n" * 1000
            + "2026-01-01 10:00:09  warning: the chip is slow\n" * 2
        )
        log.write("2026-01-01 10:00:10  warning: half a li")
    run.refresh()
    assert run.status()["warnings"] == ["3 rows were cut", "the chip is slow"]
    (folder / "log.txt").write_text("2026-01-01 11:00:00  warning: anew\n")
    run.refresh()
    assert run.status()["warnings"] == ["anew"]


def test_time_left_is_what_the_last_steps_took(tmp_path: Path) -> None:
    run = RunFiles(write_run(tmp_path / "run", 40, of=100))
    with (tmp_path / "run/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run.refresh()
        status = run.status()
    assert (status["state"], status["done"]) == ("running", 0.4)
    assert status["seconds_left"] == pytest.approx(60 * 0.25)
    run.refresh()  # the lock is gone
    assert run.status()["state"] == "killed"
    assert run.status()["seconds_left"] is None
    assert "tunesmith train" in run.status()["end"]["next"]
    (tmp_path / "run/stopped.json").write_text(
        json.dumps({"signal": None, "reason": "memory", "figures": {"free_bytes": 5}})
    )
    run.refresh()
    assert run.status()["end"] == {"reason": "memory", "figures.free_bytes": 5}
    (tmp_path / "run/stopped.json").write_text(json.dumps({"reason": "file", "step": 40}))
    run.refresh()
    assert holds(run.status()["end"]["reason"], "tunesmith stop")


@pytest.mark.parametrize(
    ("duration", "done"), [("2 epochs", 0.2), ("20 s", 0.5), ("80 steps", 0.5), ("nonsense", None)]
)
def test_the_share_that_is_done(tmp_path: Path, duration: str, done: float | None) -> None:
    folder = write_run(tmp_path / "run", 40)
    (folder / "config.yaml").write_text(json.dumps({"train": {"duration": duration}}))
    assert RunFiles(folder).status()["done"] == (done if done is None else pytest.approx(done))


@pytest.mark.slow
def test_a_spike_of_one_step_in_100_000_is_seen(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 10)
    line = (folder / "metrics.jsonl").read_text().splitlines()[0]
    high = line.replace('"loss": ', '"loss": 9')
    steps = [
        (high if step == 54_321 else line).replace('"step": 1,', f'"step": {step},')
        for step in range(1, 100_001)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(steps) + "\n")
    run = RunFiles(folder)
    raw = curves([run], "step", *ALL, 800)[0]["series"][0]
    assert len(raw["x"]) <= 802
    assert raw["x"][raw["y"].index(max(raw["y"]))] == 54_321
    near = curves([run], "step", 54_300, 54_340, 800)[0]["series"][0]
    assert near["x"] == list(range(54_299, 54_342))  # each step, and one more on both sides


def test_every_panel_of_what_is_there(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 30, ranks=3)
    with (folder / "metrics.jsonl").open("a") as file:
        extra = {"reward_margin": 0.5, "val_reward_accuracy": 0.75, "kl": 0.1, "my_own": 2.0}
        file.write(record(31, loss=math.nan, extra=extra).to_json() + "\n")
    run = RunFiles(folder)
    panels = {panel["title"]: panel["series"] for panel in curves([run], "step", *ALL, 100)}
    assert [(row["rank"], row["y"][-1]) for row in panels["Memory"]] == [
        (None, 1.5),
        (1, 2.0),
        (2, 3.0),
    ]
    assert {row["rank"] for row in panels["Training loss"]} == {None}  # a rank's record repeats it
    assert panels["MFU"][0]["y"] == [40.0] * 30
    assert panels["Wait for data"][0]["y"][0] == 10.0  # ms
    assert panels["my_own"][0]["x"] == [31.0]
    for title, field, value in (
        ("Reward margin", "reward_margin", 0.5),
        ("Reward accuracy", "val_reward_accuracy", 75.0),
        ("KL to the reference", "kl", 0.1),
    ):
        (series,) = panels[title]
        assert (series["field"], series["y"]) == (field, [value])
    assert panels["Training loss"][0]["x"][-1] == 30.0
    assert "GPU temperature" not in panels
    assert json.loads(to_json(run.status()))["figures"]["step"] == 31


def test_what_moves_much_is_drawn_smoothed_too_from_15_steps_on(tmp_path: Path) -> None:
    for steps, smoothed in (
        (14, []),
        (15, ["loss", "tokens_per_second", "step_seconds", "grad_norm"]),
    ):
        run = RunFiles(write_run(tmp_path / str(steps), steps))
        series = [line for panel in curves([run], "step", *ALL, 200) for line in panel["series"]]
        for choice in ("some", "strong"):
            assert [line["field"] for line in series if line["smoothed"] == choice] == smoothed
        assert all(len(line["x"]) == steps for line in series if line["field"] == "loss")


def test_a_smoothed_curve_is_the_same_in_a_window(tmp_path: Path) -> None:
    """Over steps of the run, not over the points that a window shows."""
    run = RunFiles(write_run(tmp_path / "run", 2000, spike=500))
    losses = [1.0 + math.exp(-step / 100) for step in range(1, 2001)]
    losses[499] = 9.0
    for choice, share in (("some", 0.02), ("strong", 0.1)):
        decay = 1 - 2 / (share * 2000 + 1)
        mean = weight = 0.0
        expected = {}
        for step, loss in enumerate(losses, 1):
            mean, weight = decay * mean + (1 - decay) * loss, decay * weight + (1 - decay)
            expected[float(step)] = mean / weight
        for window in (ALL, (480.0, 560.0)):
            line = next(
                line
                for line in curves([run], "step", *window, 200)[0]["series"]
                if line["smoothed"] == choice
            )
            # Points are sent in six digits.
            assert line["y"] == [pytest.approx(expected[step], rel=1e-5) for step in line["x"]]


def test_other_axes(tmp_path: Path) -> None:
    run = RunFiles(write_run(tmp_path / "run", 30, ranks=2))
    tokens = curves([run], "tokens", *ALL, 100)
    assert tokens[0]["series"][0]["x"] == [100.0 * step for step in range(1, 31)]
    memory = next(panel for panel in tokens if panel["title"] == "Memory")
    assert memory["series"][1]["x"] == memory["series"][0]["x"]
    assert curves([run], "seconds", *ALL, 100)[0]["series"][0]["x"][-1] == pytest.approx(7.5)


def test_what_is_added_and_cut_back_is_followed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 30, of=100)
    run = RunFiles(folder)
    run.refresh()
    add_steps(folder, 31, 35)
    run.refresh()
    assert run.figures.axes["step"][-1] == 35
    (folder / "metrics.jsonl").write_text(
        "".join((folder / "metrics.jsonl").read_text().splitlines(True)[:20])
    )
    run.refresh()
    assert run.figures.axes["tokens"] == [100.0 * step for step in range(1, 21)]
    before = run.status()["texts"]
    (folder / "samples.jsonl").write_text("")
    run.refresh()
    assert run.status()["texts"] == before + 1
    assert run.texts()["samples"] == []


def test_a_job_in_a_queue_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue, folder, made = (
        tmp_path / "bin" / "squeue",
        tmp_path / "run",
        write_run(tmp_path / "made", 3, of=10),
    )
    squeue.parent.mkdir()
    squeue.write_text("#!/bin/sh\necho 'PENDING|Resources|0:00|1:00|'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(squeue.parent), prepend=":")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(waiting, "QUEUE_SECONDS", 0.01)
    (folder / "launch").mkdir(parents=True)  # what a launch leaves there before the job begins
    save_job(SlurmJob("slurm-7", str(folder), details={"id": "7"}))
    for word in ("slurm-7", str(folder)):
        with refuses(UsageError, where=str(folder), names=["slurm-7"]) as caught:
            open_run(word)
        assert caught.value.why == "PENDING: Resources"
    monkeypatch.setattr(
        waiting.time, "sleep", lambda _: shutil.copytree(made, folder, dirs_exist_ok=True)
    )
    with logged_lines() as said:
        assert open_run("slurm-7", wait=True).figures.columns["step"] == [1, 2, 3]
    (line,) = said
    assert holds(line, "slurm-7", "PENDING: Resources")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    for word in (str(tmp_path), str(tmp_path / "missing")):
        with pytest.raises(UsageError):
            open_run(word)
