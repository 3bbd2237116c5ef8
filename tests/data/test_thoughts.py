"""Thoughts, tool calls and prompts in the forms that rows and templates have for them: what a row
has is supervised whole, or the row is refused or counted.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from chat_table import TOOLS, answer, call, result, system, user
from chat_tokenizers import train
from hypothesis import given
from hypothesis import strategies as st

from conftest import byte_tokenizer
from errors import refuses
from recipes import make_run
from tunesmith.config.schema import Data, Source
from tunesmith.data.prepare import TrainingData, prepare_data
from tunesmith.data.rows.samples import Conversation
from tunesmith.data.text.row_warnings import ROW_WARNINGS
from tunesmith.data.text.select_template import select_template
from tunesmith.data.text.template import Template, TrainOn
from tunesmith.data.text.thoughts import find_thought, missing_parts, split_thought
from tunesmith.errors import DataError
from tunesmith.presentation.data import data_warnings

START, END = "<|im_start|>", "<|im_end|>"
CLOSE = "{{- '<|im_end|>\\n' -}}{%- endfor -%}"
HEADER = "{{- '<|im_start|>' ~ m.role ~ '\\n' -}}"
PROMPT = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\nOPENS' -}}{%- endif -%}"
ANSWERS = "{%- for m in messages -%}" + HEADER


def jinja(body: str, opens: str = "") -> str:
    """A ChatML template that writes each message with `body`; `opens` ends its prompt."""
    return ANSWERS + body + CLOSE + PROMPT.replace("OPENS", opens)


# DeepSeek V3, EXAONE 4: thoughts are cut out of the text, and there is no other form.
CUT = "{{- m.content.split('</think>')[-1] -}}"
STRIPS = jinja(CUT)
# DeepSeek R1: the same, and its prompt opens a thought.
STRIPS_AND_OPENS = jinja(CUT, "<think>\\n")
# gpt-oss: a key of another name; a text stands as it is.
OTHER_KEY = jinja(
    "{%- if m.thinking -%}{{- '[A]' ~ m.thinking ~ '[F]' -}}{%- endif -%}{{- m.content -}}"
)
# Qwen3.5: the last thought alone is written, and the prompt opens one.
OPENS = (
    "{%- set ns = namespace(last=-1) -%}{%- for m in messages if m.role == 'user' -%}"
    "{%- set ns.last = ns.last + 1 -%}{%- endfor -%}{%- set ns.seen = -1 -%}"
    + jinja(
        "{%- if m.role == 'user' -%}{%- set ns.seen = ns.seen + 1 -%}{%- endif -%}"
        "{%- set c = m.content -%}{%- set r = m.reasoning_content or '' -%}"
        "{%- if m.role == 'assistant' and '</think>' in c -%}"
        "{%- set r = c.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}"
        "{%- set c = c.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"
        "{%- if m.role == 'assistant' and ns.seen == ns.last -%}"
        "{{- '<think>\\n' ~ r ~ '\\n</think>\\n\\n' -}}{%- endif -%}{{- c -}}",
        "<think>\\n",
    )
)
# A template that knows thoughts by their tags alone, and leaves them out of earlier turns.
TAGS = jinja(
    "{{- m.content if loop.last or '</think>' not in m.content"
    " else m.content.split('</think>')[-1].lstrip() -}}"
)
# Gemma 4 with thinking off.
CLOSED = jinja("{{- m.content -}}", "<thought></thought>")
TEXT_ARGUMENTS = jinja(
    "{{- m.content -}}{%- for c in m.tool_calls or [] -%}"
    "{{- '<call>' + c.function.name + '\\n' + c.function.arguments + '</call>' -}}{%- endfor -%}"
)
# LFM2: tools are listed, and calls are for the row to write.
LISTS_TOOLS = (
    "{%- if tools -%}{{- '<|im_start|>system\\nTools: ' ~ tools | tojson ~ '<|im_end|>\\n' -}}{%- endif -%}"
    + jinja("{{- '<result>' ~ m.content ~ '</result>' if m.role == 'tool' else m.content -}}")
)


def template_of(text: str) -> Template:
    tokenizer = train("bytes", (START, END), False)
    end = tokenizer.convert_tokens_to_ids(END)
    return Template(tokenizer, {end}, jinja=text, name="own.jinja")


def trained(
    text: str, messages: list[Any], train_on: TrainOn = "response", tools: Any = None
) -> tuple[list[str], tuple[str, ...]]:
    """What of a row is supervised, stretch by stretch, and its flaws.

    The prompt in use is what stands before the last answer.
    """
    template = template_of(text)
    sample = Conversation(messages, tools)
    example = template.encode(sample, train_on, where="row 1")
    decode = template.tokenizer.decode
    stretches = [""]
    for id_, is_trained in zip(example.ids.tolist(), example.trained.tolist(), strict=True):
        if is_trained:
            stretches[-1] += decode([id_])
        elif stretches[-1]:
            stretches.append("")
    whole = decode(example.ids)
    assert whole.startswith(decode(template.prompt(sample)))
    return [stretch for stretch in stretches if stretch], example.flaws


def inline(thought: str, text: str) -> dict[str, Any]:
    return answer(f"<think>\n{thought}\n</think>\n\n{text}")


def field(thought: str, text: str) -> dict[str, Any]:
    return answer(text, reasoning_content=thought)


def turns(form: Any) -> list[Any]:
    return [user("2 + 2?"), form("two, two", "4"), user("3 + 3?"), form("three, three", "6")]


FORMS = pytest.mark.parametrize("form", [inline, field])


# --- thoughts


@FORMS
def test_a_template_that_leaves_thoughts_out_is_refused(form: Any) -> None:
    with refuses(DataError, where="row 1", names=[2], fix=["data.template=FILE.jinja"]):
        trained(STRIPS, turns(form))
    with refuses(DataError, where="row 1", names=[4]):
        trained(STRIPS, turns(form), "last")


@FORMS
def test_an_earlier_thought_that_is_not_trained_is_no_fault(form: Any) -> None:
    messages = [*turns(form)[:3], answer("6")]
    assert trained(STRIPS, messages, "last") == ([f"6{END}"], ())


@FORMS
def test_a_thought_that_the_prompt_opens_is_written_behind_it(form: Any) -> None:
    stretches, flaws = trained(STRIPS_AND_OPENS, turns(form))
    assert stretches == [f"4{END}", f"three, three\n</think>\n\n6{END}"]
    assert flaws == ("earlier_thought",)
    assert trained(STRIPS_AND_OPENS, turns(form), "last") == (stretches[1:], ())


def test_a_thought_that_the_prompt_opens_may_be_empty_but_not_missing() -> None:
    empty = [user("2 + 2?"), answer("<think>\n\n</think>\n\n4")]
    (stretch,), _ = trained(STRIPS_AND_OPENS, empty)
    # The line break before the tag may be one token with that of the prompt.
    assert stretch.lstrip("\n") == f"</think>\n\n4{END}"
    fix = ["<think>\\n\\n</think>\\n\\n"]
    with refuses(DataError, where="row 1", fix=fix):
        trained(STRIPS_AND_OPENS, [user("2 + 2?"), answer("4")])


@FORMS
def test_inline_thoughts_are_located_as_those_of_the_field(form: Any) -> None:
    stretches, flaws = trained(OPENS, turns(form))
    assert stretches == [f"4{END}", f"three, three\n</think>\n\n6{END}"]
    assert flaws == ("earlier_thought",)
    assert trained(OPENS, turns(form), "last") == (stretches[1:], ())


@FORMS
def test_a_thought_is_given_under_the_key_that_the_template_shows(form: Any) -> None:
    stretches, flaws = trained(OTHER_KEY, turns(form))
    assert stretches == [f"[A]two, two[F]4{END}", f"[A]three, three[F]6{END}"]
    assert flaws == ()
    # An empty one is none.
    empty = [user("2 + 2?"), answer("<think>\n\n</think>\n\n4")]
    assert trained(OTHER_KEY, empty) == ([f"4{END}"], ())


def test_a_thought_is_written_between_the_tags_that_the_template_knows() -> None:
    stretches, flaws = trained(TAGS, turns(field))
    assert stretches == [f"4{END}", f"<think>\nthree, three\n</think>\n\n6{END}"]
    assert flaws == ("earlier_thought",)
    assert trained(TAGS, turns(inline)) == (stretches, flaws)


def test_a_template_that_knows_no_thoughts_refuses_the_field_and_names_the_text() -> None:
    plain = jinja("{{- m.content -}}")
    with refuses(DataError, where="row 1", names=[2], fix=["<think>\\n"]):
        trained(plain, turns(field))
    whole = [m["content"] + END for m in turns(inline)[1::2]]
    assert trained(plain, turns(inline)) == (whole, ())


def test_a_thought_without_its_opening_tag_is_none_within_a_line() -> None:
    """A text that speaks of the tag loses what stands before it, and says so."""
    row = [user("Which?"), answer("One </think> two.")]
    assert trained(STRIPS, row) == ([f" two.{END}"], ("lost_text",))
    with refuses(DataError, where="row 1", names=[2]):
        trained(STRIPS, [user("2 + 2?"), answer("two, two\n</think>\n\n4")])


def test_gpt_oss() -> None:
    """The public template, where it is installed."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    text = (Path(spec.origin).parent / "chat_templates/gptoss.jinja").read_text(encoding="utf-8")
    special = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>")
    tokenizer = train("bytes", special, False)
    ends = {tokenizer.convert_tokens_to_ids(word) for word in ("<|return|>", "<|call|>")}
    template = Template(tokenizer, ends, jinja=text, name="chat")
    for form in (inline, field):
        row = Conversation([user("2 + 2?"), form("two, two", "4")])
        example = template.encode(row, "response", where="row 1")
        supervised = tokenizer.decode(example.ids[example.trained])
        assert "analysis<|message|>two, two<|end|>" in supervised
        assert supervised.endswith("final<|message|>4<|return|>")
        assert example.flaws == ()


