"""The figures of a run that follow from its records, by one name each.

The closing summary, the page of runs and a sweep show these.
"""

from collections.abc import Iterable, Mapping
from functools import cached_property
from math import isfinite
from statistics import fmean
from typing import Self

from tunesmith.metrics.record import StepRecord

# Record name -> one entry a step, None where it was not measured.
Columns = dict[str, list[float | None]]
RECENT_STEPS = 20  # that speeds are means of: one step alone would flicker
FEWEST_LOSS_STEPS = 10  # of the mean training loss at the end


def finite(values: Iterable[float | None]) -> list[float]:
    """The finite ones."""
    return [value for value in values if value is not None and isfinite(value)]


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the finite values; None without one."""
    numbers = finite(values)
    return fmean(numbers) if numbers else None


class RunFigures:
    """The figures of some records. They are in the units of these, and computed once asked for.

    The first step compiles: speeds leave it out where there are others.
    """

    def __init__(self, columns: Columns | None = None) -> None:
        self.columns = columns or {}
        self.rows = max(map(len, self.columns.values()), default=0)

    @classmethod
    def of(cls, records: Iterable[StepRecord]) -> Self:
        """The figures of these records."""
        figures = cls()
        for record in records:
            figures.add(record.values())
        return figures

    def add(self, row: Mapping[str, float | None]) -> None:
        """Take the values of one more record; before any figure is asked for."""
        for name in row:
            if name not in self.columns:
                self.columns[name] = [None] * self.rows
        for name, column in self.columns.items():
            column.append(row.get(name))
        self.rows += 1

    def column(self, name: str) -> list[float | None]:
        """A column; None throughout where no record has it."""
        return self.columns.get(name) or [None] * self.rows

    def last(self, name: str) -> float | None:
        """The newest finite value of a column."""
        values = reversed(self.column(name))
        return next((value for value in values if value is not None and isfinite(value)), None)

    def total(self, name: str) -> float:
        """The sum of a column."""
        return sum(finite(self.column(name)))

    def recent_mean(self, name: str) -> float | None:
        """The mean of the last steps."""
        return mean(self._after_first(name)[-RECENT_STEPS:])

    def _by_step(self, name: str) -> dict[int, float]:
        pairs = zip(self.column("step"), self.column(name), strict=True)
        return {
            int(step or 0): value for step, value in pairs if value is not None and isfinite(value)
        }

    @cached_property
    def validations(self) -> dict[int, float]:
        """val_loss by step."""
        return self._by_step("val_loss")

    @property
    def best_step(self) -> int | None:
        """The step of the lowest val_loss, of equal ones the first; None without one."""
        return min(self.validations, key=self.validations.__getitem__, default=None)

    @cached_property
    def accuracies(self) -> dict[int, float]:
        """The share of held-out pairs in order, by step."""
        return self._by_step("val_reward_accuracy")

    @property
    def last_losses(self) -> list[float]:
        """The training losses of a tenth of the steps, at least 10, at the end."""
        losses = finite(self.column("loss"))
        return losses[-max(FEWEST_LOSS_STEPS, len(losses) // 10) :]

    @property
    def loss(self) -> float | None:
        """The mean of the last training losses."""
        return mean(self.last_losses)

    @cached_property
    def tokens(self) -> float:
        return self.total("tokens")

    @cached_property
    def seconds(self) -> float:
        """The seconds of the recorded steps."""
        return self.total("step_seconds")

    @cached_property
    def memory_gib(self) -> float | None:
        return max(finite(self.column("memory_gib")), default=None)

    def _after_first(self, name: str) -> list[float | None]:
        values = self.column(name)
        return values[1:] if len(values) > 1 else values

    def _a_second(self, name: str) -> float | None:
        """The sum of a column a second of training."""
        seconds = sum(finite(self._after_first("step_seconds")))
        return sum(finite(self._after_first(name))) / seconds if seconds else None

    @property
    def speed(self) -> float | None:
        """Tokens per second, weighted by time."""
        return self._a_second("tokens")

    @cached_property
    def waiting(self) -> float | None:
        """The share of the time spent waiting for data."""
        return self._a_second("data_seconds")

    @cached_property
    def mfu(self) -> float | None:
        """The mean over time, of the steps whose MFU was measured: a step that took twice as long
        counts twice."""
        values = zip(self._after_first("mfu"), self._after_first("step_seconds"), strict=True)
        measured = [(mfu, time) for mfu, time in values if mfu and time]
        seconds = sum(time for _, time in measured)
        return sum(mfu * time for mfu, time in measured) / seconds if seconds else None
