"""Conversion of a tree of recipe values to a `Run`. pydantic validates the values against the
schema, and this module adds the position and a fix to its errors.

Values are not coerced, with one exception: an integer is accepted as a float, as in `alpha: 16`.
"""

import json
import re
import reprlib
from dataclasses import Field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_origin

from tunesmith.config.layers import COMMAND_LINE
from tunesmith.config.names import (
    example,
    keys,
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


class _Value(NamedTuple):
    """A value of the recipe with its dotted key, its type and its field of the schema."""

    node: Node
    key: str
    hint: object
    spec: Field[Any]

    @classmethod
    def at(cls, node: Node, key: str) -> "_Value":
        schema_key = without_indices(key)
        is_entry = key[-1:].isdigit() and not key.endswith(schema_key)
        # A key that is not in the schema is an entry of a mapping. An example is
        # data.train.columns.prompt.
        if schema_key not in keys():
            schema_key = schema_key.rpartition(".")[0]
            is_entry = True
        spec, hint = keys()[schema_key]
        if is_entry:
            # Replace `hint` by the type of the list's items or of the mapping's values.
            [inside] = [get_args(m) for m in members(hint) if get_origin(m) in (tuple, dict)]
            hint = inside[1] if dict in map(get_origin, members(hint)) else inside[0]
        return cls(node, key, hint, spec)

    def line(self, value: str) -> str:
        """Return the text that sets this key: `key=value` on the command line, or `key: value` in a
        file.
        """
        name = self.key.rpartition(".")[2]
        if name.isdigit():
            return value
        if self.node.where.startswith("command line"):
            return f"'{self.key}={value}'"
        return f"{name}: {value}"

    def example(self) -> str:
        """Return a line with a valid example value. For a list item, return the entire list."""
        owner = re.sub(r"\.[0-9]+$", "", self.key)
        value = example(self.hint, self.spec)
        # The schema's example is for the entire mapping, so it does not fit one of its entries.
        if without_indices(owner) not in keys():
            value = "name"
        return self._replace(key=owner).line(value)


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
    name = error["loc"][-1] if error["loc"] else ""
    if error["type"] == "json_invalid":
        return RecipeError(
            "the recipe has text that is not Unicode",
            where=node.where,
            why=error["msg"],
            fix="remove escapes such as \\ud800, which are half of a character",
        )
    # `name` is the missing key. If `name` is a number, a list has too few items, and
    # `_explain_value` handles this error.
    if error["type"] == "missing" and isinstance(name, str):
        value = _Value.at(node, f"{key}.{name}".lstrip("."))
        what = f"{value.key} is missing: {value.spec.metadata['doc']}"
        fix = f"add {value.key}: {example(value.hint, value.spec)}"
        return RecipeError(what, where=node.where, fix=fix)
    what, fix = _explain_value(_Value.at(node, key), error)
    why = ""
    # The value may be null because of an unset shell variable: the shell turns `key=$UNSET` into
    # `key=`.
    if node.value is None and node.where.startswith("command line"):
        why = "the value is empty, perhaps because a shell variable is not set"
    return RecipeError(what, where=node.where, why=why, fix=fix)


def _explain_unknown(tree: Node, unknown: "list[tuple[Node, str, ErrorDetails]]") -> RecipeError:
    """Build one error for all unknown keys.

    If the file is a configuration of another tool, the fix is the command `tunesmith import`.
    """
    where = unknown[0][0].where
    file = where.rpartition(":")[0]
    places = []
    fixes = []
    for node, key, error in unknown:
        name = str(error["loc"][-1])
        places.append(f"{key} ({node.where.replace(f'{file}:', 'line ')})")
        section = without_indices(key.removesuffix(name).rstrip("."))
        on_command_line = node.where.startswith(COMMAND_LINE)
        hint = suggest_key(section, name, on_command_line=on_command_line)
        fixes.append(f"{key}: {hint}")
    if len(unknown) == 1:
        fix = fixes[0].removeprefix(f"{key}: ")
        return RecipeError(f"unknown key {key}", where=where, fix=fix)
    fix = "; ".join(fixes)
    # A file with several top-level keys of other tools and without a `model` section is a
    # configuration file of another tool.
    foreign = [key for _, key, _ in unknown if key in other_tools("keys")]
    if len(foreign) > 1 and "model" not in dict(tree.children()) and Path(file).is_file():
        command = f"tunesmith import {shell_path(file)}"
        fix = f"convert the file with `{command}`, because these are keys of another tool"
    return RecipeError(f"unknown keys {', '.join(places)}", where=where, fix=fix)


def _explain_value(value: _Value, error: "ErrorDetails") -> tuple[str, str]:
    """Return two texts: the problem with a value, and the fix."""
    content = value.node.value
    is_form_error = not literal_words(value.hint) or str(content)[:1].isdigit()
    fix = f"write {value.example()}   # {value.spec.metadata['doc']}"
    if error["type"] in _BOUNDS:
        what = f"{value.key} is {reprlib.repr(content)}: {error['msg'].lower()}"
    elif error["type"] == "value_error" and is_form_error:
        what = f"{value.key}: {error['ctx']['error']}"
    else:
        found = reprlib.repr(json.dumps(value.node.plain()))[1:-1]
        what = f"{value.key}: expected {type_in_words(value.hint)}, found {found}"
        fix = _fix_type(value) or fix
    return what, fix


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


def _fix_type(value: _Value) -> str:
    """Return the fix for a value of the wrong type, or "" if no fix can be guessed."""
    content = value.node.value
    types_ = members(value.hint)
    words = literal_words(value.hint)
    # The given value may be the name that another tool uses for one of the allowed words.
    if words and isinstance(content, str | bool):
        one_of = f"write one of {', '.join(words)}"
        absent = other_tools("absent").get(str(content).lower())
        if absent:
            return f"{one_of}: {absent.format(content)}"
        near = nearest(str(content), words)
        return f"did you mean {value.line(near)}?" if near else one_of
    is_list = get_origin(types_[0]) is tuple and not is_dataclass(get_args(types_[0])[0])
    if isinstance(content, str) and is_list:
        return f"write it as a list: {value.line(f'[{content}]')}"
    if isinstance(content, int | float) and str in types_:
        return f"put it in quotes: {value.line(json.dumps(str(content).lower()))}"
    # The value is a number without a unit, but the key needs a unit, as in `3 epochs`.
    for kind in _AMOUNTS.intersection(types_):
        if type(content) is int:
            lines = [value.line(f"{content} {unit}") for unit in kind.units[:2]]
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
