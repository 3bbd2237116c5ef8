"""What a row's answers say is what is supervised, or the row is refused, or it is counted.

Conversations are drawn, every text with a word of its own, and rendered by the chat templates that
TRL and Axolotl ship. They are compared with Transformers' own rendering and with the row.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from errors import refuses
from stored_templates import (
    Message,
    Rendering,
    Tools,
    encode,
    encoder_of,
    own_renderings,
    special_words,
    supervised_texts,
    template_names,
    tokenizer_of,
)
from tunesmith.errors import DataError

# More conversations for each template than the suite draws: TUNESMITH_TEST_EXAMPLES=1000.
EXAMPLES = int(os.environ.get("TUNESMITH_TEST_EXAMPLES", "8"))
# Names in ROW_WARNINGS that say that a part of an answer is not trained.
LOST = {"earlier_thought", "lost_thought", "lost_text", "lost_call"}
TAGS_AND_BLANKS = re.compile(r"</?think>|\s+")
# Answers whose header no generation prompt holds.
WITHOUT_PROMPT = {"axolotl/command_a_rag", "axolotl/command_a_tool_use"}
# One of each family; the others are nightly.
_COMMON = {
    "trl": "cohere2 deepseek_r1_distill deepseekv3 gemma gemma3 gemma4 glm4moe gptoss lfm2 llama3"
    " llama3_2 nemotron_3_nano phi3 qwen2_5 qwen3 qwen3_5_think qwen3_training",
    "axolotl": "chatml mistral_v3_tekken mistral_v7_tekken phi_4",
}
COMMON = {f"{package}/{name}" for package, names in _COMMON.items() for name in names.split()}
EDGES = ("", "", "", " ", "\n", "  \n\n", "\t", "\u00a0", "\r\n")
CORES = (
    "It is so.",
    "",
    "{{ name }} {% if x %}y{% endif %} {# note #}",
    'a "quoted" \\n {"b": [1, null]}',
    "a < b && c > d <b>e</b>",
    "e\u0301 é 这是一座桥。 🎉 الساعة",
    "```py\n    return 1\n```",
    "the tag </think> closes",
    "the tag <think> opens",
    "<tool_call>\n{}\n</tool_call>",
    "[INST] [/INST] <s></s>",
    "user\n\nassistant\n",
)
PROFILE = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    max_examples=EXAMPLES,
)


@dataclass(frozen=True)
class Drawn:
    """A conversation.

    Attributes:
        words: of texts that are no answer's, each occurs once.
    """

    messages: list[Message]
    tools: Tools
    words: list[str]

    def row(self) -> dict[str, Any]:
        return {"messages": self.messages, **({"tools": self.tools} if self.tools else {})}

    def answers(self) -> list[Message]:
        return [message for message in self.messages if message["role"] == "assistant"]


class _Drawing:
    """Draws texts, each with a word of its own."""

    def __init__(self, draw: Any, special: list[str]) -> None:
        self.draw = draw
        self.count = 0
        letters = st.characters(exclude_categories=("Cs", "Cc"))
        own = st.sampled_from(special or [""])
        self.cores = st.sampled_from(CORES) | own | st.text(letters, max_size=6)

    def one_of(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def word(self) -> str:
        self.count += 1
        return f"xq{self.count}qx"

    def text(self) -> tuple[str, str]:
        """A text, and its word."""
        word, core = self.word(), self.draw(self.cores)
        return (
            f"{self.one_of(*EDGES)}{core} {word} {self.one_of(*CORES)}{self.one_of(*EDGES)}",
            word,
        )

    def answer(self, *, calls: bool) -> Message:
        """An answer, its thought in a key, in its content, or none."""
        message: Message = {"role": "assistant", "content": ""}
        if not calls or self.one_of(False, True):
            message["content"] = self.text()[0]
        thought = self.one_of("", "", "key", "<think>\n{}\n</think>\n\n", "<think>{}</think>")
        if thought == "key":
            message["reasoning_content"] = self.text()[0]
        elif thought:
            message["content"] = thought.format(self.text()[0]) + message["content"]
        if calls:
            message["tool_calls"] = [self.call() for _ in range(self.one_of(1, 1, 2))]
        return message

    def call(self) -> dict[str, Any]:
        values = {
            "place": self.text()[0],
            "days": 3000 + self.count,
            "deep": {"inner": self.word(), "none": None},
            "list": [self.word(), 2.5],
            "flag": True,
        }
        names = self.draw(st.sets(st.sampled_from([*values])))
        arguments = {name: values[name] for name in sorted(names)}
        function = {"name": f"look_{self.word()}", "arguments": arguments}
        return {"type": "function", "id": f"call{self.count:05d}", "function": function}


@st.composite
def conversations(draw: Any, special: list[str]) -> Drawn:
    drawing = _Drawing(draw, special)
    messages: list[Message] = []
    words = []

    def say(role: str, **keys: Any) -> None:
        text, word = drawing.text()
        messages.append({"role": role, "content": text, **keys})
        words.append(word)

    if drawing.one_of(False, False, True):
        say("system")
    has_calls = drawing.one_of(False, False, True)
    for _ in range(drawing.one_of(1, 1, 2, 3)):
        say("user")
        if has_calls and drawing.one_of(False, True):
            messages.append(drawing.answer(calls=True))
            for call in messages[-1]["tool_calls"]:
                say("tool", tool_call_id=call["id"], name=call["function"]["name"])
        messages.append(drawing.answer(calls=False))
    names = []
    for message in messages:
        names += [call["function"]["name"] for call in message.get("tool_calls", ())]
    return Drawn(messages, [_schema(name) for name in names] or None, words)


def _schema(name: str) -> dict[str, Any]:
    place = {"type": "string", "description": "a town"}
    parameters = {"type": "object", "properties": {"place": place}, "required": ["place"]}
    function = {"name": name, "description": "Look it up.", "parameters": parameters}
    return {"type": "function", "function": function}


def missing(answer: Message, text: str) -> list[str]:
    """What an answer says and a text does not, whatever a template writes around it."""
    # Templates trim texts, and write the tags of a thought in a way of their own.
    parts = re.split(r"</?think>", answer["content"])
    parts += re.split(r"</?think>", answer.get("reasoning_content", ""))
    for call in answer.get("tool_calls", ()):
        parts += [call["function"]["name"], *leaves(call["function"]["arguments"])]
    return [part for part in map(str.strip, parts) if part and not is_in(part, text)]


def leaves(value: Any) -> Iterator[str]:
    """Names and values within a call's arguments."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, str | float | int) and not isinstance(value, bool):
        yield str(value)


