"""Which rows are held out or left out, near-duplicates and contradictions among them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import byte_tokenizer
from errors import refuses, warnings_with
from logged import logged_lines
from recipes import make_run
from tunesmith.cli.run_data import findings_as_json
from tunesmith.config.load import from_mapping, load_recipe
from tunesmith.config.schema import Data, Source
from tunesmith.data.compare import row_checks, row_texts
from tunesmith.data.compare.row_checks import RowFindings, check_across, check_rows, find_faults
from tunesmith.data.compare.row_texts import RowText, read_texts, row_text, sampled_rows
from tunesmith.data.compare.splits import draw_held_out, read_checked_splits, read_splits
from tunesmith.data.prepare import prepare_data
from tunesmith.data.source.open_source import read_rows
from tunesmith.errors import DataError, RecipeError
from tunesmith.presentation.data import data_warnings, left_out_lines, row_warnings_of
from tunesmith.training.run import train
from tunesmith.units import Share


def write_rows(path: Path, rows: list[Any], form: Any, **columns: str) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(source=str(path), format=form, columns=columns)


def numbered(path: Path, count: int, first: int = 0) -> Source:
    return write_rows(path, [{"text": f"row {i}"} for i in range(first, first + count)], "text")


def splits(data: Data, seed: int = 42) -> tuple[list[str], list[str]]:
    kept, held = (
        [row["text"] for _, part in side for row in part] for side in read_splits(data, seed)
    )
    return kept, held


@pytest.mark.parametrize(
    ("hold_out", "held"),
    [("5 %", 16), ("50 examples", 50), ("0.1 %", 1), ("1 examples", 1), ("50 %", 156)],
)
def test_every_row_is_either_trained_on_or_held_out(
    tmp_path: Path, hold_out: str, held: int
) -> None:
    source = numbered(tmp_path / "rows.jsonl", 312)
    kept, aside = splits(Data(train=(source,), hold_out=Share.parse(hold_out)))
    assert len(aside) == held
    assert sorted(kept + aside) == sorted(f"row {i}" for i in range(312))
    numbers = [int(text.split()[1]) for text in kept]
    assert numbers == sorted(numbers), "the rows to train on keep their order"


def test_the_seed_draws_from_the_whole_file(tmp_path: Path) -> None:
    data = Data(train=(numbered(tmp_path / "rows.jsonl", 1000),), hold_out=Share(50, "examples"))
    drawn = [int(text.split()[1]) for text in splits(data)[1]]
    assert [sum(lo <= i < lo + 250 for i in drawn) > 3 for lo in range(0, 1000, 250)] == [True] * 4
    assert splits(data, seed=7)[1] != splits(data)[1]
    assert splits(replace(data, hold_out_seed=42), seed=7) == splits(data)
    # A resumed run, a newer numpy and a later version draw the same rows.
    assert drawn[:5] == [67, 112, 151, 184, 225]
    values = {"data": {"train": {"source": "rows.jsonl"}, "hold_out_seed": 7}, "output_dir": "out"}
    values["model"] = {"name": "a/b"}
    with refuses(RecipeError, where="test: data.hold_out_seed", fix=["data.hold_out: 5 %"]):
        from_mapping(values, where="test", base=tmp_path)


def test_rows_are_drawn_from_all_sources_and_keep_their_places(tmp_path: Path) -> None:
    sources = (numbered(tmp_path / "a.jsonl", 100), numbered(tmp_path / "b.jsonl", 300, first=100))
    kept, held = read_splits(Data(train=sources, hold_out=Share(10.0, "%")), 42)
    assert sum(len(part) for _, part in held) == 40
    assert all(len(part) > 3 for _, part in held)
    for source, part in (*kept, *held):
        for i, row in enumerate(part):
            number = int(row["text"].split()[1])
            line = number + 1 if number < 100 else number - 99
            assert part.where(i) == f"{source.source}:{line}"
    assert kept[0][1].digest() != held[0][1].digest()


def test_a_slice_and_max_examples_are_taken_before(tmp_path: Path) -> None:
    source = numbered(tmp_path / "rows.jsonl", 100)
    source = replace(source, split="train[10:60]", max_examples=20)
    kept, aside = splits(Data(train=(source,), hold_out=Share(5, "examples")))
    assert sorted([*kept, *aside]) == [f"row {i}" for i in range(10, 30)]


@pytest.mark.parametrize("hold_out", ["12 examples", "99.9 %"])
def test_something_must_be_left_to_train_on(tmp_path: Path, hold_out: str) -> None:
    data = Data(train=(numbered(tmp_path / "rows.jsonl", 12),), hold_out=Share.parse(hold_out))
    with refuses(DataError, where="data.hold_out", names=["data.train", 12]):
        read_splits(data, 42)


def test_it_excludes_validation_rows_of_their_own(tiny: Path, tmp_path: Path) -> None:
    with refuses(RecipeError, names=["data.hold_out", "data.validation"]):
        make_run(tiny, tmp_path, data={"hold_out": "5 %"})
    for wrong in ("5 steps", "100 %"):
        with refuses(RecipeError, names=["data.hold_out"]):
            make_run(tiny, tmp_path, held=False, data={"hold_out": wrong})
    run = make_run(tiny, tmp_path, held=False, data={"hold_out": "5 %"}, validate={"patience": 2})
    assert run.data.hold_out == Share(5, "%")


@pytest.mark.slow
def test_a_run_validates_on_them_and_resumes_with_the_same(tiny: Path, tmp_path: Path) -> None:
    """The resumed run ends with the uninterrupted one's records, and takes no other rows."""

    def run(name: str, duration: str, hold_out: str = "10 %") -> list[list[object]]:
        given = {"duration": duration, "schedule": "constant", "warmup": "0 steps"}
        recipe = make_run(
            tiny, tmp_path, held=False, output_dir=str(tmp_path / name), train=given,
            data={"hold_out": hold_out}, validate={"every": "4 steps"},
            model={"quantize": "none"},  # which `auto` stands for
        )  # fmt: skip
        train(recipe)
        assert load_recipe(tmp_path / name / "config.yaml") == recipe
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        names = ("step", "loss", "val_loss", "grad_norm", "tokens")
        return [[json.loads(line).get(key) for key in names] for line in lines]

    whole = run("whole", "8 steps")
    run("twice", "4 steps")
    with refuses(RecipeError) as refused:
        run("twice", "8 steps", "20 %")
    assert "data.hold_out" in refused.value.where
    assert run("twice", "8 steps") == whole
    assert [record[0] for record in whole if record[2] is not None] == [4, 8]


