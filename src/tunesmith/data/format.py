"""What a row is, once its format is known: a conversation, a prompt with its completion, or plain text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI's form.

    messages: dicts of `role` (system, user, assistant, tool) and `content` (str); an assistant's may have
        `reasoning_content` (str) and `tool_calls` ([{"type": "function", "function": {"name", "arguments": dict}}]).
    tools: OpenAI's tool schemas, or None.
    given: how many leading messages are a prompt of which nothing is learnt, whatever `train_on` says.
    instruction: alpaca's (instruction, input, output) for a row of that format, so that alpaca's own text can be made.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    given: int = 0
    instruction: tuple[str, str, str] | None = None


@dataclass(frozen=True)
class Completion:
    """A prompt and what follows it, as plain text."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """Plain text, learnt as a whole."""

    text: str


Sample = Conversation | Completion | Text
