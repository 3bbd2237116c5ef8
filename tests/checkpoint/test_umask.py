"""Every file that a run, a merge or a conversion leaves can be read by whom the umask says;
safetensors' own have 600.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes import make_run
from tunesmith.host.files import follow_umask
from tunesmith.training.run import train


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    """The mode of a new file."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def modes(folder: Path) -> set[int]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return {path.stat().st_mode & 0o777 for path in files}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "none"])
def test_a_run_and_a_merge(
    kind: str, mode: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = pytest.importorskip("tunesmith.tools.export.merge").merge
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    log = {"tensorboard": True, "samples": 1}
    run = make_run(tiny, tmp_path, adapter={"kind": kind}, log=log, train={"duration": "3 steps"})
    train(run, quiet=True)
    assert modes(tmp_path / "run") == {mode}
    assert modes(tmp_path / "cache") == {mode}
    if kind == "lora":
        merge(tmp_path / "run", tmp_path / "merged")
        assert modes(tmp_path / "merged") == {mode}


def test_files_in_folders_and_what_a_link_leads_to(mode: int, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.touch(0o640)
    before = outside.stat().st_mode
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "weights").touch(0o600)
    (folder / "link").symlink_to(outside)
    follow_umask(tmp_path / "a")
    assert (folder / "weights").stat().st_mode & 0o777 == mode
    assert outside.stat().st_mode == before
    assert sorted(path.name for path in (tmp_path / "a").rglob("*")) == ["b", "link", "weights"]
