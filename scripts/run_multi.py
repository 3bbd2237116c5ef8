"""Run one of the scripts over all nodes: what run-multi-llama_3b, _8b and _70b start, on every
node.

    run_multi.py CONFIG SCRIPT [flags of the script]

Adds to `accelerate launch --config_file CONFIG` what the playbook has typed into that file on each
node: how many nodes there are, which of them this is, and where the first one listens. It finds
them where it runs:

- in a Slurm step, one task a node (`srun --ntasks-per-node 1 run-multi-llama_70b`): Slurm says
  them; - behind a cable, as in the tasks of a Swarm stack: each node calls on the network of
  NCCL_SOCKET_IFNAME, else of the ConnectX port that is up, until all have heard each other; the
  lowest address is the first node; - with neither: this machine alone.

PET_NNODES (torchrun's name) says how many nodes to wait for: 2 unless it is set; 1 waits for none.
PET_NPROC_PER_NODE says how many processes a node has: one a GPU unless it is set. With
FINETUNING_CONTAINER set, on the host, it runs in that container, whose /workspace is this folder or
the clone. It needs Python's own modules alone, as the host may have no others.
"""

from __future__ import annotations

import fcntl
import importlib.util
import ipaddress
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
PATIENCE = 600.0  # seconds in which the others must be started
CALL_PORT = 29403  # UDP, on the cable's broadcast address
CALL_EVERY = 0.2  # seconds
AFTER = 1.0  # seconds in which a node that knows all goes on calling, for those that do not
GET_ADDRESS, GET_NETMASK = 0x8915, 0x891B  # SIOCGIFADDR, SIOCGIFNETMASK
RDMA, NETWORKS = Path("/sys/class/infiniband"), Path("/sys/class/net")


class Place(NamedTuple):
    """This node among those of the run: its rank, and the address and port of the first."""

    nodes: int
    rank: int
    address: str
    port: int


class Call(NamedTuple):
    """What a node tells the others before it knows them."""

    script: str
    port: int
    ranks: int
    heard: tuple[str, ...]


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
    if (
        importlib.util.find_spec("accelerate") is None
        or importlib.util.find_spec("tunesmith") is None
    ):
        raise Refused(
            "accelerate and tunesmith are not installed here",
            f"bash {HERE / 'install-requirements'}",
        )
    ranks = processes()
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(HERE / "configs" / config),
    ]
    command += [*place_flags(find_place(script, ranks), ranks), str(HERE / script), *flags]
    # torchrun, below accelerate, would read them too
    for name in (
        "PET_NNODES",
        "PET_NPROC_PER_NODE",
    ):
        os.environ.pop(name, None)
    return command


def enter_container(container: str, *words: str) -> list[str]:
    """`docker exec` of this file in the container.

    Tokens go by name, so that no list of processes shows them.
    """
    if shutil.which("docker") is None:
        raise Refused(
            "FINETUNING_CONTAINER is set, and there is no docker here", "unset FINETUNING_CONTAINER"
        )
    passed = [
        name
        for name in ("HF_TOKEN", "WANDB_API_KEY", "PET_NNODES", "PET_NPROC_PER_NODE")
        if name in os.environ
    ]
    command = [
        "docker",
        "exec",
        *(word for name in passed for word in ("-e", name)),
        "-e",
        "FINETUNING_CONTAINER=",
    ]
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


def find_place(script: str, ranks: int) -> Place:
    """Where this node stands, by Slurm, by calling on the cable, or alone; sets what the ranks must
    know of the cable.
    """
    wanted = number("PET_NNODES")
    if (place := slurm_place()) is not None:
        return place
    interface = named_interface() or cable()
    if wanted == 1 or (interface is None and wanted is None):
        print("one node: no Slurm step of several, and no cable that is up", file=sys.stderr)
        return Place(1, 0, "127.0.0.1", 0)
    if interface is None:
        what = f"PET_NNODES={wanted}, and no interface is known to lead to the others"
        raise Refused(
            what,
            "export NCCL_SOCKET_IFNAME=enp1s0f1np1, the one that `ip -br address` shows with the cable",
        )
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        os.environ.setdefault(name, interface)
    if devices := rdma_devices():
        os.environ.setdefault("NCCL_IB_HCA", ",".join(devices))
    # Both functions of the port as one device: 161 in place of 98 Gb/s, as others measured
    if "NCCL_IB_HCA" in os.environ:
        os.environ.setdefault("NCCL_IB_MERGE_NICS", "1")
    network = network_of(interface)
    nodes = wanted or 2
    print(
        f"waits for {nodes - 1} more on {interface}, {network}: start the same script there",
        file=sys.stderr,
    )
    return meet(network, nodes, script, ranks)


