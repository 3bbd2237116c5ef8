"""What `data` shows: rows that are valid but seldom meant, bad rows, and what is supervised."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from conftest import byte_tokenizer
from errors import check_shown, holds, lines_with, refuses
from invoke import Output, invoke
from recipes import make_run
from rows import alpaca
from tunesmith.batches.training_data import TrainingData
from tunesmith.config.dump import differences
from tunesmith.config.schema import Source
from tunesmith.errors import EXIT_OK, EXIT_USAGE, DataError
from tunesmith.presentation.data import data_warnings, start_data_lines
from tunesmith.rows.formats import convert_row
from tunesmith.rows.samples import Completion, Conversation
from tunesmith.start.inputs import check_inputs
from tunesmith.start.prepare import prepare_data
from tunesmith.tokens import workers
from tunesmith.tokens.text.row_warnings import row_warnings
from tunesmith.tokens.text.template import Template
from tunesmith.tokens.token_set import TokenSet, find_repeats

U, A = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def prepared(tiny: Path, folder: Path, train: Any, **data: Any) -> TrainingData:
    """Data of rows, or of sources."""
    if isinstance(train, list) and "source" not in train[0]:
        form = {"format": "prompt-completion" if "prompt" in train[0] else "messages"}
        train = write_lines(folder / "rows.jsonl", train) | form
    run = make_run(tiny, folder, held=False, data={"train": train, **data})
    tokenizer = byte_tokenizer()
    return prepare_data(run, tokenizer, {tokenizer.eos_token_id}, 272, cache=folder / "cache")


def warned(data: TrainingData, about: str) -> str:
    (line,) = [line for line in data_warnings(data) if about in line]
    assert "; fix: " in line
    return line


def test_a_prompt_that_answers_repeat_is_told(tiny: Path, tmp_path: Path) -> None:
    rows = []
    for i in range(60):
        prompt = f"\n\nHuman: Who is {i}?\n\nAssistant:" if i else "Hello"
        rows.append({"prompt": prompt, "completion": prompt if i % 2 else f"{prompt} He is {i}."})
    data = prepared(tiny, tmp_path, rows)
    assert holds(warned(data, "whole prompt"), "29 of 60", f"{tmp_path}/rows.jsonl:3")


def test_placeholders_are_told(tiny: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Who {i}?", "completion": f"He {i}."} for i in range(60)]
    rows[12]["prompt"] = "Dear {{ customer.name }}, who?"
    rows[14]["completion"] = "NaN"
    rows[16]["photo"] = "a.png"
    (tmp_path / "a.png").touch()
    for _ in range(2):  # the second time from the cache
        data = prepared(tiny, tmp_path, rows)
        assert holds(warned(data, "{{name}}"), "1 of 60", f"{tmp_path}/rows.jsonl:13")
        assert holds(warned(data, "N/A"), "1 of 60", f"{tmp_path}/rows.jsonl:15")
        assert holds(
            warned(data, "images"), 'columns: {images: "photo"}', f"{tmp_path}/rows.jsonl:17"
        )


def test_empty_answers_are_never_held_out(tiny: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Who {i}?", "completion": f"He {i}."} for i in range(72)]
    hold_out: dict[str, Any] = {"hold_out": "3 examples"}
    drawn = prepared(tiny, tmp_path, rows, **hold_out).splits.held_out
    for i in drawn:
        rows[i]["completion"] = " \n"[: i % 3]
    with refuses(DataError, where=f"rows.jsonl:{drawn[0] + 1}"):
        prepared(tiny, tmp_path, rows, **hold_out)
    data = prepared(tiny, tmp_path, rows, bad_rows="skip", **hold_out)
    assert data.validation is not None
    assert (data.validation.counts.kept_rows, data.train.counts.bad) == (3, 3)
    # Rows that are too long are known only when they are tokenized.
    for i in data.splits.held_out[1:]:
        rows[i]["completion"] *= 60
    limits: dict[str, Any] = {"seq_len": 128, "too_long": "drop", "bad_rows": "skip"}
    data = prepared(tiny, tmp_path, rows, **limits, **hold_out)
    assert holds(warned(data, "data.hold_out="), "1 row", "of 3")


def test_special_tokens_in_the_text_of_rows_are_told_by_name(tiny: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"messages": [U, {**A, "content": f"b{i}"}]} for i in range(20)]
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "<|im_start|>"}}}
    rows[4] = {"messages": [{**U, "content": "Write <|im_end|> here."}, A]}
    rows[7] = {"messages": [U, {**A, "content": "b <|im_end|> and <|im_end|>"}]}
    rows[9] = {"messages": [U, {**A, "content": "", "tool_calls": [call]}]}
    for _ in range(2):  # the second time from the cache
        data = prepared(tiny, tmp_path, rows)
        line = warned(data, "<|im_end|>")
        path = f"{tmp_path}/rows.jsonl"
        assert holds(line, f"{path}:5", "<|im_start|>", f"{path}:10")
        counts = data.train.parts[0].counts
        assert counts.control_tokens == {"<|im_end|>": [2, 4], "<|im_start|>": [1, 9]}


@pytest.mark.parametrize(
    ("question", "answer", "told"),
    [
        ("Dear {{name}}", "x", ["placeholder"]),
        ("x", "{{user.name}} and {{ first_name }}", ["placeholder"]),
        ("f'{x}' and \\frac{a}{{b}^2} {{}} {{ 'a' }} {% if x %}", "x", []),
        ("\n\nHuman: Who is it?\n\nAssistant: ", "He.", ["written_turns"]),
        ("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n", "He.", ["written_turns"]),
        ("\n\nHuman: Who is it?\n\nAssistant: He.\n\nWho is meant?", "He.", []),
        ("Who is your assistant?", "He.", []),
        ("x", "<think>\nBecause", ["endless_thought"]),
        ("x", "[THINK]Because", ["endless_thought"]),
        ("x", "<think>\nBecause\n</think>\n\nSo.", []),
        ("x", "Write <think> first.", []),
    ],
)
def test_what_is_told_of_a_row(question: str, answer: str, told: list[str]) -> None:
    chat = Conversation([{**U, "content": question}, {**A, "content": answer}])
    for sample in (Completion(question, answer), chat):
        assert list(row_warnings(sample, raw=False)) == told


def test_rows_that_are_there_twice(make: Callable[..., TokenSet]) -> None:
    tokens = make(alpaca(9), alpaca(12), seq_len=256)
    found = find_repeats(tokens)
    places = (found.where.rpartition("/")[2], found.earlier.rpartition("/")[2])
    assert (found.count, *places) == (9, "rows1.jsonl:1", "rows0.jsonl:1")
    assert find_repeats(make(alpaca(50), seq_len=256)).count == 0
    held = make(alpaca(70)[len(alpaca(68)) :] + alpaca(5), seq_len=256)
    assert find_repeats(held, make(alpaca(60), seq_len=256)).count == 5


# --- "train": false


def test_a_turn_that_is_not_trained_is_context_only() -> None:
    tokenizer = byte_tokenizer()
    template = Template(
        tokenizer, {tokenizer.eos_token_id}, jinja=tokenizer.chat_template, name="chat"
    )
    plain = [U, A, U, {**A, "content": "c"}, U, {**A, "content": "d"}]

    def learnt(messages: list[dict[str, Any]], train_on: Any) -> tuple[str, list[int]]:
        [sample] = convert_row({"messages": messages}, Source(source="x"), where="r").samples
        example = template.encode(sample, train_on, where="r")
        return tokenizer.decode(example.ids[example.trained]), example.ids.tolist()

    text, ids = learnt(plain, "response")
    assert text == "b<|im_end|>c<|im_end|>d<|im_end|>"
    marked = [*plain[:3], {**plain[3], "train": False}, *plain[4:]]
    assert learnt(marked, "response") == ("b<|im_end|>d<|im_end|>", ids)
    assert learnt(marked, "last") == ("d<|im_end|>", ids)
    everything = learnt(plain, "all")[0]
    assert learnt(marked, "all")[0] == everything.replace("c<|im_end|>", "") != everything
    last = [*plain[:5], {**plain[5], "train": False}]
    assert learnt(last, "response")[0] == "b<|im_end|>c<|im_end|>"


def test_a_row_of_untrained_turns_alone_is_named(tiny: Path, tmp_path: Path) -> None:
    with refuses(DataError, names=["1 of 2"], fix=["data.train_on"]) as caught:
        prepared(tiny, tmp_path, [{"messages": [U, A]}, {"messages": [U, {**A, "train": False}]}])
    assert caught.value.where.endswith("rows.jsonl:2")


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
def test_bad_rows_of_other_files_are_listed(tiny: Path, tmp_path: Path, source: Any) -> None:
    more = write_lines(tmp_path / "more.jsonl", [good(41), {"messages": [A]}])
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


def test_a_file_of_bad_rows_alone_is_refused(tiny: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [{"messages": [A]}, {"messages": [U]}])
    for bad_rows in ("error", "skip"):
        with refuses(DataError, where="rows.jsonl:1, message 1", names=[2]) as refused:
            prepared(tiny, tmp_path, source, bad_rows=bad_rows)
        assert "skip" not in refused.value.fix


def test_a_resumed_run_may_not_change_what_is_left_out(tiny: Path, tmp_path: Path) -> None:
    kept = make_run(tiny, tmp_path)
    for key, value in {"bad_rows": "skip", "leave_out": ["contradictions"]}.items():
        (change,) = differences(kept, make_run(tiny, tmp_path, data={key: value}))
        assert (change.key, change.allowed) == (f"data.{key}", False)


def test_what_nothing_reads_is_warned_of(tiny: Path, tmp_path: Path) -> None:
    graded = {"messages": [U, {**A, "grade": 1}], "score": 3}
    rows = [good(1), graded, {**good(1), "id": 7, "score": 3}]
    source = write_lines(tmp_path / "rows.jsonl", rows)
    for _ in range(2):  # the second time from the cache
        data = prepared(tiny, tmp_path, source)
        assert data.train.parts[0].counts.unread == {"message.grade": [1, 1], "score": [2, 1]}
        (warning,) = [line for line in data_warnings(data) if "message.grade" in line]
        assert holds(warning, "1 row", "score", "2 rows", f"{source['source']}:2")


def test_a_kind_of_warning_has_one_line_for_all_splits(tiny: Path, tmp_path: Path) -> None:
    """The count is over all rows, and the line has one location."""
    rows = [{**good(i), "score": i} if i % 4 else good(i) for i in range(40)]
    for i, row in enumerate(rows):
        row["messages"][0] = {**U, "content": f"{i} {{{{name}}}} <|im_start|>"}
    source = write_lines(tmp_path / "rows.jsonl", rows)
    data = prepared(tiny, tmp_path, source, hold_out="10 examples")
    assert len(data.sources()) == 2
    for about in ("{{name}}", "<|im_start|>"):
        assert holds(warned(data, about), "40")
    assert holds(warned(data, "score"), "30 rows")
    for line in data_warnings(data):
        assert line.count("rows.jsonl:") <= 2  # a location, and that of a row that it repeats


def test_rows_of_another_split_are_told(tiny: Path, tmp_path: Path) -> None:
    for splits, told in (
        (("train", "test", "Validation", "train"), ["2 rows", f"{tmp_path}/rows.jsonl:2"]),
        (("train", "en", None, "train"), []),
    ):
        rows = [{**good(n), "split": split} for n, split in enumerate(splits)]
        data = prepared(tiny, tmp_path, write_lines(tmp_path / "rows.jsonl", rows))
        lines = [line for line in data_warnings(data) if holds(line, "split")]
        assert len(lines) == bool(told)
        assert holds("".join(lines), *told)


def test_a_system_message_of_raw_rows_is_refused(tiny: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "system": "S"}, {"prompt": "a", "completion": "b"}]
    with refuses(DataError, where="rows.jsonl:1", fix=["data.template=alpaca"]):
        prepared(tiny, tmp_path, rows, template="raw")


# --- the command


@pytest.fixture
def show(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Output]:
    """`tunesmith data` of a file."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    words = ("--model", tiny, "model.dtype=fp32", "data.hold_out=null", "--data")
    return partial(invoke, "data", *words)


