"""Every sink tells the same story, on a fresh start and after a resume."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import pytest
from rich.progress import Task, TaskID

from errors import holds, refuses
from records import RUN, record
from tunesmith.checkpoint.resume import Start
from tunesmith.config.schema import Log, Run, Train
from tunesmith.errors import MachineError
from tunesmith.host.streams import is_terminal
from tunesmith.metrics.log_file import LogFile
from tunesmith.metrics.record import read_records
from tunesmith.metrics.sink import (
    JsonlSink,
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


@pytest.fixture
def run() -> Run:
    return RUN


class TtyStream(io.StringIO):
    def isatty(self) -> bool:
        return True


def events(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # 0: keep every event; by default only a sample is kept
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(e.step, e.value) for e in events(folder).Scalars(tag)]


def test_jsonl_is_cut_back_and_goes_on(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.open(run, 0)
    for step in range(1, 6):
        sink.step(record(step))
    assert len(path.read_text().splitlines()) == 5, "a line must be on its way before close"
    sink.close()
    sink = JsonlSink(path)
    sink.open(run, 3)
    sink.step(record(4, loss=9.0))
    sink.close()
    assert [(r.step, r.loss) for r in read_records(path)] == [
        (1, 2.0),
        (2, 1.0),
        (3, 2.0 / 3),
        (4, 9.0),
    ]


def test_tensorboard_has_each_measured_value_under_its_name(tmp_path: Path, run: Run) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.open(run, 0)
    sink.step(record(1, mfu=0.25, mfu_peak_tflops=92.0))
    sink.step(record(2, val_loss=1.5))
    sink.samples(2, [SampleAnswer("ask", "line one\nline *two*", "expected")])
    sink.text("contract", "12 checks")
    sink.close()
    accumulator = events(tmp_path)
    measured = {f"train/{name}" for name in record(1, mfu=0.25, mfu_peak_tflops=92.0).values()} - {
        "train/step"
    }
    assert set(accumulator.Tags()["scalars"]) == measured | {"validation/loss"}
    assert scalars(tmp_path, "train/loss") == [(1, 2.0), (2, 1.0)]
    assert scalars(tmp_path, "train/mfu") == [(1, 0.25)]
    assert scalars(tmp_path, "validation/loss") == [(2, 1.5)]
    texts = {
        t: accumulator.Tensors(t)[0].tensor_proto.string_val[0].decode()
        for t in accumulator.Tags()["tensors"]
    }
    assert "org/base" in texts["recipe/text_summary"]
    assert "    line *two*" in texts["sample/1/text_summary"]
    assert "12 checks" in texts["contract/text_summary"]


@pytest.mark.slow
@pytest.mark.parametrize(("resumed_at", "steps"), [(3, [1, 2, 3, 4]), (0, [1])])
def test_tensorboard_purges_what_a_run_repeats(
    tmp_path: Path, run: Run, resumed_at: int, steps: list[int]
) -> None:
    first = TensorBoardSink(tmp_path)
    first.open(run, 0)
    for step in range(1, 6):
        first.step(record(step))
    first.close()
    time.sleep(1.1)  # event files are read in the order of the second in their names
    again = TensorBoardSink(tmp_path)
    again.open(run, resumed_at)
    again.step(record(resumed_at + 1, loss=9.0))
    again.close()
    shown = scalars(tmp_path, "train/loss")
    assert [step for step, _ in shown] == steps
    assert shown[-1][1] == 9.0


@pytest.mark.slow
def test_a_full_disk_ends_tensorboard_alone(tmp_path: Path) -> None:
    """By a limit on the size of files, whose error comes in the writer's thread as that of a full
    disk; in a process of its own, which keeps the limit."""
    program = """
import resource, signal, sys, time
from pathlib import Path
from records import RUN, record
from tunesmith.host.logger import lines_on_stderr
from tunesmith.metrics.sink import TensorBoardSink
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sink = TensorBoardSink(Path(sys.argv[1]))
with lines_on_stderr():
    sink.open(RUN, 0)
    sink.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    for step in range(1, 4):
        sink.step(record(step))
        sink.flush()
        time.sleep(0.2)
    sink.close()
