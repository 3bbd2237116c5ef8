"""What a run reports, as one small class: the loop calls `Sinks`, which passes every event to each sink in turn.

A sink shows and never computes; metrics.jsonl is the only one that a resume reads back. Only rank 0 has sinks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence

from tunesmith.config.schema import Run
from tunesmith.metrics.record import StepRecord


class Sink:
    """The events of a run; a sink overrides those it shows."""

    def open(self, run: Run, resumed_at: int) -> None:
        """Called before the first step. `resumed_at`: step of the checkpoint that the run resumes from, 0 for none."""

    def step(self, record: StepRecord) -> None:
        """A step is done. `val_loss` is set where the held-out rows were measured after it."""

    def validation(self, step: int, loss: float) -> None:
        """The held-out rows were measured."""

    def samples(self, step: int, rows: Sequence[tuple[str, str]]) -> None:
        """The model answered these prompts: (prompt, answer)."""

    def text(self, title: str, body: str) -> None:
        """Something to read: the recipe, the token contract, a warning."""

    def flush(self) -> None:
        """Called before a checkpoint becomes valid: everything reported so far must survive a crash from here on.

        May run in the thread that writes the checkpoint, while the loop reports the next step.
        """

    def close(self) -> None:
        """Called after the last step, or when the run fails. May be called twice."""


class RecordCallback(Sink):
    """Hands each record to the caller's function; `error` is what that raised."""

    def __init__(self, function: Callable[[StepRecord], object]) -> None:
        self.function = function
        self.error: BaseException | None = None

    def step(self, record: StepRecord) -> None:
        try:
            self.function(record)
        except BaseException as error:
            self.error = error
            raise


class Sinks(Sink):
    """Several sinks as one."""

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self.all = list(sinks)

    def open(self, run: Run, resumed_at: int) -> None:
        """Open all, last first: one that may be refused comes before the run's own files are touched."""
        for sink in reversed(self.all):
            sink.open(run, resumed_at)

    def step(self, record: StepRecord) -> None:
        for sink in self.all:
            sink.step(record)

    def validation(self, step: int, loss: float) -> None:
        for sink in self.all:
            sink.validation(step, loss)

    def samples(self, step: int, rows: Sequence[tuple[str, str]]) -> None:
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
