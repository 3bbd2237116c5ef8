"""`tunesmith recipes`: what is listed is there, what is shown loads, what is copied is not lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from invoke import invoke
from tunesmith.config.dump import dump
from tunesmith.config.load import load_recipe
from tunesmith.config.shipped import copy_of, shipped

NAME = "smollm2-135m-lora"


@pytest.mark.slow
def test_list() -> None:
    assert [line.split()[0] for line in invoke("recipes").out.splitlines()] == list(shipped())
    rows = json.loads(invoke("recipes", "list", "--json").out)
    methods = {row["name"]: row["method"] for row in rows}
    assert list(methods) == list(shipped())
    known = {"llama3.1-70b-qlora": "QLoRA r=8", "llama3.2-3b-full": "full", NAME: "LoRA r=16"}
    assert known.items() <= methods.items()


def test_show_is_a_recipe(tmp_path: Path) -> None:
    """As it ships, with its comments; with an override it is what would be trained."""
    assert invoke("recipes", "show", NAME).out == shipped()[NAME].read_text(encoding="utf-8")
    changed = load_recipe(NAME, ["train.learning_rate=5e-4", "train.seed=1"])
    path = tmp_path / "shown.yaml"
    path.write_text(invoke("recipes", "show", NAME, "train.learning_rate=5e-4", "train.seed=1").out)
    assert path.read_text() == dump(changed)
    assert load_recipe(path) == changed
    values = json.loads(invoke("recipes", "show", path, "--json", "train.eps=1e-7").out)
    assert (values["train"]["learning_rate"], values["train"]["eps"]) == (5e-4, 1e-7)


def test_copy_never_writes_over_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for word, path in {"mine.yaml": "mine.yaml", "folder": f"folder/{NAME}.yaml"}.items():
        assert invoke("recipes", "copy", NAME, word).out == f"{path}\n"
        assert Path(path).read_text() == copy_of(shipped()[NAME])
    assert load_recipe("mine.yaml") == load_recipe(NAME)
    Path("mine.yaml").write_text("mine")
    assert invoke("recipes", "copy", NAME, "mine.yaml").code == 2
    assert Path("mine.yaml").read_text() == "mine"
    assert invoke("recipes", "copy", NAME, "mine.yaml", "--force").code == 0
    assert Path("mine.yaml").read_text() == copy_of(shipped()[NAME])
