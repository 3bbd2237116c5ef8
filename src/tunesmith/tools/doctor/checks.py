"""The checks of one machine. Standard library alone, as pair.py runs them on the other node too."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from glob import glob
from typing import TypedDict

from tunesmith.tools.doctor.system import (
    FAULT,
    GIB,
    CableFunction,
    Finding,
    Gpu,
    NodeProperties,
    System,
    finding,
)

TOML = "/etc/nvidia-container-runtime/config.toml"
# The generic resource that a swarm's tasks ask for
RESOURCE = "NVIDIA_GPU"
# For torch to be imported and the GPU to be loaded
TORCH_SECONDS = 30.0
# As in host/chips.json, which the other node of a pair may lack
GB10_TFLOPS = 92
# Where an interface's address is stored over a reboot. Their names hold that of the interface;
# their text is often root's alone.
NETWORK_FILES = (
    "/run/systemd/network/*",
    "/etc/systemd/network/*",
    "/run/NetworkManager/*/*",
    "/etc/NetworkManager/*/*",
)
# Prints what torch was built for, then the same with the speed and clocks under a short load of
# 100 MB. nvidia-smi looks in the second half of it.
LOAD = """
import json, subprocess, time, torch
report = {"cuda": torch.version.cuda, "archs": torch.cuda.get_arch_list(), "load": ""}
print(json.dumps(report), flush=True)
x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
x @ x
torch.cuda.synchronize()
query = "--query-gpu=clocks.sm,clocks.max.sm,power.draw,pstate --format=csv,noheader,nounits"
command = ["sh", "-c", "sleep 1; nvidia-smi -i 0 " + query]
look = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
begin = time.monotonic()
count = 0
while look.poll() is None and time.monotonic() < begin + 10:
    for _ in range(10):
        x @ x
    torch.cuda.synchronize()
    count += 10
report["tflops"] = 2 * 4096**3 * count / max(time.monotonic() - begin, 1e-9) / 1e12
report["load"] = look.communicate(timeout=5)[0].strip()
print(json.dumps(report))
"""


class LoadReport(TypedDict, total=False):
    """A line that LOAD prints: what torch was built for; then its speed and nvidia-smi's line."""

    cuda: str | None
    archs: list[str]
    load: str
    tflops: float


Findings = Iterator[Finding]
Check = Callable[[System], Findings]


def _driver(system: System) -> Findings:
    code, out, errors = system.smi
    if system.gpus:
        gpu = system.gpus[0]
        major = gpu.driver.partition(".")[0]
        # 12.1 is the GB10, which older drivers do not know.
        is_old = gpu.capability == "12.1" and major.isdecimal() and int(major) < 580
        case = "old" if is_old else "ok"
        yield finding(f"driver/{case}", count=len(system.gpus), **gpu._asdict())
    elif code != 127:
        yield finding("driver/fails", message=errors or out)
    elif system.has_nvidia:
        yield finding("driver/absent")
    else:
        yield finding("driver/none")


def _torch(system: System) -> Findings:
    """Check that torch was built for the chip and runs on it, and what the chip does under load."""
    version = system.versions["torch"]
    python = system.python
    if not version:
        yield finding("torch/absent", python=python)
        return
    if not system.gpus:
        yield finding("torch/cpu", version=version)
        return
    code, out, errors = system.run(python, "-c", LOAD, limit=TORCH_SECONDS)
    lines = [line for line in out.splitlines() if line.startswith("{")]
    reports: list[LoadReport] = [json.loads(line) for line in lines]
    build: LoadReport = {"archs": [], "cuda": None}
    if reports:
        build = reports[0]
    gpu = system.gpus[0]
    capability = gpu.capability.replace(".", "")
    chip = int(capability) if capability.isdecimal() else None
    # The order is that of the causes: each case makes the later ones meaningless.
    if not reports:
        case = "broken"
    elif not build["cuda"]:
        case = "without-cuda"
    elif chip is not None and not _has_code_for(chip, build["archs"]):
        case = "chip"
    elif code:
        case = "gpu"
    else:
        case = "ok"
    yield finding(
        f"torch/{case}",
        version=version,
        python=python,
        chip="?" if chip is None else chip,
        archs=" ".join(build["archs"]),
        cuda=build["cuda"],
        message=errors.rpartition("\n")[2],
    )
    if case == "ok":
        yield _clock(gpu, reports[-1])


def _has_code_for(chip: int, archs: list[str]) -> bool:
    """Tell whether the likes of `sm_120` and `compute_90` have code that runs on a chip, as 121."""
    for kind, number in re.findall(r"(sm|compute)_(\d+)", " ".join(archs)):
        arch = int(number)
        # Code for sm_120 runs on sm_121: the same major version, and no newer minor one. compute_
        # is PTX, which the driver compiles for any later chip at the first start.
        is_fitting = kind == "compute" or arch // 10 == chip // 10
        if arch <= chip and is_fitting:
            return True
    return False


