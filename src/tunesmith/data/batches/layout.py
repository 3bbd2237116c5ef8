"""Batches of examples that stand in no schedule, for forward passes alone: held-out rows, and what
a method measures beside its losses.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.data.batches.batch import Batch, collate
from tunesmith.data.batches.pack import best_fit_decreasing, groups_of_like_length
from tunesmith.data.text.example import Example
from tunesmith.data.tokens.token_set import TokenSet
from tunesmith.units import ceil_div


def take_examples(examples: Sequence[Example] | TokenSet, indices: Sequence[int]) -> list[Example]:
    """The examples of some indices, the pixels of all of them being made from here on.

    Their rows are read in the order of the files: some kinds (Parquet) are read on from the row
    that was read last, and from the start for one before it.
    """
    taken = {i: examples[i] for i in indices}
    for i in sorted(taken):
        pictures = taken[i].pictures
        if pictures is not None:
            pictures.begin()
    return [taken[i] for i in indices]


@dataclass(frozen=True)
class Layout:
    """The way in which examples are laid into batches.

    Attributes:
        packed: the examples of a batch share one row; else each sequence has its own.
        row_length: length of every row; None: as long as need be, in a multiple of `multiple`.
        max_document: as of `collate`.
        share: (data rank, data ranks): whose batches these are. Each rank gets as many, the last
            ones without an example where there are too few.
    """

    pad_id: int
    packed: bool
    row_length: int | None = None
    multiple: int = 1
    max_document: int | None = None
    share: tuple[int, int] = (0, 1)

    def batches(
        self, examples: Sequence[Example] | TokenSet, room: int
    ) -> Iterator[tuple[list[int], Batch]]:
        """This rank's batches, each with the indices of its examples.

        room: tokens of a batch, padding counted, or more where one example has more.
        """
        groups = self._groups(examples, self.row_length or room)
        rank, ranks = self.share
        for first in range(0, len(groups), ranks):
            mine = first + rank
            group = groups[mine] if mine < len(groups) else []
            yield group, self.batch(take_examples(examples, group))

    def batch(self, examples: Sequence[Example], rows: int = 1) -> Batch:
        """Some examples in one batch of at least so many rows; of none, padding."""
        if self.packed:
            length = sum(len(example.ids) - example.shared for example in examples)
        else:
            length = max((example.longest_sequence for example in examples), default=0)
        length = self.row_length or max(1, length)
        return collate(
            [examples],
            length=ceil_div(length, self.multiple) * self.multiple,
            pad_id=self.pad_id,
            max_document=self.max_document,
            sequence_rows=None if self.packed else rows,
        )

    def _groups(self, examples: Sequence[Example] | TokenSet, room: int) -> list[list[int]]:
        """Group the examples that share a batch, by their indices."""
        if not len(examples):
            return []
        if self.packed:
            lengths = np.array([len(example.ids) - example.shared for example in examples])
            return best_fit_decreasing(lengths, max(room, int(lengths.max())))
        # All examples of a set have as many sequences.
        sequences = examples[0].sequence_count
        widths = np.array([example.longest_sequence for example in examples])
        return groups_of_like_length(widths, lambda i: room // (sequences * int(widths[i])))