# --- what the generation prompt holds


def test_an_empty_thought_of_the_prompt_stands_before_the_last_answer() -> None:
    row = [user("2 + 2?"), answer("4"), user("3 + 3?"), answer("6")]
    stretches, flaws = trained(CLOSED, row)
    assert (stretches, flaws) == ([f"4{END}", f"6{END}"], ("earlier_prompt",))
    assert trained(CLOSED, row, "last") == ([f"6{END}"], ())
    example = template_of(CLOSED).encode(Conversation(row[:2]), "response", where="row 1")
    whole = template_of(CLOSED).tokenizer.decode(example.ids)
    assert whole.endswith(f"{START}assistant\n<thought></thought>4{END}\n")


def test_an_empty_thought_of_the_template_follows_the_prompt_that_opens_one() -> None:
    """Nemotron 3: its rows without a thought have no line break between the tags."""
    nemotron = jinja(
        "{%- if m.role == 'assistant' and '</think>' not in m.content -%}{{- '<think>' ~"
        " ('\\n' ~ m.reasoning_content ~ '\\n' if m.reasoning_content else '') ~ '</think>' -}}"
        "{%- endif -%}{{- m.content -}}{%- for c in m.tool_calls or [] -%}"
        "{{- '<call>' ~ c.function.name ~ c.function.arguments | tojson -}}{%- endfor -%}",
        "<think>\\n",
    )
    question = user("2 + 2?")
    assert trained(nemotron, [question, answer("4")]) == ([f"</think>4{END}"], ())
    assert trained(nemotron, [question, answer("<think></think>4")]) == ([f"</think>4{END}"], ())
    called = answer("", tool_calls=[call("add")])
    assert trained(nemotron, [question, called]) == ([f"</think><call>add{{}}{END}"], ())
    assert trained(nemotron, [question, field("two", "4")]) == ([f"two\n</think>4{END}"], ())