def _clock(gpu: Gpu, report: LoadReport) -> Finding:
    """Report the clock, power and speed of the GPU under load."""
    columns = report["load"].split(",")
    clock, top, watts, state, *_ = [*columns, "", "", "", ""]
    # A figure that nvidia-smi does not give is 0 here.
    values = [float(re.sub(r"[^\d.]", "", text) or 0) for text in (clock, top, watts)]
    is_capped = 0 < values[0] < 0.6 * values[1]
    # nvidia-smi does not show every low-power state: one shows in the speed alone.
    is_slow = "GB10" in gpu.name and report["tflops"] < 0.6 * GB10_TFLOPS
    return finding(
        "clock/low" if is_capped or is_slow else "clock/ok",
        clock=values[0],
        top=values[1],
        watts=values[2],
        state=state.strip(),
        tflops=report["tflops"],
    )


def _memory(system: System) -> Findings:
    kib = dict(re.findall(r"^(\w+): +(\d+) kB", system.read("/proc/meminfo"), re.M))

    def gib(name: str) -> float:
        return int(kib.get(name, 0)) / 2**20

    free = gib("MemAvailable")
    total = gib("MemTotal")
    # Where the GPU shares the host's memory, the driver states no memory of its own.
    # Files that were read fill the memory, and a driver that shares it finds no large free pieces.
    is_unified = any(
        "GB10" in gpu.name or "N/A" in gpu.memory or "Not Supported" in gpu.memory
        for gpu in system.gpus
    )
    if free < 2:
        case = "none"
    elif free < total / 4:
        case = "low"
    elif is_unified and gib("MemFree") < 8 < gib("Cached"):
        case = "cache"
    else:
        case = "ok"
    names = ("MemFree", "Cached", "Shmem", "Mlocked")
    breakdown = ", ".join(f"{name} {gib(name):.1f}" for name in names)
    yield finding(f"memory/{case}", free=free, total=total, breakdown=breakdown)


def _disk(system: System) -> Findings:
    # A folder that does not exist yet lies on the disk of the nearest one above it.
    for folder in system.folders:
        path = os.path.abspath(os.path.expanduser(folder))
        while not os.path.isdir(path):
            path = os.path.dirname(path)
        free = shutil.disk_usage(path).free / GIB
        if free < 2:
            case = "none"
        elif free < 20:
            case = "low"
        else:
            case = "ok"
        yield finding(f"disk/{case}", free=free, folder=folder)


def _docker(system: System) -> Findings:
    reason = system.docker.get("refused", "")
    if system.docker.get("absent"):
        case = "absent"
    elif "permission denied" in reason:
        case = "group"
    elif reason:
        case = "down"
    else:
        case = "ok"
    yield finding(f"docker/{case}", message=reason, version=system.docker.get("ServerVersion"))


def _toolkit(system: System) -> Findings:
    version = re.search(r"(\d+)\.(\d+)\.\d+", system.run("nvidia-ctk", "--version")[1])
    if not version:
        yield finding("toolkit/absent")
        return
    # The legacy mode of 1.18 knows Swarm's resources.
    is_legacy = re.search(r'^\s*mode\s*=\s*"legacy"', system.read(TOML), re.M)
    is_blind = version.group(1, 2) == ("1", "18") and not is_legacy
    yield finding("toolkit/swarm" if is_blind else "toolkit/ok", version=version[0])


def _daemon(system: System) -> Findings:
    try:
        config = dict(json.loads(system.read("/etc/docker/daemon.json") or "{}"))
    except (ValueError, TypeError) as error:
        yield finding("daemon.json/broken", message=error)
        return
    # NAME=VALUE; one entry a GPU
    entries = [str(entry).split("=") for entry in config.get("node-generic-resources") or []]
    named = sorted(parts[-1].strip() for parts in entries if parts[0].strip() == RESOURCE)
    uuids = sorted(gpu.uuid for gpu in system.gpus)
    has_runtime = "nvidia" in (config.get("runtimes") or {})
    if not has_runtime or config.get("default-runtime") != "nvidia":
        yield finding("daemon.json/runtime")
    elif named != uuids:
        shown = ", ".join(named) or "nothing"
        yield finding("daemon.json/resource", named=shown, uuids=" ".join(uuids))
    elif system.docker.get("DefaultRuntime", "nvidia") != "nvidia":
        # The daemon reads its file when it starts.
        yield finding("daemon.json/old")
    else:
        yield finding("daemon.json/ok")


def _swarm_resource(system: System) -> Findings:
    line = re.search(r'^\s*swarm-resource\s*=\s*"(.*)"', system.read(TOML), re.M)
    if not line:
        yield finding("swarm-resource/absent")
        return
    names = line[1].replace(" ", "").split(",")
    # Docker puts this in front of the resource's name in the variable that it sets.
    is_right = f"DOCKER_RESOURCE_{RESOURCE}" in names
    case = "ok" if is_right else "other"
    yield finding(f"swarm-resource/{case}", value=", ".join(names))


