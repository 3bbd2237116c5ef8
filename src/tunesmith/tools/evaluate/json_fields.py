"""Answers that are JSON: whether they are, whether they fit a schema, and how many of their fields
are right."""

import json
from collections.abc import Iterator
from typing import Any

import regex

from tunesmith.errors import MachineError
from tunesmith.host.packages import pip_install
from tunesmith.tools.evaluate import text

JsonPath = tuple[str | int, ...]
_ABSENT = object()  # equal to no value


def parse_strict(content: str) -> Any:
    """A JSON value, the whole text; ValueError for anything else, NaN and infinity included."""
    try:
        return json.loads(content, parse_constant=_reject_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def equal_fields(answer: Any, reference: Any) -> float:
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
        equal += is_same(left, right)
    return equal / len(paths)


def _fields(value: Any, path: JsonPath = ()) -> Iterator[tuple[JsonPath, Any]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _fields(item, (*path, name))
    elif isinstance(value, list) and value:
        for i, item in enumerate(value):
            yield from _fields(item, (*path, i))
    else:
        yield path, value


def is_same(left: Any, right: Any) -> bool:
    """Tell if two values without parts are the same JSON value: 1 and 1.0 are, 1 and true not."""
    if isinstance(left, bool) is not isinstance(right, bool):
        return False
    return bool(left == right)


def schema_validator(schema: Any) -> Any:
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
    keywords = {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
    }
    text = json.dumps(schema)
    if '"unevaluatedProperties"' in text and '"patternProperties"' in text:
        # jsonschema looks for what is evaluated by searches that do not end.
        raise ValueError(
            "unevaluatedProperties beside patternProperties is not supported: "
            "use additionalProperties"
        )
    return validators.extend(kind, keywords)(_without_drafts(schema), registry=Registry())


def _without_drafts(schema: Any) -> Any:
    """The schema without the names of drafts: each would bring that draft's validator back."""
    if isinstance(schema, dict):
        return {
            name: _without_drafts(value)
            for name, value in schema.items()
            if name != "$schema" or isinstance(value, dict)
        }
    if isinstance(schema, list):
        return [_without_drafts(value) for value in schema]
    return schema


# The keywords of jsonschema that search with a schema's patterns, by a search that ends.


def _pattern(validator: Any, pattern: str, value: Any, _: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if validator.is_type(value, "string") and not _is_found(pattern, value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


def _pattern_properties(
    validator: Any, patterns: dict[str, Any], value: Any, _: Any
) -> Iterator[Any]:
    if not validator.is_type(value, "object"):
        return
    for pattern, schema in patterns.items():
        for name, item in value.items():
            if _is_found(pattern, name):
                yield from validator.descend(item, schema, path=name, schema_path=pattern)


def _additional_properties(validator: Any, allowed: Any, value: Any, schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if not validator.is_type(value, "object"):
        return
    patterns = schema.get("patternProperties", {})
    for name, item in value.items():
        is_named = name in schema.get("properties", {})
        if is_named or any(_is_found(pattern, name) for pattern in patterns):
            continue
        if validator.is_type(allowed, "object"):
            yield from validator.descend(item, allowed, path=name)
        elif not allowed:
            yield ValidationError(f"the property {name!r} is not one of the schema's")


def _is_found(pattern: str, value: str) -> bool:
    """Tell whether a pattern matches somewhere.

    Raises:
        ValueError: it is no pattern.
        TimeoutError: as `text.search`.
    """
    try:
        return text.search(pattern, value)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error


def fits(validator: Any, value: Any) -> bool:
    """Tell whether a value fits the schema.

    Raises:
        ValueError: the schema names another that is not in it, or a pattern that is none.
        TimeoutError: as `text.search`.
    """
    from referencing.exceptions import Unresolvable

    try:
        return bool(validator.is_valid(value))
    except Unresolvable as error:
        raise ValueError(f"it names {error.ref}, which is not in it") from error
    except RecursionError:
        raise ValueError("it refers to itself without end") from None
