"""The types and values of recipe keys in words, for errors and for the reference page."""

from __future__ import annotations

import json
import types
from dataclasses import MISSING, Field, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin

from tunesmith.units import Length, Size

_FORMS = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    Length: "a length",
    Size: "a size",
    type(None): "null",
}


def members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the one type that it is."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def words(hint: Any) -> tuple[str, ...]:
    """The words that a type lists: `Literal["a", "b"] | int` -> ("a", "b")."""
    return tuple(word for member in members(hint) if get_origin(member) is Literal for word in get_args(member))


def form(hint: Any) -> str:
    """A type in words, such as "a whole number or `auto`"."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Literal:
        listed = [f"`{word}`" for word in inside]
        return " or ".join([", ".join(listed[:-1]), listed[-1]] if listed[:-1] else listed)
    if origin is tuple and is_dataclass(inside[0]):
        return "a mapping of keys, or a list of them"
    if origin is tuple:
        return "a list of texts" if inside[-1] is Ellipsis else f"a list of {len(inside)} numbers"
    if origin is dict:
        return "a mapping of texts to texts"
    plain = _FORMS.get(hint) or ("a mapping of keys" if is_dataclass(hint) else "")
    return plain or " or ".join(form(member) for member in members(hint))


def default_of(spec: Field[Any]) -> str:
    """The default of a key as YAML; empty if it has none."""
    value = spec.default if spec.default_factory is MISSING else spec.default_factory()
    if value is MISSING:
        return ""
    if isinstance(value, str | Length | Size):
        return str(value)
    return "{}" if is_dataclass(value) else json.dumps(value)


def example(hint: Any, spec: Field[Any]) -> str:
    """A value of a key as YAML: its example or default, or one that its type takes."""
    default = "true" if hint is bool else spec.metadata["example"] or default_of(spec)
    return default if default != "null" else "8" if int in members(hint) else "name"
