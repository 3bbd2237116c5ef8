"""Fine-tune a model on your rows or from a recipe, or resume a run.

example:
  # detect the row format and write a recipe
  tunesmith train --model HuggingFaceTB/SmolLM2-135M-Instruct --data faq.csv
  tunesmith train smollm2-135m-lora \\
    data.train.source=rows.jsonl data.train.format=alpaca
  tunesmith train my-recipe.yaml train.duration='2 epochs'  # resume a run
  tunesmith train my-recipe.yaml --fresh  # move an earlier run aside

ctrl-C (or SIGTERM, SIGHUP, SIGUSR1) saves after the current step and exits
with 75; the same command resumes. A second ctrl-C stops immediately; the
same command then resumes from the newest checkpoint.
"""

import argparse
import json
import logging
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.checkpoint.claim import claim_run_dir
from tunesmith.cli.options import add_json, is_main_process, leave_lines_to_rank_0
from tunesmith.cli.recipe_options import add_recipe, chosen_recipe
from tunesmith.config.paths import inputs_of
from tunesmith.distributed.ranks import is_launched, reported_once_a_node
from tunesmith.host.signals import STOP_PATIENCE_SECONDS, StopRequest, loading_libraries
from tunesmith.host.streams import show, survive_write_errors
from tunesmith.metrics.log_file import LogFile
from tunesmith.presentation.summary import closing_summary
from tunesmith.start.scorer_names import check_scorers

if TYPE_CHECKING:
    from tunesmith.config.schema import Run
    from tunesmith.start.make_recipe import NewRecipe
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
    parser.add_argument(
        "--why", action="store_true", help="explain each value that was chosen for this machine"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    start = time.monotonic()
    leave_lines_to_rank_0()
    log_file = LogFile()
    # Collect log lines in memory until the run opens log.txt and writes them to it.
    with log_file:
        with StopRequest() as early:
            if is_launched():
                # Record signals without raising an exception. If this rank waits for another rank,
                # the launcher stops it.
                early.defer_signals(announce=False)
            elif StopRequest.is_of_command:
                early.patience = STOP_PATIENCE_SECONDS
            with reported_once_a_node():
                recipe, new_recipe = chosen_recipe(args, on_draft=_check_output_dir)
                # Check the names first, because the imports below take a second.
                check_scorers(recipe)
                if new_recipe is not None:
                    new_recipe.check_file()
            if new_recipe is not None:
                name = new_recipe.name
                log.info(f"recipe: {name} (edit it and run: tunesmith train {name})")
            if early.requested():
                raise early.not_begun()
            with loading_libraries():
                from tunesmith.start.run import StartOptions, train_run

        options = StartOptions(fresh=args.fresh, why=args.why, argv=sys.argv)
        if new_recipe is not None:
            options = replace(options, known=new_recipe.facts, on_begin=new_recipe.write_file)
        result = train_run(recipe, options)
        if is_main_process():
            wall_seconds = None if result.finished_before else time.monotonic() - start
            _show_result(args, recipe, new_recipe, result, log_file, wall_seconds)


def _check_output_dir(recipe: "Run") -> None:
    """Check that a run can write to its output directory.

    Ranks that a launcher started do not check it, because only one of them may lock the directory.
    """
    if not is_launched():
        with claim_run_dir(Path(recipe.output_dir), inputs_of(recipe).values()):
            pass


def _show_result(
    args: argparse.Namespace,
    recipe: "Run",
    new_recipe: "NewRecipe | None",
    result: "Result",
    log_file: LogFile,
    wall_seconds: float | None,
) -> None:
    """Print the result of the run on stdout and in its log."""
    # Ignore write errors on stdout, because a closed pipe must not make a successful run fail.
    sys.stdout = survive_write_errors(sys.stdout)
    with StopRequest() as late:
        late.defer_signals(announce=False)
        if args.json:
            print(json.dumps(result.values()))
            return
        text = closing_summary(
            recipe,
            steps=result.steps,
            seconds=result.seconds,
            took=wall_seconds,
            finished_before=result.finished_before,
        )
        show(text, sys.stdout)
        if not result.finished_before:
            if new_recipe is not None:
                new_recipe.write_file()
            with suppress(OSError):
                log_file.open()
                log_file.write(text)
