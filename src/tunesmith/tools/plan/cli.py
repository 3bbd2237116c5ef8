"""Estimate memory, time and cost of a recipe on any hardware.

example:
  tunesmith plan my-recipe.yaml  # on this machine
  # your rows, if they are elsewhere: how many, and tokens in each
  tunesmith plan llama3.3-70b-lora --rows 50000 --length 400 \\
    --on 2x8xh100 --price 2.5  # USD per GPU-hour
  # what `train` with the same options would take; nothing is written
  tunesmith plan --model Qwen/Qwen3-8B --data faq.csv --on h100
  tunesmith plan my-recipe.yaml parallel.tensor=8 --on 8xh100 --json

Needs the model's config.json (the models of shipped recipes need nothing) and
no GPU. Lengths come from the token cache, which `tunesmith data` fills. The
exit code is 2 if it does not fit.
"""

import argparse
import logging
import math
from contextlib import suppress

from tunesmith.cli.options import add_json, whole_number
from tunesmith.cli.recipe_options import add_recipe, chosen_recipe
from tunesmith.config.dump import flatten
from tunesmith.errors import UsageError
from tunesmith.host.shell import shell_word
from tunesmith.planning.machines import Cluster, read_cluster

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
# Meshes that are shown without --all.
SHOWN_MESHES = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    machines = "2x8xh100, 4xa100-80gb, h200, 2x-dgx-spark, ... (default: this machine)"
    parser.add_argument("--on", action="append", metavar="MACHINES", help=machines)
    names = "gib, tflops (of whole steps in bf16), bandwidth, link, network (GB/s)"
    figures = f"a property of the GPUs: {names}"
    parser.add_argument(
        "--assume", action="append", default=[], metavar="NAME=NUMBER", help=figures
    )
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
    parser.add_argument(
        "--all",
        action="store_true",
        help=f"show every mesh (default: the best {SHOWN_MESHES} that fit)",
    )
    parser.add_argument("--price", type=_price, metavar="USD", help="USD per GPU-hour")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    cluster = _cluster(args)
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


def _cluster(args: argparse.Namespace) -> Cluster:
    """The machines of --on, with the figures of --assume."""
    machines = args.on or ["here"]
    if len(machines) > 1:
        raise UsageError(
            f"--on was given {len(machines)} times",
            where="command line: --on",
            why="a plan is for one machine",
            fix="tunesmith plan once for each machine; --json has the figures to compare",
        )
    return read_cluster(machines[0], args.assume)


def _price(text: str) -> float:
    """A finite number above 0."""
    with suppress(ValueError):
        if 0 < (price := float(text)) < math.inf:
            return price
    raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
