"""The forms of values in words: for the messages about a wrong one and for the reference page."""

from __future__ import annotations

import types
from dataclasses import is_dataclass
from typing import Any, Literal, Union, get_args, get_origin

from tunesmith.units import Length, Size

NoneType = type(None)
_PLAIN = {
    str: ("text", "name"),
    bool: ("true or false", "true"),
    int: ("a whole number", "8"),
    float: ("a number", "1e-4"),
    Length: ("a length", "200 steps"),
    Size: ("a size", "64 examples"),
    NoneType: ("null", "null"),
}


def members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the one type that it is."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def words(hint: Any) -> tuple[str, ...]:
    """The words that a type lists: `Literal["a", "b"] | int` -> ("a", "b")."""
    return tuple(w for member in members(hint) if get_origin(member) is Literal for w in get_args(member))


def form(hint: Any) -> str:
    """A type in words, such as `a whole number or auto`."""
    if hint in _PLAIN:
        return _PLAIN[hint][0]
    if get_origin(hint) is Literal:
        *listed, last = [f"`{word}`" for word in get_args(hint)]
        return f"{', '.join(listed)} or {last}" if listed else last
    if get_origin(hint) is tuple:
        return _several(get_args(hint))
    if get_origin(hint) is dict:
        return "a mapping of texts to texts"
    return "a mapping of keys" if is_dataclass(hint) else " or ".join(form(member) for member in members(hint))


def _several(inside: tuple[Any, ...]) -> str:
    if inside[-1] is not Ellipsis:
        return f"a list of {len(inside)} numbers"
    return "a mapping of keys, or a list of them" if is_dataclass(inside[0]) else "a list of texts"


def example(hint: Any) -> str:
    """A value of that type as one writes it in YAML."""
    if get_origin(hint) is Literal:
        return str(get_args(hint)[0])
    if hint in _PLAIN:
        return _PLAIN[hint][1]
    if get_origin(hint) is tuple:
        inside = get_args(hint)
        if inside[-1] is not Ellipsis:
            return "[" + ", ".join("0.9" for _ in inside) + "]"
        return "{source: rows.jsonl, format: messages}" if is_dataclass(inside[0]) else "[name]"
    if get_origin(hint) is dict:
        return "{instruction: question}"
    return example(members(hint)[0]) if members(hint) != (hint,) else "{}"
