"""What a job says of itself where its run directory has seen other launches, before it or since."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from errors import check_shown, holds, lines_with
from invoke import invoke
from recipes import recipe
from tunesmith.config.load import load_recipe
from tunesmith.errors import EXIT_OK, EXIT_USAGE
from tunesmith.launch.job import FOLDER, Job, save_job
from tunesmith.launch.jobs import JOB_CLASSES
from tunesmith.launch.local_job import LocalJob
from tunesmith.launch.slurm_job import SlurmJob
from tunesmith.launch.swarm_job import SwarmJob
from tunesmith.run_dir import METRICS, STOP_FILE, STOPPED, RunState

A_MINUTE_AGO = time.time() - 60
RUN_SLURM = "tunesmith.launch.slurm_job.run_slurm"


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory whose last start failed a minute ago."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "failure.json").write_text('{"what": "rank 1 was killed"}')
    os.utime(folder / "failure.json", (A_MINUTE_AGO, A_MINUTE_AGO))
    return folder


@contextmanager
def at_work(out: Path) -> Iterator[None]:
    """Hold the lock of a run directory, as a run that trains does."""
    import fcntl

    with (out / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def launched(name: str, out: Path, agent: psutil.Process | None = None, log: str = "") -> LocalJob:
    """A job that is noted; its process is gone unless it is given."""
    details = {"pid": "0", "created": "never"}
    if agent is not None:
        details = {"pid": str(agent.pid), "created": str(agent.create_time())}
    job = LocalJob(name, str(out), log=log, details=details)
    save_job(job)
    return job


def test_an_earlier_job_of_a_directory_neither_tells_of_the_later_one_nor_stops_it(out: Path):
    earlier = launched("local-1", out)
    (out / STOPPED).write_text("{}")
    assert earlier.state().state is RunState.STOPPED
    later = launched("local-2", out)
    (out / STOPPED).write_text("{}")
    assert later.state().state is RunState.STOPPED
    assert earlier.state().state is RunState.UNKNOWN
    assert holds(earlier.state().text, "local-2")
    with at_work(out):
        assert holds(earlier.stop(), "local-2")
        assert not (out / STOP_FILE).exists()
        later.stop()
    assert (out / STOP_FILE).exists()


def test_a_start_that_has_not_locked_its_directory_is_running_everywhere(out: Path) -> None:
    """As after `launch local --detach`, while the ranks still import torch."""
    (out / "failure.json").unlink()
    launched("local-1", out)
    (out / STOPPED).write_text('{"reason": "file"}')
    (out / METRICS).write_text('{"step": 1, "loss": 1.5, "step_seconds": 2.0}\n')
    (out / FOLDER).mkdir()

    def states() -> list[str]:
        status = json.loads(invoke("status", out, "--json").out)[0]["state"]
        return [status, json.loads(invoke("report", out, "--json").out)["runs"][0]["state"]]

    assert states() == ["stopped"] * 2
    with psutil.Popen([sys.executable, "-ISc", "input()"], stdin=subprocess.PIPE) as agent:
        launched("local-2", out, agent)
        assert states() == ["running"] * 2
        agent.communicate()
    assert states()[1:] == ["stopped"]


@pytest.mark.parametrize("launcher", [["local", "--detach"], ["swarm", "--render"]])
def test_nothing_is_launched_or_written_beside_a_run_that_is_at_work(
    launcher: list[str], tiny: Path, out: Path
) -> None:
    """Its process need not have the lock yet, and need not have been launched."""
    (out / "failure.json").unlink()  # the folder is no run's
    file = out.parent / "recipe.yaml"
    file.write_text(json.dumps(recipe(tiny, out.parent, held=False)))
    command = ("launch", launcher[0], file, *launcher[1:])
    log = out / "launch" / "output.log"
    log.parent.mkdir()
    log.write_text("first")
    launched("local-1", out, psutil.Process())
    launched("local-2", out)
    done = invoke(*command)
    assert done.code == EXIT_USAGE
    check_shown(done.err, where=str(out), names=["local-1"], fix=["tunesmith stop local-1"])
    shutil.rmtree(out.parent / "state")
    (out.parent / "state").touch()  # no job can be noted
    with at_work(out):
        done = invoke(*command)
    assert done.code == EXIT_USAGE
    check_shown(done.err, where=str(out), fix=[f"tunesmith stop {out}"])
    assert log.read_text() == "first"
    assert [path.name for path in log.parent.iterdir()] == [log.name]


def test_what_lay_there_before_a_launch_is_not_its_end(out: Path):
    assert holds(Job("", str(out)).state().text, "rank 1")
    job = launched("local-1", out)
    assert job.state().state is RunState.UNKNOWN
    (out / "failure.json").write_text('{"what": "rank 0 was killed"}')
    assert holds(job.state().text, "rank 0")


def test_a_run_at_work_tells_its_steps_and_the_time_that_is_left(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out.parent)
    (out / "failure.json").unlink()
    (out / "config.yaml").write_text("train: {duration: 5 epochs}\n")
    rows = [
        {"step": n, "epoch": n / 38, "loss": 1.5, "step_seconds": 60.0 if n == 1 else 2.0}
        for n in range(1, 88)
    ]
    (out / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "env.json").write_text('{"recipe_hash": ""}')
    with at_work(out):
        (line,) = invoke("status", "run").out.splitlines()
    assert line.split()[:2] == ["run", "running"], "it has no other name"
    assert holds(line, "step 87 of 190", 1.5, "3:26 min")
    assert "left" not in invoke("status", "run").out, "it was killed"


def test_a_queue_that_does_not_answer_hides_no_other_job(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RUN_SLURM, lambda *_: (1, "", "no-controller"))
    launched("local-1", out)
    (out / "failure.json").write_text('{"what": "rank 1 was killed"}')
    for number in ("4", "5"):
        folder = out.parent / f"run-{number}"
        save_job(SlurmJob(f"slurm-{number}", str(folder), details={"id": number}))
    done = invoke("status", "--json")
    rows = json.loads(done.out)
    states = {row["job"]: row["state"] for row in rows}
    assert states == {"local-1": "failed", "slurm-4": "unknown", "slurm-5": "unknown"}
    unknown = [row["text"] for row in rows if row["state"] == "unknown"]
    assert all(holds(text, "no-controller", "tunesmith doctor --slurm") for text in unknown)
    assert done.code == EXIT_OK


def test_what_files_tell_of_a_start_is_told_before_it_is_out_of_sight(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is not there, and a row that is not the first."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe(tiny, tmp_path, held=False)))
    command = ("launch", "local", file, "--detach")
    done = invoke(*command, "model.name=/nowhere/model")
    assert done.code == EXIT_USAGE
    check_shown(done.err, where="model.name", names=["/nowhere/model"])
    rows = Path(load_recipe(file).data.train[0].source)
    count = rows.read_text().count("\n")
    rows.write_text(rows.read_text() + '{"prompt": 1}\n{"prompt": 1}\n')
    done = invoke(*command)
    assert done.code == EXIT_USAGE
    check_shown(done.err, where=f"{rows.name}:{count + 1}", names=[2, count + 2])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [["local", "--detach"], ["slurm", "--gpus-per-node", "0"], ["swarm"]]
)
def test_a_run_that_has_finished_is_not_launched_again(
    launcher: list[str], trained_copy: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained_copy()
    monkeypatch.setenv("PATH", "")  # no sbatch
    monkeypatch.setenv("XDG_STATE_HOME", str(run.parent / "state"))
    command = ("launch", launcher[0], run.parent / "recipe.yaml", *launcher[1:])
    done = invoke(*command)
    assert done.code == EXIT_OK, done.err
    assert lines_with(done.out, "8 steps", "train.duration")
    assert not (run / "launch").exists()
    if launcher[0] == "slurm":
        done = invoke(*command, "train.duration=9 steps")
        assert done.code == EXIT_USAGE
        check_shown(done.err, where="PATH", names=["sbatch"])


@pytest.mark.parametrize(
    "text",
    [
        "start 0\nerror: rows.jsonl:8\n    2/19\n  why: x\nsrun: error: n1: task 0",
        "start 0\nslurmstepd: error: rows.jsonl:8 2/19\nerror: later\n",
    ],
    ids=["of a rank", "of Slurm"],
)
def test_a_start_that_died_before_its_run_tells_the_first_error_of_its_log(
    text: str, out: Path
) -> None:
    """Beside an earlier run too; what that one says is not of this start."""
    file = out / FOLDER / "output.log"
    file.parent.mkdir()
    file.write_text(text)
    (out / METRICS).write_text('{"step": 1, "loss": 1.5}\n')
    os.utime(out / METRICS, (A_MINUTE_AGO, A_MINUTE_AGO))
    job = launched("local-1", out, log=str(file))
    assert job.state() == (RunState.FAILED, "rows.jsonl:8 2/19")
    (out / METRICS).touch()
    assert job.state().state is RunState.KILLED, "it had begun"


def test_a_requeued_job_tells_the_step_that_it_goes_on_from(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pending = "PENDING|BeginTime|0:00|10:00|\n"
    monkeypatch.setattr(RUN_SLURM, lambda *_: (0, pending, ""))
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


CASES = json.loads(Path(__file__).with_name("states.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_a_job_tells_how_it_ended(case, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out / "failure.json").unlink()
    monkeypatch.setattr(RUN_SLURM, lambda *_: (0, case.get("queue", ""), ""))
    job = JOB_CLASSES[case["kind"]](
        f"{case['kind']}-4", str(out), host="spark-a", log=str(out / FOLDER / "job.log"),
        details={"id": "4", "pid": "0", "created": ""},
    )  # fmt: skip
    monkeypatch.setattr(SwarmJob, "manager", lambda self: "")
    monkeypatch.setattr(SwarmJob, "tasks", lambda *_: None)
    save_job(job)
    files = {"config.yaml": "{}"} | case.get("files", {})
    for name, text in (files | {f"{FOLDER}/job.log": case.get("log", "")}).items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)
    if not case.get("files"):
        (out / "config.yaml").unlink()
    if "later" in case:
        launched(case["later"], out)
    state = job.state()
    assert state.state == case["state"]
    assert holds(state.text, *case["names"])


def test_a_run_that_trains_is_stopped_by_a_file_because_a_second_signal_ends_it(out, monkeypatch):
    (out / METRICS).write_text('{"step": 1, "loss": 1.5}\n')
    job = launched("local-1", out, psutil.Process())
    monkeypatch.delattr("os.kill")
    with at_work(out):
        job.stop()
    assert (out / STOP_FILE).exists()


def test_a_mistyped_run_or_job_is_named(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(out.parent)
    (out.parent / "runs/small").mkdir(parents=True)
    assert "runs/small" not in invoke("status", "runs/smal").err, "it is no run"
    (out.parent / "runs/small" / METRICS).touch()
    for command in ("status", "logs", "stop"):
        done = invoke(command, "runs/smal")
        assert done.code == EXIT_USAGE
        check_shown(done.err, names=["runs/smal"], fix=["runs/small?"])
    assert invoke("status", "slurm-4").code == EXIT_USAGE