def test_a_row_with_a_thought_is_not_put_behind_an_empty_one() -> None:
    with refuses(DataError, where="row 1"):
        trained(CLOSED, [user("2 + 2?"), field("two, two", "4")])
    with refuses(DataError, where="row 1"):
        trained(jinja("{{- m.content -}}", "<think>\\n"), [user("2 + 2?"), answer("4")])


def test_calls_before_the_last_answer_are_history_behind_an_empty_thought() -> None:
    """Gemma 4: the tag of a call, or of a thought, stands where the prompt has the empty thought."""
    gemma = jinja(
        "{%- if m.reasoning_content -%}{{- '<|c>t\\n' ~ m.reasoning_content ~ '\\n<c|>' -}}{%- endif -%}"
        "{{- m.content -}}{%- for c in m.tool_calls or [] -%}"
        "{{- '<|call>' ~ c.function.name ~ c.function.arguments | tojson -}}{%- endfor -%}",
        "<|c>t\\n<c|>",
    )
    row = [user("Rain?"), answer("", tool_calls=[call("weather")]), result("wet"), answer("Wet.")]
    stretches = [f"<|call>weather{{}}{END}", f"Wet.{END}"]
    assert trained(gemma, row) == (stretches, ("earlier_prompt",))
    assert trained(gemma, row[:2]) == ([f"<|call>weather{{}}{END}"], ())
    row[1]["reasoning_content"] = "I ask."
    with refuses(DataError, where="row 1", fix=["data.train_on=last"]):
        trained(gemma, row)
    assert trained(gemma, row, "last") == ([f"Wet.{END}"], ())


