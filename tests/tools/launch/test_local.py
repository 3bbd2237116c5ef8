"""`launch local`, and status, logs and stop of what it starts, as processes of their own."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import psutil
import pytest

from errors import holds, lines_with
from launch.conftest import records_of
from ranks import forkserver
from recipes import recipe
from tunesmith.start.run import train
from waiting import wait_for
from warm import Warm, fork_ranks

pytestmark = [pytest.mark.slow, pytest.mark.long]

LONG = {
    "train": {"duration": "100000 steps", "schedule": "constant"}, "checkpoint": {"every": "1000 steps", "keep": 1},
}  # fmt: skip
TIME = 240  # seconds, for two ranks on a busy machine


def start(*words: str | Path) -> Warm:
    """The command line, whose ranks are forked from it."""
    return Warm([*map(str, words)], prepare=fork_ranks)


def finish(*words: str | Path, code: int = 0) -> str:
    process = start(*words)
    said = "".join(process.communicate(timeout=TIME))
    assert process.returncode == code, said
    return said


@pytest.fixture
def place(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Path]]:
    """Makes a recipe's file; jobs are noted below tmp_path. What is left running is killed."""
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
    """Ctrl-C saves, kill -9 of the agent ends its ranks, and the next start goes on."""
    file, out = place(**LONG), tmp_path / "run"
    launch = ("launch", "local", file, "--ranks", "2")
    agent = start(*launch)
    wait_for(lambda: len(records_of(out)) >= 3, agent)
    family = [psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)]
    connections = [c for process in family for c in process.net_connections()]
    listening = {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}
    agent.send_signal(signal.SIGINT)
    said = "".join(agent.communicate(timeout=TIME))
    assert agent.returncode == 75, said
    saved = len(records_of(out))
    assert holds(said, "2 ranks", f"step {saved}")
    assert "Traceback" not in said
    assert not any(process.is_running() for process in family)
    assert not [*tmp_path.glob("torchelastic_*"), *tmp_path.glob("tunesmith-ranks-*")]
    agent = start(*launch)
    wait_for(lambda: len(records_of(out)) > saved, agent)
    ranks = psutil.Process(agent.pid).children()
    assert len(ranks) == 2
    agent.kill()
    agent.wait()
    _, alive = psutil.wait_procs(ranks, timeout=120)
    assert not alive
    short = {"train.duration": f"{saved + 3} steps"}
    changes = {**short, "checkpoint.resume": "force"}  # the run gets shorter
    finish(*launch, *map("=".join, changes.items()))
    assert (out / "final" / "manifest.json").exists()
    train(file, {**short, "output_dir": str(tmp_path / "alone")}, quiet=True)
    losses, alone = ([row["loss"] for row in records_of(f)] for f in (out, tmp_path / "alone"))
    assert len(losses) == saved + 3
    assert losses == pytest.approx(alone, rel=1e-5)  # fp32: sums in another order


def test_a_fault_before_the_first_step_is_2_and_said_once(
    place: Callable[..., Path], tmp_path: Path
):
    file = place(model={"name": str(tmp_path / "nowhere")})
    said = finish("launch", "local", file, "--ranks", "2", code=2)
    assert said.count("error:") == 1
    assert "Traceback" not in said


def test_a_detached_run_is_found_followed_and_stopped(place: Callable[..., Path], tmp_path: Path):
    file, out = place(**LONG), tmp_path / "run"
    said = finish("launch", "local", file, "--ranks", "2", "--detach")
    name = said.split()[0]
    (note,) = (tmp_path / "state" / "tunesmith" / "jobs").iterdir()
    assert note.stem == name
    wait_for(lambda: len(records_of(out)) >= 2)
    (row,) = json.loads(finish("status", "--json", name))
    assert (row["state"], row["text"].partition(" ")[0]) == ("running", "step")
    follower = start("logs", "-f", out)
    finish("stop", "--wait", out)
    followed = "".join(follower.communicate(timeout=TIME))
    assert lines_with(followed, f"step {len(records_of(out))}")
    assert f"stopped  saved, step {len(records_of(out))}" in finish("status", name)
    finish("stop", name)
    assert not (out / "stop").exists()