def is_in(part: str, text: str) -> bool:
    """Whether a text has a part: as it is, as JSON writes it, or as Python does (LFM2's calls)."""
    forms = [part, repr(part)[1:-1], json.dumps(part)[1:-1]]
    forms.append(json.dumps(part, ensure_ascii=False)[1:-1])
    # Jinja's own `tojson` writes what HTML reads as escapes.
    escaped = forms[-1]
    for letter in "<>&'":
        escaped = escaped.replace(letter, f"\\u{ord(letter):04x}")
    return any(form in text for form in (*forms, escaped))


def is_whole(answer: Message, text: str) -> bool:
    """Whether a text has all that an answer says as it stands, tags of thoughts within it too."""
    texts = (answer["content"].strip(), answer.get("reasoning_content", "").strip())
    return not missing(answer, text) and all(is_in(part, text) for part in texts)


def fault(name: str, drawn: Drawn, train_on: Any) -> str:
    """How an example differs from its row in silence; empty where it does not."""
    encoder = encoder_of(name, train_on)
    try:
        encoded = encode(encoder, drawn.row())
    except DataError as error:
        return "" if error.where and error.fix else f"an error without where or fix: {error}"
    supervised = supervised_texts(encoder.template, encoded)
    text = "".join(supervised)
    answers = drawn.answers()
    if train_on == "last":
        answers = answers[-1:]
    lost = [part for answer in answers for part in missing(answer, text)]
    said = LOST.intersection(encoded.warnings)
    if lost and not said:
        return f"not supervised: {lost}; supervised: {supervised}"
    if said and all(is_whole(answer, text) for answer in answers):
        return f"a false alarm: {said}; supervised: {supervised}"
    extra = [word for word in drawn.words if word in text]
    if extra:
        return f"supervised, and no answer's: {extra}; supervised: {supervised}"
    whole = tokenizer_of(name).decode(encoded.example.ids)
    own = list(own_renderings(name, encoder.template, drawn.messages, drawn.tools))
    if not any(is_rendering(name, drawn.messages[-1], whole, rendering) for rendering in own):
        return f"rendered otherwise than by Transformers: {whole!r}, not {own}"
    return ""


def is_rendering(name: str, answer: Message, text: str, rendering: Rendering) -> bool:
    """Whether a text is Transformers' rendering of a conversation.

    Behind a last answer that the template does not end the next turn's first token may stand, where
    generation stops. Before it what the generation prompt holds may stand, with the thought that a
    template cuts out: so the model writes it in use.
    """
    if text == rendering.text or text.removeprefix(rendering.text) in special_words(name):
        return True
    if not text.startswith(rendering.prompt):
        return False
    pairs = zip(rendering.prompt, rendering.text, strict=False)
    shared = len(list(itertools.takewhile(lambda letters: letters[0] == letters[1], pairs)))
    answered = text.removeprefix(rendering.prompt)
    tail = rendering.text[shared:]
    if not answered.endswith(tail):
        return False
    between = TAGS_AND_BLANKS.sub("", answered.removesuffix(tail))
    thought = answer.get("reasoning_content", "") + answer["content"]
    return between in TAGS_AND_BLANKS.sub("", thought)


@pytest.fixture(autouse=True)
def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial takes a process of its own for each template."""
    monkeypatch.setattr("tunesmith.tokens.text.select_template.try_template", lambda *_: None)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in COMMON else pytest.mark.nightly)
        for name in sorted(set(template_names()) - WITHOUT_PROMPT)
    ],
)
def test_the_supervised_text_holds_every_answer_or_says_so(name: str) -> None:
    @PROFILE
    @given(conversations(special_words(name)), st.sampled_from(("response", "last")))
    def check(drawn: Drawn, train_on: str) -> None:
        found = fault(name, drawn, train_on)
        assert not found, f"{found}\n{train_on}: {drawn.row()}"

    check()


@pytest.mark.parametrize("name", sorted(set(template_names()) & WITHOUT_PROMPT))
def test_a_stored_template_without_generation_prompt_is_refused(name: str) -> None:
    with refuses(DataError, where="data.template"):
        encoder_of(name)
