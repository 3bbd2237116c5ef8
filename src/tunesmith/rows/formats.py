"""Conversion of a row of any format to a sample.

`config/row_formats.py` defines the formats and their columns, and `_ROW_READERS` has one reader for
each format. `messages.py` reads the turns and `picture_places.py` the pictures. Nothing is guessed.
A row raises an error with its file and line if training would ignore something important in it: an
unknown role, a video, a loss weight of 0.5, or a label that calls the answer bad. Unknown columns
and keys raise no error. They are counted and reported.
"""

import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from tunesmith.config.row_formats import FormatName
from tunesmith.config.schema import Source
from tunesmith.errors import DataError
from tunesmith.rows.columns import is_absent, is_harmless, plain, role_key_of
from tunesmith.rows.labels import (
    check_no_bad_label,
    read_label,
)
from tunesmith.rows.messages import (
    MESSAGE,
    TURN,
    Form,
    any_messages,
    calls_in_text,
    check_answers,
    check_order,
    has_answer,
    read_messages,
    read_system,
    read_tools,
    with_row_system,
)
from tunesmith.rows.picture_places import check_media, read_column_pictures, with_pictures
from tunesmith.rows.row_masks import check_row_mask
from tunesmith.rows.row_reader import RowReader
from tunesmith.rows.samples import (
    Completion,
    Conversation,
    Message,
    RowSamples,
    Sample,
    Text,
    with_system,
)
from tunesmith.rows.source.folders import SPLIT_NAMES
from tunesmith.rows.source.table import json_type

# Names of columns whose value is the split of the row, such as "train".
SPLIT_COLUMNS = ("split", "subset")


def convert_row(
    row: Mapping[str, object],
    source: Source,
    *,
    where: str,
    system: str | None = None,
    unread: set[str] | None = None,
    is_trained: bool = True,
) -> RowSamples:
    """Convert one row to samples.

    Args:
        row: column names and values from the file. A null value counts as a missing column.
        source: the data source with its `format` and `columns` (the format's column name -> the
            file's column name).
        where: file and line of the row, for error messages.
        system: the system message for conversations without one (`data.system`).
        unread: set to which the names of all columns that are not read are added, and the keys of
            turns and calls that are not read.
        is_trained: whether the row is used for training. If False, the model only answers or scores
            the row, so its loss masks and labels are not checked, and a missing answer is empty.

    Raises:
        DataError: the row does not have this format.
    """
    reader = RowReader(row, source, where, is_trained=is_trained)
    reader.column_pictures = read_column_pictures(reader)
    samples = _ROW_READERS[source.format](reader)
    is_answered = source.format not in ("preference", "feedback", "text", "prompt")
    check_media(reader)
    if is_trained:
        check_row_mask(reader)
        if is_answered:
            check_no_bad_label(reader)
    if unread is not None:
        unread |= reader.unread
        conversations = [sample for sample in samples if isinstance(sample, Conversation)]
        texts = [text for chat in conversations for text in _texts_of(chat.messages)]
        for column, value in reader.unread_columns().items():
            if isinstance(value, str) and value.strip() in texts:
                continue  # The column only repeats a message, such as the first question.
            if not is_harmless(column) or _is_held_out(column, value):
                unread.add(column)
    completed = tuple(_complete(reader, sample, system) for sample in samples)
    if is_trained and is_answered:
        for sample in completed:
            check_answers(reader, sample)
    return RowSamples(completed, is_answered, reader.is_good)


def _is_held_out(column: str, value: object) -> bool:
    """Return True if the column and its value say that the row is in another split than `train`."""
    if plain(column) not in SPLIT_COLUMNS or not isinstance(value, str):
        return False
    return SPLIT_NAMES.get(value.strip().lower(), "train") != "train"


def convert_sample(
    row: Mapping[str, object], source: Source, *, where: str, system: str | None = None
) -> Sample:
    """Convert a row that is not used for training to one sample.

    For a pair, this is the sample of the chosen answer.
    """
    return convert_row(row, source, where=where, system=system, is_trained=False).samples[0]


