"""Removal of the null keys that Arrow adds to objects, for example to the arguments of tool calls.

Arrow gives each object in a column the keys of all other objects. After `Dataset.to_json`, a call
`weather(city)` has the argument `"days": null` if another call has days, and the model would learn
to write this argument. However, a null argument can also be intended. Therefore null arguments are
removed only if the JSON file looks like an export from Arrow. In such a file, all calls have the
same keys, and some values are null. In tool schemas, null keys have no meaning, so `messages.py`
always removes them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from tunesmith.errors import DataError
from tunesmith.rows.source.table import Row, Table

# Number of rows at the start of a file that are examined for null arguments.
_EXAMINED_ROWS = 200
ARROW_LAYOUT = "exported from Arrow (null keys of objects are removed)"


def without_arrow_nulls(table: Table) -> Table:
    """Return the table, without null keys in objects if it was exported from Arrow."""
    if not _is_exported(table):
        return table

    def row(i: int) -> object:
        values = table.row(i)
        return without_nulls(values) if isinstance(values, dict) else values

    return replace(table, row=row, layout=", ".join(filter(None, (table.layout, ARROW_LAYOUT))))


def _is_exported(table: Table) -> bool:
    """Return whether all calls in the examined rows have the same argument names, and some
    arguments are null.
    """
    calls = 0
    has_null = False
    keys: frozenset[str] | None = None
    for i in range(min(_EXAMINED_ROWS, len(table))):
        try:
            row = table.row(i)
        except DataError:
            # Skip a broken row: the error is reported later, when all rows are read.
            continue
        for arguments in _arguments(row):
            if keys not in (None, arguments.keys()):
                return False
            keys = frozenset(arguments)
            calls += 1
            has_null = has_null or None in arguments.values()
    return calls > 1 and has_null


def _arguments(value: object) -> Iterator[Mapping[str, object]]:
    """Yield the arguments of each tool call in a row, if the arguments are an object."""
    if isinstance(value, list):
        for item in value:
            yield from _arguments(item)
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if key == "arguments" and isinstance(item, dict):
            yield item
        else:
            yield from _arguments(item)


def without_nulls(row: Row) -> Row:
    """Remove null keys from all objects in a row, but keep the columns of the row.

    Arrow gives each object the keys of the objects in all other rows.
    """
    return {column: drop_nulls(value) for column, value in row.items()}


def drop_nulls(value: Any) -> Any:
    """Remove null keys from all objects in a value."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [drop_nulls(item) for item in value]
    return value
