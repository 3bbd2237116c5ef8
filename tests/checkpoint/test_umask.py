"""Every file of a run or a merge has the mode that the umask says; safetensors' own have 600."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from recipes import make_run
from tunesmith.host.files import follow_umask
from tunesmith.training.run import train


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
