"""Rows -> tokens and loss mask, once: they are kept in the token cache (`cache.py`)."""

import hashlib
import itertools
import json
import logging
import sys
from array import array
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.config.schema import Data, Source
from tunesmith.data.batch import Example
from tunesmith.data.cache import TokenArrays, Tokenised, TokenWriter, cached_tokens
from tunesmith.data.source import Rows
from tunesmith.data.template import Template
from tunesmith.data.workers import EncodedRow, RowBatch, RowEncoder, encode_batches
from tunesmith.errors import DataError, TunesmithError
from tunesmith.host_files import is_terminal

log = logging.getLogger(__name__)

VERSION = 4  # raise it when the same rows would give other tokens, or an entry of the cache has another form
_BATCH = 256  # rows handed to the tokenizer at once


@dataclass(frozen=True)
class TokenCounts:
    """What became of the rows of one source."""

    source: str
    rows: int  # read
    kept: int  # examples made of them
    tokens: int  # of these
    supervised: int  # of the tokens
    cut: int  # examples that lost their end
    dropped: int  # rows left out as too long
    emptied: int  # rows left out because the cut left no supervised token
    longest: int  # tokens of the longest row, uncut
    digest: str  # sha256 (hex) of all that is trained on: tokens, mask and bounds of examples, in order
    prompts: int = 0  # rows whose prompt was rendered apart and found as the beginning of the example
    prompts_apart: int = 0  # rows where it renders otherwise
    flaws: dict[str, list[int]] = field(default_factory=dict)  # name in FLAWS -> how many rows, and the first of them
    longest_of_99: int = 0  # 99 % of the rows, uncut, have no more tokens
    available: int = 0  # rows that the source has
    taken: str = ""  # the recipe's keys that take some of them


@dataclass(frozen=True)
class SourceTokens:
    """The examples of one source. leaks: indices of examples in which a token of the prompt is supervised; has_answers:
    what is supervised are answers that end, and not whole rows (format text, train_on all)."""

    arrays: TokenArrays
    counts: TokenCounts
    rows: Rows
    weight: float = 1.0
    leaks: tuple[int, ...] = ()
    has_answers: bool = True

    def __len__(self) -> int:
        return len(self.arrays.rows)

    def first(self, n: int) -> "SourceTokens":
        """The first n examples (all, where there are fewer)."""
        n = min(len(self), n)
        ids, trained, offsets, rows, cut = self.arrays
        end = int(offsets[n])
        arrays = TokenArrays(ids[:end], trained[:end], offsets[: n + 1], rows[:n], cut[:n])
        digest = hashlib.sha256(f"{self.counts.digest}[:{n}]".encode()).hexdigest()
        taken = f"{self.counts.taken}, the first {n:,}".removeprefix(", ") if n < len(self) else self.counts.taken
        counts = replace(self.counts, **_count_tokens(arrays), digest=digest, taken=taken)
        return replace(self, arrays=arrays, counts=counts, leaks=tuple(i for i in self.leaks if i < n))


def _count_tokens(arrays: TokenArrays) -> dict[str, Any]:
    supervised, cut = int(np.count_nonzero(arrays.trained)), int(arrays.cut.sum())
    return {"kept": len(arrays.rows), "tokens": len(arrays.ids), "supervised": supervised, "cut": cut}


