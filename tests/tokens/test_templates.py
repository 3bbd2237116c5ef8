"""The chat template that is taken, its arguments, raw rows and alpaca rows, and what is refused."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from chat_table import TOOLS, answer, call, calls, result, system, turns, user
from chat_tokenizers import train
from errors import holds, refuses
from time_limit import time_limit
from tunesmith.config.schema import Data, Source
from tunesmith.errors import DataError
from tunesmith.presentation.data import template_line
from tunesmith.rows.samples import Completion, Conversation, Sample, Text
from tunesmith.tokens.text import builtin_templates, try_template
from tunesmith.tokens.text.select_template import select_template
from tunesmith.tokens.text.template import Template

TEMPLATES = Path(__file__).parent / "templates"
CHATML = (TEMPLATES / "chatml.jinja").read_text(encoding="utf-8")
IM = ("<|im_start|>", "<|im_end|>")
WORDS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
ROW = Conversation(turns("a", "b"))


@pytest.fixture(autouse=True)
def trials(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The templates that would be tried in a process of its own, which takes 0.2 s."""
    tried: list[str] = []
    path = "tunesmith.tokens.text.select_template.try_template"
    monkeypatch.setattr(path, lambda jinja, name: tried.append(jinja))
    return tried


def base(adds_bos: bool = False) -> Any:
    return train("bytes", WORDS, adds_bos)


def chat_tokenizer(jinja: Any = CHATML) -> Any:
    tokenizer = copy.deepcopy(train("bytes", IM, False))
    tokenizer.chat_template = jinja
    return tokenizer


def select(
    tokenizer: Any, form: str = "messages", template: str = "auto", **arguments: Any
) -> Template:
    """The template of rows of this format; the tokenizer's own if it is given as Jinja."""
    source = Source(source="rows.jsonl", format=form)  # type: ignore[arg-type]
    data = Data(train=(source,), template=template, template_args=arguments)
    if isinstance(tokenizer, str | dict):
        tokenizer = chat_tokenizer(tokenizer)
    return select_template(data, tokenizer, {2})


def learnt(template: Template, sample: Sample, train_on: Any = "response") -> tuple[str, str]:
    """(all of the text, what of it is learnt)"""
    example = template.encode(sample, train_on, where="row 1")
    decode = template.tokenizer.decode
    return decode(example.ids), decode(example.ids[example.trained])


def served(template: Template, messages: list[Any], prompt: bool = False, **keys: Any) -> str:
    """What a server renders from the saved chat template."""
    saved = chat_tokenizer(template.jinja)
    return saved.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False, **keys)


def alpaca_row(instruction: str, extra: str, output: str) -> Conversation:
    both = f"{instruction}\n{extra}" if extra else instruction
    return Conversation(turns(both, output), instruction=(instruction, extra, output))


# --- choice


def test_auto_takes_the_tokenizers_template_or_the_alpaca_text() -> None:
    chat = select(CHATML, "alpaca")
    assert (chat.name, chat.jinja) == ("chat", CHATML)
    whole, mine = learnt(chat, alpaca_row("Add.", "1 2", "3"))
    assert (mine, "Add.\n1 2<|im_end|>" in whole) == ("3<|im_end|>", True)
    assert select(base(), "alpaca").name == "alpaca"
    for form in ("text", "prompt-completion"):
        assert select(base(), form).name == select(CHATML, form, "raw").name == "raw"
        # That of prompts and completions writes the calls of those that have tools, too.
        jinja = CHATML if form == "text" else builtin_templates.with_tools(CHATML)
        assert select(CHATML, form).jinja == jinja
    with refuses(DataError, where="data.template", names=["chat"]):
        select(base(), template="chat")


def test_a_template_is_tried_and_its_own_ends_are_taken(trials: list[str], tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(CHATML + " ")
    tokenizer = chat_tokenizer()
    im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert select(tokenizer).end_ids == {tokenizer.eos_token_id, im_end}
    select(base(), template=str(file))
    assert trials == [CHATML, CHATML + " "]
    stop = base().convert_tokens_to_ids("<|eot_id|>")
    data = Data(train=(Source(source="rows.jsonl", format="text"),))
    template = select_template(data, base(), {stop})
    assert template.encode(Text("A line."), "response", where="r").ids[-1] == stop


def test_a_template_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bad.jinja"
    with refuses(DataError, where="data.template"):
        select(CHATML, template=str(file))
    file.write_text("{% for m in messages %}\n{{ m.content }}\n{% endfo %}")
    with refuses(DataError, where="bad.jinja:3"):
        select(CHATML, template=str(file))
    for jinja, drops in (("", "question"), (CHATML.replace("messages", "messages[:1]"), "answer")):
        with refuses(DataError, where="data.template", names=[drops]):
            select(jinja)
        assert select(jinja, "text").name == "raw", "rows of text need none"
    for jinja in ("{{ nothing() }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"):
        with refuses(DataError, where="rows.jsonl:1"):
            select(jinja).encode(ROW, "response", where="rows.jsonl:1")


def test_a_tokenizer_with_templates_by_name() -> None:
    template = select({"default": CHATML, "tool_use": builtin_templates.with_tools(CHATML)})
    assert "<tools>" in learnt(template, Conversation(ROW.messages, TOOLS))[0]
    assert "<tools>" not in learnt(template, ROW)[0]


BOMBS = {
    "loops": "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "a number": "{{ (9 ** 99999999) % 7 }}",
    "a long text": "{{ 'a' * 10**8 }}",
    "a format": "{{ '%1000000000d' % 1 }}",
}
LIMITS = ("loops", "a long text")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in LIMITS else pytest.mark.nightly)
        for name in BOMBS
    ],
)
def test_a_template_without_end_is_refused(name: str) -> None:
    jinja = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}" + BOMBS[name]
    with time_limit(120, name), refuses(DataError, where="data.template", names=["my_template"]):
        try_template.try_template(jinja, "my_template")


