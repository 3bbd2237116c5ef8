"""Train a recipe on the GPUs of this machine, one rank per GPU.

example:
  tunesmith launch local my-recipe.yaml
  # keeps running when the terminal is closed
  tunesmith launch local my-recipe.yaml --detach train.duration='2 h'
  tunesmith logs -f runs/my-run
  tunesmith stop runs/my-run  # saves; the same launch resumes

Without GPUs it trains in one process, or in --ranks processes. Signals and exit
codes are those of `train`: ctrl-C saves after the current step and exits with
75.
"""

import argparse
import logging
from typing import TYPE_CHECKING

from tunesmith.cli.options import whole_number
from tunesmith.cli.recipe_options import add_recipe, chosen_recipe
from tunesmith.launch import node
from tunesmith.launch.jobs import Job, agent_words, check_free, write_recipe
from tunesmith.tools.launch import local
from tunesmith.units import count_of

if TYPE_CHECKING:
    from tunesmith.config.schema import Run

LOADS_TORCH = "in ranks"

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_launched(parser)
    parser.add_argument(
        "--ranks", type=whole_number, metavar="N", help="processes (default: one per GPU, or one)"
    )
    again = "restart failed ranks at most K times"
    parser.add_argument("--restarts", type=int, default=0, metavar="K", help=again)
    parser.add_argument(
        "--detach",
        action="store_true",
        help="run in the background; keeps running when the terminal is closed",
    )


def add_launched(parser: argparse.ArgumentParser) -> None:
    """The recipe that a launcher takes, or a model and rows for a new one."""
    add_recipe(parser)
    debug = "tracebacks, and what NCCL does on every node, in the log"
    parser.add_argument("--debug", action="store_true", help=debug)


def launched_recipe(args: argparse.Namespace, *, ranks: int = 1) -> "Run":
    """Read the recipe that the words of `add_launched` name; `ranks` as for `make_recipe`.

    The file of a new recipe is written, and `args` then name it: what is left to do
    before a launch, such as a fetch, takes a recipe.
    """
    recipe, new_file = chosen_recipe(args, ranks=ranks)
    if new_file is not None:
        new_file.check_file()
        new_file.write_file()
        log.info(f"recipe: {new_file.name}")
        args.recipe, args.overrides = str(new_file.path), []
        args.model = args.data = args.split = args.format = None
        args.columns = []
    return recipe


def is_finished(recipe: "Run", launched: str) -> bool:
    """Tell whether the run has finished, which is printed: it is not `launched`.

    Raises what its start would, as far as its files tell: in the background nobody would see it.
    """
    from tunesmith.training.early_checks import check_start

    resumes = recipe.checkpoint.resume != "never"
    finished = check_start(recipe, resumes=resumes)
    if finished is None:
        return False
    again = "continue: a longer train.duration; start over: output_dir=runs/another-name"
    print(f"not {launched}: the run has finished all {count_of(finished.steps, 'step')}; {again}")
    return True


def announce(job: "Job", doing: str) -> None:
    """Print how to follow and stop what was launched."""
    log = f"its log: tunesmith logs -f {job.name}"
    print(f"{job.name} {doing}; {log}; to stop it: tunesmith stop {job.name}")


def run(args: argparse.Namespace) -> int:
    recipe = launched_recipe(args, ranks=args.ranks or node.count_gpus() or 1)
    if args.detach:
        check_free(recipe.output_dir)
        if is_finished(recipe, "started"):
            return 0
    flags = {"ranks": args.ranks or "auto", "restarts": args.restarts}
    words = agent_words(write_recipe(recipe), debug=args.debug, **flags)
    if not args.detach:
        return node.run_agent(words[2:])
    announce(local.detach(recipe, words), "trains in the background")
    return 0
