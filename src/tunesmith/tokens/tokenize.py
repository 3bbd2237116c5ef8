"""Tokenization of rows. Tokens and loss masks are computed once and stored in the token cache."""

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
from tunesmith.errors import DataError, TunesmithError
from tunesmith.host.logger import logged_if_slow
from tunesmith.host.streams import is_terminal, visible
from tunesmith.rows.bad_rows import LISTED, BadRows, error_of_sources
from tunesmith.rows.formats import convert_sample
from tunesmith.rows.samples import pictures_of
from tunesmith.rows.source.open_source import Rows, count_characters
from tunesmith.rows.source.table import Row
from tunesmith.tokens.cache import TokenEntry, TokenWriter, cached_tokens
from tunesmith.tokens.documents import DocumentSplitter, truncated_example
from tunesmith.tokens.encode import EncodedRow, RowBatch, RowEncoder
from tunesmith.tokens.text.example import Example
from tunesmith.tokens.text.template import Template
from tunesmith.tokens.token_set import (
    RowsByName,
    SourceTokens,
    TokenCounts,
    TokenSet,
    TooLong,
    count_tokens,
)
from tunesmith.tokens.workers import encode_batches
from tunesmith.units import count_of

log = logging.getLogger(__name__)

# Version of the cache format. Increase it if a change of the code gives other tokens for the same
# rows, or if the format of the files changes.
TOKENS_VERSION = 22
# Maximum number of rows and of characters in a tokenizer call. The limits save memory, because the
# call uses about 50 bytes per character.
_BATCH_ROWS = 256
_BATCH_CHARACTERS = 4 << 20


class _RefusedRowsError(Exception):
    """Exception that contains the rows of one source that cannot be read or rendered.

    It is caught, so that the bad rows of all sources can be reported in one error.
    """

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
    """Tokenize the sources of one split, which `what` names. See `tokenize_sides`."""
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
    """Tokenize all rows of some sources, or read their tokens from the cache.

    Args:
        sides: the sources of `train` and `validation`, each with its rows. The weights of the
            sources become `TokenSet.repeats`.
        data: the recipe's section with seq_len, train_on, too_long and system.
        cache: folder of the cache. None for no cache.

    Raises:
        DataError: some rows cannot be read or rendered. The error lists the bad rows of all
            sources.
        LookupError: `only_cached` is True, and a source is not in the cache.
    """
    token_sets = {}
    refused = []
    if not data.allow_secrets:
        _check_no_secrets([rows for sources in sides.values() for _, rows in sources])
    for what, sources in sides.items():
        parts = []
        for source, rows in sources:
            make = partial(
                _tokenize_rows, rows, source, data, template, f"tokenize {what}: {rows.name}"
            )
            try:
                if cache is None:
                    arrays, about = make(TokenWriter(None))
                else:
                    # The cache key contains only values that affect the tokens. Therefore the
                    # cached tokens remain valid if other recipe keys change.
                    arrays, about = cached_tokens(
                        cache,
                        _cache_key(rows, source, data, template),
                        None if only_cached else make,
                    )
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
                has_answers=data.train_on != "all" and source.format not in ("text", "prompt"),
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
    """Raise DataError if rows of agent sessions contain secrets.

    The error lists the locations of the secrets, but not the secrets.
    """
    places = [place for rows in sources for found in rows.secrets.values() for place in found]
    if places:
        raise DataError(
            f"the agent sessions in the data contain {count_of(len(places), 'secret')}",
            where="; ".join(places[:LISTED]),
            why="the model would learn to write the secrets",
            fix="replace the secrets in the files and revoke them, or set data.allow_secrets=true",
        )


def _keys_that_select(source: Source, data: Data, what: str) -> str:
    """Return the recipe keys that select a part of a source's rows."""
    # `data.leave_out` also applies to held-out validation rows, because they come from
    # `data.train`.
    is_of_train = what == "train" or data.hold_out is not None
    values = {
        "split": source.split,
        "max_examples": source.max_examples,
        "data.leave_out": ", ".join(data.leave_out) if is_of_train else "",
        "data.hold_out": data.hold_out,
    }
    return ", ".join(f"{key}: {value}" for key, value in values.items() if value not in (None, ""))


def _cache_key(rows: Rows, source: Source, data: Data, template: Template) -> str:
    import transformers

    settings = {
        "version": TOKENS_VERSION,
        "transformers": transformers.__version__,
        "rows": rows.digest(),
        "format": [source.format, sorted(source.columns.items()), data.system],
        "template": [
            template.name,
            template.jinja,
            sorted(template.end_ids),
            template.samples_answers,
        ],
        "tokenizer": template.tokenizer_hash,
        "limits": [data.seq_len, too_long_of(source, data), data.train_on],
        "bad rows": data.bad_rows,
    }
    if template.pictures is not None:
        settings["pictures"] = [template.pictures.digest, _stamp_pictures(rows, source)]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _stamp_pictures(rows: Rows, source: Source) -> str:
    """Hash the paths, sizes and times of the picture files of some rows.

    The hash is necessary because the same rows in another folder can refer to other pictures, and
    because a picture file can change.
    """
    stamps = hashlib.sha256()
    slow = f"{rows.name}: looking up the pictures of {count_of(len(rows), 'row')}"
    with logged_if_slow(log, slow):
        for i in range(len(rows)):
            # Ignore errors of rows, because they are reported later, when the rows are tokenized.
            with suppress(DataError):
                for picture in pictures_of(convert_sample(rows[i], source, where=rows.where(i))):
                    if picture.path is None:
                        continue  # the picture is stored in the row itself
                    stamps.update(f"{i} {picture.path}".encode(errors="backslashreplace"))
                    with suppress(OSError, ValueError):
                        about = picture.path.stat()
                        # Include the time of the last status change, because a file that was
                        # extracted from an archive can have an old modification time.
                        stamp = f" {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}"
                        stamps.update(stamp.encode())
    return stamps.hexdigest()


