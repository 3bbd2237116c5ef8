"""Global batches -> this rank's micro batches, in a thread that works ahead of the training."""

import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Protocol

import numpy as np

from tunesmith.data.batches.batch import Batch
from tunesmith.data.batches.layout import Layout, take_examples
from tunesmith.data.batches.micro_batches import MicroBatches
from tunesmith.data.batches.mismatched import mismatched_examples
from tunesmith.data.batches.schedule import BatchSchedule
from tunesmith.data.tokens.token_set import TokenSet
from tunesmith.units import Size


@dataclass(frozen=True)
class GlobalBatch:
    """The batch of one optimizer step, over all ranks; `micro` is this data rank's share of it.

    Attributes:
        step: from 0.
        epoch: epochs completed after it.
        micro: equally many on every rank, without examples where these are too few.
        tokens, supervised, examples: sums over all ranks.
        indices: the examples.
        first_micro: number of `micro[0]` among the micro batches of all data ranks.
        idle_share: of the data ranks' time: 1 - load balance (mean cost / largest, micro step by
            micro step).
        chosen_tokens: supervised tokens of the chosen answers of pairs, over all ranks.
        mismatched: prompts with answers of other examples, this data rank's share of them.
        data_seconds: how long the training waited for it, on its device.
    """

    step: int
    epoch: float
    micro: list[Batch]
    tokens: int
    supervised: int
    examples: int
    indices: list[int]
    first_micro: int = 0
    idle_share: float = 0.0
    chosen_tokens: int = 0
    mismatched: Sequence[Batch] = ()
    data_seconds: float = 0.0
    source: TokenSet | None = field(default=None, repr=False, compare=False)

    def row_names(self) -> list[str]:
        """The places of its rows, for a report on a loss that is not finite."""
        if self.source is None:
            return []
        return [self.source.where(i) for i in self.indices]


class BatchPrefetcher(Protocol):
    """Copies micro batches to the device ahead of the step that needs them.

    It (`runtime.transfer.DevicePrefetcher`) is called in the loader's thread; `claim` then in the
    thread that takes the batch, before it is handed over.
    """

    def __call__(self, batch: Batch) -> Batch: ...
    def record_stream(self, batch: Batch) -> None: ...


