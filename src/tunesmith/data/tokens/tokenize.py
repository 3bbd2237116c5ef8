"""Rows -> tokens and loss mask, once: they are stored in the token cache (`cache.py`)."""

import hashlib
import itertools
import json
import logging
import sys
from array import array
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import numpy as np

from tunesmith.config.schema import Data, Source
from tunesmith.data.rows.bad_rows import LISTED, BadRows, error_of_sources
from tunesmith.data.rows.formats import convert_sample
from tunesmith.data.rows.labels import check_grades
from tunesmith.data.rows.samples import pictures_of
from tunesmith.data.source.open_source import Rows, count_characters
from tunesmith.data.source.table import Row
from tunesmith.data.text.example import Example
from tunesmith.data.text.template import Template
from tunesmith.data.tokens.cache import TokenEntry, TokenWriter, cached_tokens
from tunesmith.data.tokens.documents import (
    DocumentSplitter,
    cuts_pictures,
    truncated_example,
)
from tunesmith.data.tokens.encode import EncodedRow, RowBatch, RowEncoder
from tunesmith.data.tokens.token_set import (
    SourceTokens,
    TokenCounts,
    TokenSet,
    TooLong,
    count_tokens,
)
from tunesmith.data.tokens.workers import encode_batches
from tunesmith.errors import DataError, TunesmithError
from tunesmith.host.logger import logged_if_slow
from tunesmith.host.streams import is_terminal, visible
from tunesmith.units import count_of

log = logging.getLogger(__name__)

# Raise it when the same rows would give other tokens, or an entry of the cache has another form.
TOKENS_VERSION = 20
# Rows handed to the tokenizer at once, and the characters after which no further row joins them:
# tokenizing takes some 50 bytes of memory a character.
_BATCH_ROWS = 256
_BATCH_CHARACTERS = 4 << 20


class _RefusedRowsError(Exception):
    """The bad rows of one source, until those of the others are known."""

    def __init__(self, bad: BadRows) -> None:
        super().__init__()
        self.bad = bad


def tokenize(
    sources: Sequence[tuple[Source, Rows]],
    data: Data,
    template: Template,
    *,
    cache: Path | None,
    what: str,
    only_cached: bool = False,
) -> TokenSet:
    """Tokenize one side, `what`, as `tokenize_sides` does."""
    sides = {what: sources}
    return tokenize_sides(sides, data, template, cache=cache, only_cached=only_cached)[what]


