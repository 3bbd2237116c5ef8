"""What a run came to: a Result, or the error that ended it in words that help."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tunesmith.checkpoint.resume import Progress
from tunesmith.config.schema import Run
from tunesmith.errors import (
    EXIT_OK,
    NonFiniteError,
    RunError,
    ShortOfMemoryError,
    StoppedError,
    TunesmithError,
    UsageError,
    disk_fault,
    is_out_of_memory,
)
from tunesmith.heartbeat import AGAIN
from tunesmith.host_files import write_atomically
from tunesmith.host_memory import suspected_limit
from tunesmith.metrics.record import StepRecord
from tunesmith.ranks import Ranks, is_launched
from tunesmith.run_directory import RECIPE, STOP_FILE, STOPPED
from tunesmith.runtime.plan import RunPlan
from tunesmith.shell import shell_path
from tunesmith.signals import END, SHORT, Shortage
from tunesmith.units import Size


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    output_dir: Path
    steps: int  # optimizer steps of the whole run
    first_step: int = 0  # the step that this start resumed from, 0 for a new run
    seconds: float = 0.0
    tokens: int = 0
    examples: int = 0
    records: list[StepRecord] = field(default_factory=list, repr=False)  # of this start's steps
    finished_before: bool = False  # the directory held a finished run, and nothing was done
    best_step: int | None = None  # of the lowest validation loss
    best_loss: float | None = None

    @property
    def first_loss(self) -> float | None:
        """Loss of the first step of this start."""
        return self.records[0].loss if self.records else None

    @property
    def last_loss(self) -> float | None:
        """Loss of the last step."""
        return self.records[-1].loss if self.records else None

    def values(self) -> dict[str, Any]:
        """The result as plain values, for `--json`."""
        kept = (
            "steps",
            "first_step",
            "seconds",
            "tokens",
            "examples",
            "best_step",
            "finished_before",
        )
        losses = {
            "first_loss": self.first_loss,
            "last_loss": self.last_loss,
            "best_val_loss": self.best_loss,
        }
        return {
            "output_dir": str(self.output_dir),
            **{name: vars(self)[name] for name in kept},
            **losses,
        }


def failure_of(
    error: BaseException,
    run: Run,
    plan: RunPlan,
    *,
    step: int,
    saved_step: int | None,
    retry_with_smaller_batch: bool = True,
) -> TunesmithError:
    """The error of a run that had begun, in the words of failure.json.

    `step`: the last one done; `retry_with_smaller_batch` as in `stopped_by`.
    """
    again, where = how_to_resume(saved_step), f"step {step + 1}"
    if isinstance(error, TunesmithError):
        # What is a wrong input before the first step is a failed run after it.
        if not isinstance(error, UsageError):
            return error
        return RunError(error.what, where=error.where, why=error.why, fix=error.fix, cause=error.cause)
    if full := disk_fault(error):
        kept = f"checkpoint-{saved_step} is whole" if saved_step else "no checkpoint was written before"
        fix = f"make room (df -h), then {again}"
        return RunError(full, where=f"{where}, in {run.output_dir}", why=kept, fix=fix, cause="disk")
    if isinstance(error, torch.OutOfMemoryError) or is_out_of_memory(error):
        why = f"a micro batch of {plan.layout.micro_batch} did not fit"
        advice = plan.less_memory(resumed=saved_step is not None)
        if (limit := suspected_limit()) is not None:
            why = f"{why} into {limit.describe()}"
            advice = f"{limit.fix(0)}, or {advice}"
        fix = advice if advice.endswith("--fresh") else f"{advice}; {again}"
        failure = RunError("out of memory", where=where, why=why, fix=fix, cause="out-of-memory")
        if retry_with_smaller_batch:
            failure.smaller = half_micro_batch(run, str(plan.layout.micro_batch))
        return failure
    if "does not have a deterministic implementation" in str(error):
        what, why = (
            str(error).partition(", but you set")[0],
            "train.deterministic: true allows no such operator",
        )
        return RunError(what, where=where, why=why, fix=f"train.deterministic=false; {again}")
    why = "an error that tunesmith does not know; TUNESMITH_DEBUG=1 shows where it comes from"
    return RunError(f"{type(error).__name__}: {error}", where=where, why=why, fix=again)


def non_finite_error(
    loss: float, norm: float, run: Run, *, step: int, rows: list[str], saved_step: int | None
) -> NonFiniteError:
    """The stop on a loss or gradient norm that is NaN or infinite, found in `step`, on `rows` (their places)."""
    applied = "the update was not applied"
    if run.train.optimizer_in_backward:
        applied = "of this step only the parameters with a finite gradient were updated, and nothing of it is saved"
    saved = f"checkpoint-{saved_step}" if saved_step else "none was written yet"
    why = f"{applied}; the last good checkpoint: {saved}"
    kind, where = (
        "gradient norm" if math.isfinite(loss) else "loss",
        f"step {step}, rows {', '.join(rows[:8])}",
    )
    what = f"the {kind} is not finite (loss {loss}, gradient norm {norm})"
    fix = "lower train.learning_rate or lengthen train.warmup; look at those rows with `tunesmith data`; "
    fix += "model.dtype=fp32 tells rounding from bad data"
    return NonFiniteError(what, where=where + " ..." * (len(rows) > 8), why=why, fix=fix)


def stopped_by(
    requests: Sequence[tuple[Shortage | None, str | None]],
    run: Run,
    progress: Progress,
    ranks: Ranks,
    *,
    retry_with_smaller_batch: bool = True,
) -> StoppedError:
    """The end of a run for want of memory, by a signal, or by the file `stop`, which is removed.

    It comes after a step was saved, or before the first one. The exit code is 75. Under torchrun,
    which starts a rank of any code but 0 again, it is 0, and a rank of each run directory writes
    stopped.json; for want of memory always.

    Args:
        requests: for each rank its shortage of memory and its signal.
        retry_with_smaller_batch: another start may take half the micro batch.
    """
    out, step = Path(run.output_dir), progress.step
    again = "start the same command again: it goes on from there" if step else "start the same command again"
    shortage = next((shortage for shortage, _ in requests if shortage), None)
    signal = next((name for _, name in requests if name), None)
    by_file = (out / STOP_FILE).exists()  # `tunesmith stop` sends a signal too where it can
    record: dict[str, Any] = {
        "signal": signal,
        "reason": "file" if by_file or not signal else "signal",
    }
    record |= {"step": step, "next": again}
    what = "stopped by the file stop" if record["reason"] == "file" else f"stopped by {signal}"
    why = "" if step else "there was nothing to save yet"
    if shortage is not None:
        smaller = advice = ""
        if retry_with_smaller_batch and step:
            smaller = half_micro_batch(run, progress.micro_batch)
        if smaller:
            advice = f"; or with train.micro_batch='{smaller}'"
        what, why, again = SHORT, shortage.text, f"{END}, then {again}{advice}"
        record |= {
            "reason": "memory",
            "next": again,
            "smaller": smaller,
            "figures": shortage.record,
        }
    words: dict[str, Any] = {
        "where": str(out / f"checkpoint-{step}") if step else "",
        "why": why,
        "fix": again,
    }
    if record["reason"] == "signal" and "SLURM_JOB_ID" in os.environ and signal in ("SIGTERM", "SIGUSR1"):
        words["cause"] = "preempted"
    saved = f": step {step} is saved" if step else " before the first step"
    error = (ShortOfMemoryError if shortage else StoppedError)(what + saved, **words)
    record["cause"] = error.cause or None
    error.smaller = record.get("smaller", "")
    if ranks.leads:
        (out / STOP_FILE).unlink(missing_ok=True)
    if is_launched():
        error.exit_code = EXIT_OK
    if ranks.leads_dir and (is_launched() or shortage):
        write_atomically(out / STOPPED, json.dumps(record, indent=1))
    return error


def write_stopped(out: Path, what: str, step: int) -> None:
    """Write stopped.json where a signal to one rank ended all of them without a save; `step`: the last one done."""
    record = {
        "signal": None,
        "reason": "signal",
        "step": step,
        "next": AGAIN,
        "what": what,
        "cause": None,
    }
    write_atomically(out / STOPPED, json.dumps(record, indent=1))


def half_micro_batch(run: Run, micro_batch: str | None) -> str:
    """Half the micro batch of a run, `2048 tokens`; empty where it cannot be smaller."""
    size = Size.parse(micro_batch or "1 examples")
    half = max(size.amount // 2, run.data.seq_len if size.unit == "tokens" else 1)
    return f"{half} {size.unit}" if half < size.amount and not run.train.optimizer_in_backward else ""


def write_paused(out: Path, step: int) -> None:
    """Write stopped.json where a sweep leaves a candidate after `step`."""
    fix = f"tunesmith train {shell_path(out / RECIPE)} goes on with it"
    record = {"signal": None, "reason": "sweep", "step": step, "next": fix}
    write_atomically(out / STOPPED, json.dumps(record, indent=1))


def stopped_twice(out: Path, step: int, saved_step: int | None) -> StoppedError:
    """The end of a run by a second ctrl-C after `step`: the newest checkpoint is all that is saved."""
    kept = f"step {saved_step} is saved" if saved_step else "no checkpoint was written yet"
    where = str(out / f"checkpoint-{saved_step}") if saved_step else ""
    return StoppedError(f"stopped after step {step}: {kept}", where=where, fix=how_to_resume(saved_step))


def how_to_resume(saved_step: int | None) -> str:
    """The advice on how to start again."""
    again = "start the same command again"
    return f"{again}: it goes on from checkpoint-{saved_step}" if saved_step else again