# --- our own texts

PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName a bird.\n\n### Response:\n"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n"
)


def test_alpaca_text_with_and_without_input() -> None:
    tokenizer = base(adds_bos=True)
    template = select(tokenizer, "alpaca")
    asked = {"role": "user", "content": "Add.", "input": "1, 2"}
    for sample, question, prompt, output in (
        (alpaca_row("Name a bird.", "", "A wren."), user("Name a bird."), PLAIN, "A wren."),
        (alpaca_row("Add.", "1, 2", "3"), asked, WITH_INPUT, "3"),
    ):
        whole, mine = learnt(template, sample)
        assert (whole, mine) == (f"<s>{prompt}{output}</s>", f"{output}</s>")
        assert tokenizer.decode(template.prompt(sample)) == f"<s>{prompt}"
        ids = template.encode(sample, "all", where="r").ids.tolist()
        assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert served(template, [question], prompt=True) == f"<s>{prompt}"
    template = select(base(), "messages", "alpaca")
    whole, mine = learnt(template, Conversation([system("Be."), *turns("a", "b", "c", "d")]))
    first = "Be.\n\n### Instruction:\na\n\n### Response:\nb</s>"
    assert whole == f"{first}\n\n### Instruction:\nc\n\n### Response:\nd</s>"
    assert mine == "b</s>d</s>"


# --- raw rows


@pytest.mark.parametrize("adds_bos", [False, True])
def test_raw_rows_have_one_bos_and_one_end(adds_bos: bool) -> None:
    template = select(base(adds_bos), "text")
    bos = "<s>" if adds_bos else ""
    for text in ("A line.", "A line.</s>", "<s>A line.", "<s>A line.</s>"):
        whole, mine = learnt(template, Text(text))
        assert whole == ("<s>" if text.startswith("<s>") else bos) + "A line.</s>"
        example = template.encode(Text(text), "response", where="r")
        assert example.trained.tolist() == [False] + [True] * (len(example.ids) - 1)
        assert mine.endswith("</s>")
    # A template writes a line break behind its end token: nothing ends twice.
    assert learnt(template, Text("A line.</s>\n"))[0] == f"{bos}A line.</s>\n"
    assert learnt(template, Completion("Q: ", "So.</s>\n"))[1] == "So.</s>\n"
    with refuses(DataError, where="row 1"):
        template.encode(Text(""), "response", where="row 1")


def test_raw_prompts_and_chats_stand_as_they_are() -> None:
    template = select(base(True), "text")
    decode = template.tokenizer.decode
    sample = Completion("Q: why?\nA>", "So.")
    whole, mine = learnt(template, sample)
    assert (whole, mine) == ("<s>Q: why?\nA>So.</s>", "So.</s>")
    assert decode(template.prompt(sample)) == "<s>Q: why?\nA>"
    example = template.encode(sample, "all", where="r")
    assert example.trained.tolist() == [False] + [True] * (len(example.ids) - 1)
    asked = turns("Q: why?\nA>", "So.")
    assert template.prompt(Conversation(asked)) == template.prompt(sample)
    for role, refused in (("system", [system("Be."), *asked]), ("tool", [*asked, result("5")])):
        with refuses(DataError, names=[role], fix=["data.template=alpaca"]):
            template.prompt(Conversation(refused))
    with refuses(DataError, where="r"):
        template.encode(Conversation(asked), "response", where="r")


# --- tools in a ChatML that knows none

CALLED = [
    user("Rain and time?"),
    calls(call("weather", place='O"slo'), call("time", 2), text="I ask."),
    result("wet"),
    result("noon", 2),
    answer("Wet, at noon."),
]


