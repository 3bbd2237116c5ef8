"""Conversion of the values of a recipe to a `Run`. pydantic validates the values against the
schema, and this module adds the position and a fix to its errors.

Values are not coerced, with one exception: an integer is accepted as a float, as in `alpha: 16`.
"""

import json
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import Field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from tunesmith.config.dump import yaml_value
from tunesmith.config.layers import COMMAND_LINE, FROM_PYTHON
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
from tunesmith.config.yaml_file import RecipeLayer, read_value, scalar
from tunesmith.errors import RecipeError
from tunesmith.host.shell import shell_path, shell_word
from tunesmith.units import Length, Share, Size

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

# pydantic's error types for a number of the right type that is out of bounds.
_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "finite_number")
_UNKNOWN_KEY = "unexpected_keyword_argument"
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


def parse_run(layer: RecipeLayer) -> tuple[Run | None, dict[str, RecipeError]]:
    """Convert the values of a recipe to a `Run`.

    Returns:
        The recipe without its wrong keys, or None if a required key is missing or wrong.
        Dotted key of each wrong value -> its error.
    """
    run, wrong = _validate(layer.values)
    file = layer.where().rpartition(":")[0]
    foreign = other_tools("keys").keys() & wrong
    if len(foreign) > 1 and "model" not in layer.values and Path(file).is_file():
        lines = [layer.where(key).replace(f"{file}:", f"{key} (line ") for key in wrong if key]
        error = RecipeError(
            f"unknown keys {', '.join(f'{line})' for line in lines)}",
            where=layer.where(),
            why="these are keys of another tool",
            fix=f"convert the file with `tunesmith import {shell_path(file)}`",
        )
        return None, {"": error}
    errors = {key: _explain(layer, key, error) for key, error in wrong.items()}
    if wrong:
        values = deepcopy(layer.values)
        # Reverse order removes a value before the section around it, and the last items of a list
        # first, so that the indices of the others stay.
        paths = {tuple(_path(values, error)) for error in wrong.values()} - {()}
        for path in sorted(paths, reverse=True):
            _value_at(values, path[:-1]).pop(path[-1])
        run, _ = _validate(values)
    return run, errors


def build_run(layer: RecipeLayer) -> Run:
    """Convert the values of a recipe to a `Run`. Raise RecipeError with all wrong keys."""
    run, errors = parse_run(layer)
    raise_together([*errors.values()])
    assert run is not None
    return run


def raise_together(errors: Sequence[RecipeError]) -> None:
    """Raise one RecipeError with all errors, if there are any."""
    if errors:
        first, *others = errors
        first.others = others
        raise first


def meant_by(key: str) -> set[str]:
    """Return the names of the keys that a wrong key may mean, as texts of errors name them."""
    section, _, name = without_indices(key).rpartition(".")
    if name == "name":
        name = section
    near = nearest(name, map(last_part, keys()))
    return {name, near or name}


def _validate(values: dict[str, Any]) -> "tuple[Run | None, dict[str, ErrorDetails]]":
    """Return the `Run`, and pydantic's error for each wrong or missing key."""
    from pydantic import ValidationError

    data = values.get("data")
    if isinstance(data, dict):
        # Put a single source that is given without a list into a list. null and {} mean that there
        # is no source.
        listed = dict(data)
        for part in ("train", "validation"):
            if part in data and isinstance(data[part], dict | None):
                listed[part] = [data[part]] if data[part] else []
        data = listed
    try:
        # Validate JSON, because pydantic's strict mode accepts a list as a tuple, and a mapping as
        # a dataclass, only in JSON input.
        text = json.dumps(values if data is None else {**values, "data": data})
        return run_type().validate_json(text), {}
    except ValidationError as error:
        wrong: dict[str, ErrorDetails] = {}
        for one in error.errors(include_url=False):
            key = ".".join(map(str, _path(values, one)))
            # If `name` is a number, a list has too few items.
            name = one["loc"][-1]
            if one["type"] == "missing" and isinstance(name, str):
                key = f"{key}.{name}".lstrip(".")
            wrong.setdefault(key, one)
    # pydantic reports one error for each member type of a union. Use the error with the longest
    # key, because this member type matched the largest part of the value. An unknown key in a
    # section can be a misspelled name of a missing key of this section.
    unknown = {key.rpartition(".")[0] for key, one in wrong.items() if one["type"] == _UNKNOWN_KEY}
    return None, {
        key: one
        for key, one in wrong.items()
        if not any(other.startswith(f"{key}.") for other in wrong)
        and not (one["type"] == "missing" and key.rpartition(".")[0] in unknown)
    }


def _path(values: dict[str, Any], error: "ErrorDetails") -> list[str | int]:
    """Return the path to the value that a pydantic error is about.

    Parts of pydantic's location that are not in the values, such as union members, are skipped.
    """
    path: list[str | int] = []
    value: Any = values
    for part in error["loc"]:
        with suppress(KeyError, IndexError, TypeError):
            value = value[part]
            path.append(part)
    return path


