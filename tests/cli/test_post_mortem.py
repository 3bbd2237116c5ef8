"""How a run ended is named with its likely cause: by the run, or by the next start where the run
could not.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from control_groups import control_group
from errors import holds, warnings_with
from recipes import make_run
from tunesmith.checkpoint.previous_crash import find_previous_crash
from tunesmith.checkpoint.resume import Progress
from tunesmith.config.dump import dump
from tunesmith.distributed.ranks import ONE_PROCESS
from tunesmith.host.memory import oom_kills
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
    return (
        (run / "metrics.jsonl").read_bytes().count(b"\n") if (run / "metrics.jsonl").exists() else 0
    )


def start(recipe: Path, *words: str, **options: Any) -> Warm:
    return Warm(
        ["train", str(recipe), *words], env={**os.environ, "OMP_NUM_THREADS": "1"}, **options
    )


def test_kill_9_is_told_by_the_next_start(recipe: Path) -> None:
    out = recipe.parent / "run"
    process = start(recipe)
    wait_for(lambda: steps_of(out) > 6, process)
    assert find_previous_crash(out) is not None  # were it not for the lock, which says that it runs
    process.kill()
    process.wait()
    steps = steps_of(out)
    err = go_on(recipe, out)
    assert warnings_with(err, steps)
    assert f"\n  where: process {process.pid} on " in err
    assert "  cause: killed: " in err
    assert not (out / RUNNING).exists()


def go_on(recipe: Path, out: Path) -> str:
    """What a next start says, which is stopped after some steps."""
    before = steps_of(out)
    process = start(recipe)
    wait_for(lambda: steps_of(out) > before, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    return process.communicate()[1]


@pytest.fixture
def little_memory() -> Iterator[Path]:
    """A control group of 1.2 GB; what grows beyond is ended by the kernel."""
    with control_group(
        "memory", {"memory.limit_in_bytes": "1200000000"}, {"memory.max": "1200000000"}
    ) as group:
        yield group


@pytest.mark.nightly
def test_the_kernels_end_for_want_of_memory_is_told_by_the_next_start(
    recipe: Path, little_memory: Path
) -> None:
    out, before = recipe.parent / "run", oom_kills()
    process = start(recipe)
    wait_for(lambda: steps_of(out) > 6, process)
    (little_memory / "cgroup.procs").write_text(str(process.pid))
    # The first that the kernel takes of this group
    Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
    hog = f"open('{little_memory}/cgroup.procs', 'w').write('0')\nheld = [bytearray(50_000_000) for _ in range(100)]"
    process.send_signal(signal.SIGSTOP)  # or its guard would stop it in time
    subprocess.run([sys.executable, "-c", hog], check=False)
    assert process.wait() == -signal.SIGKILL
    assert oom_kills() > before
    err = go_on(recipe, out)
    assert "  cause: oom-kill: " in err


def test_a_machine_that_was_started_again_and_another_host_are_told(recipe: Path) -> None:
    out = recipe.parent / "run"
    out.mkdir()
    note: dict[str, Any] = {"process": 7, "host": os.uname().nodename, "boot": "another"}
    note |= {"oom_kills": 0, "began": "2026-01-01"}
    (out / RUNNING).write_text(json.dumps(note))
    told = find_previous_crash(out)
    assert told is not None
    assert (told.cause, holds(told.what, 8)) == ("restarted", False)
    (out / RUNNING).write_text(json.dumps(note | {"host": "elsewhere"}))
    # The last line is torn
    (out / "metrics.jsonl").write_text('{"step": 5}\n' * 9000 + '{"step": 8}\n{"step": 9')
    told = find_previous_crash(out)
    assert told is not None
    assert holds(told.what, 8)
    assert (told.cause, "elsewhere" in told.where) == ("killed", True)
    (out / "failure.json").write_text("{}")  # another rank has said why
    assert find_previous_crash(out) is None
    os.utime(out / "failure.json", (1, 1))  # from the start before
    assert find_previous_crash(out) is not None
    for torn in ("", "{", "[]", "null", '{"process": 1}'):
        (out / "failure.json").unlink(missing_ok=True)
        (out / RUNNING).write_text(torn)
        assert find_previous_crash(out) is None


def test_a_stop_by_slurm_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, progress = make_run(tmp_path / "model", tmp_path), Progress(step=7)
    Path(run.output_dir).mkdir()

    def cause(signal: str) -> str:
        return stopped_by([(None, signal)], run, progress, ONE_PROCESS).cause

    assert cause("SIGTERM") == ""
    monkeypatch.setenv("SLURM_JOB_ID", "11")
    assert (cause("SIGTERM"), cause("SIGINT")) == ("preempted", "")


def test_a_stop_that_is_requeued_asks_for_no_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGUSR1 is the warning before a time limit; a request to stop is of a user."""
    run, progress = make_run(tmp_path / "model", tmp_path), Progress(step=7)
    Path(run.output_dir).mkdir()

    def fix(signal: str) -> str:
        return stopped_by([(None, signal)], run, progress, ONE_PROCESS).fix

    asked = fix("SIGUSR1")
    monkeypatch.setenv(REQUEUE, "1")
    assert fix("SIGTERM") == asked
    assert fix("SIGUSR1") != asked
    assert json.loads((tmp_path / "run/stopped.json").read_text())["next"] == fix("SIGUSR1")
    (tmp_path / "run/stop").touch()
    assert fix("SIGUSR1") == asked
