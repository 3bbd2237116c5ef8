"""A row of any of the formats -> a sample.

The columns are those of `config/row_formats.py`, and `_ROW_READERS` has the readers; turns
are read by `messages.py`, pictures by `picture_places.py`. Nothing is guessed. A row with something
that training would ignore (a role that no template knows, a video, a loss weight of 0.5, a label
beside an answer that is to be learned) is refused, by its place; what nothing knows is counted.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from tunesmith.config.row_formats import FormatName
from tunesmith.config.schema import Source
from tunesmith.data.rows.labels import (
    check_no_bad_label,
    grades_of,
    has_other_preference,
    read_label,
)
from tunesmith.data.rows.marks import check_row_marks
from tunesmith.data.rows.messages import (
    MESSAGE,
    TURN,
    Form,
    any_messages,
    calls_in_text,
    check_order,
    is_said,
    read_messages,
    read_system,
    read_tools,
    with_row_system,
)
from tunesmith.data.rows.picture_places import check_media, read_column_pictures, with_pictures
from tunesmith.data.rows.row_reader import (
    RowReader,
    is_absent,
    is_harmless,
    plain,
    role_key_of,
)
from tunesmith.data.rows.samples import (
    Completion,
    Conversation,
    Message,
    RowSamples,
    Sample,
    Text,
    with_system,
)
from tunesmith.data.source.folders import SPLIT_NAMES
from tunesmith.errors import DataError

# Columns that name the split of a row.
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
    """Convert one row.

    Args:
        row: column names and values as the file has them; null counts as absent.
        source: gives `format` and `columns` (the format's name of a column: the file's name of it).
        where: the row's place, for the DataError of one that is not of this format.
        system: a system message for conversations that have none (`data.system`).
        unread: gets the names of columns, and of keys of turns and calls, that nothing reads.
        is_trained: False where the row is answered or scored alone: its own marks and label, which
            say how an answer is trained on, are then no fault.
    """
    reader = RowReader(row, source, where)
    reader.column_pictures = read_column_pictures(reader)
    samples = _ROW_READERS[source.format](reader)
    row_samples = RowSamples(tuple(samples), reader.is_good)
    check_media(reader)
    if is_trained:
        check_row_marks(reader)
        if row_samples.is_answered:
            check_no_bad_label(reader)
            row_samples = replace(row_samples, grades=grades_of(reader))
        elif len(samples) == 2:
            is_other = has_other_preference(reader)
            row_samples = replace(row_samples, has_other_preference=is_other)
    if unread is not None:
        unread |= reader.unread
        texts = [
            text for s in samples if isinstance(s, Conversation) for text in _texts_of(s.messages)
        ]
        for column, value in reader.unread_columns().items():
            # Many chats have their first question in a column of its own, too.
            is_repeated = isinstance(value, str) and value.strip() in texts
            if is_repeated or (is_harmless(column) and not _is_held_out(column, value)):
                continue
            unread.add(column)
    completed = tuple(_complete(reader, sample, system) for sample in samples)
    return replace(row_samples, samples=completed)


def _is_held_out(column: str, value: object) -> bool:
    """Tell whether a column says that its row is not of the split to train on."""
    if plain(column) not in SPLIT_COLUMNS or not isinstance(value, str):
        return False
    return SPLIT_NAMES.get(value.strip().lower(), "train") != "train"


def convert_sample(
    row: Mapping[str, object], source: Source, *, where: str, system: str | None = None
) -> Sample:
    """Convert a row as `convert_row`; of a pair the chosen answer."""
    return convert_row(row, source, where=where, system=system, is_trained=False).samples[0]


def _complete(reader: RowReader, sample: Sample, system: str | None) -> Sample:
    """The sample with its pictures, its untrained turns and the recipe's system message, in a
    checked order.
    """
    if isinstance(sample, Completion):
        return sample if sample.system is not None else replace(sample, system=system)
    if not isinstance(sample, Conversation):
        return sample
    check_order(reader, sample.messages)
    sample = with_pictures(reader, sample)
    messages = with_system(sample.messages, system)
    prompt_messages = sample.prompt_messages
    if prompt_messages:
        # A system message in front of them is part of the prompt.
        prompt_messages += len(messages) - len(sample.messages)
    untrained = [i for i, message in enumerate(messages) if not message.pop("train", True)]
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
    messages = with_row_system(row, _history(row))
    # Only a row of one turn is what the Alpaca template writes.
    is_single_turn = not messages
    question = f"{instruction}\n{extra_text}" if extra_text else instruction
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": output})
    if is_single_turn:
        return [Conversation(messages, instruction=(instruction, extra_text, output))]
    return [Conversation(messages)]


def _history(row: RowReader) -> list[Message]:
    """The turns before the instruction: pairs of a question and its answer, or messages."""
    history = row.optional("history")
    if role_key_of(history):
        return any_messages(row, history, "history")
    messages: list[Message] = []
    turns = [] if is_absent(history) else row.list(history, "history")
    for n, turn in enumerate(turns, 1):
        pair = row.list(turn, f"history {n}")
        if len(pair) != 2:
            fix = "write pairs: [instruction, answer]"
            raise row.error(f"history {n} is not a pair: its length is {len(pair)}", fix=fix)
        question = row.text(pair[0], f"history {n}")
        answer = row.text(pair[1], f"history {n}")
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def _no_messages(row: RowReader, value: object, column: str) -> str:
    """A text that is not JSON of messages, which alpaca's format would train on as it stands."""
    if not isinstance(row.text_or_messages(value, column), str) and isinstance(value, str):
        fix = "format: prompt-completion, or write the text alone"
        raise row.error(f"{column} is JSON of messages, not a text", fix=fix)
    return row.text(value, column)


