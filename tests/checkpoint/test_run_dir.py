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
from tunesmith.errors import ModelError, UsageError
from tunesmith.host.files import follow_umask
from tunesmith.training.run import train


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


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077], ids=oct)
def test_files_in_folders_and_what_a_link_leads_to(mask: int, tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "a" / "b"
    outside.touch(0o640)
    before = outside.stat().st_mode
    folder.mkdir(parents=True)
    (folder / "weights").touch(0o600)
    (folder / "link").symlink_to(outside)
    with umask(mask) as mode:
        follow_umask(tmp_path / "a")
    assert (folder / "weights").stat().st_mode & 0o777 == mode
    assert outside.stat().st_mode == before
    assert sorted(path.name for path in (tmp_path / "a").rglob("*")) == ["b", "link", "weights"]
