"""`data.hold_out`: which rows are drawn, and that nothing else changes with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from errors import refuses, warnings_with
from logged import logged_lines
from recipes import make_run
from tunesmith.config.load import from_mapping, load_recipe
from tunesmith.config.schema import Data, Source
from tunesmith.data.compare.splits import draw_held_out, read_checked_splits, read_splits
from tunesmith.errors import DataError, RecipeError
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