@pytest.mark.slow
def test_rows_that_are_there_twice_stay_on_one_side(tiny: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"text": f"row {i % 20}"} for i in range(40)], "")
    values = {
        "model": {"name": str(tiny), "dtype": "fp32"},
        "data": {
            "train": {"source": source.source, "format": "text"},
            "seq_len": 64,
            "hold_out": "4 examples",
        },
        "train": {"duration": "1 steps"},
        "output_dir": str(tmp_path / "run"),
    }
    with logged_lines() as lines:
        train(from_mapping(values, where="test", base=tmp_path))
    told = "\n".join(lines)
    assert not warnings_with(told, "val_loss")
    assert len(warnings_with(told, "data.leave_out=[near-duplicates]")) == 1
    assert warnings_with(told, "20 of 40")
    held_out = (tmp_path / "run" / "held-out.txt").read_text().splitlines()
    texts = [line.partition("  ")[2] for line in held_out]
    assert (len(texts), len(set(texts))) == (4, 2), "both of a pair are held out"


@pytest.mark.parametrize("seed", range(4))
def test_near_duplicates_are_held_out_together(tmp_path: Path, seed: int) -> None:
    """Whatever the seed, no held-out row has a rewording that is trained on."""
    words = "amber birch cedar delta ember fjord grove heron inlet juniper kelp lotus".split()
    rows = []
    for i, word in enumerate(words * 4):
        question = (
            f"Which {word} of the old harbor town did the keeper mention {word * (i // 12 + 1)}"
        )
        answer = f"The {word} that stands beside gate {i}."
        rows.append((i, f"{question}?", answer))
        if i % 3 == 0:
            rows += [(i, f"{question.upper()} !", answer), (i, f"Please, {question}?", answer)]
    lines = [{"prompt": question, "completion": answer} for _, question, answer in rows]
    source = write_rows(tmp_path / "rows.jsonl", lines, "prompt-completion")
    data = Data(train=(source,), hold_out=Share(16, "examples"))
    held_out = read_checked_splits(data, seed).held_out
    assert len(set(held_out)) == 16
    sides: dict[int, set[bool]] = {}
    for number, (i, _, _) in enumerate(rows):
        sides.setdefault(i, set()).add(number in held_out)
    assert all(len(side) == 1 for side in sides.values())
    assert read_checked_splits(data, seed).held_out == held_out, "from the cache too"


