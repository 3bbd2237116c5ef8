"""Splits by the rounding of `datasets`, files of every kind, rows named by their place."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import holds, refuses
from page_cache import resident
from tunesmith.config.schema import Source
from tunesmith.data.source.files import Table, open_table
from tunesmith.data.source.open_source import from_list, is_local, read_rows, select_rows
from tunesmith.errors import DataError

ROWS = [{"text": f"row {i}"} for i in range(10)]


def parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


def arrow_stream(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)


def arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
        out.write_table(table)


def comma(path: Path) -> None:
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, ["text"])
        out.writeheader()
        out.writerows(ROWS)


def lines(path: Path) -> None:
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n")


def array(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=2))


@pytest.mark.parametrize(
    ("name", "make", "where"),
    [
        ("a.json", array, "a.json row 3"),
        ("a.json", lines, "a.json:5"),  # a blank line stands after each row
        ("a.jsonl", lines, "a.jsonl:5"),
        ("a.ndjson", lines, "a.ndjson:5"),
        ("a.csv", comma, "a.csv:4"),
        ("a.parquet", parquet, "a.parquet row 3"),
        ("a.arrow", arrow_stream, "a.arrow row 3"),
        ("a.arrow", arrow_file, "a.arrow row 3"),
    ],
)
def test_kinds_of_files(tmp_path: Path, name: str, make, where: str) -> None:
    make(tmp_path / name)
    rows = read_rows(Source(source=str(tmp_path / name)))
    assert list(rows) == ROWS
    assert rows.where(2) == f"{tmp_path}/{where}"
    # The digest is of the content and the selection; the name and the place do not enter.
    (tmp_path / "other").mkdir()
    make(tmp_path / "other" / name)
    assert read_rows(Source(source=str(tmp_path / "other" / name))).digest() == rows.digest()
    assert (
        read_rows(Source(source=str(tmp_path / name), split="train[1:]")).digest() != rows.digest()
    )


@pytest.mark.parametrize(
    ("text", "layout", "rows"),
    [
        (
            '\ufeffFrage;Preis\r\nWas?;1,50\r\n"a;b\nc";"sagt ""ja"""\r\n',
            "semicolons",
            [("Was?", "1,50"), ("a;b\nc", 'sagt "ja"')],
        ),
        ("Frage\tPreis\nx, y;z\t1|2\n", "tabs", [("x, y;z", "1|2")]),
        ("Frage|Preis\nx;y\t|1\n", "vertical bars", [("x;y\t", "1")]),
        ("Frage,Preis\na;b,c\n", "", [("a;b", "c")]),
    ],
)
def test_the_header_of_a_csv_shows_its_separator(
    write, text: str, layout: str, rows: list[tuple[str, str]]
) -> None:
    table = read_rows(Source(source=write("a.csv", text)))
    assert (layout in table.layout, bool(table.layout)) == (True, bool(layout))
    assert [tuple(table[i].values()) for i in range(len(table))] == rows
    assert list(table[0]) == ["Frage", "Preis"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("q;a\nx;y;z\n", 2),  # a row of three under a header of two
        ('"q;a"\nx;y\n', 2),  # one name with a mark in it
        ('q;a\nx;y\n"x";"y\n', 3),  # a quote without its end, in the row where it opens
        ("q;a\n" + "x;y\n" * 30 + "x;y;z\n", 32),  # it fits the first rows
    ],
)
def test_a_csv_whose_separator_is_unclear_is_refused(write, text: str, line: int) -> None:
    name = write("a.csv", text)
    with refuses(DataError, where=f"{name}:{line}"):
        list(read_rows(Source(source=name)))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('"Frage, kurz";Preis\nWas;1\n', ["Frage, kurz", "Preis"]),
        ("Frage, kurz;Preis\nWas;1\n", ["Frage, kurz", "Preis"]),
        ('Frage,"Preis; brutto"\nWas,1\n', ["Frage", "Preis; brutto"]),
    ],
)
def test_a_name_of_the_header_may_have_another_mark(write, text: str, names: list[str]) -> None:
    table = read_rows(Source(source=write("a.csv", text)))
    assert table[0] == dict(zip(names, ("Was", "1"), strict=True))


def test_csv_of_commas_with_a_broken_row_is_not_split_at_another_mark(write) -> None:
    name = write("a.csv", "q,a;b\nx,y\nx,y,z\n")
    with refuses(DataError, where=f"{name}:3"):
        list(read_rows(Source(source=name)))


