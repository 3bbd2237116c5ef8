"""Reader of Parquet and Arrow files that keeps only a few rows in memory.

These formats have no random access to single rows, so rows are read in order. To read an earlier
row again, the reader starts again at the first row of its group. A group is a row group of a
Parquet file or an entire Arrow file.
"""

import bisect
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tunesmith.errors import DataError, first_line
from tunesmith.host.memory import open_uncached
from tunesmith.rows.source.arrow_nulls import without_nulls
from tunesmith.rows.source.table import (
    FileVersion,
    Row,
    Table,
    changed_error,
    file_digest,
    repeated_in,
    unreadable_error,
    version_of,
)

# Number of rows of a block, which are converted to Python objects together.
BLOCK_ROWS = 256
# Buffer size per column. Without a buffer, the Parquet reader loads an entire row group.
PARQUET_BUFFER_BYTES = 1 << 20


def read_arrow(path: Path) -> Table:
    """Open a Parquet or Arrow file as a table."""
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
        # ValueError means that a text is not UTF-8. OverflowError means that Python's datetime
        # cannot represent a time.
        except (pa.ArrowException, OSError, StopIteration, ValueError, OverflowError) as error:
            raise _broken(path, error, version) from None

    # Clear the cache when the table is deleted, because the open group can be as large as the file.
    # If the cache contains a group of another file at that time, this group is opened again when it
    # is needed.
    weakref.finalize(row, _open_group.cache_clear)
    return Table(sum(sizes), row, lambda i: f"{path} row {i + 1}", partial(file_digest, path))


def _broken(path: Path, error: Exception, version: FileVersion | None) -> DataError:
    """Build the error for a file in which a row cannot be read."""
    if version_of(path) != version:
        return changed_error(path)
    if isinstance(error, OSError) and not isinstance(error, pa.ArrowException):
        return unreadable_error(path, error)
    return DataError(
        f"the file is not a valid {path.suffix[1:]} file",
        where=path,
        why=first_line(error),
        fix="download or write the file again",
    )


_ReadGroup = Callable[[int], Iterator[pa.RecordBatch]]


class _OpenGroup:
    """An open row group of a file, of which only one block is in memory.

    Attributes:
        blocks: iterator of the remaining blocks of the group.
        first: number of the first row of the current block.
        block: the current block, as Arrow data.
        rows: the current block, as Python objects. Empty until a row of this block is read.
    """

    def __init__(self, read_group: _ReadGroup, group: int, first: int) -> None:
        self.blocks = (
            batch.slice(start, BLOCK_ROWS)
            for batch in read_group(group)
            for start in range(0, len(batch), BLOCK_ROWS)
        )
        self.first = first
        self.block = pa.RecordBatch.from_pylist([])
        self.rows: list[Row] = []


# The cache has one entry, so that only one file is open and in memory. Removing the entry closes
# the file.
_open_group = lru_cache(maxsize=1)(_OpenGroup)
_READ_LOCK = threading.Lock()


def _read_row(read_group: _ReadGroup, ends: list[int], i: int) -> Row:
    """Return row `i` of a file. If possible, continue from the last row that was read.

    Args:
        read_group: the function that iterates over the batches of a group.
        ends: for each group, the number of rows from the start of the file to the end of the group.
    """
    number = bisect.bisect_right(ends, i)
    first_row = ends[number - 1] if number else 0
    group = _open_group(read_group, number, first_row)
    if i < group.first:
        _open_group.cache_clear()
        group = _open_group(read_group, number, first_row)
    try:
        while i >= group.first + len(group.block):
            group.first += len(group.block)
            group.block = next(group.blocks)
            group.rows = []
        group.rows = group.rows or group.block.to_pylist()
    except BaseException:
        # After an error the iterator is unusable, so the next call must open the group again.
        _open_group.cache_clear()
        raise
    return group.rows[i - group.first]


# Number of rows of each group, and the function that reads a group.
_Groups = tuple[list[int], _ReadGroup]


def _open_parquet(path: Path) -> _Groups:
    """Open a .parquet file. Its row groups are read one at a time, without buffers or threads, so
    that a large file takes little memory.
    """
    file = pq.ParquetFile(path, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False)
    repeated = repeated_in(file.schema_arrow.names)
    if repeated:
        raise DataError(
            f"the file has several columns named {', '.join(repeated)}",
            where=path,
            fix="write the file again with unique column names",
        )
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
    """Open an .arrow file, either in Arrow's file format or in the stream format of `datasets`."""
    with path.open("rb") as file:
        is_file = file.read(6) == b"ARROW1"

    def read_batches(_: int = 0) -> Iterator[pa.RecordBatch]:
        with open_uncached(path) as opened:
            if is_file:
                reader = pa.ipc.open_file(opened)
                yield from map(reader.get_batch, range(reader.num_record_batches))
            else:
                yield from pa.ipc.open_stream(opened)

    # The entire file is one group, because a stream has no index of its batches.
    return [sum(map(len, read_batches()))], read_batches
