"""A recipe file and its overrides -> one frozen, checked `Run`.

    file -> extends, from the base up -> key=value -> absolute paths -> types -> rules

Every value keeps the place it came from, so an error names the file and line, or the key on the
command line.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.config.check import METHOD_FORMATS, check_run
from tunesmith.config.layers import (
    COMMAND_LINE,
    FROM_PYTHON,
    merge_layers,
    override_layer,
    with_method_section,
)
from tunesmith.config.paths import resolve_paths
from tunesmith.config.schema import Run
from tunesmith.config.shipped import locate_recipe
from tunesmith.config.tree import Node, read_file, wrap
from tunesmith.config.typed import build_run
from tunesmith.errors import RecipeError

# Recipes one over the other.
MAX_EXTENDS = 20
# The files that make a folder a run directory; `run_dir.py` describes them.
RUN_RECIPE = "config.yaml"
RUN_IDENTITY = "env.json"


def load_recipe(
    recipe: str | Path,
    overrides: Mapping[str, object] | Sequence[str] = (),
    *,
    announce: bool = False,
    trusts_code: bool | None = None,
) -> Run:
    """Read a recipe, apply overrides, check it; RecipeError or MachineError names what is wrong,
    its place and the fix.

    Args:
        recipe: a file, or the name of a recipe that ships.
        overrides: `{"key.sub": value}`, each value as it is, or texts `key.sub=value`, the value in
            YAML 1.2; all of them are one layer.
        announce: log a line for each layer that names other rows, about the keys that it leaves
            behind.
        trusts_code: whether `model.trust_remote_code: true` in a file is accepted. None: only in
            the user's own files, see `_is_users_own`.
    """
    file = locate_recipe(recipe, base=Path(), where=str(recipe))
    tree = _read_layers(file, announce)
    tree = merge_layers(tree, override_layer(overrides), announce=announce)
    run = checked(tree)
    if run.model.trust_remote_code and not trusts_code:
        where = dict(tree.places())["model.trust_remote_code"]
        is_given = where.startswith((COMMAND_LINE, FROM_PYTHON))
        if not is_given and (trusts_code is False or not _is_users_own(where, file)):
            raise untrusted_code(run.model.name, where)
    return run


def untrusted_code(model: str, where: str) -> RecipeError:
    """Return the error for another person's file that enables the model's own code."""
    return RecipeError(
        "model.trust_remote_code: true is not accepted from this file",
        where=where,
        why=f"it runs Python code that comes with the model {model}, and only the user's own "
        "recipe or command can allow that",
        fix="review that code; to run it, add model.trust_remote_code=true to the command, or "
        "--trust-remote-code to a command that takes a run; in Python trust_remote_code=True",
    )


def _is_users_own(where: str, recipe: Path) -> bool:
    """Return whether a place is in a file of the user, who has named `recipe`.

    The user's files are in the folder of `recipe` or below it, except the config.yaml of a run
    directory, because others may have written it. A run directory has env.json or a checkpoint.
    """
    file = Path(where.rpartition(":")[0]).resolve()
    saved = (RUN_IDENTITY, "final/manifest.json", "checkpoint-*/manifest.json")
    has_run = any(any(file.parent.glob(pattern)) for pattern in saved)
    is_of_run = file.name == RUN_RECIPE and has_run
    return not is_of_run and file.is_relative_to(recipe.resolve().parent)


def from_mapping(values: Mapping[str, object], *, where: str, base: Path) -> Run:
    """A `Run` from plain values, as `to_mapping` gives them; raises as `load_recipe`.

    `where` is what errors call it, such as the file's name, and `base` the folder that relative
    paths start from.
    """
    return checked(wrap(values, where=where, base=base))


def checked(tree: Node) -> Run:
    tree = with_method_section(tree)
    run = build_run(resolve_paths(tree))
    places = dict(tree.places())
    run = _with_formats(run, places)
    check_run(run, lambda key: places.get(key, ""))
    return run


def _with_formats(run: Run, places: Container[str]) -> Run:
    """The run; a source without a format has that of the rows that the method learns from."""
    format_name = METHOD_FORMATS.get(run.method.name)
    if format_name is None:
        return run
    parts: dict[str, Any] = {}
    for part, sources in (("train", run.data.train), ("validation", run.data.validation)):
        with_format = []
        for i, source in enumerate(sources):
            # A single source is written without an index.
            is_set = f"data.{part}.format" in places or f"data.{part}.{i}.format" in places
            with_format.append(source if is_set else replace(source, format=format_name))
        parts[part] = tuple(with_format)
    return replace(run, data=replace(run.data, **parts))


def _read_layers(path: Path, announce: bool, depth: int = 0) -> Node:
    """The file's tree over those of the recipes that it extends."""
    tree = read_file(path)
    assert isinstance(tree.value, dict)
    # Removed: `extends` is no key of the schema.
    extends = tree.value.pop("extends", None)
    if extends is None:
        return tree
    if not isinstance(extends.value, str):
        fix = "extends: llama3.1-8b-lora, or a file such as ../base.yaml"
        raise RecipeError("extends takes one recipe's name or file", where=extends.where, fix=fix)
    base = locate_recipe(extends.value, base=path.parent, where=extends.where)
    if depth == MAX_EXTENDS:
        what = f"more than {MAX_EXTENDS} recipes extend each other, or they do so in a circle"
        fix = "remove one extends, or put several recipes into one file"
        raise RecipeError(what, where=extends.where, fix=fix)
    # The base first, then this file over it.
    return merge_layers(_read_layers(base, announce, depth + 1), tree, announce=announce)
