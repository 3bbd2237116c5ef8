"""Where a run may put its files, and the modes that they have by the umask."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from errors import refuses
from recipes import make_run
from tunesmith.checkpoint.claim import IDENTITY, check_run_dir, claim_run_dir, move_aside
from tunesmith.errors import UsageError
from tunesmith.training.run import train


@pytest.mark.parametrize("name", ["launch/recipe.yaml", "data/more.jsonl", f"first/{IDENTITY}"])
def test_what_a_run_may_lie_beside(name: str, tmp_path: Path) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"recipe_hash": "x"}))
    with claim_run_dir(tmp_path / "out"):
        assert path.is_file()


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


@contextmanager
def umask(mask: int) -> Iterator[int]:
    """The mode of a new file."""
    before = os.umask(mask)
    try:
        yield 0o666 & ~mask
    finally:
        os.umask(before)


def modes(folder: Path) -> set[int]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return {path.stat().st_mode & 0o777 for path in files}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "mask"), [("lora", 0o002), ("none", 0o077)])
def test_a_run_and_a_merge(kind, mask, tiny, tmp_path, monkeypatch):
    merge = pytest.importorskip("tunesmith.tools.export.merge").merge
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    log = {"tensorboard": True, "samples": 1}
    run = make_run(tiny, tmp_path, adapter={"kind": kind}, log=log, train={"duration": "2 steps"})
    folders = ["run", "cache"]
    with umask(mask) as mode:
        train(run, quiet=True)
        if kind == "lora":
            merge(tmp_path / "run", tmp_path / "merged")
            folders.append("merged")
    for folder in folders:
        assert modes(tmp_path / folder) == {mode}
