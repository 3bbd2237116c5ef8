"""A recipe's source -> rows, each with its place: a local file, or a dataset on the Hub."""

import hashlib
import logging
import re
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tunesmith.config.paths import DATA_SUFFIXES, is_pattern, is_written_as_path
from tunesmith.config.schema import Source
from tunesmith.data.source.arrow_nulls import without_nulls
from tunesmith.data.source.folders import open_local
from tunesmith.data.source.listings import config_error
from tunesmith.data.source.table import Place, Row, Rows, Table
from tunesmith.errors import DataError, first_line
from tunesmith.host.files import from_here, near_path
from tunesmith.units import count_of

log = logging.getLogger(__name__)

# Of English text and most tokenizers, roughly.
CHARACTERS_PER_TOKEN = 4

# Types of columns that `datasets` makes objects of.
_MEDIA_TYPES = ("Image", "Audio", "Video", "Pdf", "Nifti")
_SPLIT_NAME = re.compile(r"(?:^|\+)\s*(\w[\w.-]*)")
# A percentage and a row number, which `datasets` confuses.
_MIXED_BOUNDS = re.compile(r"%:-?[\d_]+\]|\[-?[\d_]+:-?[\d_]+%")


def read_rows(source: Source) -> Rows:
    """Read a source: its file or Hub dataset, its split, at most `max_examples` rows.

    Raises:
        DataError: one of these is not there or cannot be read.
    """
    tables = open_splits(source)
    rows = select_rows(tables, source.split, where=source.source)
    if source.max_examples is not None:
        rows = rows.take(range(min(source.max_examples, len(rows))))
    return rows


def describe_layouts(sources: Iterable[Rows]) -> list[str]:
    """A line for the user for each source whose files have a layout that had to be found out."""
    lines = [f"{from_here(rows.name)}: {rows.layout}" for rows in sources if rows.layout]
    # Rows that are held out are of the same source.
    return list(dict.fromkeys(lines))


def open_splits(source: Source) -> dict[str, Table]:
    """The splits of a source by name: of a file one, `train`; raises as `read_rows`."""
    if is_local(source.source):
        return open_local(Path(source.source).expanduser(), source.name)
    return _read_hub(source)


def from_list(rows: list[Row], name: str = "rows") -> Rows:
    """Rows that a program passes."""
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()
    table = Table(
        len(rows),
        rows.__getitem__,
        where=lambda i: f"{name} row {i + 1}",
        fingerprint=lambda: digest,
    )
    return Rows(name, [table])


def count_characters(value: object) -> int:
    """Count the characters of all texts in a row, or in a value of it; a picture is none."""
    if isinstance(value, str):
        return 0 if value.startswith("data:image/") else len(value)
    # Nearly all are of these two types, which are told much faster than others of their kind.
    if isinstance(value, list | tuple):
        return sum(map(count_characters, value))
    if isinstance(value, (dict, Mapping)):
        if "base64" in value or value.get("type") == "base64":
            return 0
        return sum(map(count_characters, value.values()))
    return 0


def count_of_example(row: Mapping[str, object], source: Source) -> int:
    """Characters of what a row makes: a pair's prompt stands before each of its two answers."""
    count = count_characters(row)
    if source.format == "preference":
        count += count_characters(row.get(source.columns.get("prompt", "prompt")))
    return count


def is_local(name: str) -> bool:
    """Return whether a source names a local file or several.

    It exists, is written as a path, ends as a file of rows or text does, or is a pattern.
    """
    is_file = name.lower().endswith(DATA_SUFFIXES) or is_pattern(name) or Path(name).exists()
    return is_written_as_path(name) or is_file