def too_long_of(source: Source, data: Data) -> TooLong:
    """Return what happens to a source's rows that are longer than `data.seq_len`."""
    if data.too_long != "auto":
        return data.too_long
    # Split only documents, because the second part of a split answer would have no prompt.
    return "split" if source.format == "text" else "truncate"


def _tokenize_rows(
    rows: Rows, source: Source, data: Data, template: Template, title: str, writer: TokenWriter
) -> TokenEntry:
    """Tokenize all rows of a source. Return the arrays, and the other values of the cache entry."""
    counts = Counter[str]()
    leaks = []
    # Field of TokenCounts -> name of a problem, column or token -> number of rows with it, and
    # index of the first of these rows.
    named: dict[str, RowsByName] = {
        "flaws": {},
        "unread": {},
        "control_tokens": {},
    }
    bad = BadRows(len(rows))
    lengths = array("q")
    splitter = DocumentSplitter(writer, rows, data.seq_len, template)
    too_long = too_long_of(source, data)
    encode = RowEncoder(template, source, data.system, data.train_on)
    slow = f"{title}: rendering {count_of(len(rows), 'row')} with the template"
    with logged_if_slow(log, slow), closing(_encode_rows(rows, encode, title)) as encoded_rows:
        for i, where, row in encoded_rows:
            if isinstance(row, DataError):
                bad.add(i, where, row)
                continue
            if row.prompt != "unchecked":
                counts["prompts_apart" if row.prompt == "apart" else "prompts"] += 1
            if row.prompt == "supervised":
                leaks.append(len(writer))
            example = row.example
            row_names = (row.warnings, row.unread, sorted(example.control_tokens))
            for rows_by_name, names in zip(named.values(), row_names, strict=True):
                for name in names:
                    rows_by_name.setdefault(name, [0, i])[0] += 1
            lengths.append(example.longest_sequence)
            if template.pictures is not None:
                counts["pictures"] += len(example.digests)
                counts["scaled_pictures"] += example.scaled
                is_placeholder = example.ids == template.pictures.token_id
                counts["placeholders"] += int(np.count_nonzero(is_placeholder))
            if too_long == "split":
                splitter.add(example, i)
            else:
                _add_example(example, i, where, data, too_long, writer, counts, template)
    # Raise an error if a file has changed during tokenization, because training reads the rows
    # again.
    rows.check_unchanged()
    # Report all bad rows in one error, so that the user can fix them all at once. If no row is
    # usable, raise the error even if the recipe skips bad rows.
    if bad and (data.bad_rows == "error" or len(bad) == len(rows)):
        raise _RefusedRowsError(bad)
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
    return arrays, {"counts": about, "reached": leaks}


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
    """Truncate each sequence of an example at seq_len, and write the example.

    If the example is dropped instead, count the reason.
    """
    length = example.longest_sequence
    if length <= data.seq_len:
        writer.add(example, row)
        return
    if too_long == "error":
        raise DataError(
            f"the row has {length} tokens, but data.seq_len is {data.seq_len}",
            where=where,
            fix=f"set data.seq_len={length}, or data.too_long=truncate, or data.too_long=drop",
        )
    is_dropped = too_long == "drop"
    if example.digests and template.pictures is not None:
        # Drop the row if the truncation would remove tokens of a picture.
        cut_ids = example.ids[data.seq_len :]
        is_dropped = is_dropped or bool(np.isin(cut_ids, template.pictures.ids).any())
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
    """Yield (row, location, example) for all rows of a source. Rows are tokenized in batches."""
    indices: Iterable[int] = range(len(rows))
    if is_terminal(sys.stderr):
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import track

        console = Console(stderr=True)
        # Escape the title, because a file name can contain characters that rich reads as markup.
        shown = escape(visible(title))
        indices = track(indices, description=shown, console=console, transient=True)
    else:
        log.debug("%s", title)
    for batch, examples in encode_batches(encode, _read_batches(rows, indices), rows=len(rows)):
        yield from zip(itertools.count(batch.first), batch.places, examples, strict=False)


def _read_batches(rows: Rows, indices: Iterable[int]) -> Iterator[RowBatch]:
    """Yield all rows in batches of limited size."""
    batch = RowBatch(0, [], [])
    characters = 0
    for i in indices:
        # Store the error in the batch instead of raising it, so that errors of earlier rows are
        # raised first.
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
