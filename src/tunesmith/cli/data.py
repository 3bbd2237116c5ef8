"""Show which tokens a recipe trains on, without training.

example:
  tunesmith data smollm2-135m-lora
  # your own rows
  tunesmith data --model HuggingFaceTB/SmolLM2-135M-Instruct --data faq.csv
  tunesmith data my-recipe.yaml data.train_on=last --rows 10
  tunesmith data runs/my-run  # those of a run
  tunesmith data my-recipe.yaml --json > tokens.json
  # the rows that a run validates on, to evaluate other models on the same
  tunesmith data runs/my-run --write-held-out held-out.jsonl

Supervised tokens are green, or between ⟦ and ⟧ if colors are off. Then it
prints counts, lengths, packing, the number of optimizer steps, and checks of
the tokens. The exit code is 2 if a check fails. For a model on the Hub, only
the tokenizer and the configuration are downloaded.
"""

import argparse
from pathlib import Path

from tunesmith.cli.options import add_json
from tunesmith.cli.recipe_options import RECIPE_HELP, add_recipe, chosen_recipe
from tunesmith.config.schema import Run
from tunesmith.config.shipped import shipped
from tunesmith.errors import UsageError
from tunesmith.host.shell import shell_path
from tunesmith.run_dir import RECIPE

LOADS_TORCH = "in ranks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, recipe_help=f"{RECIPE_HELP}, or a run directory")
    parser.add_argument(
        "--write-held-out",
        type=Path,
        metavar="FILE",
        help="write the held-out rows to a new .jsonl file, for `eval --data`, and show nothing",
    )
    parser.add_argument(
        "--rows", type=int, default=3, metavar="N", help="how many rows to show (default 3)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    run_dir = _run_dir(args.recipe)
    if run_dir is not None:
        args.recipe = str(run_dir / RECIPE)
    recipe, _ = chosen_recipe(args, is_own=run_dir is None)
    if args.write_held_out is not None:
        _check_new_file(args.write_held_out, recipe, run_dir)
    from tunesmith.cli.run_data import show_data

    show_data(args, recipe, run_dir)


def _run_dir(recipe: str | None) -> Path | None:
    """The run directory that RECIPE names, if it is one and no recipe."""
    if recipe is None or recipe in shipped() or not Path(recipe, RECIPE).is_file():
        return None
    return Path(recipe)


def _check_new_file(file: Path, recipe: Run, run_dir: Path | None) -> None:
    """UsageError where the held-out rows of a recipe or run cannot be written to this file."""
    sources = recipe.data.validation or recipe.data.train
    layouts = {(source.format, *sorted(source.columns.items())) for source in sources}
    what = ""
    if not recipe.data.validation and recipe.data.hold_out is None:
        what = "the recipe holds out no rows"
        fix = "add data.hold_out='5 %'"
        if run_dir is not None:
            # Rows that are held out only now were trained on.
            fix = f"use rows that it was not trained on: tunesmith eval {shell_path(run_dir)} "
            fix += "--data FILE"
    elif len(layouts) > 1:
        what = "the held-out rows have several formats or columns, and a file has one"
        fix = "use a recipe with one of these sources"
    elif file.suffix != ".jsonl":
        what = f"held-out rows are written as JSON lines, and {file} does not end in .jsonl"
        fix = f"--write-held-out {shell_path(file.with_suffix('.jsonl'))}"
    elif file.exists():
        what = f"{file} already exists and is not overwritten"
        fix = "use a new name"
    if what:
        raise UsageError(what, where="--write-held-out", fix=fix)
