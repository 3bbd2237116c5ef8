"""One start of a recipe: claim the run directory -> decide where to start -> build -> Trainer.fit -> Result."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from tunesmith import packages
from tunesmith.checkpoint.killed import killed_before, note_running
from tunesmith.checkpoint.nodes import find_dir_leaders
from tunesmith.checkpoint.resume import Start, decide_start
from tunesmith.checkpoint.run_dir import claim_run_dir, is_run, put_aside, stop_requested_at, sweep
from tunesmith.config.load import load_recipe
from tunesmith.config.paths import inputs_of
from tunesmith.config.schema import Run
from tunesmith.errors import (
    EXIT_OK,
    EXIT_STOPPED,
    CheckpointError,
    NonFiniteError,
    OtherRankError,
    RunError,
    StoppedEarlyError,
    StoppedError,
    TunesmithError,
    UsageError,
    first_line,
)
from tunesmith.host_files import cache_folder, refuse_many_ranks, refuse_special_files
from tunesmith.hub.fetch import repo_cache
from tunesmith.metrics.log_file import LogFile
from tunesmith.metrics.record import StepRecord
from tunesmith.metrics.sink import JsonlSink, RankSink, RecordCallback, SamplesSink, Sink, Sinks, TensorBoardSink
from tunesmith.metrics.summary import write_failure
from tunesmith.metrics.terminal import Terminal
from tunesmith.metrics.trackers import TrackerSink, trackers_of
from tunesmith.parallel.mesh import possible_shapes
from tunesmith.ranks import Ranks, is_launched, join_ranks, started_as
from tunesmith.run_directory import FAILURE, LOG, METRICS, SAMPLES, STOP_FILE, STOPPED
from tunesmith.runtime.determinism import deterministic_algorithms
from tunesmith.runtime.memory_guard import MemoryGuard
from tunesmith.signals import StopRequest
from tunesmith.streams import lasting
from tunesmith.training.agree import agree_on_recipe
from tunesmith.training.build import Session, build, write_identity
from tunesmith.training.result import Result, how_to_resume, stopped_twice, write_stopped
from tunesmith.training.stop_control import StopControl
from tunesmith.training.trainer import Trainer


def print_line(text: str) -> None:
    """One line for the user, on stderr: stdout is for answers."""
    print(text, file=sys.stderr, flush=True)


def train(
    run: Run | str | Path,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    on_record: Callable[[StepRecord], object] = lambda record: None,
    fresh: bool = False,
    why: bool = False,
    argv: list[str] | None = None,
    say: Callable[[str], None] | None = print_line,
) -> Result:
    """Train what a recipe describes, or resume it.

    >>> tunesmith.train("smollm2-135m-lora", {"data.train": {"source": "rows.jsonl", "format": "alpaca"}})
    >>> tunesmith.train("my-recipe.yaml", {"train.learning_rate": 2e-4}, on_record=lambda record: print(record.loss))

    Args:
        run: a recipe: its file, the name of one that ships, or a checked `Run`.
        overrides: of a file or name: `{"key.sub": value}`, or texts `key.sub=value`, whose values are read as YAML.
        on_record: called after each step. What it raises ends the run, is named in failure.json and raised unchanged;
            `signal.raise_signal(signal.SIGINT)` in it saves and stops.
        fresh: put an earlier run in `output_dir` aside and start over.
        why, argv: say the reason of each choice for this machine; the command line, for env.json.
        say: takes each line that is told before the first step; None shows nothing, then or later.

    Raises:
        UsageError: something is wrong with the recipe, data, model or machine; nothing was started.
        RunError: the run began and failed; failure.json says why.
        StoppedError: a signal, ctrl-C or the notebook's stop button came; everything is saved.
    """
    if not isinstance(run, Run):
        run = load_recipe(run, overrides, say=say)
    elif overrides:
        raise UsageError("a checked recipe takes no overrides", fix="give the recipe's file, or dataclasses.replace it")
    packages.refuse_unfit_versions()
    if started_as() is None:
        refuse_many_ranks("train")
    with joined(run) as (request, ranks):
        stop = StopControl(request, Path(run.output_dir), ranks)
        return start_run(run, stop, ranks, on_record=on_record, fresh=fresh, why=why, argv=argv, say=say)


@contextlib.contextmanager
def joined(run: Run) -> Iterator[tuple[StopRequest, Ranks]]:
    """What one start, or several in a row, need of the process: signals noted, and the other ranks joined."""
    try:
        with ExitStack() as stack, deterministic_algorithms(run.train.deterministic):
            stack.enter_context(contextlib.redirect_stderr(lasting(sys.stderr)))
            stop = stack.enter_context(StopRequest())
            ranks = stack.enter_context(join_ranks())
            ranks.heartbeat.stop_signal = lambda: stop.signal or ""
            stack.enter_context(MemoryGuard(stop, ranks, large_files(run)))
            yield stop, ranks
    except (StoppedEarlyError, OtherRankError) as error:
        # A launcher that starts failed ranks again would lose the stop.
        if error.exit_code == EXIT_STOPPED and is_launched():
            error.exit_code = EXIT_OK
            if is_run(out := Path(run.output_dir)):
                write_stopped(out, "stopped by a signal before the first step", step=0)
        raise


def large_files(run: Run) -> list[Path]:
    """Files that the run reads or writes, and folders of them: here, in the Hub's cache and in our own."""
    paths = [Path(run.output_dir), cache_folder("tokens"), cache_folder("models")]
    for key, name in inputs_of(run).items():
        if os.path.isabs(name):
            paths.append(Path(name))
        else:  # a Hub id; the name of a template is no folder there
            paths.append(repo_cache(name, "dataset" if key.startswith("data.") else "model"))
    return paths


