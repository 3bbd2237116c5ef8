"""Rows in, rows with a trained model's answers out; prompts are rendered as in training.

A row may have any format that trains, with its answer or without. The last assistant turn, the
output or the completion becomes the reference; a row that has none is prompted as
it is.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from tunesmith.config.check import METHOD_FORMATS
from tunesmith.config.row_formats import FORMAT_COLUMNS, ROW_FORMATS
from tunesmith.config.schema import Source
from tunesmith.data.rows.detect import Detected, detect, sample_rows
from tunesmith.data.rows.formats import convert_sample
from tunesmith.data.rows.labels import read_label
from tunesmith.data.rows.messages import CHAT_ROLES, is_said
from tunesmith.data.rows.row_reader import RowReader, is_absent, plain
from tunesmith.data.rows.samples import Completion, Conversation, Picture, Sample
from tunesmith.data.source.open_source import Rows, from_list
from tunesmith.errors import DataError, UsageError
from tunesmith.host.files import from_here
from tunesmith.host.logger import lines_by_default
from tunesmith.inference.decoding import Decoding, answer_all, decode
from tunesmith.inference.load_run import LoadedModel
from tunesmith.tools.evaluate.scorers import ScoredRow
from tunesmith.units import count_of

log = logging.getLogger(__name__)

# The column that tells a format. `prompt` is in pairs and in labeled answers too: they come first.
_KEY_COLUMN: dict[str, str] = {
    name: ROW_FORMATS[name].key
    for name in sorted(ROW_FORMATS, key=lambda name: name not in METHOD_FORMATS.values())
}
_ANSWER_ROLES = [name for name, role in CHAT_ROLES.items() if role in ("assistant", "call")]
# Stands in for an answer that is to come, so that the row converts; a prompt ends before it.
ANSWER_PLACEHOLDER = "?"


@lines_by_default()
def generate(
    loaded: LoadedModel,
    rows: Rows | Sequence[dict[str, Any]],
    decoding: Decoding | None = None,
    *,
    format_name: str = "auto",
    columns: Mapping[str, str] | None = None,
    batch_size: int = 16,
    start: int = 0,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[dict[str, Any]]:
    """Answer rows of any format that trains, rendered with the template that was trained.

    >>> next(tunesmith.generate(loaded, [{"prompt": "Hello"}]))["output"]

    Args:
        loaded: from `load_run`.
        rows: such as `[{"prompt": "Hello"}]`; an answer that a row holds is not shown to the model.
        decoding: how tokens are chosen; None is greedy, up to 256 tokens.
        format_name, columns: how rows are read, as `format` and `columns` of a recipe; without
            columns as in training, where a row has the columns of one of the run's sources; else
            by the columns that `train` would find. `auto` looks at the columns of each row where
            not all have the same.
        batch_size: rows answered at once; with sampling, it changes what is drawn.
        start: the first row to answer; the answers are those of a job that began at row 0.
        cancelled: called after each token; once true, the iterator ends after the rows that are
            done.

    Returns:
        an iterator over the rows from `start` on, in their order, each with `output` added, and
        `reference` where it had an answer.

    Raises:
        UsageError: `loaded` is the name of a run.
        DataError: at the call, not in the iterator: a broken row, or a prompt that leaves no room
            for its answer.
    """
    if not isinstance(loaded, LoadedModel):
        what = f"generate takes a loaded model, not {type(loaded).__name__}"
        fix = 'loaded = tunesmith.load_run("runs/my-run"), then generate(loaded, rows)'
        raise UsageError(what, where="generate(loaded)", fix=fix)
    decoding = decoding or Decoding()
    rows = rows if isinstance(rows, Rows) else from_list(list(rows))
    sources = loaded.location.sources
    detected = find_source(rows, sources, format_name, columns)
    if detected is not None:
        if detected.format == "text" and format_name == "auto" and not columns:
            _require_text_column(detected, sources)
        if format_name != "auto" or columns:
            # The options name a part of it.
            format_name, columns = detected.format, detected.columns
        # Of a sample: each row is read by it, or else by one of the run's, or by its own columns.
        sources = (detected, *sources)
    prompts = []
    for i in range(len(rows)):
        row, where = rows[i], rows.where(i)
        source = row_source(row, where, sources, format_name, columns)
        prompts.append(make_prompt(row, where, loaded, source))
    check_room(prompts, loaded.context, decoding)
    answers = answer_all(
        loaded.model,
        loaded.tokenizer,
        [prompt.ids for prompt in prompts],
        decoding,
        stops=loaded.template.end_ids,
        batch_size=batch_size,
        start=start,
        cancelled=cancelled,
        pictures=lambda i: loaded.pixels(prompts[i].pictures, prompts[i].where),
    )

    # The rows are checked at the call, and answered as the caller iterates.
    def with_answers() -> Iterator[dict[str, Any]]:
        for i, answer in answers:
            row = {**rows[i], "output": answer.text}
            scored = prompts[i].scored
            if scored is not None:
                row["reference"] = scored.reference
                if scored.is_special:
                    row["output"] = decode(loaded.tokenizer, answer.ids, with_special=True)
            yield row

    return with_answers()


def find_source(
    rows: Rows, sources: Sequence[Source], format_name: str, columns: Mapping[str, str] | None
) -> Source | None:
    """Find how `train` would read these rows, whose answers may be missing.

    None where `row_source` tells it of each row: format and columns are given, or the first row has
    the columns of one of `sources`, or the rows differ. DataError where that could not tell either.
    """
    sample, _ = sample_rows(rows)
    if not sample or (format_name != "auto" and columns is not None):
        return None
    first = sample[min(sample)]
    like = _fitting_source(first, sources, format_name, columns)
    if like is not None and _has_needed_columns(first, like):
        return None
    # What the row's columns tell without its answer: the format, and the column of the question.
    known_format = format_name
    known_columns: set[str] = set()
    if like is not None:
        known_format = like.format
        known_columns.add(_key_column(like.format, like.columns))
    elif format_name == "auto":
        known_format = _format_by_columns(first, columns or {})
    source = Source(source=rows.name, columns=dict(columns or {}))
    if format_name != "auto":
        source = replace(source, format=format_name)  # type: ignore[arg-type]
    complete = []
    for row in sample.values():
        complete.append({key: ANSWER_PLACEHOLDER if is_absent(v) else v for key, v in row.items()})
    attempts = [complete]
    if not known_format:
        attempts.append([{**row, "completion": ANSWER_PLACEHOLDER} for row in complete])
    tables = [from_list(attempt, rows.name) for attempt in attempts]
    layouts = _detected_layouts(tables, source, format_name, known_format, sources)
    for layout in layouts:
        key_column = _key_column(layout.format, layout.columns)
        if known_columns <= {key_column} and all(key_column in row for row in sample.values()):
            if layout.renamed != source.columns:
                # Without the answer that was put in.
                columns_here = {
                    name: column
                    for name, column in layout.columns.items()
                    if any(column in row for row in sample.values())
                }
                shown = replace(layout, columns=columns_here)
                log.info(f"{from_here(rows.name)}: {shown.describe()}")
            return replace(source, format=layout.format, columns=layout.renamed)
    return None


def _require_text_column(source: Source, sources: Sequence[Source]) -> None:
    """DataError unless the rows' column has a usual name of a text: any single column would train
    as one, but the run answers what it was trained on."""
    column = _key_column("text", source.columns)
    if plain(column) not in ROW_FORMATS["text"].names("text"):
        raise DataError(
            "no column name indicates what to answer",
            where=from_here(source.source),
            why=f"the columns are {column}{_trained_columns(sources)}",
            fix=f"rename it, or say what it is: --columns prompt={column}",
        )


def _trained_columns(sources: Sequence[Source]) -> str:
    """The columns that the run needed in its rows, as the end of a sentence; "" for no run."""
    trained: dict[str, None] = {}
    for source in sources:
        needed = ROW_FORMATS[source.format].layouts[0].needed
        trained |= {source.columns.get(name, name): None for name in needed}
    return f"; those of the run's own rows are {', '.join(trained)}" if trained else ""


def _detected_layouts(
    tables: Sequence[Rows],
    source: Source,
    format_name: str,
    known_format: str,
    sources: Sequence[Source],
) -> list[Detected]:
    """The layouts that `train` finds in the first or else the second of two forms of some rows.

    DataError where there is none, and the format is not known otherwise.
    """
    layouts = []
    errors = []
    for table in tables:
        try:
            layout = detect(table, source, any_format=format_name == "auto", skips_bad_rows=True)
            layouts.append(layout)
        except DataError as error:
            errors.append(error)
    if not layouts and not known_format:
        errors[0].why += _trained_columns(sources)
        raise errors[0]
    # Any column of text reads as that, of prompts without answers too: it comes last.
    layouts.sort(key=lambda layout: layout.format == "text")
    return [layout for layout in layouts if layout.format != "text" or known_format in ("", "text")]


def _key_column(format_name: str, columns: Mapping[str, str]) -> str:
    """The file's name of the column that tells a format."""
    return columns.get(_KEY_COLUMN[format_name], _KEY_COLUMN[format_name])


