"""Sinks: objects that show or store the events of a run, such as a completed step. The training
loop calls `Sinks`, which passes every event to each sink.

A sink never computes anything. A resumed run reads only metrics.jsonl. Only rank 0 has all sinks.
The sinks for the terminal and the trackers are in other modules.
"""

import contextlib
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
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
    """The model's answer to a held-out prompt, together with the answer in the data set.

    `row` is the position of the row, such as `faq.csv:12`. It is empty if it is not known.
    """

    prompt: str
    answer: str
    expected: str
    row: str = ""


class Sink:
    """Base class of the sinks. Each method handles one kind of event and does nothing by default. A
    sink overrides the methods of the events that it shows or stores.
    """

    def open(self, run: Run, resumed_at: int) -> None:
        """Start the sink. This method is called before the first step.

        Args:
            resumed_at: step of the checkpoint that the run resumes from. 0 for a new run.
        """

    def step(self, record: StepRecord) -> None:
        """Report a completed step, or the validation before the first step, whose step is 0.

        `record.val_loss` is set if a validation followed the step.
        """

    def samples(self, step: int, rows: Sequence[SampleAnswer]) -> None:
        """Report the model's answers to sample prompts."""

    def text(self, title: str, body: str) -> None:
        """Report a text for the user, such as the recipe, the checks of the tokens or a warning."""

    def flush(self) -> None:
        """Flush everything reported so far, so that it survives a crash.

        This method is called before a checkpoint becomes valid. The call can come from the thread
        that writes the checkpoint, while the training loop reports the next step.
        """

    def close(self) -> None:
        """Close the sink after the last step or a failure. This method can be called twice."""


@dataclass
class RecordCallback(Sink):
    """A sink that passes each record to a function, which the caller of `train` gave.

    Attributes:
        error: the error that the function raised, or None.
        has_ended: whether the function raised StopIteration, which ends the run.
    """

    function: Callable[[StepRecord], object]
    error: BaseException | None = field(default=None, init=False)
    has_ended: bool = field(default=False, init=False)

    def step(self, record: StepRecord) -> None:
        if not record.step:
            return
        try:
            self.function(record)
        except StopIteration:
            self.has_ended = True
        except BaseException as error:
            self.error = error
            raise


class Sinks(Sink):
    """A sink that passes all events to several sinks."""

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self.all = list(sinks)

    def open(self, run: Run, resumed_at: int) -> None:
        """Open all sinks in the reverse order of the list.

        Sinks whose `open` can fail are last in the list. They are opened first, so that an error
        occurs before the run's own files are changed.
        """
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
        """Close all sinks, even if one of them raises an error. Raise the error at the end."""
        with contextlib.ExitStack() as stack:
            for sink in reversed(self.all):
                stack.callback(sink.close)


@dataclass
class JsonlSink(Sink):
    """The sink of metrics.jsonl, with one line per step.

    A resume removes the lines after the checkpoint's step. `flush` syncs the file to the disk.
    """

    path: Path
    _file: TextIO | None = field(default=None, init=False)

    def open(self, run: Run, resumed_at: int) -> None:
        # A run that starts again at step 0 measures the start values again.
        cut_back(self.path, resumed_at or -1)
        self._file = self.path.open("a", buffering=1, encoding="utf-8")

    def step(self, record: StepRecord) -> None:
        assert self._file is not None
        self._file.write(record.to_json() + "\n")

    def flush(self) -> None:
        # Call only fsync. The file is line-buffered, so the kernel already has every complete line,
        # and flushing the Python file object is not thread-safe while another thread writes.
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None


@dataclass
class SamplesSink(Sink):
    """The sink of samples.jsonl, with one line per answer to a held-out prompt.

    Step 0 is before training.
    """

    path: Path

    def open(self, run: Run, resumed_at: int) -> None:
        if not resumed_at:
            self.path.unlink(missing_ok=True)
        cut_back(self.path, resumed_at)

    def samples(self, step: int, rows: Sequence[SampleAnswer]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **row._asdict()}) + "\n" for row in rows)


class RankSink(Sink):
    """The sink of metrics-rank<r>.jsonl, for ranks other than 0.

    The records are those of metrics.jsonl, but data_seconds, memory and sensor values are those of
    this rank. The file is never read back, so a full disk does not end the run. Warnings are
    printed to the rank's stderr.
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

    If the recipe does not set this, return True if the package is installed.
    """
    if run.log.tensorboard is not None:
        return run.log.tensorboard
    return run.log.tensorboard_dir is not None or find_spec("tensorboard") is not None


@dataclass
class TensorBoardSink(Sink):
    """The sink for TensorBoard. It writes the values of the records (`train/loss`,
    `validation/loss`), the recipe and sample answers.

    Args:
        shared: whether the folder may contain events of other runs, which a new run must not hide.
    """

    folder: Path
    shared: bool = False
    _writer: Any = field(default=None, init=False)
    _has_failed: bool = field(default=False, init=False)

    def open(self, run: Run, resumed_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # With purge_step=n, TensorBoard hides the events of step n and later that were written
        # before this start. With None, it hides nothing.
        first_step = None if self.shared else 0
        purge_step = resumed_at + 1 if resumed_at else first_step
        try:
            self._writer = SummaryWriter(str(self.folder), purge_step=purge_step, flush_secs=10)
        except OSError as error:
            raise MachineError(
                "the TensorBoard events cannot be written",
                where=self.folder,
                why=str(error),
                fix="set log.tensorboard_dir=FOLDER, or log.tensorboard=false",
            ) from None
        self._hook = threading.excepthook
        threading.excepthook = self._hide_tensorboard_traceback
        self._call(self._writer.add_text, "recipe", f"```yaml\n{dump(run)}```", resumed_at)

    def step(self, record: StepRecord) -> None:
        for name, value in record.tagged().items():
            self._call(self._writer.add_scalar, name, value, record.step)

    def samples(self, step: int, rows: Sequence[SampleAnswer]) -> None:
        for number, row in enumerate(rows, start=1):
            parts = (f"**{name}**\n\n{_verbatim(text)}" for name, text in row._asdict().items())
            self._call(self._writer.add_text, f"sample/{number}", "\n\n".join(parts), step)

    def text(self, title: str, body: str) -> None:
        self._call(self._writer.add_text, title, _verbatim(body))

    def flush(self) -> None:
        self._call(self._writer.flush)

    def close(self) -> None:
        if self._writer is not None:
            self._call(self._writer.close)
            if threading.excepthook == self._hide_tensorboard_traceback:
                threading.excepthook = self._hook

    def _hide_tensorboard_traceback(self, fault: threading.ExceptHookArgs) -> None:
        """Print no traceback for an error in TensorBoard's thread, because `_call` logs
        it.
        """
        if not type(fault.thread).__module__.startswith("tensorboard"):
            self._hook(fault)

    def _call(self, write: Callable[..., object], *values: object) -> None:
        """Call a method of the writer. Log the first OSError of TensorBoard and ignore all later
        ones. No data is lost, because metrics.jsonl has all records.

        After an error in TensorBoard's thread, each later call of the writer raises this error
        again.
        """
        try:
            write(*values)
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                log.warning(
                    f"no more TensorBoard events are written to {self.folder}: "
                    f"{error.strerror}; {METRICS} has all records; fix: free disk space (df -h)"
                )


def _verbatim(text: str) -> str:
    """Indent each line by four spaces, so that Markdown shows the text unchanged as code."""
    return indent(text or " ", "    ", lambda _: True)
