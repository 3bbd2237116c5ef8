"""The sinks of a run, which receive the record of each step, and the first files of a run."""

import contextlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tunesmith.checkpoint.claim import remove_leftovers
from tunesmith.checkpoint.resume import Start
from tunesmith.config.schema import Run
from tunesmith.metrics.log_file import LogFile
from tunesmith.metrics.sink import (
    JsonlSink,
    RankSink,
    RecordCallback,
    SamplesSink,
    Sinks,
    TensorBoardSink,
    writes_tensorboard,
)
from tunesmith.metrics.terminal import Terminal
from tunesmith.metrics.trackers import TrackerSink, trackers_of
from tunesmith.run_dir import (
    FAILURE,
    METRICS,
    SAMPLES,
    STOPPED,
    TENSORBOARD,
)

if TYPE_CHECKING:
    from tunesmith.training.session import Session


def sinks_of_rank(
    session: "Session",
    start: Start,
    callback: RecordCallback,
    log_file: LogFile,
    stream: TextIO | None,
) -> Sinks:
    """Return the sinks of this rank, which receive the record of each step. Only rank 0 has the
    sinks of the recipe and the callback.
    """
    out = Path(session.run.output_dir)
    if not session.ranks.is_main_process:
        return Sinks([RankSink(out, session.ranks.rank)])
    terminal = Terminal(
        log_file,
        total_steps=session.total_steps,
        steps_per_epoch=session.data.schedule.steps_per_epoch(0),
        trained_seconds=start.progress.seconds if start.progress else 0.0,
        phase=session.ranks.heartbeat.phase_name,
        stream=stream,
    )
    sinks = sinks_of(session.run, out, terminal)
    sinks.all.append(callback)
    return sinks


def sinks_of(run: Run, folder: Path, terminal: Terminal) -> Sinks:
    """Return the sinks of a recipe. The terminal is first, and metrics.jsonl is before sinks that
    may be slow.
    """
    sinks = [terminal, JsonlSink(folder / METRICS), SamplesSink(folder / SAMPLES)]
    if writes_tensorboard(run):
        shared_folder = run.log.tensorboard_dir
        events = Path(shared_folder or folder / TENSORBOARD)
        sinks.append(TensorBoardSink(events, shared=shared_folder is not None))
    log_text = partial(terminal.text, "tracker")
    for name in trackers_of(run):
        sinks.append(TrackerSink(name, folder, log_text))
    return Sinks(sinks)


def write_first_files(
    session: "Session", start: Start, sinks: Sinks, argv: list[str] | None
) -> None:
    """Open the sinks and write env.json and the other files that exist from the start. Call this
    after all checks.
    """
    out = Path(session.run.output_dir)
    ranks = session.ranks
    if ranks.is_run_dir_writer:
        remove_leftovers(out)
    last_step = start.progress.step if start.progress else 0
    if start.progress and not start.progress.validated:
        # The validation of the last step was interrupted. Remove the record of this step, because
        # it is written again after the validation.
        last_step -= 1
    sinks.open(session.recipe, last_step)
    if ranks.is_run_dir_writer:
        from tunesmith.training.identity import write_identity

        # Only rank 0 stores the command line.
        write_identity(session, argv if ranks.is_main_process else None)
        for name in (FAILURE, STOPPED):
            (out / name).unlink(missing_ok=True)


def close_after_all(sinks: Sinks) -> None:
    """Close the sinks, such as the terminal and log files, after a run ended early. Errors are
    ignored, so that they do not hide the cause of the end.
    """
    with contextlib.suppress(OSError):
        sinks.close()
