"""Layers of a recipe over each other: a file over those that it extends, and the command line over all.

Later layers win: mappings are merged, lists and scalars replaced. A new source of rows takes nothing from the layers
below, because the split, the columns and the held-out rows of one data set mean nothing in another. Every value keeps
the place it came from.
"""

import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, get_origin

from tunesmith.config.names import keys, without_indices
from tunesmith.config.paths import resolve_paths
from tunesmith.config.tree import MAX_DEPTH, Node, read_value, wrap
from tunesmith.errors import RecipeError

COMMAND_LINE, FROM_PYTHON = "command line", "overrides"
_KEY = re.compile(rf"[\w-]+(\.[^.\s]+){{0,{MAX_DEPTH}}}")


def merge_layers(lower: Node, upper: Node, say: Callable[[str], None] | None) -> Node:
    """The upper layer over the lower; `say` takes a line about what a new source of rows leaves behind."""
    merged = _merge(lower, upper)
    kept = {**dict(upper.places()), **dict(merged.places())}
    lost = [key for key, _ in lower.places() if key.startswith("data.") and key not in kept]
    gone = [key for key in lost if key.rpartition(".")[0] not in lost]
    if gone and say:
        say(f"{upper.where} names other rows, so it does not take {', '.join(gone)} from the recipe that it changes")
    return merged


def override_layer(overrides: Mapping[str, Any] | Sequence[str]) -> Node:
    """One layer of all overrides, whatever their order: `{"key.sub": value}`, or texts `key.sub=value`."""
    origin, base = FROM_PYTHON if isinstance(overrides, Mapping) else COMMAND_LINE, Path.cwd()
    layer = Node({}, origin, base)
    for text in overrides:
        key, found, value = map(str.strip, str(text).partition("="))
        if bool(found) == isinstance(overrides, Mapping) or not _KEY.fullmatch(key):
            fix = "such as train.learning_rate=2e-4; with spaces in quotes: 'train.duration=3 epochs'"
            raise RecipeError(f"{reprlib.repr(text)} is not of the form key.sub=value", where=origin, fix=fix)
        if isinstance(overrides, Mapping):
            node = wrap(overrides[text], where=origin, base=base, key=key)
        else:
            node = read_value(value, where=f"{origin}: {key}", base=base)
        if key == "extends":
            fix = "name that recipe in place of this one"
            raise RecipeError("extends belongs in a file", where=node.where, fix=fix)
        for name in reversed(key.split(".")):
            node = Node({name: node}, node.where, base)
        layer = _merge(layer, node, same_layer=True)
    return layer


def _merge(lower: Node, upper: Node, key: str = "", *, same_layer: bool = False) -> Node:
    """The upper layer over the lower at `key`, or with `same_layer` one override over those before it, which all stay.

    `adapter.kind: none` drops the adapter's other keys of the lower layer, which would have no effect. An empty mapping
    clears a key that is no section. A null replaces the value below, also of a key that takes none: `build_run` refuses it
    there, and `train.learning_rate=` of an unset variable does not pass for the default.
    """
    below, given = lower.value, upper.value
    if same_layer and isinstance(given, dict) and given and isinstance(below, str | int | float):
        what = f"{key}.{next(iter(given))}: there is no key {next(iter(given))!r} in a single value"
        raise RecipeError(what, where=upper.where, fix=f"give the whole of {key} instead")
    if isinstance(below, list) and isinstance(given, dict) and given and "source" not in given:
        items = dict(lower.children())
        for name, node in given.items():
            if name not in items:
                fix = f"name one of its entries by number, 0 to {len(items) - 1}" if items else "give the whole list"
                raise RecipeError(f"{key}: the list has no entry {name!r}", where=node.where, fix=fix)
            items[name] = _merge(items[name], node, f"{key}.{name}", same_layer=same_layer)
        return replace(lower, value=list(items.values()))
    cleared = not given and get_origin(keys().get(without_indices(key), (None, None))[1]) in (dict, tuple)
    if not isinstance(below, dict) or not isinstance(given, dict) or cleared:
        return upper
    if "source" in below and "0" in given and isinstance(given["0"].value, dict):  # data.train.0.split of one source
        given = {**{name: node for name, node in given.items() if name != "0"}, **given["0"].value}
        upper = replace(upper, value=given)
    unlike = "source" in below and "source" in given and _sources(lower) != _sources(upper)
    if not same_layer and (unlike or (key == "adapter" and "kind" in given and given["kind"].value == "none")):
        below = {}
    if not same_layer and key == "data" and "train" in below and "train" in given:
        rows = _sources(_merge(below["train"], given["train"], "data.train"))
        below = {n: node for n, node in below.items() if n != "validation" or rows == _sources(below["train"])}
    merged = dict(below)
    for name, node in given.items():
        path = f"{key}.{name}".lstrip(".")
        merged[name] = _merge(below[name], node, path, same_layer=same_layer) if name in below else node
    # A key that is missing is missing in the file, whatever the command line gives beside it.
    return replace(lower if upper.where.startswith((COMMAND_LINE, FROM_PYTHON)) else upper, value=merged)


def _sources(rows: Node) -> list[Any]:
    """What `data.train` is read from: Hub ids and absolute paths."""
    found = []
    for part in rows.value if isinstance(rows.value, list) else [rows]:
        if isinstance(part.value, dict) and "source" in part.value:
            found.append(part.value["source"])
            with suppress(RecipeError):  # a text that is neither is refused later, unless a layer replaces it
                found[-1] = resolve_paths(found[-1], "data.train.source")
    return [node.plain() for node in found]
