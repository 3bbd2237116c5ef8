"""Readers of files: in any order each row is that of the file, with its place, in little memory."""

from __future__ import annotations

import csv
import errno
import gc
import hashlib
import json
import os
import random
import sys
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import holds, refuses
from page_cache import resident
from tunesmith.config.schema import Source
from tunesmith.data.source import arrow_files, files
from tunesmith.data.source.files import Table, open_table
from tunesmith.data.source.open_source import Rows, from_list, is_local, read_rows, select_rows
from tunesmith.data.source.table import file_digest, read_span, version_of
from tunesmith.errors import DataError

Texts = list[str]


def jsonl(path: Path, texts: Texts) -> list[str]:
    """The places of its rows."""
    lines, places = [], []
    for i, text in enumerate(texts):
        lines += [" \t"] * (i % 3 == 2)
        lines.append(json.dumps({"text": text}))
        places.append(f"{path}:{len(lines)}")
    path.write_text("\n".join(lines))
    return places


def array(path: Path, texts: Texts) -> list[str]:
    path.write_text(json.dumps([{"text": text} for text in texts], indent=2))
    return [f"{path} row {i + 1}" for i in range(len(texts))]


def csv_lines(path: Path, texts: Texts) -> list[str]:
    places = []
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text"])
        line = 2
        for text in texts:
            writer.writerow([text])
            places.append(f"{path}:{line}")
            line += 1 + text.count("\n")
    return places


def parquet(path: Path, texts: Texts) -> list[str]:
    pq.write_table(pa.table({"text": texts}), path, row_group_size=70, compression="none")
    return [f"{path} row {i + 1}" for i in range(len(texts))]


def arrow(path: Path, texts: Texts) -> list[str]:
    table = pa.table({"text": texts})
    new = pa.ipc.new_file if path.name.startswith("file") else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as out:
        out.write_table(table, max_chunksize=33)
    return [f"{path} row {i + 1}" for i in range(len(texts))]


STREAMED: dict[str, Callable[[Path, Texts], list[str]]] = {
    "a.jsonl": jsonl,
    "a.csv": csv_lines,
    "a.parquet": parquet,
    "file.arrow": arrow,
    "stream.arrow": arrow,
}
KINDS = {**STREAMED, "a.json": array, "lines.json": jsonl, "a.ndjson": jsonl}


@pytest.mark.parametrize("name", KINDS)
def test_rows_in_any_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "READ_BYTES", 97)
    monkeypatch.setattr(arrow_files, "BLOCK_ROWS", 32)
    path = tmp_path / name
    texts = [f"row {i}{', ä' * (i % 9)}" + '\n"more"' * (i % 4 == 3) for i in range(300)]
    places = KINDS[name](path, texts)
    rows = read_rows(Source(source=str(path)))
    order = list(range(300))
    random.Random(0).shuffle(order)
    for i in [*range(300), *order, 0, 299, 298, 0]:
        assert rows[i] == {"text": texts[i]}
        assert rows.where(i) == places[i]
    # The digest is of the content and the selection; the name and the place do not enter.
    (tmp_path / "other").mkdir()
    KINDS[name](tmp_path / "other" / name, texts)
    assert read_rows(Source(source=str(tmp_path / "other" / name))).digest() == rows.digest()
    assert read_rows(Source(source=str(path), split="train[1:]")).digest() != rows.digest()


@settings(max_examples=30)
@given(
    lines=st.lists(st.text('a\u00e4 \t\r,"', max_size=5), max_size=200),
    ends=st.booleans(),
    mark=st.booleans(),
)
def test_lines_are_those_of_an_editor(
    lines: list[str], ends: bool, mark: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    content = "\n".join(json.dumps(line) if line.strip() else line for line in lines)
    path.write_bytes(b"\xef\xbb\xbf" * mark + content.encode() + b"\n" * ends)
    expected = [(f"{path}:{i + 1}", line) for i, line in enumerate(lines) if line.strip()]
    if not expected:
        # A file of no bytes is an error.
        assert not path.stat().st_size or not len(open_table(path))
        return
    for read_bytes in (3, files.READ_BYTES):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "READ_BYTES", read_bytes)
            table = open_table(path)
            assert [(table.where(i), table.row(i)) for i in range(len(table))] == expected


