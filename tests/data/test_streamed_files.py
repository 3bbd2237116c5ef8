"""Readers that hold few rows: in any order each row is that of the file, with its place."""

from __future__ import annotations

import csv
import errno
import gc
import hashlib
import json
import os
import random
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import refuses
from rows import Simple
from tunesmith.config.schema import Data, Source
from tunesmith.data.source import arrow_files, files
from tunesmith.data.source.files import open_table
from tunesmith.data.source.open_source import read_rows
from tunesmith.data.source.table import file_digest, read_span, version_of
from tunesmith.data.tokens.tokenize import tokenize
from tunesmith.errors import DataError

Texts = list[str]


def jsonl(path: Path, texts: Texts) -> list[str]:
    """The places of its rows."""
    lines = []
    places = []
    for i, text in enumerate(texts):
        lines += [" \t"] * (i % 3 == 2)
        lines.append(json.dumps({"text": text}))
        places.append(f"{path}:{len(lines)}")
    path.write_text("\n".join(lines))
    return places


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
    pq.write_table(pa.table({"text": texts}), path, row_group_size=70)
    return [f"{path} row {i + 1}" for i in range(len(texts))]


def arrow_file(path: Path, texts: Texts) -> list[str]:
    table = pa.table({"text": texts})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
        out.write_table(table, max_chunksize=33)
    return [f"{path} row {i + 1}" for i in range(len(texts))]


def arrow_stream(path: Path, texts: Texts) -> list[str]:
    table = pa.table({"text": texts})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table, max_chunksize=33)
    return [f"{path} row {i + 1}" for i in range(len(texts))]


KINDS: dict[str, Callable[[Path, Texts], list[str]]] = {
    "a.jsonl": jsonl,
    "a.csv": csv_lines,
    "a.parquet": parquet,
    "file.arrow": arrow_file,
    "stream.arrow": arrow_stream,
}


@pytest.mark.parametrize("name", KINDS)
def test_rows_in_any_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "READ_BYTES", 97)
    monkeypatch.setattr(arrow_files, "BLOCK_ROWS", 32)
    path = tmp_path / name
    texts = [f"row {i}{', ä' * (i % 9)}" + '\n"more"' * (i % 4 == 3) for i in range(300)]
    places = KINDS[name](path, texts)
    table = open_table(path)
    order = list(range(300))
    random.Random(0).shuffle(order)
    for i in [*range(300), *order, 0, 299, 298, 0]:
        assert table.row(i) == {"text": texts[i]}
        assert table.where(i) == places[i]


@settings(max_examples=60)
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
    expected = [(i + 1, line) for i, line in enumerate(lines) if line.strip()]
    if not expected:
        # A file of no bytes is an error.
        assert not path.stat().st_size or not len(open_table(path))
        return
    for read_bytes in (3, files.READ_BYTES):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "READ_BYTES", read_bytes)
            table = open_table(path)
            assert [(table.where(i), table.row(i)) for i in range(len(table))] == [
                (f"{path}:{number}", line) for number, line in expected
            ]


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_memory_does_not_grow_with_the_file(name: str, tmp_path: Path) -> None:
    texts = [f"{i} {'x' * 1000}" for i in range(20_000)]
    path = tmp_path / name
    KINDS[name](path, texts)
    size = path.stat().st_size
    del texts
    tracemalloc.start()
    table = open_table(path)
    for i in range(0, len(table), 7):
        table.row(i)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 600_000
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
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert open_table(path).row(99) == rows[99]
    # A first line of more than is read at once.
    rows[0] = {"text": "x" * (files.READ_BYTES + 1)}
    path.write_text("\ufeff\n \n" + "".join(json.dumps(row) + "\n" for row in rows))
    assert open_table(path).row(0) == rows[0]


def test_batches_for_the_tokenizer_end_at_a_size(
    simple: Simple, write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.data.tokens.tokenize._BATCH_CHARACTERS", 100)
    sizes: list[int] = []
    encode_many = simple.encode_many

    def counted(samples: Any, *args: Any, **keys: Any) -> Any:
        sizes.append(sum(len(sample.text) for sample in samples))
        return encode_many(samples, *args, **keys)

    monkeypatch.setattr(simple, "encode_many", counted)
    texts = ["a" * n for n in (40, 40, 40, 300, 5, 95, 1)]
    path = write("a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = Source(source=path, format="text")
    data = Data(train=(source,), seq_len=512)
    tokens = tokenize([(source, read_rows(source))], data, simple, cache=None, what="train")
    assert sizes == [80, 40, 300, 100, 1]
    assert tokens.lengths.tolist() == [len(text) + 1 for text in texts]


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow"])
def test_one_file_of_a_folder_is_open_and_in_memory(name: str, tmp_path: Path) -> None:
    tables = []
    for n in range(40):
        path = tmp_path / f"{n}-{name}"
        KINDS[name](path, [f"{n} {i}" for i in range(300)])
        tables.append(open_table(path))
    # Rows of the start of each file, of its middle, and of its start again.
    for i in (0, 150, 3):
        for n, table in enumerate(tables):
            assert table.row(i) == {"text": f"{n} {i}"}
        opened = [os.path.realpath(link) for link in Path("/proc/self/fd").glob("*")]
        assert sum(file.startswith(str(tmp_path)) for file in opened) <= 1
    groups = [o for o in gc.get_objects() if isinstance(o, arrow_files._OpenGroup)]
    assert len(groups) <= 1


def test_no_group_is_in_memory_that_nobody_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b"]}), path)
    table = open_table(path)
    assert table.row(0) == {"text": "a"}
    del table
    gc.collect()
    assert not [o for o in gc.get_objects() if isinstance(o, arrow_files._OpenGroup)]


def test_threads_read_more_files_than_are_open(tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.txt" for n in range(40)]
    for n, path in enumerate(paths):
        path.write_text(f"{n:8}" * 1000)
    versions = [version_of(path) for path in paths]

    def wrong_reads(seed: int) -> list[int]:
        numbers = random.Random(seed).choices(range(40), k=1500)
        return [
            n for n in numbers if read_span(paths[n], versions[n], 800, 808) != f"{n:8}".encode()
        ]

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(wrong_reads, range(8))) == [[]] * 8


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
    assert opened.row(0) == {"text": "row 0"}
    read = {}
    for i in (*range(250, 600, 50), 0, 599, 10):
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
    path = tmp_path / f"a.{suffix}"
    table = pa.table({"text": column})
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
