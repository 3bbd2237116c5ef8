"""Checks of one machine for `tunesmith doctor`.

This file uses only the standard library, because pair.py sends it to a node on which tunesmith may
not be installed. A check yields pairs of a key in findings.json and the values of its text.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from glob import glob
from pathlib import Path
from typing import Any

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
# Program that prints the version of torch. It fails if torch is not installed.
VERSION = "import importlib.metadata; print(importlib.metadata.version('torch'))"
# Pattern for names of network functions of a ConnectX port. A DGX Spark has two functions per port,
# because the GB10 reaches the port over two PCIe links. For example, enp1s0f1np1 and enP2p1s0f1np1
# are functions of the same port. The regex group captures the number of the port.
_FUNCTION = re.compile(r"en[pP].*s\d+(f\d+)np\d+$")

Findings = Iterator[tuple[str, dict[str, Any]]]


class System:
    """Access to the commands and files of this machine. Results are cached.

    Args:
        python: the interpreter of the runs. If it does not exist on this machine, python3 is used.
    """

    def __init__(self, python: str = sys.executable):
        self.python = python if os.access(python, os.X_OK) else "python3"

    def read(self, path: str) -> str:
        """Return the text of a file. Return "" if the file does not exist or cannot be read.

        For example, reading a GID that is not set fails with EINVAL.
        """
        try:
            return Path(path).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""

    def run(self, *command: str, limit: float = 10.0) -> tuple[int, str, str]:
        """Run a command and return its exit code, stdout and stderr.

        The code is 127 if the command does not exist, and 124 if it cannot be started or takes
        more than `limit` seconds.
        """
        # Add the folders of `ip` and `dockerd`, which a user's PATH often lacks. Set the locale,
        # because the checks match English messages.
        path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
        env = {**os.environ, "PATH": path, "LC_ALL": "C"}
        try:
            process = subprocess.run(
                command, env=env, capture_output=True, text=True, timeout=limit, check=False
            )
        except FileNotFoundError as error:
            return 127, "", str(error)
        except (OSError, subprocess.TimeoutExpired) as error:
            return 124, "", str(error)
        return process.returncode, process.stdout.strip(), process.stderr.strip()

    @functools.cached_property
    def smi(self) -> tuple[int, str, str]:
        """Exit code, output and error output of nvidia-smi."""
        query = "--query-gpu=name,uuid,driver_version"
        return self.run("nvidia-smi", query, "--format=csv,noheader")

    @functools.cached_property
    def gpus(self) -> list[dict[str, str]]:
        """Name, UUID and driver of each GPU. The list is empty if nvidia-smi fails."""
        code, out, _ = self.smi
        # Other lines are warnings.
        line = r"^(?P<name>[^,]+), (?P<uuid>[^,]+), (?P<driver>[^,]+)$"
        return [match.groupdict() for match in re.finditer(line, "" if code else out, re.M)]

    @property
    def is_spark(self) -> bool:
        """Return whether this machine is a DGX Spark, whose GPU shares the host's memory."""
        return any("GB10" in gpu["name"] for gpu in self.gpus)

    @functools.cached_property
    def docker(self) -> dict[str, Any]:
        """The output of `docker info`.

        If Docker does not answer, the dict has only two keys. `refused` is the reason, and `absent`
        is True if Docker is not installed.
        """
        code, out, errors = self.run("docker", "info", "--format", "{{json .}}")
        info = json.loads(out) if out.startswith("{") else {}
        # Also require ServerVersion, because some versions of Docker exit with 0 although the
        # daemon does not answer.
        if code == 0 and info.get("ServerVersion"):
            return info
        return {"refused": "; ".join(info.get("ServerErrors") or [errors]), "absent": code == 127}

    @functools.cached_property
    def cable(self) -> list[dict[str, Any]]:
        """The network interfaces of the port with the cable, in the format of `ip -j addr`.

        The port with the cable is the first port with an interface that is up. If no interface is
        up, the first port is returned. Two keys are added to each interface: `device` is the RDMA
        device, and `gids` are the indexes of RoCE v2 in the device's GID table.
        """
        # The paths have the form /sys/class/infiniband/DEVICE/device/net/NAME.
        paths = [path.split("/") for path in glob("/sys/class/infiniband/*/device/net/*")]
        devices = {parts[-1]: parts[4] for parts in paths}
        ports: dict[str, list[dict[str, Any]]] = {}
        for row in json.loads(self.run("ip", "-j", "addr")[1] or "[]"):
            name = row["ifname"]
            device = devices.get(name, "")
            match = _FUNCTION.match(name)
            # An interface belongs to a port if it has an RDMA device, or if its name matches.
            if match or device:
                function = {**row, "device": device, "gids": self.gids(device)}
                ports.setdefault(match[1] if match else name, []).append(function)
        # `max` returns the first port that has an interface that is up. If there is none, it
        # returns the first port.
        return max(
            ports.values(),
            key=lambda functions: any(row["operstate"] == "UP" for row in functions),
            default=[],
        )

    def gids(self, device: str) -> list[str]:
        """Return the indexes of RoCE v2 in the GID table of an RDMA device.

        Return [] if `device` is "".
        """
        base = f"/sys/class/infiniband/{device}/ports/1"
        types = sorted(glob(f"{base}/gid_attrs/types/*"))
        indexes = [os.path.basename(file) for file in types if self.read(file) == "RoCE v2"]
        # Skip unused entries, which consist of zeros.
        return [index for index in indexes if self.read(f"{base}/gids/{index}").strip(":0")]