print("end")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "events")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "end\n"
    [line] = done.stderr.splitlines()  # and no traceback of that thread beside it
    assert line.startswith("warning: ")
    assert holds(line, "metrics.jsonl")


def test_the_hook_of_other_threads_stays(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[str] = []

    def hook(fault: threading.ExceptHookArgs) -> None:
        met.append(str(fault.exc_value))

    def fail() -> None:
        raise ValueError("own")

    monkeypatch.setattr(threading, "excepthook", hook)
    sink = TensorBoardSink(tmp_path)
    sink.open(run, 0)
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert met == ["own"]
    sink.close()
    sink.close()
    assert threading.excepthook is hook


def test_a_shared_folder_keeps_what_others_wrote(tmp_path: Path, run: Run) -> None:
    for _ in range(2):
        sink = TensorBoardSink(tmp_path, shared=True)
        sink.open(run, 0)
        sink.step(record(1))
        sink.close()
    assert len(scalars(tmp_path, "train/loss")) == 2


def test_a_folder_that_is_a_file_is_told(tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError) as raised:
        TensorBoardSink(tmp_path / "file").open(run, 0)
    assert "log.tensorboard_dir" in raised.value.fix


@pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="wandb is not installed (extra: wandb)"
)
def test_wandb_offline_keeps_its_id_over_a_resume(tmp_path: Path, run: Run) -> None:
    """In a process of its own: W&B starts a service that would outlive the test's environment."""
    code = """
import sys
from pathlib import Path
from tunesmith.config.schema import Data, Model, Run, Source
from tunesmith.metrics.record import StepRecord
from tunesmith.metrics.sink import SampleAnswer
from tunesmith.metrics.trackers import TrackerSink
folder, resumed = Path(sys.argv[1]), int(sys.argv[2])
run = Run(model=Model(name="org/base"), data=Data(train=(Source(source="rows.jsonl"),)), output_dir=str(folder))
sink = TrackerSink("wandb", folder, print)
sink.open(run, resumed)
step = resumed + 1
sink.step(StepRecord(step=step, epoch=0.1, loss=2.5, learning_rate=1e-4, grad_norm=1.0, tokens=1,
    supervised_tokens=1, examples=1, step_seconds=1.0, data_seconds=0.0, tokens_per_second=1.0, mfu=None, memory_gib=1.0, val_loss=1.5))
sink.samples(step, [SampleAnswer("ask", "answer", "expected")])
sink.close()
"""
    ids = []
    for resumed in (0, 1):
        environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "PYTHONPATH": ":".join(sys.path), "PATH": "",
                       "HOME": str(tmp_path)}  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), str(resumed)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        ids.append((tmp_path / "wandb-id.txt").read_text())
    assert ids[0] == ids[1]
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2


def shown(
    run: Run, folder: Path, records, *, total: int | None, stream: io.StringIO | None = None
) -> tuple[str, str]:
    stream = stream or io.StringIO()
    sink = Terminal(
        LogFile(folder / "log.txt"), total_steps=total, steps_per_epoch=10, stream=stream
    )
    sink.open(run, 0)
    for each in records:
        sink.step(each)
    sink.text("contract", "12 checks\nall hold")
    sink.samples(1, [SampleAnswer("ask", "answer", "expected")])
    sink.close()
    return stream.getvalue(), (folder / "log.txt").read_text()


def test_plain_lines_say_what_a_step_did(tmp_path: Path, run: Run) -> None:
    text, log = shown(run, tmp_path, [record(1, mfu=0.25, val_loss=1.25)], total=3)
    line = "step 1/3  loss 2.0000  lr 1.0e-4  grad 0.5  400 tok/s  mfu 25.0%  left 0 s"
    assert text.splitlines() == [line, "step 1  val_loss 1.2500", "12 checks", "all hold"]
    assert [row.split("  ", 1)[1] for row in log.splitlines()] == [
        *text.splitlines(),
        "step 1  sample  'ask' -> 'answer'",
    ]


