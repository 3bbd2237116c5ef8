"""What is said of rows before the first step, and what `data.leave_out` leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import byte_tokenizer
from errors import lines_with, warnings_with
from logged import logged_lines
from recipes import make_run
from tunesmith.cli.run_data import findings_as_json
from tunesmith.config.schema import Data, Source
from tunesmith.data.compare import row_checks, row_texts
from tunesmith.data.compare.row_checks import (
    RowFindings,
    check_across,
    check_rows,
    find_faults,
)
from tunesmith.data.compare.row_texts import RowText, read_texts, row_text, sampled_rows
from tunesmith.data.compare.splits import read_checked_splits, read_splits
from tunesmith.data.prepare import prepare_data
from tunesmith.data.source.open_source import from_list, read_rows
from tunesmith.presentation.data import data_warnings, left_out_lines, row_warnings_of
from tunesmith.training.run import train
from tunesmith.units import Share

SENTENCES = [
    "The harbor lies quiet under the first snow of the year.",
    "A baker opens her shop long before the trams begin to run.",
    "Most of the old orchard was planted by two brothers from the valley.",
    "Copper pipes carry the warm water through every room of the house!",
    "Nobody in the village remembers who built the stone bridge.",
    "The engine was repaired twice before the race and once after it.",
    "Which of these lanterns would you hang beside the garden gate?",
    "Rain has fallen on the meadow for three days without a pause.",
    "The museum keeps a silver button that belonged to the captain.",
    "Thunder rolled over the hills while the children picked berries.",
    "A letter from the islands takes about nine days to arrive here.",
    "The tunnel was closed in spring because of water in its walls.",
]


def row(prompt: str, answer: str) -> RowText:
    return RowText(prompt, answer, is_answered=True)


def good_rows(count: int) -> list[RowText]:
    """Rows without any fault: all prompts differ, all answers end."""
    rows = []
    for i in range(count):
        first, second = SENTENCES[i % 12], SENTENCES[(i // 12 + i + 1) % 12]
        rows.append(row(f"Write sentence number {i} of the story.", f"{first} {second} Part {i}."))
    return rows


def source_of(path: Path, rows: list[dict[str, Any]], format_: Any = "prompt-completion") -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(source=str(path), format=format_)


def test_good_rows_have_no_fault() -> None:
    found = find_faults(good_rows(60))
    assert found == RowFindings(rows=60, compared=60)


# Contradictions


@pytest.mark.parametrize("first", ["Is tin a metal?", "  is TIN a metal", "Is tin a metal ?!"])
def test_one_prompt_with_two_answers(first: str) -> None:
    rows = [
        *good_rows(3),
        row(first, "yes"),
        row("Is tin a metal?", "No."),
        row("Is tin a metal?", "no"),
    ]
    assert find_faults(rows).contradictions == [[3, 4, 5]]


@pytest.mark.parametrize(
    "rows",
    [
        [row("Is tin a metal?", "Yes."), row("Is tin a metal?", "yes")],
        [row("Go on.", "yes"), row("Go on.", "no")],
        [row("Is tin a metal?", "yes")._replace(given="[]"), row("Is tin a metal?", "no")],
        [row("Is it 3 or 4?", "yes"), row("Is it 4 or 3?", "no")],
        [RowText("Is tin a metal?", answer, is_answered=False) for answer in ("yes", "no")],
        # Many drafts of each of many texts are several by design.
        [row(f"Write a story about {w}.", f"{s} {s2}") for w in ("ice", "sea", "sun", "tin", "oak")
         for s, s2 in zip(SENTENCES[:4], SENTENCES[4:8], strict=True)],
    ],
)  # fmt: skip
def test_answers_that_do_not_contradict(rows: list[RowText]) -> None:
    assert find_faults(rows).contradictions == []


def judged(first: str, second: str) -> list[RowText]:
    source = Source(source="x.jsonl", format="preference")
    pairs = [(first, second), (second, first)]
    values = [{"prompt": "Is tin a metal?", "chosen": a, "rejected": b} for a, b in pairs]
    return [row_text(row, source) for row in values]


def test_swapped_pairs_contradict_each_other_and_other_pairs_do_not() -> None:
    text, swapped = judged("yes", "no")
    assert (text.answer, text.chosen, text.is_answered) == ("yes\nno", "yes", False)
    other = judged("yes", "Perhaps.")[0]
    found = find_faults([text, other, swapped, text])
    assert found.contradictions == [[0, 2, 3]]
    assert found.near_duplicates == [[0, 3]]
    assert find_faults([text, other]).contradictions == []


def test_an_answer_that_is_good_and_bad_is_a_contradiction() -> None:
    source = Source(source="x.jsonl", format="feedback")
    values = {"prompt": "Is tin a metal?", "completion": "Yes, it is one.", "label": True}
    good, bad = (row_text({**values, "label": label}, source) for label in (True, False))
    other = bad._replace(answer="It is none.")
    found = find_faults([good, other, bad])
    assert (found.contradictions, found.near_duplicates) == ([[0, 2]], [])
    assert find_faults([good, other]).contradictions == []


def test_tools_of_a_row_set_it_apart() -> None:
    turns = [
        {"role": "user", "content": "Is tin a metal, and since when is it known?"},
        {"role": "assistant", "content": "Yes, and for long."},
    ]
    texts = [
        row_text(
            {"messages": turns, "tools": [{"type": "function", "function": {"name": name}}]},
            Source(source="x.jsonl", format="messages"),
        )
        for name in ("weather", "search", "weather")
    ]
    assert find_faults(texts).near_duplicates == [[0, 2]]


# Sources, cache and limits


PLANTED = [
    {"prompt": "Which lantern in the harbor window was lit first?", "completion": "The copper one."},
    {"prompt": "Is tin a metal?", "completion": "yes"},
    {"prompt": "which lantern, in the harbor window, was LIT first", "completion": "The copper one"},
    {"prompt": "Is tin a metal?", "completion": "no"},
    {"prompt": "Who built the stone bridge?", "completion": "Nobody in the village remembers that."},
]  # fmt: skip


def test_a_second_look_at_the_same_rows_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(tmp_path / "rows.jsonl", PLANTED)
    sources = [(source, read_rows(source))]
    found = check_rows(sources)
    assert (found.near_duplicates, found.contradictions) == ([[0, 2]], [[1, 3]])

    def again(*args: object) -> RowFindings:
        raise AssertionError("compared twice")

    monkeypatch.setattr(row_checks, "find_faults", again)
    moved = source_of(tmp_path / "moved.jsonl", PLANTED)
    assert check_rows([(moved, read_rows(moved))]) == found, "the name of the file does not matter"
    data = Data(train=(source,), hold_out=Share(2, "examples"))
    assert read_splits(data, 42, only_cached=True)[1][0][1].where(0)
    changed = source_of(tmp_path / "rows.jsonl", PLANTED[:4])
    with pytest.raises(AssertionError, match="twice"):
        check_rows([(changed, read_rows(changed))])


def test_a_line_says_that_many_rows_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"Is number {i} told of?", "completion": "It is."} for i in range(9)]
    source = source_of(tmp_path / "rows.jsonl", rows)
    sources = [(source, read_rows(source))]
    monkeypatch.setattr(row_checks, "ANNOUNCED_ROWS", 8)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    for expected in (1, 0):
        with logged_lines() as lines:
            check_rows(sources)
        assert len(lines_with("\n".join(lines), "9 rows")) == expected


def test_a_plan_does_not_compare_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_checks, "find_faults", None)
    source = source_of(
        tmp_path / "never.jsonl", [*PLANTED, {"prompt": "a plan", "completion": "b"}]
    )
    data = Data(train=(source,), hold_out=Share(2, "examples"), leave_out=("contradictions",))
    train_rows, held_out = read_splits(data, 42, only_cached=True)
    assert (len(train_rows[0][1]), len(held_out[0][1])) == (4, 2)


def test_a_large_corpus_is_sampled_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"prompt": f"What is the name of river {i}?", "completion": f"It is {i}."}
        for i in range(90)
    ]
    rows[80] = rows[20] = {"prompt": "Which lantern was lit first of all?", "completion": "One."}
    monkeypatch.setattr(row_texts, "MAX_ROWS", 10)
    source = source_of(tmp_path / "rows.jsonl", rows)
    other = source_of(tmp_path / "more.jsonl", rows[:7])
    sources = [(other, read_rows(other)), (source, read_rows(source))]
    indices = sampled_rows(sources)
    assert (indices.step, len(indices)) == (10, 10)
    read = [text.prompt for text in read_texts(sources, indices) if text]
    assert read == [rows[0]["prompt"], *(rows[i - 7]["prompt"] for i in range(10, 97, 10))]
    data = Data(train=(source,))
    splits = read_checked_splits(data, 42)
    assert splits.findings is not None
    assert (splits.findings.rows, splits.findings.compared) == (90, 10)
    assert "10 of 90" in next(left_out_lines(splits))
    monkeypatch.setattr(row_texts, "MAX_ROWS", 9)
    found = check_rows([(source, read_rows(source))])
    assert found.near_duplicates == [[20, 80]], "rows are named by their own numbers"


def test_a_row_that_cannot_be_read_is_left_to_tokenization(tmp_path: Path) -> None:
    source = source_of(tmp_path / "rows.jsonl", [{"prompt": None}, *PLANTED])
    assert check_rows([(source, read_rows(source))]).contradictions == [[2, 4]]


def test_of_a_long_row_both_ends_are_compared() -> None:
    long = " ".join(f"word{i}" for i in range(5000))
    text = row_text({"text": long}, Source(source="x.jsonl", format="text"))
    assert len(text.answer) == row_texts.MAX_TEXT_CHARACTERS + 1
    assert text.answer.startswith("word0 ")
    assert text.answer.endswith(" word4999")


def test_an_answer_is_what_is_said_last() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": {"city": "Oslo"}}]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "It rains.", "reasoning_content": "wet"},
    ]  # fmt: skip
    text = row_text({"messages": messages}, Source(source="x.jsonl"))
    assert text.answer == "It rains."
    assert text.prompt.splitlines()[:2] == ["Be brief.", "Weather?"]
    assert "Oslo" in text.prompt
    assert "wet" not in text.prompt + text.answer


# What the user sees


def test_lines_have_counts_and_places(tmp_path: Path) -> None:
    source = source_of(tmp_path / "rows.jsonl", PLANTED)
    splits = read_checked_splits(Data(train=(source,)), 42)
    lines = list(row_warnings_of(splits, []))
    path = source.source
    assert len(lines) == 2
    assert f"{path}:3 ({path}:1)" in lines[0]
    assert lines[0].endswith("'data.leave_out=[near-duplicates]'")
    assert f"{path}:4 ({path}:2)" in lines[1]
    plain = findings_as_json(splits, [])
    assert plain["counts"]["near-duplicates"] == 1
    assert plain["contradictions"] == [[f"{path}:2", f"{path}:4"]]


def test_what_is_left_out_is_counted_and_no_warning(tmp_path: Path) -> None:
    source = source_of(tmp_path / "rows.jsonl", PLANTED)
    faults: Any = ("near-duplicates", "contradictions")
    splits = read_checked_splits(Data(train=(source,), leave_out=faults), 42)
    assert [row["prompt"] for _, rows in splits.train for row in rows] == [
        PLANTED[0]["prompt"],
        PLANTED[4]["prompt"],
    ]
    assert list(row_warnings_of(splits, [])) == []
    told = list(left_out_lines(splits))
    parts = [line.partition(",")[0].split() for line in told]
    assert [(count, *key) for count, _, _, _, _, *key in parts] == [
        ("1", "data.leave_out", "(near-duplicates)"),
        ("2", "data.leave_out", "(contradictions)"),
    ]
    assert findings_as_json(splits, [])["left_out"] == {"near-duplicates": 1, "contradictions": 2}


def test_a_split_of_the_user_is_compared_with_the_training_rows(tmp_path: Path) -> None:
    train_rows = source_of(tmp_path / "train.jsonl", PLANTED)
    held = [
        {"prompt": "What is the name of the river?", "completion": "It has none."},
        {"prompt": "Please: who built the stone bridge?", "completion": PLANTED[4]["completion"]},
    ]
    validation = source_of(tmp_path / "held.jsonl", held)
    data = Data(train=(train_rows,), validation=(validation,))
    splits = read_checked_splits(data, 42)
    across = check_across(splits.validation, splits.train)
    assert across == [[1, 4]]
    pair = f"{validation.source}:2 ({train_rows.source}:5)"
    assert sum(pair in line for line in row_warnings_of(splits, across)) == 1
    assert findings_as_json(splits, across)["across"] == [
        [f"{validation.source}:2", f"{train_rows.source}:5"]
    ]


def test_repeats_within_a_document_hide_no_repeated_rows(tiny: Path, tmp_path: Path) -> None:
    """Of each a line: the document is split into many equal parts."""
    texts = ["a" * 1000, SENTENCES[0], SENTENCES[0].upper(), SENTENCES[1], SENTENCES[1]]
    source = source_of(tmp_path / "train.jsonl", [{"text": text} for text in texts], "text")
    train_rows = {"source": source.source, "format": source.format}
    run = make_run(tiny, tmp_path, held=False, data={"train": train_rows, "seq_len": 64})
    tokenizer = byte_tokenizer()
    ends = {tokenizer.eos_token_id}
    prepared = prepare_data(run, tokenizer, ends, 272, cache=tmp_path / "cache", strict=False)
    told = "\n".join(data_warnings(prepared))
    parts = prepared.duplicates.count
    assert parts > 5
    assert warnings_with(told, "2 of 5 rows", f"{source.source}:3 ({source.source}:2)")
    assert warnings_with(told, f"{parts} of {len(prepared.train)}")


def test_a_hold_out_that_splits_a_group_is_not_advised_to_hold_out(tmp_path: Path) -> None:
    """One group of all rows: it stands on both sides."""
    source = source_of(tmp_path / "rows.jsonl", [PLANTED[4]] * 8)
    data = Data(train=(source,), hold_out=Share(2, "examples"))
    told = "\n".join(row_warnings_of(read_checked_splits(data, 42), []))
    (line,) = lines_with(told, "val_loss")
    assert "'data.leave_out=[near-duplicates]'" in line
    assert "data.hold_out" not in line


def test_a_row_that_is_left_out_is_no_row_that_is_trained_on(tiny: Path, tmp_path: Path) -> None:
    train_rows = source_of(tmp_path / "train.jsonl", PLANTED)
    held = [PLANTED[3], {**PLANTED[4], "prompt": "Please: who built the stone bridge?"}, PLANTED[0]]
    validation = source_of(tmp_path / "held.jsonl", held)
    of_validation = {
        "source": validation.source,
        "format": validation.format,
        "max_examples": 2,
    }
    run = make_run(
        tiny,
        tmp_path,
        held=False,
        data={
            "train": {"source": train_rows.source, "format": train_rows.format},
            "validation": of_validation,
            "leave_out": ["contradictions"],
        },
    )
    tokenizer = byte_tokenizer()
    ends = {tokenizer.eos_token_id}
    prepared = prepare_data(run, tokenizer, ends, 272, cache=tmp_path / "cache", strict=False)
    pair = [f"{validation.source}:2", f"{train_rows.source}:5"]
    assert findings_as_json(prepared.splits, prepared.across)["across"] == [pair]
    assert warnings_with("\n".join(data_warnings(prepared)), f"{pair[0]} ({pair[1]})")
    assert prepared.train.parts[0].counts.taken == "data.leave_out: contradictions"
    assert prepared.validation is not None
    assert prepared.validation.parts[0].counts.taken == "max_examples: 2"


def test_rows_of_a_program() -> None:
    rows = from_list([dict(row) for row in PLANTED])
    source = Source(source="rows", format="prompt-completion")
    assert check_rows([(source, rows)]).near_duplicates == [[0, 2]]


@pytest.mark.slow
def test_a_run_says_it_and_keeps_near_duplicates_on_one_side(tiny: Path, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": f"Which lantern in window {i} was lit first?",
            "completion": f"Number {i} of them.",
        }
        for i in range(20)
    ]
    rows += [{**row, "prompt": row["prompt"].upper()} for row in rows]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = make_run(
        tiny,
        tmp_path,
        held=False,
        data={"hold_out": "5 examples"},
        train={"duration": "1 steps", "warmup": "0 steps"},
    )
    with logged_lines() as lines:
        train(run)
    told = "\n".join(lines)
    assert "20 of 40 rows" in told
    held_out = (Path(run.output_dir) / "held-out.txt").read_text().splitlines()
    numbers = [int(line.partition("  ")[0].rpartition(":")[2]) for line in held_out]
    assert len(numbers) == 4, "pairs only: five rows cannot be held out"
    assert {(n - 1) % 20 for n in numbers} == {(n - 1) % 20 for n in numbers if n > 20}
