"""Rows -> tokens and loss mask, once: they are stored in the token cache (`cache.py`)."""

import hashlib
import itertools
import json
import logging
import sys
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tunesmith.config.schema import Data, Source
from tunesmith.data.bad_rows import BadRows, error_of_sources
from tunesmith.data.batch import Example
from tunesmith.data.cache import TokenArrays, TokenEntry, TokenWriter, cached_tokens
from tunesmith.data.encode import EncodedRow, RowBatch, RowEncoder
from tunesmith.data.formats import Conversation, Sample, Text, convert_sample
from tunesmith.data.source import Rows, count_characters
from tunesmith.data.template import Template
from tunesmith.data.workers import encode_batches
from tunesmith.errors import DataError, TunesmithError
from tunesmith.host.logger import logged_if_slow
from tunesmith.host.streams import is_terminal, visible

log = logging.getLogger(__name__)

# Raise it when the same rows would give other tokens, or an entry of the cache has another form.
TOKENS_VERSION = 12
# Rows handed to the tokenizer at once, and the characters after which no further row joins them:
# tokenizing takes some 50 bytes of memory a character.
_BATCH_ROWS = 256
_BATCH_CHARS = 4 << 20
RELEASE_EXAMPLES = 1 << 14  # read in a row, before the memory that they take is released
# The same of single examples: the kernel may map 2 MiB of the page cache for each.
RELEASE_READS = 64
SMALL_BYTES = 256 << 20  # of a source's ids that may stay in memory
BEGINNING_CHARS = 60  # characters that tell a row from others

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
        control_tokens: special token that a row's own text spells -> the same.
        bad: rows left out because they cannot be read or rendered (data.bad_rows: skip).
        bad_rows: the first of them, each with what is wrong.
        longest_of_99: 99 % of the rows, uncut, have no more tokens.
        available: rows that the source has.
        taken: the recipe's keys that select some of them.
    """

    source: str
    rows: int
    kept: int
    tokens: int
    supervised: int
    cut: int
    dropped: int
    emptied: int
    longest: int
    digest: str
    prompts: int = 0
    prompts_apart: int = 0
    flaws: dict[str, list[int]] = field(default_factory=dict)
    unread: dict[str, list[int]] = field(default_factory=dict)
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

    @property
    def lost_share(self) -> float:
        """Compute the share of the rows' tokens that are in no example."""
        lost = self.cut_tokens + self.dropped_tokens
        return lost / max(1, self.tokens + lost)


# Of several sources, what adds up, and of what the largest counts.
_SUMMED = (
    *("rows", "kept", "tokens", "supervised", "cut", "dropped", "emptied", "bad", "prompts"),
    *("prompts_apart", "available", "kept_rows", "split", "cut_tokens", "dropped_tokens"),
)
_LONGEST = ("longest", "longest_of_99")


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

    def first(self, n: int) -> "SourceTokens":
        """The first n examples (all, where there are fewer)."""
        n = min(len(self), n)
        arrays = self.arrays.part(0, n)
        selection = self.counts.taken
        if n < len(self):
            selection = f"{selection}, the first {n:,}".removeprefix(", ")
        counts = replace(
            self.counts,
            **_count_tokens(arrays),
            # Another digest: fewer examples are another set to learn from.
            digest=hashlib.sha256(f"{self.counts.digest}[:{n}]".encode()).hexdigest(),
            taken=selection,
        )
        leaks = tuple(i for i in self.leaks if i < n)
        empties = tuple(i for i in self.empties if i < n)
        return replace(self, arrays=arrays, counts=counts, leaks=leaks, empties=empties)


def _count_tokens(arrays: TokenArrays) -> dict[str, Any]:
    is_first = np.ones(len(arrays.rows), np.bool_)
    is_first[1:] = arrays.rows[1:] != arrays.rows[:-1]
    # The second example of a row stands right behind its first.
    is_second = is_first[:-1] & ~is_first[1:]
    return {
        "kept": len(arrays.rows),
        "kept_rows": int(np.count_nonzero(is_first)),
        "split": int(np.count_nonzero(is_second)),
        "tokens": len(arrays.ids),
        "supervised": arrays.count_trained(),
        "cut": int(arrays.truncated.sum()),
    }


