"""One start of a recipe: claim the run directory -> decide where to start -> build -> Trainer.fit -> Result."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from tunesmith.checkpoint.resume import claim_run_dir, decide_start, put_aside
from tunesmith.config.load import load_recipe
from tunesmith.config.schema import Run
from tunesmith.errors import RunError, StoppedError, UsageError
from tunesmith.metrics.sink import Sinks
from tunesmith.metrics.sinks import sinks_of
from tunesmith.metrics.summary import FAILURE, write_failure
from tunesmith.signals import StopRequest
from tunesmith.training.build import build, write_identity
from tunesmith.training.result import Result, how_to_resume
from tunesmith.training.trainer import Trainer


def print_line(text: str) -> None:
    """One line for the user, on stderr: stdout is for answers."""
    print(text, file=sys.stderr, flush=True)


def train(
    run: Run | str | Path,
    overrides: Sequence[str] = (),
    *,
    fresh: bool = False,
    why: bool = False,
    argv: list[str] | None = None,
    say: Callable[[str], None] = print_line,
) -> Result:
    """Train what a recipe describes, or resume it.

    Args:
        run: a recipe: its file, the name of one that ships, or a checked `Run`.
        overrides: `key.sub=value`, for a recipe given by file or name.
        fresh: put an earlier run in `output_dir` aside and start over.
        why: say the reason of each choice for this machine.
        argv: the command line, for env.json.
        say: takes each line that is told before the first step.

    Raises:
        UsageError: something is wrong with the recipe, data, model or machine; nothing was started.
        RunError: the run began and failed; failure.json says why.
        StoppedError: a signal came; everything is saved.
    """
    if not isinstance(run, Run):
        run = load_recipe(run, overrides)
    elif overrides:
        raise UsageError("a checked recipe takes no overrides", fix="give the recipe's file, or dataclasses.replace it")
    out = Path(run.output_dir)
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        stack.enter_context(claim_run_dir(out))
        if (fresh or run.checkpoint.resume == "never") and (place := put_aside(out, inputs_of(run))):
            say(f"the earlier run is now in {place}")
        try:
            start = decide_start(run, warn=say)
            if start.finished is not None:
                return Result(out, start.finished, finished_before=True)
            session = build(run, start, say=say, why=why)
            per_epoch = session.data.schedule.steps_per_epoch(0)
            sinks = sinks_of(run, out, total_steps=session.total_steps, steps_per_epoch=per_epoch)
            stack.callback(close_after_all, sinks)
            # A step whose validation was cut off is written again, with its validation.
            kept = start.progress.step - (not start.progress.validated) if start.progress else 0
            sinks.open(run, kept)
            write_identity(session, argv)
        except RunError as error:  # a checkpoint that cannot be read, say: nothing has begun
            raise UsageError(error.what, where=error.where, why=error.why, fix=error.fix) from error
        (out / FAILURE).unlink(missing_ok=True)
        trainer = Trainer(session, start, sinks, stop)
        stack.callback(trainer.writer.close)
        stop.hold()
        return fit_or_say_why(trainer, say)


def fit_or_say_why(trainer: Trainer, say: Callable[[str], None]) -> Result:
    """Train to the end; leave failure.json in the run directory where the run fails."""
    try:
        result = trainer.fit()
        trainer.sinks.close()
    except StoppedError:
        raise
    except BaseException as error:
        trainer.writer.close()  # what it is writing still counts
        failure, resume = trainer.as_failure(error), how_to_resume(trainer.writer.saved_step)
        try:
            write_failure(trainer.out, failure, last_step=trainer.progress.step, next_command=resume)
        except OSError as unwritten:
            say(f"failure.json could not be written: {unwritten.strerror}")
        raise failure from error
    return result


def inputs_of(run: Run) -> list[str]:
    """All that a run reads, as its recipe names it: files, folders, and names on the Hub."""
    names = [run.model.name, run.model.tokenizer, run.adapter.from_, run.data.template]
    return [n for n in (*names, *(s.source for s in (*run.data.train, *run.data.validation))) if n is not None]


def close_after_all(sinks: Sinks) -> None:
    """Close what is still open when a run leaves early; a fault in that must not hide why it left."""
    with contextlib.suppress(OSError):
        sinks.close()
