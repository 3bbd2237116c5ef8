"""A recipe file and its overrides -> one frozen, checked `Run`.

    file -> extends, from the base up -> key=value -> absolute paths -> types -> rules

Later layers win: mappings are merged, lists and scalars replaced. Every value keeps the place it came from, so an
error names the file and line, or the key on the command line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.config.check import check_run
from tunesmith.config.paths import resolve_paths
from tunesmith.config.schema import Run
from tunesmith.config.shipped import locate_recipe
from tunesmith.config.tree import Node, read_file, read_value, wrap
from tunesmith.config.typed import build_run
from tunesmith.errors import RecipeError

COMMAND_LINE = "command line"
FROM_PYTHON = "overrides"


def load_recipe(recipe: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Run:
    """Read a recipe, apply overrides, check it.

    Args:
        recipe: a file, or the name of a recipe that ships.
        overrides: `{"key.sub": value}`, each value as it is, or texts `key.sub=value`, the value in YAML 1.2.

    Raises:
        RecipeError: anything wrong with the recipe or an override, with its place and fix.
        MachineError: something that this version cannot do.
    """
    tree = _read_layers(locate_recipe(recipe, base=Path(), where=str(recipe)), seen=())
    if isinstance(overrides, Mapping):
        given = [(key, wrap(value, where=FROM_PYTHON, base=Path.cwd(), key=key)) for key, value in overrides.items()]
    else:
        given = [_parse(text) for text in overrides]
    for key, node in given:
        tree = _override(tree, key, node)
    return _checked(tree)


def from_mapping(values: Mapping[str, Any], *, where: str, base: Path) -> Run:
    """A `Run` from plain values, as `to_mapping` gives them; raises as `load_recipe`.

    Args:
        values: the recipe; lists may be tuples.
        where: what errors call it, such as the file's name; the key is added.
        base: the folder that relative paths start from.
    """
    return _checked(wrap(values, where=where, base=base))


def _checked(tree: Node) -> Run:
    run, places = build_run(resolve_paths(tree)), dict(tree.places())
    check_run(run, lambda key: places.get(key, ""))
    return run


def _read_layers(path: Path, seen: tuple[Path, ...]) -> Node:
    """The file's tree over those of the recipes that it extends."""
    tree = read_file(path)
    assert isinstance(tree.value, dict)
    above = tree.value.pop("extends", None)
    if above is None:
        return tree
    if not isinstance(above.value, str):
        fix = "extends: llama3.1-8b-lora, or a file such as ../base.yaml"
        raise RecipeError("extends takes one recipe's name or file", where=above.where, fix=fix)
    base = locate_recipe(above.value, base=path.parent, where=above.where)
    chain = (*seen, path.resolve())
    if base.resolve() in chain:
        circle = " -> ".join(p.name for p in (*chain[chain.index(base.resolve()) :], base))
        what = "recipes extend each other in a circle"
        raise RecipeError(what, where=above.where, why=circle, fix="remove one extends")
    return _merge(_read_layers(base, chain), tree)


def _merge(lower: Node, upper: Node, key: str = "") -> Node:
    """The upper layer over the lower: mappings merged, all else replaced; places stay with their values.

    Full fine-tuning over a recipe with an adapter drops that adapter's keys: they would have no effect.
    """
    if not isinstance(lower.value, dict) or not isinstance(upper.value, dict):
        return upper
    below = lower.value
    if key == "adapter" and "kind" in upper.value and upper.value["kind"].value == "none":
        below = {name: node for name, node in below.items() if node.where.startswith((COMMAND_LINE, FROM_PYTHON))}
    merged = {name: _merge(below[name], node, name) if name in below else node for name, node in upper.value.items()}
    return replace(upper, value={**below, **merged})


def _parse(text: str) -> tuple[str, Node]:
    """Key and value of one `key.sub=value`."""
    key, found, value = text.partition("=")
    key = key.strip()
    if not found or not re.fullmatch(r"[\w-]+(\.[^.\s]+)*", key):
        fix = "such as train.learning_rate=2e-4; with spaces in quotes: 'train.duration=3 epochs'"
        raise RecipeError(f"{text!r} is not of the form key.sub=value", where=COMMAND_LINE, fix=fix)
    return key, read_value(value, where=f"{COMMAND_LINE}: {key}", base=Path.cwd())


def _override(tree: Node, key: str, node: Node) -> Node:
    """The tree with one value set."""
    if key == "extends":
        raise RecipeError("extends belongs in a file", where=node.where, fix="name that recipe in place of this one")
    if key == "adapter.kind":  # merged as a section, for what `none` drops
        key, node = "adapter", Node({"kind": node}, node.where, node.base)
    return _set(tree, key.split("."), node, key)


def _set(tree: Node, parts: list[str], node: Node, key: str) -> Node:
    """`node` at the path `parts` below `tree`; missing sections are made."""
    name, rest = parts[0], parts[1:]
    if isinstance(tree.value, list):
        if not name.isdigit() or int(name) >= len(tree.value):
            last = len(tree.value) - 1
            fix = f"name one of its entries by number, 0 to {last}" if tree.value else "give the whole list"
            raise RecipeError(f"{key}: the list has no entry {name!r}", where=node.where, fix=fix)
        items = list(tree.value)
        items[int(name)] = _set(items[int(name)], rest, node, key) if rest else node
        return replace(tree, value=items)
    if not isinstance(tree.value, dict):
        fix = f"give the whole of {key.removesuffix('.' + '.'.join(parts))} instead"
        raise RecipeError(f"{key}: there is no key {name!r} in a single value", where=node.where, fix=fix)
    if name == "0" and rest and name not in tree.value and "source" in tree.value:
        return _set(tree, rest, node, key)  # data.train.0.split of a single source
    below = tree.value.get(name)
    below = below if below and below.value is not None else Node({}, node.where, node.base)
    fresh = _set(below, rest, node, key) if rest else _merge(below, node, key)
    return replace(tree, value={**tree.value, name: fresh})
