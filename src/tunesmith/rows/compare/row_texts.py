"""Extraction of a row's prompt and answer as plain text, so that rows can be compared.

The text does not depend on a chat template or a tokenizer. Therefore rows can be compared before
the model is loaded, and the result is the same for every model.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from tunesmith.config.schema import Source
from tunesmith.errors import DataError
from tunesmith.rows.formats import convert_row
from tunesmith.rows.pictures import picture_digest, read_picture
from tunesmith.rows.samples import (
    Completion,
    Conversation,
    Message,
    Picture,
    Sample,
    Text,
    pictures_of,
)
from tunesmith.rows.source.open_source import Rows, count_characters
from tunesmith.rows.source.table import Row
from tunesmith.units import ceil_div

# Maximum number of rows that are compared. If a data set has more rows, only every k-th row is
# compared.
MAX_ROWS = 200_000
# Maximum number of characters of all compared prompts and answers, which are held in memory.
MAX_CHARACTERS = 200_000_000
# Maximum length of a compared prompt or answer. If a text is longer, only its start and its end are
# compared.
MAX_TEXT_CHARACTERS = 4_000
# Size of the sample of rows from which the average length of a row is estimated.
_MEASURED_ROWS = 200


class RowText(NamedTuple):
    """The text of one row.

    Attributes:
        prompt: the text before the last answer. Empty for plain text.
        answer: the last answer, both answers of a preference pair, or the entire plain text.
        is_answered: whether the row is a prompt with one answer to learn. False for pairs, feedback
            and plain text.
        given: the tool schemas as JSON and the digests of the pictures, because the answer depends
            on them, too.
        is_plain: whether the row is plain text.
        chosen: the chosen answer of a pair, or "".
        is_good: whether the answer of a feedback row is good. None for other rows.
    """

    prompt: str
    answer: str
    is_answered: bool
    given: str = ""
    is_plain: bool = False
    chosen: str = ""
    is_good: bool | None = None


def limits() -> list[int]:
    """Return the limits that determine which rows and texts are compared.

    The limits are a part of cache keys, because other limits give other findings.
    """
    return [MAX_ROWS, MAX_CHARACTERS, MAX_TEXT_CHARACTERS]


def sampled_rows(sources: Sequence[tuple[Source, Rows]]) -> range:
    """Return the numbers of the rows that are compared. Rows are counted over all sources.

    If the sources exceed MAX_ROWS or MAX_CHARACTERS, only every k-th row is compared, starting with
    the first row.
    """
    total = sum(len(rows) for _, rows in sources)
    # Estimate the average number of compared characters per row from a sample of rows.
    characters = 0
    measured = range(0, total, max(1, total // _MEASURED_ROWS))
    for _, rows, own in by_source(sources, measured):
        for i in own:
            with suppress(DataError):  # Tokenization reports the broken row later.
                characters += min(2 * MAX_TEXT_CHARACTERS, count_characters(rows[i]))
    mean = max(1, characters // max(1, len(measured)))
    max_rows = max(1, min(MAX_ROWS, MAX_CHARACTERS // mean))
    return range(0, total, max(1, ceil_div(total, max_rows)))


def read_texts(sources: Sequence[tuple[Source, Rows]], indices: range) -> Iterator[RowText | None]:
    """Yield the text of each row. Yield None for a row that cannot be read.

    Tokenization reads every row and reports the error of such a row later.
    """
    for source, rows, own in by_source(sources, indices):
        for i in own:
            try:
                yield row_text(rows[i], source, rows.where(i))
            except DataError:
                yield None


def by_source(
    sources: Sequence[tuple[Source, Rows]], indices: range
) -> Iterator[tuple[Source, Rows, range]]:
    """Convert row numbers that count over all sources to row numbers within each source.

    Yields:
        A source, its rows, and the numbers of the selected rows, counted from 0 in this source.
    """
    first = 0
    for source, rows in sources:
        yield source, rows, range(-first % indices.step, len(rows), indices.step)
        first += len(rows)


def row_text(values: Row, source: Source, where: str = "") -> RowText:
    """Return the text of one row. Raise DataError if the row does not have the source's format."""
    row = convert_row(values, source, where=where)
    sample = row.samples[0]
    prompt = _prompt_and_answer(sample)[0]
    answers = [_prompt_and_answer(sample)[1] for sample in row.samples]
    chosen = answers[0] if len(answers) > 1 else ""
    given = " ".join(map(_identity, pictures_of(sample)))
    if isinstance(sample, Conversation) and sample.tools:
        given = json.dumps(sample.tools, sort_keys=True, default=str) + given
    return RowText(
        _ends(prompt),
        _ends("\n".join(answers)),
        is_answered=row.is_answered,
        given=given,
        is_plain=isinstance(sample, Text),
        chosen=_ends(chosen),
        is_good=row.is_good,
    )


def _identity(picture: Picture) -> str:
    """Return the digest of a picture's content, or its path if the picture cannot be read."""
    try:
        return f"{picture_digest(read_picture(picture, '')):x}"
    except DataError:
        return str(picture.path)


def _prompt_and_answer(sample: Sample) -> tuple[str, str]:
    if isinstance(sample, Text):
        return "", sample.text
    if isinstance(sample, Completion):
        prompt = "\n".join(filter(None, (sample.system, sample.prompt)))
        return prompt, sample.completion
    # The last message is an answer, see `check_order`.
    *messages, last = map(_message_text, sample.messages)
    return "\n".join(messages), last


def _message_text(message: Message) -> str:
    """Return the text and the tool calls of a message as one text, without its reasoning."""
    calls = [
        json.dumps(call["function"], sort_keys=True, default=str)
        for call in message.get("tool_calls") or ()
    ]
    return "\n".join(filter(None, (message["content"], *calls)))


def _ends(text: str) -> str:
    if len(text) <= MAX_TEXT_CHARACTERS:
        return text
    half = MAX_TEXT_CHARACTERS // 2
    return f"{text[:half]}\n{text[-half:]}"
