"""Rows that are valid but seldom meant are told; bad rows are listed at once, or left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import byte_tokenizer
from errors import check_shown, holds, lines_with, refuses, warnings_with
from invoke import invoke
from recipes import make_run
from rows import alpaca
from tunesmith.config.dump import differences
from tunesmith.config.schema import Source
from tunesmith.data.prepare import TrainingData, prepare_data
from tunesmith.data.rows.formats import convert_row
from tunesmith.data.rows.samples import Completion, Conversation, Text
from tunesmith.data.text.row_warnings import row_warnings
from tunesmith.data.text.template import Template
from tunesmith.data.tokens import workers
from tunesmith.data.tokens.token_set import TokenSet, find_repeats
from tunesmith.errors import EXIT_OK, EXIT_USAGE, DataError
from tunesmith.presentation.data import data_warnings, start_data_lines
from tunesmith.stages.inputs import check_inputs
from tunesmith.units import Length

U, A = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def prepared(
    tiny: Path, folder: Path, train: Any, *, base: bool = False, **data: Any
) -> TrainingData:
    """Data of rows, whose first column shows their format, or of sources."""
    if isinstance(train, list) and not {"source", "format"} <= train[0].keys():
        forms = {"prompt": "prompt-completion", "instruction": "alpaca", "chosen": "preference"}
        first = "sharegpt" if "conversations" in train[0] else next(iter(train[0]))
        train = write_lines(folder / "rows.jsonl", train) | {"format": forms.get(first, first)}
        train |= data.pop("source", {})
    is_pair = isinstance(train, dict) and train["format"] == "preference"
    changes = {"data": {"train": train, **data}, "method": {"name": "dpo" if is_pair else "sft"}}
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
        ("{{user.name}} and {{ first_name }}", True),
        ("f'{x}' and ${HOME} and \\frac{a}{{b}^2}", False),
        ("{{}} {{ 1 }} {{ 'a' }} {% if x %}", False),
        ("a {{ two words }}", False),
    ],
)
def test_which_placeholders_are_told(text: str, found: bool) -> None:
    chat = Conversation([U, {**A, "content": text}])
    for sample in (Text(text), Completion(text, "x"), Completion("x", text), chat):
        assert list(row_warnings(sample, raw=False)) == ["placeholder"] * found


@pytest.mark.parametrize(
    ("question", "is_told"),
    [
        ("\n\nHuman: Who is it?\n\nAssistant: ", True),
        ("<|im_start|>user\nWho is it?<|im_end|>\n<|im_start|>assistant\n", True),
        ("<start_of_turn>user\nWho is it?<end_of_turn>\n<start_of_turn>model\n", True),
        ("[INST] Who is it? [/INST]", True),
        ("A chat. USER: Who is it? ASSISTANT:", True),
        ("\n\nHuman: Who is it?\n\nAssistant: He.\n\nWho is meant?", False),
        ("Write a short response: ", False),
        ("Who is your assistant?", False),
        ("\n" * 99, False),
    ],
)
def test_prompts_for_no_template_are_told_where_there_is_one(question: str, is_told: bool) -> None:
    def told(sample: Completion | Conversation, raw: bool = False) -> bool:
        return "written_turns" in list(row_warnings(sample, raw=raw))

    sample = Completion(question, "He.")
    assert (told(sample), told(sample, raw=True)) == (is_told, False)
    assert told(Conversation([{**U, "content": question}, A])) == is_told
    assert not told(Conversation([U, {**A, "content": question}]))


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
    for other in (Conversation(chat.messages, untrained=frozenset({1})), Text(answer)):
        assert not list(row_warnings(other, raw=False))


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


# --- bad rows


def good(number: int) -> dict[str, Any]:
    """Rows that are alike would be held out together."""
    return {"messages": [{"role": "user", "content": f"Say {number}."}, A]}


# Row number, counted from 1, and what stands there: in the order of reading.
BAD: dict[int, Any] = {
    3: {"messages": [A]},
    8: {"messages": [U, A, U]},
    9: "{broken",
    20: ["no object"],
    30: {"messages": [U, {**A, "weight": 0.5}]},
}
PLACES = [f"rows.jsonl:{number}" for number in BAD]


def write_lines(path: Path, rows: list[Any]) -> dict[str, str]:
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in rows))
    return {"source": str(path), "format": "messages"}


@pytest.fixture
def source(tmp_path: Path) -> dict[str, str]:
    """40 rows, of which 5 are bad."""
    return write_lines(tmp_path / "rows.jsonl", [BAD.get(n, good(n)) for n in range(1, 41)])


def listed(error: DataError) -> list[str]:
    return [cause.split(": ")[0] for cause in error.why.split("; ")]


@pytest.mark.parametrize("are_parallel", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_all_bad_rows_are_listed_at_once(
    tiny: Path, tmp_path: Path, source: Any, are_parallel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if are_parallel:
        monkeypatch.setattr(workers, "MIN_ROWS_PER_WORKER", 10)
        monkeypatch.setattr(workers, "available_cores", lambda: 2)
    where = f"{source['source']}:3, message 1"
    with refuses(DataError, where=where, names=[5, 40], fix=["data.bad_rows=skip"]) as refused:
        prepared(tiny, tmp_path, source)
    assert listed(refused.value) == PLACES


@pytest.mark.slow
def test_bad_rows_that_are_held_out_and_those_of_other_files_are_listed_with_them(
    tiny: Path, tmp_path: Path, source: Any
) -> None:
    with refuses(DataError, names=[5, 40]) as refused:
        prepared(tiny, tmp_path, source, hold_out="50 %")
    assert sorted(listed(refused.value)) == sorted(PLACES)
    more = write_lines(tmp_path / "more.jsonl", [good(41), {"messages": [A]}])
    with refuses(DataError, names=[6, 42]) as refused:
        prepared(tiny, tmp_path, [more, source])
    assert sorted(listed(refused.value)) == sorted(["more.jsonl:2", *PLACES])
    # At the start, before torch is imported.
    run = make_run(tiny, tmp_path, held=False, data={"train": more, "validation": source})
    with refuses(DataError, where="more.jsonl:2, message 1", names=[6, 42]) as refused:
        check_inputs(run)
    assert sorted(listed(refused.value)) == sorted(["more.jsonl:2", *PLACES])


def test_bad_rows_that_are_skipped_are_counted(tiny: Path, tmp_path: Path, source: Any) -> None:
    for _ in range(2):  # the second time from the cache
        data = prepared(tiny, tmp_path, source, bad_rows="skip")
        counts = data.train.parts[0].counts
        assert (counts.rows, counts.bad, counts.kept, len(data.train)) == (40, 5, 35, 35)
        assert [row + 1 for row, _ in counts.bad_rows] == [*BAD]
        (line,) = lines_with("\n".join(start_data_lines(data)), "35 of 40", 5)
        assert holds(line, "data.bad_rows")
        (warning,) = [line for line in data_warnings(data) if holds(line, "5 of 40")]
        assert holds(warning, f"{source['source']}:3")
    # Examples keep the places of their rows.
    assert data.train.where(2).endswith("rows.jsonl:4")


def test_texts_that_are_no_utf8_are_listed_and_can_be_left_out(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in {"a": b"A", "b": b"B\ncaf\xe9", "c": b"C", "d": b"D\0"}.items():
        (folder / f"{name}.txt").write_bytes(text)
    source = {"source": str(folder), "format": "text"}
    with refuses(DataError, where="texts/b.txt, line 2", names=[2, 4]) as refused:
        prepared(tiny, tmp_path, source)
    assert listed(refused.value) == ["b.txt", "d.txt"]
    data = prepared(tiny, tmp_path, source, bad_rows="skip")
    assert [data.train.where(i) for i in range(2)] == [f"{folder}/a.txt", f"{folder}/c.txt"]


@pytest.mark.slow
def test_csv_rows_that_do_not_fit_the_header_are_listed_and_can_be_left_out(
    tiny: Path, tmp_path: Path
) -> None:
    lines = [f"Say {number},{number}" for number in range(200)]
    lines[70], lines[150] = "one", "a, b,2"
    (tmp_path / "rows.csv").write_text("\n".join(["prompt,completion", *lines]))
    source = {"source": str(tmp_path / "rows.csv"), "format": "prompt-completion"}
    with refuses(DataError, where="rows.csv:72", names=[2, 200]) as refused:
        prepared(tiny, tmp_path, source)
    assert listed(refused.value) == ["rows.csv:72", "rows.csv:152"]
    data = prepared(tiny, tmp_path, source, bad_rows="skip")
    assert [row for row, _ in data.train.parts[0].counts.bad_rows] == [70, 150]


def test_one_bad_row_keeps_its_own_error(tiny: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [good(1), good(2), BAD[3]])
    with refuses(DataError, where="rows.jsonl:3, message 1", fix=["data.bad_rows=skip"]):
        prepared(tiny, tmp_path, source)


def test_a_file_of_bad_rows_alone_is_refused(tiny: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [{"messages": [A]}, {"messages": [U]}])
    for bad_rows in ("error", "skip"):
        with refuses(DataError, where="rows.jsonl:1, message 1", names=[2]) as refused:
            prepared(tiny, tmp_path, source, bad_rows=bad_rows)
        assert "skip" not in refused.value.fix


def test_a_long_list_of_bad_rows_is_cut(tiny: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [good(1), {"messages": [A]}] * 25)
    with refuses(DataError, names=[25, 50]) as refused:
        prepared(tiny, tmp_path, source)
    assert len(listed(refused.value)) == 21
    data = prepared(tiny, tmp_path, source, bad_rows="skip")
    assert len(data.train.parts[0].counts.bad_rows) == 20


def test_a_resumed_run_may_not_change_what_is_left_out(tiny: Path, tmp_path: Path) -> None:
    kept = make_run(tiny, tmp_path)
    for key, value in {"bad_rows": "skip", "leave_out": ["contradictions"]}.items():
        (change,) = differences(kept, make_run(tiny, tmp_path, data={key: value}))
        assert (change.key, change.allowed) == (f"data.{key}", False)


def test_what_nothing_reads_is_warned_of(tiny: Path, tmp_path: Path) -> None:
    rows = [
        good(1),
        {"messages": [U, {**A, "grade": 1}], "score": 3},
        {**good(1), "id": 7, "score": 3},
    ]
    source = write_lines(tmp_path / "rows.jsonl", rows)
    for _ in range(2):  # the second time from the cache
        data = prepared(tiny, tmp_path, source)
        assert data.train.parts[0].counts.unread == {"message.grade": [1, 1], "score": [2, 1]}
        (warning,) = [line for line in data_warnings(data) if "message.grade" in line]
        assert holds(warning, "1 row", "score", "2 rows", f"{source['source']}:2")


def test_rows_of_another_split_are_told(tiny: Path, tmp_path: Path) -> None:
    for splits, told in (
        (("train", "test", "Validation", "train"), ["2 rows", f"{tmp_path}/rows.jsonl:2"]),
        (("train", "en", None, "train"), []),
        (("test", "test", "test", "test"), []),
    ):
        rows = [{**good(n), "split": split} for n, split in enumerate(splits)]
        data = prepared(tiny, tmp_path, write_lines(tmp_path / "rows.jsonl", rows))
        lines = [line for line in data_warnings(data) if holds(line, "split")]
        assert len(lines) == bool(told)
        assert holds("".join(lines), *told)


def test_a_system_message_of_raw_rows_is_refused(tiny: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "system": "S"}, {"prompt": "a", "completion": "b"}]
    source = write_lines(tmp_path / "rows.jsonl", rows) | {"format": "prompt-completion"}
    with refuses(DataError, where="rows.jsonl:1", fix=["data.template=alpaca"]):
        prepared(tiny, tmp_path, source, template="raw")


def test_the_data_command_shows_what_is_left_out(
    tiny: Path, tmp_path: Path, source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    words = ["data", "--model", tiny, "--data", source["source"], "model.dtype=fp32"]
    refused = invoke(*words)
    assert refused.code == EXIT_USAGE
    check_shown(refused.err, names=[5, 40], fix=["data.bad_rows=skip"])
    skipped = invoke(*words, "data.bad_rows=skip", "--json")
    assert skipped.code == EXIT_OK
    (told,) = json.loads(skipped.out)["train"]
    assert told["bad"] == 5
    assert [row["where"] for row in told["bad_rows"]] == [f"{tmp_path}/{name}" for name in PLACES]
