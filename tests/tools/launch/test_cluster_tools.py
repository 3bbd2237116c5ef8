"""`make cluster-tools` where it cannot install anything: one line says what is missing.

It runs for real in CI.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from errors import holds

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / ".ci" / "cluster-tools"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder of commands that is the whole PATH, and a copy of the script that has found no
    image.
    """
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("sh", "dirname", "tr", "id", "echo"):
        found = shutil.which(name)
        assert found is not None
        (commands / name).symlink_to(found)
    (tmp_path / ".ci").mkdir()
    script = SCRIPT.read_text().replace("PATH=$PATH:/usr/sbin:/sbin", "")
    assert script != SCRIPT.read_text()
    (tmp_path / ".ci" / "cluster-tools").write_text(script)
    return tmp_path


def call(machine: Path, user: int = 0) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(machine / ".ci" / "cluster-tools")]
    if user:
        (machine / "bin" / "id").unlink()
        (machine / "bin" / "id").write_text(f"#!/bin/sh\necho {user}\n")
        (machine / "bin" / "id").chmod(0o755)
    env = {"PATH": str(machine / "bin")}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_on_another_system_a_line_says_what_is_missing(machine: Path) -> None:
    done = call(machine)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert holds(done.stderr, "cluster-tools", "Debian", "slurmctld slurmd munged dockerd")


def test_without_root_a_line_says_what_is_missing(machine: Path) -> None:
    (machine / "bin" / "apt-get").symlink_to(machine / "bin" / "sh")
    (machine / "bin" / "slurmctld").symlink_to(machine / "bin" / "sh")
    done = call(machine, user=1000)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert holds(done.stderr, "root", "slurmd munged dockerd", "slurm-wlm munge docker.io tini")
    assert not holds(done.stderr, "slurmctld")
    assert done.stderr.endswith("sudo make cluster-tools\n")


def test_it_takes_a_moment_where_all_is_there(machine: Path) -> None:
    """And asks nothing of apt-get, which is not there."""
    for tool in SCRIPT.read_text().split('TOOLS="')[1].split('"')[0].split():
        (machine / "bin" / tool.partition(":")[0]).symlink_to(shutil.which("true") or "/bin/true")
    (machine / ".docker").mkdir()
    (machine / ".docker" / "python.tar").write_text("an image")
    done = call(machine)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("cluster-tools: ")


def test_ci_runs_it_before_check_and_test() -> None:
    words = [
        line.split()
        for line in (ROOT / ".ci" / "run").read_text().splitlines()
        if line.startswith("make ")
    ]
    assert [line[:2] for line in words] == [
        ["make", "cluster-tools"],
        ["make", "check"],
        ["make", "families"],
        ["make", "test"],
    ]
