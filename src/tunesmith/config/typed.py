"""A tree of recipe values becomes the frozen dataclasses of the schema; nothing is coerced.

The one step that is taken is from a whole number to a number where a number is asked for: `alpha: 16`.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from tunesmith.config.forms import NoneType, example, form, members, words
from tunesmith.config.names import instead, nearest, yaml_name
from tunesmith.config.tree import Node, children
from tunesmith.errors import RecipeError
from tunesmith.units import Length, Size

T = TypeVar("T")
MAX_INT = 2**63 - 1


def section(node: Node, cls: type[T], key: str = "") -> T:
    """One dataclass of the schema from a mapping.

    Raises:
        RecipeError: an unknown key, a missing one, or a value of the wrong form, each with its place.
    """
    if not isinstance(node.value, dict):
        raise _wrong(node, cls, key)
    hints = get_type_hints(cls)
    known = {yaml_name(f.name): f for f in fields(cast(Any, cls))}
    for name, value in node.value.items():
        if name not in known:
            what = f"unknown key {f'{key}.{name}' if key else name}"
            raise RecipeError(what, where=value.where, fix=instead(_section(key), name))
    values = {}
    for name, spec in known.items():
        below = f"{key}.{name}" if key else name
        if name in node.value:
            values[spec.name] = convert(node.value[name], hints[spec.name], below)
        elif spec.default is MISSING and spec.default_factory is MISSING:
            hint = hints[spec.name]
            what = f"{below} is missing: {spec.metadata['doc']}"
            raise RecipeError(what, where=node.where, fix=f"add {below}: {_suggestion(below, hint)}")
    return cls(**values)


def convert(node: Node, hint: Any, key: str) -> Any:
    """The value of one key in the type that the schema gives it."""
    if isinstance(node.value, str) and node.value in words(hint):
        return node.value
    # A mistyped word is told so, rather than being no size or length.
    wordy = isinstance(node.value, str) and words(hint) and not node.value[:1].isdigit()
    for member in members(hint):
        if not wordy and get_origin(member) is not Literal and _fits(node, member):
            return _take(node, member, key)
    raise _wrong(node, hint, key)


def _section(key: str) -> str:
    return ".".join(part for part in key.split(".") if not part.isdigit())


def _suggestion(key: str, hint: Any) -> str:
    given = {"model.name": "meta-llama/Llama-3.1-8B-Instruct", "output_dir": "runs/mine"}
    if key == "model":
        return "{name: meta-llama/Llama-3.1-8B-Instruct}"
    if key == "data":
        return "{train: {source: rows.jsonl, format: messages}}"
    return given.get(key) or ("rows.jsonl" if key.endswith("source") else example(hint))


def _fits(node: Node, hint: Any) -> bool:
    """Whether the value has the outer shape of a type; what is inside is judged by `_take`."""
    value = node.value
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool, NoneType):
        return isinstance(value, hint)
    if hint in (Length, Size):
        return isinstance(value, str)
    if get_origin(hint) is tuple:
        # A single source need not stand in a list, and null takes away the sources of the recipe below.
        return isinstance(value, list) or (is_dataclass(get_args(hint)[0]) and isinstance(value, dict | NoneType))
    return isinstance(value, dict)  # a section, or dict[str, str]


def _take(node: Node, hint: Any, key: str) -> Any:
    value = node.value
    if hint in (Length, Size):
        return _measure(node, hint, key)
    if isinstance(value, float | int) and not isinstance(value, bool):
        return _number(node, hint, key)
    if isinstance(value, dict) and get_origin(hint) is dict:
        return {name: convert(inner, str, f"{key}.{name}") for name, inner in value.items()}
    if get_origin(hint) is tuple:
        return _tuple(node, hint, key)
    return section(node, hint, key) if isinstance(value, dict) else value


def _measure(node: Node, hint: type[Length | Size], key: str) -> Length | Size:
    try:
        return hint.parse(str(node.value))
    except ValueError as error:
        fix = f"write {line(node, key, example(hint))}"
        raise RecipeError(f"{key}: {error}", where=node.where, fix=fix) from error


def _number(node: Node, hint: Any, key: str) -> Any:
    number = node.value
    assert isinstance(number, int | float)
    if abs(number) > MAX_INT if isinstance(number, int) else not math.isfinite(number):
        shown = number if isinstance(number, float) else f"a number of {len(hex(number)) * 4} bits"
        what = f"{key}: {shown} is not a finite number of a usable size"
        raise RecipeError(what, where=node.where, fix=f"write {form(hint)}, such as {line(node, key, example(hint))}")
    return float(number) if hint is float else number


def _tuple(node: Node, hint: Any, key: str) -> tuple[Any, ...]:
    inside = get_args(hint)
    if node.value is None:
        return ()
    if isinstance(node.value, dict):
        return (section(node, inside[0], key),)
    items = children(node)
    if inside[-1] is Ellipsis:
        return tuple(convert(item, inside[0], f"{key}.{i}") for i, item in items)
    if len(items) != len(inside):
        what = f"{key}: expected {form(hint)}, found {len(items)}"
        raise RecipeError(what, where=node.where, fix=f"write {line(node, key, example(hint))}")
    return tuple(convert(item, kind, f"{key}.{i}") for (i, item), kind in zip(items, inside, strict=True))


def line(node: Node, key: str, value: str) -> str:
    """How the value is written where it stands: `key=value` on the command line, `key: value` in a file."""
    return f"'{key}={value}'" if node.where.startswith("command line") else f"{key.rpartition('.')[2]}: {value}"


def _found(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return f"the text {value!r}" if isinstance(value, str) else str(value).lower()


def _wrong(node: Node, hint: Any, key: str) -> RecipeError:
    """The error for a value of the wrong form; its mend is the line to write wherever that can be guessed."""
    listed = words(hint)
    what = f"{key or 'the recipe'}: expected {form(hint)}, found {_found(node.value)}"
    fix = f"write {line(node, key, example(hint))}"
    if isinstance(node.value, str) and listed:
        near = nearest(node.value, listed)
        fix = f"did you mean {line(node, key, near)}?" if near else f"write one of {', '.join(listed)}"
    elif listed and isinstance(node.value, bool):
        near = nearest(str(node.value), listed)
        fix = f"write {line(node, key, near or listed[0])}"
    elif isinstance(node.value, str):
        fix = _unquoted(node, hint, key) or fix
    elif node.value is None and "none" in listed:
        fix = f"write {line(node, key, 'none')}"
    elif node.value is None:
        fix = f"remove the line to take the default, or write {line(node, key, example(hint))}"
    elif str in members(hint) and isinstance(node.value, int | float):
        fix = f"put it in quotes: {line(node, key, _quoted(node))}"
    elif isinstance(node.value, int | float) and not isinstance(node.value, bool):
        fix = _with_unit(node, hint, key) or fix
    return RecipeError(what, where=node.where, fix=fix)


def _quoted(node: Node) -> str:
    return f'"{_found(node.value)}"'


def _with_unit(node: Node, hint: Any, key: str) -> str:
    kinds = {Length: ("steps", "epochs"), Size: ("examples", "tokens")}
    for kind, units in kinds.items():
        if kind in members(hint):
            return "name the unit: " + " or ".join(line(node, key, f"{node.value} {unit}") for unit in units)
    return ""


def _unquoted(node: Node, hint: Any, key: str) -> str:
    """The mend for text where a number or a truth value belongs: mostly a pair of quotes too many."""
    text = str(node.value).strip()
    truth = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}
    if bool in members(hint) and text.lower() in truth:
        return f"write {line(node, key, truth[text.lower()])}, without quotes"
    if {int, float} & set(members(hint)):
        try:
            number = float(text.replace("_", "").replace(",", ""))
        except ValueError:
            return ""
        whole = math.isfinite(number) and number == int(number) and "e" not in text.lower()
        return f"write {line(node, key, str(int(number)) if whole else text)}, without quotes"
    if get_origin(members(hint)[0]) is tuple:
        return f"write it as a list: {line(node, key, f'[{text}]')}"
    return ""
