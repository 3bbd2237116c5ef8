"""Classes for `doctor`: access to a machine's commands and files, and the findings of the checks.

This file uses only the standard library, because pair.py sends it to a node on which tunesmith may
not be installed.
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
# Texts of all findings: key `check/case` -> [level, what, why, fix]. `Finding` explains the fields.
TEXTS: dict[str, list[str]] = json.loads(
    Path(__file__).with_name("findings.json").read_text(encoding="utf-8")
)
# Program that prints the versions of Python, tunesmith and torch. It calls `distributions` instead
# of `version`, because `version` raises an error if a package is not installed.
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
# Pattern for names of network functions of a ConnectX port. A DGX Spark has two functions per port,
# because the GB10 reaches the port over two PCIe links. For example, enp1s0f1np1 and enP2p1s0f1np1
# are functions of the same port. The regex group captures the number of the port.
_FUNCTION = re.compile(r"en[pP].*s\d+(f\d+)np\d+$")


@dataclass(frozen=True)
class Finding:
    """One finding of the report.

    Attributes:
        check, case: the two parts of the finding's key in findings.json.
        level: ok, warning or fault.
        what: the sentence that describes the finding.
        why: the consequence or cause of the finding.
        fix: the command that fixes the problem.
        host: the host that the finding is about. "" is this machine.
    """

    check: str
    level: str
    what: str
    why: str = ""
    fix: str = ""
    host: str = ""
    case: str = ""


def finding(key: str, host: str = "", **values: object) -> Finding:
    """Return the finding for `key`. The text of findings.json is formatted with `values`.

    The fix is a shell command, so each value in the fix is quoted for the shell.
    """
    level, what, why, fix = TEXTS[key]
    values["host"] = host
    words = {name: shlex.quote(str(value)) for name, value in values.items()}
    check, _, case = key.partition("/")
    texts = (what.format(**values), why.format(**values), fix.format(**words))
    return Finding(check, level, *texts, case=case)


class Gpu(NamedTuple):
    """The values that nvidia-smi prints for a GPU. An unknown value may be `[N/A]`."""

    name: str
    uuid: str
    driver: str


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
        return self.run(*SMI)

    @functools.cached_property
    def gpus(self) -> list[Gpu]:
        """The GPUs that nvidia-smi lists. The list is empty if nvidia-smi fails."""
        code, out, _ = self.smi
        if code:
            return []
        rows = [re.split(r"\s*,\s*", line.strip()) for line in out.splitlines()]
        # Ignore empty lines and warnings, which have another number of fields.
        return [Gpu(*row) for row in rows if len(row) == len(Gpu._fields)]

    @property
    def is_spark(self) -> bool:
        """Return whether this machine is a DGX Spark, whose GPU shares the host's memory."""
        return any("GB10" in gpu.name for gpu in self.gpus)

    @property
    def has_nvidia(self) -> bool:
        """Return whether the machine has an NVIDIA device or driver. nvidia-smi is not used."""
        files = ["/proc/driver/nvidia/version", *glob("/sys/bus/pci/devices/*/vendor")]
        # 0x10de is NVIDIA's PCI vendor id.
        return any(self.read(file).startswith(("NVRM", "0x10de")) for file in files)

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
    def versions(self) -> dict[str, str]:
        """Software versions that must be the same on both nodes of a pair."""
        versions = {"kernel": os.uname().release}
        if self.gpus:
            versions["driver"] = self.gpus[0].driver
        code, out, _ = self.run(self.python, "-c", VERSIONS_PROGRAM)
        if code == 0:
            # Parse only the last line, because modules that Python imports at its start may print
            # other lines.
            versions.update(json.loads(out.rpartition("\n")[2]))
        return versions

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
