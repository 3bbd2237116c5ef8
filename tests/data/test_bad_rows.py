"""Rows that cannot be read or rendered: all listed at once, or left out and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import byte_tokenizer
from errors import check_shown, holds, lines_with, refuses
from recipes import make_run
from tunesmith.cli.main import main
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


def write_rows(path: Path, count: int = 40) -> Path:
    lines = []
    for number in range(1, count + 1):
        row = BAD.get(number, good(number))
        lines.append(row if isinstance(row, str) else json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return path


def prepared(tiny: Path, folder: Path, path: Path, **data: Any) -> TrainingData:
    data = {"train": {"source": str(path), "format": "messages"}, **data}
    run = make_run(tiny, folder, held=False, data=data)
    tokenizer = byte_tokenizer()
    return prepare_data(run, tokenizer, {tokenizer.eos_token_id}, 272, cache=folder / "cache")


@pytest.mark.parametrize("are_parallel", [False, True])
def test_all_bad_rows_are_listed_at_once(
    tiny: Path, tmp_path: Path, are_parallel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if are_parallel:
        monkeypatch.setattr(workers, "MIN_ROWS_PER_WORKER", 10)
        monkeypatch.setattr(workers, "available_cores", lambda: 2)
    path = write_rows(tmp_path / "rows.jsonl")
    with refuses(DataError, names=[5, 40], fix=["data.bad_rows=skip"]) as refused:
        prepared(tiny, tmp_path, path)
    assert refused.value.where == f"{path}:3, message 1"
    places = [cause.split(": ")[0] for cause in refused.value.why.split("; ")]
    assert places == [f"rows.jsonl:{number}" for number in BAD]


def test_bad_rows_that_are_held_out_and_those_of_other_files_are_listed_with_them(
    tiny: Path, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    with refuses(DataError, names=[5, 40], fix=["data.bad_rows=skip"]) as refused:
        prepared(tiny, tmp_path, path, hold_out="50 %")
    places = {cause.split(": ")[0] for cause in refused.value.why.split("; ")}
    assert places == {f"rows.jsonl:{number}" for number in BAD}
    (tmp_path / "good.jsonl").write_text(f"{json.dumps(good(50))}\n")
    other = {"source": str(tmp_path / "good.jsonl"), "format": "messages"}
    with refuses(DataError, names=["5 of 40"]):
        prepared(tiny, tmp_path, path, validation=other)
    (tmp_path / "more.jsonl").write_text(
        f"{json.dumps(good(41))}\n{json.dumps({'messages': [A]})}\n"
    )
    sources = [
        {"source": str(tmp_path / name), "format": "messages"} for name in ("more.jsonl", path)
    ]
    with refuses(DataError, names=[6, 42]) as refused:
        prepared(tiny, tmp_path, path, train=sources)
    places = {cause.split(": ")[0] for cause in refused.value.why.split("; ")}
    assert places == {"more.jsonl:2", *(f"rows.jsonl:{number}" for number in BAD)}


def test_a_start_lists_the_bad_rows_of_all_files_before_torch_is_imported(
    tiny: Path, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    first = tmp_path / "first.jsonl"
    first.write_text(f"{json.dumps({'messages': [A]})}\n{json.dumps(good(1))}\n")
    train, validation = ({"source": str(name), "format": "messages"} for name in (first, path))
    data = {"train": train, "validation": validation}
    run = make_run(tiny, tmp_path, held=False, data=data)
    with refuses(DataError, where="first.jsonl:1, message 1", names=[6, 42]) as refused:
        check_inputs(run)
    places = {cause.split(": ")[0] for cause in refused.value.why.split("; ")}
    assert places == {"first.jsonl:1", *(f"rows.jsonl:{number}" for number in BAD)}


def test_bad_rows_that_are_skipped_are_counted(tiny: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    for _ in range(2):  # the second time from the cache
        data = prepared(tiny, tmp_path, path, bad_rows="skip")
        counts = data.train.parts[0].counts
        assert (counts.rows, counts.bad, counts.kept, len(data.train)) == (40, 5, 35, 35)
        assert [row + 1 for row, _ in counts.bad_rows] == [*BAD]
        (line,) = lines_with("\n".join(start_data_lines(data)), "35 of 40", 5)
        assert holds(line, "data.bad_rows")
        (warning,) = [line for line in data_warnings(data) if holds(line, "5 of 40")]
        assert holds(warning, f"{path}:{next(iter(BAD))}")
    # Examples keep the places of their rows.
    assert data.train.where(2).endswith("rows.jsonl:4")


def test_texts_that_are_no_utf8_are_listed_and_can_be_left_out(tiny: Path, tmp_path: Path) -> None:
    texts = {"a": b"A", "b": b"B\ncaf\xe9", "c": b"C", "d": b"D\0"}
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text)
    source = {"source": str(folder), "format": "text"}
    with refuses(DataError, where="texts/b.txt, line 2", names=[2, 4]) as refused:
        prepared(tiny, tmp_path, folder, train=source)
    places = [cause.split(": ")[0] for cause in refused.value.why.split("; ")]
    assert places == ["b.txt", "d.txt"]
    data = prepared(tiny, tmp_path, folder, train=source, bad_rows="skip")
    assert [data.train.where(i) for i in range(2)] == [f"{folder}/a.txt", f"{folder}/c.txt"]


def test_csv_rows_that_do_not_fit_the_header_are_listed_and_can_be_left_out(
    tiny: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    lines = [f"Say {number},{number}" for number in range(200)]
    lines[70] = "one"
    lines[150] = "a, b,2"
    path.write_text("\n".join(["prompt,completion", *lines]))
    source = {"source": str(path), "format": "prompt-completion"}
    with refuses(DataError, where="rows.csv:72", names=[2, 200]) as refused:
        prepared(tiny, tmp_path, path, train=source)
    places = [cause.split(": ")[0] for cause in refused.value.why.split("; ")]
    assert places == ["rows.csv:72", "rows.csv:152"]
    data = prepared(tiny, tmp_path, path, train=source, bad_rows="skip")
    assert [row for row, _ in data.train.parts[0].counts.bad_rows] == [70, 150]


def test_one_bad_row_keeps_its_own_error(tiny: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", count=5)
    with refuses(DataError, where="rows.jsonl:3, message 1", fix=["data.bad_rows=skip"]):
        prepared(tiny, tmp_path, path)


def test_a_file_of_bad_rows_alone_is_refused(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [A]}) * 1 + "\n" + json.dumps({"messages": [U]}) + "\n")
    for bad_rows in ("error", "skip"):
        with refuses(DataError, where="rows.jsonl:1, message 1", names=[2]) as refused:
            prepared(tiny, tmp_path, path, bad_rows=bad_rows)
        assert "skip" not in refused.value.fix


def test_a_long_list_of_bad_rows_is_cut(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in [good(1), {"messages": [A]}] * 25))
    with refuses(DataError, names=[25, 50]) as refused:
        prepared(tiny, tmp_path, path)
    assert len(refused.value.why.split("; ")) == 21
    data = prepared(tiny, tmp_path, path, bad_rows="skip")
    assert len(data.train.parts[0].counts.bad_rows) == 20


def test_a_resumed_run_may_not_change_what_is_left_out(tiny: Path, tmp_path: Path) -> None:
    runs = [
        make_run(tiny, tmp_path, held=False, data={"bad_rows": value})
        for value in ("error", "skip")
    ]
    (change,) = differences(*runs)
    assert (change.key, change.allowed) == ("data.bad_rows", False)


def test_what_nothing_reads_is_warned_of(tiny: Path, tmp_path: Path) -> None:
    rows = [
        good(1),
        {"messages": [U, {**A, "grade": 1}], "score": 3},
        {**good(1), "id": 7, "score": 3},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for _ in range(2):
        data = prepared(tiny, tmp_path, path)
        assert data.train.parts[0].counts.unread == {"message.grade": [1, 1], "score": [2, 1]}
        (warning,) = [line for line in data_warnings(data) if "message.grade" in line]
        assert holds(warning, "1 row", "score", "2 rows", f"{path}:2")


def test_rows_of_another_split_are_told(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for splits, told in (
        (("train", "test", "Validation", "train"), ["2 rows", f"{path}:2"]),
        (("train", "en", None, "train"), []),
        (("test", "test", "test", "test"), []),
    ):
        rows = [{**good(n), "split": split} for n, split in enumerate(splits)]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        warnings = data_warnings(prepared(tiny, tmp_path, path))
        lines = [line for line in warnings if holds(line, "split")]
        assert len(lines) == bool(told)
        assert holds("".join(lines), *told)


def test_worse_answers_beside_chosen_ones_that_are_named_are_no_loss(
    tiny: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "Who is it?", "chosen": "He.", "rejected": "No.", "score": 3}
    path.write_text(f"{json.dumps(row)}\n" * 3)
    named = {"format": "prompt-completion", "columns": {"completion": "chosen"}}
    data = prepared(tiny, tmp_path, path, train={"source": str(path), **named})
    (warning,) = [line for line in data_warnings(data) if "training does not read" in line]
    assert holds(warning, "score")
    assert "rejected" not in warning


def test_a_system_message_of_raw_rows_is_refused(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a", "completion": "b", "system": "S"}, {"prompt": "a", "completion": "b"}]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    source = {"source": str(path), "format": "prompt-completion"}
    run = make_run(tiny, tmp_path, held=False, data={"train": source, "template": "raw"})
    tokenizer = byte_tokenizer()
    with refuses(DataError, where="rows.jsonl:1", fix=["data.template=alpaca"]):
        prepare_data(run, tokenizer, {tokenizer.eos_token_id}, 272, cache=tmp_path / "cache")


def test_the_data_command_shows_what_is_left_out(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    path = write_rows(tmp_path / "rows.jsonl")
    command = ["data", "--model", str(tiny), "--data", str(path), "model.dtype=fp32"]
    assert main(command) == EXIT_USAGE
    check_shown(capsys.readouterr().err, names=[5, 40], fix=["data.bad_rows=skip"])
    assert main([*command, "data.bad_rows=skip", "--json"]) == EXIT_OK
    (source,) = json.loads(capsys.readouterr().out)["train"]
    assert source["bad"] == 5
    places = [row["where"] for row in source["bad_rows"]]
    assert places == [f"{path}:{number}" for number in BAD]