def _chat(row: RowReader, column: str, form: Form) -> list[Sample]:
    messages = read_messages(row, row.required(column), column, form)
    return [Conversation(with_row_system(row, messages), read_tools(row))]


def _prompt_completion(row: RowReader) -> list[Sample]:
    prompt = row.text_or_messages(row.required("prompt"), "prompt")
    completion = row.text_or_messages(row.required("completion"), "completion")
    return _answered(row, prompt, {"completion": completion})


def _answered(row: RowReader, prompt: object, answers: Mapping[str, object]) -> list[Sample]:
    """A sample for each answer to a prompt, by its column; texts if all of them are texts."""
    samples: list[Sample] = []
    texts = {column: answer for column, answer in answers.items() if isinstance(answer, str)}
    if isinstance(prompt, str) and len(texts) == len(answers):
        question = row.text(prompt, "prompt")
        for column, answer in texts.items():
            samples.append(_completed(row, question, row.text(answer, column)))
        return samples
    messages = _messages_of(row, prompt, "prompt", "user")
    if messages[-1]["role"] == "assistant":
        why = "the answer would be a second one behind it, and not go on with it"
        fix = "delete the last message of the prompt; or write its text in front of the answers"
        raise row.error("the prompt ends with an answer", why, fix)
    messages = with_row_system(row, messages)
    tools = read_tools(row)
    for column, value in answers.items():
        reply = _messages_of(row, value, column, "assistant")
        if reply[-1]["role"] != "assistant":
            what = f"{column} ends with a message of the {reply[-1]['role']}"
            raise row.error(what, "the last one must be the answer")
        if messages[-1]["role"] == reply[0]["role"] == "user":
            why = "the prompt stands before it already, and the question would be there twice"
            fix = f"write the answer alone into {column}, without what the prompt has"
            raise row.error(f"{column} begins with a message of the user", why, fix)
        # Copies: each conversation marks its own messages.
        turns = [message.copy() for message in messages + reply]
        samples.append(Conversation(turns, tools, prompt_messages=len(messages)))
    return samples


def _messages_of(row: RowReader, value: object, column: str, role: str) -> list[Message]:
    """The messages of a text of this role, of a message or of a list of them."""
    if isinstance(value, list | Mapping):
        return any_messages(row, value, column)
    return [{"role": role, "content": row.text(value, column)}]


def _compared(row: RowReader, prompt: object, answers: Mapping[str, object]) -> list[Sample]:
    """The samples of `_answered`; DataError if an answer is empty."""
    samples = _answered(row, prompt, answers)
    for column, sample in zip(answers, samples, strict=True):
        is_empty = isinstance(sample, Completion) and not sample.completion.strip()
        if is_empty or (isinstance(sample, Conversation) and not is_said(sample.messages[-1])):
            why = "an answer without tokens cannot be compared"
            raise row.error(f"{column} is empty", why, "write the answer, or delete the row")
    return samples


def _completed(row: RowReader, prompt: str, completion: str) -> Sample:
    """A prompt and its answer as texts; as two turns where the row has tools or pictures, for a
    template.
    """
    tools = read_tools(row)
    if tools is None and not row.column_pictures:
        return Completion(prompt, completion, read_system(row))
    messages = with_row_system(row, [{"role": "user", "content": prompt}])
    answer: Message = {"role": "assistant", "content": completion}
    calls = calls_in_text(row, completion) if tools is not None else []
    if calls:
        answer = {"role": "assistant", "content": "", "tool_calls": calls}
    return Conversation([*messages, answer], tools, prompt_messages=len(messages))


def _text(row: RowReader) -> list[Sample]:
    text = row.text(row.required("text"), "text")
    if not text:
        raise row.error("the text is empty", fix="delete the row")
    return [Text(text)]


