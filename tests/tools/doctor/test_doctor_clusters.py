"""`tunesmith doctor` on the real thing: two nodes of Docker Swarm, two nodes of Slurm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from errors import holds
from launch.swarm_pair import Pair, missing_tools
from tunesmith.tools.doctor.checks import System
from tunesmith.tools.doctor.slurm import check_slurm
from waiting import wait_for

SLURM_TOOLS = ("munged", "slurmctld", "slurmd", "srun", "nsenter", "ip")
SLURM_PAIR = Path(__file__).parents[1] / "launch" / "slurm_pair.sh"
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def wrong(report: dict) -> list[str]:
    return [
        f"{f['host']}: {f['check']}: {f['level']}" for f in report["findings"] if f["level"] != "ok"
    ]


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
        found = wrong(doctor())
        assert [line for line in found if ": memory: " not in line] == cable
        b.docker("swarm", "leave")
        a.docker("swarm", "leave", "--force")
        assert {"spark-a: swarm: fault", "spark-b: swarm: fault"} <= {*wrong(doctor())}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a client of two real nodes."""
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run(["bash", SLURM_PAIR, "up", folder, "91"], check=True)
    yield {**os.environ, "PATH": PATH, "SLURM_CONF": f"{folder}/slurm.conf"}
    subprocess.run(["bash", SLURM_PAIR, "down", folder], check=True, capture_output=True)


def on_slurm(env: dict[str, str], *before: str, python: str = sys.executable) -> dict:
    command = [*before, python, "-m", "tunesmith", "doctor", "--slurm", "--json"]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "line", ["main|up|1|idle|(null)", "main|up|1|idle|(null)\nbig|up|2|mixed|gpu:8"]
)
def test_what_a_partition_lacks_is_named_in_words(
    line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer = lambda _, *command, **__: (0, line if command[0] == "sinfo" else "", "")  # noqa: E731
    monkeypatch.setattr(System, "run", answer)
    partitions = check_slurm(tmp_path)[0]
    assert "null" not in partitions.what
    assert holds(partitions.what, "main: 1")
    assert partitions.level == ("ok" if "gpu" in line else "warning")


@pytest.mark.nightly
@pytest.mark.slurm
@pytest.mark.skipif(
    os.geteuid() != 0 or any(shutil.which(tool, path=PATH) is None for tool in SLURM_TOOLS),
    reason="needs root and Slurm: make cluster-tools",
)
def test_a_real_cluster(
    slurm: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = on_slurm(slurm)
    assert wrong(report) == []
    assert {f["check"] for f in report["findings"]} == {"partitions", "srun"}
    assert holds(report["findings"][0]["what"], "main: 2", "gpu:2")

    mount = f'mount -t tmpfs tmpfs {tmp_path}; cd {tmp_path}; exec "$@"'
    found = on_slurm(slurm, "unshare", "--mount", "bash", "-c", mount, "-")["findings"][1:]
    assert [f["check"] for f in found] == ["folder", "folder"]
    assert str(tmp_path) in found[0]["what"]

    python = tmp_path / "own" / "python"
    python.parent.mkdir()
    link = (
        f'mount -t tmpfs tmpfs {python.parent}; ln -s {sys.executable} {python}; cd /tmp; exec "$@"'
    )
    env = slurm | {"PYTHONPATH": os.pathsep.join(sys.path)}
    hidden = ("unshare", "--mount", "bash", "-c", link, "-")
    found = on_slurm(env, *hidden, python=str(python))["findings"][1:]
    assert [(f["check"], f["level"]) for f in found] == [("environment", "fault")]
    assert str(python) in found[0]["what"]

    drain = ["scontrol", "update", "nodename=node1,node2", "state=drain", "reason=test"]
    subprocess.run(drain, env=slurm, check=True)
    found = [f["check"] for f in on_slurm(slurm)["findings"] if f["level"] == "fault"]
    assert found == ["partitions"]
    subprocess.run([*drain[:3], "state=resume"], env=slurm, check=True)
    wait_for(lambda: wrong(on_slurm(slurm)) == [])
    far = on_slurm(slurm | {"PATH": "/nowhere"})
    assert [(f["check"], f["level"]) for f in far["findings"]] == [("controller", "fault")]