def slurm_place() -> Place | None:
    """The place that a Slurm step of several nodes has; None outside of one."""
    env = os.environ
    if int(env.get("SLURM_STEP_NUM_NODES") or 1) < 2:
        if int(env.get("SLURM_JOB_NUM_NODES") or 1) > 1 and "SLURM_STEP_ID" not in env:
            what = f"a job of {env['SLURM_JOB_NUM_NODES']} nodes, and this runs on one of them"
            raise Refused(what, f"srun --ntasks-per-node 1 {' '.join(sys.argv[:1])} ...")
        return None
    if int(env["SLURM_STEP_NUM_TASKS"]) != int(env["SLURM_STEP_NUM_NODES"]):
        what = f"{env['SLURM_STEP_NUM_TASKS']} tasks on {env['SLURM_STEP_NUM_NODES']} nodes: one a node is needed"
        raise Refused(what, "srun --ntasks-per-node 1 ...")
    named = subprocess.run(
        ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]],
        capture_output=True,
        text=True,
        check=True,
    )
    port = 20_000 + int(env["SLURM_JOB_ID"]) % 10_000
    return Place(
        int(env["SLURM_STEP_NUM_NODES"]), int(env["SLURM_NODEID"]), named.stdout.split()[0], port
    )


def number(name: str) -> int | None:
    """The count that a variable holds; None where it is not set."""
    if not (text := os.environ.get(name, "")):
        return None
    if not text.isdecimal() or int(text) < 1:
        raise Refused(f"{name}={text} is not a whole number of at least 1", f"unset {name}")
    return int(text)


