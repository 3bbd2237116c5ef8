"""Parquet and Arrow files -> tables of rows; a few rows at a time are in memory.

Rows are read on from the last one: these formats have no place for each. One before it is found by
reading its group again from the start (Parquet's row group, or the entire Arrow file).
"""

import bisect
import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tunesmith.data.source.arrow_nulls import without_nulls
from tunesmith.data.source.table import (
    FileVersion,
    Row,
    Table,
    changed_error,
    file_digest,
    unreadable_error,
    version_of,
)
from tunesmith.errors import DataError, first_line
from tunesmith.host.memory import open_uncached

# Rows converted to Python at once.
BLOCK_ROWS = 256
# What the Parquet reader takes of a column at once; it would read a row group whole.
PARQUET_BUFFER_BYTES = 1 << 20


def read_arrow(path: Path) -> Table:
    """A Parquet or Arrow file."""
    version = version_of(path)
    read_groups = _open_parquet if path.suffix.lower() == ".parquet" else _open_ipc
    try:
        sizes, read_group = read_groups(path)
    except (pa.ArrowException, OSError) as error:
        raise _broken(path, error, version) from None
    ends = list(itertools.accumulate(sizes))

    def row(i: int) -> Row:
        try:
            with _READ_LOCK:
                return without_nulls(_read_row(read_group, ends, i))
        # ValueError and OverflowError: a text that is no UTF-8, a time that Python does not have.
        except (pa.ArrowException, OSError, StopIteration, ValueError, OverflowError) as error:
            raise _broken(path, error, version) from None

    # A batch of an Arrow file may be as large as the file. The table holds `row` as long as
    # somebody reads; another file that is read then is found again from the start of its group.
    weakref.finalize(row, _open_group.cache_clear)
    return Table(
        sum(sizes),
        row,
        where=lambda i: f"{path} row {i + 1}",
        fingerprint=lambda: file_digest(path),
    )


def _broken(path: Path, error: Exception, version: FileVersion | None) -> DataError:
    """The error for a file that cannot be read on."""
    if version_of(path) != version:
        return changed_error(path)
    if isinstance(error, OSError) and not isinstance(error, pa.ArrowException):
        return unreadable_error(path, error)
    return DataError(
        f"the file is not {path.suffix[1:]}",
        where=str(path),
        why=first_line(error),
        fix="download or write the file again",
    )


_ReadGroup = Callable[[int], Iterator[pa.RecordBatch]]


class _OpenGroup:
    """A group of rows: a block of them is in memory, from row `first` on, as `rows` once read."""

    def __init__(self, read_group: _ReadGroup, group: int, first: int) -> None:
        self.blocks = (
            batch.slice(start, BLOCK_ROWS)
            for batch in read_group(group)
            for start in range(0, len(batch), BLOCK_ROWS)
        )
        self.first = first
        self.block = pa.RecordBatch.from_pylist([])
        self.rows: list[Row] = []


# One file at a time is open, and in memory: its iterator is closed when it is forgotten.
_open_group = lru_cache(maxsize=1)(_OpenGroup)
_READ_LOCK = threading.Lock()


def _read_row(read_group: _ReadGroup, ends: list[int], i: int) -> Row:
    """Row i of a file whose groups end at `ends`; read on from the row that was read last."""
    number = bisect.bisect_right(ends, i)
    first_of_group = ends[number - 1] if number else 0
    group = _open_group(read_group, number, first_of_group)
    if i < group.first:
        _open_group.cache_clear()
        group = _open_group(read_group, number, first_of_group)
    try:
        while i >= group.first + len(group.block):
            group.first += len(group.block)
            group.block = next(group.blocks)
            group.rows = []
        group.rows = group.rows or group.block.to_pylist()
    except BaseException:
        # The next row is found from the start of its group.
        _open_group.cache_clear()
        raise
    return group.rows[i - group.first]


_Groups = tuple[list[int], _ReadGroup]


def _open_parquet(path: Path) -> _Groups:
    file = pq.ParquetFile(path, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False)
    names = file.schema_arrow.names
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        what = f"the file has several columns named {', '.join(repeated)}"
        fix = "write it again with unique column names"
        raise DataError(what, where=str(path), fix=fix)
    sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    file.close()

    def read_group(n: int) -> Iterator[pa.RecordBatch]:
        with (
            open_uncached(path) as opened,
            pq.ParquetFile(opened, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False) as parquet,
        ):
            yield from parquet.iter_batches(BLOCK_ROWS, row_groups=[n], use_threads=False)

    return sizes, read_group


def _open_ipc(path: Path) -> _Groups:
    """Two containers share the suffix: the file format, and the stream that `datasets` writes."""
    with path.open("rb") as file:
        is_file = file.read(6) == b"ARROW1"

    def read_batches(_: int = 0) -> Iterator[pa.RecordBatch]:
        with open_uncached(path) as opened:
            if is_file:
                reader = pa.ipc.open_file(opened)
                yield from map(reader.get_batch, range(reader.num_record_batches))
            else:
                yield from pa.ipc.open_stream(opened)

    # One group: a stream has no table of its batches, and is read from its start.
    return [sum(map(len, read_batches()))], read_batches