class TokenSet:
    """All examples of a split, source after source.

    lengths: int64 [n], tokens of each example. repeats: float64 [n], how often each is seen in an epoch.
    """

    def __init__(self, parts: Iterable[SourceTokens]) -> None:
        self.parts = tuple(parts)
        self._first = np.cumsum([0, *(len(p) for p in self.parts)])
        empty: list[np.ndarray] = [np.zeros(0, np.int64)]
        self.lengths = np.concatenate([np.diff(p.arrays.offsets) for p in self.parts] or empty)
        self.repeats = np.concatenate([np.full(len(p), p.weight) for p in self.parts] or empty)

    def __len__(self) -> int:
        return int(self._first[-1])

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def _find(self, i: int) -> tuple[SourceTokens, int]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        p = int(np.searchsorted(self._first, i, side="right")) - 1
        return self.parts[p], i - int(self._first[p])

    def __getitem__(self, i: int) -> Example:
        part, at = self._find(i)
        span = slice(int(part.arrays.offsets[at]), int(part.arrays.offsets[at + 1]))
        return Example(part.arrays.ids[span], part.arrays.trained[span])

    @cached_property
    def hashes(self) -> np.ndarray:
        """uint64 [n], of the tokens of each example; two different examples share one in 1 of 2^64 cases."""

        def each() -> Iterator[int]:
            for part in self.parts:
                ids = memoryview(np.ascontiguousarray(part.arrays.ids).data)
                for start, end in itertools.pairwise(map(int, part.arrays.offsets)):
                    yield int.from_bytes(hashlib.sha256(ids[start:end]).digest()[:8], "big")

        return np.fromiter(each(), np.uint64, len(self))

    def where(self, i: int) -> str:
        """The place of the row that example i came from."""
        part, at = self._find(i)
        return part.rows.where(int(part.arrays.rows[at]))

    @property
    def sources(self) -> tuple[TokenCounts, ...]:
        return tuple(part.counts for part in self.parts)

    @property
    def counts(self) -> TokenCounts:
        """The sum over all sources."""
        names = "rows kept tokens supervised cut dropped emptied prompts prompts_apart available".split()
        return TokenCounts(
            source=", ".join(c.source for c in self.sources),
            longest=max((c.longest for c in self.sources), default=0),
            longest_of_99=max((c.longest_of_99 for c in self.sources), default=0),
            digest=hashlib.sha256("".join(f"{p.counts.digest}*{p.weight}" for p in self.parts).encode()).hexdigest(),
            **{name: sum(vars(c)[name] for c in self.sources) for name in names},
        )

    def first(self, n: int) -> "TokenSet":
        """The first n examples."""
        parts = []
        for part in self.parts:
            parts.append(part.first(n))
            n -= len(parts[-1])
        return TokenSet(parts)


@dataclass(frozen=True)
class Repeats:
    """How many examples repeat an earlier one token for token; places of the first of them and of the one it repeats."""

    count: int = 0
    where: str = ""
    earlier: str = ""


def find_repeats(tokens: TokenSet, among: TokenSet | None = None) -> Repeats:
    """Examples of `tokens` that are also in `among`; or None, earlier in `tokens`."""
    there = tokens if among is None else among
    own, other = tokens.hashes, there.hashes
    if not len(own) or not len(other):
        return Repeats()
    order = np.argsort(other, kind="stable")
    # Of equal hashes the first in the sorted order is the earliest example.
    found = order[np.minimum(np.searchsorted(other, own, sorter=order), len(other) - 1)]
    at = np.flatnonzero(found < np.arange(len(own)) if there is tokens else other[found] == own)
    return Repeats(len(at), tokens.where(int(at[0])), there.where(int(found[at[0]]))) if len(at) else Repeats()


