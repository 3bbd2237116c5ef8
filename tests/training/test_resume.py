"""Kill it anywhere: the next start goes on, and the numbers are those of a run that never stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from recipes import recipe
from tunesmith.checkpoint import state
from tunesmith.errors import StoppedError

SAME = ("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens", "examples", "val_loss")

# One process imports torch once and forks a child for each start: the kills hit real, whole processes.
DRIVER = """
import json, os, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from tunesmith.config.load import from_mapping
from tunesmith.errors import TunesmithError
from tunesmith.training.run import train
import peft
for line in sys.stdin:
    recipe = json.loads(line)
    pid = os.fork()
    if pid == 0:
        try:
            train(from_mapping(recipe, where="test", base=Path.cwd()), say=lambda text: None)
            os._exit(0)
        except TunesmithError as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(error.exit_code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Starter:
    """Starts runs in child processes of one warm process."""

    def __init__(self, folder: Path) -> None:
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": "1",
            "TUNESMITH_CACHE": str(folder / "cache"),
        }
        self.log = (folder / "driver.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=env,
        )

    def start(self, values: dict[str, Any]) -> int:
        """Start a run; its process id."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(values) + "\n")
        self.process.stdin.flush()
        return int(self.read())

    def read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the driver died: see driver.log"
        return line

    def wait(self) -> int:
        """Exit code of the run that was started last; minus the signal's number if one killed it."""
        return int(self.read())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


@pytest.fixture
def starter(tmp_path: Path):
    starter = Starter(tmp_path)
    yield starter
    starter.close()


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in json.loads(line).items() if k in SAME} for line in (run_dir / "metrics.jsonl").open()]


def lines(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


CASES = {
    "LoRA, dropout, packed": ({"adapter": {"dropout": 0.1}, "train": {"micro_batch": "128 tokens"}}, 20, 300),
    "full, bf16, masters": ({"adapter": {"kind": "none"}, "model": {"dtype": "bf16"}, "data": {"pack": False}}, 4, 80),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_kill_9_at_random_moments_changes_no_number(case: str, tiny: Path, tmp_path: Path, starter: Starter) -> None:
    changes, kills, steps = CASES[case]
    whole = recipe(tiny, tmp_path, **changes)
    whole["train"]["duration"] = f"{steps} steps"
    whole["validate"] = {"every": "20 steps"}
    cut = whole | {"output_dir": str(tmp_path / "cut")}
    starter.start(whole)
    assert starter.wait() == 0
    chance, inside = random.Random(0), 0
    for number in range(kills):
        before, pid = lines(tmp_path / "cut"), starter.start(cut)
        deadline = time.monotonic() + 60
        # At least one new step each time, so that the kills come to an end; then any moment of the next steps.
        while lines(tmp_path / "cut") <= before:
            assert time.monotonic() < deadline, "no step within a minute"
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.08))
        while number % 4 == 0 and not list((tmp_path / "cut").glob(".checkpoint-*.partial")):
            assert time.monotonic() < deadline, "no checkpoint is written"
        os.kill(pid, signal.SIGKILL)
        assert starter.wait() == -signal.SIGKILL, "the run ended before it could be killed: make it longer"
        inside += bool(list((tmp_path / "cut").glob(".checkpoint-*")))
    starter.start(cut)
    assert starter.wait() == 0
    assert steps_of(tmp_path / "cut") == steps_of(tmp_path / "run")
    assert len(steps_of(tmp_path / "run")) == steps
    if kills >= 20:
        assert inside >= 1, "no kill fell into the writing of a checkpoint"


def test_a_signal_saves_exits_75_and_resume_goes_on(tiny: Path, tmp_path: Path, starter: Starter) -> None:
    """One signal after another cuts one run; in the end it is the uninterrupted one."""
    whole = recipe(tiny, tmp_path, checkpoint={"every": None}, train={"duration": "120 steps"})
    cut = whole | {"output_dir": str(tmp_path / "cut")}
    starter.start(whole)
    assert starter.wait() == 0
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
        before, pid = lines(tmp_path / "cut"), starter.start(cut)
        while lines(tmp_path / "cut") < before + 5:
            time.sleep(0.002)
        recorded = lines(tmp_path / "cut")
        os.kill(pid, signal.Signals[name])
        assert starter.wait() == 75, name
        found = state.newest_checkpoint(tmp_path / "cut", pytest.fail)
        assert found is not None
        # It begins to save within one step; a step may end while the signal is on its way.
        assert recorded <= found.step <= recorded + 3
        assert not (tmp_path / "cut" / "failure.json").exists()
    starter.start(cut)
    assert starter.wait() == 0
    assert steps_of(tmp_path / "cut") == steps_of(tmp_path / "run")


def test_a_signal_before_the_first_step_has_nothing_to_save() -> None:
    """While the model loads, a signal ends the command at once, with exit code 75 and no failure.json."""
    from tunesmith.signals import StopRequest

    def be_stopped() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

    with StopRequest(), pytest.raises(StoppedError) as caught:
        be_stopped()
    assert caught.value.exit_code == 75
