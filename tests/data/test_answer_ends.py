"""Templates whose answers do not all end with one token at which generation stops: the shapes of
gpt-oss, GLM and Gemma 4, each as a small template of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
from chat_table import TOOLS, answer, call, result, user
from chat_tokenizers import train

from errors import refuses
from tunesmith.data.rows.samples import Conversation
from tunesmith.data.text.template import Template
from tunesmith.errors import DataError
from tunesmith.presentation.data import template_line

HEADER = "{{- '<|start|>' + m.role + '<|message|>' }}"
# gpt-oss: <|return|> ends the last answer, <|end|> thinking and earlier answers, <|call|> a call;
# a result opens with the name of its call.
SEVERAL_ENDS = """
{%- set ns = namespace(name='') %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{- '<|start|>' + ns.name + '<|message|>' + m.content + '<|end|>' }}
{%- elif m.tool_calls %}{% set ns.name = m.tool_calls[0].function.name %}
{{- '<|start|>assistant to=' + ns.name + '<|message|>' + (m.tool_calls[0].function.arguments | tojson) + '<|call|>' }}
{%- else %}
{%- if m.reasoning_content and loop.last %}{{- '<|start|>assistant<|message|>' + m.reasoning_content + '<|end|>' }}{% endif %}
{{- '<|start|>' + m.role + '<|message|>' + m.content }}
{{- '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""
# GLM: nothing ends an answer but the first token of the next turn.
NO_END = """
{%- for m in messages %}
{{- '<|observation|>' if m.role == 'tool' else '<|' + m.role + '|>' }}{{ '\\n' + m.content | trim }}
{%- for c in m.tool_calls or [] %}
{{- '<tool_call>' + c.function.name + (c.function.arguments | tojson) + '</tool_call>' }}
{%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
# Gemma 4: a call, its result and the answer are one turn; the first token of the result ends a call.
ONE_TURN = """
{%- set ns = namespace(role='', name='') %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{- 'response:' + ns.name + ':' + m.content + '<tool_response|>' }}
{%- elif ns.role != 'tool' %}{{- '<|turn>' + m.role + '\\n' }}
{%- endif %}
{%- for c in m.tool_calls or [] %}{% set ns.name = c.function.name %}
{{- '<|tool_call>' + ns.name + (c.function.arguments | tojson) + '<tool_call|>' }}
{%- endfor %}
{%- if m.tool_calls %}{{- '<|tool_response>' }}
{%- elif m.role != 'tool' %}{{- m.content | trim + '<turn|>\\n' }}
{%- endif %}
{%- set ns.role = m.role %}
{%- endfor %}
{%- if add_generation_prompt and ns.role != 'tool' %}{{ '<|turn>assistant\\n' }}{% endif %}"""
TOKENS = {
    SEVERAL_ENDS: ("<|start|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"),
    NO_END: ("<|user|>", "<|assistant|>", "<|observation|>", "<tool_call>", "</tool_call>"),
    ONE_TURN: (
        "<|turn>",
        "<turn|>",
        "<|tool_call>",
        "<tool_call|>",
        "<|tool_response>",
        "<tool_response|>",
    ),
}
CALL = answer("", tool_calls=[call("weather", place="Oslo")])
TWO_CALLS = answer("", tool_calls=[call("weather", place="Oslo"), call("time", 2)])


# Every one of these templates shows the names of tools in its text.
WITH_TOOLS = "{%- for tool in tools or [] %}{{ tool.function.name + ' ' }}{% endfor %}"


def template_of(jinja: str, *stops: str) -> Template:
    tokenizer = train("bytes", TOKENS[jinja], False)
    # Of generation_config.json; </s> is the tokenizer's own.
    eos_ids = {tokenizer.eos_token_id, *map(tokenizer.convert_tokens_to_ids, stops)}
    return Template(tokenizer, eos_ids, jinja=WITH_TOOLS + jinja, name="own.jinja")


def supervised(template: Template, *messages: Any) -> list[str]:
    """What of a row is supervised, stretch by stretch."""
    tools = TOOLS if any(m.get("tool_calls") for m in messages) else None
    example = template.encode(Conversation(list(messages), tools), "response", where="row 1")
    stretches = [""]
    for id_, trained in zip(example.ids.tolist(), example.trained.tolist(), strict=True):
        if trained:
            stretches[-1] += template.tokenizer.decode([id_])
        elif stretches[-1]:
            stretches.append("")
    return [stretch for stretch in stretches if stretch]


def ends(template: Template) -> set[str]:
    return set(template.tokenizer.convert_ids_to_tokens(sorted(template.end_ids)))


@pytest.mark.parametrize("stops", [(), ("<|return|>",), ("<|return|>", "<|call|>")])
def test_earlier_answers_that_end_with_another_token(stops: tuple[str, ...]) -> None:
    """Generation goes on at <|end|>, so no answer is taught to end with it."""
    template = template_of(SEVERAL_ENDS, *stops)
    assert ends(template) == {"</s>", "<|return|>", "<|call|>"}
    assert template.tokenizer.convert_ids_to_tokens([*template.earlier_end_ids]) == ["<|end|>"]
    assert "'<|end|>'" in template_line(template)
    one = "<|message|>b<|return|>"
    assert supervised(template, user("a"), answer("b")) == [one]
    assert supervised(template, user("a"), answer("b"), user("c"), answer("")) == [
        "<|message|>b",
        "<|message|><|return|>",
    ]
    row = (user("a <|return|>"), answer("<|end|>b<|end|>"), user("<|end|>"), answer("d <|end|> e"))
    assert supervised(template, *row) == [
        "<|message|><|end|>b<|end|>",
        "<|message|>d <|end|> e<|return|>",
    ]
    thought = "<|message|>c<|end|><|start|>assistant<|message|>b<|return|>"
    assert supervised(template, user("a"), answer("b", reasoning_content="c")) == [thought]


def test_a_call_whose_name_stands_again_before_its_result() -> None:
    template = template_of(SEVERAL_ENDS, "<|return|>")
    written = ' to=weather<|message|>{"place": "Oslo"}<|call|>'
    row = (user("weather"), CALL, result("weather <|call|>"), CALL, result(""), answer("weather"))
    assert supervised(template, *row) == [written, written, "<|message|>weather<|return|>"]
    assert supervised(template, user("a"), CALL) == [written]
    with refuses(DataError, names=["tool_calls"]):
        supervised(template, user("a"), TWO_CALLS)


def test_the_header_of_a_next_turn_ends_no_answer() -> None:
    """A template that ends only its last answer: <|start|> would end the others."""
    jinja = SEVERAL_ENDS.replace("else '<|end|>'", "else ('<|end|>' if m.role == 'user' else '')")
    TOKENS[jinja] = TOKENS[SEVERAL_ENDS]
    template = template_of(jinja, "<|return|>")
    assert not template.earlier_end_ids
    assert supervised(template, user("a"), answer("b")) == ["<|message|>b<|return|>"]
    with refuses(DataError, names=[2], fix=["model.added_tokens"]):
        supervised(template, user("a"), answer("b"), user("c"), answer("d"))


def test_a_last_answer_gets_the_first_token_of_the_next_turn() -> None:
    template = template_of(NO_END, "<|user|>", "<|observation|>")
    assert ends(template) == {"</s>", "<|user|>", "<|observation|>"}
    assert "'<|user|>', '<|observation|>'" in template_line(template)
    assert supervised(template, user("a"), answer("b\n")) == ["b<|user|>"]
    assert supervised(template, user("a"), answer("b <|user|>")) == ["b <|user|><|user|>"]
    row = (user("a"), answer(""), user("c"), answer("d"))
    assert supervised(template, *row) == ["<|user|>", "d<|user|>"]
    written = '<tool_call>weather{"place": "Oslo"}</tool_call>'
    both = written + "<tool_call>time{}</tool_call><|observation|>"
    row = (user("a"), TWO_CALLS, result("b"), result("c", 2), CALL)
    assert supervised(template, *row) == [both, written + "<|observation|>"]
    prompt = template.prompt(Conversation([user("a"), answer("b")]))
    assert template.tokenizer.decode(prompt) == "<|user|>\na<|assistant|>\n"


@pytest.mark.parametrize("stops", [(), ("<|user|>",), ("<|observation|>",)])
def test_a_next_turn_at_which_generation_does_not_stop_ends_nothing(stops: tuple[str, ...]) -> None:
    """Nor does a token that ends each call of several."""
    template = template_of(NO_END, *stops)
    assert ends(template) == {"</s>", *stops}
    refused = [CALL] if "<|observation|>" not in stops else []
    refused += [answer("b")] if "<|user|>" not in stops else []
    for message in refused:
        with refuses(DataError, names=[2], fix=["model.added_tokens"]) as caught:
            supervised(template, user("a"), message)
        assert caught.value.fix


@pytest.mark.parametrize("stops", [("<turn|>",), ("<turn|>", "<|tool_response>")])
def test_a_call_that_ends_where_its_result_begins(stops: tuple[str, ...]) -> None:
    template = template_of(ONE_TURN, *stops)
    assert ends(template) == {"</s>", "<turn|>", "<|tool_response>"}
    assert not template.earlier_end_ids
    one = '<|tool_call>weather{"place": "Oslo"}<tool_call|>'
    two = one + "<|tool_call>time{}<tool_call|><|tool_response>"
    row = (user("a"), TWO_CALLS, result("time"), result("", 2), answer("b"), user("c"), CALL)
    assert supervised(template, *row) == [two, "b<turn|>", f"{one}<|tool_response>"]
