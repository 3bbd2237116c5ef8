"""A recipe's rows: those that it trains on, and those that it only validates on.

The latter are those of `data.validation`, or some held out of the rest. All reading of a recipe's
rows starts here.
"""

import itertools

import numpy as np

from tunesmith.config.schema import Data, Source
from tunesmith.data.schedule import shuffled
from tunesmith.data.source import Rows, read_rows
from tunesmith.errors import DataError
from tunesmith.units import Share, count_of

# Sets this draw apart from those of the batch schedule.
_PURPOSE = 1 << 20

SourceRows = list[tuple[Source, Rows]]


def read_splits(data: Data, seed: int) -> tuple[SourceRows, SourceRows]:
    """Read the rows to train on and the rows to validate on, source by source.

    With `data.hold_out` a seed draws the latter from all rows of `data.train`, and the others
    keep their order: `data.hold_out_seed`, or `seed` where the recipe has none.

    Raises:
        DataError: a source cannot be read, or no row is left to train on.
    """
    sources = [(source, read_rows(source)) for source in data.train]
    if data.hold_out is None:
        return sources, [(source, read_rows(source)) for source in data.validation]
    total = sum(len(rows) for _, rows in sources)
    count = count_held_out(data.hold_out, total)
    if data.hold_out_seed is not None:
        seed = data.hold_out_seed
    # Sorted, so that each source takes its part of the indices in order.
    held_out = np.sort(shuffled(total, seed, 0, _PURPOSE)[:count])
    train: SourceRows = []
    validation: SourceRows = []
    first = 0
    for source, rows in sources:
        stop = first + len(rows)
        # Indices run over all sources together.
        is_here = (held_out >= first) & (held_out < stop)
        indices = (held_out[is_here] - first).tolist()
        held_out_rows = rows.take(range(i, i + 1) for i in indices)
        # What lies between two held-out rows stays in the training.
        edges = [-1, *indices, len(rows)]
        train_rows = rows.take(range(a + 1, b) for a, b in itertools.pairwise(edges))
        if len(train_rows):
            train.append((source, train_rows))
        if len(held_out_rows):
            validation.append((source, held_out_rows))
        first = stop
    return train, validation


def count_held_out(share: Share, total: int) -> int:
    """How many of `total` rows are held out; DataError if nothing is left to train on."""
    count = share.of(total)
    if count >= total:
        raise DataError(
            f"holding out {share} leaves no row to train on",
            where="data.hold_out",
            why=f"data.train has {count_of(total, 'row')}",
            fix="hold out fewer rows, or data.hold_out: null",
        )
    return count
