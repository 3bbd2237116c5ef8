"""The progress of a run: a progress bar on a terminal, plain lines in other output, and log.txt.

log.txt has every line that `log.every` selects.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from tunesmith.config.schema import Run
from tunesmith.host.streams import folded, is_terminal, show, width_of
from tunesmith.metrics.log_file import LogFile
from tunesmith.metrics.record import VALIDATION, StepRecord
from tunesmith.metrics.sink import SampleAnswer, Sink
from tunesmith.run_dir import Phase
from tunesmith.units import Cadence, format_seconds

LINES_PER_SECOND = 10.0


class TimeLeftColumn(ProgressColumn):
    """A column with the time left. If the run is not in a training step, it shows the name of the
    current phase instead.
    """

    def __init__(self, phase: Callable[[], str]) -> None:
        super().__init__()
        self.phase = phase

    def render(self, task: Task) -> Text:
        phase = self.phase()
        return Text(task.fields["time_left"] if phase == Phase.TRAINING else phase)


class Terminal(Sink):
    """A sink that shows the progress on `stream` (default: stderr) and in the file `log`.

    Args:
        total_steps: number of optimizer steps of the entire run. None if the recipe gives the
            duration as a time.
        trained_seconds: training time of the earlier starts of this run, in seconds.
        phase: returns the current phase of the run: `training`, `first step`, `sample answers`.
    """

    def __init__(
        self,
        log: LogFile,
        *,
        total_steps: int | None,
        steps_per_epoch: int,
        trained_seconds: float = 0.0,
        stream: TextIO | None = None,
        phase: Callable[[], str] = lambda: Phase.TRAINING,
    ) -> None:
        self.log = log
        self.phase = phase
        self.total = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.trained_seconds = trained_seconds
        self.stream = stream or sys.stderr
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._recent: deque[float] = deque(maxlen=20)
        self._steps = 0  # steps of this start
        self._shown_at = 0.0

    def open(self, run: Run, resumed_at: int) -> None:
        self.log.open()
        self._every = Cadence(
            run.log.every,
            total=self.total,
            steps_per_epoch=self.steps_per_epoch,
            seconds=self.trained_seconds,
        )
        self._seconds = run.train.duration.seconds
        if not is_terminal(self.stream):
            return

        self._progress = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TimeLeftColumn(self.phase),
            console=Console(file=self.stream),
        )
        self._task = self._progress.add_task(
            "",
            total=self.total or self._seconds,
            completed=resumed_at if self.total else int(self.trained_seconds),
            step=str(resumed_at),
            status="",
            time_left="",
        )
        self._progress.start()

    def step(self, record: StepRecord) -> None:
        if record.step:
            self._count_step(record)
        if f"{VALIDATION}reward" in record.extra:
            self.text("validation", f"step {record.step}  {_val_reward(record.extra)}")
        elif record.val_loss is not None:
            line = f"step {record.step}  val_loss {record.val_loss:.4f}"
            for name, value in record.extra.items():
                if name.startswith(VALIDATION) and name.endswith("accuracy"):
                    line += f"  {name} {value:.1%}"
            self.text("validation", line)

    def _count_step(self, record: StepRecord) -> None:
        """Update the progress bar, and show the line of a step if it is due."""
        # Do not average over the first step, because its time includes compilation and warm-up.
        if self._steps == 1:
            self._recent.clear()
        self._steps += 1
        self._recent.append(record.step_seconds)
        # This sum does not include the time for validation and saving. If the recipe gives the
        # duration as a time, the remaining time is this duration minus the sum.
        self.trained_seconds += record.step_seconds

        step = record.step
        count = str(step)
        if self.total:
            count += f"/{self.total}"
        time_left = self._time_left(step)
        if self._progress is not None:
            self._progress.update(
                self._task,
                completed=step if self.total else self.trained_seconds,
                step=count,
                status=_status(record),
                time_left=time_left,
            )

        if self._every.due(step, self.trained_seconds) or self._steps == 1 or step == self.total:
            self._show_step(record, count, time_left)

    def _show_step(self, record: StepRecord, count: str, time_left: str) -> None:
        rate = f"{record.learning_rate:.1e}".replace("e-0", "e-")
        line = f"step {count}  {_status(record)}  lr {rate}  grad {record.grad_norm:.3g}"
        if record.mfu is not None:
            line += f"  mfu {record.mfu:.1%}"
        if time_left:
            line += f"  {time_left}"
        self.log.write(line)
        # Do not show every line, because a fast run would flood a terminal or a scheduler's log.
        # log.txt has every line.
        now = time.monotonic()
        may_show = now - self._shown_at >= 1 / LINES_PER_SECOND or record.step == self.total
        if self._progress is None and may_show:
            self._shown_at = now
            self._show(line)

    def _time_left(self, step: int) -> str:
        """Return the time left, estimated from the last 20 steps or from the duration.

        Return "" if the run has neither a number of steps nor a duration in seconds.
        """
        if self.total is not None:
            seconds = (self.total - step) * sum(self._recent) / len(self._recent)
        elif self._seconds is not None:
            seconds = max(0.0, self._seconds - self.trained_seconds)
        else:
            return ""
        return f"left {format_seconds(seconds)}"

    def samples(self, step: int, rows: Sequence[SampleAnswer]) -> None:
        for row in rows:
            self.log.write(f"step {step}  sample  {row.prompt!r} -> {row.answer!r}")

    def text(self, title: str, body: str) -> None:
        self._show(body)
        self.log.write(body)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.refresh()
            self._progress.stop()
            self._progress = None

    def _show(self, text: str) -> None:
        if self._progress is not None:
            text = folded(text, width_of(self.stream))
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            show(text, self.stream)


def _val_reward(values: Mapping[str, float]) -> str:
    """Return the mean reward of the held-out rows with its 95 % interval, if it has one."""
    mean, low, high = (values[f"{VALIDATION}reward{end}"] for end in ("", "_low", "_high"))
    interval = f" ({low:.3f} to {high:.3f})" if isfinite(low) else ""
    return f"val_reward {mean:.3f}{interval}"


def _status(record: StepRecord) -> str:
    """Return the most important values of a step, for the progress line."""
    extra = record.extra
    if "reward" not in extra:
        return f"loss {record.loss:.4f}  {record.tokens_per_second:,.0f} tok/s"
    seconds = extra["rollout_seconds"]
    scores = {name.removeprefix("reward/"): extra[name] for name in extra if "reward/" in name}
    parts = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
    return (
        f"reward {extra['reward']:.3f}{f' ({parts})' if len(scores) > 1 else ''}  "
        f"std {extra['reward_std']:.3f}  "
        f"groups {extra['groups_with_variance']:.0%}  cut {extra['cut_share']:.0%}  "
        f"length {extra['answer_length']:.0f}  kl {extra['kl_sampler']:.1e}  "
        f"rollouts {seconds:.1f} s  train {record.step_seconds - seconds:.1f} s"
    )