def tokenise(
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
    """Tokenise all rows of some sources, or take them from the cache; LookupError where `only_cached` and one is not there.

    Args:
        sources: rows and how to read them; the weights become `TokenSet.repeats`.
        data: gives seq_len, train_on, too_long and system.
        cache: folder of the cache, None for none.
        what: `train` or `validation`, for progress.
        of_tokenizer: its `tokenizer_hash`, where the caller has it: that of a large vocabulary takes 0.2 s.
    """
    parts = []
    if cache is not None:
        of_tokenizer = of_tokenizer or tokenizer_hash(tokenizer)
    for source, rows in sources:
        title = f"tokenise {what}: {rows.name}"
        make = _refuse if only_cached else partial(_tokenise_rows, rows, source, data, template, title)
        if cache is None:
            arrays, about = make(TokenWriter(None))
        else:
            arrays, about = cached_tokens(cache, _cache_key(rows, source, data, template, of_tokenizer), make)
        keys = {"split": source.split, "max_examples": source.max_examples, "data.hold_out": data.hold_out}
        taken = ", ".join(f"{name}: {value}" for name, value in keys.items() if value is not None)
        counts = TokenCounts(source=source.source, **about["counts"], available=rows.available, taken=taken)
        has_answers = data.train_on != "all" and source.format != "text"
        parts.append(SourceTokens(arrays, counts, rows, source.weight, tuple(about["reached"]), has_answers))
    return TokenSet(parts)


def _refuse(writer: TokenWriter) -> Tokenised:
    raise LookupError("the token cache has no such entry")


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 (hex) of what makes tokens of a text."""
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, PreTrainedTokenizerFast):
        core = tokenizer.backend_tokenizer.to_str()
    else:
        core = type(tokenizer).__name__ + json.dumps(sorted(tokenizer.get_vocab().items()))
    special = json.dumps({k: str(v) for k, v in tokenizer.special_tokens_map.items()}, sort_keys=True)
    return hashlib.sha256((core + special).encode()).hexdigest()


def _cache_key(rows: Rows, source: Source, data: Data, template: Template, of_tokenizer: str) -> str:
    import transformers

    made_of = {
        "version": VERSION,
        "transformers": transformers.__version__,
        "rows": rows.digest(),
        "format": [source.format, sorted(source.columns.items()), data.system],
        "template": [template.name, template.jinja, sorted(template.end_ids)],
        "tokenizer": of_tokenizer,
        "limits": [data.seq_len, data.too_long, data.train_on],
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def _tokenise_rows(
    rows: Rows, source: Source, data: Data, template: Template, title: str, writer: TokenWriter
) -> Tokenised:
    """Tokenise all rows of a source; their arrays, and counts and leaks as plain values."""
    counts = dict.fromkeys(("dropped", "emptied", "prompts", "prompts_apart"), 0)
    leaks, flaws, lengths = list[int](), dict[str, list[int]](), array("q")
    encode = RowEncoder(template, source, data.system, data.train_on)
    with closing(_encode_rows(rows, encode, title)) as found:
        for i, where, (whole, own_flaws, prompt) in found:
            if prompt != "unchecked":
                counts["prompts_apart" if prompt == "apart" else "prompts"] += 1
            if prompt == "supervised":
                leaks.append(len(writer))
            for name in own_flaws:
                flaws.setdefault(name, [0, i])[0] += 1
            n = len(whole.ids)
            lengths.append(n)
            if n <= data.seq_len:
                writer.add(whole, i, cut=False)
            elif data.too_long == "error":
                what, why = f"the row has {n} tokens, and data.seq_len is {data.seq_len}", "data.too_long is error"
                raise DataError(what, where=where, why=why, fix=f"data.seq_len={n}, or data.too_long=truncate or drop")
            elif data.too_long == "drop":
                counts["dropped"] += 1
            elif np.any(whole.trained) and not np.any(whole.trained[1 : data.seq_len]):
                counts["emptied"] += 1
            else:
                writer.add(Example(whole.ids[: data.seq_len], whole.trained[: data.seq_len]), i, cut=True)
    rows.check_unchanged()
    arrays = writer.arrays()
    counts["longest"] = max(lengths, default=0)
    counts["longest_of_99"] = int(np.quantile(lengths, 0.99, method="higher")) if lengths else 0
    about = {"rows": len(rows), **_count_tokens(arrays), **counts, "digest": arrays.sha256(), "flaws": flaws}
    return arrays, {"counts": about, "reached": leaks}


def _encode_rows(rows: Rows, encode: RowEncoder, title: str) -> Generator[tuple[int, str, EncodedRow], None, None]:
    """All rows of a source as (row, place, example), hundreds handed to the tokenizer at once."""
    starts: Iterable[int] = range(0, len(rows), _BATCH)
    if is_terminal(sys.stderr):
        from rich.console import Console
        from rich.progress import track

        starts = track(starts, description=title, console=Console(stderr=True), transient=True)
    else:
        log.info("%s", title)
    spans = (range(start, min(start + _BATCH, len(rows))) for start in starts)
    batches = (RowBatch(span.start, [_read(rows, i) for i in span], [*map(rows.where, span)]) for span in spans)
    for batch, examples in encode_batches(encode, batches, rows=len(rows)):
        yield from zip(itertools.count(batch.first), batch.places, examples, strict=False)


def _read(rows: Rows, i: int) -> dict[str, Any] | TunesmithError:
    """Row i, or why it cannot be read: an error of a row before it is to be raised first."""
    try:
        return rows[i]
    except TunesmithError as error:
        return error
