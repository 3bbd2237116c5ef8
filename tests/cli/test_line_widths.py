"""What commands print for a person fits the width of its terminal, or 100 columns of a pipe."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from recipes import recipe
from tunesmith.host.streams import DEFAULT_COLUMNS, folded
from warm import run_warm

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe whose warnings are long: few steps, on a few of its rows."""
    folder = tmp_path_factory.mktemp("widths")
    short = recipe(tiny, folder, train={"duration": "2 steps"}, log={"samples": 2})
    (folder / "recipe.yaml").write_text(json.dumps(short))
    return folder


@pytest.mark.parametrize("columns", [80, None])
def test_no_line_is_wider(columns: int | None, folder: Path) -> None:
    """Of a run and of what is done with it, in one folder: no line could be folded."""
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    if columns is not None:
        env["COLUMNS"] = str(columns)
    run = str(folder / "run")
    has_folded = False
    for words in (
        ["train", str(folder / "recipe.yaml"), "--fresh"],
        ["train", str(folder / "recipe.yaml"), "--why"],
        ["data", str(folder / "recipe.yaml"), "--rows", "0"],
        ["report", run, "--output", str(folder / "report.html"), "--force"],
        ["plan", "qwen3-8b-lora", "--on", "h100"],
        ["plan", "llama3.3-70b-full", "--on", "h100"],
        ["train", str(folder / "no-recipe.yaml")],
        ["doctor"],
    ):
        done = run_warm(words, env=env)
        for line in (done.stdout + done.stderr).splitlines():
            # A place and a command of an error are there to be copied: one command a line.
            assert "; or " not in line or len(line) <= (columns or DEFAULT_COLUMNS), words
            if line.lstrip().startswith(("where: ", "fix: ", "fix  ")):
                continue
            assert "\n" not in folded(line, columns or DEFAULT_COLUMNS), words
            assert not line.lstrip().startswith("tokens/s"), "the table of `plan` is folded"
            has_folded |= line.startswith("  ")
    assert has_folded
