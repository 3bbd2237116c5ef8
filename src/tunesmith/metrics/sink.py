"""The reports of a run, as one small class: the loop calls `Sinks`, which passes every event to
each sink in turn.

A sink shows and never computes; metrics.jsonl is the only one that a resume reads back. Rank 0 has
all of them. The terminal and the trackers have files of their own beside this one.
"""

import contextlib
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import indent
from typing import Any, NamedTuple, TextIO

from tunesmith.config.dump import dump
from tunesmith.config.schema import Run
from tunesmith.errors import MachineError
from tunesmith.metrics.record import StepRecord, cut_back
from tunesmith.run_dir import METRICS

log = logging.getLogger(__name__)


class SampleAnswer(NamedTuple):
    """The model's answer to a held-out prompt, the answer that the row has, and the row's place,
    such as `faq.csv:12`; empty where unknown.
    """

    prompt: str
    answer: str
    expected: str
    row: str = ""


class Sink:
    """The events of a run; a sink overrides those it shows."""

    def open(self, run: Run, resumed_at: int) -> None:
        """Called before the first step. `resumed_at`: step of the checkpoint that the run resumes
        from, 0 for none."""

    def step(self, record: StepRecord) -> None:
        """A step is done. `val_loss` is set where the held-out rows were measured after it."""

    def samples(self, step: int, rows: Sequence[SampleAnswer]) -> None:
        """The model answered these prompts."""

    def text(self, title: str, body: str) -> None:
        """Something to read: the recipe, the token contract, a warning."""

    def flush(self) -> None:
        """Called before a checkpoint becomes valid: everything reported so far must survive a crash
        from here on.

        May run in the thread that writes the checkpoint, while the loop reports the next step.
        """

    def close(self) -> None:
        """Called after the last step, or when the run fails. May be called twice."""


class RecordCallback(Sink):
    """Hands each record to the caller's function; `error` is what that raised, and `has_ended` says
    that it was StopIteration: the run is to end."""

    def __init__(self, function: Callable[[StepRecord], object]) -> None:
        self.function = function
        self.error: BaseException | None = None
        self.has_ended = False

    def step(self, record: StepRecord) -> None:
        try:
            self.function(record)
        except StopIteration:
            self.has_ended = True
        except BaseException as error:
            self.error = error
            raise


class Sinks(Sink):
    """Several sinks as one."""

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self.all = list(sinks)

    def open(self, run: Run, resumed_at: int) -> None:
        """Open all, last first: one that may be refused comes before the run's own files are
        touched."""
        for sink in reversed(self.all):
            sink.open(run, resumed_at)

    def step(self, record: StepRecord) -> None:
        for sink in self.all:
            sink.step(record)

    def samples(self, step: int, rows: Sequence[SampleAnswer]) -> None:
        for sink in self.all:
            sink.samples(step, rows)

    def text(self, title: str, body: str) -> None:
        for sink in self.all:
            sink.text(title, body)

    def flush(self) -> None:
        for sink in self.all:
            sink.flush()

    def close(self) -> None:
        """Close all, also when one fails; its error is raised at the end."""
        with contextlib.ExitStack() as stack:
            for sink in reversed(self.all):
                stack.callback(sink.close)


class JsonlSink(Sink):
    """metrics.jsonl: one line per step, cut back to the checkpoint's step on resume, synced to the
    disk by `flush`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def open(self, run: Run, resumed_at: int) -> None:
        cut_back(self.path, resumed_at)
        self._file = self.path.open("a", buffering=1, encoding="utf-8")

    def step(self, record: StepRecord) -> None:
        assert self._file is not None
        self._file.write(record.to_json() + "\n")

    def flush(self) -> None:
        # The file is line-buffered, so the kernel has every whole line; the Python file object is
        # not safe to flush in one thread while another writes.
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None


class SamplesSink(Sink):
    """samples.jsonl: a line for each answer of the model to a held-out prompt; step 0 is before
    training."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, run: Run, resumed_at: int) -> None:
        if not resumed_at:
            self.path.unlink(missing_ok=True)
        cut_back(self.path, resumed_at)

    def samples(self, step: int, rows: Sequence[SampleAnswer]) -> None:
        lines = (json.dumps({"step": step, **row._asdict()}) + "\n" for row in rows)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))


