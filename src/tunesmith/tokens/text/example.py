"""The type of a tokenized example."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np


class Pixels(NamedTuple):
    """Pixels of the pictures of one or more examples, in the form that the vision model requires.

    Attributes:
        inputs: name of the model's argument -> array. The first dimension of the array is pictures
            or patches of pictures.
        grids: int64 [pictures, 2], the rows and columns of placeholder tokens of each picture.
            Empty for models whose positions do not depend on the grid.
    """

    inputs: dict[str, np.ndarray]
    grids: np.ndarray


class RowPictures(Protocol):
    """Pictures of a row. Other processes compute their pixels, or they are computed already."""

    @property
    def token_id(self) -> int:
        """Id of the placeholder token that the model replaces by image features."""

    def begin(self) -> None:
        """Start the computation of the pixels, without waiting for the result."""

    def pixels(self) -> Pixels:
        """Wait for the pixels and return them.

        Raise DataError if a picture has changed since the row was tokenized.
        """


class Example(NamedTuple):
    """One tokenized example, with one sequence or with several sequences that the method compares.

    Attributes:
        ids: int32 [n], n >= 2.
        trained: bool [n]. If `trained[i]` is True, token i is supervised: the loss is computed at
            position i - 1, which predicts it. The first token of a sequence is never supervised,
            because no position predicts it.
        sequences: length of each sequence, for example of the chosen and the rejected sequence of a
            pair. The sum is n. Empty if the example is one sequence of n tokens. Each sequence is a
            separate document.
        label: whether the answer is good. None if the row has no label.
        reference: log-probability of each sequence's supervised tokens under the reference model.
            Empty if it was not computed before training.
        shared: number of leading tokens that the second and later sequences do not store in a
            packed row. They are equal to the leading tokens of the first sequence, and none of
            their positions has a target (see `count_shared`).
        weights: weight of the log-probabilities of each sequence in the loss of grpo. Empty for
            other methods.
        sampled: fp32 [supervised], log-probability with which the sampler drew each supervised
            token. None if the answers were not sampled.
        digests: a 63-bit digest of the bytes of each picture.
        pictures: source of the pixels. A token set sets this attribute if it has the processor of a
            vision-language model.
        scaled: number of pictures that were scaled down to `data.image_max_pixels`. Not stored in
            the cache.
        flaws: problems of the tokens, as names in ROW_WARNINGS. Not stored in the cache.
        control_tokens: special tokens that the row's own text contains. Not stored in the cache.
    """

    ids: np.ndarray
    trained: np.ndarray
    sequences: tuple[int, ...] = ()
    label: bool | None = None
    reference: tuple[float, ...] = ()
    shared: int = 0
    weights: tuple[float, ...] = ()
    sampled: np.ndarray | None = None
    digests: tuple[int, ...] = ()
    pictures: RowPictures | None = None
    scaled: int = 0
    flaws: tuple[str, ...] = ()
    control_tokens: frozenset[str] = frozenset()

    def parts(self) -> list[Example]:
        """Return each sequence as a separate example. All but the first keep `shared`."""
        if not self.sequences:
            return [self]
        edges = np.cumsum(self.sequences[:-1], dtype=np.int64)
        pairs = zip(np.split(self.ids, edges), np.split(self.trained, edges), strict=True)
        first, *others = (Example(ids, trained) for ids, trained in pairs)
        return [first, *(part._replace(shared=self.shared) for part in others)]

    @property
    def row_length(self) -> int:
        """Number of tokens that the example occupies in a packed row."""
        return len(self.ids) - self.shared * (self.sequence_count - 1)

    def count_shared(self) -> int:
        """Count the leading tokens that both sequences of a pair share before the first target."""
        if not self.sequences:
            return 0
        first, second = self.parts()
        length = min(self.sequences)
        ends = first.ids[:length] != second.ids[:length]
        # Shift the masks by one, because the target of a position is the next token.
        for part in (first, second):
            has_target = part.trained[1 : length + 1]
            ends[: len(has_target)] |= has_target
        # At least one token of the shorter sequence must not be shared.
        ends[-1] = True
        return int(ends.argmax())

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the last answer. The last answer begins after the last gap
        between supervised tokens.
        """
        trained = np.flatnonzero(self.trained)
        gaps = np.flatnonzero(np.diff(trained) > 1)
        return int(trained[gaps[-1] + 1] if len(gaps) else trained[0])

    @property
    def sequence_count(self) -> int:
        return max(1, len(self.sequences))

    @property
    def longest_sequence(self) -> int:
        """Number of tokens of the longest sequence."""
        return max(self.sequences, default=len(self.ids))

    @property
    def supervised(self) -> int:
        """Number of positions that contribute to the loss. `collate` counts the same positions."""
        return sum(int(part.trained[1:].sum()) for part in self.parts())

    @property
    def chosen_tokens(self) -> int:
        """Number of supervised tokens of a pair's chosen answer. 0 if the example is not a pair."""
        if not self.sequences:
            return 0
        return int(self.trained[1 : self.sequences[0]].sum())