def _complete(reader: RowReader, sample: Sample, system: str | None) -> Sample:
    """Add the pictures, the indices of untrained turns and the recipe's system message to a sample.

    Raise DataError if the roles of its messages are out of order.
    """
    if isinstance(sample, Completion) and sample.system is None:
        return replace(sample, system=system)
    if not isinstance(sample, Conversation):
        return sample
    check_order(reader, sample.messages)
    sample = with_pictures(reader, sample)
    messages = with_system(sample.messages, system)
    prompt_messages = sample.prompt_messages
    if prompt_messages:
        # If `with_system` has added a system message, count this message as a part of the prompt.
        prompt_messages += len(messages) - len(sample.messages)
    untrained = set()
    for i, message in enumerate(messages):
        if not message.pop("train", True):
            untrained.add(i)
    return replace(
        sample,
        messages=messages,
        prompt_messages=prompt_messages,
        untrained=frozenset(untrained),
    )


def _alpaca(row: RowReader) -> list[Sample]:
    instruction = _no_messages(row, row.required("instruction"), "instruction")
    output = _no_messages(row, row.required("output"), "output")
    extra = row.optional("input")
    extra_text = "" if extra is None else row.text(extra, "input")
    question = f"{instruction}\n{extra_text}" if extra_text else instruction
    earlier = with_row_system(row, _history(row))
    messages: list[Message] = [
        *earlier,
        {"role": "user", "content": question},
        {"role": "assistant", "content": output},
    ]
    # The Alpaca template supports only a single turn, without a history or a system message.
    parts = None if earlier else (instruction, extra_text, output)
    return [Conversation(messages, instruction=parts)]


def _history(row: RowReader) -> list[Message]:
    """Read the earlier turns in the column `history`.

    They are [question, answer] pairs or messages.
    """
    history = row.optional("history")
    if role_key_of(history):
        return any_messages(row, history, "history")
    messages: list[Message] = []
    if is_absent(history):
        return messages
    for n, turn in enumerate(row.list(history, "history"), 1):
        at = f"history {n}"
        pair = row.list(turn, at)
        if len(pair) != 2:
            raise row.error(
                f"{at} is not a pair: its length is {len(pair)}",
                fix="write each entry as a pair: [instruction, answer]",
            )
        question, answer = pair
        messages.append({"role": "user", "content": row.text(question, at)})
        messages.append({"role": "assistant", "content": row.text(answer, at)})
    return messages


def _no_messages(row: RowReader, value: object, column: str) -> str:
    """Return a column's text. Raise DataError if the text is a JSON list of messages.

    The alpaca format has only texts, so it would train on such JSON as ordinary text.
    """
    read = row.text_or_messages(value, column)
    if isinstance(value, str) and not isinstance(read, str):
        mapped = row.source.columns
        pair = {
            "prompt": mapped.get("instruction", "instruction"),
            "completion": mapped.get("output", "output"),
        }
        chats = row.setting(format="prompt-completion", columns=pair)
        raise row.error(
            f"the column {column} has a JSON list of messages, not a text",
            fix=f"use {chats}, or write only the text",
        )
    return row.text(value, column)


def _chat(row: RowReader, column: str, form: Form) -> list[Sample]:
    messages = read_messages(row, row.required(column), column, form)
    if not row.is_trained and messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return [Conversation(with_row_system(row, messages), read_tools(row))]


def _prompt_completion(row: RowReader) -> list[Sample]:
    return _answered(
        row,
        row.required_text_or_messages("prompt"),
        {"completion": row.required_text_or_messages("completion")},
    )


def _prompt(row: RowReader) -> list[Sample]:
    """Return a prompt with an empty answer. The model does not see the answer."""
    return _answered(row, row.required_text_or_messages("prompt"), {"completion": ""})


