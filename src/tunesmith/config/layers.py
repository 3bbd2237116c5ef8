"""Merging of recipe layers: a recipe file overrides the recipes that it extends, and the command
line overrides all files.

A later layer wins: its mappings are merged into the earlier ones, and its lists and scalars replace
them. If a layer names a new data source, the old split, columns and held-out rows are dropped,
because they belong to another data set. Every value keeps the file and line that it comes from.
"""

import logging
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.config.methods import DEFAULT_METHOD
from tunesmith.config.names import keys, without_indices
from tunesmith.config.paths import resolve_paths
from tunesmith.config.schema import Run, is_section
from tunesmith.config.yaml_file import MAX_DEPTH, RecipeLayer, as_json, read_value
from tunesmith.errors import RecipeError

log = logging.getLogger(__name__)

COMMAND_LINE = "command line"
FROM_PYTHON = "overrides"
# Overrides of a recipe: a mapping from dotted keys to values, or a list of `key=value` texts.
Overrides = Mapping[str, object] | Sequence[str]
_DOTTED_KEY = re.compile(rf"[\w-]+(\.[^.\s]+){{0,{MAX_DEPTH}}}")


def merge_layers(
    lower: RecipeLayer, upper: RecipeLayer, *, announce: bool = False, is_override: bool = False
) -> RecipeLayer:
    """Merge two layers of a recipe. Values of the upper layer win.

    Args:
        announce: log a line with the data keys that are dropped because of a new data source.
        is_override: whether `upper` is one override of the command line or of Python, and `lower`
            has the overrides before it. All of them then still apply.
    """
    lower = with_method_section(lower)
    upper = with_method_section(upper)
    values = _merge(lower.values, upper.values, is_override=is_override)
    remaining = set(_nested_keys(values))
    positions = {**lower.positions, **upper.positions}
    positions = {key: where for key, where in positions.items() if key in remaining}
    # If a required key is missing, the error must point to the recipe file and not to the command
    # line.
    where = upper.positions.get("", COMMAND_LINE)
    positions[""] = lower.where() if where.startswith((COMMAND_LINE, FROM_PYTHON)) else where
    if announce:
        _announce_dropped(lower, upper, remaining)
    return RecipeLayer(values, positions)


def _nested_keys(values: object, key: str = "") -> Iterator[str]:
    """Yield the dotted key of each value: of sections, of list items and of scalars."""
    if isinstance(values, list):
        values = dict(enumerate(values))
    if isinstance(values, dict):
        for name, value in values.items():
            path = f"{key}.{name}".lstrip(".")
            yield path
            yield from _nested_keys(value, path)


def _announce_dropped(lower: RecipeLayer, upper: RecipeLayer, merged: set[str]) -> None:
    """Log a line with the data keys of the lower layer that the merged layer does not have."""
    remaining = merged | upper.positions.keys()
    dropped = [key for key in lower.positions if key.startswith("data.") and key not in remaining]
    # If an entire section is dropped, list only the section and not its keys.
    shown = [key for key in dropped if key.rpartition(".")[0] not in dropped]
    if shown:
        text = (
            f"{upper.where()} names another data source, so the run does not use these keys of the"
            f" recipe that is overridden: {', '.join(shown)}"
        )
        has_validation = {"data.validation", "data.hold_out"} & remaining
        if "data.validation" in dropped and not has_validation:
            text += (
                ". No validation rows are left: add data.hold_out='5 %' to hold out some of the"
                " training rows"
            )
        log.info(text)


def override_words(overrides: Overrides) -> list[str]:
    """Return the overrides as `key.sub=value` texts, the format of the command line."""
    if isinstance(overrides, str):
        return [overrides]
    if isinstance(overrides, Mapping):
        return [f"{key}={as_json(value)}" for key, value in overrides.items()]
    return [*overrides]


