"""One start of a recipe, on every rank:

claim the run directory -> decide where to start -> build -> Trainer.fit -> Result
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TextIO

from tunesmith.checkpoint.claim import (
    claim_run_dir,
    is_run,
    move_aside,
    remove_leftovers,
)
from tunesmith.checkpoint.previous_crash import find_previous_crash, note_running
from tunesmith.checkpoint.replicate import find_run_dir_writers
from tunesmith.checkpoint.resume import Start, decide_start
from tunesmith.checkpoint.start_adapter import adapter_of_run, folder_in_run, is_run_dir
from tunesmith.config.layers import override_layer
from tunesmith.config.load import load_recipe
from tunesmith.config.paths import inputs_of
from tunesmith.config.schema import Run
from tunesmith.distributed.ranks import (
    ONE_PROCESS,
    Ranks,
    is_launched,
    join_ranks,
    require_one_process,
    started_as,
)
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
from tunesmith.host import packages
from tunesmith.host.files import cache_folder
from tunesmith.host.logger import default_level, lines_by_default, stderr_only_from
from tunesmith.host.signals import STOP_PATIENCE_SECONDS, Interrupted, StopRequest
from tunesmith.host.streams import lasting
from tunesmith.hub.fetch import repo_cache
from tunesmith.metrics.log_file import LogFile, log_file_of_run
from tunesmith.metrics.record import StepRecord
from tunesmith.metrics.sink import (
    JsonlSink,
    RankSink,
    RecordCallback,
    SamplesSink,
    Sink,
    Sinks,
    TensorBoardSink,
    writes_tensorboard,
)
from tunesmith.metrics.summary import write_failure
from tunesmith.metrics.terminal import Terminal
from tunesmith.metrics.trackers import TrackerSink, trackers_of
from tunesmith.parallel.mesh import possible_shapes
from tunesmith.run_dir import (
    FAILURE,
    IDENTITY,
    LOG,
    METRICS,
    RUNNING,
    SAMPLES,
    STOPPED,
    Phase,
)
from tunesmith.runtime.determinism import deterministic_algorithms
from tunesmith.runtime.memory_guard import MemoryGuard
from tunesmith.training.agree import check_same_recipe
from tunesmith.training.build import Session, build, write_identity
from tunesmith.training.early_checks import short_name
from tunesmith.training.make_recipe import make_recipe
from tunesmith.training.program_rows import keep_rows
from tunesmith.training.result import (
    Result,
    how_to_resume,
    warn_of_changed_rows,
    write_stopped,
)
from tunesmith.training.stop_control import StopControl
from tunesmith.training.trainer import Trainer
from tunesmith.units import count_of

log = logging.getLogger(__name__)


def train(
    recipe: Run | str | Path | None = None,
    overrides: Mapping[str, object] | Sequence[str] = (),
    *,
    model: str | None = None,
    rows: object = None,
    on_record: Callable[[StepRecord], object] | None = None,
    fresh: bool = False,
    why: bool = False,
    argv: list[str] | None = None,
    quiet: bool = False,
) -> Result:
    """Train what a recipe describes, or resume it.

    >>> rows = {"source": "rows.jsonl", "format": "alpaca"}
    >>> tunesmith.train("smollm2-135m-lora", {"data.train": rows})
    >>> tunesmith.train("my-recipe.yaml", {"train.learning_rate": 2e-4}, on_record=print)
    >>> rows = [{"prompt": "Hello", "completion": "Hi"}]
    >>> tunesmith.train(model="HuggingFaceTB/SmolLM2-135M-Instruct", rows=rows)

    Args:
        recipe: its file, the name of one that ships, or a checked `Run`. None: one is made
            for `model` and `rows`, as `tunesmith train --model X --data FILE` does.
        overrides: of a file or name: `{"key.sub": value}`, or a text `key.sub=value` or several,
            whose values are read as YAML.
        model: Hub id, folder, .gguf file, or `demo`.
        rows: mappings, or a `datasets.Dataset`; they are kept in the run directory, so that the
            same call resumes.
        on_record: called after each step. StopIteration from it ends the run as its last step does,
            after this step or, on a GPU or several, the next; `signal.raise_signal(signal.SIGINT)`
            saves and stops. What else it raises is named in failure.json and raised unchanged.
        fresh: move an earlier run in `output_dir` aside and start over.
        why, argv: log the reason of each choice for this machine; the command line, for env.json.
        quiet: print nothing; log.txt has all lines.

    What is chosen before the first step is logged to `logging.getLogger("tunesmith")`, by rank 0,
    and printed on stderr unless that logger has a handler or logging is set up for INFO.

    Raises:
        UsageError: something is wrong with the recipe, data, model or machine; nothing was started.
        RunError: the run began and failed; failure.json says why.
        StoppedError: a signal, ctrl-C or the notebook's stop button came; everything is saved.
    """
    with lines_by_default(level_of_process()), ExitStack() as stack:
        if quiet:
            stack.enter_context(stderr_only_from())
        if recipe is None:
            run = recipe_for_rows(model, rows, overrides)
        elif model is not None or rows is not None:
            fix = "set a recipe's rows with data.train.source"
            raise UsageError("a recipe cannot be combined with model or rows", fix=fix)
        elif not isinstance(recipe, Run):
            run = load_recipe(recipe, overrides, announce=not quiet)
        elif overrides:
            fix = "pass the recipe's file, or use dataclasses.replace"
            raise UsageError("a checked recipe does not accept overrides", fix=fix)
        else:
            run = recipe
        packages.check_versions()
        if started_as() is None:
            require_one_process("train")
        request, ranks = stack.enter_context(joined(run))
        # Until the first step has ended.
        request.nothing_to_save = True
        return start_run(
            run,
            StopControl(request, Path(run.output_dir), ranks),
            ranks,
            on_record=on_record or (lambda record: None),
            fresh=fresh,
            why=why,
            argv=argv,
            quiet=quiet,
        )


def recipe_for_rows(
    model: str | None, rows: object, overrides: Mapping[str, object] | Sequence[str]
) -> Run:
    """Make a recipe for a model and rows of the program, which are written below its output_dir."""
    if model is None or rows is None:
        fix = 'train("my-recipe.yaml"), or train(model="...", rows=[...])'
        raise UsageError("a recipe is required, or model and rows", fix=fix)
    options = override_layer(overrides).plain()
    # The default would be named after the file of the rows.
    options.setdefault("output_dir", f"runs/rows-{short_name(model)}")
    file = keep_rows(rows, Path(options["output_dir"]))
    return make_recipe(model, str(file), options).run


def level_of_process(rank: int | None = None) -> int:
    """The level to log at: other ranks leave to rank 0 what would be logged by all alike."""
    if rank is None:
        rank = (started_as() or {"RANK": 0})["RANK"]
    return logging.INFO if rank == 0 else logging.WARNING


@contextlib.contextmanager
def joined(run: Run) -> Iterator[tuple[StopRequest, Ranks]]:
    """Set up what one start, or several in a row, need of the process.

    Signals are noted, memory is watched, and the other ranks are joined.
    """
    stop = StopRequest()
    # Other ranks would take an end without a word for a crash.
    if StopRequest.is_of_command and not is_launched():
        stop.patience = STOP_PATIENCE_SECONDS
    try:
        with ExitStack() as stack, deterministic_algorithms(run.train.deterministic):
            stack.enter_context(contextlib.redirect_stderr(lasting(sys.stderr)))
            stack.enter_context(stop)
            ranks = stack.enter_context(join_ranks())
            ranks.heartbeat.probes.stop_signal = lambda: stop.signal or ""
            stack.enter_context(MemoryGuard(stop, ranks, large_files(run)))
            yield stop, ranks
    except (StoppedEarlyError, OtherRankError) as error:
        # A launcher that starts failed ranks again would lose the stop.
        if error.exit_code == EXIT_STOPPED and is_launched():
            error.exit_code = EXIT_OK
            out = Path(run.output_dir)
            if is_run(out):
                write_stopped(out, stop.saved_step, what=f"stopped by a signal {stop.when()}")
        raise


def large_files(run: Run) -> list[Path]:
    """Files and folders that the run reads or writes: here, in the Hub's cache and in our own."""
    paths = [Path(run.output_dir), cache_folder("tokens"), cache_folder("models")]
    for key, name in inputs_of(run).items():
        if os.path.isabs(name):
            paths.append(Path(name))
        else:
            # A Hub id. The name of a template is no folder there.
            repo_type = "dataset" if key.startswith("data.") else "model"
            paths.append(repo_cache(name, repo_type))
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
    quiet: bool = False,
    build: Callable[..., Session] = build,
) -> Result:
    """One start within `joined`, on each rank; the arguments are those of `train`.

    Rank 0 logs what a user reads and writes the records. The other ranks log warnings alone, write
    nothing but checkpoints and records of their own, and take part in all else.

    Args:
        quiet: show no progress; who calls decides what becomes of the lines that are logged.
        build: makes the Session, as the function of that name does.
    """
    check_same_recipe(run, ranks)
    out = Path(run.output_dir)
    log_file = log_file_of_run(out / LOG)
    callback = RecordCallback(on_record)
    stop.wants_end = lambda: callback.has_ended
    with ExitStack() as stack:
        stack.enter_context(default_level(level_of_process(ranks.rank)))
        if ranks.is_main_process:
            stack.enter_context(log_file)
        else:
            # Its own disk may be full, and its cache damaged; all else rank 0 shows too.
            stack.enter_context(stderr_only_from("tunesmith.data"))
        # Claim the directory, and decide where to start.
        ranks, start = open_run_dir(run, ranks, stack, fresh=fresh)
        stop.request.saved_step = start.progress.step if start.progress else 0
        if ranks.is_run_dir_writer:
            stack.enter_context(noted_early_stop(out, stop.request))
            stop.request.on_exit = partial(note_early_stop, out, stop.request)
        if start.finished is not None:
            if ranks.is_main_process:
                warn_of_changed_rows(run)
            return Result.of_finished(out, start.finished)
        run = with_start_adapter(run, start, ranks)
        # Build; a fault up to the first step is one of the recipe, the data or the machine.
        with as_usage_error(ranks):
            session = build(run, start, why=why, ranks=ranks)
        with ranks.raise_on_all_ranks(), as_usage_error(ranks):
            stream = None
            if quiet:
                stream = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            sinks = sinks_of_rank(session, start, callback, log_file, stream)
            # Before they are opened: one that is refused leaves others open.
            stack.callback(close_after_all, sinks)
            write_first_files(session, start, sinks, argv)
        # Train; the writer ends with the stack, whatever ends the loop.
        trainer = Trainer(session, start, sinks, stop)
        stack.callback(trainer.checkpoints.writer.close)
        return fit(trainer, sinks, callback)


