"""`data.hold_out`: which rows are drawn, and that nothing else changes with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from errors import refuses, warnings_with
from logged import logged_lines
from recipes import make_run
from tunesmith.config.dump import differences
from tunesmith.config.load import from_mapping, load_recipe
from tunesmith.config.schema import Data, Source
from tunesmith.data.compare.splits import draw_held_out, read_checked_splits, read_splits
from tunesmith.errors import DataError, RecipeError
from tunesmith.training.run import train
from tunesmith.units import Share


def numbered(path: Path, count: int, first: int = 0) -> Source:
    path.write_text(
        "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(first, first + count))
    )
    return Source(source=str(path), format="text")


def splits(data: Data, seed: int = 42) -> tuple[list[str], list[str]]:
    kept, held = read_splits(data, seed)
    return [row["text"] for _, part in kept for row in part], [
        row["text"] for _, part in held for row in part
    ]


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
    assert splits(data) == splits(data)
    assert splits(data)[1] != splits(data, seed=7)[1]
    assert drawn[:5] == [67, 112, 151, 184, 225], (
        "a resumed run, a newer numpy and a later version draw the same rows"
    )


def test_another_seed_may_keep_the_rows(tmp_path: Path) -> None:
    data = Data(train=(numbered(tmp_path / "rows.jsonl", 100),), hold_out=Share(5.0, "%"))
    assert splits(replace(data, hold_out_seed=42), seed=7) == splits(data, seed=42)
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
            assert (
                part.where(i)
                == f"{source.source}:{number % 100 + 1 if number < 100 else number - 99}"
            )
    assert kept[0][1].digest() != held[0][1].digest()


def test_a_slice_and_max_examples_are_taken_before(tmp_path: Path) -> None:
    source = numbered(tmp_path / "rows.jsonl", 100)
    source = Source(source=source.source, format="text", split="train[10:60]", max_examples=20)
    kept, aside = splits(Data(train=(source,), hold_out=Share(5, "examples")))
    assert sorted([*kept, *aside]) == [f"row {i}" for i in range(10, 30)]


@pytest.mark.parametrize("hold_out", ["12 examples", "99.9 %"])
def test_something_must_be_left_to_train_on(tmp_path: Path, hold_out: str) -> None:
    data = Data(train=(numbered(tmp_path / "rows.jsonl", 12),), hold_out=Share.parse(hold_out))
    with refuses(DataError, where="data.hold_out") as refused:
        read_splits(data, 42)
    assert (refused.value.where, refused.value.why) == ("data.hold_out", "data.train has 12 rows")


def test_it_excludes_validation_rows_of_their_own(tiny: Path, tmp_path: Path) -> None:
    with refuses(RecipeError, names=["data.hold_out", "data.validation"]):
        make_run(tiny, tmp_path, data={"hold_out": "5 %"})
    with refuses(RecipeError, names=["data.hold_out", "5 steps"]):
        make_run(tiny, tmp_path, held=False, data={"hold_out": "5 steps"})
    with pytest.raises(RecipeError, match="below 100 %"):
        make_run(tiny, tmp_path, held=False, data={"hold_out": "100 %"})
    run = make_run(tiny, tmp_path, held=False, data={"hold_out": "5 %"}, validate={"patience": 2})
    assert run.data.hold_out == Share(5, "%")


@pytest.mark.slow
@pytest.mark.parametrize("pack", [True, False])
def test_a_run_validates_on_them_and_resumes_with_the_same(
    tiny: Path, tmp_path: Path, pack: bool
) -> None:
    """Packing changes no row of either part; the resumed run ends with the uninterrupted one's
    records.
    """
    lines: list[str] = []

    def run(name: str, duration: str) -> list[dict[str, object]]:
        given = {"duration": duration, "schedule": "constant", "warmup": "0 steps"}
        recipe = make_run(
            tiny, tmp_path, held=False, output_dir=str(tmp_path / name), train=given,
            data={"hold_out": "10 %", "pack": pack}, validate={"every": "4 steps"},
            model={"quantize": "none"},  # which `auto` stands for
        )  # fmt: skip
        with logged_lines() as logged:
            train(recipe)
        lines.extend(logged)
        assert load_recipe(tmp_path / name / "config.yaml") == recipe
        return [
            json.loads(line)
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]

    whole = run("whole", "8 steps")
    run("twice", "4 steps")
    again = run("twice", "8 steps")
    for text in ("43 of 48 rows (data.hold_out: 10 %)", "5 held-out rows,"):
        assert f"train.jsonl: {text}" in "".join(lines)
    names = ("step", "loss", "val_loss", "grad_norm", "tokens")
    assert [[r.get(n) for n in names] for r in again] == [[r.get(n) for n in names] for r in whole]
    assert [r["step"] for r in whole if r.get("val_loss") is not None] == [4, 8]


def test_other_held_out_rows_are_refused_on_resume(tiny: Path, tmp_path: Path) -> None:
    train(
        make_run(
            tiny, tmp_path, held=False, data={"hold_out": "10 %"}, train={"duration": "2 steps"}
        )
    )
    with pytest.raises(RecipeError) as refused:
        train(
            make_run(
                tiny, tmp_path, held=False, data={"hold_out": "20 %"}, train={"duration": "4 steps"}
            )
        )
    assert "data.hold_out" in refused.value.where


def test_rows_that_are_there_twice_stay_on_one_side(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i % 20}"}) + "\n" for i in range(40)))
    values = {
        "model": {"name": str(tiny), "dtype": "fp32"},
        "data": {
            "train": {"source": str(path), "format": "text"},
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
    assert len(texts) == 4
    assert len(set(texts)) == 2, "both of a pair are held out"


@pytest.mark.parametrize("seed", range(12))
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
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"{q}", "completion": a}) for _, q, a in rows]
    path.write_text("\n".join(lines))
    source = Source(source=str(path), format="prompt-completion")
    data = Data(train=(source,), hold_out=Share(16, "examples"))
    splits_ = read_checked_splits(data, seed)
    held_out = set(splits_.held_out)
    assert len(held_out) == 16
    sides: dict[int, set[bool]] = {}
    for number, (i, _, _) in enumerate(rows):
        sides.setdefault(i, set()).add(number in held_out)
    assert all(len(side) == 1 for side in sides.values())
    again = read_checked_splits(data, seed)
    assert again.held_out == splits_.held_out, "from the cache too"


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
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(
        source=str(path), format="alpaca", columns={"instruction": "question", "output": "answer"}
    )
    data = Data(train=(source,), hold_out=Share(8, "examples"))
    kept, held = read_splits(data, seed=3)
    trained = {row["answer"] for _, part in kept for row in part}
    held_out = {row["answer"] for _, part in held for row in part}
    assert len(held_out) > 1
    assert held_out <= trained if apart else not held_out & trained


def test_without_groups_the_draw_is_the_first_of_the_order() -> None:
    alone = draw_held_out(1000, 50, 42)
    assert draw_held_out(1000, 50, 42, [[1, 2, 3]]).tolist()[:3] == alone.tolist()[:3]
    assert sorted(alone.tolist())[:5] == [67, 112, 151, 184, 225]


def test_each_group_is_held_out_as_often_as_a_row_alone() -> None:
    """Of 100 rows, 30 of them in groups of three, a tenth is drawn: 3,000 times."""
    groups = [[k, k + 40, k + 70] for k in range(10)]
    counts = np.zeros(100)
    for seed in range(3000):
        drawn = draw_held_out(100, 10, seed, groups)
        assert len(drawn) == 10
        counts[drawn] += 1
    for group in groups:
        assert len(set(counts[group])) == 1
    members = [row for group in groups for row in group]
    share = counts[members].sum() / counts.sum()
    # A group that does not fit waits for a single row's place: a little less than its 30 %.
    assert 0.24 < share <= 0.30


@pytest.mark.parametrize(
    ("groups", "count", "held"),
    [
        ([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], 3, 5),  # none fits: the smallest
        ([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], 1, 1),  # and that is half of all rows
        ([list(range(10))], 3, 3),  # one group of all: as if there were none
        ([[0, 1, 2, 3, 4, 5, 6, 7]], 3, 2),  # too large: it stays in the training
    ],
)
def test_groups_that_do_not_fit(groups: list[list[int]], count: int, held: int) -> None:
    drawn = draw_held_out(10, count, 0, groups).tolist()
    assert len(drawn) == held
    assert len(set(drawn)) == held


def test_a_smallest_group_of_few_rows_is_held_out() -> None:
    groups = [list(range(first, first + 8)) for first in range(0, 80, 8)]
    assert len(draw_held_out(80, 1, 0, groups)) == 8
    assert len(draw_held_out(80, 3, 0, groups)) == 8
    groups = [list(range(20)), list(range(20, 40))]
    assert len(draw_held_out(40, 3, 0, groups)) == 3


def test_leaving_out_comes_before_holding_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"row {i % 30} of a file with many words in it"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(source=str(path), format="text")
    data = Data(train=(source,), leave_out=("near-duplicates",), hold_out=Share(10, "%"))
    splits_ = read_checked_splits(data, 42)
    assert splits_.left_out == {"near-duplicates": list(range(30, 40))}
    kept, held = splits(data)
    assert len(held) == 3
    assert sorted(kept + held) == sorted(row["text"] for row in rows[:30])


def test_all_rows_may_be_left_out_by_mistake(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "Is it raining today?", "completion": answer} for answer in ("yes", "no")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(source=str(path), format="prompt-completion")
    data = Data(train=(source,), leave_out=("contradictions",))
    with refuses(DataError, where="data.leave_out", names=[2], fix=["data.leave_out=[]"]):
        read_checked_splits(data, 42)


def test_what_is_left_out_may_not_change_in_a_resumed_run(tiny: Path, tmp_path: Path) -> None:
    before = make_run(tiny, tmp_path)
    after = make_run(tiny, tmp_path, data={"leave_out": ["contradictions"]})
    changes = [change for change in differences(before, after) if not change.allowed]
    assert [change.key for change in changes] == ["data.leave_out"]
