"""Run one of the scripts over all nodes: what run-multi-llama_3b, _8b and _70b start, on every
node.

    run_multi.py CONFIG SCRIPT [flags of the script]

Adds to `accelerate launch --config_file CONFIG` what the playbook has typed into that file on each
node: how many nodes there are, which of them this is, and where the first one listens. In a Slurm
step, one task a node (`srun --ntasks-per-node 1 run-multi-llama_70b`), Slurm says it. Else
MASTER_ADDR is an address of the first node, the same on all; without it this machine is alone.

PET_NNODES (torchrun's name) says how many nodes there are: 2 unless it is set. Of more than two
each but the first has its PET_NODE_RANK. PET_NPROC_PER_NODE says how many processes a node has: one
a GPU unless it is set. With FINETUNING_CONTAINER set, on the host, it runs in that container, whose
/workspace is this folder or the clone; the host needs Python alone.
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
PORT = 29500  # of the first node, where MASTER_PORT names no other
# Of the host, for the container; torchrun, below accelerate, would read the last three too
PASSED = ("HF_TOKEN", "WANDB_API_KEY", "MASTER_ADDR", "MASTER_PORT")
COUNTS = ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK")


class Place(NamedTuple):
    """This node among those of the run: its rank, and the address and port of the first."""

    nodes: int
    rank: int
    address: str
    port: int


class Refused(Exception):
    """The run cannot start: what is wrong, and the command that mends it."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"error: {what}\n  fix: {fix}")


def main(words: Sequence[str]) -> int:
    """Start the run: this process becomes accelerate's. Exit code 2 where it cannot."""
    try:
        command = launch_command(*words)
    except Refused as error:
        print(error, file=sys.stderr)
        return 2
    print(" ".join(command), file=sys.stderr, flush=True)
    return os.execvp(command[0], command)


def launch_command(config: str, script: str, *flags: str) -> list[str]:
    """The words that start this script on this node; the environment is made ready for them."""
    if container := os.environ.get("FINETUNING_CONTAINER", ""):
        return enter_container(container, config, script, *flags)
    if any(importlib.util.find_spec(name) is None for name in ("accelerate", "tunesmith")):
        what = "accelerate and tunesmith are not installed here"
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
    """`docker exec` of this file in the container.

    Tokens go by name, so that no list of processes shows them.
    """
    if shutil.which("docker") is None:
        raise Refused(
            "FINETUNING_CONTAINER is set, and there is no docker here", "unset FINETUNING_CONTAINER"
        )
    command = ["docker", "exec", "-e", "FINETUNING_CONTAINER="]
    for name in (*PASSED, *COUNTS):
        if name in os.environ:
            command += ["-e", name]
    command += ["-it"] if sys.stdin.isatty() and sys.stdout.isatty() else []
    inside = 'd=/workspace; [ -f $d/run_multi.py ] || d=$d/scripts; bash $d/install-requirements && exec python3 $d/run_multi.py "$@"'
    return [*command, container, "bash", "-c", inside, "run_multi", *words]


def place_flags(place: Place, ranks: int) -> list[str]:
    """accelerate's flags for a place; they win over its config file."""
    found = ["--num_machines", str(place.nodes), "--num_processes", str(place.nodes * ranks)]
    if place.nodes > 1:
        found += ["--machine_rank", str(place.rank), "--main_process_ip", place.address]
        found += ["--main_process_port", str(place.port)]
    return found


def find_place() -> Place:
    """Where this node stands, by Slurm, by MASTER_ADDR, or alone; sets what the ranks must know of
    the network to the others.
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
        print("one node: no Slurm step of several, no MASTER_ADDR, no cable", file=sys.stderr)
        return Place(1, 0, "127.0.0.1", 0)
    if not host:
        fix = "export MASTER_ADDR=192.168.177.1, an address of the first node, on all; "
        fix += "for one node alone PET_NNODES=1"
        raise Refused("there may be other nodes, and MASTER_ADDR is not set", fix)
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
            f"one of {nodes} nodes, and PET_NODE_RANK is not set", "export PET_NODE_RANK=1"
        )
    return Place(nodes or 2, 1 if rank is None else rank, endpoint.host, endpoint.port)


def slurm_place() -> Place | None:
    """The place that a Slurm step of several nodes has; None outside of one."""
    env = os.environ
    if int(env.get("SLURM_STEP_NUM_NODES") or 1) < 2:
        if int(env.get("SLURM_JOB_NUM_NODES") or 1) > 1 and "SLURM_STEP_ID" not in env:
            what = f"a job of {env['SLURM_JOB_NUM_NODES']} nodes, and this runs on one of them"
            raise Refused(what, f"srun --ntasks-per-node 1 {' '.join(sys.argv[:1])} ...")
        return None
    tasks, nodes = env["SLURM_STEP_NUM_TASKS"], env["SLURM_STEP_NUM_NODES"]
    if tasks != nodes:
        what = f"{tasks} tasks on {nodes} nodes: one a node is needed"
        raise Refused(what, "srun --ntasks-per-node 1 ...")
    show = ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]]
    first = subprocess.check_output(show, text=True).split()[0]
    port = 20_000 + int(env["SLURM_JOB_ID"]) % 10_000
    return Place(int(nodes), int(env["SLURM_NODEID"]), first, port)


def number(name: str) -> int | None:
    """The count that a variable holds; None where it is not set."""
    if not (text := os.environ.get(name, "")):
        return None
    if not text.isdecimal() or int(text) < 1:
        raise Refused(f"{name}={text} is not a whole number of at least 1", f"unset {name}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