@pytest.mark.parametrize(("mfu", "columns"), [(None, 80), (0.452, 90)])
def test_a_line_of_usual_values_fits_its_columns(
    mfu: float | None, columns: int, tmp_path: Path, run: Run
) -> None:
    records = [
        record(step, mfu=mfu, grad_norm=0.1234, tokens_per_second=45678.0, step_seconds=2.0)
        for step in (599, 600)
    ]
    text, _ = shown(run, tmp_path, records, total=1000)
    lines = [line for line in text.splitlines() if "/1000" in line]
    assert lines[0].startswith("step 599/1000  ")
    assert holds(lines[0], 0.123)
    assert max(map(len, lines)) <= columns


@pytest.mark.parametrize(
    ("interval", "wanted"),
    [
        ("4 steps", [1, 4, 8, 10]),
        ("3 steps", [1, 3, 6, 9, 10]),
        ("0.5 epochs", [1, 5, 10]),
        ("20 %", [1, 2, 4, 6, 8, 10]),
        ("1 h", [1, 10]),
    ],
)
def test_log_every_thins_lines_and_keeps_first_and_last(
    tmp_path: Path, run: Run, interval: str, wanted: list[int]
) -> None:
    run = replace(run, log=Log(every=Length.parse(interval)))
    _, log = shown(run, tmp_path, [record(step) for step in range(1, 11)], total=10)
    steps = [
        row.split("step ")[1].split("/")[0]
        for row in log.splitlines()
        if "loss" in row and "/10" in row
    ]
    assert steps == [str(step) for step in wanted]


def test_a_flood_is_held_back_on_the_terminal_and_not_in_the_log(tmp_path: Path, run: Run) -> None:
    text, log = shown(run, tmp_path, [record(step) for step in range(1, 201)], total=200)
    assert sum("/200" in row for row in log.splitlines()) == 200
    lines = [row for row in text.splitlines() if "/200" in row]
    assert 2 <= len(lines) < 100
    assert lines[0].startswith("step 1/200")
    assert lines[-1].startswith("step 200/200")


def test_time_left_leaves_the_first_step_out(tmp_path: Path, run: Run) -> None:
    records = [
        record(1, step_seconds=60.0),
        record(2, step_seconds=2.0),
        record(3, step_seconds=4.0),
    ]
    _, log = shown(run, tmp_path, records, total=10)
    assert "step 1/10" in log
    assert [row.rsplit("left ", 1)[1] for row in log.splitlines() if "left" in row] == [
        "9:00 min",
        "16 s",
        "21 s",
    ]


def test_a_run_by_the_clock_tells_what_is_left_of_it(tmp_path: Path, run: Run) -> None:
    run = replace(run, train=Train(duration=Length.parse("2 h")))
    records = [record(1, step_seconds=1800.0), record(2, step_seconds=600.0)]
    _, log = shown(run, tmp_path, records, total=None)
    assert [row.rsplit("left ", 1)[1] for row in log.splitlines() if "left" in row] == [
        "1:30 h",
        "1:20 h",
    ]


def test_a_resumed_run_by_the_clock_has_the_rest_of_its_time(tmp_path: Path, run: Run) -> None:
    run = replace(run, train=Train(duration=Length.parse("2 h")))
    log = LogFile(tmp_path / "log.txt")
    sink = Terminal(
        log, total_steps=None, steps_per_epoch=10, trained_seconds=3600.0, stream=io.StringIO()
    )
    sink.open(run, 7)
    sink.step(record(8, step_seconds=1800.0))
    sink.close()
    assert "left 30:00 min" in (tmp_path / "log.txt").read_text()


