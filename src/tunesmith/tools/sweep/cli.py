"""Train many adapters on one base and find the best.

example:
  # all combinations of the listed values
  tunesmith sweep my-recipe.yaml train.learning_rate=1e-4,1e-3 adapter.rank=8,32
  # detects the row format and writes a recipe, as `train` does
  tunesmith sweep --model demo --data faq.csv train.learning_rate=3e-4,1e-3

A key with one value applies to all candidates. Each candidate has a run
directory in output_dir, for `chat`, `eval` and `train`. After ctrl-C or a kill
the same command resumes: finished candidates are not trained again.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

from tunesmith.cli.options import (
    add_json,
    add_trust,
    is_main_process,
    leave_lines_to_rank_0,
    whole_number,
)
from tunesmith.cli.recipe_options import RECIPE_HELP, add_new_recipe, chosen_recipe
from tunesmith.distributed.ranks import reported_once_a_node, started_as
from tunesmith.host.signals import StopRequest, loading_libraries
from tunesmith.host.streams import survive_write_errors
from tunesmith.launch.node import run_agent
from tunesmith.run_dir import SWEEP
from tunesmith.tools.sweep.space import Space, read_space

LOADS_TORCH = "here"

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help=RECIPE_HELP)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="key=values",
        help="key=a,b,c tries each of the values; key=value applies to all candidates",
    )
    add_trust(parser)
    parser.add_argument(
        "--ranks",
        type=whole_number,
        metavar="N",
        help="number of ranks to start (default: one process)",
    )
    add_json(parser)
    add_new_recipe(parser)


def run(args: argparse.Namespace) -> int | None:
    leave_lines_to_rank_0()
    with reported_once_a_node():
        # With --model and --data there is no recipe. Then `args.recipe` has the first key=values.
        if args.recipe is not None and "=" in args.recipe:
            args.words.insert(0, args.recipe)
            args.recipe = None
        space = read_space(args.words)
        # Let the new recipe contain the values that apply to all candidates.
        args.overrides = space.fixed
        _, new_recipe = chosen_recipe(args)
        if new_recipe is not None:
            new_recipe.check_file()
    if new_recipe is None:
        return sweep_or_launch(args, space)
    log.info(f"recipe: {new_recipe.name}")
    args.recipe = str(new_recipe.path)
    is_new = not new_recipe.path.exists()
    new_recipe.write_file()
    try:
        return sweep_or_launch(args, space)
    finally:
        # Remove the new recipe if the sweep did not start.
        if is_new and not Path(new_recipe.run.output_dir, SWEEP).exists():
            new_recipe.path.unlink(missing_ok=True)


def sweep_or_launch(args: argparse.Namespace, space: Space) -> int | None:
    """Train the candidates and print the result. Start the ranks first if --ranks is given."""
    if args.ranks is not None and started_as() is None:
        words = ["--ranks", str(args.ranks), "--", "sweep", args.recipe, *args.words]
        words += ["--trust-remote-code"] * args.trust_remote_code
        return run_agent(words + ["--json"] * args.json)
    with StopRequest(), loading_libraries():
        from tunesmith.tools.sweep.run import run_sweep
        from tunesmith.tools.sweep.table import sweep_lines
    result = run_sweep(args.recipe, space, argv=sys.argv)
    if not is_main_process():
        return None
    # The exit code is 0 even if the output cannot be written, because the sweep has succeeded.
    sys.stdout = survive_write_errors(sys.stdout)
    print(json.dumps(result) if args.json else "\n".join(sweep_lines(result)))
    return None
