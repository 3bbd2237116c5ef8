"""A stop that comes while a run loads is kept: nothing is trained, by one process or by ranks that
a launcher would restart.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from errors import lines_with
from recipes import recipe
from tunesmith.launch.job import Job
from tunesmith.run_dir import RUNNING, STOP_FILE, RunState
from tunesmith.stages.tokens import TokenFacts
from waiting import TIME, wait_for
from warm import Warm, fork_ranks, run_warm

pytestmark = pytest.mark.slow

LOADED = "loaded"  # a file of the run directory that lets the load end


def load_slowly() -> None:
    """Let each load wait until the test allows its end."""
    from tunesmith.training import build as build_module

    build = build_module.build_from_tokens

    def slow_build(tokens: TokenFacts, *words: Any, **options: Any) -> Any:
        out = Path(tokens.run.output_dir)
        deadline = time.monotonic() + TIME
        while not (out / LOADED).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return build(tokens, *words, **options)

    build_module.build_from_tokens = slow_build


def slow_ranks() -> None:
    load_slowly()
    fork_ranks()


@pytest.fixture
def file(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    values = recipe(tiny, tmp_path, held=False, train={"duration": "4 steps"})
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    return tmp_path / "recipe.yaml"


def test_the_file_stop_is_kept_by_one_process_and_an_old_one_is_not(file: Path, tmp_path: Path):
    out = tmp_path / "run"
    out.mkdir()
    (out / STOP_FILE).touch()  # of nobody's start
    process = Warm(["train", file], prepare=load_slowly)
    try:
        wait_for((out / RUNNING).exists, process)
        (out / STOP_FILE).touch()
        (out / LOADED).touch()
        printed = "".join(process.communicate(timeout=TIME))
    finally:
        process.kill()
    assert process.returncode == 75, printed
    assert lines_with(printed, "stop file")
    assert not (out / STOP_FILE).exists()
    assert not (out / "final").exists()
    assert Job("", str(out)).state().state is RunState.STOPPED
    done = run_warm(["train", file])
    assert done.returncode == 0, done.stderr
    assert (out / "final" / "manifest.json").exists()


@pytest.mark.nightly
def test_a_signal_while_a_run_is_resumed_leaves_it_stopped(file: Path, tmp_path: Path):
    """One process writes stopped.json too, which `status` reads."""
    out = tmp_path / "run"
    assert run_warm(["train", file, "train.duration=3 steps"]).returncode == 0
    process = Warm(["train", file], prepare=load_slowly)
    try:
        wait_for((out / RUNNING).exists, process)
        os.kill(process.pid, signal.SIGTERM)
        printed = "".join(process.communicate(timeout=TIME))
    finally:
        process.kill()
    assert process.returncode == 75, printed
    assert Job("", str(out)).state().state is RunState.STOPPED


@pytest.mark.parametrize(
    "how",
    [
        "SIGTERM to the launcher",
        pytest.param("SIGTERM to a rank", marks=pytest.mark.nightly),
        pytest.param("the file stop", marks=pytest.mark.nightly),
    ],
)
def test_ranks_that_a_launcher_would_start_again_stay_stopped(file: Path, tmp_path: Path, how: str):
    out = tmp_path / "run"
    words = ["launch", "local", file, "--ranks", "2", "--restarts", "3"]
    launcher = Warm(words, prepare=slow_ranks)
    try:
        wait_for((out / RUNNING).exists, launcher)
        ranks = psutil.Process(launcher.pid).children()
        if how == "the file stop":
            (out / STOP_FILE).touch()
            (out / LOADED).touch()
        else:
            receiver = launcher.pid if "launcher" in how else ranks[1].pid
            os.kill(receiver, signal.SIGTERM)
        printed = "".join(launcher.communicate(timeout=TIME))
    finally:
        launcher.kill()
    assert launcher.returncode == 75, printed
    assert not (out / "final").exists()
    assert not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text()
    assert "Traceback" not in printed
    assert "cause: link" not in printed
    assert ("forwards it to its ranks" in printed) == ("launcher" in how)