# --- CSV


@pytest.mark.parametrize(
    ("text", "layout", "rows"),
    [
        (
            '\ufeffFrage;Preis\r\nWas?;1,50\r\n"a;b\nc";"sagt ""ja"""\r\n',
            "semicolons",
            [["Frage", "Preis"], ["Was?", "1,50"], ["a;b\nc", 'sagt "ja"']],
        ),
        ("Frage\tPreis\nx, y;z\t1|2\n", "tabs", [["Frage", "Preis"], ["x, y;z", "1|2"]]),
        ("Frage|Preis\nx;y\t|1\n", "bars", [["Frage", "Preis"], ["x;y\t", "1"]]),
        ("Frage,Preis\na;b,c\n", "", [["Frage", "Preis"], ["a;b", "c"]]),
        # A name may have another mark.
        ('"Frage, kurz";Preis\nWas;1\n', "semicolons", [["Frage, kurz", "Preis"], ["Was", "1"]]),
        ("Frage, kurz;Preis\nWas;1\n", "semicolons", [["Frage, kurz", "Preis"], ["Was", "1"]]),
        ('Frage,"Preis; brutto"\nWas,1\n', "", [["Frage", "Preis; brutto"], ["Was", "1"]]),
    ],
)
def test_the_header_of_a_csv_shows_its_separator(
    write: Any, text: str, layout: str, rows: list[list[str]]
) -> None:
    table = read_rows(Source(source=write("a.csv", text)))
    assert (layout in table.layout, bool(table.layout)) == (True, bool(layout))
    assert [list(table[0]), *[list(row.values()) for row in table]] == rows


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("q;a\nx;y;z\n", 2),  # a row of three under a header of two
        ('"q;a"\nx;y\n', 2),  # one name with a mark in it
        ('q;a\nx;y\n"x";"y\n', 3),  # a quote without its end, in the row where it opens
        ("q\ta\n" + "x\ty\n" * 30 + "x\ty\tz\n", 32),  # it fits the first rows
        ("q,a;b\nx,y\nx,y,z\n", 3),
    ],
)
def test_a_csv_whose_separator_is_unclear_is_refused(write: Any, text: str, line: int) -> None:
    name = write("a.csv", text)
    with refuses(DataError, where=f"{name}:{line}") as refused:
        list(read_rows(Source(source=name)))
    assert "\t" not in refused.value.text()


def test_csv_rows_that_do_not_fit_the_header_leave_its_row_numbers_alone(write: Any) -> None:
    rows = read_rows(Source(source=write("a.csv", ",a\n0,x\nmore\n1,y\n")))
    assert [rows[0], rows[2]] == [{"a": "x"}, {"a": "y"}]
    with refuses(DataError, where="a.csv:3", names=[1, 2]):
        rows[1]


def test_unlike_tool_arguments_survive(write: Any) -> None:
    """Arrow would give each row the other's keys; JSON rows keep theirs, and Parquet's nulls are
    taken out again.
    """
    rows = [{"arguments": {"city": "Rome"}}, {"arguments": {"x": None, "y": [1, {"z": 2}]}}]
    text = "\n".join(map(json.dumps, rows))
    assert list(read_rows(Source(source=write("a.jsonl", text)))) == rows
    path = Path(write("a.parquet", b""))
    calls = [{"call": {"a": 1}}, {"call": {"b": "two"}}]
    pq.write_table(pa.Table.from_pylist(calls), path)
    assert list(read_rows(Source(source=str(path)))) == calls


# --- splits and sources

bound = st.none() | st.integers(-130, 130)


@settings(max_examples=50)
@given(n=st.integers(1, 120), start=bound, stop=bound, percent=st.booleans())
def test_slices_are_those_of_datasets(
    n: int, start: int | None, stop: int | None, percent: bool
) -> None:
    if percent and any(b is not None and abs(b) > 100 for b in (start, stop)):
        return
    unit = "%" if percent else ""
    first, last = ("" if b is None else f"{b}{unit}" for b in (start, stop))
    spec = f"train[{first}:{last}]"
    [theirs] = datasets.ReadInstruction.from_spec(spec).to_absolute({"train": n})
    table = Table(n, int, str, str)
    expected = list(range(theirs.from_, theirs.to))
    if expected:
        rows = select_rows({"train": table}, spec, where="x")
        assert [rows.where(i) for i in range(len(rows))] == list(map(str, expected))
    else:
        with refuses(DataError, where="x", names=[spec]):
            select_rows({"train": table}, spec, where="x")