def _has_needed_columns(row: dict[str, object], source: Source) -> bool:
    """Tell whether a row has all columns that one of the format's layouts needs."""
    layouts = ROW_FORMATS[source.format].layouts
    return any(
        all(source.columns.get(name, name) in row for name in layout.needed) for layout in layouts
    )


def row_source(
    row: dict[str, object],
    where: str,
    sources: Sequence[Source],
    format_name: str,
    columns: Mapping[str, str] | None,
) -> Source:
    """Choose how to read a row: as `format_name` and `columns` say, else as the one of `sources`
    whose columns it has, else by its own columns."""
    fitting = _fitting_source(row, sources, format_name, columns)
    if fitting is not None:
        return fitting
    columns = columns or {}
    name = format_name
    if name == "auto":
        name = _format_by_columns(row, columns)
    if not name:
        row_columns = ", ".join(map(repr, row)) or "none"
        raise DataError(
            "the format of the row is unknown",
            where=where,
            why=f"its columns are {row_columns}; looked for {', '.join(_KEY_COLUMN.values())}",
            fix="say which is which: --columns prompt=question --columns completion=answer, "
            "or give --format",
        )
    known = FORMAT_COLUMNS[name]
    unknown = [column for column in columns if column not in known]
    if unknown:
        are_no = "is not a column" if len(unknown) == 1 else "are not columns"
        raise UsageError(
            f"{', '.join(unknown)} {are_no} of format {name}",
            where="--columns",
            fix=f"its columns are {', '.join(known)}: write one of them before each =",
        )
    return Source(source=where, format=name, columns=dict(columns))  # type: ignore[arg-type]


