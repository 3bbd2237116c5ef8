"""Batches of examples that stand in no schedule."""

from __future__ import annotations

import numpy as np
import pytest

from tunesmith.data.batches.layout import Layout
from tunesmith.data.text.example import Example

ROOM = 60


def examples(sequences: int) -> list[Example]:
    random = np.random.default_rng(0)
    made = []
    for number in range(40):
        lengths = tuple(random.integers(2, 30, sequences).tolist())
        ids = np.full(sum(lengths), number, np.int32)
        trained = random.random(len(ids)) < 0.5
        made.append(Example(ids, trained, lengths if sequences > 1 else ()))
    return made


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize("is_packed", [True, False])
def test_each_example_is_in_one_batch_of_one_rank(
    is_packed: bool, sequences: int, ranks: int
) -> None:
    rows = examples(sequences)
    of_ranks = []
    for rank in range(ranks):
        layout = Layout(0, is_packed, multiple=4, share=(rank, ranks))
        of_ranks.append(list(layout.batches(rows, ROOM)))
    assert len({len(batches) for batches in of_ranks}) == 1
    taken = [i for batches in of_ranks for indices, _ in batches for i in indices]
    assert sorted(taken) == list(range(len(rows)))
    for indices, batch in (entry for batches in of_ranks for entry in batches):
        height, width = batch.input_ids.shape
        assert batch.examples == len(indices)
        assert batch.supervised == sum(rows[i].supervised for i in indices)
        assert width % 4 == 0
        assert len(indices) < 2 or height * (width - 3) <= ROOM
        # Documents of a batch in the order of its examples, each in a row of its own or in one.
        assert height == (1 if is_packed else max(1, sequences * len(indices)))
        if indices and not is_packed:
            assert batch.input_ids[::sequences, 0].tolist() == indices


def test_nothing_has_no_batch() -> None:
    assert list(Layout(0, packed=True).batches([], ROOM)) == []
    assert list(Layout(0, packed=False).batches([], ROOM)) == []