def _driver(system: System) -> Findings:
    code, out, errors = system.smi
    if system.gpus:
        gpu = system.gpus[0]
        # An unknown driver is `[N/A]`.
        major = gpu["driver"].partition(".")[0]
        is_old = system.is_spark and major.isdecimal() and int(major) < 580
        yield f"driver/{'old' if is_old else 'ok'}", {"count": len(system.gpus), **gpu}
    elif code != 127:
        yield "driver/fails", {"message": errors or out}
    else:
        files = ["/proc/driver/nvidia/version", *glob("/sys/bus/pci/devices/*/vendor")]
        # 0x10de is NVIDIA's PCI vendor id.
        is_absent = any(system.read(file).startswith(("NVRM", "0x10de")) for file in files)
        yield f"driver/{'absent' if is_absent else 'none'}", {}


def _torch(system: System) -> Findings:
    """Check that torch runs on the GPU, and that a GB10 is not in a low-power state."""
    # Use only the last line, because modules that Python imports at its start may print others.
    version = system.run(system.python, "-c", VERSION)[1].rpartition("\n")[2]
    if not version or not system.gpus:
        case = "cpu" if version else "absent"
        yield f"torch/{case}", {"version": version, "python": system.python}
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
    yield (
        f"torch/{case}",
        {
            "version": version,
            "python": system.python,
            "chip": system.gpus[0]["name"],
            "cuda": cuda and cuda[1],
            "message": messages[-1],
        },
    )
    speed = re.search(r"^TFLOP/s (.+)$", out, re.M)
    if system.is_spark and speed:
        # Detect a low-power state by the measured speed, because nvidia-smi does not show all
        # low-power states.
        tflops = float(speed[1])
        case = "low" if tflops < 0.6 * GB10_TFLOPS else "ok"
        yield f"clock/{case}", {"tflops": tflops}


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
    yield f"memory/{case}", {"gib": gib}


def _docker(system: System) -> Findings:
    reason = system.docker.get("refused", "")
    case = "down" if reason else "ok"
    if system.docker.get("absent"):
        case = "absent"
    elif "permission denied" in reason:
        case = "group"
    version = system.docker.get("ServerVersion")
    yield f"docker/{case}", {"message": reason, "version": version}


def _toolkit(system: System) -> Findings:
    version = re.search(r"(\d+\.\d+)\.\d+", system.run("nvidia-ctk", "--version")[1])
    if not version:
        yield "toolkit/absent", {}
        return
    # Version 1.18 of NVIDIA's container toolkit supports Swarm resources only in its legacy mode.
    is_legacy = re.search(r'^\s*mode\s*=\s*"legacy"', system.read(TOML), re.M)
    case = "swarm" if version[1] == "1.18" and not is_legacy else "ok"
    yield f"toolkit/{case}", {"version": version[0]}


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
    uuids = [gpu["uuid"] for gpu in system.gpus]
    case = "ok"
    if system.docker.get("DefaultRuntime") != "nvidia":
        case = "runtime"
    elif sorted(named) != sorted(uuids):
        case = "resource"
    named_text = ", ".join(named) or "nothing"
    yield f"daemon.json/{case}", {"named": named_text, "uuids": " ".join(uuids)}


def _swarm_resource(system: System) -> Findings:
    # Docker passes the reserved GPUs to a container in the variable DOCKER_RESOURCE_<resource
    # name>. The toolkit's config must name this variable.
    line = rf'^\s*swarm-resource\s*=\s*"(.*,)?\s*DOCKER_RESOURCE_{RESOURCE}\s*(,.*)?"'
    is_right = re.search(line, system.read(TOML), re.M)
    yield f"swarm-resource/{'ok' if is_right else 'absent'}", {}


def _swarm(system: System) -> Findings:
    swarm = system.docker.get("Swarm", {})
    state = swarm.get("LocalNodeState")
    values = {"state": state, "message": swarm.get("Error"), "address": swarm.get("NodeAddr")}
    yield f"swarm/{'ok' if state == 'active' else 'absent'}", values


def _cable(system: System) -> Findings:
    """Check the port whose cable connects the two nodes.

    A port has one or more PCIe functions, and each function is a network interface. Each interface
    must be up and have MTU 9000 and a RoCE v2 address.
    """
    functions = system.cable
    if not functions:
        yield "cable/absent", {}
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
        faults += [(key, values) for key, wrong in is_wrong.items() if wrong]
    names = " and ".join(function["ifname"] for function in functions)
    yield from faults or [("cable/ok", {"names": names})]


def examine(system: System, *, pair: bool) -> list[tuple[str, dict[str, Any]]]:
    """Run the checks on this machine and return what they yield.

    Args:
        pair: whether the machine is a node of a pair.
    """
    docker = system.docker
    checks: list[Callable[[System], Findings]] = [_driver, _torch, _memory]
    if pair or not docker.get("absent"):
        checks += [_docker, _toolkit] if system.gpus else [_docker]
    if pair and "refused" not in docker:
        checks += [_swarm, _daemon, _swarm_resource] if system.gpus else [_swarm]
    if pair:
        checks.append(_cable)
    return [found for check in checks for found in check(system)]


def properties(system: System) -> dict[str, Any]:
    """Return the properties of this node that are compared with those of the other node."""
    managers = system.docker.get("Swarm", {}).get("RemoteManagers") or []
    return {
        "cable": system.cable,
        "managers": [manager["Addr"] for manager in managers],
    }


if __name__ == "__main__":
    # The other node of a pair reads this output. The argument is the interpreter to check.
    node = System(python=sys.argv[1])
    print(json.dumps([examine(node, pair=True), properties(node)]))
