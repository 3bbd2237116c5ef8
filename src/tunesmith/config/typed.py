"""A tree of recipe values becomes a `Run`: pydantic holds it against the schema, and its errors get a place and a fix.

Nothing is coerced. The one step that is taken is from a whole number to a number: `alpha: 16`.
"""

import json
import math
import re
import reprlib
import types
from dataclasses import MISSING, Field, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union, get_args, get_origin

from tunesmith.config.names import keys, nearest, other_tools, suggest_key, without_indices
from tunesmith.config.schema import Run, is_section
from tunesmith.config.tree import Node, scalar
from tunesmith.errors import RecipeError
from tunesmith.shell import shell_word
from tunesmith.units import Length, Share, Size

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

_BOUNDS = {"greater_than": "above {}", "greater_than_equal": "{} or more", "less_than": "below {}"}

_FORMS = {str: "text", bool: "true or false", int: "a whole number", float: "a number", type(None): "null"}
_FORMS |= {Length: "a length", Size: "a size", Share: "a share"}


@cache
def run_type() -> "TypeAdapter[Run]":
    """Pydantic's view of the schema: it validates, and gives the JSON Schema."""
    from pydantic import TypeAdapter

    return TypeAdapter(Run)


def build_run(tree: Node) -> Run:
    """The recipe in the types of the schema; RecipeError for the first key or value that does not fit, with its place."""
    from pydantic import ValidationError

    values = tree.plain()
    data = values.get("data")
    for part in ("train", "validation"):  # a single source needs no list; null and {} stand for none
        if isinstance(data, dict) and part in data and isinstance(data[part], dict | None):
            data[part] = [data[part]] if data[part] else []
    try:
        # In JSON, unlike in Python, strict mode takes a list as a tuple and a mapping as a dataclass.
        return run_type().validate_json(json.dumps(values))
    except ValidationError as error:
        raise _explain(error.errors(include_url=False), tree) from None


class _Value(NamedTuple):
    """A value of the recipe with its dotted key, and what the schema says of it."""

    node: Node
    key: str
    hint: Any
    spec: Field[Any]

    @classmethod
    def at(cls, node: Node, key: str) -> "_Value":
        section = without_indices(key)
        inside = key[-1:].isdigit() and not key.endswith(section)
        if section not in keys():  # an entry of a mapping: data.train.columns.prompt
            section, inside = section.rpartition(".")[0], True
        spec, hint = keys()[section]
        if inside:
            hint = next(get_args(m)[get_origin(m) is dict] for m in members(hint) if get_origin(m) in (tuple, dict))
        return cls(node, key, hint, spec)

    def line(self, value: str) -> str:
        """How `value` is written here: `key=value` on the command line, `key: value` in a file."""
        if self.node.where.startswith("command line"):
            return f"'{self.key}={value}'"
        name = self.key.rpartition(".")[2]
        return value if name.isdigit() else f"{name}: {value}"

    def example(self) -> str:
        """The line with a value that can stand here; the whole list for one of its entries."""
        owner = re.sub(r"\.[0-9]+$", "", self.key)
        value = example(self.hint, self.spec)
        if without_indices(owner) not in keys():  # an entry of a mapping, whose example is a whole mapping
            value = "name"
        return self._replace(key=owner).line(value)


def _explain(errors: "list[ErrorDetails]", tree: Node) -> RecipeError:
    """The first error as ours. Unknown keys come first: a mistyped one is often missing under its right name."""
    found = [_find(tree, e) for e in errors if e["type"] == "unexpected_keyword_argument"]
    found = found or [_find(tree, e) for e in errors]
    # Each member of a union has its error: take the one that got furthest into the value.
    node, key, error = max((f for f in found if f[1].startswith(found[0][1])), key=lambda f: len(f[1]))
    kind, name, limits = error["type"], error["loc"][-1:], list(error.get("ctx", {}).values())
    if kind == "json_invalid":
        fix = "remove escapes such as \\ud800, which are half a character"
        return RecipeError("the recipe has text that is not Unicode", where=node.where, why=error["msg"], fix=fix)
    if kind == "unexpected_keyword_argument":
        section = without_indices(key.removesuffix(str(name[0])).rstrip("."))
        return RecipeError(f"unknown key {key}", where=node.where, fix=suggest_key(section, str(name[0])))
    if kind == "missing" and isinstance(name[0], str):
        value = _Value.at(node, f"{key}.{name[0]}".lstrip("."))
        what = f"{value.key} is missing: {value.spec.metadata['doc']}"
        fix = f"add {value.key}: {example(value.hint, value.spec)}"
        return RecipeError(what, where=node.where, fix=fix)
    value = _Value.at(node, key)
    what, fix = "", f"write {value.example()}   # {value.spec.metadata['doc']}"
    if kind in _BOUNDS:
        what = f"{key} is {reprlib.repr(node.value)}: it must be {_BOUNDS[kind].format(int(limits[0]))}"
    elif kind == "finite_number":
        what = f"{key}: {node.value} is not a finite number"
    elif kind in ("missing", "too_long"):
        what = f"{key}: expected {type_in_words(value.hint)}, found {len(node.children())}"
    elif kind == "value_error" and (not literal_words(value.hint) or str(node.value)[:1].isdigit()):
        what = f"{key}: {limits[0]}"
    else:
        what, fix = f"{key}: expected {type_in_words(value.hint)}, found {_found(node.value)}", _fix_type(value)
    unset = node.value is None and node.where.startswith("command line")
    why = "an unset variable of the shell leaves a value empty" if unset else ""
    return RecipeError(what, where=node.where, why=why, fix=fix)