def fit(trainer: Trainer, sinks: Sinks, callback: RecordCallback) -> Result:
    """Train to the end, and leave in the run directory what ends it before."""
    ranks = trainer.ranks
    # On every rank: the one of each node that tells what ends them all leaves failure.json.
    ranks.heartbeat.report.on_fault = partial(write_fault, trainer.out)
    if ranks.is_main_process and ranks.world > 1:
        session, step = trainer.session, trainer.first_step
        shape = session.mesh.shape
        idle = session.loader(step).batch(step).idle_share if shape.data > 1 else 0.0
        hosts = ", ".join(dict.fromkeys(ranks.hosts))
        mesh = f"{shape.describe()}, {session.plan.why['mesh']}"
        log.info(f"{ranks.world} ranks on {hosts}: {mesh}; idle share of a step: {idle:.1%}")
    # From here on the loop answers signals.
    trainer.stop.request.defer_signals()
    with report_failure(trainer, callback) if ranks.is_main_process else defer_to_rank_0(trainer):
        result = trainer.fit()
        sinks.close()
    return result


def open_run_dir(
    run: Run,
    ranks: Ranks,
    stack: ExitStack,
    *,
    fresh: bool,
) -> tuple[Ranks, Start]:
    """Claim the run directory, move an earlier run aside if `fresh`, and decide where to start.

    A collective call. The directory is claimed until `stack` closes, on each node that does not see
    rank 0's too. Returns the ranks, which now know who leads which directory, and the start.
    """
    out = Path(run.output_dir)
    with ranks.raise_on_all_ranks():
        possible_shapes(run.parallel, ranks.world)
        if run.profile.enabled and run.profile.ranks != "all":
            highest = max(run.profile.ranks, default=0)
            if highest >= ranks.world:
                raise UsageError(
                    f"profile.ranks names rank {highest} of {count_of(ranks.world, 'rank')}",
                    where="profile.ranks",
                    fix="profile.ranks=[0], or profile.ranks=all",
                )
    # On the ranks that write a directory; others do not look at it before it is created: a network
    # file system remembers for a while what was not there.
    begins: list[Callable[[], None]] = []

    def claim() -> None:
        begins.append(stack.enter_context(claim_run_dir(out, inputs_of(run).values())))

    ranks = find_run_dir_writers(ranks, out, claim)
    other_leaders = sorted({*ranks.run_dir_writers} - {0})
    if other_leaders:
        names = ", ".join(ranks.name(rank) for rank in other_leaders)
        log.info(
            f"no shared disk: the nodes of {names} keep their own checkpoints; "
            f"records and final/ are with {ranks.name(0)}"
        )
    move_earlier_runs_aside(run, ranks, fresh=fresh)
    crash = find_previous_crash(out)
    if crash:
        log.warning(crash.text().removeprefix("error: "))
    with as_usage_error():
        start = decide_start(run, ranks)
    if ranks.is_run_dir_writer and start.finished is None:
        begin_to_write = begins[0]
        begin_to_write()
        stack.enter_context(note_running(out))
        ranks.heartbeat.report.on_fault = partial(write_fault, out)
    return ranks, start


