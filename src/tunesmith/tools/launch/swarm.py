"""Selection of the nodes of a Docker swarm for a run.

The functions work on any node of the swarm. Commands that only a manager accepts are sent to a
manager over ssh. On every node, Docker's command line is used with the rights of the user.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import MachineError
from tunesmith.launch.ssh import run_on
from tunesmith.units import count_of

# Names of the generic resource for GPUs that are used in setup guides.
GPU_RESOURCES = ("NVIDIA_GPU", "NVIDIA-GPU")


@dataclass(frozen=True)
class SwarmNode:
    """A node of the swarm.

    Attributes:
        host: the host name for ssh. "" is this node.
        address: the address of the node in the swarm.
        gpus: the name of the generic resource for GPUs, and the number of GPUs, or None.
    """

    host: str
    address: str
    gpus: tuple[str, int] | None


def find_nodes(hosts: Sequence[str], count: int | None) -> tuple[list[SwarmNode], list[str], str]:
    """Select the nodes of a run.

    Args:
        hosts: the ssh names of the other nodes. If empty, use all nodes that are ready.
        count: the number of nodes, or None for any number.

    Returns:
        Three values: the selected nodes, which start with this node; the ids of the swarm's other
        nodes; and the ssh host name of a manager, or "" if this node is a manager.

    Raises:
        MachineError: if a node is not ready, or if the number of nodes is not `count`.
    """
    swarm = json.loads(run_on("", "docker", "info", "--format", "{{json .Swarm}}"))
    if swarm["LocalNodeState"] != "active":
        raise MachineError(
            "this node is not in a swarm",
            where="docker info",
            why=f"the swarm state of this node is {swarm['LocalNodeState']}",
            fix="run `docker swarm init --advertise-addr ADDRESS-ON-THE-CABLE`, "
            "then run the printed command on the other node",
        )
    manager = ""
    if not swarm["ControlAvailable"]:
        manager = _host_of_endpoint(swarm["RemoteManagers"][0]["Addr"])
    ids = run_on(manager, "docker", "node", "ls", "--quiet").split()
    ready = {
        info["ID"]: info
        for info in json.loads(run_on(manager, "docker", "node", "inspect", *ids))
        if info["Status"]["State"] == "ready" and info["Spec"]["Availability"] == "active"
    }
    # Node id -> host name for ssh, or "" if the user gave no host name. This node is always
    # selected and comes first.
    chosen = {swarm["NodeID"]: ""}
    for host in hosts:
        id_ = run_on(host, "docker", "info", "--format", "{{.Swarm.NodeID}}").strip()
        chosen.setdefault(id_, host)
    if not hosts:
        candidates = list(dict.fromkeys([swarm["NodeID"], *ready]))
        chosen = dict.fromkeys(candidates[:count], "")
    for id_, host in chosen.items():
        if id_ not in ready:
            raise MachineError(
                f"{host or 'this node'} is not a ready node of this swarm",
                where="docker node ls",
                fix="start Docker on a node that is down, add a missing node with the command that "
                "`docker swarm join-token worker` prints, or activate a drained node: docker node "
                "update --availability active NODE",
            )
    if count and len(chosen) != count:
        found = "this node and --hosts are" if hosts else "the swarm has only"
        raise MachineError(
            f"--nodes is {count}, but {found} {count_of(len(chosen), 'ready node')}",
            where="docker node ls",
            fix=f"use --nodes {len(chosen)}, name other --hosts, or add nodes with the command "
            "that `docker swarm join-token worker` prints",
        )
    nodes = []
    for id_, host in chosen.items():
        info = ready[id_]
        # Prefer the address in ManagerStatus, because the address in the Status of a manager may be
        # 0.0.0.0.
        manager_address = _host_of_endpoint(info.get("ManagerStatus", {}).get("Addr", ""))
        address = manager_address or info["Status"]["Addr"]
        name = "" if id_ == swarm["NodeID"] else host or address
        nodes.append(SwarmNode(name, address, _read_gpus(info)))
    return nodes, [id_ for id_ in ids if id_ not in chosen], manager


def _read_gpus(info: dict[str, Any]) -> tuple[str, int] | None:
    """Return the kind and the count of the GPUs that a node offers the swarm, or None."""
    counts = Counter[str]()
    for resource in info["Description"]["Resources"].get("GenericResources", ()):
        # A resource is {"DiscreteResourceSpec": {"Kind": ..., "Value": 2}}, or a NamedResourceSpec
        # for each GPU, whose value is the UUID of the GPU.
        for spec in resource.values():
            counts[spec["Kind"]] += spec["Value"] if isinstance(spec["Value"], int) else 1
    return next(((kind, counts[kind]) for kind in GPU_RESOURCES if counts[kind]), None)


def _host_of_endpoint(endpoint: str) -> str:
    """Return the host of an address HOST:PORT."""
    return endpoint.rpartition(":")[0].strip("[]")
