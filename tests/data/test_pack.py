from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import refuses
from tunesmith.data.batches.pack import best_fit_decreasing

cases = st.integers(1, 300).flatmap(
    lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=200))
)


@pytest.mark.slow
@settings(max_examples=150)
@given(cases)
def test_every_item_once_and_no_bin_too_full(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    bins = best_fit_decreasing(lengths, capacity)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in b) <= capacity for b in bins)
    # Johnson et al. 1974: at most 11/9 OPT + 4 bins; OPT is at least the total over the capacity
    # and at least the number of items longer than half a bin.
    least = max(-(-sum(lengths) // capacity), sum(2 * n > capacity for n in lengths))
    assert len(bins) >= least
    # Small items: all bins but one are over 3/4 full
    if all(3 * n <= capacity for n in lengths) and lengths:
        assert len(bins) <= -(-sum(lengths) * 4 // (3 * capacity)) + 1
    assert bins == best_fit_decreasing(np.asarray(lengths), capacity)


@pytest.mark.slow
@settings(max_examples=100)
@given(cases)
def test_it_is_best_fit_decreasing(case: tuple[int, list[int]]) -> None:
    """The same rooms as the definition: longest first, each into the fullest bin that has room,
    tried one by one.
    """
    capacity, lengths = case
    rooms: list[int] = []
    for n in sorted(lengths, reverse=True):
        fitting = [r for r in rooms if r >= n]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - n)
    mine = [capacity - sum(lengths[i] for i in b) for b in best_fit_decreasing(lengths, capacity)]
    assert sorted(mine) == sorted(rooms)


def test_fill_on_lengths_like_those_of_alpaca() -> None:
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(4.8, 0.7, 50_000).astype(int), 10, 2048)
    began = time.process_time()
    bins = best_fit_decreasing(lengths, 2048)
    assert time.process_time() - began < 2  # 0.03 s when written
    least = -(-int(lengths.sum()) // 2048)
    assert lengths.sum() / (len(bins) * 2048) >= 0.99
    assert len(bins) <= 1.005 * least + 1


def test_an_item_that_does_not_fit_is_refused() -> None:
    with refuses(ValueError, names=["1 to 4", "5 to 5"]):
        best_fit_decreasing([5], 4)
    with refuses(ValueError, names=["1 to 4", "0 to 0"]):
        best_fit_decreasing([0], 4)
    assert best_fit_decreasing([], 4) == []
