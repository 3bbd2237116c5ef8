"""Files on another node: there whole or not at all, sent once, resumed where a launch was cut off,
nothing left running.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from errors import holds, refuses
from tunesmith.errors import MachineError, UsageError
from tunesmith.hub.download import FetchProgress
from tunesmith.launch import ship as module
from tunesmith.launch.ship import Connection, by_content, cached_files, place_here, ship
from waiting import wait_for

QUIET = FetchProgress()
# Takes ssh's words, runs the command here with another home: the other node.
# `tests/launch/test_swarm_pair.py` has a real one.
SSH = """#!/bin/sh
for word; do last=$word; done
echo "$@" >>"$SSH_LOG"
case "$*" in *unreachable*) echo "ssh: connect to host: No route to host" >&2; exit 255;; esac
exec sh -c "$last"
"""


@pytest.fixture(autouse=True)
def other_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ssh").write_text(SSH)
    (tmp_path / "bin/ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SSH_LOG", str(tmp_path / "ssh.log"))
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "PIECE", 1 << 20)


def big(path: Path, size: int = 5_300_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(hashlib.shake_128(path.name.encode()).digest(size))
    return path


@pytest.mark.slow
def test_a_folder_arrives_whole_in_several_streams_and_is_sent_once(tmp_path: Path):
    for name in ("model.safetensors", "deep/config.json", "empty.json"):
        big(tmp_path / "model" / name, 0 if name == "empty.json" else 5_300_000)
    place, files = by_content(tmp_path / "model")
    assert ship(files, "spark-b", QUIET) == 10_600_000
    assert {str(p.relative_to(place)) for p in Path(place).rglob("*") if p.is_file()} == {
        "model.safetensors", "deep/config.json", "empty.json",
    }  # fmt: skip
    for file in files:
        assert Path(file.place).read_bytes() == file.source.read_bytes()
    assert ship(files, "spark-b", QUIET) == 0
    (tmp_path / "model/deep/config.json").write_text("changed")
    assert by_content(tmp_path / "model")[0] != place


@pytest.mark.slow
def test_what_is_there_already_is_not_sent_again(tmp_path: Path):
    """As after a launch that was cut off: two of six pieces are there."""
    _, (file,) = by_content(big(tmp_path / "rows.jsonl"))
    with Connection("spark-b") as connection:
        for index in (0, 3):
            data = file.source.read_bytes()[index << 20 : (index + 1) << 20]
            where = {"place": file.place, "digest": file.digest}
            connection.ask("put", [data], index=index, start=index << 20, count=1 << 20, **where)
    assert connection.process.returncode == 0, (
        "the other side has ended, and was not left to find out"
    )
    assert not Path(file.place).exists()
    assert ship([file], "spark-b", QUIET) == 5_300_000 - (2 << 20)
    assert Path(file.place).read_bytes() == file.source.read_bytes()
    assert [*Path(file.place).parent.iterdir()] == [Path(file.place)]


@pytest.mark.slow
def test_a_damaged_piece_is_found_and_the_next_start_sends_all(tmp_path: Path):
    _, (file,) = by_content(big(tmp_path / "rows.jsonl"))
    with Connection("spark-b") as connection:
        where = {"place": file.place, "digest": file.digest}
        connection.ask("put", [b"x" * (1 << 20)], index=1, start=1 << 20, count=1 << 20, **where)
    with refuses(MachineError, where=file.place, names=[file.source, "spark-b"]):
        ship([file], "spark-b", QUIET)
    assert not Path(file.place).exists()
    assert ship([file], "spark-b", QUIET) == 5_300_000
    assert Path(file.place).read_bytes() == file.source.read_bytes()


def test_a_file_of_one_path_is_compared_by_content(tmp_path: Path):
    source, place = tmp_path / "recipe.yaml", tmp_path / "there" / "recipe.yaml"
    source.write_text("a: 1\n")
    file = module.ShippedFile(source, str(place), 5, hashlib.sha256(b"a: 1\n").hexdigest(), False)
    assert ship([file], "spark-b", QUIET) == 5
    assert ship([file], "spark-b", QUIET) == 0
    place.write_text("a: 2\n")  # of the same size
    assert ship([file], "spark-b", QUIET) == 5
    assert place.read_text() == "a: 1\n"


def test_a_snapshot_of_the_hubs_cache_keeps_its_links(tmp_path: Path):
    repo = tmp_path / "hub/models--a--b"
    old, new = repo / "snapshots/111", repo / "snapshots/222"
    for name, snapshot in (("0" * 64, old), ("1" * 64, new)):
        blob = big(repo / "blobs" / name, 1000)
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").symlink_to(os.path.relpath(blob, snapshot))
    big(repo / "blobs" / ("2" * 64 + ".incomplete"))
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("222")
    (repo / "refs/old").write_text("111")
    files, links = cached_files(repo, new)
    assert {Path(file.place).name: file.named for file in files} == {"1" * 64: True, "main": False}
    assert links == [(str(new / "model.safetensors"), f"../../blobs/{'1' * 64}")]
    assert len(cached_files(repo)[0]) == 4


def test_this_nodes_copy_does_not_change_with_its_source(tmp_path: Path):
    _, (file,) = by_content(big(tmp_path / "rows.jsonl", 1000))
    before = file.source.read_bytes()
    place_here([file])
    with file.source.open("r+b") as opened:
        opened.write(b"edited in place")
    assert Path(file.place).read_bytes() == before


def test_a_host_that_is_not_reached_is_named_with_what_ssh_says():
    with refuses(MachineError, names=["unreachable"]) as caught:
        ship([], "unreachable", QUIET)
    assert os.strerror(errno.EHOSTUNREACH) in caught.value.text()
    assert "ssh-copy-id unreachable" in caught.value.text()


@pytest.mark.parametrize(
    "host", ["-oProxyCommand=touch /tmp/x", "a b", "a;b", "$(a)", "a\nb", "`a`"]
)
def test_a_host_is_no_option_and_no_command(host: str, tmp_path: Path):
    with refuses(UsageError, where="--hosts", names=[repr(host)]):
        Connection(host)
    assert not (tmp_path / "ssh.log").exists()


def test_ssh_takes_the_cipher_that_is_preferred():
    """The real ssh, which refuses a list that it does not know."""
    ssh = shutil.which("ssh", path="/usr/bin:/usr/local/bin")
    if ssh is None:
        pytest.skip("needs ssh")
    words = [ssh, *module.SSH[1:], "-G", "spark-b"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    [ciphers] = [line for line in done.stdout.splitlines() if line.startswith("ciphers ")]
    names = ciphers.removeprefix("ciphers ").split(",")
    assert names[0] == "aes128-gcm@openssh.com"
    # A server without it gets another one.
    assert "chacha20-poly1305@openssh.com" in names


def test_a_path_is_no_command(tmp_path: Path):
    source = big(tmp_path / "rows; touch $(echo here) 'x'\n.jsonl", 1000)
    _, files = by_content(source)
    ship(files, "spark-b", QUIET)
    assert Path(files[0].place).read_bytes() == source.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM])
def test_a_launcher_that_ends_leaves_no_process_on_the_other_node(
    how: signal.Signals, tmp_path: Path
):
    """While it sends: the source is a pipe-slow reader, so that it is surely in the middle of a
    piece.
    """
    program = f"""