def start_run(
    run: Run,
    stop: StopControl,
    ranks: Ranks,
    *,
    on_record: Callable[[StepRecord], object] = lambda record: None,
    fresh: bool = False,
    why: bool = False,
    argv: list[str] | None = None,
    say: Callable[[str], None] | None = print_line,
    build: Callable[..., Session] = build,
    pause_after: int | None = None,
) -> Result:
    """`train` within `joined`; `build` stands in for that of the same name, `pause_after` as for the Trainer."""
    run = agree_on_recipe(run, ranks)
    with ExitStack() as stack:
        if not ranks.leads:
            return follow(run, stop, ranks, stack, fresh=fresh, build=build, pause_after=pause_after)
        out = Path(run.output_dir)
        stream = None if say else stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        log = stack.enter_context(LogFile(out / LOG))
        say = log.with_log(say or (lambda text: None))
        ranks, start = open_run_dir(run, ranks, stack, fresh=fresh, say=say)
        if start.finished is not None:
            return Result(out, start.finished, finished_before=True)
        with as_usage_error():
            session = build(run, start, say=say, why=why, ranks=ranks)
        total, per_epoch = session.total_steps, session.data.schedule.steps_per_epoch(0)
        callback = RecordCallback(on_record)
        with ranks.together(), as_usage_error():
            sinks = sinks_of(run, out, total_steps=total, steps_per_epoch=per_epoch, log=log, stream=stream)
            sinks.all.append(callback)
            stack.callback(close_after_all, sinks)
            begin(session, start, sinks, argv)
        trainer = Trainer(session, start, sinks, stop, pause_after=pause_after)
        return fit_or_say_why(ready_trainer(trainer, stack, say), say, callback)


