"""`tunesmith doctor` on the real thing: two nodes of Docker Swarm, two nodes of Slurm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from errors import holds
from launch.swarm_pair import Pair, missing_tools
from tunesmith.tools.doctor.slurm import check_slurm
from tunesmith.tools.doctor.system import System

SLURM_TOOLS = ("munged", "slurmctld", "slurmd", "srun", "nsenter", "ip")
SLURM_PAIR = Path(__file__).parents[1] / "launch" / "slurm_pair.sh"
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def wrong(report: dict) -> list[str]:
    return [
        f"{f['host']}: {f['check']}: {f['level']}" for f in report["findings"] if f["level"] != "ok"
    ]


def wrong_of_the_pair(report: dict) -> list[str]:
    """Return the lines of `wrong` except memory, which is the test machine's."""
    return [line for line in wrong(report) if line.split(": ")[1] != "memory"]


@pytest.mark.nightly
@pytest.mark.swarm
@pytest.mark.skipif(missing_tools() != "", reason=missing_tools())
def test_a_real_swarm() -> None:
    """In a swarm: green. Out of it: named."""
    with Pair(
        Path(tempfile.mkdtemp(prefix="td-"))
    ) as pair:  # short: a path of a socket ends at 108 bytes
        a, b = pair.nodes

        def doctor(*words: str) -> dict:
            command = (sys.executable, "-m", "tunesmith", "doctor", "--pair", "spark-b", "--json")
            return json.loads(a.run(*command, *words, ok=True).stdout)

        cable = ["spark-a: cable: warning", "spark-b: cable: warning"]  # there is no RDMA port
        report = doctor()
        assert wrong_of_the_pair(report) == cable
        assert any("swarm" in f["what"] for f in report["findings"])
        b.docker("swarm", "leave")
        a.docker("swarm", "leave", "--force")
        assert {"spark-a: swarm: fault", "spark-b: swarm: fault"} <= {*wrong(doctor())}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a client of two real nodes."""
    folder = tmp_path_factory.mktemp("slurm")
    for number in ("91", "92"):  # another test of this machine may have one
        made = subprocess.run(
            ["bash", SLURM_PAIR, "up", folder, number], capture_output=True, text=True, check=False
        )
        if made.returncode == 0:
            break
        subprocess.run(["bash", SLURM_PAIR, "down", folder], capture_output=True, check=False)
    assert made.returncode == 0, made.stderr
    yield {**os.environ, "PATH": PATH, "SLURM_CONF": f"{folder}/slurm.conf"}
    subprocess.run(["bash", SLURM_PAIR, "down", folder], check=True, capture_output=True)


def on_slurm(
    env: dict[str, str], *before: str, cwd: Path | None = None, python: str = sys.executable
) -> dict:
    command = [*before, python, "-m", "tunesmith", "doctor", "--slurm", "--json"]
    done = subprocess.run(
        command, env=env, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


def test_what_a_partition_lacks_is_named_in_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = "main|up|1|idle|(null)\nbig|up|2|mixed|gpu:8"
    monkeypatch.setattr(
        System, "run", lambda _, *command, **__: (0, lines if command[0] == "sinfo" else "", "")
    )
    shown = check_slurm(tmp_path)[0].what
    assert "null" not in shown
    assert holds(shown, "main: 1", "big: 2", "gpu:8")


def test_a_cluster_without_gpus_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(System, "run", lambda *_, **__: (0, "main|up|1|idle|(null)", ""))
    partitions = check_slurm(tmp_path)[0]
    assert (partitions.check, partitions.level) == ("partitions", "warning")


@pytest.mark.nightly
@pytest.mark.slurm
@pytest.mark.skipif(
    os.geteuid() != 0 or any(shutil.which(tool, path=PATH) is None for tool in SLURM_TOOLS),
    reason="needs root and Slurm: make cluster-tools",
)
def test_a_real_cluster(slurm: dict[str, str], tmp_path: Path) -> None:
    report = on_slurm(slurm, cwd=tmp_path)
    assert wrong(report) == []
    assert {f["check"] for f in report["findings"]} == {"partitions", "srun"}
    assert holds(report["findings"][0]["what"], "main: 2", "gpu:2")

    mount = f'mount -t tmpfs tmpfs {tmp_path}; cd {tmp_path}; exec "$@"'
    hidden = ("unshare", "--mount", "bash", "-c", mount, "-")
    found = on_slurm(slurm, *hidden)["findings"][1:]
    assert [f["check"] for f in found] == ["folder", "folder"]
    assert str(tmp_path) in found[0]["what"]

    place = tmp_path / "own"
    place.mkdir()
    link = (
        f'mount -t tmpfs tmpfs {place}; ln -s {sys.executable} {place}/python; cd /tmp; exec "$@"'
    )
    env = slurm | {"PYTHONPATH": os.pathsep.join(sys.path)}
    found = on_slurm(env, "unshare", "--mount", "bash", "-c", link, "-", python=f"{place}/python")[
        "findings"
    ][1:]
    assert [(f["check"], f["level"]) for f in found] == [("environment", "fault")]
    assert f"{place}/python" in found[0]["what"]

    drain = ["scontrol", "update", "nodename=node1,node2", "state=drain", "reason=test"]
    subprocess.run(drain, env=slurm, check=True)
    assert [f["check"] for f in on_slurm(slurm)["findings"] if f["level"] == "fault"] == [
        "partitions"
    ]
    subprocess.run([*drain[:3], "state=resume"], env=slurm, check=True)
    wait = time.monotonic() + 20
    while time.monotonic() < wait and wrong(on_slurm(slurm, cwd=tmp_path)):
        time.sleep(0.5)
    assert wrong(on_slurm(slurm, cwd=tmp_path)) == []
    far = on_slurm(slurm | {"PATH": "/nowhere"})
    assert [(f["check"], f["level"]) for f in far["findings"]] == [("controller", "fault")]
