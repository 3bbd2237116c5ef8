"""Loader that prepares the micro batches of this rank in a background thread."""

import itertools
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Protocol

from tunesmith.batches.batch import Batch
from tunesmith.batches.layout import Layout, take_examples
from tunesmith.batches.micro_batches import MicroBatches
from tunesmith.batches.mismatched import mismatched_examples
from tunesmith.batches.schedule import BatchSchedule
from tunesmith.tokens.token_set import TokenSet
from tunesmith.units import Size


@dataclass(frozen=True)
class GlobalBatch:
    """The batch of one optimizer step.

    Attributes:
        step: number of the step, starting at 0.
        epoch: number of epochs that are completed after the step, for example 0.25.
        micro: micro batches of this data rank. All ranks have the same number of micro batches, so
            some micro batches can have no examples.
        tokens, supervised, examples: sums over all ranks.
        indices: indices of the examples of all ranks.
        first_micro: index of `micro[0]` in the list of the micro batches of all data ranks.
        idle_share: estimated fraction of the time in which data ranks wait for each other. It is
            computed as 1 - mean cost / maximum cost of the micro batches that run at the same time.
        chosen_tokens: number of supervised tokens of the chosen answers of pairs, over all ranks.
        mismatched: batches of this data rank in which each prompt is followed by the answer of
            another example.
        source: the token set of the examples.
        data_seconds: time that training waited for this batch.
        extra: metrics of the batch, for the step's record.
        is_sampled: whether the answers of the batch were sampled before the step.
    """

    step: int
    epoch: float
    micro: list[Batch]
    tokens: int
    supervised: int
    examples: int
    indices: list[int]
    first_micro: int
    idle_share: float
    chosen_tokens: int
    mismatched: Sequence[Batch]
    source: TokenSet = field(repr=False, compare=False)
    data_seconds: float = 0.0
    extra: Mapping[str, float] = field(default_factory=dict)
    is_sampled: bool = False

    def row_names(self) -> list[str]:
        """Return file and line of each row in the batch.

        These locations are reported if the loss is not finite.
        """
        return [self.source.where(i) for i in self.indices]


class BatchPrefetcher(Protocol):
    """Protocol of an object that copies micro batches to the device before a step needs them.

    The loader's thread calls the object. The training thread then calls `record_stream` before it
    uses the batch. The implementation is `runtime.transfer.DevicePrefetcher`.
    """

    def __call__(self, batch: Batch) -> Batch: ...
    def record_stream(self, batch: Batch) -> None: ...