def test_an_error_shows_no_tab(write) -> None:
    name = write("a.csv", "q\ta\n" + "x\ty\n" * 30 + "x\ty\tz\n")
    with refuses(DataError, where=f"{name}:32") as raised:
        list(read_rows(Source(source=name)))
    assert "\t" not in raised.value.text()


def test_csv_rows_that_do_not_fit_the_header_leave_its_row_numbers_alone(write) -> None:
    rows = read_rows(Source(source=write("a.csv", ",a\n0,x\nmore\n1,y\n")))
    assert [rows[0], rows[2]] == [{"a": "x"}, {"a": "y"}]
    with refuses(DataError, where="a.csv:3", names=[1, 2]):
        rows[1]


def test_csv_names_the_line_where_a_row_begins(write) -> None:
    rows = read_rows(Source(source=write("a.csv", 'a,b\n1,"two\nlines"\n3,4\n')))
    assert list(rows) == [{"a": "1", "b": "two\nlines"}, {"a": "3", "b": "4"}]
    assert [rows.where(i).rpartition(":")[2] for i in (0, 1)] == ["2", "4"]


def test_byte_order_mark_and_crlf(write) -> None:
    for name, text in (
        ("a.jsonl", '{"a": 1}\r\n{"a": 2}\r\n'),
        ("a.csv", "a\r\n1\r\n2\r\n"),
        ("a.json", '[{"a": 1}]'),
    ):
        rows = read_rows(Source(source=write(name, b"\xef\xbb\xbf" + text.encode())))
        assert int(rows[0]["a"]) == 1


def test_unlike_tool_arguments_survive(write) -> None:
    """Arrow would give each row the other's keys; JSON rows keep theirs, and Parquet's nulls are
    taken out again.
    """
    rows = [{"arguments": {"city": "Rome"}}, {"arguments": {"x": None, "y": [1, {"z": 2}]}}]
    assert (
        list(read_rows(Source(source=write("a.jsonl", "\n".join(map(json.dumps, rows)))))) == rows
    )
    path = Path(write("a.parquet", b""))
    pq.write_table(pa.Table.from_pylist([{"call": {"a": 1}}, {"call": {"b": "two"}}]), path)
    assert list(read_rows(Source(source=str(path)))) == [{"call": {"a": 1}}, {"call": {"b": "two"}}]


bound = st.one_of(st.none(), st.integers(-130, 130))


@pytest.mark.slow
@settings(max_examples=150)
@given(n=st.integers(1, 120), start=bound, stop=bound, percent=st.booleans())
def test_slices_are_those_of_datasets(
    n: int, start: int | None, stop: int | None, percent: bool
) -> None:
    if percent and any(b is not None and abs(b) > 100 for b in (start, stop)):
        return
    unit = "%" if percent and (start is not None or stop is not None) else ""
    spec = f"train[{'' if start is None else f'{start}{unit}'}:{'' if stop is None else f'{stop}{unit}'}]"
    [theirs] = datasets.ReadInstruction.from_spec(spec).to_absolute({"train": n})
    table = Table(n, int, str, str)
    expected = list(range(theirs.from_, theirs.to))
    if expected:
        rows = select_rows({"train": table}, spec, where="x")
        assert [rows.where(i) for i in range(len(rows))] == list(map(str, expected))
    else:
        with refuses(DataError, where="x", names=[spec]):
            select_rows({"train": table}, spec, where="x")


def test_splits_that_meet_share_no_row_and_lose_none(write) -> None:
    name = write("a.jsonl", "".join(f'{{"n": {i}}}\n' for i in range(999)))
    parts = [read_rows(Source(source=name, split=s)) for s in ("train[:95%]", "train[95%:]")]
    assert [row["n"] for rows in parts for row in rows] == list(range(999))
    assert [len(rows) for rows in parts] == [949, 50]
    both = read_rows(Source(source=name, split="train[990:]+train[:2]", max_examples=10))
    assert [row["n"] for row in both] == [*range(990, 999), 0]
    assert both.where(9).endswith("a.jsonl:1")


def test_what_counts_as_a_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").write_text("")
    assert all(
        is_local(name)
        for name in ("here", "a.jsonl", "./a", "/a/b", "~/x", "a/b/c", "data/rows.parquet")
    )
    assert not any(is_local(name) for name in ("tatsu-lab/alpaca", "squad"))


def test_rows_made_by_a_program() -> None:
    rows = from_list([{"text": "a"}, {"text": "b"}], "questions")
    assert (len(rows), rows[1], rows.where(1)) == (2, {"text": "b"}, "questions row 2")


