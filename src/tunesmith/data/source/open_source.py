"""Opening of a recipe's data source, which is a local file or folder, or a data set on the Hub."""

import hashlib
import logging
import re
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.config.paths import DATA_SUFFIXES, is_pattern, is_written_as_path
from tunesmith.config.row_settings import row_fix
from tunesmith.config.schema import Source
from tunesmith.data.source.arrow_nulls import without_nulls
from tunesmith.data.source.folders import open_local
from tunesmith.data.source.listings import config_error
from tunesmith.data.source.message_rows import group_messages
from tunesmith.data.source.table import Place, Row, Rows, Table
from tunesmith.errors import DataError, first_line
from tunesmith.host.files import find_similar_path
from tunesmith.units import count_of

log = logging.getLogger(__name__)

# Approximate value, which fits English text and most tokenizers.
CHARACTERS_PER_TOKEN = 4

# Column types whose values `datasets` decodes to objects, such as PIL images.
_MEDIA_TYPES = ("Image", "Audio", "Video", "Pdf", "Nifti")
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
    if is_local(source.source):
        return open_local(Path(source.source).expanduser(), source.name, join_messages=joined)
    import datasets

    name = source.source
    try:
        # `datasets` memory-maps the splits from the Hub cache.
        splits = datasets.load_dataset(name, source.name, revision=source.revision)
    except Exception as error:
        # Catch all exceptions, because the errors of the Hub client have no common base class.
        # `_hub_error` distinguishes them.
        raise _hub_error(name, error) from error
    tables = {str(split): _hub_table(f"{name} {split}", rows) for split, rows in splits.items()}
    return {split: group_messages(table) if joined else table for split, table in tables.items()}


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


def _hub_table(name: str, dataset: Any) -> Table:
    import datasets

    def fingerprint() -> str:
        digest = hashlib.sha256()
        for table in dataset.with_format("arrow").iter(batch_size=4096):
            for batch in table.to_batches():
                digest.update(batch.serialize())
        return digest.hexdigest()

    # Read the rows as Arrow data, because reading them as Python objects would decode every
    # picture.
    tables = dataset.with_format("arrow")
    undecoded = datasets.Features.from_dict(_undecoded(dataset.features.to_dict()))

    def row(i: int) -> Row:
        [values] = tables[i].to_pylist()
        return without_nulls(undecoded.decode_example(values))

    return Table(
        len(dataset),
        row=row,
        where=lambda i: Place(f"{name} row {i + 1}"),
        fingerprint=fingerprint,
    )


def _undecoded(feature: Any) -> Any:
    """Return the column types of a Hub data set with the decoding of media disabled.

    Pictures and sound are then read as bytes. The types are in the dict form of `datasets`.
    """
    if isinstance(feature, list):
        return [_undecoded(part) for part in feature]
    if not isinstance(feature, dict):
        return feature
    parts = {name: _undecoded(part) for name, part in feature.items()}
    return {**parts, "decode": False} if feature.get("_type") in _MEDIA_TYPES else parts


def _is_of_files(error: BaseException) -> bool:
    """Return whether an error of `datasets` is about the files of a data set, such as a script."""
    import datasets

    kinds = (datasets.exceptions.DatasetsError, RuntimeError, TypeError, ValueError)
    return isinstance(error, kinds)


def _hub_error(name: str, error: Exception) -> DataError:
    """Convert an error of the Hub client to a DataError with a cause and a fix."""
    import datasets

    text = str(error)
    why = first_line(error)
    is_missing = isinstance(error, datasets.exceptions.DatasetNotFoundError)
    is_refused = "gated" in text or "401" in text or "403" in text
    if is_missing and is_refused:
        what = f"you have no access to the dataset {name}"
        page = f"https://huggingface.co/datasets/{name}"
        fix = f"accept the terms at {page}, then run `hf auth login` (or set HF_TOKEN)"
    elif "offline" in text.lower():
        what = f"the dataset {name} is not in the Hub cache"
        why = "HF_HUB_OFFLINE is set, so the dataset is not downloaded"
        local = row_fix(name, source="rows.jsonl")
        fix = f"unset HF_HUB_OFFLINE, or use a local file, such as {local}"
    elif is_missing:
        what = f"there is no dataset {name} on the Hub, or it is private"
        fix = f"correct the name, log in with `hf auth login`, or write ./{name} for a local file"
    elif isinstance(error, ValueError) and "onfig" in text:
        return config_error(name, error)
    elif _is_of_files(error.__cause__ or error):
        # The text of the error names the columns that differ between the files.
        what = f"the files of the dataset {name} cannot be read as one table"
        prefix = "An error occurred while generating the dataset"
        details = " ".join(text.removeprefix(prefix).split())
        why = f"{details or first_line(error.__cause__ or error):.300}"
        local = row_fix(name, source="DIR")
        fix = f"hf download {name} --repo-type dataset --local-dir DIR   # then use {local}"
    else:
        # The remaining causes are a lost connection, a time-out, or a full disk.
        what = f"the dataset {name} cannot be read"
        fix = (
            "check the network and the disk (HF_HOME), and start again (finished downloads are"
            " kept), or use a local copy of the rows"
        )
    near = find_similar_path(Path(name))
    if near is not None:
        fix = f"did you mean the local path {near}? If not, {fix}"
    return DataError(what, where=name, why=why, fix=fix)
