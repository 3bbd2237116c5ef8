"""Which template is taken, our own texts, raw rows, and what is refused."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from chat_table import TOOLS, answer, call, result, system, user
from chat_tokenizers import train

from errors import holds, refuses
from time_limit import time_limit
from tunesmith.config.schema import Data, Source
from tunesmith.data.rows.samples import Completion, Conversation, Sample, Text
from tunesmith.data.text import builtin_templates, rendering
from tunesmith.data.text.select_template import select_template
from tunesmith.data.text.template import Template
from tunesmith.errors import DataError, ModelError
from tunesmith.presentation.data import template_line

TEMPLATES = Path(__file__).parent / "templates"
CHATML = (TEMPLATES / "chatml.jinja").read_text(encoding="utf-8")
IM = ("<|im_start|>", "<|im_end|>")
WORDS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def base(adds_bos: bool = False) -> Any:
    return train("bytes", WORDS, adds_bos)


def chat_tokenizer(jinja: Any = CHATML) -> Any:
    tokenizer = copy.deepcopy(train("bytes", IM, False))
    tokenizer.chat_template = jinja
    return tokenizer


def data(form: str = "messages", template: str = "auto", **more: Any) -> Data:
    return Data(train=(Source(source="rows.jsonl", format=form),), template=template, **more)


def learnt(template: Template, sample: Sample, train_on: str = "response") -> tuple[str, str]:
    """(all of the text, what of it is learnt)"""
    example = template.encode(sample, train_on, where="row 1")
    decode = template.tokenizer.decode
    return decode(example.ids), decode(example.ids[example.trained])


def alpaca_row(instruction: str, extra: str, output: str) -> Conversation:
    both = f"{instruction}\n{extra}" if extra else instruction
    return Conversation([user(both), answer(output)], instruction=(instruction, extra, output))


# --- choice


def test_auto_takes_the_tokenizers_template_or_the_alpaca_text() -> None:
    chat = select_template(data("alpaca"), chat_tokenizer(), {2})
    assert (chat.name, chat.jinja) == ("chat", CHATML)
    assert learnt(chat, alpaca_row("Add.", "1 2", "3"))[1] == "3<|im_end|>"
    assert "Add.\n1 2<|im_end|>" in learnt(chat, alpaca_row("Add.", "1 2", "3"))[0]
    assert select_template(data("alpaca"), base(), {2}).name == "alpaca"
    for form in ("text", "prompt-completion"):
        assert select_template(data(form), base(), {2}).name == "raw"
        # That of prompts and completions writes the calls of those that have tools, too.
        jinja = CHATML if form == "text" else builtin_templates.with_tools(CHATML)
        assert select_template(data(form), chat_tokenizer(), {2}).jinja == jinja
        assert select_template(data(form, "raw"), chat_tokenizer(), {2}).name == "raw"
    with refuses(DataError, where="data.template", names=["chat"]):
        select_template(data(template="chat"), base(), {2})


def test_end_ids_are_those_of_generation_and_the_templates_own() -> None:
    tokenizer = chat_tokenizer()
    template = select_template(data(), tokenizer, {tokenizer.eos_token_id})
    assert template.end_ids == {
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
    }
    known = {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert select_template(data(), tokenizer, known).end_ids == known


def test_describe_is_one_line_that_names_what_is_in_use(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(CHATML)
    tokenizer = chat_tokenizer()
    lines = {
        template_line(select_template(data(), tokenizer, {2})): [
            "chat",
            "Hermes",
            "<|im_end|>",
            "sentinels",
        ],
        template_line(select_template(data("alpaca"), base(), {2})): ["alpaca", "</s>"],
        template_line(select_template(data(template=str(file)), tokenizer, {2})): [
            "own.jinja",
            "<|im_end|>",
        ],
        template_line(select_template(data("text"), base(), {2})): ["without a template", "</s>"],
        template_line(select_template(data("text"), tokenizer, {2})): ["as they are", "</s>"],
    }
    for line, words in lines.items():
        assert "\n" not in line
        assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b"{% for m in messages %}\n{{ m.content }}\n{% endfo %}", "bad.jinja:3"),
        (b"one\n{{ messages[0].content", "bad.jinja:2"),
        (b"\xff\xfe\x00", "data.template"),
        (None, "data.template"),
    ],
)
def test_a_broken_template_file_is_named_with_its_line(
    tmp_path: Path, content: bytes | None, where: str
) -> None:
    file = tmp_path / "bad.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        select_template(data(template=str(file)), chat_tokenizer(), {2})
    assert caught.value.where.endswith(where)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("jinja", "drops"),
    [
        ("", "question"),
        (" \n", "question"),
        ("{# all of it #}", "question"),
        ("hello", "question"),
        ({"default": ""}, "question"),
        ("{{ messages[0].content }}", "answer"),
        (CHATML.replace("messages", "messages[:1]"), "answer"),
        ("{% for m in messages %}{% generation %}{% endgeneration %}{% endfor %}", "question"),
    ],
)
def test_a_template_without_the_question_or_the_answer_is_refused(jinja: Any, drops: str) -> None:
    with refuses(DataError, names=[drops]) as caught:
        select_template(data(), chat_tokenizer(jinja), {2})
    assert caught.value.where == "data.template"
    assert select_template(data("text"), chat_tokenizer(jinja), {2}).name == "raw", (
        "rows of text need none"
    )


@pytest.mark.parametrize(
    "jinja",
    [
        "{{ 1 / 0 }}",
        "{{ nothing() }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails_is_named_with_the_row(jinja: str) -> None:
    template = select_template(data(), chat_tokenizer(jinja), {2})
    with refuses(DataError, where="rows.jsonl:1") as caught:
        template.encode(Conversation([user("a"), answer("b")]), "response", where="rows.jsonl:1")
    assert caught.value.where == "rows.jsonl:1"
    assert caught.value.why


def test_a_template_that_loops_without_end_on_some_rows_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The trial of a template does not have such rows."""
    monkeypatch.setattr(rendering, "MAX_RENDER_SECONDS", 0.2)
    many = "{% for i in range(99999) %}"
    bomb = "{% if 'once' in messages[0].content %}" + many * 3 + "{% endfor %}" * 3 + "{% endif %}"
    template = select_template(data(), chat_tokenizer(CHATML + bomb), {2})
    sample = Conversation([user("once"), answer("a")])
    with time_limit(60), refuses(ModelError, where="rows.jsonl:1", names=["0.2 s"]):
        template.encode(sample, "response", where="rows.jsonl:1")


