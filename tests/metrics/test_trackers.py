"""Trackers are told each step once, and one that fails is left alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import refuses, warnings_with
from ranks import environment_of, free_port
from recipes import recipe
from records import RUN, record
from tunesmith.config.dump import to_yaml
from tunesmith.errors import MachineError
from tunesmith.metrics.sink import JsonlSink
from tunesmith.metrics.trackers import TRACKERS, Tracker, TrackerSink
from tunesmith.training.run import train


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """accelerate's TensorBoard tracker stands for all: it is always installed."""
    options = {"logging_dir": str(tmp_path / "events")}
    row = Tracker(lambda folder, known: options, lambda writer: "id", "set it up")
    monkeypatch.setitem(TRACKERS, "tensorboard", row)
    return "tensorboard"


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "events" / "tunesmith"), size_guidance={"scalars": 0})
    events.Reload()
    return sorted((e.step, e.value) for e in events.Scalars(tag))


def report(name: str, folder: Path, steps: range, resumed_at: int = 0, **changed: Any) -> list[str]:
    """The warnings of one start, which ends after `steps`."""
    warnings: list[str] = []
    sinks = [JsonlSink(folder / "metrics.jsonl"), TrackerSink(name, folder, warnings.append)]
    for sink in reversed(sinks):
        sink.open(RUN, resumed_at)
    for step in steps:
        for sink in sinks:
            sink.step(record(step, val_loss=1.0 / step, **changed))
    for sink in reversed(sinks):
        sink.close()
    return warnings


def test_each_step_is_reported_under_the_names_of_tensorboard(tmp_path, tensorboard, monkeypatch):
    for name, value in environment_of(0, 1, free_port()).items():  # as torchrun starts a rank
        monkeypatch.setenv(name, value)
    assert report(tensorboard, tmp_path, range(1, 4)) == []
    assert not torch.distributed.is_initialized()
    assert scalars(tmp_path, "train/loss") == [(1, 2.0), (2, 1.0), (3, pytest.approx(2 / 3))]
    assert scalars(tmp_path, "validation/loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert (tmp_path / "tensorboard-id.txt").read_text() == "id\n"


def test_a_step_that_is_repeated_is_reported_once_and_again_if_it_comes_out_otherwise(
    tmp_path, tensorboard
):
    """Killed after step 5 and resumed from checkpoint-3; then forced on with another rate."""
    report(tensorboard, tmp_path, range(1, 6))
    report(tensorboard, tmp_path, range(4, 8), resumed_at=3)
    for tag in ("train/loss", "validation/loss"):
        assert [step for step, _ in scalars(tmp_path, tag)] == [1, 2, 3, 4, 5, 6, 7]
    report(tensorboard, tmp_path, range(7, 8), resumed_at=6, loss=9.0)
    assert scalars(tmp_path, "train/loss")[6:] == [(7, pytest.approx(2 / 7)), (7, 9.0)]


def test_a_tracker_that_fails_is_told_once_and_left_alone(tmp_path, tensorboard, monkeypatch):
    from accelerate.tracking import TensorBoardTracker

    calls: list[int] = []

    def gone(self: object, values: dict, step: int) -> None:
        calls.append(step)
        raise ConnectionError("http://ada:secret@host: the server is gone")

    monkeypatch.setattr(TensorBoardTracker, "log", gone)
    (warning,) = report(tensorboard, tmp_path, range(1, 6))
    assert warnings_with(warning, "tensorboard", "http://***@host")
    assert calls == [1]


def test_a_tracker_that_does_not_start_is_refused(tmp_path: Path, tensorboard: str) -> None:
    (tmp_path / "events").write_text("a file")
    with refuses(MachineError, names=["tensorboard"]):
        report(tensorboard, tmp_path, range(1, 2))


@pytest.mark.parametrize(
    ("name", "log", "where"),
    [("mlflow", {"trackers": ["mlflow"]}, "log.trackers"), ("wandb", {"wandb": True}, "log.wandb")],
)
def test_a_missing_package_is_told_before_the_model_is_looked_for(
    name, log, where, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe(tmp_path / "no-such-model", tmp_path, log=log)))
    with refuses(MachineError, where=where, names=[name], fix=["pip install", where]):
        train(path, quiet=True)
