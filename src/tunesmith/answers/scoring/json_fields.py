"""Checks of JSON answers: strict parsing, validation by a JSON schema, and comparison of fields."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tunesmith.errors import MachineError
from tunesmith.host.packages import pip_install

if TYPE_CHECKING:
    from jsonschema.protocols import Validator
    from pydantic import JsonValue

JsonPath = tuple[str | int, ...]
_ABSENT = object()  # value of a missing field, which is not equal to any other value


def parse_strict(content: str) -> "JsonValue":
    """Parse an entire text as one JSON value.

    Raise ValueError if the text is not JSON. NaN and infinity are not JSON.
    """
    try:
        value: JsonValue = json.loads(content, parse_constant=_reject_constant)
    except RecursionError:
        raise ValueError("the JSON value is nested too deeply") from None
    return value


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def equal_fields(answer: "JsonValue", reference: "JsonValue") -> float:
    """Return the fraction of equal fields among all fields of the two values.

    A field is a path in the JSON value and the scalar, empty object or empty list at this path. If
    only one of the two values has a path, the field counts as different.
    """
    answer_fields = dict(_fields(answer))
    reference_fields = dict(_fields(reference))
    paths = answer_fields.keys() | reference_fields.keys()
    equal = 0
    for path in paths:
        left = answer_fields.get(path, _ABSENT)
        right = reference_fields.get(path, _ABSENT)
        # In JSON, 1 and 1.0 are equal, but 1 and true are not. In Python all three are equal.
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
    """Return a jsonschema validator for the draft that the schema names.

    The validator does not open URLs, so a `$ref` to a URL cannot be resolved.

    Raises:
        SchemaError: the schema is not valid.
        MachineError: jsonschema is not installed.
    """
    try:
        from jsonschema import validators
        from referencing import Registry
    except ImportError as error:
        raise MachineError(
            "--score json requires the package jsonschema if the rows contain a JSON schema",
            where="--score json",
            why=str(error),
            fix=f"run `{pip_install('jsonschema')}`, or remove the column `schema` from the rows",
        ) from error
    kind = validators.validator_for(schema, default=validators.Draft202012Validator)
    kind.check_schema(schema)
    return kind(schema, registry=Registry())