def open_run_dir(
    run: Run, ranks: Ranks, stack: ExitStack, *, fresh: bool, say: Callable[[str], None]
) -> tuple[Ranks, Start]:
    """Claim the run directory until `stack` closes, on each node that does not see rank 0's too, put an earlier run aside
    if asked to, and decide where to start; a collective call.

    Returns the ranks, which now know who leads which directory, and the start.
    """
    out, marks = Path(run.output_dir), []
    old_stop_requests: list[int] = []
    with ranks.together():
        possible_shapes(run.parallel, ranks.world)
        named = run.profile.ranks if run.profile.enabled and run.profile.ranks != "all" else ()
        if max(named, default=0) >= ranks.world:
            what = f"profile.ranks names rank {max(named)}, and the ranks here are 0 to {ranks.world - 1}"
            raise UsageError(what, where="profile.ranks", fix="profile.ranks=[0], or profile.ranks=all")

    def claim() -> None:
        # Only here, where it is created if it is not there: a network file system remembers for a while what was not there.
        refuse_special_files(out)
        marks.append(stack.enter_context(claim_run_dir(out)))
        old_stop_requests.append(stop_requested_at(out))

    ranks = find_dir_leaders(ranks, out, claim)
    if others := sorted({*ranks.dir_leaders} - {0}):
        names, first = ", ".join(map(ranks.name, others)), ranks.name(0)
        say(f"no shared disk: the nodes of {names} keep checkpoints of their own; records and final/ are with {first}")
    with ranks.together():
        aside = (fresh or run.checkpoint.resume == "never") and ranks.leads_dir
        place = put_aside(out, inputs_of(run).values()) if aside else None
    for rank, moved in enumerate(ranks.gather(place)):
        if moved:
            say(f"the earlier run is now in {moved}" + (f", of {ranks.name(rank)}" if rank else ""))
    if killed := killed_before(out):
        say(killed.text().replace("error:", "warning:", 1))
    with as_usage_error():
        start = decide_start(run, ranks, warn=say)
    if ranks.leads_dir and start.finished is None:
        marks[0]()
        if stop_requested_at(out) == old_stop_requests[0]:  # one that came since is for this start
            (out / STOP_FILE).unlink(missing_ok=True)
        stack.enter_context(note_running(out))
        ranks.heartbeat.on_fault = partial(write_fault, out)
    return ranks, start


@contextlib.contextmanager
def as_usage_error() -> Iterator[None]:
    """What fails before the first step is found in time: nothing has begun. A checkpoint that cannot be read, say."""
    try:
        yield
    except RunError as error:
        raise UsageError(error.what, where=error.where, why=error.why, fix=error.fix) from error


def follow(
    run: Run,
    stop: StopControl,
    ranks: Ranks,
    stack: ExitStack,
    *,
    fresh: bool,
    build: Callable[..., Session],
    pause_after: int | None,
) -> Result:
    """What a rank other than 0 does of `train`: it says nothing, writes nothing but checkpoints, and takes part in all
    else."""
    ranks, start = open_run_dir(run, ranks, stack, fresh=fresh, say=lambda text: None)
    if start.finished is not None:
        return Result(Path(run.output_dir), start.finished, finished_before=True)
    session = build(run, start, say=lambda text: None, ranks=ranks)
    sinks = Sinks([RankSink(Path(run.output_dir), ranks.rank)])
    stack.callback(close_after_all, sinks)
    with ranks.together():  # rank 0 opens its files
        if ranks.leads_dir:
            begin(session, start, sinks, None)
        else:
            sinks.open(run, resumed_at(start))
    trainer = Trainer(session, start, sinks, stop, pause_after=pause_after)
    ready = ready_trainer(trainer, stack, lambda text: None)
    try:
        return ready.fit()
    except (StoppedError, NonFiniteError) as error:  # on all ranks alike: rank 0 tells it
        raise OtherRankError(error.what, exit_code=error.exit_code) from error
    except Exception as error:
        failure = ready.as_failure(error)  # of which the heartbeat tells the others
        if failure is error:
            raise
        raise failure from error


