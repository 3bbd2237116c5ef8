"""Answers that are JSON: whether they are, whether they fit a schema, and how many of their fields
are right."""

import json
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
    """Return a validator of jsonschema, by the draft that the schema names.

    It opens no address: a `$ref` to one cannot be resolved.

    Raises:
        SchemaError: the schema is not valid.
        MachineError: jsonschema is not installed.
    """
    try:
        from jsonschema import validators
        from referencing import Registry
    except ImportError as error:
        raise MachineError(
            "--score json needs the package jsonschema for rows with a schema",
            where="--score json",
            why=str(error),
            fix=f"{pip_install('jsonschema')}, or remove the column schema",
        ) from error
    kind = validators.validator_for(schema, default=validators.Draft202012Validator)
    kind.check_schema(schema)
    return kind(schema, registry=Registry())
