"""A run on a Docker swarm, as a job.

The functions work on any node of the swarm. Commands that only a manager accepts are sent to a
manager over ssh. On every node, Docker's command line is used with the rights of the user.
"""

import json
import logging
import os
import subprocess
import time
from collections.abc import Iterator

from tunesmith.errors import MachineError
from tunesmith.launch.job import POLL, Job, JobState, last_step, step_and_time_left
from tunesmith.launch.rendezvous import local_addresses
from tunesmith.launch.ssh import remote_words, run_on, try_on
from tunesmith.run_dir import RunState

log = logging.getLogger(__name__)

# Label of all Docker objects that a launch creates. Only objects with this label are removed after
# the run.
JOB_LABEL = "tunesmith.job"
SERVICE = "ranks"
# Seconds that the ranks have to save after a stop request, before they are killed.
SECONDS_TO_SAVE = 3600
# Seconds to wait until Swarm has removed the containers. Remaining containers are then removed by
# force.
REMOVE_SECONDS = 20.0
# States of a task that has ended.
ENDED_TASKS = {"Complete", "Failed", "Shutdown", "Rejected", "Orphaned", "Remove"}


class SwarmJob(Job):
    """A job that is a service of a swarm.

    `details` has `hosts`: the addresses of the nodes, separated by commas.
    """

    @property
    def service(self) -> str:
        """The name of the service in Swarm."""
        return f"{self.name}_{SERVICE}"

    def hosts(self) -> list[str]:
        """Return the host names of the nodes for ssh. This node is "" and comes first."""
        local = local_addresses()
        return sorted("" if host in local else host for host in self.details["hosts"].split(","))

    def manager(self) -> str:
        """Return a node that accepts commands for the swarm.

        Raise MachineError if no manager node can be reached.
        """
        unreached = MachineError(
            "no manager node of the swarm can be reached",
            where=self.details["hosts"],
            fix="start docker on a manager node of the swarm, or run: docker node promote NODE",
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
        """Return the newest task of each replica, with the keys Node, CurrentState and Error.

        Return None if the service does not exist.
        """
        words = ["docker", "service", "ps", "--no-trunc", "--format", "{{json .}}", self.service]
        listed = try_on(manager, *words)
        # docker fails if the service does not exist.
        if listed.returncode:
            return None
        slots: dict[str, dict[str, str]] = {}
        for line in listed.stdout.splitlines():
            task = json.loads(line)
            # The newest task of a replica is listed first. Older tasks are listed as ` \_ NAME`.
            slots.setdefault(task["Name"].split()[-1], task)
        return list(slots.values())

    def state(self) -> JobState:
        try:
            tasks = self.tasks(self.manager())
        except MachineError as error:
            return JobState(RunState.UNKNOWN, f"{error.what}: {error.why or error.where}")
        if tasks is None:
            return super().state()
        states = {_task_state(task) for task in tasks}
        texts = [
            f"{task['Node'] or 'no node'} {task['CurrentState'].lower()} {task['Error']}".strip()
            for task in tasks
        ]
        # If all tasks have ended, derive the state of the job from the states of the tasks.
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
        # Read the log at the manager, which collects the logs of all tasks of the service.
        command = remote_words(manager, [*command, self.service])
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            assert process.stdout is not None
            # Read without blocking. Otherwise a task that prints nothing would delay the check
            # whether all tasks have ended.
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
                        # `docker service logs --follow` does not end with the tasks, so check their
                        # state. Do so at every 4th poll, because it needs an ssh connection.
                        quiet_polls += 1
                        if follow and quiet_polls % 4 == 0:
                            is_over = not self.state().at_work
                        time.sleep(POLL)
            finally:
                process.kill()

    def stop(self) -> str:
        """Ask the ranks to save, wait for their end, and remove all objects of the launch."""
        manager = self.manager()
        tasks = self.tasks(manager)
        if tasks:
            minutes = SECONDS_TO_SAVE // 60
            step = last_step(self.run_dir) or "before the first step"
            log.info(
                f"{self.name}: a stop was requested; the ranks have {minutes} minutes to save; "
                f"{step}"
            )
            # Set the number of replicas to 0. Swarm then sends SIGTERM to the tasks, which have the
            # grace period to save.
            update = ("docker", "service", "update", "--detach", "--replicas", "0")
            run_on(manager, *update, self.service)
        # Wait one minute longer than Swarm's grace period.
        deadline = time.monotonic() + SECONDS_TO_SAVE + 60
        while tasks and time.monotonic() < deadline:
            time.sleep(POLL)
            rows = run_on(manager, "docker", "node", "ls", "--format", "{{.Status}} {{.Hostname}}")
            # Ignore lost nodes, because they cannot report that their task has ended, so the loop
            # would wait until the deadline.
            lost_nodes = {
                row.split()[1] for row in rows.splitlines() if not row.startswith("Ready")
            }
            tasks = [
                task
                for task in self.tasks(manager) or []
                if _task_state(task) not in ENDED_TASKS and task["Node"] not in lost_nodes
            ]
        unreachable = self.clean()
        run = Job.state(self)
        line = f"the service is removed; {run.state}: {run.text}"
        return "; ".join([line, *(f"{host} cannot be reached" for host in unreachable)])

    def clean(self) -> list[str]:
        """Remove all objects that a launch created. Return the nodes that cannot be reached.

        The objects are the service, secrets, configs and networks of the swarm, and the containers
        of each node.
        """
        label_filter = f"label={JOB_LABEL}={self.name}"
        manager = self.manager()
        # Remove the service first, because Swarm does not remove a secret or network in use.
        for kind in ("service", "secret", "config", "network"):
            ids = run_on(manager, "docker", kind, "ls", "--quiet", "--filter", label_filter).split()
            if ids:
                run_on(manager, "docker", kind, "rm", *ids)
        unreachable = []
        list_ids = ("docker", "ps", "--all", "--quiet", "--filter", label_filter)
        # Wait until Swarm has removed the containers. Remove the remaining ones by force.
        deadline = time.monotonic() + REMOVE_SECONDS
        for host in self.hosts():
            try:
                while run_on(host, *list_ids) and time.monotonic() < deadline:
                    time.sleep(POLL)
                ids = run_on(host, *list_ids).split()
                if ids:
                    try_on(host, "docker", "rm", "--force", *ids)
            except MachineError:
                unreachable.append(host)
        return unreachable


def _task_state(task: dict[str, str]) -> str:
    """Return the state of a task, such as `Running` from `Running 3 minutes ago`."""
    return task["CurrentState"].split()[0]
