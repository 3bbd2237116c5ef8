"""`launch local`, and status, logs and stop of what it starts, as processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import psutil
import pytest

from errors import check_shown, holds, lines_with
from ranks import forkserver
from recipes import recipe
from tunesmith.training.run import train
from waiting import wait_for
from warm import Warm, fork_ranks, run_warm

pytestmark = [pytest.mark.slow, pytest.mark.long]

LONG = {
    "train": {"duration": "100000 steps", "schedule": "constant"}, "checkpoint": {"every": "1000 steps", "keep": 1},
}  # fmt: skip
TIME = 240  # seconds, for two ranks on a busy machine


def start(*words: str | Path) -> Warm:
    """The command line, whose ranks are forked from it; `test_old_ways.py` starts all of them anew."""
    return Warm([*map(str, words)], prepare=fork_ranks)


def said_by(process: Warm) -> str:
    return "".join(process.communicate(timeout=TIME))


def finish(*words: str | Path) -> str:
    process = start(*words)
    said = said_by(process)
    assert process.returncode == 0, said
    return said


def steps(out: Path) -> int:
    return (
        (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0
    )


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def place(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Path]]:
    """Makes a recipe's file; jobs are noted below tmp_path.

    Whatever is left running at the end is killed.
    """
    forkserver()
    ensure_running()  # in another folder: what runs in this one is the test's
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def make(**changes: Any) -> Path:
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps(recipe(tiny, tmp_path, held=False, **changes)))
        return file

    monkeypatch.chdir(tmp_path)
    yield make
    for process in psutil.process_iter(["cwd"]):
        if process.info["cwd"] == str(tmp_path) and process.pid != os.getpid():
            process.kill()


def test_two_ranks_that_are_stopped_and_killed_train_as_one_process(
    place: Callable[..., Path], tmp_path: Path
):
    """Ctrl-C saves, kill -9 of the agent ends its ranks, and the next start goes on.

    The agent listens on loopback alone, and leaves no process and no file behind.
    """
    file, out = place(**LONG), tmp_path / "run"
    agent = start("launch", "local", file, "--ranks", "2")
    wait_for(lambda: steps(out) >= 3, agent)
    family = [psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)]
    listening = {
        c.laddr.ip for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}
    agent.send_signal(signal.SIGINT)
    said = said_by(agent)
    assert agent.returncode == 75, said
    assert "2 ranks" in said
    saved = steps(out)
    assert holds(said, f"step {saved}")
    assert "Traceback" not in said
    assert not any(p.is_running() for p in family)
    assert not [*tmp_path.glob("torchelastic_*"), *tmp_path.glob("tunesmith-ranks-*")]
    agent = start("launch", "local", file, "--ranks", "2")
    wait_for(lambda: steps(out) > saved, agent)
    ranks = psutil.Process(agent.pid).children()
    assert len(ranks) == 2
    agent.kill()
    agent.wait()
    _, alive = psutil.wait_procs(ranks, timeout=120)
    assert not alive
    whole = [
        json.loads(line)["step"]
        for line in (out / "metrics.jsonl").read_text().splitlines(True)
        if line[-1] == "\n"
    ]
    assert whole == [*range(1, len(whole) + 1)]
    short = {"train.duration": f"{saved + 3} steps"}
    changes = {**short, "checkpoint.resume": "force"}  # the run gets shorter
    finish("launch", "local", file, "--ranks", "2", *map("=".join, changes.items()))
    assert (out / "final" / "manifest.json").exists()
    train(file, {**short, "output_dir": str(tmp_path / "alone")}, quiet=True)
    assert len(losses(out)) == saved + 3
    # fp32: sums in another order
    assert losses(out) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)


def test_a_fault_before_the_first_step_is_2_and_said_once(
    place: Callable[..., Path], tmp_path: Path
):
    file = place(model={"name": str(tmp_path / "nowhere")})
    agent = start("launch", "local", file, "--ranks", "2")
    said = said_by(agent)
    assert agent.returncode == 2, said
    assert said.count("error:") == 1
    assert "Traceback" not in said


def test_a_detached_run_is_found_followed_and_stopped(place: Callable[..., Path], tmp_path: Path):
    file, out = place(**LONG), tmp_path / "run"
    said = finish("launch", "local", file, "--ranks", "2", "--detach")
    name = said.split()[0]
    (note,) = (tmp_path / "state" / "tunesmith" / "jobs").iterdir()
    assert note.stem == name
    wait_for(lambda: steps(out) >= 2)
    (row,) = json.loads(finish("status", "--json", name))
    assert (row["state"], row["text"].partition(" ")[0]) == ("running", "step")
    follower = start("logs", "-f", out)
    finish("stop", "--wait", out)
    assert lines_with(said_by(follower), f"step {steps(out)}")
    assert f"stopped  saved, step {steps(out)}" in finish("status", name)
    finish("stop", name)
    assert not (out / "stop").exists()


def test_status_and_stop_of_a_run_that_nobody_launched(place: Callable[..., Path], tmp_path: Path):
    out = tmp_path / "run"
    process = start("train", place(**LONG))
    wait_for(lambda: steps(out) >= 1, process)
    assert "running" in finish("status", out)
    finish("stop", "--wait", out)
    assert process.wait(timeout=TIME) == 75
    assert f"stopped  saved, step {steps(out)}" in finish("status", out)


def patient() -> None:
    from tunesmith.tools.launch import local

    local.START_TIMEOUT = float(TIME)
    fork_ranks()


def test_a_detached_start_that_cannot_work_is_told(
    place: Callable[..., Path], tiny: Path, tmp_path: Path
):
    """A fault that files alone do not tell: `test_jobs.py` has those."""
    model = shutil.copytree(tiny, tmp_path / "model")
    (model / "tokenizer.json").write_text("{")
    file = place(model={"name": str(model)})
    done = run_warm(["launch", "local", str(file), "--ranks", "2", "--detach"], prepare=patient)
    assert done.returncode == 1
    check_shown(done.stderr, names=[2], fix=["cat"])


def test_a_word_that_is_no_job_is_refused(place: Callable[..., Path], tmp_path: Path):
    done = run_warm(["status", "slurm-4"])
    assert "neither a job" in done.stderr
    assert done.returncode == 2
