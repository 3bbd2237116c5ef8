"""Fine-tune a model on your rows or from a recipe, or resume a run.

example:
  # detects the row format and writes a recipe
  tunesmith train --model HuggingFaceTB/SmolLM2-135M-Instruct --data faq.csv
  tunesmith train smollm2-135m-lora \\
    data.train.source=rows.jsonl data.train.format=alpaca
  tunesmith train my-recipe.yaml train.duration='2 epochs'  # resumes a run
  tunesmith train my-recipe.yaml --fresh  # moves an earlier run aside

ctrl-C (or SIGTERM, SIGHUP, SIGUSR1) saves after the current step and exits
with 75; the same command resumes. A second ctrl-C stops at once; the same
command then resumes from the newest checkpoint.
"""

import argparse
import json
import logging
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from tunesmith.cli.options import add_json, is_main_process, leave_lines_to_rank_0
from tunesmith.cli.recipe_options import add_recipe, chosen_recipe
from tunesmith.distributed.ranks import is_launched, reported_once_a_node
from tunesmith.host.signals import STOP_PATIENCE_SECONDS, StopRequest
from tunesmith.host.streams import lasting, show
from tunesmith.metrics.log_file import LogFile
from tunesmith.metrics.summary import closing_summary

if TYPE_CHECKING:
    from tunesmith.config.schema import Run
    from tunesmith.training.early_checks import RowsLook
    from tunesmith.training.make_recipe import NewRecipe
    from tunesmith.training.result import Result

LOADS_TORCH = "here"

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="move an existing run in output_dir aside and start over",
    )
    parser.add_argument("--why", action="store_true", help="explain each choice for this machine")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    began = time.monotonic()
    leave_lines_to_rank_0()
    log_file = LogFile()
    # The run opens it, with the lines of before it at its beginning.
    with log_file.attached():
        with StopRequest() as early:
            recipe, new_file, result = _read_recipe(args, early)
            if result is None:
                with early.loading_libraries():
                    from tunesmith.training.run import train
            if early.requested():
                raise early.not_begun()

        def write_recipe(record: object) -> None:
            """Write the recipe's file: a start that is refused leaves none."""
            if new_file is not None:
                new_file.write_file()

        if result is None:
            result = train(
                recipe, fresh=args.fresh, why=args.why, argv=sys.argv, on_record=write_recipe
            )
        if is_main_process():
            took = None if result.finished_before else time.monotonic() - began
            _show_result(args, recipe, new_file, result, log_file, took)
    log_file.close()


def _check_start(recipe: "Run", *, resumes: bool) -> "Result | None":
    """Check what files alone can tell of a start; the Result where the run is finished."""
    # Ranks check it together, when they have joined.
    if is_launched():
        return None
    from tunesmith.training.early_checks import check_start

    return check_start(recipe, resumes=resumes)


def _read_recipe(
    args: argparse.Namespace, early: StopRequest
) -> "tuple[Run, NewRecipe | None, Result | None]":
    """The recipe of the command line, the file that a new one is written to, and the Result of a
    run that is finished.

    What files alone can tell is told before torch is imported.
    """
    result: Result | None = None

    def on_look(look: "RowsLook") -> None:
        """Check what is known of the recipe, and load the libraries that make the rest."""
        _check_start(look.draft, resumes=False)
        with early.loading_libraries():
            import tunesmith.training.make_recipe  # noqa: F401  `chosen_recipe` takes it

    if is_launched():
        # A rank that waits for the report of another one is stopped by its launcher.
        early.defer_signals(announce=False)
    elif StopRequest.is_of_command:
        early.patience = STOP_PATIENCE_SECONDS
    with reported_once_a_node():
        recipe, new_file = chosen_recipe(args, on_look=on_look)
        if new_file is not None:
            new_file.check_file()
        else:
            resumes = not args.fresh and recipe.checkpoint.resume != "never"
            result = _check_start(recipe, resumes=resumes)
    if new_file is not None:
        name = new_file.name
        log.info(f"recipe: {name} (to change it, edit it and run: tunesmith train {name})")
    return recipe, new_file, result


def _show_result(
    args: argparse.Namespace,
    recipe: "Run",
    new_file: "NewRecipe | None",
    result: "Result",
    log_file: LogFile,
    took: float | None,
) -> None:
    """Show what the run came to, on stdout and in its log."""
    # The run has ended well, whether or not someone reads this.
    sys.stdout = lasting(sys.stdout)
    with StopRequest() as late:
        late.defer_signals(announce=False)
        if args.json:
            print(json.dumps(result.values()))
            return
        text = closing_summary(
            recipe,
            steps=result.steps,
            seconds=result.seconds,
            took=took,
            finished_before=result.finished_before,
        )
        show(text, sys.stdout)
        if not result.finished_before:
            if new_file is not None:
                new_file.write_file()
            with suppress(OSError):
                log_file.open()
                log_file.write(text)
