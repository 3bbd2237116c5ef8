"""Opening of a recipe's data source, which is a local file or folder, or a data set on the Hub."""

import hashlib
import logging
import re
from array import array
from collections.abc import Mapping
from pathlib import Path

from tunesmith.config.paths import DATA_SUFFIXES, is_pattern, is_written_as_path
from tunesmith.config.row_settings import row_fix
from tunesmith.config.schema import Source
from tunesmith.errors import DataError, first_line
from tunesmith.rows.source.folders import open_local
from tunesmith.rows.source.hub_files import download_rows
from tunesmith.rows.source.message_rows import group_messages
from tunesmith.rows.source.table import Row, Rows, Table
from tunesmith.units import count_of

log = logging.getLogger(__name__)

# Approximate value, which fits English text and most tokenizers.
CHARACTERS_PER_TOKEN = 4

_SPLIT_NAME = re.compile(r"(?:^|\+)\s*(\w[\w.-]*)")
# A slice with one percentage and one row number, such as [10%:500]. `datasets` reads it wrongly.
_MIXED_BOUNDS = re.compile(r"%:-?[\d_]+\]|\[-?[\d_]+:-?[\d_]+%")


def read_rows(source: Source) -> Rows:
    """Return the rows of a source: the selected split, limited to `max_examples` rows.

    Raises:
        DataError: the file, the Hub data set or the split does not exist or cannot be read.
    """
    rows = select_rows(open_splits(source), source.split, where=source.source)
    if source.max_examples is not None:
        rows = rows.take(range(min(source.max_examples, len(rows))))
    return rows


def open_splits(source: Source) -> dict[str, Table]:
    """Open a source and return its splits by name. A single file has one split, `train`.

    Raises:
        DataError: the file or the Hub data set does not exist or cannot be read.
    """
    # Rows with one message each are joined, unless the recipe names their columns.
    has_turns = source.format in ("messages", "sharegpt", "prompt")
    joined = has_turns and set(source.columns.values()) <= {"messages"}
    path = Path(source.source).expanduser()
    if not is_local(source.source):
        path = download_rows(source)
    return open_local(path, source.name, join_messages=joined)


def from_list(rows: list[Row], name: str = "rows") -> Rows:
    """Convert a list of rows to `Rows`. A program can pass such a list instead of a file.

    The list must not change later, because its digest is computed now.
    """
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()
    # In Python, rows[0] is the first row.
    form = "rows[{0}]" if name == "rows" else "{name} row {1}"
    table = Table(
        len(rows), rows.__getitem__, lambda i: form.format(i, i + 1, name=name), lambda: digest
    )
    return Rows(name, [group_messages(table)])


def count_characters(value: object) -> int:
    """Count the characters of all texts in a row or a value. Pictures in base64 are not counted."""
    if isinstance(value, str):
        return 0 if value.startswith("data:image/") else len(value)
    # Check for concrete types such as list first, because isinstance with an abstract type
    # (Mapping) is slow.
    if isinstance(value, list | tuple):
        return sum(map(count_characters, value))
    if isinstance(value, (dict, Mapping)):
        if "base64" in value or value.get("type") == "base64":
            return 0
        return sum(map(count_characters, value.values()))
    return 0


def count_of_example(row: Mapping[str, object], source: Source) -> int:
    """Count the characters of a row's examples.

    The prompt of a pair is counted twice, because both sequences contain it.
    """
    count = count_characters(row)
    if source.format == "preference":
        count += count_characters(row.get(source.columns.get("prompt", "prompt")))
    return count


def is_local(name: str) -> bool:
    """Return True if a source is a local file, folder or pattern, and False if it is a Hub data
    set.

    A local source exists, or is written as a path or a pattern, or ends with the suffix of a data
    file.
    """
    return (
        is_written_as_path(name)
        or is_pattern(name)
        or name.lower().endswith(DATA_SUFFIXES)
        or Path(name).exists()
    )


def select_rows(tables: dict[str, Table], split: str | None, *, where: str) -> Rows:
    """Return the rows that a split, such as `train[:95%]`, selects.

    The grammar and the rounding are the same as in `datasets`.

    Args:
        tables: the splits of the source by name.
        split: the split, or None for the rows of all splits.
        where: the name of the source, for error messages.

    Raises:
        DataError: the split does not exist, cannot be parsed, or selects no rows.
    """
    if split is None:
        if len(tables) > 1:
            names = ", ".join(f"{name} ({len(table)})" for name, table in tables.items())
            log.warning(
                "%s: no split is given, so these splits (number of rows) are used: %s", where, names
            )
        return Rows(where, list(tables.values()))
    from datasets import ReadInstruction

    for name in _SPLIT_NAME.findall(split):
        if name not in tables:
            raise DataError(
                f"there is no split {name}",
                where=where,
                why=f"the splits are {', '.join(tables)}",
                fix=f"use {row_fix(where, split=split.replace(name, next(iter(tables)), 1))}",
            )
    if _MIXED_BOUNDS.search(split):
        raise _unreadable_split(
            split, where, "both ends of a slice must be percentages, or both must be row numbers"
        )
    sizes = {name: len(table) for name, table in tables.items()}
    # `datasets` raises AssertionError for some invalid splits, and ValueError for others.
    try:
        slices = ReadInstruction.from_spec(split.strip()).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise _unreadable_split(split, where, first_line(error)) from None
    # Numbers of the selected rows, counted over all selected splits. A slice is empty if its end is
    # before its start.
    numbers = array("q")
    selected: dict[str, int] = {}
    for part in slices:
        first = selected.setdefault(part.splitname, sum(sizes[name] for name in selected))
        numbers.extend(range(first + part.from_, first + part.to))
    if not numbers:
        counts = [f"{name} has {count_of(size, 'row')}" for name, size in sizes.items()]
        raise DataError(
            f"the split {split} selects no rows",
            where=where,
            why=", ".join(counts),
            fix=f"use a larger slice, such as {row_fix(where, split='train')}",
        )
    return Rows(where, [tables[name] for name in selected], numbers)


def _unreadable_split(split: str, where: str, why: str) -> DataError:
    return DataError(
        f"the split {split} is invalid",
        where=where,
        why=why,
        fix="write the split as train, train[:95%], train[95%:], train[100:200] or train[-10%:]",
    )
