"""One start of a run on every rank: join the ranks, open the run directory, read the inputs, build
the Session, and train.

One process imports torch after the inputs are read. A rank of several imports it to join the
others.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.checkpoint.resume import Start
from tunesmith.config.layers import Overrides, override_layer
from tunesmith.config.load import load_recipe
from tunesmith.config.paths import inputs_of
from tunesmith.config.row_settings import rows_set_by
from tunesmith.config.schema import Run
from tunesmith.distributed.ranks import (
    STOP_NOTE,
    Ranks,
    as_usage_error,
    is_launched,
    join_ranks,
    require_one_process,
    started_as,
    stopped_code,
)
from tunesmith.errors import (
    EXIT_STOPPED,
    OtherRankError,
    StoppedEarlyError,
    UsageError,
)
from tunesmith.host import packages
from tunesmith.host.files import cache_folder
from tunesmith.host.logger import default_level, lines_by_default, log_lines, stderr_only_from
from tunesmith.host.signals import (
    STOP_PATIENCE_SECONDS,
    Interrupted,
    StopRequest,
    loading_libraries,
)
from tunesmith.host.streams import survive_write_errors
from tunesmith.metrics.log_file import log_file_of_run
from tunesmith.metrics.record import StepRecord
from tunesmith.metrics.sink import RecordCallback, Sinks
from tunesmith.presentation.output import adapter_lines, moved_lines, writers_lines
from tunesmith.run_dir import LOG
from tunesmith.runtime.determinism import deterministic_algorithms
from tunesmith.runtime.memory_guard import MemoryGuard
from tunesmith.start.agree import check_same_recipe
from tunesmith.start.draft import short_name
from tunesmith.start.inputs import read_inputs
from tunesmith.start.output import begin_run, find_start, open_output, with_start_adapter
from tunesmith.start.request import Request
from tunesmith.training.failures import (
    defer_to_rank_0,
    record_early_stop,
    report_failure,
    write_fault,
)
from tunesmith.training.program_rows import keep_rows
from tunesmith.training.result import Result, warn_of_changed_rows
from tunesmith.training.run_sinks import close_after_all, sinks_of_rank, write_first_files
from tunesmith.training.stop_control import StopControl

if TYPE_CHECKING:
    from tunesmith.start.make_recipe import NewRecipe
    from tunesmith.start.model import ModelFacts
    from tunesmith.training.session import Session
    from tunesmith.training.trainer import Trainer

log = logging.getLogger(__name__)


def train(
    recipe: Run | str | Path | None = None,
    overrides: Overrides = (),
    *,
    model: str | None = None,
    rows: object = None,
    on_record: Callable[[StepRecord], object] | None = None,
    fresh: bool = False,
    why: bool = False,
    argv: list[str] | None = None,
    quiet: bool = False,
    trust_remote_code: bool = False,
) -> Result:
    """Train a model with a recipe, or resume the training.

    >>> rows = {"source": "rows.jsonl", "format": "alpaca"}
    >>> tunesmith.train("smollm2-135m-lora", {"data.train": rows})
    >>> tunesmith.train("my-recipe.yaml", {"train.learning_rate": 2e-4}, on_record=print)
    >>> rows = [{"prompt": "Hello", "completion": "Hi"}]
    >>> tunesmith.train(model="HuggingFaceTB/SmolLM2-135M-Instruct", rows=rows)

    Args:
        recipe: the file of a recipe, the name of a shipped recipe, or a checked `Run`. If None, a
            recipe is made for `model` and `rows`, as with `tunesmith train --model X --data FILE`.
        overrides: values that replace those of the recipe: `{"key.sub": value}`, or one or several
            texts `key.sub=value` with values in YAML.
        model: Hub id, folder, or `demo`.
        rows: mappings, or a `datasets.Dataset`. They are stored in the run directory, so that the
            same call resumes the run.
        on_record: function that is called with the record of each step. If it raises StopIteration,
            the run ends as if this were its last step. On a GPU or with several ranks, one more
            step may run before the end. `signal.raise_signal(signal.SIGINT)` saves and stops the
            run. Other exceptions are reported in failure.json and raised unchanged.
        fresh: whether to start a new run. An earlier run in `output_dir` is then moved to another
            folder.
        why: whether to log the reason of each choice for this machine.
        argv: the command line, for env.json.
        trust_remote_code: run code of another person's recipe or model, which you have reviewed.
        quiet: whether to print nothing. log.txt still contains all lines.

    Before the first step, rank 0 logs all choices to `logging.getLogger("tunesmith")`. The lines
    are printed on stderr, unless this logger has a handler or logging is configured for INFO.

    Raises:
        UsageError: the recipe, data, model or machine is wrong. Nothing was started.
        RunError: the run began and failed. failure.json contains the reason.
        StoppedError: the run received a signal, Ctrl-C or the stop button of a notebook. Everything
            is saved.
    """
    with ExitStack() as stack:
        known = None
        stack.enter_context(lines_by_default(level_of_process()))
        if quiet:
            stack.enter_context(stderr_only_from())
        if not isinstance(recipe, Run):
            stack.enter_context(rows_set_by(option=recipe is None, python=True))
        if recipe is None:
            new = recipe_for_rows(model, rows, overrides)
            run = new.run
            known = new.facts
        elif model is not None or rows is not None:
            fix = "remove model and rows, and set model.name and data.train.source in overrides"
            raise UsageError(
                "train() accepts either a recipe, or model and rows, but not both", fix=fix
            )
        elif not isinstance(recipe, Run):
            run = load_recipe(recipe, overrides, announce=not quiet, trusts_code=trust_remote_code)
        elif overrides:
            fix = "pass the path of the recipe, or change the Run with dataclasses.replace"
            raise UsageError("overrides cannot be applied to a Run object", fix=fix)
        else:
            run = recipe
        options = StartOptions(
            on_record=on_record or (lambda record: None),
            fresh=fresh,
            why=why,
            argv=argv,
            quiet=quiet,
            known=known,
        )
        return train_run(run, options)


@dataclass(frozen=True)
class StartOptions:
    """Options of one start. See `train` for the fields that are arguments of it.

    Attributes:
        known: facts that were found when the recipe was created, see `read_inputs`.
        on_begin: function that rank 0 calls before the first step, after all checks.
        build_session: function that builds the Session of (run, start, ranks) from a base model and
            rows that are already loaded. If None, inputs and model are read.
    """

    on_record: Callable[[StepRecord], object] = lambda record: None
    fresh: bool = False
    why: bool = False
    argv: list[str] | None = None
    quiet: bool = False
    known: "ModelFacts | None" = None
    on_begin: Callable[[], object] = lambda: None
    build_session: "Callable[[Run, Start, Ranks], Session] | None" = None


def train_run(run: Run, options: StartOptions) -> Result:
    """Start or resume the run of a recipe in this process."""
    packages.check_versions()
    if started_as() is None:
        require_one_process("train")
    with lines_by_default(level_of_process()), joined(run) as (request, ranks):
        # Until the first step has ended, there is nothing to save.
        request.nothing_to_save = True
        return start_run(run, StopControl(request, Path(run.output_dir), ranks), ranks, options)


def recipe_for_rows(model: str | None, rows: object, overrides: Overrides) -> "NewRecipe":
    """Make a recipe for a model and rows that a program passes. Write the rows to output_dir."""
    if model is None or rows is None:
        raise UsageError(
            "train needs either a recipe, or model and rows",
            fix='call train("my-recipe.yaml"), or train(model="...", rows=[...])',
        )
    # These import huggingface_hub, which is slow.
    from tunesmith.start.draft import draft_lines, draft_recipe
    from tunesmith.start.make_recipe import make_recipe

    options = override_layer(overrides).values
    # Set the default here. `make_recipe` would derive it from the name of the file with the rows.
    options.setdefault("output_dir", f"runs/rows-{short_name(model)}")
    file = str(keep_rows(rows, Path(options["output_dir"])))
    draft = draft_recipe(model, file, options)
    log_lines(draft_lines(draft))
    return make_recipe(model, file, options, draft=draft)


def level_of_process(rank: int | None = None) -> int:
    """Return the log level of a rank. Only rank 0 logs INFO lines, because these are the same on
    all ranks.
    """
    if rank is None:
        rank = (started_as() or {"RANK": 0})["RANK"]
    return logging.INFO if rank == 0 else logging.WARNING


@contextlib.contextmanager
def joined(run: Run) -> Iterator[tuple[StopRequest, Ranks]]:
    """Return a context that sets up the process before one or several runs are started in it.

    Inside the context, signals are handled, the memory is watched, and this process is connected to
    the other ranks.
    """
    stop = StopRequest()
    # `patience` ends the process if it does not stop soon after a signal. Do not set it under a
    # launcher, because other ranks would take this exit for a crash.
    if StopRequest.is_of_command and not is_launched():
        stop.patience = STOP_PATIENCE_SECONDS
    has_joined = False
    try:
        with ExitStack() as stack, deterministic_algorithms(run.train.deterministic):
            stack.enter_context(contextlib.redirect_stderr(survive_write_errors(sys.stderr)))
            stack.enter_context(stop)
            ranks = stack.enter_context(join_ranks())
            has_joined = True
            ranks.heartbeat.probes.stop_signal = lambda: stop.signal or ""
            stop.tell_ranks = lambda: ranks.heartbeat.share_error(Interrupted())
            stack.enter_context(MemoryGuard(stop, ranks, partial(large_files, run)))
            yield stop, ranks
    except (StoppedEarlyError, OtherRankError) as error:
        # Before the ranks have joined, the agent must end the other ranks, which wait for this one.
        if error.exit_code == EXIT_STOPPED and (has_joined or STOP_NOTE not in os.environ):
            error.exit_code = stopped_code()
        raise


def large_files(run: Run) -> list[Path]:
    """Return the files and folders that the run reads or writes, including the caches."""
    from tunesmith.hub.fetch import repo_cache  # imports huggingface_hub, which is slow

    paths = [Path(run.output_dir), cache_folder("tokens"), cache_folder("models")]
    for key, name in inputs_of(run).items():
        if os.path.isabs(name):
            paths.append(Path(name))
        else:
            # `name` can be a Hub id, but also the name of a chat template. A template does no harm,
            # because the cache has no folder with its name.
            repo_type = "dataset" if key.startswith("data.") else "model"
            paths.append(repo_cache(name, repo_type))
    return paths


def start_run(run: Run, stop: StopControl, ranks: Ranks, options: StartOptions) -> Result:
    """Start a run on this rank. Call this inside the context `joined`.

    Rank 0 logs the lines for the user and writes the records. The other ranks log only warnings,
    and write only checkpoints and their own records.
    """
    check_same_recipe(run, ranks)
    out = Path(run.output_dir)
    log_file = log_file_of_run(out / LOG)
    callback = RecordCallback(options.on_record)
    stop.wants_end = lambda: callback.has_ended
    with ExitStack() as stack:
        stack.enter_context(default_level(level_of_process(ranks.rank)))
        # Rank 0 also writes log.txt. The other ranks show only warnings about data, because these
        # can differ between ranks that use different disks and caches.
        is_main = ranks.is_main_process
        stack.enter_context(
            log_file if is_main else stderr_only_from("tunesmith.rows", "tunesmith.tokens")
        )
        # An error before the first step has its cause in the recipe, the data or the machine, so
        # raise it as UsageError.
        with as_usage_error(ranks):
            output = stack.enter_context(open_output(run, ranks, fresh=options.fresh))
            log_lines(writers_lines(output.ranks))
            if output.crash is not None:
                log.warning(output.crash.text().removeprefix("error: "))
            start = find_start(output)
            step = start.progress.step if start.progress else None
            stop.request.saved_step = lambda: step
            if output.claim is not None:
                stack.enter_context(record_early_stop(out, stop.request, output.claim))
            if start.finished is not None:
                if ranks.is_main_process:
                    warn_of_changed_rows(run)
                return Result.from_finished_run(out, start.finished)
            run, adapter_note = with_start_adapter(run, start, output.ranks)
            log_lines(adapter_lines(adapter_note))
            if options.build_session is not None:
                build_session = partial(options.build_session, run, start)
            else:
                tokens = read_inputs(Request(run, start), output.ranks, options.known)
                # Import this after the rows are checked: it imports huggingface_hub, which is slow.
                with loading_libraries():
                    from tunesmith.start.build import build_from_tokens

                build_session = partial(build_from_tokens, tokens, why=options.why)
            log_lines(moved_lines(begin_run(run, output, stack), ranks))
            # Set this on every rank, because one rank per node writes failure.json.
            ranks.heartbeat.report.on_fault = partial(write_fault, out, stop.request)
            session = build_session(output.ranks)
            with ranks.raise_on_all_ranks(), as_usage_error(ranks):
                stream = None
                if options.quiet:
                    stream = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                sinks = sinks_of_rank(session, start, callback, log_file, stream)
                # Register this before the sinks are opened, so that if one sink fails to open, the
                # others are closed.
                stack.callback(close_after_all, sinks)
                write_first_files(session, start, sinks, options.argv)
                if ranks.is_main_process:
                    options.on_begin()
        with loading_libraries():
            from tunesmith.training.trainer import Trainer

        # The exit stack closes the writer even if the training loop raises an error.
        trainer = Trainer(session, start, sinks, stop)
        stack.callback(trainer.checkpoints.writer.close)
        return train_to_end(trainer, sinks, callback)


def train_to_end(trainer: "Trainer", sinks: Sinks, callback: RecordCallback) -> Result:
    """Train to the end. If the run fails or stops earlier, record this in the run directory."""
    ranks = trainer.ranks
    if ranks.is_main_process and ranks.world > 1:
        from tunesmith.start.lines import ranks_line  # imports torch

        session = trainer.session
        idle_share = 0.0
        if session.mesh.shape.data > 1:
            step = trainer.first_step
            idle_share = session.loader(step).batch(step).idle_share
        log.info(ranks_line(ranks, session.mesh.shape, session.plan, idle_share))
    # From here on, the training loop checks for signals between steps, so signals no longer raise
    # an exception.
    trainer.stop.request.defer_signals()
    if ranks.is_main_process:
        failures = report_failure(trainer, callback)
    else:
        failures = defer_to_rank_0(trainer)
    with failures:
        result = trainer.fit()
        sinks.close()
    return result
