"""Batches for forward passes outside the training schedule, such as validation and the
log-probabilities of the reference model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.batches.batch import Batch, collate
from tunesmith.batches.pack import best_fit_decreasing, groups_of_like_length
from tunesmith.tokens.text.example import Example
from tunesmith.tokens.token_set import TokenSet
from tunesmith.units import ceil_div


def take_examples(examples: Sequence[Example] | TokenSet, indices: Sequence[int]) -> list[Example]:
    """Return the examples with the given indices, and start the preparation of their pixels.

    Rows with pictures are read in the order of the file, because a format such as Parquet has no
    random access: to return to an earlier row, the reader must start again.
    """
    taken = {i: examples[i] for i in indices}
    # `begin` reads the row, so call it in the order of the file.
    for i in sorted(taken):
        pictures = taken[i].pictures
        if pictures is not None:
            pictures.begin()
    return [taken[i] for i in indices]


@dataclass(frozen=True)
class Layout:
    """The shape of batches, and the distribution of examples to batches.

    Attributes:
        pad_id: the token that fills the end of a row.
        packed: whether all examples of a batch are in one row. If False, each sequence has a
            separate row.
        row_length: length of every row. If None, rows have the length of the longest row of the
            batch.
        multiple: if `row_length` is None, the length is rounded up to a multiple of this number.
        max_document: upper bound of the document length, see `collate`.
        share: (data rank, number of data ranks) of this process. All ranks get the same number of
            batches, so the last batches can be empty.
    """

    pad_id: int
    packed: bool
    row_length: int | None = None
    multiple: int = 1
    max_document: int | None = None
    share: tuple[int, int] = (0, 1)

    def batches(
        self, examples: Sequence[Example] | TokenSet, max_tokens: int
    ) -> Iterator[tuple[list[int], Batch]]:
        """Yield the batches of this rank, each with the indices of its examples.

        Args:
            examples: the examples of all ranks.
            max_tokens: maximum number of tokens of a batch, including padding. An example that is
                longer forms a batch of its own.
        """
        groups = self._groups(examples, self.row_length or max_tokens) if len(examples) else []
        rank, ranks = self.share
        # Distribute the groups of examples to the ranks in turn. In the last round, some ranks can
        # get an empty group.
        for first in range(0, len(groups), ranks):
            mine = first + rank
            group = groups[mine] if mine < len(groups) else []
            yield group, self.batch(take_examples(examples, group))

    def batch(self, examples: Sequence[Example], rows: int = 1) -> Batch:
        """Build one batch from the examples, with at least `rows` rows if it is not packed.

        If `examples` is empty, the batch consists only of padding.
        """
        if self.packed:
            length = sum(example.row_length for example in examples)
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

    def _groups(self, examples: Sequence[Example] | TokenSet, max_tokens: int) -> list[list[int]]:
        """Return, for each batch, the indices of its examples."""
        if self.packed:
            lengths = [example.row_length for example in examples]
            return best_fit_decreasing(lengths, max(max_tokens, *lengths))
        # All examples of a token set have the same number of sequences: 2 if they are pairs, else
        # 1.
        sequences = examples[0].sequence_count
        widths = np.array([example.longest_sequence for example in examples])

        def max_items(longest: int) -> int:
            return max_tokens // (sequences * int(widths[longest]))

        return groups_of_like_length(widths, max_items)