def test_a_block_that_opens_before_its_header_keeps_the_tag_of_a_call() -> None:
    """The prompt's thought and the call begin with the same letter."""
    tagged = (
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{% generation %}"
        "{{- '<|im_start|>assistant\\n' ~ m.content -}}{%- for c in m.tool_calls or [] -%}"
        "{{- '<|call>' ~ c.function.name ~ c.function.arguments | tojson -}}{%- endfor -%}"
        "{{- '<|im_end|>' -}}{% endgeneration %}{%- else -%}"
        "{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>' -}}{%- endif -%}{{- '\\n' -}}"
        "{%- endfor -%}" + PROMPT.replace("OPENS", "<think>\\n")
    )
    row = Conversation([user("Rain?"), answer("", tool_calls=[call("weather")])])
    template = template_of(tagged)
    example = template.encode(row, "response", where="row 1")
    supervised = template.tokenizer.decode(example.ids[example.trained])
    assert supervised == f"<|call>weather{{}}{END}"


def test_all_with_an_empty_thought_and_an_answer_that_is_left_out() -> None:
    template = template_of(CLOSED)
    row = [user("2 + 2?"), answer("4"), user("3 + 3?"), answer("6")]
    sample = Conversation(row, untrained=frozenset({1}))
    example = template.encode(sample, "all", where="row 1")
    supervised = template.tokenizer.decode(example.ids[example.trained])
    assert "4" not in supervised
    assert supervised.endswith(f"<thought></thought>6{END}\n")


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("{{- m.content if not m.tool_calls -}}CALL", "drops the text before the call"),
        ("CALL{{- m.content -}}", "moves the text before the call"),
    ],
)
def test_a_text_before_a_call_that_the_template_does_not_write_there(body: str, what: str) -> None:
    """gpt-oss drops the text, and Gemma 4 writes it behind the call."""
    written = "{%- for c in m.tool_calls or [] -%}{{- '<call>' ~ c.function -}}{%- endfor -%}"
    template = jinja(body.replace("CALL", written))
    row = [user("Rain?"), answer("I ask.", tool_calls=[call("weather")])]
    names = [what, "message 2"]
    with refuses(DataError, where="row 1", names=names, fix=["reasoning_content"]):
        trained(template, row)
    row[1]["content"] = ""
    assert trained(template, row)[1] == ()


@pytest.mark.parametrize(
    ("jinja", "what"),
    [
        (jinja("{{- m.content -}}"), ""),
        (jinja("{{- m.content if m.role != 'system' -}}"), "drops message 3 (system)"),
        (
            "{%- for m in messages if m.role == 'system' -%}{{- m.content ~ '\n' -}}{%- endfor -%}"
            + jinja("{{- m.content if m.role != 'system' -}}"),
            "moves message 3 (system)",
        ),
    ],
)
def test_a_later_system_message_stands_where_the_row_has_it(jinja: str, what: str) -> None:
    row = [user("Hi"), answer("Hello."), system("Be terse."), user("Bye"), answer("Bye.")]
    if not what:
        assert trained(jinja, row)[0] == [f"Hello.{END}", f"Bye.{END}"]
        return
    with refuses(DataError, where="row 1", names=[what]):
        trained(jinja, row)


