"""What a job says of itself where its run directory has seen other launches, before it or since."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import psutil
import pytest

from errors import check_shown, holds, lines_with
from recipes import recipe
from tunesmith.cli.main import main
from tunesmith.config.load import load_recipe
from tunesmith.errors import EXIT_OK, EXIT_USAGE
from tunesmith.launch.job import FOLDER, Job, save_job, state_folder
from tunesmith.launch.jobs import all_jobs, find_job
from tunesmith.launch.local_job import LocalJob
from tunesmith.launch.slurm_job import SlurmJob
from tunesmith.run_dir import METRICS, STOP_FILE, STOPPED, RunState, open_regular
from tunesmith.training.run import train

GONE = {"pid": "0", "created": "never"}


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory whose last start failed a minute ago."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "failure.json").write_text(json.dumps({"what": "rank 1 was killed"}))
    a_minute_ago = time.time() - 60
    os.utime(folder / "failure.json", (a_minute_ago, a_minute_ago))
    return folder


def created_at(process: psutil.Process) -> dict[str, str]:
    return {"pid": str(process.pid), "created": str(process.create_time())}


def launched(name: str, out: Path) -> LocalJob:
    job = LocalJob(name, str(out), details=GONE)
    save_job(job)
    return job


def test_an_earlier_job_of_a_directory_does_not_tell_of_the_later_one(out: Path):
    earlier = launched("local-1", out)
    (out / STOPPED).write_text("{}")
    assert earlier.state().state is RunState.STOPPED
    later = launched("local-2", out)
    (out / STOPPED).write_text("{}")
    assert later.state().state is RunState.STOPPED
    assert earlier.state().state is RunState.UNKNOWN
    assert holds(earlier.state().text, "local-2")


def test_stopping_an_earlier_job_leaves_the_later_one_at_work(out: Path):
    import fcntl

    earlier = launched("local-1", out)
    later = launched("local-2", out)
    with (out / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert holds(earlier.stop(), "local-2")
        assert not (out / STOP_FILE).exists()
        later.stop()
    assert (out / STOP_FILE).exists()


def test_a_start_that_has_not_locked_its_directory_is_running_everywhere(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after `launch local --detach`, while the ranks still import torch."""
    (out / "failure.json").unlink()
    launched("local-1", out)
    (out / STOPPED).write_text('{"reason": "file"}')
    (out / METRICS).write_text('{"step": 1, "loss": 1.5, "step_seconds": 2.0}\n')
    (out / FOLDER).mkdir()

    def states() -> list[str]:
        found = []
        for command in ("status", "report"):
            assert main([command, str(out), "--json"]) == EXIT_OK
            told = json.loads(capsys.readouterr().out)
            found.append((told[0] if command == "status" else told["runs"][0])["state"])
        return found

    assert states() == ["stopped"] * 2
    with psutil.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as agent:
        details = {"pid": str(agent.pid), "created": str(agent.create_time())}
        save_job(LocalJob("local-2", str(out), details=details))
        assert states() == ["running"] * 2
        agent.communicate()
    assert states()[1:] == ["stopped"]


