"""The end of a run: a Result, or the error that ended it in words that help."""

import glob
import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tunesmith.checkpoint.resume import Progress
from tunesmith.config.schema import Run
from tunesmith.distributed.diagnosis import AGAIN
from tunesmith.distributed.ranks import Ranks, is_launched
from tunesmith.errors import (
    EXIT_OK,
    LowMemoryError,
    RunError,
    StoppedError,
    TunesmithError,
    UsageError,
    disk_fault,
    is_out_of_memory,
)
from tunesmith.host.files import from_here, write_atomically
from tunesmith.host.signals import FREE_MEMORY_FIX, REQUEUE, SHORT, LowMemory
from tunesmith.metrics.record import StepRecord, read_records
from tunesmith.metrics.result_table import ResultTable, Tabular
from tunesmith.metrics.summary import named_figures
from tunesmith.planning.run_plan import RunPlan
from tunesmith.run_dir import (
    BEST,
    FINAL,
    LOG,
    METRICS,
    RECIPE,
    STOP_FILE,
    STOPPED,
    Fields,
    describe_weights,
    read_object,
    shown,
    weights_step,
)
from tunesmith.units import count_of

log = logging.getLogger(__name__)

# What `--json` shows of a Result under its own name.
RESULT_FIGURES = (
    "steps",
    "first_step",
    "seconds",
    "tokens",
    "examples",
    "best_step",
    "final_step",
    "finished_before",
    "first_loss",
    "last_loss",
)


@dataclass(frozen=True)
class Result(Tabular):
    """The result of a run; where a function takes a run it takes this too, by its `output_dir`.

    Of a run that was finished before, `seconds` to `best_loss` are of the whole run.
    """

    output_dir: Path
    steps: int  # optimizer steps of the whole run
    first_step: int = 0  # the step that this start resumed from, 0 for a new run
    seconds: float = 0.0
    records: list[StepRecord] = field(default_factory=list, repr=False)  # of this start's steps
    finished_before: bool = False  # the directory had a finished run, and nothing was trained
    best_step: int | None = None  # of the lowest validation loss
    best_loss: float | None = None
    final_step: int | None = None  # of the weights in final/; None: this start wrote none

    @classmethod
    def of_finished(cls, output_dir: Path, steps: int) -> Self:
        """Read the result of a run that was finished before, with the figures on the disk."""
        records: list[StepRecord] = []
        with suppress(OSError, RunError):
            records = read_records(output_dir / METRICS)
        best: Fields = {}
        with suppress(OSError, ValueError):
            best = read_object(output_dir / BEST, Fields)
        return cls(
            output_dir,
            steps,
            seconds=sum(record.step_seconds for record in records),
            records=records,
            finished_before=True,
            best_step=best.get("step"),
            best_loss=best.get("val_loss"),
            final_step=weights_step(output_dir / FINAL),
        )

    def __fspath__(self) -> str:
        return str(self.output_dir)

    @property
    def tokens(self) -> int:
        """Tokens of the steps of `records`."""
        return sum(record.tokens for record in self.records)

    @property
    def examples(self) -> int:
        """Examples of the steps of `records`."""
        return sum(record.examples for record in self.records)

    @property
    def first_loss(self) -> float | None:
        """Loss of the first step of this start."""
        return self.records[0].loss if self.records else None

    @property
    def last_loss(self) -> float | None:
        """Loss of the last step."""
        return self.records[-1].loss if self.records else None

    def table(self) -> ResultTable:
        """The figures, where the files are, and commands for them."""
        records = self.records
        rows = [("steps", f"{self.steps:,}")]
        if records:
            # `seconds` are those of all starts; the records of a resumed run are of this one.
            seconds = 0.0 if self.first_step else self.seconds
            rows = list(named_figures(records, seconds).items())
        if self.first_step:
            steps = count_of(self.first_step, "step")
            rows.insert(1, ("resumed", f"after {steps}: the figures are of this start"))
        if self.finished_before:
            rows.append(
                ("was finished", "a longer train.duration continues, fresh=True starts over")
            )
        run = shown(from_here(self.output_dir))
        weights = "weights"
        if self.final_step is not None:
            weights += f" {describe_weights(self.final_step, self.steps)}"
        files = f"{FINAL}/ ({weights}), {METRICS} (one record per step), {LOG}"
        data = "" if any(record.val_loss is not None for record in records) else ", 'rows.jsonl'"
        rows += [
            ("written to", run),
            ("", files),
            ("next", f"loaded = tunesmith.load_run({run!r})"),
            ("", "list(tunesmith.generate(loaded, [{'prompt': 'Hello'}]))"),
            ("", f"tunesmith.evaluate({run!r}{data})"),
        ]
        return ResultTable(rows)

    def values(self) -> dict[str, object]:
        """The result as plain values, for `--json`."""
        figures = {name: getattr(self, name) for name in RESULT_FIGURES}
        return {"output_dir": str(self.output_dir), **figures, "best_val_loss": self.best_loss}


