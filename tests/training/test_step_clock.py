"""A step's seconds are those of the device, from the end of the step before to its own end.

The stand-in for a GPU returns from launches early: so many wait in its queue, and a thread does one
after the other. A host that took its own time there would be off by most of a step.
"""

from __future__ import annotations

import json
import queue
import threading
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import playbook
from devices import cpu_and_gpu
from ranks import run_ranks
from recipes import make_run, write_rows
from records import record
from tunesmith.checkpoint.resume import Start
from tunesmith.host.signals import StopRequest
from tunesmith.metrics import hardware
from tunesmith.metrics.run_figures import run_figures
from tunesmith.metrics.sink import Sinks
from tunesmith.runtime.transfer import Mark
from tunesmith.stages.request import Request
from tunesmith.training.build import build
from tunesmith.training.run import train
from tunesmith.training.stop_control import StopControl
from tunesmith.training.trainer import Trainer
from tunesmith.units import ratio

pytestmark = pytest.mark.slow

KERNELS = 40  # of a step
KERNEL_SECONDS = 0.005
# Of the queue: the host is through with a step when the device has done three quarters of it.
DEPTH = 10


class QueuedDevice:
    """Work that begins when the work launched before it is done.

    Attributes:
        ended: when each step's last kernel was done.
    """

    def __init__(self) -> None:
        self.launched: queue.Queue[Callable[[], None] | None] = queue.Queue(DEPTH)
        self.ended: list[float] = []
        self.thread = threading.Thread(target=self._drain, daemon=True)
        self.thread.start()

    def launch(self, work: Callable[[], None] | None) -> None:
        """Returns at once while the queue has room."""
        self.launched.put(work)

    def launch_step(self) -> None:
        for _ in range(KERNELS):
            self.launch(lambda: time.sleep(KERNEL_SECONDS))
        self.launch(lambda: self.ended.append(time.perf_counter()))

    def _drain(self) -> None:
        while work := self.launched.get():
            work()


@pytest.fixture
def queued(monkeypatch: pytest.MonkeyPatch) -> Iterator[QueuedDevice]:
    """The device whose marks the trainer and its transfers take."""
    device = QueuedDevice()

    class QueuedMark(Mark):
        def __init__(self, _: torch.device) -> None:
            self.reached = threading.Event()
            device.launch(self.reach)

        def reach(self) -> None:
            self.at = time.perf_counter()
            self.reached.set()

        def wait(self) -> None:
            self.reached.wait()

        def seconds_since(self, earlier: Any) -> float:
            self.wait()
            return self.at - earlier.at

    for module in ("runtime.transfer", "training.async_metrics", "training.trainer"):
        monkeypatch.setattr(f"tunesmith.{module}.Mark", QueuedMark)
    yield device
    device.launch(None)
    device.thread.join()


def trainer_of(tiny: Path, folder: Path, **changes: Any) -> Trainer:
    write_rows(folder / "train.jsonl", 48)
    write_rows(folder / "held.jsonl", 8)
    run = make_run(tiny, folder, held=bool(changes.get("validate")), **changes)
    Path(run.output_dir).mkdir()
    session = build(Request(run))
    session.model.train()
    return Trainer(session, Start(), Sinks([]), StopControl(StopRequest(), Path(run.output_dir)))


def loop_seconds(trainer: Trainer) -> float:
    """Wall time of the whole loop, less that of what comes between two steps."""
    aside = 0.0

    def timed(function: Callable[..., Any]) -> Callable[[], Any]:
        def call(**options: Any) -> Any:
            nonlocal aside
            began = time.perf_counter()
            try:
                return function(**options)
            finally:
                aside += time.perf_counter() - began

        return call

    trainer.validate = timed(trainer.validate)
    trainer.checkpoints.save = timed(trainer.checkpoints.save)
    with trainer.session.loader(0) as batches:
        began = time.perf_counter()
        for _ in trainer.steps(batches):
            pass
        seconds = time.perf_counter() - began
    trainer.checkpoints.writer.close()
    return seconds - aside


