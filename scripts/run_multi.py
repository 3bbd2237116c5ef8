"""Start one of the scripts on several nodes.

    run_multi.py CONFIG SCRIPT [flags of the script]

run-multi-llama_3b, run-multi-llama_8b and run-multi-llama_70b start this program on every node. It
starts `accelerate launch --config_file CONFIG` and adds flags for the number of nodes, the rank of
this node, and the address of the first node. The playbook's users write these values into CONFIG on
each node.

In a Slurm step with one task per node (`srun --ntasks-per-node 1 run-multi-llama_70b`), the values
come from Slurm. Otherwise they come from the first four of these environment variables:

MASTER_ADDR: an address of the first node, the same on all nodes. If neither MASTER_ADDR nor
    PET_NNODES is set, and no RDMA device has an active link, the program runs on this node only.
MASTER_PORT: the port of the first node (default: 29500).
PET_NNODES: the number of nodes (default: 2). The names PET_* are those of torchrun.
PET_NODE_RANK: the rank of this node. If there are more than two nodes, every node except the first
    needs it.
PET_NPROC_PER_NODE: the number of processes per node (default: one per GPU, or 1).
FINETUNING_CONTAINER: a container on this host. If it is set, the program runs in the container. The
    container must have this folder or the clone at /workspace. The host needs only Python.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
PORT = 29500  # port of the first node if MASTER_PORT is not set
# Variables that are passed from the host to the container. torchrun, which accelerate uses, reads
# COUNTS too, so COUNTS are removed from the environment before accelerate starts.
PASSED = ("HF_TOKEN", "WANDB_API_KEY", "MASTER_ADDR", "MASTER_PORT")
COUNTS = ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK")


class Place(NamedTuple):
    """Number of nodes, rank of this node, and address and port of the first node."""

    nodes: int
    rank: int
    address: str
    port: int


class Refused(Exception):
    """The run cannot start. The text says what is wrong, and which command fixes it."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"error: {what}\n  fix: {fix}")


def main(words: Sequence[str]) -> int:
    """Replace this process by `accelerate launch` or `docker exec`.

    Return exit code 2 if the run cannot start.
    """
    try:
        command = launch_command(*words)
    except Refused as error:
        print(error, file=sys.stderr)
        return 2
    print(" ".join(command), file=sys.stderr, flush=True)
    return os.execvp(command[0], command)


def launch_command(config: str, script: str, *flags: str) -> list[str]:
    """Return the command that starts a script on this node.

    Also change the environment variables as the command needs them.
    """
    if container := os.environ.get("FINETUNING_CONTAINER", ""):
        return enter_container(container, config, script, *flags)
    if any(importlib.util.find_spec(name) is None for name in ("accelerate", "tunesmith")):
        what = "accelerate or tunesmith is not installed in this environment"
        raise Refused(what, f"bash {HERE / 'install-requirements'}")
    from tunesmith.launch.node import count_gpus

    ranks = number("PET_NPROC_PER_NODE") or count_gpus() or 1
    place = find_place()
    for name in COUNTS:
        os.environ.pop(name, None)
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(HERE / "configs" / config)]
    return [*launcher, *place_flags(place, ranks), str(HERE / script), *flags]


def enter_container(container: str, *words: str) -> list[str]:
    """Return the `docker exec` command that runs this file in the container.

    Variables are passed by name only, so that lists of processes do not show tokens.
    """
    if shutil.which("docker") is None:
        raise Refused(
            "FINETUNING_CONTAINER is set, but the command docker was not found",
            "unset FINETUNING_CONTAINER",
        )
    command = ["docker", "exec", "-e", "FINETUNING_CONTAINER="]
    for name in (*PASSED, *COUNTS):
        if name in os.environ:
            command += ["-e", name]
    command += ["-it"] if sys.stdin.isatty() and sys.stdout.isatty() else []
    inside = 'd=/workspace; [ -f $d/run_multi.py ] || d=$d/scripts; bash $d/install-requirements && exec python3 $d/run_multi.py "$@"'
    return [*command, container, "bash", "-c", inside, "run_multi", *words]


