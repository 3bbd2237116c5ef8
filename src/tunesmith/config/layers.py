"""Layers of a recipe over each other: a file over those that it extends, and the command line over all.

Later layers win: mappings are merged, lists and scalars replaced. A new source of rows takes nothing from the layers
below, because the split, the columns and the held-out rows of one data set mean nothing in another. Every value keeps
the place it came from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, replace
from pathlib import Path
from typing import Any, get_origin

from tunesmith.config.names import keys, without_indices
from tunesmith.config.paths import resolve_paths
from tunesmith.config.tree import MAX_DEPTH, Node, read_value, wrap
from tunesmith.config.typed import members
from tunesmith.errors import RecipeError

COMMAND_LINE, FROM_PYTHON = "command line", "overrides"


def merge_layers(lower: Node, upper: Node, say: Callable[[str], None] | None) -> Node:
    """The upper layer over the lower; `say` takes a line about what a new source of rows leaves behind."""
    merged = _merge(lower, upper)
    kept = {**dict(upper.places()), **dict(merged.places())}
    gone = [key for key, _ in lower.places() if key.startswith("data.") and key not in kept]
    gone = [key for key in gone if key.rpartition(".")[0] not in gone]
    if gone and say:
        say(f"{upper.where} names other rows, so it does not take {', '.join(gone)} from the recipe that it changes")
    return merged


def override_layer(overrides: Mapping[str, Any] | Sequence[str]) -> Node:
    """One layer of all overrides, whatever their order: `{"key.sub": value}`, or texts `key.sub=value`."""
    origin, base = FROM_PYTHON if isinstance(overrides, Mapping) else COMMAND_LINE, Path.cwd()
    layer = Node({}, origin, base)
    for text in overrides:
        key, found, value = str(text).partition("=")
        key, where = key.strip(), f"{origin}: {key.strip()}"
        if bool(found) == isinstance(overrides, Mapping) or not re.fullmatch(r"[\w-]+(\.[^.\s]+)*", key):
            form = '{"key.sub": value}' if isinstance(overrides, Mapping) else "key.sub=value"
            fix = "such as train.learning_rate=2e-4; with spaces in quotes: 'train.duration=3 epochs'"
            raise RecipeError(f"{text!r} is not of the form {form}", where=origin, fix=fix)
        if key == "extends":
            raise RecipeError("extends belongs in a file", where=where, fix="name that recipe in place of this one")
        if key.count(".") > MAX_DEPTH:
            fix = "the keys of a recipe: tunesmith recipes show smollm2-135m-lora"
            raise RecipeError("this key is too deeply nested", where=f"{where[:60]}...", fix=fix)
        if isinstance(overrides, Mapping):
            node = wrap(overrides[text], where=origin, base=base, key=key)
        else:
            node = read_value(value, where=where, base=base)
        layer = _set(layer, key.split("."), node, key)
    return layer


def _merge(lower: Node, upper: Node, key: str = "") -> Node:
    """The upper layer over the lower at `key`.

    `adapter.kind: none` drops the adapter's other keys of the lower layer, which would have no effect. A null clears a
    key that takes no null, and an empty mapping one that is no section.
    """
    below, given = lower.value, upper.value
    schema = keys().get(without_indices(key))
    if isinstance(below, list) and isinstance(given, dict) and given and "source" not in given:
        items = list(below)
        for name, node in given.items():
            at = _index(items, name, key, node.where)
            items[at] = _merge(items[at], node, f"{key}.{name}")
        return replace(lower, value=items)
    replaced = not given and schema is not None and get_origin(schema[1]) in (dict, tuple)
    if not isinstance(below, dict) or not isinstance(given, dict) or replaced:
        return upper
    if "source" in below and "0" in given and isinstance(given["0"].value, dict):  # data.train.0.split of one source
        given = {**{name: node for name, node in given.items() if name != "0"}, **given["0"].value}
        upper = replace(upper, value=given)
    if key == "adapter" and "kind" in given and given["kind"].value == "none":
        below = {}
    if "source" in below and "source" in given and _sources(lower) != _sources(upper):
        below = {}
    if key == "data" and "train" in below and "train" in given:
        rows = _sources(_merge(below["train"], given["train"], "data.train"))
        below = {n: node for n, node in below.items() if n != "validation" or rows == _sources(below["train"])}
    merged = dict(below)
    for name, node in given.items():
        path = f"{key}.{name}".lstrip(".")
        if name in below and node.value is None and _has_default_without_null(path):
            del merged[name]
        else:
            merged[name] = _merge(below[name], node, path) if name in below else node
    # A key that is missing is missing in the file, whatever the command line gives beside it.
    return replace(lower if upper.where.startswith((COMMAND_LINE, FROM_PYTHON)) else upper, value=merged)


def _has_default_without_null(key: str) -> bool:
    if (schema := keys().get(without_indices(key))) is None:
        return False
    spec, hint = schema
    return (spec.default, spec.default_factory) != (MISSING, MISSING) and type(None) not in members(hint)


def _sources(rows: Node) -> list[Any]:
    """What `data.train` is read from: Hub ids and absolute paths."""
    found = []
    for part in rows.value if isinstance(rows.value, list) else [rows]:
        if isinstance(part.value, dict) and "source" in part.value:
            found.append(part.value["source"])
            with suppress(RecipeError):  # a text that is neither is refused later, unless a layer replaces it
                found[-1] = resolve_paths(found[-1], "data.train.source")
    return [node.plain() for node in found]


def _set(tree: Node, parts: list[str], node: Node, key: str) -> Node:
    """`node` at the path `parts` below `tree`; missing sections are made, a mapping is set key by key."""
    if not parts:
        if not isinstance(node.value, dict) or not isinstance(tree.value, dict):
            return node
        for name, child in node.value.items():
            tree = _set(tree, [name], child, key)
        return tree
    name, rest = parts[0], parts[1:]
    if isinstance(tree.value, list):
        items, at = list(tree.value), _index(tree.value, name, key, node.where)
        items[at] = _set(items[at], rest, node, key)
        return replace(tree, value=items)
    if not isinstance(tree.value, dict):
        fix = f"give the whole of {key.removesuffix('.' + '.'.join(parts))} instead"
        raise RecipeError(f"{key}: there is no key {name!r} in a single value", where=node.where, fix=fix)
    if name == "0" and rest and "source" in tree.value:
        return _set(tree, rest, node, key)  # data.train.0.split of a single source
    below = tree.value.get(name)
    below = below if below and below.value is not None else Node({}, node.where, node.base)
    fresh = _set(below, rest, node, key) if rest or name in tree.value else node
    return replace(tree, value={**tree.value, name: fresh})


def _index(items: Sequence[Node], name: str, key: str, where: str) -> int:
    """The place in a list that a part of a key names."""
    place = {str(i): i for i in range(len(items))}.get(name)
    if place is None:
        fix = f"name one of its entries by number, 0 to {len(items) - 1}" if items else "give the whole list"
        raise RecipeError(f"{key}: the list has no entry {name!r}", where=where, fix=fix)
    return place
