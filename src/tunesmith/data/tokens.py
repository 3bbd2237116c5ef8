"""Rows -> tokens and loss mask, once: kept in a cache that is named by the hash of all that went into it.

One folder per source: `ids.bin` (int32) and `trained.bin` (bool) hold the tokens of all examples after one another,
`offsets.npy` (int64) cuts them, `rows.npy` (int64) and `cut.npy` (bool) say for each example which row it came from
and whether its end was cut off; `meta.json` has counts and checksums. The folder is written beside its place and
renamed, so it is there as a whole or not at all; whatever does not fit its checksums is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tunesmith.config.schema import Data, Source
from tunesmith.data.batch import Example
from tunesmith.data.format import Completion, Conversation, Sample, convert
from tunesmith.data.source import Rows, read
from tunesmith.errors import DataError

log = logging.getLogger(__name__)

VERSION = 1  # raise it when the same rows would give other tokens
_FLUSH = 1 << 20  # tokens held before they are written
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
    def encode(self, sample: Sample, train_on: str, *, where: str) -> Example: ...
    def prompt(self, sample: Sample) -> list[int]: ...


@dataclass(frozen=True)
class Counts:
    """What became of the rows of one source.

    rows: read; kept: examples made of them; tokens, supervised: of the examples kept.
    cut: kept with their end cut off; dropped: left out as too long; emptied: left out because the cut left nothing to
    learn. longest: tokens of the longest row before it was cut. digest: sha256 of rows, template, tokenizer and keys.
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
    """The examples of one source. ids: int32 [tokens]; trained: bool [tokens]; offsets: int64 [n + 1];
    rows: int64 [n], counted from 0; cut: bool [n]."""

    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    cut: np.ndarray
    counts: Counts
    places: Rows
    weight: float = 1.0
    reached: tuple[int, ...] = ()  # examples whose mask was seen to reach their prompt

    def __len__(self) -> int:
        return len(self.rows)


class TokenSet:
    """All examples of a split, source after source.

    lengths: int64 [n], tokens of each example. repeats: float64 [n], how often each is seen in an epoch.
    """

    def __init__(self, parts: Iterable[Part], *, train_on: str) -> None:
        self.parts = tuple(parts)
        self.train_on = train_on
        self._first = np.cumsum([0, *(len(p) for p in self.parts)])
        empty: list[np.ndarray] = [np.zeros(0, np.int64)]
        self.lengths = np.concatenate([np.diff(p.offsets) for p in self.parts] or empty)
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
        span = slice(int(part.offsets[at]), int(part.offsets[at + 1]))
        return Example(part.ids[span], part.trained[span])

    def where(self, i: int) -> str:
        """The place of the row that example i came from."""
        part, at = self._find(i)
        return part.places.where(int(part.rows[at]))

    def row(self, i: int) -> dict[str, Any]:
        """The row that example i came from, as the file has it."""
        part, at = self._find(i)
        return part.places[int(part.rows[at])]

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
            take = min(len(part), max(0, n))
            n -= take
            end = int(part.offsets[take])
            counts = replace(
                part.counts,
                kept=take,
                tokens=end,
                supervised=int(np.count_nonzero(part.trained[:end])),
                cut=int(part.cut[:take].sum()),
                digest=hashlib.sha256(f"{part.counts.digest}[:{take}]".encode()).hexdigest(),
            )
            parts.append(
                replace(
                    part,
                    offsets=part.offsets[: take + 1],
                    rows=part.rows[:take],
                    cut=part.cut[:take],
                    ids=part.ids[:end],
                    trained=part.trained[:end],
                    counts=counts,
                    reached=tuple(i for i in part.reached if i < take),
                )
            )
        return TokenSet(parts, train_on=self.train_on)