def test_a_tokenizer_with_templates_by_name() -> None:
    tokenizer = chat_tokenizer(
        {"default": CHATML, "tool_use": builtin_templates.with_tools(CHATML)}
    )
    template = select_template(data("sharegpt"), tokenizer, {2})
    assert "<tools>" in learnt(template, Conversation([user("a"), answer("b")], TOOLS))[0]
    assert "<tools>" not in learnt(template, Conversation([user("a"), answer("b")]))[0]


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


@pytest.mark.parametrize("adds_bos", [False, True])
def test_alpaca_text_with_and_without_input(adds_bos: bool) -> None:
    tokenizer = base(adds_bos)
    template = select_template(data("alpaca"), tokenizer, {2})
    bos = "<s>" if adds_bos else ""
    for sample, prompt, output in (
        (alpaca_row("Name a bird.", "", "A wren."), PLAIN, "A wren."),
        (alpaca_row("Add.", "1, 2", "3"), WITH_INPUT, "3"),
    ):
        whole, mine = learnt(template, sample)
        assert whole == f"{bos}{prompt}{output}</s>"
        assert mine == f"{output}</s>"
        assert tokenizer.decode(template.prompt(sample)) == bos + prompt
        assert (
            template.encode(sample, "all", where="r").ids.tolist()
            == tokenizer(whole, add_special_tokens=False)["input_ids"]
        )


def test_the_saved_alpaca_template_gives_the_prompt_that_was_trained() -> None:
    """What a server renders from the saved chat template is what `prompt` gave while training."""
    tokenizer = base(True)
    trained = select_template(data("alpaca"), tokenizer, {2})
    saved = chat_tokenizer(trained.jinja)
    assert (
        saved.apply_chat_template(
            [user("Name a bird.")], add_generation_prompt=True, tokenize=False
        )
        == "<s>" + PLAIN
    )
    with_input = {"role": "user", "content": "Add.", "input": "1, 2"}
    assert (
        saved.apply_chat_template([with_input], add_generation_prompt=True, tokenize=False)
        == "<s>" + WITH_INPUT
    )
    tokenizer = train("bytes", WORDS, True)
    again = Template(tokenizer, {2}, jinja=trained.jinja, name="chat")
    row = Conversation([user("Name a bird."), answer("A wren.")])
    assert (
        again.encode(row, "response", where="r").trained.tolist()
        == trained.encode(row, "response", where="r").trained.tolist()
    )