def test_splits_that_meet_share_no_row_and_lose_none(write: Any) -> None:
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
    local = ("here", "a.jsonl", "./a", "/a/b", "~/x", "a/b/c", "data/rows.parquet")
    assert all(map(is_local, local))
    assert not any(map(is_local, ("tatsu-lab/alpaca", "squad")))


def test_rows_made_by_a_program() -> None:
    rows = from_list([{"text": "a"}, {"text": "b"}], "questions")
    assert (len(rows), rows[1], rows.where(1)) == (2, {"text": "b"}, "questions row 2")


def test_hub_rows_are_named_by_split_and_row(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = datasets.DatasetDict(
        train=datasets.Dataset.from_list([{"text": f"row {i}"} for i in range(10)]),
        test=datasets.Dataset.from_list([{"text": "held out"}]),
    )
    asked = []

    def load_dataset(*args: object, **keys: object) -> datasets.DatasetDict:
        asked.append((args, keys))
        return loaded

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    def read(**keys: str) -> Rows:
        return read_rows(Source(source="me/rows", **keys))  # type: ignore[arg-type]

    rows = read(name="main", revision="v1", split="train[50%:]")
    assert (len(rows), rows[0]["text"]) == (5, "row 5")
    assert holds(rows.where(0), "me/rows", "train", 6)
    assert asked == [(("me/rows", "main"), {"revision": "v1"})]
    assert rows.digest() == read(split="train[50%:]").digest()
    assert read(split="test")[0] == {"text": "held out"}
    assert len(read()) == 11  # all rows of all splits, with a warning


# --- memory, open files and pages


@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMED)
def test_memory_does_not_grow_with_the_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    KINDS[name](path, [f"{i} {'x' * 1000}" for i in range(8000)])
    tracemalloc.start()
    table = open_table(path)
    for i in range(0, len(table), 7):
        table.row(i)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 6 << 20
    assert peak < 3 << 20


def test_a_file_without_line_breaks_is_not_read_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{' ' * 5000}\n" + '{"text": "a"}' * 100_000)
    monkeypatch.setattr(files, "READ_BYTES", 1 << 10)
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 1 << 16)
    tracemalloc.start()
    table = open_table(path)
    with refuses(DataError, where=f"{path}:2"):
        table.row(0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(table) == 1
    assert peak < 200_000


def test_a_json_array_that_memory_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    rows = [{"text": f"{i}"} for i in range(100)]
    path.write_text(json.dumps(rows))
    monkeypatch.setattr(files, "available_memory", lambda: 1000)
    with refuses(DataError, where=str(path), fix=["--stream", "a.jsonl"]):
        open_table(path)
    # Lines are no array, also where the first has more than is read at once.
    rows[0] = {"text": "x" * (files.READ_BYTES + 1)}
    path.write_text("\ufeff\n \n" + "".join(json.dumps(row) + "\n" for row in rows))
    assert [open_table(path).row(i) for i in (0, 99)] == [rows[0], rows[99]]


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_one_file_of_a_folder_is_open_and_in_memory(name: str, tmp_path: Path) -> None:
    def groups() -> int:
        return sum(isinstance(o, arrow_files._OpenGroup) for o in gc.get_objects())

    tables = []
    for n in range(12):
        KINDS[name](tmp_path / f"file{n}-{name}", [f"{n} {i}" for i in range(300)])
        tables.append(open_table(tmp_path / f"file{n}-{name}"))
    # Rows of the start of each file, of its middle, and of its start again.
    for i in (0, 150, 3):
        for n, table in enumerate(tables):
            assert table.row(i) == {"text": f"{n} {i}"}
        opened = [os.path.realpath(link) for link in Path("/proc/self/fd").glob("*")]
        assert sum(file.startswith(str(tmp_path)) for file in opened) <= 1
    assert groups() <= 1
    del tables, table
    gc.collect()
    assert groups() == 0


@pytest.mark.slow
def test_threads_read_more_files_than_are_open(tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.txt" for n in range(40)]
    for n, path in enumerate(paths):
        path.write_text(f"{n:8}" * 1000)
    versions = [version_of(path) for path in paths]

    def wrong_reads(seed: int) -> list[int]:
        numbers = random.Random(seed).choices(range(40), k=300)
        return [
            n for n in numbers if read_span(paths[n], versions[n], 800, 808) != f"{n:8}".encode()
        ]

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(wrong_reads, range(8))) == [[]] * 8


def test_a_forked_process_opens_the_file_itself(tmp_path: Path) -> None:
    """Its parent's number of it can be another file's by then, as where a run is detached."""
    path, other = tmp_path / "rows.txt", tmp_path / "other.txt"
    path.write_text("right")
    other.write_text("wrong")
    version = version_of(path)
    read_span(path, version, 0, 5)
    child = os.fork()
    if child == 0:
        os.closerange(3, 256)
        while os.open(other, os.O_RDONLY) < 100:
            pass
        os._exit(read_span(path, version, 0, 5) != b"right")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


needs_page_cache = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux can be told to drop pages"
)


