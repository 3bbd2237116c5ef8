"""Examples -> optimizer steps -> micro batches.

`Course` says what each optimizer step learns from. It is a pure function of (seed, epoch, recipe): step k is found
without playing the steps before it, so a run that goes on at k sees what an unbroken one sees. Neither packing nor
the micro batch nor the number of ranks enters into which examples a step has.

`Loader` lays the examples of each step into micro batches and puts them in their place, in a thread that works ahead of
the training.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from tunesmith.config.schema import Data, Train
from tunesmith.data.batch import Batch, Example, collate
from tunesmith.data.pack import best_fit_decreasing
from tunesmith.data.tokens import TokenSet
from tunesmith.units import Length, Size


@dataclass(frozen=True)
class Summary:
    """What a run will do. fill: non-padding share of the rows of one epoch (packed rows: of rows * seq_len;
    others: padded to the longest of their step). steps, epochs: None where the duration is a time."""

    examples: int
    tokens: int
    rows: int
    fill: float
    steps_per_epoch: int
    steps: int | None


class StepSize(NamedTuple):
    """Tokens of an optimizer step that take room in its rows: of an average one, and of the largest."""

    mean: float
    largest: int


@dataclass(frozen=True)
class _Epoch:
    """The order of one epoch: `units[k : k + per_step]` is step k / per_step; a unit is an example or a bin."""

    units: Sequence[Sequence[int]] | np.ndarray
    per_step: int

    @property
    def steps(self) -> int:
        return -(-len(self.units) // self.per_step)

    def at(self, k: int) -> Sequence[Sequence[int]] | np.ndarray:
        return self.units[k * self.per_step : (k + 1) * self.per_step]


class BatchSchedule:
    """The sequence of global batches. Steps are counted from 0.

    Args:
        lengths: int64 [n], tokens of each example, at most `data.seq_len`.
        data: gives seq_len, pack and shuffle.
        train: gives global_batch and seed.
        repeats: float64 [n], how often an epoch sees each example: the whole part for sure, and of the examples with
            the same fraction f, a share f that the seed draws anew each epoch. None: once.
    """

    def __init__(self, lengths: np.ndarray, data: Data, train: Train, *, repeats: np.ndarray | None = None) -> None:
        self.lengths = np.asarray(lengths, np.int64)
        self._repeats = np.ones(len(self.lengths)) if repeats is None else np.asarray(repeats, np.float64)
        self._data, self._size, self._seed = data, train.global_batch, train.seed
        self._fractions = [f for f in np.unique(self._repeats % 1.0).tolist() if f > 0]
        # Bins of whole epochs hold the same lengths each time, so only drawn fractions make epochs of unlike size.
        self._even = self._size.unit == "examples" or not self._fractions
        self._epoch = lru_cache(maxsize=2)(self._plan)

    def _random(self, n: int, epoch: int, purpose: int) -> np.ndarray:
        """uint64 [n]. Raw output of Philox and SeedSequence is what numpy promises never to change; the methods of
        Generator may draw differently in another version, and a resumed run would see other batches."""
        seed = np.random.SeedSequence([self._seed, epoch, purpose])
        return np.asarray(np.random.Philox(seed).random_raw(n), np.uint64)

    def _examples(self, epoch: int) -> np.ndarray:
        """int64: the examples of an epoch in its order."""
        taken = np.repeat(np.arange(len(self._repeats)), np.floor(self._repeats).astype(np.int64))
        for number, fraction in enumerate(self._fractions):
            group = np.flatnonzero(self._repeats % 1.0 == fraction)
            drawn = np.argsort(self._random(len(group), epoch, 2 + number), kind="stable")
            taken = np.concatenate([taken, group[drawn[: round(fraction * len(group))]]])
        if not self._data.shuffle:
            return np.sort(taken, kind="stable")
        return taken[np.argsort(self._random(len(taken), epoch, 0), kind="stable")]

    def _plan(self, epoch: int) -> _Epoch:
        order = self._examples(epoch)
        if self._size.unit == "examples":
            return _Epoch(order, self._size.amount)
        capacity = self._data.seq_len
        bins = best_fit_decreasing(self.lengths[order], capacity)
        if self._data.shuffle:
            turn = np.argsort(self._random(len(bins), epoch, 1), kind="stable").tolist()
        else:
            turn = sorted(range(len(bins)), key=lambda b: min(bins[b]))
        named = [order[sorted(bins[b])].tolist() for b in turn]
        return _Epoch(named, max(1, self._size.amount // capacity))

    def steps_per_epoch(self, epoch: int) -> int:
        """Optimizer steps of one epoch; the last may be short."""
        return self._epoch(0 if self._even else epoch).steps

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of an optimizer step."""
        if self.steps_per_epoch(0) == 0:
            raise ValueError("there are no examples to take a step on")
        if self._even:
            return divmod(step, self.steps_per_epoch(0))
        epoch = 0
        while step >= self.steps_per_epoch(epoch):
            step -= self.steps_per_epoch(epoch)
            epoch += 1
        return epoch, step

    def steps(self, duration: Length) -> int | None:
        """Optimizer steps of a run, at least one; None where the duration is a time."""
        if duration.unit == "steps":
            return int(duration.amount)
        if duration.unit != "epochs":
            return None
        whole = int(duration.amount)
        part = duration.amount - whole
        full = whole * self.steps_per_epoch(0) if self._even else sum(map(self.steps_per_epoch, range(whole)))
        # Rounded up, so that a part of an epoch is never nothing; the small term takes off what binary fractions add.
        return max(1, full + (math.ceil(part * self.steps_per_epoch(whole) - 1e-6) if part else 0))

    def examples(self, step: int) -> list[int]:
        """Indices of the examples that an optimizer step learns from."""
        epoch, k = self.locate(step)
        units = self._epoch(epoch).at(k)
        if isinstance(units, np.ndarray):
            return [int(i) for i in units]
        return [i for unit in units for i in unit]

    def rows(self, step: int) -> list[list[int]]:
        """How the examples of a step share rows of `seq_len` tokens; without packing each has its own."""
        epoch, k = self.locate(step)
        units = self._epoch(epoch).at(k)
        if not isinstance(units, np.ndarray) and self._data.pack:
            return [list(unit) for unit in units]
        members = self.examples(step)
        if not self._data.pack:
            return [[i] for i in members]
        bins = best_fit_decreasing(self.lengths[members], self._data.seq_len)
        return [[members[i] for i in sorted(b)] for b in bins]

    def epoch(self, step: int) -> float:
        """Epochs done when this step is done."""
        epoch, k = self.locate(step)
        return epoch + (k + 1) / self.steps_per_epoch(epoch)

    @property
    def packed(self) -> bool:
        return self._data.pack

    @property
    def row_length(self) -> int:
        return self._data.seq_len

    def step_size(self) -> StepSize:
        """Of the first epoch. Bins of `seq_len` count whole, examples with their own tokens."""
        units, per_step = self._epoch(0).units, self._epoch(0).per_step
        if not isinstance(units, np.ndarray):
            whole = min(per_step, len(units)) * self._data.seq_len
            return StepSize(whole, whole)
        sums = np.add.reduceat(self.lengths[units], np.arange(0, len(units), per_step))
        return StepSize(float(sums.mean()), int(sums.max()))

    def summary(self, duration: Length) -> Summary:
        """Examples -> rows -> optimizer steps, over the first epoch."""
        examples = tokens = rows = room = 0
        for k in range(self.steps_per_epoch(0)):
            shared = self.rows(k)
            members = self.lengths[[i for row in shared for i in row]]
            examples, tokens, rows = examples + len(members), tokens + int(members.sum()), rows + len(shared)
            room += len(shared) * (self._data.seq_len if self._data.pack else int(members.max()))
        return Summary(examples, tokens, rows, tokens / max(1, room), self.steps_per_epoch(0), self.steps(duration))


