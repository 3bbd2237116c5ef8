"""The tokenized examples of a split, and counts of what became of its rows."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np

from tunesmith.config.schema import Source
from tunesmith.data.rows.formats import convert_sample
from tunesmith.data.rows.samples import Conversation, Picture, Sample, Text, pictures_of
from tunesmith.data.source.open_source import Rows
from tunesmith.data.text.example import Example, RowPictures
from tunesmith.data.tokens.cache import TokenArrays

# Read in a row, before the memory that they take is released.
RELEASE_EXAMPLES = 1 << 14
# The same of single examples: the kernel may map 2 MiB of the page cache for each.
RELEASE_READS = 64
MAX_HELD_BYTES = 256 << 20  # of a source's ids that may stay in memory
BEGINNING_CHARACTERS = 60  # that tell a row from others

# What becomes of rows that are longer than `data.seq_len`.
TooLong = Literal["split", "truncate", "drop", "error"]


@dataclass(frozen=True)
class TokenCounts:
    """Counts of what became of the rows of one source.

    The token cache and `tunesmith data --json` have these names.

    Attributes:
        rows: read.
        kept: examples in the token set.
        kept_rows: rows that these are of.
        split: rows that became several examples.
        tokens, supervised: of the examples.
        cut: examples that lost their end.
        dropped: rows left out as too long.
        emptied: rows left out because the cut left no supervised token.
        cut_tokens: tokens that cut examples lost.
        dropped_tokens: tokens of the rows that were dropped or emptied.
        longest: tokens of the longest row, uncut.
        digest: sha256 (hex) of all that is trained on: tokens, mask and bounds of examples in
            order.
        prompts: rows whose prompt was rendered alone and is the beginning of the example.
        prompts_apart: rows where it renders otherwise.
        flaws: name in ROW_WARNINGS -> how many rows, and the first of them.
        unread: name of a column, or of a key of turns, that nothing reads -> the same.
        grades: number in a column that may grade the answer, as `rating 3` -> the same.
        control_tokens: special token that a row's own text spells -> the same.
        bad: rows left out because they cannot be read or rendered (data.bad_rows: skip).
        bad_rows: the first of them, each with what is wrong.
        longest_of_99: 99 % of the rows, uncut, have no more tokens.
        available: rows that the source has.
        taken: the recipe's keys that select some of them.
        pictures: of all rows, uncut, as the following ones.
        scaled_pictures: those of more than `data.image_max_pixels`.
        placeholders: tokens of pictures.
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
    flaws: dict[str, list[int]] = field(default_factory=dict)
    unread: dict[str, list[int]] = field(default_factory=dict)
    grades: dict[str, list[int]] = field(default_factory=dict)
    control_tokens: dict[str, list[int]] = field(default_factory=dict)
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
        """Compute the share of the rows' tokens that are in no example."""
        lost = self.cut_tokens + self.dropped_tokens
        return lost / max(1, self.tokens + lost)


@dataclass(frozen=True)
class SourceTokens:
    """The examples of one source.

    Attributes:
        weight: how often each is seen in an epoch.
        leaks: indices of examples in which a token of the prompt is supervised.
        empties: indices of examples that have an empty answer.
        has_answers: what is supervised are answers that end, and not whole rows (format text,
            train_on all).
        too_long: what became of rows that are longer than seq_len.
        source: how its rows are read.
    """

    arrays: TokenArrays
    counts: TokenCounts
    rows: Rows
    weight: float = 1.0
    leaks: tuple[int, ...] = ()
    empties: tuple[int, ...] = ()
    has_answers: bool = True
    too_long: TooLong = "truncate"
    source: Source | None = None

    def __len__(self) -> int:
        return len(self.arrays.rows)

    @property
    def row_indices(self) -> list[int]:
        """The rows that the examples are of, each once."""
        return list(dict.fromkeys(self.arrays.rows.tolist()))

    def where(self, at: int) -> str:
        """The place of the row that example `at` came from."""
        return self.rows.where(int(self.arrays.rows[at]))

    def sample(self, at: int, system: str | None = None) -> Sample:
        """The row of example `at`, read again; of a pair with the chosen answer.

        system: `data.system`.

        Raises:
            DataError: the file has changed, and the row is broken now.
        """
        assert self.source is not None
        row = self.rows[int(self.arrays.rows[at])]
        return convert_sample(row, self.source, where=self.where(at), system=system)

    def row_pictures(self, at: int) -> tuple[Picture, ...]:
        """The pictures of the row of example `at`."""
        return pictures_of(self.sample(at))

    def first(self, n: int) -> "SourceTokens":
        """The first n examples (all, where there are fewer)."""
        n = min(len(self), n)
        arrays = self.arrays.part(0, n)
        selection = self.counts.taken
        if n < len(self):
            selection = f"{selection}, the first {n:,}".removeprefix(", ")
        counts = replace(
            self.counts,
            **count_tokens(arrays),
            # Another digest: fewer examples are another set to learn from.
            digest=hashlib.sha256(f"{self.counts.digest}[:{n}]".encode()).hexdigest(),
            taken=selection,
        )
        leaks = tuple(i for i in self.leaks if i < n)
        empties = tuple(i for i in self.empties if i < n)
        return replace(self, arrays=arrays, counts=counts, leaks=leaks, empties=empties)


