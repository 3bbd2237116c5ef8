"""Conversion of a tree of recipe values to a `Run`. pydantic validates the values against the
schema, and this module adds the position and a fix to its errors.

Values are not coerced, with one exception: an integer is accepted as a float, as in `alpha: 16`.
"""

import json
import re
import reprlib
from dataclasses import Field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from tunesmith.config.layers import COMMAND_LINE
from tunesmith.config.names import (
    example,
    keys,
    last_part,
    members,
    nearest,
    other_tools,
    suggest_key,
    without_indices,
)
from tunesmith.config.schema import Run, run_type
from tunesmith.config.tree import Node
from tunesmith.errors import RecipeError
from tunesmith.host.shell import shell_path
from tunesmith.units import Length, Share, Size

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

# pydantic's error types for a number of the right type that is out of bounds.
_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "finite_number")
_AMOUNTS = {Length, Size, Share}

_FORMS = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
    Length: "a length",
    Size: "a size",
    Share: "a share",
}


def build_run(tree: Node) -> Run:
    """Convert a tree of recipe values to a `Run`.

    Raises:
        RecipeError: if a key or value does not fit the schema. The error names the first problem
            and its position.
    """
    from pydantic import ValidationError

    values = tree.plain()
    data = values.get("data")
    if isinstance(data, dict):
        # Put a single source that is given without a list into a list. null and {} mean that there
        # is no source.
        for part in ("train", "validation"):
            if part in data and isinstance(data[part], dict | None):
                data[part] = [data[part]] if data[part] else []
    try:
        # Validate JSON, because pydantic's strict mode accepts a list as a tuple, and a mapping as
        # a dataclass, only in JSON input.
        return run_type().validate_json(json.dumps(values))
    except ValidationError as error:
        raise _explain(error.errors(include_url=False), tree) from None


def _explain(errors: "list[ErrorDetails]", tree: Node) -> RecipeError:
    """Convert pydantic's errors to one RecipeError.

    Unknown keys are reported first, because a mistyped key also causes a "missing key" error.
    """
    located = [(*_locate(tree, error), error) for error in errors]
    unknown = [one for one in located if one[2]["type"] == "unexpected_keyword_argument"]
    if unknown:
        return _explain_unknown(tree, unknown)
    # pydantic reports one error for each member type of a union. Use the error with the longest
    # key, because this member type matched the largest part of the value.
    same_value = [one for one in located if one[1].startswith(located[0][1])]
    node, key, error = max(same_value, key=lambda one: len(one[1]))
    if error["type"] == "json_invalid":
        return RecipeError(
            "the recipe has text that is not Unicode",
            where=node.where,
            why=error["msg"],
            fix="remove escapes such as \\ud800, which are half of a character",
        )
    name = error["loc"][-1]
    # If `name` is a number, a list has too few items.
    if error["type"] == "missing" and isinstance(name, str):
        key = f"{key}.{name}".lstrip(".")
        what = f"{key} is missing: {_field_and_type(key)[0].metadata['description']}"
        return RecipeError(what, where=node.where, fix=f"add {key}: {example(key)}")
    return _explain_value(node, key, error)


def _explain_unknown(tree: Node, unknown: "list[tuple[Node, str, ErrorDetails]]") -> RecipeError:
    """Build one error for all unknown keys.

    If the file is a configuration of another tool, the fix is the command `tunesmith import`.
    """
    where = unknown[0][0].where
    file = where.rpartition(":")[0]
    hints = {}
    for node, key, error in unknown:
        name = str(error["loc"][-1])
        section = without_indices(key.removesuffix(name).rstrip("."))
        on_command_line = node.where.startswith(COMMAND_LINE)
        hints[key] = suggest_key(section, name, on_command_line=on_command_line)
    if len(hints) == 1:
        return RecipeError(f"unknown key {key}", where=where, fix=hints[key])
    places = [f"{key} ({node.where.replace(f'{file}:', 'line ')})" for node, key, _ in unknown]
    fix = "; ".join(f"{key}: {hint}" for key, hint in hints.items())
    # A file with several top-level keys of other tools and without a `model` section is a
    # configuration file of another tool.
    foreign = other_tools("keys").keys() & hints
    if len(foreign) > 1 and "model" not in dict(tree.children()) and Path(file).is_file():
        command = f"tunesmith import {shell_path(file)}"
        fix = f"convert the file with `{command}`, because these are keys of another tool"
    return RecipeError(f"unknown keys {', '.join(places)}", where=where, fix=fix)


