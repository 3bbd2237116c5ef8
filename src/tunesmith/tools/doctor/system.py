"""One machine's commands, files and properties, and the findings of a report.

This file uses the standard library only: pair.py sends it to a node that may lack tunesmith.
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
from typing import Any, NamedTuple

OK = "ok"
WARNING = "warning"
FAULT = "fault"
GIB = 2**30
# `check/case` -> level, what, why, fix
TEXTS: dict[str, list[str]] = json.loads(
    Path(__file__).with_name("findings.json").read_text(encoding="utf-8")
)
# `distributions` returns nothing for a source tree that is not installed; `version` raises an
# error.
VERSIONS_PROGRAM = """
import importlib.metadata, json, platform
versions = {"python": platform.python_version()}
for name in ("tunesmith", "torch"):
    for distribution in importlib.metadata.distributions(name=name):
        versions[name] = distribution.version
        break
print(json.dumps(versions))
"""
SMI = ("nvidia-smi", "--query-gpu=name,uuid,driver_version", "--format=csv,noheader")
# A Spark's ConnectX port is two network functions, because the GB10 reaches it over two PCIe
# links: enp1s0f1np1 and enP2p1s0f1np1 are one port.
_FUNCTION = re.compile(r"en[pP].*s\d+(f\d+)np\d+$")


@dataclass(frozen=True)
class Finding:
    """A line of the report. `level` is ok, warning or fault; `fix` is a command.

    `check` and `case` are the two parts of a key in findings.json.
    """

    check: str
    level: str
    what: str
    why: str = ""
    fix: str = ""
    host: str = ""
    case: str = ""


def finding(key: str, host: str = "", **values: object) -> Finding:
    """Return the finding of `key` in findings.json, with the values filled in.

    Each value is one quoted word of the fix.
    """
    level, what, why, fix = TEXTS[key]
    values["host"] = host
    words = {name: shlex.quote(str(value)) for name, value in values.items()}
    check, _, case = key.partition("/")
    texts = (what.format(**values), why.format(**values), fix.format(**words))
    return Finding(check, level, *texts, case=case)


class Gpu(NamedTuple):
    """A GPU as nvidia-smi prints it. An unknown value may be `[N/A]`."""

    name: str
    uuid: str
    driver: str


class System:
    """Access to this machine's commands and files; each is looked up once.

    Args:
        python: the interpreter of the runs. If this machine does not have it, python3 is used.
    """

    def __init__(self, python: str = sys.executable):
        self.python = python if os.access(python, os.X_OK) else "python3"

    def read(self, path: str) -> str:
        """Return a file's text. It is empty if the file does not exist or may not be read.

        Reading a GID that is not set fails with EINVAL.
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
        # A user's PATH often lacks the folders of `ip` and `dockerd`; messages are matched in
        # English.
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
        """The answer of nvidia-smi about the GPUs."""
        return self.run(*SMI)

    @functools.cached_property
    def gpus(self) -> list[Gpu]:
        """The GPUs that nvidia-smi lists. Empty if it fails."""
        code, out, _ = self.smi
        if code:
            return []
        rows = [re.split(r"\s*,\s*", line.strip()) for line in out.splitlines()]
        # Empty lines and warnings are not rows.
        return [Gpu(*row) for row in rows if len(row) == len(Gpu._fields)]

    @property
    def is_spark(self) -> bool:
        """Return whether the GPU is a DGX Spark's, which shares the host's memory."""
        return any("GB10" in gpu.name for gpu in self.gpus)

    @property
    def has_nvidia(self) -> bool:
        """Return whether there is an NVIDIA device or its kernel module, without nvidia-smi."""
        files = ["/proc/driver/nvidia/version", *glob("/sys/bus/pci/devices/*/vendor")]
        # 0x10de is NVIDIA's PCI vendor id.
        return any(self.read(file).startswith(("NVRM", "0x10de")) for file in files)

    @functools.cached_property
    def docker(self) -> dict[str, Any]:
        """`docker info`. If it does not answer, only `refused`, the reason, and `absent`."""
        code, out, errors = self.run("docker", "info", "--format", "{{json .}}")
        info = json.loads(out) if out.startswith("{") else {}
        # Some versions exit with 0 though the daemon does not answer.
        if code == 0 and info.get("ServerVersion"):
            return info
        return {"refused": "; ".join(info.get("ServerErrors") or [errors]), "absent": code == 127}

    @functools.cached_property
    def versions(self) -> dict[str, str]:
        """The versions that must be the same on both nodes."""
        versions = {"kernel": os.uname().release}
        if self.gpus:
            versions["driver"] = self.gpus[0].driver
        code, out, _ = self.run(self.python, "-c", VERSIONS_PROGRAM)
        if code == 0:
            # Modules that Python imports at its start may print lines before.
            versions.update(json.loads(out.rpartition("\n")[2]))
        return versions

    @functools.cached_property
    def cable(self) -> list[dict[str, Any]]:
        """The network functions of the port with the cable, as `ip -j addr` prints them.

        This is the first port with a function that is up, or else the first port. Each function
        also has its RDMA `device`, and `gids`, the indexes of RoCE v2 in the device's GID table.
        """
        # /sys/class/infiniband/DEVICE/device/net/NAME
        paths = [path.split("/") for path in glob("/sys/class/infiniband/*/device/net/*")]
        devices = {parts[-1]: parts[4] for parts in paths}
        ports: dict[str, list[dict[str, Any]]] = {}
        for row in json.loads(self.run("ip", "-j", "addr")[1] or "[]"):
            name = row["ifname"]
            device = devices.get(name, "")
            match = _FUNCTION.match(name)
            # A port without an RDMA device is recognized by its name only.
            if match or device:
                function = {**row, "device": device, "gids": self.gids(device)}
                ports.setdefault(match[1] if match else name, []).append(function)
        # The first of equal ports is returned.
        return max(
            ports.values(),
            key=lambda functions: any(row["operstate"] == "UP" for row in functions),
            default=[],
        )

    def gids(self, device: str) -> list[str]:
        """Return the indexes of RoCE v2 in the GID table of an RDMA device, [] without a device."""
        base = f"/sys/class/infiniband/{device}/ports/1"
        types = sorted(glob(f"{base}/gid_attrs/types/*"))
        indexes = [os.path.basename(file) for file in types if self.read(file) == "RoCE v2"]
        # An entry that is not in use is all zeros.
        return [index for index in indexes if self.read(f"{base}/gids/{index}").strip(":0")]