@dataclass(frozen=True)
class GlobalBatch:
    """What one optimizer step learns from, local to a rank.

    step: counted from 0. epoch: epochs done after it. micro: its micro batches. tokens, supervised, examples: sums
    over them. indices: the examples. data_seconds: how long the training waited for it, in its place.
    """

    step: int
    epoch: float
    micro: list[Batch]
    tokens: int
    supervised: int
    examples: int
    indices: list[int]
    data_seconds: float = 0.0
    source: TokenSet | None = field(default=None, repr=False, compare=False)

    def row_names(self) -> list[str]:
        """The places of its rows, for a report on a loss that is not finite."""
        return [self.source.where(i) for i in self.indices] if self.source is not None else []


class BatchPlacer(Protocol):
    """Brings micro batches to where they are computed, ahead of the step that needs them."""

    def __call__(self, batch: Batch) -> Batch:
        """The batch in its place; called in the loader's thread."""

    def claim(self, batch: Batch) -> None:
        """Called with it in the thread that takes it, before it is handed over."""


class Loader:
    """Iterates GlobalBatch from `start_step` up to `stop_step` (None: without end), made ahead in one thread.

    Args:
        micro_batch: size of one forward pass, in examples or in tokens with padding; the longest example of a step
            always fits.
        pad_to: None pads as little as may be: packed micro batches are one row [1, n] of their documents with no
            padding, others [rows, longest]. A number fixes the shape, for compiled graphs: [1, pad_to] packed,
            [rows, pad_to] otherwise, with empty rows where there are no more examples.
        multiple: rows are padded up to a multiple of this many tokens.
        bound: what all batches state as their longest document; no example may be longer.
        ahead: global batches that wait ready.
        place: where each micro batch is put before it waits; None leaves it in host memory.

    Use it in a `with`, or call `close()`: the thread ends with it.
    """

    def __init__(
        self,
        tokens: TokenSet,
        course: BatchSchedule,
        *,
        pad_id: int,
        micro_batch: Size,
        start_step: int = 0,
        stop_step: int | None = None,
        pad_to: int | None = None,
        multiple: int = 1,
        bound: int | None = None,
        ahead: int = 2,
        place: BatchPlacer | None = None,
    ) -> None:
        least = min((n for n in (pad_to, bound) if n is not None), default=None)
        if least is not None and len(tokens) and least < int(tokens.lengths.max()):
            raise ValueError(f"the longest example has {tokens.lengths.max()} tokens, and there is room for {least}")
        self._tokens, self._course, self._pad_id = tokens, course, pad_id
        self._micro_batch, self._pad_to, self._multiple, self._bound = micro_batch, pad_to, multiple, bound
        self._start, self._stop, self._place = start_step, stop_step, place
        self._queue: queue.Queue[GlobalBatch | BaseException | None] = queue.Queue(maxsize=ahead)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread. What it had made ahead is thrown away."""
        self._closing.set()
        thread, self._thread = self._thread, None
        while thread is not None and thread.is_alive():
            try:  # room in the queue wakes a thread that waits to put
                self._queue.get_nowait()
            except queue.Empty:
                thread.join(timeout=0.01)

    def __iter__(self) -> Iterator[GlobalBatch]:
        if self._thread is not None or self._closing.is_set():
            raise RuntimeError("a Loader is iterated once")
        self._thread = threading.Thread(target=self._work, name="tunesmith-data", daemon=True)
        self._thread.start()
        try:
            while True:
                began = time.perf_counter()
                item = self._queue.get()
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                if self._place is not None:
                    for micro in item.micro:
                        self._place.claim(micro)
                yield replace(item, data_seconds=time.perf_counter() - began)
        finally:
            self.close()

    def _work(self) -> None:
        try:
            step = self._start
            while not self._closing.is_set() and (self._stop is None or step < self._stop):
                self._queue.put(self._placed(self.batch(step)))
                step += 1
            self._queue.put(None)
        except BaseException as error:  # raised again where the batch is asked for
            self._queue.put(error)

    def _placed(self, batch: GlobalBatch) -> GlobalBatch:
        place = self._place
        return batch if place is None else replace(batch, micro=[place(micro) for micro in batch.micro])

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of one step, made here and now, in host memory."""
        members = self._course.examples(step)
        micro = [self._lay(group) for group in self._groups(step, members)]
        return GlobalBatch(
            step=step,
            epoch=self._course.epoch(step),
            micro=micro,
            tokens=sum(b.tokens for b in micro),
            supervised=sum(b.supervised for b in micro),
            examples=sum(b.examples for b in micro),
            indices=members,
            source=self._tokens,
        )

    def _groups(self, step: int, members: list[int]) -> list[list[int]]:
        """The examples of a step, micro batch by micro batch."""
        lengths = self._course.lengths
        if self._micro_batch.unit == "examples":
            # Like lengths together, so that unpacked rows pad little; the sum over the step does not depend on it.
            line = members if self._course.packed else sorted(members, key=lambda i: -lengths[i])
            return self._within(line, self._micro_batch.amount)
        room = self._micro_batch.amount
        if not self._course.packed:
            return self._by_length(members, room)
        room = self._pad_to or max(room, int(lengths[members].max()))
        groups = [[members[i] for i in g] for g in best_fit_decreasing(lengths[members], room)]
        rows = self._course.rows(step)
        sums = [int(lengths[row].sum()) for row in rows]
        if max(sums) <= room:
            # Full rows laid side by side can need fewer micro batches than best fit over the documents.
            by_rows = [[i for r in g for i in rows[r]] for g in best_fit_decreasing(sums, room)]
            groups = by_rows if len(by_rows) < len(groups) else groups
        return groups

    def _within(self, line: list[int], count: int) -> list[list[int]]:
        """At most `count` examples each, and where the shape is fixed no more than it holds."""
        if self._pad_to is None or not self._course.packed:
            return [line[k : k + count] for k in range(0, len(line), count)]
        groups: list[list[int]] = [[]]
        held = 0
        for i in line:
            n = int(self._course.lengths[i])
            if groups[-1] and (len(groups[-1]) == count or held + n > self._pad_to):
                groups.append([])
                held = 0
            groups[-1].append(i)
            held += n
        return groups

    def _by_length(self, members: list[int], room: int) -> list[list[int]]:
        """Rows of like length together: count * longest <= room, or one row."""
        groups: list[list[int]] = []
        limit = 0
        for i in sorted(members, key=lambda i: -self._course.lengths[i]):
            if not groups or len(groups[-1]) >= limit:
                groups.append([])
                limit = max(1, room // (self._pad_to or int(self._course.lengths[i])))
            groups[-1].append(i)
        return groups

    def _lay(self, group: list[int]) -> Batch:
        examples = [self._tokens[i] for i in group]
        rows: list[list[Example]] = [examples] if self._course.packed else [[e] for e in examples]
        if self._pad_to is not None and not self._course.packed:
            size = self._micro_batch
            count = size.amount if size.unit == "examples" else max(1, size.amount // self._pad_to)
            rows += [[] for _ in range(count - len(rows))]
        longest = max(sum(len(e.ids) for e in row) for row in rows)
        length = self._pad_to or -(-longest // self._multiple) * self._multiple
        return collate(rows, length=length, pad_id=self._pad_id, bound=self._bound)
