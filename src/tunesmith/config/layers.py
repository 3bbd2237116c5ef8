"""Merging of recipe layers: a recipe file overrides the recipes that it extends, and the command
line overrides all files.

A later layer wins: its mappings are merged into the earlier ones, and its lists and scalars replace
them. If a layer names a new data source, the old split, columns and held-out rows are dropped,
because they belong to another data set. Every value keeps the file and line that it comes from.
"""

import json
import logging
import re
import reprlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tunesmith.config.names import keys, without_indices
from tunesmith.config.paths import resolve_paths
from tunesmith.config.schema import Run, is_section
from tunesmith.config.tree import MAX_DEPTH, Node, read_value, wrap
from tunesmith.errors import RecipeError

log = logging.getLogger(__name__)

COMMAND_LINE = "command line"
FROM_PYTHON = "overrides"
# Overrides of a recipe: a mapping from dotted keys to values, or a list of `key=value` texts.
Overrides = Mapping[str, object] | Sequence[str]
_DOTTED_KEY = re.compile(rf"[\w-]+(\.[^.\s]+){{0,{MAX_DEPTH}}}")


def merge_layers(lower: Node, upper: Node, *, announce: bool = False) -> Node:
    """Merge two layers of a recipe. Values of the upper layer win.

    Args:
        announce: log a line with the data keys that are dropped because of a new data source.
    """
    lower = with_method_section(lower)
    upper = with_method_section(upper)
    merged = _merge(lower, upper)
    remaining = {key for tree in (upper, merged) for key, _ in tree.places()}
    dropped = [key for key, _ in lower.places() if key.startswith("data.") and key not in remaining]
    # If an entire section is dropped, list only the section and not its keys.
    shown = [key for key in dropped if key.rpartition(".")[0] not in dropped]
    if shown and announce:
        text = (
            f"{upper.where} names another data source, so the run does not use these keys of the"
            f" recipe that is overridden: {', '.join(shown)}"
        )
        has_validation = {"data.validation", "data.hold_out"} & remaining
        if "data.validation" in dropped and not has_validation:
            text += (
                ". No validation rows are left: add data.hold_out='5 %' to hold out some of the"
                " training rows"
            )
        log.info(text)
    return merged


def override_words(overrides: Overrides) -> list[str]:
    """Return the overrides as `key.sub=value` texts, the format of the command line."""
    if isinstance(overrides, str):
        return [overrides]
    if isinstance(overrides, Mapping):
        # JSON is valid YAML, and its quotes keep YAML from reading a text as a number or bool.
        return [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]
    return [*overrides]


def override_layer(overrides: Overrides) -> Node:
    """Combine all overrides into one layer. If a key is set twice, the last value is used.

    Args:
        overrides: a mapping `{"key.sub": value}`, one text `key.sub=value`, or a list of texts.
    """
    if isinstance(overrides, str):
        overrides = [overrides]
    is_mapping = isinstance(overrides, Mapping)
    origin = FROM_PYTHON if is_mapping else COMMAND_LINE
    base = Path.cwd()
    layer = Node({}, origin, base)
    for text in overrides:
        key, equals, value = map(str.strip, str(text).partition("="))
        has_value = bool(equals)
        # If `overrides` is a mapping, its keys must not contain "=". If it is a list of texts, each
        # text must contain "=".
        if has_value == is_mapping or not _DOTTED_KEY.fullmatch(key):
            form = '{"key.sub": value}' if is_mapping else "key.sub=value"
            raise RecipeError(
                f"{reprlib.repr(text)} is not of the form {form}",
                where=origin,
                fix="write overrides such as train.learning_rate=2e-4, or in Python"
                ' {"train.learning_rate": 2e-4}; put an override with spaces in quotes:'
                " 'train.duration=3 epochs'",
            )
        if isinstance(overrides, Mapping):
            node = wrap(overrides[text], where=origin, base=base, key=key)
        else:
            node = read_value(value, where=f"{origin}: {key}", base=base)
        if key == "extends":
            fix = f"name the recipe {value} in the command, or write extends into the recipe file"
            raise RecipeError("extends is only allowed in a recipe file", where=node.where, fix=fix)
        # Build the nested mapping from the inside: a.b=1 becomes {a: {b: 1}}.
        for name in reversed(key.split(".")):
            node = Node({name: node}, node.where, base)
        layer = _merge(layer, with_method_section(node), same_layer=True)
    return layer


