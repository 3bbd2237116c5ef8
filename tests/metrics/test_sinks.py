"""Every sink and tracker tells the same story, on a fresh start and after a resume."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import re
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import holds, refuses, warnings_with
from ranks import environment_of, free_port
from recipes import recipe
from records import RUN, record
from tunesmith.checkpoint.resume import Start
from tunesmith.config.dump import to_yaml
from tunesmith.config.schema import Log, Run
from tunesmith.errors import MachineError
from tunesmith.metrics.log_file import LogFile
from tunesmith.metrics.record import StepRecord, read_records
from tunesmith.metrics.sink import (
    JsonlSink,
    RankSink,
    SampleAnswer,
    Sink,
    Sinks,
    TensorBoardSink,
    writes_tensorboard,
)
from tunesmith.metrics.terminal import Terminal
from tunesmith.metrics.trackers import TRACKERS, Tracker, TrackerSink
from tunesmith.start.inputs import check_requirements
from tunesmith.start.run import train
from tunesmith.training.run_sinks import sinks_of
from tunesmith.units import Length


class TtyStream(io.StringIO):
    def isatty(self) -> bool:
        return True


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    every = {"scalars": 0, "tensors": 0}  # not a sample
    return EventAccumulator(str(folder), size_guidance=every).Reload()


def scalars(folder: Path, tag: str = "train/loss") -> list[tuple[int, float]]:
    return sorted((event.step, event.value) for event in events(folder).Scalars(tag))


def fill(sink: Sink, steps: Iterable[int], resumed_at: int = 0, **changed: Any) -> None:
    """One start with these steps."""
    sink.open(RUN, resumed_at)
    for step in steps:
        sink.step(record(step, **changed))
    sink.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_records_are_cut_back_and_go_on(rank: int, tmp_path: Path) -> None:
    def sink() -> JsonlSink | RankSink:
        return RankSink(tmp_path, 1) if rank else JsonlSink(tmp_path / "metrics.jsonl")

    first = sink()
    first.open(RUN, 0)
    for step in range(1, 6):
        first.step(record(step))
    assert len(first.path.read_text().splitlines()) == 5, "a line must be on its way before close"
    first.close()
    fill(sink(), [4], resumed_at=3, loss=9.0)
    found = [(r.step, r.loss) for r in read_records(first.path)]
    assert found == [(1, 2.0), (2, 1.0), (3, 2.0 / 3), (4, 9.0)]


def test_tensorboard_has_each_measured_value_under_its_name(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.open(RUN, 0)
    first = record(1, mfu=0.25, mfu_peak_tflops=92.0)
    sink.step(first)
    sink.step(record(2, val_loss=1.5))
    sink.samples(2, [SampleAnswer("ask", "line one\nline *two*", "expected")])
    sink.close()
    found = events(tmp_path)
    measured = {f"train/{name}" for name in first.values()} - {"train/step"}
    assert set(found.Tags()["scalars"]) == measured | {"validation/loss"}
    assert scalars(tmp_path) == [(1, 2.0), (2, 1.0)]
    assert scalars(tmp_path, "validation/loss") == [(2, 1.5)]
    assert {"recipe/text_summary", "sample/1/text_summary"} <= {*found.Tags()["tensors"]}


@pytest.mark.parametrize(
    ("shared", "resumed_at", "steps"), [(False, 3, [1, 2, 3, 4]), (True, 0, [1, 2, 3, 4, 5, 1])]
)
def test_tensorboard_purges_what_a_run_repeats_but_not_what_others_wrote(
    tmp_path, shared, resumed_at, steps
):
    fill(TensorBoardSink(tmp_path, shared), range(1, 6))
    time.sleep(1.1)  # event files are read in the order of the second in their names
    fill(TensorBoardSink(tmp_path, shared), [resumed_at + 1], resumed_at, loss=9.0)
    shown = scalars(tmp_path)
    assert [step for step, _ in shown] == sorted(steps)
    assert (steps[-1], 9.0) in shown


def test_a_full_disk_ends_tensorboard_alone(tmp_path: Path, monkeypatch, caplog) -> None:
    """The error of its thread comes at each later call."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    hook = threading.excepthook
    sink = TensorBoardSink(tmp_path)
    sink.open(RUN, 0)
    with monkeypatch.context() as patch:
        patch.setattr(sink._writer, "add_scalar", fail)
        patch.setattr(sink._writer, "flush", fail)
        for step in (1, 2):
            sink.step(record(step))
            sink.flush()
    assert [holds(line.message, "metrics.jsonl", tmp_path) for line in caplog.records] == [True]
    sink.close()
    assert threading.excepthook is hook


