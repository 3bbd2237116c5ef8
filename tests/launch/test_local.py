"""`launch local`, and status, logs and stop of what it starts, as processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from recipes import recipe
from tunesmith.training.run import train
from waiting import wait_for

LONG = {"train": {"duration": "100000 steps"}, "checkpoint": {"every": "1000 steps", "keep": 1}}
TIME = 240  # seconds, for two ranks that load torch on a busy machine


def start(*words: str | Path, **changes: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tunesmith", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **changes)


def finish(*words: str | Path) -> str:
    process = start(*words)
    said = process.communicate(timeout=TIME)[0]
    assert process.returncode == 0, said
    return said


def steps(out: Path) -> int:
    return (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def place(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Makes a recipe's file; jobs are noted below tmp_path. Whatever is left running at the end is killed."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def make(**changes: Any) -> Path:
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps(recipe(tiny, tmp_path, held=False, **changes)))
        return file

    yield make
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get("XDG_STATE_HOME") == str(
            tmp_path / "state"
        ) and process.pid != os.getpid():
            process.kill()


def test_two_ranks_train_as_one_process(place: Callable[..., Path], tmp_path: Path):
    file = place()
    train(file, {"output_dir": str(tmp_path / "alone")}, say=None)
    said = finish("launch", "local", file, "--ranks", "2")
    assert "2 ranks" in said
    assert (tmp_path / "run" / "final" / "manifest.json").exists()
    # fp32: sums in another order
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)


def test_ctrl_c_saves_goes_on_and_kill_9_of_the_agent_ends_its_ranks(place: Callable[..., Path], tmp_path: Path):
    """It listens on loopback alone, and leaves no process and no file behind."""
    file, out = place(**LONG), tmp_path / "run"
    agent = start("launch", "local", file, "--ranks", "2")
    wait_for(lambda: steps(out) >= 3, agent)
    family = [psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)]
    listening = {c.laddr.ip for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}
    agent.send_signal(signal.SIGINT)
    said = agent.communicate(timeout=TIME)[0]
    assert agent.returncode == 75, said
    saved = steps(out)
    assert f"step {saved} is saved" in said
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
        json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines(True) if line[-1] == "\n"
    ]
    assert whole == [*range(1, len(whole) + 1)]


def test_a_fault_before_the_first_step_is_2_and_said_once(place: Callable[..., Path], tmp_path: Path):
    file = place(model={"name": str(tmp_path / "nowhere")})
    agent = start("launch", "local", file, "--ranks", "2")
    said = agent.communicate(timeout=TIME)[0]
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
    assert (row["phase"], row["text"].partition(" ")[0]) == ("running", "step")
    follower = start("logs", "-f", out)
    assert "asked to save" in finish("stop", "--wait", out)
    assert "is saved" in follower.communicate(timeout=TIME)[0]
    assert "stopped, saved" in finish("status", name)
    assert "nothing to stop" in finish("stop", name)


def test_status_and_stop_of_a_run_that_nobody_launched(place: Callable[..., Path], tmp_path: Path):
    out = tmp_path / "run"
    process = start("train", place(**LONG))
    wait_for(lambda: steps(out) >= 1, process)
    assert "running" in finish("status", out)
    finish("stop", "--wait", out)
    assert process.wait(timeout=TIME) == 75


def test_a_detached_start_that_cannot_work_is_told(
    place: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tunesmith.launch.local.BEGINS", float(TIME))
    from tunesmith.config.load import load_recipe
    from tunesmith.errors import RunError
    from tunesmith.launch import local
    from tunesmith.launch.jobs import agent_words, write_recipe

    run = load_recipe(place(model={"name": str(tmp_path / "nowhere")}))
    with pytest.raises(RunError, match="it ended at once, with 2"):
        local.detach(run, agent_words(write_recipe(run), ranks=1, restarts=0))


def test_a_word_that_is_no_job_is_refused(place: Callable[..., Path], tmp_path: Path):
    process = start("status", "slurm-4")
    assert "neither a job" in process.communicate(timeout=TIME)[0]
    assert process.returncode == 2
