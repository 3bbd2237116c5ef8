"""Generation of answers to rows with a trained model. Prompts are rendered as in training.

A row can have any training format, with or without an answer. The answer in the row (the last
assistant turn, the output or the completion) becomes the reference, and is not in the prompt.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from tunesmith.config.check import METHOD_FORMATS
from tunesmith.config.row_formats import FORMAT_COLUMNS, ROW_FORMATS
from tunesmith.config.schema import Source
from tunesmith.data.rows.columns import is_absent, plain
from tunesmith.data.rows.detect import detect, sample_rows
from tunesmith.data.rows.formats import convert_sample
from tunesmith.data.rows.labels import read_label
from tunesmith.data.rows.messages import CHAT_ROLES
from tunesmith.data.rows.row_reader import RowReader
from tunesmith.data.rows.samples import Picture, pictures_of
from tunesmith.data.source.open_source import Rows, from_list
from tunesmith.errors import DataError, UsageError
from tunesmith.host.files import relative_to_cwd
from tunesmith.host.logger import lines_by_default
from tunesmith.inference.answers import answer_all, decode
from tunesmith.inference.decoding import Decoding
from tunesmith.inference.load_run import LoadedModel
from tunesmith.inference.sampler import Prompt
from tunesmith.scoring.rows import make_scored_row
from tunesmith.scoring.scorers import ScoredRow
from tunesmith.units import count_of

log = logging.getLogger(__name__)

# Row format -> the column that identifies the format. Formats of pairs and of labeled answers come
# first, because rows of these formats also have the column `prompt`, which identifies another
# format.
_KEY_COLUMN: dict[str, str] = {
    name: ROW_FORMATS[name].key
    for name in sorted(ROW_FORMATS, key=lambda name: name not in METHOD_FORMATS.values())
}
_ANSWER_ROLES = [name for name, role in CHAT_ROLES.items() if role in ("assistant", "call")]
# Answer that is inserted into a row without an answer, because the row can only be converted with
# an answer. The model does not see it: the prompt ends before the answer.
ANSWER_PLACEHOLDER = "?"


@lines_by_default()
def generate(
    loaded: LoadedModel,
    rows: Rows | Sequence[dict[str, Any]],
    decoding: Decoding | None = None,
    *,
    format_name: str = "auto",
    columns: Mapping[str, str] | None = None,
    samples: int = 1,
    batch_size: int = 16,
    start: int = 0,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[dict[str, Any]]:
    """Generate answers to rows of any training format, with the chat template of the training.

    >>> next(tunesmith.generate(loaded, [{"prompt": "Hello"}]))["output"]

    Args:
        loaded: a model from `load_run`.
        rows: rows such as `[{"prompt": "Hello"}]`. The model does not see the answer in a row.
        decoding: how tokens are chosen; None: greedy, up to 256 tokens.
        format_name, columns: format and columns of all rows, as `format` and `columns` of a recipe.
            If `columns` is None and the rows have the columns of one of the run's sources, the
            format and columns of this source are used. Otherwise format and columns are detected as
            in `train`.
        samples: number of answers to each row. More than one needs a temperature.
        batch_size: number of rows that are answered at once. In 16-bit dtypes, answers can depend
            on it, because matmuls of other sizes round differently.
        start: index of the first row to answer. The answers are the same as in a job that started
            at row 0.
        cancelled: function that is called after each token. If it returns True, generation stops,
            and the iterator ends after the rows whose answers are complete.

    Returns:
        An iterator over the rows from `start` on, with `samples` copies of each row. Each copy has
        the key `output` added, and the key `reference` if the row contained an answer.

    Raises:
        UsageError: `loaded` is not a loaded model, or several answers would be equal.
        DataError: a row is invalid, or a prompt is too long for the model's context. This error is
            raised by the call of `generate`, not during the iteration.
    """
    if not isinstance(loaded, LoadedModel):
        raise UsageError(
            f"generate takes a loaded model, not {type(loaded).__name__}",
            where="generate(loaded)",
            fix='load the model: loaded = tunesmith.load_run("runs/my-run"); '
            "generate(loaded, rows)",
        )
    rows = rows if isinstance(rows, Rows) else from_list(list(rows))
    if not len(rows):
        return iter(())
    source = find_source(rows, loaded.location.sources, format_name, columns)
    answered = answer_rows(
        loaded,
        rows,
        make_prompts(loaded, rows, source),
        decoding or Decoding(),
        samples=samples,
        batch_size=batch_size,
        start=start,
        cancelled=cancelled,
    )
    return (row for rows_of_prompt in answered for row in rows_of_prompt.with_output())


class RowPrompt(NamedTuple):
    """Prompt of a row, and the answer in the row.

    Attributes:
        ids: token ids up to the start of the answer, including the run's system message.
        where: file and line of the row.
        scored: the row and its answer, for scorers.
        pictures: the pictures of the prompt.
    """

    ids: list[int]
    where: str
    scored: ScoredRow
    pictures: tuple[Picture, ...] = ()


class AnsweredRow(NamedTuple):
    """A row and the model's answers to it.

    Attributes:
        number: index of the row.
        row: the row as it is in the file.
        scored: the row and its answer, for scorers.
        outputs: the texts of the model's answers.
        finished: whether each answer ended with a stop token.
    """

    number: int
    row: dict[str, Any]
    scored: ScoredRow
    outputs: list[str]
    finished: list[bool]

    def with_output(self) -> Iterator[dict[str, Any]]:
        """Yield a copy of the row for each answer, with the keys `output` and `reference`."""
        reference = {"reference": self.scored.reference} if self.scored.is_answered else {}
        for output in self.outputs:
            yield {**self.row, "output": output, **reference}


def answer_rows(
    loaded: LoadedModel,
    rows: Rows,
    prompts: Sequence[RowPrompt],
    decoding: Decoding,
    *,
    samples: int = 1,
    batch_size: int = 16,
    start: int = 0,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[AnsweredRow]:
    """Check the prompts, then return an iterator that answers the rows.

    Args:
        prompts: the prompts of the rows, from `make_prompts`.
        decoding, samples, batch_size, start, cancelled: as for `generate`.

    Raise UsageError and DataError as `generate`.
    """
    if samples > 1 and decoding.temperature == 0:
        raise UsageError(
            f"the {samples} answers to a row would be equal",
            where="temperature",
            why="temperature 0 always picks the most likely token",
            fix="set a temperature, such as 1.0",
        )
    check_prompt_lengths(prompts, loaded.context, decoding)
    answers = answer_all(
        loaded.train_model,
        loaded.tokenizer,
        sampler_prompts(loaded, prompts),
        decoding,
        stops=loaded.template.end_ids,
        answers=samples,
        batch_size=batch_size,
        start=start,
        cancelled=cancelled,
    )

    # This inner generator lets the checks above run when the function is called. In a generator
    # they would run at the first iteration.
    def answered() -> Iterator[AnsweredRow]:
        for i, group in answers:
            scored = prompts[i].scored
            outputs = [answer.text for answer in group]
            if scored.is_special:
                outputs = [decode(loaded.tokenizer, a.ids, with_special=True) for a in group]
            yield AnsweredRow(i, rows[i], scored, outputs, [answer.finished for answer in group])

    return answered()


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
    like = _fitting_source(first, sources, format_name) if columns is None else None
    like = like or _source_by_columns(first, given, format_name)
    is_free = format_name == "auto" or columns is None
    if is_free and (like is None or not _has_needed_columns(first, like)):
        like = _detect_source(sample, given, format_name, like) or like
    if like is not None:
        return like
    trained: dict[str, None] = {}
    for source in sources:
        needed = ROW_FORMATS[source.format].layouts[0].needed
        trained |= {source.columns.get(name, name): None for name in needed}
    run_columns = f", but the run was trained on {', '.join(trained)}" if trained else ""
    raise DataError(
        "it is not known which column contains the prompts",
        where=relative_to_cwd(rows.name),
        why=f"the columns are {', '.join(first) or 'none'}{run_columns}",
        fix=f"name the columns with --columns prompt={next(iter(first), 'question')}, or use "
        "--format",
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
    fitting = []
    for source in sources:
        is_right = format_name in ("auto", source.format)
        if is_right and _key_column(source.format, source.columns) in row:
            fitting.append(source)
    # If several sources fit, use the one that shares the most columns with the row.
    return max(fitting, key=lambda source: len(source.columns.values() & row.keys()), default=None)


def _source_by_columns(row: dict[str, object], given: Source, format_name: str) -> Source | None:
    """Return `given` with the format `format_name`. If it is `auto`, the row's columns identify it.

    Return None if the row has no identifying column. Raise UsageError if `given` has a column that
    the format does not have.
    """
    if format_name == "auto":
        # Try only formats that have all given columns. If no format has all of them, try all
        # formats, because the check below then reports the unknown column.
        names = [each for each in _KEY_COLUMN if given.columns.keys() <= set(FORMAT_COLUMNS[each])]
        fitting = [each for each in names or _KEY_COLUMN if _has_key_column(row, each, given)]
        if not fitting:
            return None
        format_name = fitting[0]
    known = FORMAT_COLUMNS[format_name]
    unknown = [column for column in given.columns if column not in known]
    if unknown:
        raise UsageError(
            f"format {format_name} has no column {', '.join(unknown)}",
            where="--columns",
            fix=f"use --columns NAME=COLUMN, where NAME is one of {', '.join(known)}",
        )
    return replace(given, format=format_name)  # type: ignore[arg-type]


def _has_key_column(row: dict[str, object], format_name: str, given: Source) -> bool:
    """Return whether a row or `given.columns` has the column that identifies the format."""
    key_column = _KEY_COLUMN[format_name]
    if key_column in given.columns:
        return True
    if key_column == "label":
        # Many data sets have a column `label` with another meaning. Accept the column only if its
        # value means good or bad, and if the row has an answer.
        has_answer = not {"completion", "messages"}.isdisjoint(row)
        return has_answer and read_label(row.get(key_column)) is not None
    return key_column in row


def _detect_source(
    sample: Mapping[int, dict[str, object]], given: Source, format_name: str, like: Source | None
) -> Source | None:
    """Detect format and columns as in `train`. Missing answers are first replaced by a placeholder.

    Args:
        given: the name of the rows, and the columns that the caller gave.
        like: a source that names the column of the question; None if the column is not known.

    Return None if no format fits.
    """
    name = given.source
    if format_name != "auto":
        given = replace(given, format=format_name)  # type: ignore[arg-type]
    complete = []
    for row in sample.values():
        complete.append({key: ANSWER_PLACEHOLDER if is_absent(v) else v for key, v in row.items()})
    layouts = []
    for attempt in (complete, [{**row, "completion": ANSWER_PLACEHOLDER} for row in complete]):
        with suppress(DataError):
            table = from_list(attempt, name)
            any_format = format_name == "auto"
            layouts.append(detect(table, given, any_format=any_format, skips_bad_rows=True))
    # Try the format "text" last, because any text column fits it, even a column of prompts.
    layouts.sort(key=lambda layout: layout.format == "text")
    for layout in layouts:
        key_column = _key_column(layout.format, layout.columns)
        if layout.format == "text":
            # `train` accepts any single column as text. An answer requires a prompt, so accept only
            # the usual column names, unless the user chose the format "text".
            is_usual = plain(key_column) in ROW_FORMATS["text"].names("text")
            is_right = format_name == "text" or is_usual
        else:
            is_right = like is None or key_column == _key_column(like.format, like.columns)
        if is_right and all(key_column in row for row in sample.values()):
            if layout.renamed != given.columns:
                log.info(f"{relative_to_cwd(name)}: {_KEY_COLUMN[layout.format]}={key_column}")
            return replace(given, format=layout.format, columns=layout.renamed)
    return None


def _key_column(format_name: str, columns: Mapping[str, str]) -> str:
    """Return the column of the file that identifies rows of this format."""
    return columns.get(_KEY_COLUMN[format_name], _KEY_COLUMN[format_name])


def _has_needed_columns(row: dict[str, object], source: Source) -> bool:
    """Return whether a row has all required columns of its format.

    Some formats have several sets of columns (layouts). One complete set is sufficient.
    """
    layouts = ROW_FORMATS[source.format].layouts
    return any(
        all(source.columns.get(name, name) in row for name in layout.needed) for layout in layouts
    )


def make_prompts(loaded: LoadedModel, rows: Rows, source: Source) -> list[RowPrompt]:
    """Build the prompts of all rows. Raise DataError if a row is invalid."""
    return [make_prompt(rows[i], rows.where(i), loaded, source) for i in range(len(rows))]


def sampler_prompts(loaded: LoadedModel, prompts: Sequence[RowPrompt]) -> list[Prompt]:
    """Return the prompts of rows in the form that the sampler needs."""
    return [loaded.prompt(p.ids, p.pictures, p.where, row) for row, p in enumerate(prompts)]


def check_prompt_lengths(
    prompts: Sequence[RowPrompt], context: int | None, decoding: Decoding
) -> None:
    """Raise DataError if a prompt plus the longest answer does not fit into the model's context.

    If the model's context is not limited, `context` is None.
    """
    if context is None:
        return
    lengths = [len(prompt.ids) for prompt in prompts]
    longest = max(lengths, default=0)
    room = context - decoding.max_new_tokens
    if longest <= room:
        return
    count = sum(length > room for length in lengths)
    raise DataError(
        f"the model's context is too short for {count} of {count_of(len(prompts), 'prompt')}",
        where=prompts[lengths.index(longest)].where,
        why=f"the longest prompt has {longest} tokens, and the context has {context} tokens, of "
        f"which {decoding.max_new_tokens} are reserved for the answer",
        fix="shorten the long rows, or use a smaller --max-new-tokens",
    )


def make_prompt(
    row: dict[str, object], where: str, loaded: LoadedModel, source: Source
) -> RowPrompt:
    """Build the prompt of a row, and separate the answer that the row contains.

    Raise DataError if the row is invalid.

    Args:
        source: format and columns of the row.
    """
    template = loaded.template
    complete_row, is_answered = _with_answer(row, source, where)
    sample = convert_sample(complete_row, source, where=where, system=loaded.system)
    prompt_ids = list(template.prompt(sample, where=where))
    pictures = pictures_of(sample)
    scored = ScoredRow("", "", row, where)
    if is_answered:
        scored = make_scored_row(template, sample, row, where)
    return RowPrompt(prompt_ids, where, scored, pictures)


def row_with_answer(
    row: dict[str, object], source: Source, where: str, answer: str
) -> dict[str, object]:
    """Return a row for SFT: a copy of the row in which `answer` replaces the answer."""
    form = ROW_FORMATS[source.format]
    column = source.columns.get(form.answer, form.answer)
    complete, _ = _with_answer(row, source, where)
    value = RowReader(complete, source, where).text_or_messages(complete.get(column), column)
    if not isinstance(value, list):
        return {**row, column: answer}
    role, text = ("from", "value") if source.format == "sharegpt" else ("role", "content")
    last = {role: value[-1][role], text: answer}
    return {**row, column: [*value[:-1], last]}


def _with_answer(
    row: dict[str, object], source: Source, where: str
) -> tuple[dict[str, object], bool]:
    """Return the row with an answer, and whether the row already contained one.

    If the answer is missing, a placeholder is inserted.
    """
    if source.format == "text":
        return row, False
    form = ROW_FORMATS[source.format]
    column = source.columns.get(form.answer, form.answer)
    reader = RowReader(row, source, where)
    # The column can contain messages as JSON text.
    value = reader.text_or_messages(row.get(column), column)
    role_key = "role"
    placeholder = {"role": "assistant", "content": ANSWER_PLACEHOLDER}
    if form.answers_in_text:
        if value not in (None, ""):
            return row, True
        # If the prompt is a list of messages, the answer must also be a list of messages.
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
