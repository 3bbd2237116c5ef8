"""A tree of recipe values becomes a `Run`: pydantic holds it against the schema, and its errors get
a place and a fix.

Nothing is coerced. The one conversion is from a whole number to a number: `alpha: 16`.
"""

import json
import math
import re
import reprlib
from dataclasses import Field, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_origin

from tunesmith.config.names import (
    example,
    keys,
    members,
    nearest,
    other_tools,
    suggest_key,
    without_indices,
)
from tunesmith.config.schema import Run, is_section
from tunesmith.config.tree import Node, scalar
from tunesmith.errors import RecipeError
from tunesmith.host.shell import shell_path, shell_word
from tunesmith.units import Length, Share, Size

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

# pydantic's errors of bounds.
_BOUNDS = {"greater_than": "above {}", "greater_than_equal": "{} or more", "less_than": "below {}"}

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


@cache
def run_type() -> "TypeAdapter[Run]":
    """Pydantic's view of the schema: it validates, and gives the JSON Schema."""
    from pydantic import TypeAdapter

    return TypeAdapter(Run)


def build_run(tree: Node) -> Run:
    """The recipe in the types of the schema.

    Raises:
        RecipeError: the first key or value that does not fit, with its place.
    """
    from pydantic import ValidationError

    values = tree.plain()
    data = values.get("data")
    if isinstance(data, dict):
        # A single source needs no list; null and {} stand for none.
        for part in ("train", "validation"):
            if part in data and isinstance(data[part], dict | None):
                data[part] = [data[part]] if data[part] else []
    try:
        # In JSON, unlike in Python, strict mode takes a list as a tuple and a mapping as a
        # dataclass.
        return run_type().validate_json(json.dumps(values))
    except ValidationError as error:
        raise _explain(error.errors(include_url=False), tree) from None


class _Value(NamedTuple):
    """A value of the recipe with its dotted key, and what the schema says of it."""

    node: Node
    key: str
    hint: object
    spec: Field[Any]

    @classmethod
    def at(cls, node: Node, key: str) -> "_Value":
        schema_key = without_indices(key)
        is_entry = key[-1:].isdigit() and not key.endswith(schema_key)
        # An entry of a mapping: data.train.columns.prompt.
        if schema_key not in keys():
            schema_key = schema_key.rpartition(".")[0]
            is_entry = True
        spec, hint = keys()[schema_key]
        if is_entry:
            hint = _entry_type(hint)
        return cls(node, key, hint, spec)

    def line(self, value: str) -> str:
        """Write `value` in the form of its place: `key=value`, or `key: value` in a file."""
        if self.node.where.startswith("command line"):
            return f"'{self.key}={value}'"
        name = self.key.rpartition(".")[2]
        return value if name.isdigit() else f"{name}: {value}"

    def example(self) -> str:
        """The line with a value that can stand here; the whole list for one of its entries."""
        owner = re.sub(r"\.[0-9]+$", "", self.key)
        value = example(self.hint, self.spec)
        # An entry of a mapping, whose example is a whole mapping.
        if without_indices(owner) not in keys():
            value = "name"
        return self._replace(key=owner).line(value)


def _entry_type(hint: object) -> object:
    """The type of a list's entries, or of a mapping's values."""
    for member in members(hint):
        if get_origin(member) is tuple:
            return get_args(member)[0]
        if get_origin(member) is dict:
            return get_args(member)[1]
    raise TypeError(f"{hint} has no entries")


class _Mismatch(NamedTuple):
    """The value that an error of pydantic is about, and its key."""

    node: Node
    key: str
    error: "ErrorDetails"


def _explain(errors: "list[ErrorDetails]", tree: Node) -> RecipeError:
    """The first error as ours.

    Unknown keys come first: a mistyped one is often missing under its right name.
    """
    # An unknown key is the likeliest cause of the rest.
    unknown = [error for error in errors if error["type"] == "unexpected_keyword_argument"]
    if unknown:
        return _explain_unknown(tree, [_locate(tree, error) for error in unknown])
    mismatches = [_locate(tree, error) for error in errors]
    # Each member of a union has its error: take the one that got furthest into the value.
    first_key = mismatches[0].key
    same_value = [mismatch for mismatch in mismatches if mismatch.key.startswith(first_key)]
    node, key, error = max(same_value, key=lambda mismatch: len(mismatch.key))
    error_type = error["type"]
    name = error["loc"][-1] if error["loc"] else ""
    if error_type == "json_invalid":
        return RecipeError(
            "the recipe has text that is not Unicode",
            where=node.where,
            why=error["msg"],
            fix="remove escapes such as \\ud800, which are half a character",
        )
    # "missing" with a number is an entry of a tuple: that is a value of the wrong length.
    if error_type == "missing" and isinstance(name, str):
        value = _Value.at(node, f"{key}.{name}".lstrip("."))
        what = f"{value.key} is missing: {value.spec.metadata['doc']}"
        fix = f"add {value.key}: {example(value.hint, value.spec)}"
        return RecipeError(what, where=node.where, fix=fix)
    what, fix = _explain_value(_Value.at(node, key), error)
    why = ""
    # `key=$UNSET` comes as `key=`, which is null.
    if node.value is None and node.where.startswith("command line"):
        why = "an unset shell variable leaves a value empty"
    return RecipeError(what, where=node.where, why=why, fix=fix)