@dataclass(eq=False)
class Loader(AbstractContextManager["Loader"]):
    """Iterator over the global batches of a run, which a background thread prepares in advance.

    Use the loader in a `with` statement or call `close()`, which ends the thread.

    Args:
        tokens: the tokenized examples.
        schedule: the schedule, which defines the examples of each step.
        pad_id: the token that fills the end of a row.
        micro_batch: maximum size of a micro batch, in examples or in tokens including padding. A
            micro batch has at least one example.
        start_step: number of the first step.
        stop_step: number of the step after the last step. If None, the iterator has no end.
        row_length: fixed number of tokens per row, so that compiled graphs always get the same
            shape: [1, row_length] if packed, else [rows, row_length] with empty rows if there are
            not enough examples. If None, the shape depends on the examples and has little padding:
            [1, n] if packed, else [rows, longest]. Without packing, each sequence of an example has
            a separate row.
        multiple: the length of rows is rounded up to a multiple of this number.
        max_document: `max_seqlen` of all batches. No example can be longer.
        share: (data rank, number of data ranks) of this process. The global batches do not depend
            on it.
        attention_weight: cost of attention for one pair of a query and a key, as a fraction of the
            cost of a token's matmuls. It is used to give micro batches that run at the same time
            about the same cost.
        mismatches: whether to build also batches of prompts with the answers of other examples, see
            `mismatched`.
        ahead: maximum number of global batches that are prepared in advance.
        prefetcher: object that copies micro batches to the device. If None, they remain in host
            memory.
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
        # Use a single thread, so that the batches are prepared in the order of the steps.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tunesmith-data")
        self._has_begun = False

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread, and discard the batches that it has prepared."""
        self._thread.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[GlobalBatch]:
        if self._has_begun:
            raise RuntimeError("a Loader can be iterated only once")
        self._has_begun = True
        steps: Iterator[int] = itertools.count(self.start_step)
        if self.stop_step is not None:
            steps = iter(range(self.start_step, self.stop_step))
        waiting = deque[Future[GlobalBatch]]()
        try:
            while True:
                # Two batches are added to `ahead`: the batch that is returned now, and the batch
                # that the thread is preparing.
                for step in itertools.islice(steps, self.ahead + 2 - len(waiting)):
                    waiting.append(self._thread.submit(self._prefetched, step))
                if not waiting:
                    return
                # Measure the time for which the caller waits for the batch.
                began = time.perf_counter()
                batch = waiting.popleft().result()
                if self.prefetcher is not None:
                    for micro in (*batch.mismatched, *batch.micro):
                        self.prefetcher.record_stream(micro)
                yield replace(batch, data_seconds=time.perf_counter() - began)
        finally:
            self.close()

    def _prefetched(self, step: int) -> GlobalBatch:
        """Build the global batch of one step on the device. This runs in the background thread."""
        batch = self.batch(step)
        if self.prefetcher is None:
            return batch
        # Copy the mismatched batches first, because a step uses them before the other micro
        # batches.
        mismatched = [self.prefetcher(micro) for micro in batch.mismatched]
        micro = [self.prefetcher(micro) for micro in batch.micro]
        return replace(batch, micro=micro, mismatched=mismatched)

    def batch(self, step: int) -> GlobalBatch:
        """Build the global batch of one step in host memory, in the calling thread."""
        examples = self.schedule.examples(step)
        micro_steps = self._micro_batches.micro_steps(step)
        step_examples = [self.tokens[i] for i in examples]
        groups = [rank_groups[self.rank] for rank_groups in micro_steps]
        # Get all examples in one call, so that worker processes prepare their pixels in parallel.
        mine = iter(take_examples(self.tokens, list(itertools.chain.from_iterable(groups))))
        micro = []
        for group in groups:
            rows, _ = self._micro_batches.shape(group)
            micro.append(self.layout.batch([next(mine) for _ in group], rows))
        mismatched = [batch for _, batch in self.mismatched(step)] if self.mismatches else []
        return GlobalBatch(
            step=step,
            epoch=self.schedule.epoch(step),
            micro=micro,
            tokens=int(self.schedule.lengths[examples].sum()),
            supervised=sum(example.supervised for example in step_examples),
            examples=len(examples),
            indices=examples,
            # The random seed of a micro batch depends on its index among the micro batches of all
            # ranks.
            first_micro=self.rank * len(micro_steps),
            idle_share=self._micro_batches.idle_share(micro_steps),
            chosen_tokens=sum(example.chosen_tokens for example in step_examples),
            mismatched=mismatched,
            source=self.tokens,
        )

    def largest_first(self, step: int) -> Iterator[Batch]:
        """Yield this rank's micro batches of a step in host memory, the largest micro batches
        first.

        They are sorted by the number of tokens, and then by the number of picture tokens. The
        pictures of a micro batch are prepared when it is yielded.
        """

        def size(group: list[int]) -> tuple[int, int]:
            rows, length = self._micro_batches.shape(group)
            return rows * length, int(self.tokens.picture_tokens[group].sum())

        micro_steps = self._micro_batches.micro_steps(step)
        groups = [rank_groups[self.rank] for rank_groups in micro_steps]
        for group in sorted(groups, key=size, reverse=True):
            rows, _ = self._micro_batches.shape(group)
            yield self.layout.batch(take_examples(self.tokens, group), rows)

    def mismatched(self, step: int) -> Iterator[tuple[list[int], Batch]]:
        """Yield this rank's batches in which each prompt of the step has another example's answer.

        Each batch comes with the positions of its examples in the step.
        """
        references = self.tokens.mismatched_reference
        reference = references[step] if references and step < len(references) else None
        max_tokens = self.schedule.row_length
        examples = [self.tokens[i] for i in self.schedule.examples(step)]
        return self.layout.batches(
            mismatched_examples(examples, max_tokens, reference), max_tokens=max_tokens
        )