def _fitting_source(
    row: dict[str, object],
    sources: Sequence[Source],
    format_name: str,
    columns: Mapping[str, str] | None,
) -> Source | None:
    """The one of `sources` whose columns the row has; None where `columns` says which they are."""
    if columns is not None:
        return None
    # A pair has a prompt or a conversation as other formats have, and is no row of theirs.
    if format_name == "auto" and {"chosen", "rejected"} <= row.keys():
        sources = [source for source in sources if source.format == "preference"]
    fitting = []
    for source in sources:
        is_right = format_name in ("auto", source.format)
        if is_right and _key_column(source.format, source.columns) in row:
            fitting.append(source)
    # Of several sources that fit, the one with the most of its columns here.
    return max(fitting, key=lambda source: len(source.columns.values() & row.keys()), default=None)


def _format_by_columns(row: dict[str, object], columns: Mapping[str, str]) -> str:
    """The format whose key column the row has; "" for none."""
    # Columns that are named must be of the format; where no format has them, an error says so.
    names = [name for name in _KEY_COLUMN if columns.keys() <= set(FORMAT_COLUMNS[name])]
    for name in names or _KEY_COLUMN:
        key_column = _KEY_COLUMN[name]
        # A label that says neither good nor bad is a column of somebody's own.
        has_answer = not {"completion", "messages"}.isdisjoint(row)
        is_label = has_answer and read_label(row.get(key_column)) is not None
        is_other = key_column == "label" and not is_label
        if key_column in columns or (key_column in row and not is_other):
            return name
    return ""


