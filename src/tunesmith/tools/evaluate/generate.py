"""Rows in, rows with a trained model's answers out; prompts are rendered as in training.

A row may have any format that trains, with its answer or without. The last assistant turn, the
output or the completion becomes the reference; a row that has none is prompted as
it is.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from tunesmith.config.check import METHOD_FORMATS
from tunesmith.config.row_formats import FORMAT_COLUMNS, ROW_FORMATS
from tunesmith.config.schema import Source
from tunesmith.data.rows.detect import detect, sample_rows
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
            columns as in training, if the rows have the columns of one of the run's sources; else
            by the columns that `train` would find. All rows are read alike.
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
    if not len(rows):
        return iter(())
    source = find_source(rows, loaded.location.sources, format_name, columns)
    prompts = [make_prompt(rows[i], rows.where(i), loaded, source) for i in range(len(rows))]
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
) -> Source:
    """Choose how to read rows, whose answers may be missing.

    They are read as `format_name` and `columns` say, else as the one of `sources` whose columns the
    first row has, else by the columns that `train` would find. Raise DataError if no column
    indicates what to answer.
    """
    sample, _ = sample_rows(rows)
    first = sample[min(sample)]
    like = _fitting_source(first, sources, format_name, columns)
    if like is None:
        like = _source_by_columns(first, rows.name, format_name, columns or {})
    if like is None or not _has_needed_columns(first, like):
        detected = None
        if format_name == "auto" or columns is None:
            detected = _detect_source(rows.name, sample, like, format_name, columns or {})
        like = detected or like
    if like is not None:
        return like
    trained: dict[str, None] = {}
    for source in sources:
        needed = ROW_FORMATS[source.format].layouts[0].needed
        trained |= {source.columns.get(name, name): None for name in needed}
    of_run = f"; those of the run's own rows are {', '.join(trained)}" if trained else ""
    raise DataError(
        "no column name indicates what to answer",
        where=from_here(rows.name),
        why=f"the columns are {', '.join(first) or 'none'}{of_run}",
        fix=f"say which is which: --columns prompt={next(iter(first), 'question')}, or --format",
    )


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


def _source_by_columns(
    row: dict[str, object], name: str, format_name: str, columns: Mapping[str, str]
) -> Source | None:
    """The source of rows of a format that is given, or whose key column the row has."""
    if format_name == "auto":
        # Columns that are named must be of the format; where no format has them, an error says so.
        names = [each for each in _KEY_COLUMN if columns.keys() <= set(FORMAT_COLUMNS[each])]
        format_name = next(
            (each for each in names or _KEY_COLUMN if _has_key_column(row, each, columns)), ""
        )
        if not format_name:
            return None
    known = FORMAT_COLUMNS[format_name]
    unknown = [column for column in columns if column not in known]
    if unknown:
        raise UsageError(
            f"format {format_name} has no column {', '.join(unknown)}",
            where="--columns",
            fix=f"its columns are {', '.join(known)}: write one of them before each =",
        )
    return Source(source=name, format=format_name, columns=dict(columns))  # type: ignore[arg-type]


def _has_key_column(row: dict[str, object], format_name: str, columns: Mapping[str, str]) -> bool:
    """Return whether a row has the column that tells a format, or `columns` names it."""
    key_column = _KEY_COLUMN[format_name]
    if key_column == "label" and key_column not in columns:
        # A label that says neither good nor bad is a column of somebody's own.
        has_answer = not {"completion", "messages"}.isdisjoint(row)
        return has_answer and read_label(row.get(key_column)) is not None
    return key_column in columns or key_column in row


def _detect_source(
    name: str,
    sample: Mapping[int, dict[str, object]],
    like: Source | None,
    format_name: str,
    columns: Mapping[str, str],
) -> Source | None:
    """Find the format and columns that `train` would find if the rows had answers.

    None if it finds none. `like`: has the column of the question, if that is known.
    """
    source = Source(source=name, columns=dict(columns))
    if format_name != "auto":
        source = replace(source, format=format_name)  # type: ignore[arg-type]
    complete = []
    for row in sample.values():
        complete.append({key: ANSWER_PLACEHOLDER if is_absent(v) else v for key, v in row.items()})
    layouts = []
    for attempt in (complete, [{**row, "completion": ANSWER_PLACEHOLDER} for row in complete]):
        with suppress(DataError):
            table = from_list(attempt, name)
            any_format = format_name == "auto"
            layouts.append(detect(table, source, any_format=any_format, skips_bad_rows=True))
    # Any column of text reads as that, of prompts without answers too: it comes last.
    layouts.sort(key=lambda layout: layout.format == "text")
    for layout in layouts:
        key_column = _key_column(layout.format, layout.columns)
        if layout.format == "text":
            # Any single column would train as text, but the run answers what it was trained on.
            is_usual = plain(key_column) in ROW_FORMATS["text"].names("text")
            is_right = format_name == "text" or is_usual
        else:
            is_right = like is None or key_column == _key_column(like.format, like.columns)
        if not is_right or not all(key_column in row for row in sample.values()):
            continue
        if layout.renamed != source.columns:
            log.info(f"{from_here(name)}: {_KEY_COLUMN[layout.format]}={key_column}")
        return replace(source, format=layout.format, columns=layout.renamed)
    return None


def _key_column(format_name: str, columns: Mapping[str, str]) -> str:
    """The file's name of the column that tells a format."""
    return columns.get(_KEY_COLUMN[format_name], _KEY_COLUMN[format_name])


def _has_needed_columns(row: dict[str, object], source: Source) -> bool:
    """Tell whether a row has all columns that one of the format's layouts needs."""
    layouts = ROW_FORMATS[source.format].layouts
    return any(
        all(source.columns.get(name, name) in row for name in layout.needed) for layout in layouts
    )


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