# --- the last answer alone


def test_an_earlier_answer_need_not_be_located_for_the_last_one() -> None:
    """The template reads one word, and writes another with it."""
    reads = jinja("{{- 'yea, yes' if m.content == 'yea' else m.content -}}")
    row = [user("So?"), answer("yea"), user("Is it?"), answer("It is."), user("?"), answer("Hm.")]
    with refuses(DataError, where="row 1"):
        trained(reads, row)
    assert trained(reads, row, "last") == ([f"Hm.{END}"], ())
    # In its place: the conversation would be another one.
    with refuses(DataError, where="row 1", names=[2]):
        trained(reads.replace("yea, yes", "no"), row, "last")


# --- tool calls

CALLS = [
    user("Rain?"),
    answer("", tool_calls=[call("weather", place='O"slo\n', days=2, dry=True)]),
    result("wet"),
    answer("Wet."),
]


def test_arguments_are_given_as_text_where_the_template_wants_that() -> None:
    stretches, flaws = trained(TEXT_ARGUMENTS, CALLS)
    arguments = json.dumps({"place": 'O"slo\n', "days": 2, "dry": True})
    assert stretches == [f"<call>weather\n{arguments}</call>{END}", f"Wet.{END}"]
    assert flaws == ()
    saved = template_of(template_of(TEXT_ARGUMENTS).jinja or "")
    prompt = saved.tokenizer.decode(saved.prompt(Conversation(CALLS)))
    assert arguments in prompt


def test_tools_that_a_template_with_calls_does_not_list_are_counted() -> None:
    assert trained(TEXT_ARGUMENTS, CALLS, tools=TOOLS)[1] == ("unlisted_tools",)
    with refuses(DataError, where="row 1"):
        trained(jinja("{{- m.content -}}"), [user("a"), answer("b")], tools=TOOLS)


def test_a_template_that_lists_tools_keeps_its_own_form() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = LISTS_TOOLS
    data = Data(train=(Source(source="rows.jsonl", format="messages"),))
    template = select_template(data, tokenizer, {tokenizer.eos_token_id})
    assert template.jinja == LISTS_TOOLS
    with refuses(
        DataError, where="row 1", names=[2], fix=["tool_calls", "data.template=FILE.jinja"]
    ):
        template.encode(Conversation(CALLS, TOOLS), "response", where="row 1")
    written = [user("Rain?"), answer("[weather()]"), result("wet"), answer("Wet.")]
    example = template.encode(Conversation(written, TOOLS), "response", where="row 1")
    assert tokenizer.decode(example.ids[example.trained]) == f"[weather()]{END}Wet.{END}"


def test_a_chatml_that_takes_no_results_gets_hermes_form() -> None:
    tokenizer = byte_tokenizer()
    data = Data(train=(Source(source="rows.jsonl", format="messages"),))
    raises = "{%- if m.role == 'tool' -%}{{- raise_exception('no') -}}{%- endif -%}"
    for body in (raises, "", "{%- if m.role == 'tool' -%}{%- continue -%}{%- endif -%}"):
        text = jinja("{{- m.content -}}").replace(HEADER, body + HEADER, 1)
        tokenizer.chat_template = text
        assert select_template(data, tokenizer, {tokenizer.eos_token_id}).jinja != text
    for body in ("{{- '<result>' ~ m.content -}}", "{{- m.content ~ m.tool_calls -}}"):
        tokenizer.chat_template = jinja(body)
        template = select_template(data, tokenizer, {tokenizer.eos_token_id})
        assert template.jinja == tokenizer.chat_template


