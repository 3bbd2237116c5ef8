"""A run whose host runs out of memory: stopped with all saved, and resumed to the same numbers."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from errors import holds, lines_with, refuses
from logged import logged_lines
from recipes import make_run
from tunesmith.checkpoint.resume import Progress
from tunesmith.distributed.ranks import ONE_PROCESS
from tunesmith.errors import LowMemoryError
from tunesmith.host.memory import MemoryFigures
from tunesmith.host.signals import LowMemory
from tunesmith.runtime.memory_guard import MemoryGuard
from tunesmith.start import run as start
from tunesmith.start import session
from tunesmith.start.run import train
from tunesmith.train_model import TrainModel
from tunesmith.training.result import stopped_by
from warm import run_warm

GIB = 2**30
ROOM = MemoryFigures(16 * GIB, 9 * GIB, free=GIB, cached=6 * GIB, shared=0)
NONE = replace(ROOM, available=GIB // 10)
SAME = ("step", "loss", "grad_norm", "val_loss", "epoch", "tokens")


def records(out: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "metrics.jsonl").open())
    return [{key: value for key, value in record.items() if key in SAME} for record in lines]


class Feed:
    """What the guard of a run reads; the run waits until it has read that memory is short."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.figures = ROOM
        self.guards: list[MemoryGuard] = []

        def made(*args: Any) -> MemoryGuard:
            self.guards.append(MemoryGuard(*args, read=lambda: self.figures))
            return self.guards[-1]

        monkeypatch.setattr(start, "MemoryGuard", made)

    def run_short(self) -> None:
        self.figures = NONE
        self.guards[-1]._thread.join(60)
        assert self.guards[-1].stop.low_memory is not None


@pytest.mark.slow
def test_a_step_is_left_in_its_middle_and_the_one_before_is_saved(tiny, tmp_path, monkeypatch):
    feed, forward, passes = Feed(monkeypatch), TrainModel.forward, list[int]()

    def counted(self: TrainModel, *given: Any) -> Any:
        if self.training:
            passes.append(1)
            if len(passes) == 8:  # of the third step's micro batches the second
                feed.run_short()
        return forward(self, *given)

    changes = {"train": {"micro_batch": "128 tokens"}, "adapter": {"dropout": 0.1}}
    run = make_run(tiny, tmp_path, **changes)
    train(make_run(tiny, tmp_path, output_dir=str(tmp_path / "whole"), **changes), quiet=True)
    monkeypatch.setattr(TrainModel, "forward", counted)
    with (
        refuses(LowMemoryError, cause="memory", names=["step"]) as caught,
        logged_lines() as lines,
    ):
        train(run)
    out, error = tmp_path / "run", caught.value
    stopped = json.loads((out / "stopped.json").read_text())
    step = stopped["step"]
    assert len(passes) == 8, "the rest of the step was computed"
    assert (error.exit_code, stopped["reason"], stopped["signal"]) == (75, "memory", None)
    assert error.where == str(out / f"checkpoint-{step}")
    assert stopped["figures"]["available_bytes"] == GIB // 10
    assert lines_with("\n".join(lines), "memory", f"training, step {step}")
    assert len(records(out)) == step
    assert not (out / "failure.json").exists()
    feed.figures = ROOM
    monkeypatch.setattr(TrainModel, "forward", forward)
    train(run, quiet=True)
    assert records(out) == records(tmp_path / "whole")
    assert not (out / "stopped.json").exists()


@pytest.mark.slow
def test_memory_that_is_short_while_the_model_loads_ends_the_start(tiny, tmp_path, monkeypatch):
    feed, build_model = Feed(monkeypatch), session.build_model

    def built(*args: Any, **options: Any) -> Any:
        feed.run_short()
        return build_model(*args, **options)

    monkeypatch.setattr(session, "build_model", built)
    with refuses(LowMemoryError, where="", cause="memory") as caught:
        train(make_run(tiny, tmp_path), quiet=True)
    assert caught.value.exit_code == 75
    assert "loading" in caught.value.why
    assert not (tmp_path / "run").exists(), "a start that saved nothing leaves nothing"


@pytest.mark.slow
@pytest.mark.nightly
def test_a_real_process_that_takes_all_memory_of_a_control_group(tmp_path: Path) -> None:
    """benchmarks/faults/memory_guard.py does it 20 times, and goes on with each run."""
    script = Path(__file__).parents[2] / "benchmarks" / "faults" / "memory_guard.py"
    words = ["--times", 1, "--limit", 800, "--rates", 60, "--stop-only"]
    done = run_warm(
        [*words, "--json", tmp_path / "found.json"],
        program=script,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TUNESMITH_CACHE": str(tmp_path / "cache")},
        timeout=600,
    )
    if done.returncode == 3:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    found = json.loads((tmp_path / "found.json").read_text())["runs"][0]
    assert (found["exit_code"], found["killed_by_kernel"], found["clean"]) == (75, 0, True), (
        done.stderr
    )


@pytest.mark.parametrize(
    ("train", "kept", "can_shrink"),
    [
        ({}, "5 examples", True),
        ({}, None, False),
        ({"optimizer_in_backward": True, "clip_norm": None}, "5 examples", False),
    ],
)
def test_a_smaller_micro_batch_is_named_where_the_run_takes_one(
    train, kept, can_shrink, tiny, tmp_path
):
    run = make_run(tiny, tmp_path, adapter={"kind": "none"})
    run = replace(run, train=replace(run.train, **train))
    Path(run.output_dir).mkdir()
    shortage = LowMemory("memory is short", {})
    error = stopped_by([(shortage, None)], run, Progress(step=2, micro_batch=kept), ONE_PROCESS)
    assert holds(error.fix, "train.micro_batch") == can_shrink