def _swarm(system: System) -> Findings:
    swarm = system.docker.get("Swarm") or {}
    state = swarm.get("LocalNodeState")
    if state == "active":
        yield finding("swarm/ok", address=swarm.get("NodeAddr"))
    else:
        yield finding("swarm/absent", state=state, message=swarm.get("Error", ""))


def _cable(system: System) -> Findings:
    """The port of the cable: both functions up, MTU 9000, an address that lasts, a GID of each."""
    functions = system.cable
    if not functions:
        yield finding("cable/absent")
        return
    names = " and ".join(function["name"] for function in functions)
    down = [finding("cable/down", **function) for function in functions if not function["up"]]
    speeds = ", ".join(f"{function['speed'] // 1000} Gb/s" for function in functions)
    yield from down or [finding("cable/ok", names=names, speeds=speeds)]
    wrong_mtu = [function for function in functions if function["mtu"] != 9000]
    for function in wrong_mtu:
        yield finding("mtu/other", **function)
    if not wrong_mtu:
        yield finding("mtu/ok", names=names)
    yield _address(system, functions, names)
    yield from _gids(functions)


def _address(system: System, functions: list[CableFunction], names: str) -> Finding:
    """Check that the functions of the cable have addresses that outlast a reboot."""
    stored = [path for pattern in NETWORK_FILES for path in glob(pattern)]
    for file in ("/etc/network/interfaces", *glob("/etc/netplan/*.yaml")):
        stored.append(system.read(file))
    settings = " ".join(stored)
    shown = []
    without_address = []
    for function in functions:
        name = function["name"]
        shown += [f"{address} on {name}" for address in function["addresses"]]
        if function["addresses"] and name not in settings:
            without_address.append(name)
    if not shown:
        return finding("address/none", names=names, name=functions[0]["name"])
    case = "address/lost" if without_address else "address/ok"
    lost = " and ".join(without_address)
    name = next(iter(without_address), "")
    return finding(case, shown=", ".join(shown), lost=lost, name=name)


def _gids(functions: list[CableFunction]) -> Findings:
    """Check that each RDMA device has a RoCE v2 address, and NCCL is not sent to another index."""
    forced = os.environ.get("NCCL_IB_GID_INDEX")
    indexes = []
    is_right = True
    for function in functions:
        device, gids = function["device"], function["gids"]
        if not device:
            continue
        # An IPv4 address as a GID has ::ffff: in it; one is preferred.
        ipv4 = [index for index, gid in gids.items() if ":ffff:" in gid]
        index = next(iter(ipv4 or gids), None)
        indexes.append(f"{index} on {device}")
        if index is None:
            yield finding("gid/none", **function)
        elif forced and int(forced) not in gids:
            yield finding("gid/forced", **function, forced=forced, index=index)
        else:
            continue
        is_right = False
    if indexes and is_right:
        yield finding("gid/ok", indexes=", ".join(indexes))


def _tools(system: System) -> Findings:
    """Check that the tools that launchers call over ssh are on the PATH of a non-login shell."""
    tools = ["docker", "ip"]
    if system.has_nvidia:
        tools.append("nvidia-smi")
    missing = [tool for tool in tools if not shutil.which(tool, path=system.path)]
    for tool in missing:
        yield finding("tools/absent", tool=tool, path=system.path)
    if not missing:
        yield finding("tools/ok", tools=", ".join(tools))


def _run(system: System, checks: list[Check]) -> list[Finding]:
    return [result for check in checks for result in check(system)]


def examine(system: System, *, pair: bool) -> tuple[list[Finding], NodeProperties]:
    """The findings of this machine, and properties that a pair compares.

    Only a pair needs Docker: without one its faults are warnings.
    """
    docker = system.docker
    docker_checks: list[Check] = []
    if pair or not docker.get("absent"):
        docker_checks.append(_docker)
        if system.gpus:
            docker_checks += [_toolkit, _daemon, _swarm_resource]
        if pair and "refused" not in docker:
            docker_checks.append(_swarm)
    findings = _run(system, [_driver, _torch, _memory, _disk])
    for result in _run(system, docker_checks):
        is_warning = result.level == FAULT and not pair
        findings.append(replace(result, level="warning") if is_warning else result)
    if pair:
        findings += _run(system, [_cable, _tools])
    host = os.uname().nodename
    managers = (docker.get("Swarm") or {}).get("RemoteManagers") or []
    properties: NodeProperties = {
        "versions": system.versions,
        "packages": system.packages,
        "cable": system.cable,
        "managers": [manager["Addr"] for manager in managers],
    }
    return [replace(result, host=host) for result in findings], properties


def answer_peer() -> None:
    """On the other node: print what `examine` says; the first word is the runs' interpreter."""
    findings, properties = examine(System(python=sys.argv[1]), pair=True)
    print(json.dumps([[asdict(result) for result in findings], properties]))