def processes() -> int:
    """Processes of this node: PET_NPROC_PER_NODE, else one a GPU, else one."""
    if (count := number("PET_NPROC_PER_NODE")) is not None:
        return count
    if (shown := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return max(1, len([name for name in shown.split(",") if name.strip() not in ("", "-1")]))
    with suppress(OSError, subprocess.SubprocessError):
        return max(
            1, subprocess.check_output(["nvidia-smi", "-L"], text=True, timeout=20).count("GPU ")
        )
    return 1


def named_interface() -> str | None:
    """The first interface that NCCL_SOCKET_IFNAME names, as the stack file sets it."""
    name = (
        os.environ.get("NCCL_SOCKET_IFNAME", "").split(",")[0].removeprefix("=").partition(":")[0]
    )
    return name if name and not name.startswith("^") else None


def cable() -> str | None:
    """The first ConnectX port that is up, has an address and is not the way to the rest of the
    world.
    """
    routes = Path("/proc/net/route").read_text(encoding="ascii").splitlines()[1:]
    outward = {row.split()[0] for row in routes if row.split()[1] == "00000000"}
    for path in sorted(NETWORKS.iterdir()):
        driver = os.path.basename(os.path.realpath(path / "device" / "driver"))
        if driver == "mlx5_core" and path.name not in outward and is_up(path):
            with suppress(OSError):
                ask(path.name, GET_ADDRESS)
                return path.name
    return None


def is_up(path: Path) -> bool:
    """Whether the interface of that folder of /sys has a link."""
    return (path / "operstate").read_text(encoding="ascii").strip() == "up"


def rdma_devices() -> list[str]:
    """The RDMA devices whose port has a link: both functions of the cable."""
    found = []
    for device in sorted(RDMA.iterdir()) if RDMA.is_dir() else ():
        state = device / "ports" / "1" / "state"
        if state.is_file() and "ACTIVE" in state.read_text(encoding="ascii"):
            found.append(device.name)
    return found


def ask(interface: str, what: int) -> str:
    """An interface's IPv4 address or netmask; OSError if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe, what, struct.pack("256s", interface.encode()[:15]))
    return socket.inet_ntoa(answer[20:24])


def network_of(interface: str) -> ipaddress.IPv4Interface:
    """The IPv4 address of an interface, with its network."""
    try:
        return ipaddress.IPv4Interface(
            f"{ask(interface, GET_ADDRESS)}/{ask(interface, GET_NETMASK)}"
        )
    except OSError as error:
        what = f"{interface} has no IPv4 address: {error.strerror}"
        raise Refused(
            what,
            "give it one (ip -br address shows them), or name another one in NCCL_SOCKET_IFNAME",
        ) from None


def meet(
    own: ipaddress.IPv4Interface, nodes: int, script: str, ranks: int, patience: float = PATIENCE
) -> Place:
    """Call on the network of `own` until `nodes` nodes that start this script have heard each other
    -> this one's place.

    A call says the port that the caller would listen on as the first node, its processes, and whom
    it has heard. Refused where more nodes call, not all have called after `patience` seconds, or
    they start different numbers of processes.
    """
    me, everybody = str(own.ip), str(own.network.broadcast_address)
    with socket.socket() as probe:
        probe.bind((me, 0))
        mine = Call(script, probe.getsockname()[1], ranks, ())
    calls, until, over = {me: mine}, time.monotonic() + patience, float("inf")
    with datagrams(everybody, CALL_PORT) as listening, datagrams(me, 0) as calling:
        while (now := time.monotonic()) < min(until, over):
            known = tuple(sorted(calls, key=ipaddress.IPv4Address))
            calls[me] = mine._replace(heard=known)
            calling.sendto(json.dumps(calls[me]).encode(), (everybody, CALL_PORT))
            calls |= {
                node: call for node, call in listen(listening, own).items() if call.script == script
            }
            if len(calls) > nodes:
                raise Refused(
                    f"{len(calls)} nodes start {script}: {', '.join(calls)}",
                    f"PET_NNODES={len(calls)}",
                )
            if len(calls) == nodes and all(len(call.heard) == nodes for call in calls.values()):
                # Until then it calls for those that have not heard all
                over = min(over, now + AFTER)
    if over == float("inf"):
        what = (
            f"only {', '.join(calls)} of {nodes} nodes called in {patience:.0f} s on {own.network}"
        )
        fix = "start the same script on the others, and let UDP pass on the cable; for one node alone PET_NNODES=1"
        raise Refused(what, fix)
    if any(call.ranks != ranks for call in calls.values()):
        counts = ", ".join(f"{call.ranks} on {node}" for node, call in calls.items())
        raise Refused(
            f"the nodes start different numbers of processes: {counts}",
            "export PET_NPROC_PER_NODE=1 on all",
        )
    known = tuple(sorted(calls, key=ipaddress.IPv4Address))
    return Place(nodes, known.index(me), known[0], calls[known[0]].port)


def datagrams(address: str, port: int) -> socket.socket:
    """A UDP socket of that address that may call all; Refused if it cannot be had."""
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    try:
        made.bind((address, port))
    except OSError as error:
        made.close()
        raise Refused(
            f"UDP {address}:{port} cannot be used: {error.strerror}", "ss -ulnp shows what holds it"
        ) from None
    return made


def listen(listening: socket.socket, own: ipaddress.IPv4Interface) -> dict[str, Call]:
    """The calls of other nodes of the network that come in CALL_EVERY seconds, by the address that
    sent them.
    """
    calls, until = {}, time.monotonic() + CALL_EVERY
    while (left := until - time.monotonic()) > 0:
        listening.settimeout(left)
        with suppress(TimeoutError, ValueError, TypeError):
            data, (sender, _) = listening.recvfrom(8192)
            script, port, ranks, heard = json.loads(data)
            call = Call(str(script), int(port), int(ranks), tuple(map(str, heard)))
            if (
                sender != str(own.ip)
                and ipaddress.IPv4Address(sender) in own.network
                and 0 < call.port < 65536
            ):
                calls[sender] = call
    return calls


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
