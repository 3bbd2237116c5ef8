"""Checks of one machine for `tunesmith doctor`.

This file uses only the standard library, because pair.py also runs it on the other node of a pair,
where other packages may be missing.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

from tunesmith.tools.doctor.system import (
    FAULT,
    WARNING,
    Finding,
    System,
    finding,
)

TOML = "/etc/nvidia-container-runtime/config.toml"
# Name of the generic resource of Docker Swarm that represents GPUs. Tasks reserve GPUs by this
# name.
RESOURCE = "NVIDIA_GPU"
# Maximum number of seconds to import torch and run the program LOAD.
TORCH_SECONDS = 30.0
# Matmul speed of a GB10. The value is copied from host/chips.json, because the other node of a pair
# may not have this file.
GB10_TFLOPS = 92
# Program that prints torch's CUDA version and the GPU's matmul speed. It multiplies matrices for
# one second and needs 100 MB of GPU memory.
LOAD = """
import time, torch
print("CUDA", torch.version.cuda, flush=True)
x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
x @ x
torch.cuda.synchronize()
begin = time.monotonic()
count = 0
while time.monotonic() < begin + 1:
    for _ in range(10):
        x @ x
    torch.cuda.synchronize()
    count += 10
print("TFLOP/s", 2 * 4096**3 * count / (time.monotonic() - begin) / 1e12)
"""

Findings = Iterator[Finding]
Check = Callable[[System], Findings]


def _driver(system: System) -> Findings:
    code, out, errors = system.smi
    if system.gpus:
        gpu = system.gpus[0]
        major = gpu.driver.partition(".")[0]
        is_old = system.is_spark and major.isdecimal() and int(major) < 580
        case = "old" if is_old else "ok"
        yield finding(f"driver/{case}", count=len(system.gpus), **gpu._asdict())
    elif code != 127:
        yield finding("driver/fails", message=errors or out)
    elif system.has_nvidia:
        yield finding("driver/absent")
    else:
        yield finding("driver/none")


def _torch(system: System) -> Findings:
    """Check that torch runs on the GPU, and that a GB10 is not in a low-power state."""
    version = system.versions.get("torch")
    if not version or not system.gpus:
        case = "cpu" if version else "absent"
        yield finding(f"torch/{case}", version=version, python=system.python)
        return
    code, out, errors = system.run(system.python, "-c", LOAD, limit=TORCH_SECONDS)
    cuda = re.search(r"^CUDA (.+)$", out, re.M)
    # The order of the checks matters: if a check finds a problem, the checks after it are
    # meaningless.
    if not cuda:
        case = "broken"
    elif cuda[1] == "None":
        case = "without-cuda"
    elif "no kernel image is available" in errors:
        case = "chip"
    elif code:
        case = "gpu"
    else:
        case = "ok"
    # Select the line with the exception, because CUDA appends lines with general advice.
    messages = re.findall(r"^\S+(?:Error|Exception): .*", errors, re.M) or [errors]
    yield finding(
        f"torch/{case}",
        version=version,
        python=system.python,
        chip=system.gpus[0].name,
        cuda=cuda and cuda[1],
        message=messages[-1],
    )
    speed = re.search(r"^TFLOP/s (.+)$", out, re.M)
    if system.is_spark and speed:
        # Detect a low-power state by the measured speed, because nvidia-smi does not show all
        # low-power states.
        tflops = float(speed[1])
        case = "low" if tflops < 0.6 * GB10_TFLOPS else "ok"
        yield finding(f"clock/{case}", tflops=tflops)


def _memory(system: System) -> Findings:
    rows = re.findall(r"^(\w+): +(\d+) kB", system.read("/proc/meminfo"), re.M)
    if not rows:
        return  # /proc/meminfo exists only on Linux
    gib = {name: int(kib) / 2**20 for name, kib in rows}
    case = "ok"
    if gib["MemAvailable"] < 2:
        case = "none"
    elif system.is_spark and gib["MemFree"] < 8 < gib["Cached"]:
        # "cache" means that the page cache fills the memory, so that the GPU driver finds no large
        # free blocks.
        case = "cache"
    yield finding(f"memory/{case}", gib=gib)


def _docker(system: System) -> Findings:
    reason = system.docker.get("refused", "")
    case = "down" if reason else "ok"
    if system.docker.get("absent"):
        case = "absent"
    elif "permission denied" in reason:
        case = "group"
    yield finding(f"docker/{case}", message=reason, version=system.docker.get("ServerVersion"))


def _toolkit(system: System) -> Findings:
    version = re.search(r"(\d+\.\d+)\.\d+", system.run("nvidia-ctk", "--version")[1])
    if not version:
        yield finding("toolkit/absent")
        return
    # Version 1.18 of NVIDIA's container toolkit supports Swarm resources only in its legacy mode.
    is_legacy = re.search(r'^\s*mode\s*=\s*"legacy"', system.read(TOML), re.M)
    case = "swarm" if version[1] == "1.18" and not is_legacy else "ok"
    yield finding(f"toolkit/{case}", version=version[0])


def _daemon(system: System) -> Findings:
    """Check that the Docker daemon gives each task of a swarm its GPU.

    The check queries the running daemon instead of reading daemon.json, because the daemon reads
    the file only at its start.
    """
    named = []
    for resource in system.docker.get("GenericResources") or []:
        spec = resource.get("NamedResourceSpec") or {}
        if spec.get("Kind") == RESOURCE:
            named.append(spec["Value"])
    uuids = [gpu.uuid for gpu in system.gpus]
    if system.docker.get("DefaultRuntime") != "nvidia":
        yield finding("daemon.json/runtime")
    elif sorted(named) != sorted(uuids):
        shown = ", ".join(named) or "nothing"
        yield finding("daemon.json/resource", named=shown, uuids=" ".join(uuids))
    else:
        yield finding("daemon.json/ok")


def _swarm_resource(system: System) -> Findings:
    # Docker passes the reserved GPUs to a container in the variable DOCKER_RESOURCE_<resource
    # name>. The toolkit's config must name this variable.
    line = rf'^\s*swarm-resource\s*=\s*"(.*,)?\s*DOCKER_RESOURCE_{RESOURCE}\s*(,.*)?"'
    is_right = re.search(line, system.read(TOML), re.M)
    yield finding("swarm-resource/ok" if is_right else "swarm-resource/absent")


def _swarm(system: System) -> Findings:
    swarm = system.docker.get("Swarm", {})
    state = swarm.get("LocalNodeState")
    case = "ok" if state == "active" else "absent"
    message = swarm.get("Error", "")
    yield finding(f"swarm/{case}", state=state, message=message, address=swarm.get("NodeAddr"))


def _cable(system: System) -> Findings:
    """Check the port whose cable connects the two nodes.

    A port has one or more PCIe functions, and each function is a network interface. Each interface
    must be up and have MTU 9000 and a RoCE v2 address.
    """
    functions = system.cable
    if not functions:
        yield finding("cable/absent")
        return
    # -1 is NCCL's default. It means that NCCL selects the GID index.
    forced = os.environ.get("NCCL_IB_GID_INDEX", "-1")
    faults = []
    for function in functions:
        gids = function["gids"]
        is_wrong = {
            "cable/down": function["operstate"] != "UP",
            "mtu/other": function["mtu"] != 9000,
            "gid/none": function["device"] and not gids,
            "gid/forced": gids and forced not in ("-1", *gids),
        }
        values = {**function, "forced": forced, "indexes": " and ".join(gids)}
        faults += [finding(key, **values) for key, wrong in is_wrong.items() if wrong]
    names = " and ".join(function["ifname"] for function in functions)
    yield from faults or [finding("cable/ok", names=names)]


def examine(system: System, *, pair: bool) -> list[Finding]:
    """Run the checks on this machine and return their findings.

    Args:
        pair: whether the machine is a node of a pair. A single machine does not require Docker, so
            problems with Docker are only warnings.
    """
    docker = system.docker
    checks = [_driver, _torch, _memory]
    if pair or not docker.get("absent"):
        checks += [_docker, _toolkit] if system.gpus else [_docker]
    if pair and "refused" not in docker:
        checks += [_swarm, _daemon, _swarm_resource] if system.gpus else [_swarm]
    if pair:
        checks.append(_cable)
    findings = []
    for check in checks:
        for result in check(system):
            is_minor = check in (_docker, _toolkit) and result.level == FAULT and not pair
            findings.append(replace(result, level=WARNING) if is_minor else result)
    return findings


def properties(system: System) -> dict[str, Any]:
    """Return the properties of this node that are compared with those of the other node."""
    managers = system.docker.get("Swarm", {}).get("RemoteManagers") or []
    return {
        "versions": system.versions,
        "cable": system.cable,
        "managers": [manager["Addr"] for manager in managers],
    }


def answer_peer() -> None:
    """Print the findings and properties of this node as JSON. The other node of a pair reads them.

    The first command-line argument is the path of the interpreter to check.
    """
    system = System(python=sys.argv[1])
    findings = [asdict(result) for result in examine(system, pair=True)]
    print(json.dumps([findings, properties(system)]))
