"""A run on a Docker swarm as a job, from any of its nodes, and the nodes that a run can take.

Commands that only a manager takes go to one by ssh. Docker's own command line is used on every node, with its rights.
"""

import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from tunesmith.errors import MachineError
from tunesmith.launch.jobs import POLL, Job, State, last_step
from tunesmith.launch.rendezvous import local_addresses
from tunesmith.launch.ship import SSH, Connection
from tunesmith.launch.stack import GRACE, LABEL, SERVICE
from tunesmith.run_dir import STOPPED

GPU = ("NVIDIA_GPU", "NVIDIA-GPU")  # generic resources, as guides name them
PROGRESS = 10.0  # seconds between two lines of a stop that waits
ENDED = {"Complete", "Failed", "Shutdown", "Rejected", "Orphaned", "Remove"}  # states of a task


@dataclass(frozen=True)
class SwarmNode:
    """A node of the swarm as `Connection` takes it, its address, the kind and count of its GPUs as a generic resource."""

    host: str
    address: str
    gpus: tuple[str, int] | None


class SwarmJob(Job):
    """A service of a swarm. `details`: `hosts`, the addresses of its nodes, separated by commas."""

    @property
    def service(self) -> str:
        """The name of the service in Swarm."""
        return f"{self.name}_{SERVICE}"

    def hosts(self) -> list[str]:
        """The nodes as `Connection` takes them, this one first."""
        own = local_addresses()
        return sorted("" if host in own else host for host in self.details["hosts"].split(","))

    def manager(self) -> Connection:
        """A connection to a node that takes commands for the swarm; MachineError where none is reached."""
        fix = "start docker on the node that manages the swarm, or: docker node promote NODE"
        fault = MachineError(
            "no node that manages the swarm is reached", where=self.details["hosts"], fix=fix
        )
        for host in self.hosts():
            try:
                with ExitStack() as stack:
                    connection = stack.enter_context(Connection(host))
                    if (
                        connection.run(
                            "docker", "info", "--format", "{{.Swarm.ControlAvailable}}"
                        ).strip()
                        == "true"
                    ):
                        stack.pop_all()
                        return connection
            except MachineError as error:
                fault = error
        raise fault

    def tasks(self, manager: Connection) -> list[dict[str, str]] | None:
        """The newest task of each slot: Node, CurrentState, Error; None where there is no such service."""
        words = ["docker", "service", "ps", "--no-trunc", "--format", "{{json .}}", self.service]
        code, out, _ = manager.ask("run", words=words)
        slots: dict[str, dict[str, str]] = {}
        for task in map(json.loads, out.splitlines()):
            slots.setdefault(task["Name"].split()[-1], task)
        return None if code else list(slots.values())

    def state(self) -> State:
        try:
            with self.manager() as manager:
                tasks = self.tasks(manager)
        except MachineError as error:
            return State("gone", f"{error.what}: {error.why or error.where}")
        if tasks is None:
            return super().state()
        said = [
            f"{task['Node'] or 'no node'} {task['CurrentState'].lower()} {task['Error']}".strip()
            for task in tasks
        ]
        states = {task["CurrentState"].split()[0] for task in tasks}
        text = "; ".join(filter(None, [*said, last_step(self.run_dir)]))
        if "Running" in states:
            return State("running", text)
        if not states <= ENDED:
            return State("waiting", text)
        stopped = ["stopped, saved"] if self.has_written(STOPPED) else []
        return State("ended", "; ".join(filter(None, [*said, *stopped, last_step(self.run_dir)])))

    def read_log(self, *, follow: bool) -> Iterator[str]:
        with self.manager() as manager:
            there, known = manager.host, self.tasks(manager) is not None
        if not known:
            yield from super().read_log(follow=follow)
            return
        words = [
            "docker",
            "service",
            "logs",
            "--raw",
            *(["--follow"] if follow else []),
            self.service,
        ]
        command = [*SSH, "--", there, shlex.join(words)] if there else words
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            assert process.stdout is not None
            os.set_blocking(process.stdout.fileno(), False)
            over, quiet = False, 0
            try:
                while True:
                    if text := process.stdout.read():
                        yield text.decode(errors="replace")
                    elif over or process.poll() is not None:
                        return
                    else:  # docker goes on to wait when all tasks have ended
                        quiet += 1
                        over = follow and quiet % 4 == 0 and not self.state().at_work
                        time.sleep(POLL)
            finally:
                process.kill()

    def stop(self, say: Callable[[str], None] = lambda text: None) -> str:
        """Ask the ranks to save, wait for their end, and remove what the launch made on all nodes."""
        with self.manager() as manager:
            tasks = self.tasks(manager)
            if tasks:
                say(f"the ranks are asked to save and end; they have {GRACE // 60} minutes for it")
                manager.run(
                    "docker", "service", "update", "--detach", "--replicas", "0", self.service
                )
            began = time.monotonic()
            said_at = began
            while tasks and time.monotonic() - began < GRACE + 60:
                time.sleep(POLL)
                down = manager.run(
                    "docker", "node", "ls", "--format", "{{.Status}} {{.Hostname}}"
                ).splitlines()
                lost = {line.split()[1] for line in down if not line.startswith("Ready")}
                left = self.tasks(manager) or []
                tasks = [
                    t
                    for t in left
                    if t["CurrentState"].split()[0] not in ENDED and t["Node"] not in lost
                ]
                if tasks and time.monotonic() - said_at >= PROGRESS:
                    said_at = time.monotonic()
                    nodes = ", ".join(sorted(task["Node"] or "no node" for task in tasks))
                    step = last_step(self.run_dir) or "before the first step"
                    say(f"after {said_at - began:.0f} s ranks are at work on {nodes}; {step}")
        lost_hosts = self.clean()
        return f"ended and removed; {Job.state(self).text}" + "".join(
            f"; {host} is not reached" for host in lost_hosts
        )

    def clean(self) -> list[str]:
        """Remove the service, secrets, configs and networks that carry our label, and such containers on each node; the nodes
        that are not reached."""
        mark, lost = f"label={LABEL}={self.name}", []
        with self.manager() as manager:
            for kind in ("service", "secret", "config", "network"):
                if found := manager.run("docker", kind, "ls", "--quiet", "--filter", mark).split():
                    manager.run("docker", kind, "rm", *found)
        for host in self.hosts():
            try:
                with Connection(host) as node:
                    deadline = time.monotonic() + 20  # seconds that Swarm has for it
                    while found := node.run(
                        "docker", "ps", "--all", "--quiet", "--filter", mark
                    ).split():
                        time.sleep(POLL)
                        if time.monotonic() > deadline:
                            node.ask("run", words=["docker", "rm", "--force", *found])
            except MachineError:
                lost.append(host)
        return lost


