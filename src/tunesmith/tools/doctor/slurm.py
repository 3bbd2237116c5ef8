"""A Slurm cluster: its controller, its partitions, and what a step on two of its nodes sees."""

import json
import sys
import tempfile
from pathlib import Path

from tunesmith.host.child_output import last_line
from tunesmith.tools.doctor.system import Finding, System, finding
from tunesmith.units import count_of

NODE_WAIT_SECONDS = 20  # for free nodes
# A node's report. Its first word is a file in the folder of the runs.
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
    "unknown": ", ".join(unknown),
    "has": importlib.util.find_spec("tunesmith") is not None,
}
print(json.dumps(report))
"""


def check_slurm(folder: Path) -> list[Finding]:
    """Return the findings. All nodes must see `folder`, where runs write.

    SLURM_PARTITION chooses the partition.
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
        # A partition has a line for each state of its nodes.
        if is_up == "up" and state in ("idle", "mixed", "allocated"):
            usable_nodes += int(count)
    shown = "; ".join(partitions)
    if not usable_nodes:
        return [finding("partitions/none", shown=shown)]
    case = "ok" if "gpu" in shown else "cpu"
    return [
        finding(f"partitions/{case}", shown=shown),
        *_on_nodes(system, folder.resolve(), min(2, usable_nodes)),
    ]


def _on_nodes(system: System, folder: Path, count: int) -> list[Finding]:
    """Run a step on `count` nodes and return what it finds there."""
    python = sys.executable
    wait = f"--immediate={NODE_WAIT_SECONDS}"
    srun = ["srun", "-Q", f"-N{count}", "--ntasks-per-node=1", wait, "-t2"]
    # The file is removed when the nodes have looked for it.
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".tunesmith-doctor-") as file:
        # srun gives up after NODE_WAIT_SECONDS. Python starts on the nodes in the remaining time.
        _, out, errors = system.run(
            *srun, python, "-c", NODE_PROGRAM, file.name, limit=NODE_WAIT_SECONDS + 40
        )
    nodes = [json.loads(line) for line in sorted(out.splitlines()) if line.startswith("{")]
    if not nodes:
        # The nodes' daemon could not start the interpreter.
        case = "environment/unseen" if "execve" in errors else "srun/none"
        message = " ".join(errors.splitlines()[:2])
        return [finding(case, python=python, folder=folder, count=count, message=message)]
    findings = []
    for node in nodes:
        is_wrong = {
            "folder/unseen": not node["sees"],
            "names/unknown": node["unknown"],
            "environment/bare": not node["has"],
        }
        values = {**node, "folder": folder, "python": python}
        findings += [finding(key, **values) for key, wrong in is_wrong.items() if wrong]
    names = ", ".join(node["node"] for node in nodes)
    return findings or [finding("srun/ok", names=names, folder=folder, python=python)]
