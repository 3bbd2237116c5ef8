"""A run of another host, over a real ssh connection to this one."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tunesmith.errors import MachineError, UsageError
from tunesmith.report.run_files import RunFiles
from tunesmith.watch import remote
from tunesmith.watch.feed import open_run
from tunesmith.watch.remote import RemoteRun, split_remote
from waiting import wait_for
from watching import add_steps, ask, get, iter_events, ssh_here, watching, write_run


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[psutil.Process]:
    """An ssh server that `ssh box` reaches."""
    if not (Path("/usr/sbin/sshd").exists() and shutil.which("ssh") and shutil.which("ssh-keygen")):
        pytest.skip("sshd is not there: make cluster-tools")
    server, env = ssh_here(tmp_path_factory.mktemp("ssh") / "box")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", env["PATH"])
        yield psutil.Process(server.pid)
    server.kill()
    server.wait()


@pytest.fixture
def run(box: psutil.Process, tmp_path: Path) -> Iterator[tuple[Path, RemoteRun]]:
    folder = write_run(tmp_path / "my-run", 30, of=100, ranks=2)
    made = RemoteRun("box", str(folder))
    wait_for(lambda: made.refresh() or not made.lost)  # the server may still start
    yield folder, made
    made.close()
    wait_for(lambda: not box.children())  # nothing is left on the other side
    assert not made.copy.parent.exists()


def test_the_copy_is_the_run_and_follows_it(run: tuple[Path, RemoteRun]) -> None:
    folder, there = run
    there.check()
    sent = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {str(path.relative_to(there.copy)) for path in there.copy.rglob("*") if path.is_file()} == sent
    files = RunFiles(there.copy)
    assert (files.name, files.state, files.columns["step"][-1]) == ("my-run", "killed", 30)
    add_steps(folder, 31, 40)
    (folder / "failure.json").write_text(json.dumps({"what": "it broke"}))
    there.refresh()
    assert files.refresh()
    assert (files.state, files.columns["step"]) == ("failed", list(range(1, 41)))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.new").write_text("".join(lines[:10]))  # a resume cuts back and moves into place
    os.replace(folder / "metrics.new", folder / "metrics.jsonl")
    (folder / "failure.json").unlink()
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        there.refresh()
        files.refresh()
        assert (files.state, files.columns["step"], files.failure) == ("running", list(range(1, 11)), None)
    there.refresh()
    files.refresh()
    assert files.state == "killed"
    for name in ("metrics.jsonl", "metrics-rank1.jsonl", "config.yaml"):
        assert (there.copy / name).read_bytes() == (folder / name).read_bytes()


def test_a_connection_that_breaks_is_made_anew(
    run: tuple[Path, RemoteRun], box: psutil.Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, there = run
    for child in box.children(recursive=True):
        child.send_signal(signal.SIGKILL)
    add_steps(folder, 31, 32)
    there.refresh()
    assert there.lost
    there.refresh()  # not at once
    assert there.lost
    monkeypatch.setattr(remote, "AGAIN", 0.0)
    there.refresh()
    assert there.lost == ""
    assert (there.copy / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_what_the_other_side_may_name() -> None:
    for name in ("../x", "/etc/passwd", ".lock", "final/../x", "config.yaml/x", "a b.json", "final/model.json"):
        assert remote._NAME.fullmatch(name) is None, name
    assert remote._NAME.fullmatch("metrics-rank3.jsonl")
    assert remote._NAME.fullmatch("final/manifest.json")


def test_the_page_of_a_run_of_another_host(run: tuple[Path, RemoteRun]) -> None:
    folder, _ = run
    with watching(f"box:{folder}") as (address, process):
        assert ask(address)[0] == 200
        told = next(line for line in iter_events(address) if line.startswith(b"data: "))
        assert (
            f"tunesmith train {folder}/config.yaml" in json.loads(told[6:])["runs"][0]["end"]["next"]
        )  # its path there
        assert get(address, "curves?panels=1")[0]["series"][0]["x"][-1] == 30
        assert [child.name() for child in psutil.Process(process.pid).children()] == ["ssh"]


def test_hosts_and_folders_that_are_not_there(box: psutil.Process, tmp_path: Path) -> None:
    assert split_remote("ada@spark-b:runs/x y") == ("ada@spark-b", "runs/x y")
    for word in ("-oProxyCommand=x:run", "box:", ":run", "a b:run"):
        with pytest.raises(UsageError):
            split_remote(word)
    with pytest.raises(UsageError, match="no such run directory"), open_run(f"box:{tmp_path}/missing"):
        pass
    with pytest.raises(MachineError, match="cannot be reached"), open_run("nowhere.invalid:run"):
        pass
