"""Access to the shipped recipes.

They are in `recipes/` of a source checkout, or in `tunesmith/recipes` of an installed package.
"""

import os
from pathlib import Path

from tunesmith.config.names import nearest
from tunesmith.errors import RecipeError
from tunesmith.host.files import find_similar_path

# Start of the comment that tells an editor's YAML language server which schema a file has.
MODELINE = "# yaml-language-server: $schema="


def shipped() -> dict[str, Path]:
    """Return a dict from the name of every shipped recipe to its file, sorted by name."""
    package = Path(__file__).resolve().parents[1]
    folder = package / "recipes"
    if not folder.is_dir():
        folder = package.parents[1] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def purpose(path: Path) -> str:
    """Return the first comment of a recipe file, which states its purpose.

    The line that names the schema for editors is skipped.
    """
    with path.open(encoding="utf-8") as file:
        return next(line.lstrip("# ").strip() for line in file if not line.startswith(MODELINE))


def copy_of(path: Path) -> str:
    """Return the text of a shipped recipe, with an absolute path to the schema in its first line.

    With this path, editors find the schema from any folder that contains the copy of the recipe.
    """
    return "\n".join([schema_line(), path.read_text(encoding="utf-8").partition("\n")[2]])


def schema_line() -> str:
    """Return the first line of a recipe: a comment with the schema's URI, for editors."""
    return f"{MODELINE}{next(iter(shipped().values())).with_name('schema.json').as_uri()}"


def locate_recipe(recipe: str | Path, *, base: Path, where: str) -> Path:
    """Return the file of a recipe. `recipe` is a path or the name of a shipped recipe.

    An existing file is preferred to a shipped recipe of the same name. Raise RecipeError if neither
    exists.
    """
    # os.path.expanduser keeps `~name` of an unknown user; Path.expanduser raises RuntimeError.
    path = base / os.path.expanduser(recipe)
    # os.path.isfile returns False if the name is too long for a path; Path.is_file raises OSError.
    if os.path.isfile(path):
        return path
    recipes = shipped()
    if str(recipe) in recipes:
        return recipes[str(recipe)]
    if os.path.isdir(path):
        fix = (
            "name a recipe file (.yaml) in this folder; if the folder is a run directory, its "
            f"recipe is {path / 'config.yaml'}"
        )
        raise RecipeError(f"{recipe} is a folder, not a recipe", where=where, fix=fix)
    # The name of a shipped recipe can have a dot, as in llama3.1-8b-lora.
    name = path.name.removesuffix(".yaml").removesuffix(".yml")
    near = (path.suffix and find_similar_path(path)) or nearest(name, recipes)
    fix = (
        "list the shipped recipes with `tunesmith recipes`, or train without a recipe: "
        "`tunesmith train --model demo --data faq.csv`"
    )
    if near:
        fix = f"did you mean {near}? If not, {fix}"
    raise RecipeError(
        f"there is neither a file nor a shipped recipe with the name {str(recipe)!r}",
        where=where,
        fix=fix,
    )
