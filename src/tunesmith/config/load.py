"""Loader that turns a recipe file and its overrides into one frozen, checked `Run`.

The steps are:

    read the file -> merge it over the recipes that it extends -> apply key=value overrides
    -> make paths absolute -> check types -> check the rules of check.py

Every value keeps the file and line, or the command-line key, that it comes from. Error messages
show this position.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tunesmith.config.check import METHOD_FORMATS, check_run, sources_with_keys
from tunesmith.config.layers import (
    COMMAND_LINE,
    FROM_PYTHON,
    Overrides,
    merge_layers,
    override_layer,
    with_method_section,
)
from tunesmith.config.paths import resolve_paths
from tunesmith.config.row_settings import record_overrides
from tunesmith.config.schema import Run, Source
from tunesmith.config.shipped import locate_recipe
from tunesmith.config.tree import Node, read_file, wrap
from tunesmith.config.typed import build_run
from tunesmith.errors import RecipeError

# Maximum length of a chain of recipes in which each one extends the next.
MAX_EXTENDS = 20
# Two files of a run directory: the resolved recipe of the run, and the file that identifies the
# run. `run_dir.py` lists all files.
RUN_RECIPE = "config.yaml"
RUN_IDENTITY = "env.json"


def load_recipe(
    recipe: str | Path,
    overrides: Overrides = (),
    *,
    announce: bool = False,
    trusts_code: bool | None = None,
) -> Run:
    """Read a recipe, apply overrides and check the result.

    Args:
        recipe: a recipe file, or the name of a shipped recipe.
        overrides: a mapping `{"key.sub": value}` of Python values, or texts `key.sub=value` with
            the value in YAML 1.2.
        announce: log a line for each layer that names another data source, with the keys that are
            dropped because of it.
        trusts_code: whether `model.trust_remote_code: true` in a file is accepted. None means that
            it is accepted only in files that the user wrote, see `_is_users_own`.

    Raises:
        RecipeError: if the recipe is invalid. The error names the problem, the position and a fix.
        MachineError: if the recipe uses the model `demo`, which is not installed.
    """
    file = locate_recipe(recipe, base=Path(), where=str(recipe))
    tree = _read_layers(file, announce)
    tree = merge_layers(tree, override_layer(overrides), announce=announce)
    run = checked(tree)
    places = dict(tree.places())
    # Without overrides, this can be the recipe of an earlier run in `output_dir`.
    if overrides:
        record_overrides(overridden_sources(run, places))
    if run.model.trust_remote_code and not trusts_code:
        where = places["model.trust_remote_code"]
        is_given = where.startswith((COMMAND_LINE, FROM_PYTHON))
        if not is_given and (trusts_code is False or not _is_users_own(where, file)):
            raise untrusted_code(run.model.name, where)
    return run


def overridden_sources(run: Run, places: Mapping[str, str]) -> dict[str, str]:
    """Return the data sources that an override changes, with their key, such as `data.train`.

    A source in a list is omitted, because an override cannot set a key of a list's item.
    """
    overridden = {}
    sections = {"data.train": run.data.train, "data.validation": run.data.validation}
    for section, sources in sections.items():
        if f"{section}.source" not in places:
            continue
        for key, where in places.items():
            if key.startswith(f"{section}.") and where.startswith((COMMAND_LINE, FROM_PYTHON)):
                overridden[sources[0].source] = section
    return overridden


def untrusted_code(model: str, where: str) -> RecipeError:
    """Build the error for a recipe from another person that enables `trust_remote_code`."""
    return RecipeError(
        "model.trust_remote_code: true is not accepted from this file",
        where=where,
        why=f"this setting runs Python code that comes with the model {model}, and only the user's "
        "own recipe or command can allow that",
        fix="review the model's code; to run it, add model.trust_remote_code=true to the command, "
        "--trust-remote-code if the command takes a run, or trust_remote_code=True in Python",
    )


def _is_users_own(where: str, recipe: Path) -> bool:
    """Return whether `where`, a position such as "recipe.yaml:3", is in a file that the user wrote.

    The user has named the file `recipe`, so files in its folder, or in a subfolder, are the user's.
    The config.yaml of a run directory does not count, because another person may have written it. A
    folder is a run directory if it has env.json or a checkpoint.
    """
    file = Path(where.rpartition(":")[0]).resolve()
    saved = (RUN_IDENTITY, "final/manifest.json", "checkpoint-*/manifest.json")
    has_run = any(any(file.parent.glob(pattern)) for pattern in saved)
    is_of_run = file.name == RUN_RECIPE and has_run
    return not is_of_run and file.is_relative_to(recipe.resolve().parent)


def from_mapping(values: Mapping[str, object], *, where: str, base: Path) -> Run:
    """Build a `Run` from plain values, the output of `to_mapping`.

    Args:
        where: the name of the source in error messages, such as the file's name.
        base: the folder that relative paths are relative to.

    Raises:
        RecipeError, MachineError: as in `load_recipe`.
    """
    return checked(wrap(values, where=where, base=base))


def checked(tree: Node) -> Run:
    tree = with_method_section(tree)
    run = build_run(resolve_paths(tree))
    places = dict(tree.places())
    method_format = METHOD_FORMATS.get(run.method.name)
    if run.samples_answers:
        # The prompt ends before the last answer, and there is no KL penalty by default.
        if "data.train_on" not in places:
            run = replace(run, data=replace(run.data, train_on="last"))
        if "method.beta" not in places:
            run = replace(run, method=replace(run.method, beta=0.0))
    if method_format is not None:
        # Give each data source without a `format` the row format that the training method needs.
        sources: dict[str, list[Source]] = {"train": [], "validation": []}
        for key, source in sources_with_keys(run, places):
            is_set = f"{key}.format" in places
            with_format = source if is_set else replace(source, format=method_format)
            sources[key.split(".")[1]].append(with_format)
        train, validation = map(tuple, sources.values())
        run = replace(run, data=replace(run.data, train=train, validation=validation))
    check_run(run, places)
    return run


def _read_layers(path: Path, announce: bool, depth: int = 0) -> Node:
    """Read a recipe file and merge it over the recipes that it extends."""
    tree = read_file(path)
    assert isinstance(tree.value, dict)
    # Remove `extends` from the tree, because the schema does not have this key.
    extends = tree.value.pop("extends", None)
    if extends is None:
        return tree
    if not isinstance(extends.value, str):
        fix = "write extends: llama3.1-8b-lora, or a file such as ../base.yaml"
        raise RecipeError("extends must name one recipe or file", where=extends.where, fix=fix)
    base = locate_recipe(extends.value, base=path.parent, where=extends.where)
    if depth == MAX_EXTENDS:
        what = f"more than {MAX_EXTENDS} recipes extend each other, or the recipes form a circle"
        fix = "remove one extends, or put several recipes into one file"
        raise RecipeError(what, where=extends.where, fix=fix)
    return merge_layers(_read_layers(base, announce, depth + 1), tree, announce=announce)
