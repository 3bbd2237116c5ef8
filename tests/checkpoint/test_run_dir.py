"""Where a run may put its files, and the modes that they have by the umask."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from errors import refuses
from recipes import make_run, merge
from tunesmith.checkpoint.claim import IDENTITY, check_run_dir, claim_run_dir, run_files
from tunesmith.errors import UsageError
from tunesmith.run_dir import LOCK, ROLLOUTS, rollout_files
from tunesmith.start.run import train


@pytest.mark.parametrize("name", ["launch/recipe.yaml", "data/more.jsonl", f"first/{IDENTITY}"])
def test_what_a_run_may_lie_beside(name: str, tmp_path: Path) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"recipe_hash": "x"}))
    with claim_run_dir(tmp_path / "out"):
        assert path.is_file()


@pytest.mark.slow
def test_all_files_of_a_run_go_aside_with_it(tiny: Path, tmp_path: Path) -> None:
    """Else the report of the next run would show answers and scores of another model."""
    (tmp_path / "r.py").write_text("def length(answer, row):\n    return len(answer) / 99\n")
    changes: dict[str, Any] = {
        "method": {"name": "grpo", "reward": "r.py:length", "group": 2, "answer_tokens": 4},
        "train": {"duration": "2 steps", "global_batch": "2 examples", "warmup": "0 steps"},
        "validate": {"every": "1 steps"},
        "checkpoint": {"every": "1 steps"},
        "log": {"tensorboard": True, "samples": 1},
        "profile": {"enabled": True, "wait": 0, "warmup": 0, "active": 1},
    }
    train(make_run(tiny, tmp_path, **changes), quiet=True)
    run = tmp_path / "run"
    (run / "evals").mkdir()  # as `eval` does
    written = {path.name for path in run.iterdir()} - {LOCK}
    again = {"checkpoint": {"resume": "never"}, "train": {"duration": "1 steps"}}
    train(make_run(tiny, tmp_path, **merge(changes, again)), quiet=True)
    assert {path.name for path in (tmp_path / "run.previous-1").iterdir()} == written
    for folder, steps in (("run", [1]), ("run.previous-1", [1, 2])):
        assert [*rollout_files(tmp_path / folder / ROLLOUTS)] == steps


def test_a_folder_with_files_that_a_run_would_overwrite_is_refused(tmp_path: Path) -> None:
    own = tmp_path / "run" / ROLLOUTS / "step-1.safetensors"
    own.parent.mkdir(parents=True)
    own.touch()
    with refuses(UsageError, where=str(tmp_path / "run")):
        check_run_dir(tmp_path / "run")


def test_a_folder_of_wandb_is_a_runs_only_beside_its_id(tmp_path: Path) -> None:
    folder, id_file = tmp_path / "wandb", tmp_path / "wandb-id.txt"
    folder.mkdir()
    assert run_files(tmp_path) == []
    id_file.touch()
    assert run_files(tmp_path) == [folder, id_file]


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
