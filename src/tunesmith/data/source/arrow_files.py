"""Parquet and Arrow files -> tables of rows; a few rows at a time are in memory.

Rows are read on from the last one: these formats have no place for each. One before it is found by
reading its group again from the start (Parquet's row group, Arrow's record batch).
"""

import bisect
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tunesmith.data.source.arrow_nulls import without_nulls
from tunesmith.data.source.table import (
    FileVersion,
    ReadInTurn,
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
    if not sum(sizes):
        raise DataError("the file has no rows", where=str(path), fix="name a file that does")
    reader = _ForwardReader(sizes, read_group)

    def row(i: int) -> Row:
        try:
            return without_nulls(reader.row(i))
        # ValueError and OverflowError: a text that is no UTF-8, a time that Python does not have.
        except (pa.ArrowException, OSError, StopIteration, ValueError, OverflowError) as error:
            raise _broken(path, error, version) from None

    # The table holds `row` as long as somebody reads.
    weakref.finalize(row, reader.close)
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


class _ForwardReader(ReadInTurn):
    """Rows by their number, in groups that are read from their start; some are in memory.

    Args:
        sizes: rows of each group.
        read_group: the rows of one, in batches.
    """

    def __init__(
        self, sizes: Sequence[int], read_group: Callable[[int], Iterator[pa.RecordBatch]]
    ) -> None:
        self._ends = list(itertools.accumulate(sizes))
        self._sizes = sizes
        self._read_group = read_group
        self._group = -1
        self._blocks: Iterator[pa.RecordBatch] = iter(())
        # The rows that were read last, and the number of the first of them.
        self._rows: list[Row] = []
        self._first = 0

    def row(self, i: int) -> Row:
        with self.lock:
            if not self._first <= i < self._first + len(self._rows):
                try:
                    self._read_on(i)
                except BaseException:
                    # The rows in memory are no longer those that `_first` says.
                    self.close()
                    raise
            return self._rows[i - self._first]

    def close(self) -> None:
        """Close the file, if it is open, and forget its rows."""
        with self.lock:
            self._group = -1
            # Its file is closed with the iterator.
            self._blocks = iter(())
            self._rows = []

    def _read_on(self, i: int) -> None:
        """Read the block of row i."""
        self.take_turn()
        group = bisect.bisect_right(self._ends, i)
        if group != self._group or i < self._first:
            self._group = group
            self._first = self._ends[group] - self._sizes[group]
            self._rows = []
            self._blocks = _blocks(self._read_group(group))
        self._first += len(self._rows)
        block = next(self._blocks)
        while i >= self._first + len(block):
            self._first += len(block)
            block = next(self._blocks)
        self._rows = block.to_pylist()


def _blocks(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        for start in range(0, len(batch), BLOCK_ROWS):
            yield batch.slice(start, BLOCK_ROWS)


_Groups = tuple[list[int], Callable[[int], Iterator[pa.RecordBatch]]]


def _open_parquet(path: Path) -> _Groups:
    file = pq.ParquetFile(path, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False)
    names = file.schema_arrow.names
    repeated = sorted({name for name in names if names.count(name) > 1})
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

    def read_batches() -> Iterator[pa.RecordBatch]:
        with open_uncached(path) as opened:
            if is_file:
                reader = pa.ipc.open_file(opened)
                for n in range(reader.num_record_batches):
                    yield reader.get_batch(n)
            else:
                yield from pa.ipc.open_stream(opened)

    def read_batch(n: int) -> Iterator[pa.RecordBatch]:
        if not is_file:
            # A stream has no table of its batches: it is read from its start.
            return read_batches()
        with open_uncached(path) as opened:
            return iter([pa.ipc.open_file(opened).get_batch(n)])

    sizes = [len(batch) for batch in read_batches()]
    return sizes if is_file else [sum(sizes)], read_batch
