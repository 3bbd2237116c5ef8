"""What is supervised of thoughts, calls and ends of answers, by the templates of the families.

The templates are those that TRL and Axolotl ship; the texts that they must give are written down.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chat_table import TOOLS, answer, call, calls, result, system, thinks, turns, user
from chat_tokenizers import train
from conftest import byte_tokenizer
from errors import refuses
from recipes import make_run
from stored_templates import encode, encoder_of, supervised_texts, tokenizer_of
from tunesmith.batches.training_data import TrainingData
from tunesmith.config.schema import Data, Source
from tunesmith.errors import DataError
from tunesmith.presentation.data import data_warnings
from tunesmith.rows.samples import Conversation
from tunesmith.start.prepare import prepare_data
from tunesmith.tokens.text.row_warnings import ROW_WARNINGS
from tunesmith.tokens.text.select_template import select_template
from tunesmith.tokens.text.template import Template, TrainOn
from tunesmith.tokens.text.thoughts import (
    MessageForm,
    find_thought,
    split_thought,
)

START, END = "<|im_start|>", "<|im_end|>"


@pytest.fixture(autouse=True)
def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial takes a process of its own for each template."""
    monkeypatch.setattr("tunesmith.tokens.text.select_template.try_template", lambda *_: None)


# --- templates of the families


def inline(thought: str, text: str) -> dict[str, Any]:
    return answer(f"<think>\n{thought}\n</think>\n\n{text}")


def two(form: Any) -> list[Any]:
    return [user("2 + 2?"), form("two, two", "4"), user("3 + 3?"), form("three, three", "6")]


