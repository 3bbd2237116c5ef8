"""How a run ended is named with its likely cause: by the run, or by the next start."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from errors import holds, warnings_with
from recipes import make_run
from tunesmith.checkpoint import previous_crash
from tunesmith.checkpoint.previous_crash import find_previous_crash, note_running
from tunesmith.checkpoint.resume import Progress
from tunesmith.config.dump import dump
from tunesmith.distributed.ranks import ONE_PROCESS
from tunesmith.errors import EXIT_STOPPED, StoppedError
from tunesmith.host.signals import REQUEUE
from tunesmith.run_dir import RUNNING
from tunesmith.training.result import stopped_by
from waiting import wait_for
from warm import Warm

pytestmark = pytest.mark.slow

LONG = {"train": {"duration": "100000 steps"}, "checkpoint": {"every": "5 steps", "keep": 1}}


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> Path:
    run = make_run(tiny, tmp_path, held=False, output_dir=str(tmp_path / "run"), **LONG)
    (tmp_path / "recipe.yaml").write_text(dump(run))
    return tmp_path / "recipe.yaml"


def steps_of(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def start(recipe: Path) -> Warm:
    return Warm(["train", str(recipe)], env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_kill_9_is_told_by_the_next_start(recipe: Path) -> None:
    out = recipe.parent / "run"
    process = start(recipe)
    wait_for(lambda: steps_of(out) > 6, process)
    assert find_previous_crash(out) is not None  # were it not for the lock, which says that it runs
    process.kill()
    process.wait()
    killed, steps = process.pid, steps_of(out)
    process = start(recipe)
    wait_for(lambda: steps_of(out) > steps, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == EXIT_STOPPED
    err = process.communicate()[1]
    assert warnings_with(err, steps)
    assert f"\n  where: process {killed} on " in err
    assert "  cause: killed: " in err
    assert not (out / RUNNING).exists()


def test_each_cause_of_a_crash_is_told_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path
    with note_running(out):
        note = json.loads((out / RUNNING).read_text())
    # The last line is torn
    (out / "metrics.jsonl").write_text('{"step": 5}\n' * 9000 + '{"step": 8}\n{"step": 9')
    monkeypatch.setattr(previous_crash, "oom_kills", lambda: note["oom_kills"] + 1)
    causes = {"restarted": {"boot": "another"}, "oom-kill": {}, "killed": {"host": "elsewhere"}}
    for cause, changes in causes.items():
        (out / RUNNING).write_text(json.dumps(note | changes))
        told = find_previous_crash(out)
        assert told is not None
        assert (told.cause, holds(told.what, 8)) == (cause, True)
    assert "elsewhere" in told.where
    (out / "failure.json").write_text("{}")  # another rank has said why
    assert find_previous_crash(out) is None
    os.utime(out / "failure.json", (1, 1))  # from the start before
    assert find_previous_crash(out) is not None
    for torn in ("", "{", "[]", "null", '{"process": 1}'):
        (out / "failure.json").unlink(missing_ok=True)
        (out / RUNNING).write_text(torn)
        assert find_previous_crash(out) is None


def test_a_stop_by_slurm_says_so_and_one_that_is_requeued_asks_for_no_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGUSR1 is the warning before a time limit; a request to stop is of a user."""
    run, progress = make_run(tmp_path / "model", tmp_path), Progress(step=7)
    Path(run.output_dir).mkdir()

    def stopped(signal: str) -> StoppedError:
        return stopped_by([(None, signal)], run, progress, ONE_PROCESS)

    asked = stopped("SIGUSR1").fix
    assert stopped("SIGTERM").cause == ""
    monkeypatch.setenv("SLURM_JOB_ID", "11")
    assert (stopped("SIGTERM").cause, stopped("SIGINT").cause) == ("preempted", "")
    monkeypatch.setenv(REQUEUE, "1")
    assert stopped("SIGTERM").fix == asked
    assert stopped("SIGUSR1").fix != asked
    assert json.loads((tmp_path / "run/stopped.json").read_text())["next"] == stopped("SIGUSR1").fix
    (tmp_path / "run/stop").touch()
    assert stopped("SIGUSR1").fix == asked