class RankSink(Sink):
    """metrics-rank<r>.jsonl of a rank other than 0: the same records with its own waits, memory and
    gauges.

    Nothing is read back from it, so a disk that takes no more ends no run here. Warnings go to the
    rank's own terminal or log.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"metrics-rank{rank}.jsonl"

    def open(self, run: Run, resumed_at: int) -> None:
        with contextlib.suppress(OSError):
            cut_back(self.path, resumed_at)

    def step(self, record: StepRecord) -> None:
        with contextlib.suppress(OSError), self.path.open("a", encoding="utf-8") as file:
            file.write(record.to_json() + "\n")

    def text(self, title: str, body: str) -> None:
        print(body, file=sys.stderr, flush=True)


def writes_tensorboard(run: Run) -> bool:
    """Return whether the run writes TensorBoard events.

    It does so without being asked if the package is installed.
    """
    if run.log.tensorboard is not None:
        return run.log.tensorboard
    return run.log.tensorboard_dir is not None or find_spec("tensorboard") is not None


class TensorBoardSink(Sink):
    """TensorBoard events: `train/<record name>`, `validation/loss`, the recipe and sample answers.

    A `shared` folder may hold other runs' events, which a fresh start must not hide.
    """

    def __init__(self, folder: Path, *, shared: bool = False) -> None:
        self.folder, self.shared = folder, shared
        self._writer: Any = None
        self._has_failed = False
        self._hook = threading.excepthook

    def open(self, run: Run, resumed_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step=n makes TensorBoard hide every older event from step n on.
        purge_step = None if self.shared else 0
        if resumed_at:
            purge_step = resumed_at + 1
        try:
            self._writer = SummaryWriter(str(self.folder), purge_step=purge_step, flush_secs=10)
        except OSError as error:
            raise MachineError(
                "TensorBoard's events cannot be written",
                where=str(self.folder),
                why=str(error),
                fix="log.tensorboard_dir=FOLDER, or log.tensorboard=false",
            ) from None
        self._hook = threading.excepthook
        threading.excepthook = self._silent_for_tensorboard
        self._add(self._writer.add_text, "recipe", f"```yaml\n{dump(run)}```", resumed_at)

    def step(self, record: StepRecord) -> None:
        for name, value in record.tagged().items():
            self._add(self._writer.add_scalar, name, value, record.step)

    def samples(self, step: int, rows: Sequence[SampleAnswer]) -> None:
        for number, row in enumerate(rows, start=1):
            parts = [f"**{name}**\n\n{_verbatim(text)}" for name, text in row._asdict().items()]
            self._add(self._writer.add_text, f"sample/{number}", "\n\n".join(parts), step)

    def text(self, title: str, body: str) -> None:
        self._add(self._writer.add_text, title, _verbatim(body))

    def flush(self) -> None:
        with self._without_faults():
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            with self._without_faults():
                self._writer.close()
            if threading.excepthook == self._silent_for_tensorboard:
                threading.excepthook = self._hook

    def _silent_for_tensorboard(self, fault: threading.ExceptHookArgs) -> None:
        """Print no traceback of TensorBoard's thread: its error is said at the next call."""
        if not type(fault.thread).__module__.startswith("tensorboard"):
            self._hook(fault)

    def _add(self, add: Callable[..., object], *values: object) -> None:
        with self._without_faults():
            add(*values)

    @contextlib.contextmanager
    def _without_faults(self) -> Iterator[None]:
        """Leave TensorBoard out from its first error on: metrics.jsonl has all of it.

        Its thread meets the error, and its writer raises it at each later call.
        """
        try:
            yield
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                log.warning(
                    f"TensorBoard's events in {self.folder} are left out from here on: "
                    f"{error.strerror}; {METRICS} has all records; fix: df -h"
                )


def _verbatim(text: str) -> str:
    """Text that Markdown shows as it is: four spaces before each line make it code."""
    return indent(text or " ", "    ", lambda _: True)
