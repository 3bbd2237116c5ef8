"""The tokenized examples of a split, and counts of how its rows were used."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from tunesmith.config.schema import Source
from tunesmith.rows.formats import convert_sample
from tunesmith.rows.samples import Sample, texts_by_role
from tunesmith.rows.source.open_source import Rows
from tunesmith.tokens.cache import TokenArrays
from tunesmith.tokens.text.example import Example, RowPictures

# Number of examples that are read in order before their memory pages are released
RELEASE_EXAMPLES = 1 << 14
# Number of examples that are read in random order before their memory pages are released. The limit
# is lower, because the kernel may map 2 MiB of the page cache per example.
RELEASE_READS = 64
MAX_HELD_BYTES = 256 << 20  # maximum bytes of a source's ids that stay in memory
BEGINNING_CHARACTERS = 60  # length of the excerpt that identifies a row

# Name of a problem -> number of rows with this problem, and index of the first of these rows.
RowsByName = dict[str, list[int]]
# What happens to rows that are longer than `data.seq_len`.
TooLong = Literal["split", "truncate", "drop", "error"]


@dataclass(frozen=True)
class TokenCounts:
    """Statistics about the tokenization of one source: its rows, tokens and problems.

    The token cache and `tunesmith data --json` use these names.

    Attributes:
        rows: number of rows that were read.
        kept: number of examples in the token set.
        kept_rows: number of rows with at least one example.
        split: number of rows that were split into several examples.
        tokens, supervised: number of tokens and of supervised tokens in the examples.
        cut: number of examples that were truncated.
        dropped: number of rows that were dropped as too long.
        emptied: number of rows that were dropped because truncation left no supervised token.
        cut_tokens: number of tokens that truncation removed.
        dropped_tokens: number of tokens of rows that were dropped or emptied.
        longest: tokens of the longest row before truncation.
        digest: sha256 (hex) of the training data: tokens, mask and edges of examples, in order.
        prompts: number of rows whose separately rendered prompt is the start of the example.
        prompts_apart: number of rows whose separately rendered prompt differs from the example.
        flaws: rows with a problem, by the problem's name in ROW_WARNINGS.
        unread: rows with columns and message keys that tunesmith does not read, by the name of the
            column or key.
        control_tokens: rows whose text contains a special token, by token.
        bad: number of rows that were skipped because they cannot be read or rendered
            (data.bad_rows: skip).
        bad_rows: the first of these rows with their errors.
        longest_of_99: 99th percentile of the row lengths in tokens, before truncation.
        available: number of rows of the source.
        taken: the recipe keys that select a part of the available rows.
        pictures: number of pictures of all rows, before truncation.
        scaled_pictures: number of pictures that were scaled down to `data.image_max_pixels`.
        placeholders: number of placeholder tokens of all pictures.
    """

    source: str
    rows: int = 0
    kept: int = 0
    tokens: int = 0
    supervised: int = 0
    cut: int = 0
    dropped: int = 0
    emptied: int = 0
    longest: int = 0
    digest: str = ""
    prompts: int = 0
    prompts_apart: int = 0
    flaws: RowsByName = field(default_factory=dict)
    unread: RowsByName = field(default_factory=dict)
    control_tokens: RowsByName = field(default_factory=dict)
    bad: int = 0
    bad_rows: list[tuple[int, str]] = field(default_factory=list)
    longest_of_99: int = 0
    available: int = 0
    taken: str = ""
    kept_rows: int = 0
    split: int = 0
    cut_tokens: int = 0
    dropped_tokens: int = 0
    pictures: int = 0
    scaled_pictures: int = 0
    placeholders: int = 0

    @property
    def lost_share(self) -> float:
        """Fraction of the rows' tokens that are in no example, because rows were truncated or
        dropped.
        """
        lost = self.cut_tokens + self.dropped_tokens
        return lost / max(1, self.tokens + lost)


@dataclass(frozen=True)
class SourceTokens:
    """The examples of one source.

    Attributes:
        weight: how often each example is used per epoch.
        leaks: indices of examples in which a token of the prompt is supervised.
        has_answers: whether the supervised parts are answers, which end with an end token. False if
            entire rows are supervised (format text, train_on all), or if rows are only prompts.
        too_long: what happens to rows that are longer than seq_len.
        source: the source as it is described in the recipe.
    """

    arrays: TokenArrays
    counts: TokenCounts
    rows: Rows
    weight: float = 1.0
    leaks: tuple[int, ...] = ()
    has_answers: bool = True
    too_long: TooLong = "truncate"
    source: Source | None = None

    def __len__(self) -> int:
        return len(self.arrays.rows)

    def where(self, at: int) -> str:
        """Return the location of the row of example `at`."""
        return self.rows.where(int(self.arrays.rows[at]))

    def sample(self, at: int, system: str | None = None) -> Sample:
        """Read the row of example `at` again. For a pair, return the sample of the chosen answer.

        Args:
            system: `data.system`.

        Raises:
            DataError: the file has changed, and the row is now damaged.
        """
        assert self.source is not None
        row = self.rows[int(self.arrays.rows[at])]
        return convert_sample(row, self.source, where=self.where(at), system=system)

    def first(self, n: int) -> "SourceTokens":
        """Return the first n examples, or all examples if there are fewer."""
        n = min(len(self), n)
        arrays = self.arrays.part(0, n)
        taken = self.counts.taken
        if n < len(self):
            taken = f"{taken}, the first {n:,}".removeprefix(", ")
        # Compute a new digest, because a part of the examples is different training data.
        digest = hashlib.sha256(f"{self.counts.digest}[:{n}]".encode()).hexdigest()
        counts = replace(self.counts, **count_tokens(arrays), digest=digest, taken=taken)
        return replace(
            self,
            arrays=arrays,
            counts=counts,
            leaks=tuple(i for i in self.leaks if i < n),
        )


def count_tokens(arrays: TokenArrays) -> dict[str, Any]:
    """Count examples, their rows and their tokens. The keys are names of `TokenCounts`."""
    _, examples_per_row = np.unique(arrays.rows, return_counts=True)
    return {
        "kept": len(arrays.rows),
        "kept_rows": len(examples_per_row),
        "split": int(np.count_nonzero(examples_per_row > 1)),
        "tokens": len(arrays.ids),
        "supervised": arrays.count_trained(),
        "cut": int(arrays.truncated.sum()),
    }


def _join_arrays(arrays: Iterable[np.ndarray]) -> np.ndarray:
    # Add an empty array, because numpy.concatenate rejects an empty list.
    return np.concatenate([np.zeros(0, np.int64), *arrays])


class TokenSet:
    """All examples of a split, one source after the other.

    Attributes:
        lengths: int64 [n], number of tokens of each example.
        longest_sequences: int64 [n], number of tokens of each example's longest sequence.
        repeats: float64 [n], how often each example is used per epoch.
        reference: fp64 [n, sequences per example], see `Example.reference`. None if unknown.
        mismatched_reference: log-probabilities of the reference model for prompts with answers of
            other rows (`mismatched.py`). Training has one fp64 array [examples] for each optimizer
            step, and validation has only one array. None if unknown.
        shares_prompts: whether packed rows store the common prompt of a pair once.
        pictures: returns the pictures of an example from its source, its index in the source and
            the digests of the pictures. None if the pixels are not needed.
        picture_id: id of the placeholder token of pictures. None if the rows have no pictures.
    """

    def __init__(self, parts: Iterable[SourceTokens]) -> None:
        self.parts = tuple(parts)
        self.shares_prompts = False
        self.pictures: Callable[[SourceTokens, int, Sequence[int]], RowPictures] | None = None
        self.picture_id: int | None = None
        self.reference: np.ndarray | None = None
        self.mismatched_reference: Sequence[np.ndarray] | None = None
        self._firsts = np.cumsum([0, *map(len, self.parts)])
        self._reads = 0
        self.lengths = _join_arrays(np.diff(part.arrays.offsets) for part in self.parts)
        # Without pairs, `longest_sequences` is the same array as `lengths`, which saves memory for
        # a large corpus.
        self.longest_sequences = self.lengths
        if self.has_pairs:
            # Length of the first sequence of each pair. 0 if the example has one sequence.
            firsts = _join_arrays(part.arrays.firsts for part in self.parts)
            self.longest_sequences = np.maximum(firsts, self.lengths - firsts)
        weights = np.array([part.weight for part in self.parts], np.float64)
        if len(np.unique(weights)) == 1:
            self.repeats = np.broadcast_to(weights[0], len(self))
        else:
            self.repeats = np.repeat(weights, np.diff(self._firsts))

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def document_lengths(self, examples: Sequence[int] | None = None) -> np.ndarray:
        """Return the number of tokens of each sequence, int64.

        If `examples` is None, return the lengths for all examples.
        """
        chosen = slice(None) if examples is None else list(examples)
        longest = self.longest_sequences[chosen]
        others = self.lengths[chosen] - longest
        return np.concatenate([longest, others[others > 0]])

    @cached_property
    def shared(self) -> np.ndarray:
        """Number of shared tokens of each example (`Example.shared`), int64 [n]."""
        if not self.shares_prompts:
            return np.zeros(len(self), np.int64)
        return self._map_examples(Example.count_shared)

    @cached_property
    def picture_tokens(self) -> np.ndarray:
        """Number of placeholder tokens of pictures in each example, int64 [n]."""
        if self.picture_id is None:
            return np.zeros(len(self), np.int64)
        return self._map_examples(lambda example: int((example.ids == self.picture_id).sum()))

    @property
    def supervised(self) -> np.ndarray:
        """Number of supervised tokens of each example (`Example.supervised`), int64 [n]."""
        return self._map_examples(lambda example: example.supervised)

    def _map_examples(self, figure: Callable[[Example], int], dtype: type = np.int64) -> np.ndarray:
        """Call `figure` for each example and return the results, [n]. Only a few examples are in
        memory at a time.
        """
        values: np.ndarray = np.zeros(len(self), dtype)
        for first, part in zip(self._firsts, self.parts, strict=False):
            for i in range(len(part)):
                values[first + i] = figure(part.arrays.example(i))
                if i % RELEASE_EXAMPLES == 0:
                    part.arrays.release()
        return values

    @property
    def row_lengths(self) -> np.ndarray:
        """Number of tokens that each example occupies in a packed row, int64 [n]."""
        return self.lengths - self.shared if self.shares_prompts else self.lengths

    @property
    def has_pairs(self) -> bool:
        """Return whether at least one example is a pair of answers."""
        return any(part.arrays.firsts.any() for part in self.parts)

    def __iter__(self) -> Iterator[Example]:
        for i in range(len(self)):
            yield self[i]

    def _find(self, i: int) -> tuple[SourceTokens, int]:
        """Return the source of example i, and its index in this source."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        p = int(np.searchsorted(self._firsts, i, side="right")) - 1
        return self.parts[p], i - int(self._firsts[p])

    def __getitem__(self, i: int) -> Example:
        part, at = self._find(i)
        self._reads += 1
        is_large = part.arrays.ids.nbytes > MAX_HELD_BYTES
        if is_large and self._reads % RELEASE_READS == 0:
            part.arrays.release()
        example = part.arrays.example(at)
        if self.shares_prompts:
            example = example._replace(shared=int(self.shared[i]))
        if self.pictures is not None and example.digests:
            example = example._replace(pictures=self.pictures(part, at, example.digests))
        if self.reference is not None:
            example = example._replace(reference=tuple(self.reference[i].tolist()))
        return example

    @cached_property
    def hashes(self) -> np.ndarray:
        """Hash of the tokens of each example, uint64 [n].

        Two different examples have the same hash with a probability of 2^-64.
        """
        return self._map_examples(_hash64, np.uint64)

    @property
    def chosen_hashes(self) -> np.ndarray:
        """Hash of each example's tokens, for a pair only of the chosen sequence, uint64 [n]."""
        if not self.has_pairs:
            return self.hashes
        return self._map_examples(lambda example: _hash64(example.parts()[0]), np.uint64)

    def where(self, i: int) -> str:
        """Return the location of the row of example i."""
        part, at = self._find(i)
        return part.where(at)

    def sample(self, i: int, system: str | None) -> Sample:
        """Return the sample of example i, see `SourceTokens.sample`."""
        part, at = self._find(i)
        return part.sample(at, system)

    def row(self, i: int) -> dict[str, Any]:
        """Return the row of example i as it is in the file."""
        part, at = self._find(i)
        return dict(part.rows[int(part.arrays.rows[at])])

    def beginning(self, i: int) -> str:
        """Return the start of the row of example i in one line, so that a user recognizes the row.

        For a conversation this is its first question, else the prompt or the text.
        """
        texts = [
            text for role, text in texts_by_role(self.sample(i, None)) if role in ("user", "text")
        ]
        text = " ".join(next(iter(texts), "")[:1000].split())
        if len(text) <= BEGINNING_CHARACTERS:
            return text
        return f"{text[: BEGINNING_CHARACTERS - 4]} ..."

    @property
    def counts(self) -> TokenCounts:
        """The sums of the counts of all sources."""
        all_counts = [part.counts for part in self.parts]
        # The digest includes the weight, because a source with another weight gives a different
        # epoch.
        digests = "".join(f"{part.counts.digest}*{part.weight}" for part in self.parts)
        joined: dict[str, Any] = {}
        for field_ in fields(TokenCounts):
            name = field_.name
            if isinstance(field_.default, int):
                values = [getattr(counts, name) for counts in all_counts]
                is_maximum = name.startswith("longest")
                joined[name] = max(values, default=0) if is_maximum else sum(values)
        return TokenCounts(
            source=", ".join(counts.source for counts in all_counts),
            digest=hashlib.sha256(digests.encode()).hexdigest(),
            **joined,
        )

    def first(self, n: int) -> "TokenSet":
        """Return the first n examples."""
        parts = []
        for part in self.parts:
            parts.append(part.first(n))
            n -= len(parts[-1])
        tokens = TokenSet(parts)
        tokens.shares_prompts = self.shares_prompts
        tokens.pictures = self.pictures
        tokens.picture_id = self.picture_id
        return tokens