def _value_at(values: dict[str, Any], path: Sequence[str | int]) -> Any:
    """Return the value at a path of keys and indices."""
    value: Any = values
    for part in path:
        value = value[part]
    return value


def _explain(layer: RecipeLayer, key: str, error: "ErrorDetails") -> RecipeError:
    """Return the error of a key that is unknown, missing, of the wrong type or out of bounds."""
    where = layer.where(key)
    on_command_line = where.startswith(COMMAND_LINE)
    path = _path(layer.values, error)
    if error["type"] == _UNKNOWN_KEY:
        fix = suggest_key(key, on_command_line=on_command_line)
        return RecipeError(f"unknown key {key}", where=where, fix=fix)
    field, hint = _field_and_type(key)
    about = field.metadata["description"]
    if error["type"] == "missing" and isinstance(error["loc"][-1], str):
        fix = f"add {key}: {example(key)}"
        return RecipeError(f"{key} is missing: {about}", where=where, fix=fix)
    value = _value_at(layer.values, path)
    # For an item of a list, show an example of the entire list.
    fix = _repair(layer, key, path, hint)
    fix = fix or f"write {_setting(where, key, example(key))}   # {about}"
    # A value that begins with a digit is an amount, even if the key also accepts words.
    is_amount = not literal_words(hint) or str(value)[:1].isdigit()
    if error["type"] in _BOUNDS:
        what = f"{key} is {reprlib.repr(value)}: {error['msg'].lower()}"
    elif error["type"] == "value_error" and is_amount:
        what = f"{key}: {error['ctx']['error']}"
    else:
        what = f"{key}: expected {type_in_words(hint)}, found {json.dumps(value):.60}"
    # The shell turns `key=$UNSET` into `key=`, which is null.
    is_empty = value is None and on_command_line
    why = "the value is empty, perhaps because a shell variable is not set" if is_empty else ""
    return RecipeError(what, where=where, why=why, fix=fix)


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


def _setting(where: str, key: str, value: str) -> str:
    """Return the text that sets a key: `key=value` on the command line, else `key: value`.

    For an item of a list, return only the value.
    """
    name = last_part(key)
    if name.isdigit():
        return value
    if where.startswith(FROM_PYTHON):
        return f"{key!r}: {read_value(value, 'x', where).values['x']!r}"
    return shell_word(f"{key}={value}") if where.startswith(COMMAND_LINE) else f"{name}: {value}"


def _repair(layer: RecipeLayer, key: str, path: Sequence[str | int], hint: object) -> str:
    """Return the fix that keeps the user's own value, in a form that the key accepts.

    Return "" if no form of the value is accepted.
    """
    where = layer.where(key)
    value = _value_at(layer.values, path)
    words = literal_words(hint)
    if words and isinstance(value, str | bool):
        one_of = f"write one of {', '.join(words)}"
        # The value may be the name that another tool uses for one of the allowed words.
        absent = other_tools("absent").get(str(value).lower())
        if absent:
            return f"{one_of}: {absent.format(value)}"
        near = nearest(str(value), words)
        if near:
            return f"did you mean {_setting(where, key, near)}?"
    accepted = []
    for text in _other_forms(value, hint, example(key)):
        values = deepcopy(layer.values)
        _value_at(values, path[:-1])[path[-1]] = read_value(text, "x", where).values["x"]
        if not any(f"{wrong}.".startswith(f"{key}.") for wrong in _validate(values)[1]):
            accepted.append(_setting(where, key, text))
    if accepted:
        # A number without a unit can mean two of them, such as steps and epochs.
        return f"write {' or '.join(accepted[: 2 if isinstance(value, int) else 1])}"
    return one_of if words and isinstance(value, str) else ""


def _other_forms(value: object, hint: object, usual: str) -> Iterator[str]:
    """Yield the YAML texts of other types that may be meant by a value of the wrong type.

    Args:
        usual: an example of the key, whose unit comes first.
    """
    number = value
    if isinstance(value, str):
        # The value is in quotes, or has the separator of thousands.
        plain = value.replace(",", "").replace(" ", "")
        number = scalar(plain)
        yield from (value, plain, f"[{value}]", nearest(value, ("true", "false")) or value)
        yield "null" if value.lower() in ("none", "") else value
    if isinstance(number, int | float):
        yield f"{number:g}"
        for kind in _AMOUNTS.intersection(members(hint)):
            if "%" in kind.units and 0 < number < 1:
                yield f"{number * 100:g} %"
            for unit in sorted(kind.units, key=lambda unit: not usual.endswith(f" {unit}")):
                yield f"{number:g} {unit}"
    if isinstance(value, list):
        yield from map(yaml_value, value[:1])
    # A text that YAML reads as a number or a boolean needs quotes.
    yield json.dumps(str(value).lower())
    yield f"[{yaml_value(value)}]"


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
