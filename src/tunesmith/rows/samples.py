"""Types of samples: conversations, completions and texts.

A sample is the common form to which the rows of all formats are converted.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

# Placeholder for a picture in a text: Unicode's OBJECT REPLACEMENT CHARACTER.
PICTURE_MARK = "\ufffc"


class Picture(NamedTuple):
    """A picture in a row. The picture is not decoded yet.

    Attributes:
        place: the name of the picture in error messages, such as "picture 2".
        path: the picture file, or None.
        data: the bytes of the picture, or None if it is in a file.
    """

    place: str
    path: Path | None = None
    data: bytes | None = None


class CalledFunction(TypedDict):
    """Name and arguments of a tool call. Some templates need the arguments as JSON text."""

    name: str
    arguments: object


class FunctionCall(TypedDict):
    """A tool call in OpenAI's form."""

    type: str
    id: NotRequired[str]
    function: CalledFunction


class Message(TypedDict):
    """A message in OpenAI's form.

    Two keys are not in OpenAI's form. `train` is False if the row excludes the message from
    training. `input` contains the column `input` of a row in the alpaca format.
    """

    role: str
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[FunctionCall]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    train: NotRequired[bool]
    input: NotRequired[str]


# A tool in OpenAI's form. The schema of the parameters is not checked.
ToolSchema = dict[str, object]


@dataclass(frozen=True)
class Conversation:
    """A sample with messages in OpenAI's form, for a chat template.

    Attributes:
        messages: dicts with `role` (system, user, assistant, tool) and `content` (str). Messages of
            the assistant can have `reasoning_content` (str) and `tool_calls` ([{"type":
            "function", "function": {"name", "arguments": dict}}]).
        tools: tool schemas in OpenAI's form.
        prompt_messages: number of leading messages that form the prompt. Answers in the prompt are
            not supervised.
        instruction: (instruction, input, output) of a row in the alpaca format, for the Alpaca
            template.
        untrained: indices of the assistant messages that a loss mask of the row excludes.
        pictures: pictures of the messages, in the order of their placeholders (PICTURE_MARK). If
            there are no pictures, the placeholder character is ordinary text.
    """

    messages: list[Message]
    tools: list[ToolSchema] | None = None
    prompt_messages: int = 0
    instruction: tuple[str, str, str] | None = None
    untrained: frozenset[int] = frozenset()
    pictures: tuple[Picture, ...] = ()

    def supervised(self) -> list[Message]:
        """Return the assistant messages that the row does not exclude from training.

        Keys of the recipe can exclude more messages.
        """
        return [
            message
            for i, message in enumerate(self.messages)
            if message["role"] == "assistant"
            and i >= self.prompt_messages
            and i not in self.untrained
        ]


@dataclass(frozen=True)
class Completion:
    """A sample with a prompt and its answer as plain texts.

    Attributes:
        system: the system message, for a chat template that turns the sample into two turns.
    """

    prompt: str
    completion: str
    system: str | None = None


@dataclass(frozen=True)
class Text:
    """A sample of plain text. All its tokens are supervised."""

    text: str


Sample = Conversation | Completion | Text


def pictures_of(sample: Sample) -> tuple[Picture, ...]:
    """Return the pictures of a sample. Only a conversation can have pictures."""
    return sample.pictures if isinstance(sample, Conversation) else ()


def texts_by_role(sample: Sample) -> list[tuple[str, str]]:
    """Return the texts of a sample in order, as pairs (role of the author, text).

    The author of a plain text has the role `text`.
    """
    if isinstance(sample, Conversation):
        return [(message["role"], message["content"]) for message in sample.messages]
    if isinstance(sample, Completion):
        return [("user", sample.prompt), ("assistant", sample.completion)]
    return [("text", sample.text)]


@dataclass(frozen=True)
class RowSamples:
    """The samples of one row.

    Attributes:
        samples: one sample, or two for a preference pair: the chosen and the rejected answer.
        is_answered: whether the row is a prompt with one answer to learn. False for pairs, labeled
            answers and plain text.
        is_good: whether the answer is labeled good. None if the row has no label.
    """

    samples: tuple[Sample, ...]
    is_answered: bool
    is_good: bool | None


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """Add `system` as the system message, unless it is None or the messages already have one."""
    if system is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]
