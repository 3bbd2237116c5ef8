"""Broken files and rows: each is refused with what, where and a fix, never with a traceback."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from errors import refuses
from tunesmith.config.schema import Source
from tunesmith.errors import DataError
from tunesmith.rows.formats import convert_row
from tunesmith.rows.source import files
from tunesmith.rows.source.open_source import read_rows

U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


def through(source: Source) -> None:
    rows = read_rows(source)
    for i in range(len(rows)):
        convert_row(rows[i], source, where=rows.where(i))


def assert_refused(source: Source, what: str, where: str, fix: str) -> None:
    with pytest.raises(DataError) as caught:
        through(source)
    error = caught.value
    assert what in f"{error.what} {error.why}"
    assert where in error.where
    assert fix in error.fix
    assert error.exit_code == 2
    assert all(len(line) < 1000 for line in error.text().splitlines())


def line(**row: Any) -> str:
    return json.dumps(row)


GOOD = line(text="a")

# file name, content, keys of the source, and parts of what, where and fix
FILES: list[tuple[str, str | bytes, dict[str, Any], str, str, str]] = [
    ("a.jsonl", "", {}, "the file is empty", "a.jsonl", "add rows"),
    ("a.jsonl", f"{GOOD}\nnot json\n", {}, "not JSON", "a.jsonl:2", "sed -n 2p"),
    ("a.jsonl", f'{GOOD}\n\n{{"text": "cut', {}, "not JSON", "a.jsonl:3", "write the file again"),
    ("a.jsonl", f"[\n{GOOD},\n{GOOD}\n]\n", {}, "one JSON object per line", "a.jsonl:1", "jq -c "),
    ("a.jsonl", f'{GOOD}\n["text"]\n', {}, "an array, not an object", "a.jsonl:2", '{"column": value'),
    ("a.jsonl", f"{GOOD}\n".encode() + b'{"text": "caf\xe9"}\n', {}, "not UTF-8", "a.jsonl:2", "iconv -f cp1252"),
    ("a.jsonl", GOOD.encode("utf-16"), {}, "not UTF-8", "a.jsonl:1", "iconv -f utf-16"),
    ("a.jsonl", f'{GOOD}\n{{"text": "\\ud83d"}}\n', {}, "half of a surrogate pair", "a.jsonl:2", "write the complete character"),
    ("a.jsonl", f'{GOOD}\n{{"text": "a", "text": "b"}}\n', {}, "not JSON", "a.jsonl:2", "fix this line"),
    ("a.json", f'{{"data": [{GOOD}]}}', {}, "an object, not an array", "a.json", "jq '.[\"data\"]'"),
    ("a.json", f'[{GOOD},\n{GOOD},\n{{"text": "cut', {}, "not JSON", "a.json:3", "write the file again"),
    ("a.json", '{\n"text": "a"\n}\n{\n"text": "b"\n}', {}, "neither one JSON array", "a.json:4", "jq -c "),
    ("a.jsonl", f"{GOOD}\n{GOOD}{GOOD}\n", {}, "one JSON object per line", "a.jsonl:2", "jq -c "),
    ("a.jsonl", f"{GOOD},\n{GOOD},\n", {}, "not JSON", "a.jsonl:1", "sed -n 1p"),
    ("a.json", f"[{GOOD}, 7]", {}, "a number, not an object", "a.json row 2", "delete the row"),
    ("a.csv", "text,text\n1,2\n", {}, "with the same name: text", "a.csv:1", "a unique name"),
    ("a.csv", 'text\n"open\n', {}, "not valid CSV", "a.csv:2", "close the quote"),
    ("a.csv", 'text,n\n"a "b" c",1\n', {}, "not valid CSV", "a.csv:2", '"a ""quoted"" word"'),
    ("a.csv", "text,n\na,1\nb\n", {}, "1 value, but the header has 2", "a.csv:3", "add the missing values"),
    ("a.parquet", b"PAR1 torn", {}, "not a valid parquet file", "a.parquet", "download or write"),
    ("a.pdf", "hello", {}, "not a supported data file", "a.pdf", "pdftotext"),
    ("a.txt", "a\nb\0", {}, "is not text", "a.txt, line 2", "file "),
    ("a.jsonl", GOOD, {"split": "test"}, "no split test", "a.jsonl", "split: train"),
    ("a.jsonl", GOOD, {"split": "train[5:]"}, "selects no rows", "a.jsonl", "larger slice"),
    ("a.jsonl", GOOD, {"split": "train[:200%]"}, "is invalid", "a.jsonl", "train[:95%]"),
    ("a.jsonl", GOOD, {"format": "alpaca"}, "no column instruction", "a.jsonl:1", "or use format: text"),
    ("a.jsonl", line(question="q", answer="a"), {"format": "alpaca"}, "no column instruction", "a.jsonl:1", "columns: {instruction: question, output: answer}"),
    (
        "a.jsonl", line(Topic="t", Question="q", Answer="a"), {"format": "prompt-completion", "columns": {"prompt": "Qestion", "completion": "Anwser"}},
        "no column Qestion or Anwser", "a.jsonl:1", "columns: {prompt: Question, completion: Answer}",
    ),
    ("a.jsonl", line(question="q", answer="a"), {"format": "messages"}, "no column messages", "a.jsonl:1", "add the column"),
    ("a.jsonl", line(prompt="q", completion="a"), {"format": "messages"}, "no column messages", "a.jsonl:1", "the row, or use format: prompt-completion"),
    ("a.jsonl", line(instruction="q", output=7), {"format": "alpaca"}, "output is a number", "a.jsonl:1", "quotes"),
    ("a.jsonl", f"{GOOD}\n{line(text=['a'])}", {}, "text is an array", "a.jsonl:2", "quotes"),
    ("a.jsonl", line(text=""), {}, "the text is empty", "a.jsonl:1", "delete the row"),
]  # fmt: skip


@pytest.mark.parametrize("case", FILES, ids=lambda c: f"{c[0]}: {c[3]}")
def test_files(write, case: tuple[str, str | bytes, dict[str, Any], str, str, str]) -> None:
    name, content, keys, what, where, fix = case
    assert_refused(
        Source(**{"source": write(name, content), "format": "text", **keys}), what, where, fix
    )


CALL = {"name": "f", "arguments": {}}
MESSAGES: list[tuple[Any, str, str, str]] = [
    ([], "messages is empty", ":1", "delete the row"),
    ("hi", "messages is not JSON", ":1", "correct the JSON text"),
    ([U, "ho"], "has no `role`", "message 2", '"role"'),
    ([U, {"role": "narrator", "content": "x"}], "unknown role 'narrator'", "message 2", "rename"),
    ([U, {"role": "assistant"}], "has no content", "message 2", '"content"'),
    ([{"role": "user", "content": [{"type": "video", "video": "x"}]}, A], "parts of type 'video'", "message 1", "delete the row"),
    ([U], "no assistant turn", ":1", "columns:"),
    ([U, A, U], "does not end with an answer", ":1", "last messages"),
    ([A, U, A], "without a question", "message 1", "fix the row"),
    ([U, {"role": "assistant", "tool_calls": [{"function": {}}]}], "no name", "message 2", '"name"'),
    ([U, {"role": "assistant", "tool_calls": [{**CALL, "arguments": "{a: 1}"}]}], "arguments is not JSON", ":1", "correct the JSON text"),
    ([U, {"role": "assistant", "tool_calls": [{**CALL, "arguments": [1]}]}], "not an object", "message 2", '{"a": 1}'),
    ([U, {**A, "loss_weight": 0.5}], "loss_weight: 0.5", "message 2", "remove loss_weight"),
]  # fmt: skip


H, G = {"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}
CONVERSATIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"conversations": [U]}, "no `from` and `value`", '"from"'),
    ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown role 'alien'", "rename"),
    ({"conversations": [H, {"from": "function_call", "value": "f()"}]}, "not JSON", "correct the JSON text"),
    ({"conversations": [H, G], "tools": ["add"]}, "tool 1 has no name", "parameters"),
    ({"conversations": [H], "chosen": G}, "no assistant turn", "columns:"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "row", "what", "where", "fix"),
    [("messages", {"messages": row}, *rest) for row, *rest in MESSAGES]
    + [("sharegpt", row, what, "a.jsonl:1", fix) for row, what, fix in CONVERSATIONS],
)
def test_chats(write, form: Any, row: dict[str, Any], what: str, where: str, fix: str) -> None:
    assert_refused(Source(source=write("a.jsonl", line(**row)), format=form), what, where, fix)


def test_a_missing_file_names_the_nearest(tmp_path: Path, write: Callable[..., str]) -> None:
    write("alpaca.jsonl", GOOD)
    for missing, fix in (("alpacca.jsonl", "alpaca.jsonl?"), ("no/a.jsonl", f"`ls {tmp_path}`")):
        assert_refused(Source(source=str(tmp_path / missing)), "no such file", missing, fix)


def test_a_folder_that_cannot_be_read_as_one_set(tmp_path: Path, write: Callable[..., str]) -> None:
    source = Source(source=str(tmp_path), format="text")
    assert_refused(source, "no data file", str(tmp_path), ".jsonl")
    write("rows.jsonl", GOOD)
    write("more.csv", "text\na\n")
    assert_refused(source, "different kinds", str(tmp_path), f'source: "{tmp_path}/**/*.csv"')


def test_what_is_no_file_is_named_and_not_opened(tmp_path: Path) -> None:
    """Also in a folder: to open a pipe would wait for ever."""
    path = tmp_path / "b.txt"
    path.with_stem("a").write_text(GOOD)
    os.mkfifo(path)
    for source in (path, tmp_path):
        with refuses(DataError, where=str(path)):
            read_rows(Source(source=str(source)))


def test_a_huge_row(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 1 << 20)
    source = Source(
        source=write("a.jsonl", f"{GOOD}\n{line(text='x' * (3 << 20))}\n"), format="text"
    )
    assert_refused(source, "the row has 3 MiB", "a.jsonl:2", "one row per line")


def test_hub_dataset_that_is_not_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline by the tests' own setting, so nothing is asked of the network."""
    monkeypatch.setattr(socket.socket, "connect", None)
    source = Source(source="nobody/no-such-rows")
    assert_refused(source, "not in the Hub cache", source.source, "unset HF_HUB_OFFLINE")


