"""One machine's commands, files and properties, and the findings of a report.

Standard library alone: pair.py sends this file to the other node, which need not have tunesmith.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import NamedTuple, TypedDict

OK = "ok"
FAULT = "fault"
GIB = 2**30
# `check/case` -> level, what, why, fix
TEXTS: dict[str, list[str]] = json.loads(
    Path(__file__).with_name("findings.json").read_text(encoding="utf-8")
)
# Values in a fix that are a fix themselves, and several words: names of packages
UNQUOTED = ("fix", "names")
# `distributions` rather than `version`: a source tree that is not installed has none, and that is
# no error here.
VERSIONS_PROGRAM = """
import importlib.metadata, json
versions = {"tunesmith": "", "torch": ""}
for name in versions:
    for distribution in importlib.metadata.distributions(name=name):
        versions[name] = distribution.version
        break
print(json.dumps(versions))
"""
SMI = (
    "nvidia-smi",
    "--query-gpu=name,uuid,driver_version,compute_cap,memory.total",
    "--format=csv,noheader",
)
# A Spark's ConnectX port is two network functions, as the GB10 reaches it over two PCIe links:
# enp1s0f1np1 and enP2p1s0f1np1 are one port.
_FUNCTION = re.compile(r"en[pP].*s\d+(f\d+)np\d+$")


@dataclass(frozen=True)
class Finding:
    """One line of the report. `level` is ok, warning or fault; `fix` is a command; `case` as in
    findings.json.
    """

    check: str
    level: str
    what: str
    why: str = ""
    fix: str = ""
    host: str = ""
    case: str = ""


def finding(key: str, host: str = "", **values: object) -> Finding:
    """The finding that findings.json has under `check/case`, with the values filled in."""
    level, what, why, fix = TEXTS[key]
    values["host"] = host
    # shlex alone: the other node of a pair has this file, and not the rest of tunesmith.
    words = {
        name: value if name in UNQUOTED else shlex.quote(str(value))
        for name, value in values.items()
    }
    check, _, case = key.partition("/")
    texts = (what.format(**values), why.format(**values), fix.format(**words))
    return Finding(check, level, *texts, case=case)


class Gpu(NamedTuple):
    """A GPU in the words of nvidia-smi; one that it does not know may be `[N/A]`."""

    name: str
    uuid: str
    driver: str
    capability: str
    memory: str


class SwarmManager(TypedDict):
    """A manager node of a swarm."""

    Addr: str


class SwarmInfo(TypedDict, total=False):
    """The part of `docker info` about its swarm."""

    LocalNodeState: str
    NodeAddr: str
    Error: str
    RemoteManagers: list[SwarmManager] | None


class DockerInfo(TypedDict, total=False):
    """The parts of `docker info` that are read; `refused` and `absent` are ours."""

    ServerVersion: str
    ServerErrors: list[str]
    DefaultRuntime: str
    Swarm: SwarmInfo
    refused: str
    absent: bool


class CableFunction(TypedDict):
    """A network function of the port with the cable; -1 for a number that is not known."""

    name: str
    up: bool
    mtu: int
    speed: int
    addresses: list[str]
    device: str
    gids: dict[int, str]


class NodeProperties(TypedDict):
    """The properties of a node that a pair compares."""

    versions: dict[str, str]
    packages: list[str]
    cable: list[CableFunction]
    managers: list[str]


class System:
    """Access to this machine's commands and files; each is looked up once.

    Args:
        python: the interpreter of the runs; plain python3 where it is not on this machine.
        folders: where runs write.
    """

    def __init__(self, python: str = sys.executable, folders: tuple[str, ...] = ()):
        self.path = os.environ.get("PATH", os.defpath)
        self.python = python if os.access(python, os.X_OK) else "python3"
        self.folders = (os.environ.get("HF_HOME") or "~/.cache/huggingface", *folders)

    def read(self, path: str) -> str:
        """A file's text; empty where it is not there or may not be read.

        To read a GID that is not set fails with EINVAL.
        """
        try:
            return Path(path).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""

    def run(self, *command: str, limit: float = 10.0) -> tuple[int, str, str]:
        """Exit code, stdout, stderr.

        127: there is no such command; 124: it cannot be started, or took more than `limit` seconds.
        """
        # A user's PATH often lacks the folders of `ip` and `dockerd`; messages are matched in
        # English.
        env = {**os.environ, "PATH": f"{self.path}:/usr/sbin:/sbin", "LC_ALL": "C"}
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
        """Ask nvidia-smi about the GPUs."""
        return self.run(*SMI)

    @functools.cached_property
    def gpus(self) -> list[Gpu]:
        """The GPUs that nvidia-smi lists; none where it fails."""
        code, out, _ = self.smi
        if code:
            return []
        rows = [re.split(r"\s*,\s*", line.strip()) for line in out.splitlines()]
        # Empty lines and warnings are no rows.
        return [Gpu(*row) for row in rows if len(row) == len(Gpu._fields)]

    @property
    def has_nvidia(self) -> bool:
        """Tell whether there is an NVIDIA device or its kernel module, whatever nvidia-smi says."""
        files = ["/proc/driver/nvidia/version", *glob("/sys/bus/pci/devices/*/vendor")]
        # 0x10de is NVIDIA's PCI vendor id.
        return any(self.read(file).startswith(("NVRM", "0x10de")) for file in files)

    @functools.cached_property
    def docker(self) -> DockerInfo:
        """`docker info`; where it does not answer only `refused`, the reason, and `absent`."""
        code, out, errors = self.run("docker", "info", "--format", "{{json .}}")
        info: DockerInfo = json.loads(out) if out.startswith("{") else {}
        # Some versions exit with 0 though the daemon does not answer.
        if code == 0 and info.get("ServerVersion"):
            return info
        return {"refused": "; ".join(info.get("ServerErrors") or [errors]), "absent": code == 127}

    @functools.cached_property
    def versions(self) -> dict[str, str]:
        """Read the versions that must be the same on both nodes."""
        versions = {"tunesmith": "", "torch": ""}
        code, out, _ = self.run(self.python, "-c", VERSIONS_PROGRAM)
        if code == 0:
            # Other lines are of a module that prints when Python starts.
            versions = json.loads(out.rpartition("\n")[2])
        versions["python"] = self.run(self.python, "--version")[1].removeprefix("Python ")
        versions["driver"] = self.gpus[0].driver if self.gpus else ""
        versions["kernel"] = os.uname().release
        return versions

    @functools.cached_property
    def packages(self) -> list[str]:
        """The packages of the running kernel, the driver and RDMA, with versions.

        Empty without dpkg.
        """
        _, out, _ = self.run(
            "dpkg-query", "-W", "-f", "${db:Status-Abbrev} ${Package} ${Version}\n"
        )
        # Modules of other kernels are installed beside these and do not matter.
        kernel = rf"linux-\S*{re.escape(os.uname().release)}"
        return re.findall(
            rf"^ii +((?:{kernel}|\S*nvidia\S*|rdma-core|libibverbs1|mlnx\S*|doca\S*) \S+)$",
            out,
            re.M,
        )

    @functools.cached_property
    def interfaces(self) -> dict[str, list[str]]:
        """Interface -> its IPv4 addresses with prefixes."""
        rows = json.loads(self.run("ip", "-j", "-4", "addr")[1] or "[]")
        addresses = {}
        # iproute2 prints an empty object for each interface that the filter leaves out.
        for row in filter(None, rows):
            places = [f"{entry['local']}/{entry['prefixlen']}" for entry in row["addr_info"]]
            addresses[row["ifname"]] = places
        return addresses

    @functools.cached_property
    def cable(self) -> list[CableFunction]:
        """The network functions of the port with the cable.

        That is the first port with a function that is up, else the first port.
        """
        # /sys/class/infiniband/DEVICE/device/net/NAME
        paths = [path.split("/") for path in glob("/sys/class/infiniband/*/device/net/*")]
        devices = {parts[-1]: parts[4] for parts in paths}
        interfaces = [os.path.basename(path) for path in glob("/sys/class/net/en*")]
        # A port without an RDMA device is recognized by its name alone.
        names = {*devices, *filter(_FUNCTION.match, interfaces)}
        ports: dict[str, list[CableFunction]] = {}
        for name in sorted(names, key=str.lower):
            base = f"/sys/class/net/{name}"
            device = devices.get(name, "")
            function: CableFunction = {
                "name": name,
                "up": self.read(f"{base}/operstate") == "up",
                "mtu": int(self.read(f"{base}/mtu") or -1),
                # Mb/s
                "speed": int(self.read(f"{base}/speed") or -1),
                "addresses": self.interfaces.get(name, []),
                "device": device,
                "gids": self.gids(device),
            }
            match = _FUNCTION.match(name)
            port = match[1] if match else name
            ports.setdefault(port, []).append(function)
        for functions in ports.values():
            if any(function["up"] for function in functions):
                return functions
        return next(iter(ports.values()), [])

    def gids(self, device: str) -> dict[int, str]:
        """{index: GID} of RoCE v2 in the table of a device; empty without a device."""
        if not device:
            return {}
        base = f"/sys/class/infiniband/{device}/ports/1"
        types = glob(f"{base}/gid_attrs/types/*")
        indexes = [int(os.path.basename(file)) for file in types if self.read(file) == "RoCE v2"]
        gids = {index: self.read(f"{base}/gids/{index}") for index in sorted(indexes)}
        # An entry that is not in use is all zeros.
        return {index: gid for index, gid in gids.items() if gid.strip(":0")}
