"""Answers that are JSON: whether they are, whether they fit a schema, and how many of their fields
are right."""

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tunesmith.errors import MachineError
from tunesmith.host.packages import pip_install

if TYPE_CHECKING:
    from jsonschema.protocols import Validator
    from pydantic import JsonValue

JsonPath = tuple[str | int, ...]
_ABSENT = object()  # equal to no value


def parse_strict(content: str) -> "JsonValue":
    """A JSON value, the whole text; ValueError for anything else, NaN and infinity included."""
    try:
        value: JsonValue = json.loads(content, parse_constant=_reject_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def equal_fields(answer: "JsonValue", reference: "JsonValue") -> float:
    """The share of fields that are equal: of those that either value has.

    A field is a value that is no object and no list, at its path. An empty object or list is one
    too. So a field too many counts as one that is missing.
    """
    answer_fields = dict(_fields(answer))
    reference_fields = dict(_fields(reference))
    paths = answer_fields.keys() | reference_fields.keys()
    equal = 0
    for path in paths:
        left = answer_fields.get(path, _ABSENT)
        right = reference_fields.get(path, _ABSENT)
        # 1 and 1.0 are the same JSON value, 1 and true are not.
        equal += left == right and isinstance(left, bool) is isinstance(right, bool)
    return equal / len(paths)


def _fields(value: "JsonValue", path: JsonPath = ()) -> Iterator[tuple[JsonPath, "JsonValue"]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _fields(item, (*path, name))
    elif isinstance(value, list) and value:
        for i, item in enumerate(value):
            yield from _fields(item, (*path, i))
    else:
        yield path, value


def schema_validator(schema: dict[str, "JsonValue"] | bool) -> "Validator":
    """A validator of jsonschema, by the draft that the schema names.

    It opens no address: a `$ref` to one cannot be resolved.

    Raises:
        ValueError: the schema is none.
        MachineError: jsonschema is not installed.
    """
    try:
        from jsonschema import SchemaError, validators
        from referencing import Registry
    except ImportError as error:
        raise MachineError(
            "--score json needs the package jsonschema for rows with a schema",
            where="--score json",
            why=str(error),
            fix=f"{pip_install('jsonschema')}, or remove the column schema",
        ) from error
    kind = validators.validator_for(schema, default=validators.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"{error.json_path}: {error.message}") from error
    except OverflowError as error:
        raise ValueError(f"a pattern of it is not a regular expression: {error}") from error
    except RecursionError:
        raise ValueError("it, or a pattern of it, is nested too deeply") from None
    return kind(schema, registry=Registry())


def fits(validator: "Validator", value: "JsonValue") -> bool:
    """Tell whether a value fits the schema.

    Raises:
        ValueError: the schema names another that is not in it, itself without end, or a pattern
            that is none.
    """
    from referencing.exceptions import Unresolvable

    try:
        return bool(validator.is_valid(value))
    except Unresolvable as error:
        raise ValueError(f"it names {error.ref}, which is not in it") from error
    except RecursionError:
        raise ValueError("it refers to itself without end") from None
    except (re.error, OverflowError) as error:
        raise ValueError(f"a pattern of it is not a regular expression: {error}") from error