def with_start_adapter(run: Run, start: Start, ranks: Ranks) -> Run:
    """The recipe with one folder of the run directory that `adapter.from` names, if it names one.

    That run may be trained further, and a resume has to find what this one began with. A collective
    call.
    """
    name = run.adapter.from_
    if name is None:
        return run
    folder = None
    with ranks.raise_on_all_ranks(), as_usage_error(ranks):
        if start.previous_run is not None:
            folder = folder_in_run(start.previous_run.adapter.from_, name)
        elif ranks.is_main_process and is_run_dir(name):
            adapter, note = adapter_of_run(Path(name))
            log.info(f"the adapter to continue is {note}")
            folder = adapter.name
    folder = ranks.broadcast_object(folder)
    if folder is None:
        return run
    # Nodes may have the run directory in different places.
    return replace(run, adapter=replace(run.adapter, from_=str(Path(name, folder))))


def move_earlier_runs_aside(
    run: Run,
    ranks: Ranks,
    *,
    fresh: bool,
) -> None:
    """Move each run directory aside if the user starts over, by its leading rank; collective."""
    place = None
    with ranks.raise_on_all_ranks():
        if ranks.is_run_dir_writer and (fresh or run.checkpoint.resume == "never"):
            place = move_aside(Path(run.output_dir), inputs_of(run).values())
    for rank, new_place in enumerate(ranks.all_gather_object(place)):
        if new_place:
            owner = f", of {ranks.name(rank)}" if rank else ""
            log.info(f"moved the existing run to {new_place}{owner}")