def ready_trainer(trainer: Trainer, stack: ExitStack, say: Callable[[str], None]) -> Trainer:
    """The trainer of a run that begins: from here on the loop answers signals, and the rank of each node that tells what
    ends them all leaves failure.json there. Its writer is closed with `stack`."""
    session, out = trainer.session, trainer.out
    session.ranks.heartbeat.on_fault = partial(write_fault, out)  # of ranks that do not write the directory too
    for text in session.describe_ranks(trainer.first_step) if session.ranks.leads else ():
        say(text)
    stack.callback(trainer.checkpoints.writer.close)
    trainer.stop.hold(say)
    return trainer


def write_fault(out: Path, fault: TunesmithError, step: int) -> None:
    """Leave in the run directory what ends all ranks: failure.json, or stopped.json where a signal did."""
    if isinstance(fault, StoppedError):
        write_stopped(out, fault.what, step)
    else:
        write_failure(out, fault, last_step=step, next_command="")


def fit_or_say_why(trainer: Trainer, say: Callable[[str], None], callback: RecordCallback) -> Result:
    """Train to the end; leave failure.json in the run directory where the run fails."""
    try:
        result = trainer.fit()
        trainer.sinks.close()
    except StoppedError:
        raise
    except BaseException as caught:
        error = trainer.session.ranks.heartbeat.verdict(caught, trainer.as_failure(caught))
        if isinstance(error, OtherRankError):  # which the heartbeat has told
            raise error from caught
        trainer.checkpoints.writer.close()  # what it is writing still counts
        if trainer.stop.request.now:
            raise stopped_twice(trainer.out, trainer.progress.step, trainer.checkpoints.writer.saved_step) from error
        failure, resume = trainer.as_failure(error), how_to_resume(trainer.checkpoints.writer.saved_step)
        place = trainer.session.ranks.heartbeat.own_place()
        if isinstance(caught, CheckpointError):
            place["phase"] = "saving"  # in a thread, beside whatever the loop does when it learns of it
        failure.failed_rank = failure.failed_rank or place
        if error is callback.error:
            what = f"on_record raised {type(error).__name__}: {first_line(error)}"
            failure = RunError(what, where=f"step {trainer.progress.step}", fix=f"correct on_record; {resume}")
        try:
            write_failure(trainer.out, failure, last_step=trainer.progress.step, next_command=resume)
        except OSError as unwritten:
            say(f"failure.json could not be written: {unwritten.strerror}")
        if error is callback.error:
            raise
        raise failure from error
    return result


def begin(session: Session, start: Start, sinks: Sinks, argv: list[str] | None) -> None:
    """Write the first files of a start, now that nothing is left to check."""
    out = Path(session.run.output_dir)
    sweep(out)
    sinks.open(session.run, resumed_at(start))
    write_identity(session, argv)
    for name in (FAILURE, STOPPED):
        (out / name).unlink(missing_ok=True)


def resumed_at(start: Start) -> int:
    """The last step whose record stays: a step whose validation was cut off is written again, with its validation."""
    return start.progress.step - (not start.progress.validated) if start.progress else 0


def sinks_of(
    run: Run, folder: Path, *, total_steps: int | None, steps_per_epoch: int, log: LogFile, stream: TextIO | None = None
) -> Sinks:
    """The sinks that a recipe asks for. The terminal comes first, and metrics.jsonl before those that may be slow."""
    terminal = Terminal(log, total_steps=total_steps, steps_per_epoch=steps_per_epoch, stream=stream)
    sinks: list[Sink] = [terminal, JsonlSink(folder / METRICS), SamplesSink(folder / SAMPLES)]
    if run.log.tensorboard:
        elsewhere = run.log.tensorboard_dir
        sinks.append(TensorBoardSink(Path(elsewhere or folder / "tensorboard"), shared=elsewhere is not None))
    sinks += [TrackerSink(name, folder, lambda text: terminal.text("tracker", text)) for name in trackers_of(run)]
    return Sinks(sinks)


def close_after_all(sinks: Sinks) -> None:
    """Close what is still open when a run leaves early; a fault in that must not hide why it left."""
    with contextlib.suppress(OSError):
        sinks.close()
