"""`tunesmith doctor`: the checks of one machine and of a pair, and what its commands do."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from errors import refuses
from invoke import invoke
from tunesmith.errors import UsageError
from tunesmith.host.chips import peak_of
from tunesmith.tools.doctor import checks as checks_module
from tunesmith.tools.doctor.checks import System, examine
from tunesmith.tools.doctor.findings import TEXTS, finding
from tunesmith.tools.doctor.pair import _compare, check_pair

DOCS = Path(__file__).parents[3] / "docs"


def test_the_page_names_every_check() -> None:
    page = (DOCS / "doctor.md").read_text()
    listed = set(re.findall(r"^\| ([\w.-]+) \|", page, re.M)) - {"check"}
    assert listed == {key.partition("/")[0] for key in TEXTS}


def test_this_node_is_no_pair_with_itself() -> None:
    with refuses(UsageError, where="--pair", names=["127.0.0.1"]):
        check_pair("127.0.0.1")


def test_what_runs_on_the_other_node_needs_nothing_but_python(tmp_path: Path) -> None:
    tree = ast.parse(Path(checks_module.__file__).read_text(), feature_version=(3, 9))
    found = {n.module or "." for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    found |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert {name.partition(".")[0] for name in found} <= sys.stdlib_module_names


GPU = {"NamedResourceSpec": {"Kind": "NVIDIA_GPU", "Value": "GPU-a"}}
SWARM = {"LocalNodeState": "active", "NodeAddr": "192.168.177.1", "Error": ""}
INFO = {
    "ServerVersion": "29",
    "DefaultRuntime": "nvidia",
    "GenericResources": [GPU],
    "Swarm": SWARM,
}
MEMORY = "MemTotal: 125500000 kB\nMemFree: {} kB\nMemAvailable: {} kB\nCached: {} kB"
# What the commands print and the files hold on a DGX Spark that lacks nothing.
HEALTHY: dict[str, Any] = {
    "nvidia-smi": "NVIDIA GB10, GPU-a, 580.95.05", "docker": json.dumps(INFO), "python": "CUDA 13.0\nTFLOP/s 91",
    "nvidia-ctk": "NVIDIA Container Toolkit CLI version 1.19.0", "/proc/meminfo": MEMORY.format(90 << 20, 110 << 20, 8 << 20),
    checks_module.TOML: 'swarm-resource = "DOCKER_RESOURCE_NVIDIA_GPU"\n[nvidia-container-runtime]\nmode = "auto"',
}  # fmt: skip


class Spark(System):
    """One whose commands and files give these answers: a text, or exit code, stdout and stderr."""

    def __init__(self, changes: dict[str, Any]) -> None:
        super().__init__()
        self.answers, self.python = HEALTHY | changes, "python"
        addresses = [{"family": "inet", "local": "192.168.177.1", "prefixlen": 24}]
        function = {"ifname": "enp1s0f1np1", "operstate": "UP", "mtu": 9000, "addr_info": addresses}
        function |= {"device": "rocep1s0f1", "gids": ["1", "3"], **changes.get("cable", {})}
        self.__dict__ |= {"cable": [function]}

    def run(self, *command: str, limit: float = 10.0) -> tuple[int, str, str]:
        if command[2:] == (checks_module.VERSION,):
            return 0, "2.13.0", ""
        answer = self.answers[command[0]]
        return answer if isinstance(answer, tuple) else (0, answer, "")

    def read(self, path: str) -> str:
        return self.answers[path]


NO_GPU = {"GenericResources": None}  # as in the Engine API's SystemInfo
OTHER_GPU = {"GenericResources": [{"NamedResourceSpec": {"Kind": "NVIDIA_GPU", "Value": "GPU-b"}}]}
ADVICE = "\nadvice on debugging"


@pytest.mark.parametrize(
    ("changes", "faults", "shown"),
    [
        ({}, [], ""),
        ({"nvidia-smi": (9, "", "Driver/library version mismatch")}, ["driver/fails"], "version mismatch"),
        ({"nvidia-smi": "NVIDIA GB10, GPU-a, 570.86.10"}, ["driver/old"], "570.86.10"),
        ({"nvidia-smi": "NVIDIA GB10, GPU-a, [N/A]"}, [], ""),
        ({"python": (1, "CUDA None", "")}, ["torch/without-cuda"], "2.13.0"),
        ({"python": (1, "CUDA 12.4", f"no kernel image is available{ADVICE}")}, ["torch/chip"], "NVIDIA GB10"),
        ({"python": (1, "CUDA 13.0", f"RuntimeError: no device{ADVICE}")}, ["torch/gpu"], "RuntimeError: no device"),
        ({"python": "CUDA 13.0\nTFLOP/s 54"}, ["clock/low"], "54"),
        ({"/proc/meminfo": MEMORY.format(900_000, 118_000_000, 110_000_000)}, ["memory/cache"], "0.9"),
        ({"/proc/meminfo": MEMORY.format(900_000, 1_000_000, 500_000)}, ["memory/none"], "1.0"),
        ({"docker": (1, "", "Cannot connect to the Docker daemon")}, ["docker/down"], ""),
        ({"docker": (1, "", "permission denied while trying")}, ["docker/group"], ""),
        ({"nvidia-ctk": (127, "", "")}, ["toolkit/absent"], ""),
        ({"nvidia-ctk": "CLI version 1.18.1"}, ["toolkit/swarm"], "1.18.1"),
        ({"docker": json.dumps(INFO | {"DefaultRuntime": "runc"})}, ["daemon.json/runtime"], ""),
        ({"docker": json.dumps(INFO | NO_GPU)}, ["daemon.json/resource"], ""),
        ({"docker": json.dumps(INFO | OTHER_GPU)}, ["daemon.json/resource"], "GPU-b"),
        ({checks_module.TOML: '#swarm-resource = "DOCKER_RESOURCE_NVIDIA_GPU"'}, ["swarm-resource/absent"], ""),
        ({"docker": json.dumps(INFO | {"Swarm": {"LocalNodeState": "inactive"}})}, ["swarm/absent"], "inactive"),
        ({"cable": {"operstate": "DOWN", "mtu": 1500}}, ["cable/down", "mtu/other"], "enp1s0f1np1"),
        ({"cable": {"gids": []}}, ["gid/none"], "rocep1s0f1"),
        ({"cable": {"gids": ["5"]}}, ["gid/forced"], "5"),
    ],
)  # fmt: skip
def test_each_fault_is_named_with_its_mend_and_nothing_else(
    changes: dict[str, Any], faults: list[str], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_IB_GID_INDEX", "3")
    found = [finding(key, **values) for key, values in examine(Spark(changes), pair=True)]
    found = [one for one in found if one.level != "ok"]
    assert [f"{one.check}/{one.case}" for one in found] == faults
    assert all(shown in one.what and one.fix for one in found)


def test_a_machine_without_gpu_and_docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = os.environ["PATH"].split(os.pathsep)
    without = [folder for folder in folders if not (Path(folder) / "docker").exists()]
    monkeypatch.setenv("PATH", os.pathsep.join(without))
    done = invoke("doctor", "--json")
    report = json.loads(done.out)
    assert (done.code, report["passed"]) == (0, True)
    assert {f["check"] for f in report["findings"]} == {"driver", "torch", "memory"}
    assert peak_of("NVIDIA GB10").tflops == checks_module.GB10_TFLOPS, "it stands in two places"


def test_the_command_for_the_resource_of_swarm_keeps_what_else_is_set(tmp_path: Path) -> None:
    file = tmp_path / "daemon.json"
    file.write_text('{"log-driver": "local", "node-generic-resources": ["NVIDIA_GPU=other"]}')
    fix = finding("daemon.json/resource", named="other", uuids="GPU-1 GPU-2").fix
    command = fix.replace("/etc/docker/daemon.json", str(file)).replace("sudo ", "")
    subprocess.run(["bash", "-c", command.partition(" && ")[0]], check=True)
    assert json.loads(file.read_text()) == {
        "log-driver": "local",
        "node-generic-resources": ["NVIDIA_GPU=GPU-1", "NVIDIA_GPU=GPU-2"],
    }


def put_command(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


@pytest.mark.slow
def test_the_other_node_examines_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other node is this machine: every check runs twice, and nothing differs."""
    ssh = 'for last; do :; done\necho a banner; exec sh -c "$last"'
    put_command(tmp_path, "ssh", ssh, monkeypatch)
    found = check_pair("spark-b")
    here, there, both = (
        [(result.check, result.case) for result in found if result.host == host]
        for host in ("", "spark-b", "the pair")
    )
    assert here == there
    assert ("driver", "none") in here
    assert both[0] == ("ssh", "ok")
    with refuses(UsageError, where="--pair", names=["-oProxyCommand"]):
        check_pair("-oProxyCommand=touch /tmp/pwned")


