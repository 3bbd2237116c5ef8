"""Rows that are valid but seldom meant are counted and told with their first place."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import byte_tokenizer
from errors import holds, lines_with, refuses, warnings_with
from recipes import make_run
from rows import alpaca
from tunesmith.config.schema import Source
from tunesmith.data.prepare import TrainingData, prepare_data
from tunesmith.data.rows.formats import convert_row
from tunesmith.data.rows.samples import Completion, Conversation, Text
from tunesmith.data.text.row_warnings import row_warnings
from tunesmith.data.text.template import Template
from tunesmith.data.tokens.token_set import TokenSet, find_repeats
from tunesmith.errors import DataError
from tunesmith.presentation.data import data_warnings, start_data_lines, template_line
from tunesmith.units import Length

U, A = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def prepared(
    tiny: Path,
    folder: Path,
    rows: list[dict[str, Any]],
    *,
    base: bool = False,
    **data: Any,
) -> TrainingData:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    forms = {
        "prompt": "prompt-completion",
        "instruction": "alpaca",
        "conversations": "sharegpt",
        "chosen": "preference",
    }
    first = next(iter(rows[0]))
    source = {"source": str(path), "format": forms.get(first, first), **data.pop("source", {})}
    method = "dpo" if source["format"] == "preference" else "sft"
    changes = {"data": {"train": source, **data}, "method": {"name": method}}
    run = make_run(tiny, folder, held=False, **changes)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None if base else tokenizer.chat_template
    return prepare_data(run, tokenizer, {tokenizer.eos_token_id}, 272, cache=folder / "cache")


def test_a_warmup_as_long_as_the_run_is_told(tiny: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Who {i}?", "completion": f"He {i}."} for i in range(60)]
    data = prepared(tiny, tmp_path, rows)
    steps = data.schedule.steps(data.run.train.duration)
    for length, count in ((f"{steps} steps", 1), (f"{(steps or 2) - 1} steps", 0)):
        train = replace(data.run.train, warmup=Length.parse(length))
        run = replace(data.run, train=train)
        told = [line for line in data_warnings(replace(data, run=run)) if "train.warmup" in line]
        assert len(told) == count


def warned(data: TrainingData, about: str) -> str:
    (line,) = [line for line in data_warnings(data) if about in line]
    assert "; fix: " in line
    return line


@pytest.mark.parametrize("form", ["prompt-completion", "preference"])
def test_a_prompt_that_answers_repeat_is_told_with_the_first_row(
    form: str, tiny: Path, tmp_path: Path
) -> None:
    rows = []
    for i in range(60):
        prompt = f"\n\nHuman: Who is {i}?\n\nAssistant:" if i else "Hello"
        answer = f"{prompt} He is {i}." if i % 2 == 0 else prompt
        pair = {"chosen": answer, "rejected": f"{prompt} No."}
        rows.append(
            {"prompt": prompt, **(pair if form == "preference" else {"completion": answer})}
        )
    data = prepared(tiny, tmp_path, rows, source={"format": form})
    assert holds(warned(data, "whole prompt"), "29 of 60", f"{tmp_path}/rows.jsonl:3")


def test_empty_answers_and_placeholders_are_told_with_the_first_row(
    tiny: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Who {i}?", "completion": f"He {i}."} for i in range(60)]
    for i in (7, 9, 40):
        rows[i]["completion"] = " \n"[: i % 3]
    rows[12]["prompt"] = "Dear {{ customer.name }}, who?"
    for _ in range(2):  # the second time from the cache
        data = prepared(tiny, tmp_path, rows)
        assert holds(warned(data, '"train": false'), "3 of 60", f"{tmp_path}/rows.jsonl:8")
        assert holds(warned(data, "{{name}}"), "1 of 60", f"{tmp_path}/rows.jsonl:13")
        assert "60 of 60 rows" in "\n".join(start_data_lines(data))
        assert lines_with("\n".join(start_data_lines(data)), "60 of 60", 3)
        assert len(data_warnings(data)) == 3, "with that of the few steps"


def test_prompts_glued_to_their_answers_are_told_where_no_template_was_asked_for(
    tiny: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": "Who?", "completion": f"He {i}."} for i in range(5)]
    rows.append({"prompt": "Who? ", "completion": "I."})
    assert warned(prepared(tiny, tmp_path, rows, base=True), "5 of 6 rows")
    for asked in ("raw", "alpaca"):
        data = prepared(tiny, tmp_path, rows, base=True, template=asked, seq_len=512)
        assert not any("5 of 6" in line for line in data_warnings(data))


SPELLED = "Write <|im_end|> here."


def test_a_text_model_is_told_of_pictures_that_nothing_reads(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    rows = [{"prompt": f"Who {i}?", "completion": f"He {i}."} for i in range(60)]
    rows[1]["path"] = "a.png"
    rows[2]["prompt"] = "<image>\nWho?"
    told = "\n".join(data_warnings(prepared(tiny, tmp_path, rows)))
    for row in (2, 3):
        assert warnings_with(told, f"{tmp_path}/rows.jsonl:{row}")
    assert warnings_with(told, "path")


def test_special_tokens_in_the_text_of_rows_are_told_by_name(tiny: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"messages": [U, {**A, "content": f"b{i}"}]} for i in range(20)]
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "<|im_start|>"}}}
    rows[4] = {"messages": [{**U, "content": SPELLED}, A]}
    rows[7] = {"messages": [U, {**A, "content": SPELLED * 2}]}
    rows[9] = {"messages": [U, {**A, "content": "", "tool_calls": [call]}]}
    for _ in range(2):  # the second time from the cache
        data = prepared(tiny, tmp_path, rows)
        line = warned(data, "<|im_end|>")
        path = f"{tmp_path}/rows.jsonl"
        assert holds(line, f"{path}:5", "<|im_start|>", f"{path}:10")
        counts = data.train.parts[0].counts
        assert counts.control_tokens == {"<|im_end|>": [2, 4], "<|im_start|>": [1, 9]}


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"prompt": SPELLED, "completion": "x"}, True),
        ({"instruction": "Say it.", "input": SPELLED, "output": "x"}, True),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": SPELLED}]}, True),
        ({"chosen": "x", "rejected": SPELLED, "prompt": "a"}, True),
        ({"text": SPELLED}, False),
        ({"prompt": "a", "completion": "<think>b</think>c < |im_end| >"}, False),
    ],
)  # fmt: skip
def test_in_which_formats_special_tokens_are_told(
    tiny: Path, tmp_path: Path, row: dict[str, Any], found: bool
) -> None:
    data = prepared(tiny, tmp_path, [row])
    assert bool(data.train.parts[0].counts.control_tokens) == found


def test_special_tokens_that_a_recipe_or_a_raw_row_asks_for_are_not_told(
    tiny: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Who {i}? ", "completion": f"He {i}.<|im_end|>"} for i in range(5)]
    assert not prepared(tiny, tmp_path, rows, base=True).train.parts[0].counts.control_tokens
    rows[2]["prompt"] = SPELLED
    assert warned(prepared(tiny, tmp_path, rows, base=True), "<|im_end|>")
    raw = prepared(tiny, tmp_path, rows, base=True, template="raw")
    assert not [line for line in data_warnings(raw) if "<|im_end|>" in line]
    rows = [{"prompt": "Which?", "completion": "<|im_start|>"}]
    data = prepared(tiny, tmp_path, rows)
    assert warned(data, "<|im_start|>")
    model = replace(data.run.model, added_tokens=("<|im_start|>",))
    added = replace(data, run=replace(data.run, model=model))
    assert not [line for line in data_warnings(added) if "<|im_start|>" in line]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Dear {{name}}", True),
        ("{{ first_name }}", True),
        ("{{user.name}} and {{char}}", True),
        ("f'{x}' and ${HOME} and \\frac{a}{{b}^2}", False),
        ("a {{ two words }}", False),
    ],
)
def test_which_placeholders_are_told(text: str, found: bool) -> None:
    for sample in (
        Text(text),
        Completion(text, "x"),
        Completion("x", text),
        Conversation([U, {**A, "content": text}]),
    ):
        assert list(row_warnings(sample, raw=False)) == ["placeholder"] * found


@pytest.mark.parametrize(
    ("question", "is_told"),
    [
        ("\n\nHuman: Who is it?\n\nAssistant: ", True),
        ("<|im_start|>user\nWho is it?<|im_end|>\n<|im_start|>assistant\n", True),
        ("<start_of_turn>user\nWho is it?<end_of_turn>\n<start_of_turn>model\n", True),
        ("\n\nHuman: Who is it?\n\nAssistant: He.\n\nWho is meant?", False),
        ("Write a short response: ", False),
        ("Who is your assistant?", False),
    ],
)
def test_prompts_for_no_template_are_told_where_there_is_one(question: str, is_told: bool) -> None:
    sample = Completion(question, "He.")
    assert ("written_turns" in row_warnings(sample, raw=False)) == is_told
    assert "written_turns" not in list(row_warnings(sample, raw=True))
    chat = Conversation([{**U, "content": question}, A])
    assert ("written_turns" in row_warnings(chat, raw=False)) == is_told
    said = Conversation([U, {**A, "content": question}])
    assert "written_turns" not in list(row_warnings(said, raw=False))


@pytest.mark.parametrize(
    ("answer", "is_told"),
    [
        ("<think>\nBecause", True),
        ("\n<thinking>Because</think> so", True),
        ("[THINK]Because", True),
        ("<think>\nBecause\n</think>\n\nSo.", False),
        ("Because\n</think>\n\nSo.", False),
        ("Write <think> first.", False),
    ],
)
def test_a_thought_that_never_ends_is_told(answer: str, is_told: bool) -> None:
    chat = Conversation([U, {**A, "content": answer}])
    for sample in (Completion("x", answer), chat):
        assert list(row_warnings(sample, raw=False)) == ["endless_thought"] * is_told
    assert not list(row_warnings(Conversation(chat.messages, untrained=frozenset({1})), raw=False))
    assert not list(row_warnings(Text(answer), raw=False))


def test_what_counts_as_an_empty_answer() -> None:
    def empty(*messages: dict[str, Any], **more: Any) -> bool:
        return list(row_warnings(Conversation(list(messages), **more), raw=False)) == ["empty"]

    blank = {**A, "content": " \n"}
    assert empty(U, blank)
    assert empty(U, blank, U, A)
    assert not empty(U, A)
    assert not empty(U, {**blank, "tool_calls": [{}]})
    assert not empty(U, {**blank, "reasoning_content": "hm"}, U, A)
    assert not empty(U, blank, U, A, untrained=frozenset({1}))
    assert not empty(U, blank, U, A, prompt_messages=3)


def test_rows_that_are_there_twice(make: Callable[..., TokenSet]) -> None:
    tokens = make(alpaca(9), alpaca(12), seq_len=256)
    found = find_repeats(tokens)
    places = (found.where.rpartition("/")[2], found.earlier.rpartition("/")[2])
    assert (found.count, *places) == (9, "rows1.jsonl:1", "rows0.jsonl:1")
    assert find_repeats(make(alpaca(50), seq_len=256)).count == 0
    again = find_repeats(make(alpaca(3) * 4, seq_len=256))
    places = (again.where.rpartition(":")[2], again.earlier.rpartition(":")[2])
    assert (again.count, *places) == (9, "4", "1")
    held = make(alpaca(70)[len(alpaca(68)) :] + alpaca(5), seq_len=256)
    assert find_repeats(held, make(alpaca(60), seq_len=256)).count == 5
    assert find_repeats(held.first(0), tokens).count == find_repeats(held, held.first(0)).count == 0


# --- "train": false


@pytest.mark.parametrize("say", [{"train": False}, {"weight": 0}, {"loss_weight": 0.0}])
def test_a_turn_that_is_not_trained_is_context_only(say: dict[str, Any]) -> None:
    tokenizer = byte_tokenizer()
    template = Template(
        tokenizer, {tokenizer.eos_token_id}, jinja=tokenizer.chat_template, name="chat"
    )
    plain = [U, A, U, {**A, "content": "c"}, U, {**A, "content": "d"}]

    def learnt(row: dict[str, Any], form: Any, train_on: Any) -> tuple[str, list[int]]:
        source = Source(source="x", format=form)
        [sample] = convert_row(row, source, where="r", system="Be.").samples
        example = template.encode(sample, train_on, where="r")
        return tokenizer.decode(example.ids[example.trained]), example.ids.tolist()

    text, ids = learnt({"messages": plain}, "messages", "response")
    assert text == "b<|im_end|>c<|im_end|>d<|im_end|>"
    turns = [{"from": m["role"], "value": m["content"]} for m in plain]
    for form, column, rows in (
        ("messages", "messages", plain),
        ("sharegpt", "conversations", turns),
    ):
        row = {column: [*rows[:3], {**rows[3], **say}, *rows[4:]]}
        assert learnt(row, form, "response") == ("b<|im_end|>d<|im_end|>", ids)
        assert learnt(row, form, "last") == ("d<|im_end|>", ids)
        everything = learnt({column: rows}, form, "all")[0]
        assert learnt(row, form, "all")[0] == everything.replace("c<|im_end|>", "") != everything
        row = {column: [*rows[:5], {**rows[5], **say}]}
        assert learnt(row, form, "response")[0] == "b<|im_end|>c<|im_end|>"
    row = {"prompt": plain[:3], "completion": [{**plain[3], **say}, *plain[4:]]}
    assert learnt(row, "prompt-completion", "response") == ("d<|im_end|>", ids)


@pytest.mark.parametrize(
    "message",
    [
        {**A, "train": "false"},
        {**A, "weight": 0.5},
        {**A, "train": []},
        {**U, "train": True},
        {**U, "weight": 1},
    ],
)
def test_other_weights_are_refused(message: dict[str, Any]) -> None:
    key = [*message][-1]
    with refuses(DataError, where="rows.jsonl:3, message 1", names=[f"{key}: {message[key]}"]):
        convert_row({"messages": [message, U, A]}, Source(source="x"), where="rows.jsonl:3")


def test_a_row_of_untrained_turns_alone_is_named(tiny: Path, tmp_path: Path) -> None:
    with refuses(DataError, names=["1 of 2"], fix=["data.train_on"]) as caught:
        prepared(tiny, tmp_path, [{"messages": [U, A]}, {"messages": [U, {**A, "train": False}]}])
    assert caught.value.where.endswith("rows.jsonl:2")


# --- how many of how many


def test_the_prompt_of_a_base_without_a_template_is_told(tiny: Path, tmp_path: Path) -> None:
    """It is a choice, other than the template that a model brings."""
    rows = [{"instruction": f"Who {i}?", "output": f"He {i}."} for i in range(20)]
    for base in (False, True):
        data = prepared(tiny, tmp_path, rows, base=base, seq_len=1024)
        line = template_line(data.template)
        assert line.startswith("alpaca: ") == base
        assert (line in list(start_data_lines(data))) == base
