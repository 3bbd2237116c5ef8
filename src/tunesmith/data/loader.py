"""Global batches -> this rank's micro batches, in a thread that works ahead of the training.

A rank groups the examples of all data ranks by their lengths alone, and collates its own. Sharded ranks meet at every
micro batch: those that run at the same time, a micro step, cost much the same.
"""

import itertools
import math
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import islice
from typing import Protocol

from tunesmith.data.batch import Batch, Example, collate
from tunesmith.data.pack import balanced_bins, best_fit_decreasing
from tunesmith.data.schedule import BatchSchedule
from tunesmith.data.tokens import TokenSet
from tunesmith.units import Size


@dataclass(frozen=True)
class GlobalBatch:
    """What one optimizer step trains on, over all ranks; `micro` is this data rank's share of it."""

    step: int  # from 0
    epoch: float  # epochs done after it
    micro: list[Batch]  # equally many on every rank, without examples where these are too few
    tokens: int  # sum over all ranks, as the next two
    supervised: int
    examples: int
    indices: list[int]  # the examples
    first_micro: int = 0  # number of `micro[0]` among the micro batches of all data ranks
    idle_share: float = 0.0  # of the data ranks' time: 1 - load balance (mean cost / largest, micro step by micro step)
    data_seconds: float = 0.0  # how long the training waited for it, on its device
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


