"""Which files are a data set; in any order each row is that of its file, in little memory."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from errors import refuses
from page_cache import resident
from recipes import make_run
from tunesmith.config.schema import Source
from tunesmith.errors import DataError
from tunesmith.rows.source import arrow_files, files
from tunesmith.rows.source.files import Table, open_table
from tunesmith.rows.source.open_source import is_local, open_splits, read_rows, select_rows
from tunesmith.rows.source.table import read_span, version_of

Texts = list[str]


def jsonl(path: Path, texts: Texts) -> list[str]:
    """The places of its rows."""
    lines, places = [], []
    for i, text in enumerate(texts):
        lines += [" \t"] * (i % 3 == 2)
        lines.append(json.dumps({"text": text}))
        places.append(f"{path}:{len(lines)}")
    path.write_text("\ufeff" + "\n".join(lines))
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
KINDS = {**STREAMED, "a.json": array, "lines.json": jsonl}


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


# --- CSV


def test_the_header_of_a_csv_shows_its_separator(write: Any) -> None:
    full = '\ufeffFrage;Preis\r\nWas?;1,50\r\n"a;b\nc";"sagt ""ja"""\r\n'
    quoted = [["Frage", "Preis"], ["Was?", "1,50"], ["a;b\nc", 'sagt "ja"']]
    for text, layout, rows in (
        (full, "semicolons", quoted),
        ("Frage\tPreis\nx, y;z\t1|2\n", "tabs", [["Frage", "Preis"], ["x, y;z", "1|2"]]),
        ("Frage,Preis\na;b,c\n", "", [["Frage", "Preis"], ["a;b", "c"]]),
        ("Frage, kurz;Preis\nWas;1\n", "semicolons", [["Frage, kurz", "Preis"], ["Was", "1"]]),
        ('Frage,"Preis; brutto"\nWas,1\n', "", [["Frage", "Preis; brutto"], ["Was", "1"]]),
    ):
        table = read_rows(Source(source=write("a.csv", text)))
        assert (layout in table.layout, bool(table.layout)) == (True, bool(layout))
        assert [list(table[0]), *[list(row.values()) for row in table]] == rows


def test_a_csv_whose_separator_is_unclear_is_refused(write: Any) -> None:
    for text, line in (
        ("q;a\nx;y;z\n", 2),  # a row of three under a header of two
        ('q;a\nx;y\n"x";"y\n', 3),  # a quote without its end, in the row where it opens
        ("q,a;b\nx,y\nx,y,z\n", 3),
    ):
        name = write("a.csv", text)
        with refuses(DataError, where=f"{name}:{line}"):
            list(read_rows(Source(source=name)))


def test_csv_rows_that_do_not_fit_the_header_leave_its_row_numbers_alone(write: Any) -> None:
    rows = read_rows(Source(source=write("a.csv", ",a\n0,x\nmore\n1,y\n")))
    assert [rows[0], rows[2]] == [{"a": "x"}, {"a": "y"}]
    with refuses(DataError, where="a.csv:3", names=[1, 2]):
        rows[1]


def test_unlike_tool_arguments_survive(write: Any) -> None:
    """Arrow would give each row the other's keys."""
    rows = [{"arguments": {"city": "Rome"}}, {"arguments": {"x": None, "y": [1, {"z": 2}]}}]
    text = "\n".join(map(json.dumps, rows))
    assert list(read_rows(Source(source=write("a.jsonl", text)))) == rows
    path = Path(write("a.parquet", b""))
    calls = [{"call": {"a": 1}}, {"call": {"b": "two"}}]
    pq.write_table(pa.Table.from_pylist(calls), path)
    assert list(read_rows(Source(source=str(path)))) == calls


# --- splits and sources


def test_slices_are_those_of_datasets() -> None:
    for n in (1, 7, 120):
        for bounds in (":", "1:", ":-1", "-3:", "50%:", ":33%", "-10%:", "5%:95%"):
            spec = f"train[{bounds}]"
            [theirs] = datasets.ReadInstruction.from_spec(spec).to_absolute({"train": n})
            expected = [str(i) for i in range(theirs.from_, theirs.to)]
            with refuses(DataError, where="x", names=[spec]) if not expected else nullcontext():
                rows = select_rows({"train": Table(n, int, str, str)}, spec, where="x")
                assert [rows.where(i) for i in range(len(rows))] == expected


def test_what_counts_as_a_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").write_text("")
    local = ("here", "a.jsonl", "./a", "/a/b", "~/x", "a/b/c", "data/rows.parquet")
    assert all(map(is_local, local))
    assert not any(map(is_local, ("tatsu-lab/alpaca", "squad")))