import time
from tunesmith.launch import ship
slow = ship._Transfer._blocks
def blocks(*words):
    for block in slow(*words):
        print("sending", flush=True)
        time.sleep(0.5)
        yield block
ship._Transfer._blocks = blocks
ship.ship(ship.by_content(__import__("pathlib").Path({str(big(tmp_path / "rows.jsonl", 40 << 20))!r}))[1], "spark-b",
          ship.FetchProgress())
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "sending\n"
        wait_for(lambda: receivers(tmp_path), launcher)
        there = receivers(tmp_path)
        assert there
        launcher.send_signal(how)
        launcher.wait(60)
    deadline = time.monotonic() + 60
    while left := receivers(tmp_path):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def receivers(folder: Path) -> list[int]:
    """The processes of the other node: those that have this test's PATH and run the receiver."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words, environment = (place / "cmdline").read_bytes(), (place / "environ").read_bytes()
        except OSError:
            continue
        if b"sys.stdin.buffer.read(" in words and str(folder).encode() in environment:
            found.append(int(place.name))
    return found


def test_the_receiver_needs_no_newer_python_and_nothing_but_the_standard_library():
    import ast

    tree = ast.parse(
        Path(module.__file__).with_name("receiver.py").read_text(), feature_version=(3, 8)
    )
    imported = {
        name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    assert imported <= {*sys.stdlib_module_names}
    assert json.dumps(sorted(imported))


@pytest.mark.slow
def test_models_are_removed_by_pattern_on_other_nodes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from tunesmith.cli.main import main

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in (
        "models--meta-llama--Llama-3",
        "models--meta-llama--Other",
        "models--Qwen--Qwen3",
        "datasets--meta-llama--d",
    ):
        big(tmp_path / "hub" / name / "blobs/a", 10)
    _, files = by_content(big(tmp_path / "rows.jsonl", 10))
    ship(files, "spark-b", QUIET)
    there = lambda: sorted(path.name for path in (tmp_path / "hub").iterdir())  # noqa: E731
    assert main(["fetch", "--remove", "meta-llama/*", "--hosts", "spark-b", "--dry-run"]) == 0
    assert holds(capsys.readouterr().out, "spark-b", "models--meta-llama--Llama-3")
    assert len(there()) == 4
    assert main(["fetch", "--remove", "meta-llama/*", "--hosts", "spark-b"]) == 0
    assert there() == ["models--Qwen--Qwen3"]
    assert main(["fetch", "--remove", "*/../*", "--hosts", "spark-b"]) == 2
    assert main(["fetch", "--remove", "rows.jsonl--*", "--hosts", "spark-b"]) == 0
    assert not Path(files[0].place).exists()
    assert there() == ["models--Qwen--Qwen3"]