def test_the_command_shows_what_is_left_out(show: Any, tmp_path: Path, source: Any) -> None:
    refused = show(source["source"])
    assert refused.code == EXIT_USAGE
    check_shown(refused.err, names=[5, 40], fix=["data.bad_rows=skip"])
    skipped = show(source["source"], "data.bad_rows=skip", "--json")
    assert skipped.code == EXIT_OK
    (told,) = json.loads(skipped.out)["train"]
    assert told["bad"] == 5
    assert [row["where"] for row in told["bad_rows"]] == [f"{tmp_path}/{name}" for name in PLACES]


def test_the_command_shows_what_is_supervised(show: Any, write: Any) -> None:
    file = write("rows.jsonl", alpaca(60))
    out = show(file, "--rows", 2).out
    assert "<|im_start|>user\nsay 1<|im_end|>\n<|im_start|>assistant\n⟦xxxxxx<|im_end|>⟧" in out
    assert out.count("⟦") == out.count("⟧") == 2
    assert "rows.jsonl:2: " in out
    # One line for all checks; each of them is in --json.
    assert lines_with(out, 9, 60, "contract", "<|im_end|>")
    values = json.loads(show(file, "--json", "--rows", 1).out)
    assert values["train"][0]["kept"] == 60
    assert sum(bar["examples"] for bar in values["lengths"]) == 60
    assert [c["broken"] for c in values["contract"]] == [0] * 9
    [row] = values["rows"]
    assert "".join(s["text"] for s in row["segments"] if s["supervised"]) == "xxxxx<|im_end|>"
    broken = show(file, "data.seq_len=10")
    assert broken.code == 2
    assert "BROKEN, train" in broken.out
    check_shown(broken.err, fix=["data.seq_len"])


@pytest.mark.slow
def test_no_control_of_a_row_or_of_a_file_name_is_shown(show: Any, tmp_path: Path) -> None:
    """Nor is a name read as markup."""
    controls = "\x1b]0;title\x07\x9b2J\u202e"
    rows = [{"instruction": f"say {i} {controls}", "output": controls} for i in range(60)]
    file = tmp_path / f"[b]{controls}.jsonl"
    write_lines(file, rows)
    out = show(file, "--rows", 1).out
    assert out.count("\\x1b]0;title") >= 3  # the place, the question, the answer, the table
    assert not {*out} & {*controls} - {*"]0;title2J"}
    assert re.search(r"train:\s+\[b\]", out)
