"""Format and columns of the rows that a command answers or scores. This module imports no torch."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace

from tunesmith.config.row_formats import FORMAT_COLUMNS, ROW_FORMATS
from tunesmith.config.row_settings import rows_set_by
from tunesmith.config.schema import Source
from tunesmith.errors import DataError, UsageError
from tunesmith.host.files import relative_to_cwd
from tunesmith.host.shell import shell_word
from tunesmith.rows.columns import holds_text
from tunesmith.rows.detect import detect, sample_rows
from tunesmith.rows.source.open_source import Rows

log = logging.getLogger(__name__)


def find_source(
    rows: Rows, sources: Sequence[Source], format_name: str, columns: Mapping[str, str] | None
) -> Source:
    """Determine the format and columns of rows. The rows may have no answers.

    Use `format_name` and `columns` if the caller gives them. Otherwise use one of `sources` if the
    first row has its columns. Otherwise detect format and columns as in `train`. Raise DataError if
    no column can be the prompt.
    """
    sample, _ = sample_rows(rows)
    first = sample[min(sample)]
    given = Source(source=rows.name, columns=dict(columns or {}))
    any_format = format_name == "auto"
    if not any_format:
        given = replace(given, format=format_name)  # type: ignore[arg-type]
        _check_columns(given)
    like = _fitting_source(first, sources, format_name) if columns is None else None
    if like is not None and _has_needed_columns(first, like):
        return like
    # If a given column does not exist, show the error of `detect`. Otherwise the rows can have a
    # prompt without an answer, which `train` does not accept.
    has_columns = set(given.columns.values()) <= {name for row in sample.values() for name in row}
    with rows_set_by(option=True), suppress(DataError) if has_columns else nullcontext():
        layout = detect(rows, given, any_format=any_format, skips_bad_rows=True, is_trained=False)
        found = replace(given, format=layout.format, columns=layout.renamed)
        if like is None or _key_column(found) == _key_column(like):
            if found.columns != given.columns:
                key = ROW_FORMATS[found.format].key
                log.info(f"{relative_to_cwd(rows.name)}: {key}={_key_column(found)}")
            return found
    if like is not None or not any_format:
        return like or given
    # Use the first format whose key is the name of a column. If rows cannot be read, their error
    # says why.
    for name, form in ROW_FORMATS.items():
        if form.key in {*first, *given.columns} and given.columns.keys() <= set(form.columns):
            return replace(given, format=name)
    trained = dict.fromkeys(
        source.columns.get(name, name)
        for source in sources
        for name in ROW_FORMATS[source.format].layouts[0].needed
    )
    run_columns = f", but the run was trained on {', '.join(trained)}" if trained else ""
    prompt = max(first, key=lambda column: holds_text(first[column]), default="question")
    raise DataError(
        "it is not known which column contains the prompts",
        where=relative_to_cwd(rows.name),
        why=f"the columns are {', '.join(first) or 'none'}{run_columns}",
        fix=f"name the columns with --columns {shell_word(f'prompt={prompt}')}, or use --format",
    )


def _fitting_source(
    row: dict[str, object], sources: Sequence[Source], format_name: str
) -> Source | None:
    """Return the data source of the run whose columns fit a row best.

    A source fits if the row has the column that identifies the source's format. Return None if no
    source fits.
    """
    # If the row is a pair, use only sources of pairs, because a pair can also have the column that
    # identifies another format, such as `prompt`.
    if format_name == "auto" and {"chosen", "rejected"} <= row.keys():
        format_name = "preference"
    fitting = [
        source
        for source in sources
        if format_name in ("auto", source.format) and _key_column(source) in row
    ]
    # If several sources fit, use the one that shares the most columns with the row.
    return max(fitting, key=lambda source: len(source.columns.values() & row.keys()), default=None)


def _check_columns(given: Source) -> None:
    """Raise UsageError if the format of `given` does not have one of its columns."""
    known = FORMAT_COLUMNS[given.format]
    unknown = [column for column in given.columns if column not in known]
    if unknown:
        raise UsageError(
            f"format {given.format} has no column {', '.join(unknown)}",
            where="--columns",
            fix=f"use --columns NAME=COLUMN, where NAME is one of {', '.join(known)}",
        )


def _key_column(source: Source) -> str:
    """Return the column of the file that identifies rows of the source's format."""
    key = ROW_FORMATS[source.format].key
    return source.columns.get(key, key)


def _has_needed_columns(row: dict[str, object], source: Source) -> bool:
    """Return whether a row has all required columns of its format.

    Some formats have several sets of columns (layouts). One complete set is sufficient.
    """
    layouts = ROW_FORMATS[source.format].layouts
    return any(
        all(source.columns.get(name, name) in row for name in layout.needed) for layout in layouts
    )