def test_a_data_set_in_the_cache_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    rows = "".join(f'{{"text": "row {i}"}}\n' for i in range(10))
    make_files(
        tmp_path / "datasets--me--rows",
        {
            "refs/v1": commit,
            f"snapshots/{commit}/README.md": "---\nconfigs:\n- {config_name: main, data_dir: a}\n"
            "- {config_name: not in the cache, data_dir: b}\n---\n",
            f"snapshots/{commit}/a/train.jsonl": rows,
            f"snapshots/{commit}/a/test.jsonl": rows.partition("\n")[0],
        },
    )
    source = Source(source="me/rows", name="main", revision="v1")
    rows = read_rows(replace(source, split="train[50%:]"))
    assert (len(rows), rows[0]["text"]) == (5, "row 5")
    assert rows.where(0).endswith("a/train.jsonl:6")
    assert len(read_rows(source)) == 11  # all rows of all splits, with a warning


# --- memory and open files


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


def test_a_json_array_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": f"{i}"} for i in range(100)]))
    monkeypatch.setattr(files, "available_memory", lambda: 1000)
    with refuses(DataError, where=str(path), fix=["--stream", "a.jsonl"]):
        open_table(path)


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


# --- files that change or are damaged


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_file_that_is_cut_while_it_is_read_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    KINDS[name](path, [f"row {i} {'x' * 90}" for i in range(3000)])
    rows = read_rows(Source(source=str(path)))
    path.write_bytes(path.read_bytes()[:5000])
    with refuses(DataError, where=str(path)):
        for i in range(3000):
            rows[i]
        rows.check_unchanged()


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


@pytest.mark.parametrize(
    "column",
    [
        pa.array([b"good", b"caf\xe9"]).view(pa.string()),
        pa.array([0, 2**62]).view(pa.timestamp("us")),
    ],
)
def test_values_that_python_does_not_have_are_an_error(column: pa.Array, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column}), path)
    with refuses(DataError, where=str(path)):
        open_table(path).row(1)


# --- which files of a folder, a clone or a pattern are one data set

ROWS = datasets.Dataset.from_list([{"text": f"row {i}"} for i in range(6)])


def make_files(folder: Path, files: Mapping[str, str]) -> str:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return str(folder)


def texts_of(source: Path | str, **keys: str) -> dict[str, list[object]]:
    """The texts of each split of a source."""
    splits = open_splits(Source(source=str(source), **keys))
    return {
        name: [table.row(i)["text"] for i in range(len(table))]  # type: ignore[index]
        for name, table in splits.items()
    }


@pytest.mark.parametrize(
    ("files", "splits", "keys"),
    [
        (["split=train/a", "split=test/a"], {"train": [0], "test": [1]}, {}),
        (["lang=en/Data_Split=dev/a", "lang=en/b"], {"train": [1], "validation": [0]}, {"lang": "en"}),
        (["kind=test/name=caf%C3%A9/a"], {"train": [0]}, {"kind": "test", "name": "café"}),
        (["day=__HIVE_DEFAULT_PARTITION__/a"], {"train": [0]}, {"day": None}),
        (["text=no/a"], {"train": [0]}, {}),
    ],
)  # fmt: skip
def test_folders_with_keys(
    files: list[str], splits: dict[str, list[int]], keys: dict[str, object], tmp_path: Path
) -> None:
    make_files(
        tmp_path, {f"{name}.jsonl": json.dumps({"text": str(n)}) for n, name in enumerate(files)}
    )
    for source in (tmp_path, tmp_path / "**" / "*.jsonl"):
        tables = open_splits(Source(source=str(source)))
        read = {name: [table.row(i) for i in range(len(table))] for name, table in tables.items()}
        assert read == {name: [{**keys, "text": str(n)} for n in ns] for name, ns in splits.items()}


def test_a_saved_data_set_has_the_rows_of_its_state(tmp_path: Path) -> None:
    """Rows that `map` cached next to it are drafts."""
    ROWS.save_to_disk(str(tmp_path))
    table = pa.table({"draft": ["x"] * 6})
    for name in ("cache-0123456789abcdef.arrow", "my-map.arrow"):
        with pa.ipc.new_stream(str(tmp_path / name), table.schema) as out:
            out.write_table(table)
    assert texts_of(tmp_path) == {"train": list(ROWS["text"])}
    (tmp_path / "data-00000-of-00001.arrow").unlink()
    with refuses(DataError, where=f"{tmp_path}/data-00000-of-00001.arrow"):
        texts_of(tmp_path)


def test_a_saved_dict_has_the_splits_that_it_lists(tmp_path: Path) -> None:
    """One is called as no split usually is; a folder next to them is none of its splits."""
    both = datasets.DatasetDict(train_sft=ROWS.select([0]), test_sft=ROWS.select([1]))
    both.save_to_disk(str(tmp_path))
    ROWS.save_to_disk(str(tmp_path / "old"))
    assert texts_of(tmp_path) == {"train_sft": ["row 0"], "test_sft": ["row 1"]}
    shutil.rmtree(tmp_path / "test_sft")
    with refuses(DataError, where=str(tmp_path), names=["test_sft"]):
        texts_of(tmp_path)


