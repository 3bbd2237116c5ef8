"""A run in a Docker container of this machine, as a job."""

import subprocess
from collections.abc import Iterator

from tunesmith.errors import EXIT_OK, EXIT_STOPPED, MachineError, mask
from tunesmith.launch.job import Job, JobState, step_and_time_left
from tunesmith.launch.ssh import NO_COMMAND, try_on
from tunesmith.run_dir import RunState

TOOLKIT = "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
# Text in docker's error output -> (problem, fix).
DOCKER_FAULTS = {
    "permission denied while trying": (
        "this user has no permission to use Docker",
        "run `sudo usermod -aG docker $USER`, then log in again",
    ),
    "Cannot connect to the Docker": ("Docker is not running", "sudo systemctl start docker"),
    "select device driver": (
        "Docker finds no GPU",
        f"install nvidia-container-toolkit, then run: {TOOLKIT}",
    ),
}


class DockerJob(Job):
    """A job that runs in a Docker container of this machine. The container has the job's name."""

    def container(self) -> JobState | None:
        """Read the container's state from Docker. Return None if there is no such container."""
        # Read state and exit code in one call, so that both belong to the same moment.
        form = "--format={{.State.Status}} {{.State.ExitCode}}"
        inspected = run_docker("inspect", "--type=container", form, self.name, check=False)
        if inspected.returncode:
            return None
        status, code = inspected.stdout.split()
        if status in ("exited", "dead"):
            # An exit code above 128 means that a signal has killed the process.
            ending = RunState.FAILED if int(code) <= 128 else RunState.KILLED
            states = {EXIT_OK: RunState.FINISHED, EXIT_STOPPED: RunState.STOPPED}
            return JobState(states.get(int(code), ending), f"exit code {code}")
        # The container was created by `docker create` but not started yet.
        if status == "created":
            return JobState(RunState.QUEUED, "starts")
        # Return RUNNING even if the run directory has no lock yet, because the run may still be
        # starting.
        return JobState(RunState.RUNNING, "starts")

    def state(self) -> JobState:
        container = self.container()
        run = super().state()
        # If the container and the run directory have the same state, return that of the run
        # directory, because its text has more details.
        if container is None or container.state is run.state:
            return run
        if container.at_work:
            return container
        return run.after(container.state, container.text)

    def read_log(self, *, follow: bool) -> Iterator[str]:
        # If the container is already removed, read the log file of the run directory.
        if self.container() is None:
            yield from super().read_log(follow=False)
            return
        command = ["docker", "logs", f"--follow={str(follow).lower()}", self.name]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace"
        ) as logs:
            yield from logs.stdout or ()

    def stop(self) -> str:
        container = self.container()
        is_running = container is not None and container.state is RunState.RUNNING
        # A second signal would end the run before it has saved, so a run that trains gets a file.
        if not is_running or step_and_time_left(self.run_dir):
            return super().stop()
        run_docker("kill", "--signal=SIGTERM", self.name)
        return "stop requested: the run saves, then stops"


def run_docker(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run docker and return the finished process.

    Raise MachineError if docker cannot be used, or if the command fails and `check` is True.
    """
    process = try_on("", "docker", *words)
    if process.returncode == NO_COMMAND:
        raise MachineError(
            "docker is not installed", where="PATH", fix="sudo apt-get install docker.io"
        )
    if process.returncode == 0:
        return process
    where = f"docker {words[0]}"
    why = mask(process.stderr.strip())[:600]
    for text, (what, fix) in DOCKER_FAULTS.items():
        if text in why:
            raise MachineError(what, where=where, why=why, fix=fix)
    if check:
        raise MachineError(
            f"{where} failed",
            where=where,
            why=why,
            fix="check the configuration of Docker with `docker info`",
        )
    return process