def select_rows(tables: dict[str, Table], split: str | None, *, where: str) -> Rows:
    """The rows that a split such as `train[:95%]` names; None: of all splits.

    Grammar and rounding are those of `datasets`.
    """
    if split is None:
        if len(tables) > 1:
            names = ", ".join(f"{name} ({len(table)})" for name, table in tables.items())
            log.warning("%s: no split given; using all rows of all splits: %s", where, names)
        return Rows(where, list(tables.values()))
    from datasets import ReadInstruction

    for name in _SPLIT_NAME.findall(split):
        if name not in tables:
            raise DataError(
                f"there is no split {name}",
                where=where,
                why=f"the splits are {', '.join(tables)}",
                fix=f"split: {split.replace(name, next(iter(tables)), 1)}",
            )
    if _MIXED_BOUNDS.search(split):
        why = "both ends are percentages, or both are row numbers"
        raise _unreadable_split(split, where, why)
    sizes = {name: len(table) for name, table in tables.items()}
    # The grammar of splits is that of `datasets`; it raises AssertionError for some.
    try:
        slices = ReadInstruction.from_spec(split.strip()).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise _unreadable_split(split, where, first_line(error)) from None
    # A slice may end before it begins: then it has no rows.
    numbers = array("q")
    selected: dict[str, int] = {}
    for part in slices:
        first = selected.setdefault(part.splitname, sum(sizes[name] for name in selected))
        numbers.extend(range(first + part.from_, first + part.to))
    if not numbers:
        why = ", ".join(f"{name} has {count_of(n, 'row')}" for name, n in sizes.items())
        fix = "use a larger slice: split: train"
        raise DataError(f"split {split} selects no rows", where=where, why=why, fix=fix)
    return Rows(where, [tables[name] for name in selected], numbers)


def _unreadable_split(split: str, where: str, why: str) -> DataError:
    fix = "write it as train, train[:95%], train[95%:], train[100:200] or train[-10%:]"
    return DataError(f"split {split} cannot be read", where=where, why=why, fix=fix)


def _read_hub(source: Source) -> dict[str, Table]:
    """The splits of a Hub dataset, memory-mapped from the Hub cache."""
    import datasets

    name = source.source
    try:
        splits = datasets.load_dataset(name, source.name, revision=source.revision)
    except Exception as error:
        # The Hub client's errors have no common base; `_hub_error` tells them apart.
        raise _hub_error(name, error) from error
    return {str(split): _hub_table(f"{name} {split}", rows) for split, rows in splits.items()}


def _hub_table(name: str, dataset: Any) -> Table:
    import datasets

    def fingerprint() -> str:
        digest = hashlib.sha256()
        for table in dataset.with_format("arrow").iter(batch_size=4096):
            for batch in table.to_batches():
                digest.update(batch.serialize())
        return digest.hexdigest()

    # Rows as Arrow has them, with the values of JSON: those of Python would decode every picture.
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
    """The types of columns, as `datasets` writes them, with pictures and sound as bytes."""
    if isinstance(feature, list):
        return [_undecoded(part) for part in feature]
    if not isinstance(feature, dict):
        return feature
    parts = {name: _undecoded(part) for name, part in feature.items()}
    return {**parts, "decode": False} if feature.get("_type") in _MEDIA_TYPES else parts


def _hub_error(name: str, error: Exception) -> DataError:
    """Convert an error of the Hub client to what, why and fix."""
    import datasets

    text = str(error)
    why = first_line(error)
    is_missing = isinstance(error, datasets.exceptions.DatasetNotFoundError)
    is_refused = "gated" in text or "401" in text or "403" in text
    if is_missing and is_refused:
        what = f"no access to the dataset {name}"
        page = f"https://huggingface.co/datasets/{name}"
        fix = f"accept its terms at {page}, then: hf auth login (or set HF_TOKEN)"
    elif "offline" in text.lower():
        what = f"the dataset {name} is not in the Hub cache"
        why = "HF_HUB_OFFLINE is set, so it is not downloaded"
        fix = f"unset HF_HUB_OFFLINE, or use a local file: source: rows.jsonl (not {name})"
    elif is_missing:
        what = f"there is no dataset {name} on the Hub, or it is private"
        fix = f"fix the name; for a private one: hf auth login; for a file: ./{name}"
    elif isinstance(error, ValueError) and "onfig" in text:
        return config_error(name, error)
    else:
        # A lost connection, a time-out, a full disk, or files of a form that nothing reads.
        what = f"the dataset {name} cannot be read"
        fix = (
            "check the network and the disk (HF_HOME), and start again: finished downloads are"
            " kept; or use a local copy of its rows"
        )
    near = near_path(Path(name))
    if near is not None:
        fix = f"did you mean {near}, which is here? else {fix}"
    return DataError(what, where=name, why=why, fix=fix)