@dataclass(eq=False)
class Loader(AbstractContextManager["Loader"]):
    """Iterates GlobalBatch from `start_step` up to `stop_step` (None: without end), made ahead in one thread.

    Use it in a `with`, or call `close()`: the thread ends with it.
    """

    tokens: TokenSet
    schedule: BatchSchedule
    _: KW_ONLY
    pad_id: int
    micro_batch: Size  # of one forward pass, in examples or in tokens with padding; one example always fits
    start_step: int = 0
    stop_step: int | None = None
    # Fixes the shape, for compiled graphs: [1, pad_to] packed, else [rows, pad_to], with empty rows where there are no more
    # examples. None pads little: [1, n] packed, else [rows, longest].
    pad_to: int | None = None
    multiple: int = 1  # rows are padded up to a multiple of this many tokens
    bound: int | None = None  # what all batches state as their longest document; no example may be longer
    # (data rank, data ranks): whose micro batches these are. The sequence of global batches does not depend on it.
    share: tuple[int, int] = (0, 1)
    # Cost of one pair of a query and a key that it sees, relative to a token's matmuls. Micro batches of one micro step are
    # made alike in cost; an example counts as one document.
    attention_weight: float = 0.0
    ahead: int = 2  # global batches that wait ready
    prefetcher: BatchPrefetcher | None = None  # None leaves micro batches in host memory

    def __post_init__(self) -> None:
        least = min((n for n in (self.pad_to, self.bound) if n is not None), default=None)
        if least is not None and len(self.tokens) and least < (longest := int(self.tokens.lengths.max())):
            raise ValueError(f"the longest example has {longest} tokens, and there is room for {least}")
        first, stop = self.start_step, self.stop_step
        self._steps = iter(itertools.count(first) if stop is None else range(first, stop))
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
                for step in islice(self._steps, self.ahead + 2 - len(waiting)):  # one is taken, one is being made
                    waiting.append(self._thread.submit(self._prefetched, step))
                if not waiting:
                    return
                began = time.perf_counter()
                batch = waiting.popleft().result()
                if self.prefetcher is not None:
                    for micro in batch.micro:
                        self.prefetcher.claim(micro)
                yield replace(batch, data_seconds=time.perf_counter() - began)
        finally:
            self.close()

    def _prefetched(self, step: int) -> GlobalBatch:
        """The global batch of one step, on the device; called in the thread."""
        batch, put = self.batch(step), self.prefetcher
        return replace(batch, micro=[put(micro) for micro in batch.micro]) if put is not None else batch

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of one step, made here and now, in host memory."""
        members, (rank, world) = self.schedule.examples(step), self.share
        micro_steps = self._micro_steps(step, members)
        costs = [[self._cost(group) for group in groups] for groups in micro_steps]
        return GlobalBatch(
            step=step,
            epoch=self.schedule.epoch(step),
            micro=[self._collate(groups[rank]) for groups in micro_steps],
            tokens=int(self.schedule.lengths[members].sum()),
            supervised=sum(self.tokens[i].supervised for i in members),
            examples=len(members),
            indices=members,
            first_micro=rank * len(micro_steps),
            idle_share=max(0.0, 1 - sum(map(sum, costs)) / (world * sum(map(max, costs)))),
            source=self.tokens,
        )

    def _micro_steps(self, step: int, members: list[int]) -> list[list[list[int]]]:
        """The examples of a step by micro step and data rank; the groups of a micro step cost much the same."""
        groups, world = self._groups(step, members), self.share[1]
        count = -(-len(groups) // world) * world
        if world > 1:
            groups = sorted(self._balance(groups, members, count), key=self._cost, reverse=True)
            groups += [[]] * (count - len(groups))
        # Every second micro step goes backwards, so that no rank has the costliest group of each.
        return [groups[k : k + world][:: -1 if k // world % 2 else 1] for k in range(0, count, world)]

    def _balance(self, groups: list[list[int]], members: list[int], count: int) -> list[list[int]]:
        """At most `count` groups that cost much the same, of the examples of `groups`, which are no more."""
        lengths, size = self.schedule.lengths[members], self.micro_batch
        if not self.schedule.packed:
            tops = range(math.ceil(len(members) * max(self._cost([i]) for i in members)))
            found = bisect_left(tops, True, key=lambda top: len(self._group_by_length(members, top)) <= count)
            return self._group_by_length(members, found)
        pairs = lengths * (lengths + 1) / 2
        # Micro batches of one fixed shape differ in attention alone.
        costs = pairs if self.pad_to is not None else lengths + self.attention_weight * pairs
        # None larger than the largest of one rank: that is what memory holds.
        room = max(int(self.schedule.lengths[group].sum()) for group in groups)
        most = size.amount if size.unit == "examples" else len(members)
        bins = balanced_bins(costs, lengths, count, room=room, most=most)
        return groups if bins is None else [[members[i] for i in group] for group in bins]

    def _cost(self, group: list[int]) -> float:
        """Cost of a micro batch, padding and attention counted, in tokens; 0 without examples."""
        lengths, (rows, length) = self.schedule.lengths[group], self._shape(group)
        return rows * length + self.attention_weight * float((lengths * (lengths + 1)).sum()) / 2 if group else 0.0

    def _groups(self, step: int, members: list[int]) -> list[list[int]]:
        """The examples of a step, micro batch by micro batch, as one rank has them."""
        if not self.schedule.packed:
            return self._group_by_length(members)
        if self.micro_batch.unit == "examples":
            return self._group_in_order(members)
        lengths = self.schedule.lengths
        room = self.pad_to or max(self.micro_batch.amount, int(lengths[members].max()))
        groups = [[members[i] for i in group] for group in best_fit_decreasing(lengths[members], room)]
        rows = self.schedule.rows(step)
        sums = [int(lengths[row].sum()) for row in rows]
        if max(sums) <= room:
            # Full rows side by side can need fewer micro batches than best fit over the documents.
            by_rows = [[i for r in group for i in rows[r]] for group in best_fit_decreasing(sums, room)]
            groups = by_rows if len(by_rows) < len(groups) else groups
        return groups

    def _group_in_order(self, members: list[int]) -> list[list[int]]:
        """At most so many examples each, and where the shape is fixed no more than it holds."""
        groups: list[list[int]] = [[]]
        room, lengths = self.pad_to, self.schedule.lengths
        for i in members:
            full = room is not None and lengths[[*groups[-1], i]].sum() > room
            if groups[-1] and (full or len(groups[-1]) == self.micro_batch.amount):
                groups.append([])
            groups[-1].append(i)
        return groups

    def _group_by_length(self, members: list[int], top: float = math.inf) -> list[list[int]]:
        """Rows of similar length together, so that they pad little: the micro batch's examples, or as many as fit into
        its tokens and cost `top` at most, at least one. The sum over the step does not depend on the order."""
        groups: list[list[int]] = []
        size, lengths = self.micro_batch, self.schedule.lengths
        order = sorted(members, key=lambda i: -lengths[i])
        while order:
            per_row = 1 if size.unit == "examples" else self.pad_to or int(lengths[order[0]])
            limit = int(max(1, min(size.amount // per_row, top / self._cost(order[:1]))))
            groups.append(order[:limit])
            order = order[limit:]
        return groups

    def _shape(self, group: list[int]) -> tuple[int, int]:
        """Rows and tokens a row of a micro batch, padding counted; both at least 1."""
        lengths, size, packed = self.schedule.lengths[group], self.micro_batch, self.schedule.packed
        count = 1 if packed else max(1, len(group))
        if self.pad_to is None:
            longest = int(lengths.sum() if packed else lengths.max(initial=0))
            return count, -(-max(1, longest) // self.multiple) * self.multiple
        fixed = 1 if packed else size.amount if size.unit == "examples" else size.amount // self.pad_to
        return max(count, fixed), self.pad_to

    def _collate(self, group: list[int]) -> Batch:
        examples, (count, length) = [self.tokens[i] for i in group], self._shape(group)
        rows: list[list[Example]] = [examples] if self.schedule.packed else [[e] for e in examples]
        rows += [[]] * (count - len(rows))
        return collate(rows, length=length, pad_id=self.pad_id, bound=self.bound)
