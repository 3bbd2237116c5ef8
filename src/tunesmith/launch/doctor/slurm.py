"""A Slurm cluster: controller, partitions and GPUs; on two of its nodes the environment, the names and the folder."""

import json
import sys
import tempfile
from pathlib import Path

from tunesmith.launch.doctor.system import Finding, System, say

WAIT = 20  # seconds for free nodes
PROBE = """
import importlib.util, json, os, socket, subprocess, sys
unknown = []
for name in subprocess.run(["scontrol", "show", "hostnames"], capture_output=True, text=True).stdout.split():
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        unknown.append(name)
told = {"node": os.environ["SLURMD_NODENAME"], "sees": os.path.isfile(sys.argv[1]), "unknown": unknown}
print(json.dumps(told | {"has": importlib.util.find_spec("tunesmith") is not None}))
"""


def check_slurm(folder: Path) -> list[Finding]:
    """The findings; `folder` is where runs write, which all nodes must see. SLURM_PARTITION chooses the partition."""
    s = System()
    code, out, said = s.run("sinfo", "-h", "-o", "%R|%a|%l|%D|%T|%G", limit=15)
    if code:
        return [
            say(
                "controller/absent" if code == 127 else "controller/down",
                said=said.rpartition("\n")[2],
            )
        ]
    rows = [line.split("|") for line in out.splitlines()]
    usable = [row for row in rows if row[1] == "up" and row[4] in ("idle", "mixed", "allocated")]
    shown = "; ".join(
        f"{name}: {n} {state}, {gres}, at most {limit}" for name, _, limit, n, state, gres in rows
    )
    if not usable:
        return [say("partitions/none", shown=shown)]
    found = [say("partitions/ok", shown=shown), *([] if "gpu" in shown else [say("gres/none")])]
    return found + _on_nodes(s, folder.resolve(), min(2, sum(int(row[3]) for row in usable)))


def _on_nodes(s: System, folder: Path, count: int) -> list[Finding]:
    """What a step on so many nodes sees."""
    python = sys.executable
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".tunesmith-doctor-") as token:
        srun = (
            "srun",
            "-Q",
            f"-N{count}",
            "--ntasks-per-node=1",
            f"--immediate={WAIT}",
            "-t2",
            python,
            "-c",
            PROBE,
        )
        _, out, said = s.run(*srun, token.name, limit=WAIT + 40)
    nodes = [json.loads(line) for line in sorted(out.splitlines()) if line.startswith("{")]
    if not nodes:
        case, first = (
            "environment/unseen" if "execve" in said else "srun/none",
            " ".join(said.splitlines()[:2]),
        )
        return [say(case, python=python, folder=folder, count=count, said=first)]
    found = [say("folder/unseen", **row, folder=folder) for row in nodes if not row["sees"]]
    found += [
        say("names/unknown", **row, names=", ".join(row["unknown"]))
        for row in nodes
        if row["unknown"]
    ]
    found += [say("environment/bare", **row, python=python) for row in nodes if not row["has"]]
    names = ", ".join(row["node"] for row in nodes)
    return found or [say("nodes/ok", names=names, folder=folder, python=python)]