def log_of(
    folder: Path, records: Iterable[StepRecord], *, total: int, run: Run = RUN, stream: Any = None
) -> str:
    """What log.txt has of these steps."""
    log, stream = LogFile(folder / "log.txt"), stream or io.StringIO()
    sink = Terminal(log, total_steps=total, steps_per_epoch=10, stream=stream)
    sink.open(run, 0)
    for each in records:
        sink.step(each)
    sink.close()
    return (folder / "log.txt").read_text()


@pytest.mark.parametrize(
    ("interval", "wanted"), [("4 steps", [1, 4, 8, 10]), ("0.5 epochs", [1, 5, 10])]
)
def test_log_every_thins_lines_and_keeps_first_and_last(tmp_path, interval, wanted):
    run = replace(RUN, log=Log(every=Length.parse(interval)))
    log = log_of(tmp_path, map(record, range(1, 11)), run=run, total=10)
    assert re.findall(r"step (\d+)/10 ", log) == [str(step) for step in wanted]


def test_a_terminal_gets_a_bar_with_loss_rate_and_time(tmp_path, monkeypatch):
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    stream = TtyStream()
    log = log_of(tmp_path, [record(1), record(2)], total=4, stream=stream)
    for part in ("step 2/4", "loss 1.0000", "400 tok/s", "left 0 s"):
        assert part in stream.getvalue()
    assert "\x1b[" not in log


def test_a_recipe_chooses_its_sinks(tmp_path: Path, monkeypatch) -> None:
    def made(**log: Any) -> tuple[Run, Sinks]:
        run, log_file = replace(RUN, log=Log(**log)), LogFile(tmp_path / "log.txt")
        terminal = Terminal(log_file, total_steps=1, steps_per_epoch=1, stream=io.StringIO())
        return run, sinks_of(run, tmp_path, terminal)

    always = ["Terminal", "JsonlSink", "SamplesSink"]
    for log, more in (
        ({}, ["TensorBoardSink"]),
        ({"tensorboard": False, "tensorboard_dir": "logs"}, []),
        ({"trackers": ("mlflow", "trackio")}, ["TensorBoardSink", "TrackerSink", "TrackerSink"]),
    ):
        assert [type(sink).__name__ for sink in made(**log)[1].all] == always + more
    run, sinks = made(tensorboard_dir=str(tmp_path / "logs"))
    fill(sinks, [1])
    assert list((tmp_path / "logs").glob("events.out.tfevents.*"))
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1
    # Without the package TensorBoard is left out, or refused where it is asked for.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("tunesmith.metrics.sink.find_spec", lambda name: None)
    assert not writes_tensorboard(RUN)
    with refuses(MachineError, where="log.tensorboard", fix=["pip install 'tensorboard"]):
        check_requirements(run, Start())


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """accelerate's TensorBoard tracker stands for all: it is always installed."""
    options = {"logging_dir": str(tmp_path / "events")}
    row = Tracker(lambda folder, known: options, lambda writer: "id", "set it up")
    monkeypatch.setitem(TRACKERS, "tensorboard", row)
    return "tensorboard"


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


def tracked(folder: Path, tag: str) -> list[tuple[int, float]]:
    return scalars(folder / "events/tunesmith", tag)


def test_each_step_is_reported_under_the_names_of_tensorboard(tmp_path, tensorboard, monkeypatch):
    for name, value in environment_of(0, 1, free_port()).items():  # as torchrun starts a rank
        monkeypatch.setenv(name, value)
    assert report(tensorboard, tmp_path, range(1, 4)) == []
    assert not torch.distributed.is_initialized()
    assert tracked(tmp_path, "train/loss") == [(1, 2.0), (2, 1.0), (3, pytest.approx(2 / 3))]
    assert tracked(tmp_path, "validation/loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert (tmp_path / "tensorboard-id.txt").read_text() == "id\n"


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
