"""Which files of a folder, a clone or a pattern are one data set."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from errors import holds, refuses
from recipes import make_run
from tunesmith.config.load import load_recipe
from tunesmith.config.schema import Source
from tunesmith.data.source.open_source import open_splits
from tunesmith.errors import DataError
from tunesmith.tools.launch.inputs import recipe_inputs
from tunesmith.training.result import warn_of_changed_rows

ROWS = datasets.Dataset.from_list([{"text": f"row {i}"} for i in range(6)])


def make_files(folder: Path, files: Mapping[str, str]) -> str:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return str(folder)


def texts(source: Path | str, **keys: str) -> dict[str, list[object]]:
    """The texts of each split of a source."""
    splits = open_splits(Source(source=str(source), **keys))
    return {
        name: [table.row(i)["text"] for i in range(len(table))]  # type: ignore[index]
        for name, table in splits.items()
    }


def test_a_saved_data_set_has_the_rows_of_its_state(tmp_path: Path) -> None:
    """Rows that `map` cached next to it are drafts."""
    ROWS.save_to_disk(str(tmp_path))
    table = pa.table({"draft": ["x"] * 6})
    for name in ("cache-0123456789abcdef.arrow", "my-map.arrow"):
        with pa.ipc.new_stream(str(tmp_path / name), table.schema) as out:
            out.write_table(table)
    assert texts(tmp_path) == {"train": list(ROWS["text"])}
    (tmp_path / "data-00000-of-00001.arrow").unlink()
    with refuses(DataError, where=f"{tmp_path}/data-00000-of-00001.arrow"):
        texts(tmp_path)


def test_a_saved_dict_has_the_splits_that_it_lists(tmp_path: Path) -> None:
    """One is called as no split usually is; a folder next to them is none of its splits."""
    both = datasets.DatasetDict(train_sft=ROWS.select([0]), test_sft=ROWS.select([1]))
    both.save_to_disk(str(tmp_path))
    ROWS.save_to_disk(str(tmp_path / "old"))
    assert texts(tmp_path) == {"train_sft": ["row 0"], "test_sft": ["row 1"]}
    shutil.rmtree(tmp_path / "test_sft")
    with refuses(DataError, where=str(tmp_path), names=["test_sft"]):
        texts(tmp_path)


CLONE = {f"{name}.jsonl": json.dumps({"text": name}) for name in ("a/train", "a/test", "b/train")}
ALL = {"train": ["a/train", "b/train"], "test": ["a/test"]}
A = {"train": ["a/train"], "test": ["a/test"]}
B = {"train": ["b/train"]}


@pytest.mark.parametrize(
    ("configs", "config", "expected"),
    [
        ("configs:\n- config_name: x\n  data_files: b/*\n", "", B),
        ("configs:\n- config_name: x\n  data_files: [b/train.jsonl]\n", "", B),
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
        ("license: mit\n---\nconfigs:\n- {config_name: a, data_dir: a}\n", "", ALL),
    ],
)  # fmt: skip
def test_a_clone_has_the_files_of_one_configuration(
    tmp_path: Path, configs: str, config: str, expected: dict[str, list[str]]
) -> None:
    make_files(tmp_path, {**CLONE, "README.md": f"---\nlanguage: no\n{configs}---\nAbout.\n"})
    assert texts(tmp_path, **({"name": config} if config else {})) == expected


@pytest.mark.parametrize(
    ("configs", "keys", "names", "fix"),
    [
        ("- {config_name: a 1, data_dir: a}\n- {config_name: b, data_dir: b}", {}, ["a 1", "b"], "name: a 1"),
        ("- {config_name: a 1, data_dir: a}", {"name": "c"}, ["a 1"], "name: a 1"),
        ("- config_name: a\n data_dir: a", {}, [], "README.md"),
    ],
)  # fmt: skip
def test_a_clone_whose_configuration_is_unclear_is_refused(
    tmp_path: Path, configs: str, keys: dict[str, str], names: list[str], fix: str
) -> None:
    make_files(tmp_path, {**CLONE, "README.md": f"---\nconfigs:\n{configs}\n---\n"})
    with refuses(DataError, names=names, fix=[fix]):
        texts(tmp_path, **keys)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jsonl", {"train": ["a", "b"]}),
        ("[ac]*", {"train": ["a"]}),
        ("**/*.jsonl", {"train": ["a", "b"], "test": ["d"]}),
        ("t*", {"test": ["d"]}),
        ("x[1].jsonl", {"train": ["x"]}),
    ],
)
def test_a_pattern_is_a_source(
    tmp_path: Path, pattern: str, expected: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with such a name is not a pattern."""
    places = ["a.jsonl", "b.jsonl", "test/d.jsonl", *[pattern] * pattern.startswith("x")]
    rows = {place: json.dumps({"text": Path(place).stem[0]}) for place in places}
    make_files(tmp_path, rows)
    assert texts(tmp_path / pattern) == expected
    # In a recipe it starts from the recipe's folder.
    monkeypatch.chdir("/")
    (tmp_path / "r.yaml").write_text(
        f"model: {{name: m}}\ndata: {{train: {{source: '{pattern}', format: text}}}}\noutput_dir: o\n"
    )
    run = load_recipe(tmp_path / "r.yaml")
    assert run.data.train[0].source == str(tmp_path / pattern)


def test_a_pattern_without_a_file_is_an_error(tmp_path: Path) -> None:
    make_files(tmp_path, {"a.jsonl": "{}"})
    with refuses(DataError, where=f"{tmp_path}/*.csv"):
        texts(tmp_path / "*.csv")


def test_a_container_gets_the_folder_of_a_pattern(tmp_path: Path) -> None:
    make_files(tmp_path, {"rows/a/b.jsonl": "{}"})
    train = {"source": f"{tmp_path}/rows/*/*.jsonl", "format": "text"}
    assert tmp_path / "rows" in recipe_inputs(make_run(tmp_path, tmp_path, data={"train": train}))


def test_a_finished_run_tells_of_a_changed_file_of_its_pattern(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_files(tmp_path, {"rows/a.jsonl": "{}", "run/config.yaml": ""})
    train = {"source": f"{tmp_path}/rows/*.jsonl", "format": "text"}
    run = make_run(tmp_path, tmp_path, held=False, data={"train": train})
    for written, is_told in ((1, False), (3, True)):
        os.utime(tmp_path / "rows/a.jsonl", (written, written))
        os.utime(tmp_path / "run/config.yaml", (2, 2))
        warn_of_changed_rows(run)
        assert holds(caplog.text, "--fresh") == is_told


def test_a_file_with_links_is_read_once(tmp_path: Path) -> None:
    make_files(tmp_path, {"texts/b.txt": "b", "texts/sub/c.txt": "c", "other.txt": "other"})
    folder = tmp_path / "texts"
    (folder / "a.txt").symlink_to(folder / "b.txt")
    (folder / "sub" / "d.txt").symlink_to(folder / "b.txt")
    (folder / "e.txt").symlink_to(tmp_path / "other.txt")
    (folder / "f.txt").symlink_to(tmp_path / "other.txt")
    (folder / "sub" / "parent").symlink_to(folder)
    (folder / "above").symlink_to(tmp_path)
    assert texts(folder) == {"train": ["b", "other", "c"]}