def _explain_value(node: Node, key: str, error: "ErrorDetails") -> RecipeError:
    """Return the error about a value of the wrong type, or a number that is out of bounds."""
    field, hint = _field_and_type(key)
    # For an item of a list, show an example of the entire list.
    shown_key = re.sub(r"\.[0-9]+$", "", key)
    fix = (
        f"write {_setting(node, shown_key, example(shown_key))}   # {field.metadata['description']}"
    )
    # A value that begins with a digit is an amount, even if the key also accepts words.
    is_amount = not literal_words(hint) or str(node.value)[:1].isdigit()
    if error["type"] in _BOUNDS:
        what = f"{key} is {reprlib.repr(node.value)}: {error['msg'].lower()}"
    elif error["type"] == "value_error" and is_amount:
        what = f"{key}: {error['ctx']['error']}"
    else:
        found = reprlib.repr(json.dumps(node.plain()))[1:-1]
        what = f"{key}: expected {type_in_words(hint)}, found {found}"
        fix = _fix_type(node, key, hint) or fix
    why = ""
    # The shell turns `key=$UNSET` into `key=`, which is null.
    if node.value is None and node.where.startswith(COMMAND_LINE):
        why = "the value is empty, perhaps because a shell variable is not set"
    return RecipeError(what, where=node.where, why=why, fix=fix)


def _locate(tree: Node, error: "ErrorDetails") -> tuple[Node, str]:
    """Return the node and the dotted key of the value that a pydantic error is about.

    Parts of pydantic's location that are not keys of the tree, such as union members, are skipped.
    """
    node = tree
    key = ""
    for part in map(str, error["loc"]):
        children = dict(node.children())
        if part in children:
            node = children[part]
            key = f"{key}.{part}".lstrip(".")
    return node, key


def _field_and_type(key: str) -> tuple[Field[Any], Any]:
    """Return the field of the schema and the type of a value.

    The key can also be an entry of a list or of a mapping, such as `train.betas.1` or
    `data.train.columns.prompt`.
    """
    name = without_indices(key)
    if name in keys() and not last_part(key).isdigit():
        return keys()[name]
    field, hint = keys().get(name) or keys()[name.rpartition(".")[0]]
    [container] = [member for member in members(hint) if get_origin(member) in (tuple, dict)]
    # The values of dict[str, V] have the type V. The items of tuple[T, ...] have the type T.
    return field, get_args(container)[1 if get_origin(container) is dict else 0]


def _setting(node: Node, key: str, value: str) -> str:
    """Return the text that sets a key: `key=value` on the command line, or `key: value` in a file.

    For an item of a list, return only the value.
    """
    name = last_part(key)
    if name.isdigit():
        return value
    return f"'{key}={value}'" if node.where.startswith(COMMAND_LINE) else f"{name}: {value}"


def _fix_type(node: Node, key: str, hint: object) -> str:
    """Return the fix for a value of the wrong type, or "" if no fix can be guessed."""
    content = node.value
    types_ = members(hint)
    words = literal_words(hint)
    # The given value may be the name that another tool uses for one of the allowed words.
    if words and isinstance(content, str | bool):
        one_of = f"write one of {', '.join(words)}"
        absent = other_tools("absent").get(str(content).lower())
        if absent:
            return f"{one_of}: {absent.format(content)}"
        near = nearest(str(content), words)
        return f"did you mean {_setting(node, key, near)}?" if near else one_of
    is_list = get_origin(types_[0]) is tuple and not is_dataclass(get_args(types_[0])[0])
    if isinstance(content, str) and is_list:
        return f"write it as a list: {_setting(node, key, f'[{content}]')}"
    if isinstance(content, int | float) and str in types_:
        return f"put it in quotes: {_setting(node, key, json.dumps(str(content).lower()))}"
    # The value is a number without a unit, but the key needs a unit, as in `3 epochs`.
    for kind in _AMOUNTS.intersection(types_):
        if type(content) is int:
            lines = [_setting(node, key, f"{content} {unit}") for unit in kind.units[:2]]
            return f"add the unit: {' or '.join(lines)}"
    return ""


def literal_words(hint: object) -> tuple[str, ...]:
    """Return the words that a type allows: `Literal["a", "b"] | int` -> ("a", "b")."""
    words: list[str] = []
    for member in members(hint):
        if get_origin(member) is Literal:
            words += get_args(member)
    return tuple(words)


def type_in_words(hint: object) -> str:
    """Describe a type in words, such as "a whole number or `auto`"."""
    origin = get_origin(hint)
    inside = get_args(hint)
    if origin is Literal:
        *words, last = [f"`{word}`" for word in inside]
        return f"{', '.join(words)} or {last}" if words else last
    if origin is tuple and is_dataclass(inside[0]):
        return "a mapping of keys, or a list of them"
    if origin is tuple and inside[-1] is not Ellipsis:
        return f"a list of {len(inside)} numbers"
    if origin is tuple:
        are_texts = str in members(inside[0]) or literal_words(inside[0])
        return f"a list of {'texts' if are_texts else 'whole numbers'}"
    if origin is dict:
        values = inside[1]
        return f"a mapping of texts to {'texts' if values is str else 'values'}"
    if hint in _FORMS:
        return _FORMS[hint]
    if is_dataclass(hint):
        return "a mapping of keys"
    return " or ".join(type_in_words(member) for member in members(hint))
