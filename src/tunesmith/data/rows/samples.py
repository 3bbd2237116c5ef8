"""Rows of any format as training reads them: conversations, prompts with an answer, texts."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

# Stands in a text where a picture does: Unicode's character for an object that is no text.
PICTURE_MARK = "\ufffc"


class Picture(NamedTuple):
    """A picture of a row, not yet read: a file, or its bytes; `place` is what errors call it."""

    place: str
    path: Path | None = None
    data: bytes | None = None


class CalledFunction(TypedDict):
    """The function of a call; some templates want its arguments as JSON text."""

    name: str
    arguments: object


class FunctionCall(TypedDict):
    """A call in OpenAI's wrapping."""

    type: str
    id: NotRequired[str]
    function: CalledFunction


class Message(TypedDict):
    """A message in OpenAI's form; `input` is that of alpaca's format, `train` a row's own mark."""

    role: str
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[FunctionCall]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    train: NotRequired[bool]
    input: NotRequired[str]


# In OpenAI's form, whatever the schema of its parameters holds.
ToolSchema = dict[str, object]


@dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI's form.

    Attributes:
        messages: dicts of `role` (system, user, assistant, tool) and `content` (str); those of an
            assistant may have `reasoning_content` (str) and `tool_calls` ([{"type": "function",
            "function": {"name", "arguments": dict}}]).
        tools: OpenAI's tool schemas.
        prompt_messages: how many leading messages are a prompt, whose answers are not supervised.
        instruction: (instruction, input, output) of a row in alpaca's format, so that alpaca's own
            text can be made.
        untrained: indices of the assistant messages that the row itself leaves unsupervised.
        pictures: those of the messages, in the order in which PICTURE_MARK stands for them; where
            there are none the character is a text like any other.
    """

    messages: list[Message]
    tools: list[ToolSchema] | None = None
    prompt_messages: int = 0
    instruction: tuple[str, str, str] | None = None
    untrained: frozenset[int] = frozenset()
    pictures: tuple[Picture, ...] = ()

    def supervised(self) -> list[Message]:
        """The assistant messages that are trained on, where nothing but the row decides."""
        answers = []
        for i, message in enumerate(self.messages):
            is_context = i < self.prompt_messages or i in self.untrained
            if message["role"] == "assistant" and not is_context:
                answers.append(message)
        return answers


@dataclass(frozen=True)
class Completion:
    """A prompt and its answer, as plain text.

    `system` is for the template that makes two turns of them.
    """

    prompt: str
    completion: str
    system: str | None = None


@dataclass(frozen=True)
class Text:
    """Plain text, supervised as a whole."""

    text: str


Sample = Conversation | Completion | Text


def pictures_of(sample: Sample) -> tuple[Picture, ...]:
    """The pictures of a sample, which a conversation alone may have."""
    return sample.pictures if isinstance(sample, Conversation) else ()


@dataclass(frozen=True)
class RowSamples:
    """The samples of a row: one, or a pair of answers to one prompt, the better one first.

    Attributes:
        is_good: whether an answer is a good one; None where the row has no label.
        grades: numbers in columns that may grade the answer, as `rating 3`.
        has_other_preference: whether the scores of a pair contradict its preference.
    """

    samples: tuple[Sample, ...]
    is_good: bool | None = None
    grades: tuple[str, ...] = ()
    has_other_preference: bool = False

    @property
    def is_answered(self) -> bool:
        """Tell whether the row has one right answer: no pair, no labeled answer and no text."""
        [first, *others] = self.samples
        return not others and self.is_good is None and not isinstance(first, Text)


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """The messages with `system` (None: as they are) as system message, where they have none."""
    if system is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]
