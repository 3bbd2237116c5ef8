"""Names of columns, scorers, files and folders are checked before a model is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from invoke import invoke

CASES = json.loads(Path(__file__).with_name("late_checks.json").read_text())
RECIPE = """\
model: {name: ./model}
data: {train: {source: rows.jsonl, format: prompt-completion}}
output_dir: runs/late
"""


def read_too_early(*_: object, **__: object) -> NoReturn:
    pytest.fail("a model is read before the names are checked")


@pytest.mark.parametrize("words", CASES)
def test_before_a_model_is_read(words: str, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tunesmith.start.model.read_model", read_too_early)
    monkeypatch.setattr("tunesmith.answers.load_run.load_run", read_too_early)
    monkeypatch.setattr("tunesmith.start.make_recipe.read_model", read_too_early)
    monkeypatch.setattr("tunesmith.tools.evaluate.cli_generate.load_run", read_too_early)
    monkeypatch.setattr("tunesmith.tools.evaluate.run_eval.run_rows", read_too_early)
    rows = [{"prompt": f"What is {i} + 1?", "completion": f"{i + 1}"} for i in range(20)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("r.yaml").write_text(RECIPE)
    Path("mine.py").write_text("from json import loads\n\ndef score(answer, row): return 1.0\n")
    Path("broken.py").write_text("def score(\n")
    done = invoke(*words.replace("MODEL", str(tiny)).split())
    assert done.code == 2, done.err
    assert all(part in done.err for part in CASES[words]), done.err
    assert sorted(os.listdir()) == ["broken.py", "mine.py", "r.yaml", "rows.jsonl"]


def test_a_start_checks_its_rows_without_torch() -> None:
    code = "import sys, tunesmith.start.run; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_deleted_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    os.rmdir(tmp_path / "gone")
    done = invoke("recipes")
    assert (done.code, "cd ~" in done.err) == (2, True)
