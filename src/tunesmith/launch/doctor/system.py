"""What one machine is: its commands and files. With the standard library alone, as pair.py sends it to the other node."""

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
from typing import Any

OK, FAULT, GIB = "ok", "fault", 1 << 30
TEXTS: dict[str, list[str]] = json.loads(
    Path(__file__).with_name("findings.json").read_text(encoding="utf-8")
)
# Values in a fix that are a fix themselves, and several words: names of packages
UNQUOTED = (
    "fix",
    "names",
)
VERSIONS = """import importlib.metadata as m, json
print(json.dumps({name: next((d.version for d in m.distributions(name=name)), "") for name in ("tunesmith", "torch")}))"""
SMI = (
    "nvidia-smi",
    "--query-gpu=name,uuid,driver_version,compute_cap,memory.total",
    "--format=csv,noheader",
)
# enp1s0f1np1 and enP2p1s0f1np1: two functions of one port
_FUNCTION = re.compile(r"en[pP].*s\d+(f\d+)np\d+$")


@dataclass(frozen=True)
class Finding:
    """One line of the report. `level` is ok, warning or fault; `fix` is the command that mends it."""

    check: str
    level: str
    what: str
    why: str = ""
    fix: str = ""
    host: str = ""


def say(key: str, host: str = "", **values: Any) -> Finding:
    """The finding that findings.json has under `check/case`."""
    level, *texts = TEXTS[key]
    what, why, fix = texts
    what, why = (text.format(host=host, **values) for text in (what, why))
    # shlex alone: the other node of a pair has this file, and not the rest of tunesmith.
    quoted = {
        name: shlex.quote(str(value))
        for name, value in {"host": host, **values}.items()
        if name not in UNQUOTED
    }
    fix = fix.format(**quoted, **{name: values[name] for name in UNQUOTED if name in values})
    return Finding(key.partition("/")[0], level, what, why, fix)


class System:
    """Access to a machine's commands and files. `python` is the interpreter of the runs, if it is there."""

    def __init__(self, python: str = sys.executable, folders: tuple[str, ...] = ()):
        self.path = os.environ.get("PATH", os.defpath)
        self.python = python if os.access(python, os.X_OK) else "python3"
        self.folders = (os.environ.get("HF_HOME") or "~/.cache/huggingface", *folders)

    def read(self, path: str) -> str:
        """A file's text; empty where it is not there or may not be read. A GID that is not set is EINVAL."""
        try:
            return Path(path).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""

    def run(self, *command: str, limit: float = 10.0) -> tuple[int, str, str]:
        """Exit code, stdout, stderr; 127: there is no such command, 124: it took more than `limit` seconds."""
        env = {**os.environ, "PATH": f"{self.path}:/usr/sbin:/sbin", "LC_ALL": "C"}
        try:
            done = subprocess.run(
                command, env=env, capture_output=True, text=True, timeout=limit, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return 127 if isinstance(error, FileNotFoundError) else 124, "", str(error)
        return done.returncode, done.stdout.strip(), done.stderr.strip()

    @functools.cached_property
    def smi(self) -> tuple[int, str, str]:
        """What nvidia-smi says of the GPUs."""
        return self.run(*SMI)

    @functools.cached_property
    def gpus(self) -> list[list[str]]:
        """Name, UUID, driver, compute capability and memory of each GPU."""
        rows = [[word.strip() for word in line.split(",")] for line in self.smi[1].splitlines()]
        return [row for row in rows if self.smi[0] == 0 and len(row) == 5]

    @property
    def has_nvidia(self) -> bool:
        """Whether the machine has an NVIDIA device or its kernel module, whatever nvidia-smi says."""
        vendors = map(
            self.read, ("/proc/driver/nvidia/version", *glob("/sys/bus/pci/devices/*/vendor"))
        )
        return any(text.startswith(("NVRM", "0x10de")) for text in vendors)

    @functools.cached_property
    def docker(self) -> dict[str, Any]:
        """`docker info`; where it does not answer only `refused`, the reason, and `absent`."""
        code, out, said = self.run("docker", "info", "--format", "{{json .}}")
        info = json.loads(out) if out.startswith("{") else {}
        refused = {"refused": "; ".join(info.get("ServerErrors") or [said]), "absent": code == 127}
        return info if code == 0 and info.get("ServerVersion") else refused

    @functools.cached_property
    def versions(self) -> dict[str, str]:
        """What must be the same on both nodes."""
        code, out, _ = self.run(self.python, "-c", VERSIONS)
        found = json.loads(out) if code == 0 else {"tunesmith": "", "torch": ""}
        found["python"] = self.run(self.python, "--version")[1].removeprefix("Python ")
        return {
            **found,
            "driver": self.gpus[0][2] if self.gpus else "",
            "kernel": os.uname().release,
        }

    @functools.cached_property
    def packages(self) -> list[str]:
        """The packages of the running kernel, the driver and RDMA, with versions; empty without dpkg."""
        _, out, _ = self.run(
            "dpkg-query", "-W", "-f", "${db:Status-Abbrev} ${Package} ${Version}\n"
        )
        kernel = rf"linux-\S*{re.escape(os.uname().release)}"
        return re.findall(
            rf"^ii +((?:{kernel}|\S*nvidia\S*|rdma-core|libibverbs1|mlnx\S*|doca\S*) \S+)$",
            out,
            re.M,
        )

    @functools.cached_property
    def interfaces(self) -> dict[str, list[str]]:
        """Interface -> its IPv4 addresses with prefixes."""
        rows = [row for row in json.loads(self.run("ip", "-j", "-4", "addr")[1] or "[]") if row]
        return {
            row["ifname"]: [f"{a['local']}/{a['prefixlen']}" for a in row["addr_info"]]
            for row in rows
        }

    @functools.cached_property
    def cable(self) -> list[dict[str, Any]]:
        """The network functions of the port with the cable: the first port with one that is up, else the first."""
        devices = {
            path.split("/")[-1]: path.split("/")[4]
            for path in glob("/sys/class/infiniband/*/device/net/*")
        }
        names = {path.split("/")[-1] for path in glob("/sys/class/net/en*")}
        found: dict[str, list[dict[str, Any]]] = {}
        for name in sorted({n for n in names if _FUNCTION.match(n)} | {*devices}, key=str.lower):
            fits, base = _FUNCTION.match(name), f"/sys/class/net/{name}"
            # Speed in Mb/s
            mtu, speed = (int(self.read(f"{base}/{part}") or -1) for part in ("mtu", "speed"))
            row = {
                "name": name,
                "up": self.read(f"{base}/operstate") == "up",
                "mtu": mtu,
                "speed": speed,
            }
            row |= {"addresses": self.interfaces.get(name, []), "device": devices.get(name, "")}
            found.setdefault(fits[1] if fits else name, []).append(
                row | {"gids": self.gids(str(row["device"]))}
            )
        ports = [*found.values()]
        return next(
            (port for port in ports if any(row["up"] for row in port)), ports[0] if ports else []
        )

    def gids(self, device: str) -> dict[int, str]:
        """{index: GID} of RoCE v2 in the table of a device."""
        base = f"/sys/class/infiniband/{device}/ports/1"
        types = glob(f"{base}/gid_attrs/types/*") if device else []
        indexes = sorted(int(path.split("/")[-1]) for path in types if self.read(path) == "RoCE v2")
        return {
            index: gid
            for index in indexes
            if (gid := self.read(f"{base}/gids/{index}")).strip(":0")
        }
