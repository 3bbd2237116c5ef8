"""Lookup of recipe keys and values, and suggestions for names that are mistyped or belong to
another tool.
"""

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
from tunesmith.config.yaml_file import read_file
from tunesmith.units import Length, Share, Size


@cache
def keys() -> dict[str, tuple[Field[Any], Any]]:
    """Return every dotted key of the schema with its dataclass field and type.

    The keys of a data source are included twice, with the prefixes `data.train.` and
    `data.validation.`.
    """
    return dict(_keys_below(Run, ""))


def _keys_below(section: type, prefix: str) -> Iterator[tuple[str, tuple[Field[Any], Any]]]:
    hints = get_type_hints(section)
    for spec in fields(section):
        key = prefix + yaml_name(spec.name)
        hint = hints[spec.name]
        yield key, (spec, hint)
        # The type can be a section or a tuple of sections. For example, `data.train` is
        # tuple[Source, ...].
        for inner in (hint, *get_args(hint)[:1]):
            if is_section(inner):
                yield from _keys_below(inner, f"{key}.")


def without_indices(key: str) -> str:
    """Remove list indices from a key: `data.train.0.split` -> `data.train.split`."""
    return re.sub(r"\.[0-9]+(?=\.|$)", "", key)


@cache
def other_tools(section: str) -> dict[str, str]:
    """Return a dict from each name that other tools use to its entry in other_tools.yaml.

    Args:
        section: the part of other_tools.yaml: `keys`, `words` or `absent`.
    """
    table = read_file(Path(__file__).with_name("other_tools.yaml")).values[section]
    return {name: meaning for meaning, names in table.items() for name in names}


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice that a mistyped word most likely means, or None if no choice is similar."""
    choices = list(choices)
    plain = _plain(word)
    for choice in choices:
        if _plain(choice) == plain:
            return choice
    for meaning in other_tools("words").get(word.lower(), "").split():
        if meaning in choices:
            return meaning
    similar = difflib.get_close_matches(word, choices, n=1)
    # A beginning such as `q4` for `q4_k_m` is too short to be similar.
    longer = [choice for choice in choices if len(word) > 1 and _plain(choice).startswith(plain)]
    return next(iter((*similar, *longer)), None)


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def suggest(word: str, choices: Iterable[str], *, otherwise: str) -> str:
    """Return the fix for an unknown word: the choice that it most likely means, or `otherwise`."""
    near = nearest(word, choices)
    return f"did you mean {near}?" if near else otherwise


def suggest_key(key: str, *, on_command_line: bool = False) -> str:
    """Return the fix for an unknown dotted key.

    Args:
        on_command_line: write settings as `key=value` instead of `key: value`.
    """
    key = without_indices(key)
    section, _, name = key.rpartition(".")
    if key in keys():
        return (
            f"nest the keys, as in `{section}: {{{name}: ...}}`;"
            " only the command line takes the form with a dot"
        )
    name = _plain(name)
    # The key belongs to another tool, and other_tools.yaml lists the equivalent recipe key.
    setting = other_tools("keys").get(name)
    if setting:
        return f"write {_as_argument(setting) if on_command_line else setting}"
    siblings = [one for one in keys() if one.rpartition(".")[0] == section]
    # If another section has a key of exactly this name, suggest this key instead of a similar name
    # in the given section.
    names = {last_part(one): one for one in siblings}
    everywhere = {last_part(one) for one in keys()}
    near = name if name in everywhere else nearest(name, names) or nearest(name, everywhere)
    near = names.get(near or "") or _keys_named(near)
    if near:
        return f"did you mean {near}?"
    return f"use one of the keys of {section or 'a recipe'}: {', '.join(names)}"


def _as_argument(setting: str) -> str:
    """Convert an entry of other_tools.yaml, such as `train.learning_rate: 1e-4`, to the format of
    the command line.

    If the value has several words, write VALUE and append the entry.
    """
    key, _, value = setting.partition(": ")
    if re.fullmatch(r"[\w.-]+", value):
        return f"{key}={value}"
    return f"{key}=VALUE" + (f" (in a file: {setting})" if value else "")


def members(hint: object) -> tuple[object, ...]:
    """Return the members of a union type. For any other type, return a tuple with the type."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def default_of(spec: Field[Any]) -> str:
    """Return the default of a key as YAML text, or "" if the key is required."""
    value = spec.default if spec.default_factory is MISSING else spec.default_factory()
    if value is MISSING:
        return ""
    if isinstance(value, str | Length | Size | Share):
        return str(value)
    return "{}" if is_dataclass(value) else json.dumps(value)


def example(key: str) -> str:
    """Return an example value of a dotted key as YAML text.

    Use the key's `example` if there is one, else its default, else any value of its type.
    """
    name = without_indices(key)
    # Only an entry of a mapping, such as data.train.columns.prompt, is not a key of the schema.
    if name not in keys():
        return "name"
    spec, hint = keys()[name]
    if hint is bool:
        return "true"
    value = spec.metadata["example"] or default_of(spec)
    if value != "null":
        return value
    return "8" if int in members(hint) else "name"


def last_part(name: str) -> str:
    """Return the last part of a dotted name: of a recipe key, a module or a parameter."""
    return name.rpartition(".")[2]


def _keys_named(name: str | None) -> str:
    return " or ".join(key for key in keys() if last_part(key) == name)
