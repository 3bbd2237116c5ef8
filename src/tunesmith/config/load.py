"""Loader that turns a recipe file and its overrides into one frozen, checked `Run`.

The steps are:

    read the file -> merge it over the recipes that it extends -> apply key=value overrides
    -> check types -> check the rules of check.py

Every value keeps the file and line, or the command-line key, that it comes from. Error messages
show this position.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tunesmith.config.check import find_problems, sources_with_keys
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
from tunesmith.config.trust import TRUSTS_CODE, check_trust
from tunesmith.config.typed import meant_by, parse_run, raise_together
from tunesmith.config.yaml_file import RecipeLayer, layer_of, read_file
from tunesmith.errors import RecipeError
from tunesmith.host.demo_model import DEMO_NAME, demo_model

# Maximum length of a chain of recipes in which each one extends the next.
MAX_EXTENDS = 20


def load_recipe(
    recipe: str | Path,
    overrides: Overrides = (),
    *,
    announce: bool = False,
    trusts_code: bool = False,
) -> Run:
    """Read a recipe, apply overrides and check the result.

    Args:
        recipe: a recipe file, or the name of a shipped recipe.
        overrides: a mapping `{"key.sub": value}` of Python values, or texts `key.sub=value` with
            the value in YAML 1.2.
        announce: log a line for each layer that names another data source, with the keys that are
            dropped because of it.
        trusts_code: whether model code and scorers that a file names are accepted. By default, they
            are accepted only in the user's own files, see `check_trust`.

    Raises:
        RecipeError: if the recipe is invalid. The error names the problem, the position and a fix.
        MachineError: if the recipe uses the model `demo`, which is not installed.
    """
    file = locate_recipe(recipe, base=Path(), where=str(recipe))
    layer = _read_layers(file, announce)
    layer = merge_layers(layer, override_layer(overrides), announce=announce)
    run = checked(layer)
    places = layer.positions
    # Without overrides, this can be the recipe of an earlier run in `output_dir`.
    if overrides:
        record_overrides(overridden_sources(run, places))
    if not (trusts_code or TRUSTS_CODE.get()):
        check_trust(run, places, file)
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


def from_mapping(values: Mapping[str, object], *, where: str, base: Path) -> Run:
    """Build a `Run` from plain values, the output of `to_mapping`.

    Args:
        where: the name of the source in error messages, such as the file's name.
        base: the folder that relative paths are relative to.

    Raises:
        RecipeError, MachineError: as in `load_recipe`.
    """
    return checked(resolve_paths(layer_of(values, where), base))


def checked(layer: RecipeLayer) -> Run:
    """Convert the values of a recipe to a `Run`, and check its rules.

    Raise RecipeError with all problems of the recipe.
    """
    layer = with_method_section(layer)
    run, errors = parse_run(layer)
    if run is not None:
        run = _with_defaults(run, layer.positions)
        problems = find_problems(run, layer)
        # A wrong key can cause a problem with another key. Such a problem mentions the wrong key.
        names = {part for key in errors for part in meant_by(key)}
        for key, problem in problems.items():
            if not any(name in f"{problem.what} {problem.fix}" for name in names):
                errors.setdefault(key, problem)
    order = [*layer.positions.values()]
    raise_together(sorted(errors.values(), key=lambda error: order.index(error.where)))
    assert run is not None
    if run.model.name == DEMO_NAME:
        run = replace(run, model=replace(run.model, name=str(demo_model())))
    return run


def _with_defaults(run: Run, places: Mapping[str, str]) -> Run:
    """Return the recipe with the defaults that depend on the training method."""
    method_format = run.method_facts.row_format
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
    return run


def _read_layers(path: Path, announce: bool, below: tuple[Path, ...] = ()) -> RecipeLayer:
    """Read a recipe file and merge it over the recipes that it extends.

    Args:
        below: the chain of files that extend this one.
    """
    layer = resolve_paths(read_file(path), path.parent)
    if "extends" not in layer.values:
        return layer
    # Remove `extends`, because the schema does not have this key.
    extends = layer.values.pop("extends")
    where = layer.where("extends")
    if not isinstance(extends, str):
        fix = "write extends: llama3.1-8b-lora, or a file such as ../base.yaml"
        raise RecipeError("extends must name one recipe or file", where=where, fix=fix)
    base = locate_recipe(extends, base=path.parent, where=where)
    chain = (*below, path)
    if len(chain) > MAX_EXTENDS or any(base.samefile(file) for file in chain):
        files = ", ".join(map(str, (*chain, base)))
        what = f"recipes extend each other in a circle, or more than {MAX_EXTENDS} do: {files}"
        fix = "remove one extends, or put several recipes into one file"
        raise RecipeError(what, where=where, fix=fix)
    return merge_layers(_read_layers(base, announce, chain), layer, announce=announce)
