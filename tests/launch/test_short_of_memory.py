"""A launcher starts a run that stopped because memory is short once more, with half the micro
batch, and then no more.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from errors import holds, lines_with
from launch.conftest import FED, available
from recipes import recipe
from tunesmith.host import signals
from tunesmith.host.signals import NAMES
from tunesmith.launch import elastic, node
from waiting import wait_for
from warm import fork_in_place, fork_ranks, run_warm

# One rank's device is full in step 6, with the first micro batch or with any.
FULL = """
import os, sys
from tunesmith.distributed.heartbeat import Heartbeat
progress = Heartbeat.progress
def fill(self, step=None):
    progress(self, step)
    halved = any(word.startswith("train.micro_batch=") for word in sys.argv)
    is_full = self.peers.rank == int(os.environ["FULL_RANK"])
    if step == 5 and is_full and not (halved and "ENOUGH" in os.environ):
        import torch
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
Heartbeat.progress = fill
"""


def start_filled(code: str) -> None:
    """`prepare` of an agent: what sitecustomize does in an interpreter of its own."""
    exec(code, {})
    fork_ranks()
    fork_in_place()


def steps(out: Path) -> int:
    return (
        (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0
    )


@pytest.mark.slow
def test_one_rank_takes_its_own_place_once(tiny: Path, tmp_path: Path) -> None:
    out, file, root = tmp_path / "run", tmp_path / "recipe.yaml", tmp_path / "root"
    train = {"duration": "100000 steps", "micro_batch": "512 tokens"}
    file.write_text(json.dumps(recipe(tiny, tmp_path, held=False, train=train)))
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(FED)
    available(root, 8192)
    paths = os.pathsep.join([str(tmp_path / "site"), *sys.path])
    environ = os.environ | {
        "PYTHONPATH": paths,
        "FED": str(root),
        "TUNESMITH_CACHE": str(tmp_path / "cache"),
    }
    command = [
        sys.executable,
        "-m",
        "tunesmith.launch.node",
        "--ranks",
        "1",
        "--",
        "train",
        str(file),
    ]
    agent = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ
    )
    try:
        wait_for(lambda: steps(out) > 1, agent)
        available(root, 100)
        wait_for((out / "stopped.json").exists, agent)
        first = json.loads((out / "stopped.json").read_text())
        available(root, 8192)
        wait_for(lambda: steps(out) > first["step"], agent)
        assert (first["reason"], first["smaller"]) == ("memory", "256 tokens")
        assert not (out / "stopped.json").exists()
        choices = json.loads((out / "env.json").read_text())["choices"]
        assert choices["micro batch"]["taken"] == "256 tokens"
        available(root, 100)
        said = agent.communicate(timeout=120)[0]
    finally:
        agent.kill()
        agent.wait()
    assert agent.returncode == 75, said
    last = json.loads((out / "stopped.json").read_text())
    assert (last["reason"], last["smaller"]) == ("memory", "128 tokens")
    assert said.count("'train.micro_batch=256 tokens'\n") == 1
    assert said.count(signals.SHORT) == 2
    progress = json.loads((out / f"checkpoint-{last['step']}/state/progress.json").read_text())
    assert progress["micro_batch"] == "256 tokens"


def run_agent(out: Path) -> int:
    """The exit code of a node's agent of two ranks; the signal handlers of this process are as
    before.
    """
    handlers = [signal.getsignal(signal.Signals[name]) for name in NAMES]
    try:
        words = ["-m", "tunesmith", "train", "my-recipe.yaml"]
        return node.run_program(
            node.parser().parse_args(["--", "train", "my-recipe.yaml"]), 2, words, out
        )
    finally:
        for name, handler in zip(NAMES, handlers, strict=True):
            signal.signal(signal.Signals[name], handler)


@pytest.mark.parametrize("smaller", ["256 tokens", ""])
def test_several_ranks_start_again_once(
    smaller: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started: list[list[str]] = []

    def ranks(launcher: list[str], *_: object) -> int:
        started.append(launcher)
        record = tmp_path / "stopped.json"
        record.write_text(json.dumps({"reason": "memory", "smaller": smaller}))
        os.utime(record, (1e9 + len(started),) * 2)
        return 0

    for name in ("run_ranks", "prepare_environment"):
        monkeypatch.setattr(node, name, ranks if name == "run_ranks" else lambda *_: None)
    monkeypatch.setenv("HF_TOKEN", "hf_CANARY0123456789")
    code = run_agent(tmp_path)
    assert code == 75
    # All users of a machine see the words of its processes.
    assert "CANARY" not in str(started)
    assert len(started) == (2 if smaller else 1)
    if smaller:
        assert started[1][-2:] == ["my-recipe.yaml", "train.micro_batch=256 tokens"]
        names = [launcher[launcher.index("--rdzv-id") + 1] for launcher in started]
        assert len({*names}) == 2, "a rendezvous that has ended takes nobody"
        assert holds(capsys.readouterr().err, "train.micro_batch=256 tokens")


def test_what_ended_the_first_start_takes_no_restart_from_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that is killed while the second start loads leaves failure.json as the first one wrote
    it.
    """
    is_short: list[Callable[[], bool]] = []
    short_after_start: list[bool] = []

    def ranks(*_: object) -> int:
        short_after_start.append(is_short[0]())
        if len(short_after_start) == 1:
            (tmp_path / "failure.json").write_text(json.dumps({"smaller": "256 tokens"}))
            assert is_short[0](), "torch's launcher must not start these ranks again"
        return 1

    monkeypatch.setattr(node, "run_ranks", ranks)
    monkeypatch.setattr(node, "prepare_environment", lambda *_: None)
    monkeypatch.setattr(
        elastic, "install_agent", lambda *_, **given: is_short.append(given["is_short"])
    )
    code = run_agent(tmp_path)
    assert code == 1
    assert short_after_start == [False, False]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "enough"), [(1, False), (2, True)], ids=["one rank, never enough", "two ranks"]
)
def test_a_device_that_is_full_gets_half_the_micro_batch_once(
    ranks: int, enough: bool, tiny: Path, tmp_path: Path
) -> None:
    out, file, site = tmp_path / "run", tmp_path / "recipe.yaml", tmp_path / "site"
    train = {"duration": "8 steps", "micro_batch": "512 tokens"}
    changes = {"train": train, "checkpoint": {"every": "3 steps"}, "parallel": {"replicate": ranks}}
    file.write_text(json.dumps(recipe(tiny, tmp_path, held=False, **changes)))
    site.mkdir()
    (site / "sitecustomize.py").write_text(FULL)
    environ = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(site), *sys.path]),
        "FULL_RANK": str(ranks - 1),
    }
    environ["TUNESMITH_CACHE"] = str(tmp_path / "cache")
    if enough:
        environ["ENOUGH"] = "1"
    words = ["--ranks", str(ranks), "--restarts", "2", "--", "train", str(file)]
    if ranks == 1:  # with restarts, a rank alone gets a launcher too
        words = words[:2] + words[4:]
    done = run_warm(
        words,
        program="tunesmith.launch.node",
        prepare=partial(start_filled, FULL),
        env=environ,
        timeout=240,
    )
    assert done.stderr.count("'train.micro_batch=256 tokens'\n") == 1, done.stderr
    assert lines_with(done.stderr, "step 3", out / "checkpoint-3")
    assert done.returncode == (0 if enough else 1), done.stderr
    choices = json.loads((out / "env.json").read_text())["choices"]
    assert choices["micro batch"]["taken"] == "256 tokens"
    if enough:
        assert steps(out) == 8
        assert not (out / "failure.json").exists()
    else:
        failure = json.loads((out / "failure.json").read_text())
        assert (failure["cause"], failure["smaller"], failure["last_step"]) == (
            "out-of-memory",
            "128 tokens",
            5,
        )
