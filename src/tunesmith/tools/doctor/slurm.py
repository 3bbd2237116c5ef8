"""Checks of a Slurm cluster: its controller, its partitions, and a job step on two nodes."""

import json
import sys
import tempfile
from pathlib import Path

from tunesmith.host.child_output import last_line
from tunesmith.tools.doctor.checks import System
from tunesmith.tools.doctor.findings import Finding, finding
from tunesmith.units import count_of

# Seconds to wait until nodes are free.
NODE_WAIT_SECONDS = 20
# Program that runs on each node and prints a report with the keys of its faults. The argument
# is the path of a file in the folder of the runs.
NODE_PROGRAM = """
import importlib.util, json, os, socket, subprocess, sys
faults = []
if not os.path.isfile(sys.argv[1]):
    faults.append("folder/unseen")
unknown = []
command = ["scontrol", "show", "hostnames"]
for name in subprocess.run(command, capture_output=True, text=True).stdout.split():
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        unknown.append(name)
if unknown:
    faults.append("names/unknown")
if importlib.util.find_spec("tunesmith") is None:
    faults.append("environment/bare")
node = os.environ["SLURMD_NODENAME"]
print(json.dumps({"node": node, "unknown": ", ".join(unknown), "faults": faults}))
"""


def check_slurm(folder: Path) -> list[Finding]:
    """Check the Slurm cluster and return the findings.

    The job step runs in the partition that the environment variable SLURM_PARTITION names.

    Args:
        folder: the folder of the runs. All nodes must be able to read it.
    """
    system = System()
    code, out, errors = system.run("sinfo", "-h", "-o", "%R|%a|%D|%T|%G", limit=15)
    if code == 127:
        return [finding("controller/absent")]
    if code:
        return [finding("controller/down", message=last_line(errors))]
    partitions = []
    usable_nodes = 0
    for line in out.splitlines():
        name, is_up, count, state, gres = line.split("|")
        offer = "no GPUs" if gres == "(null)" else gres
        partitions.append(f"{name}: {count_of(int(count), f'{state} node')}, {offer}")
        # sinfo prints one line per partition and node state, with the number of nodes in this
        # state.
        if is_up == "up" and state in ("idle", "mixed", "allocated"):
            usable_nodes += int(count)
    shown = "; ".join(partitions)
    if not usable_nodes:
        return [finding("partitions/none", shown=shown)]
    case = "ok" if "gpu" in shown else "cpu"
    return [finding(f"partitions/{case}", shown=shown), *_on_nodes(system, folder, usable_nodes)]


def _on_nodes(system: System, folder: Path, usable_nodes: int) -> list[Finding]:
    """Run NODE_PROGRAM on at most two nodes with srun, and return the findings."""
    folder = folder.resolve()
    count = min(2, usable_nodes)
    python = sys.executable
    wait = f"--immediate={NODE_WAIT_SECONDS}"
    srun = ["srun", "-Q", f"-N{count}", "--ntasks-per-node=1", wait, "-t2"]
    # Create a temporary file to test whether the nodes can see the folder.
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".tunesmith-doctor-") as file:
        # srun waits up to NODE_WAIT_SECONDS for free nodes. Allow 40 seconds more for Python's
        # start on the nodes.
        _, out, errors = system.run(
            *srun, python, "-c", NODE_PROGRAM, file.name, limit=NODE_WAIT_SECONDS + 40
        )
    nodes = [json.loads(line) for line in sorted(out.splitlines()) if line.startswith("{")]
    if not nodes:
        # "execve" in the error output means that a node could not start the interpreter.
        case = "environment/unseen" if "execve" in errors else "srun/none"
        message = " ".join(errors.splitlines()[:2])
        return [finding(case, python=python, folder=folder, count=count, message=message)]
    findings = [
        finding(key, **node, folder=folder, python=python)
        for node in nodes
        for key in node["faults"]
    ]
    names = ", ".join(node["node"] for node in nodes)
    return findings or [finding("srun/ok", names=names, folder=folder, python=python)]