def _preference(row: RowReader) -> list[Sample]:
    chosen = row.text_or_messages(row.required("chosen"), "chosen")
    rejected = row.text_or_messages(row.required("rejected"), "rejected")
    prompt = _pair_prompt(row)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is not None:
            return _compared(row, prompt, {"chosen": chosen, "rejected": rejected})
        prompt = _shared_text(row, chosen, rejected)
        length = len(prompt)
        return _compared(row, prompt, {"chosen": chosen[length:], "rejected": rejected[length:]})
    of_chosen = _messages_of(row, chosen, "chosen", "assistant")
    of_rejected = _messages_of(row, rejected, "rejected", "assistant")
    if of_chosen[0]["role"] == "assistant":
        prompt = row.required("prompt") if prompt is None else prompt
        return _compared(row, prompt, {"chosen": of_chosen, "rejected": of_rejected})
    shared = _shared_beginning(row, of_chosen, of_rejected)
    _check_shared(row, prompt, shared)
    own = {"chosen": of_chosen[len(shared) :], "rejected": of_rejected[len(shared) :]}
    return _compared(row, shared, own)


def _pair_prompt(row: RowReader) -> object:
    """Read the prompt of a pair: a text, messages, or None where both answers begin with it."""
    prompt = row.text_or_messages(row.optional("prompt"), "prompt")
    conversations = row.optional("conversations")
    # A prompt that the recipe names is the one that is meant.
    if conversations is not None and "prompt" not in row.source.columns:
        if not is_absent(prompt):
            why = "each of them is what chosen and rejected answer"
            raise row.error("the row has both prompt and conversations", why, "delete one of them")
        prompt = row.json(conversations, "conversations")
    if isinstance(prompt, Mapping) and "messages" in prompt:
        # In OpenAI's pairs the prompt is an object with the messages and the tools.
        row.row = {"tools": prompt.get("tools"), **row.row}
        prompt = prompt["messages"]
    return _with_input(row, prompt)


def _with_input(row: RowReader, prompt: object) -> object:
    """The prompt with the row's `input` behind it, as in alpaca's format."""
    extra = row.optional("input")
    if is_absent(extra):
        return prompt
    if not isinstance(prompt, str):
        fix = "write it into the prompt, or delete it"
        raise row.error("the row has an input beside messages", "nothing reads it", fix)
    return f"{prompt}\n{row.text(extra, 'input')}"


def _check_shared(row: RowReader, prompt: object, shared: list[Message]) -> None:
    """DataError for a prompt that chosen and rejected do not begin with."""
    if is_absent(prompt):
        return
    shared_texts = _texts_of(shared)
    prompt_texts = _texts_of(_messages_of(row, prompt, "prompt", "user"))
    if not set(prompt_texts) <= set(shared_texts):
        why = "chosen and rejected begin with different messages"
        fix = "make them equal, or remove the prompt"
        raise row.error("the prompt differs from that of chosen and rejected", why, fix)


def _feedback(row: RowReader) -> list[Sample]:
    label = row.required("label")
    row.is_good = read_label(label)
    if row.is_good is None:
        why = "1, true, yes, good, desirable or a thumb up is a good answer; their opposites, bad"
        fix = "write true or false, or delete the row"
        raise row.error(f"the label is {json.dumps(label, default=str)}", why, fix)
    # Columns that the recipe names are those that are meant.
    if "prompt" not in row.source.columns and row.optional("messages") is not None:
        messages = any_messages(row, row.optional("messages"), "messages")
        return _compared(row, messages[:-1], {"the last message": messages[-1:]})
    prompt = _with_input(row, row.text_or_messages(row.required("prompt"), "prompt"))
    completion = row.text_or_messages(row.required("completion"), "completion")
    return _compared(row, prompt, {"completion": completion})


def _shared_beginning(
    row: RowReader, chosen: list[Message], rejected: list[Message]
) -> list[Message]:
    """The messages that both begin with; each is left with one of its own."""
    count = 0
    most = min(len(chosen), len(rejected)) - 1
    while count < most and chosen[count] == rejected[count]:
        count += 1
    # What is learned from begins with an answer.
    while count and chosen[count]["role"] != "assistant":
        count -= 1
    if not count:
        raise _not_shared(row)
    return chosen[:count]


def _shared_text(row: RowReader, chosen: str, rejected: str) -> str:
    """The text that both begin with, up to the word in which they part."""
    count = 0
    for left, right in zip(chosen, rejected, strict=False):
        if left != right:
            break
        count += 1
    prompt = chosen[:count]
    # A prompt ends with a whole word: its tokens are then those of both rows.
    while prompt and not prompt[-1].isspace():
        prompt = prompt[:-1]
    if not prompt.strip():
        raise _not_shared(row)
    return prompt


def _not_shared(row: RowReader) -> DataError:
    why = "without a column prompt, both begin with what they answer"
    fix = 'write {"prompt": "...", "chosen": "...", "rejected": "..."}'
    return row.error("chosen and rejected do not begin with the same prompt", why, fix)


def _texts_of(messages: list[Message]) -> list[str]:
    return [message["content"].strip() for message in messages]


_ROW_READERS: dict[FormatName, Callable[[RowReader], Sequence[Sample]]] = {
    "alpaca": _alpaca,
    "messages": partial(_chat, column="messages", form=MESSAGE),
    "sharegpt": partial(_chat, column="conversations", form=TURN),
    "prompt-completion": _prompt_completion,
    "text": _text,
    "preference": _preference,
    "feedback": _feedback,
}
