"""Near-duplicates and contradictions: what is said of rows, and what `data.leave_out` leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import byte_tokenizer
from errors import refuses, warnings_with
from recipes import make_run
from tunesmith.cli.run_data import findings_as_json
from tunesmith.config.schema import Data, Source
from tunesmith.data.compare import row_checks, row_texts
from tunesmith.data.compare.row_checks import RowFindings, check_across, check_rows, find_faults
from tunesmith.data.compare.row_texts import RowText, read_texts, row_text, sampled_rows
from tunesmith.data.compare.splits import read_checked_splits, read_splits
from tunesmith.data.prepare import prepare_data
from tunesmith.data.source.open_source import read_rows
from tunesmith.errors import DataError
from tunesmith.presentation.data import data_warnings, left_out_lines, row_warnings_of
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
]


def row(prompt: str, answer: str) -> RowText:
    return RowText(prompt, answer, is_answered=True)


def good_rows(count: int) -> list[RowText]:
    """Rows without any fault: all prompts differ, all answers end."""
    rows = []
    for i in range(count):
        first, second = SENTENCES[i % 8], SENTENCES[(i // 8 + i + 1) % 8]
        rows.append(row(f"Write sentence number {i} of the story.", f"{first} {second} Part {i}."))
    return rows


def source_of(path: Path, rows: list[dict[str, Any]]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(source=str(path), format="prompt-completion")


def test_good_rows_have_no_fault() -> None:
    assert find_faults(good_rows(60)) == RowFindings(rows=60, compared=60)


@pytest.mark.parametrize("first", ["Is tin a metal?", "  is TIN a metal", "Is tin a metal ?!"])
def test_one_prompt_with_two_answers(first: str) -> None:
    answers = [(first, "yes"), ("Is tin a metal?", "No."), ("Is tin a metal?", "no")]
    rows = [*good_rows(3), *[row(*pair) for pair in answers]]
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


def test_swapped_pairs_contradict_each_other_and_other_pairs_do_not() -> None:
    def judged(chosen: str, rejected: str) -> RowText:
        values = {"prompt": "Is tin a metal?", "chosen": chosen, "rejected": rejected}
        return row_text(values, Source(source="x.jsonl", format="preference"))

    text, swapped, other = judged("yes", "no"), judged("no", "yes"), judged("yes", "Perhaps.")
    assert (text.answer, text.chosen, text.is_answered) == ("yes\nno", "yes", False)
    found = find_faults([text, other, swapped, text])
    assert (found.contradictions, found.near_duplicates) == ([[0, 2, 3]], [[0, 3]])
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
    tools = [[{"type": "function", "function": {"name": n}}] for n in ("weather", "search")]
    source = Source(source="x.jsonl", format="messages")
    texts = [row_text({"messages": turns, "tools": t}, source) for t in (*tools, tools[0])]
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
    found = check_rows([(source, read_rows(source))])
    assert (found.near_duplicates, found.contradictions) == ([[0, 2]], [[1, 3]])

    def again(*args: object) -> RowFindings:
        raise AssertionError("compared twice")

    monkeypatch.setattr(row_checks, "find_faults", again)
    moved = source_of(tmp_path / "moved.jsonl", PLANTED)
    assert check_rows([(moved, read_rows(moved))]) == found, "the name of the file does not matter"
    changed = source_of(tmp_path / "rows.jsonl", PLANTED[:4])
    with refuses(AssertionError):
        check_rows([(changed, read_rows(changed))])
    # A plan compares no rows.
    data = Data(train=(changed,), hold_out=Share(1, "examples"), leave_out=("contradictions",))
    train_rows, held_out = read_splits(data, 42, only_cached=True)
    assert (len(train_rows[0][1]), len(held_out[0][1])) == (3, 1)


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
    splits = read_checked_splits(Data(train=(source,)), 42)
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


def test_faults_are_told_with_their_places_and_what_is_left_out_with_its_count(
    tmp_path: Path,
) -> None:
    source = source_of(tmp_path / "rows.jsonl", PLANTED)
    path = source.source
    splits = read_checked_splits(Data(train=(source,)), 42)
    first, second = row_warnings_of(splits, [])
    assert f"{path}:3 ({path}:1)" in first
    assert first.endswith("'data.leave_out=[near-duplicates]'")
    assert f"{path}:4 ({path}:2)" in second
    plain = findings_as_json(splits, [])
    assert plain["counts"]["near-duplicates"] == 1
    assert plain["contradictions"] == [[f"{path}:2", f"{path}:4"]]
    faults: Any = ("near-duplicates", "contradictions")
    splits = read_checked_splits(Data(train=(source,), leave_out=faults), 42)
    kept = [row["prompt"] for _, rows in splits.train for row in rows]
    assert kept == [PLANTED[0]["prompt"], PLANTED[4]["prompt"]]
    assert list(row_warnings_of(splits, [])) == []
    assert [line.split()[0] for line in left_out_lines(splits)] == ["1", "2"]
    assert findings_as_json(splits, [])["left_out"] == {"near-duplicates": 1, "contradictions": 2}


def test_a_validation_row_is_compared_with_the_rows_that_are_trained_on(
    tiny: Path, tmp_path: Path
) -> None:
    """Not with the contradictions that are left out, and only as many as are validated on."""
    train_rows = source_of(tmp_path / "train.jsonl", PLANTED)
    held = [PLANTED[3], {**PLANTED[4], "prompt": "Please: who built the stone bridge?"}, PLANTED[0]]
    validation = source_of(tmp_path / "held.jsonl", held)
    splits = read_checked_splits(Data(train=(train_rows,), validation=(validation,)), 42)
    assert check_across(splits.validation, splits.train) == [[0, 3], [1, 4], [2, 0]]
    form = {"format": "prompt-completion"}
    data = {
        "train": {"source": train_rows.source, **form},
        "validation": {"source": validation.source, **form, "max_examples": 2},
        "leave_out": ["contradictions"],
    }
    run = make_run(tiny, tmp_path, held=False, data=data)
    tokenizer = byte_tokenizer()
    ends = {tokenizer.eos_token_id}
    prepared = prepare_data(run, tokenizer, ends, 272, cache=tmp_path / "cache", strict=False)
    pair = [f"{validation.source}:2", f"{train_rows.source}:5"]
    assert findings_as_json(prepared.splits, prepared.across)["across"] == [pair]
    assert warnings_with("\n".join(data_warnings(prepared)), f"{pair[0]} ({pair[1]})")
    assert prepared.train.parts[0].counts.taken == "data.leave_out: contradictions"
    assert prepared.validation is not None
    assert prepared.validation.parts[0].counts.taken == "max_examples: 2"


def test_all_rows_may_be_left_out_by_mistake(tmp_path: Path) -> None:
    rows = [{"prompt": "Is it raining today?", "completion": answer} for answer in ("yes", "no")]
    source = source_of(tmp_path / "rows.jsonl", rows)
    with refuses(DataError, where="data.leave_out", names=[2], fix=["data.leave_out=[]"]):
        read_checked_splits(Data(train=(source,), leave_out=("contradictions",)), 42)