def test_alpaca_text_goes_on_for_several_turns() -> None:
    template = select_template(data("messages", "alpaca"), base(), {2})
    whole, mine = learnt(
        template, Conversation([system("Be."), user("a"), answer("b"), user("c"), answer("d")])
    )
    assert (
        whole
        == "Be.\n\n### Instruction:\na\n\n### Response:\nb</s>\n\n### Instruction:\nc\n\n### Response:\nd</s>"
    )
    assert mine == "b</s>d</s>"
    with refuses(DataError, where="r"):
        template.encode(Conversation([user("a"), user("b"), answer("c")]), "response", where="r")


# --- raw rows


@pytest.mark.parametrize("adds_bos", [False, True])
def test_raw_rows_have_one_bos_and_one_end(adds_bos: bool) -> None:
    tokenizer = base(adds_bos)
    template = select_template(data("text"), tokenizer, {2})
    bos = "<s>" if adds_bos else ""
    for text in ("A line.", "A line.</s>", "<s>A line.", "<s>A line.</s>"):
        whole, mine = learnt(template, Text(text))
        assert whole == ("<s>" if text.startswith("<s>") else bos) + "A line.</s>"
        example = template.encode(Text(text), "response", where="r")
        assert example.trained.tolist() == [False] + [True] * (len(example.ids) - 1)
        assert mine.endswith("</s>")
    # A template writes a line break behind its end token: nothing ends twice.
    for text in ("A line.</s>\n", "Q</s>\nA line.</s> \n"):
        assert learnt(template, Text(text))[0] == bos + text
    assert learnt(template, Completion("Q: ", "So.</s>\n"))[1] == "So.</s>\n"
    assert learnt(template, Completion("Q</s>", "\n"))[1] == "\n</s>"
    sample = Completion("Q: why?\nA>", "So.")
    whole, mine = learnt(template, sample)
    assert (whole, mine) == (f"{bos}Q: why?\nA>So.</s>", "So.</s>")
    assert tokenizer.decode(template.prompt(sample)) == f"{bos}Q: why?\nA>"
    assert (
        template.encode(sample, "all", where="r").trained.sum()
        == len(template.encode(sample, "all", where="r").ids) - 1
    )
    for empty in (Text(""), Completion("", "")):
        with refuses(DataError, where="row 1"):
            template.encode(empty, "response", where="row 1")
    turns = [user("Q: why?\nA>"), answer("So.")]
    assert template.prompt(Conversation(turns)) == template.prompt(sample), (
        "a chat's question stands as it is too"
    )
    assert (
        tokenizer.decode(template.prompt(Conversation([*turns, user("\nQ: ")]))) == f"{whole}\nQ: "
    )
    saved = chat_tokenizer(template.jinja)
    assert saved.apply_chat_template([*turns, user("\nQ: ")], tokenize=False) == f"{whole}\nQ: "
    assert saved.apply_chat_template([user("<s>A")], tokenize=False) == "<s>A", "one BOS"
    for refused in ([system("Be."), *turns], [*turns, {"role": "tool", "content": "5"}]):
        role = next(m["role"] for m in refused if m["role"] in ("system", "tool"))
        with refuses(DataError, names=[role], fix=["data.template=alpaca"]):
            template.prompt(Conversation(refused))
    with pytest.raises(DataError, match="is a conversation"):
        template.encode(Conversation(turns), "response", where="r")


def test_an_empty_completion_teaches_the_end_alone() -> None:
    assert (
        learnt(select_template(data("prompt-completion"), base(), {2}), Completion("So", ""))[1]
        == "</s>"
    )


# --- tools in a ChatML that knows none

CALLED = [
    user("Rain and time?"),
    answer("I ask.", tool_calls=[call("weather", place='O"slo'), call("time", 2)]),
    result("wet"),
    result("noon", 2),
    answer("Wet, at noon."),
]


