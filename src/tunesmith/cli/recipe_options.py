"""Command-line options for the recipe of a command.

Users give a recipe with overrides, or a model and rows from which a new recipe is made.
"""

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.cli.options import add_columns, add_trust
from tunesmith.config.load import load_recipe
from tunesmith.config.paths import DATA_SUFFIXES
from tunesmith.config.row_formats import FORMAT_COLUMNS
from tunesmith.errors import UsageError
from tunesmith.host.shell import shell_command, shell_word
from tunesmith.host.signals import loading_libraries
from tunesmith.rows.source.folders import check_local
from tunesmith.rows.source.open_source import is_local

if TYPE_CHECKING:
    from tunesmith.config.schema import Run
    from tunesmith.start.make_recipe import NewRecipe

log = logging.getLogger(__name__)

RECIPE_HELP = "a recipe file, or the name of a shipped recipe (see `tunesmith recipes`)"


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the arguments key=value, which override keys of the recipe."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override values of the recipe, such as train.learning_rate=1e-4",
    )
    add_trust(parser)


def add_recipe(parser: argparse.ArgumentParser, *, recipe_help: str = RECIPE_HELP) -> None:
    """Add the arguments for a recipe with overrides, and for a new recipe from a model and rows."""
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help=recipe_help)
    add_overrides(parser)
    add_new_recipe(parser)


def add_new_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the options for a new recipe: the model, the rows and their format."""
    # Save the command's name, because error messages propose commands.
    parser.set_defaults(verb=parser.prog.removeprefix("tunesmith "))
    rows = parser.add_argument_group(
        "without a recipe: detect the format of your rows and write a new recipe"
    )
    rows.add_argument("--model", metavar="NAME", help="Hub id, folder, or demo (a small model)")
    rows.add_argument(
        "--data",
        metavar="FILE",
        action="append",
        help="file with the rows (json, jsonl, csv, parquet, arrow), or a data set's Hub id",
    )
    rows.add_argument(
        "--split", metavar="SPLIT", help="split of a Hub data set, or a slice such as train[:1000]"
    )
    rows.add_argument(
        "--format",
        choices=FORMAT_COLUMNS,
        metavar="FORMAT",
        help=f"row format, if the columns fit several formats: one of {', '.join(FORMAT_COLUMNS)}",
    )
    add_columns(rows)


def check_no_rows(recipe: str, args: argparse.Namespace) -> None:
    """Raise UsageError if the user gave a file of rows instead of a recipe."""
    suffix = Path(recipe).suffix.lower()
    # Accept a .json file, because it can be a recipe: JSON is valid YAML.
    if "=" in recipe or suffix == ".json" or suffix not in DATA_SUFFIXES:
        return
    why = "a recipe is a .yaml file that names a model and rows"
    rows = recipe
    if args.data:
        why = "--data takes one source, and the shell expands a pattern that is not in quotes"
        rows = f"{Path(recipe).parent}/*{Path(recipe).suffix}"
    raise UsageError(
        f"{recipe} is a file of rows, not a recipe",
        where="command line",
        why=why,
        fix=f"run `{command_on_rows(args, rows)}`",
    )


def command_on_rows(args: argparse.Namespace, file: str) -> str:
    """Return the command line for the same command with the rows in `file` instead of a recipe.

    The command uses the model `demo` if no model is given.
    """
    return shell_command(
        ["tunesmith", *args.verb.split(), "--model", args.model or "demo", "--data", file]
    )


def chosen_recipe(
    args: argparse.Namespace,
    *,
    on_paper: bool = False,
    row_count: int | None = None,
    ranks: int = 1,
    on_draft: "Callable[[Run], object]" = lambda draft: None,
) -> "tuple[Run, NewRecipe | None]":
    """Load or make the recipe that the options of `add_recipe` describe. Log the chosen values.

    Args:
        on_paper, row_count, ranks: arguments of `make_recipe`.
        on_draft: function that is called with the draft of a new recipe, before the model is read.

    Returns:
        The recipe, and the file of a new recipe. The file is None if the recipe already exists.
    """
    words = [word for word in (args.recipe, *args.overrides) if word is not None]
    if words:
        check_no_rows(words[0], args)
    options = [
        f"--{name}" for name in ("model", "data", "split", "format", "columns") if vars(args)[name]
    ]
    # If options for a new recipe are given, the first word can be key=value instead of a recipe.
    if words and not (options and "=" in words[0]):
        if options:
            rows = shell_word(f"data.train.source={args.data[0] if args.data else 'FILE'}")
            raise UsageError(
                f"a recipe and {options[0]} cannot be combined",
                where="command line",
                why=f"{options[0]} is an option for a new recipe",
                fix=f"remove {words[0]}, or remove {', '.join(options)} and change the recipe with "
                f"key=value, such as {rows}",
            )
        return load_recipe(words[0], words[1:], announce=True), None
    if not args.model or len(args.data or ()) != 1:
        file = args.data[0] if args.data else "faq.csv"
        raise UsageError(
            "a recipe is required, or --model and one --data for a new recipe",
            where="command line",
            fix="choose a recipe with `tunesmith recipes`, or make one: "
            f"{command_on_rows(args, file)}",
        )
    # Check a local file before numpy is imported. A folder whose configuration is given by
    # `data.train.name` is checked later, when its rows are read.
    names_config = any(word.startswith("data.train.name=") for word in words)
    if is_local(args.data[0]) and not names_config:
        check_local(Path(args.data[0]).expanduser().absolute())
    with loading_libraries():
        from tunesmith.start.draft import draft_recipe

    keys_of_rows = {"split": args.split, "format": args.format, "columns": dict(args.columns)}
    words += [
        f"data.train.{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in keys_of_rows.items()
        if value
    ]
    draft = draft_recipe(args.model, args.data[0], words)
    with loading_libraries():
        from tunesmith.start.draft import draft_lines
    for line in draft_lines(draft):
        log.info(line)
    on_draft(draft.run)
    with loading_libraries():
        from tunesmith.start.make_recipe import make_recipe

    recipe = make_recipe(
        args.model,
        args.data[0],
        words,
        on_paper=on_paper,
        row_count=row_count,
        ranks=ranks,
        draft=draft,
    )
    return recipe.run, recipe