@contextlib.contextmanager
def as_usage_error(ranks: Ranks = ONE_PROCESS) -> Iterator[None]:
    """An error of rank 0 before the first step comes in time: nothing has begun.

    Such as a checkpoint that cannot be read. On the other `ranks` an error stays what it is.
    """
    try:
        yield
    except RunError as error:
        if not ranks.is_main_process:
            raise
        raise UsageError(error.what, where=error.where, why=error.why, fix=error.fix) from error


@contextlib.contextmanager
def noted_early_stop(out: Path, request: StopRequest) -> Iterator[None]:
    """Leave stopped.json where a signal ends the block before its first step, if there is a run."""
    try:
        yield
    except (Interrupted, StoppedEarlyError):
        note_early_stop(out, request)
        raise


def note_early_stop(out: Path, request: StopRequest) -> None:
    """Leave stopped.json if there is a run; a start that has saved nothing leaves nothing."""
    if (out / IDENTITY).is_file():
        write_stopped(out, request.saved_step, what=f"stopped {request.when()}")
    (out / RUNNING).unlink(missing_ok=True)


def write_fault(out: Path, fault: TunesmithError, step: int) -> None:
    """Leave in the run directory what ends all ranks: failure.json, or stopped.json for a stop."""
    if isinstance(fault, StoppedError):
        write_stopped(out, step, what=fault.what)
    else:
        write_failure(out, fault, last_step=step, next_command="")


