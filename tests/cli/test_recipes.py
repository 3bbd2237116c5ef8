"""`tunesmith recipes`: what is listed is there, what is shown loads, what is copied is not lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from errors import check_shown
from tunesmith.cli.main import main
from tunesmith.cli.recipes import describe_adapter
from tunesmith.config.load import load_recipe
from tunesmith.config.shipped import copy_of, purpose, shipped

NAME = "smollm2-135m-lora"


@pytest.mark.slow
def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    plain = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in plain] == list(shipped())
    assert main(["recipes", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(shipped())
    by_name = {row["name"]: row["method"] for row in rows}
    assert by_name["llama3.1-70b-qlora"] == "QLoRA r=8"
    assert by_name["llama3.2-3b-full"] == "full"
    assert by_name[NAME] == describe_adapter(load_recipe(NAME)) == "LoRA r=16"


@pytest.mark.slow
@pytest.mark.parametrize("columns", [40, 80, 200])
def test_table_on_a_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No word is broken."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= columns for line in lines)
    words = [word for line in lines for word in line.split()]
    for name, path in shipped().items():
        assert name in words
        assert set(purpose(path).split()) <= set(words)


def test_show_is_a_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["recipes", "show", NAME, "train.learning_rate=5e-4"]) == 0
    path = tmp_path / "shown.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_recipe(path) == load_recipe(NAME, ["train.learning_rate=5e-4"])
    assert main(["recipes", "show", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["learning_rate"] == 5e-4


def test_copy(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for words, path in (
        ([], f"{NAME}.yaml"),
        (["mine.yaml"], "mine.yaml"),
        (["folder"], f"folder/{NAME}.yaml"),
    ):
        assert main(["recipes", "copy", NAME, *words]) == 0
        assert capsys.readouterr().out == f"{path}\n"
        assert Path(path).read_text() == copy_of(shipped()[NAME])
    assert load_recipe("mine.yaml") == load_recipe(NAME)


def test_copy_never_writes_over_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    assert main(["recipes", "copy", NAME, str(path)]) == 2
    shown = capsys.readouterr().err
    check_shown(shown, where=str(path))
    assert "--force" in shown
    assert path.read_text() == "mine"
    assert main(["recipes", "copy", NAME, str(path), "--force"]) == 0
    assert path.read_text() == copy_of(shipped()[NAME])