def test_columns_of_parquet_are_named_as_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    source = Source(source=str(path), format="text")
    pq.write_table(pa.table({"text": [datetime.datetime(2026, 1, 31)]}), path)
    assert_refused(source, "a date with a time, not a text", "row 1", "as text")
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, path)
    assert_refused(source, "several columns named text", "a.parquet", "unique")


# A text, an encoding that has to be found out, and a kind of file.
ENCODED = [
    ("\u201cquoted\u201d costs 5 \u20ac", "cp1252", ".csv"),
    ("Où est l'hôtel ? À côté de l'église, près de la forêt.", "utf-16-le", ".jsonl"),
    ("Äpfel, Öl und Übermut größer als früher", "latin-1", ".jsonl"),
    ("如何更改我的付款方式？打开设置，然后选择账单。", "utf-32", ".txt"),
]


@pytest.mark.skipif(shutil.which("iconv") is None, reason="there is no iconv")
@pytest.mark.parametrize(("text", "encoding", "suffix"), ENCODED)
def test_a_file_in_another_encoding_is_converted_by_the_command_that_is_named(
    tmp_path: Path, text: str, encoding: str, suffix: str
) -> None:
    row = json.dumps({"text": text}, ensure_ascii=False)
    contents = {".csv": f'text\n"{text}"\n', ".txt": text, ".jsonl": row}
    (tmp_path / f"a{suffix}").write_bytes(contents[suffix].encode(encoding))
    with refuses(DataError, names=["UTF-8"]) as refused:
        read_rows(Source(source=str(tmp_path / f"a{suffix}"), format="text"))[0]
    subprocess.run(["sh", "-c", refused.value.fix], check=True, cwd=tmp_path)
    assert read_rows(Source(source=f"{tmp_path}/fixed{suffix}", format="text"))[0] == {"text": text}