def override_layer(overrides: Overrides) -> RecipeLayer:
    """Combine all overrides into one layer. If a key is set twice, the last value is used.

    Args:
        overrides: a mapping `{"key.sub": value}`, one text `key.sub=value`, or a list of texts.
    """
    origin = FROM_PYTHON if isinstance(overrides, Mapping) else COMMAND_LINE
    layer = RecipeLayer({}, {"": origin})
    for text in override_words(overrides):
        key, equals, value = map(str.strip, str(text).partition("="))
        if not equals or not _DOTTED_KEY.fullmatch(key):
            raise RecipeError(
                f"{reprlib.repr(text)} is not of the form key.sub=value",
                where=origin,
                fix="write overrides such as train.learning_rate=2e-4, or in Python"
                ' {"train.learning_rate": 2e-4}; put an override with spaces in quotes:'
                " 'train.duration=3 epochs'",
            )
        where = f"{origin}: {key}"
        if key == "extends":
            fix = f"name the recipe {value} in the command, or write extends into the recipe file"
            raise RecipeError("extends is only allowed in a recipe file", where=where, fix=fix)
        layer = merge_layers(layer, read_value(value, key, where), is_override=True)
    return resolve_paths(layer, Path.cwd())


def with_method_section(layer: RecipeLayer) -> RecipeLayer:
    """Return the recipe with `method: dpo` expanded to `method: {name: dpo}`.

    Other keys of `method` can then be merged into the mapping.
    """
    method = layer.values.get("method")
    if not isinstance(method, str):
        return layer
    positions = {**layer.positions, "method.name": layer.where("method")}
    return RecipeLayer({**layer.values, "method": {"name": method}}, positions)


def _merge(lower: Any, upper: Any, key: str = "", *, is_override: bool = False) -> Any:
    """Merge the values of two layers at `key`. Values of the upper layer win.

    Mappings are merged, and every other value is replaced. A null also replaces, even if the key
    does not accept null: `parse_run` then finds an error. Otherwise `train.learning_rate=$UNSET`
    would silently use the default.
    """
    are_mappings = isinstance(lower, dict) and isinstance(upper, dict)
    _, hint = keys().get(without_indices(key), (None, Run))
    # An empty mapping clears the value of a key such as `columns`, whose value is a mapping. For a
    # section, such as `train: {}`, an empty mapping changes nothing.
    if not are_mappings or not (upper or is_section(hint)):
        return upper
    # Drop values of the lower layer that no longer apply. For example, drop `columns` if the upper
    # layer names another data source.
    merged = lower if is_override else _without_stale(lower, upper, key)
    both = {
        name: _merge(
            merged[name], upper[name], f"{key}.{name}".lstrip("."), is_override=is_override
        )
        for name in merged.keys() & upper
    }
    return {**merged, **upper, **both}


def _without_stale(lower: dict[str, Any], upper: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the values of the lower layer at `key` that still apply with the upper layer."""
    # The split and the columns of one data set do not apply to another data set.
    names_source = "source" in lower and "source" in upper
    if names_source and lower["source"] != upper["source"]:
        return {}
    # With `adapter.kind: none` the other adapter keys have no effect, so drop them.
    if key == "adapter" and upper.get("kind") == "none":
        return {}
    # The parameters of one method, such as `beta`, do not apply to another method.
    default = lower.get("name", DEFAULT_METHOD)
    if key == "method" and upper.get("name", default) != default:
        return {}
    # If the training source changes, drop the validation rows, because they are from the old data
    # set.
    if key == "data" and "train" in lower and "train" in upper:
        train = _merge(lower["train"], upper["train"], "data.train")
        if _sources(train) != _sources(lower["train"]):
            return {name: value for name, value in lower.items() if name != "validation"}
    return lower


def _sources(rows: object) -> list[object]:
    """Return the sources of `data.train`, which is one source or a list of sources."""
    entries = rows if isinstance(rows, list) else [rows]
    return [row["source"] for row in entries if isinstance(row, dict) and "source" in row]