def test_hermes_form_for_a_chatml_without_tools() -> None:
    template = select(CHATML, "sharegpt")
    whole, mine = learnt(template, Conversation([system("Be."), *CALLED], TOOLS))
    made = '<tool_call>\n{"name": "weather", "arguments": {"place": "O\\"slo"}}\n</tool_call>'
    made += '\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    assert mine == f"I ask.\n{made}<|im_end|>{CALLED[-1]['content']}<|im_end|>"
    assert whole.startswith("<|im_start|>system\nBe.\n\n")
    assert all(f'"name": "{name}"' in whole for name in ("weather", "time"))
    results = "<tool_response>\nwet\n</tool_response>\n<tool_response>\nnoon\n</tool_response>"
    assert f"<|im_start|>user\n{results}<|im_end|>\n<|im_start|>assistant\nWet" in whole
    assert select(template.jinja).jinja == template.jinja, "what is saved is taken as it is"


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (" <tool_response>10</tool_response>\n", "10"),
        # The time grows with the length, and not with its square.
        (f"<tool_response>1{' ' * 120_000}0", f"<tool_response>1{' ' * 120_000}0"),
    ],
    ids=len,
)
def test_a_tool_result_is_wrapped_once(content: str, shown: str) -> None:
    sample = Conversation(
        [user("A?"), answer("<tool_call>a"), {"role": "tool", "content": content}, answer("10")]
    )
    with time_limit(10):
        text, _ = learnt(select(CHATML), sample)
    assert f"<tool_response>\n{shown}\n</tool_response><|im_end|>" in text


def test_hermes_form_is_for_chatml_with_tools_alone() -> None:
    tokenizer = chat_tokenizer("\n" + CHATML + "\n")
    template = select(tokenizer)
    for messages in (ROW.messages, [system("s"), *turns("a\n", " b", "c", "d")]):
        assert served(template, messages) == tokenizer.apply_chat_template(messages, tokenize=False)
    turns_alone = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    template = select(turns_alone + "{% if add_generation_prompt %}[assistant]{% endif %}")
    with refuses(DataError, where="row 1", names=["tool_calls", 2]):
        template.encode(Conversation(CALLED, TOOLS), "response", where="row 1")


def test_calls_without_ids_get_some_where_the_template_wants_them() -> None:
    tokenizer = train("bytes", ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]"), True)
    jinja = (TEMPLATES / "mistral.jinja").read_text(encoding="utf-8")
    bare = call("time")
    del bare["id"]
    results = [{"role": "tool", "content": c} for c in "ab"]
    row = Conversation([user("Time?"), calls(bare, bare), *results, answer("So.")], TOOLS)
    mine = learnt(Template(tokenizer, {2}, jinja=jinja, name="mistral"), row)[0]
    assert re.findall(r"call0000\d", mine) == ["call00001", "call00002"] * 2


# --- arguments of a template

# Reads one argument in a macro, one behind its own default; `content` and `loop` are no arguments.
THINKS = """
{%- macro header() %}{% if greeting is not defined %}{% set greeting = 'Hi' %}{% endif %}{{ greeting }}{% endmacro %}
{%- set thinks = thinks if thinks is defined else true %}
{{- header() }}
{%- for m in messages %}
{%- set content = m.content %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ ('' if thinks else '\\\\') + content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ content + '<|im_end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' + ('<think>' if thinks else '\\\\') }}{% endif %}"""


def test_arguments_reach_rows_prompts_and_what_is_saved() -> None:
    plain = select(THINKS)
    assert plain.tokenizer.decode(plain.prompt(ROW)).endswith("<think>")
    template = select(THINKS, thinks=False, greeting='Say "{%- x -%}"\n')
    prompt = 'Say "{%- x -%}"\n<|im_start|>user\na<|im_end|><|im_start|>assistant\n\\'
    assert learnt(template, ROW) == (f"{prompt}b<|im_end|>", "b<|im_end|>")
    assert template.tokenizer.decode(template.prompt(ROW)) == prompt
    assert holds(template_line(template), "thinks", "false")
    # A server's own argument changes nothing.
    assert served(template, ROW.messages[:1], prompt=True, thinks=True) == prompt
    assert select(template.jinja).jinja == template.jinja


@pytest.mark.parametrize("form", ["messages", "text"])
def test_an_argument_that_the_template_does_not_read_is_refused(form: str) -> None:
    for jinja, name, taken in (
        (THINKS, "think", ["greeting", "thinks"]),
        (THINKS, "messages", ["greeting", "thinks"]),
        (CHATML, "thinks", []),
    ):
        with refuses(DataError, where=f"data.template_args.{name}", names=[name, *taken]):
            select(jinja, form, **{name: False})
    with refuses(DataError, where="data.template_args"):
        select(base(), "text", thinks=False)


def test_a_date_of_ones_own() -> None:
    jinja = "{{ strftime_now('%d %b %Y') }}" + CHATML
    assert holds(template_line(select(jinja)), "data.template_args.strftime_now")
    assert learnt(select(jinja), ROW)[0].startswith("26 Jul 2024<|im_start|>")
    template = select(jinja, strftime_now="2031-02-03")
    assert learnt(template, ROW)[0].startswith("03 Feb 2031<|im_start|>")
    assert template.jinja == select(template.jinja).jinja
    with refuses(DataError, where="data.template_args.strftime_now", names=["3 Feb"]):
        select(jinja, strftime_now="3 Feb")
