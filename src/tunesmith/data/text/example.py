"""One tokenized example."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np


class Pixels(NamedTuple):
    """The pictures of one or more examples, as the model's vision part takes them.

    Attributes:
        inputs: name of an argument of the model -> its array, pictures (or their patches) along the
            first dimension.
        grids: int64 [pictures, 2], rows and columns of placeholders, for models whose positions
            have them; else empty.
    """

    inputs: dict[str, np.ndarray]
    grids: np.ndarray


class RowPictures(Protocol):
    """The pictures of a row, whose pixels other processes prepare."""

    @property
    def token_id(self) -> int:
        """The token that stands in place of their features."""

    def begin(self) -> None:
        """Have them prepared, without waiting."""

    def pixels(self) -> Pixels:
        """Wait for them; DataError where a picture is not the one that was tokenized."""


class Example(NamedTuple):
    """One tokenized example: one sequence, or several that a method needs side by side.

    Attributes:
        ids: int32 [n], n >= 2.
        trained: bool [n]; `trained[i]` says that token i is supervised: predicted from position i -
            1 with loss. The first token of a sequence has none before it and carries no loss.
        sequences: length of each sequence (the chosen and the rejected one of a pair), n in all;
            empty for one of n tokens. Each is a document of its own.
        label: whether the answer is a good one; None where the row has no label.
        reference: log-probability of each sequence's supervised tokens under the model that a
            method compares with, where it is known before training.
        shared: tokens at the start of a pair's second sequence that a packed row leaves out, as
            they are those of the first one and no position of either has a target (`count_shared`).
        digests: of the bytes of each of its pictures, 63 bits.
        pictures: hands over their pixels, once a token set has the processor of a model that sees.
        scaled: how many of its pictures were scaled down to `data.image_max_pixels`, until it is
            stored.
        flaws: names in ROW_WARNINGS of what its tokens show, until it is stored.
        control_tokens: special tokens that the row's own text spells, until it is stored.
    """

    ids: np.ndarray
    trained: np.ndarray
    sequences: tuple[int, ...] = ()
    label: bool | None = None
    reference: tuple[float, ...] = ()
    shared: int = 0
    digests: tuple[int, ...] = ()
    pictures: RowPictures | None = None
    scaled: int = 0
    flaws: tuple[str, ...] = ()
    control_tokens: frozenset[str] = frozenset()

    def parts(self) -> list[Example]:
        """Each sequence as an example; of a pair the second has what it leaves out."""
        if not self.sequences:
            return [self]
        edges = np.cumsum(self.sequences[:-1], dtype=np.int64)
        ids = np.split(self.ids, edges)
        parts = [Example(*part) for part in zip(ids, np.split(self.trained, edges), strict=True)]
        parts[1] = parts[1]._replace(shared=self.shared)
        return parts

    def count_shared(self) -> int:
        """Tokens with which both sequences of a pair begin and that neither has a target on."""
        if not self.sequences:
            return 0
        first, second = self.parts()
        length = min(len(first.ids), len(second.ids))
        differs = first.ids[:length] != second.ids[:length]
        shared = int(differs.argmax()) if differs.any() else length
        for trained in (first.trained, second.trained):
            # The position before the first supervised token has that as its target.
            if trained[1:].any():
                shared = min(shared, int(trained[1:].argmax()))
        # A document keeps a token of its own.
        return min(shared, length - 1)

    @property
    def sequence_count(self) -> int:
        return max(1, len(self.sequences))

    @property
    def longest_sequence(self) -> int:
        """Tokens of it."""
        return max(self.sequences, default=len(self.ids))

    @property
    def supervised(self) -> int:
        """Positions that carry loss, as `collate` counts them."""
        return sum(int(part.trained[1:].sum()) for part in self.parts())

    @property
    def chosen_tokens(self) -> int:
        """Supervised tokens of a pair's chosen answer; 0 for an example that is none."""
        if not self.sequences:
            return 0
        return int(self.trained[1 : self.sequences[0]].sum())
