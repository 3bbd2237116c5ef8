"""Train a recipe on the GPUs of this machine, one rank each; without GPUs in one process, or as many as --ranks says.

examples:
  tunesmith launch local my-recipe.yaml
  tunesmith launch local my-recipe.yaml --detach train.duration='2 h'     # goes on when the terminal is closed
  tunesmith logs -f runs/my-run
  tunesmith stop runs/my-run                                               # saves; the same launch goes on from there

Signals and exit codes are those of `train`: ctrl-C saves after the present step and exits with 75.
"""

import argparse
import sys
from functools import partial

from tunesmith.cli.options import whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_launched(parser)
    parser.add_argument("--ranks", type=whole_number, metavar="N", help="processes (default: one a GPU, else one)")
    parser.add_argument(
        "--restarts", type=int, default=0, metavar="K", help="start failed ranks again, at most K times"
    )
    parser.add_argument("--detach", action="store_true", help="in the background, beyond the end of this terminal")


def add_launched(parser: argparse.ArgumentParser) -> None:
    """The recipe that a launcher takes."""
    recipe = "a recipe file, or the name of one that ships (see `tunesmith recipes`)"
    parser.add_argument("recipe", metavar="RECIPE", help=recipe)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys that win over the file's")
    debug = "collect what ranks and NCCL say on every node in launch/debug.tar.gz of the run directory"
    parser.add_argument("--debug", action="store_true", help=debug)


def run(args: argparse.Namespace) -> int:
    from tunesmith.config.load import load_recipe
    from tunesmith.launch import local, node

    recipe = load_recipe(args.recipe, args.overrides, say=partial(print, file=sys.stderr))
    words = local.agent_words(recipe, str(args.ranks or "auto"), args.restarts, debug=args.debug)
    if not args.detach:
        return node.run_agent(words)
    job = local.detach(recipe, words)
    print(
        f"{job.name} trains in the background; its log: tunesmith logs -f {job.name}; to stop it: tunesmith stop {job.name}"
    )
    return 0
