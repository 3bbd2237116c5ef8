"""The prompt and the answer of a row as plain text, by which rows are compared.

No template and no tokenizer enters, so that a recipe's rows are compared before either is loaded,
and alike for every model.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from tunesmith.config.schema import Source
from tunesmith.data.rows.formats import convert_row
from tunesmith.data.rows.pictures import picture_digest, read_picture
from tunesmith.data.rows.samples import (
    Completion,
    Conversation,
    Message,
    Picture,
    Sample,
    Text,
    pictures_of,
)
from tunesmith.data.source.open_source import Rows, count_characters
from tunesmith.data.source.table import Row
from tunesmith.errors import DataError
from tunesmith.units import ceil_div

# More rows are sampled: every second one, every third, and so on.
MAX_ROWS = 200_000
# Of all prompts and answers that are held in memory.
MAX_CHARACTERS = 200_000_000
# Of a longer prompt or answer only both ends are compared.
MAX_TEXT_CHARACTERS = 4_000
# Rows whose length says how long the others are.
_MEASURED_ROWS = 200


class RowText(NamedTuple):
    """One row.

    Attributes:
        prompt: all before the last answer; empty for plain text.
        answer: the last answer; of a pair both; of plain text the whole.
        is_answered: the row has one right answer: it is no pair, no feedback and no plain text.
        given: what an answer depends on too: its tool schemas as JSON, and the digests of its
            pictures.
        is_plain: the row is plain text.
        chosen: of a pair, the answer of both that is the better one.
        is_good: of feedback, whether the answer is good; None for any other row.
    """

    prompt: str
    answer: str
    is_answered: bool
    given: str = ""
    is_plain: bool = False
    chosen: str = ""
    is_good: bool | None = None


def limits() -> list[int]:
    """List the limits that decide which rows are compared, and what of them."""
    return [MAX_ROWS, MAX_CHARACTERS, MAX_TEXT_CHARACTERS]


def sampled_rows(sources: Sequence[tuple[Source, Rows]]) -> range:
    """The indices, over all sources together, of the rows that are compared.

    All of them up to MAX_ROWS and MAX_CHARACTERS; of a larger corpus every k-th row, the first
    among them.
    """
    total = sum(len(rows) for _, rows in sources)
    most = min(MAX_ROWS, max(1, MAX_CHARACTERS // max(1, _mean_characters(sources, total))))
    return range(0, total, max(1, ceil_div(total, most)))


def _mean_characters(sources: Sequence[tuple[Source, Rows]], total: int) -> int:
    """Return the average number of characters of a row that are compared, by a sample of rows."""
    characters = 0
    measured = range(0, total, max(1, total // _MEASURED_ROWS))
    for _, rows, own in by_source(sources, measured):
        for i in own:
            with suppress(DataError):  # tokenization names the row
                characters += min(2 * MAX_TEXT_CHARACTERS, count_characters(rows[i]))
    return characters // max(1, len(measured))


def read_texts(sources: Sequence[tuple[Source, Rows]], indices: range) -> Iterator[RowText | None]:
    """The text of each of these rows; None for one that cannot be read.

    Tokenization, which reads every row, names that one with its fault.
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
    """Each source with those of some indices over all sources that are its own, from 0."""
    first = 0
    for source, rows in sources:
        yield source, rows, range(-first % indices.step, len(rows), indices.step)
        first += len(rows)


def row_text(values: Row, source: Source, where: str = "") -> RowText:
    """The text of one row; DataError where it is not of the source's format."""
    row = convert_row(values, source, where=where)
    sample, *others = row.samples
    prompt, answer = _prompt_and_answer(sample)
    chosen = ""
    for rejected in others:
        chosen = answer
        answer = f"{chosen}\n{_prompt_and_answer(rejected)[1]}"
    given = " ".join(map(_identity, pictures_of(sample)))
    if isinstance(sample, Conversation) and sample.tools:
        given = json.dumps(sample.tools, sort_keys=True, default=str) + given
    return RowText(
        _ends(prompt),
        _ends(answer),
        is_answered=row.is_answered,
        given=given,
        is_plain=isinstance(sample, Text),
        chosen=_ends(chosen),
        is_good=row.is_good,
    )


def _identity(picture: Picture) -> str:
    """Tell a picture from others by its content; tokenization names one that cannot be read."""
    try:
        return f"{picture_digest(read_picture(picture, '')):x}"
    except DataError:
        return str(picture.path)


def _prompt_and_answer(sample: Sample) -> tuple[str, str]:
    if isinstance(sample, Text):
        return "", sample.text
    if isinstance(sample, Completion):
        return "\n".join(filter(None, (sample.system, sample.prompt))), sample.completion
    last = len(sample.messages) - 1
    while last > 0 and sample.messages[last]["role"] != "assistant":
        last -= 1
    prompt = "\n".join(map(_message_text, sample.messages[:last]))
    return prompt, _message_text(sample.messages[last])


def _message_text(message: Message) -> str:
    """Join what a message says and calls; how an answer was reasoned is no part of it."""
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