OSLO, TIME = call("weather", place="Oslo"), call("time", 2)
RESULTS = [result("wet"), result("noon", 2), answer("Wet.")]
ROWS = {
    "plain": turns("a", "b", "c", "d"),
    "field": two(thinks),
    "inline": two(inline),
    "tag": turns("Which?", "One </think> two."),
    "calls": [user("Rain?"), calls(OSLO, TIME), *RESULTS],
    "call": [user("Rain?"), calls(OSLO), result("wet"), answer("Wet.")],
    "text": [user("Rain?"), calls(OSLO, text="I ask."), result("wet"), answer("Wet.")],
    "system": [*turns("Hi", "Hello."), system("Be terse."), *turns("Bye", "Bye.")],
}
EARLIER = ["earlier_thought"]
PROMPT = ["earlier_prompt"]
SENTENCE = "<｜end▁of▁sentence｜>"
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"place": "Oslo"}}\n</tool_call>'
BOTH = f'{HERMES}\n<tool_call>\n{{"name": "time", "arguments": {{}}}}\n</tool_call>{END}'
FUNCTION = "<tool_call>\n<function=weather>\n<parameter=place>\nOslo\n</parameter>\n</function>\n</tool_call>"
ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
GLM = "\n<think></think>\n"
GLM_CALL = "<tool_call>weather\n<arg_key>place</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>"
GEMMA_CALL = '<|tool_call>call:weather{place:<|"|>Oslo<|"|>}<tool_call|>'
WRITTEN = [f"<think>\ntwo, two\n</think>\n\n4{END}", f"<think>\nthree, three\n</think>\n\n6{END}"]
# A template, rows, their supervised texts, and the names of their warnings.
CASES: list[tuple[str, str, list[str], list[str]]] = [
    ("axolotl/chatml", "plain", [f"b{END}", f"d{END}"], []),
    ("axolotl/chatml", "inline", WRITTEN, []),
    ("axolotl/chatml", "calls", [BOTH, f"Wet.{END}"], []),
    # Thoughts before the last question are left out.
    ("trl/qwen3", "field inline", [f"4{END}", WRITTEN[1]], EARLIER),
    ("trl/qwen3", "plain", [f"b{END}", f"<think>\n\n</think>\n\nd{END}"], []),
    ("trl/qwen3", "calls", [BOTH, f"<think>\n\n</think>\n\nWet.{END}"], []),
    # The prompt opens a thought.
    ("trl/qwen3_5_think", "field inline", [f"4{END}", f"three, three\n</think>\n\n6{END}"], EARLIER),
    ("trl/qwen3_5_think", "plain", [f"b{END}", f"\n</think>\n\nd{END}"], PROMPT),
    ("trl/qwen3_5_think", "tag", [f"One\n</think>\n\n two.{END}"], ["lost_text"]),
    ("trl/deepseekv3", "field inline", [f"4{SENTENCE}", f"three, three\n</think>\n\n6{SENTENCE}"], EARLIER),
    # The prompt holds an empty thought.
    ("trl/qwen3_5_nothink", "plain", [f"b{END}", f"d{END}"], PROMPT),
    # Tags without line breaks between them.
    ("trl/nemotron_3_nano", "plain", [f"</think>b{END}", f"</think>d{END}"], PROMPT),
    ("trl/nemotron_3_nano", "call", [f"</think>\n{FUNCTION}\n{END}", f"</think>Wet.{END}"], PROMPT),
    # A key of another name; several tokens end an answer, and <|end|> the earlier ones.
    (
        "trl/gptoss", "field inline",
        [f"{FINAL}4", f"{ANALYSIS}three, three<|end|><|start|>assistant{FINAL}6<|return|>"], EARLIER,
    ),
    (
        "trl/gptoss", "call",
        [' to=functions.weather<|channel|>commentary json<|message|>{"place": "Oslo"}<|call|>', f"{FINAL}Wet.<|return|>"], [],
    ),
    # A call, its result and the answer are one turn; the first token of the result ends a call.
    ("trl/gemma4", "calls", [f"{GEMMA_CALL}<|tool_call>call:time{{}}<tool_call|><|tool_response>", "Wet.<turn|>"], []),
    ("trl/gemma4_v5", "field inline", ["4<turn|>", "<|channel>thought\nthree, three\n<channel|>6<turn|>"], EARLIER),
    # Nothing ends an answer but the first token of the next turn.
    ("trl/glm4moe", "field inline", [f"{GLM}4<|user|>", "\n<think>three, three</think>\n6<|user|>"], EARLIER),
    ("trl/glm4moe", "calls", [f"{GLM}{GLM_CALL}\n<tool_call>time\n</tool_call><|observation|>", f"{GLM}Wet.<|user|>"], []),
    ("trl/lfm2_v2", "text", [f"I ask.<|tool_call_start|>[weather(place='Oslo')]<|tool_call_end|>{END}", f"Wet.{END}"], []),
    ("trl/llama3_1", "call", ['{"name": "weather", "parameters": {"place": "Oslo"}}<|eot_id|>', "Wet.<|eot_id|>"], []),
]  # fmt: skip


QUICK = ("axolotl/chatml", "trl/qwen3", "trl/gptoss", "trl/deepseekv3")


def supervised(name: str, messages: list[Any], train_on: TrainOn) -> tuple[list[str], list[str]]:
    encoder = encoder_of(name, train_on)
    has_tools = any("tool_calls" in message for message in messages)
    row = {"messages": messages, **({"tools": TOOLS} if has_tools else {})}
    encoded = encode(encoder, row)
    decode = encoder.template.tokenizer.decode
    prompt = encoder.template.prompt(Conversation(messages, TOOLS if has_tools else None))
    assert decode(encoded.example.ids).startswith(decode(prompt))
    return supervised_texts(encoder.template, encoded), list(encoded.warnings)


@pytest.mark.parametrize(
    ("name", "rows", "texts", "told"),
    [pytest.param(*case, marks=() if case[0] in QUICK else pytest.mark.slow) for case in CASES],
)
def test_the_supervised_texts_of_a_family(
    name: str, rows: str, texts: list[str], told: list[str]
) -> None:
    for row in rows.split():
        assert supervised(name, ROWS[row], "response") == (texts, told)
        later = [warning for warning in told if not warning.startswith("earlier")]
        assert supervised(name, ROWS[row], "last") == (texts[-1:], later)


