"""Rows that cannot be read or rendered: all listed at once, or left out and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import byte_tokenizer
from errors import check_shown, holds, lines_with, refuses
from invoke import invoke
from recipes import make_run
from tunesmith.config.dump import differences
from tunesmith.data.prepare import TrainingData, prepare_data
from tunesmith.data.tokens import workers
from tunesmith.errors import EXIT_OK, EXIT_USAGE, DataError
from tunesmith.presentation.data import data_warnings, start_data_lines
from tunesmith.stages.inputs import check_inputs

U, A = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


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


def prepared(tiny: Path, folder: Path, train: Any, **data: Any) -> TrainingData:
    run = make_run(tiny, folder, held=False, data={"train": train, **data})
    tokenizer = byte_tokenizer()
    return prepare_data(run, tokenizer, {tokenizer.eos_token_id}, 272, cache=folder / "cache")


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


def test_worse_answers_beside_chosen_ones_that_are_named_are_no_loss(
    tiny: Path, tmp_path: Path
) -> None:
    row = {"prompt": "Who is it?", "chosen": "He.", "rejected": "No.", "score": 3}
    source = write_lines(tmp_path / "rows.jsonl", [row] * 3)
    named = {"format": "prompt-completion", "columns": {"completion": "chosen"}}
    data = prepared(tiny, tmp_path, {**source, **named})
    (warning,) = [line for line in data_warnings(data) if holds(line, "score")]
    assert "rejected" not in warning


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