def tokenize_sides(
    sides: Mapping[str, Sequence[tuple[Source, Rows]]],
    data: Data,
    template: Template,
    *,
    cache: Path | None,
    only_cached: bool = False,
) -> dict[str, TokenSet]:
    """Tokenize all rows of some sources, or take them from the cache.

    Args:
        sides: `train` or `validation`, for progress -> rows and how to read them; the weights
            become `TokenSet.repeats`.
        data: gives seq_len, train_on, too_long and system.
        cache: folder of the cache, None for none.

    Raises:
        DataError: some rows cannot be read or rendered; it lists those of all sources.
        LookupError: `only_cached`, and the cache lacks one.
    """
    token_sets = {}
    refused = []
    if not data.allow_secrets:
        _check_no_secrets([rows for sources in sides.values() for _, rows in sources])
    for what, sources in sides.items():
        parts = []
        for source, rows in sources:
            title = f"tokenize {what}: {rows.name}"
            make = partial(_tokenize_rows, rows, source, data, template, title)
            try:
                if cache is None:
                    arrays, about = make(TokenWriter(None))
                else:
                    # The key holds what changes tokens; other keys of the recipe may change freely.
                    key = _cache_key(rows, source, data, template)
                    arrays, about = cached_tokens(cache, key, None if only_cached else make)
            except _RefusedRowsError as error:
                refused.append(error.bad)
                continue
            counts = TokenCounts(
                source=source.source,
                **about["counts"],
                available=rows.available,
                taken=_keys_that_select(source, data, what),
            )
            tokens = SourceTokens(
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
            parts.append(tokens)
        token_sets[what] = TokenSet(parts)
        if template.pictures is not None:
            token_sets[what].picture_id = template.pictures.token_id
    if refused:
        raise error_of_sources(refused)
    return token_sets


def _check_no_secrets(sources: Sequence[Rows]) -> None:
    """Raise DataError if rows of sessions have secrets; it names their places, and no secret."""
    places = [place for rows in sources for found in rows.secrets.values() for place in found]
    if places:
        raise DataError(
            f"sessions of agents have {count_of(len(places), 'secret')}",
            where="; ".join(places[:LISTED]),
            why="the model learns to write them",
            fix="replace them in the files and revoke them, or data.allow_secrets=true",
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


def _cache_key(rows: Rows, source: Source, data: Data, template: Template) -> str:
    import transformers

    settings = {
        "version": TOKENS_VERSION,
        "transformers": transformers.__version__,
        "rows": rows.digest(),
        "format": [source.format, sorted(source.columns.items()), data.system],
        "template": [template.name, template.jinja, sorted(template.end_ids)],
        "tokenizer": template.tokenizer_hash,
        "limits": [data.seq_len, too_long_of(source, data), data.train_on],
        "bad rows": data.bad_rows,
    }
    if template.pictures is not None:
        settings["pictures"] = [template.pictures.digest, _stamp_pictures(rows, source)]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _stamp_pictures(rows: Rows, source: Source) -> str:
    """Hash which files the pictures of some rows are, and when they were written.

    The same rows in another folder have other pictures, and a file may become another picture.
    """
    stamps = hashlib.sha256()
    slow = f"{rows.name}: pictures of {count_of(len(rows), 'row')} are looked up"
    with logged_if_slow(log, slow):
        for i in range(len(rows)):
            # What is broken is said where the rows are tokenized.
            with suppress(DataError):
                for picture in pictures_of(convert_sample(rows[i], source, where=rows.where(i))):
                    if picture.path is None:
                        continue  # the row itself holds it
                    stamps.update(f"{i} {picture.path}".encode(errors="backslashreplace"))
                    with suppress(OSError, ValueError):
                        about = picture.path.stat()
                        # One that comes with an older time, as from an archive, has a new status.
                        times = f"{about.st_mtime_ns} {about.st_ctime_ns}"
                        stamps.update(f" {about.st_size} {times}".encode())
    return stamps.hexdigest()


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
    counts = Counter[str]()
    leaks: list[int] = []
    empties: list[int] = []
    # By a field of TokenCounts: how many rows each name fits, and the first of them.
    named: dict[str, dict[str, list[int]]] = {
        "flaws": {},
        "unread": {},
        "grades": {},
        "control_tokens": {},
    }
    bad = BadRows(len(rows))
    lengths = array("q")
    splitter = DocumentSplitter(writer, rows, data.seq_len, template)
    too_long = too_long_of(source, data)
    encode = RowEncoder(template, source, data.system, data.train_on)
    slow = f"{title}: the template is rendered for {count_of(len(rows), 'row')}"
    with logged_if_slow(log, slow), closing(_encode_rows(rows, encode, title)) as encoded_rows:
        for i, where, row in encoded_rows:
            if isinstance(row, DataError):
                bad.add(i, where, row)
                continue
            if row.prompt != "unchecked":
                counts["prompts_apart" if row.prompt == "apart" else "prompts"] += 1
            if row.prompt == "supervised":
                leaks.append(len(writer))
            if row.has_empty_answer:
                empties.append(len(writer))
            control_tokens = sorted(row.example.control_tokens)
            names_of_row = (row.warnings, row.unread, row.grades, control_tokens)
            for rows_of, names in zip(named.values(), names_of_row, strict=True):
                for name in names:
                    rows_of.setdefault(name, [0, i])[0] += 1
            lengths.append(row.example.longest_sequence)
            if template.pictures is not None:
                counts["pictures"] += len(row.example.digests)
                counts["scaled_pictures"] += row.example.scaled
                is_placeholder = row.example.ids == template.pictures.token_id
                counts["placeholders"] += int(np.count_nonzero(is_placeholder))
            if too_long == "split":
                splitter.add(row.example, i)
            else:
                _add_example(row.example, i, where, data, too_long, writer, counts, template)
    # Rows are read again in training: a file that changed meanwhile would give others.
    rows.check_unchanged()
    # All at once: a file is mended in one pass. Where no row is left, the reason is theirs.
    if len(bad) and (data.bad_rows == "error" or len(bad) == len(rows)):
        raise _RefusedRowsError(bad)
    check_grades(named["grades"], rows, source)
    arrays = writer.arrays()
    if lengths:
        counts["longest"] = max(lengths)
        counts["longest_of_99"] = int(np.quantile(lengths, 0.99, method="higher"))
    about = {
        "rows": len(rows),
        **count_tokens(arrays),
        **counts,
        "digest": arrays.sha256(),
        **named,
        "bad": len(bad),
        "bad_rows": [(row, what) for _, row, what in bad.listed],
    }
    return arrays, {"counts": about, "reached": leaks, "empties": empties}


def _add_example(
    example: Example,
    row: int,
    where: str,
    data: Data,
    too_long: TooLong,
    writer: TokenWriter,
    counts: Counter[str],
    template: Template,
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
    pictures = template.pictures
    is_cut = pictures is not None and cuts_pictures(example, data.seq_len, pictures.ids)
    is_dropped = too_long == "drop" or is_cut
    truncated = None if is_dropped else truncated_example(example, data.seq_len)
    if truncated is None:
        counts["dropped" if is_dropped else "emptied"] += 1
        counts["dropped_tokens"] += len(example.ids)
        return
    counts["cut_tokens"] += len(example.ids) - len(truncated.ids)
    writer.add(truncated, row, truncated=True)


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
            row: Row | TunesmithError = rows[i]
            size = count_characters(row)
        except TunesmithError as error:
            row = error
            size = 0
        is_full = len(batch.rows) == _BATCH_ROWS or characters + size > _BATCH_CHARACTERS
        if batch.rows and is_full:
            yield batch
            batch = RowBatch(i, [], [])
            characters = 0
        batch.rows.append(row)
        batch.places.append(rows.where(i))
        characters += size
    if batch.rows:
        yield batch
