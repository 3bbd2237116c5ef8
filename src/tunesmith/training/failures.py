"""Reports of a run that fails or is stopped: stopped.json, failure.json and the error to raise."""

import contextlib
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.checkpoint.claim import Claim
from tunesmith.errors import (
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    CheckpointError,
    NonFiniteError,
    OtherRankError,
    RunError,
    StoppedEarlyError,
    StoppedError,
    TunesmithError,
    first_line,
)
from tunesmith.host.signals import Interrupted, StopRequest
from tunesmith.metrics.sink import RecordCallback
from tunesmith.run_dir import IDENTITY, RUNNING, Phase
from tunesmith.training.result import how_to_resume, write_failure, write_stopped

if TYPE_CHECKING:
    from tunesmith.training.trainer import Trainer

log = logging.getLogger(__name__)


@contextlib.contextmanager
def record_early_stop(out: Path, request: StopRequest, claim: Claim) -> Iterator[None]:
    """Context manager for the time before the first step: if a signal ends the block or the
    process, call `note_early_stop`.
    """
    request.on_exit = partial(note_early_stop, out, request, claim)
    try:
        yield
    except (Interrupted, StoppedEarlyError, OtherRankError) as error:
        if getattr(error, "exit_code", EXIT_STOPPED) == EXIT_STOPPED:
            note_early_stop(out, request, claim)
        raise


def note_early_stop(out: Path, request: StopRequest, claim: Claim) -> None:
    """Write stopped.json if the folder contains a run. If it contains no run, nothing was saved
    that could be resumed, so the folder is removed.
    """
    write_early_stop(out, request)
    (out / RUNNING).unlink(missing_ok=True)
    claim.remove_unused()


def write_early_stop(out: Path, request: StopRequest) -> None:
    """Write stopped.json for a stop without a save, if the folder contains a run.

    Before env.json exists, a rank may already have removed the folder and its lock.
    """
    if (out / IDENTITY).is_file():
        write_stopped(out, request.saved_step() or 0, what=f"stopped {request.when()}")


def write_fault(out: Path, request: StopRequest, fault: TunesmithError, step: int) -> None:
    """Write the error that ends all ranks to a file: stopped.json for a stop, else failure.json."""
    if isinstance(fault, StoppedError):
        write_early_stop(out, request)
    else:
        write_failure(out, fault, last_step=step, next_command="")


@contextlib.contextmanager
def defer_to_rank_0(trainer: "Trainer") -> Iterator[None]:
    """Convert errors on ranks other than 0. An error that all ranks raise becomes an
    OtherRankError, because rank 0 reports it. Any other error becomes the error that
    `Trainer.as_failure` returns.
    """
    try:
        yield
    except (StoppedError, NonFiniteError) as error:
        raise OtherRankError(error.what, exit_code=error.exit_code) from error
    except Exception as error:
        failure = trainer.as_failure(error)
        if failure is error:
            raise
        raise failure from error


@contextlib.contextmanager
def report_failure(
    trainer: "Trainer",
    callback: RecordCallback,
) -> Iterator[None]:
    """If the block raises an error, write failure.json. Use this on rank 0."""
    try:
        yield
    except StoppedError:
        raise
    except BaseException as caught:
        heartbeat = trainer.ranks.heartbeat
        writer = trainer.checkpoints.writer
        step = trainer.progress.step
        error = heartbeat.share_error(caught, trainer.as_failure(caught))
        if isinstance(error, OtherRankError):  # the heartbeat has already reported the error
            raise error from caught
        writer.close()  # wait for the checkpoint in progress
        if trainer.stop.request.now:
            saved_step = writer.saved_step
            saved = f"step {saved_step} is saved" if saved_step else "no checkpoint was written yet"
            what = f"stopped after step {step}: {saved}"
            where = str(trainer.out / f"checkpoint-{saved_step}") if saved_step else ""
            write_stopped(trainer.out, step, what=what)
            stopped = StoppedError(what, where=where, fix=how_to_resume(saved_step))
            stopped.exit_code = EXIT_INTERRUPTED
            raise stopped from error
        failure = trainer.as_failure(error)
        resume = how_to_resume(writer.saved_step)
        place = heartbeat.peers.place_of(trainer.ranks.rank)
        if isinstance(caught, CheckpointError):
            # The error is from the thread that writes checkpoints. Report the saving phase, because
            # the training loop may already be in another phase.
            place["phase"] = Phase.SAVING
        failure.failed_rank = failure.failed_rank or place
        is_callback_error = error is callback.error
        if is_callback_error:
            what = f"on_record raised {type(error).__name__}: {first_line(error)}"
            failure = RunError(what, where=f"step {step}", fix=f"fix on_record; {resume}")
        try:
            write_failure(trainer.out, failure, last_step=step, next_command=resume)
        except OSError as write_error:
            log.info(f"failure.json could not be written: {write_error.strerror}")
        if is_callback_error:
            raise
        raise failure from error
