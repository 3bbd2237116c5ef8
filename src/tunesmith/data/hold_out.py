"""Which rows a run trains on and which it only validates on: those of `data.validation`, or some held out of the rest."""

import numpy as np

from tunesmith.config.schema import Data, Source
from tunesmith.data.schedule import shuffled
from tunesmith.data.source import Rows, read_rows
from tunesmith.errors import DataError
from tunesmith.units import Share

_PURPOSE = 1 << 20  # sets this draw apart from those of the batch schedule

SourceRows = list[tuple[Source, Rows]]


def count_held_out(share: Share, total: int) -> int:
    """How many of `total` rows are held out; DataError if nothing is left to train on."""
    count = share.of(total)
    if count >= total:
        what, why = f"holding out {share} leaves no row to train on", f"data.train has {total:,} rows"
        raise DataError(what, where="data.hold_out", why=why, fix="hold out fewer, or data.hold_out: null")
    return count


def read_splits(data: Data, seed: int) -> tuple[SourceRows, SourceRows]:
    """Read the rows to train on and the rows to validate on, source by source; DataError where that cannot be done.

    With `data.hold_out` the seed draws the latter from all rows of `data.train`, and the others keep their order.
    """
    train = [(source, read_rows(source)) for source in data.train]
    if data.hold_out is None:
        return train, [(source, read_rows(source)) for source in data.validation]
    total = sum(len(rows) for _, rows in train)
    held_out = np.sort(shuffled(total, seed, 0, _PURPOSE)[: count_held_out(data.hold_out, total)])
    kept, aside, first = SourceRows(), SourceRows(), 0
    for source, rows in train:
        here = (held_out[(held_out >= first) & (held_out < first + len(rows))] - first).tolist()
        between = [range(a + 1, b) for a, b in zip([-1, *here], [*here, len(rows)], strict=True)]
        kept.append((source, rows.take(between)))
        aside.append((source, rows.take([range(i, i + 1) for i in here])))
        first += len(rows)
    return [part for part in kept if len(part[1])], [part for part in aside if len(part[1])]