def count_tokens(arrays: TokenArrays) -> dict[str, Any]:
    """Count examples, their rows and their tokens, by the names of `TokenCounts`."""
    _, examples_of_rows = np.unique(arrays.rows, return_counts=True)
    return {
        "kept": len(arrays.rows),
        "kept_rows": len(examples_of_rows),
        "split": int(np.count_nonzero(examples_of_rows > 1)),
        "tokens": len(arrays.ids),
        "supervised": arrays.count_trained(),
        "cut": int(arrays.truncated.sum()),
    }


def _join_arrays(arrays: Iterable[np.ndarray]) -> np.ndarray:
    # numpy joins no empty list.
    return np.concatenate([np.zeros(0, np.int64), *arrays])


class PictureSource(Protocol):
    """Has the pixels of rows prepared."""

    def of(self, part: SourceTokens, at: int, digests: tuple[int, ...]) -> RowPictures:
        """The pictures of example `at` of a source; `digests` are those that were tokenized."""


class TokenSet:
    """All examples of a split, source after source.

    Attributes:
        lengths: int64 [n], tokens of each example.
        longest_sequences: int64 [n], tokens of each example's longest sequence.
        repeats: float64 [n], how often each is seen in an epoch.
        reference: fp64 [n, sequences of one], see `Example.reference`; None where unknown.
        mismatched_reference: of prompts with answers of other rows (`mismatched.py`), fp64
            [examples] of each optimizer step, or of all held-out rows as one; None: unknown.
        shares_prompts: packed rows hold once what the sequences of a pair share.
        pictures: makes the pixels of an example's pictures; None: for nothing that needs them.
        picture_id: the token that stands for a part of a picture; None: rows have no pictures.
    """

    def __init__(self, parts: Iterable[SourceTokens]) -> None:
        self.parts = tuple(parts)
        self.shares_prompts = False
        self.pictures: PictureSource | None = None
        self.picture_id: int | None = None
        self.reference: np.ndarray | None = None
        self.mismatched_reference: Sequence[np.ndarray] | None = None
        self._firsts = np.cumsum([0, *map(len, self.parts)])
        self._reads = 0
        self.lengths = _join_arrays(np.diff(part.arrays.offsets) for part in self.parts)
        # A corpus has many examples: what is the same is in memory once.
        self.longest_sequences = self.lengths
        if self.has_pairs:
            # Of a pair the first sequence ends here; 0 where an example is one sequence.
            firsts = _join_arrays(part.arrays.firsts for part in self.parts)
            self.longest_sequences = np.maximum(firsts, self.lengths - firsts)
        weights = [part.weight for part in self.parts]
        if len(set(weights)) == 1:
            self.repeats = np.broadcast_to(np.float64(weights[0]), len(self))
        else:
            self.repeats = np.repeat(np.array(weights, np.float64), np.diff(self._firsts))

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def document_lengths(self, examples: Sequence[int] | None = None) -> np.ndarray:
        """int64: tokens of each sequence of some examples; None: of all."""
        chosen = slice(None) if examples is None else list(examples)
        longest = self.longest_sequences[chosen]
        others = self.lengths[chosen] - longest
        return np.concatenate([longest, others[others > 0]])

    @cached_property
    def shared(self) -> np.ndarray:
        """int64 [n], `Example.shared` of each example."""
        if not self.shares_prompts:
            return np.zeros(len(self), np.int64)
        return self._of_each(Example.count_shared)

    @cached_property
    def picture_tokens(self) -> np.ndarray:
        """int64 [n], tokens of each example that stand for pictures."""
        if self.picture_id is None:
            return np.zeros(len(self), np.int64)
        return self._of_each(lambda example: int((example.ids == self.picture_id).sum()))

    @property
    def supervised(self) -> np.ndarray:
        """int64 [n], `Example.supervised` of each example."""
        return self._of_each(lambda example: example.supervised)

    def _of_each(self, figure: Callable[[Example], int], dtype: type = np.int64) -> np.ndarray:
        """A figure of each example, [n]; few of them are in memory at once."""
        return np.fromiter(map(figure, self._stored()), dtype, len(self))

    def _stored(self) -> Iterator[Example]:
        """All examples in order, as they are stored."""
        for part in self.parts:
            for i in range(len(part)):
                yield part.arrays.example(i)
                if i % RELEASE_EXAMPLES == 0:
                    part.arrays.release()

    @property
    def row_lengths(self) -> np.ndarray:
        """int64 [n], tokens of each example in a packed row."""
        return self.lengths - self.shared if self.shares_prompts else self.lengths

    @property
    def has_pairs(self) -> bool:
        """Tell whether an example is a pair of answers."""
        return any(bool(part.arrays.firsts.any()) for part in self.parts)

    def __iter__(self) -> Iterator[Example]:
        for i in range(len(self)):
            yield self[i]

    def _find(self, i: int) -> tuple[SourceTokens, int]:
        """The source of example i, and its index there."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        p = int(np.searchsorted(self._firsts, i, side="right")) - 1
        return self.parts[p], i - int(self._firsts[p])

    def __getitem__(self, i: int) -> Example:
        part, at = self._find(i)
        self._reads += 1
        if self._reads % RELEASE_READS == 0 and part.arrays.ids.nbytes > MAX_HELD_BYTES:
            part.arrays.release()
        example = part.arrays.example(at)
        if self.shares_prompts:
            example = example._replace(shared=int(self.shared[i]))
        if self.pictures is not None and example.digests:
            example = example._replace(pictures=self.pictures.of(part, at, example.digests))
        if self.reference is None:
            return example
        return example._replace(reference=tuple(self.reference[i].tolist()))

    @cached_property
    def hashes(self) -> np.ndarray:
        """uint64 [n], of the tokens of each example.

        Two different examples share one in 1 of 2^64 cases.
        """
        return self._of_each(_hash64, np.uint64)

    @property
    def chosen_hashes(self) -> np.ndarray:
        """Hash each example as `hashes` does, but of a pair the chosen answer alone."""
        if not self.has_pairs:
            return self.hashes
        return self._of_each(lambda example: _hash64(example.parts()[0]), np.uint64)

    def where(self, i: int) -> str:
        """The place of the row that example i came from."""
        part, at = self._find(i)
        return part.where(at)

    def sample(self, i: int, system: str | None) -> Sample:
        """`SourceTokens.sample` of example i."""
        part, at = self._find(i)
        return part.sample(at, system)

    def beginning(self, i: int) -> str:
        """Quote the beginning of the row of example i, in one line that tells it from others.

        Of a conversation its first question, else its prompt or its text.
        """
        sample = self.sample(i, None)
        if isinstance(sample, Conversation):
            questions = [message for message in sample.messages if message["role"] == "user"]
            text = questions[0]["content"] if questions else ""
        else:
            text = sample.text if isinstance(sample, Text) else sample.prompt
        text = " ".join(text[:1000].split())
        return (
            text if len(text) <= BEGINNING_CHARACTERS else f"{text[: BEGINNING_CHARACTERS - 4]} ..."
        )

    @property
    def counts(self) -> TokenCounts:
        """The sum over all sources."""
        values = [vars(part.counts) for part in self.parts]
        # A source with another weight is another epoch.
        digests = [f"{part.counts.digest}*{part.weight}" for part in self.parts]
        joined: dict[str, Any] = {}
        numbers = [field_ for field_ in fields(TokenCounts) if isinstance(field_.default, int)]
        for name in (number.name for number in numbers):
            join = max if name.startswith("longest") else sum
            joined[name] = join([0, *(of[name] for of in values)])
        return TokenCounts(
            source=", ".join(of["source"] for of in values),
            digest=hashlib.sha256("".join(digests).encode()).hexdigest(),
            **joined,
        )

    def first(self, n: int) -> "TokenSet":
        """The first n examples."""
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
    """The number of examples that repeat an earlier one, token for token.

    Attributes:
        where, earlier: places of the first of them, and of the one that it repeats.
    """

    count: int = 0
    where: str = ""
    earlier: str = ""


def find_repeats(
    tokens: TokenSet, among: TokenSet | None = None, *, chosen: bool = False
) -> Repeats:
    """Examples of `tokens` that are also in `among`; or None, earlier in `tokens`.

    chosen: of a pair of answers compare the chosen one alone, with a plain answer too.
    """
    if among is None:
        among = tokens
    hashes = tokens.chosen_hashes if chosen else tokens.hashes
    among_hashes = among.chosen_hashes if chosen else among.hashes
    if not len(hashes) or not len(among_hashes):
        return Repeats()
    values, firsts = np.unique(among_hashes, return_index=True)
    positions = np.minimum(np.searchsorted(values, hashes), len(values) - 1)
    earliest = firsts[positions]
    is_repeat = values[positions] == hashes
    if among is tokens:
        is_repeat &= earliest < np.arange(len(hashes))
    repeats = np.flatnonzero(is_repeat)
    if not len(repeats):
        return Repeats()
    first = int(repeats[0])
    return Repeats(len(repeats), tokens.where(first), among.where(int(earliest[first])))