@pytest.mark.parametrize(
    ("name", "rows", "names", "fix"),
    [
        ("trl/deepseekv3", "plain tag", [], "<think>\\n\\n</think>\\n\\n"),
        ("trl/deepseekv3", "system", [3, "system"], "split the row"),
        ("trl/qwen3_5_nothink", "field inline", [], "data.template_args"),
        ("axolotl/chatml", "field", [2], "<think>\\n"),
        ("trl/gptoss", "text", [2], "reasoning_content"),
        ("trl/gptoss", "calls", [2], "tool_calls"),
        ("trl/glm4moe", "system", [2], "model.added_tokens"),
    ],
)
def test_what_a_family_cannot_write_is_refused(
    name: str, rows: str, names: list[Any], fix: str
) -> None:
    for row in rows.split():
        with refuses(DataError, where="rows.jsonl:1", names=names) as caught:
            supervised(name, ROWS[row], "response")
        assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("name", "stops", "ends", "earlier"),
    [
        ("trl/gptoss", ["<|return|>"], ["<|return|>", "<|call|>"], ["<|end|>"]),
        ("trl/gemma4", ["<turn|>"], ["<turn|>", "<|tool_response>"], []),
        ("trl/glm4moe", ["<|user|>"], ["<|user|>"], []),
    ],
)
def test_ends_of_answers_by_where_generation_stops(
    name: str, stops: list[str], ends: list[str], earlier: list[str]
) -> None:
    """A next turn's header at which generation does not stop ends nothing."""
    tokenizer = tokenizer_of(name)
    to_ids, to_tokens = tokenizer.convert_tokens_to_ids, tokenizer.convert_ids_to_tokens
    data = Data(train=(Source(source="rows.jsonl", format="messages"),))
    template = select_template(data, tokenizer, {tokenizer.eos_token_id, *to_ids(stops)})
    assert {*to_tokens([*template.end_ids])} == {tokenizer.eos_token, *ends}
    assert to_tokens([*template.earlier_end_ids]) == earlier
    if name == "trl/glm4moe":
        with refuses(DataError, where="row 1", names=[2], fix=["model.added_tokens"]):
            template.encode(Conversation(ROWS["call"][:2], TOOLS), "response", where="row 1")


# --- templates of their own


def jinja(body: str, opens: str = "") -> str:
    """A ChatML template that writes each message with `body`; `opens` ends its prompt."""
    header = "{{- '<|im_start|>' ~ m.role ~ '\\n' -}}"
    return (
        "{%- for m in messages -%}" + header + body + "{{- '<|im_end|>\\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n"
        + opens
        + "' -}}{%- endif -%}"
    )


PLAIN = jinja("{{- m.content -}}")
# Thoughts are cut out of the text, and there is no other form.
STRIPS = jinja("{{- m.content.split('</think>')[-1] -}}")
# A template that knows thoughts by their tags alone, and leaves them out of earlier turns.
TAGS = jinja(
    "{{- m.content if loop.last or '</think>' not in m.content"
    " else m.content.split('</think>')[-1].lstrip() -}}"
)


def template_of(text: str) -> Template:
    tokenizer = train("bytes", (START, END), False)
    end = tokenizer.convert_tokens_to_ids(END)
    return Template(tokenizer, {end}, jinja=text, name="own.jinja")


def trained(
    text: str, messages: list[Any], train_on: TrainOn = "response", **keys: Any
) -> tuple[str, tuple[str, ...]]:
    """What of a row is supervised, and its flaws."""
    template = template_of(text)
    example = template.encode(Conversation(messages, **keys), train_on, where="row 1")
    return template.tokenizer.decode(example.ids[example.trained]), example.flaws


