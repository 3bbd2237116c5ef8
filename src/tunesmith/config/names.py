"""The recipe key or value that a mistyped or foreign name most likely means."""

import difflib
import json
import re
import types
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from tunesmith.config.schema import Run, is_section, yaml_name
from tunesmith.config.tree import read_file
from tunesmith.units import Length, Share, Size


@cache
def keys() -> dict[str, tuple[Field[Any], Any]]:
    """Every dotted key with its field and type.

    Those of a source stand under `data.train` and `data.validation`.
    """
    return dict(_keys_below(Run, ""))


def _keys_below(section: type, prefix: str) -> Iterator[tuple[str, tuple[Field[Any], Any]]]:
    hints = get_type_hints(section)
    for spec in fields(section):
        key = prefix + yaml_name(spec.name)
        hint = hints[spec.name]
        yield key, (spec, hint)
        # A section itself, or a list of them.
        for inner in (hint, *get_args(hint)[:1]):
            if is_section(inner):
                yield from _keys_below(inner, f"{key}.")


def without_indices(key: str) -> str:
    """The key of the schema: `data.train.0.split` -> `data.train.split`."""
    return re.sub(r"\.[0-9]+(?=\.|$)", "", key)


@cache
def other_tools(section: str) -> dict[str, str]:
    """Names of other tools and what to write here; `section` is `keys`, `words` or `absent`."""
    table = read_file(Path(__file__).with_name("other_tools.yaml")).plain()[section]
    return {name: meaning for meaning, names in table.items() for name in names}


def nearest(word: str, choices: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The choice that a mistyped word most likely means; None if none is near.

    cutoff: the least similarity, of 1 for the same word.
    """
    choices = list(choices)
    plain = _plain(word)
    for choice in choices:
        if _plain(choice) == plain:
            return choice
    for meaning in other_tools("words").get(word.lower(), "").split():
        if meaning in choices:
            return meaning
    similar = difflib.get_close_matches(word, choices, n=1, cutoff=cutoff)
    return similar[0] if similar else None


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def suggest_key(section: str, name: str) -> str:
    """Suggest, in one line, what replaces an unknown key `name` of `section` ("" at the top)."""
    siblings = [_last(key) for key in keys() if key.rpartition(".")[0] == section]
    plain = _plain(name)
    # `train.seed` below a section: the form of the command line in a file.
    if f"{section}.{name}".lstrip(".") in keys():
        outer, _, inner = name.rpartition(".")
        return (
            f"nest the keys in a file: {outer}: {{{inner}: ...}};"
            " the form with a dot is for the command line"
        )
    # Keys of other tools that mean the same here.
    if plain in other_tools("keys"):
        return f"here it is {other_tools('keys')[plain]}"
    suggestion = nearest(plain, siblings)
    names = {_last(key) for key in keys()}
    # A key of that name elsewhere is likelier meant than one that looks alike here.
    if plain in names:
        suggestion = _keys_named(plain)
    elif suggestion:
        suggestion = f"{section}.{suggestion}".lstrip(".")
    else:
        suggestion = _keys_named(nearest(plain, names))
    if suggestion:
        return f"did you mean {suggestion}?"
    return f"{section or 'a recipe'} has {', '.join(siblings)}"


def members(hint: object) -> tuple[object, ...]:
    """The alternatives of a union, or the one type that it is."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def default_of(spec: Field[Any]) -> str:
    """The default of a key as YAML; empty if it has none."""
    value = spec.default if spec.default_factory is MISSING else spec.default_factory()
    if value is MISSING:
        return ""
    if isinstance(value, str | Length | Size | Share):
        return str(value)
    return "{}" if is_dataclass(value) else json.dumps(value)


def example(hint: Any, spec: Field[Any]) -> str:
    """A value of a key as YAML: its example or default, or one that its type takes."""
    if hint is bool:
        return "true"
    value = spec.metadata["example"] or default_of(spec)
    if value != "null":
        return value
    return "8" if int in members(hint) else "name"


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _keys_named(name: str | None) -> str:
    return " or ".join(key for key in keys() if _last(key) == name)
