"""A run on a Docker swarm as a job, from any of its nodes, and the nodes that a run can take.

Commands that only a manager takes go to one by ssh. Docker's own command line is used on every
node, with the user's rights.
"""

import json
import logging
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import MachineError
from tunesmith.launch.jobs import POLL, Job, JobState, last_step, step_and_time_left
from tunesmith.launch.rendezvous import local_addresses
from tunesmith.launch.ssh import remote_words, run_on, try_on
from tunesmith.run_dir import RunState
from tunesmith.tools.launch.stack import JOB_LABEL, SECONDS_TO_SAVE, SERVICE

log = logging.getLogger(__name__)

# Generic resources, as guides name them
GPU_RESOURCES = ("NVIDIA_GPU", "NVIDIA-GPU")
# Seconds that Swarm has to remove containers before they are removed by force
REMOVE_SECONDS = 20.0
# States of a task
ENDED_TASKS = {"Complete", "Failed", "Shutdown", "Rejected", "Orphaned", "Remove"}


@dataclass(frozen=True)
class SwarmNode:
    """A node of the swarm.

    Attributes:
        host: as ssh takes it; "" is this node.
        gpus: kind and count of them as a generic resource; None: it has none.
    """

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
        """The nodes as ssh takes them; this one is "", and first."""
        local = local_addresses()
        return sorted("" if host in local else host for host in self.details["hosts"].split(","))

    def manager(self) -> str:
        """The node that takes commands for the swarm; MachineError where none is reached."""
        unreached = MachineError(
            "no manager node of the swarm can be reached",
            where=self.details["hosts"],
            fix="start docker on a manager node of the swarm, or: docker node promote NODE",
        )
        for host in self.hosts():
            try:
                answer = run_on(host, "docker", "info", "--format", "{{.Swarm.ControlAvailable}}")
            except MachineError as error:
                unreached = error
                continue
            if answer.strip() == "true":
                return host
        raise unreached

    def tasks(self, manager: str) -> list[dict[str, str]] | None:
        """The newest task of each slot: Node, CurrentState, Error; None: there is no service."""
        words = ["docker", "service", "ps", "--no-trunc", "--format", "{{json .}}", self.service]
        listed = try_on(manager, *words)
        # The service is gone, or was never there: docker prints an error and no rows.
        if listed.returncode:
            return None
        slots: dict[str, dict[str, str]] = {}
        for line in listed.stdout.splitlines():
            task = json.loads(line)
            # The newest of a slot comes first. An older one is ` \_ NAME`.
            slots.setdefault(task["Name"].split()[-1], task)
        return list(slots.values())

    def state(self) -> JobState:
        try:
            tasks = self.tasks(self.manager())
        except MachineError as error:
            return JobState(RunState.UNKNOWN, f"{error.what}: {error.why or error.where}")
        if tasks is None:
            return super().state()
        states = {_state_of(task) for task in tasks}
        texts = []
        for task in tasks:
            node = task["Node"] or "no node"
            texts.append(f"{node} {task['CurrentState'].lower()} {task['Error']}".strip())
        # A subset: all tasks have ended, in whichever of these states.
        if states <= ENDED_TASKS:
            state = RunState.FAILED
            if states == {"Complete"}:
                state = RunState.FINISHED
            elif not states & {"Failed", "Rejected"}:
                state = RunState.KILLED
            return super().state().after(state, "; ".join(texts))
        text = "; ".join(filter(None, [*texts, step_and_time_left(self.run_dir)]))
        return JobState(RunState.RUNNING if "Running" in states else RunState.QUEUED, text)

    def read_log(self, *, follow: bool) -> Iterator[str]:
        manager = self.manager()
        if self.tasks(manager) is None:
            yield from super().read_log(follow=follow)
            return
        command = ["docker", "service", "logs", "--raw"]
        if follow:
            command.append("--follow")
        # Docker's logs are at the manager, which has the service.
        command = remote_words(manager, [*command, self.service])
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            assert process.stdout is not None
            # Without blocking: a task that prints nothing must not hold up the look at its end.
            os.set_blocking(process.stdout.fileno(), False)
            is_over = False
            quiet_polls = 0
            try:
                while True:
                    text = process.stdout.read()
                    if text:
                        yield text.decode(errors="replace")
                    elif is_over or process.poll() is not None:
                        return
                    else:
                        # docker follows on when all tasks have ended. Their state is queried
                        # less often, as that takes an ssh connection.
                        quiet_polls += 1
                        if follow and quiet_polls % 4 == 0:
                            is_over = not self.state().at_work
                        time.sleep(POLL)
            finally:
                process.kill()

    def stop(self) -> str:
        """Ask the ranks to save, wait for their end, and remove what the launch created."""
        manager = self.manager()
        tasks = self.tasks(manager)
        if tasks:
            minutes = SECONDS_TO_SAVE // 60
            step = last_step(self.run_dir) or "before the first step"
            log.info(f"{self.name}: stop requested; ranks have {minutes} minutes to save; {step}")
            # With no replicas Swarm sends SIGTERM to the tasks, and they have the grace period
            # to save.
            update = ("docker", "service", "update", "--detach", "--replicas", "0")
            run_on(manager, *update, self.service)
        # One minute more than Swarm's own grace period.
        deadline = time.monotonic() + SECONDS_TO_SAVE + 60
        while tasks and time.monotonic() < deadline:
            time.sleep(POLL)
            tasks = self.tasks_at_work(manager)
        unreachable = self.clean()
        run = Job.state(self)
        line = f"removed; {run.state}: {run.text}"
        return "; ".join([line, *(f"{host} cannot be reached" for host in unreachable)])

    def tasks_at_work(self, manager: str) -> list[dict[str, str]]:
        """The tasks that have not ended, but for those of nodes that are lost."""
        rows = run_on(manager, "docker", "node", "ls", "--format", "{{.Status}} {{.Hostname}}")
        # A lost node cannot report that its task has ended: waiting for it would last until the
        # timeout.
        lost_nodes = {row.split()[1] for row in rows.splitlines() if not row.startswith("Ready")}
        return [
            task
            for task in self.tasks(manager) or []
            if _state_of(task) not in ENDED_TASKS and task["Node"] not in lost_nodes
        ]

    def clean(self) -> list[str]:
        """Remove what carries our label -> the nodes that are not reached.

        That is the service, secrets, configs and networks of the swarm, and containers of each
        node.
        """
        mark = f"label={JOB_LABEL}={self.name}"
        manager = self.manager()
        # The service first: Swarm removes no secret or network that is in use.
        for kind in ("service", "secret", "config", "network"):
            ids = run_on(manager, "docker", kind, "ls", "--quiet", "--filter", mark).split()
            if ids:
                run_on(manager, "docker", kind, "rm", *ids)
        unreachable = []
        for host in self.hosts():
            try:
                _remove_containers(host, mark)
            except MachineError:
                unreachable.append(host)
        return unreachable