def _find(tree: Node, error: "ErrorDetails") -> "tuple[Node, str, ErrorDetails]":
    """The value that an error is about, and its key; pydantic's parts for a single source and a union are skipped."""
    node, key = tree, ""
    for part in map(str, error["loc"]):
        inside = dict(node.children())
        if part in inside:
            node, key = inside[part], f"{key}.{part}".lstrip(".")
    return node, key, error


def _found(value: Any) -> str:
    if isinstance(value, dict | list | None):
        return "nothing (null)" if value is None else f"a {'list' if isinstance(value, list) else 'mapping'}"
    if value in (math.inf, -math.inf):
        return "a number beyond all bounds"
    return f"the text {reprlib.repr(value)}" if isinstance(value, str) else str(value).lower()


def _fix_type(value: _Value) -> str:
    """The fix for a value of the wrong type: the line to write where it can be guessed."""
    given, kinds = value.node.value, members(value.hint)
    if given in (math.inf, -math.inf):
        return f"write {value.example()}"
    listed = literal_words(value.hint) or (("true", "false") if bool in kinds else ())
    units = next((kind.units[:2] for kind in (Length, Size, Share) if kind in kinds), ())
    if isinstance(given, str):
        meant = type(scalar(given.strip()))
        if meant in kinds or (meant is int and float in kinds):
            return f"write {value.line(given.strip())}, without quotes"
        entry = get_args(kinds[0])[:1]
        if kinds[0] == tuple[str, ...] or (get_origin(kinds[0]) is tuple and given in literal_words(entry[0])):
            return f"write it as a list: {value.line(f'[{given}]')}"
    if listed and isinstance(given, str | bool):
        if absent := other_tools("absent").get(str(given).lower()):
            return f"write one of {', '.join(listed)}: {absent.format(given)}"
        near = nearest(str(given), listed)
        return f"did you mean {value.line(near)}?" if near else f"write one of {', '.join(listed)}"
    if isinstance(given, int | float) and str in kinds:
        return f"put it in quotes: {value.line(json.dumps(str(given).lower()))}"
    if isinstance(given, int | float) and not isinstance(given, bool) and units:
        return "name the unit: " + " or ".join(value.line(f"{given} {unit}") for unit in units)
    return f"write {value.example()}"


def members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the one type that it is."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def literal_words(hint: Any) -> tuple[str, ...]:
    """The words that a type lists: `Literal["a", "b"] | int` -> ("a", "b")."""
    return tuple(word for member in members(hint) if get_origin(member) is Literal for word in get_args(member))


def type_in_words(hint: Any) -> str:
    """A type in words, such as "a whole number or `auto`"."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Literal:
        listed = [f"`{word}`" for word in inside]
        return " or ".join([", ".join(listed[:-1]), listed[-1]] if listed[:-1] else listed)
    if origin is tuple and is_dataclass(inside[0]):
        return "a mapping of keys, or a list of them"
    if origin is tuple:
        many = "texts" if str in members(inside[0]) or literal_words(inside[0]) else "whole numbers"
        return f"a list of {many}" if inside[-1] is Ellipsis else f"a list of {len(inside)} numbers"
    if origin is dict:
        return "a mapping of texts to texts"
    plain = _FORMS.get(hint) or ("a mapping of keys" if is_dataclass(hint) else "")
    return plain or " or ".join(type_in_words(member) for member in members(hint))


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
    default = "true" if hint is bool else spec.metadata["example"] or default_of(spec)
    return default if default != "null" else "8" if int in members(hint) else "name"


def suggest_override(option: str, value: str | None) -> str | None:
    """The `key=value` that `--lr` or `--train.seed=3` most likely means; `value` is the word behind it, if there is one."""
    name, found, inside = option.lstrip("-").partition("=")
    name, value = name.replace("-", "_").lower(), inside if found else value
    last = {key.rpartition(".")[2]: key for key, (_, hint) in reversed(keys().items()) if not is_section(hint)}
    key, _, line = other_tools("keys").get(name, "").partition(": ")
    if key not in keys():
        key, line = name if name in last.values() else last.get(nearest(name, last) or "", ""), ""
    if not key:
        return None
    spec, hint = keys()[key]
    text = re.match(r"\{.*?\}|\[.*?\]|[^,; ]+(?: (?:steps|epochs|examples|%))?", line or example(hint, spec))
    meant, kinds = text[0] if text else "", members(hint)
    # A ratio or a count per epoch is not the number that is written here.
    if value is not None and not re.search("ratio|per_epoch|accumulation|val_s", name):
        kind, unit = type(scalar(value)), meant.partition(" ")[2]
        if kind in (int, float) and {Length, Size} & {*kinds}:
            meant = f"{value} {unit or 'examples'}"
        elif kind in kinds or (kind is int and float in kinds) or value in literal_words(hint):
            meant = value
    return shell_word(f"{key}={meant}")
