"""Train a recipe on the GPUs of this machine, one rank per GPU.

example:
  tunesmith launch local my-recipe.yaml
  # keeps running when the terminal is closed
  tunesmith launch local my-recipe.yaml --detach train.duration='2 h'
  tunesmith logs -f runs/my-run
  tunesmith stop runs/my-run  # saves; the same launch resumes

Without GPUs the run has one process, or the number of --ranks. Signals and exit
codes are those of `train`: ctrl-C saves after the current step and exits with
75.
"""

import argparse
import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.checkpoint.claim import claim_run_dir
from tunesmith.cli.options import whole_number
from tunesmith.cli.recipe_options import add_recipe, chosen_recipe
from tunesmith.config.paths import inputs_of
from tunesmith.errors import CheckpointError
from tunesmith.launch import node
from tunesmith.launch.job import Job
from tunesmith.launch.jobs import agent_words, check_free, write_recipe
from tunesmith.tools.launch import local
from tunesmith.units import count_of

if TYPE_CHECKING:
    from tunesmith.config.schema import Run

LOADS_TORCH = "in ranks"

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_launched(parser)
    parser.add_argument(
        "--ranks",
        type=whole_number,
        metavar="N",
        help="number of processes (default: one per GPU, or one if there is no GPU)",
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="K",
        help="maximum number of restarts of failed ranks (default: 0)",
    )
    parser.add_argument(
        "--detach",
        action="store_true",
        help="run in the background, even after the terminal is closed",
    )


def add_launched(parser: argparse.ArgumentParser) -> None:
    """Add the options that all launch commands share.

    The options are the recipe, or a model and data for a new recipe, and --debug.
    """
    add_recipe(parser)
    parser.add_argument(
        "--debug",
        action="store_true",
        help="write tracebacks and NCCL's debug output of every node to the log",
    )


def launched_recipe(args: argparse.Namespace, *, ranks: int = 1) -> "Run":
    """Read the recipe that the options of `add_launched` name, or create a new recipe.

    A new recipe is written to a file, and `args` is changed to name this file. The file is needed
    because the user may have to run other commands before the launch, such as `fetch`, which take a
    recipe file.

    Args:
        ranks: the number of ranks, for `make_recipe`.
    """
    recipe, new_recipe = chosen_recipe(args, ranks=ranks)
    if new_recipe is not None:
        new_recipe.check_file()
        new_recipe.write_file()
        log.info(f"recipe: {new_recipe.name}")
        args.recipe, args.overrides = str(new_recipe.path), []
    return recipe


def is_finished(recipe: "Run", launched: str) -> bool:
    """Return whether the run has already finished. If so, print a message.

    Also check the run directory, and raise its errors before the start, because the user would not
    see the errors of a run in the background.

    Args:
        launched: the verb for the message, such as "started" or "submitted".
    """
    from tunesmith.checkpoint.resume import finished_step
    from tunesmith.start.inputs import check_inputs
    from tunesmith.training.result import warn_of_changed_rows

    out = Path(recipe.output_dir)
    finished = None
    with claim_run_dir(out, inputs_of(recipe).values()):
        if recipe.checkpoint.resume != "never":
            # Ignore damaged checkpoints, because the start of the run reports them.
            with suppress(CheckpointError):
                finished = finished_step(recipe)
    if finished is None:
        check_inputs(recipe)
        return False
    warn_of_changed_rows(recipe)
    again = (
        "to continue, set a longer train.duration; to start over, set output_dir=runs/another-name"
    )
    print(f"not {launched}: the run has finished all {count_of(finished, 'step')}; {again}")
    return True


def announce(job: "Job", doing: str) -> None:
    """Print the name of a launched job, and the commands to follow its log and to stop it.

    Args:
        doing: what the job does, such as "trains in the background".
    """
    log = f"to follow the log: tunesmith logs -f {job.name}"
    print(f"{job.name} {doing}; {log}; to stop the run: tunesmith stop {job.name}")


def run(args: argparse.Namespace) -> int:
    recipe = launched_recipe(args, ranks=args.ranks or node.count_gpus() or 1)
    if args.detach:
        check_free(recipe.output_dir)
        if is_finished(recipe, "started"):
            return 0
    ranks = {"ranks": args.ranks} if args.ranks else {}
    words = agent_words(write_recipe(recipe), debug=args.debug, restarts=args.restarts, **ranks)
    if not args.detach:
        return node.run_agent(words[2:])
    announce(local.detach(recipe, words), "trains in the background")
    return 0
