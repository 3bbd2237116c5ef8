"""What a step learns from is fixed by seed and recipe; how it is laid out changes nothing."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import refuses
from rows import alpaca, schedule_of
from tunesmith.batches.batch import IGNORE, Batch
from tunesmith.batches.loader import Loader
from tunesmith.batches.pack import best_fit_decreasing
from tunesmith.batches.schedule import BatchSchedule
from tunesmith.config.schema import Data, Source, Train
from tunesmith.units import Length, Size

LENGTHS = np.random.default_rng(1).integers(4, 200, 512)


def schedule(
    batch: str = "8 examples",
    *,
    lengths: Any = LENGTHS,
    seed: int = 42,
    repeats: Any = None,
    **keys: Any,
) -> BatchSchedule:
    data = Data(train=(Source(source="x"),), **{"seq_len": 256, **keys})
    return schedule_of(
        lengths, data, Train(global_batch=Size.parse(batch), seed=seed), repeats=repeats
    )


def flat(rows: list[list[int]]) -> list[int]:
    return [i for row in rows for i in row]


@pytest.mark.parametrize("batch", ["8 examples", "1024 tokens"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_example_once_an_epoch(batch: str, shuffle: bool) -> None:
    c = schedule(batch, shuffle=shuffle)
    for epoch in (0, 1):
        first = epoch * c.steps_per_epoch(0)
        steps = [c.examples(first + k) for k in range(c.steps_per_epoch(epoch))]
        assert sorted(flat(steps)) == list(range(512))
        assert all(sorted(flat(c.rows(first + k))) == sorted(step) for k, step in enumerate(steps))
    # Packing does not enter into the order.
    plain = schedule(batch, shuffle=shuffle, pack=False)
    assert all(c.examples(step) == plain.examples(step) for step in range(60))
    assert all(len(row) == 1 for row in plain.rows(0))


def test_rows_fit_and_token_bins_are_full() -> None:
    c = schedule("1024 tokens")
    rows = [row for k in range(c.steps_per_epoch(0)) for row in c.rows(k)]
    sums = [int(LENGTHS[row].sum()) for row in rows]
    assert max(sums) <= 256
    assert sum(sums) / (256 * len(rows)) >= 0.99
    assert {len(c.rows(k)) for k in range(c.steps_per_epoch(0) - 1)} == {4}


def test_the_seed_and_the_epoch_fix_the_order() -> None:
    assert schedule().examples(3) == schedule().examples(3)
    assert schedule().examples(3) != schedule(seed=43).examples(3)
    assert schedule().examples(3) != schedule().examples(67)  # the same place in the next epoch
    assert schedule(shuffle=False).examples(3) == list(range(24, 32))
    # Raw Philox output may not change with numpy: a resumed run depends on it.
    assert schedule(lengths=np.full(8, 5)).examples(0) == [0, 1, 4, 2, 6, 5, 7, 3]


def test_the_last_batch_is_short_and_never_dropped() -> None:
    c = schedule("100 examples")
    assert [len(c.examples(k)) for k in range(c.steps_per_epoch(0))] == [100] * 5 + [12]
    assert c.epoch(5) == 1.0
    assert c.epoch(6) == pytest.approx(1 + 1 / 6)


def test_durations() -> None:
    steps = {"1 epochs": 64, "1.1 epochs": 71, "0.001 epochs": 1, "7 steps": 7, "2 h": None}
    for duration, count in steps.items():
        for pack in (True, False):
            assert schedule(pack=pack).steps(Length.parse(duration)) == count


def test_weights() -> None:
    repeats = np.repeat([2.0, 0.5, 1.0], [100, 101, 311])
    c = schedule("10 examples", repeats=repeats)
    seen = []
    for epoch in (0, 1):
        first = epoch * c.steps_per_epoch(0)
        drawn = flat([c.examples(first + k) for k in range(c.steps_per_epoch(0))])
        counts = np.bincount(drawn, minlength=512)
        assert set(counts[:100]) == {2}
        assert set(counts[201:]) == {1}
        assert counts[100:201].sum() == 50
        assert counts[100:201].max() == 1
        seen.append(counts[100:201])
    assert (seen[0] != seen[1]).any()  # another half each epoch
    half = schedule("1024 tokens", repeats=np.full(512, 0.5))
    first = half.steps_per_epoch(0)
    assert [half.locate(step) for step in (first - 1, first)] == [(0, first - 1), (1, 0)]
    assert half.steps(Length.parse("2 epochs")) == first + half.steps_per_epoch(1)


def documents(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """(input, targets) of each document with a target: what a batch teaches."""
    ids, targets = batch.input_ids.flatten(), batch.targets.flatten()
    edges = batch.cu_seqlens.tolist()
    parts = [(ids[a:b].tolist(), targets[a:b].tolist()) for a, b in pairwise(edges)]
    return [(i, t) for i, t in parts if any(x != IGNORE for x in t)]


LAYOUTS: list[dict[str, Any]] = [
    {"micro_batch": Size(100_000, "tokens")},
    {"micro_batch": Size(300, "tokens")},
    {"micro_batch": Size(600, "tokens"), "row_length": 600},
    {"micro_batch": Size(2, "examples"), "row_length": 512},
]


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts_teach_the_same(make, pack: bool, layout: dict[str, Any]) -> None:
    tokens = make(alpaca(20, letters=lambda i: 3 + 7 * i), seq_len=512)
    c = schedule(lengths=tokens.lengths, seq_len=512, pack=pack)
    loader = Loader(tokens, c, pad_id=0, **layout)
    for step in range(3):
        batch = loader.batch(step)
        got = sorted(d for micro in batch.micro for d in documents(micro))
        expected = []
        for i in batch.indices:
            ids, trained = tokens[i][:2]
            targets = np.append(np.where(trained[1:], ids[1:], IGNORE), IGNORE)
            expected.append((ids.tolist(), targets.tolist()))
        assert got == sorted(expected)
        assert batch.indices == c.examples(step)
        assert batch.examples == len(batch.indices)
        assert batch.tokens == sum(len(ids) for ids, _ in expected)
        assert batch.supervised == sum(t != IGNORE for _, ts in expected for t in ts)
        assert all(m.supervised == int((m.targets != IGNORE).sum()) for m in batch.micro)
        assert not pack or all(m.input_ids.shape[0] == 1 for m in batch.micro)


def same(a: Any, b: Any) -> bool:
    names = ("step", "epoch", "indices", "tokens", "supervised")
    return [getattr(a, name) for name in names] == [getattr(b, name) for name in names] and all(
        torch.equal(tensor, y.tensors()[name])
        for x, y in zip(a.micro, b.micro, strict=True)
        for name, tensor in x.tensors().items()
    )


@pytest.mark.parametrize(("batch", "pack"), [("8 examples", False), ("1024 tokens", True)])
def test_going_on_at_step_k_is_the_run_that_never_stopped(make, batch: str, pack: bool) -> None:
    tokens = make(alpaca(50), alpaca(30), weights=(1.5, 1.0), seq_len=256)

    def run(start: int) -> list[Any]:
        c = schedule(batch, lengths=tokens.lengths, repeats=tokens.repeats, pack=pack)
        layout = {"micro_batch": Size(512, "tokens"), "start_step": start, "stop_step": 12}
        with Loader(tokens, c, pad_id=0, **layout) as loader:
            return list(loader)

    whole = run(0)
    assert [b.step for b in whole] == list(range(12))
    for k in (1, 7):
        assert all(same(a, b) for a, b in zip(run(k), whole[k:], strict=True))
    assert run(12) == []


def data_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("tunesmith-data")]


class Shelf:
    """A prefetcher that copies what it is given, and notes who puts and who takes."""

    def __init__(self) -> None:
        self.put: list[tuple[str, Any]] = []
        self.taken: list[tuple[str, Any]] = []

    def __call__(self, batch: Batch) -> Batch:
        if len(self.put) == 9:
            raise MemoryError("no room on the shelf")
        placed = batch.map_tensors(torch.Tensor.clone)
        self.put.append((threading.current_thread().name, placed))
        return placed

    def record_stream(self, batch: Batch) -> None:
        self.taken.append((threading.current_thread().name, batch))


def test_batches_are_copied_in_the_thread_and_claimed_where_they_are_taken(make) -> None:
    tokens, shelf = make(alpaca(40), seq_len=256), Shelf()
    layout = {"pad_id": 0, "micro_batch": Size(256, "tokens")}
    c = schedule(lengths=tokens.lengths)
    seen: list[Any] = []
    with (
        Loader(tokens, c, **layout, prefetcher=shelf) as loader,
        refuses(MemoryError, names=["shelf"]),
    ):
        for batch in loader:
            seen.append(batch)
            # All of a step is claimed before any of it is used.
            assert [b for _, b in shelf.taken][-len(batch.micro) :] == batch.micro
    plain = Loader(tokens, c, **layout, stop_step=len(seen))
    assert all(same(a, b) for a, b in zip(seen, plain, strict=True))
    assert max(len(b.micro) for b in seen) > 1
    micro = [id(m) for batch in seen for m in batch.micro]
    assert [id(b) for _, b in shelf.put][: len(micro)] == micro
    assert [id(b) for _, b in shelf.taken] == micro
    assert {name for name, _ in shelf.put} == {"tunesmith-data_0"}
    assert {name for name, _ in shelf.taken} == {threading.current_thread().name}
    assert data_threads() == []


# --- packing

cases = st.integers(1, 300).flatmap(
    lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=200))
)


@settings(max_examples=60)
@given(cases)
def test_packing_is_best_fit_decreasing(case: tuple[int, list[int]]) -> None:
    """The definition: longest first, each into the fullest bin that has room."""
    capacity, lengths = case
    bins = best_fit_decreasing(lengths, capacity)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    rooms: list[int] = []
    for n in sorted(lengths, reverse=True):
        fitting = [r for r in rooms if r >= n]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - n)
    assert sorted(capacity - sum(lengths[i] for i in b) for b in bins) == sorted(rooms)
    assert bins == best_fit_decreasing(np.asarray(lengths), capacity)


def test_an_item_that_does_not_fit_is_refused() -> None:
    for item in (5, 0):
        with refuses(ValueError, names=["1 to 4", f"{item} to {item}"]):
            best_fit_decreasing([item], 4)
    assert best_fit_decreasing([], 4) == []


def test_the_largest_micro_batch_has_the_most_pictures(make) -> None:
    """The most tokens with padding, then the most tokens of pictures; it alone is prepared."""
    tokens = make(alpaca(40), seq_len=256)
    c = schedule("24 examples", lengths=tokens.lengths)
    loader = Loader(tokens, c, pad_id=0, micro_batch=Size(2, "examples"), row_length=512)
    expected = loader.batch(0).micro
    ids = np.concatenate([batch.input_ids.flatten().numpy() for batch in expected])
    tokens.picture_id = int(np.bincount(ids)[1:].argmax()) + 1

    def pictures(batch: Batch) -> int:
        return int((batch.input_ids == tokens.picture_id).sum())

    found = [*loader.largest_first(0)]
    assert sorted(map(pictures, expected), reverse=True) == [*map(pictures, found)]
    assert pictures(found[0]) > pictures(expected[0])
    # Without a fixed length the tokens come first.
    loader = Loader(tokens, c, pad_id=0, micro_batch=Size(2, "examples"))
    sizes = [batch.input_ids.numel() for batch in loader.largest_first(0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]
