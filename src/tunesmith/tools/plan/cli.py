"""Estimate memory and time of a recipe on any hardware.

example:
  tunesmith plan my-recipe.yaml  # on this machine
  # your rows, if they are elsewhere: how many, and tokens in each
  tunesmith plan llama3.3-70b-lora --rows 50000 --length 400 \\
    --on 2x8xh100
  # what `train` with the same options would take; nothing is written
  tunesmith plan --model Qwen/Qwen3-8B --data faq.csv --on h100
  tunesmith plan my-recipe.yaml parallel.tensor=8 --on 8xh100 --json

Needs the model's config.json (the models of shipped recipes need nothing) and
no GPU. Lengths come from the token cache, which `tunesmith data` fills. The
exit code is 2 if it does not fit.
"""

import argparse
import logging

from tunesmith.cli.options import add_json, whole_number
from tunesmith.cli.recipe_options import add_recipe, chosen_recipe
from tunesmith.config.dump import flatten
from tunesmith.errors import UsageError
from tunesmith.host.shell import shell_word
from tunesmith.planning.machines import read_cluster

LOADS_TORCH = "here"

log = logging.getLogger(__name__)

# The keys of a new recipe that are shown.
CHOSEN_KEYS = (
    "adapter.rank",
    "data.seq_len",
    "data.hold_out",
    "train.duration",
    "train.global_batch",
    "train.learning_rate",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    machines = "2x8xh100, 4xa100-80gb, h200, 2x-dgx-spark, ... (default: this machine)"
    parser.add_argument("--on", action="append", metavar="MACHINES", help=machines)
    parser.add_argument(
        "--length",
        type=whole_number,
        metavar="TOKENS",
        help="tokens per example, if none are cached",
    )
    parser.add_argument(
        "--rows",
        type=whole_number,
        metavar="N",
        help="rows of data.train, if they are not on this machine",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    machines = args.on or ["here"]
    if len(machines) > 1:
        raise UsageError(
            f"--on was given {len(machines)} times",
            where="command line: --on",
            why="a plan is for one machine",
            fix="tunesmith plan once for each machine; --json has the figures to compare",
        )
    cluster = read_cluster(machines[0])
    recipe, new_recipe = chosen_recipe(
        args, on_paper=True, row_count=args.rows, ranks=cluster.world
    )
    if new_recipe is not None:
        values = flatten(recipe)
        pairs = [f"{key}={shell_word(values[key])}" for key in CHOSEN_KEYS if values.get(key)]
        log.info(f"chosen, as `train` with the same options does: {' '.join(pairs)}")
    # It loads torch, and a wrong word has been refused by now.
    from tunesmith.tools.plan.show_plan import show_plan

    show_plan(args, cluster, recipe, new_recipe)
