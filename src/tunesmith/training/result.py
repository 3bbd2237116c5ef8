"""Objects that describe the end of a run: a Result, or an error with its cause and a fix."""

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
from tunesmith.distributed.ranks import Ranks, stopped_code
from tunesmith.errors import (
    LowMemoryError,
    RunError,
    StoppedError,
    TunesmithError,
    UsageError,
    disk_fault,
    is_out_of_memory,
)
from tunesmith.host.files import relative_to_cwd, write_atomically
from tunesmith.host.signals import FREE_MEMORY_FIX, SHORT, LowMemory, how_to_start_again
from tunesmith.metrics.record import StepRecord, read_records, read_start_values
from tunesmith.metrics.result_table import ResultTable, Tabular
from tunesmith.metrics.run_figures import named_figures
from tunesmith.planning.run_plan import RunPlan
from tunesmith.run_dir import (
    BEST,
    FAILURE,
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

# Attributes of a Result that `--json` prints with the attribute's name as the key.
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
    """The result of a run. Functions that take the path of a run also accept a Result.

    `seconds`, `best_step` and `best_loss` describe the whole run. `records` has only the steps
    since the run was last started, or all steps if the run was already finished.
    """

    output_dir: Path
    steps: int  # optimizer steps of the whole run
    first_step: int = 0  # step of the checkpoint that was resumed, or 0 for a new run
    seconds: float = 0.0
    # one record per step, see above
    records: list[StepRecord] = field(default_factory=list, repr=False)
    # True if the run was already finished, so that `train` only returned its result.
    finished_before: bool = False
    best_step: int | None = None  # step with the lowest validation loss
    best_loss: float | None = None
    # step of the weights in final/, or None if final/ was not written
    final_step: int | None = None

    @classmethod
    def from_finished_run(cls, output_dir: Path, steps: int) -> Self:
        """Return the result of a run that was already finished, from the files in its directory."""
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
        """Number of tokens in the steps of `records`."""
        return sum(record.tokens for record in self.records)

    @property
    def examples(self) -> int:
        """Number of examples in the steps of `records`."""
        return sum(record.examples for record in self.records)

    @property
    def first_loss(self) -> float | None:
        """Loss of the first step in `records`."""
        return self.records[0].loss if self.records else None

    @property
    def last_loss(self) -> float | None:
        """Loss of the last step."""
        return self.records[-1].loss if self.records else None

    def table(self) -> ResultTable:
        """Return a table of statistics, such as the loss and the speed, with the paths of the files
        and commands for the next steps.
        """
        records = self.records
        rows = [("steps", f"{self.steps:,}")]
        if records:
            # `seconds` includes the time before the run was resumed, but `records` does not. With
            # 0, `named_figures` prints the time of the recorded steps.
            seconds = 0.0 if self.first_step else self.seconds
            start = read_start_values(self.output_dir / METRICS)
            rows = list(named_figures(records, seconds, start).items())
        if self.first_step:
            steps = count_of(self.first_step, "step")
            rows.insert(1, ("resumed", f"after {steps}; the figures are only for this start"))
        if self.finished_before:
            rows.append(
                (
                    "finished before",
                    "set a longer train.duration to continue, or fresh=True to start over",
                )
            )
        run = shown(relative_to_cwd(self.output_dir))
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
        """Return the result as plain values for `--json`."""
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
    """Convert an exception during training to the error for failure.json.

    Args:
        step: the last completed step.
    """
    resume = how_to_resume(saved_step)
    where = f"step {step + 1}"
    if isinstance(error, TunesmithError):
        if not isinstance(error, UsageError):
            return error
        # After the first step, a UsageError is converted to a RunError, because the run has failed.
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
        # Import here, because it imports torch, and a start checks the rows before that.
        from tunesmith.planning.savings import less_memory

        fix = less_memory(run, plan, resumed=saved_step is not None)
        if not fix.endswith("--fresh"):
            fix = f"{fix}; {resume}"
        return RunError("out of memory", where=where, why=why, fix=fix, cause="out-of-memory")
    if "does not have a deterministic implementation" in str(error):
        what = str(error).partition(", but you set")[0]
        why = "train.deterministic: true does not allow this operator"
        return RunError(what, where=where, why=why, fix=f"set train.deterministic=false; {resume}")
    why = "an unexpected error; TUNESMITH_DEBUG=1 shows the traceback"
    return RunError(f"{type(error).__name__}: {error}", where=where, why=why, fix=resume)


def stopped_by(
    requests: Sequence[tuple[LowMemory | None, str | None]],
    run: Run,
    progress: Progress,
    ranks: Ranks,
) -> StoppedError:
    """Build the error of a run that stopped because of low memory, a signal, or the file `stop`.

    Call this after the last step was saved, or before the first step. The file `stop` is removed,
    and one rank per run directory writes stopped.json. The exit code is 75. Under torchrun it is 0,
    because torchrun would restart ranks that exit with any other code.

    Args:
        requests: for each rank, its memory shortage and the name of its signal, or None.
    """
    out = Path(run.output_dir)
    step = progress.step
    # A request on any rank stops all ranks. Report the first request of each kind.
    shortage = next((shortage for shortage, _ in requests if shortage), None)
    signal = next((signal for _, signal in requests if signal), None)
    if step:
        saved_text = f": step {step} is saved"
        where = str(out / f"checkpoint-{step}")
        why = ""
    else:
        saved_text = " before the first step"
        where = ""
        why = "there was nothing to save yet"
    fix = how_to_start_again(None)
    more: dict[str, object] = {}
    cause = ""
    error_class = StoppedError
    # Check the file before the signal, because `tunesmith stop` writes the file and also sends a
    # signal if it can.
    if shortage is not None:
        reason = "memory"
        what = SHORT
        why = shortage.text
        fix = f"{FREE_MEMORY_FIX}, then {fix}"
        if step and progress.micro_batch and not run.train.optimizer_in_backward:
            fix += f"; if it happens again, set a train.micro_batch below {progress.micro_batch}"
        more = {"figures": shortage.record}
        error_class = LowMemoryError
    elif (out / STOP_FILE).exists() or signal is None:
        reason = "file"
        what = "stopped by the stop file"
    else:
        reason = "signal"
        what = f"stopped by {signal}"
        fix = how_to_start_again(signal)
        # Slurm sends these signals when it preempts a job, and for its option `--signal`.
        if "SLURM_JOB_ID" in os.environ and signal in ("SIGTERM", "SIGUSR1"):
            cause = "preempted"
    error = error_class(what + saved_text, where=where, why=why, fix=fix)
    error.cause = error.cause or cause

    # Remove the stop file, so that the run does not stop at once when it is resumed.
    if ranks.is_main_process:
        (out / STOP_FILE).unlink(missing_ok=True)
    error.exit_code = stopped_code()
    if ranks.is_run_dir_writer:
        more |= {"signal": signal, "cause": error.cause or None}
        write_stopped(out, step, reason=reason, next_command=fix, **more)
    return error


def write_failure(
    folder: Path, error: TunesmithError, *, last_step: int, next_command: str
) -> None:
    """Write failure.json, which describes the error that ended the run.

    The file has the error, where and why it happened, and the last step. It has `error.fix`, or
    `next_command` if the error has no fix. It also has the likely cause and the failed rank, which
    are null if they are not known.
    """
    failure = {
        "what": error.what,
        "where": error.where,
        "why": error.why,
        "last_step": last_step,
        "next": error.fix or next_command,
        "cause": error.cause or None,
    }
    for name in ("rank", "host", "phase", "collective"):
        failure[name] = error.failed_rank.get(name)
    write_atomically(folder / FAILURE, json.dumps(failure, indent=2) + "\n")


def write_stopped(
    out: Path, step: int, *, reason: str = "signal", next_command: str = AGAIN, **more: object
) -> None:
    """Write stopped.json after the completed step `step`. `more` contains additional fields."""
    record = {"signal": None, "reason": reason, "step": step, "next": next_command, "cause": None}
    write_atomically(out / STOPPED, json.dumps(record | more, indent=1))


def how_to_resume(saved_step: int | None) -> str:
    """Return a text that tells the user how to resume the run."""
    again = "start the same command again"
    if saved_step:
        return f"{again}: it resumes from checkpoint-{saved_step}"
    return again


def warn_of_changed_rows(run: Run) -> None:
    """Warn if source files have changed since the finished run began. The run was not trained on
    the changes.
    """
    start_time = (Path(run.output_dir) / RECIPE).stat().st_mtime
    changed = []
    for source in (*run.data.train, *run.data.validation):
        place = Path(source.source)
        files = [place]
        if place.is_dir():
            files += place.iterdir()
        else:
            files += map(Path, glob.glob(source.source))
        if any(file.exists() and file.stat().st_mtime > start_time for file in files):
            changed.append(relative_to_cwd(place))
    if changed:
        log.warning(
            f"{', '.join(changed)} changed after this run began, so the run was not trained on the "
            "new rows; fix: add --fresh to start over, or set output_dir=runs/another-name"
        )
