"""Show which tokens a recipe trains on, without training.

example:
  tunesmith data smollm2-135m-lora
  # your own rows
  tunesmith data --model HuggingFaceTB/SmolLM2-135M-Instruct --data faq.csv
  tunesmith data my-recipe.yaml data.train_on=last --rows 10
  tunesmith data runs/my-run  # the rows of a run
  tunesmith data my-recipe.yaml --json > tokens.json
  # the sampled answers of step 20, with their rewards
  tunesmith data --rollouts runs/my-grpo 20

Supervised tokens are green, or between ⟦ and ⟧ if colors are off. The
command also prints counts, lengths, packing, the number of optimizer steps,
and checks of the tokens. The exit code is 2 if a check fails. For a model on
the Hub, only the tokenizer and the configuration are downloaded.
"""

import argparse
import sys
from pathlib import Path

from tunesmith.cli.options import add_json
from tunesmith.cli.recipe_options import RECIPE_HELP, add_recipe, chosen_recipe
from tunesmith.config.shipped import shipped
from tunesmith.errors import UsageError
from tunesmith.host.streams import show
from tunesmith.run_dir import RECIPE

LOADS_TORCH = "in ranks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, recipe_help=f"{RECIPE_HELP}, or a run directory")
    parser.add_argument(
        "--rows", type=int, default=3, metavar="N", help="number of rows to show (default: 3)"
    )
    parser.add_argument(
        "--rollouts",
        nargs=2,
        metavar=("RUN", "STEP"),
        help="show the sampled answers of a step of a run with method grpo, with their rewards",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    if args.rollouts:
        if args.recipe or args.data or args.json:
            raise UsageError(
                "--rollouts cannot be combined with a recipe, --data or --json",
                where="--rollouts",
                fix="tunesmith data --rollouts RUN STEP",
            )
        from tunesmith.presentation.rollouts import rollout_lines

        folder, step = args.rollouts
        show("\n".join(rollout_lines(Path(folder), step)), sys.stdout)
        return
    run_dir = _run_dir(args.recipe)
    if run_dir is not None:
        args.recipe = str(run_dir / RECIPE)
    recipe, new_recipe = chosen_recipe(args)
    from tunesmith.cli.run_data import show_data

    show_data(args, recipe, new_recipe.facts if new_recipe else None)


def _run_dir(recipe: str | None) -> Path | None:
    """Return the run directory that the argument RECIPE names, or None if it names a recipe."""
    if recipe is None or recipe in shipped() or not Path(recipe, RECIPE).is_file():
        return None
    return Path(recipe)
