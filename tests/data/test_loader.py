"""What a step learns from is fixed by seed and recipe; how it is laid out changes nothing."""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import refuses
from rows import alpaca, schedule_of
from tunesmith.config.schema import Data, Source, Train
from tunesmith.data.batches.batch import IGNORE, Batch
from tunesmith.data.batches.loader import Loader
from tunesmith.data.batches.pack import best_fit_decreasing
from tunesmith.data.batches.schedule import BatchSchedule
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


@pytest.mark.parametrize("batch", ["8 examples", "1024 tokens"])
def test_packing_does_not_enter_into_the_order(batch: str) -> None:
    packed, plain = schedule(batch, pack=True), schedule(batch, pack=False)
    for step in range(2 * packed.steps_per_epoch(0)):
        assert packed.examples(step) == plain.examples(step)
    assert all(len(row) == 1 for row in plain.rows(0))
    assert len(packed.rows(0)) < len(plain.rows(0))


def test_rows_fit_and_token_bins_are_full() -> None:
    c = schedule("1024 tokens")
    rows = [row for k in range(c.steps_per_epoch(0)) for row in c.rows(k)]
    sums = [int(LENGTHS[row].sum()) for row in rows]
    assert max(sums) <= 256
    assert sum(sums) / (256 * len(rows)) >= 0.99
    assert {len(c.rows(k)) for k in range(c.steps_per_epoch(0) - 1)} == {4}
    summary = c.summary(Length.parse("1 epochs"))
    assert (summary.rows, summary.examples, summary.tokens) == (len(rows), 512, sum(sums))
    assert summary.fill >= 0.99


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
    steps = {
        "1 epochs": 64,
        "0.5 epochs": 32,
        "1.1 epochs": 71,
        "0.001 epochs": 1,
        "7 steps": 7,
        "2 h": None,
    }
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
    assert half.locate(half.steps_per_epoch(0) + 2) == (1, 2)
    total = half.steps(Length.parse("2 epochs"))
    assert total == half.steps_per_epoch(0) + half.steps_per_epoch(1)