def test_steps_of_a_device_that_the_host_runs_ahead_of(tiny, tmp_path, queued):
    duration = {"duration": "20 steps"}
    trainer = trainer_of(tiny, tmp_path, train=duration, checkpoint={"every": "7 steps"})
    trainer.metrics.reads_late = True
    update = trainer.session.optimizer.step

    def step() -> torch.Tensor:
        queued.launch_step()
        return update()

    trainer.session.optimizer.step = step
    seconds = loop_seconds(trainer)
    steps = [record.step_seconds for record in trainer.metrics.records]
    # Of 4 s: the host's work after the last step is in the loop, and in no step.
    assert sum(steps) == pytest.approx(seconds, rel=0.01)
    assert trainer.progress.seconds == pytest.approx(sum(steps))
    # The first step, and those after a checkpoint, wait for the host.
    for number in {*range(2, 21)} - {8, 15}:
        of_device = queued.ended[number - 1] - queued.ended[number - 2]
        # Other threads may run between a kernel's end and the mark behind it; the host is three
        # quarters of a step ahead.
        assert steps[number - 1] == pytest.approx(of_device, rel=0.25)


@cpu_and_gpu
def test_steps_add_up_to_the_loop(device: torch.device, tiny: Path, tmp_path: Path) -> None:
    """With validations and checkpoints, whose time is no step's."""
    trainer = trainer_of(
        tiny,
        tmp_path,
        train={"duration": "30 steps"},
        validate={"every": "10 steps"},
        checkpoint={"every": "8 steps"},
    )
    seconds = loop_seconds(trainer)
    steps = [record.step_seconds for record in trainer.metrics.records]
    assert len(steps) == 30
    assert sum(steps) == pytest.approx(seconds, rel=0.01)


def by_the_clock(tiny: Path, folder: Path) -> tuple[int, float]:
    run = make_run(
        tiny, folder, held=False, train={"duration": "1 s"}, parallel={"replicate": 2}
    )  # fmt: skip
    result = train(run, quiet=True)
    return result.steps, result.seconds


@pytest.mark.nightly
def test_ranks_end_a_run_by_the_clock_after_the_same_step(tiny: Path, tmp_path: Path) -> None:
    """By rank 0's seconds, as no two ranks measure the same."""
    write_rows(tmp_path / "train.jsonl", 48)
    first, second = run_ranks(2, by_the_clock, tiny, tmp_path)
    assert first == second
    assert first[1] >= 1.0


# ---- a clock that stands still between two looks, as one of a paused virtual machine may ----


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """`time.perf_counter`, and what `timeit` measures by, do not move; the clocks that waits go by
    do.
    """
    monkeypatch.setattr(time, "perf_counter", lambda: 1000.0)
    monkeypatch.setattr(timeit, "default_timer", lambda: 1000.0)


@pytest.mark.usefixtures("still")
def test_a_run_whose_clock_stands_still(tiny: Path, tmp_path: Path) -> None:
    train(make_run(tiny, tmp_path, held=False, train={"duration": "3 steps"}), quiet=True)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["tokens_per_second"] for line in lines] == [0.0] * 3


@pytest.mark.usefixtures("still")
def test_measured_rates_are_zero() -> None:
    assert ratio(5, 0) == 0.0
    assert ratio(6, 4) == 1.5
    assert hardware.matmul_tflops(torch.device("cpu"), torch.float32, size=8) == 0.0


def test_the_closing_figures_of_a_run() -> None:
    records = [record(step, step_seconds=0.0, mfu=0.5, mfu_peak_tflops=10.0) for step in (1, 2, 3)]
    [speed] = [line for line in run_figures(records, 0.0) if line.startswith("speed")]
    assert speed.endswith(" 0 tokens/s"), "no MFU is known of a time of none"
    assert "Steps per second: 0.00" in playbook.closing(records, 0.0)