@dataclass(eq=False)
class Loader(AbstractContextManager["Loader"]):
    """Iterates GlobalBatch from `start_step` up to `stop_step`, prepared ahead in one thread.

    Use it in a `with`, or call `close()`: the thread ends with it.

    Args:
        micro_batch: of one forward pass, in examples or in tokens with padding; one example always
            fits.
        stop_step: None: without end.
        row_length: fixes the shape, for compiled graphs: [1, row_length] packed, else
            [rows, row_length], with empty rows where there are no more examples. None pads little:
            [1, n] packed, else [rows, longest]. Without packing each sequence of an example has a
            row.
        multiple: rows are padded up to a multiple of this many tokens.
        max_document: what all batches state as their longest document; no example may be longer.
        share: (data rank, data ranks): whose micro batches these are. The sequence of global
            batches does not depend on it.
        attention_weight: cost of one pair of a query and a key that it sees, relative to a token's
            matmuls. Micro batches of one micro step cost about the same; an example counts as
            one document.
        mismatches: also lay out the prompts with answers of other examples (`mismatched`).
        ahead: global batches that wait ready.
        prefetcher: None leaves micro batches in host memory.
    """

    tokens: TokenSet
    schedule: BatchSchedule
    _: KW_ONLY
    pad_id: int
    micro_batch: Size
    start_step: int = 0
    stop_step: int | None = None
    row_length: int | None = None
    multiple: int = 1
    max_document: int | None = None
    share: tuple[int, int] = (0, 1)
    attention_weight: float = 0.0
    mismatches: bool = False
    ahead: int = 2
    prefetcher: BatchPrefetcher | None = None

    def __post_init__(self) -> None:
        self.rank, data_ranks = self.share
        self._micro_batches = MicroBatches(
            self.schedule,
            self.micro_batch,
            self.row_length,
            self.multiple,
            data_ranks,
            self.attention_weight,
        )
        self.layout = Layout(
            self.pad_id,
            self.schedule.packed,
            self.row_length,
            self.multiple,
            self.max_document,
            self.share,
        )
        # One thread: batches come in the order of the steps.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tunesmith-data")
        self._has_begun = False

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread. Batches that it prepared ahead are discarded."""
        self._thread.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[GlobalBatch]:
        if self._has_begun:
            raise RuntimeError("a Loader is iterated once")
        self._has_begun = True
        steps: Iterator[int] = itertools.count(self.start_step)
        if self.stop_step is not None:
            steps = iter(range(self.start_step, self.stop_step))
        waiting = deque[Future[GlobalBatch]]()
        try:
            while True:
                # Beside those that wait ready, one is handed over and one is being prepared.
                for step in itertools.islice(steps, self.ahead + 2 - len(waiting)):
                    waiting.append(self._thread.submit(self._prefetched, step))
                if not waiting:
                    return
                began = time.perf_counter()
                batch = waiting.popleft().result()
                if self.prefetcher is not None:
                    for micro in (*batch.mismatched, *batch.micro):
                        self.prefetcher.record_stream(micro)
                yield replace(batch, data_seconds=time.perf_counter() - began)
        finally:
            self.close()

    def _prefetched(self, step: int) -> GlobalBatch:
        """The global batch of one step, on the device; called in the thread."""
        batch = self.batch(step)
        if self.prefetcher is None:
            return batch
        # In the order in which a step needs them.
        mismatched = [self.prefetcher(micro) for micro in batch.mismatched]
        micro = [self.prefetcher(micro) for micro in batch.micro]
        return replace(batch, micro=micro, mismatched=mismatched)

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of one step, built in this thread, in host memory."""
        examples = self.schedule.examples(step)
        micro_steps = self._micro_batches.micro_steps(step)
        of_step = [self.tokens[i] for i in examples]
        groups = [of_ranks[self.rank] for of_ranks in micro_steps]
        # All at once: other processes make the pixels of several rows.
        mine = iter(take_examples(self.tokens, [*itertools.chain.from_iterable(groups)]))
        mismatched: list[Batch] = []
        if self.mismatches:
            mismatched = [batch for _, batch in self.mismatched(step)]
        return GlobalBatch(
            step=step,
            epoch=self.schedule.epoch(step),
            micro=[
                self.layout.batch([next(mine) for _ in group], self._micro_batches.shape(group)[0])
                for group in groups
            ],
            tokens=int(self.schedule.lengths[examples].sum()),
            supervised=sum(example.supervised for example in of_step),
            examples=len(examples),
            indices=examples,
            # Seeds go by the place of a micro batch over all ranks.
            first_micro=self.rank * len(micro_steps),
            idle_share=self._micro_batches.idle_share(micro_steps),
            chosen_tokens=sum(example.chosen_tokens for example in of_step),
            mismatched=mismatched,
            source=self.tokens,
        )

    def largest_first(self, step: int) -> Iterator[Batch]:
        """Yield this rank's micro batches of a step, in host memory.

        Those with the most tokens come first; if they are equal, those with the most tokens of
        pictures. The pictures of a micro batch are prepared when it is yielded.
        """

        def size(group: list[int]) -> tuple[int, int]:
            rows, length = self._micro_batches.shape(group)
            is_picture = [self.tokens[i].ids == self.tokens.picture_id for i in group]
            return rows * length, sum(int(np.sum(places)) for places in is_picture)

        groups = [of_ranks[self.rank] for of_ranks in self._micro_batches.micro_steps(step)]
        for group in sorted(groups, key=size, reverse=True):
            rows, _ = self._micro_batches.shape(group)
            yield self.layout.batch(take_examples(self.tokens, group), rows)

    def mismatched(self, step: int) -> Iterator[tuple[list[int], Batch]]:
        """The prompts of a step with answers of its other examples, this data rank's share of them.

        Each batch comes with the places of its examples in the step.
        """
        of_steps = self.tokens.mismatched_reference or ()
        reference = of_steps[step] if step < len(of_steps) else None
        most = self.schedule.row_length
        examples = [self.tokens[i] for i in self.schedule.examples(step)]
        return self.layout.batches(mismatched_examples(examples, most, reference), room=most)