def failure_of(
    error: BaseException,
    run: Run,
    plan: RunPlan,
    *,
    step: int,
    saved_step: int | None,
) -> TunesmithError:
    """The error of a run that had begun, in the words of failure.json.

    `step`: the last complete one.
    """
    resume = how_to_resume(saved_step)
    where = f"step {step + 1}"
    if isinstance(error, TunesmithError):
        if not isinstance(error, UsageError):
            return error
        # What is a wrong input before the first step is a failed run after it.
        cause = error.cause
        return RunError(error.what, where=error.where, why=error.why, fix=error.fix, cause=cause)
    full_disk = disk_fault(error)
    if full_disk:
        why = "no checkpoint was written before"
        if saved_step:
            why = f"checkpoint-{saved_step} is complete"
        where = f"{where}, in {run.output_dir}"
        fix = f"free disk space (df -h), then {resume}"
        return RunError(full_disk, where=where, why=why, fix=fix, cause="disk")
    if is_out_of_memory(error):
        why = f"a micro batch of {plan.layout.micro_batch} did not fit"
        fix = plan.less_memory(resumed=saved_step is not None)
        if not fix.endswith("--fresh"):
            fix = f"{fix}; {resume}"
        return RunError("out of memory", where=where, why=why, fix=fix, cause="out-of-memory")
    if "does not have a deterministic implementation" in str(error):
        what = str(error).partition(", but you set")[0]
        why = "train.deterministic: true does not allow this operator"
        return RunError(what, where=where, why=why, fix=f"train.deterministic=false; {resume}")
    why = "an unexpected error; TUNESMITH_DEBUG=1 shows the traceback"
    return RunError(f"{type(error).__name__}: {error}", where=where, why=why, fix=resume)


def stopped_by(
    requests: Sequence[tuple[LowMemory | None, str | None]],
    run: Run,
    progress: Progress,
    ranks: Ranks,
) -> StoppedError:
    """The end of a run for want of memory, by a signal, or by the file `stop`, which is removed.

    It comes after a step was saved, or before the first one. A rank of each run directory writes
    stopped.json. The exit code is 75; under torchrun, which starts a rank of any code but 0 again,
    it is 0.

    Args:
        requests: for each rank its shortage of memory and its signal.
    """
    out = Path(run.output_dir)
    step = progress.step
    # Any rank's request stops all: the first of each kind is reported.
    shortage = next((shortage for shortage, _ in requests if shortage), None)
    signal = next((signal for _, signal in requests if signal), None)
    saved_text = f": step {step} is saved" if step else " before the first step"
    where = str(out / f"checkpoint-{step}") if step else ""
    why = "" if step else "there was nothing to save yet"
    fix = "start the same command again" + (", which resumes" if step else "")
    more: dict[str, object] = {}
    cause = ""
    error_class = StoppedError
    # `tunesmith stop` writes the file, and sends a signal too where it can.
    if shortage is not None:
        reason, what, why = "memory", SHORT, shortage.text
        fix = f"{FREE_MEMORY_FIX}, then {fix}"
        if step and progress.micro_batch and not run.train.optimizer_in_backward:
            fix += f"; or with a train.micro_batch below {progress.micro_batch}"
        more = {"figures": shortage.record}
        error_class = LowMemoryError
    elif (out / STOP_FILE).exists() or signal is None:
        reason, what = "file", "stopped by the stop file"
    else:
        reason, what = "signal", f"stopped by {signal}"
        if signal == "SIGUSR1" and os.environ.get(REQUEUE):
            fix = "nothing to do: the job is requeued, and resumes by itself"
        # Slurm's preemption and its `--signal` come as these.
        if "SLURM_JOB_ID" in os.environ and signal in ("SIGTERM", "SIGUSR1"):
            cause = "preempted"
    error = error_class(what + saved_text, where=where, why=why, fix=fix)
    error.cause = error.cause or cause

    # The request is answered: the next start must not find it.
    if ranks.is_main_process:
        (out / STOP_FILE).unlink(missing_ok=True)
    if is_launched():
        error.exit_code = EXIT_OK
    if ranks.is_run_dir_writer:
        more |= {"signal": signal, "cause": error.cause or None}
        write_stopped(out, step, reason=reason, next_command=fix, **more)
    return error


def write_stopped(
    out: Path, step: int, *, reason: str = "signal", next_command: str = AGAIN, **more: object
) -> None:
    """Write stopped.json after the complete step `step`; `more` are further fields of it."""
    record = {"signal": None, "reason": reason, "step": step, "next": next_command, "cause": None}
    write_atomically(out / STOPPED, json.dumps(record | more, indent=1))


def how_to_resume(saved_step: int | None) -> str:
    """The advice on how to start again."""
    again = "start the same command again"
    if saved_step:
        return f"{again}: it resumes from checkpoint-{saved_step}"
    return again


def warn_of_changed_rows(run: Run) -> None:
    """Warn of source files that were written after the finished run began: it lacks their rows."""
    began = (Path(run.output_dir) / RECIPE).stat().st_mtime
    changed = []
    for source in (*run.data.train, *run.data.validation):
        place = Path(source.source)
        below = place.iterdir() if place.is_dir() else map(Path, glob.glob(source.source))
        if any(file.stat().st_mtime > began for file in (place, *below) if file.exists()):
            changed.append(from_here(place))
    if changed:
        log.warning(
            f"{', '.join(changed)} changed after this run began, which has not been trained on the "
            "new rows; fix: --fresh, or output_dir=runs/another-name"
        )