def _state_of(task: dict[str, str]) -> str:
    """`Running` of `Running 3 minutes ago`."""
    return task["CurrentState"].split()[0]


def _remove_containers(host: str, mark: str) -> None:
    """Wait until Swarm has removed a node's containers with this label, or remove them."""
    deadline = time.monotonic() + REMOVE_SECONDS
    # At least one look, however late it is.
    while True:
        ids = run_on(host, "docker", "ps", "--all", "--quiet", "--filter", mark).split()
        if not ids:
            return
        time.sleep(POLL)
        if time.monotonic() > deadline:
            try_on(host, "docker", "rm", "--force", *ids)


def find_nodes(hosts: Sequence[str], count: int | None) -> tuple[list[SwarmNode], list[str], str]:
    """The nodes to train on, this one first; the ids of the swarm's other nodes; the manager.

    MachineError unless they are `count`.

    Args:
        hosts: the other nodes; empty: all that are ready, up to `count`.

    Returns:
        The manager as ssh takes it; "" is this node.
    """
    swarm = json.loads(run_on("", "docker", "info", "--format", "{{json .Swarm}}"))
    if swarm["LocalNodeState"] != "active":
        raise MachineError(
            "this node is not in a swarm",
            where="docker info",
            why=swarm["LocalNodeState"],
            fix="docker swarm init --advertise-addr ADDRESS-ON-THE-CABLE, "
            "and on the other node the line that it prints",
        )
    manager = ""
    if not swarm["ControlAvailable"]:
        manager = _address(swarm["RemoteManagers"][0]["Addr"])
    ids = run_on(manager, "docker", "node", "ls", "--quiet").split()
    infos = json.loads(run_on(manager, "docker", "node", "inspect", *ids))
    ready = {
        info["ID"]: info
        for info in infos
        if info["Status"]["State"] == "ready" and info["Spec"]["Availability"] == "active"
    }
    # Node id -> the host that ssh takes, as far as it was named; the node of the launch is always
    # one of them, and the first.
    chosen = {swarm["NodeID"]: ""}
    for host in hosts:
        id_ = run_on(host, "docker", "info", "--format", "{{.Swarm.NodeID}}").strip()
        chosen.setdefault(id_, host)
    if not hosts:
        others = [id_ for id_ in ready if id_ != swarm["NodeID"]]
        chosen |= dict.fromkeys(others[: (count or len(ids)) - 1], "")
    fix = "docker swarm join on each, and as many --hosts as --nodes"
    for id_, host in chosen.items():
        if id_ not in ready:
            what = f"{host or 'this node'} is not ready in this swarm"
            raise MachineError(what, where="docker node ls", fix=fix)
    if count and len(chosen) != count:
        what = f"--nodes {count}, and there are {len(chosen)}"
        raise MachineError(what, where="docker node ls", fix=fix)
    nodes = []
    for id_, host in chosen.items():
        info = ready[id_]
        # The Status of a manager may have 0.0.0.0.
        manager_address = _address(info.get("ManagerStatus", {}).get("Addr", ""))
        address = manager_address or info["Status"]["Addr"]
        name = "" if id_ == swarm["NodeID"] else host or address
        nodes.append(SwarmNode(name, address, _gpus_of(info)))
    return nodes, [id_ for id_ in ids if id_ not in chosen], manager


def _gpus_of(info: dict[str, Any]) -> tuple[str, int] | None:
    """Kind and count of the GPUs that a node offers the swarm; None: none."""
    counts = Counter[str]()
    for resource in info["Description"]["Resources"].get("GenericResources", ()):
        # {"DiscreteResourceSpec": {"Kind": ..., "Value": 2}}, or a NamedResourceSpec for each GPU,
        # whose value is its UUID.
        for spec in resource.values():
            counts[spec["Kind"]] += spec["Value"] if isinstance(spec["Value"], int) else 1
    return next(((kind, counts[kind]) for kind in GPU_RESOURCES if counts[kind]), None)


def _address(endpoint: str) -> str:
    """HOST of HOST:PORT."""
    return endpoint.rpartition(":")[0].strip("[]")
