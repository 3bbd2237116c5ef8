"""List, show and copy shipped recipes.

example:
  tunesmith recipes  # list all
  tunesmith recipes show smollm2-135m-lora  # the file, with its comments
  # the resolved recipe with a changed key and all defaults
  tunesmith recipes show smollm2-135m-lora train.learning_rate=5e-4
  # copy a recipe to edit it
  tunesmith recipes copy smollm2-135m-lora mine.yaml
"""

import argparse
import json
import sys
from pathlib import Path

from tunesmith.cli.options import add_json, print_columns, require_folder
from tunesmith.config.dump import dump, to_mapping
from tunesmith.config.load import load_recipe
from tunesmith.config.names import suggest
from tunesmith.config.schema import Run
from tunesmith.config.shipped import copy_of, locate_recipe, purpose, shipped
from tunesmith.errors import UsageError
from tunesmith.host.shell import shell_command, shell_path, shell_word
from tunesmith.quant.schemes import NF4, scheme_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        nargs="?",
        choices=("list", "show", "copy"),
        default="list",
        help="list all recipes, show one, or copy one (default: list)",
    )
    parser.add_argument(
        "name",
        nargs="?",
        help="with `show`: a shipped recipe or a file; with `copy`: a shipped recipe",
    )
    parser.add_argument(
        "rest",
        nargs="*",
        metavar="key=value | DEST",
        help="with `show`: keys to override; with `copy`: the destination file or folder",
    )
    add_json(parser)
    parser.add_argument(
        "--force", action="store_true", help="with `copy`: overwrite an existing file"
    )


def run(args: argparse.Namespace) -> None:
    if args.action == "list":
        _list(as_json=args.json)
    elif args.name is None or (args.action == "copy" and len(args.rest) > 1):
        name = args.name or "smollm2-135m-lora"
        command = shell_command(["tunesmith", "recipes", args.action, name, *args.rest[:1]])
        what = f"recipes {args.action} takes one recipe, and copy at most one destination"
        raise UsageError(what, where="command line", fix=f"run `{command}`")
    elif args.action == "show":
        recipe = load_recipe(args.name, args.rest, trusts_code=True)
        text = dump(recipe)
        file = locate_recipe(args.name, base=Path(), where=args.name)
        if args.json:
            text = json.dumps(to_mapping(recipe), indent=2) + "\n"
        elif not args.rest and file in shipped().values():
            # Show the file of a shipped recipe instead of its values, because its comments have
            # further information.
            text = file.read_text(encoding="utf-8")
        sys.stdout.write(text)
    else:
        _copy(args.name, Path(args.rest[0] if args.rest else "."), force=args.force)


def describe_adapter(run: Run) -> str:
    """Describe what a recipe trains: `full`, `LoRA r=8` or `QLoRA r=8`."""
    if run.adapter.kind == "none":
        return "full"
    method = "QLoRA" if scheme_of(run.model) is NF4 else "LoRA"
    return f"{method} r={run.adapter.rank}"


def _list(*, as_json: bool) -> None:
    rows = []
    for name, path in shipped().items():
        recipe = load_recipe(path)
        row = {
            "name": name,
            "model": recipe.model.name,
            "method": describe_adapter(recipe),
            "purpose": purpose(path),
            "file": str(path),
        }
        rows.append(row)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    # Print only the name and the purpose, because the purpose includes the model and the method.
    print_columns([(row["name"], row["purpose"]) for row in rows])
    if sys.stdout.isatty():
        print("\ntunesmith recipes copy NAME    copies a recipe for editing", file=sys.stderr)


def _copy(name: str, destination: Path, *, force: bool) -> None:
    recipes = shipped()
    if name not in recipes:
        fix = suggest(
            name, recipes, otherwise="run `tunesmith recipes`, which lists the shipped recipes"
        )
        raise UsageError(
            f"no recipe {name!r} is shipped with tunesmith", where="command line", fix=fix
        )
    path = destination / f"{name}.yaml" if destination.is_dir() else destination
    require_folder(path.parent, "DEST")
    text = copy_of(recipes[name])
    try:
        # Open with mode "x", which raises FileExistsError even if the file was created a moment
        # ago.
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        command = f"tunesmith recipes copy {shell_word(name)} {shell_path(destination)} --force"
        fix = f"choose another file, or run: {command}"
        raise UsageError("this file already exists", where=path, fix=fix) from error
    print(path)
    print(f"edit the recipe, then run: tunesmith train {shell_path(path)}", file=sys.stderr)
