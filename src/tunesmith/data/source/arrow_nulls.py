"""Null keys that Arrow adds to objects, also in JSON exported from it: a tool call keeps its own
arguments.

Arrow gives each object the keys of all objects in its place: after `Dataset.to_json` a call of
`weather(city)` has `"days": null`, because another call has days. The model would learn to write
it. In a schema a null keyword means nothing (`messages.py` always drops it); the arguments of a
call may hold a null that is meant. They are therefore changed only where the file shows the export:
every call has the keys of all calls, and some are null.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from tunesmith.data.source.table import Row, Table
from tunesmith.errors import DataError

# Rows looked at, from the first.
_EXAMINED = 200
ARROW_LAYOUT = "exported from Arrow (null keys of objects are left out)"


def without_arrow_nulls(table: Table) -> Table:
    """The table; without null keys in its objects, if it was exported from Arrow."""
    if not _is_exported(table):
        return table

    def row(i: int) -> object:
        values = table.row(i)
        return without_nulls(values) if isinstance(values, dict) else values

    layout = ", ".join(filter(None, (table.layout, ARROW_LAYOUT)))
    return replace(table, row=row, layout=layout)


def _is_exported(table: Table) -> bool:
    """Tell whether all calls in the examined rows have the same arguments, some of them null."""
    calls = 0
    has_null = False
    keys: frozenset[str] | None = None
    for i in range(min(_EXAMINED, len(table))):
        try:
            row = table.row(i)
        except DataError:
            # It is named when all rows are read.
            continue
        for arguments in _arguments(row):
            if keys not in (None, arguments.keys()):
                return False
            keys = frozenset(arguments)
            calls += 1
            has_null = has_null or any(value is None for value in arguments.values())
    return calls > 1 and has_null


def _arguments(value: object) -> Iterator[Mapping[str, object]]:
    """The arguments of all calls in a row, where they are objects."""
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
    """Drop null keys inside nested values.

    Arrow adds to every struct the keys that any other row has there.
    """
    return {column: drop_nulls(value) for column, value in row.items()}


def drop_nulls(value: Any) -> Any:
    """A value without the null keys of the objects in it."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [drop_nulls(item) for item in value]
    return value
