"""The checks of one machine. Standard library alone, as pair.py runs them on the other node too."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from glob import glob
from typing import Any

from tunesmith.launch.doctor.system import FAULT, GIB, Finding, System, say

# The resource that a swarm's tasks ask for
TOML, RESOURCE = (
    "/etc/nvidia-container-runtime/config.toml",
    "NVIDIA_GPU",
)
TORCH_SECONDS = 30.0  # for torch to be imported and the GPU to be loaded
GB10_TFLOPS = 92  # as in host/chips.json, which the other node of a pair may lack
Findings = Iterator[Finding]
# A short load of 100 MB; nvidia-smi looks on in its second half.
LOAD = """
import json, subprocess, time, torch
told = {"cuda": torch.version.cuda, "archs": torch.cuda.get_arch_list(), "load": ""}
print(json.dumps(told), flush=True)
x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
x @ x
torch.cuda.synchronize()
smi = "sleep 1; nvidia-smi -i 0 --query-gpu=clocks.sm,clocks.max.sm,power.draw,pstate --format=csv,noheader,nounits"
begin, count, look = time.monotonic(), 0, subprocess.Popen(["sh", "-c", smi], stdout=subprocess.PIPE, text=True)
while look.poll() is None and time.monotonic() < begin + 10:
    for _ in range(10):
        x @ x
    torch.cuda.synchronize()
    count += 10
