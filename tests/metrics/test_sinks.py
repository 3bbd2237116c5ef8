"""Every sink tells the same story, on a fresh start and after a resume."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import re
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Task, TaskID

from errors import holds, refuses
from records import RUN, record
from tunesmith.checkpoint.resume import Start
from tunesmith.config.schema import Log, Run, Train
from tunesmith.errors import MachineError
from tunesmith.host.streams import is_terminal
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
from tunesmith.metrics.terminal import Terminal, TimeLeftColumn
from tunesmith.stages.inputs import check_requirements
from tunesmith.training.run_sinks import sinks_of
from tunesmith.units import Length

EVENTS = {"scalars": 0, "tensors": 0}  # 0: keep every event, not a sample


class TtyStream(io.StringIO):
    def isatty(self) -> bool:
        return True


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance=EVENTS).Reload()


def scalars(folder: Path, tag: str = "train/loss") -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(tag)]


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
    sink.text("contract", "12 checks")
    sink.close()
    found = events(tmp_path)
    measured = {f"train/{name}" for name in first.values()} - {"train/step"}
    assert set(found.Tags()["scalars"]) == measured | {"validation/loss"}
    assert scalars(tmp_path) == [(1, 2.0), (2, 1.0)]
    assert scalars(tmp_path, "train/mfu") == [(1, 0.25)]
    assert scalars(tmp_path, "validation/loss") == [(2, 1.5)]
    texts = {
        tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in found.Tags()["tensors"]
    }
    assert "org/base" in texts["recipe/text_summary"]
    assert "    line *two*" in texts["sample/1/text_summary"]
    assert "12 checks" in texts["contract/text_summary"]


@pytest.mark.parametrize(
    ("shared", "resumed_at", "steps"),
    [(False, 3, [1, 2, 3, 4]), (False, 0, [1]), (True, 0, [1, 2, 3, 4, 5, 1])],
)
def test_tensorboard_purges_what_a_run_repeats_but_not_what_others_wrote(
    tmp_path, shared, resumed_at, steps
):
    fill(TensorBoardSink(tmp_path, shared), range(1, 6))
    time.sleep(1.1)  # event files are read in the order of the second in their names
    fill(TensorBoardSink(tmp_path, shared), [resumed_at + 1], resumed_at, loss=9.0)
    shown = scalars(tmp_path)
    assert [step for step, _ in shown] == steps
    assert shown[-1][1] == 9.0


def test_a_full_disk_ends_tensorboard_alone(tmp_path: Path, monkeypatch, caplog) -> None:
    """The error of its thread comes at each later call; its traceback is not shown."""
    met: list[str] = []

    def hook(fault: threading.ExceptHookArgs) -> None:
        met.append(str(fault.exc_value))

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    of_tensorboard = type("Writer", (threading.Thread,), {"__module__": "tensorboard.summary"})
    monkeypatch.setattr(threading, "excepthook", hook)
    sink = TensorBoardSink(tmp_path)
    sink.open(RUN, 0)
    for kind in (of_tensorboard, threading.Thread):
        thread = kind(target=fail)
        thread.start()
        thread.join()
    assert len(met) == 1
    with monkeypatch.context() as patch:
        patch.setattr(sink._writer, "add_scalar", fail)
        patch.setattr(sink._writer, "flush", fail)
        for step in (1, 2):
            sink.step(record(step))
            sink.flush()
    assert [holds(line.message, "metrics.jsonl", tmp_path) for line in caplog.records] == [True]
    sink.close()
    sink.close()
    assert threading.excepthook is hook


def test_a_folder_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with refuses(MachineError, fix=["log.tensorboard_dir=FOLDER"]):
        TensorBoardSink(tmp_path / "file").open(RUN, 0)


def shown(
    folder: Path,
    records: Iterable[StepRecord],
    *,
    run: Run = RUN,
    total: int | None,
    stream: io.StringIO | None = None,
    **terminal: Any,
) -> tuple[str, str]:
    """What a terminal shows of these steps, and what log.txt has."""
    stream = stream or io.StringIO()
    log = LogFile(folder / "log.txt")
    sink = Terminal(log, total_steps=total, steps_per_epoch=10, stream=stream, **terminal)
    sink.open(run, 0)
    for each in records:
        sink.step(each)
    sink.text("contract", "12 checks\nall hold")
    sink.samples(1, [SampleAnswer("ask", "answer", "expected")])
    sink.close()
    return stream.getvalue(), (folder / "log.txt").read_text()


def test_plain_lines_say_what_a_step_did(tmp_path: Path) -> None:
    text, log = shown(tmp_path, [record(1, mfu=0.25, val_loss=1.25)], total=3)
    line = "step 1/3  loss 2.0000  lr 1.0e-4  grad 0.5  400 tok/s  mfu 25.0%  left 0 s"
    assert text.splitlines() == [line, "step 1  val_loss 1.2500", "12 checks", "all hold"]
    assert [row.split("  ", 1)[1] for row in log.splitlines()] == [
        *text.splitlines(),
        "step 1  sample  'ask' -> 'answer'",
    ]


@pytest.mark.parametrize(
    ("interval", "wanted"),
    [
        ("4 steps", [1, 4, 8, 10]),
        ("0.5 epochs", [1, 5, 10]),
        ("20 %", [1, 2, 4, 6, 8, 10]),
        ("1 h", [1, 10]),
    ],
)
def test_log_every_thins_lines_and_keeps_first_and_last(tmp_path, interval, wanted):
    run = replace(RUN, log=Log(every=Length.parse(interval)))
    _, log = shown(tmp_path, [record(step) for step in range(1, 11)], run=run, total=10)
    assert re.findall(r"step (\d+)/10 ", log) == [str(step) for step in wanted]


def test_a_flood_is_held_back_on_the_terminal_and_not_in_the_log(tmp_path: Path) -> None:
    text, log = shown(tmp_path, [record(step) for step in range(1, 201)], total=200)
    assert len(re.findall(r"step \d+/200 ", log)) == 200
    steps = re.findall(r"step (\d+)/200 ", text)
    assert 2 <= len(steps) < 100
    assert (steps[0], steps[-1]) == ("1", "200")


@pytest.mark.parametrize(
    ("total", "trained", "seconds", "left"),
    [
        # Without the first step, which compiles
        (10, 0.0, [60.0, 2.0, 4.0], ["9:00 min", "16 s", "21 s"]),
        # By the clock: two hours, of which earlier starts took some
        (None, 0.0, [1800.0, 600.0], ["1:30 h", "1:20 h"]),
        (None, 3600.0, [1800.0], ["30:00 min"]),
    ],
)
def test_the_time_that_is_left(total, trained, seconds, left, tmp_path):
    run = RUN if total else replace(RUN, train=Train(duration=Length.parse("2 h")))
    records = [record(step, step_seconds=took) for step, took in enumerate(seconds, 1)]
    _, log = shown(tmp_path, records, run=run, total=total, trained_seconds=trained)
    assert re.findall(r"left (.*)", log) == left


@pytest.mark.parametrize("colours", [True, False])
def test_a_terminal_gets_a_bar_with_loss_rate_and_time(colours, tmp_path, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    if not colours:
        monkeypatch.setenv("NO_COLOR", "1")
    text, log = shown(tmp_path, [record(1), record(2)], total=4, stream=TtyStream())
    for part in ("step 2/4", "loss 1.0000", "400 tok/s", "left 0 s", "12 checks"):
        assert part in text
    assert "\x1b[?25l" in text  # the bar hides the cursor
    assert bool(re.search(r"\x1b\[[\d;]*(3[0-9]|38)[\d;]*m", text)) == colours
    assert "\x1b[" not in log


def test_the_bar_says_what_a_run_does_beside_its_steps() -> None:
    """The time left is that of steps: while samples are answered, it would be wrong."""
    phases = iter(["validation", "training"])
    column = TimeLeftColumn(lambda: next(phases))
    task = Task(TaskID(0), "", 4, 1, _get_time=lambda: 0.0, fields={"time_left": "left 12 s"})
    assert [column.render(task).plain for _ in range(2)] == ["validation", "left 12 s"]


@pytest.mark.parametrize(
    ("variables", "stream", "bar"),
    [
        ({}, TtyStream(), True),
        ({}, io.StringIO(), False),
        ({"TERM": "dumb"}, TtyStream(), False),
        ({"TERM": "unknown"}, TtyStream(), False),
        ({"NO_COLOR": "1"}, TtyStream(), True),
        ({"FORCE_COLOR": "1"}, io.StringIO(), True),
        ({"FORCE_COLOR": ""}, TtyStream(), False),
        ({"TTY_COMPATIBLE": "0"}, TtyStream(), False),
    ],
)
def test_variables_mean_what_they_mean_to_rich(variables, stream, bar, monkeypatch):
    for other in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(other, raising=False)
    for name, value in ({"TERM": "xterm"} | variables).items():
        monkeypatch.setenv(name, value)
    assert is_terminal(stream) == bar


def test_tensorboard_is_written_if_it_is_installed_or_asked_for(monkeypatch):
    def writes(**log: object) -> bool:
        return writes_tensorboard(replace(RUN, log=Log(**log)))

    assert writes()
    assert not writes(tensorboard=False, tensorboard_dir="logs")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("tunesmith.metrics.sink.find_spec", lambda name: None)
    assert not writes()
    assert writes(tensorboard=True)
    assert writes(tensorboard_dir="logs")
    for log in (Log(tensorboard=True), Log(tensorboard_dir="logs")):
        with refuses(MachineError, where="log.tensorboard", fix=["pip install 'tensorboard"]):
            check_requirements(replace(RUN, log=log), Start())


def test_a_recipe_chooses_its_sinks(tmp_path: Path) -> None:
    def made(**log: Any) -> tuple[Run, Sinks]:
        run, log_file = replace(RUN, log=Log(**log)), LogFile(tmp_path / "log.txt")
        terminal = Terminal(log_file, total_steps=1, steps_per_epoch=1, stream=io.StringIO())
        return run, sinks_of(run, tmp_path, terminal)

    always = ["Terminal", "JsonlSink", "SamplesSink"]
    for log, more in (
        ({}, ["TensorBoardSink"]),
        ({"tensorboard": False}, []),
        ({"wandb": True}, ["TensorBoardSink", "TrackerSink"]),
        ({"trackers": ("mlflow", "trackio")}, ["TensorBoardSink", "TrackerSink", "TrackerSink"]),
    ):
        assert [type(sink).__name__ for sink in made(**log)[1].all] == always + more
    run, sinks = made(tensorboard_dir=str(tmp_path / "logs"))
    sinks.open(run, 0)
    sinks.step(record())
    sinks.flush()
    sinks.close()
    assert list((tmp_path / "logs").glob("events.out.tfevents.*"))
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1


def test_closing_closes_all_and_raises_the_error() -> None:
    class Bad(Sink):
        def close(self) -> None:
            raise OSError("full")

    class Good(Sink):
        closed = False

        def close(self) -> None:
            self.closed = True

    good = Good()
    with pytest.raises(OSError, match="full"):
        Sinks([Bad(), good]).close()
    assert good.closed