def test_hermes_form_for_a_chatml_without_tools() -> None:
    template = select_template(data("sharegpt"), chat_tokenizer(), {2})
    whole, mine = learnt(template, Conversation([system("Be."), *CALLED], TOOLS))
    calls = '<tool_call>\n{"name": "weather", "arguments": {"place": "O\\"slo"}}\n</tool_call>'
    calls += '\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    assert mine == f"I ask.\n{calls}<|im_end|>{CALLED[-1]['content']}<|im_end|>"
    assert whole.startswith("<|im_start|>system\nBe.\n\n")
    assert all(f'"name": "{name}"' in whole for name in ("weather", "time"))
    results = "<tool_response>\nwet\n</tool_response>\n<tool_response>\nnoon\n</tool_response>"
    assert f"<|im_start|>user\n{results}<|im_end|>\n<|im_start|>assistant\nWet" in whole
    saved = chat_tokenizer(template.jinja)
    assert select_template(data("sharegpt"), saved, {2}).jinja == template.jinja, (
        "what is saved is taken as it is"
    )


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ("10", "10"),
        ("<tool_response>\n10\n</tool_response>", "10"),
        (" <tool_response>10</tool_response>\n", "10"),
        # Two results in one turn keep the tags between them.
        (
            "<tool_response>1</tool_response>\n<tool_response>\n2\n</tool_response>",
            "1</tool_response>\n<tool_response>\n2",
        ),
        ("See <tool_response>10</tool_response>", "See <tool_response>10</tool_response>"),
        # The time grows with the length, and not with its square.
        (f"<tool_response>1{' ' * 120_000}0", f"<tool_response>1{' ' * 120_000}0"),
    ],
    ids=lambda text: text[:30],
)
def test_a_tool_result_is_wrapped_once(content: str, shown: str) -> None:
    sample = Conversation([user("A?"), answer("<tool_call>a"), result(content), answer("10")])
    sample.messages[2].pop("tool_call_id")
    template = select_template(data(), chat_tokenizer(), {2})
    with time_limit(10):
        text, _ = learnt(template, sample)
    assert f"<tool_response>\n{shown}\n</tool_response><|im_end|>" in text
    assert text.count("<tool_response>") == shown.count("<tool_response>") + 1


def test_hermes_form_leaves_conversations_without_tools_alone() -> None:
    for jinja in (CHATML, "\n" + CHATML + "\n", CHATML + "  \n"):
        tokenizer = chat_tokenizer(jinja)
        template = select_template(data("messages"), tokenizer, {2})
        assert template.jinja != jinja
        for messages in (
            [user("a"), answer("b")],
            [system("s"), user("a\n"), answer(" b"), user("c"), answer("d")],
        ):
            theirs = [
                tokenizer.apply_chat_template(messages, chat_template=j, tokenize=False)
                for j in (jinja, template.jinja)
            ]
            assert theirs[0] == theirs[1]


def test_hermes_form_of_a_dated_template_still_says_that_its_date_is_fixed() -> None:
    tokenizer = chat_tokenizer(CHATML + "{{ strftime_now('%d') if false else '' }}")
    template = select_template(data(), tokenizer, {2})
    assert "Hermes' form" in template_line(template)
    assert holds(template_line(template), "data.template_args.strftime_now")


def test_no_hermes_form_for_other_templates(tmp_path: Path) -> None:
    llama = (TEMPLATES / "bos.jinja").read_text(encoding="utf-8")
    tokenizer = copy.deepcopy(train("bytes", WORDS, True))
    tokenizer.chat_template = llama
    template = select_template(data(), tokenizer, {2})
    assert template.jinja == llama
    with refuses(DataError, where="row 1", names=["tool_calls", 2]):
        template.encode(Conversation(CALLED, TOOLS), "response", where="row 1")


def test_calls_without_ids_get_some_where_the_template_wants_them() -> None:
    tokenizer = train("bytes", ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]"), True)
    jinja = (TEMPLATES / "mistral.jinja").read_text(encoding="utf-8")
    bare = call("time")
    del bare["id"]
    messages = [
        user("Time?"),
        answer("", tool_calls=[bare, bare]),
        *({"role": "tool", "content": c} for c in "ab"),
    ]
    mine = learnt(
        Template(tokenizer, {2}, jinja=jinja, name="mistral"),
        Conversation([*messages, answer("So.")], TOOLS),
    )[0]
    assert re.findall(r"call0000\d", mine) == ["call00001", "call00002", "call00001", "call00002"]


def test_raw_rows_end_where_generation_stops() -> None:
    tokenizer = base()
    stop = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    template = select_template(data("text"), tokenizer, {stop})
    assert template.encode(Text("A line."), "response", where="r").ids[-1] == stop
    assert template.end_ids == {stop}