class Prompt(NamedTuple):
    """The prompt of a row, with the answer to compare with.

    Attributes:
        ids: up to where its answer starts, with the run's system message.
        where: the row's place.
        scored: the row with the answer that it holds; None without one, or of an empty one.
        pictures: those that it shows.
    """

    ids: list[int]
    where: str
    scored: ScoredRow | None = None
    pictures: tuple[Picture, ...] = ()


def check_room(prompts: Sequence[Prompt], context: int | None, decoding: Decoding) -> None:
    """DataError where a prompt leaves no room for its answer in `context` tokens, if these are
    limited."""
    if context is None:
        return
    lengths = [len(prompt.ids) for prompt in prompts]
    longest = max(lengths, default=0)
    room = context - decoding.max_new_tokens
    if longest <= room:
        return
    count = sum(length > room for length in lengths)
    raise DataError(
        f"too long: {count} of {count_of(len(prompts), 'prompt')}, up to {longest} tokens",
        where=prompts[lengths.index(longest)].where,
        why=f"the model's context is {context} tokens; "
        f"{decoding.max_new_tokens} are kept for the answer",
        fix="shorten these rows, or use a smaller --max-new-tokens",
    )


def make_prompt(row: dict[str, object], where: str, loaded: LoadedModel, source: Source) -> Prompt:
    """The prompt of a row, read as `source` says, and the answer that it holds; DataError for a
    broken row."""
    complete_row, is_answered = _with_answer(row, source, where)
    sample = convert_sample(complete_row, source, where=where, system=loaded.system)
    prompt_ids = list(loaded.template.prompt(sample, where=where))
    pictures = sample.pictures if isinstance(sample, Conversation) else ()
    if not is_answered or _is_empty(sample):
        return Prompt(prompt_ids, where, pictures=pictures)
    # The row's text, never what its tokens say: where these are wrong, an answer that repeats them
    # must not count as right. Tool calls and thoughts are in the form in which the model writes
    # them.
    raw_reference = loaded.template.answer(sample, where=where)
    if not raw_reference.strip():
        return Prompt(prompt_ids, where, pictures=pictures)
    reference = loaded.template.without_special_tokens(raw_reference)
    is_special = not reference.strip()
    calls = 0
    has_tools = False
    if isinstance(sample, Conversation):
        calls = len(sample.messages[-1].get("tool_calls") or ())
        has_tools = bool(sample.tools)
    return Prompt(
        prompt_ids,
        where,
        ScoredRow(
            raw_reference if is_special else reference,
            raw_reference,
            row,
            where,
            calls,
            has_tools,
            is_special,
        ),
        pictures,
    )


def _is_empty(sample: Sample) -> bool:
    """Tell whether there is nothing in the last answer to compare with."""
    if isinstance(sample, Conversation):
        return not is_said(sample.messages[-1])
    return isinstance(sample, Completion) and not sample.completion.strip()


def _with_answer(
    row: dict[str, object], source: Source, where: str
) -> tuple[dict[str, object], bool]:
    """The row with an answer, its own or a placeholder, and whether it is its own."""
    if source.format == "text":
        return row, False
    form = ROW_FORMATS[source.format]
    column = source.columns.get(form.answer, form.answer)
    reader = RowReader(row, source, where)
    # JSON text of messages is read as these.
    value = reader.text_or_messages(row.get(column), column)
    role_key = "role"
    placeholder = {"role": "assistant", "content": ANSWER_PLACEHOLDER}
    if form.answers_in_text:
        if value not in (None, ""):
            return row, True
        # A prompt of messages is completed by messages.
        prompt = row.get(source.columns.get("prompt", "prompt"))
        has_messages = not isinstance(reader.text_or_messages(prompt, "prompt"), str | None)
        return {**row, column: [placeholder] if has_messages else ANSWER_PLACEHOLDER}, False
    if source.format == "sharegpt":
        role_key = "from"
        placeholder = {"from": "gpt", "value": ANSWER_PLACEHOLDER}
    if not isinstance(value, list) or not value:
        return row, True
    last = value[-1]
    if not isinstance(last, dict) or str(last.get(role_key)).strip().lower() in _ANSWER_ROLES:
        return row, True
    return {**row, column: [*value, placeholder]}, False
