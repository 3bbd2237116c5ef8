"""Functions that split a sample prompt into the turns of a conversation.

samples.jsonl contains prompts as decoded text without special tokens. In this text, most chat
templates put the role of a turn on a separate line. With Llama 3's template, the role directly
follows the text of the previous turn.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from tunesmith.config.row_formats import CHAT_ROLES

# Role names that chat templates write. Only these are recognized, because other names would also
# match words in a message.
_ROLE = "system|user|human|assistant|model|tool|ipython"
_FIRST_ROLE = re.compile(rf"\s*(?:{_ROLE})(\n+)")
_ROLE_IN_LINE = re.compile(rf"^({_ROLE})\n", re.MULTILINE)
_ROLE_BEHIND_TEXT = re.compile(rf"(?:\A|(?<=\S)|(?<=\n))({_ROLE})\n\n")
# Empty reasoning block that a template writes if the model must answer without reasoning.
_NO_THOUGHT = re.compile(r"<think>\s*</think>")
# A sampled answer ends after a fixed number of tokens. If this is in the middle of a character, the
# decoder writes U+FFFD instead of the character.
_CUT_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class Turn(NamedTuple):
    """A turn of a conversation. `role` is system, user, assistant or tool."""

    role: str
    text: str


def turns_of(prompt: str) -> list[Turn]:
    """Return the turns of a prompt. If its template writes no roles, return one user turn."""
    first = _FIRST_ROLE.match(prompt)
    if first is None:
        return [Turn("user", prompt.strip())]
    pattern = _ROLE_IN_LINE if len(first[1]) == 1 else _ROLE_BEHIND_TEXT
    # `split` returns the text before the first role, and then each role followed by its text.
    _, *parts = pattern.split(prompt.lstrip())
    turns = []
    for role, text in zip(parts[::2], parts[1::2], strict=True):
        content = _NO_THOUGHT.sub("", text).strip()
        # Skip an empty turn. The last turn of a prompt is empty, because the model generates it.
        if content:
            turns.append(Turn(CHAT_ROLES[role], content))
    return turns


def conversations_of(prompts: Iterable[str]) -> tuple[dict[str, list[Turn]], str]:
    """Return the turns of each prompt, and the system prompt that all of them share.

    The shared system prompt is removed from the turns, because it does not distinguish the prompts.
    The second value is "" if the prompts do not share a system prompt.
    """
    conversations = {prompt: turns_of(prompt) for prompt in prompts}
    first_turns = {turns[0] for turns in conversations.values() if turns}
    if len(first_turns) == 1:
        [first] = first_turns
        if first.role == "system":
            return {prompt: turns[1:] for prompt, turns in conversations.items()}, first.text
    return conversations, ""


def whole_characters(answer: str) -> str:
    """Remove an incomplete character, such as half of an emoji, from the end of an answer."""
    return answer.rstrip(_CUT_CHARACTER)
