"""Files and commands on another node, by ssh and rsync: sent once, whole, to the same place."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from errors import refuses
from tunesmith.errors import MachineError, UsageError
from tunesmith.launch import ssh as module
from tunesmith.launch.ssh import run_on, send_files, try_on
from tunesmith.tools.launch.inputs import copy_input, place_by_content

# Runs the command here: the other node, whose rsync has another root.
SSH = """#!/bin/sh
while case $1 in -*) true;; *) false;; esac; do shift; done
host=$1
shift
case $host in
unreachable) echo "ssh: connect to host: No route to host" >&2; exit 255;;
bare) echo "bash: line 1: rsync: command not found" >&2; exit 127;;
esac
exec sh -c "$*"
"""
RSYNC = """#!/bin/bash
[ "$1" != --server ] || set -- "${@:1:$#-1}" "$OTHER_ROOT/"
exec REAL "$@"
"""
needs_rsync = pytest.mark.skipif(not shutil.which("rsync"), reason="lacks rsync")


@pytest.fixture(autouse=True)
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The other node's root."""
    (tmp_path / "bin").mkdir()
    real = shutil.which("rsync") or ""
    for name, text in (("ssh", SSH), ("rsync", RSYNC.replace("REAL", real))):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "there"
    root.mkdir()
    monkeypatch.setenv("OTHER_ROOT", str(root))
    return root


@needs_rsync
def test_files_folders_and_links_arrive_at_their_own_paths(tmp_path: Path, there: Path):
    """A file that changed is sent again."""
    repo = tmp_path / "hub/models--a--b"
    snapshot = repo / "snapshots/222"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "blobs/1").write_bytes(b"weights")
    (repo / "blobs/2.incomplete").write_bytes(b"half")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    odd = tmp_path / "rows; touch $(echo here) 'x'\n.jsonl"
    inside = there / tmp_path.relative_to("/")
    for text in ("{}", "[{}]"):
        odd.write_text(text)
        send_files([str(repo), str(odd)], "spark-b")
        assert (inside / odd.name).read_text() == text
    link = inside / "hub/models--a--b/snapshots/222/model.safetensors"
    assert link.is_symlink()
    assert link.read_bytes() == b"weights"
    assert not (inside / "hub/models--a--b/blobs/2.incomplete").exists()


def test_an_input_has_a_place_by_its_content(tmp_path: Path):
    model = tmp_path / "model"
    (model / "deep").mkdir(parents=True)
    (model / "deep/config.json").write_text("one")
    (model / ".hidden").write_text("a token")
    place = place_by_content(model)
    copy_input(model, place)
    (model / "deep/config.json").write_text("changed")
    assert [file.read_text() for file in place.rglob("*") if file.is_file()] == ["one"]
    assert place_by_content(model) != place


@needs_rsync
def test_what_fails_on_the_other_node_names_it_and_the_way_on(tmp_path: Path):
    with refuses(MachineError, names=["unreachable"], fix=["ssh-copy-id unreachable"]) as caught:
        try_on("unreachable", "true")
    assert os.strerror(errno.EHOSTUNREACH) in caught.value.text()
    with refuses(MachineError, names=["bare"], fix=["apt-get", "rsync"]):
        send_files([str(tmp_path)], "bare")


def test_a_command_is_words_and_its_complaint_is_shown():
    assert run_on("spark-b", "printf", "%s|", "a b", "$(c)", text="") == "a b|$(c)|"
    with refuses(MachineError, names=["spark-b"]) as caught:
        run_on("spark-b", "sh", "-c", "echo first >&2; echo full >&2; exit 1")
    assert caught.value.why == "full"
    assert try_on("", "no-such-command").returncode == 127


@pytest.mark.parametrize("host", ["-oProxyCommand=touch /tmp/x", "a b", "$(a)", "a\nb"])
def test_a_host_is_no_option_and_no_command(host: str):
    with refuses(UsageError, where="--hosts", names=[repr(host)]):
        try_on(host, "true")


def test_what_a_shell_prints_when_it_starts_is_no_output(monkeypatch: pytest.MonkeyPatch):
    """Such as an `echo` in .bashrc, which ssh's commands run too."""
    real = subprocess.run

    def greeted(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        done = real(words, **options)
        done.stdout = f"Welcome to spark-b\n[1] {done.stdout}"
        return done

    monkeypatch.setattr(module.subprocess, "run", greeted)
    assert run_on("spark-b", "echo", "17") == "17\n"
    assert try_on("spark-b", "true").stdout == ""
