"""The recipes that come with tunesmith: `recipes/` of a checkout, `tunesmith/recipes` of an
installed package.
"""

import os
from pathlib import Path

from tunesmith.config.names import nearest
from tunesmith.errors import RecipeError
from tunesmith.host.files import near_path

YAML_SUFFIXES = (".yaml", ".yml")
# How the YAML language server, and so an editor, finds a file's schema.
MODELINE = "# yaml-language-server: $schema="


def shipped() -> dict[str, Path]:
    """Name -> file of every shipped recipe, by name."""
    package = Path(__file__).resolve().parents[1]
    folder = package / "recipes"
    if not folder.is_dir():
        folder = package.parents[1] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def purpose(path: Path) -> str:
    """Read what a recipe is for: the comment below the line for editors."""
    with path.open(encoding="utf-8") as file:
        return next(line.lstrip("# ").strip() for line in file if not line.startswith(MODELINE))


def copy_of(path: Path) -> str:
    """The text of a shipped recipe for another folder: its first line leads editors to the schema
    beside the original.
    """
    return "\n".join([schema_line(), path.read_text(encoding="utf-8").partition("\n")[2]])


def schema_line() -> str:
    """The first line of a recipe in any folder: it leads editors to the schema beside the shipped
    recipes.
    """
    return f"{MODELINE}{next(iter(shipped().values())).with_name('schema.json').as_uri()}"


def locate_recipe(recipe: str | Path, *, base: Path, where: str) -> Path:
    """The file that a recipe's name or path means, else a RecipeError; a file wins over a shipped
    recipe of its name.
    """
    # Unlike Path.expanduser, it leaves ~name of no user as it is.
    path = base / os.path.expanduser(recipe)
    # Unlike those of Path, they are False for a name that is too long for a path.
    if os.path.isfile(path):
        return path
    recipes = shipped()
    if str(recipe) in recipes:
        return recipes[str(recipe)]
    if os.path.isdir(path):
        fix = f"name a .yaml file in it; of a run: {path / 'config.yaml'}"
        raise RecipeError(f"{recipe} is a folder, not a recipe", where=where, fix=fix)
    near = (path.suffix and near_path(path)) or nearest(path.stem, recipes)
    fix = (
        "see those that ship: tunesmith recipes; or make one from your rows: tunesmith train "
        "--model demo --data faq.csv"
    )
    if near:
        fix = f"did you mean {near}? or {fix}"
    what = f"no recipe {str(recipe)!r}: neither a file nor one that ships"
    raise RecipeError(what, where=where, fix=fix)
