"""Estimate memory and time of a recipe on any hardware.

example:
  tunesmith plan my-recipe.yaml  # on this machine
  # if your rows are on another machine: their number and mean length in tokens
  tunesmith plan llama3.3-70b-lora --rows 50000 --length 400 \\
    --on 2x8xh100
  # plan for `train` with the same options; nothing is written
  tunesmith plan --model Qwen/Qwen3-8B --data faq.csv --on h100
  tunesmith plan my-recipe.yaml parallel.tensor=8 --on 8xh100 --json

The command needs the model's config.json but no GPU. The models of shipped
recipes need no file. Lengths are read from the token cache, which `tunesmith
data` fills. The exit code is 2 if the run does not fit.
"""

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import BufferingHandler

from tunesmith.cli.options import add_json, whole_number
from tunesmith.cli.recipe_options import add_recipe, chosen_recipe
from tunesmith.config.dump import flatten
from tunesmith.host.logger import PACKAGE
from tunesmith.host.shell import shell_word
from tunesmith.planning.machines import read_cluster

LOADS_TORCH = "here"

log = logging.getLogger(__name__)

MAX_HELD_LINES = 10_000  # more lines than a plan logs

# Keys whose values are printed if a new recipe is created.
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
    parser.add_argument(
        "--on",
        default="here",
        metavar="MACHINES",
        help="GPUs of the plan: 2x8xh100, 4xa100-80gb, h200, 2x-dgx-spark, ... (default: this "
        "machine)",
    )
    parser.add_argument(
        "--length",
        type=whole_number,
        metavar="TOKENS",
        help="estimated number of tokens per example, if the rows have not been tokenized yet",
    )
    parser.add_argument(
        "--rows",
        type=whole_number,
        metavar="N",
        help="number of rows of data.train, if the rows are not on this machine",
    )
    add_json(parser)


@contextmanager
def _logged_afterwards() -> Iterator[None]:
    """Hold log lines back inside the block, so that the first line of a plan is the answer."""
    handlers = PACKAGE.handlers[:]
    held = BufferingHandler(MAX_HELD_LINES)
    PACKAGE.handlers[:] = [held]
    try:
        yield
    finally:
        PACKAGE.handlers[:] = handlers
        for record in held.buffer:
            PACKAGE.handle(record)


@_logged_afterwards()
def run(args: argparse.Namespace) -> None:
    cluster = read_cluster(args.on)
    recipe, new_recipe = chosen_recipe(
        args, on_paper=True, row_count=args.rows, ranks=cluster.world
    )
    if new_recipe is not None:
        values = flatten(recipe)
        pairs = [f"{key}={shell_word(values[key])}" for key in CHOSEN_KEYS if values.get(key)]
        log.info(
            f"chosen recipe values (`tunesmith train` chooses the same values): {' '.join(pairs)}"
        )
    # Import after all arguments are checked, because the import loads torch.
    from tunesmith.tools.plan.show_plan import show_plan

    show_plan(args, cluster, recipe, new_recipe)
