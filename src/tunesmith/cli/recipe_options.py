"""The recipe of a command line: a file with overrides, or one that is made of a model and rows."""

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.cli.options import add_columns, fixes_as_options
from tunesmith.config.load import load_recipe
from tunesmith.config.paths import DATA_SUFFIXES
from tunesmith.config.row_formats import FORMAT_COLUMNS
from tunesmith.data.source.folders import check_local
from tunesmith.data.source.open_source import is_local
from tunesmith.errors import UsageError
from tunesmith.host.shell import shell_command, shell_word

if TYPE_CHECKING:
    from tunesmith.config.schema import Run
    from tunesmith.training.early_checks import RowsLook
    from tunesmith.training.make_recipe import NewRecipe

log = logging.getLogger(__name__)

RECIPE_HELP = "a recipe file, or the name of a shipped one (see `tunesmith recipes`)"


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Keys that win over a recipe's."""
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe keys that override the file's"
    )


def add_recipe(parser: argparse.ArgumentParser, *, recipe_help: str = RECIPE_HELP) -> None:
    """A recipe with overrides; or a model and rows for a new one."""
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help=recipe_help)
    add_overrides(parser)
    add_new_recipe(parser)


def add_new_recipe(parser: argparse.ArgumentParser) -> None:
    """A model and rows for a new recipe."""
    # For the commands that errors name.
    parser.set_defaults(verb=parser.prog.removeprefix("tunesmith "))
    rows = parser.add_argument_group(
        "without a recipe: detect the format of your rows and make one"
    )
    rows.add_argument(
        "--model", metavar="NAME", help="Hub id, folder, .gguf file, or demo: a small model"
    )
    rows.add_argument(
        "--data",
        metavar="FILE",
        action="append",
        help="json, jsonl, csv, parquet, arrow, or a Hub id",
    )
    rows.add_argument(
        "--split", metavar="SPLIT", help="of a Hub data set, or a slice such as train[:1000]"
    )
    rows.add_argument(
        "--format",
        choices=FORMAT_COLUMNS,
        metavar="FORMAT",
        help=f"row format, if it is ambiguous: one of {', '.join(FORMAT_COLUMNS)}",
    )
    add_columns(rows)


def check_no_rows(recipe: str, args: argparse.Namespace) -> None:
    """UsageError where the word in the place of a recipe names a file of rows."""
    suffix = Path(recipe).suffix.lower()
    # A recipe may be a .json file.
    if "=" in recipe or suffix == ".json" or suffix not in DATA_SUFFIXES:
        return
    why = "a recipe is a .yaml file that names a model and rows"
    rows = recipe
    if args.data:
        why = "--data takes one source, and the shell replaces a pattern that is not in quotes"
        rows = f"{Path(recipe).parent}/*{Path(recipe).suffix}"
    raise UsageError(
        f"{recipe} is a file of rows, not a recipe",
        where="command line",
        why=why,
        fix=command_on_rows(args, rows),
    )


def command_on_rows(args: argparse.Namespace, file: str) -> str:
    """The command that makes a recipe for these rows: the same verb, on the small model if none is
    named."""
    words = ["tunesmith", *args.verb.split(), "--model", args.model or "demo", "--data", file]
    return shell_command(words)


def chosen_recipe(
    args: argparse.Namespace,
    *,
    on_paper: bool = False,
    row_count: int | None = None,
    ranks: int = 1,
    is_own: bool = True,
    on_look: "Callable[[RowsLook], object]" = lambda look: None,
) -> "tuple[Run, NewRecipe | None]":
    """The recipe that the options of `add_recipe` name, with a line logged about what is chosen.

    Where they make one, also its file's form; the other arguments are for `make_recipe`.

    is_own: whether the recipe is the user's own. That of a run directory may be from others.
    on_look: called with what the rows show, before torch is imported.
    """
    words = [word for word in (args.recipe, *args.overrides) if word is not None]
    if words:
        check_no_rows(words[0], args)
    names = ("model", "data", "split", "format", "columns")
    options = [f"--{name}" for name in names if vars(args)[name]]
    # Beside these options the first word may be a key=value already.
    if words and not (options and "=" in words[0]):
        if options:
            rows = shell_word(f"data.train.source={args.data[0] if args.data else 'FILE'}")
            raise UsageError(
                f"a recipe and {options[0]} cannot be combined",
                where="command line",
                why=f"{options[0]} is for writing a new recipe",
                fix=f"remove {words[0]}, or {', '.join(options)}; key=value overrides keys of a "
                f"recipe: {rows} data.hold_out='5 %'",
            )
        return load_recipe(
            words[0], words[1:], announce=True, trusts_code=None if is_own else False
        ), None
    if not args.model or len(args.data or ()) != 1:
        what = "a recipe is required, or --model and one --data to write one"
        file = args.data[0] if args.data else "faq.csv"
        fix = f"tunesmith recipes lists recipes; or {command_on_rows(args, file)}"
        raise UsageError(what, where="command line", fix=fix)
    # This check comes before numpy is imported. A folder whose configuration is named is checked
    # later, with its rows.
    names_config = any(word.startswith("data.train.name=") for word in words)
    if is_local(args.data[0]) and not names_config:
        with fixes_as_options():
            check_local(Path(args.data[0]).expanduser().absolute())
    from tunesmith.training.early_checks import look_at_rows

    keys_of_rows = {"split": args.split, "format": args.format, "columns": dict(args.columns)}
    # The options of rows are keys of the recipe, so that errors name one thing alone.
    for key, value in keys_of_rows.items():
        if value:
            words.append(f"data.train.{key}={json.dumps(value, ensure_ascii=False)}")
    with fixes_as_options():
        look = look_at_rows(args.model, args.data[0], words)
        on_look(look)
        from tunesmith.training.make_recipe import make_recipe

        recipe = make_recipe(
            args.model,
            args.data[0],
            words,
            on_paper=on_paper,
            row_count=row_count,
            ranks=ranks,
            look=look,
        )
    log.info(recipe.about_data)
    return recipe.run, recipe
