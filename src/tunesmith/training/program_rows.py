"""Rows that a program passes to `train`, written to the run directory, so that the run resumes."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tunesmith.checkpoint.claim import program_rows_file
from tunesmith.errors import DataError
from tunesmith.host.files import write_atomically

_WHERE = "train(rows=...)"


def keep_rows(rows: Any, output_dir: Path) -> Path:
    """Write rows as JSON lines below a run directory; returns the file.

    The file is named after its content: the same rows resume a run, and others are refused by it,
    with the rows of before still there.

    rows: mappings, a `datasets.Dataset`, or a pandas or polars data frame.

    Raises:
        DataError: they are none of these, or a value is nothing that JSON has.
    """
    lines = []
    for number, row in enumerate(_mappings(rows), start=1):
        if not isinstance(row, Mapping):
            raise DataError(
                f"row {number} is {type(row).__name__}, not a mapping of columns",
                where=_WHERE,
                fix='use rows such as [{"prompt": "Hello", "completion": "Hi"}]',
            )
        try:
            lines.append(json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n")
        except (TypeError, ValueError) as error:
            raise DataError(
                f"row {number} has a value that JSON does not support: {error}",
                where=_WHERE,
                fix="convert it to text or a number",
            ) from error
    if not lines:
        raise DataError("there are no rows", where=_WHERE, fix="pass at least one")
    text = "".join(lines)
    file = program_rows_file(output_dir, hashlib.sha256(text.encode()).hexdigest()[:12])
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)
    return file


def _mappings(rows: Any) -> Iterable[Any]:
    """The rows of a frame or a data set, one mapping each; others as they are."""
    if hasattr(rows, "iter_rows"):
        return rows.iter_rows(named=True)  # polars
    if hasattr(rows, "columns") and hasattr(rows, "to_dict"):
        return rows.to_dict("records")  # pandas
    if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable):
        raise DataError(
            f"rows are {type(rows).__name__}, not a list of rows",
            where=_WHERE,
            fix="pass a list of mappings, a datasets.Dataset, or a pandas or polars frame; "
            "a file is named by data.train.source",
        )
    return rows


def _plain(value: Any) -> Any:
    """A value as JSON has it: numbers of numpy as Python's, and what a frame lacks as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())  # an array of numpy, or one number
    if isinstance(value, float) and math.isnan(value):
        return None
    return value