@contextlib.contextmanager
def defer_to_rank_0(trainer: Trainer) -> Iterator[None]:
    """On another rank: leave to rank 0 what all ranks raise alike, to the heartbeat the rest."""
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
    trainer: Trainer,
    callback: RecordCallback,
) -> Iterator[None]:
    """On rank 0: leave failure.json in the run directory where the block fails."""
    try:
        yield
    except StoppedError:
        raise
    except BaseException as caught:
        heartbeat = trainer.ranks.heartbeat
        writer = trainer.checkpoints.writer
        step = trainer.progress.step
        error = heartbeat.share_error(caught, trainer.as_failure(caught))
        if isinstance(error, OtherRankError):  # the heartbeat has reported it
            raise error from caught
        writer.close()  # what it is writing still counts
        if trainer.stop.request.now:
            saved_step = writer.saved_step
            saved = f"step {saved_step} is saved" if saved_step else "no checkpoint was written yet"
            what = f"stopped after step {step}: {saved}"
            where = str(trainer.out / f"checkpoint-{saved_step}") if saved_step else ""
            write_stopped(trainer.out, step, what=what)
            raise StoppedError(what, where=where, fix=how_to_resume(saved_step)) from error
        failure = trainer.as_failure(error)
        resume = how_to_resume(writer.saved_step)
        place = heartbeat.peers.place_of(trainer.ranks.rank)
        if isinstance(caught, CheckpointError):
            # It was written in a thread, beside whatever the loop does when it learns of it.
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


def sinks_of_rank(
    session: Session,
    start: Start,
    callback: RecordCallback,
    log_file: LogFile,
    stream: TextIO | None,
) -> Sinks:
    """The sinks of this rank: of rank 0 those that the recipe asks for, and the caller's."""
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
    """The sinks that a recipe asks for: the terminal first, and metrics.jsonl before those that may
    be slow.
    """
    sinks: list[Sink] = [terminal, JsonlSink(folder / METRICS), SamplesSink(folder / SAMPLES)]
    if writes_tensorboard(run):
        shared_folder = run.log.tensorboard_dir
        events = Path(shared_folder or folder / "tensorboard")
        sinks.append(TensorBoardSink(events, shared=shared_folder is not None))
    for name in trackers_of(run):
        sinks.append(TrackerSink(name, folder, partial(terminal.text, "tracker")))
    return Sinks(sinks)


def write_first_files(session: Session, start: Start, sinks: Sinks, argv: list[str] | None) -> None:
    """Open the sinks and write the first files of a start, now that nothing is left to check."""
    out = Path(session.run.output_dir)
    ranks = session.ranks
    if ranks.is_run_dir_writer:
        remove_leftovers(out)
    last_step = start.progress.step if start.progress else 0
    if start.progress and not start.progress.validated:
        # The record of a step whose validation was cut off is written again, with it.
        last_step -= 1
    sinks.open(session.run, last_step)
    if ranks.is_run_dir_writer:
        # Only rank 0 has a command line to tell.
        write_identity(session, argv if ranks.is_main_process else None)
        for name in (FAILURE, STOPPED):
            (out / name).unlink(missing_ok=True)


def close_after_all(sinks: Sinks) -> None:
    """Close what is still open when a run leaves early; a fault in that must not hide why."""
    with contextlib.suppress(OSError):
        sinks.close()