told["tflops"] = 2 * 4096**3 * count / max(time.monotonic() - begin, 1e-9) / 1e12
print(json.dumps(told | {"load": look.communicate(timeout=5)[0].strip()}))
"""


def _driver(s: System) -> Findings:
    code, out, said = s.smi
    if s.gpus:
        name, _, driver, capability, _ = s.gpus[0]
        major = driver.partition(".")[0]  # may be `[N/A]`
        case = "old" if capability == "12.1" and major.isdecimal() and int(major) < 580 else "ok"
        yield say(
            f"driver/{case}", count=len(s.gpus), name=name, driver=driver, capability=capability
        )
    else:
        case = "fails" if code != 127 else "absent" if s.has_nvidia else "none"
        yield say(f"driver/{case}", said=said or out)


def _torch(s: System) -> Findings:
    """Whether torch was built for the chip and runs on it, and what the chip does under load."""
    version, python = s.versions["torch"], s.python
    if not version or not s.gpus:
        yield say("torch/cpu" if version else "torch/absent", version=version, python=python)
        return
    code, out, said = s.run(python, "-c", LOAD, limit=TORCH_SECONDS)
    told = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    first: dict[str, Any] = told[0] if told else {"archs": [], "cuda": ""}
    capability = s.gpus[0][3].replace(".", "")
    chip = int(capability) if capability.isdecimal() else None  # `[N/A]` and the like
    # Code for sm_120 runs on sm_121: the same major version, no newer minor one. PTX is compiled at the first start.
    archs = [
        (kind, int(number))
        for kind, number in re.findall(r"(sm|compute)_(\d+)", " ".join(first["archs"]))
    ]
    fits = chip is None or any(
        n <= chip and (kind == "compute" or n // 10 == chip // 10) for kind, n in archs
    )
    case = (
        "broken" if not told else "without-cuda" if not first["cuda"] else "gpu" if code else "ok"
    )
    case = case if fits or case in ("broken", "without-cuda") else "chip"
    said, shown = said.rpartition("\n")[2], " ".join(first["archs"])
    shown_chip = "?" if chip is None else chip
    yield say(
        f"torch/{case}",
        version=version,
        python=python,
        chip=shown_chip,
        archs=shown,
        cuda=first["cuda"],
        said=said,
    )
    # A capped clock shows under load alone, and a state that nvidia-smi does not show in the speed
    if case == "ok":
        words = [*(word.strip() for word in told[-1]["load"].split(",")), "", "", "", ""]
        clock, top, watts = (float(re.sub(r"[^\d.]", "", word) or 0) for word in words[:3])
        # A clock that nvidia-smi does not say is 0 here.
        low = 0 < clock < 0.6 * top or (
            "GB10" in s.gpus[0][0] and told[-1]["tflops"] < 0.6 * GB10_TFLOPS
        )
        values = {
            "clock": clock,
            "top": top,
            "watts": watts,
            "state": words[3],
            "tflops": told[-1]["tflops"],
        }
        yield say("clock/low" if low else "clock/ok", **values)


def _memory(s: System) -> Findings:
    kb = dict(re.findall(r"^(\w+): +(\d+) kB", s.read("/proc/meminfo"), re.M))
    names = ("MemAvailable", "MemTotal", "MemFree", "Cached", "Shmem", "Mlocked")
    gib = {name: int(kb.get(name, 0)) / 2**20 for name in names}
    free, total, empty, cached, *_ = gib.values()
    # The driver states no memory of the GPU's own.
    unified = any(
        "GB10" in gpu[0] or "N/A" in gpu[4] or "Not Supported" in gpu[4] for gpu in s.gpus
    )
    case = (
        "none"
        if free < 2
        else "low"
        if free < total / 4
        else "cache"
        if unified and empty < 8 < cached
        else "ok"
    )
    shown = ", ".join(f"{name} {gib[name]:.1f}" for name in names[2:])
    yield say(f"memory/{case}", free=free, total=total, breakdown=shown)


def _disk(s: System) -> Findings:
    for folder in s.folders:
        path = os.path.abspath(os.path.expanduser(folder))
        while not os.path.isdir(path):
            path = os.path.dirname(path)
        free = shutil.disk_usage(path).free / GIB
        yield say(
            f"disk/{'none' if free < 2 else 'low' if free < 20 else 'ok'}", free=free, folder=folder
        )


def _docker(s: System) -> Findings:
    said = s.docker.get("refused", "")
    case = (
        "absent"
        if s.docker.get("absent")
        else "group"
        if "permission denied" in said
        else "down"
        if said
        else "ok"
    )
    yield say(f"docker/{case}", said=said, version=s.docker.get("ServerVersion"))


def _toolkit(s: System) -> Findings:
    version = re.search(r"(\d+)\.(\d+)\.\d+", s.run("nvidia-ctk", "--version")[1])
    legacy = re.search(r'^\s*mode\s*=\s*"legacy"', s.read(TOML), re.M)
    case = (
        "absent"
        if not version
        else "swarm"
        if version.group(1, 2) == ("1", "18") and not legacy
        else "ok"
    )
    yield say(f"toolkit/{case}", version=version and version[0])


def _daemon(s: System) -> Findings:
    try:
        config = dict(json.loads(s.read("/etc/docker/daemon.json") or "{}"))
    except (ValueError, TypeError) as error:
        yield say("daemon.json/broken", said=error)
        return
    offered = [str(entry).split("=") for entry in config.get("node-generic-resources") or []]
    named, uuids = (
        sorted(e[-1].strip() for e in offered if e[0].strip() == RESOURCE),
        sorted(gpu[1] for gpu in s.gpus),
    )
    runtime = (
        "nvidia" in (config.get("runtimes") or {}) and config.get("default-runtime") == "nvidia"
    )
    old = s.docker.get("DefaultRuntime", "nvidia") != "nvidia"
    case = "runtime" if not runtime else "resource" if named != uuids else "old" if old else "ok"
    yield say(f"daemon.json/{case}", named=", ".join(named) or "nothing", uuids=", ".join(uuids))


def _swarm_resource(s: System) -> Findings:
    found = re.search(r'^\s*swarm-resource\s*=\s*"(.*)"', s.read(TOML), re.M)
    names = found[1].replace(" ", "").split(",") if found else []
    # What docker sets
    case = "absent" if not found else "ok" if f"DOCKER_RESOURCE_{RESOURCE}" in names else "other"
    yield say(f"swarm-resource/{case}", value=", ".join(names))


def _swarm(s: System) -> Findings:
    swarm = s.docker.get("Swarm") or {}
    case = "ok" if (state := swarm.get("LocalNodeState")) == "active" else "absent"
    yield say(
        f"swarm/{case}", address=swarm.get("NodeAddr"), state=state, said=swarm.get("Error", "")
    )


def _image(s: System) -> Findings:
    shown = s.run("docker", "images", "--format", "{{.Repository}}:{{.Tag}}")[1]
    tags = re.findall(r"nvcr\.io/nvidia/pytorch:(\d\d\.\d\d)", shown)
    old = sorted(tag for tag in tags if tag < "26.02")
    yield say("image/old" if old else "image/ok", old=", ".join(old), count=len(tags))


def _cable(s: System) -> Findings:
    """The port of the cable: both functions up, MTU 9000, an address that lasts, a GID of each."""
    if not s.cable:
        yield say("cable/absent")
        return
    names, rows = " and ".join(row["name"] for row in s.cable), s.cable
    speeds = ", ".join(f"{row['speed'] // 1000} Gb/s" for row in rows)
    down = [say("cable/down", **row) for row in rows if not row["up"]]
    yield from down or [say("cable/ok", names=names, speeds=speeds)]
    yield from [say("mtu/other", **row) for row in rows if row["mtu"] != 9000] or [
        say("mtu/ok", names=names)
    ]
    shown = ", ".join(f"{address} on {row['name']}" for row in rows for address in row["addresses"])
    places = (
        "/run/systemd/network/*",
        "/etc/systemd/network/*",
        "/run/NetworkManager/*/*",
        "/etc/NetworkManager/*/*",
    )
    # The last are root's alone
    texts = map(s.read, ["/etc/network/interfaces", *glob("/etc/netplan/*.yaml")])
    kept = " ".join([*texts, *(path for place in places for path in glob(place))])
    lost = " and ".join(row["name"] for row in rows if row["addresses"] and row["name"] not in kept)
    yield say(
        f"address/{'none' if not shown else 'lost' if lost else 'ok'}",
        names=names,
        shown=shown,
        lost=lost,
    )
    forced, wrong, indexes = os.environ.get("NCCL_IB_GID_INDEX"), [], []
    for row in (row for row in rows if row["device"]):
        ipv4 = [i for i, gid in row["gids"].items() if ":ffff:" in gid]
        index = (ipv4 or [*row["gids"], -1])[0]
        indexes.append(f"{index} on {row['device']}")
        if index < 0 or (forced and int(forced) not in row["gids"]):
            wrong.append(
                say("gid/none" if index < 0 else "gid/forced", **row, forced=forced, index=index)
            )
    yield from wrong or ([say("gid/ok", indexes=", ".join(indexes))] if indexes else [])


def _tools(s: System) -> Findings:
    """What launchers call over ssh must be on the PATH of a shell that is no login shell."""
    tools = ["docker", "ip", *(["nvidia-smi"] if s.has_nvidia else [])]
    for tool in (missing := [tool for tool in tools if not shutil.which(tool, path=s.path)]):
        folders = (
            "/usr/local/cuda/bin",
            "/usr/local/bin",
            "/usr/bin",
            "/usr/sbin",
            "/snap/bin",
            "/opt/*/bin",
        )
        usual = [path for folder in folders for path in glob(f"{folder}/{tool}")]
        place = (s.run("bash", "-lc", f"command -v {tool}")[1].splitlines() or usual or [""])[-1]
        yield say("tools/hidden" if place else "tools/absent", tool=tool, path=s.path, place=place)
    if not missing:
        yield say("tools/ok", tools=", ".join(tools))


def examine(s: System, *, pair: bool) -> dict[str, Any]:
    """The findings of this machine, and properties that a pair compares. Faults of Docker stop a pair alone."""
    nvidia = (_toolkit, _daemon, _swarm_resource) if s.gpus else ()
    answers = () if "refused" in s.docker else (*((_swarm,) if pair else ()), _image)
    checks = (_docker, *nvidia, *answers) if pair or not s.docker.get("absent") else ()
    found = [f for check in (_driver, _torch, _memory, _disk) for f in check(s)]
    docker = [f for check in checks for f in check(s)]
    found += [replace(f, level="warning") if f.level == FAULT and not pair else f for f in docker]
    found += [f for check in ((_cable, _tools) if pair else ()) for f in check(s)]
    managers = [row["Addr"] for row in (s.docker.get("Swarm") or {}).get("RemoteManagers") or []]
    properties = {"host": (host := os.uname().nodename), "versions": s.versions, "packages": s.packages, "cable": s.cable,
             "interfaces": s.interfaces, "managers": managers, "uuids": [gpu[1] for gpu in s.gpus],
             "reached": os.environ.get("SSH_CONNECTION", "").split()[::2]}  # fmt: skip
    return {"findings": [asdict(replace(f, host=host)) for f in found], "properties": properties}


def answer_peer() -> None:
    """On the other node: print what `examine` finds. The first word of the command line is the interpreter of the runs."""
    print(json.dumps(examine(System(python=sys.argv[1]), pair=True)))
