"""Rows -> tokens and loss mask, once: what is made is kept in the cache of `cache.py`, and taken from there."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from tunesmith.config.schema import Data, Source
from tunesmith.data import cache as disk
from tunesmith.data.batch import Example
from tunesmith.data.cache import Arrays, Store
from tunesmith.data.formats import Conversation, Sample, Text, convert_row
from tunesmith.data.source import Rows, read_rows
from tunesmith.errors import DataError

log = logging.getLogger(__name__)

VERSION = 1  # raise it when the same rows would give other tokens
_BATCH = 256  # rows handed to the tokenizer at once
_PROMPTS_ALL, _PROMPTS_EVERY = 256, 32  # rows whose prompt is rendered apart and compared: the first, then every n-th


class Template(Protocol):
    """What is needed of a template here; `data/chat.py` makes them."""

    @property
    def name(self) -> str: ...
    @property
    def jinja(self) -> str | None: ...
    @property
    def end_ids(self) -> frozenset[int]: ...
    def describe(self) -> str: ...
    def encode_many(
        self, samples: Sequence[Sample], train_on: Literal["response", "last", "all"], *, where: Sequence[str]
    ) -> list[Example]: ...
    def prompt(self, sample: Sample) -> list[int]: ...


@dataclass(frozen=True)
class Counts:
    """What became of the rows of one source.

    rows: read; kept: examples made of them; tokens, supervised: of the examples kept.
    cut: kept with their end cut off; dropped: left out as too long; emptied: left out because the cut left nothing to
    learn. longest: tokens of the longest row before it was cut. digest: sha256 (hex) of all that is learnt from: tokens,
    mask and edges, in order.
    prompts: rows whose prompt was rendered apart and found as the untrained beginning of the example;
    prompts_apart: rows where it is rendered differently apart, so that this says nothing.
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


@dataclass(frozen=True)
class Part:
    """The examples of one source. places: its rows. reached: examples whose mask was seen to reach their prompt."""

    arrays: Arrays
    counts: Counts
    places: Rows
    weight: float = 1.0
    reached: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.arrays.rows)

    def first(self, n: int) -> Part:
        """The first n examples (all, where there are fewer)."""
        take = min(len(self), n)
        end = int(self.arrays.offsets[take])
        a = self.arrays
        kept = Arrays(a.ids[:end], a.trained[:end], a.offsets[: take + 1], a.rows[:take], a.cut[:take])
        counts = replace(
            self.counts,
            kept=take,
            tokens=end,
            supervised=int(np.count_nonzero(kept.trained)),
            cut=int(kept.cut.sum()),
            digest=hashlib.sha256(f"{self.counts.digest}[:{take}]".encode()).hexdigest(),
        )
        return Part(kept, counts, self.places, self.weight, tuple(i for i in self.reached if i < take))


