"""A recipe's rows: those that it trains on, and those that it only validates on.

The latter are those of `data.validation`, or some held out of the rest. All reading of a recipe's
rows starts here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tunesmith.config.schema import Data, RowFault, Source
from tunesmith.data.compare.near_duplicates import Groups
from tunesmith.data.compare.row_checks import RowFindings, check_rows, checked_before
from tunesmith.data.shuffle import shuffled
from tunesmith.data.source.open_source import Rows, read_rows
from tunesmith.errors import DataError
from tunesmith.units import Share, count_of

# Sets this draw apart from those of the batch schedule.
_PURPOSE = 1 << 20

# Where every group is larger than what is to be held out, the smallest is held out if it is no more
# than so many times that, or than this share of all rows.
MAX_OVERSHOOT = 2
MAX_OVERSHOOT_SHARE = 0.1

SourceRows = list[tuple[Source, Rows]]


@dataclass(frozen=True)
class Splits:
    """The rows of a recipe.

    Attributes:
        sources: all rows of `data.train`, before any is left out or held out.
        findings: what was found in them; nothing where they were not compared.
        left_out: the rows of `sources` that `data.leave_out` leaves out, by fault; a row of two
            faults is with the first.
        held_out: rows of `sources` that are held out, in order.
    """

    train: SourceRows
    validation: SourceRows
    sources: SourceRows
    findings: RowFindings = field(default_factory=RowFindings)
    left_out: dict[RowFault, list[int]] = field(default_factory=dict)
    held_out: tuple[int, ...] = ()


def read_splits(
    data: Data, seed: int, *, only_cached: bool = False
) -> tuple[SourceRows, SourceRows]:
    """Read the rows to train on and the rows to validate on, source by source.

    Args:
        seed: draws the rows of `data.hold_out`, unless there is a `data.hold_out_seed`.
        only_cached: rows are compared with each other only if they were before, which takes time:
            near-duplicates may then be held out apart from each other.

    Raises:
        DataError: a source cannot be read, or no row is left to train on.
    """
    sources = _read_sources(data)
    findings = RowFindings()
    if data.hold_out is not None or data.leave_out:
        findings = checked_before(sources) if only_cached else check_rows(sources)
    splits = _split_rows(data, seed, sources, findings)
    return splits.train, splits.validation


def read_checked_splits(data: Data, seed: int) -> Splits:
    """Read the splits with what is found in the rows, whether the split depends on it or not."""
    sources = _read_sources(data)
    return _split_rows(data, seed, sources, check_rows(sources))


def _read_sources(data: Data) -> SourceRows:
    return [(source, read_rows(source)) for source in data.train]


def _split_rows(data: Data, seed: int, sources: SourceRows, findings: RowFindings) -> Splits:
    """The rows of `sources`, less those of `data.leave_out`, on two sides.

    A seed draws those of `data.hold_out`, and the others keep their order. Near-duplicates, and
    rows with one prompt or one long answer, are held out together or not at all; without any, the
    draw is the first rows of a shuffled order.
    """
    left_out: dict[RowFault, list[int]] = {}
    gone: set[int] = set()
    for fault in data.leave_out:
        left_out[fault] = [row for row in findings.faulty_rows(fault) if row not in gone]
        gone.update(left_out[fault])
    total = sum(len(rows) for _, rows in sources)
    remaining = np.delete(np.arange(total), sorted(gone))
    if gone and not len(remaining):
        raise DataError(
            "no row is left to train on",
            where="data.leave_out",
            why=f"it leaves out all {count_of(total, 'row')} of data.train",
            fix="name fewer faults, or data.leave_out=[]",
        )
    if data.hold_out is None:
        validation = [(source, read_rows(source)) for source in data.validation]
        kept = _take(sources, remaining) if gone else sources
        return Splits(kept, validation, sources, findings, left_out)
    count = count_held_out(data.hold_out, len(remaining))
    if data.hold_out_seed is not None:
        seed = data.hold_out_seed
    groups = _kept_together(findings.without(gone), remaining)
    # Sorted, so that each source takes its part of the indices in order.
    held_out = remaining[np.sort(draw_held_out(len(remaining), count, seed, groups))]
    train_rows = np.setdiff1d(remaining, held_out, assume_unique=True)
    return Splits(
        _take(sources, train_rows),
        _take(sources, held_out),
        sources,
        findings,
        left_out,
        tuple(held_out.tolist()),
    )


def _kept_together(findings: RowFindings, remaining: np.ndarray) -> list[list[int]]:
    """Groups of positions in `remaining`: near-duplicates, and rows that share a prompt or an
    answer.
    """
    groups = Groups()
    for group in (*findings.near_duplicates, *findings.shared):
        positions = np.searchsorted(remaining, group).tolist()
        for position in positions[1:]:
            groups.join(positions[0], position)
    return groups.of_several()


def draw_held_out(
    total: int, count: int, seed: int, groups: Sequence[Sequence[int]] = ()
) -> np.ndarray:
    """int64: `count` of the rows 0 to total - 1 to hold out, in the order drawn.

    The rows of a group come together, when the order comes to its first row: so each group is held
    out as often as a row that is alone. One that is larger than what is still missing stays in the
    training. There may be fewer rows where no group fits, but always one: if all rows are in larger
    groups, the smallest group comes, or, where that is too large too, the rows are drawn as
    without groups.
    """
    order = shuffled(total, seed, 0, _PURPOSE)
    group_of = {row: group for group in groups for row in group}
    if not group_of:
        return order[:count]
    held_out: list[int] = []
    for row in map(int, order):
        group = group_of.get(row, (row,))
        if row == group[0] and len(group) <= count - len(held_out):
            held_out += group
        if len(held_out) == count:
            break
    if held_out:
        return np.array(held_out, np.int64)
    # All rows are in groups of more than `count`.
    smallest = min(groups, key=len)
    most = max(MAX_OVERSHOOT * count, MAX_OVERSHOOT_SHARE * total)
    return order[:count] if len(smallest) > most else np.array(smallest, np.int64)


def _take(sources: SourceRows, indices: np.ndarray) -> SourceRows:
    """Rows by their indices over all sources, in order; a source without any is left away."""
    taken: SourceRows = []
    first = 0
    for source, rows in sources:
        stop = first + len(rows)
        # Sorted indices: those of this source are side by side.
        lowest, highest = np.searchsorted(indices, [first, stop])
        if lowest < highest:
            taken.append((source, rows.take((indices[lowest:highest] - first).tolist())))
        first = stop
    return taken


def count_held_out(share: Share, total: int) -> int:
    """Count the held-out rows among `total`; DataError if nothing is left to train on."""
    count = share.of(total)
    if count >= total:
        raise DataError(
            f"holding out {share} leaves no row to train on",
            where="data.hold_out",
            why=f"data.train has {count_of(total, 'row')}",
            fix="hold out fewer rows, or data.hold_out: null",
        )
    return count