def test_a_call_of_which_a_value_is_left_out_is_counted() -> None:
    names_only = jinja(
        "{{- m.content -}}{%- for c in m.tool_calls or [] -%}{{- c.function.name ~ '(' -}}"
        "{%- for n, v in c.function.arguments.items() if v is string -%}{{- n ~ '=' ~ v -}}"
        "{%- endfor -%}{{- ')' -}}{%- endfor -%}"
    )
    assert trained(names_only, CALLS)[1] == ("lost_call",)


# --- parts of an answer


@pytest.mark.parametrize(
    ("text", "thought", "rest"),
    [
        ("<think>\nhm\n</think>\n\n4", "hm", "4"),
        ("  <think>hm</think>4", "hm", "4"),
        ("<thinking>hm</thinking>4", "hm", "4"),
        ("[THINK]hm[/THINK]4", "hm", "4"),
        ("hm\n</think>\n\n4", "hm", "4"),
        ("</think>\n\n4", "", "4"),
        ("<think>\n\n</think>\n\n4", "", "4"),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
    ],
)
def test_a_thought_in_front_of_a_text(text: str, thought: str, rest: str) -> None:
    place = find_thought(text)
    assert place is not None
    assert text[place.start : place.end].strip() == thought
    split = split_thought(answer(text))
    assert (split["reasoning_content"], split["content"]) == (thought, rest)


@pytest.mark.parametrize(
    "text", ["4", "", "<think>hm", "a <think>hm</think>4", "so </think> it", "</b> [/INST]"]
)
def test_a_text_without_a_thought_in_front(text: str) -> None:
    assert find_thought(text) is None
    assert split_thought(answer(text)) == answer(text)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(arguments=st.dictionaries(st.text(min_size=1), VALUES, max_size=3), ascii_only=st.booleans())
def test_a_call_is_whole_where_json_writes_it(arguments: Any, ascii_only: bool) -> None:
    message = answer("Hm.", tool_calls=[call("weather")])
    message["tool_calls"][0]["function"]["arguments"] = arguments
    written = json.dumps(arguments, ensure_ascii=ascii_only)
    assert [*missing_parts(message, f"Hm.<call>weather{written}</call>")] == []
    assert [*missing_parts(message, f"Hm.<call>weathe{written}</call>")] == ["lost_call"]


# --- counted over all rows


def prepared(
    tiny: Path, folder: Path, rows: list[list[Any]], text: str, *, strict: bool = True
) -> TrainingData:
    (folder / "own.jinja").write_text(text, encoding="utf-8")
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    source = {"source": str(path), "format": "messages"}
    data = {"train": source, "template": str(folder / "own.jinja")}
    run = make_run(tiny, folder, held=False, data=data)
    tokenizer = byte_tokenizer()
    ends = {tokenizer.eos_token_id}
    cache = folder / "cache"
    return prepare_data(run, tokenizer, ends, 272, cache=cache, strict=strict)


def test_few_answers_that_lack_a_part_are_told_and_many_refused(tiny: Path, tmp_path: Path) -> None:
    whole = [[user(f"{n}?"), answer(f"{n}.")] for n in range(199)]
    cut = [user("Which?"), answer("One </think> two.")]
    for _ in range(2):  # the second time from the cache
        data = prepared(tiny, tmp_path, [*whole, cut, *whole], STRIPS)
        (part,) = data.train.parts
        assert part.counts.flaws == {"lost_text": [1, 199]}
        (line,) = [line for line in data_warnings(data) if ROW_WARNINGS["lost_text"].what in line]
        assert f"{tmp_path}/rows.jsonl:200" in line
    with refuses(DataError, where="rows.jsonl:1", names=["1 of 50"]):
        prepared(tiny, tmp_path, [cut, *whole[:49]], STRIPS)


def test_earlier_thoughts_that_the_family_leaves_out_are_told(tiny: Path, tmp_path: Path) -> None:
    data = prepared(tiny, tmp_path, [turns(inline), turns(field), turns(field)[2:]], OPENS)
    (part,) = data.train.parts
    assert part.counts.flaws == {"earlier_thought": [2, 0]}
    (line,) = [line for line in data_warnings(data) if "data.train_on=last" in line]
    assert "2 of 3" in line