class TokenSet:
    """All examples of a split, source after source.

    lengths: int64 [n], tokens of each example. repeats: float64 [n], how often each is seen in an epoch.
    """

    def __init__(self, parts: Iterable[Part], *, train_on: str) -> None:
        self.parts = tuple(parts)
        self.train_on = train_on
        self._first = np.cumsum([0, *(len(p) for p in self.parts)])
        empty: list[np.ndarray] = [np.zeros(0, np.int64)]
        self.lengths = np.concatenate([np.diff(p.arrays.offsets) for p in self.parts] or empty)
        self.repeats = np.concatenate([np.full(len(p), p.weight) for p in self.parts] or empty)

    def __len__(self) -> int:
        return int(self._first[-1])

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def _find(self, i: int) -> tuple[Part, int]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        p = int(np.searchsorted(self._first, i, side="right")) - 1
        return self.parts[p], i - int(self._first[p])

    def __getitem__(self, i: int) -> Example:
        part, at = self._find(i)
        arrays = part.arrays
        span = slice(int(arrays.offsets[at]), int(arrays.offsets[at + 1]))
        return Example(arrays.ids[span], arrays.trained[span])

    def where(self, i: int) -> str:
        """The place of the row that example i came from."""
        part, at = self._find(i)
        return part.places.where(int(part.arrays.rows[at]))

    def row(self, i: int) -> dict[str, Any]:
        """The row that example i came from, as the file has it."""
        part, at = self._find(i)
        return part.places[int(part.arrays.rows[at])]

    @property
    def sources(self) -> tuple[Counts, ...]:
        return tuple(part.counts for part in self.parts)

    @property
    def counts(self) -> Counts:
        """The sum over all sources."""
        every = self.sources
        digest = hashlib.sha256("".join(f"{p.counts.digest}*{p.weight}" for p in self.parts).encode()).hexdigest()
        names = ("rows", "kept", "tokens", "supervised", "cut", "dropped", "emptied", "prompts", "prompts_apart")
        sums = {name: sum(int(asdict(c)[name]) for c in every) for name in names}
        longest = max((c.longest for c in every), default=0)
        return Counts(source=", ".join(c.source for c in every), longest=longest, digest=digest, **sums)

    def first(self, n: int) -> TokenSet:
        """The first n examples."""
        parts = []
        for part in self.parts:
            parts.append(part.first(n))
            n -= len(parts[-1])
        return TokenSet(parts, train_on=self.train_on)


def tokenise(
    sources: tuple[Source, ...], data: Data, template: Template, tokenizer: Any, *, cache: Path | None, what: str
) -> TokenSet:
    """Tokenise all rows of some sources, or take them from the cache.

    Args:
        sources: where the rows are; their weights become `TokenSet.repeats`.
        data: gives seq_len, train_on, too_long and system.
        cache: folder of the cache (see `cache_folder`), None for none. One that cannot be written costs a warning.
        what: `train` or `validation`, for progress and errors.

    Raises:
        DataError: a source or row that is broken, a row too long with `too_long: error`.
    """
    tokenizer_hash = _tokenizer_hash(tokenizer)
    parts = []
    for source in sources:
        rows = read_rows(source)
        key = _key(rows, source, data, template, tokenizer_hash)
        job = _Job(key, rows, source, data, template, what)
        parts.append(_made(job, cache))
    return TokenSet(parts, train_on=data.train_on)


def _tokenizer_hash(tokenizer: Any) -> str:
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, PreTrainedTokenizerFast):
        core = tokenizer.backend_tokenizer.to_str()
    else:
        core = type(tokenizer).__name__ + json.dumps(sorted(tokenizer.get_vocab().items()))
    special = json.dumps({k: str(v) for k, v in tokenizer.special_tokens_map.items()}, sort_keys=True)
    return hashlib.sha256((core + special).encode()).hexdigest()


