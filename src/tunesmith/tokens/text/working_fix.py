"""Fixes for rows that a chat template cannot render, which were tried and work."""

import json
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from tunesmith.errors import DataError, ModelError
from tunesmith.tokens.text.probe import probe
from tunesmith.tokens.text.rendering import ChatRenderer
from tunesmith.tokens.text.row_warnings import LOST
from tunesmith.tokens.text.sentinels import Messages, Tools
from tunesmith.tokens.text.template_args import (
    assign_arguments,
    names_of_arguments,
    split_arguments,
)
from tunesmith.tokens.text.thoughts import split_thought

if TYPE_CHECKING:
    from tunesmith.tokens.text.loss_mask import RenderedAnswers

# Function that renders a conversation, as `find_answers` does.
Find = Callable[[ChatRenderer, Messages, Tools, Collection[int]], "RenderedAnswers"]
# A fix, and the template, the conversation and the selected answers after the fix.
_Fixed = tuple[str, ChatRenderer, Messages, Collection[int]]


def working_fix(
    chat: ChatRenderer,
    messages: Messages,
    tools: Tools,
    selected: Collection[int],
    find: Find,
    what: str,
) -> str:
    """Return a fix for a conversation that cannot be rendered, or "" if no tried fix works.

    The fixes are tried only once for each error `what`, because many rows may have the same error.
    """
    answer = split_thought(messages[-1])
    kind = (re.sub(r"\d+", "", what), bool(answer.get("reasoning_content")), *messages[-1])
    if kind not in chat.fixes:
        chat.fixes[kind] = ""
        for fix, trial, changed, chosen in _trials(chat, messages, selected):
            with suppress(DataError, ModelError):
                if trial is not chat:
                    probe(trial)
                if not find(trial, changed, tools, chosen).missing.intersection(LOST):
                    chat.fixes[kind] = fix
                    break
    return chat.fixes[kind]


def _trials(chat: ChatRenderer, messages: Messages, selected: Collection[int]) -> Iterator[_Fixed]:
    """Yield other values of the template's arguments, and other forms of the answers' thoughts."""
    arguments, template = split_arguments(chat.jinja)
    names = names_of_arguments(template, chat.tokenizer.special_tokens_map)
    for name in sorted(names, key=lambda name: "think" not in name):
        for value in (True, False):
            jinja = assign_arguments(template, {**arguments, name: value})
            trial = ChatRenderer(chat.tokenizer, jinja, chat.name, chat.eos_ids)
            trial.with_pictures, trial.takes_lists = chat.with_pictures, chat.takes_lists
            fix = f"set data.template_args.{name}={json.dumps(value)}"
            yield fix, trial, messages, selected
    inline = [message.copy() for message in map(split_thought, messages)]
    thoughts = [message.pop("reasoning_content", "") for message in inline]
    without = [message.copy() for message in inline]
    for message, thought in zip(inline, thoughts, strict=True):
        if thought or (message["role"] == "assistant" and not any(thoughts)):
            message["content"] = f"<think>\n{thought}\n</think>\n\n{message['content']}"
    if any(thoughts):
        form = json.dumps("<think>\n...\n</think>\n\n...")
        yield f"write the thought in front of the answer: {form}", chat, inline, selected
        yield "remove the thought from the answer", chat, without, selected
    else:
        form = json.dumps("<think>\n\n</think>\n\n...")
        yield f"begin the answer with an empty thought: {form}", chat, inline, selected
    yield "set data.train_on=last", chat, messages, {max(selected)}