def _answered(row: RowReader, prompt: object, answers: Mapping[str, object]) -> list[Sample]:
    """Return one sample for each answer to a prompt.

    Args:
        prompt: a text or messages.
        answers: column name -> a text or messages. If the prompt and all answers are texts, and the
            row has no tools and pictures, the samples are plain texts. Otherwise they are
            conversations, because only a chat template can render them.
    """
    samples: list[Sample] = []
    tools = read_tools(row)
    are_texts = all(isinstance(value, str) for value in (prompt, *answers.values()))
    if are_texts and tools is None and not row.column_pictures:
        question = row.text(prompt, "prompt")
        system = read_system(row)
        return [Completion(question, row.text(text, at), system) for at, text in answers.items()]
    messages = _messages_of(row, prompt, "prompt", "user")
    if messages[-1]["role"] == "assistant":
        raise row.error(
            "the prompt ends with an answer",
            why="a template would write a second answer instead of continuing the first one",
            fix="delete the last message of the prompt, or write its text before each answer",
        )
    messages = with_row_system(row, messages)
    for column, value in answers.items():
        reply = _messages_of(row, value, column, "assistant")
        if reply[-1]["role"] != "assistant":
            raise row.error(
                f"{column} ends with a message of the {reply[-1]['role']}",
                why="the last message must be the answer",
            )
        if messages[-1]["role"] == reply[0]["role"] == "user":
            raise row.error(
                f"{column} begins with a message of the user",
                why="the prompt already ends with a message of the user",
                fix=f"write only the answer into {column}, without the messages of the prompt",
            )
        calls = calls_in_text(row, reply[0]["content"]) if are_texts and tools else []
        if calls:
            reply = [{"role": "assistant", "content": "", "tool_calls": calls}]
        # Copy the messages, because each conversation changes its messages later.
        turns = [message.copy() for message in messages + reply]
        samples.append(Conversation(turns, tools, prompt_messages=len(messages)))
    return samples


def _messages_of(row: RowReader, value: object, column: str, role: str) -> list[Message]:
    """Convert a text, a message or a list of messages to messages.

    Args:
        role: the role of a message that is made from a text.
    """
    if isinstance(value, list | Mapping):
        if not role_key_of(value) and not role_key_of([value]):
            own = row.source.columns.get(column, column)
            as_text = row.change_by_jq(f".[{json.dumps(own)}] |= tojson")
            raise row.error(
                f"{own} is {json_type(value)}, not a text or messages",
                fix=f"write a text; for its JSON text: {as_text}",
            )
        return any_messages(row, value, column)
    return [{"role": role, "content": row.text(value, column)}]


def _compared(row: RowReader, prompt: object, answers: Mapping[str, object]) -> list[Sample]:
    """Return one sample for each answer. Raise DataError for an empty answer."""
    samples = _answered(row, prompt, answers)
    for column, sample in zip(answers, samples, strict=True):
        if not has_answer(sample):
            raise row.error(
                f"{column} is empty",
                why="an answer without tokens cannot be compared",
                fix="write the answer, or delete the row",
            )
    return samples


def _text(row: RowReader) -> list[Sample]:
    text = row.text(row.required("text"), "text")
    if not text:
        raise row.error("the text is empty", fix="delete the row")
    return [Text(text)]


def _preference(row: RowReader) -> list[Sample]:
    """Return the chosen and the rejected sample of a preference pair, with the same prompt."""
    chosen = row.required_text_or_messages("chosen")
    rejected = row.required_text_or_messages("rejected")
    prompt = _pair_prompt(row)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            shared_text = _shared_text(row, chosen, rejected)
            prompt = shared_text
            chosen = chosen.removeprefix(shared_text)
            rejected = rejected.removeprefix(shared_text)
        return _compared(row, prompt, {"chosen": chosen, "rejected": rejected})
    chosen_turns = _messages_of(row, chosen, "chosen", "assistant")
    rejected_turns = _messages_of(row, rejected, "rejected", "assistant")
    if chosen_turns[0]["role"] == "assistant":
        if prompt is None:
            prompt = row.required("prompt")
        return _compared(row, prompt, {"chosen": chosen_turns, "rejected": rejected_turns})
    shared = _shared_beginning(row, chosen_turns, rejected_turns)
    if not is_absent(prompt):
        prompt_texts = _texts_of(_messages_of(row, prompt, "prompt", "user"))
        if not set(prompt_texts) <= set(_texts_of(shared)):
            raise row.error(
                "the prompt differs from the first messages of chosen and rejected",
                fix="make these messages equal, or remove the prompt",
            )
    count = len(shared)
    answers = {"chosen": chosen_turns[count:], "rejected": rejected_turns[count:]}
    return _compared(row, shared, answers)


