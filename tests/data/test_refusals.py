"""Templates and rows whose answers cannot be told for certain are refused."""

from __future__ import annotations

import importlib.util
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_table import TOOLS, answer, call, result, system, user
from chat_tokenizers import train

from errors import refuses
from tunesmith.data.rows.samples import Conversation
from tunesmith.data.text.template import Template
from tunesmith.errors import DataError

TEMPLATES = Path(__file__).parent / "templates"
CHATML = (TEMPLATES / "chatml.jinja").read_text(encoding="utf-8")
IM = ("<|im_start|>", "<|im_end|>")
WORDS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


NO_PROMPT = CHATML.split("{%- if add_generation_prompt")[0]
AB = [user("a"), answer("b")]
ABCD = [*AB, user("c"), answer("d")]


def chatml(*changes: str) -> str:
    """ChatML with texts that are replaced, each by the one behind it."""
    jinja = CHATML
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        jinja = jinja.replace(old, new)
    return jinja


REFUSED: dict[str, tuple[str, list[Any], str]] = {
    "answer first": (CHATML, [answer("a")], "at the start of a conversation"),
    "thinking dropped": (
        CHATML,
        [user("a"), answer("b", reasoning_content="c")],
        "drops the reasoning_content",
    ),
    "system dropped": (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        [system("s"), user("a"), answer("b")],
        "drops message 1 (system)",
    ),
    "first turns dropped": (
        "{% for m in messages[-2:] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ABCD,
        "drops message 1",
    ),
    "no end token": (chatml("<|im_end|>", ""), AB, "writes no end token"),
    "end after the next header only": (
        chatml("~ '<|im_end|>", "~ '", "'<|im_start|>' ~", "'<|im_end|><|im_start|>' ~"),
        AB,
        "",
    ),
    "end token for questions only": (
        chatml(
            "~ '<|im_end|>\\n'",
            "~ ('<|im_end|>' if message.role == 'user' or loop.last else '') ~ '\\n'",
        ),
        [user("a"), answer("b"), user("<|im_end|>"), answer("d")],
        "writes no end token after message 2",
    ),
    "cut text with an end token": (
        chatml("message.content", "message.content.split('#')[0]"),
        [user("a"), answer("b <|im_end|> c # d")],
        "contains an end token",
    ),
    "upper case": (chatml("message.content", "message.content | upper"), AB, "renders differently"),
    "sorted by text": (
        chatml("in messages", "in messages | sort(attribute='content')"),
        [user("b"), answer("a"), user("0"), answer("1")],
        "",
    ),
    "lengths": (chatml("message.content", "(message.content | length)"), AB, "renders differently"),
    "prompt unlike rows": (
        chatml("{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n<think>\\n' }}"),
        AB,
        "does not write its generation prompt",
    ),
    "roles must alternate": (
        (TEMPLATES / "gemma.jinja").read_text(encoding="utf-8"),
        [user("a"), user("b"), answer("c")],
        "cannot render",
    ),
    "reversed": (chatml("in messages", "in messages[::-1]"), AB, ""),
    "answer twice": (
        chatml("~ message.content", "~ message.content ~ '|' ~ messages[-1].content"),
        AB,
        "",
    ),
    "block without the end": (
        (TEMPLATES / "tagged.jinja")
        .read_text(encoding="utf-8")
        .replace(
            "{{ message.content ~ '<|im_end|>\\n' }}{%- endg",
            "{{ message.content }}{%- endgeneration -%}<|im_end|>{%- g",
            1,
        )
        .replace("<|im_end|>{%- generation -%}", "<|im_end|>"),
        AB,
        "encloses 0 of 1 answers",
    ),
    "block around questions": (
        "{% generation %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% endgeneration %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        AB,
        "covers message 1",
    ),
    "block around the last only": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
        ABCD,
        "encloses 1 of 2 answers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_masked_is_refused(name: str) -> None:
    jinja, messages, what = REFUSED[name]
    tokenizer = train("bytes", (*IM, "<start_of_turn>", "<end_of_turn>"), False)
    template = Template(
        tokenizer, {tokenizer.convert_tokens_to_ids("<|im_end|>")}, jinja=jinja, name="own.jinja"
    )
    with pytest.raises(DataError) as caught:
        template.encode(Conversation(messages), "response", where="rows.jsonl:7")
    assert what in caught.value.what
    assert caught.value.where == "rows.jsonl:7"
    assert caught.value.fix


def test_a_template_without_a_generation_prompt_is_refused_at_once() -> None:
    with refuses(DataError, names=["own.jinja"], fix=["add_generation_prompt"]) as caught:
        Template(train("bytes", IM, False), {2}, jinja=NO_PROMPT, name="own.jinja")
    assert caught.value.where == "data.template"


def test_an_end_that_is_no_token_of_its_own_is_refused() -> None:
    """A base model's tokenizer that does not know ChatML's tokens: they are plain text to it."""
    tokenizer = train("bytes", WORDS, False)
    template = Template(tokenizer, {tokenizer.eos_token_id}, jinja=CHATML, name="own.jinja")
    with refuses(DataError, where="rows.jsonl:7", fix=["model.added_tokens"]):
        template.encode(Conversation(AB), "response", where="rows.jsonl:7")


# --- public templates

# Of generation_config.json, where a template's answers end with several.
STOPS = {
    "glm4moe": ("<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|call|>"),
    "diffusion_gemma": ("<turn|>", "<|tool_response>"),
}


@pytest.mark.slow
def test_masks_are_those_of_trls_training_templates() -> None:
    """TRL ships public templates, and twins of them with {% generation %} set by hand. Where a twin
    renders the same text, the masks must be the same.
    """
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    called = answer("", tool_calls=[call("weather", place="Oslo")])
    rows: list[tuple[list[Any], Any]] = [
        ([user("hi"), answer("yo"), user("hi"), answer(" yo\n")], None),
        ([system("Be."), user("a"), answer("")], None),
        ([user("hi"), answer("yo", reasoning_content="hm")], None),
        ([user("hi"), called, result("wet"), answer("Yes.")], TOOLS),
    ]
    compared, names = 0, set()
    for twin in sorted((Path(spec.origin).parent / "chat_templates").glob("*_training.jinja")):
        pair = [twin.with_name(twin.name.replace("_training", "")), twin]
        jinjas = [path.read_text(encoding="utf-8") for path in pair]
        special = r"<[|｜][^<>\n]*?[|｜]>|<(?:start|end)_of_turn>|<turn\|>|<\|turn>"
        words = sorted(set(re.findall(special, "".join(jinjas))))
        tokenizer = train("bytes", tuple(words), False)
        stops = {tokenizer.eos_token_id}
        for family, ends in STOPS.items():
            if twin.name.startswith(family):
                stops |= {tokenizer.convert_tokens_to_ids(end) for end in ends}
        for messages, tools in rows:
            found = []
            for jinja in jinjas:
                with suppress(DataError):
                    template = Template(tokenizer, stops, jinja=jinja, name="it")
                    sample = Conversation(messages, tools)
                    found.append(template.encode(sample, "response", where="r"))
            if len(found) == 2 and found[0].ids.tolist() == found[1].ids.tolist():
                assert np.array_equal(found[0].trained, found[1].trained), (twin.name, messages)
                compared += 1
                names.add(twin.name)
    assert compared >= 20
    assert len(names) >= 8