def test_a_terminal_gets_a_bar_with_loss_rate_and_time(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    text, log = shown(run, tmp_path, [record(1), record(2)], total=4, stream=TtyStream())
    for part in ("step 2/4", "loss 1.0000", "400 tok/s", "left 0 s", "12 checks"):
        assert part in text
    assert "\x1b[" in text
    assert "\x1b[" not in log


def test_the_bar_says_what_a_run_does_beside_its_steps(run: Run) -> None:
    """The time left is that of steps: while the first one compiles, or samples are answered, it
    would be wrong.
    """
    phases = ["validation", "training", "saving", "training"]
    column = TimeLeftColumn(lambda: phases[0])
    task = Task(TaskID(0), "", 4, 1, _get_time=lambda: 0.0, fields={"time_left": "left 12 s"})
    seen = []
    while phases:
        seen.append(column.render(task).plain)
        del phases[0]
    assert seen == ["validation", "left 12 s", "saving", "left 12 s"]


def test_no_bar_without_a_terminal_or_where_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert is_terminal(TtyStream())
    assert not is_terminal(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not is_terminal(TtyStream())


@pytest.mark.parametrize(
    ("name", "value", "stream", "bar"),
    [
        ("NO_COLOR", "1", TtyStream(), True),
        ("FORCE_COLOR", "1", io.StringIO(), True),
        ("FORCE_COLOR", "", TtyStream(), False),
        ("TTY_COMPATIBLE", "0", TtyStream(), False),
        ("TERM", "unknown", TtyStream(), False),
    ],
)
def test_variables_mean_what_they_mean_to_rich(
    name: str, value: str, stream: TextIO, bar: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    assert is_terminal(stream) == bar


def test_no_color_keeps_the_bar_and_takes_its_colours(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    text, _ = shown(run, tmp_path, [record(1), record(2)], total=4, stream=TtyStream())
    assert "step 2/4" in text
    assert "\x1b[?25l" in text  # the bar hides the cursor
    assert not re.search(r"\x1b\[[\d;]*(3[0-9]|38)[\d;]*m", text)


def test_tensorboard_is_written_if_it_is_installed_or_asked_for(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def writes(**log: object) -> bool:
        return writes_tensorboard(replace(run, log=Log(**log)))

    assert writes()
    assert not writes(tensorboard=False, tensorboard_dir="logs")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("tunesmith.metrics.sink.find_spec", lambda name: None)
    assert not writes()
    assert writes(tensorboard=True)
    assert writes(tensorboard_dir="logs")
    for log in (Log(tensorboard=True), Log(tensorboard_dir="logs")):
        with refuses(MachineError, where="log.tensorboard", fix=["pip install 'tensorboard"]):
            check_requirements(replace(run, log=log), Start())


def test_a_recipe_chooses_its_sinks(tmp_path: Path, run: Run) -> None:
    def kinds(**log: object) -> list[str]:
        terminal = Terminal(LogFile(tmp_path / "log.txt"), total_steps=1, steps_per_epoch=1)
        sinks = sinks_of(replace(run, log=Log(**log)), tmp_path, terminal)
        return [type(s).__name__ for s in sinks.all]

    assert kinds() == ["Terminal", "JsonlSink", "SamplesSink", "TensorBoardSink"]
    assert kinds(tensorboard=False) == ["Terminal", "JsonlSink", "SamplesSink"]
    assert kinds(wandb=True) == [
        "Terminal",
        "JsonlSink",
        "SamplesSink",
        "TensorBoardSink",
        "TrackerSink",
    ]
    assert kinds(trackers=("mlflow", "trackio")) == [
        "Terminal",
        "JsonlSink",
        "SamplesSink",
        "TensorBoardSink",
        "TrackerSink",
        "TrackerSink",
    ]
    elsewhere = replace(run, log=Log(tensorboard_dir=str(tmp_path / "logs")))
    terminal = Terminal(
        LogFile(tmp_path / "log.txt"), total_steps=1, steps_per_epoch=1, stream=io.StringIO()
    )
    sinks = sinks_of(elsewhere, tmp_path, terminal)
    sinks.open(elsewhere, 0)
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