def in_swarm() -> bool:
    """Whether this node is in a swarm; not where docker is not installed or does not answer."""
    with Connection("") as here:
        code, state, _ = here.ask(
            "run", words=["docker", "info", "--format", "{{.Swarm.LocalNodeState}}"]
        )
    return code == 0 and state.strip() == "active"


def find_nodes(hosts: Sequence[str], count: int | None) -> tuple[list[SwarmNode], list[str], str]:
    """The nodes to train on, this one first; the ids of the swarm's other nodes; the manager as `Connection` takes it.

    `hosts` names the others; without, all that are ready are taken. MachineError unless they are `count`."""
    with Connection("") as here:
        swarm = json.loads(here.run("docker", "info", "--format", "{{json .Swarm}}"))
    if swarm["LocalNodeState"] != "active":
        fix = "docker swarm init --advertise-addr ADDRESS-ON-THE-CABLE, and on the other node the line that it prints"
        raise MachineError(
            "this node is in no swarm", where="docker info", why=swarm["LocalNodeState"], fix=fix
        )
    manager = "" if swarm["ControlAvailable"] else _address(swarm["RemoteManagers"][0]["Addr"])
    with Connection(manager) as connection:
        ids = connection.run("docker", "node", "ls", "--quiet").split()
        listed = {
            node["ID"]: node
            for node in json.loads(connection.run("docker", "node", "inspect", *ids))
        }
    up = [node for node in ids if listed[node]["Status"]["State"] == "ready"]
    up = [node for node in up if listed[node]["Spec"]["Availability"] == "active"]
    chosen = {swarm["NodeID"]: ""}
    for host in hosts:
        with Connection(host) as connection:
            chosen.setdefault(
                connection.run("docker", "info", "--format", "{{.Swarm.NodeID}}").strip(), host
            )
    for node in () if hosts else up[:]:
        if len(chosen) < (count or len(up)):
            chosen.setdefault(node, "")
    names = {node: about["Description"]["Hostname"] for node, about in listed.items()}
    away = [names.get(node, host) for node, host in chosen.items() if node not in up]
    if away or len(chosen) != (count or len(chosen)):
        what = (
            f"{away[0]} is not ready in this swarm"
            if away
            else f"--nodes {count}, and there are {len(chosen)}"
        )
        fix = "docker swarm join on each, and as many --hosts as --nodes"
        raise MachineError(what, where="docker node ls", fix=fix)
    nodes = []
    for node, host in chosen.items():
        address = (
            _address(listed[node].get("ManagerStatus", {}).get("Addr", ""))
            or listed[node]["Status"]["Addr"]
        )
        specs = [
            s
            for r in listed[node]["Description"]["Resources"].get("GenericResources", ())
            for s in r.values()
        ]
        found = [s for s in specs if s["Kind"] in GPU]  # a count, or one entry a GPU with its UUID
        count_here = sum(s["Value"] if isinstance(s["Value"], int) else 1 for s in found)
        gpus = (found[0]["Kind"], count_here) if count_here else None
        nodes.append(SwarmNode("" if node == swarm["NodeID"] else host or address, address, gpus))
    return nodes, [node for node in ids if node not in chosen], manager


def _address(endpoint: str) -> str:
    """HOST of HOST:PORT."""
    return endpoint.rpartition(":")[0].strip("[]")