@pytest.mark.parametrize(
    ("message", "fix"),
    [
        ("root@spark-b: Permission denied (publickey).", "ssh-copy-id spark-b"),
        ("Host key verification failed.", "ssh-keygen -R spark-b"),
        ("ssh: connect to host spark-b port 22: Connection refused", "openssh-server"),
        ("ssh: Could not resolve hostname spark-b: Name or service not known", "/etc/hosts"),
    ],
)
def test_why_ssh_does_not_reach_the_other_node(
    message: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_command(tmp_path, "ssh", f"echo '{message}' >&2; exit 255", monkeypatch)
    monkeypatch.setattr("tunesmith.tools.doctor.pair.examine", lambda *_, **__: [])
    (found,) = check_pair("spark-b")
    assert (found.host, found.check, found.level) == ("spark-b", "ssh", "fault")
    assert fix in found.fix


def test_what_differs_between_the_nodes_is_named() -> None:
    here, there = ({"managers": ["a:2377"], "cable": Spark({}).cable} for _ in "ab")
    assert _compare(here, there, "spark-b") == []
    addresses = [{"family": "inet", "local": "192.168.178.2", "prefixlen": 24}]
    there = {"managers": ["b:2377"], "cable": Spark({"cable": {"addr_info": addresses}}).cable}
    swarm, address = _compare(here, there, "spark-b")
    assert (swarm.case, address.case) == ("two", "apart")


def test_the_port_with_the_cable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Spark's two ports have two functions each; the cable is in the second port."""
    names = "lo enp1s0f0np0 enp1s0f1np1 enP2p1s0f0np0 enP2p1s0f1np1 enP7s7".split()
    states = "UNKNOWN DOWN UP DOWN DOWN UP".split()
    rows = [{"ifname": n, "operstate": s} for n, s in zip(names, states, strict=True)]
    put_command(tmp_path, "ip", f"echo '{json.dumps(rows)}'", monkeypatch)
    functions = [function["ifname"] for function in System().cable]
    assert functions == ["enp1s0f1np1", "enP2p1s0f1np1"]