def _explain_unknown(tree: Node, mismatches: list[_Mismatch]) -> RecipeError:
    """All unknown keys in one error; a file of another tool is one to import."""
    order = [key for key, _ in tree.places()]
    mismatches.sort(key=lambda mismatch: order.index(mismatch.key))
    first = mismatches[0]
    where = first.node.where
    if len(mismatches) == 1:
        return RecipeError(f"unknown key {first.key}", where=where, fix=_fix_unknown(first))
    file = where.rpartition(":")[0]
    places = []
    fixes = []
    for mismatch in mismatches:
        line = mismatch.node.where.replace(f"{file}:", "line ")
        places.append(f"{mismatch.key} ({line})")
        fixes.append(f"{mismatch.key}: {_fix_unknown(mismatch)}")
    fix = "; ".join(fixes)
    # Keys of other tools at the top of a file, which names no model as a recipe does.
    foreign = [each for each in mismatches if _foreign_name(each.key) in other_tools("keys")]
    sections = dict(tree.children())
    is_recipe = "model" in sections and "name" in dict(sections["model"].children())
    if len(foreign) > 1 and not is_recipe and Path(file).is_file():
        fix = f"tunesmith import {shell_path(file)}   # these are keys of another tool"
    return RecipeError(f"unknown keys {', '.join(places)}", where=where, fix=fix)


def _fix_unknown(mismatch: _Mismatch) -> str:
    """Suggest a key in place of an unknown one: what another tool's means here, or the nearest."""
    name = str(mismatch.error["loc"][-1])
    section = without_indices(mismatch.key.removesuffix(name).rstrip("."))
    content = mismatch.node.plain()
    # `dataset.packed=true`: the inner key says more.
    if isinstance(content, dict) and len(content) == 1:
        inner_name, inner_content = next(iter(content.items()))
        here = _foreign_line(_foreign_name(inner_name), inner_content)
        if here:
            return here
    here = _foreign_line(_foreign_name(name), content)
    return here or suggest_key(section, name)


def _foreign_name(name: str) -> str:
    """A key as other tools' are listed."""
    return name.lower().replace("-", "_")


def _foreign_line(name: str, content: object) -> str:
    """The line to write for a key of another tool, with its own value; empty where it has none."""
    line = other_tools("keys").get(name, "")
    key, _, line_value = line.partition(": ")
    value = ""
    if key in keys() and isinstance(content, str | int | float):
        text = content if isinstance(content, str) else json.dumps(content)
        value = _fitting_value(name, key, text, line_value)
    elif key == "adapter.target" and isinstance(content, list):
        value = f"[{', '.join(map(str, content))}]"
    if value:
        _, semicolon, remark = line.partition(";")
        return f"here it is {key}: {value}{semicolon}{remark}"
    return ""


def _explain_value(value: _Value, error: "ErrorDetails") -> tuple[str, str]:
    """Say what is wrong with a value, and the fix."""
    error_type = error["type"]
    key = value.key
    content = value.node.value
    # The bound that is broken, or the error of a type of our own.
    limits = list(error.get("ctx", {}).values())
    is_form_error = not literal_words(value.hint) or str(content)[:1].isdigit()
    fix = f"write {value.example()}   # {value.spec.metadata['doc']}"
    if error_type in _BOUNDS:
        # Limits come as floats: 2147483648.0 is written as the whole number that it is.
        limit = int(limits[0]) if limits[0] == int(limits[0]) else limits[0]
        bound = _BOUNDS[error_type].format(limit)
        what = f"{key} is {reprlib.repr(content)}: it must be {bound}"
    elif error_type == "finite_number":
        what = f"{key}: {content} is not a finite number"
    elif error_type in ("missing", "too_long"):
        count = len(value.node.children())
        what = f"{key}: expected {type_in_words(value.hint)}, found {count}"
    elif error_type == "value_error" and is_form_error:
        what = f"{key}: {limits[0]}"
    else:
        what = f"{key}: expected {type_in_words(value.hint)}, found {_describe(content)}"
        fix = _fix_type(value)
    return what, fix


def _locate(tree: Node, error: "ErrorDetails") -> _Mismatch:
    """The value that an error is about.

    pydantic's parts for a single source and a union are skipped.
    """
    node = tree
    key = ""
    for part in map(str, error["loc"]):
        children = dict(node.children())
        if part in children:
            node = children[part]
            key = f"{key}.{part}".lstrip(".")
    return _Mismatch(node, key, error)