def with_method_section(tree: Node) -> Node:
    """Return the recipe with `method: dpo` expanded to `method: {name: dpo}`.

    Other keys of `method` can then be merged into the mapping.
    """
    values = dict(tree.children())
    method = values.get("method")
    if method is None or not isinstance(method.value, str):
        return tree
    section = replace(method, value={"name": method})
    return replace(tree, value={**values, "method": section})


def _merge(lower: Node, upper: Node, key: str = "", *, same_layer: bool = False) -> Node:
    """Merge the values of two layers at `key`. Values of the upper layer win.

    Mappings are merged, and every other value is replaced. A null also replaces, even if the key
    does not accept null: `build_run` then raises an error. Otherwise `train.learning_rate=$UNSET`
    would silently use the default.

    Args:
        same_layer: `upper` is one command-line override and `lower` holds the overrides before it.
            An override of a part of a key, such as `train.global_batch.x`, may then not replace an
            override of the entire key.
    """
    are_mappings = isinstance(lower.value, dict) and isinstance(upper.value, dict)
    _, hint = keys().get(without_indices(key), (None, Run))
    # An empty mapping clears the value of a key such as `columns`, whose value is a mapping. For a
    # section, such as `train: {}`, an empty mapping changes nothing.
    if not are_mappings or not (upper.value or is_section(hint)):
        is_part = isinstance(upper.value, dict) and upper.value
        if same_layer and is_part and lower.value is not None:
            raise RecipeError(
                f"one override sets {key}, and another override sets only a key in {key}",
                where=upper.where,
                fix=f"set {key} completely in one override",
            )
        return upper
    values = dict(lower.children())
    # Drop values of the lower layer that no longer apply. For example, drop `columns` if the upper
    # layer names another data source.
    if not same_layer:
        values = _without_stale(lower, upper, key)
    merged = dict(values)
    for name, node in upper.children():
        if name in values:
            path = f"{key}.{name}".lstrip(".")
            merged[name] = _merge(values[name], node, path, same_layer=same_layer)
        else:
            merged[name] = node
    # If a required key is missing, the error must point to the recipe file and not to the command
    # line. Keep the position of the lower layer if the upper layer is an override.
    is_override = upper.where.startswith((COMMAND_LINE, FROM_PYTHON))
    return replace(lower if is_override else upper, value=merged)


def _without_stale(lower: Node, upper: Node, key: str) -> dict[str, Node]:
    """Return the values of the lower layer at `key` that still apply with the upper layer."""
    values = dict(lower.children())
    changes = dict(upper.children())
    # The split and the columns of one data set do not apply to another data set.
    names_source = "source" in values and "source" in changes
    if names_source and _sources(lower) != _sources(upper):
        return {}
    # With `adapter.kind: none` the other adapter keys have no effect, so drop them.
    if key == "adapter" and "kind" in changes and changes["kind"].value == "none":
        return {}
    # The parameters of one method, such as `beta`, do not apply to another method.
    if key == "method" and "name" in changes:
        name = values["name"].value if "name" in values else "sft"
        if changes["name"].value != name:
            return {}
    # If the training source changes, drop the validation rows, because they are from the old data
    # set.
    if key == "data" and "train" in values and "train" in changes:
        train = _merge(values["train"], changes["train"], "data.train")
        if _sources(train) != _sources(values["train"]):
            values.pop("validation", None)
    return values


def _sources(rows: Node) -> list[object]:
    """Return the sources of `rows`, such as `data.train`, as Hub ids and absolute paths."""
    sources = []
    for entry in rows.value if isinstance(rows.value, list) else [rows]:
        source = dict(entry.children()).get("source")
        if source is None:
            continue
        # Ignore an invalid source for now: a later layer may replace it, and the final recipe is
        # checked again.
        with suppress(RecipeError):
            source = resolve_paths(source, "data.train.source")
        sources.append(source.plain())
    return sources