def place_flags(place: Place, ranks: int) -> list[str]:
    """Return the flags of accelerate for a node. They override accelerate's config file."""
    found = ["--num_machines", str(place.nodes), "--num_processes", str(place.nodes * ranks)]
    if place.nodes > 1:
        found += ["--machine_rank", str(place.rank), "--main_process_ip", place.address]
        found += ["--main_process_port", str(place.port)]
    return found


def find_place() -> Place:
    """Find the place of this node by Slurm or by MASTER_ADDR, or as the only node.

    With MASTER_ADDR, also set the environment variables with which the ranks reach the other nodes.
    Raise Refused if a variable is missing or wrong.
    """
    place = slurm_place()
    if place is not None:
        return place
    from tunesmith.errors import TunesmithError
    from tunesmith.launch.rendezvous import find_endpoint
    from tunesmith.tools.launch.deploy import read_facts, variables_of_ranks

    nodes = number("PET_NNODES")
    host = os.environ.get("MASTER_ADDR")
    devices = read_facts("").rdma
    if nodes == 1 or not (nodes or host or devices):
        print(
            "starting on this node only: PET_NNODES is 1, or nothing indicates other nodes "
            "(a Slurm step of several nodes, MASTER_ADDR, or an active RDMA link)",
            file=sys.stderr,
        )
        return Place(1, 0, "127.0.0.1", 0)
    if not host:
        fix = "export MASTER_ADDR=192.168.177.1, an address of the first node, on every node; "
        fix += "to use only this node, export PET_NNODES=1"
        raise Refused("there may be other nodes, but MASTER_ADDR is not set", fix)
    try:
        endpoint = find_endpoint(host, number("MASTER_PORT") or PORT)
    except TunesmithError as error:
        raise Refused(f"MASTER_ADDR={host}: {error.what}", error.fix) from None
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        os.environ.setdefault(name, endpoint.interface)
    os.environ |= variables_of_ranks(devices)
    rank = 0 if endpoint.is_here else number("PET_NODE_RANK")
    if rank is None and (nodes or 2) > 2:
        raise Refused(
            f"this is one of {nodes} nodes, but PET_NODE_RANK is not set",
            "export PET_NODE_RANK=1, with a different rank on each node",
        )
    return Place(nodes or 2, 1 if rank is None else rank, endpoint.host, endpoint.port)


def slurm_place() -> Place | None:
    """Return the place of this node in a Slurm step of several nodes.

    Return None outside of such a step. Raise Refused if the step does not have one task per node.
    """
    env = os.environ
    if int(env.get("SLURM_STEP_NUM_NODES") or 1) < 2:
        if int(env.get("SLURM_JOB_NUM_NODES") or 1) > 1 and "SLURM_STEP_ID" not in env:
            what = (
                f"the job has {env['SLURM_JOB_NUM_NODES']} nodes, but this command runs on only one"
            )
            raise Refused(what, f"srun --ntasks-per-node 1 {' '.join(sys.argv[:1])} ...")
        return None
    tasks, nodes = env["SLURM_STEP_NUM_TASKS"], env["SLURM_STEP_NUM_NODES"]
    if tasks != nodes:
        what = f"the Slurm step has {tasks} tasks on {nodes} nodes, but needs one task per node"
        raise Refused(what, "srun --ntasks-per-node 1 ...")
    show = ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]]
    first = subprocess.check_output(show, text=True).split()[0]
    port = 20_000 + int(env["SLURM_JOB_ID"]) % 10_000
    return Place(int(nodes), int(env["SLURM_NODEID"]), first, port)


def number(name: str) -> int | None:
    """Return the value of a variable that contains a count. Return None if it is not set.

    Raise Refused if the value is not a positive integer.
    """
    if not (text := os.environ.get(name, "")):
        return None
    if not text.isdecimal() or int(text) < 1:
        raise Refused(f"{name}={text} is not a positive integer", f"unset {name}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