CLONE = {f"{name}.jsonl": json.dumps({"text": name}) for name in ("a/train", "a/test", "b/train")}
ALL = {"train": ["a/train", "b/train"], "test": ["a/test"]}
A = {"train": ["a/train"], "test": ["a/test"]}
B = {"train": ["b/train"]}


@pytest.mark.parametrize(
    ("configs", "config", "expected"),
    [
        ("configs:\n- config_name: x\n  data_files: b/*\n", "", B),
        ("configs:\n  - config_name: a\n    data_dir: a\n", "", A),
        (
            "configs:\n- config_name: a\n  data_files:\n  - split: train\n    path: [a/train*]\n"
            "  - {split: test, path: 'a/te*'}\n- config_name: b\n  data_dir: b\n  default: true\n",
            "",
            B,
        ),
        ("configs:\n- {config_name: default, data_dir: a}\n- {config_name: b, data_dir: b}\n", "", A),
        ("configs:\n- {config_name: a, data_dir: a}\n- {config_name: b, data_dir: b}\n", "b", B),
        ("license: mit\n", "", ALL),
    ],
)  # fmt: skip
def test_a_clone_has_the_files_of_one_configuration(
    tmp_path: Path, configs: str, config: str, expected: dict[str, list[str]]
) -> None:
    make_files(tmp_path, {**CLONE, "README.md": f"---\nlanguage: no\n{configs}---\nAbout.\n"})
    assert texts_of(tmp_path, **({"name": config} if config else {})) == expected


def test_a_clone_whose_configuration_is_unclear_is_refused(tmp_path: Path) -> None:
    both = "- {config_name: a 1, data_dir: a}\n- {config_name: b, data_dir: b}"
    for configs, fix in ((both, "name: a 1"), ("- config_name: a\n data_dir: a", "README.md")):
        make_files(tmp_path, {**CLONE, "README.md": f"---\nconfigs:\n{configs}\n---\n"})
        with refuses(DataError, fix=[fix]):
            texts_of(tmp_path)


def test_a_pattern_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = ["a.jsonl", "b.jsonl", "test/d.jsonl", "x[1].jsonl"]
    make_files(tmp_path, {place: json.dumps({"text": Path(place).stem}) for place in places})
    for pattern, expected in (
        ("[ab].jsonl", {"train": ["a", "b"]}),
        ("**/[a-d].jsonl", {"train": ["a", "b"], "test": ["d"]}),
        ("t*", {"test": ["d"]}),
        ("x[1].jsonl", {"train": ["x[1]"]}),  # a file with such a name is no pattern
    ):
        assert texts_of(tmp_path / pattern) == expected
    with refuses(DataError, where=f"{tmp_path}/*.csv"):
        texts_of(tmp_path / "*.csv")
    # In a recipe it starts from the recipe's folder, which a container gets.
    monkeypatch.chdir("/")
    train = {"source": "*.jsonl", "format": "text"}
    run = make_run(tmp_path, tmp_path, held=False, data={"train": train})
    assert run.data.train[0].source == f"{tmp_path}/*.jsonl"
    launch = pytest.importorskip("tunesmith.tools.launch.inputs")
    assert tmp_path in launch.recipe_inputs(run)


def test_a_file_with_links_is_read_once(tmp_path: Path) -> None:
    make_files(tmp_path, {"texts/b.txt": "b", "texts/sub/c.txt": "c", "other.txt": "other"})
    folder = tmp_path / "texts"
    (folder / "a.txt").symlink_to(folder / "b.txt")
    (folder / "sub" / "d.txt").symlink_to(folder / "b.txt")
    (folder / "e.txt").symlink_to(tmp_path / "other.txt")
    (folder / "f.txt").symlink_to(tmp_path / "other.txt")
    (folder / "sub" / "parent").symlink_to(folder)
    (folder / "above").symlink_to(tmp_path)
    assert texts_of(folder) == {"train": ["b", "other", "c"]}


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux can be told to drop pages"
)
def test_the_pages_of_files_that_are_closed_are_dropped(tmp_path: Path) -> None:
    """Rows are read in any order, so the pages of open files stay. At most 16 files are open."""
    paths = [tmp_path / f"{number}.jsonl" for number in range(20)]
    for path in paths:
        path.write_text(json.dumps({"text": "word " * 4000}) + "\n")
        with path.open("rb+") as written:
            os.fsync(written.fileno())
        if resident(path) < 4:
            pytest.skip("this file system does not cache")
    for table in [open_table(path) for path in paths]:
        table.row(0)
    assert [resident(path) > 0 for path in paths] == [False] * 4 + [True] * 16
