"""The cache folder, files written whole, and the checks of disk, memory and terminal."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from errors import refuses
from tunesmith.checkpoint.claim import claim_run_dir
from tunesmith.errors import MachineError
from tunesmith.host import files
from tunesmith.launch.job import saved_jobs


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("TUNESMITH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_folder("tokens", "a") == tmp_path / "xdg" / "tunesmith" / "tokens" / "a"
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "own"))
    assert files.cache_folder() == tmp_path / "own"


def test_a_user_without_a_home_needs_only_the_folders_that_are_used(tmp_path, monkeypatch):
    """As in a container with `--user`."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "own"))
    assert files.cache_folder() == tmp_path / "own"
    with claim_run_dir(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    for name in ("TUNESMITH_CACHE", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for use in (files.cache_folder, saved_jobs):
        with refuses(MachineError, where="environment: HOME", fix=["HOME="]):
            use()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_atomically(path, "é")
    files.write_atomically(path, path.read_bytes() * 2)
    assert path.read_text(encoding="utf-8") == "éé"

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as raised:
        files.write_atomically(path, "half")
    assert raised.value.filename == str(path), "not that of the temporary file"
    assert path.read_text(encoding="utf-8") == "éé"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


KILLED = """
import os, signal, sys
from pathlib import Path
from tunesmith.host.files import write_atomically
os.replace = lambda *paths: os.kill(os.getpid(), int(sys.argv[2]))
write_atomically(Path(sys.argv[1]), "half")
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_what_a_stopped_write_leaves_is_removed_by_it_or_by_the_next_one(tmp_path, number):
    path = tmp_path / "[held] out.scores.json"
    words = [sys.executable, "-c", KILLED, str(path), str(number.value)]
    assert subprocess.run(words, check=False, stderr=subprocess.DEVNULL).returncode == -number
    left = list(tmp_path.iterdir())
    assert len(left) == (number == signal.SIGKILL)
    # A process of another machine may be writing it.
    fresh = tmp_path / f".{path.name}.999999999.partial"
    fresh.touch()
    for partial in left:
        os.utime(partial, (0, 0))
    files.write_atomically(path, "whole")
    assert sorted(tmp_path.iterdir()) == sorted([path, fresh])


@dataclass(frozen=True)
class Figures:
    count: int
    names: tuple[str, ...] = ()


def test_what_was_measured_is_measured_again_where_its_file_is_bad(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    measured = []

    def measure() -> Figures:
        measured.append(1)
        return Figures(3, ("a", "b"))

    def figures(*key: object) -> Figures:
        return files.measure_once("specs", list(key), measure, Figures)

    assert figures(1, {"a": Path("x")}) == figures(1, {"a": Path("x")}) == Figures(3, ("a", "b"))
    assert len(measured) == 1
    [file] = (tmp_path / "specs").iterdir()
    whole = file.read_bytes()
    changed = [whole.replace(b"count", b"amount"), whole.replace(b"3,", b"4,")]
    for content in (b"", whole[:-1], b"\xff", b"[]", *changed, "a pipe"):
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            file.unlink()
            os.mkfifo(file)
        measured.clear()
        assert figures(1, {"a": Path("x")}) == Figures(3, ("a", "b"))
        assert len(measured) == 1, content[:40]
        assert file.read_bytes() == whole


def test_a_disk_with_too_little_room_is_refused_with_the_figures(tmp_path: Path) -> None:
    place = tmp_path / "not" / "there" / "yet"
    free = shutil.disk_usage(tmp_path).free
    files.require_disk_space(place, 1, what="the model", fix="-")
    with refuses(MachineError, cause="disk", names=["the model", "needed", "missing"]) as caught:
        files.require_disk_space(place, free * 2, what="the model", fix="take a larger disk")
    assert (caught.value.where, caught.value.fix) == (str(place), "take a larger disk")