def _pair_prompt(row: RowReader) -> object:
    """Read the prompt of a preference pair: a text or messages.

    Return None if the row has no prompt column. In this case both answers start with the prompt.
    """
    prompt = row.text_or_messages(row.optional("prompt"), "prompt")
    conversations = row.optional("conversations")
    # If the recipe names the prompt column, use that column and ignore `conversations`.
    if conversations is not None and "prompt" not in row.source.columns:
        if not is_absent(prompt):
            raise row.error(
                "the row has both prompt and conversations",
                fix="delete one of these columns",
            )
        prompt = row.json(conversations, "conversations")
    if isinstance(prompt, Mapping) and "messages" in prompt:
        # In OpenAI's preference format, the prompt is an object that contains the messages and the
        # tools.
        row.row = {"tools": prompt.get("tools"), **row.row}
        prompt = prompt["messages"]
    return _with_input(row, prompt)


def _with_input(row: RowReader, prompt: object) -> object:
    """Return the prompt followed by the row's column `input`, as in the alpaca format."""
    extra = row.optional("input")
    if is_absent(extra):
        return prompt
    if not isinstance(prompt, str):
        raise row.error(
            "the row has a column input, but no prompt that is a text",
            fix="write the input into the messages of the prompt, or delete the column input",
        )
    return f"{prompt}\n{row.text(extra, 'input')}"


def _feedback(row: RowReader) -> list[Sample]:
    """Return the sample of a row with a label, and set `row.is_good` to the label."""
    label = row.required("label")
    row.is_good = read_label(label)
    if row.is_good is None:
        raise row.error(
            f"the label is {json.dumps(label, default=str)}, which means neither good nor bad",
            why="1, true, yes, good, desirable or a thumb up means a good answer, and their"
            " opposites mean a bad answer",
            fix="write true or false, or delete the row",
        )
    # If the recipe names the prompt column, use that column and ignore `messages`.
    if "prompt" not in row.source.columns:
        value = row.optional("messages")
        if value is not None:
            messages = any_messages(row, value, "messages")
            return _compared(row, messages[:-1], {"the last message": messages[-1:]})
    question = _with_input(row, row.required_text_or_messages("prompt"))
    return _compared(row, question, {"completion": row.required_text_or_messages("completion")})


def _shared_beginning(
    row: RowReader, chosen: list[Message], rejected: list[Message]
) -> list[Message]:
    """Return the messages with which both `chosen` and `rejected` start.

    At least the last message of each conversation is not shared.
    """
    count = _count_shared(chosen[:-1], rejected[:-1])
    # Shorten the prompt until an answer follows it, because the model learns from the messages
    # after the prompt.
    while count and chosen[count]["role"] != "assistant":
        count -= 1
    if not count:
        raise _not_shared(row)
    return chosen[:count]


def _count_shared(chosen: Sequence[object], rejected: Sequence[object]) -> int:
    """Return the number of items with which both sequences start."""
    return [*map(operator.eq, chosen, rejected), False].index(False)


def _shared_text(row: RowReader, chosen: str, rejected: str) -> str:
    """Return the text that both answers start with, up to the first word that differs."""
    prompt = chosen[: _count_shared(chosen, rejected)]
    # End the prompt after an entire word, so that its tokens are the same in both answers.
    while prompt and not prompt[-1].isspace():
        prompt = prompt[:-1]
    if not prompt.strip():
        raise _not_shared(row)
    return prompt


def _not_shared(row: RowReader) -> DataError:
    return row.error(
        "chosen and rejected do not begin with the same prompt",
        why="if there is no column prompt, both answers must begin with the prompt",
        fix=row.propose_columns('write {"prompt": "...", "chosen": "...", "rejected": "..."}'),
    )


def _texts_of(messages: list[Message]) -> list[str]:
    return [message["content"].strip() for message in messages]


# Row format -> function that converts a row of this format to one sample, or to two for a pair.
_ROW_READERS: dict[FormatName, Callable[[RowReader], Sequence[Sample]]] = {
    "alpaca": _alpaca,
    "messages": partial(_chat, column="messages", form=MESSAGE),
    "sharegpt": partial(_chat, column="conversations", form=TURN),
    "prompt-completion": _prompt_completion,
    "text": _text,
    "preference": _preference,
    "feedback": _feedback,
    "prompt": _prompt,
}
