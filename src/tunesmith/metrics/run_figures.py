"""Statistics of a run, such as its mean speed, that are computed from its records.

The closing summary, the HTML report and a sweep show them.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from math import isfinite
from statistics import fmean
from typing import Self

from tunesmith.metrics.record import StepRecord
from tunesmith.units import count_of, format_seconds

# The values of each record field, one value per step. A value is None if it was not measured.
Columns = dict[str, list[float | None]]
RECENT_STEPS = 20  # steps for the mean speed, because the speed of one step fluctuates
MIN_LOSS_STEPS = 10  # minimum number of steps for the mean of the last training losses


def finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and isfinite(value)]


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the finite values, or None if there are none."""
    numbers = finite(values)
    return fmean(numbers) if numbers else None


class RunFigures:
    """Statistics of a sequence of records. They have the units of the records, and each of them is
    computed when it is first read.

    If there are several steps, speeds do not include the first step, because it compiles the model.
    """

    def __init__(self) -> None:
        self.columns: Columns = {}
        self.rows = 0

    @classmethod
    def of(cls, records: Iterable[StepRecord]) -> Self:
        figures = cls()
        for record in records:
            figures.add(record.values())
        return figures

    def add(self, row: Mapping[str, float | None]) -> None:
        """Add the values of one record. Call this before any statistic is read."""
        for name in row:
            if name not in self.columns:
                self.columns[name] = [None] * self.rows
        for name, column in self.columns.items():
            column.append(row.get(name))
        self.rows += 1

    def column(self, name: str) -> list[float | None]:
        """Return the values of a column. If no record has the column, all values are None."""
        return self.columns.get(name) or [None] * self.rows

    def last(self, name: str) -> float | None:
        """Return the newest finite value of a column, or None."""
        values = finite(self.column(name))
        return values[-1] if values else None

    def total(self, name: str) -> float:
        return sum(finite(self.column(name)))

    def recent_mean(self, name: str) -> float | None:
        """Return the mean of a column over the last RECENT_STEPS steps."""
        return mean(self._after_first(name)[-RECENT_STEPS:])

    def _by_step(self, name: str) -> dict[int, float]:
        return {
            int(step or 0): value
            for step, value in zip(self.column("step"), self.column(name), strict=True)
            if value is not None and isfinite(value)
        }

    @cached_property
    def validations(self) -> dict[int, float]:
        """Validation losses. The key is the step."""
        return self._by_step("val_loss")

    @property
    def best_step(self) -> int | None:
        """First step with the lowest val_loss. None if there was no validation."""
        return min(self.validations, key=self.validations.__getitem__, default=None)

    @cached_property
    def accuracies(self) -> dict[int, float]:
        """Fraction of validation pairs whose chosen answer has the higher reward. The key is the
        step.
        """
        return self._by_step("val_reward_accuracy")

    @property
    def loss(self) -> float | None:
        """Mean of the last training losses."""
        return mean(_last_tenth(finite(self.column("loss"))))

    def course(self, name: str, digits: int) -> str:
        """Return the first and the last value of a column, and the mean of its last values.

        The value of one step is noisy, and the mean of all steps does not describe the end of the
        run.
        """
        values = finite(self.column(name))
        if not values:
            return "not finite"
        text = f"{values[0]:.{digits}f} -> {values[-1]:.{digits}f}"
        last = _last_tenth(values)
        if len(last) < len(values):
            text += f" (mean of the last {len(last)}: {fmean(last):.{digits}f})"
        return text

    @cached_property
    def tokens(self) -> float:
        return self.total("tokens")

    @cached_property
    def seconds(self) -> float:
        return self.total("step_seconds")

    @cached_property
    def memory_gib(self) -> float | None:
        return max(finite(self.column("memory_gib")), default=None)

    def _after_first(self, name: str) -> list[float | None]:
        values = self.column(name)
        first = 1 + self.column("step")[:1].count(0)  # the values of step 0 are of no step
        return values[first:] if len(values) > first else values

    @property
    def reward_text(self) -> str:
        """The first and the last mean reward of the held-out rows with the 95 % interval of the
        last, or of the sampled answers if no rows are held out. "" for other methods.
        """
        for name in ("val_reward", "reward"):
            by_step = self._by_step(name)
            if not by_step:
                continue
            first, *others = by_step.values()
            text = " -> ".join(f"{value:.2f}" for value in (first, *others[-1:]))
            # An interval without finite ends is not shown.
            low, high = (
                self._by_step(f"{name}_{end}").get(max(by_step)) for end in ("low", "high")
            )
            if low is not None:
                text += f" ({low:.2f} to {high:.2f})"
            return f"{name} {text}"
        return ""

    def _per_second(self, name: str) -> float | None:
        """Return the sum of a column divided by the sum of step_seconds, without the first step."""
        total = sum(finite(self._after_first(name)))
        seconds = sum(finite(self._after_first("step_seconds")))
        return total / seconds if seconds else None

    @property
    def speed(self) -> float | None:
        """Tokens per second over all steps except the first."""
        return self._per_second("tokens")

    @cached_property
    def waiting(self) -> float | None:
        """Fraction of the training time after the first step in which the host waited for data."""
        return self._per_second("data_seconds")

    @cached_property
    def mfu(self) -> float | None:
        """The mean MFU of the steps for which it was measured, weighted by the duration of each
        step.
        """
        values = zip(self._after_first("mfu"), self._after_first("step_seconds"), strict=True)
        measured = [(mfu, time) for mfu, time in values if mfu and time]
        weighted = sum(mfu * time for mfu, time in measured)
        return weighted / sum(time for _, time in measured) if measured else None


