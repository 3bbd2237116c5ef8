"""Which rows are held out or left out, near-duplicates and contradictions among them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import byte_tokenizer
from errors import holds, refuses, warnings_with
from logged import logged_lines
from recipes import make_run
from tunesmith.cli.run_data import findings_as_json
from tunesmith.config.load import from_mapping, load_recipe
from tunesmith.config.schema import Data, Source
from tunesmith.errors import DataError, RecipeError
from tunesmith.presentation.data import data_warnings, left_out_lines, row_warnings_of
from tunesmith.rows.compare import row_checks, row_texts
from tunesmith.rows.compare.near_duplicates import find_near_duplicates, words_of
from tunesmith.rows.compare.row_checks import check_across, check_rows, find_faults
from tunesmith.rows.compare.row_texts import RowText, row_text
from tunesmith.rows.compare.splits import draw_held_out, read_checked_splits, read_splits
from tunesmith.rows.source.open_source import read_rows
from tunesmith.start.prepare import prepare_data
from tunesmith.start.run import train
from tunesmith.units import Share


def write_rows(path: Path, rows: list[Any], form: Any = "prompt-completion") -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(source=str(path), format=form)


def numbered(path: Path, count: int, first: int = 0) -> Source:
    return write_rows(path, [{"text": f"row {i}"} for i in range(first, first + count)], "text")


def splits(data: Data, seed: int = 42) -> tuple[list[str], list[str]]:
    kept, held = (
        [row["text"] for _, part in side for row in part] for side in read_splits(data, seed)
    )
    return kept, held


@pytest.mark.parametrize(("hold_out", "held"), [("5 %", 16), ("50 examples", 50), ("0.1 %", 1)])
def test_every_row_is_trained_on_or_held_out(tmp_path: Path, hold_out: str, held: int) -> None:
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
    # A resumed run and a newer numpy draw the same rows.
    assert drawn[:5] == [67, 112, 151, 184, 225]


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
    # A slice and max_examples are taken before.
    source = replace(sources[0], split="train[10:60]", max_examples=20)
    kept, aside = splits(Data(train=(source,), hold_out=Share(5, "examples")))
    assert sorted([*kept, *aside]) == [f"row {i}" for i in range(10, 30)]


def test_what_cannot_be_held_out_is_refused(tiny: Path, tmp_path: Path) -> None:
    data = Data(train=(numbered(tmp_path / "rows.jsonl", 12),), hold_out=Share.parse("99.9 %"))
    with refuses(DataError, where="data.hold_out", names=["data.train", 12]):
        read_splits(data, 42)
    with refuses(RecipeError, names=["data.hold_out", "data.validation"]):
        make_run(tiny, tmp_path, data={"hold_out": "5 %"})


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


@pytest.mark.parametrize("seed", range(2))
def test_near_duplicates_are_held_out_together(tmp_path: Path, seed: int) -> None:
    """Whatever the seed, no held-out row has a rewording that is trained on."""
    words = "amber birch cedar delta ember fjord grove heron inlet juniper kelp lotus".split()
    rows = []
    for i, word in enumerate(words * 4):
        question = f"Which {word} of the old harbor did the keeper mention {word * (i // 12 + 1)}"
        answer = f"The {word} that stands beside gate {i}."
        rows.append((i, f"{question}?", answer))
        if i % 3 == 0:
            rows += [(i, f"{question.upper()} !", answer), (i, f"Please, {question}?", answer)]
    lines = [{"prompt": question, "completion": answer} for _, question, answer in rows]
    source = write_rows(tmp_path / "rows.jsonl", lines)
    data = Data(train=(source,), hold_out=Share(16, "examples"))
    held_out = read_checked_splits(data, seed).held_out
    assert len(set(held_out)) == 16
    sides: dict[int, set[bool]] = {}
    for number, (i, _, _) in enumerate(rows):
        sides.setdefault(i, set()).add(number in held_out)
    assert all(len(side) == 1 for side in sides.values())
    assert read_checked_splits(data, seed).held_out == held_out, "from the cache too"


def test_groups_that_do_not_fit() -> None:
    for groups, count, held in (
        ([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], 3, 3),  # none fits: as if there were none
        ([list(range(10))], 3, 3),  # one group of all: as if there were none
        ([[0, 1, 2, 3, 4, 5, 6, 7]], 3, 2),  # too large: it stays in the training
    ):
        assert len({*draw_held_out(10, count, 0, groups).tolist()}) == held


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


def row(prompt: str, answer: str = "") -> RowText:
    return RowText(prompt, answer, is_answered=True)


def test_one_prompt_with_two_answers_is_a_contradiction() -> None:
    asked = "Is tin a metal?"
    rows = [row("Go on.", "yes"), row("Go on.", "no")]
    rows += [row("  is TIN a metal", "yes"), row(asked, "No."), row(asked, "no")]
    assert find_faults(rows).contradictions == [[2, 3, 4]]
    for rows in (
        [row(asked, "Yes."), row(asked, "yes")],
        [row(asked, "yes")._replace(given="[]"), row(asked, "no")],
        [RowText(asked, answer, is_answered=False) for answer in ("yes", "no")],
    ):
        assert find_faults(rows).contradictions == []


def test_swapped_pairs_and_answers_that_are_good_and_bad_contradict_each_other() -> None:
    def judged(chosen: str, rejected: str) -> RowText:
        values = {"prompt": "Is tin a metal?", "chosen": chosen, "rejected": rejected}
        return row_text(values, Source(source="x.jsonl", format="preference"))

    text, swapped, other = judged("yes", "no"), judged("no", "yes"), judged("yes", "Perhaps.")
    assert (text.answer, text.chosen, text.is_answered) == ("yes\nno", "yes", False)
    found = find_faults([text, other, swapped, text])
    assert (found.contradictions, found.near_duplicates) == ([[0, 2, 3]], [[0, 3]])
    assert find_faults([text, other]).contradictions == []
    source = Source(source="x.jsonl", format="feedback")
    values = {"prompt": "Is tin a metal?", "completion": "Yes, it is one.", "label": True}
    good, bad = (row_text({**values, "label": label}, source) for label in (True, False))
    other = bad._replace(answer="It is none.")
    found = find_faults([good, other, bad])
    assert (found.contradictions, found.near_duplicates) == ([[0, 2]], [])


def text(content: str) -> RowText:
    return RowText("", content, is_answered=False, is_plain=True)


def made(rng: random.Random) -> str:
    return "".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(4))


def unlike(count: int) -> list[RowText]:
    """Rows that say different things."""
    rng = random.Random(7)
    return [row(" ".join(made(rng) for _ in range(19))) for _ in range(count)]


QUESTION = "Which of the two lanterns in the harbor window was lit first, and by whom?"
ANSWER = "The copper one, by the keeper's daughter."


def test_a_row_that_is_reworded_a_little_is_a_near_duplicate() -> None:
    for other in (
        row(QUESTION.upper().replace(",", ""), ANSWER.lower()),
        row(f"Please tell me: {QUESTION.replace(' ', '  ')}", ANSWER),
        row(QUESTION.replace("lit first", "kindled"), ANSWER),
        row(QUESTION, ANSWER.replace("daughter", "child")),
    ):
        assert find_near_duplicates([*unlike(5), row(QUESTION, ANSWER), other]) == [[5, 6]]
    # So many rows are not compared all with all, but by MinHash.
    assert find_near_duplicates([*unlike(90), row(QUESTION, ANSWER), other]) == [[90, 91]]


def test_rows_that_say_or_teach_something_else_are_none() -> None:
    for one, other in (
        (row("What is 12 + 7?", "19"), row("What is 12 - 7?", "5")),
        (row("What is 12 - 7?", "5"), row("What is 7 - 12?", "-5")),
        (row("What is the capital of France?", "Paris"), row("What is the capital of Spain?", "Madrid")),
        (row("How do I reset my phone?", ANSWER * 3), row("Where does the tram stop?", ANSWER * 3)),
        (text("On day 3 the ship had 12 men aboard."), text("On day 4 the ship had 11 men aboard.")),
        (row("", ""), row("", "")),
        (None, None),
    ):  # fmt: skip
        assert find_near_duplicates([one, other, *unlike(9)]) == []
    for key, values in {
        "is_good": (True, False),
        "chosen": ("The copper one.", "The keeper's daughter."),
        "given": ("[1]", "[2]"),
    }.items():
        rows = [row(QUESTION, ANSWER)._replace(**{key: value}) for value in values]
        assert find_near_duplicates(rows) == []
        assert find_near_duplicates([rows[0], rows[0]]) == [[0, 1]]


def test_a_word_in_another_script() -> None:
    chinese = "猫坐在窗边看着在花园里找食物的鸟儿一整个下午都没有离开"
    rows = [
        text(chinese),
        text(chinese.replace("下午", "上午")),
        text("狗在院子里跑来跑去追着自己的尾巴玩耍"),
    ]
    assert find_near_duplicates(rows) == [[0, 1]]
    assert words_of("Ｗｈａｔ ＩＳ it?") == ["what", "is", "it"]


def labels(count: int) -> list[RowText]:
    """A long instruction, a blank of one word and one of two labels."""
    rng = random.Random(3)
    instruction = (
        "Is the following name that of a place? Answer with yes or no, in one word only, and without"
        " any punctuation or explanation. Name:"
    )
    names = {made(rng): None for _ in range(count)}
    return [row(f"{instruction} {name}", rng.choice(["yes", "no"])) for name in names]


def test_rows_of_a_template_are_not_near_duplicates() -> None:
    assert find_near_duplicates(labels(40)) == []


# Sources, cache and limits


PLANTED = [
    {"prompt": "Which lantern in the harbor window was lit first?", "completion": "The copper one."},
    {"prompt": "Is tin a metal?", "completion": "yes"},
    {"prompt": "which lantern, in the harbor window, was LIT first", "completion": "The copper one"},
    {"prompt": "Is tin a metal?", "completion": "no"},
    {"prompt": "Who built the stone bridge?", "completion": "Nobody in the village remembers that."},
]  # fmt: skip


def test_rows_are_compared_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_rows(tmp_path / "rows.jsonl", PLANTED)
    found = check_rows([(source, read_rows(source))])
    assert (found.near_duplicates, found.contradictions) == ([[0, 2]], [[1, 3]])

    monkeypatch.setattr(row_checks, "find_faults", None)
    moved = write_rows(tmp_path / "moved.jsonl", PLANTED)
    assert check_rows([(moved, read_rows(moved))]) == found, "the name of the file does not matter"
    changed = write_rows(tmp_path / "rows.jsonl", PLANTED[:4])
    with refuses(TypeError):
        check_rows([(changed, read_rows(changed))])


def test_a_large_corpus_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"Name river {i}.", "completion": f"It is {i}."} for i in range(90)]
    rows[80] = rows[20] = {"prompt": "Which lantern was lit first of all?", "completion": "One."}
    monkeypatch.setattr(row_texts, "MAX_ROWS", 10)
    source = write_rows(tmp_path / "rows.jsonl", rows)
    splits = read_checked_splits(Data(train=(source,)), 42)
    assert splits.findings is not None
    assert (splits.findings.rows, splits.findings.compared) == (90, 10)
    assert "10 of 90" in next(left_out_lines(splits))
    monkeypatch.setattr(row_texts, "MAX_ROWS", 9)
    found = check_rows([(source, read_rows(source))])
    assert found.near_duplicates == [[20, 80]], "rows are named by their own numbers"


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


def test_a_call_is_the_same_whatever_the_order_of_its_arguments() -> None:
    def call(**arguments: str) -> RowText:
        function = {"name": "weather", "arguments": arguments}
        answer = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
        messages = [{"role": "user", "content": "Weather?"}, answer]
        return row_text({"messages": messages}, Source(source="x.jsonl"))

    assert call(city="Oslo", unit="C") == call(unit="C", city="Oslo")


def test_a_line_says_that_many_rows_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = numbered(tmp_path / "rows.jsonl", 9)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    for announced, expected in ((8, 1), (8, 0)):  # the second time the result is cached
        monkeypatch.setattr(row_checks, "ANNOUNCED_ROWS", announced)
        with logged_lines() as lines:
            check_rows([(source, read_rows(source))])
        assert sum(holds(line, "9") for line in lines) == expected


def test_a_row_of_a_later_source_is_placed_in_its_own_file(tmp_path: Path) -> None:
    sources = [numbered(tmp_path / f"{name}.jsonl", 3) for name in "ab"]
    read = [(source, read_rows(source)) for source in sources]
    assert [row_checks.place(read, i) for i in (2, 3)] == [
        f"{sources[0].source}:3", f"{sources[1].source}:1"
    ]  # fmt: skip


# What the user sees


def test_faults_are_told_and_left_out(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", PLANTED)
    path = source.source
    splits = read_checked_splits(Data(train=(source,)), 42)
    first, second = row_warnings_of(splits, [])
    assert f"{path}:3 ({path}:1)" in first
    assert first.endswith("'data.leave_out=[near-duplicates]'")
    assert f"{path}:4 ({path}:2)" in second
    faults: Any = ("near-duplicates", "contradictions")
    splits = read_checked_splits(Data(train=(source,), leave_out=faults), 42)
    kept = [row["prompt"] for _, rows in splits.train for row in rows]
    assert kept == [PLANTED[0]["prompt"], PLANTED[4]["prompt"]]
    assert list(row_warnings_of(splits, [])) == []
    assert [line.split()[0] for line in left_out_lines(splits)] == ["1", "2"]
    assert findings_as_json(splits, [])["left_out"] == {"near-duplicates": 1, "contradictions": 2}
    source = write_rows(tmp_path / "few.jsonl", [PLANTED[1], PLANTED[3]])
    with refuses(DataError, where="data.leave_out", names=[2], fix=["data.leave_out=[]"]):
        read_checked_splits(Data(train=(source,), leave_out=faults), 42)


def test_validation_rows_are_compared_with_training_rows(tiny: Path, tmp_path: Path) -> None:
    """Not with the contradictions that are left out, and only as many as are validated on."""
    train_rows = write_rows(tmp_path / "train.jsonl", PLANTED)
    held = [PLANTED[3], {**PLANTED[4], "prompt": "Please: who built the stone bridge?"}, PLANTED[0]]
    validation = write_rows(tmp_path / "held.jsonl", held)
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


@pytest.mark.parametrize(("answers", "apart"), [(4, True), (60, False)])
def test_rows_of_one_answer_are_drawn_apart_where_most_repeat_theirs(
    tmp_path: Path, answers: int, apart: bool
) -> None:
    """An FAQ of four answers, each to 20 questions; and 60 answers, of which 20 are given twice."""
    words = [f"w{i:02}" for i in range(99)]
    rows = [
        {
            "prompt": f"{words[i]} {words[-i]} {words[i * 7 % 99]} {words[i * 31 % 99]}",
            "completion": " ".join([f"a{i % answers:02}{k}" for k in range(14)]),
        }
        for i in range(80)
    ]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    sides = read_splits(Data(train=(source,), hold_out=Share(8, "examples")), seed=3)
    trained, held_out = ({row["completion"] for _, part in side for row in part} for side in sides)
    assert len(held_out) > 1
    assert held_out <= trained if apart else not held_out & trained


def test_of_a_long_row_both_ends_are_compared() -> None:
    long = " ".join(f"word{i}" for i in range(5000))
    text = row_text({"text": long}, Source(source="x.jsonl", format="text"))
    assert len(text.answer) == row_texts.MAX_TEXT_CHARACTERS + 1
    assert text.answer.startswith("word0 ")
    assert text.answer.endswith(" word4999")
