"""Global batches -> micro batches, in a thread that works ahead of the training."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Protocol

from tunesmith.data.batch import Batch, Example, collate
from tunesmith.data.pack import best_fit_decreasing
from tunesmith.data.schedule import BatchSchedule
from tunesmith.data.tokens import TokenSet
from tunesmith.units import Size


@dataclass(frozen=True)
class GlobalBatch:
    """What one optimizer step trains on, local to a rank."""

    step: int  # from 0
    epoch: float  # epochs done after it
    micro: list[Batch]
    tokens: int  # sum over `micro`, as the next two
    supervised: int
    examples: int
    indices: list[int]  # the examples
    data_seconds: float = 0.0  # how long the training waited for it, on its device
    first_micro: int = 0  # number of the first of `micro` among those of all ranks
    source: TokenSet | None = field(default=None, repr=False, compare=False)

    def row_names(self) -> list[str]:
        """The places of its rows, for a report on a loss that is not finite."""
        return [self.source.where(i) for i in self.indices] if self.source is not None else []


class BatchPrefetcher(Protocol):
    """Copies micro batches to the device ahead of the step that needs them (`runtime.transfer.DevicePrefetcher`).

    It is called in the loader's thread; `claim` then in the thread that takes the batch, before it is handed over.
    """

    def __call__(self, batch: Batch) -> Batch: ...
    def claim(self, batch: Batch) -> None: ...


class Loader(AbstractContextManager["Loader"]):
    """Iterates GlobalBatch from `start_step` up to `stop_step` (None: without end), made ahead in one thread.

    Use it in a `with`, or call `close()`: the thread ends with it.

    Args:
        micro_batch: size of one forward pass, in examples or in tokens with padding; one example always fits.
        pad_to: fixes the shape, for compiled graphs: [1, pad_to] packed, else [rows, pad_to], with empty rows where
            there are no more examples. None pads little: [1, n] packed, else [rows, longest].
        multiple: rows are padded up to a multiple of this many tokens.
        bound: what all batches state as their longest document; no example may be longer.
        ahead: global batches that wait ready.
        prefetcher: copies each micro batch to the device before it waits; None leaves it in host memory.
    """

    def __init__(
        self,
        tokens: TokenSet,
        schedule: BatchSchedule,
        *,
        pad_id: int,
        micro_batch: Size,
        start_step: int = 0,
        stop_step: int | None = None,
        pad_to: int | None = None,
        multiple: int = 1,
        bound: int | None = None,
        ahead: int = 2,
        prefetcher: BatchPrefetcher | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._share = share
        least = min((n for n in (pad_to, bound) if n is not None), default=None)
        if least is not None and len(tokens) and least < int(tokens.lengths.max()):
            raise ValueError(f"the longest example has {tokens.lengths.max()} tokens, and there is room for {least}")
        self._tokens, self._schedule, self._pad_id = tokens, schedule, pad_id
        self._micro_batch, self._pad_to, self._multiple, self._bound = micro_batch, pad_to, multiple, bound
        self._prefetcher, self._ahead = prefetcher, ahead
        self._steps = iter(itertools.count(start_step) if stop_step is None else range(start_step, stop_step))
        self._thread, self._begun = ThreadPoolExecutor(1, thread_name_prefix="tunesmith-data"), False

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread. What it had made ahead is discarded."""
        self._thread.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[GlobalBatch]:
        if self._begun:
            raise RuntimeError("a Loader is iterated once")
        self._begun, waiting = True, deque[Future[GlobalBatch]]()
        try:
            while True:
                for step in islice(self._steps, self._ahead + 2 - len(waiting)):  # one is taken, one is being made
                    waiting.append(self._thread.submit(self._prefetched, step))
                if not waiting:
                    return
                began = time.perf_counter()
                batch = waiting.popleft().result()
                if self._prefetcher is not None:
                    for micro in batch.micro:
                        self._prefetcher.claim(micro)
                yield replace(batch, data_seconds=time.perf_counter() - began)
        finally:
            self.close()

    def _prefetched(self, step: int) -> GlobalBatch:
        """The global batch of one step, on the device; called in the thread."""
        batch, put = self.batch(step), self._prefetcher
        return replace(batch, micro=[put(micro) for micro in batch.micro]) if put is not None else batch

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of one step, made here and now, in host memory."""
        members = self._schedule.examples(step)
        micro = [self._collate(group) for group in self._groups(step, members)]
        everything, (rank, world) = micro, self._share
        while len(micro) % world:
            micro.append(collate([[]], length=1, pad_id=self._pad_id))
        micro = micro[rank::world]
        return GlobalBatch(
            step=step,
            epoch=self._schedule.epoch(step),
            micro=micro,
            first_micro=rank * len(micro),
            tokens=sum(b.tokens for b in everything),
            supervised=sum(b.supervised for b in everything),
            examples=sum(b.examples for b in everything),
            indices=members,
            source=self._tokens,
        )

    def _groups(self, step: int, members: list[int]) -> list[list[int]]:
        """The examples of a step, micro batch by micro batch."""
        if not self._schedule.packed:
            return self._group_by_length(members)
        if self._micro_batch.unit == "examples":
            return self._group_in_order(members)
        lengths = self._schedule.lengths
        room = self._pad_to or max(self._micro_batch.amount, int(lengths[members].max()))
        groups = [[members[i] for i in group] for group in best_fit_decreasing(lengths[members], room)]
        rows = self._schedule.rows(step)
        sums = [int(lengths[row].sum()) for row in rows]
        if max(sums) <= room:
            # Full rows side by side can need fewer micro batches than best fit over the documents.
            by_rows = [[i for r in group for i in rows[r]] for group in best_fit_decreasing(sums, room)]
            groups = by_rows if len(by_rows) < len(groups) else groups
        return groups

    def _group_in_order(self, members: list[int]) -> list[list[int]]:
        """At most so many examples each, and where the shape is fixed no more than it holds."""
        groups: list[list[int]] = [[]]
        room, lengths = self._pad_to, self._schedule.lengths
        for i in members:
            full = room is not None and lengths[[*groups[-1], i]].sum() > room
            if groups[-1] and (full or len(groups[-1]) == self._micro_batch.amount):
                groups.append([])
            groups[-1].append(i)
        return groups

    def _group_by_length(self, members: list[int]) -> list[list[int]]:
        """Rows of similar length together, so that they pad little: the micro batch's examples, or as many as fit into
        its tokens, at least one. The sum over the step does not depend on the order."""
        groups: list[list[int]] = []
        size, lengths, limit = self._micro_batch, self._schedule.lengths, 0
        for i in sorted(members, key=lambda i: -lengths[i]):
            if not groups or len(groups[-1]) >= limit:
                groups.append([])
                per_row = 1 if size.unit == "examples" else self._pad_to or int(lengths[i])
                limit = max(1, size.amount // per_row)
            groups[-1].append(i)
        return groups

    def _collate(self, group: list[int]) -> Batch:
        examples = [self._tokens[i] for i in group]
        rows: list[list[Example]] = [examples] if self._schedule.packed else [[e] for e in examples]
        if self._pad_to is not None and not self._schedule.packed:
            size = self._micro_batch
            count = size.amount if size.unit == "examples" else size.amount // self._pad_to
            rows += [[]] * (count - len(rows))
        longest = max(sum(len(e.ids) for e in row) for row in rows)
        length = self._pad_to or -(-longest // self._multiple) * self._multiple
        return collate(rows, length=length, pad_id=self._pad_id, bound=self._bound)