def test_what_of_thoughts_tools_and_calls_is_not_written() -> None:
    assert trained(TAGS, two(thinks)) == (f"4{END}{WRITTEN[1]}", ("earlier_thought",))
    with refuses(DataError, where="row 1"):
        trained(PLAIN, turns("a", "b"), tools=TOOLS)
    texts_only = jinja(
        "{{- m.content -}}{%- for c in m.tool_calls or [] -%}{{- c.function.name ~ '(' -}}"
        "{%- for n, v in c.function.arguments.items() if v is string -%}{{- n ~ '=' ~ v -}}"
        "{%- endfor -%}{{- ')' -}}{%- endfor -%}"
    )
    row = [user("Rain?"), calls(call("weather", place="Oslo", days=2))]
    assert trained(texts_only, row)[1] == ("lost_call",)
    names = jinja(
        "{{- m.content -}}{%- for c in m.tool_calls or [] -%}{{- c | string -}}{%- endfor -%}"
    )
    assert trained(names, row, tools=TOOLS)[1] == ("unlisted_tools",)


# --- parts of an answer


def test_a_thought_in_front_of_a_text() -> None:
    for text, thought, rest in (
        ("<think>\nhm\n</think>\n\n4", "hm", "4"),
        ("[THINK]hm[/THINK]4", "hm", "4"),
        ("hm\n</think>\n\n4", "hm", "4"),
        ("</think>\n\n4", "", "4"),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
    ):
        place = find_thought(text)
        assert place is not None
        assert text[place.start : place.end].strip() == thought
        split = split_thought(answer(text))
        assert (split["reasoning_content"], split["content"]) == (thought, rest)
    for text in ("4", "<think>hm", "a <think>hm</think>4", "so </think> it"):
        assert find_thought(text) is None
        assert split_thought(answer(text)) == answer(text)


# --- counted over all rows


def prepared(tiny: Path, folder: Path, rows: list[list[Any]]) -> TrainingData:
    (folder / "own.jinja").write_text(STRIPS, encoding="utf-8")
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    source = {"source": str(path), "format": "messages"}
    data = {"train": source, "template": str(folder / "own.jinja")}
    run = make_run(tiny, folder, held=False, data=data)
    tokenizer = byte_tokenizer()
    ends = {tokenizer.eos_token_id}
    return prepare_data(run, tokenizer, ends, 272, cache=folder / "cache", strict=True)


@pytest.mark.slow
def test_few_answers_that_lack_a_part_are_told_and_many_refused(tiny: Path, tmp_path: Path) -> None:
    whole = [turns(f"{n}?", f"{n}.") for n in range(150)]
    for _ in range(2):  # the second time from the cache
        data = prepared(tiny, tmp_path, [*whole, ROWS["tag"]])
        (part,) = data.train.parts
        assert part.counts.flaws == {"lost_text": [1, 150]}
        (line,) = [line for line in data_warnings(data) if ROW_WARNINGS["lost_text"].what in line]
        assert f"{tmp_path}/rows.jsonl:151" in line
    with refuses(DataError, where="rows.jsonl:1", names=["1 of 50"]):
        prepared(tiny, tmp_path, [ROWS["tag"], *whole[:49]])


def test_a_template_that_reads_arguments_as_text_gets_json_text() -> None:
    arguments = {"city": "Köln", "days": 2}
    given_call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    message = {"role": "assistant", "content": "", "tool_calls": [given_call]}
    (found,) = MessageForm(text_arguments=True).apply([message])
    (as_text,) = found["tool_calls"]
    assert json.loads(as_text["function"]["arguments"]) == arguments
    assert given_call["function"]["arguments"] is arguments  # the row stays as it is


def test_an_earlier_answer_need_not_be_located_for_the_last_one() -> None:
    """The template reads one word, and writes another with it."""
    reads = jinja("{{- 'yea, yes' if m.content == 'yea' else m.content -}}")
    row = turns("So?", "yea", "Is it?", "It is.", "?", "Hm.")
    with refuses(DataError, where="row 1"):
        trained(reads, row)
    assert trained(reads, row, "last") == (f"Hm.{END}", ())
    # In its place: the conversation would be another one.
    with refuses(DataError, where="row 1", names=[2]):
        trained(reads.replace("yea, yes", "no"), row, "last")