def test_all_leaves_out_what_is_given() -> None:
    template = select_template(data(), chat_tokenizer(), {2})
    sample = Conversation([user("a"), answer("b"), user("c"), answer("d")], prompt_messages=3)
    assert learnt(template, sample, "all")[1] == "d<|im_end|>\n"


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
    row = Conversation([user("a"), answer("b")])
    tokenizer = chat_tokenizer(THINKS)
    assert tokenizer.decode(select_template(data(), tokenizer, {2}).prompt(row)).endswith("<think>")
    arguments = {"thinks": False, "greeting": 'Say "{%- x -%}"\n'}
    template = select_template(data(template_args=arguments), tokenizer, {2})
    prompt = 'Say "{%- x -%}"\n<|im_start|>user\na<|im_end|><|im_start|>assistant\n\\'
    assert learnt(template, row) == (f"{prompt}b<|im_end|>", "b<|im_end|>")
    assert tokenizer.decode(template.prompt(row)) == prompt
    assert holds(template_line(template), "thinks", "false")
    saved = chat_tokenizer(template.jinja)
    served = saved.apply_chat_template(
        row.messages[:1], add_generation_prompt=True, tokenize=False, thinks=True
    )
    assert served == prompt, "a server's own argument changes nothing"
    assert select_template(data(), saved, {2}).jinja == template.jinja


@pytest.mark.parametrize("opening", ["", "\n", "\n\n"])
def test_arguments_leave_the_rest_of_a_template_alone(opening: str) -> None:
    """Also where it opens with a line break, and where a trained one is assigned anew."""
    tokenizer = chat_tokenizer(opening + "{{ greeting }}" + CHATML)
    first = select_template(data(template_args={"greeting": 1e-5}), tokenizer, {2})
    row = Conversation([user("a"), answer("b")])
    plain = learnt(select_template(data(), tokenizer, {2}), row)
    assert learnt(first, row)[0] == plain[0].replace(opening, f"{opening}1e-05", 1)
    again = select_template(data(template_args={"greeting": -2}), chat_tokenizer(first.jinja), {2})
    afresh = select_template(data(template_args={"greeting": -2}), tokenizer, {2})
    assert again.jinja == afresh.jinja


@pytest.mark.parametrize(
    ("template", "jinja", "name", "why"),
    [
        ("auto", THINKS, "think", "it takes greeting, thinks"),
        ("auto", THINKS, "content", "it takes greeting, thinks"),
        ("auto", THINKS, "messages", "it takes greeting, thinks"),
        ("auto", CHATML, "thinks", "it takes none"),
        ("own.jinja", THINKS, "bos_token", "it takes greeting, thinks"),
        ("auto", None, "thinks", "it takes none"),
    ],
)
def test_an_argument_that_the_template_does_not_read_is_refused(
    tmp_path: Path, template: str, jinja: str | None, name: str, why: str
) -> None:
    tokenizer = chat_tokenizer(jinja)
    if template.endswith(".jinja"):
        (tmp_path / template).write_text(str(jinja))
        template = str(tmp_path / template)
    for form in ("messages", "text") if jinja else ("messages",):
        with refuses(DataError, names=[name]) as caught:
            select_template(data(form, template, template_args={name: False}), tokenizer, {2})
        assert caught.value.where == f"data.template_args.{name}"
        assert caught.value.why == why
    assert holds(caught.value.fix, "thinks") or name != "think"
    with refuses(DataError, where="data.template_args"):
        select_template(data("text", template_args={name: False}), base(), {2})


def test_a_date_of_ones_own() -> None:
    tokenizer = chat_tokenizer("{{ strftime_now('%d %b %Y') }}" + CHATML)
    dated = data(template_args={"strftime_now": "2031-02-03"})
    template = select_template(dated, tokenizer, {2})
    row = Conversation([user("a"), answer("b")])
    assert learnt(template, row)[0].startswith("03 Feb 2031<|im_start|>")
    assert template.jinja == select_template(data(), chat_tokenizer(template.jinja), {2}).jinja
    with refuses(DataError, where="data.template_args.strftime_now"):
        select_template(dated, chat_tokenizer(template.jinja), {2})
    with refuses(DataError, where="data.template_args.strftime_now", names=["3 Feb"]):
        select_template(data(template_args={"strftime_now": "3 Feb"}), tokenizer, {2})


def test_a_prompt_unlike_rows_names_the_arguments_that_may_mend_it() -> None:
    """Nemotron's prompt opens a thought, and rows without one are written without."""
    untagged = re.sub(r"{% (end)?generation %}", "", THINKS)
    row = Conversation([user("a"), answer("b")])
    with refuses(DataError, where="r", names=[2]) as caught:
        select_template(data(), chat_tokenizer(untagged), {2}).encode(row, "last", where="r")
    assert "data.template_args (greeting, thinks)" in caught.value.fix
    template = select_template(data(template_args={"thinks": False}), chat_tokenizer(untagged), {2})
    assert learnt(template, row)[1] == "b<|im_end|>"
