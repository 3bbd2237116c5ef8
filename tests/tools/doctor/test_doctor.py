"""`tunesmith doctor`: its words, the checks of one machine, and what its commands do.

No root is needed.
"""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from errors import holds
from invoke import invoke
from launch.spark_pair import TORCH
from tunesmith.host.chips import peak_of
from tunesmith.tools.doctor import checks as checks_module
from tunesmith.tools.doctor.checks import examine
from tunesmith.tools.doctor.pair import _compare, check_pair
from tunesmith.tools.doctor.system import (
    FAULT,
    OK,
    TEXTS,
    VERSIONS_PROGRAM,
    Finding,
    System,
    finding,
)

ROOM = Path(checks_module.__file__).parent
DOCS = Path(__file__).parents[3] / "docs"


def literals(file: Path) -> str:
    return "\n".join(
        node.value
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def test_each_finding_is_used_and_what_is_wrong_has_a_mend() -> None:
    code = "\n".join(literals(file) for file in ROOM.glob("*.py"))
    for key, (level, what, _, fix) in TEXTS.items():
        check, case = key.split("/", 1)
        assert level in ("ok", "warning", "fault")
        assert what
        assert bool(fix) == (level != "ok"), key
        assert key in code or (
            f"{check}/" in code and (check in ("ssh", "versions") or case in code.split())
        ), key


def test_the_page_names_every_check() -> None:
    page = (DOCS / "doctor.md").read_text()
    listed = set(re.findall(r"^\| ([\w.-]+) \|", page, re.M)) - {"check"}
    assert listed == {key.partition("/")[0] for key in TEXTS}


def test_what_runs_on_the_other_node_needs_nothing_but_python(tmp_path: Path) -> None:
    """The checks' imports are of the standard library and of each other."""
    for name in ("system", "checks"):
        tree = ast.parse((ROOM / f"{name}.py").read_text(), feature_version=(3, 9))
        found = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        found |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        others = {m for m in found if m and m.partition(".")[0] not in sys.stdlib_module_names}
        assert others <= {"tunesmith.tools.doctor.system"}


def test_torch_is_found_beside_a_source_tree_that_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "torch-2.11.0.dist-info").mkdir()
    (tmp_path / "torch-2.11.0.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.11.0\n")
    command, env = (
        [sys.executable, "-S", "-c", VERSIONS_PROGRAM],
        os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
    versions = json.loads(done.stdout)
    assert versions == {"python": platform.python_version(), "torch": "2.11.0"}


def put_command(folder: Path, name: str, output: str) -> None:
    """Write a program that prints `output`."""
    (folder / name).write_text(f"#!/bin/sh\ncat <<'X'\n{output}\nX\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def spark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of stand-ins for a Spark's programs and its torch, which reads torch.json."""
    put_command(tmp_path, "nvidia-smi", "NVIDIA GB10, GPU-a, 580.95.05\n")
    (tmp_path / "packages" / "torch").mkdir(parents=True)
    (tmp_path / "packages" / "torch" / "__init__.py").write_text(TORCH)
    (tmp_path / "packages" / "torch-2.13.0.dist-info").mkdir()
    (tmp_path / "packages" / "torch-2.13.0.dist-info" / "METADATA").write_text(
        "Name: torch\nVersion: 2.13.0\n"
    )
    put_torch(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv("SPARK_STATE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path


def put_torch(
    folder: Path, *, cuda: str | None = "13.0", tflops: float = 91, fails: str = ""
) -> None:
    state = {"cuda": cuda, "tflops": tflops, "fails": fails}
    (folder / "torch.json").write_text(json.dumps(state))


def results(*, pair: bool = False) -> dict[str, Finding]:
    return {result.check: result for result in examine(System(), pair=pair)}


@pytest.mark.parametrize("missing", ["[N/A]", "[Insufficient Permissions]"])
@pytest.mark.slow
def test_a_driver_version_that_nvidia_smi_does_not_print(missing: str, spark: Path) -> None:
    put_command(spark, "nvidia-smi", f"NVIDIA GB10, GPU-a, {missing}\n")
    found = results()
    assert found["driver"].level == OK
    assert holds(found["driver"].what, "1 x NVIDIA GB10", missing)
    assert found["torch"].level == OK
    assert holds(found["torch"].what, "torch 2.13.0", "CUDA 13.0", "NVIDIA GB10")
    assert found["clock"].level == OK


@pytest.mark.parametrize(
    ("cuda", "fails", "case", "shown"),
    [
        (None, "Torch not compiled with CUDA enabled", "without-cuda", "CPUs only"),
        ("12.4", "CUDA error: no kernel image is available for execution on the device\nadvice", "chip", "no code for NVIDIA GB10"),
        ("13.0", "CUDA error 100: no device\nadvice on debugging", "gpu", "RuntimeError: CUDA error 100: no device"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_why_torch_does_not_run(
    cuda: str | None, fails: str, case: str, shown: str, spark: Path
) -> None:
    """CUDA's errors end with lines of advice; the line with the cause is shown."""
    put_torch(spark, cuda=cuda, fails=fails)
    torch = results()["torch"]
    assert (torch.case, torch.level) == (case, FAULT)
    assert shown in torch.what


@pytest.mark.parametrize(("tflops", "level"), [(50, FAULT), (62, OK)])
@pytest.mark.slow
def test_a_low_power_state_shows_in_the_speed(tflops: float, level: str, spark: Path) -> None:
    """55 TFLOP/s is the limit; the stand-in is at most 10 % off."""
    put_torch(spark, tflops=tflops)
    assert results()["clock"].level == level


@pytest.mark.parametrize(
    ("runtime", "uuids", "case"),
    [
        ("nvidia", ["GPU-a"], "ok"),
        ("runc", ["GPU-a"], "runtime"),
        ("nvidia", ["GPU-of-another-machine"], "resource"),
        ("nvidia", [], "resource"),
    ],
)
def test_the_daemon_is_asked_for_the_gpus_that_it_offers(
    runtime: str, uuids: list[str], case: str, spark: Path
) -> None:
    """`GenericResources` as in the Engine API's SystemInfo: null without any."""
    offered = [{"NamedResourceSpec": {"Kind": "NVIDIA_GPU", "Value": uuid}} for uuid in uuids]
    swarm = {"LocalNodeState": "active", "NodeAddr": "192.168.177.1"}
    info = {
        "ServerVersion": "29.2.1",
        "DefaultRuntime": runtime,
        "GenericResources": offered or None,
        "Swarm": swarm,
    }
    put_command(spark, "docker", json.dumps(info))
    put_torch(spark, fails="not needed here")
    assert results(pair=True)["daemon.json"].case == case


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


def put_ssh(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a stand-in for ssh; `$last` is the command for the other node."""
    (folder / "ssh").write_text(f"#!/bin/sh\nfor last; do :; done\n{script}\n")
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


@pytest.mark.slow
def test_the_other_node_examines_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other node is this machine: every check runs twice, and nothing differs."""
    put_ssh(tmp_path, 'echo a banner; exec sh -c "$last"', monkeypatch)
    found = check_pair("spark-b")
    here = [(result.check, result.case) for result in found if not result.host]
    there = [(result.check, result.case) for result in found if result.host == "spark-b"]
    both = [(result.check, result.case) for result in found if result.host == "the pair"]
    assert here == there
    assert ("driver", "none") in here
    assert both[:2] == [("ssh", "ok"), ("versions", "ok")]


@pytest.mark.parametrize(
    ("message", "fix"),
    [
        ("root@spark-b: Permission denied (publickey).", "ssh-copy-id spark-b"),
        ("Host key verification failed.", "ssh-keygen -R spark-b"),
        ("ssh: connect to host spark-b port 22: Connection refused", "openssh-server"),
        ("ssh: Could not resolve hostname spark-b: Name or service not known", "/etc/hosts"),
        ("ssh: connect to host spark-b port 22: Connection timed out", "ping spark-b"),
    ],
)
def test_why_ssh_does_not_reach_the_other_node(
    message: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_ssh(tmp_path, f"echo '{message}' >&2; exit 255", monkeypatch)
    monkeypatch.setattr("tunesmith.tools.doctor.pair.examine", lambda *_, **__: [])
    (found,) = check_pair("spark-b")
    assert (found.host, found.check, found.level) == ("spark-b", "ssh", FAULT)
    assert fix in found.fix


def test_versions_that_differ_are_named() -> None:
    here = {"versions": {"torch": "2.13.0", "driver": "580.95.05"}, "managers": [], "cable": []}
    there = {**here, "versions": {"torch": "2.11.0"}}
    (found,) = _compare(here, there, "spark-b")
    assert holds(found.what, "2.13.0", "2.11.0", "spark-b")


def function_of_cable(address: str, **changed: object) -> dict[str, object]:
    """A function in the form of `ip -j addr`, with the values that `System.cable` adds."""
    entries = [{"family": "inet", "local": address, "prefixlen": 24}]
    function = {"ifname": "enp1s0f1np1", "operstate": "UP", "mtu": 9000, "addr_info": entries}
    return {**function, "device": "rocep1s0f1", "gids": ["1", "3"], **changed}


def test_ends_of_the_cable_in_two_subnets() -> None:
    nodes = [
        {"versions": {}, "managers": [], "cable": [function_of_cable(address)]}
        for address in ("192.168.177.1", "192.168.177.2", "192.168.178.2")
    ]
    assert [result.case for result in _compare(nodes[0], nodes[1], "spark-b")] == ["ok"]
    assert [result.case for result in _compare(nodes[0], nodes[2], "spark-b")] == ["ok", "apart"]


@pytest.mark.parametrize(
    ("changed", "forced", "checks"),
    [
        ({}, "-1", ["cable"]),
        ({}, "3", ["cable"]),
        ({"operstate": "DOWN", "mtu": 1500}, "-1", ["cable", "mtu"]),
        ({"gids": []}, "-1", ["gid"]),
        ({}, "0", ["gid"]),
    ],
)
def test_the_cable(
    changed: dict[str, object], forced: str, checks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """-1 is NCCL's default for NCCL_IB_GID_INDEX; 3 is an index of RoCE v2, and 0 is not."""
    system = System()
    monkeypatch.setitem(system.__dict__, "cable", [function_of_cable("192.168.177.1", **changed)])
    monkeypatch.setenv("NCCL_IB_GID_INDEX", forced)
    found = list(checks_module._cable(system))
    assert [result.check for result in found] == checks
    assert all(result.level == FAULT for result in found) == (found[0].case != "ok")


def test_the_port_with_the_cable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Spark's two ports have two functions each; the cable is in the second port."""
    names = "lo enp1s0f0np0 enp1s0f1np1 enP2p1s0f0np0 enP2p1s0f1np1 enP7s7".split()
    states = dict(zip(names, "UNKNOWN DOWN UP DOWN DOWN UP".split(), strict=True))
    rows = [
        {"ifname": name, "operstate": state, "mtu": 1500, "addr_info": []}
        for name, state in states.items()
    ]
    put_command(tmp_path, "ip", json.dumps(rows))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    names = [function["ifname"] for function in System().cable]
    assert names == ["enp1s0f1np1", "enP2p1s0f1np1"]