@pytest.mark.parametrize(("answers", "apart"), [(4, True), (60, False)])
def test_rows_of_one_answer_are_drawn_apart_where_most_repeat_theirs(
    tmp_path: Path, answers: int, apart: bool
) -> None:
    """An FAQ of four answers, each to 20 questions; and 60 answers, of which 20 are given twice."""
    words = [f"w{i:02}" for i in range(99)]
    rows = [
        {
            "question": f"{words[i]} {words[-i]} {words[i * 7 % 99]} {words[i * 31 % 99]}",
            "answer": " ".join([f"a{i % answers:02}{k}" for k in range(14)]),
        }
        for i in range(80)
    ]
    columns = {"instruction": "question", "output": "answer"}
    source = write_rows(tmp_path / "rows.jsonl", rows, "alpaca", **columns)
    sides = read_splits(Data(train=(source,), hold_out=Share(8, "examples")), seed=3)
    trained, held_out = ({row["answer"] for _, part in side for row in part} for side in sides)
    assert len(held_out) > 1
    assert held_out <= trained if apart else not held_out & trained


def test_each_group_is_held_out_as_often_as_a_row_alone() -> None:
    """Of 100 rows, 30 of them in groups of three, a tenth is drawn: 3,000 times."""
    alone = draw_held_out(1000, 50, 42).tolist()
    assert draw_held_out(1000, 50, 42, [[1, 2, 3]]).tolist()[:3] == alone[:3]
    groups = [[k, k + 40, k + 70] for k in range(10)]
    counts = np.zeros(100)
    for seed in range(3000):
        drawn = draw_held_out(100, 10, seed, groups)
        assert len(drawn) == 10
        counts[drawn] += 1
    for group in groups:
        assert len(set(counts[group])) == 1
    members = [row for group in groups for row in group]
    # A group that does not fit waits for a single row's place: a little less than its 30 %.
    assert 0.24 < counts[members].sum() / counts.sum() <= 0.30


EIGHTS = [list(range(first, first + 8)) for first in range(0, 80, 8)]


@pytest.mark.parametrize(
    ("rows", "groups", "count", "held"),
    [
        (10, [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], 3, 5),  # none fits: the smallest
        (10, [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], 1, 1),  # and that is half of all rows
        (10, [list(range(10))], 3, 3),  # one group of all: as if there were none
        (10, [[0, 1, 2, 3, 4, 5, 6, 7]], 3, 2),  # too large: it stays in the training
        (80, EIGHTS, 1, 8),  # the smallest, as it is few of all rows
        (80, EIGHTS, 3, 8),
        (40, [list(range(20)), list(range(20, 40))], 3, 3),
    ],
)
def test_groups_that_do_not_fit(rows: int, groups: Any, count: int, held: int) -> None:
    drawn = draw_held_out(rows, count, 0, groups).tolist()
    assert (len(drawn), len(set(drawn))) == (held, held)


def test_leaving_out_comes_before_holding_out(tmp_path: Path) -> None:
    rows = [{"text": f"row {i % 30} of a file with many words in it"} for i in range(40)]
    source = write_rows(tmp_path / "rows.jsonl", rows, "text")
    data = Data(train=(source,), leave_out=("near-duplicates",), hold_out=Share(10, "%"))
    left_out = read_checked_splits(data, 42).left_out
    assert left_out == {"near-duplicates": list(range(30, 40))}
    kept, held = splits(data)
    assert len(held) == 3
    assert sorted(kept + held) == sorted(row["text"] for row in rows[:30])


# --- near-duplicates and contradictions


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
    return write_rows(path, rows, "prompt-completion")


@pytest.mark.slow
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