@pytest.mark.parametrize("launcher", [["local", "--detach"], ["swarm", "--render"]])
def test_nothing_is_launched_or_written_beside_a_run_that_is_at_work(
    launcher: list[str], tiny: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its log, and the recipe that its nodes read again, stay; its process need not have the lock
    yet, and need not have been launched.
    """
    import fcntl

    (out / "failure.json").unlink()  # the folder is no run's
    file = out.parent / "recipe.yaml"
    file.write_text(json.dumps(recipe(tiny, out.parent, held=False)))
    command = ["launch", launcher[0], str(file), *launcher[1:]]
    log = out / "launch" / "output.log"
    log.parent.mkdir()
    log.write_text("first")
    save_job(LocalJob("local-1", str(out), details=created_at(psutil.Process())))
    launched("local-2", out)
    assert main(command) == EXIT_USAGE
    stop = "tunesmith stop local-1"
    check_shown(capfd.readouterr().err, where=str(out), names=["local-1"], fix=[stop])
    shutil.rmtree(out.parent / "state")
    (out.parent / "state").touch()  # no job can be noted
    with (out / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(command) == EXIT_USAGE
    check_shown(capfd.readouterr().err, where=str(out), fix=[f"tunesmith stop {out}"])
    assert log.read_text() == "first"
    assert [path.name for path in log.parent.iterdir()] == [log.name]


def test_a_note_of_an_unknown_kind_leaves_the_run_readable(out: Path) -> None:
    job = LocalJob("local-1", str(out), details=created_at(psutil.Process()))
    save_job(job)
    assert [type(job) for job in all_jobs()] == [LocalJob]
    (state_folder() / "local-1.json").unlink()
    save_job(replace(job, name="cloud-1"))
    assert all_jobs() == []
    (out / "env.json").write_text(json.dumps({"recipe_hash": "a"}))
    assert type(find_job(str(out))) is Job


def test_what_lay_there_before_a_launch_is_not_its_end(out: Path):
    assert holds(Job("", str(out)).state().text, "rank 1")
    job = launched("local-1", out)
    assert job.state().state is RunState.UNKNOWN
    (out / "failure.json").write_text(json.dumps({"what": "rank 0 was killed"}))
    assert holds(job.state().text, "rank 0")


def test_a_run_at_work_tells_its_steps_and_the_time_that_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/mine"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("train: {duration: 5 epochs}\n")
    rows = [
        {"step": n, "epoch": n / 38, "loss": 1.5, "step_seconds": 60.0 if n == 1 else 2.0}
        for n in range(1, 88)
    ]
    (run / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "env.json").write_text('{"recipe_hash": ""}')
    with (run / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["status", "runs/mine"]) == EXIT_OK
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split()[:2] == ["runs/mine", "running"], "it has no other name"
    assert holds(line, "step 87 of 190", 1.5, "3:26 min")
    assert main(["status", "runs/mine"]) == EXIT_OK
    assert "left" not in capsys.readouterr().out, "it was killed"
    (run / "config.yaml").write_text("train: {duration: 2 h}\n")
    assert Job("", str(run)).state().text.startswith("step 87, ")


def test_a_stop_in_a_validation_changes_no_total(out: Path) -> None:
    """The record of the saved step is written once its validation has been measured."""
    (out / "failure.json").unlink()
    (out / "config.yaml").write_text("train: {duration: 4 epochs}\n")
    (out / METRICS).write_text('{"step": 19, "epoch": 1.9, "loss": 1.5, "step_seconds": 2.0}\n')
    (out / STOPPED).write_text('{"step": 20}')
    state = Job("", str(out)).state()
    assert state.state is RunState.STOPPED
    assert holds(state.text, "step 20 of 40")


def test_a_state_reads_the_records_once(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run at work, and of one that has ended."""
    import fcntl

    files: list[Path] = []

    def counted(file: Path) -> BinaryIO:
        files.append(file)
        return open_regular(file)

    (out / METRICS).write_text('{"step": 1, "loss": 1.5, "step_seconds": 2.0}\n')
    monkeypatch.setattr("tunesmith.metrics.record.open_regular", counted)
    with (out / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert Job("", str(out)).state() == (RunState.RUNNING, "step 1, loss 1.5")
        assert len(files) == 1
    assert Job("", str(out)).state().state is RunState.FAILED
    assert len(files) == 2


def test_a_queue_that_does_not_answer_hides_no_other_job(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def silent(*command: str) -> tuple[int, str, str]:
        return 1, "", "no-controller"

    monkeypatch.setattr("tunesmith.launch.slurm_job.run_slurm", silent)
    launched("local-1", out)
    (out / "failure.json").write_text(json.dumps({"what": "rank 1 was killed"}))
    for number in ("4", "5"):
        folder = out.parent / f"run-{number}"
        save_job(SlurmJob(f"slurm-{number}", str(folder), details={"id": number}))
    assert main(["status", "--json"]) == EXIT_OK
    rows = json.loads(capsys.readouterr().out)
    states = {row["job"]: row["state"] for row in rows}
    assert states == {"local-1": "failed", "slurm-4": "unknown", "slurm-5": "unknown"}
    unknown = [row["text"] for row in rows if row["state"] == "unknown"]
    assert all(holds(text, "no-controller", "tunesmith doctor --slurm") for text in unknown)


@pytest.mark.parametrize("launcher", [["local", "--detach"], ["slurm", "--gpus-per-node", "0"]])
def test_what_files_tell_of_a_start_is_told_before_it_is_out_of_sight(
    launcher: list[str],
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A model that is not there, a row that is not the first, and a run that has finished."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe(tiny, tmp_path, held=False, train={"duration": "2 steps"})))
    command = ["launch", launcher[0], str(file), *launcher[1:]]
    assert main([*command, "model.name=/nowhere/model"]) == EXIT_USAGE
    check_shown(capfd.readouterr().err, where="model.name", names=["/nowhere/model"])
    rows = Path(load_recipe(file).data.train[0].source)
    good = rows.read_text()
    count = good.count("\n")
    rows.write_text(good + '{"prompt": 1}\n{"prompt": 1}\n')
    assert main(command) == EXIT_USAGE
    place = f"{rows.name}:{count + 1}"
    check_shown(capfd.readouterr().err, where=place, names=[2, count + 2])
    assert not (tmp_path / "run").exists()
    rows.write_text(good)
    train(file, quiet=True)
    capfd.readouterr()
    assert main(command) == EXIT_OK
    assert lines_with(capfd.readouterr().out, "2 steps", "train.duration")
    assert not (tmp_path / "run/launch").exists()


@pytest.mark.parametrize("log", ["of a rank", "of Slurm"])
def test_a_start_that_died_before_its_run_tells_the_first_error_of_its_log(
    log: str, out: Path
) -> None:
    """Beside an earlier run too; what that one says is not of this start."""
    lines = {
        "of a rank": "start 0\nerror: rows.jsonl:8\n    2/19\n  why: x\nsrun: error: n1: task 0",
        "of Slurm": "start 0\nslurmstepd: error: rows.jsonl:8 2/19\nerror: later\n",
    }
    file = out / FOLDER / "output.log"
    file.parent.mkdir()
    file.write_text(lines[log])
    (out / METRICS).write_text('{"step": 1, "loss": 1.5}\n')
    a_minute_ago = time.time() - 60
    os.utime(out / METRICS, (a_minute_ago, a_minute_ago))
    job = LocalJob("local-1", str(out), log=str(file), details=GONE)
    save_job(job)
    assert job.state() == (RunState.FAILED, "rows.jsonl:8 2/19")
    (out / METRICS).touch()
    assert job.state().state is RunState.KILLED, "it had begun"


def test_a_requeued_job_tells_the_step_that_it_goes_on_from(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pending = "PENDING|BeginTime|0:00|10:00|\n"
    monkeypatch.setattr("tunesmith.launch.slurm_job.run_slurm", lambda *_: (0, pending, ""))
    job = SlurmJob("slurm-4", str(out), details={"id": "4"})
    save_job(job)
    assert job.state() == (RunState.QUEUED, "PENDING: BeginTime")
    (out / "config.yaml").write_text("train: {duration: 4 epochs}\n")
    (out / METRICS).write_text('{"step": 19, "epoch": 1.9, "loss": 1.5}\n')
    (out / STOPPED).write_text('{"step": 20}')
    assert holds(job.state().text, "PENDING: BeginTime", "step 20 of 40")
    (out / STOPPED).unlink()  # its node was lost
    assert holds(job.state().text, "PENDING: BeginTime", "step 19 of 40")
    assert "process" not in job.state().text


def test_a_mistyped_run_is_named(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(out.parent)
    (out.parent / "runs/small").mkdir(parents=True)
    assert main(["status", "runs/smal"]) == EXIT_USAGE
    assert "runs/small" not in capsys.readouterr().err, "it is no run"
    (out.parent / "runs/small" / METRICS).touch()
    for command in ("status", "logs", "stop"):
        assert main([command, "runs/smal"]) == EXIT_USAGE
        check_shown(capsys.readouterr().err, names=["runs/smal"], fix=["runs/small?"])
