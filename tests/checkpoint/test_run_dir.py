"""Where a run may put its files: not among a user's files of the same names."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from errors import refuses
from tunesmith.checkpoint.claim import IDENTITY, check_run_dir, claim_run_dir, move_aside
from tunesmith.errors import ModelError, UsageError


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["./"],
        ["launch/recipe.yaml"],
        ["lost+found/"],
        [".snapshots/x"],
        ["rows.jsonl", "data/more.jsonl"],
        ["first/final/x", f"first/{IDENTITY}"],
        ["thesis/a.txt"],
    ],
)
def test_what_a_run_may_lie_beside(names: list[str], tmp_path: Path) -> None:
    for name in names:
        path = tmp_path / "out" / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_text(json.dumps({"recipe_hash": "x"}))
    with claim_run_dir(tmp_path / "out"):
        assert (tmp_path / "out").is_dir()


def test_evals_go_aside_with_the_run_that_they_are_of(tmp_path: Path) -> None:
    """Else the report of the next run would show scores of another model."""
    run = tmp_path / "run"
    (run / "evals").mkdir(parents=True)
    (run / "evals" / "held.scores.json").write_text("{}")
    (run / IDENTITY).write_text('{"recipe_hash": "r"}')
    place = move_aside(run)
    assert place is not None
    assert (place / "evals" / "held.scores.json").is_file()
    assert not (run / "evals").exists()


def test_a_folder_that_the_run_reads_and_the_root_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with refuses(UsageError, where=str(tmp_path / "link")):
        check_run_dir(tmp_path / "link", ["owner/name", str(tmp_path)])
    check_run_dir(tmp_path / "run", [str(tmp_path)])
    with refuses(UsageError, where="/"):
        check_run_dir(Path("/"))


def test_a_pipe_is_to_be_deleted_or_another_folder_used(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log.txt")
    with (
        refuses(ModelError, where=str(tmp_path / "log.txt"), fix=["output_dir=runs/my-run"]),
        claim_run_dir(tmp_path),
    ):
        pass
