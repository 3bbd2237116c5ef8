"""The cache folder, files written whole, and the checks of disk, memory and terminal."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import pytest

from tunesmith import host_files
from tunesmith.errors import MachineError


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TUNESMITH_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert host_files.cache_folder("models") == tmp_path / "home" / ".cache" / "tunesmith" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert host_files.cache_folder("tokens", "a") == tmp_path / "xdg" / "tunesmith" / "tokens" / "a"
    monkeypatch.setenv("TUNESMITH_CACHE", "~/own")
    assert host_files.cache_folder() == tmp_path / "home" / "own"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    host_files.write_atomically(path, "é")
    host_files.write_atomically(path, path.read_bytes() * 2)
    assert path.read_text(encoding="utf-8") == "éé"

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        host_files.write_atomically(path, "half")
    assert path.read_text(encoding="utf-8") == "éé"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_disk_with_too_little_room_is_refused_with_the_figures(tmp_path: Path) -> None:
    place = tmp_path / "not" / "there" / "yet"
    free = shutil.disk_usage(tmp_path).free
    host_files.refuse_full_disk(place, 1, what="the model", fix="-")
    with pytest.raises(MachineError, match=r"no room on the disk for the model: .* short") as caught:
        host_files.refuse_full_disk(place, free * 2, what="the model", why="it is large", fix="take a larger disk")
    assert (caught.value.where, caught.value.fix) == (str(place), "take a larger disk")


def test_memory_and_terminal() -> None:
    assert host_files.available_memory() > 1 << 20
    assert not host_files.is_terminal(io.StringIO())