def _join_arrays(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """One array of all; of none int64 [0], as numpy joins no empty list."""
    if not arrays:
        return np.zeros(0, np.int64)
    return np.concatenate(arrays)


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
    """

    def __init__(self, parts: Iterable[SourceTokens]) -> None:
        self.parts = tuple(parts)
        self.shares_prompts = False
        self.reference: np.ndarray | None = None
        self.mismatched_reference: Sequence[np.ndarray] | None = None
        self._firsts = np.cumsum([0, *map(len, self.parts)])
        self._reads = 0
        self.lengths = _join_arrays([np.diff(part.arrays.offsets) for part in self.parts])
        # A corpus has many examples: what is the same is in memory once.
        self.longest_sequences = self.lengths
        if self.has_pairs:
            # Of a pair the first sequence ends here; 0 where an example is one sequence.
            firsts = _join_arrays([part.arrays.firsts for part in self.parts])
            self.longest_sequences = np.maximum(firsts, self.lengths - firsts)
        weights = [part.weight for part in self.parts]
        if len(set(weights)) == 1:
            self.repeats = np.broadcast_to(np.float64(weights[0]), len(self))
        else:
            self.repeats = _join_arrays([np.full(len(part), part.weight) for part in self.parts])

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
        if self._reads % RELEASE_READS == 0 and part.arrays.ids.nbytes > SMALL_BYTES:
            part.arrays.release()
        example = part.arrays.example(at)
        if self.shares_prompts:
            example = example._replace(shared=int(self.shared[i]))
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
        return part.rows.where(int(part.arrays.rows[at]))

    def sample(self, i: int, system: str | None) -> Sample:
        """The row of example i, of a pair with the chosen answer; `system` is `data.system`.

        Raises:
            DataError: the file has changed, and the row is broken now.
        """
        part, at = self._find(i)
        assert part.source is not None
        row = part.rows[int(part.arrays.rows[at])]
        return convert_sample(row, part.source, where=self.where(i), system=system)

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
        return text if len(text) <= BEGINNING_CHARS else f"{text[: BEGINNING_CHARS - 4]} ..."

    @property
    def sources(self) -> tuple[TokenCounts, ...]:
        return tuple(part.counts for part in self.parts)

    @property
    def counts(self) -> TokenCounts:
        """The sum over all sources."""
        values = [vars(part.counts) for part in self.parts]
        # A source with another weight is another epoch.
        digests = [f"{part.counts.digest}*{part.weight}" for part in self.parts]
        joined: dict[str, Any] = {}
        for name in _SUMMED:
            joined[name] = sum(of[name] for of in values)
        for name in _LONGEST:
            joined[name] = max((of[name] for of in values), default=0)
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
        return tokens


def _hash64(example: Example) -> int:
    digest = hashlib.sha256(np.ascontiguousarray(example.ids).data).digest()
    return int.from_bytes(digest[:8], "big")


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
    # Of equal hashes the first in the sorted order is the earliest example.
    order = np.argsort(among_hashes, kind="stable")
    positions = np.searchsorted(among_hashes, hashes, sorter=order)
    earliest = order[np.minimum(positions, len(among_hashes) - 1)]
    if among is tokens:
        repeats = np.flatnonzero(earliest < np.arange(len(hashes)))
    else:
        repeats = np.flatnonzero(among_hashes[earliest] == hashes)
    if not len(repeats):
        return Repeats()
    first = int(repeats[0])
    return Repeats(len(repeats), tokens.where(first), among.where(int(earliest[first])))


class _RefusedRowsError(Exception):
    """The bad rows of one source, until those of the others are known."""

    def __init__(self, bad: BadRows) -> None:
        super().__init__()
        self.bad = bad


def tokenize(
    sources: Sequence[tuple[Source, Rows]],
    data: Data,
    template: Template,
    tokenizer: Any,
    *,
    cache: Path | None,
    what: str,
    only_cached: bool = False,
    of_tokenizer: str = "",
) -> TokenSet:
    """Tokenize one side, as `tokenize_sides` does."""
    sides = {what: sources}
    token_sets = tokenize_sides(
        sides,
        data,
        template,
        tokenizer,
        cache=cache,
        only_cached=only_cached,
        of_tokenizer=of_tokenizer,
    )
    return token_sets[what]


def tokenize_sides(
    sides: Mapping[str, Sequence[tuple[Source, Rows]]],
    data: Data,
    template: Template,
    tokenizer: Any,
    *,
    cache: Path | None,
    only_cached: bool = False,
    of_tokenizer: str = "",
) -> dict[str, TokenSet]:
    """Tokenize all rows of some sources, or take them from the cache.

    Args:
        sides: `train` or `validation`, for progress -> rows and how to read them; the weights
            become `TokenSet.repeats`.
        data: gives seq_len, train_on, too_long and system.
        cache: folder of the cache, None for none.
        of_tokenizer: its `tokenizer_hash`, where the caller has it: that of a large vocabulary
            takes 0.2 s.

    Raises:
        DataError: some rows cannot be read or rendered; it lists those of all sources.
        LookupError: `only_cached`, and the cache lacks one.
    """
    if cache is not None:
        of_tokenizer = of_tokenizer or tokenizer_hash(tokenizer)
    token_sets = {}
    refused = []
    for what, sources in sides.items():
        parts = []
        for source, rows in sources:
            try:
                parts.append(
                    _tokenize_source(
                        rows,
                        source,
                        data,
                        template,
                        cache=cache,
                        what=what,
                        only_cached=only_cached,
                        of_tokenizer=of_tokenizer,
                    )
                )
            except _RefusedRowsError as error:
                refused.append(error.bad)
        token_sets[what] = TokenSet(parts)
    if refused:
        raise error_of_sources(refused)
    return token_sets


def _tokenize_source(
    rows: Rows,
    source: Source,
    data: Data,
    template: Template,
    *,
    cache: Path | None,
    what: str,
    only_cached: bool,
    of_tokenizer: str,
) -> SourceTokens:
    """The examples of one source."""
    title = f"tokenize {what}: {rows.name}"
    # A plan reads only what the cache has: where nothing is there, this raises.
    make: Callable[[TokenWriter], TokenEntry] = _raise_not_cached
    if not only_cached:
        make = partial(_tokenize_rows, rows, source, data, template, title)
    if cache is None:
        arrays, about = make(TokenWriter(None))
    else:
        # The key holds what changes tokens; other keys of the recipe may change freely.
        key = _cache_key(rows, source, data, template, of_tokenizer)
        arrays, about = cached_tokens(cache, key, make)
    counts = TokenCounts(
        source=source.source,
        **about["counts"],
        available=rows.available,
        taken=_keys_that_select(source, data, what),
    )
    return SourceTokens(
        arrays,
        counts,
        rows,
        weight=source.weight,
        leaks=tuple(about["reached"]),
        empties=tuple(about["empties"]),
        has_answers=data.train_on != "all" and source.format != "text",
        too_long=too_long_of(source, data),
        source=source,
    )


def _keys_that_select(source: Source, data: Data, what: str) -> str:
    """The recipe's keys that take some of a source's rows."""
    # Rows that are held out come from data.train, from which others were left out before.
    is_of_train = what == "train" or data.hold_out is not None
    values = {
        "split": source.split,
        "max_examples": source.max_examples,
        "data.leave_out": (", ".join(data.leave_out) or None) if is_of_train else None,
        "data.hold_out": data.hold_out,
    }
    return ", ".join(f"{key}: {value}" for key, value in values.items() if value is not None)


def _raise_not_cached(writer: TokenWriter) -> TokenEntry:
    raise LookupError("the token cache has no such entry")


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 (hex) of what makes tokens of a text."""
    core = tokenizer.backend_tokenizer.to_str()
    special_tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    special = json.dumps(special_tokens, sort_keys=True)
    return hashlib.sha256((core + special).encode()).hexdigest()


def _cache_key(
    rows: Rows, source: Source, data: Data, template: Template, of_tokenizer: str
) -> str:
    import transformers

    settings = {
        "version": TOKENS_VERSION,
        "transformers": transformers.__version__,
        "rows": rows.digest(),
        "format": [source.format, sorted(source.columns.items()), data.system],
        "template": [template.name, template.jinja, sorted(template.end_ids)],
        "tokenizer": of_tokenizer,
        "limits": [data.seq_len, too_long_of(source, data), data.train_on],
        "bad rows": data.bad_rows,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def too_long_of(source: Source, data: Data) -> TooLong:
    """Choose what becomes of a source's rows that are longer than `data.seq_len`."""
    if data.too_long != "auto":
        return data.too_long
    # An answer without its beginning would be learned from nothing; a document's parts are text.
    return "split" if source.format == "text" else "truncate"


def _tokenize_rows(
    rows: Rows, source: Source, data: Data, template: Template, title: str, writer: TokenWriter
) -> TokenEntry:
    """Tokenize all rows of a source; their arrays, and what a cache holds beside them."""
    counts = {
        "dropped": 0,
        "emptied": 0,
        "cut_tokens": 0,
        "dropped_tokens": 0,
        "prompts": 0,
        "prompts_apart": 0,
        "longest_of_99": 0,
    }
    leaks: list[int] = []
    empties: list[int] = []
    # How many rows each warning fits, and the first of them.
    warnings: dict[str, list[int]] = {}
    unread: dict[str, list[int]] = {}
    control_tokens: dict[str, list[int]] = {}
    bad = BadRows(len(rows))
    lengths = array("q")
    splitter = DocumentSplitter(writer, rows, data.seq_len, template)
    too_long = too_long_of(source, data)
    encode = RowEncoder(template, source, data.system, data.train_on)
    slow = f"{title}: the template is rendered for each of {len(rows):,} rows"
    with logged_if_slow(log, slow), closing(_encode_rows(rows, encode, title)) as encoded_rows:
        for i, where, row in encoded_rows:
            if isinstance(row, DataError):
                bad.add(i, where, row)
                continue
            if row.prompt == "apart":
                counts["prompts_apart"] += 1
            elif row.prompt != "unchecked":
                counts["prompts"] += 1
            if row.prompt == "supervised":
                leaks.append(len(writer))
            if row.has_empty_answer:
                empties.append(len(writer))
            # The first row of each warning is named to the user.
            _count_names(warnings, row.warnings, i)
            _count_names(unread, row.unread, i)
            _count_names(control_tokens, sorted(row.example.control_tokens), i)
            lengths.append(row.example.longest_sequence)
            if too_long == "split":
                splitter.add(row.example, i)
            else:
                _add_example(row.example, i, where, data, too_long, writer, counts)
    # Rows are read again in training: a file that changed meanwhile would give others.
    rows.check_unchanged()
    # All at once: a file is mended in one pass. Where no row is left, the reason is theirs.
    if len(bad) and (data.bad_rows == "error" or len(bad) == len(rows)):
        raise _RefusedRowsError(bad)
    arrays = writer.arrays()
    counts["longest"] = max(lengths, default=0)
    if lengths:
        counts["longest_of_99"] = int(np.quantile(lengths, 0.99, method="higher"))
    about = {
        "rows": len(rows),
        **_count_tokens(arrays),
        **counts,
        "digest": arrays.sha256(),
        "flaws": warnings,
        "unread": unread,
        "control_tokens": control_tokens,
        "bad": len(bad),
        "bad_rows": bad.first,
    }
    return arrays, {"counts": about, "reached": leaks, "empties": empties}


def _count_names(counts: dict[str, list[int]], names: Iterable[str], row: int) -> None:
    """Count a row for each of some names; the first row of a name is kept."""
    for name in names:
        counts.setdefault(name, [0, row])[0] += 1


def _add_example(
    example: Example,
    row: int,
    where: str,
    data: Data,
    too_long: TooLong,
    writer: TokenWriter,
    counts: dict[str, int],
) -> None:
    """Write one example, each of its sequences cut at seq_len, or count why it is left out."""
    length = example.longest_sequence
    if length <= data.seq_len:
        writer.add(example, row)
        return
    if too_long == "error":
        raise DataError(
            f"the row has {length} tokens, and data.seq_len is {data.seq_len}",
            where=where,
            why="data.too_long is error",
            fix=f"data.seq_len={length}, or data.too_long=truncate or drop",
        )
    if too_long == "drop":
        counts["dropped"] += 1
        counts["dropped_tokens"] += len(example.ids)
        return
    truncated = _truncate(example, data.seq_len)
    if truncated is None:
        counts["emptied"] += 1
        counts["dropped_tokens"] += len(example.ids)
        return
    counts["cut_tokens"] += len(example.ids) - len(truncated.ids)
    writer.add(truncated, row, truncated=True)


class DocumentSplitter:
    """Writes documents as examples of at most `seq_len` tokens, so that none is lost.

    An example that goes on with a document begins with the token before it, unsupervised, so each
    token of a document but its first is supervised exactly once. If the tokenizer begins a text
    with a BOS, each example begins with one: some models (Gemma) predict nothing useful without.

    Rows that are blocks of one document (`Rows.continues`) are joined first.
    """

    def __init__(self, writer: TokenWriter, rows: Rows, seq_len: int, template: Template) -> None:
        self._writer = writer
        self._rows = rows
        self._seq_len = seq_len
        self._bos = template.tokenizer.bos_token_id
        self._end_ids = template.end_ids
        # The end of the block before, if that goes on, and its row.
        self._rest: Example | None = None
        self._row = 0

    def add(self, example: Example, row: int) -> None:
        """Write the next row, but for a rest that the row after it continues."""
        ids = example.ids
        trained = example.trained
        has_bos = int(ids[0]) == self._bos and self._bos not in self._end_ids
        is_end = self._rows.ends_document(row)
        if not is_end and int(ids[-1]) in self._end_ids:
            ids = ids[:-1]
            trained = trained[:-1]
        first_row = row
        if self._rest is not None:
            start = 1 if has_bos else 0
            ids = np.concatenate([self._rest.ids, ids[start:]])
            trained = np.concatenate([self._rest.trained, np.ones(len(trained) - start, np.bool_)])
            first_row = self._row
        # A row of two tokens has no room for a BOS beside what is learned.
        prefix = 1 if has_bos and self._seq_len > 2 else 0
        start = 0
        while len(ids) - start > self._seq_len - (prefix if start else 0):
            piece, start = self._piece(ids, trained, start, prefix)
            self._writer.add(piece, first_row, continued=True)
            first_row = row
        rest, _ = self._piece(ids, trained, start, prefix)
        if self._rows.continues(row):
            self._rest = rest
            self._row = first_row
            return
        self._rest = None
        # One token alone is predicted by nothing, and predicts nothing.
        if len(rest.ids) > 1:
            self._writer.add(rest, first_row, continued=not is_end)

    def _piece(
        self, ids: np.ndarray, trained: np.ndarray, start: int, prefix: int
    ) -> tuple[Example, int]:
        """The example that begins with token `start`, and with which token the next one begins."""
        if start == 0:
            stop = self._seq_len
            return Example(ids[:stop], trained[:stop]), stop - 1
        stop = start + self._seq_len - prefix
        piece_ids = np.concatenate([ids[:prefix], ids[start:stop]])
        piece_trained = np.concatenate([trained[:prefix], trained[start:stop]])
        # Its context, and the token that nothing predicts.
        piece_trained[: prefix + 1] = False
        return Example(piece_ids, piece_trained), stop - 1


def _truncate(example: Example, length: int) -> Example | None:
    """The example with each of its sequences cut; None where that leaves one without a target."""
    parts = []
    for part in example.parts():
        shortened = part._replace(ids=part.ids[:length], trained=part.trained[:length])
        # The first token of a sequence is never a target.
        if part.trained.any() and not shortened.trained[1:].any():
            return None
        parts.append(shortened)
    return example._replace(
        ids=np.concatenate([part.ids for part in parts]),
        trained=np.concatenate([part.trained for part in parts]),
        sequences=tuple(len(part.ids) for part in parts) if example.sequences else (),
    )


def _encode_rows(
    rows: Rows, encode: RowEncoder, title: str
) -> Generator[tuple[int, str, EncodedRow | DataError], None, None]:
    """All rows of a source as (row, place, example), hundreds handed to the tokenizer at once."""
    indices: Iterable[int] = range(len(rows))
    if is_terminal(sys.stderr):
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import track

        console = Console(stderr=True)
        # A file's name may hold what is markup.
        shown = escape(visible(title))
        indices = track(indices, description=shown, console=console, transient=True)
    else:
        log.debug("%s", title)
    for batch, examples in encode_batches(encode, _read_batches(rows, indices), rows=len(rows)):
        yield from zip(itertools.count(batch.first), batch.places, examples, strict=False)


def _read_batches(rows: Rows, indices: Iterable[int]) -> Iterator[RowBatch]:
    """All rows, hundreds at once, or fewer where they are long."""
    batch = RowBatch(0, [], [])
    characters = 0
    for i in indices:
        # An error of a row before it is to be raised first.
        try:
            row: dict[str, Any] | TunesmithError = rows[i]
            size = count_characters(row)
        except TunesmithError as error:
            row = error
            size = 0
        is_full = len(batch.rows) == _BATCH_ROWS or characters + size > _BATCH_CHARS
        if batch.rows and is_full:
            yield batch
            batch = RowBatch(i, [], [])
            characters = 0
        batch.rows.append(row)
        batch.places.append(rows.where(i))
        characters += size
    if batch.rows:
        yield batch
