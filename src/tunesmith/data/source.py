"""A recipe's source -> rows, each with its place: a local file, or a dataset on the Hub."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.config.paths import DATA_SUFFIXES
from tunesmith.config.schema import Source
from tunesmith.data.files import Listed, Table, kind_of_value, open_table, without_nulls
from tunesmith.errors import DataError, first_line

log = logging.getLogger(__name__)

_SLICE = re.compile(
    r"^(?P<split>\w[\w.-]*)(?:\[(?P<start>-?[\d_]+)?(?P<start_pct>%)?:(?P<stop>-?[\d_]+)?(?P<stop_pct>%)?\])?$"
)


@dataclass(frozen=True)
class RowRange:
    """A run of rows of one table."""

    table: Table
    rows: range


class Rows:
    """The rows of one source, in order: `rows[i]` is a dict, `rows.where(i)` its place, counted from 1."""

    def __init__(self, name: str, parts: list[RowRange]) -> None:
        self.name = name
        self._parts = parts

    def __len__(self) -> int:
        return sum(len(p.rows) for p in self._parts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def _find(self, i: int) -> tuple[Table, int]:
        for part in self._parts:
            if i < len(part.rows):
                return part.table, part.rows[i]
            i -= len(part.rows)
        raise IndexError(i)

    def __getitem__(self, i: int) -> dict[str, Any]:
        table, at = self._find(i)
        row = table.row(at)
        if not isinstance(row, dict):
            raise DataError(
                f"the row is {kind_of_value(row)}, not an object",
                where=table.where(at),
                why="each row is an object with named columns",
                fix='write it as {"column": value, ...}, or delete it',
            )
        return row

    def where(self, i: int) -> str:
        """`file:line`, `file row N` or `id split row N`."""
        table, at = self._find(i)
        return table.where(at)

    def digest(self) -> str:
        """sha256 (hex) of the content and of which rows are taken; where the file lies does not enter."""
        total = hashlib.sha256()
        for part in self._parts:
            total.update(f"{part.table.fingerprint()}[{part.rows.start}:{part.rows.stop}]".encode())
        return total.hexdigest()


def read_rows(source: Source) -> Rows:
    """Read a source: its file or Hub dataset, its split, at most `max_examples` rows.

    Raises:
        DataError: nothing there, no access, broken, an unknown split, or no row selected.
    """
    local = is_local(source.source)
    tables = {"train": open_table(Path(source.source).expanduser())} if local else _hub(source)
    parts = select(tables, source.split, where=source.source)
    if source.max_examples is not None:
        parts = _first(parts, source.max_examples)
    return Rows(source.source, parts)


def from_list(rows: list[dict[str, Any]], name: str = "rows") -> Rows:
    """Rows that a program made."""
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()
    table = Listed(rows, [f"{name} row {i + 1}" for i in range(len(rows))], digest)
    return Rows(name, [RowRange(table, range(len(rows)))])


def is_local(name: str) -> bool:
    """Whether a source names a local file: it exists, is written as a path, or ends as a data file does."""
    written_as_path = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1
    return written_as_path or name.lower().endswith(DATA_SUFFIXES) or Path(name).exists()


# --- splits ---------------------------------------------------------------------------------------------------------


def select(tables: dict[str, Table], split: str | None, *, where: str) -> list[RowRange]:
    """The rows that `train[:95%]` and its like name; the rounding is that of `datasets` (to the closest row).

    `a+b` takes several after one another; None takes all rows of all splits.
    """
    if split is None:
        if len(tables) > 1:
            names = ", ".join(f"{name} ({len(table)})" for name, table in tables.items())
            log.warning("%s: no split is named, so all rows of all splits are taken: %s", where, names)
        return [RowRange(table, range(len(table))) for table in tables.values()]
    parts = [_slice(tables, piece.strip(), where) for piece in split.split("+")]
    if not any(len(part.rows) for part in parts):
        sizes = ", ".join(f"{name} has {len(table)} rows" for name, table in tables.items())
        raise DataError(f"split {split} selects no rows", where=where, why=sizes, fix="widen the slice: split: train")
    return parts


def _slice(tables: dict[str, Table], spec: str, where: str) -> RowRange:
    found = _SLICE.match(spec)
    pct = bool(found and (found["start_pct"] or found["stop_pct"]))
    bounds = [found[k] for k in ("start", "stop") if found[k] is not None] if found else []
    mixed = pct and len(bounds) == 2 and not (found and found["start_pct"] and found["stop_pct"])
    if not found or mixed or (pct and any(abs(int(b)) > 100 for b in bounds)) or (pct and not bounds):
        raise DataError(
            f"split {spec} cannot be read",
            where=where,
            why="both ends are percentages from -100 to 100, or both are row numbers",
            fix="write it as train, train[:95%], train[95%:], train[100:200] or train[-10%:]",
        )
    if found["split"] not in tables:
        raise DataError(
            f"there is no split {found['split']}",
            where=where,
            why=f"the splits are {', '.join(tables)}",
            fix=f"split: {spec.replace(found['split'], next(iter(tables)), 1)}",
        )
    table = tables[found["split"]]
    n = len(table)

    def edge(text: str | None, default: int) -> int:
        if text is None:
            return default
        at = round(int(text) * n / 100.0) if pct else int(text)
        return min(max(at + n, 0) if at < 0 else at, n)

    start, stop = edge(found["start"], 0), edge(found["stop"], n)
    return RowRange(table, range(start, max(start, stop)))


def _first(parts: list[RowRange], n: int) -> list[RowRange]:
    taken = []
    for part in parts:
        taken.append(RowRange(part.table, part.rows[:n]))
        n -= len(taken[-1].rows)
    return [part for part in taken if len(part.rows)]


# --- the Hub --------------------------------------------------------------------------------------------------------


class HubRows:
    """One split of a Hub dataset, memory-mapped from the Hub cache."""

    def __init__(self, name: str, split: str, dataset: Any) -> None:
        self._name, self._split, self._dataset = name, split, dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def row(self, i: int) -> Any:
        return without_nulls(self._dataset[i])

    def where(self, i: int) -> str:
        return f"{self._name} {self._split} row {i + 1}"

    def fingerprint(self) -> str:
        total = hashlib.sha256()
        for table in self._dataset.with_format("arrow").iter(batch_size=4096):
            for batch in table.to_batches():
                total.update(batch.serialize())
        return total.hexdigest()


def _hub(source: Source) -> dict[str, Table]:
    import datasets

    try:
        loaded = datasets.load_dataset(source.source, source.name, revision=source.revision)
    except Exception as error:  # the Hub client's errors have no common base; each is told apart below
        raise _hub_error(source, error) from error
    return {str(split): HubRows(source.source, str(split), rows) for split, rows in loaded.items()}


def _hub_error(source: Source, error: Exception) -> DataError:
    """What the Hub client said, as what, why and fix."""
    import datasets

    name, text = source.source, str(error)
    why = first_line(error)
    gated = "gated" in text or any(code in text for code in ("401", "403"))
    if isinstance(error, datasets.exceptions.DatasetNotFoundError) and gated:
        return DataError(
            f"no access to the dataset {name}",
            where=name,
            why=why,
            fix=f"accept its terms at https://huggingface.co/datasets/{name}, then: hf auth login (or set HF_TOKEN)",
        )
    if "OfflineMode" in text or "offline" in text.lower():
        return DataError(
            f"the dataset {name} is not in the Hub cache",
            where=name,
            why="HF_HUB_OFFLINE is set, so it is not fetched",
            fix=f"unset HF_HUB_OFFLINE, or name a local file: source: rows.jsonl (not {name})",
        )
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return DataError(
            f"there is no dataset {name} on the Hub, or it is private",
            where=name,
            why=why,
            fix="mend the name; for a private one: hf auth login; for a file: ./" + name,
        )
    if isinstance(error, ValueError) and "onfig" in text:
        return DataError(f"the dataset {name} needs a configuration", where=name, why=why, fix="name: <one of these>")
    if isinstance(error, OSError):  # ConnectionError, time-outs, a full disk
        return DataError(
            f"the dataset {name} cannot be fetched",
            where=name,
            why=why,
            fix="check the network and the disk (HF_HOME), and start again: what was fetched is kept",
        )
    return DataError(f"the dataset {name} cannot be read", where=name, why=why, fix="name a local copy of its rows")
