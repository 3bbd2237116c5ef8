"""A Slurm cluster: its controller, partitions and GPUs, and what a step on two of its nodes sees.

On the nodes that is the environment, the names of the others and the folder of the runs.
"""

import json
import sys
import tempfile
from pathlib import Path

from tunesmith.host.child_output import last_line
from tunesmith.tools.doctor.system import Finding, System, finding
from tunesmith.units import count_of

NODE_WAIT_SECONDS = 20  # for free nodes
# What a node prints of itself; its first word is a file in the folder of the runs.
NODE_PROGRAM = """
import importlib.util, json, os, socket, subprocess, sys
unknown = []
command = ["scontrol", "show", "hostnames"]
for name in subprocess.run(command, capture_output=True, text=True).stdout.split():
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        unknown.append(name)
report = {
    "node": os.environ["SLURMD_NODENAME"],
    "sees": os.path.isfile(sys.argv[1]),
    "unknown": unknown,
    "has": importlib.util.find_spec("tunesmith") is not None,
}
print(json.dumps(report))
"""


def check_slurm(folder: Path) -> list[Finding]:
    """The findings; `folder` is where runs write, which all nodes must see.

    SLURM_PARTITION chooses the partition.
    """
    system = System()
    code, out, errors = system.run("sinfo", "-h", "-o", "%R|%a|%l|%D|%T|%G", limit=15)
    if code == 127:
        return [finding("controller/absent")]
    if code:
        return [finding("controller/down", message=last_line(errors))]
    partitions = []
    usable_nodes = 0
    has_gpus = False
    for line in out.splitlines():
        name, is_up, limit, count, state, gres = line.split("|")
        has_gpus = has_gpus or "gpu" in gres
        offer = "no GPUs" if gres == "(null)" else gres
        time = "no time limit" if limit == "infinite" else f"at most {limit}"
        partitions.append(f"{name}: {count_of(int(count), f'{state} node')}, {offer}, {time}")
        # One partition may have nodes in several states, a line each.
        if is_up == "up" and state in ("idle", "mixed", "allocated"):
            usable_nodes += int(count)
    shown = "; ".join(partitions)
    if not usable_nodes:
        return [finding("partitions/none", shown=shown)]
    findings = [finding("partitions/ok", shown=shown)]
    if not has_gpus:
        findings.append(finding("gres/none"))
    return findings + _on_nodes(system, folder.resolve(), min(2, usable_nodes))


def _on_nodes(system: System, folder: Path, count: int) -> list[Finding]:
    """Run a step on `count` nodes and report what it sees there."""
    python = sys.executable
    wait = f"--immediate={NODE_WAIT_SECONDS}"
    srun = ["srun", "-Q", f"-N{count}", "--ntasks-per-node=1", wait, "-t2"]
    # The file is there while the nodes look for it, and gone afterwards.
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".tunesmith-doctor-") as file:
        # srun gives the nodes up after NODE_WAIT_SECONDS; the rest is for Python to start there.
        _, out, errors = system.run(
            *srun, python, "-c", NODE_PROGRAM, file.name, limit=NODE_WAIT_SECONDS + 40
        )
    nodes = [json.loads(line) for line in sorted(out.splitlines()) if line.startswith("{")]
    if not nodes:
        # The nodes' daemon could not start the interpreter.
        case = "environment/unseen" if "execve" in errors else "srun/none"
        message = " ".join(errors.splitlines()[:2])
        return [finding(case, python=python, folder=folder, count=count, message=message)]
    unseen = [finding("folder/unseen", **node, folder=folder) for node in nodes if not node["sees"]]
    unknown = [
        finding("names/unknown", **node, names=", ".join(node["unknown"]))
        for node in nodes
        if node["unknown"]
    ]
    bare = [finding("environment/bare", **node, python=python) for node in nodes if not node["has"]]
    names = ", ".join(node["node"] for node in nodes)
    ok = finding("nodes/ok", names=names, folder=folder, python=python)
    return unseen + unknown + bare or [ok]