def cache_folder() -> Path:
    """`$TUNESMITH_CACHE/tokens`, else `$XDG_CACHE_HOME/tunesmith/tokens`, else `~/.cache/tunesmith/tokens`."""
    own, xdg = os.environ.get("TUNESMITH_CACHE"), os.environ.get("XDG_CACHE_HOME")
    base = Path(own) if own else Path(xdg or Path.home() / ".cache") / "tunesmith"
    return base.expanduser() / "tokens"


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
        rows = read(source)
        key = _key(rows, source, data, template, tokenizer_hash)
        job = _Job(key, rows, source, data, template, what)
        place = cache / key if cache is not None else None
        part = _load(place, job) if place is not None else None
        parts.append(replace(part or _make(place, job), weight=source.weight))
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


def _make(place: Path | None, job: _Job) -> Part:
    """Tokenise into the cache; where that cannot be written, into memory."""
    if place is not None:
        folder = None
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f".{job.key[:16]}-", dir=place.parent))
            _write(folder, job)
            if place.exists():  # torn or foreign, else it would have been loaded
                shutil.rmtree(place, ignore_errors=True)
            folder.rename(place)
        except OSError as error:
            why = error.strerror or str(error)
            log.warning("tokens are kept in memory: the cache %s cannot be written (%s)", place.parent, why)
        finally:
            if folder is not None and folder.exists():
                shutil.rmtree(folder, ignore_errors=True)
        part = _load(place, job)
        if part is not None:
            return part
    return _fill(_Store(None), job)


class _Store:
    """Examples as they come: into two files of a folder, or into memory."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._ids: list[np.ndarray] = []
        self._trained: list[np.ndarray] = []
        self._held = 0
        self.offsets: list[int] = [0]
        self.rows: list[int] = []
        self.cut: list[bool] = []

    def add(self, example: Example, row: int, cut: bool) -> None:
        self._ids.append(np.asarray(example.ids, np.int32))
        self._trained.append(np.asarray(example.trained, np.bool_))
        self._held += len(example.ids)
        self.offsets.append(self.offsets[-1] + len(example.ids))
        self.rows.append(row)
        self.cut.append(cut)
        if self._folder is not None and self._held >= _FLUSH:
            self._flush(self._folder)

    def _flush(self, folder: Path) -> None:
        for name, held in (("ids.bin", self._ids), ("trained.bin", self._trained)):
            with (folder / name).open("ab") as file:
                for array in held:
                    file.write(array.tobytes())
            held.clear()
        self._held = 0

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        if self._folder is not None:
            self._flush(self._folder)
            return _mapped(self._folder / "ids.bin", np.int32), _mapped(self._folder / "trained.bin", np.bool_)
        ids = np.concatenate([np.zeros(0, np.int32), *self._ids])
        return ids, np.concatenate([np.zeros(0, np.bool_), *self._trained])


def _fill(store: _Store, job: _Job) -> Part:
    rows, source, data, template = job.rows, job.source, job.data, job.template
    dropped = emptied = longest = checked = apart = 0
    reached: list[int] = []
    for i in _progress(range(len(rows)), f"tokenise {job.what}: {rows.name}"):
        where = rows.where(i)
        sample = convert(rows[i], source, where=where, system=data.system)
        example = template.encode(sample, data.train_on, where=where)
        if isinstance(sample, Conversation) and sample.given:
            example = _without_given(example, sample, template, where)
        if data.train_on != "all" and (i < _PROMPTS_ALL or i % _PROMPTS_EVERY == 0):
            clean = prompt_is_clean(template, sample, example)
            checked, apart = checked + (clean is not None), apart + (clean is None)
            if clean is False:
                reached.append(len(store.rows))
        n = len(example.ids)
        longest = max(longest, n)
        cut = n > data.seq_len
        if cut:
            learns = bool(np.any(example.trained))
            kept = _shorten(example, data, where)
            if kept is None:
                dropped += 1
                continue
            if learns and not np.any(kept.trained[1:]):
                emptied += 1
                continue
            example = kept
        store.add(example, i, cut)
    ids, trained = store.arrays()
    counts = Counts(
        source=source.source, rows=len(rows), kept=len(store.rows), tokens=len(ids),
        supervised=int(np.count_nonzero(trained)), cut=int(sum(store.cut)), dropped=dropped, emptied=emptied,
        longest=longest, digest=job.key, prompts=checked, prompts_apart=apart,
    )  # fmt: skip
    return Part(
        ids=ids,
        trained=trained,
        offsets=np.asarray(store.offsets, np.int64),
        rows=np.asarray(store.rows, np.int64),
        cut=np.asarray(store.cut, np.bool_),
        counts=counts,
        places=rows,
        reached=tuple(reached),
    )


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


def _without_given(example: Example, sample: Conversation, template: Template, where: str) -> Example:
    """Take the loss off the messages of a given prompt: earlier answers in it are no targets."""
    head = template.prompt(Conversation(sample.messages[: sample.given + 1], sample.tools))
    if head != np.asarray(example.ids[: len(head)]).tolist():
        raise DataError(
            "the prompt's end cannot be found in the row's tokens",
            where=where,
            why=f"template {template.name} renders the prompt differently when the completion follows",
            fix="write prompt and completion as texts, or the row as `messages` with data.train_on=last",
        )
    trained = np.array(example.trained, np.bool_)
    trained[: len(head)] = False
    return Example(example.ids, trained)


def prompt_is_clean(template: Template, sample: Sample, example: Example) -> bool | None:
    """Whether no token before the first answer is learnt; None where the prompt, rendered apart, is not the
    beginning of the example (some templates write a turn differently once others follow)."""
    if isinstance(sample, Conversation):
        turn = next(n for n, m in enumerate(sample.messages) if m["role"] == "assistant")
        head = template.prompt(Conversation(sample.messages[: turn + 1], sample.tools, 0, sample.instruction))
    elif isinstance(sample, Completion):
        head = template.prompt(sample)
    else:
        return None
    if not head or head != np.asarray(example.ids[: len(head)]).tolist():
        return None
    return not bool(np.any(example.trained[: len(head)]))


def _progress(items: range, text: str) -> Iterable[int]:
    """A bar on a terminal; a line in a log."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if console.is_terminal:
        return track(items, description=text, console=console, transient=True)
    log.info("%s: %d rows", text, len(items))
    return items


