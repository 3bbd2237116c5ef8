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
from contextlib import suppress
from typing import TYPE_CHECKING

from tunesmith.cli.options import (
    add_json,
    add_recipe,
    chosen_recipe,
    is_main_process,
    leave_lines_to_rank_0,
)
from tunesmith.distributed.ranks import reported_once_a_node
from tunesmith.host.signals import StopRequest
from tunesmith.host.streams import lasting, show
from tunesmith.metrics.log_file import LogFile

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunesmith.config.schema import Run
    from tunesmith.training.make_recipe import NewRecipe
    from tunesmith.training.result import Result

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
    leave_lines_to_rank_0()
    log_file = LogFile()
    # The run opens it, with the lines of before it at its beginning.
    with log_file.attached():
        if args.model is not None:
            # A new recipe renders rows: with the libraries there, a signal ends that at once.
            _load_trainer()
        with StopRequest():
            recipe, new_file = _read_recipe(args)
        train = _load_trainer()

        def write_recipe(record: object) -> None:
            """Write the recipe's file: a start that is refused leaves none."""
            if new_file is not None:
                new_file.write_file()

        result = train(
            recipe, fresh=args.fresh, why=args.why, argv=sys.argv, on_record=write_recipe
        )
        if is_main_process():
            _show_result(args, recipe, new_file, result, log_file)
    log_file.close()


def _load_trainer() -> "Callable[..., Result]":
    """`train`, once the libraries are loaded; StoppedError where a signal came meanwhile."""
    with StopRequest() as early:
        # They load for seconds, and an exception inside torch's C++ code would abort.
        early.doing = "the libraries are loaded"
        early.defer_signals()
        from tunesmith.training.run import train

        if early.requested():
            raise early.not_begun()
    return train


def _read_recipe(args: argparse.Namespace) -> "tuple[Run, NewRecipe | None]":
    """The recipe of the command line, and the file that a new one is written to."""
    with reported_once_a_node():
        recipe, new_file = chosen_recipe(args)
        if new_file is not None:
            new_file.check_file()
    if new_file is not None:
        name = new_file.name
        log.info(f"recipe: {name} (to change it, edit it and run: tunesmith train {name})")
    return recipe, new_file


def _show_result(
    args: argparse.Namespace,
    recipe: "Run",
    new_file: "NewRecipe | None",
    result: "Result",
    log_file: LogFile,
) -> None:
    """What the run came to, on stdout and in its log."""
    from tunesmith.metrics.summary import closing_summary

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
            finished_before=result.finished_before,
        )
        show(text, sys.stdout)
        if not result.finished_before:
            if new_file is not None:
                new_file.write_file()
            with suppress(OSError):
                log_file.open()
                log_file.write(text)