def _key(rows: Rows, source: Source, data: Data, template: Template, tokenizer_hash: str) -> str:
    import transformers

    made_of = {
        "version": VERSION,
        "transformers": transformers.__version__,
        "rows": rows.digest(),
        "format": [source.format, sorted(source.columns.items()), data.system],
        "template": [template.name, template.jinja, sorted(template.end_ids)],
        "tokenizer": tokenizer_hash,
        "limits": [data.seq_len, data.too_long, data.train_on],
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Job:
    """One source to be tokenised."""

    key: str
    rows: Rows
    source: Source
    data: Data
    template: Template
    what: str


# --- making ---------------------------------------------------------------------------------------------------------


def _made(job: _Job, folder: Path | None) -> Part:
    """The examples of one source: from the cache, or made and put there, or made and kept in memory."""
    if folder is None:
        arrays, about = _fill(Store(None), job)
    else:
        place = folder / job.key
        found = disk.load(place, job.key)
        if found is None:
            disk.save(place, job.key, lambda into: _fill(into, job))
            found = disk.load(place, job.key) or _fill(Store(None), job)
        arrays, about = found
    counts = Counts(source=job.source.source, **about["counts"])
    return Part(arrays, counts, job.rows, job.source.weight, tuple(about["reached"]))


def _fill(into: Store, job: _Job) -> tuple[Arrays, dict[str, Any]]:
    """Tokenise all rows; what they came to as plain values."""
    data = job.data
    dropped = emptied = longest = checked = apart = 0
    reached: list[int] = []
    for i, sample, whole, where in _encoded(job):
        if data.train_on != "all" and (i < _PROMPTS_ALL or i % _PROMPTS_EVERY == 0):
            clean = prompt_is_clean(job.template, sample, whole)
            checked, apart = checked + (clean is not None), apart + (clean is None)
            if clean is False:
                reached.append(len(into))
        n = len(whole.ids)
        longest = max(longest, n)
        kept = _shorten(whole, data, where) if n > data.seq_len else whole
        if kept is None:
            dropped += 1
        elif n > data.seq_len and np.any(whole.trained) and not np.any(kept.trained[1:]):
            emptied += 1
        else:
            into.add(kept, i, n > data.seq_len)
    arrays = into.arrays()
    counts = {
        "rows": len(job.rows),
        "kept": len(into),
        "tokens": len(arrays.ids),
        "supervised": int(np.count_nonzero(arrays.trained)),
        "cut": int(arrays.cut.sum()),
        "dropped": dropped,
        "emptied": emptied,
        "longest": longest,
        "digest": arrays.sha256(),
        "prompts": checked,
        "prompts_apart": apart,
    }
    return arrays, {"counts": counts, "reached": reached}


def _shorten(example: Example, data: Data, where: str) -> Example | None:
    """A longer example as `too_long` says: its first seq_len tokens, None to leave it out, or an error."""
    if data.too_long == "error":
        n = len(example.ids)
        raise DataError(
            f"the row has {n} tokens, and data.seq_len is {data.seq_len}",
            where=where,
            why="data.too_long is error",
            fix=f"data.seq_len={n}, or data.too_long=truncate or drop",
        )
    if data.too_long == "drop":
        return None
    return Example(example.ids[: data.seq_len], example.trained[: data.seq_len])


def prompt_is_clean(template: Template, sample: Sample, example: Example) -> bool | None:
    """Whether no token before the first answer is learnt; None where the prompt, rendered apart, is not the
    beginning of the example (some templates write a turn differently once others follow)."""
    if isinstance(sample, Text):
        return None
    if isinstance(sample, Conversation):
        turn = next(n for n, m in enumerate(sample.messages) if m["role"] == "assistant")
        sample = Conversation(sample.messages[: turn + 1], sample.tools, 0, sample.instruction)
    try:
        head = template.prompt(sample)
    except DataError:  # a template that wants more turns than this beginning has
        return None
    if not head or head != np.asarray(example.ids[: len(head)]).tolist():
        return None
    return not bool(np.any(example.trained[: len(head)]))


def _encoded(job: _Job) -> Iterator[tuple[int, Sample, Example, str]]:
    """All rows of a source as (row, sample, example, place), some hundreds handed to the tokenizer at once."""
    rows = job.rows
    for start in _progress(range(0, len(rows), _BATCH), f"tokenise {job.what}: {rows.name}"):
        span = range(start, min(start + _BATCH, len(rows)))
        places = [rows.where(i) for i in span]
        samples = [
            convert_row(rows[i], job.source, where=place, system=job.data.system)
            for i, place in zip(span, places, strict=True)
        ]
        examples = job.template.encode_many(samples, job.data.train_on, where=places)
        yield from zip(span, samples, examples, places, strict=True)


def _progress(items: range, text: str) -> Iterable[int]:
    """A bar on a terminal; a line in a log."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if console.is_terminal:
        return track(items, description=text, console=console, transient=True)
    log.info("%s", text)
    return items
