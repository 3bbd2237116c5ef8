"""The checks of one machine.

This file uses the standard library only: pair.py runs it on the other node too.
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
# The generic resource that a swarm's tasks ask for
RESOURCE = "NVIDIA_GPU"
# Seconds to import torch and run LOAD
TORCH_SECONDS = 30.0
# The value of host/chips.json, which the other node of a pair may lack
GB10_TFLOPS = 92
# Prints the CUDA version that torch was built for, and the GPU's speed in a second of products
# that need 100 MB.
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
    # The order is that of the causes: each case makes the later ones meaningless.
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
    # CUDA's errors end with lines of general advice.
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
        # nvidia-smi does not show every low-power state; the speed does.
        tflops = float(speed[1])
        case = "low" if tflops < 0.6 * GB10_TFLOPS else "ok"
        yield finding(f"clock/{case}", tflops=tflops)


def _memory(system: System) -> Findings:
    rows = re.findall(r"^(\w+): +(\d+) kB", system.read("/proc/meminfo"), re.M)
    if not rows:
        return  # not Linux
    gib = {name: int(kib) / 2**20 for name, kib in rows}
    case = "ok"
    if gib["MemAvailable"] < 2:
        case = "none"
    elif system.is_spark and gib["MemFree"] < 8 < gib["Cached"]:
        # Files that were read fill the memory, and the driver finds no large free pieces.
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
    # The legacy mode of 1.18 supports Swarm's resources.
    is_legacy = re.search(r'^\s*mode\s*=\s*"legacy"', system.read(TOML), re.M)
    case = "swarm" if version[1] == "1.18" and not is_legacy else "ok"
    yield finding(f"toolkit/{case}", version=version[0])


def _daemon(system: System) -> Findings:
    """Check that the daemon gives each task of a swarm its GPU.

    The daemon is asked, not its file: it reads the file only when it starts.
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
    # Docker puts DOCKER_RESOURCE_ before the resource's name in the variable that it sets.
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
    """Check that the port's functions are up, with MTU 9000 and a RoCE v2 address each."""
    functions = system.cable
    if not functions:
        yield finding("cable/absent")
        return
    # -1 is NCCL's default: it finds the index by itself.
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
    """Return the findings of this machine, or of a node of a pair.

    One machine trains without Docker: faults of Docker are warnings there.
    """
    docker = system.docker
    checks: list[Check] = [_driver, _torch, _memory]
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
    """Return the properties of a node that a pair compares."""
    managers = system.docker.get("Swarm", {}).get("RemoteManagers") or []
    return {
        "versions": system.versions,
        "cable": system.cable,
        "managers": [manager["Addr"] for manager in managers],
    }


def answer_peer() -> None:
    """Print the findings and properties of the other node; the first word is its interpreter."""
    system = System(python=sys.argv[1])
    findings = [asdict(result) for result in examine(system, pair=True)]
    print(json.dumps([findings, properties(system)]))