def _hash64(example: Example) -> int:
    digest = hashlib.sha256(np.ascontiguousarray(example.ids).data)
    if example.digests:
        digest.update(np.array(example.digests, np.int64).data)
    return int.from_bytes(digest.digest()[:8], "big")


@dataclass(frozen=True)
class Repeats:
    """Result of a search for examples that have the same tokens as an earlier example.

    Attributes:
        where, earlier: location of the first repeated example, and of the example that it repeats.
    """

    count: int = 0
    where: str = ""
    earlier: str = ""


def find_repeats(
    tokens: TokenSet, among: TokenSet | None = None, *, chosen: bool = False
) -> Repeats:
    """Find examples of `tokens` that are also in `among`.

    If `among` is None, find examples that repeat an earlier example of `tokens`.

    Args:
        chosen: whether to compare only the chosen sequence of a pair.
    """
    if among is None:
        among = tokens
    if chosen:
        hashes = tokens.chosen_hashes
        among_hashes = among.chosen_hashes
    else:
        hashes = tokens.hashes
        among_hashes = among.hashes
    if not len(among_hashes):
        return Repeats()
    values, firsts = np.unique(among_hashes, return_index=True)
    positions = np.searchsorted(values, hashes)
    positions = np.minimum(positions, len(values) - 1)
    earliest = firsts[positions]
    is_repeat = values[positions] == hashes
    if among is tokens:
        is_repeat &= earliest < np.arange(len(hashes))
    repeats = np.flatnonzero(is_repeat)
    if not len(repeats):
        return Repeats()
    first = repeats[0]
    return Repeats(len(repeats), tokens.where(first), among.where(earliest[first]))