def documents(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """(input, targets) of each document with a target: what a batch teaches."""
    ids, targets = batch.input_ids.flatten(), batch.targets.flatten()
    edges = batch.cu_seqlens.tolist()
    parts = [(ids[a:b].tolist(), targets[a:b].tolist()) for a, b in pairwise(edges)]
    return [(i, t) for i, t in parts if any(x != IGNORE for x in t)]


LAYOUTS: list[dict[str, Any]] = [
    {"micro_batch": Size(100_000, "tokens")},
    {"micro_batch": Size(300, "tokens")},
    {"micro_batch": Size(3, "examples")},
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


def test_targets_never_cross_the_edge_of_a_document(make) -> None:
    tokens = make(alpaca(9), seq_len=512, train_on="all")
    c = schedule("9 examples", lengths=tokens.lengths, seq_len=512)
    [micro] = Loader(tokens, c, pad_id=0, micro_batch=Size(10_000, "tokens")).batch(0).micro
    edges = micro.cu_seqlens.tolist()
    assert len(edges) == 10
    flat_targets, positions = micro.targets.flatten(), micro.position_ids.flatten()
    for a, b in pairwise(edges):
        assert flat_targets[b - 1] == IGNORE  # the last token of a document predicts nothing
        assert torch.equal(positions[a:b], torch.arange(b - a))
        assert torch.equal(flat_targets[a : b - 1], micro.input_ids.flatten()[a + 1 : b])


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


def test_the_thread_ends_with_the_loader(make) -> None:
    tokens = make(alpaca(40), seq_len=256)
    c = schedule(lengths=tokens.lengths)
    with Loader(tokens, c, pad_id=0, micro_batch=Size(512, "tokens")) as loader:
        for batch in loader:  # without end: the queue is full when it is left
            if batch.step == 3:
                break
        assert len(data_threads()) <= 1
    assert data_threads() == []
    assert batch.data_seconds >= 0
    with pytest.raises(RuntimeError, match="once"):
        next(iter(loader))
    Loader(tokens, c, pad_id=0, micro_batch=Size(512, "tokens")).close()  # never begun


class Shelf:
    """A prefetcher that copies what it is given, and notes who puts and who takes."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.put: list[tuple[str, Any]] = []
        self.taken: list[tuple[str, Any]] = []
        self.fails_at = fails_at

    def __call__(self, batch: Batch) -> Batch:
        if len(self.put) == self.fails_at:
            raise MemoryError("no room on the shelf")
        placed = batch.map_tensors(torch.Tensor.clone)
        self.put.append((threading.current_thread().name, placed))
        return placed

    def record_stream(self, batch: Batch) -> None:
        self.taken.append((threading.current_thread().name, batch))


def test_batches_are_copied_in_the_thread_and_claimed_where_they_are_taken(make) -> None:
    tokens, shelf = make(alpaca(40), seq_len=256), Shelf()
    c = schedule(lengths=tokens.lengths)
    plain = list(Loader(tokens, c, pad_id=0, micro_batch=Size(256, "tokens"), stop_step=6))
    seen: list[Any] = []
    with Loader(
        tokens, c, pad_id=0, micro_batch=Size(256, "tokens"), stop_step=6, prefetcher=shelf
    ) as loader:
        for batch in loader:
            seen.append(batch)
            # All of a step is claimed before any of it is used.
            assert [b for _, b in shelf.taken][-len(batch.micro) :] == batch.micro
    assert all(same(a, b) for a, b in zip(seen, plain, strict=True))
    assert max(len(b.micro) for b in seen) > 1
    micro = [m for batch in seen for m in batch.micro]
    assert [id(b) for _, b in shelf.put] == [id(m) for m in micro]
    assert [id(b) for _, b in shelf.taken] == [id(m) for m in micro]
    assert {name for name, _ in shelf.put} == {"tunesmith-data_0"}
    assert {name for name, _ in shelf.taken} == {threading.current_thread().name}


def test_an_error_of_the_prefetcher_reaches_the_loop(make) -> None:
    tokens, shelf = make(alpaca(40), seq_len=256), Shelf(fails_at=3)
    c = schedule(lengths=tokens.lengths)
    with Loader(tokens, c, pad_id=0, micro_batch=Size(4096, "tokens"), prefetcher=shelf) as loader:
        batches = iter(loader)
        assert [next(batches).step for _ in range(3)] == [0, 1, 2], (
            "what was copied before it is still handed over"
        )
        with pytest.raises(MemoryError, match="shelf"):
            next(batches)
    assert data_threads() == []


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


def test_rows_are_named_for_the_report(make) -> None:
    tokens = make(alpaca(12), seq_len=256)
    c = schedule("4 examples", lengths=tokens.lengths, shuffle=False)
    names = Loader(tokens, c, pad_id=0, micro_batch=Size(512, "tokens")).batch(1).row_names()
    assert [name.rpartition("/")[2] for name in names] == [f"rows0.jsonl:{n}" for n in (5, 6, 7, 8)]


def test_wrong_use(make) -> None:
    tokens = make(alpaca(4), seq_len=256)
    c = schedule(lengths=tokens.lengths)
    with (
        refuses(ValueError, names=["1 to 3 tokens", "31 to 34"]),
        Loader(tokens, c, pad_id=0, micro_batch=Size(8, "tokens"), row_length=3) as loader,
    ):
        loader.batch(0)
    with refuses(ValueError, names=["examples"]):
        schedule(lengths=np.zeros(0, int)).examples(0)


@pytest.mark.slow
def test_a_large_set_is_ordered_in_seconds() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 0.7, 200_000).astype(int), 5, 2048)
    for batch in ("64 examples", "65536 tokens"):
        c = schedule(batch, lengths=lengths, seq_len=2048)
        began = time.process_time()
        c.examples(c.steps_per_epoch(0) - 1)
        assert time.process_time() - began < 5


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


def test_fill_on_lengths_like_those_of_alpaca() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(4.8, 0.7, 20_000).astype(int), 10, 2048)
    bins = best_fit_decreasing(lengths, 2048)
    assert lengths.sum() / (len(bins) * 2048) >= 0.99


def test_an_item_that_does_not_fit_is_refused() -> None:
    for item in (5, 0):
        with refuses(ValueError, names=["1 to 4", f"{item} to {item}"]):
            best_fit_decreasing([item], 4)
    assert best_fit_decreasing([], 4) == []