def test_hub_rows_are_named_by_split_and_row(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS),
        test=datasets.Dataset.from_list([{"text": "held out"}]),
    )
    asked = []

    def load_dataset(*args: object, **keys: object) -> datasets.DatasetDict:
        asked.append((args, keys))
        return loaded

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows(Source(source="me/rows", name="main", revision="v1", split="train[50%:]"))
    assert (len(rows), rows[0]["text"]) == (5, "row 5")
    assert holds(rows.where(0), "me/rows", "train", 6)
    assert asked == [(("me/rows", "main"), {"revision": "v1"})]
    assert rows.digest() == read_rows(Source(source="me/rows", split="train[50%:]")).digest()
    assert read_rows(Source(source="me/rows", split="test"))[0] == {"text": "held out"}
    assert len(read_rows(Source(source="me/rows"))) == 11  # all rows of all splits, with a warning


CUT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import byte_tokenizer
from tunesmith.config.schema import Data, Source
from tunesmith.data.source.open_source import read_rows
from tunesmith.data.text.select_template import select_template
from tunesmith.data.tokens.tokenize import tokenize
from tunesmith.errors import DataError
tokenizer, told = byte_tokenizer(), []
for name in sys.argv[1:]:
    source = Source(source=name, format="text")
    data = Data(train=(source,), seq_len=64)
    rows = read_rows(source)
    Path(name).write_bytes(Path(name).read_bytes()[:5000])
    try:
        tokenize([(source, rows)], data, select_template(data, tokenizer, {{1}}), cache=None, what="train")
    except DataError as error:
        told.append(f"{{error.what}}: {{error.where}}")
print(chr(10).join(told))
"""


@pytest.mark.slow
def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path: Path) -> None:
    """In a process of its own: a file that was mapped killed it without a word (SIGBUS)."""
    import pyarrow.csv as pc

    table = pa.table({"text": [f"row {i} {'x' * 90}" for i in range(3000)]})
    names = [str(tmp_path / f"rows.{kind}") for kind in ("jsonl", "json", "csv", "parquet")]
    Path(names[0]).write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    Path(names[1]).write_text(json.dumps(table.to_pylist()))
    pc.write_csv(table, names[2])
    pq.write_table(table, names[3], compression="none")
    for kind, new in (("file", pa.ipc.new_file), ("stream", pa.ipc.new_stream)):
        names.append(str(tmp_path / f"{kind}.arrow"))
        with new(names[-1], table.schema) as writer:
            writer.write_table(table, max_chunksize=500)
    code = CUT.format(tests=str(Path(__file__).parents[1]))
    ended = subprocess.run(
        [sys.executable, "-c", code, *names], check=False, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        f"the file was changed while it was read: {name}" for name in names
    ]


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux can be told to drop pages"
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_no_file_that_was_read_stays_in_the_page_cache(name: str, tmp_path: Path) -> None:
    file, rows = tmp_path / name, [{"text": f"{i} " * 200} for i in range(2000)]
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), file, compression="none", use_dictionary=False)
    elif name == "a.csv":
        file.write_text("text,more\n" + "".join(f"{row['text']},1\n" for row in rows))
    else:
        whole = "".join(json.dumps(row) + "\n" for row in rows)
        file.write_text(json.dumps(rows) if name == "a.json" else whole)
    with file.open("rb+") as written:
        os.fsync(written.fileno())
    file.read_bytes()
    if resident(file) < 200:
        pytest.skip("this file system does not cache")
    table = open_table(file)
    assert [table.row(i)["text"] for i in range(2000)] == [row["text"] for row in rows]
    assert len(table.fingerprint()) == 64
    del table
    assert resident(file) == 0


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux can be told to drop pages"
)
def test_of_many_files_those_read_last_stay_in_the_page_cache(tmp_path: Path) -> None:
    """Rows are read again in any order, so what is dropped at each read is read from the disk."""
    paths = [tmp_path / f"{n}.{kind}" for n in range(9) for kind in ("txt", "jsonl", "csv")]
    for path in paths:
        row = "word " * 4000
        path.write_text(json.dumps({"text": row}) if path.suffix == ".jsonl" else f"text\n{row}\n")
        with path.open("rb+") as written:
            os.fsync(written.fileno())
        if resident(path) < 4:
            pytest.skip("this file system does not cache")
    for table in [open_table(path) for path in paths]:
        table.row(0)
    assert [resident(path) > 0 for path in paths] == [False] * 11 + [True] * 16