def run_figures(
    records: Sequence[StepRecord],
    seconds: float,
    *,
    took: float | None = None,
    start: Mapping[str, float | None] = {},
) -> list[str]:
    """Return statistics of a run, one per line, such as its duration, speed and loss.

    Args:
        seconds: training time. If it is 0, the sum of the recorded steps is used.
        took: duration of this start, including the time outside of steps.
        start: the values before the first step.
    """
    if not records:
        return ["no steps"]
    figures = named_figures(records, seconds, start)
    if took is not None:
        figures["time"] += f"; this start took {format_seconds(took)}"
    return [f"{name:<12}{text}" for name, text in figures.items()]


def named_figures(
    records: Sequence[StepRecord], seconds: float, start: Mapping[str, float | None] = {}
) -> dict[str, str]:
    """Return statistics of a run with at least one step. The keys are the printed names."""
    figures = RunFigures()
    if start:
        figures.add(start)
    for record in records:
        figures.add(record.values())
    last = records[-1]
    examples = count_of(round(figures.total("examples")), "example")
    supervised = figures.total("supervised_tokens")
    # Use the sum of the recorded steps if the training time was not measured.
    time = format_seconds(seconds or figures.seconds)

    rows = {
        "steps": f"{last.step:,} ({last.epoch:.2f} epochs, {examples})",
        "time": f"{time} in steps",
        "tokens": f"{figures.tokens:,.0f} without padding, {supervised:,.0f} of them supervised",
        "speed": f"{figures.speed or 0.0:,.0f} tokens/s",
    }
    if figures.mfu is not None:
        peak = figures.last("mfu_peak_tflops") or 0.0
        rows["speed"] += f", {figures.mfu:.1%} MFU of {peak:,.0f} TFLOP/s"
    # The loss of a policy gradient does not show how good the answers are.
    rows |= _reward_rows(figures) if figures.reward_text else _loss_rows(figures)
    rows["peak memory"] = f"{figures.memory_gib or 0.0:.1f} GiB"
    return rows


def _last_tenth(values: list[float]) -> list[float]:
    """Return the values of the last tenth of all steps, but of at least MIN_LOSS_STEPS steps."""
    return values[-max(MIN_LOSS_STEPS, len(values) // 10) :]


def _reward_rows(figures: RunFigures) -> dict[str, str]:
    names = [name for name in figures.columns if name.partition("/")[0] == "reward"]
    name, _, text = figures.reward_text.partition(" ")
    return {name: text} | {name: figures.course(name, 3) for name in names}


def explain_equal_rewards(steps: Sequence[Mapping[str, float | None]]) -> str:
    """Return what the answers of some steps have in common and what to change. All answers to each
    prompt had the same reward.

    Args:
        steps: the values of the steps' records.
    """
    fix = "use a reward that distinguishes between answers, or other prompts"
    what = "all answers to each prompt had the same reward"
    if all(step.get("cut_share") == 1 for step in steps):
        what = "all answers were cut off at method.answer_tokens"
        fix = "raise method.answer_tokens, or ask for shorter answers in the prompts"
    elif all(step.get("reward") == 0 for step in steps):
        what = "all answers had the reward 0"
        fix = (
            "use easier prompts, a model that is sometimes right, or a reward that is above 0 for "
            "answers that are partly right"
        )
    elif all((step.get("reward") or 0) >= 1 for step in steps):
        what = "all answers had the full reward"
        fix = "use harder prompts, or a stricter reward"
    return (
        f"{what} in {count_of(len(steps), 'step')}; fix: {fix}; `tunesmith data --rollouts RUN "
        "STEP` shows the answers"
    )


def _loss_rows(figures: RunFigures) -> dict[str, str]:
    rows = {"loss": figures.course("loss", 4)}
    val_losses = list(figures.validations.values())
    if val_losses:
        rows["val_loss"] = f"{val_losses[0]:.4f}"
    if len(val_losses) > 1:
        best = f"best {min(val_losses):.4f} at step {figures.best_step}"
        rows["val_loss"] += f" -> {val_losses[-1]:.4f}, {best}"
    return rows
