"""What a row's answers say is what is supervised, or the row is refused, or it is counted.

Conversations are rendered by the chat templates that TRL and Axolotl ship, and compared with
Transformers' own rendering and with the row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from chat_table import FORMS, conversations
from stored_templates import (
    Message,
    Tools,
    encode,
    encoder_of,
    renderings_of,
    special_words,
    supervised_texts,
    template_names,
    tokenizer_of,
)

from errors import refuses
from tunesmith.errors import DataError

# Names in ROW_WARNINGS that say that a part of an answer is not trained.
LOST = {"earlier_thought", "lost_thought", "lost_text", "lost_call"}
# Answers whose header no generation prompt holds.
WITHOUT_PROMPT = {"axolotl/command_a_rag", "axolotl/command_a_tool_use"}
# One of each family; the others are nightly.
_COMMON = {
    "trl": "cohere2 deepseek_r1_distill deepseekv3 gemma gemma3 gemma4 glm4moe gptoss lfm2 llama3"
    " llama3_2 nemotron_3_nano phi3 qwen2_5 qwen3 qwen3_5_think qwen3_training",
    "axolotl": "chatml mistral_v3_tekken mistral_v7_tekken phi_4",
}
COMMON = {f"{package}/{name}" for package, names in _COMMON.items() for name in names.split()}


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
    if isinstance(value, dict | list):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        for item in items:
            yield from leaves(item)
    elif isinstance(value, str | int) and not isinstance(value, bool):
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


def fault(name: str, messages: list[Message], tools: Tools, train_on: Any) -> str:
    """How an example differs from its row in silence; empty where it does not."""
    encoder = encoder_of(name, train_on)
    try:
        encoded = encode(encoder, {"messages": messages, "tools": tools})
    except DataError as error:
        return "" if error.where and error.fix else f"an error without where or fix: {error}"
    supervised = supervised_texts(encoder.template, encoded)
    text = "".join(supervised)
    answers = [message for message in messages if message["role"] == "assistant"]
    if train_on == "last":
        answers = answers[-1:]
    lost = [part for answer in answers for part in missing(answer, text)]
    said = LOST.intersection(encoded.warnings)
    if lost and not said:
        return f"not supervised: {lost}; supervised: {supervised}"
    if said and all(is_whole(answer, text) for answer in answers):
        return f"a false alarm: {said}; supervised: {supervised}"
    others = [m["content"].strip() for m in messages if m["role"] != "assistant"]
    known = "".join([*special_words(name), *(answer["content"] for answer in answers)])
    extra = [words for words in others if len(words) > 4 and words in text and words not in known]
    if extra:
        return f"supervised, and no answer's: {extra}; supervised: {supervised}"
    # Thoughts and calls have several spellings.
    if tools or re.search("think|reasoning", json.dumps(messages)):
        return ""
    whole = tokenizer_of(name).decode(encoded.example.ids)
    own = renderings_of(name, messages)
    # Behind the prompt a thought may stand that the template cuts out: so the model writes it.
    if own and not whole.startswith(own):
        return f"rendered otherwise than by Transformers: {whole!r}, not {own}"
    return ""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in COMMON else pytest.mark.nightly)
        for name in sorted(set(template_names()) - WITHOUT_PROMPT)
    ],
)
def test_the_supervised_text_holds_every_answer_or_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A trial takes a process of its own for each template.
    monkeypatch.setattr("tunesmith.data.text.select_template.try_template", lambda *_: None)
    form = FORMS["chatml"]._replace(end=(special_words(name) or [""])[-1], head="assistant")
    for label, messages, tools in conversations(form):
        has_parts = label.startswith(("tools", "thoughts"))
        for train_on in ("response", "last") if has_parts else ("response",):
            found = fault(name, messages, tools, train_on)
            assert not found, f"{label}, {train_on}: {found}"


@pytest.mark.parametrize("name", sorted(set(template_names()) & WITHOUT_PROMPT))
def test_a_stored_template_without_generation_prompt_is_refused(name: str) -> None:
    with refuses(DataError, where="data.template"):
        encoder_of(name)
