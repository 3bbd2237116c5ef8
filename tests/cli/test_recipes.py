"""`tunesmith recipes`: what is listed is there, what is shown loads, what is copied is not lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from invoke import invoke
from tunesmith.cli.recipes import describe_adapter
from tunesmith.config.dump import dump
from tunesmith.config.load import load_recipe
from tunesmith.config.shipped import copy_of, purpose, shipped

NAME = "smollm2-135m-lora"


@pytest.mark.slow
def test_list() -> None:
    lines = invoke("recipes").out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped())
    rows = json.loads(invoke("recipes", "list", "--json").out)
    methods = {row["name"]: row["method"] for row in rows}
    assert list(methods) == list(shipped())
    assert methods["llama3.1-70b-qlora"] == "QLoRA r=8"
    assert methods["llama3.2-3b-full"] == "full"
    assert methods[NAME] == describe_adapter(load_recipe(NAME)) == "LoRA r=16"


@pytest.mark.slow
def test_the_table_breaks_no_word_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.cli.main import main

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 40 for line in lines)
    words = {word for line in lines for word in line.split()}
    for name, path in shipped().items():
        assert {name, *purpose(path).split()} <= words


def test_show_is_a_recipe(tmp_path: Path) -> None:
    """As it ships, with its comments; with an override it is what would be trained."""
    assert invoke("recipes", "show", NAME).out == shipped()[NAME].read_text(encoding="utf-8")
    changed = load_recipe(NAME, ["train.learning_rate=5e-4"])
    path = tmp_path / "shown.yaml"
    path.write_text(invoke("recipes", "show", NAME, "train.learning_rate=5e-4").out)
    assert path.read_text() == dump(changed)
    assert load_recipe(path) == changed
    values = json.loads(invoke("recipes", "show", path, "--json").out)
    assert values["train"]["learning_rate"] == 5e-4


def test_copy_never_writes_over_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    named = {"": f"{NAME}.yaml", "mine.yaml": "mine.yaml", "folder": f"folder/{NAME}.yaml"}
    for word, path in named.items():
        assert invoke("recipes", "copy", NAME, *filter(None, [word])).out == f"{path}\n"
        assert Path(path).read_text() == copy_of(shipped()[NAME])
    assert load_recipe("mine.yaml") == load_recipe(NAME)
    Path("mine.yaml").write_text("mine")
    assert invoke("recipes", "copy", NAME, "mine.yaml").code == 2
    assert Path("mine.yaml").read_text() == "mine"
    assert invoke("recipes", "copy", NAME, "mine.yaml", "--force").code == 0
    assert Path("mine.yaml").read_text() == copy_of(shipped()[NAME])
