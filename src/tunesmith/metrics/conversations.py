"""Sample prompts as the turns of a conversation.

samples.jsonl has a prompt as the text of its tokens, without the special ones. Most templates leave
each role in a line of its own there; Llama 3's leave it right behind the turn before.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from tunesmith.data.rows.messages import CHAT_ROLES

# The words that templates write: other names of rows would also match in a message's text.
_ROLE = "system|user|human|assistant|model|tool|ipython"
_FIRST_ROLE = re.compile(rf"\s*(?:{_ROLE})(\n+)")
_ROLE_IN_LINE = re.compile(rf"^({_ROLE})\n", re.MULTILINE)
_ROLE_BEHIND_TEXT = re.compile(rf"(?:\A|(?<=\S)|(?<=\n))({_ROLE})\n\n")
# What a template writes where a model shall answer without thinking first.
_NO_THOUGHT = re.compile(r"<think>\s*</think>")
# The model's answers end after so many tokens, which may be within a character.
_CUT_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class Turn(NamedTuple):
    """`role`: system | user | assistant | tool."""

    role: str
    text: str


def turns_of(prompt: str) -> list[Turn]:
    """The turns of a prompt; one of the user, if its template names no roles."""
    first = _FIRST_ROLE.match(prompt)
    if first is None:
        return [Turn("user", prompt.strip())]
    pattern = _ROLE_IN_LINE if len(first[1]) == 1 else _ROLE_BEHIND_TEXT
    # Text before the first role, then a role and a text in turn.
    _, *parts = pattern.split(prompt.lstrip())
    turns = []
    for role, text in zip(parts[::2], parts[1::2], strict=True):
        content = _NO_THOUGHT.sub("", text).strip()
        # The last one is the answer that the prompt asks for.
        if content:
            turns.append(Turn(CHAT_ROLES[role], content))
    return turns


def conversations_of(prompts: Iterable[str]) -> tuple[dict[str, list[Turn]], str]:
    """The turns of each prompt, and the system prompt that all of them begin with.

    It tells nothing about one of them, so it is left out of their turns; empty if there is none.
    """
    conversations = {prompt: turns_of(prompt) for prompt in prompts}
    first_turns = {turns[0] for turns in conversations.values() if turns}
    if len(first_turns) != 1:
        return conversations, ""
    (first,) = first_turns
    if first.role != "system":
        return conversations, ""
    for turns in conversations.values():
        del turns[:1]
    return conversations, first.text


def whole_characters(answer: str) -> str:
    """An answer without the part of a character, such as an emoji, that it was cut off in."""
    return answer.rstrip(_CUT_CHARACTER)
