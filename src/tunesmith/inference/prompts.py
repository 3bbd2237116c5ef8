"""Rows -> questions to a trained model: the prompt in the form that was trained, and the answer if the row has one.

A row may be of any format that trains, with its answer or without. The last assistant turn, the output or the
completion is taken off and kept as the reference; a row that has none is asked as it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.config.schema import Data, Source
from tunesmith.data.formats import Conversation, Sample, convert_row
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.data.batch import Example
    from tunesmith.data.source import Rows
    from tunesmith.data.template import Template

# The column that tells a format, in the order in which it is looked for.
TOLD_BY = {
    "messages": "messages",
    "conversations": "sharegpt",
    "instruction": "alpaca",
    "prompt": "prompt-completion",
    "text": "text",
}
FORMATS = tuple(TOLD_BY.values())
_LATER = "?"  # stands in for the answer of a row that has none, so that the row converts; never read


@dataclass(frozen=True)
class Prompt:
    """One row to answer.

    Attributes:
        row: as it was read.
        where: its place, for messages.
        prompt: token ids up to where the answer starts.
        reference: the text of the answer that the row holds, or None.
    """

    row: dict[str, Any]
    where: str
    prompt: list[int]
    reference: str | None


def source_of(row: dict[str, Any], where: str, asked: str, known: Sequence[Source]) -> Source:
    """How to read a row: the format that was asked for, else that of a known source whose columns it has, else by its columns.

    Raises:
        DataError: no column tells.
    """
    if asked != "auto":
        return Source(source=where, format=asked)  # type: ignore[arg-type]
    for source in known:
        if source.columns and set(source.columns.values()) <= set(row):
            return source
    for column, name in TOLD_BY.items():
        if column in row:
            return Source(source=where, format=name)  # type: ignore[arg-type]
    raise DataError(
        "cannot tell the format of the row",
        where=where,
        why=f"its columns are {', '.join(map(repr, row)) or 'none'}; looked for {', '.join(TOLD_BY)}",
        fix="rename a column, or say --format",
    )


def prompts_of(
    rows: Rows,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    asked: str = "auto",
    known: Sequence[Source] = (),
    system: str | None = None,
) -> list[Prompt]:
    """Every row as a question.

    Args:
        asked: a format, or `auto`.
        known: sources of the run, whose column mappings are tried first.
        system: the run's system message, for conversations that have none.

    Raises:
        DataError: a row that is broken or has nothing to answer, by its place.
    """
    found = []
    for i in range(len(rows)):
        row, where = rows[i], rows.where(i)
        source = source_of(row, where, asked, known)
        whole, answered = with_answer(row, source)
        sample = convert_row(whole, source, where=where, system=system)
        if isinstance(sample, Conversation):
            _check_end(sample, where)
        answer = reference(sample, template, tokenizer, where=where) if answered else None
        found.append(Prompt(row, where, list(template.prompt(sample)), answer))
    return found


def with_answer(row: dict[str, Any], source: Source) -> tuple[dict[str, Any], bool]:
    """The row with an answer, its own or a stand-in, and whether it is its own."""
    name = {"alpaca": "output", "prompt-completion": "completion", "messages": "messages", "sharegpt": "conversations"}
    if source.format == "text":
        return row, False
    column = source.columns.get(name[source.format], name[source.format])
    value = row.get(column)
    if source.format in ("alpaca", "prompt-completion"):
        if value not in (None, ""):
            return row, True
        listed = isinstance(row.get(source.columns.get("prompt", "prompt")), list)
        return {**row, column: [{"role": "assistant", "content": _LATER}] if listed else _LATER}, False
    key, answers = ("role", ("assistant", "model")) if source.format == "messages" else ("from", _SHAREGPT_ANSWERS)
    if not isinstance(value, list) or not value or not isinstance(value[-1], dict) or value[-1].get(key) in answers:
        return row, True
    stand_in = {"role": "assistant", "content": _LATER} if key == "role" else {"from": "gpt", "value": _LATER}
    return {**row, column: [*value, stand_in]}, False


_SHAREGPT_ANSWERS = ("gpt", "assistant", "model", "chatgpt", "bot", "function_call", "tool_call")


def _check_end(sample: Conversation, where: str) -> None:
    if sample.messages[-1]["role"] != "assistant":
        raise DataError(
            "the conversation ends with neither a question nor an answer",
            where=where,
            why=f"its last message is of the role {sample.messages[-1]['role']}",
            fix="end it with the turn to answer, or with the answer",
        )


def reference(sample: Sample, template: Template, tokenizer: PreTrainedTokenizerBase, *, where: str) -> str:
    """The text that a perfect answer decodes to: the tokens learnt in the last turn, up to its end token.

    Taken from the tokens rather than from the row, so that tool calls, reasoning and what the template trims are
    compared in the form in which the model writes them.
    """
    example = template.encode(sample, "last", where=where)
    ids = example.ids[example.trained].tolist()
    end = next((i for i, token in enumerate(ids) if token in template.stops), len(ids))
    return str(tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))


def first_examples(sources: Sequence[Source], data: Data, template: Template, count: int) -> list[Example]:
    """The first rows of the first source as tokens, as they are trained; none where there is no source."""
    from tunesmith.data.source import read_rows

    if not sources:
        return []
    rows = read_rows(sources[0])
    found = []
    for i in range(min(count, len(rows))):
        sample = convert_row(rows[i], sources[0], where=rows.where(i), system=data.system)
        found.append(template.encode(sample, data.train_on, where=rows.where(i)))
    return found
