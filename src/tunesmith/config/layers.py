"""Layers of a recipe over each other: a file over those that it extends, and the command line over
all.

Later layers win: mappings are merged, lists and scalars replaced. A new source of rows takes
nothing from the layers below, because the split, the columns and the held-out rows of one data set
mean nothing in another. Every value keeps the place it came from.
"""

import json
import logging
import re
import reprlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import get_origin

from tunesmith.config.names import keys, without_indices
from tunesmith.config.paths import resolve_paths
from tunesmith.config.tree import MAX_DEPTH, Node, read_value, wrap
from tunesmith.errors import RecipeError

log = logging.getLogger(__name__)

COMMAND_LINE = "command line"
FROM_PYTHON = "overrides"
_DOTTED_KEY = re.compile(rf"[\w-]+(\.[^.\s]+){{0,{MAX_DEPTH}}}")


def merge_layers(lower: Node, upper: Node, *, announce: bool = False) -> Node:
    """The upper layer over the lower.

    announce: log a line about what a new source of rows leaves behind.
    """
    lower = with_method_section(lower)
    upper = with_method_section(upper)
    merged = _merge(lower, upper)
    remaining = {key for tree in (upper, merged) for key, _ in tree.places()}
    dropped = []
    for key, _ in lower.places():
        if key.startswith("data.") and key not in remaining:
            dropped.append(key)
    # Of a section that is dropped as a whole, its own name is enough.
    shown = [key for key in dropped if key.rpartition(".")[0] not in dropped]
    if shown and announce:
        text = (
            f"{upper.where} names other rows, so it does not inherit {', '.join(shown)} from the"
            " recipe that it changes"
        )
        has_validation = {"data.validation", "data.hold_out"} & remaining
        if "data.validation" in dropped and not has_validation:
            text += "; nothing is left to validate on: data.hold_out='5 %' holds out rows of yours"
        log.info(text)
    return merged


def override_words(overrides: Mapping[str, object] | Sequence[str]) -> list[str]:
    """Return overrides as texts `key.sub=value`, as the command line takes them."""
    if isinstance(overrides, str):
        return [overrides]
    if isinstance(overrides, Mapping):
        # JSON is YAML. In quotes, no text is read as anything else.
        return [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]
    return [*overrides]


def override_layer(overrides: Mapping[str, object] | Sequence[str]) -> Node:
    """One layer of all overrides, whatever their order.

    Args:
        overrides: `{"key.sub": value}`, or texts `key.sub=value`; a single text is one.
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
        # A mapping from Python has keys and values apart; a word has both in one text.
        if has_value == is_mapping or not _DOTTED_KEY.fullmatch(key):
            raise RecipeError(
                f"{reprlib.repr(text)} is not of the form key.sub=value",
                where=origin,
                fix="such as train.learning_rate=2e-4; with spaces in quotes:"
                " 'train.duration=3 epochs'",
            )
        if isinstance(overrides, Mapping):
            node = wrap(overrides[text], where=origin, base=base, key=key)
        else:
            node = read_value(value, where=f"{origin}: {key}", base=base)
        if key == "extends":
            fix = "use that recipe instead of this one"
            raise RecipeError("extends is only allowed in a file", where=node.where, fix=fix)
        # From the inside out: a.b=1 is {a: {b: 1}}.
        for name in reversed(key.split(".")):
            node = Node({name: node}, node.where, base)
        layer = _merge(layer, with_method_section(node), same_layer=True)
    return layer


def with_method_section(tree: Node) -> Node:
    """The recipe with `method: dpo` written `method: {name: dpo}`, which other keys can join."""
    values = dict(tree.children())
    method = values.get("method")
    if method is None or not isinstance(method.value, str):
        return tree
    section = replace(method, value={"name": method})
    return replace(tree, value={**values, "method": section})


def _merge(lower: Node, upper: Node, key: str = "", *, same_layer: bool = False) -> Node:
    """The upper layer over the lower at `key`.

    Mappings are merged, all else is replaced: also by a null, of a key that takes none. `build_run`
    refuses it there, and `train.learning_rate=` of an unset variable does not pass for the default.

    Args:
        same_layer: the upper one is a single override, and the lower one those before it, which all
            stay.
    """
    are_mappings = isinstance(lower.value, dict) and isinstance(upper.value, dict)
    # An empty mapping clears a key that takes one, such as columns; over a section it changes
    # nothing.
    if not are_mappings or (not upper.value and _takes_mapping(key)):
        is_part = isinstance(upper.value, dict) and upper.value
        if same_layer and is_part and lower.value is not None:
            what = f"{key} is given as a whole, and a part of it"
            raise RecipeError(what, where=upper.where, fix=f"set all of {key} instead")
        return upper
    values = dict(lower.children())
    # What a lower layer says may mean nothing under the upper one, as columns of other rows.
    if not same_layer:
        values = _without_stale(lower, upper, key)
    merged = dict(values)
    for name, node in upper.children():
        if name in values:
            path = f"{key}.{name}".lstrip(".")
            merged[name] = _merge(values[name], node, path, same_layer=same_layer)
        else:
            merged[name] = node
    # A key that is missing is missing in the file, whatever the command line gives beside it.
    is_override = upper.where.startswith((COMMAND_LINE, FROM_PYTHON))
    # So the place of an error is that of the lower layer.
    return replace(lower if is_override else upper, value=merged)


def _takes_mapping(key: str) -> bool:
    """Tell whether a key that is no section takes a mapping or list; an empty mapping clears it."""
    key = without_indices(key)
    if key not in keys():
        return False
    _, hint = keys()[key]
    return get_origin(hint) in (dict, tuple)


def _without_stale(lower: Node, upper: Node, key: str) -> dict[str, Node]:
    """The values of a lower layer at `key` that still mean something under the upper one."""
    values = dict(lower.children())
    changes = dict(upper.children())
    # The split and the columns of one data set mean nothing in another.
    names_source = "source" in values and "source" in changes
    if names_source and _sources(lower) != _sources(upper):
        return {}
    # `adapter.kind: none` leaves the adapter's other keys without effect.
    if key == "adapter" and "kind" in changes and changes["kind"].value == "none":
        return {}
    # Each method has its own numbers.
    if key == "method" and "name" in changes:
        name = values["name"].value if "name" in values else "sft"
        if changes["name"].value != name:
            return {}
    # Neither do the rows held out of one data set.
    if key == "data" and "train" in values and "train" in changes:
        train = _merge(values["train"], changes["train"], "data.train")
        if _sources(train) != _sources(values["train"]):
            values.pop("validation", None)
    return values


def _sources(rows: Node) -> list[object]:
    """List the sources of `data.train`: Hub ids and absolute paths."""
    sources = []
    for entry in rows.value if isinstance(rows.value, list) else [rows]:
        if not isinstance(entry.value, dict) or "source" not in entry.value:
            continue
        source = entry.value["source"]
        # A text that is neither is refused later, unless a layer replaces it.
        with suppress(RecipeError):
            source = resolve_paths(source, "data.train.source")
        sources.append(source.plain())
    return sources
