"""Reading of the rows that a recipe names, and splitting them into training rows and validation
rows.

The validation rows come from `data.validation`, or are held out from `data.train`. All code that
needs the rows of a recipe uses this module.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.config.schema import Data, RowFault, Source
from tunesmith.errors import DataError
from tunesmith.rows.bad_rows import find_bad_rows
from tunesmith.rows.compare.near_duplicates import Groups
from tunesmith.rows.compare.row_checks import RowFindings, check_rows, place
from tunesmith.rows.shuffle import shuffled
from tunesmith.rows.source.open_source import Rows, read_rows
from tunesmith.units import Share, count_of

# Number of the random stream that draws held-out rows. It differs from all streams of the batch
# schedule, which have smaller numbers.
_PURPOSE = 1 << 20

SourceRows = list[tuple[Source, Rows]]


@dataclass(frozen=True)
class OpenedRows:
    """All rows of `data.train` and of `data.validation`, by source."""

    train: SourceRows
    validation: SourceRows


def open_sources(data: Data, opened: OpenedRows | None = None) -> OpenedRows:
    """Open all sources of a recipe. Raise DataError if a source cannot be read.

    Args:
        opened: rows that are already open. They are used for equal sources.
    """
    known = [] if opened is None else [*opened.train, *opened.validation]

    def rows_of(source: Source) -> Rows:
        for other, rows in known:
            if other == source:
                return rows
        return read_rows(source)

    return OpenedRows(
        [(source, rows_of(source)) for source in data.train],
        [(source, rows_of(source)) for source in data.validation],
    )


@dataclass(frozen=True)
class Splits:
    """The training rows and the validation rows of a recipe.

    Attributes:
        train: the training rows, by source.
        validation: the validation rows, by source.
        sources: all rows of `data.train`, including the rows that are removed or held out.
        findings: the findings of the row checks in `sources`. Empty if the rows were not compared.
        left_out: kind of problem -> the rows of `sources` that `data.leave_out` removes because of
            it. A row with two problems is listed only under the first one.
        held_out: the rows of `sources` that are held out, sorted.
    """

    train: SourceRows
    validation: SourceRows
    sources: SourceRows
    findings: RowFindings
    left_out: dict[RowFault, list[int]]
    held_out: tuple[int, ...] = ()

    @property
    def kept_findings(self) -> RowFindings:
        """The findings without the rows that `data.leave_out` removes."""
        removed = [row for rows in self.left_out.values() for row in rows]
        return self.findings.without(removed)

    def pairs_across(self, across: Sequence[Sequence[int]]) -> list[list[str]]:
        """Return pairs of row locations: a validation row, and its near-duplicate in the training
        rows.

        Such pairs are rare if the validation rows are held out from `data.train`, because
        near-duplicates then stay in the same split, unless their group is too large.

        Args:
            across: pairs [row of `data.validation`, row of `data.train`] that are near-duplicates.
        """
        if not self.held_out:
            return [[place(self.validation, v), place(self.train, t)] for v, t in across]
        pairs = []
        held_out = set(self.held_out)
        for group in self.kept_findings.near_duplicates:
            trained = [place(self.sources, row) for row in group if row not in held_out]
            for row in group:
                if trained and row in held_out:
                    pairs.append([place(self.sources, row), trained[0]])
        return pairs


def read_splits(
    data: Data, seed: int, opened: OpenedRows | None = None, *, only_cached: bool = False
) -> tuple[SourceRows, SourceRows]:
    """Read the training rows and the validation rows, by source.

    Args:
        data: the section `data` of the recipe.
        seed: the seed that draws the rows of `data.hold_out`, if `data.hold_out_seed` is not set.
        opened: the rows of the sources. If None, the sources are opened.
        only_cached: whether to use only cached findings of the row checks, because a comparison of
            the rows takes time. If there are no cached findings, near-duplicates can get into
            different splits.

    Raises:
        DataError: a source cannot be read, or no training row is left.
    """
    opened = opened or open_sources(data)
    findings = RowFindings()
    if data.hold_out is not None or data.leave_out:
        findings = check_rows(opened.train, only_cached=only_cached)
    splits = _split_rows(data, seed, opened, findings)
    return splits.train, splits.validation


def read_checked_splits(data: Data, seed: int, opened: OpenedRows | None = None) -> Splits:
    """Read the training rows and the validation rows.

    Always run the row checks, even if they are not needed to split the rows.

    Args:
        opened: the rows of the sources. If None, the sources are opened.
    """
    opened = opened or open_sources(data)
    return _split_rows(data, seed, opened, check_rows(opened.train))


def _split_rows(data: Data, seed: int, opened: OpenedRows, findings: RowFindings) -> Splits:
    """Remove the rows of `data.leave_out`, and split the rest into training and validation rows.

    The held-out rows are drawn with the seed, and the training rows keep their order. All rows of a
    group (near-duplicates, or rows with the same prompt or the same long answer) get into the same
    split, unless all groups are too large (see `draw_held_out`).
    """
    sources = opened.train
    left_out = {}
    removed = set()
    for fault in data.leave_out:
        left_out[fault] = [row for row in findings.faulty_rows(fault) if row not in removed]
        removed.update(left_out[fault])
    total = sum(len(rows) for _, rows in sources)
    remaining = np.delete(np.arange(total), sorted(removed))
    if removed and not len(remaining):
        raise DataError(
            "no training row is left",
            where="data.leave_out",
            why=f"data.leave_out removes all {count_of(total, 'row')} of data.train",
            fix="remove values from the list data.leave_out, or set data.leave_out=[]",
        )
    if data.hold_out is None:
        kept = _take(sources, remaining) if removed else sources
        return Splits(kept, opened.validation, sources, findings, left_out)
    count = count_held_out(data.hold_out, len(remaining))
    if data.hold_out_seed is not None:
        seed = data.hold_out_seed
    groups = _inseparable_groups(findings.without(removed), remaining)

    def is_readable(row: int) -> bool:
        [(source, rows)] = _take(sources, remaining[[row]])
        return not find_bad_rows(rows, source, data.system)

    # Rows that data.bad_rows=skip leaves out would be missing in the validation split.
    skips = data.bad_rows == "skip"
    drawn = draw_held_out(len(remaining), count, seed, groups, is_readable if skips else None)
    # Sort the indices, because `_take` requires sorted indices.
    held_out = remaining[np.sort(drawn)]
    return Splits(
        _take(sources, np.setdiff1d(remaining, held_out, assume_unique=True)),
        _take(sources, held_out),
        sources,
        findings,
        left_out,
        tuple(held_out.tolist()),
    )


def _inseparable_groups(findings: RowFindings, remaining: np.ndarray) -> list[list[int]]:
    """Return the groups of rows that must be in the same split, as indices into `remaining`.

    A group consists of near-duplicates, and of rows with the same prompt or the same long answer.
    """
    groups = Groups()
    for group in (*findings.near_duplicates, *findings.shared):
        positions = np.searchsorted(remaining, group).tolist()
        for position in positions[1:]:
            groups.join(positions[0], position)
    return groups.joined_groups()


def draw_held_out(
    total: int,
    count: int,
    seed: int,
    groups: Sequence[Sequence[int]] = (),
    is_readable: Callable[[int], bool] | None = None,
) -> np.ndarray:
    """Draw `count` rows at random to hold out. The rows are numbered from 0 to total - 1.

    Return their int64 indices in the order of the draw.

    The rows are visited in a shuffled order. The first row of a group draws the entire group, so
    that a group and a single row have the same probability. A group is skipped if it has more rows
    than are still needed, so the result can have fewer than `count` rows.

    If no row can be drawn because all groups are too large, `count` single rows are drawn.

    Args:
        is_readable: whether a row can be held out. None if all rows can.
    """
    order = shuffled(total, seed, 0, _PURPOSE)
    group_of = {row: group for group in groups for row in group}
    if not group_of and is_readable is None:
        return order[:count]
    held_out: list[int] = []
    for row in map(int, order):
        group = group_of.get(row, (row,))
        missing = count - len(held_out)
        if not missing:
            break
        is_drawn = row == group[0] and len(group) <= missing
        if is_drawn and (is_readable is None or all(map(is_readable, group))):
            held_out += group
    if held_out or not groups:
        return np.array(held_out, np.int64)
    # Each row is in a group with more than `count` rows.
    return order[:count]


def _take(sources: SourceRows, indices: np.ndarray) -> SourceRows:
    """Select rows by sorted indices, which count over all sources. Drop sources without rows."""
    taken = []
    first = 0
    for source, rows in sources:
        stop = first + len(rows)
        # The indices are sorted, so the indices of one source are adjacent.
        lowest, highest = np.searchsorted(indices, [first, stop])
        if lowest < highest:
            taken.append((source, rows.take((indices[lowest:highest] - first).tolist())))
        first = stop
    return taken


def count_held_out(share: Share, total: int) -> int:
    """Return the number of rows to hold out. Raise DataError if no training row would be left."""
    count = share.of(total)
    if count >= total:
        raise DataError(
            f"holding out {share} leaves no row to train on",
            where="data.hold_out",
            why=f"data.train has {count_of(total, 'row')}",
            fix="hold out fewer rows, or set data.hold_out: null",
        )
    return count