# --- the cache ------------------------------------------------------------------------------------------------------


def _mapped(path: Path, dtype: type) -> np.ndarray:
    """A file as an array; numpy cannot map an empty one."""
    if not path.exists() or path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def _crc(*arrays: np.ndarray) -> int:
    value = 0
    for array in (a for a in arrays if a.size):
        value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return value


def _write(folder: Path, job: _Job) -> None:
    part = _fill(_Store(folder), job)
    for name, array in (("offsets", part.offsets), ("rows", part.rows), ("cut", part.cut)):
        np.save(folder / f"{name}.npy", array)
    meta = {
        "key": job.key,
        "counts": asdict(part.counts),
        "reached": part.reached,
        "crc32": _crc(part.ids, part.trained, part.offsets, part.rows, part.cut),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _load(place: Path, job: _Job) -> Part | None:
    """A whole cache entry, or None: one that is torn, changed or of another kind counts as none."""
    if not (place / "meta.json").is_file():
        return None
    try:
        meta = json.loads((place / "meta.json").read_text(encoding="utf-8"))
        offsets, taken, cut = (np.load(place / f"{n}.npy", allow_pickle=False) for n in ("offsets", "rows", "cut"))
        part = Part(
            ids=_mapped(place / "ids.bin", np.int32),
            trained=_mapped(place / "trained.bin", np.bool_),
            offsets=offsets,
            rows=taken,
            cut=cut,
            counts=replace(Counts(**meta["counts"]), source=job.source.source),
            places=job.rows,
            reached=tuple(meta["reached"]),
        )
        whole = meta["key"] == job.key and meta["crc32"] == _crc(part.ids, part.trained, offsets, taken, cut)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the token cache %s is damaged and is made again (%s)", place, error)
        return None
    if not whole:
        log.warning("the token cache %s is damaged and is made again (its checksum differs)", place)
        return None
    return part