def written_to_disk(path: Path, pages: int) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    path.read_bytes()
    if resident(path) < pages:
        pytest.skip("this file system does not cache")


@needs_page_cache
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_no_file_that_was_read_stays_in_the_page_cache(name: str, tmp_path: Path) -> None:
    file, texts = tmp_path / name, [f"{i} " * 200 for i in range(1000)]
    KINDS[name](file, texts)
    written_to_disk(file, 100)
    table = open_table(file)
    assert [table.row(i)["text"] for i in range(1000)] == texts
    assert len(table.fingerprint()) == 64
    del table
    assert resident(file) == 0


# --- files that change or are damaged


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_is_cut_while_it_is_read_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    KINDS[name](path, [f"row {i} {'x' * 90}" for i in range(3000)])
    rows = read_rows(Source(source=str(path)))
    path.write_bytes(path.read_bytes()[:5000])
    with refuses(DataError, where=str(path)):
        for i in range(3000):
            rows[i]
        rows.check_unchanged()


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_a_file_that_the_disk_no_longer_gives_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_text('{"text": "a"}\n' if name == "a.jsonl" else "text\na\n")
    table = open_table(path)

    def fails(*args: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fails)
    with refuses(DataError, where=str(path), names=[os.strerror(errno.EIO)]):
        table.row(0)


def test_no_row_is_given_under_another_number_behind_a_damaged_page(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"row {i}" for i in range(600)]})
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False}
    pq.write_table(table, path, **options, data_page_size=1000, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    # The length of a text in the second block of rows.
    at = data.index(b"row 400") - 4
    data[at : at + 4] = b"\xff\xff\xff\x7f"
    path.write_bytes(data)
    opened = open_table(path)
    read = {}
    for i in (0, *range(250, 600, 50), 0, 599, 10):
        with suppress(DataError):
            read[i] = opened.row(i)
    assert {0, 10} <= read.keys()
    assert read == {i: {"text": f"row {i}"} for i in read}
    with refuses(DataError, where=str(path)):
        opened.row(400)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("what", ["text", "time"])
def test_values_that_python_does_not_have_are_an_error(
    what: str, suffix: str, tmp_path: Path
) -> None:
    column = pa.array([b"good", b"caf\xe9"]).view(pa.string())
    if what == "time":
        column = pa.array([0, 2**62]).view(pa.timestamp("us"))
    path, table = tmp_path / f"a.{suffix}", pa.table({"text": column})
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
            out.write_table(table)
    with refuses(DataError, where=str(path)):
        open_table(path).row(1)


def test_a_file_is_hashed_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []
    digest_of = hashlib.file_digest

    def counted(file: Any, name: str) -> Any:
        hashed.append(file.name)
        return digest_of(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    digests = {open_table(path).fingerprint() for _ in range(3)}
    assert len(hashed) == 1
    path.write_text('{"text": "b"}\n')
    os.utime(path, ns=(0, 1))
    digests |= {open_table(path).fingerprint() for _ in range(3)}
    assert (len(hashed), len(digests)) == (2, 2)
    path.unlink()
    with refuses(DataError, where=str(path)):
        file_digest(path)