def _describe(value: object) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "a mapping"
    if value in (math.inf, -math.inf):
        return "a number that is too large"
    if isinstance(value, str):
        return f"the text {reprlib.repr(value)}"
    return str(value).lower()


def _fix_type(value: _Value) -> str:
    """The fix for a value of the wrong type: the line to write where it can be guessed."""
    content = value.node.value
    types_ = members(value.hint)
    if content in (math.inf, -math.inf):
        return f"write {value.example()}"
    # Text in quotes that would be of the right type without them.
    if isinstance(content, str):
        meant = type(scalar(content.strip()))
        if meant in types_ or (meant is int and float in types_):
            return f"write {value.line(content.strip())}, without quotes"
        if _could_be_entry(types_[0], content):
            return f"write it as a list: {value.line(f'[{content}]')}"
    words = literal_words(value.hint)
    if not words and bool in types_:
        words = ("true", "false")
    # A word that another tool has here may have another name.
    if words and isinstance(content, str | bool):
        one_of = f"write one of {', '.join(words)}"
        absent = other_tools("absent").get(str(content).lower())
        if absent:
            return f"{one_of}: {absent.format(content)}"
        near = nearest(str(content), words)
        return f"did you mean {value.line(near)}?" if near else one_of
    # An unquoted 123 or true where text is needed.
    if isinstance(content, int | float) and str in types_:
        return f"put it in quotes: {value.line(json.dumps(str(content).lower()))}"
    if isinstance(content, int | float) and not isinstance(content, bool):
        # A bare number where an amount needs its unit.
        for kind in (Length, Size, Share):
            if kind in types_:
                lines = [value.line(f"{content} {unit}") for unit in kind.units[:2]]
                return f"add the unit: {' or '.join(lines)}"
    return f"write {value.example()}"


def _could_be_entry(hint: object, text: str) -> bool:
    """Tell whether a type is a list of which a text could be an entry."""
    if get_origin(hint) is not tuple:
        return False
    return hint == tuple[str, ...] or text in literal_words(get_args(hint)[0])


def literal_words(hint: object) -> tuple[str, ...]:
    """The words that a type lists: `Literal["a", "b"] | int` -> ("a", "b")."""
    words: list[str] = []
    for member in members(hint):
        if get_origin(member) is Literal:
            words += get_args(member)
    return tuple(words)


def type_in_words(hint: object) -> str:
    """A type in words, such as "a whole number or `auto`"."""
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


# Names of other tools whose number is not the one that is written here: a ratio, a count per epoch.
_OTHER_NUMBER = re.compile("ratio|per_epoch|accumulation|val_s")
_FIRST_VALUE = re.compile(r"\{.*?\}|\[.*?\]|[^,; ]+(?: (?:steps|epochs|examples|%))?")


def suggest_override(option: str, next_word: str | None) -> str | None:
    """The `key=value` that an option such as `--lr` or `--train.seed=3` most likely means.

    `next_word`: the word behind the option, if there is one.
    """
    name, equals, value_in_option = option.lstrip("-").partition("=")
    name = name.replace("-", "_").lower()
    value = value_in_option if equals else next_word
    key, _, line = other_tools("keys").get(name, "").partition(": ")
    if key not in keys():
        key = _key_named(name)
        line = ""
    if not key:
        return None
    spec, hint = keys()[key]
    match = _FIRST_VALUE.match(line or example(hint, spec))
    suggestion = match[0] if match else ""
    # `--lr 2e-4` may come without a value: then the example of the key stands there.
    if value is not None:
        suggestion = _fitting_value(name, key, value, suggestion) or suggestion
    return shell_word(f"{key}={suggestion}")


def _fitting_value(name: str, key: str, value: str, shown: str) -> str:
    """The value that another tool's key `name` has, as `key` takes it; empty if it does not fit.

    shown: an example, whose unit a bare number gets.
    """
    hint = keys()[key][1]
    types_ = members(hint)
    number = scalar(value)
    kind = type(number)
    is_amount = Length in types_ or Size in types_ or Share in types_
    # A ratio, and a part of the rows.
    if is_amount and isinstance(number, float) and 0 < number < 1:
        return f"{number * 100:g} %"
    if _OTHER_NUMBER.search(name):
        return ""
    if kind in (int, float) and is_amount:
        match = _FIRST_VALUE.match(shown)
        unit = match[0].partition(" ")[2] if match else ""
        return f"{value} {unit or 'examples'}"
    if kind in types_ or (kind is int and float in types_):
        return value
    if value.lower() == "true":
        return ""
    for word in (value, *other_tools("words").get(value.lower(), "").split()):
        if word in literal_words(hint):
            return word
    return ""


def _key_named(name: str) -> str:
    """The key of this name, or of the most similar last part; empty if none is similar."""
    choices = [key for key, (_, hint) in keys().items() if not is_section(hint)]
    if name in choices:
        return name
    near = nearest(name, [key.rpartition(".")[2] for key in choices])
    return next((key for key in choices if near and key.rpartition(".")[2] == near), "")
